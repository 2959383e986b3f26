"""Scenes: pictures with boxes and masks, of COCO, LVIS or the toy world."""

import glob
import hashlib
import itertools
import json
import math
import os
import re
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from data import (
    DEVICE,
    MODES,
    VIEW,
    Source,
    channel_statistics,
    check_channels,
    one_line,
    open_picture,
    random_bits,
    running_sum,
    to_mode,
    uniform,
    upright,
)
from support.hashtags import WEIGHT
from support.shards import replace_file
from support.toy import TOY_VERSION, Toy
from tasks.coco import (
    as_rle,
    decode_mask,
    encode_mask,
    has_mask,
    merge_rles,
    polygon_to_rle,
    polygons_of,
    rle_area,
    rle_box,
    text_of_counts,
)

# ------------------------------------------------------------------------------------------- scenes


def open_scenes(where, val=None, size=128):
    """(scenes to train on, scenes to measure on) behind --data and --val-data.

    where, val  "toy"; a .json; or a folder that holds the file
                annotations/{instances,lvis_v1}_{train,val}*.json
    size        side of the toy world's pictures

    Raises ValueError, one line, when there are none, or the two differ in their classes.
    """
    train, measured = open_split(where, "train", size), open_split(val or where, "val", size)
    if (train.category_ids, train.classes) != (measured.category_ids, measured.classes):
        why = f"{val or where} has other categories than {where}"
        raise ValueError(f"{why}: give other --val-data, or leave --val-data out")
    return train, measured


def open_split(where, split, size=128):
    """The scenes to train on, split "train", or to measure on, "val": see open_scenes."""
    if where == "toy":
        return ToyScenes(split, size)
    path = where
    if not where.endswith(".json"):
        name = re.compile(rf"(instances|lvis_v1)_{split}\w*\.json")
        paths = glob.glob(f"{glob.escape(where)}/annotations/*")
        found = [path for path in paths if name.fullmatch(os.path.basename(path))]
        if len(found) != 1:
            wanted = f"{where}/annotations/instances_{split}*.json or lvis_v1_{split}*.json"
            raise ValueError(f"there must be one {wanted}, not {len(found)}: or name a .json")
        (path,) = found
    return Scenes(path, train=split == "train")


# What reading a json may raise that is not what it should be.
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError)
DAMAGED += (OverflowError, RecursionError)

FARTHEST = 100_000  # pixels: polygon_to_rle walks outlines in steps of a fifth of one


