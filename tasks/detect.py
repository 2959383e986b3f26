"""Object detection and instance segmentation with a ViT: ViTDet (arXiv 2203.16527).

    Trunk        the plain ViT at any size: windows, four global blocks, relative positions
    Detector     the trunk, a simple feature pyramid, RPN, Cascade R-CNN and a mask head
    load_trunk   loads the weights of stages 1 and 2, or those of a detector
    detect_in    finds objects in scenes, on all processes together

What is not the paper's is detectron2's, in its ViTDet project (Cascade Mask R-CNN). One
thing differs: an image's loss depends on that image alone, so that the optimisation is
the same on any number of processes. Samples are drawn with the image's own seed, and so
are the 50 classes of the federated loss. The losses of boxes and classes are divided by
512 regions an image, and a mask's by the number of positive regions of its image;
detectron2 divides by what one GPU's images have together. The position table is
resampled when it is loaded, not in each step.

Boxes are (left, top, right, bottom) in pixels of the padded input, float32.
"""

import math
import re
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data import Batches, Order, normalize, one_line
from model import ViT, architecture, full_state, initialize, load_weights, patchify
from model import read_weights as read_encoder
from support import flags
from support.formats import open_weights
from support.hashtags import WeightedOrder
from support.launch import progress
from support.loader import loader
from support.plan import peak_lr
from tasks.coco import detection_numbers, print_detection
from tasks.regions import (
    RATIOS,
    apply_deltas,
    box_deltas,
    draw_samples,
    has_area,
    label_anchors,
    make_anchors,
    mask_targets,
    nms,
    overlaps,
    roi_align,
)
from tasks.scenes import (
    ToyScenes,
    classes_present,
    detections_in_picture,
    open_scenes,
    read_results,
    repeat_factors,
    scene_maker,
    write_results,
)
from tasks.video import RelativeAttention

# Every size but toy: detectron2's projects/ViTDet/configs/COCO and its
# models/mask_rcnn_vitdet.
SETTINGS = {
    "window": 14,  # side of a window of attention, in patches; 0: none
    "scales": (4, 2, 1, 0.5),  # levels of the pyramid, beside the trunk's map
    "anchor_sizes": (32, 64, 128, 256, 512),  # one a level; one more: of a pooled level
    "features": 256,  # channels of the pyramid and of all heads
    "convolutions": 4,  # of the box and the mask head
    "hidden": 1024,  # width of the box head's linear layer
    "anchors": 256,  # sampled in an image: at most half of them positive
    "rois": 512,  # regions sampled in an image: at most a quarter of them positive
    "before_nms": (2000, 1000),  # proposals of a level, in training and in test
    "after_nms": 1000,  # proposals of an image
    "masks": True,  # with a mask head
    "federated": 0,  # LVIS: the loss counts 50 classes of an image, each as a sigmoid
    "score_threshold": 0.05,  # LVIS: 0.02
    "detections": 100,  # of an image; LVIS: 300
}
# Our choice, for 128 to 256 pixels on a laptop: strides 4, 8 and 16 of a patch of 8.
TOY = {"scales": (2, 1, 0.5), "anchor_sizes": (16, 32, 64), "features": 64, "convolutions": 1}
TOY |= {"hidden": 128, "anchors": 64, "rois": 24, "before_nms": (150, 30), "after_nms": 150}

sigmoid_loss = partial(F.binary_cross_entropy_with_logits, reduction="sum")

# Each stage's least IoU of a positive, and the weights of its (centre, size) deltas.
STAGES = ((0.5, (10.0, 5.0)), (0.6, (20.0, 10.0)), (0.7, (30.0, 15.0)))


# ---------------------------------------------------------------------------------------- the trunk


