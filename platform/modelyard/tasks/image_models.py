"""Small image classifiers of our own.

Group and layer normalisation only: batch statistics would depend on how many workers share a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

POOLED_SIDE = 4
"""Side to which larger feature maps are averaged before the dense layers."""


class Standardize(nn.Module):
    """uint8 pixels (B, C, H, W) to floats with mean 0 and deviation 1 per image, whatever range they use."""

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) uint8 or float -> (B, C, H, W) float."""
        x = pixels.float()
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        deviation = x.std(dim=(1, 2, 3), keepdim=True, unbiased=False)
        return (x - mean) / (deviation + 1e-5)


class Classifier(nn.Module):
    """A body that turns standardised pixels into class scores, in the dtype of its own weights."""

    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        self.standardize = Standardize()
        self.body = body

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> (B, classes) scores."""
        scores: Tensor = self.body(self.standardize(pixels).to(next(self.body.parameters()).dtype))
        return scores


def cnn(shape: Sequence[int], channels: Sequence[int], hidden: int, classes: int, dropout: float) -> Classifier:
    """3x3 convolutions, each with group normalisation, GELU and 2x2 max-pooling, then two dense layers.

    Args:
        shape: (channels, height, width) of an image.
        channels: output channels of each convolution.
    """
    depth, height, width = shape
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise([depth, *channels]):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(_groups(after), after), nn.GELU()]
        if min(height, width) >= 2 * 2:
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
    if height > POOLED_SIDE or width > POOLED_SIDE:
        height, width = min(height, POOLED_SIDE), min(width, POOLED_SIDE)
        layers.append(nn.AdaptiveAvgPool2d((height, width)))
    layers += [nn.Flatten(), *_head(channels[-1] * height * width, hidden, classes, dropout)]
    return Classifier(nn.Sequential(*layers))


def mlp(shape: Sequence[int], hidden: int, classes: int, dropout: float) -> Classifier:
    """Two dense layers on the pixels themselves."""
    depth, height, width = shape
    return Classifier(nn.Sequential(nn.Flatten(), *_head(depth * height * width, hidden, classes, dropout)))


def _head(inputs: int, hidden: int, classes: int, dropout: float) -> list[nn.Module]:
    return [
        nn.Linear(inputs, hidden),
        nn.LayerNorm(hidden),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, classes),
    ]


def _groups(channels: int) -> int:
    """The most groups, up to 8, that divide `channels`."""
    return next(groups for groups in range(min(8, channels), 0, -1) if channels % groups == 0)


def forward_flops(model: nn.Module, shape: Sequence[int]) -> float:
    """Multiply-adds, counted as two each, of the convolutions and dense layers for one image of `shape`."""
    total = 0
    hooks = []

    def count(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight = module.get_parameter("weight")
        full = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 leaves an empty stand-in
        per_output = full.numel() // full[0]
        total += 2 * per_output * output[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            hooks.append(module.register_forward_hook(count))
    training = model.training
    model.eval()
    try:
        parameter = next(model.parameters())
        with torch.no_grad():
            model(torch.zeros((1, *shape), dtype=torch.uint8, device=parameter.device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return float(total)
