"""Rule files: exact, built from the package's own classes, and clear about what is wrong with a file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from l2l_scale.deploy import (
    build_rule,
    classes_of,
    describe_rule,
    load_rule,
    read_header,
    save_rule,
    take_over,
)
from l2l_scale.optimizers import (
    Adam,
    Concatenate,
    CoordinatewiseLSTM,
    Grouped,
    LogMagnitude,
    LogSign,
    RNNprop,
    TanhExp,
    UpdateRule,
)


def nested_rule() -> CoordinatewiseLSTM:
    torch.manual_seed(0)
    features = Concatenate([LogSign(7.5), RNNprop(0.8, log_scale=True), LogMagnitude(limit=1.5)])
    return CoordinatewiseLSTM(5, 1, features, TanhExp(0.3, 0.7), forget_bias=2.0, output_scale=0.5)


class Gain(torch.nn.Module):
    """A user's part without arguments."""

    def forward(self, grad: torch.Tensor) -> torch.Tensor:
        return 2 * grad


class UserRule(UpdateRule):
    """A user's rule with every kind of argument."""

    def __init__(self, rates: tuple[float, ...], names: dict[str, int], grid: torch.Tensor, gain: Gain):
        super().__init__()
        self.rates, self.names, self.grid, self.gain = rates, names, grid, gain
        self.weight = torch.nn.Parameter(torch.randn(3))
        self.register_buffer("count", torch.tensor(4))

    def init_state(self, theta):
        return ()

    def forward(self, grad, theta, state):
        return -self.rates[0] * self.gain(grad), state


def user_rule() -> UserRule:
    torch.manual_seed(1)
    return UserRule((0.1, 0.2), {"a": 1}, torch.tensor([1 / 3], dtype=torch.float64), Gain())


class Forgetful(UpdateRule):
    """Does not keep its argument under its name."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.eta = rate

    init_state = UserRule.init_state
    forward = UserRule.forward


def same(a: UpdateRule, b: UpdateRule) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        torch.equal(left[key], right[key]) and left[key].dtype == right[key].dtype for key in left
    )


def rewrite_header(path: Path, **changes: object) -> None:
    """Change a rule file's header and leave the rest."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["header"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {"header": json.dumps({**header, **changes})})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_rule(nested_rule(), tmp_path / "rule.safetensors", {"meta_steps": 7})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip_is_exact_and_keeps_the_precision(tmp_path, dtype):
    rule = nested_rule().to(dtype)
    loaded = load_rule(save_rule(rule, tmp_path / "new" / "folder" / "rule.safetensors"))
    assert same(rule, loaded)
    assert describe_rule(loaded) == describe_rule(rule)
    assert next(loaded.parameters()).dtype == dtype


def test_loaded_rule_computes_the_same_and_can_be_trained_on(saved):
    rule, loaded = nested_rule(), load_rule(saved)
    grad = torch.linspace(-1, 1, 6).view(2, 3)
    results = [r(grad, grad, r.init_state(grad))[0] for r in (rule, loaded)]
    assert torch.equal(*results)
    results[1].sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_rule_without_parameters_round_trips(tmp_path):
    grid = torch.tensor([0.1, 1 / 3], dtype=torch.float64)
    loaded = load_rule(save_rule(Adam(grid, beta1=0.8), tmp_path / "adam.safetensors"))
    assert isinstance(loaded, Adam)
    assert torch.equal(loaded.learning_rate, grid)
    assert (loaded.beta1, loaded.beta2) == (0.8, 0.999)


def test_users_classes_round_trip_when_they_are_passed(tmp_path):
    rule = user_rule()
    loaded = load_rule(save_rule(rule, tmp_path / "rule.safetensors"), classes=[UserRule, Gain])
    assert same(rule, loaded)
    assert (loaded.rates, loaded.names) == ((0.1, 0.2), {"a": 1})
    assert torch.equal(loaded.grid, rule.grid)
    assert isinstance(loaded.gain, Gain)


def test_loading_leaves_the_random_state_alone(saved):
    before = torch.get_rng_state()
    load_rule(saved)
    assert torch.equal(before, torch.get_rng_state())


