"""Where pictures come from, in what order, and how they become tensors.

    open_sources      one --data string: a folder of pictures, tar shards, "toy"
    Order             position -> sample: a pure function of (seed, epoch, position), in lanes
    Batches           samples -> uint8 tensors, a micro-batch at a time (support/loader.py: workers)
    normalize         uint8 -> float, on the device

    python data.py pack FOLDER OUT-%05d.tar [--short-side 256]     pictures -> shards
    python data.py index 'SHARDS-*.tar'                            shards -> their index
    python data.py hashtags DATA --out TAGS                        vocabulary and sampling weights

Every random draw is keyed by (seed, epoch, position, purpose): nothing depends on the number of
workers, processes or nodes, nor on what was drawn before. A sample that cannot be read keeps its
position as a zero image of weight 0; nothing shifts.
This file needs torch, numpy and pillow, and stands alone when copied, for folders of pictures.
Other sources are in support/ and tasks/.
"""

import argparse
import errno
import hashlib
import json
import math
import os
import re
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

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

SHUFFLE_BLOCK = 8192  # samples that are shuffled together, from as few shards as hold them


class Order:
    """The endless stream of samples: position -> sample number, counted through the shards.

    Position p lies in epoch p // length. An epoch has each sample once. (support/hashtags.py has an
    order with sampling weights.)

    The stream is dealt to `lanes`, in pairs of positions, because mixup mixes 2i and 2i + 1: the
    lane of position p is (p // 2) % lanes. Process r of W takes the positions with (p // 2) % W ==
    r: for any W that divides the lanes these are whole lanes. So the global order is the same for
    all such W, and each process reads only its own lanes' shards.

    Example: shards 0, 1, 2 of 4, 3 and 5 samples (numbers 0-3, 4-6, 7-11), two lanes.

        positions   0  1   2  3   4  5   6  7   8  9  10 11
        lane        0  0   1  1   0  0   1  1   0  0   1  1      each lane has 6 of the 12

    1. The shards are laid end to end, in a random order that depends on the seed alone. Say it is
       2, 0, 1: the line of samples is 7-11, 0-3, 4-6.
    2. The line is cut into one stretch for each lane, as long as the lane's positions in this
       epoch. Lane 0 gets 7-11 and 0, lane 1 gets 1-3 and 4-6. Lanes never end unevenly; a shard
       that a cut runs through is read by both. (In the next epoch the cuts lie elsewhere, if the
       samples cannot be dealt evenly; by fewer than 2 x lanes samples.)
    3. The pieces of shards in a stretch come in a random order: lane 1 reads 4-6, then 1-3.
    4. Samples are shuffled in blocks of neighbouring pieces. Here all six are one block: say
       5 3 1 6 4 2. So positions 2, 3, 6, 7, 10, 11 are samples 5, 3, 1, 6, 4, 2.

    A process holds two blocks of numbers per lane, and otherwise only what grows with the shards.

    sizes   (S,) samples in each shard
    lanes   default: 48, or the number of shards if that is smaller
    """

    most = 1  # times that a sample comes in an epoch

    def __init__(self, sizes, seed=0, lanes=None):
        sizes = np.asarray(sizes, dtype=np.int64)
        self.seed, self.lanes = seed, lanes or min(48, len(sizes))
        self.shards = permutation(len(sizes), seed, 0, 0, SHARDS)  # as they are laid end to end
        self.sizes = sizes[self.shards]
        self.first = (np.cumsum(sizes) - sizes)[self.shards]  # each shard's first sample number
        self.edges = running_sum(self.sizes)  # (S + 1,) where each shard begins in the line
        self.set_length(int(self.edges[-1]))
        self.blocks = {}  # lane -> [(epoch, first turn, sample numbers)] of its last two blocks

    def set_length(self, length):
        """Set the length of an epoch, in samples. Raises ValueError if it is 0."""
        if length < 1:
            raise ValueError("there are no samples to draw from")
        self.length = length

    def __call__(self, position):
        """The sample number of a position."""
        epoch, lane = position // self.length, position // 2 % self.lanes
        # The position is the lane's turn-th of this epoch.
        turn = self.before(lane + 1, position, epoch) - self.before(lane, position, epoch)
        last = self.blocks.get(lane, [])
        for block_epoch, first, samples in last:
            if block_epoch == epoch and first <= turn < first + len(samples):
                return int(samples[turn - first])
        self.blocks[lane] = [*last[-1:], (epoch, *self.block(epoch, lane, turn))]
        return self(position)  # now it is found in the new block

    def before(self, lane, position, epoch):
        """How many of an epoch's positions before `position` belong to lanes before `lane`."""
        rounds = (divmod(place, 2 * self.lanes) for place in (epoch * self.length, position))
        start, stop = (whole * 2 * lane + min(rest, 2 * lane) for whole, rest in rounds)
        return stop - start

    def block(self, epoch, lane, turn):
        """The shuffled block of a lane that holds its `turn`: (its first turn, sample numbers)."""
        end, edges = (epoch + 1) * self.length, self.edges_of(epoch)
        start, stop = self.before(lane, end, epoch), self.before(lane + 1, end, epoch)
        # The pieces of shards in the lane's stretch: piece i is cuts[i] .. cuts[i + 1] of the line.
        shard = np.searchsorted(edges, start, "right") - 1
        last = np.searchsorted(edges, stop, "left")
        cuts = np.clip(edges[shard : last + 1], start, stop)
        pieces = permutation(len(cuts) - 1, self.seed, epoch, lane, LANES)
        counts = np.diff(cuts)[pieces]
        turns = np.cumsum(counts) - counts  # each piece's first turn
        # Pieces that begin in the same SHUFFLE_BLOCK turns make a block.
        number = turns // SHUFFLE_BLOCK
        block = number[np.searchsorted(turns + counts, turn, "right")]
        pieces, counts, turns = (array[number == block] for array in (pieces, counts, turns))
        first = int(turns[0])
        places = np.arange(counts.sum()) + np.repeat(cuts[pieces] - (turns - first), counts)
        samples = self.samples_at(epoch, places, np.repeat(shard + pieces, counts))
        shuffle = permutation(len(samples), self.seed, epoch, lane << 32 | int(block), BLOCKS)
        return first, samples[shuffle]

    def edges_of(self, epoch):
        """(S + 1,) where each shard begins in an epoch's line."""
        return self.edges

    def samples_at(self, epoch, places, shards):
        """The sample numbers at these places of an epoch's line, which lie in these shards."""
        return self.first[shards] + places - self.edges[shards]


