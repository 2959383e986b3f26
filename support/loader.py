"""Batches made ahead by worker processes. No failure of a worker is lost.

    loader    a torch DataLoader over data.Batches
    Stop      signals: a run ends after its step, and saves

Worker processes die (out of memory), cannot hand over a batch (shared memory, open files) or wait
for a disk. The training then says why, takes no step on part of a batch, saves, and ends.
"""

import dataclasses
import os
import pickle
import re
import signal
import sys
import threading
import time
from functools import partial
from multiprocessing.reduction import ForkingPickler

import torch
from PIL import Image

from data import Unreachable, limit_pixels, one_line

STALLED = 60  # seconds without a batch until the user is told so
GRACE = 5  # seconds that a run waits for a batch after it was asked to stop


class Stop:
    """A request to end a run, by SIGTERM, SIGUSR1 (Slurm's --signal) or Ctrl-C.

    asked     True if there was one. The run ends after this step, and saves. The second Ctrl-C
              ends it at once.
    no_batch  why a Loader has no more batches, an exception; None while it has

    Until release(), the Loaders of this process act on it: see Loader.
    """

    active = None  # a process has one set of signals

    def __init__(self):
        self.asked, self.no_batch = False, None
        self.waiting = False  # True while a Loader waits for a batch
        for name in {"SIGTERM", "SIGUSR1", "SIGINT"} & set(dir(signal)):
            signal.signal(getattr(signal, name), self.ask)
        Stop.active = self

    def release(self):
        """Restore the default actions of the signals."""
        Stop.active = None
        for name in {"SIGTERM", "SIGUSR1"} & set(dir(signal)):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def ask(self, number, _):
        """Handle a signal."""
        if self.asked and self.waiting:
            raise KeyboardInterrupt  # no library takes it for a failure that it may hide
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        self.asked = True

    def wait(self, made):
        """next_batch(made). A signal may end it, by KeyboardInterrupt: see ask."""
        try:
            self.waiting = True
            return next_batch(made)
        finally:
            self.waiting = False


class Parcel:
    """A batch, pickled: bytes that name the shared memory which its tensors are moved to.

    A loader process pickles what it returns in a thread, where an error loses the batch, and the
    training waits for ever. Here it is pickled where an error reaches the training.
    """

    def __init__(self, batch):
        try:
            self.content = bytes(ForkingPickler.dumps(batch))
        except (OSError, RuntimeError) as error:
            raise lost_batch(error) from None

    def open(self):
        try:
            return pickle.loads(self.content)
        except (OSError, EOFError, RuntimeError) as error:
            raise lost_batch(error) from None

    def pin_memory(self):  # a DataLoader calls it
        return map_tensors(torch.Tensor.pin_memory, self.open())


def lost_batch(error):
    """The Unreachable to raise when a batch did not get from a loader process to this one."""
    short = {
        "open files (ulimit -n 65536)": "Too many open files",
        "shared memory (docker run --shm-size=8g)": "No space left|shared memory",
    }
    short = [what for what, words in short.items() if re.search(words, str(error))]
    short = short[:1] or ["memory, shared memory (--shm-size=8g) or open files (ulimit -n 65536)"]
    why = one_line(error).removesuffix(":")
    why = f"a loader process could not hand over a batch ({why}): give it more {short[0]}"
    return Unreachable(f"{why}, or fewer --workers (0: none)")


def map_tensors(function, part):
    """`part` of a batch, with function(tensor) for each tensor in its dicts and lists."""
    if isinstance(part, torch.Tensor):
        return function(part)
    if isinstance(part, dict):
        return {name: map_tensors(function, one) for name, one in part.items()}
    return [map_tensors(function, one) for one in part] if isinstance(part, list) else part


