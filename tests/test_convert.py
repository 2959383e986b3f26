"""support/convert.py: files for timm and transformers, read by their own code, and back."""

import sys

import pytest
import safetensors.torch
import torch
from conftest import random_images, stage
from test_formats import (
    NAMED,
    SQUARE,
    VIT,
    close,
    converted,
    lost,
    own_file,
    pair_file,
    randomize,
    refuse,
)

import evaluate
from model import MAE, Classifier, ViT, read_weights
from support.convert import main
from tasks import video
from tasks.lit import TwoTowers

OURS = {
    "ViT": (ViT, {**SQUARE, "norm_eps": 1e-3}),
    "wide ViT": (ViT, {**SQUARE, "image_size": (16, 24), "channels": 4}),
    "Classifier": (Classifier, {**SQUARE, **NAMED}),
    "mean Classifier": (Classifier, {**SQUARE, **NAMED, "pool": "mean"}),
    "MAE": (MAE, {**SQUARE, "decoder": (16, 2, 2), "mask_ratio": 0.5, "norm_eps": 1e-3}),
    "TwoTowers": (TwoTowers, {**SQUARE, "text": {"size": "16x1x2", "vocabulary": 9}}),
}


def written(kind, tmp_path, out, format, capsys):
    """Convert a model of ours: (model, the line that loads it, dropped families)."""
    kind, arguments = OURS[kind]
    model = randomize(kind(**arguments))
    path = own_file(tmp_path / "model.pt", model)
    converted(path, tmp_path / out, format)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{path}: our own {kind.__name__}"
    dropped = [line.removeprefix("dropped: ") for line in said if line.startswith("dropped: ")]
    return model, said[-1], set(", ".join(dropped).split(", ")) - {""}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", OURS)
@torch.no_grad()
def test_to_timm_and_back_is_bit_for_bit(timm, tmp_path, capsys, kind, suffix):
    path, back = tmp_path / f"timm.{suffix}", tmp_path / "back.pt"
    ours, line, dropped = written(kind, tmp_path, path.name, "timm", capsys)
    place = {}
    exec(line, place)  # noqa: S102 (what users are told to type; it loads strictly)
    theirs, images = place["model"].eval(), random_images(ours)
    if isinstance(ours, Classifier):
        close(theirs(images), ours(images))
    else:
        close(theirs.forward_features(images), ViT.forward(ours, images))
    named = {"class_names"} if "Classifier" in kind else set()
    assert dropped >= named and bool(dropped - named) == (kind in ("MAE", "TwoTowers"))
    dropped -= named
    unsaid = ("norm_eps", "class_names", "image_size")  # tensors alone do not tell them
    if kind != "wide ViT":
        assert lost(path, ours, 4, unsaid[:2]) == dropped
        assert lost(converted(path, back, "own", "--heads", 4), ours, unsaid=unsaid) == dropped


@pytest.mark.parametrize("kind", [kind for kind in OURS if kind != "mean Classifier"])
@torch.no_grad()
def test_to_hugging_face_and_back_is_bit_for_bit(transformers, tmp_path, capsys, kind):
    ours, line, dropped = written(kind, tmp_path, "hf", "hf", capsys)
    assert bool(dropped) == (kind == "TwoTowers")
    load = line.partition("model = ")[2]
    theirs, info = eval(load[:-1] + ", output_loading_info=True)", {"transformers": transformers})
    assert not any(info.values())
    images = random_images(ours, 2)
    if kind == "MAE":
        noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
        close(theirs(images, noise=noise).loss, ours(images, noise.argsort(dim=1)).mean())
    elif kind == "Classifier":
        close(theirs(images).logits, ours(images))
        assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    else:
        close(theirs(images).last_hidden_state, ViT.forward(ours, images))
    assert lost(tmp_path / "hf", ours) == dropped
    assert lost(converted(tmp_path / "hf", tmp_path / "back.pt", "own"), ours) == dropped


