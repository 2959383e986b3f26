"""A training run's checkpoints: written whole or not at all, found again, loaded.

    save_checkpoint    tensors by torch.distributed.checkpoint, a record in state.json, then LATEST
    load_checkpoint    the same back, on any number of processes
    find_checkpoint    which one a run goes on from, and whether it is the same run
    begin_run          the folder of a run, its lock, config.json and metrics.jsonl

No code runs from a checkpoint: its tensors are plain, and the index of them, a pickle, is read by an
unpickler that knows nothing but PyTorch's metadata classes.
"""

import itertools
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

# One process needs no process group, and DCP need not say so at every save.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


def training_state(model, optimizer):
    """A run's tensors as one flat dict: buffers, parameters that are not frozen, their moments.

    The names are the same however the model is spread over processes.
    """
    if hasattr(model, "reshard"):
        model.reshard()  # after a forward without backward, FSDP's root still is whole
    state = {f"model/{name}": buffer for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        state |= {f"model/{name}": parameter.detach()} if parameter.requires_grad else {}
        for moment, tensor in optimizer.state.get(parameter, {}).items():
            state |= {f"{moment}/{name}": tensor} if moment != "step" else {}
    return state


def save_checkpoint(
    folder, step, model, optimizer, record, keep_last=2, keep_every=None, background=False
):
    """Write folder/step-NNN (tensors by DCP, `record` in state.json), then point LATEST to it.

    Everything is written to a temporary directory, synced and renamed, and only then are the
    checkpoints before the last `keep_last` removed, but for every `keep_every`-th step: a kill at
    any instant leaves a whole one. In the background, training goes on while a copy in the host's
    memory is written. Every process must call it and, before the next one and at the end, what it
    returns: a function that waits until this one is whole.
    Raises OSError (disk full, ...; so does the function) with the old ones in place, and ValueError
    when the step has made parameters that are not finite.
    """
    import torch.distributed.checkpoint as dcp

    state = training_state(model, optimizer)  # which reshards them
    sharded = any(hasattr(tensor, "full_tensor") for tensor in state.values())
    if dist.is_initialized() and not sharded:
        # Replicas: each process writes its share. (DCP would let one write, and all copy it first.)
        state = dict([*state.items()][dist.get_rank() :: dist.get_world_size()])
    norm = torch.nn.utils.get_total_norm(list(model.parameters()))
    if not (norm.full_tensor() if sharded else norm).isfinite():
        raise ValueError(f"step {step} made weights that are not finite: nothing of it was saved")

    folder, writer = Path(folder), not dist.is_initialized() or dist.get_rank() == 0
    final, temporary = folder / f"step-{step:08d}", folder / ".saving"
    if writer:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()

    def publish():
        stored = {entry.relative_path for entry in read_metadata(temporary).storage_data.values()}
        if missing := [name for name in stored if not (temporary / name).exists()]:
            raise OSError(f"no {min(missing)} of another process: do all nodes share the folder?")
        files = {path.name: path.stat().st_size for path in temporary.iterdir()}
        kept = {**record, "step": step, "files": files}
        write_file(temporary / "state.json", json.dumps(kept))
        shutil.rmtree(final, ignore_errors=True)  # left by a run killed before it moved LATEST
        os.replace(temporary, final)
        write_file(folder / "LATEST", final.name)  # syncs the folder: both names
        # Later ones are of a former life of the run: they do not push out this one.
        older = [path for path in checkpoints_in(folder) if path.name < final.name]
        for old in older[: max(0, len(older) - keep_last + 1)]:
            for_good = keep_every and int(old.name.removeprefix("step-")) % keep_every == 0
            if not for_good and not old.is_symlink():  # what it leads to is somebody else's
                shutil.rmtree(old)

    def save(write):
        try:
            write()
            if writer:
                publish()
        except (OSError, dcp.api.CheckpointException, RuntimeError) as error:
            if is_lost(error):
                raise
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(
                f"cannot save {final}: {last_line(error)}. Checkpoints before it, if any, are whole"
            ) from error

    how = {"storage_writer": dcp.FileSystemWriter(temporary)}  # it syncs its files
    how["no_dist"] = not dist.is_initialized()
    if background:
        written = dcp.async_save(state, process_group=saving_group(dist.group.WORLD), **how)
        saved = SAVER.submit(save, written.result)

        def wait():
            began = time.monotonic()
            saved.result()
            if writer and (seconds := time.monotonic() - began) > 1:
                print(f"waited {seconds:.0f} s until {final} was written")

        return wait
    save(partial(dcp.save, state, **how))
    barrier()
    return lambda: None


SAVER = ThreadPoolExecutor(1)


@lru_cache(1)
def saving_group(everyone):
    """All processes, for what they say of checkpoints while the training says something else."""
    return everyone and dist.new_group(backend="gloo", group_desc="checkpoints")


def load_checkpoint(path, model, optimizer):
    """Load a checkpoint into a model and its AdamW or SGD, in place. Returns its record."""
    import torch.distributed.checkpoint as dcp

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *_, **__):
            return read_metadata(path)

    record = json.loads((Path(path) / "state.json").read_text())
    del record["files"]
    for group in optimizer.param_groups:
        names = ("exp_avg", "exp_avg_sq") if "betas" in group else ("momentum_buffer",)
        names += ("average",) if group.get("ema") else ()
        for parameter in group["params"]:
            place = parameter.device if group["fused"] else "cpu"  # as AdamW itself does
            moments = {name: torch.zeros_like(parameter) for name in names}
            step = {"step": torch.tensor(float(record["step"]), device=place)}
            optimizer.state[parameter] = moments | (step if "betas" in group else {})
    try:
        read_metadata(path)  # DCP would print a traceback of what is wrong with it
        state = training_state(model, optimizer)
        dcp.load(state, storage_reader=Reader(path), no_dist=not dist.is_initialized())
    except (Exception, dcp.api.CheckpointException) as error:
        # A damaged file fails in many ways; DCP's own exception is no Exception.
        raise OSError(f"cannot load {path}: {last_line(error)}; --resume another") from error
    return record


