"""The shared memory: what a write does, and that a window is the matrix as long as it holds everything."""

import pytest
import torch

from l2l_scale.optimizers.memory import DenseMemory, WindowedMemory, check_storage, is_dense

N, R, W = 6, 2, 3
DECAYS = {"none": 1.0, "number": 0.9, "per problem": torch.tensor([[0.5], [0.8]], dtype=torch.float64)}


def values(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def storages(writes, initial=0.7):
    return DenseMemory(initial), WindowedMemory(initial, writes, W)


def written(memory, theta, writes, decay=1.0):
    tree = memory.init(theta)
    for k in range(writes):
        tree = memory.write(tree, values(2, N, W, seed=2 * k), values(2, N, W, seed=2 * k + 1), decay)
    return tree


def matrix(memory, tree, size=N):
    return memory.read(tree, torch.eye(size, dtype=torch.float64).expand(2, size, size))


def test_a_write_adds_outer_products_and_not_a_number():
    memory = DenseMemory(0.0)
    a, b = values(2, N, W, seed=1), values(2, N, W, seed=2)
    tree = memory.write(memory.init(values(2, N)), a, b)
    expected = sum(a[:, :, None, w] * b[:, None, :, w] for w in range(W))
    assert (tree - expected).abs().max() <= 1e-14
    assert torch.linalg.matrix_rank(tree).tolist() == [W, W]


@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
def test_a_write_changes_the_memory_by_a_matrix_of_rank_at_most_w_plus_what_decays(decay):
    for memory in storages(5):
        tree = written(memory, values(2, N), 2)
        after = memory.write(tree, values(2, N, W, seed=9), values(2, N, W, seed=10), decay)
        factor = decay.unsqueeze(-1) if isinstance(decay, torch.Tensor) else decay
        change = matrix(memory, after) - factor * matrix(memory, tree)
        assert torch.linalg.matrix_rank(change, rtol=1e-10).max() <= W


@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
@pytest.mark.parametrize("writes", [0, 1, 4])
def test_a_window_is_the_matrix_while_it_holds_everything(writes, decay):
    theta, r = values(2, N), values(2, N, R, seed=20)
    dense, window = storages(4)
    a, b = written(dense, theta, writes, decay), written(window, theta, writes, decay)
    assert (dense.read(a, r) - window.read(b, r)).abs().max() <= 1e-13


def test_a_cut_window_is_the_matrix_of_the_last_writes():
    window = WindowedMemory(0.7, 2, W)
    dense = DenseMemory(0.7)
    tree, last = written(window, values(2, N), 5), dense.init(values(2, N))
    for k in (3, 4):
        last = dense.write(last, values(2, N, W, seed=2 * k), values(2, N, W, seed=2 * k + 1))
    assert (matrix(window, tree) - last).abs().max() <= 1e-13


def test_before_anything_is_written_a_read_is_a_multiple_of_what_is_asked():
    theta, r = values(2, N), values(2, N, R, seed=3)
    for memory in storages(4):
        assert (memory.read(memory.init(theta), r) - 0.7 * r).abs().max() <= 1e-15


@pytest.mark.parametrize("kind", [0, 1], ids=["dense", "window"])
def test_permuting_coordinates_permutes_rows_and_columns(kind):
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    memory = storages(4)[kind]
    plain, permuted = memory.init(values(2, N)), memory.init(values(2, N))
    for k in range(3):
        a, b = values(2, N, W, seed=2 * k), values(2, N, W, seed=2 * k + 1)
        plain, permuted = memory.write(plain, a, b), memory.write(permuted, a[:, order], b[:, order])
    expected = matrix(memory, plain)[:, order][:, :, order]
    assert (matrix(memory, permuted) - expected).abs().max() <= 1e-13


@pytest.mark.parametrize("kind", [0, 1], ids=["dense", "window"])
def test_problems_do_not_share_a_memory(kind):
    memory = storages(4)[kind]
    tree = written(memory, values(2, N), 3)
    a = values(2, N, W, seed=30)
    a[1] = 100.0
    other = memory.write(tree, a, values(2, N, W, seed=31))
    a[1] = -3.0
    again = memory.write(tree, a, values(2, N, W, seed=31))
    assert torch.equal(matrix(memory, other)[0], matrix(memory, again)[0])
    assert not torch.equal(matrix(memory, other)[1], matrix(memory, again)[1])


@pytest.mark.parametrize("kind", [0, 1], ids=["dense", "window"])
def test_derivatives_through_writes_and_reads(kind):
    memory = storages(2)[kind]

    def function(a, b, r, decay):
        tree = memory.init(a[0, ..., 0])
        for k in range(3):  # more than the window holds
            tree = memory.write(tree, a[k], b[k], decay)
        return memory.read(tree, r)

    inputs = values(3, 2, 4, W, seed=1), values(3, 2, 4, W, seed=2), values(2, 4, R), values(2, 1).sigmoid()
    assert torch.autograd.gradcheck(function, tuple(x.requires_grad_() for x in inputs))


def test_a_window_of_many_coordinates_never_makes_a_matrix():
    size = 20_000  # squared: 1.6 GB
    memory = WindowedMemory(1.0, 4, W)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        tree = memory.init(torch.zeros(1, size))
        for _ in range(5):
            tree = memory.write(tree, torch.ones(1, size, W), torch.ones(1, size, W))
        memory.read(tree, torch.ones(1, size, R))
    assert size * W <= largest <= size * 4 * W


def test_size_decides_between_the_storages_unless_told_otherwise():
    assert is_dense("auto", 256, 256)
    assert not is_dense("auto", 257, 256)
    assert is_dense("dense", 10**6, 256)
    assert not is_dense("window", 2, 256)
    with pytest.raises(ValueError, match=r"storage \('sparse'\) must be 'auto', 'dense' or 'window'"):
        check_storage("sparse", 1, 1)
