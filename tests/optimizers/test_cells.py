"""LSTM layers against torch.nn.LSTMCell."""

import pytest
import torch
from torch import nn

from l2l_scale.optimizers.cells import LSTMCell, StackedLSTM


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
