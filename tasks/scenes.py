"""Scenes: pictures with boxes and masks, of COCO's or LVIS's layout, or of the toy world."""

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

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from data import (
    DEVICE,
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
from support.toy import Toy
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


class Scenes(Source):
    """Pictures with COCO's or LVIS's annotations, in the order of their ids. The layouts known:

    DIR/annotations/NAME_SPLIT.json with pictures at DIR/SPLIT/file_name or DIR/file_name. Without
    file_name (LVIS), it is the last two parts of coco_url. `pictures`: the folder to look in.

    train: leave out what teaches nothing: boxes of no area, objects without a mask where others
    have one, and, as detectron2, pictures with nothing in them but crowds.

    Annotations that are damaged, or of an image or a category that is not listed, are left out and
    counted. Without `train`, objects without a mask where others have one are counted, too: they
    are measured by their boxes alone, see average_precision.
    """

    def __init__(self, path, pictures=None, train=False):
        self.path = path
        try:
            with open(path, "rb") as file:
                text = file.read()
            content = json.loads(text)
            images, categories = (
                sorted_by_id(content["images"]),
                sorted_by_id(content["categories"]),
            )
            self.category_ids = [category["id"] for category in categories]
            self.classes = [category["name"] for category in categories]
            frequencies = [category.get("frequency") for category in categories]
            self.frequencies = frequencies if all(frequencies) and frequencies else None
            sides = {image["id"]: (int(image["height"]), int(image["width"])) for image in images}
            if not all(0 < side < FARTHEST for side in itertools.chain(*sides.values())):
                raise ValueError(f"there is a height or width that is not from 1 to {FARTHEST}")
            labels = {category: label for label, category in enumerate(self.category_ids)}
            objects = self.read_objects(content["annotations"], sides, labels, train)
            if train:
                images = [image for image in images if not all_crowds(objects[image["id"]])]
            self.ids = [image["id"] for image in images]
            self.sides = [sides[image] for image in self.ids]
            self.files = [
                str(image.get("file_name") or "/".join(image["coco_url"].split("/")[-2:]))
                for image in images
            ]
            groups = {"negative": "neg_category_ids"}
            groups |= {"not_exhaustive": "not_exhaustive_category_ids"}
            self.federated = [
                {name: [labels[i] for i in image[key]] for name, key in groups.items()}
                for image in images
                if self.frequencies
            ]
        except DAMAGED as error:
            raise ValueError(
                f"cannot read annotations from {path} (want COCO's or LVIS's json): "
                f"{one_line(error)}"
            ) from None
        if not images or not self.classes:
            raise ValueError(f"{path} lists no pictures with objects to learn or no categories")
        self.edges = running_sum([len(objects[image]) for image in self.ids])  # of their objects
        rows = [row for image in self.ids for row in objects[image]]
        table = np.array([row[:7] for row in rows], dtype=np.float64).reshape(-1, 7)
        self.labels, self.crowd = table[:, 0].astype(np.int64), table[:, 1] > 0
        self.areas, self.boxes = table[:, 2], table[:, 3:]
        # One array of bytes: millions of Python objects would be copied into each worker process.
        self.ends = running_sum([len(row[7]) for row in rows])
        self.segments = np.frombuffer(b"".join([row[7] for row in rows]), dtype=np.uint8)
        self.root = pictures or self.find_pictures()
        self.sizes = np.ones(len(images), dtype=np.int64)
        digest = hashlib.sha256(text + repr(train).encode()).hexdigest()[:16]
        self.identity = f"{len(images)} pictures, {len(rows)} objects, {digest}"

    def read_objects(self, annotations, sides, labels, train):
        """{image id: [(label, crowd, area, x1, y1, x2, y2, segment as JSON)]}, all images included.

        sides: {image id: (height, width)}, labels: {category id: label}. Print what is left out.
        """
        with_masks = (isinstance(one, dict) and one.get("segmentation") for one in annotations)
        self.has_masks = any(with_masks)
        objects, notes = {image: [] for image in sides}, {}
        for one in annotations:
            note, kept = None, False
            try:
                image, category = one["image_id"], one["category_id"]
                if image not in sides:
                    note = "annotations of an image that is not listed, left out"
                elif category not in labels:
                    note = "annotations of a category that is not listed, left out"
                else:
                    crowd, area, box, segment = read_annotation(one, sides[image])
                    kept = not train
                    if train and not (box[2] > box[0] and box[3] > box[1]):
                        note = "annotations with a box of no area, left out"
                    elif self.has_masks and not (has_mask(segment) or crowd):
                        note = "objects without a mask, left out" + (" of mask AP" if kept else "")
            except DAMAGED:
                note = "annotations that are damaged, left out"
            if note:
                first = one.get("id") if isinstance(one, dict) else None
                notes.setdefault(note, []).append(first)
            if kept or not note:
                text = json.dumps(segment).encode()
                objects[image].append((labels[category], crowd, area, *box, text))
        for note, ids in notes.items():
            print(f"{self.path}: {note}: {len(ids)} (the first has id {ids[0]})", file=sys.stderr)
        return objects

    def find_pictures(self):
        """The folder that holds the first hundred pictures, or some of them."""
        folder, name = os.path.split(os.path.abspath(self.path))
        root = os.path.dirname(folder) if os.path.basename(folder) == "annotations" else folder
        split = os.path.splitext(name)[0].split("_")[-1]
        for place in (os.path.join(root, split), root):
            if any(os.path.exists(os.path.join(place, file)) for file in self.files[:100]):
                return place
        raise ValueError(f"the pictures of {self.path} are not at {root}/{split}/{self.files[0]}")

    def read(self, number):
        first, stop = self.edges[number : number + 2].tolist()
        mine, ends = slice(first, stop), self.ends[first : stop + 1].tolist()
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
            **(self.federated[number] if self.frequencies else {}),
        }

    def name(self, number):
        return os.path.join(self.root, self.files[number])

    where = name


