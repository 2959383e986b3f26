"""support/labels.py: files of labels. (Splits: test_data.py. Names of classes: test_evaluate.py.)"""

import io
import json
import os
import sys

import numpy as np
import pytest
from conftest import everything, members_of, one_line, relative_labels, tile, write_files, write_tar
from PIL import Image

import data
from support import labels as labels_module

KINDS = [".jsonl", ".csv", ".json"]


def write_labels(path, classes):
    """{picture: class name} as the kind of file that the path's extension says."""
    names = sorted(set(classes.values()))
    lines = {
        ".jsonl": [json.dumps({"path": p, "class": name}) for p, name in classes.items()],
        ".csv": ["path,class", *(f'"{p}",{name}' for p, name in classes.items())],
    }
    inaturalist = {  # numbered neither from 0 nor in order
        "info": {"year": 2021},
        "images": [{"id": 70 - i, "file_name": p, "width": 4} for i, p in enumerate(classes)],
        "categories": [{"id": 9 - i, "name": name} for i, name in enumerate(names)],
        "annotations": [
            {"id": i, "image_id": 70 - i, "category_id": 9 - names.index(name)}
            for i, name in enumerate(classes.values())
        ],
    }
    text = "\n".join(lines.get(path.suffix, [json.dumps(inaturalist)]))
    path.write_text(text, encoding="utf-8")
    return str(path)


def pictures(tmp_path, *names):
    return write_files(tmp_path / "p", {name: tile(i) for i, name in enumerate(names)})


@pytest.fixture
def labelled(tmp_path):
    """A function: text of a .csv -> (source of the pictures a, b and c, the file's path)."""
    folder = pictures(tmp_path, "a.png", "b.png", "c.png")

    def open_labels(text, **options):
        path = tmp_path / "labels.csv"
        path.write_text(text)
        return data.open_sources(folder, labels=str(path), **options)[0], path

    return open_labels


@pytest.mark.parametrize("kind", KINDS)
def test_labels_name_the_pictures_and_classes_of_a_folder(tmp_path, kind):
    """Whatever the folders are called. What the file does not list is not there."""
    listed = {"x/a.png": "dog", "./x/y/b.png": "größer", "c, d.png": "cat", "x/e.png": "dog"}
    names = [*listed, "x/not-listed.png", "more.png"]
    folder = pictures(tmp_path, *names)
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
    with pytest.raises(ValueError, match="classes that train has not: yak") as error:
        data.open_sources(folder, labels=train, val_labels=val)
    one_line(error)


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
    ], 4, {name: {"class": "cat", "captions": []} for name in ("a.png", "../p/b.png")}),
    ("first.csv", ["a.png,cat,dog", "b.png,cat"], 1, {"b.png": {"class": "cat", "captions": []}}),
    ("labels.json", [json.dumps({
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.txt"}],
        "categories": [{"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [{"image_id": image, "category_id": category} for image, category in
                        [(1, 2), (1, 3), (1, 2), (2, 2), (5, 2), (1, 5), ([], 2)]] + [7, {"id": 1}],
    })], 7, {"a.png": {"class": "cat", "captions": []}}),
]  # fmt: skip


@pytest.mark.parametrize("name, lines, count, expected", DAMAGED)
def test_damaged_entries_are_counted_and_left_out(tmp_path, capsys, name, lines, count, expected):
    content = "\n".join(lines).encode(errors="surrogateescape")
    write_files(tmp_path, {name: content})
    assert labels_module.read_labels(f"{tmp_path}/{name}") == expected
    assert capsys.readouterr().err == (
        f"{tmp_path}/{name}: entries that are left out (damaged, naming no picture, or against "
        f"an earlier one): {count}\n"
    )


def test_hashtags_of_labels_are_those_of_the_picture(tmp_path):
    folder = pictures(tmp_path, "a.png")
    line = b'{"path": "a.png", "class": 1, "hashtags": ["#x"]}'
    write_files(tmp_path, {"labels.jsonl": line})
    source, _ = data.open_sources(folder, labels=f"{tmp_path}/labels.jsonl")
    assert source.classes == ["1"] and source.read(0)["hashtags"]() == ["#x"]