def test_header_says_what_the_rule_is(saved):
    header = read_header(saved)
    assert (header["format"], header["version"], header["metadata"]) == (
        "l2l_scale.rule",
        1,
        {"meta_steps": 7},
    )
    assert header["rule"]["class"] == "CoordinatewiseLSTM"
    assert header["rule"]["init_args"]["head"] == {
        "class": "TanhExp",
        "init_args": {"scale": 0.3, "exp_scale": 0.7},
    }
    assert [part["class"] for part in header["rule"]["init_args"]["features"]["init_args"]["parts"]] == [
        "LogSign",
        "RNNprop",
        "LogMagnitude",
    ]


def test_description_is_json_and_builds_an_equal_rule():
    rule = nested_rule()
    description = json.loads(json.dumps(describe_rule(rule)))
    built = build_rule(description, rule.state_dict())
    assert describe_rule(built) == description
    assert same(rule, built)


def test_built_rule_does_not_share_memory_with_its_source():
    rule = nested_rule()
    built = build_rule(describe_rule(rule), rule.state_dict())
    with torch.no_grad():
        rule.output.weight.add_(1)
    assert not torch.equal(rule.output.weight, built.output.weight)


def test_classes_of_a_rule_are_the_users_only():
    assert set(classes_of(user_rule())) == {UserRule, Gain}
    assert classes_of(nested_rule()) == []


def test_write_replaces_the_file_and_leaves_nothing_beside(tmp_path, saved):
    save_rule(CoordinatewiseLSTM(3, 1), saved)
    assert load_rule(saved).hidden_size == 3
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]


def test_failed_write_keeps_the_old_file(tmp_path, saved, monkeypatch):
    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_rule(CoordinatewiseLSTM(3, 1), saved)
    assert load_rule(saved).hidden_size == 5
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no rule file .*nowhere.*l2l-scale export"):
        load_rule(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"not a safetensors file, or is truncated.*export it again"):
        load_rule(saved)


def test_flipped_bit_in_the_tensors(saved):
    content = bytearray(saved.read_bytes())
    content[-3] ^= 1
    saved.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged .*checksum"):
        load_rule(saved)


def test_flipped_bit_in_the_header(saved):
    content = saved.read_bytes().replace(b"7.5", b"7.4")
    saved.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged .*checksum"):
        load_rule(saved)


def test_header_that_is_no_json(tmp_path):
    save_file({}, tmp_path / "rule.safetensors", {"header": "{"})
    with pytest.raises(ValueError, match="header is no JSON"):
        load_rule(tmp_path / "rule.safetensors")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"header": "[]"}])
def test_safetensors_of_something_else(tmp_path, metadata):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors", metadata)
    with pytest.raises(ValueError, match=r"not of a rule.*l2l-scale export"):
        load_rule(tmp_path / "model.safetensors")


def test_newer_version(saved):
    rewrite_header(saved, version=2, l2l_scale="9.0")
    with pytest.raises(ValueError, match=r"format version 2.*written by l2l_scale 9\.0"):
        load_rule(saved)


def test_folder_by_mistake(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder without a rule.safetensors.*l2l-scale export"):
        load_rule(tmp_path)


@pytest.mark.parametrize("name", ["last.ckpt", "rule.safetensors"])
def test_training_checkpoint_by_mistake(tmp_path, name):
    torch.save({"state_dict": {}}, tmp_path / name)
    with pytest.raises(ValueError, match=r"training checkpoint.*l2l-scale export"):
        load_rule(tmp_path / name)


def test_class_that_was_not_passed(tmp_path):
    path = save_rule(user_rule(), tmp_path / "rule.safetensors")
    with pytest.raises(ValueError, match=r"'Gain' is not one of.*classes=\[Gain\]"):
        load_rule(path, classes=[UserRule])


def test_class_that_has_changed_since(tmp_path):
    path = save_rule(user_rule(), tmp_path / "rule.safetensors")

    class Changed(UserRule):
        def __init__(self, **args):
            super().__init__(**args)
            self.weight = torch.nn.Parameter(torch.zeros(2))
            self.bias = torch.nn.Parameter(torch.zeros(2))
            del self.count

    Changed.__name__ = "UserRule"
    message = r"missing \['bias'\], unexpected \['count'\], of other shapes \['weight'\]"
    with pytest.raises(ValueError, match=message):
        load_rule(path, classes=[Changed, Gain])


def test_class_that_takes_other_arguments(tmp_path):
    path = save_rule(user_rule(), tmp_path / "rule.safetensors")

    class Other(UserRule):
        def __init__(self, speed):
            self.speed = speed

    Other.__name__ = "UserRule"
    with pytest.raises(ValueError, match="UserRule cannot be built from its saved arguments"):
        load_rule(path, classes=[Other, Gain])


def test_part_that_is_no_rule(tmp_path):
    with pytest.raises(ValueError, match="subclass of UpdateRule, not a Gain"):
        save_rule(Gain(), tmp_path / "gain.safetensors")


def test_rule_that_forgets_an_argument_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="Forgetful: it must keep its __init__ argument 'rate'"):
        save_rule(Forgetful(0.1), tmp_path / "rule.safetensors")
    assert not list(tmp_path.iterdir())


