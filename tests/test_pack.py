"""test_pack"""

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

import numpy as np
import pytest
from conftest import (
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
    textured,
    tile,
    write_files,
    write_tar,
)
from PIL import Image

import data
from support import pack as pack_module

# --------------------------------------------------------------------------------------------- pack


def pack(folder, pattern, **options):
    """data.pack, and what it wrote: {key: {extension: bytes}} by Python's tarfile, in order."""
    pack_module.pack(str(folder), str(pattern), **options)
    shards = sorted(path for path in Path(pattern).parent.glob("*.tar"))
    return {path.name: tar_files(path) for path in shards}


def tar_files(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}


def test_packed_shards_hold_the_same_bytes_and_classes(pets, tmp_path, capsys):
    folder, files = pets
    packed = pack(folder, tmp_path / "out" / "p-%03d.tar", shard_size=6)
    assert list(packed) == [f"p-{number:03}.tar" for number in range(4)]
    assert [len(members) for members in packed.values()] == [12, 12, 12, 4]
    # The line that it prints can be typed, and gives the same samples in the same order.
    where = re.search(r"--data '(.+)'", capsys.readouterr().out)[1]
    source, plain = opened(where), everything(opened(folder))
    assert source.classes == ["cat", "dog"]
    assert [sample[1:] for sample in everything(source)] == [sample[1:] for sample in plain]
    joined = [member for members in packed.values() for member in members.items()]
    expected = []
    for number, (name, label, _) in enumerate(plain):
        path = os.path.relpath(name, folder)  # "dog/07.png"
        key = f"{number:08}_{path[:3]}_{path[4:6]}"
        expected += [(f"{key}.png", files[path]), (f"{key}.cls", str(label).encode())]
    assert joined == expected
    record = json.loads((tmp_path / "out" / "pack.json").read_text())
    assert record["classes"] == ["cat", "dog"] and list(record["packed"]) == ["p-%03d.tar"]


def test_one_shard_and_flat_pictures(tmp_path, capsys):
    folder = write_files(tmp_path / "flat", {"a.png": tile(1)})
    packed = pack(folder, tmp_path / "out-%05d.tar")
    assert packed == {"out-00000.tar": {"00000000_a.png": tile(1)}}  # and no class
    where = re.search(r"--data '(.+)'", capsys.readouterr().out)[1]
    source = opened(where)
    assert source.classes is None and source.read(0)["class"] == -1


def test_pack_makes_enough_shards_for_the_lanes(tmp_path):
    folder = write_files(tmp_path / "many", {f"{i}.png": tile(i) for i in range(100)})
    assert len(pack(folder, tmp_path / "out" / "p-%03d.tar")) >= 34  # 100 / 48 rounded up is 3


def test_an_interrupted_pack_goes_on_and_ends_the_same(pets, tmp_path):
    folder, _ = pets
    out = tmp_path / "out"
    pack(folder, out / "p-%d.tar", shard_size=3)
    whole = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    assert len(whole) == 7
    # As a kill leaves it: some shards, no index, half of a temporary file.
    for path in [*(out / f"p-{number}.tar" for number in (4, 5, 6)), *out.glob("*.index")]:
        path.unlink()
    (out / "p-4.tar.tmp").write_bytes(whole["p-4.tar"][:1500])
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    pack(folder, out / "p-%d.tar", shard_size=3)
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")} == whole
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert not list(out.glob("*.tmp"))
    assert opened(f"{out}/p-*.tar").sizes.sum() == 20


