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
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tracemalloc
import urllib.parse
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ODD_NAMES, PICTURES, ROOT, TINY, picture, read_metrics, stage
from PIL import Image

import data
from support import hashtags, toy
from support import labels as labels_module
from support import pack as pack_module
from support import remote as remote_module
from tasks import lit
from tasks import video as video_module

# ---------------------------------------------------------------------------------------- fixtures


def painting(height, width):
    """An RGB picture (height, width, 3) uint8 in which no mirror image or rotation looks alike."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    blue = 128 + 60 * np.sin(9 * x) * np.cos(7 * y) + 60 * y
    return np.stack([250 * x, 220 * y, blue], axis=2).round().astype(np.uint8)


def encoded(pixels, kind="PNG", **options):
    """The bytes of a picture file."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(content, size, channels=3, bits=None, min_crop=0.2):
    """Bytes of a picture file -> (H, W, C) uint8 as crop_and_resize makes them, as int64."""
    image = Image.open(io.BytesIO(content))
    pixels = data.crop_and_resize(image, size, channels, bits, min_crop)
    assert pixels.shape == (channels, *size) and pixels.dtype == torch.uint8
    return pixels.permute(1, 2, 0).numpy().astype(np.int64)


def handmade_png(width, height, depth, colour_type, rows):
    """A PNG file by its specification: rows are the raw bytes, each with its filter byte 0."""

    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def write_files(folder, files):
    """{relative path: bytes} -> files below the folder, which is returned as a string."""
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(folder)


def write_tar(path, members, **options):
    """[(name, bytes)] -> a tar. A name that ends in / is a directory."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name.rstrip("/"))
            member.size = len(content)
            if name.endswith("/"):
                member.type = tarfile.DIRTYPE
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def tile(number):
    """A small lossless picture that differs for each number."""
    return encoded(np.full((4, 4, 3), (number * 7 % 256, number * 31 % 256, number % 256), "u1"))


def members_of(numbers, classes=10):
    """WebDataset members of the samples with these numbers: picture and class."""
    for number in numbers:
        yield f"{number:05}.png", tile(number)
        yield f"{number:05}.cls", str(number % classes).encode()


class Memory:
    """A source of pictures in memory, all different."""

    classes = None

    def __init__(self, sizes):
        self.sizes = np.array(sizes)

    def read(self, number):
        pixels = np.roll(painting(20, 30), number, axis=1) ^ np.uint8(number)
        return {"image": lambda: Image.fromarray(pixels), "class": number}

    def name(self, number):
        return f"memory:{number}"


def opened(where):
    """The source to train on behind a --data string."""
    return data.open_sources(str(where))[0]


def everything(source):
    """[(name, class, pixels)] of all samples of a source, in order."""
    samples = []
    for number in range(source.sizes.sum()):
        sample = source.read(number)
        pixels = np.asarray(sample["image"]().convert("RGB")).tolist()
        samples.append((source.name(number), sample["class"], pixels))
    return samples


def stream(order, start, stop):
    return [order(position) for position in range(start, stop)]


def chi_square(counts, expected=None):
    """Pearson's statistic of counts, by default against equal expectations, over its limit.

    Below 1 unless something is wrong: the limit is passed by chance with probability 1e-6 (Wilson
    and Hilferty's approximation of the quantile, z = 4.75).
    """
    counts = np.asarray(counts, dtype=np.float64)
    expected = counts.mean() if expected is None else np.asarray(expected)
    freedom = len(counts) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3
    return ((counts - expected) ** 2 / expected).sum() / limit


def same_batch(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name]
        assert same, name


def one_line(error):
    """The message of a pytest.raises context, which must be one line."""
    message = str(error.value)
    assert message and "\n" not in message
    return message


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


def test_one_unreadable_picture_is_never_too_many():
    order = data.Order([60])  # it comes once in each epoch of 60
    for drawn in (1, 59, 60, 61, 600, 60_000):
        come = -(-drawn // 60)  # at most so often so far
        assert not order.too_many(come, drawn, 0.01)
    assert order.too_many(11, 120, 0.01) and not order.too_many(10, 120, 0.01)  # 1 % of 1,000
    assert order.too_many(1002, 60_000, 0.01) and not order.too_many(1001, 60_000, 0.01)
    assert order.too_many(3, 60, 0) and not order.too_many(2, 60, 0)
    assert order.too_many(40, 40, 1) and not order.too_many(39, 40, 1)  # all of them
    assert not order.too_many(1, 1, 0.01)
    # With weights, it comes as often in an epoch as its weight says.
    spans = np.array([5 * data.WEIGHT // 2, *[data.WEIGHT] * 59])
    weights = lambda a, b: spans[a:b]
    heavy = data.Order([60], totals=[spans.sum()], weights=weights, most=spans.max())
    assert heavy.length == 61 and sorted(stream(heavy, 0, 61)).count(0) in (2, 3)
    assert not heavy.too_many(3 * 100, 100 * 61, 0) and not heavy.too_many(3, 5, 0)
    assert heavy.too_many(3 * 101 + 1, 100 * 61, 0)


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
        self.shards = [np.round(np.array(w) * data.WEIGHT).astype(np.int64) for w in shards]
        self.weights, self.asked = np.concatenate(self.shards), set()

    def __call__(self, first, stop):
        self.asked.add((first, stop))
        return self.weights[first:stop]

    def order(self, **options):
        sizes, totals = [len(w) for w in self.shards], [w.sum() for w in self.shards]
        return data.Order(sizes, totals=totals, weights=self, **options)

    def items(self):
        """(sample, weight as a number) of every sample."""
        return enumerate((self.weights / data.WEIGHT).tolist())


def epoch_counts(order, epoch):
    return Counter(stream(order, epoch * order.length, (epoch + 1) * order.length))


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
    totals = np.ones(data.WEIGHT, dtype=np.int64)
    order = data.Order(totals * 2, seed=1, totals=totals, weights=lambda *_: np.array([0, 1]))
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


# ------------------------------------------------------------------------------------------ batches

BATCH = {"size": (8, 12), "channels": 3, "batch_size": 12, "seed": 4, "num_patches": 6}
SIZES = [5, 0, 9, 4, 1, 13, 7, 11]  # 50 samples: six steps of 12 run over an epoch border
STEPS = range(6)


def training_batches(process=0, processes=1, source=None):
    source = source or Memory(SIZES)
    order = data.Order(source.sizes, seed=4, lanes=6)
    return data.Batches(source, order=order, process=process, processes=processes, **BATCH)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_global_batch_is_the_same_for_any_processes_and_workers(processes, workers):
    expected = [training_batches()[step] for step in STEPS]
    parts = [
        list(data.loader(training_batches(process, processes), STEPS, workers))
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
            data.Batches(source, (8, 12), 3, 8, process=process, processes=processes)
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
        assert all(batch["bad"] == [] and batch["ids"].shape[1] == 0 for batch in batches)


def test_batches_that_cannot_be_dealt_are_refused_with_the_number_to_use():
    source = Memory([4] * 8)
    with pytest.raises(ValueError, match="multiple of 6") as error:
        data.Batches(source, (8, 8), 3, 8, processes=3)
    one_line(error)
    with pytest.raises(ValueError, match="multiple of 4"):  # divisible, but not in pairs
        data.Batches(source, (8, 8), 3, 6, processes=2)
    with pytest.raises(ValueError, match="--lanes") as error:
        data.Batches(source, (8, 8), 3, 12, order=data.Order(source.sizes), processes=3)
    assert "multiple of 3" in one_line(error)
    with pytest.raises(ValueError, match="channels") as error:
        data.Batches(source, (8, 8), 2, 12)
    one_line(error)


def test_loader_processes_are_as_asked_or_what_is_left_and_bounded(monkeypatch):
    for cores, here, left in ((2, 1, 1), (1, 1, 1), (8, 1, 7), (8, 2, 3), (256, 8, 16)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert data.loader_workers(None, here) == left
        assert [data.loader_workers(asked, here) for asked in (0, 5)] == [0, 5]
        for asked in (-1, 10_000):
            with pytest.raises(ValueError, match="--workers") as error:
                data.loader_workers(asked, here)
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


# What a camera stored so that turning it as its tag says gives `upright` (EXIF 2.3, tag 274).
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),  # is shown after a quarter turn to the right
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


def photo(upright, orientation, kind="PNG", **options):
    tags = Image.Exif()
    tags[274] = orientation
    stored = np.ascontiguousarray(STORED.get(orientation, STORED[1])(upright))
    return encoded(stored, kind, exif=tags, **options)


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


def textured(height, width):
    """A large picture with structure at every scale, as a photo has."""
    random = np.random.default_rng(1)
    pixels = painting(height, width).astype(np.float64)
    for cells in (6, 12, 24, 48, 96, 192):
        noise = random.normal(size=(cells, cells, 3)).astype(np.float32)
        layers = [
            Image.fromarray(noise[:, :, c]).resize((width, height), Image.Resampling.BICUBIC)
            for c in range(3)
        ]
        pixels += 80 / math.sqrt(cells) * np.stack([np.asarray(layer) for layer in layers], axis=2)
    return pixels.clip(0, 255).astype(np.uint8)


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
            data.Batches(source, (8, 8), 3, count, order=o, seed=1, num_patches=4)[0]
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
    batch = data.Batches(bad, (8, 8), 3, 19)[0]
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
        batches = data.Batches(source, (4, 4), 3, 2)
        for limit, bad in ((40, 1), (100, 0)):
            data.limit_pixels(limit)
            assert len(batches[0]["bad"]) == bad
            loader = data.loader(batches, range(1), 1)
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
    batch = data.Batches(source, (4, 4), 3, 6)[0]
    assert batch["labels"].tolist() == [0, 1, -1, -1, -1, -1]
    assert batch["weight"].tolist() == [1] * 6


def test_a_tar_that_is_cut_gives_the_samples_before_the_cut(tmp_path, capsys):
    whole, cut = (write_tar(tmp_path / name, members_of(range(12))) for name in ("a.tar", "b.tar"))
    with tarfile.open(whole) as tar:
        member = tar.getmember("00007.png")
    os.truncate(cut, member.offset_data + member.size // 2)  # in the middle of a picture
    expected, batch = (data.Batches(opened(path), (4, 4), 3, 12)[0] for path in (whole, cut))
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
    batch = data.Batches(opened(path), (4, 4), 3, 2)[0]
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

    batch = data.Batches(Raising([8]), (8, 8), 3, 8)[0]
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
        batches = data.Batches(opened(path), (4, 4), 3, 4)
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


def relative_labels(source, folder):
    return {os.path.relpath(name, folder): label for name, label, _ in everything(source)}


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


# ------------------------------------------------------------------------------------------- labels


def write_labels(path, classes):
    """{picture: class name} as the kind of file that the path's extension says."""
    names = sorted(set(classes.values()))
    lines = {
        ".jsonl": [json.dumps({"path": p, "class": name}) for p, name in classes.items()],
        ".csv": ["path,class", *(f'"{p}",{name}' for p, name in classes.items())],
    }
    inaturalist = {  # numbered neither from 0 nor in order
        "info": {"year": 2021},
        "images": [{"id": 70 - i, "file_name": p, "width": 4} for i, p in enumerate(classes)],
        "categories": [{"id": 9 - i, "name": name} for i, name in enumerate(names)],
        "annotations": [
            {"id": i, "image_id": 70 - i, "category_id": 9 - names.index(name)}
            for i, name in enumerate(classes.values())
        ],
    }
    text = "\n".join(lines.get(path.suffix, [json.dumps(inaturalist)]))
    path.write_text(text, encoding="utf-8")
    return str(path)


KINDS = [".jsonl", ".csv", ".json"]


@pytest.mark.parametrize("kind", KINDS)
def test_labels_name_the_pictures_and_classes_of_a_folder(tmp_path, kind):
    """Whatever the folders are called; what the file does not list is not there."""
    listed = {"x/a.png": "dog", "./x/y/b.png": "größer", "c, d.png": "cat", "x/e.png": "dog"}
    files = {name: tile(i) for i, name in enumerate([*listed, "x/not-listed.png", "more.png"])}
    folder = write_files(tmp_path / "pictures", files)
    labels = write_labels(tmp_path / f"labels{kind}", listed)
    train, val = data.open_sources(folder, labels=labels)
    assert val is None and train.classes == ["cat", "dog", "größer"]
    expected = {os.path.normpath(p): train.classes.index(name) for p, name in listed.items()}
    assert relative_labels(train, folder) == expected
    pixels = {os.path.relpath(name, folder): pixels for name, _, pixels in everything(train)}
    for name in listed:
        picture = Image.open(io.BytesIO(files[name]))
        assert pixels[os.path.normpath(name)] == np.asarray(picture).tolist()


def test_a_class_that_changes_is_another_data_set(tmp_path):
    folder = write_files(tmp_path / "pictures", {"a.png": tile(0), "b.png": tile(1)})
    found = set()
    for classes in ({"a.png": "x", "b.png": "y"}, {"a.png": "y", "b.png": "x"}, {"a.png": "x"}):
        for kind in KINDS:
            labels = write_labels(tmp_path / f"labels{kind}", classes)
            found.add(data.open_sources(folder, labels=labels)[0].identity)
    assert len(found) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_in_labels_are_in_the_order_of_numbers(tmp_path, kind):
    names = {"a.png": "10", "b.png": "9", "c.png": "100"}
    folder = write_files(tmp_path / "p", {name: tile(i) for i, name in enumerate(names)})
    labels = write_labels(tmp_path / f"labels{kind}", names)
    source, _ = data.open_sources(folder, labels=labels)
    assert source.classes == ["9", "10", "100"]
    assert relative_labels(source, folder) == {"a.png": 1, "b.png": 0, "c.png": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_val_have_the_classes_of_train(tmp_path, kind):
    names = [*"abcde", "val/f", "val/g"]
    folder = write_files(tmp_path / "p", {f"{name}.png": tile(i) for i, name in enumerate(names)})
    train = write_labels(
        tmp_path / f"train{kind}", {"a.png": "cat", "b.png": "dog", "c.png": "emu"}
    )
    val = write_labels(tmp_path / f"val{kind}", {"d.png": "emu", "e.png": "dog"})
    sources = data.open_sources(folder, labels=train, val_labels=val)
    assert [source.classes for source in sources] == [["cat", "dog", "emu"]] * 2
    found = [relative_labels(source, folder) for source in sources]
    assert found == [{"a.png": 0, "b.png": 1, "c.png": 2}, {"d.png": 2, "e.png": 1}]
    # The pictures of val may lie elsewhere, and may have class folders instead.
    write_labels(tmp_path / f"val{kind}", {"f.png": "emu"})
    _, other = data.open_sources(folder, f"{folder}/val", labels=train, val_labels=val)
    assert relative_labels(other, folder) == {"val/f.png": 2}
    pets = write_files(tmp_path / "pets", {"dog/h.png": tile(8), "emu/i.png": tile(9)})
    _, other = data.open_sources(folder, pets, labels=train)
    assert relative_labels(other, pets) == {"dog/h.png": 1, "emu/i.png": 2}
    write_labels(tmp_path / f"val{kind}", {"d.png": "emu", "e.png": "yak"})
    with pytest.raises(ValueError, match="classes that train has not: yak") as error:
        data.open_sources(folder, labels=train, val_labels=val)
    one_line(error)


def test_damaged_lines_of_labels_are_counted_and_left_out(tmp_path, capsys):
    folder = write_files(tmp_path / "p", {"a.png": tile(0), "b.png": tile(1)})
    lines = ['{"path": "a.png", "class": 1, "hashtags": ["#x"]}', '{"path": "b.png"', '["path"]']
    lines += ['{"class": "cat"}', "", '{"path": 5}', '{"path": null}', '{"path": ["a.png"]}', "7"]
    lines += ['{"path": "a.png", "class": 2, "hashtags": ["#x"]}']  # it was 1
    lines += ['{"path": "c.png", "class": null}']
    labels = tmp_path / "labels.jsonl"
    labels.write_bytes("\n".join(lines).encode() + b'\n{"path": "\xff.png", "class": 1}')
    entries = labels_module.read_labels(str(labels))
    assert "labels.jsonl: entries" in (printed := capsys.readouterr().err) and ": 10" in printed
    assert entries == {"a.png": {"class": "1", "hashtags": ["#x"], "captions": []},
                       "c.png": {"captions": []}}  # fmt: skip
    labels.write_text(lines[0])
    source, _ = data.open_sources(folder, labels=str(labels))
    assert source.classes == ["1"] and source.read(0)["hashtags"]() == ["#x"]
    table = tmp_path / "labels.csv"
    lines = ["path,class", "a.png,cat", "", "b.png;dog", "b.png,dog,1", "b.jfif,dog", "a.png,dog"]
    table.write_text("\n".join([*lines, "../p/b.png,cat"]))  # a path, though it begins with a dot
    source, _ = data.open_sources(folder, labels=str(table))
    assert "labels.csv: entries" in (printed := capsys.readouterr().err) and ": 4" in printed
    assert source.classes == ["cat"] and source.sizes.sum() == 2
    table.write_text('a.png,cat\nb.png,"cat\n')  # a quote would swallow what follows
    with pytest.raises(ValueError, match="cannot read labels"):
        labels_module.read_labels(str(table))


@pytest.mark.parametrize(
    "text",
    [
        'path, class\na.png, cat\nb.png,cat \n c.png ,"dog, or so"\n',
        'a.png , cat\nb.png,\tcat\nc.png, "dog, or so"\n',
        'class , path,split\n cat,a.png,x\n"cat ", b.png,x\n"dog, or so", c.png,x\n',
    ],
)
def test_spaces_around_the_cells_of_a_csv_do_not_count(tmp_path, capsys, text):
    folder = write_files(tmp_path / "p", {f"{name}.png": tile(0) for name in "abc"})
    (tmp_path / "labels.csv").write_text(text)
    source, _ = data.open_sources(folder, labels=f"{tmp_path}/labels.csv")
    assert source.classes == ["cat", "dog, or so"]
    assert relative_labels(source, folder) == {"a.png": 0, "b.png": 0, "c.png": 1}
    assert capsys.readouterr().err == ""
    # What it was before spaces were looked at, for a file that has none.
    (tmp_path / "labels.csv").write_text('path,class\na.png,cat\nb.png,cat\nc.png,"dog, or so"')
    again, _ = data.open_sources(folder, labels=f"{tmp_path}/labels.csv")
    assert again.identity == source.identity == "3 pictures, 2aa9086567593bba"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_label_is_none_and_is_counted(tmp_path, capsys, kind, empty):
    names = {"a.png": "cat", "b.png": empty, "c.png": "dog ", "d.png": "dog"}
    folder = write_files(tmp_path / "p", {name: tile(0) for name in names})
    labels = write_labels(tmp_path / f"labels{kind}", names)
    source, _ = data.open_sources(folder, labels=labels)
    assert source.classes == ["cat", "dog"]
    assert relative_labels(source, folder) == {"a.png": 0, "b.png": -1, "c.png": 1, "d.png": 1}
    assert capsys.readouterr().err == f"{labels}: pictures without a class: 1\n"
    _, val = data.open_sources(folder, folder, labels=labels, val_labels=labels)
    assert relative_labels(val, folder)["b.png"] == -1


def test_categories_of_one_name_are_one_class_and_that_is_said(tmp_path, capsys):
    folder = write_files(tmp_path / "p", {"a.png": tile(0), "b.png": tile(1)})
    content = {"images": [{"id": i, "file_name": f"{'ab'[i]}.png"} for i in range(2)]}
    content["categories"] = [{"id": i, "name": "crane"} for i in range(2)]
    content["annotations"] = [{"image_id": i, "category_id": i} for i in range(2)]
    (tmp_path / "labels.json").write_text(json.dumps(content))
    source, _ = data.open_sources(folder, labels=f"{tmp_path}/labels.json")
    assert source.classes == ["crane"] and source.labels.tolist() == [0, 0]
    assert "categories of the same name, each of which is one class (1): crane" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "text, key, first",
    [
        ("path\tclass\na.png\tcat\n", "caption", r"'path\tclass'"),
        ("a.png;cat\n", "caption", "'a.png;cat'"),
        ("filepath,title\na.png,a cat\n", "title", "'filepath,title'"),
        ("name,path,class\na.png,cat\n", "caption", "'name,path,class'"),
        ("id,split,label,file\n1,train,cat,a.png\n", "caption", "'id,split,label,file'"),
    ],
)
def test_a_csv_that_is_refused_says_what_it_wants_and_what_it_found(tmp_path, text, key, first):
    folder = write_files(tmp_path / "p", {"a.png": tile(0)})
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match="labels.csv lists no pictures: want lines of") as error:
        data.open_sources(folder, labels=f"{tmp_path}/labels.csv", caption_key=key)
    said = f"or a head line that names path, and class or {key}; the first line is {first}"
    assert one_line(error).endswith(said)


