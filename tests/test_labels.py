"""test_labels"""

import io
import json
import os

import numpy as np
import pytest
from conftest import everything, members_of, one_line, relative_labels, tile, write_files, write_tar
from PIL import Image

import data
from support import labels as labels_module

# ------------------------------------------------------------------------------------------- labels


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


KINDS = [".jsonl", ".csv", ".json"]


@pytest.mark.parametrize("kind", KINDS)
def test_labels_name_the_pictures_and_classes_of_a_folder(tmp_path, kind):
    """Whatever the folders are called; what the file does not list is not there."""
    listed = {"x/a.png": "dog", "./x/y/b.png": "größer", "c, d.png": "cat", "x/e.png": "dog"}
    files = {name: tile(i) for i, name in enumerate([*listed, "x/not-listed.png", "more.png"])}
    folder = write_files(tmp_path / "pictures", files)
    labels = write_labels(tmp_path / f"labels{kind}", listed)
    train, val = data.open_sources(folder, labels=labels)
    assert val is None and train.classes == ["cat", "dog", "größer"]
    expected = {os.path.normpath(p): train.classes.index(name) for p, name in listed.items()}
    assert relative_labels(train, folder) == expected
    pixels = {os.path.relpath(name, folder): pixels for name, _, pixels in everything(train)}
    for name in listed:
        picture = Image.open(io.BytesIO(files[name]))
        assert pixels[os.path.normpath(name)] == np.asarray(picture).tolist()


