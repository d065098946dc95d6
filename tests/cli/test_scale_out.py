"""More processes, as a user meets them: ranks, actors, mixtures; and what is refused before any work."""

import csv
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from test_cli import BASE, ROOT, SMOKE, fails

from l2l_scale.cli.main import main
from l2l_scale.training.checkpoints.folder import TRAINING, read_tensors, slots_file

OVERLAYS = ROOT / "configs" / "overlays"
QUADRATIC = str(ROOT / "configs" / "quadratic_lstm.yaml")
CPU2 = ["-c", str(OVERLAYS / "cpu2.yaml")]
ACTORS = ["-c", str(OVERLAYS / "actors.yaml"), "--data.pool.cpus_per_actor", "0.5"]
QUIET = ["--trainer.enable_progress_bar", "false"]
SHORT = ["--trainer.max_steps", "50", "--data.windows_per_epoch", "50", "--data.slots", "64"]
MIXTURE = """
data:
  family:
    class_path: Mixture
    init_args:
      placement: rank_groups
      members:
        quadratics:
          family: {class_path: Quadratic, init_args: {dimension: 3}}
        digits:
          family: {class_path: ImageClassifier, init_args: {dataset: digits, hidden: [3], batch_size: 8}}
"""


def phi(folder):
    """The rule in the last checkpoint, as one vector."""
    state = read_tensors(folder / "checkpoints" / "last" / TRAINING)["state_dict"]
    return torch.cat([leaf.flatten() for leaf in state.values()])


def metrics(folder):
    """All rows but the time that they took."""
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "train/waited"} for row in csv.DictReader(file)]


