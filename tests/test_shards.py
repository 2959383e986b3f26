"""support/shards.py: patterns of shards, samples of a tar, damage, and the index."""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import queue
import shlex
import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    ODD_NAMES,
    encoded,
    everything,
    members_of,
    npy,
    one_line,
    opened,
    painting,
    picture_batches,
    run_main,
    tile,
    write_files,
    write_tar,
)
from PIL import Image

import data
from support import hashtags
from support import pack as pack_module
from support import shards as shards_module

# ----------------------------------------------------------------------------------------- patterns


def test_globs_braces_and_commas_expand_in_order(tmp_path):
    names = ["a-08", "a-09", "a-10", "a-11", "b-1", "c", "d-1/a", "d-2/a", "d-3/a"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / f"{name}.tar", members_of([0]))
    write_files(tmp_path, {"notes [v2]": b"hello"})
    write_tar(tmp_path / "texts.tar", [("a.txt", b"hello"), ("b.json", b"{}")])
    patterns = {
        "a-*.tar": "a-08 a-09 a-10 a-11",
        "a-*": "a-08 a-09 a-10 a-11",  # not the index files that lie beside them
        "a-{09..11}.tar": "a-09 a-10 a-11",
        "a-{10,08}.tar": "a-10 a-08",
        "{a-0[89],c}.tar": "a-08 a-09 c",
        "c.tar": "c",
        "d-[12]/*": "d-1/a d-2/a",
        "d-?/a.tar": "d-1/a d-2/a d-3/a",
        "*/a.tar": "d-1/a d-2/a d-3/a",
        "{d-1,d-3}/a.tar": "d-1/a d-3/a",
        "{d-1/a,d-2/a}.tar": "d-1/a d-2/a",  # across a /
    }
    for pattern, found in (*patterns.items(), *patterns.items()):
        paths = opened(tmp_path / pattern).paths
        assert paths == [f"{tmp_path}/{name}.tar" for name in found.split()]
    refused = dict.fromkeys(["d-[89]/a.tar", "d [v2]", "none/*.tar"], "no shard matches")
    refused |= {"notes [v2]": "is not a folder or a .tar", "texts.tar": "hold no pictures"}
    for where, words in refused.items():
        with pytest.raises(ValueError, match=words):
            opened(tmp_path / where)


@pytest.mark.parametrize("name, match", ODD_NAMES.items())
def test_what_exists_as_it_is_written_is_no_pattern(tmp_path, monkeypatch, capsys, name, match):
    """Pictures, lists, shards and indexes, beside what the name would match as a pattern."""
    folder, other = tmp_path / name, tmp_path / match
    files = {f"{kind}/{name} {i}.png": tile(i) for kind in (name, "plain") for i in range(2)}
    photos = opened(write_files(folder / "photos", files))
    assert photos.sizes.sum() == 4 and photos.classes == sorted([name, "plain"])
    # A list of pictures, and the index of their hashtags.
    entries = [{"path": path, "class": "x", "hashtags": ["#a", "#b"]} for path in files]
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)))
    source = data.open_sources(photos.root, labels=str(path))[0]
    assert sorted(source.paths) == sorted(files) and len(everything(source)) == 4
    hashtags.write_hashtags(source, folder / "tags", min_count=1)
    assert len(hashtags.open_hashtags(source, str(folder / "tags"))[0]) == 2
    # Shards: packed, and again, and by the line that pack prints.
    command = ["pack", folder / "photos", folder / "p-%d.tar", "--shard-size"]
    assert run_main(monkeypatch, *command, 1) == 0
    (where,) = shlex.split(capsys.readouterr().out.split("--data ")[1])
    assert [run_main(monkeypatch, *command, size) for size in (2, 1)] == [2, 0]  # it sees them
    other.mkdir()
    for number in range(9):
        write_tar(other / f"p-{number}.tar", members_of(range(30)))
    assert [one[1:] for one in everything(opened(where))] == [one[1:] for one in everything(photos)]
    shutil.copy(folder / "p-0.tar", folder / f"{name}.tar")
    patterns = {"p-{0..3}.tar": 4, "p-*.tar": 4, "p-?.tar": 4, "p-[12].tar": 2, "{p-0,p-3}.tar": 2}
    for pattern, count in (patterns | {"p-1.tar": 1, f"{name}.tar": 1}).items():
        assert opened(folder / pattern).sizes.tolist() == [1] * count
    for pattern in ("p-{0..4}.tar", "p-4.tar"):
        with pytest.raises(ValueError, match="there is no shard .*p-4.tar"):
            opened(folder / pattern)
    assert run_main(monkeypatch, "index", folder / "p-*.tar") == 0
    assert len(json.loads((folder / "index.json").read_text())["shards"]) == 4


