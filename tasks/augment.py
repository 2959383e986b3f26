"""Augmentation as in the public MAE code: RandAugment, random erasing, mixup and CutMix."""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

import data
from model import architecture
from support import flags
from support.plan import peak_lr, planned_batch


class Recipe(NamedTuple):
    """Settings that depend on the size of an encoder whose weights are all trained."""

    batch_size: int
    lr: float  # peak, for this batch size and width: see peak_lr
    epochs: int
    layer_decay: float
    drop_path: float
    width: int = 768


# The public MAE code's FINETUNE.md. A toy run is too short for most of it (our choice).
USUAL = {"min_crop": 0.08, "mixup": 0.8, "cutmix": 1.0, "rand_augment": 9.0, "erase": 0.25}
TOY = dict.fromkeys(USUAL, 0.0) | {"min_crop": 1.0}


def add_flags(groups, recipes, magnitude=9):
    """Add the flags of a task that trains every weight. magnitude: RandAugment's default."""

    def by_size(name):
        sizes = "B", "L", "H", "toy"
        return ", ".join(f"{size} {getattr(recipes[size], name):g}" for size in sizes)

    below_1 = flags.number(float, 0, 0.999)  # 1 would drop all of the last block
    add = groups["model"].add_argument
    add("--drop-path", type=below_1, help=f"of the last block ({by_size('drop_path')})")
    add = groups["optimisation"].add_argument
    add("--lr", type=flags.positive, help=f"peak ({by_size('lr')}, or less: printed first)")
    layer_decay = f"of the lr, from block to block ({by_size('layer_decay')})"
    add("--layer-decay", type=flags.fraction, help=layer_decay)
    magnitudes = flags.number(float, 0, 10)
    add("--weight-decay", type=flags.not_negative, help="not of 1-D parameters (0.05)")
    add("--smoothing", type=flags.fraction, help="of labels (0.1)")
    add("--mixup", type=flags.fraction, help="alpha, 0: none (0.8; toy: 0)")
    add("--cutmix", type=flags.fraction, help="alpha, 0: none (1.0; toy: 0)")
    add("--rand-augment", type=magnitudes, help=f"magnitude, 0: none ({magnitude}; toy: 0)")
    add("--erase", type=flags.fraction, help="probability of erasing (0.25; toy: 0)")


def recipe(run, recipes, **others):
    """The recipe of a task that trains every weight: see load_task in finetune.py. others:
    the task's own values."""
    own = recipes.get(run.config["size"], recipes["B"])
    batch_size = run.batch_size or planned_batch(own.batch_size, run)
    usual, actual = (own.batch_size, own.width), (batch_size, architecture(run.config["size"])[0])
    run.lr, run.lr_origin = peak_lr(run.lr, own.lr, usual, actual)
    settings = own._asdict() | {"batch_size": batch_size, "lr": run.lr}
    del settings["width"]
    settings |= {"pool": "mean", "weight_decay": 0.05, "smoothing": 0.1}
    settings |= (TOY if run.toy else USUAL) | others
    magnitude = settings["rand_augment"] if run.rand_augment is None else run.rand_augment
    if magnitude and run.config["channels"] == 4:
        raise ValueError("RandAugment wants grey or RGB pictures: give --rand-augment 0")
    return settings


def maker(run, layers, operations=2):
    """make for data.Batches: augmented pictures or clips, with numbers for mix() and for drop
    path in so many layers. operations: of RandAugment."""
    options = {"magnitude": run.rand_augment, "erasing": run.erase}
    change = partial(augment, operations=operations, **options)
    make = partial(run.make, min_crop=run.min_crop)
    return partial(augmented, make=make, change=change, count=MIX_DRAWS + 2 * layers)


def augmented(sample, key, make, change, count=0):
    """The row of make(sample, key), its picture or each frame of its clip changed alike by
    change(pixels, key), with numbers (count,) uniform in [0, 1) to draw from on the device."""
    row = make(sample, key)
    numbers = data.uniform(data.random_bits(count, *key, data.DEVICE))
    row["numbers"] = torch.from_numpy(numbers).float()
    images = row["images"]  # (C, H, W) or (C, T, H, W)
    if sample and images.ndim == 4:
        frames = [change(frame, key) for frame in images.unbind(dim=1)]
        row["images"] = torch.stack(frames, dim=1)
    elif sample:
        row["images"] = change(images, key)
    return row


