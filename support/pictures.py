"""PNGs that show what a model does: reconstructions, attention, confusion, mistakes."""

import glob
import itertools
import math
import os
import re
import unicodedata

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data import MASK, Batches, channel_statistics, make_picture, normalize, permutation
from kernels import split_heads
from model import pair, patch_statistics, patchify, take
from support.loader import name_unreadable

# Colours of `heat`, at equal distances: those of matplotlib's inferno.
HEAT = [(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)]
HEAT = torch.tensor(HEAT, dtype=torch.float32)

# Where Linux, macOS and Windows keep fonts.
FONTS = ["/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"]
FONTS += ["/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"]
FONTS += ["C:/Windows/Fonts", "~/AppData/Local/Microsoft/Windows/Fonts"]
STYLES = re.compile("(?i)bold|black|light|thin|italic|oblique|serif|mono|condensed|math")
MISSING = "\U0010ffff"  # no character: a font draws its shape for what it does not have


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
    drawn = [images, seen, *(denormalize(c).cpu() for c in columns.values())]
    return draw_grid([as_pil(column) for column in drawn], titles)


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
    class token's attention in a ViT's last block, of all heads and of the first four.

    A map is drawn as colours over the image in grey, which also shows on a black image. Each
    is divided by its highest value.
    """
    images = some_pictures(source, model.config, count)
    normal = normalize(images.to(model.cls_token.device))
    attention = class_attention(model, normal).cpu()  # (B, heads, N)
    maps = torch.cat([attention.mean(dim=1, keepdim=True), attention[:, :4]], dim=1)
    maps = maps.unflatten(2, model.grid)  # (B, maps, rows, columns)
    maps = maps / maps.amax(dim=(2, 3), keepdim=True)
    maps = F.interpolate(maps, images.shape[2:], mode="nearest")  # (B, maps, H, W)
    grey = images[:, None, :3].float().mean(dim=2, keepdim=True)  # (B, 1, 1, H, W)
    coloured = (0.65 * heat(maps) + 0.35 * grey).to(torch.uint8).unbind(dim=1)
    titles = ["picture", "all heads", *(f"head {i}" for i in range(1, len(coloured)))]
    columns = [as_pil(column) for column in (images, *coloured)]
    save(draw_grid(columns, titles, legend=scale_bar()), path)


def heat(values):
    """Colours from black over red to light yellow, (B, maps, H, W) of 0 ... 1 -> float
    (B, maps, 3, H, W) of 0 ... 255."""
    at = values * (len(HEAT) - 1)
    low = at.long().clamp(max=len(HEAT) - 2)  # the highest is at the end of the last interval
    return HEAT[low].lerp(HEAT[low + 1], (at - low)[..., None]).movedim(-1, 2)


def scale_bar():
    """An image that says what the colours of `heat` mean in a map of attention."""
    bar, font, left = Image.new("RGB", (460, 22), "white"), ImageFont.load_default(13), 80
    draw = ImageDraw.Draw(bar)
    draw.text((0, 11), "attention 0", "black", font, "lm")
    for x in range(101):
        colour = heat(torch.full((1, 1, 1, 1), x / 100)).flatten().int().tolist()
        draw.line((left + x, 3, left + x, 18), tuple(colour))
    draw.text((left + 106, 11), "highest of its map, over the picture in grey", "black", font, "lm")
    return bar


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
    """Write OUT/step-N.png: the first 64 pictures of step N = run.draw_step, as they are loaded.

    (mixup and CutMix come later.) batches: a data.Batches of one process. Of a clip, the middle
    frame is drawn. The position and the name of each is printed. Raises ValueError if the run
    has no such step, or the rows have no pictures.
    """
    if run.draw_step > run.steps:
        raise ValueError(f"--draw-step {run.draw_step}: the run has {run.steps} steps")
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
    columns = [as_pil(images[i::8]) for i in range(min(8, len(images)))]
    first = (run.draw_step - 1) * batches.batch_size
    titles = [f"position {first}, ...", *[""] * 7]
    os.makedirs(run.out, exist_ok=True)
    save(draw_grid(columns, titles), run.out / f"step-{run.draw_step}.png")


def draw_confusion(table, names, path):
    """Write a PNG of a confusion matrix.

    table: (classes, classes) int64 counts, a row for each true class. names: of the
    classes. A cell is darker for a larger fraction of its row, and blue for a mistake.
    """
    side, left = max(4, min(36, 1800 // len(names))), 150 if len(names) <= 150 else 40
    extent = left + side * len(names) + 6
    image = Image.new("RGB", (extent, extent), "white")
    draw, small = ImageDraw.Draw(image), min(13, side * 2 // 3)
    draw.text((6, 6), "rows: truth\ncolumns: answer", "black", ImageFont.load_default(13))
    shares = table / table.sum(dim=1, keepdim=True).clamp(min=1)
    grey = (255 * (1 - shares)).to(torch.uint8)  # (classes, classes)
    blue = grey.where(torch.eye(len(names), dtype=torch.bool), 255)
    cells = Image.fromarray(torch.stack([grey, grey, blue], dim=2).numpy())
    image.paste(cells.resize((side * len(names),) * 2, Image.Resampling.NEAREST), (left, left))
    names = legible(dict(enumerate(names if left > 40 else ())), small)
    for row, name in names.items():
        font, text = shorten(name, left - 12)
        draw.text((left - 6, left + row * side + side // 2), text, "black", font, "rm")
        label = Image.new("RGB", (left, side), "white")
        draw_line(label, 6, side // 2, (font, text))
        image.paste(label.rotate(90, expand=True), (left + row * side, 0))
    font = ImageFont.load_default(small)
    for row, column in table.nonzero().tolist() if side > 24 else ():
        centre = left + column * side + side // 2, left + row * side + side // 2
        colour = "white" if shares[row, column] > 0.5 else "black"
        draw.text(centre, str(int(table[row, column])), colour, font, "mm")
    save(image, path)


def draw_mistakes(source, mistakes, names, config, path):
    """Write a PNG of a source's first images, each above the model's answer and the truth.

    mistakes: [(answer, its probability, truth)] of the images, by the numbers of classes.
    names: of the classes. config: a model's.
    """
    if not mistakes:
        return print(f"there are no mistakes: {path} is not written")
    images = some_pictures(source, config, len(mistakes))
    classes = {label for answer, _, truth in mistakes for label in (answer, truth)}
    names = legible({label: names[label] for label in sorted(classes)})
    side, cells, font = 224, [], ImageFont.load_default(13)
    for picture, (answer, probability, truth) in zip(as_pil(images), mistakes):
        cell = Image.new("RGB", (side, side + 40), "white")
        cell.paste(ImageOps.pad(picture, (side, side), color="white"))
        for y, note, label in ((12, f"{probability:.0%} ", answer), (30, "is ", truth)):
            name = shorten(names[label], side - font.getlength(note))
            draw_line(cell, 0, side + y, (font, note), name)
        cells.append(cell)
    columns = [cells[i::4] for i in range(min(4, len(cells)))]
    save(draw_grid(columns, ["mistakes", "", "", ""]), path)


def as_pil(images):
    """(B, C, H, W) uint8 -> a list of PIL images in RGB. C is 1, 3 or 4."""
    images = images.permute(0, 2, 3, 1).numpy()
    images = images[:, :, :, 0] if images.shape[3] == 1 else images
    return [Image.fromarray(pixels).convert("RGB") for pixels in images]


def draw_grid(columns, titles, legend=None):
    """A PIL image of columns of PIL images of one size, of which the first is the longest.

    titles: of the columns. Images with a side below 160 pixels are enlarged by a whole
    number. legend: an image to stand below.
    """
    (W, H), gap, top = columns[0][0].size, 6, 22
    scale = math.ceil(160 / min(H, W))
    width, height = W * scale + gap, H * scale + gap
    bottom = top + len(columns[0]) * height
    size = len(columns) * width + gap, bottom + (legend.height if legend else 0)
    canvas = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for x, (column, title) in enumerate(zip(columns, titles)):
        draw.text((gap + x * width, 3), title, fill="black", font=font)
        for y, picture in enumerate(column):
            picture = picture.resize((W * scale, H * scale), Image.Resampling.NEAREST)
            canvas.paste(picture, (gap + x * width, top + y * height))
    if legend:
        canvas.paste(legend, (gap, bottom))
    return canvas


def save(image, path):
    replaced = " (replaced)" if os.path.exists(path) else ""
    image.save(path)
    print(f"wrote {path}{replaced}")


# -------------------------------------------------------------------------------------------- names


def legible(names, size=13):
    """How to draw the names of classes: {number: name} -> {number: (font, text)}.

    The font is Pillow's own if it has all letters of a name (it has no accents), else the
    first of this machine that has them. What no font has is spelt in ASCII, without accents
    and with the names of symbols. What cannot be spelt so becomes its number, and the names
    of these numbers are printed.
    """
    names, drawn = {number: tidy(name) for number, name in names.items()}, {}
    for path in itertools.chain([None], font_files()):
        left = {number: name for number, name in names.items() if number not in drawn}
        if not left:
            break
        try:
            font = ImageFont.truetype(path, size) if path else ImageFont.load_default(size)
            able = letters_of(font, set().union(*left.values()))
        except OSError:  # a damaged file, or a font of one size, as those of emoji are
            continue
        drawn |= {number: (font, name) for number, name in left.items() if able.issuperset(name)}
    missing = {number: name for number, name in names.items() if number not in drawn}
    plain = ImageFont.load_default(size)
    drawn |= {number: (plain, spell(name) or str(number)) for number, name in missing.items()}
    numbered = [f"  {number}: {name}" for number, name in missing.items() if not spell(name)]
    if numbered:
        print("no font of this machine has the letters of these names; the picture has numbers:")
        print("\n".join(numbered))
    return {number: drawn[number] for number in names}


def tidy(name):
    """A name as one line of characters that have a shape of their own."""
    name = str(name).encode(errors="backslashreplace").decode()  # a file's name may be no UTF-8
    name = re.sub("[\ufe00-\ufe0f]", "", " ".join(name.split()))  # black or coloured emoji
    name = "".join(c for c in name if unicodedata.category(c) not in ("Cc", "Cf"))
    return unicodedata.normalize("NFC", name)


def font_files():
    """Yield the font files of this machine: upright sans serifs first."""
    names = {}
    for folder in FONTS:
        pattern = f"{os.path.expanduser(folder)}/**/*.[ot]t[cf]"
        names |= {path: os.path.basename(path) for path in glob.glob(pattern, recursive=True)}
    for path in sorted(names, key=lambda path: (bool(STYLES.search(names[path])), names[path])):
        if "LastResort" not in path:  # macOS has a font of nothing but boxes
            yield path


def letters_of(font, letters):
    """The letters that a font has a shape for: one that differs from a missing character's."""
    font = font.font_variant(layout_engine=ImageFont.Layout.BASIC)  # one shape for each letter

    def shape(letter):
        mask = font.getmask(letter)
        return mask.size, bytes(mask)

    missing = shape(MISSING)
    return {letter for letter in letters if shape(letter) != missing}


def spell(name):
    """A name in ASCII: letters without accents, symbols by their Unicode names. None if other
    letters are left."""
    text = ""
    for letter in name:
        parts = unicodedata.normalize("NFKD", letter)
        plain = "".join(part for part in parts if not unicodedata.combining(part))
        if not plain.isascii() and unicodedata.category(letter)[0] == "S":
            plain = f" {unicodedata.name(letter).lower()} "
        text += plain
    return " ".join(text.split()) if text.isascii() else None


def shorten(name, width):
    """A (font, text) with as much of the text as fits into a width in pixels."""
    font, text = name
    if font.getlength(text) <= width:
        return font, text
    while text and font.getlength(f"{text}..") > width:
        text = text[:-1]
    return font, f"{text}.."


def draw_line(image, x, y, *parts):
    """Draw (font, text)s one behind the other into an image, their middle at height y."""
    for font, text in parts:
        ImageDraw.Draw(image).text((x, y), text, "black", font, "lm")
        x += font.getlength(text)
