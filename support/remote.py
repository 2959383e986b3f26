"""Shards behind a web address or a command, read through a cache on this machine.

    --data 'https://host/shards/{00000..09999}.tar'
    --data 'pipe:aws s3 cp s3://bucket/shards/{00000..00099}.tar -'

A pipe: command prints one shard. Only commands that the user typed are run. An index.json
beside the shards lists their bytes and samples: see write_listing in support/pack.py.
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
from contextlib import suppress
from functools import lru_cache

from data import Unreachable, one_line, stable_hash
from support.shards import Shards, braces, shard_index

TIMEOUT = 30  # seconds without a byte after which a request is sent again
PATIENCE = 300  # seconds without a new byte, over all requests, after which the run ends
# Of other processes' temporary files: seconds without a byte after which the same shard is
# downloaded a second time, and after which the file is removed. A download may be silent
# for TIMEOUT seconds and pause for as many before it goes on.
QUIET, STALE = 20, 3 * TIMEOUT

# The name of a shard in an address or a command.
SHARD = r"[^\s/'\"=]+\.tar(?=[?#'\"\s]|$)"

# What to suggest for addresses that need a program of their own.
COMMANDS = {"s3": "aws s3 cp {} -", "gs": "gcloud storage cat {}"}


class Missing(OSError):
    """A shard does not exist. Its samples have weight 0 and are counted."""


class RemoteShards(Shards):
    """Tar shards at the addresses of a pattern with {00000..00099} or {a,b} in it.

    Raises ValueError if the pattern, an index.json or the cache (see Cache) is wrong.
    """

    def __init__(self, pattern, folder, size, videos=False):
        scheme = pattern.partition(":")[0]
        if scheme not in ("http", "https", "pipe"):
            command = COMMANDS.get(scheme, "COMMAND-THAT-PRINTS {}").replace("{}", pattern)
            raise ValueError(f"{scheme}:// needs a command that reads it: 'pipe:{command}'")
        self.paths, listings, facts, faults = braces(pattern), {}, [], {}
        for path in self.paths:
            if len(names := re.findall(SHARD, path)) != 1:
                raise ValueError(f"{path}: one word that ends in .tar must name a shard")
            name, index = names[0], re.sub(SHARD, "index.json", path)
            if index not in listings:
                listings[index] = read_listing(index)
            _, listed, faulty = listings[index]
            if name not in listed:
                hint = " (give {000..099}, no * ? [ ])" if re.search(r"[*?\[]", name) else ""
                raise ValueError(f"{index} lists {len(listed)} shards, no {name}{hint}")
            facts.append((name, *listed[name]))
            if name in faulty:
                faults[path] = faulty[name]
        classes = [classes for classes, _, _ in listings.values()]
        self.describe(pattern, classes, facts, faults, videos)
        sizes = {path: size for path, (_, size, _) in zip(self.paths, facts)}
        self.cache = Cache(folder, size, sizes)

    def block(self, number):
        """The bytes of a sample's stretch of its shard."""
        shard, row = self.locate(number)
        while True:
            # Another process may remove a file at any time: download it again.
            with suppress(FileNotFoundError):
                path = self.cache.path_of(self.paths[shard])
                begin, end = self.rows(shard, path)[row].tolist()
                # An open file would keep its space on the disk after its removal.
                with open(path, "rb", buffering=0) as file:
                    file.seek(begin)
                    return file.read(end - begin)

    @lru_cache(64)  # noqa: B019 (each loader process keeps its last 64)
    def rows(self, shard, path):
        """(samples, 2) int64: the bytes where each sample of a shard begins and ends."""
        _, rows = shard_index(path)
        listed = self.sizes[shard]
        if len(rows) != listed:
            raise ValueError(f"{len(rows)} samples, but {listed} in index.json")
        return rows


