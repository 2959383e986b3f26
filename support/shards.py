"""Tar shards on this machine, in the WebDataset layout.

In a shard, the files of a sample are neighbours and share a key, the path up to the base
name's first dot: 00012.jpg, 00012.cls, 00012.json. An index beside it says where samples
begin and end. pack.json names the classes of shards that pack has written.
"""

import glob
import hashlib
import io
import json
import os
import re
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import PHOTOS, Source, is_picture, open_picture, running_sum, stable_hash
from support.hashtags import hashtags_in
from support.launch import progress


def open_shards(data, cache, caption_key, videos):
    """Shards or RemoteShards: see open_sources."""
    if re.match(r"pipe:|\w+://", data):
        from support.remote import RemoteShards

        shards = RemoteShards(data, *cache, videos)
    else:
        shards = Shards(data, videos)
    shards.caption_key = caption_key
    return shards


class Shards(Source):
    """Tar shards in the WebDataset layout, read in place: one pread for a sample."""

    caption_key = "caption"  # in .json

    def __init__(self, pattern, videos=False):
        self.paths = expand(pattern)
        if not self.paths:
            raise ValueError(f"no shard matches {pattern}")
        folders = sorted({os.path.dirname(path) for path in self.paths})
        classes = [pack_record(folder)["classes"] for folder in folders]
        with ThreadPoolExecutor() as threads:
            indexes = threads.map(partial(shard_index, whole=False), self.paths)
            opened = progress(indexes, len(self.paths), "opening", " shards")
            heads = [head for head, _ in opened]
        names, sizes = map(os.path.basename, self.paths), map(os.path.getsize, self.paths)
        facts = [(name, size, head[0]) for name, size, head in zip(names, sizes, heads)]
        faults = {path: head[1:] for path, head in zip(self.paths, heads) if any(head[1:])}
        self.describe(pattern, classes, facts, faults, videos)

    def describe(self, pattern, classes, facts, faults, videos):
        """Set what a Source has. classes: of each folder. facts: (base name, bytes, samples) of
        each shard, which identify the data. faults: {path: see scan_tar}."""
        self.classes, *others = classes or [None]
        if any(names != self.classes for names in others):
            raise ValueError(f"{pattern}: the folders number their classes differently")
        self.facts, self.faults = facts, faults
        self.sizes = np.array([samples for *_, samples in facts], dtype=np.int64)
        if os.environ.get("RANK", "0") == "0":
            warn_of_faults(pattern, faults, videos)
        if not self.sizes.any():
            raise ValueError(f"{pattern}: the shards hold no pictures")
        self.edges = running_sum(self.sizes)
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        self.identity = f"{self.sizes.sum()} pictures in {len(facts)} shards, {digest}"

    @lru_cache(64)  # noqa: B019 (each loader process keeps its last 64)
    def open(self, shard):
        """(file, rows) of a shard: see scan_tar."""
        return io.FileIO(self.paths[shard]), shard_index(self.paths[shard])[1]

    def locate(self, number):
        """(shard, number of the sample in it)."""
        shard = int(np.searchsorted(self.edges, number, "right")) - 1
        return shard, number - self.edges[shard]

    def block(self, number):
        """The bytes of a sample's stretch of its shard."""
        shard, row = self.locate(number)
        file, rows = self.open(shard)
        begin, end = rows[row].tolist()
        if hasattr(os, "pread"):  # forked workers share a file's position
            return os.pread(file.fileno(), end - begin, begin)
        file.seek(begin)  # on Windows, which does not fork
        return file.read(end - begin)

    def read(self, number):
        content, members = self.block(number), {}
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for _, kind, m in sample_files(tar):  # of X.jpg and X.JPG, the first
                members.setdefault(kind, content[m.offset_data : m.offset_data + m.size])
        kinds = [kind for kind in members if is_picture(f"x.{kind}")]
        kinds.sort(key=lambda kind: f".{kind}".endswith(PHOTOS))  # of X.avif and X.jpg, the latter
        plain, numbered = plain_and_numbered(kinds)
        picture = (plain or numbered or kinds)[0]
        frames = sorted(numbered or plain[:1] or kinds, key=by_number)
        label = members.get("cls", b"").strip()

        def video(short_side=None):
            from tasks.video import video_of_pictures

            return video_of_pictures([io.BytesIO(members[kind]) for kind in frames])

        def captions():
            from tasks.lit import captions_in

            return captions_in(members, self.caption_key)

        return {
            "image": lambda: open_picture(io.BytesIO(members[picture])),
            "video": video,
            "class": int(label) if label.isdigit() else -1,
            "hashtags": partial(hashtags_in, members),
            "captions": captions,
        }

    def name(self, number):
        try:
            with tarfile.open(fileobj=io.BytesIO(self.block(number)), mode="r:") as tar:
                return f"{self.where(number)}:{next(sample_files(tar))[0]}"
        except Exception:  # noqa: BLE001 (a shard that has changed fails in many ways)
            return f"{self.where(number)}: sample {number}"

    def where(self, number):
        return self.paths[self.locate(number)[0]]


def plain_and_numbered(kinds):
    """Of the extensions of a sample's pictures, those of KEY.jpg and of KEY.000.jpg (frames).
    Others, such as KEY.depth.png, are read only where there is none of these."""
    stems = [(kind, kind.rpartition(".")[0]) for kind in kinds]
    plain = [kind for kind, stem in stems if not stem]
    return plain, [kind for kind, stem in stems if stem.isdigit()]


