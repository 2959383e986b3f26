"""data.py: random draws, the order of samples, pictures to tensors, bad input, folders, splits.

Everything is made here, small. Statistical tests draw from fixed seeds: their limits lie where a
right implementation would be rejected once in a million, so the seeds were not picked.
"""

import errno
import io
import itertools
import math
import os
import re
import shlex
import shutil
import tracemalloc
from collections import Counter
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import (
    PICTURES,
    SIZES,
    STEPS,
    Memory,
    chi_square,
    decoded,
    encoded,
    epoch_counts,
    everything,
    handmade_png,
    members_of,
    one_line,
    opened,
    painting,
    photo,
    picture_batches,
    relative_labels,
    stream,
    textured,
    tile,
    training_batches,
    write_files,
    write_tar,
)
from PIL import Image

import data
from support import hashtags, labels
from support import pack as pack_module
from tasks import video as video_module

# ------------------------------------------------------------------------------------ random numbers

# (seed, epoch, position, purpose) -> raw bits, by Philox4x64-10 (Salmon et al. 2011) written out on
# Python's integers, which gave the known answers that Random123 publishes.
GOLDEN = {
    (0, 0, 0, 1): "d037f8c3f9a1d176 c057419b4c210765 abf13115117b0065 7bae035dea6ea5c0 "
    "b487ac82e7ddd46f 45e81edba7c59426 d0a3831ebe9a338c 90194c97f11d0dc3 90cae1e1aecc68a9",
    (2**63 + 11, 5, 2**62 + 7, 6): "8bfb24178758c220 b53170c868245de7 3e4c82be276d0418 "
    "5c93b17493467509 1c64130331050d4f f7b05dfd2c872a80 783a85ae9e59e1c0",
    (7, 2**40, 2**33, 8): "071296741e97367a 8373ee0748e3deb6 e56478789939b0d1 0d3fadc738336daa "
    "f78412701cfd6a54 1fec6de5b2f0f705 bdde16be84b1c9d2",
}


@pytest.mark.parametrize("keys", GOLDEN)
def test_random_numbers_are_philox_and_nothing_else(keys):
    words = [int(word, 16) for word in GOLDEN[keys].split()]
    bits = data.random_bits(len(words), *keys)
    assert bits.tolist() == words
    assert data.random_bits(3, *keys).tolist() == words[:3]  # more draws do not change the first
    assert data.uniform(bits).tolist() == [(word >> 11) / 2**53 for word in words]
    by_draw = sorted(range(len(words)), key=words.__getitem__)
    assert data.permutation(len(words), *keys).tolist() == by_draw


def test_each_of_the_four_keys_changes_every_draw():
    keys = "3456 4456 3556 3466 3457 4356 3546 3465"  # one is another, or two are exchanged
    words = [word for key in keys.split() for word in data.random_bits(8, *map(int, key)).tolist()]
    assert len(set(words)) == 8 * 8


def test_uniform_stays_below_one_and_a_running_sum_has_an_edge_more_than_numbers():
    ends = data.uniform(np.array([0, 2**64 - 1], dtype=np.uint64))
    assert ends[0] == 0 and 1 - 2**-52 < ends[1] < 1
    assert data.running_sum([3, 0, 2]).tolist() == [0, 3, 3, 5]
    assert data.running_sum([]).tolist() == [0] and data.running_sum([]).dtype == np.int64


# -------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize(
    "sizes, lanes",
    [
        ([1], None),
        ([1], 48),
        ([0, 0, 1, 0], 3),
        ([1] * 7, 48),  # more lanes than samples
        ([33, 1, 250, 0, 8, 9], 4),
        ([2] * 100, None),
        (list(range(60)), 48),
        ([9000, 0, 1, 8500, 3], 2),  # more than one block of shuffling
        ([20000, 3, 17000], 1),  # shards longer than a block
    ],
)
def test_every_epoch_is_each_sample_once(sizes, lanes):
    order = data.Order(sizes, seed=5, lanes=lanes)
    assert order.length == sum(sizes) and order.lanes == (lanes or min(48, len(sizes)))
    for epoch in range(3):
        assert epoch_counts(order, epoch) == Counter(range(order.length))


