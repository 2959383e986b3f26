"""Weights: our own files, and other libraries' files read and written, against their own code.

Models are small, and every parameter is random.
"""

import importlib
import itertools
import json
import os
import re
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import (
    SMALL,
    SMALL_MAE,
    TINY_TEXT,
    Trap,
    equal_states,
    full_disk,
    on_meta,
    one_line,
    picture,
    random_images,
    section,
)
from torch import nn

import evaluate
import model as models
from model import MAE, Classifier, ViT, load_weights, read_weights, save_weights
from support import formats
from support.convert import convert, main
from support.formats import inherit
from tasks import detect, lit, video
from tasks.lit import TextTower, TwoTowers

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
SQUARE = {"size": "32x2x4", "image_size": 32, "patch_size": 8}
NAMED = {"classes": 3, "class_names": ["a", "b", "c"], "head_std": 0.1}
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
HF |= {"intermediate_size": 128}
HF_VIT = {**HF, "image_size": 32, "patch_size": 8}
HF_DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 2}
HF_DECODER |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 64}


def randomize(model, seed=0):
    """Every parameter random, scales of norms around 1: a bias of 0 or a scale of 1 hides much."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shift = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05 + shift)
    return model.eval()


A, B = (randomize(Classifier(**SQUARE, classes=3), seed).state_dict() for seed in (0, 1))
VIT = {name: tensor for name, tensor in A.items() if not name.startswith("head.")}
LOSS = {"loss.weight": torch.ones(3), "loss.step": torch.tensor(2)}
PATCHES = "patch_embed.proj.weight"


def below(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def own_file(path, model, **changes):
    save_weights(path, model.state_dict(), model.config | changes)
    return path


def torch_file(path, content, **options):
    torch.save(content, path, **options)
    return path


def converted(source, out, format, *flags):
    """The file that `python model.py convert` writes."""
    main(["convert", *map(str, (source, out, "--format", format, *flags))])
    return out


def refuse(words, function, *arguments, **options):
    """A call must raise a ValueError of one line with these words: a regular expression."""
    with pytest.raises(ValueError, match=words) as error:
        function(*arguments, **options)
    return one_line(error)


def load(task, path, heads=None):
    return evaluate.load_model(path, task, "cpu", heads)


def lost(path, model, heads=None, unsaid=()):
    """Families that a file lacks of a model. What it has must be the model's, bit for bit."""
    state, config = read_weights(path, heads)
    own = model.state_dict()
    assert equal_states(state, {name: own[name] for name in state})
    assert {k: v for k, v in config.items() if k not in unsaid and v != model.config[k]} == {}
    return {name.split(".")[0] for name in own.keys() - state.keys()}


# ------------------------------------------------------------------------ our own files


def test_weights_come_back_bit_for_bit_and_a_failed_save_leaves_the_old_ones(tmp_path, monkeypatch):
    model = randomize(MAE(**SMALL_MAE, channels=4))
    path = own_file(tmp_path / "model.pt", model)
    state, config = read_weights(path)
    assert config == model.config == json.loads(json.dumps(config))
    other, count = MAE(**config), len(model.state_dict())
    line = load_weights(other, state)
    assert line == f"weights: {count} tensors loaded, positions as they were"
    assert equal_states(other.state_dict(), model.state_dict())
    assert [path] == list(tmp_path.iterdir())
    before = path.read_bytes()
    with pytest.raises(TypeError):
        own_file(path, ViT(**SMALL), no_json=torch.Size)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError):
        own_file(path, ViT(**SMALL))
    assert path.read_bytes() == before


MODELS = {
    "vit": partial(ViT, **SMALL),
    "mae": partial(MAE, **SMALL_MAE),
    "five": partial(Classifier, **SMALL, classes=5),
    "nine": partial(Classifier, **SMALL, classes=9),
    "mean": partial(Classifier, **SMALL, classes=5, pool="mean"),
    "pair": partial(TwoTowers, **SMALL, text=TINY_TEXT, shared_width=8),
}
DECODER = "mask_token decoder_pos_embed decoder_embed decoder_blocks decoder_norm decoder_pred"
TEXT_PARTS = "image_projection logit_scale text text_projection"
# (the file's model, the model it is loaded into, keep_head, newly initialised, dropped)
PARTS = [
    ("vit", "mae", False, DECODER, ""),
    ("mae", "five", False, "head", DECODER),
    ("five", "five", True, "", ""),
    ("five", "nine", False, "head", "head"),
    ("five", "mean", False, "fc_norm head", "head norm"),
    ("mean", "vit", False, "", "head"),  # its last norm has another name
    ("pair", "five", False, "head", TEXT_PARTS),
    ("vit", "pair", False, TEXT_PARTS, ""),
]


