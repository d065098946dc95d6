"""Hand-designed rules against torch.optim, and their schedules against torch's."""

import copy
import inspect

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch.optim import lr_scheduler

from l2l_scale.optimizers import (
    SGD,
    AdaGrad,
    Adam,
    AdamW,
    BarzilaiBorwein,
    CoordinatewiseLSTM,
    CosineSchedule,
    ExponentialSchedule,
    HeavyBall,
    Nesterov,
    RMSprop,
    Scheduled,
    UpdateRule,
)
from l2l_scale.rng import Split
from l2l_scale.sampling import Schedule, WindowSampler
from l2l_scale.tasks import Quadratic
from l2l_scale.tree import tree_leaves, tree_map
from l2l_scale.unroll import InnerGradient, begin, unroll

INNER_STEPS = 60
SLOTS, SIZE = 4, 7
RULES = [SGD, HeavyBall, Nesterov, RMSprop, AdaGrad, Adam, AdamW, BarzilaiBorwein]
ARGUMENTS = [(rule, name) for rule in RULES for name in inspect.signature(rule).parameters]

# (rule, its hyper-parameters, torch's optimizer with the same)
TWINS = [
    *[(SGD, {"learning_rate": r}, lambda p, r=r: torch.optim.SGD(p, r)) for r in (0.003, 0.1)],
    *[
        (rule, {"learning_rate": r, "momentum": m}, make)
        for r in (0.003, 0.05)
        for m in (0.0, 0.5, 0.9)
        for rule, make in (
            (HeavyBall, lambda p, r=r, m=m: torch.optim.SGD(p, r, m)),
            (Nesterov, lambda p, r=r, m=m: torch.optim.SGD(p, r, m, nesterov=m > 0)),
        )
    ],
    *[
        (
            RMSprop,
            {"learning_rate": r, "decay": d, "epsilon": e},
            lambda p, r=r, d=d, e=e: torch.optim.RMSprop(p, r, d, e),
        )
        for r, d, e in ((0.01, 0.99, 1e-8), (0.1, 0.9, 1e-3), (0.01, 0.0, 1e-8))
    ],
    *[
        (AdaGrad, {"learning_rate": r, "epsilon": e}, lambda p, r=r, e=e: torch.optim.Adagrad(p, r, eps=e))
        for r, e in ((0.01, 1e-10), (1.0, 1e-3))
    ],
    *[
        (
            Adam,
            {"learning_rate": r, "beta1": b1, "beta2": b2, "epsilon": e},
            lambda p, r=r, b=(b1, b2), e=e: torch.optim.Adam(p, r, b, e),
        )
        for r, b1, b2, e in (
            (1e-3, 0.9, 0.999, 1e-8),
            (0.1, 0.5, 0.9, 1e-3),
            (0.03, 0.0, 0.95, 0.1),
            (0.01, 0.0, 0.0, 1e-8),
        )
    ],
    *[
        (
            AdamW,
            {"learning_rate": r, "beta1": 0.8, "beta2": 0.99, "epsilon": 1e-6, "weight_decay": w},
            lambda p, r=r, w=w: torch.optim.AdamW(p, r, (0.8, 0.99), 1e-6, w),
        )
        for r in (1e-3, 0.1)
        for w in (0.0, 0.01, 1.0)
    ],
]


class Problems:
    """f(θ) = ‖Wθ − y‖² + Σ sin θ for every slot, with known gradients in any precision."""

    def __init__(self, *leading, seed=0, size=SIZE, dtype=torch.float64):
        rng = np.random.default_rng(seed)
        draw = lambda *shape: torch.tensor(rng.standard_normal((*leading, *shape)), dtype=dtype)  # noqa: E731
        self.w, self.y, self.theta0 = draw(size, size) / size**0.5, draw(size), draw(size)

    def grad(self, theta):
        # Sums, not BLAS: its rounding depends on how many slots there are.
        residual = (self.w * theta.unsqueeze(-2)).sum(-1) - self.y
        return 2 * (self.w * residual.unsqueeze(-1)).sum(-2) + theta.cos()


def slot(problems, s):
    one = copy.copy(problems)
    one.w, one.y, one.theta0 = problems.w[s], problems.y[s], problems.theta0[s]
    return one


