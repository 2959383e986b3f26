"""RandAugment, random erasing, mixup, CutMix and their loss: by hand, and in distribution."""

import math

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image, ImageEnhance, ImageOps

from tasks import augment

# ------------------------------------------------------------------------------------ augmentation

# The ranges of timm's rand-m9-mstd0.5-inc1, by hand, at levels 10, 9 and 5 of 10 and towards one
# side: degrees, bits, thresholds, additions, factors, shares.
ENHANCED = ("color", "contrast", "brightness", "sharpness")
RANGES = {
    "rotate": (30, 27, 15),
    "posterize": (0, 1, 2),
    "solarize": (0, 26, 128),
    "solarize add": (110, 99, 55),
    **dict.fromkeys(ENHANCED, (1.9, 1.81, 1.45)),
    **dict.fromkeys(("shear x", "shear y"), (0.3, 0.27, 0.15)),
    **dict.fromkeys(("translate x", "translate y"), (0.45, 0.405, 0.225)),
}
GREY = (124, 116, 104)  # 255 x ImageNet's mean


def by_hand(name, image, value):
    w, h = image.size
    affine = {
        "shear x": (1, value, 0, 0, 1, 0),
        "shear y": (1, 0, 0, value, 1, 0),
        "translate x": (1, 0, value * w, 0, 1, 0),
        "translate y": (1, 0, 0, 0, 1, value * h),
    }
    pixels = np.asarray(image).astype(int)
    if name in affine:
        how = {"resample": Image.Resampling.BICUBIC, "fillcolor": GREY}
        return image.transform(image.size, Image.Transform.AFFINE, affine[name], **how)
    if name == "rotate":
        return image.rotate(value, Image.Resampling.BICUBIC, fillcolor=GREY)
    if name == "posterize":
        return Image.fromarray((pixels // 2 ** (8 - value) * 2 ** (8 - value)).astype(np.uint8))
    if name == "solarize":
        return Image.fromarray(np.where(pixels < value, pixels, 255 - pixels).astype(np.uint8))
    if name == "solarize add":
        added = np.minimum(255, pixels + value)
        return Image.fromarray(np.where(pixels < 128, added, pixels).astype(np.uint8))
    return getattr(ImageEnhance, name.capitalize())(image).enhance(value)


@pytest.mark.parametrize("name", RANGES)
def test_ranges_of_randaugment_by_hand(name):
    image = picture(3)
    for level, value in zip((1.0, 0.9, 0.5), RANGES[name]):
        opposite = 2 - value if name in ENHANCED else -value
        if name in ("posterize", "solarize", "solarize add"):  # these have no direction
            opposite = value
        for s, expected in ((level, value), (-level, opposite)):
            found = augment.OPERATIONS[name](image, level, s)
            assert found.tobytes() == by_hand(name, image, expected).tobytes()


def test_operations_of_randaugment_without_a_range():
    plain = {"auto contrast", "equalize", "invert"}
    assert augment.OPERATIONS.keys() == RANGES.keys() | plain
    for name in plain:
        ours = augment.OPERATIONS[name](picture(4), 0.9, -0.9)
        theirs = getattr(ImageOps, name.replace(" ", ""))(picture(4))
        assert ours.tobytes() == theirs.tobytes()


def test_two_operations_each_done_half_of_the_time_at_levels_around_9(monkeypatch):
    done = []

    def recorder(name):
        return lambda image, level, s: done[-1].append((name, level, s)) or image

    monkeypatch.setattr(augment, "OPERATIONS", {name: recorder(name) for name in range(15)})
    pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
    for position in range(6000):
        done.append([])
        augment.augment(pixels, (0, 0, position), 9, 0)
    # 6000 draws: four standard errors of a share are at most 0.026, of a count of 400, 80.
    counts = np.bincount([len(ops) for ops in done])
    assert counts / 6000 == pytest.approx([0.25, 0.5, 0.25], abs=0.026)
    names, levels, signed = map(np.array, zip(*(op for ops in done for op in ops)))
    assert np.bincount(names, minlength=15).min() > 320 and np.bincount(names).max() < 480
    # N(9, 0.5) of 10, cut at 10: 2.3 % are there.
    assert np.median(levels) == pytest.approx(0.9, abs=0.003) and levels.max() == 1.0
    assert np.mean(levels == 1.0) == pytest.approx(0.0228, abs=0.01)
    deviation = np.std(levels[levels < 0.9]) / math.sqrt(1 - 2 / math.pi)  # of half a normal
    assert deviation == pytest.approx(0.05, abs=0.003)
    assert np.mean(signed > 0) == pytest.approx(0.5, abs=0.026)
    assert (abs(signed) == levels).all()


def test_erasing_fills_boxes_with_noise():
    shares, found = [], []
    for position in range(3000):
        pixels = torch.full((3, 40, 60), 7, dtype=torch.uint8)
        erased = augment.augment(pixels, (0, 0, position), 0, 0.25)
        box = (erased != 7).any(dim=0)
        if box.any():
            rows, columns = box.any(dim=1).nonzero()[:, 0], box.any(dim=0).nonzero()[:, 0]
            height, width = (int(side[-1] - side[0]) + 1 for side in (rows, columns))
            shares.append(height * width / 2400)
            assert 0.25 < height / width < 4  # 0.3 to 1 / 0.3, rounded to pixels
            found.append(erased[:, box].float())
    assert len(shares) / 3000 == pytest.approx(0.25, abs=0.032)
    assert 0.015 < min(shares) < 0.03 and 0.29 < max(shares) < 0.35
    assert np.mean(shares) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    pixels = torch.cat(found, dim=1) / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels.median(dim=1).values, mean, atol=0.01, rtol=0)
    # Cut at 0 and 1, some 2 deviations away, a normal number varies a little less.
    spread = pixels.std(dim=1) / deviation
    assert spread.min() > 0.94 and spread.max() < 1.0


def test_an_augmentation_is_a_pure_function_of_its_key():
    pixels = torch.from_numpy(np.array(picture(1))).permute(2, 0, 1)
    made = [augment.augment(pixels.clone(), (0, 1, p), 9, 0.5) for p in (5, 6, 5)]
    assert torch.equal(made[0], made[2]) and not torch.equal(made[0], made[1])
    grey = augment.augment(pixels[:1].clone(), (0, 1, 5), 9, 0.5)
    assert grey.shape == (1, *pixels.shape[1:])


# ---------------------------------------------------------------------------------- mixing and loss


def mixed(count, mixup, cutmix, weight=None):
    """mix() of pictures whose pixels are their number: (shares of the own one, images)."""
    images = torch.arange(float(count))[:, None, None, None].expand(-1, 1, 16, 24)
    numbers = torch.rand(count, augment.MIX_DRAWS, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(count) if weight is None else weight
    images, share = augment.mix(images, weight, numbers, mixup, cutmix)
    return share, images


def test_mixup_blends_pairs_and_says_how_much():
    share, images = mixed(4000, 0.8, 0.0)
    own, other = torch.arange(4000.0), torch.arange(4000) ^ 1
    expected = share * own + (1 - share) * other
    torch.testing.assert_close(images[:, 0, 3, 5], expected)
    assert torch.equal(share[::2], share[1::2])
    # Beta(0.8, 0.8): mean 1/2, variance 1 / (4 (2 x 0.8 + 1)); 2000 draws.
    assert share.mean().item() == pytest.approx(0.5, abs=0.03)
    assert share.var().item() == pytest.approx(1 / (4 * 2.6), abs=0.008)


def test_cutmix_pastes_a_box_and_says_how_much():
    share, images = mixed(2000, 0.0, 1.0)
    own = (images[:, 0] == torch.arange(2000)[:, None, None]).float()
    other = (images[:, 0] == (torch.arange(2000) ^ 1)[:, None, None]).float()
    assert torch.equal(own + other, torch.ones_like(own))
    torch.testing.assert_close(own.mean(dim=(1, 2)), share)
    for picture_of_other in other[:50]:  # one box: its pixels are all of its rows and columns
        rows, columns = picture_of_other.any(dim=1), picture_of_other.any(dim=0)
        assert torch.equal(picture_of_other.bool(), rows[:, None] & columns[None, :])


def test_half_of_the_pairs_are_mixed_half_are_cut_and_unreadable_ones_neither():
    share, images = mixed(4000, 0.8, 1.0)
    blended = (images[::2, 0] % 1 != 0).flatten(1).any(dim=1)
    assert blended.double().mean().item() == pytest.approx(0.5, abs=0.045)
    assert torch.equal(share[::2], share[1::2])
    share, images = mixed(4, 0.8, 0.0, torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert share[0] == 1 and (images[0] == 0).all() and share[2] < 1
    share, images = mixed(4, 0.0, 0.0)
    assert (share == 1).all() and (images[3] == 3).all()


def test_the_loss_is_that_of_dense_targets():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 2, 5, generator=generator)
    labels, share = torch.tensor([0, 4, 2, 2, 3, -1]), torch.tensor([0.3, 0.3, 1, 1, 0.6, 0.6])
    losses, weights = augment.label_loss(logits, labels, share, 0.1)
    expected, expected_weights = torch.zeros(6), torch.zeros(6)
    for i, partner in enumerate((1, 0, 3, 2, 5, 4)):
        for label, part in ((labels[i], share[i]), (labels[partner], 1 - share[i])):
            if label >= 0:
                target = torch.full((5,), 0.1 / 5)
                target[label] += 0.9
                loss = -(logits[i].log_softmax(dim=1) * target).sum()  # of both heads
                expected[i] += part * loss
                expected_weights[i] += part
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(weights, expected_weights)
