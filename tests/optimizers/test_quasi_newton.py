"""Hand-set heads make the memory BFGS: against SciPy's update classes and textbook formulas, in float64."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.optimize
import torch

from l2l_scale.optimizers.memory import DenseMemory, WindowedMemory
from l2l_scale.optimizers.quasi_newton import (
    DenseSecantMemory,
    WindowedSecantMemory,
    dot,
    inverse_hessian_write,
    norm,
    reciprocal,
)

YES = torch.ones(1, 1, dtype=torch.bool)


def row(x):
    """One problem's vector, (1, N)."""
    return torch.as_tensor(np.asarray(x)).unsqueeze(0)


def times(matrix, v):
    return (matrix @ v.unsqueeze(-1)).squeeze(-1)


def rosenbrock_pairs(size=5):
    """Steps and gradient changes of SciPy's BFGS on Rosenbrock's function."""
    points = [np.linspace(-1.2, 1.4, size)]
    rosen, gradient = scipy.optimize.rosen, scipy.optimize.rosen_der
    scipy.optimize.minimize(rosen, points[0], jac=gradient, method="BFGS", callback=points.append)
    points = points[:25]
    steps = [b - a for a, b in pairwise(points)]
    changes = [gradient(b) - gradient(a) for a, b in pairwise(points)]
    assert len(steps) > 15
    assert all(s @ y > 0 for s, y in zip(steps, changes, strict=True))
    return steps, changes


def scipys_bfgs(steps, changes):
    """SciPy's inverse Hessian after every pair."""
    truth = scipy.optimize.BFGS(init_scale=1.0)
    truth.initialize(len(steps[0]), "inv_hess")
    for s, y in zip(steps, changes, strict=True):
        truth.update(s, y)
        yield truth.get_matrix()


class HandSet:
    """A shared memory, dense or windowed, whose two write heads are set to the formulas of BFGS."""

    def __init__(self, storage, size):
        self.storage, self.size = storage, size
        self.tree = storage.init(torch.zeros(1, size, dtype=torch.float64))

    def read(self, v):
        return self.storage.read(self.tree, v.unsqueeze(-1)).squeeze(-1)

    def write(self, s, y):
        a, b = inverse_hessian_write(s, y, self.read(y), 1 / dot(s, y))
        assert a.shape[-1] == 2
        self.tree = self.storage.write(self.tree, a, b)

    def matrix(self):
        return torch.cat([self.read(e) for e in torch.eye(self.size, dtype=torch.float64).split(1)]).T


def hand_set(kind, size, writes=100):
    return HandSet(DenseMemory(1.0) if kind == "dense" else WindowedMemory(1.0, writes, 2), size)


def secants(kind, pairs=100):
    return DenseSecantMemory() if kind == "dense" else WindowedSecantMemory(pairs)


def bfgs_matrix(memory, tree, diagonal):
    """M = K + P D Pᵀ, column by column."""
    columns = []
    for e in torch.eye(diagonal.shape[-1], dtype=torch.float64).split(1):
        rest = memory.unknown(tree, diagonal * memory.unknown_transposed(tree, e))
        columns.append(memory.known(tree, e) + rest)
    return torch.cat(columns).T


both_storages = pytest.mark.parametrize("kind", ["dense", "window"])


@both_storages
def test_hand_set_heads_equal_scipys_bfgs_on_rosenbrock(kind):
    steps, changes = rosenbrock_pairs()
    memory = hand_set(kind, 5)
    for s, y, truth in zip(steps, changes, scipys_bfgs(steps, changes), strict=True):
        memory.write(row(s), row(y))
        assert (memory.matrix() - torch.from_numpy(truth)).abs().max() <= 1e-10


@both_storages
def test_hand_set_heads_make_the_iterates_of_bfgs_with_exact_line_search_on_quadratics(kind):
    rng, size = np.random.default_rng(0), 8
    w, target = rng.standard_normal((size, size)), rng.standard_normal(size)
    hessian = 2 * w.T @ w

    def gradient(x):
        return 2 * w.T @ (w @ x - target)

    memory, ours, inverse, theirs = hand_set(kind, size), np.zeros(size), np.eye(size), np.zeros(size)
    for _ in range(size):
        g = gradient(ours)
        d = -memory.read(row(g))[0].numpy()
        s = -(g @ d) / (d @ hessian @ d) * d
        memory.write(row(s), row(gradient(ours + s) - g))
        ours = ours + s

        g = gradient(theirs)  # the textbook, independently
        d = -inverse @ g
        s = -(g @ d) / (d @ hessian @ d) * d
        y = gradient(theirs + s) - g
        v = np.eye(size) - np.outer(s, y) / (y @ s)
        inverse, theirs = v @ inverse @ v.T + np.outer(s, s) / (y @ s), theirs + s
        assert np.abs(ours - theirs).max() <= 1e-10
        assert np.abs(memory.matrix().numpy() - inverse).max() <= 1e-10 * np.abs(inverse).max()
    assert np.abs(gradient(ours)).max() <= 1e-8  # and they terminate
    assert np.abs(inverse @ hessian - np.eye(size)).max() <= 1e-6


