"""What the three stages share around their methods.

place, begin, resume     device and processes; the process group; the checkpoint to go on from
Totals                   a step's sums over micro-batches and processes, read once
Progress                 what is timed, counted, logged and saved
guard                    no step with a loss or gradient that is not finite
progress                 how far a long job is: a bar in a terminal, else a line each minute
report_errors            one line and an exit status for what ends a run
"""

import contextlib
import gc
import json
import math
import os
import shlex
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from support.checkpoints import begin_run, is_lost, last_line, load_checkpoint, save_checkpoint

# ----------------------------------------------------------------------------- start-up


def place(run):
    """Settle where a run computes: process, processes, processes_here, device, precision, say.

    --gpus and --here imply run.plan. Returns the type of the device; for --gpus, "cuda". Raises
    ValueError for flags that the device or the number of processes does not allow, and if
    the package for --log-to is missing.
    """
    getenv = os.environ.get  # torchrun sets these
    run.process, run.processes = int(getenv("RANK", 0)), int(getenv("WORLD_SIZE", 1))
    local, run.processes_here = int(getenv("LOCAL_RANK", 0)), int(getenv("LOCAL_WORLD_SIZE", 1))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = accelerator.type if accelerator else "cpu"
    if kind == "mps" and run.processes > 1:  # no collectives there
        kind = "cpu"
    run.device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    run.plan = run.plan or bool(run.gpus) or vars(run).get("here", False)
    if run.gpus:  # a plan for GPUs can be made anywhere
        run.processes, kind = run.gpus, "cuda"
    run.precision = run.precision or ("bf16" if kind == "cuda" else "fp32")
    run.say = tqdm.write if run.process == 0 else lambda _: None
    if run.precision == "bf16" and kind != "cuda":
        raise ValueError("--precision bf16 needs CUDA")
    if vars(run).get("draw_step"):
        if run.processes > 1:
            raise ValueError("--draw-step draws on one process: leave torchrun out")
        run.shard_group = run.micro_batch = None  # those of the training may want several
    if vars(run).get("log_to") and run.process == 0:  # the process that logs
        from support import trackers

        trackers.require(run.log_to)
    graph, group = vars(run).get("cuda_graph"), vars(run).get("shard_group")  # a stage's flags
    if graph and (kind != "cuda" or run.processes > 1):
        raise ValueError("--cuda-graph is for one process on one GPU")
    if run.processes % (group or 1):
        divide = f"--shard-group {group} does not divide the {run.processes} processes"
        raise ValueError(f"{divide}: give a divisor, or start more of them, with torchrun")
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


def resume(run, model, optimizer):
    """Load run.checkpoint, if any, and begin the folder. Returns the checkpoint's record."""
    names = "micro_batch", "shard_group", "save_every", "out", "checkpoint"
    if run.processes > 1:
        check_agreement(run.identity | {name: str(getattr(run, name)) for name in names})
    record = {"step": 0}
    if run.checkpoint:
        run.say(f"going on from {run.checkpoint}")
        record = load_checkpoint(run.checkpoint, model, optimizer)
    if run.process == 0:
        config = {**run.identity, "command": sys.argv, "resume": run.resume}
        begin_run(run.out, config, run.checkpoint, record["step"])
    return record


def check_agreement(facts):
    """Raise ValueError if the facts, a JSON-able dict, differ between two processes."""
    seen = [None] * dist.get_world_size()
    dist.all_gather_object(seen, facts)
    for process, found in enumerate(seen):
        for name, fact in seen[0].items():
            if found[name] != fact:
                where = f"process {process} finds {name} {found[name]}, the first one {fact}"
                raise ValueError(f"{where}: all nodes want the same command, --data and --out")


# --------------------------------------------------------------------------------- loop


def to(device, batch, *names):
    """Copy tensors of a batch to a device. The copies do not wait for each other."""
    return [batch[name].to(device, non_blocking=True) for name in names]