@pytest.mark.parametrize(
    "text, classes",
    [
        ("path,label\na.png,x\nb.png,y", ["x", "y"]),
        ("path,hashtags\na.png,x\nb.png,y", ["x", "y"]),
        ("a.png,path\nb.png,road", ["path", "road"]),  # classes of these names
        ("a.png,caption\nb.png,class", ["caption", "class"]),
        ("class,path\nx,a.png\ny,b.png", ["x", "y"]),
    ],
)
def test_columns_are_known_by_a_head_line_that_names_them(tmp_path, capsys, text, classes):
    """Others are path and class; and a first row that names a picture is no head line."""
    folder = write_files(tmp_path / "p", {"a.png": tile(0), "b.png": tile(1)})
    labels = tmp_path / "labels.csv"
    labels.write_text(text)
    source, _ = data.open_sources(folder, labels=str(labels))
    assert source.classes == classes
    assert relative_labels(source, folder) == {"a.png": 0, "b.png": 1}
    other = text.startswith(("path,label", "path,hashtags"))
    assert ("is taken as a header" in capsys.readouterr().err) is other


def test_a_first_row_that_is_damaged_is_counted(tmp_path, capsys):
    write_files(tmp_path, {"labels.csv": b"a.png,cat,dog\nb.png,cat\n"})
    entries = labels_module.read_labels(f"{tmp_path}/labels.csv")
    assert entries == {"b.png": {"class": "cat", "captions": []}}
    assert capsys.readouterr().err.endswith("against an earlier one): 1\n")


def test_a_head_line_that_names_no_path_is_said(tmp_path, capsys):
    folder = write_files(tmp_path / "p", {"a.png": tile(0)})
    labels = tmp_path / "labels.csv"
    for text, said in (
        ("image, label\na.png,cat\n", True),
        ("a.jfif,dog\na.png,cat\n", True),
        ("path,class\na.png,cat\n", False),
        ("a.png,cat\n", False),
    ):
        labels.write_text(text)
        source, _ = data.open_sources(folder, labels=str(labels))
        assert source.classes == ["cat"]
        first = repr(text.splitlines()[0].replace(" ", ""))
        why = "is taken as a header; its columns are read as path and class"
        line = f"{labels}: {first} {why}\n"
        assert capsys.readouterr().err == (line if said else "")


INATURALIST = {
    "images": [{"id": 1, "file_name": "a.png"}],
    "categories": [{"id": 2, "name": "cat"}],
    "annotations": [{"image_id": 1, "category_id": 2}],
}


@pytest.mark.parametrize(
    "name, content",
    [
        ("missing.csv", None),
        ("empty.csv", b""),
        ("only-a-header.csv", b"path,class\n"),
        ("one-column.csv", b"path,class\na.png\n"),
        ("three-columns.csv", b"a.png,cat,dog\n"),
        ("latin.csv", "größe.png,cat\n".encode("latin-1")),
        ("open-quote.csv", b'"' + b"a.png,cat\n" * 20_000),
        ("damaged.jsonl", b"{\n[]\n"),
        ("a.txt", b"a.png,cat\n"),
        ("empty.json", b""),
        ("cut.json", json.dumps(INATURALIST).encode()[:-5]),
        ("list.json", b"[]"),
        ("number.json", b"5"),
        ("no-annotations.json", json.dumps(INATURALIST | {"annotations": []}).encode()),
        ("no-images.json", json.dumps(INATURALIST | {"images": []}).encode()),
        ("no-categories.json", json.dumps({**INATURALIST, "categories": []}).encode()),
        ("text-as-images.json", json.dumps(INATURALIST | {"images": "a.png"}).encode()),
        ("number-as-file.json", json.dumps(INATURALIST).replace('"a.png"', "5").encode()),
    ],
)
def test_a_wrong_file_of_labels_is_one_line_that_names_it(tmp_path, name, content):
    folder = write_files(tmp_path / "p", {"a.png": tile(0)})
    if content is not None:
        write_files(tmp_path, {name: content})
    with pytest.raises(ValueError) as error:
        data.open_sources(folder, labels=f"{tmp_path}/{name}")
    assert name in one_line(error)


def test_labels_without_a_folder_are_refused(tmp_path):
    labels = write_labels(tmp_path / "labels.csv", {"a.png": "cat"})
    for where in ("toy", write_tar(tmp_path / "a.tar", members_of(range(3)))):
        for flag in ("labels", "val_labels"):
            with pytest.raises(ValueError, match="want a folder") as error:
                data.open_sources(where, **{flag: labels})
            one_line(error)


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
    pack_module.write_listing(data.Shards(f"{tmp_path}/a.tar"))
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
    pack_module.write_listing(data.Shards(path))
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
    pack_module.write_listing(data.Shards(f"{tmp_path}/*.tar"))
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
    batch = data.Batches(opened(path), (4, 4), 3, 4)[0]
    assert batch["weight"].tolist() == [1, 1, 0, 0]
    assert [line.split(": ")[0] for line in batch["bad"]] == [f"{path}:hard", f"{path}:soft"]
    assert batch["bad"][0].endswith("cannot identify image file")  # and no address of a buffer


@pytest.fixture
def shards(tmp_path):
    """Five shards of 7, 0, 1, 12 and 3 samples: (folder, pattern)."""
    folder, first = tmp_path / "shards", 0
    folder.mkdir()
    for number, count in enumerate([7, 0, 1, 12, 3]):
        write_tar(folder / f"s-{number:02}.tar", members_of(range(first, first + count)))
        first += count
    return folder, f"{folder}/s-{{00..04}}.tar"


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
        assert data.shard_index(path)[1].tolist() == samples_of_it

    def refuse(_):
        raise AssertionError("a shard is scanned again")

    times = [path.stat().st_mtime_ns for path in indexes]
    monkeypatch.setattr(data, "scan_tar", refuse)
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
    content, rows = index.read_bytes(), data.shard_index(path)[1].tolist()
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
        context.setattr(data, "scan_tar", None)
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
import data

class Stuck(torch.utils.data.Dataset):
    def __getitem__(self, item):
        print(os.getpid(), flush=True)
        time.sleep(300)

data.report_stall = lambda *_: None
next(iter(data.loader(Stuck(), range(4), workers=1)))
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
    part = data.Part(source, range(start, stop))
    assert everything(part) == everything(source)[start:stop]
    assert len(part.sizes) == len(source.sizes)  # as many lanes as the whole source gives
    again = data.Part(part, range(1, int(part.sizes.sum())))
    assert everything(again) == everything(part)[1:]


# --------------------------------------------------------------------------------------------- pack


def pack(folder, pattern, **options):
    """data.pack, and what it wrote: {key: {extension: bytes}} by Python's tarfile, in order."""
    pack_module.pack(str(folder), str(pattern), **options)
    shards = sorted(path for path in Path(pattern).parent.glob("*.tar"))
    return {path.name: tar_files(path) for path in shards}


def tar_files(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}


@pytest.fixture
def pets(tmp_path):
    """A folder of 20 pictures in two classes: (folder, {relative path: bytes})."""
    files = {f"{('cat', 'dog')[i % 2]}/{i:02}.png": tile(i) for i in range(20)}
    return Path(write_files(tmp_path / "pets", files)), files


def test_packed_shards_hold_the_same_bytes_and_classes(pets, tmp_path, capsys):
    folder, files = pets
    packed = pack(folder, tmp_path / "out" / "p-%03d.tar", shard_size=6)
    assert list(packed) == [f"p-{number:03}.tar" for number in range(4)]
    assert [len(members) for members in packed.values()] == [12, 12, 12, 4]
    # The line that it prints can be typed, and gives the same samples in the same order.
    where = re.search(r"--data '(.+)'", capsys.readouterr().out)[1]
    source, plain = opened(where), everything(opened(folder))
    assert source.classes == ["cat", "dog"]
    assert [sample[1:] for sample in everything(source)] == [sample[1:] for sample in plain]
    joined = [member for members in packed.values() for member in members.items()]
    expected = []
    for number, (name, label, _) in enumerate(plain):
        path = os.path.relpath(name, folder)  # "dog/07.png"
        key = f"{number:08}_{path[:3]}_{path[4:6]}"
        expected += [(f"{key}.png", files[path]), (f"{key}.cls", str(label).encode())]
    assert joined == expected
    record = json.loads((tmp_path / "out" / "pack.json").read_text())
    assert record["classes"] == ["cat", "dog"] and list(record["packed"]) == ["p-%03d.tar"]