def test_what_another_pack_or_someone_else_wrote_is_neither_kept_nor_mixed(pets, tmp_path):
    folder, files = pets
    pack(folder, tmp_path / "out" / "p-%d.tar", shard_size=4)
    other = write_files(tmp_path / "other", files | {"dog/one-more.png": tile(99)})
    write_tar(tmp_path / "foreign-1.tar", members_of(range(3)))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for source, pattern, options in (
        (folder, "out/p-%d.tar", {"shard_size": 4, "short_side": 2}),
        (folder, "out/p-%d.tar", {"shard_size": 5}),
        (folder, "out/p-%d.tar", {"shard_size": 20}),
        (other, "out/p-%d.tar", {"shard_size": 4}),
        (folder, "foreign-%d.tar", {"shard_size": 4}),
    ):
        with pytest.raises(ValueError, match="not of these pictures and options") as error:
            pack_module.pack(str(source), f"{tmp_path}/{pattern}", **options)
        one_line(error)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "content", ["", "{", "\0", "[]", "5", '"text"', "{}", '{"classes": null}', '{"packed": {}}',
                '{"classes": null, "packed": 5}'],
)  # fmt: skip
def test_a_damaged_pack_json_is_one_line_that_says_what_to_do(pets, tmp_path, content):
    folder, _ = pets
    shard = write_tar(tmp_path / "a.tar", members_of(range(3)))
    (tmp_path / "pack.json").write_text(content)
    for work in (
        lambda: opened(shard),
        lambda: pack_module.pack(str(folder), f"{tmp_path}/p-%d.tar"),
    ):
        with pytest.raises(ValueError, match="pack.json is damaged.*: remove it") as error:
            work()
        one_line(error)
    assert not list(tmp_path.glob("p-*"))


def test_short_side_scales_only_what_is_larger(tmp_path):
    clear = np.dstack([painting(30, 60), painting(30, 60)[:, :, 0]])
    files = {
        "large.jpg": encoded(painting(120, 200), "JPEG", quality=95),
        "turned.jpg": photo(painting(120, 200), 6, "JPEG", quality=95),
        "rough.jpg": encoded(textured(120, 200)[:, :, 0], "JPEG", quality=95),
        "clear.png": encoded(clear),
        "grey.png": encoded(painting(90, 60)[:, :, 1]),
        "deep.png": encoded(Image.fromarray(painting(90, 60)[:, :, 1].astype(np.uint16) * 257)),
        "tagged.png": encoded(painting(90, 60), exif=b"Exif\0\0this is no TIFF header"),
        "small.png": encoded(painting(10, 60)),
        "exact.jpg": encoded(painting(24, 48), "JPEG"),
        "broken.jpg": encoded(painting(120, 200), "JPEG")[:900],
    }
    folder = write_files(tmp_path / "photos", files)
    (packed,) = pack(folder, tmp_path / "p-%d.tar", short_side=24, shard_size=99).values()
    packed = {name.split("_", 1)[1]: content for name, content in packed.items()}
    for name in ("small.png", "exact.jpg", "broken.jpg"):
        assert packed.pop(name) == files[name]
    images = {name[:-4]: Image.open(io.BytesIO(content)) for name, content in packed.items()}
    sizes = {name: image.size for name, image in images.items()}
    assert sizes == {
        "large": (40, 24),
        "turned": (40, 24),  # stored upright now
        "rough": (40, 24),
        "clear": (48, 24),
        "grey": (24, 36),
        "deep": (24, 36),
        "tagged": (24, 36),
    }
    assert all(image.getexif().get(274, 1) == 1 for image in images.values())
    # JPEG at quality 90 is off by some levels: on average less than 4 (seen: 3).
    for name, image in images.items():
        (original,) = (files[file] for file in files if file.startswith(name))
        expected = decoded(original, image.size[::-1], 4)
        assert np.abs(np.asarray(image.convert("RGBA")) - expected).mean() < 4, name


def test_keys_of_a_shard_are_unique_and_readable(tmp_path):
    names = [
        "a.jpg",
        "a.png",
        "a.webp",
        "b.c.d.png",
        "b.c.e.png",
        "b_c_d.png",
        "x.y/z.png",
        "a~2.png",
    ]
    kinds = {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}
    files = {
        name: encoded(np.full((4, 4, 3), 20 * i, "u1"), kinds[name.rpartition(".")[2]])
        for i, name in enumerate(names)
    }
    folder = write_files(tmp_path / "names", files)
    (packed,) = pack(folder, tmp_path / "p-%d.tar", shard_size=99).values()
    assert Counter(packed.values()) == Counter(files.values())
    source = opened(f"{tmp_path}/p-0.tar")
    assert source.sizes.tolist() == [len(names)]  # no two of them became one sample
    packed_pixels, pixels = (
        sorted(pixels for _, _, pixels in everything(s)) for s in (source, opened(folder))
    )
    assert packed_pixels == pixels


