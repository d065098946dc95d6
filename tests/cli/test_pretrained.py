"""Rules that come with the package, cards, sharing, and reproducing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from l2l_scale.cli import pretrained, reproduce
from l2l_scale.cli.main import main
from l2l_scale.deploy import LearnedOptimizer, load_rule, pretrained_folder, pretrained_names, read_header
from l2l_scale.evaluation.schema import validate

SMOKE = str(Path(__file__).parents[2] / "configs" / "smoke.yaml")
TINY = [
    *("--trainer.max_steps=2", "--data.windows_per_epoch=2", "--data.slots=2", "--data.valid_tasks=2"),
    *("--evaluation.num_tasks=4", "--evaluation.num_tuning_tasks=4", "--evaluation.baselines=[SGD]"),
    *("--evaluation.num_reference_tasks=0", "--evaluation.shifts=null", "--evaluation.num_workers=1"),
    "--evaluation.horizons=[20,40]",
]


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """A run folder of the smoke configuration, trained and evaluated by one command."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    main(["reproduce", SMOKE, "--run_dir", str(folder), *TINY])
    return folder


@pytest.fixture(scope="module")
def packed(reproduced, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "smoke-lstm"
    main(["pretrained", "pack", str(reproduced), str(folder)])
    return folder


def test_one_command_trains_and_evaluates_at_every_horizon(reproduced):
    assert (reproduced / "rule.safetensors").is_file()
    for horizon in (20, 40):
        folder = reproduced / "evaluation" / f"{horizon}-steps"
        report = json.loads((folder / "report.json").read_text())
        assert report["horizon"] == horizon == report["tests"]["held-out"]["inner_steps"]
        assert (folder / "curves.png").is_file()


def test_it_goes_on_and_ends_where_it_is_done(reproduced):
    before = (reproduced / "rule.safetensors").read_bytes()
    main(["reproduce", SMOKE, f"--run_dir={reproduced}", *TINY])
    assert (reproduced / "rule.safetensors").read_bytes() == before


def test_a_packed_rule_has_all_that_belongs_to_it(packed, reproduced):
    names = {path.relative_to(packed).as_posix() for path in packed.rglob("*") if path.is_file()}
    assert names == {
        *("rule.safetensors", "README.md", "config.yaml"),
        *("reports/evaluation-20-steps.json", "reports/evaluation-40-steps.json"),
    }
    card = (packed / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    assert "# smoke-lstm" in card
    assert "Not beaten" in card
    config = yaml.safe_load((packed / "config.yaml").read_text())
    assert config["run_dir"] is None
    assert str(reproduced) not in (packed / "config.yaml").read_text() + card


def test_a_packed_configuration_trains_the_same_rule(packed, tmp_path):
    main(["fit", "-c", str(packed / "config.yaml"), "--run_dir", str(tmp_path / "again")])
    own, theirs = load_rule(tmp_path / "again" / "rule.safetensors"), load_rule(packed)
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), theirs.parameters(), strict=True))


def test_push_and_pull_with_a_folder(packed, tmp_path, capsys):
    (packed / "secret.txt").write_text("not mine to give")
    main(["pretrained", "push", str(packed), str(tmp_path / "hub")])
    main(["pretrained", "pull", str(tmp_path / "hub"), str(tmp_path / "mine")])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "mine" / "rule.safetensors")
    assert not (tmp_path / "hub" / "secret.txt").exists()
    assert read_header(tmp_path / "mine") == read_header(packed)
    assert (tmp_path / "mine" / "reports").is_dir()
    (packed / "secret.txt").unlink()


def test_push_and_pull_with_the_hub(packed, tmp_path, monkeypatch):
    """The calls that huggingface_hub gets, on a Hub that is a folder."""
    import huggingface_hub

    calls = []

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            calls.append((repo_id, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
            for pattern in allow_patterns:
                for path in Path(folder_path).glob(pattern):
                    place = tmp_path / "hub" / repo_id / path.relative_to(folder_path)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, place)
            return type("Commit", (), {"commit_url": f"https://huggingface.co/{repo_id}"})

    def download(repo_id, revision, local_dir, allow_patterns):
        calls.append((repo_id, revision))
        shutil.copytree(tmp_path / "hub" / repo_id, local_dir)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    main(["pretrained", "push", str(packed), "me/smoke", "--private", "true"])
    main(["pretrained", "pull", "me/smoke", str(tmp_path / "mine"), "--revision", "v1"])
    assert calls == [("me/smoke", True, True), ("me/smoke", "v1")]
    assert read_header(tmp_path / "mine") == read_header(packed)


def test_a_damaged_rule_is_not_published(packed, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(packed, broken)
    content = bytearray((broken / "rule.safetensors").read_bytes())
    content[-1] ^= 1
    (broken / "rule.safetensors").write_bytes(content)
    with pytest.raises(SystemExit):
        main(["pretrained", "push", str(broken), str(tmp_path / "hub")])
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pretrained", "show", "no-such-rule"], "there is no pretrained rule 'no-such-rule'"),
        (["pretrained", "show"], "write: l2l-scale pretrained show NAME"),
        (["pretrained", "push", "nowhere", "./hub"], "nowhere"),
        (["pretrained", "pull", "./nowhere", "mine"], "rule.safetensors"),
        (["reproduce", "no-such-rule"], "neither a configuration file nor a pretrained rule"),
        (["reproduce", "--run_dir", "x"], "say first what is to be reproduced"),
    ],
)
def test_mistakes(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert says in capsys.readouterr().err


def test_a_run_that_was_not_evaluated_is_not_packed(reproduced, tmp_path, capsys):
    shutil.copytree(reproduced, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    with pytest.raises(SystemExit):
        main(["pretrained", "pack", str(tmp_path / "run"), str(tmp_path / "out")])
    assert "run l2l-scale evaluate" in capsys.readouterr().err


# ---- the rules of the package ----


def test_every_rule_is_listed(capsys):
    main(["pretrained"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in pretrained_names())


@pytest.mark.parametrize("name", pretrained_names())
class TestRule:
    def test_it_is_small_and_complete(self, name):
        folder = pretrained_folder(name)
        assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) < 100_000
        assert pretrained.first_line(name)
        for path in folder.glob("reports/*.json"):
            validate(json.loads(path.read_text()))
        assert list(folder.glob("reports/*.json"))

    def test_it_optimizes(self, name):
        """Least squares without noise: what any optimizer can do."""
        generator = torch.Generator().manual_seed(0)
        x, model = torch.randn(64, 10, generator=generator), torch.nn.Linear(10, 1)
        with torch.no_grad():
            model.weight.copy_(torch.randn(1, 10, generator=generator))
            model.bias.zero_()
            y = x @ torch.randn(10, 1, generator=generator)
        optimizer = LearnedOptimizer(model.parameters(), name)
        losses = []
        for _ in range(100):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x), y)
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
        assert losses[-1] < 0.5 * losses[0]
        assert optimizer.alarms == 0

    def test_its_configuration_is_accepted(self, name, tmp_path, monkeypatch):
        config, _ = reproduce.find_config(name)
        rule = yaml.safe_load(config.read_text())["model"]["rule"]
        assert rule["class_path"].rpartition(".")[2] == read_header(name)["rule"]["class"]


def test_a_name_that_is_neither_file_nor_rule():
    with pytest.raises(FileNotFoundError, match="come with the package"):
        LearnedOptimizer(torch.nn.Linear(2, 1).parameters(), "genral-lstm")