def read_metadata(path):
    """DCP's index of a checkpoint, which is a pickle: nothing else in it is built or run."""
    with open(Path(path) / ".metadata", "rb") as file:
        return MetadataUnpickler(file).load()


# What DCP's index of tensors is made of.
METADATA_CLASSES = {
    "pathlib": "PosixPath WindowsPath",
    "torch": "Size",
    "torch.serialization": "_get_layout",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed.checkpoint.metadata": "ChunkStorageMetadata Metadata MetadataIndex "
    "StorageMeta TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
}


class MetadataUnpickler(pickle.Unpickler):
    """Refuses all else; an entry of bytes, too, which DCP would unpickle without restriction."""

    def find_class(self, module, name):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in METADATA_CLASSES.get(module, "").split():
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the checkpoint's metadata asks for {module}.{name}: refused")


def checkpoints_in(folder):
    """Paths of a run's checkpoints, by step. What a user has named otherwise is none."""
    return sorted(folder.glob("step-" + 8 * "[0-9]"))


def find_checkpoint(out, resume, identity):
    """The checkpoint that a run in `out` goes on from, or None if it is new.

    resume    None, or the path of a run or of one of its checkpoints to go on from instead
    identity  JSON-able dict of what decides the run's results: the checkpoint's must be the same
    Raises ValueError, one line, when it is not, or when `out` holds something that would be lost.
    """
    there, own = Path(out), checkpoints_in(Path(out, "checkpoints"))
    while not there.exists():  # what of `out` exists is where it will be made
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out {out}: {there} cannot be written to")
    config = Path(out, "config.json")
    config = config.read_text(errors="replace") if config.is_file() else ""
    for name in ("config.json", "metrics.jsonl"):
        if '"stage"' not in config and Path(out, name).exists():
            raise ValueError(f"{out} holds a {name} that is not ours: use another --out")
    if own and f'"resume": {json.dumps(resume)}' in config:
        resume = None  # the same command again: it has gone on from there before
    source = Path(resume or out)
    last, steps = source / "checkpoints" / "LATEST", checkpoints_in(source / "checkpoints")
    if (source / "state.json").is_file():
        paths = [source]
    elif steps:
        # Later ones than LATEST are of a former life of the run. Without it, the run was killed
        # between the renames of its first checkpoint and of LATEST.
        last = last.read_text(errors="replace").strip() if last.is_file() else ""
        last = last if re.fullmatch("step-[0-9]{8}", last) else steps[-1].name
        paths = {path for path in steps if path.name <= last} | {source / "checkpoints" / last}
        paths = sorted(paths, reverse=True)
    elif resume:
        raise ValueError(f"--resume {resume}: there is no checkpoint in it")
    elif Path(out, "model.pt").exists():
        raise ValueError(f"{out} holds a model.pt, but no checkpoints: use another --out")
    else:
        return None
    damaged = list(itertools.takewhile(bool, map(damage, paths)))
    for path, why in zip(paths, damaged):
        if os.environ.get("RANK", "0") == "0":
            print(f"DAMAGED CHECKPOINT: {path}: {why}", file=sys.stderr)
    if len(damaged) == len(paths):
        why = f"{len(paths)} checkpoints, and none is whole: mend one, or use another --out"
        raise ValueError(f"{source} holds {why}")
    path = paths[len(damaged)]
    found = json.loads((path / "state.json").read_text())["identity"]
    identity = json.loads(json.dumps(identity))  # tuples become lists, as they did in the file
    # Runs from before there was a norm_eps had this one.
    base = {"model": None, "norm_eps": 1e-6}
    was, now = ({**facts, **base, **facts.get("model", {})} for facts in (found, identity))
    changed = [f"{k} was {was.get(k)}, is {v}" for k, v in now.items() if was.get(k) != v]
    if changed:
        raise ValueError(f"{path} is of another run ({'; '.join(changed)}): use another --out")
    elsewhere = path.parent.resolve() != (Path(out) / "checkpoints").resolve()
    if elsewhere and (own or Path(out, "model.pt").exists()):
        raise ValueError(f"{out} holds a run of its own: use another --out, or leave --resume out")
    return path


