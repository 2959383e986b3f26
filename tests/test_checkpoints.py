"""support/checkpoints.py: saved whole, found again, loaded bit for bit, no code run."""

import contextlib
import itertools
import os
import pickle
import re
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import (
    Trap,
    equal_states,
    full_disk,
    one_line,
    random_ids,
    random_images,
    stage,
    steps_in,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from model import MAE, initialize, parameter_groups
from support import launch
from support.checkpoints import find_checkpoint, load_checkpoint, save_checkpoint


def train(run, first, last):
    """Steps first .. last - 1; data and learning rate are functions of the step."""
    model, optimizer = run
    for step in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.zero_grad()
        images, ids = random_images(model, 4, 100 + step), random_ids(model, 4, 200 + step)
        model(images, ids).mean().backward()
        optimizer.step()
    return run


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def new_run(seed=0):
    model = MAE("16x2x2", image_size=(16, 24), patch_size=8, mask_ratio=0.5, decoder=(8, 1, 2))
    initialize(model, seed)
    groups = parameter_groups(model, weight_decay=0.05)
    return model, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)


def run_state(run):
    """Every number that the next step depends on, copied."""
    model, optimizer = run
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        moments = optimizer.state.get(parameter, {})
        state |= {f"{kind}/{name}": tensor.clone() for kind, tensor in moments.items()}
    return state


def restored(path):
    run = new_run(seed=1)
    record = load_checkpoint(path, *run)
    return run, record


def latest(folder):
    return folder / (folder / "LATEST").read_text().strip()


@pytest.fixture
def saved(tmp_path):
    """(run, checkpoints folder) after two steps, saved."""
    run, folder = train(new_run(), 0, 2), tmp_path / "checkpoints"
    save_checkpoint(folder, 2, *run, {"bad": 7, "identity": {"lr": 0.1}})
    return run, folder


def before_durable_calls(monkeypatch, action):
    """Call action() before each os.fsync and os.replace."""

    def preceded(call):
        def wrapper(*arguments, **keywords):
            action()
            return call(*arguments, **keywords)

        return wrapper

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, preceded(getattr(os, name)))


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(saved):
    run, folder = saved
    other, record = restored(latest(folder))
    assert record == {"bad": 7, "identity": {"lr": 0.1}, "step": 2}
    assert equal_states(run_state(other), run_state(run))
    assert equal_states(run_state(train(other, 2, 5)), run_state(train(run, 2, 5)))


def test_the_last_two_checkpoints_and_every_fourth_are_kept(saved):
    run, folder = saved
    for step in range(3, 10):
        save_checkpoint(folder, step, *train(run, step - 1, step), {}, keep_every=4)
        assert steps_in(folder) == sorted({*(4, 8)[: step // 4], step - 1, step})
        assert latest(folder).name.endswith(str(step))
    assert equal_states(run_state(restored(latest(folder))[0]), run_state(run))
    shutil.copytree(folder / "step-00000008", folder / "step-8-copy")  # a user's own: not ours
    (folder / "step-00000009").rename(folder / "elsewhere")
    (folder / "step-00000009").symlink_to("elsewhere")
    for step in (10, 11):
        save_checkpoint(folder, step, *train(run, step - 1, step), {}, 1)
    left = {path.name for path in folder.iterdir()}
    assert left == {"LATEST", "elsewhere", "step-8-copy", "step-00000009", "step-00000011"}


def test_a_checkpoint_in_the_background_is_of_the_step_it_began_at(saved, monkeypatch):
    run, folder = saved
    expected, trained, fsync = run_state(train(run, 2, 3)), threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (trained.wait(20), fsync(file)))
    wait = save_checkpoint(folder, 3, *run, {"bad": 0}, background=True)
    train(run, 3, 5)  # meanwhile
    assert latest(folder).name.endswith("2")
    trained.set()
    wait()
    assert latest(folder).name.endswith("3") and steps_in(folder) == [2, 3]
    assert equal_states(run_state(restored(latest(folder))[0]), expected)
    before_durable_calls(monkeypatch, full_disk)
    wait = save_checkpoint(folder, 5, *run, {}, background=True)
    with pytest.raises(OSError, match="cannot save .*step-00000005"):
        wait()
    assert steps_in(folder) == [2, 3]


def damage_facts(path):
    path.write_text(path.read_text().replace('"step": 3', '"step": -5'))


HARMS = [
    ("state.json", damage_facts, "identity or step is damaged"),
    ("__0_0.distcp", Path.unlink, "FileNotFoundError.*__0_0.distcp"),
    ("__0_0.distcp", cut, "__0_0.distcp is not of the size"),
    (".metadata", cut, ".metadata is not of the size"),
    ("state.json", cut, "JSONDecodeError"),
    ("state.json", Path.unlink, "FileNotFoundError.*state.json"),
    ("", shutil.rmtree, "FileNotFoundError.*state.json"),
]


@pytest.mark.parametrize(("name", "harm", "said"), HARMS)
def test_the_one_before_a_damaged_checkpoint_is_used(saved, capsys, name, harm, said):
    run, folder = saved
    save_checkpoint(folder, 3, *train(run, 2, 3), {"identity": {"lr": 0.1}})
    found = partial(find_checkpoint, folder.parent, None, {"lr": 0.1})
    assert found() == folder / "step-00000003"
    harm(folder / "step-00000003" / name)
    assert found() == folder / "step-00000002"
    assert re.search(f"DAMAGED CHECKPOINT: .*step-00000003: .*{said}", capsys.readouterr().err)
    (folder / "step-00000002" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="2 checkpoints, and none is whole: mend one") as error:
        found()
    assert one_line(error)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "model.pt"])
