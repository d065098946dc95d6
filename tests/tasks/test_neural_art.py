"""Neural art: the loss against naive formulas and differences, its constants, its splits, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from l2l_scale.rng import Channel, Split, stream
from l2l_scale.sampling import Schedule, WindowSampler
from l2l_scale.tasks import Extractor, MixedPrecision, NeuralArt, RandomScaling, TaskFamily, Tensors
from l2l_scale.tasks.neural_art import gram, variation

TINY = Extractor(channels=(4, 6))
FAMILY = NeuralArt(size=8, extractor=TINY)


def rng(counter: int = 0, split: Split = Split.TRAIN) -> np.random.Generator:
    return stream(0, split, Channel.TASK, counter)


def batch(family: TaskFamily, slots: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensors]:
    """θ and constants of some slots."""
    window = WindowSampler(family, Schedule(horizon=1, window=1), 0, Split.TRAIN)(0, range(slots))
    drawn = window.to_batch(dtype)
    return drawn.theta0, drawn.task


def folder_of_pictures(folder: Path, count: int, size: tuple[int, int] = (20, 12)) -> str:
    """Pictures of one grey each, rising by name."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, (5 * i, 5 * i, 5 * i)).save(folder / f"{i:03}.png")
    return str(folder)


def test_shapes_follow_the_size() -> None:
    task = FAMILY.sample_task(rng())
    assert {name: value.shape for name, value in task.items()} == {
        "content_picture": (3, 8, 8),
        "style_picture": (3, 8, 8),
        "content": (4, 8, 8),
        "gram_0": (4, 4),
        "gram_1": (6, 6),
    }
    assert FAMILY.sample_init(rng(), task).shape == (FAMILY.spec.size,) == (192,)
    assert not FAMILY.has_data


def test_gram_matrices_are_those_of_naive_sums() -> None:
    values = torch.from_numpy(rng().standard_normal((2, 3, 4, 5)))
    expected = np.zeros((2, 3, 3))
    for s, i, j in np.ndindex(2, 3, 3):
        expected[s, i, j] = sum(
            values[s, i, y, x] * values[s, j, y, x] / 20 for y in range(4) for x in range(5)
        )
    np.testing.assert_allclose(gram(values).numpy(), expected, rtol=1e-12)


def test_variation_is_that_of_naive_sums() -> None:
    pictures = rng().standard_normal((2, 3, 4, 5))
    down = [[(p[c, y + 1, x] - p[c, y, x]) ** 2 for c, y, x in np.ndindex(3, 3, 5)] for p in pictures]
    across = [[(p[c, y, x + 1] - p[c, y, x]) ** 2 for c, y, x in np.ndindex(3, 4, 4)] for p in pictures]
    expected = np.mean(down, 1) + np.mean(across, 1)
    np.testing.assert_allclose(variation(torch.from_numpy(pictures)).numpy(), expected, rtol=1e-12)


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    family = NeuralArt(
        size=8, extractor=TINY, content_weight=2.0, style_weight=3.0, variation_weight=5.0, content_layer=1
    )
    theta, task = batch(family)
    values = TINY.activations(theta.view(-1, 3, 8, 8), (0, 1))
    for slot in range(len(theta)):
        content = ((values[1][slot] - task["content"][slot]) ** 2).mean()
        wanted = [task[f"gram_{i}"][slot] for i in (0, 1)]
        off = [((gram(values[i])[slot] - wanted[i]) ** 2).sum() / (wanted[i] ** 2).sum() for i in (0, 1)]
        expected = 64 * (
            2 * content + 3 * (off[0] + off[1]) / 2 + 5 * variation(theta.view(-1, 3, 8, 8))[slot]
        )
        one = {name: leaf[slot] for name, leaf in task.items()}
        loss = family.loss(family.spec.unflatten(theta[slot]), one, {})
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_content_and_style_are_zero_at_their_own_pictures() -> None:
    picture = batch(FAMILY)[1]["content_picture"]
    theta = FAMILY.sample_init(rng(), {"content_picture": picture[0].numpy()})
    for weights in ({"style_weight": 0.0}, {"content_weight": 0.0}):
        family = NeuralArt(size=8, extractor=TINY, noise=0.0, variation_weight=0.0, **weights)
        task = family.sample_task(rng())
        if "content_weight" in weights:
            task["content_picture"] = task["style_picture"]  # start from the style
        theta = torch.from_numpy(family.sample_init(rng(), task)).float()
        tensors = {name: torch.from_numpy(value) for name, value in task.items()}
        loss = family.loss(family.spec.unflatten(theta), tensors, {})
        assert loss.item() < 1e-9
        assert family.loss(family.spec.unflatten(theta + 0.1), tensors, {}).item() > 1e-2


