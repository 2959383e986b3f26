"""The order of samples and the traffic of shards on clusters, from data.Order alone. No network.

    python tests/bench/cluster.py
    python tests/bench/cluster.py --nodes 128 --lanes 1024

For each number of nodes: what a node reads in an epoch and an hour, what a resumed run
waits for before its first batch, what a cache must hold, and how even it all is. Shards
are taken to be fetched whole, each as often as a lane comes to it (two lanes are at the
same shard at different times). Lanes' stretches and cuts are those of all lanes
(Order.before and .edges). Open shards are sampled: Order.block for some nodes, lanes
and moments of the epoch. Times are this machine's.
"""

import statistics
import time
import tracemalloc

import common
import numpy as np

import data

SHARDS, SAMPLES = 300_000, 10_000  # samples in a shard
SHARD = SAMPLES * 50e3  # bytes
PER_NODE = 8  # processes
RATE = 1400  # images/s of a process: H at 40 % of an H100
BANDWIDTH = 1.25e9  # bytes/s of a node: 10 Gbit/s
EPOCH = 1
MOMENTS = (0.0, 0.1, 0.37, 0.5, 0.83)  # of the epoch
SAMPLED = 240  # lanes for each of them


def touched(order, lane, moment, ends):
    """(shards of the block that a lane is in at a moment of the epoch, share of it that is done)"""
    turn = int(moment * (ends[lane + 1] - ends[lane]))
    first, samples = order.block(EPOCH, lane, turn)
    return np.unique(samples // SAMPLES), (turn - first) / len(samples)


def simulate(nodes, lanes):
    """{what: text} of a cluster."""
    processes = nodes * PER_NODE
    if lanes % processes:
        raise SystemExit(f"{lanes} lanes cannot be dealt to {processes} processes: see --lanes")
    sizes = np.full(SHARDS, SAMPLES)
    tracemalloc.start()
    order = data.Order(sizes, lanes=lanes)
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    # All lanes: the shards that each comes to, and the cuts that run through one.
    end = (EPOCH + 1) * order.length
    ends = np.array([order.before(lane, end, EPOCH) for lane in range(lanes + 1)])
    firsts = np.searchsorted(order.edges, ends[:-1], "right") - 1
    comes = np.searchsorted(order.edges, ends[1:], "left") - firsts  # shards of each lane
    cut = np.unique(firsts[~np.isin(ends[:-1], order.edges)])
    samples = np.diff(ends)
    of = np.arange(lanes) % processes  # the process that a lane belongs to
    samples_of, shards_of = (np.bincount(of, values) for values in (samples, comes))
    bytes_of = np.bincount(of // PER_NODE, comes) * SHARD  # a node's

    # A sample of nodes and lanes: what is open at once.
    chosen = np.random.default_rng(0).permutation(nodes)
    open_shards, crowd, seconds = [], [], []
    for moment in MOMENTS:
        for node in chosen[: max(1, SAMPLED * processes // lanes // PER_NODE)]:
            mine, began = np.flatnonzero(of // PER_NODE == node), time.perf_counter()
            found = [touched(order, lane, moment, ends)[0] for lane in mine]
            seconds.append((time.perf_counter() - began) / PER_NODE)
            open_shards.append(len(np.unique(np.concatenate(found))))
        some = np.random.default_rng(1).permutation(lanes)[:SAMPLED]
        done = np.array([touched(order, lane, moment, ends)[1] for lane in some])
        crowd.append(np.bincount((done * 20).astype(int)).max() / len(some))
    built = common.timed(lambda: data.Order(sizes, lanes=lanes))
    most, typical = max(open_shards), statistics.median(open_shards)
    hours = samples.sum() / nodes / (PER_NODE * RATE * 3600)  # of an epoch
    second = bytes_of.mean() / hours / 3600  # bytes that a node reads
    return {
        "processes": f"{processes:,}",
        "lanes": f"{lanes:,}",
        "hours of an epoch": f"{hours:,.1f}",
        "TB a node reads in an epoch": f"{bytes_of.mean() / 1e12:.3f}",
        "  of which twice, for cuts": f"{comes.sum() / SHARDS - 1:.1%}",
        "GB a node reads in an hour": f"{second * 3600 / 1e9:,.0f}",
        "  all nodes, GB/s": f"{second * nodes / 1e9:,.1f}",
        "  share of a node's bandwidth": f"{second / BANDWIDTH:.0%}",
        "shards that two lanes read": f"{len(cut):,}",
        "shards of a lane in an epoch": f"{comes.min()} to {comes.max()}",
        "shards open at once on a node": f"{typical:g}, at most {most}",
        "least cache, GB": f"{most * SHARD / 1e9:.1f}",
        "  with each lane's next shard": f"{(most + lanes / nodes) * SHARD / 1e9:.1f}",
        "resume: Order, seconds": f"{built:.2f}",
        "  blocks of a process, seconds": f"{statistics.median(seconds):.3f}",
        "  GB a node fetches": f"{typical * SHARD / 1e9:.1f}",
        "  seconds for these": f"{typical * SHARD / BANDWIDTH:.1f}",
        "  all nodes, TB": f"{typical * SHARD * nodes / 1e12:.2f}",
        "lanes' samples, most/least": f"{samples.max() / samples.min():.7f}",
        "processes' samples, most/least": f"{samples_of.max() / samples_of.min():.7f}",
        "processes' shards, most/least": f"{shards_of.max() / shards_of.min():.3f}",
        "nodes' bytes, most/least": f"{bytes_of.max() / bytes_of.min():.3f}",
        "lanes in the same 1/20 of a block": " ".join(f"{share:.0%}" for share in crowd),
        "memory of an Order, MB (peak)": f"{memory / 1e6:.1f}",
        "  and a process's blocks, MB": f"{lanes // processes * SAMPLES * 8 / 1e6:.1f}",
    }


def main():
    parser, began = common.make_parser(__doc__), time.perf_counter()
    nodes = f"of {PER_NODE} processes, with commas"
    parser.add_argument("--nodes", default="16,128,1024", help=nodes)
    parser.add_argument("--lanes", help="for each of these; None: three for each process")
    options = parser.parse_args()
    nodes = [int(number) for number in options.nodes.split(",")]
    lanes = options.lanes.split(",") if options.lanes else [3 * PER_NODE * n for n in nodes]
    print(f"{SHARDS * SAMPLES:,} samples in {SHARDS:,} shards of {SHARD / 1e9:g} GB")
    print(f"moments of the epoch {MOMENTS}")
    columns = [simulate(n, int(l)) for n, l in zip(nodes, lanes, strict=True)]
    print(f"{'nodes':36}" + "".join(f"{n:>22,}" for n in nodes))
    for name in columns[0]:
        print(f"{name:36}" + "".join(f"{column[name]:>22}" for column in columns))
    print(f"({time.perf_counter() - began:.0f} s)")


if __name__ == "__main__":
    main()