@pytest.mark.parametrize(
    "text",
    [
        'path,class\na.png,cat\nb.png,cat\nc.png,"dog, or so"',
        'path, class\na.png, cat\nb.png,cat \n c.png ,"dog, or so"\n',
        'a.png , cat\nb.png,\tcat\nc.png, "dog, or so"\n',
        'class , path,split\n cat,a.png,x\n"cat ", b.png,x\n"dog, or so", c.png,x\n',
    ],
)
def test_spaces_around_the_cells_of_a_csv_do_not_count(labelled, capsys, text):
    source, _ = labelled(text)
    assert source.classes == ["cat", "dog, or so"]
    assert relative_labels(source, source.root) == {"a.png": 0, "b.png": 0, "c.png": 1}
    assert source.identity == "3 pictures, 2aa9086567593bba"  # as of earlier versions
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_label_is_none_and_is_counted(tmp_path, capsys, kind, empty):
    names = {"a.png": "cat", "b.png": empty, "c.png": "dog ", "d.png": "dog"}
    folder = pictures(tmp_path, *names)
    labels = write_labels(tmp_path / f"labels{kind}", names)
    source, _ = data.open_sources(folder, labels=labels)
    assert source.classes == ["cat", "dog"]
    assert relative_labels(source, folder) == {"a.png": 0, "b.png": -1, "c.png": 1, "d.png": 1}
    assert capsys.readouterr().err == f"{labels}: pictures without a class: 1\n"
    _, val = data.open_sources(folder, folder, labels=labels, val_labels=labels)
    assert relative_labels(val, folder)["b.png"] == -1


def test_categories_of_one_name_are_one_class_and_that_is_said(tmp_path, capsys):
    folder = pictures(tmp_path, "a.png", "b.png")
    content = {"images": [{"id": i, "file_name": f"{'ab'[i]}.png"} for i in range(2)]}
    content["categories"] = [{"id": i, "name": "crane"} for i in range(2)]
    content["annotations"] = [{"image_id": i, "category_id": i} for i in range(2)]
    (tmp_path / "labels.json").write_text(json.dumps(content))
    source, _ = data.open_sources(folder, labels=f"{tmp_path}/labels.json")
    assert source.classes == ["crane"] and source.labels.tolist() == [0, 0]
    said = "categories of the same name, each of which is one class (1): crane"
    assert said in capsys.readouterr().err


HEADER = "is taken as a header; its columns are read as path and class"


@pytest.mark.parametrize(
    "text, classes, said",
    [
        ("path,label\na.png,x\nb.png,y", ["x", "y"], f"'path,label' {HEADER}"),
        ("path,hashtags\na.png,x\nb.png,y", ["x", "y"], f"'path,hashtags' {HEADER}"),
        ("image, label\na.png,x\nb.png,y", ["x", "y"], f"'image,label' {HEADER}"),
        ("a.jfif,dog\na.png,x\nb.png,y", ["x", "y"], f"'a.jfif,dog' {HEADER}"),
        ("a.png,path\nb.png,road", ["path", "road"], ""),  # classes of these names
        ("a.png,caption\nb.png,class", ["caption", "class"], ""),
        ("class,path\nx,a.png\ny,b.png", ["x", "y"], ""),
    ],
)
def test_columns_are_known_by_a_head_line_that_names_them(labelled, capsys, text, classes, said):
    """Others are path and class. A first row that names a picture is no head line."""
    source, path = labelled(text)
    assert source.classes == classes
    assert relative_labels(source, source.root) == {"a.png": 0, "b.png": 1}
    assert capsys.readouterr().err == (f"{path}: {said}\n" if said else "")


@pytest.mark.parametrize(
    "text, key, first",
    [
        ("path\tclass\na.png\tcat\n", "caption", r"'path\tclass'"),
        ("a.png;cat\n", "caption", "'a.png;cat'"),
        ("filepath,title\na.png,a cat\n", "title", "'filepath,title'"),
        ("name,path,class\na.png,cat\n", "caption", "'name,path,class'"),
        ("id,split,label,file\n1,train,cat,a.png\n", "caption", "'id,split,label,file'"),
    ],
)
def test_a_csv_that_is_refused_says_what_it_wants_and_what_it_found(labelled, text, key, first):
    with pytest.raises(ValueError, match="labels.csv lists no pictures: want lines of") as error:
        labelled(text, caption_key=key)
    said = f"or a head line that names path, and class or {key}; the first line is {first}"
    assert one_line(error).endswith(said)