def test_a_bfgs_write_is_symmetric_and_of_rank_two():
    steps, changes = rosenbrock_pairs()
    memory = hand_set("dense", 5)
    for s, y in zip(steps, changes, strict=True):
        before = memory.matrix()
        memory.write(row(s), row(y))
        change = memory.matrix() - before
        assert (change - change.T).abs().max() <= 1e-10
        assert torch.linalg.matrix_rank(change, atol=1e-10) <= 2
        assert (memory.read(row(y)) - row(s)).abs().max() <= 1e-9  # the secant equation M y = s


@both_storages
@pytest.mark.parametrize("scale", [1.0, 0.03])
def test_secant_memory_equals_scipys_bfgs_from_any_initial_scale(kind, scale):
    steps, changes = rosenbrock_pairs()
    memory = secants(kind)
    tree = memory.init(torch.zeros(1, 5, dtype=torch.float64))
    truth = scale * np.eye(5)
    for s, y in zip(steps, changes, strict=True):
        tree = memory.write(tree, row(s), row(y), YES)
        v = np.eye(5) - np.outer(s, y) / (y @ s)
        truth = v @ truth @ v.T + np.outer(s, s) / (y @ s)
        ours = bfgs_matrix(memory, tree, torch.full((1, 5), scale, dtype=torch.float64))
        assert np.abs(ours.numpy() - truth).max() <= 1e-10


def test_secant_memory_equals_scipys_class_at_scale_one():
    steps, changes = rosenbrock_pairs()
    memory = DenseSecantMemory()
    tree = memory.init(torch.zeros(1, 5, dtype=torch.float64))
    for s, y, truth in zip(steps, changes, scipys_bfgs(steps, changes), strict=True):
        tree = memory.write(tree, row(s), row(y), YES)
        ours = bfgs_matrix(memory, tree, torch.ones(1, 5, dtype=torch.float64))
        assert np.abs(ours.numpy() - truth).max() <= 1e-10


@pytest.mark.parametrize("pairs", [1, 3, 10])
def test_a_window_of_pairs_equals_the_two_loop_recursion_of_lbfgs(pairs):
    steps, changes = rosenbrock_pairs(7)
    memory = WindowedSecantMemory(pairs)
    tree = memory.init(torch.zeros(1, 7, dtype=torch.float64))
    probe = np.random.default_rng(1).standard_normal(7)
    for k, (s, y) in enumerate(zip(steps, changes, strict=True)):
        tree = memory.write(tree, row(s), row(y), YES)
        kept = slice(max(0, k + 1 - pairs), k + 1)
        truth = scipy.optimize.LbfgsInvHessProduct(np.array(steps[kept]), np.array(changes[kept])).matvec(
            probe
        )
        v = row(probe)
        ours = memory.known(tree, v) + memory.unknown(tree, memory.unknown_transposed(tree, v))
        assert np.abs(ours[0].numpy() - truth).max() <= 1e-10 * np.abs(truth).max()


def test_the_vectors_of_a_shared_memory_window_are_lbfgs_while_it_holds_all_writes():
    steps, changes = rosenbrock_pairs(7)
    memory = hand_set("window", 7, writes=len(steps))
    probe = np.random.default_rng(1).standard_normal(7)
    for k, (s, y) in enumerate(zip(steps, changes, strict=True)):
        memory.write(row(s), row(y))
        truth = scipy.optimize.LbfgsInvHessProduct(np.array(steps[: k + 1]), np.array(changes[: k + 1]))
        assert np.abs(memory.read(row(probe))[0].numpy() - truth.matvec(probe)).max() <= 1e-10


def test_dense_equals_window_while_it_holds_for_any_diagonal():
    steps, changes = rosenbrock_pairs()
    dense, window = secants("dense"), secants("window", len(steps))
    zeros, diagonal = torch.zeros(1, 5, dtype=torch.float64), torch.linspace(0.1, 2, 5).double().unsqueeze(0)
    a, b = dense.init(zeros), window.init(zeros)
    for s, y in zip(steps, changes, strict=True):
        a, b = dense.write(a, row(s), row(y), YES), window.write(b, row(s), row(y), YES)
        assert (bfgs_matrix(dense, a, diagonal) - bfgs_matrix(window, b, diagonal)).abs().max() <= 1e-10