def test_a_class_that_changes_is_another_data_set(tmp_path):
    folder = write_files(tmp_path / "pictures", {"a.png": tile(0), "b.png": tile(1)})
    found = set()
    for classes in ({"a.png": "x", "b.png": "y"}, {"a.png": "y", "b.png": "x"}, {"a.png": "x"}):
        for kind in KINDS:
            labels = write_labels(tmp_path / f"labels{kind}", classes)
            found.add(data.open_sources(folder, labels=labels)[0].identity)
    assert len(found) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_in_labels_are_in_the_order_of_numbers(tmp_path, kind):
    names = {"a.png": "10", "b.png": "9", "c.png": "100"}
    folder = write_files(tmp_path / "p", {name: tile(i) for i, name in enumerate(names)})
    labels = write_labels(tmp_path / f"labels{kind}", names)
    source, _ = data.open_sources(folder, labels=labels)
    assert source.classes == ["9", "10", "100"]
    assert relative_labels(source, folder) == {"a.png": 1, "b.png": 0, "c.png": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_val_have_the_classes_of_train(tmp_path, kind):
    names = [*"abcde", "val/f", "val/g"]
    folder = write_files(tmp_path / "p", {f"{name}.png": tile(i) for i, name in enumerate(names)})
    train = write_labels(
        tmp_path / f"train{kind}", {"a.png": "cat", "b.png": "dog", "c.png": "emu"}
    )
    val = write_labels(tmp_path / f"val{kind}", {"d.png": "emu", "e.png": "dog"})
    sources = data.open_sources(folder, labels=train, val_labels=val)
    assert [source.classes for source in sources] == [["cat", "dog", "emu"]] * 2
    found = [relative_labels(source, folder) for source in sources]
    assert found == [{"a.png": 0, "b.png": 1, "c.png": 2}, {"d.png": 2, "e.png": 1}]
    # The pictures of val may lie elsewhere, and may have class folders instead.
    write_labels(tmp_path / f"val{kind}", {"f.png": "emu"})
    _, other = data.open_sources(folder, f"{folder}/val", labels=train, val_labels=val)
    assert relative_labels(other, folder) == {"val/f.png": 2}
    pets = write_files(tmp_path / "pets", {"dog/h.png": tile(8), "emu/i.png": tile(9)})
    _, other = data.open_sources(folder, pets, labels=train)
    assert relative_labels(other, pets) == {"dog/h.png": 1, "emu/i.png": 2}
    write_labels(tmp_path / f"val{kind}", {"d.png": "emu", "e.png": "yak"})
    with pytest.raises(ValueError, match="classes that train has not: yak") as error:
        data.open_sources(folder, labels=train, val_labels=val)
    one_line(error)


def test_damaged_lines_of_labels_are_counted_and_left_out(tmp_path, capsys):
    folder = write_files(tmp_path / "p", {"a.png": tile(0), "b.png": tile(1)})
    lines = ['{"path": "a.png", "class": 1, "hashtags": ["#x"]}', '{"path": "b.png"', '["path"]']
    lines += ['{"class": "cat"}', "", '{"path": 5}', '{"path": null}', '{"path": ["a.png"]}', "7"]
    lines += ['{"path": "a.png", "class": 2, "hashtags": ["#x"]}']  # it was 1
    lines += ['{"path": "c.png", "class": null}']
    labels = tmp_path / "labels.jsonl"
    labels.write_bytes("\n".join(lines).encode() + b'\n{"path": "\xff.png", "class": 1}')
    entries = labels_module.read_labels(str(labels))
    assert "labels.jsonl: entries" in (printed := capsys.readouterr().err) and ": 10" in printed
    assert entries == {"a.png": {"class": "1", "hashtags": ["#x"], "captions": []},
                       "c.png": {"captions": []}}  # fmt: skip
    labels.write_text(lines[0])
    source, _ = data.open_sources(folder, labels=str(labels))
    assert source.classes == ["1"] and source.read(0)["hashtags"]() == ["#x"]
    table = tmp_path / "labels.csv"
    lines = ["path,class", "a.png,cat", "", "b.png;dog", "b.png,dog,1", "b.jfif,dog", "a.png,dog"]
    table.write_text("\n".join([*lines, "../p/b.png,cat"]))  # a path, though it begins with a dot
    source, _ = data.open_sources(folder, labels=str(table))
    assert "labels.csv: entries" in (printed := capsys.readouterr().err) and ": 4" in printed
    assert source.classes == ["cat"] and source.sizes.sum() == 2
    table.write_text('a.png,cat\nb.png,"cat\n')  # a quote would swallow what follows
    with pytest.raises(ValueError, match="cannot read labels"):
        labels_module.read_labels(str(table))


@pytest.mark.parametrize(
    "text",
    [
        'path, class\na.png, cat\nb.png,cat \n c.png ,"dog, or so"\n',
        'a.png , cat\nb.png,\tcat\nc.png, "dog, or so"\n',
        'class , path,split\n cat,a.png,x\n"cat ", b.png,x\n"dog, or so", c.png,x\n',
    ],
)
def test_spaces_around_the_cells_of_a_csv_do_not_count(tmp_path, capsys, text):
    folder = write_files(tmp_path / "p", {f"{name}.png": tile(0) for name in "abc"})
    (tmp_path / "labels.csv").write_text(text)
    source, _ = data.open_sources(folder, labels=f"{tmp_path}/labels.csv")
    assert source.classes == ["cat", "dog, or so"]
    assert relative_labels(source, folder) == {"a.png": 0, "b.png": 0, "c.png": 1}
    assert capsys.readouterr().err == ""
    # What it was before spaces were looked at, for a file that has none.
    (tmp_path / "labels.csv").write_text('path,class\na.png,cat\nb.png,cat\nc.png,"dog, or so"')
    again, _ = data.open_sources(folder, labels=f"{tmp_path}/labels.csv")
    assert again.identity == source.identity == "3 pictures, 2aa9086567593bba"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_label_is_none_and_is_counted(tmp_path, capsys, kind, empty):
    names = {"a.png": "cat", "b.png": empty, "c.png": "dog ", "d.png": "dog"}
    folder = write_files(tmp_path / "p", {name: tile(0) for name in names})
    labels = write_labels(tmp_path / f"labels{kind}", names)
    source, _ = data.open_sources(folder, labels=labels)
    assert source.classes == ["cat", "dog"]
    assert relative_labels(source, folder) == {"a.png": 0, "b.png": -1, "c.png": 1, "d.png": 1}
    assert capsys.readouterr().err == f"{labels}: pictures without a class: 1\n"
    _, val = data.open_sources(folder, folder, labels=labels, val_labels=labels)
    assert relative_labels(val, folder)["b.png"] == -1


def test_categories_of_one_name_are_one_class_and_that_is_said(tmp_path, capsys):
    folder = write_files(tmp_path / "p", {"a.png": tile(0), "b.png": tile(1)})
    content = {"images": [{"id": i, "file_name": f"{'ab'[i]}.png"} for i in range(2)]}
    content["categories"] = [{"id": i, "name": "crane"} for i in range(2)]
    content["annotations"] = [{"image_id": i, "category_id": i} for i in range(2)]
    (tmp_path / "labels.json").write_text(json.dumps(content))
    source, _ = data.open_sources(folder, labels=f"{tmp_path}/labels.json")
    assert source.classes == ["crane"] and source.labels.tolist() == [0, 0]
    assert "categories of the same name, each of which is one class (1): crane" in (
        capsys.readouterr().err
    )


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
def test_a_csv_that_is_refused_says_what_it_wants_and_what_it_found(tmp_path, text, key, first):
    folder = write_files(tmp_path / "p", {"a.png": tile(0)})
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match="labels.csv lists no pictures: want lines of") as error:
        data.open_sources(folder, labels=f"{tmp_path}/labels.csv", caption_key=key)
    said = f"or a head line that names path, and class or {key}; the first line is {first}"
    assert one_line(error).endswith(said)