INATURALIST = {
    "images": [{"id": 1, "file_name": "a.png"}],
    "categories": [{"id": 2, "name": "cat"}],
    "annotations": [{"image_id": 1, "category_id": 2}],
}
WRONG = {
    "missing.csv": None,
    "empty.csv": b"",
    "only-a-header.csv": b"path,class\n",
    "one-column.csv": b"path,class\na.png\n",
    "three-columns.csv": b"a.png,cat,dog\n",
    "latin.csv": "größe.png,cat\n".encode("latin-1"),
    "open-quote.csv": b'"' + b"a.png,cat\n" * 20_000,
    "last-quote.csv": b'a.png,cat\nb.png,"cat\n',  # it would swallow what follows
    "damaged.jsonl": b"{\n[]\n",
    "a.txt": b"a.png,cat\n",
    "empty.json": b"",
    "cut.json": json.dumps(INATURALIST).encode()[:-5],
    "list.json": b"[]",
    "number.json": b"5",
    "no-annotations.json": json.dumps(INATURALIST | {"annotations": []}).encode(),
    "no-images.json": json.dumps(INATURALIST | {"images": []}).encode(),
    "no-categories.json": json.dumps({**INATURALIST, "categories": []}).encode(),
    "text-as-images.json": json.dumps(INATURALIST | {"images": "a.png"}).encode(),
    "number-as-file.json": json.dumps(INATURALIST).replace('"a.png"', "5").encode(),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_of_labels_is_one_line_that_names_it(tmp_path, name):
    folder = pictures(tmp_path, "a.png")
    if WRONG[name] is not None:
        write_files(tmp_path, {name: WRONG[name]})
    with pytest.raises(ValueError) as error:
        data.open_sources(folder, labels=f"{tmp_path}/{name}")
    assert name in one_line(error)


def test_labels_without_a_folder_are_refused(tmp_path):
    labels = write_labels(tmp_path / "labels.csv", {"a.png": "cat"})
    for where in ("toy", write_tar(tmp_path / "a.tar", members_of(range(3)))):
        for flag in ("labels", "val_labels"):
            with pytest.raises(ValueError, match="want a folder") as error:
                data.open_sources(where, **{flag: labels})
            one_line(error)


# --------------------------------------------------------------------------------- names of classes

WNIDS = ["n02123045", "n01440764", "n15075141"]  # a tabby cat, a tench, toilet tissue


def test_wnids_by_facts_that_are_known_of_the_lists():
    """Their length, some famous places, and that they are sorted."""
    tabby, tench, tissue = WNIDS
    known = {1000: {tench: 0, "n02099712": 208, tabby: 281, "n02504458": 386, "n04399382": 850,
                    "n07753592": 954, tissue: 999},  # tench, labrador, cat, elephant, teddy, banana
             21841: {tench: 359, "n01443537": 368, "n01484850": 460, "n01491361": 475},
             21843: {tench: 359, "n01443537": 368, "n01484850": 460, "n01491361": 475}}  # fmt: skip
    lists = {
        count: labels_module.names_of_list(count, [*places]) for count, places in known.items()
    }
    for count, names in lists.items():
        assert len(set(names)) == count and names == sorted(names)
        assert {name: names.index(name) for name in known[count]} == known[count]
    # Google's list has two more than the release of fall 2011, which lacks the teddy bear.
    assert set(lists[21843]) - set(lists[21841]) == {"n03931044", "n09859684"}
    assert set(lists[1000]) - set(lists[21841]) == {"n04399382"}


def test_without_a_list_of_wnids_nothing_is_guessed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lzma", None)  # not in every build of Python
    with pytest.raises(ValueError, match="imagenet_1000.txt.xz cannot be read .* use a Python"):
        labels_module.names_of_list(1000, WNIDS)
    assert labels_module.names_of_list(1000, ["3", "7"])[7] == "7"  # which needs no list
    monkeypatch.setattr(labels_module, "__file__", str(tmp_path / "labels.py"))  # copied alone
    assert labels_module.names_of_list(1000, WNIDS) is None
    assert labels_module.names_of_list(3, WNIDS) == WNIDS


def test_names_of_classes(tmp_path):
    path = tmp_path / "names.txt"
    assert labels_module.read_class_names(None, ["sea_lion", "ox"]) == [["sea lion"], ["ox"]]
    path.write_text("\ufeff\u0430\u043a\u0443\u043b\u0430, shark \r\nox\n", "utf-8")
    names = [["\u0430\u043a\u0443\u043b\u0430", "shark"], ["ox"]]
    assert labels_module.read_class_names(path, ["b", "a"]) == names
    assert labels_module.read_class_names(path, None) == names
    path.write_text("n02\tox, bull\nn01\tshark\nn03\tcat\n")  # by name, in any order
    assert labels_module.read_class_names(path, ["n01", "n02"]) == [["shark"], ["ox", "bull"]]


@pytest.mark.parametrize("order", [sorted, lambda names: sorted(names, key=int)])
def test_a_line_of_names_belongs_to_the_folder_of_its_number(order, tmp_path):
    """The third line to the folder 2, also of shards that list 10 before 2."""
    path, classes = tmp_path / "names.txt", order([str(i) for i in range(12)])
    path.write_text("\n".join(f"name {i}" for i in range(12)))
    assert labels_module.read_class_names(path, classes) == [[f"name {i}"] for i in classes]
    # Some of the folders; and folders from 1 on, which are as many as the lines.
    assert labels_module.read_class_names(path, ["2", "10"]) == [["name 2"], ["name 10"]]
    from_one = order([str(i) for i in range(1, 13)])
    found = labels_module.read_class_names(path, from_one)
    assert found == [[f"name {int(i) - 1}"] for i in from_one]


def test_names_of_all_of_imagenet_for_some_of_its_folders(tmp_path, capsys):
    """And two classes may share a name, as the missiles of the list that CLIP's authors use."""
    path = tmp_path / "names.txt"
    names = [f"name {i}" for i in range(1000)]
    names[657] = names[744] = "missile"
    path.write_text("\n".join(names))
    found = labels_module.read_class_names(path, ["n15075141", "n01440764", "n02123045"])
    assert found == [["name 999"], ["name 0"], ["name 281"]]
    assert "share" not in capsys.readouterr().out
    found = labels_module.read_class_names(path, None)
    assert len(found) == 1000 and found[657] == found[744] == ["missile"]
    assert "classes that share their names (1): missile\n" in capsys.readouterr().out
    path.write_text("a\tox, bull\nb\tbull,ox\nc\tbull\n")  # the same of several names
    found = labels_module.read_class_names(path, ["c", "b", "a"])
    assert found == [["bull"], ["bull", "ox"], ["ox", "bull"]]
    assert "classes that share their names (1): bull, ox\n" in capsys.readouterr().out
    assert labels_module.read_class_names(None, ["a_b", "a-b"]) == [["a b"], ["a b"]]
    assert "share their names (1): a b" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "classes", "said"),
    [
        ("ox\n\ncat\n", None, "line 2 is blank"),
        ("", None, "is empty"),
        ("ox\ncat\n", ["a"], "has 2 lines, the data 1 classes: begin each line with the class"),
        ("ox\ncat\n", ["0", "1", "2"], "has 2 lines, the data 3 classes: begin each line"),
        ("ox\ncat\nemu\n", ["0", "3"], "has 3 lines, the data 2 classes: begin each line"),
        ("a\tox\ncat\n", None, "line 2 has no tab"),
        ("a\tox\nb\tcat\n", ["a", "c"], "no names for c (1)"),
        ("a\tox\na\tcat\n", ["a"], "names a twice"),
        (",\n", None, "line 1 holds no name"),
    ],
)
def test_unusable_names_of_classes_are_refused(text, classes, said, tmp_path):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ValueError) as error:
        labels_module.read_class_names(tmp_path / "names.txt", classes)
    assert said in one_line(error)


def test_extensions_of_lists_count_in_any_case(tmp_path):
    folder = write_files(tmp_path / "p", {"a.png": tile(0), "b.png": tile(1)})
    contents = {"l.CSV": "path,class\na.png,cat\nb.png,dog\n"}
    contents["l.JSONL"] = '{"path": "a.png", "class": "cat"}\n{"path": "b.png", "class": "dog"}\n'
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        source, _ = data.open_sources(folder, labels=str(tmp_path / name))
        assert source.classes == ["cat", "dog"]