def test_the_content_is_compared_one_block_before_the_last_if_nothing_is_said() -> None:
    assert NeuralArt().of_content == 1
    assert NeuralArt(extractor=Extractor(channels=(4,))).of_content == 0
    assert NeuralArt(style_layers=(2, 0)).of_content == 2


def test_batched_losses_equal_each_slots_loss() -> None:
    theta, task = batch(FAMILY)
    one_by_one = [
        FAMILY.loss(FAMILY.spec.unflatten(theta[s]), {name: leaf[s] for name, leaf in task.items()}, {})
        for s in range(len(theta))
    ]
    torch.testing.assert_close(FAMILY.losses(theta, task, {}), torch.stack(one_by_one), rtol=1e-12, atol=0)
    mapped = TaskFamily.losses(FAMILY, theta, task, {})
    torch.testing.assert_close(FAMILY.losses(theta, task, {}), mapped, rtol=1e-12, atol=0)


def test_gradients_equal_finite_differences() -> None:
    theta, task = batch(FAMILY, slots=2)
    _, grads = FAMILY.losses_and_gradients(theta, task, {}, create_graph=False)
    for at in range(0, FAMILY.spec.size, 17):
        step = torch.zeros_like(theta)
        step[:, at] = 1e-6
        difference = (FAMILY.losses(theta + step, task, {}) - FAMILY.losses(theta - step, task, {})) / 2e-6
        torch.testing.assert_close(grads[:, at], difference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["average", "max"])
def test_second_derivatives_equal_finite_differences(pooling: Any) -> None:
    family = NeuralArt(size=8, extractor=Extractor(channels=(4, 6), pooling=pooling))
    theta, task = batch(family, slots=2)
    direction = torch.from_numpy(rng(1).standard_normal(theta.shape))
    theta.requires_grad_()
    _, grads = family.losses_and_gradients(theta, task, {}, create_graph=True)
    (product,) = torch.autograd.grad(grads, theta, direction)

    def gradient(step: float) -> Tensor:
        point = theta.detach() + step * direction
        return family.losses_and_gradients(point, task, {}, create_graph=False)[1]

    difference = (gradient(1e-7) - gradient(-1e-7)) / 2e-7
    torch.testing.assert_close(product, difference, rtol=1e-3, atol=1e-3)


def test_a_pixels_gradient_does_not_depend_on_the_size() -> None:
    sizes = [batch(NeuralArt(size=size), slots=4, dtype=torch.float32) for size in (32, 64)]
    small, large = (
        NeuralArt(size=size).losses_and_gradients(*one, {}, create_graph=False)[1].square().mean()
        for size, one in zip((32, 64), sizes, strict=True)
    )
    assert 0.25 < small / large < 4  # with plain means the ratio would be 16


def test_drawing_is_pure_and_splits_share_no_task() -> None:
    drawn = {}
    for split in Split:
        family = FAMILY.for_split(split)
        for i in range(4):
            task = family.sample_task(rng(i, split))
            again = family.sample_task(rng(i, split))
            assert all(np.array_equal(task[name], again[name]) for name in task)
            drawn[split, i] = task["content_picture"].tobytes() + task["style_picture"].tobytes()
    assert len(set(drawn.values())) == len(drawn)


def test_drawing_is_the_same_in_any_number_of_threads() -> None:
    family, before = NeuralArt(size=32), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        task = family.sample_task(rng())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    again = family.sample_task(rng())
    assert all(np.array_equal(task[name], again[name]) for name in task)


