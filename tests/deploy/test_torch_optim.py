"""The optimizer: equal to training bit for bit, and a well-behaved ``torch.optim.Optimizer``."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from l2l_scale.deploy import LearnedOptimizer, save_rule
from l2l_scale.flat import FlatSpec
from l2l_scale.optimizers import (
    SGD,
    Adam,
    Concatenate,
    CoordinatewiseLSTM,
    Identity,
    LogSign,
    RNNprop,
    TanhExp,
    UpdateRule,
)
from l2l_scale.optimizers.backend import accelerate
from l2l_scale.rng import Split
from l2l_scale.sampling.sampler import WindowSampler
from l2l_scale.sampling.schedule import Schedule
from l2l_scale.tasks import Quadratic, TaskFamily
from l2l_scale.unroll import InnerGradient, begin, unroll

T = 25  # inner steps


class TinyMLP(TaskFamily):
    """Regression of random targets by a 5-7-3 network, on fresh minibatches of 6."""

    spec = FlatSpec.of_module(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)))

    def sample_task(self, rng):
        return {"w": rng.standard_normal((5, 3))}

    def sample_init(self, rng, task):
        return 0.3 * rng.standard_normal(self.spec.size)

    def sample_data(self, rng, task):
        x = rng.standard_normal((6, 5))
        return {"x": x, "y": x @ task["w"]}

    def loss(self, params, task, data):
        hidden = F.linear(data["x"], params["0.weight"], params["0.bias"]).tanh()
        return F.mse_loss(F.linear(hidden, params["2.weight"], params["2.bias"]), data["y"])


FEATURES = {
    "identity": Identity,
    "log_sign": LogSign,
    "rnnprop": RNNprop,
    "both": lambda: Concatenate([LogSign(), RNNprop(log_scale=True)]),
}


def learned(features: str = "both", seed: int = 0) -> CoordinatewiseLSTM:
    """A rule that moves θ, with random weights."""
    torch.manual_seed(seed)
    return CoordinatewiseLSTM(8, 2, FEATURES[features](), TanhExp(0.1, 1.0), output_scale=1.0)


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def backward(net: nn.Module, seed: int = 0) -> torch.Tensor:
    """Put the gradient of a minibatch into the parameters."""
    net.zero_grad()
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)).to(next(net.parameters()).dtype)
    loss = net(x).square().mean()
    loss.backward()
    return loss


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(net, step)
        optimizer.step()


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in net.parameters()])


def through_bytes(state: dict) -> dict:
    """A state dict as it comes back from a checkpoint."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# ---- deployed = trained ----


def rollout(rule: UpdateRule, family: TaskFamily, dtype: torch.dtype, backend: str = "auto"):
    """A window of T inner steps in one slot, as in training; the window, θ_0 and θ_T."""
    rule = accelerate(rule, backend, torch.device("cpu"), dtype).rule
    schedule = Schedule(horizon=T, window=T, staggered=False)
    batch = WindowSampler(family, schedule, 3, Split.TEST)(0, range(1)).to_batch(dtype)
    end = unroll(rule, family, begin(rule, batch, None), batch, InnerGradient.NONE)
    return batch, batch.theta0[0], end.carry.theta[0].detach()


