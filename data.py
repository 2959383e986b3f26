"""Where pictures come from, in what order, and how they become tensors.

    open_sources   a --data string -> samples: a folder, tar shards, or the toy world
    Order          position -> sample: a pure function of (seed, epoch, position)
    Batches        samples -> uint8 tensors, a micro-batch at a time
    normalize      uint8 -> float, on the device

    python data.py pack FOLDER OUT-%05d.tar [--short-side 256]     pictures -> shards
    python data.py index 'SHARDS-*.tar'                            shards -> their index
    python data.py hashtags DATA --out TAGS                        vocabulary and weights

Every random draw is keyed by (seed, epoch, position, purpose): nothing depends on the
number of workers, processes or nodes, nor on earlier draws. This file can be copied alone,
for folders of pictures; other sources are in support/ and tasks/.
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
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # default of --max-pixels: 89 million
# A picture of more pixels is an error, not a warning: see Batches.
warnings.simplefilter("error", Image.DecompressionBombWarning)

# Purposes of random draws: numbers, because they are half of Philox's key.
SHARDS, OFFSET, LANES, BLOCKS, VIEW, MASK, TOY, SPLIT, AUGMENT, DEVICE, CAPTION = range(1, 12)


def random_bits(count, seed, epoch, position, purpose):
    """(count,) uint64: the first draws of the stream of these four keys.

    Philox is counter-based: no stream depends on what was drawn before. Only its raw bits
    are used, because numpy may change its distributions between versions.
    """
    key = np.array([seed, purpose], dtype=np.uint64)
    counter = np.array([0, position, epoch, 0], dtype=np.uint64)  # word 0 counts draws
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def uniform(bits):
    """uint64 -> float64 in [0, 1), from the upper 53 bits."""
    return (bits >> np.uint64(11)) * 2.0**-53


def permutation(count, seed, epoch, position, purpose):
    """A random permutation of 0 .. count - 1, int64."""
    # Stable: equal draws must not depend on the sort.
    return np.argsort(random_bits(count, seed, epoch, position, purpose), kind="stable")


def running_sum(counts):
    """(S,) -> (S + 1,) int64: the sum before each count, and the sum of all."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


# -------------------------------------------------------------------------------------------- order

SHUFFLE_BLOCK = 8192  # samples, about, that are shuffled together


