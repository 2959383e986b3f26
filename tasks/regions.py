"""Boxes, anchors, suppression, RoIAlign, mask targets: the geometry of a detector.

Boxes are (left, top, right, bottom) in pixels, float32. This file needs torch alone.
"""

import math

import torch
import torch.nn.functional as F

RATIOS = (0.5, 1.0, 2.0)  # height / width of the anchors


# -------------------------------------------------------------------------------------------- boxes


def areas(boxes):
    """(..., 4) -> (...): 0 where a side is negative."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)


def has_area(boxes):
    """(N, 4) -> (N,) bool: True for boxes with area and without NaN."""
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


def overlaps(a, b):
    """IoU of each of a (N, 4) with each of b (M, 4): (N, M), 0 for boxes without area."""
    low = torch.maximum(a[:, None, :2], b[:, :2])
    high = torch.minimum(a[:, None, 2:], b[:, 2:])
    shared = (high - low).clamp(min=0).prod(dim=2)
    return shared / (areas(a)[:, None] + areas(b) - shared).clamp(min=1e-9)


def box_deltas(boxes, truth, weights=(1.0, 1.0)):
    """Deltas that move boxes onto the truth, (N, 4): shifts by the sides, log sides."""
    sides, wanted = boxes[:, 2:] - boxes[:, :2], truth[:, 2:] - truth[:, :2]
    moved = (truth[:, :2] + truth[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / 2 / sides
    return torch.cat([moved * weights[0], (wanted / sides).log() * weights[1]], dim=1)


def apply_deltas(deltas, boxes, size, weights=(1.0, 1.0)):
    """The inverse of box_deltas, (N, 4), cut to an image of (height, width)."""
    sides = boxes[:, 2:] - boxes[:, :2]
    centre = boxes[:, :2] + sides / 2 + deltas[:, :2] / weights[0] * sides
    growth = (deltas[:, 2:] / weights[1]).clamp(max=math.log(1000 / 16)).exp()  # detectron2
    half = sides * growth / 2
    end = boxes.new_tensor([size[1], size[0]])
    moved = torch.cat([centre - half, centre + half], dim=1)
    return moved.clamp(min=0).minimum(end.repeat(2))


def make_anchors(grids, strides, sizes, device=None):
    """All anchors, (A, 4), by level, row, column and ratio; and the level of each, (A,).

    They are centred on the top left corners of the cells (detectron2: offset 0).
    """
    anchors, levels = [], []
    for level, ((rows, columns), stride, size) in enumerate(zip(grids, strides, sizes)):
        half = torch.tensor([(size * r**-0.5 / 2, size * r**0.5 / 2) for r in RATIOS])
        cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        cells = (cells.flip(1) * stride)[:, None]  # (cells, 1, 2), x first
        anchors.append(torch.cat([cells - half, cells + half], dim=2).flatten(0, 1))
        levels.append(torch.full((len(anchors[-1]),), level))
    return torch.cat(anchors).to(device), torch.cat(levels).to(device)


def label_anchors(anchors, truth):
    """(A,) 1 object, 0 background, -1 neither; and the truth with the largest IoU, (A,).

    An anchor is an object with an IoU of at least 0.7, or if no other anchor has a
    larger IoU with some object. It is background if its IoUs are below 0.3.
    """
    iou = overlaps(anchors, truth)  # (A, n)
    best, index = iou.max(dim=1)
    nearest = ((iou == iou.amax(dim=0)) & (iou > 0)).any(dim=1)
    label = (best >= 0.7).long() - ((best >= 0.3) & (best < 0.7)).long()
    return label.masked_fill(nearest, 1), index


def draw_samples(label, number, most, keys):
    """Indices of samples, (number,), positives first, and the number of positives.

    At most `most` positives (label 1), then negatives (label 0) up to `number`: those
    with the smallest keys, which are random numbers.
    """
    positive, negative = ((label == value).nonzero()[:, 0] for value in (1, 0))
    positive = positive[keys[positive].argsort()[:most]]
    negative = negative[keys[negative].argsort()[: number - len(positive)]]
    return torch.cat([positive, negative]), len(positive)


@torch.no_grad()
def nms(boxes, scores, groups, threshold, limit, block=1024):
    """Greedy non-maximum suppression: indices of the `limit` best boxes, best first.

    A box is dropped if its IoU with a better one that is kept, of its group, is over
    the threshold. Of equal scores, the first is better. groups (N,): integers.
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
        # A box stays if no box that stays beats it. Repeated until nothing changes,
        # this is the greedy answer: after n rounds it is right for the n best.
        stays, last = alive, None
        while last is None or not torch.equal(stays, last):
            last, stays = stays, alive & ~(beats & stays[:, None]).any(dim=0)
        kept = torch.cat([kept, ids[stays]])
    return kept[:limit]


