"""Object detection and instance segmentation with the same ViT: ViTDet (arXiv 2203.16527).

    Trunk             the plain ViT at any size: windows, four global blocks, relative positions
    Detector          the trunk, a simple feature pyramid, RPN, Cascade R-CNN and a mask head
    load_trunk        the weights of stages 1 and 2, or those of a detector
    roi_align, nms, paste_masks
    open_scenes         "toy", a folder of COCO's or LVIS's layout, or a .json of annotations
    repeat_factors      LVIS's sampling weights, for data.Order
    SceneBatches        scenes -> squares of one size, their boxes and masks with them
    polygon_to_rle ...  masks as run lengths, pixel for pixel as the reference makes them
    average_precision   COCO's 12 numbers, or LVIS's 13
    write_results, read_results, draw_detections
    detect_in           what a Detector finds in scenes, on all processes together

What is not the paper's is detectron2's, in its ViTDet project (Cascade Mask R-CNN). It differs in
that an image's loss depends on that image alone, so that the optimisation is the same on any number
of processes: samples are drawn with the image's own seed; the losses of boxes and classes are
divided by 512 regions an image, and a mask's by the number of positive regions of its image, where
detectron2 divides by what one GPU's images have together; and the 50 classes of the federated loss
are drawn for each image. The position table is resampled when it is loaded, not in each step.

Boxes are (left, top, right, bottom) in pixels of the padded input, float32.
"""

import glob
import hashlib
import itertools
import json
import math
import os
import re
import sys
from collections import namedtuple
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import kernels
import model as models

# Of every size but toy: detectron2's projects/ViTDet/configs/COCO and its models/mask_rcnn_vitdet.
SETTINGS = {
    "window": 14,  # side of a window of attention, in patches
    "scales": (4, 2, 1, 0.5),  # levels of the pyramid, beside the trunk's map
    "anchor_sizes": (32, 64, 128, 256, 512),  # one a level; one more: of a pooled level
    "features": 256,  # channels of the pyramid and of all heads
    "convolutions": 4,  # of the box and the mask head
    "hidden": 1024,  # width of the box head's linear layer
    "anchors": 256,  # of an image, to learn from: at most half of them positive
    "rois": 512,  # regions of an image, to learn from: at most a quarter of them positive
    "before_nms": (2000, 1000),  # proposals of a level, in training and in test
    "after_nms": 1000,  # proposals of an image
    "masks": True,  # with a mask head
    "federated": 0,  # LVIS: 50 classes of an image are judged, each on its own (a sigmoid)
    "score_threshold": 0.05,  # LVIS: 0.02
    "detections": 100,  # of an image; LVIS: 300
}
# Ours, for 128 to 256 pixels on a laptop: strides 4, 8 and 16 of a patch of 8, no window.
TOY = {"scales": (2, 1, 0.5), "anchor_sizes": (16, 32, 64), "features": 64, "convolutions": 1}
TOY |= {"hidden": 128, "anchors": 64, "rois": 24, "before_nms": (150, 30), "after_nms": 150}
RATIOS = (0.5, 1.0, 2.0)  # height / width of the anchors
# Each stage's least IoU of a positive, and the weights of its (centre, size) deltas.
STAGES = ((0.5, (10.0, 5.0)), (0.6, (20.0, 10.0)), (0.7, (30.0, 15.0)))


# ---------------------------------------------------------------------------------------- the trunk


