"""The shape of the house: who may import whom, what may be drawn where, how long a file may be."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "l2l_scale"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
MAX_LINES = 250

FLOORS = {
    **dict.fromkeys(("tree", "flat", "rng", "checks", "cores", "files", "run_record"), 0),
    **dict.fromkeys(("tasks", "optimizers"), 1),
    "unroll": 2,
    **dict.fromkeys(("estimators", "sampling"), 3),
    "evaluation": 4,
    **dict.fromkeys(("training", "diagnosis"), 5),
}
SIDE = {"deploy": {"optimizers", *(name for name, floor in FLOORS.items() if floor == 0)}}
"""Rooms beside the floors: what they may import. Torch alone is enough to use a learned optimizer."""
SIDE_DOOR = 4
"""The lowest floor that may import a side room."""
ROOF = {"cli", "__main__"}

ONLY_IN = {"ray": {"sampling/pool.py"}, "lightning": {"training", "cli"}, "wandb": {"training"}}

TOP_LEVEL = {"pyproject.toml", "l2l_scale", "configs", "scripts", "slurm", "tests", "README.md", "LICENSE"}

DRAWING_MODULES = (
    "numpy.random.",
    "torch.random.",
    "torch.nn.init.",
    "torch.cuda.manual_seed",
    "random",
    "secrets",
)
TORCH_DRAWS = {
    *("bernoulli", "default_generator", "Generator", "initial_seed", "manual_seed", "multinomial", "normal"),
    *("poisson", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm", "seed"),
}
IN_PLACE_DRAWS = {
    *("bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_"),
}
ALLOWED_DRAWS = {
    ("rng.py", "numpy.random.Philox"): "the one place where generators are made",
    ("rng.py", "numpy.random.Generator"): "the one place where generators are made",
    ("optimizers/cells.py", "uniform_"): "φ's initialisation, under seed_everything (like nn.Linear's own)",
    ("optimizers/recurrent.py", "uniform_"): "φ's initialisation, under seed_everything",
    (
        "tasks/module.py",
        "torch.default_generator",
    ): "a user's own nn.init, seeded from a stream",
    ("tasks/module.py", "torch.random.fork_rng"): "leaves torch's global generator as it was",
}


@cache
def parse(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def room(name: str) -> str:
    """The floor's entry that a file belongs to: ``sampling/loader.py`` -> sampling, ``flat.py`` -> flat."""
    return name.split("/")[0].removesuffix(".py")


def imported(name: str) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function."""
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno} imports relatively"
            assert node.module
            yield node.module
            if node.module == "l2l_scale":
                yield from (f"l2l_scale.{alias.name}" for alias in node.names)


def allowed_rooms(own: str) -> set[str]:
    """What a room may import besides itself."""
    if own in SIDE:
        return SIDE[own]
    if own in ROOF:
        return {*FLOORS, *SIDE, *ROOF}
    below = {name for name, floor in FLOORS.items() if floor < FLOORS[own]}
    return below | (set(SIDE) if FLOORS[own] >= SIDE_DOOR else set())


def dotted(node: ast.AST) -> str | None:
    """``a.b.c`` as written, or None."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return None if base is None else f"{base}.{node.attr}"
    return None


def full_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of all attribute chains and imports, aliases resolved: np.random -> numpy.random."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            aliases |= names
            yield from ((node.lineno, name) for name in names.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, _, rest = (dotted(node) or f"?.{node.attr}").partition(".")
            yield node.lineno, f"{aliases.get(head, head)}.{rest}"


def annotations(tree: ast.Module) -> set[int]:
    """Ids of the nodes of type annotations: there np.random.Generator draws nothing."""
    roots: list[ast.AST | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            roots.append(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            roots.append(node.returns)
    return {id(child) for root in roots if root is not None for child in ast.walk(root)}


def draw_in(name: str) -> str | None:
    """What a full name draws from other than a generator that was passed in, as in ALLOWED_DRAWS."""
    method = name.rsplit(".")[-1]
    if method in IN_PLACE_DRAWS or method == "seed_everything":
        return method
    if name.startswith(DRAWING_MODULES) or (name.startswith("torch.") and name[6:] in TORCH_DRAWS):
        return name
    return None


def stray_draws(name: str, tree: ast.Module) -> list[str]:
    """Where a file draws without leave; changes ``tree``."""
    hints = annotations(tree)
    for node in ast.walk(tree):  # a hint becomes a plain name, which is never a draw
        for field, value in ast.iter_fields(node):
            if id(value) in hints:
                setattr(node, field, ast.Name(id="hint", ctx=ast.Load()))
    found = sorted({(line, draw) for line, full in full_names(tree) if (draw := draw_in(full))})
    return [f"{name}:{line} {draw}" for line, draw in found if (name, draw) not in ALLOWED_DRAWS]


def test_every_file_is_in_a_known_room() -> None:
    assert {room(name) for name in FILES} - {"__init__"} <= {*FLOORS, *SIDE, *ROOF}


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name: str) -> None:
    own = room(name)
    others = {module.split(".")[1] for module in imported(name) if module.startswith("l2l_scale.")} - {own}
    allowed = set() if own == "__init__" else allowed_rooms(own)
    assert others <= allowed, f"{name} may not import {sorted(others - allowed)}"


@pytest.mark.parametrize("name", FILES)
def test_heavy_libraries_stay_in_their_places(name: str) -> None:
    for library in {module.split(".")[0] for module in imported(name)} & ONLY_IN.keys():
        assert {name, room(name)} & ONLY_IN[library], f"{name} may not import {library}"


@pytest.mark.parametrize("module", ["l2l_scale", "l2l_scale.deploy", "l2l_scale.cli", "l2l_scale.evaluation"])
def test_importing_leaves_the_training_libraries_out(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'lightning', 'ray', 'wandb'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_drawn_except_through_a_stream(name: str) -> None:
    assert stray_draws(name, ast.parse(FILES[name].read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import torch\nx = torch.randn(3)",
        "import torch as t\nt.manual_seed(0)",
        "from torch import rand",
        "import numpy as np\nrng = np.random.default_rng(0)",
        "import numpy as np\nrng = np.random.Generator(np.random.PCG64())",
        "from numpy.random import default_rng",
        "from numpy import random as r\nr.rand()",
        "import random\nrandom.random()",
        "def f(x):\n    return x.clone().normal_()",
        "from torch import nn\nnn.init.zeros_(1)",
        "import lightning as L\nL.seed_everything(0)",
    ],
)
def test_the_search_for_stray_draws_finds(code: str) -> None:
    assert stray_draws("tasks/some.py", ast.parse(code))


def test_the_search_for_stray_draws_leaves_annotations_and_passed_generators_alone() -> None:
    code = (
        "import numpy as np\ndef f(rng: np.random.Generator | None) -> np.random.Generator:\n    rng.normal()"
    )
    assert stray_draws("tasks/some.py", ast.parse(code)) == []


@pytest.mark.parametrize("name", FILES)
def test_files_are_short_and_say_what_they_are(name: str) -> None:
    text = FILES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert ast.get_docstring(parse(name)), f"{name} has no docstring"


def test_the_top_level_holds_these_entries_and_no_others() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.splitlines()
    entries = {path.split("/")[0] for path in listed}
    assert {entry for entry in entries if not entry.startswith(".")} == TOP_LEVEL