def expand(pattern):
    """Shard paths from a path, a glob, or {00000..00099} and {a,b} braces. A file or leading
    folders that exist as they are written are no pattern."""
    if os.path.isfile(pattern):
        return [pattern]
    folder, rest = os.path.split(pattern)
    while folder and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
        rest = os.path.join(name, rest)
    if (texts := braces(rest)) != [rest]:
        return [path for text in texts for path in expand(os.path.join(folder, text))]
    if re.search(r"[*?\[]", rest):
        found = glob.glob(os.path.join(glob.escape(folder), rest))
        return sorted(path for path in found if path.lower().endswith(".tar"))
    raise ValueError(f"there is no shard {pattern}")


def braces(pattern):
    """The texts behind a pattern with {00000..00099} and {a,b} in it, in order."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not match:
        return [pattern]
    low, high, items = match.groups()
    if low:
        items = [str(i).zfill(len(low)) for i in range(int(low), int(high) + 1)]
    else:
        items = items.split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [text for item in items for text in braces(head + item + tail)]


def shard_index(path, whole=True):
    """(head, rows) of a shard: see scan_tar. Without `whole`, rows are None.

    The index is kept beside the shard as SHARD.tar.index or, where that cannot be written,
    among the temporary files. It is made again if it is damaged, or the shard has changed.
    """
    stamp = [os.path.getsize(path), os.stat(path).st_mtime_ns]
    elsewhere = stable_hash(os.path.abspath(path)).hex()
    places = f"{path}.index", f"{tempfile.gettempdir()}/{elsewhere}.tar.index"
    for place in places:
        with suppress(OSError), open(place, "rb") as file:
            if index := read_index(file, stamp, whole):
                return index
    head, rows = scan_tar(path)
    for place in places:
        try:
            replace_file(place, index_bytes(stamp, head, rows))
            return head, rows
        except OSError as error:
            why = f"cannot write the index of a shard: {error}"
    tqdm.write(why, file=sys.stderr)
    return head, rows


def index_bytes(stamp, head, rows):
    """An index of 64-bit words: stamp (2), head (4), checksum of the rows, checksum of these
    seven, rows."""
    content = rows.tobytes()
    start = np.array([*stamp, *head], dtype="<i8").tobytes() + checksum(content)
    return start + checksum(start) + content


def read_index(file, stamp, whole):
    """(head, rows) of an open index; None if it is damaged or of another stamp."""
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
    """(head, rows) of a shard.

    rows  (samples, 2) int64: the bytes where each sample with a picture begins and ends
    head  the number of these samples; the byte at which the tar is damaged, or 0; and how
          many samples have no picture, and how many have several

    A tar that is cut or damaged gives the samples before. A last file that is cut off
    counts: reading it will fail. Raises ValueError if it is no tar.
    """
    samples = []  # [key, begin, end, extensions of its pictures]
    with open(path, "rb") as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (owns nothing)
        except tarfile.ReadError as error:
            again = "leave it out, or write it again"
            raise ValueError(f"{path} is no tar ({error}): {again}") from None
        try:
            for key, extension, member in sample_files(tar):
                if not samples or samples[-1][0] != key:
                    samples.append([key, member.offset, 0, []])
                samples[-1][2] = tar.offset  # where the next file begins
                if is_picture(f"x.{extension}"):
                    samples[-1][3].append(extension)
            file.seek(tar.offset)
            end = file.read(512)  # of a whole tar, zeros
            damaged = any(end) or not end
        except tarfile.ReadError:
            damaged = True
    kept = [sample for sample in samples if sample[3]]
    several = 0
    for *_, kinds in kept:
        plain, numbered = plain_and_numbered(kinds)
        several += len(plain + numbered or kinds) > 1
    head = [len(kept), tar.offset * damaged, len(samples) - len(kept), several]
    return head, np.array([sample[1:3] for sample in kept], dtype="<i8").reshape(-1, 2)


def warn_of_faults(pattern, faults, videos):
    """Print the faults of shards, {path: see scan_tar}. To videos, several pictures are none."""
    texts = (
        "{count} shards are cut or damaged, the samples before are used: {path} at byte {first}",
        "{count} samples without a picture are left out, the first in {path}",
        "{count} samples have several pictures: NAME.000.jpg, NAME.001.jpg ... are the frames "
        + "of a video; as one picture, NAME.jpg is read, else the first (see {path})",
    )
    for kind, text in enumerate(texts[:2] if videos else texts):
        found = {path: fault[kind] for path, fault in faults.items() if fault[kind]}
        if found:
            path, first = next(iter(found.items()))
            count = sum(found.values()) if kind else len(found)
            text = text.format(count=count, path=path, first=first)
            print(f"{pattern}: {text}", file=sys.stderr)


def sample_files(tar):
    """Yield (key, extension in lower case, member) of the files of samples in a tar."""
    while member := tar.next():
        tar.members.clear()  # it would keep them all
        folder, slash, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        # No hidden files, none without a type. (A link has no bytes: reading it fails.)
        if not member.isdir() and stem and extension:
            yield folder + slash + stem, extension.lower(), member


def by_number(name):
    """A key to sort by: 2.jpg comes before 10.jpg."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def pack_record(folder):
    """What pack has written in folder/pack.json: class names, and options by pattern."""
    path = Path(folder, "pack.json")
    if not path.exists():
        return {"classes": None, "packed": {}}
    try:
        record = json.loads(path.read_text())
        classes, packed = record["classes"], dict(record["packed"])
        options = list(packed.values())
        if not isinstance(classes, list | None) or not all(isinstance(o, dict) for o in options):
            raise TypeError("want a list of classes, and options by pattern")
        return {"classes": classes, "packed": packed}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): remove it, and pack again") from None


def replace_file(path, content):
    """Write a file whole or not at all, also if other processes write it."""
    new = f"{path}.{os.urandom(8).hex()}.tmp"
    try:
        Path(new).write_bytes(content)
        os.replace(new, path)
    finally:
        with suppress(OSError):  # it exists only if that has failed
            os.remove(new)
