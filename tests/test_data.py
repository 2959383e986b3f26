"""data.py: the order of samples, pictures to tensors, bad input, sources, shards, the toy world.

Everything is made here, small: pictures, tars and folders. Statistical tests draw from fixed seeds,
so they cannot fail by chance; their limits lie where a right implementation would be rejected once
in a million, which says that the seeds were not picked.
"""

import contextlib
import errno
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import queue
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ODD_NAMES,
    PICTURES,
    ROOT,
    SIZES,
    STEPS,
    TINY,
    Memory,
    Server,
    chi_square,
    decoded,
    encoded,
    epoch_counts,
    everything,
    handmade_png,
    members_of,
    npy,
    one_line,
    opened,
    painting,
    photo,
    picture,
    picture_batches,
    read_metrics,
    relative_labels,
    run_main,
    same_batch,
    stage,
    stream,
    textured,
    tile,
    training_batches,
    write_files,
    write_tar,
)
from PIL import Image

import data
from support import hashtags, toy
from support import labels as labels_module
from support import loader as loader_module
from support import pack as pack_module
from support import shards as shards_module
from tasks import video as video_module

# ------------------------------------------------------------------------------------ random numbers


def philox(key, counter):
    """Philox4x64-10 (Salmon et al. 2011) on Python's integers: 4 + 2 words -> 4 words."""
    low = 2**64 - 1
    key, words = list(key), list(counter)
    for _ in range(10):
        even, odd = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [
            odd >> 64 ^ words[1] ^ key[0],
            odd & low,
            even >> 64 ^ words[3] ^ key[1],
            even & low,
        ]
        key = [key[0] + 0x9E3779B97F4A7C15 & low, key[1] + 0xBB67AE8584CAA73B & low]
    return words


def handmade_bits(count, seed, epoch, position, purpose):
    """random_bits by hand. numpy counts up before the first block, so blocks count from 1."""
    blocks = (philox([seed, purpose], [i + 1, position, epoch, 0]) for i in range(count))
    return [word for block in blocks for word in block][:count]


KEYS = [(0, 0, 0, 1), (1, 2, 3, 4), (2**63 + 11, 5, 2**62 + 7, 6), (7, 2**40, 2**33, 8)]


def test_philox_by_hand_gives_the_published_known_answers():
    """The test's own oracle, against two vectors of Random123's kat_vectors file."""
    zeros = philox([0, 0], [0, 0, 0, 0])
    assert [f"{word:016x}" for word in zeros] == [
        "16554d9eca36314c",
        "db20fe9d672d0fdc",
        "d7e772cee186176b",
        "7e68b68aec7ba23b",
    ]
    ones = philox([2**64 - 1] * 2, [2**64 - 1] * 4)
    assert [f"{word:016x}" for word in ones] == [
        "87b092c3013fe90b",
        "438c3c67be8d0224",
        "9cc7d7c69cd777b6",
        "a09caebf594f0ba0",
    ]


@pytest.mark.parametrize("keys", KEYS)
def test_random_numbers_are_philox_and_nothing_else(keys):
    words = handmade_bits(40, *keys)
    assert data.random_bits(40, *keys).tolist() == words
    assert data.random_bits(7, *keys).tolist() == words[:7]  # more draws do not change the first
    assert data.uniform(data.random_bits(40, *keys)).tolist() == [
        (word >> 11) / 2**53 for word in words
    ]
    by_draw = sorted(range(40), key=words.__getitem__)
    assert data.permutation(40, *keys).tolist() == by_draw


def test_a_running_sum_has_an_edge_more_than_numbers():
    assert data.running_sum([3, 0, 2]).tolist() == [0, 3, 3, 5]
    assert data.running_sum([]).tolist() == [0] and data.running_sum([]).dtype == np.int64


def test_uniform_stays_below_one():
    ends = data.uniform(np.array([0, 2**64 - 1], dtype=np.uint64))
    assert ends[0] == 0 and 1 - 2**-52 < ends[1] < 1


def test_each_of_the_four_keys_changes_every_draw():
    keys = (3, 4, 5, 6)
    draws = [data.random_bits(8, *keys)]
    for place in range(4):
        other = tuple(key + (i == place) for i, key in enumerate(keys))
        draws.append(data.random_bits(8, *other))
    swapped = [(4, 3, 5, 6), (3, 5, 4, 6), (3, 4, 6, 5)]
    draws += [data.random_bits(8, *keys) for keys in swapped]
    assert len({int(word) for words in draws for word in words}) == 8 * len(draws)


# -------------------------------------------------------------------------------------------- order

SHAPES = [
    ([1], None),
    ([1], 48),
    ([2, 1], 2),
    ([0, 0, 1, 0], 3),
    ([1] * 7, 48),  # more lanes than samples
    ([5, 0, 7, 0], None),
    ([33, 1, 250, 0, 8, 9], 4),
    ([97] * 13, 12),
    ([16] * 48, None),
    (list(range(60)), 48),
    ([9000, 0, 1, 8500, 3], 2),  # more than one block of shuffling
    ([20000, 3, 30000, 17000], 1),  # shards longer than a block
]


@pytest.mark.parametrize("sizes, lanes", SHAPES)
def test_every_epoch_is_each_sample_once(sizes, lanes):
    order = data.Order(sizes, seed=5, lanes=lanes)
    assert order.length == sum(sizes)
    for epoch in range(3):
        drawn = stream(order, epoch * order.length, (epoch + 1) * order.length)
        assert sorted(drawn) == list(range(order.length))


@pytest.mark.parametrize("sizes, lanes", [([33, 1, 250, 0, 8, 9], 4), ([1] * 7, 48), ([90], 1)])
def test_order_is_a_pure_function_of_the_position(sizes, lanes):
    order = data.Order(sizes, seed=1, lanes=lanes)
    count = 3 * order.length
    forwards = stream(order, 0, count)
    assert [order(position) for position in reversed(range(count))] == forwards[::-1]
    fresh = data.Order(np.array(sizes), seed=1, lanes=lanes)
    anywhere = np.random.default_rng(0).permutation(count).tolist()
    assert [fresh(position) for position in anywhere] == [forwards[p] for p in anywhere]


