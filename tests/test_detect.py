"""tasks/detect.py against independent formulations: plain loops, dense matrices, hand-made boxes."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import kernels
import model as models
from tasks import detect
from tasks.detect import Detector
from tasks.scenes import ToyScenes, paste_masks

# Four blocks, of which each is the last of its quarter, would all be global: eight.
TINY = {"size": "16x8x2", "image_size": 64, "patch_size": 8, "window": 3, "scales": (2, 1)}
TINY |= {"anchor_sizes": (8, 16, 32), "features": 16, "convolutions": 1, "hidden": 16}
TINY |= {"anchors": 16, "rois": 8, "before_nms": (50, 50), "after_nms": 50}


def random_boxes(number, side, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(number, 2, generator=generator) * side * 0.7
    size = 4 + torch.rand(number, 2, generator=generator) * side * 0.3
    return torch.cat([low, low + size], dim=1)


def scramble(model, std=0.3):
    """Every parameter random: what starts at zero hides mistakes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, std)
    return model


def scene(side, seed):
    """Two filled rectangles of two classes on noise, and their target."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(3, side, side, generator=generator) * 0.1
    boxes = torch.tensor([[6.0, 10, 30, 28], [34, 30, 50, 60]]).roll(seed, 0)
    boxes[:, 0::2] += 3 * seed
    masks = torch.zeros(2, side, side, dtype=torch.bool)
    for number, (x0, y0, x1, y1) in enumerate(boxes.int().tolist()):
        masks[number, y0:y1, x0:x1] = True
        image[number, y0:y1, x0:x1] += 2
    target = {"boxes": boxes, "labels": torch.arange(2), "masks": masks}
    return image, target | {"size": (side, side), "seed": seed}


def intersection_over_union(one, other):
    return (one & other).sum() / (one | other).sum()


# ---------------------------------------------------------------------------------------- the trunk


@pytest.mark.parametrize("grid, window", [((4, 4), 3), ((4, 6), 2), ((3, 5), 0)])
def test_attention_in_windows_is_full_attention_under_a_mask(grid, window):
    """On a grid filled up with zeros, with the bias as a sum over each pair of tokens."""
    attention = scramble(detect.WindowAttention(8, 2, grid, window)).double()
    x = torch.randn(2, grid[0] * grid[1], 8, dtype=torch.float64)
    rows, columns = (math.ceil(n / (window or n)) * (window or n) for n in grid)
    padded = torch.zeros(2, rows, columns, 8, dtype=torch.float64)
    padded[:, : grid[0], : grid[1]] = x.unflatten(1, grid)
    q, k, v = kernels.split_heads(attention.qkv(padded.flatten(1, 2)), 2)
    scores = q @ k.transpose(2, 3) / math.sqrt(4)
    high, wide = (window, window) if window else grid
    down, across = attention.rel_pos_h, attention.rel_pos_w  # a row for each distance
    for i, j in itertools.product(range(rows * columns), repeat=2):
        (y, x0), (y2, x2) = divmod(i, columns), divmod(j, columns)
        relative = (
            down[(y - y2 + high - 1) % len(down)] + across[(x0 - x2 + wide - 1) % len(across)]
        )
        same = (y // high, x0 // wide) == (y2 // high, x2 // wide)
        scores[:, :, i, j] += q[:, :, i] @ relative if same else -math.inf
    expected = (scores.softmax(dim=3) @ v).transpose(1, 2).unflatten(1, (rows, columns)).flatten(3)
    expected = attention.proj(expected[:, : grid[0], : grid[1]].flatten(1, 2))
    torch.testing.assert_close(attention(x), expected)


def test_only_the_last_block_of_each_quarter_is_global():
    with torch.device("meta"):
        for size, wanted in ("B", [2, 5, 8, 11]), ("L", [5, 11, 17, 23]), ("H", [7, 15, 23, 31]):
            trunk = detect.Trunk(size, 1024, 14)
            assert [i for i, block in enumerate(trunk.blocks) if not block.attn.window] == wanted
            assert trunk.grid == (64, 64)  # H has patches of 14 pixels: resized


def test_trunk_with_zero_tables_is_the_vit_without_class_token():
    trunk = detect.Detector(**TINY | {"window": 0}).trunk
    images = torch.randn(2, 3, 64, 64)
    x = trunk.embed(models.patchify(images, 8)) + trunk.pos_embed[:, 1:]
    for block in trunk.blocks:
        x = x + block.attn.proj(kernels.reference(block.attn.qkv(block.norm1(x)), 2))
        x = x + block.mlp(block.norm2(x))
    expected = x.transpose(1, 2).reshape(2, 16, 8, 8)
    torch.testing.assert_close(trunk(images), expected, rtol=1e-4, atol=1e-5)


def test_weights_of_other_models_load():
    vit = models.MAE("16x8x2", (16, 1, 2), image_size=32, patch_size=8)
    model = Detector(**TINY)
    said = detect.load_trunk(model, vit.state_dict(), (4, 4))
    assert "pos_embed from 4x4 to 8x8" in said and "dropped: class token" in said
    for name in "patch_embed.proj.weight", "blocks.7.attn.qkv.weight", "blocks.0.mlp.fc1.weight":
        assert torch.equal(model.trunk.state_dict()[name], vit.state_dict()[name])
    # A larger image: tables of global blocks grow, those of windows are as they were.
    scramble(model)
    large = Detector(**TINY | {"image_size": 96, "classes": 7})
    said = detect.load_trunk(large, model.state_dict(), (8, 8))
    assert "blocks.1.attn.rel_pos_h resampled from 15 to 23" in said and "blocks.0." not in said
    own, theirs = large.state_dict(), model.state_dict()
    assert torch.equal(own["boxes.0.fc.weight"], theirs["boxes.0.fc.weight"])
    assert own["boxes.0.class_predictor.weight"].shape[0] == 8
    name = "trunk.blocks.1.attn.rel_pos_h"
    torch.testing.assert_close(own[name][11], theirs[name][7])  # the middle
    # Patches of 14 pixels are resized to 16.
    vit = models.ViT("16x4x2", 28, 14)
    model = Detector(**TINY | {"size": "16x4x2", "patch_size": 14})
    assert model.patch_size == 16
    assert "14x14 to 16x16" in detect.load_trunk(model, vit.state_dict())
    expected = F.interpolate(vit.patch_embed["proj"].weight, (16, 16), mode="bicubic")
    assert torch.equal(model.trunk.patch_embed["proj"].weight, expected)


def test_weights_and_sizes_that_do_not_fit_are_refused():
    model, deeper = Detector(**TINY), models.ViT("16x9x2", 32, 8)
    with pytest.raises(ValueError, match="boxes.0.fc.weight"):
        detect.load_trunk(Detector(**TINY | {"hidden": 8}), model.state_dict())
    with pytest.raises(ValueError, match="blocks.8"):
        detect.load_trunk(model, deeper.state_dict())
    with pytest.raises(ValueError, match="want two patches of 8"):
        Detector(**TINY | {"image_size": 8})


# --------------------------------------------------------------------------------- boxes and regions


def test_deltas_move_boxes_onto_the_truth():
    boxes, truth = random_boxes(20, 64), random_boxes(20, 64, seed=1)
    deltas = detect.box_deltas(boxes, truth, (10.0, 5.0))
    torch.testing.assert_close(detect.apply_deltas(deltas, boxes, (64, 64), (10.0, 5.0)), truth)
    # Worked by hand: moved by half a width, twice as high; and growth that is limited.
    deltas = detect.box_deltas(torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[2.0, -2, 6, 6]]))
    torch.testing.assert_close(deltas, torch.tensor([[0.5, 0, 0, math.log(2)]]))
    deltas, box = torch.tensor([[0.0, 0, 9, 2]]), torch.tensor([[200.0, 200, 202, 202]])
    x0, y0, x1, y1 = detect.apply_deltas(deltas, box, (400, 400))[0].tolist()
    assert (x1 - x0, y1 - y0) == pytest.approx((2 * 1000 / 16, 2 * math.exp(2)))


def test_anchors_by_level_cell_and_ratio():
    anchors, levels = detect.make_anchors([(2, 3), (1, 1)], [4, 8], [8, 32])
    assert anchors.shape == (21, 4) and levels.tolist() == [0] * 18 + [1] * 3
    sides = anchors[:, 2:] - anchors[:, :2]
    torch.testing.assert_close(sides.prod(dim=1), torch.tensor([64.0] * 18 + [1024.0] * 3))
    torch.testing.assert_close(sides[:3, 1] / sides[:3, 0], torch.tensor([0.5, 1, 2]))
    assert anchors[3 * 5 + 1].tolist() == [8 - 4, 4 - 4, 8 + 4, 4 + 4]  # row 1, column 2, square


def test_anchors_are_labelled_by_the_rules():
    truth = torch.tensor([[0.0, 0, 10, 10], [100, 100, 110, 110]])
    # IoUs of 0.72, 0.68, 0.32 and 0.28; one of 0.4, to which no other is nearer; and of 0.
    anchors = [[0, 0, 10, height] for height in (7.2, 6.8, 3.2, 2.8)]
    anchors = torch.tensor([*anchors, [100, 100, 104, 110], [50, 50, 60, 60]])
    label, index = detect.label_anchors(anchors, truth)
    assert label.tolist() == [1, -1, -1, 0, 1, 0]
    assert index[[0, 4]].tolist() == [0, 1]
    assert detect.label_anchors(anchors, torch.zeros(1, 4))[0].tolist() == [0] * 6


def test_samples_are_capped_and_the_same_for_a_seed():
    label = torch.tensor([1] * 30 + [0] * 50 + [-1] * 10)
    keys = [torch.rand(90, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    (ids, positives), (again, _), (other, _) = (
        detect.draw_samples(label, 40, 20, key) for key in keys
    )
    assert positives == 20 and len(ids.unique()) == 40
    assert (label[ids[:20]] == 1).all() and (label[ids[20:]] == 0).all()
    assert torch.equal(ids, again)
    for part in slice(20), slice(20, None):
        assert set(ids[part].tolist()) != set(other[part].tolist())


@pytest.mark.parametrize("block, limit", [(7, 1000), (1024, 1000), (16, 20)])
def test_nms_is_the_greedy_one(block, limit):
    boxes = random_boxes(300, 100).round()
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 20, (300,), generator=generator) / 20  # with many ties
    groups = torch.randint(0, 3, (300,), generator=generator)
    kept = []
    for i in sorted(range(300), key=lambda i: (-scores[i], i)):
        same = [j for j in kept if groups[j] == groups[i]]
        if not same or detect.overlaps(boxes[same], boxes[i : i + 1]).max() <= 0.4:
            kept.append(i)
    found = detect.nms(boxes, scores, groups, 0.4, limit, block)
    assert found.tolist() == kept[:limit] and len(kept) > 20
    assert len(detect.nms(boxes[:0], scores[:0], groups[:0], 0.4, 10)) == 0


def align(image, box, scale, size):
    """torchvision's published rule on image (C, H, W), by F.grid_sample.

    Of each of size x size cells the mean of samples at most a pixel apart. Samples up to a pixel
    outside count as the border's, farther ones as zero.
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


