"""support/remote.py: shards from a web server that misbehaves, or a command, through the cache."""

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
import urllib.parse
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ODD_NAMES,
    PICTURES,
    TINY,
    everything,
    one_line,
    opened,
    picture_batches,
    read_metrics,
    stage,
    training_batches,
    write_files,
)

import data
from support import loader, toy
from support import pack as pack_module
from support import remote as remote_module
from support import shards as shards_module

FORK = multiprocessing.get_context("fork")


# -------------------------------------------------------------------------- a server that misbehaves


class Server(ThreadingHTTPServer):
    """A web server of a folder, for one test, which misbehaves as `faults` say.

    faults    {name: function(handler, content) -> whether it has answered}, tried at each request
    requests  [name]
    """

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.requests = folder, {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def asked(self):
        return Counter(self.requests)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        name, wanted = urllib.parse.unquote(self.path[1:]), self.headers["Range"]
        self.server.requests.append(name)
        path = Path(self.server.folder, name)
        content = path.read_bytes() if path.is_file() else None
        if name in self.server.faults and self.server.faults[name](self, content):
            return
        if content is None:
            self.send_error(404)
        else:
            self.give(content, int(wanted[6:-1]) if wanted else None)

    def give(self, content, start=None, cut=None, length=True, pause=0):
        """From `start` on as a range; cut after `cut` bytes; length: with a Content-Length; pause:
        seconds before each 4,000 bytes."""
        self.send_response(200 if start is None else 206)
        if start is not None:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            content = content[start:]
        if length:
            self.send_header("Content-Length", len(content))
        self.end_headers()
        for at in range(0, len(content[:cut]), 4000):
            time.sleep(pause)
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content[:cut][at : at + 4000])
        return True

    def log_message(self, *_):
        pass


def times(count, fault):
    """A fault that comes `count` times."""
    left = iter(range(count))
    return lambda handler, content: next(left, None) is not None and fault(handler, content)