def test_val_packed_after_train_keeps_the_numbers_of_the_classes(tmp_path):
    out = tmp_path / "out"
    train = {f"{kind}/{i}.png": tile(i) for kind in ("cat", "dog", "emu") for i in range(2)}
    pack(write_files(tmp_path / "train", train), out / "train-%d.tar", shard_size=9)
    val = {f"{kind}/{i}.png": tile(i) for kind in ("dog", "emu") for i in range(2)}
    packed = pack(write_files(tmp_path / "val", val), out / "val-%d.tar", shard_size=9)
    labels = {n[9:-4]: int(c) for n, c in packed["val-0.tar"].items() if n.endswith(".cls")}
    assert labels == {"dog_0": 1, "dog_1": 1, "emu_0": 2, "emu_1": 2}
    for name in ("train", "val"):
        assert opened(f"{out}/{name}-0.tar").classes == ["cat", "dog", "emu"]
    pack(tmp_path / "train", out / "train-%d.tar", shard_size=9)  # both are still known
    pack(tmp_path / "val", out / "val-%d.tar", shard_size=9)
    with pytest.raises(ValueError, match="yak") as error:
        more = write_files(tmp_path / "more", val | {"yak/1.png": tile(1)})
        pack_module.pack(more, f"{out}/more-%d.tar")
    one_line(error)
    assert not list(out.glob("more*"))


def test_numbered_folders_are_packed_by_their_numbers(tmp_path):
    """But an earlier pack's order stays, where an interrupted one goes on or val is added."""
    files = {f"{i}/{j}.png": tile(10 * i + j) for i in (0, 2, 10) for j in range(2)}
    folder, out = write_files(tmp_path / "numbered", files), tmp_path / "out"

    def labels(source):
        return sorted((source.classes[label], pixels) for _, label, pixels in everything(source))

    expected = labels(opened(folder))
    pack(folder, out / "p-%d.tar", shard_size=2)
    assert opened(f"{out}/p-*.tar").classes == ["0", "2", "10"]
    assert labels(opened(f"{out}/p-*.tar")) == expected
    record = json.loads((out / "pack.json").read_text())
    (out / "pack.json").write_text(json.dumps(record | {"classes": ["0", "10", "2"]}))
    for path in out.glob("p-*.tar*"):
        path.unlink()
    pack(folder, out / "p-%d.tar", shard_size=2)
    pack(folder, out / "q-%d.tar", shard_size=2)
    for name in "pq":
        source = opened(f"{out}/{name}-*.tar")
        assert source.classes == ["0", "10", "2"] and labels(source) == expected
    # A folder beside these shards has their numbers; shards beside the folder are refused.
    train, val = data.open_sources(f"{out}/p-*.tar", folder)
    assert train.classes == val.classes and labels(val) == expected
    with pytest.raises(ValueError, match="other classes than train") as error:
        data.open_sources(folder, f"{out}/p-*.tar")
    one_line(error)


def test_folders_that_number_their_classes_differently_are_not_one_source(tmp_path):
    for name, kinds in (("one", ("cat", "dog")), ("two", ("dog", "emu"))):
        folder = write_files(tmp_path / name, {f"{kind}/0.png": tile(1) for kind in kinds})
        pack(folder, tmp_path / f"{name}-shards" / "p-%d.tar")
    with pytest.raises(ValueError, match="number their classes differently") as error:
        opened(f"{tmp_path}/*-shards/p-*.tar")
    one_line(error)