class Scenes(Source):
    """Pictures with COCO's or LVIS's annotations, in the order of their ids.

    path      DIR/annotations/NAME_SPLIT.json
    pictures  the folder of the pictures. None: DIR/SPLIT or DIR. Their names are file_name
              or, without it (LVIS), the last two parts of coco_url
    train     leave out what teaches nothing: boxes of no area, objects without a mask where
              others have one, and, as detectron2, pictures with nothing in them but crowds

    Annotations that are damaged, or of an image or a category that is not listed, are
    counted and left out. Without `train`, objects without a mask where others have one are
    counted: they are measured by their boxes alone, see average_precision.
    """

    def __init__(self, path, pictures=None, train=False):
        self.path = path
        try:
            text = Path(path).read_bytes()
            content = json.loads(text)
            images, categories = (
                sorted(content[key], key=lambda entry: entry["id"])
                for key in ("images", "categories")
            )
            self.category_ids = [category["id"] for category in categories]
            self.classes = [category["name"] for category in categories]
            frequencies = [category.get("frequency") for category in categories]
            self.frequencies = frequencies if all(frequencies) and frequencies else None
            sides = {image["id"]: (int(image["height"]), int(image["width"])) for image in images}
            if not all(0 < side < FARTHEST for side in itertools.chain(*sides.values())):
                raise ValueError(f"a height or width is not from 1 to {FARTHEST}")
            labels = {category: label for label, category in enumerate(self.category_ids)}
            if len(sides) < len(images) or len(labels) < len(categories):
                raise ValueError("two pictures, or two categories, have the same id")
            objects = self.read_objects(content["annotations"], sides, labels, train)
            if train:
                crowds = {i for i, rows in objects.items() if all(row[1] for row in rows)}
                images = [image for image in images if image["id"] not in crowds]
            self.ids = [image["id"] for image in images]
            self.sides = [sides[image] for image in self.ids]
            self.files = [
                str(image.get("file_name") or "/".join(image["coco_url"].split("/")[-2:]))
                for image in images
            ]
            self.federated = [
                federated_lists(image, labels) if self.frequencies else {} for image in images
            ]
        except DAMAGED as error:
            why = f"want COCO's or LVIS's json: {one_line(error)}"
            raise ValueError(f"cannot read annotations from {path}: {why}") from None
        if not images or not self.classes:
            raise ValueError(f"{path} lists no pictures with objects to learn or no categories")
        self.edges = running_sum([len(objects[image]) for image in self.ids])  # of their objects
        rows = [row[:7] for image in self.ids for row in objects[image]]
        table = np.array(rows, dtype=np.float64).reshape(-1, 7)
        self.labels, self.crowd = table[:, 0].astype(np.int64), table[:, 1] > 0
        self.areas, self.boxes = table[:, 2], table[:, 3:]
        # One array of bytes: millions of Python objects would be copied into each worker.
        segments = [json.dumps([row[7] for row in objects[image]]).encode() for image in self.ids]
        self.ends = running_sum([len(text) for text in segments])
        self.segments = np.frombuffer(b"".join(segments), dtype=np.uint8)
        self.root = pictures or self.find_pictures()
        self.sizes = np.ones(len(images), dtype=np.int64)
        digest = hashlib.sha256(text + repr(train).encode()).hexdigest()[:16]
        self.identity = f"{len(images)} pictures, {len(rows)} objects, {digest}"

    def read_objects(self, annotations, sides, labels, train):
        """{image id: [(label, crowd, area, x1, y1, x2, y2, segment)]} of all images.

        sides: {image id: (height, width)}, labels: {category id: label}.
        """
        segments = (one.get("segmentation") for one in annotations if isinstance(one, dict))
        self.has_masks = any(segments)
        objects, notes = {image: [] for image in sides}, {}
        for one in annotations:
            note, kept = None, True
            try:
                image, label = one["image_id"], labels[one["category_id"]]
                crowd, area, box, segment = read_annotation(one, sides[image])
                if train and not (box[2] > box[0] and box[3] > box[1]):
                    note, kept = "annotations with a box of no area, left out", False
                elif self.has_masks and not (has_mask(segment) or crowd):
                    note, kept = "objects without a mask, left out", not train
            except DAMAGED:
                note = "annotations that are damaged, or of no listed image or category, left out"
                kept = False
            if kept:
                objects[image].append((label, crowd, area, *box, segment))
            if note:
                note += " of mask AP" * kept
                number = one.get("id") if isinstance(one, dict) else None
                notes.setdefault(note, []).append(number)
        for note, ids in notes.items():
            print(f"{self.path}: {note}: {len(ids)} (the first has id {ids[0]})", file=sys.stderr)
        return objects

    def find_pictures(self):
        """The folder that holds the first hundred pictures, or some of them."""
        folder, name = os.path.split(os.path.abspath(self.path))
        if os.path.basename(folder) == "annotations":
            folder = os.path.dirname(folder)
        split = os.path.splitext(name)[0].split("_")[-1]
        for place in (os.path.join(folder, split), folder):
            if any(os.path.exists(os.path.join(place, file)) for file in self.files[:100]):
                return place
        path = os.path.join(folder, split, self.files[0])
        raise ValueError(f"the pictures of {self.path} are not at {path}")

    def read(self, number):
        mine = slice(*self.edges[number : number + 2])
        segments = self.segments[slice(*self.ends[number : number + 2])]
        return {
            "image": partial(open_upright, self.name(number), self.sides[number]),
            "image_id": self.ids[number],
            "size": self.sides[number],
            "boxes": self.boxes[mine],
            "labels": self.labels[mine],
            "crowd": self.crowd[mine],
            "areas": self.areas[mine],
            "segments": json.loads(segments.tobytes()),
            **self.federated[number],
        }

    def name(self, number):
        return os.path.join(self.root, self.files[number])

    where = name


def federated_lists(image, labels):
    """LVIS's labels that are not in a picture, and those whose objects are not all annotated."""
    keys = {"negative": "neg_category_ids", "not_exhaustive": "not_exhaustive_category_ids"}
    return {name: [labels[number] for number in image[key]] for name, key in keys.items()}


