"""Batches made ahead by worker processes. No failure of a worker is lost.

    loader    a torch DataLoader over data.Batches
    Stop      signals: a run ends after its step, and saves

A worker may die (out of memory), fail to hand over a batch (shared memory, open files)
or wait for a disk. Then the training says why, takes no step on part of a batch, saves,
and ends.
"""

import dataclasses
import os
import pickle
import signal
import sys
import threading
import time
from functools import partial
from multiprocessing.reduction import ForkingPickler

import torch
from PIL import Image

from data import Subset, Unreachable, limit_pixels, one_line

STALLED = 60  # seconds without a batch until the user is told so
GRACE = 5  # seconds that a run waits for a batch after it was asked to stop

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
SIGNALS = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]


class Stop:
    """A request to end a run, by SIGTERM, SIGUSR1 (Slurm's --signal) or Ctrl-C.

    asked     True if there was one. The run ends after this step, and saves. The second
              Ctrl-C ends it at once.
    no_batch  why a Loader has no more batches, an exception; None while it has

    Until release(), the Loaders of this process act on it: see Loader.
    """

    active = None  # a process has one set of signals
    waiting = False  # True while a Loader waits for a batch

    def __init__(self):
        self.asked, self.no_batch = False, None
        for number in SIGNALS:
            signal.signal(number, self.ask)
        Stop.active = self

    def release(self):
        """Restore the default actions of the signals."""
        Stop.active = None
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def ask(self, number, _):
        """Handle a signal."""
        if self.asked and Stop.waiting:
            raise KeyboardInterrupt  # no library takes it for a failure that it may hide
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        self.asked = True


class Parcel:
    """A batch, pickled: bytes that name the shared memory which its tensors are moved to.

    A DataLoader pickles in a thread of the worker, where an error loses the batch, and
    the training waits for ever. Here, an error reaches the training.
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


def name_unreadable(source, bad):
    """Print the names of unreadable samples that are left out, each once for a source and all
    Subsets of it. bad: of a batch of data.Batches."""
    while isinstance(source, Subset):
        source = source.source
    named = vars(source).setdefault("named", set())
    for name in bad:
        if name not in named:
            print(f"unreadable, left out: {name}", file=sys.stderr)
    named.update(bad)


def lost_batch(error):
    """The Unreachable to raise when a loader process could not hand over a batch."""
    why = one_line(error).removesuffix(":")
    return Unreachable(
        f"a loader process could not hand over a batch ({why}): give it more memory, "
        "shared memory (docker run --shm-size=8g) or open files (ulimit -n 65536), "
        "or fewer --workers (0: none)"
    )


def map_tensors(function, part):
    """`part` of a batch, with function(tensor) for each tensor in its dicts and lists."""
    if isinstance(part, torch.Tensor):
        return function(part)
    if isinstance(part, dict):
        return {name: map_tensors(function, one) for name, one in part.items()}
    return [map_tensors(function, one) for one in part] if isinstance(part, list) else part


class Loader(torch.utils.data.DataLoader):
    """A DataLoader that says every STALLED seconds what it is waiting for.

    While a Stop is active, an error is kept in its no_batch, and batches of weight 0
    follow: with them, this process takes part in the step, which is then dropped.
    """

    def __iter__(self):
        made = super().__iter__()  # the workers begin here, not with the first batch
        if self.num_workers and threading.current_thread() is threading.main_thread():
            # PyTorch's handler would raise wherever the training is then.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return self.watched(made)

    def watched(self, made):
        """Yield DataLoader's batches and, after an error, batches of weight 0."""
        try:
            for number, item in enumerate(self.sampler):
                yield self.receive(made, item)
            return
        except BaseException as error:  # also GeneratorExit: this iterator is given up
            # PyTorch waits 5 s for each worker that waits for a shard.
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
        """The next batch, number `item`. A thread reports if it does not arrive."""
        arrived = threading.Event()
        about = self.dataset, item, arrived
        threading.Thread(target=report_stall, args=about, daemon=True).start()
        try:
            Stop.waiting = True
            batch = next(made)
            return batch.open() if isinstance(batch, Parcel) else batch
        except RuntimeError as error:
            if "exited unexpectedly" in str(error):  # a worker was killed
                raise lost_batch(error) from None
            raise
        finally:
            Stop.waiting = False
            arrived.set()


def report_stall(batches, item, arrived):
    """In a thread: print that a batch has not arrived, and end the wait after a Stop."""
    began, said = time.monotonic(), 0
    while not arrived.wait(min(1, STALLED, GRACE)):
        waited = time.monotonic() - began
        if waited >= (said + 1) * STALLED:
            said += 1
            text = f"no batch for {waited:.0f} s: {describe(batches, item)}"
            print(text, file=sys.stderr, flush=True)
        if Stop.active and Stop.active.asked and waited >= GRACE:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)


def describe(batches, number):
    """The shards or pictures of a micro-batch as text; if some are not in the cache, those."""
    places, cache = batches.places(batches.positions(number)), batches.cache
    if cache:
        places = [place for place in places if not cache.has(place)] or places
    some = ", ".join(places[:4]) + ", ..." * (len(places) > 4)
    step = number // batches.micro_batches + 1
    return f"process {batches.process}, step {step}: {some}"


def loader(batches, items, workers, pin=False):
    """A Loader of these items (a range) of Batches. workers: processes, or 0."""
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
    """Runs in each loader process, forked or spawned: the limit of pixels, and its end.

    Signals to the whole process group are ignored: only the training ends a worker.
    """
    limit_pixels(max_pixels)
    for number in set(SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # on Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_when_told, args=(training,), daemon=True).start()
    # The thread that hands over shared memory would fail again and again (too many open
    # files), while the training waits. If this process ends, the training says why.
    sys.excepthook = lambda *_: os._exit(1)


def end_when_told(by):
    """In a thread: end at a SIGTERM of the training (of no other), or at its end."""
    parent, told = os.getppid(), None
    while os.getppid() == parent and not (told and told.si_pid == by):
        told = signal.sigtimedwait({signal.SIGTERM}, 1)
    os._exit(0)


def loader_workers(asked, processes_here=1):
    """Loader processes per training process: as asked, or the free cores, 1 to 16."""
    cores = os.cpu_count() or 2
    if asked is None:
        return max(1, min(16, cores // processes_here - 1))
    if not 0 <= asked <= 8 * cores:
        raise ValueError(f"--workers {asked} is not between 0 and {8 * cores}, 8 for each core")
    return asked