def test_one_shard_and_flat_pictures(tmp_path, capsys):
    folder = write_files(tmp_path / "flat", {"a.png": tile(1)})
    packed = pack(folder, tmp_path / "out-%05d.tar")
    assert packed == {"out-00000.tar": {"00000000_a.png": tile(1)}}  # and no class
    where = re.search(r"--data '(.+)'", capsys.readouterr().out)[1]
    source = opened(where)
    assert source.classes is None and source.read(0)["class"] == -1


def test_pack_makes_enough_shards_for_the_lanes(tmp_path):
    folder = write_files(tmp_path / "many", {f"{i}.png": tile(i) for i in range(100)})
    assert len(pack(folder, tmp_path / "out" / "p-%03d.tar")) >= 34  # 100 / 48 rounded up is 3


def test_an_interrupted_pack_goes_on_and_ends_the_same(pets, tmp_path):
    folder, _ = pets
    out = tmp_path / "out"
    pack(folder, out / "p-%d.tar", shard_size=3)
    whole = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    assert len(whole) == 7
    # As a kill leaves it: some shards, no index, half of a temporary file.
    for path in [*(out / f"p-{number}.tar" for number in (4, 5, 6)), *out.glob("*.index")]:
        path.unlink()
    (out / "p-4.tar.tmp").write_bytes(whole["p-4.tar"][:1500])
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    pack(folder, out / "p-%d.tar", shard_size=3)
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")} == whole
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert not list(out.glob("*.tmp"))
    assert opened(f"{out}/p-*.tar").sizes.sum() == 20


def test_what_another_pack_or_someone_else_wrote_is_neither_kept_nor_mixed(pets, tmp_path):
    folder, files = pets
    pack(folder, tmp_path / "out" / "p-%d.tar", shard_size=4)
    other = write_files(tmp_path / "other", files | {"dog/one-more.png": tile(99)})
    write_tar(tmp_path / "foreign-1.tar", members_of(range(3)))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for source, pattern, options in (
        (folder, "out/p-%d.tar", {"shard_size": 4, "short_side": 2}),
        (folder, "out/p-%d.tar", {"shard_size": 5}),
        (folder, "out/p-%d.tar", {"shard_size": 20}),
        (other, "out/p-%d.tar", {"shard_size": 4}),
        (folder, "foreign-%d.tar", {"shard_size": 4}),
    ):
        with pytest.raises(ValueError, match="not of these pictures and options") as error:
            pack_module.pack(str(source), f"{tmp_path}/{pattern}", **options)
        one_line(error)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "content", ["", "{", "\0", "[]", "5", '"text"', "{}", '{"classes": null}', '{"packed": {}}',
                '{"classes": null, "packed": 5}'],
)  # fmt: skip
def test_a_damaged_pack_json_is_one_line_that_says_what_to_do(pets, tmp_path, content):
    folder, _ = pets
    shard = write_tar(tmp_path / "a.tar", members_of(range(3)))
    (tmp_path / "pack.json").write_text(content)
    for work in (
        lambda: opened(shard),
        lambda: pack_module.pack(str(folder), f"{tmp_path}/p-%d.tar"),
    ):
        with pytest.raises(ValueError, match="pack.json is damaged.*: remove it") as error:
            work()
        one_line(error)
    assert not list(tmp_path.glob("p-*"))


def test_short_side_scales_only_what_is_larger(tmp_path):
    clear = np.dstack([painting(30, 60), painting(30, 60)[:, :, 0]])
    files = {
        "large.jpg": encoded(painting(120, 200), "JPEG", quality=95),
        "turned.jpg": photo(painting(120, 200), 6, "JPEG", quality=95),
        "rough.jpg": encoded(textured(120, 200)[:, :, 0], "JPEG", quality=95),
        "clear.png": encoded(clear),
        "grey.png": encoded(painting(90, 60)[:, :, 1]),
        "deep.png": encoded(Image.fromarray(painting(90, 60)[:, :, 1].astype(np.uint16) * 257)),
        "tagged.png": encoded(painting(90, 60), exif=b"Exif\0\0this is no TIFF header"),
        "small.png": encoded(painting(10, 60)),
        "exact.jpg": encoded(painting(24, 48), "JPEG"),
        "broken.jpg": encoded(painting(120, 200), "JPEG")[:900],
    }
    folder = write_files(tmp_path / "photos", files)
    (packed,) = pack(folder, tmp_path / "p-%d.tar", short_side=24, shard_size=99).values()
    packed = {name.split("_", 1)[1]: content for name, content in packed.items()}
    for name in ("small.png", "exact.jpg", "broken.jpg"):
        assert packed.pop(name) == files[name]
    images = {name[:-4]: Image.open(io.BytesIO(content)) for name, content in packed.items()}
    sizes = {name: image.size for name, image in images.items()}
    assert sizes == {
        "large": (40, 24),
        "turned": (40, 24),  # stored upright now
        "rough": (40, 24),
        "clear": (48, 24),
        "grey": (24, 36),
        "deep": (24, 36),
        "tagged": (24, 36),
    }
    assert all(image.getexif().get(274, 1) == 1 for image in images.values())
    # JPEG at quality 90 is off by some levels: on average less than 4 (seen: 3).
    for name, image in images.items():
        (original,) = (files[file] for file in files if file.startswith(name))
        expected = decoded(original, image.size[::-1], 4)
        assert np.abs(np.asarray(image.convert("RGBA")) - expected).mean() < 4, name


def test_keys_of_a_shard_are_unique_and_readable(tmp_path):
    names = [
        "a.jpg",
        "a.png",
        "a.webp",
        "b.c.d.png",
        "b.c.e.png",
        "b_c_d.png",
        "x.y/z.png",
        "a~2.png",
    ]
    kinds = {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}
    files = {
        name: encoded(np.full((4, 4, 3), 20 * i, "u1"), kinds[name.rpartition(".")[2]])
        for i, name in enumerate(names)
    }
    folder = write_files(tmp_path / "names", files)
    (packed,) = pack(folder, tmp_path / "p-%d.tar", shard_size=99).values()
    assert Counter(packed.values()) == Counter(files.values())
    source = opened(f"{tmp_path}/p-0.tar")
    assert source.sizes.tolist() == [len(names)]  # no two of them became one sample
    packed_pixels, pixels = (
        sorted(pixels for _, _, pixels in everything(s)) for s in (source, opened(folder))
    )
    assert packed_pixels == pixels


def test_val_packed_after_train_keeps_the_numbers_of_the_classes(tmp_path):
    out = tmp_path / "out"
    train = {f"{kind}/{i}.png": tile(i) for kind in ("cat", "dog", "emu") for i in range(2)}
    pack(write_files(tmp_path / "train", train), out / "train-%d.tar", shard_size=9)
    val = {f"{kind}/{i}.png": tile(i) for kind in ("dog", "emu") for i in range(2)}
    packed = pack(write_files(tmp_path / "val", val), out / "val-%d.tar", shard_size=9)
    labels = {n[9:-4]: int(c) for n, c in packed["val-0.tar"].items() if n.endswith(".cls")}
    assert labels == {"dog_0": 1, "dog_1": 1, "emu_0": 2, "emu_1": 2}
    for name in ("train", "val"):
        assert opened(f"{out}/{name}-0.tar").classes == ["cat", "dog", "emu"]
    pack(tmp_path / "train", out / "train-%d.tar", shard_size=9)  # both are still known
    pack(tmp_path / "val", out / "val-%d.tar", shard_size=9)
    with pytest.raises(ValueError, match="yak") as error:
        more = write_files(tmp_path / "more", val | {"yak/1.png": tile(1)})
        pack_module.pack(more, f"{out}/more-%d.tar")
    one_line(error)
    assert not list(out.glob("more*"))


def test_numbered_folders_are_packed_by_their_numbers(tmp_path):
    """But an earlier pack's order stays, where an interrupted one goes on or val is added."""
    files = {f"{i}/{j}.png": tile(10 * i + j) for i in (0, 2, 10) for j in range(2)}
    folder, out = write_files(tmp_path / "numbered", files), tmp_path / "out"

    def labels(source):
        return sorted((source.classes[label], pixels) for _, label, pixels in everything(source))

    expected = labels(opened(folder))
    pack(folder, out / "p-%d.tar", shard_size=2)
    assert opened(f"{out}/p-*.tar").classes == ["0", "2", "10"]
    assert labels(opened(f"{out}/p-*.tar")) == expected
    record = json.loads((out / "pack.json").read_text())
    (out / "pack.json").write_text(json.dumps(record | {"classes": ["0", "10", "2"]}))
    for path in out.glob("p-*.tar*"):
        path.unlink()
    pack(folder, out / "p-%d.tar", shard_size=2)
    pack(folder, out / "q-%d.tar", shard_size=2)
    for name in "pq":
        source = opened(f"{out}/{name}-*.tar")
        assert source.classes == ["0", "10", "2"] and labels(source) == expected
    # A folder beside these shards has their numbers; shards beside the folder are refused.
    train, val = data.open_sources(f"{out}/p-*.tar", folder)
    assert train.classes == val.classes and labels(val) == expected
    with pytest.raises(ValueError, match="other classes than train") as error:
        data.open_sources(folder, f"{out}/p-*.tar")
    one_line(error)


def test_folders_that_number_their_classes_differently_are_not_one_source(tmp_path):
    for name, kinds in (("one", ("cat", "dog")), ("two", ("dog", "emu"))):
        folder = write_files(tmp_path / name, {f"{kind}/0.png": tile(1) for kind in kinds})
        pack(folder, tmp_path / f"{name}-shards" / "p-%d.tar")
    with pytest.raises(ValueError, match="number their classes differently") as error:
        opened(f"{tmp_path}/*-shards/p-*.tar")
    one_line(error)


@pytest.mark.parametrize(
    "pattern", ["out.tar", "out-%s-%s.tar", "out-%d-%d.tar", "out-%.tar", "o{a,b}-%d.tar"]
)
def test_a_pattern_without_one_number_is_refused(pets, tmp_path, pattern):
    with pytest.raises(ValueError, match=r"%05d") as error:
        pack_module.pack(str(pets[0]), f"{tmp_path}/new/{pattern}")
    one_line(error)
    assert not (tmp_path / "new").exists()


def command_line(*arguments):
    """`python data.py ...` in a process of its own."""
    command = [sys.executable, data.__file__, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "env": environment, "timeout": 120}
    return subprocess.run(command, check=False, **options)


def test_pack_of_a_missing_folder_is_one_line_and_status_2(tmp_path):
    result = command_line("pack", tmp_path / "missing", tmp_path / "out" / "p-%d.tar")
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(rf"data.py: .*{tmp_path}/missing.*\n", result.stderr)
    assert not (tmp_path / "out").exists()


def test_pack_on_the_command_line_names_what_it_cannot_scale(tmp_path):
    """Between one and two times Pillow's limit a bomb is only a warning there, and an error here.
    (In a process of its own, because pytest keeps warnings to itself.)"""
    bomb = handmade_png(10_000, 10_000, 1, 0, bytes(1251 * 10_000))
    files = {"bomb.png": bomb, "a.png": encoded(painting(30, 40))}
    folder = write_files(tmp_path / "photos", files)
    result = command_line("pack", folder, tmp_path / "p-%d.tar", "--short-side", 8)
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "bomb.png" in line]
    assert "DecompressionBombWarning" in line and "--max-pixels" in line
    assert "a.png" not in result.stdout + result.stderr
    joined = {k[9:]: v for path in tmp_path.glob("*.tar") for k, v in tar_files(path).items()}
    assert joined["bomb.png"] == bomb
    where = re.search(r"--data '(.+)'", result.stdout)[1]
    assert opened(where).sizes.sum() == 2


PACK_AND_MEASURE = """
import sys
from support.pack import pack
def memory():  # the peak, in MB. (That of getrusage may be the parent's, which made the picture.)
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
small, large, out = sys.argv[1:]
pack(small, f"{out}/s-%d.tar", 64)
before = memory()
pack(large, f"{out}/l-%d.tar", 64, max_pixels=108_000_000)
print(memory() - before)
"""


def test_a_huge_jpeg_is_packed_in_little_memory(tmp_path):
    """108 megapixels, over the usual limit, decoded at an eighth of its sides. (The picture is
    grey, and its file small, so that the test is cheap.)"""
    small = write_files(tmp_path / "small", {"a.jpg": encoded(painting(200, 200), "JPEG")})
    ramp = Image.linear_gradient("L").resize((12_000, 9000), Image.Resampling.BILINEAR)
    large = write_files(tmp_path / "large", {"a.jpg": encoded(ramp, "JPEG", quality=90)})
    command = [sys.executable, "-c", PACK_AND_MEASURE, small, large, str(tmp_path)]
    folder = os.path.dirname(data.__file__)
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    # 10 MB were measured, and 520 where it is decoded whole (108 million pixels, of 4 bytes each
    # once they are RGB): no allocator's habits come near 100 from either side.
    assert float(ran.stdout.splitlines()[-1]) < 100
    (content,) = tar_files(tmp_path / "l-0.tar").values()
    shown = Image.open(io.BytesIO(content))
    assert shown.size == (85, 64)
    expected = np.asarray(ramp.resize((85, 64), Image.Resampling.BOX)).astype(int)
    assert np.abs(np.asarray(shown.convert("L")) - expected).max() <= 4


def test_another_limit_of_pixels_is_another_pack(tmp_path, monkeypatch, capsys):
    """What an earlier pack left as it was, because it was too large, is not kept silently."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", data.MAX_PIXELS)
    large, small = (encoded(Image.new("L", size)) for size in ((500, 400), (200, 100)))
    folder = write_files(tmp_path / "photos", {"large.png": large, "small.png": small})
    flags = ["pack", folder, tmp_path / "p-%d.tar", "--short-side", 50, "--shard-size", 9]
    assert run_main(monkeypatch, *flags, "--max-pixels", 70_000) == 0
    assert "large.png cannot be read" in capsys.readouterr().err
    packed = tar_files(tmp_path / "p-0.tar")
    assert large in packed.values() and small not in packed.values()
    assert run_main(monkeypatch, *flags) == 2
    assert "not of these pictures and options" in capsys.readouterr().err
    assert run_main(monkeypatch, *flags, "--max-pixels", 65_535) == 2
    assert "--max-pixels: 65535 is not at least 65536" in capsys.readouterr().err
    assert run_main(monkeypatch, *flags, "--max-pixels", "abc") == 2
    assert "--max-pixels: abc is not at least 65536, the number" in capsys.readouterr().err


def run_main(monkeypatch, *arguments):
    """data.main() with these arguments, here; its exit status."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
    try:
        pack_module.main()
    except SystemExit as end:
        return end.code
    return 0