def test_start_is_the_content_and_noise_or_noise() -> None:
    task = FAMILY.sample_task(rng())
    still = NeuralArt(size=8, extractor=TINY, noise=0.0)
    shown = still.pictures(task, {"start": still.sample_init(rng(1), task)})
    np.testing.assert_allclose(shown["start"], shown["content"], atol=1e-6)
    noisy = NeuralArt(size=8, extractor=TINY, noise=0.3, start="noise")
    assert noisy.sample_init(rng(1), task).std() == pytest.approx(0.3, rel=0.2)


def test_pictures_can_be_shown() -> None:
    task = FAMILY.sample_task(rng())
    far = 100 * rng().standard_normal(FAMILY.spec.size)
    shown = FAMILY.pictures(task, {"far": far})
    assert list(shown) == ["content", "style", "far"]
    for picture in shown.values():
        assert picture.shape == (8, 8, 3)
        assert picture.min() >= 0
        assert picture.max() <= 1
    np.testing.assert_array_equal(shown["style"], task["style_picture"].transpose(1, 2, 0) / 255)


def test_wrapped_families_show_the_same_pictures() -> None:
    scaled = RandomScaling(FAMILY, log_range=1.0)
    task = scaled.sample_task(rng())
    shown = scaled.pictures(task, {"start": scaled.sample_init(rng(1), task)})
    bare = FAMILY.pictures(task, {"start": FAMILY.sample_init(rng(1), task)})
    np.testing.assert_allclose(shown["start"], bare["start"], atol=1e-12)
    assert MixedPrecision(FAMILY).pictures(task, {}).keys() == {"content", "style"}


def test_mixed_precision_is_near_and_keeps_the_precision_of_theta() -> None:
    theta, task = batch(FAMILY, dtype=torch.float32)
    full, rough = FAMILY.losses(theta, task, {}), MixedPrecision(FAMILY).losses(theta, task, {})
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, full, rtol=0.05, atol=0)


def test_each_split_has_its_own_pictures_of_a_folder(tmp_path: Path) -> None:
    content = folder_of_pictures(tmp_path / "contents", 20)
    seen: dict[Split, set[bytes]] = {}
    for split in Split:
        family = NeuralArt(size=8, extractor=TINY, content=content).for_split(split)
        seen[split] = {family.sample_task(rng(i, split))["content_picture"].tobytes() for i in range(60)}
    assert [len(seen[split]) for split in Split] == [14, 1, 1, 4]
    assert len(set.union(*seen.values())) == 20


def test_contents_of_a_data_set_become_coloured_and_fit() -> None:
    pixels = NeuralArt(size=16, extractor=TINY, content="digits").sample_task(rng())["content_picture"]
    assert pixels.shape == (3, 16, 16)
    assert np.array_equal(pixels[0], pixels[1])
    assert pixels.max() > 200


def test_styles_are_painted_or_pictures(tmp_path: Path) -> None:
    folder = folder_of_pictures(tmp_path / "styles", 3)
    picture = str(Path(folder) / "002.png")
    several = NeuralArt(size=8, extractor=TINY, styles=("waves", picture))
    drawn = {several.sample_task(rng(i))["style_picture"].tobytes() for i in range(20)}
    assert bytes([10] * 192) in drawn
    assert 5 < len(drawn) < 20  # the picture is always the same, waves never
    from_folder = NeuralArt(size=8, extractor=TINY, styles=(folder,))
    assert len({from_folder.sample_task(rng(i))["style_picture"].tobytes() for i in range(20)}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 1}, r"size \(1\) must be a whole number >= 4"),
        ({"style_weight": -1.0}, r"style_weight \(-1.0\)"),
        ({"start": "middle"}, r"start \('middle'\) must be 'content' or 'noise'"),
        ({"styles": ()}, "styles and style_layers must have one entry at least"),
        ({"styles": ("cubist",)}, r"styles \('cubist'\) must be waves, mosaic, .* or the path of a picture"),
        ({"style_layers": (0, 3)}, r"style_layers and content_layer \(3\) must be in 0 … 2"),
        ({"content_layer": -1}, r"style_layers and content_layer \(-1\) must be in 0 … 2"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuralArt(**arguments)


def test_a_folder_of_few_pictures_is_refused(tmp_path: Path) -> None:
    content = folder_of_pictures(tmp_path / "few", 11)
    with pytest.raises(ValueError, match=r"must hold 12 pictures at least, .* but there are 11"):
        NeuralArt(content=content)
