"""data.Order at the paper's scale: CPU microseconds per sample and memory of one process of many.

    python tests/bench/order.py

3 billion samples in 300,000 shards on 1,024 processes, plain and with sampling weights
(totals per shard in memory, a shard's own weights made when they are needed). Peak
memory is tracemalloc's over building the order and drawing from it, the sizes and
totals of the shards included.
"""

import statistics
import time
import tracemalloc
from functools import partial

import common
import numpy as np

from data import Order
from support.hashtags import WEIGHT, WeightedOrder

SAMPLES, SHARDS, LANES, PROCESSES = 3_000_000_000, 300_000, 3_072, 1_024
cpu_seconds = partial(common.timed, clock=time.process_time)


def build(weighted):
    """An Order of shards of many sizes, deterministic."""
    sizes = np.random.default_rng(0).integers(SAMPLES // SHARDS // 2, SAMPLES // SHARDS, SHARDS)
    sizes += (SAMPLES - sizes.sum()) // SHARDS
    sizes[: SAMPLES - sizes.sum()] += 1
    if not weighted:
        return Order(sizes, lanes=LANES)
    # Quarters from 0 to 3, 1 on average; one table for all shards, so that totals cost
    # nothing.
    table = np.random.default_rng(1).integers(0, 5, sizes.max()) * (WEIGHT // 4)
    totals = np.cumsum(table)[sizes - 1] * (1 + (np.cumsum(sizes) - sizes) % 3)
    weights = lambda first, stop: table[: stop - first] * (1 + first % 3)
    own = {"totals": totals, "weights": weights, "largest": 4 * WEIGHT}
    return WeightedOrder(sizes, lanes=LANES, **own)


def positions(count, first):
    """`count` positions of one process, from round `first` on."""
    turns = np.arange(first, first + count // 2)
    return (2 * (turns[:, None] * PROCESSES + 123) + [0, 1]).ravel().tolist()


def draw(order, places):
    for position in places:
        order(position)


def measure(weighted, count):
    """(samples in an epoch, seconds to build, median seconds per sample, peak bytes)."""
    built, order = cpu_seconds(build, weighted), build(weighted)
    # Stretches in different places, the last one over an epoch's end.
    firsts = [order.length * number // (10 * PROCESSES) for number in (1, 2, 3, 4)]
    firsts.append((order.length - 5 * count) // (2 * PROCESSES))
    rates = [cpu_seconds(draw, order, positions(count, first)) / count for first in firsts]
    places = positions(count, 0)
    tracemalloc.start()
    draw(build(weighted), places)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return order.length, built, statistics.median(rates), peak


def main():
    parser = common.make_parser(__doc__)
    parser.add_argument("--positions", type=int, default=500_000, help="that one process draws")
    drawn = parser.parse_args().positions
    print(f"{SAMPLES:,} samples, {SHARDS:,} shards, {PROCESSES:,} processes, {LANES:,} lanes;")
    print(f"{drawn:,} positions of one process")
    print(f"{'order':10}{'epoch':>16}{'build s':>9}{'us/sample':>11}{'peak MB':>9}")
    for name, weighted in (("plain", False), ("weighted", True)):
        length, built, each, peak = measure(weighted, drawn // 5)
        numbers = f"{length:16,}{built:9.2f}{each * 1e6:11.2f}{peak / 1e6:9.1f}"
        print(f"{name:10}{numbers}", flush=True)


if __name__ == "__main__":
    main()