def test_roi_align_is_the_published_definition():
    torch.manual_seed(0)
    maps = [torch.randn(3, 16, 12), torch.randn(3, 8, 6)]
    table = torch.cat([x.flatten(1).T for x in maps]).requires_grad_()
    boxes = torch.tensor(BOXES, dtype=torch.float32)
    grids, strides = [(16, 12), (8, 6)], [4, 8]
    found = detect.roi_align(table, grids, strides, boxes, 3)
    levels = [int(math.sqrt((b[2] - b[0]) * (b[3] - b[1])) >= 112) for b in BOXES]
    expected = [align(maps[l], b, 1 / strides[l], 3) for b, l in zip(BOXES, levels)]
    torch.testing.assert_close(found, torch.stack(expected))
    # A region of 112 pixels and more is read from the second level.
    large = torch.tensor([[-30.0, -30, 82, 82], [-30, -30, 81, 81]])
    found = detect.roi_align(table, grids, strides, large, 3)
    torch.testing.assert_close(found[0], align(maps[1], large[0].tolist(), 1 / 8, 3))
    torch.testing.assert_close(found[1], align(maps[0], large[1].tolist(), 1 / 4, 3))
    # It is linear: the gradient is what a difference says, exactly.
    weight, step = torch.randn_like(found), torch.randn_like(table)
    (found * weight).sum().backward()
    moved = detect.roi_align(table.detach() + step, grids, strides, large, 3)
    torch.testing.assert_close((table.grad * step).sum(), ((moved - found) * weight).sum().detach())
    assert detect.roi_align(table, grids, strides, boxes[:0], 3).shape == (0, 3, 3, 3)


