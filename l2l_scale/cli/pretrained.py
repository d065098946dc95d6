"""``l2l-scale pretrained``: rules that are ready to be used, and how to share your own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from jsonargparse import ArgumentParser
from rich import box
from rich.console import Console
from rich.table import Table

from l2l_scale.cli.card import HEADLINE, pack
from l2l_scale.deploy import pretrained_folder, pretrained_names, pull_rule, push_rule, read_header
from l2l_scale.deploy.pretrained import CARD, RULE

Action: TypeAlias = Literal["list", "show", "pack", "push", "pull"]

OPERANDS: dict[Action, tuple[str, ...]] = {
    "list": (),
    "show": ("NAME",),
    "pack": ("RUN", "FOLDER"),
    "push": ("FOLDER", "TARGET"),
    "pull": ("SOURCE", "FOLDER"),
}

DESCRIPTION = """Rules that come with the package, and their model cards; and how to share your own.

list: what there is. show NAME: its model card. pack RUN FOLDER: make a folder with rule, model card, config
and reports of a run that was evaluated. push FOLDER TARGET and pull SOURCE FOLDER: to and from the Hugging
Face Hub ("owner/name"), or a local folder (a path that begins with ".", "/" or "~")."""


def run(arguments: list[str]) -> None:
    """Do as the command line says.

    Raises:
        ValueError: if something that the action needs is missing.
    """
    parser = ArgumentParser(exit_on_error=False, description=DESCRIPTION)
    parser.add_argument("-c", "--config", action="config", help="a YAML file with these options")
    parser.add_argument("action", nargs="?", type=Action, default="list")
    parser.add_argument("operands", nargs="*", type=str, help="what, and to where")
    parser.add_argument("--name", type=str | None, default=None, help="pack: the rule's name on its card")
    parser.add_argument("--private", type=bool, default=False, help="push: a new repository is private")
    parser.add_argument("--revision", type=str | None, default=None, help="pull: branch, tag or commit")
    config = parser.parse_args(arguments)
    operands = OPERANDS[config.action]
    given = config.operands
    if len(given) != len(operands):
        raise ValueError(f"write: l2l-scale pretrained {' '.join([config.action, *operands])}")
    if config.action == "list":
        show_list()
    elif config.action == "show":
        print((pretrained_folder(given[0]) / CARD).read_text(encoding="utf-8"))
    elif config.action == "pack":
        print(pack(Path(given[0]), Path(given[1]), config.name))
    elif config.action == "push":
        print(push_rule(given[0], given[1], private=config.private))
    else:
        print(pull_rule(given[0], given[1], config.revision))


def show_list() -> None:
    """Print a table of the rules of the package."""
    table = Table(title="Pretrained rules", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("name", "kB", "meta-steps", "what its card says first"):
        table.add_column(column, justify="right" if column in ("kB", "meta-steps") else "left")
    for name in pretrained_names():
        file = pretrained_folder(name) / RULE
        steps = read_header(file)["metadata"].get("meta_steps", "–")
        table.add_row(name, f"{file.stat().st_size / 1000:.0f}", str(steps), first_line(name))
    Console().print(table)
    print('use one: LearnedOptimizer(model.parameters(), "NAME"); l2l-scale pretrained show NAME says more')


def first_line(name: str) -> str:
    """The headline of a card."""
    lines = (pretrained_folder(name) / CARD).read_text(encoding="utf-8").splitlines()
    return next((line.removeprefix(HEADLINE) for line in lines if line.startswith(HEADLINE)), "")