def test_index_on_the_command_line(shards, monkeypatch, capsys):
    folder, pattern = shards
    assert run_main(monkeypatch, "index", pattern) == 0
    assert "23 pictures in 5 shards" in capsys.readouterr().out
    assert len(list(folder.glob("*.index"))) == 5


def test_index_of_what_is_no_shard_is_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    write_files(tmp_path, {"text.tar": b"no tar " * 500})
    for where in ("text.tar", "missing.tar", "none-*.tar"):
        assert run_main(monkeypatch, "index", tmp_path / where) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and where in lines[0]


@pytest.mark.parametrize("flag", ["--short-side", "--shard-size"])
@pytest.mark.parametrize("value", [0, -5])
def test_sizes_that_make_no_sense_are_refused(pets, tmp_path, monkeypatch, capsys, flag, value):
    arguments = ["pack", pets[0], tmp_path / "out" / "p-%d.tar", flag, value]
    assert run_main(monkeypatch, *arguments) == 2
    assert flag in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_pack_keeps_the_place_of_a_file_that_cannot_be_read(pets, tmp_path, capsys):
    folder, files = pets
    os.symlink("/no/such/file", folder / "cat" / "gone.png")
    packed = pack(folder, tmp_path / "out" / "p-%d.tar", shard_size=99)["p-0.tar"]
    assert {name[9:]: c for name, c in packed.items()}["cat_gone.png"] == b""
    assert len(packed) == 2 * (len(files) + 1)
    assert "gone.png cannot be read" in capsys.readouterr().err


