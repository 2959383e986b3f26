"""Stage 1 on 1 and 2 processes of one thread each, and under torchrun or not: images/s.

    python tests/bench/processes.py

The commands run in turn, a number of times; a run's rate is the median of its step
lines but for the first ones. Wants two cores with nothing else on them. A batch must be
large enough for the exchange of the gradients to be short: at --batch 8 it takes a
quarter of the time. Half an hour for all.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import common

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d"]
TORCHRUN += ["--rdzv-endpoint", "localhost:0", "--nproc-per-node"]
WAYS = {
    "python": [sys.executable],
    "torchrun, 1": [*TORCHRUN, "1"],
    "torchrun, 2": [*TORCHRUN, "2"],
}


def rate(way, size, batch, steps):
    """Median images/s of one run."""
    micro_batch = batch // 2 if way.endswith("2") else batch
    flags = f"--size {size} --batch-size {batch} --micro-batch {micro_batch} --workers 1 "
    flags += f"--steps {steps} --save-every {steps} --log-every 1"
    with tempfile.TemporaryDirectory() as out:
        command = [*WAYS[way], "mae_pretrain.py", "--out", out, *flags.split()]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        options = {"cwd": common.ROOT, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run(command, check=False, **options)
        if done.returncode:
            sys.exit(done.stderr)
        lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["images_per_second"] for line in lines[3:])


def main():
    parser = common.make_parser(__doc__)
    parser.add_argument("--size", default="S", help="of the model")
    parser.add_argument("--batch", type=int, default=40, help="images in a step")
    parser.add_argument("--steps", type=int, default=5, help="of a run, of which 3 do not count")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each")
    options = parser.parse_args()
    shape = options.size, options.batch, options.steps
    runs = {way: partial(rate, way, *shape) for way in WAYS}
    rates = common.take_turns(runs, options.repeats, warm_up=0)
    plain = statistics.median(rates["python"])
    print("processes      images/s   over python   each run")
    for way, found in rates.items():
        median, runs = statistics.median(found), ", ".join(f"{r:.2f}" for r in found)
        print(f"{way:12} {median:10.2f} {median / plain:13.3f}   {runs}")


if __name__ == "__main__":
    main()
