"""One layer as a kernel: equal to torch's operations, in value and derivative."""

import pytest
import torch
from conftest import draw_windows, phi_gradient

from l2l_scale.deploy import LearnedOptimizer
from l2l_scale.estimators import TruncatedBPTT
from l2l_scale.optimizers import CoordinatewiseLSTM, GlobalAveraging, LogSign, SharedMemory, SteeredMemory
from l2l_scale.optimizers.backend import accelerate
from l2l_scale.optimizers.cells import LSTMCell, local_step
from l2l_scale.optimizers.kernels import UnsupportedRuleError
from l2l_scale.optimizers.kernels.build import BFLOAT16, instruction_set
from l2l_scale.optimizers.kernels.cell import FusedLocal, NativeCell
from l2l_scale.sampling import Schedule
from l2l_scale.tasks import Quadratic
from l2l_scale.unroll import InnerGradient, begin, unroll

CPU = torch.device("cpu")
RULES = {
    "LSTM+GAC": lambda: CoordinatewiseLSTM(7, 2, LogSign(), sharing=GlobalAveraging(2), output_scale=1.0),
    "cell state": lambda: CoordinatewiseLSTM(5, 2, sharing=GlobalAveraging(1, "cell"), output_scale=1.0),
    "NTM-BFGS": lambda: SharedMemory(20, 2, output_scale=1.0),
    "steered": lambda: SteeredMemory(9, 1, output_scale=1.0),
}


def inputs(shape, inputs, hidden, dtype):
    generator = torch.Generator().manual_seed(0)
    draw = lambda size: torch.randn(*shape, size, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return tuple(draw(size).requires_grad_() for size in (inputs, hidden, hidden))


@pytest.mark.parametrize("shape", [(1,), (31,), (3, 33), (2, 4, 100)])
@pytest.mark.parametrize(("size", "hidden"), [(1, 1), (3, 20), (13, 7), (2, 64)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_kernel_equals_torch_in_value_and_derivative(shape, size, hidden, dtype, tolerance):
    torch.manual_seed(0)
    cell = LSTMCell(size, hidden).to(dtype)
    results = []
    for local in (local_step, FusedLocal(NativeCell())):
        x = inputs(shape, size, hidden, dtype)
        h, c = local(cell, *x)
        loss = (h.sin() * torch.arange(1, hidden + 1)).sum() + (c.square()).sum()
        results.append((h, c, *torch.autograd.grad(loss, [*x, *cell.parameters()])))
    for ours, truth in zip(results[1], results[0], strict=True):
        assert ours.shape == truth.shape
        assert (ours - truth).abs().max() <= tolerance * max(1, truth.abs().max())


def test_the_result_does_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    cell, before = LSTMCell(3, 20), torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            x = inputs((3, 9000), 3, 20, torch.float32)
            h, c = FusedLocal(NativeCell())(cell, *x)
            grads = torch.autograd.grad((h.sin() + c).sum(), [*x, *cell.parameters()])
            results.append((h, c, *grads))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(instruction_set() != BFLOAT16, reason="this CPU has no products of bfloat16")
def test_products_in_bfloat16_are_close():
    torch.manual_seed(0)
    cell = LSTMCell(5, 20)
    results = []
    for kernel in (NativeCell(), NativeCell(bf16=True)):
        x = inputs((50,), 5, 20, torch.float32)
        h, _ = FusedLocal(kernel)(cell, *x)
        results.append(phi_gradient(cell, h.sum()))
    assert 0 < (results[0] - results[1]).norm() <= 1e-2 * results[0].norm()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("mode", [InnerGradient.FIRST_ORDER, InnerGradient.SECOND_ORDER])
def test_rules_on_fused_layers_equal_eager_ones(name, mode, double):
    torch.manual_seed(0)
    rule, family = RULES[name](), Quadratic(dimension=4)
    (batch,) = draw_windows(family, Schedule(horizon=6, window=6), 1)
    losses, grads = [], []
    for backend in ("eager", "fused"):
        computed = accelerate(rule, backend, CPU, torch.float64)
        assert ("fused LSTM layers" in computed.description) == (backend == "fused")
        rollout = unroll(computed.rule, family, begin(rule, batch, None), batch, mode)
        losses.append(rollout.losses.detach())
        grads.append(phi_gradient(rule, rollout.losses.sum()))
    assert (losses[0] - losses[1]).abs().max() <= 1e-10 * losses[0].max()
    assert (grads[0] - grads[1]).norm() <= 1e-8 * grads[0].norm()


def test_a_rule_in_use_runs_on_fused_layers_by_itself():
    torch.manual_seed(0)
    rule, weights = SharedMemory(5, 1, output_scale=1.0), []
    for backend in ("eager", "auto", "fused"):
        theta = torch.nn.Parameter(torch.ones(12))
        optimizer = LearnedOptimizer([theta], rule, backend=backend)
        for _ in range(5):
            theta.grad = 2 * theta.detach()
            optimizer.step()
        weights.append(theta.detach())
    assert torch.equal(weights[1], weights[2])
    assert (weights[0] - weights[1]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda: SharedMemory(65), r"hidden_size \(65\) must be <= 64"),
        (lambda: SteeredMemory(8, chunk=3), r"chunk \(3\) must be left out"),
    ],
)
def test_layers_that_no_kernel_computes_are_eager_or_refused(rule, message):
    assert accelerate(rule(), "auto", CPU, torch.float32).description.startswith("eager (")
    with pytest.raises(UnsupportedRuleError, match=message):
        accelerate(rule(), "fused", CPU, torch.float32)
    with pytest.raises(UnsupportedRuleError, match=message):
        LearnedOptimizer([torch.zeros(3, requires_grad=True)], rule(), backend="fused")


def test_meta_gradients_of_a_whole_window_agree_in_float32():
    torch.manual_seed(0)
    rule, family = SharedMemory(20, 2, output_scale=1.0), Quadratic()
    (batch,) = draw_windows(family, Schedule(horizon=10, window=10), 1, range(16), torch.float32)
    grads = []
    for backend in ("eager", "auto"):
        computed = accelerate(rule, backend, CPU, torch.float32).rule
        estimate = TruncatedBPTT(True)(computed, family, begin(rule, batch, None), batch)
        grads.append(phi_gradient(rule, estimate.surrogate))
    assert (grads[0] - grads[1]).norm() <= 1e-4 * grads[0].norm()