def test_what_pack_prints_names_its_own_shards_alone(pets, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a[1]"
    for pattern in (folder / "val-%02d.tar", folder / "%02d.tar"):
        assert run_main(monkeypatch, "pack", pets[0], pattern, "--shard-size", 7) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    assert "20 pictures in 3 shards" in printed
    (where,) = shlex.split(printed.split("--data ")[1])
    assert where == f"{folder}/{{00..02}}.tar"
    assert [Path(path).name for path in opened(where).paths] == ["00.tar", "01.tar", "02.tar"]
    assert opened(folder / "val-00.tar").sizes.tolist() == [7]  # a path, though it looks like more


def test_the_number_of_a_shard_is_in_its_file_s_name(pets, tmp_path):
    with pytest.raises(ValueError, match="in the file's name"):
        pack_module.pack(str(pets[0]), f"{tmp_path}/%d/p.tar")
    assert not list(tmp_path.glob("[0-9]*"))


def test_classes_left_by_an_earlier_pack_are_named_with_their_file(pets, tmp_path):
    pack(pets[0], tmp_path / "out" / "p-%d.tar")
    other = write_files(tmp_path / "other", {"cow/a.png": tile(1), "dog/b.png": tile(2)})
    with pytest.raises(ValueError, match="classes that train has not: cow.*out/pack.json"):
        pack_module.pack(str(other), f"{tmp_path}/out/q-%d.tar")


def test_ctrl_c_is_one_line(pets, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pack_module, "pack", interrupted)
    assert run_main(monkeypatch, "pack", pets[0], tmp_path / "p-%d.tar") == 130
    assert capsys.readouterr().err == "data.py: stopped: type the same command again\n"


# ------------------------------------------------------------------------------------ the toy world

VAL = toy.TOY_VAL  # the first number of val


def same_sample(one, other):
    assert one["image"]().tobytes() == other["image"]().tobytes()
    assert (one["boxes"]() == other["boxes"]()).all()
    assert one["class"] == other["class"]
    assert all(one[k]() == other[k]() for k in ("captions", "hashtags"))


def test_a_toy_sample_is_a_pure_function_of_its_number():
    numbers = [0, 1, 12345, VAL - 1, VAL, VAL + 7]
    samples = [toy.toy_sample(number) for number in numbers]
    for number, sample in reversed(list(zip(numbers, samples))):
        same_sample(sample, toy.toy_sample(number))
    assert len({sample["image"]().tobytes() for sample in samples}) == len(numbers)


def test_a_toy_scene_is_the_same_at_any_size():
    """Boxes scale with the picture; the picture agrees with the smaller one on average."""
    for number in range(5):
        small, large = (toy.toy_sample(number, size) for size in (48, 192))
        assert small["image"]().size == (48, 48) and large["image"]().size == (192, 192)
        assert np.allclose(small["boxes"]() * 4, large["boxes"](), atol=1e-3)
        shrunk = np.asarray(large["image"]().reduce(4), np.float64)
        assert np.abs(shrunk - np.asarray(small["image"]())).mean() < 6  # edges; seen: 3
        assert small["captions"]() == large["captions"]()


def test_toy_classes_are_about_equally_frequent_and_are_the_largest_objects_shape():
    scenes = [toy.toy_scene(number) for number in range(2000)]
    classes = []
    for number, scene in enumerate(scenes[:200]):
        largest = max(scene["objects"], key=lambda thing: thing["radius"])
        classes.append(toy.toy_sample(number, 16)["class"])
        assert toy.TOY_CLASSES[classes[-1]] == largest["shape"]
    firsts = Counter(scene["objects"][0]["shape"] for scene in scenes)
    assert set(firsts) == set(toy.TOY_CLASSES)
    assert chi_square(list(firsts.values())) < 1
    counts = Counter(len(scene["objects"]) for scene in scenes)
    assert set(counts) == {1, 2, 3, 4} and min(counts.values()) > 20
    assert json.loads(json.dumps(scenes[0])) == scenes[0]  # scenes are plain values


def test_held_out_pairs_are_never_in_train_and_all_in_val():
    def pairs(first):
        scenes = (toy.toy_scene(first + number) for number in range(3000))
        return Counter((o["colour"], o["shape"]) for scene in scenes for o in scene["objects"])

    train, late, val = pairs(0), pairs(VAL - 3000), pairs(VAL)
    every = {(colour, shape) for colour in toy.TOY_COLOURS for shape in toy.TOY_CLASSES}
    assert len(toy.TOY_HELD_OUT) >= 3
    assert set(train) == set(late) == every - toy.TOY_HELD_OUT
    assert set(val) == every


def test_toy_boxes_and_masks_fit_what_is_drawn():
    size = 160
    for number in [*range(25), *range(VAL, VAL + 5)]:
        scene = toy.toy_scene(number)
        sample = toy.toy_sample(number, size)
        masks, boxes = sample["masks"](), sample["boxes"]()
        assert masks.shape == (len(scene["objects"]), size, size) and boxes.dtype == np.float32
        assert masks.sum(axis=0).max() <= 1 and masks.any(axis=(1, 2)).all()
        assert boxes.min() >= 0 and boxes.max() <= size
        for thing, mask, box in zip(scene["objects"], masks, boxes):
            # The object alone: its mask's extent is its box. The outermost 3 pixels of a sharp
            # corner are thinner than half a pixel, which is when a pixel counts as covered.
            _, (alone,), (whole,) = toy.toy_render({**scene, "objects": [thing]}, size, masks=True)
            rows, columns = whole.any(axis=1).nonzero()[0], whole.any(axis=0).nonzero()[0]
            extent = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            assert (alone == box).all() and np.abs(box - extent).max() <= 3
            assert not (mask & ~whole).any()
        # Outside all masks there is background, but for pixels that an edge covers in part.
        empty, _, _ = toy.toy_render({**scene, "objects": []}, size)
        changed = (np.asarray(sample["image"]()) != np.asarray(empty)).any(axis=2)
        covered = np.pad(masks.any(axis=0), 2)
        near = np.zeros((size, size), dtype=bool)
        for dy in range(5):
            for dx in range(5):
                near |= covered[dy : dy + size, dx : dx + size]
        assert not (changed & ~near).any()
        assert changed[masks.any(axis=0)].mean() > 0.95


def test_toy_objects_have_the_colour_that_they_are_named_after_and_not_the_backgrounds():
    for number in range(60):
        scene = toy.toy_scene(number)
        assert scene["background"]["colour"] not in {o["colour"] for o in scene["objects"]}
        sample = toy.toy_sample(number, 96)
        pixels = np.asarray(sample["image"]()).astype(np.int64)
        for thing, mask in zip(scene["objects"], sample["masks"]()):
            if thing["pattern"] == "plain":
                colour = np.median(pixels[mask], axis=0)
                named = np.array(toy.TOY_COLOURS[thing["colour"]])
                assert np.abs(colour - named).max() <= 25  # colours vary by 24 levels


def test_toy_captions_and_hashtags_speak_of_the_scene():
    true_tags = 0
    for number in range(100):
        scene, sample = toy.toy_scene(number), toy.toy_sample(number, 16)
        words = re.sub(r"(plain|striped|dotted|checked) ", "", *sample["captions"]())
        for thing in scene["objects"]:
            assert re.search(rf"\b{thing['colour']} {thing['shape']}\b", words)
        assert scene["background"]["colour"] in words.rpartition(" on ")[2]
        tags = sample["hashtags"]()
        assert tags and len(set(tags)) == len(tags)
        assert all(re.fullmatch("#[a-z0-9]+", tag) for tag in tags)
        shape = toy.TOY_CLASSES[sample["class"]]
        true_tags += any(shape in tag for tag in tags)
    assert 40 < true_tags <= 100  # noisy, but about the picture


# ----------------------------------------------------------------------------------------- hashtags


def test_canonical_tags_by_hand():
    found = {
        "#Blue-Square": {"bluesquare"},
        "#\uff23\uff21\uff34": {"cat"},  # full-width letters
        "#Stra\u00dfe": {"strasse"},
        "#!?": set(),
        "#\u0928\u092e\u0938\u094d\u0924\u0947": {
            "\u0928\u092e\u0938\u094d\u0924\u0947"
        },  # marks stay
        "#kitten": {"cat"},
    }
    for tag, canonical in found.items():
        assert hashtags.canonical([tag], {"kitten": "cat"}) == canonical
    assert hashtags.canonical(["#a #b", "#c#d"], {}) == {"a", "b", "c", "d"}
    text = "My #Cat, and the #DOG! no tag, a#b (#\u0928\u092e\u0938\u094d\u0924\u0947) #blue-square"
    marks = "\u0928\u092e\u0938\u094d\u0924\u0947"
    assert hashtags.canonical(text, {}) == {"cat", "dog", "b", "bluesquare", marks}
    for wrong in ({"a": 1}, ["#a", 3], None, 7):
        with pytest.raises(ValueError, match="list of texts"):
            hashtags.canonical(wrong, {})


def tagged_members(tags_of_samples, kind="json"):
    for number, tags in enumerate(tags_of_samples):
        yield f"{number:05}.png", tile(number % 256)
        if tags is not None:
            yield (
                f"{number:05}.{kind}",
                tags if isinstance(tags, bytes) else json.dumps(tags).encode(),
            )


# Of 60 samples: "all" on 57, "half" on 29, "few" on 6; 3 without a tag.
LONG_TAIL = [
    [] if i in (1, 2, 3) else ["#all"] + ["#half"] * (i % 2 == 0) + ["#FEW"] * (i % 10 == 0)
    for i in range(60)
]


@pytest.fixture
def tagged(tmp_path):
    """Four shards of 15 samples with the tags of LONG_TAIL: their pattern."""
    for shard in range(4):
        write_tar(tmp_path / f"t-{shard}.tar", tagged_members(LONG_TAIL[15 * shard :][:15]))
    return f"{tmp_path}/t-*.tar"


def test_hashtags_of_all_that_may_hold_them(tmp_path):
    samples = [["#a", "b"], "we like #a", {"hashtags": ["#a"], "caption": "#no"}, {"x": 1}, None]
    source = opened(write_tar(tmp_path / "a.tar", tagged_members(samples)))
    found = [hashtags.canonical(source.read(i)["hashtags"](), {}) for i in range(5)]
    assert found == [{"a", "b"}, {"a"}, {"a"}, set(), set()]
    texts = [b"first #one", "\u00fcber #zw\u00f6lf".encode()]
    source = opened(write_tar(tmp_path / "b.tar", tagged_members(texts, "txt")))
    found = [hashtags.canonical(source.read(i)["hashtags"](), {}) for i in range(2)]
    assert found == [{"one"}, {"zw\u00f6lf"}]


IMG2DATASET = b'{"url": "http://x", "caption": "a #cat", "key": "0", "width": 4, "sha256": "0"}'
HASHTAGS_OF = [  # ({extension: bytes}, tags, None if damaged)
    ({"json": IMG2DATASET, "txt": b"a #cat and a #Dog"}, {"cat", "dog"}),
    ({"txt": b"a #cat", "json": IMG2DATASET}, {"cat"}),  # whichever comes first in the tar
    ({"json": b'{"hashtags": ["#a"]}', "txt": b"#b"}, {"a"}),
    ({"json": b'{"hashtags": "we like #a"}', "txt": b"#b"}, {"a"}),
    ({"json": b'{"hashtags": []}', "txt": b"#b"}, {"b"}),
    ({"json": b'{"hashtags": ["#", ""]}', "txt": b"#b"}, {"b"}),
    ({"json": b'{"hashtags": ""}', "txt": b"#b"}, {"b"}),
    ({"json": b'{"hashtags": "none"}', "txt": b"#b"}, {"b"}),
    ({"json": b'{"hashtags": null}', "txt": b"#b"}, {"b"}),
    ({"json": b"[]", "txt": b"#b"}, {"b"}),
    ({"json": b"null", "txt": b"#b"}, {"b"}),
    ({"json": b'"no tag"', "txt": b"#b"}, {"b"}),
    ({"json": b'["#a"]', "txt": b"#b"}, {"a"}),
    ({"json": b'{"hashtags": []}'}, set()),
    ({"json": IMG2DATASET}, set()),
    ({"json": IMG2DATASET, "txt": b"none"}, set()),
    ({}, set()),
    ({"json": b'{"hashtags": [3]}', "txt": b"#b"}, None),  # damaged is not "none"
    ({"json": b'{"hashtags": 5}', "txt": b"#b"}, None),
    ({"json": b'{"hashtags": false}', "txt": b"#b"}, None),
    ({"json": b"{broken", "txt": b"#b"}, None),
    ({"json": IMG2DATASET, "txt": b"caf\xe9 #b"}, None),
]


def test_hashtags_are_those_of_the_first_file_that_has_any(tmp_path, capsys):
    path = captioned(tmp_path / "a.tar", [files for files, _ in HASHTAGS_OF])
    pack_module.write_listing(data.Shards(path))
    expected = Counter(tag for _, tags in HASHTAGS_OF for tag in tags or ())
    names = [f"{number:05}" for number, (_, tags) in enumerate(HASHTAGS_OF) if tags is None]
    for where in (path, f"pipe:cat {path}"):
        source, _ = data.open_sources(where, cache=(f"{tmp_path}/cache", "1M"))
        for number, (_, tags) in enumerate(HASHTAGS_OF):
            found = source.read(number)["hashtags"]
            if tags is None:
                with pytest.raises(ValueError, match="the file of its hashtags is damaged"):
                    found()
            else:
                assert hashtags.canonical(found(), {}) == tags
        vocabulary = hashtags.count_hashtags(source, min_count=1)
        assert vocabulary.counts == expected
        lines = [line for line in capsys.readouterr().err.splitlines() if "unreadable" in line]
        assert [line.split(": ")[1][-5:] for line in lines] == names
        batch = data.Batches(source, (4, 4), 3, len(HASHTAGS_OF), vocabulary=vocabulary)[0]
        ids = [sorted(vocabulary.numbers[tag] for tag in tags or ()) for _, tags in HASHTAGS_OF]
        assert [[i for i in row if i >= 0] for row in batch["tags"].tolist()] == ids
        assert batch["weight"].tolist() == [float(bool(tags)) for _, tags in HASHTAGS_OF]
        assert [line.split(": ")[0][-5:] for line in batch["bad"]] == names


def test_hashtags_and_captions_are_read_only_where_they_are_used(tmp_path, monkeypatch):
    """Stage 1 uses neither, and its loader must not wait for them."""
    source = opened(captioned(tmp_path / "a.tar", [{"json": b'{"hashtags": ["#a"]}'}] * 3))
    monkeypatch.setattr(data.json, "loads", lambda content: pytest.fail("a .json was read"))
    batch = data.Batches(source, (4, 4), 3, 3)[0]
    assert batch["bad"] == [] and batch["weight"].tolist() == [1, 1, 1]


def test_a_vocabulary_counts_pictures_and_is_cut_at_both_ends(tagged):
    source = opened(tagged)
    vocabulary = hashtags.count_hashtags(source, min_count=1)
    assert vocabulary.counts == {"all": 57, "half": 29, "few": 6}  # most frequent first
    assert vocabulary.ids(["#few", "#nothing", "ALL", "all"]) == [0, 2]
    assert list(hashtags.count_hashtags(source, size=2, min_count=1).counts) == ["all", "half"]
    assert list(hashtags.count_hashtags(source, min_count=7).counts) == ["all", "half"]
    merged = hashtags.count_hashtags(source, min_count=1, synonyms={"few": "half"})
    assert merged.counts == {"all": 57, "half": 29} and merged.ids(["#FEW"]) == [1]
    with pytest.raises(ValueError, match="0 hashtags on 100 pictures") as error:
        hashtags.count_hashtags(source, min_count=100)
    one_line(error)


def test_counting_and_weighing_do_not_depend_on_chunks_and_workers(tagged, tmp_path, monkeypatch):
    found, sets = [], [{tag[1:].lower() for tag in tags} for tags in LONG_TAIL]
    for chunk, workers in ((4096, 0), (7, 0), (15, 2)):
        monkeypatch.setattr(hashtags, "TAG_CHUNK", chunk)
        assert list(hashtags.TagChunks(opened(tagged), {}).read(workers, "reading")) == sets
        out = tmp_path / f"tags-{chunk}"
        hashtags.write_hashtags(opened(tagged), out, 10, workers)
        found.append([(out / name).read_bytes() for name in ("vocabulary.json", "rarest.npy")])
    assert found[0] == found[1] == found[2]


def test_sampling_weights_by_hand(tagged, tmp_path):
    """Of the first 57: "few" on 6 is the tail. Head: weight ~ 54 ** -0.5, or 27 ** -0.5 with "half"."""
    source = opened(tagged)
    hashtags.write_hashtags(source, tmp_path / "tags", 10, min_count=1)
    vocabulary, train, held_out, draws = hashtags.open_hashtags(source, tmp_path / "tags")
    assert held_out.sizes.sum() == 3 and train.sizes.tolist() == [15, 15, 15, 12]  # 5 % of 60
    assert vocabulary.counts == {"all": 54, "half": 28, "few": 6}
    tags = LONG_TAIL[:57]
    drawn = [i for i, names in enumerate(tags) if names]
    importance = {
        i: (6 if "#FEW" in tags[i] else 28 if "#half" in tags[i] else 54) ** -0.5 for i in drawn
    }
    tail = {i for i in drawn if "#FEW" in tags[i]}
    sums = {part: sum(v for i, v in importance.items() if (i in tail) == part) for part in (0, 1)}
    weights = draws["weights"](0, 57) / data.WEIGHT
    for i in range(57):
        part = i in tail
        wanted = len(drawn) * (0.7, 0.3)[part] * importance.get(i, 0) / sums[part]
        assert weights[i] == pytest.approx(wanted, abs=1e-5)
    shards = [draws["weights"](first, min(first + 15, 57)) for first in (0, 15, 30, 45)]
    assert draws["totals"].tolist() == [units.sum() for units in shards]
    assert weights.sum() == pytest.approx(len(drawn), abs=1e-3)
    # And the order draws each sample as often: rounded in each epoch, exactly on average.
    order = data.Order(train.sizes, 0, 2, **draws)
    epochs, total = 500, Counter()
    for epoch in range(epochs):
        counts = epoch_counts(order, epoch)
        missing = [math.floor(weights[i]) - counts[i] for i in range(57)]
        assert sum(n for n in missing if n > 0) <= 1  # the sum of the weights is not whole
        assert all(counts[i] <= math.ceil(weights[i]) for i in range(57))
        total += counts
    for i in range(57):
        wanted = weights[i] * order.length / weights.sum()
        assert abs(total[i] / epochs - wanted) <= 5 * math.sqrt(0.25 / epochs) * (weights[i] > 0)


def test_where_all_is_head_or_tail_it_has_all_draws(tagged, tmp_path, capsys):
    source = opened(tagged)
    for tail_below, name in ((2, "head"), (100, "tail")):
        hashtags.write_hashtags(source, tmp_path / name, tail_below)
        assert f"all pictures are in the {name}" in capsys.readouterr().out
        totals = hashtags.open_hashtags(source, tmp_path / name)[3]["totals"]
        assert totals.sum() / data.WEIGHT == pytest.approx(54, abs=1e-3)


def test_an_index_of_hashtags_is_replaced_whole_or_not_at_all(tagged, tmp_path, capsys):
    source, out = opened(tagged), tmp_path / "tags"
    hashtags.write_hashtags(source, out)
    files = {path: path.read_bytes() for path in out.iterdir()}
    in_use = hashtags.open_hashtags(source, out)[3]["weights"]
    before = in_use(0, 10).tolist()
    with pytest.raises(ValueError, match="want two at least"):
        hashtags.write_hashtags(source, out, min_count=50)  # only one tag is that frequent
    assert {path: path.read_bytes() for path in out.iterdir()} == files
    hashtags.write_hashtags(source, out, min_count=1)
    assert "held an index already: it is replaced" in capsys.readouterr().out
    assert in_use(0, 10).tolist() == before  # a run that reads the earlier one goes on with it


def test_pack_does_not_take_train_and_val_for_classes(tmp_path):
    for name in ("train/a", "train/b", "val/a"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    with pytest.raises(ValueError, match="one after the other"):
        pack_module.pack(str(tmp_path), str(tmp_path / "%03d.tar"))


def test_an_unfinished_or_foreign_index_of_hashtags_is_refused(tagged, tmp_path):
    source, out = opened(tagged), tmp_path / "tags"
    hashtags.write_hashtags(source, out)
    (out / "rarest.npy").rename(out / "away")
    with pytest.raises(ValueError, match="no hashtags in") as error:
        hashtags.open_hashtags(source, out)
    one_line(error)
    (out / "away").rename(out / "rarest.npy")
    other = opened(write_tar(tmp_path / "other.tar", tagged_members(LONG_TAIL)))
    with pytest.raises(ValueError, match="of other data") as error:
        hashtags.open_hashtags(other, out)
    one_line(error)
    rarest = np.load(out / "rarest.npy")
    for name, content in (
        ("totals.npy", b""),
        ("totals.npy", npy(np.zeros(9, np.int64))),
        ("rarest.npy", npy(rarest + 1000)),
    ):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(content)
        hashtags.open_array.cache_clear()
        with pytest.raises(ValueError, match="python data.py hashtags") as error:
            hashtags.open_hashtags(source, out)
        one_line(error)
        (out / name).write_bytes(whole)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_unreadable_hashtags_are_named_and_counted_and_weigh_nothing(tmp_path, capsys):
    samples = [["#a"], b"{broken", ["#a", "#b"], [3], None]
    source = opened(write_tar(tmp_path / "a.tar", tagged_members(samples)))
    vocabulary = hashtags.count_hashtags(source, min_count=1)
    assert vocabulary.counts == {"a": 2, "b": 1}
    printed = capsys.readouterr()
    assert "unreadable hashtags: 2" in printed.out
    assert "a.tar:00001" in printed.err and "a.tar:00003" in printed.err
    batch = data.Batches(source, (4, 4), 3, 5, vocabulary=vocabulary)[0]
    assert batch["tags"].tolist() == [[0, -1], [-1, -1], [0, 1], [-1, -1], [-1, -1]]
    assert batch["weight"].tolist() == [1, 0, 1, 0, 0]
    assert [name.split(":")[1] for name in batch["bad"]] == ["00001", "00003"]  # not 4: no tags


def test_a_batch_holds_the_ids_of_its_tags(tagged):
    source = opened(tagged)
    vocabulary = hashtags.count_hashtags(source, min_count=1)
    batch = data.Batches(source, (4, 4), 3, 12, vocabulary=vocabulary)[0]
    ids = [
        [0] * (i not in (1, 2, 3)) + [1] * (i % 2 == 0 and i != 2) + [2] * (i % 10 == 0)
        for i in range(12)
    ]
    assert batch["tags"].tolist() == [row + [-1] * (3 - len(row)) for row in ids]
    assert batch["weight"].tolist() == [float(bool(row)) for row in ids]


def test_hashtags_on_the_command_line(tagged, tmp_path, monkeypatch, capsys):
    (tmp_path / "map.tsv").write_text("#Few\thalf\n\nALL\t#all\n")
    out = tmp_path / "out" / "tags"
    flags = ["--synonyms", tmp_path / "map.tsv", "--min-count", 2, "--workers", 0]
    assert run_main(monkeypatch, "hashtags", tagged, "--out", out, *flags) == 0
    assert "2 hashtags; 54 of 57 pictures are drawn" in capsys.readouterr().out
    content = json.loads((out / "vocabulary.json").read_text())
    assert content["tags"] == [
        {"tag": "all", "id": 0, "count": 54, "weight": content["tags"][0]["weight"]},
        {"tag": "half", "id": 1, "count": 28, "weight": content["tags"][1]["weight"]},
    ]
    (tmp_path / "bad.tsv").write_text("one column\n")
    (tmp_path / "two.tsv").write_text("a#b\tc\n")  # two tags in a cell
    (tmp_path / "both.tsv").write_text("a\tb\na\tc\n")
    (tmp_path / "chain.tsv").write_text("#Few\tfewer\nFEWER\thalf\n")
    (tmp_path / "circle.tsv").write_text("a\tb\nb\ta\n")
    for flag, value in (
        ("--synonyms", tmp_path / "chain.tsv"),
        ("--synonyms", tmp_path / "circle.tsv"),
        ("--min-count", 99),
        ("--synonyms", tmp_path / "two.tsv"),
        ("--synonyms", tmp_path / "both.tsv"),
        ("--synonyms", tmp_path / "bad.tsv"),
        ("--labels", "no"),
    ):
        assert (
            run_main(monkeypatch, "hashtags", tagged, "--out", tmp_path / "new", flag, value) == 2
        )
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "new" / "vocabulary.json").exists()


# ------------------------------------------------------------------------------ captions and tokens


def captioned(path, samples):
    """[{extension: bytes}] -> a shard of pictures with these files beside them: its path."""
    members = []
    for number, files in enumerate(samples):
        members.append((f"{number:05}.png", tile(number % 256)))
        members += [(f"{number:05}.{extension}", content) for extension, content in files.items()]
    return write_tar(path, members)


def test_captions_of_all_that_may_hold_them(tmp_path):
    expected = {
        b'{"caption": "a red star"}': ["a red star"],
        b'{"caption": ["a star", "\\u661f"], "title": "x"}': ["a star", "\u661f"],
        b'{"caption": null}': [],
        b'{"title": "a moon", "hashtags": ["#no"]}': [],
        b'["#tag"]': [],
        b'"we like #tags"': [],
        b'{"caption": 5}': None,  # from here on damaged
        b'{"caption": ["a", 5]}': None,
        b'{"caption": {"en": "a"}}': None,
        b'{"caption": "cut': None,
        b"\xff\xff": None,
        b"": None,
    }
    path = captioned(tmp_path / "a.tar", [{"json": content} for content in expected])
    pack_module.write_listing(data.Shards(path))
    for where in (path, f"pipe:cat {path}"):
        sources = [
            data.open_sources(where, cache=(f"{tmp_path}/cache", "1M"), caption_key=key)[0]
            for key in ("caption", "title")
        ]
        titles = [[], ["x"], [], ["a moon"], [], [], [], [], [], None, None, None]
        for source, wanted in zip(sources, (expected.values(), titles)):
            for number, texts in enumerate(wanted):
                found = source.read(number)["captions"]
                if texts is None:
                    with pytest.raises(ValueError, match="the file of its captions is damaged"):
                        found()
                else:
                    assert found() == texts


def test_a_text_file_is_one_caption_and_holds_hashtags_too(tmp_path):
    texts = ["a red\n  star #sky\n", " \n", "\ufeff\u0441\u043e\u0431\u0430\u043a\u0430"]
    files = [{"txt": text.encode()} for text in texts]
    files += [{"txt": b"caf\xe9 noir"}, {"txt": b"the text", "json": b'{"id": 7}'}]
    files += [{"txt": b"the text", "json": b'{"caption": "the json"}'}, {}]
    files += [{"txt": b"the text", "json": b'{"caption": %s}' % c} for c in (b'""', b'[" ", "#"]')]
    source = opened(captioned(tmp_path / "a.tar", files))
    found = [source.read(number)["captions"]() for number in range(9)]
    assert found[7:] == [["the text"]] * 2  # a caption of no word hides nothing
    assert found[:7] == [["a red\n  star #sky"], [], ["\u0441\u043e\u0431\u0430\u043a\u0430"],
                     ["caf\ufffd noir"], ["the text"], ["the json"], []]  # fmt: skip
    assert hashtags.canonical(source.read(0)["hashtags"](), {}) == {"sky"}


def test_captions_of_a_folder_come_from_its_labels(tmp_path, capsys):
    folder = write_files(tmp_path / "p", {f"{name}.png": tile(i) for i, name in enumerate("abc")})
    rows = ["path,caption", "a.png,a dog", '"./a.png","a ""big"" dog, or two"', "b.png,", "c.png,x"]
    lines = ['{"path": "a.png", "caption": ["a dog", "a \\"big\\" dog, or two"]}']
    lines += ['{"path": "b.png", "caption": ""}', '{"path": "c.png", "caption": "x"}']
    files = {
        "a.csv": rows,
        "b.csv": [row.replace("caption", "title") for row in rows],
        "c.csv": ["class,caption,path", *(f"cat,{row[6:]},a.png" for row in rows[1:2])],
        "a.jsonl": lines,
        "b.jsonl": ['{"path": "a.png", "caption": "a dog"}', lines[0].replace('"a dog", ', "")]
        + lines[1:],
    }
    write_files(tmp_path, {name: "\n".join(text).encode() for name, text in files.items()})
    identities = set()
    for name, key in (("a.csv", "caption"), ("b.csv", "title"), ("a.jsonl", "caption"),
                      ("b.jsonl", "caption")):  # fmt: skip
        source, _ = data.open_sources(folder, labels=f"{tmp_path}/{name}", caption_key=key)
        found = {path: source.read(i)["captions"]() for i, path in enumerate(source.paths)}
        assert found == {"a.png": ["a dog", 'a "big" dog, or two'], "b.png": [""], "c.png": ["x"]}
        identities.add(source.identity)
    assert capsys.readouterr().err == "" and len(identities) == 1
    source, _ = data.open_sources(folder, labels=f"{tmp_path}/c.csv")
    assert source.read(0)["captions"]() == ["a dog"] and source.classes == ["cat"]
    (tmp_path / "a.csv").write_text("\n".join([*rows, "c.png,y"]))  # another data set
    source, _ = data.open_sources(folder, labels=f"{tmp_path}/a.csv")
    assert source.identity not in identities
    assert all(opened(folder).read(number)["captions"]() == [] for number in range(3))


def test_captions_of_a_csv_keep_their_spaces(tmp_path):
    """They are part of what a checkpoint compares. Paths and classes are stripped."""
    folder = write_files(tmp_path / "p", {f"{name}.png": tile(0) for name in "abc"})
    text = 'path,caption\na.png, a cat \nb.png,"a ""big"" dog, or two "\nc.png, a "b" c\n'
    (tmp_path / "a.csv").write_text(text)
    source, _ = data.open_sources(folder, labels=f"{tmp_path}/a.csv")
    found = {path: source.read(number)["captions"]() for number, path in enumerate(source.paths)}
    expected = {"a.png": [" a cat "], "b.png": ['a "big" dog, or two '], "c.png": [' a "b" c']}
    assert found == expected
    assert source.identity == "3 pictures, 1a7ee00735acd09f"  # as before spaces were looked at
    (tmp_path / "a.csv").write_text(
        'class, caption ,path\n cat , a "b" c, a.png \n"dog, 2",x,b.png'
    )
    found = labels_module.read_labels(f"{tmp_path}/a.csv")
    assert found == {
        "a.png": {"class": "cat", "captions": [' a "b" c']},
        "b.png": {"class": "dog, 2", "captions": ["x"]},
    }


def test_damaged_captions_of_labels_are_counted_and_left_out(tmp_path, capsys):
    rows = ["path,caption", "a.png,a dog", "b.png,a dog, too", "c.txt,a", "d.png", "a.png,more"]
    write_files(tmp_path, {"a.csv": "\n".join(rows).encode() + b"\nf.png,caf\xe9"})
    assert labels_module.read_labels(f"{tmp_path}/a.csv") == {
        "a.png": {"captions": ["a dog", "more"]}
    }
    assert "a.csv: entries" in (printed := capsys.readouterr().err) and ": 4" in printed
    lines = ['{"path": "a.png", "caption": 5}', '{"path": "b.png", "caption": ["x", null]}']
    lines += ['{"path": "c.png", "class": 1, "caption": "x"}', '{"path": "d.png", "caption": null}']
    lines += ['{"path": "c.png", "class": 2, "caption": "y"}']
    write_files(tmp_path, {"a.jsonl": "\n".join(lines).encode()})
    expected = {"c.png": {"class": "1", "captions": ["x"]}, "d.png": {"captions": []}}
    assert labels_module.read_labels(f"{tmp_path}/a.jsonl") == expected
    assert ": 3" in capsys.readouterr().err


def test_labels_without_captions_are_the_data_set_they_were(tmp_path):
    """What earlier versions said of this data: checkpoints and packed shards hold it."""
    folder = write_files(tmp_path / "p", {"a.png": tile(0), "b.png": tile(1)})
    lines = ['{"path": "a.png", "class": 1, "hashtags": ["#x"]}', '{"path": "b.png", "class": 2}']
    write_files(tmp_path, {"labels.jsonl": "\n".join(lines).encode()})
    source, _ = data.open_sources(folder, labels=f"{tmp_path}/labels.jsonl")
    assert source.identity == "2 pictures, e23d8e52339fdadb"


def test_all_captions_of_a_source_are_read_without_its_pictures(tmp_path, monkeypatch, capsys):
    files = [{"json": b'{"caption": ["a #dog", "b"]}'}, {"json": b"{cut"}, {"txt": b"c"}, {}]
    path = captioned(tmp_path / "a.tar", files)
    monkeypatch.setattr(data.Image, "open", None)
    assert lit.all_captions(opened(path)) == [["a #dog", "b"], [], ["c"], []]
    printed = capsys.readouterr().err
    assert "unreadable caption: " in printed and f"{path}:00001" in printed
    assert lit.all_captions(data.Part(opened("toy"), [5])) == [toy.toy_sample(5)["captions"]()]


def test_cleaned_captions_by_hand():
    for text, expected in {
        "a red star": "a red star",
        "  #red #star#sky\r\n\tat\u00a0night\u3000 ": "red star sky at night",
        "a\x00b\x1b[0m\x7f\u2028c": "a b [0m c",
        "\uff03\u72ac #": "\u72ac",
        "# \n": "",
        "": "",
        "\u0928\u092e\u0938\u094d\u0924\u0947": "\u0928\u092e\u0938\u094d\u0924\u0947",
        "\U0001f468\u200d\U0001f467": "\U0001f468\u200d\U0001f467",  # the joiner is part of it
    }.items():
        assert lit.clean(text) == expected == lit.clean(expected)


ODD_TEXTS = [
    *("", " ", "\x00", "a\x00b", "a\tb\nc\r\n", "\x07\x1b[0m", "\ufeffbom", "\u2581x", "  a  b  "),
    *("שלום", "\u200f\u202eثعلب\u202c", "日本語", "नमस्ते", "e\u0301 \u00e9", "\ufb01ne \uff21"),
    *("\U0001f468\u200d\U0001f469\u200d\U0001f467", "👍🏽🇫🇷", "\u2764\ufe0f"),
]


def test_tokens_of_bytes_by_hand():
    tokenizer = lit.open_tokenizer(None)
    assert tokenizer.vocabulary == 260
    tokens = tokenizer(["ab", "", "\u00e9\n"], 77)
    assert tokens.dtype == torch.int64 and tokens.tolist() == [
        [0, 4 + 97, 4 + 98, 2, 1, 1, 1, 1],
        [0, 2, 1, 1, 1, 1, 1, 1],
        [0, 4 + 0xC3, 4 + 0xA9, 4 + 10, 2, 1, 1, 1],
    ]
    assert tokenizer(["\ud83d x"], 77).tolist() == tokenizer(["? x"], 77).tolist()
    for text in ODD_TEXTS:
        (row,) = tokenizer([text], 100).tolist()
        end = row.index(2)
        assert row[0] == 0 and set(row[end + 1 :]) <= {1} and len(row) % 8 == 0
        assert bytes(token - 4 for token in row[1:end]).decode() == text


def test_a_row_of_tokens_is_cut_at_the_context_and_few_widths_occur():
    tokenizer = lit.open_tokenizer(None)
    text = "abcdefghijkl" * 1000
    for context in (1, 5, 6, 7, 77, 100):
        for length in (0, 1, 5, 6, 7, 40, 76, 77, 78, 12_000):
            tokens = tokenizer([text[:length], "", text[:length]], context)
            kept = min(length, context)
            for row in tokens[::2].tolist():
                ids = [4 + ord(letter) for letter in text[:kept]]
                assert row == [0, *ids, 2] + [1] * (tokens.shape[1] - kept - 2)
            assert tokens.shape[1] == min(-(-(kept + 2) // 8) * 8, context + 2)


SENTENCES = [
    "a large red striped star on plain green ground and a small blue circle",
    "the quick brown fox jumps over the lazy dog twice on sundays",
    "быстрая лиса прыгает через ленивую собаку",
    "الثعلب البني السريع يقفز فوق الكلب الكسول",
    "敏捷的棕色狐狸跳过了懒狗 今天天气很好",
    "नमस्ते दुनिया यह एक छोटा वाक्य है",
    "red heart ❤️ smile 😀 family 👨\u200d👩\u200d👧 thumbs 👍🏽",
]


def train_sentencepiece(path, **options):
    sentencepiece = pytest.importorskip("sentencepiece")
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_writer=content,
        vocab_size=400,
        hard_vocab_limit=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    path.write_bytes(content.getvalue())
    return str(path)


@pytest.fixture(scope="session")
def pieces(tmp_path_factory):
    """A file like XLM-R's, trained on sentences of five scripts and emoji: its path."""
    return train_sentencepiece(tmp_path_factory.mktemp("xlmr") / "sentencepiece.bpe.model")


def test_ids_of_sentencepiece_in_fairseqs_order(pieces):
    """<s> <pad> </s> <unk>, then sentencepiece's own pieces, from its fourth on; <mask> last."""
    from sentencepiece import SentencePieceProcessor

    model, tokenizer = SentencePieceProcessor(model_file=pieces), lit.open_tokenizer(pieces)
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    names += [model.id_to_piece(number) for number in range(3, model.vocab_size())] + ["<mask>"]
    assert len(names) == tokenizer.vocabulary
    for text in [*SENTENCES, "a red star"]:
        (row,) = tokenizer([text], 100).tolist()
        found = [names[token] for token in row[1 : row.index(2)]]
        assert found == model.encode(text, out_type=str) and "".join(found).strip("\u2581")
    (row,) = tokenizer(["a \u2603 star"], 100).tolist()  # a snowman was not in the sentences
    assert [names[token] for token in row].count("<unk>") == 1
    assert tokenizer(["", " "], 100).tolist() == [[0, 2, 1, 1, 1, 1, 1, 1]] * 2
    # What looks like a mark in a text is text.
    assert {1, 2, tokenizer.vocabulary - 1}.isdisjoint(tokenizer.ids("<s> </s> <pad> <mask>"))


def test_ids_of_sentencepiece_are_those_of_transformers(pieces):
    pytest.importorskip("google.protobuf")  # transformers reads the file with it
    reference = pytest.importorskip("transformers").XLMRobertaTokenizer
    reference = reference.from_pretrained(os.path.dirname(pieces))
    tokenizer = lit.open_tokenizer(pieces)
    assert tokenizer.vocabulary == len(reference) == reference.mask_token_id + 1
    for text in [*SENTENCES, *ODD_TEXTS, "a red star " * 1000]:
        ids = reference(text, truncation=True, max_length=102)["input_ids"]
        (row,) = tokenizer([text], 100).tolist()
        assert row == ids + [1] * (len(row) - len(ids)), text


@pytest.mark.parametrize("file", [False, True])
def test_any_text_has_tokens_soon(file, request):
    tokenizer = lit.open_tokenizer(request.getfixturevalue("pieces") if file else None)
    lengthy = [
        "star " * 2000,
        "a" * 10_000,
        "\U0001f600" * 10_000,
        "\u0643" * 10_000,
        "\x00" * 10_000,
    ]
    texts = [*ODD_TEXTS, "\ud800", "a\udcffb\udfff", *lengthy]
    began = time.monotonic()
    tokens = tokenizer(texts, 100)
    assert time.monotonic() - began < 1  # seen: 0.02
    assert tokens.shape == (len(texts), 102) and tokens.max() < tokenizer.vocabulary
    assert (tokens[:, 0] == 0).all() and ((tokens == 2).sum(1) == 1).all()
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(texts, 100), tokens)


def test_a_tokenizer_says_which_it_is(pieces, tmp_path):
    other = train_sentencepiece(tmp_path / "other.model", normalization_rule_name="identity")
    copy = shutil.copy(pieces, tmp_path / "copy.model")
    found = [lit.open_tokenizer(path).identity for path in (pieces, copy, other, None)]
    assert found[0] == found[1] and len(set(found)) == 3


def test_a_wrong_tokenizer_file_is_one_line_that_names_it(pieces, tmp_path, monkeypatch):
    whole = Path(pieces).read_bytes()
    files = {"empty": b"", "cut": whole[:-3], "text": b"hello", "tar": bytes(10_240)}
    write_files(tmp_path, files)
    train_sentencepiece(tmp_path / "t5", unk_id=2, bos_id=-1, eos_id=1, pad_id=0)
    (tmp_path / "folder").mkdir()
    for name in (*files, "t5", "folder", "missing"):
        with pytest.raises(ValueError, match=f"{tmp_path}/{name} is no tokenizer") as error:
            lit.open_tokenizer(f"{tmp_path}/{name}")
        one_line(error)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match="pip install sentencepiece") as error:
        lit.open_tokenizer(pieces)
    assert pieces in one_line(error)


class Captioned(Memory):
    """Sample n has n % 4 captions."""

    def read(self, number):
        captions = [f"#caption {c} of {number}" for c in range(number % 4)]
        return super().read(number) | {"captions": lambda: captions}


def text_of(row):
    """The text of a row of byte tokens."""
    return bytes(token - 4 for token in row.tolist() if token >= 4).decode()


def captioned_batches(process=0, processes=1, **options):
    order = data.Order(SIZES, seed=4, lanes=6)
    tokenizer, dealt = lit.open_tokenizer(None), {"process": process, "processes": processes}
    return data.Batches(
        Captioned(SIZES), order=order, tokenizer=tokenizer, **dealt, **BATCH, **options
    )


def test_a_caption_is_drawn_by_a_key_of_its_own():
    order, seen = data.Order(SIZES, seed=4, lanes=6), Counter()
    batches = captioned_batches(pictures=False)
    for step in range(120):  # 29 epochs
        batch = batches[step]
        for row, position in enumerate(range(step * 12, step * 12 + 12)):
            number = order(position)
            bits = int(data.random_bits(1, 4, position // 50, position, data.CAPTION)[0])
            captions = [f"caption {c} of {number}" for c in range(number % 4)] or [""]
            text = captions[bits % len(captions)]
            assert text_of(batch["tokens"][row]) == text and batch["samples"][row] == number
            assert batch["weight"][row] == bool(text)
            seen[text] += 1
    assert len(seen) == 1 + sum(number % 4 for number in range(50))  # every caption came


def test_captions_change_nothing_else_that_is_drawn():
    for step in STEPS:
        batch, expected = captioned_batches()[step], training_batches()[step]
        assert batch.pop("tokens").shape[0] == 12
        same_batch(batch | {"weight": expected["weight"]}, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_tokens_do_not_depend_on_processes_and_workers(workers):
    parts = [list(data.loader(captioned_batches(p, 2), range(3), workers)) for p in range(2)]
    for step in range(3):
        whole = captioned_batches()[step]
        position = torch.cat([part[step]["positions"] for part in parts]).argsort()
        for name in ("samples", "weight"):
            joined = torch.cat([part[step][name] for part in parts])[position]
            assert torch.equal(joined, whole[name]), name
        texts = [text_of(row) for part in parts for row in part[step]["tokens"]]
        assert [texts[i] for i in position] == [text_of(row) for row in whole["tokens"]]


def test_without_an_order_the_first_caption_comes_and_what_has_none_weighs_nothing(tmp_path):
    texts = b'{"caption": ["#", "  a \\n#dog", "b"]}', b"{cut", b'{"caption": "c"}'
    files = [{"json": text} for text in texts] + [{"txt": b"d\xe9"}, {}, {"txt": b" #\n"}]
    source = opened(captioned(tmp_path / "a.tar", files))
    batch = data.Batches(source, (4, 4), 3, 8, tokenizer=lit.open_tokenizer(None), context=5)[0]
    found = [text_of(row) for row in batch["tokens"]]
    assert found == ["a dog", "", "c", "d\ufffd", "", "", "", ""]
    assert batch["weight"].tolist() == [1, 0, 1, 1, 0, 0, 0, 0]
    assert batch["samples"].tolist() == [0, 1, 2, 3, 4, 5, -1, -1]
    assert batch["tokens"][4].tolist() == [0, 2, 1, 1, 1, 1, 1]
    (line,) = batch["bad"]
    assert "a.tar:00001" in line and "damaged" in line
    batch = data.Batches(source, (4, 4), 3, 8)[0]  # who wants no captions misses none
    assert batch["weight"].tolist() == [1] * 6 + [0] * 2 and "tokens" not in batch


def test_a_sample_wants_both_a_caption_and_a_tag_where_both_are_looked_for(tmp_path):
    vocabulary = hashtags.Vocabulary({"dog": 1}, {})
    files = [{"txt": text} for text in (b"a #dog", b"a dog")] + [{"json": b'["dog"]'}]
    source = opened(captioned(tmp_path / "a.tar", files))
    wanted = {"tokenizer": lit.open_tokenizer(None), "vocabulary": vocabulary}
    assert data.Batches(source, (4, 4), 3, 3, **wanted)[0]["weight"].tolist() == [1, 0, 0]


def test_batches_without_pictures_open_none():
    class Unopened(Captioned):
        def read(self, number):
            return super().read(number) | {"image": lambda: pytest.fail("opened")}

    batches, whole = captioned_batches(pictures=False), captioned_batches()[1]
    batches.source = Unopened(SIZES)
    batch = batches[1]
    assert batch["images"].shape == (12, 3, 0, 0)
    same_batch(batch | {"images": whole["images"]}, whole)


# ---------------------------------------------------------------------------- shards from elsewhere


class Server(ThreadingHTTPServer):
    """A web server of a folder, for one test, which misbehaves as `faults` say.

    faults    {name: function(handler, content) -> whether it has answered}, tried at each request
    requests  [(name, Range header or None)]
    """

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.requests = folder, {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def asked(self):
        return Counter(name for name, _ in self.requests)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        name, wanted = urllib.parse.unquote(self.path[1:]), self.headers["Range"]
        self.server.requests.append((name, wanted))
        path = Path(self.server.folder, name)
        content = path.read_bytes() if path.is_file() else None
        if name in self.server.faults and self.server.faults[name](self, content):
            return
        if content is None:
            return self.send_error(404)
        if wanted:
            return self.give(content, int(wanted[6:-1]))
        self.give(content)

    def give(self, content, start=None, length=None, cut=None):
        """From `start` on as a range; with a Content-Length of `length`; cut after `cut` bytes."""
        self.send_response(200 if start is None else 206)
        if start is not None:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            content = content[start:]
        if length != "none":
            self.send_header("Content-Length", length or len(content))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content[:cut])
        self.close_connection = True
        return True

    def log_message(self, *_):
        pass


@pytest.fixture
def remote(shards, tmp_path, monkeypatch, capsys):
    """(server of the five shards of 23 samples and their index.json, pattern, cache folder)."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(remote_module, "PATIENCE", 1)
    monkeypatch.setattr(remote_module, "TIMEOUT", 0.3)
    folder, pattern = shards
    pack_module.write_listing(data.Shards(pattern))
    server = Server(folder)
    capsys.readouterr()
    yield server, f"{server.url}/s-{{00..04}}.tar", tmp_path / "cache"
    server.shutdown()
    server.server_close()


def opened_remote(pattern, cache, size="1M"):
    return data.open_sources(str(pattern), cache=(str(cache), size))[0]


def samples_of(source):
    """everything() without the places: the same wherever the shards are."""
    return [(name[-5:], label, pixels) for name, label, pixels in everything(source)]


def times(count, fault):
    """A fault that comes `count` times."""
    left = [count]

    def fails(handler, content):
        left[0] -= 1
        return left[0] >= 0 and fault(handler, content)

    return fails


def slow(handler, content):
    time.sleep(0.5)
    return handler.give(content)


def trickle(handler, content):
    """Slow, but never silent for long."""
    handler.send_response(200)
    handler.end_headers()
    for start in range(0, len(content), 4000):
        handler.wfile.write(content[start : start + 4000])
        time.sleep(0.02)
    return True


def hang_up(handler, content):
    handler.close_connection = True
    return True


def another_range(handler, content):
    if not handler.headers["Range"]:
        return handler.give(content, cut=1000)
    return handler.give(content[:-300], start=700)  # as long as what was asked for


FAULTS = {
    "says nothing for too long": times(1, slow),
    "slow, without a length": trickle,
    "hangs up": times(2, hang_up),
    "500": times(2, lambda handler, content: handler.send_error(500) or True),
    "429": times(1, lambda handler, content: handler.send_error(429) or True),
    "cut, knows ranges": times(1, lambda handler, content: handler.give(content, cut=1500)),
    "always cut, knows ranges": lambda handler, content: handler.give(
        content, int((handler.headers["Range"] or "bytes=0-")[6:-1]), cut=9000
    ),
    "cut, knows no ranges": times(2, lambda handler, content: handler.give(content, cut=1500)),
    "cut with a length of its own": times(
        1, lambda handler, content: handler.give(content[:1500], length=1500)
    ),
    "cut without a length": times(
        1, lambda handler, content: handler.give(content[:1500], length="none")
    ),
    "too long": times(1, lambda handler, content: handler.give(content + b"more", length="none")),
    "another range": times(2, another_range),
    "refuses the range": times(
        2,
        lambda handler, content: (
            handler.send_error(416) or True
            if handler.headers["Range"]
            else handler.give(content, cut=1500)
        ),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_a_server_does_the_samples_are_right(remote, shards, fault):
    server, pattern, cache = remote
    fresh = FAULTS[fault]
    server.faults = {"s-03.tar": fresh}
    source = opened_remote(pattern, cache)
    assert samples_of(source) == samples_of(opened(shards[1]))
    assert source.identity == opened(shards[1]).identity  # so a run may move between them
    assert server.asked()["s-03.tar"] > 1 or fault == "slow, without a length"
    assert not list(cache.glob("*.part"))


UNREACHABLE = {
    "500": lambda handler, content: handler.send_error(500) or True,
    "always cut": lambda handler, content: handler.give(content, cut=1500),
    "always short": lambda handler, content: handler.give(content[:1500]),
    "silent": slow,
    "gone": None,
}


@pytest.mark.parametrize("fault, workers", [*zip(UNREACHABLE, [0] * 5), ("500", 1)])
def test_what_cannot_be_had_is_one_clear_line_and_not_a_bad_sample(
    remote, fault, workers, monkeypatch
):
    # A DataLoader waits so long for a worker that has failed, before it ends it: 5 s.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    server, pattern, cache = remote
    batches = training_batches(source=opened_remote(pattern, cache))
    server.faults = dict.fromkeys([f"s-{n:02}.tar" for n in range(5)], UNREACHABLE[fault])
    if fault == "gone":
        server.shutdown()
        server.server_close()
    began = time.monotonic()
    with pytest.raises(
        data.Unreachable, match=f"^{server.url}/s-0..tar: .*same command goes on"
    ) as error:
        list(data.loader(batches, range(2), workers))
    assert "Traceback" not in one_line(error) and time.monotonic() - began < 10
    assert not list(cache.glob("*.tar"))  # what a worker that was ended had begun is no shard


@pytest.mark.parametrize("code", [403, 404, 410])
def test_a_shard_that_is_missing_weighs_nothing_and_is_asked_for_once(remote, shards, code):
    server, pattern, cache = remote
    server.faults["s-03.tar"] = lambda handler, content: handler.send_error(code) or True
    batches = data.Batches(opened_remote(pattern, cache), (4, 4), 3, 23)
    local = data.Batches(opened(shards[1]), (4, 4), 3, 23)[0]
    batch = batches[0]
    assert batch["weight"].tolist() == [1] * 8 + [0] * 12 + [1] * 3
    assert torch.equal(batch["images"][batch["weight"] > 0], local["images"][batch["weight"] > 0])
    assert len(batch["bad"]) == 12 and not batch["images"][8:20].any()
    assert all(line.startswith(f"{server.url}/s-03.tar: sample ") for line in batch["bad"])
    assert all(f"HTTP {code}" in line for line in batch["bad"])
    assert server.asked()["s-03.tar"] <= 2  # by who reads, and by who fetches ahead


def test_a_local_shard_that_goes_missing_weighs_nothing(shards):
    batches = data.Batches(opened(shards[1]), (4, 4), 3, 23)
    (shards[0] / "s-03.tar").unlink()
    assert batches[0]["weight"].tolist() == [1] * 8 + [0] * 12 + [1] * 3


def test_what_has_come_once_is_not_fetched_again(remote):
    server, pattern, cache = remote
    first = everything(opened_remote(pattern, cache))
    assert server.asked() == {"index.json": 1} | {f"s-{n:02}.tar": 1 for n in (0, 2, 3, 4)}
    assert everything(opened_remote(pattern, cache)) == first
    assert server.asked()["index.json"] == 2 and server.asked().total() == 6


def read_all(pattern, cache, size, seed, answers):
    """Read all samples, in an order of its own, and say what they were. (In a process.)"""
    source = opened_remote(pattern, cache, size)
    found = {}
    for number in np.random.RandomState(seed).permutation(3 * 23) % 23:
        found[int(number)] = np.asarray(source.read(number)["image"]()).tolist()
    answers.put(found)


def folder_size(folder):
    total = 0
    for path in Path(folder).glob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_the_cache_is_never_over_its_size_while_two_processes_read_through_it(remote, shards):
    server, pattern, cache = remote
    cache.mkdir()
    write_files(cache, {"mine.tar": b"not of the cache"})
    context = multiprocessing.get_context("fork")
    answers, largest = context.Queue(), 0
    readers = [
        context.Process(target=read_all, args=(pattern, cache, "70K", seed, answers))
        for seed in range(2)
    ]
    [reader.start() for reader in readers]
    while any(reader.is_alive() for reader in readers) and answers.qsize() < 2:
        largest = max(largest, folder_size(cache))
        time.sleep(0.0005)
    expected = {n: pixels for n, (*_, pixels) in enumerate(everything(opened(shards[1])))}
    for _ in readers:
        assert answers.get(timeout=60) == expected
    [reader.join() for reader in readers]
    assert 40_000 < largest <= 70_000
    assert server.asked().total() > 2 + 5  # there was not room for all
    assert (cache / "mine.tar").read_bytes() == b"not of the cache"


@pytest.mark.parametrize("ending", ["killed", "damaged"])
def test_what_was_left_of_a_fetch_is_not_used(remote, shards, ending):
    server, pattern, cache = remote
    server.faults["s-03.tar"] = trickle
    source = opened_remote(pattern, cache)
    if ending == "killed":
        reader = multiprocessing.get_context("fork").Process(target=source.read, args=(10,))
        reader.start()
        while not list(cache.glob("*.part")) or len(server.requests) < 2:
            time.sleep(0.001)
        time.sleep(0.05)
        reader.kill()
        reader.join()
        (left,) = cache.glob("*.part")
    else:
        left = Path(f"{source.cache.path(source.where(10))}.part")
        left.write_bytes((shards[0] / "s-03.tar").read_bytes()[:5000] + bytes(60_000))
    source.read(0)  # room is made for another shard
    assert not left.exists() and not list(cache.glob("*.part"))
    assert samples_of(source) == samples_of(opened(shards[1]))


DAMAGED_COPIES = {
    "another number": lambda tar, index: tar + index[:72] + b"\x01" + index[73:],
    "two samples in each other's place": lambda tar, index: (
        tar + index[:64] + index[80:96] + index[64:80] + index[96:]
    ),
    "fewer samples": lambda tar, index: tar + index[:16] + b"\x05" + index[17:],
    "of numpy": lambda tar, index: tar + npy(np.arange(24).reshape(12, 2)),
    "cut in the index": lambda tar, index: tar + index[:-3],
    "no index": lambda tar, index: tar,
    "cut in the tar": lambda tar, index: tar[:9000],
    "empty": lambda tar, index: b"",
}


@pytest.mark.parametrize("damage", DAMAGED_COPIES)
def test_a_copy_in_the_cache_that_is_damaged_is_fetched_again(remote, shards, damage):
    server, pattern, cache = remote
    source, expected = opened_remote(pattern, cache), samples_of(opened(shards[1]))
    assert samples_of(source) == expected
    copy, size = Path(source.cache.path(source.where(10))), (shards[0] / "s-03.tar").stat().st_size
    content = copy.read_bytes()
    copy.write_bytes(DAMAGED_COPIES[damage](content[:size], content[size:]))
    assert samples_of(opened_remote(pattern, cache)) == expected
    assert copy.read_bytes() == content and server.asked()["s-03.tar"] == 2
    assert samples_of(opened_remote(pattern, cache)) == expected
    assert server.asked()["s-03.tar"] == 2 and server.asked()["s-00.tar"] == 1


def test_a_copy_in_the_cache_that_is_always_damaged_is_counted(remote, monkeypatch):
    _, pattern, cache = remote
    monkeypatch.setattr(remote_module, "index_bytes", lambda *_: bytes(64))
    batch = data.Batches(opened_remote(pattern, cache), (4, 4), 3, 8)[0]
    assert batch["weight"].tolist() == [0] * 8
    assert all("damaged" in line and "s-0" in line for line in batch["bad"])


def test_a_shard_in_the_cache_that_is_used_outlives_one_that_is_not(remote):
    server, pattern, cache = remote
    source, now = opened_remote(pattern, cache, "66K"), time.monotonic()  # room for three

    def read(number):  # each a minute after the other
        nonlocal now
        now += 60
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data.time, "monotonic", lambda: now)
            source.read(number)

    for number in (8, 0, 20):  # of s-03, s-00 and s-04
        read(number)
    read(8)
    read(7)  # s-02
    read(8)
    assert server.asked() == {"index.json": 1} | {f"s-{n:02}.tar": 1 for n in (0, 2, 3, 4)}
    read(0)
    assert server.asked()["s-00.tar"] == 2


def test_who_finds_no_room_waits_for_those_who_are_fetching(remote):
    _, pattern, cache = remote
    source = opened_remote(pattern, cache, "66K")
    with remote_module.locked(f"{cache}/cached-{'0' * 16}.tar.part", "xb") as others:
        others.truncate(40_000)
        reader = threading.Thread(target=source.read, args=(10,))
        reader.start()
        reader.join(0.3)
        assert reader.is_alive() and folder_size(cache) <= 66_000
    reader.join(10)
    assert not reader.is_alive() and source.cache.has(source.where(10))


def test_shards_of_a_pipe(shards, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(remote_module, "PATIENCE", 0.2)
    folder, pattern = shards
    pack_module.write_listing(data.Shards(pattern))
    local = opened(pattern)
    for command in ("cat {}", "cat '{}' | cat", "echo '{a}' >&2; cat {} -", "dd if={}"):
        source = opened_remote("pipe:" + command.replace("{}", pattern), tmp_path / "cache")
        assert samples_of(source) == samples_of(local) and source.identity == local.identity
    failing = {
        "cat {} && echo first >&2 && echo no such bucket >&2 && exit 3": "exit status 3: no such bucket",
        "cat {} | head -c 9999": "cut after 9999 of",
        "cat {} {}.index": "more than the",
    }
    for command, why in failing.items():
        source = remote_module.RemoteShards("pipe:cat " + pattern, str(tmp_path / "other"), "1M")
        source.paths[3] = "pipe:" + command.replace("{}", f"{folder}/s-03.tar")
        source.cache.shards[source.paths[3]] = 30720
        with pytest.raises(data.Unreachable, match=why) as error:
            source.read(10)
        assert one_line(error).startswith(source.paths[3])
    assert not list((tmp_path / "other").glob("*.tar"))


def test_remote_names_and_caches_may_be_odd(remote, shards, tmp_path):
    """Addresses are written as they are or, as browsers do, with %20 for a space."""
    server, _, _ = remote
    folder, pattern = shards
    local = samples_of(opened(pattern))
    shutil.copytree(folder, server.folder / "a [v2], é?")
    index = json.loads((server.folder / "a [v2], é?" / "index.json").read_text())
    for number in range(5):
        place = server.folder / "a [v2], é?"
        (place / f"s-{number:02}.tar").rename(place / f"s[{number}].tar")
        index["shards"][f"s[{number}].tar"] = index["shards"].pop(f"s-{number:02}.tar")
    (server.folder / "a [v2], é?" / "index.json").write_text(json.dumps(index))
    for number, where in enumerate(("a [v2], é%3F", "a%20[v2],%20%C3%A9%3F")):
        for name in ODD_NAMES:
            cache = tmp_path / f"{name} {number}"
            found = opened_remote(f"{server.url}/{where}/s[{{0..4}}].tar", cache)
            assert samples_of(found) == local
    where = f"pipe:cat '{server.folder}/a [v2], é?/s[{{0..4}}].tar'"
    assert samples_of(opened_remote(where, tmp_path / "pipe")) == local


@pytest.mark.parametrize(
    "where, expected",
    [
        ("s3://bucket/{0..3}.tar", "'pipe:aws s3 cp s3://bucket/{0..3}.tar -'"),
        ("gs://bucket/0.tar", "'pipe:gcloud storage cat gs://bucket/0.tar'"),
        ("hdfs://host/0.tar", "'pipe:COMMAND-THAT-PRINTS hdfs://host/0.tar'"),
        ("URL/*.tar", "no * ?"),
        ("URL/[0-9].tar", "no * ?"),
        ("URL/s-00.zip", "ends in .tar"),
        ("pipe:cat FOLDER/*.tar", "no * ?"),
        ("pipe:cat a.tar b.tar", "one word"),
        ("pipe:cat FOLDER/none/s-00.tar", "python data.py index 'SHARDS-*.tar'"),
        ("pipe:no-such-command s-00.tar", "python data.py index 'SHARDS-*.tar'"),
        ("URL/none/s-00.tar", "404 Not Found): where the shards lie, type python data.py index"),
        ("URL/s-{03..07}.tar", "no s-05.tar"),
        ("URL/s-{3..1}.tar", "hold no pictures"),
        ("URL/damaged/s-00.tar", "cannot be used"),
        ("URL/other/s-00.tar", "cannot be used"),
    ],
)
def test_wrong_remote_data_is_one_line_that_says_what_to_do(remote, where, expected):
    server, _, cache = remote
    write_files(
        server.folder, {"damaged/index.json": b'{"shards"', "other/index.json": b'{"shards": []}'}
    )
    where = where.replace("URL", server.url).replace("FOLDER", str(server.folder))
    with pytest.raises(ValueError) as error:
        opened_remote(where, cache)
    assert expected in one_line(error)


def test_a_server_that_is_gone_from_the_start_is_one_line(remote):
    server, pattern, cache = remote
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match="index.json.*the same command goes on") as error:
        opened_remote(pattern, cache)
    one_line(error)


def test_a_cache_that_cannot_be_used_is_one_line(remote, tmp_path):
    _, pattern, cache = remote
    write_files(tmp_path, {"file": b""})
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/cache"):
        with pytest.raises(ValueError, match="--cache-dir") as error:
            opened_remote(pattern, folder)
        assert str(folder) in one_line(error)
    for size in ("", "20", "x", "20Q", "-5G", "0", "64K"):  # room for less than two
        with pytest.raises(ValueError, match="--cache-size") as error:
            opened_remote(pattern, cache, size)
        one_line(error)
    source = opened_remote(pattern, cache, "66K")
    with pytest.raises(ValueError, match="5 shards are read at once.*--cache-size 1M.*--lanes"):
        training_batches(source=source)  # six lanes
    training_batches(source=opened_remote(pattern, cache, "1M"))


def test_a_disk_that_is_full_is_one_line(remote):
    _, pattern, cache = remote
    source = opened_remote(pattern, cache)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, limits[1]))
    try:
        with pytest.raises(data.Unreachable, match="cannot write .*cache .*too large") as error:
            source.read(10)
        one_line(error)
        assert not list(cache.glob("*.tar"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_pack_and_index_list_their_shards(pets, shards, tmp_path, monkeypatch):
    for name in ("train", "val"):
        pack_module.pack(str(pets[0]), f"{tmp_path}/out/{name}-%02d.tar", shard_size=9)
    listing = json.loads((tmp_path / "out" / "index.json").read_text())
    assert listing["classes"] == ["cat", "dog"]
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.tar")}
    assert {name: size for name, (size, _) in listing["shards"].items()} == files
    assert {name: n for name, (_, n) in listing["shards"].items() if "val" in name} == {
        "val-00.tar": 9,
        "val-01.tar": 9,
        "val-02.tar": 2,
    }
    folder, pattern = shards
    for _ in range(2):
        assert run_main(monkeypatch, "index", pattern) == 0
        listing = json.loads((folder / "index.json").read_text())
        assert listing["classes"] is None
        assert [n for _, n in listing["shards"].values()] == [7, 0, 1, 12, 3]
    (folder / "s-00.tar").unlink()
    write_tar(folder / "s-02.tar", members_of(range(5)))
    assert run_main(monkeypatch, "index", f"{folder}/s-02.tar") == 0
    listing = json.loads((folder / "index.json").read_text())
    assert {name: n for name, (_, n) in listing["shards"].items()} == {
        "s-01.tar": 0,
        "s-02.tar": 5,
        "s-03.tar": 12,
        "s-04.tar": 3,
    }
    (folder / "index.json").write_text('{"shards": [1, 2]}')  # of another program
    assert run_main(monkeypatch, "index", f"{folder}/s-02.tar") == 2
    assert (folder / "index.json").read_text() == '{"shards": [1, 2]}'


def test_shards_are_fetched_before_they_are_needed(remote, monkeypatch):
    server, pattern, cache = remote
    monkeypatch.setattr(data, "SHUFFLE_BLOCK", 8)
    source = opened_remote(pattern, cache)
    order = data.Order(source.sizes, lanes=1)
    batches = data.Batches(source, (4, 4), 3, 2, order=order)
    later = {source.where(order(position)) for position in (0, 1, 4, 5)}
    batches[0]
    deadline = time.monotonic() + 5
    while not all(map(source.cache.has, later)) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert all(map(source.cache.has, later))
    assert server.asked().total() == 1 + len(later) < 6
    for step in range(1, 12):  # the stream is the same as without
        same_batch(batches[step], data.Batches(source, (4, 4), 3, 2, order=order)[step])


def test_a_loader_that_stalls_says_what_it_waits_for(remote, monkeypatch, capsys):
    server, pattern, cache = remote
    monkeypatch.setattr(data, "STALLED", 0.1)
    monkeypatch.setattr(remote_module, "TIMEOUT", 5)
    source = opened_remote(pattern, cache)
    server.faults["s-03.tar"] = slow
    batches = data.Batches(source, (4, 4), 3, 12, process=0, processes=2)
    for workers in (0, 1):
        made = list(data.loader(batches, range(2), workers))
        assert [batch["bad"] for batch in made] == [[], []]
        printed = capsys.readouterr().err.splitlines()
        shutil.rmtree(cache)
        cache.mkdir()
        assert len(printed) >= 2
        for line in printed:
            assert re.match(r"no batch for \d+ s: process 0, step [12]: http.*/s-03.tar", line)
    for source in (toy.Toy("train", (8, 8)), opened_remote(pattern, cache)):
        item = data.Batches(source, (8, 8), 3, 4).about(1)
        assert item.startswith("process 0, step 2: ")
    list(data.loader(data.Batches(toy.Toy("train", (8, 8)), (8, 8), 3, 2), range(3), 0))
    assert capsys.readouterr().err == ""


def test_ctrl_c_does_not_wait_for_workers_that_wait(remote, monkeypatch):
    server, pattern, cache = remote
    monkeypatch.setattr(remote_module, "TIMEOUT", 60)
    done = threading.Event()
    server.faults = {f"s-{n:02}.tar": lambda *_: done.wait(60) for n in range(5)}
    batches = data.Batches(opened_remote(pattern, cache), (4, 4), 3, 4)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup has it ignored
    made = iter(data.loader(batches, range(4), 2))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        next(made)
    del made
    assert time.monotonic() - began < 5  # PyTorch gives each of the two 5 s
    signal.signal(signal.SIGINT, before)
    done.set()


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
    made, found = iter(data.loader(Fails(at, function), range(100), workers=1)), []
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
    pinned = torch.utils.data._utils.pin_memory.pin_memory(data.Parcel(batch))
    assert pinned["images"].tolist() == [1, 1] and pinned["bad"] == ["x"]
    assert pinned["targets"][0]["seed"] == 3 and pinned["targets"][0]["masks"].tolist() == [2]


def test_too_few_open_files_are_not_unreadable_pictures(monkeypatch):
    source = data.Folder(str(PICTURES))

    def read(number):
        raise OSError(errno.EMFILE, "Too many open files", "0.png")

    monkeypatch.setattr(source, "read", read)
    with pytest.raises(data.Unreachable, match="Too many open files: '0.png': .*ulimit -n 65536"):
        data.Batches(source, (8, 8), 3, 4)[0]
    chunks = hashtags.TagChunks(source, {})
    with pytest.raises(data.Unreachable, match="ulimit"):
        chunks[0]
    with pytest.raises(data.Unreachable, match="ulimit"):
        list(data.read_all(source, "label", lambda sample: sample["class"], -1))


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

signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup has it ignored
plain, parent, data.GRACE = data.Batches.__getitem__, os.getpid(), 0.5

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
        data.Batches(source, (8, 8), 3, 8, order=data.Order(source.sizes), processes=4)
    order = data.Order(source.sizes, lanes=4)  # more lanes than shards: they share them
    parts = [
        data.Batches(source, (8, 8), 3, 8, order=order, process=p, processes=4) for p in range(4)
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