def test_rule_that_cannot_be_built_again_is_not_written(tmp_path):
    rule = nested_rule()
    rule.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"unexpected \['extra'\]"):
        save_rule(rule, tmp_path / "rule.safetensors")
    assert not list(tmp_path.iterdir())


def test_class_with_the_name_of_a_package_class_is_refused():
    impostor = type("Adam", (UserRule,), {})
    with pytest.raises(ValueError, match="have one name"):
        describe_rule(impostor((0.1,), {}, torch.zeros(1), Gain()))


def test_metadata_must_be_json(tmp_path):
    with pytest.raises(ValueError, match=r"metadata .* must hold JSON"):
        save_rule(nested_rule(), tmp_path / "rule.safetensors", {"when": object()})


def test_deploy_needs_torch_and_safetensors_only():
    code = (
        "import sys, l2l_scale.deploy\n"
        "heavy = 'lightning pytorch_lightning ray wandb datasets sklearn scipy matplotlib jsonargparse'\n"
        "floors = ' tasks unroll estimators sampling evaluation training'.replace(' ', ' l2l_scale.')\n"
        "print(sorted(set((heavy + floors).split()) & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_rule_takes_over_the_phi_of_a_file(tmp_path):
    torch.manual_seed(0)
    first, other = (CoordinatewiseLSTM(4, 1) for _ in range(2))
    path = save_rule(first, tmp_path / "rule.safetensors")
    take_over(other, path)
    assert all(map(torch.equal, first.state_dict().values(), other.state_dict().values()))
    with pytest.raises(ValueError, match=r"must be of the form of the one to start from.*'hidden_size': 4"):
        take_over(CoordinatewiseLSTM(5, 1), path)
    with pytest.raises(FileNotFoundError, match="no rule file"):
        take_over(other, tmp_path / "nothing.safetensors")


def test_each_of_grouped_rules_takes_over_the_phi_of_a_file(tmp_path):
    torch.manual_seed(0)
    path = save_rule(CoordinatewiseLSTM(4, 1), tmp_path / "rule.safetensors")
    patterns = {"conv": ["conv"], "linear": ["*"]}
    grouped = Grouped({name: CoordinatewiseLSTM(4, 1) for name in patterns}, patterns)
    take_over(grouped, path)
    phi = load_rule(path).state_dict()
    for rule in grouped.rules.values():
        assert all(map(torch.equal, phi.values(), rule.state_dict().values()))

    with torch.no_grad():
        next(grouped.rules["conv"].parameters()).add_(1.0)
    whole = save_rule(grouped, tmp_path / "grouped.safetensors")
    another = Grouped({name: CoordinatewiseLSTM(4, 1) for name in patterns}, patterns)
    take_over(another, whole)
    assert all(map(torch.equal, grouped.state_dict().values(), another.state_dict().values()))

    with pytest.raises(ValueError, match=r"must be of the form of the one to start from.*'hidden_size': 5"):
        take_over(
            Grouped({"conv": CoordinatewiseLSTM(4, 1), "linear": CoordinatewiseLSTM(5, 1)}, patterns), path
        )
