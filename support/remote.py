"""Shards from elsewhere, read through a cache on this machine.

--data 'https://host/shards/{00000..09999}.tar', or a command that writes a shard to its output:
--data 'pipe:aws s3 cp s3://bucket/shards/{00000..00099}.tar -'. Only what the user typed is ever
run. What must be known beforehand stands in an index.json beside the shards: see write_listing.

A shard is fetched whole, into a folder that all processes of a machine share. They speak through
files alone: NAME.part is being written by who holds its lock, NAME is a whole shard, with its
index behind it. The system gives a lock up when a process ends, however it ends: what has failed
is what a killed one leaves, a .part without a lock, and goes when room is made. To fetch ahead is
to do the same in a thread.
"""

import glob
import http.client
import json
import math
import os
import re
import signal
import string
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache, partial

import numpy as np

from data import (
    Shards,
    Unreachable,
    braces,
    index_bytes,
    one_line,
    read_index,
    scan_tar,
    stable_hash,
)

TIMEOUT = 30  # seconds that a web server may say nothing; then it is tried again


PATIENCE = 300  # seconds that may pass, in whatever number of tries, without a new byte


FETCHERS = 4  # threads that fetch ahead, in each loader process


class Missing(OSError):
    """A shard is not there: its samples weigh nothing, and are counted."""


