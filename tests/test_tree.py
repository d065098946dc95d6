from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from l2l_scale.tree import tree_detach, tree_leaves, tree_map, tree_unflatten, tree_where


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def nested(offset: float = 0.0) -> dict[str, object]:
    ones = torch.ones(3) + offset
    return {"z": (ones, [ones * 2]), "a": Pair(ones * 3, torch.ones(3, 2) + offset), "empty": ()}


def test_leaves_come_in_order_of_insertion() -> None:
    assert tree_leaves({"z": 1, "a": (2, [3, {"y": 4, "b": 5}]), "empty": ()}) == [1, 2, 3, 4, 5]


def test_map_pairs_leaves_by_key_and_keeps_containers() -> None:
    sums = tree_map(lambda a, b: a + b, {"z": Pair(1, 2), "a": [3]}, {"a": [30], "z": Pair(10, 20)})
    assert sums == {"z": Pair(11, 22), "a": [33]}
    assert isinstance(sums["z"], Pair)


def test_map_refuses_trees_of_another_structure() -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the message is torch's
        tree_map(lambda a, b: a, {"a": (1, 2)}, {"a": (1, 2, 3)})


def test_unflatten_inverts_leaves() -> None:
    tree = {"z": Pair(1, 2), "a": [3, ()], "k": 4}
    assert tree_unflatten(tree_leaves(tree), tree) == tree


def test_detach_cuts_every_leaf_and_copies_nothing() -> None:
    attached = tree_map(lambda leaf: leaf.requires_grad_() * 1, nested())
    detached = tree_detach(attached)
    for before, after in zip(tree_leaves(attached), tree_leaves(detached), strict=True):
        assert before.requires_grad
        assert not after.requires_grad
        assert after.data_ptr() == before.data_ptr()


def test_where_chooses_whole_slots_in_leaves_of_any_rank() -> None:
    mask = torch.tensor([True, False, True])
    chosen = tree_where(mask, nested(10.0), nested())
    for yes, no, got in zip(
        tree_leaves(nested(10.0)), tree_leaves(nested()), tree_leaves(chosen), strict=True
    ):
        assert torch.equal(got[mask], yes[mask])
        assert torch.equal(got[~mask], no[~mask])