def test_mask_targets_are_roi_align_over_one_half_and_pasting_undoes_them():
    y, x = torch.meshgrid(torch.arange(60), torch.arange(70), indexing="ij")
    masks = torch.stack([(x - 30) ** 2 + (y - 25) ** 2 < 400, x + y > 50])
    boxes = torch.tensor([[10.0, 5, 51, 46], [20, 10, 64.5, 50.2], [12, 10, 18, 16]])
    which = torch.tensor([0, 1, 0])
    found = detect.mask_targets(masks, boxes, which, 10)
    for target, box, i in zip(found, boxes.tolist(), which):
        assert torch.equal(target, align(masks[i, None].float(), box, 1, 10)[0] >= 0.5)
    pasted = paste_masks(found[:1].float(), boxes[:1], (60, 70))[0]
    assert intersection_over_union(pasted, masks[0]) > 0.9
    whole = paste_masks(torch.ones(1, 28, 28), torch.tensor([[10.0, 5, 20, 15]]), (60, 70))
    assert torch.equal(whole[0], (x >= 10) & (x < 20) & (y >= 5) & (y < 15))


# ------------------------------------------------------------------------------------- the detector


@pytest.mark.parametrize("size, scales", [((48, 64), (2, 1)), ((72, 56), (2, 1, 0.5))])
def test_predictions_are_in_the_order_of_cells_and_anchors(size, scales):
    """Odd maps and the pooled level included."""
    sizes = TINY["anchor_sizes"] + (64,) * (len(scales) - 2)
    changes = {"image_size": size, "scales": scales, "anchor_sizes": sizes}
    model, images = scramble(Detector(**TINY | changes), 0.2), torch.randn(2, 3, *size)
    table, scores, deltas = (x[1] for x in model.predict(images))
    maps = [x[1] for x in model.pyramid(model.trunk(images))]
    assert [x.shape[1:] for x in maps] == model.grids
    torch.testing.assert_close(table, torch.cat([x.flatten(1).T for x in maps]))
    found = [model.rpn(x[None])[0].flatten(1).T for x in maps]  # (cells, 3 + 12)
    torch.testing.assert_close(scores, torch.cat([x[:, :3].flatten() for x in found]))
    torch.testing.assert_close(deltas, torch.cat([x[:, 3:].reshape(-1, 4) for x in found]))
    assert len(scores) == len(model.anchors)