class Totals:
    """A step's sums over micro-batches and processes. The host reads them once, together.

    After read(), numbers of all processes:

    loss       mean over the samples that count; norm: that of its gradient
    weight     number of samples that count, or the sum of their weights
    new_bad    samples that could not be read
    unknown    samples without a label or caption, unreadable ones as well
    stopping   True if a process was asked to stop after this step
    lacking    True if a process has no batch: then this step must not be taken
    unreadable names of the samples that could not be read, each with its error
    """

    def __init__(self, device):
        # loss, weight, unknown, new_bad, stopping, lacking, squared norm: see read()
        self.sums, self.unreadable = torch.zeros(7, device=device), []

    def add(self, loss, weight, bad=(), unknown=0):
        """Add a micro-batch. loss, weight, unknown: tensors () or numbers. bad: names."""
        self.sums[0] += loss
        self.sums[1] += weight
        self.sums[2] += unknown
        self.unreadable += bad

    def read(self, run, model, stop):
        """Sum over the processes. Make loss and gradients means over the batch's weight.

        Gradients are scaled in place. Sets stop.asked if any process was asked to stop. All
        processes get the names of all unreadable samples.
        """
        gradients = local_gradients(model)
        # The sum over all processes holds the squared norm once for each copy of the model.
        copies = run.processes // (run.shard_group or 1)
        self.sums[3], self.sums[4] = len(self.unreadable), stop.asked
        self.sums[5] = stop.no_batch is not None
        self.sums[6] = torch.nn.utils.get_total_norm(gradients).square() / copies
        if dist.is_initialized():
            dist.all_reduce(self.sums)
        self.loss, self.weight, *counts, stopping, lacking, norm = self.sums.tolist()
        self.unknown, self.new_bad = map(int, counts)
        self.stopping, self.lacking = bool(stopping), bool(lacking)
        if self.stopping:
            stop.asked = True
        if self.new_bad and dist.is_initialized():
            of_each = [None] * run.processes
            dist.all_gather_object(of_each, self.unreadable)
            self.unreadable = [name for names in of_each for name in names]
        # Loss and gradients were divided by the batch size: make them means over the weight.
        scale = run.batch_size / max(self.weight, 1e-9)
        self.loss, self.norm = self.loss * scale, norm**0.5 * scale
        scale_gradients(gradients, scale)

    def clip(self, model, most):
        """Scale the gradients in place so that their norm is at most this; None or 0: any."""
        if most:
            scale_gradients(local_gradients(model), min(1.0, most / max(self.norm, 1e-9)))


