"""Images per second, and CPU, from shards on the local disk, from a web server and from a command.

    python tests/bench/streaming.py

The pictures are made here. Each source is read for one epoch by the loader with one worker, in
training order, in turn with the others. "cold" begins with an empty cache; the web server is on
this machine, takes its own CPU time from the same cores, and is not counted. The order is cut into
small shuffled blocks (an epoch has several), so that fetching ahead has something to do.
"""

import argparse
import functools
import http.server
import io
import multiprocessing
import resource
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image

import data
from mae_pretrain import make_sample
from support import loader, pack
from support import shards as shards_module


def write_shards(folder, pictures, shards, side):
    """`pictures` JPEGs of side x side, some texture in each, in tar shards with an index.json."""
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as tar:
            for number in range(shard, pictures, shards):
                draws = np.random.RandomState(number)
                coarse = draws.randint(0, 256, (side // 8, side // 8, 3)).astype(np.uint8)
                pixels = np.asarray(Image.fromarray(coarse).resize((side, side)), dtype=np.int64)
                noisy = (pixels + draws.randint(-12, 13, pixels.shape)).clip(0, 255)
                file = io.BytesIO()
                Image.fromarray(noisy.astype(np.uint8)).save(file, "JPEG", quality=90)
                member = tarfile.TarInfo(f"{number:06}.jpg")
                member.size = file.tell()
                tar.addfile(member, io.BytesIO(file.getvalue()))
    pack.write_listing(shards_module.Shards(f"{folder}/*.tar"))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def cpu_seconds():
    """Of this process, and of its children that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def read_epoch(pattern, cache, options):
    """(seconds, CPU seconds, pictures) of an epoch."""
    source, _ = data.open_sources(pattern, cache=(str(cache), "10G"))
    order = data.Order(source.sizes, lanes=options.lanes)
    side = (options.image_size, options.image_size)
    make = functools.partial(make_sample, size=side, channels=3, num_patches=1, min_crop=0.2)
    batches = data.Batches(source, make, options.batch, order=order)
    began, cpu, read = time.perf_counter(), cpu_seconds(), 0
    for batch in loader.loader(batches, range(len(batches)), workers=1):
        read += int(batch["weight"].sum())
    if read != len(batches) * options.batch:
        raise SystemExit(f"{read} pictures of {len(batches) * options.batch} were read")
    del batch  # the worker has ended, and is counted
    return time.perf_counter() - began, cpu_seconds() - cpu, read


def main():
    parser = argparse.ArgumentParser("streaming.py", description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=4000, help="(4000)")
    parser.add_argument("--shards", type=int, default=16, help="(16)")
    parser.add_argument("--side", type=int, default=128, help="of the pictures (128)")
    parser.add_argument("--image-size", type=int, default=96, help="side that is cropped (96)")
    parser.add_argument("--lanes", type=int, default=4, help="(4)")
    parser.add_argument("--block", type=int, default=250, help="samples shuffled together (250)")
    parser.add_argument("--batch", type=int, default=64, help="(64)")
    parser.add_argument("--repeats", type=int, default=7, help="the median counts (7)")
    options = parser.parse_args()
    data.SHUFFLE_BLOCK = options.block
    with tempfile.TemporaryDirectory() as folder:
        shards, cache = Path(folder, "shards"), Path(folder, "cache")
        shards.mkdir()
        write_shards(shards, options.pictures, options.shards, options.side)
        handler = functools.partial(Quiet, directory=str(shards))
        web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server = multiprocessing.get_context("fork").Process(target=web.serve_forever, daemon=True)
        server.start()
        names = f"{{000..{options.shards - 1:03}}}.tar"
        url = f"http://127.0.0.1:{web.server_port}/{names}"
        sources = {
            "local disk": f"{shards}/{names}",
            "http, cold": url,
            "http, warm": url,
            "pipe:cat, cold": f"pipe:cat {shards}/{names}",
        }
        spent = {name: [] for name in sources}
        for repeat in range(options.repeats + 1):  # the first warms up
            for name, pattern in sources.items():
                if "cold" in name:
                    shutil.rmtree(cache, ignore_errors=True)
                spent[name] += [read_epoch(pattern, cache, options)] if repeat else []
        server.terminate()

    print(f"{'source':16}{'images/s':>10}{'of local':>10}{'CPU s/1000':>12}{'of local':>10}")
    rates = {n: statistics.median(r / s for s, _, r in runs) for n, runs in spent.items()}
    cpus = {n: statistics.median(1000 * c / r for _, c, r in runs) for n, runs in spent.items()}
    for name in sources:
        ratios = rates[name] / rates["local disk"], cpus[name] / cpus["local disk"]
        print(f"{name:16}{rates[name]:10.0f}{ratios[0]:10.2f}{cpus[name]:12.3f}{ratios[1]:10.2f}")


if __name__ == "__main__":
    main()