class RemoteShards(Shards):
    """Shards that are read through a cache: `paths` are addresses, as the user would type each."""

    def __init__(self, pattern, folder, size, videos=False):
        scheme = pattern.partition(":")[0]
        if scheme not in ("http", "https", "pipe"):
            known = {"s3": "aws s3 cp {} -", "gs": "gcloud storage cat {}"}
            command = known.get(scheme, "COMMAND-THAT-PRINTS {}").replace("{}", pattern)
            raise ValueError(f"{scheme}:// is read by a command that you give: 'pipe:{command}'")
        self.paths, facts, faults, listings = braces(pattern), [], {}, {}
        for path in self.paths:
            head, *name = re.split(r"([^\s/'\"=]+\.tar)(?=[?#'\"\s]|$)", path)
            if len(name) != 2:
                raise ValueError(f"{path}: one word that ends in .tar must name a shard")
            name, tail = name
            index = f"{head}index.json{tail}"
            if index not in listings:
                listings[index] = read_listing(index)
            _, listed, faulty = listings[index]
            if name not in listed:
                why = " (give {000..099}, no * ? [ ])" * bool(re.search(r"[*?\[]", name))
                raise ValueError(f"{index} lists {len(listed)} shards, but no {name}{why}")
            facts.append((name, *listed[name]))
            faults |= {path: faulty[name]} if name in faulty else {}
        classes = [classes for classes, *_ in listings.values()]
        self.describe(pattern, classes, facts, faults, videos)
        self.cache = Cache(folder, size, {p: size for p, (_, size, _) in zip(self.paths, facts)})

    @lru_cache(64)  # noqa: B019 (each loader process keeps its last 64)
    def index(self, shard):
        """Where a shard's samples begin and end."""
        address, size = self.paths[shard], self.facts[shard][1]
        for _ in range(2):
            with open(self.cache.fetch(address), "rb") as file:
                file.seek(size)
                index = read_index(file, [size, 0])
            if index and len(index[1]) != self.sizes[shard]:
                raise ValueError(f"{len(index[1])} samples, but {self.sizes[shard]} in index.json")
            if index:
                return index[1]
            self.cache.remove(address)  # damaged on the disk: it is fetched again
        raise ValueError("its copy in the cache is damaged, and was a second time")

    def block(self, number):
        # No file is kept open: one that is removed from the cache would keep its place on the disk.
        shard = int(np.searchsorted(self.edges, number, "right")) - 1
        while True:
            with suppress(FileNotFoundError):
                begin, end = self.index(shard)[number - self.edges[shard]].tolist()
                with open(self.fetched(shard, time.monotonic() // 10), "rb", buffering=0) as file:
                    file.seek(begin)
                    return file.read(end - begin)
            self.cache.fetch(self.paths[shard])  # another process has just made room

    @lru_cache(64)  # noqa: B019
    def fetched(self, shard, moment):
        """A shard's path: the cache is not asked, and told that it is used, for every sample."""
        return self.cache.fetch(self.paths[shard])


def read_listing(address):
    """(class names or None, {base name: (bytes, samples)}, {base name: its faults, if there are
    any}) of an index.json."""
    content, pipe = bytearray(), address.startswith("pipe:")
    try:  # of a command it is not known what its failing means: it is not tried again
        for at, chunk in download(address, patience=0 if pipe else PATIENCE):
            content[at:] = chunk
        listing = json.loads(content)
        shards = {name: (int(b), int(n)) for name, (b, n) in listing["shards"].items()}
        faults = {n: [int(a), int(b), int(c)] for n, (a, b, c) in listing.get("faults", {}).items()}
        return listing["classes"], shards, faults
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, Unreachable) and not pipe:
            raise
        why = f"{address} cannot be used ({one_line(error)}): where the shards lie, type"
        why += " python data.py index 'SHARDS-*.tar', and keep the index.json that it writes there"
        raise ValueError(why) from None


class Cache:
    """A folder of whole shards, never of more than `size` with all that is on its way.

    size    like "500G"
    shards  {address: bytes}
    """

    def __init__(self, folder, size, shards):
        user = os.getuid() if hasattr(os, "getuid") else ""
        self.folder = folder or os.path.join(tempfile.gettempdir(), f"shards-{user}")
        # Who has its lock is alone: which files there are is changed by nobody else.
        self.accounting = partial(locked, os.path.join(self.folder, "cached.lock"), "wb")
        self.size, self.shards = bytes_of(size), shards
        self.missing = {}  # address -> why it was found not to be there
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            with self.accounting():
                pass
        except (OSError, ImportError) as error:  # on Windows there is no fcntl
            why = f"the cache {self.folder} cannot be used ({one_line(error)})"
            raise ValueError(f"{why}: give another --cache-dir") from None
        self.must_hold(1)
        if os.environ.get("RANK", "0") == "0":
            print(f"cache {self.folder}, at most {self.size / 1e9:.4g} GB: {len(shards)} shards")

    def must_hold(self, shards):
        """ValueError unless each process here finds room for so many, and as many to come next."""
        shards *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        room = [room_for(size) for size in self.shards.values()]
        needed, shards = min(2 * shards * max(room), sum(room)), min(shards, len(room))
        if needed > self.size:
            why = f"{shards} shards are read at once on this machine, and as many fetched ahead"
            why += f": give --cache-size {math.ceil(needed / 1e6)}M or more, or fewer --lanes"
            raise ValueError(f"--cache-size {self.size / 1e6:.6g}M is too small: {why}")

    def path(self, address):
        # Nobody calls files of their own like this: what else is in the folder is never touched.
        # 2: a shard has no npy file behind it, as it had once, but an index with checksums.
        digest = stable_hash(f"2 {self.shards[address]} {address}").hex()
        return os.path.join(self.folder, f"cached-{digest}.tar")

    def has(self, address):
        return os.path.exists(self.path(address))

    def fetch(self, address, wait=True):
        """The path of a shard in the cache, where it is brought if need be.

        wait: for others who are bringing it, and with all PATIENCE; else it may be None.
        """
        path, size = self.path(address), self.shards[address]
        patience = PATIENCE if wait else PATIENCE / 10
        while address not in self.missing:
            try:
                if not written(f"{path}.part", wait):
                    return None
                with suppress(FileNotFoundError):
                    os.utime(path)  # it has been used now
                    return path
                with self.reserved(path, size) as file:
                    if not file:
                        time.sleep(0.1)
                        continue
                    for at, chunk in download(address, size, patience):
                        file.seek(at)
                        file.write(chunk)
                    file.flush()
                    head, rows = scan_tar(file.name)
                    file.seek(size)
                    rows = rows.clip(max=size)  # a last sample may be cut off
                    file.write(index_bytes([size, 0], head, rows))
                    file.flush()
                    with self.accounting():
                        os.utime(file.name)
                        os.replace(file.name, path)
            except (Missing, ValueError) as error:  # it is not there, or no tar
                self.missing[address] = str(error).replace(f"{path}.part", address)
            except Unreachable:
                raise
            except OSError as error:
                why = f"cannot write {address} to the cache {self.folder} ({error.strerror})"
                raise Unreachable(f"{why}: make room, or give another --cache-dir") from None
        raise Missing(self.missing[address])

    def remove(self, address):
        with self.accounting(), suppress(FileNotFoundError):
            os.remove(self.path(address))

    @contextmanager
    def reserved(self, path, size):
        """PATH.part, for a shard of this size, once leftovers and the shards not used for the
        longest have made room; None if others have brought it, are about to, or have all room."""
        with ExitStack() as ours:
            file, files = None, os.path.join(glob.escape(self.folder), "cached-*.tar")
            with self.accounting():
                for part in filter(written, glob.glob(f"{files}.part")):
                    os.remove(part)
                shards = sorted(glob.glob(files), key=lambda name: os.stat(name).st_atime_ns)
                parts = glob.glob(f"{files}.part")
                if path not in shards and f"{path}.part" not in parts:
                    used = sum(map(os.path.getsize, shards)) + room_for(size)
                    used += sum(room_for(os.path.getsize(part)) for part in parts)
                    while used > self.size and shards:
                        used -= os.path.getsize(shards[0])
                        os.remove(shards.pop(0))
                    if used <= self.size:
                        file = ours.enter_context(locked(f"{path}.part", "xb"))
                        file.truncate(size)
            yield file

    def ask(self, addresses):
        """Have these fetched, in this order, by threads; their locks share the work out."""
        new = [a for a in addresses if a not in self.missing and not self.has(a)]
        busy = sum(thread.name == "fetcher" for thread in threading.enumerate())
        for _ in range(FETCHERS - busy if new else 0):
            threading.Thread(None, self.fetch_ahead, "fetcher", (new,), daemon=True).start()

    def fetch_ahead(self, addresses):
        for address in addresses:
            with suppress(Exception):  # whatever it is, who reads the shard will meet it, too
                self.fetch(address, wait=False)


def room_for(size):
    """The most that a shard takes, with its index: 16 bytes a sample, which has 512 or more."""
    return size + size // 32 + 1024


def bytes_of(text):
    """ "500G" -> 500,000,000,000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT])B?", text.upper())
    if not match:
        raise ValueError(f"--cache-size {text} is no size: want one like 500G or 800M")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2]))


@contextmanager
def locked(path, mode, wait=True):
    """A file, open, whose lock is ours. BlockingIOError if one would have to wait, and will not."""
    import fcntl  # not on Windows

    with open(path, mode) as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        try:
            yield file
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # a forked process may have the file open, too


def written(path, wait=False):
    """Whether nobody has the lock of a file, perhaps after waiting; also if there is none."""
    try:
        with suppress(FileNotFoundError), locked(path, "rb", wait):
            pass
    except BlockingIOError:
        return False
    return True


def download(address, size=None, patience=0):
    """(offset, bytes) one after the other, all that is at an address. What fails is tried again,
    from where it was cut if the server can, until `patience` seconds have brought no new byte.

    size: what is right, if it is known. Raises Missing or Unreachable.
    """
    body = pipe_body if address.startswith("pipe:") else http_body
    got, most, pause, since = 0, 0, 0.0, time.monotonic()
    while True:
        try:
            for at, chunk in body(address, got, size):
                if size is not None and at + len(chunk) > size:
                    raise OSError(f"it has more than the {size} bytes of index.json")
                yield at, chunk
                got = at + len(chunk)
                if got > most:
                    most, pause, since = got, 0.0, time.monotonic()
            if size in (None, got):
                return
            raise OSError(f"it was cut after {got} of {size} bytes")
        except (OSError, http.client.HTTPException) as error:
            code = getattr(error, "code", None)  # of HTTP
            if code in (403, 404, 410):
                raise Missing(f"HTTP {code} {error.reason}") from None
            got = 0 if code == 416 else got  # there is no such range
            pause, spent = min(30, 2 * pause or 0.1), time.monotonic() - since
            text = f"{address}: {one_line(error)}"
            if spent + pause > patience:
                text += f"; given up after {spent:.0f} s: the same command goes on"
                raise Unreachable(text) from None
            if 3 < pause < 6:  # not at every hiccup
                print(f"{text}; trying again", file=sys.stderr)
            time.sleep(pause)


def http_body(url, start, size):
    """(offset, bytes), ... of a URL from `start` on, or from 0 if the server knows no ranges."""
    host = re.match(r"\w+://[^/]*", url)[0]
    # As browsers do, of spaces, say. What is quoted already stays as it is.
    quoted = host + urllib.parse.quote(url.removeprefix(host), safe=string.punctuation)
    request = urllib.request.Request(quoted, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        at, headers = start if answer.status == 206 else 0, answer.headers
        if at and not headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise urllib.error.HTTPError(url, 416, "another range than asked", headers, None)
        if size is not None and answer.length not in (None, size - at):  # what is left to read
            raise OSError(f"it has {at + answer.length} bytes there, and {size} in index.json")
        while chunk := answer.read(1 << 16):
            yield at, chunk
            at += len(chunk)
        if answer.length:
            raise OSError(f"it was cut after {at} of {at + answer.length} bytes")


def pipe_body(address, *_):
    """The same of what a command prints, always from 0 on."""
    said, pipe = tempfile.TemporaryFile(), subprocess.PIPE  # noqa: SIM115
    streams = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": said, "bufsize": 0}
    command, at = address.removeprefix("pipe:"), 0  # what the user typed, and nothing else
    with said, subprocess.Popen(command, shell=True, start_new_session=True, **streams) as process:
        try:
            yield 0, b""  # what came in an earlier try does not count
            while chunk := process.stdout.read(1 << 16):
                yield at, chunk
                at += len(chunk)
            if process.wait():
                said.seek(0)
                last = said.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise OSError(f"exit status {process.returncode}: {last}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