def test_an_images_loss_depends_on_it_alone():
    model = Detector(**TINY | {"classes": 2, "drop_path": 0.5}).train()
    images, targets = zip(*(scene(64, seed) for seed in range(2)))
    nothing = {name: value[:0] for name, value in targets[0].items() if torch.is_tensor(value)}
    targets = [*targets, targets[0] | nothing | {"seed": 5}, targets[0] | {"masks": None}]
    images = torch.stack([*images, images[0], images[0]])
    together, parts = model(images, targets)
    torch.testing.assert_close(together, sum(parts.values()))
    for i, target in enumerate(targets):
        alone, _ = model(images[i : i + 1], [target])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)
    assert parts["mask"][2] == 0 == parts["mask"][3] and parts["box_0"][2] == 0
    # Every parameter has a gradient, with or without objects: sharded, all processes must agree.
    together[2].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def proposed(model, scores, deltas, most, size):
    """A level at a time, with detectron2's numbers."""
    boxes, values = [], []
    for level in range(3):
        ids = (model.levels == level).nonzero()[:, 0]
        ids = ids[scores[ids].argsort(descending=True)[:most]]
        found = detect.apply_deltas(deltas[ids], model.anchors[ids], size)
        kept = detect.nms(found, scores[ids], ids * 0, 0.7, 10_000)
        boxes.append(found[kept])
        values.append(scores[ids][kept])
    return torch.cat(boxes)[torch.cat(values).argsort(descending=True)]