# ------------------------------------------------------------------------------------------ sources


class Source:
    """What a source of samples has: Folder, Shards, Subset, and those of support/ and tasks/.

    sizes     (S,) int64, samples per shard; numbers of samples run through the shards
    classes   the names of its classes, or None
    identity  a text that is another one for other data
    cache     of remote shards, see support/remote.py
    endless   True if an epoch is a number, and samples never run out: the toy world's
    """

    cache, endless = None, False

    def read(self, number):
        """A dict whose functions open what they give only when they are called:

        image      () -> PIL image
        class      int, -1 if unknown
        hashtags   () -> a list of tags, or a text with #tags in it (may be missing)
        captions   () -> a list of texts (may be missing)
        video      instead of image, or beside it: see tasks/video.py

        The functions raise ValueError or OSError where the sample is damaged.
        """

    def name(self, number):
        """The sample's name, for messages."""

    def where(self, number):
        """The shard or picture that it is in, known without opening anything."""


PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


# {name of a folder, in lower case: the split in it}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
SPLITS |= {"test": "test", "testing": "test"}


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
                 braces; or the same of a web address or a pipe:COMMAND: see support/remote.py
    size         (height, width) that pictures will have: the toy world is drawn for it
    labels       a file that lists the pictures of a folder: see support/labels.py
    cache        (folder or None, size like "500G") for remote shards
    caption_key  name of the captions in .json files of shards, and in labels
    videos       of videos instead: see tasks/video.py

    Without val_data, the toy world has its own, and so has a folder with train/ and val/ in it (or
    other names in SPLITS; test/ is left out). With labels, the names of folders mean nothing.
    Raises ValueError, one line that says what to do.
    """
    if videos:
        from tasks.video import folder_of_list

        data, labels = folder_of_list(data, labels)
        val_data, val_labels = folder_of_list(val_data, val_labels)
    if labels and not os.path.isdir(data) or val_labels and not os.path.isdir(val_data or data):
        raise ValueError("--labels and --val-labels want a folder that their paths lie in")
    if val_data and not val_labels and splits_in(val_data):
        raise ValueError(f"{val_data} holds several splits: give one of its folders as --val-data")
    if data == "toy":
        val_data = val_data or "toy"
    elif not labels and (splits := splits_in(data)):
        from support.labels import choose_splits

        data, own = choose_splits(data, splits)
        val_data = val_data or own
    elif val_labels:
        val_data = val_data or data
    options = {"cache": cache, "caption_key": caption_key, "videos": videos}
    train = open_source(data, "train", size, labels=labels, **options)
    if not val_data:
        return train, None
    options |= {"labels": val_labels, "classes": train.classes}
    return train, open_source(val_data, "val", size, **options)


def open_source(data, split, size, labels, classes=None, *, cache, caption_key, videos):
    """The source behind one --data string: see open_sources.

    split: "train" or "val" of the toy world. classes: the only names that it may have; None: any.
    """
    if os.path.isdir(data) and not videos:
        return Folder(data, classes, labels, caption_key)
    if os.path.isdir(data):
        from tasks.video import VideoFolder

        return VideoFolder(data, classes, labels)
    if data == "toy":
        if videos:
            from tasks.video import ToyMotion as World
        else:
            from support.toy import Toy as World

        world = World(split, size)
        if classes not in (None, world.classes):
            raise ValueError("the toy world has other classes than train: give other --val-data")
        return world
    there = os.path.exists(data)
    if (
        there
        and not data.lower().endswith(".tar")
        or not re.search(r"[*?\[{:]|\.tar$", data, re.IGNORECASE)
    ):
        state = "is not a folder or a .tar" if there else "does not exist"
        raise ValueError(f"{data} {state}: --data wants toy, a folder of pictures or tar shards")
    from support.shards import open_shards

    return open_shards(data, classes, cache, caption_key, videos)


def splits_in(root):
    """The folders of splits in root, see find_splits in support/labels.py; {} if there are none."""
    if not os.path.isdir(root) or SPLITS.keys().isdisjoint(map(str.lower, os.listdir(root))):
        return {}
    from support.labels import find_splits

    return find_splits(root)


class Folder(Source):
    """Pictures below a folder. If all lie in subfolders, the first level's names are the classes.

    With `labels`, the pictures, classes, hashtags and captions that this file lists: see
    support/labels.py.

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
        if not labels:
            return pictures_below(root)
        from support.labels import read_labels

        return read_labels(labels, caption_key)

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
    """Print a warning if folders with pictures look like splits that find_splits does not know."""
    looks, found = re.compile("(?<![a-z])(train|test|val)(ing|id|idation)?(?![a-z])"), {}
    for folder in folders:
        for split in looks.finditer(folder.lower()):
            found.setdefault(split[1], folder)
    if len(found) > 1 and os.environ.get("RANK", "0") == "0":
        why = "look like splits, but all are read: give them as --data and --val-data"
        print(f"{root}: folders in it ({' '.join(sorted(found.values()))}) {why}", file=sys.stderr)


