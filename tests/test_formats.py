"""test_formats"""

import argparse
import json
import os
import re
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    SMALL,
    SMALL_MAE,
    TINY_TEXT,
    Trap,
    equal_states,
    full_disk,
    one_line,
    public_mae,
    random_ids,
    random_images,
    section,
)

import evaluate
import model as models
from model import MAE, ViT
from support import formats
from tasks import detect, lit, video
from tasks.lit import TwoTowers

# ------------------------------------------------------------------------------------------ weights


def block_tensors(prefix, width, layers):
    shapes = {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "mlp.fc1.weight": (4 * width, width),
        "mlp.fc1.bias": (4 * width,),
        "mlp.fc2.weight": (width, 4 * width),
        "mlp.fc2.bias": (width,),
    }
    return {f"{prefix}.{i}.{name}": shape for i in range(layers) for name, shape in shapes.items()}


def public_tensors(width, layers, patch, patches, channels=3, decoder=None):
    """Random tensors under timm's and the public MAE's names, written out here by hand."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + patches, width),
        "patch_embed.proj.weight": (width, channels, patch, patch),
        "patch_embed.proj.bias": (width,),
        **block_tensors("blocks", width, layers),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if decoder:
        small, decoder_layers = decoder
        shapes |= {
            "mask_token": (1, 1, small),
            "decoder_pos_embed": (1, 1 + patches, small),
            "decoder_embed.weight": (small, width),
            "decoder_embed.bias": (small,),
            **block_tensors("decoder_blocks", small, decoder_layers),
            "decoder_norm.weight": (small,),
            "decoder_norm.bias": (small,),
            "decoder_pred.weight": (patch * patch * channels, small),
            "decoder_pred.bias": (patch * patch * channels,),
        }
    generator = torch.Generator().manual_seed(0)
    return {n: 0.05 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}


DECODER_FAMILIES = {
    "mask_token",
    "decoder_pos_embed",
    "decoder_embed",
    "decoder_blocks",
    "decoder_norm",
    "decoder_pred",
}


def test_weights_come_back_bit_for_bit(tmp_path):
    model = MAE(**SMALL_MAE, channels=4)
    path = tmp_path / "model.pt"
    models.save_weights(path, models.full_state(model), model.config)
    state, config = models.read_weights(path)
    assert equal_states(state, model.state_dict())
    assert config == model.config == json.loads(json.dumps(config))
    other = MAE(**config)
    models.initialize(other, seed=1)
    line = models.load_weights(other, state)
    assert f"{len(state)} tensors loaded" in line
    assert not any(section(line, t) for t in ("resampled", "newly initialised", "dropped"))
    assert equal_states(other.state_dict(), model.state_dict())
    assert [path] == list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_weights(tmp_path, monkeypatch):
    model, path = ViT(**SMALL), tmp_path / "model.pt"
    models.save_weights(path, models.full_state(model), model.config)
    before = path.read_bytes()
    models.initialize(model, seed=1)
    with pytest.raises(TypeError):
        models.save_weights(path, models.full_state(model), {"not": torch.Size, "for": "JSON"})
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError):
        models.save_weights(path, models.full_state(model), model.config)
    assert path.read_bytes() == before


def test_a_public_mae_checkpoint_loads_by_name(tmp_path):
    tensors = public_tensors(192, 3, 8, 4, decoder=(512, 8))
    arguments = argparse.Namespace(lr=1e-3, model="mae")  # as the public code stores them
    torch.save(
        {"model": tensors, "optimizer": {"step": 3}, "args": arguments}, tmp_path / "public.pth"
    )
    state, config = models.read_weights(tmp_path / "public.pth")
    assert config["decoder"] == [512, 8, 16] and config["image_size"] == [16, 16]
    model = MAE(**config)
    line = models.load_weights(model, state)
    assert f"{len(tensors)} tensors loaded" in line
    assert equal_states(model.state_dict(), {name: tensors[name] for name in model.state_dict()})
    model.double()
    images, ids = random_images(model), random_ids(model)
    parameters = dict(model.named_parameters())
    expected = public_mae(parameters, images, ids, 1, 6, 16, normalize_targets=True)
    torch.testing.assert_close(model(images, ids), expected, rtol=1e-10, atol=1e-10)


# The arguments beside a public MAE's weights, what is read of them, and what is said.
ARGUMENTS = {
    "none": (None, {}, "timm-named ViTMAE\n"),
    "others": (Namespace(lr=1e-3, input_size=None), {}, "its args: input_size None (not used)\n"),
    "raw": (
        Namespace(norm_pix_loss=False, mask_ratio=0.5, input_size=16),
        {"normalize_targets": False, "mask_ratio": 0.5},
        "its args: input_size 16, mask_ratio 0.5, norm_pix_loss False\n",
    ),
    "normalised": (
        {"norm_pix_loss": True, "mask_ratio": 0.25},  # a dict, as some keep them
        {"normalize_targets": True, "mask_ratio": 0.25},
        "its args: mask_ratio 0.25, norm_pix_loss True\n",
    ),
    "a number": (Namespace(norm_pix_loss=0), {"normalize_targets": False}, "norm_pix_loss 0\n"),
    "no square": (
        Namespace(input_size=[8, 32]),
        {"image_size": [8, 32]},
        "its args: input_size [8, 32]\n",
    ),
    "unusable": (
        Namespace(norm_pix_loss="False", mask_ratio=[0.5], input_size=224),
        {},
        "input_size 224 (not used), mask_ratio [0.5] (not used), norm_pix_loss 'False' (not used)\n",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_the_arguments_of_the_public_mae_code_say_what_was_predicted(tmp_path, capsys, case):
    arguments, known, said = ARGUMENTS[case]
    tensors, path = public_tensors(192, 3, 8, 4, decoder=(512, 8)), tmp_path / "public.pth"
    torch.save({"model": tensors, "args": arguments}, path)
    state, config = models.read_weights(path)
    assert capsys.readouterr().out.endswith(said)
    assert config["image_size"] == known.get("image_size", [16, 16])
    model = MAE(**config).double()
    models.load_weights(model, state)
    images, ids = random_images(model), random_ids(model)
    visible = int(4 * (1 - known.get("mask_ratio", 0.75)))
    normalize = known.get("normalize_targets", True)
    expected = public_mae(dict(model.named_parameters()), images, ids, visible, 6, 16, normalize)
    torch.testing.assert_close(model(images, ids), expected, rtol=1e-10, atol=1e-10)
    formats.convert(path, tmp_path / "own.pt", "own")
    converted = models.read_weights(tmp_path / "own.pt")[1]
    assert converted.items() >= {"mask_ratio": 0.75, "normalize_targets": True, **known}.items()


@pytest.mark.parametrize("size", ["toy", "T", "B", "H"])
def test_the_architecture_is_read_off_the_tensors(size):
    with torch.device("meta"):
        model = ViT(size, image_size=2 * models.SIZES[size][3], channels=4)
        config = formats.infer_config(dict(model.named_parameters()))
        found = ViT(**config)
    # Heads show in no shape: T and toy have the same width.
    assert (found.width, found.layers, found.heads) == (model.width, model.layers, model.heads)
    assert found.patch_size == model.patch_size and found.grid == (2, 2)
    assert config["channels"] == 4


def test_what_is_wrong_with_a_file_of_weights_is_said(tmp_path):
    tensors = public_tensors(192, 12, 8, 16)
    flat = tensors["patch_embed.proj.weight"].flatten(1)
    no_class = tensors["pos_embed"][:, 1:]
    for content, words in (
        ({"weights": tensors, "epoch": 3}, "among weights, epoch"),
        ({f"my.{name}": tensor for name, tensor in tensors.items()}, "among my."),
        (tensors | {"patch_embed.proj.weight": flat}, r"no \(D, C, P, P\)"),
        (tensors | {"pos_embed": no_class}, "pos_embed has 16 rows"),
        ({"model": tensors, "config": {"size": "T"}}, "lacks 'image_size'"),
        ({"model": tensors, "config": ["size"]}, "cannot be used"),
        (5, "holds no ViT"),
    ):
        torch.save(content, tmp_path / "weights.pt")
        with pytest.raises(ValueError, match=f"weights.pt.*{words}") as error:
            models.read_weights(tmp_path / "weights.pt")
        assert one_line(error)


def test_a_bare_encoder_into_a_mae_keeps_the_decoder_s_initial_values(tmp_path):
    tensors = public_tensors(32, 3, 8, 6)
    torch.save(tensors, tmp_path / "bare.pth")
    model = MAE(**SMALL_MAE)
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    line = models.load_weights(model, torch.load(tmp_path / "bare.pth", weights_only=True), (2, 3))
    assert section(line, "newly initialised") == DECODER_FAMILIES
    assert not section(line, "dropped")
    assert equal_states(model.state_dict(), {**initial, **tensors})


def test_a_mae_into_a_vit_drops_the_decoder_and_a_head():
    tensors = public_tensors(32, 3, 8, 6, decoder=(16, 2))
    extra = {"head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)}
    model = ViT(**SMALL)
    line = models.load_weights(model, {**tensors, **extra})
    assert section(line, "dropped") == DECODER_FAMILIES | {"head"}
    assert not section(line, "newly initialised")
    assert equal_states(model.state_dict(), {name: tensors[name] for name in model.state_dict()})


@pytest.mark.parametrize("patches, old_grid", [(9, None), (8, (4, 2)), (6, (6, 1))])
def test_positions_of_another_grid_are_resampled(patches, old_grid):
    tensors = public_tensors(32, 3, 8, patches, decoder=(16, 2))
    model = MAE(**SMALL_MAE)
    line = models.load_weights(model, tensors, old_grid)
    old = old_grid or (3, 3)
    names = {"pos_embed", "decoder_pos_embed"}
    assert section(line, "resampled") == {f"{n} from {old[0]}x{old[1]} to 2x3" for n in names}
    for name, tensor in model.state_dict().items():
        wanted = tensors[name]
        wanted = models.resample_positions(wanted, old, (2, 3)) if name in names else wanted
        assert torch.equal(tensor, wanted)


MISFITS = {
    "unknown": {"blocks.0.ls1.gamma": torch.zeros(32)},
    "missing": {"blocks.1.attn.qkv.bias": None},
    "misshaped": {"norm.weight": torch.zeros(33)},
    "of another width": {"pos_embed": torch.zeros(1, 10, 64)},
    "a decoder of another width": {"mask_token": torch.zeros(1, 1, 8)},
    "positions that are no square": {"pos_embed": torch.zeros(1, 1 + 8, 32)},
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_tensors_that_do_not_fit_are_refused_by_name(misfit):
    tensors = {**public_tensors(32, 3, 8, 6, decoder=(16, 2)), **MISFITS[misfit]}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    model = MAE(**SMALL_MAE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=next(iter(MISFITS[misfit]))) as error:
        models.load_weights(model, tensors)
    assert one_line(error)
    assert equal_states(model.state_dict(), before)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
def test_code_in_a_weights_file_is_refused_and_never_runs(tmp_path, zipped):
    path, sprung = tmp_path / "model.pt", tmp_path / "sprung"
    content = {"model": public_tensors(32, 1, 8, 6), "config": Trap(sprung)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="model.pt") as error:
        models.read_weights(path)
    assert one_line(error)
    assert not sprung.exists()
    torch.load(path, weights_only=False)
    assert sprung.exists()  # so it was a live one


REFUSED = {
    r"numpy\S+\.scalar": np.float64(0.5),
    r"numpy\S+\._reconstruct": np.zeros(3),
    r"pathlib\S+Path": argparse.Namespace(output_dir=Path("runs")),
    r"collections\.defaultdict": {"scores": defaultdict(list)},
    r"torch\.nn\.modules\.linear\.Linear": torch.nn.Linear(2, 2),
}


READERS = {
    "weights": models.read_weights,
    "text": lit.read_text_weights,
    "detector": detect.read_detector,
    "trunk": detect.read_weights,
    "evaluate": lambda path: evaluate.load_model(path, "knn", "cpu"),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
@pytest.mark.parametrize("reader", READERS)
def test_the_type_that_torch_refuses_is_named(tmp_path, reader, zipped):
    for name, value in REFUSED.items():
        content = {"model": public_tensors(32, 1, 8, 6), "best": value}
        torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=rf"m\.pt \(torch refuses the {name} in it") as error:
            READERS[reader](tmp_path / "m.pt")
        assert one_line(error)


SMALL_TEXT = {"text": {**TINY_TEXT, "positions": 9}, "shared_width": 8}


KINDS = {
    "features": (ViT, SMALL),
    "reconstruct": (MAE, SMALL_MAE),
    "classify": (models.Classifier, {**SMALL, "classes": 3}),
    "video": (video.VideoClassifier, {**SMALL, "classes": 3, "frames": 4}),
    "zeroshot": (TwoTowers, {**SMALL, **SMALL_TEXT}),
    "detect": (detect.Detector, {"size": "toy", "image_size": 32, "classes": 2}),
}


HUGE = {
    "features": {
        "image_size": [2**40, [2**40, 2**40], [2**70, 16], "9" * 5000, [16, 24, "a" * 500], None],
        "size": [f"{2**40}x3x4", f"{2**70}x3x4", f"32x{2**40}x4", "x" * 5000],
        "patch_size": [2**40, 2**70, -8],
        "channels": [2**40, 2**70, -3, None],
        "positions": ["x" * 5000],
    },
    "reconstruct": {"decoder": [[2**40, 2, 2], [16, 2**40, 2], [16], "16x2x2", 7]},
    "video": {"frames": [2**40, 2**70, "many"]},
    "zeroshot": {
        "shared_width": [2**40, 2**70],
        "text": [{**SMALL_TEXT["text"], name: 2**n} for name in TINY_TEXT for n in (40, 70)]
        + [{**SMALL_TEXT["text"], "positions": 2**40}, {"size": f"16x{2**40}x2"}],
    },
    "detect": {"image_size": [2**40, [2**40, 2**40], None], "classes": [2**40, 2**70]},
}


HUGE = [
    pytest.param(task, {name: value}, id=f"{task}-{name}-{value!s:.20}")
    for task in HUGE
    for name, values in {**(HUGE["features"] if task != "detect" else {}), **HUGE[task]}.items()
    for value in values
]


@pytest.mark.parametrize("task, change", HUGE)
def test_a_config_that_cannot_be_its_weights_is_one_line(tmp_path, task, change):
    """Nothing of the size that it asks for is made."""
    kind, arguments = KINDS[task]
    model, path = kind(**arguments), tmp_path / "model.pt"
    models.save_weights(path, model.state_dict(), model.config | change)
    readers = [lambda: evaluate.load_model(path, task, "cpu")]
    readers.append(lambda: models.inherit(path, {}, ("size",), read=detect.read_weights))
    readers += [lambda: lit.read_text_weights(path)] if "text" in change else []
    for read in readers:
        with pytest.raises(ValueError, match=re.escape(str(path))) as error:
            read()
        assert one_line(error) and len(str(error.value)) < 400 + len(str(path))
        # What torch says is there, without the frames of its C++ code.
        assert re.search(": .*[a-z]{3}", str(error.value)) and "frame #" not in str(error.value)


@pytest.mark.parametrize("task", KINDS)
def test_the_config_of_each_kind_is_that_of_its_weights(tmp_path, task):
    kind, arguments = KINDS[task]
    model, path = kind(**arguments), tmp_path / "model.pt"
    models.save_weights(path, model.state_dict(), model.config)
    found = evaluate.load_model(path, task, "cpu")[0]
    assert type(found) is kind and equal_states(found.state_dict(), model.state_dict())
    trunk = {n: t for n, t in model.state_dict().items() if not n.startswith("head.")}
    models.save_weights(path, trunk, model.config)  # as somebody may pass it on
    if task in ("classify", "video"):
        assert equal_states(models.read_weights(path)[0], trunk)


@pytest.fixture(scope="module")
def weights_bytes(tmp_path_factory):
    model, path = ViT(**SMALL), tmp_path_factory.mktemp("weights") / "model.pt"
    models.save_weights(path, models.full_state(model), model.config)
    return path.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_an_empty_or_truncated_file_is_a_value_error(tmp_path, weights_bytes, share):
    path = tmp_path / "model.pt"
    path.write_bytes(weights_bytes[: int(share * len(weights_bytes))])
    with pytest.raises(ValueError, match="model.pt") as error:
        models.read_weights(path)
    assert one_line(error)


PATCHES = {"patch_embed.proj.weight": torch.zeros(192, 3, 8, 8), "norm.weight": torch.ones(192)}


BLOCK = {"blocks.0.norm1.weight": torch.ones(192)}


NOT_A_VIT = {
    "a number": 1,
    "a list": [torch.zeros(3)],
    "nothing": {},
    "another network": {"conv1.weight": torch.zeros(3)},
    "a tensor as model": {"model": torch.zeros(3)},
    "a list as model": {"model": [torch.zeros(3)]},
    "no blocks": PATCHES,
    "no positions": {**PATCHES, **BLOCK},
    "positions of another kind": {**PATCHES, **BLOCK, "pos_embed": torch.zeros(3)},
    "an unknown width": {**BLOCK, "patch_embed.proj.weight": torch.zeros(100, 3, 8, 8)},
}


@pytest.mark.parametrize("content", NOT_A_VIT)
def test_a_file_that_holds_no_vit_is_a_value_error(tmp_path, content):
    torch.save(NOT_A_VIT[content], tmp_path / "model.pt")
    with pytest.raises(ValueError) as error:
        models.read_weights(tmp_path / "model.pt")
    assert one_line(error)


def test_a_path_without_a_file_is_a_value_error(tmp_path):
    for path in (tmp_path, tmp_path / "none.pt"):
        with pytest.raises(ValueError, match=path.name) as error:
            models.read_weights(path)
        assert one_line(error)
