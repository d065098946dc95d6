"""The loop of kills, and what is said of it."""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from compare import damage, differences
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from starts import Ending, Kill, Setting, adopt_orphans, hidden, kill_descendants, meta_step, start, watch

from l2l_scale.cli import fit  # noqa: F401 - imported once, here, for all runs
from l2l_scale.training.checkpoints.shelf import has_checkpoint

WRITING = 0.5
"""The share of kills that wait for a checkpoint to be written."""
DELAYS = (1e-5, 3e-2)
"""Seconds after that, log-uniform."""
BEYOND = 1.25
"""Moments are drawn over what is left of a run's life, and so much more: some runs must get to their ends."""
STAGGER = 5e-3
"""With several ranks, half of the kills take their processes one by one, at most so many seconds apart."""
MAX_FAILURES = 5
"""Then it is enough."""


class Torture:
    """Kills runs.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.setting = Setting(args.ranks, args.actors, args.meta_steps, args.fresh)
        self.kills, self.keep = args.kills, args.out is not None
        self.random = random.Random(args.seed)
        self.folder = args.out or Path(tempfile.mkdtemp(prefix="l2l_torture_"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ray = Path(tempfile.mkdtemp(prefix="ray_"))
        self.counts: Counter[str] = Counter()
        self.differences: list[str] = []
        self.failures: list[str] = []
        self.life = math.inf
        """Seconds that a run takes undisturbed,"""
        self.start_up = math.inf
        """and until its training begins."""
        self.console = Console(width=None if sys.stdout.isatty() else 110)

    def run(self) -> int:
        """Torture; the exit code."""
        adopt_orphans()
        torch.set_num_threads(1)
        random.seed(self.random.random())
        os.environ["RAY_TMPDIR"] = str(self.ray)
        try:
            if self._straight():
                left = TimeRemainingColumn()
                columns = (TextColumn("kills"), BarColumn(), MofNCompleteColumn(), TextColumn("left:"), left)
                # Without the thread that would refresh it: this process forks.
                with Progress(*columns, console=self.console, auto_refresh=False, transient=True) as progress:
                    bar = progress.add_task("", total=self.kills)
                    self._kill_runs(lambda: self._show(progress, bar))
        finally:
            kill_descendants()  # after Ctrl-C
            shutil.rmtree(self.ray, ignore_errors=True)
        return self._report()

    def _straight(self) -> bool:
        """Train undisturbed, twice: what differs then is not the kills' doing. Whether that worked."""
        one, two = (self.folder / name for name in ("undisturbed", "undisturbed-again"))
        for folder in (one, two):
            ending = self._start(folder, None, resumes=False, limit=600)
            if ending.code != 0:
                return False
            self.life = min(self.life, ending.seconds)
            first = (folder / "config.yaml").stat().st_mtime  # it is written when training begins
            self.start_up = min(self.start_up, ending.seconds - (folder / "run.json").stat().st_mtime + first)
        if found := differences(one, two):
            self._fail(f"two undisturbed runs, {one} and {two}, differ in {', '.join(found)}")
            return False
        text = f"undisturbed, a run takes {self.life:.1f} s, {self.start_up:.1f} s of them to start"
        self.console.print(text, highlight=False)
        return True

    def _kill_runs(self, show: Callable[[], None]) -> None:
        """Runs, one after the other, until there were enough kills and the last run has finished."""
        number = 0
        while self.counts["kills"] < self.kills and len(self.failures) < MAX_FAILURES:
            number += 1
            folder, failures = self.folder / f"run-{number}", len(self.failures)
            while not self._go_on(folder) and len(self.failures) == failures:
                show()
            if len(self.failures) == failures:
                self._compare(folder)

    def _go_on(self, folder: Path) -> bool:
        """Start a run again; whether it got to its end."""
        checkpoints = folder / "checkpoints"
        kill = self._draw(meta_step(checkpoints)) if self.counts["kills"] < self.kills else None
        before, resumes = hidden(checkpoints), has_checkpoint(checkpoints)
        ending = self._start(folder, kill, resumes=True, limit=60 + 10 * self.life)
        shutil.rmtree(self.ray / "ray", ignore_errors=True)
        text = self._log(folder).read_text(errors="replace")
        self.counts["starts"] += 1
        self.counts["started from a checkpoint"] += resumes
        self.counts["fallbacks to an older one"] += "which is whole" in text
        if ending.killed and kill is not None:
            left = hidden(checkpoints).items() - before.items()
            self._count(text, [name for name, _ in left])
            for problem in damage(checkpoints):
                self._fail(f"after kill {self.counts['kills']}: {problem}")
        return ending.code == 0 and not ending.killed

    def _start(self, folder: Path, kill: Kill | None, resumes: bool, limit: float) -> Ending:
        """Start, and wait or kill."""
        log = self._log(folder)
        log.unlink(missing_ok=True)
        leader = start(self.setting.arguments(folder, resumes), self.setting, log)
        ending = watch(leader, folder / "checkpoints", kill, limit)
        if ending.killed and (kill is None or ending.seconds > limit):
            self._fail(f"{folder} did not end within {limit:.0f} s; what it said: {log}")
        elif not ending.killed and ending.code != 0:
            self._fail(f"{folder} ended with code {ending.code}; what it said: {log}")
        elif ending.left:
            self._fail(f"{folder}: {ending.left} processes were left when it had ended")
        return ending

    def _log(self, folder: Path) -> Path:
        """What the last start of a run said."""
        return folder.with_name(f"{folder.name}.log")

    def _draw(self, done: int) -> Kill:
        """A moment in what is left of a run's life after so many meta-steps.

        In training it is told by progress, not by time: the machine may be busy with other things.
        """
        draw, per_step = self.random, (self.life - self.start_up) / self.setting.meta_steps
        left = self.start_up + per_step * (self.setting.meta_steps - done)
        moment = draw.uniform(0, BEYOND * left)
        writing = draw.random() < WRITING
        delay = math.exp(draw.uniform(*map(math.log, DELAYS)))
        stagger = STAGGER * (self.setting.ranks > 1 and draw.random() < 0.5)
        if moment < self.start_up:
            return Kill(moment, 0, writing, delay, stagger)
        step = done + (moment - self.start_up) / per_step
        delay = delay if writing else draw.uniform(0, 3 * per_step)  # checkpoints are three meta-steps apart
        return Kill(0.0, math.ceil(step), writing, delay, stagger)

    def _count(self, text: str, left: list[str]) -> None:
        """Take note of a kill: what the run had said, what it left hidden."""
        self.counts["kills"] += 1
        ended, trained = "meta-training took" in text, "run folder" in text
        phase = "writing" if left else "end" if ended else "training" if trained else "start-up"
        self.counts[phase] += 1
        self.counts["left a draft"] += any(name.endswith(".draft") for name in left)
        self.counts["left a checkpoint aside"] += any(name.endswith(".old") for name in left)

    def _compare(self, folder: Path) -> None:
        """Compare a finished run; delete it if there is nothing to see."""
        self.counts["runs finished"] += 1
        found = differences(self.folder / "undisturbed", folder)
        self.differences += found
        if found:
            self.console.print(f"{folder} differs in {', '.join(found)}", highlight=False, soft_wrap=True)
        elif not self.keep:
            shutil.rmtree(folder)
            self._log(folder).unlink()

    def _fail(self, text: str) -> None:
        self.failures.append(text)
        self.console.print(f"failure: {text}", markup=False, highlight=False, soft_wrap=True)

    def _show(self, progress: Progress, bar: object) -> None:
        """Progress, and a line now and then where there is no terminal."""
        progress.update(bar, completed=min(self.counts["kills"], self.kills), refresh=True)  # type: ignore[arg-type]
        if not self.console.is_terminal and self.counts["kills"] % 20 == 0:
            left = progress.tasks[0].time_remaining
            runs = f"{self.counts['runs finished']} runs finished"
            text = f"{self.counts['kills']} of {self.kills} kills, {runs}, {left or 0:.0f} s left"
            self.console.print(text, highlight=False)

    def _report(self) -> int:
        """Print the table, and the last line; the exit code."""
        counts, table = self.counts, Table(box=None, show_header=False)
        phases = [f"{counts[name]} in {name}" for name in ("start-up", "training", "writing")]
        table.add_row("kills", ", ".join(phases) + f", {counts['end']} after training")
        asides = counts["left a checkpoint aside"]
        table.add_row("left half done", f"{counts['left a draft']} drafts, {asides} checkpoints put aside")
        for name in ("runs finished", "starts", "started from a checkpoint", "fallbacks to an older one"):
            table.add_row(name, str(counts[name]))
        table.add_row("failures", str(len(self.failures)))
        self.console.print(table, highlight=False)
        bad = bool(self.failures or self.differences)
        if bad or self.keep:
            self.console.print(f"the runs are in {self.folder}", highlight=False, soft_wrap=True)
        else:
            shutil.rmtree(self.folder)
        print(f"{counts['kills']} kills, {len(self.differences)} differences")
        return int(bad)