def sorted_by_id(entries):
    """The pictures or categories of a file by their ids. ValueError if two have the same."""
    entries = sorted(entries, key=lambda entry: entry["id"])
    if len({entry["id"] for entry in entries}) < len(entries):
        raise ValueError("two pictures, or two categories, have the same id")
    return entries


def all_crowds(rows):
    return all(crowd for _, crowd, *_ in rows)


def read_annotation(one, size):
    """(True if a crowd, area, [x1, y1, x2, y2], segment or None) of an annotation of a picture.

    size: the picture's (height, width). A missing box or area is the segment's, and without a
    segment a missing area is the box's. Raises one of DAMAGED if it cannot be used.
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

    Turned as its EXIF says, like detectron2's; as it is stored, if only that fits. Raises
    ValueError if neither does.
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
    """WeightedOrder's arguments for LVIS's repeat-factor sampling.

    A picture comes max(1, sqrt(threshold / f)) times in an epoch, where f is the share of pictures
    with its rarest category in them: the LVIS paper's (arXiv 1908.03195, appendix B), whose
    threshold is 0.001.
    """
    present, counts = classes_present(scenes)
    factors = np.sqrt(threshold * len(present) / counts.clip(1)).clip(1)
    weights = [factors[labels].max(initial=1) for labels in present]
    weights = np.rint(np.array(weights) * WEIGHT).astype(np.int64)
    return {
        "totals": weights,
        "weights": partial(weights_between, weights),
        "largest": weights.max(),
    }


def classes_present(scenes):
    """The classes of each picture, and in how many pictures each class is, (classes,) int64."""
    present = [np.unique(scenes.labels[a:b]) for a, b in itertools.pairwise(scenes.edges)]
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
    """What there is to find in the square: see make_scene. Objects cut away are left out.

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


def make_scene(sample, key, side, channels, has_masks, jitter=None):
    """A row of a batch of scenes:

    images   (C, S, S) uint8, S = side; of the mean colour where padded
    targets  a dict: "boxes" (n, 4) float32 x1 y1 x2 y2 in the square; "labels" (n,) int64; "masks"
             (n, S, S) bool or None; "size", (height, width) that the picture has there; "seed", an
             int for what is drawn on the device. Crowds are left out
    sizes    (2,) int64, the picture's height and width
    scales   (2,) float64, x and y: boxes of the square / scales = boxes of the picture (without
             jitter: with it, the picture was cut and flipped as well)

    jitter   (least, largest) scale: training, with random scales, flips and squares. None: see
             random_view
    """
    seed = int(random_bits(1, *key, DEVICE)[0] >> np.uint64(1))
    if sample is None:
        return {
            "images": torch.zeros(side, side, channels, dtype=torch.uint8).movedim(-1, 0),
            "targets": empty_target(side, has_masks) | {"seed": seed},
            "sizes": torch.tensor((side, side)),
            "scales": torch.ones(2, dtype=torch.float64),
        }
    draws = uniform(random_bits(4, *key, VIEW)).tolist() if jitter else None
    view = random_view(sample["size"], side, draws, jitter)
    return {
        "images": view_pixels(sample["image"](), view, side, channels),
        "targets": view_target(sample, view, side, has_masks) | {"seed": seed},
        "sizes": torch.tensor(sample["size"]),
        "scales": torch.tensor(view.scale, dtype=torch.float64),
    }


def scene_maker(scenes, config, jitter=None):
    """make_scene for data.Batches of these scenes and a detector with this config."""
    side, channels = max(config["image_size"]), config["channels"]
    check_channels(channels)
    options = {"side": side, "channels": channels, "has_masks": scenes.has_masks}
    return partial(make_scene, **options, jitter=jitter)


def empty_target(side, with_masks):
    masks = torch.zeros(0, side, side, dtype=torch.bool) if with_masks else None
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return nothing | {"masks": masks, "size": (side, side)}


# --------------------------------------------------------------------------- detections to pictures


def detections_in_picture(answer, size, scale):
    """A square's detections for its picture of (height, width), on the CPU; masks as run lengths.

    scale: (2,) x and y, see make_scene.
    """
    boxes, masks = answer["boxes"] / scale.repeat(2).to(answer["boxes"]), None
    if answer["masks"] is not None:
        pixels = paste_masks(answer["masks"], boxes, size).cpu().numpy()
        masks = [encode_mask(mask) for mask in pixels]
    found = {name: answer[name].cpu() for name in ("scores", "labels")}
    return found | {"boxes": boxes.cpu(), "masks": masks}


def paste_masks(masks, boxes, size):
    """Probabilities in boxes, (k, m, m), -> masks of an image of (height, width), (k, H, W) bool.

    Bilinear between the centres of cells, 0 outside; an object is where it is at least one half.
    """
    height, width = size
    out = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    x = torch.arange(width, device=masks.device) + 0.5
    y = torch.arange(height, device=masks.device) + 0.5
    for i, (left, top, right, bottom) in enumerate(boxes):  # one at a time: there may be 300
        column, row = (x - left) / (right - left) * 2 - 1, (y - top) / (bottom - top) * 2 - 1
        at = torch.stack(torch.meshgrid(column, row, indexing="xy"), dim=2)  # (H, W, 2)
        out[i] = F.grid_sample(masks[i, None, None], at[None], align_corners=False)[0, 0] >= 0.5
    return out


# ------------------------------------------------------------------------------------------ results


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
    replace_file(path, json.dumps(results).encode())


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
        why = one_line(error)
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