def class_of(path):
    """The entry of a picture: {"class": its first folder}, or {} if it lies in no folder."""
    return {"class": path.split("/")[0]} if "/" in path else {}


def walk(root):
    """Yield (folder, names of its files) for root, as "", and each folder below, as "a/b/"."""

    def fail(error):
        raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}")

    seen = {os.path.realpath(root)}
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        places = {name: os.path.realpath(os.path.join(folder, name)) for name in folders}
        folders[:] = [n for n in folders if not n.startswith(".") and places[n] not in seen]
        seen.update(map(places.get, folders))  # links may lead in circles
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        yield "" if below == "." else f"{below}/", files


def is_picture(name):
    return name.lower().endswith(PICTURES) and not name.startswith(".")


def stable_hash(text):
    """8 bytes that depend on the text alone: Python's own hash() differs between processes."""
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()


class Subset(Source):
    """The samples of a source with these numbers (a range or a list), in this order."""

    def __init__(self, source, numbers):
        self.source, self.numbers, self.classes = source, numbers, source.classes
        self.cache = source.cache
        self.sizes = np.ones(len(numbers), dtype=np.int64)
        if isinstance(numbers, range):  # as many shards, and so lanes: some may be empty
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
        return train, Subset(val, range(min(count, int(val.sizes.sum()))))
    total = int(train.sizes.sum())
    count = min(count, int(total * share))
    return Subset(train, range(total - count)), Subset(train, range(total - count, total))


