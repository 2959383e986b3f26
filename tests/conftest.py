"""What several test files share: small pictures, a folder of them, and runs of stage 1."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see mae_pretrain.py
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the shapes are tiny, and processes run side by side

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

# The smallest run that has everything: 12 steps of 8 pictures, a checkpoint every 4 steps.
TINY = [
    *("--data", "toy", "--size", "16x2x2", "--decoder", "16x1x2"),
    *("--image-size", "16", "--patch-size", "4", "--batch-size", "8", "--lr", "1e-3"),
    *("--steps", "12", "--save-every", "4", "--log-every", "1", "--workers", "1"),
]


def command(*arguments, processes=None, program="mae_pretrain.py"):
    """The command line of a stage, under torchrun if a number of processes is given."""
    if processes is None:
        return [sys.executable, program, *map(str, arguments)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    # Each test has a port of its own choosing: two test runs on a machine must not meet.
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return [*launcher, program, *map(str, arguments)]


def stage(*arguments, processes=None, program="mae_pretrain.py", **options):
    """Run a stage in a process of its own, as a user does, and return what it printed."""
    line = command(*arguments, processes=processes, program=program)
    options = {"timeout": 300, **options}
    return subprocess.run(line, check=False, cwd=ROOT, capture_output=True, text=True, **options)


def read_metrics(out):
    """metrics.jsonl as a list of dicts, without what depends on the clock or the machine."""
    clock = ("images_per_second", "mfu", "data_wait", "memory_gib", "eta_seconds")
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def picture(seed, height=20, width=24):
    """A random PIL picture, smooth enough for JPEG."""
    pixels = np.random.RandomState(seed).randint(0, 256, (height // 4, width // 4, 3))
    return Image.fromarray(pixels.astype(np.uint8)).resize((width, height))


@pytest.fixture
def photos(tmp_path):
    """A folder of 40 readable pictures, without classes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(40):
        picture(i).save(folder / f"{i:03}.jpg")
    return folder