def read_annotation(one, size):
    """(True if a crowd, area, [x1, y1, x2, y2], segment or None) of an annotation.

    size: the picture's (height, width). A missing box or area is the segment's, and without
    a segment a missing area is the box's. Raises one of DAMAGED if it cannot be used.
    """
    segment, box, area = one.get("segmentation") or None, one.get("bbox"), one.get("area")
    crowd = bool(int(one.get("iscrowd") or 0))
    run_lengths = isinstance(segment, dict)
    polygons = [] if run_lengths or not segment else segment
    if not all(abs(n) < FARTHEST for n in itertools.chain(box or (), *polygons)):
        raise ValueError("a coordinate is far outside the picture")
    if run_lengths or segment and (not box or area is None):
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
        raise ValueError("the area is not finite")
    return crowd, area, [x, y, x + w, y + h], segment


def open_upright(path, size):
    """A picture of the size (height, width) that its annotations were made for.

    It is turned as its EXIF says, as by detectron2, or stays as it is stored if only that
    fits. Raises ValueError if neither does.
    """
    image = open_picture(path)
    try:
        turned = upright(image)
    except Exception:  # noqa: BLE001 (damaged EXIF raises anything; the pixels may be whole)
        turned = image
    for one in (turned, image):
        if one.size == (size[1], size[0]):
            return one
    sides = "{} x {}".format
    raise ValueError(f"{sides(*image.size)} pixels, annotated as {sides(size[1], size[0])}")


class ToyScenes(Toy):
    """The toy world's objects: boxes and masks of their visible pixels, labels by shape."""

    has_masks, frequencies = True, None

    def __init__(self, split, size, count=None):
        super().__init__(split, (size, size))
        self.sizes = self.sizes[:count]
        self.identity = f"toy scenes {TOY_VERSION}, {len(self.sizes)} pictures an epoch"
        self.category_ids = list(range(1, 1 + len(self.classes)))
        self.ids = range(self.first, self.first + len(self.sizes))
        self.sides = [(size, size)] * len(self.sizes)

    def read(self, number):
        sample = super().read(number)
        masks = sample["masks"]()
        seen = masks.any(axis=(1, 2))
        masks, labels = masks[seen], np.array(sample["labels"], dtype=np.int64)[seen]
        boxes = np.array([tight_box(mask) for mask in masks], dtype=np.float64)
        return {
            "image": sample["image"],
            "image_id": self.first + number,
            "size": (self.size, self.size),
            "boxes": boxes.reshape(-1, 4),
            "labels": labels,
            "crowd": np.zeros(len(labels), dtype=bool),
            "areas": masks.sum(axis=(1, 2)).astype(np.float64),
            "segments": list(masks),
        }


def tight_box(mask):
    """x1 y1 x2 y2 around a (height, width) bool mask; zeros if it is empty."""
    if not mask.any():
        return 0, 0, 0, 0
    rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def repeat_factors(scenes, threshold=0.001):
    """WeightedOrder's arguments for LVIS's repeat-factor sampling.

    A picture comes max(1, sqrt(threshold / f)) times in an epoch, where f is the share of
    pictures with its rarest category in them: the LVIS paper's (arXiv 1908.03195, appendix
    B), whose threshold is 0.001.
    """
    present, counts = classes_present(scenes)
    factors = np.sqrt(threshold * len(present) / counts.clip(1)).clip(1)
    weights = [factors[labels].max(initial=1) for labels in present]
    weights = np.rint(np.array(weights) * WEIGHT).astype(np.int64)
    between = partial(weights_between, weights)
    return {"totals": weights, "weights": between, "largest": weights.max()}


def classes_present(scenes):
    """The classes of each picture, and in how many pictures each class is, (classes,) int64."""
    present = [np.unique(scenes.labels[a:b]) for a, b in itertools.pairwise(scenes.edges)]
    return present, np.bincount(np.concatenate(present), minlength=len(scenes.classes))


def weights_between(weights, first, stop):
    return weights[first:stop]


# -------------------------------------------------------------------------------- scenes to tensors


# Picture -> square: points times scale (x, y), mirrored at `width` if flip, less corner (x, y),
# cut to (width, height). What is right of it and below is padding.
View = namedtuple("View", "scale flip width corner cut")


def random_view(size, side, draws=(0, 0, 0, 1), jitter=(1, 1)):
    """The View of a picture of size (height, width) in a square.

    With the defaults, the whole picture, its longest side that of the square. draws: four
    uniform numbers for large-scale jitter: the longest side becomes that of the square times
    jitter, and a random square of it is cut out.
    """
    (height, width), (low, high), (change, x, y, flip) = size, jitter, draws
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
    """A PIL image -> (C, S, S) uint8 tensor; bilinear and padded with what normalises to 0,
    as detectron2 (to rounding)."""
    image = to_mode(image, channels)
    image = ImageOps.mirror(image) if view.flip else image
    (x, y), (w, h), (sx, sy) = view.corner, view.cut, view.scale
    box = x / sx, y / sy, min(image.width, (x + w) / sx), min(image.height, (y + h) / sy)
    image = image.resize(view.cut, Image.Resampling.BILINEAR, box=box)
    mean = (255 * torch.tensor(channel_statistics(channels)[0])).round().to(torch.uint8)
    pixels = mean.repeat(side, side, 1)
    pixels[:h, :w] = torch.from_numpy(np.array(image).reshape(h, w, channels))
    return pixels.permute(2, 0, 1)


