"""LSTM layers against torch.nn.LSTMCell."""

import pytest
import torch
from torch import nn

from l2l_scale.flat import FlatSpec, Segment
from l2l_scale.optimizers.cells import Computing, GlobalAveraging, LSTMCell, StackedLSTM


def reorder(weight):
    """Our gates (input, forget, output, candidate) in torch's order (input, forget, candidate, output)."""
    i, f, o, c = weight.chunk(4)
    return torch.cat([i, f, c, o])


def torchs(cell, input_size):
    twin = nn.LSTMCell(input_size, cell.hidden_size).double()
    with torch.no_grad():
        twin.weight_ih.copy_(reorder(cell.weight_input))
        twin.weight_hh.copy_(reorder(cell.weight_hidden))
        twin.bias_ih.copy_(reorder(cell.bias))
        twin.bias_hh.zero_()
    return twin


def random_weights(module, seed=0):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


@pytest.mark.parametrize(("input_size", "hidden_size"), [(1, 1), (2, 20), (5, 33)])
def test_cell_equals_torchs_over_many_steps_in_float64(input_size, hidden_size):
    cell = random_weights(LSTMCell(input_size, hidden_size))
    twin = torchs(cell, input_size)
    inputs = torch.randn(25, 6, input_size, dtype=torch.float64)
    ours = theirs = (torch.zeros(6, hidden_size, dtype=torch.float64),) * 2
    for x in inputs:
        ours, theirs = cell(x, ours), twin(x, theirs)
        assert all((a - b).abs().max() <= 1e-12 for a, b in zip(ours, theirs, strict=True))


def test_derivatives_equal_torchs():
    cell = random_weights(LSTMCell(3, 4))
    twin = torchs(cell, 3)
    x = torch.randn(6, 3, dtype=torch.float64)
    zeros = torch.zeros(6, 4, dtype=torch.float64)
    for module in (cell, twin):
        h, c = module(x, (zeros, zeros))
        h, c = module(x, (h, c))
        (h.sin().sum() + c.square().sum()).backward()
    assert (reorder(cell.weight_input.grad) - twin.weight_ih.grad).abs().max() <= 1e-12
    assert (reorder(cell.weight_hidden.grad) - twin.weight_hh.grad).abs().max() <= 1e-12
    assert (reorder(cell.bias.grad) - twin.bias_ih.grad).abs().max() <= 1e-12


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_stack_equals_torchs_cells_on_top_of_each_other(layers):
    stack = random_weights(StackedLSTM(2, 5, layers))
    twins = [torchs(cell, 2 if depth == 0 else 5) for depth, cell in enumerate(stack.cells)]
    theta = torch.zeros(3, 4, dtype=torch.float64)
    state = stack.init_state(theta)
    theirs = [(torch.zeros(12, 5, dtype=torch.float64),) * 2 for _ in twins]
    for x in torch.randn(10, 3, 4, 2, dtype=torch.float64):
        top, state = stack(x, state)
        below = x.reshape(12, 2)
        for depth, twin in enumerate(twins):
            theirs[depth] = twin(below, theirs[depth])
            below = theirs[depth][0]
        assert (top.reshape(12, 5) - below).abs().max() <= 1e-12
    assert (state[-1][1].reshape(12, 5) - theirs[-1][1]).abs().max() <= 1e-12
    assert len(state) == layers


def test_state_starts_at_zero_with_the_axes_and_precision_of_theta():
    theta = torch.ones(3, 4, dtype=torch.float64)
    for h, c in StackedLSTM(2, 5, 2).init_state(theta):
        for leaf in (h, c):
            assert leaf.shape == (3, 4, 5)
            assert leaf.dtype == torch.float64
            assert not leaf.any()


@pytest.mark.parametrize("forget_bias", [0.0, 1.0, 2.5])
def test_forget_bias_is_on_the_forget_gate_of_every_layer_only(forget_bias):
    for cell in StackedLSTM(2, 5, 3, forget_bias).cells:
        _, forget, _, _ = cell.bias.chunk(4)
        assert torch.equal(forget, torch.full((5,), forget_bias))
        assert cell.bias.abs().sum().item() == pytest.approx(5 * forget_bias)


def test_a_wide_open_forget_gate_keeps_the_memory():
    cell = LSTMCell(1, 3, forget_bias=50.0).double()
    with torch.no_grad():
        cell.bias[:3] = -50.0  # and the input gate lets nothing in
    memory = torch.tensor([[1.0, -2.0, 0.3]], dtype=torch.float64)
    _, c = cell(torch.ones(1, 1, dtype=torch.float64), (torch.zeros_like(memory), memory))
    assert (c - memory).abs().max() <= 1e-12


def test_initial_weights_lie_within_one_over_root_hidden_size():
    torch.manual_seed(0)
    cell = LSTMCell(4, 25)
    for weight in (cell.weight_input, cell.weight_hidden):
        assert 0.18 < weight.abs().max() <= 0.2


# ---- global averaging cells ----


def values(*shape, seed=3):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def start(cell, *leading):
    return values(*leading, cell.hidden_size, seed=4), values(*leading, cell.hidden_size, seed=5)


def plain_twin(cell, input_size):
    """The same weights without averaging."""
    twin = LSTMCell(input_size, cell.hidden_size).double()
    twin.load_state_dict(cell.state_dict())
    return twin


