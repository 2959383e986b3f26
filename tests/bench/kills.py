"""Kill -9 a run again and again, at random moments: in the end nothing is lost or seen twice.

    python tests/bench/kills.py --kills 30                   # the same number of processes
    python tests/bench/kills.py --kills 12 --processes 2,1,4 # another number after each kill

Runs stage 1 on small random pictures under torchrun, once undisturbed and once killed: one process of it or
all with torchrun, while it starts, trains or saves (every second step). What counts of a run is the
last time that each step was taken. Compared are the pixels, masks and positions of each step's
batch, bit for bit, metrics.jsonl, and the weights: bit for bit on the same number of processes.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from support import loader as loader_module

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def stage_that_records(folder, *arguments):
    """The stage itself, in one of torchrun's processes, but that it writes down what it consumes:
    a line for each piece of a batch, [step, [[position, checksum of the pixels and the mask]]]."""

    plain = loader_module.loader
    file = open(f"{folder}/{os.getpid()}.jsonl", "w")  # noqa: SIM115 (until it is killed)

    def loader(batches, items, *options, **others):
        for item, batch in zip(items, plain(batches, items, *options, **others)):
            rows = zip(batch["positions"].tolist(), batch["images"], batch["ids"])
            seen = [
                [position, zlib.crc32(pixels.contiguous().numpy(), zlib.crc32(ids.numpy()))]
                for position, pixels, ids in rows
            ]
            if batches.order:  # it is trained on, not measured
                file.write(json.dumps([item // batches.pieces, seen]) + "\n")
                file.flush()
            yield batch

    loader_module.loader = loader
    sys.argv = ["mae_pretrain.py", *arguments]
    runpy.run_path(str(ROOT / "mae_pretrain.py"), run_name="__main__")


def make_pictures(folder, count=200):
    folder.mkdir()
    draws = np.random.default_rng(0)
    for number in range(count):
        pixels = draws.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")


def start(folder, out, processes, steps):
    """Start it under torchrun, in a session of its own. Later starts have later folders."""
    folder.mkdir()
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    line += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    line += [__file__, "--record", folder, "--size", "32x2x2", "--decoder", "32x1x2"]
    line += ["--data", out.parent / "pictures", "--image-size", "16", "--patch-size", "4"]
    line += ["--out", out, "--batch-size", "24", "--steps", steps, "--save-every", "2"]
    line += ["--log-every", "1", "--workers", "1"]
    with open(folder / "printed", "w") as printed:
        options = {"start_new_session": True, "stdout": printed, "stderr": printed}
        return subprocess.Popen(list(map(str, line)), **options)


def newest(out):
    pointer = out / "checkpoints" / "LATEST"
    return int(pointer.read_text().removeprefix("step-")) if pointer.is_file() else 0


def children(pid):
    """The processes that torchrun has started."""
    with contextlib.suppress(FileNotFoundError):
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    return []


def kill(run, out, draws):
    """Wait for a random moment of a run, kill it, and say how. None: it was at its end before."""
    before, moment = newest(out), draws.choice(["starting", "training", "training", "training"])
    while moment == "training" and newest(out) == before and run.poll() is None:
        time.sleep(0.01)
    time.sleep(draws.uniform(0, 4 if moment == "starting" else 0.5))
    victims = children(run.pid)
    if run.poll() is not None:
        return None
    one = bool(victims) and draws.random() < 0.5
    with contextlib.suppress(ProcessLookupError):
        os.kill(draws.choice(victims), signal.SIGKILL) if one else os.killpg(
            run.pid, signal.SIGKILL
        )
        for victim in () if one else victims:  # each has a session of its own
            os.kill(victim, signal.SIGKILL)
    run.wait()
    while set(victims) & set(children(run.pid)):
        time.sleep(0.01)
    return f"{moment}, {'one of the processes' if one else 'all'}"


def consumed(folders):
    """{step: sorted [position, checksum] of its batch}, as it was taken for the last time."""
    steps = {}
    for folder in folders:  # one after the other
        files, found = folder.glob("*.jsonl"), {}
        for line in itertools.chain(*(file.read_text().splitlines() for file in files)):
            with contextlib.suppress(ValueError):  # cut off by the kill
                step, seen = json.loads(line)
                found.setdefault(step, []).extend(map(tuple, seen))
        steps |= found
    return {step: sorted(seen) for step, seen in steps.items()}


def main():
    if sys.argv[1] == "--record":
        return stage_that_records(*sys.argv[2:])
    parser = argparse.ArgumentParser("kills.py", description="Kill a run again and again.")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", default="2", help="of each start in turn, as 2,1,4")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    counts, draws, how = list(map(int, given.processes.split(","))), random.Random(given.seed), []

    import model as models

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        plain, out = folder / "plain", folder / "killed"
        make_pictures(folder / "pictures")
        run = start(folder / "undisturbed", plain, counts[0], given.steps)
        if run.wait():
            sys.exit((folder / "undisturbed" / "printed").read_text())
        starts = []
        while True:
            starts.append(folder / f"start-{len(starts)}")
            run = start(starts[-1], out, counts[(len(starts) - 1) % len(counts)], given.steps)
            if len(how) == given.kills:
                break
            done = kill(run, out, draws)
            if done is None:
                sys.exit(f"the run ended after {len(how)} kills: give more --steps\n"
                         + (starts[-1] / "printed").read_text())  # fmt: skip
            how.append(done)
            print(f"kill {len(how)}: {done}; last checkpoint: step {newest(out)}", flush=True)
        if run.wait():
            sys.exit((starts[-1] / "printed").read_text())

        seen, expected = consumed(starts), consumed([folder / "undisturbed"])
        metrics = [
            [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
            for path in (out, plain)
        ]
        weights = [models.read_weights(path / "model.pt")[0] for path in (out, plain)]
    print(*(f"{count} kills: {kind}" for kind, count in Counter(how).items()), sep="\n")
    other = [step + 1 for step, batch in expected.items() if seen.get(step) != batch]
    print(f"steps {len(expected)}; with other samples than undisturbed: {other or 'none'}")
    off = [abs(a["loss"] / b["loss"] - 1) for a, b in zip(*metrics, strict=True)]
    print(f"lines of metrics.jsonl {len(off)}; largest relative difference of the loss {max(off)}")
    ours, theirs = weights
    off = max((ours[name] - theirs[name]).abs().max().item() for name in theirs)
    print(f"largest difference of the weights {off}")
    if other or len(expected) != given.steps or (len(set(counts)) == 1 and off):
        sys.exit("NOT the same")


if __name__ == "__main__":
    main()
