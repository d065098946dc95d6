"""The Lightning module that meta-trains any rule on any task family with any estimator."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from l2l_scale.checks import check_count, check_positive, check_range
from l2l_scale.deploy import describe_rule, take_over
from l2l_scale.estimators import GradientEstimator, TruncatedBPTT
from l2l_scale.evaluation.curves import stay_astray
from l2l_scale.optimizers import UpdateRule
from l2l_scale.optimizers.backend import Accelerated, Backend, accelerate, check_backend
from l2l_scale.rng import Split
from l2l_scale.sampling import Batch, WindowLoader
from l2l_scale.tasks import CompiledFamily, MixedPrecision, Mixture, TaskFamily
from l2l_scale.training.checkpoints import inflight
from l2l_scale.training.data import WindowData
from l2l_scale.training.meta_optimizer import adam_along_a_cosine
from l2l_scale.training.precision import check_precision, full_precision
from l2l_scale.training.ranks import all_slots, check_same_phi, most_of_all_ranks, world_size
from l2l_scale.training.step_output import StepOutput
from l2l_scale.training.validation import validation_metrics
from l2l_scale.tree import tree_detach
from l2l_scale.unroll import Carry, InnerGradient, Rollout, WindowBatch, begin, unroll


class MetaTraining(L.LightningModule):
    """Meta-training: one batch is one window, one window is one meta-step on φ.

    Args:
        rule: the update rule to be trained.
        family: the tasks that it is trained on, or a mixture of several families.
        estimator: of the meta-gradient; first-order truncated BPTT if not given.
        learning_rate: of Adam on φ.
        final_fraction: share of the learning rate that is left at the last meta-step; it falls along a
            cosine. 1 keeps it constant.
        backend: how the rule's steps are computed, see :data:`l2l_scale.optimizers.backend.Backend`.
        divergence_patience: stop with an error after so many windows in a row in which every slot diverged or
            the meta-loss was not finite.
        compile_tasks: compute the losses and gradients of the training tasks with ``torch.compile``; in first
            order only, see :class:`~l2l_scale.tasks.CompiledFamily`.
        start_from: φ to begin with instead of random ones: a rule file, or a pretrained rule's name. The rule
            must be of its form; of grouped rules each may be, and all then begin with the same φ.

    Raises:
        FileNotFoundError: if there is no such rule.
        ValueError: if a number is out of range, tasks are to be compiled in second order, or the rule is of
            another form than the one to start from.
    """

    def __init__(
        self,
        rule: UpdateRule,
        family: TaskFamily | Mixture,
        estimator: GradientEstimator | None = None,
        learning_rate: float = 3e-3,
        final_fraction: float = 0.03,
        backend: Backend = "auto",
        divergence_patience: int = 20,
        compile_tasks: bool = False,
        start_from: str | None = None,
    ) -> None:
        super().__init__()
        check_positive("learning_rate", learning_rate)
        check_count("divergence_patience", divergence_patience)
        check_range("final_fraction", final_fraction, 0, 1)
        check_backend(backend)
        self.rule = rule
        self.source, self.mixture = family, Mixture.of(family)
        self.families: dict[str, TaskFamily] = dict(self.mixture.for_split(Split.TRAIN).families)
        if compile_tasks:
            self.families = {name: CompiledFamily(one) for name, one in self.families.items()}
        self.valid_families: dict[str, TaskFamily] = dict(self.mixture.for_split(Split.VALID).families)
        self.estimator = TruncatedBPTT() if estimator is None else estimator
        if compile_tasks and isinstance(self.estimator, TruncatedBPTT) and self.estimator.second_order:
            raise ValueError(
                "compile_tasks (True) must be False with second_order: torch.compile cannot differentiate "
                "twice. Leave out one of the two"
            )
        self.learning_rate, self.final_fraction = learning_rate, final_fraction
        self.backend, self.divergence_patience = backend, divergence_patience
        self.accelerated = {name: Accelerated(rule, "eager") for name in self.families}
        # In-flight state by family. Not buffers: DDP would overwrite every rank's slots with those of rank 0.
        self.carries: dict[str, Carry] = {}
        self.next_window = 0
        self.windows_lost = 0
        self.num_diverged = 0
        self.num_skipped = 0
        self.grad_norm = torch.tensor(torch.nan)
        self.valid_carry: Carry | None = None
        self.valid_losses: dict[str, list[Tensor]] = {}

        if start_from is not None:
            take_over(rule, start_from)
        describe_rule(rule)  # a rule that no file can describe is refused now, not at the first checkpoint

    def setup(self, stage: str) -> None:
        """Refuse what cannot work, before anything is computed; let tasks be computed in mixed precision.

        Raises:
            ValueError: for a precision that loses what is learned from, or a meta-loss for another horizon.
        """
        check_precision(self.trainer.precision)
        if self.trainer.precision == "bf16-mixed":
            for families in (self.families, self.valid_families):
                for name, family in families.items():
                    if not isinstance(family, MixedPrecision):
                        families[name] = MixedPrecision(family)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, WindowData):
            self.estimator.check_horizons(data.schedule.horizons)
            self.estimator.check_teacher(frozenset() if data.teacher is None else data.teacher.gives)

    def on_fit_start(self) -> None:
        """Put resident data on the device, and choose how the rule is computed there."""
        dtype = torch.float64 if self.trainer.precision == "64-true" else torch.float32
        for name, family in self.families.items():
            family.prepare(self.device)
            self.valid_families[name].prepare(self.device)
            rule = self.rule.for_spec(family.spec)
            self.accelerated[name] = accelerate(rule, self.backend, self.device, dtype)
            self.estimator.check_rule(self.accelerated[name].rule)

    def on_train_start(self) -> None:
        """Go on with the window that comes next; Lightning forgets the loader's place after a last epoch."""
        loader = self.trainer.train_dataloader
        if isinstance(loader, WindowLoader):
            loader.next_index = self.next_window

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Unroll one window of every family; Lightning does the backward pass and the meta-step."""
        with full_precision(self.device):
            surrogates, outputs = zip(*(self._train_seat(*seat) for seat in batch), strict=True)
        surrogate = torch.stack(surrogates).sum()
        self.next_window = batch[0].window.window_index + 1
        diverged = [int(output.diverged.sum()) for output in outputs]
        self.num_diverged += sum(diverged)
        all_lost = sum(diverged) == sum(len(output.diverged) for output in outputs)
        lost = all_lost or not bool(surrogate.isfinite())
        self.windows_lost = self.windows_lost + 1 if lost else 0
        if world_size() == 1:  # else at the next validation: the others must not be left waiting
            self._stop_if_lost(self.windows_lost)
        return {"loss": surrogate, "windows": outputs}

    def _train_seat(self, name: str, weight: float, window: WindowBatch) -> tuple[Tensor, StepOutput]:
        """Unroll the slots of one family; their contribution to the meta-loss, and what they did."""
        assert window.window_index == self.next_window, (window.window_index, self.next_window)
        rule, family = self.accelerated[name].rule, self.families[name]
        # Taken out: with large optimizees the old state must not be held beside the new one.
        carry = begin(rule, window, self.carries.pop(name, None))
        estimate = self.estimator(rule, family, carry, window)
        rollout: Rollout = tree_detach(estimate.rollout)
        self.carries[name], diverged = rollout.carry, rollout.carry.diverged
        output = StepOutput(name, rollout.losses, window.inner_step, diverged, rollout.update_rms)
        return weight * estimate.surrogate, output

    def rehearse(self, batch: Batch) -> None:
        """Compute a window and its meta-gradient, and leave no trace: to learn how long it takes."""
        params = [param for param in self.parameters() if param.requires_grad]
        with full_precision(self.device):
            for name, weight, window in batch:
                rule = self.accelerated[name].rule
                estimate = self.estimator(rule, self.families[name], begin(rule, window, None), window)
                # Not backward(), which would set DDP's exchange of gradients off.
                torch.autograd.grad(weight * estimate.surrogate, params, allow_unused=True)

    def _stop_if_lost(self, windows: int) -> None:
        """Give a run up in which nothing is learned any more."""
        if windows >= self.divergence_patience:
            raise DivergedError(
                f"every task diverged, or the meta-loss was not finite, in each of the last "
                f"{windows} windows, so nothing can be learned. Make the first updates smaller "
                "(rule: output_scale or the head's scale), the window shorter (data.window) or the "
                "meta-learning rate lower (model.learning_rate); LogLoss needs losses that are not negative"
            )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop a gradient that is not finite, so that φ never becomes NaN."""
        grads = [param.grad for param in self.parameters() if param.grad is not None]
        self.grad_norm = torch.nn.utils.get_total_norm(grads)
        if not self.grad_norm.isfinite():
            self.num_skipped += 1
            for param in self.parameters():
                param.grad = None  # Adam leaves such parameters and their moments alone

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam on φ, its learning rate falling along a cosine over the run."""
        return adam_along_a_cosine(
            self.parameters(), self.learning_rate, self.final_fraction, self.trainer.max_steps
        )

    def on_validation_epoch_start(self) -> None:
        """Collective. Start all validation trajectories afresh, on all ranks with the same φ or on none."""
        self._stop_if_lost(most_of_all_ranks(self, self.windows_lost))
        self.valid_carry, self.valid_losses = None, {}
        check_same_phi(self)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """One window of the held-out tasks of one family; what diverged stays astray."""
        ((name, _, window),) = batch
        carry = None if window.window_index == 0 else self.valid_carry
        rule, family = self.accelerated[name].rule, self.valid_families[name]
        carry = begin(rule, window, carry, restart_diverged=False)
        with full_precision(self.device):
            rollout = unroll(rule, family, carry, window, InnerGradient.NONE)
        self.valid_carry = rollout.carry
        self.valid_losses.setdefault(name, []).append(rollout.losses)

    def on_validation_epoch_end(self) -> None:
        """Collective. Log what the trajectories of the held-out tasks of all ranks came to."""
        curves = {
            name: stay_astray(all_slots(self, torch.cat(windows)))
            for name, windows in self.valid_losses.items()
        }
        self.valid_carry, self.valid_losses = None, {}  # large optimizees: not beside the next windows
        self.log("step", float(self.global_step))  # Lightning's own count is one off in a resumed run
        for name, value in validation_metrics(curves, self.mixture.weights).items():
            self.log(name, value, prog_bar=name == "valid/final")

    def describe(self) -> dict[str, Any]:
        """What a run can only be resumed with, besides the rule and the data."""
        return {
            "learning_rate": self.learning_rate,
            "final_fraction": self.final_fraction,
            "estimator": inflight.settings_of(self.estimator),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what this rank has in flight, and what the run is."""
        inflight.save(checkpoint, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the in-flight state again; a checkpoint of another rule is refused."""
        inflight.load(checkpoint, self)


class DivergedError(RuntimeError):
    """Every task of the run diverges."""