def test_nothing_in_a_folder_is_overwritten(tmp_path, name):
    for path in (tmp_path / name, tmp_path / "file"):
        path.write_text("{}")
    for _ in range(1 if name == "model.pt" else 2):  # first without, then beside checkpoints
        with pytest.raises(ValueError, match=f"holds a {name} that is not of this run") as error:
            find_checkpoint(tmp_path, None, {})
        assert one_line(error)
        (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "config.json").write_text('{"stage": "killed before it saved"}')
    (tmp_path / "model.pt").unlink(missing_ok=True)
    assert find_checkpoint(tmp_path, None, {}) is None
    with pytest.raises(ValueError, match="file cannot be written to"):
        find_checkpoint(tmp_path / "file" / "run", None, {})


def test_a_run_from_before_there_was_a_norm_eps_goes_on(tmp_path):
    run, config = train(new_run(), 0, 1), {"size": "16x2x2"}
    record = {"identity": {"model": config}}
    save_checkpoint(tmp_path / "checkpoints", 1, *run, record)
    found = partial(find_checkpoint, tmp_path, None)
    assert found({"model": config | {"norm_eps": 1e-6}}) == latest(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="norm_eps was 1e-06, is 1e-12"):
        found({"model": config | {"norm_eps": 1e-12}})


def test_a_checkpoint_is_never_removed_for_being_older_than_those_of_another_run(saved):
    """A run that went on from an early checkpoint finds later ones of its former life."""
    run, folder = saved
    for step in (30, 40):
        save_checkpoint(folder, step, *run, {})
    for step in (5, 6):
        save_checkpoint(folder, step, *run, {})
        assert latest(folder).name.endswith(str(step))
        assert restored(latest(folder))[1]["step"] == step


def check_checkpoints(folder, states):
    """Each one in the folder is whole, and LATEST names one."""
    steps = steps_in(folder)
    assert int(latest(folder).name.removeprefix("step-")) in steps
    for step in steps:
        run, record = restored(folder / f"step-{step:08d}")
        assert record["step"] == step and equal_states(run_state(run), states[step])


def test_a_save_on_a_full_disk_leaves_whole_checkpoints_only(saved):
    """The disk is full before the first durable call, before the second, and so on."""
    run, folder = saved
    states = {2: run_state(run)}
    states[3] = run_state(train(run, 2, 3))
    for room in itertools.count():
        left = iter(range(room))
        with pytest.MonkeyPatch.context() as monkeypatch:
            full = lambda left=left: next(left, None) is None and full_disk()
            before_durable_calls(monkeypatch, full)
            try:
                save_checkpoint(folder, 3, *run, {})
                break
            except OSError as error:
                assert "step-00000003" in str(error) and "\n" not in str(error)
        check_checkpoints(folder, states)
        directories = [path for path in folder.iterdir() if path.is_dir()]
        assert len(directories) == len(steps_in(folder))  # nothing else takes room
    assert room >= 4  # tensors, their index, the record and LATEST are each synced
    check_checkpoints(folder, states)
    assert steps_in(folder) == [2, 3] and latest(folder).name == "step-00000003"