def cascade(model, table, rois, size):
    """Of each of three stages: the regions, logits, deltas; and the regions that come out."""
    for head, weights in zip(model.boxes, [(10, 5), (20, 10), (30, 15)]):
        logits, moves = head(detect.roi_align(table, model.grids[:2], [4, 8], rois, 7))
        yield rois, logits, moves, weights
        rois = detect.apply_deltas(moves.detach(), rois, size, weights)
    yield rois, None, None, None


@pytest.mark.parametrize("federated, sure", [(0, 0.3), (3, 0.5)])
def test_losses_and_detections_are_the_references(federated, sure):
    """With more to sample than there is, and all classes judged, nothing is random."""
    changes = {"classes": 3, "anchors": 5000, "rois": 900, "before_nms": (60, 40)}
    changes |= {"federated": federated, "class_counts": [1] * 3, "score_threshold": sure}
    model = Detector(**TINY | changes | {"after_nms": 900})
    scramble(model.rpn, 0.05)
    for head in model.boxes:
        scramble(head.class_predictor, 0.3)
        scramble(head.delta_predictor, 0.3)
    image, target = scene(64, 0)
    target, size = target | {"labels": torch.tensor([2, 1])}, (64, 64)
    truth, labels = target["boxes"], target["labels"]
    table, scores, deltas = (x[0] for x in model.predict(image[None]))
    parts = model(image[None], [target])[1]

    label, index = detect.label_anchors(model.anchors, truth)
    positive, some = label == 1, label >= 0
    loss = F.binary_cross_entropy_with_logits(scores[some], label[some].float(), reduction="sum")
    wanted = detect.box_deltas(model.anchors, truth[index])
    expected = {"rpn_class": loss / 5000}
    expected["rpn_box"] = (deltas - wanted)[positive].abs().sum() / 5000
    rois = torch.cat([proposed(model, scores, deltas, 60, size), truth])
    stages = cascade(model, table, rois, size)
    for stage, least in enumerate([0.5, 0.6, 0.7]):
        rois, logits, moves, weights = next(stages)
        iou, index = detect.overlaps(rois, truth).max(dim=1)
        positive = iou >= least
        assert 2 < positive.sum() < len(rois) - 2  # there is something to go wrong
        label = labels[index].where(positive, 3)
        loss = F.cross_entropy(logits, label, reduction="sum")
        if federated:  # each class on its own, and no background
            each = F.one_hot(label, 4)[:, :3].float()
            loss = F.binary_cross_entropy_with_logits(logits[:, :3], each, reduction="sum")
        expected[f"class_{stage}"] = loss / 900
        wanted = detect.box_deltas(rois, truth[index], weights)
        expected[f"box_{stage}"] = (moves - wanted)[positive].abs().sum() / 900
        if stage == 0:
            x = model.mask(detect.roi_align(table, model.grids[:2], [4, 8], rois[positive], 14))
            x = x[range(len(x)), labels[index[positive]]]
            shapes = detect.mask_targets(target["masks"], rois[positive], index[positive], 28)
            expected["mask"] = F.binary_cross_entropy_with_logits(x, shapes.float())
    assert parts.keys() == expected.keys()
    for name, value in parts.items():
        torch.testing.assert_close(value[0], expected[name].detach(), rtol=1e-4, atol=1e-6)

    found = model.eval().detect(image[None], [size])[0]
    rois = proposed(model, scores, deltas, 40, size)
    *stages, (rois, *_) = cascade(model, table, rois, size)
    logits = torch.stack([logits for _, logits, *_ in stages])
    score = (logits.sigmoid() if federated else logits.softmax(dim=2)).mean(dim=0)[:, :3]
    assert 10 < (score > sure).sum() < score.numel()
    boxes, values, names = [], [], []
    for name in range(3):
        some = score[:, name] > sure
        kept = detect.nms(rois[some], score[some, name], some[some].long(), 0.5, 10_000)
        boxes.append(rois[some][kept])
        values.append(score[some, name][kept])
        names += [name] * len(kept)
    order = torch.cat(values).argsort(descending=True)[:100]
    torch.testing.assert_close(found["scores"], torch.cat(values)[order])
    torch.testing.assert_close(found["boxes"], torch.cat(boxes)[order])
    assert found["labels"].tolist() == torch.tensor(names)[order].tolist()


