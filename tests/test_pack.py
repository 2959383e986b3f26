"""support/pack.py: pictures -> shards, their index and listing, and the command line."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import (
    ROOT,
    decoded,
    encoded,
    everything,
    handmade_png,
    members_of,
    one_line,
    opened,
    painting,
    photo,
    run_main,
    tile,
    write_files,
    write_tar,
)
from PIL import Image

import data
from support import pack as pack_module


def pack(folder, pattern, **options):
    """pack(), and what it wrote: {shard: {member: bytes}} by Python's tarfile, in order."""
    pack_module.pack(str(folder), str(pattern), **options)
    return {path.name: tar_files(path) for path in sorted(Path(pattern).parent.glob("*.tar"))}


def tar_files(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}


def bytes_in(folder, names="*"):
    return {path: path.read_bytes() for path in Path(folder).rglob(names) if path.is_file()}


def refused(function, *arguments, words, **options):
    """It raises ValueError with these words, one line."""
    with pytest.raises(ValueError, match=words) as error:
        function(*map(str, arguments), **options)
    one_line(error)


# --------------------------------------------------------------------------------------------- pack


def test_packed_shards_hold_the_same_bytes_and_classes(pets, tmp_path, capsys):
    (folder, files), out = pets, tmp_path / "a[1]"
    pack_module.pack(str(folder), f"{out}/val-%03d.tar", shard_size=20)
    packed = pack(folder, out / "%03d.tar", shard_size=6)
    assert list(packed) == ["000.tar", "001.tar", "002.tar", "003.tar", "val-000.tar"]
    assert [len(members) for members in packed.values()] == [12, 12, 12, 4, 40]
    # The line that it prints can be typed, and gives the same samples in the same order.
    printed = capsys.readouterr().out.splitlines()[-1]
    assert "20 pictures in 4 shards" in printed
    (where,) = shlex.split(printed.split("--data ")[1])
    source, plain, expected = opened(where), everything(opened(folder)), []
    assert where == f"{out}/{{000..003}}.tar" and source.classes == ["cat", "dog"]
    assert [sample[1:] for sample in everything(source)] == [sample[1:] for sample in plain]
    for number, (name, label, _) in enumerate(plain):
        path = os.path.relpath(name, folder)  # "dog/07.png"
        key = f"{number:08}_{path[:3]}_{path[4:6]}"
        expected += [(f"{key}.png", files[path]), (f"{key}.cls", str(label).encode())]
    assert [*packed.pop("val-000.tar").items()] == expected
    assert [member for members in packed.values() for member in members.items()] == expected
    record = json.loads((out / "pack.json").read_text())
    assert record["classes"] == ["cat", "dog"] and [*record["packed"]] == [
        "val-%03d.tar",
        "%03d.tar",
    ]
    assert opened(out / "val-000.tar").sizes.tolist() == [20]  # a path, though it looks like more


def test_flat_pictures_have_no_class_and_enough_shards_for_the_lanes(tmp_path):
    folder = write_files(tmp_path / "flat", {"a.png": tile(1)})
    packed = pack(folder, tmp_path / "out-%05d.tar")
    assert packed == {"out-00000.tar": {"00000000_a.png": tile(1)}}
    source = opened(tmp_path / "out-00000.tar")
    assert source.classes is None and source.read(0)["class"] == -1
    folder = write_files(tmp_path / "many", {f"{i}.png": tile(i) for i in range(100)})
    assert len(pack(folder, tmp_path / "out" / "p-%03d.tar")) == 34  # of 3: 100 / 48 rounded up


def test_an_interrupted_pack_goes_on_and_ends_the_same(pets, tmp_path):
    folder, out = pets[0], tmp_path / "out"
    pack(folder, out / "p-%d.tar", shard_size=3)
    whole = bytes_in(out, "*.tar")
    assert len(whole) == 7
    # As a kill leaves it: some shards, no index, half of a temporary file.
    for path in [*(out / f"p-{number}.tar" for number in (4, 5, 6)), *out.glob("*.index")]:
        path.unlink()
    (out / "p-4.tar.tmp").write_bytes(whole[out / "p-4.tar"][:1500])
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    pack(folder, out / "p-%d.tar", shard_size=3)
    assert bytes_in(out, "*.tar") == whole and not list(out.glob("*.tmp"))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert opened(f"{out}/p-*.tar").sizes.sum() == 20


