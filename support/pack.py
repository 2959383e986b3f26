"""Pictures of a folder -> tar shards, and the lists of them that remote readers need.

python data.py pack FOLDER OUT-%05d.tar [--short-side 256]     pictures -> shards
python data.py index 'SHARDS-*.tar'                            shards -> their index
python data.py hashtags DATA --out TAGS                        see support/hashtags.py
"""

import argparse
import glob
import io
import json
import math
import os
import re
import shlex
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data import (
    MAX_PIXELS,
    Folder,
    Shards,
    has_alpha,
    limit_pixels,
    loader_workers,
    one_line,
    open_picture,
    open_sources,
    pack_record,
    pixel_limit,
    replace_file,
    to_mode,
    upright,
)
from support.hashtags import read_synonyms, write_hashtags
from support.labels import find_splits


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
