"""support/loader.py: batches from worker processes, signals, and what stages do without a batch."""

import json
import multiprocessing
import os
import pickle
import re
import resource
import signal
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import (
    PICTURES,
    STEPS,
    TINY,
    encoded,
    members_of,
    opened,
    painting,
    picture_batches,
    read_metrics,
    same_batch,
    stage,
    training_batches,
    write_files,
    write_tar,
)
from PIL import Image

import data
from support import hashtags
from support.loader import Parcel, loader, loader_workers


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_global_batch_is_the_same_for_any_processes_and_workers(processes, workers):
    parts = [
        list(loader(training_batches(process, processes), STEPS, workers))
        for process in range(processes)
    ]
    for process, part in enumerate(parts):  # pairs stay together: mixup mixes 2i and 2i + 1
        for batch in part:
            assert (batch["positions"] // 2 % processes == process).all()
    for step in STEPS:
        whole = training_batches()[step]
        order = torch.cat([part[step]["positions"] for part in parts]).argsort()
        for name in ("images", "ids", "samples", "weight", "positions"):
            joined = torch.cat([part[step][name] for part in parts])[order]
            assert torch.equal(joined, whole[name]), name


def test_spawned_workers_get_the_same_batches_and_the_limit_of_pixels(tmp_path, monkeypatch):
    """macOS (and Python 3.14 on Linux) sends batches to its workers as a pickle, with what the
    training has opened and kept by then."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", data.MAX_PIXELS)
    members = [*members_of(range(9)), ("large.png", encoded(painting(10, 10)))]
    shard = opened(write_tar(tmp_path / "a.tar", members))
    folder = opened(write_files(tmp_path / "folder", dict(members_of(range(10)))))
    for source in (folder, opened("toy"), shard):
        batches = training_batches(source=source)
        batches[0]  # opens files, fills caches
        same_batch(pickle.loads(pickle.dumps(batches))[1], batches[1])
    data.limit_pixels(40)
    batches = picture_batches(shard, (4, 4), 3, 10)
    spawned = loader(batches, range(1), 1)
    spawned.multiprocessing_context = "spawn"
    (batch,) = spawned
    same_batch(batch, batches[0])
    assert len(batch["bad"]) == 1 and "large" in batch["bad"][0]


@pytest.mark.parametrize(
    "cores, here, left", [(2, 1, 1), (1, 1, 1), (8, 1, 7), (8, 2, 3), (256, 8, 16)]
)
def test_loader_processes_are_as_asked_or_what_is_left(cores, here, left, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert [loader_workers(asked, here) for asked in (None, 0, 5)] == [left, 0, 5]
    for asked in (-1, 10_000):
        with pytest.raises(ValueError, match=f"--workers {asked} is not between 0 and {8 * cores}"):
            loader_workers(asked, here)


class Fails(torch.utils.data.Dataset):
    """Numbers, until the item of which a worker runs a function."""

    def __init__(self, at, function):
        self.at, self.function = at, function

    def __getitem__(self, item):
        return torch.tensor([item]) if item != self.at else self.function()


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def few_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    return torch.tensor([0])


@pytest.mark.parametrize(
    ("at", "function", "says"),
    [
        (0, few_files, r"Too many open files.*open files \(ulimit -n 65536\), or fewer --wo"),
        (9, few_files, "--workers"),  # those made before are lost, too
        (0, kill, "exited unexpectedly.*give it more memory.* --workers"),
        (9, kill, "give it more memory.* --workers"),
        (9, lambda: 1 / 0, None),  # a mistake stays one
    ],
)
def test_a_batch_that_cannot_be_handed_over_ends_the_loader(at, function, says):
    made, found = iter(loader(Fails(at, function), range(100), workers=1)), []
    with pytest.raises(data.Unreachable if says else ZeroDivisionError, match=says):
        found.extend(made)
    assert found == [torch.tensor([n]) for n in range(len(found))]
    assert len(found) <= at


def test_a_batch_is_pinned_as_a_dataloader_pins_it(monkeypatch):
    """Without a GPU, tensors are marked instead. (It is PyTorch's function that its thread calls.)"""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    batch = {"images": torch.zeros(2), "targets": [{"seed": 3, "masks": torch.ones(1)}]}
    pinned = torch.utils.data._utils.pin_memory.pin_memory(Parcel(batch | {"bad": ["x"]}))
    assert pinned["images"].tolist() == [1, 1] and pinned["bad"] == ["x"]
    assert pinned["targets"][0]["seed"] == 3 and pinned["targets"][0]["masks"].tolist() == [2]


def test_a_loader_process_does_not_survive_the_training():
    fork = multiprocessing.get_context("fork")
    workers = fork.Queue()
    stuck = loader(Fails(0, lambda: (workers.put(os.getpid()), time.sleep(300))), range(4), 1)
    training = fork.Process(target=lambda: next(iter(stuck)))
    training.start()
    worker, deadline = workers.get(timeout=60), time.monotonic() + 60
    training.kill()
    training.join()
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(worker)


def is_running(pid):
    """True if a process does something: one that nobody waits for stays, as a zombie."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


# ------------------------------------------------------------------------- stages without a batch


# What a loader process (or, without workers, the training) meets at item {item}. After a signal to
# `parent`, the batch never comes.
MISHAPS = {
    "files": "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))",
    "kill": "os.kill(os.getpid(), signal.SIGKILL)",
    "SIGTERM": "os.kill(parent, signal.SIGTERM); time.sleep(300)",
    "SIGINT": "os.kill(parent, signal.SIGINT); time.sleep(300)",
    "gone": "raise data.Unreachable('Unreachable: a shard is gone')",
}


MISHAP = """
import os, signal, sys, time
import {stage} as program
import data
from support import loader

signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup has it ignored
plain, parent, loader.GRACE = data.Batches.__getitem__, os.getpid(), 0.5

def read(batches, item):
    batch = plain(batches, item)
    trains = batches.order is not None
    if trains == {trains} and item == {item} and batches.process == batches.processes - 1:
        {mishap}
    return batch

data.Batches.__getitem__ = read
program.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function: a program, flags, and code that is run instead -> what a run of 12 steps with a
    checkpoint every 4 printed."""
    folder = tmp_path_factory.mktemp("tags")
    lines = [{"path": f"{'ab'[i % 2]}/{i}.png", "hashtags": [f"#{i % 3}"]} for i in range(120)]
    (folder / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = data.Folder(str(PICTURES), labels=f"{folder}/labels.jsonl")
    hashtags.write_hashtags(source, folder / "tags")
    at, pictures = TINY.index("--decoder"), ["--task", "classify", "--val-data", PICTURES]
    tags = ["--labels", folder / "labels.jsonl", "--tags", folder / "tags"]
    plain = TINY[:at] + TINY[at + 2 :]
    flags = {"mae_pretrain": TINY, "weak_pretrain": plain + tags, "finetune": plain + pictures}
    return lambda name, *more, **how: stage(*flags[name], *more, program=f"{name}.py", **how)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A function: a program and flags -> the metrics of a run that nothing has stopped."""

    @cache
    def metrics(program, *flags, processes):
        out = tmp_path_factory.mktemp("whole") / "run"
        assert run(program, *flags, "--out", out, processes=processes).returncode == 0
        return read_metrics(out)

    return metrics


MEASURED = {"held_out_loss", "hit_1", "hit_5", "top1", "top5"}
MEASURED |= {f"{name}_by_frequency" for name in ("held_out_loss", "hit_1", "hit_5")}


@pytest.mark.parametrize(
    "program, mishap, processes, measures, flags",
    [
        ("mae_pretrain", "files", None, False, []),
        ("mae_pretrain", "kill", None, False, []),
        ("mae_pretrain", "SIGTERM", None, False, []),
        ("mae_pretrain", "SIGINT", None, False, []),
        ("mae_pretrain", "SIGTERM", None, False, ["--workers", "0"]),
        ("mae_pretrain", "files", 2, False, []),
        ("mae_pretrain", "SIGTERM", 2, False, ["--shard-group", "2"]),
        ("weak_pretrain", "kill", None, False, []),
        ("weak_pretrain", "SIGTERM", None, False, []),
        ("finetune", "kill", None, False, []),
        ("finetune", "SIGTERM", None, False, []),
        ("mae_pretrain", "SIGTERM", None, True, []),
        ("mae_pretrain", "gone", 2, True, []),  # it measures without workers
        ("weak_pretrain", "SIGTERM", None, True, []),
        ("finetune", "kill", None, True, []),
        ("finetune", "SIGTERM", 2, True, []),
    ],
)
def test_a_stage_that_gets_no_batch_saves_and_ends(
    program, mishap, processes, measures, flags, run, whole, tmp_path
):
    """In training or, at step 4, in measuring: this costs no step, only what would be measured."""
    command = [program, *flags, "--out", tmp_path / "run"]
    item, asked = 0 if measures else 5, mishap.startswith("SIG")
    code = MISHAP.format(stage=program, mishap=MISHAPS[mishap], trains=not measures, item=item)
    ran = run(*command, code=code, processes=processes)
    assert ran.returncode == (0 if asked else 1), ran.stderr
    step = "4" if measures else "[2-5]"  # item 5 is made ahead of the training
    assert re.search(f"stopped at step {step} of 12, saved: the same command goes on", ran.stdout)
    if measures:
        assert ran.stderr.count("not measured: ") == 1 and "Traceback" not in ran.stderr
        assert not any(
            MEASURED & {k for k in line if line[k]} for line in read_metrics(command[-1])
        )
    else:
        # Each process says one thing. (Two may write at once: a line may go on with the other's.)
        assert ran.stderr.count(f"{program}.py: ") == (0 if asked else processes or 1)
        assert ran.stderr.count("could not hand over a batch") == (not asked)
        assert len(ran.stderr.splitlines()) < 5
    assert run(*command, processes=processes).returncode == 0
    expected = whole(program, *flags, processes=processes)
    for line, right in zip(read_metrics(command[-1]), expected, strict=True):
        for name in right.keys() - (MEASURED if measures else set()):
            assert line[name] == right[name], name


def test_a_signal_amid_micro_batches_lets_the_step_end(run, tmp_path):
    mishap = "os.kill(parent, signal.SIGTERM)"
    code = MISHAP.format(stage="mae_pretrain", mishap=mishap, trains=True, item=13)
    flags = ["--micro-batch", "2", "--workers", "0", "--out", tmp_path / "run"]
    ran = run("mae_pretrain", *flags, code=code)
    assert "stopped at step 4 of 12, saved" in ran.stdout  # 13 is of the fourth
