"""Image classifiers: small ones of our own, and two well-known ones out of transformers.

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

    def __init__(self, body: nn.Module) -> None:
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


def linear(shape: Sequence[int], classes: int) -> Classifier:
    """One dense layer on the pixels: what any other network has to beat."""
    depth, height, width = shape
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(depth * height * width, classes)))


class Logits(nn.Module):
    """A model of transformers, of whose answer only the scores are kept."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) float -> (B, classes) scores."""
        scores: Tensor = self.net(pixel_values=pixels).logits
        return scores


def resnet18(shape: Sequence[int], classes: int) -> Classifier:
    """ResNet-18 (He et al. 2016), group normalisation in place of batch statistics (Wu and He 2018)."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=shape[0],
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=classes,
    )
    net = ResNetForImageClassification(config)
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.GroupNorm(_groups(child.num_features), child.num_features))
    return Classifier(Logits(net))


def vit_tiny(shape: Sequence[int], classes: int, patch: int, layers: int, dropout: float) -> Classifier:
    """A vision transformer of width 192 with 3 heads (Dosovitskiy et al. 2021); ViT-tiny has 12 layers of them (Touvron
    et al. 2021).
    """
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=192,
        num_hidden_layers=layers,
        num_attention_heads=3,
        intermediate_size=768,
        hidden_dropout_prob=dropout,
        image_size=tuple(shape[1:]),
        patch_size=patch,
        num_channels=shape[0],
        num_labels=classes,
        attn_implementation="sdpa",
    )
    return Classifier(Logits(ViTForImageClassification(config)))


def jittered(pixels: Tensor, share: float) -> Tensor:
    """Images (B, C, H, W), each shifted, scaled and turned at random; what comes in from outside repeats the edge."""
    draws = (2 * torch.rand(4, len(pixels), device=pixels.device) - 1) * share
    angle, scale = draws[0], 1 + draws[1]
    moves = torch.stack(
        [
            torch.stack([scale * angle.cos(), -scale * angle.sin(), 2 * draws[2]], dim=1),
            torch.stack([scale * angle.sin(), scale * angle.cos(), 2 * draws[3]], dim=1),
        ],
        dim=1,
    )  # (B, 2, 3)
    grid = nn.functional.affine_grid(moves, list(pixels.shape), align_corners=False)
    return nn.functional.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)


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