# --------------------------------------------------------------------------------------- in a shard


def by_tarfile(path):
    """[(key, class, pixels)] of the samples of a shard that have a picture, by Python's tarfile."""
    samples, found = {}, []
    with tarfile.open(path) as tar:
        for member in filter(tarfile.TarInfo.isfile, tar.getmembers()):
            folder, base = os.path.split(member.name)
            key, _, kind = base.partition(".")
            if key:
                sample = samples.setdefault(os.path.join(folder, key), {})
                sample[kind] = tar.extractfile(member).read()
    for key, files in samples.items():
        pictures = [content for kind, content in files.items() if kind.lower().endswith("png")]
        if pictures:
            pixels = np.asarray(Image.open(io.BytesIO(pictures[0])).convert("RGB")).tolist()
            found.append((f"{path}:{key}", int(files.get("cls", -1)), pixels))
    return found


LONG = ["plain", "n" * 120, "d" * 200 + "/" + "n" * 200, "ö" * 70 + "/" + "日" * 90]
STRANGE = {
    tarfile.USTAR_FORMAT: ["plain", "d/e/nested", "d" * 90 + "/" + "n" * 60, "größe/日本"],
    tarfile.GNU_FORMAT: LONG,
    tarfile.PAX_FORMAT: LONG,
}


@pytest.mark.parametrize("kind", STRANGE)
def test_shards_hold_what_tarfile_finds(tmp_path, capsys, kind):
    members = [("d/", b""), ("d/e/", b"")]
    for number, key in enumerate([*STRANGE[kind], "last"]):
        members += [(f"{key}.png", tile(number)), (f"{key}.cls", str(number).encode())]
        members += [(f"{key}.json", b"{}")]
        if number == 1:
            members += [("notes.txt", b"hello"), ("folder.png/", b""), ("only.json", b"{}")]
            members += [(".hidden.png", tile(99)), ("folder/.cls", b"3"), ("README", b"none")]
            members += [("label-first.cls", b"8\n"), ("label-first.png", tile(50))]
            members += [("no-label.PNG", tile(51)), ("many.dots.in.it.png", tile(52))]
    path = write_tar(tmp_path / "a.tar", members, format=kind)
    expected = by_tarfile(path)
    assert len(expected) == len(STRANGE[kind]) + 4
    assert everything(opened(path)) == expected
    assert "left out" in capsys.readouterr().err
    assert everything(opened(path)) == expected  # and from the index