def run(*arguments):
    """A command in processes of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "l2l_scale", *arguments], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def left(processes, timeout):
    """Those that run on. What has lost its parent may stay as a mere name until somebody asks for it."""
    alive = psutil.wait_procs(processes, timeout=timeout)[1]
    return [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_one_and_two_processes_train_the_same_rule_and_actors_change_no_bit(tmp_path):
    fit = ["fit", "-c", QUADRATIC, *SHORT, *QUIET, "--run_dir"]
    said = run(*fit, str(tmp_path / "two"), *CPU2, *ACTORS)
    assert "64 slots on 2 ranks" in said
    assert "1 actor(s) draw ahead" in said
    run(*fit, str(tmp_path / "again"), *CPU2, "--trainer.strategy", "ddp_fork")
    assert torch.equal(phi(tmp_path / "two"), phi(tmp_path / "again"))
    assert metrics(tmp_path / "two") == metrics(tmp_path / "again")
    main([*fit, str(tmp_path / "one")])
    assert (phi(tmp_path / "one") - phi(tmp_path / "two")).abs().max() <= 1e-6


def test_actors_change_no_metric_and_leave_no_process(tmp_path):
    before = set(psutil.Process().children(recursive=True))
    for name, options in (("with", ACTORS), ("without", [])):
        main(["fit", "-c", SMOKE, *options, *QUIET, "--run_dir", str(tmp_path / name)])
        rest = set(psutil.Process().children(recursive=True)) - before
        assert left(rest, timeout=5) == []
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
    assert torch.equal(phi(tmp_path / "with"), phi(tmp_path / "without"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_no_process_is_left_after_a_signal(tmp_path, number):
    fit = [sys.executable, "-m", "l2l_scale", "fit", "-c", SMOKE, *ACTORS, *QUIET]
    endless = ["--trainer.max_steps", "1000000", "--checkpoint.every_n_meta_steps", "10"]
    endless += ["--run_dir", str(tmp_path / "run")]
    # What runs in the background of a shell inherits that Ctrl-C is ignored; this process must not.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen(
        [*fit, *endless], stdout=subprocess.PIPE, text=True, preexec_fn=heed, start_new_session=True
    ) as process:
        last = tmp_path / "run" / "checkpoints" / "last"
        while not last.exists():
            assert process.poll() is None
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        assert any("raylet" in child.name() for child in children)
        if number == signal.SIGINT:  # a terminal's Ctrl-C goes to all of them
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        rest = process.stdout.read()
    assert process.returncode == 128 + number
    assert "--ckpt_path last" in rest
    assert left(children, timeout=10) == []


@pytest.mark.slow
def test_groups_of_ranks_train_and_go_on_through_the_command_line(tmp_path):
    (tmp_path / "mixture.yaml").write_text(MIXTURE)
    fit = ["fit", "-c", SMOKE, "-c", str(tmp_path / "mixture.yaml"), *CPU2, "--trainer.strategy", "ddp_fork"]
    fit += [*QUIET, "--data.windows_per_epoch", "5", "--data.valid_tasks", "4", "--model.final_fraction", "1"]
    for name, steps in (("straight", "10"), ("parts", "5")):
        said = run(*fit, "--run_dir", str(tmp_path / name), "--trainer.max_steps", steps)
        assert "2 families, rank_groups:" in said
    config = str(tmp_path / "parts" / "config.yaml")
    run("fit", "-c", config, "--ckpt_path", "last", "--trainer.max_steps", "10")
    assert torch.equal(phi(tmp_path / "straight"), phi(tmp_path / "parts"))
    last = tmp_path / "parts" / "checkpoints" / "last"
    for rank, name in enumerate(["quadratics", "digits"]):  # each wrote its own
        (saved,) = read_tensors(last / slots_file(rank, 2))
        assert {name: len(saved[name]["leaves"][0]) for name in saved} == {name: 8}


TWO = "{quadratics: {family: {class_path: Quadratic}}, more: {family: {class_path: Quadratic}, weight: %s}}"


def mixture(weight="1.0"):
    return ["--data.family=Mixture", f"--data.family.members={TWO % weight}"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*BASE, "--data.pool.num_actors=999"], "num_actors (999), 1 CPUs each, must not need more than the"),
        ([*BASE, "--data.pool.num_actors=-1"], "num_actors (-1) must be a whole number >= 0"),
        (
            [*BASE, "--data.pool.num_actors=1", "--data.pool.ray_address=127.0.0.1:1"],
            "ray_address (127.0.0.1:1): there is no Ray cluster",
        ),
        ([*BASE, "--data.pool.ray_address=here"], "ray_address (here) must be HOST:PORT"),
        ([*BASE, *CPU2, "--data.slots=7"], "slots (7) must be a multiple of the ranks that share them (2)"),
        ([BASE[0], *mixture(), *CPU2, "--data.slots=14"], "slots of quadratics (7) must be a multiple"),
        ([BASE[0], *mixture("-1.0")], "weight (-1.0) must be a finite number > 0"),
        ([BASE[0], *mixture(), "--data.slots=1"], "slots (1) must be at least the number of families"),
        (
            [BASE[0], *mixture(), "--data.family.placement=rank_groups"],
            "number of ranks (1) must be at least the number of families in the mixture (2)",
        ),
        (
            [*BASE, "--data.curriculum=StagedHorizons", "--data.curriculum.stages=[20,30]"],
            "starts ([0, 1000, 2000, 3000]) must have one window for each of the 2 stages",
        ),
        ([*BASE, "--data.curriculum=RandomHorizons", "--data.curriculum.low=0"], "low (0) must be a whole"),
        (
            [*BASE, "--model.estimator=TruncatedBPTT", "--model.estimator.meta_loss=RelativeLoss"],
            "RelativeLoss compares with a teacher: give data.teacher",
        ),
        ([*BASE, "--trainer.accumulate_grad_batches=3"], "must be a multiple of trainer.accumulate_grad"),
        ([*BASE, *CPU2, "--trainer.precision=16-mixed"], "trainer.precision (16-mixed) must be one of"),
    ],
)
def test_mistake_is_answered_before_any_work(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(psutil.Process().children(recursive=True))
    assert says in fails(["fit", *arguments], capsys)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_of_lightnings_ends_with_the_one_that_started_it():
    code = (
        "import os, time\nfrom l2l_scale.cli.stopping import end_with_parent\n"
        "child = os.fork()\n"
        "if child == 0:\n    end_with_parent()\n    time.sleep(60)\n"
        "print(child, flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        time.sleep(2.5)
        assert child.is_running()
        parent.kill()
    assert left([child], timeout=10) == []


def test_a_rank_that_has_done_its_part_ends_well_whatever_comes_at_the_end():
    code = (
        "import atexit, os\nfrom l2l_scale.cli.stopping import leave\n"
        "atexit.register(os.abort)\nprint('done')\nleave()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n")
