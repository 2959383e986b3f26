"""PNGs that show what a model does: reconstructions, attention, confusion, mistakes."""

import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data import MASK, Batches, channel_statistics, make_picture, normalize, permutation
from kernels import split_heads
from model import pair, patch_statistics, patchify, take
from support.loader import name_unreadable


def denormalize(images):
    """The inverse of data.normalize: (B, C, H, W) float -> uint8, cut to 0 ... 255."""
    statistics = torch.tensor(channel_statistics(images.shape[1]), device=images.device)
    mean, deviation = statistics.view(2, 1, -1, 1, 1)
    return ((images * deviation + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def draw_reconstructions(model, source, path, count=8, seed=0):
    """Write a PNG of a source's first `count` images: see reconstructions."""
    save(reconstructions(model, some_pictures(source, model.config, count), seed), path)


@torch.no_grad()
def reconstructions(model, images, seed=0):
    """A PIL image of images (B, C, H, W) uint8, a row for each: itself, its visible
    patches, and an MAE's reconstruction. seed: of the masks.

    A reconstruction from normalised targets borrows the true mean and deviation of each
    hidden patch. What the means alone show stands in a column before it. The processes of a
    sharded model must all call it, with as many images.
    """
    training = model.training
    model.eval()
    N, P, device = model.num_patches, model.patch_size, model.cls_token.device
    ids = [permutation(N, seed, 0, i, MASK) for i in range(len(images))]
    ids = torch.from_numpy(np.stack(ids)).to(device)  # (B, N)
    pixels = normalize(images.to(device))
    columns = {"reconstructed": reconstruct(model, pixels, ids)}
    if model.normalize_targets:
        columns = {"true means alone": reconstruct(model, pixels, ids, scale=0), **columns}
    hidden = torch.ones_like(ids).scatter(1, ids[:, : model.num_visible], 0).cpu()  # (B, N)
    hidden = unpatchify(hidden[..., None].expand(-1, -1, P**2), P, model.grid)
    seen = torch.where(hidden > 0, torch.full_like(images, 128), images)  # (B, C, H, W)
    model.train(training)
    titles = ["picture", f"seen ({model.num_visible / N:.0%})", *columns]
    return draw_grid([images, seen, *(denormalize(c).cpu() for c in columns.values())], titles)


@torch.no_grad()
def reconstruct(model, images, ids, scale=1):
    """Images with the hidden patches as an MAE predicts them, (B, C, H, W), normalised.

    images, ids: see MAE.forward. Visible patches are copied. A normalised prediction is
    scaled with the true mean and deviation of its patch, which are not predicted. scale:
    of the predictions; 0 leaves the means.
    """
    model.check(images)
    patches = patchify(images, model.patch_size)  # (B, N, P*P*C)
    hidden = ids[:, model.num_visible :]
    # Only a call of the model itself gathers the weights of a sharded one. So for this call,
    # its last step is to return the predictions, and not the loss.
    model.forward_loss = lambda patches, predictions, ids: predictions
    try:
        predictions = model(images, ids).to(patches.dtype) * scale  # (B, N - K, P*P*C)
    finally:
        del model.forward_loss  # the class has its own
    if model.normalize_targets:
        mean, deviation = patch_statistics(take(patches, hidden))
        predictions = predictions * deviation + mean
    hidden = hidden[..., None].expand_as(predictions)
    patches = patches.scatter(1, hidden, predictions)
    return unpatchify(patches, model.patch_size, model.grid)


def unpatchify(patches, patch_size, grid):
    """The inverse of patchify: (B, N, P*P*C) -> (B, C, H, W). grid: (H // P, W // P)."""
    B, P, (rows, columns) = patches.shape[0], patch_size, grid
    patches = patches.reshape(B, rows, columns, P, P, -1).permute(0, 5, 1, 3, 2, 4)
    return patches.reshape(B, -1, rows * P, columns * P)


@torch.inference_mode()
def draw_attention(model, source, path, count=8):
    """Write a PNG of a source's first `count` images, a row for each: itself, and the
    class token's attention in a ViT's last block, of all heads and of the first four."""
    images = some_pictures(source, model.config, count)
    normal = normalize(images.to(model.cls_token.device))
    attention = class_attention(model, normal).cpu()  # (B, heads, N)
    maps = torch.cat([attention.mean(dim=1, keepdim=True), attention[:, :4]], dim=1)
    maps = maps.unflatten(2, model.grid)  # (B, maps, rows, columns)
    maps = maps / maps.amax(dim=(2, 3), keepdim=True)
    maps = F.interpolate(maps, images.shape[2:], mode="nearest")  # (B, maps, H, W)
    # Attention scales the brightness of the image; where it is 0, 15 % remain.
    maps = (0.15 + 0.85 * maps)[:, :, None]  # (B, maps, 1, H, W)
    scaled = (images[:, None] * maps).to(torch.uint8).unbind(dim=1)
    titles = ["picture", "all heads", *(f"head {i}" for i in range(1, len(scaled)))]
    save(draw_grid([images, *scaled], titles), path)


def class_attention(model, images):
    """Attention from the class token to the patches in a ViT's last block, (B, heads, N)."""
    x = model.tokens(images)
    for block in model.blocks[:-1]:
        x = block(x)
    attn = model.blocks[-1].attn
    q, k, _ = split_heads(attn.qkv(model.blocks[-1].norm1(x)), attn.heads)
    scores = q[:, :, :1] @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    return scores.softmax(dim=-1)[:, :, 0, 1:]


def first_pictures(source, config, count):
    """A batch of the first `count` pictures of a source: see data.Batches. config: a model's."""
    size, channels = pair(config["image_size"]), config["channels"]
    make = lambda sample, key: {"images": make_picture(sample, key, size, channels)}
    return Batches(source, make, count)[0]


def some_pictures(source, config, count):
    """The readable images among the first `count` of a source, (B, C, H, W) uint8.

    config: a model's. Raises ValueError if none is readable.
    """
    batch = first_pictures(source, config, count)
    name_unreadable(source, batch["bad"])
    if not batch["weight"].any():
        raise ValueError(f"no readable picture among the first {count}: {source.identity}")
    return batch["images"][batch["weight"] > 0]


def draw_step(run, batches):
    """Write OUT/step-N.png: the first 64 pictures of step N = run.draw_step, as it trains on them.

    batches: a data.Batches of one process. Of a clip, the middle frame is drawn. The position
    and the name of each is printed. Raises ValueError if the rows have no pictures.
    """
    first, images = (run.draw_step - 1) * batches.micro_batches, []
    for number in range(first, first + batches.micro_batches):
        batch = batches[number]
        if "images" not in batch:
            raise ValueError("--draw-step: this training reads features, not pictures")
        rows = [batch[name].tolist() for name in ("positions", "samples", "weight")]
        for position, sample, weight in list(zip(*rows))[: 64 - len(images)]:
            note = "" if weight else " (weight 0)"
            print(f"position {position}: {batches.source.name(sample)}{note}")
        images += batch["images"]
        if len(images) >= 64:
            break
    images = torch.stack(images[:64])
    images = images[:, :, images.shape[2] // 2] if images.ndim == 5 else images
    columns = [images[i::8] for i in range(min(8, len(images)))]
    first = (run.draw_step - 1) * batches.batch_size
    titles = [f"position {first}, ...", *[""] * 7]
    os.makedirs(run.out, exist_ok=True)
    save(draw_grid(columns, titles), run.out / f"step-{run.draw_step}.png")


def draw_confusion(table, names, path):
    """Write a PNG of a confusion matrix.

    table: (classes, classes) int64 counts, a row for each true class. names: of the
    classes. A cell is darker for a larger fraction of its row, and blue for a mistake.
    """
    side, left = max(4, min(36, 1200 // len(names))), 150 if len(names) <= 60 else 6
    extent = left + side * len(names) + 6
    image = Image.new("RGB", (extent, extent), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(min(13, side * 2 // 3))
    draw.text((6, 6), "rows: truth\ncolumns: answer", "black", ImageFont.load_default(13))
    shares = table / table.sum(dim=1, keepdim=True).clamp(min=1)
    grey = (255 * (1 - shares)).to(torch.uint8)  # (classes, classes)
    blue = grey.where(torch.eye(len(names), dtype=torch.bool), 255)
    cells = Image.fromarray(torch.stack([grey, grey, blue], dim=2).numpy())
    image.paste(cells.resize((side * len(names),) * 2, Image.Resampling.NEAREST), (left, left))
    for row, name in enumerate(names if left > 6 else ()):
        y = left + row * side + side // 6
        draw.text((left - 6, y), name[:20], "black", font, anchor="ra")
        label = Image.new("RGB", (left, side), "white")
        ImageDraw.Draw(label).text((6, side // 6), name[:20], "black", font)
        image.paste(label.rotate(90, expand=True), (left + row * side, 0))
    for row, column in table.nonzero().tolist() if side > 24 else ():
        centre = left + column * side + side // 2, left + row * side + side // 2
        colour = "white" if shares[row, column] > 0.5 else "black"
        draw.text(centre, str(int(table[row, column])), colour, font, "mm")
    save(image, path)


def draw_mistakes(source, lines, config, path):
    """Write a PNG of a source's first images, each above a line of text. config: a model's."""
    if not lines:
        return print(f"there are no mistakes: {path} is not written")
    images = some_pictures(source, config, len(lines)).permute(0, 2, 3, 1).numpy()
    side, cells = 224, []
    for pixels, line in zip(images, lines):
        picture = Image.fromarray(pixels.squeeze()).convert("RGB")
        cell = Image.new("RGB", (side, side + 22), "white")
        cell.paste(ImageOps.pad(picture, (side, side), color="white"))
        ImageDraw.Draw(cell).text((0, side + 4), line[:36], "black", ImageFont.load_default(13))
        cells.append(torch.from_numpy(np.array(cell)).permute(2, 0, 1))
    columns = [torch.stack(cells[i::4]) for i in range(min(4, len(cells)))]
    save(draw_grid(columns, ["mistakes", "", "", ""]), path)


def draw_grid(columns, titles):
    """A PIL image of columns of images (B, C, H, W) uint8, of which the first is the longest.

    titles: of the columns. C is 1, 3 or 4. Small images are enlarged by a whole number.
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
    return canvas


def save(image, path):
    replaced = " (replaced)" if os.path.exists(path) else ""
    image.save(path)
    print(f"wrote {path}{replaced}")