def test_extensions_in_a_shard_count_in_any_case(tmp_path):
    upper = [("0.JPG", encoded(painting(8, 8), "JPEG")), ("0.CLS", b"3"), ("0.TXT", b"a text")]
    mixed = [("1.Txt", b"we like #b"), ("1.Cls", b"4"), ("1.pNg", tile(1))]
    twice = [("2.PNG", tile(2)), ("2.png", tile(3)), ("2.CLS", b"5"), ("2.cls", b"6")]  # the first
    members = [*upper, ("0.JSON", b'{"hashtags": ["#a"]}'), *mixed, *twice]
    path = write_tar(tmp_path / "a.TAR", members)
    os.link(path, tmp_path / "a.tar")
    pack_module.write_listing(shards_module.Shards(f"{tmp_path}/a.tar"))
    for where in (path, f"{tmp_path}/*.TAR", f"pipe:cat {tmp_path}/a.tar"):
        source, _ = data.open_sources(where, cache=(f"{tmp_path}/cache", "1M"))
        found = [source.read(number) for number in range(int(source.sizes.sum()))]
        assert [sample["class"] for sample in found] == [3, 4, 5]
        assert [sample["captions"]() for sample in found] == [["a text"], ["we like #b"], []]
        tags = [hashtags.canonical(sample["hashtags"](), {}) for sample in found]
        assert tags == [{"a"}, {"b"}, set()]
        assert found[0]["image"]().format == "JPEG"
        for number in (1, 2):
            expected = Image.open(io.BytesIO(tile(number)))
            assert np.array_equal(found[number]["image"](), expected)


# {extension: grey value} of a sample in this order -> (the picture's value, the frames' values,
# whether the choice is said).
SEVERAL = {
    "depth": ({"depth.png": 1, "png": 2, "mask.png": 3}, 2, [2], False),
    "capitals": ({"Depth.PNG": 1, "PNG": 2}, 2, [2], False),
    "one with dots": ({"x.y.png": 1}, 1, [1], False),
    "two plain, one not": ({"depth.png": 1, "png": 2, "webp": 3}, 2, [2], True),
    "capitals of the same": ({"PNG": 1, "png": 2}, 1, [1], True),
    "frames": ({"10.png": 1, "9.png": 2, "0.png": 3}, 1, [3, 2, 1], True),
    "frames, masks": ({"0.mask.png": 1, "0.png": 2, "1.mask.png": 3, "1.png": 4}, 2, [2, 4], True),
    "frames and a cover": ({"0.png": 1, "1.png": 2, "png": 3}, 3, [1, 2], True),
    "a frame and its depth": ({"0.depth.png": 1, "0.png": 2}, 2, [2], False),
    "none is plain": ({"b.png": 1, "a.png": 2}, 1, [2, 1], True),
    "no picture": ({"json": 1}, None, None, False),
}


@pytest.fixture
def several(tmp_path):
    """A shard with the samples of SEVERAL, and its listing."""
    kinds = {"webp": {"kind": "WEBP", "lossless": True}}
    members = [
        (f"{key}.{kind}", encoded(np.full((4, 4, 3), 9 * v, "u1"), **kinds.get(kind, {})))
        for key, (values, *_) in SEVERAL.items()
        for kind, v in values.items()
    ]
    path = write_tar(tmp_path / "several.tar", members)
    pack_module.write_listing(shards_module.Shards(path))
    return path


def test_the_picture_of_a_sample_with_several_is_the_plain_one(several, tmp_path):
    def values(images):
        return [np.asarray(image.convert("L")).mean() / 9 for image in images]

    expected = [rest for rest in SEVERAL.values() if rest[1]]
    for where in (several, f"pipe:cat {several}"):
        source, _ = data.open_sources(where, cache=(f"{tmp_path}/cache", "1M"))
        assert source.sizes.tolist() == [len(expected)]
        for number, (_, one, frames, _) in enumerate(expected):
            sample = source.read(number)
            assert values([sample["image"]()]) == [one]
            video = sample["video"]()
            assert values(video.read(list(range(video.count)))) == frames


