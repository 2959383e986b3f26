"""What several test files share: small pictures, a folder of them, and runs of stage 1."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see mae_pretrain.py
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the shapes are tiny, and processes run side by side

import gc
import json
import multiprocessing
import multiprocessing.connection
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, by kernels.py

ROOT = Path(__file__).resolve().parent.parent


def picture(seed, height=20, width=24):
    """A random PIL picture, smooth enough for JPEG."""
    pixels = np.random.RandomState(seed).randint(0, 256, (height // 4, width // 4, 3))
    return Image.fromarray(pixels.astype(np.uint8)).resize((width, height))


# Names of folders and files that look like patterns, and names that these patterns match.
ODD_NAMES = {
    "coco [v2]": "coco v",
    "[!a]": "b",
    "what?*": "whatever",
    "{0..3}": "2",
    "{a,b}": "a",
    "50%d": "500",
}


def large_pictures(folder, split=""):
    """Eight pictures in two classes of 300 x 300, 90,000 pixels, and flags that allow them."""
    for number in range(8):
        path = Path(folder, split, "ab"[number % 2], f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, 300, 300).save(path)
    return ["--data", folder, "--max-pixels", 90_000]


def check_that_the_limit_is_the_runs(run, folder):
    """A run goes on with its own --max-pixels only, and hands it on to evaluate.py.

    run(*flags): a finished process of a stage with large_pictures' flags and these.
    """
    ran = run("--out", folder / "run")
    assert ran.returncode == 0 and read_metrics(folder / "run")[-1]["bad"] == 0, ran.stderr
    assert " --max-pixels 90000" in ran.stdout.split("next: ")[1]
    usual = ["--max-pixels", 89_478_485]  # the default
    for flags, shown in ((["--max-pixels", 89_999], 89_999), (usual, None)):
        ran = run(*flags, "--out", folder / "run")
        assert ran.returncode == 2 and f"(max_pixels was 90000, is {shown})" in ran.stderr
    usual += ["--out", folder / "usual"]
    ran = run(*usual)
    assert ran.returncode == 0 and "--max-pixels" not in ran.stdout.split("next: ")[1], ran.stderr
    (path,) = (folder / "usual").glob("checkpoints/*/state.json")
    record = json.loads(path.read_text())
    assert record["identity"].pop("max_pixels") is None  # what older checkpoints do not have
    path.write_text(json.dumps(record))
    ran = run(*usual)
    assert ran.returncode == 0 and "going on from" in ran.stdout, ran.stderr
    ran = run("--out", folder / "usual")
    assert ran.returncode == 2 and "(max_pixels was None, is 90000)" in ran.stderr


# 120 pictures of two classes, made when the tests begin.
PICTURES = Path(tempfile.gettempdir(), f"test-pictures-{os.getpid()}")


def pytest_sessionstart():
    for number in range(120):
        path = PICTURES / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)


def pytest_collection_finish():
    gc.freeze()  # what was imported: stages collect garbage at each step line, here at each step


def pytest_sessionfinish():
    shutil.rmtree(PICTURES)


# The smallest run that has everything: 12 steps of 8 pictures, a checkpoint every 4 steps.
TINY = [
    *("--data", str(PICTURES), "--size", "16x2x2", "--decoder", "16x1x2"),
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


# Importing torch takes seconds, a run of these tests less than one. So a server imports it once,
# and each run is a fork of the server: a process of its own, in all that matters.
SERVER = multiprocessing.get_context("forkserver")
LAZY = ["torch.distributed.checkpoint", "torch.distributed.fsdp", "torch._dynamo"]
SERVER.set_forkserver_preload(["finetune", *LAZY])


def stage(*arguments, processes=None, program="mae_pretrain.py", code=None, file_size=None):
    """Run a stage in a process of its own, or as several, as torchrun does; what it printed.

    code: this is run instead. file_size: no file may grow beyond this (a full disk).
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("localhost", 0))  # each has a port of its own: two test runs must not meet
        port, files = str(free.getsockname()[1]), [f"{folder}/stdout", f"{folder}/stderr"]
        argv = [program, *map(str, arguments)]
        runs = []
        for rank in range(processes or 1):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
            names |= {"LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost"}
            names = {name: str(value) for name, value in names.items()} | {"MASTER_PORT": port}
            names = names if processes else {}
            runs.append(
                SERVER.Process(target=run_program, args=(argv, names, files, file_size, code))
            )
        free.close()
        for run in runs:
            run.start()
        for _ in runs:  # the first that fails ends the others, which may want to say why
            patience = 10 if any(run.exitcode for run in runs) else 300
            alive = [run.sentinel for run in runs if run.is_alive()]
            if alive and not multiprocessing.connection.wait(alive, patience):
                [run.kill() for run in runs]
        [run.join() for run in runs]
        codes = [run.exitcode for run in runs if run.exitcode]
        printed = [Path(file).read_text() for file in files]
    return subprocess.CompletedProcess(argv, max(codes, default=0), *printed)


def run_program(argv, environment, files, file_size, code):
    """What a new process does: run a program of the repository, its output into two files."""
    multiprocessing.set_start_method(None, force=True)  # loaders begin as in a plain program
    gc.freeze()  # the same for what the server has imported
    os.environ.update(environment)
    os.chdir(ROOT)
    for file, stream in zip(files, (sys.stdout, sys.stderr)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    if file_size:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.argv = argv
    if code:
        exec(code, {})  # noqa: S102 (the test's own)
    else:
        runpy.run_path(str(ROOT / argv[0]), run_name="__main__")


def read_metrics(out):
    """metrics.jsonl as a list of dicts, without what depends on the clock or the machine."""
    clock = ("images_per_second", "mfu", "data_wait", "memory_gib", "eta_seconds")
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


@pytest.fixture
def photos(tmp_path):
    """A folder of 40 readable pictures, without classes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(40):
        picture(i).save(folder / f"{i:03}.jpg")
    return folder