def record(monkeypatch, name, change=lambda result: result):
    """Replace a function of detect by one that changes its result: [(arguments, result)]."""
    calls, function = [], getattr(detect, name)

    def recorded(*arguments):
        result = change(function(*arguments))
        calls.append((arguments, result))
        return result

    monkeypatch.setattr(detect, name, recorded)
    return calls


def test_which_samples_are_drawn(monkeypatch):
    """Half of the anchors, a quarter of the regions are positive at most, inside the picture, and
    in whatever order they come: rounding, which differs with the number of processes, changes it."""
    model, (image, target) = scramble(Detector(**TINY), 0.2), scene(64, 0)
    drawn, loss = record(monkeypatch, "draw_samples"), model(image[None], [target])[0]
    assert [how[1:3] for how, _ in drawn] == [(16, 8), (8, 2)]
    turned = record(monkeypatch, "nms", lambda kept: kept.flip(0))
    torch.testing.assert_close(model(image[None], [target])[0], loss)
    assert len(turned[0][1]) > TINY["rois"]
    seen = record(monkeypatch, "roi_align")
    Detector(**TINY | {"rois": 50})(image[None], [target | {"size": (60, 50)}])
    boxes = torch.cat([how[3] for how, _ in seen])
    assert len(seen) == 4 and (boxes <= torch.tensor([50, 60, 50, 60])).all()


def test_each_stage_of_the_cascade_gives_a_third_of_its_gradient():
    model, rois = scramble(Detector(**TINY), 0.2), random_boxes(5, 60)
    table = torch.randn(16 * 16 + 8 * 8 + 4 * 4, 16, requires_grad=True)
    whole = model.boxes[1](detect.roi_align(table, [(16, 16), (8, 8)], [4, 8], rois, 7))
    scaled = model.run_stage(1, table, rois)
    torch.testing.assert_close(scaled, whole)
    whole, scaled = (torch.autograd.grad(out[1].sum(), table)[0] for out in (whole, scaled))
    torch.testing.assert_close(3 * scaled, whole)


def test_federated_loss_judges_the_classes_present_and_some_others():
    model = Detector(**TINY | {"classes": 40, "federated": 10, "class_counts": [1] * 20 + [0] * 20})
    judged = model.federated_classes(torch.tensor([3, 3, 30]), torch.Generator().manual_seed(0))
    assert {3, 30} <= set(judged.tolist()) and len(judged.unique()) == len(judged) == 10
    assert (judged < 20).sum() == 9  # of the others none that has no image
    # By the root of how many images they are in: 9 times as many are drawn 3 times as often.
    rare = Detector(**TINY | {"classes": 2, "federated": 1, "class_counts": [1, 9]})
    none, draw = torch.zeros(0, dtype=torch.long), torch.Generator().manual_seed(0)
    drawn = [rare.federated_classes(none, draw).item() for _ in range(500)]
    assert sum(drawn) / 500 == pytest.approx(0.75, abs=0.08)
    image, target = scene(64, 0)
    loss, parts = model(image[None], [target])
    # Ten sigmoids of nearly 0 on each of 8 regions or fewer.
    assert 0 < parts["class_0"] <= 10.2 * math.log(2)
    loss.sum().backward()


