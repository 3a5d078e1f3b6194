"""Detectors that find a set of boxes (Carion et al. 2020): what they answer, and how wrong it is, row by row.

Letters in shapes: B rows, Q queries, C classes, n true boxes of a row. Boxes are centre x, centre y, width and height,
shares of the picture, except corners.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASS_WEIGHT, BOX_WEIGHT, OVERLAP_WEIGHT = 2.0, 5.0, 2.0
"""Shares of the loss and of the cost of a pair (Zhu et al. 2021)."""
_ALPHA, _GAMMA = 0.25, 2.0
_NO_OBJECT_WEIGHT = 0.1
_PRIOR = 0.01
_FINITE = 30.0
"""Logits beyond this are a probability of 0 or 1; a proposal at the edge of a picture has an infinite one."""


class Answer(NamedTuple):
    """What one layer of a detector says."""

    logits: Tensor
    """(B, Q, C) where each class is a yes or no; (B, Q, C + 1) where the last class is `nothing`."""
    boxes: Tensor
    """(B, Q, 4)."""


class Truth(NamedTuple):
    """The true boxes of rows, padded to M of them."""

    labels: Tensor
    """(B, M) int64, below 0 behind the last."""
    boxes: Tensor
    """(B, M, 4)."""

    @property
    def is_there(self) -> Tensor:
        """Which of them are boxes and no padding, (B, M)."""
        return self.labels >= 0


def deformable_detr(channels: int, sizes: Any, labels: dict[str, Any]) -> nn.Module:
    """A two-stage Deformable DETR (Zhu et al. 2021) on a ConvNeXt (Liu et al. 2022), of the given sizes."""
    from transformers import ConvNextConfig, DeformableDetrConfig, DeformableDetrForObjectDetection

    backbone = ConvNextConfig(
        num_channels=channels,
        patch_size=sizes.stride,
        hidden_sizes=list(sizes.widths),
        depths=list(sizes.layers),
        num_stages=len(sizes.widths),
        layer_scale_init_value=0.0,  # none: it keeps a network from scratch back
        out_features=["stage2", "stage3"],
    )
    config = DeformableDetrConfig(
        backbone_config=backbone,
        num_channels=channels,
        num_queries=sizes.queries,
        two_stage=True,
        two_stage_num_proposals=sizes.queries,
        with_box_refine=True,
        num_feature_levels=3,
        d_model=sizes.hidden_size,
        encoder_layers=sizes.encoder_layers,
        decoder_layers=sizes.decoder_layers,
        encoder_attention_heads=sizes.heads,
        decoder_attention_heads=sizes.heads,
        encoder_ffn_dim=4 * sizes.hidden_size,
        decoder_ffn_dim=4 * sizes.hidden_size,
        dropout=sizes.dropout,
        disable_custom_kernels=True,
        **labels,
    )
    built: nn.Module = DeformableDetrForObjectDetection(config)
    _begin_unsure(built)
    return built


@torch.no_grad()
def _begin_unsure(model: Any) -> None:
    """At first every class is unlikely (Lin et al. 2017) and every box stays where it is proposed (Zhu et al. 2021)."""
    for heads in (model, model.model.decoder):  # these may be the same weights
        for scores in heads.class_embed:
            scores.bias.fill_(-math.log((1 - _PRIOR) / _PRIOR))
        for places in heads.bbox_embed:
            places.layers[-1].weight.zero_()
            places.layers[-1].bias.zero_()


def answers(net: Any, output: Any) -> tuple[list[Answer], Answer | None]:
    """What each layer of the decoder says, the last one at the end, and what the first stage proposes (if it does)."""
    last = Answer(output.logits.float(), output.pred_boxes.float())
    states = getattr(output, "intermediate_hidden_states", None)
    if net.config.model_type != "deformable_detr" or states is None:
        return [last], None
    layers = []
    for level in range(states.shape[1] - 1):
        reference = output.init_reference_points if level == 0 else output.intermediate_reference_points[:, level - 1]
        deltas = net.bbox_embed[level](states[:, level])
        moved = deltas[..., : reference.shape[-1]] + torch.logit(reference, eps=1e-5)
        boxes = torch.cat([moved, deltas[..., reference.shape[-1] :]], dim=-1).sigmoid()
        layers.append(Answer(net.class_embed[level](states[:, level]).float(), boxes.float()))
    if output.enc_outputs_class is None:
        return [*layers, last], None
    places = output.enc_outputs_coord_logits.float().clamp(-_FINITE, _FINITE).sigmoid()
    return [*layers, last], Answer(output.enc_outputs_class.float(), places)


def set_loss(answer: Answer, truth: Truth, classes: int) -> Tensor:
    """Loss of the best one-to-one assignment of queries to true boxes, per true box of a row, (B,)."""
    queries = _assign(answer, truth, classes)  # (B, M)
    there = truth.is_there
    count = there.sum(dim=1).clamp_min(1)
    class_loss = _class_loss(answer.logits, queries, truth, classes, count)
    found = answer.boxes.gather(1, queries[..., None].expand(-1, -1, 4))
    box_loss = ((found - truth.boxes).abs().sum(dim=2) * there).sum(dim=1) / count
    overlap_loss = ((1 - _overlap(corners(found), corners(truth.boxes))) * there).sum(dim=1) / count
    return CLASS_WEIGHT * class_loss + BOX_WEIGHT * box_loss + OVERLAP_WEIGHT * overlap_loss


def proposal_loss(proposals: Answer, truth: Truth, classes: int) -> Tensor:
    """The same of the first stage, (B,), which only tells something (class 0) from nothing."""
    return set_loss(proposals, Truth(truth.labels.clamp_max(0), truth.boxes), classes)


def shares(answer: Answer, classes: int) -> Tensor:
    """Probability of each class at each query, (B, Q, C)."""
    if answer.logits.shape[-1] == classes + 1:
        return answer.logits.softmax(dim=-1)[..., :-1]
    return answer.logits.sigmoid()


def strongest(answer: Answer, classes: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (B, K), classes (B, K) and corners (B, K, 4) of the `count` likeliest pairs of query and class."""
    scores = shares(answer, classes)
    best, places = scores.flatten(1).topk(min(count, scores.shape[1] * classes), dim=1)
    chosen = corners(answer.boxes).gather(1, (places // classes)[..., None].expand(-1, -1, 4))
    return best, places % classes, chosen


def corners(boxes: Tensor) -> Tensor:
    """(..., 4) boxes as x0, y0, x1, y1."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def _class_loss(logits: Tensor, queries: Tensor, truth: Truth, classes: int, count: Tensor) -> Tensor:
    there = truth.is_there
    rows = torch.arange(len(logits), device=logits.device)[:, None].expand_as(queries)
    chosen = (rows[there], queries[there])
    if logits.shape[-1] == classes + 1:
        wanted = torch.full(logits.shape[:2], classes, device=logits.device)
        wanted[chosen] = truth.labels[there]
        weights = torch.ones(classes + 1, device=logits.device)
        weights[-1] = _NO_OBJECT_WEIGHT
        losses = functional.cross_entropy(logits.transpose(1, 2), wanted, weights, reduction="none")
        return losses.sum(dim=1) / weights[wanted].sum(dim=1)
    targets = torch.zeros_like(logits)
    targets[(*chosen, truth.labels[there])] = 1
    return _focal(logits, targets).sum(dim=(1, 2)) / count


@torch.no_grad()
def _assign(answer: Answer, truth: Truth, classes: int) -> Tensor:
    """The query of each true box in the cheapest assignment, (B, M); 0 for padding."""
    from scipy.optimize import linear_sum_assignment

    labels = truth.labels.clamp_min(0)[:, None].expand(-1, answer.logits.shape[1], -1)
    if answer.logits.shape[-1] == classes + 1:
        class_cost = -answer.logits.softmax(dim=-1).gather(2, labels)
    else:
        logits = answer.logits.gather(2, labels)
        ones = torch.ones_like(logits)
        class_cost = _focal(logits, ones) - _focal(logits, torch.zeros_like(logits))
    box_cost = torch.cdist(answer.boxes, truth.boxes, p=1)
    overlap_cost = -_overlap(corners(answer.boxes)[:, :, None], corners(truth.boxes)[:, None])
    cost = CLASS_WEIGHT * class_cost + BOX_WEIGHT * box_cost + OVERLAP_WEIGHT * overlap_cost  # (B, Q, M)
    costs = torch.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=-1e6).cpu().numpy()
    found = torch.zeros_like(truth.labels)
    for row, places in enumerate(truth.is_there.cpu().numpy()):
        queries, taken = linear_sum_assignment(costs[row][:, places])
        slots = torch.from_numpy(places.nonzero()[0][taken])
        found[row, slots.to(found.device)] = torch.from_numpy(queries).to(found)
    return found


def _focal(logits: Tensor, targets: Tensor) -> Tensor:
    """Focal loss (Lin et al. 2017) of each yes or no."""
    losses = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p = logits.sigmoid()
    wrong = p * (1 - targets) + (1 - p) * targets
    return (_ALPHA * targets + (1 - _ALPHA) * (1 - targets)) * wrong**_GAMMA * losses


def _overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """Generalised intersection over union (Rezatofighi et al. 2019) of corners (..., 4), pair by pair."""
    low, high = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])
    both = (high - low).clamp_min(0).prod(dim=-1)
    areas = [(b[..., 2:] - b[..., :2]).prod(dim=-1) for b in (boxes, others)]
    either = areas[0] + areas[1] - both
    hull_low = torch.minimum(boxes[..., :2], others[..., :2])
    hull = (torch.maximum(boxes[..., 2:], others[..., 2:]) - hull_low).prod(dim=-1)
    return both / either.clamp_min(1e-9) - (hull - either) / hull.clamp_min(1e-9)