def filling(image):
    """Options of PIL to move pixels: bicubic, with the mean colour for what lies outside."""
    mean, _ = data.channel_statistics(len(image.getbands()))
    colour = tuple(round(255 * m) for m in mean)
    colour = colour if len(colour) > 1 else colour[0]
    return {"fillcolor": colour, "resample": Image.Resampling.BICUBIC}


def warp(image, *matrix):
    """The pixel at (x, y) of the result is taken from (ax + by + c, dx + ey + f)."""
    affine = Image.Transform.AFFINE
    return image.transform(image.size, affine, matrix, **filling(image))


def enhance(kind):
    """s 0: unchanged, 1: almost twice as much, -1: a tenth."""
    return lambda image, level, s: kind(image).enhance(max(0.1, 1 + 0.9 * s))


# RandAugment's operations in the "increasing" ranges of timm's rand-m9-mstd0.5-inc1. level is in
# 0 .. 1; where the operation has a direction, s is the level or its negative.
OPERATIONS = {
    "auto contrast": lambda image, level, s: ImageOps.autocontrast(image),
    "equalize": lambda image, level, s: ImageOps.equalize(image),
    "invert": lambda image, level, s: ImageOps.invert(image),
    "rotate": lambda image, level, s: image.rotate(30 * s, **filling(image)),  # degrees
    "posterize": lambda image, level, s: image.point(lambda v: v & 0xFF00 >> 4 - int(4 * level)),
    "solarize": lambda image, level, s: ImageOps.solarize(image, 256 - int(256 * level)),
    "solarize add": lambda image, level, s: image.point(lambda v: v + (v < 128) * int(110 * level)),
    "color": enhance(ImageEnhance.Color),
    "contrast": enhance(ImageEnhance.Contrast),
    "brightness": enhance(ImageEnhance.Brightness),
    "sharpness": enhance(ImageEnhance.Sharpness),
    "shear x": lambda image, level, s: warp(image, 1, 0.3 * s, 0, 0, 1, 0),
    "shear y": lambda image, level, s: warp(image, 1, 0, 0, 0.3 * s, 1, 0),
    "translate x": lambda image, level, s: warp(image, 1, 0, 0.45 * s * image.width, 0, 1, 0),
    "translate y": lambda image, level, s: warp(image, 1, 0, 0, 0, 1, 0.45 * s * image.height),
}


def normal(draws):
    """(..., 2) uniform in [0, 1) -> (...) standard normal numbers (Box and Muller)."""
    return np.sqrt(-2 * np.log1p(-draws[..., 0])) * np.cos(2 * math.pi * draws[..., 1])


def augment(pixels, key, magnitude, erasing, operations=2):
    """RandAugment and random erasing of (C, H, W) uint8. key: (seed, epoch, position).

    RandAugment: so many operations, the same perhaps twice, each done with probability 0.5,
    at a level of a tenth of N(magnitude, 0.5). Erasing, with this probability: fill a box of
    2 % to a third of the area, with sides of 0.3 to 1 / 0.3, with noise N(0, 1) in normalised
    units (a byte cuts it at some 2.1 deviations).
    """
    count = 5 * operations + 24
    draws = data.uniform(data.random_bits(count, *key, data.AUGMENT))
    chosen, draws = draws[:-24], draws[-24:]
    if magnitude:
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy().squeeze())
        for which, done, *noise, direction in chosen.reshape(operations, 5):
            if done < 0.5:
                level = magnitude + 0.5 * normal(np.array(noise))
                level = float(np.clip(level / 10, 0, 1))
                operation = list(OPERATIONS.values())[int(which * len(OPERATIONS))]
                image = operation(image, level, level if direction < 0.5 else -level)
        pixels = np.array(image).reshape(*image.size[::-1], -1)  # (H, W, C)
        pixels = torch.from_numpy(pixels).permute(2, 0, 1)
    if draws[0] >= erasing:
        return pixels
    C, H, W = pixels.shape
    for area, ratio in draws[1:21].reshape(10, 2):  # the first of ten boxes that fits
        area, ratio = H * W * (0.02 + (1 / 3 - 0.02) * area), 0.3 ** (1 - 2 * ratio)
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < H and w < W:
            top, left = int(draws[21] * (H - h + 1)), int(draws[22] * (W - w + 1))
            bits = data.random_bits(count + 2 * h * w * C, *key, data.AUGMENT)[count:]
            mean, deviation = np.array(data.channel_statistics(C))[:, :, None, None]
            noise = normal(data.uniform(bits).reshape(C, h, w, 2)) * deviation + mean
            noise = (255 * noise).round().clip(0, 255).astype(np.uint8)
            pixels[:, top : top + h, left : left + w] = torch.from_numpy(noise)
            break
    return pixels


