"""support/labels.py: files of labels. (Splits: test_data.py. Names of classes: test_evaluate.py.)"""

import io
import json
import os

import numpy as np
import pytest
from conftest import everything, one_line, relative_labels, tile, write_files
from PIL import Image

import data
from support import labels as labels_module
from support.labels import names_of_list, read_class_names, read_labels

KINDS = [".jsonl", ".CSV", ".Json"]  # in any case


def write_labels(path, classes):
    """{picture: class name} as the kind of file that the path's extension says."""
    kind, names = path.suffix.lower(), sorted(set(classes.values()))
    lines = [json.dumps({"path": p, "class": name}) for p, name in classes.items()]
    if kind == ".csv":
        lines = ["path,class", *(f'"{p}",{name}' for p, name in classes.items())]
    elif kind == ".json":  # iNaturalist's, numbered neither from 0 nor in order
        numbers = {name: 9 - i for i, name in enumerate(names)}
        content = {
            "images": [{"id": 70 - i, "file_name": p} for i, p in enumerate(classes)],
            "categories": [{"id": number, "name": name} for name, number in numbers.items()],
            "annotations": [
                {"image_id": 70 - i, "category_id": numbers[name]}
                for i, name in enumerate(classes.values())
            ],
        }
        lines = [json.dumps(content)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def pictures(tmp_path, *names):
    return write_files(tmp_path / "p", {name: tile(i) for i, name in enumerate(names)})


@pytest.mark.parametrize("kind", KINDS)
def test_labels_name_the_pictures_and_classes_of_a_folder(tmp_path, kind):
    """Whatever the folders are called. What the file does not list is not there."""
    listed = {"x/a.png": "dog", "./x/y/b.png": "größer", "c, d.png": "cat", "x/e.png": "dog"}
    folder = pictures(tmp_path, *listed, "x/not-listed.png", "more.png")
    labels = write_labels(tmp_path / f"labels{kind}", listed)
    train, val = data.open_sources(folder, labels=labels)
    assert val is None and train.classes == ["cat", "dog", "größer"]
    expected = {os.path.normpath(p): train.classes.index(name) for p, name in listed.items()}
    assert relative_labels(train, folder) == expected
    pixels = {os.path.relpath(name, folder): pixels for name, _, pixels in everything(train)}
    for number, name in enumerate(listed):
        picture = np.asarray(Image.open(io.BytesIO(tile(number))))
        assert pixels[os.path.normpath(name)] == picture.tolist()
    # Classes that are numbers are in the order of numbers; other classes are another data set.
    numbers = write_labels(tmp_path / f"n{kind}", dict(zip(listed, ("10", "9", "100", "9"))))
    source, _ = data.open_sources(folder, labels=numbers)
    assert source.classes == ["9", "10", "100"]
    assert relative_labels(source, folder)["c, d.png"] == 2
    fewer = write_labels(tmp_path / f"f{kind}", dict([*listed.items()][:3]))
    other, _ = data.open_sources(folder, labels=fewer)
    assert len({train.identity, source.identity, other.identity}) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_val_have_the_classes_of_train(tmp_path, kind):
    folder = pictures(tmp_path, *(f"{name}.png" for name in [*"abcde", "val/f", "val/g"]))
    val_labels = tmp_path / f"val{kind}"
    classes = {"a.png": "cat", "b.png": "dog", "c.png": "emu"}
    train = write_labels(tmp_path / f"train{kind}", classes)
    val = write_labels(val_labels, {"d.png": "emu", "e.png": "dog"})
    sources = data.open_sources(folder, labels=train, val_labels=val)
    assert [source.classes for source in sources] == [["cat", "dog", "emu"]] * 2
    found = [relative_labels(source, folder) for source in sources]
    assert found == [{"a.png": 0, "b.png": 1, "c.png": 2}, {"d.png": 2, "e.png": 1}]
    # The pictures of val may be elsewhere, and may have class folders instead.
    write_labels(val_labels, {"f.png": "emu"})
    _, other = data.open_sources(folder, f"{folder}/val", labels=train, val_labels=val)
    assert relative_labels(other, folder) == {"val/f.png": 2}
    pets = write_files(tmp_path / "pets", {"dog/h.png": tile(8), "emu/i.png": tile(9)})
    _, other = data.open_sources(folder, pets, labels=train)
    assert relative_labels(other, pets) == {"dog/h.png": 1, "emu/i.png": 2}
    write_labels(val_labels, {"d.png": "emu", "e.png": "yak"})
    with pytest.raises(ValueError, match=r"other classes than train \(yak\)") as error:
        data.open_sources(folder, labels=train, val_labels=val)
    one_line(error)


PAIRS = [(1, 2), (1, 3), (1, 2), (2, 2), (5, 2), (1, 5), ([], 2)]
INATURALIST = {
    "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.txt"}],
    "categories": [{"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}],
    "annotations": [{"image_id": i, "category_id": c} for i, c in PAIRS] + [7, {"id": 1}],
}
CAT = {"class": "cat", "captions": []}
# (file, lines, how many are damaged, what is left). \udcff is a byte that is not UTF-8.
DAMAGED = [
    ("labels.jsonl", [
        '{"path": "a.png", "class": 1, "hashtags": ["#x"]}', '{"path": "b.png"', '["path"]', "",
        '{"class": "cat"}', '{"path": 5}', '{"path": null}', '{"path": ["a.png"]}', "7",
        '{"path": "a.png", "class": 2, "hashtags": ["#x"]}',  # it was 1
        '{"path": "c.png", "class": null}', '{"path": "\udcff.png", "class": 1}',
    ], 10, {"a.png": {"class": "1", "hashtags": ["#x"], "captions": []}, "c.png": {"captions": []}}),
    ("labels.csv", [
        "path,class", "a.png,cat", "", "b.png;dog", "b.png,dog,1", "b.jfif,dog", "a.png,dog",
        "../p/b.png,cat",  # a path, though it begins with a dot
    ], 4, {"a.png": CAT, "../p/b.png": CAT}),
    ("first.csv", ["a.png,cat,dog", "b.png,cat"], 1, {"b.png": CAT}),
    ("labels.json", [json.dumps(INATURALIST)], 7, {"a.png": CAT}),
]  # fmt: skip


@pytest.mark.parametrize("name, lines, count, expected", DAMAGED)
def test_damaged_entries_are_counted_and_left_out(tmp_path, capsys, name, lines, count, expected):
    content = "\n".join(lines).encode(errors="surrogateescape")
    write_files(tmp_path, {name: content})
    assert read_labels(f"{tmp_path}/{name}") == expected
    assert capsys.readouterr().err == (
        f"{tmp_path}/{name}: entries that are left out (damaged, naming no picture, or against "
        f"an earlier one): {count}\n"
    )


HEADER = "is taken as a header; its columns are read as path and class"
THREE = ["x", "x", "y, z"]
COLUMNS = [  # (text, classes of a, b and c, what is said of the first line)
    # Spaces around the cells do not count.
    ('path,class\na.png,x\nb.png,x\nc.png,"y, z"', THREE, ""),
    ('path, class\na.png, x\nb.png,x \n c.png ,"y, z"\n', THREE, ""),
    ('a.png , x\nb.png,\tx\nc.png, "y, z"\n', THREE, ""),
    ('class , path,split\n x,a.png,1\n"x ", b.png,1\n"y, z", c.png,1\n', THREE, ""),
    # A head line that does not name its columns. One that names a picture is no head line.
    ('path,label\na.png,x\nb.png,x\nc.png,"y, z"', THREE, f"'path,label' {HEADER}"),
    ('image, tags\na.png,x\nb.png,x\nc.png,"y, z"', THREE, f"'image,tags' {HEADER}"),
    ('a.jfif,dog\na.png,x\nb.png,x\nc.png,"y, z"', THREE, f"'a.jfif,dog' {HEADER}"),
    ("a.png,path\nb.png,path\nc.png,class", ["path", "path", "class"], ""),
    ("a.png,caption\nb.png,class\nc.png,class", ["caption", "class", "class"], ""),
]


@pytest.mark.parametrize("text, classes, said", COLUMNS)
def test_columns_of_a_csv(tmp_path, capsys, text, classes, said):
    folder, path = pictures(tmp_path, "a.png", "b.png", "c.png"), tmp_path / "labels.csv"
    path.write_text(text)
    source, _ = data.open_sources(folder, labels=str(path))
    found = relative_labels(source, folder)
    assert [source.classes[found[f"{name}.png"]] for name in "abc"] == classes
    assert capsys.readouterr().err == (f"{path}: {said}\n" if said else "")


def test_hashtags_and_identity_of_labels_of_earlier_versions(tmp_path):
    folder = pictures(tmp_path, "a.png", "b.png", "c.png")
    csv, jsonl = (
        b'a.png,cat\nb.png,cat\nc.png,"dog, or so"',
        b'{"path": "a.png", "hashtags": ["#x"]}',
    )
    lists = write_files(tmp_path, {"l.csv": csv, "l.jsonl": jsonl})
    assert data.open_sources(folder, labels=f"{lists}/l.csv")[0].identity.endswith("9086567593bba")
    source, _ = data.open_sources(folder, labels=f"{lists}/l.jsonl")
    assert source.read(0)["hashtags"]() == ["#x"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_label_is_none_and_is_counted(tmp_path, capsys, kind, empty):
    names = {"a.png": "cat", "b.png": empty, "c.png": "dog ", "d.png": "dog"}
    folder = pictures(tmp_path, *names)
    labels = write_labels(tmp_path / f"labels{kind}", names)
    source, val = data.open_sources(folder, folder, labels=labels, val_labels=labels)
    assert source.classes == ["cat", "dog"]
    for one in (source, val):
        assert relative_labels(one, folder) == {"a.png": 0, "b.png": -1, "c.png": 1, "d.png": 1}
    assert capsys.readouterr().err == 2 * f"{labels}: pictures without a class: 1\n"


def test_categories_of_one_name_are_one_class_and_that_is_said(tmp_path, capsys):
    content = {"images": [{"id": i, "file_name": f"{'ab'[i]}.png"} for i in range(2)]}
    content["categories"] = [{"id": i, "name": "crane"} for i in range(2)]
    content["annotations"] = [{"image_id": i, "category_id": i} for i in range(2)]
    (tmp_path / "labels.json").write_text(json.dumps(content))
    entry = {"class": "crane", "captions": []}
    assert read_labels(f"{tmp_path}/labels.json") == {"a.png": entry, "b.png": entry}
    said = "categories of the same name, each of which is one class (1): crane"
    assert said in capsys.readouterr().err


WANT = "a head line that names path, and class or caption; the first line is "
LISTS = "no-annotations", "no-images", "no-categories"
WRONG = {  # name: (content, words of the message)
    "missing.csv": (None, "cannot read labels from"),
    "empty.csv": (b"", f"{WANT}''"),
    "only-a-header.csv": (b"path,class\n", "lists no pictures: want path,class in each line"),
    "one-column.csv": (b"path,class\na.png\n", WANT),
    "three-columns.csv": (b"a.png,cat,dog\n", f"{WANT}'a.png,cat,dog'"),
    "tabs.csv": (b"path\tclass\na.png\tcat\n", WANT + r"'path\tclass'"),
    "semicolons.csv": (b"a.png;cat\n", f"{WANT}'a.png;cat'"),
    "other-columns.csv": (b"name,path,class\na.png,cat\n", f"{WANT}'name,path,class'"),
    "latin.csv": ("größe.png,cat\n".encode("latin-1"), "lists no pictures"),
    "open-quote.csv": (b'"' + b"a.png,cat\n" * 20_000, "cannot read labels"),
    "last-quote.csv": (b'a.png,cat\nb.png,"cat\n', "cannot read"),  # it would swallow the rest
    "damaged.jsonl": (b"{\n[]\n", 'want lines of {"path", "class", "hashtags", captions}'),
    "a.txt": (b"a.png,cat\n", "is no file of labels: want .jsonl, .csv or .json"),
    "empty.json": (b"", "cannot read labels"),
    "cut.json": (json.dumps(INATURALIST).encode()[:-5], "cannot read labels"),
    "list.json": (b"[]", "cannot read labels"),
    "number.json": (b"5", "cannot read labels"),
    **{
        f"{name}.json": (json.dumps(INATURALIST | {name[3:]: []}).encode(), "lists no pictures")
        for name in LISTS
    },
    "text.json": (json.dumps(INATURALIST | {"images": "a.png"}).encode(), "cannot read labels"),
    "file.json": (json.dumps(INATURALIST).replace('"a.png"', "5").encode(), "lists no pictures"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_of_labels_is_one_line_that_names_it(tmp_path, name):
    content, words = WRONG[name]
    if content is not None:
        write_files(tmp_path, {name: content})
    with pytest.raises(ValueError) as error:
        read_labels(f"{tmp_path}/{name}")
    assert name in one_line(error) and words in one_line(error)


# --------------------------------------------------------------------------------- names of classes

WNIDS = ["n02123045", "n01440764", "n15075141"]  # a tabby cat, a tench, toilet tissue


def test_wnids_by_facts_that_are_known_of_the_lists(tmp_path, monkeypatch):
    """Their length, some famous places, and that they are sorted."""
    tabby, tench, tissue = WNIDS
    fish = {tench: 359, "n01443537": 368, "n01484850": 460, "n01491361": 475}
    known = {1000: {tench: 0, "n02099712": 208, tabby: 281, "n02504458": 386, "n04399382": 850,
                    "n07753592": 954, tissue: 999},  # tench, labrador, cat, elephant, teddy, banana
             21841: fish, 21843: fish}  # fmt: skip
    lists = {count: names_of_list(count, [*places]) for count, places in known.items()}
    for count, names in lists.items():
        assert len(set(names)) == count and names == sorted(names)
        assert {name: names.index(name) for name in known[count]} == known[count]
    # Google's list has two more than the release of fall 2011, which lacks the teddy bear.
    assert set(lists[21843]) - set(lists[21841]) == {"n03931044", "n09859684"}
    assert set(lists[1000]) - set(lists[21841]) == {"n04399382"}
    # Where labels.py was copied alone, nothing is guessed.
    monkeypatch.setattr(labels_module, "__file__", str(tmp_path / "labels.py"))
    assert names_of_list(1000, WNIDS) is None and names_of_list(3, WNIDS) == WNIDS
    assert names_of_list(1000, ["3", "7"])[7] == "7"


def test_names_of_classes(tmp_path):
    path = tmp_path / "names.txt"
    assert read_class_names(None, ["sea_lion", "ox"]) == [["sea lion"], ["ox"]]
    path.write_text("\ufeff\u0430\u043a\u0443\u043b\u0430, shark \r\nox\n", "utf-8")
    names = [["\u0430\u043a\u0443\u043b\u0430", "shark"], ["ox"]]
    assert read_class_names(path, ["b", "a"]) == names
    assert read_class_names(path, None) == names
    path.write_text("n02\tox, bull\nn01\tshark\nn03\tcat\n")  # by name, in any order
    assert read_class_names(path, ["n01", "n02"]) == [["shark"], ["ox", "bull"]]


@pytest.mark.parametrize("order", [sorted, lambda names: sorted(names, key=int)])
def test_a_line_of_names_belongs_to_the_folder_of_its_number(order, tmp_path):
    """The third line to the folder 2, also of shards that list 10 before 2."""
    path, classes = tmp_path / "names.txt", order([str(i) for i in range(12)])
    path.write_text("\n".join(f"name {i}" for i in range(12)))
    assert read_class_names(path, classes) == [[f"name {i}"] for i in classes]
    # Some of the folders; and folders from 1 on, which are as many as the lines.
    assert read_class_names(path, ["2", "10"]) == [["name 2"], ["name 10"]]
    from_one = order([str(i) for i in range(1, 13)])
    assert read_class_names(path, from_one) == [[f"name {int(i) - 1}"] for i in from_one]


def test_names_of_all_of_imagenet_for_some_of_its_folders(tmp_path, capsys):
    """And two classes may share a name, as the missiles of the list that CLIP's authors use."""
    path, names = tmp_path / "names.txt", [f"name {i}" for i in range(1000)]
    names[657] = names[744] = "missile"
    path.write_text("\n".join(names))
    found = read_class_names(path, ["n15075141", "n01440764", "n02123045"])
    assert found == [["name 999"], ["name 0"], ["name 281"]]
    assert "share" not in capsys.readouterr().out
    found = read_class_names(path, None)
    assert len(found) == 1000 and found[657] == found[744] == ["missile"]
    assert "classes that share their names (1): missile\n" in capsys.readouterr().out
    path.write_text("a\tox, bull\nb\tbull,ox\nc\tbull\n")  # the same of several names
    assert read_class_names(path, ["c", "b", "a"]) == [["bull"], ["bull", "ox"], ["ox", "bull"]]
    assert "classes that share their names (1): bull, ox\n" in capsys.readouterr().out
    assert read_class_names(None, ["a_b", "a-b"]) == [["a b"], ["a b"]]
    assert "share their names (1): a b" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "classes", "said"),
    [
        ("ox\n\ncat\n", None, "line 2 is blank"),
        ("", None, "line 1 is blank"),
        ("ox\ncat\n", ["a"], "has 2 lines, the data 1 classes: begin each line with the class"),
        ("ox\ncat\n", ["0", "1", "2"], "has 2 lines, the data 3 classes: begin each line"),
        ("ox\ncat\nemu\n", ["0", "3"], "has 3 lines, the data 2 classes: begin each line"),
        ("a\tox\ncat\n", ["a", "cat"], "no names for cat (1)"),
        ("a\tox\nb\tcat\n", ["a", "c"], "no names for c (1)"),
        ("a\tox\na\tcat\n", ["a"], "names a twice"),
        (",\n", None, "no names for 0 (1)"),
    ],
)
def test_unusable_names_of_classes_are_refused(text, classes, said, tmp_path):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ValueError) as error:
        read_class_names(tmp_path / "names.txt", classes)
    assert said in one_line(error)
