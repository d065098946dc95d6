"""Neural art: one picture repainted in the style of another.

[Gatys, Ecker and Bethge 2015, "A neural algorithm of artistic style"]

S slots, pictures of (3, size, size); C channels and h·w places of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from l2l_scale.checks import check_count, check_positive
from l2l_scale.cores import one_thread
from l2l_scale.flat import FlatSpec, Segment
from l2l_scale.rng import Split
from l2l_scale.tasks.art_images import GENERATED, check_content, check_style, draw_content, draw_style
from l2l_scale.tasks.base import Arrays, TaskFamily, Tensors
from l2l_scale.tasks.extractor import DEVIATION, MEAN, Extractor, look_up, normalised

_TINY = 1e-6  # a style without any activation has no size to be relative to


@dataclass(frozen=True, kw_only=True)
class NeuralArt(TaskFamily):
    """f(θ) = P (α content + β style + γ variation), where θ is the picture and P its number of pixels.

    The three are means, so that with P a pixel's gradient is as large in a small picture as in a large one:

    - content: squared difference of one layer's activations from those of the content;
    - style: squared difference of some layers' Gram matrices from those of the style, relative to the square
      of the style's, since these differ a hundredfold from one style to the next;
    - variation: squared difference of neighbouring pixels.

    θ is in ImageNet's normalised units, where pixels lie in about [−2.1, 2.6]; nothing keeps it there.

    Args:
        size: height and width of the picture; it can be halved as often as the extractor pools.
        content: "generated", painted scenes; a folder of pictures, of which each split has its own; or a data
            set of images as ImageClassifier has it, such as "cifar10".
        styles: each task has one of them: "waves", "mosaic", "strokes", "dots" or "marble", painted anew for
            each task; the path of a picture; or that of a folder, for one of its pictures.
        content_weight: α.
        style_weight: β.
        variation_weight: γ.
        start: θ0 is the "content" plus noise, or "noise" alone.
        noise: standard deviation of that noise.
        extractor: whose activations count.
        style_layers: numbers of convolutions, the first is 0; the first one of every block if not given.
        content_layer: the same, for the content; the last but one of the style's if not given.
        split: which pictures of a folder or data set.

    Raises:
        ValueError: if a number is out of range, a choice unknown, or a picture missing.
    """

    size: int = 64
    content: str = GENERATED
    styles: tuple[str, ...] = ("waves",)
    content_weight: float = 1.0
    style_weight: float = 3.0
    variation_weight: float = 0.05
    start: Literal["content", "noise"] = "content"
    noise: float = 0.2
    extractor: Extractor = field(default_factory=Extractor)
    style_layers: tuple[int, ...] | None = None
    content_layer: int | None = None
    split: Split = Split.TRAIN

    def __post_init__(self) -> None:
        object.__setattr__(self, "styles", tuple(self.styles))  # a list would not be hashable
        if self.style_layers is not None:
            object.__setattr__(self, "style_layers", tuple(self.style_layers))
        for name in ("content_weight", "style_weight", "variation_weight", "noise"):
            check_positive(name, getattr(self, name), zero=True)
        if self.start not in ("content", "noise"):
            raise ValueError(f"start ({self.start!r}) must be 'content' or 'noise'")
        if not self.styles or self.style_layers == ():
            raise ValueError(
                "styles and style_layers must have one entry at least; for none set style_weight to 0"
            )
        known = len(self.extractor.convolutions)
        for layer in self.layers:
            if layer not in range(known):
                raise ValueError(
                    f"style_layers and content_layer ({layer}) must be in 0 … {known - 1}, the extractor's "
                    "convolutions"
                )
        check_count("size", self.size, least=max(2, self.extractor.least_size(max(self.layers))))
        check_content(self.content)
        for style in self.styles:
            check_style(style)

    @cached_property
    def spec(self) -> FlatSpec:
        """The picture."""
        return FlatSpec((Segment("pixels", (3, self.size, self.size), "pixels"),))

    @property
    def of_style(self) -> tuple[int, ...]:
        """Layers whose Gram matrices count."""
        return self.extractor.block_starts if self.style_layers is None else self.style_layers

    @property
    def of_content(self) -> int:
        """The layer whose activations count."""
        return self.of_style[-2:][0] if self.content_layer is None else self.content_layer

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers that count."""
        return (*self.of_style, self.of_content)

    def sample_task(self, rng: np.random.Generator) -> Arrays:
        """Draw a content and a style.

        Returns:
            the pictures, content_picture and style_picture (3, size, size) uint8, and what is wanted of θ:
            content (C, h, w) and, for each style layer l, gram_l (C, C). They are computed here, once for a
            task, in one thread: by many threads they might be rounded otherwise, by chance.
        """
        content = draw_content(self.content, self.split, self.size, rng)
        style = draw_style(self.styles, self.size, rng)
        pictures = normalised(torch.from_numpy(np.stack([content, style])))
        with one_thread(), torch.no_grad(), torch.autocast("cpu", enabled=False):
            values = self.extractor.activations(pictures, self.layers)
            wanted = {f"gram_{layer}": gram(values[layer][1:])[0].numpy() for layer in self.of_style}
        wanted["content"] = values[self.of_content][0].numpy()
        return {"content_picture": content, "style_picture": style, **wanted}

    def sample_init(self, rng: np.random.Generator, task: Arrays) -> np.ndarray:
        """The content plus noise, or noise."""
        noise = self.noise * rng.standard_normal(self.spec.size)
        if self.start == "noise":
            return noise
        content: np.ndarray = normalised(torch.from_numpy(task["content_picture"])).flatten().double().numpy()
        return content + noise

    def loss(self, params: Tensors, task: Tensors, data: Tensors) -> Tensor:
        """The loss of one picture, a scalar."""
        one = {name: leaf.unsqueeze(0) for name, leaf in task.items()}
        return self.losses(self.spec.flatten(params).unsqueeze(0), one, data).squeeze(0)

    def losses(self, theta: Tensor, task: Tensors, data: Tensors) -> Tensor:
        """The losses of all slots, whose pictures are one batch."""
        pictures = self.spec.unflatten(theta)["pixels"]
        values = self.extractor.activations(pictures, self.layers)
        content = (values[self.of_content].to(theta.dtype) - task["content"]).square().mean((1, 2, 3))
        of_layers = [_relative(gram(values[i]).to(theta.dtype), task[f"gram_{i}"]) for i in self.of_style]
        style = torch.stack(of_layers).mean(0)
        total = self.content_weight * content + self.style_weight * style
        return self.size**2 * (total + self.variation_weight * variation(pictures))

    def pictures(self, task: Arrays, points: Arrays) -> Arrays:
        """Content and style, and the points as pictures, clipped to what can be shown."""
        mean, deviation = (np.array(values)[:, None, None] for values in (MEAN, DEVIATION))
        shown = {"content": task["content_picture"] / 255, "style": task["style_picture"] / 255}
        for name, theta in points.items():
            shown[name] = (theta.reshape(3, self.size, self.size) * deviation + mean).clip(0, 1)
        return {name: picture.transpose(1, 2, 0) for name, picture in shown.items()}

    def for_split(self, split: Split) -> NeuralArt:
        """The same family on the pictures of another split."""
        return replace(self, split=split)

    def prepare(self, device: torch.device) -> None:
        """Put the extractor on the device."""
        exact = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as losses will ask for it
        look_up(self.extractor, exact, torch.float32)


def gram(values: Tensor) -> Tensor:
    """Gram matrices of activations (S, C, h, w), divided by h·w: (S, C, C)."""
    flat = values.flatten(2)
    return flat @ flat.mT / flat.shape[-1]


def _relative(matrices: Tensor, wanted: Tensor) -> Tensor:
    """‖G − A‖² / ‖A‖² of matrices (S, C, C), (S,)."""
    return (matrices - wanted).square().sum((1, 2)) / wanted.square().sum((1, 2)).clamp(min=_TINY)


def variation(pictures: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels of (S, 3, H, W), down plus across: (S,)."""
    down = (pictures[..., 1:, :] - pictures[..., :-1, :]).square().mean((1, 2, 3))
    across = (pictures[..., 1:] - pictures[..., :-1]).square().mean((1, 2, 3))
    return down + across
