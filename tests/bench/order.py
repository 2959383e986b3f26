"""data.Order at the paper's scale: CPU microseconds per sample and memory of one process of many.

    python tests/bench/order.py

3 billion samples in 300,000 shards on 1,024 processes, plain and with sampling weights (totals per
shard in memory, a shard's own weights made when it is asked for them). Peak memory is tracemalloc's
over building the order and drawing from it, the sizes and totals of the shards included. Then a
small order is drawn whole by all its processes, and every sample's draws are counted.
"""

import argparse
import statistics
import sys
import time
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

import data
from support import hashtags


def build(samples, shards, lanes, weighted):
    """(sizes of the shards, a function that gives samples' weights, Order), deterministic."""
    sizes = np.random.default_rng(0).integers(samples // shards // 2, samples // shards, shards)
    sizes += (samples - sizes.sum()) // shards
    sizes[: samples - sizes.sum()] += 1
    if not weighted:
        return sizes, None, data.Order(sizes, lanes=lanes)
    # Quarters from 0 to 3, 1 on average; one table for all shards, so that totals cost nothing.
    table = np.random.default_rng(1).integers(0, 5, sizes.max()) * (hashtags.WEIGHT // 4)
    totals = np.cumsum(table)[sizes - 1] * (1 + (np.cumsum(sizes) - sizes) % 3)

    def weights(first, stop):
        return table[: stop - first] * (1 + first % 3)

    order = hashtags.WeightedOrder(
        sizes, lanes=lanes, totals=totals, weights=weights, largest=4 * hashtags.WEIGHT
    )
    return sizes, weights, order


def positions(count, first, process, processes):
    """`count` positions of a process, from round `first` on."""
    for turn in range(first, first + count // 2):
        start = 2 * (turn * processes + process)
        yield from (start, start + 1)


def measure(options, weighted):
    """(seconds to build, median seconds per sample, peak bytes, samples in an epoch)."""
    arguments = options.samples, options.shards, options.lanes, weighted
    began = time.process_time()
    _, _, order = build(*arguments)
    built = time.process_time() - began
    rates = []
    for repeat in range(5):  # stretches in different places, the last one over an epoch's end
        first = order.length * (repeat + 1) // (10 * options.processes)
        if repeat == 4:
            first = (order.length - options.positions) // (2 * options.processes)
        mine = list(positions(options.positions // 5, first, 123, options.processes))
        began = time.process_time()
        for position in mine:
            order(position)
        rates.append((time.process_time() - began) / len(mine))
    del order
    tracemalloc.start()
    _, _, order = build(*arguments)
    for position in positions(options.positions // 5, 0, 123, options.processes):
        order(position)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return built, statistics.median(rates), peak, order.length


def count(weighted, processes=8, epochs=20):
    """(samples drawn too rarely or too often in an epoch, draws) of a small order."""
    sizes, weights, order = build(1_500, 100, 24, weighted)
    draws = Counter()
    for process in range(processes):
        _, _, order = build(1_500, 100, 24, weighted)  # every process has its own
        for position in positions(epochs * order.length, 0, process, processes):
            if position < epochs * order.length:
                draws[position // order.length, order(position)] += 1
    wrong = 0
    for epoch in range(epochs):
        for first, stop in pairwise(data.running_sum(sizes).tolist()):
            promised = weights(first, stop) / hashtags.WEIGHT if weighted else np.ones(stop - first)
            drawn = np.array([draws[epoch, number] for number in range(first, stop)])
            wrong += np.sum((drawn < np.floor(promised)) | (drawn > np.ceil(promised)))
    wrong += draws.total() != epochs * order.length
    return wrong, draws.total()


def main():
    parser = argparse.ArgumentParser("order.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--samples", type=int, default=3_000_000_000, help="(3 billion)")
    add("--shards", type=int, default=300_000, help="(300,000)")
    add("--processes", type=int, default=1_024, help="(1,024)")
    add("--lanes", type=int, default=3_072, help="a multiple of the processes (3,072)")
    add("--positions", type=int, default=500_000, help="that one process draws (500,000)")
    options = parser.parse_args()
    print(f"{options.samples:,} samples, {options.shards:,} shards, {options.processes:,} ", end="")
    print(f"processes, {options.lanes:,} lanes; {options.positions:,} positions of one process")
    print(f"{'order':10}{'epoch':>16}{'build s':>9}{'us/sample':>11}{'peak MB':>9}", end="")
    print(f"{'counted':>10}{'wrong':>7}")
    for name, weighted in (("plain", False), ("weighted", True)):
        built, each, peak, length = measure(options, weighted)
        wrong, counted = count(weighted)
        print(f"{name:10}{length:16,}{built:9.2f}{each * 1e6:11.2f}{peak / 1e6:9.1f}", end="")
        print(f"{counted:10,}{wrong:7}", flush=True)


if __name__ == "__main__":
    main()
