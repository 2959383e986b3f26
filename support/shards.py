"""Tar shards on this machine, in the WebDataset layout.

A shard is a tar in which the files of a sample are neighbours and share a key, the path up to the
base name's first dot: 00012.jpg, 00012.cls, 00012.json. Its index says where each sample begins and
ends, and what is wrong with it; pack.json beside the shards names the classes, if pack made them.
"""

import glob
import hashlib
import io
import itertools
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

from data import Source, is_picture, open_picture, running_sum, stable_hash

# ------------------------------------------------------------------------------------------- shards


def open_shards(data, classes, cache, caption_key, videos):
    """Shards or RemoteShards. classes: the names that they may have, and no others; None: any."""
    if re.match(r"pipe:|\w+://", data):
        from support.remote import RemoteShards

        shards = RemoteShards(data, *cache, videos)
    else:
        shards = Shards(data, videos)
    shards.caption_key = caption_key
    if (classes and shards.classes or classes) != classes:
        raise ValueError(f"{data} has other classes than train: pack it after train, beside it")
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

        def video(short_side=None):
            from tasks.video import video_of_pictures

            return video_of_pictures(frames)

        def hashtags():
            from support.hashtags import hashtags_in

            return hashtags_in(members)

        def captions():
            from tasks.lit import captions_in

            return captions_in(members, self.caption_key)

        return {
            "image": lambda: open_picture(io.BytesIO(members[(plain or numbered or kinds)[0]])),
            "video": video,
            "class": int(label) if label.isdigit() else -1,
            "hashtags": hashtags,
            "captions": captions,
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


def by_number(name):
    """A key to sort by: 2.jpg comes before 10.jpg."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


# ------------------------------------------------------------------------------------------ batches


def pack_record(folder):
    """What pack says of its shards in folder/pack.json: class names, and options by pattern."""
    path = Path(folder, "pack.json")
    try:
        record = json.loads(path.read_text()) if path.exists() else {"classes": None, "packed": {}}
        return {"classes": record["classes"], "packed": dict(record["packed"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): remove it, and pack again") from None


def replace_file(path, content):
    """Write a file whole or not at all, whoever else may be writing it."""
    new = f"{path}.{os.urandom(8).hex()}.tmp"
    try:
        Path(new).write_bytes(content)
        os.replace(new, path)
    finally:
        with suppress(OSError):  # it is there only where that has failed
            os.remove(new)
