"""support/pictures.py: what evaluate.py draws, pixel by pixel."""

import shutil
import struct
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import RECTANGLE, evaluated, picture_tensor, save_model, write_picture
from PIL import Image, ImageFont

import data
from model import MAE
from support import pictures
from support.pictures import (
    class_attention,
    denormalize,
    draw_confusion,
    draw_mistakes,
    legible,
    reconstruct,
)

MASKED = {"decoder": (16, 1, 2), "mask_ratio": 0.5}


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("autoencoder") / "model.pt"
    return SimpleNamespace(path=path, model=save_model(path, MAE, **MASKED))


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """Four pictures without classes, in the order in which their folder gives them."""
    root = tmp_path_factory.mktemp("gallery")
    for i in range(4):
        write_picture(root / f"{i}.png", 900 + i, 128)
    source = data.Folder(str(root))
    return SimpleNamespace(root=root, paths=[source.name(i) for i in range(4)])


def cells(path, columns, rows, legend=0):
    """The pictures of a drawn grid, (columns, rows, 16, 24, 3) uint8, each pixel once.

    By hand, for pictures of 16 x 24: enlarged 10 times, with gaps of 6 and a title line of 22.
    legend: height of what stands below.
    """
    with Image.open(path) as image:
        assert image.mode == "RGB" and image.size == (columns * 246 + 6, rows * 166 + 22 + legend)
        pixels = np.asarray(image)
    found = np.zeros((columns, rows, 16, 24, 3), dtype=np.uint8)
    for x, y in np.ndindex(columns, rows):
        cell = pixels[22 + 166 * y :, 6 + 246 * x :][:160, :240].reshape(16, 10, 24, 10, 3)
        assert (cell == cell[:, :1, :, :1]).all()  # every pixel is a square of one colour
        found[x, y] = cell[:, 0, :, 0]
    return found


def patches_of(pictures):
    """(..., 16, 24, 3) -> (..., 6, 192): the 2 x 3 patches of 8 x 8, row by row."""
    patches = pictures.reshape(*pictures.shape[:-3], 2, 8, 3, 8, 3).swapaxes(-4, -3)
    return patches.reshape(*pictures.shape[:-3], 6, 192)


@pytest.mark.parametrize("channels", [1, 3, 4, 10])
def test_denormalize_goes_back_exactly_and_clips(channels):
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, channels, 1, 1)
    images[1] = images[1].flip(1)
    assert torch.equal(denormalize(data.normalize(images)), images)
    extremes = torch.tensor([-100.0, 100.0]).view(1, 1, 1, 2).repeat(1, channels, 1, 1)
    assert denormalize(extremes)[0, :, 0].tolist() == [[0, 255]] * channels


def test_reconstructions_show_the_picture_the_visible_patches_and_the_painted_rest(
    autoencoder, gallery, tmp_path
):
    def drawn(name, seed):
        torch.manual_seed(6)
        flags = ("--out", tmp_path / name, "--count", 3, "--seed", seed)
        result, printed = evaluated("reconstruct", autoencoder.path, gallery.root, *flags)
        assert result == {"out": str(tmp_path / name)} and f"seed {seed}" in printed
        return (tmp_path / name).read_bytes()

    first = drawn("a.png", 5)
    picture, seen, means, painted = cells(tmp_path / "a.png", columns=4, rows=3)
    images = torch.cat([picture_tensor(path) for path in gallery.paths[:3]])
    assert (picture == images.permute(0, 2, 3, 1).numpy()).all()
    visible = (patches_of(seen) == patches_of(picture)).all(axis=-1)  # (3, 6)
    assert (visible.sum(axis=1) == 3).all()  # half of six
    assert (patches_of(seen)[~visible] == 128).all()
    assert (patches_of(painted)[visible] == patches_of(picture)[visible]).all()
    # Normalised, a hidden patch has one value, its true mean, before anything is painted.
    flat, true = (
        patches_of(
            data.normalize(torch.from_numpy(p).to(torch.uint8).permute(0, 3, 1, 2))
            .permute(0, 2, 3, 1)
            .numpy()
        )
        for p in (means, picture)
    )
    assert np.abs(flat - true.mean(axis=-1, keepdims=True))[~visible].max() < 0.02  # 8 bits
    assert (patches_of(means)[visible] == patches_of(picture)[visible]).all()
    # The model gives the same for any order within the visible and within the hidden patches.
    ids = torch.from_numpy(np.argsort(~visible, axis=1, kind="stable"))
    expected = reconstruct(autoencoder.model, data.normalize(images), ids)
    expected = denormalize(expected).permute(0, 2, 3, 1).numpy().astype(int)
    # 8 bits: another order of summation may round the other way
    assert np.abs(painted - expected).max() <= 1
    assert (patches_of(painted)[~visible] != patches_of(picture)[~visible]).mean() > 0.5
    assert len({tuple(row) for row in visible.tolist()}) > 1  # each picture has its own mask
    assert drawn("b.png", 5) == first != drawn("c.png", 6)