@pytest.mark.parametrize("source, target, keep, new, dropped", PARTS)
def test_parts_of_one_side_alone_are_named(source, target, keep, new, dropped):
    state, model = randomize(MODELS[source]()).state_dict(), randomize(MODELS[target](), seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    line = load_weights(model, state, (2, 3), keep)
    assert section(line, "newly initialised") == {*new.split()}
    assert section(line, "dropped") == {*dropped.split()}
    renamed = source == "mean"
    assert line.endswith("; norm from fc_norm") == renamed
    for name, tensor in model.state_dict().items():
        theirs = name.replace("norm.", "fc_norm.") if renamed and name[:5] == "norm." else name
        expected = before[name] if name.split(".")[0] in new.split() else state[theirs]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("height, width, given", [(24, 24, False), (32, 16, True), (48, 8, True)])
def test_positions_of_another_grid_are_resampled(height, width, given):
    old = height // 8, width // 8
    tensors = MODELS["mae"](image_size=(height, width)).state_dict()
    model = randomize(MODELS["mae"]())
    line = load_weights(model, tensors, old if given else None)
    names = {"pos_embed", "decoder_pos_embed"}
    assert section(line, "resampled") == {f"{n} from {old[0]}x{old[1]} to 2x3" for n in names}
    for name in names:
        tensors[name] = models.resample_positions(tensors[name], old, (2, 3))
    assert equal_states(model.state_dict(), tensors)


# (name of a tensor, what it is changed to; None: left out)
MISFITS = [
    ("blocks.0.ls1.gamma", torch.zeros(32)),
    ("blocks.1.attn.qkv.bias", None),
    ("norm.weight", torch.zeros(33)),
    ("pos_embed", torch.zeros(1, 10, 64)),  # of another width
    ("pos_embed", torch.zeros(1, 1 + 8, 32)),  # no square
    ("mask_token", torch.zeros(1, 1, 8)),
]


@pytest.mark.parametrize("name, tensor", MISFITS)
def test_tensors_that_do_not_fit_are_refused_by_name(name, tensor):
    tensors = MAE(**SMALL_MAE).state_dict() | {name: tensor}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    model = randomize(MAE(**SMALL_MAE))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refuse(name, load_weights, model, tensors)
    assert equal_states(model.state_dict(), before)


def test_a_stage_inherits_norm_eps_and_heads(tmp_path):
    names, model = ("size", "norm_eps"), ViT(**SQUARE, norm_eps=0.1)
    bare = torch_file(tmp_path / "bare.pt", model.state_dict())
    assert inherit(bare, {}, names, 4)[1] == {"size": "32x2x4", "norm_eps": 1e-6}
    path = own_file(tmp_path / "model.pt", model)
    assert inherit(path, {}, names)[1]["norm_eps"] == 0.1
    del model.config["norm_eps"]  # as it was before there was one
    assert load("features", own_file(path, model))[0].config["norm_eps"] == 1e-6
    for of_weights in ({"heads": 4}, {"entry": "teacher"}):
        words = "--heads and --entry describe the weights in --init"
        refuse(words, inherit, None, {}, names, **of_weights)


# --------------------------------------------------------------- files that are refused


REFUSED = {
    r"numpy\S+\.scalar": np.float64(0.5),
    r"pathlib\S+Path": Namespace(output_dir=Path("runs")),
    r"torch\.nn\.modules\.linear\.Linear": nn.Linear(2, 2),
    r"\w+\.system": None,  # a Trap
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_is_named_and_never_runs(tmp_path, name, zipped):
    sprung, value = tmp_path / "sprung", REFUSED[name]
    content = {"model": VIT, "best": Trap(sprung) if value is None else value}
    path = torch_file(tmp_path / "m.pt", content, _use_new_zipfile_serialization=zipped)
    readers = [read_weights, lit.read_text_weights, detect.read_detector, detect.read_weights]
    for read in [*readers, lambda path: evaluate.load_model(path, "knn", "cpu")]:
        refuse(rf"m\.pt \(torch refuses the {name} in it", read, path)
        assert not sprung.exists()
    torch.load(path, weights_only=False)
    assert sprung.exists() == (value is None)  # it was a live one


TEXT = {**TINY_TEXT, "positions": 9}
KINDS = {
    "features": (ViT, SMALL),
    "reconstruct": (MAE, SMALL_MAE),
    "classify": (Classifier, {**SMALL, "classes": 3}),
    "video": (video.VideoClassifier, {**SMALL, "classes": 3, "frames": 4}),
    "zeroshot": (TwoTowers, {**SMALL, "text": TEXT, "shared_width": 8}),
    "detect": (detect.Detector, {"size": "toy", "image_size": 32, "classes": 2}),
}
BIG = [2**40, 2**70]
TEXTS = [{**TEXT, name: big} for name in TINY_TEXT for big in BIG]
TEXTS += [{**TEXT, "positions": 2**40}, {"size": f"16x{2**40}x2"}]
# {task: {entry of the config: what it is changed to}}
OF_ALL = {"patch_size": [*BIG, -8], "channels": [*BIG, -3, None], "positions": ["x" * 5000]}
OF_ALL["image_size"] = [2**40, [2**40] * 2, [2**70, 16], "9" * 5000, [16, 24, "a" * 500], None]
OF_ALL["size"] = [f"{2**40}x3x4", f"{2**70}x3x4", f"32x{2**40}x4", "x" * 5000, ["T"]]
IMPOSSIBLE = {task: OF_ALL.copy() for task in KINDS}
IMPOSSIBLE["reconstruct"]["decoder"] = [[2**40, 2, 2], [16, 2**40, 2], [16], "16x2x2", 7]
IMPOSSIBLE["classify"]["classes"] = IMPOSSIBLE["video"]["frames"] = [*BIG, "many"]
IMPOSSIBLE["zeroshot"] |= {"shared_width": BIG, "text": TEXTS}
IMPOSSIBLE["detect"] = {"image_size": [2**40, [2**40] * 2, None], "classes": BIG}


@pytest.mark.parametrize("task", KINDS)
def test_a_config_that_cannot_be_its_weights_is_one_line(tmp_path, task):
    """Nothing of the size that it asks for is made."""
    kind, arguments = KINDS[task]
    model, path = kind(**arguments), tmp_path / "model.pt"
    readers = [lambda: evaluate.load_model(path, task, "cpu")]
    readers.append(lambda: inherit(path, {}, ("size",), read=detect.read_weights))
    for name, values in IMPOSSIBLE[task].items():
        of_text = [lambda: lit.read_text_weights(path)] if name == "text" else []
        for value, read in itertools.product(values, readers + of_text):
            own_file(path, model, **{name: value})
            said = refuse(re.escape(str(path)), read)
            # What torch says is there, without the frames of its C++ code.
            assert len(said) < 400 + len(str(path)) and "frame #" not in said
            assert re.search(": .*[a-z]{3}", said)


@pytest.mark.parametrize("task", KINDS)
def test_the_config_of_each_kind_is_that_of_its_weights(tmp_path, monkeypatch, task):
    monkeypatch.setitem(sys.modules, "support.formats", None)  # model.py reads its own files alone
    kind, arguments = KINDS[task]
    model = kind(**arguments)
    path = own_file(tmp_path / "model.pt", model)
    found = evaluate.load_model(path, task, "cpu")[0]
    assert type(found) is kind and equal_states(found.state_dict(), model.state_dict())
    trunk = {n: t for n, t in model.state_dict().items() if not n.startswith("head.")}
    save_weights(path, trunk, model.config)  # as somebody may pass it on
    if task in ("classify", "video"):
        assert equal_states(read_weights(path)[0], trunk)


def pair_file(changes=(), **config):
    """The content of a pair's file with tensors (None: left out) and the config changed."""
    model = TwoTowers(**SQUARE, text={"size": "16x1x2", "vocabulary": 20}, shared_width=8)
    state = {n: t for n, t in (model.state_dict() | dict(changes)).items() if t is not None}
    return {"model": state, "config": model.config | config}


META, COMPILED = torch.ones(32, device="meta"), {"model._orig_mod.cls_token": torch.ones(1)}
SCALED = VIT | {"blocks.0.ls1.gamma": torch.ones(32)}
# (words of the message, what the file holds)
UNUSABLE = [
    ("no ViT or text tower .* of 5$", 5),
    ("no ViT or text tower", {}),
    ("no ViT or text tower .* of conv1.weight$", {"conv1.weight": torch.zeros(3)}),
    ("no ViT or text tower .* of 1, pos_embed$", {1: torch.ones(2), "pos_embed": torch.ones(2)}),
    ("--entry reads what is in weights$", {"weights": VIT, "epoch": 3}),
    ("of my.cls_token, .*--entry reads what is in my$", below("my.", VIT)),
    (r"no \(D, C, P, P\)", VIT | {PATCHES: torch.ones(32, 192)}),
    (r"no \(D, C, P, P\)", {PATCHES: torch.ones(8, 3, 0, 0)}),
    ("pos_embed has 16 rows", VIT | {"pos_embed": torch.ones(1, 16, 32)}),
    ("no .* pos_embed", {n: VIT[n] for n in VIT if n != "pos_embed"}),
    ("size '100x2x4'", VIT | {PATCHES: torch.ones(100, 3, 8, 8)}),
    ("'image_size' is missing", {"model": VIT, "config": {"size": "T"}}),
    ("same name but for a prefix", below("model.", VIT) | COMPILED),
    ("nothing explains module.cls_token", VIT | {"module.cls_token": VIT["cls_token"]}),
    ("nothing explains blocks.0.ls1.gamma: it is of an", below("model.", SCALED) | LOSS),
    ("mlp.fc2.weight is", VIT | {"blocks.1.mlp.fc2.weight": torch.ones(32, 64)}),  # SwiGLU
    ("norm.weight is sparse", pair_file({"norm.weight": torch.ones(32).to_sparse()})),
    ("norm.bias is sparse, or a shape", VIT | {"norm.bias": META}),
    ("not a mapping", pair_file(text="abc")),
    (r"wanted \(32, 768\)", pair_file(shared_width=768)),
]
NAMES = [PATCHES, "pos_embed", "mask_token", "blocks.0.norm1.weight", "head.weight"]
SHAPES = [torch.ones(shape) for shape in ((), (3,), (2, 2, 2))]
UNUSABLE += [("", A | {name: tensor}) for name in NAMES for tensor in SHAPES]


@pytest.mark.parametrize("words, content", UNUSABLE)
def test_a_file_without_a_network_that_is_known_is_one_line(tmp_path, words, content):
    path, own = torch_file(tmp_path / "weights.pt", content), tmp_path / "own.pt"
    readers = [lambda: read_weights(path, 4), lambda: convert(path, own, "own", 4)]
    for read in [*readers, lambda: evaluate.load_model(path, "knn", "cpu", 4)]:
        refuse(f"weights.pt.*{words}", read)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("save", [torch.save, safetensors.torch.save_file])
def test_a_missing_empty_or_truncated_file_is_one_line(tmp_path, save):
    path = tmp_path / ("model.pt" if save is torch.save else "model.safetensors")
    save(VIT, path)
    content, missing = path.read_bytes(), path.with_stem("none")
    (tmp_path / "empty").mkdir()
    unusable = [("no weights at", 0, missing), ("no weights at", 0, tmp_path / "empty")]
    unusable += [("cannot read weights from", n, path) for n in (0, 0.001, 0.1, 0.5, 0.999)]
    for words, share, where in unusable:
        path.write_bytes(content[: int(share * len(content))])
        refuse(f"{words} {where}", read_weights, where, 4)


# ------------------------------------------------------------ the public MAE code, timm


# (arguments beside a public MAE's weights; what is read of them: normalize_targets, mask_ratio, size)
ARGUMENTS = [
    (None, None, None, None),
    (Namespace(norm_pix_loss=False, mask_ratio=0.5, input_size=16), False, 0.5, None),
    ({"norm_pix_loss": True, "mask_ratio": 0.25}, True, 0.25, None),
    (Namespace(norm_pix_loss=0, input_size=[8, 32]), 0, None, [8, 32]),
    (Namespace(norm_pix_loss="False", mask_ratio=[0.5], input_size=None), None, None, None),
]


@pytest.mark.parametrize("arguments, normalize, ratio, size", ARGUMENTS)
def test_a_public_mae_s_arguments_say_what_was_predicted(
    tmp_path, capsys, arguments, normalize, ratio, size
):
    known = {"normalize_targets": True if normalize is None else normalize}
    known |= {"mask_ratio": ratio or 0.75, "image_size": size or [16, 16]}
    tensors = randomize(MAE("toy", decoder=(512, 8, 16), image_size=16)).state_dict()
    content = {"model": tensors, "args": arguments, "optimizer": {"step": 3}}
    path = torch_file(tmp_path / "public.pth", content)
    model, line = load("reconstruct", path)
    said = capsys.readouterr().out
    assert "timm-named ViTMAE" in said and ("mask_ratio" in said) == bool(ratio)
    assert model.config.items() >= {**known, "decoder": [512, 8, 16]}.items()
    assert f"{len(tensors)} tensors loaded" in line
    assert equal_states(model.state_dict(), tensors)
    assert model.num_visible == int(4 * (1 - known["mask_ratio"]))
    convert(path, tmp_path / "own.pt", "own")
    assert read_weights(tmp_path / "own.pt")[1].items() >= known.items()


@pytest.mark.parametrize("size", ["toy", "T", "B", "H"])
def test_the_architecture_is_read_off_the_tensors(size):
    model = on_meta(ViT, size, image_size=2 * models.SIZES[size][3], channels=4)
    # Heads show in no shape: T and toy have the same width.
    assert formats.infer_config(model.state_dict()) == model.config
    if size in lit.PAIRS:
        text, shared = lit.PAIRS[size]
        text = {"size": text, "vocabulary": 250_002}
        pair = on_meta(TwoTowers, size, text=text, shared_width=shared)
        config = formats.infer_config(pair.state_dict())
        assert config["text"].items() >= pair.config["text"].items()
        assert {**config, "text": pair.config["text"]} == pair.config


# (arguments of timm's VisionTransformer, heads to be given, file)
VITS = {
    "B/16": ({"depth": 12, "embed_dim": 768, "num_heads": 12}, None, "vit.safetensors"),
    "H/14": ({"depth": 1, "embed_dim": 1280, "num_heads": 16, "patch_size": 14}, 16, "vit.pth"),
    "512 px, grey": ({**TIMM, "img_size": 512, "patch_size": 16, "in_chans": 1}, 4, "vit.pt"),
    "classes": ({**TIMM, "num_classes": 5}, 4, "vit.pt"),
    "mean": ({**TIMM, "num_classes": 5, "global_pool": "avg"}, 4, "vit.pt"),
}


@pytest.mark.parametrize("case", VITS)
@torch.no_grad()
def test_timm_s_vits_compute_the_same_here(timm, tmp_path, capsys, case):
    arguments, heads, name = VITS[case]
    arguments = {"num_classes": 0, "weight_init": "skip", **arguments}
    theirs = randomize(timm.models.VisionTransformer(**arguments))
    save = safetensors.torch.save_file if name.endswith("safetensors") else torch.save
    save(theirs.state_dict(), tmp_path / name)
    ours, line = load("classify" if theirs.num_classes else "features", tmp_path / name, heads)
    assert "timm-named ViT" in capsys.readouterr().out
    assert "dropped" not in line and "newly" not in line
    images = random_images(ours, 2)
    close(ours(images), theirs(images) if theirs.num_classes else theirs.forward_features(images))


def test_weights_of_images_that_are_no_square_want_an_image_size(timm, tmp_path):
    sizes = {**TIMM, "img_size": (40, 24), "num_classes": 3}
    theirs = randomize(timm.models.VisionTransformer(**sizes))
    path, out = torch_file(tmp_path / "timm.pt", theirs.state_dict()), tmp_path / "own.pt"
    model, line = evaluate.load_model(path, "classify", "cpu", 4, (40, 24))
    assert "positions as they were" in line
    close(model(random_images(model)), theirs(random_images(model)))
    # Without it, or with one that it cannot be: what to type.
    why = "pos_embed has 16 rows, .* give the weights' own --image-size HEIGHTxWIDTH, of 15 patches"
    for size in (None, (24, 24), (48, 24)):
        for use in (
            partial(evaluate.load_model, path, "knn", "cpu", 4, size),
            partial(inherit, path, {"image_size": size}, (), 4),
            partial(convert, path, out, "own", 4, size),
        ):
            refuse(why, use)
    converted(path, out, "own", "--heads", 4, "--image-size", "40x24")
    assert read_weights(out)[1]["image_size"] == [40, 24]
    again = partial(convert, out, tmp_path / "again.pt", "own", image_size=(24, 40))
    refuse("own.pt is of images of 40x24: leave --image-size out", again)


@pytest.mark.parametrize("size", [(64, 16), (48, 24)])  # as many patches as there are, others
def test_an_image_size_that_the_weights_are_not_of_resamples_their_positions(tmp_path, size):
    model, line = evaluate.load_model(torch_file(tmp_path / "v.pt", A), "classify", "cpu", 4, size)
    grid = size[0] // 8, size[1] // 8
    assert "resampled: pos_embed from 4x4 to {}x{}".format(*grid) in line
    table = models.resample_positions(A["pos_embed"], (4, 4), grid)
    assert torch.equal(model.pos_embed, table) and model.config["image_size"] == [*size]


# ---------------------------------------------------------------- one network of a file


COMPILED_BLOCKS = {re.sub(r"(blocks\.\d\.)", r"\1_orig_mod.", n): t for n, t in A.items()}
OPTIMIZER = {"optimizer": {"state": {0: LOSS}}}
LIGHTNING = {"state_dict": below("model.", A) | below("ema.module.", B) | LOSS}
DINO = {"student": below("module.backbone.", B), "teacher": below("backbone.", A) | LOSS}
WITHIN = {"state_dict": below("model.", B) | below("ema._orig_mod.", A)}
HINT = "; --entry reads what is in"
# (--entry, the content of a file with the wanted network A, how the line that is printed ends)
NETWORKS = [
    (None, COMPILED_BLOCKS, "ViT"),  # torch.compile
    (None, {"model": below("_orig_mod.module.", A)}, "ViT in model/module"),
    (None, below("module.", A) | {"n": torch.ones(1)}, "ViT in module; not read: n"),
    (None, LIGHTNING, f"model; not read: state_dict.loss{HINT} state_dict/ema.module"),
    (None, below("model.encoder.", A) | {"model.head.bias": A["head.bias"]}, "read: model.head"),
    (None, below("backbone.", A) | below("momentum.", B), f"{HINT} momentum"),  # solo-learn
    (None, {"state_dict": A, "ema": B} | OPTIMIZER, f"not read: optimizer{HINT} ema"),  # timm
    (None, A | OPTIMIZER, "ViT"),
    ("model", {"state_dict": B, "model": A}, f"{HINT} state_dict"),
    ("teacher", DINO, f"backbone; not read: teacher.loss{HINT} student/module.backbone"),
    ("student/module.backbone", {"student": below("module.backbone.", A), "teacher": B}, "teacher"),
    ("ema", WITHIN, f"ViT in state_dict/ema{HINT} state_dict/model"),
    ("visual.trunk", below("visual.trunk.", A) | {"text": META}, "not read: text"),  # open_clip
    ("encoder", below("encoder.", A) | below("backbone.", B), f"in encoder{HINT} backbone"),
]


@pytest.mark.parametrize("entry, content, said", NETWORKS)
def test_one_network_of_a_file_is_read_and_the_rest_is_said(tmp_path, capsys, entry, content, said):
    state, _ = read_weights(torch_file(tmp_path / "file.pt", content), 4, entry=entry)
    assert equal_states(state, A)
    assert capsys.readouterr().out.endswith(f"{said}\n")


# (the networks that --entry may say, the content of a file)
AMBIGUOUS = [
    ("student or teacher", {"student": VIT, "teacher": VIT}),
    ("backbone or model.encoder", below("model.encoder.", VIT) | below("backbone.", VIT)),
    ("encoder", VIT | below("encoder.", VIT)),
]


@pytest.mark.parametrize("names, content", AMBIGUOUS)
def test_of_several_networks_none_is_chosen_in_silence(tmp_path, names, content):
    path = torch_file(tmp_path / "file.pt", content)
    for entry, words in ((None, ""), ("nobody", "known here in nobody, of .*")):
        refuse(f"{words}{HINT} {names}$", read_weights, path, 4, entry=entry)
    # --text-init has no such flag.
    assert "--entry" not in refuse("known here|several", lit.read_text_weights, path, 4)


TASKS = ["classify", "linear", "lowshot", "lit", "video", "detect"]
STAGES = ["mae_pretrain --decoder 16x1x2", "weak_pretrain"]
STAGES += [f"finetune --task {task}" for task in TASKS]


@pytest.mark.parametrize("case", STAGES)
def test_each_stage_takes_entry_heads_and_image_size(tmp_path, case):
    program, *flags = case.split()
    size, grid = ((48, 48), (4, 4)) if "detect" in case else ((40, 24), (5, 3))
    wanted = VIT if "detect" in case else ViT(**{**SQUARE, "image_size": size}).state_dict()
    path = torch_file(tmp_path / "file.pt", {"state_dict": B, "ema": wanted})
    flags += ["--init", path, "--heads", 4, "--entry", "ema", "--out", tmp_path / "run"]
    flags += ["--batch-size", 8, "--image-size", "{}x{}".format(*size)]
    program = importlib.import_module(program)
    run = program.parse_arguments(list(map(str, flags)))
    program.prepare(run)
    weights, found = run.weights
    assert tuple(found) == grid and run.config["size"] == SQUARE["size"]
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights.items())


def test_evaluate_and_convert_take_the_entry_that_they_are_told(tmp_path, capsys):
    path, own = torch_file(tmp_path / "f.pt", {"state_dict": B, "ema": A}), tmp_path / "own.pt"
    flags, found = ["--heads", 4, "--entry", "ema"], []
    assert equal_states(read_weights(converted(path, own, "own", *flags))[0], A)
    picture(0, 40, 40).save(tmp_path / "0.png")
    for given in ([own], [path, *flags], [path, *flags[:2]]):
        out = tmp_path / f"{len(found)}.npz"
        asked = ["--task", "features", "--split", "train", "--data", tmp_path, "--out", out]
        evaluate.main(list(map(str, [*asked, "--workers", 0, "--checkpoint", *given])))
        found.append(np.load(out)["features"])
    assert np.array_equal(found[0], found[1]) and not np.allclose(found[0], found[2])
    with pytest.raises(SystemExit):
        evaluate.main(["--task", "detect", "--checkpoint", str(path), "--entry", "a"])
    assert "--entry is for --task classify" in capsys.readouterr().err


# ----------------------------------------------------------- Hugging Face and torchtext


def hf_file(model, tmp_path, how):
    """(path, heads to be given) of a folder, whole or in shards, or of a file, names below `how`.

    transformers 5 has other names in memory than in the files of a folder.
    """
    if how not in ("folder", "shards"):
        state = below(how, model.state_dict())
        return torch_file(tmp_path / "pytorch_model.bin", state), 4
    model.save_pretrained(tmp_path / how, max_shard_size="40kB" if how == "shards" else "1GB")
    assert (len([*(tmp_path / how).glob("*.safetensors")]) > 2) == (how == "shards")
    return tmp_path / how, None


# Their own names begin with "encoder.", which is a prefix, too.
HOW = ["folder", "shards", "", "model.", "module.encoder.", "_orig_mod."]
HOW = pytest.mark.parametrize("how", HOW)


@HOW
@torch.no_grad()
def test_hugging_face_s_vits_compute_the_same_here(transformers, tmp_path, capsys, how):
    config = transformers.ViTConfig(**HF_VIT, num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    theirs = randomize(transformers.ViTForImageClassification(config))
    path, heads = hf_file(theirs, tmp_path, how)
    ours, _ = load("classify", path, heads)
    assert "Hugging Face ViT" in capsys.readouterr().out
    assert ours.config["norm_eps"] == 1e-12 and ours.config["pool"] == "cls"
    assert ours.config["class_names"] == (["a", "b", "c"] if heads is None else None)
    images = random_images(ours)
    close(ours(images), theirs(images).logits)


@torch.no_grad()
def test_hugging_face_s_eps_is_kept(transformers, tmp_path, capsys):
    """One that matters: where it is not kept, the outputs differ."""
    theirs = randomize(transformers.ViTModel(transformers.ViTConfig(**HF_VIT, layer_norm_eps=0.1)))
    ours, _ = load("features", hf_file(theirs, tmp_path, "folder")[0])
    assert re.search("Hugging Face ViT.*; not read: pooler\n", capsys.readouterr().out)
    images = random_images(ours)
    close(ours(images), theirs(images).last_hidden_state)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_index_and_its_files_are_one_or_refused_in_one_line(tmp_path, suffix):
    files = {name: f"part-{1 + number % 2}.{suffix}" for number, name in enumerate(A)}
    save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    for file in set(files.values()):
        save({name: tensor for name, tensor in A.items() if files[name] == file}, tmp_path / file)
    name = "model" if suffix == "safetensors" else "pytorch_model"
    index = tmp_path / f"{name}.{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    for path in (tmp_path, index):
        state = read_weights(path, 4)[0]
        assert equal_states(state, A) and formats.fingerprint(state) == formats.fingerprint(A)
    torch.save([torch.ones(3), 4], tmp_path / "list.bin")
    for words, content in (
        ("cannot be used: ", "no dict"),
        ("'weight_map' is missing", {}),
        ("Invalid name", {"weight_map": {"a": "../a"}}),
        ("no weights at .*3.bin", {"weight_map": {"a": "3.bin"}}),
        ("list indices", {"weight_map": {"a": "list.bin"}}),
        ("'loss' is missing", {"weight_map": {**files, "loss": files["norm.bias"]}}),
    ):
        index.write_text(json.dumps(content))
        refuse(f"{index.name}.*{words}", read_weights, tmp_path, 4)


@HOW
@torch.no_grad()
def test_hugging_face_s_vitmae_computes_the_same_here(transformers, tmp_path, capsys, how):
    config = transformers.ViTMAEConfig(**HF_VIT, **HF_DECODER, norm_pix_loss=True)
    theirs = randomize(transformers.ViTMAEForPreTraining(config))
    path, heads = hf_file(theirs, tmp_path, how)
    if heads:  # how many heads a decoder has cannot be said
        words = "2 decoder_blocks of width 16 have how many heads"
        refuse(words, read_weights, path, heads)
        known = {"model_type": "vit_mae", "decoder_num_attention_heads": 2}
        (tmp_path / "config.json").write_text(json.dumps(known))
    ours, _ = load("reconstruct", path, heads)
    assert "Hugging Face ViTMAE" in capsys.readouterr().out
    images = random_images(ours, 2)
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    close(ours(images, noise.argsort(dim=1)).mean(), theirs(images, noise=noise).loss)
    encoder, _ = load("features", path, heads)
    theirs.vit.config.mask_ratio = theirs.vit.embeddings.config.mask_ratio = 0.0
    ordered = torch.arange(16.0).expand(2, -1)
    close(encoder(images), theirs.vit(images, noise=ordered).last_hidden_state)


def texts(vocabulary, lengths=(9, 1, 5)):
    """(B, T) random tokens, filled up with the padding's id."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(2, vocabulary, (len(lengths), max(lengths)), generator=generator)
    for row, length in zip(tokens, lengths):
        row[length:] = lit.PADDING
    return tokens


def text_tower(path, heads=None):
    state, arguments = lit.read_text_weights(path, heads)
    tower = TextTower(**arguments)
    tower.load_state_dict(state)
    return tower, arguments


@pytest.mark.parametrize("kind", ["XLMRobertaModel", "XLMRobertaForMaskedLM"])
@HOW
@torch.no_grad()
def test_hugging_face_s_xlm_r_computes_the_same_here(transformers, tmp_path, capsys, kind, how):
    sizes = {**HF, "vocab_size": 50, "max_position_embeddings": 20, "layer_norm_eps": 1e-5}
    theirs = randomize(getattr(transformers, kind)(transformers.XLMRobertaConfig(**sizes)))
    path, heads = hf_file(theirs, tmp_path, how)
    ours, arguments = text_tower(path, heads)
    unused = "lm_head" if "Masked" in kind else "pooler"
    assert re.search(f"Hugging Face XLM-R.*; not read: {unused}\n", capsys.readouterr().out)
    expected = {"size": "32x2x4", "vocabulary": 50, "positions": 20, "norm_eps": 1e-5}
    assert arguments == expected
    tokens, encoder = texts(50), getattr(theirs, "roberta", theirs)
    found = encoder(tokens, attention_mask=tokens != lit.PADDING).last_hidden_state
    close(ours(tokens), found[:, 0])
    refuse("a text tower alone", read_weights, path)


class TorchtextRoberta(nn.Module):
    """torchtext's RobertaModel, as its layout and its behaviour are documented."""

    def __init__(self, vocabulary, width, layers, heads, positions=514):
        super().__init__()
        options = {"activation": "gelu", "batch_first": True}
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, **options)
        position = nn.ModuleDict({"embedding": nn.Embedding(positions, width)})
        encoder = nn.ModuleDict()
        encoder["token_embedding"] = nn.Embedding(vocabulary, width)
        encoder["layers"] = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        encoder["positional_embedding"] = position
        encoder["embedding_layer_norm"] = nn.LayerNorm(width)
        self.encoder = nn.ModuleDict({"transformer": encoder})

    def forward(self, tokens):
        encoder = self.encoder["transformer"]
        positions = torch.ones_like(tokens)
        for row, text in enumerate(tokens.tolist()):
            length = sum(token != 1 for token in text)
            positions[row, :length] = torch.arange(2, 2 + length)
        x = encoder["token_embedding"](tokens)
        x = x + encoder["positional_embedding"]["embedding"](positions)
        x = encoder["embedding_layer_norm"](x)
        return encoder["layers"](x, src_key_padding_mask=tokens == 1)[:, 0]


OLD_TORCHTEXT = {
    "layers.layers.": "layers.",
    "self_attn.in_proj_": "attention.input_projection.",
    "self_attn.out_proj": "attention.output_projection",
    "linear1": "residual_mlp.mlp.0",
    "linear2": "residual_mlp.mlp.3",
    "norm1": "attention_layer_norm",
    "norm2": "final_layer_norm",
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("prefix", ["", "model.", "module.encoder."])
@torch.no_grad()
def test_a_released_pair_computes_the_same_here(timm, tmp_path, capsys, old, prefix):
    sizes = {**TIMM, "embed_dim": 128, "depth": 3, "num_heads": 4}
    vision = timm.models.VisionTransformer(num_classes=0, **sizes)
    text = TorchtextRoberta(60, 128, 3, 4)
    state = randomize(nn.ModuleDict({"vision_encoder": vision, "text_encoder": text})).state_dict()
    for new, before in OLD_TORCHTEXT.items() if old else ():
        blocks = {n for n in state if n.startswith("text_encoder") and "layers." in n}
        state = {n.replace(new, before) if n in blocks else n: t for n, t in state.items()}
    projections = [randomize(nn.Linear(24, width)).weight for width in (128, 128)]
    state |= {"vision_projection": projections[0], "text_projection": projections[1]}
    state["logit_scale"] = torch.tensor(2.5)
    path = torch_file(tmp_path / "pair.pt", below(prefix, state))
    ours, line = load("zeroshot", path)
    assert "torchtext-named CLIP pair" in capsys.readouterr().out and "dropped" not in line
    sizes = {"vocabulary": 60, "positions": 514, "norm_eps": 1e-5, "context": 100}
    assert ours.config["text"] == {"size": "toy", **sizes}
    tokens, images = texts(60), random_images(ours)
    found = ours(ours.features(images), tokens)
    expected = (vision(images) @ projections[0], text(tokens) @ projections[1])
    expected = [nn.functional.normalize(embedding, dim=1) for embedding in expected]
    close(found, (*expected, torch.tensor([2.5]).exp()))
    alone = torch_file(tmp_path / "text.pt", below(prefix, text.state_dict()))
    for text_file in (path, alone):
        close(text_tower(text_file)[0](tokens), text(tokens))
    assert lost(converted(path, tmp_path / "own.pt", "own"), ours) == set()
    content = {"model": below(prefix, ours.state_dict()), "config": ours.config}
    assert lost(torch_file(tmp_path / "pair.pt", content), ours) == set()


# {words: what config.json says instead}
CONFIGS = {
    "model_type is 'bert', wanted vit": {"model_type": "bert"},
    "hidden_act is 'quick_gelu', wanted gelu": {"hidden_act": "quick_gelu"},
    "hidden_size is 64, wanted 32": {"hidden_size": 64},
    "id2label has 1 of 3": {"num_attention_heads": 4, "id2label": {"0": ""}},
    "float": {"num_attention_heads": 4, "layer_norm_eps": "small"},
}


@pytest.mark.parametrize("words", CONFIGS)
def test_a_config_that_is_not_of_the_weights_beside_it_is_refused(tmp_path, words):
    model = Classifier(**SQUARE, **NAMED)
    convert(own_file(tmp_path / "model.pt", model), tmp_path / "hf", "hf")
    config = json.dumps({"model_type": "vit"} | CONFIGS[words])
    for content, said in ((config, words), ("{", "Expecting property name")):
        (tmp_path / "hf" / "config.json").write_text(content)
        refuse(f"hf.*{said}", read_weights, tmp_path / "hf")
