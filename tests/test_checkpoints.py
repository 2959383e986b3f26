"""test_checkpoints"""

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
from conftest import Trap, cut, equal_states, full_disk, one_line, steps_in, train
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

import model as models
from model import MAE
from support import checkpoints

# -------------------------------------------------------------------------------------- checkpoints


def new_run(seed=0):
    model = MAE("16x2x2", image_size=(16, 24), patch_size=8, mask_ratio=0.5, decoder=(8, 1, 2))
    models.initialize(model, seed)
    groups = models.parameter_groups(model, weight_decay=0.05)
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
    record = checkpoints.load_checkpoint(path, *run)
    return run, record


def latest(folder):
    return folder / (folder / "LATEST").read_text().strip()


@pytest.fixture
def saved(tmp_path):
    """(run, checkpoints folder) after two steps, saved."""
    run, folder = train(new_run(), 0, 2), tmp_path / "checkpoints"
    checkpoints.save_checkpoint(folder, 2, *run, {"bad": 7, "identity": {"lr": 0.1}})
    return run, folder


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(saved):
    run, folder = saved
    other, record = restored(latest(folder))
    assert record == {"bad": 7, "identity": {"lr": 0.1}, "step": 2}
    assert equal_states(run_state(other), run_state(run))
    assert equal_states(run_state(train(other, 2, 5)), run_state(train(run, 2, 5)))


def test_the_last_two_checkpoints_are_kept(saved):
    run, folder = saved
    for step in (3, 4):
        checkpoints.save_checkpoint(folder, step, *train(run, step - 1, step), {})
        assert steps_in(folder) == [step - 1, step]
        assert latest(folder).name.endswith(str(step))
    assert equal_states(run_state(restored(latest(folder))[0]), run_state(run))


def test_some_checkpoints_are_kept_for_good(saved):
    run, folder = saved
    for step in range(3, 10):
        checkpoints.save_checkpoint(folder, step, *train(run, step - 1, step), {}, 1, keep_every=4)
    assert steps_in(folder) == [4, 8, 9]
    shutil.copytree(folder / "step-00000008", folder / "step-8-copy")  # a user's own: not ours
    (folder / "step-00000009").rename(folder / "elsewhere")
    (folder / "step-00000009").symlink_to("elsewhere")
    for step in (10, 11):
        checkpoints.save_checkpoint(folder, step, *train(run, step - 1, step), {}, 1)
    left = {path.name for path in folder.iterdir()}
    assert left == {"LATEST", "elsewhere", "step-8-copy", "step-00000009", "step-00000011"}


def test_a_checkpoint_in_the_background_is_of_the_step_it_was_begun_at(saved, monkeypatch):
    run, folder = saved
    expected, trained, fsync = run_state(train(run, 2, 3)), threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (trained.wait(20), fsync(file)))
    wait = checkpoints.save_checkpoint(folder, 3, *run, {"bad": 0}, background=True)
    train(run, 3, 5)  # meanwhile
    assert latest(folder).name.endswith("2")
    trained.set()
    wait()
    assert latest(folder).name.endswith("3") and steps_in(folder) == [2, 3]
    assert equal_states(run_state(restored(latest(folder))[0]), expected)
    before_durable_calls(monkeypatch, full_disk)
    wait = checkpoints.save_checkpoint(folder, 5, *run, {}, background=True)
    with pytest.raises(OSError, match="cannot save .*step-00000005"):
        wait()
    assert steps_in(folder) == [2, 3]


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("__0_0.distcp", Path.unlink, "__0_0.distcp is missing"),
        ("__0_0.distcp", cut, "__0_0.distcp has .* bytes, not"),
        (".metadata", cut, ".metadata has .* bytes, not"),
        ("state.json", cut, "state.json cannot be read"),
        ("state.json", Path.unlink, "state.json is missing"),
        ("", shutil.rmtree, "state.json is missing"),
    ],
)
def test_instead_of_a_damaged_checkpoint_the_one_before_is_used(saved, capsys, name, harm, said):
    run, folder = saved
    checkpoints.save_checkpoint(folder, 3, *train(run, 2, 3), {"identity": {"lr": 0.1}})
    found = partial(checkpoints.find_checkpoint, folder.parent, None, {"lr": 0.1})
    assert found() == folder / "step-00000003"
    harm(folder / "step-00000003" / name)
    assert found() == folder / "step-00000002"
    assert re.search(f"DAMAGED CHECKPOINT: .*step-00000003: .*{said}", capsys.readouterr().err)
    (folder / "step-00000002" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="2 checkpoints, and none is whole: mend one") as error:
        found()
    assert one_line(error)


def test_a_run_from_before_there_was_a_norm_eps_goes_on(tmp_path):
    run, config = train(new_run(), 0, 1), {"size": "16x2x2"}
    record = {"identity": {"model": config}}
    checkpoints.save_checkpoint(tmp_path / "checkpoints", 1, *run, record)
    found = partial(checkpoints.find_checkpoint, tmp_path, None)
    assert found({"model": config | {"norm_eps": 1e-6}}) == latest(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="norm_eps was 1e-06, is 1e-12"):
        found({"model": config | {"norm_eps": 1e-12}})