RAW, HALF = {"normalize_targets": False}, {"mask_ratio": 0.5}
# What a public MAE's arguments say, flags, and how it must be drawn.
DRAWN = [
    ({}, [], {}),
    ({}, ["--raw-pixels"], RAW),
    ({}, ["--raw-pixels", "--mask-ratio", 0.5], RAW | HALF),
    ({"norm_pix_loss": False}, [], RAW),
    ({"norm_pix_loss": False, "mask_ratio": 0.5}, [], RAW | HALF),
    ({"norm_pix_loss": False, "mask_ratio": 0.5}, ["--no-raw-pixels"], HALF),
    ({"norm_pix_loss": True, "mask_ratio": 0.25}, ["--mask-ratio", 0.5], HALF),
    ({"norm_pix_loss": True}, ["--raw-pixels"], RAW),
]


@pytest.mark.parametrize("said, flags, drawn", DRAWN)
def test_a_public_mae_s_pictures_are_what_it_predicted(said, flags, drawn, gallery, tmp_path):
    own, public = tmp_path / "own.pt", tmp_path / "public.pth"
    arguments = {"size": "toy", "image_size": RECTANGLE["image_size"], **drawn}
    model = save_model(own, MAE, **arguments)
    args = Namespace(input_size=[*RECTANGLE["image_size"]], **said)
    torch.save({"model": model.state_dict(), "args": args}, public)
    pictures = []
    for path, more in ((own, []), (public, flags)):
        out = tmp_path / f"{path.stem}.png"
        _, printed = evaluated("reconstruct", path, gallery.root, *more, "--out", out)
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]
    unsaid = "norm_pix_loss" not in said and not flags
    assert ("taken for normalised patches: if they were not, --raw-pixels" in printed) == unsaid


@pytest.mark.parametrize("dark", [False, True])
def test_colours_are_the_attention_of_the_class_token(dark, autoencoder, gallery, tmp_path):
    """Also over a black picture. The colours are matplotlib's inferno at 0, 1/4 ... 1."""
    root, paths = gallery.root, gallery.paths
    if dark:
        root, paths = tmp_path / "dark", [str(tmp_path / "dark" / "0.png")]
        root.mkdir()
        Image.new("RGB", (24, 16)).save(paths[0])
    out, count = tmp_path / "attention.png", len(paths)
    evaluated("attention", autoencoder.path, root, "--out", out, "--count", count)
    picture, *maps = cells(out, columns=4, rows=count, legend=22)  # all heads, each of the two
    images = torch.cat([picture_tensor(path) for path in paths])
    assert (picture == images.permute(0, 2, 3, 1).numpy()).all()
    attention = class_attention(autoencoder.model, data.normalize(images)).detach().numpy()
    anchors = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)])
    grey = picture.astype(float).mean(axis=-1, keepdims=True)
    for column, wanted in zip(maps, (attention.mean(axis=1), attention[:, 0], attention[:, 1])):
        assert (wanted.max(axis=1) > 1.2 * wanted.min(axis=1)).all()  # there is something to see
        shares = wanted / wanted.max(axis=1, keepdims=True)  # (count, 6)
        shares = shares.reshape(-1, 2, 3).repeat(8, axis=1).repeat(8, axis=2)  # each pixel's
        steps = [np.interp(shares, np.linspace(0, 1, 5), channel) for channel in anchors.T]
        expected = 0.65 * np.stack(steps, axis=-1) + 0.35 * grey
        assert np.abs(column - expected).max() < 1.01  # cut to 8 bits
    assert np.abs(maps[1].astype(int) - maps[2]).max() > 20  # heads differ
    with Image.open(out) as image:  # the legend below: from the colour of 0 to that of 1
        bar = np.asarray(image)[-11, 86:187].astype(int)
    assert (bar[[0, 50, 100]] == anchors[[0, 2, 4]]).all()
    assert (np.diff(bar.sum(axis=1)) >= -1).all()  # brighter and brighter, but for rounding


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_checkpoints_draw_too(channels, gallery, tmp_path):
    save_model(tmp_path / "model.pt", MAE, **MASKED, channels=channels)
    images = torch.cat([picture_tensor(path, channels) for path in gallery.paths[:2]])
    expected = images[:, :3].permute(0, 2, 3, 1).numpy()  # grey is the same thrice
    for task, legend in (("reconstruct", 0), ("attention", 22)):
        result, _ = evaluated(task, tmp_path / "model.pt", gallery.root, "--count", 2)
        picture, *others = cells(result["out"], 4, 2, legend)
        assert (picture == expected).all()
        assert all((other != picture).any() for other in others)