# ------------------------------------------------------------------------------- features and masks


def roi_align(table, grids, strides, boxes, size):
    """Features of regions (R, 4) of an image, (R, C, size, size) float32: RoIAlign.

    table (cells, C): the cells of all levels, level by level, row by row. grids: (rows,
    columns) of each level. A bin is the mean over the fewest points, evenly spaced down
    and across, that are at most a cell apart; a point is read bilinearly. Pixels are
    half a pixel off their number (torchvision's aligned=True, sampling_ratio=0). The
    level is that where a region's side is 14 to 28 cells (224 pixels at stride 16,
    arXiv 1612.03144).
    """
    device = table.device
    level = (areas(boxes).sqrt() / (14 * strides[0]) + 1e-8).log2().floor()
    level = level.clamp(0, len(grids) - 1).long()
    cells = [0] + [rows * columns for rows, columns in grids]
    start = torch.tensor(cells, device=device).cumsum(0)[level]
    lengths = torch.tensor(grids, device=device)[level]  # (R, 2): rows, columns
    boxes = boxes / torch.tensor(strides, device=device)[level, None] - 0.5
    low, span = boxes[:, [1, 0]], (boxes[:, 2:] - boxes[:, :2]).flip(1)  # (R, 2): y, x
    points = (span / size).ceil().long()  # of a bin, down and across

    # One long list of what all bins read: for each point two rows, and in each two
    # columns.
    counts = 4 * points.prod(dim=1).repeat_interleave(size * size)  # (R * size * size,)
    first = counts.cumsum(0) - counts
    bins = torch.arange(len(counts), device=device).repeat_interleave(counts)
    k = torch.arange(len(bins), device=device) - first[bins]
    roi = bins // (size * size)
    width = 2 * points[roi, 1]
    cell, weight = start[roi], 1.0
    row, column = (bins // size % size, k // width), (bins % size, k % width)
    for axis, (place, number) in enumerate((row, column)):
        at = (place + (number // 2 + 0.5) / points[roi, axis]) / size
        at = low[roi, axis] + at * span[roi, axis]
        neighbour, share = bilinear_neighbour(at, lengths[roi, axis], number % 2)
        cell = cell + neighbour * (lengths[roi, 1] if axis == 0 else 1)
        weight = weight * (share / points[roi, axis])
    # embedding_bag adds the cells up where they lie, and its backward is an index_add:
    # the cells of the list are never copied. Not in bf16: boxes are differences of
    # positions.
    out = F.embedding_bag(cell, table.float(), first, per_sample_weights=weight, mode="sum")
    return out.unflatten(0, (-1, size, size)).permute(0, 3, 1, 2)


def bilinear_neighbour(x, length, second):
    """Lower (second 0) or upper (1) neighbour of points x on an axis, and its weight.

    Cells are at 0 ... length - 1. Points up to one cell outside are clamped, farther
    ones weigh 0 (torchvision's roi_align).
    """
    inside = (x >= -1) & (x <= length)
    x = x.clamp(min=0).clamp(max=length - 1)
    low = x.floor()
    weight = (1 - second - (x - low)).abs() * inside  # 1 - fraction, or the fraction
    return (low + second).clamp(max=length - 1).long(), weight


def mask_targets(masks, boxes, which, size):
    """Each region's object, (R, size, size) bool: roi_align of its mask, at least 0.5.

    masks (n, H, W) bool, boxes (R, 4), which (R,): the index of each region's mask.
    """
    out = torch.zeros(len(boxes), size, size, dtype=torch.bool, device=boxes.device)
    for i in which.unique().tolist():
        mine = which == i
        left, top, right, bottom = (boxes[mine] - 0.5).unbind(dim=1)
        down = bin_weights(top, bottom, size, masks.shape[1])
        across = bin_weights(left, right, size, masks.shape[2])
        out[mine] = down @ masks[i].float() @ across.transpose(1, 2) >= 0.5
    return out


def bin_weights(low, high, size, length):
    """The weight of each pixel of an axis in each bin of the regions: (R, size, length).

    low, high (R,): their ends. The mean in roi_align is separable.
    """
    points = ((high - low) / size).ceil().clamp(min=1)[:, None, None]
    k = torch.arange(int(points.max()), device=low.device)
    at = (torch.arange(size, device=low.device)[:, None] + (k + 0.5) / points) / size
    at = low[:, None, None] + at * (high - low)[:, None, None]  # (R, size, points)
    weights = at.new_zeros(len(at), size, length)
    for second in (0, 1):
        pixel, share = bilinear_neighbour(at, length, second)
        weights.scatter_add_(2, pixel, share * (k < points) / points)
    return weights
