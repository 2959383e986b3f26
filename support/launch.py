"""What the three stages share around their methods: start-up, sums, logging, saving, errors.

    place, begin, resume     device and processes; the process group; the checkpoint to go on from
    Totals                   a step's sums over micro-batches and processes, read once
    Progress                 what is timed, counted, logged and saved
    guard                    no step with a loss or gradient that is not finite
    report_errors            one line and an exit status for what ends a run

This file needs torch, tqdm and support/checkpoints.py.
"""

import contextlib
import gc
import json
import math
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from support.checkpoints import begin_run, is_lost, last_line, load_checkpoint, save_checkpoint

# ----------------------------------------------------------------------------------------- start-up


def place(run):
    """Settle where a run computes: process, processes, processes_here, device, precision.

    Also run.plan, which --gpus implies, and run.say, which prints in the first process. Returns the
    type of the device; for a plan with --gpus, "cuda". Raises ValueError.
    """
    launched = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}  # by torchrun
    run.process, run.processes, local, run.processes_here = (
        int(os.environ.get(name, str(alone))) for name, alone in launched.items()
    )
    kind = (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")).type
    if kind == "mps" and run.processes > 1:  # no collectives there
        kind = "cpu"
    run.device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    run.plan = run.plan or bool(run.gpus)
    if run.gpus:  # a plan for GPUs may be made anywhere
        run.processes, kind = run.gpus, "cuda"
    run.precision = run.precision or ("bf16" if kind == "cuda" else "fp32")
    if run.precision == "bf16" and kind != "cuda":
        raise ValueError("--precision bf16 needs CUDA")
    run.say = tqdm.write if run.process == 0 else lambda _: None
    return kind


def begin(run):
    """Join the run's other processes, if there are any."""
    if run.device.type == "cuda":
        torch.cuda.set_device(run.device)
    if run.processes > 1:
        backend = "cpu:gloo,cuda:nccl" if run.device.type == "cuda" else "gloo"
        # Longer than reading weights, compiling, and all tries to read a remote shard.
        dist.init_process_group(backend, timeout=timedelta(minutes=30))


def end(run):
    """Leave the process group."""
    if run.processes > 1 and dist.is_initialized():
        dist.barrier()  # without it, a process may abort at exit
        dist.destroy_process_group()


def check_agreement(facts):
    """Raise ValueError if the facts, a JSON-able dict, differ between two processes."""
    seen = [facts]
    if dist.is_initialized():
        seen = [None] * dist.get_world_size()
        dist.all_gather_object(seen, facts)
    for process, found in enumerate(seen):
        for name, fact in seen[0].items():
            if found[name] != fact:
                where = f"process {process} finds {name} {found[name]}, the first one {fact}"
                raise ValueError(f"{where}: all nodes want the same command, --data and --out")


def resume(run, model, optimizer):
    """Load the run's checkpoint, if there is one, and begin its folder.

    Returns the checkpoint's record, {"step": 0} for a new run.
    """
    names = "micro_batch", "shard_group", "save_every", "out", "checkpoint"
    check_agreement(run.identity | {name: str(getattr(run, name)) for name in names})
    record = {"step": 0}
    if run.checkpoint:
        run.say(f"going on from {run.checkpoint}")
        record = load_checkpoint(run.checkpoint, model, optimizer)
    if run.process == 0:
        config = {**run.identity, "command": sys.argv, "resume": run.resume}
        begin_run(run.out, config, run.checkpoint, record["step"])
    return record


# --------------------------------------------------------------------------------------------- loop


def to(device, batch, *names):
    """These tensors of a batch on a device. The copies do not wait for each other."""
    return [batch[name].to(device, non_blocking=True) for name in names]


class Totals:
    """A step's sums over micro-batches and processes. The host reads them once, together.

    loss           the sum over the batch, divided by its size; after read(), by the weight
    weight         the number of samples that count, or the sum of their weights
    norm           of the gradient (after read())
    new_bad        samples of the batch that could not be read; unreadable: this process's names
    unknown        samples that can be read, but have no label or caption
    stopping       True if a process was asked to stop after this step
    lacking        True if a process has got no batch: then this step must not be taken
    """

    def __init__(self, device):
        # loss, weight, unknown, new_bad, stopping, lacking, squared norm: see read()
        self.sums, self.unreadable = torch.zeros(7, device=device), []

    def add(self, loss, weight, bad=(), unknown=0):
        """Add a micro-batch. loss, weight, unknown: tensors () or numbers. bad: a list of names."""
        self.sums[0] += loss
        self.sums[1] += weight
        self.sums[2] += unknown
        self.unreadable += bad

    def read(self, gradients, batch_size, stop, copies=1):
        """Sum over the processes, and make loss and gradients means over the weight of the batch.

        gradients  of all trained parameters, this process's shards; scaled in place
        copies     of the model: a sum over all processes holds the squared norm once for each
        """
        self.sums[3], self.sums[4] = len(self.unreadable), stop.asked
        self.sums[5] = stop.no_batch is not None
        self.sums[6] = torch.nn.utils.get_total_norm(gradients).square() / copies
        if dist.is_initialized():
            dist.all_reduce(self.sums)
        self.loss, self.weight, *counts, stopping, lacking, norm = self.sums.tolist()
        self.unknown, self.new_bad = map(int, counts)
        self.stopping, self.lacking = bool(stopping), bool(lacking)
        scale = batch_size / max(self.weight, 1e-9)
        self.loss, self.norm = self.loss * scale, norm**0.5 * scale
        scale_gradients(gradients, scale)

    def clip(self, gradients, most):
        """Scale the gradients so that their norm is at most this."""
        scale_gradients(gradients, min(1.0, most / max(self.norm, 1e-9)))


def scale_gradients(gradients, scale):
    """Multiply the gradients in place. A scale of 1 launches no kernels."""
    if scale != 1.0:
        for gradient in gradients:
            gradient.mul_(scale)


class Progress:
    """The steps of a run: what is timed, counted, logged and saved.

    done    steps so far
    counts  {name: samples of no use so far}: "bad", and what else a stage counts
    saving  True if the run saves after this step
    lacking True if the run ends because a process has got no batch
    flops   of a training step, for an image; peak: FLOP/s of the device, or None
    """

    def __init__(self, run, record, counts, flops, peak):
        self.run, self.flops, self.peak = run, flops, peak
        self.done = self.first_step = self.saved_step = self.logged_step = record["step"]
        self.counts = {name: record.get(name, 0) for name in counts}
        self.saving, self.lacking, self.waited = False, False, 0.0
        self.wait_for_save = lambda: None
        self.began = self.logged = time.perf_counter()
        disable = None if run.process == 0 else True  # None: unless there is a terminal
        self.bar = tqdm(total=run.steps, initial=self.done, disable=disable)
        # Each process would pause for it at another step, and all others wait: log() collects.
        gc.disable()

    def wait_for(self, batches):
        """The next batch. The time that it takes is counted as data wait."""
        asked = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - asked
        return batch

    def count(self, totals, **others):
        """Count a step that was computed but not taken yet, and settle `saving`.

        The first 20 unreadable samples are named on stderr.
        others: {name of another count: new samples}
        """
        for name in totals.unreadable[: max(0, 20 - self.counts["bad"])]:
            tqdm.write(f"unreadable, weight 0: {name}", file=sys.stderr)
        self.done += 1
        for name, new in {"bad": totals.new_bad, **others}.items():
            self.counts[name] += new
        self.saving = self.done % self.run.save_every == 0 or self.done == self.run.steps

    def check(self, batches, bad, what=None):
        """Raise Failure if `bad` samples are over --max-bad: see data.Batches.over_max_bad.

        what: the start of its message; default: how many pictures cannot be read
        """
        drawn = self.done * self.run.batch_size
        what = what or f"{bad} of {drawn} pictures cannot be read"
        if batches.over_max_bad(bad, drawn, self.run.max_bad):
            raise Failure(f"{what}: all, or over --max-bad {self.run.max_bad}; mend or remove them")

    def stepped(self):
        """Show the step that was taken. True if it is to be logged."""
        self.bar.update()
        return self.saving or self.done % self.run.log_every == 0 or self.done == 1

    def log(self, facts, shown):
        """Write a line of metrics.jsonl and print the step line.

        facts: {"loss", "lr", "grad_norm", and what else was measured}. shown: {name: format} of
        what is printed behind the usual ones, if it is there and not 0.
        """
        run, now = self.run, time.perf_counter()
        rate = (self.done - self.logged_step) * run.batch_size / (now - self.logged)
        entry = {"step": self.done, "samples": self.done * run.batch_size, **self.counts, **facts}
        entry["images_per_second"] = rate
        entry["mfu"] = rate * self.flops / (self.peak * run.processes) if self.peak else 0.0
        entry["data_wait"] = self.waited / (now - self.logged)
        entry["memory_gib"] = peak_memory(run.device)
        steps_per_second = (self.done - self.first_step) / (now - self.began)
        entry["eta_seconds"] = (run.steps - self.done) / steps_per_second
        if run.process == 0:
            with open(run.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
            run.say(step_line(entry, run.steps, shown))
        gc.collect(2 if self.saving else 1)
        self.waited, self.logged_step, self.logged = 0.0, self.done, time.perf_counter()

    def save(self, model, optimizer):
        """Write a checkpoint; on CUDA in the background."""
        run = self.run
        self.wait_for_save()  # the one before: never two at once
        self.saved_step = self.done
        self.wait_for_save = save_checkpoint(
            run.out / "checkpoints",
            self.done,
            model,
            optimizer,
            {"identity": run.identity, **self.counts},
            keep_last=run.keep_last,
            keep_every=run.keep_every,
            background=run.device.type == "cuda",
        )

    def finish(self, model, optimizer, stop):
        """Save what is not saved yet. True if the run is at its end.

        Raises Failure where it ended early for want of batches.
        """
        if self.done > self.saved_step:
            self.save(model, optimizer)
        self.wait_for_save()
        self.bar.close()
        gc.enable()
        stop.release()
        if self.done == self.run.steps:
            return True
        kept = "saved: the same command goes on" if self.done else "with nothing to save"
        self.run.say(f"stopped at step {self.done} of {self.run.steps}, {kept}")
        if self.lacking:
            end(self.run)
            alone = stop.no_batch is not None
            raise Failure(stop.no_batch or "another process has got no batch", alone)
        return False


def step_line(entry, steps, shown):
    """A line of metrics in words: see Progress.log."""
    text = (
        "step {step}/{steps}  loss {loss:.4f}  lr {lr:.2e}  grad {grad_norm:.2f}  "
        "{images_per_second:.1f} images/s  mfu {mfu:.1%}  data wait {data_wait:.0%}  "
        "memory {memory_gib:.1f} GiB  eta {eta}"
    ).format(steps=steps, eta=tqdm.format_interval(entry["eta_seconds"]), **entry)
    found = {name: entry.get(name) for name in shown}
    # A count of 0 is not shown; what was measured, a float, is.
    found = {name: value for name, value in found.items() if value or isinstance(value, float)}
    parts = [shown[name].format(value) for name, value in found.items()]
    return "  ".join([text, *parts])


def peak_memory(device):
    """GiB used at most so far: the allocator's on CUDA, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return 0.0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def guard(model, run, step, totals, lr):
    """Raise Failure if loss or gradient is not finite: nothing of it is stepped on or saved.

    Every process must call it. step: the number of the step that was computed, from 0.
    """
    if math.isfinite(totals.loss + totals.norm):
        return
    full = lambda found: found.full_tensor() if hasattr(found, "full_tensor") else found  # sharded
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    names = [name for name, grad in gradients.items() if not full(grad.isfinite().all())]
    raise Failure(
        f"step {step + 1}: loss {totals.loss}, gradient norm {totals.norm}, lr {lr:.2e}; it was "
        f"not saved. Positions {step * run.batch_size} to {(step + 1) * run.batch_size - 1}. "
        f"Gradients not finite: {' '.join(names) or 'none'}"
    )


def unless_lacking(stop, measure, *arguments):
    """Return measure(*arguments), or None if any process has no batch for it.

    stop: see Stop in support/loader.py.

    All processes must call it. The reason is printed, and the next training step ends the run.
    """
    found, wrong = None, None
    try:
        found = measure(*arguments)
    except ValueError as error:  # perhaps for lack of batches
        wrong = error
    lacking = torch.tensor([int(stop.no_batch is not None)])
    if dist.is_initialized():
        dist.all_reduce(lacking)
    if stop.no_batch is not None:
        print(f"not measured: {str(stop.no_batch) or 'asked to stop'}", file=sys.stderr)
    if wrong and not lacking:
        raise wrong
    return None if lacking else found


# ---------------------------------------------------------------------------------------------- end


class Failure(Exception):
    """What ends a run: one line. alone: only this process knows of it."""

    def __init__(self, message, alone=False):
        super().__init__(message)
        self.alone = alone


def fail(program, message, status=2, alone=False):
    """Print one line and exit. One process of a machine does, unless only this one knows."""
    if alone or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{program}: {message}", file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def report_errors(program):
    """Make one line and an exit status of what ends a run: 2 for what was given, 1 for the rest.

    An error of ours, such as a KeyError, stays what it is, with its traceback.
    """
    try:
        yield
    except KeyboardInterrupt:  # before the loop, which saves
        fail(program, "stopped", 130)
    except Failure as error:
        fail(program, error, 1, error.alone)
    except (ValueError, OSError, RuntimeError) as error:
        if is_lost(error):
            fail(
                program,
                f"another process is gone, or was never met ({last_line(error):.120}): "
                "the same command goes on from the last checkpoint",
                1,
            )
        if isinstance(error, RuntimeError) and not isinstance(error, ValueError | OSError):
            raise
        fail(program, error, 2 if isinstance(error, ValueError) else 1, isinstance(error, OSError))
