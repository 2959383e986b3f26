"""tasks/regions.py against plain loops, F.grid_sample and boxes worked by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from tasks import regions
from tasks.scenes import paste_masks


def random_boxes(number, side, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(number, 2, generator=generator) * side * 0.7
    size = 4 + torch.rand(number, 2, generator=generator) * side * 0.3
    return torch.cat([low, low + size], dim=1)


def intersection_over_union(one, other):
    return (one & other).sum() / (one | other).sum()


# -------------------------------------------------------------------------------------------- boxes


def test_deltas_move_boxes_onto_the_truth():
    boxes, truth = random_boxes(20, 64), random_boxes(20, 64, seed=1)
    deltas = regions.box_deltas(boxes, truth, (10.0, 5.0))
    torch.testing.assert_close(regions.apply_deltas(deltas, boxes, (64, 64), (10.0, 5.0)), truth)
    # Worked by hand: moved by half a width, twice as high; and growth that is limited.
    deltas = regions.box_deltas(torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[2.0, -2, 6, 6]]))
    torch.testing.assert_close(deltas, torch.tensor([[0.5, 0, 0, math.log(2)]]))
    deltas, box = torch.tensor([[0.0, 0, 9, 2]]), torch.tensor([[200.0, 200, 202, 202]])
    x0, y0, x1, y1 = regions.apply_deltas(deltas, box, (400, 400))[0].tolist()
    assert (x1 - x0, y1 - y0) == pytest.approx((2 * 1000 / 16, 2 * math.exp(2)))


def test_anchors_by_level_cell_and_ratio():
    anchors, levels = regions.make_anchors([(2, 3), (1, 1)], [4, 8], [8, 32])
    assert anchors.shape == (21, 4) and levels.tolist() == [0] * 18 + [1] * 3
    sides = anchors[:, 2:] - anchors[:, :2]
    torch.testing.assert_close(sides.prod(dim=1), torch.tensor([64.0] * 18 + [1024.0] * 3))
    torch.testing.assert_close(sides[:3, 1] / sides[:3, 0], torch.tensor([0.5, 1, 2]))
    assert anchors[3 * 5 + 1].tolist() == [8 - 4, 4 - 4, 8 + 4, 4 + 4]  # row 1, column 2, square


def test_anchors_are_labelled_by_the_rules():
    truth = torch.tensor([[0.0, 0, 10, 10], [100, 100, 110, 110]])
    # IoUs of 0.9, 0.72, 0.68, 0.32 and 0.28; one of 0.4, to which no other is nearer;
    # and of 0.
    anchors = [[0, 0, 10, height] for height in (9, 7.2, 6.8, 3.2, 2.8)]
    anchors = torch.tensor([*anchors, [100, 100, 104, 110], [50, 50, 60, 60]])
    label, index = regions.label_anchors(anchors, truth)
    assert label.tolist() == [1, 1, -1, -1, 0, 1, 0] and index[[0, 5]].tolist() == [0, 1]
    assert regions.label_anchors(anchors, torch.zeros(1, 4))[0].tolist() == [0] * 7


def test_samples_are_capped_and_those_of_the_smallest_keys():
    label = torch.tensor([1] * 30 + [0] * 50 + [-1] * 10)
    keys = torch.rand(90, generator=torch.Generator().manual_seed(0))
    ids, positives = regions.draw_samples(label, 40, 20, keys)
    smallest = lambda first, stop: sorted(range(first, stop), key=lambda i: keys[i])[:20]
    assert positives == 20 and ids.tolist() == smallest(0, 30) + smallest(30, 80)
    ids, positives = regions.draw_samples(label[20:], 40, 20, keys[20:])  # few positives
    assert positives == 10 and len(ids.unique()) == 40


@pytest.mark.parametrize("block, limit", [(7, 1000), (1024, 1000), (16, 20)])
def test_nms_is_the_greedy_one(block, limit):
    boxes = random_boxes(300, 100).round()
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 20, (300,), generator=generator) / 20  # with many ties
    groups = torch.randint(0, 3, (300,), generator=generator)
    kept = []
    for i in sorted(range(300), key=lambda i: (-scores[i], i)):
        same = [j for j in kept if groups[j] == groups[i]]
        if not same or regions.overlaps(boxes[same], boxes[i : i + 1]).max() <= 0.4:
            kept.append(i)
    found = regions.nms(boxes, scores, groups, 0.4, limit, block)
    assert found.tolist() == kept[:limit] and len(kept) > 20
    assert len(regions.nms(boxes[:0], scores[:0], groups[:0], 0.4, 10)) == 0


# ------------------------------------------------------------------------------- features and masks


def align(image, box, scale, size):
    """torchvision's published rule on image (C, H, W), by F.grid_sample.

    Of each of size x size cells the mean of samples at most a pixel apart. Samples up
    to a pixel outside count as the border's, farther ones as zero.
    """
    x0, y0, x1, y1 = (value * scale - 0.5 for value in box)
    high, wide = (math.ceil(side / size) for side in (y1 - y0, x1 - x0))  # samples of a cell
    y = y0 + (torch.arange(size * high) + 0.5).double() * (y1 - y0) / (size * high)
    x = x0 + (torch.arange(size * wide) + 0.5).double() * (x1 - x0) / (size * wide)
    y, x = torch.meshgrid(y, x, indexing="ij")
    _, height, width = image.shape
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=2)
    border = {"padding_mode": "border", "align_corners": True}
    values = F.grid_sample(image[None].double(), grid[None], **border)
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    return F.avg_pool2d(values * inside, (high, wide))[0].float()


BOXES = [[3, 5, 40, 61], [0, 0, 64, 64], [-9, 30, 20, 90], [60, 60, 70, 66], [10, 10, 12, 11]]
BOXES += [[-30, -30, 82, 82], [-30, -30, 81, 81]]  # of 112 and 111 pixels


def test_roi_align_is_the_published_definition():
    """A region of 112 pixels and more is read from the second level."""
    torch.manual_seed(0)
    maps = [torch.randn(3, 16, 12), torch.randn(3, 8, 6)]
    table = torch.cat([x.flatten(1).T for x in maps]).requires_grad_()
    where = [(16, 12), (8, 6)], [4, 8], torch.tensor(BOXES, dtype=torch.float32)
    found = regions.roi_align(table, *where, 3)
    levels = [0, 0, 0, 0, 0, 1, 0]
    expected = [align(maps[i], box, [1 / 4, 1 / 8][i], 3) for i, box in zip(levels, BOXES)]
    torch.testing.assert_close(found, torch.stack(expected))
    # It is linear: the gradient is what a difference says, exactly.
    weight, step = torch.randn_like(found), torch.randn_like(table)
    (found * weight).sum().backward()
    change = ((regions.roi_align(table.detach() + step, *where, 3) - found) * weight).sum()
    torch.testing.assert_close((table.grad * step).sum(), change.detach())
    assert regions.roi_align(table, *where[:2], where[2][:0], 3).shape == (0, 3, 3, 3)


def test_mask_targets_are_roi_align_over_one_half_and_pasting_undoes_them():
    y, x = torch.meshgrid(torch.arange(60), torch.arange(70), indexing="ij")
    masks = torch.stack([(x - 30) ** 2 + (y - 25) ** 2 < 400, x + y > 50])
    boxes = torch.tensor([[10.0, 5, 51, 46], [20, 10, 64.5, 50.2], [12, 10, 18, 16]])
    which = torch.tensor([0, 1, 0])
    found = regions.mask_targets(masks, boxes, which, 10)
    for target, box, i in zip(found, boxes.tolist(), which):
        assert torch.equal(target, align(masks[i, None].float(), box, 1, 10)[0] >= 0.5)
    pasted = paste_masks(found[:1].float(), boxes[:1], (60, 70))[0]
    assert intersection_over_union(pasted, masks[0]) > 0.9
    whole = paste_masks(torch.ones(1, 28, 28), torch.tensor([[10.0, 5, 20, 15]]), (60, 70))
    assert torch.equal(whole[0], (x >= 10) & (x < 20) & (y >= 5) & (y < 15))