@both_storages
def test_conjugate_pairs_make_the_inverse_hessian_and_leave_nothing_unknown(kind):
    rng, size = np.random.default_rng(2), 6
    w = rng.standard_normal((size, size))
    hessian = w.T @ w + np.eye(size)
    memory = secants(kind)
    tree = memory.init(torch.zeros(1, size, dtype=torch.float64))
    for k in range(size):
        s = row(rng.standard_normal(size))
        y = times(torch.from_numpy(hessian), s)
        new_s, new_y = memory.unknown(tree, s), memory.unknown_transposed(tree, y)
        assert (times(torch.from_numpy(hessian), new_s) - new_y).abs().max() <= 1e-10  # still a pair
        tree = memory.write(tree, new_s, new_y, YES)
        rank = torch.linalg.matrix_rank(bfgs_matrix(memory, tree, torch.zeros(1, size).double()), atol=1e-9)
        assert rank == k + 1
        assert (
            memory.known(tree, y) - s
        ).abs().max() <= 1e-9  # the pair itself is known through its new part
    known = bfgs_matrix(memory, tree, torch.zeros(1, size).double())
    assert (known - torch.linalg.inv(torch.from_numpy(hessian))).abs().max() <= 1e-9
    assert memory.unknown(tree, row(rng.standard_normal(size))).abs().max() <= 1e-9


@both_storages
def test_only_the_named_problems_are_written_or_cleared(kind):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(3, 4, dtype=torch.float64, generator=generator)  # noqa: E731
    memory = secants(kind, 3)
    s = draw()
    tree = memory.write(memory.init(s), s, s + 0.1 * draw(), torch.tensor([[True]] * 3))
    t = draw()
    after = memory.write(tree, t, t + 0.1 * draw(), torch.tensor([[True], [False], [True]]))
    probe = draw()
    before_k, after_k = memory.known(tree, probe), memory.known(after, probe)
    assert torch.equal(before_k[1], after_k[1])
    assert not torch.equal(before_k[0], after_k[0])
    closed, again = torch.tensor([[True], [False], [False]]), torch.tensor([[False], [False], [True]])
    cleared = memory.clear(after, closed, again)
    assert not memory.unknown(cleared, probe)[0].any()
    assert torch.equal(memory.known(cleared, probe)[:2], after_k[:2])
    assert not memory.known(cleared, probe)[2].any()
    assert torch.equal(memory.unknown(cleared, probe)[2], probe[2])


@both_storages
def test_permuting_coordinates_permutes_what_is_known(kind):
    steps, changes = rosenbrock_pairs()
    order, memory = torch.tensor([3, 0, 4, 1, 2]), secants(kind)
    plain = permuted = memory.init(torch.zeros(1, 5, dtype=torch.float64))
    for s, y in zip(steps, changes, strict=True):
        plain = memory.write(plain, row(s), row(y), YES)
        permuted = memory.write(permuted, row(s)[:, order], row(y)[:, order], YES)
    probe = row(np.random.default_rng(3).standard_normal(5))
    assert (
        memory.known(plain, probe)[:, order] - memory.known(permuted, probe[:, order])
    ).abs().max() <= 1e-12


@both_storages
def test_derivatives_through_the_memory(kind):
    memory = secants(kind, 2)
    mask = torch.tensor([[True], [False]])
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(3, 2, 4, dtype=torch.float64, generator=generator)
    y = s + 0.2 * torch.randn(3, 2, 4, dtype=torch.float64, generator=generator)

    def function(s, y, probe):
        tree = memory.init(probe)
        for k in range(3):
            tree = memory.write(tree, s[k], y[k], mask | (k != 1))
        rest = memory.unknown(tree, memory.unknown_transposed(tree, probe))
        return memory.known(tree, probe) + rest

    inputs = (s.requires_grad_(), y.detach().requires_grad_(), torch.ones(2, 4).double().requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)


def test_numbers_of_a_problem_have_no_nan_in_their_derivatives():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    assert norm(x).squeeze(-1).tolist() == [0.0, 5.0]
    (slope,) = torch.autograd.grad(norm(x).sum(), x)
    assert slope.tolist()[0] == [0.0, 0.0]
    assert slope.tolist()[1] == pytest.approx([0.6, 0.8], abs=1e-15)
    value = torch.tensor([[0.0], [4.0]], dtype=torch.float64, requires_grad=True)
    inverse = reciprocal(value, value > 0)
    assert inverse.squeeze(-1).tolist() == [0.0, 0.25]
    (slope,) = torch.autograd.grad(inverse.sum(), value)
    assert slope.squeeze(-1).tolist() == [0.0, -0.0625]