def view_mask(segment, size, view, side):
    """A segment of a picture of size (height, width) -> (S, S) bool.

    Polygons are drawn in the square; pixels are taken at their centres.
    """
    mask, (w, h) = np.zeros((side, side), dtype=bool), view.cut
    if isinstance(segment, list):
        moved = [view_points(points, view) for points in polygons_of(segment)]
        rles = [polygon_to_rle(points, h, w) for points in moved]
        mask[:h, :w] = decode_mask(merge_rles(rles, h, w))
        return mask
    pixels = isinstance(segment, np.ndarray)
    whole = segment if pixels else decode_mask(as_rle(segment, *size))
    x, y = (np.arange(n) + c + 0.5 for n, c in zip(view.cut, view.corner))
    x = view.width - x if view.flip else x
    columns = (x / view.scale[0]).astype(int).clip(max=size[1] - 1)
    rows = (y / view.scale[1]).astype(int).clip(max=size[0] - 1)
    mask[:h, :w] = whole[rows][:, columns]
    return mask


def view_target(sample, view, side, with_masks):
    """What there is to find in the square: see make_scene. Objects cut away are left out.

    The box of an object that is cut, or known by its pixels, is that of its visible pixels,
    as detectron2's ViTDet (recompute_boxes). Other polygons keep their annotated, finer box.
    """
    whole, crowd = view_boxes(sample["boxes"], view), sample["crowd"]
    boxes = whole.clip(0, view.cut * 2)
    seen = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    kept, masks = np.flatnonzero(seen & ~crowd), None
    if with_masks:
        masks = np.zeros((len(kept), side, side), dtype=bool)
        for mask, i in zip(masks, kept):
            mask[:] = view_mask(sample["segments"][i], sample["size"], view, side)
        some = masks.any(axis=(1, 2))
        kept, masks = kept[some], masks[some]
        for i, mask in zip(kept, masks):
            polygons = isinstance(sample["segments"][i], list)
            if (boxes[i] != whole[i]).any() or not polygons:
                tight = np.array(tight_box(mask))
                low = np.maximum(boxes[i], tight)[:2]
                high = np.minimum(boxes[i], tight)[2:]
                # A box may be annotated where its mask is not.
                boxes[i] = [*low, *high] if (high > low).all() else tight
        masks = torch.from_numpy(masks)
    return {
        "boxes": torch.from_numpy(boxes[kept]).float(),
        "labels": torch.from_numpy(sample["labels"][kept]),
        "masks": masks,
        "size": view.cut[::-1],
    }


def make_scene(sample, key, side, channels, has_masks, jitter=None, flip=True):
    """A row of a batch of scenes. sample None: a black picture without objects.

    images   (C, S, S) uint8, S = side; of the mean colour where padded
    targets  a dict of what there is to find, without crowds:
             boxes   (n, 4) float32, x1 y1 x2 y2 in the square
             labels  (n,) int64
             masks   (n, S, S) bool, or None
             size    (height, width) of the picture in the square
             seed    an int for what is drawn on the device
    sizes    (2,) int64, the picture's height and width
    scales   (2,) float64, x and y: boxes of the square / scales = boxes of the picture
             (without jitter, which cuts and flips the picture)

    jitter   (least, largest) scale: training, with random scales, flips and squares. None:
             the whole picture
    flip     False: no random flips
    """
    options = {}
    if jitter and sample:
        *draws, mirrored = uniform(random_bits(4, *key, VIEW)).tolist()
        options = {"draws": (*draws, mirrored if flip else 1), "jitter": jitter}
    sample = sample or empty_scene(side, channels)
    view = random_view(sample["size"], side, **options)
    seed = int(random_bits(1, *key, DEVICE)[0] >> np.uint64(1))
    return {
        "images": view_pixels(sample["image"](), view, side, channels),
        "targets": view_target(sample, view, side, has_masks) | {"seed": seed},
        "sizes": torch.tensor(sample["size"]),
        "scales": torch.tensor(view.scale, dtype=torch.float64),
    }