def run(rule, problems, inner_steps=INNER_STEPS):
    """θ_0 … θ_T, (T + 1, *, N)."""
    theta, state, path = problems.theta0, rule.init_state(problems.theta0), [problems.theta0]
    for _ in range(inner_steps):
        update, state = rule(problems.grad(theta), theta, state)
        theta = theta + update
        path.append(theta)
    return torch.stack(path)


def run_torch(make, problems, scheduler=None, inner_steps=INNER_STEPS, gradients=None):
    """The same with a ``torch.optim`` optimizer; on its own gradients or on given ones."""
    param = torch.nn.Parameter(problems.theta0.clone())
    optimizer = make([param])
    schedule = scheduler(optimizer) if scheduler else None
    path = [param.detach().clone()]
    for t in range(inner_steps):
        param.grad = gradients[t] if gradients else problems.grad(param.detach())
        optimizer.step()
        if schedule:
            schedule.step()
        path.append(param.detach().clone())
    return torch.stack(path)


def largest_difference(a, b):
    return (a - b).abs().max().item()


def example(rule, slots=None):
    """Some hyper-parameters: numbers, or different ones in every slot."""
    spread = {
        "learning_rate": (0.02, 0.05),
        "momentum": (0.0, 0.9),
        "decay": (0.5, 0.99),
        "beta1": (0.0, 0.9),
        "beta2": (0.8, 0.999),
        "epsilon": (1e-8, 1e-2),
        "weight_decay": (0.0, 0.5),
    }
    names = inspect.signature(rule).parameters
    return {name: torch.linspace(*spread[name], slots or 1, dtype=torch.float64) for name in names}


@pytest.mark.parametrize("leading", [(), (SLOTS,), (2, SLOTS)])
@pytest.mark.parametrize(("rule", "hyper", "make"), TWINS, ids=lambda v: getattr(v, "__name__", None))
def test_every_inner_step_equals_torch_optim_in_float64(rule, hyper, make, leading):
    problems = Problems(*leading)
    ours = run(rule(**hyper), problems)
    # Both see the gradients of our path: some of these settings are chaotic and blow rounding up.
    theirs = run_torch(make, problems, gradients=[problems.grad(theta) for theta in ours])
    assert largest_difference(ours, theirs) <= 1e-12
    assert largest_difference(ours[-1], ours[0]) > 1e-2  # something has happened


@pytest.mark.parametrize("rule", [SGD, HeavyBall, Nesterov, RMSprop, AdaGrad, Adam, AdamW])
def test_default_hyper_parameters_are_torchs(rule):
    names = {"learning_rate": "lr", "epsilon": "eps", "decay": "alpha", "weight_decay": "weight_decay"}
    twin = {"AdaGrad": torch.optim.Adagrad, "HeavyBall": torch.optim.SGD, "Nesterov": torch.optim.SGD}
    reference = twin.get(rule.__name__) or getattr(torch.optim, rule.__name__)
    defaults = reference([torch.nn.Parameter(torch.zeros(1))]).defaults
    made = rule()
    for name in inspect.signature(rule).parameters:
        if name in names:
            assert getattr(made, name) == defaults[names[name]], name
    if rule in (Adam, AdamW):
        assert (made.beta1, made.beta2) == defaults["betas"]


@pytest.mark.parametrize("rule", RULES)
def test_tensors_over_slots_equal_numbers_slot_by_slot(rule):
    problems, grid = Problems(SLOTS), example(rule, SLOTS)
    together = run(rule(**grid), problems)
    for s in range(SLOTS):
        alone = run(rule(**{name: values[s].item() for name, values in grid.items()}), slot(problems, s))
        assert torch.equal(together[:, s], alone)


@pytest.mark.parametrize("rule", RULES)
def test_scalar_tensors_equal_numbers(rule):
    hyper = {name: values[0] for name, values in example(rule).items()}
    for problems in (Problems(), Problems(SLOTS)):
        numbers = run(rule(**{name: value.item() for name, value in hyper.items()}), problems)
        assert largest_difference(run(rule(**hyper), problems), numbers) <= 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_slots_do_not_influence_each_other(rule):
    problems, other = Problems(SLOTS), Problems(SLOTS, seed=1)
    other.w[0], other.y[0], other.theta0[0] = problems.w[0], problems.y[0], problems.theta0[0]
    assert torch.equal(run(rule(), problems)[:, 0], run(rule(), other)[:, 0])