def test_a_kill_at_any_instant_of_a_save_leaves_whole_checkpoints_only(
    saved, tmp_path, monkeypatch
):
    """What a kill would leave is copied before each durable call."""
    run, folder = saved
    states = {2: run_state(run)}
    copies = (tmp_path / f"copy-{number}" for number in itertools.count())
    before_durable_calls(monkeypatch, lambda: shutil.copytree(folder, next(copies)))
    for step in (3, 4):
        states[step] = run_state(train(run, step - 1, step))
        save_checkpoint(folder, step, *run, {})
    left = sorted(tmp_path.glob("copy-*"))
    assert len(left) >= 8
    for copy in left:
        check_checkpoints(copy, states)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize(
    "damaged", [lambda old: b"", lambda old: old[: len(old) // 2], lambda _: b"\x80 o"]
)
def test_a_damaged_file_of_a_checkpoint_is_one_line(saved, name, damaged):
    run, folder = saved
    path = latest(folder) / name
    path.write_bytes(damaged(path.read_bytes()))
    with pytest.raises((ValueError, OSError), match=str(latest(folder))) as error:
        load_checkpoint(latest(folder), *run)
    assert one_line(error)


@pytest.mark.parametrize("place", ["whole index", "in the index", "among the tensors"])
def test_code_in_a_checkpoint_is_refused_and_never_runs(saved, tmp_path, place):
    run, folder = saved
    path, sprung, name = latest(folder), tmp_path / "sprung", "model/cls_token"
    metadata = pickle.loads((path / ".metadata").read_bytes())
    if place == "in the index":
        metadata.planner_data = Trap(sprung)
    if place == "among the tensors":  # DCP itself unpickles any entry of bytes
        torch.save(Trap(sprung), path / "bytes")
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
        place_in_file = _StorageInfo("bytes", 0, (path / "bytes").stat().st_size)
        metadata.storage_data[MetadataIndex(name)] = place_in_file
    content = Trap(sprung) if place == "whole index" else metadata
    (path / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(OSError, match="refused") as error:
        load_checkpoint(path, *run)
    assert one_line(error)
    assert not sprung.exists()
    state = {name: run[0].state_dict()["cls_token"]}
    with contextlib.suppress(BaseException):
        dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    assert sprung.exists()  # the code was a live one


def test_a_checkpoint_of_python_3_13_goes_on(saved):
    """It calls the class of a path pathlib._local.PosixPath, which 3.11 and 3.12 do not have."""
    run, folder = saved
    path = latest(folder) / ".metadata"
    content = pickle.dumps(pickle.loads(path.read_bytes()), protocol=2)
    content = content.replace(b"cpathlib\n", b"cpathlib._local\n")  # the opcode of a class
    assert b"cpathlib._local\n" in content
    path.write_bytes(content)
    expected = {name: t.clone() for name, t in run[0].state_dict().items()}
    run[0].cls_token.data.zero_()
    load_checkpoint(latest(folder), *run)
    assert equal_states(run[0].state_dict(), expected)


IN_THE_BACKGROUND = """
import sys
from functools import partial
import torch
import torch.distributed as dist
import model as models
from support import checkpoints

dist.init_process_group("gloo")
rank, folder = dist.get_rank(), sys.argv[1]
model = models.Classifier("32x3x4", image_size=(16, 24), patch_size=8, classes=7, head_std=0.02)
models.parallelize(model, torch.device("cpu"), 2)
optimizer = torch.optim.AdamW(models.parameter_groups(model, 0.0), 1e-3, fused=True)
images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))

def step():
    model(images[rank : rank + 1]).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()

step()
expected = models.full_state(model)
with torch.no_grad():  # as a measurement does, after which FSDP's root is whole
    model(images)
norm = torch.nn.utils.get_total_norm
torch.nn.utils.get_total_norm = lambda tensors: norm(tensors, foreach=True)  # as on a GPU
save = partial(checkpoints.save_checkpoint, folder, background=True)
saved = save(1, model, optimizer, {"identity": {}})
for _ in range(20):  # the training's collectives and the checkpoint's do not get mixed up
    step()
saved()
save(21, model, optimizer, {"identity": {}})()
assert checkpoints.load_checkpoint(f"{folder}/step-00000001", model, optimizer)["step"] == 1
for name, tensor in models.full_state(model).items():
    assert torch.equal(tensor, expected[name]), name
dist.barrier()
"""


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    ran = stage(tmp_path / "checkpoints", processes=2, code=IN_THE_BACKGROUND)
    assert ran.returncode == 0, ran.stderr
    assert steps_in(tmp_path / "checkpoints") == [1, 21]


LOST = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer"
ENDS = [(RuntimeError(LOST), 1, "is gone"), (launch.Failure("loss"), 1, "loss")]
ENDS += [(ValueError("no igloo/"), 2, "igloo/"), (OSError("igloo/ is full"), 1, "igloo/")]
ENDS += [(KeyboardInterrupt(), 130, "program.py: stopped\n")]  # Ctrl-C before the loop


@pytest.mark.parametrize(("error", "status", "said"), ENDS)
def test_what_ended_a_run_is_told_apart(error, status, said, capsys):
    """gloo's errors are RuntimeErrors with its name in them. A folder may be named so."""
    with pytest.raises(SystemExit, match=f"^{status}$"), launch.report_errors("program.py"):
        raise error
    assert said in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a mistake"), launch.report_errors("program.py"):
        raise RuntimeError("a mistake")