class Order:
    """The endless stream of samples: position -> sample number.

    Position p lies in epoch p // length. An epoch has each sample once. (WeightedOrder in
    support/hashtags.py has sampling weights.)

    The stream is dealt to `lanes` in pairs of positions, because mixup mixes 2i and 2i + 1:
    position p is in lane (p // 2) % lanes. Process r of W takes the positions with
    (p // 2) % W == r. If W divides the lanes, these are whole lanes: the order is the same
    for all such W, and a process reads only the shards of its own lanes.

    Example: shards 0, 1, 2 of 4, 3 and 5 samples (numbers 0-3, 4-6, 7-11), two lanes.

        positions   0  1   2  3   4  5   6  7   8  9  10 11
        lane        0  0   1  1   0  0   1  1   0  0   1  1

    1. The shards are laid end to end, in a random order of the seed alone. Say it is
       2, 0, 1: the line of samples is 7-11, 0-3, 4-6.
    2. The line is cut into a stretch for each lane, with one sample for each of its
       positions in this epoch: 7-11, 0 for lane 0; 1-3, 4-6 for lane 1. Both read shard 0.
    3. A stretch's pieces, each of one shard, come in a random order: 4-6, then 1-3.
    4. Samples are shuffled in blocks of neighbouring pieces. Here all six are a block, say
       5 3 1 6 4 2: positions 2, 3, 6, 7, 10, 11 are samples 5, 3, 1, 6, 4, 2.

    sizes   (S,) samples in each shard; sample numbers run through the shards
    lanes   default: 48, or the number of shards if that is smaller
    """

    most = 1  # times that a sample comes in an epoch

    def __init__(self, sizes, seed=0, lanes=None):
        sizes = np.asarray(sizes, dtype=np.int64)
        self.seed, self.lanes = seed, lanes or min(48, len(sizes))
        self.shards = permutation(len(sizes), seed, 0, 0, SHARDS)  # along the line
        self.sizes = sizes[self.shards]
        self.first = running_sum(sizes)[self.shards]  # number of each shard's first sample
        self.edges = running_sum(self.sizes)  # (S + 1,) where shards begin in the line
        self.set_length(int(self.edges[-1]))
        self.blocks = {}  # lane -> its last two: (epoch, first turn, sample numbers)

    def set_length(self, length):
        """Set the length of an epoch, in samples. Raises ValueError if it is 0."""
        if length < 1:
            raise ValueError("there are no samples to draw from")
        self.length = length

    def __call__(self, position):
        """The sample number of a position."""
        epoch, lane = position // self.length, position // 2 % self.lanes
        # The position is number `turn` of the lane's positions in this epoch.
        turn = self.before(lane + 1, position, epoch) - self.before(lane, position, epoch)
        last = self.blocks.get(lane, [])
        for block_epoch, first, samples in last:
            if block_epoch == epoch and first <= turn < first + len(samples):
                return int(samples[turn - first])
        self.blocks[lane] = [*last[-1:], (epoch, *self.block(epoch, lane, turn))]
        return self(position)  # found in the new block

    def before(self, lane, position, epoch):
        """Count an epoch's positions below `position` that belong to lanes 0 to lane - 1."""
        rounds = (divmod(place, 2 * self.lanes) for place in (epoch * self.length, position))
        start, stop = (whole * 2 * lane + min(rest, 2 * lane) for whole, rest in rounds)
        return stop - start

    def block(self, epoch, lane, turn):
        """(first turn, sample numbers) of the shuffled block with this turn of a lane."""
        end, edges = (epoch + 1) * self.length, self.edges_of(epoch)
        # The lane's stretch of the line. Those of lower lanes lie before it.
        start, stop = self.before(lane, end, epoch), self.before(lane + 1, end, epoch)
        # Piece i of the lane's stretch is cuts[i] .. cuts[i + 1] of the line, in one shard.
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
        """The sample numbers at `places` of an epoch's line, which lie in `shards`."""
        return self.first[shards] + places - self.edges[shards]


# ------------------------------------------------------------------------------------------ sources


class Source:
    """The interface of a source of samples: Folder, Shards, Subset and others.

    sizes          (S,) int64, samples per shard; sample numbers run through the shards
    classes        names of its classes, or None
    strays         how many pictures lie beside the folders of its classes
    identity       a text that differs for other data
    cache          of remote shards, see support/remote.py
    endless        True for the toy world: an epoch is any number of samples
    name(number)   the name of a sample, for messages
    where(number)  the shard or picture that holds it; nothing is opened
    read(number)   a dict of a sample; nothing is opened before its functions are called:
        image      () -> PIL image
        class      int, -1 if unknown
        hashtags   () -> a list of tags, or a text with #tags in it (may be missing)
        captions   () -> a list of texts (may be missing)
        video      instead of image, or beside it: see tasks/video.py

    The functions raise ValueError or OSError if the sample is damaged.
    """

    cache, endless, strays = None, False, 0


PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# Of phones and cameras. Some can be read, see support/photos.py; raw files cannot.
PHOTOS = (".avif", ".heic", ".heif")
RAW = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".rw2", ".orf")
HIDDEN = (".", "@eaDir", "__MACOSX")  # how names of folders begin that hold previews, if any
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= {"val": "val", "valid": "val", "validation": "val"}  # name of a folder -> split