MIX_DRAWS = 4  # numbers of a sample for mix(); drop path's come after them


def mix(images, weight, numbers, mixup, cutmix):
    """Mixup (arXiv 1710.09412) or CutMix (1905.04899), half and half, of pairs 2i and 2i + 1.

    images (B, C, [T,] H, W), all T alike; weight (B,), 0 for an unreadable one, which is not
    mixed in; numbers (B, MIX_DRAWS) uniform, of which the pair's first are used; mixup,
    cutmix: alphas of Beta(alpha, alpha), at most 1, 0 for none. Returns the images and (B,)
    the share of each one's own label; its neighbour's has the rest. (timm draws one share for
    a batch. Here nothing may depend on how a batch is dealt.)
    """
    if not mixup and not cutmix:
        return images, torch.ones_like(weight)
    frames, images = images.shape[1:-2], images.flatten(1, -3)  # of clips: (B, C*T, H, W)
    H, W = images.shape[2:]
    numbers = numbers[::2].repeat_interleave(2, dim=0)  # (B, MIX_DRAWS), alike for both
    which, u, *centre = numbers.unbind(dim=1)  # (B,) each
    cut = (which < 0.5) if mixup and cutmix else torch.full_like(weight > 0, cutmix > 0)
    share = torch.where(cut, beta(u, cutmix or 1.0), beta(u, mixup or 1.0))
    # CutMix's box has 1 - share of the area, is centred anywhere, and cut at the edges.
    rows, columns = (torch.arange(side, device=images.device) for side in (H, W))
    half = (1 - share).sqrt()[:, None] / 2
    inside_y = ((rows + 0.5) / H - centre[0][:, None]).abs() < half  # (B, H)
    inside_x = ((columns + 0.5) / W - centre[1][:, None]).abs() < half  # (B, W)
    box = (inside_y[:, :, None] & inside_x[:, None, :])[:, None]  # (B, 1, H, W)
    share = torch.where(cut, 1 - box.float().mean(dim=(1, 2, 3)), share)
    alone = weight.unflatten(0, (-1, 2)).amin(dim=1).repeat_interleave(2) == 0
    cut, alone, blend = (x[:, None, None, None] for x in (cut, alone, share))
    own = torch.where(alone, 1.0, torch.where(cut, 1 - box.float(), blend))
    neighbour = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    images = (own * images + (1 - own) * neighbour).unflatten(1, frames)
    return images, torch.where(alone.flatten(), 1.0, share)


def beta(u, alpha):
    """Uniform numbers in [0, 1) -> draws from Beta(alpha, alpha): its inverse, in steps."""
    values = (torch.arange(4096, device=u.device) + 0.5) / 4096
    mass = (values * (1 - values)) ** (alpha - 1)
    return values[torch.searchsorted(mass.cumsum(dim=0), u * mass.sum()).clamp(max=4095)]


def label_loss(logits, labels, share, smoothing):
    """Cross-entropy with a sample's label and its neighbour's: (losses (B,), weights (B,)).

    logits (B, heads, classes): losses are sums over independent heads. share: see mix(). The
    mean over a batch is losses.sum() / weights.sum(). Labels below 0 weigh nothing.
    """
    losses, weights = 0, 0
    logits = logits.float().transpose(1, 2)  # (B, classes, heads)
    options = {"reduction": "none", "label_smoothing": smoothing}
    neighbours = labels.unflatten(0, (-1, 2)).flip(1).flatten()
    for label, part in ((labels, share), (neighbours, 1 - share)):
        part = part * (label >= 0)
        targets = label.clamp(min=0)[:, None].expand(-1, logits.shape[2])  # (B, heads)
        loss = F.cross_entropy(logits, targets, **options)  # (B, heads)
        losses, weights = losses + part * loss.sum(dim=1), weights + part
    return losses, weights
