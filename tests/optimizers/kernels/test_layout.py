"""The packed state: what lies where, and that nothing is lost."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from l2l_scale.optimizers import Concatenate, CoordinatewiseLSTM, LogSign, RNNprop
from l2l_scale.optimizers.kernels.layout import BLOCK, pack, unpack
from l2l_scale.optimizers.kernels.program import program_of
from l2l_scale.tree import Tree, tree_leaves, tree_map

SHAPES = [(1,), (31,), (32,), (33,), (257,), (1, 1), (3, 1), (32, 1), (1, 32), (3, 11), (5, 64), (2, 3, 7)]

every_shape = pytest.mark.parametrize("shape", SHAPES)


def example(shape: tuple[int, ...], hidden_size: int = 3) -> tuple[Tree, int]:
    """A state with every kind of leaf, filled with different numbers, and its number of rows."""
    rule = CoordinatewiseLSTM(hidden_size, features=Concatenate([LogSign(), RNNprop()]))
    numbers = torch.Generator().manual_seed(0)
    state = tree_map(
        lambda leaf: torch.randn(leaf.shape, generator=numbers), rule.init_state(torch.zeros(shape))
    )
    return state, program_of(rule).state_rows


def equal(a: Tree, b: Tree) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True))


def rows_of(state: Tree, shape: tuple[int, ...]) -> list[Tensor]:
    """The rows, each with one number for each of the M coordinates."""
    rows: list[Tensor] = []
    for leaf in tree_leaves(state):
        if leaf.dim() > len(shape):
            rows.extend(leaf[..., unit].reshape(-1) for unit in range(leaf.shape[-1]))
        else:
            rows.append(leaf.expand(shape).reshape(-1))
    return rows


@every_shape
@pytest.mark.parametrize("hidden_size", [1, 3])
def test_every_number_lies_where_the_layout_says(shape: tuple[int, ...], hidden_size: int) -> None:
    state, rows = example(shape, hidden_size)
    packed = pack(state, torch.Size(shape), rows)
    total = torch.Size(shape).numel()
    assert packed.shape == (-(-total // BLOCK), rows, BLOCK)
    assert packed.is_contiguous()
    expected = torch.zeros_like(packed)
    for (row, numbers), j in product(enumerate(rows_of(state, shape)), range(total)):
        expected[j // BLOCK, row, j % BLOCK] = numbers[j]
    assert torch.equal(packed, expected)  # lanes beyond the last coordinate are zero


@every_shape
@pytest.mark.parametrize("hidden_size", [1, 3])
def test_unpacking_gives_the_state_back(shape: tuple[int, ...], hidden_size: int) -> None:
    state, rows = example(shape, hidden_size)
    assert equal(unpack(pack(state, torch.Size(shape), rows), state, torch.Size(shape)), state)


def test_states_of_any_strides_are_packed_alike() -> None:
    state, rows = example((3, 40))
    strided = tree_map(lambda leaf: leaf.transpose(0, 1).contiguous().transpose(0, 1), state)
    assert not any(leaf.is_contiguous() for leaf in tree_leaves(strided) if leaf.shape[1] > 1)
    shape = torch.Size((3, 40))
    assert torch.equal(pack(strided, shape, rows), pack(state, shape, rows))


def test_the_packed_state_can_have_a_precision_of_its_own() -> None:
    state, rows = example((2, 20))
    packed = pack(state, torch.Size((2, 20)), rows, torch.bfloat16)
    assert packed.dtype == torch.bfloat16
    restored = unpack(packed, state, torch.Size((2, 20)))
    assert equal(restored, tree_map(lambda leaf: leaf.bfloat16().float(), state))


@pytest.mark.parametrize("shape", [(33,), (3, 40), (1, 5), (3, 1)])
def test_both_directions_are_differentiable(shape: tuple[int, ...]) -> None:
    state, rows = example(shape)
    state = tree_map(lambda leaf: leaf.double().requires_grad_(), state)
    size = torch.Size(shape)
    packed = pack(state, size, rows)
    adjoint = torch.randn(packed.shape, dtype=packed.dtype, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(packed, tree_leaves(state), adjoint)
    for leaf, grad, expected in zip(
        tree_leaves(state), grads, tree_leaves(unpack(adjoint, state, size)), strict=True
    ):
        if leaf.shape[-1] == 1 < shape[-1]:  # one number per problem lies in all its coordinates
            row = adjoint[:, 2].reshape(-1)[: size.numel()].view(shape)
            expected = row.sum(-1, keepdim=True)
            assert (grad - expected).abs().max() <= 1e-14 * row.abs().sum()
        else:
            assert torch.equal(grad, expected)
    packed = packed.detach().requires_grad_()
    adjoints = [torch.randn_like(leaf) for leaf in tree_leaves(state)]
    (grad,) = torch.autograd.grad(tree_leaves(unpack(packed, state, size)), packed, adjoints)
    restored = tree_leaves(unpack(grad, state, size))
    assert all(torch.equal(a, b) for a, b in zip(restored, adjoints, strict=True))
