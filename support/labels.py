"""Folders of splits, files of labels, and names of classes."""

import csv
import gzip
import itertools
import json
import os
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import (
    HIDDEN,
    PHOTOS,
    PICTURES,
    SPLITS,
    Subset,
    is_picture,
    one_line,
    raise_if_unreachable,
    sort_classes,
    walk,
)
from support.launch import progress
from support.photos import readable

VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
VIDEOS += (".ts", ".3gp", ".ogv")

# ------------------------------------------------------------------------------------------- splits


def find_splits(root):
    """{"train", "val", "test", "other": paths of folders in `root`}; {} if it has no splits.

    "other" are the other folders with pictures or videos. A train/ alone is no split: all
    pictures are trained on. A train/ with pictures directly in it, beside others, is a class.
    """
    with os.scandir(root) as entries:  # isdir would look at each picture
        folders = sorted(entry.path for entry in entries if entry.is_dir())
    found = {"train": [], "val": [], "test": [], "other": []}
    for path in folders:
        name = os.path.basename(path)
        split = SPLITS.get(name.lower(), "other")
        if split != "other" or not name.startswith(HIDDEN) and holds_media(path):
            found[split].append(path)
    train, val, test, other = found.values()
    if len(train) == 1 and not val + test:
        is_class = any(map(is_media, os.listdir(train[0])))
        return found if other and not is_class else {}
    return found if train + val + test else {}


def is_media(name):
    """True if a file's name is that of a picture or a video."""
    return is_picture(name, PICTURES + PHOTOS + VIDEOS)


def holds_media(folder):
    """True if there are pictures or videos anywhere below a folder."""
    try:
        return any(is_media(name) for _, names in walk(folder) for name in names)
    except ValueError:  # a folder that cannot be read, such as lost+found
        return False


def choose_splits(root, found):
    """(folder to train on, folder to measure on or None) of what find_splits found.

    Prints what is left out. Raises ValueError with the flags to type if a split has two
    folders, if there is nothing to train on, or if other folders may be classes.
    """
    train, val, test, other = found.values()
    files = sorted(filter(is_media, os.listdir(root)))
    other = list(map(os.path.basename, other)) or ([] if train else files)
    if len(train) != 1 or len(val) > 1 or other:
        flags = ["--data", train[0]] if train else []
        if val or not train:
            flags += ["--val-data", (val or test)[0]]
        flags = shlex.join(flags) + ("" if train else " beside a --data to train on")
        names = ", ".join(map(os.path.basename, train + val + test))
        if other:
            names += f" beside {', '.join(other[:3])}"
            flags += ", or move the splits elsewhere (if they are classes: --labels)"
        raise ValueError(f"{root} holds the splits {names}: type {flags}")
    if os.environ.get("RANK", "0") == "0":
        for path in test:
            print(f"{path}: left out (to measure on it, give it as --val-data)")
        if files:
            print(f"{root}: {len(files)} files beside the folders of its splits are left out")
    return train[0], val[0] if val else None


# ------------------------------------------------------------------------------------------- labels


def read_labels(path, caption_key="caption"):
    """{picture's path: {"class": name, "hashtags": [...], "captions": [...]}} of a list.

    "class" and "hashtags" are there if they are given.

    .csv    lines of path,class; or of the columns of a head line that names "path", and
            "class" or the caption key. Spaces around a path or class do not count.
    .jsonl  lines of {"path", "class", "hashtags", caption key: a text or a list of texts}
    .json   iNaturalist's {"images": [{"id", "file_name"}],
            "categories": [{"id", "name"}], "annotations": [{"image_id", "category_id"}]}

    A picture's captions may be in several entries. An empty class is none. Entries that
    are damaged, name no picture or contradict an earlier one are counted and left out.
    Raises ValueError if the file is none of these or lists no pictures.
    """
    readers = {"csv": read_csv, "json": read_inaturalist}
    readers["jsonl"] = lambda file, _: (file, json.loads, None)
    kind = path.rpartition(".")[2].lower()
    if kind not in readers:
        raise ValueError(f"{path} is no file of labels: want .jsonl, .csv or .json")
    found, bad = {}, 0
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
            rows, entry_of, note = readers[kind](file, caption_key)
            for row in rows:
                try:
                    add_entry(found, entry_of(row), caption_key)
                except (ValueError, KeyError, TypeError):
                    bad += 1
    except (OSError, ValueError, KeyError, TypeError, RecursionError, csv.Error) as error:
        raise ValueError(f"cannot read labels from {path}: {one_line(error)}") from None
    if bad:
        why = "damaged, naming no picture, or against an earlier one"
        print(f"{path}: entries that are left out ({why}): {bad}", file=sys.stderr)
    if not found:
        want = {
            "csv": "path,class in each line, or a head line that names path, and class or "
            + caption_key,
            "jsonl": 'lines of {"path", "class", "hashtags", captions}',
            "json": "iNaturalist's images, categories and annotations",
        }
        raise ValueError(f"{path} lists no pictures: want {want[kind]}{first_line(path)}")
    if note:
        print(f"{path}: {note}", file=sys.stderr)
    return {name: found[name] for name in readable(path, found)}