class Loader(torch.utils.data.DataLoader):
    """A DataLoader that says every STALLED seconds what it is waiting for.

    While a Stop is active, an error is kept in its no_batch, and batches of weight 0 follow, so
    that this process still takes part in the collectives of the step, which is then dropped.
    """

    def __iter__(self):
        made = super().__iter__()  # the workers begin here, not with the first batch
        if self.num_workers and threading.current_thread() is threading.main_thread():
            # PyTorch's handler raises the death of a worker wherever the training is just then.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return self.watched(made)

    def watched(self, made):
        """Yield the batches of DataLoader's iterator and, after an error, batches of weight 0."""
        try:
            for number, item in enumerate(self.sampler):
                yield self.receive(made, item)
            return
        except BaseException as error:  # also GeneratorExit: this iterator is given up
            # PyTorch would wait 5 s for each worker that waits for a shard, one after the other.
            for worker in getattr(made, "_workers", []):
                worker.terminate()
            if not Stop.active or not isinstance(error, OSError | KeyboardInterrupt):
                raise
            Stop.active.no_batch = error
        # Without an order, positions past the last sample are padding of weight 0.
        past = dataclasses.replace(self.dataset, order=None)
        for _ in range(number, len(self.sampler)):
            yield past[len(past)]

    def receive(self, made, item):
        """The next batch, while a thread reports if it does not arrive. item: its number."""
        arrived = threading.Event()
        about = self.dataset, item, arrived
        threading.Thread(target=report_stall, args=about, daemon=True).start()
        try:
            return Stop.active.wait(made) if Stop.active else next_batch(made)
        except RuntimeError as error:
            if "exited unexpectedly" in str(error):  # a worker was killed
                raise lost_batch(error) from None
            raise
        finally:
            arrived.set()


def next_batch(made):
    """The next batch of a DataLoader's iterator, unpickled if a worker made it."""
    batch = next(made)
    return batch.open() if isinstance(batch, Parcel) else batch


def report_stall(dataset, item, arrived):
    """In a thread: print that a batch has not arrived, and end the waiting for it after a Stop."""
    began, said = time.monotonic(), 0
    while not arrived.wait(min(1, STALLED, GRACE)):
        waited = time.monotonic() - began
        if waited >= (said + 1) * STALLED:
            said += 1
            text = f"no batch for {waited:.0f} s: {dataset.about(item)}"
            print(text, file=sys.stderr, flush=True)
        if Stop.active and Stop.active.asked and waited >= GRACE:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)


def loader(batches, items, workers, pin=False):
    """A Loader of these items (a range) of Batches. workers: processes; 0: made in this one."""
    return Loader(
        batches,
        sampler=items,
        batch_size=None,
        num_workers=workers,
        collate_fn=Parcel if workers else None,
        pin_memory=pin,
        prefetch_factor=2 if workers else None,
        worker_init_fn=partial(begin_worker, os.getpid(), Image.MAX_IMAGE_PIXELS),
    )


def begin_worker(training, max_pixels, _):
    """In a loader process, also where it is spawned, not forked: the same limit of pixels; and the
    training process decides when it ends, whatever torchrun, Slurm or a user sends to all."""
    limit_pixels(max_pixels)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # on Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_when_told, args=(training,), daemon=True).start()
    # An error of the thread that hands over shared memory, such as too many open files, would come
    # again and again, while the training waits. When this process is gone, the training says why.
    sys.excepthook = lambda *_: os._exit(1)


def end_when_told(by):
    """In a thread: end at a SIGTERM of the training process, or when that process is gone.

    A SIGTERM of others is meant for the training, which saves first.
    """
    parent, told = os.getppid(), None
    while os.getppid() == parent and not (told and told.si_pid == by):
        told = signal.sigtimedwait({signal.SIGTERM}, 1)
    os._exit(0)


def loader_workers(asked, processes_here=1):
    """Loader processes per training process: as asked, or the cores that are left, 1 to 16."""
    cores = os.cpu_count() or 2
    if asked is None:
        return max(1, min(16, cores // processes_here - 1))
    if not 0 <= asked <= 8 * cores:
        raise ValueError(f"--workers {asked} is not between 0 and {8 * cores}, 8 for each core")
    return asked