@pytest.mark.parametrize(
    "pattern", ["out.tar", "out-%s-%s.tar", "out-%d-%d.tar", "out-%.tar", "o{a,b}-%d.tar"]
)
def test_a_pattern_without_one_number_is_refused(pets, tmp_path, pattern):
    with pytest.raises(ValueError, match=r"%05d") as error:
        pack_module.pack(str(pets[0]), f"{tmp_path}/new/{pattern}")
    one_line(error)
    assert not (tmp_path / "new").exists()


def command_line(*arguments):
    """`python data.py ...` in a process of its own."""
    command = [sys.executable, data.__file__, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "env": environment, "timeout": 120}
    return subprocess.run(command, check=False, **options)


def test_pack_of_a_missing_folder_is_one_line_and_status_2(tmp_path):
    result = command_line("pack", tmp_path / "missing", tmp_path / "out" / "p-%d.tar")
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(rf"data.py: .*{tmp_path}/missing.*\n", result.stderr)
    assert not (tmp_path / "out").exists()


def test_pack_on_the_command_line_names_what_it_cannot_scale(tmp_path):
    """Between one and two times Pillow's limit a bomb is only a warning there, and an error here.
    (In a process of its own, because pytest keeps warnings to itself.)"""
    bomb = handmade_png(10_000, 10_000, 1, 0, bytes(1251 * 10_000))
    files = {"bomb.png": bomb, "a.png": encoded(painting(30, 40))}
    folder = write_files(tmp_path / "photos", files)
    result = command_line("pack", folder, tmp_path / "p-%d.tar", "--short-side", 8)
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "bomb.png" in line]
    assert "DecompressionBombWarning" in line and "--max-pixels" in line
    assert "a.png" not in result.stdout + result.stderr
    joined = {k[9:]: v for path in tmp_path.glob("*.tar") for k, v in tar_files(path).items()}
    assert joined["bomb.png"] == bomb
    where = re.search(r"--data '(.+)'", result.stdout)[1]
    assert opened(where).sizes.sum() == 2


PACK_AND_MEASURE = """
import sys
from support.pack import pack
def memory():  # the peak, in MB. (That of getrusage may be the parent's, which made the picture.)
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
small, large, out = sys.argv[1:]
pack(small, f"{out}/s-%d.tar", 64)
before = memory()
pack(large, f"{out}/l-%d.tar", 64, max_pixels=108_000_000)
print(memory() - before)
"""


def test_a_huge_jpeg_is_packed_in_little_memory(tmp_path):
    """108 megapixels, over the usual limit, decoded at an eighth of its sides. (The picture is
    grey, and its file small, so that the test is cheap.)"""
    small = write_files(tmp_path / "small", {"a.jpg": encoded(painting(200, 200), "JPEG")})
    ramp = Image.linear_gradient("L").resize((12_000, 9000), Image.Resampling.BILINEAR)
    large = write_files(tmp_path / "large", {"a.jpg": encoded(ramp, "JPEG", quality=90)})
    command = [sys.executable, "-c", PACK_AND_MEASURE, small, large, str(tmp_path)]
    folder = os.path.dirname(data.__file__)
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    # 10 MB were measured, and 520 where it is decoded whole (108 million pixels, of 4 bytes each
    # once they are RGB): no allocator's habits come near 100 from either side.
    assert float(ran.stdout.splitlines()[-1]) < 100
    (content,) = tar_files(tmp_path / "l-0.tar").values()
    shown = Image.open(io.BytesIO(content))
    assert shown.size == (85, 64)
    expected = np.asarray(ramp.resize((85, 64), Image.Resampling.BOX)).astype(int)
    assert np.abs(np.asarray(shown.convert("L")) - expected).max() <= 4


