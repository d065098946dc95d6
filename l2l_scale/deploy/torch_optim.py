"""A learned rule as a ``torch.optim.Optimizer``.

All coordinates of a parameter group are one problem with a flat axis of N coordinates, in the order of
the group's parameters. The rule is called on (1, N), the shape of a rollout with one slot: so a deployed step
does the very operations of training, and not their likes in another shape, which may round differently.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from l2l_scale.checks import check_positive
from l2l_scale.deploy.coordinates import Layout, flatten, gradient_of, layout_of, mask, read, write
from l2l_scale.deploy.files import load_rule
from l2l_scale.deploy.guard import Guard, Watch, look
from l2l_scale.deploy.kinds import KINDS, bind, guess_kinds, is_grouped
from l2l_scale.deploy.optimizer_state import Window, fitted, key_of
from l2l_scale.optimizers.backend import Backend, accelerate, check_backend, check_fusable
from l2l_scale.optimizers.base import UpdateRule
from l2l_scale.optimizers.network_rule import NetworkRule
from l2l_scale.tree import Tree, tree_leaves, tree_map, tree_unflatten


class LearnedOptimizer(torch.optim.Optimizer):
    """Trains a model with a learned (or any other) update rule: θ ← θ + lr · update.

    The rule is copied and frozen. It works in float32 for parameters of lower precision, which then have a
    float32 master copy in the optimizer's state: small updates add up instead of being rounded away. It
    works in float64 if any parameter of the group is float64.

    A rule with several groups (:class:`~l2l_scale.optimizers.Grouped`) tells them apart by kinds and names of
    parameters. :func:`~l2l_scale.deploy.parameter_groups` says exactly what they are in a model; named
    parameters give their names; and what is not known is guessed from the number of dimensions.

    Parameters without a gradient are left exactly as they are (the rule sees a zero gradient there); a
    group in which none has a gradient is skipped.

    Args:
        params: as for every torch optimizer: tensors, named tensors, or groups of them with their own ``lr``.
        rule: a rule, the path of a rule file, or the name of a rule that comes with the package, such as
            "general-lstm".
        lr: factor on the update; learning-rate schedulers change it. Learned rules know their own step
            sizes, so it is 1 unless there is a reason.
        backend: how the rule is computed, see :data:`l2l_scale.optimizers.backend.Backend`.
        guard: goes back and on with smaller steps where the rule runs away on a problem that it does not
            know, see :class:`~l2l_scale.deploy.Guard`; True is one with its defaults, False none. If not
            given, there is one for learned rules on a CPU, where it costs next to nothing (on a GPU it waits
            for four numbers in every step), unless they have safeguards of their own.

    Raises:
        FileNotFoundError: if the rule file does not exist.
        ValueError: if there are no parameters, a parameter is complex or of integers, a group lies on several
            devices, lr is negative or not finite, the rule is none or has no pattern for a parameter,
            or the backend cannot compute it; later, if the precision is not the backend's, or a gradient is
            sparse.
    """

    def __init__(
        self,
        params: ParamsT,
        rule: UpdateRule | str | Path,
        lr: float = 1.0,
        backend: Backend = "auto",
        guard: Guard | bool | None = None,
    ) -> None:
        check_backend(backend)
        if not isinstance(guard, (Guard, bool, type(None))):
            raise ValueError(f"guard ({guard!r}) must be a Guard, True, False or None")
        loaded = load_rule(rule) if isinstance(rule, (str, Path)) else rule
        if not isinstance(loaded, UpdateRule):
            raise ValueError(f"rule ({type(rule).__name__}) must be an UpdateRule or the path of a rule file")
        if backend in ("fused", "fused-bf16"):
            check_fusable(loaded)  # now rather than at the first step
        self.state: defaultdict[Any, Any]
        if isinstance(loaded, NetworkRule):
            loaded = loaded.for_one_group()  # a parameter group is a problem here, whatever it was bound to
        self.rule = copy.deepcopy(loaded).requires_grad_(False).eval()
        self.backend, self.guard = backend, guard
        self._forget_derived()
        super().__init__(params, {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; they are a problem of their own.

        Raises:
            ValueError: as the class says; the optimizer is then as before.
        """
        super().add_param_group(param_group)
        added = self.param_groups.pop()
        check_positive("lr", added["lr"], zero=True)
        if added["params"]:
            layout_of(added["params"])
            if self._grouped:  # what it is guessed to be now, it is in every state dict
                added.setdefault(KINDS, guess_kinds(added["params"], added.get("param_names", ())))
                bind(self.rule, added)
        self.param_groups.append(added)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Apply the rule once to every group.

        Args:
            closure: computes the loss and its gradients first, if given.

        Returns:
            The closure's loss.

        Raises:
            ValueError: if a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            if any(param.grad is not None for param in group["params"]):
                self._step_group(key_of(index), group, loss)
        return loss

    @property
    def alarms(self) -> int:
        """How often a guard went back so far, over all groups."""
        return sum(entry["guard"]["alarms"] for entry in self.state.values() if "guard" in entry)

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's. Read it here, not in ``state``, where it lies in the form of the steps."""
        self._close_windows()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._close_windows()
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _KEPT}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a state: the one door of ``load_state_dict``, pickle and deepcopy.

        Raises:
            ValueError: if the state is of another rule or of other parameters; nothing has changed then.
        """
        # load_state_dict passes neither rule nor backend nor guard
        state = {**{name: self.__dict__.get(name) for name in _KEPT}, **state}
        state_of_rule = fitted(state["state"], state["param_groups"], state["rule"])
        super().__setstate__({**state, "state": state_of_rule})
        self._forget_derived()

    def _forget_derived(self) -> None:
        """Start the caches: copies of the rule, and the structures of the rule's states."""
        self._copies: dict[tuple[Layout, str], UpdateRule] = {}
        self._structures: dict[str, Tree] = {}
        self._windows: dict[str, Window] = {}
        self._grouped = is_grouped(self.rule)

    def _step_group(self, key: str, group: Mapping[str, Any], loss: float | None) -> None:
        """One inner step on one problem."""
        params: Sequence[Tensor] = group["params"]
        layout = layout_of(params)
        rule = self._rule_for(key, group, layout)
        grad = flatten([gradient_of(param) for param in params], layout.dtype)
        theta = read(params, layout.dtype, self.state[key].get("theta"))
        watch = self._watch(key, layout, theta)
        with torch.autocast(layout.device.type, enabled=False):
            update, state = rule(grad, theta, self._open_window(key, rule, theta))
        _check_update(rule, update, theta)
        back = None if watch is None else look(watch, theta, grad, update, loss)
        if back is not None:
            theta, state = back, rule.open_window(back, rule.init_state(back))
        else:
            step = mask((group["lr"] if watch is None else group["lr"] * watch.scale) * update, params)
            theta = theta + step
            if watch is not None:
                watch.step = step
        write(theta, params)
        self._windows[key] = Window(rule, theta, state)
        self.state[key] = {"rule": type(self.rule).__name__}
        if watch is not None:
            self.state[key]["guard"] = watch.state()
        if any(param.dtype != layout.dtype for param in params):
            self.state[key]["theta"] = theta  # the master copy

    def _watch(self, key: str, layout: Layout, theta: Tensor) -> Watch | None:
        """What the guard knows of a group, if there is one."""
        guard = self.guard
        if guard is None:
            known = not self.rule.safeguarded and any(True for _ in self.rule.parameters())
            guard = known and layout.device.type == "cpu"
        if guard is False:
            return None
        guard = Guard() if guard is True else guard
        kept = self.state[key].get("guard")
        return Watch.at(guard, theta) if kept is None else Watch(guard, **kept)

    def _rule_for(self, key: str, group: Mapping[str, Any], layout: Layout) -> UpdateRule:
        """The rule for a group on its device, in the precision that it works in there."""
        wanted = layout, key if self._grouped else ""  # others are the same for all groups
        if wanted not in self._copies:
            own = bind(copy.deepcopy(self.rule).to(layout.device, layout.dtype), group)
            self._copies[wanted] = accelerate(own, self.backend, layout.device, layout.dtype).rule
        return self._copies[wanted]

    def _open_window(self, key: str, rule: UpdateRule, theta: Tensor) -> Tree:
        """The rule's state for a group in the form that steps work in; it stays in it from step to step."""
        if key in self._windows and self._windows[key].rule is not rule:  # the parameters were moved
            self._close_windows()
        if key not in self._windows:
            return rule.open_window(theta, self._rule_state(key, rule, theta))
        return self._windows[key].state

    def _close_windows(self) -> None:
        """Put the rule's states into ``state``, as plain tensors."""
        for key, window in self._windows.items():
            closed = window.rule.close_window(window.theta, window.state)
            self.state[key]["leaves"] = tree_leaves(closed)
        self._windows.clear()

    def _rule_state(self, key: str, rule: UpdateRule, theta: Tensor) -> Tree:
        """The rule's state for a group as the tree that the rule knows; a new one before the first step."""
        if key not in self._structures:
            fresh = rule.init_state(theta)
            self._structures[key] = tree_map(lambda leaf: None, fresh)
            if not self.state[key]:
                return fresh
        return tree_unflatten(self.state[key]["leaves"], self._structures[key])


_KEPT = ("rule", "backend", "guard")
"""What is the optimizer's own, besides what torch keeps."""


def _check_update(rule: UpdateRule, update: Tensor, theta: Tensor) -> None:
    if update.shape != theta.shape:
        raise ValueError(
            f"{type(rule).__name__} gave an update of shape {tuple(update.shape)} for one problem of shape "
            f"{tuple(theta.shape)}; a rule in use needs single hyper-parameters, not one value per slot"
        )
