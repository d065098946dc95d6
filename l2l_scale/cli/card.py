"""A run as a folder that can be shared: rule, configuration, reports, and a model card made of them."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import Any

import yaml

from l2l_scale.deploy import read_header
from l2l_scale.deploy.pretrained import CARD, CONFIG, REPORTS, RULE
from l2l_scale.evaluation.markdown import summary
from l2l_scale.evaluation.schema import Report
from l2l_scale.evaluation.tables import verdict
from l2l_scale.files import write_atomically
from l2l_scale.run_record import RunRecord, read_record

HEADLINE = "**In one line:** "
FRONT = {
    "license": "apache-2.0",
    "library_name": "l2l_scale",
    "tags": ["learned-optimizer", "meta-learning", "optimization"],
}


def pack(run: Path, out: Path, name: str | None = None) -> Path:
    """Make a rule's folder (see :mod:`l2l_scale.deploy.pretrained`) of a run.

    Args:
        run: a run folder with a rule and at least one report below it.
        out: the folder to write; what a rule's folder holds is replaced there.
        name: of the rule; the folder's name if not given.

    Returns:
        The model card.

    Raises:
        FileNotFoundError: if the run has no rule, or was not evaluated.
    """
    sources = {_title(path, run): path for path in sorted(run.rglob("report.json"))}
    if not (run / RULE).is_file():
        raise FileNotFoundError(f"there is no {RULE} in {run}; is it a run folder that is finished?")
    if not sources:
        raise FileNotFoundError(f"there is no report below {run}; run l2l-scale evaluate -c {run / CONFIG}")
    reports: dict[str, Report] = {
        title: json.loads(path.read_text(encoding="utf-8")) for title, path in sources.items()
    }
    shutil.rmtree(out / REPORTS, ignore_errors=True)
    (out / REPORTS).mkdir(parents=True)
    for title, path in sources.items():
        shutil.copyfile(path, out / REPORTS / f"{title.replace(' ', '-').replace('/', '-')}.json")
    shutil.copyfile(run / RULE, out / RULE)
    config = _without_paths(yaml.safe_load((run / CONFIG).read_text(encoding="utf-8")))
    (out / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    text = card(name or out.resolve().name, read_header(run / RULE), config, read_record(run), reports)
    write_atomically(out / CARD, text.encode())
    return out / CARD


def card(
    name: str, header: dict[str, Any], config: dict[str, Any], record: RunRecord, reports: dict[str, Report]
) -> str:
    """The model card: use, training, figures with what is not beaten, and how to train it again."""
    front = yaml.safe_dump(FRONT, sort_keys=False).strip()
    summaries = {title: summary(report) for title, report in reports.items()}
    first = next(iter(reports.values()))
    notes, data, took = header["metadata"], config["data"], record["seconds"]
    parts = [
        f"---\n{front}\n---\n\n# {name}",
        HEADLINE + _headline(reports),
        f'```python\noptimizer = LearnedOptimizer(model.parameters(), "{name}")\n```',
        f"## Training\n\n- rule: `{header['rule']['class']}`, best in validation after {notes['meta_steps']} "
        f"of {record['max_steps']} meta-steps; seed {config['seed_everything']}"
        f"\n- family: `{notes['family']}`"
        f"\n- slots {data['slots']}, windows of {data['window']} of {data['horizon']} inner steps, "
        f"curriculum `{data.get('curriculum')}`"
        f"\n- {took:.0f} s on {_threads(config)} of {platform.machine()} beside other work, "
        f"l2l_scale {header['l2l_scale']}, torch {first['versions']['torch']}"
        f"\n- again: `l2l-scale reproduce {name}`",
        "## Figures\n\nAll on tasks that neither meta-training nor tuning saw; baselines were tuned on other "
        "tasks of the first test, and those marked “(here)” on other tasks of the test that they are in. The "
        "numbers are in `reports/`.",
        *(f"### {title}\n\n{text}" for title, text in summaries.items()),
        "## Licence\n\nApache-2.0, as the package. The data sets named above have licences of their own, and "
        "are not part of the rule.",
    ]
    return "\n\n".join(parts) + "\n"


def _headline(reports: dict[str, Report]) -> str:
    """What the first report says first of the test on the family of meta-training."""
    title, report = next(iter(reports.items()))
    whole = verdict(next(iter(report["tests"].values())), report["horizon"])
    return f"{title}: {whole.partition(' Not beaten')[0]}"


def _title(path: Path, run: Path) -> str:
    """How a report is called: by the folders that it lies in."""
    return " ".join(path.relative_to(run).parent.parts)


def _threads(config: dict[str, Any]) -> str:
    threads = config.get("threads")
    return "all cores" if threads is None else f"{threads} core{'s' if threads > 1 else ''}"


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what belongs to one machine: folders of runs and of the cache."""
    config["run_dir"] = None
    config["checkpoint"]["dirpath"] = None
    config["evaluation"]["cache_folder"] = None
    return config
