"""Stage 1 on 1 and 2 processes of one thread each, and under torchrun or not: images/s.

    python tests/bench/processes.py

The commands run in turn, a number of times; a run's rate is the median of its step lines but for
the first ones. Wants two cores with nothing else on them, and batches that make the weights' way
between the processes short: at --batch 8 it takes a quarter of the time. Half an hour for all.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d"]
TORCHRUN += ["--rdzv-endpoint", "localhost:0", "--nproc-per-node"]
WAYS = {
    "python": [sys.executable],
    "torchrun, 1": [*TORCHRUN, "1"],
    "torchrun, 2": [*TORCHRUN, "2"],
}


def rate(way, given):
    """Median images/s of one run."""
    with tempfile.TemporaryDirectory() as out:
        line = [*WAYS[way], "mae_pretrain.py", "--out", out, "--size", given.size, "--image-size"]
        line += [
            given.image_size,
            "--batch-size",
            given.batch,
            "--workers",
            "1",
            "--log-every",
            "1",
        ]
        line += ["--steps", given.steps, "--save-every", given.steps, "--micro-batch"]
        line += [given.batch // (2 if way.endswith("2") else 1)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run(list(map(str, line)), check=False, **options)
        if done.returncode:
            sys.exit(done.stderr)
        lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["images_per_second"] for line in lines[3:])


def main():
    parser = argparse.ArgumentParser("processes.py", description="1 and 2 processes, in turn.")
    parser.add_argument("--size", default="S")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    rates = {way: [] for way in WAYS}
    for _ in range(given.repeats):
        for way, found in rates.items():
            found.append(rate(way, given))
    plain = statistics.median(rates["python"])
    print("processes      images/s   over python   each run")
    for way, found in rates.items():
        median, runs = statistics.median(found), ", ".join(f"{r:.2f}" for r in found)
        print(f"{way:12} {median:10.2f} {median / plain:13.3f}   {runs}")


if __name__ == "__main__":
    main()
