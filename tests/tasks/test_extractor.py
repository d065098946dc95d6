"""The fixed network: weights from a file, random ones, its stack, bad files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from l2l_scale.rng import Channel, Split, stream
from l2l_scale.tasks import Extractor, NeuralArt
from l2l_scale.tasks.extractor import look_up, resident_parameters


def vgg() -> nn.Sequential:
    """Two blocks as torchvision has them: 4, 4, pooling, 6."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))


def save(tensors: dict[str, Tensor], folder: Path) -> str:
    save_file({f"features.{name}": value for name, value in tensors.items()}, folder / "vgg.safetensors")
    return str(folder / "vgg.safetensors")


def parameters(extractor: Extractor) -> Any:
    return look_up(extractor, torch.device("cpu"), torch.float32)


def test_activations_are_those_of_the_network_in_the_file(tmp_path: Path) -> None:
    network = vgg()
    extractor = Extractor(weights=save(dict(network.state_dict()), tmp_path), pooling="max")
    assert extractor.block_starts == (0, 2)
    assert [(c.name, c.inputs, c.outputs) for c in extractor.convolutions] == [
        ("features.0", 3, 4),
        ("features.2", 4, 4),
        ("features.5", 4, 6),
    ]
    pictures = torch.rand(2, 3, 8, 8)
    values, held = extractor.activations(pictures, (1, 2)), parameters(extractor)
    assert values.keys() == {1, 2}
    for layer, depth in ((1, 4), (2, 7)):
        expected = network[:depth](pictures) / held[layer].scale
        torch.testing.assert_close(values[layer], expected, rtol=1e-5, atol=1e-6)


def test_weights_from_a_file_are_those_in_it(tmp_path: Path) -> None:
    state = dict(vgg().state_dict())
    more = {**state, "classifier": torch.zeros(2)}
    for layer, held in zip((0, 2, 5), parameters(Extractor(weights=save(more, tmp_path))), strict=True):
        assert torch.equal(held.weight, state[f"{layer}.weight"])
        assert torch.equal(held.bias, state[f"{layer}.bias"])


def test_random_weights_are_a_function_of_the_seed() -> None:
    first, other = parameters(Extractor(channels=(4, 6))), parameters(Extractor(channels=(4, 6), seed=1))
    resident_parameters.cache_clear()
    again = parameters(Extractor(channels=(4, 6)))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a.weight, b.weight)
        assert torch.equal(a.scale, b.scale)
        assert not torch.equal(a.weight, c.weight)
    assert [tuple(held.weight.shape) for held in first] == [(4, 3, 3, 3), (6, 4, 3, 3)]


def test_activations_have_unit_size_on_scenes() -> None:
    family = NeuralArt(noise=0.0)
    rng = stream(0, Split.TRAIN, Channel.TASK)
    starts = [family.sample_init(rng, family.sample_task(rng)) for _ in range(8)]
    pictures = torch.stack([torch.from_numpy(start) for start in starts]).view(-1, 3, 64, 64).float()
    for values in family.extractor.activations(pictures, range(3)).values():
        assert 0.5 < values.square().mean().sqrt() < 2


def test_parameters_on_the_meta_device_have_shapes_only() -> None:
    extractor = Extractor()
    held = look_up(extractor, torch.device("meta"), torch.float32)
    assert [h.weight.shape for h in held] == [h.weight.shape for h in parameters(extractor)]
    values = extractor.activations(torch.empty(2, 3, 64, 64, device="meta"), (2,))
    assert values[2].shape == (2, 64, 16, 16)


def test_parameters_first_asked_for_in_inference_mode_serve_derivatives() -> None:
    extractor = Extractor(channels=(4,), seed=77)
    with torch.inference_mode():
        extractor.activations(torch.zeros(1, 3, 4, 4), (0,))
    picture = torch.zeros(1, 3, 4, 4, requires_grad=True)
    extractor.activations(picture, (0,))[0].sum().backward()
    assert picture.grad is not None


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in vgg().state_dict().items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without("2.bias"), r"must have features.2.bias of shape \(4,\), but it is None"),
        (without("0.weight"), r"must hold features.0.weight and so on"),
        (
            {"1.weight": torch.zeros(4), "1.bias": torch.zeros(4)},
            r"must have features.1.weight of shape .* batch",
        ),
        (
            {name.replace("5", "9"): value for name, value in vgg().state_dict().items()},
            r"go on from features.2 with features.4 .* but it goes on with features.9",
        ),
        (
            {"2.weight": torch.zeros(4, 4, 5, 5)},
            r"features.2.weight of shape \(outputs, 4, 3, 3\), but it is \(4, 4, 5",
        ),
        ({"5.weight": torch.zeros(6, 3, 3, 3)}, r"must have features.5.weight of shape \(outputs, 4, 3, 3\)"),
    ],
)
def test_files_of_another_kind_are_refused(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    whole = tensors if len(tensors) > 2 else {**vgg().state_dict(), **tensors}
    with pytest.raises(ValueError, match=r"weights \(.*vgg.safetensors\) " + f".*{message}"):
        Extractor(weights=save(whole, tmp_path))


def test_a_file_that_is_missing_or_no_safetensors_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"weights \(.*nowhere.*\) must be a safetensors file, but there is none"
    ):
        Extractor(weights=str(tmp_path / "nowhere.safetensors"))
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match=r"weights \(.*text\) must be a safetensors file"):
        Extractor(weights=str(tmp_path / "text"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": ()}, r"channels \(\)"),
        ({"channels": (4, 0)}, r"channels\[1\] \(0\)"),
        ({"seed": -1}, r"seed \(-1\)"),
        ({"pooling": "least"}, r"pooling \('least'\) must be 'average' or 'max'"),
        ({"channels": (4,), "weights": "vgg.safetensors"}, r"channels \(\(4,\)\) must be left out"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Extractor(**arguments)