def refused(capsys, *arguments):
    """The line, and the only one, with which convert gives up."""
    with pytest.raises(SystemExit) as error:
        main(["convert", *map(str, arguments)])
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("model.py: ") and said.count("\n") == 1
    return said


def test_heads_and_the_safetensors_package_are_asked_for(tmp_path, capsys, monkeypatch):
    small, own = tmp_path / "vit.safetensors", tmp_path / "own.pt"
    safetensors.torch.save_file(VIT, small)
    asked = [small, own, "--format", "own"]
    assert "Give --heads" in refused(capsys, *asked)
    assert "multiple of 4 x heads" in refused(capsys, *asked, "--heads", "5")
    assert read_weights(converted(small, own, "own", "--heads", 2))[1]["size"] == "32x2x2"
    refuse("has 2 heads", read_weights, own, 4)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    outs = (small, "o.pt", "own"), (own, "hf", "hf"), (own, "o.safetensors", "timm")
    for source, out, format in outs:
        said = refused(capsys, source, tmp_path / out, "--format", format, "--heads", 2)
        assert "pip install safetensors" in said and not (tmp_path / out).exists()


def test_a_classifier_keeps_its_names_and_crop(tmp_path):
    path = own_file(tmp_path / "in.pt", Classifier(**SQUARE, **NAMED), val_crop=0.5)
    assert read_weights(converted(path, tmp_path / "out.pt", "own"))[1] == read_weights(path)[1]


def test_what_a_format_cannot_say_is_refused(tmp_path, capsys):
    own_file(tmp_path / "mean.pt", Classifier(**SQUARE, **NAMED, pool="mean"))
    own_file(tmp_path / "clips.pt", video.VideoClassifier(**SQUARE, classes=3, frames=4))
    wide = {**SQUARE, "image_size": (16, 32)}
    own_file(tmp_path / "wide.pt", MAE(**wide, decoder=(16, 1, 2)))
    torch.save({name: VIT[name] for name in VIT if name != "norm.bias"}, tmp_path / "part.pt")
    torch.save(pair_file({"text.blocks.0.norm1.weight": None}), tmp_path / "half.pt")
    torch.save(VIT, tmp_path / "vit.pt")
    files = set(tmp_path.iterdir())
    for words, source, out, format in (
        ("reads the class token", "mean.pt", "hf", "hf"),
        ("is of videos", "clips.pt", "o.pt", "timm"),
        ("square", "wide.pt", "hf", "hf"),
        ("norm.bias is missing", "part.pt", "o.pt", "timm"),
        ("lacks text.blocks.0.norm1.weight", "half.pt", "o.pt", "timm"),
        ("must end", "vit.pt", "vit.bin", "timm"),
        ("must end", "vit.pt", "own", "own"),
        ("exists", "vit.pt", "vit.pt", "timm"),
        ("exists", "vit.pt", ".", "hf"),
        ("exists", "vit.pt", "no/x.pt", "timm"),
        ("invalid choice", "vit.pt", "o.pt", "onnx"),
    ):
        asked = tmp_path / source, tmp_path / out, "--format", format, "--heads", 4
        assert words in refused(capsys, *asked)
    assert set(tmp_path.iterdir()) == files
    words = "lacks text.blocks.0.norm1.weight: half a pair"
    refuse(words, evaluate.load_model, tmp_path / "half.pt", "zeroshot", "cpu")


@pytest.mark.parametrize(
    "out, format", [("o.pt", "own"), ("o.pt", "timm"), ("o.safetensors", "timm"), ("o", "hf")]
)
def test_where_the_disk_is_full_nothing_is_left(tmp_path, out, format):
    own_file(tmp_path / "in.pt", ViT(**{**SQUARE, "size": "64x2x4"}))
    (tmp_path / f"{out}.tmp").mkdir()  # of somebody else
    arguments = "convert", tmp_path / "in.pt", tmp_path / out, "--format", format
    failed = stage(*arguments, program="model.py", file_size=100_000)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1, failed.stderr
    assert "cannot write" in failed.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"in.pt", f"{out}.tmp"}