def test_another_limit_of_pixels_is_another_pack(tmp_path, monkeypatch, capsys):
    """What an earlier pack left as it was, because it was too large, is not kept silently."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", data.MAX_PIXELS)
    large, small = (encoded(Image.new("L", size)) for size in ((500, 400), (200, 100)))
    folder = write_files(tmp_path / "photos", {"large.png": large, "small.png": small})
    flags = ["pack", folder, tmp_path / "p-%d.tar", "--short-side", 50, "--shard-size", 9]
    assert run_main(monkeypatch, *flags, "--max-pixels", 70_000) == 0
    assert "large.png cannot be read" in capsys.readouterr().err
    packed = tar_files(tmp_path / "p-0.tar")
    assert large in packed.values() and small not in packed.values()
    assert run_main(monkeypatch, *flags) == 2
    assert "not of these pictures and options" in capsys.readouterr().err
    assert run_main(monkeypatch, *flags, "--max-pixels", 65_535) == 2
    assert "--max-pixels: 65535 is not at least 65536" in capsys.readouterr().err
    assert run_main(monkeypatch, *flags, "--max-pixels", "abc") == 2
    assert "--max-pixels: abc is not at least 65536, the number" in capsys.readouterr().err


def test_index_on_the_command_line(shards, monkeypatch, capsys):
    folder, pattern = shards
    assert run_main(monkeypatch, "index", pattern) == 0
    assert "23 pictures in 5 shards" in capsys.readouterr().out
    assert len(list(folder.glob("*.index"))) == 5


def test_index_of_what_is_no_shard_is_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    write_files(tmp_path, {"text.tar": b"no tar " * 500})
    for where in ("text.tar", "missing.tar", "none-*.tar"):
        assert run_main(monkeypatch, "index", tmp_path / where) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and where in lines[0]


@pytest.mark.parametrize("flag", ["--short-side", "--shard-size"])
@pytest.mark.parametrize("value", [0, -5])
def test_sizes_that_make_no_sense_are_refused(pets, tmp_path, monkeypatch, capsys, flag, value):
    arguments = ["pack", pets[0], tmp_path / "out" / "p-%d.tar", flag, value]
    assert run_main(monkeypatch, *arguments) == 2
    assert flag in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_pack_keeps_the_place_of_a_file_that_cannot_be_read(pets, tmp_path, capsys):
    folder, files = pets
    os.symlink("/no/such/file", folder / "cat" / "gone.png")
    packed = pack(folder, tmp_path / "out" / "p-%d.tar", shard_size=99)["p-0.tar"]
    assert {name[9:]: c for name, c in packed.items()}["cat_gone.png"] == b""
    assert len(packed) == 2 * (len(files) + 1)
    assert "gone.png cannot be read" in capsys.readouterr().err


def test_what_pack_prints_names_its_own_shards_alone(pets, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a[1]"
    for pattern in (folder / "val-%02d.tar", folder / "%02d.tar"):
        assert run_main(monkeypatch, "pack", pets[0], pattern, "--shard-size", 7) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    assert "20 pictures in 3 shards" in printed
    (where,) = shlex.split(printed.split("--data ")[1])
    assert where == f"{folder}/{{00..02}}.tar"
    assert [Path(path).name for path in opened(where).paths] == ["00.tar", "01.tar", "02.tar"]
    assert opened(folder / "val-00.tar").sizes.tolist() == [7]  # a path, though it looks like more


def test_the_number_of_a_shard_is_in_its_file_s_name(pets, tmp_path):
    with pytest.raises(ValueError, match="in the file's name"):
        pack_module.pack(str(pets[0]), f"{tmp_path}/%d/p.tar")
    assert not list(tmp_path.glob("[0-9]*"))


def test_classes_left_by_an_earlier_pack_are_named_with_their_file(pets, tmp_path):
    pack(pets[0], tmp_path / "out" / "p-%d.tar")
    other = write_files(tmp_path / "other", {"cow/a.png": tile(1), "dog/b.png": tile(2)})
    with pytest.raises(ValueError, match="classes that train has not: cow.*out/pack.json"):
        pack_module.pack(str(other), f"{tmp_path}/out/q-%d.tar")


def test_ctrl_c_is_one_line(pets, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pack_module, "pack", interrupted)
    assert run_main(monkeypatch, "pack", pets[0], tmp_path / "p-%d.tar") == 130
    assert capsys.readouterr().err == "data.py: stopped: type the same command again\n"