@pytest.mark.parametrize("pipe", ["", "pipe:cat "])
def test_what_is_wrong_with_shards_is_said_at_every_start(
    several, tmp_path, monkeypatch, capsys, pipe
):
    write_tar(tmp_path / "whole.tar", members_of(range(3)))
    cut = write_tar(tmp_path / "cut.tar", members_of(range(3)))
    offset = member(cut, "00001.png").offset
    os.truncate(cut, offset)
    pack_module.write_listing(shards_module.Shards(f"{tmp_path}/*.tar"))
    (tmp_path / "cut.tar.index").unlink()  # this one is made at the first start, the others were
    number = sum(told for *_, told in SEVERAL.values())
    said = [
        f"1 shards are cut or damaged, the samples before are used: {pipe}{cut} at byte {offset}",
        f"1 samples without a picture are left out, the first in {pipe}{several}",
        f"{number} samples have several pictures: NAME.000.jpg, NAME.001.jpg",
    ]
    for rank in ("0", "0", "3"):  # the first process of a run says it for all
        monkeypatch.setenv("RANK", rank)
        capsys.readouterr()
        pattern = f"{pipe}{tmp_path}/{{whole,several,cut}}.tar"
        data.open_sources(pattern, cache=(f"{tmp_path}/cache", "1M"))
        expected = said if rank == "0" else []
        for line, text in zip(capsys.readouterr().err.splitlines(), expected, strict=True):
            assert text in line


def test_labels_that_are_missing_unreadable_or_cut(tmp_path):
    """A label that cannot be read is unknown, not bad; one that is cut is not taken for another."""
    texts = {"00003.cls": b"cat", "00004.cls": b"", "00005.cls": b"-7"}
    members = [(n, texts.get(n, c)) for n, c in members_of(range(6)) if n != "00002.cls"]
    path = write_tar(tmp_path / "a.tar", [*members, ("x.png", tile(6)), ("x.cls", b"12")])
    os.truncate(path, member(path, "x.cls").offset_data + 1)  # a 1 is left of it
    batch = picture_batches(opened(path), (4, 4), 3, 7)[0]
    assert batch["labels"].tolist() == [0, 1, -1, -1, -1, -1, -1]
    assert batch["weight"].tolist() == [1] * 6 + [0]