def test_shards_of_another_pack_or_program_are_neither_kept_nor_mixed(pets, tmp_path):
    pack(pets[0], tmp_path / "out" / "p-%d.tar", shard_size=4)
    write_files(tmp_path / "other", pets[1] | {"dog/one-more.png": tile(99)})
    write_tar(tmp_path / "foreign-1.tar", members_of(range(3)))
    before, words = bytes_in(tmp_path), "not of these pictures and options"
    for source, pattern, options in (
        ("pets", "out/p-%d.tar", {"short_side": 2}),
        ("pets", "out/p-%d.tar", {"shard_size": 5}),
        ("pets", "out/p-%d.tar", {"max_pixels": 1 << 20}),
        ("other", "out/p-%d.tar", {}),
        ("pets", "foreign-%d.tar", {}),
    ):
        options = {"shard_size": 4} | options
        refused(pack, tmp_path / source, tmp_path / pattern, words=words, **options)
        assert bytes_in(tmp_path) == before
    # pack.json is damaged.
    shard, record = f"{tmp_path}/out/p-0.tar", tmp_path / "out" / "pack.json"
    for text in (
        "",
        "[]",
        "5",
        "{}",
        '{"classes": null}',
        '{"classes": null, "packed": 5}',
        '{"classes": 5, "packed": {}}',
        '{"classes": null, "packed": {"a": 3}}',
    ):
        record.write_text(text)
        refused(opened, shard, words="pack.json is damaged.*: remove it")
        pattern = tmp_path / "out" / "q-%d.tar"
        refused(pack, pets[0], pattern, words="pack.json is damaged.*: remove it")
    assert not list(tmp_path.rglob("q-*"))


def test_short_side_scales_only_what_is_larger(tmp_path):
    """In test_data.py, all kinds of pictures are scaled."""
    files = {  # name: (content, size when packed; None: as it is)
        "large.jpg": (encoded(painting(120, 200), "JPEG", quality=95), (40, 24)),
        "turned.jpg": (photo(painting(120, 200), 6, "JPEG", quality=95), (40, 24)),  # upright now
        "tagged.png": (encoded(painting(90, 60), exif=b"Exif\0\0this is no TIFF header"), (24, 36)),
        "small.png": (encoded(painting(10, 60)), None),
        "exact.jpg": (encoded(painting(24, 48), "JPEG"), None),
        "broken.jpg": (encoded(painting(120, 200), "JPEG")[:900], None),
    }
    contents = {name: content for name, (content, _) in files.items()}
    folder = write_files(tmp_path / "photos", contents)
    (packed,) = pack(folder, tmp_path / "p-%d.tar", short_side=24, shard_size=99).values()
    packed = {name.split("_", 1)[1].split(".")[0]: content for name, content in packed.items()}
    assert len(packed) == len(files)
    for name, (content, size) in files.items():
        found = packed[name.split(".")[0]]
        if size is None:
            assert found == content
            continue
        image = Image.open(io.BytesIO(found))
        assert image.size == size and image.getexif().get(274, 1) == 1
        # JPEG at quality 90 is off by some levels: on average less than 4 (seen: 3).
        assert np.abs(np.asarray(image) - decoded(content, size[::-1])).mean() < 4, name


def test_keys_of_a_shard_are_unique_and_readable(tmp_path):
    names = ["a.jpg", "a.png", "a.webp", "a~2.png"]
    names += ["b.c.d.png", "b.c.e.png", "b_c_d.png", "x.y/z.png"]
    kinds, files = {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}, {}
    for i, name in enumerate(names):
        kind = kinds[name.rpartition(".")[2]]
        files[name] = encoded(np.full((4, 4, 3), 20 * i, "u1"), kind)
    folder = write_files(tmp_path / "names", files)
    os.symlink("/no/such/file", tmp_path / "names" / "gone.png")  # it keeps its position
    (packed,) = pack(folder, tmp_path / "p-%d.tar", shard_size=99).values()
    assert Counter(packed.values()) == Counter([*files.values(), b""])
    source = opened(f"{tmp_path}/p-0.tar")
    assert source.sizes.tolist() == [len(names) + 1]  # no two of them became one sample
    os.unlink(tmp_path / "names" / "gone.png")
    numbers = [n for n in range(len(names) + 1) if "gone" not in source.name(n)]
    one, two = (everything(s) for s in (data.Subset(source, numbers), opened(folder)))
    assert sorted(pixels for *_, pixels in one) == sorted(pixels for *_, pixels in two)


def test_strays_are_not_packed(tmp_path, capsys):
    names = [f"{kind}/{kind}{i}.png" for kind in ("cat", "dog") for i in range(9)]
    files = {name: tile(number) for number, name in enumerate([*names, "stray.png"])}
    packed = pack(write_files(tmp_path / "pets", files), tmp_path / "out" / "%d.tar", shard_size=99)
    assert sum(name.endswith(".cls") for name in packed["0.tar"]) == 18
    source = opened(f"{tmp_path}/out/0.tar")
    found = {name.rpartition("_")[2]: label for name, label, _ in everything(source)}
    assert found == {n[4:-4]: int(n[:3] == "dog") for n in names}
    assert "beside the folders of classes, not packed: 1" in capsys.readouterr().out


