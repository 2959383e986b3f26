"""Where samples come from, in what order, and how they become tensors.

    open_sources      one --data string: "toy", a folder of pictures, or tar shards from anywhere
    Clips             a video -> the frames of a clip, the same crop of each
    Order             position -> sample: a pure function of (seed, epoch, position), in lanes
    open_tokenizer    captions -> ids: of bytes, or XLM-R's
    Batches, loader   samples -> uint8 tensors, made in worker processes
    normalize         uint8 -> float, on the device
    toy_sample        the procedural picture world behind --data toy; toy_clip, of videos

    python data.py pack FOLDER OUT-%05d.tar [--short-side 256]     pictures -> shards
    python data.py index 'SHARDS-*.tar'                            shards -> their index
    python data.py hashtags DATA --out TAGS                        vocabulary and sampling weights

Every random draw is keyed by (seed, epoch, position, purpose): nothing depends on the number of
workers, processes or nodes, nor on what was drawn before. A sample that cannot be read keeps its
position as a zero image of weight 0; nothing shifts.
This file needs torch, numpy, pillow and tqdm, and stands alone when copied. (XLM-R's tokenizer
needs sentencepiece, too; video files the ffmpeg program.)
"""

import argparse
import csv
import dataclasses
import errno
import glob
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # of a picture, if nothing else is said: 89 million
# A picture of more pixels is an error, not a warning: see Batches.
warnings.simplefilter("error", Image.DecompressionBombWarning)

# What a random draw is for. Numbers, not names, because they are half of Philox's key.
SHARDS, OFFSET, LANES, BLOCKS, VIEW, MASK, TOY, SPLIT, AUGMENT, DEVICE, CAPTION = range(1, 12)


def random_bits(count, seed, epoch, position, purpose):
    """`count` raw 64-bit draws (uint64), a pure function of the four keys.

    Philox is counter-based: any stretch of any stream is there without drawing what comes before.
    Only its raw bits are used, because numpy may change its distributions between versions.
    """
    key = np.array([seed, purpose], dtype=np.uint64)
    counter = np.array([0, position, epoch, 0], dtype=np.uint64)  # the first word counts the draws
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def uniform(bits):
    """uint64 -> float64 in [0, 1), from the upper 53 bits."""
    return (bits >> np.uint64(11)) * 2.0**-53


def permutation(count, seed, epoch, position, purpose):
    """A random permutation of 0 .. count - 1, int64. (Stable: ties must not depend on the sort.)"""
    return np.argsort(random_bits(count, seed, epoch, position, purpose), kind="stable")