class WindowAttention(RelativeAttention):
    """RelativeAttention within square windows of tokens; window 0: the whole grid.

    The grid is padded to whole windows with zeros, which are attended to like any
    token, as in detectron2: 64 x 64 tokens become 70 x 70.
    """

    def __init__(self, width, heads, grid, window):
        super().__init__(width, heads, (window, window) if window else grid)
        self.full_grid, self.window = grid, window

    def forward(self, x, first_query=0):
        """(B, rows * columns, D) -> the same shape."""
        (B, _, D), (rows, columns), w = x.shape, self.full_grid, self.window
        if not w:
            return super().forward(x, first_query)
        x = F.pad(x.unflatten(1, self.full_grid), (0, 0, 0, -columns % w, 0, -rows % w))
        down, across = x.shape[1] // w, x.shape[2] // w  # numbers of windows
        x = x.reshape(B, down, w, across, w, D).transpose(2, 3)
        x = self.attend(x.reshape(-1, w * w, D))  # (B * windows, w * w, D)
        x = x.reshape(B, down, across, w, w, D).transpose(2, 3)
        x = x.reshape(B, down * w, across * w, D)[:, :rows, :columns]
        return self.proj(x.flatten(1, 2))


class Trunk(ViT):
    """A ViT without class token and final norm: images -> map (B, D, rows, columns).

    The last block of each quarter attends to the whole grid (B: 2, 5, 8, 11), the
    others in windows. A patch of 14 pixels becomes one of 16. Arguments: see ViT.
    """

    def __init__(self, size, image_size, window, patch_size=None, **arguments):
        patch_size = patch_size or architecture(size)[3]
        patch_size = 16 if patch_size == 14 else patch_size
        super().__init__(size, image_size, patch_size, **arguments)
        if min(self.grid) < 2:
            raise ValueError(f"image size {image_size}: want two patches of {patch_size} at least")
        del self.cls_token
        self.norm = nn.Identity()
        global_blocks = [quarter * self.layers // 4 - 1 for quarter in (1, 2, 3, 4)]
        for i, block in enumerate(self.blocks):
            w = 0 if i in global_blocks else window
            block.attn = WindowAttention(self.width, self.heads, self.grid, w)

    def tokens(self, images):
        self.check(images)
        return self.embed(patchify(images, self.patch_size)) + self.pos_embed[:, 1:]

    def forward(self, images, noise=None):
        return self.encode(images, noise).transpose(1, 2).unflatten(2, self.grid)


def load_trunk(model, state, grid=None):
    """Load the weights of a ViT, an MAE, a classifier or a Detector into a Detector.

    grid: (rows, columns) of their position table. Return one line on the outcome.
    Raises ValueError if anything is left unexplained, as model.load_weights does.
    """
    heads, trunk = {}, state
    if any(name.startswith("trunk.") for name in state):  # a Detector
        heads = {name: t for name, t in state.items() if not name.startswith("trunk.")}
        trunk = {n.removeprefix("trunk."): t for n, t in state.items() if n not in heads}
        notes = ""
    else:
        unused = ("cls_token", "norm.", "fc_norm.")
        trunk = {name: t for name, t in state.items() if not name.startswith(unused)}
        notes = "; dropped: class token, last norm; heads newly initialised"
    name, side = "patch_embed.proj.weight", model.patch_size
    if trunk[name].shape[-1] == 14 and side == 16:
        trunk[name] = F.interpolate(trunk[name].float(), (side, side), mode="bicubic")
        notes += "; patch embedding resampled from 14x14 to 16x16"
    for name, wanted in model.trunk.state_dict().items():
        table = trunk.get(name, wanted)
        if ".rel_pos_" in name and len(table) != len(wanted):  # of another image size
            notes += f"; {name} resampled from {len(table)} to {len(wanted)}"
            table = F.interpolate(table.float().T[None], size=len(wanted), mode="linear")
            trunk[name] = table[0].T
    if heads:
        notes += load_heads(model, heads)
    return load_weights(model.trunk, trunk, grid) + notes


def load_heads(model, heads):
    """Load what a Detector has beside its trunk; return a note on the outcome."""
    own = {n: t for n, t in model.state_dict().items() if not n.startswith("trunk.")}
    loaded = {n: t for n, t in heads.items() if n in own and t.shape == own[n].shape}
    # With other classes, or without masks, the predictors and the mask head differ.
    changed = (own.keys() | heads.keys()) - loaded.keys()
    odd = sorted(n for n in changed if "predictor" not in n and not n.startswith("mask"))
    if odd:
        raise ValueError(f"the weights do not fit the model: {', '.join(odd[:3])}")
    model.load_state_dict(loaded, strict=False)
    note = f"; heads: {len(loaded)} tensors loaded"
    new, dropped = own.keys() - loaded.keys(), heads.keys() - own.keys()
    for title, names in (("newly initialised", new), ("dropped", dropped)):
        modules = sorted({re.sub(r"\.\d+|\.\w+$", "", name) for name in names})
        note += f", {title}: {', '.join(modules) or 'none'}"
    return note


# ------------------------------------------------------------------------------------- the detector


class Norm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W), which keeps its memory layout.

    Backward of a CPU's convolutions is three times as fast with large maps as (C, H,
    W), and with many small regions as (H, W, C).
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


