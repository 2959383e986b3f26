"""Pictures of a folder -> tar shards, and the lists of shards that remote readers need.

python data.py pack FOLDER OUT-%05d.tar [--short-side 256]     pictures -> shards
python data.py index 'SHARDS-*.tar'                            shards -> their index
python data.py hashtags DATA --out TAGS                        see support/hashtags.py
"""

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
    limit_pixels,
    one_line,
    open_picture,
    open_sources,
    pixel_limit,
    splits_in,
    to_mode,
    upright,
)
from support.flags import Parser, count
from support.hashtags import read_synonyms, write_hashtags
from support.launch import progress
from support.loader import loader_workers
from support.shards import Shards, pack_record, replace_file


def pack(folder, pattern, short_side=None, shard_size=None, max_pixels=MAX_PIXELS):
    """Write the pictures of a folder into tar shards, and their classes if it has any.

    pattern     OUT-%05d.tar
    short_side  scale larger pictures down to this, and encode them again; None: copy bytes
    shard_size  pictures in a shard; None: 10,000, or fewer to have 48 shards

    An interrupted run goes on. pack.json, beside the shards, has the options and classes.
    Raises ValueError if shards of other pictures or options are there.
    """
    limit_pixels(max_pixels)
    out, name = os.path.split(pattern)
    parts = re.fullmatch(r"([^%{}]*)(%\d*d)([^%{}]*\.tar)", name)
    if not parts:
        want = "one number, and no braces, in the file's name, as in OUT-%05d.tar"
        raise ValueError(f"{pattern} must hold {want}")
    head, digits, tail = parts.groups()
    record = pack_record(out)
    source = open_folder(folder, record["classes"], out)
    total = len(source.paths)
    # At least 48 shards if there are enough pictures: the number of lanes (see Order).
    shard_size = shard_size or max(1, min(10_000, math.ceil(total / 48)))
    options = {"pictures": source.identity, "short_side": short_side, "shard_size": shard_size}
    if max_pixels != MAX_PIXELS:
        options["max_pixels"] = max_pixels
    first, last = (glob.escape(part) for part in (os.path.join(out, head), tail))
    if glob.glob(f"{first}[0-9]*{last}") and record["packed"].get(name) != options:
        raise ValueError(f"{pattern} is not of these pictures and options: move it away")
    os.makedirs(out or ".", exist_ok=True)
    record["packed"][name] = options
    record["classes"] = record["classes"] or source.classes
    replace_file(Path(out, "pack.json"), json.dumps(record).encode())
    starts = range(0, total, shard_size)
    with ThreadPoolExecutor() as threads:  # Pillow releases Python's lock
        for start in progress(starts, len(starts), "packing", " shards"):
            path = os.path.join(out, name % (start // shard_size))
            if not os.path.exists(path):
                numbers = range(start, min(start + shard_size, total))
                write_shard(f"{path}.tmp", source, numbers, short_side, threads)
                os.replace(f"{path}.tmp", path)
    braces = f"{{{digits % 0}..{digits % (len(starts) - 1)}}}"
    written = os.path.join(out, f"{head}{braces}{tail}")
    print(f"{total} pictures in {len(starts)} shards: --data {shlex.quote(written)}")
    write_listing(Shards(written))  # Shards writes their indexes


def open_folder(folder, classes, out):
    """The Folder to pack, with the classes of the shards that were packed into `out` before."""
    if splits := splits_in(folder):
        paths = ", ".join(splits["train"] + splits["val"] + splits["test"])
        raise ValueError(f"{folder} holds splits: pack {paths} one after the other")
    source = Folder(folder, classes)
    if classes and source.classes not in (None, classes):
        unknown = ", ".join([name for name in source.classes if name not in classes][:5])
        why = f"{folder} has classes that {out}/pack.json has not: {unknown}"
        raise ValueError(f"{why}; pack it into another folder")
    if source.strays:  # in shards they would be samples that lack a label
        known = source.labels >= 0
        source.paths = [path for path, one in zip(source.paths, known) if one]
        source.labels = source.labels[known]
        print(f"{folder}: pictures beside the folders of classes, not packed: {source.strays}")
    return source


def write_shard(path, source, numbers, short_side, threads):
    """Write the samples of a Folder with these numbers into one tar."""
    with tarfile.open(path, "w") as tar:
        for start in range(0, len(numbers), 256):  # pictures that are in memory at once
            part = numbers[start : start + 256]
            encoded = threads.map(lambda n: encode(source.name(n), short_side), part)
            for number, (kind, content) in zip(part, encoded):
                # The number makes the key unique: a.jpg and a.png may be neighbours.
                stem = re.sub(r"[/.]", "_", os.path.splitext(source.paths[number])[0])
                members = {kind: content}
                if source.labels[number] >= 0:
                    members["cls"] = str(source.labels[number]).encode()
                for extension, content in members.items():
                    # Time 0, owner 0: the same pictures give the same bytes.
                    member = tarfile.TarInfo(f"{number:08d}_{stem}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def encode(path, short_side):
    """(extension, bytes) of a picture for a shard. An unreadable one is named and kept."""
    kind, content = os.path.splitext(path)[1][1:].lower(), b""
    try:
        content = Path(path).read_bytes()
        with open_picture(io.BytesIO(content)) as image:
            if short_side and min(image.size) > short_side:
                return shrink(image, short_side)
    except Exception as error:  # noqa: BLE001 (training names and counts it)
        text = f"{path} cannot be read ({one_line(error)}), packed as it is"
        tqdm.write(text, file=sys.stderr)
    return kind, content


def shrink(image, short_side):
    """("jpg" or "png", bytes) of an open picture, scaled down to a short side."""
    # A JPEG is decoded at 1/2, 1/4 or 1/8, which needs less memory, at twice the size or more.
    scale = 2 * short_side / min(image.size)
    image.draft(None, tuple(math.ceil(scale * side) for side in image.size))
    image, buffer = upright(image), io.BytesIO()
    solid = image.mode in ("L", "RGB", "CMYK", "YCbCr") and not image.has_transparency_data
    scale = short_side / min(image.size)
    size = tuple(max(1, round(scale * side)) for side in image.size)
    image = to_mode(image, 3 if solid else 4).resize(size, Image.Resampling.BICUBIC)
    image.save(buffer, "JPEG" if solid else "PNG", quality=90)
    return "jpg" if solid else "png", buffer.getvalue()


def write_listing(shards):
    """Write index.json beside shards, which support/remote.py reads.

    {"classes": names or None, "shards": {base name: [bytes, samples]},
     "faults": {base name: see scan_tar}}

    Shards that it lists already are kept if they exist.
    """
    for folder in sorted({os.path.dirname(path) for path in shards.paths}):
        path, facts, faults = Path(folder, "index.json"), {}, {}
        try:
            if path.exists():
                listing = json.loads(path.read_text())
                facts, faults = dict(listing["shards"]), dict(listing.get("faults", {}))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is no list that data.py wrote: move it away") from None
        for place, (name, *fact) in zip(shards.paths, shards.facts):
            if os.path.dirname(place) == folder:
                facts[name], faults[name] = fact, shards.faults.get(place)
        names = [name for name in facts if Path(folder, name).exists()]
        content = {"classes": pack_record(folder)["classes"]}
        content["shards"] = {name: facts[name] for name in names}
        content["faults"] = {name: faults[name] for name in names if faults.get(name)}
        replace_file(path, json.dumps(content).encode())


def parse_arguments():
    parser = Parser("data.py", description="Prepare shards.")
    commands = parser.add_subparsers(dest="command", required=True)

    add = commands.add_parser("pack", help="pictures of a folder -> shards").add_argument
    add("folder")
    add("pattern", help="OUT-%%05d.tar")
    add("--short-side", type=count, help="scale larger pictures down to this")
    add("--shard-size", type=count, help="pictures in a shard")
    most = "most pixels of a picture that is read (89 million)"
    add("--max-pixels", type=pixel_limit, default=MAX_PIXELS, help=most)

    add = commands.add_parser("index", help="write the index of tar shards").add_argument
    add("shards", help="a path, a glob or {00000..00099} braces")

    add = commands.add_parser("hashtags", help="vocabulary and weights").add_argument
    add("data", help="as --data: shards with .json or .txt, or a folder")
    add("--out", required=True, help="the folder that --tags will name")
    add("--labels", help='JSON lines of {"path", "hashtags"} for a folder')
    add("--synonyms", help="two columns: a tag, and the tag that it counts as")
    add("--vocabulary", type=count, default=28_000, help="most tags (28,000)")
    add("--min-count", type=count, default=5, help="pictures of a tag (5)")
    add("--tail-below", type=count, help="pictures (5,000 or 1 %% of them)")
    add("--workers", type=int, help="processes (the cores left)")
    return parser.parse_args()


def main():
    run = parse_arguments()
    try:
        if run.command == "pack":
            pack(run.folder, run.pattern, run.short_side, run.shard_size, run.max_pixels)
        elif run.command == "index":
            shards = Shards(run.shards)
            write_listing(shards)
            print(shards.identity)
        else:
            source, _ = open_sources(run.data, labels=run.labels, labelled=False)
            write_hashtags(
                source,
                run.out,
                tail_below=run.tail_below,
                workers=loader_workers(run.workers),
                size=run.vocabulary,
                min_count=run.min_count,
                synonyms=read_synonyms(run.synonyms) if run.synonyms else {},
            )
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("data.py: stopped: type the same command again", file=sys.stderr)
        sys.exit(130)
