"""Rules with other cells than the LSTM, against torch.nn's cells."""

import pytest
import torch
from torch import nn

from l2l_scale.deploy import LearnedOptimizer, load_rule, save_rule
from l2l_scale.optimizers import CoordinatewiseGRU, CoordinatewiseRNN, ScaledLinear
from l2l_scale.optimizers.backend import accelerate
from l2l_scale.optimizers.recurrent import GRUCell, RNNCell


def random_weights(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


def torchs(cell):
    """torch's cell with the same weights; it has two biases where ours have one that counts."""
    hidden, inputs = cell.weight_hidden.shape[1], cell.weight_input.shape[1]
    twin = (nn.GRUCell if isinstance(cell, GRUCell) else nn.RNNCell)(inputs, hidden).double()
    with torch.no_grad():
        twin.weight_ih.copy_(cell.weight_input)
        twin.weight_hh.copy_(cell.weight_hidden)
        twin.bias_ih.copy_(cell.bias)
        twin.bias_hh.zero_()
        if isinstance(cell, GRUCell):
            twin.bias_hh[2 * hidden :] = cell.bias_candidate
    return twin


@pytest.mark.parametrize("rule", [CoordinatewiseGRU, CoordinatewiseRNN])
@pytest.mark.parametrize("layers", [1, 2])
def test_updates_and_derivatives_equal_those_of_torchs_cells(rule, layers):
    ours = random_weights(rule(hidden_size=5, layers=layers, head=ScaledLinear(0.3)))
    twins = [torchs(cell) for cell in ours.cells]
    grads = torch.randn(12, 3, 4, dtype=torch.float64)
    state, theirs = ours.init_state(grads[0]), [torch.zeros(12, 5, dtype=torch.float64)] * layers
    loss = expected = 0
    for grad in grads:
        update, state = ours(grad, grads[0], state)
        x = grad.reshape(12, 1)
        for depth, twin in enumerate(twins):
            x = theirs[depth] = twin(x, theirs[depth])
        assert (update.reshape(12) - 0.3 * ours.output(x)[:, 0]).abs().max() <= 1e-12
        loss, expected = loss + update.sin().sum(), expected + (0.3 * ours.output(x)).sin().sum()
    loss.backward()
    expected.backward()
    for cell, twin in zip(ours.cells, twins, strict=True):
        assert (cell.weight_input.grad - twin.weight_ih.grad).abs().max() <= 1e-11
        assert (cell.weight_hidden.grad - twin.weight_hh.grad).abs().max() <= 1e-11
        assert (cell.bias.grad - twin.bias_ih.grad).abs().max() <= 1e-11


def test_keep_bias_is_on_the_update_gate_only():
    for cell in CoordinatewiseGRU(hidden_size=4, keep_bias=2.5).cells:
        assert torch.equal(cell.bias, torch.tensor([0.0, 2.5, 0.0]).repeat_interleave(4))
        assert not cell.bias_candidate.any()


def test_plain_cell_starts_without_bias():
    assert not RNNCell(2, 3).bias.any()


@pytest.mark.parametrize("rule", [CoordinatewiseGRU(), CoordinatewiseRNN(layers=1)], ids=["GRU", "RNN"])
def test_rule_file_gives_the_same_optimizer(rule, tmp_path):
    save_rule(rule, tmp_path / "rule.safetensors")
    loaded = load_rule(tmp_path / "rule.safetensors")
    assert type(loaded) is type(rule)
    moved = []
    for given in (rule, tmp_path / "rule.safetensors"):
        parameter = nn.Parameter(torch.ones(3))
        optimizer = LearnedOptimizer([parameter], given)
        for _ in range(5):
            parameter.grad = parameter.detach().clone()
            optimizer.step()
        moved.append(parameter.detach())
    assert torch.equal(*moved)
    assert not torch.equal(moved[0], torch.ones(3))


def test_there_is_no_kernel_for_them_and_auto_says_so():
    found = accelerate(CoordinatewiseGRU(), "auto", torch.device("cpu"), torch.float32)
    assert found.description.startswith("eager (")
    with pytest.raises(ValueError, match="CoordinatewiseGRU"):
        accelerate(CoordinatewiseGRU(), "fused", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("arguments", [{"hidden_size": 0}, {"layers": 0}, {"output_scale": -1.0}])
@pytest.mark.parametrize("rule", [CoordinatewiseGRU, CoordinatewiseRNN])
def test_bad_arguments(rule, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        rule(**arguments)
