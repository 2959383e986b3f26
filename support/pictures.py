"""PNG files that show what a model does: reconstructions, attention, confusion, mistakes."""

import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data import MASK, Batches, channel_statistics, make_picture, normalize, permutation
from kernels import split_heads
from model import pair, patch_statistics, patchify, take


def denormalize(images):
    """The inverse of data.normalize: float (B, C, H, W) -> uint8, clipped to 0 ... 255."""
    statistics = torch.tensor(channel_statistics(images.shape[1]), device=images.device)
    mean, deviation = statistics.view(2, 1, -1, 1, 1)
    return ((images * deviation + mean) * 255).round().clamp(0, 255).to(torch.uint8)


@torch.inference_mode()
def draw_reconstructions(model, source, path, count=8, seed=0):
    """Write a PNG with a row for each image: itself, its visible patches, the reconstruction.

    model: an MAE; source: its first `count` images are drawn; seed: of their masks.
    """
    images = some_pictures(source, model.config, count)
    N, device = model.num_patches, model.cls_token.device
    ids = [permutation(N, seed, 0, i, MASK) for i in range(len(images))]
    ids = torch.from_numpy(np.stack(ids)).to(device)  # (B, N)
    reconstructed = denormalize(reconstruct(model, normalize(images.to(device)), ids)).cpu()
    P, visible = model.patch_size, ids[:, : model.num_visible, None].cpu()  # (B, K, 1)
    hidden = torch.ones(len(images), N, 1).scatter(1, visible, 0).expand(-1, -1, P**2)
    hidden = unpatchify(hidden, P, model.grid)  # (B, 1, H, W)
    seen = torch.where(hidden > 0, torch.full_like(images, 128), images)  # (B, C, H, W)
    titles = ["picture", f"seen ({model.num_visible / N:.0%})", "reconstructed"]
    draw_grid([images, seen, reconstructed], titles, path)


@torch.no_grad()
def reconstruct(model, images, ids):
    """The images with the hidden patches as an MAE predicts them, (B, C, H, W), normalised.

    images, ids: see MAE.forward. Visible patches are copied. A normalised prediction is scaled back
    with the true mean and deviation of its patch: the network does not predict these two numbers.
    """
    model.check(images)
    patches = patchify(images, model.patch_size)  # (B, N, P*P*C)
    hidden = ids[:, model.num_visible :]
    x = model.forward_encoder(patches, ids)  # (B, 1 + K, D)
    predictions = model.forward_decoder(x, ids).to(patches.dtype)  # (B, N - K, P*P*C)
    if model.normalize_targets:
        mean, deviation = patch_statistics(take(patches, hidden))
        predictions = predictions * deviation + mean
    hidden = hidden[..., None].expand(-1, -1, patches.shape[2])
    return unpatchify(patches.scatter(1, hidden, predictions), model.patch_size, model.grid)


def unpatchify(patches, patch_size, grid):
    """The inverse of patchify: (B, N, P*P*C) -> (B, C, H, W), with grid = (H // P, W // P)."""
    B, P, (rows, columns) = patches.shape[0], patch_size, grid
    patches = patches.reshape(B, rows, columns, P, P, -1).permute(0, 5, 1, 3, 2, 4)
    return patches.reshape(B, -1, rows * P, columns * P)


@torch.inference_mode()
def draw_attention(model, source, path, count=8):
    """Write a PNG with a row for each image: itself, and the attention of the class token in the
    last block, as the mean over the heads and of the first four heads.

    model: a ViT; source: its first `count` images are drawn.
    """
    images = some_pictures(source, model.config, count)
    normal = normalize(images.to(model.cls_token.device))
    attention = class_attention(model, normal).cpu()  # (B, heads, N)
    maps = torch.cat([attention.mean(dim=1, keepdim=True), attention[:, :4]], dim=1)
    maps = maps.unflatten(2, model.grid)  # (B, maps, rows, columns)
    maps = maps / maps.amax(dim=(2, 3), keepdim=True)
    maps = F.interpolate(maps, images.shape[2:], mode="nearest")  # (B, maps, H, W)
    # Attention scales the brightness of the image; where it is 0, 15 % remain.
    scaled = [(images * (0.15 + 0.85 * m[:, None])).to(torch.uint8) for m in maps.unbind(dim=1)]
    titles = ["picture", "all heads", *(f"head {i + 1}" for i in range(len(scaled) - 1))]
    draw_grid([images, *scaled], titles, path)