def test_a_link_in_a_shard_is_counted_as_unreadable(tmp_path):
    """tar stores the second of two hard-linked files without its bytes."""
    path = write_tar(tmp_path / "a.tar", members_of(range(2)))
    with tarfile.open(path, "a") as tar:
        for kind, name in ((tarfile.LNKTYPE, "hard.png"), (tarfile.SYMTYPE, "soft.png")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "00000.png"
            tar.addfile(link)
    batch = picture_batches(opened(path), (4, 4), 3, 4)[0]
    assert batch["weight"].tolist() == [1, 1, 0, 0]
    assert [line.split(": ")[0] for line in batch["bad"]] == [f"{path}:hard", f"{path}:soft"]
    assert batch["bad"][0].endswith("cannot identify image file")  # and no address of a buffer


def test_val_shards_with_other_class_numbers_are_refused(tmp_path):
    """Packed on their own, so that their dog is class 0 and train's is class 1."""
    for name, kinds in (("train", ("cat", "dog", "emu")), ("val", ("dog", "emu"))):
        folder = write_files(tmp_path / name, {f"{kind}/0.png": tile(0) for kind in kinds})
        pack_module.pack(folder, f"{tmp_path}/{name}-shards/s-%d.tar", shard_size=9)
    for where in ("train", "train-shards/s-0.tar"):
        with pytest.raises(ValueError, match="has other classes than train") as error:
            data.open_sources(f"{tmp_path}/{where}", f"{tmp_path}/val-shards/s-0.tar")
        one_line(error)


# ------------------------------------------------------------------------------------------- damage


def member(path, name):
    """A file in a tar, as tarfile finds it: where it begins, .offset, and its bytes, .offset_data."""
    with tarfile.open(path) as tar:
        return tar.getmember(name)


def test_a_tar_that_is_cut_or_damaged_gives_the_samples_before(tmp_path, capsys):
    names = ("whole.tar", "a.tar", "b.tar")
    whole, cut, damaged = (write_tar(tmp_path / name, members_of(range(12))) for name in names)
    expected = picture_batches(opened(whole), (4, 4), 3, 12)[0]
    assert capsys.readouterr() == ("", "")  # nothing is said of a tar in order
    picture = member(whole, "00007.png")
    os.truncate(cut, picture.offset_data + picture.size // 2)  # in the middle of a picture
    batch = picture_batches(opened(cut), (4, 4), 3, 12)[0]
    assert "cut" in capsys.readouterr().err
    assert batch["weight"].tolist() == [1] * 7 + [0] * 5
    assert (batch["images"][:7] == expected["images"][:7]).all()
    assert batch["labels"].tolist() == [*range(7), -1, -1, -1, -1, -1]
    assert [line.startswith(f"{cut}:00007: ") for line in batch["bad"]] == [True]
    os.truncate(cut, picture.offset)  # between two files
    with open(damaged, "r+b") as file:
        file.seek(picture.offset)
        file.write(b"\xff" * 512)
    for path in (cut, damaged):
        assert len(everything(opened(path))) == 7
        said = f"cut or damaged, the samples before are used: {path} at byte {picture.offset}"
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize(
    "change, bad",
    [
        (lambda path: os.truncate(path, 3000), 3),  # in the second of four samples
        (lambda path: os.truncate(path, 0), 4),
        (lambda path: Path(path).write_bytes(bytes(20_480)), 4),
        (os.remove, 4),
    ],
    ids=["cut", "empty", "zeros", "gone"],
)
def test_a_shard_that_changes_under_an_open_source_is_not_fatal(tmp_path, change, bad, read_before):
    path = write_tar(tmp_path / "a.tar", members_of(range(4)))
    batches = picture_batches(opened(path), (4, 4), 3, 4)
    if read_before:
        assert batches[0]["bad"] == []
        bad = 0 if change is os.remove else bad  # an open file outlives its name
    change(path)
    batch = batches[0]
    assert batch["weight"].tolist() == [1] * (4 - bad) + [0] * bad
    assert len(batch["bad"]) == bad
    assert all(line.startswith(path) for line in batch["bad"])


# ------------------------------------------------------------------------------------------ indexes


def all_by_tarfile(folder):
    return [sample for path in sorted(folder.glob("*.tar")) for sample in by_tarfile(path)]


def test_the_index_says_where_samples_lie_and_is_made_once(shards, monkeypatch):
    folder, pattern = shards
    source, samples = opened(pattern), all_by_tarfile(folder)
    assert source.sizes.tolist() == [7, 0, 1, 12, 3] and source.classes is None
    assert everything(source) == samples
    assert [label for _, label, _ in samples] == [number % 10 for number in range(23)]
    tars = sorted(folder.glob("*.tar"))
    times = {path: Path(f"{path}.index").stat().st_mtime_ns for path in tars}
    assert len(list(folder.iterdir())) == 2 * len(tars)
    for path in tars:
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        edges = [m.offset for m in members if m.name.endswith(".png")]  # a .cls comes after it
        edges += [m.offset_data + 512 for m in members[-1:]]  # of one byte, so in one block
        rows = shards_module.shard_index(path)[1].tolist()
        assert rows == [list(pair) for pair in itertools.pairwise(edges)]
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "scan_tar", lambda _: pytest.fail("scanned again"))
        assert everything(opened(pattern)) == samples
    assert times == {path: Path(f"{path}.index").stat().st_mtime_ns for path in tars}
    path = folder / "s-03.tar"
    for numbers in (range(80, 85), range(90, 95)):  # replaced: another size first, then the same
        before = path.stat()
        write_tar(path, members_of(numbers))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))
        source = opened(pattern)
        assert source.sizes.tolist() == [7, 0, 1, 5, 3]
        assert everything(source) == all_by_tarfile(folder)


def damaged_indexes(content, path):
    """Contents of an index of a shard that are wrong, and None for a missing one."""
    yield from (None, b"this is no index\n" * 30, bytes(len(content)))
    yield content[:64] + b"\x7f" * (len(content) - 64)
    yield from (content[:end] for end in range(0, len(content), 4))
    for place, change in itertools.product(range(len(content)), (1, 128)):
        yield content[:place] + bytes([content[place] ^ change]) + content[place + 1 :]
    # As an earlier version wrote them, without checksums, with two samples exchanged.
    stamp, rows = [path.stat().st_size, path.stat().st_mtime_ns], shards_module.scan_tar(path)[1]
    yield npy(np.array([stamp, *rows[[1, 0, 2]]]))