def pyramid_level(width, scale, features):
    """A level of the pyramid: (B, D, h, w) -> (B, features, scale h, scale w)."""

    def up(channels):
        return nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)

    first = {1: [], 0.5: [nn.MaxPool2d(2)], 2: [up(width)]}
    first[4] = [up(width), Norm(width // 2, 1e-6), nn.GELU(), up(width // 2)]
    channels = width // max(1, scale)
    last = convolution(channels, features, 1), convolution(features, features, 3)
    return nn.Sequential(*first[scale], *last)


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
    """ViTDet. Images (B, C, S, S) are normalised, then padded with zeros at the end.

    size, image_size  of the trunk; its other arguments may be given as well: see ViT
    classes           their number
    class_counts      LVIS: the number of images with each, for the federated loss
    others            replace entries of SETTINGS and of TOY; kept in the config
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
        self.layers, self.patch_size, self.grid = trunk.layers, trunk.patch_size, trunk.grid
        self.classes, self.class_counts = classes, class_counts
        C, number, scales = s["features"], s["convolutions"], s["scales"]
        self.pyramid = nn.ModuleList(pyramid_level(trunk.width, scale, C) for scale in scales)
        self.pooled = len(s["anchor_sizes"]) - len(scales)  # further levels: 1 or 0
        self.strides = [self.patch_size / scale for scale in scales]
        self.strides += [2 * self.strides[-1]] * self.pooled
        # Half of an odd side is rounded down, but up on the pooled level.
        self.grids = [tuple(int(side * scale) for side in trunk.grid) for scale in scales]
        self.grids += [tuple(-(-side // 2) for side in self.grids[-1])] * self.pooled
        same = [nn.Conv2d(C, C, 3, padding=1) for _ in range(2)]
        out = nn.Conv2d(C, 5 * len(RATIOS), 1)
        self.rpn = nn.Sequential(same[0], nn.ReLU(), same[1], nn.ReLU(), out)
        self.boxes = nn.ModuleList(BoxHead(C, number, s["hidden"], classes) for _ in STAGES)
        if s["masks"]:
            up = nn.ConvTranspose2d(C, C, 2, stride=2)
            self.mask = nn.Sequential(convolutions(number, C), up, nn.ReLU())
            self.mask.add_module("predictor", nn.Conv2d(C, classes, 1))
        # Standard deviations of what is not initialised as the trunk is: detectron2's.
        self.init_std = {}
        for name, parameter in self.named_parameters():
            if name.startswith("rpn.") or name.endswith("class_predictor.weight"):
                self.init_std[name] = 0.01
            elif name.endswith("predictor.weight"):
                self.init_std[name] = 0.001
            elif parameter.ndim == 4 and not name.startswith("trunk."):
                self.init_std[name] = math.sqrt(2 / (len(parameter) * parameter[0, 0].numel()))
        initialize(self)

    def forward(self, images, targets):
        """Each image's loss, (B,), and its parts, detached: {name: (B,)}.

        targets: for each image {"boxes": (n, 4), "labels": (n,) int64, "masks": (n, S,
        S) bool or None, "size": (height, width) within its padding, "seed": int}. All
        random numbers are drawn with the seed, on the CPU.
        """
        draws = [torch.Generator().manual_seed(target["seed"]) for target in targets]
        noise = torch.stack([torch.rand(self.layers, 2, generator=draw) for draw in draws])
        noise = noise.to(images.device) if self.training else None
        images = zip(*self.predict(images, noise), targets, draws)
        parts = [self.losses(*image) for image in images]
        parts = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        return sum(parts.values()), {name: part.detach() for name, part in parts.items()}

    def maps(self, images, noise=None):
        """The feature maps of all levels: [(B, C, rows, columns)]."""
        x = self.trunk(images, noise).contiguous()  # see Norm
        maps = [level(x) for level in self.pyramid]
        # The pooled level: max pool of 1 x 1, stride 2.
        return maps + [maps[-1][:, :, ::2, ::2]] * self.pooled

    def predict(self, images, noise=None):
        """Features (B, cells, C); objectness (B, A) and deltas (B, A, 4) of the anchors."""
        # Not buffers: a model that is made on the meta device would have them without
        # values.
        sizes = self.settings["anchor_sizes"]
        self.anchors, self.levels = make_anchors(self.grids, self.strides, sizes, images.device)
        maps = self.maps(images, noise)
        table = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
        # An image at a time, so that the rounding of its gradient does not depend on
        # the batch.
        found = [torch.cat([self.rpn(image) for image in x.split(1)]) for x in maps]
        found = [x.permute(0, 2, 3, 1).flatten(1, 2) for x in found]  # (B, cells, 15)
        found = torch.cat(found, dim=1).float()
        scores, deltas = found.split([len(RATIOS), 4 * len(RATIOS)], dim=2)
        return table, scores.flatten(1), deltas.flatten(1).unflatten(1, (-1, 4))

    @torch.no_grad()
    def propose(self, scores, deltas, size):
        """An image's best boxes, suppressed within levels, (n, 4); their anchors, (n,)."""
        s, kept = self.settings, []
        most = s["before_nms"][not self.training]
        for level in range(len(self.grids)):
            ids = (self.levels == level).nonzero()[:, 0]
            kept.append(ids[scores[ids].topk(min(most, len(ids))).indices])
        kept = torch.cat(kept)
        boxes = apply_deltas(deltas[kept], self.anchors[kept], size)
        good = has_area(boxes)
        boxes, kept = boxes[good], kept[good]
        best = nms(boxes, scores[kept], self.levels[kept], 0.7, s["after_nms"])
        return boxes[best], kept[best]

    def losses(self, table, scores, deltas, target, draw):
        """The parts of one image's loss. target, draw: see forward."""
        s, truth, labels = self.settings, target["boxes"], target["labels"]
        if not len(truth):  # an object without area, which overlaps with nothing
            truth, labels = truth.new_zeros(1, 4), labels.new_zeros(1)
        # Each anchor and object has a random number, which decides whether it, or the
        # region proposed from it, is drawn. Numbers by rank would make the sample
        # depend on rounding.
        keys = torch.rand(2, len(self.anchors) + len(truth), generator=draw).to(truth.device)

        label, index = label_anchors(self.anchors, truth)
        ids, positives = draw_samples(label, s["anchors"], s["anchors"] // 2, keys[0])
        parts = {"rpn_class": sigmoid_loss(scores[ids], label[ids].float()) / s["anchors"]}
        ids = ids[:positives]
        wanted = box_deltas(self.anchors[ids], truth[index[ids]])
        parts["rpn_box"] = (deltas[ids] - wanted).abs().sum() / s["anchors"]

        rois, ids = self.propose(scores, deltas, target["size"])
        rois = torch.cat([rois, target["boxes"]])
        keys = torch.cat([keys[1, ids], keys[1, len(self.anchors) :]])
        iou, index = overlaps(rois, truth).max(dim=1)
        label = (iou >= STAGES[0][0]).long()
        ids, positives = draw_samples(label, s["rois"], s["rois"] // 4, keys)
        parts |= self.cascade_losses(table, rois[ids], truth, labels, target, draw)
        if s["masks"]:  # the mask head learns from the first stage's objects (detectron2)
            ids = ids[: positives if target["masks"] is not None else 0]
            rois, index = rois[ids], index[ids]
            logits = self.mask_logits(table, rois, labels[index])
            wanted = mask_targets(target["masks"], rois, index, logits.shape[-1])
            parts["mask"] = sigmoid_loss(logits, wanted.float()) / max(1, logits.numel())
        return parts

    def cascade_losses(self, table, rois, truth, labels, target, draw):
        """The losses of all stages: each learns from the boxes of the one before."""
        s, parts = self.settings, {}
        if s["federated"]:
            counted = self.federated_classes(target["labels"], draw)
        for stage, (least, weights) in enumerate(STAGES):
            iou, index = overlaps(rois, truth).max(dim=1)
            positive = iou >= least
            label = torch.where(positive, labels[index], self.classes)
            logits, deltas = self.run_stage(stage, table, rois)
            if s["federated"]:
                loss = sigmoid_loss(logits[:, counted], (label[:, None] == counted).float())
            else:
                loss = F.cross_entropy(logits, label, reduction="sum")
            parts[f"class_{stage}"] = loss / s["rois"]
            wanted = box_deltas(rois[positive], truth[index[positive]], weights)
            parts[f"box_{stage}"] = (deltas[positive] - wanted).abs().sum() / s["rois"]
            rois = apply_deltas(deltas.detach(), rois, target["size"], weights)
            rois = rois[has_area(rois)]
        return parts

    def federated_classes(self, labels, draw):
        """The classes that count in an image's loss: its own and others, 50 together.

        The others are drawn without replacement, by frequency ^ 0.5 (arXiv 2103.07461).
        """
        weights = torch.tensor(self.class_counts).sqrt()
        keys = torch.rand(self.classes, generator=draw).log() / weights
        keys[labels.cpu()] = math.inf
        number = max(self.settings["federated"], int(keys.isposinf().sum()))
        return keys.topk(min(number, self.classes)).indices.to(labels.device)

    def region_features(self, table, rois, size):
        levels = len(self.settings["scales"])  # nothing is read from the pooled level
        return roi_align(table, self.grids[:levels], self.strides[:levels], rois, size)

    def run_stage(self, stage, table, rois):
        """One stage on an image's regions: logits (R, classes + 1) and deltas (R, 4)."""
        x = self.region_features(table, rois, 7)
        if x.requires_grad:  # three stages read the same features (Cascade R-CNN)
            x.register_hook(lambda gradient: gradient / len(STAGES))
        return self.boxes[stage](x)

    def mask_logits(self, table, rois, labels):
        """(R, 28, 28) float32: for each region, the map of its class."""
        x = self.mask(self.region_features(table, rois, 14).to(table.dtype))
        return x[torch.arange(len(x), device=x.device), labels].float()

    @torch.no_grad()
    def detect(self, images, sizes):
        """Each image's detections, best first: {"boxes", "scores", "labels", "masks"}.

        sizes: (height, width) of each image within its padding. Masks are
        probabilities, (k, 28, 28) in their boxes: see paste_masks; None for a detector
        without a mask head.
        """
        s, found = self.settings, []
        for table, scores, deltas, size in zip(*self.predict(images), sizes):
            boxes, score = self.propose(scores, deltas, size)[0], 0
            for stage, (_, weights) in enumerate(STAGES):
                logits, deltas = self.run_stage(stage, table, boxes)
                each = logits.sigmoid() if s["federated"] else logits.softmax(dim=1)
                score = score + each[:, :-1] / len(STAGES)
                boxes = apply_deltas(deltas, boxes, size, weights)
            sure = (score > s["score_threshold"]) & has_area(boxes)[:, None]
            roi, label = sure.nonzero().T
            boxes, score = boxes[roi], score[roi, label]
            best = nms(boxes, score, label, 0.5, s["detections"])
            boxes, label = boxes[best], label[best]
            masks = self.mask_logits(table, boxes, label).sigmoid() if s["masks"] else None
            found.append({"boxes": boxes, "scores": score[best], "labels": label, "masks": masks})
        return found


def detector_flops(model):
    """Forward FLOPs of a training step on one image with the most regions."""
    s = model.settings
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        twin = Detector(**model.config)
        twin.predict(torch.empty(1, model.config["channels"], *model.config["image_size"]))
        for head in twin.boxes:
            head(torch.empty(s["rois"], s["features"], 7, 7))
        if s["masks"]:
            twin.mask(torch.empty(s["rois"] // 4, s["features"], 14, 14))
    return counter.get_total_flops()


# ---------------------------------------------------------------------- files of detectors, results


def read_detector(path):
    """(state, config) of a Detector's model.pt. Raises ValueError if it holds none."""
    found = detector_in(*open_weights(path))
    if found is None:
        raise ValueError(f"{path} holds no detector: finetune.py --task detect makes one")
    return found


def read_weights(path, *arguments):
    """read_detector or, for other files, model.read_weights with all arguments."""
    return detector_in(*open_weights(path)) or read_encoder(path, *arguments)


def detector_in(content, path):
    """(state, config) of the Detector in the content of a file; None if there is none."""
    config = content.get("config") if isinstance(content, dict) else None
    if not isinstance(config, dict) or "anchor_sizes" not in config:
        return None
    try:
        with torch.device("meta"):  # shapes without memory
            model = Detector(**config)
        model.load_state_dict(content["model"], assign=True)  # all of it, and nothing else
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        why = f"{one_line(error):.200}"
        raise ValueError(f"{path} is damaged, or another version's: {why}") from None
    return content["model"], model.config


@torch.inference_mode()
def detect_in(model, scenes, batch_size=8, workers=0, device="cpu", max_bad=0.01):
    """Detections in scenes, on every process: see average_precision for the format.

    The same for any number of processes. Raises ValueError if more than the fraction
    max_bad of the pictures cannot be read (one alone may), or none can.
    """
    process, processes = 0, 1
    if dist.is_initialized():
        process, processes = dist.get_rank(), dist.get_world_size()
    batch_size = 2 * processes * max(1, batch_size // 2)  # pairs for each process
    batches = Batches(scenes, scene_maker(scenes, model.config), batch_size, process, processes)
    found, bad, total = {}, 0, int(scenes.sizes.sum())
    model.eval()
    steps = loader(batches, range(len(batches)), workers)
    for batch in progress(steps, len(batches), "detecting", " batches"):
        bad += len(batch["bad"])
        for name in batch["bad"]:
            print(f"unreadable, nothing is found in it: {name}", file=sys.stderr)
        # (height, width) of each picture in the square
        inside = (batch["sizes"] * batch["scales"].flip(1)).round()
        answers = model.detect(normalize(batch["images"].to(device)), inside.tolist())
        for i, answer in enumerate(answers):
            if batch["weight"][i]:
                size, scale = batch["sizes"][i].tolist(), batch["scales"][i]
                image = scenes.ids[int(batch["samples"][i])]
                found[image] = detections_in_picture(answer, size, scale)
    model.train()
    if processes > 1:
        everyone = [None] * processes
        dist.all_gather_object(everyone, (found, bad))
        found = {image: one for part, _ in everyone for image, one in part.items()}
        bad = sum(count for _, count in everyone)
    if bad > max(1, max_bad * total) or bad == total:
        raise ValueError(f"{bad} of {total} pictures cannot be read, over --max-bad {max_bad}")
    return found


def add_result_flags(parser):
    """Add the flags of evaluate.py for what a detector finds."""
    add = parser.add_argument
    add("--out", type=flags.png, help="a .png (evaluate-detect.png beside the checkpoint)")
    results = "write what is found as this .json, in COCO's format"
    add("--results", type=flags.new_file, help=results)


def task_detect(model, sources, run):
    """COCO's or LVIS's average precision of a detector, or of results in a .json."""
    scenes = sources[-1]
    if model is None:
        found = read_results(run.checkpoint, scenes)
    else:
        names, wanted = model.config["class_names"], scenes.classes
        if names not in (None, wanted) or model.classes != len(wanted):
            known = f"{model.classes}: {', '.join((names or [])[:3])} ..."
            raise ValueError(f"{run.data} has other classes than {run.checkpoint} ({known})")
        found = detect_in(model, scenes, **run.options)
    if not dist.is_initialized() or dist.get_rank() == 0:
        path = run.results
        try:
            if path:
                write_results(path, scenes, found)
                print(f"wrote {path}")
            path = run.out or Path(run.checkpoint).with_name("evaluate-detect.png")
            print_detection(scenes, found, path, run.count)
        except OSError as error:  # its message lacks the path when the disk is full
            raise ValueError(f"cannot write {path}: {error}") from None
    return detection_numbers(scenes, found)


# ----------------------------------------------------------------------------------- stage 3's task

# size: lr at batch 64 (COCO, LVIS), layer decay, drop path (COCO, LVIS), epochs (COCO,
# LVIS) of detect: detectron2's projects/ViTDet, which the paper starts from. 2B is H
# with L's layer decay (unverified); 6.5B, toy and others are our choice.
VITDET = {
    "B": ((1e-4, 2e-4), 0.7, (0.1, 0.1), (100, 100)),
    "L": ((1e-4, 2e-4), 0.8, (0.4, 0.4), (100, 100)),
    "H": ((1e-4, 1e-4), 0.9, (0.5, 0.4), (75, 100)),
    "2B": ((1e-4, 1e-4), 0.8, (0.5, 0.4), (75, 100)),
    "6.5B": ((1e-4, 1e-4), 0.8, (0.5, 0.4), (75, 100)),
    # At any batch. (Toy world, seed 0: box AP50 92 %, with 1e-3 81, with 1.5e-3 85.)
    "toy": ((5e-4, 5e-4), 0.8, (0.0, 0.0), (20, 20)),
}


def add_flags(groups):
    flags.add_resume_flags(groups)
    add = groups["data"].add_argument
    add("--min-jitter", type=flags.positive, help="least scale of a picture (0.1; toy: 0.8)")
    add("--max-jitter", type=flags.positive, help="largest (2.0; toy: 1.25)")
    add = groups["model"].add_argument
    below_1 = flags.number(float, 0, 0.999)
    add("--drop-path", type=below_1, help="of the last block, rising from 0 (B 0.1, L 0.4, H 0.5)")
    add = groups["optimisation"].add_argument
    add("--lr", type=flags.positive, help="peak (1e-4 or less: printed first; toy: 5e-4)")
    add("--layer-decay", type=flags.fraction, help="of the lr, from block to block (B 0.7, L 0.8)")
    add("--decay-floor", type=flags.fraction, help="least lr_scale (0.1 if --init has a head)")
    add("--weight-decay", type=flags.not_negative, help="(0.1)")


def prepare(run, finetune):
    given_size = run.image_size
    finetune.read_init(run, read=read_weights)
    toy, toy_size = run.data in (None, "toy"), run.config["size"] == "toy"
    state, grid = run.weights or ({}, None)
    is_detector = "trunk.pos_embed" in state
    usual = run.image_size if is_detector else (128 if toy_size else 1024,) * 2
    height, width = given_size or usual
    if height != width:
        raise ValueError(f"--image-size {height}x{width}: detect fills pictures up to a square")
    if not toy and run.data.endswith(".json") and not run.val_data:
        raise ValueError(f"{run.data} is all of the data: give --val-data as well")
    run.image_size, run.config["image_size"] = (height, width), height
    run.train, run.val = open_scenes(run.data or "toy", run.val_data, height)
    run.val = ToyScenes("val", height, 64) if toy else run.val
    run.classes = len(run.train.classes)
    if is_detector and run.classes_of_head != run.train.classes:  # they are learned anew
        of_classes = re.compile(r"boxes\.\d\.class_predictor\.|mask\.predictor\.")
        run.weights = {n: t for n, t in state.items() if not of_classes.match(n)}, grid
    low = run.min_jitter or (0.8 if toy else 0.1)  # ViTDet's; toy is our choice
    high = run.max_jitter or (1.25 if toy else 2.0)
    if low > high:
        raise ValueError(f"--min-jitter {low} is over --max-jitter {high}")
    run.jitter = low, high

    lvis, run.toy = run.train.frequencies is not None, toy and toy_size
    rates, layer_decay, drop_paths, lengths = VITDET.get(run.config["size"], VITDET["B"])
    batch_size = run.batch_size or (2 if toy_size else 64)
    actual = batch_size, architecture(run.config["size"])[0]
    usual = actual if toy_size else (64, 768)
    run.lr, run.lr_origin = peak_lr(run.lr, rates[lvis], usual, actual)
    return {
        "batch_size": batch_size,
        "lr": run.lr,
        "epochs": 0.02 if run.toy else lengths[lvis],
        "layer_decay": layer_decay,
        "drop_path": drop_paths[lvis],
        "weight_decay": 0.1,
        # Encoders that have learned hashtags have a head (the paper's choice,
        # unverified).
        "decay_floor": 0.1 if "head.weight" in state else 0.0,
        "warmup": 0.05 if run.toy else 0.0,  # see vitdet_schedule
        "min_jitter": run.min_jitter,
        "max_jitter": run.max_jitter,
    }


def main(run, finetune):
    config = run.config | {"class_names": run.train.classes, "drop_path": run.drop_path}
    config["masks"], order = run.train.has_masks, Order
    if run.train.frequencies:  # LVIS (detectron2's settings)
        order = partial(WeightedOrder, **repeat_factors(run.train))
        config |= {"federated": 50, "score_threshold": 0.02, "detections": 300}
        config["class_counts"] = classes_present(run.train)[1].tolist()
    model = Detector(classes=run.classes, **config)
    initialize(model, run.seed)
    if run.weights:
        run.say(load_trunk(model, *run.weights))
    model.trunk.pos_embed.requires_grad_()  # trained from here on (detectron2)
    config = model.config | {"positions": "learned"}
    if not run.micro_batch:
        # A picture of 1024 pixels fills a GPU, and so do the biases of attention:
        # tests/bench.
        per_process = run.batch_size // run.processes
        run.micro_batch = per_process if run.image_size[0] <= 256 else 2
    run.save_every = run.save_every or min(5000, math.ceil(run.steps / 3))
    found = {}

    def optimizer(model):
        # From H on, detectron2 decays norms and positions as well. (For B and L, it
        # also decays biases and relative positions, which are not decayed here.)
        all_decayed = run.config["size"] in ("H", "2B", "6.5B")
        settings = run.weight_decay, run.layer_decay, run.decay_floor, all_decayed
        return finetune.adamw(finetune.layer_groups(model, *settings), run)

    def measure(model):
        nonlocal found
        options = {"workers": run.workers, "device": run.device, "max_bad": run.max_bad}
        found = detect_in(model, run.val, **options)
        return detection_numbers(run.val, found)

    config_of_scenes = {**run.config, "image_size": run.image_size}
    make = scene_maker(run.train, config_of_scenes, run.jitter, not run.no_flip)
    more = {"measure": measure, "methods": ("detect",), "schedule": vitdet_schedule}
    more["shown"] = {"bbox_AP": "box AP {:.1%}", "bbox_AP50": "box AP50 {:.1%}"}
    more["shown"] |= {"segm_AP50": "mask AP50 {:.1%}"}
    flops = 3 * detector_flops(model)
    if not finetune.train(run, model, optimizer, make, flops, learn_scenes, order=order, **more):
        return
    # Every process takes part. A run that was at its end when it began has found
    # nothing yet.
    result = detection_numbers(run.val, found) if found else measure(model)
    weights = full_state(model)
    if run.process == 0:
        print_detection(run.val, found, run.out / "detections.png")
    finetune.finish(run, weights, config, result, "detect")


def learn_scenes(run, model, micro_batches, totals):
    """Backward through a step's batches of scenes: see finetune.py's train."""
    for batch in micro_batches:
        losses, _ = model(normalize(batch["images"]), batch["targets"])
        loss = (losses * batch["weight"]).sum() / run.batch_size
        (loss * run.processes).backward()  # gradients are averaged over the processes
        weight = batch["weight"]
        totals.add(loss.detach(), weight.sum(), batch["bad"], (weight == 0).sum())


def vitdet_schedule(step, steps, warmup):
    """The lr as a fraction of its peak: detectron2's for ViTDet.

    Warm-up from a thousandth over 250 steps (at most a twentieth of the run), then
    drops to a tenth after 8/9 and again after 26/27 of the steps.
    """
    rise = min(250, steps // 20)
    if step < rise:
        return 0.001 + 0.999 * step / rise
    return 0.1 ** ((9 * step >= 8 * steps) + (27 * step >= 26 * steps))