@pytest.mark.parametrize(
    "text, classes",
    [
        ("path,label\na.png,x\nb.png,y", ["x", "y"]),
        ("path,hashtags\na.png,x\nb.png,y", ["x", "y"]),
        ("a.png,path\nb.png,road", ["path", "road"]),  # classes of these names
        ("a.png,caption\nb.png,class", ["caption", "class"]),
        ("class,path\nx,a.png\ny,b.png", ["x", "y"]),
    ],
)
def test_columns_are_known_by_a_head_line_that_names_them(tmp_path, capsys, text, classes):
    """Others are path and class; and a first row that names a picture is no head line."""
    folder = write_files(tmp_path / "p", {"a.png": tile(0), "b.png": tile(1)})
    labels = tmp_path / "labels.csv"
    labels.write_text(text)
    source, _ = data.open_sources(folder, labels=str(labels))
    assert source.classes == classes
    assert relative_labels(source, folder) == {"a.png": 0, "b.png": 1}
    other = text.startswith(("path,label", "path,hashtags"))
    assert ("is taken as a header" in capsys.readouterr().err) is other


def test_a_first_row_that_is_damaged_is_counted(tmp_path, capsys):
    write_files(tmp_path, {"labels.csv": b"a.png,cat,dog\nb.png,cat\n"})
    entries = labels_module.read_labels(f"{tmp_path}/labels.csv")
    assert entries == {"b.png": {"class": "cat", "captions": []}}
    assert capsys.readouterr().err.endswith("against an earlier one): 1\n")


def test_a_head_line_that_names_no_path_is_said(tmp_path, capsys):
    folder = write_files(tmp_path / "p", {"a.png": tile(0)})
    labels = tmp_path / "labels.csv"
    for text, said in (
        ("image, label\na.png,cat\n", True),
        ("a.jfif,dog\na.png,cat\n", True),
        ("path,class\na.png,cat\n", False),
        ("a.png,cat\n", False),
    ):
        labels.write_text(text)
        source, _ = data.open_sources(folder, labels=str(labels))
        assert source.classes == ["cat"]
        first = repr(text.splitlines()[0].replace(" ", ""))
        why = "is taken as a header; its columns are read as path and class"
        line = f"{labels}: {first} {why}\n"
        assert capsys.readouterr().err == (line if said else "")


INATURALIST = {
    "images": [{"id": 1, "file_name": "a.png"}],
    "categories": [{"id": 2, "name": "cat"}],
    "annotations": [{"image_id": 1, "category_id": 2}],
}


@pytest.mark.parametrize(
    "name, content",
    [
        ("missing.csv", None),
        ("empty.csv", b""),
        ("only-a-header.csv", b"path,class\n"),
        ("one-column.csv", b"path,class\na.png\n"),
        ("three-columns.csv", b"a.png,cat,dog\n"),
        ("latin.csv", "größe.png,cat\n".encode("latin-1")),
        ("open-quote.csv", b'"' + b"a.png,cat\n" * 20_000),
        ("damaged.jsonl", b"{\n[]\n"),
        ("a.txt", b"a.png,cat\n"),
        ("empty.json", b""),
        ("cut.json", json.dumps(INATURALIST).encode()[:-5]),
        ("list.json", b"[]"),
        ("number.json", b"5"),
        ("no-annotations.json", json.dumps(INATURALIST | {"annotations": []}).encode()),
        ("no-images.json", json.dumps(INATURALIST | {"images": []}).encode()),
        ("no-categories.json", json.dumps({**INATURALIST, "categories": []}).encode()),
        ("text-as-images.json", json.dumps(INATURALIST | {"images": "a.png"}).encode()),
        ("number-as-file.json", json.dumps(INATURALIST).replace('"a.png"', "5").encode()),
    ],
)
def test_a_wrong_file_of_labels_is_one_line_that_names_it(tmp_path, name, content):
    folder = write_files(tmp_path / "p", {"a.png": tile(0)})
    if content is not None:
        write_files(tmp_path, {name: content})
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
