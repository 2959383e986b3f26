"""test_remote"""

import contextlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ODD_NAMES,
    Server,
    everything,
    members_of,
    npy,
    one_line,
    opened,
    picture_batches,
    run_main,
    same_batch,
    times,
    training_batches,
    write_files,
    write_tar,
)

import data
from support import pack as pack_module
from support import remote as remote_module
from support import toy


@pytest.fixture
def remote(shards, tmp_path, monkeypatch, capsys):
    """(server of the five shards of 23 samples and their index.json, pattern, cache folder)."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(remote_module, "PATIENCE", 1)
    monkeypatch.setattr(remote_module, "TIMEOUT", 0.3)
    folder, pattern = shards
    pack_module.write_listing(data.Shards(pattern))
    server = Server(folder)
    capsys.readouterr()
    yield server, f"{server.url}/s-{{00..04}}.tar", tmp_path / "cache"
    server.shutdown()
    server.server_close()


def opened_remote(pattern, cache, size="1M"):
    return data.open_sources(str(pattern), cache=(str(cache), size))[0]


def samples_of(source):
    """everything() without the places: the same wherever the shards are."""
    return [(name[-5:], label, pixels) for name, label, pixels in everything(source)]


def slow(handler, content):
    time.sleep(0.5)
    return handler.give(content)


def trickle(handler, content):
    """Slow, but never silent for long."""
    handler.send_response(200)
    handler.end_headers()
    for start in range(0, len(content), 4000):
        handler.wfile.write(content[start : start + 4000])
        time.sleep(0.02)
    return True


def hang_up(handler, content):
    handler.close_connection = True
    return True


def another_range(handler, content):
    if not handler.headers["Range"]:
        return handler.give(content, cut=1000)
    return handler.give(content[:-300], start=700)  # as long as what was asked for


FAULTS = {
    "says nothing for too long": times(1, slow),
    "slow, without a length": trickle,
    "hangs up": times(2, hang_up),
    "500": times(2, lambda handler, content: handler.send_error(500) or True),
    "429": times(1, lambda handler, content: handler.send_error(429) or True),
    "cut, knows ranges": times(1, lambda handler, content: handler.give(content, cut=1500)),
    "always cut, knows ranges": lambda handler, content: handler.give(
        content, int((handler.headers["Range"] or "bytes=0-")[6:-1]), cut=9000
    ),
    "cut, knows no ranges": times(2, lambda handler, content: handler.give(content, cut=1500)),
    "cut with a length of its own": times(
        1, lambda handler, content: handler.give(content[:1500], length=1500)
    ),
    "cut without a length": times(
        1, lambda handler, content: handler.give(content[:1500], length="none")
    ),
    "too long": times(1, lambda handler, content: handler.give(content + b"more", length="none")),
    "another range": times(2, another_range),
    "refuses the range": times(
        2,
        lambda handler, content: (
            handler.send_error(416) or True
            if handler.headers["Range"]
            else handler.give(content, cut=1500)
        ),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_a_server_does_the_samples_are_right(remote, shards, fault):
    server, pattern, cache = remote
    fresh = FAULTS[fault]
    server.faults = {"s-03.tar": fresh}
    source = opened_remote(pattern, cache)
    assert samples_of(source) == samples_of(opened(shards[1]))
    assert source.identity == opened(shards[1]).identity  # so a run may move between them
    assert server.asked()["s-03.tar"] > 1 or fault == "slow, without a length"
    assert not list(cache.glob("*.part"))


UNREACHABLE = {
    "500": lambda handler, content: handler.send_error(500) or True,
    "always cut": lambda handler, content: handler.give(content, cut=1500),
    "always short": lambda handler, content: handler.give(content[:1500]),
    "silent": slow,
    "gone": None,
}


@pytest.mark.parametrize("fault, workers", [*zip(UNREACHABLE, [0] * 5), ("500", 1)])
def test_what_cannot_be_had_is_one_clear_line_and_not_a_bad_sample(
    remote, fault, workers, monkeypatch
):
    # A DataLoader waits so long for a worker that has failed, before it ends it: 5 s.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    server, pattern, cache = remote
    batches = training_batches(source=opened_remote(pattern, cache))
    server.faults = dict.fromkeys([f"s-{n:02}.tar" for n in range(5)], UNREACHABLE[fault])
    if fault == "gone":
        server.shutdown()
        server.server_close()
    began = time.monotonic()
    with pytest.raises(
        data.Unreachable, match=f"^{server.url}/s-0..tar: .*same command goes on"
    ) as error:
        list(data.loader(batches, range(2), workers))
    assert "Traceback" not in one_line(error) and time.monotonic() - began < 10
    assert not list(cache.glob("*.tar"))  # what a worker that was ended had begun is no shard


@pytest.mark.parametrize("code", [403, 404, 410])
def test_a_shard_that_is_missing_weighs_nothing_and_is_asked_for_once(remote, shards, code):
    server, pattern, cache = remote
    server.faults["s-03.tar"] = lambda handler, content: handler.send_error(code) or True
    batches = picture_batches(opened_remote(pattern, cache), (4, 4), 3, 23)
    local = picture_batches(opened(shards[1]), (4, 4), 3, 23)[0]
    batch = batches[0]
    assert batch["weight"].tolist() == [1] * 8 + [0] * 12 + [1] * 3
    assert torch.equal(batch["images"][batch["weight"] > 0], local["images"][batch["weight"] > 0])
    assert len(batch["bad"]) == 12 and not batch["images"][8:20].any()
    assert all(line.startswith(f"{server.url}/s-03.tar: sample ") for line in batch["bad"])
    assert all(f"HTTP {code}" in line for line in batch["bad"])
    assert server.asked()["s-03.tar"] <= 2  # by who reads, and by who fetches ahead


def test_a_local_shard_that_goes_missing_weighs_nothing(shards):
    batches = picture_batches(opened(shards[1]), (4, 4), 3, 23)
    (shards[0] / "s-03.tar").unlink()
    assert batches[0]["weight"].tolist() == [1] * 8 + [0] * 12 + [1] * 3


def test_what_has_come_once_is_not_fetched_again(remote):
    server, pattern, cache = remote
    first = everything(opened_remote(pattern, cache))
    assert server.asked() == {"index.json": 1} | {f"s-{n:02}.tar": 1 for n in (0, 2, 3, 4)}
    assert everything(opened_remote(pattern, cache)) == first
    assert server.asked()["index.json"] == 2 and server.asked().total() == 6


def read_all(pattern, cache, size, seed, answers):
    """Read all samples, in an order of its own, and say what they were. (In a process.)"""
    source = opened_remote(pattern, cache, size)
    found = {}
    for number in np.random.RandomState(seed).permutation(3 * 23) % 23:
        found[int(number)] = np.asarray(source.read(number)["image"]()).tolist()
    answers.put(found)


def folder_size(folder):
    total = 0
    for path in Path(folder).glob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_the_cache_is_never_over_its_size_while_two_processes_read_through_it(remote, shards):
    server, pattern, cache = remote
    cache.mkdir()
    write_files(cache, {"mine.tar": b"not of the cache"})
    context = multiprocessing.get_context("fork")
    answers, largest = context.Queue(), 0
    readers = [
        context.Process(target=read_all, args=(pattern, cache, "70K", seed, answers))
        for seed in range(2)
    ]
    [reader.start() for reader in readers]
    while any(reader.is_alive() for reader in readers) and answers.qsize() < 2:
        largest = max(largest, folder_size(cache))
        time.sleep(0.0005)
    expected = {n: pixels for n, (*_, pixels) in enumerate(everything(opened(shards[1])))}
    for _ in readers:
        assert answers.get(timeout=60) == expected
    [reader.join() for reader in readers]
    assert 40_000 < largest <= 70_000
    assert server.asked().total() > 2 + 5  # there was not room for all
    assert (cache / "mine.tar").read_bytes() == b"not of the cache"


@pytest.mark.parametrize("ending", ["killed", "damaged"])
def test_what_was_left_of_a_fetch_is_not_used(remote, shards, ending):
    server, pattern, cache = remote
    server.faults["s-03.tar"] = trickle
    source = opened_remote(pattern, cache)
    if ending == "killed":
        reader = multiprocessing.get_context("fork").Process(target=source.read, args=(10,))
        reader.start()
        while not list(cache.glob("*.part")) or len(server.requests) < 2:
            time.sleep(0.001)
        time.sleep(0.05)
        reader.kill()
        reader.join()
        (left,) = cache.glob("*.part")
    else:
        left = Path(f"{source.cache.path(source.where(10))}.part")
        left.write_bytes((shards[0] / "s-03.tar").read_bytes()[:5000] + bytes(60_000))
    source.read(0)  # room is made for another shard
    assert not left.exists() and not list(cache.glob("*.part"))
    assert samples_of(source) == samples_of(opened(shards[1]))


DAMAGED_COPIES = {
    "another number": lambda tar, index: tar + index[:72] + b"\x01" + index[73:],
    "two samples in each other's place": lambda tar, index: (
        tar + index[:64] + index[80:96] + index[64:80] + index[96:]
    ),
    "fewer samples": lambda tar, index: tar + index[:16] + b"\x05" + index[17:],
    "of numpy": lambda tar, index: tar + npy(np.arange(24).reshape(12, 2)),
    "cut in the index": lambda tar, index: tar + index[:-3],
    "no index": lambda tar, index: tar,
    "cut in the tar": lambda tar, index: tar[:9000],
    "empty": lambda tar, index: b"",
}


@pytest.mark.parametrize("damage", DAMAGED_COPIES)
def test_a_copy_in_the_cache_that_is_damaged_is_fetched_again(remote, shards, damage):
    server, pattern, cache = remote
    source, expected = opened_remote(pattern, cache), samples_of(opened(shards[1]))
    assert samples_of(source) == expected
    copy, size = Path(source.cache.path(source.where(10))), (shards[0] / "s-03.tar").stat().st_size
    content = copy.read_bytes()
    copy.write_bytes(DAMAGED_COPIES[damage](content[:size], content[size:]))
    assert samples_of(opened_remote(pattern, cache)) == expected
    assert copy.read_bytes() == content and server.asked()["s-03.tar"] == 2
    assert samples_of(opened_remote(pattern, cache)) == expected
    assert server.asked()["s-03.tar"] == 2 and server.asked()["s-00.tar"] == 1


def test_a_copy_in_the_cache_that_is_always_damaged_is_counted(remote, monkeypatch):
    _, pattern, cache = remote
    monkeypatch.setattr(remote_module, "index_bytes", lambda *_: bytes(64))
    batch = picture_batches(opened_remote(pattern, cache), (4, 4), 3, 8)[0]
    assert batch["weight"].tolist() == [0] * 8
    assert all("damaged" in line and "s-0" in line for line in batch["bad"])


def test_a_shard_in_the_cache_that_is_used_outlives_one_that_is_not(remote):
    server, pattern, cache = remote
    source, now = opened_remote(pattern, cache, "66K"), time.monotonic()  # room for three

    def read(number):  # each a minute after the other
        nonlocal now
        now += 60
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data.time, "monotonic", lambda: now)
            source.read(number)

    for number in (8, 0, 20):  # of s-03, s-00 and s-04
        read(number)
    read(8)
    read(7)  # s-02
    read(8)
    assert server.asked() == {"index.json": 1} | {f"s-{n:02}.tar": 1 for n in (0, 2, 3, 4)}
    read(0)
    assert server.asked()["s-00.tar"] == 2


def test_who_finds_no_room_waits_for_those_who_are_fetching(remote):
    _, pattern, cache = remote
    source = opened_remote(pattern, cache, "66K")
    with remote_module.locked(f"{cache}/cached-{'0' * 16}.tar.part", "xb") as others:
        others.truncate(40_000)
        reader = threading.Thread(target=source.read, args=(10,))
        reader.start()
        reader.join(0.3)
        assert reader.is_alive() and folder_size(cache) <= 66_000
    reader.join(10)
    assert not reader.is_alive() and source.cache.has(source.where(10))


def test_shards_of_a_pipe(shards, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(remote_module, "PATIENCE", 0.2)
    folder, pattern = shards
    pack_module.write_listing(data.Shards(pattern))
    local = opened(pattern)
    for command in ("cat {}", "cat '{}' | cat", "echo '{a}' >&2; cat {} -", "dd if={}"):
        source = opened_remote("pipe:" + command.replace("{}", pattern), tmp_path / "cache")
        assert samples_of(source) == samples_of(local) and source.identity == local.identity
    failing = {
        "cat {} && echo first >&2 && echo no such bucket >&2 && exit 3": "exit status 3: no such bucket",
        "cat {} | head -c 9999": "cut after 9999 of",
        "cat {} {}.index": "more than the",
    }
    for command, why in failing.items():
        source = remote_module.RemoteShards("pipe:cat " + pattern, str(tmp_path / "other"), "1M")
        source.paths[3] = "pipe:" + command.replace("{}", f"{folder}/s-03.tar")
        source.cache.shards[source.paths[3]] = 30720
        with pytest.raises(data.Unreachable, match=why) as error:
            source.read(10)
        assert one_line(error).startswith(source.paths[3])
    assert not list((tmp_path / "other").glob("*.tar"))


def test_remote_names_and_caches_may_be_odd(remote, shards, tmp_path):
    """Addresses are written as they are or, as browsers do, with %20 for a space."""
    server, _, _ = remote
    folder, pattern = shards
    local = samples_of(opened(pattern))
    shutil.copytree(folder, server.folder / "a [v2], é?")
    index = json.loads((server.folder / "a [v2], é?" / "index.json").read_text())
    for number in range(5):
        place = server.folder / "a [v2], é?"
        (place / f"s-{number:02}.tar").rename(place / f"s[{number}].tar")
        index["shards"][f"s[{number}].tar"] = index["shards"].pop(f"s-{number:02}.tar")
    (server.folder / "a [v2], é?" / "index.json").write_text(json.dumps(index))
    for number, where in enumerate(("a [v2], é%3F", "a%20[v2],%20%C3%A9%3F")):
        for name in ODD_NAMES:
            cache = tmp_path / f"{name} {number}"
            found = opened_remote(f"{server.url}/{where}/s[{{0..4}}].tar", cache)
            assert samples_of(found) == local
    where = f"pipe:cat '{server.folder}/a [v2], é?/s[{{0..4}}].tar'"
    assert samples_of(opened_remote(where, tmp_path / "pipe")) == local


@pytest.mark.parametrize(
    "where, expected",
    [
        ("s3://bucket/{0..3}.tar", "'pipe:aws s3 cp s3://bucket/{0..3}.tar -'"),
        ("gs://bucket/0.tar", "'pipe:gcloud storage cat gs://bucket/0.tar'"),
        ("hdfs://host/0.tar", "'pipe:COMMAND-THAT-PRINTS hdfs://host/0.tar'"),
        ("URL/*.tar", "no * ?"),
        ("URL/[0-9].tar", "no * ?"),
        ("URL/s-00.zip", "ends in .tar"),
        ("pipe:cat FOLDER/*.tar", "no * ?"),
        ("pipe:cat a.tar b.tar", "one word"),
        ("pipe:cat FOLDER/none/s-00.tar", "python data.py index 'SHARDS-*.tar'"),
        ("pipe:no-such-command s-00.tar", "python data.py index 'SHARDS-*.tar'"),
        ("URL/none/s-00.tar", "404 Not Found): where the shards lie, type python data.py index"),
        ("URL/s-{03..07}.tar", "no s-05.tar"),
        ("URL/s-{3..1}.tar", "hold no pictures"),
        ("URL/damaged/s-00.tar", "cannot be used"),
        ("URL/other/s-00.tar", "cannot be used"),
    ],
)
def test_wrong_remote_data_is_one_line_that_says_what_to_do(remote, where, expected):
    server, _, cache = remote
    write_files(
        server.folder, {"damaged/index.json": b'{"shards"', "other/index.json": b'{"shards": []}'}
    )
    where = where.replace("URL", server.url).replace("FOLDER", str(server.folder))
    with pytest.raises(ValueError) as error:
        opened_remote(where, cache)
    assert expected in one_line(error)


def test_a_server_that_is_gone_from_the_start_is_one_line(remote):
    server, pattern, cache = remote
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match="index.json.*the same command goes on") as error:
        opened_remote(pattern, cache)
    one_line(error)


def test_a_cache_that_cannot_be_used_is_one_line(remote, tmp_path):
    _, pattern, cache = remote
    write_files(tmp_path, {"file": b""})
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/cache"):
        with pytest.raises(ValueError, match="--cache-dir") as error:
            opened_remote(pattern, folder)
        assert str(folder) in one_line(error)
    for size in ("", "20", "x", "20Q", "-5G", "0", "64K"):  # room for less than two
        with pytest.raises(ValueError, match="--cache-size") as error:
            opened_remote(pattern, cache, size)
        one_line(error)
    source = opened_remote(pattern, cache, "66K")
    with pytest.raises(ValueError, match="5 shards are read at once.*--cache-size 1M.*--lanes"):
        training_batches(source=source)  # six lanes
    training_batches(source=opened_remote(pattern, cache, "1M"))


def test_a_disk_that_is_full_is_one_line(remote):
    _, pattern, cache = remote
    source = opened_remote(pattern, cache)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, limits[1]))
    try:
        with pytest.raises(data.Unreachable, match="cannot write .*cache .*too large") as error:
            source.read(10)
        one_line(error)
        assert not list(cache.glob("*.tar"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_pack_and_index_list_their_shards(pets, shards, tmp_path, monkeypatch):
    for name in ("train", "val"):
        pack_module.pack(str(pets[0]), f"{tmp_path}/out/{name}-%02d.tar", shard_size=9)
    listing = json.loads((tmp_path / "out" / "index.json").read_text())
    assert listing["classes"] == ["cat", "dog"]
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.tar")}
    assert {name: size for name, (size, _) in listing["shards"].items()} == files
    assert {name: n for name, (_, n) in listing["shards"].items() if "val" in name} == {
        "val-00.tar": 9,
        "val-01.tar": 9,
        "val-02.tar": 2,
    }
    folder, pattern = shards
    for _ in range(2):
        assert run_main(monkeypatch, "index", pattern) == 0
        listing = json.loads((folder / "index.json").read_text())
        assert listing["classes"] is None
        assert [n for _, n in listing["shards"].values()] == [7, 0, 1, 12, 3]
    (folder / "s-00.tar").unlink()
    write_tar(folder / "s-02.tar", members_of(range(5)))
    assert run_main(monkeypatch, "index", f"{folder}/s-02.tar") == 0
    listing = json.loads((folder / "index.json").read_text())
    assert {name: n for name, (_, n) in listing["shards"].items()} == {
        "s-01.tar": 0,
        "s-02.tar": 5,
        "s-03.tar": 12,
        "s-04.tar": 3,
    }
    (folder / "index.json").write_text('{"shards": [1, 2]}')  # of another program
    assert run_main(monkeypatch, "index", f"{folder}/s-02.tar") == 2
    assert (folder / "index.json").read_text() == '{"shards": [1, 2]}'


def test_shards_are_fetched_before_they_are_needed(remote, monkeypatch):
    server, pattern, cache = remote
    monkeypatch.setattr(data, "SHUFFLE_BLOCK", 8)
    source = opened_remote(pattern, cache)
    order = data.Order(source.sizes, lanes=1)
    batches = picture_batches(source, (4, 4), 3, 2, order=order)
    later = {source.where(order(position)) for position in (0, 1, 4, 5)}
    batches[0]
    deadline = time.monotonic() + 5
    while not all(map(source.cache.has, later)) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert all(map(source.cache.has, later))
    assert server.asked().total() == 1 + len(later) < 6
    for step in range(1, 12):  # the stream is the same as without
        same_batch(batches[step], picture_batches(source, (4, 4), 3, 2, order=order)[step])


def test_a_loader_that_stalls_says_what_it_waits_for(remote, monkeypatch, capsys):
    server, pattern, cache = remote
    monkeypatch.setattr(data, "STALLED", 0.1)
    monkeypatch.setattr(remote_module, "TIMEOUT", 5)
    source = opened_remote(pattern, cache)
    server.faults["s-03.tar"] = slow
    batches = picture_batches(source, (4, 4), 3, 12, process=0, processes=2)
    for workers in (0, 1):
        made = list(data.loader(batches, range(2), workers))
        assert [batch["bad"] for batch in made] == [[], []]
        printed = capsys.readouterr().err.splitlines()
        shutil.rmtree(cache)
        cache.mkdir()
        assert len(printed) >= 2
        for line in printed:
            assert re.match(r"no batch for \d+ s: process 0, step [12]: http.*/s-03.tar", line)
    for source in (toy.Toy("train", (8, 8)), opened_remote(pattern, cache)):
        item = picture_batches(source, (8, 8), 3, 4).about(1)
        assert item.startswith("process 0, step 2: ")
    list(data.loader(picture_batches(toy.Toy("train", (8, 8)), (8, 8), 3, 2), range(3), 0))
    assert capsys.readouterr().err == ""


def test_ctrl_c_does_not_wait_for_workers_that_wait(remote, monkeypatch):
    server, pattern, cache = remote
    monkeypatch.setattr(remote_module, "TIMEOUT", 60)
    done = threading.Event()
    server.faults = {f"s-{n:02}.tar": lambda *_: done.wait(60) for n in range(5)}
    batches = picture_batches(opened_remote(pattern, cache), (4, 4), 3, 4)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup has it ignored
    made = iter(data.loader(batches, range(4), 2))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        next(made)
    del made
    assert time.monotonic() - began < 5  # PyTorch gives each of the two 5 s
    signal.signal(signal.SIGINT, before)
    done.set()