# ------------------------------------------------------------------------------ pictures to tensors


def random_box(width, height, bits, min_crop, aspect):
    """RandomResizedCrop's box (left, top, width, height) from the first 22 of the uint64 draws.

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
    # (Not has_alpha: it does not find a palette of RGBA, as in TGA.)
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
    """An argparse type: the number of pixels that limit_pixels takes."""
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


MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels


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
    mode = MODES[channels]
    return image if image.mode == mode else image.convert(mode)


def check_channels(channels):
    """Raise ValueError if pictures cannot be read with so many."""
    if channels not in MODES:
        raise ValueError(f"pictures can be read as 1, 3 or 4 channels, not as {channels}")


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


# ------------------------------------------------------------------------------------------ batches


@dataclass(eq=False)
class Batches(torch.utils.data.Dataset):
    """number -> the number-th micro-batch of this process's part of the batches, a dict.

    make(sample, key) gives the row of a sample, a dict of tensors and numbers; rows are stacked.
    All random draws for it are keyed by key = (seed, epoch, position). sample is what the source
    reads or, where there is none, None: then the row is of the same shapes, zeros for a picture.

    Beside the row's own, a batch of b = batch_size / processes / micro_batches samples has:
    weight     (b,) float32: what the row says, else 1; 0 for a sample that could not be read
    positions  (b,) int64 in the global stream
    samples    (b,) int64, their numbers in the source; -1 past the last one
    bad        a list of "name: error" for the samples that could not be read
    """

    source: object  # see Source
    make: object
    batch_size: int  # over all processes
    process: int = 0  # this one's number
    processes: int = 1
    # An Order: training. None: evaluation, of one sample after the other, then padding.
    order: object = None
    seed: int = 0
    micro_batches: int = 1  # of each process, in a batch

    def __post_init__(self):
        if self.processes > 1 and self.batch_size % (2 * self.processes):
            raise ValueError(
                f"a batch of {self.batch_size} cannot be dealt to {self.processes} processes "
                f"in pairs: use a multiple of {2 * self.processes}"
            )
        if self.order is not None and self.order.lanes % self.processes:
            raise ValueError(
                f"{self.order.lanes} lanes cannot be dealt to {self.processes} processes: "
                f"give --lanes, a multiple of {self.processes}, and keep to it"
            )
        self.total, self.cache = int(self.source.sizes.sum()), self.source.cache
        if self.cache and self.order is not None:  # each lane reads the shards of a block
            block = math.ceil(SHUFFLE_BLOCK * len(self.source.sizes) / self.order.length)
            self.cache.must_hold(self.order.lanes // self.processes * block)

    def __len__(self):
        """Micro-batches in which each sample comes once (the last ones may hold padding)."""
        return math.ceil(self.total / self.batch_size) * self.micro_batches

    def positions(self, number):
        """(b,) int64 in the global stream: a micro-batch's."""
        step, micro_batch = divmod(number, self.micro_batches)
        positions = step * self.batch_size + np.arange(self.batch_size)
        positions = positions[positions // 2 % self.processes == self.process]
        return positions.reshape(self.micro_batches, -1)[micro_batch]

    def __getitem__(self, number):
        positions = self.positions(number)
        if self.cache:  # fetch what is needed now, and half a block later or the next shard
            later = SHUFFLE_BLOCK // 2 * self.order.lanes if self.order else self.source.sizes.max()
            self.cache.prefetch(self.places(np.concatenate([positions, positions + later])))
        bad = []
        rows = [self.row(position, bad) for position in positions.tolist()]
        batch = {name: stack([row[name] for row in rows]) for name in rows[0]}
        return batch | {"positions": torch.from_numpy(positions), "bad": bad}

    def row(self, position, bad):
        """The row of a position; its name and error are added to `bad` if it cannot be read."""
        epoch = position // self.order.length if self.order else 0
        number = self.order(position) if self.order else position
        key, missing = (self.seed, epoch, position), {"weight": 0.0}
        if number >= self.total:
            return self.make(None, key) | missing | {"samples": -1}
        found = {"samples": number}
        try:
            return {"weight": 1.0} | self.make(self.source.read(number), key) | found
        except Exception as error:  # noqa: BLE001 (decoders raise anything: named, counted)
            raise_if_unreachable(error)
            bad.append(f"{self.source.name(number)}: {one_line(error)}")
            return self.make(None, key) | missing | found

    def over_max_bad(self, bad, drawn, share):
        """True if more than this share of the `drawn` first samples are bad (--max-bad).

        The share is of 1,000 samples at least. A single bad file, however often it comes in the
        epochs so far, never stops a run; nothing but bad files always does.
        """
        alone = (drawn // self.order.length + 1) * self.order.most
        return bad > max(share * max(1000, drawn), alone) or bad == drawn > 1

    def places(self, positions):
        """The shards or pictures that positions are in, each once. Nothing is opened."""
        numbers = map(self.order, positions.tolist()) if self.order else positions.tolist()
        return list(dict.fromkeys(self.source.where(n) for n in numbers if n < self.total))

    def about(self, number):
        """What a micro-batch is made of, in words: of what is remote, what has not come yet."""
        places = self.places(self.positions(number))
        if self.cache:
            places = [place for place in places if not self.cache.has(place)] or places
        some = ", ".join(places[:4]) + ", ..." * (len(places) > 4)
        return f"process {self.process}, step {number // self.micro_batches + 1}: {some}"


def stack(rows):
    """Stack one entry of all rows: tensors along a new first axis, numbers into a tensor.

    Tensors (n,) of different lengths are padded with -1. All else stays a list.
    """
    if isinstance(rows[0], int | float):
        return torch.tensor(rows)
    if not isinstance(rows[0], torch.Tensor):
        return rows
    if rows[0].ndim == 1:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    if rows[0].ndim > 2:
        # Pictures are in channels-last memory, and patchify reads them in it.
        return torch.stack([row.movedim(0, -1) for row in rows]).movedim(-1, 1)
    return torch.stack(rows)


def make_picture(sample, key, size, channels, min_crop=None, centre=1.0):
    """(C, H, W) uint8 of a sample: a random crop and flip or, without min_crop, the centre.

    sample None: zeros. For Batches' make; the other arguments are crop_and_resize's.
    """
    if sample is None:
        return torch.zeros(*size, channels, dtype=torch.uint8).movedim(-1, 0)
    bits = None if min_crop is None else random_bits(24, *key, VIEW)
    return crop_and_resize(sample["image"](), size, channels, bits, min_crop, centre)


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


def one_line(error):
    """What a decoder says, on one line, without the path or address that Pillow adds."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    bomb, limit = r"Image size \((\d+ pixels)\) exceeds limit.*", Image.MAX_IMAGE_PIXELS
    text = re.sub(bomb, rf"\1 are over --max-pixels {limit}", text)
    return re.sub("(cannot identify image file).*", r"\1", text)


if __name__ == "__main__":
    from support.pack import main

    main()
