"""A training run's checkpoints: written whole or not at all, found again, loaded.

    save_checkpoint    tensors by torch.distributed.checkpoint (DCP), state.json, then LATEST
    load_checkpoint    loads them again, on any number of processes
    find_checkpoint    the checkpoint that a run goes on from, if it is of the same run
    begin_run          the folder of a run: its lock, config.json and metrics.jsonl

No code runs from a checkpoint. It holds plain tensors, and their index, a pickle, is
read by an unpickler that accepts PyTorch's metadata classes only.
"""

import json
import os
import pickle
import re
import shutil
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.distributed as dist

# DCP warns at each save that there is no process group. One process needs none.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


def save_checkpoint(
    folder, step, model, optimizer, record, keep_last=2, keep_every=None, background=False
):
    """Write folder/step-NNN: tensors by DCP, `record` in state.json. Then point LATEST to it.

    All files are written to a temporary directory and synced before it is renamed, and
    old checkpoints are removed last: a kill at any instant leaves a whole one. The last
    `keep_last` checkpoints and every `keep_every`-th step are kept. background: copy
    the tensors to host memory and write them while training goes on.

    All processes call it. It returns wait(); call that before the next save and at the
    end of the run. Both raise OSError if a file cannot be written: older checkpoints
    stay. Raises ValueError if a parameter is not finite.
    """
    import torch.distributed.checkpoint as dcp

    alone = not dist.is_initialized()
    state = training_state(model, optimizer)
    sharded = any(hasattr(tensor, "full_tensor") for tensor in state.values())
    norm = torch.nn.utils.get_total_norm(list(model.parameters()))
    if not (norm.full_tensor() if sharded else norm).isfinite():
        raise ValueError(f"step {step} made weights that are not finite: nothing of it was saved")
    if not (alone or sharded):
        # Replicas: each process writes a part. DCP would copy all, and let one write.
        state = dict([*state.items()][dist.get_rank() :: dist.get_world_size()])
    record = {**record, "step": step}
    final, temporary = Path(folder, f"step-{step:08d}"), Path(folder, ".saving")
    first = alone or dist.get_rank() == 0
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()

    def finish(write):
        try:
            write()  # returns when all processes have written
            if first:
                publish(temporary, final, record, keep_last, keep_every)
        except (OSError, dcp.api.CheckpointException, RuntimeError) as error:
            if is_lost(error):
                raise
            shutil.rmtree(temporary, ignore_errors=True)
            why = f"cannot save {final}: {last_line(error)}"
            raise OSError(f"{why}. Checkpoints before it, if any, are whole") from error

    def wait():
        began = time.monotonic()
        saved.result()
        if first and (seconds := time.monotonic() - began) > 1:
            print(f"waited {seconds:.0f} s until {final} was written")

    options = {"storage_writer": dcp.FileSystemWriter(temporary), "no_dist": alone}
    if background:
        written = dcp.async_save(state, process_group=saving_group(dist.group.WORLD), **options)
        saved = SAVER.submit(finish, written.result)
        return wait
    finish(partial(dcp.save, state, **options))
    barrier()
    return lambda: None


SAVER = ThreadPoolExecutor(1)


@lru_cache(1)
def saving_group(everyone):
    """A group of all processes, whose collectives do not mix with the training's."""
    return everyone and dist.new_group(backend="gloo", group_desc="checkpoints")


def publish(temporary, final, record, keep_last, keep_every):
    """Rename a directory of synced tensors, point LATEST to it, remove old checkpoints."""
    stored = {entry.relative_path for entry in read_metadata(temporary).storage_data.values()}
    if missing := [name for name in stored if not (temporary / name).exists()]:
        raise OSError(f"no {min(missing)} of another process: do all nodes share the folder?")
    files = {path.name: path.stat().st_size for path in temporary.iterdir()}
    write_file(temporary / "state.json", json.dumps(record | {"files": files}))
    shutil.rmtree(final, ignore_errors=True)  # of a run killed before it moved LATEST
    os.replace(temporary, final)
    write_file(final.with_name("LATEST"), final.name)  # syncs the folder: both names
    # Later checkpoints are left from before the run went back: they do not count.
    older = [path for path in checkpoints_in(final.parent) if path.name < final.name]
    for old in older[: max(0, len(older) - keep_last + 1)]:
        keep = keep_every and int(old.name.removeprefix("step-")) % keep_every == 0
        if not keep and not old.is_symlink():  # the target of a link is not ours
            shutil.rmtree(old)


