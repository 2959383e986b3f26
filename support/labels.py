"""What people write down of pictures: folders of splits, lists of labels, names of classes."""

import csv
import itertools
import json
import os
import shlex
import sys
from collections import Counter
from pathlib import Path

from data import SPLITS, is_media, is_picture, one_line, walk

# ------------------------------------------------------------------------------------------- splits


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


# --------------------------------------------------------------------------------- names of classes


def say_same_names(where, names):
    """names, a list for each class. Prints those that several classes have: these classes cannot be
    told apart."""
    counts = Counter(", ".join(sorted(set(some))) for some in names)
    if again := [text for text, count in counts.items() if count > 1]:
        print(f"{where}: classes that share their names ({len(again)}): {'; '.join(again[:5])}")
    return names


# Folders of Google's list of 21,843 classes that the 21,841 of ImageNet's fall 2011 release lack.
NOT_IN_FALL_2011 = "n03931044", "n09859684"


def names_of_list(count, classes):
    """Names for `count` classes that came without names, of a head or of a list, so that the data's
    classes can be found among them; None if that cannot be known.

    classes  the data's names, or None where it only numbers its classes

    1. If all of the data's names are numbers below `count`, they are places among the classes,
       from 0.
    2. If they are names of ImageNet's folders (wnids), and it has a list of as many in support/,
       the classes are that list. The data may have some of them only.
    3. If the data has as many classes, they are the same, in the same order.
    """
    numbers = all(map(str.isdecimal, classes or ()))
    places = {int(name): name for name in classes or ()} if numbers else {}
    if numbers and max(places, default=-1) < count:
        if len(places) not in (0, count):
            print(f"{count} classes without names: the data's class N is number N of them, from 0")
        return [places.get(number, str(number)) for number in range(count)]
    size = 21843 if count == 21841 else count  # the latter's classes but two
    path, wnids = Path(__file__).with_name(f"imagenet_{size}.txt.xz"), []
    if path.exists():
        try:
            import lzma  # not in every build of Python
        except ImportError as error:
            why = f"{path} cannot be read ({error})"
            raise ValueError(f"{why}: use a Python that was built with lzma") from None
        wnids = lzma.decompress(path.read_bytes()).decode().split()
        wnids = [wnid for wnid in wnids if count == size or wnid not in NOT_IN_FALL_2011]
    known = set(wnids).intersection(classes)
    if known and (len(known) == len(classes) or len(classes) != count):
        print(f"{count} classes without names: taken for ImageNet's, in the order of their wnids")
        return wnids
    if len(classes) == count:
        print(f"{count} classes without names: taken for the data's, in its order")
        return classes
    return None