def first_line(path):
    """The first line of a file for a message; nothing of a pipe, whose lines have been read."""
    if not os.path.isfile(path):
        return ""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return f"; the first line is {file.readline(80).strip()!r}"


def add_entry(found, entry, caption_key):
    """Add one entry, {"path", "class", ...}. Raises an error if it is damaged."""
    path, captions = entry["path"], texts_in(entry.get(caption_key))
    facts = {"hashtags": entry["hashtags"]} if "hashtags" in entry else {}
    label = "" if entry.get("class") is None else str(entry["class"]).strip()
    if label:
        facts["class"] = label
    not_utf8 = "\ufffd" in str(entry)
    if not_utf8 or not is_picture(os.path.basename(path)):
        raise ValueError(path)
    known = found.setdefault(os.path.normpath(path), {**facts, "captions": []})
    if known != {**facts, "captions": known["captions"]}:
        raise ValueError(path)
    known["captions"] += captions


# A reader of an open file returns its rows, a function that makes an entry of a row (or raises an
# error if it is damaged), and a note to print, or None.


def read_csv(file, caption_key):
    first = next(filter(None, csv.reader(file, strict=True, skipinitialspace=True)), [])
    first = [cell.strip() for cell in first]
    columns, rows, note = ["path", "class"], [], None
    if any(map(is_picture, first)):
        rows = [first]
    elif caption_key in first or {"path", "class"} <= set(first):
        columns = first
    else:
        why = "is taken as a header; its columns are read as path and class"
        note = f"{','.join(first)!r:.80} {why}"
    # Captions keep their spaces: the identity of the data depends on them.
    others = csv.reader(file, strict=True, skipinitialspace=caption_key not in columns)

    def entry_of(row):
        entry = dict(zip(columns, row, strict=True))
        return entry | {"path": entry["path"].strip()}

    return filter(None, itertools.chain(rows, others)), entry_of, note


def read_inaturalist(file, caption_key):
    content, note = json.load(file), None
    files = {image["id"]: image["file_name"] for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    counts = Counter(map(str, names.values()))
    if again := [name for name, count in counts.items() if count > 1]:
        why = f"categories of the same name, each of which is one class ({len(again)})"
        note = f"{why}: {', '.join(again[:5])}"

    def entry_of(row):
        return {"path": files[row["image_id"]], "class": names[row["category_id"]]}

    return content["annotations"], entry_of, note


def texts_in(content):
    """A text, a list of texts, or None -> a list. Raises ValueError if it is something else."""
    texts = [content] if isinstance(content, str) else [] if content is None else content
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"captions must be a text, or a list of texts: {content!r:.80}")
    return texts


# --------------------------------------------------------------------------------- names of classes


def say_same_names(where, names):
    """Print the names that several classes share. names, a list for each class, is returned."""
    counts = Counter(", ".join(sorted(set(some))) for some in names)
    if again := [text for text, count in counts.items() if count > 1]:
        print(f"{where}: classes that share their names ({len(again)}): {'; '.join(again[:5])}")
    return names


# Classes of Google's list of 21,843 that are not among the 21,841 of ImageNet's fall 2011 release.
NOT_IN_FALL_2011 = "n03931044", "n09859684"


def names_of_list(count, classes):
    """Names for `count` classes that have none, so that the data's classes can be found
    among them; None if they cannot be known.

    classes: the data's names, or None where it only numbers its classes

    1. If all of the data's names are numbers below `count`, they number the classes.
    2. If they are ImageNet's names of folders (wnids), and support/ has a list of `count`
       of these, the classes are that list. The data may have some of them only.
    3. If the data has `count` classes, they are the same, in the same order.
    """
    classes = classes or []
    if all(map(str.isdecimal, classes)) and max(map(int, classes), default=-1) < count:
        if len(classes) not in (0, count):
            print(f"{count} classes without names: the data's class N is number N of them, from 0")
        places = {int(name): name for name in classes}
        return [places.get(number, str(number)) for number in range(count)]
    size = 21843 if count == 21841 else count  # the latter's classes but two
    path, wnids = Path(__file__).with_name(f"imagenet_{size}.txt.gz"), []
    if path.exists():
        wnids = gzip.decompress(path.read_bytes()).decode().split()
        wnids = [wnid for wnid in wnids if count == size or wnid not in NOT_IN_FALL_2011]
    known = set(wnids).intersection(classes)
    if known and (len(known) == len(classes) or len(classes) != count):
        print(f"{count} classes without names: taken for ImageNet's, in the order of their wnids")
        return wnids
    if len(classes) == count:
        print(f"{count} classes without names: taken for the data's, in its order")
        return classes
    return None