@pytest.mark.parametrize("per_slot", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_float32_runs_stay_float32_and_float64_runs_float64(rule, per_slot):
    grid = example(rule, SLOTS)
    made = Scheduled(rule(**grid) if per_slot else rule(), CosineSchedule(10))
    for dtype in (torch.float32, torch.float64):
        problems = Problems(SLOTS, dtype=dtype)
        state = made.init_state(problems.theta0)
        update, new = made(problems.grad(problems.theta0), problems.theta0, state)
        assert {leaf.dtype for leaf in tree_leaves((update, state, new))} == {dtype}


def test_float32_adam_keeps_the_precision_of_the_bias_correction():
    problems = Problems(SLOTS, dtype=torch.float32)
    ours = run(Adam(0.1, 0.9, 0.9999), problems, 3)
    theirs = run_torch(lambda p: torch.optim.Adam(p, 0.1, (0.9, 0.9999)), problems, inner_steps=3)
    assert largest_difference(ours, theirs) <= 1e-6  # 1 - 0.9999 ** t in float32 is off by 1e-4 of itself


@pytest.mark.parametrize("rule", RULES)
def test_state_has_the_leading_axes_of_theta_and_inputs_stay_as_they_are(rule):
    for leading in ((), (SLOTS,), (2, SLOTS)):
        problems, made = Problems(*leading), rule(0.1)
        theta, grad = problems.theta0, problems.grad(problems.theta0)
        state = made.init_state(theta)
        _, state = made(grad, theta, state)
        assert all(leaf.shape in ((*leading, SIZE), (*leading, 1)) for leaf in tree_leaves(state))
        inputs = (theta, grad, state)
        before = tree_map(torch.clone, inputs)
        made(grad, theta, state)
        assert all(torch.equal(*pair) for pair in zip(tree_leaves(inputs), tree_leaves(before), strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_arguments_are_kept_as_attributes_and_build_the_rule_again(rule):
    for hyper in (example(rule, SLOTS), {name: v.item() for name, v in example(rule).items()}):
        made = rule(**hyper)
        kept = {name: getattr(made, name) for name in hyper}
        assert all(torch.equal(torch.as_tensor(kept[n]), torch.as_tensor(hyper[n])) for n in hyper)
        problems = Problems(SLOTS)
        assert torch.equal(run(rule(**kept), problems), run(copy.deepcopy(made), problems))
        assert not list(made.parameters())
        assert not made.state_dict()


def test_a_tensor_is_copied_and_follows_its_rule():
    rates = torch.tensor([0.1, 0.2], dtype=torch.float64)
    rule = SGD(rates)
    rates.zero_()
    assert rule.learning_rate.tolist() == [0.1, 0.2]
    assert rule.to("meta").learning_rate.is_meta


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize(("rule", "name"), ARGUMENTS)
def test_bad_hyper_parameters_are_refused_by_name(rule, name, bad):
    with pytest.raises(ValueError, match=rf"^{name} \({bad}\) must be"):
        rule(**{name: bad})
    with pytest.raises(ValueError, match=rf"^{name} \({bad}\) must be"):
        rule(**{name: torch.tensor([0.5, bad, 0.1], dtype=torch.float64)})


@pytest.mark.parametrize("name", ["momentum", "beta1", "beta2", "decay"])
def test_decays_of_one_or_more_are_refused(name):
    for rule in (rule for rule, argument in ARGUMENTS if argument == name):
        with pytest.raises(ValueError, match=rf"{name} \(1.0\) must be in \[0, 1\)"):
            rule(**{name: 1.0})


def test_a_matrix_of_hyper_parameters_is_refused():
    with pytest.raises(ValueError, match=r"learning_rate has shape \(3, 1\), but must be one number"):
        SGD(torch.ones(3, 1))


# --- Barzilai–Borwein ------------------------------------------------------------------------------------


def test_bb2_equals_a_loop_in_numpy():
    problems, first = Problems(SLOTS), 0.03
    path = run(BarzilaiBorwein(first), problems, 20).numpy()
    for s in range(SLOTS):
        own = slot(problems, s)
        gradient = lambda x, own=own: own.grad(torch.from_numpy(x)).numpy()  # noqa: E731
        x, g, rate = own.theta0.numpy(), gradient(own.theta0.numpy()), first
        for t in range(20):
            assert np.abs(path[t, s] - x).max() <= 1e-9 * (1 + np.abs(x).max())
            new = x - rate * g
            new_g = gradient(new)
            change, turn = new - x, new_g - g
            rate = change @ turn / (turn @ turn) if change @ turn > 0 else first
            x, g = new, new_g


def test_bb2_solves_one_dimension_in_two_inner_steps():
    problems = Problems(SLOTS, size=1)
    problems.grad = lambda theta: 2 * problems.w[..., 0] * problems.w[..., 0] * (theta - problems.y)
    assert largest_difference(run(BarzilaiBorwein(0.01), problems, 2)[-1], problems.y) <= 1e-10


def test_bb2_falls_back_to_the_learning_rate_problem_by_problem():
    rates = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    rule, rates = BarzilaiBorwein(rates), rates.unsqueeze(-1)
    theta, grad = torch.zeros(3, 2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)
    update, state = rule(grad, theta, rule.init_state(theta))
    assert torch.equal(update, -rates * grad)
    # the gradient has not changed; negative curvature; fine
    turn = torch.tensor([[0.0, 0.0], [1.0, 1.0], [-0.5, -0.5]], dtype=torch.float64)
    update, _ = rule(grad + turn, theta + update, state)
    rates[2] = (2 * 0.3 * 0.5) / (2 * 0.5**2)
    assert largest_difference(update, -rates * (grad + turn)) <= 1e-15


def test_bb2_falls_back_where_a_change_is_too_small_to_be_squared():
    rule, theta = BarzilaiBorwein(0.1), torch.zeros(1, 2, dtype=torch.float64)
    tiny = torch.full_like(theta, 1e-200)
    update, _ = rule(tiny, theta + 1, rule.init_state(theta))
    assert torch.equal(update, -0.1 * tiny)


def test_bb2_stays_finite_at_the_minimum():
    problems = Problems(SLOTS, dtype=torch.float32)
    assert run(BarzilaiBorwein(0.05), problems, 500).isfinite().all()


# --- schedules -------------------------------------------------------------------------------------------

SCHEDULED_TWINS = [
    (SGD(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    (HeavyBall(0.03, 0.9), lambda p: torch.optim.SGD(p, 0.03, 0.9)),
    (Adam(0.1), lambda p: torch.optim.Adam(p, 0.1)),
    (AdamW(0.1, weight_decay=0.3), lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.3)),
]


@pytest.mark.parametrize("final_fraction", [0.0, 0.03])
@pytest.mark.parametrize(("rule", "make"), SCHEDULED_TWINS)
def test_cosine_equals_torchs_scheduler(rule, make, final_fraction):
    problems = Problems(SLOTS)

    def scheduler(optimizer):
        floor = final_fraction * optimizer.defaults["lr"]
        return lr_scheduler.CosineAnnealingLR(optimizer, INNER_STEPS, floor)

    ours = run(Scheduled(rule, CosineSchedule(INNER_STEPS, final_fraction)), problems)
    assert largest_difference(ours, run_torch(make, problems, scheduler)) <= 1e-12


@pytest.mark.parametrize(("rule", "make"), SCHEDULED_TWINS)
def test_exponential_equals_torchs_scheduler(rule, make):
    problems = Problems(SLOTS)
    ours = run(Scheduled(rule, ExponentialSchedule(0.97)), problems)
    theirs = run_torch(make, problems, lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.97))
    assert largest_difference(ours, theirs) <= 1e-12


@pytest.mark.parametrize(("rule", "make"), SCHEDULED_TWINS)
def test_a_cosine_after_a_hold_equals_torchs_schedulers_in_sequence(rule, make):
    problems, hold = Problems(SLOTS), INNER_STEPS // 3

    def scheduler(optimizer):
        floor, descent = 0.1 * optimizer.defaults["lr"], INNER_STEPS - hold
        parts = [
            lr_scheduler.ConstantLR(optimizer, 1.0, 0),
            lr_scheduler.CosineAnnealingLR(optimizer, descent, floor),
        ]
        return lr_scheduler.SequentialLR(optimizer, parts, [hold])

    ours = run(Scheduled(rule, CosineSchedule(INNER_STEPS - hold, 0.1, hold)), problems)
    assert largest_difference(ours, run_torch(make, problems, scheduler)) <= 1e-12


def test_cosine_stays_at_its_end():
    steps = torch.tensor([[0.0], [5.0], [10.0], [11.0], [1000.0]], dtype=torch.float64)
    factors = CosineSchedule(10, 0.2)(steps)
    expected = torch.tensor([[1.0], [0.6], [0.2], [0.2], [0.2]], dtype=torch.float64)
    assert largest_difference(factors, expected) <= 1e-15


def test_schedules_take_one_value_per_slot():
    problems, decays = Problems(SLOTS), torch.linspace(0.5, 1, SLOTS, dtype=torch.float64)
    fractions = torch.linspace(0, 0.9, SLOTS, dtype=torch.float64)
    for schedule, values in (
        (ExponentialSchedule, decays),
        (lambda fraction: CosineSchedule(20, fraction), fractions),
    ):
        together = run(Scheduled(Adam(0.1), schedule(values)), problems)
        for s in range(SLOTS):
            alone = run(Scheduled(Adam(0.1), schedule(values[s].item())), slot(problems, s))
            assert largest_difference(together[:, s], alone) <= 1e-12


def test_any_rule_can_be_scheduled_and_schedules_nest():
    torch.manual_seed(0)
    problems = Problems(SLOTS)
    learned = CoordinatewiseLSTM(hidden_size=3).double()
    update, _ = learned(problems.theta0, problems.theta0, learned.init_state(problems.theta0))
    twice = Scheduled(Scheduled(learned, ExponentialSchedule(0.5)), ExponentialSchedule(0.1))
    state = twice.init_state(problems.theta0)
    first, state = twice(problems.theta0, problems.theta0, state)
    assert torch.equal(first, update)
    second, _ = twice(problems.theta0, problems.theta0, state)
    plain, _ = learned(problems.theta0, problems.theta0, state[0][0])
    assert largest_difference(second, 0.05 * plain) <= 1e-15
    assert len(list(twice.parameters())) == len(list(learned.parameters()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CosineSchedule(0), r"inner_steps \(0\) must be"),
        (lambda: CosineSchedule(10, hold=-1), r"hold \(-1\) must be"),
        (lambda: CosineSchedule(10, 1.0), r"final_fraction \(1.0\) must be"),
        (lambda: CosineSchedule(10, -0.1), r"final_fraction \(-0.1\) must be"),
        (lambda: ExponentialSchedule(0.0), r"decay \(0.0\) must be in \(0, 1\]"),
        (lambda: ExponentialSchedule(1.1), r"decay \(1.1\) must be"),
        (lambda: ExponentialSchedule(float("nan")), r"decay \(nan\) must be"),
        (lambda: ExponentialSchedule(torch.tensor([0.5, 2.0])), r"decay \(2.0\) must be"),
    ],
)
def test_bad_schedules_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- in use ----------------------------------------------------------------------------------------------


def test_a_grid_of_learning_rates_is_one_rollout():
    family, rates = Quadratic(dimension=5), torch.tensor([0.001, 0.01, 0.03])
    sampler = WindowSampler(family, Schedule(horizon=30, window=30, staggered=False), 0, Split.TUNE)
    batch = sampler(0, range(3)).to_batch(torch.float64)

    def losses(rule):
        return unroll(rule, family, begin(rule, batch, None), batch, InnerGradient.NONE).losses

    together = losses(Scheduled(Adam(rates.double()), CosineSchedule(30)))
    for s, rate in enumerate(rates.double().tolist()):
        alone = losses(Scheduled(Adam(rate), CosineSchedule(30)))[:, s]
        assert largest_difference(together[:, s], alone) <= 1e-12


def test_rules_and_schedules_are_built_from_yaml(tmp_path):
    config = tmp_path / "rule.yaml"
    config.write_text(
        "rule:\n  class_path: Scheduled\n  init_args:\n"
        "    rule: {class_path: Adam, init_args: {learning_rate: 1e-1, beta1: 0}}\n"
        "    schedule: {class_path: CosineSchedule, init_args: {inner_steps: 100}}\n"
    )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--rule", type=UpdateRule)
    rule = parser.instantiate(parser.parse_args([f"--config={config}"])).rule
    assert isinstance(rule, Scheduled)
    assert (rule.rule.learning_rate, rule.rule.beta1, rule.schedule.inner_steps) == (0.1, 0.0, 100)