UNEVEN = [17, 0, 40, 151, 3, 96, 8, 8, 1, 25, 60, 2, 77, 0, 31, 5, 5, 5, 120, 9] * 3


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 6, 8])
def test_the_stream_is_a_pure_function_of_the_position(processes):
    """It is the same on any number of processes, and from whatever position on it is read."""
    whole = data.Order(UNEVEN, seed=2)
    count = 2 * whole.length + 101  # over two epoch borders
    expected = stream(whole, 0, count)
    for process in range(processes):
        order = data.Order(UNEVEN, seed=2)
        mine = [p for p in range(count) if p // 2 % processes == process]
        anywhere = np.random.default_rng(0).permutation(mine)[:200].tolist()
        for positions in (anywhere, mine[::-1], mine):
            assert [order(p) for p in positions] == [expected[p] for p in positions]


@pytest.mark.parametrize("processes", [2, 3, 4, 6, 8, 48])
def test_a_process_reads_only_the_shards_of_its_lanes(processes):
    order = data.Order([20] * 48, seed=3, lanes=48)
    for epoch in range(2):
        touched = [set() for _ in range(processes)]
        shards = [n // 20 for n in stream(order, epoch * order.length, (epoch + 1) * order.length)]
        for position, shard in enumerate(shards):
            touched[position // 2 % processes].add(shard)
        assert [len(shards) for shards in touched] == [48 // processes] * processes
        assert shards[::2] == shards[1::2]  # a pair comes from one lane, which here is one shard


def test_a_cut_shard_is_read_by_two_lanes_and_cuts_hardly_move():
    """From epoch to epoch both ends of a lane move by fewer than 2 x lanes samples."""
    lanes, before = 6, None
    order = data.Order(UNEVEN, seed=4, lanes=lanes)
    shards = np.repeat(np.arange(len(UNEVEN)), UNEVEN)  # of each sample
    for epoch in range(4):
        drawn = [set() for _ in range(lanes)]
        for position in range(epoch * order.length, (epoch + 1) * order.length):
            drawn[position // 2 % lanes].add(order(position))
        read = sum(len(set(shards[list(samples)])) for samples in drawn)
        assert read <= np.count_nonzero(UNEVEN) + lanes - 1  # each cut adds one reading
        for one, other in zip(before or drawn, drawn):
            assert max(len(one - other), len(other - one)) < 2 * 2 * lanes
        before = drawn


def drawn(sizes, seed=1, lanes=None, epochs=1):
    """(epochs, samples) of an order."""
    order = data.Order(sizes, seed=seed, lanes=lanes)
    return np.array(stream(order, 0, epochs * order.length)).reshape(epochs, -1)


def test_seeds_epochs_lanes_and_blocks_are_not_shuffled_alike():
    for one, other in itertools.combinations([*drawn(UNEVEN, 0, epochs=2), *drawn(UNEVEN)], 2):
        assert (one == other).mean() < 1 / 20  # a handful may agree by chance
    size = data.SHUFFLE_BLOCK
    for places in (
        [drawn([64], seed)[0] for seed in range(3)],
        drawn([64] * 3, lanes=3).reshape(-1, 3, 2).swapaxes(0, 1).reshape(3, -1) % 64,
        drawn([size] * 3, lanes=1).reshape(3, size) % size,
        # The first lane's shards, of each seed.
        [sorted(set(drawn([20] * 48, s, 24)[0][::48] // 20)) for s in range(5)],
    ):
        assert len(set(map(tuple, places))) == len(places)


def test_a_block_is_shuffled_uniformly_and_holds_few_shards():
    landed = [places.tolist().index(5) for places in drawn([64], seed=6, epochs=2000)]
    assert chi_square(np.bincount(landed, minlength=64)) < 1
    # Neighbours are independent, and epochs: 5 standard deviations of a correlation of n pairs.
    one, two = drawn([4096], seed=7, epochs=2)
    for other in (np.roll(one, -1), two, np.arange(4096)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(4096)
    # Of 32 shards in one block, neighbours share one as often as chance has it.
    shards = drawn([128] * 32, seed=8, lanes=1)[0] // 128
    assert abs(np.mean(shards[1:] == shards[:-1]) - 1 / 32) < 5 * math.sqrt(1 / 32 / len(shards))
    half = data.SHUFFLE_BLOCK // 2
    order = data.Order([half] * 12, seed=9, lanes=1)
    blocks = np.array(stream(order, 0, order.length)).reshape(-1, 2 * half) // half
    assert [len(set(shards)) for shards in blocks.tolist()] == [2] * 6
    firsts = {order(epoch * order.length) // half for epoch in range(40)}
    assert len(firsts) > 8  # of 12, blocks come in random order: fewer have a chance of 1e-5


@pytest.mark.parametrize("shards, size, lanes", [(300_000, 10_000, 1024), (1000, 20_000, 48)])
def test_memory_grows_with_the_shards_only(shards, size, lanes):
    """3 billion samples in 300,000 shards, for a process of 1,024 (one lane); long shards."""
    tracemalloc.start()
    order = data.Order(np.full(shards, size), lanes=lanes)
    places = [order(p * 2 * lanes) for p in (0, 1, 10, 1000)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert order.length == shards * size and len(set(places)) == 4
    assert peak < 2**20 * 25
    for empty in ([], [0, 0]):
        with pytest.raises(ValueError, match="no samples"):
            data.Order(empty)


# ------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize(
    "share, total, drawn, most",  # the largest number of unreadable files that is not too many
    [
        *((0.01, 60, 120, 10), (0.01, 60_000, 60_000, 600)),  # 1 % of 1,000 at least
        (0.01, 60_000, 600_000, 600),  # of the files, however often they come
        *((0.05, 100_000, 20_000, 1000), (0.5, 1000, 30, 500)),  # of those that have come
        *((0, 60, 1, 1), (0, 60, 59, 1), (0, 60, 600, 1)),  # one alone is never too many
    ],
)
def test_how_many_unreadable_files_are_too_many(share, total, drawn, most):
    batches = picture_batches(Memory([total]), (8, 8), 3, 8, order=data.Order([total]))
    assert not batches.over_max_bad(most, 0, 0, drawn, share)
    assert batches.over_max_bad(most + 1, 0, 0, drawn, share)


@pytest.mark.parametrize(
    "share, drawn, most",  # the largest number of unlabelled samples that is not too many
    [
        *((0.01, 120, 10), (0.01, 60_000, 1001)),  # 1 % of 1,000 at least
        *((0.05, 100_000, 5000), (1, 40, 39)),  # not all of them
        # One file alone, which comes once in each epoch of 60, is never too many.
        *((0, 1, 1), (0, 59, 1), (0, 60, 2), (0, 61, 2), (0, 600, 11)),
    ],
)
def test_how_many_unlabelled_samples_are_too_many(share, drawn, most):
    batches = picture_batches(Memory([60]), (8, 8), 3, 8, order=data.Order([60]))
    assert not batches.over_max_bad(0, 0, most, drawn, share)
    assert batches.over_max_bad(0, 0, most + 1, drawn, share)


def test_useless_samples_alone_are_too_many():
    batches = picture_batches(Memory([60]), (8, 8), 3, 8, order=data.Order([60]))
    assert batches.over_max_bad(40, 40, 0, 40, 1) and batches.over_max_bad(10, 10, 30, 40, 1)
    assert not batches.over_max_bad(39, 39, 0, 40, 1)


def test_a_batch_is_what_its_keys_say():
    """Each row by the definitions: order, view and patches from (seed, epoch, position). A step
    does not depend on the steps before, and step 4 runs over the epoch border."""
    source, order = Memory(SIZES), data.Order(SIZES, seed=4, lanes=6)
    batches = training_batches()
    for step in (*reversed(STEPS), *STEPS):
        batch = batches[step]
        assert batch["bad"] == [] and batch["weight"].tolist() == [1.0] * 12
        for row, position in enumerate(range(step * 12, step * 12 + 12)):
            keys = 4, position // 50, position
            image = source.read(order(position))["image"]()
            bits = data.random_bits(23, *keys, data.VIEW)
            view = data.crop_and_resize(image, (8, 12), 3, bits, min_crop=0.2)
            assert torch.equal(batch["images"][row], view)
            assert batch["samples"][row] == order(position)
            assert batch["positions"][row] == position
            assert batch["ids"][row].tolist() == data.permutation(6, *keys, data.MASK).tolist()


@pytest.mark.parametrize("processes", [1, 2])
def test_without_an_order_the_source_comes_once_and_is_padded(processes):
    source = Memory([3, 0, 4, 6])
    centre = [data.crop_and_resize(source.read(i)["image"](), (8, 12), 3) for i in range(13)]
    options = [{"process": process, "processes": processes} for process in range(processes)]
    parts = [picture_batches(source, (8, 12), 3, 8, **option) for option in options]
    assert [len(part) for part in parts] == [2] * processes  # 13 samples, 8 at a time
    batches = [part[step] for part in parts for step in range(2)]
    assert all(batch.pop("bad") == [] for batch in batches)
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    order = joined["positions"].argsort()
    joined = {name: values[order] for name, values in joined.items()}
    assert joined["positions"].tolist() == list(range(16))
    assert joined["labels"].tolist() == joined["samples"].tolist() == [*range(13), -1, -1, -1]
    assert joined["weight"].tolist() == [1] * 13 + [0] * 3
    assert torch.equal(joined["images"][:13], torch.stack(centre))
    assert not joined["images"][13:].any()


def test_batches_are_dealt_in_pairs_and_lanes():
    source = Memory([4] * 8)
    for shards, batch_size, processes, words in (
        (None, 8, 3, "multiple of 6"),
        (None, 6, 2, "multiple of 4"),  # it is even, but cannot be dealt in pairs
        (8, 12, 3, "8 lanes cannot be dealt to 3 .*--lanes, a multiple of 3"),
        (3, 8, 4, "3 lanes cannot be dealt to 4 .*--lanes, a multiple of 4"),
    ):
        order = data.Order([4] * shards) if shards else None
        with pytest.raises(ValueError, match=words) as error:
            picture_batches(source, (8, 8), 3, batch_size, order=order, processes=processes)
        one_line(error)
    # More lanes than shards share them.
    options = {"order": data.Order([4, 4, 4], lanes=4), "processes": 4}
    parts = [picture_batches(Memory([4] * 3), (8, 8), 3, 8, process=p, **options) for p in range(4)]
    samples = torch.cat([part[step]["samples"] for part in parts for step in range(3)])
    assert Counter(samples.tolist()) == dict.fromkeys(range(12), 2)


# ----------------------------------------------------------------------------------------- pictures


def picture_files():
    """{what: (file, the pixels that it shows (H, W, 3), how far off they may be)}."""
    shape = height, width = 16, 24
    rgb = painting(height, width)
    grey = rgb[:, :, 0]
    alpha = np.linspace(0, 255, height * width).astype(np.uint8).reshape(shape)
    jpeg, tiff = partial(encoded, kind="JPEG", quality=95), partial(encoded, kind="TIFF")

    def grey3(values):
        return np.repeat(np.asarray(values)[:, :, None], 3, axis=2)

    def on_white(pixels, alpha):
        part = alpha[:, :, None] / 255
        return pixels * part + 255 * (1 - part)

    # Four colours in stripes, as a palette picture. The third may be clear, or all may fade.
    colours = np.array([(200, 10, 30), (20, 220, 40), (60, 50, 240), (90, 90, 90)], np.uint8)
    numbers = np.arange(height * width, dtype=np.uint8).reshape(shape) % 4
    striped, third = colours[numbers], tuple(colours[2].tolist())
    palette = Image.fromarray(numbers, "P")
    palette.putpalette(colours.tobytes())
    third_clear = np.where((numbers == 2)[:, :, None], 255, striped)
    fading = np.array([255, 128, 0, 64])
    fade = bytes(fading.tolist())
    palette_and_alpha = palette.convert("PA")
    palette_and_alpha.putalpha(Image.fromarray(alpha))

    cmyk = Image.fromarray(np.dstack([255 - rgb, alpha // 2]), "CMYK")
    inked = rgb * (1 - (alpha // 2)[:, :, None] / 255)
    rgba = Image.fromarray(np.dstack([rgb, alpha]), "RGBA")
    grey_alpha = Image.fromarray(np.dstack([grey, alpha]), "LA")
    shown, grey_shown = on_white(rgb, alpha), on_white(grey3(grey), alpha)
    muted = rgb // 2 + 64  # 8 bits of a and b are coarse, and deep colours are beyond RGB
    bit = (alpha % 3 == 0) * np.uint8(255)

    values = np.linspace(0, 65535, height * width).round().astype(np.uint16).reshape(shape)
    deep, deep_shown = Image.fromarray(values), grey3(values / 257)
    big_endian = Image.frombytes("I;16B", (width, height), values.astype(">u2").tobytes())
    one_clear = grey3(np.where(values == values[0, 7], 255, values / 257))
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in rgb)
    ycbcr, lab = (Image.fromarray(p).convert(m) for p, m in ((rgb, "YCbCr"), (muted, "LAB")))
    # A lossy codec may be off by some levels on this smooth picture; everything else by rounding.
    return {
        "PNG": (encoded(rgb), rgb, 0),
        "JPEG": (jpeg(rgb, subsampling=0), rgb, 8),
        "CMYK JPEG": (jpeg(cmyk, subsampling=0), inked, 8),
        "WebP": (encoded(rgb, "WEBP", lossless=True), rgb, 0),
        "BMP": (encoded(rgb, "BMP"), rgb, 0),
        "TIFF": (tiff(rgb), rgb, 0),
        "GIF": (encoded(palette, "GIF"), striped, 0),
        "grey": (encoded(grey), grey3(grey), 0),
        "1 bit": (encoded(Image.fromarray(bit).convert("1")), grey3(bit), 0),
        "palette": (encoded(palette), striped, 0),
        "palette, one colour clear": (encoded(palette, transparency=2), third_clear, 0),
        "palette, alpha": (
            encoded(palette, transparency=fade),
            on_white(striped, fading[numbers]),
            1,
        ),
        "RGB, one colour clear": (encoded(striped, transparency=third), third_clear, 0),
        "RGBA": (encoded(rgba), shown, 1),
        "grey with alpha": (encoded(grey_alpha), grey_shown, 1),
        "16-bit grey": (encoded(deep), deep_shown, 1),
        "32-bit grey TIFF": (tiff(values.astype(np.int32)), deep_shown, 1),
        "16-bit RGB": (handmade_png(width, height, 16, 2, rows), rgb, 1),
        "16-bit grey, clear": (encoded(deep, transparency=int(values[0, 7])), one_clear, 1),
        "16-bit grey TIFF, high bytes first": (tiff(big_endian), deep_shown, 1),
        "8-bit grey in a 32-bit TIFF": (tiff(grey.astype(np.int32)), grey3(grey), 0),
        "grey with alpha TIFF": (tiff(grey_alpha), grey_shown, 1),
        "palette and alpha TIFF": (tiff(palette_and_alpha), on_white(striped, alpha), 1),
        "YCbCr TIFF": (tiff(ycbcr), rgb, 3),
        "LAB TIFF": (tiff(lab), muted, 6),
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
    for alpha in (np.full((16, 24), 255, np.uint8), rgb[:, :, 1]):
        rgba = np.dstack([rgb, alpha])
        assert (decoded(encoded(rgba), (16, 24), 4) == rgba).all()
    assert (decoded(encoded(rgb), (16, 24), 4)[:, :, 3] == 255).all()
    assert decoded(FILES["palette, one colour clear"][0], (16, 24), 4)[:, :, 3].min() == 0
    # What is hidden does not colour what shows beside it: red, fading out, over hidden blue.
    hidden = np.zeros((12, 12, 4), np.uint8)
    hidden[:, :5], hidden[:, 5:] = (250, 0, 0, 255), (0, 0, 250, 0)
    shown = decoded(encoded(hidden), (4, 4), 4)
    seen = shown[shown[:, :, 3] > 0]
    assert len(np.unique(seen[:, 3])) > 1 and (np.abs(seen[:, :3] - [250, 0, 0]) < 8).all()


@pytest.mark.parametrize("channels, mode", data.MODES.items())
def test_pictures_in_memory_may_have_modes_that_no_file_has(channels, mode):
    image = Image.fromarray(painting(16, 24)).convert("HSV")
    expected = np.asarray(image.convert("RGB").convert(mode)).reshape(16, 24, channels)
    shown = data.crop_and_resize(image, (16, 24), channels).permute(1, 2, 0)
    assert (shown.numpy() == expected).all()


def test_the_whole_picture_says_how_its_values_are_scaled():
    """Not the crop: the same pixels would have another brightness in another crop. A float or a
    32-bit picture beyond 16 bits would be clipped: better a bad sample by name."""
    pixels = np.full((8, 16), 200, np.int32)  # the centre crop is of columns 4 to 11
    for corner, expected in ((200, 200), (300, 200 >> 8)):
        pixels[0, 0] = corner
        assert (decoded(encoded(Image.fromarray(pixels), "TIFF"), (8, 8)) == expected).all()
    pixels[0, 0] = 70_000
    for unknown in (pixels, -pixels, np.full((4, 4), 0.5, np.float32)):
        values = f"with values from {unknown.min()} to {unknown.max()}"
        with pytest.raises(ValueError, match=f"mode .* {values}"):
            decoded(encoded(Image.fromarray(unknown), "TIFF"), (4, 4))
    with pytest.raises(ValueError, match="as 1, 3 or 4 channels, not as 2"):
        data.check_channels(2)


@pytest.mark.parametrize("orientation", [*range(10), 65535])  # 0, 9 and 65535 do not exist
def test_exif_orientations_are_all_the_same_upright_picture(orientation):
    upright = painting(16, 24)
    turned, plain = photo(upright, orientation), encoded(upright)
    assert (decoded(turned, (16, 24)) == upright).all()
    for position in range(4):  # their random crops and flips are the same
        bits = data.random_bits(23, 0, 0, position, data.VIEW)
        assert (decoded(turned, (8, 8), 3, bits) == decoded(plain, (8, 8), 3, bits)).all()
    if not orientation:  # EXIF that is damaged does not cost the picture
        for kind in ("JPEG", "PNG", "WEBP"):
            damaged = encoded(upright, kind, exif=b"Exif\0\0this is no TIFF header")
            assert (decoded(damaged, (8, 8)) == decoded(encoded(upright, kind), (8, 8))).all()


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
    resized by Pillow, and stored as JPEG if nothing in them can be transparent. (Pillow maps the
    files of plain TIFFs into memory, if it knows their names, with the wrong sides.)"""
    files = {}
    for what, (content, expected, tolerance) in FILES.items():
        content = content if orientation == 1 else stored_turned(content, orientation)
        if content:
            kind = Image.open(io.BytesIO(content)).format.lower()
            name = f"{re.sub('[^a-zA-Z0-9]', '-', what)}.{kind}"
            assert name not in files
            files[name] = content, expected, tolerance
    contents = {name: content for name, (content, *_) in files.items()}
    folder = opened(write_files(tmp_path / "pictures", contents))
    for short_side, size in ((None, (16, 24)), (8, (8, 12))):
        pack_module.pack(folder.root, f"{tmp_path}/{short_side}-%d.tar", short_side, shard_size=99)
        shard = opened(f"{tmp_path}/{short_side}-0.tar")
        for number in range(len(files)):
            images = [source.read(number)["image"]() for source in (folder, shard)]
            lossy = images[1].format == "JPEG" and channels > 1  # it stores colours coarsely
            one, two = (data.crop_and_resize(i, size, channels).short() for i in images)
            apart, name = (one - two).abs(), folder.paths[number]
            assert apart.max() <= (0 if not short_side else 32 if lossy else 4), name
            assert apart.float().mean() < (8 if lossy else 1), name
            if not short_side and channels == 3 and "tiff" in name:
                _, expected, tolerance = files[name]
                assert np.abs(one.permute(1, 2, 0).numpy() - expected).max() <= tolerance


@pytest.mark.parametrize("size", [(4, 4), (9, 5), (3, 30)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 1000), (1000, 1), (2, 3)])
def test_tiny_and_extreme_pictures(shape, size):
    content = encoded(np.full((*shape, 3), (10, 130, 250), np.uint8))
    for bits in (None, data.random_bits(23, 0, 0, 0, data.VIEW)):
        for channels, expected in ((3, [10, 130, 250]), (4, [10, 130, 250, 255]), (1, [108])):
            # 0.299 x 10 + 0.587 x 130 + 0.114 x 250 = 107.8
            assert (decoded(content, size, channels, bits) == expected).all()


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
        difference = np.abs(decoded(encoded(pixels), size) - resized(crop, *size))
        assert difference.max() <= 2 and difference.mean() < 0.5


@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_a_large_jpeg_decoded_at_a_fraction_looks_the_same(orientation):
    """The full decode is the same file as PNG. Where the crop's border falls on the smaller decode's
    pixels, only roundings differ (seen: 2 levels). Elsewhere the box moves by up to half a target
    pixel down and across: at most 0.71 of what neighbouring pixels differ by."""
    jpeg = photo(textured(480, 640), orientation, "JPEG", quality=92)
    tags = Image.Exif()
    tags[274] = orientation
    full = encoded(np.asarray(Image.open(io.BytesIO(jpeg))), exif=tags)
    views = [None] + [data.random_bits(23, 0, 0, p, data.VIEW) for p in range(4)]
    for size, bits in itertools.product(((24, 24), (24, 48), (96, 96)), views):
        quick, exact = (decoded(content, size, 3, bits) for content in (jpeg, full))
        moved = np.abs(exact[:, 1:] - exact[:, :-1]).mean()
        assert np.abs(quick - exact).mean() < 0.71 * moved
        if bits is None:  # 480 and 240 are multiples of the shrink factor
            assert np.abs(quick - exact).max() <= 4


def test_the_flip_is_a_flip_and_comes_half_of_the_time():
    content = encoded(painting(20, 24))
    centre, flipped = decoded(content, (8, 8)), 0
    for position in range(200):
        bits = data.random_bits(23, 1, 0, position, data.VIEW)
        other = bits.copy()
        other[22] ^= np.uint64(1)
        one, two = (decoded(content, (8, 8), 3, b) for b in (bits, other))
        assert (one == two[:, ::-1]).all() and (one != two).any()
        whole = decoded(content, (8, 8), 3, bits, min_crop=1)  # of the centre, always
        flipped += (whole != centre).any()
        assert (whole == centre).all() or (whole == centre[:, ::-1]).all()
    assert abs(flipped - 100) < 5 * math.sqrt(200 / 4)


def test_without_flips_a_picture_is_never_mirrored():
    sample = {"image": lambda: Image.fromarray(painting(20, 24))}
    make = partial(data.make_picture, sample, size=(8, 8), channels=3)
    for position in range(20):
        key = 1, 0, position
        assert torch.equal(make(key, min_crop=1, flip=False), make(key))  # the centre
        crops = [make(key, min_crop=0.2, flip=flip) for flip in (False, True)]
        flipped = data.random_bits(23, *key, data.VIEW)[22] % 2
        assert torch.equal(crops[0], crops[1].flip(2) if flipped else crops[1])


def random_boxes(width, height, count, min_crop=0.2, aspect=1.0):
    """(4, count) of random_box: left, top, width, height."""
    draws = [data.random_bits(23, 2, 0, position, data.VIEW) for position in range(count)]
    return np.array([data.random_box(width, height, bits, min_crop, aspect) for bits in draws]).T


@pytest.mark.parametrize("min_crop, aspect", [(0.2, 1.0), (0.08, 1.0), (0.5, 2.0), (0.2, 0.4)])
def test_random_boxes_lie_inside_and_have_the_right_area_and_ratio(min_crop, aspect):
    """Sides are whole pixels: half a pixel of 300 is less than 1 % of the shortest side here."""
    width, height = 400, 300
    left, top, w, h = random_boxes(width, height, 500, min_crop, aspect)
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + w <= width).all() and (top + h <= height).all()
    # The centre's box, when ten tries failed, is as large as its ratio allows.
    least = min(min_crop, aspect * height / width, width / height / aspect)
    area, ratio = w * h / (width * height), w / h / aspect
    assert (area > 0.99 * least).all() and (area <= 1).all()
    assert (ratio > 3 / 4 * 0.98).all() and (ratio < 4 / 3 * 1.02).all()


def test_random_boxes_are_uniform_in_area_log_ratio_and_place():
    """In a square, boxes of at most 3/4 of its area fit whatever their ratio, so that below 3/4 no
    try is thrown away and area and log ratio must be uniform; above, the ratio decides."""
    side, count = 2000, 6000
    left, top, w, h = random_boxes(side, side, count).astype(np.float64)
    area, log_ratio = w * h / side**2, np.log(w / h) / math.log(4 / 3)
    fits = area < 0.75
    parts = [(area - 0.2) / 0.55, (log_ratio + 1) / 2, left / (side - w + 1), top / (side - h + 1)]
    parts = np.array(parts)[:, fits]
    for values in parts:
        bins = (values * 10).astype(int).clip(0, 9)
        assert chi_square(np.bincount(bins, minlength=10)) < 1
    assert area.min() < 0.21 and area.max() > 0.97
    # Independent of each other: 5 standard deviations of a correlation.
    assert np.abs(np.corrcoef(parts) - np.eye(4)).max() < 5 / math.sqrt(fits.sum())
    # Whole pixels reach every border. Where no try fits, the box is the centre's.
    left, top, w, h = random_boxes(3, 3, 400)
    for size, places in ((1, {0, 1, 2}), (2, {0, 1})):
        assert places == set(left[w == size].tolist()) == set(top[h == size].tolist())
    assert (random_boxes(1, 1000, 20).T == (0, 499, 1, 1)).all()
    assert (random_boxes(1000, 1, 20).T == (499, 0, 1, 1)).all()
    assert (random_boxes(1000, 30, 20, aspect=0.5).T == (492, 0, 15, 30)).all()


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


def check_bad_samples(good, bad, names):
    """Batches of two sources that differ only in samples that one of them cannot read.

    names: a part of each bad sample's line. Checks a training step and plain reading.
    """
    count = int(good.sizes.sum())
    for order in (data.Order(good.sizes, lanes=1), None):
        batches = [picture_batches(source, (8, 8), 3, count, order) for source in (good, bad)]
        expected, batch = (one[0] for one in batches)
        broken = batch["weight"] == 0
        assert broken.sum() == len(batch["bad"]) == len(names) and expected["bad"] == []
        assert (expected["weight"] == 1).all() and (batch["weight"][~broken] == 1).all()
        assert not batch["images"][broken].any()
        assert torch.equal(batch["images"][~broken], expected["images"][~broken])
        assert torch.equal(batch["labels"], expected["labels"].where(~broken, -1))
        for name in ("positions", "samples"):  # nothing shifts
            assert torch.equal(batch[name], expected[name])
        for name in names:
            (line,) = [line for line in batch["bad"] if name in line]
            assert re.search(re.escape(name) + ": .+", line) and "\n" not in line
    assert torch.equal(*(training_batches(source=source)[0]["ids"] for source in (good, bad)))
    return batch["bad"]


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
    lines = check_bad_samples(good, opened(folder), [f"{folder}/{name}" for name in whole])
    (line,) = [line for line in lines if "bomb" in line]
    assert "DecompressionBomb" in line  # refused by its header, before memory is asked for


def test_bad_members_of_a_shard_keep_their_positions(tmp_path):
    broken = {
        "00002.png": tile(2)[:40] + bytes(len(tile(2)) - 40),
        "00004.png": b"",
        "00008.cls": b"9" * 30,  # a number, but none that fits
        "00009.png": BOMB,
    }
    good = write_tar(tmp_path / "good-000.tar", members_of(range(12)))
    members = [(name, broken.get(name, content)) for name, content in members_of(range(12))]
    bad = write_tar(tmp_path / "bad-000.tar", members)
    check_bad_samples(opened(good), opened(bad), [f"{bad}:{name[:5]}" for name in sorted(broken)])


def test_the_limit_of_pixels_holds_for_all_that_is_read(tmp_path, monkeypatch):
    """10 x 10 pixels are over the limit of 40 (at more than twice as many Pillow raises whatever
    the filter of warnings, which pytest takes away)."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", data.MAX_PIXELS)
    files = {"small.png": encoded(painting(5, 8)), "large.png": encoded(painting(10, 10))}
    shard = write_tar(tmp_path / "a.tar", files.items())
    for source in (opened(write_files(tmp_path / "folder", files)), opened(shard)):
        data.limit_pixels(100)
        assert picture_batches(source, (4, 4), 3, 2)[0]["bad"] == []
        data.limit_pixels(40)
        (line,) = picture_batches(source, (4, 4), 3, 2)[0]["bad"]
        assert "large" in line and line.endswith("100 pixels are over --max-pixels 40")
    write_files(tmp_path / "frames", {f"{i}.png": files["large.png"] for i in range(2)})
    with pytest.raises(Image.DecompressionBombError):
        video_module.open_video(str(tmp_path / "frames")).read([0])


def test_whatever_a_decoder_raises_is_one_line():
    errors = {1: RuntimeError("two\nlines"), 2: MemoryError(), 5: KeyError("image")}
    missing = {3: "image", 4: "class"}

    class Raising(Memory):
        def read(self, number):
            if number in errors:
                raise errors[number]
            sample = super().read(number)
            return {name: value for name, value in sample.items() if name != missing.get(number)}

    batch = picture_batches(Raising([8]), (8, 8), 3, 8)[0]
    assert batch["weight"].tolist() == [1, 0, 0, 0, 0, 0, 1, 1]
    assert not batch["images"][1:6].any() and batch["labels"][1:6].tolist() == [-1] * 5
    for line, number, name in zip(batch["bad"], range(1, 6), "RMKKK", strict=True):
        assert line.startswith(f"memory:{number}: {name}") and "\n" not in line


def test_too_few_open_files_are_not_unreadable_pictures(monkeypatch):
    source = data.Folder(str(PICTURES))
    error = OSError(errno.EMFILE, "Too many open files", "0.png")
    monkeypatch.setattr(source, "read", Mock(side_effect=error))
    for read in (
        lambda: picture_batches(source, (8, 8), 3, 4)[0],
        lambda: list(hashtags.read_tags(source, {}, 0, "reading")),
        lambda: labels.all_labels(source),
    ):
        with pytest.raises(data.Unreachable, match="Too many open files: '0.png': .*ulimit -n 65"):
            read()


# ------------------------------------------------------------------------------------------ folders


def tiles(*names):
    """{name: bytes of a picture}."""
    return {name: tile(number) for number, name in enumerate(names)}


def test_a_flat_folder_has_no_classes(tmp_path):
    names = ["a.jpg", "B.JPG", "c.Png", "d.webp", "e.jpeg", "f.tiff"]
    ignored = [".hidden.jpg", "notes.txt", "jpg", "x.jpg.part", ".thumbnails/a.jpg"]
    folder = write_files(tmp_path, tiles(*names, *ignored))
    source, val = data.open_sources(folder)
    assert source.classes is None and val is None
    assert relative_labels(source, folder) == dict.fromkeys(names, -1)
    assert everything(opened(folder + "/")) == everything(source)


@pytest.mark.parametrize(
    "folders",  # in the order of their classes
    [
        "cat dog/deep/deeper emu",  # the first level
        "0 1 2 3 4 5 6 7 8 9 10 11",  # by value if all are numbers, as ImageNetV2's 0 to 999
        "01 1 10",
        # Beside others in the order of texts, as before: runs that began with them go on.
        "18-25 30 4 60",
        "10 2 x",
        "01 1 10 2 \u00b2",  # a superscript 2 is no number
    ],
)
def test_class_folders_are_the_first_level(tmp_path, folders):
    folders = folders.split()
    names = [f"{name}/{i}.png" for name in folders for i in range(2)]
    folder = write_files(tmp_path, tiles(*names[::-1]))
    source = opened(folder)
    assert source.classes == [name.split("/")[0] for name in folders]
    assert relative_labels(source, folder) == {name: i // 2 for i, name in enumerate(names)}
    beside = [f"beside-them-{i}.png" for i in range(3)]  # more than a tenth
    write_files(tmp_path, tiles(*beside))
    source = opened(folder)
    assert source.classes is None
    assert relative_labels(source, folder) == dict.fromkeys([*names, *beside], -1)


def test_a_tenth_of_the_pictures_may_lie_beside_the_folders_of_classes(
    tmp_path, capsys, monkeypatch
):
    names = [f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(9)]
    folder = write_files(tmp_path / "pets", tiles(*names, "beside.png", "also.png"))
    source = opened(folder)
    assert source.classes == ["cat", "dog"] and source.strays == 2
    found = relative_labels(source, folder)
    assert {name for name, label in found.items() if label < 0} == {"beside.png", "also.png"}
    assert all(found[name] == (name[:3] == "dog") for name in names)
    # As before there were strays: checkpoints of runs without labels hold it.
    assert source.identity == "20 pictures, c70e1420cd600fda"
    (line,) = capsys.readouterr().err.splitlines()
    assert "labels are learned: 2 (" in line and ("beside.png" in line or "also.png" in line)
    monkeypatch.setenv("RANK", "1")
    opened(folder)
    assert capsys.readouterr().err == ""
    # In val, whose classes are those of train, there may be a single folder.
    val = write_files(tmp_path / "val", tiles(*names[:9], "beside.png"))
    assert data.open_sources(folder, val)[1].classes == ["cat", "dog"]
    write_files(val, tiles("also.png"))
    assert data.open_sources(folder, val)[1].classes is None
    # Beside one folder, or more than a tenth: as before.
    assert opened(write_files(tmp_path / "one", tiles(*names[:9], "beside.png"))).classes is None
    write_files(folder, tiles("third.png"))
    assert opened(folder).classes is None


def test_without_labels_val_may_have_other_classes(tmp_path, capsys):
    names = ["train/cat/a.png", "train/dog/b.png", "val/dog/c.png"]
    folder = write_files(tmp_path / "pets", tiles(*names))
    assert data.open_sources(folder, labelled=False)[1].classes == ["cat", "dog"]
    assert capsys.readouterr().err == ""
    write_files(folder, tiles("val/yak/d.png"))
    train, val = data.open_sources(folder, labelled=False)
    assert train.classes == ["cat", "dog"] and val.classes is None and val.sizes.sum() == 2
    line = f"{folder}/val has other classes than train (yak): its labels are not used\n"
    assert capsys.readouterr().err == line


def test_the_order_of_a_folder_is_mixed_and_depends_on_the_paths_alone(tmp_path):
    names = [f"{kind}/{i:03}.png" for kind in ("cat", "dog") for i in range(100)]
    one = opened(write_files(tmp_path / "one", dict.fromkeys(names, tile(0))))
    two = opened(write_files(tmp_path / "elsewhere" / "two", dict.fromkeys(names[::-1], tile(1))))
    assert one.paths == two.paths and sorted(one.paths) == names
    half = np.count_nonzero(labels.all_labels(one)[:100])
    assert abs(half - 50) < 5 * 3.54  # 5 sigma of drawing 100 of 200 without replacement


@pytest.mark.parametrize("named", [False, True])
def test_train_and_val_of_a_folder_share_their_classes(tmp_path, named):
    """Found as train/ and val/ of one folder, or named as --data and --val-data."""
    names = ["train/cat/a.png", "train/dog/b.png", "train/emu/c.png", "val/dog/d.png"]
    folder = write_files(tmp_path / "pets", tiles(*names))
    flags = (f"{folder}/train", f"{folder}/val") if named else (folder,)
    train, val = data.open_sources(*flags)
    assert train.classes == val.classes == ["cat", "dog", "emu"] and train.sizes.sum() == 3
    assert relative_labels(val, folder) == {"val/dog/d.png": 1}
    write_files(folder, tiles("val/emu/e.png"))
    _, val = data.open_sources(*flags)
    assert relative_labels(val, folder) == {"val/dog/d.png": 1, "val/emu/e.png": 2}
    # Other --val-data takes the place of the folder's own val/.
    other = write_files(tmp_path / "other", tiles("dog/e.png", "cat/f.png"))
    train, val = data.open_sources(flags[0], other)
    assert train.sizes.sum() == 3
    assert relative_labels(val, other) == {"cat/f.png": 0, "dog/e.png": 1}
    write_files(folder, tiles("val/yak/f.png"))
    with pytest.raises(ValueError, match="yak") as error:
        data.open_sources(*flags)
    one_line(error)


@pytest.mark.parametrize("videos", [False, True])
@pytest.mark.parametrize(
    "names",  # of train, val and test
    [
        ("train", "val", "test"),
        ("train", "valid", "test"),  # of Roboflow and ultralytics
        ("training", "validation", "testing"),
        ("Train", "VAL", "Test"),
        ("train", "valid", None),
        ("train", None, "test"),
    ],
)
def test_folders_of_splits_are_known_by_their_usual_names(tmp_path, capsys, names, videos):
    """And test is never trained on, nor measured on without --val-data."""
    *_, test = names
    files = [f"{s}/{k}/{i}/{s}.png" for s in filter(None, names) for k in "cd" for i in range(2)]
    folder = write_files(tmp_path / "pets", tiles(*files, "notes/a.txt"))
    sources = data.open_sources(folder, videos=videos)
    left_out = f"{folder}/{test}: left out (to measure on it, give it as --val-data)\n"
    assert capsys.readouterr().out == (left_out if test else "")
    if test:
        sources = *sources, data.open_sources(folder, f"{folder}/{test}", videos=videos)[1]
    for source, split in zip(sources, names):
        assert (source and source.root) == (split and f"{folder}/{split}")
        assert not split or source.classes == ["c", "d"] and source.sizes.sum() == 4


@pytest.mark.parametrize(
    "names, said",
    [
        (
            "train/cat/a train/dog/b val/cat/c val/dog/d emu/e",
            "the splits train, val beside emu: type --data {0}/train --val-data {0}/val, or move",
        ),
        ("train/cat/a emu/b", "the splits train beside emu: type --data {0}/train, or move"),
        (
            "cat/a dog/b Test/c",
            "beside cat, dog: type --val-data {0}/Test beside a --data to train on, or move",
        ),
        ("a b test/c", "test beside a.png, b.png: type --val-data {0}/test beside a --data to"),
        ("test/cat/a test/dog/a", "the splits test: type --val-data {0}/test beside a --data to"),
        ("valid/a test/b", "the splits valid, test: type --val-data {0}/valid beside a --data to"),
        (
            "train/a/a val/a/a valid/a/a",
            "the splits train, val, valid: type --data {0}/train --val-data {0}/val",
        ),
        ("train/a training/a", "the splits train, training: type --data {0}/train"),
    ],
)
def test_splits_beside_classes_are_refused_with_the_line_to_type(tmp_path, names, said):
    folder = write_files(tmp_path / "my pets", tiles(*(f"{name}.png" for name in names.split())))
    for videos in (False, True):
        with pytest.raises(ValueError) as error:
            data.open_sources(folder, videos=videos)
        assert said.format(folder) in one_line(error).replace("'", "")
    typed = shlex.split(re.search("type (.*?)(,| beside|$)", str(error.value))[1])
    assert [path.rpartition("/")[0] for path in typed[1::2]] == [folder] * (len(typed) // 2)
    with pytest.raises(ValueError, match="one after the other") as error:
        pack_module.pack(folder, f"{tmp_path}/out/p-%d.tar")
    assert typed[-1] in one_line(error) and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="give one of its folders as --val-data"):
        data.open_sources("toy", folder)


@pytest.mark.parametrize("place", ["flat", "pets/train"])
def test_looking_for_splits_costs_the_same_for_any_number_of_pictures(tmp_path, monkeypatch, place):
    """No look at each picture of a flat folder: there are millions, on a network."""
    costs = []
    for count in (3, 60):
        folder = write_files(tmp_path / str(count), {f"{place}/{i}.png": b"" for i in range(count)})
        stat, isdir = Mock(wraps=os.stat), Mock(wraps=os.path.isdir)
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", stat)
            patch.setattr(os, "lstat", stat)
            patch.setattr(os.path, "isdir", isdir)
            assert labels.find_splits(os.path.join(folder, place.split("/")[0])) == {}
        costs.append((stat.call_count, isdir.call_count))
    assert costs[0] == costs[1]


def test_what_lies_beside_splits(tmp_path, monkeypatch, capsys):
    """Classes that are called as splits are; folders that nobody may read; stray files."""
    names = ["train/test/a.png", "train/val/b.png", "val/test/c.png", "lost+found/d.png"]
    folder, scandir = write_files(tmp_path, tiles(*names)), os.scandir

    def unreadable(path):
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", unreadable)
        train, val = data.open_sources(folder)
    assert train.classes == val.classes == ["test", "val"] and val.sizes.sum() == 1
    shutil.rmtree(f"{folder}/lost+found")
    write_files(folder, tiles("stray.png"))
    assert data.open_sources(folder)[0].sizes.sum() == 2
    line = "1 files beside the folders of its splits are left out\n"
    assert capsys.readouterr().out.endswith(line)


def test_folders_that_are_no_splits(tmp_path):
    """A class of vehicles; train/ alone, beside what is hidden and what holds no pictures; what the
    pictures' labels decide."""
    folder = write_files(tmp_path / "vehicles", tiles("bus/a.png", "train/b.png", "boat/c.png"))
    pack_module.pack(folder, f"{tmp_path}/out/p-%d.tar")
    for where in (folder, f"{tmp_path}/out/p-*.tar"):
        assert opened(where).classes == ["boat", "bus", "train"]
    files = tiles("train/cat/a.png", "train/dog/b.png", ".test/c.png", "labels/train/a.txt")
    folder = write_files(tmp_path / "alone", files)
    source, val = data.open_sources(folder)
    assert source.sizes.sum() == 2 and source.classes is val is None
    # As before there were names of splits: checkpoints of runs hold it.
    assert source.identity == "2 pictures, a476d200ab2586d6"
    lists = write_files(tmp_path / "lists", {"a.csv": b"train/cat/a.png,x\n.test/c.png,y\n"})
    assert data.open_sources(folder, labels=f"{lists}/a.csv")[0].classes == ["x", "y"]


@pytest.mark.parametrize(
    "folders, named",
    [
        ("train2017 val2017 test2017", "test2017/ train2017/ val2017/"),
        ("training_set/cat test_set/cat", "test_set/cat/ training_set/cat/"),
        ("ds/train/a ds/Validation/a", "ds/Validation/a/ ds/train/a/"),
        ("bullet_train cat", None),  # one is no reason
        ("latest strains values", None),
    ],
)
def test_folders_that_look_like_splits_are_said(tmp_path, folders, named, capsys):
    files = tiles(*(f"{folder}/0.png" for folder in folders.split()))
    assert data.Folder(write_files(tmp_path, files)).sizes.sum() == len(files)
    said = capsys.readouterr().err
    assert said == "" if named is None else f"({named}) look like splits, but all are read" in said


def test_toy_has_both_splits_and_no_number_in_common():
    sources = data.open_sources("toy", size=(30, 48))
    names = [{source.name(i) for i in range(source.sizes.sum())} for source in sources]
    assert [len(some) for some in names] == [source.sizes.sum() for source in sources]
    assert names[0].isdisjoint(names[1]) and sources[0].classes == sources[1].classes
    assert min(sources[1].read(3)["image"]().size) >= 48


# ------------------------------------------------------------------------------------------ subsets


@pytest.mark.parametrize("val, count, wanted", [(0, 0, 0), (0, 1, 1), (0, 512, 1), (1, 4, 4)])
def test_held_out_samples_are_the_first_of_val_or_the_last_of_train(shards, val, count, wanted):
    """Of train at most 5 %: of 23 that is 1."""
    source, samples = opened(shards[1]), everything(opened(shards[1]))
    train, held_out = data.hold_out(source, opened(shards[1]) if val else None, count)
    assert held_out.sizes.sum() == wanted
    if val:
        assert train is source and everything(held_out) == samples[:wanted]
        assert data.hold_out(train, source, 512)[1].sizes.sum() == len(samples)
    else:
        assert everything(train) + everything(held_out) == samples
        assert train.identity != held_out.identity != source.identity


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_share_for_val_is_always_the_same(kind, shards, pets, tmp_path):
    where = shards[1] if kind == "shards" else pets[0]
    whole, share = everything(opened(where)), 0.25
    train, val = data.open_sources(where, val_share=share)
    count = len(whole) // 4  # 5 of 20 and of 23
    assert everything(val) == whole[-count:] and everything(train) == whole[:-count]
    assert val.classes == train.classes == opened(where).classes
    again = data.open_sources(where, val_share=share)
    assert [s.identity for s in again] == [train.identity, val.identity]
    with pytest.raises(ValueError, match="--val-share 0.01 of 2. pictures") as error:
        data.open_sources(where, val_share=0.01)
    one_line(error)
    with pytest.raises(ValueError, match=f"--val-share: leave it out, there is {pets[0]} to"):
        data.open_sources(where, pets[0], val_share=share)


@pytest.mark.parametrize(
    "start, stop", [(0, 23), (0, 0), (7, 8), (6, 9), (8, 20), (3, 5), (22, 23)]
)
def test_a_slice_may_begin_and_end_anywhere(shards, start, stop):
    source = opened(shards[1])
    part, expected = data.Subset(source, range(start, stop)), everything(source)[start:stop]
    assert everything(part) == expected
    assert len(part.sizes) == len(source.sizes)  # as many lanes as the whole source gives
    again = data.Subset(part, range(1, int(part.sizes.sum())))
    assert everything(again) == expected[1:]