class WindowAttention(models.Attention):
    """Attention in windows, or in the whole grid (window 0), with decomposed relative positions."""

    def __init__(self, width, heads, grid, window):
        super().__init__(width, heads)
        self.grid, self.window = grid, window
        rows, columns = (window, window) if window else grid
        self.rel_pos_h = nn.Parameter(torch.empty(2 * rows - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.empty(2 * columns - 1, width // heads))

    def forward(self, x, first_query=0):
        """(B, rows * columns, D) -> the same.

        The grid is filled up to whole windows with zeros, which are attended to like any token, as
        in detectron2: 64 x 64 patches become 70 x 70.
        """
        (rows, columns), w, D = self.grid, self.window, x.shape[2]
        if not w:
            return self.proj(self.attend(x, self.grid))
        x = F.pad(x.unflatten(1, self.grid), (0, 0, 0, -columns % w, 0, -rows % w))
        down, across = x.shape[1] // w, x.shape[2] // w  # so many windows
        x = x.unflatten(2, (across, w)).unflatten(1, (down, w)).transpose(2, 3)
        x = self.attend(x.reshape(-1, w * w, D), (w, w))  # (B * windows, w * w, D)
        x = x.reshape(-1, down, across, w, w, D).transpose(2, 3)
        x = x.reshape(-1, down * w, across * w, D)[:, :rows, :columns]
        return self.proj(x.flatten(1, 2))

    def attend(self, x, grid):
        """kernels.py knows no biases, so this is PyTorch's: the scores' are a (N, N) matrix a head.

        The bias of a pair of tokens is q . R_h[rows between them] + q . R_w[columns between them],
        of a q that is not divided by sqrt(d) (detectron2's, and MViT's).
        """
        q, k, v = kernels.split_heads(self.qkv(x), self.heads)  # (B, heads, N, d)
        by_row, by_column = (
            table[between(length, x.device)]
            for table, length in zip((self.rel_pos_h, self.rel_pos_w), grid)
        )  # (rows, rows, d): asking, looked at
        asking = q.unflatten(2, grid)
        bias = torch.einsum("bhrcd,rkd->bhrck", asking, by_row)[..., None]
        bias = bias + torch.einsum("bhrcd,ckd->bhrck", asking, by_column)[..., None, :]
        bias = bias.flatten(4).flatten(2, 3)  # (B, heads, N, N)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


def between(length, device):
    """(length, length): row in a table of relative positions of each (asking, looked at)."""
    numbers = torch.arange(length, device=device)
    return numbers[:, None] - numbers + length - 1


class Trunk(models.ViT):
    """A plain ViT without class token and final norm: images -> map (B, D, rows, columns).

    All blocks attend in windows but the last of each quarter (B: 2, 5, 8, 11). A patch of 14 is
    made 16 pixels wide. Arguments: see ViT.
    """

    def __init__(self, size, image_size, window, patch_size=None, **arguments):
        patch_size = patch_size or models.architecture(size)[3]
        patch_size = 16 if patch_size == 14 else patch_size
        super().__init__(size, image_size, patch_size, **arguments)
        if min(self.grid) < 2:
            raise ValueError(f"image size {image_size}: want two patches of {patch_size} at least")
        del self.cls_token
        self.norm = nn.Identity()
        everywhere = {quarter * self.layers // 4 - 1 for quarter in (1, 2, 3, 4)}
        for i, block in enumerate(self.blocks):
            w = 0 if i in everywhere else window
            block.attn = WindowAttention(self.width, self.heads, self.grid, w)

    def tokens(self, images):
        self.check(images)
        return self.embed(models.patchify(images, self.patch_size)) + self.pos_embed[:, 1:]

    def forward(self, images, noise=None):
        return self.encode(images, noise).transpose(1, 2).unflatten(2, self.grid)


def load_trunk(model, state, grid=None):
    """Load a ViT's, an MAE's or a classifier's weights, or a Detector's, into a Detector.

    grid: that of their position table. Returns one line on the outcome; what cannot be explained is
    a ValueError, as in models.load_weights.
    """
    own, heads, said = model.state_dict(), {}, ""
    if any(name.startswith("trunk.") for name in state):
        heads = {name: t for name, t in state.items() if not name.startswith("trunk.")}
        state = {n.removeprefix("trunk."): t for n, t in state.items() if n not in heads}
    else:
        gone = ("cls_token", "norm.", "fc_norm.")
        state = {name: t for name, t in state.items() if not name.startswith(gone)}
        said = "; dropped: class token, last norm; newly initialised: relative positions"
    name, side = "patch_embed.proj.weight", model.patch_size
    if state[name].shape[-1] == 14 and side == 16:
        weight = state[name].float()
        state[name] = F.interpolate(weight, (side, side), mode="bicubic", align_corners=False)
        said += "; patch embedding resampled from 14x14 to 16x16"
    for name in (n.removeprefix("trunk.") for n in own if ".rel_pos_" in n):
        wanted = own[f"trunk.{name}"]
        table = state.get(name, torch.zeros(wanted.shape)).float()
        if len(table) != len(wanted):  # of another image size
            said += f"; {name} resampled from {len(table)} to {len(wanted)}"
            table = F.interpolate(table.T[None], size=len(wanted), mode="linear")[0].T
        state[name] = table
    # Of other classes, or without masks: predictors and the mask head may be new or dropped.
    fit = {n for n, t in heads.items() if n in own and t.shape == own[n].shape}
    anew = {name for name in own if not name.startswith("trunk.")} - fit
    odd = [n for n in anew | (heads.keys() - fit) if "predictor" not in n and n[:4] != "mask"]
    if heads and odd:
        raise ValueError(f"the weights do not fit the model: {', '.join(sorted(odd)[:3])}")
    said = models.load_weights(model.trunk, state, grid) + said
    for name in fit:
        models.fill(own[name], heads[name])
    part = r"\.\d+|\.\w+$" if heads else r"\..*"  # boxes.class_predictor, or all of boxes
    new, gone = (
        ", ".join(sorted({re.sub(part, "", name) for name in names})) or "none"
        for names in (anew, heads.keys() - own.keys())
    )
    return f"{said}; heads: {len(fit)} tensors loaded, newly initialised: {new}, dropped: {gone}"


# -------------------------------------------------------------------------------------------- boxes


def areas(boxes):
    """(..., 4) -> (...): 0 where a side is negative."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)


def overlaps(a, b):
    """Intersection over union of each of a (N, 4) with each of b (M, 4): (N, M). Of nothing: 0."""
    low = torch.maximum(a[:, None, :2], b[:, :2])
    high = torch.minimum(a[:, None, 2:], b[:, 2:])
    shared = (high - low).clamp(min=0).prod(dim=2)
    return shared / (areas(a)[:, None] + areas(b) - shared).clamp(min=1e-9)


def encode(boxes, truth, weights=(1.0, 1.0)):
    """Deltas that move boxes onto the truth, (N, 4): of the centre in sides, of log sides."""
    sides, wanted = boxes[:, 2:] - boxes[:, :2], truth[:, 2:] - truth[:, :2]
    moved = (truth[:, :2] + truth[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / 2 / sides
    return torch.cat([moved * weights[0], (wanted / sides).log() * weights[1]], dim=1)


def decode(deltas, boxes, weights=(1.0, 1.0)):
    """The inverse of encode. Nothing grows more than 1000 / 16 times (detectron2)."""
    sides = boxes[:, 2:] - boxes[:, :2]
    centre = boxes[:, :2] + sides / 2 + deltas[:, :2] / weights[0] * sides
    half = sides * (deltas[:, 2:] / weights[1]).clamp(max=math.log(1000 / 16)).exp() / 2
    return torch.cat([centre - half, centre + half], dim=1)


def clip(boxes, size):
    """Boxes (N, 4) within an image of (height, width)."""
    height, width = size
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))


def solid(boxes):
    """(N,) bool: of some area, and not NaN."""
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


def anchors_of(grids, strides, sizes, device=None):
    """All anchors, (A, 4): by level, row, column and ratio; and the level of each, (A,).

    They are around the left top corners of the cells (detectron2: offset 0).
    """
    anchors = []
    for (rows, columns), stride, size in zip(grids, strides, sizes):
        half = torch.tensor([(size * r**-0.5 / 2, size * r**0.5 / 2) for r in RATIOS])
        cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(1) * stride
        cells = cells[:, None]  # (cells, 1, 2), x first
        anchors.append(torch.cat([cells - half, cells + half], dim=2).flatten(0, 1))
    levels = [torch.full((len(a),), level) for level, a in enumerate(anchors)]
    return torch.cat(anchors).to(device), torch.cat(levels).to(device)


def label_anchors(anchors, truth):
    """(A,) 1 object, 0 background, -1 neither; and the truth that each is nearest to, (A,).

    Objects are of IoU 0.7 at least, and whichever are nearest to an object; background, below 0.3.
    """
    iou = overlaps(anchors, truth)  # (A, n)
    best, index = iou.max(dim=1)
    nearest = ((iou == iou.amax(dim=0)) & (iou > 0)).any(dim=1)
    label = (best >= 0.7).long() - ((best >= 0.3) & (best < 0.7)).long()
    return label.masked_fill(nearest, 1), index


def sample(label, number, most, keys):
    """Which to learn from, (number,), and how many of them are positive: these come first.

    At most `most` positives (label 1), and negatives (0), up to the number: those of the smallest
    keys, which are random numbers.
    """
    positive, negative = ((label == value).nonzero()[:, 0] for value in (1, 0))
    positive = positive[keys[positive].argsort()[:most]]
    negative = negative[keys[negative].argsort()[: number - len(positive)]]
    return torch.cat([positive, negative]), len(positive)


@torch.no_grad()
def nms(boxes, scores, groups, threshold, limit, block=1024):
    """Greedy non-maximum suppression: numbers of the `limit` best kept, the best first.

    A box goes if its IoU with a better one that stays and is of its group is over the threshold.
    Of equal scores, the first is better. boxes (N, 4), scores (N,), groups (N,) integers.
    """
    order = scores.argsort(descending=True, stable=True)
    kept = order[:0]
    for ids in order.split(block):
        if len(kept) >= limit:
            break
        before = torch.cat([kept, ids])
        beats = overlaps(boxes[before], boxes[ids]) > threshold
        beats &= groups[before][:, None] == groups[ids]
        alive = ~beats[: len(kept)].any(dim=0)
        beats = beats[len(kept) :].triu(1)
        # Whoever is beaten by none of those that stay, stays. Repeated until it is so of all, this
        # is the greedy answer: after n rounds it is right for the n best.
        stays, last = alive, None
        while last is None or not torch.equal(stays, last):
            last, stays = stays, alive & ~(beats & stays[:, None]).any(dim=0)
        kept = torch.cat([kept, ids[stays]])
    return kept[:limit]


# ----------------------------------------------------------------------------------- regions, masks


def first_cells(grids, device):
    """Where each level begins among the cells of all, of grids of (rows, columns)."""
    return torch.tensor([0] + [rows * columns for rows, columns in grids], device=device).cumsum(0)


def tap(x, length, second):
    """The cell before a point x, or (second) the one behind it, and its bilinear weight.

    Cells are points at 0 ... length - 1. Before the first and behind the last all is as there, up
    to a cell away; farther out all is 0 (torchvision's roi_align).
    """
    inside = (x >= -1) & (x <= length)
    x = torch.minimum(x.clamp(min=0), length - 1)
    low = x.floor()
    weight = torch.where(second, x - low, 1 - (x - low)) * inside
    return torch.minimum(low + second, length - 1).long(), weight


def roi_align(table, grids, strides, boxes, size):
    """Features of regions (R, 4) of an image, (R, C, size, size) float32.

    table (cells, C): all levels' cells, level by level and row by row; grids: their (rows, columns)
    Each bin is the mean of so many points, down and across, that they are at most a cell apart;
    pixels are half a pixel off their number (aligned=True, sampling_ratio=0). A region of
    14 to 28 cells' side is of the right level (224 pixels at stride 16, arXiv 1612.03144).
    """
    device = table.device
    level = (areas(boxes).sqrt() / (14 * strides[0]) + 1e-8).log2().floor()
    level = level.clamp(0, len(grids) - 1).long()
    start = first_cells(grids, device)[level]
    lengths = torch.tensor(grids, device=device)[level]  # (R, 2): rows, columns
    boxes = boxes / torch.tensor(strides, device=device)[level, None] - 0.5
    low, span = boxes[:, [1, 0]], (boxes[:, 2:] - boxes[:, :2]).flip(1)  # (R, 2): y, x
    points = (span / size).ceil().long()  # of a bin, down and across

    # The mean is separable: along each axis a bin has its points' cells, two each, and weights.
    lists, rows = [], torch.arange(len(boxes) * size, device=device)  # rows of bins: R * size
    for axis in (0, 1):
        taps = 2 * points[:, axis].repeat_interleave(size)
        first = taps.cumsum(0) - taps
        row = rows.repeat_interleave(taps)
        roi, k = row // size, torch.arange(len(row), device=device) - first[row]
        at = (row % size + (k // 2 + 0.5) / points[roi, axis]) / size
        at = low[roi, axis] + at * span[roi, axis]
        cell, weight = tap(at, lengths[roi, axis], k % 2 == 1)
        cell = start[roi] + cell * lengths[roi, 1] if axis == 0 else cell
        lists.append((taps, first, cell, weight / points[roi, axis]))
    (down, first_down, line, weight_down), (across, first_across, column, weight_across) = lists

    # A bin's taps are each of its row's with each of its column's, in one long row: embedding_bag
    # adds them up where they lie, and its backward is an index_add. No (taps, C) is ever made.
    i = rows.repeat_interleave(size)  # (R * size * size,)
    j = rows.unflatten(0, (-1, 1, size)).expand(-1, size, size).flatten()
    taps = down[i] * across[j]
    first = taps.cumsum(0) - taps
    bins = torch.arange(len(taps), device=device).repeat_interleave(taps)
    k, width = torch.arange(len(bins), device=device) - first[bins], across[j][bins]
    below = k // width
    i, j = first_down[i][bins] + below, first_across[j][bins] + k - below * width
    cell, weight = line[i] + column[j], weight_down[i] * weight_across[j]
    # Not rounded to bf16: differences of positions are what boxes are made of.
    out = F.embedding_bag(cell, table.float(), first, per_sample_weights=weight, mode="sum")
    return out.unflatten(0, (-1, size, size)).permute(0, 3, 1, 2)


def mask_targets(masks, boxes, which, size):
    """Each region's object within it, (R, size, size) bool: roi_align of its mask, over one half.

    masks (n, H, W) bool, boxes (R, 4), which (R,): the object of each.
    """
    out = torch.zeros(len(boxes), size, size, dtype=torch.bool, device=boxes.device)
    for i in which.unique().tolist():
        mine = which == i
        matrices = []  # (regions, size, H) and (regions, size, W): the sum is separable
        for axis, length in (1, masks.shape[1]), (0, masks.shape[2]):
            low, high = boxes[mine, axis] - 0.5, boxes[mine, axis + 2] - 0.5
            points = ((high - low) / size).ceil().clamp(min=1)[:, None, None]
            k = torch.arange(int(points.max()), device=boxes.device)
            at = (torch.arange(size, device=boxes.device)[:, None] + (k + 0.5) / points) / size
            at = low[:, None, None] + at * (high - low)[:, None, None]  # (regions, size, points)
            matrix = at.new_zeros(len(at), size, length)
            for second in torch.tensor([False, True], device=at.device):
                cell, weight = tap(at, torch.tensor(length, device=at.device), second)
                matrix.scatter_add_(2, cell, weight * (k < points) / points)
            matrices.append(matrix)
        down, across = matrices
        out[mine] = (down @ masks[i].float()) @ across.transpose(1, 2) >= 0.5
    return out


def paste_masks(masks, boxes, size):
    """Probabilities in boxes, (k, m, m), -> masks of an image of (height, width), (k, H, W) bool.

    Bilinear between the centres of cells, 0 outside; an object is where it is at least one half.
    """
    out = torch.zeros(len(masks), *size, dtype=torch.bool, device=masks.device)
    for i, box in enumerate(boxes):  # one at a time: an image may have 300
        x, y = (
            (torch.arange(length, device=box.device) + 0.5 - low) / (high - low) * 2 - 1
            for length, low, high in ((size[1], box[0], box[2]), (size[0], box[1], box[3]))
        )
        at = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=2)  # (H, W, 2)
        out[i] = F.grid_sample(masks[i, None, None], at[None], align_corners=False)[0, 0] >= 0.5
    return out


# ------------------------------------------------------------------------------------- the detector


class Norm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W), which stays as it lies in memory.

    Backward of a CPU's convolutions is three times as fast with large maps as (C, H, W), and with
    many small regions as (H, W, C).
    """

    def forward(self, x):
        y = super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return y.contiguous() if x.is_contiguous() else y


def convolution(channels, out, side):
    conv = nn.Conv2d(channels, out, side, padding=side // 2, bias=False)
    return nn.Sequential(conv, Norm(out, 1e-6))


def convolutions(number, channels):
    """So many 3 x 3 convolutions, each with a norm and a ReLU: the body of a head."""
    layers = [[convolution(channels, channels, 3), nn.ReLU()] for _ in range(number)]
    return nn.Sequential(*(module for layer in layers for module in layer))


class Pyramid(nn.ModuleList):
    """Simple feature pyramid: the map (B, D, h, w), at each scale, (B, features, h', w')."""

    def __init__(self, width, scales, features, pooled):
        def up(channels):
            return nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)

        super().__init__()
        self.pooled = pooled
        for scale in scales:
            first = {1: [], 0.5: [nn.MaxPool2d(2)], 2: [up(width)]}
            first[4] = [up(width), Norm(width // 2, 1e-6), nn.GELU(), up(width // 2)]
            channels = width // max(1, scale)
            last = convolution(channels, features, 1), convolution(features, features, 3)
            self.append(nn.Sequential(*first[scale], *last))

    def forward(self, x):
        x = x.contiguous()  # see Norm
        maps = [level(x) for level in self]
        return maps + [maps[-1][:, :, ::2, ::2]] * self.pooled  # max pool of 1 x 1, stride 2


class BoxHead(nn.Module):
    def __init__(self, features, number, hidden, classes):
        super().__init__()
        self.body = convolutions(number, features)
        self.fc = nn.Linear(features * 49, hidden)
        self.class_predictor = nn.Linear(hidden, classes + 1)  # the last: background
        self.delta_predictor = nn.Linear(hidden, 4)

    def forward(self, x):
        """(R, C, 7, 7) -> float32 logits (R, classes + 1), deltas (R, 4)."""
        x = self.body(x.to(self.fc.weight.dtype)).flatten(1)
        x = F.relu(self.fc(x))
        return self.class_predictor(x).float(), self.delta_predictor(x).float()


class Detector(nn.Module):
    """ViTDet. Images (B, C, S, S) are normalised, and filled up with zeros right and below.

    size, image_size  of the trunk; its other arguments, too, may be given: see ViT
    classes           how many
    class_counts      LVIS: in how many images each is, for the federated loss
    others            change SETTINGS, or for size "toy" TOY; all are kept in the config
    """

    def __init__(
        self, size="B", classes=80, image_size=1024, class_names=None, class_counts=None, **others
    ):
        super().__init__()
        given = {name: others.pop(name) for name in SETTINGS if name in others}
        self.settings = s = SETTINGS | (TOY if size == "toy" else {}) | given
        self.trunk = trunk = Trunk(size, image_size, s["window"], **others)
        self.config = trunk.config | s | {"classes": classes, "class_names": class_names}
        self.config["class_counts"] = class_counts
        for name in ("width", "layers", "heads", "patch_size", "grid", "num_patches"):
            setattr(self, name, getattr(trunk, name))
        self.classes, self.class_counts = classes, class_counts
        C, levels, sizes = s["features"], len(s["scales"]), len(s["anchor_sizes"])
        self.pyramid = Pyramid(self.width, s["scales"], C, pooled=sizes > levels)
        self.strides = [self.patch_size / scale for scale in s["scales"]]
        self.strides += [2 * self.strides[-1]] * (sizes - levels)
        # Of an odd map, half is rounded down, but up where it is pooled.
        self.grids = [tuple(int(side * scale) for side in trunk.grid) for scale in s["scales"]]
        self.grids += [tuple(-(-side // 2) for side in self.grids[-1])] * (sizes - levels)
        body = [nn.Conv2d(C, C, 3, padding=1), nn.ReLU(), nn.Conv2d(C, C, 3, padding=1), nn.ReLU()]
        self.rpn = nn.Sequential(*body, nn.Conv2d(C, 5 * len(RATIOS), 1))
        number = s["convolutions"]
        self.boxes = nn.ModuleList(BoxHead(C, number, s["hidden"], classes) for _ in STAGES)
        if s["masks"]:
            up = nn.ConvTranspose2d(C, C, 2, stride=2)
            self.mask = nn.Sequential(convolutions(number, C), up, nn.ReLU())
            self.mask.add_module("predictor", nn.Conv2d(C, classes, 1))
        # Standard deviations of what is not initialised as the trunk is: detectron2's.
        self.init_std = {}
        for name, parameter in self.named_parameters():
            if ".rel_pos_" in name:
                self.init_std[name] = 0.0
            elif name.startswith("rpn.") or name.endswith("class_predictor.weight"):
                self.init_std[name] = 0.01
            elif name.endswith("predictor.weight"):
                self.init_std[name] = 0.001
            elif parameter.ndim == 4 and not name.startswith("trunk."):
                self.init_std[name] = math.sqrt(2 / (len(parameter) * parameter[0, 0].numel()))
        models.initialize(self)

    def forward(self, images, targets):
        """Each image's loss, (B,), and its parts, detached: {name: (B,)}.

        targets: of each image {"boxes": (n, 4), "labels": (n,) int64, "masks": (n, S, S) bool or
        None, "size": (height, width) within its padding, "seed": int}. All that is random is drawn
        with the seed, on the CPU.
        """
        draws = [torch.Generator().manual_seed(target["seed"]) for target in targets]
        noise = torch.stack([torch.rand(self.layers, 2, generator=draw) for draw in draws])
        noise = noise.to(images.device) if self.training else None
        images = zip(*self.predict(images, noise), targets, draws)
        parts = [self.losses(*image) for image in images]
        parts = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        return sum(parts.values()), {name: part.detach() for name, part in parts.items()}

    def predict(self, images, noise=None):
        """Of each image: features (cells, C) for roi_align, objectness (A,) and deltas (A, 4)."""
        # Not buffers: a model that is made on the meta device would have them filled with nothing.
        sizes = self.settings["anchor_sizes"]
        self.anchors, self.levels = anchors_of(self.grids, self.strides, sizes, images.device)
        maps = self.pyramid(self.trunk(images, noise))
        with torch.no_grad():  # gradients go through rpn_again
            found = torch.cat([self.rpn(x).permute(0, 2, 3, 1).flatten(1, 2) for x in maps], dim=1)
        table = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
        return table, *self.by_anchor(found)

    @staticmethod
    def by_anchor(found):
        """The RPN's (..., cells, 15) -> objectness (..., anchors), deltas (..., anchors, 4)."""
        scores, deltas = found.float().split([len(RATIOS), 4 * len(RATIOS)], dim=-1)
        return scores.flatten(-2), deltas.unflatten(-1, (-1, 4)).flatten(-3, -2)

    def rpn_again(self, table, ids):
        """Objectness and deltas of these anchors only, from the 5 x 5 cells around each.

        Of a quarter of a million anchors the loss looks at 256: gradients of the dense maps would
        be 0 elsewhere, and cost as much as a tenth of the whole step.
        """
        cell, ratio = ids // len(RATIOS), ids % len(RATIOS)
        level, device = self.levels[ids], ids.device
        rows, columns = torch.tensor(self.grids, device=device)[level].T[..., None, None]
        start = first_cells(self.grids, device)[level]
        around = torch.arange(-2, 3, device=device)
        y = ((cell - start)[:, None, None] // columns) + around[:, None]
        x = ((cell - start)[:, None, None] % columns) + around
        inside = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)  # (n, 5, 5)
        near = start[:, None, None] + y * columns + x
        x = table[near.where(inside, 0)] * inside[..., None]
        x = x.permute(0, 3, 1, 2)  # (n, C, 5, 5)
        for conv in self.rpn[0], self.rpn[2]:  # zeros around the map, at each convolution
            x = F.relu(F.conv2d(x, conv.weight, conv.bias))
            inside = inside[:, 1:-1, 1:-1]
            x = x * inside[:, None]
        scores, deltas = self.by_anchor(self.rpn[4](x)[..., 0].transpose(1, 2))  # (n, 3), (n, 3, 4)
        each = torch.arange(len(ids), device=device)
        return scores[each, ratio], deltas[each, ratio]

    def propose(self, scores, deltas, size):
        """The image's best boxes after suppression within levels, (n, 4); their anchors, (n,)."""
        most, anchors, kept = self.settings["before_nms"][not self.training], self.anchors, []
        for level in self.levels.unique():
            ids = (self.levels == level).nonzero()[:, 0]
            kept.append(ids[scores[ids].topk(min(most, len(ids))).indices])
        kept = torch.cat(kept)
        boxes = clip(decode(deltas[kept], anchors[kept]), size)
        good = solid(boxes)
        boxes, kept = boxes[good], kept[good]
        levels, number = self.levels[kept], self.settings["after_nms"]
        best = nms(boxes, scores[kept], levels, 0.7, number)
        return boxes[best], kept[best]

    def losses(self, table, scores, deltas, target, draw):
        """The parts of one image's loss. target, draw: see forward."""
        s, truth, labels = self.settings, target["boxes"], target["labels"]
        if not len(truth):  # an object of no area: it overlaps with nothing
            truth, labels = truth.new_zeros(1, 4), labels.new_zeros(1)
        label, index = label_anchors(self.anchors, truth)
        # Of each anchor (and object) a number that decides whether it, and what is proposed from
        # it, is drawn: were it of a place among the proposals, rounding would draw others.
        keys = torch.rand(2, len(self.anchors) + len(truth), generator=draw).to(label.device)
        ids, positives = sample(label, s["anchors"], s["anchors"] // 2, keys[0])
        score, delta = self.rpn_again(table, ids)
        loss = F.binary_cross_entropy_with_logits(score, label[ids].float(), reduction="sum")
        ids = ids[:positives]
        wanted = encode(self.anchors[ids], truth[index[ids]])
        parts = {"rpn_class": loss, "rpn_box": (delta[:positives] - wanted).abs().sum()}
        parts = {name: loss / s["anchors"] for name, loss in parts.items()}

        size = target["size"]
        with torch.no_grad():
            rois, ids = self.propose(scores, deltas, size)
            rois = torch.cat([rois, target["boxes"]])
        iou, index = overlaps(rois, truth).max(dim=1)
        keys = torch.cat([keys[1, ids], keys[1, len(self.anchors) :]])
        ids, positives = sample((iou >= STAGES[0][0]).long(), s["rois"], s["rois"] // 4, keys)
        masked = ids[: positives if target["masks"] is not None else 0]
        masked, rois = (rois[masked], index[masked]), rois[ids]
        judged = self.judged(target["labels"], draw)
        for stage, (least, weights) in enumerate(STAGES):
            iou, index = overlaps(rois, truth).max(dim=1)
            positive = iou >= least
            label = torch.where(positive, labels[index], self.classes)
            logits, moves = self.judge(stage, table, rois)
            if s["federated"]:
                wanted, logits = (label[:, None] == judged).float(), logits[:, judged]
                loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
            else:
                loss = F.cross_entropy(logits, label, reduction="sum")
            parts[f"class_{stage}"] = loss / s["rois"]
            wanted = encode(rois[positive], truth[index[positive]], weights)
            parts[f"box_{stage}"] = (moves[positive] - wanted).abs().sum() / s["rois"]
            rois = clip(decode(moves.detach(), rois, weights), size)
            rois = rois[solid(rois)]
        if s["masks"]:
            rois, index = masked  # the mask head learns from the first stage's objects (detectron2)
            logits = self.mask_logits(table, rois, labels[index])
            wanted = mask_targets(target["masks"], rois, index, logits.shape[-1]).float()
            loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
            parts["mask"] = loss / max(1, logits.numel())
        return parts

    def regions(self, table, rois, size):
        levels = len(self.settings["scales"])  # nothing is read from the pooled level
        return roi_align(table, self.grids[:levels], self.strides[:levels], rois, size)

    def judged(self, labels, draw):
        """Federated loss: which classes count, those of the image and others, 50 together.

        The others are drawn without replacement, by frequency ^ 0.5 (arXiv 2103.07461).
        """
        if not self.settings["federated"]:
            return None
        weights = torch.tensor(self.class_counts).sqrt()
        keys = torch.rand(self.classes, generator=draw).log() / weights
        keys[labels.cpu()] = math.inf
        number = max(self.settings["federated"], int(keys.isposinf().sum()))
        return keys.topk(min(number, self.classes)).indices.to(labels.device)

    def judge(self, stage, table, rois):
        """Logits (R, classes + 1) and deltas (R, 4) of an image's regions, by one stage."""
        x = self.regions(table, rois, 7)
        if x.requires_grad:  # three stages read the same features (Cascade R-CNN)
            x.register_hook(lambda gradient: gradient / len(STAGES))
        return self.boxes[stage](x)

    def mask_logits(self, table, rois, labels):
        """(R, 28, 28) float32: of each region, the map of its class."""
        x = self.regions(table, rois, 14)
        x = self.mask(x.to(table.dtype))
        return x[torch.arange(len(x), device=x.device), labels].float()

    @torch.no_grad()
    def detect(self, images, sizes):
        """Each image's detections, the best first: {"boxes", "scores", "labels", "masks"}.

        sizes: (height, width) of each image within its padding. Masks are probabilities,
        (k, 28, 28) in their boxes: see paste_masks. A detector without a mask head: None.
        """
        s, found = self.settings, []
        for table, scores, deltas, size in zip(*self.predict(images), sizes):
            boxes, score = self.propose(scores, deltas, size)[0], 0
            for stage, (_, weights) in enumerate(STAGES):
                logits, moves = self.judge(stage, table, boxes)
                each = logits.sigmoid() if s["federated"] else logits.softmax(dim=1)
                score = score + each[:, :-1] / len(STAGES)
                boxes = clip(decode(moves, boxes, weights), size)
            sure = (score > s["score_threshold"]) & solid(boxes)[:, None]
            roi, label = sure.nonzero().T
            boxes, score = boxes[roi], score[roi, label]
            best = nms(boxes, score, label, 0.5, s["detections"])
            boxes, label = boxes[best], label[best]
            masks = self.mask_logits(table, boxes, label).sigmoid() if s["masks"] else None
            found.append({"boxes": boxes, "scores": score[best], "labels": label, "masks": masks})
        return found


def flops_per_image(model):
    """Forward FLOPs of a Detector on one image in training, as PyTorch counts them.

    With as many regions as can be, and a quarter of them objects with masks.
    """
    s = model.settings
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        twin = Detector(**model.config)
        twin.predict(torch.empty(1, model.config["channels"], *model.config["image_size"]))
        for head in twin.boxes:
            head(torch.empty(s["rois"], s["features"], 7, 7))
        if s["masks"]:
            twin.mask(torch.empty(s["rois"] // 4, s["features"], 14, 14))
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------------- scenes
#
# A source of scenes is one of data.py's sources whose read(number) gives {"image": a function that
# opens the PIL image, "image_id", "size": (height, width), "boxes": (n, 4) float64 x1 y1 x2 y2,
# "labels": (n,) int64 class numbers, "crowd": (n,) bool, "areas": (n,) float64, of the masks if
# there are any, "segments": a list of n: polygons, run lengths or (height, width) bool, None if
# unknown}, and with LVIS {"negative", "not_exhaustive": lists of class numbers}. It has, too: ids
# and sides, (height, width), of its images; category_ids, the file's own numbers of the classes;
# has_masks; and frequencies, "r", "c" or "f" of each class (of LVIS, otherwise None).


def open_scenes(where, val=None, size=128):
    """(scenes to train on, scenes to measure on) behind --data and --val-data.

    where, val  "toy"; a .json; or a folder with annotations/{instances,lvis_v1}_{train,val}*.json
    size        side of the toy world's pictures

    Raises ValueError, one line, when there are none, or the two differ in their classes.
    """
    if where == "toy" and val not in (None, "toy"):
        raise ValueError("the toy world has other classes: leave --val-data out")
    measured = scenes_to_measure(val or where, size)
    if where == "toy":
        train = ToyScenes("train", size)
    else:
        train = Scenes(find_annotations(where, "train"), train=True)
    if (train.category_ids, train.classes) != (measured.category_ids, measured.classes):
        raise ValueError(f"{val or where} has other categories to measure on than {where} to learn")
    return train, measured


def scenes_to_measure(where, size=128):
    """The second of these alone: see open_scenes."""
    return ToyScenes("val", size) if where == "toy" else Scenes(find_annotations(where, "val"))


def find_annotations(where, split):
    """The path of a split's .json below a folder; a .json is itself."""
    if where.endswith(".json"):
        return where
    name = re.compile(rf"(instances|lvis_v1)_{split}\w*\.json")
    paths = glob.glob(f"{glob.escape(where)}/annotations/*")
    found = [path for path in paths if name.fullmatch(os.path.basename(path))]
    if len(found) != 1:
        wanted = f"{where}/annotations/instances_{split}*.json or lvis_v1_{split}*.json"
        raise ValueError(f"there must be one {wanted}, not {len(found)}: or name a .json")
    return found[0]


# What reading a json may raise that is not what it should be.
DAMAGED = OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError
FARTHEST = 100_000  # pixels: outlines are walked in steps of a fifth of one, see polygon_to_rle


class Scenes:
    """Pictures with COCO's or LVIS's annotations, in the order of their ids. The layouts known:

    DIR/annotations/NAME_SPLIT.json with pictures at DIR/SPLIT/file_name or DIR/file_name; without
    file_name (LVIS) at the last two parts of coco_url; `pictures` is a folder to look in instead.

    train  leave out what teaches nothing: boxes of no area, objects without a mask where others
           have one, and, as detectron2, pictures with nothing in them but crowds

    Annotations that are damaged, or of images or categories that are not listed, are left out; what
    is, is counted. So are objects without a mask that are to be measured on where others have one:
    they count for boxes only, see average_precision.
    """

    def __init__(self, path, pictures=None, train=False):
        try:
            with open(path, "rb") as file:
                text = file.read()
            content = json.loads(text)
            images = sorted(content["images"], key=lambda image: image["id"])
            categories = sorted(content["categories"], key=lambda category: category["id"])
            numbers = {image["id"]: number for number, image in enumerate(images)}
            self.category_ids = [category["id"] for category in categories]
            if len(numbers) < len(images) or len(set(self.category_ids)) < len(categories):
                raise ValueError("two pictures, or two categories, have the same id")
            self.sides = [(int(image["height"]), int(image["width"])) for image in images]
            if not all(0 < side < FARTHEST for side in itertools.chain(*self.sides)):
                raise ValueError(f"there is a height or width that is not from 1 to {FARTHEST}")
            self.classes = [category["name"] for category in categories]
            frequencies = [category.get("frequency") for category in categories]
            self.frequencies = frequencies if all(frequencies) and frequencies else None
            self.path, annotations = path, content["annotations"]
            with_masks = (isinstance(one, dict) and one.get("segmentation") for one in annotations)
            self.has_masks = any(with_masks)
            labels = {category: number for number, category in enumerate(self.category_ids)}
            kept = self.describe(annotations, numbers, labels, train)
            empty = np.bincount(kept[~self.crowd], minlength=len(images)) == 0
            used = np.flatnonzero(~empty | (not train)).tolist()
            images = [images[number] for number in used]
            self.first = np.searchsorted(kept, used, "left")
            self.stop = np.searchsorted(kept, used, "right")
            self.ids = [image["id"] for image in images]
            self.sides = [self.sides[number] for number in used]
            self.files = [
                str(image.get("file_name") or "/".join(image["coco_url"].split("/")[-2:]))
                for image in images
            ]
            keys = {"negative": "neg_category_ids"}
            keys |= {"not_exhaustive": "not_exhaustive_category_ids"}
            keys = keys if self.frequencies else {}
            self.federated = [
                {ours: [labels[i] for i in image[theirs]] for ours, theirs in keys.items()}
                for image in images
            ]
        except DAMAGED as error:
            why = data.one_line(error)
            what = f"cannot read annotations from {path} (want COCO's or LVIS's json)"
            raise ValueError(f"{what}: {why}") from None
        if not images or not self.classes:
            raise ValueError(f"{path} lists no pictures with objects to learn or no categories")
        self.root = pictures or self.find_pictures()
        self.sizes = np.ones(len(images), dtype=np.int64)
        digest = hashlib.sha256(text + repr(train).encode()).hexdigest()[:16]
        self.identity = f"{len(images)} pictures, {len(self.labels)} objects, {digest}"

    def describe(self, annotations, numbers, labels, train):
        """Set the arrays of all objects, in the order of their pictures: (n,) their numbers."""
        rows, segments, left_out, maskless = [], [], {}, 0
        for one in annotations:
            try:
                number, label = numbers.get(one["image_id"]), labels.get(one["category_id"])
                reason = None
                if number is None or label is None:
                    what = "an image" if number is None else "a category"
                    reason = f"of {what} that is not listed"
                else:
                    crowd, area, box, segment = read_annotation(one, self.sides[number])
                    if train and not (box[2] > box[0] and box[3] > box[1]):
                        reason = "with a box of no area"
                    elif self.has_masks and not (has_mask(segment) or crowd):
                        reason = "without a mask" if train else None
                        maskless += not train
            except DAMAGED:
                reason = "that are damaged"
            if reason:
                first = one.get("id") if isinstance(one, dict) else None
                left_out.setdefault(reason, []).append(first)
                continue
            rows.append([number, label, crowd, area, *box])
            segments.append(json.dumps(segment).encode())
        for reason, ids in left_out.items():
            text = f"annotations {reason}, left out: {len(ids)} (the first has id {ids[0]})"
            print(f"{self.path}: {text}", file=sys.stderr)
        if maskless:
            text = f"objects without a mask, left out of mask AP: {maskless}"
            print(f"{self.path}: {text}", file=sys.stderr)
        table = np.array(rows, dtype=np.float64).reshape(-1, 8)
        order = np.argsort(table[:, 0], kind="stable")
        table = table[order]
        self.labels, self.crowd = table[:, 1].astype(np.int64), table[:, 2] > 0
        self.areas, self.boxes = table[:, 3], table[:, 4:]
        # One array of bytes: millions of Python objects would be copied into each worker process.
        segments = [segments[i] for i in order]
        self.ends = data.running_sum([len(segment) for segment in segments])
        self.segments = np.frombuffer(b"".join(segments), dtype=np.uint8)
        return table[:, 0].astype(np.int64)

    def find_pictures(self):
        """The folder that the pictures' names begin in, told by the first hundred."""
        folder, name = os.path.split(os.path.abspath(self.path))
        root = os.path.dirname(folder) if os.path.basename(folder) == "annotations" else folder
        split = os.path.splitext(name)[0].split("_")[-1]
        for place in (os.path.join(root, split), root):
            if any(os.path.exists(os.path.join(place, file)) for file in self.files[:100]):
                return place
        raise ValueError(f"the pictures of {self.path} are not at {root}/{split}/{self.files[0]}")

    def read(self, number):
        mine = slice(self.first[number], self.stop[number])
        ends = self.ends[mine.start : mine.stop + 1].tolist()
        segments = [json.loads(self.segments[a:b].tobytes()) for a, b in itertools.pairwise(ends)]
        return {
            "image": partial(open_upright, self.name(number), self.sides[number]),
            "image_id": self.ids[number],
            "size": self.sides[number],
            "boxes": self.boxes[mine],
            "labels": self.labels[mine],
            "crowd": self.crowd[mine],
            "areas": self.areas[mine],
            "segments": segments,
        } | self.federated[number]

    def name(self, number):
        return os.path.join(self.root, self.files[number])

    where = name


def read_annotation(one, size):
    """(whether a crowd, area, [x1, y1, x2, y2], segment or None) of an annotation of a picture.

    size: the picture's (height, width). A box or an area that is not given is the segment's, and an
    area without a segment is the box's. Raises one of DAMAGED where it cannot be used.
    """
    segment, box, area = one.get("segmentation") or None, one.get("bbox"), one.get("area")
    crowd = bool(int(one.get("iscrowd") or 0))
    polygons = segment if segment and not isinstance(segment, dict) else []
    if not all(abs(n) < FARTHEST for n in itertools.chain(box or (), *polygons)):
        raise ValueError("it is not of a picture")
    if isinstance(segment, dict) or segment and (not box or area is None):
        mask = as_rle(segment, *size)
        area = rle_area(mask) if area is None else area
        if not box:
            left, top, right, bottom = rle_box(mask)
            box = left, top, right - left, bottom - top
    if not box:
        raise ValueError("there is neither a bbox nor a segmentation")
    x, y, w, h = box
    area = float(w * h if area is None else area)
    if not math.isfinite(area):
        raise ValueError("it has no area")
    return crowd, area, [x, y, x + w, y + h], segment


def open_upright(path, size):
    """A picture of the size (height, width) that its annotations were made for.

    Turned as its EXIF says, like detectron2's; as it is stored, if only that fits. Raises
    ValueError if neither does.
    """
    image = data.open_picture(path)
    try:
        turned = data.upright(image)
    except Exception:  # noqa: BLE001 (damaged EXIF raises anything; the pixels may be whole)
        turned = image
    for one in (turned, image):
        if one.size == (size[1], size[0]):
            return one
    sides = "{} x {}".format
    raise ValueError(f"{sides(*image.size)} pixels, annotated as {sides(size[1], size[0])}")


class ToyScenes(data.Toy):
    """The toy world's objects: boxes and masks of what is to be seen of them, labels by shape."""

    has_masks, frequencies = True, None

    def __init__(self, split, size, count=None):
        super().__init__(split, (size, size))
        self.sizes = self.sizes[:count]
        self.identity = f"toy scenes, {len(self.sizes)} pictures an epoch"
        self.category_ids = list(range(1, 1 + len(self.classes)))
        self.ids = range(self.first, self.first + len(self.sizes))
        self.sides = [(size, size)] * len(self.sizes)

    def read(self, number):
        sample = super().read(number)
        masks = sample["masks"]()
        seen = masks.any(axis=(1, 2))
        masks, labels = masks[seen], np.array(sample["labels"], dtype=np.int64)[seen]
        return {
            "image": sample["image"],
            "image_id": self.first + number,
            "size": (self.size, self.size),
            "boxes": np.array([tight_box(m) for m in masks], dtype=np.float64).reshape(-1, 4),
            "labels": labels,
            "crowd": np.zeros(len(labels), dtype=bool),
            "areas": masks.sum(axis=(1, 2)).astype(np.float64),
            "segments": list(masks),
        }


def tight_box(mask):
    """x1 y1 x2 y2 around the pixels of a (height, width) bool mask; zeros if there are none."""
    if not mask.any():
        return 0, 0, 0, 0
    rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def repeat_factors(scenes, threshold=0.001):
    """Order's "totals", "weights" and "most" for LVIS's repeat-factor sampling.

    A picture comes max(1, sqrt(threshold / f)) times in an epoch, where f is the share of pictures
    with its rarest category in them: the LVIS paper's (arXiv 1908.03195, appendix B), whose
    threshold is 0.001.
    """
    present, counts = classes_present(scenes)
    factors = np.sqrt(threshold * len(present) / counts.clip(1)).clip(1)
    weights = [factors[labels].max(initial=1) for labels in present]
    weights = np.rint(np.array(weights) * data.WEIGHT).astype(np.int64)
    return {"totals": weights, "weights": partial(weights_between, weights), "most": weights.max()}


def classes_present(scenes):
    """The classes of each picture, and in how many pictures each class is, (classes,) int64."""
    present = [np.unique(scenes.labels[a:b]) for a, b in zip(scenes.first, scenes.stop)]
    return present, np.bincount(np.concatenate(present), minlength=len(scenes.classes))


def weights_between(weights, first, stop):
    return weights[first:stop]


# -------------------------------------------------------------------------------- scenes to tensors

# Picture -> square: points times scale (x, y), mirrored at `width` if flip, less corner (x, y), cut
# to (width, height). What is right of it and below is padding.
View = namedtuple("View", "scale flip width corner cut")


def random_view(size, side, draws=None, jitter=(0.1, 2.0)):
    """The View of a picture of size (height, width) in a square.

    draws: four uniform numbers for large-scale jitter: the picture's longest side becomes that of
    the square times jitter, and a random square of it is cut out. None: all of it, its longest side
    that of the square.
    """
    height, width = size
    low, high = jitter if draws is not None else (1, 1)
    change, x, y, flip = draws if draws is not None else (0, 0, 0, 1)
    scale = (low + (high - low) * change) * side / max(height, width)
    new = max(1, round(width * scale)), max(1, round(height * scale))
    corner = tuple(round(place * max(0, n - side)) for place, n in zip((x, y), new))
    cut = tuple(min(side, n - c) for n, c in zip(new, corner))
    return View((new[0] / width, new[1] / height), flip < 0.5, new[0], corner, cut)


def view_points(points, view):
    """(n, 2) x y in the picture -> in the square."""
    points = points * view.scale
    if view.flip:
        points = [view.width, 0] + points * [-1, 1]
    return points - view.corner


def view_boxes(boxes, view):
    """(n, 4) boxes of the picture -> of the square, not clipped."""
    corners = view_points(boxes.reshape(-1, 2), view).reshape(-1, 2, 2)
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def view_pixels(image, view, side, channels):
    """A PIL image -> (C, S, S) uint8 tensor; bilinear and padded with what normalises to 0, as
    detectron2 (to rounding)."""
    image = data.to_mode(image, channels)
    image = ImageOps.mirror(image) if view.flip else image
    (x, y), (w, h), (sx, sy) = view.corner, view.cut, view.scale
    box = x / sx, y / sy, min(image.width, (x + w) / sx), min(image.height, (y + h) / sy)
    image = image.resize(view.cut, Image.Resampling.BILINEAR, box=box)
    mean = (255 * torch.tensor(data.channel_statistics(channels)[0])).round().to(torch.uint8)
    pixels = mean.repeat(side, side, 1)
    pixels[:h, :w] = torch.from_numpy(np.array(image).reshape(h, w, channels))
    return pixels.permute(2, 0, 1)


def view_mask(segment, size, view, side):
    """A segment of a picture of size (height, width) -> (S, S) bool.

    Polygons are drawn where they land, not drawn and scaled; pixels are taken at their centres.
    """
    mask, (w, h) = np.zeros((side, side), dtype=bool), view.cut
    if isinstance(segment, list):
        moved = [view_points(points, view) for points in polygons_of(segment)]
        mask[:h, :w] = decode_mask(merge_rles([polygon_to_rle(p, h, w) for p in moved], h, w))
        return mask
    whole = segment if isinstance(segment, np.ndarray) else decode_mask(as_rle(segment, *size))
    (x, y), (sx, sy) = view.corner, view.scale
    rows = ((np.arange(h) + y + 0.5) / sy).astype(int).clip(max=size[0] - 1)
    columns = ((np.arange(w) + x + 0.5) / sx).astype(int).clip(max=size[1] - 1)
    if view.flip:
        columns = ((view.width - (np.arange(w) + x + 0.5)) / sx).astype(int).clip(max=size[1] - 1)
    mask[:h, :w] = whole[rows][:, columns]
    return mask


def view_target(sample, view, side, with_masks):
    """What there is to find in the square: see SceneBatches. Objects cut away are left out.

    The box of an object that is cut, or known by its pixels, is that of the pixels to be seen, as
    detectron2's ViTDet (recompute_boxes); of other polygons it is the annotation's own, finer one.
    """
    whole, crowd = view_boxes(sample["boxes"], view), sample["crowd"]
    boxes = whole.clip(0, view.cut * 2)
    seen = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    kept, masks = np.flatnonzero(seen & ~crowd), None
    if with_masks:
        segments = [sample["segments"][i] for i in kept]
        masks = np.zeros((len(kept), side, side), dtype=bool)
        for mask, segment in zip(masks, segments):
            mask[:] = view_mask(segment, sample["size"], view, side)
        some = masks.any(axis=(1, 2))
        kept, masks = kept[some], masks[some]
        for i, mask in zip(kept, masks):
            if (boxes[i] != whole[i]).any() or not isinstance(sample["segments"][i], list):
                tight = np.array(tight_box(mask))
                low, high = np.maximum(boxes[i], tight)[:2], np.minimum(boxes[i], tight)[2:]
                # A box may be annotated where its mask is not.
                boxes[i] = [*low, *high] if (high > low).all() else tight
        masks = torch.from_numpy(masks)
    return {
        "boxes": torch.from_numpy(boxes[kept]).float(),
        "labels": torch.from_numpy(sample["labels"][kept]),
        "masks": masks,
        "size": view.cut[::-1],
    }


@dataclass
class SceneBatches(data.Batches):
    """step * pieces + piece -> that piece of this process's part of that step's batch, a dict:

    images     (b, C, S, S) uint8, S = size[0] = size[1]; of the mean colour where padded
    targets    b dicts of {"boxes": (n, 4) float32 x1 y1 x2 y2 in the square, "labels": (n,) int64,
               "masks": (n, S, S) bool or None, "size": (height, width) that the picture has
               there, "seed": an int for what is drawn on the device}; without crowds; nothing in
               them where unreadable
    sizes      (b, 2) int64, the picture's height and width
    scales     (b, 2) float64, x and y: boxes of the square / scales = boxes of the picture
               (without an order: with one, it was cut and flipped as well)
    weight, positions, samples, bad: see data.Batches

    With an order: large-scale jitter, flips, random squares. Without: see random_view.
    """

    jitter: tuple = (0.1, 2.0)

    def __getitem__(self, item):
        positions, side = self.positions(item), self.size[0]
        images = torch.zeros(len(positions), side, side, self.channels, dtype=torch.uint8)
        images = images.permute(0, 3, 1, 2)  # in channels-last memory, as data.Batches
        weight, targets, bad = torch.zeros(len(positions)), [], []
        sizes = torch.full((len(positions), 2), side)
        scales = torch.ones(len(positions), 2, dtype=torch.float64)
        samples = torch.full((len(positions),), -1)
        for i, position in enumerate(positions.tolist()):
            key = self.seed, position // self.order.length if self.order else 0, position
            number = self.order(position) if self.order else position
            target = empty_target(side, self.source.has_masks)
            try:
                if number < self.total:
                    samples[i] = number
                    sample, draws = self.source.read(number), None
                    if self.order:
                        draws = data.uniform(data.random_bits(4, *key, data.VIEW)).tolist()
                    view = random_view(sample["size"], side, draws, self.jitter)
                    pixels = view_pixels(sample["image"](), view, side, self.channels)
                    target = view_target(sample, view, side, self.source.has_masks)
                    images[i], weight[i] = pixels, 1
                    sizes[i], scales[i] = torch.tensor(sample["size"]), torch.tensor(view.scale)
            except Exception as error:  # noqa: BLE001 (decoders raise anything: named, counted)
                data.raise_if_unreachable(error)
                bad.append(f"{self.source.name(number)}: {data.one_line(error)}")
            target["seed"] = int(data.random_bits(1, *key, data.DEVICE)[0] >> np.uint64(1))
            targets.append(target)
        batch = {"images": images, "targets": targets, "sizes": sizes, "scales": scales}
        batch |= {"weight": weight, "positions": torch.from_numpy(positions)}
        return batch | {"samples": samples, "bad": bad}


def empty_target(side, with_masks):
    masks = torch.zeros(0, side, side, dtype=torch.bool) if with_masks else None
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return nothing | {"masks": masks, "size": (side, side)}


# -------------------------------------------------------------------------------------- run lengths
#
# A mask as run lengths (RLE) is {"size": [height, width], "counts": (m,) int64}: so many zeros,
# ones, zeros ... down the columns, one after the other. In files, counts are a list or a text.


def encode_mask(mask):
    """(height, width) bool -> RLE."""
    pixels = mask.T.ravel()
    cuts = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    return rle_of_cuts(np.concatenate([[0] * int(mask[0, 0]), cuts]), *mask.shape)


def rle_of_cuts(cuts, height, width):
    """RLE of the sorted places where zeros turn into ones and ones into zeros."""
    counts = np.diff(np.concatenate([[0], cuts, [height * width]]).astype(np.int64))
    return {"size": [height, width], "counts": counts}


def decode_mask(rle):
    """RLE -> (height, width) bool."""
    (height, width), counts = rle["size"], rle["counts"]
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def polygon_to_rle(points, height, width):
    """(n, 2) x y -> RLE, by the reference's rule (rleFrPoly in COCO's maskApi.c).

    The outline is walked in steps of a fifth of a pixel, the corners rounded to such steps. Where
    it crosses a column's centre line, the mask begins or ends with the pixel below.
    """
    corners = (5 * points + 0.5).astype(np.int64)  # C's conversion: towards zero
    start, end = corners, np.roll(corners, -1, axis=0)
    reach = np.abs(end - start)
    steep = reach[:, 0] < reach[:, 1]
    along = steep.astype(np.int64)  # the axis with the most steps: 0 is x
    edge = np.arange(len(corners))
    flip = start[edge, along] > end[edge, along]  # edges are walked upwards, and listed backwards
    low, high = (np.where(flip[:, None], *pair) for pair in ((end, start), (start, end)))
    steps = reach[edge, along]
    slope = (high - low)[edge, 1 - along] / np.maximum(steps, 1)
    which = np.repeat(edge, steps + 1)
    step = np.arange(len(which)) - np.repeat(np.cumsum(steps + 1) - steps - 1, steps + 1)
    step = np.where(flip[which], steps[which] - step, step)
    across = (low[edge, 1 - along][which] + slope[which] * step + 0.5).astype(np.int64)
    step = step + low[edge, along][which]
    x, y = np.where(steep[which], (across, step), (step, across))
    # Where x changes: the column between the two fifths, if its centre lies there.
    column = np.minimum(x[1:], x[:-1])
    crossed = (x[1:] != x[:-1]) & (column % 5 == 2) & (column >= 0) & (column < 5 * width)
    row = np.ceil((np.minimum(y[1:], y[:-1])[crossed] + 0.5) / 5 - 0.5).clip(0, height)
    places, times = np.unique(column[crossed] // 5 * height + row.astype(np.int64), return_counts=1)
    return rle_of_cuts(places[(times % 2 == 1) & (places < height * width)], height, width)


def polygons_of(segment):
    """COCO's polygons, lists of x1 y1 x2 y2 ..., -> (n, 2) arrays; fewer than 3 points are none."""
    return [np.array(p[: len(p) // 2 * 2], float).reshape(-1, 2) for p in segment if len(p) > 5]


def has_mask(segment):
    """False for None, and for polygons of which none has 3 points."""
    if isinstance(segment, list):
        return any(len(polygon) > 5 for polygon in segment)
    return segment is not None


def merge_rles(rles, height, width):
    """The union of masks of one size; nothing of none."""
    if len(rles) == 1:
        return rles[0]
    cuts = [np.cumsum(rle["counts"])[:-1] for rle in rles]
    places = np.concatenate([*cuts, [0]]).astype(np.int64)
    change = np.concatenate([*(1 - 2 * (np.arange(len(c)) % 2) for c in cuts), [0]])
    order = np.argsort(places, kind="stable")
    places, inside = places[order], np.cumsum(change[order]) > 0
    last = np.append(places[1:] != places[:-1], True)  # of several changes at a place
    places, inside = places[last], inside[last]
    turns = inside != np.concatenate([[False], inside[:-1]])
    return rle_of_cuts(places[turns & (places < height * width)], height, width)


def as_rle(segment, height, width):
    """A segment (polygons, RLE as in files or here, bool, None) -> RLE. Raises ValueError."""
    if isinstance(segment, np.ndarray):
        return encode_mask(segment)
    if not isinstance(segment, dict):
        rles = [polygon_to_rle(points, height, width) for points in polygons_of(segment or [])]
        return merge_rles(rles, height, width)
    try:
        counts = segment["counts"]
        text = isinstance(counts, (str, bytes))
        counts = counts_of_text(counts) if text else np.asarray(counts, dtype=np.int64)
        wrong = list(segment["size"]) != [height, width] or counts.shape != (len(counts),)
    except (LookupError, TypeError, OverflowError):  # such as a text in which no count ends
        wrong = True
    if wrong or counts.sum() != height * width or (counts < 0).any():
        raise ValueError(f"run lengths of another picture than one of {width} x {height}")
    return {"size": [height, width], "counts": counts}


def text_of_counts(counts):
    """COCO's compressed run lengths: 5 bits in a character from "0" on, the lowest first, with a
    sixth that says that more follow. From the fourth on, a count is less the one before the last.
    """
    values = counts.astype(np.int64, copy=True)
    values[3:] -= counts[1:-2]
    shifts = 5 * np.arange(13)
    more = (values[:, None] >= 16 << shifts[:-1]) | (values[:, None] < -16 << shifts[:-1])
    lengths = 1 + more.sum(axis=1)
    digits = (values[:, None] >> shifts) & 31
    digits[:, :-1] += 32 * more
    return (digits + 48)[np.arange(13) < lengths[:, None]].astype(np.uint8).tobytes().decode()


def counts_of_text(text):
    """text_of_counts, back: (m,) int64."""
    digits = np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8) - np.int64(
        48
    )
    ends = np.flatnonzero(digits & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    shifts = 5 * (np.arange(ends[-1] + 1) - np.repeat(starts, lengths))
    counts = np.add.reduceat((digits[: ends[-1] + 1] & 31) << shifts, starts)
    counts -= np.where(digits[ends] & 16, 1 << 5 * lengths, 0)
    counts[1::2], counts[2::2] = np.cumsum(counts[1::2]), np.cumsum(counts[2::2])
    return counts


def rle_area(rle):
    return int(rle["counts"][1::2].sum())


def rle_box(rle):
    """x1 y1 x2 y2 around a mask, floats; zeros if it is empty."""
    height, ends = rle["size"][0], np.cumsum(rle["counts"])
    first, last = ends[:-1:2], ends[1::2] - 1  # of each run of ones
    first, last = first[last >= first], last[last >= first]
    if len(first) == 0:
        return 0.0, 0.0, 0.0, 0.0
    left, right = first[0] // height, last[-1] // height
    top, bottom = (first % height).min(), (last % height).max()
    if (first // height != last // height).any():  # a run over the end of a column
        top, bottom = 0, height - 1
    return float(left), float(top), float(right + 1), float(bottom + 1)


def box_iou(found, truth, crowd):
    """(D, 4), (G, 4) x1 y1 x2 y2, (G,) bool -> (D, G): of a crowd, the share of the detection."""
    low = np.maximum(found[:, None, :2], truth[None, :, :2])
    sides = (np.minimum(found[:, None, 2:], truth[None, :, 2:]) - low).clip(0)
    shared, areas = sides.prod(axis=2), [(b[:, 2:] - b[:, :2]).prod(axis=1) for b in (found, truth)]
    union = areas[0][:, None] + np.where(crowd, 0, areas[1] - shared)
    return shared / np.where(shared > 0, union, 1)


def mask_iou(found, truth, crowd, pairs):
    """IoUs of RLEs, (D, G), where `pairs` (D, G) bool says so; elsewhere 0. See box_iou.

    The ones of a detection that lie in an object: the object's running count of ones (a broken
    line, straight between its cuts) at the ends of the detection's runs, less that at the starts.
    """
    iou = np.zeros(pairs.shape)
    ends = [np.cumsum(rle["counts"]) for rle in found]
    areas = np.array([rle_area(rle) for rle in found])
    for g in np.flatnonzero(pairs.any(axis=0)):
        some, counts = np.flatnonzero(pairs[:, g]), truth[g]["counts"]
        cuts = np.cumsum(counts)
        ones = np.cumsum(np.where(np.arange(len(counts)) % 2, counts, 0))
        runs = [ends[d][: len(ends[d]) // 2 * 2] for d in some]
        inside = np.interp(np.concatenate(runs), cuts, ones)
        edges = data.running_sum([len(run) for run in runs])
        inside = data.running_sum(inside[1::2] - inside[::2])[edges // 2]
        shared = np.diff(inside)
        union = areas[some] + (0 if crowd[g] else ones[-1] - shared)
        iou[some, g] = shared / np.where(shared > 0, union, 1)
    return iou


# -------------------------------------------------------------------------------- average precision
#
# Detections are {image_id: {"boxes": (k, 4) x1 y1 x2 y2 in the picture's pixels, "scores": (k,),
# "labels": (k,) class numbers, "masks": a list of k RLEs, or None}}, in tensors or arrays. One
# without an entry has none.

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the IoU, COCO's
RECALLS = np.linspace(0, 1, 101)
AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}


def average_precision(scenes, detections, kind="bbox"):
    """{"AP", "AP50", "AP75", "APs", "APm", "APl", and recalls "AR1" ...}, -1 where nothing counts.

    kind: "bbox" or "segm". As pycocotools or, for scenes with frequencies, lvis (with "APr", "APc",
    "APf"), to rounding: a detection is matched with the free object of its class and picture that
    it overlaps most, in the order of the scores (equal ones as they come); crowds and objects
    outside the range of areas are matched last, and for nothing. The best 100 of a picture and
    class count or, with LVIS, 300 of a picture, and only of classes known to be in it or not. The
    area of a detection is its mask's if kind is "segm" (the references': its box's, if given).

    Objects without a mask, for which the references have no rule, are ignored like those outside
    the range of areas if kind is "segm"; their boxes are matched, with those of detections' masks.
    """
    federated, classes = scenes.frequencies is not None, len(scenes.classes)
    limit = 300 if federated else 100
    truth, found, (of, to, iou) = pairs_of(scenes, detections, kind, limit)
    ranks = earlier_equals(found["group"])  # among those of a class in a picture, best first
    labels = found["group"] % classes
    order = np.lexsort((-found["score"], labels))  # equal scores stay in order
    by_class = np.split(order, np.searchsorted(labels[order], np.arange(1, classes)))
    precision = np.full((len(AREAS), classes, len(THRESHOLDS), len(RECALLS)), -1.0)
    recall = {most: np.full(precision.shape[:3], -1.0) for most in (1, 10, limit)}
    for a, (low, high) in enumerate(AREAS.values()):
        outside, ignored = ((x["area"] < low) | (x["area"] > high) for x in (found, truth))
        ignored |= truth["ignored"]
        matched = match_in_turn(ranks, of, to, iou, ignored, truth["crowd"])
        right = matched >= 0
        passed = (outside | found["free"])[:, None] & ~right
        if len(ignored):
            passed |= right & ignored[matched]
        right &= ~passed
        counts = np.bincount(truth["label"][~ignored], minlength=classes)
        for k in np.flatnonzero(counts):
            mine = by_class[k][ranks[by_class[k]] < limit]
            hits, misses = right[mine], ~right[mine] & ~passed[mine]
            for most, values in recall.items():
                values[a, k] = hits[ranks[mine] < most].sum(axis=0) / counts[k]
            hits, misses = np.cumsum(hits, axis=0), np.cumsum(misses, axis=0)
            best = hits / (hits + misses + np.spacing(1))
            best = np.maximum.accumulate(best[::-1], axis=0)[::-1]  # at this recall or a higher one
            best = np.concatenate([best, np.zeros((1, len(THRESHOLDS)))])
            for t, reached in enumerate(hits.T / counts[k]):
                precision[a, k, t] = best[np.searchsorted(reached, RECALLS), t]

    def mean(values):
        return float(values[values > -1].mean()) if (values > -1).any() else -1.0

    result = {"AP": mean(precision[0])}
    result |= {f"AP{round(100 * THRESHOLDS[t])}": mean(precision[0, :, t]) for t in (0, 5)}
    result |= {f"AP{name}": mean(precision[a]) for a, name in enumerate(AREAS) if name}
    if federated:
        rare = np.array(scenes.frequencies)
        result |= {f"AP{group}": mean(precision[0, rare == group]) for group in "rcf"}
    else:
        result |= {f"AR{most}": mean(recall[most][0]) for most in (1, 10)}
    result |= {f"AR{name or limit}": mean(recall[limit][a]) for a, name in enumerate(AREAS)}
    return result


def earlier_equals(values):
    """(n,) -> how many equal ones come before each."""
    order = np.argsort(values, kind="stable")
    ordered, ranks = values[order], np.empty(len(values), dtype=np.int64)
    ranks[order] = np.arange(len(values)) - np.searchsorted(ordered, ordered)
    return ranks


def pairs_of(scenes, detections, kind, limit):
    """All objects and all detections, best first in each picture, as dicts of arrays, and the pairs
    of a class and picture that overlap by half: (detections' numbers, objects' numbers, IoU)."""
    federated, classes = scenes.frequencies is not None, len(scenes.classes)
    if kind == "segm" and not scenes.has_masks:
        raise ValueError(f"{scenes.identity}: there are no masks to measure with")
    objects, founds, pairs, sums = [], [], [], [0, 0]
    numbers = range(int(scenes.sizes.sum()))
    for number in tqdm(numbers, desc=f"measuring {kind}", leave=False, disable=None):
        sample = scenes.read(number)
        boxes, labels, crowd = sample["boxes"], sample["labels"], sample["crowd"]
        ignored = crowd = crowd & (not federated)  # LVIS has none
        found = detections.get(sample["image_id"], {"boxes": [], "scores": [], "labels": []})
        scores, names = (np.asarray(found[key]).reshape(-1) for key in ("scores", "labels"))
        order = np.argsort(-scores.astype(np.float64), kind="stable")
        free = np.zeros(len(order), dtype=bool)
        if federated:
            order = order[:limit]
            known = np.isin(names, [*sample["negative"], *labels])
            order = order[known[order]]
            free = np.isin(names[order], sample["not_exhaustive"])
        names, scores = names[order].astype(np.int64), scores[order].astype(np.float64)
        corners = np.asarray(found["boxes"], dtype=np.float64).reshape(-1, 4)[order]
        areas, same = (corners[:, 2:] - corners[:, :2]).prod(axis=1), names[:, None] == labels
        if kind == "segm":
            size = sample["size"]
            masks = [as_rle(found["masks"][i], *size) for i in order]
            areas = np.array([rle_area(mask) for mask in masks])
            corners = np.array([rle_box(mask) for mask in masks]).reshape(-1, 4)
            truth = [as_rle(segment, *size) for segment in sample["segments"]]
            maskless = np.array([not has_mask(s) for s in sample["segments"]], dtype=bool)
            tight = np.array([rle_box(mask) for mask in truth]).reshape(-1, 4)
            boxes, ignored = np.where(maskless[:, None], boxes, tight), crowd | maskless
        iou = box_iou(corners, boxes, crowd)
        if kind == "segm":
            pairs_of_masks = (iou > 0) & same & ~maskless
            iou = np.where(maskless, iou, mask_iou(masks, truth, crowd, pairs_of_masks))
        of, to = np.nonzero((iou >= THRESHOLDS[0]) & same)
        pairs.append((of + sums[0], to + sums[1], iou[of, to]))
        sums = [sums[0] + len(names), sums[1] + len(labels)]
        objects.append((labels, sample["areas"], crowd, ignored))
        founds.append((number * classes + names, areas, scores, free))
    names = "label", "area", "crowd", "ignored"
    truth = dict(zip(names, map(np.concatenate, zip(*objects))))
    found = dict(zip(("group", "area", "score", "free"), map(np.concatenate, zip(*founds))))
    return truth, found, tuple(map(np.concatenate, zip(*pairs)))


def match_in_turn(ranks, of, to, iou, ignored, crowd):
    """(N, thresholds) int64: the object that each detection is matched with, or -1.

    All pictures and classes at once, the best detection of each first, then the second ones ...
    """
    matched = np.full((len(ranks), len(THRESHOLDS)), -1)
    taken = np.zeros((len(ignored), len(THRESHOLDS)), dtype=bool)
    # By rank and detection; last comes what is wanted most: not ignored, the largest IoU, the last.
    order = np.lexsort((to, iou, ~ignored[to], of, ranks[of]))
    of, to, iou = of[order], to[order], iou[order]
    for one in np.split(np.arange(len(of)), np.flatnonzero(np.diff(ranks[of])) + 1):
        if len(one) == 0:  # there are no pairs at all
            break
        free = (iou[one, None] >= THRESHOLDS) & ~(taken[to[one]] & ~crowd[to[one], None])
        starts = np.flatnonzero(np.diff(of[one], prepend=-1))
        choice = np.maximum.reduceat(np.where(free, one[:, None], -1), starts, axis=0)
        row, t = np.nonzero(choice >= 0)
        chosen = to[choice[row, t]]
        matched[of[one[starts[row]]], t] = chosen
        taken[chosen, t] = True
    return matched


def print_table(results):
    """{"bbox": average_precision's result, ...} as a table, in percent."""
    print(" " * 6 + "".join(f"{name:>7}" for name in next(iter(results.values()))))
    for kind, values in results.items():
        row = (f"{100 * value:7.2f}" if value >= 0 else f"{'-':>7}" for value in values.values())
        print(f"{kind:6}" + "".join(row))


# ----------------------------------------------------------------------------- results and pictures


def write_results(path, scenes, detections):
    """COCO's results: [{"image_id", "category_id", "bbox": [x, y, width, height], "score", and if
    there are masks "segmentation"}]."""
    results = []
    for image, found in detections.items():
        columns = (np.asarray(found[key]).tolist() for key in ("boxes", "scores", "labels"))
        for i, ((x, y, right, bottom), score, label) in enumerate(zip(*columns)):
            entry = {"image_id": image, "category_id": scenes.category_ids[label], "score": score}
            entry["bbox"] = [x, y, right - x, bottom - y]
            if found.get("masks") is not None:
                mask = as_rle(found["masks"][i], *found["masks"][i]["size"])
                entry["segmentation"] = mask | {"counts": text_of_counts(mask["counts"])}
            results.append(entry)
    data.replace_file(path, json.dumps(results).encode())


def read_results(path, scenes):
    """write_results' file, or another in COCO's format -> detections; boxes may be left out where
    there are masks. Raises ValueError, one line, if it is none of scenes."""
    label = {category: number for number, category in enumerate(scenes.category_ids)}
    sizes, found, entry = dict(zip(scenes.ids, scenes.sides)), {}, None
    try:
        with open(path, encoding="utf-8") as file:
            for entry in json.load(file):
                if entry["image_id"] not in sizes or entry["category_id"] not in label:
                    raise ValueError("there is no such picture or category")
                mine = found.setdefault(entry["image_id"], [])
                # Nothing uses a result's area: with one given, none is computed of the mask.
                one = entry | {"area": 0.0}
                _, _, box, mask = read_annotation(one, sizes[entry["image_id"]])
                score = float(entry["score"])
                if not math.isfinite(score):
                    raise ValueError("a score that is no number")
                mine.append((box, score, label[entry["category_id"]], mask))
    except DAMAGED as error:
        where = f" at {entry!r:.100}" if entry else ""
        why = data.one_line(error)
        raise ValueError(f"cannot read results from {path}{where}: {why}") from None
    detections = {}
    for image, entries in found.items():
        boxes, scores, labels, masks = zip(*entries)
        detections[image] = {
            "boxes": np.array(boxes, dtype=np.float64),
            "scores": np.array(scores, dtype=np.float64),
            "labels": np.array(labels, dtype=np.int64),
            "masks": None if None in masks else list(masks),
        }
    return detections


COLOURS = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#42d4f4", "#f032e6", "#bfef45")


def draw_detections(path, scenes, detections, numbers=range(8), most=10, least=0.3, side=480):
    """A PNG with pictures of scenes, four in a row, and the best detections of each: at most `most`
    with a score of `least`, but the first in any case. Colours are the classes'."""
    tiles = []
    for number in numbers:
        if number >= len(scenes.sizes):
            break
        sample = scenes.read(number)
        try:
            image = data.to_mode(sample["image"](), 3)
            image.load()  # here, if it was of this mode
        except Exception:  # noqa: BLE001 (decoders raise anything: a grey tile)
            image = Image.new("RGB", sample["size"][::-1], "grey")
        scale = side / max(image.size)
        size = tuple(max(1, round(scale * s)) for s in image.size)
        tile = Image.new("RGB", (side, side), "white")
        tile.paste(image.resize(size, Image.Resampling.BICUBIC))
        found = detections.get(sample["image_id"], {"boxes": [], "scores": [], "labels": []})
        scores = np.asarray(found["scores"], dtype=np.float64)
        best = np.argsort(-scores, kind="stable")[: max(1, min(most, (scores >= least).sum()))]
        for i in best[::-1]:  # the best on top
            label = int(found["labels"][i])
            colour = COLOURS[label % len(COLOURS)]
            if found.get("masks") is not None:
                mask = decode_mask(as_rle(found["masks"][i], *sample["size"]))
                mask = Image.fromarray(np.uint8(110 * mask)).resize(size)
                tile.paste(colour, (0, 0), mask)
            pen, box = ImageDraw.Draw(tile), np.asarray(found["boxes"][i]) * scale
            box[2:] = np.maximum(box[:2], box[2:])  # of results, which may have any
            box = box.tolist()
            pen.rectangle(box, outline=colour, width=2)
            text, font = f"{scenes.classes[label]} {scores[i]:.2f}", ImageFont.load_default(13)
            place = pen.textbbox((box[0] + 2, max(0, box[1] - 15)), text, font=font)
            pen.rectangle(place, fill=colour)
            pen.text(place[:2], text, fill="black", font=font, anchor="lt")
        tiles.append(tile)
    grid = Image.new("RGB", (side * min(4, len(tiles)), side * -(-len(tiles) // 4)), "white")
    for i, tile in enumerate(tiles):
        grid.paste(tile, (i % 4 * side, i // 4 * side))
    grid.save(path)


# ----------------------------------------------------------------------------- a detector on scenes


def is_detector(content):
    """True if what a file of weights holds is a Detector's."""
    config = content.get("config") if isinstance(content, dict) else None
    return isinstance(config, dict) and "anchor_sizes" in config


def read_detector(path):
    """(state, config) of a Detector's model.pt. Raises ValueError, one line, if it is none."""
    content, path = models.open_weights(path)
    if not is_detector(content):
        raise ValueError(f"{path} holds no detector: finetune.py --task detect makes one")
    try:
        with torch.device("meta"):  # shapes without memory
            model = Detector(**content["config"])
        model.load_state_dict(content["model"], assign=True)  # all of it, and nothing else
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        why = f"{data.one_line(error):.200}"
        raise ValueError(f"{path} is damaged, or another version's: {why}") from None
    return content["model"], model.config


def read_weights(path, *of_others):
    """The same, or models.read_weights of what is no detector."""
    if is_detector(models.open_weights(path)[0]):
        return read_detector(path)
    return models.read_weights(path, *of_others)


@torch.inference_mode()
def detect_in(model, scenes, batch_size=8, workers=0, device="cpu", max_bad=0.01):
    """What a Detector finds in scenes: see average_precision. Exact for any number of processes.

    Raises ValueError when more than the share max_bad cannot be read (one alone may), or all.
    """
    process, processes = 0, 1
    if dist.is_initialized():
        process, processes = dist.get_rank(), dist.get_world_size()
    dealt = {"process": process, "processes": processes}
    batch_size = 2 * processes * max(1, batch_size // 2)  # batches are dealt in pairs
    shape = model.config["image_size"], model.config["channels"], batch_size
    batches = SceneBatches(scenes, *shape, **dealt)
    found, bad, total = {}, 0, int(scenes.sizes.sum())
    model.eval()
    steps = data.loader(batches, range(len(batches)), workers)
    for batch in tqdm(steps, desc="detecting", leave=False, disable=None if process == 0 else True):
        bad += len(batch["bad"])
        for name in batch["bad"]:
            print(f"unreadable, nothing is found in it: {name}", file=sys.stderr)
        inside = (batch["sizes"] * batch["scales"].flip(1)).round()  # (height, width) in the square
        images = data.normalize(batch["images"].to(device))
        answers = model.detect(images, inside.tolist())
        rows = zip(
            batch["samples"].tolist(), batch["weight"], batch["sizes"], batch["scales"], answers
        )
        for number, weight, size, scale, answer in rows:
            if not weight:
                continue
            size, boxes = size.tolist(), answer["boxes"] / scale.repeat(2).float().to(device)
            mine = {"boxes": boxes, "scores": answer["scores"], "labels": answer["labels"]}
            mine = {name: part.cpu() for name, part in mine.items()} | {"masks": None}
            if answer["masks"] is not None:
                masks = paste_masks(answer["masks"], boxes, size).cpu().numpy()
                mine["masks"] = [encode_mask(mask) for mask in masks]
            found[scenes.read(number)["image_id"]] = mine
    model.train()
    if processes > 1:
        everyone = [None] * processes
        dist.all_gather_object(everyone, (found, bad))
        found = {image: one for part, _ in everyone for image, one in part.items()}
        bad = sum(count for _, count in everyone)
    if bad > max(1, max_bad * total) or bad == total:
        raise ValueError(f"{bad} of {total} pictures cannot be read, over --max-bad {max_bad}")
    return found