def test_a_checkpoint_is_never_removed_for_being_older_than_those_of_another_run(saved):
    """A run that went on from an early checkpoint finds later ones of its former life."""
    run, folder = saved
    for step in (30, 40):
        checkpoints.save_checkpoint(folder, step, *run, {})
    for step in (5, 6):
        checkpoints.save_checkpoint(folder, step, *run, {})
        assert latest(folder).name.endswith(str(step))
        assert restored(latest(folder))[1]["step"] == step


def before_durable_calls(monkeypatch, action):
    """Run `action` before each os.fsync and os.replace: who writes for good calls them."""

    def preceded(call):
        def wrapper(*arguments, **keywords):
            action()
            return call(*arguments, **keywords)

        return wrapper

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, preceded(getattr(os, name)))


def disk_with_room(calls):
    """An action that does nothing so many times, and then fails like a full disk."""
    left = iter(range(calls))
    return lambda: None if next(left, None) is not None else full_disk()


def check_checkpoints(folder, states):
    """Each one in the folder is whole, and LATEST names one."""
    steps = steps_in(folder)
    assert int(latest(folder).name.removeprefix("step-")) in steps
    for step in steps:
        run, record = restored(folder / f"step-{step:08d}")
        assert record["step"] == step and equal_states(run_state(run), states[step])


def test_a_save_on_a_full_disk_leaves_whole_checkpoints_only(saved):
    run, folder = saved
    states = {2: run_state(run)}
    states[3] = run_state(train(run, 2, 3))
    for room in itertools.count():
        with pytest.MonkeyPatch.context() as monkeypatch:
            before_durable_calls(monkeypatch, disk_with_room(room))
            try:
                checkpoints.save_checkpoint(folder, 3, *run, {})
                break
            except OSError as error:
                assert "step-00000003" in str(error) and "\n" not in str(error)
        # LATEST is renamed before its folder is synced: then it is the new one, and whole.
        assert latest(folder).name in ("step-00000002", "step-00000003")
        check_checkpoints(folder, states)
        directories = [path for path in folder.iterdir() if path.is_dir()]
        assert len(directories) == len(steps_in(folder))  # nothing else takes room
    # Tensors, their index, the record and LATEST, each written for good: so it has been tried.
    assert room >= 4
    assert steps_in(folder) == [2, 3] and latest(folder).name == "step-00000003"
    check_checkpoints(folder, states)


def test_a_kill_at_any_instant_of_a_save_leaves_whole_checkpoints_only(
    saved, tmp_path, monkeypatch
):
    """What a kill would leave, copied each time that something is about to be written for good."""
    run, folder = saved
    states = {2: run_state(run)}
    copies = (tmp_path / f"copy-{number}" for number in itertools.count())
    before_durable_calls(monkeypatch, lambda: shutil.copytree(folder, next(copies)))
    for step in (3, 4):
        states[step] = run_state(train(run, step - 1, step))
        checkpoints.save_checkpoint(folder, step, *run, {})
    left = sorted(tmp_path.glob("copy-*"))
    assert len(left) >= 8
    for copy in left:
        check_checkpoints(copy, states)


@pytest.mark.parametrize("place", ["whole", "inside"])
def test_code_in_a_checkpoint_s_metadata_is_refused_and_never_runs(saved, tmp_path, place):
    run, folder = saved
    path, sprung = latest(folder) / ".metadata", tmp_path / "sprung"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = Trap(sprung)
    path.write_bytes(pickle.dumps(metadata if place == "inside" else Trap(sprung)))
    with pytest.raises((ValueError, OSError), match="system: refused") as error:
        checkpoints.load_checkpoint(latest(folder), *run)
    assert one_line(error)
    assert not sprung.exists()
    pickle.loads(path.read_bytes())
    assert sprung.exists()  # so it was a live one


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("content", ["", "half", "other"])
def test_a_damaged_file_of_a_checkpoint_is_one_line(saved, name, content):
    run, folder = saved
    path = latest(folder) / name
    whole = path.read_bytes()
    path.write_bytes({"": b"", "half": whole[: len(whole) // 2], "other": b"\x80 other"}[content])
    with pytest.raises((ValueError, OSError), match=str(latest(folder))) as error:
        checkpoints.load_checkpoint(latest(folder), *run)
    assert one_line(error)


def test_pickled_objects_among_a_checkpoint_s_tensors_are_refused_and_never_run(saved, tmp_path):
    """DCP itself unpickles an entry of bytes without restriction."""
    run, folder = saved
    path, sprung, name = latest(folder), tmp_path / "sprung", "model/cls_token"
    torch.save(Trap(sprung), path / "bytes")
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    size = (path / "bytes").stat().st_size
    metadata.storage_data[MetadataIndex(name)] = _StorageInfo("bytes", 0, size)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises((ValueError, OSError), match="refused") as error:
        checkpoints.load_checkpoint(path, *run)
    assert one_line(error)
    assert not sprung.exists()
    state = {name: run[0].state_dict()["cls_token"]}
    dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    assert sprung.exists()  # so it was a live one