@pytest.fixture
def remote(shards, tmp_path, monkeypatch, capsys):
    """(server of the five shards of 23 samples and their index.json, pattern, cache folder)."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(remote_module, "PATIENCE", 1)
    monkeypatch.setattr(remote_module, "TIMEOUT", 0.3)
    folder, pattern = shards
    pack_module.write_listing(shards_module.Shards(pattern))
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


def refused(kind, words, function, *arguments):
    """The message, of one line, of the error that a function raises."""
    with pytest.raises(kind, match=words) as error:
        function(*arguments)
    return one_line(error)


def give(**options):
    return lambda handler, content: handler.give(content, **options)


def short(handler, content):  # with a length that is right for these bytes
    return handler.give(content[:1500])


def fail(code):
    return lambda handler, _: handler.send_error(code) or True


def another_range(handler, content):
    if not handler.headers["Range"]:
        return handler.give(content, cut=1000)
    return handler.give(content[:-300], start=700)  # of the length that was requested


def refuse_ranges(handler, content):
    return fail(416)(handler, content) if handler.headers["Range"] else cut_once(handler, content)


cut_once = times(1, give(cut=1500))
FAULTS = {
    "says nothing for too long": times(1, give(pause=0.5)),
    "slow, without a length": give(pause=0.02, length=False),
    "hangs up": times(2, lambda *_: True),
    "500": times(2, fail(500)),
    "cut once": times(1, give(cut=1500)),
    "cut twice, knows no ranges": times(2, give(cut=1500)),
    "short, without a length": times(1, give(cut=1500, length=False)),
    "too long": times(1, lambda handler, content: handler.give(content + b"more")),
    "another range": times(2, another_range),
    "refuses the range": refuse_ranges,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_samples_are_right_whatever_a_server_does(remote, shards, fault):
    server, pattern, cache = remote
    server.faults = {"s-03.tar": FAULTS[fault]}
    source, local = opened_remote(pattern, cache), opened(shards[1])
    assert samples_of(source) == samples_of(local)
    assert source.identity == local.identity  # so a run may move between them
    assert server.asked()["s-03.tar"] > 1 or fault == "slow, without a length"
    assert not list(cache.glob("*.part"))


@pytest.mark.parametrize(
    "fault, workers",
    [(fail(500), 0), (fail(500), 1), (short, 0), (None, 0)],  # None: it is gone
)
def test_an_unreachable_shard_is_one_line_and_no_bad_sample(remote, fault, workers, monkeypatch):
    # A DataLoader waits for a worker that has failed before it ends it: 5 s.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    server, pattern, cache = remote
    batches = training_batches(source=opened_remote(pattern, cache))
    server.faults = {f"s-{n:02}.tar": fault for n in range(5)}
    if fault is None:
        server.shutdown()
        server.server_close()
        refused(OSError, "index.json.*the same command goes on", opened_remote, pattern, cache)
    line = f"^{server.url}/s-0..tar: .*same command goes on"
    said = refused(data.Unreachable, line, list, loader.loader(batches, range(2), workers))
    assert "Traceback" not in said
    assert not list(cache.glob("*.tar"))


@pytest.mark.parametrize("why", ["HTTP 403", "HTTP 410", "12 samples, but 11", "no tar"])
def test_a_shard_that_is_missing_or_another_weighs_nothing(remote, shards, why):
    server, pattern, cache = remote
    local, bad = picture_batches(opened(shards[1]), (4, 4), 3, 23)[0]["images"], 12
    if why.startswith("HTTP"):
        server.faults["s-03.tar"] = fail(int(why[-3:]))
    elif why == "no tar":
        server.faults["s-03.tar"] = lambda h, content: h.give(b"no tar " * 4388 + b"1234")
    else:  # the shard was written again after index.json
        listing = json.loads((server.folder / "index.json").read_text())
        listing["shards"]["s-03.tar"][1] = bad = 11
        (server.folder / "index.json").write_text(json.dumps(listing))
    batch = picture_batches(opened_remote(pattern, cache), (4, 4), 3, 11 + bad)[0]
    assert batch["weight"].tolist() == [1] * 8 + [0] * bad + [1] * 3
    zeros = torch.zeros_like(local[:bad])
    assert torch.equal(batch["images"], torch.cat([local[:8], zeros, local[20:]]))
    assert len(batch["bad"]) == bad and server.asked()["s-03.tar"] == 1
    for line in batch["bad"]:
        assert line.startswith(f"{server.url}/s-03.tar: sample ") and why in line


# --------------------------------------------------------------------------------------- the cache


def read_all(pattern, cache, seed, answers):
    """Read all samples three times, in a random order, and send what they were. (In a process.)"""
    source, found = opened_remote(pattern, cache, "70K"), {}
    for number in np.random.RandomState(seed).permutation(3 * 23) % 23:
        source.cache.prefetch([source.where(int(number) * 7 % 23)])
        found[int(number)] = np.asarray(source.read(number)["image"]()).tolist()
    while any(thread.name == "prefetch" for thread in threading.enumerate()):
        time.sleep(0.01)
    answers.put(found)


def test_two_processes_read_through_a_cache_that_is_too_small_for_all_shards(remote, shards):
    server, pattern, cache = remote
    write_files(cache, {"mine.tar": b"not of the cache"})
    answers, sizes = FORK.Queue(), [0]
    readers = [FORK.Process(target=read_all, args=(pattern, cache, n, answers)) for n in range(2)]
    [reader.start() for reader in readers]
    while any(reader.is_alive() for reader in readers) and answers.qsize() < 2:
        with contextlib.suppress(FileNotFoundError):
            sizes.append(sum(path.stat().st_size for path in cache.glob("*")))
    expected = {n: pixels for n, (*_, pixels) in enumerate(everything(opened(shards[1])))}
    assert [answers.get(timeout=60) for _ in readers] == [expected] * 2
    [reader.join() for reader in readers]
    largest_shard = max(path.stat().st_size for path in shards[0].glob("*.tar"))
    assert 40_000 < max(sizes) <= 70_000 + 2 * largest_shard  # a shard a process
    assert server.asked().total() > 2 + 5
    assert sorted(path.suffix for path in cache.glob("[!c]*")) == [".tar"]  # mine.tar
    assert not list(cache.glob("*.part"))


def test_what_a_killed_process_left_is_not_used_and_is_removed(remote, shards):
    server, pattern, cache = remote
    server.faults["s-03.tar"] = give(pause=0.02, length=False)
    source = opened_remote(pattern, cache)
    reader = FORK.Process(target=source.read, args=(10,))
    reader.start()
    while not [path for path in cache.glob("*.part") if path.stat().st_size]:
        time.sleep(0.001)
    reader.kill()
    reader.join()
    (left,) = cache.glob("*.part")
    source.read(0)  # of another shard, while the file may still be in use
    assert left.exists()
    # Quiet for 25 s, it may be a download that a slow server holds up; after two minutes not.
    os.utime(left, (time.time() - 25,) * 2)
    source.read(0)
    assert left.exists()
    os.utime(left, (time.time() - 120,) * 2)
    assert samples_of(source) == samples_of(opened(shards[1]))
    assert not list(cache.glob("*.part"))


@pytest.mark.parametrize(
    "end, damage",
    [
        (".tar.index", lambda content: content[:72] + b"\x01" + content[73:]),
        (".tar.index", lambda content: content[:-3]),
        (".tar", lambda content: content[:9000]),
        (".tar", lambda _: b""),
    ],
)
def test_a_damaged_copy_in_the_cache_is_mended(remote, shards, end, damage):
    """The index is made again, the tar is downloaded again."""
    server, pattern, cache = remote
    source, expected = opened_remote(pattern, cache), samples_of(opened(shards[1]))
    assert samples_of(source) == expected
    copy = Path(source.cache.path_of(source.where(10)))
    file, stamp, whole = copy.with_suffix(end), copy.stat().st_mtime_ns, copy.read_bytes()
    length = file.stat().st_size
    file.write_bytes(damage(file.read_bytes()))
    os.utime(file, ns=(stamp, stamp))
    for _ in range(2):
        assert samples_of(opened_remote(pattern, cache)) == expected
        assert copy.read_bytes() == whole and file.stat().st_size == length
        requests = server.asked()
        assert requests["s-03.tar"] == 1 + (end == ".tar") and requests["s-00.tar"] == 1


def test_the_least_recently_used_shard_is_removed(remote):
    server, pattern, cache = remote
    source = opened_remote(pattern, cache, "66K")  # room for three
    for number in (8, 0, 20, 8, 7, 8):  # of s-03, s-00, s-04, s-03, s-02
        source.read(number)
    assert server.asked() == {"index.json": 1} | {f"s-{n:02}.tar": 1 for n in (0, 2, 3, 4)}
    source.read(0)
    for path in cache.glob("cached-*"):  # by another process, at any time
        path.unlink()
    source.read(0)
    assert server.asked()["s-00.tar"] == 3
    assert samples_of(opened_remote(pattern, cache, "1M")) == samples_of(source)
    assert server.asked()["s-00.tar"] == 3  # another run has what is there


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


def test_a_cache_that_cannot_be_used_or_is_too_small_is_one_line(remote, tmp_path):
    _, pattern, cache = remote
    write_files(tmp_path, {"file": b""})
    for folder in (f"{tmp_path}/file", f"{tmp_path}/file/below", "/proc/cache"):
        refused(ValueError, f"the cache {folder} .*--cache-dir", opened_remote, pattern, folder)
    for size in ("", "20", "x", "20Q", "-5G", "0", "64K"):  # room for less than two
        refused(ValueError, "--cache-size", opened_remote, pattern, cache, size)
    source = opened_remote(pattern, cache, "66K")
    words = "5 shards are read at once.*--cache-size 1M.*--lanes"
    refused(ValueError, words, training_batches, 0, 1, source)  # six lanes
    training_batches(source=opened_remote(pattern, cache, "1M"))


def test_a_full_disk_is_one_line(remote):
    _, pattern, cache = remote
    source = opened_remote(pattern, cache)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, limits[1]))
    try:
        refused(data.Unreachable, "cannot write .*cache .*too large", source.read, 10)
        assert not list(cache.glob("*.tar"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# --------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize("command", ["cat '{}' | cat", "echo '{a}' >&2; cat {} -", "dd if={}"])
def test_shards_of_a_pipe(shards, tmp_path, command):
    local = opened(shards[1])
    pack_module.write_listing(local)
    source = opened_remote("pipe:" + command.replace("{}", shards[1]), tmp_path / "cache")
    assert samples_of(source) == samples_of(local) and source.identity == local.identity


@pytest.mark.parametrize(
    "command, why",
    [
        ("cat {} && echo first >&2 && echo no bucket >&2 && exit 3", "exit status 3: no bucket"),
        ("cat {} | head -c 9999", "cut after 9999 of"),
        ("cat {} {}", "more than the"),
    ],
)
def test_a_pipe_that_fails_is_one_line(shards, tmp_path, monkeypatch, command, why):
    monkeypatch.setattr(remote_module, "PATIENCE", 0.2)
    where = "pipe:" + command.replace("{}", f"{shards[0]}/s-03.tar")
    cache = remote_module.Cache(str(tmp_path), "1M", {where: 30720})
    assert refused(data.Unreachable, why, cache.path_of, where).startswith(where)
    assert not list(tmp_path.glob("*.tar"))


def test_remote_names_and_caches_may_be_odd(remote, shards, tmp_path):
    """Addresses are written as they are or, as browsers do, with %20 for a space."""
    server, local = remote[0], samples_of(opened(shards[1]))
    place = shutil.copytree(shards[0], server.folder / "a [v2], é?")
    listing = (place / "index.json").read_text()
    (place / "index.json").write_text(re.sub(r"s-0(\d).tar", r"s[\1].tar", listing))
    for number in range(5):
        (place / f"s-{number:02}.tar").rename(place / f"s[{number}].tar")
    urls = [f"{server.url}/{name}/s[{{0..4}}].tar" for name in ("a [v2], é%3F", "a%20[v2],%20é%3F")]
    for number, where in enumerate([*urls, f"pipe:cat '{place}/s[{{0..4}}].tar'"]):
        for name in ODD_NAMES:
            assert samples_of(opened_remote(where, tmp_path / f"{name} {number}")) == local


@pytest.mark.parametrize(
    "where, expected",
    [
        ("s3://bucket/{0..3}.tar", "'pipe:aws s3 cp s3://bucket/{0..3}.tar -'"),
        ("gs://bucket/0.tar", "'pipe:gcloud storage cat gs://bucket/0.tar'"),
        ("hdfs://host/0.tar", "'pipe:COMMAND-THAT-PRINTS hdfs://host/0.tar'"),
        ("URL/[0-9].tar", "no * ?"),
        ("URL/s-00.zip", "ends in .tar"),
        ("pipe:cat a.tar b.tar", "one word"),
        ("pipe:cat FOLDER/none/s-00.tar", "python data.py index 'SHARDS-*.tar'"),
        ("URL/none/s-00.tar", "404 Not Found): where the shards are, type python data.py index"),
        ("URL/s-{03..07}.tar", "no s-05.tar"),
        ("URL/s-{3..1}.tar", "hold no pictures"),
        ("URL/damaged/s-00.tar", "cannot be used"),
        ("URL/other/s-00.tar", "cannot be used"),
    ],
)
def test_wrong_remote_data_is_one_line_that_says_what_to_do(remote, where, expected):
    server, _, cache = remote
    listings = {"damaged/index.json": b'{"shards"', "other/index.json": b'{"shards": []}'}
    write_files(server.folder, listings)
    where = where.replace("URL", server.url).replace("FOLDER", str(server.folder))
    refused(ValueError, re.escape(expected), opened_remote, where, cache)


# ------------------------------------------------------------------------------------- the loader


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_stalls_says_what_it_waits_for(remote, monkeypatch, capsys, workers):
    server, pattern, cache = remote
    monkeypatch.setattr(loader, "STALLED", 0.1)
    monkeypatch.setattr(remote_module, "TIMEOUT", 5)
    batches = picture_batches(opened_remote(pattern, cache), (4, 4), 3, 12, process=0, processes=2)
    server.faults["s-03.tar"] = give(pause=0.1)
    assert [batch["bad"] for batch in loader.loader(batches, range(2), workers)] == [[], []]
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) >= 2
    for line in printed:
        assert re.match(r"no batch for \d+ s: process 0, step [12]: http.*/s-03.tar", line)
    toys = picture_batches(toy.Toy("train", (8, 8)), (8, 8), 3, 2)
    assert loader.describe(toys, 1).startswith("process 0, step 2: ")
    monkeypatch.setattr(loader, "STALLED", 60)
    list(loader.loader(toys, range(3), workers))
    assert capsys.readouterr().err == ""


def test_ctrl_c_does_not_wait_for_workers_that_wait(remote, monkeypatch):
    server, pattern, cache = remote
    monkeypatch.setattr(remote_module, "TIMEOUT", 60)
    done = threading.Event()
    server.faults = {f"s-{n:02}.tar": lambda *_: done.wait(60) for n in range(5)}
    batches = picture_batches(opened_remote(pattern, cache), (4, 4), 3, 4)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup has it ignored
    made = iter(loader.loader(batches, range(4), 2))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        next(made)
    del made
    assert time.monotonic() - began < 5  # PyTorch gives each of the two 5 s
    signal.signal(signal.SIGINT, before)
    done.set()


# --------------------------------------------------------------------------------------- a stage


def test_a_stage_runs_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pack_module.pack(str(PICTURES / "a"), "shards/%02d.tar", shard_size=8)
    server = Server(tmp_path / "shards")
    flags = [*TINY[2:], "--lanes", "4", "--cache-dir", tmp_path / "cache", "--steps", "4"]

    def metrics(where, out, *more, **options):
        where = f"{where}/{{00..07}}.tar"
        ran = stage(*flags, "--data", where, "--out", tmp_path / out, *more, **options)
        return ran, read_metrics(tmp_path / out) if ran.returncode == 0 else ran.stderr

    _, local = metrics(tmp_path / "shards", "local")
    ran, web = metrics(server.url, "web", processes=2)
    assert web == [pytest.approx(line, rel=1e-5) for line in local], ran.stderr
    assert ran.stdout.count(f"cache {tmp_path / 'cache'}, at most 20 GB") == 1
    assert max(server.asked().values()) == 2  # index.json, by both
    server.faults["03.tar"] = fail(404)
    shutil.rmtree(tmp_path / "cache")
    ran, lines = metrics(server.url, "missing", "--max-bad", "1")
    assert lines[-1]["bad"] > 0 and "03.tar: sample" in ran.stderr, ran.stderr
    ran, said = metrics(server.url, "small", "--cache-size", "1K")
    assert ran.returncode == 2 and len(said.splitlines()) == 1 and "--cache-size" in said
    server.shutdown()
