"""The order of samples and the traffic of shards on clusters, from data.Order alone. No network.

    python tests/bench/cluster.py
    python tests/bench/cluster.py --nodes 128 --lanes 1024

For each number of nodes: what a node reads in an epoch and an hour, what a resumed run waits for
before its first batch, what a cache must hold, and how even it all is. Shards are taken to be
fetched whole, each as often as a lane comes to it (two lanes are at the same shard at different
times). Lanes' stretches and cuts are those of all lanes (Order.before and .edges), what is open is
sampled: Order.block for some nodes, lanes and moments of the epoch. Times of this machine's.
"""

import argparse
import statistics
import sys
import time
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

import data

PER_NODE = 8  # processes
MOMENTS = (0.0, 0.1, 0.37, 0.5, 0.83)  # of an epoch


def parse_arguments():
    parser = argparse.ArgumentParser("cluster.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--shards", type=int, default=300_000, help="(300,000)")
    add("--samples", type=int, default=10_000, help="in a shard (10,000)")
    add("--bytes", type=float, default=50e3, help="of a sample (50e3)")
    add(
        "--nodes", default="16,128,1024", help=f"of {PER_NODE} processes, with commas (16,128,1024)"
    )
    add("--lanes", help="for each of these (three for each process)")
    add(
        "--rate",
        type=float,
        default=1400,
        help="images/s of a process (1400: H at 40 %% of an H100)",
    )
    add("--bandwidth", type=float, default=1.25e9, help="bytes/s of a node (1.25e9: 10 Gbit/s)")
    add("--epoch", type=int, default=1, help="that is looked at (1)")
    add("--sampled", type=int, default=240, help="lanes for each moment of the epoch (240)")
    return parser.parse_args()


def stretches(order, epoch):
    """(lanes + 1,) int64: where the lanes' stretches of an epoch begin and end."""
    end = (epoch + 1) * order.length
    return np.array([order.before(lane, end, epoch) for lane in range(order.lanes + 1)])


def touched(order, size, lane, moment, epoch, ends):
    """(shards of the block that a lane is in at a moment of the epoch, share of it that is done)"""
    turn = int(moment * (ends[lane + 1] - ends[lane]))
    first, samples = order.block(epoch, lane, turn)
    return np.unique(samples // size), (turn - first) / len(samples)


def simulate(options, nodes, lanes):
    """{what: text} of a cluster."""
    processes, epoch = nodes * PER_NODE, options.epoch
    if lanes % processes:
        raise SystemExit(f"{lanes} lanes cannot be dealt to {processes} processes: see --lanes")
    sizes = np.full(options.shards, options.samples)
    shard = options.samples * options.bytes
    tracemalloc.start()
    order = data.Order(sizes, lanes=lanes)
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    # All lanes: the shards that each comes to, and the cuts that run through one.
    ends = stretches(order, epoch)
    firsts = np.searchsorted(order.edges, ends[:-1], "right") - 1
    lasts = np.searchsorted(order.edges, ends[1:], "left")
    comes = lasts - firsts  # shards of each lane
    cut = np.unique(firsts[~np.isin(ends[:-1], order.edges)])
    samples = np.diff(ends)
    of = np.arange(lanes) % processes  # the process that a lane belongs to
    by_process = [np.bincount(of, values) for values in (samples, comes)]
    by_node = np.bincount(of // PER_NODE, comes) * shard

    # A sample of nodes and lanes: what is open at once.
    chosen = np.random.default_rng(0).permutation(nodes)
    open_shards, crowd, seconds = [], [], []
    for moment in MOMENTS:
        for node in chosen[: max(1, options.sampled * processes // lanes // PER_NODE)]:
            mine = np.flatnonzero(of // PER_NODE == node)
            began = time.perf_counter()
            found = [touched(order, options.samples, lane, moment, epoch, ends)[0] for lane in mine]
            seconds.append((time.perf_counter() - began) / PER_NODE)
            open_shards.append(len(np.unique(np.concatenate(found))))
        some = np.random.default_rng(1).permutation(lanes)[: options.sampled]
        done = [touched(order, options.samples, lane, moment, epoch, ends)[1] for lane in some]
        crowd.append(np.bincount((np.array(done) * 20).astype(int)).max() / len(some))
    began = time.perf_counter()
    data.Order(sizes, lanes=lanes)
    built = time.perf_counter() - began
    most, typical = max(open_shards), statistics.median(open_shards)
    an_hour = PER_NODE * options.rate * 3600 / (samples.sum() / nodes)  # epochs
    return {
        "processes": f"{processes:,}",
        "lanes": f"{lanes:,}",
        "hours of an epoch": f"{1 / an_hour:,.1f}",
        "TB a node reads in an epoch": f"{by_node.mean() / 1e12:.3f}",
        "  of which twice, for cuts": f"{comes.sum() / options.shards - 1:.1%}",
        "GB a node reads in an hour": f"{by_node.mean() * an_hour / 1e9:,.0f}",
        "  all nodes, GB/s": f"{by_node.sum() * an_hour / 3600 / 1e9:,.1f}",
        "  share of a node's bandwidth": f"{by_node.mean() * an_hour / 3600 / options.bandwidth:.0%}",
        "shards that two lanes read": f"{len(cut):,}",
        "shards of a lane in an epoch": f"{comes.min()} to {comes.max()}",
        "shards open at once on a node": f"{typical:g}, at most {most}",
        "least cache, GB": f"{most * shard / 1e9:.1f}",
        "  with each lane's next shard": f"{(most + lanes / nodes) * shard / 1e9:.1f}",
        "resume: Order, seconds": f"{built:.2f}",
        "  blocks of a process, seconds": f"{statistics.median(seconds):.3f}",
        "  GB a node fetches": f"{typical * shard / 1e9:.1f}",
        "  seconds for these": f"{typical * shard / options.bandwidth:.1f}",
        "  all nodes, TB": f"{typical * shard * nodes / 1e12:.2f}",
        "lanes' samples, most/least": f"{samples.max() / samples.min():.7f}",
        "processes' samples, most/least": f"{by_process[0].max() / by_process[0].min():.7f}",
        "processes' shards, most/least": f"{by_process[1].max() / by_process[1].min():.3f}",
        "nodes' bytes, most/least": f"{by_node.max() / by_node.min():.3f}",
        "lanes in the same 1/20 of a block": " ".join(f"{share:.0%}" for share in crowd),
        "memory of an Order, MB (peak)": f"{memory / 1e6:.1f}",
        "  and a process's blocks, MB": f"{lanes // processes * options.samples * 8 / 1e6:.1f}",
    }


def main():
    options, began = parse_arguments(), time.perf_counter()
    nodes = [int(number) for number in options.nodes.split(",")]
    lanes = options.lanes.split(",") if options.lanes else [3 * PER_NODE * n for n in nodes]
    print(f"{options.shards * options.samples:,} samples in {options.shards:,} shards", end="")
    print(f" of {options.samples * options.bytes / 1e9:g} GB; moments of the epoch {MOMENTS}")
    columns = [simulate(options, n, int(l)) for n, l in zip(nodes, lanes, strict=True)]
    print(f"{'nodes':36}" + "".join(f"{n:>22,}" for n in nodes))
    for name in columns[0]:
        print(f"{name:36}" + "".join(f"{column[name]:>22}" for column in columns))
    print(f"({time.perf_counter() - began:.0f} s)")


if __name__ == "__main__":
    main()