def empty_scene(side, channels):
    """A source's sample: a black picture without objects."""
    return {
        "image": partial(Image.new, MODES[channels], (side, side)),
        "size": (side, side),
        "boxes": np.zeros((0, 4)),
        "labels": np.zeros(0, dtype=np.int64),
        "crowd": np.zeros(0, dtype=bool),
    }


def scene_maker(scenes, config, jitter=None, flip=True):
    """make_scene for data.Batches of these scenes and a detector with this config."""
    side, channels = max(config["image_size"]), config["channels"]
    check_channels(channels)
    options = {"side": side, "channels": channels, "has_masks": scenes.has_masks}
    return partial(make_scene, **options, jitter=jitter, flip=flip)


# --------------------------------------------------------------------------- detections to pictures


def detections_in_picture(answer, size, scale):
    """A square's detections for its picture of (height, width), on the CPU; masks as RLE.
    scale: (2,) x and y, see make_scene."""
    boxes, masks = answer["boxes"] / scale.repeat(2).to(answer["boxes"]), None
    if answer["masks"] is not None:
        pixels = paste_masks(answer["masks"], boxes, size).cpu().numpy()
        masks = [encode_mask(mask) for mask in pixels]
    found = {name: answer[name].cpu() for name in ("scores", "labels")}
    return found | {"boxes": boxes.cpu(), "masks": masks}


def paste_masks(masks, boxes, size):
    """Probabilities in boxes, (k, m, m), -> masks of an image of (height, width), (k, H, W).

    Bilinear between the centres of cells, 0 outside; True where it is at least one half.
    """
    height, width = size
    out = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    x = torch.arange(width, device=masks.device) + 0.5
    y = torch.arange(height, device=masks.device) + 0.5
    for i, (left, top, right, bottom) in enumerate(boxes):  # one at a time: there may be 300
        column = (x - left) / (right - left) * 2 - 1
        row = (y - top) / (bottom - top) * 2 - 1
        at = torch.stack(torch.meshgrid(column, row, indexing="xy"), dim=2)  # (H, W, 2)
        pasted = F.grid_sample(masks[i, None, None], at[None], align_corners=False)
        out[i] = pasted[0, 0] >= 0.5
    return out


# ------------------------------------------------------------------------------------------ results


def write_results(path, scenes, detections):
    """Write COCO's results: a list of {"image_id", "category_id", "score", "bbox": [x, y,
    width, height], and if there are masks "segmentation"}."""
    results = []
    for image, found in detections.items():
        columns = (np.asarray(found[key]).tolist() for key in ("boxes", "scores", "labels"))
        for i, ((x, y, right, bottom), score, label) in enumerate(zip(*columns)):
            category = scenes.category_ids[label]
            entry = {"image_id": image, "category_id": category, "score": score}
            entry["bbox"] = [x, y, right - x, bottom - y]
            if found.get("masks") is not None:
                mask = as_rle(found["masks"][i], *found["masks"][i]["size"])
                entry["segmentation"] = mask | {"counts": text_of_counts(mask["counts"])}
            results.append(entry)
    replace_file(path, json.dumps(results).encode())


def read_results(path, scenes):
    """The detections in a file: see write_results. Boxes may be left out where there are
    masks. Raises ValueError if the file is damaged or of other scenes."""
    label = {category: number for number, category in enumerate(scenes.category_ids)}
    sizes, detections, entry = dict(zip(scenes.ids, scenes.sides)), {}, None
    try:
        with open(path, encoding="utf-8") as file:
            for entry in json.load(file):
                image = entry["image_id"]
                if image not in sizes or entry["category_id"] not in label:
                    raise ValueError("there is no such picture or category")
                # Nothing uses a result's area: with one given, none is computed of the mask.
                _, _, box, mask = read_annotation(entry | {"area": 0.0}, sizes[image])
                score = float(entry["score"])
                if not math.isfinite(score):
                    raise ValueError("a score that is no number")
                row = {"boxes": box, "scores": score, "masks": mask}
                row["labels"] = label[entry["category_id"]]
                found = detections.setdefault(image, {key: [] for key in row})
                for key, value in row.items():
                    found[key].append(value)
    except DAMAGED as error:
        where = f" at {entry!r:.100}" if entry else ""
        raise ValueError(f"cannot read results from {path}{where}: {one_line(error)}") from None
    for found in detections.values():
        if None in found["masks"]:
            found["masks"] = None
    return detections
