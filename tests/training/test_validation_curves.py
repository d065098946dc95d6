import csv

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from l2l_scale.optimizers import CoordinatewiseLSTM
from l2l_scale.rng import Split
from l2l_scale.tasks import Quadratic
from l2l_scale.training import MetaTraining, ValidationCurves, WindowData, validation_curves
from l2l_scale.training.validation_curves import log_picture

FAMILY = Quadratic(dimension=3)


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn, in order; drawing itself takes a second and is tested with the evaluation."""
    pictures = []

    def draw(curves, horizon, title, subtitle, path):
        pictures.append((curves, horizon, title, path))

    monkeypatch.setattr(validation_curves, "plot_curves", draw)
    return pictures


def fit(folder, callbacks, max_steps=12, precision="32-true", logger=False, ckpt_path=None, **data):
    torch.manual_seed(0)
    module = MetaTraining(CoordinatewiseLSTM(hidden_size=4, layers=1), FAMILY)
    settings = {"horizon": 10, "window": 5, "slots": 4, "windows_per_epoch": 4, "valid_tasks": 8, **data}
    trainer = L.Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        accelerator="cpu",
        precision=precision,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        inference_mode=False,
        default_root_dir=folder,
        callbacks=callbacks,
    )
    trainer.fit(module, datamodule=WindowData(FAMILY, **settings), ckpt_path=ckpt_path)
    return module, trainer


def rows(folder, name):
    with (folder / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def test_curves_are_those_of_the_validation(tmp_path, drawn):
    logger = CSVLogger(tmp_path, name="", version="")
    fit(tmp_path, [ValidationCurves(every=2)], logger=logger)
    assert [title for _, _, title, _ in drawn] == [
        f"8 validation tasks, after {step} meta-steps" for step in (4, 12)
    ]
    assert {path for *_, path in drawn} == {tmp_path / "validation.png"}
    for step, (curves, horizon, *_) in zip((4, 12), drawn, strict=True):
        assert {"learned", "Adam", "heavy ball"} <= set(curves)
        assert all(entry.losses.shape == (horizon + 1, 8) for entry in curves.values())
        mine = float(curves["learned"].losses[1:].sum(0).mean())
        assert mine == pytest.approx(rows(tmp_path, "valid/sum")[step], rel=1e-5)
        sums = [float(e.losses[1:].sum(0).mean()) for n, e in curves.items() if n != "learned"]
        assert rows(tmp_path, "valid/best_tuned_sum")[step] == pytest.approx(min(sums))
        starts = torch.stack([entry.losses[0] for entry in curves.values()])
        assert torch.equal(starts, starts[:1].expand_as(starts))  # the same tasks


def test_training_is_not_changed(tmp_path, drawn):
    plain, _ = fit(tmp_path, [])
    watched, _ = fit(tmp_path, [ValidationCurves(every=1)])
    assert all(map(torch.equal, plain.parameters(), watched.parameters()))
    assert len(drawn) == 3


def test_draws_a_picture(tmp_path):
    fit(tmp_path / "new", [ValidationCurves(baselines=["SGD"])], max_steps=4)
    assert (tmp_path / "new" / "validation.png").read_bytes().startswith(b"\x89PNG")


def test_works_in_double_precision(tmp_path, drawn):
    fit(tmp_path, [ValidationCurves(baselines=["SGD"])], max_steps=4, precision="64-true")
    assert len(drawn) == 1


def test_a_resumed_run_draws_the_same_validations(tmp_path, drawn):
    fit(tmp_path, [ValidationCurves(["SGD"], every=2)], max_steps=24)
    straight = [title for _, _, title, _ in drawn]
    drawn.clear()
    _, trainer = fit(tmp_path, [ValidationCurves(["SGD"], every=2)], max_steps=4)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    fit(tmp_path, [ValidationCurves(["SGD"], every=2)], max_steps=24, ckpt_path=tmp_path / "x.ckpt")
    assert [title for _, _, title, _ in drawn] == straight


def test_baselines_are_tuned_on_other_tasks_for_the_horizon(tmp_path, drawn):
    callback = ValidationCurves(["SGD"], num_tuning_tasks=16)
    fit(tmp_path, [callback], max_steps=4, seed=5)
    (trial,) = callback.trials.values()
    assert (trial.tuning.split, trial.tuning.num_tasks, trial.tuning.inner_steps) == (Split.TUNE, 16, 10)
    assert (trial.held_out.split, trial.held_out.seed) == (Split.VALID, 5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"baselines": ["Adm"]}, r"baselines \('Adm'\) must be among"),
        ({"baselines": []}, r"baselines \(\[\]\) must name at least one"),
        ({"every": 0}, r"every \(0\) must be a whole number >= 1"),
        ({"num_tuning_tasks": 0}, r"num_tuning_tasks \(0\) must be a whole number >= 1"),
    ],
)
def test_mistakes_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        ValidationCurves(**arguments)


class Board(TensorBoardLogger):
    """Keeps pictures, without the library."""

    def __init__(self):
        self.pictures = []

    @property
    def experiment(self):
        return self

    def add_image(self, key, picture, step, dataformats):
        self.pictures.append((key, picture.shape, step, dataformats))


def test_pictures_go_to_tensorboard_too(tmp_path):
    from matplotlib.image import imsave

    imsave(tmp_path / "x.png", torch.zeros(3, 5, 3).numpy())
    board = Board()
    log_picture(board, "valid/curves", tmp_path / "x.png", 7)
    assert board.pictures == [("valid/curves", (3, 5, 4), 7, "HWC")]
    log_picture(CSVLogger(tmp_path), "valid/curves", tmp_path / "x.png", 7)  # takes none


def test_data_without_tasks_is_refused():
    class Other(L.LightningDataModule):
        pass

    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.datamodule = Other()
    with pytest.raises(ValueError, match="needs the tasks of a WindowData, but data is a Other"):
        validation_curves.window_data(trainer)
