"""The picture of several tests."""

import torch

from l2l_scale.evaluation.panels import BASELINES, _shown, plot_tests
from l2l_scale.evaluation.report import Curves


def tuned(on, target="final"):
    return {"target": target, "tuned_on": on, "num_tasks": 4, "score": 1.0, "edges": []}


def curves(level):
    return torch.linspace(5, level, 21)[:, None].expand(21, 6).clone()


FINALS = {"A": 4.0, "B": 1.0, "C": 3.0, "D": 2.0}
TESTS = {
    "held-out": {
        "learned": Curves("learned", {}, None, curves(0.1)),
        **{name: Curves("tuned", {}, tuned("held-out"), curves(x)) for name, x in FINALS.items()},
        "B (sum)": Curves("tuned", {}, tuned("held-out", "sum"), curves(0.5)),
    },
    "wide": {
        "learned": Curves("learned", {}, None, curves(0.2)),
        "A": Curves("tuned", {}, tuned("held-out"), curves(0.3)),
        "A (here)": Curves("tuned", {}, tuned("wide"), curves(0.25)),
    },
}  # fmt: skip


def test_the_best_baselines_of_the_very_test_are_shown():
    assert list(_shown("held-out", TESTS["held-out"], 20)) == ["learned", "B", "D", "C"]
    shown = _shown("wide", TESTS["wide"], 20)
    assert list(shown) == ["learned", "A"]
    assert shown["A"][-1, 0] == 0.25
    assert BASELINES == 3


def test_a_panel_for_each_test(tmp_path):
    plot_tests(TESTS, 10, tmp_path / "tests.png")
    width, height = (int.from_bytes((tmp_path / "tests.png").read_bytes()[i : i + 4]) for i in (16, 20))
    assert width > 1.8 * height