def open_sources(
    data,
    val_data=None,
    size=(64, 64),
    labels=None,
    val_labels=None,
    cache=(None, "20G"),
    caption_key="caption",
    videos=False,
    labelled=True,
    val_share=None,
):
    """(source to train on, source to measure on or None) behind --data and --val-data.

    data         "toy"; a folder of pictures; or tar shards: a path, a glob, or a pattern
                 with {00000..00099}, which may be of web addresses or a pipe:COMMAND
    size         (height, width) for which the toy world is drawn
    labels       a file that lists the pictures of a folder: see support/labels.py
    cache        (folder or None, size as "500G") for remote shards
    caption_key  name of the captions in labels and in .json files of shards
    videos       open videos instead: see tasks/video.py
    labelled     False: val may have other classes than train. Then its labels are not used
    val_share    share of the samples to measure on, where there is no val: see hold_out

    Without val_data, the toy world has its own, and so has a folder with train/ and val/
    in it (see SPLITS). With labels, names of folders mean nothing. Raises ValueError.
    """
    if videos:
        from tasks.video import folder_of_list

        data, labels = folder_of_list(data, labels)
        val_data, val_labels = folder_of_list(val_data, val_labels)
    if val_data and not val_labels and splits_in(val_data):
        raise ValueError(f"{val_data} holds several splits: give one of its folders as --val-data")
    own = data if data == "toy" or val_labels else None  # --data itself, if it holds its val
    if not labels and (splits := splits_in(data)):
        from support.labels import choose_splits

        data, own = choose_splits(data, splits)
    val_data = val_data or own
    if val_share and val_data:
        raise ValueError(f"--val-share: leave it out, there is {val_data} to measure on")
    options = {"size": size, "cache": cache, "caption_key": caption_key, "videos": videos}
    train = open_source(data, "train", labels, **options)
    if val_share:
        train, val = hold_out(train, None, math.inf, val_share)
        if not val.sizes.any():
            raise ValueError(f"--val-share {val_share} of {train.identity} is not one: give more")
        return train, val
    if not val_data:
        return train, None
    val = open_source(val_data, "val", val_labels, train.classes, **options)
    if train.classes and val.classes not in (None, train.classes):
        unknown = ", ".join([name for name in val.classes if name not in train.classes][:5])
        why = f"{val_data} has other classes than train ({unknown or 'in another order'})"
        if labelled:
            raise ValueError(f"{why}: give other --val-data; of shards, pack val after train")
        warn(f"{why}: its labels are not used")
        val.classes = None
    return train, val


def open_source(data, split, labels, classes=None, *, size, cache, caption_key, videos):
    """The source behind one --data string: see open_sources. split: "train" or "val", of the toy
    world. classes: those of train, by which a folder of val numbers its own."""
    if os.path.isdir(data):
        if videos:
            from tasks.video import VideoFolder

            return VideoFolder(data, classes, labels)
        return Folder(data, classes, labels, caption_key)
    if labels:
        raise ValueError("--labels and --val-labels want a folder that their paths lie in")
    if data == "toy":
        if videos:
            from tasks.video import ToyMotion as World
        else:
            from support.toy import Toy as World

        return World(split, size)
    shards = re.search(r"[*?\[{:]|\.tar$", data, re.IGNORECASE)
    if not shards or os.path.isfile(data) and not data.lower().endswith(".tar"):
        raise ValueError(
            f"{data} does not exist, or is not a folder or a .tar: give toy, a folder of "
            "pictures or tar shards"
        )
    from support.shards import open_shards

    return open_shards(data, cache, caption_key, videos)


def splits_in(root):
    """The folders of splits in a folder, {} if it has none: see find_splits."""
    if not os.path.isdir(root) or SPLITS.keys().isdisjoint(map(str.lower, os.listdir(root))):
        return {}
    from support.labels import find_splits

    return find_splits(root)