def test_val_packed_after_train_keeps_the_numbers_of_the_classes(pets, tmp_path):
    out = tmp_path / "out"
    train = {f"{kind}/{i}.png": tile(i) for kind in ("cat", "dog", "emu") for i in range(2)}
    val = {name: content for name, content in train.items() if "cat" not in name}
    pack(write_files(tmp_path / "train", train), out / "train-%d.tar", shard_size=9)
    packed = pack(write_files(tmp_path / "val", val), out / "val-%d.tar", shard_size=9)
    labels = {n[9:-4]: int(c) for n, c in packed["val-0.tar"].items() if n.endswith(".cls")}
    assert labels == {"dog_0": 1, "dog_1": 1, "emu_0": 2, "emu_1": 2}
    for name in ("train", "val"):
        assert opened(f"{out}/{name}-0.tar").classes == ["cat", "dog", "emu"]
        pack(tmp_path / name, out / f"{name}-%d.tar", shard_size=9)  # both are still known
    more = write_files(tmp_path / "more", val | {"yak/1.png": tile(1)})
    words = "classes that .*out/pack.json has not: yak"
    refused(pack, more, out / "more-%d.tar", words=words)
    assert not list(out.glob("more*"))
    # Shards of folders that number their classes in different ways are not one source.
    pack(pets[0], tmp_path / "pets" / "train-%d.tar")
    both = f"{tmp_path}/{{out,pets}}/train-0.tar"
    refused(opened, both, words="number their classes differently")


def test_numbered_folders_are_packed_by_their_numbers(tmp_path):
    """But an earlier pack's order stays, where an interrupted one goes on or val is added."""
    files = {f"{i}/{j}.png": tile(10 * i + j) for i in (0, 2, 10) for j in range(2)}
    folder, out = write_files(tmp_path / "numbered", files), tmp_path / "out"

    def labels(source):
        return sorted((source.classes[label], pixels) for _, label, pixels in everything(source))

    expected = labels(opened(folder))
    for name, classes in (("p", ["0", "2", "10"]), ("q", ["0", "10", "2"])):
        if name == "q":
            record = json.loads((out / "pack.json").read_text())
            (out / "pack.json").write_text(json.dumps(record | {"classes": classes}))
        pack(folder, out / f"{name}-%d.tar", shard_size=2)
        source = opened(f"{out}/{name}-*.tar")
        assert source.classes == classes and labels(source) == expected
    # A folder beside these shards has their numbers.
    train, val = data.open_sources(f"{out}/q-*.tar", folder)
    assert train.classes == val.classes and labels(val) == expected


PACK_AND_MEASURE = """
import sys
from support.pack import pack
def memory():  # the peak, in MB. (That of getrusage may be the parent's, which made the picture.)
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
before = memory()
pack(sys.argv[1], f"{sys.argv[1]}/p-%d.tar", 64, max_pixels=108_000_000)
print(memory() - before)
"""


def test_a_huge_jpeg_is_packed_in_little_memory(tmp_path):
    """108 megapixels, over the usual limit, decoded at an eighth of its sides. (The picture is
    grey, and its file small, so that the test is cheap.)"""
    ramp = Image.linear_gradient("L").resize((12_000, 9000), Image.Resampling.BILINEAR)
    folder = write_files(tmp_path, {"a.jpg": encoded(ramp, "JPEG", quality=90)})
    command = [sys.executable, "-c", PACK_AND_MEASURE, folder]
    printed = subprocess.check_output(command, cwd=ROOT, text=True)
    # 11 MB were measured, and 520 where it is decoded whole.
    assert float(printed.splitlines()[-1]) < 100
    (content,) = tar_files(tmp_path / "p-0.tar").values()
    expected = np.asarray(ramp.resize((85, 64), Image.Resampling.BOX)).astype(int)
    assert np.abs(np.asarray(Image.open(io.BytesIO(content)).convert("L")) - expected).max() <= 4


# ---------------------------------------------------------------------------------------- index.json


def listed(folder):
    """(classes, {shard: samples}) of index.json, whose sizes are those of the files."""
    listing = json.loads((folder / "index.json").read_text())
    for name, (size, _) in listing["shards"].items():
        assert size == (folder / name).stat().st_size
    return listing["classes"], {name: count for name, (_, count) in listing["shards"].items()}