def training_state(model, optimizer):
    """A run's tensors as one flat dict: buffers, trained parameters and their moments.

    The names do not depend on how the model is spread over processes.
    """
    if hasattr(model, "reshard"):
        model.reshard()  # after a forward without backward, FSDP's root is still gathered
    state = {f"model/{name}": buffer for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state[f"model/{name}"] = parameter.detach()
        for moment, tensor in optimizer.state.get(parameter, {}).items():
            if moment != "step":
                state[f"{moment}/{name}"] = tensor
    return state


def load_checkpoint(path, model, optimizer):
    """Load a checkpoint into a model and its AdamW or SGD, in place, and return its record.

    Raises OSError if the checkpoint is damaged or does not fit.
    """
    import torch.distributed.checkpoint as dcp

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *_, **__):
            return read_metadata(path)

    record = json.loads(Path(path, "state.json").read_text())
    del record["files"]
    for group in optimizer.param_groups:
        names = ("exp_avg", "exp_avg_sq") if "betas" in group else ("momentum_buffer",)
        names += ("average",) if group.get("ema") else ()
        for parameter in group["params"]:
            optimizer.state[parameter] = {name: torch.zeros_like(parameter) for name in names}
            if "betas" in group:
                device = parameter.device if group["fused"] else "cpu"  # as AdamW does
                step = torch.tensor(float(record["step"]), device=device)
                optimizer.state[parameter]["step"] = step
    try:
        read_metadata(path)  # DCP would print a traceback of what is wrong with it
        state = training_state(model, optimizer)
        dcp.load(state, storage_reader=Reader(path), no_dist=not dist.is_initialized())
    except (Exception, dcp.api.CheckpointException) as error:
        # A damaged file fails in many ways. DCP's exception is not an Exception.
        why = f"cannot load {path}: {last_line(error)}"
        raise OSError(f"{why}; --resume another, or use another --out") from error
    return record


def read_metadata(path):
    """DCP's index of a checkpoint, a pickle. It may hold METADATA_CLASSES only."""
    with open(Path(path) / ".metadata", "rb") as file:
        return MetadataUnpickler(file).load()


# The classes in DCP's index of tensors.
METADATA_CLASSES = {
    "pathlib": "PosixPath WindowsPath",
    "torch": "Size",
    "torch.serialization": "_get_layout",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed.checkpoint.metadata": "ChunkStorageMetadata Metadata MetadataIndex "
    "StorageMeta TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
}


class MetadataUnpickler(pickle.Unpickler):
    """Refuses other classes, also that of an entry of bytes: DCP unpickles it unchecked."""

    def find_class(self, module, name):
        module = "pathlib" if module == "pathlib._local" else module  # written by Python 3.13
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in METADATA_CLASSES.get(module, "").split():
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the checkpoint's metadata asks for {module}.{name}: refused")


def find_checkpoint(out, resume, identity):
    """The checkpoint that a run in `out` goes on from, or None if the run is new.

    resume: None, or the path of a run or of one of its checkpoints. identity: JSON-able
    dict of all that decides the run's results. ValueError if a rule is broken:

    1. `out` is writable, and has no files of others, which a run would overwrite.
    2. The checkpoints are those of `resume`, if given, else of `out`. A repeated command
       with the same `resume` goes on from its own: it has begun there before.
    3. The newest one counts, as LATEST says. A kill cannot damage it, but a disk can:
       then the one before it is used.
    4. Its identity is the same. Otherwise the results would be of neither run.
    5. If it is of another folder, `out` holds no run of its own.
    """
    out = Path(out)
    own, config = checkpoints_in(out / "checkpoints"), read_text(out / "config.json")
    check_folder(out, own, begun='"stage"' in config)  # 1
    if own and f'"resume": {json.dumps(resume)}' in config:
        resume = None  # 2
    if not (own or resume):
        return None
    source = Path(resume or out)
    is_checkpoint = (source / "state.json").is_file()
    paths = [source] if is_checkpoint else newest_first(source / "checkpoints")
    if not paths:
        raise ValueError(f"--resume {resume}: there is no checkpoint in it")
    path = next(filter(is_whole, paths), None)  # 3
    if path is None:
        count = f"{source} holds {len(paths)} checkpoints, and none is whole"
        raise ValueError(f"{count}: mend one, or use another --out")
    before = json.loads((path / "state.json").read_text())["identity"]
    if changed := changes(before, identity):  # 4
        some = "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if changed[4:] else "")
        raise ValueError(f"{path} is of another run ({some}): use another --out")
    if own and path.parent.resolve() != (out / "checkpoints").resolve():  # 5
        raise ValueError(f"{out} holds a run of its own: use another --out, or leave --resume out")
    return path


def check_folder(out, checkpoints, begun):
    """Raise ValueError if `out` is not writable, or has files that a run would overwrite.

    begun: True if config.json is a run's. Killed before it saved, it simply starts again,
    but without checkpoints a model.pt is not its own.
    """
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"--out {out}: {existing} cannot be written to")
    foreign = [] if begun else ["config.json", "metrics.jsonl"]
    for name in ("checkpoints", "checkpoints/.saving"):
        if (out / name).exists() and not (out / name).is_dir():
            raise ValueError(f"{out / name} is in the way of checkpoints: use another --out")
    for name in foreign if checkpoints else ["model.pt", *foreign]:
        if (out / name).exists():
            raise ValueError(f"{out} holds a {name} that is not of this run: use another --out")