class Folder(Source):
    """Pictures below a folder. If they are in subfolders, the first level names the classes.

    At most a tenth of the pictures may lie beside two or more folders. They are strays: they
    have no class, and labelled tasks leave them out. If there are more, no picture has a class.

    labels   a file that lists pictures, classes, hashtags and captions instead: see
             support/labels.py
    classes  those of train, which a folder of val numbers its own by. If it has others, its
             classes are its own

    Pictures are in the order of a hash of their paths: the same on every machine, and
    unrelated to their classes. So any stretch is a fair sample: a held-out slice, a lane.
    """

    what = "pictures"

    def __init__(self, root, classes=None, labels=None, caption_key="caption"):
        entries = self.entries(root, labels, caption_key)
        self.root = root
        self.paths = sorted(entries, key=lambda path: (stable_hash(path), path))
        self.sizes = np.ones(len(self.paths), dtype=np.int64)
        names = [entries[path].get("class") for path in self.paths]
        self.classes = self.choose_classes(names, classes, labels)
        numbers = {name: number for number, name in enumerate(self.classes or [])}
        self.labels = np.array([numbers.get(name, -1) for name in names])
        self.tags = [entries[path].get("hashtags", []) for path in self.paths]
        self.captions = [entries[path].get("captions", []) for path in self.paths]
        facts = [self.paths, self.tags, names]
        if any(self.captions):  # else the identity is that of older checkpoints
            facts.append(self.captions)
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        self.identity = f"{len(self.paths)} {self.what}, {digest}"

    def entries(self, root, labels, caption_key):
        """{path: {"class", "hashtags", "captions"}}, as far as they are known."""
        if not labels:
            return pictures_below(root)
        from support.labels import read_labels

        return read_labels(labels, caption_key)

    def choose_classes(self, names, classes, labels):
        """The classes in order, or None. names: a class or None for each sample."""
        found, unnamed = set(names) - {None}, names.count(None)
        if not found:
            return None
        if not labels and (10 * unnamed > len(names) or not classes and len(found) == 1):
            why = f"want two or more folders, at most a tenth of the {self.what} beside them"
            print(f"{self.root}: no classes ({why})")
            return None
        if unnamed and labels:
            print(f"{labels}: {self.what} without a class: {unnamed}", file=sys.stderr)
        elif unnamed:
            self.strays, first = unnamed, self.paths[names.index(None)]
            why = "beside the folders of classes, left out where labels are learned"
            warn(f"{self.root}: {self.what} {why}: {unnamed} ({first})")
        return classes if classes and found <= set(classes) else sort_classes(found)

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
    """Names of classes in order: by value if all are numbers (2 before 10), else as texts."""
    names = sorted(names)
    return sorted(names, key=int) if all(map(str.isdecimal, names)) else names


def pictures_below(root):
    """{path of a picture, relative to root: see class_of}."""
    files = [folder + name for folder, names in walk(root) for name in names]
    pictures = [path for path in files if is_picture(path, PICTURES + PHOTOS + RAW)]
    warn_of_splits(root, dict.fromkeys(path[: path.rfind("/") + 1] for path in pictures))
    if not pictures:
        shards = any(path.lower().endswith(".tar") for path in files)
        hint = f": of its shards, give {os.path.join(root, '*.tar')}" if shards else ""
        raise ValueError(f"no pictures in {root} (looked for {' '.join(PICTURES + PHOTOS)}){hint}")
    if any(is_picture(path, PHOTOS + RAW) for path in pictures):
        from support.photos import readable

        pictures = readable(root, pictures)
    return {path: class_of(path) for path in pictures}


def warn_of_splits(root, folders):
    """Print a warning if folders look like splits that are not in SPLITS."""
    split, found = re.compile("(?<![a-z])(train|test|val)(ing|id|idation)?(?![a-z])"), {}
    for folder in folders:
        for match in split.finditer(folder.lower()):
            found.setdefault(match[1], folder)
    if len(found) > 1:
        why = "look like splits, but all are read: give them as --data and --val-data"
        warn(f"{root}: folders in it ({' '.join(sorted(found.values()))}) {why}")


def warn(line):
    """Print a line on standard error, in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def class_of(path):
    """{"class": the first folder of a path}, or {} if it lies in no folder."""
    return {"class": path.split("/")[0]} if "/" in path else {}


def walk(root):
    """Yield (folder, names of its files) for root, as "", and folders below, as "a/b/"."""

    def fail(error):
        raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}")

    seen = {os.path.realpath(root)}
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        places = {name: os.path.realpath(os.path.join(folder, name)) for name in folders}
        folders[:] = [n for n in folders if not n.startswith(HIDDEN) and places[n] not in seen]
        seen.update(map(places.get, folders))  # links may lead in circles
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        yield "" if below == "." else f"{below}/", files


def is_picture(path, kinds=PICTURES + PHOTOS):
    """True if the name of a file has an extension of these kinds, and is not hidden."""
    return path.lower().endswith(kinds) and path.rpartition("/")[2][0] != "."


def stable_hash(text):
    """8 bytes that depend on the text alone: Python's hash() differs between processes."""
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()