def test_pack_and_index_list_their_shards(pets, shards, tmp_path, monkeypatch, capsys):
    for name in ("train", "val"):
        pack(pets[0], tmp_path / "out" / f"{name}-%02d.tar", shard_size=9)
    expected = {f"{n}-{i:02}.tar": c for n in ("train", "val") for i, c in enumerate((9, 9, 2))}
    assert listed(tmp_path / "out") == (["cat", "dog"], expected)
    folder, pattern = shards
    capsys.readouterr()
    expected = {f"s-{i:02}.tar": count for i, count in enumerate((7, 0, 1, 12, 3))}
    for _ in range(2):
        assert run_main(monkeypatch, "index", pattern) == 0
        assert "23 pictures in 5 shards" in capsys.readouterr().out
        assert listed(folder) == (None, expected)
    assert len(list(folder.glob("*.index"))) == 5
    (folder / "s-00.tar").unlink()
    write_tar(folder / "s-02.tar", members_of(range(5)))
    assert run_main(monkeypatch, "index", f"{folder}/s-02.tar") == 0
    del expected["s-00.tar"]
    assert listed(folder) == (None, expected | {"s-02.tar": 5})
    (folder / "index.json").write_text('{"shards": [1, 2]}')  # of another program
    assert run_main(monkeypatch, "index", f"{folder}/s-02.tar") == 2
    assert (folder / "index.json").read_text() == '{"shards": [1, 2]}'


# ---------------------------------------------------------------------------------- the command line


def test_pictures_that_cannot_be_scaled_are_named_and_packed_as_they_are(tmp_path):
    """Between one and two times Pillow's limit a bomb is a warning of Pillow's, an error here.
    (In a process of its own, because pytest keeps warnings to itself.)"""
    bomb = handmade_png(10_000, 10_000, 1, 0, bytes(1251 * 10_000))
    files = {"bomb.png": bomb, "small.png": encoded(Image.new("L", (200, 100)))}
    folder, pattern = write_files(tmp_path / "photos", files), str(tmp_path / "out" / "%d.tar")
    command = [sys.executable, data.__file__, "pack", folder, pattern, "--short-side", "50"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = [line for line in ran.stderr.splitlines() if "cannot be read" in line]
    assert "bomb.png" in line and "DecompressionBombWarning" in line and "--max-pixels" in line
    packed = [c for p in (tmp_path / "out").glob("*.tar") for c in tar_files(p).values()]
    assert len(packed) == 2 and bomb in packed and files["small.png"] not in packed


def test_max_pixels_is_the_limit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # is restored
    large, small = (encoded(Image.new("L", size)) for size in ((500, 400), (200, 100)))
    folder = write_files(tmp_path / "photos", {"large.png": large, "small.png": small})
    for limit, unread in ((200_000, []), (70_000, ["large"])):
        flags = "--short-side", 50, "--max-pixels", limit
        assert run_main(monkeypatch, "pack", folder, tmp_path / f"{limit}-%d.tar", *flags) == 0
        names = re.findall(r"(\w+).png cannot be read .*--max-pixels", capsys.readouterr().err)
        assert names == unread


PATTERNS = ["out.tar", "out-%s-%s.tar", "out-%d-%d.tar", "out-%.tar", "o{a,b}-%d.tar", "%d/p.tar"]
WRONG = [  # (arguments, words of the line)
    *((f"pack pets new/{name}", "in the file's name, as in OUT-%05d.tar") for name in PATTERNS),
    ("pack missing new/p-%d.tar", "missing"),
    ("pack pets new/p-%d.tar --short-side 0", "--short-side"),
    ("pack pets new/p-%d.tar --shard-size -5", "--shard-size"),
    ("pack pets new/p-%d.tar --max-pixels abc", "abc is not at least 65536, the number"),
    ("index text.tar", "text.tar"),
]


@pytest.mark.parametrize("arguments, words", WRONG)
def test_a_wrong_command_is_one_line_and_status_2(
    pets, tmp_path, monkeypatch, capsys, arguments, words
):
    write_files(tmp_path, {"text.tar": b"no tar " * 500})
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, *arguments.split()) == 2
    printed = capsys.readouterr()
    assert words in printed.err.splitlines()[-1] and printed.out == ""
    assert printed.err.count("\n") == 1 or printed.err.startswith("usage: ")
    assert not (tmp_path / "new").exists()


def test_ctrl_c_is_one_line(pets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pack_module, "pack", Mock(side_effect=KeyboardInterrupt))
    assert run_main(monkeypatch, "pack", pets[0], tmp_path / "p-%d.tar") == 130
    assert capsys.readouterr().err == "data.py: stopped: type the same command again\n"
