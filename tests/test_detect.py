"""tasks/detect.py against independent formulations: plain loops and losses written out."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from test_regions import intersection_over_union, random_boxes

import kernels
import model as models
from tasks import detect, regions
from tasks.detect import Detector
from tasks.scenes import ToyScenes, paste_masks
from tasks.video import RelativeAttention

# Four blocks, of which each is the last of its quarter, would all be global: eight.
TINY = {"size": "16x8x2", "image_size": 64, "patch_size": 8, "window": 3, "scales": (2, 1)}
TINY |= {"anchor_sizes": (8, 16, 32), "features": 16, "convolutions": 1, "hidden": 16}
TINY |= {"anchors": 16, "rois": 8, "before_nms": (50, 50), "after_nms": 50}


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


# ---------------------------------------------------------------------------------------- the trunk


@pytest.mark.parametrize("grid", [(4, 4), (4, 6), (3, 5)])
def test_attention_in_windows_is_attention_on_each_of_them(grid):
    """On a grid filled up with zeros to whole windows, of 3 x 3 tokens."""
    (rows, columns), alone = grid, scramble(RelativeAttention(8, 2, (3, 3)))
    attention = detect.WindowAttention(8, 2, grid, 3)
    attention.load_state_dict(alone.state_dict())
    x = torch.randn(2, rows * columns, 8)
    expected = torch.zeros(2, 6, 6, 8)
    expected[:, :rows, :columns] = x.unflatten(1, grid)
    for y, x0 in itertools.product((0, 3), repeat=2):
        window = expected[:, y : y + 3, x0 : x0 + 3]
        window[:] = alone(window.flatten(1, 2)).detach().unflatten(1, (3, 3))
    torch.testing.assert_close(attention(x), expected[:, :rows, :columns].flatten(1, 2))


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
    assert "newly initialised: boxes.class_predictor, mask.predictor, dropped: none" in said
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
    part = {n: t for n, t in model.state_dict().items() if n != "boxes.1.fc.bias"}
    with pytest.raises(ValueError, match="boxes.1.fc.bias"):
        detect.load_trunk(model, part)
    with pytest.raises(ValueError, match="blocks.8"):
        detect.load_trunk(model, deeper.state_dict())
    with pytest.raises(ValueError, match="want two patches of 8"):
        Detector(**TINY | {"image_size": 8})


# ------------------------------------------------------------------------------------- the detector


@pytest.mark.parametrize("size, scales", [((48, 64), (2, 1)), ((72, 56), (2, 1, 0.5))])
def test_predictions_are_in_the_order_of_cells_and_anchors(size, scales):
    """Odd maps and the pooled level included."""
    sizes = TINY["anchor_sizes"] + (64,) * (len(scales) - 2)
    changes = {"image_size": size, "scales": scales, "anchor_sizes": sizes}
    model, images = scramble(Detector(**TINY | changes), 0.2), torch.randn(2, 3, *size)
    table, scores, deltas = (x[1] for x in model.predict(images))
    maps = [x[1] for x in model.maps(images)]
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
    # Every parameter has a gradient, with or without objects: sharded, all processes
    # must agree.
    together[2].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def proposed(model, scores, deltas, most, size):
    """A level at a time, with detectron2's numbers."""
    boxes, values = [], []
    for level in range(3):
        ids = (model.levels == level).nonzero()[:, 0]
        ids = ids[scores[ids].argsort(descending=True)[:most]]
        found = regions.apply_deltas(deltas[ids], model.anchors[ids], size)
        kept = regions.nms(found, scores[ids], ids * 0, 0.7, 10_000)
        boxes.append(found[kept])
        values.append(scores[ids][kept])
    return torch.cat(boxes)[torch.cat(values).argsort(descending=True)]


def cascade(model, table, rois, size):
    """Of each of three stages: the regions, logits, deltas; and the regions that come out."""
    for head, weights in zip(model.boxes, [(10, 5), (20, 10), (30, 15)]):
        logits, moves = head(regions.roi_align(table, model.grids[:2], [4, 8], rois, 7))
        yield rois, logits, moves, weights
        rois = regions.apply_deltas(moves.detach(), rois, size, weights)
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

    sigmoids = F.binary_cross_entropy_with_logits
    label, index = regions.label_anchors(model.anchors, truth)
    positive, some = label == 1, label >= 0
    loss = sigmoids(scores[some], label[some].float(), reduction="sum")
    wanted = regions.box_deltas(model.anchors, truth[index])
    expected = {"rpn_class": loss / 5000}
    expected["rpn_box"] = (deltas - wanted)[positive].abs().sum() / 5000
    rois = torch.cat([proposed(model, scores, deltas, 60, size), truth])
    stages = cascade(model, table, rois, size)
    for stage, least in enumerate([0.5, 0.6, 0.7]):
        rois, logits, moves, weights = next(stages)
        iou, index = regions.overlaps(rois, truth).max(dim=1)
        positive = iou >= least
        assert 2 < positive.sum() < len(rois) - 2  # there is something to go wrong
        label = labels[index].where(positive, 3)
        loss = F.cross_entropy(logits, label, reduction="sum")
        if federated:  # each class on its own, and no background
            loss = sigmoids(logits[:, :3], F.one_hot(label, 4)[:, :3].float(), reduction="sum")
        expected[f"class_{stage}"] = loss / 900
        wanted = regions.box_deltas(rois, truth[index], weights)
        expected[f"box_{stage}"] = (moves - wanted)[positive].abs().sum() / 900
        if stage == 0:
            x = model.mask(regions.roi_align(table, model.grids[:2], [4, 8], rois[positive], 14))
            x = x[range(len(x)), labels[index[positive]]]
            shapes = regions.mask_targets(target["masks"], rois[positive], index[positive], 28)
            expected["mask"] = sigmoids(x, shapes.float())
    found = {name: value[0] for name, value in parts.items()}
    expected = {name: value.detach() for name, value in expected.items()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)

    found = model.eval().detect(image[None], [size])[0]
    rois = proposed(model, scores, deltas, 40, size)
    *stages, (rois, *_) = cascade(model, table, rois, size)
    logits = torch.stack([logits for _, logits, *_ in stages])
    score = (logits.sigmoid() if federated else logits.softmax(dim=2)).mean(dim=0)[:, :3]
    assert 10 < (score > sure).sum() < score.numel()
    roi, label = (score > sure).nonzero().T
    best = regions.nms(rois[roi], score[roi, label], label, 0.5, 100)
    expected = {"boxes": rois[roi[best]], "scores": score[roi, label][best], "labels": label[best]}
    torch.testing.assert_close({name: found[name] for name in expected}, expected)