def test_pictures_are_of_val_and_lie_beside_the_checkpoint(autoencoder, gallery, tmp_path):
    checkpoint, folder = shutil.copy(autoencoder.path, tmp_path / "model.pt"), tmp_path / "data"
    for split in ("train", "val"):
        shutil.copytree(gallery.root, folder / split / "one")
    (folder / "train" / "one" / "0.png").unlink()
    first = data.Folder(str(folder / "val")).name(0)
    expected = picture_tensor(first)[0].permute(1, 2, 0).numpy()
    drawn_by_the_run = tmp_path / "reconstruction.png"
    drawn_by_the_run.write_bytes(b"the run's own")
    for task, legend in (("reconstruct", 0), ("attention", 22)):
        result, _ = evaluated(task, checkpoint, folder)
        assert Path(result["out"]) == tmp_path / f"evaluate-{task}.png"
        assert drawn_by_the_run.read_bytes() == b"the run's own"
        assert (cells(result["out"], 4, 4, legend)[0, 0] == expected).all()
        # Done again, it says that it replaces what was there.
        assert "replaced" in evaluated(task, checkpoint, folder)[1]


def test_a_confusion_matrix_is_dark_where_answers_are_right_and_blue_where_not(tmp_path):
    table = torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 2]])  # a class may have no picture
    draw_confusion(table, ["ant", "bee", "cat"], tmp_path / "table.png")
    with Image.open(tmp_path / "table.png") as image:
        corners = [image.getpixel((151 + 36 * x, 151 + 36 * y)) for y in range(3) for x in range(3)]
    quarter, white = int(255 * 0.25), (255, 255, 255)
    first = [(quarter, quarter, quarter), (int(255 * 0.75), int(255 * 0.75), 255), white]
    assert corners == [*first, white, white, white, white, white, (0, 0, 0)]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_mistakes_stand_four_in_a_row_above_their_names(channels, tmp_path, capsys):
    folder, path = tmp_path / "pictures", tmp_path / "mistakes.png"
    folder.mkdir()
    for light in (40, 80, 120, 160, 200):
        Image.new("RGB", (24, 24), (light,) * 3).save(folder / f"{light}.png")
    source, config = data.Folder(str(folder)), {"image_size": 16, "channels": channels}
    lights, names = [int(Path(source.name(i)).stem) for i in range(5)], ["", "ant", "bee " * 99]

    def drawn(mistakes):
        draw_mistakes(source, mistakes, names, config, path)
        with Image.open(path) as image:
            return np.asarray(image)

    pixels = drawn([(0, 0.5, 1)] * 4 + [(2, 0.5, 0)])
    assert pixels.shape == (22 + 2 * 270, 4 * 230 + 6, 3)
    places = [(100 + 270 * (i // 4), 100 + 230 * (i % 4)) for i in range(5)]
    assert [pixels[place].tolist() for place in places] == [[light] * 3 for light in lights]
    # Lines below the picture: the answer, and the truth. A long name ends within its cell.
    answer, truth, long = [slice(y, y + 18) for y in (246, 264, 516)]
    changed = drawn([(0, 0.5, 0)] * 4 + [(2, 0.5, 0)])
    assert (changed[answer] == pixels[answer]).all() and (changed[truth] != pixels[truth]).any()
    assert (pixels[long, 6:230] < 128).any() and (pixels[long, 230:] == 255).all()
    draw_mistakes(source, [], names, config, tmp_path / "none.png")
    assert "there are no mistakes" in capsys.readouterr().out
    assert not (tmp_path / "none.png").exists()


def font_file(path, letters):
    """Write Pillow's font with shapes for other letters as well: {letter: one it looks like}.

    A cmap table of format 12 (OpenType) stands at the end: runs of (first, last, shape).
    """
    content = bytearray(ImageFont.load_default(13).path.getvalue())
    shape = lambda letter: 3 + ord(letter) - ord(" ")
    runs = [(ord(" "), ord("~"), shape(" "))]
    runs += [(ord(letter), ord(letter), shape(like)) for letter, like in sorted(letters.items())]
    runs = b"".join(struct.pack(">III", *run) for run in sorted(runs))
    head = struct.pack(">HHIII", 12, 0, 16 + len(runs), 0, len(runs) // 12)
    table = struct.pack(">HHHHI", 0, 1, 3, 10, 12) + head + runs
    record = content.index(b"cmap")
    content[record + 8 : record + 16] = struct.pack(">II", len(content), len(table))
    path.write_bytes(content + table)


def pixels_of(name):
    font, text = name
    mask = font.getmask(text)
    return mask.size, bytes(mask)


def test_names_in_any_script_are_drawn_by_a_font_that_has_their_letters(
    tmp_path, monkeypatch, capsys
):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    font_file(tmp_path / "a" / "Chinese-Bold.ttf", {"中": "B", "国": "C"})
    font_file(tmp_path / "b" / "Chinese.ttf", {"中": "M", "国": "N"})
    font_file(tmp_path / "b" / "LastResort.otf", {"Ж": "X"})  # of macOS: nothing but boxes
    (tmp_path / "b" / "Broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr(pictures, "FONTS", [str(tmp_path / name) for name in ("no", "a", "b")])
    names = {3: "cat", 5: "中", 6: "a 国\u200b\ncat", 8: "Ж", 9: "中Ж"}
    found = legible(names)
    plain = ImageFont.load_default(13)
    assert pixels_of(found[3]) == pixels_of((plain, "cat"))
    assert pixels_of(found[5]) == pixels_of((plain, "M"))  # upright and not bold first
    assert pixels_of(found[6]) == pixels_of((plain, "a N cat"))  # on one line
    assert (found[8][1], pixels_of(found[9])) == ("8", pixels_of((plain, "9")))


def test_names_that_no_font_has_are_spelt_or_numbered(monkeypatch, capsys):
    monkeypatch.setattr(pictures, "FONTS", [])
    names = ["café", "ｆｕｌｌ", "😀 1", "🏎\ufe0f", "猫", "кот", "a\udc80", "e\u0301", "plain", 7]
    texts = [text for _, text in legible(dict(enumerate(names))).values()]
    assert texts[:5] == ["cafe", "full", "grinning face 1", "racing car", "4"]
    assert texts[5:] == ["5", "a\\udc80", "e", "plain", "7"]
    printed = capsys.readouterr().out.splitlines()
    assert "numbers" in printed[0] and printed[1:] == ["  4: 猫", "  5: кот"]
    legible({0: "plain", 1: "café"})
    assert capsys.readouterr().out == ""


def test_no_font_of_this_machine_draws_a_missing_letter():
    names = ["café", "猫", "кот", "قطة", "😀", "ไก่", "smørrebrød", "한국", "बिल्ली", "\ue000"]
    for font, text in legible(dict(enumerate(names))).values():
        font = font.font_variant(layout_engine=ImageFont.Layout.BASIC)
        # U+10FFFF is no character (Unicode 23.7): what is drawn for it stands for a missing one.
        missing = pixels_of((font, "\U0010ffff"))
        assert all(pixels_of((font, letter)) != missing for letter in text)
