"""support/photos.py: AVIF, HEIC and raw files in a folder, and files that are no pictures."""

import io
import sys

import numpy as np
import pytest
from conftest import (
    TINY,
    completed,
    encoded,
    one_line,
    opened,
    painting,
    picture_batches,
    read_metrics,
    tile,
    write_files,
    write_tar,
)
from PIL import Image, features

import data
from support import pack as pack_module

RAW = ("b/1.DNG", "b/2.cr2", "b/3.nef")


@pytest.fixture
def heic():
    """The bytes of a HEIC picture of painting(32, 48)."""
    heif = pytest.importorskip("pillow_heif", reason="pip install -r requirements-dev.txt")
    file = io.BytesIO()
    heif.from_pillow(Image.fromarray(painting(32, 48))).save(file, quality=95)
    return file.getvalue()


def avif():
    return encoded(painting(32, 48), "AVIF", quality=95)


def pixels(source, number):
    return np.asarray(source.read(number)["image"]().convert("RGB")).astype(int)


def names(source):
    return sorted(source.paths)


def test_avif_is_read_in_folders_and_shards(tmp_path):
    folder = write_files(tmp_path / "photos", {"one.AVIF": avif()})
    pack_module.pack(folder, f"{tmp_path}/p-%d.tar")
    for source in (opened(folder), opened(f"{tmp_path}/p-0.tar")):
        assert source.sizes.sum() == 1
        assert abs(pixels(source, 0) - painting(32, 48)).mean() < 4


def test_of_a_sample_with_both_a_shard_gives_the_older_kind(tmp_path):
    """As before AVIF was read: runs that began with it go on with the same pictures."""
    members = [("1.avif", avif()), ("1.png", tile(1))]
    source = opened(write_tar(tmp_path / "0.tar", members))
    assert source.read(0)["image"]().format == "PNG"


def test_heic_is_read_where_pillow_heif_is_installed(heic, tmp_path):
    """Also in loader processes, and if its name says that it is a JPEG."""
    files = {f"{i}.{kind}": heic for i, kind in enumerate(("heic", "HEIF", "jpg"))}
    folder = write_files(tmp_path / "photos", files)
    pack_module.pack(folder, f"{tmp_path}/p-%d.tar", shard_size=9)
    for source in (opened(folder), opened(f"{tmp_path}/p-0.tar")):
        assert source.sizes.sum() == 3
        for number in range(3):
            assert abs(pixels(source, number) - painting(32, 48)).mean() < 4
    # A new process, such as a loader that is spawned, opens no folder before it reads.
    completed(f"{folder}/0.heic", code="import data, sys; data.open_picture(sys.argv[1]).load()")
    ran = completed(*TINY, "--data", folder, "--steps", 2, "--out", tmp_path / "run")
    assert read_metrics(tmp_path / "run")[-1]["bad"] == 0 and "cannot be read" not in ran.stderr


def test_what_cannot_be_read_is_counted_and_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # it is not installed
    monkeypatch.setattr(features, "check", lambda name: name != "avif")  # an old Pillow
    files = {"a/1.png": tile(1), "b/2.png": tile(2)}
    folder = write_files(tmp_path / "photos", files)
    before = opened(folder).identity
    write_files(folder, dict.fromkeys((*RAW, "a/3.heic", "b/4.HEIF", "a/5.avif"), b"any"))
    source = opened(folder)
    assert names(source) == sorted(files) and source.classes == ["a", "b"]
    assert source.identity == before
    heic, avif, raw = capsys.readouterr().err.splitlines()
    assert "2 HEIC pictures cannot be read (a/3.heic): " in heic
    assert heic.endswith(": pip install pillow-heif")
    assert avif.endswith("1 AVIF pictures cannot be read (a/5.avif): pip install 'pillow>=11.3'")
    assert "3 raw files of cameras cannot" in raw and raw.endswith("convert them to JPEG")
    monkeypatch.setenv("RANK", "1")
    opened(folder)
    assert capsys.readouterr().err == ""
    # Listed in a file of labels, they are left out, too.
    rows = b"a/1.png,x\nb/2.png,y\na/3.heic,x\n"
    labels = write_files(tmp_path, {"labels.csv": rows}) + "/labels.csv"
    assert names(data.open_sources(folder, labels=labels)[0]) == sorted(files)


def test_a_folder_with_nothing_else_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    folder = write_files(tmp_path, dict.fromkeys((*RAW, "a.heic"), b"any"))
    with pytest.raises(ValueError, match="no pictures in .* that can be read: 1 HEIC") as error:
        opened(folder)
    words = one_line(error)
    assert "pip install pillow-heif; 3 raw files" in words and words.endswith("to JPEG")


def test_an_unreadable_picture_is_one_also_without_pillow_heif(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    source = opened(write_files(tmp_path, {"a.jpg": b"none", "b.png": tile(1)}))
    (bad,) = picture_batches(source, (4, 4), 3, 2)[0]["bad"]
    assert bad.endswith("a.jpg: UnidentifiedImageError: cannot identify image file")


def test_previews_of_other_systems_are_no_pictures(tmp_path):
    shown = ["train/cat/a.png", "train/dog/b.png", "val/cat/c.png"]
    hidden = ["@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", ".thumbnails/a.png", "__MACOSX/a.png"]
    hidden += [f"train/cat/{name}" for name in hidden] + ["train/dog/._b.png", "val/._x.dng"]
    folder = write_files(tmp_path, dict.fromkeys([*shown, *hidden], tile(1)))
    train, val = data.open_sources(folder)
    assert names(train) == ["cat/a.png", "dog/b.png"] and names(val) == ["cat/c.png"]