def test_two_scenes_are_learned_by_heart_and_found():
    """Some seconds: with fewer steps, the last stage has not seen enough regions of IoU 0.7."""
    torch.manual_seed(0)
    changes = {"size": "32x2x2", "classes": 2, "features": 32, "hidden": 64, "rois": 16}
    model = Detector(**TINY | changes)
    images, targets = zip(*(scene(64, seed) for seed in range(2)))
    images, sizes = torch.stack(images), [(64, 64)] * 2
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for step in range(120):
        loss = model(images, [t | {"seed": 2 * step + i} for i, t in enumerate(targets)])[0].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    model.eval()
    for found, target in zip(model.detect(images, sizes), targets):
        for label, box, mask in zip(target["labels"], target["boxes"], target["masks"]):
            best = (found["labels"] == label).nonzero()[:1, 0]  # the surest of its class
            assert found["scores"][best] > 0.5
            assert detect.overlaps(found["boxes"][best], box[None]) > 0.8
            pasted = paste_masks(found["masks"][best], found["boxes"][best], (64, 64))[0]
            assert intersection_over_union(pasted, mask) > 0.8
    clipped = model.detect(images, [(40, 50)] * 2)[0]["boxes"]
    assert (clipped <= torch.tensor([50, 40, 50, 40])).all()
    # The config makes it again.
    twin = Detector(**model.config).eval()
    twin.load_state_dict(model.state_dict())
    again, once = (m.detect(images, sizes)[0]["boxes"] for m in (twin, model))
    assert torch.equal(again, once)
    # Grey scenes of the toy world are measured.
    grey, scenes = Detector(**TINY | {"channels": 1, "classes": 10}), ToyScenes("val", 64, 3)
    assert list(detect.detect_in(grey, scenes)) == list(scenes.ids)


def test_initial_weights_of_the_heads_are_detectron2s():
    model = Detector(**TINY)
    stds = {model.rpn[0]: 0.01, model.rpn[4]: 0.01, model.mask.predictor: 0.001}
    stds |= {model.boxes[2].class_predictor: 0.01, model.boxes[2].delta_predictor: 0.001}
    stds |= {model.boxes[0].body[0][0]: math.sqrt(2 / (16 * 9))}
    for module, std in stds.items():
        assert module.weight.std().item() == pytest.approx(std, rel=0.3)
    assert not model.trunk.blocks[0].attn.rel_pos_h.any()


def test_flops_are_what_the_layers_cost():
    """The trunk's by hand: 8 blocks of width 16 on 64 tokens, windows on 81 of them."""
    model = Detector(**TINY | {"masks": False})
    D, N, padded, window = 16, 64, 81, 9
    linear = 8 * 18 * D * D * N + 4 * 6 * D * D * (N + padded)
    attention = 4 * 4 * D * (N * N + padded * window)
    relative = 4 * 2 * D * (N * 16 + padded * 6)  # a product with each row, each column
    trunk = 2 * 3 * 64 * D * N + linear + attention + relative
    C = model.settings["features"]
    cells = [16 * 16, 8 * 8, 4 * 4]
    pyramid = (
        2 * D * D // 2 * 4 * 64 + 2 * (D // 2 * C * 256 + D * C * 64) + 18 * C * C * (256 + 64)
    )
    rpn = sum(cells) * (2 * 18 * C * C + 2 * C * 15)
    box = 3 * 8 * (49 * 18 * C * C + 2 * 49 * C * 16 + 2 * 16 * (81 + 4))
    assert detect.detector_flops(model) == trunk + pyramid + rpn + box