def test_averaging_cells_send_out_the_mean_activation_over_the_coordinates_of_their_problem():
    cell = random_weights(LSTMCell(2, 5, sharing=GlobalAveraging(2)))
    x, state = values(3, 7, 2), start(cell, 3, 7)
    h, c = cell(x, state)
    own_h, own_c = plain_twin(cell, 2)(x, state)
    for problem in range(3):
        for unit in range(5):
            local = own_h[problem, :, unit]
            expected = sum(local.tolist()) / 7 if unit < 2 else local
            assert (h[problem, :, unit] - expected).abs().max() <= 1e-15
    assert torch.equal(c, own_c)  # the cell state stays each coordinate's own


def test_averaging_the_cell_state_instead_keeps_each_coordinates_output_gate():
    cell = random_weights(LSTMCell(2, 5, sharing=GlobalAveraging(3, averages="cell")))
    x, state = values(3, 7, 2), start(cell, 3, 7)
    h, c = cell(x, state)
    own_h, own_c = plain_twin(cell, 2)(x, state)
    mean = own_c[..., :3].sum(1, keepdim=True) / 7
    gate = own_h[..., :3] / own_c[..., :3].tanh()
    assert (c[..., :3] - mean).abs().max() <= 1e-15
    assert (h[..., :3] - gate * mean.tanh()).abs().max() <= 1e-12
    assert torch.equal(h[..., 3:], own_h[..., 3:])
    assert torch.equal(c[..., 3:], own_c[..., 3:])


@pytest.mark.parametrize("averages", ["activation", "cell"])
def test_means_are_never_over_problems(averages):
    stack = random_weights(StackedLSTM(2, 4, 2, sharing=GlobalAveraging(2, averages)))
    x = values(3, 6, 2)
    state = stack.init_state(x[..., 0])
    together, _ = stack(x, state)
    for problem in range(3):
        alone, _ = stack(x[problem], stack.init_state(x[problem, :, 0]))
        assert (together[problem] - alone).abs().max() <= 1e-15
    changed = x.clone()
    changed[1] += 1
    other, _ = stack(changed, state)
    assert torch.equal(other[[0, 2]], together[[0, 2]])
    assert not torch.equal(other[1], together[1])


def test_groups_average_apart():
    spec = FlatSpec((Segment("a", (2,), "w"), Segment("b", (1,), "bias"), Segment("c", (3,), "w")))
    mean = GlobalAveraging(1, over="group").mean_for(spec)
    x = values(2, 6, 3)
    for own in ([0, 1, 3, 4, 5], [2]):
        expected = x[:, own].sum(1, keepdim=True) / len(own)
        assert (mean(x)[:, own] - expected).abs().max() <= 1e-15
    assert GlobalAveraging(1).mean_for(spec)(x).shape == (2, 1, 3)


def test_the_mean_of_groups_has_the_derivative_of_a_mean():
    spec = FlatSpec((Segment("a", (2,), "w"), Segment("b", (1,), "bias"), Segment("c", (1,), "w")))
    mean = GlobalAveraging(1, over="group").mean_for(spec)
    assert torch.autograd.gradcheck(mean, values(2, 4, 2).requires_grad_())


@pytest.mark.parametrize("averages", ["activation", "cell"])
@pytest.mark.parametrize("chunk", [1, 3, 6, 7, 100])
def test_coordinates_in_chunks_give_the_same_values_and_derivatives(chunk, averages):
    stack = random_weights(StackedLSTM(2, 4, 2, sharing=GlobalAveraging(2, averages)))
    inputs = values(3, 2, 7, 2)

    def run(chunk):
        state, outputs = stack.init_state(inputs[0, ..., 0]), []
        for x in inputs:
            h, state = stack(x, state, Computing(chunk=chunk))
            outputs.append(h)
        total = torch.stack(outputs).sin().sum()
        return torch.stack(outputs).detach(), torch.autograd.grad(total, list(stack.parameters()))

    (whole, d_whole), (parts, d_parts) = run(None), run(chunk)
    assert (whole - parts).abs().max() <= 1e-14
    for a, b in zip(d_whole, d_parts, strict=True):
        assert (a - b).abs().max() <= 1e-12 * a.abs().max()


def test_gates_of_chunks_are_not_kept_for_backward():
    cell = random_weights(LSTMCell(2, 8, sharing=GlobalAveraging(1)))
    x, state = values(1, 4000, 2), start(cell, 1, 4000)

    def kept(chunk):
        storages = {}  # what backward needs and autograd therefore keeps, each storage once

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = cell(x, state, Computing(chunk=chunk))
        given = {t.untyped_storage().data_ptr() for t in (x, *state, *result, *cell.parameters())}
        return sum(t.untyped_storage().nbytes() for at, t in storages.items() if at not in given)

    assert kept(500) < 0.1 * kept(None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GlobalAveraging(0), r"units \(0\) must be"),
        (lambda: GlobalAveraging(2, averages="gate"), r"averages \('gate'\) must be"),
        (lambda: GlobalAveraging(2, over="batch"), r"over \('batch'\) must be"),
        (lambda: LSTMCell(1, 3, sharing=GlobalAveraging(4)), r"units \(4\) must be <= hidden_size \(3\)"),
    ],
)
def test_bad_sharing_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
