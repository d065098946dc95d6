"""Runs that are stopped: by signals, by a time limit; and where they go on."""

import os
import signal

import pytest
from lightning.pytorch.callbacks import Callback
from test_checkpoints import content, differences, fit

from l2l_scale.training import Reason, Stopped, preemption
from l2l_scale.training.preemption import Interruption


class Send(Callback):
    """Sends this process a signal in the middle of a window."""

    def __init__(self, number, window):
        self.number, self.window = number, window

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if module.next_window - 1 == self.window:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("window", [1, 3, 4])  # in the middle, and around the end of an epoch
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_stops_at_the_window_boundary_and_nothing_is_lost(tmp_path, number, window, capsys):
    before = {one: signal.getsignal(one) for one in preemption.SIGNALS}
    quiet = {"every_n_meta_steps": None, "every_seconds": 1e9}
    fit(tmp_path / "straight", 8, **quiet)
    with pytest.raises(Stopped) as stopped:
        fit(tmp_path / "parts", 8, callbacks=[Send(number, window)], **quiet)
    assert stopped.value.reason is preemption.SIGNALS[number]
    assert signal.getsignal(signal.SIGINT) == before[signal.SIGINT]
    for one in (signal.SIGTERM, signal.SIGUSR1):  # which would kill it before it has said what comes next
        assert signal.getsignal(one) == signal.SIG_IGN
        signal.signal(one, before[one])
    checkpoints = tmp_path / "parts" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == [f"step-{window + 1:08d}"]
    assert str(stopped.value) == (
        f"stopped by {stopped.value.reason.text}; saved as {checkpoints / f'step-{window + 1:08d}'}"
    )
    fit(tmp_path / "parts", 8, checkpoints / "last", **quiet)
    assert {one: signal.getsignal(one) for one in preemption.SIGNALS} == before
    end = "checkpoints/step-00000008"
    assert differences(tmp_path / "straight" / end, tmp_path / "parts" / end) == []
    assert any(name.endswith("value") for name in content(tmp_path / "parts" / end))  # the best is among them


def test_without_heed_signals_are_left_to_others(tmp_path):
    noted = []
    before = signal.signal(signal.SIGUSR1, lambda *_: noted.append(1))
    try:
        fit(tmp_path, 4, callbacks=[Send(signal.SIGUSR1, 1)], heed_signals=False)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert noted == [1]


def test_a_second_ctrl_c_ends_at_once_and_the_most_urgent_reason_counts(capsys):
    interruption = Interruption()
    interruption.install()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.reason(0) is Reason.INTERRUPT
        assert "Ctrl-C again ends at once" in capsys.readouterr().out
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interruption.reason(0) is Reason.TERM
    finally:
        interruption.restore()


class Job:
    """A job of SLURM that ends when the test says so."""

    def __init__(self, ends_at):
        self.ends_at, self.asked = ends_at, 0

    def end_time(self):
        self.asked += 1
        return self.ends_at


@pytest.fixture
def clock(monkeypatch):
    """The time, in a list, to be set."""
    now = [1000.0]
    monkeypatch.setattr(preemption.time, "time", lambda: now[0])
    return now


def test_a_time_limit_is_respected_without_a_signal(clock):
    job = Job(2000.0)
    interruption = Interruption(job)

    def reason_at(now):
        clock[0] = now
        return interruption.reason(seconds_to_save=5.0)

    for now in (1000, 1010, 1110, 1120):  # the longest way between boundaries, with a validation, is 100 s
        assert reason_at(now) is Reason.NONE
    needed = 1.5 * 100 + 2 * 5 + preemption.MARGIN
    assert reason_at(1210) is Reason.NONE
    assert reason_at(1310) is Reason.NONE
    job.ends_at = 1400.0 + needed  # made shorter; noticed within a minute, as SLURM is asked again
    assert reason_at(1399) is Reason.NONE
    job.ends_at = 1500.0 + needed  # extended in the last moment
    assert reason_at(1401) is Reason.NONE
    assert reason_at(1499) is Reason.NONE
    assert reason_at(1501) is Reason.TIME_LIMIT


def test_a_job_without_an_end_is_asked_once_a_minute(clock):
    interruption = Interruption(Job(None))
    for _ in range(100):
        clock[0] += 1.3
        assert interruption.reason(1.0) is Reason.NONE
    assert interruption.job.asked == 3


def test_the_time_limit_stops_a_run(tmp_path, monkeypatch):
    import time

    ends_at = time.time() + 10
    monkeypatch.setattr("l2l_scale.training.checkpoints.callback.SlurmJob.current", lambda: Job(ends_at))
    with pytest.raises(Stopped, match="stopped by the time limit"):
        fit(tmp_path, 4)
    assert (tmp_path / "checkpoints" / "step-00000001").is_dir()