UNEVEN = [17, 0, 40, 151, 3, 96, 8, 8, 1, 25, 60, 2, 77, 0, 31, 5, 5, 5, 120, 9] * 3


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 6, 8])
def test_the_stream_is_the_same_on_any_number_of_processes(processes):
    whole = data.Order(UNEVEN, seed=2)
    count = 2 * whole.length + 101  # over two epoch borders
    expected = stream(whole, 0, count)
    for process in range(processes):
        order = data.Order(UNEVEN, seed=2)
        mine = [p for p in range(count) if p // 2 % processes == process]
        assert [order(position) for position in mine] == [expected[p] for p in mine]


@pytest.mark.parametrize("processes", [2, 3, 4, 6, 8, 48])
def test_a_process_reads_only_the_shards_of_its_lanes(processes):
    order = data.Order([20] * 48, seed=3, lanes=48)
    for epoch in range(2):
        positions = range(epoch * order.length, (epoch + 1) * order.length)
        touched = [set() for _ in range(processes)]
        for position in positions:
            touched[position // 2 % processes].add(order(position) // 20)
        assert [len(shards) for shards in touched] == [48 // processes] * processes


def test_a_pair_comes_from_one_lane():
    order = data.Order([20] * 48, seed=3, lanes=48)  # a lane is one shard, see above
    drawn = stream(order, 0, 3 * order.length)
    assert all(drawn[p] // 20 == drawn[p + 1] // 20 for p in range(0, len(drawn), 2))


def test_a_cut_shard_is_read_by_two_lanes_and_cuts_hardly_move():
    """Lanes as processes. The docstring: cuts move by fewer than 2 x lanes from epoch to epoch."""
    lanes, epochs = 6, []
    order = data.Order(UNEVEN, seed=4, lanes=lanes)
    shards = np.repeat(np.arange(len(UNEVEN)), UNEVEN)  # of each sample
    for epoch in range(4):
        drawn = [set() for _ in range(lanes)]
        for position in range(epoch * order.length, (epoch + 1) * order.length):
            drawn[position // 2 % lanes].add(order(position))
        epochs.append(drawn)
        read = sum(len(set(shards[list(samples)])) for samples in drawn)
        assert read <= np.count_nonzero(UNEVEN) + lanes - 1  # each cut adds one reading
    for before, after in itertools.pairwise(epochs):
        for one, other in zip(before, after):  # both ends of a lane may move
            assert len(one - other) < 2 * 2 * lanes and len(other - one) < 2 * 2 * lanes


def in_order(order):
    return picture_batches(Memory([60]), (8, 8), 3, 8, order=order)


def test_one_unreadable_picture_is_never_too_many():
    order = in_order(data.Order([60]))  # it comes once in each epoch of 60
    for drawn in (1, 59, 60, 61, 600, 60_000):
        come = -(-drawn // 60)  # at most so often so far
        assert not order.over_max_bad(come, drawn, 0.01)
    assert order.over_max_bad(11, 120, 0.01) and not order.over_max_bad(
        10, 120, 0.01
    )  # 1 % of 1,000
    assert order.over_max_bad(1002, 60_000, 0.01) and not order.over_max_bad(1001, 60_000, 0.01)
    assert order.over_max_bad(3, 60, 0) and not order.over_max_bad(2, 60, 0)
    assert order.over_max_bad(40, 40, 1) and not order.over_max_bad(39, 40, 1)  # all of them
    assert not order.over_max_bad(1, 1, 0.01)
    # With weights, it comes as often in an epoch as its weight says.
    spans = np.array([5 * hashtags.WEIGHT // 2, *[hashtags.WEIGHT] * 59])
    weights = lambda a, b: spans[a:b]
    order = hashtags.WeightedOrder([60], totals=[spans.sum()], weights=weights, largest=spans.max())
    assert order.length == 61 and sorted(stream(order, 0, 61)).count(0) in (2, 3)
    heavy = in_order(order)
    assert not heavy.over_max_bad(3 * 100, 100 * 61, 0) and not heavy.over_max_bad(3, 5, 0)
    assert heavy.over_max_bad(3 * 101 + 1, 100 * 61, 0)


def test_seeds_and_epochs_give_different_orders():
    count = sum(UNEVEN)
    first = data.Order(UNEVEN, seed=0)
    streams = [stream(first, 0, count), stream(first, count, 2 * count)]
    streams.append(stream(data.Order(UNEVEN, seed=1), 0, count))
    alone = [stream(data.Order([64], seed=seed), 0, 64) for seed in range(3)]  # nothing but a block
    assert alone[0] != alone[1] != alone[2] != alone[0]
    for i, one in enumerate(streams):
        for other in streams[:i]:  # a handful may agree by chance
            assert sum(a == b for a, b in zip(one, other)) < count / 20


def test_the_seed_decides_which_shards_lie_in_a_lane():
    def first_lane(seed):
        order = data.Order([20] * 48, seed=seed, lanes=12)
        return frozenset(order(p) // 20 for p in range(order.length) if p // 2 % 12 == 0)

    assert len({first_lane(seed) for seed in range(5)}) == 5


def test_lanes_and_blocks_are_not_shuffled_alike():
    """One shard per lane, and one shard per block: places in them say how each was shuffled."""
    lanes, size = 3, 64
    order = data.Order([size] * lanes, seed=1, lanes=lanes)
    drawn = np.array(stream(order, 0, lanes * size)).reshape(-1, lanes, 2) % size
    assert len({tuple(drawn[:, lane].ravel().tolist()) for lane in range(lanes)}) == lanes
    size = data.SHUFFLE_BLOCK
    order = data.Order([size] * 3, seed=1, lanes=1)
    drawn = np.array(stream(order, 0, 3 * size)).reshape(3, size) % size
    assert len({tuple(block) for block in drawn.tolist()}) == 3


def test_a_sample_lands_anywhere_in_its_block():
    order, epochs = data.Order([64], seed=6), 2000
    landed = [stream(order, 64 * epoch, 64 * epoch + 64).index(5) for epoch in range(epochs)]
    assert chi_square(np.bincount(landed, minlength=64)) < 1


def test_neighbours_in_the_stream_have_nothing_to_do_with_each_other():
    """A correlation of n independent pairs has a standard deviation of 1 / sqrt(n): 5 of them."""
    size = 4096
    order = data.Order([size], seed=7)
    one, two = (np.array(stream(order, e * size, (e + 1) * size)) for e in range(2))
    limit = 5 / math.sqrt(size)
    assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < limit
    assert abs(np.corrcoef(one, two)[0, 1]) < limit
    assert abs(np.corrcoef(one, np.arange(size))[0, 1]) < limit


def test_small_shards_are_mixed():
    """32 shards in one block: neighbours share a shard as often as chance has it, within 5 sigma."""
    order = data.Order([128] * 32, seed=8, lanes=1)
    shards = np.array(stream(order, 0, order.length)) // 128
    count = len(shards) - 1
    assert abs(np.mean(shards[1:] == shards[:-1]) - 1 / 32) < 5 * math.sqrt(1 / 32 / count)


def test_a_block_comes_from_few_shards_and_blocks_in_random_order():
    block = data.SHUFFLE_BLOCK
    order = data.Order([block // 2] * 12, seed=9, lanes=1)
    drawn = np.array(stream(order, 0, order.length)).reshape(-1, block) // (block // 2)
    assert [len(set(shards)) for shards in drawn.tolist()] == [2] * 6
    firsts = {order(epoch * order.length) // (block // 2) for epoch in range(40)}
    assert len(firsts) > 8  # of 12: fewer have a chance of 1e-5


class Weights:
    """Sampling weights, a list for each shard, as Order wants them; remembers what it asked for."""

    def __init__(self, shards):
        self.shards = [np.round(np.array(w) * hashtags.WEIGHT).astype(np.int64) for w in shards]
        self.weights, self.asked = np.concatenate(self.shards), set()

    def __call__(self, first, stop):
        self.asked.add((first, stop))
        return self.weights[first:stop]

    def order(self, **options):
        sizes, totals = [len(w) for w in self.shards], [w.sum() for w in self.shards]
        return hashtags.WeightedOrder(
            sizes, totals=totals, weights=self, **{"largest": hashtags.WEIGHT} | options
        )

    def items(self):
        """(sample, weight as a number) of every sample."""
        return enumerate((self.weights / hashtags.WEIGHT).tolist())


@pytest.mark.parametrize("lanes", [1, 2, 5, 48])
def test_whole_weights_give_exactly_as_many_copies(lanes):
    weights = Weights([[1, 0, 3], [], [2] * 50, [0, 0], [7], list(range(6)) * 4])
    order = weights.order(seed=1, lanes=lanes)
    copies = {sample: int(weight) for sample, weight in weights.items() if weight}
    assert order.length == sum(copies.values())
    for epoch in range(3):
        assert epoch_counts(order, epoch) == copies


def test_fractional_weights_are_rounded_up_or_down_and_right_on_average():
    """Rounding up is a coin of the fraction's probability: 5 standard deviations of its mean."""
    weights = Weights([[0.25, 1.5, 0.5], [0, 2.125, 0.125], [3.75, 0.75], [1, 2]])
    order, epochs, total = weights.order(seed=2, lanes=3), 400, Counter()
    assert order.length == 12  # the weights add up to it, see below for when they do not
    for epoch in range(epochs):
        counts = epoch_counts(order, epoch)
        for sample, weight in weights.items():
            assert counts[sample] in (math.floor(weight), math.ceil(weight))
        total += counts
    for sample, weight in weights.items():
        fraction = weight % 1
        limit = 5 * math.sqrt(fraction * (1 - fraction) / epochs)
        assert abs(total[sample] / epochs - weight) <= limit


@pytest.mark.parametrize("weights", [[0.25] * 102, [0.1, 0.9, 0.45, 1.3, 0.7, 0.2, 1.0] * 9])
def test_no_sample_is_favoured_where_the_weights_are_no_whole_number_in_all(weights):
    """Each is drawn weight x length / sum times on average, wherever it lies."""
    order = Weights([weights[:40], weights[40:]]).order(seed=5, lanes=2)
    epochs, total = 1000, Counter()
    assert order.length == math.floor(sum(weights)) < sum(weights)
    for epoch in range(epochs):
        total += epoch_counts(order, epoch)
    for sample, weight in enumerate(weights):
        promised = weight * order.length / sum(weights)
        # 5 standard deviations of a coin that decides between two neighbouring numbers
        assert abs(total[sample] / epochs - promised) < 5 * math.sqrt(0.25 / epochs)


def test_a_weight_of_zero_is_never_drawn_even_where_a_point_falls_on_its_edge():
    """65,536 pairs of weights 0 and 1 / 65,536: every point lies on the edge of a pair."""
    totals = np.ones(hashtags.WEIGHT, dtype=np.int64)
    order = hashtags.WeightedOrder(
        totals * 2, seed=1, totals=totals, weights=lambda *_: np.array([0, 1]), largest=1
    )
    assert order.length == 1
    drawn = stream(order, 0, 5)
    assert all(sample % 2 for sample in drawn) and len(set(drawn)) == 5


def test_weights_that_do_not_add_up_to_a_whole_number():
    """The epoch is the sum rounded down, so one draw in all may be missing, never one too many."""
    weights = Weights([[0.5, 1, 0.7], [0.3, 2], [1.1]])
    order = weights.order(seed=3, lanes=2)
    assert order.length == 5  # of 5.6
    for epoch in range(50):
        counts = epoch_counts(order, epoch)
        short = [max(0, math.floor(weight) - counts[s]) for s, weight in weights.items()]
        assert sum(short) <= 1
        assert all(counts[sample] <= math.ceil(weight) for sample, weight in weights.items())


def test_weighted_order_is_pure_and_the_same_on_any_number_of_processes():
    random = np.random.default_rng(0)
    lists = [random.uniform(0, 2, size).tolist() for size in UNEVEN[:24]]
    whole = Weights(lists).order(seed=4, lanes=12)
    count = 2 * whole.length + 31
    expected = stream(whole, 0, count)
    for processes in (2, 3, 4):
        for process in range(processes):
            order = Weights(lists).order(seed=4, lanes=12)
            mine = [p for p in reversed(range(count)) if p // 2 % processes == process]
            assert [order(position) for position in mine] == [expected[p] for p in mine]


@pytest.mark.parametrize("processes", [2, 4, 6])
def test_weights_are_asked_only_for_the_shards_of_a_processs_lanes(processes):
    asked = []
    for process in range(processes):
        weights = Weights([[0.5, 1.5] * 10] * 48)
        order = weights.order(lanes=48)
        assert not weights.asked  # the totals are enough to begin
        for position in range(order.length):
            if position // 2 % processes == process:
                order(position)
        asked.append(weights.asked)
    assert [len(shards) for shards in asked] == [48 // processes] * processes
    assert set().union(*asked) == {(first, first + 20) for first in range(0, 48 * 20, 20)}


def peak_memory(work):
    """Bytes that were allocated at once while work() ran, numpy's arrays included."""
    tracemalloc.start()
    try:
        result = work()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shards, size, lanes", [(300_000, 10_000, 1024), (1000, 20_000, 48)])
def test_memory_grows_with_the_shards_only(shards, size, lanes):
    """3 billion samples in 300,000 shards must cost less than 100 MB; here for a process of 1,024
    (one lane), and for shards that are longer than a block."""

    def work():
        order = data.Order(np.full(shards, size), lanes=lanes)
        places = [p * 2 * lanes for p in (0, 1, 10, 1000)]
        return order, [order(position) for position in places]

    (order, places), peak = peak_memory(work)
    assert order.length == shards * size and len(set(places)) == 4
    assert peak < 2**20 * 25


def test_there_are_48_lanes_or_as_many_as_shards():
    assert data.Order([20] * 100).lanes == 48
    assert data.Order([20] * 5).lanes == 5


def test_no_samples_is_an_error():
    for sizes in ([], [0, 0]):
        with pytest.raises(ValueError, match="no samples") as error:
            data.Order(sizes)
        one_line(error)
    with pytest.raises(ValueError, match="no samples"):
        Weights([[0, 0], [0.5]]).order()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_global_batch_is_the_same_for_any_processes_and_workers(processes, workers):
    expected = [training_batches()[step] for step in STEPS]
    parts = [
        list(loader_module.loader(training_batches(process, processes), STEPS, workers))
        for process in range(processes)
    ]
    for process, part in enumerate(parts):  # pairs stay together: mixup mixes 2i and 2i + 1
        for batch in part:
            assert (batch["positions"] // 2 % processes == process).all()
    for step, whole in zip(STEPS, expected):
        positions = torch.cat([part[step]["positions"] for part in parts])
        assert positions.sort().values.tolist() == list(range(step * 12, step * 12 + 12))
        for name in ("images", "ids", "labels", "weight", "positions"):
            joined = torch.cat([part[step][name] for part in parts])[positions.argsort()]
            assert torch.equal(joined, whole[name]), name


def test_a_batch_is_what_its_keys_say():
    """Each row by the definitions: order, view and patches from (seed, epoch, position)."""
    source, order = Memory(SIZES), data.Order(SIZES, seed=4, lanes=6)
    batches = training_batches()
    for step in (4, 0):  # step 4 runs over the epoch border
        batch = batches[step]
        assert batch["bad"] == [] and batch["weight"].tolist() == [1.0] * 12
        for row, position in enumerate(range(step * 12, step * 12 + 12)):
            keys = 4, position // 50, position
            sample = source.read(order(position))
            bits = data.random_bits(23, *keys, data.VIEW)
            view = data.crop_and_resize(sample["image"](), (8, 12), 3, bits, min_crop=0.2)
            assert torch.equal(batch["images"][row], view)
            assert batch["labels"][row] == sample["class"]
            assert batch["ids"][row].tolist() == data.permutation(6, *keys, data.MASK).tolist()


def test_a_step_does_not_depend_on_the_steps_before():
    for step in reversed(STEPS):
        same_batch(training_batches()[step], training_batches()[step])
    batches = training_batches()
    forwards = [batches[step] for step in STEPS]
    for step in reversed(STEPS):
        same_batch(batches[step], forwards[step])


def test_without_an_order_the_source_comes_once_and_is_padded():
    source = Memory([3, 0, 4, 6])
    centre = [data.crop_and_resize(source.read(i)["image"](), (8, 12), 3) for i in range(13)]
    for processes in (1, 2):
        parts = [
            picture_batches(source, (8, 12), 3, 8, process=process, processes=processes)
            for process in range(processes)
        ]
        assert [len(part) for part in parts] == [2] * processes  # 13 samples, 8 at a time
        batches = [part[step] for part in parts for step in range(2)]
        positions = torch.cat([batch["positions"] for batch in batches])
        sort = positions.argsort()
        assert positions[sort].tolist() == list(range(16))
        labels, weight, images = (
            torch.cat([batch[name] for batch in batches])[sort]
            for name in ("labels", "weight", "images")
        )
        assert labels.tolist() == [*range(13), -1, -1, -1]
        assert weight.tolist() == [1] * 13 + [0] * 3
        assert torch.equal(images[:13], torch.stack(centre)) and not images[13:].any()
        assert all(batch["bad"] == [] for batch in batches)


def test_batches_that_cannot_be_dealt_are_refused_with_the_number_to_use():
    source = Memory([4] * 8)
    with pytest.raises(ValueError, match="multiple of 6") as error:
        picture_batches(source, (8, 8), 3, 8, processes=3)
    one_line(error)
    with pytest.raises(ValueError, match="multiple of 4"):  # divisible, but not in pairs
        picture_batches(source, (8, 8), 3, 6, processes=2)
    with pytest.raises(ValueError, match="--lanes") as error:
        picture_batches(source, (8, 8), 3, 12, order=data.Order(source.sizes), processes=3)
    assert "multiple of 3" in one_line(error)
    with pytest.raises(ValueError, match="channels") as error:
        picture_batches(source, (8, 8), 2, 12)
    one_line(error)


def test_loader_processes_are_as_asked_or_what_is_left_and_bounded(monkeypatch):
    for cores, here, left in ((2, 1, 1), (1, 1, 1), (8, 1, 7), (8, 2, 3), (256, 8, 16)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert loader_module.loader_workers(None, here) == left
        assert [loader_module.loader_workers(asked, here) for asked in (0, 5)] == [0, 5]
        for asked in (-1, 10_000):
            with pytest.raises(ValueError, match="--workers") as error:
                loader_module.loader_workers(asked, here)
            one_line(error)


def test_workers_that_are_spawned_get_the_same_batches(tmp_path):
    """macOS (and Python 3.14 on Linux) sends batches to its workers as a pickle."""
    write_tar(tmp_path / "a.tar", members_of(range(10)))
    write_files(tmp_path / "folder", {f"{i}.png": tile(i) for i in range(10)})
    for where in (tmp_path / "a.tar", tmp_path / "folder", "toy"):
        source = opened(where)
        batches = training_batches(source=source)
        batches[0]  # opens files, fills caches
        same_batch(pickle.loads(pickle.dumps(batches))[1], batches[1])


# ----------------------------------------------------------------------------------------- pictures


def picture_files():
    """{what: (file, the pixels that it shows (H, W, 3), how far off they may be)}."""
    height, width = 16, 24
    rgb = painting(height, width)
    grey = rgb[:, :, 0]
    alpha = np.linspace(0, 255, height * width).astype(np.uint8).reshape(height, width)
    part = alpha[:, :, None] / 255

    def grey3(values):
        return np.repeat(np.asarray(values)[:, :, None], 3, axis=2)

    def on_white(pixels, part):
        return pixels * part + 255 * (1 - part)

    def with_alpha(pixels, mode):
        return Image.fromarray(np.dstack([pixels, alpha]), mode)

    # Four colours in stripes, as a palette picture.
    colours = np.array([(200, 10, 30), (20, 220, 40), (60, 50, 240), (90, 90, 90)], np.uint8)
    numbers = np.arange(height * width, dtype=np.uint8).reshape(height, width) % 4
    palette = Image.fromarray(numbers, "P")
    palette.putpalette(colours.tobytes())
    third_clear = np.where((numbers == 2)[:, :, None], 255, colours[numbers])
    fading = np.array([255, 128, 0, 64])
    fading_part = fading[numbers][:, :, None] / 255
    palette_and_alpha = palette.convert("PA")
    palette_and_alpha.putalpha(Image.fromarray(alpha))
    striped = colours[numbers]

    black = alpha // 2
    cmyk = Image.fromarray(np.dstack([255 - rgb, black]), "CMYK")
    inked = rgb * (1 - black[:, :, None] / 255)

    muted = rgb // 2 + 64  # 8 bits of a and b are coarse, and deep colours are beyond RGB
    deep = np.linspace(0, 65535, height * width).round().astype(np.uint16).reshape(height, width)
    deep_rows = b"".join(
        b"\0" + (row.astype(">u2") * 257).tobytes() for row in rgb.astype(np.uint16)
    )
    bit = (alpha % 3 == 0) * np.uint8(255)
    # A lossy codec may be off by some levels on this smooth picture; everything else by rounding.
    return {
        "PNG": (encoded(rgb), rgb, 0),
        "JPEG": (encoded(rgb, "JPEG", quality=95, subsampling=0), rgb, 8),
        "grey JPEG": (encoded(grey, "JPEG", quality=95), grey3(grey), 8),
        "CMYK JPEG": (encoded(cmyk, "JPEG", quality=95, subsampling=0), inked, 8),
        "WebP": (encoded(rgb, "WEBP", lossless=True), rgb, 0),
        "lossy WebP": (encoded(rgb, "WEBP", quality=95), rgb, 16),
        "BMP": (encoded(rgb, "BMP"), rgb, 0),
        "TIFF": (encoded(rgb, "TIFF"), rgb, 0),
        "GIF": (encoded(palette, "GIF"), striped, 0),
        "grey": (encoded(grey), grey3(grey), 0),
        "1 bit": (encoded(Image.fromarray(bit).convert("1")), grey3(bit), 0),
        "palette": (encoded(palette), striped, 0),
        "palette, one colour clear": (encoded(palette, transparency=2), third_clear, 0),
        "palette with alpha": (
            encoded(palette, transparency=bytes(fading.tolist())),
            on_white(striped, fading_part),
            1,
        ),
        "RGB, one colour clear": (
            encoded(striped, transparency=tuple(colours[2].tolist())),
            third_clear,
            0,
        ),
        "RGBA": (encoded(with_alpha(rgb, "RGBA")), on_white(rgb, part), 1),
        "RGBA WebP": (
            encoded(with_alpha(rgb, "RGBA"), "WEBP", lossless=True, exact=True),
            on_white(rgb, part),
            1,
        ),
        "grey with alpha": (
            encoded(with_alpha(grey, "LA")),
            on_white(grey3(grey), part),
            1,
        ),
        "CMYK TIFF": (encoded(cmyk, "TIFF"), inked, 1),
        "16-bit grey": (encoded(Image.fromarray(deep)), grey3(deep / 257), 1),
        "16-bit grey TIFF": (encoded(Image.fromarray(deep), "TIFF"), grey3(deep / 257), 1),
        "32-bit grey TIFF": (
            encoded(Image.fromarray(deep.astype(np.int32)), "TIFF"),
            grey3(deep / 257),
            1,
        ),
        "16-bit RGB": (handmade_png(width, height, 16, 2, deep_rows), rgb, 1),
        "16-bit grey, one value clear": (
            encoded(Image.fromarray(deep), transparency=int(deep[0, 7])),
            grey3(np.where(deep == deep[0, 7], 255, deep / 257)),
            1,
        ),
        "16-bit grey TIFF, high bytes first": (
            encoded(
                Image.frombytes("I;16B", (width, height), deep.astype(">u2").tobytes()), "TIFF"
            ),
            grey3(deep / 257),
            1,
        ),
        "8-bit grey in a 32-bit TIFF": (
            encoded(Image.fromarray(grey.astype(np.int32)), "TIFF"),
            grey3(grey),
            0,
        ),
        "grey with alpha TIFF": (
            encoded(with_alpha(grey, "LA"), "TIFF"),
            on_white(grey3(grey), part),
            1,
        ),
        "RGBA TIFF": (encoded(with_alpha(rgb, "RGBA"), "TIFF"), on_white(rgb, part), 1),
        "palette TIFF": (encoded(palette, "TIFF"), striped, 0),
        "palette and alpha TIFF": (
            encoded(palette_and_alpha, "TIFF"),
            on_white(striped, part),
            1,
        ),
        "YCbCr TIFF": (encoded(Image.fromarray(rgb).convert("YCbCr"), "TIFF"), rgb, 3),
        "LAB TIFF": (encoded(Image.fromarray(muted).convert("LAB"), "TIFF"), muted, 6),
    }


FILES = picture_files()


@pytest.mark.parametrize("what", FILES)
def test_every_kind_of_picture_shows_what_is_in_it(what):
    """At its own size a picture is not resampled, so the pixels are known."""
    content, expected, tolerance = FILES[what]
    shown = decoded(content, expected.shape[:2], 3)
    assert np.abs(shown - expected).max() <= tolerance
    # The same as grey, by ITU-R 601's luma (each colour may have been off, and one for rounding).
    luma = expected @ [0.299, 0.587, 0.114]
    grey = decoded(content, expected.shape[:2], 1)
    assert np.abs(grey[:, :, 0] - luma).max() <= tolerance + 1


def test_four_channels_keep_the_alpha():
    rgb = painting(16, 24)
    assert (decoded(encoded(rgb), (16, 24), 4) == np.dstack([rgb, np.full((16, 24), 255)])).all()
    rgba = np.dstack([rgb, rgb[:, :, 1]])
    assert (decoded(encoded(rgba), (16, 24), 4) == rgba).all()
    assert decoded(FILES["palette, one colour clear"][0], (16, 24), 4)[:, :, 3].min() == 0
    # What is hidden does not colour what shows beside it: red, fading out, over hidden blue.
    hidden = np.zeros((12, 12, 4), np.uint8)
    hidden[:, :5], hidden[:, 5:] = (250, 0, 0, 255), (0, 0, 250, 0)
    shown = decoded(encoded(hidden), (4, 4), 4)
    seen = shown[shown[:, :, 3] > 0]
    assert len(np.unique(seen[:, 3])) > 1 and (np.abs(seen[:, :3] - [250, 0, 0]) < 8).all()


def test_pictures_in_memory_may_have_modes_that_no_file_has():
    image = Image.fromarray(painting(16, 24)).convert("HSV")
    for channels, mode in ((1, "L"), (3, "RGB"), (4, "RGBA")):
        expected = np.asarray(image.convert("RGB").convert(mode)).reshape(16, 24, channels)
        shown = data.crop_and_resize(image, (16, 24), channels).permute(1, 2, 0)
        assert (shown.numpy() == expected).all()


def test_the_whole_picture_says_how_its_values_are_scaled():
    """Not the crop: the same pixels would have another brightness in another crop."""
    pixels = np.full((8, 16), 200, np.int32)  # the centre crop is of columns 4 to 11
    for corner, expected in ((200, 200), (300, 200 >> 8)):
        pixels[0, 0] = corner
        assert (decoded(encoded(Image.fromarray(pixels), "TIFF"), (8, 8)) == expected).all()
    pixels[0, 0] = 70_000
    with pytest.raises(ValueError, match="from 200 to 70000"):
        decoded(encoded(Image.fromarray(pixels), "TIFF"), (8, 8))


def test_values_that_no_scale_is_known_for_are_refused():
    """A float or a 32-bit picture beyond 16 bits would be clipped: better a bad sample by name."""
    beyond = np.full((4, 4), 70_000, np.int32)
    for pixels in (beyond, -beyond, np.full((4, 4), 0.5, np.float32)):
        with pytest.raises(ValueError, match="mode"):
            decoded(encoded(Image.fromarray(pixels), "TIFF"), (4, 4))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations_are_all_the_same_upright_picture(orientation):
    upright = painting(16, 24)
    content = photo(upright, orientation)
    assert (decoded(content, (16, 24)) == upright).all()
    for position in range(4):  # and their random crops and flips are the same, too
        bits = data.random_bits(23, 0, 0, position, data.VIEW)
        assert (
            decoded(content, (8, 8), 3, bits) == decoded(encoded(upright), (8, 8), 3, bits)
        ).all()


TURNABLE = {"PNG": {}, "TIFF": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}}


def stored_turned(content, orientation):
    """The bytes of a picture file again, stored so that its tag turns it to what it was; None if
    this kind of file has no tag."""
    turn = Image.Transpose.ROTATE_90 if orientation == 6 else Image.Transpose.ROTATE_180
    image, tags = Image.open(io.BytesIO(content)), Image.Exif()
    if image.format not in TURNABLE:
        return None
    tags[274], options = orientation, TURNABLE[image.format]
    options = {name: image.info[name] for name in ("transparency",) if name in image.info} | options
    return encoded(image.transpose(turn), image.format, exif=tags, **options)


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_packed_pictures_of_every_kind_are_those_of_the_folder(tmp_path, orientation, channels):
    """From files and from shards, and from shards scaled down, of which the larger pictures are
    resized by Pillow, and stored as JPEG if nothing in them can be transparent."""
    files = {what: content for what, (content, *_) in FILES.items()}
    if orientation != 1:
        files = {what: stored_turned(content, orientation) for what, content in files.items()}
    kinds = {what: Image.open(io.BytesIO(c)).format for what, c in files.items() if c}
    files = {f"{re.sub('[^a-zA-Z0-9]', '-', w)}.{k.lower()}": files[w] for w, k in kinds.items()}
    assert len(files) == len(kinds)  # no two have the same name
    folder = opened(write_files(tmp_path / "pictures", files))
    for short_side, size in ((None, (16, 24)), (8, (8, 12))):
        pack_module.pack(folder.root, f"{tmp_path}/{short_side}-%d.tar", short_side, shard_size=99)
        shard = opened(f"{tmp_path}/{short_side}-0.tar")
        for number in range(len(files)):
            images = [source.read(number)["image"]() for source in (folder, shard)]
            lossy = images[1].format == "JPEG" and channels > 1  # it stores colours coarsely
            one, two = (data.crop_and_resize(i, size, channels).short() for i in images)
            apart, name = (one - two).abs(), folder.name(number)
            assert apart.max() <= (0 if not short_side else 32 if lossy else 4), name
            assert apart.float().mean() < (8 if lossy else 1), name


@pytest.mark.parametrize("what", [what for what in FILES if "TIFF" in what])
def test_plain_turned_tiffs_are_right_from_a_folder(tmp_path, what):
    """Pillow maps those that it opens by name into memory, with the wrong sides."""
    content, expected, tolerance = FILES[what]
    folder = write_files(tmp_path, {"turned.tiff": stored_turned(content, 6)})
    shown = data.crop_and_resize(opened(folder).read(0)["image"](), (16, 24), 3)
    assert np.abs(shown.permute(1, 2, 0).numpy().astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(orientation):
    upright = painting(16, 24)
    assert (decoded(photo(upright, orientation), (8, 8)) == decoded(encoded(upright), (8, 8))).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_does_not_cost_the_picture(kind):
    upright = painting(16, 24)
    expected = decoded(encoded(upright, kind), (8, 8))
    content = encoded(upright, kind, exif=b"Exif\0\0this is no TIFF header")
    assert (decoded(content, (8, 8)) == expected).all()


@pytest.mark.parametrize("size", [(4, 4), (9, 5), (3, 30)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 1000), (1000, 1), (2, 3)])
def test_tiny_and_extreme_pictures(shape, size):
    flat = np.full((*shape, 3), (10, 130, 250), np.uint8)
    for bits in (None, data.random_bits(23, 0, 0, 0, data.VIEW)):
        for channels, expected in ((3, [10, 130, 250]), (4, [10, 130, 250, 255]), (1, [108])):
            shown = decoded(encoded(flat), size, channels, bits)
            assert (shown == expected).all()  # 0.299 x 10 + 0.587 x 130 + 0.114 x 250 = 107.8


def resized(pixels, height, width):
    """Antialiased bicubic (Keys, a = -0.5) by its definition: across, then down, in float64."""

    def matrix(source, target):
        scale = source / target
        centres = (np.arange(target)[:, None] + 0.5) * scale
        t = np.abs(np.arange(source)[None] + 0.5 - centres) / max(scale, 1)
        near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
        kernel = np.where(t < 1, near, np.where(t < 2, far, 0))
        return kernel / kernel.sum(axis=1, keepdims=True)

    rows, columns = matrix(pixels.shape[0], height), matrix(pixels.shape[1], width)
    across = np.einsum("xj,ijc->ixc", columns, pixels).clip(0, 255)  # bytes in between: clipped
    return np.einsum("yi,ixc->yxc", rows, across).clip(0, 255)


@pytest.mark.parametrize(
    "shape, size, box",  # box: left, top, right, bottom of the largest centred crop, by hand
    [
        ((20, 40), (8, 8), (10, 0, 30, 20)),
        ((40, 20), (8, 8), (0, 10, 20, 30)),
        ((40, 40), (8, 24), (0, 13, 40, 26)),  # height 40 / 3 = 13, (40 - 13) // 2 above
        ((40, 40), (24, 8), (13, 0, 26, 40)),
        ((21, 50), (10, 10), (14, 0, 35, 21)),
        ((6, 6), (16, 16), (0, 0, 6, 6)),  # enlarged
        ((64, 48), (16, 12), (0, 0, 48, 64)),
    ],
)
def test_the_centre_crop_is_pillows_crop_and_a_bicubic_resize(shape, size, box):
    """Rounding to bytes costs half a level after each of two passes, and the second one's negative
    lobes amplify the first to at most 0.7: less than 2."""
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    for pixels in (noise, painting(*shape)):
        crop = np.asarray(Image.fromarray(pixels).crop(box))
        shown = decoded(encoded(pixels), size)
        difference = np.abs(shown - resized(crop, *size))
        assert difference.max() <= 2 and difference.mean() < 0.5


@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_a_large_jpeg_decoded_at_a_fraction_looks_the_same(orientation):
    """The full decode is the same file as PNG. Where the crop's border falls on the smaller decode's
    pixels, only roundings differ (seen: 2 levels). Elsewhere the box moves by up to half a target
    pixel down and across: at most 0.71 of what neighbouring pixels differ by."""
    jpeg = photo(textured(480, 640), orientation, "JPEG", quality=92)
    upright = np.asarray(Image.open(io.BytesIO(jpeg)))
    tags = Image.Exif()
    tags[274] = orientation
    full = encoded(upright, exif=tags)
    views = [None] + [data.random_bits(23, 0, 0, p, data.VIEW) for p in range(4)]
    for size in ((24, 24), (24, 48)):
        for bits in views:
            quick, exact = (decoded(content, size, 3, bits) for content in (jpeg, full))
            moved = np.abs(exact[:, 1:] - exact[:, :-1]).mean()
            assert np.abs(quick - exact).mean() < 0.71 * moved
            if bits is None:  # 480 and 240 are multiples of the shrink factor
                assert np.abs(quick - exact).max() <= 4


def test_the_flip_is_a_flip_and_comes_half_of_the_time():
    content = encoded(painting(16, 24))
    flipped = 0
    for position in range(200):
        bits = data.random_bits(23, 1, 0, position, data.VIEW)
        other = bits.copy()
        other[22] ^= np.uint64(1)
        one, two = (decoded(content, (8, 8), 3, b) for b in (bits, other))
        assert (one == two[:, ::-1]).all() and (one != two).any()
        flipped += (decoded(content, (16, 24), 3, bits, min_crop=1) != painting(16, 24)).any()
    assert abs(flipped - 100) < 5 * math.sqrt(200 / 4)


def test_min_crop_1_takes_the_centre():
    content = encoded(painting(20, 24))
    centre = decoded(content, (8, 8))
    for position in range(10):
        view = decoded(content, (8, 8), 3, data.random_bits(23, 0, 0, position, data.VIEW), 1)
        assert (view == centre).all() or (view == centre[:, ::-1]).all()


def random_boxes(width, height, count, min_crop=0.2, aspect=1.0):
    """(count, 4) of random_box: left, top, width, height."""
    return np.array(
        [
            data.random_box(
                width, height, data.random_bits(23, 2, 0, position, data.VIEW), min_crop, aspect
            )
            for position in range(count)
        ]
    )


@pytest.mark.parametrize("min_crop, aspect", [(0.2, 1.0), (0.08, 1.0), (0.5, 2.0), (0.2, 0.4)])
def test_random_boxes_lie_inside_and_have_the_right_area_and_ratio(min_crop, aspect):
    """Sides are whole pixels: half a pixel of 300 is less than 1 % of the shortest side here."""
    width, height = 400, 300
    left, top, w, h = random_boxes(width, height, 500, min_crop, aspect).T
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + w <= width).all() and (top + h <= height).all()
    # The centre's box, when ten tries failed, is as large as its ratio allows.
    centre = width * height * min(aspect * height / width, width / height / aspect)
    area = w * h / (width * height)
    assert (area > 0.99 * min(min_crop, centre / (width * height))).all() and (area <= 1).all()
    ratio = w / h / aspect
    assert (ratio > 3 / 4 * 0.98).all() and (ratio < 4 / 3 * 1.02).all()


def test_random_boxes_are_uniform_in_area_log_ratio_and_place():
    """In a square, boxes of at most 3/4 of its area fit whatever their ratio, so that below 3/4 no
    try is thrown away and area and log ratio must be uniform; above, the ratio decides."""
    side, count = 2000, 6000
    left, top, w, h = random_boxes(side, side, count).T.astype(np.float64)
    area, log_ratio = w * h / side**2, np.log(w / h) / math.log(4 / 3)
    fits = area < 0.75
    parts = {
        "area": (area[fits] - 0.2) / 0.55,
        "ratio": (log_ratio[fits] + 1) / 2,
        "left": left / (side - w + 1),
        "top": top / (side - h + 1),
    }
    for name, values in parts.items():
        bins = (values * 10).astype(int).clip(0, 9)
        assert chi_square(np.bincount(bins, minlength=10)) < 1, name
    assert area.min() < 0.21 and area.max() > 0.97
    # Independent of each other: 5 standard deviations of a correlation.
    together = np.corrcoef([parts["area"], parts["ratio"], parts["left"][fits], parts["top"][fits]])
    assert np.abs(together - np.eye(4)).max() < 5 / math.sqrt(fits.sum())


def test_random_boxes_reach_every_border():
    left, top, w, h = random_boxes(3, 3, 400).T
    assert {0, 1, 2} == set(left[w == 1].tolist()) == set(top[h == 1].tolist())
    assert {0, 1} == set(left[w == 2].tolist()) == set(top[h == 2].tolist())


@pytest.mark.parametrize(
    "width, height, aspect, centre",
    [
        (1, 1000, 1.0, (0, 499, 1, 1)),
        (1000, 1, 1.0, (499, 0, 1, 1)),
        (1000, 30, 0.5, (492, 0, 15, 30)),
    ],
)
def test_extreme_pictures_fall_back_to_the_centre(width, height, aspect, centre):
    assert (random_boxes(width, height, 20, 0.2, aspect) == centre).all()


# --------------------------------------------------------------------------------------- normalize


@pytest.mark.parametrize("channels", [1, 3, 4, 10])
def test_normalize_is_the_formula(channels):
    """float32 has 24 bits and values stay below 3: a few roundings are less than 1e-6."""
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, channels, 1, 1)
    images[1] = images[1].flip(1)
    normal = data.normalize(images)
    assert normal.dtype == torch.float32 and normal.shape == images.shape
    rgb = [(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]
    grey = ((0.485 + 0.456 + 0.406) / 3, (0.229 + 0.224 + 0.225) / 3)
    statistics = rgb + [grey] * (channels - 3) if channels >= 3 else [grey] * channels
    for channel, (mean, deviation) in enumerate(statistics):
        expected = (images[:, channel].double() / 255 - mean) / deviation
        assert (normal[:, channel].double() - expected).abs().max() < 1e-6


# ---------------------------------------------------------------------------------------- bad input


def compare_with_bad(good, bad, names):
    """Batches of two sources that differ only in samples that one of them cannot read.

    names: a part of each bad sample's line. Checks a training step and plain reading.
    """
    order = [data.Order(source.sizes, seed=1, lanes=1) for source in (good, bad)]
    count = int(good.sizes.sum())
    for orders in (order, (None, None)):
        expected, batch = (
            picture_batches(source, (8, 8), 3, count, order=o, seed=1, num_patches=4)[0]
            for source, o in zip((good, bad), orders)
        )
        broken = batch["weight"] == 0
        assert broken.sum() == len(names) and (batch["weight"][~broken] == 1).all()
        assert not batch["images"][broken].any() and (batch["labels"][broken] == -1).all()
        for name in ("images", "labels", "weight"):
            assert torch.equal(batch[name][~broken], expected[name][~broken]), name
        assert torch.equal(batch["ids"], expected["ids"])
        assert torch.equal(batch["positions"], expected["positions"])
        assert (expected["weight"] == 1).all() and expected["bad"] == []
        assert len(batch["bad"]) == len(names)
        for name in names:
            (line,) = [line for line in batch["bad"] if name in line]
            assert re.search(re.escape(name) + ": .+", line) and "\n" not in line


BOMB = handmade_png(30_000, 30_000, 8, 2, bytes(1000))  # 2.7 GB if anyone believed its header


def test_bad_files_in_a_folder_keep_their_positions(tmp_path):
    fine = {f"{kind}/{i}.jpg": encoded(painting(12, 20), "JPEG") for i in range(6) for kind in "ab"}
    jpeg, png = encoded(painting(200, 200), "JPEG"), encoded(painting(64, 64))
    broken = {
        "a/truncated.jpg": jpeg[: len(jpeg) // 2],
        "a/only-the-header.jpg": jpeg[:200],
        "a/truncated.png": png[: len(png) // 2],
        "b/empty.jpg": b"",
        "b/text.jpg": b"this is not a picture",
        "b/bomb.png": BOMB,
    }
    whole = {name: tile(i) for i, name in enumerate([*broken, "b/gone.jpg"])}
    good = opened(write_files(tmp_path / "good", fine | whole))
    folder = write_files(tmp_path / "bad", fine | broken)
    os.symlink("/no/such/file", f"{folder}/b/gone.jpg")
    bad = opened(folder)
    names = [f"{folder}/{name}" for name in whole]
    compare_with_bad(good, bad, names)
    batch = picture_batches(bad, (8, 8), 3, 19)[0]
    (line,) = [line for line in batch["bad"] if "bomb" in line]
    assert "DecompressionBomb" in line  # refused by its header, before memory is asked for


def test_the_limit_of_pixels_holds_for_all_that_is_read_and_in_spawned_workers(
    tmp_path, monkeypatch
):
    """10 x 10 pixels are over the limit of 40 (at more than twice as many Pillow raises whatever
    the filter of warnings, which pytest takes away)."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", data.MAX_PIXELS)
    content = {"small.png": painting(5, 8), "large.png": painting(10, 10)}
    files = {name: encoded(pixels) for name, pixels in content.items()}
    folder = opened(write_files(tmp_path / "folder", files))
    shard = opened(write_tar(tmp_path / "a.tar", files.items()))
    for source in (folder, shard):
        batches = picture_batches(source, (4, 4), 3, 2)
        for limit, bad in ((40, 1), (100, 0)):
            data.limit_pixels(limit)
            assert len(batches[0]["bad"]) == bad
            loader = loader_module.loader(batches, range(1), 1)
            loader.multiprocessing_context = "spawn"
            (batch,) = loader
            assert batch["weight"].sum() == 2 - bad
            for line in batch["bad"]:
                assert "large" in line
                assert line.endswith("100 pixels are over --max-pixels 40")
    data.limit_pixels(40)
    write_files(tmp_path / "frames", {f"{i}.png": files["large.png"] for i in range(2)})
    with pytest.raises(Image.DecompressionBombError):
        video_module.open_video(str(tmp_path / "frames")).read([0])


def test_bad_members_of_a_shard_keep_their_positions(tmp_path):
    def members(changes):
        for name, content in members_of(range(12)):
            yield name, changes.get(name, content)

    broken = {
        "00002.png": tile(2)[:40] + bytes(len(tile(2)) - 40),
        "00004.png": b"",
        "00008.cls": b"9" * 30,  # a number, but none that fits
        "00009.png": BOMB,
    }
    good, bad = f"{tmp_path}/good-000.tar", f"{tmp_path}/bad-000.tar"
    write_tar(good, members({}))
    write_tar(bad, members(broken))
    keys = sorted({name[:5] for name in broken})
    sources = opened(good), opened(bad)
    compare_with_bad(*sources, [f"{bad}:{key}" for key in keys])


def test_a_missing_or_unreadable_label_is_unknown_and_not_bad(tmp_path):
    texts = {"00003.cls": b"cat", "00004.cls": b"", "00005.cls": b"-7"}
    members = [(n, texts.get(n, c)) for n, c in members_of(range(6)) if n != "00002.cls"]
    source = opened(write_tar(tmp_path / "a.tar", members))
    batch = picture_batches(source, (4, 4), 3, 6)[0]
    assert batch["labels"].tolist() == [0, 1, -1, -1, -1, -1]
    assert batch["weight"].tolist() == [1] * 6


def test_a_tar_that_is_cut_gives_the_samples_before_the_cut(tmp_path, capsys):
    whole, cut = (write_tar(tmp_path / name, members_of(range(12))) for name in ("a.tar", "b.tar"))
    with tarfile.open(whole) as tar:
        member = tar.getmember("00007.png")
    os.truncate(cut, member.offset_data + member.size // 2)  # in the middle of a picture
    expected, batch = (picture_batches(opened(path), (4, 4), 3, 12)[0] for path in (whole, cut))
    assert "cut" in capsys.readouterr().err
    assert batch["weight"].tolist() == [1] * 7 + [0] * 5
    assert torch.equal(batch["images"][:7], expected["images"][:7])
    assert batch["labels"].tolist() == [*range(7), -1, -1, -1, -1, -1]
    (line,) = batch["bad"]
    assert line.startswith(f"{cut}:00007: ")
    os.truncate(cut, member.offset)  # between two files
    assert opened(cut).sizes.tolist() == [7] and "cut" in capsys.readouterr().err


def test_a_label_that_is_cut_is_not_taken_for_another(tmp_path):
    members = [("a.cls", b"12"), ("a.png", tile(0)), ("b.png", tile(1)), ("b.cls", b"12")]
    path = write_tar(tmp_path / "a.tar", members)
    with tarfile.open(path) as tar:
        offset = tar.getmember("b.cls").offset_data
    os.truncate(path, offset + 1)  # a 1 is left of it
    batch = picture_batches(opened(path), (4, 4), 3, 2)[0]
    assert batch["labels"].tolist() == [12, -1] and batch["weight"].tolist() == [1, 0]


def test_a_damaged_header_is_said_and_gives_the_samples_before_it(tmp_path, capsys):
    path = write_tar(tmp_path / "a.tar", members_of(range(12)))
    with tarfile.open(path) as tar:
        header = tar.getmember("00007.png").offset
    with open(path, "r+b") as file:
        file.seek(header)
        file.write(b"\xff" * 512)
    source = opened(path)
    assert source.sizes.tolist() == [7] and len(everything(source)) == 7
    assert f"byte {header}" in capsys.readouterr().err
    whole = write_tar(tmp_path / "whole.tar", members_of(range(12)))
    opened(whole)
    assert capsys.readouterr() == ("", "")  # nothing is said of a tar in order


def test_whatever_a_decoder_raises_is_one_line():
    errors = {1: RuntimeError("two\nlines"), 2: MemoryError(), 5: KeyError("image")}

    class Raising(Memory):
        def read(self, number):
            sample = super().read(number)
            if sample["class"] == 3:
                sample.pop("image")
            if sample["class"] == 4:
                sample.pop("class")
            if sample["class"] in errors:
                raise errors[sample["class"]]
            return sample

    batch = picture_batches(Raising([8]), (8, 8), 3, 8)[0]
    assert batch["weight"].tolist() == [1, 0, 0, 0, 0, 0, 1, 1]
    assert not batch["images"][1:6].any() and batch["labels"][1:6].tolist() == [-1] * 5
    starts = [f"memory:{i}: {name}" for i, name in enumerate("RMKKK", start=1)]
    assert [line[: len(start)] for line, start in zip(batch["bad"], starts)] == starts
    assert all("\n" not in line for line in batch["bad"])


@pytest.mark.parametrize("read_before", [False, True])
def test_a_shard_that_changes_under_an_open_source_is_not_fatal(tmp_path, read_before):
    changes = {
        "cut": (lambda path: os.truncate(path, 3000), 3),  # in the second of four samples
        "empty": (lambda path: os.truncate(path, 0), 4),
        "zeros": (lambda path: Path(path).write_bytes(bytes(20_480)), 4),
        "gone": (os.remove, 0 if read_before else 4),  # an open file outlives its name
    }
    for name, (change, bad) in changes.items():
        path = write_tar(tmp_path / f"{name}.tar", members_of(range(4)))
        batches = picture_batches(opened(path), (4, 4), 3, 4)
        if read_before:
            assert batches[0]["bad"] == []
        change(path)
        batch = batches[0]
        assert batch["weight"].tolist() == [1] * (4 - bad) + [0] * bad, name
        assert len(batch["bad"]) == bad
        assert all(line.startswith(path) for line in batch["bad"])


# ------------------------------------------------------------------------------------------ sources


def test_a_flat_folder_has_no_classes(tmp_path):
    names = ["a.jpg", "B.JPG", "c.Png", "d.webp", "e.jpeg", "f.tiff"]
    ignored = [".hidden.jpg", "notes.txt", "jpg", "x.jpg.part", ".thumbnails/a.jpg"]
    folder = write_files(tmp_path, {name: tile(i) for i, name in enumerate(names + ignored)})
    source = opened(folder)
    assert source.classes is None and source.sizes.sum() == len(names)
    found = everything(source)
    assert sorted(name for name, _, _ in found) == sorted(f"{folder}/{name}" for name in names)
    assert {label for _, label, _ in found} == {-1}
    assert data.open_sources(folder)[1] is None
    assert everything(opened(folder + "/")) == found


def test_pictures_beside_class_folders_mean_no_classes(tmp_path):
    names = ["cat/a.png", "dog/b.png", "c.png", "one/two/three.png"]
    source = opened(write_files(tmp_path, {name: tile(1) for name in names}))
    assert source.classes is None and len(everything(source)) == 4


def test_class_folders_are_the_first_level(tmp_path):
    names = ["dog/a.png", "cat/deep/deeper/b.png", "cat/c.png", "emu/d.png", "dog/a/a.png"]
    folder = write_files(tmp_path, {name: tile(i) for i, name in enumerate(names)})
    source = opened(folder)
    assert source.classes == ["cat", "dog", "emu"]
    labels = {os.path.relpath(name, folder): label for name, label, _ in everything(source)}
    assert labels == dict(zip(names, [1, 0, 0, 2, 1]))


def test_names_that_are_numbers_are_classes_in_the_order_of_numbers(tmp_path):
    """As ImageNetV2's folders 0 to 999. Beside others they are in the order of texts, as before:
    runs that began with them go on."""
    by_text = ["0", "1", "10", "11", *"23456789"]
    folder = write_files(tmp_path / "a", {f"{name}/a.png": tile(1) for name in by_text})
    source = opened(folder)
    assert source.classes == [str(i) for i in range(12)]
    assert {f"{label}/a.png": label for label in range(12)} == relative_labels(source, folder)
    for i, names in enumerate(
        (
            ["18-25", "30", "4", "60"],
            ["10", "2", "x"],
            ["01", "1", "10", "2", "\u00b2"],  # a superscript 2 is no number
        )
    ):
        folder = write_files(tmp_path / f"b{i}", {f"{name}/a.png": tile(1) for name in names})
        assert opened(folder).classes == names
    folder = write_files(tmp_path / "c", {f"{name}/a.png": tile(1) for name in ("1", "10", "01")})
    assert opened(folder).classes == ["01", "1", "10"]


def test_the_order_of_a_folder_is_mixed_and_depends_on_the_paths_alone(tmp_path):
    names = [f"{kind}/{i:03}.png" for kind in ("cat", "dog") for i in range(100)]
    one = write_files(tmp_path / "one", {name: tile(0) for name in names})
    two = write_files(tmp_path / "elsewhere" / "two", {name: tile(1) for name in names[::-1]})
    orders = []
    for folder in (one, two):
        samples = everything(opened(folder))
        orders.append([os.path.relpath(name, folder) for name, _, _ in samples])
        half = sum(label for _, label, _ in samples[:100])
        assert abs(half - 50) < 5 * 3.54  # 5 sigma of drawing 100 of 200 without replacement
    assert orders[0] == orders[1] and sorted(orders[0]) == names


@pytest.mark.parametrize("named", [False, True])
def test_train_and_val_of_a_folder_share_their_classes(tmp_path, named):
    """Found as train/ and val/ of one folder, or named as --data and --val-data."""
    names = ["train/cat/a.png", "train/dog/b.png", "train/emu/c.png", "val/dog/d.png"]
    folder = write_files(tmp_path, {name: tile(i) for i, name in enumerate(names)})
    flags = (f"{folder}/train", f"{folder}/val") if named else (folder,)
    train, val = data.open_sources(*flags)
    assert train.classes == val.classes == ["cat", "dog", "emu"] and train.sizes.sum() == 3
    assert relative_labels(val, folder) == {"val/dog/d.png": 1}
    write_files(folder, {"val/emu/e.png": tile(4)})
    _, val = data.open_sources(*flags)
    assert relative_labels(val, folder) == {"val/dog/d.png": 1, "val/emu/e.png": 2}
    write_files(folder, {"val/yak/f.png": tile(5)})
    with pytest.raises(ValueError, match="yak") as error:
        data.open_sources(*flags)
    one_line(error)


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val", "test"),
        ("train", "valid", "test"),  # of Roboflow and ultralytics
        ("training", "validation", "testing"),
        ("Train", "VAL", "Test"),
        ("train", "valid", None),
        ("train", None, "test"),
    ],
)
@pytest.mark.parametrize("videos", [False, True])
def test_folders_of_splits_are_known_by_their_usual_names(tmp_path, capsys, names, videos):
    """And test is never trained on, nor measured on without --val-data."""
    train, val, test = names
    files = {f"{split}/{kind}/{i}/{split}.png": tile(i) for split in names if split
             for kind in ("cat", "dog") for i in range(2)}  # fmt: skip
    folder = write_files(tmp_path / "pets", files | {"notes/readme.txt": b"hello"})
    opened = data.open_sources(folder, videos=videos)
    assert [source and source.root for source in opened] == [
        f"{folder}/{train}",
        val and f"{folder}/{val}",
    ]
    for source in filter(None, opened):
        assert source.classes == ["cat", "dog"] and source.sizes.sum() == 4
    left_out = f"{folder}/{test}: left out (to measure on it, give it as --val-data)\n"
    assert capsys.readouterr().out == (left_out if test else "")
    if test:
        measured = data.open_sources(folder, f"{folder}/{test}", videos=videos)[1]
        assert measured.root == f"{folder}/{test}" and measured.sizes.sum() == 4


@pytest.mark.parametrize(
    "names, said",
    [
        (
            ("train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/dog/d.png", "emu/e.png"),
            "the splits train, val beside emu: type --data {0}/train --val-data {0}/val, or move",
        ),
        (("train/cat/a.png", "emu/b.png"), "splits train beside emu: type --data {0}/train, or"),
        (
            ("cat/a.png", "dog/b.png", "Test/c.png"),
            "beside cat, dog: type --val-data {0}/Test beside a --data to train on, or move",
        ),
        (
            ("a.png", "b.png", "test/c.png"),
            "test beside a.png, b.png: type --val-data {0}/test beside a --data to train on",
        ),
        (
            ("test/cat/a.png", "test/dog/a.png"),
            "the splits test: type --val-data {0}/test beside a --data to train on",
        ),
        (
            ("valid/a.png", "test/b.png"),
            "the splits valid, test: type --val-data {0}/valid beside a --data to train on",
        ),
        (
            ("train/a/a.png", "val/a/a.png", "valid/a/a.png"),
            "the splits train, val, valid: type --data {0}/train --val-data {0}/val",
        ),
        (("train/a.png", "training/a.png"), "train, training: type --data {0}/train"),
    ],
)
def test_splits_beside_classes_are_refused_with_the_line_to_type(tmp_path, names, said):
    folder = write_files(tmp_path / "mixed", {name: tile(1) for name in names})
    for videos in (False, True):
        with pytest.raises(ValueError) as error:
            data.open_sources(folder, videos=videos)
        assert said.format(folder) in one_line(error)
    with pytest.raises(ValueError, match="one after the other") as error:
        pack_module.pack(folder, f"{tmp_path}/out/p-%d.tar")
    first = re.findall(r"\{0\}/(\w+)", said)[-1]
    assert f"{folder}/{first}" in one_line(error) and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="give one of its folders as --val-data") as error:
        data.open_sources("toy", folder)
    one_line(error)


def test_a_line_that_a_refusal_says_can_be_typed(tmp_path):
    names = ["train/cat/a.png", "train/test/b.png", "val/cat/c.png", "val/test/d.png", "x/e.png"]
    folder = write_files(tmp_path / "my pets", {name: tile(i) for i, name in enumerate(names)})
    with pytest.raises(ValueError) as error:
        data.open_sources(folder)
    typed = shlex.split(re.search("type (.*), or", str(error.value))[1])
    assert typed == ["--data", f"{folder}/train", "--val-data", f"{folder}/val"]


def test_looking_for_splits_costs_the_same_for_any_number_of_pictures(tmp_path, monkeypatch):
    """No look at each picture of a flat folder: there are millions, on a network."""
    calls = Counter()

    def counted(name, function):
        def call(*arguments, **options):
            calls[name] += 1
            return function(*arguments, **options)

        return call

    for place in ("", "train/"):
        found = []
        for count in (3, 60):
            files = {f"{place}{i}.png": b"" for i in range(count)}
            folder = write_files(tmp_path / f"{place}{count}", files)
            with monkeypatch.context() as patch:
                for name in ("stat", "lstat"):
                    patch.setattr(os, name, counted(name, getattr(os, name)))
                patch.setattr(os.path, "isdir", counted("isdir", os.path.isdir))
                assert labels_module.find_splits(folder) == {}
            found.append(dict(calls))
            calls.clear()
        assert found[0] == found[1]


def test_folders_that_are_no_splits(tmp_path, monkeypatch, capsys):
    """A class of vehicles; train/ alone; folders without pictures, hidden or that nobody may read;
    and what the pictures' labels or the chosen folder decide."""
    names = ["bus/a.png", "train/b.png", "boat/c.png"]
    folder = write_files(tmp_path / "vehicles", {name: tile(i) for i, name in enumerate(names)})
    assert opened(folder).classes == ["boat", "bus", "train"]
    pack_module.pack(folder, f"{tmp_path}/out/p-%d.tar")
    assert opened(f"{tmp_path}/out/p-*.tar").classes == ["boat", "bus", "train"]
    files = {"train/cat/a.png": tile(1), "train/dog/b.png": tile(2), ".test/c.png": tile(3)}
    folder = write_files(tmp_path / "alone", files | {"labels/train/a.txt": b"0"})
    source, val = data.open_sources(folder)
    assert source.sizes.sum() == 2 and source.classes is val is None
    # As before there were names of splits: checkpoints of runs hold it.
    assert source.identity == "2 pictures, a476d200ab2586d6"
    files = {"train/test/a.png": tile(1), "train/val/b.png": tile(2), "val/test/c.png": tile(3)}
    folder = write_files(tmp_path / "inside", files | {"lost+found/d.png": tile(4)})
    scandir = os.scandir

    def unreadable(path):
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", unreadable)
    train, val = data.open_sources(folder)
    assert train.classes == val.classes == ["test", "val"] and val.sizes.sum() == 1
    monkeypatch.undo()
    labels = tmp_path / "labels.csv"
    labels.write_text("train/test/a.png,x\nval/test/c.png,y\n")
    source, _ = data.open_sources(folder, labels=str(labels))
    assert source.classes == ["x", "y"]
    capsys.readouterr()
    write_files(folder, {"stray.png": tile(5)})
    shutil.rmtree(f"{folder}/lost+found")
    assert data.open_sources(folder)[0].sizes.sum() == 2
    line = "1 files beside the folders of its splits are left out\n"
    assert capsys.readouterr().out.endswith(line)


def test_val_data_takes_the_place_of_a_folders_own_val(tmp_path):
    names = ["train/cat/a.png", "train/dog/b.png", "val/dog/c.png", "val/cat/d.png"]
    folder = write_files(tmp_path / "pets", {name: tile(i) for i, name in enumerate(names)})
    other = write_files(tmp_path / "other", {"dog/e.png": tile(5), "cat/f.png": tile(6)})
    train, val = data.open_sources(folder, other)
    assert relative_labels(train, folder) == {"train/cat/a.png": 0, "train/dog/b.png": 1}
    assert relative_labels(val, other) == {"cat/f.png": 0, "dog/e.png": 1}


def test_val_shards_with_other_class_numbers_are_refused(tmp_path):
    """Packed on their own, so that their dog is class 0 and train's is class 1."""
    train = {f"{kind}/{i}.png": tile(i) for kind in ("cat", "dog", "emu") for i in range(2)}
    val = {f"{kind}/{i}.png": tile(i) for kind in ("dog", "emu") for i in range(2)}
    for name, files in (("train", train), ("val", val)):
        folder = write_files(tmp_path / name, files)
        pack_module.pack(folder, f"{tmp_path}/{name}-shards/s-%d.tar", shard_size=9)
    for where in ("train", "train-shards/s-0.tar"):
        with pytest.raises(ValueError, match="class") as error:
            data.open_sources(f"{tmp_path}/{where}", f"{tmp_path}/val-shards/s-0.tar")
        one_line(error)


def test_toy_has_both_splits_and_no_number_in_common():
    train, val = data.open_sources("toy", size=(30, 48))
    assert train.classes == val.classes and len(train.classes) == 10
    numbers = [
        {int(source.name(i).split(":")[1]) for i in range(source.sizes.sum())}
        for source in (train, val)
    ]
    assert len(numbers[0]) == train.sizes.sum() and not numbers[0] & numbers[1]
    sample = val.read(3)
    assert min(sample["image"]().size) >= 48 and 0 <= sample["class"] < 10
    number = int(val.name(3).split(":")[1])
    assert sample["captions"]() == toy.toy_sample(number)["captions"]()


@pytest.mark.parametrize(
    "where, expected",
    [
        ("missing", "does not exist"),
        ("missing.tar", "missing.tar"),
        ("empty", "no pictures"),
        ("notes.txt", "not a folder or a .tar"),
        ("text.tar", "text.tar"),
        ("nothing.tar", "nothing.tar"),
        ("none-*.tar", "no shard matches"),
        ("a-{000..003}.tar", "a-002.tar"),
        ("a-{000,007}.tar", "a-007.tar"),
        ("a-{3..1}.tar", "a-{3..1}.tar"),
        ("texts.tar", "no pictures"),
        ("", "does not exist"),
    ],
)
def test_wrong_data_is_one_line_that_names_it(tmp_path, monkeypatch, where, expected):
    monkeypatch.chdir(tmp_path)
    write_files(".", {"notes.txt": b"hello", "text.tar": b"no tar " * 500, "nothing.tar": b""})
    os.mkdir("empty")
    for number in (0, 1, 3):
        write_tar(f"a-{number:03}.tar", members_of([number]))
    write_tar("texts.tar", [("a.txt", b"hello"), ("b.json", b"{}")])
    with pytest.raises(ValueError) as error:
        opened(where)
    assert expected in one_line(error)


def test_globs_braces_and_commas_expand_in_order(tmp_path):
    for name in ("a-08", "a-09", "a-10", "a-11", "b-1", "c"):
        write_tar(tmp_path / f"{name}.tar", members_of([0]))

    def names(pattern):
        return [os.path.basename(path)[:-4] for path in opened(f"{tmp_path}/{pattern}").paths]

    for _ in range(2):  # the second time beside the index files
        assert names("a-*.tar") == ["a-08", "a-09", "a-10", "a-11"]
        assert names("a-{09..11}.tar") == ["a-09", "a-10", "a-11"]
        assert names("a-{10,08}.tar") == ["a-10", "a-08"]
        assert names("{a-0[89],c}.tar") == ["a-08", "a-09", "c"]
        assert names("c.tar") == ["c"]
        assert names("a-*") == ["a-08", "a-09", "a-10", "a-11"]  # not what lies beside them


def test_a_missing_shard_is_said_in_any_folder(tmp_path):
    for name in ODD_NAMES:
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "a-0.tar", members_of([0]))
        for pattern in ("a-{0..1}.tar", "a-1.tar"):
            with pytest.raises(ValueError, match="there is no shard .*a-1.tar"):
                opened(tmp_path / name / pattern)


def odd_photos(folder, name):
    """Four pictures in two classes, in folders and files of odd names."""
    files = {f"{kind}/{name} {i}.png": tile(i) for kind in (name, "plain") for i in range(2)}
    return write_files(folder / "photos", files), files


@pytest.mark.parametrize("name, match", ODD_NAMES.items())
def test_what_exists_as_it_is_written_is_no_pattern(tmp_path, monkeypatch, capsys, name, match):
    """Pictures, shards and indexes, beside what the name would match as a pattern."""
    folder, other = tmp_path / name, tmp_path / match
    photos = opened(odd_photos(folder, name)[0])
    assert photos.sizes.sum() == 4 and photos.classes == sorted([name, "plain"])
    command = ["pack", folder / "photos", folder / "p-%d.tar", "--shard-size"]
    assert run_main(monkeypatch, *command, 1) == 0
    (where,) = shlex.split(capsys.readouterr().out.split("--data ")[1])
    assert run_main(monkeypatch, *command, 2) == 2  # it sees what is there
    assert run_main(monkeypatch, *command, 1) == 0
    other.mkdir()
    for number in range(9):
        write_tar(other / f"p-{number}.tar", members_of(range(30)))
    expected = [sample[1:] for sample in everything(photos)]
    assert [sample[1:] for sample in everything(opened(where))] == expected
    patterns = {"p-{0..3}.tar": 4, "p-*.tar": 4, "p-?.tar": 4, "p-[12].tar": 2, "{p-0,p-3}.tar": 2}
    for pattern, count in (patterns | {"p-1.tar": 1}).items():
        assert opened(folder / pattern).sizes.tolist() == [1] * count
    shutil.copy(folder / "p-0.tar", folder / f"{name}.tar")
    assert opened(folder / f"{name}.tar").sizes.tolist() == [1]  # a file, too
    assert run_main(monkeypatch, "index", folder / "p-*.tar") == 0
    assert len(json.loads((folder / "index.json").read_text())["shards"]) == 4


@pytest.mark.parametrize("name", ODD_NAMES)
def test_labels_and_tags_may_have_odd_names(tmp_path, name):
    photos, files = odd_photos(tmp_path / name, name)
    entries = [{"path": path, "class": "x", "hashtags": ["#a", "#b"]} for path in files]
    jsonl, csv = (tmp_path / name / f"{name}.{kind}" for kind in ("jsonl", "csv"))
    jsonl.write_text("\n".join(map(json.dumps, entries)))
    csv.write_text("\n".join(f'"{path}",x' for path in files))
    for labels in (csv, jsonl):
        source = data.open_sources(photos, labels=str(labels))[0]
        assert sorted(source.paths) == sorted(files) and len(everything(source)) == 4
    hashtags.write_hashtags(source, tmp_path / name / "tags", min_count=1)
    assert len(hashtags.open_hashtags(source, str(tmp_path / name / "tags"))[0]) == 2


def test_patterns_of_folders_go_on_working(tmp_path):
    for name in ("d-1", "d-2", "d-3"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "a.tar", members_of([0]))
    patterns = {"d-[12]/*": 2, "d-?/a.tar": 3, "{d-1,d-3}/a.tar": 2, "*/a.tar": 3}
    for pattern, count in patterns.items():
        assert len(opened(tmp_path / pattern).paths) == count
    assert opened(tmp_path / "{d-1/a,d-2/a}.tar").sizes.sum() == 2  # braces across a /
    for missing in ("d-[89]/a.tar", "d [v2]", "none/*.tar"):
        with pytest.raises(ValueError, match="no shard matches"):
            opened(tmp_path / missing)
    write_files(tmp_path, {"notes [v2]": b"hello"})
    with pytest.raises(ValueError, match="is not a folder or a .tar"):
        opened(tmp_path / "notes [v2]")


# ------------------------------------------------------------------------------------------- shards


def by_tarfile(path):
    """[(key, class, pixels)] of the samples of a shard that have a picture, by Python's tarfile."""
    samples = {}
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            folder, base = os.path.split(member.name)
            key, _, kind = base.partition(".")
            if member.isfile() and key:
                sample = samples.setdefault(os.path.join(folder, key), {})
                sample[kind] = tar.extractfile(member).read()
    found = []
    for key, files in samples.items():
        pictures = [content for kind, content in files.items() if kind.lower().endswith("png")]
        if pictures:
            pixels = np.asarray(Image.open(io.BytesIO(pictures[0])).convert("RGB")).tolist()
            found.append((f"{path}:{key}", int(files.get("cls", -1)), pixels))
    return found


STRANGE = {
    "ustar": ["plain", "d/e/nested", "d" * 90 + "/" + "n" * 60, "größe/日本"],
    "gnu": ["plain", "n" * 120, "d" * 200 + "/" + "n" * 200, "ö" * 70 + "/" + "日" * 90],
    "pax": ["plain", "n" * 120, "d" * 200 + "/" + "n" * 200, "ö" * 70 + "/" + "日" * 90],
}


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("kind", STRANGE)
def test_shards_hold_what_tarfile_finds(tmp_path, capsys, kind):
    members = [("d/", b""), ("d/e/", b"")]
    for number, key in enumerate([*STRANGE[kind], "last"]):
        members += [(f"{key}.png", tile(number)), (f"{key}.cls", str(number).encode())]
        members += [(f"{key}.json", b"{}")]
        if number == 1:
            members += [("notes.txt", b"hello"), ("folder.png/", b""), ("only.json", b"{}")]
            members += [(".hidden.png", tile(99)), ("folder/.cls", b"3"), ("README", b"none")]
            members += [("label-first.cls", b"8\n"), ("label-first.png", tile(50))]
            members += [("no-label.PNG", tile(51)), ("many.dots.in.it.png", tile(52))]
    path = write_tar(tmp_path / "a.tar", members, format=FORMATS[kind])
    expected = by_tarfile(path)
    assert len(expected) == len(STRANGE[kind]) + 4
    source = opened(path)
    assert everything(source) == expected
    assert "left out" in capsys.readouterr().err
    assert everything(opened(path)) == expected  # and from the index


def test_extensions_in_a_shard_count_in_any_case(tmp_path):
    facts = {"JSON": b'{"hashtags": ["#a"]}', "TXT": b"a text", "CLS": b"3"}
    upper = [("0.JPG", encoded(painting(8, 8), "JPEG")), *((f"0.{k}", v) for k, v in facts.items())]
    mixed = [("1.Txt", b"we like #b"), ("1.Cls", b"4"), ("1.pNg", tile(1))]
    twice = [("2.PNG", tile(2)), ("2.png", tile(3)), ("2.CLS", b"5"), ("2.cls", b"6")]  # the first
    path = write_tar(tmp_path / "a.TAR", upper + mixed + twice)
    os.link(path, tmp_path / "a.tar")
    pack_module.write_listing(shards_module.Shards(f"{tmp_path}/a.tar"))
    for where in (path, f"{tmp_path}/*.TAR", f"pipe:cat {tmp_path}/a.tar"):
        source, _ = data.open_sources(where, cache=(f"{tmp_path}/cache", "1M"))
        found = [source.read(number) for number in range(int(source.sizes.sum()))]
        assert [sample["class"] for sample in found] == [3, 4, 5]
        assert [sample["captions"]() for sample in found] == [["a text"], ["we like #b"], []]
        tags = [hashtags.canonical(sample["hashtags"](), {}) for sample in found]
        assert tags == [{"a"}, {"b"}, set()]
        assert found[0]["image"]().format == "JPEG"
        shown = [np.asarray(sample["image"]()) for sample in found[1:]]
        expected = [np.asarray(Image.open(io.BytesIO(tile(number)))) for number in (1, 2)]
        assert np.array_equal(shown, expected)


def test_extensions_of_lists_count_in_any_case(tmp_path):
    folder = write_files(tmp_path / "p", {"a.png": tile(0), "b.png": tile(1)})
    contents = {"l.CSV": "path,class\na.png,cat\nb.png,dog\n"}
    contents["l.JSONL"] = '{"path": "a.png", "class": "cat"}\n{"path": "b.png", "class": "dog"}\n'
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        source, _ = data.open_sources(folder, labels=str(tmp_path / name))
        assert source.classes == ["cat", "dog"]


def grey_png(value):
    return encoded(np.full((4, 4), value, "u1"))


# {extension: grey value} of a sample in this order -> (the picture's value, the frames' values,
# whether the choice is said).
SEVERAL = {
    "depth": ({"depth.png": 1, "png": 2, "mask.png": 3}, 2, [2], False),
    "capitals": ({"Depth.PNG": 1, "PNG": 2}, 2, [2], False),
    "one with dots": ({"x.y.png": 1}, 1, [1], False),
    "two plain": ({"webp": 1, "png": 2}, 1, [1], True),
    "two plain, one not": ({"depth.png": 1, "png": 2, "webp": 3}, 2, [2], True),
    "capitals of the same": ({"PNG": 1, "png": 2}, 1, [1], True),
    "frames": ({"10.png": 1, "9.png": 2, "0.png": 3}, 1, [3, 2, 1], True),
    "frames, masks": ({"0.mask.png": 1, "0.png": 2, "1.mask.png": 3, "1.png": 4}, 2, [2, 4], True),
    "frames and a cover": ({"0.png": 1, "1.png": 2, "png": 3}, 3, [1, 2], True),
    "a frame and its depth": ({"0.depth.png": 1, "0.png": 2}, 2, [2], False),
    "none is plain": ({"b.png": 1, "a.png": 2}, 1, [2, 1], True),
    "no picture": ({"json": 1}, None, None, False),
}


@pytest.fixture
def several(tmp_path):
    """A shard with the samples of SEVERAL, and its listing."""
    kinds = {"webp": {"kind": "WEBP", "lossless": True}}
    members = [
        (f"{key}.{kind}", encoded(np.full((4, 4, 3), 9 * v, "u1"), **kinds.get(kind, {})))
        for key, (values, *_) in SEVERAL.items()
        for kind, v in values.items()
    ]
    path = write_tar(tmp_path / "several.tar", members)
    pack_module.write_listing(shards_module.Shards(path))
    return path


def test_the_picture_of_a_sample_with_several_is_the_plain_one(several, tmp_path):
    def values(images):
        return [np.asarray(image.convert("L")).mean() / 9 for image in images]

    expected = [rest for rest in SEVERAL.values() if rest[1]]
    for where in (several, f"pipe:cat {several}"):
        source, _ = data.open_sources(where, cache=(f"{tmp_path}/cache", "1M"))
        assert source.sizes.tolist() == [len(expected)]
        for number, (_, one, frames, _) in enumerate(expected):
            sample = source.read(number)
            assert values([sample["image"]()]) == [one]
            video = sample["video"]()
            assert values(video.read(list(range(video.count)))) == frames


@pytest.mark.parametrize("pipe", ["", "pipe:cat "])
def test_what_is_wrong_with_shards_is_said_at_every_start(
    several, tmp_path, monkeypatch, capsys, pipe
):
    write_tar(tmp_path / "whole.tar", members_of(range(3)))
    cut = write_tar(tmp_path / "cut.tar", members_of(range(3)))
    with tarfile.open(cut) as tar:
        offset = tar.getmember("00001.png").offset
    os.truncate(cut, offset)
    pack_module.write_listing(shards_module.Shards(f"{tmp_path}/*.tar"))
    (tmp_path / "cut.tar.index").unlink()  # this one is made at the first start, the others were
    capsys.readouterr()
    cache = f"{tmp_path}/cache", "1M"
    for _ in range(3):
        data.open_sources(f"{pipe}{tmp_path}/{{whole,several,cut}}.tar", cache=cache)
        damage, bare, choice = capsys.readouterr().err.splitlines()
        assert "1 shards are cut or damaged" in damage and f"cut.tar at byte {offset}" in damage
        assert "1 samples without a picture are left out, the first in" in bare
        said = sum(told for *_, told in SEVERAL.values())
        assert f"{said} samples have several pictures: NAME.000.jpg" in choice
        assert bare.endswith("several.tar") and choice.endswith("several.tar)")
        data.open_sources(f"{pipe}{tmp_path}/whole.tar", cache=cache)
        monkeypatch.setenv("RANK", "3")  # the first process of a run says it for all
        data.open_sources(f"{pipe}{tmp_path}/cut.tar", cache=cache)
        monkeypatch.delenv("RANK")
        assert capsys.readouterr().err == ""


def test_a_link_in_a_shard_is_counted_as_unreadable(tmp_path):
    """tar stores the second of two hard-linked files without its bytes."""
    path = write_tar(tmp_path / "a.tar", members_of(range(2)))
    with tarfile.open(path, "a") as tar:
        for kind, name in ((tarfile.LNKTYPE, "hard.png"), (tarfile.SYMTYPE, "soft.png")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "00000.png"
            tar.addfile(link)
    batch = picture_batches(opened(path), (4, 4), 3, 4)[0]
    assert batch["weight"].tolist() == [1, 1, 0, 0]
    assert [line.split(": ")[0] for line in batch["bad"]] == [f"{path}:hard", f"{path}:soft"]
    assert batch["bad"][0].endswith("cannot identify image file")  # and no address of a buffer


def test_samples_of_many_shards_come_in_order(shards):
    folder, pattern = shards
    source = opened(pattern)
    assert source.sizes.tolist() == [7, 0, 1, 12, 3] and source.classes is None
    expected = [sample for path in sorted(folder.glob("*.tar")) for sample in by_tarfile(path)]
    assert everything(source) == expected
    assert [label for _, label, _ in expected] == [number % 10 for number in range(23)]


def test_the_index_says_where_samples_lie_and_is_made_once(shards, monkeypatch):
    folder, pattern = shards
    samples = everything(opened(pattern))
    tars = sorted(folder.glob("*.tar"))
    indexes = [Path(f"{path}.index") for path in tars]
    assert sorted(folder.iterdir()) == sorted([*tars, *indexes])
    for path in tars:
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        edges = [m.offset for m in members if m.name.endswith(".png")]  # a .cls comes after it
        edges += [m.offset_data + 512 for m in members[-1:]]  # of one byte, so in one block
        samples_of_it = [list(pair) for pair in itertools.pairwise(edges)]
        assert shards_module.shard_index(path)[1].tolist() == samples_of_it

    def refuse(_):
        raise AssertionError("a shard is scanned again")

    times = [path.stat().st_mtime_ns for path in indexes]
    monkeypatch.setattr(shards_module, "scan_tar", refuse)
    assert everything(opened(pattern)) == samples
    assert [path.stat().st_mtime_ns for path in indexes] == times


def test_a_shard_that_was_replaced_is_noticed(shards):
    folder, pattern = shards
    path = folder / "s-03.tar"
    opened(pattern)
    for numbers in (range(80, 85), range(90, 95)):  # another size first, then the same one
        before = path.stat()
        write_tar(path, members_of(numbers))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))
        source = opened(pattern)
        assert source.sizes.tolist() == [7, 0, 1, 5, 3]
        assert [source.name(8 + i)[-5:] for i in range(5)] == [f"{n:05}" for n in numbers]
        assert everything(source) == [
            sample for tar in sorted(folder.glob("*.tar")) for sample in by_tarfile(tar)
        ]


DAMAGED = {
    "empty": lambda content: b"",
    "text": lambda content: b"this is no index\n" * 30,
    "zeros": lambda content: bytes(len(content)),
    "cut in a number": lambda content: content[:-4],
    "cut after a sample": lambda content: content[:-16],
    "cut before the first sample": lambda content: content[:32],
    "cut after the first sample": lambda content: content[:80],
    "longer numbers": lambda content: content[:64] + b"\x7f" * (len(content) - 64),
    "of numpy, as it once was": lambda content: npy(np.arange(26).reshape(13, 2)),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_missing_or_damaged_index_is_made_again(shards, damage):
    folder, pattern = shards
    samples, index = everything(opened(pattern)), folder / "s-03.tar.index"
    content = index.read_bytes()
    index.write_bytes(DAMAGED[damage](content))
    assert everything(opened(pattern)) == samples and index.read_bytes() == content
    index.unlink()
    assert everything(opened(pattern)) == samples and index.read_bytes() == content


def test_an_index_without_checksums_is_made_again(shards):
    """As an earlier version wrote them: right, or with two samples in each other's place."""
    folder, pattern = shards
    samples, path = everything(opened(pattern)), folder / "s-03.tar"
    index, stat = Path(f"{path}.index"), path.stat()
    content, rows = index.read_bytes(), shards_module.shard_index(path)[1].tolist()
    for order in (rows, [rows[1], rows[0], *rows[2:]]):
        index.write_bytes(npy(np.array([[stat.st_size, stat.st_mtime_ns], *order])))
        assert everything(opened(pattern)) == samples and index.read_bytes() == content


def test_whatever_byte_of_an_index_is_wrong_the_samples_are_right(tmp_path):
    samples = [*members_of(range(3)), ("x.a.png", tile(7)), ("x.b.png", tile(8)), ("y.txt", b"")]
    path = write_tar(tmp_path / "a.tar", samples)
    expected, index = everything(opened(path)), tmp_path / "a.tar.index"
    content = index.read_bytes()
    for place in range(len(content)):
        for change in (1, 128):
            damaged = bytearray(content)
            damaged[place] ^= change
            index.write_bytes(damaged)
            assert everything(opened(path)) == expected, place
            assert index.read_bytes() == content, place
    for end in range(0, len(content), 5):
        index.write_bytes(content[:end])
        assert everything(opened(path)) == expected and index.read_bytes() == content, end
    draws = np.random.RandomState(0)
    for _ in range(100):
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[draws.randint(0, len(content), 8)] ^= draws.randint(1, 256, 8).astype(np.uint8)
        index.write_bytes(damaged.tobytes())
        assert everything(opened(path)) == expected and index.read_bytes() == content


def test_an_index_that_is_damaged_under_an_open_source_is_made_again(shards):
    folder, pattern = shards
    source, index = opened(pattern), folder / "s-03.tar.index"
    content = index.read_bytes()
    index.write_bytes(content[:64] + content[80:96] + content[64:80] + content[96:])
    assert everything(source) == everything(opened(pattern)) and index.read_bytes() == content


def read_often(pattern, times, answers):
    """Open and read all samples this many times. (In a process.)"""
    answers.put([everything(opened(pattern)) for _ in range(times)])


def test_processes_that_make_the_same_index_read_the_right_samples(shards):
    folder, pattern = shards
    expected, files = everything(opened(pattern)), sorted(folder.iterdir())
    content = {path: path.read_bytes() for path in folder.glob("*.index")}
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    for path in content:
        path.unlink()
    readers = [context.Process(target=read_often, args=(pattern, 8, answers)) for _ in range(3)]
    [reader.start() for reader in readers]
    answered, numbers = [], itertools.count()
    while any(reader.is_alive() for reader in readers):
        # Meanwhile they are damaged, removed and cut again and again.
        damage = next(numbers) % 3
        for path in content:
            damaged = (content[path][:-1], b"\x93NUMPY", None)[damage]
            path.unlink(missing_ok=True) if damaged is None else path.write_bytes(damaged)
        with contextlib.suppress(queue.Empty):  # a process ends when its answer has been taken
            answered.append(answers.get(timeout=0.005))
    while len(answered) < len(readers):
        answered.append(answers.get(timeout=60))
    assert answered == [[expected] * 8] * 3
    [reader.join() for reader in readers]
    assert everything(opened(pattern)) == expected
    assert {path: path.read_bytes() for path in folder.glob("*.index")} == content
    assert sorted(folder.iterdir()) == files  # nothing half written is left


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """An empty folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_folder_that_cannot_be_written_is_indexed_elsewhere(shards, temporary, monkeypatch):
    folder, pattern = shards
    before = sorted(os.listdir(folder))
    expected = [sample for path in sorted(folder.glob("*.tar")) for sample in by_tarfile(path)]
    real_open = io.open

    def read_only(file, mode="r", *arguments, **options):
        if set(mode) & set("wax+") and str(file).startswith(str(folder)):
            raise PermissionError(13, "Permission denied", str(file))
        return real_open(file, mode, *arguments, **options)

    monkeypatch.setattr("builtins.open", read_only)
    monkeypatch.setattr(io, "open", read_only)
    assert everything(opened(pattern)) == expected
    assert sorted(os.listdir(folder)) == before
    indexes = {path: path.read_bytes() for path in temporary.iterdir()}
    assert len(indexes) == 5  # one for each shard, and they are used:
    with monkeypatch.context() as context:
        context.setattr(shards_module, "scan_tar", None)
        assert everything(opened(pattern)) == expected
    # A shard of the same path that changes is noticed here, too.
    write_tar(folder / "s-00.tar", members_of(range(50, 54)))
    assert opened(pattern).sizes.tolist() == [4, 0, 1, 12, 3]
    assert sum(path.read_bytes() != indexes[path] for path in temporary.iterdir()) == 1


def test_where_no_index_can_be_written_shards_are_read_all_the_same(
    shards, temporary, monkeypatch, capsys
):
    folder, pattern = shards
    expected = [sample for path in sorted(folder.glob("*.tar")) for sample in by_tarfile(path)]

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    assert everything(opened(pattern)) == expected
    assert "cannot write the index" in capsys.readouterr().err
    assert not [path for path in folder.iterdir() if path.suffix != ".tar"]
    assert not list(temporary.iterdir())


def test_an_index_that_is_kept_elsewhere_is_not_worth_a_line(
    shards, temporary, monkeypatch, capsys
):
    folder, pattern = shards
    plain = os.replace

    def refuse(source, target):
        if os.path.dirname(target) == str(folder):
            raise PermissionError(13, "Permission denied")
        plain(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    opened(pattern)
    assert capsys.readouterr().err == ""
    assert len(list(temporary.iterdir())) == len(list(folder.glob("*.tar")))


def test_a_folder_of_shards_says_how_to_give_them(tmp_path):
    (tmp_path / "0.tar").touch()
    with pytest.raises(ValueError, match=re.escape(f"of its shards, give {tmp_path}/*.tar")):
        data.Folder(str(tmp_path))


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (["train2017", "val2017", "test2017"], "test2017/ train2017/ val2017/"),
        (["training_set/cat", "test_set/cat"], "test_set/cat/ training_set/cat/"),
        (["ds/train/a", "ds/Validation/a"], "ds/Validation/a/ ds/train/a/"),
        (["bullet train", "cat"], None),  # one is no reason
        (["latest", "strains", "values"], None),
    ],
)
def test_folders_that_look_like_splits_are_said(tmp_path, folders, named, capsys):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        picture(0).save(tmp_path / folder / "0.png")
    assert data.Folder(str(tmp_path)).sizes.sum() == len(folders)
    said = capsys.readouterr().err
    assert said == "" if named is None else f"({named}) look like splits, but all are read" in said


def test_a_loader_process_does_not_survive_the_training():
    code = f"""
import os, sys, time
import torch
sys.path.insert(0, {str(ROOT)!r})
from support import loader

class Stuck(torch.utils.data.Dataset):
    def __getitem__(self, item):
        print(os.getpid(), flush=True)
        time.sleep(300)

loader.report_stall = lambda *_: None
next(iter(loader.loader(Stuck(), range(4), workers=1)))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as training:
        worker = int(training.stdout.readline())
        training.kill()
    deadline = time.monotonic() + 60
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(worker)


def is_running(pid):
    """True if a process does something: one that nobody waits for stays, as a zombie."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_held_out_samples_are_the_last_of_train_at_most_5_percent(shards):
    samples = everything(opened(shards[1]))
    for count, wanted in ((0, 0), (1, 1), (512, 1)):  # 5 % of 23 is 1
        source = opened(shards[1])
        train, held_out = data.hold_out(source, None, count)
        assert held_out.sizes.sum() == wanted
        assert everything(train) + everything(held_out) == samples
        assert train.identity != held_out.identity != source.identity


def test_held_out_samples_are_the_first_of_val_where_there_is_one(shards):
    source, val = opened(shards[1]), opened(shards[1])
    for count, wanted in ((4, 4), (512, 23)):
        train, held_out = data.hold_out(source, val, count)
        assert train is source
        assert everything(held_out) == everything(val)[:wanted]


@pytest.mark.parametrize(
    "start, stop", [(0, 23), (0, 0), (7, 8), (6, 9), (8, 20), (3, 5), (22, 23)]
)
def test_a_slice_may_begin_and_end_anywhere(shards, start, stop):
    source = opened(shards[1])
    part = data.Subset(source, range(start, stop))
    assert everything(part) == everything(source)[start:stop]
    assert len(part.sizes) == len(source.sizes)  # as many lanes as the whole source gives
    again = data.Subset(part, range(1, int(part.sizes.sum())))
    assert everything(again) == everything(part)[1:]


class Fails(torch.utils.data.Dataset):
    """Numbers, until the item of which a worker runs a function."""

    def __init__(self, at, function):
        self.at, self.function = at, function

    def __getitem__(self, item):
        if item == self.at:
            self.function()
        return torch.tensor([item])

    def about(self, item):
        return str(item)


def few_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


@pytest.mark.parametrize(
    ("at", "function", "says"),
    [
        (0, few_files, r"Too many open files.*more open files \(ulimit -n 65536\), or"),
        (9, few_files, "--workers"),  # those made before are lost, too
        (9, lambda: os.kill(os.getpid(), signal.SIGKILL), "give it more memory.* --workers"),
        (9, lambda: 1 / 0, None),  # a mistake stays one
    ],
)
def test_a_batch_that_cannot_be_handed_over_ends_the_loader(at, function, says):
    made, found = iter(loader_module.loader(Fails(at, function), range(100), workers=1)), []
    with pytest.raises(data.Unreachable if says else ZeroDivisionError, match=says):
        found.extend(made)
    assert found == [torch.tensor([n]) for n in range(len(found))]
    assert len(found) <= at


def test_a_batch_is_pinned_as_a_dataloader_pins_it(monkeypatch):
    """Without a GPU, tensors are marked instead. (It is PyTorch's function that its thread calls.)"""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    batch = {
        "images": torch.zeros(2),
        "targets": [{"seed": 3, "masks": torch.ones(1)}],
        "bad": ["x"],
    }
    pinned = torch.utils.data._utils.pin_memory.pin_memory(loader_module.Parcel(batch))
    assert pinned["images"].tolist() == [1, 1] and pinned["bad"] == ["x"]
    assert pinned["targets"][0]["seed"] == 3 and pinned["targets"][0]["masks"].tolist() == [2]


def test_too_few_open_files_are_not_unreadable_pictures(monkeypatch):
    source = data.Folder(str(PICTURES))

    def read(number):
        raise OSError(errno.EMFILE, "Too many open files", "0.png")

    monkeypatch.setattr(source, "read", read)
    with pytest.raises(data.Unreachable, match="Too many open files: '0.png': .*ulimit -n 65536"):
        picture_batches(source, (8, 8), 3, 4)[0]
    chunks = hashtags.TagChunks(source, {})
    with pytest.raises(data.Unreachable, match="ulimit"):
        chunks[0]
    with pytest.raises(data.Unreachable, match="ulimit"):
        list(labels_module.read_all(source, "label", lambda sample: sample["class"], -1))


# What a loader process (or, without workers, the training) meets at item {item}. In the last two,
# `parent` gets the signal, and the batch never comes.
MISHAPS = {
    "files": "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))",
    "kill": "os.kill(os.getpid(), signal.SIGKILL)",
    "SIGTERM": "os.kill(parent, signal.SIGTERM); time.sleep(300)",
    "SIGINT": "os.kill(parent, signal.SIGINT); time.sleep(300)",
}


MISHAP = """
import os, signal, sys, time
import {stage} as program
import data
from support import loader

signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup has it ignored
plain, parent, loader.GRACE = data.Batches.__getitem__, os.getpid(), 0.5

def read(batches, item):
    batch = plain(batches, item)
    trains = batches.order is not None
    if trains == {trains} and item == {item} and batches.process == batches.processes - 1:
        {mishap}
    return batch

data.Batches.__getitem__ = read
program.main(sys.argv[1:])
"""


def same_run_of(program, tmp_path, **options):
    """A function: flags, and code that is run instead -> what a program, at a run of 12 steps with
    a checkpoint every 4, printed."""
    run = [*TINY]
    if program == "weak_pretrain":
        labels = tmp_path / "labels.jsonl"
        lines = [{"path": f"{'ab'[i % 2]}/{i}.png", "hashtags": [f"#{i % 3}"]} for i in range(120)]
        labels.write_text("".join(json.dumps(line) + "\n" for line in lines))
        hashtags.write_hashtags(data.Folder(str(PICTURES), labels=str(labels)), tmp_path / "tags")
        run += ["--labels", labels, "--tags", tmp_path / "tags"]
    if program == "finetune":
        run += ["--task", "classify", "--val-data", PICTURES]
    if program != "mae_pretrain":
        at = run.index("--decoder")
        del run[at : at + 2]
    return lambda *more, **others: stage(*run, *more, program=f"{program}.py", **options, **others)


@pytest.mark.parametrize(
    ("program", "mishap", "processes", "flags"),
    [
        ("mae_pretrain", "files", None, []),
        ("mae_pretrain", "kill", None, []),
        ("mae_pretrain", "SIGTERM", None, []),
        ("mae_pretrain", "SIGINT", None, []),
        ("mae_pretrain", "SIGTERM", None, ["--workers", "0"]),
        ("mae_pretrain", "files", 2, []),
        ("mae_pretrain", "SIGTERM", 2, ["--shard-group", "2"]),
        ("weak_pretrain", "kill", None, []),
        ("weak_pretrain", "SIGTERM", None, []),
        ("finetune", "kill", None, []),
        ("finetune", "SIGTERM", None, []),
    ],
)
def test_a_stage_that_gets_no_batch_saves_and_ends(program, mishap, processes, flags, tmp_path):
    run = same_run_of(program, tmp_path, processes=processes)
    code = MISHAP.format(stage=program, mishap=MISHAPS[mishap], trains=True, item=5)
    ran = run(*flags, "--out", tmp_path / "run", code=code)
    asked = mishap.startswith("SIG")
    assert ran.returncode == (0 if asked else 1), ran.stderr
    # The mishap comes while item 5 is made, ahead of the training.
    assert re.search("stopped at step [2-5] of 12, saved: the same command goes on", ran.stdout)
    # Each process says one thing. (Two may write at once: a line may go on with the other's.)
    assert ran.stderr.count(f"{program}.py: ") == (0 if asked else processes or 1)
    assert ran.stderr.count("could not hand over a batch") == (not asked)
    assert len(ran.stderr.splitlines()) < 5
    assert run("--out", tmp_path / "run", *flags).returncode == 0
    assert run("--out", tmp_path / "whole", *flags).returncode == 0
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")


def test_a_signal_amid_micro_batches_lets_the_step_end(tmp_path):
    code = MISHAP.format(
        stage="mae_pretrain", mishap="os.kill(parent, signal.SIGTERM)", trains=True, item=13
    )
    run = same_run_of("mae_pretrain", tmp_path)
    flags = ["--micro-batch", "2", "--workers", "0", "--out", tmp_path / "run"]
    assert "stopped at step 4 of 12, saved" in run(*flags, code=code).stdout  # 13 is of the fourth


@pytest.mark.parametrize(
    ("program", "mishap", "processes"),
    [
        ("mae_pretrain", "SIGTERM", None),
        ("mae_pretrain", "files", 2),
        ("weak_pretrain", "SIGTERM", 2),
        ("finetune", "kill", None),
        ("finetune", "SIGTERM", 2),
    ],
)
def test_what_goes_wrong_in_measuring_costs_no_step(program, mishap, processes, tmp_path):
    run = same_run_of(program, tmp_path, processes=processes)
    mishap_of = MISHAPS[mishap]
    if (program, mishap) == ("mae_pretrain", "files"):  # it measures without workers
        mishap_of = "raise data.Unreachable('Unreachable: a shard is gone')"
    code = MISHAP.format(stage=program, mishap=mishap_of, trains=False, item=0)
    ran = run("--out", tmp_path / "run", code=code)
    assert ran.returncode == (0 if mishap == "SIGTERM" else 1), ran.stderr
    assert "stopped at step 4 of 12, saved: the same command goes on" in ran.stdout
    assert ran.stderr.count("not measured: ") == 1 and "Traceback" not in ran.stderr
    measured = {"held_out_loss", "hit_1", "hit_5", "top1", "top5"}
    assert not any(line.get(name) for line in read_metrics(tmp_path / "run") for name in measured)
    assert run("--out", tmp_path / "run").returncode == 0
    assert run("--out", tmp_path / "whole").returncode == 0
    plain = [
        [
            {k: v for k, v in line.items() if k not in measured}
            for line in read_metrics(tmp_path / out)
        ]
        for out in ("run", "whole")
    ]
    assert plain[0] == plain[1]


def test_fewer_shards_than_processes_is_one_line_with_a_way_out():
    source = Memory([4, 4, 4])
    with pytest.raises(ValueError, match="3 lanes cannot be dealt to 4.*--lanes, a multiple of 4"):
        picture_batches(source, (8, 8), 3, 8, order=data.Order(source.sizes), processes=4)
    order = data.Order(source.sizes, lanes=4)  # more lanes than shards: they share them
    parts = [
        picture_batches(source, (8, 8), 3, 8, order=order, process=p, processes=4) for p in range(4)
    ]
    labels = torch.cat([part[step]["labels"] for part in parts for step in range(3)])
    assert sorted(labels.tolist()) == sorted([*range(12)] * 2)


# One stage, as it is run: from the web as from the disk, with a shard that goes missing, without room.


def test_a_stage_runs_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pack_module.pack(str(PICTURES / "a"), "shards/%02d.tar", shard_size=8)
    server = Server(tmp_path / "shards")
    run = [*TINY[2:], "--lanes", "4", "--cache-dir", "cache", "--steps", "4"]

    def metrics(where, out, *more, **options):
        ran = stage(*run, "--data", where, "--out", tmp_path / out, *more, **options)
        return ran, read_metrics(tmp_path / out) if ran.returncode == 0 else ran.stderr

    run[run.index("cache")] = tmp_path / "cache"
    _, local = metrics(tmp_path / "shards" / "{00..07}.tar", "local")
    ran, web = metrics(f"{server.url}/{{00..07}}.tar", "web", processes=2)
    assert web == [pytest.approx(line, rel=1e-5) for line in local], ran.stderr
    assert ran.stdout.count(f"cache {tmp_path / 'cache'}, at most 20 GB") == 1
    assert max(server.asked().values()) == 2  # index.json, by both
    server.faults = dict.fromkeys(
        ["03.tar"], lambda handler, content: handler.send_error(404) or True
    )
    shutil.rmtree(tmp_path / "cache")
    ran, lines = metrics(f"{server.url}/{{00..07}}.tar", "missing", "--max-bad", "1")
    assert lines[-1]["bad"] > 0 and "03.tar: sample" in ran.stderr, ran.stderr
    ran, said = metrics(f"{server.url}/{{00..07}}.tar", "small", "--cache-size", "1K")
    assert ran.returncode == 2 and len(said.splitlines()) == 1 and "--cache-size" in said
    server.shutdown()