def running_sum(counts):
    """(S,) -> (S + 1,) int64: how many there are before each, and in all."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


# -------------------------------------------------------------------------------------------- order

WEIGHT = 1 << 16  # a sampling weight of 1.0: weights are whole numbers, so that sums are exact
SHUFFLE_BLOCK = 8192  # samples that are shuffled together, from as few shards as hold them


class Order:
    """The endless stream of samples: position -> sample number, counted through the shards.

    Position p lies in epoch p // length. An epoch is a fixed multiset: every sample once or, with
    sampling weights, as often as its weight says.

    The stream is dealt to `lanes` in pairs: lane (p // 2) % lanes (in pairs, because mixup mixes
    positions 2i and 2i + 1). Process r of W takes the positions with (p // 2) % W == r: for any W
    that divides the lanes these are whole lanes, so the global order is the same for all such W and
    each process reads only its own lanes' shards.

    For an epoch, all shards are laid end to end (in an order that depends on the seed alone) and
    cut into one stretch per lane, each exactly as long as the number of positions that the lane has
    in that epoch. So lanes never end unevenly. Instead, a shard that a cut runs through is read by
    two lanes, and from epoch to epoch the cuts move by fewer than 2 x lanes samples. Within a lane,
    shards come in a random order, and samples are shuffled in blocks of neighbouring shards: a
    process holds two blocks of numbers per lane, and otherwise only what grows with the shards.

    sizes    (S,) samples in each shard
    totals   (S,) int64, the sum of each shard's sampling weights in units of 1 / WEIGHT, or None
    weights  (first, stop) -> int64 weights of these samples in the same units, read with a shard
    most     the largest of the weights

    With weights, sample i owns a stretch of length weights[i] of a line of length sum(totals), and
    is drawn once for each of the `length` points on it, which lie WEIGHT apart from a random offset
    on, new in each epoch (systematic sampling): as often as its weight says, rounded up or down.
    (Where the sum is no whole number, what is left over is shared out among the first gaps.)
    """

    def __init__(self, sizes, seed=0, lanes=None, totals=None, weights=None, most=WEIGHT):
        sizes = np.asarray(sizes, dtype=np.int64)
        self.seed, self.weights, self.most = seed, weights, most
        self.lanes = lanes or min(48, len(sizes))
        shards = permutation(len(sizes), seed, 0, 0, SHARDS)
        spans = (sizes if weights is None else np.asarray(totals, dtype=np.int64))[shards]
        self.edges = running_sum(spans)  # (S + 1,) in samples, or in weight
        self.first, self.sizes = (np.cumsum(sizes) - sizes)[shards], sizes[shards]
        self.length = int(self.edges[-1]) // (1 if weights is None else WEIGHT)
        if self.length < 1:
            raise ValueError("there are no samples to draw from")
        self.blocks = {}  # lane -> [(epoch, first turn, sample numbers)] of its last two blocks

    def __call__(self, position):
        """The sample number of a position."""
        epoch, lane = position // self.length, position // 2 % self.lanes
        turn = self.before(lane + 1, position, epoch) - self.before(lane, position, epoch)
        last = self.blocks.get(lane, [])
        for block_epoch, first, samples in last:
            if block_epoch == epoch and first <= turn < first + len(samples):
                return int(samples[turn - first])
        self.blocks[lane] = [*last[-1:], (epoch, *self.block(epoch, lane, turn))]
        return self(position)

    def too_many(self, bad, drawn, share):
        """Whether `bad` unreadable ones among the first `drawn` are over a share (--max-bad).

        One picture alone, as often as it comes in the epochs begun, never is; all of them are.
        """
        alone = (drawn // self.length + 1) * -(-self.most // WEIGHT)
        return bad > max(share * max(1000, drawn), alone) or bad == drawn > 1

    def before(self, lane, position, epoch):
        """How many of an epoch's positions before `position` belong to lanes before `lane`."""
        rounds = (divmod(place, 2 * self.lanes) for place in (epoch * self.length, position))
        start, stop = (whole * 2 * lane + min(rest, 2 * lane) for whole, rest in rounds)
        return stop - start

    def block(self, epoch, lane, turn):
        """The shuffled block of a lane that holds its `turn`: (its first turn, sample numbers)."""
        edges = self.edges
        if self.weights is not None:  # from weight to draws: the points that lie before each edge
            gap, wider = divmod(int(edges[-1]), self.length)  # the first gaps are wider by one
            offset = int(random_bits(1, self.seed, epoch, 0, OFFSET)[0] % gap)
            rest = edges - offset
            edges = np.maximum(-(-rest // (gap + 1)), -((wider - rest) // gap)).clip(min=0)
        # The lane's stretch of the epoch's draws, and the pieces of shards that lie in it.
        end = (epoch + 1) * self.length
        start, stop = self.before(lane, end, epoch), self.before(lane + 1, end, epoch)
        piece = np.searchsorted(edges, start, "right") - 1
        last = np.searchsorted(edges, stop, "left")
        cuts = np.clip(edges[piece : last + 1], start, stop)
        order = permutation(len(cuts) - 1, self.seed, epoch, lane, LANES)
        counts = np.diff(cuts)[order]
        firsts = np.cumsum(counts) - counts
        # The pieces that begin in the same SHUFFLE_BLOCK make a block.
        number = firsts // SHUFFLE_BLOCK
        block = number[np.searchsorted(firsts + counts, turn, "right")]
        order, counts, firsts = (array[number == block] for array in (order, counts, firsts))
        draws = np.arange(counts.sum()) + np.repeat(cuts[order] - (firsts - firsts[0]), counts)
        shards = np.repeat(piece + order, counts)
        if self.weights is None:
            samples = draws - edges[shards]
        else:
            points = offset + draws * gap + np.minimum(draws, wider) - self.edges[shards]
            samples = np.empty_like(draws)
            for i in np.unique(shards):
                ends = np.cumsum(self.weights(self.first[i], self.first[i] + self.sizes[i]))
                samples[shards == i] = np.searchsorted(ends, points[shards == i], "right")
        samples += self.first[shards]
        shuffle = permutation(len(draws), self.seed, epoch, lane << 32 | int(block), BLOCKS)
        return int(firsts[0]), samples[shuffle]


# ------------------------------------------------------------------------------------------ sources
#
# A source has: sizes (S,) int64, samples per shard; classes, a list of names, or None; identity;
# name(number); where(number), the shard or picture, known without opening it; and read(number) ->
# {"image": a function that opens the PIL image, "class": int, -1 if unknown, "hashtags": one that
# gives a list of tags, or a text with #tags in it, "captions": one that gives a list of texts}.
# (They raise ValueError where that is damaged.) So who wants labels, tags or captions reads the
# same, and opens no picture. Numbers run through the shards. Remote shards have a cache, too.
# Sources of videos have "video" instead, shards have both: see "videos".

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def open_sources(
    data,
    val_data=None,
    size=(64, 64),
    labels=None,
    val_labels=None,
    cache=(None, "20G"),
    caption_key="caption",
    videos=False,
):
    """(source to train on, source to measure on or None) behind --data and --val-data.

    data         "toy"; a folder of pictures; or tar shards: a path, a glob, or {00000..00099}
                 braces; of a web address or a pipe:COMMAND, too: see "shards from elsewhere"
    size         (height, width) that pictures will have: the toy world is drawn for it
    labels       a file that lists the pictures of a folder: see read_labels
    cache        (folder or None, size like "500G") for what comes from elsewhere
    caption_key  what captions are called in shards' .json, and in labels
    videos       of these instead: a folder has folders of frames and video files in it, or is that
                 of a list of them, data itself: see read_video_labels

    Without val_data, toy has its own, and so has a folder with train/ and val/ in it, or what else
    these are called: see SPLITS. Its test/ is left out. (Where labels list a folder's pictures,
    folders mean nothing.) Raises ValueError with one line that says what to do.
    """
    if videos and data.lower().endswith(LISTS) and os.path.isfile(data):
        data, labels = os.path.dirname(data) or ".", labels or data
    if videos and val_data and val_data.lower().endswith(LISTS) and os.path.isfile(val_data):
        val_data, val_labels = os.path.dirname(val_data) or ".", val_labels or val_data
    if labels and not os.path.isdir(data) or val_labels and not os.path.isdir(val_data or data):
        raise ValueError("--labels and --val-labels want a folder that their paths lie in")
    if val_data and not val_labels and find_splits(val_data):
        raise ValueError(f"{val_data} holds several splits: give one of its folders as --val-data")
    if data == "toy":
        val_data = val_data or "toy"
    elif not labels and (splits := find_splits(data)):
        data, own = choose_splits(data, splits)
        val_data = val_data or own
    elif val_labels:
        val_data = val_data or data
    how = cache, caption_key, videos
    train = open_source(data, size, None, "train", labels, *how)
    val = val_data and open_source(val_data, size, train.classes, "val", val_labels, *how)
    return train, val or None


# What folders of splits are called, in any case.
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
SPLITS |= {"test": "test", "testing": "test"}


def find_splits(root):
    """{"train", "val", "test", "other": names of the folders below root that are this split, or
    none, but hold pictures or videos}; {} where root is no folder, or has no splits.

    A train/ alone is no split: all pictures are trained on. Beside other folders, a train/ with
    pictures directly in it is a class.
    """
    if not os.path.isdir(root):
        return {}
    with os.scandir(root) as entries:  # it knows folders without a look at every picture
        folders = sorted(entry.name for entry in entries if entry.name[0] != "." and entry.is_dir())
    found = {}
    for name in folders:
        if name.lower() in SPLITS:
            found.setdefault(SPLITS[name.lower()], []).append(name)
    if not found:
        return {}
    paths = {name: os.path.join(root, name) for name in folders}
    others = [n for n in folders if n.lower() not in SPLITS and holds_pictures(paths[n])]
    if list(found) == ["train"] and len(found["train"]) == 1:
        with os.scandir(paths[found["train"][0]]) as entries:
            if not others or any(is_media(entry.name) for entry in entries):
                return {}
    return found | ({"other": others} if others else {})


def holds_pictures(folder):
    """Whether there are pictures or videos anywhere below a folder."""
    try:
        return any(is_media(name) for _, names in walk(folder) for name in names)
    except ValueError:  # it cannot be read: lost+found, say
        return False


def is_media(name):
    return name.lower().endswith(PICTURES + VIDEOS) and not name.startswith(".")


def choose_splits(root, found):
    """(folder to train on, folder to measure on or None) of what find_splits found in root.

    Says that test is left out. Raises ValueError with the line to type where there are other
    folders with pictures, which may be classes; two folders of a split; or nothing to train on.
    """
    paths = {split: [os.path.join(root, name) for name in names] for split, names in found.items()}
    train, val, test = (paths.get(split, []) for split in ("train", "val", "test"))
    files = sorted(filter(is_media, os.listdir(root)))
    other = found.get("other") or ([] if train else files)
    if len(train) != 1 or len(val) > 1 or other:
        typed = ["--data", train[0]] if train else []
        typed += ["--val-data", (val or test)[0]] if val or not train else []
        want = shlex.join(typed) + ("" if train else " beside a --data to train on")
        splits = ", ".join(map(os.path.basename, train + val + test))
        beside = f" beside {', '.join(other[:3])}" if other else ""
        unless = ", or move the splits elsewhere (if they are classes: --labels)" if other else ""
        raise ValueError(f"{root} holds the splits {splits}{beside}: type {want}{unless}")
    if os.environ.get("RANK", "0") == "0":
        for path in test:
            print(f"{path}: left out (to measure on it, give it as --val-data)")
        if files:
            print(f"{root}: {len(files)} files beside the folders of its splits are left out")
    return train[0], val[0] if val else None


def open_source(data, size, classes, split, labels, cache, caption_key, videos):
    """One source. classes: the names that are known, when it must have no others."""
    if data == "toy":
        toy = ToyMotion(split, size) if videos else Toy(split, size)
        if classes not in (None, toy.classes):
            raise ValueError("the toy world has other classes than train: give other --val-data")
        return toy
    if os.path.isdir(data):
        return (VideoFolder if videos else Folder)(data, classes, labels, caption_key)
    remote = re.match(r"pipe:|\w+://", data)
    there = os.path.exists(data)
    named = data.lower().endswith(".tar") or not there and re.search(r"[*?\[{]", data)
    if not remote and not named:
        state = "is not a folder or a .tar" if there else "does not exist"
        raise ValueError(f"{data} {state}: --data wants toy, a folder of pictures or tar shards")
    shards = RemoteShards(data, *cache, videos) if remote else Shards(data, videos)
    shards.caption_key = caption_key
    if (classes and shards.classes or classes) != classes:
        raise ValueError(f"{data} has other classes than train: pack it after train, beside it")
    return shards


class Toy:
    """The procedural world of toy_sample. Its epoch is a number, the pictures never run out."""

    def __init__(self, split, size):
        self.first = 0 if split == "train" else TOY_VAL
        self.sides = size
        self.size = max(size) * 4 // 3  # larger than the target, so that crops are not enlarged
        self.sizes = np.ones(TOY_EPOCH if split == "train" else TOY_EPOCH // 16, dtype=np.int64)
        self.classes = list(TOY_CLASSES)
        self.identity = f"toy world, {len(self.sizes)} pictures an epoch"

    def read(self, number):
        return toy_sample(self.first + number, self.size)

    def name(self, number):
        return f"toy:{self.first + number}"

    where = name


class ToyMotion(Toy):
    """The same of toy_clip."""

    def __init__(self, split, size):
        super().__init__(split, size)
        self.size = max(size)  # crops would hide where things go
        self.classes = list(TOY_MOTIONS)
        self.identity = f"toy motion, {len(self.sizes)} videos an epoch"

    def read(self, number):
        return toy_clip(self.first + number, self.size)


class Folder:
    """Pictures below a folder. If all lie in subfolders, the first level's names are the classes.

    With `labels`, the pictures, classes, hashtags and captions that it lists: see read_labels.

    They are kept in the order of a hash of their paths: the same on every machine, and neighbours
    have nothing to do with each other. So any stretch of it is a fair sample: the held-out slice, a
    lane, a packed shard.
    """

    what = "pictures"

    def __init__(self, root, classes=None, labels=None, caption_key="caption"):
        entries = self.entries(root, labels, caption_key)
        self.root = root
        self.paths = sorted(entries, key=lambda path: (stable_hash(path), path))
        self.sizes = np.ones(len(self.paths), dtype=np.int64)
        names = [entries[path].get("class") for path in self.paths]
        found, self.classes = set(names) - {None}, None
        if found and (labels or None not in names) and (classes or labels or len(found) > 1):
            unknown = sorted(found - set(classes or found))
            if unknown:
                raise ValueError(f"{root} has classes that train has not: {', '.join(unknown[:5])}")
            self.classes = classes or sort_classes(found)
            if None in names:
                text = f"{labels}: {self.what} without a class: {names.count(None)}"
                print(text, file=sys.stderr)
        elif found:
            why = f"they would be the folders, two or more, of all {self.what}"
            print(f"{root}: no classes ({why})")
        numbers = {name: number for number, name in enumerate(self.classes or [])}
        self.labels = np.array([numbers.get(name, -1) for name in names])
        self.tags, self.captions = (
            [entries[path].get(key, []) for path in self.paths] for key in ("hashtags", "captions")
        )
        # A data set without captions is what it was before there were any.
        facts = json.dumps([self.paths, self.tags, names, *filter(any, [self.captions])])
        digest = hashlib.sha256(facts.encode()).hexdigest()[:16]
        self.identity = f"{len(self.paths)} {self.what}, {digest}"

    def entries(self, root, labels, caption_key):
        return read_labels(labels, caption_key) if labels else pictures_below(root)

    def read(self, number):
        return {
            "image": partial(open_picture, self.name(number)),
            "class": int(self.labels[number]),
            "hashtags": lambda: self.tags[number],
            "captions": lambda: self.captions[number],
        }

    def name(self, number):
        return os.path.join(self.root, self.paths[number])

    where = name


def sort_classes(names):
    """Names of classes in their order: by value, 2 before 10, if all are numbers, else as texts."""
    names = sorted(names)
    return sorted(names, key=int) if all(map(str.isdecimal, names)) else names


def pictures_below(root):
    """{path of a picture, relative to root: {"class": first folder of the path, if any}}."""
    files = list(walk(root))
    warn_of_splits(root, [folder for folder, names in files if any(map(is_picture, names))])
    paths = [f"{folder}{name}" for folder, names in files for name in names if is_picture(name)]
    if not paths:
        shards = any(name.lower().endswith(".tar") for _, names in files for name in names)
        hint = f": of its shards, give {os.path.join(root, '*.tar')}" if shards else ""
        raise ValueError(f"no pictures in {root} (looked for {' '.join(PICTURES)}){hint}")
    return {path: class_of(path) for path in paths}


def warn_of_splits(root, folders):
    """Say so if folders with pictures look like splits, in a way that find_splits does not know."""
    looks, found = re.compile("(?<![a-z])(train|test|val)(ing|id|idation)?(?![a-z])"), {}
    for folder in folders:
        for split in looks.finditer(folder.lower()):
            found.setdefault(split[1], folder)
    if len(found) > 1 and os.environ.get("RANK", "0") == "0":
        why = "look like splits, but all are read: give them as --data and --val-data"
        print(f"{root}: folders in it ({' '.join(sorted(found.values()))}) {why}", file=sys.stderr)


def class_of(path):
    return {"class": path.split("/")[0]} if "/" in path else {}


def walk(root):
    """(path relative to root with a last "/", or "", names of its files) of each folder below."""

    def fail(error):
        raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}")

    seen = {os.path.realpath(root)}
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        places = {name: os.path.realpath(os.path.join(folder, name)) for name in folders}
        folders[:] = [n for n in folders if not n.startswith(".") and places[n] not in seen]
        seen.update(map(places.get, folders))  # links may lead in circles
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        yield "" if below == "." else f"{below}/", files


def read_labels(path, caption_key="caption"):
    """{picture's path: {"class": name, "hashtags": [...], each if given, "captions": [...]}}.

    .jsonl: lines of {"path", and "class", "hashtags" or "caption", a text or a list of texts}.
    .csv: lines of path,class, perhaps under a head line; or the columns of a head line that names
    "path", and "class" or "caption". Spaces around a path or class do not count. .json:
    iNaturalist's, {"images": [{"id", "file_name"}], "annotations": [{"image_id", "category_id"}],
    "categories": [{"id", "name"}]}. A picture's captions may stand in several entries. An empty
    class is none. Entries that are damaged, name no picture or contradict an earlier one are
    counted and left out. Raises ValueError, one line, when the file is none of these.
    """
    found, bad, kind = {}, 0, path.rpartition(".")[2].lower()
    if kind not in ("jsonl", "csv", "json"):
        raise ValueError(f"{path} is no file of labels: want .jsonl, .csv or .json")
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            rows, head, first, headed = file, ["path", "class"], [], False
            if kind == "csv":
                rows = filter(None, csv.reader(file, strict=True, skipinitialspace=True))
                first = [cell.strip() for cell in next(rows, [])]
                headed = not any(map(is_picture, first))
                if headed and (caption_key in first or {"path", "class"} <= set(first)):
                    head = first
                # Captions stay as they are: they are part of what a data set is told by.
                rows = csv.reader(file, strict=True, skipinitialspace=caption_key not in head)
                rows = itertools.chain([first], rows)
            elif kind == "json":
                content = json.load(file)
                names = {entry["id"]: entry["name"] for entry in content["categories"]}
                counts = Counter(map(str, names.values()))
                if again := [name for name, count in counts.items() if count > 1]:
                    why = f"categories of the same name, each of which is one class ({len(again)})"
                    print(f"{path}: {why}: {', '.join(again[:5])}", file=sys.stderr)
                files = {entry["id"]: entry["file_name"] for entry in content["images"]}
                rows = content["annotations"]
            for number, row in enumerate(filter(None, rows)):
                try:
                    if kind == "csv":
                        facts = dict(zip(head, row, strict=True))
                        facts |= {n: facts[n].strip() for n in head if n != caption_key}
                    elif kind == "jsonl":
                        facts = json.loads(row)
                    else:
                        facts = {"path": files[row["image_id"]], "class": names[row["category_id"]]}
                    name, captions = facts["path"], texts_in(facts.get(caption_key))
                    if not is_picture(os.path.basename(name)) or "\ufffd" in str(row):
                        raise ValueError(name)
                    entry = {"hashtags": facts["hashtags"]} if "hashtags" in facts else {}
                    label = facts.get("class")
                    label = "" if label is None else str(label).strip()
                    entry |= {"class": label} if label else {}
                    known = found.setdefault(os.path.normpath(name), {**entry, "captions": []})
                    if known != {**entry, "captions": known["captions"]}:
                        raise ValueError(name)
                    known["captions"] += captions
                except (ValueError, KeyError, TypeError):
                    bad += number > 0 or not headed
    except (OSError, ValueError, KeyError, TypeError, RecursionError, csv.Error) as error:
        raise ValueError(f"cannot read labels from {path}: {one_line(error)}") from None
    if bad:
        why = "damaged, naming no picture, or against an earlier one"
        print(f"{path}: entries that are left out ({why}): {bad}", file=sys.stderr)
    line = f"{','.join(first)!r:.80}"
    if not found:
        want = "see read_labels in data.py"
        if kind == "csv":
            want = "want lines of path,class (with commas), perhaps under a head line, or a head"
            want += f" line that names path, and class or {caption_key}; the first line is {line}"
        raise ValueError(f"{path} lists no pictures: {want}")
    if headed and first != head:
        why = "is taken as a header; its columns are read as path and class"
        print(f"{path}: {line} {why}", file=sys.stderr)
    return found


def texts_in(content):
    """A text, a list of texts, or None -> a list. Raises ValueError if it is something else."""
    texts = [content] if isinstance(content, str) else [] if content is None else content
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"captions must be a text, or a list of texts: {content!r:.80}")
    return texts


def is_picture(name):
    return name.lower().endswith(PICTURES) and not name.startswith(".")


def all_labels(source):
    """(n,) int64 class numbers of a source's samples, -1 where none is known or can be read."""
    labels = read_all(source, "label", lambda sample: sample["class"], -1)
    return np.fromiter(labels, np.int64, int(source.sizes.sum()))


def all_captions(source):
    """The captions of each sample of a source, as they are: a list of lists of texts."""
    return list(read_all(source, "caption", lambda sample: sample["captions"](), []))


def read_all(source, name, value_of, unknown):
    """value_of(sample) for each sample of a source; what cannot be read is named, and unknown."""
    numbers = range(int(source.sizes.sum()))
    for number in tqdm(numbers, desc=f"{name}s", leave=False, disable=None):
        try:
            value = value_of(source.read(number))
        except Exception as error:  # noqa: BLE001 (tar members fail in many ways: named, left out)
            raise_if_unreachable(error)
            tqdm.write(f"unreadable {name}: {source.name(number)}: {error}", file=sys.stderr)
            value = unknown
        yield value


def stable_hash(text):
    """Python's own hash() differs between processes."""
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()


class Part:
    """The samples of a source with these numbers (a range or a list), in this order."""

    def __init__(self, source, numbers):
        self.source, self.numbers, self.classes = source, numbers, source.classes
        self.cache = getattr(source, "cache", None)
        self.sizes = np.ones(len(numbers), dtype=np.int64)
        if isinstance(numbers, range):  # shards stay shards, and lanes lanes: some may be empty
            self.sizes = np.diff(running_sum(source.sizes).clip(numbers.start, numbers.stop))
        digest = stable_hash(str(numbers)).hex()
        self.identity = f"{source.identity}, {len(numbers)} of them: {digest}"

    def read(self, number):
        return self.source.read(self.numbers[number])

    def name(self, number):
        return self.source.name(self.numbers[number])

    def where(self, number):
        return self.source.where(self.numbers[number])


HELD_OUT = 512  # pictures to measure on, and never more than 5 % of them


def hold_out(train, val, count, share=0.05):
    """(source to train on, at most `count` samples to measure on): val's first ones or, without
    val, the last ones of train, at most this share of it."""
    if val:
        return train, Part(val, range(min(count, int(val.sizes.sum()))))
    total = int(train.sizes.sum())
    count = min(count, int(total * share))
    return Part(train, range(total - count)), Part(train, range(total - count, total))


# ------------------------------------------------------------------------------------------- shards
#
# A WebDataset shard is a tar in which the files of a sample are neighbours and share a key, the
# path up to the base name's first dot: 00012.jpg, 00012.cls, 00012.json. Its index says where each
# sample begins and ends, and what is wrong with it; pack.json beside the shards names the classes,
# if pack made them.


class Shards:
    """Tar shards in the WebDataset layout, read in place: one pread for a sample."""

    caption_key = "caption"  # in .json

    def __init__(self, pattern, videos=False):
        self.paths = expand(pattern)
        if not self.paths:
            raise ValueError(f"no shard matches {pattern}")
        folders = sorted({os.path.dirname(path) for path in self.paths})
        classes = [pack_record(folder)["classes"] for folder in folders]
        with ThreadPoolExecutor() as threads:
            bar = partial(tqdm, total=len(self.paths), desc="opening shards", leave=False)
            heads = threads.map(partial(shard_index, whole=False), self.paths)
            heads = [head for head, _ in bar(heads, disable=None)]
        names, sizes = map(os.path.basename, self.paths), map(os.path.getsize, self.paths)
        facts = [(name, size, head[0]) for name, size, head in zip(names, sizes, heads)]
        faults = {path: head[1:] for path, head in zip(self.paths, heads) if any(head[1:])}
        self.describe(pattern, classes, facts, faults, videos)

    def describe(self, pattern, classes, facts, faults, videos):
        """classes: of each folder. facts: (base name, bytes, samples) of each shard; the same ones
        are the same data. faults: {path: see scan_tar} of shards that have any."""
        self.classes, *others = classes or [None]
        if any(names != self.classes for names in others):
            raise ValueError(f"{pattern}: the folders number their classes differently")
        self.facts, self.sizes = facts, np.array([n for *_, n in facts], dtype=np.int64)
        self.faults = faults
        if os.environ.get("RANK", "0") == "0":
            warn_of_faults(pattern, faults, videos)
        if not self.sizes.any():
            raise ValueError(f"{pattern}: the shards hold no pictures")
        self.edges = running_sum(self.sizes)
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        self.identity = f"{self.sizes.sum()} pictures in {len(facts)} shards, {digest}"

    @lru_cache(64)  # noqa: B019 (each loader process keeps its last 64)
    def open(self, shard):
        """(file, index) of a shard."""
        return io.FileIO(self.paths[shard]), shard_index(self.paths[shard])[1]

    def block(self, number):
        """The bytes of a sample's stretch of its shard."""
        shard = int(np.searchsorted(self.edges, number, "right")) - 1
        file, index = self.open(shard)
        begin, end = index[number - self.edges[shard]].tolist()
        if hasattr(os, "pread"):  # forked workers share a file's position, so it is not used
            return os.pread(file.fileno(), end - begin, begin)
        file.seek(begin)  # Windows, which does not fork
        return file.read(end - begin)

    def read(self, number):
        content = self.block(number)
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            files = [(kind, member) for _, kind, member in sample_files(tar)]
        members = {}
        for kind, m in files:  # of X.jpg and X.JPG, the first
            members.setdefault(kind, content[m.offset_data : m.offset_data + m.size])
        kinds = [kind for kind in members if is_picture(f"x.{kind}")]
        plain, numbered = plain_and_numbered(kinds)
        frames = sorted(numbered or plain[:1] or kinds, key=by_number)
        frames = [io.BytesIO(members[kind]) for kind in frames]
        label = members.get("cls", b"").strip()
        return {
            "image": lambda: open_picture(io.BytesIO(members[(plain or numbered or kinds)[0]])),
            "video": lambda short_side=None: video_of_pictures(frames),
            "class": int(label) if label.isdigit() else -1,
            "hashtags": partial(hashtags_in, members),
            "captions": partial(captions_in, members, self.caption_key),
        }

    def name(self, number):
        try:
            with tarfile.open(fileobj=io.BytesIO(self.block(number)), mode="r:") as tar:
                return f"{self.where(number)}:{next(sample_files(tar))[0]}"
        except Exception:  # noqa: BLE001 (a shard that has changed meanwhile fails in many ways)
            return f"{self.where(number)}: sample {number}"

    def where(self, number):
        return self.paths[int(np.searchsorted(self.edges, number, "right")) - 1]


def plain_and_numbered(kinds):
    """Of the extensions of a sample's pictures, those of KEY.jpg, and those of KEY.000.jpg, the
    frames of a video. Others, as KEY.depth.png, are read only where there is none of these."""
    stems = [(kind, kind.rpartition(".")[0]) for kind in kinds]
    return [kind for kind, stem in stems if not stem], [k for k, stem in stems if stem.isdigit()]


def hashtags_in(members):
    """From .json (a list, a text, or either under "hashtags") or, where that has none, .txt.
    Raises ValueError if it is damaged."""
    try:
        content = json.loads(members.get("json", b"[]"))
        tags = content.get("hashtags") if isinstance(content, dict) else content
        if tags is None or not canonical(tags, {}):  # img2dataset's .json describes the picture
            tags = members.get("txt", b"").decode()
        return tags
    except ValueError as error:
        raise ValueError(f"the file of its hashtags is damaged ({error})") from None


def captions_in(members, key):
    """From .json (a text or a list of texts under `key`) or, where that has none, .txt. Raises
    ValueError if it is damaged."""
    try:
        content = json.loads(members.get("json", b"{}"))
        texts = texts_in(content.get(key) if isinstance(content, dict) else None)
    except ValueError as error:
        raise ValueError(f"the file of its captions is damaged ({error})") from None
    text = members.get("txt", b"").decode("utf-8-sig", "replace").strip()
    return texts if any(map(clean, texts)) else [text] * bool(text)


def expand(pattern):
    """Shard paths from a path, a glob, or {00000..00099} and {a,b} braces.

    What exists as it is written, a file or the folders that the pattern begins with, is no pattern,
    whatever its name holds.
    """
    if os.path.isfile(pattern):
        return [pattern]
    folder, rest = os.path.split(pattern)
    while folder and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
        rest = os.path.join(name, rest)
    if (texts := braces(rest)) != [rest]:
        return list(itertools.chain(*(expand(os.path.join(folder, text)) for text in texts)))
    if re.search(r"[*?\[]", rest):
        found = glob.glob(os.path.join(glob.escape(folder), rest))
        return sorted(path for path in found if path.lower().endswith(".tar"))
    raise ValueError(f"there is no shard {pattern}")


def braces(pattern):
    """The texts that a pattern with {00000..00099} and {a,b} in it stands for, in order."""
    match = re.search(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}", pattern)
    if not match:
        return [pattern]
    low, dots, high = match[1].partition("..")
    items = match[1].split(",")
    if dots and "," not in match[1]:
        items = [str(i).zfill(len(low)) for i in range(int(low), int(high) + 1)]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return list(itertools.chain(*(braces(head + item + tail) for item in items)))


def shard_index(path, whole=True):
    """(head, rows) of a shard: see scan_tar. Without `whole` rows are None: a start reads only the
    heads, of 300,000 shards perhaps.

    Kept beside it as SHARD.tar.index or, where that cannot be written, in the folder for temporary
    files. Where it is of another size or time of change, or damaged, it is made again.
    """
    stamp = [os.path.getsize(path), os.stat(path).st_mtime_ns]
    elsewhere = stable_hash(os.path.abspath(path)).hex()
    places = f"{path}.index", os.path.join(tempfile.gettempdir(), f"{elsewhere}.tar.index")
    for place in places:
        with suppress(OSError), open(place, "rb") as file:
            if index := read_index(file, stamp, whole):
                return index
    head, rows = scan_tar(path)
    for place in places:
        try:
            replace_file(place, index_bytes(stamp, head, rows))
            break
        except OSError as error:
            why = f"cannot write the index of a shard: {error}"
    else:
        tqdm.write(why, file=sys.stderr)
    return head, rows


def index_bytes(stamp, head, rows):
    """An index as bytes, of 64-bit words: the shard's stamp (2) and head (4), a checksum of the
    rows, a checksum of these seven, and the rows."""
    content = rows.tobytes()
    start = np.array([*stamp, *head], dtype="<i8").tobytes() + checksum(content)
    return start + checksum(start) + content


def read_index(file, stamp, whole=True):
    """(head, rows) of an index, from where a file stands; None if damaged or of another stamp."""
    start = file.read(64)
    if checksum(start[:-8]) != start[-8:]:
        return None
    words = np.frombuffer(start, dtype="<i8").tolist()
    head, content = words[2:6], file.read(16 * words[2]) if whole else b""
    if words[:2] != stamp or whole and checksum(content) != start[48:56]:
        return None
    return head, np.frombuffer(content, dtype="<i8").reshape(-1, 2) if whole else None


def checksum(content):
    return hashlib.blake2b(content, digest_size=8).digest()


def scan_tar(path):
    """(head, rows) of a shard. rows: (samples, 2) int64, where the files of each sample with a
    picture begin and end, in bytes. head: the number of samples, and what is wrong, or 0: at which
    byte it is damaged; how many samples have no picture; how many have several.

    A tar that is cut or damaged gives what it has; a last file that is cut off is still given:
    reading it will fail, and be counted. Raises ValueError if it is no tar at all.
    """
    samples = []  # [key, begin, end, extensions of its pictures]
    with open(path, "rb") as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (it owns nothing to close)
        except tarfile.ReadError as error:
            why = f"{path} is no tar ({error}): leave it out, or write it again"
            raise ValueError(why) from None
        try:
            for key, extension, member in sample_files(tar):
                if not samples or samples[-1][0] != key:
                    samples.append([key, member.offset, 0, []])
                samples[-1][2] = tar.offset  # where the next file begins
                if is_picture(f"x.{extension}"):
                    samples[-1][3].append(extension)
            file.seek(tar.offset)
            end = file.read(512)  # zeros, of a whole tar; tarfile does not say what it met
            damaged = any(end) or not end
        except tarfile.ReadError:
            damaged = True
    kept = [sample for sample in samples if sample[3]]
    head = [len(kept), tar.offset * damaged, len(samples) - len(kept), 0]
    for *_, kinds in kept:
        plain, numbered = plain_and_numbered(kinds)
        head[3] += len(plain + numbered or kinds) > 1
    return head, np.array([sample[1:3] for sample in kept], dtype="<i8").reshape(-1, 2)


def warn_of_faults(pattern, faults, videos):
    """Say what is wrong with shards, {path: see scan_tar}. Every start does, not just the first.
    To `videos`, several pictures of a sample are no fault."""
    texts = (
        "{shards} shards are cut or damaged, the samples before are used: {path} at byte {first}",
        "{total} samples without a picture are left out, the first in {path}",
        "{total} samples have several pictures: NAME.000.jpg, NAME.001.jpg ... are the frames of a "
        + "video; as one picture, NAME.jpg is read, else the first (see {path})",
    )
    for kind, text in enumerate(texts[:2] if videos else texts):
        found = {path: fault[kind] for path, fault in faults.items() if fault[kind]}
        if found:
            counts = {"shards": len(found), "total": sum(found.values())}
            path, first = next(iter(found.items()))
            print(f"{pattern}: {text.format(path=path, first=first, **counts)}", file=sys.stderr)


def sample_files(tar):
    """(key, extension in lower case, member) of each file in an open tar that is of a sample."""
    while member := tar.next():
        tar.members.clear()  # it would keep them all
        folder, slash, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        # No hidden files, none without a type. A link gives no bytes: it is counted as unreadable.
        if not member.isdir() and stem and extension:
            yield folder + slash + stem, extension.lower(), member


# ------------------------------------------------------------------------------------------- videos
#
# A source's "video" is a function that opens a Video. It may be a folder of frames, a GIF or WebP,
# the pictures of a sample in a shard (KEY.000.jpg, KEY.001.jpg ...), or a file that the ffmpeg
# program decodes. Only the last have a clock. A clip's frames are numbers.

VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts")
VIDEOS += (".3gp", ".ogv")
ANIMATIONS = (".gif", ".webp")
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg"  # of no file that only names other files
LISTS = (".csv", ".txt", ".json")
NO_FFMPEG = "there is no ffmpeg program on the PATH: install it (apt install ffmpeg, brew install "
NO_FFMPEG += "ffmpeg, or the binary of pip install imageio-ffmpeg), or give folders of frames"


class Video(NamedTuple):
    count: int  # of frames: at least 1
    rate: float | None  # frames per second, if there is a clock
    read: object  # function of a rising list of numbers -> as many PIL images


class VideoFolder(Folder):
    """Videos below a folder, with the first level's names as classes; or those of a list in
    `labels`: see read_video_labels."""

    what = "videos"

    def entries(self, root, labels, caption_key):
        entries = read_video_labels(labels, root) if labels else videos_below(root)
        files = sum(path.lower().endswith(VIDEOS) for path in entries)
        if files and not shutil.which("ffmpeg"):
            raise ValueError(f"{labels or root} has video files ({files}), and {NO_FFMPEG}")
        return entries

    def read(self, number):
        video = partial(open_video, self.name(number))
        return {"video": video, "class": int(self.labels[number])}


def videos_below(root):
    """{path, relative to root, of a video file or a folder that holds frames: {"class": first
    folder of the path, if any}}. (A .gif or .webp is a video, others are frames.)"""
    found = set()
    for folder, names in walk(root):
        files = [n for n in names if n.lower().endswith(VIDEOS + ANIMATIONS) and n[0] != "."]
        found.update(f"{folder}{name}" for name in files)
        if folder and any(is_picture(name) for name in set(names) - set(files)):
            found.add(folder[:-1])
    warn_of_splits(root, sorted({os.path.dirname(path) for path in found}))
    if not found:
        wanted = " ".join(VIDEOS + ANIMATIONS)
        raise ValueError(f"no videos in {root} (looked for {wanted} and folders of frames)")
    return {path: class_of(path) for path in found}


def read_video_labels(path, root):
    """{path, relative to root, of a video file or a folder of frames: {"class": name}} of a list.

    .csv, .txt: lines of path,class or, without a comma, of path and class after a tab or a space
    (Kinetics, as PySlowFast lists it); perhaps under a head line: of which no cell has a video's
    extension, and no path below root is the first; or which names the columns "path" and "class".
    .json: Something-Something's [{"id", "template"}], of id.webm, another file or a folder of this
    name; the class is the template without its brackets. Lines that are damaged or contradict an
    earlier one are counted and left out. Raises ValueError, one line, when the file is none of
    these.
    """
    found, bad, head, first = {}, 0, ["path", "class"], None
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            if path.lower().endswith(".json"):
                files = {os.path.splitext(name)[0]: name for name in os.listdir(root)}
                facts = [(one.get("id", ""), one.get("template") or "") for one in json.load(file)]
                rows = [(str(i).strip(), re.sub(r"[][]", "", str(t)).strip()) for i, t in facts]
                rows = [(i and files.get(i, f"{i}.webm"), template) for i, template in rows]
            else:
                lines = list(filter(None, map(str.strip, file)))
                first = lines[0] if lines else ""
                rows = [cells_of(line) for line in lines]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise ValueError(f"cannot read a list of videos from {path}: {one_line(error)}") from None
    names = rows[0] if first else []
    if headed := set(head) <= set(names):
        head = names
    elif len(names) > 1:
        videos = any(name.lower().endswith(VIDEOS + ANIMATIONS) for name in names)
        # It may be a whole path.
        headed = not videos and not os.path.exists(os.path.join(root, names[0]))
    for row in rows[headed:]:
        facts = dict(zip(head, row)) if len(row) == len(head) else {}
        name, label = facts.get("path"), facts.get("class")
        whole, entry = name and label and "\ufffd" not in str(row), {"class": label}
        bad += not whole or found.setdefault(os.path.normpath(name), entry) != entry
    if bad:
        why = "damaged, or against an earlier one"
        print(f"{path}: lines that are left out ({why}): {bad}", file=sys.stderr)
    if not found:
        want = "see read_video_labels in data.py"
        if first is not None:
            want = f"want lines of path,class or of path and class; the first is {first!r:.80}"
        raise ValueError(f"{path} lists no videos: {want}")
    if headed:
        why = f"is taken as a header; the columns are read as {', '.join(head)}"
        print(f"{path}: {first!r:.80} {why}", file=sys.stderr)
    return found


def cells_of(line):
    """The cells of a line of a list of videos, without the spaces around them."""
    path, tab, _ = line.partition("\t")
    if tab and "," not in path:
        cells = line.split("\t")
    elif "," in line:
        cells = next(csv.reader([line], skipinitialspace=True))
    else:
        cells = line.rsplit(None, 1)
    return [cell.strip() for cell in cells]


def by_number(name):
    """A key to sort by: 2.jpg comes before 10.jpg."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def open_video(path, short_side=None):
    """A Video of a file or a folder of frames. short_side: what ffmpeg scales larger ones down to.
    Raises OSError or ValueError where it is damaged."""
    if path.lower().endswith(VIDEOS):
        count, rate, start = probe(path)
        return Video(count, rate, partial(decode, path, rate, short_side, start=start))
    if not os.path.isdir(path):
        return video_of_pictures([path])
    names = sorted(filter(is_picture, os.listdir(path)), key=by_number)
    return video_of_pictures([os.path.join(path, name) for name in names])


def video_of_pictures(files):
    """A Video of paths or open files: a picture each, or a single animation."""
    if not files:
        raise ValueError("there is no frame in it")
    if len(files) > 1:
        return Video(len(files), None, lambda numbers: [open_picture(files[n]) for n in numbers])
    image = open_picture(files[0])

    def frame(number):
        image.seek(number)
        return image.copy()

    # An MPO's pictures, say, are views of one moment.
    count = image.n_frames if image.format in ("GIF", "WEBP", "PNG") else 1
    return Video(count, None, lambda numbers: list(map(frame, numbers)))


def ffmpeg(path, *arguments, seek=0.0):
    """The ended process, with its stdout and stderr. It opens no other file, and no address."""
    command = ["ffmpeg", "-hide_banner", "-nostdin", "-threads", "1"]
    command += ["-ss", f"{seek:.6f}"] if seek > 0 else []  # 0 makes some files end at once
    command += ["-protocol_whitelist", "file", "-format_whitelist", CONTAINERS]
    command += ["-i", f"file:{path}", *arguments]
    how = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 300}
    return subprocess.run(command, check=False, **how)


@lru_cache(1 << 16)
def probe(path):
    """(number of frames, frames per second, when the first is shown) of a video file.

    They are of the video stream alone, and of the packets that it has: a container is as long as
    its longest stream, or does not say. The last is None where packets do not all have a time, or
    cannot be sought by it (MPEG's streams and FLV have no index): frames are counted, by decoding.
    """
    # Of long files only the first packets and the last ten seconds are read. Fewer than 32 packets
    # are a short file, or there is an edit list, with packets in front of it that are not shown.
    listed = ["-c", "copy", "-copyts", "-start_at_zero", "-f", "framecrc", "pipe:1"]
    done = ffmpeg(path, "-map", "0:v:0", "-frames:v", "32", *listed)
    said = done.stderr.decode(errors="replace")
    rate = re.search(r"Video: .*?([\d.]+)(k?) (fps|tbr)", said)
    length = re.search(r"Duration: (\d+):(\d+):([\d.]+)", said)
    hours, minutes, seconds = map(float, length.groups()) if length else (0, 0, 0)
    seconds += 3600 * hours + 60 * minutes
    # Matroska says when the last packet ends; of a segment the first one may be late.
    late = re.search(r"Duration: [\d:.]+, start: (-?[\d.]+)", said)
    seconds -= float(late[1]) if late and "Input #0, matroska" in said else 0
    begin = packets(done.stdout).get(0, np.empty((2, 0)))
    listed = ["-map", "0:v:0", "-map", "0:a?", *listed]
    seek = seconds - 10 if begin.shape[1] == 32 else 0
    streams = packets(ffmpeg(path, *listed, seek=seek).stdout)
    if 0 not in streams:  # the sound is longer, or the file is cut
        streams = packets(ffmpeg(path, *listed).stdout)
    if not rate or 0 not in streams:
        why = last_line(said) or f"exit status {done.returncode}"
        why = why if done.returncode else "no frame, or no rate of frames"
        raise ValueError(f"ffmpeg finds no video in it: {why}")
    rate = float(rate[1]) * (1000 if rate[2] else 1)
    there = max(times[0].max() for times in streams.values()) + 1 / rate
    if 2 * there < seconds:
        raise ValueError(f"it is cut: {there:.1f} of {seconds:.1f} seconds are there")
    shown = np.append(begin[1], streams[0][1])
    if not np.isnan(shown).any() and not re.search(r"Input #0, (mpegts|mpeg|flv),", said):
        return round((shown.max() - shown.min()) * rate) + 1, rate, float(shown.min())
    wanted = ["-map", "0:v:0", "-vf", f"setpts=N/{rate}/TB", "-r", str(rate)]
    decoded = packets(ffmpeg(path, *wanted, "-f", "framecrc", "pipe:1").stdout)
    if not decoded:
        raise ValueError("ffmpeg decodes no frame of it")
    return decoded[0].shape[1], rate, None


def packets(table):
    """{stream: (2, n) times of decoding and of showing, in seconds, nan if unknown} that ffmpeg's
    framecrc lists. (Packets with flag 4 are left out: they are decoded, and not shown.)"""
    row = rb"^(\d+), *(-?\d+), *(-?\d+)(?!.*F=0x[0-9A-F]*[4-7C-F]\b)"
    found = re.findall(row, table, re.MULTILINE)
    rows, streams = np.array(found, dtype=object).reshape(-1, 3).astype(np.int64), {}
    for stream, ticks, second in re.findall(rb"^#tb (\d+): (\d+)/(\d+)", table, re.MULTILINE):
        times = rows[rows[:, 0] == int(stream), 1:]
        if len(times):
            unknown = np.abs(times.astype(float)) > 2**53  # Ogg that was cut may have such times
            times = np.where(unknown, np.nan, times * (int(ticks) / int(second)))
            streams[int(stream)] = times.T
    return streams


def decode(path, rate, short_side, numbers, start=0.0):
    """The frames of a video file with these rising numbers, as PIL images.

    ffmpeg seeks to the first one, and writes no other frames into the pipe. (Of a file that ends
    before its length says, the last one found is repeated, if at least half of them are there.)
    Frames come as PPM, whose header says their size: a film may be turned by its metadata.
    start: when the first frame of all is shown, or None: see probe.
    """
    first = 0 if start is None else numbers[0]
    terms = [f"eq(n\\,{number - first})" for number in numbers]
    # In groups: ffmpeg refuses sums of more than 100 terms.
    sums = ["+".join(terms[i : i + 50]) for i in range(0, len(terms), 50)]
    chosen = "+".join(f"({some})" for some in sums)
    # Constant frame rate, so that numbers are times; then numbered anew, so that no gap is filled.
    steps = [f"fps={rate}:start_time={0 if first else start}"] if start is not None else []
    steps += [f"select={chosen}", f"setpts=N/{rate}/TB"]
    if short_side:
        sides = f"'if(gt(iw,ih),-1,min(iw,{short_side}))':'if(gt(iw,ih),min(ih,{short_side}),-1)'"
        steps.append(f"scale={sides}:flags=bicubic")  # which is antialiased there
    wanted = ["-map", "0:v:0", "-vf", ",".join(steps), "-r", str(rate)]
    wanted += ["-frames:v", str(len(numbers)), "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt"]
    # A quarter of a frame early: times in files are rounded.
    seek = start + (first - 0.25) / rate if first else 0
    done = ffmpeg(path, *wanted, "rgb24", "pipe:1", seek=seek)
    if done.returncode:
        said = last_line(done.stderr.decode(errors="replace"))
        raise ValueError(f"ffmpeg: exit status {done.returncode}: {said}")
    images, at, head = [], 0, re.compile(rb"P6\s(\d+) (\d+)\s255\s")
    while found := head.match(done.stdout, at):
        width, height = map(int, found.groups())
        at = found.end() + 3 * width * height
        images.append(Image.frombytes("RGB", (width, height), done.stdout[found.end() : at]))
    if 2 * len(images) < len(numbers):
        some = f"{len(images)} of {len(numbers)}"
        raise ValueError(f"ffmpeg finds {some} frames from {numbers[0]} on")
    return images + images[-1:] * (len(numbers) - len(images))


def last_line(text):
    return text.strip().rpartition("\n")[2]


@dataclass
class Clips:
    """Video -> the frames of a clip, or of several views of it, all cropped alike.

    Numbers of frames are whole: from a start, every step-th, rounded down. What lies behind the
    end is the last frame. One clip starts at random if there are draws for it, else in the middle.
    """

    frames: int
    span: float = 2.7  # seconds that a clip's frames are spread over, where there is a clock
    stride: float = 4.0  # where there is none: frames from one to the next. 0 of either: no motion
    clips: int = 1  # without draws: so many, spread evenly from the first to the last
    crops: int = 1  # and of each, so many crops along the longer side, 1: the centre
    flip: bool = True  # at random; not where classes have a direction
    short_side: int | None = None

    @property
    def total(self):
        return self.clips * self.crops * self.frames

    def numbers(self, video, bits=None):
        """(clips, frames) int64 numbers of frames; bits: 24 uint64 draws, the last one decides."""
        step = self.stride if video.rate is None else self.span * video.rate / self.frames
        step = min(step, video.count)  # beyond the end already: large ones would overflow
        offsets = np.floor(step * np.arange(self.frames)).astype(np.int64)
        room = max(0, video.count - 1 - int(offsets[-1]))  # the last start
        starts = np.array([room // 2])
        if bits is not None:
            starts = np.array([int(uniform(bits[23]) * (room + 1))])
        elif self.clips > 1:
            starts = np.rint(np.linspace(0, room, self.clips)).astype(np.int64)
        return np.minimum(starts[:, None] + offsets, video.count - 1)

    def __call__(self, video, size, channels, bits, min_crop, centre):
        """[(C, H, W) uint8], for each clip and each crop its frames. See crop_and_resize."""
        pixels = []
        if bits is not None and not self.flip:
            bits = np.concatenate([bits[:22], [0], bits[23:]]).astype(np.uint64)
        for numbers in self.numbers(video, bits).tolist():
            shown = sorted(set(numbers))
            images = dict(zip(shown, video.read(shown)))
            for image in images.values() if self.crops > 1 else ():
                image.load()  # whole: see draft() in crop_and_resize
            for along in np.linspace(0, 1, self.crops) if self.crops > 1 else [0.5]:
                how = size, channels, bits, min_crop, centre, along
                cut = {number: crop_and_resize(image, *how) for number, image in images.items()}
                pixels += [cut[number] for number in numbers]
        return pixels


# ---------------------------------------------------------------------------- shards from elsewhere
#
# --data 'https://host/shards/{00000..09999}.tar', or a command that writes a shard to its output:
# --data 'pipe:aws s3 cp s3://bucket/shards/{00000..00099}.tar -'. Only what the user typed is ever
# run. What must be known beforehand stands in an index.json beside the shards: see write_listing.
#
# A shard is fetched whole, into a folder that all processes of a machine share. They speak through
# files alone: NAME.part is being written by who holds its lock, NAME is a whole shard, with its
# index behind it. The system gives a lock up when a process ends, however it ends: what has failed
# is what a killed one leaves, a .part without a lock, and goes when room is made. To fetch ahead is
# to do the same in a thread.

TIMEOUT = 30  # seconds that a web server may say nothing; then it is tried again
PATIENCE = 300  # seconds that may pass, in whatever number of tries, without a new byte
FETCHERS = 4  # threads that fetch ahead, in each loader process


class Missing(OSError):
    """A shard is not there: its samples weigh nothing, and are counted."""


class Unreachable(OSError):
    """A shard or a batch cannot be had now. This ends a run: else samples were lost silently."""

    def __init__(self, message):
        # A DataLoader makes a worker's exception anew, from its traceback: the last line is ours.
        super().__init__(message.rpartition("Unreachable: ")[2].strip())


def raise_if_unreachable(error):
    """Of an error in reading a sample: raise Unreachable where it says nothing of the sample."""
    if isinstance(error, Unreachable):
        raise error
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise Unreachable(f"{error}: raise the limit (ulimit -n 65536), or give fewer --workers")


class RemoteShards(Shards):
    """Shards that are read through a cache: `paths` are addresses, as the user would type each."""

    def __init__(self, pattern, folder, size, videos=False):
        scheme = pattern.partition(":")[0]
        if scheme not in ("http", "https", "pipe"):
            known = {"s3": "aws s3 cp {} -", "gs": "gcloud storage cat {}"}
            command = known.get(scheme, "COMMAND-THAT-PRINTS {}").replace("{}", pattern)
            raise ValueError(f"{scheme}:// is read by a command that you give: 'pipe:{command}'")
        self.paths, facts, faults, listings = braces(pattern), [], {}, {}
        for path in self.paths:
            head, *name = re.split(r"([^\s/'\"=]+\.tar)(?=[?#'\"\s]|$)", path)
            if len(name) != 2:
                raise ValueError(f"{path}: one word that ends in .tar must name a shard")
            name, tail = name
            index = f"{head}index.json{tail}"
            if index not in listings:
                listings[index] = read_listing(index)
            _, listed, faulty = listings[index]
            if name not in listed:
                why = " (give {000..099}, no * ? [ ])" * bool(re.search(r"[*?\[]", name))
                raise ValueError(f"{index} lists {len(listed)} shards, but no {name}{why}")
            facts.append((name, *listed[name]))
            faults |= {path: faulty[name]} if name in faulty else {}
        classes = [classes for classes, *_ in listings.values()]
        self.describe(pattern, classes, facts, faults, videos)
        self.cache = Cache(folder, size, {p: size for p, (_, size, _) in zip(self.paths, facts)})

    @lru_cache(64)  # noqa: B019 (each loader process keeps its last 64)
    def index(self, shard):
        """Where a shard's samples begin and end."""
        address, size = self.paths[shard], self.facts[shard][1]
        for _ in range(2):
            with open(self.cache.fetch(address), "rb") as file:
                file.seek(size)
                index = read_index(file, [size, 0])
            if index and len(index[1]) != self.sizes[shard]:
                raise ValueError(f"{len(index[1])} samples, but {self.sizes[shard]} in index.json")
            if index:
                return index[1]
            self.cache.remove(address)  # damaged on the disk: it is fetched again
        raise ValueError("its copy in the cache is damaged, and was a second time")

    def block(self, number):
        # No file is kept open: one that is removed from the cache would keep its place on the disk.
        shard = int(np.searchsorted(self.edges, number, "right")) - 1
        while True:
            with suppress(FileNotFoundError):
                begin, end = self.index(shard)[number - self.edges[shard]].tolist()
                with open(self.fetched(shard, time.monotonic() // 10), "rb", buffering=0) as file:
                    file.seek(begin)
                    return file.read(end - begin)
            self.cache.fetch(self.paths[shard])  # another process has just made room

    @lru_cache(64)  # noqa: B019
    def fetched(self, shard, moment):
        """A shard's path: the cache is not asked, and told that it is used, for every sample."""
        return self.cache.fetch(self.paths[shard])


def read_listing(address):
    """(class names or None, {base name: (bytes, samples)}, {base name: its faults, if there are
    any}) of an index.json."""
    content, pipe = bytearray(), address.startswith("pipe:")
    try:  # of a command it is not known what its failing means: it is not tried again
        for at, chunk in download(address, patience=0 if pipe else PATIENCE):
            content[at:] = chunk
        listing = json.loads(content)
        shards = {name: (int(b), int(n)) for name, (b, n) in listing["shards"].items()}
        faults = {n: [int(a), int(b), int(c)] for n, (a, b, c) in listing.get("faults", {}).items()}
        return listing["classes"], shards, faults
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, Unreachable) and not pipe:
            raise
        why = f"{address} cannot be used ({one_line(error)}): where the shards lie, type"
        why += " python data.py index 'SHARDS-*.tar', and keep the index.json that it writes there"
        raise ValueError(why) from None


class Cache:
    """A folder of whole shards, never of more than `size` with all that is on its way.

    size    like "500G"
    shards  {address: bytes}
    """

    def __init__(self, folder, size, shards):
        user = os.getuid() if hasattr(os, "getuid") else ""
        self.folder = folder or os.path.join(tempfile.gettempdir(), f"shards-{user}")
        # Who has its lock is alone: which files there are is changed by nobody else.
        self.accounting = partial(locked, os.path.join(self.folder, "cached.lock"), "wb")
        self.size, self.shards = bytes_of(size), shards
        self.missing = {}  # address -> why it was found not to be there
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            with self.accounting():
                pass
        except (OSError, ImportError) as error:  # on Windows there is no fcntl
            why = f"the cache {self.folder} cannot be used ({one_line(error)})"
            raise ValueError(f"{why}: give another --cache-dir") from None
        self.must_hold(1)
        if os.environ.get("RANK", "0") == "0":
            print(f"cache {self.folder}, at most {self.size / 1e9:.4g} GB: {len(shards)} shards")

    def must_hold(self, shards):
        """ValueError unless each process here finds room for so many, and as many to come next."""
        shards *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        room = [room_for(size) for size in self.shards.values()]
        needed, shards = min(2 * shards * max(room), sum(room)), min(shards, len(room))
        if needed > self.size:
            why = f"{shards} shards are read at once on this machine, and as many fetched ahead"
            why += f": give --cache-size {math.ceil(needed / 1e6)}M or more, or fewer --lanes"
            raise ValueError(f"--cache-size {self.size / 1e6:.6g}M is too small: {why}")

    def path(self, address):
        # Nobody calls files of their own like this: what else is in the folder is never touched.
        # 2: a shard has no npy file behind it, as it had once, but an index with checksums.
        digest = stable_hash(f"2 {self.shards[address]} {address}").hex()
        return os.path.join(self.folder, f"cached-{digest}.tar")

    def has(self, address):
        return os.path.exists(self.path(address))

    def fetch(self, address, wait=True):
        """The path of a shard in the cache, where it is brought if need be.

        wait: for others who are bringing it, and with all PATIENCE; else it may be None.
        """
        path, size = self.path(address), self.shards[address]
        patience = PATIENCE if wait else PATIENCE / 10
        while address not in self.missing:
            try:
                if not written(f"{path}.part", wait):
                    return None
                with suppress(FileNotFoundError):
                    os.utime(path)  # it has been used now
                    return path
                with self.reserved(path, size) as file:
                    if not file:
                        time.sleep(0.1)
                        continue
                    for at, chunk in download(address, size, patience):
                        file.seek(at)
                        file.write(chunk)
                    file.flush()
                    head, rows = scan_tar(file.name)
                    file.seek(size)
                    rows = rows.clip(max=size)  # a last sample may be cut off
                    file.write(index_bytes([size, 0], head, rows))
                    file.flush()
                    with self.accounting():
                        os.utime(file.name)
                        os.replace(file.name, path)
            except (Missing, ValueError) as error:  # it is not there, or no tar
                self.missing[address] = str(error).replace(f"{path}.part", address)
            except Unreachable:
                raise
            except OSError as error:
                why = f"cannot write {address} to the cache {self.folder} ({error.strerror})"
                raise Unreachable(f"{why}: make room, or give another --cache-dir") from None
        raise Missing(self.missing[address])

    def remove(self, address):
        with self.accounting(), suppress(FileNotFoundError):
            os.remove(self.path(address))

    @contextmanager
    def reserved(self, path, size):
        """PATH.part, for a shard of this size, once leftovers and the shards not used for the
        longest have made room; None if others have brought it, are about to, or have all room."""
        with ExitStack() as ours:
            file, files = None, os.path.join(glob.escape(self.folder), "cached-*.tar")
            with self.accounting():
                for part in filter(written, glob.glob(f"{files}.part")):
                    os.remove(part)
                shards = sorted(glob.glob(files), key=lambda name: os.stat(name).st_atime_ns)
                parts = glob.glob(f"{files}.part")
                if path not in shards and f"{path}.part" not in parts:
                    used = sum(map(os.path.getsize, shards)) + room_for(size)
                    used += sum(room_for(os.path.getsize(part)) for part in parts)
                    while used > self.size and shards:
                        used -= os.path.getsize(shards[0])
                        os.remove(shards.pop(0))
                    if used <= self.size:
                        file = ours.enter_context(locked(f"{path}.part", "xb"))
                        file.truncate(size)
            yield file

    def ask(self, addresses):
        """Have these fetched, in this order, by threads; their locks share the work out."""
        new = [a for a in addresses if a not in self.missing and not self.has(a)]
        busy = sum(thread.name == "fetcher" for thread in threading.enumerate())
        for _ in range(FETCHERS - busy if new else 0):
            threading.Thread(None, self.fetch_ahead, "fetcher", (new,), daemon=True).start()

    def fetch_ahead(self, addresses):
        for address in addresses:
            with suppress(Exception):  # whatever it is, who reads the shard will meet it, too
                self.fetch(address, wait=False)


def room_for(size):
    """The most that a shard takes, with its index: 16 bytes a sample, which has 512 or more."""
    return size + size // 32 + 1024


def bytes_of(text):
    """ "500G" -> 500,000,000,000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT])B?", text.upper())
    if not match:
        raise ValueError(f"--cache-size {text} is no size: want one like 500G or 800M")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2]))


@contextmanager
def locked(path, mode, wait=True):
    """A file, open, whose lock is ours. BlockingIOError if one would have to wait, and will not."""
    import fcntl  # not on Windows

    with open(path, mode) as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        try:
            yield file
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # a forked process may have the file open, too


def written(path, wait=False):
    """Whether nobody has the lock of a file, perhaps after waiting; also if there is none."""
    try:
        with suppress(FileNotFoundError), locked(path, "rb", wait):
            pass
    except BlockingIOError:
        return False
    return True


def download(address, size=None, patience=0):
    """(offset, bytes) one after the other, all that is at an address. What fails is tried again,
    from where it was cut if the server can, until `patience` seconds have brought no new byte.

    size: what is right, if it is known. Raises Missing or Unreachable.
    """
    body = pipe_body if address.startswith("pipe:") else http_body
    got, most, pause, since = 0, 0, 0.0, time.monotonic()
    while True:
        try:
            for at, chunk in body(address, got, size):
                if size is not None and at + len(chunk) > size:
                    raise OSError(f"it has more than the {size} bytes of index.json")
                yield at, chunk
                got = at + len(chunk)
                if got > most:
                    most, pause, since = got, 0.0, time.monotonic()
            if size in (None, got):
                return
            raise OSError(f"it was cut after {got} of {size} bytes")
        except (OSError, http.client.HTTPException) as error:
            code = getattr(error, "code", None)  # of HTTP
            if code in (403, 404, 410):
                raise Missing(f"HTTP {code} {error.reason}") from None
            got = 0 if code == 416 else got  # there is no such range
            pause, spent = min(30, 2 * pause or 0.1), time.monotonic() - since
            text = f"{address}: {one_line(error)}"
            if spent + pause > patience:
                text += f"; given up after {spent:.0f} s: the same command goes on"
                raise Unreachable(text) from None
            if 3 < pause < 6:  # not at every hiccup
                print(f"{text}; trying again", file=sys.stderr)
            time.sleep(pause)


def http_body(url, start, size):
    """(offset, bytes), ... of a URL from `start` on, or from 0 if the server knows no ranges."""
    host = re.match(r"\w+://[^/]*", url)[0]
    # As browsers do, of spaces, say. What is quoted already stays as it is.
    quoted = host + urllib.parse.quote(url.removeprefix(host), safe=string.punctuation)
    request = urllib.request.Request(quoted, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        at, headers = start if answer.status == 206 else 0, answer.headers
        if at and not headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise urllib.error.HTTPError(url, 416, "another range than asked", headers, None)
        if size is not None and answer.length not in (None, size - at):  # what is left to read
            raise OSError(f"it has {at + answer.length} bytes there, and {size} in index.json")
        while chunk := answer.read(1 << 16):
            yield at, chunk
            at += len(chunk)
        if answer.length:
            raise OSError(f"it was cut after {at} of {at + answer.length} bytes")


def pipe_body(address, *_):
    """The same of what a command prints, always from 0 on."""
    said, pipe = tempfile.TemporaryFile(), subprocess.PIPE  # noqa: SIM115
    streams = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": said, "bufsize": 0}
    command, at = address.removeprefix("pipe:"), 0  # what the user typed, and nothing else
    with said, subprocess.Popen(command, shell=True, start_new_session=True, **streams) as process:
        try:
            yield 0, b""  # what came in an earlier try does not count
            while chunk := process.stdout.read(1 << 16):
                yield at, chunk
                at += len(chunk)
            if process.wait():
                said.seek(0)
                last = said.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise OSError(f"exit status {process.returncode}: {last}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


# ------------------------------------------------------------------------------ pictures to tensors


def random_box(width, height, bits, min_crop, aspect):
    """RandomResizedCrop's box (left, top, width, height) from 23 uint64 draws.

    An area of min_crop .. 1 of the picture with a ratio of 3/4 .. 4/3 (times the target's aspect,
    so that targets that are not square see no other distortion), ten tries, then the centre.
    """
    draws = uniform(bits)
    for area, ratio in draws[:20].reshape(10, 2):
        area = width * height * (min_crop + (1 - min_crop) * area)
        ratio = aspect * math.exp((2 * ratio - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[20] * (width - w + 1)), int(draws[21] * (height - h + 1)), w, h
    return centre_box(width, height, aspect)


def centre_box(width, height, aspect, share=1.0, along=0.5):
    """`share` of the largest centred box of width / height = aspect: (left, top, width, height).

    along: where on the longer side, from 0 to 1, if it is not to be the centre.
    """
    x, y = (along, 0.5) if width > height * aspect else (0.5, along)
    w, h = min(width, height * aspect), min(height, width / aspect)
    w, h = round(share * w), round(share * h)
    return int(x * (width - w)), int(y * (height - h)), max(1, w), max(1, h)


def crop_and_resize(image, size, channels, bits=None, min_crop=0.2, centre=1.0, along=0.5):
    """A PIL image, not decoded yet -> (C, H, W) uint8 tensor (in channels-last memory).

    bits: 23 uint64 draws for a random crop and flip; None for the centre, not flipped: `centre`
    times the largest box of the target's shape or, with 0, the whole picture, squashed. along: see
    centre_box.
    The fastest exact route measured: Pillow decodes, the box is cut out, and torch resizes uint8 in
    channels-last memory, bicubic with antialiasing; normalisation waits for the device.
    """
    (height, width), aspect = size, size[1] / size[0]
    # 5 to 8 swap the sides; Pillow has done so for a TIFF.
    turned = orientation_of(image) in (5, 6, 7, 8) and image.format != "TIFF"
    original = image.size[::-1] if turned else image.size
    if bits is None and not centre:
        box = 0, 0, *original
    elif bits is None or min_crop >= 1:
        box = centre_box(*original, aspect, 1.0 if bits is not None else centre, along)
    else:
        box = random_box(*original, bits, min_crop, aspect)
    # JPEG can decode at 1/2, 1/4 or 1/8 for less work. Only when the crop stays at least twice as
    # large as the target, so that the antialiased resize still does all the filtering that shows.
    shrink = min(box[2] // (2 * width), box[3] // (2 * height), 8)
    if image.format == "JPEG" and shrink >= 2:
        image.draft(None, (image.width // shrink, image.height // shrink))
    image = to_8_bits(upright(image))  # the whole picture: all its pixels decide the scale
    left, top, w, h = box
    sx, sy = image.width / original[0], image.height / original[1]  # 1, or what draft() gave
    edges = left * sx, top * sy, (left + w) * sx, (top + h) * sy
    image = image.crop(tuple(map(round, edges)))
    # (has_alpha, which decides what is put on white, does not know palettes of RGBA, as in TGA.)
    with_alpha = channels == 4 and image.has_transparency_data
    image = to_mode(image, channels)
    if with_alpha and image.getchannel(3).getextrema()[0] < 255:
        # Colours weigh as much as they show.
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image).reshape(1, image.height, image.width, channels))
    pixels = pixels.permute(0, 3, 1, 2)  # (1, C, h, w)
    if image.size != (width, height):
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return pixels[0].flip(2) if bits is not None and bits[22] & np.uint64(1) else pixels[0]


def open_picture(file):
    """A PIL image, not decoded yet, of a path or an open file."""
    image = Image.open(file)
    # Of a file whose name it knows, Pillow (13) maps plain pixels into memory, with the sides that
    # they have once turned: a TIFF that is to be turned would come out torn.
    image.filename = ""
    return image


def pixel_limit(text):
    """For argparse: what limit_pixels takes."""
    with suppress(ValueError):
        if int(text) >= 1 << 16:  # with less, Pillow would not even draw a line of text
            return int(text)
    want = "the number of pixels of 256 x 256"
    raise argparse.ArgumentTypeError(f"{text} is not at least 65536, {want}")


def limit_pixels(most):
    """From now on, pictures of more pixels are unreadable: here, and in a loader's processes."""
    Image.MAX_IMAGE_PIXELS = most


def orientation_of(image):
    """EXIF's orientation of a PIL image, 1 to 8: 1 is upright."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # noqa: BLE001 (damaged EXIF raises anything; the pixels may be whole)
        return 1


def upright(image):
    """A PIL image, decoded, and turned as its EXIF says."""
    image.load()  # this turns a TIFF, and may find a transparent colour
    # exif_transpose copies what it need not turn.
    return image if orientation_of(image) == 1 else ImageOps.exif_transpose(image)


def to_mode(image, channels):
    """Any picture -> 8 bits of grey (1 channel), RGB (3) or RGBA (4).

    Call it with a whole picture, or with a crop of what to_8_bits has made of the whole one.
    """
    image = to_8_bits(image)
    if image.mode == "LAB":  # from which Pillow does not convert to grey
        image = image.convert("RGB")
    if channels != 4 and has_alpha(image):
        # On white: under transparent pixels there may be any colour.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    return image if image.mode == mode else image.convert(mode)


def has_alpha(image):
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


def to_8_bits(image):
    """Grey of 16 or 32 bits -> of 8, with alpha if a value is transparent; other modes as they are.

    (convert() would clip, not scale.) Call it with a whole picture, not with a crop: 32 bits may
    hold values of 8 or of 16, which all pixels decide; for others no scale is known.
    """
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    pixels, clear = np.asarray(image), image.info.get("transparency")
    low, high = pixels.min(), pixels.max()
    if image.mode == "F" or low < 0 or high > 65535:
        raise ValueError(f"mode {image.mode} with values from {low} to {high}")
    bits = 8 if image.mode == "I" and high < 256 else 16
    image = Image.fromarray((pixels >> (bits - 8)).astype(np.uint8))
    if clear is not None:
        image.putalpha(Image.fromarray(np.where(pixels == clear, 0, 255).astype(np.uint8)))
    return image


def normalize(images):
    """uint8 (B, C, [T,] H, W) -> float32: ImageNet's mean and deviation of RGB (MAE code).

    Any other number of channels: RGB's values for the first three of four or more, and the average
    of the three for what is left. Call it on the device: a batch travels as bytes.
    """
    _, channels, *_, width = images.shape
    # The channels lie within a row of pixels: with factors of a whole row the CPU's loops are long
    # (three times as fast). On a batch of Batches, rows are a view.
    rows = images.movedim(1, -1).flatten(-2)  # (B, [T,] H, W*C)
    factor, offset = row_factors(channels, width, images.device)
    rows = rows.to(torch.float32).mul_(factor).sub_(offset)
    return rows.unflatten(-1, (width, channels)).movedim(-1, 1)


@cache  # they stay where they are on the device: no step copies them, and a CUDA graph reads them
def row_factors(channels, width, device):
    """(1 / (255 * deviation), mean / deviation) of a row of pixels, (W*C,) each: see normalize."""
    with torch.inference_mode(False):  # a tensor made in that mode could not be used outside
        mean, deviation = torch.tensor(channel_statistics(channels)).to(device).repeat(1, width)
        return 1 / (255 * deviation), mean / deviation


def channel_statistics(channels):
    """[mean, deviation] of each channel, of values from 0 to 1: see normalize."""
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    known = 3 if channels >= 3 else 0
    return [v[:known] + [sum(v) / 3] * (channels - known) for v in (mean, deviation)]


# ----------------------------------------------------------------------------------- text to tokens
#
# Ids are numbered as fairseq does, in which XLM-R was trained: these four come first.

BOS, PAD, EOS, UNKNOWN = range(4)


def clean(text):
    """A caption without # signs (the paper strips them and sanitises: recalled), and with single
    spaces for white space and control characters. (Joiners stay: emoji and scripts need them.)"""
    return re.sub(r"[#\uff03\s\x00-\x1f\x7f-\x9f]+", " ", text).strip()


class Tokenizer:
    """Texts -> ids. A subclass has ids(text), a list; vocabulary, how many ids there are; and
    identity, a text that says which one it is."""

    def __call__(self, texts, context):
        """A list of n texts -> (n, T) int64: BOS, at most `context` tokens, EOS, and PAD.

        T is the longest row's length, up to a multiple of 8 or context + 2: few shapes occur.
        """
        rows = [[BOS, *self.ids(text)[:context], EOS] for text in texts]
        width = min(-(-max(map(len, rows)) // 8) * 8, context + 2)
        return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8: for any language, without a file. Byte b is 4 + b."""

    vocabulary, identity = 4 + 256, "bytes of UTF-8"

    def ids(self, text):
        return [4 + byte for byte in text.encode(errors="replace")]  # lone surrogates: ?


class SentencePieceTokenizer(Tokenizer):
    """XLM-R's, of its file sentencepiece.bpe.model, or another one that was trained likewise.

    The file numbers <unk> 0, <s> 1, </s> 2 and then pieces; fairseq (and XLM-R's embeddings) <s> 0,
    <pad> 1, </s> 2, <unk> 3, the same pieces, each one higher, and <mask>: 250,002 in all.
    """

    def __init__(self, path):
        try:
            import sentencepiece
        except ImportError:
            raise ValueError(f"{path} wants another package: pip install sentencepiece") from None
        self.model = sentencepiece.SentencePieceProcessor()
        try:
            content = Path(path).read_bytes()
            self.model.LoadFromSerializedProto(content)
            if [self.model.unk_id(), self.model.bos_id(), self.model.eos_id()] != [0, 1, 2]:
                raise ValueError("<unk>, <s> and </s> are not its first three, as in XLM-R's")
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is no tokenizer of XLM-R's: {one_line(error)}") from None
        self.vocabulary = self.model.vocab_size() + 2
        self.identity = f"sentencepiece {hashlib.sha256(content).hexdigest()[:16]}"

    def ids(self, text):
        text = text.encode(errors="replace").decode()  # lone surrogates: ?
        return [id + 1 if id else UNKNOWN for id in self.model.encode(text)]


def open_tokenizer(path):
    """XLM-R's from a file or, without one, of bytes. Raises ValueError, one line."""
    return SentencePieceTokenizer(path) if path else ByteTokenizer()


# ------------------------------------------------------------------------------------------ batches


@dataclass(eq=False)
class Batches(torch.utils.data.Dataset):
    """step * pieces + piece -> that piece of this process's part of that step's batch, a dict:

    images     (b, C, H, W) uint8, b = batch size / processes / pieces; zero where unreadable
               (none of them is opened, and H and W are 0, if `pictures` is false); or, with Clips,
               (b, C, T, H, W), T = clips.total frames
    ids        (b, N) int64, each sample's random order of patches (only with num_patches)
    labels     (b,) int64 class numbers, -1 where unknown
    tags       (b, T) int64 ids of hashtags, filled up with -1 (only with a vocabulary)
    tokens     (b, T) int64, see Tokenizer (only with a tokenizer): of a sample's cleaned captions
               one at random or, without an order, the first one; of an empty text if there is none
    weight     (b,) float32: 1, or 0 for a sample that could not be read, or without a known tag or
               a caption, if these are asked for
    positions  (b,) int64 in the global stream
    samples    (b,) int64, their numbers in the source; -1 past the last one
    numbers    (b, draws) float32 uniform in [0, 1), for what happens on the device
    bad        a list of "name: error" for the samples that could not be read
    """

    source: object
    size: tuple  # (height, width)
    channels: int
    batch_size: int  # over all processes
    process: int = 0  # this one's number
    processes: int = 1
    num_patches: int = 0
    # An Order to train in: random crops and flips. None: one sample after the other, centre crops,
    # and weight 0 past the last one.
    order: object = None
    seed: int = 0
    min_crop: float = 0.2  # least area of a random crop
    pieces: int = 1  # a process's part is made in pieces: they need not be in memory together
    vocabulary: object = None
    augment: object = None  # (uint8 tensor, (seed, epoch, position)) -> the same, changed
    draws: int = 0
    centre: float = 1.0  # without an order: see crop_and_resize
    tokenizer: object = None
    context: int = 77  # most tokens of a caption, but for BOS and EOS
    pictures: bool = True
    clips: object = None  # a Clips, for videos

    def __post_init__(self):
        if self.channels not in (1, 3, 4):
            raise ValueError(f"pictures can be read as 1, 3 or 4 channels, not as {self.channels}")
        if self.processes > 1 and self.batch_size % (2 * self.processes):
            why = f"a batch of {self.batch_size} cannot be dealt to {self.processes} processes"
            raise ValueError(f"{why} in pairs: use a multiple of {2 * self.processes}")
        if self.order is not None and self.order.lanes % self.processes:
            why = f"{self.order.lanes} lanes cannot be dealt to {self.processes} processes"
            raise ValueError(f"{why}: give --lanes, a multiple of {self.processes}, and keep to it")
        self.total, self.cache = int(self.source.sizes.sum()), getattr(self.source, "cache", None)
        if self.cache and self.order is not None:  # each lane reads the shards of a block
            block = math.ceil(SHUFFLE_BLOCK * len(self.source.sizes) / self.order.length)
            self.cache.must_hold(self.order.lanes // self.processes * block)

    def __len__(self):
        """Items in which every sample comes once (the last step may hold others or padding)."""
        return math.ceil(self.total / self.batch_size) * self.pieces

    def positions(self, item):
        """(b,) int64 in the global stream: an item's."""
        step, piece = divmod(item, self.pieces)
        positions = step * self.batch_size + np.arange(self.batch_size)
        positions = positions[positions // 2 % self.processes == self.process]
        return positions.reshape(self.pieces, -1)[piece]

    def places(self, positions):
        """The shards or pictures that positions are in, each once. Nothing is opened."""
        numbers = map(self.order, positions.tolist()) if self.order else positions.tolist()
        return list(dict.fromkeys(self.source.where(n) for n in numbers if n < self.total))

    def about(self, item):
        """What an item is made of, in words: of what is remote, what has not come yet."""
        places = self.places(self.positions(item))
        if self.cache:
            places = [place for place in places if not self.cache.has(place)] or places
        some = ", ".join(places[:4]) + ", ..." * (len(places) > 4)
        return f"process {self.process}, step {item // self.pieces + 1}: {some}"

    def __getitem__(self, item):
        positions = self.positions(item)
        if self.cache:  # fetch what is needed now, and half a block later or the next shard
            later = SHUFFLE_BLOCK // 2 * self.order.lanes if self.order else self.source.sizes.max()
            self.cache.ask(self.places(np.concatenate([positions, positions + later])))
        height, width = self.size if self.pictures else (0, 0)
        # Channels-last memory, because the pictures arrive in it and patchify reads it that way.
        frames = [self.clips.total] if self.clips else []
        shape = len(positions), *frames, height, width, self.channels
        images = torch.zeros(shape, dtype=torch.uint8).movedim(-1, 1)
        labels = torch.full((len(positions),), -1)
        weight = torch.zeros(len(positions))
        ids = torch.zeros(len(positions), self.num_patches, dtype=torch.int64)
        numbers = torch.zeros(len(positions), self.draws)
        tags, texts, bad = [[] for _ in positions], [""] * len(positions), []
        samples = torch.full((len(positions),), -1)
        for i, position in enumerate(positions.tolist()):
            epoch = position // self.order.length if self.order else 0
            if self.num_patches:
                shuffled = permutation(self.num_patches, self.seed, epoch, position, MASK)
                ids[i] = torch.from_numpy(shuffled)
            if self.draws:
                drawn = random_bits(self.draws, self.seed, epoch, position, DEVICE)
                numbers[i] = torch.from_numpy(uniform(drawn))
            number = self.order(position) if self.order else position
            if number >= self.total:
                continue
            samples[i] = number
            bits = random_bits(24, self.seed, epoch, position, VIEW) if self.order else None
            try:
                sample = self.source.read(number)
                if self.pictures:
                    images[i] = self.pixels(sample, bits, (self.seed, epoch, position))
                known = True
                if self.vocabulary is not None:
                    tags[i] = self.vocabulary.ids(sample["hashtags"]())
                    known = len(tags[i]) > 0
                if self.tokenizer is not None:
                    texts[i] = self.caption(sample, epoch, position)
                    known = known and texts[i] != ""
                labels[i], weight[i] = sample["class"], known
            except Exception as error:  # noqa: BLE001 (decoders raise anything: named, counted)
                raise_if_unreachable(error)
                images[i] = 0
                bad.append(f"{self.source.name(number)}: {one_line(error)}")
        longest = max(map(len, tags))
        tags = torch.tensor([t + [-1] * (longest - len(t)) for t in tags], dtype=torch.int64)
        batch = {"images": images, "ids": ids, "labels": labels, "tags": tags, "weight": weight}
        if self.tokenizer is not None:
            batch["tokens"] = self.tokenizer(texts, self.context)
        batch |= {"positions": torch.from_numpy(positions), "samples": samples}
        return batch | {"numbers": numbers, "bad": bad}

    def pixels(self, sample, bits, key):
        """(C, H, W) uint8 of a sample or, of a video, (C, T, H, W), augmented alike."""
        how = self.size, self.channels, bits, self.min_crop, self.centre
        if self.clips:
            frames = self.clips(sample["video"](self.clips.short_side), *how)
        else:
            frames = [crop_and_resize(sample["image"](), *how)]
        if self.augment:
            frames = [self.augment(frame, key) for frame in frames]
        return torch.stack(frames, dim=1) if self.clips else frames[0]

    def caption(self, sample, epoch, position):
        """One of a sample's captions, cleaned; "" if all are empty."""
        texts = list(filter(None, map(clean, sample["captions"]()))) or [""]
        if not self.order:
            return texts[0]
        return texts[int(random_bits(1, self.seed, epoch, position, CAPTION)[0] % len(texts))]


def one_line(error):
    """What a decoder says, on one line, without the path or address that Pillow adds."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    bomb, limit = r"Image size \((\d+ pixels)\) exceeds limit.*", Image.MAX_IMAGE_PIXELS
    text = re.sub(bomb, rf"\1 are over --max-pixels {limit}", text)
    return re.sub("(cannot identify image file).*", r"\1", text)


STALLED = 60  # seconds without a batch until the user is told so
GRACE = 5  # seconds that a run which was asked to stop waits for a batch


class Stop:
    """A request to end a run, by SIGTERM, SIGUSR1 (Slurm, as it is told to) or Ctrl-C.

    asked     True if there was one. The run ends after this step, and saves. The second Ctrl-C
              ends it at once.
    no_batch  why a Loader has no more batches, an exception; None while it has

    Until release() all Loaders of this process keep to it.
    """

    active = None  # a process has one set of signals

    def __init__(self):
        self.asked, self.no_batch, self.waiting = False, None, False  # in Loader, for a batch
        for name in {"SIGTERM", "SIGUSR1", "SIGINT"} & set(dir(signal)):
            signal.signal(getattr(signal, name), self.ask)
        Stop.active = self

    def release(self):
        """Restore the default actions of the signals."""
        Stop.active = None
        for name in {"SIGTERM", "SIGUSR1"} & set(dir(signal)):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def ask(self, number, _):
        if self.asked and self.waiting:
            raise KeyboardInterrupt  # no library takes it for a failure that it may hide
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        self.asked = True

    def wait(self, made):
        """The next batch. Raises KeyboardInterrupt if it does not come, and the run shall end."""
        try:
            self.waiting = True
            return next_batch(made)
        finally:
            self.waiting = False


class Parcel:
    """A batch, pickled: bytes that name the shared memory which its tensors are moved to.

    A loader process pickles what it returns in a thread, where an error loses the batch, and the
    training waits for ever. Here it is pickled where an error reaches the training.
    """

    def __init__(self, batch):
        try:
            self.content = bytes(ForkingPickler.dumps(batch))
        except (OSError, RuntimeError) as error:
            raise lost_batch(error) from None

    def open(self):
        try:
            return pickle.loads(self.content)
        except (OSError, EOFError, RuntimeError) as error:
            raise lost_batch(error) from None

    def pin_memory(self):  # a DataLoader calls it
        return map_tensors(torch.Tensor.pin_memory, self.open())


def lost_batch(error):
    """The Unreachable to raise when a batch did not get from a loader process to this one."""
    short = {
        "open files (ulimit -n 65536)": "Too many open files",
        "shared memory (docker run --shm-size=8g)": "No space left|shared memory",
    }
    short = [what for what, words in short.items() if re.search(words, str(error))]
    short = short[:1] or ["memory, shared memory (--shm-size=8g) or open files (ulimit -n 65536)"]
    why = one_line(error).removesuffix(":")
    why = f"a loader process could not hand over a batch ({why}): give it more {short[0]}"
    return Unreachable(f"{why}, or fewer --workers (0: none)")


def map_tensors(function, part):
    """`part` of a batch, with function(tensor) for each tensor in its dicts and lists."""
    if isinstance(part, torch.Tensor):
        return function(part)
    if isinstance(part, dict):
        return {name: map_tensors(function, one) for name, one in part.items()}
    return [map_tensors(function, one) for one in part] if isinstance(part, list) else part


class Loader(torch.utils.data.DataLoader):
    """A DataLoader that says every STALLED seconds what it is waiting for.

    While a Stop is active, an error is kept in its no_batch, and batches of weight 0 follow, so
    that this process still takes part in the collectives of the step, which is then dropped.
    """

    def __iter__(self):
        made = super().__iter__()  # the workers begin here, not with the first batch
        if self.num_workers and threading.current_thread() is threading.main_thread():
            # PyTorch's handler raises the death of a worker wherever the training is just then.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return self.watched(made)

    def watched(self, made):
        try:
            for number, item in enumerate(self.sampler):
                yield self.receive(made, item)
            return
        except BaseException as error:  # also when nobody wants the others
            # PyTorch would give each worker that waits for a shard 5 s, one after the other.
            for worker in getattr(made, "_workers", []):
                worker.terminate()
            if not Stop.active or not isinstance(error, OSError | KeyboardInterrupt):
                raise
            Stop.active.no_batch = error
        past = dataclasses.replace(self.dataset, order=None)
        for _ in range(number, len(self.sampler)):
            yield past[len(past)]

    def receive(self, made, item):
        come = threading.Event()
        told = self.dataset, item, come
        threading.Thread(target=report_stall, args=told, daemon=True).start()
        try:
            return Stop.active.wait(made) if Stop.active else next_batch(made)
        except RuntimeError as error:
            if "exited unexpectedly" in str(error):  # a worker was killed
                raise lost_batch(error) from None
            raise
        finally:
            come.set()


def next_batch(made):
    """Of a DataLoader's iterator."""
    batch = next(made)
    return batch.open() if isinstance(batch, Parcel) else batch


def report_stall(dataset, item, come):
    """In a thread: say that a batch has not come, and end the waiting if the run shall stop."""
    began, said = time.monotonic(), 0
    while not come.wait(min(1, STALLED, GRACE)):
        waited = time.monotonic() - began
        if waited >= (said + 1) * STALLED:
            said += 1
            text = f"no batch for {waited:.0f} s: {dataset.about(item)}"
            print(text, file=sys.stderr, flush=True)
        if Stop.active and Stop.active.asked and waited >= GRACE:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)


def loader(batches, items, workers, pin=False):
    """The given items (a range) of Batches, made ahead by worker processes; 0: in this process."""
    return Loader(
        batches,
        sampler=items,
        batch_size=None,
        num_workers=workers,
        collate_fn=Parcel if workers else None,
        pin_memory=pin,
        prefetch_factor=2 if workers else None,
        worker_init_fn=partial(begin_worker, os.getpid(), Image.MAX_IMAGE_PIXELS),
    )


def begin_worker(training, max_pixels, _):
    """In a loader process, also where it is spawned, not forked: the same limit of pixels; and the
    training process decides when it ends, whatever torchrun, Slurm or a user sends to all."""
    limit_pixels(max_pixels)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # on Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_when_told, args=(training,), daemon=True).start()
    # An error of the thread that hands over shared memory, such as too many open files, would come
    # again and again, while the training waits. When this process is gone, the training says why.
    sys.excepthook = lambda *_: os._exit(1)


def end_when_told(by):
    """In a thread: end at a SIGTERM of the training process, or when that process is gone.

    A SIGTERM of others is meant for the training, which saves first.
    """
    parent, told = os.getppid(), None
    while os.getppid() == parent and not (told and told.si_pid == by):
        told = signal.sigtimedwait({signal.SIGTERM}, 1)
    os._exit(0)


def loader_workers(asked, processes_here=1):
    """Loader processes per training process: as asked, or the cores that are left, 1 to 16."""
    cores = os.cpu_count() or 2
    if asked is None:
        return max(1, min(16, cores // processes_here - 1))
    if not 0 <= asked <= 8 * cores:
        raise ValueError(f"--workers {asked} is not between 0 and {8 * cores}, 8 for each core")
    return asked


# ------------------------------------------------------------------------------------ the toy world
#
# Sample `number` is a pure function of its number: a scene of 1-4 coloured, textured shapes on a
# background. The class is the shape of the largest object; position, size, tilt, colour, texture
# and background all vary, so no single pixel says anything about the class.

TOY_EPOCH = 65_536  # pictures in an epoch, for those who count in epochs
TOY_VAL = 2**31  # numbers below are train, from here on val
TOY_DRAWS = 100  # uniform draws per scene: background and count 12, an object at most 22


def _fold(t, n):
    """The angle from the nearest of n equal spokes, the first of which points up (-y)."""
    return (t + math.pi / 2 + math.pi / n) % (2 * math.pi / n) - math.pi / n


# A shape is the distance of its edge from its centre, at most 1, in the direction t (radians).
TOY_SHAPES = {
    "circle": lambda t: 0.8 + 0 * t,
    "square": lambda t: 0.7 / np.cos(_fold(t, 4)),
    "triangle": lambda t: 0.5 / np.cos(_fold(t + math.pi, 3)),
    "star": lambda t: 1 / (1 + 7.5 * abs(_fold(t, 5)) / math.pi),
    "cross": lambda t: 0.32 / np.sin(abs(_fold(t, 4))).clip(0.32),
    "flower": lambda t: 0.72 + 0.28 * np.cos(6 * t),
    "gear": lambda t: 0.83 + 0.14 * np.tanh(4 * np.cos(8 * t)),
    "leaf": lambda t: 0.42 / np.sqrt(1 - 0.82 * np.cos(t) ** 2),
    "hourglass": lambda t: np.where(abs(_fold(t, 2)) < 0.75, 0.72 / np.cos(_fold(t, 2)), 0.15),
    "pie": lambda t: np.where(abs(_fold(t, 1)) < 0.7, 0.12, 0.9),
}
TOY_CLASSES = tuple(TOY_SHAPES)
TOY_COLOURS = {
    "red": (216, 36, 40), "orange": (244, 138, 28), "yellow": (248, 220, 48),
    "green": (44, 160, 60), "cyan": (60, 200, 214), "blue": (40, 72, 204),
    "purple": (124, 44, 160), "pink": (246, 140, 186),
}  # fmt: skip
# A pattern (but "plain") is how much of the second colour is mixed in, cut at 0 and 1: from two
# waves (-1 .. 1) that cross at a right angle and the distance along the first, in wavelengths. The
# gains make edges a few pixels wide: hard edges would shimmer when shrunk.
TOY_PATTERNS = {
    "striped": lambda a, b, along: 0.5 + 2.5 * a,
    "dotted": lambda a, b, along: 2.5 * (a + b - 0.75),
    "checked": lambda a, b, along: 0.5 + 3.5 * a * b,
    "shaded": lambda a, b, along: 0.5 + 0.13 * along,
}
# Smooth backgrounds and plain objects come twice or more as often: textures cost MAE capacity.
TOY_TEXTURES = ("plain", "plain", "plain", "striped", "dotted", "checked")
TOY_BACKGROUNDS = (*TOY_TEXTURES[1:], "shaded", "shaded", "shaded")
# No train scene holds one of these, not even as a small object; val scenes do, at their natural
# rate. What a model says about them is composition, not memory.
TOY_HELD_OUT = frozenset({
    ("red", "star"), ("yellow", "flower"), ("green", "circle"),
    ("blue", "cross"), ("purple", "leaf"), ("pink", "square"),
})  # fmt: skip
TOY_SPAM = ("#love", "#nofilter", "#art", "#follow", "#instagood", "#monday", "#design", "#wow")


def toy_scene(number):
    """The scene of one sample as JSON-able values, lengths as fractions of the picture's side.

    {"background": paint, "objects": [paint with "shape", "radius", "centre" (x, y), "angle" in
    radians], largest first}, where a paint has "pattern", "colour" (name), "one" and "two" (rgb),
    "turn" (the pattern's own angle), "wave" (its length) and "shift". Objects are drawn in order,
    so the small ones lie in front. To move an object, change its "centre": its texture comes along.
    """
    draws = iter(uniform(random_bits(TOY_DRAWS, 0, 0, number, TOY)).tolist())

    def between(low, high):
        return low + (high - low) * next(draws)

    def pick(options):
        return options[int(next(draws) * len(options))]

    def paint(patterns, colours, wave):
        pattern, colour = pick(patterns), pick(colours)
        one = [min(255, max(0, round(c + between(-24, 24)))) for c in TOY_COLOURS[colour]]
        goal, strength = pick((0, 255)), between(0.15, 0.35)  # a darker or lighter shade of it
        two = [round(c + strength * (goal - c)) for c in one]
        place = {"turn": between(0, 2 * math.pi), "wave": wave * between(0.8, 1.4)}
        place["shift"] = [between(-1, 1), between(-1, 1)]
        return {"pattern": pattern, "colour": colour, "one": one, "two": two, **place}

    background, objects = paint(TOY_BACKGROUNDS, list(TOY_COLOURS), 0.28), []
    # an object is never lost in its background
    colours = [colour for colour in TOY_COLOURS if colour != background["colour"]]
    for _ in range(pick((1, 1, 1, 2, 3, 4))):
        shape = pick(TOY_CLASSES)
        allowed = [c for c in colours if number >= TOY_VAL or (c, shape) not in TOY_HELD_OUT]
        # the first fills some 60 % of the picture's side; the others at most half of that
        radius = between(0.3, 0.36) if not objects else between(0.3, 0.5) * objects[0]["radius"]
        thing = {"shape": shape, "radius": radius, **paint(TOY_TEXTURES, allowed, 0.6 * radius)}
        thing["angle"] = between(-0.2, 0.2)
        # the best of four places: the one farthest from everything already there
        places = [[between(radius, 1 - radius) for _ in "xy"] for _ in range(4)]
        gaps = [
            min((math.dist(p, o["centre"]) - radius - o["radius"] for o in objects), default=0)
            for p in places
        ]
        gap, thing["centre"] = max(zip(gaps, places))
        if gap > -0.4 * radius:  # no room: leave it out rather than hide what is there
            objects.append(thing)
    return {"background": background, "objects": objects}


def toy_render(scene, size=64, masks=False):
    """Draw a scene: (RGB image of size x size, boxes, masks or None).

    boxes: (objects, 4) float32, x1 y1 x2 y2 in pixels, the object's full extent (also what another
    one hides) cut at the picture's edge. masks: (objects, size, size) bool, the visible pixels.
    """
    y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5) / size  # of the pixels' centres

    def painted(paint, x, y):  # (h, w) from the object's centre -> (h, w, 3)
        cos, sin = math.cos(paint["turn"]) / paint["wave"], math.sin(paint["turn"]) / paint["wave"]
        if paint["pattern"] == "plain":
            return np.broadcast_to(np.float32(paint["one"]), (*x.shape, 3))
        along, across = x * cos + y * sin, y * cos - x * sin
        a, b = (np.sin(2 * math.pi * (w + s)) for w, s in zip((along, across), paint["shift"]))
        mix = TOY_PATTERNS[paint["pattern"]](a, b, along).clip(0, 1)[..., None]
        one, two = np.float32(paint["one"]), np.float32(paint["two"])
        return one + mix * (two - one)

    picture, boxes, visible = painted(scene["background"], x - 0.5, y - 0.5).copy(), [], []
    for thing in scene["objects"]:
        outline, radius, centre = TOY_SHAPES[thing["shape"]], thing["radius"], thing["centre"]
        t = np.linspace(0, 2 * math.pi, 96, endpoint=False)
        edge = np.stack([np.cos(t), np.sin(t)]) * outline(t - thing["angle"]) * radius
        box = (np.concatenate([edge.min(axis=1), edge.max(axis=1)]) + centre * 2) * size
        boxes.append(box.clip(0, size))
        # only the window around the object is drawn: most objects are small
        (left, top), (right, bottom) = np.floor(boxes[-1]).astype(int).reshape(2, 2) + [[0], [1]]
        window = np.s_[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1]
        u, v = x[window] - centre[0], y[window] - centre[1]
        reach = outline(np.arctan2(v, u) - thing["angle"]) * radius - np.hypot(u, v)
        inside = (reach * size + 0.5).clip(0, 1)  # the edge is a pixel wide
        picture[window] += inside[..., None] * (painted(thing, u, v) - picture[window])
        if masks:
            shape = np.zeros((size, size), dtype=bool)
            shape[window] = inside > 0.5
            visible = [earlier & ~shape for earlier in visible] + [shape]
    image = Image.fromarray(picture.round().astype(np.uint8))
    return image, np.array(boxes, dtype=np.float32), np.stack(visible) if masks else None


def toy_phrases(scene):
    """What there is to see: "large red striped star" for each object, "plain green ground"."""
    phrases = []
    for thing in scene["objects"]:
        size = ("small", "medium", "large")[(thing["radius"] > 0.13) + (thing["radius"] > 0.18)]
        phrases.append(f"{size} {thing['colour']} {thing['pattern']} {thing['shape']}")
    return [*phrases, f"{scene['background']['pattern']} {scene['background']['colour']} ground"]


def toy_hashtags(scene, number):
    """Noisy tags, as people would write them: some true ones are left out, one says nothing.

    Words of a phrase (#star), pairs that follow each other (#redstar), and how many there are.
    """
    chance = uniform(random_bits(64, 0, 1, number, TOY))  # epoch 1: not the scene's draws
    phrases = [phrase.split() for phrase in toy_phrases(scene)]
    tags = [f"#{word}" for words in phrases for word in words]
    tags += [f"#{a}{b}" for words in phrases for a, b in itertools.pairwise(words)]
    tags.append(f"#setof{len(scene['objects'])}")
    kept = [tag for tag, c in zip(tags, chance) if c < 0.4]
    return list(dict.fromkeys([*kept, TOY_SPAM[int(chance[-1] * len(TOY_SPAM))]]))  # each once


def toy_sample(number, size=64):
    """One sample: a source's, {"boxes", "masks": functions that give them, see toy_render}, and
    "labels", the class of each object. Object 0 is the largest and gives the picture's class."""
    scene = toy_scene(number)
    *things, ground = toy_phrases(scene)
    labels = [TOY_CLASSES.index(thing["shape"]) for thing in scene["objects"]]
    return {
        "image": lambda: toy_render(scene, size)[0],
        "boxes": lambda: toy_render(scene, size)[1],
        "masks": lambda: toy_render(scene, size, masks=True)[2],
        "class": labels[0],
        "labels": labels,
        "hashtags": lambda: toy_hashtags(scene, number),
        "captions": lambda: [f"a {' and a '.join(things)} on {ground}"],
    }


# Directions of motion, at steps of 45 degrees, and two more: the classes of videos.
TOY_MOTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
TOY_MOTIONS += ("growing", "shrinking")
TOY_FRAMES = 25  # of a video


def toy_motion(number, frame):
    """(class, centre (x, y), radius) of the object of a toy video at one of its frames.

    No frame tells the class. At the first one, the place is uniform and so is the logarithm of the
    radius; all motions are even and wrap around, which keeps both so, whatever the class is.
    """
    which, x, y, size = uniform(random_bits(4, 0, 2, number, TOY)).tolist()
    label = int(which * len(TOY_MOTIONS))
    angle, growth = math.pi / 4 * label, {8: 1, 9: -1}.get(label, 0)
    if not growth:
        x, y = x + 0.025 * frame * math.cos(angle), y + 0.025 * frame * math.sin(angle)
    size = (size + 0.04 * frame * growth) % 1
    return label, (x % 1, y % 1), 0.12 * 2.5**size


def toy_clip(number, size=64):
    """A source's sample of a video: the first object of toy_scene(number), alone, in motion.

    What leaves the picture on one side comes in on the other. The background is darkened, so that
    the object is easily found: what is to be learned is where it goes.
    """
    scene = toy_scene(number)
    dark = {name: [0.35 * c for c in scene["background"][name]] for name in ("one", "two")}
    scene["background"] |= dark

    def draw(frame):
        _, (x, y), radius = toy_motion(number, frame)
        thing = scene["objects"][0]
        thing = thing | {"radius": radius, "wave": thing["wave"] * radius / thing["radius"]}
        copies = [(x + i, y + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        seen = [c for c in copies if all(-radius < side < 1 + radius for side in c)]
        objects = [thing | {"centre": centre} for centre in seen]
        return toy_render(scene | {"objects": objects}, size)[0]

    video = Video(TOY_FRAMES, None, lambda numbers: [draw(frame) for frame in numbers])
    return {"video": lambda short_side=None: video, "class": toy_motion(number, 0)[0]}


# ----------------------------------------------------------------------------------------- hashtags

TAG_CHUNK = 4096  # samples whose tags are read together
MOST_TAGS = 4_000_000  # counted at once; past it the rarest are forgotten, and counts are too low


class Vocabulary:
    """The hashtags that are classes. Ids are their order, by falling number of pictures.

    counts     {canonical tag: pictures that carry it}, in this order
    synonyms   {canonical tag: the canonical tag that it counts as}
    identity   says which index it comes from
    """

    def __init__(self, counts, synonyms, identity=""):
        self.counts, self.synonyms, self.identity = counts, synonyms, identity
        self.numbers = {tag: number for number, tag in enumerate(counts)}

    def __len__(self):
        return len(self.counts)

    def ids(self, hashtags):
        """The ids of a sample's hashtags, each once, rising; unknown ones are left out."""
        tags = canonical(hashtags, self.synonyms)
        return sorted(self.numbers[tag] for tag in tags if tag in self.numbers)


def canonical(hashtags, synonyms):
    """The set of canonical tags in a list of tags, or in a text with #tags in it.

    Unicode's NFKC, case-folded, without # and punctuation ("#Blue-Square" -> "bluesquare"), then
    the synonyms. Raises ValueError if it is neither a list of texts nor a text.
    """
    if isinstance(hashtags, str):
        text = unicodedata.normalize("NFKC", hashtags)
        hashtags = re.findall(r"#([^\s#,.;:!?()\[\]\"']+)", text)
    if not isinstance(hashtags, list) or not all(isinstance(tag, str) for tag in hashtags):
        raise ValueError(f"hashtags must be a list of texts, or a text: {hashtags!r:.80}")
    parts = (unicodedata.normalize("NFKC", part) for tag in hashtags for part in tag.split("#"))
    parts = (unicodedata.normalize("NFKC", part.casefold()) for part in parts)
    plain = {"".join(c for c in p if unicodedata.category(c)[0] not in "PZC") for p in parts}
    return {synonyms.get(tag, tag) for tag in plain - {""}}


@dataclass(eq=False)
class TagChunks(torch.utils.data.Dataset):
    """chunk -> ([set of canonical tags] of TAG_CHUNK samples, errors)."""

    source: object
    synonyms: dict

    def __getitem__(self, chunk):
        found, errors = [], []
        end = min((chunk + 1) * TAG_CHUNK, int(self.source.sizes.sum()))
        for number in range(chunk * TAG_CHUNK, end):
            try:
                found.append(canonical(self.source.read(number)["hashtags"](), self.synonyms))
            except Exception as error:  # noqa: BLE001 (named and counted, whatever it was)
                raise_if_unreachable(error)
                found.append(set())
                errors.append(f"{self.source.name(number)}: {one_line(error)}")
        return found, errors

    def about(self, chunk):
        return f"chunk {chunk}, from {self.source.where(chunk * TAG_CHUNK)} on"

    def read(self, workers, title, named=20):
        """The set of tags of each sample, read ahead by worker processes, with a bar.

        All that are damaged are counted, the first ones (`named`) are named.
        """
        chunks, bad = range(math.ceil(int(self.source.sizes.sum()) / TAG_CHUNK)), 0
        made = tqdm(loader(self, chunks, workers), desc=title, unit=" chunks", disable=None)
        for found, errors in made:
            for text in errors[: max(0, named - bad)]:
                tqdm.write(f"unreadable hashtags: {text}", file=sys.stderr)
            bad += len(errors)
            yield from found
        if bad and named:
            print(f"samples with unreadable hashtags: {bad}")


def count_hashtags(source, size=28_000, min_count=5, synonyms=None, workers=0):
    """The Vocabulary of a source: at most `size` tags that at least `min_count` pictures carry.

    28,000 is the paper's number of classes. Raises ValueError when fewer than two are left.
    """
    synonyms, counts = synonyms or {}, Counter()
    for tags in TagChunks(source, synonyms).read(workers, "counting"):
        counts.update(tags)
        if len(counts) > MOST_TAGS:
            counts = Counter(dict(counts.most_common(MOST_TAGS // 2)))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:size]
    ranked = {tag: count for tag, count in ranked if count >= min_count}
    if len(ranked) < 2:
        found = f"{len(ranked)} hashtags on {min_count} pictures or more among {source.identity}"
        raise ValueError(f"{found}: want two at least (of a folder, they come from --labels)")
    return Vocabulary(ranked, synonyms)


def write_hashtags(source, out, tail_below=None, workers=0, **counting):
    """Index the hashtags of a source, but for a slice that is held out, into the folder `out`:

    rarest.npy, the id of each sample's rarest tag; totals.npy, each shard's sum of sampling
    weights (see Order); and vocabulary.json, with the weight that each rarest tag gives.

    SWAG's sampler (arXiv 2201.08371; cut and shares are its authors'). The tail is the pictures
    with a tag that fewer than `tail_below` pictures carry, the head is the others; 70 % of an epoch
    is drawn from the head, 30 % from the tail. Within each, a picture's importance is the maximum
    over its tags of 1 / sqrt(pictures with that tag) (recalled): its rarest tag decides. An epoch
    is as long as there are pictures with a known tag; the others are never drawn.
    """
    train, _ = hold_out(source, None, HELD_OUT)
    vocabulary = count_hashtags(train, workers=workers, **counting)
    os.makedirs(out, exist_ok=True)
    total, counts = int(train.sizes.sum()), np.array(list(vocabulary.counts.values()))
    # A new file: a run that reads an earlier index goes on with that.
    rarest = np.lib.format.open_memmap(f"{out}/rarest.new.npy", "w+", np.int32, (total,))
    drawn = np.zeros(len(counts), dtype=np.int64)  # pictures with this rarest tag
    chunks = TagChunks(train, vocabulary.synonyms)
    for number, tags in enumerate(chunks.read(workers, "weighing", named=0)):
        # ids fall with the number of pictures: the largest is the rarest
        rarest[number] = max((vocabulary.numbers.get(tag, -1) for tag in tags), default=-1)
        if rarest[number] >= 0:
            drawn[rarest[number]] += 1
    rarest.flush()
    tail_below = tail_below or min(5000, math.ceil(total / 100))
    tail, importance = counts < tail_below, counts**-0.5
    shares = {True: 0.3, False: 0.7}
    if not drawn[tail].any() or not drawn[~tail].any():
        print(
            f"all pictures are in the {'tail' if drawn[tail].any() else 'head'}: it has all draws"
        )
        shares = {True: 1.0, False: 1.0}
    weights = np.zeros(len(counts) + 1, dtype=np.int64)  # the last one, of -1, stays 0
    for part, share in shares.items():
        which = np.flatnonzero((tail == part) & (drawn > 0))
        scale = share * drawn.sum() / max(1e-9, (drawn * importance)[which].sum())
        weights[which] = np.maximum(1, np.rint(scale * importance[which] * WEIGHT))
    totals = [
        int(weights[rarest[a:b]].sum()) for a, b in itertools.pairwise(running_sum(train.sizes))
    ]
    if Path(out, "vocabulary.json").exists():
        print(f"{out} held an index already: it is replaced")
    Path(out, "vocabulary.json").unlink(missing_ok=True)  # it comes last: without it, none counts
    os.replace(f"{out}/rarest.new.npy", f"{out}/rarest.npy")
    np.save(f"{out}/totals.npy", np.array(totals, dtype=np.int64))
    rows = enumerate(zip(vocabulary.counts.items(), weights.tolist()))
    tags = [{"tag": t, "id": i, "count": n, "weight": w} for i, ((t, n), w) in rows]
    content = {"data": train.identity, "tail_below": tail_below, "tags": tags}
    text = json.dumps(content | {"synonyms": vocabulary.synonyms}, ensure_ascii=False, indent=0)
    Path(out, "vocabulary.json").write_text(text, encoding="utf-8")
    numbers = f"{drawn.sum()} of {total} pictures are drawn, {drawn[tail].sum()} of them tail"
    print(f"{len(vocabulary)} hashtags; {numbers}; {int(source.sizes.sum()) - total} are held out")


def open_hashtags(source, folder):
    """(Vocabulary, source to train on, slice to measure on, Order's "totals", "weights", "most").

    From a folder that write_hashtags wrote for this source; without one, for the toy world: the
    tags of its first pictures, and no weights. Raises ValueError, one line, when that cannot be.
    """
    if not folder and isinstance(source, Toy):
        vocabulary = count_hashtags(Part(source, range(TAG_CHUNK)))
        return vocabulary, source, Part(Toy("val", source.sides), range(HELD_OUT)), {}
    train, held_out = hold_out(source, None, HELD_OUT)
    hint = "write it with: python data.py hashtags DATA --out TAGS, and give --tags TAGS"
    hint += " (and both the same --labels, if any)"
    try:
        text = Path(folder or "", "vocabulary.json").read_text(encoding="utf-8")
        content, totals = json.loads(text), np.load(f"{folder}/totals.npy")
        counts = {entry["tag"]: entry["count"] for entry in content["tags"]}
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        vocabulary = Vocabulary(counts, content["synonyms"], digest)
        table = np.array([entry["weight"] for entry in content["tags"]] + [0], dtype=np.int64)
        made_for, rarest = content["data"], open_array(f"{folder}/rarest.npy")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        where = f"in {folder} ({one_line(error)})" if folder else "are given"
        raise ValueError(f"no hashtags {where}: {hint}") from None
    if made_for != train.identity or len(rarest) != train.sizes.sum():
        raise ValueError(f"{folder} is of other data ({made_for}): {hint}")
    if len(totals) != len(train.sizes) or rarest.max() >= len(counts):
        raise ValueError(f"{folder} is damaged (its files do not fit each other): {hint}")
    weights = partial(weights_of, f"{folder}/rarest.npy", table)
    return vocabulary, train, held_out, {"totals": totals, "weights": weights, "most": table.max()}


def weights_of(rarest, table, start, stop):
    return table[open_array(rarest)[start:stop]]


@lru_cache(1)
def open_array(path):
    return np.load(path, mmap_mode="r")


def read_synonyms(path):
    """{canonical tag: canonical tag} of lines of two columns, parted by a tab.

    Raises ValueError when a line is something else, or a tag that others count as is not final.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        rows = [line.split("\t") for line in lines if line.strip()]
        pairs = {}
        for row in rows:
            (tag,), (other,) = (canonical([cell], {}) for cell in row)  # one tag in each of two
            if pairs.setdefault(tag, other) != other:
                raise ValueError(f"{tag} counts as {pairs[tag]} and as {other}")
        for tag, other in pairs.items():
            if pairs.get(other, other) != other:
                raise ValueError(f"{tag} counts as {other}, which counts as {pairs[other]}")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is no list of synonyms (two columns, a tab): {error}") from None
    return pairs


# --------------------------------------------------------------------------------- the command line


def pack(folder, pattern, short_side=None, shard_size=None, max_pixels=MAX_PIXELS):
    """Write the pictures of a folder into tar shards, with .cls members if it has class folders.

    Pictures are written as they are or, with short_side, scaled down to it and encoded again. An
    interrupted run goes on; pack.json, beside the shards, says what they were asked to be.
    """
    limit_pixels(max_pixels)
    out, name = os.path.split(pattern)
    if not re.fullmatch(r"[^%{}]*%\d*d[^%{}]*\.tar", name):
        want = "one number, and no braces, in the file's name, as in OUT-%05d.tar"
        raise ValueError(f"{pattern} must hold {want}")
    if splits := find_splits(folder):
        names = [name for split in ("train", "val", "test") for name in splits.get(split, [])]
        parts = ", ".join(os.path.join(folder, name) for name in names)
        raise ValueError(f"{folder} holds splits: pack {parts} one after the other")
    every = os.path.join(glob.escape(out), re.sub(r"%\d*d", "[0-9]*", glob.escape(name)))
    record = pack_record(out)
    # Classes are numbered as those packed into the same place before: train first, then val.
    try:
        source = Folder(folder, record["classes"])
    except ValueError as error:
        known = f" (the classes of {out}/pack.json: use another folder)" * bool(record["classes"])
        raise ValueError(f"{error}{known}") from None
    total = len(source.paths)
    # At least 48 shards if there is enough: that is the number of lanes (see Order).
    shard_size = shard_size or max(1, min(10_000, math.ceil(total / 48)))
    asked = {"pictures": source.identity, "short_side": short_side, "shard_size": shard_size}
    asked |= {"max_pixels": max_pixels} if max_pixels != MAX_PIXELS else {}
    if glob.glob(every) and record["packed"].get(name) != asked:
        raise ValueError(f"{pattern} is not of these pictures and options: move it away")
    os.makedirs(out or ".", exist_ok=True)
    record["packed"][name], record["classes"] = asked, record["classes"] or source.classes
    replace_file(Path(out, "pack.json"), json.dumps(record).encode())
    with ThreadPoolExecutor() as threads:  # Pillow works outside Python's lock
        starts = range(0, total, shard_size)
        for start in tqdm(starts, desc="packing", unit=" shards", disable=None):
            shard = os.path.join(out, name % (start // shard_size))
            if not os.path.exists(shard):
                numbers = range(start, min(start + shard_size, total))
                write_shard(f"{shard}.tmp", source, numbers, short_side, threads)
                os.replace(f"{shard}.tmp", shard)
    first, last = (re.search(r"%\d*d", name)[0] % number for number in (0, len(starts) - 1))
    written = os.path.join(out, re.sub(r"%\d*d", f"{{{first}..{last}}}", name))
    print(f"{total} pictures in {len(starts)} shards: --data {shlex.quote(written)}")
    write_listing(Shards(written))  # which writes their indexes


def write_listing(shards):
    """index.json, beside the shards: what those who read them from elsewhere know beforehand.

    {"classes": names or None, "shards": {base name: [bytes, samples]}, "faults": {base name: see
    scan_tar}}. What it lists already, and still exists, stays. (No offsets: of 3 billion samples
    they would be 48 GB. They are found when a shard has arrived.)
    """
    for folder in sorted({os.path.dirname(path) for path in shards.paths}):
        path = Path(folder, "index.json")
        try:
            listing = json.loads(path.read_text()) if path.exists() else {"shards": {}}
            listed, faults = dict(listing["shards"]), dict(listing.get("faults", {}))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is no list that data.py wrote: move it away") from None
        for place, (name, *fact) in zip(shards.paths, shards.facts):
            if os.path.dirname(place) == folder:
                listed[name], faults[name] = fact, shards.faults.get(place)
        listed = {name: fact for name, fact in listed.items() if Path(folder, name).exists()}
        faults = {name: fault for name, fault in faults.items() if name in listed and fault}
        content = {"classes": pack_record(folder)["classes"], "shards": listed, "faults": faults}
        replace_file(path, json.dumps(content).encode())


def replace_file(path, content):
    """Write a file whole or not at all, whoever else may be writing it."""
    new = f"{path}.{os.urandom(8).hex()}.tmp"
    try:
        Path(new).write_bytes(content)
        os.replace(new, path)
    finally:
        with suppress(OSError):  # it is there only where that has failed
            os.remove(new)


def write_shard(path, source, numbers, short_side, threads):
    with tarfile.open(path, "w") as tar:
        for some in range(0, len(numbers), 256):  # so many pictures are in memory at once
            part = numbers[some : some + 256]
            encoded = threads.map(lambda n: encode(source.name(n), short_side), part)
            for number, (kind, content) in zip(part, encoded):
                # The number makes the key unique: a.jpg and a.png may be neighbours.
                stem = re.sub(r"[/.]", "_", os.path.splitext(source.paths[number])[0])
                members = {kind: content}
                if source.classes:
                    members["cls"] = str(source.labels[number]).encode()
                for extension, content in members.items():
                    # Time 0, owner 0: the same pictures give the same bytes.
                    member = tarfile.TarInfo(f"{number:08d}_{stem}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def pack_record(folder):
    """What pack says of its shards in folder/pack.json: class names, and options by pattern."""
    path = Path(folder, "pack.json")
    try:
        record = json.loads(path.read_text()) if path.exists() else {"classes": None, "packed": {}}
        return {"classes": record["classes"], "packed": dict(record["packed"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): remove it, and pack again") from None


def encode(path, short_side):
    """(extension, bytes) of a picture for a shard."""
    kind, content = os.path.splitext(path)[1][1:].lower(), b""
    try:
        content = Path(path).read_bytes()
        with open_picture(io.BytesIO(content)) as image:
            if not short_side or min(image.size) <= short_side:
                return kind, content
            # A JPEG is decoded at 1/2, 1/4 or 1/8, which needs less memory, if at least twice the
            # size is left.
            scale = 2 * short_side / min(image.size)
            image.draft(None, tuple(math.ceil(scale * side) for side in image.size))
            image, buffer = upright(image), io.BytesIO()
            solid = image.mode in ("L", "RGB", "CMYK", "YCbCr") and not has_alpha(image)
            scale = short_side / min(image.size)
            size = tuple(max(1, round(scale * side)) for side in image.size)
            image = to_mode(image, 3 if solid else 4).resize(size, Image.Resampling.BICUBIC)
            image.save(buffer, "JPEG" if solid else "PNG", quality=90)
            return "jpg" if solid else "png", buffer.getvalue()
    except Exception as error:  # noqa: BLE001 (kept as it is: training names and counts it)
        text = f"{path} cannot be read ({one_line(error)}), packed as it is"
        tqdm.write(text, file=sys.stderr)
        return kind, content


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def main():
    parser = argparse.ArgumentParser(description="Prepare shards.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pack", help="pictures of a folder -> tar shards")
    command.add_argument("folder")
    command.add_argument("pattern", help="OUT-%%05d.tar")
    command.add_argument("--short-side", type=positive, help="scale larger pictures down to this")
    command.add_argument("--shard-size", type=positive, help="pictures in a shard")
    pixels = {"type": pixel_limit, "default": MAX_PIXELS}
    command.add_argument("--max-pixels", **pixels, help="of a picture that is read (89 million)")
    command = commands.add_parser("index", help="write the index of tar shards beside them")
    command.add_argument("shards", help="a path, a glob or {00000..00099} braces")
    command = commands.add_parser("hashtags", help="vocabulary and sampling weights of a data set")
    command.add_argument("data", help="as --data: shards with .json or .txt, or a folder")
    command.add_argument("--out", required=True, help="the folder that --tags will name")
    command.add_argument("--labels", help='JSON lines of {"path", "hashtags"} for a folder')
    command.add_argument("--synonyms", help="two columns: a tag, and the tag that it counts as")
    command.add_argument("--vocabulary", type=positive, default=28_000, help="most tags (28,000)")
    command.add_argument("--min-count", type=positive, default=5, help="pictures of a tag (5)")
    command.add_argument("--tail-below", type=positive, help="pictures (5,000 or 1 %% of them)")
    command.add_argument("--workers", type=int, help="processes (the cores left)")
    given = parser.parse_args()
    try:
        if given.command == "pack":
            options = given.short_side, given.shard_size, given.max_pixels
            pack(given.folder, given.pattern, *options)
        elif given.command == "index":
            shards = Shards(given.shards)
            write_listing(shards)
            print(shards.identity)
        else:
            source, _ = open_sources(given.data, labels=given.labels)
            synonyms = read_synonyms(given.synonyms) if given.synonyms else {}
            counting = {"min_count": given.min_count, "synonyms": synonyms}
            counting |= {"size": given.vocabulary, "workers": loader_workers(given.workers)}
            write_hashtags(source, given.out, given.tail_below, **counting)
    except (ValueError, OSError) as error:
        parser.exit(2, f"data.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "data.py: stopped: type the same command again\n")


if __name__ == "__main__":
    main()