class Subset(Source):
    """The samples of a source with these numbers (a range or a list), in this order."""

    def __init__(self, source, numbers):
        self.source, self.numbers, self.classes = source, numbers, source.classes
        self.cache, self.strays = source.cache, source.strays
        self.sizes = np.ones(len(numbers), dtype=np.int64)
        if isinstance(numbers, range):  # keep the shards, some of them empty, and lanes
            self.sizes = np.diff(running_sum(source.sizes).clip(numbers.start, numbers.stop))
        digest = stable_hash(str(numbers)).hex()
        self.identity = f"{source.identity}, {len(numbers)} of them: {digest}"

    def read(self, number):
        return self.source.read(self.numbers[number])

    def name(self, number):
        return self.source.name(self.numbers[number])

    def where(self, number):
        return self.source.where(self.numbers[number])


HELD_OUT = 512  # at most so many pictures to measure on, and at most 5 % of train


def hold_out(train, val, count, share=0.05):
    """(source to train on, source of at most `count` samples to measure on).

    The latter has the first samples of val or, without val, the last of train: at most this
    share of it, rounded down. They are always the same for the same data.
    """
    if val:
        return train, Subset(val, range(min(count, int(val.sizes.sum()))))
    total = int(train.sizes.sum())
    count = min(count, int(total * share))
    return Subset(train, range(total - count)), Subset(train, range(total - count, total))


# ------------------------------------------------------------------------------ pictures to tensors


