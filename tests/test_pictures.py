"""support/pictures.py: what evaluate.py draws, pixel by pixel."""

import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import RECTANGLE, evaluated, picture_tensor, save_model, write_picture
from PIL import Image

import data
from model import MAE
from support.pictures import (
    class_attention,
    denormalize,
    draw_confusion,
    draw_mistakes,
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


def cells(path, columns, rows):
    """The pictures of a drawn grid, (columns, rows, 16, 24, 3) uint8, each pixel once.

    By hand, for pictures of 16 x 24: enlarged 10 times, with gaps of 6 and a title line of 22.
    """
    with Image.open(path) as image:
        assert image.mode == "RGB" and image.size == (columns * 246 + 6, rows * 166 + 22)
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


def test_brightness_is_the_attention_of_the_class_token(autoencoder, gallery, tmp_path):
    flags = ("--out", tmp_path / "attention.png", "--count", 4)
    result, _ = evaluated("attention", autoencoder.path, gallery.root, *flags)
    picture, *lit = cells(result["out"], columns=4, rows=4)  # all heads, and each of the two
    images = torch.cat([picture_tensor(path) for path in gallery.paths])
    assert (picture == images.permute(0, 2, 3, 1).numpy()).all()
    attention = class_attention(autoencoder.model, data.normalize(images)).detach().numpy()
    for column, wanted in zip(lit, (attention.mean(axis=1), attention[:, 0], attention[:, 1])):
        brightness = patches_of(column).sum(axis=-1) / patches_of(picture).sum(axis=-1)  # (4, 6)
        for found, expected in zip(brightness, wanted):
            assert expected.max() > 1.2 * expected.min()  # there is something to see
            # A line through attention, 1 at its highest. Cutting to 8 bits takes half a level
            # of about 128 from each pixel on average, so 0.01 is twice what it can cost.
            assert found[expected.argmax()] > 0.99
            line = np.polyfit(expected, found, 1)
            assert line[0] > 0 and np.abs(np.polyval(line, expected) - found).max() < 0.01
    assert np.abs(lit[1].astype(int) - lit[2]).max() > 20  # heads differ


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_checkpoints_draw_too(channels, gallery, tmp_path):
    save_model(tmp_path / "model.pt", MAE, **MASKED, channels=channels)
    images = torch.cat([picture_tensor(path, channels) for path in gallery.paths[:2]])
    expected = images[:, :3].permute(0, 2, 3, 1).numpy()  # grey is the same thrice
    for task, columns in (("reconstruct", 4), ("attention", 4)):
        result, _ = evaluated(task, tmp_path / "model.pt", gallery.root, "--count", 2)
        picture, *others = cells(result["out"], columns, rows=2)
        assert (picture == expected).all()
        assert all((other != picture).any() for other in others)


def test_pictures_are_of_val_and_lie_beside_the_checkpoint(autoencoder, gallery, tmp_path):
    checkpoint, folder = shutil.copy(autoencoder.path, tmp_path / "model.pt"), tmp_path / "data"
    for split in ("train", "val"):
        shutil.copytree(gallery.root, folder / split / "one")
    (folder / "train" / "one" / "0.png").unlink()
    first = data.Folder(str(folder / "val")).name(0)
    expected = picture_tensor(first)[0].permute(1, 2, 0).numpy()
    for task, columns in (("reconstruct", 4), ("attention", 4)):
        result, _ = evaluated(task, checkpoint, folder)
        assert Path(result["out"]).parent == tmp_path
        assert (cells(result["out"], columns, rows=4)[0, 0] == expected).all()
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
def test_mistakes_stand_four_in_a_row_above_their_lines(channels, tmp_path, capsys):
    folder, path = tmp_path / "pictures", tmp_path / "mistakes.png"
    folder.mkdir()
    for light in (40, 80, 120, 160, 200):
        Image.new("RGB", (24, 24), (light,) * 3).save(folder / f"{light}.png")
    source, config = data.Folder(str(folder)), {"image_size": 16}
    lights = [int(Path(source.name(i)).stem) for i in range(5)]
    draw_mistakes(source, ["a line"] * 5, config | {"channels": channels}, path)
    with Image.open(path) as image:
        assert image.size == (4 * 230 + 6, 22 + 2 * 252)
        places = [(100 + 230 * (i % 4), 100 + 252 * (i // 4)) for i in range(5)]
        assert [image.getpixel(place) for place in places] == [(light,) * 3 for light in lights]
    draw_mistakes(source, [], config, tmp_path / "none.png")
    assert "there are no mistakes" in capsys.readouterr().out
    assert not (tmp_path / "none.png").exists()