def read_listing(address):
    """(class names or None, {base name: (bytes, samples)}, {base name: faults}) of index.json."""
    pipe, content = address.startswith("pipe:"), bytearray()
    try:
        # A command is not run again, because the reason for its failure is unknown.
        for at, chunk in download(address, patience=0 if pipe else PATIENCE):
            content[at:] = chunk
        listing = json.loads(content)
        shards = {name: (int(b), int(n)) for name, (b, n) in listing["shards"].items()}
        return listing["classes"], shards, dict(listing.get("faults", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, Unreachable) and not pipe:
            raise
        raise ValueError(
            f"{address} cannot be used ({one_line(error)}): where the shards are, type "
            "python data.py index 'SHARDS-*.tar', and keep the index.json that it writes there"
        ) from None


class Cache:
    """A folder of whole shards that the processes of a machine share, without locks.

    folder  None: a folder of this user among the temporary files
    size    most bytes of all files in it, as "500G"
    shards  {address: bytes}

    1. A shard is downloaded to a temporary file of this process, and renamed when whole.
       If two processes download the same shard, the second rename does no harm.
    2. A temporary file has its full length at once. Then the least recently used shards
       are removed. So the folder passes its size by a shard a process, for a moment.
    3. A process waits for a shard while the temporary file of another process grows.
    """

    def __init__(self, folder, size, shards):
        user = os.getuid() if hasattr(os, "getuid") else ""
        self.folder = folder or os.path.join(tempfile.gettempdir(), f"shards-{user}")
        self.size, self.shards = bytes_of(size), shards
        self.missing = {}  # address -> reason
        self.active = set()  # (process, address): a fork has the set, but not the thread
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            why = f"the cache {self.folder} cannot be used ({one_line(error)})"
            raise ValueError(f"{why}: give another --cache-dir") from None
        self.must_hold(1)
        if os.environ.get("RANK", "0") == "0":
            print(f"cache {self.folder}, at most {self.size / 1e9:.4g} GB: {len(shards)} shards")

    def must_hold(self, count):
        """Raise ValueError unless each process of this machine has room for `count` shards
        that it reads at once, and for as many that are fetched ahead."""
        count *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        # With the index: 16 bytes for a sample, which has 512 bytes or more.
        sizes = [size + size // 32 + 1024 for size in self.shards.values()]
        needed = min(2 * count * max(sizes), sum(sizes))
        if needed > self.size:
            raise ValueError(
                f"--cache-size {self.size / 1e6:.6g}M is too small: "
                f"{min(count, len(sizes))} shards are read at once on this machine, "
                "and as many fetched ahead: give --cache-size "
                f"{math.ceil(needed / 1e6)}M or more, or fewer --lanes"
            )

    def path(self, address):
        digest = stable_hash(f"3 {self.shards[address]} {address}").hex()  # 3: the format
        return os.path.join(self.folder, f"cached-{digest}.tar")

    def has(self, address):
        """True if a shard is in the cache. (A copy that was cut is replaced.)"""
        with suppress(FileNotFoundError):
            return os.path.getsize(self.path(address)) == self.shards[address]
        return False

    def path_of(self, address):
        """The path of a shard, which is downloaded if it is not in the cache.

        Raises Missing; Unreachable if it cannot be downloaded or written now; and
        FileNotFoundError if another process has removed a file meanwhile: call it again.
        """
        path = self.path(address)
        while not self.has(address):
            if address in self.missing:
                raise Missing(self.missing[address])
            if self.is_downloading(address):
                time.sleep(0.1)
            else:
                self.download(address, PATIENCE)
        # The time of access is the time of use. The index needs the time of change.
        os.utime(path, ns=(time.time_ns(), os.stat(path).st_mtime_ns))
        return path

    def prefetch(self, addresses):
        """Download these shards in a thread, unless that thread is still busy."""
        new = [a for a in addresses if a not in self.missing and not self.has(a)]

        def download_new():
            for address in new:
                with suppress(OSError, ValueError):  # a reader will raise it
                    if not self.has(address) and not self.is_downloading(address):
                        self.download(address, patience=0)

        if new and all(thread.name != "prefetch" for thread in threading.enumerate()):
            threading.Thread(target=download_new, name="prefetch", daemon=True).start()

    def is_downloading(self, address):
        """True if a temporary file of a shard grows, or this process downloads it."""
        parts = states(f"{glob.escape(self.path(address))}.*.part").values()
        active = (os.getpid(), address) in self.active
        return active or any(time.time() - part.st_mtime < QUIET for part in parts)

    def download(self, address, patience):
        """Add a shard and its index, or enter in `missing` why there is none."""
        self.active.add((os.getpid(), address))
        path, size = self.path(address), self.shards[address]
        part = f"{path}.{os.getpid()}-{threading.get_native_id()}.part"
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            with open(part, "wb") as file:
                file.truncate(size)
                self.make_room()
                for at, chunk in download(address, size, patience):
                    file.seek(at)
                    file.write(chunk)
            os.replace(part, path)
            shard_index(path)  # which is written beside it, for all processes
        except Missing as error:
            self.missing[address] = str(error)
        except (Unreachable, FileNotFoundError):
            raise
        except OSError as error:
            why = f"cannot write {address} to the cache {self.folder} ({error.strerror})"
            raise Unreachable(f"{why}: make room, or give another --cache-dir") from None
        finally:
            self.active.discard((os.getpid(), address))
            with suppress(FileNotFoundError):
                os.remove(part)

    def make_room(self):
        """Remove abandoned temporary files, and the least recently used shards until all
        files are within the size."""
        files = states(os.path.join(glob.escape(self.folder), "cached-*.tar*"))
        used = sum(file.st_size for file in files.values())
        for path in sorted(files, key=lambda path: files[path].st_atime_ns):
            stale = time.time() - files[path].st_mtime > STALE
            abandoned = stale and path.endswith((".part", ".tmp"))
            if abandoned or used > self.size and path.endswith(".tar"):
                used -= files[path].st_size
                for file in (path, f"{path}.index"):
                    with suppress(FileNotFoundError):
                        os.remove(file)


def states(pattern):
    """{path: os.stat_result} of the files that match a pattern."""
    found = {}
    for path in glob.glob(pattern):
        with suppress(FileNotFoundError):  # another process has just removed it
            found[path] = os.stat(path)
    return found


def bytes_of(text):
    """ "500G" -> 500,000,000,000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT])B?", text.upper())
    if not match:
        raise ValueError(f"--cache-size {text} is no size: give one like 500G or 800M")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2]))


def download(address, size=None, patience=0):
    """Yield (offset, bytes) of what is at an address. Later bytes replace earlier ones.

    A failed request is sent again, from the last byte on if the server can do that, until
    `patience` seconds have brought no new byte. size: the number of bytes, if known.
    Raises Missing or Unreachable.
    """
    body = pipe_body if address.startswith("pipe:") else http_body
    got, most, pause, last = 0, 0, 0, time.monotonic()
    while True:
        try:
            for at, chunk in body(address, got):
                if size is not None and at + len(chunk) > size:
                    raise OSError(f"it has more than the {size} bytes of index.json")
                yield at, chunk
                got = at + len(chunk)
                if got > most:
                    most, pause, last = got, 0, time.monotonic()
            if size in (None, got):
                return
            raise OSError(f"it was cut after {got} of {size} bytes")
        except (OSError, http.client.HTTPException) as error:
            code = getattr(error, "code", None)  # of HTTP
            if code in (403, 404, 410):
                raise Missing(f"HTTP {code} {error.reason}") from None
            if code == 416:  # the server has no such range
                got = 0
            pause, spent = min(30, 2 * pause or 0.1), time.monotonic() - last
            text = f"{address}: {one_line(error)}"
            if spent + pause > patience:
                text += f"; given up after {spent:.0f} s: the same command goes on"
                raise Unreachable(text) from None
            if 3 < pause < 6:  # the first failures are not worth a line
                print(f"{text}; trying again", file=sys.stderr)
            time.sleep(pause)


def http_body(url, start):
    """Yield (offset, bytes) of a URL from `start` on, or from 0 without ranges."""
    host = re.match(r"\w+://[^/]*", url)[0]
    # Quote spaces and the like, as browsers do. What is quoted already stays as it is.
    url = host + urllib.parse.quote(url.removeprefix(host), safe=string.punctuation)
    headers = {"Range": f"bytes={start}-"} if start else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        at = start if answer.status == 206 else 0
        found = answer.headers.get("Content-Range", "")
        if at and not found.startswith(f"bytes {start}-"):
            raise urllib.error.HTTPError(url, 416, "another range", answer.headers, None)
        while chunk := answer.read(1 << 16):
            yield at, chunk
            at += len(chunk)
        if answer.length:  # bytes that are left to read
            raise OSError(f"it was cut after {at} of {at + answer.length} bytes")


def pipe_body(address, *_):
    """Yield (offset, bytes) of the output of a command, always from 0 on."""
    command = address.removeprefix("pipe:")  # what the user typed, and nothing else
    errors, at = tempfile.TemporaryFile(), 0  # noqa: SIM115
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": errors}
    options = {"shell": True, "start_new_session": True, "bufsize": 0}
    with errors, subprocess.Popen(command, **options, **streams) as process:
        try:
            yield 0, b""  # the output of an earlier run does not count
            while chunk := process.stdout.read(1 << 16):
                yield at, chunk
                at += len(chunk)
            if process.wait():
                errors.seek(0)
                last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise OSError(f"exit status {process.returncode}: {last}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
