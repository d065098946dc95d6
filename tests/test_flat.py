from __future__ import annotations

import pytest
import torch
from torch import nn

from l2l_scale.flat import FlatSpec, Segment, parameter_kind

SPEC = FlatSpec(
    (
        Segment("first.weight", (2, 3), "linear"),
        Segment("first.bias", (3,), "bias"),
        Segment("kernel", (2, 1, 2), "conv"),
        Segment("scale", (), "other"),
        Segment("last.weight", (3, 1), "linear"),
    )
)


def test_sizes_ranges_and_groups_lie_in_order_of_the_segments() -> None:
    assert SPEC.size == 6 + 3 + 4 + 1 + 3
    assert SPEC.ranges == {
        "first.weight": slice(0, 6),
        "first.bias": slice(6, 9),
        "kernel": slice(9, 13),
        "scale": slice(13, 14),
        "last.weight": slice(14, 17),
    }
    assert SPEC.groups == {
        "linear": (slice(0, 6), slice(14, 17)),
        "bias": (slice(6, 9),),
        "conv": (slice(9, 13),),
        "other": (slice(13, 14),),
    }


@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
def test_flatten_inverts_unflatten_under_leading_axes(leading: tuple[int, ...]) -> None:
    flat = torch.arange(float(torch.Size(leading).numel() * SPEC.size)).reshape(*leading, SPEC.size)
    params = SPEC.unflatten(flat)
    assert {name: tuple(param.shape) for name, param in params.items()} == {
        segment.name: (*leading, *segment.shape) for segment in SPEC.segments
    }
    for name, param in params.items():
        assert torch.equal(param.reshape(*leading, -1), flat[..., SPEC.ranges[name]])
    assert torch.equal(SPEC.flatten(params), flat)


def test_unflatten_gives_views() -> None:
    flat = torch.zeros(4, SPEC.size)
    SPEC.unflatten(flat)["kernel"].fill_(1.0)
    assert torch.equal(flat.sum(0).nonzero().squeeze(-1), torch.arange(9, 13))


def test_flatten_reads_by_name_not_by_position() -> None:
    params = SPEC.unflatten(torch.arange(float(SPEC.size)))
    shuffled = dict(reversed(params.items()))
    assert torch.equal(SPEC.flatten(shuffled), SPEC.flatten(params))


def test_unflatten_is_differentiable_and_vmaps() -> None:
    flat = torch.randn(3, SPEC.size, generator=torch.Generator().manual_seed(0))
    out = torch.vmap(lambda row: SPEC.flatten(SPEC.unflatten(row)))(flat)
    assert torch.equal(out, flat)


def test_single_is_one_vector_in_a_group_of_its_own_name() -> None:
    spec = FlatSpec.single("theta", 5)
    assert spec.segments == (Segment("theta", (5,), "theta"),)
    assert spec.groups == {"theta": (slice(0, 5),)}


def test_of_module_names_and_orders_like_named_parameters() -> None:
    module = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.Sequential(nn.Flatten(), nn.Linear(2, 3)),
        nn.Embedding(4, 5),
    )
    spec = FlatSpec.of_module(module)
    named = dict(module.named_parameters())
    assert [(segment.name, segment.shape) for segment in spec.segments] == [
        (name, tuple(param.shape)) for name, param in named.items()
    ]
    kinds = [segment.group for segment in spec.segments]
    assert kinds == ["conv", "bias", "norm", "norm", "linear", "bias", "embedding"]
    flat = spec.flatten(named)
    assert all(torch.equal(param, named[name]) for name, param in spec.unflatten(flat).items())


@pytest.mark.parametrize(
    ("module", "kinds"),
    [
        (nn.Linear(2, 3), {"weight": "linear", "bias": "bias"}),
        (nn.Conv1d(1, 2, 3), {"weight": "conv", "bias": "bias"}),
        (nn.ConvTranspose2d(1, 2, 3), {"weight": "conv", "bias": "bias"}),
        (nn.BatchNorm1d(2), {"weight": "norm", "bias": "norm"}),
        (nn.InstanceNorm2d(2, affine=True), {"weight": "norm", "bias": "norm"}),
        (nn.LayerNorm((2, 3)), {"weight": "norm", "bias": "norm"}),
        (nn.GroupNorm(1, 2), {"weight": "norm", "bias": "norm"}),
        (nn.Embedding(2, 3), {"weight": "embedding"}),
        (nn.PReLU(), {"weight": "bias"}),
        (nn.Bilinear(2, 2, 2), {"weight": "other", "bias": "bias"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_parameter_kind(module: nn.Module, kinds: dict[str, str]) -> None:
    named = module.named_parameters()
    assert {name: parameter_kind(module, name, param) for name, param in named} == kinds


def test_a_spec_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one parameter"):
        FlatSpec(())
    with pytest.raises(ValueError, match="at least one parameter"):
        FlatSpec.of_module(nn.ReLU())


def test_names_must_be_unique() -> None:
    with pytest.raises(ValueError, match=r"unique, got \['a', 'a'\]"):
        FlatSpec((Segment("a", (1,), "x"), Segment("a", (2,), "x")))


def test_a_flat_tensor_of_another_size_or_a_missing_parameter_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"split"):
        SPEC.unflatten(torch.zeros(3, SPEC.size + 1))
    params = SPEC.unflatten(torch.zeros(SPEC.size))
    del params["kernel"]
    with pytest.raises(KeyError, match="kernel"):
        SPEC.flatten(params)