def local_gradients(model):
    """The gradients of a model's parameters; of sharded ones, this process's shards."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [g.to_local() if hasattr(g, "to_local") else g for g in gradients]


def scale_gradients(gradients, scale):
    """Multiply the gradients in place. A scale of 1 launches no kernels."""
    if scale != 1.0:
        for gradient in gradients:
            gradient.mul_(scale)


class Progress:
    """The steps of a run: what is timed, counted, logged and saved.

    done    steps so far
    counts  {name: samples of no use so far}: "bad", and what else a stage counts
    unreadable  the names of the bad ones, each once, with its error
    saving  True if the run saves after this step
    flops   of a training step, for an image; peak: FLOP/s of the device, or None
    """

    def __init__(self, run, record, counts, flops, peak):
        self.run, self.flops, self.peak = run, flops, peak
        self.done = self.first_step = self.saved_step = self.logged_step = record["step"]
        self.counts = {name: record.get(name, 0) for name in counts}
        self.unreadable = set(record.get("unreadable", ()))  # older checkpoints have none
        self.saving, self.waited, self.wait_for_save = False, 0.0, lambda: None
        self.began = self.logged = time.perf_counter()
        disable = None if run.process == 0 else True  # None: unless there is a terminal
        self.bar = tqdm(total=run.steps, initial=self.done, disable=disable)
        self.tracker = None
        if run.log_to and run.process == 0:
            from support.trackers import Tracker

            self.tracker = Tracker(run.log_to, run.out, run.identity, self.done)
        # Its pauses at different steps would make all processes wait: log() collects.
        gc.disable()

    def wait_for(self, batches):
        """The next batch. The time that it takes is counted as data wait."""
        asked = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - asked
        return batch

    def count(self, totals, **others):
        """Count a computed step, name its unreadable samples, and settle `saving`.

        Each is named once in a run. others: {name of another count: new samples}
        """
        for name in dict.fromkeys(totals.unreadable):
            if name not in self.unreadable and self.run.process == 0:
                tqdm.write(f"unreadable, weight 0: {name}", file=sys.stderr)
        self.unreadable.update(totals.unreadable)
        self.done += 1
        for name, new in {"bad": totals.new_bad, **others}.items():
            self.counts[name] += new
        self.saving = self.done % self.run.save_every == 0 or self.done == self.run.steps

    def check(self, batches, unlabelled=0, target=None):
        """Raise Failure if too many samples are bad, or lack a label: see over_max_bad.

        unlabelled: readable ones without a `target`, so far
        """
        drawn, bad, names = self.done * self.run.batch_size, self.counts["bad"], self.unreadable
        if batches.over_max_bad(len(names), bad, unlabelled, drawn, self.run.max_bad):
            what = f"{bad} of {drawn} pictures cannot be read ({len(names)} different ones)"
            what += f" and {unlabelled} have no {target}" if target else ""
            over = f"over --max-bad {self.run.max_bad}, or all of them"
            raise Failure(f"{what}: {over}; mend or remove them")

    def stepped(self):
        """Show the step that was taken. True if it is to be logged."""
        self.bar.update()
        return self.saving or self.done % self.run.log_every == 0 or self.done == 1

    def log(self, facts, shown):
        """Write a line of metrics.jsonl, also to what --log-to names, and print the step line.

        facts  {"loss", "lr", "grad_norm", and what else was measured}
        shown  {name: format} of what the step line adds
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
        if self.tracker:
            self.tracker.scalars(entry)
        gc.collect(2 if self.saving else 1)
        self.waited, self.logged_step, self.logged = 0.0, self.done, time.perf_counter()

    def show(self, name, picture):
        """Log a PIL image to what --log-to names."""
        if self.tracker:
            self.tracker.picture(name, picture, self.done)

    def save(self, model, optimizer):
        """Write a checkpoint; on CUDA in the background."""
        run, record = self.run, {"identity": self.run.identity, **self.counts}
        record["unreadable"] = sorted(self.unreadable)
        options = {"keep_last": run.keep_last, "keep_every": run.keep_every}
        options["background"] = run.device.type == "cuda"
        self.wait_for_save()  # the one before: never two at once
        what = self.done, model, optimizer, record
        self.wait_for_save = save_checkpoint(run.out / "checkpoints", *what, **options)
        self.saved_step = self.done

    def finish(self, model, optimizer, stop):
        """Save what is not saved yet. True if the run is at its end.

        If it ended early and was not asked to stop, the error of the batch is raised.
        """
        if self.done > self.saved_step:
            self.save(model, optimizer)
        self.wait_for_save()
        self.bar.close()
        if self.tracker:
            self.tracker.close()
        gc.enable()
        stop.release()
        if self.done == self.run.steps:
            curves = shlex.join([str(self.run.out), "--out", f"{self.run.out}/curves.png"])
            self.run.say(f"curves: python evaluate.py --task curves {curves}")
            return True
        kept = "saved: the same command goes on" if self.done else "with nothing to save"
        self.run.say(f"stopped at step {self.done} of {self.run.steps}, {kept}")
        if not stop.asked:
            end(self.run)
            raise stop.no_batch or Failure("another process has got no batch")
        return False


EVERY = 60  # seconds between two lines of progress()


