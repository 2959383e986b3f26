"""Kill -9 a run again and again, at random moments: in the end nothing is lost or seen twice.

    python tests/bench/kills.py --kills 30                   # the same number of processes
    python tests/bench/kills.py --kills 12 --processes 2,1,4 # another number after each kill

Runs stage 1 on small random pictures under torchrun, once undisturbed and once killed:
one process of it or all with torchrun, while it starts, trains or saves (every second
step). What counts of a run is the last time that each step was taken. Compared are the
pixels, masks and positions of each step's batch, bit for bit, metrics.jsonl, and the
weights: bit for bit on the same number of processes.
"""

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

import common
import numpy as np
from PIL import Image

from support import loader as loader_module

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d"]
TORCHRUN += ["--rdzv-endpoint", "localhost:0", "--nproc-per-node"]
STAGE = "--size 32x2x2 --decoder 32x1x2 --image-size 16 --patch-size 4 --batch-size 24 "
STAGE += "--save-every 2 --log-every 1 --workers 1"


def stage_that_records(folder, *arguments):
    """Stage 1, in one of torchrun's processes, which also writes what it is trained on.

    A line for each micro-batch: [step, [[position, checksum of the pixels and the
    mask]]].
    """
    plain = loader_module.loader
    file = open(f"{folder}/{os.getpid()}.jsonl", "w")  # noqa: SIM115 (until it is killed)

    def checksum(pixels, ids):
        return zlib.crc32(pixels.contiguous().numpy(), zlib.crc32(ids.numpy()))

    def loader(batches, items, *options, **others):
        for item, batch in zip(items, plain(batches, items, *options, **others)):
            if batches.order:  # it is trained on, not measured
                rows = zip(batch["positions"].tolist(), batch["images"], batch["ids"])
                seen = [[position, checksum(*row)] for position, *row in rows]
                file.write(json.dumps([item // batches.micro_batches, seen]) + "\n")
                file.flush()
            yield batch

    loader_module.loader = loader
    sys.argv = ["mae_pretrain.py", *arguments]
    runpy.run_path(str(common.ROOT / "mae_pretrain.py"), run_name="__main__")


def make_pictures(folder, count=200):
    folder.mkdir()
    draws = np.random.default_rng(0)
    for number in range(count):
        pixels = draws.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")


def start(folder, out, processes, steps):
    """Start it under torchrun, in a session of its own. Later starts have later folders."""
    folder.mkdir()
    line = [*TORCHRUN, processes, __file__, "--record", folder, *STAGE.split()]
    line += ["--data", out.parent / "pictures", "--out", out, "--steps", steps]
    with open(folder / "printed", "w") as printed:
        options = {"start_new_session": True, "stdout": printed, "stderr": printed}
        return subprocess.Popen(list(map(str, line)), **options)


def must_end(run, folder):
    if run.wait():
        sys.exit((folder / "printed").read_text())


def newest(out):
    pointer = out / "checkpoints" / "LATEST"
    return int(pointer.read_text().removeprefix("step-")) if pointer.is_file() else 0


def children(pid):
    """The processes that torchrun has started."""
    with contextlib.suppress(FileNotFoundError):
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    return []


def kill(run, out, draws):
    """Wait for a random moment of a run, kill it, and say how. None: it had ended before."""
    before, moment = newest(out), draws.choice(["starting", "training", "training", "training"])
    while moment == "training" and newest(out) == before and run.poll() is None:
        time.sleep(0.01)
    time.sleep(draws.uniform(0, 4 if moment == "starting" else 0.5))
    victims = children(run.pid)
    if run.poll() is not None:
        return None
    one = bool(victims) and draws.random() < 0.5
    # All: torchrun and its children, each of which has a session of its own.
    for pid in [draws.choice(victims)] if one else [run.pid, *victims]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
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


def killed_run(folder, out, counts, options):
    """Start a run, and again after each kill: (the folders of all starts, how each was killed)."""
    draws, starts, kills = random.Random(options.seed), [], []
    for processes in itertools.cycle(counts):
        starts.append(folder / f"start-{len(starts)}")
        run = start(starts[-1], out, processes, options.steps)
        if len(kills) == options.kills:
            must_end(run, starts[-1])
            return starts, kills
        done = kill(run, out, draws)
        if done is None:
            must_end(run, starts[-1])
            sys.exit(f"the run ended after {len(kills)} kills: give more --steps")
        kills.append(done)
        print(f"kill {len(kills)}: {done}; last checkpoint: step {newest(out)}", flush=True)


def main():
    if sys.argv[1:2] == ["--record"]:
        return stage_that_records(*sys.argv[2:])
    parser = common.make_parser(__doc__)
    parser.add_argument("--kills", type=int, default=30, help="of the run")
    parser.add_argument("--processes", default="2", help="of each start in turn, as 2,1,4")
    parser.add_argument("--steps", type=int, default=200, help="of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    counts = options.processes.split(",")

    from model import read_weights

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        plain, out, undisturbed = folder / "plain", folder / "killed", folder / "undisturbed"
        make_pictures(folder / "pictures")
        must_end(start(undisturbed, plain, counts[0], options.steps), undisturbed)
        starts, kills = killed_run(folder, out, counts, options)
        seen, expected = consumed(starts), consumed([undisturbed])
        lines = [(path / "metrics.jsonl").read_text().splitlines() for path in (out, plain)]
        ours, theirs = (read_weights(path / "model.pt")[0] for path in (out, plain))
    print(*(f"{count} kills: {kind}" for kind, count in Counter(kills).items()), sep="\n")
    other = [step + 1 for step, batch in expected.items() if seen.get(step) != batch]
    print(f"steps {len(expected)}; with other samples than undisturbed: {other or 'none'}")
    losses = ([json.loads(line)["loss"] for line in run] for run in lines)
    off = [abs(a / b - 1) for a, b in zip(*losses, strict=True)]
    print(f"lines of metrics.jsonl {len(off)}; largest relative difference of the loss {max(off)}")
    off = max((ours[name] - theirs[name]).abs().max().item() for name in theirs)
    print(f"largest difference of the weights {off}")
    if other or len(expected) != options.steps or (len(set(counts)) == 1 and off):
        sys.exit("NOT the same")


if __name__ == "__main__":
    main()
