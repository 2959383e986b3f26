"""The promises of this repository, each tested on stage 1 as it is run: in processes of its own."""

import contextlib
import json
import os
import pickle
import random
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SERVER, TINY, read_metrics, run_program, stage

import model as models
from support import checkpoints


def command(*arguments, processes=None, program="mae_pretrain.py"):
    """The command line of a stage, under torchrun if a number of processes is given."""
    if processes is None:
        return [sys.executable, program, *map(str, arguments)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    # Each test has a port of its own choosing: two test runs on a machine must not meet.
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return [*launcher, program, *map(str, arguments)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The output folder of one plain run."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert stage(*TINY, "--out", out).returncode == 0
    return out


def losses(out):
    keys = ("loss", "grad_norm", "held_out_loss")
    return [[line[key] for key in keys if key in line] for line in read_metrics(out)]


def same_weights(a, b):
    (a, _), (b, _) = (models.read_weights(out / "model.pt") for out in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# 1. Same command, same optimisation, on any number of processes.


CURVE = [*TINY, "--batch-size", "24", "--steps", "20"]  # for 1, 2, 3 and 4 processes


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    """The losses of a plain run of one process."""
    out = tmp_path_factory.mktemp("curve") / "run"
    assert stage(*CURVE, "--out", out).returncode == 0
    return losses(out)


# (processes, micro-batches, flags): one process, replicas, and shards in groups of all or of some.
SPREAD = [(None, 2, []), (1, 1, []), (2, 2, []), (3, 2, []), (4, 1, [])]
SPREAD += [(n, pieces, ["--shard-group", n]) for n, pieces in ((2, 2), (3, 2), (4, 1))]
SPREAD += [(4, 3, ["--shard-group", 2])]


@pytest.mark.parametrize(("processes", "pieces", "extra"), SPREAD)
def test_1_same_optimisation_on_any_number_of_processes(processes, pieces, extra, curve, tmp_path):
    micro_batch = 24 // (processes or 1) // pieces
    extra = [*extra, "--micro-batch", micro_batch]
    ran = stage(*CURVE, "--out", tmp_path / "run", *extra, processes=processes)
    assert ran.returncode == 0, ran.stderr
    assert f"{processes or 1} processes x {pieces} x {micro_batch}" in ran.stdout
    spread = f"{processes} replicas (" if (processes or 1) > 1 else "parallel one process ("
    assert (
        f"sharded over {extra[1]} processes" if "--shard-group" in extra else spread
    ) in ran.stdout
    for ours, theirs in zip(losses(tmp_path / "run"), curve, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_1_a_batch_that_cannot_be_dealt_is_refused(tmp_path):
    ran = stage(*TINY, "--out", tmp_path / "run", "--batch-size", "6", processes=2)
    assert ran.returncode != 0
    assert "a batch of 6 cannot be dealt to 2 processes" in ran.stderr


# 2. The order of samples is a pure function of (seed, epoch, position). More of it in test_data.py.


def test_2_workers_change_nothing(uninterrupted, tmp_path):
    assert stage(*TINY, "--out", tmp_path / "run", "--workers", "3").returncode == 0
    assert read_metrics(tmp_path / "run") == read_metrics(uninterrupted)
    assert same_weights(tmp_path / "run", uninterrupted)


def test_2_another_seed_is_another_run(uninterrupted, tmp_path):
    assert stage(*TINY, "--out", tmp_path / "run", "--seed", "1").returncode == 0
    assert losses(tmp_path / "run")[0] != pytest.approx(losses(uninterrupted)[0], rel=1e-3)


# 3. Stop anywhere, go on exactly.


def test_3_kill_9_at_random_instants(uninterrupted, tmp_path):
    out, draws = tmp_path / "run", random.Random(0)
    code = "import os, sys; os.setsid(); import mae_pretrain; mae_pretrain.main(sys.argv[1:])"
    argv, killed = ["mae_pretrain.py", *TINY, "--out", str(out)], 0
    for _ in range(6):
        run = SERVER.Process(target=run_program, args=(argv, {}, [os.devnull] * 2, None, code))
        run.start()
        before, deadline = newest(out), time.monotonic() + 120
        # Wait for progress, then for a random moment: in a step, in a save, in a clean-up.
        while newest(out) == before and run.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draws.random() * 0.1)
        with contextlib.suppress(ProcessLookupError):  # it has just finished
            os.killpg(run.pid, signal.SIGKILL)
        run.join()
        killed += run.exitcode == -signal.SIGKILL
        assert newest(out) is None or (newest(out) / "state.json").is_file()
    assert killed >= 2  # the others may have been at the run's end
    assert stage(*TINY, "--out", out).returncode == 0
    assert read_metrics(out) == read_metrics(uninterrupted)
    assert same_weights(out, uninterrupted)


FAILS = """
import sys
import mae_pretrain

plain = mae_pretrain.loader

def loader(batches, items, *options, **others):
    for item, batch in zip(items, plain(batches, items, *options, **others)):
        if batches.process == 1 and item == 5:
            raise {error}
        yield batch

mae_pretrain.loader = loader
mae_pretrain.main(sys.argv[1:])
"""


def test_3_what_one_process_meets_is_said_and_ends_the_others(tmp_path):
    for number, error in enumerate(("OSError('the disk is gone')", "KeyError('a mistake')")):
        out = tmp_path / str(number)
        ran = stage(*TINY, "--out", out, processes=2, code=FAILS.format(error=error))
        assert ran.returncode == 1 and error.split("'")[1] in ran.stderr
        assert "mae_pretrain.py: another process is gone" in ran.stderr
        assert ("Traceback" in ran.stderr) == (number == 1)
        assert newest(out).name == "step-00000004"


def test_3_processes_that_would_wait_for_each_other_are_told_apart(tmp_path):
    code = """
import os, sys
import mae_pretrain
mae_pretrain.main([*sys.argv[1:], *["--micro-batch", "2"][: 2 * int(os.environ["RANK"])]])
"""
    ran = stage(*TINY, "--out", tmp_path / "run", processes=2, code=code)
    assert "process 1 finds micro_batch 2, the first one 4: all nodes want" in ran.stderr
    assert not (tmp_path / "run").exists()


def test_3_processes_that_do_not_meet_are_one_line(tmp_path):
    code = """
import os, sys
from datetime import timedelta
import mae_pretrain

alone = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
os.environ |= alone | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
mae_pretrain.launch.timedelta = lambda minutes: timedelta(seconds=1)  # not to wait for ten minutes
mae_pretrain.main(sys.argv[1:])
"""
    ran = stage(*TINY, "--out", tmp_path / "run", code=code)
    assert ran.returncode == 1 and not (tmp_path / "run").exists()
    assert "or was never met" in ran.stderr.splitlines()[-1]


@pytest.mark.parametrize("spread", [[], ["--shard-group", "2"]])
def test_3_kill_9_of_one_process_of_two(spread, tmp_path):
    """torchrun ends the other one and starts both again, by itself.

    It shares a store with its processes, in which those who start again may find the addresses of
    the dead, unless it is told not to (pytorch/pytorch issue 135712).
    """
    plain, out = tmp_path / "plain", tmp_path / "killed"
    assert stage(*TINY, *spread, "--out", plain, processes=2).returncode == 0
    line = command(*TINY, *spread, "--out", out, processes=2)
    line[3:3] = ["--max-restarts", "1"]
    unshared = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(line, env=unshared, **options) as run:
        while newest(out) is None and run.poll() is None:
            time.sleep(0.01)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        printed = run.stdout.read().decode()
    assert run.returncode == 0 and "going on from" in printed, printed
    assert read_metrics(out) == read_metrics(plain)
    assert same_weights(out, plain)


def newest(out):
    pointer = out / "checkpoints" / "LATEST"
    return pointer.parent / pointer.read_text() if pointer.is_file() else None


@pytest.mark.parametrize(
    ("processes", "number"), [(None, signal.SIGTERM), (None, signal.SIGUSR1), (2, signal.SIGTERM)]
)
def test_3_a_signal_saves_and_the_same_command_goes_on(processes, number, uninterrupted, tmp_path):
    out = tmp_path / "run"
    line = command(*TINY, "--out", out, processes=processes)
    # torchrun hands a signal on to all that its processes have started, the loaders as well
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE) as process:
        while b"step 5/12" not in process.stdout.readline():
            pass
        # To the loaders as well, as Slurm does.
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (process.pid, *map(int, children if processes is None else ())):
            os.kill(pid, number)
        printed = process.stdout.read().decode()
        assert processes or process.wait() == 0  # torchrun's own status says that it was stopped
    assert "the same command goes on" in printed
    stopped = json.loads((newest(out) / "state.json").read_text())["step"]
    assert 5 <= stopped < 12
    ran = stage(*TINY, "--out", out)
    assert f"going on from {newest(out).with_name(f'step-{stopped:08}')}" in ran.stdout
    if processes is None:
        assert read_metrics(out) == read_metrics(uninterrupted)
        assert same_weights(out, uninterrupted)
    for ours, theirs in zip(losses(out), losses(uninterrupted), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_3_an_earlier_checkpoint_of_a_run_becomes_its_last(uninterrupted, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    stopped = stage(
        *TINY, "--out", out, "--resume", out / "checkpoints" / "step-00000008", "--max-bad", "-1"
    )
    assert stopped.returncode == 2  # refused: nothing has changed
    assert newest(out).name == "step-00000012"
    step_8 = out / "checkpoints" / "step-00000008"
    config = json.loads((out / "config.json").read_text())
    checkpoints.begin_run(out, config, step_8, 8)
    checkpoints.LOCKS.pop().close()  # as if it had been killed right then
    assert newest(out) == step_8 and read_metrics(out)[-1]["step"] == 8
    assert stage(*TINY, "--out", out).returncode == 0
    assert read_metrics(out) == read_metrics(uninterrupted)
    assert same_weights(out, uninterrupted)


# (processes, flags): one process, replicas, shards, and two copies of the model in two shards each.
WAYS = [(None, []), (4, []), (2, ["--shard-group", "2"]), (4, ["--shard-group", "2"])]


@pytest.mark.parametrize(("processes", "spread"), WAYS)
def test_3_another_number_of_processes_goes_on_with_the_same_samples(
    processes, spread, uninterrupted, tmp_path
):
    """From the checkpoint of each way of spreading a run over processes, in each other way, and in
    the same way bit for bit. (Of three processes and more: the order of a sum shows.)"""
    first = tmp_path / "first"
    assert stage(*TINY, *spread, "--out", first, processes=processes).returncode == 0
    step_8 = first / "checkpoints" / "step-00000008"
    for number, (others, flags) in enumerate([*WAYS, (2, [])]):
        out = tmp_path / str(number)
        ran = stage(*TINY, *flags, "--out", out, "--resume", step_8, processes=others)
        assert ran.returncode == 0, ran.stderr
        assert [line["step"] for line in read_metrics(out)] == list(range(1, 13))
        for ours, theirs in zip(losses(out), losses(uninterrupted), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        if (others, flags) == (processes, spread):
            assert read_metrics(out) == read_metrics(first) and same_weights(out, first)


# 4. Nothing non-finite is stepped on or saved.


def test_4_nothing_non_finite_is_stepped_on_or_saved(tmp_path):
    model = models.MAE("16x2x2", decoder=(16, 1, 2), image_size=16, patch_size=4)
    state = model.state_dict()
    state["blocks.1.mlp.fc1.weight"][0, 0] = float("inf")
    models.save_weights(tmp_path / "broken.pt", state, model.config)
    start = ("--init", tmp_path / "broken.pt", "--batch-size", "8", "--steps", "3")
    ran = stage(*start, "--out", tmp_path / "run")
    assert ran.returncode == 1
    assert "step 1: loss nan" in ran.stderr and "Positions 0 to 7" in ran.stderr
    found, *advice = ran.stderr.split("Gradients not finite: ")[1].splitlines()
    named = found.split()
    order = [name for name, _ in model.named_parameters()]
    assert "blocks.1.mlp.fc1.weight" in named
    assert named == sorted(named, key=order.index)
    assert "a lower --lr" in advice[0]
    drawn = stage(*shlex.split(advice[1])[2:])  # python mae_pretrain.py ...
    assert drawn.returncode == 0 and (tmp_path / "run" / "step-1.png").exists()
    assert [f"position {i}: toy:" in drawn.stdout for i in range(9)] == [True] * 8 + [False]
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "model.pt").exists()


def test_4_weights_that_a_step_made_non_finite_are_not_saved(tmp_path):
    ran = stage(*TINY, "--out", tmp_path / "run", "--lr", "1e18", "--warmup", "0", "--steps", "1")
    assert ran.returncode == 2 and "weights that are not finite" in ran.stderr
    assert not list((tmp_path / "run").rglob("step-*"))
    assert not (tmp_path / "run" / "model.pt").exists()


# 5. Bad input is named, counted, capped and never fatal alone.


def spoil(photos):
    """Make five pictures of a folder unreadable, each in its own way, and return their names."""
    paths = sorted(photos.iterdir())[:5]
    paths[0].write_bytes(paths[0].read_bytes()[:200])  # truncated
    paths[1].write_bytes(b"")
    paths[2].write_text("not a picture")
    header = struct.pack(">2I5B", 30_000, 30_000, 8, 2, 0, 0, 0)  # a bomb: 900 million pixels
    chunk = b"IHDR" + header
    paths[3].write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )
    paths[4].unlink()
    paths[4].symlink_to("nowhere")
    return [path.name for path in paths]


def test_5_bad_pictures_are_named_counted_and_capped(photos, tmp_path):
    names = spoil(photos)
    run = [*TINY[2:], "--data", photos, "--batch-size", "40"]  # every picture comes once or twice
    ran = stage(*run, "--out", tmp_path / "run", "--max-bad", "0.2", "--steps", "2")
    assert ran.returncode == 0, ran.stderr
    metrics = read_metrics(tmp_path / "run")
    assert 5 <= metrics[-1]["bad"] <= 20
    assert sum(name in ran.stderr for name in names) >= 4  # one may be held out
    assert all(line["loss"] < 10 for line in metrics)
    stopped = stage(*run, "--out", tmp_path / "strict", "--max-bad", "0.0001")
    assert stopped.returncode == 1
    assert "over --max-bad" in stopped.stderr and "Traceback" not in stopped.stderr
    for path in photos.iterdir():  # however many may be unreadable: all of them are too many
        path.unlink()
        path.write_bytes(b"")
    stopped = stage(*run, "--out", tmp_path / "none", "--max-bad", "1")
    assert stopped.returncode == 1 and "40 of 40 pictures cannot be read" in stopped.stderr
    assert not (tmp_path / "none" / "checkpoints").exists()


def test_5_one_bad_picture_is_never_fatal(photos, tmp_path):
    """However often it comes (16 times here), and alone in its batch."""
    (photos / "007.jpg").write_bytes(b"")
    run = [*TINY[2:], "--data", photos, "--batch-size", "1", "--steps", 16 * 38, "--workers", "0"]
    ran = stage(*run, "--out", tmp_path / "run", "--save-every", "1000")
    assert ran.returncode == 0, ran.stderr
    metrics = read_metrics(tmp_path / "run")
    assert metrics[-1]["bad"] == 16 and ran.stderr.count("007.jpg") == 1  # it is named once
    two = [*run, "--batch-size", "4", "--steps", 16 * 19, "--lanes", "2"]
    ran = stage(*two, "--out", tmp_path / "two", processes=2)
    assert ran.returncode == 0 and ran.stderr.count("007.jpg") == 1, ran.stderr
    alone = [line for line, before in zip(metrics[1:], metrics) if line["bad"] > before["bad"]]
    assert all(line["loss"] == line["grad_norm"] == 0 for line in alone)


def test_5_a_bad_picture_weighs_nothing(photos, tmp_path):
    """The loss of a batch with an unreadable picture is that of the others alone."""
    run = [*TINY[2:], "--data", photos, "--batch-size", "38", "--steps", "1", "--max-bad", "1"]
    plain = stage(*run, "--out", tmp_path / "a", "--micro-batch", "1")
    assert plain.returncode == 0, plain.stderr
    spoil(photos)
    spoiled = [stage(*run, "--out", tmp_path / f"b{m}", "--micro-batch", m) for m in (1, 19, 38)]
    assert all(ran.returncode == 0 for ran in spoiled), spoiled[0].stderr
    first, *others = (losses(tmp_path / f"b{m}")[0] for m in (1, 19, 38))
    for loss in others:
        assert loss == pytest.approx(first, rel=1e-5)
    # On two processes, of which one has more of them: the mean is over all, not of two means.
    run = [*TINY[2:], "--data", photos, "--batch-size", "36", "--steps", "2", "--max-bad", "1"]
    for name, processes in (("one", None), ("two", 2)):
        ran = stage(*run, "--out", tmp_path / name, "--lanes", "2", processes=processes)
        assert ran.returncode == 0, ran.stderr
    for ours, theirs in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    # Were the zero pictures in the mean, they would pull it down by their share, 4 of 38 or more.
    assert losses(tmp_path / "b1")[0][0] == pytest.approx(losses(tmp_path / "a")[0][0], rel=0.05)


# 6. Evaluation is exact: test_evaluate.py.
# 7. A stage inherits the architecture and says what it loaded: test_mae_pretrain.py, test_model.py.


# 8. No code runs from a file.


class Attack:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_8_no_code_runs_from_a_file(uninterrupted, tmp_path):
    marker = tmp_path / "marker"
    torch.save({"model": Attack(marker)}, tmp_path / "attack.pt")
    ran = stage(*TINY, "--init", tmp_path / "attack.pt", "--out", tmp_path / "a")
    assert ran.returncode == 2 and len(ran.stderr.strip().splitlines()) == 1
    subprocess.run(["cp", "-r", uninterrupted, tmp_path / "b"], check=True)
    metadata = tmp_path / "b" / "checkpoints" / "step-00000012" / ".metadata"
    state, harmless = metadata.with_name("state.json"), metadata.stat().st_size

    def attack(content):  # as long as it should be
        metadata.write_bytes(content.ljust(harmless, b"."))
        assert metadata.stat().st_size == json.loads(state.read_text())["files"][".metadata"]

    attack(pickle.dumps(Attack(marker)))
    ran = stage(*TINY, "--out", tmp_path / "b")
    assert ran.returncode == 1 and "refused" in ran.stderr
    # A dotted name reaches through a metadata module into what it has imported.
    for name in ("os.system", "torch.os.system"):
        call = b"\x80\x04\x8c%%torch.distributed.checkpoint.metadata\x8c%c%b\x93"
        call %= (len(name), name.encode())
        command = f"touch {marker}".encode()
        attack(call + b"\x8c%c%b\x85R." % (len(command), command))
        ran = stage(*TINY, "--out", tmp_path / "b")
        assert ran.returncode == 1 and "refused" in ran.stderr
    assert not marker.exists()


# 9. Runs with or without CUDA, Triton and torchrun, from the same file.


def test_9_no_optional_package_is_imported():
    code = "import mae_pretrain, sys; print({'torchvision', 'timm'} & set(sys.modules))"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "set()"


def test_9_the_checkpoint_of_torchrun_serves_a_single_process(tmp_path):
    ran = stage(*TINY, "--out", tmp_path / "run", "--save-every", "6", processes=2)
    assert ran.returncode == 0, ran.stderr
    again = stage(*TINY, "--out", tmp_path / "run", "--save-every", "6")
    assert again.returncode == 0 and "going on from" in again.stdout
    assert Path(tmp_path / "run" / "model.pt").is_file()