def damage(path):
    """What is wrong with a checkpoint, as far as the sizes of its files tell, or None."""
    try:
        record = json.loads((path / "state.json").read_text())
        for name, size in record["files"].items():
            if (found := (path / name).stat().st_size) != size:
                return f"{name} has {found} bytes, not {size}"
        return None if "identity" in record else "its state.json does not say of what run it is"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its state.json cannot be read ({error!r})"


def begin_run(out, config, checkpoint=None, step=0):
    """Make the folder `out`, its config.json, and metrics.jsonl.

    Of the latter, the lines of the checkpoint's run up to its step are kept, if there is one. One
    process calls it. Raises ValueError when nothing can be written there.
    """
    out, lines = Path(out), []
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock(out)
        if checkpoint and checkpoint.parent.resolve() == (out / "checkpoints").resolve():
            # It may be an earlier one: from now on, it is the run's last. (Before config.json says
            # that the run has gone back to it: see find_checkpoint.)
            write_file(out / "checkpoints" / "LATEST", checkpoint.name)
        write_file(out / "config.json", json.dumps(config, indent=1))
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written to: {error}") from None
    if checkpoint:
        source = Path(checkpoint).parent.parent / "metrics.jsonl"
        lines = source.read_text(errors="replace").splitlines() if source.is_file() else []
    try:  # a line that a kill cut short does not end in a brace
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source} is damaged ({error!r}): mend it, or move it away") from None
    write_file(out / "metrics.jsonl", "".join(f"{line}\n" for line in kept))


LOCKS = []  # open files: closing one would give its lock up


def lock(folder):
    """Keep other processes from running in a folder until this one ends, however it ends.

    What is left of a killed torchrun may train on for a while: a run beside it would lose lines of
    metrics and checkpoints. A POSIX lock belongs to the process alone, not to its loader workers.
    """
    try:
        import fcntl
    except ImportError:  # on Windows
        return

    LOCKS.append(open(folder / ".lock", "w"))  # noqa: SIM115
    try:
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        why = f"another process is running in {folder}: wait for it, stop it, or use another --out"
        raise ValueError(why) from None
    except OSError as error:  # some network file systems have no locks
        print(f"{folder} cannot be locked ({error.strerror}): start no other run in it meanwhile")


def barrier():
    if dist.is_initialized():
        dist.barrier()


def write_file(path, content):
    """Replace a file by a text, or by tensors: whole or not at all, whatever happens meanwhile."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    with open(temporary, "wb") as file:
        try:
            file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
        except RuntimeError as error:  # as torch.save calls a full disk
            raise OSError(f"cannot write {path}: {last_line(error)}") from None
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if sys.platform != "win32":  # names are stored in the folder: it has to be synced as well
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def last_line(error):
    """What an error says, in one line: DCP's hold a whole traceback, some others nothing.

    After what it has to say, torch's C++ code may list its own frames.
    """
    said = str(error).partition("\nException raised from ")[0].strip()
    return (said or type(error).__name__).splitlines()[-1]


def is_lost(error):
    """Whether an error says that another process has died, or was never met."""
    said = isinstance(error, RuntimeError) and "gloo" in str(error)  # it has no class of its own
    return said or isinstance(error, dist.DistError)