RULES = {**{name: lambda name=name: learned(name) for name in FEATURES}, "adam": lambda: Adam(0.1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", [Quadratic(), TinyMLP()], ids=["quadratic", "network"])
@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("name", RULES)
def test_deployed_equals_trained_bit_for_bit(name, backend, family, dtype):
    # The loss is the family's own for one slot. A plain forward pass calls other matrix kernels (mm, not
    # bmm), so its gradients differ in the last bit: not the rule's arithmetic, the optimizee's.
    rule = RULES[name]().to(dtype)
    batch, theta0, expected = rollout(rule, family, dtype, backend)
    params = {key: nn.Parameter(part.clone()) for key, part in family.spec.unflatten(theta0).items()}
    optimizer = LearnedOptimizer(params.values(), rule, backend=backend, guard=False)
    for k in range(T):
        optimizer.zero_grad()
        data = {key: value[k] for key, value in batch.data.items()}
        family.losses(family.spec.flatten(params)[None], batch.task, data).sum().backward()
        optimizer.step()
    theta = family.spec.flatten(params)
    assert torch.equal(theta, expected)
    assert not torch.equal(theta, theta0)


@pytest.mark.parametrize("name", RULES)
def test_ordinary_training_loop_follows_the_rollout_to_rounding(name):
    rule, family = RULES[name]().double(), TinyMLP()
    batch, theta0, expected = rollout(rule, family, torch.float64)
    net = model(torch.float64)
    net.load_state_dict(family.spec.unflatten(theta0))
    optimizer = LearnedOptimizer(net.parameters(), rule, guard=False)
    for k in range(T):
        optimizer.zero_grad()
        F.mse_loss(net(batch.data["x"][k, 0]), batch.data["y"][k, 0]).backward()
        optimizer.step()
    torch.testing.assert_close(weights(net), expected, rtol=0, atol=1e-10)


def test_file_equals_rule_in_memory(tmp_path):
    rule, nets = learned(), [model(), model()]
    path = save_rule(rule, tmp_path / "rule.safetensors")
    for net, source in zip(nets, (rule, str(path)), strict=True):
        train(net, LearnedOptimizer(net.parameters(), source), range(10))
    assert torch.equal(weights(nets[0]), weights(nets[1]))


def test_adam_rule_is_torch_adam():
    nets = [model(torch.float64), model(torch.float64)]
    train(nets[0], LearnedOptimizer(nets[0].parameters(), Adam(0.03)), range(50))
    train(nets[1], torch.optim.Adam(nets[1].parameters(), 0.03), range(50))
    torch.testing.assert_close(weights(nets[0]), weights(nets[1]), rtol=1e-12, atol=1e-12)


def test_later_training_of_the_rule_does_not_leak_in():
    rule, nets = learned(), [model(), model()]
    optimizers = [LearnedOptimizer(net.parameters(), rule) for net in nets]
    train(nets[0], optimizers[0], range(5))
    with torch.no_grad():
        rule.output.weight.add_(1.0)
    train(nets[1], optimizers[1], range(5))
    assert torch.equal(weights(nets[0]), weights(nets[1]))
    assert all(p.requires_grad for p in rule.parameters())
    assert not any(p.requires_grad for p in optimizers[0].rule.parameters())


# ---- state ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_resume_from_a_checkpoint_is_exact(dtype):
    straight, interrupted = model(dtype), model(dtype)
    train(straight, LearnedOptimizer(straight.parameters(), learned()), range(20))
    first = LearnedOptimizer(interrupted.parameters(), learned())
    train(interrupted, first, range(8))
    state, params = through_bytes(first.state_dict()), through_bytes(interrupted.state_dict())

    resumed = model(dtype)
    resumed.load_state_dict(params)
    second = LearnedOptimizer(resumed.parameters(), learned())
    second.load_state_dict(state)
    train(resumed, second, range(8, 20))
    assert torch.equal(weights(straight), weights(resumed))


def test_loading_is_refused_whole_if_the_state_is_of_another_rule():
    net = model()
    other = LearnedOptimizer(net.parameters(), learned("identity"))
    train(net, other, range(1))
    optimizer = LearnedOptimizer(net.parameters(), learned("both"), lr=0.5)
    with pytest.raises(ValueError, match="of another rule or of other parameters"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert not optimizer.state


def test_state_of_a_torch_optimizer_is_refused():
    net = model()
    adam = torch.optim.Adam(net.parameters())
    train(net, adam, range(1))
    with pytest.raises(ValueError, match="not written by a LearnedOptimizer"):
        LearnedOptimizer(net.parameters(), learned()).load_state_dict(adam.state_dict())


def test_state_dict_is_a_snapshot():
    net = model()
    optimizer = LearnedOptimizer(net.parameters(), learned())
    train(net, optimizer, range(3))
    snapshot = optimizer.state_dict()
    before = [leaf.clone() for leaf in snapshot["state"]["group 0"]["leaves"]]
    train(net, optimizer, range(3, 6))
    assert all(map(torch.equal, before, snapshot["state"]["group 0"]["leaves"]))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_alike_and_apart(clone):
    net = model()
    optimizer = LearnedOptimizer(net.parameters(), learned())
    train(net, optimizer, range(4))
    net2, optimizer2 = clone((net, optimizer))
    train(net2, optimizer2, range(4, 9))
    assert not torch.equal(weights(net), weights(net2))
    train(net, optimizer, range(4, 9))
    assert torch.equal(weights(net), weights(net2))


# ---- groups, gradients, lr ----


def test_groups_are_problems_of_their_own():
    rule, net, alone = learned(), model(), model()
    both = LearnedOptimizer([{"params": net[0].parameters()}], rule)
    both.add_param_group({"params": list(net[2].parameters()), "lr": 0.0})
    separate = LearnedOptimizer(alone[0].parameters(), rule)
    train(net, both, range(5))
    train(alone, separate, range(5))
    assert torch.equal(weights(net), weights(alone))
    assert set(both.state) == {"group 0", "group 1"}


def test_named_parameters_and_zero_grad():
    net, twin = model(), model()
    train(net, LearnedOptimizer(net.named_parameters(), learned()), range(3))
    optimizer = LearnedOptimizer(twin.parameters(), learned())
    train(twin, optimizer, range(3))
    assert torch.equal(weights(net), weights(twin))
    optimizer.zero_grad()
    assert all(p.grad is None for p in twin.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameter_without_gradient_stays_and_counts_as_zero_gradient(dtype):
    nets = [model(dtype), model(dtype)]
    with torch.no_grad():
        for net in nets:
            net[2].bias[0] = -0.0
    optimizers = [LearnedOptimizer(net.parameters(), learned()) for net in nets]
    before = nets[0][2].bias.clone()
    for step in range(5):
        for net, empty in zip(nets, (None, torch.zeros_like(before)), strict=True):
            backward(net, step)
            net[2].bias.grad = empty
        optimizers[0].step()
        optimizers[1].step()
        assert torch.equal(nets[0][0].weight, nets[1][0].weight)  # coordinatewise: others see no difference
        with torch.no_grad():
            nets[1][2].bias.copy_(before)
    assert torch.equal(nets[0][2].bias, before)
    assert nets[0][2].bias.signbit()[0]


def test_group_without_any_gradient_is_skipped():
    net = model()
    optimizer = LearnedOptimizer(
        [{"params": net[0].parameters()}, {"params": net[2].parameters()}], learned()
    )
    backward(net)
    net[2].zero_grad()
    before = weights(net[2])
    optimizer.step()
    assert torch.equal(weights(net[2]), before)
    assert set(optimizer.state) == {"group 0"}


def test_lr_scales_the_update():
    before = weights(model())
    moves = []
    for lr in (1.0, 0.5):
        net = model()
        train(net, LearnedOptimizer(net.parameters(), learned(), lr), range(1))
        moves.append(weights(net) - before)
    torch.testing.assert_close(moves[1], moves[0] / 2, rtol=0, atol=1e-7)


def test_schedulers_scale_the_update():
    net = model()
    optimizer = LearnedOptimizer(net.parameters(), SGD(0.1), lr=2.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    for step in range(4):
        backward(net, step)
        before, grad = weights(net), torch.cat([p.grad.reshape(-1) for p in net.parameters()])
        optimizer.step()
        lr = 1 + math.cos(math.pi * step / 4)
        torch.testing.assert_close(weights(net), before - 0.1 * lr * grad, rtol=0, atol=1e-7)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_closure_is_called_with_gradients_on_and_its_loss_returned():
    net, twin = model(), model()
    optimizer = LearnedOptimizer(net.parameters(), learned())
    with torch.no_grad():
        loss = optimizer.step(lambda: backward(net))
    train(twin, LearnedOptimizer(twin.parameters(), learned()), range(1))
    assert torch.equal(weights(net), weights(twin))
    assert torch.equal(loss, backward(model()))


def test_hooks_clipping_and_grad_scaler_work():
    net, calls = model(), []
    optimizer = LearnedOptimizer(net.parameters(), SGD(1.0))
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = weights(net)
    scaler.scale(backward(net).detach())
    for param in net.parameters():
        param.grad *= 4.0
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    scaler.step(optimizer)
    scaler.update()
    assert (weights(net) - before).norm().item() == pytest.approx(1e-3, rel=1e-2)
    backward(net)
    net[0].bias.grad[0] = math.inf
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert len(calls) == 1  # a step with overflow is left out


# ---- precision ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_have_float32_state_and_master(dtype):
    param = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = LearnedOptimizer([param], Adam(5e-5))
    for _ in range(400):  # each update is far below the spacing of numbers at 1
        param.grad = torch.ones_like(param)
        optimizer.step()
    entry = optimizer.state_dict()["state"]["group 0"]
    assert all(leaf.dtype == torch.float32 for leaf in [*entry["leaves"], entry["theta"]])
    assert param.dtype == dtype
    torch.testing.assert_close(param.detach().float(), torch.full((3,), 0.98), rtol=0, atol=0.003)
    with torch.no_grad():
        param[0] = 5.0  # what the user writes wins over the master copy
    optimizer.step()
    torch.testing.assert_close(
        optimizer.state["group 0"]["theta"][0, :2], torch.tensor([5.0, 0.98]), atol=1e-3, rtol=0
    )


def test_mixed_precision_group_works_in_the_widest():
    params = [nn.Parameter(torch.ones(2, dtype=d)) for d in (torch.bfloat16, torch.float32, torch.float64)]
    optimizer = LearnedOptimizer(params, SGD(0.25))
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert [p.dtype for p in params] == [torch.bfloat16, torch.float32, torch.float64]
    assert all(torch.equal(p, torch.full_like(p, 0.75)) for p in params)
    assert optimizer.state["group 0"]["theta"].dtype == torch.float64


def test_step_under_autocast_is_the_same():
    net, twin = model(), model()
    train(net, LearnedOptimizer(net.parameters(), learned()), range(1))
    optimizer = LearnedOptimizer(twin.parameters(), learned())
    backward(twin)
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step()
    assert torch.equal(weights(net), weights(twin))


def test_parameters_of_any_memory_layout_are_read_in_logical_order():
    weight = torch.arange(24.0).reshape(1, 4, 2, 3)
    plain, strided = nn.Parameter(weight.clone()), nn.Parameter(weight.to(memory_format=torch.channels_last))
    for param in (plain, strided):
        param.grad = param.detach().clone()
        LearnedOptimizer([param], learned()).step()
    assert torch.equal(plain, strided)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_parameters_have_rule_and_state_there():
    net, twin = model().cuda(), model()
    optimizer = LearnedOptimizer(net.parameters(), learned())
    x = torch.randn(6, 5)
    for module, data in ((net, x.cuda()), (twin, x)):
        module(data).square().mean().backward()
    optimizer.step()
    LearnedOptimizer(twin.parameters(), learned()).step()
    torch.testing.assert_close(weights(net).cpu(), weights(twin), rtol=0, atol=1e-5)
    assert all(leaf.is_cuda for leaf in optimizer.state_dict()["state"]["group 0"]["leaves"])
    cpu_state = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, optimizer.state_dict())
    optimizer.load_state_dict(cpu_state)
    assert all(leaf.is_cuda for leaf in optimizer.state_dict()["state"]["group 0"]["leaves"])


# ---- what a user can get wrong ----


@pytest.mark.parametrize("lr", [-0.1, math.nan, math.inf])
def test_bad_lr(lr):
    with pytest.raises(ValueError, match=r"lr \(.*\) must be a finite number >= 0"):
        LearnedOptimizer(model().parameters(), learned(), lr)


def test_refused_group_leaves_the_optimizer_as_it_was():
    optimizer = LearnedOptimizer(model().parameters(), learned())
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": model().parameters(), "lr": -1.0})
    assert len(optimizer.param_groups) == 1


def test_no_parameters():
    with pytest.raises(ValueError, match="empty parameter list"):
        LearnedOptimizer([], learned())


@pytest.mark.parametrize("rule", [nn.Linear(1, 1), None, learned])
def test_rule_that_is_none(rule):
    with pytest.raises(ValueError, match="must be an UpdateRule or the path of a rule file"):
        LearnedOptimizer(model().parameters(), rule)


def test_missing_rule_file():
    with pytest.raises(FileNotFoundError, match="no rule file"):
        LearnedOptimizer(model().parameters(), "nowhere.safetensors")


def test_complex_parameters():
    with pytest.raises(ValueError, match=r"complex64.*real floating-point"):
        LearnedOptimizer([nn.Parameter(torch.zeros(2, dtype=torch.complex64))], learned())


def test_parameters_that_are_no_leaves():
    with pytest.raises(ValueError, match="non-leaf"):
        LearnedOptimizer([nn.Parameter(torch.zeros(2)) * 2], learned())


def test_group_on_several_devices():
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))]
    with pytest.raises(ValueError, match=r"one device.*\['cpu', 'meta'\].*split the group"):
        LearnedOptimizer(params, learned())


def test_sparse_gradients():
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = LearnedOptimizer(embedding.parameters(), learned())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"gradient is sparse .*sparse=False"):
        optimizer.step()


def test_rule_with_one_value_per_slot():
    net = model()
    optimizer = LearnedOptimizer(net.parameters(), SGD(torch.tensor([0.1, 0.2])))
    backward(net)
    with pytest.raises(ValueError, match=r"SGD gave an update .*one value per slot"):
        optimizer.step()


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_state_dict_in_the_middle_changes_nothing(backend):
    """The state stays in the form that steps work in, until somebody asks for it."""
    net, looked_at = model(), model()
    plain = LearnedOptimizer(net.parameters(), learned(), backend=backend)
    asked = LearnedOptimizer(looked_at.parameters(), learned(), backend=backend)
    snapshots = []
    for step in range(6):
        train(net, plain, range(step, step + 1))
        train(looked_at, asked, range(step, step + 1))
        if step % 2:
            snapshots.append((asked.state_dict(), through_bytes(asked.state_dict())))
            asked = copy.deepcopy(asked)
            asked.param_groups[0]["params"] = list(looked_at.parameters())
    assert torch.equal(weights(net), weights(looked_at))
    for now, then in snapshots:
        ours, theirs = (state["state"]["group 0"]["leaves"] for state in (now, then))
        assert all(map(torch.equal, ours, theirs))
