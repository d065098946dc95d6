"""``l2l-scale reproduce``: train, evaluate and draw an experiment, or a pretrained rule, in one command."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import torch

from l2l_scale.cli import evaluate, fit
from l2l_scale.deploy import load_rule, pretrained_folder, pretrained_names
from l2l_scale.deploy.pretrained import CONFIG, RULE

USAGE = """usage: l2l-scale reproduce WHAT [options of fit]

Meta-train, evaluate and draw in one command. WHAT is a configuration, as those of the paper's experiments in
configs/paper/, or the name of a pretrained rule, which is then compared with the one that comes with the
package. A run that was stopped goes on. The run folder is runs/NAME if --run_dir is not given."""


def run(arguments: list[str]) -> None:
    """Reproduce as the command line says.

    Raises:
        ValueError: if nothing is named, or there is no such configuration or rule.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0)
    if not arguments or arguments[0].startswith("-"):
        raise ValueError("say first what is to be reproduced: a configuration or a pretrained rule's name")
    what, options = arguments[0], arguments[1:]
    config, name = find_config(what)
    given = [b for a, b in pairwise(options) if a == "--run_dir"]
    given += [option.removeprefix("--run_dir=") for option in options if option.startswith("--run_dir=")]
    folder = Path(given[-1]) if given else Path("runs") / name
    fit.run(["-c", str(config), "--run_dir", str(folder), "--ckpt_path", "last", *options])
    evaluate.run(["-c", str(folder / CONFIG)])
    if what in pretrained_names():
        print(comparison(what, folder / RULE))


def find_config(what: str) -> tuple[Path, str]:
    """The configuration that is meant, and a name for its run.

    Raises:
        ValueError: if there is none.
    """
    if Path(what).is_file():
        return Path(what), Path(what).stem
    if what in pretrained_names():
        return pretrained_folder(what) / CONFIG, what
    raise ValueError(
        f"{what!r} is neither a configuration file nor a pretrained rule; those are "
        f"{', '.join(pretrained_names()) or 'none'}"
    )


def comparison(name: str, own: Path) -> str:
    """How far the φ that was trained now is from the one in the package, in one line."""
    now, then = load_rule(own).state_dict(), load_rule(name).state_dict()
    if now.keys() != then.keys() or any(now[key].shape != then[key].shape for key in now):
        return f"the rule has another form than the {name} of the package: the configuration was changed"
    if all(torch.equal(now[key], then[key]) for key in now):
        return f"φ is that of the {name} of the package, bit for bit"
    distance = max((now[key] - then[key]).abs().max().item() for key in now)
    return (
        f"φ differs from the {name} of the package by {distance:.2g} at most: another machine or backend "
        "rounds differently, and rounding grows in training. Compare the reports"
    )