def test_whatever_is_wrong_with_an_index_the_samples_are_right(tmp_path):
    samples = [*members_of(range(3)), ("y.txt", b"")]
    path = Path(write_tar(tmp_path / "a.tar", samples))
    source, index = opened(path), tmp_path / "a.tar.index"
    expected, content = everything(source), index.read_bytes()
    for damaged in damaged_indexes(content, path):
        index.unlink() if damaged is None else index.write_bytes(damaged)
        assert everything(opened(path)) == expected, damaged
        assert index.read_bytes() == content, damaged
    source.open.cache_clear()
    index.write_bytes(content[:64] + content[80:96] + content[64:80] + content[96:])
    assert everything(source) == expected and index.read_bytes() == content  # of an open source


def read_often(pattern, answers):
    """Open and read all samples several times. (In a process.)"""
    answers.put([everything(opened(pattern)) for _ in range(8)])


def test_processes_that_make_the_same_index_read_the_right_samples(shards):
    folder, pattern = shards
    expected, files = everything(opened(pattern)), sorted(folder.iterdir())
    content = {path: path.read_bytes() for path in folder.glob("*.index")}
    context = multiprocessing.get_context("fork")
    answers, answered, number = context.Queue(), [], 0
    readers = [context.Process(target=read_often, args=(pattern, answers)) for _ in range(3)]
    [reader.start() for reader in readers]
    while len(answered) < len(readers):
        # Meanwhile they are removed, cut and damaged again and again.
        for path in content:
            path.unlink(missing_ok=True)
            if number % 3:
                path.write_bytes((content[path][:-1], b"\x93NUMPY")[number % 3 - 1])
        number += 1
        with contextlib.suppress(queue.Empty):
            answered.append(answers.get(timeout=0.005))
    [reader.join() for reader in readers]
    assert answered == [[expected] * 8] * 3 and everything(opened(pattern)) == expected
    assert {path: path.read_bytes() for path in folder.glob("*.index")} == content
    assert sorted(folder.iterdir()) == files  # nothing half written is left


def permission_denied(*_):
    raise PermissionError(13, "Permission denied")


def test_a_folder_that_cannot_be_written_is_indexed_elsewhere(
    shards, tmp_path, monkeypatch, capsys
):
    folder, pattern = shards
    temporary = Path(write_files(tmp_path / "temporary", {"x": b""}))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before, expected, plain = sorted(os.listdir(folder)), all_by_tarfile(folder), Path.write_bytes

    def write_bytes(path, content):
        return permission_denied() if path.parent == folder else plain(path, content)

    with monkeypatch.context() as context:
        context.setattr(os, "replace", permission_denied)
        assert everything(opened(pattern)) == expected  # though no index can be written at all
        assert "cannot write the index" in capsys.readouterr().err
        assert sorted(os.listdir(folder)) == before and len(list(temporary.iterdir())) == 1
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    assert everything(opened(pattern)) == expected
    assert sorted(os.listdir(folder)) == before
    assert capsys.readouterr().err == ""  # it is not worth a line
    indexes = {path: path.read_bytes() for path in temporary.glob("*.index")}
    assert len(indexes) == 5  # one for each shard, and they are used:
    with monkeypatch.context() as context:
        context.setattr(shards_module, "scan_tar", None)
        assert everything(opened(pattern)) == expected
    # A shard of the same path that changes is noticed here, too.
    write_tar(folder / "s-00.tar", members_of(range(50, 54)))
    assert opened(pattern).sizes.tolist() == [4, 0, 1, 12, 3]
    assert sum(path.read_bytes() != indexes[path] for path in indexes) == 1
