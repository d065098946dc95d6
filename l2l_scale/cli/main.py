"""The entry point: picks the command, and turns a user's mistakes into one clear message."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

COMMANDS = {
    "fit": "meta-train an update rule",
    "evaluate": "compare rules with tuned baselines on held-out tasks: table, report and picture",
    "tune": "tune the baselines of a config and show what was chosen",
    "export": "write the rule of a checkpoint as a file for LearnedOptimizer",
    "diagnose": "explain how a meta-learner does, with a picture and advice",
    "memory": "predict the memory that meta-training with a config needs",
    "runs": "list run folders with state, last meta-step and best value",
    "reproduce": "train, evaluate and draw an experiment of the paper or a pretrained rule",
    "pretrained": "list, show, pack, push and pull rules that are ready to be used",
    "slurm": "submit a meta-training to Slurm",
}

MISTAKES = (
    ArgumentError,
    ValueError,
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
)
"""What a user can mend; a full disk or a network that fails may be another time."""

USAGE = f"""usage: l2l-scale COMMAND [options]

{chr(10).join(f"  {name:10}{text}" for name, text in COMMANDS.items())}

l2l-scale COMMAND --help lists the options of a command, --print_config its whole configuration.
Options are given as --key.subkey value, or in YAML files: -c base.yaml -c overlay.yaml (later ones win).
--debug shows where an error came from."""


def main(args: Sequence[str] | None = None) -> None:
    """Run one command; exits with 0, 1 (the run failed), 2 (a user's mistake) or 130 (Ctrl-C).

    :mod:`l2l_scale.cli.stopping` has the codes of a run that was stopped.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    if arguments[0] == "--version":
        print(f"l2l-scale {version('l2l_scale')}")
        return
    if str(Path.cwd()) not in sys.path:
        # Your own tasks and rules, as with python -m; at the end, for a job's PYTHONPATH holds its own copy.
        sys.path.append(str(Path.cwd()))
    try:
        run(arguments[0], arguments[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        print(f"l2l-scale {arguments[0]}: {str(error) or repr(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, MISTAKES) else 1)


def run(command: str, arguments: list[str]) -> None:
    """Import and run one command; imports take seconds, so only the one that is asked for.

    Raises:
        ValueError: if there is no such command.
    """
    if command not in COMMANDS:
        raise ValueError(f"there is no such command; choose one of {', '.join(COMMANDS)}")
    import_module(f"l2l_scale.cli.{command}").run(arguments)