def random_box(width, height, bits, min_crop, aspect):
    """RandomResizedCrop's box (left, top, width, height) from the first 22 draws of bits.

    Ten tries at an area of min_crop .. 1 of the picture and a ratio of 3/4 .. 4/3, times the
    target's aspect (so that all targets see the same distortion). Then the centre.
    """
    if min_crop >= 1:
        return centre_box(width, height, aspect)
    draws = uniform(bits)
    for area, ratio in draws[:20].reshape(10, 2):
        area = width * height * (min_crop + (1 - min_crop) * area)
        ratio = aspect * math.exp((2 * ratio - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[20] * (width - w + 1)), int(draws[21] * (height - h + 1)), w, h
    return centre_box(width, height, aspect)


def centre_box(width, height, aspect, share=1.0, along=0.5):
    """(left, top, width, height): `share` of the largest box of width / height = aspect.

    along: its place on the longer side, from 0 to 1
    """
    x, y = (along, 0.5) if width > height * aspect else (0.5, along)
    w, h = min(width, height * aspect), min(height, width / aspect)
    w, h = round(share * w), round(share * h)
    return int(x * (width - w)), int(y * (height - h)), max(1, w), max(1, h)


def crop_and_resize(image, size, channels, bits=None, min_crop=0.2, centre=1.0, along=0.5):
    """A PIL image, not decoded yet -> (C, H, W) uint8 tensor (in channels-last memory).

    bits     23 uint64 draws for a random crop and flip; None: the centre
    centre   share of the largest box of the target's shape; 0: the whole picture, squashed
    along    see centre_box

    This is the fastest exact route measured: Pillow decodes, and torch resizes uint8 in
    channels-last memory, bicubic with antialiasing. normalize runs on the device.
    """
    (height, width), aspect = size, size[1] / size[0]
    # 5 to 8 swap the sides; of a TIFF, Pillow has done so.
    turned = orientation_of(image) in (5, 6, 7, 8) and image.format != "TIFF"
    original = image.size[::-1] if turned else image.size
    if bits is not None:
        left, top, w, h = random_box(*original, bits, min_crop, aspect)
    elif centre:
        left, top, w, h = centre_box(*original, aspect, centre, along)
    else:
        left, top, w, h = 0, 0, *original
    # JPEG decodes at 1/2, 1/4 or 1/8 for less work. The crop stays at least twice as large
    # as the target: the antialiased resize still does all the filtering that shows.
    shrink = min(w // (2 * width), h // (2 * height), 8)
    if image.format == "JPEG" and shrink >= 2:
        image.draft(None, (image.width // shrink, image.height // shrink))
    image = to_8_bits(upright(image))  # before the crop: all pixels decide between 8 and 16 bits
    # 1, unless draft() has decoded a smaller picture:
    sx, sy = image.width / original[0], image.height / original[1]
    edges = left * sx, top * sy, (left + w) * sx, (top + h) * sy
    image = image.crop(tuple(map(round, edges)))
    with_alpha = channels == 4 and image.has_transparency_data
    image = to_mode(image, channels)
    if with_alpha and image.getchannel(3).getextrema()[0] < 255:
        # Pillow weighs colours by their alpha.
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.array(image).reshape(1, image.height, image.width, channels)
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (1, C, h, w)
    if image.size != (width, height):
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    flip = bits is not None and bits[22] & np.uint64(1)
    return pixels[0].flip(2) if flip else pixels[0]


def open_picture(file):
    """A PIL image, not decoded yet, of a path or an open file."""
    try:
        image = Image.open(file)
    except UnidentifiedImageError:
        if not can_read_heif():
            raise
        image = Image.open(file)
    # Pillow (13) maps plain pixels of a file with a name into memory, with sides already
    # swapped: a TIFF that must be turned would come out torn.
    image.filename = ""
    return image


def can_read_heif():
    """True if pillow-heif is installed. Pillow then opens HEIC pictures in this process."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def pixel_limit(text):
    """An argparse type: a number for limit_pixels."""
    if not text.isdecimal() or int(text) < 1 << 16:  # Pillow draws no text with less
        want = "at least 65536, the number of pixels of 256 x 256"
        raise argparse.ArgumentTypeError(f"{text} is not {want}")
    return int(text)


def limit_pixels(most):
    """Make pictures of more than `most` pixels unreadable, in this process."""
    Image.MAX_IMAGE_PIXELS = most


def orientation_of(image):
    """EXIF's orientation of a PIL image, 1 (upright) to 8."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # noqa: BLE001 (damaged EXIF raises anything)
        return 1


def upright(image):
    """A PIL image, decoded, and turned as its EXIF says."""
    image.load()  # this turns a TIFF, and may find a transparent colour
    # exif_transpose copies an upright picture, too.
    return image if orientation_of(image) == 1 else ImageOps.exif_transpose(image)


MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels


def to_mode(image, channels):
    """A picture, whole or a crop of what to_8_bits returned, as grey, RGB or RGBA: see MODES."""
    image = to_8_bits(image)
    if image.mode == "LAB":  # from which Pillow does not convert to grey
        image = image.convert("RGB")
    if channels != 4 and image.has_transparency_data:
        # On white: under transparent pixels there may be any colour.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = MODES[channels]
    return image if image.mode == mode else image.convert(mode)


def check_channels(channels):
    """Raise ValueError if pictures cannot be read with so many channels."""
    if channels not in MODES:
        raise ValueError(f"pictures can be read as 1, 3 or 4 channels, not as {channels}")


def to_8_bits(image):
    """Grey of 16 or 32 bits -> of 8, with alpha if a value is transparent; others as they are.

    (convert() would clip, not scale.) All pixels of a picture decide whether 32 bits hold
    values of 8 or of 16 bits. Raises ValueError for values of another range.
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
    """uint8 (B, C, [T,] H, W) -> float32, by ImageNet's mean and deviation (MAE code)."""
    _, channels, *_, width = images.shape
    # Images of Batches are in channels-last memory: rows are a view. Factors of a whole row
    # make the CPU's loops long, three times as fast.
    rows = images.movedim(1, -1).flatten(-2)  # (B, [T,] H, W*C)
    factor, offset = row_factors(channels, width, images.device)
    rows = rows.to(torch.float32).mul_(factor).sub_(offset)
    return rows.unflatten(-1, (width, channels)).movedim(-1, 1)


@cache  # no step copies them to the device, and a CUDA graph reads them
def row_factors(channels, width, device):
    """(1 / (255 * deviation), mean / deviation) of a row of pixels, (W*C,) float32 each."""
    with torch.inference_mode(False):  # its tensors could not be used outside
        mean, deviation = torch.tensor(channel_statistics(channels)).to(device).repeat(1, width)
        return 1 / (255 * deviation), mean / deviation


def channel_statistics(channels):
    """[mean, deviation] of each channel, of values from 0 to 1. The first of three or more are
    RGB's; all others have RGB's average."""
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    known = 3 if channels >= 3 else 0
    return [v[:known] + [sum(v) / 3] * (channels - known) for v in (mean, deviation)]


# ------------------------------------------------------------------------------------------ batches


@dataclass(eq=False)
class Batches(torch.utils.data.Dataset):
    """number -> the number-th micro-batch of this process, a dict of stacked rows.

    make(sample, key) gives the row of a sample, a dict of tensors and numbers. sample is
    what the source reads. It is None where a sample cannot be read, and past the last one:
    then make gives zeros of the same shapes. key = (seed, epoch, position) of the draws.

    A batch of b = batch_size / processes / micro_batches samples also has:
    weight     (b,) float32: the row's, else 1; 0 if make was given None
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
        """The number of micro-batches that hold each sample once, padding included."""
        return math.ceil(self.total / self.batch_size) * self.micro_batches

    def positions(self, number):
        """(b,) int64, the positions of a micro-batch in the global stream."""
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
        """The row of a position. Name and error of a sample that fails are added to `bad`."""
        epoch = position // self.order.length if self.order else 0
        number = self.order(position) if self.order else position
        key, row = (self.seed, epoch, position), None
        if number >= self.total:
            number = -1
        else:
            try:
                row = {"weight": 1.0} | self.make(self.source.read(number), key)
            except Exception as error:  # noqa: BLE001 (decoders raise anything)
                raise_if_unreachable(error)
                bad.append(f"{self.source.name(number)}: {one_line(error)}")
        row = row or self.make(None, key) | {"weight": 0.0}
        return row | {"samples": number}

    def over_max_bad(self, unreadable, bad, unlabelled, drawn, share):
        """True if more than this share (--max-bad) of the files seen so far cannot be read, or of
        the samples lack a label, or all are of no use.

        unreadable  number of different files that could not be read
        bad         samples that could not be read; unlabelled: readable ones without a label
        drawn       all samples so far

        Of fewer than 1,000 files or samples, the share is that of 1,000. One useless file never
        stops a run.
        """
        files = min(drawn, self.total)
        of_one_file = (drawn // self.order.length + 1) * self.order.most  # comes in each epoch
        return (
            unreadable > max(share * max(1000, files), 1)
            or unlabelled > max(share * max(1000, drawn), of_one_file)
            or bad + unlabelled == drawn > 1
        )

    def places(self, positions):
        """The shards or pictures that hold the samples at `positions`, each once."""
        numbers = map(self.order, positions.tolist()) if self.order else positions.tolist()
        return list(dict.fromkeys(self.source.where(n) for n in numbers if n < self.total))


def stack(rows):
    """One entry of b rows -> a tensor (b, ...) of tensors or numbers, else a list. Tensors (n,)
    of different lengths are padded with -1."""
    if isinstance(rows[0], int | float):
        return torch.tensor(rows)
    if not isinstance(rows[0], torch.Tensor):
        return rows
    if rows[0].ndim == 1:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    if rows[0].ndim > 2:
        # Pictures stay in channels-last memory, in which patchify reads them.
        return torch.stack([row.movedim(0, -1) for row in rows]).movedim(-1, 1)
    return torch.stack(rows)


def make_picture(sample, key, size, channels, min_crop=None, centre=1.0, flip=True):
    """(C, H, W) uint8 of a sample: a random crop and, with flip, a random flip; without min_crop,
    the centre. See Batches for sample and key, and crop_and_resize."""
    if sample is None:
        return torch.zeros(*size, channels, dtype=torch.uint8).movedim(-1, 0)
    bits = None if min_crop is None else random_bits(23, *key, VIEW)
    if bits is not None and not flip:
        bits[22] = 0  # the crop stays
    return crop_and_resize(sample["image"](), size, channels, bits, min_crop, centre)


class Unreachable(OSError):
    """A shard or a batch cannot be read now. The run ends: it would lose samples."""

    def __init__(self, message):
        # A DataLoader adds the worker's traceback: keep the last line.
        super().__init__(message.rpartition("Unreachable: ")[2].strip())


def raise_if_unreachable(error):
    """Raise Unreachable if an error in reading a sample is not a fault of the sample."""
    if isinstance(error, Unreachable):
        raise error
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise Unreachable(f"{error}: raise the limit (ulimit -n 65536), or give fewer --workers")


def one_line(error):
    """An error as one line, without the path or address that Pillow adds."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    bomb = r"Image size \((\d+ pixels)\) exceeds limit.*"
    text = re.sub(bomb, rf"\1 are over --max-pixels {Image.MAX_IMAGE_PIXELS}", text)
    return re.sub("(cannot identify image file).*", r"\1", text)


if __name__ == "__main__":
    from support.pack import main

    main()