def read_lines(path, what):
    """The lines of a text file of `what`. Raises ValueError if one is blank, or there are none."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {what} from {path}: {error}") from None
    lines = [line.strip() for line in text.splitlines()] or [""]
    if "" in lines:
        raise ValueError(f"{path}: line {lines.index('') + 1} is blank: want {what}, one a line")
    return lines


def read_class_names(path, classes):
    """The names of each class of the data: a list of lists.

    path     a file with a line for each class, in their order: names separated by commas.
             Or each line begins with the data's name of the class and a tab, in any order.
             None: the names are the data's
    classes  the data's names of its classes, or None if it only numbers them

    A list without tabs may have more lines than the data has classes: see names_of_list.
    """
    if not path:
        if not classes:
            raise ValueError("the data does not name its classes: give --classnames")
        names = [[name.replace("_", " ").replace("-", " ")] for name in classes]
        return say_same_names("the data", names)
    lines = read_lines(path, "class names")
    classes = classes or [str(number) for number in range(len(lines))]
    if any("\t" in line for line in lines):
        order, lines = zip(*(line.partition("\t")[::2] for line in lines))
        if len(set(order)) < len(order):
            raise ValueError(f"{path} names {max(order, key=order.count)} twice")
    elif len(lines) == len(classes):
        # Shards that were packed when numbers were sorted as texts have 10 before 2.
        order = sort_classes(classes) if all(map(str.isdecimal, classes)) else classes
    else:
        order = names_of_list(len(lines), classes)
        if not order:
            why = f"{path} has {len(lines)} lines, the data {len(classes)} classes"
            raise ValueError(f"{why}: begin each line with the class's name in the data, and a tab")
    names = {}
    for key, line in zip(order, lines):
        names[key] = [name.strip() for name in line.split(",") if name.strip()]
    if missing := [name for name in classes if not names.get(name)]:
        raise ValueError(f"{path} has no names for {', '.join(missing[:3])} ({len(missing)})")
    return say_same_names(path, [names[name] for name in classes])


# ---------------------------------------------------------------------------------- right answers


def right_answers(names, classes, source, labels, label_map=None):
    """For each sample the set of right classes of the model; empty if none is known.

    names      of the model's classes, or None; `classes` is their number
    labels     class numbers of the source, -1 if unknown
    label_map  file of {class of the data: class of the model, or a list of them}
    """
    of_data = dict(enumerate(source.classes or ()))  # label: name
    of_data |= {label: str(label) for label in sorted(set(labels) - {-1, *of_data})}
    meanings = {}  # name: numbers of the model's classes; several may have the same name
    for number, name in enumerate(names or ()):
        meanings.setdefault(name, set()).add(number)
    if label_map:
        meanings = read_label_map(label_map, meanings, classes, of_data.values())
    elif unknown := [name for name in of_data.values() if name not in meanings]:
        some = f"{', '.join(unknown[:3])} ({len(unknown)} of the data's classes)"
        raise ValueError(f"the model knows no {some}: give --label-map")
    return [meanings.get(of_data.get(label), set()) for label in labels]


def read_label_map(path, of_model, classes, of_data):
    """{class of the data: set of the model's class numbers} from a file: see right_answers.

    of_model: the same for the model's own names; of_data: names of the data's classes.
    """
    meanings = {}
    try:
        for name, some in json.loads(Path(path).read_text("utf-8")).items():
            some = some if isinstance(some, list) else [some]
            sets = (of_model[one] if isinstance(one, str) else {one} for one in some)
            meanings[name] = set().union(*sets)
        if not are_classes(meanings.values(), classes) or meanings.keys().isdisjoint(of_data):
            raise ValueError("classes that the model or the data has not")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        want = "{class of the data: class of the model, or a list}"
        raise ValueError(f"{path} is no label map ({error!r}): want {want}") from None
    return meanings


def real_answers(path, files, classes):
    """The set of right classes, perhaps empty, of each file of ImageNet's validation set.

    path: ImageNet-ReaL's real.json, which has a list for each of the 50,000.
    """
    try:
        real = json.loads(Path(path).read_text("utf-8"))
        names = [re.split("[/:]", file)[-1] for file in files]
        numbers = [int(re.findall(r"val_(\d{8})", name)[-1]) for name in names]  # from 1
        answers = [set(real[number - 1]) if number > 0 else set() for number in numbers]
        if not are_classes(answers, classes):
            raise ValueError(f"answers are numbers from 0 to {classes - 1}")
        return answers
    except (OSError, ValueError, IndexError, KeyError, TypeError) as error:
        why = f"{path} is not real.json of these pictures ({error!r})"
        raise ValueError(f"{why}: a list for each, ILSVRC2012_val_00000001 first") from None


def are_classes(sets, classes):
    """True if all members of some sets are integers from 0 to classes - 1."""
    return all(type(one) is int and 0 <= one < classes for some in sets for one in some)


def all_labels(source):
    """(n,) int64 class numbers of a source's samples, -1 where none is known or can be read."""
    # np.int64: a number that is too large is an error of its sample alone.
    labels = read_all(source, "label", lambda sample: np.int64(sample["class"]), -1)
    return np.fromiter(labels, np.int64, int(source.sizes.sum()))


def read_all(source, name, value_of, unknown):
    """Yield value_of(sample) of each sample; `unknown` if it cannot be read, which is printed."""
    total = int(source.sizes.sum())
    for number in progress(range(total), total, f"reading {name}s"):
        try:
            value = value_of(source.read(number))
        except Exception as error:  # noqa: BLE001 (tar members fail in many ways)
            raise_if_unreachable(error)
            tqdm.write(f"unreadable {name}: {source.name(number)}: {error}", file=sys.stderr)
            value = unknown
        yield value


# ----------------------------------------------------------------------- classes of a training run


def settle_classes(run):
    """Set run.classes, the number of classes to learn. Strays leave run.train. Raises
    ValueError."""
    named = len(run.train.classes or ())
    if named and run.classes not in (None, named):
        raise ValueError(f"--classes {run.classes}: {run.data} names {named}")
    run.classes = named or run.classes
    if not run.classes:
        hint = "give --classes, how many, or --labels"
        raise ValueError(f"{run.data} names no classes (two folders or more): {hint}")
    if run.classes < 2:
        raise ValueError(f"{run.data} has one class only: there is nothing to tell apart")
    if run.val is None:
        labelled = "--labels lists no val pictures"
        lacks = labelled if run.labels else f"{run.data} has no train/ and val/"
        raise ValueError(f"{lacks}: give --val-data, --val-labels or --val-share 0.1")
    if (run.train.classes is None) != (run.val.classes is None):
        names = "one of train and val names its classes, the other does not"
        raise ValueError(f"{names}: {run.train.identity}; {run.val.identity}")
    if run.train.strays:  # never drawn: each would count as a picture that lacks its label
        known = np.flatnonzero(all_labels(run.train) >= 0)
        run.train = Subset(run.train, known.tolist())
    # A head that was learned when numbers were sorted as texts must not go on with other labels.
    # (Other classes may be in any order: the toy world's are.)
    classes = run.train.classes or []
    if classes != sorted(classes) and all(map(str.isdecimal, classes)):
        run.identity["class_order"] = "by number"


def reorder_head(run):
    """(weights in --init, with a head for the data's classes in order; the head's pool).

    The weights are (state, grid), the pool is "cls" or "mean". Raises ValueError if the
    head is for other classes.
    """
    if not run.weights or "head.weight" not in run.weights[0]:
        raise ValueError("--keep-head: there is no head in --init")
    state, grid = run.weights
    count = len(state["head.weight"])
    wanted = run.train.classes or list(map(str, range(run.classes)))
    names = run.classes_of_head or names_of_list(count, wanted) or []
    if names != wanted:  # the data has some of the head's classes, or another order
        if wrong := [name for name in wanted if names.count(name) != 1]:
            raise ValueError(
                "--keep-head: the head in --init is for other classes than the data's "
                f"({names.count(wrong[0])} of its {count} classes are called {wrong[0]}, "
                "and one is needed): leave --keep-head out"
            )
        rows = [names.index(name) for name in wanted]
        head = {name: state[name][rows] for name in ("head.weight", "head.bias")}
        state = state | head
        run.say(f"--keep-head: the data has {len(rows)} of the head's {count} classes")
    pool = run.pool_of_init or ("mean" if "fc_norm.weight" in state else "cls")
    if run.pool not in (None, pool):
        raise ValueError(f"--keep-head: the head in --init reads --pool {pool}")
    return (state, grid), pool
