"""Images per second, and CPU, from shards on the local disk, from a web server and from a command.

    python tests/bench/streaming.py

The pictures are made here: 4,000 JPEGs in 16 shards. Each source is read for one epoch
by the loader with one worker, in training order, in turn with the others. "cold" begins
with an empty cache; the web server is on this machine, takes its own CPU time from the
same cores, and is not counted. The order has small shuffled blocks (an epoch has
several), so that there is something to fetch ahead.
"""

import http.server
import io
import multiprocessing
import resource
import shutil
import statistics
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path

import common
import numpy as np
from PIL import Image

import data
from mae_pretrain import make_sample
from support.loader import loader
from support.pack import write_listing
from support.shards import Shards

SHARDS, LANES, BATCH = 16, 4, 64
SIDE, CROP = 128, 96  # pixels


def write_shards(folder, pictures):
    """JPEGs with some texture in tar shards with an index.json."""
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as tar:
            for number in range(shard, pictures, SHARDS):
                draws = np.random.RandomState(number)
                coarse = draws.randint(0, 256, (SIDE // 8, SIDE // 8, 3)).astype(np.uint8)
                pixels = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE)), dtype=np.int64)
                noisy = (pixels + draws.randint(-12, 13, pixels.shape)).clip(0, 255)
                file = io.BytesIO()
                Image.fromarray(noisy.astype(np.uint8)).save(file, "JPEG", quality=90)
                member = tarfile.TarInfo(f"{number:06}.jpg")
                member.size = file.tell()
                tar.addfile(member, io.BytesIO(file.getvalue()))
    write_listing(Shards(f"{folder}/*.tar"))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def cpu_seconds():
    """Of this process, and of its children that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def read_epoch(pattern, cache, cold):
    """(images per second, CPU seconds of 1,000 images) in an epoch."""
    if cold:
        shutil.rmtree(cache, ignore_errors=True)
    source, _ = data.open_sources(pattern, cache=(str(cache), "10G"))
    order = data.Order(source.sizes, lanes=LANES)
    make = partial(make_sample, size=(CROP, CROP), channels=3, num_patches=1, min_crop=0.2)
    batches = data.Batches(source, make, BATCH, order=order)
    began, cpu, read = time.perf_counter(), cpu_seconds(), 0
    for batch in loader(batches, range(len(batches)), workers=1):
        read += int(batch["weight"].sum())
    if read != len(batches) * BATCH:
        raise SystemExit(f"{read} pictures of {len(batches) * BATCH} were read")
    del batch  # the worker has ended, and is counted
    return read / (time.perf_counter() - began), 1000 * (cpu_seconds() - cpu) / read


def main():
    parser = common.make_parser(__doc__)
    parser.add_argument("--pictures", type=int, default=4000, help="how many are made")
    parser.add_argument("--repeats", type=int, default=7, help="the median counts")
    options = parser.parse_args()
    data.SHUFFLE_BLOCK = 250
    with tempfile.TemporaryDirectory() as folder:
        shards, cache = Path(folder, "shards"), Path(folder, "cache")
        shards.mkdir()
        write_shards(shards, options.pictures)
        handler = partial(Quiet, directory=str(shards))
        web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server = multiprocessing.get_context("fork").Process(target=web.serve_forever, daemon=True)
        server.start()
        names = f"{{000..{SHARDS - 1:03}}}.tar"
        url = f"http://127.0.0.1:{web.server_port}/{names}"
        sources = {"local disk": f"{shards}/{names}", "http, cold": url, "http, warm": url}
        sources["pipe:cat, cold"] = f"pipe:cat {shards}/{names}"
        runs = {n: partial(read_epoch, s, cache, "cold" in n) for n, s in sources.items()}
        found = common.take_turns(runs, options.repeats)
        server.terminate()

    print(f"{'source':16}{'images/s':>10}{'of local':>10}{'CPU s/1000':>12}{'of local':>10}")
    medians = {n: [*map(statistics.median, zip(*results))] for n, results in found.items()}
    local = medians["local disk"]
    for name, (rate, cpu) in medians.items():
        print(f"{name:16}{rate:10.0f}{rate / local[0]:10.2f}{cpu:12.3f}{cpu / local[1]:10.2f}")


if __name__ == "__main__":
    main()