def record(monkeypatch, name, change=lambda result: result):
    """Replace a function of detect by one that changes its result: [(arguments, result)]."""
    calls, function = [], getattr(detect, name)

    def recorded(*arguments):
        calls.append((arguments, change(function(*arguments))))
        return calls[-1][1]

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
    other = model(image[None], [target | {"seed": 1}])[0]
    assert abs(other / loss - 1) > 1e-3  # the seed decides
    seen = record(monkeypatch, "roi_align")
    Detector(**TINY | {"rois": 50})(image[None], [target | {"size": (60, 50)}])
    boxes = torch.cat([how[3] for how, _ in seen])
    assert len(seen) == 4 and (boxes <= torch.tensor([50, 60, 50, 60])).all()


def test_each_stage_of_the_cascade_gives_a_third_of_its_gradient():
    model, rois = scramble(Detector(**TINY), 0.2), random_boxes(5, 60)
    table = torch.randn(16 * 16 + 8 * 8 + 4 * 4, 16, requires_grad=True)
    whole = model.boxes[1](regions.roi_align(table, [(16, 16), (8, 8)], [4, 8], rois, 7))
    scaled = model.run_stage(1, table, rois)
    torch.testing.assert_close(scaled, whole)
    whole, scaled = (torch.autograd.grad(out[1].sum(), table)[0] for out in (whole, scaled))
    torch.testing.assert_close(3 * scaled, whole)


def test_federated_loss_judges_the_classes_present_and_some_others():
    model = Detector(**TINY | {"classes": 40, "federated": 10, "class_counts": [1] * 20 + [0] * 20})
    judged = model.federated_classes(torch.tensor([3, 3, 30]), torch.Generator().manual_seed(0))
    assert {3, 30} <= set(judged.tolist()) and len(judged.unique()) == len(judged) == 10
    assert (judged < 20).sum() == 9  # of the others none that has no image
    # By the root of how many images they are in: 9 times as many are drawn 3 times as
    # often.
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
    changes = {"size": "32x2x2", "classes": 2, "features": 32, "hidden": 64, "rois": 16}
    model = Detector(**TINY | changes)
    images, targets = zip(*(scene(64, seed) for seed in range(2)))
    images, sizes = torch.stack(images), [(64, 64)] * 2
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(120):
        loss = model(images, [t | {"seed": 2 * step + i} for i, t in enumerate(targets)])[0].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    model.eval()
    for found, target in zip(model.detect(images, sizes), targets):
        for label, box, mask in zip(target["labels"], target["boxes"], target["masks"]):
            best = (found["labels"] == label).nonzero()[:1, 0]  # the surest of its class
            assert found["scores"][best] > 0.5
            assert regions.overlaps(found["boxes"][best], box[None]) > 0.8
            pasted = paste_masks(found["masks"][best], found["boxes"][best], (64, 64))[0]
            assert intersection_over_union(pasted, mask) > 0.8
    clipped = model.detect(images, [(40, 50)] * 2)[0]["boxes"]
    assert (clipped <= torch.tensor([50, 40, 50, 40])).all()


def test_grey_scenes_of_the_toy_world_are_measured():
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
    C = D = 16
    N, padded, window, cells = 64, 81, 9, 16 * 16 + 8 * 8 + 4 * 4
    linear = 8 * 18 * D * D * N + 4 * 6 * D * D * (N + padded)
    attention = 4 * 4 * D * (N * N + padded * window)
    relative = 4 * 2 * D * (N * 16 + padded * 6)  # a product with each row, each column
    trunk = 2 * 3 * 64 * D * N + linear + attention + relative
    pyramid = 4 * D * D * 64 + 2 * (D // 2 * C * 256 + D * C * 64) + 18 * C * C * (256 + 64)
    rpn = cells * (2 * 18 * C * C + 2 * C * 15)
    box = 3 * 8 * (49 * 18 * C * C + 2 * 49 * C * 16 + 2 * 16 * (81 + 4))
    assert detect.detector_flops(model) == trunk + pyramid + rpn + box
