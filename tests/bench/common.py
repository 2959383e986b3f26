"""What the measurements share. To import it makes the repository's modules importable."""

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the stages; read when torch is loaded


def make_parser(description):
    """A parser of flags that shows their defaults. description: the docstring of the script."""
    return argparse.ArgumentParser(
        Path(sys.argv[0]).name,
        description=description.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def in_new_process(function, *arguments):
    """The result of a function in a process of its own, whose peak memory is its own as well."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def take_turns(functions, repeats, warm_up=1):
    """{name: [its results]} of {name: function}: in each repeat, all run one after the other.

    The first `warm_up` repeats are left out.
    """
    results = {name: [] for name in functions}
    for repeat in range(warm_up + repeats):
        for name, function in functions.items():
            result = function()
            results[name] += [result] if repeat >= warm_up else []
    return results


def timed(function, *arguments, clock=time.perf_counter):
    """Seconds that a call takes. clock: time.process_time counts this process's CPU time."""
    began = clock()
    function(*arguments)
    return clock() - began