def checkpoints_in(folder):
    """Paths of a run's checkpoints, by step. Folders that a user renamed do not count."""
    return sorted(folder.glob("step-" + 8 * "[0-9]"))


def newest_first(folder):
    """A run's checkpoints from the one in LATEST, which may be missing, to the oldest."""
    paths, last = checkpoints_in(folder), read_text(folder / "LATEST").strip()
    if not paths:
        return []
    if not re.fullmatch("step-[0-9]{8}", last):
        last = paths[-1].name  # the run was killed before it moved LATEST
    # Later checkpoints are left from before the run went back to an earlier one.
    return sorted({folder / last, *(path for path in paths if path.name <= last)}, reverse=True)


def is_whole(path):
    """True if a checkpoint's files have the sizes in its state.json. Else print why not."""
    try:
        record = json.loads((path / "state.json").read_text())
        files, step = record["files"], record["step"]
        if not isinstance(record["identity"], dict) or not isinstance(step, int) or step < 0:
            raise ValueError("identity or step is damaged")
        wrong = [name for name in files if (path / name).stat().st_size != files[name]]
        wrong = [f"{name} is not of the size in state.json" for name in wrong]
    except (OSError, ValueError, KeyError, TypeError) as error:
        wrong = [f"state.json or a file in it: {type(error).__name__}: {error}"]
    if wrong and os.environ.get("RANK", "0") == "0":
        print(f"DAMAGED CHECKPOINT: {path}: {wrong[0]}", file=sys.stderr)
    return not wrong


def changes(before, now):
    """["lr was 0.1, is 0.2", ...]: how a run's identity differs from its checkpoint's."""
    now = json.loads(json.dumps(now))  # tuples become lists, as they did in the file
    base = {"model": None, "norm_eps": 1e-6}  # that of runs from before it was a setting
    before, now = ({**facts, **base, **facts.get("model", {})} for facts in (before, now))
    return [f"{k} was {before.get(k)}, is {v}" for k, v in now.items() if before.get(k) != v]


def begin_run(out, config, checkpoint=None, step=0):
    """Make the folder `out` with its lock, config.json, and metrics.jsonl.

    The metrics of the checkpoint's run up to `step` are kept. One process calls it.
    Raises ValueError if `out` cannot be written to or another process is running in it.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock(out)
        if checkpoint and checkpoint.parent.resolve() == (out / "checkpoints").resolve():
            # It may be an earlier one: from now on, it is the run's last. (This is done before
            # config.json says that the run has gone back to it: see find_checkpoint.)
            write_file(out / "checkpoints" / "LATEST", checkpoint.name)
        write_file(out / "config.json", json.dumps(config, indent=1))
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written to: {error}") from None
    metrics = checkpoint.parent.parent / "metrics.jsonl" if checkpoint else None
    lines = read_text(metrics).splitlines() if metrics else []
    try:  # a line that a kill cut short does not end in a brace
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{metrics} is damaged ({error!r}): mend it, or move it away") from None
    write_file(out / "metrics.jsonl", "".join(f"{line}\n" for line in kept))


LOCKS = []  # open files: closing one gives up its lock


def lock(folder):
    """Lock a folder until this process ends. Raises ValueError if it is locked.

    After a killed torchrun its processes may train on for a while. A run beside them
    would lose metrics and checkpoints. A POSIX lock is not inherited by loader workers.
    """
    LOCKS.append(open(folder / ".lock", "w"))  # noqa: SIM115
    try:
        import fcntl

        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        running = f"another process is running in {folder}"
        raise ValueError(f"{running}: wait for it, stop it, or use another --out") from None
    except (ImportError, OSError) as error:  # Windows, and some network file systems
        print(f"{folder} cannot be locked ({error}): start no other run in it meanwhile")


def barrier():
    if dist.is_initialized():
        dist.barrier()


def read_text(path):
    """The text of a file, with U+FFFD for bytes that are no UTF-8; "" without a file."""
    return path.read_text(errors="replace") if path.is_file() else ""


def write_file(path, content):
    """Replace a file by a text or tensors. A kill leaves the old file or the new one."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    with open(temporary, "wb") as file:
        try:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                torch.save(content, file)
        except RuntimeError as error:  # torch.save's error on a full disk
            raise OSError(f"cannot write {path}: {last_line(error)}") from None
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if sys.platform != "win32":  # the folder stores the name: it is synced as well
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def last_line(error):
    """The last line of an error's message, or the name of its class if there is none.

    DCP's messages hold a whole traceback. Those of torch's C++ code may end with its
    own frames.
    """
    said = str(error).partition("\nException raised from ")[0].strip()
    return (said or type(error).__name__).splitlines()[-1]


def is_lost(error):
    """True if an error means that another process has died, or has never joined."""
    # gloo's errors have no class of their own.
    by_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return by_gloo or isinstance(error, dist.DistError)
