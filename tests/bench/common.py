"""What the measurements share. To import it makes the repository's modules importable."""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
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


STOPPED = threading.Event()  # no other program begins


def run_program(log, program, *flags, threads=1):
    """Run a program of the repository to its end. Returns what it prints, which `log` gets, too."""
    if STOPPED.is_set():
        raise SystemExit("stopped")
    script, *given = program.split()
    command = [sys.executable, str(ROOT / script), *given, *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    with open(log, "a") as file:
        file.write(f"$ {' '.join(command[1:])}\n{done.stdout}{done.stderr}")
    if "stopped at step" in done.stdout:  # by Ctrl-C: it has saved
        STOPPED.set()
    if done.returncode or STOPPED.is_set():
        *_, reason = [*done.stdout.splitlines(), *done.stderr.splitlines()] or [""]
        raise SystemExit(f"{program} failed: see {log}: {reason}")
    return done.stdout


def last_json(text):
    """The object in the last line of a text: a program's result, or a run's last metrics."""
    return json.loads(text.strip().splitlines()[-1])


def side_by_side(jobs, functions):
    """Call functions, so many at once, in threads. After an error, no other one begins."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(function) for function in functions]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            STOPPED.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class Results:
    """The rows of OUT/results.jsonl. A stopped measurement goes on with them.

    settings  {name: JSON value} of the measurement. Raises SystemExit if OUT is of others
    """

    def __init__(self, out, **settings):
        self.path, known = Path(out, "results.jsonl"), Path(out, "settings.json")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not known.exists():
            known.write_text(json.dumps(settings))
        if settings and json.loads(known.read_text()) != settings:
            raise SystemExit(f"{out} is of another measurement, see {known}: give a new --out")

    def rows(self):
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]  # not one that is cut

    def has(self, row):
        """Is there a row with these values?"""
        return any(row.items() <= known.items() for known in self.rows())

    def add(self, row):
        with open(self.path, "a+") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            cut = file.read() not in ("", "\n")  # a line that a killed measurement has begun
            file.write("\n" * cut + json.dumps(row) + "\n")
        print(row, flush=True)


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