def progress(made, total, title, unit=""):
    """Yield from an iterable of `total` things, and show how far it is, on the first process.

    In a terminal this is tqdm's bar. Elsewhere, as in a log file, it is a line each minute.
    """
    hidden = True if os.environ.get("RANK", "0") != "0" else None  # None: without a terminal
    bar = tqdm(made, title, total, leave=False, disable=hidden, unit=unit)
    if hidden or not bar.disable:
        yield from bar
        return
    began = said = time.monotonic()
    for done, one in enumerate(made, start=1):
        now = time.monotonic()
        if now - said >= EVERY:
            said, left = now, tqdm.format_interval((now - began) / done * (total - done))
            print(f"{title}: {done:,} of {total:,}{unit}, {left} left", file=sys.stderr, flush=True)
        yield one


def step_line(entry, steps, shown):
    """A line of metrics in words: see Progress.log."""
    rate = entry["images_per_second"]
    rate = f"{rate:.1f}" if rate >= 10 else f"{rate:.2f}"
    text = (
        "step {step}/{steps}  loss {loss:.4f}  lr {lr:.2e}  grad {grad_norm:.2f}  "
        "{rate} images/s  mfu {mfu:.1%}  data wait {data_wait:.0%}  memory {memory_gib:.1f} GiB  "
        "eta {eta}"
    ).format(steps=steps, rate=rate, eta=tqdm.format_interval(entry["eta_seconds"]), **entry)
    for name, form in shown.items():
        value = entry.get(name)
        if value or isinstance(value, float):  # a count of 0 is left out, not a measured 0.0
            text += "  " + form.format(value)
    return text


def peak_memory(device):
    """GiB used at most so far: the allocator's on CUDA, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return 0.0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def last_metrics(out):
    """The last line of metrics.jsonl in a run's folder: {name: value}, {} if it has none."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1]) if lines else {}


def guard(model, run, step, totals, lr):
    """Raise Failure if loss or gradient is not finite. All processes call it before a step."""
    if math.isfinite(totals.loss + totals.norm):
        return
    full = lambda found: found.full_tensor() if hasattr(found, "full_tensor") else found  # sharded
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    names = [name for name, grad in gradients.items() if not full(grad.isfinite().all())]
    full_precision = ["--precision fp32"] if run.precision == "bf16" else []
    advice = "a lower --lr", "a longer --warmup", *full_precision, "a look at the pictures:"
    raise Failure(
        f"step {step + 1}: loss {totals.loss}, gradient norm {totals.norm}, lr {lr:.2e}; it was "
        f"not saved. Positions {step * run.batch_size} to {(step + 1) * run.batch_size - 1}. "
        f"Gradients not finite: {' '.join(names) or 'none'}\n"
        f"  Try, in this order: {', '.join(advice)}\n"
        f"  python {shlex.join(sys.argv)} --draw-step {step + 1}"
    )


def unless_lacking(stop, measure, *arguments):
    """Return measure(*arguments), or None if a process has no batch: see Stop.no_batch.

    All processes must call it. The reason is printed, and the next training step ends
    the run.
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


# ---------------------------------------------------------------------------------- end


class Failure(Exception):
    """What ends a run, known to all its processes: one line, perhaps with advice below it."""


def fail(program, message, status=2, alone=False):
    """Print one line and exit. One process of a machine prints, or `alone` this one."""
    if alone or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{program}: {message}", file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def report_errors(program):
    """End a run with one line and a status: 2 for wrong input, 1 for the rest.

    A mistake in the code, such as a KeyError, keeps its traceback.
    """
    try:
        yield
    except KeyboardInterrupt:  # before the loop, which saves
        fail(program, "stopped", 130)
    except ValueError as error:
        fail(program, error)
    except Failure as error:
        fail(program, error, 1)
    except OSError as error:  # perhaps of this process alone
        fail(program, error, 1, alone=True)
    except RuntimeError as error:
        if not is_lost(error):
            raise
        gone = f"another process is gone, or was never met ({last_line(error):.120})"
        fail(program, f"{gone}: the same command goes on from the last checkpoint", 1)