def class_attention(model, images):
    """A ViT's attention from the class token to the patches in the last block, (B, heads, N)."""
    x = model.tokens(images)
    for block in model.blocks[:-1]:
        x = block(x)
    attn = model.blocks[-1].attn
    q, k, _ = split_heads(attn.qkv(model.blocks[-1].norm1(x)), attn.heads)
    scores = q[:, :, :1] @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    return scores.softmax(dim=-1)[:, :, 0, 1:]


def some_pictures(source, config, count):
    """The readable images among the first `count` of a source, (B, C, H, W) uint8.

    config: of the model, which has image_size and channels. Raises ValueError if none is readable.
    """
    size, channels = pair(config["image_size"]), config["channels"]
    make = lambda sample, key: {"images": make_picture(sample, key, size, channels)}
    batch = Batches(source, make, count)[0]
    for name in batch["bad"]:
        print(f"unreadable, left out: {name}", file=sys.stderr)
    if not batch["weight"].any():
        raise ValueError(f"no readable picture among the first {count}: {source.identity}")
    return batch["images"][batch["weight"] > 0]


def draw_confusion(table, names, path):
    """Write a PNG of a confusion matrix.

    table: (classes, classes) int64 counts, a row for each true class; names: of the classes. A cell
    is darker for a larger fraction of its row, and blue for a mistake.
    """
    side, left = max(4, min(36, 1200 // len(names))), 150 if len(names) <= 60 else 6
    image = Image.new("RGB", (left + side * len(names) + 6, left + side * len(names) + 6), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(min(13, side * 2 // 3))
    shares = table / table.sum(dim=1, keepdim=True).clamp(min=1)
    for row, name in enumerate(names if left > 6 else ()):
        y = left + row * side + side // 6
        draw.text((left - 6, y), name[:20], "black", font, anchor="ra")
        label = Image.new("RGB", (left, side), "white")
        ImageDraw.Draw(label).text((6, side // 6), name[:20], "black", font)
        image.paste(label.rotate(90, expand=True), (left + row * side, 0))
    draw.text((6, 6), "rows: truth\ncolumns: answer", "black", ImageFont.load_default(13))
    for (row, column), share in np.ndenumerate(shares.numpy()):
        x, y, grey = left + column * side, left + row * side, int(255 * (1 - share))
        colour = grey, grey, 255 if row != column else grey
        draw.rectangle((x, y, x + side - 1, y + side - 1), colour)
        if side > 24 and table[row, column]:
            centre, colour = (x + side // 2, y + side // 2), "white" if share > 0.5 else "black"
            draw.text(centre, str(int(table[row, column])), colour, font, "mm")
    image.save(path)
    print(f"wrote {path}")


def draw_mistakes(source, lines, config, path):
    """Write a PNG of a source's first images, each with a line of text below. config: a model's."""
    if not lines:
        return print(f"there are no mistakes: {path} is not written")
    images = some_pictures(source, config, len(lines)).permute(0, 2, 3, 1).numpy()
    side, columns = 224, min(4, len(lines))
    rows = -(-len(lines) // columns)
    canvas = Image.new("RGB", (columns * (side + 6) + 6, rows * (side + 28) + 6), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for i, (pixels, line) in enumerate(zip(images, lines)):
        x, y = 6 + i % columns * (side + 6), 6 + i // columns * (side + 28)
        picture = Image.fromarray(pixels.squeeze()).convert("RGB")
        canvas.paste(ImageOps.pad(picture, (side, side), color="white"), (x, y))
        draw.text((x, y + side + 4), line[:36], "black", font)
    canvas.save(path)
    print(f"wrote {path}")


def draw_grid(columns, titles, path):
    """Write a PNG of columns of images: a (B, C, H, W) uint8 tensor and a title for each column.

    C is 1 (grey), 3 or 4. Small images are enlarged by a whole number.
    """
    B, C, H, W = columns[0].shape
    scale, gap, top = max(1, 160 // min(H, W)), 6, 22
    width, height = W * scale + gap, H * scale + gap
    canvas = Image.new("RGB", (len(columns) * width + gap, top + B * height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for x, (column, title) in enumerate(zip(columns, titles)):
        draw.text((gap + x * width, 3), title, fill="black", font=font)
        for y, pixels in enumerate(column.permute(0, 2, 3, 1).numpy()):
            picture = Image.fromarray(pixels[:, :, 0] if C == 1 else pixels).convert("RGB")
            picture = picture.resize((W * scale, H * scale), Image.Resampling.NEAREST)
            canvas.paste(picture, (gap + x * width, top + y * height))
    replaced = " (replaced)" if os.path.exists(path) else ""
    canvas.save(path)
    print(f"wrote {path}{replaced}")
