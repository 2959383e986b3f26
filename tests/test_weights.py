"""Weights of other libraries in and out of model.py: the same numbers, by their own code.

Their models are small, but for a few of a real width, with every parameter random; files are
written by them and read here, and the other way round.
"""

import json
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import picture, stage
from torch import nn

import evaluate
import finetune
import mae_pretrain
import model as models
import weak_pretrain
from model import MAE, Classifier, ViT
from support import formats
from tasks import lit
from tasks.lit import TextTower, TwoTowers

safetensors = pytest.importorskip("safetensors.torch", reason="pip install safetensors")
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"intermediate_size": 128, "image_size": 32, "patch_size": 8}
TINY_DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 2}
TINY_DECODER |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 64}


@pytest.fixture(scope="session", autouse=True)
def torchvision():
    """timm and transformers import it, and a CPU torch lacks two operators that it then wants."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        yield
    except RuntimeError as error:
        assert "torchvision::nms does not exist" in str(error)
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        yield library
    else:
        yield


@pytest.fixture(scope="session")
def timm():
    return pytest.importorskip("timm", reason="pip install --no-deps torchvision timm")


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers", reason="pip install transformers")


def randomize(model, seed=0):
    """Every parameter random, scales of norms around 1: a bias of 0 or a scale of 1 hides much."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shift = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05 + shift)
    return model.eval()


def load(kind, path, heads=None, **others):
    """A model of the weights in a file, with all that it says of itself."""
    state, config = models.read_weights(path, heads)
    keys = {"decoder", "mask_ratio", "normalize_targets"} if kind is MAE else set()
    keys |= {"classes", "pool", "class_names"} if kind is Classifier else set()
    keys |= {"text", "shared_width", "pool"} if kind is TwoTowers else set()
    config = models.encoder_config(config) | {k: config[k] for k in keys if k in config}
    model = kind(**config | others)
    line = models.load_weights(model, state, keep_head=True)
    return model.eval(), line


def images(side, count=2, channels=3):
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(1))


close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)

# (arguments of timm's VisionTransformer, heads to be given, file)
VITS = {
    "B/16": ({"depth": 12, "embed_dim": 768, "num_heads": 12}, None, "vit.safetensors"),
    "H/14": ({"depth": 1, "embed_dim": 1280, "num_heads": 16, "patch_size": 14}, 16, "vit.pth"),
    "512 px": ({"depth": 2, "embed_dim": 64, "num_heads": 4, "img_size": 512}, 4, "vit.pt"),
    "grey": ({"depth": 2, "embed_dim": 64, "num_heads": 4, "in_chans": 1}, 4, "vit.pt"),
}


@pytest.mark.parametrize("case", VITS)
@torch.no_grad()
def test_timm_s_vits_compute_the_same_here(timm, tmp_path, capsys, case):
    arguments, heads, name = VITS[case]
    theirs = randomize(
        timm.models.VisionTransformer(num_classes=0, weight_init="skip", **arguments)
    )
    save = safetensors.save_file if name.endswith("safetensors") else torch.save
    save(theirs.state_dict(), tmp_path / name)
    ours, line = load(ViT, tmp_path / name, heads)
    assert "timm-named ViT" in capsys.readouterr().out and "dropped" not in line
    pictures = images(arguments.get("img_size", 224), 1, arguments.get("in_chans", 3))
    close(ours(pictures), theirs.forward_features(pictures))


@torch.no_grad()
def test_timm_s_weights_of_images_that_are_no_square_want_an_image_size(timm, tmp_path, capsys):
    sizes = {"img_size": (40, 24), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    theirs = randomize(timm.models.VisionTransformer(num_classes=3, **sizes))
    path, own = tmp_path / "timm.pt", tmp_path / "own.pt"
    torch.save(theirs.state_dict(), path)
    pictures = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(1))
    asked = ["--heads", 4, "--image-size", "40x24"]
    model, line = evaluate.load_model(path, "classify", "cpu", 4, (40, 24))
    assert "positions as they were" in line
    close(model(pictures), theirs(pictures))
    assert "wrote" in converted(path, own, *asked, capsys=capsys)
    assert models.read_weights(own)[1]["image_size"] == [40, 24]
    for case in STAGES:
        square = ["--image-size", "40x24"] if case != "detect" else ["--image-size", "48"]
        file, flags = (path, square) if case != "detect" else (own, square)
        weights, grid = prepared(case, file, *flags).weights
        assert tuple(grid) == (5, 3)
        assert torch.equal(weights["pos_embed"], theirs.pos_embed)
    # Without it, or with one that it cannot be: what to type.
    why = "pos_embed has 16 rows, .* give the weights' own --image-size HEIGHTxWIDTH, of 15 patches"
    for image_size in (None, (24, 24), (48, 24)):
        for use in (
            lambda size: models.read_weights(path, 4, size),
            lambda size: evaluate.load_model(path, "knn", "cpu", 4, size),
            lambda size: models.inherit(path, {"image_size": size}, (), 4),
            lambda size: formats.convert(path, tmp_path / "out.pt", "own", 4, size),
        ):
            with pytest.raises(ValueError, match=why) as error:
                use(image_size)
            assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="own.pt is of images of 40x24: leave --image-size out"):
        formats.convert(own, tmp_path / "out.pt", "own", image_size=(24, 40))


@torch.no_grad()
def test_an_image_size_that_the_weights_are_not_of_resamples_their_positions(timm, tmp_path):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    theirs = randomize(timm.models.VisionTransformer(num_classes=3, **sizes))
    torch.save(theirs.state_dict(), tmp_path / "timm.pt")
    for size in ((64, 16), (48, 24)):  # as many patches as there are, and others
        model, line = evaluate.load_model(tmp_path / "timm.pt", "classify", "cpu", 4, size)
        grid = size[0] // 8, size[1] // 8
        assert f"resampled: pos_embed from 4x4 to {grid[0]}x{grid[1]}" in line
        table = models.resample_positions(theirs.pos_embed, (4, 4), grid)
        assert torch.equal(model.pos_embed, table) and model.config["image_size"] == [*size]


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("wrapped", ["bare", "state_dict", "module"])
@torch.no_grad()
def test_timm_s_classifiers_compute_the_same_here(timm, tmp_path, pool, wrapped):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    theirs = randomize(timm.models.VisionTransformer(num_classes=5, global_pool=pool, **sizes))
    state = theirs.state_dict()
    if wrapped == "module":  # DataParallel's
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save(state if wrapped == "bare" else {"state_dict": state, "epoch": 3}, tmp_path / "v.pt")
    ours, line = load(Classifier, tmp_path / "v.pt", 4)
    assert ours.config["pool"] == ("mean" if pool == "avg" else "cls") and ours.classes == 5
    assert "dropped" not in line and "newly" not in line
    close(ours(images(32)), theirs(images(32)))


def below(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


# {case: (content of a file, by the state of the wanted network and of another, what is said)}
LOSS = {"loss.weight": torch.ones(3), "loss.step": torch.tensor(2)}
WRAPPED = {
    "compiled": (lambda a, b: below("_orig_mod.", a), "stripped: _orig_mod."),
    "blocks compiled": (
        lambda a, b: {re.sub(r"(blocks\.\d\.)", r"\1_orig_mod.", n): t for n, t in a.items()},
        "stripped: _orig_mod.",
    ),
    "compiled in replicas": (
        lambda a, b: {"model": below("_orig_mod.module.", a)},
        "stripped: _orig_mod., module.",
    ),
    "replicas compiled": (lambda a, b: below("module._orig_mod.", a), "_orig_mod., module."),
    "averaged": (
        lambda a, b: below("module.", a) | {"n_averaged": LOSS["loss.step"]},
        "n_averaged",
    ),
    "Lightning": (
        lambda a, b: {"state_dict": below("model.", a) | LOSS, "epoch": 3},
        "stripped: model.; left: loss",
    ),
    "Lightning, averages beside": (
        lambda a, b: {"state_dict": below("model.", a) | below("model_ema.module.", b) | LOSS},
        "stripped: model.; left: loss; also there (--entry reads it): model_ema.module",
    ),
    "a head of its own": (
        lambda a, b: below("model.encoder.", a) | {"model.head.weight": torch.ones(3)} | LOSS,
        "stripped: model.encoder.; left: loss, model.head",
    ),
    "solo-learn": (
        lambda a, b: {"state_dict": below("backbone.", a) | below("momentum_backbone.", b)},
        "stripped: backbone.; also there (--entry reads it): momentum_backbone",
    ),
    "another's decoder": (
        lambda a, b: below("encoder.", a) | {"decoder.weight": torch.ones(3)},
        "stripped: encoder.; left: decoder",
    ),
    "timm": (
        lambda a, b: {"state_dict": a, "state_dict_ema": b, "optimizer": {"state": {0: LOSS}}},
        "also there (--entry reads it): state_dict_ema",
    ),
    "DeiT": (lambda a, b: {"model": a, "model_ema": b}, "(--entry reads it): model_ema"),
    "both usual entries": (lambda a, b: {"state_dict": b, "model": a}, "reads it): state_dict"),
    "one of both": (lambda a, b: {"state_dict": a, "model": LOSS}, "ViT"),
}
ENTRIES = {
    "state_dict_ema": (
        lambda a, b: {"state_dict": b, "state_dict_ema": below("module.", a)},
        "entry: state_dict_ema; stripped: module.; also there (--entry reads it): state_dict",
    ),
    "teacher": (  # DINO
        lambda a, b: {
            "student": below("module.backbone.", b),
            "teacher": below("backbone.", a) | {"head.mlp.0.weight": torch.ones(3)},
        },
        "entry: teacher; stripped: backbone.; left: head; also there (--entry reads it): student",
    ),
    "model_ema": (
        lambda a, b: {"state_dict": below("model.", b) | below("model_ema._orig_mod.", a) | LOSS},
        "stripped: _orig_mod., model_ema.; left: loss; also there (--entry reads it): model",
    ),
    "visual.trunk": (  # open_clip
        lambda a, b: below("visual.trunk.", a) | {"text.weight": torch.ones(3)},
        "stripped: visual.trunk.; left: text",
    ),
    "encoder": (lambda a, b: below("encoder.", a) | below("backbone.", b), "stripped: encoder."),
}


@pytest.mark.parametrize("case", [*WRAPPED, *ENTRIES])
def test_one_network_of_a_file_is_read_and_the_rest_is_said(tmp_path, capsys, case):
    wanted, other = (randomize(Classifier(**SMALL, classes=3), seed) for seed in (0, 1))
    content, said = (WRAPPED | ENTRIES)[case]
    torch.save(content(wanted.state_dict(), other.state_dict()), tmp_path / "file.pt")
    entry = case if case in ENTRIES else None
    state, _ = models.read_weights(tmp_path / "file.pt", 4, entry=entry)
    assert state.keys() == wanted.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in wanted.state_dict().items())
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["", "model.", "module.encoder.", "_orig_mod."])
@torch.no_grad()
def test_a_prefix_that_begins_another_s_own_names_is_told_from_these(
    transformers, tmp_path, prefix
):
    """Hugging Face's blocks are below "encoder.", and so are torchtext's texts."""
    config = transformers.ViTConfig(**TINY, num_labels=3)
    kinds = (transformers.ViTModel(config), transformers.ViTForImageClassification(config))
    for theirs in map(randomize, kinds):
        torch.save(below(prefix, theirs.state_dict()), tmp_path / "vit.pt")
        ours, _ = load(ViT, tmp_path / "vit.pt", 4, norm_eps=1e-12)
        close(ours(images(32)), getattr(theirs, "vit", theirs)(images(32)).last_hidden_state)
    text = randomize(TorchtextRoberta(60, 128, 3, 4))
    torch.save(below(prefix, text.state_dict()), tmp_path / "text.pt")
    state, arguments = lit.read_text_weights(tmp_path / "text.pt")
    tower = TextTower(**arguments)
    tower.load_state_dict(state)
    close(tower(texts(60)), text(texts(60)))
    pair = TwoTowers(**OURS["TwoTowers"][1])
    content = {"model": below(prefix, pair.state_dict()), "config": pair.config}
    torch.save(content, tmp_path / "pair.pt")
    assert lost(tmp_path / "pair.pt", pair) == set()


AMBIGUOUS = {
    "student or teacher": lambda a: below("student.", a) | below("teacher.", a),
    "backbone or model.encoder": lambda a: below("model.encoder.", a) | below("backbone.", a),
    "in encoder": lambda a: a | below("encoder.", a),
    "in weights": lambda a: {"weights": a, "epoch": 3},
    "student or teacher ": lambda a: {"student": a, "teacher": a},
}


@pytest.mark.parametrize("words", AMBIGUOUS)
def test_of_several_networks_none_is_chosen_in_silence(tmp_path, words):
    path = tmp_path / "file.pt"
    torch.save(AMBIGUOUS[words](ViT(**SMALL).state_dict()), path)
    for use in (
        lambda: models.read_weights(path, 4),
        lambda: formats.convert(path, tmp_path / "own.pt", "own", 4),
        lambda: evaluate.load_model(path, "knn", "cpu", 4),
    ):
        with pytest.raises(
            ValueError, match=f"; --entry reads what is .*{words.strip()}$"
        ) as error:
            use()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError) as error:  # --text-init has no such flag
        lit.read_text_weights(path, 4)
    assert "--entry" not in str(error.value)


STAGES = {
    "stage 1": (mae_pretrain, ["--decoder", "16x1x2"]),
    "stage 2": (weak_pretrain, []),
    "classify": (finetune, ["--task", "classify"]),
    "linear": (finetune, ["--task", "linear"]),
    "lowshot": (finetune, ["--task", "lowshot"]),
    "lit": (finetune, ["--task", "lit"]),
    "video": (finetune, ["--task", "video"]),
    "detect": (finetune, ["--task", "detect"]),
}


def prepared(case, path, *arguments):
    """What a stage has settled, of its smallest data, before anything is written."""
    program, task = STAGES[case]
    common = ["--init", path, "--heads", 4, "--out", path.with_name("run"), "--batch-size", 8]
    run = program.parse_arguments([*task, *map(str, (*common, *arguments))])
    program.prepare(run)
    return run


@pytest.mark.parametrize("case", STAGES)
def test_each_stage_takes_the_entry_that_it_is_told(tmp_path, capsys, case):
    usual, average = (randomize(ViT(**SMALL), seed).state_dict() for seed in (0, 1))
    torch.save({"state_dict": usual, "state_dict_ema": average}, tmp_path / "file.pt")
    entry = ["--entry", "state_dict_ema"]
    for flags, wanted, other in (([], usual, "state_dict_ema"), (entry, average, "state_dict")):
        state = prepared(case, tmp_path / "file.pt", *flags).weights[0]
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())
        assert f"also there (--entry reads it): {other}\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--entry teacher is of the weights in --init"):
        models.inherit(None, {}, (), entry="teacher")


def test_evaluate_and_convert_take_the_entry_that_they_are_told(tmp_path, capsys):
    usual, average = (randomize(ViT(**SMALL), seed).state_dict() for seed in (0, 1))
    path, own = tmp_path / "file.pt", tmp_path / "own.pt"
    torch.save({"state_dict": usual, "state_dict_ema": average}, path)
    arguments = ["convert", path, own, "--format", "own", "--heads", 4, "--entry", "state_dict_ema"]
    formats.main(list(map(str, arguments)))
    assert torch.equal(models.read_weights(own)[0]["norm.bias"], average["norm.bias"])
    for i in range(2):
        picture(i, 40, 40).save(tmp_path / f"{i}.png")
    found = []
    for file, flags in ((own, []), (path, arguments[-4:]), (path, arguments[-4:-2])):
        asked = ["--task", "features", "--split", "train", "--data", tmp_path, "--checkpoint", file]
        out = tmp_path / f"{len(found)}.npz"
        evaluate.main(list(map(str, [*asked, *flags, "--out", out, "--workers", 0])))
        with np.load(out) as arrays:
            found.append(arrays["features"])
    assert np.array_equal(found[0], found[1]) and not np.allclose(found[0], found[2])
    asked = ["--task", "detect", "--checkpoint", path, "--entry", "a"]
    with pytest.raises(SystemExit):
        evaluate.main(list(map(str, asked)))
    assert "--entry is for --task classify" in capsys.readouterr().err


def test_what_is_not_explained_within_a_prefix_is_refused(tmp_path):
    state = below("model.", ViT(**SMALL).state_dict()) | LOSS
    torch.save(state | {"model.blocks.0.ls1.gamma": torch.ones(32)}, tmp_path / "vit.pt")
    with pytest.raises(ValueError, match="nothing explains blocks.0.ls1.gamma: it is of another"):
        models.read_weights(tmp_path / "vit.pt", 4)
    torch.save(state | {"model._orig_mod.cls_token": torch.ones(1)}, tmp_path / "vit.pt")
    with pytest.raises(ValueError, match="same name but for a prefix"):
        models.read_weights(tmp_path / "vit.pt", 4)
    torch.save({"model": state}, tmp_path / "vit.pt")
    with pytest.raises(ValueError, match="known here in teacher: "):
        models.read_weights(tmp_path / "vit.pt", 4, entry="teacher")


def hf_file(model, tmp_path, how):
    """What a Hugging Face model is read from: its folder, or a lone file of the state in memory."""
    if how == "folder":
        model.save_pretrained(tmp_path / "hf")
        return tmp_path / "hf", None
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    return tmp_path / "pytorch_model.bin", 4


HOW = pytest.mark.parametrize("how", ["folder", "memory"])


@HOW
@torch.no_grad()
def test_hugging_face_s_vits_compute_the_same_here(transformers, tmp_path, capsys, how):
    config = transformers.ViTConfig(**TINY, num_labels=3, id2label={0: "a", 1: "b", 2: "c"})
    theirs = randomize(transformers.ViTForImageClassification(config))
    ours, _ = load(Classifier, *hf_file(theirs, tmp_path, how))
    assert "Hugging Face ViT" in capsys.readouterr().out
    assert ours.config["norm_eps"] == 1e-12 and ours.config["pool"] == "cls"
    assert ours.config["class_names"] == (["a", "b", "c"] if how == "folder" else None)
    close(ours(images(32)), theirs(images(32)).logits)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@torch.no_grad()
def test_a_folder_whose_weights_are_in_several_files_is_one(transformers, tmp_path, safe, capsys):
    theirs = randomize(transformers.ViTModel(transformers.ViTConfig(**TINY, layer_norm_eps=0.1)))
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="40kB")
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    if not safe:  # as older versions of theirs wrote them
        index = tmp_path / "hf" / "model.safetensors.index.json"
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(text)
        for path in files:
            name = f"pytorch_{path.name}".replace(".safetensors", ".bin")
            torch.save(safetensors.load_file(path), path.with_name(name))
            path.unlink()
        index.unlink()
    (index,) = (tmp_path / "hf").glob("*.index.json")
    for path in (tmp_path / "hf", index):  # the folder, or the index itself
        ours, _ = load(ViT, path)
        assert f"{index}: Hugging Face ViT; of no use here: pooler" in capsys.readouterr().out
        close(ours(images(32)), theirs(images(32)).last_hidden_state)
    theirs.save_pretrained(tmp_path / "whole")  # a resumed run compares this
    own, whole = (models.read_weights(tmp_path / name)[0] for name in ("hf", "whole"))
    assert models.origin_of(own) == models.origin_of(whole)


def changed(index, change):
    listed = json.loads(index.read_text())
    change(listed["weight_map"])
    index.write_text(json.dumps(listed))


def only_a_list(index):
    torch.save([torch.ones(3), 4], index.with_name("list.bin"))
    index.write_text(json.dumps({"weight_map": {"cls_token": "list.bin"}}))


BROKEN_INDEX = {
    "lists no files": lambda index, _: index.write_text("{"),
    "lists no files of weights (list indices": lambda index, _: index.write_text("[1]"),
    "lists no files of weights ('weight_map'": lambda index, _: index.write_text("{}"),
    "lists no files of weights (Invalid name": lambda index, _: changed(
        index, lambda listed: listed.update(a="../a.safetensors")
    ),
    "2.safetensors: give": lambda _, file: file.unlink(),
    "cannot read weights": lambda _, file: file.write_bytes(file.read_bytes()[:-9]),
    "cls_token is in the index alone": lambda index, _: only_a_list(index),
    "head.weight is in the index alone": lambda index, file: changed(
        index, lambda listed: listed.update({"head.weight": file.name})
    ),
    "norm.bias is in model-2.safetensors alone": lambda index, _: changed(
        index, lambda listed: listed.pop("norm.bias")
    ),
}


@pytest.mark.parametrize("words", BROKEN_INDEX)
def test_an_index_and_files_that_differ_are_one_line(tmp_path, words):
    state = ViT(**SMALL).state_dict()
    files = [tmp_path / f"model-{part}.safetensors" for part in (1, 2)]
    for part, file in enumerate(files):
        safetensors.save_file(dict([*state.items()][part::2]), file)
    names = {n: file.name for part, file in enumerate(files) for n in [*state][part::2]}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert models.read_weights(tmp_path, 4)[0].keys() == state.keys()
    BROKEN_INDEX[words](index, files[1])
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        models.read_weights(tmp_path, 4)
    assert "\n" not in str(error.value)


@HOW
@torch.no_grad()
def test_hugging_face_s_bare_vit_leaves_its_pooler(transformers, tmp_path, capsys, how):
    # An eps that matters: where it is not kept, the outputs differ.
    theirs = randomize(transformers.ViTModel(transformers.ViTConfig(**TINY, layer_norm_eps=0.1)))
    ours, _ = load(ViT, *hf_file(theirs, tmp_path, how))
    assert "Hugging Face ViT; of no use here: pooler" in capsys.readouterr().out
    if how == "folder":
        close(ours(images(32)), theirs(images(32)).last_hidden_state)


@HOW
@torch.no_grad()
def test_hugging_face_s_vitmae_computes_the_same_here(transformers, tmp_path, capsys, how):
    config = transformers.ViTMAEConfig(**TINY, **TINY_DECODER, norm_pix_loss=True)
    theirs = randomize(transformers.ViTMAEForPreTraining(config))
    path, heads = hf_file(theirs, tmp_path, how)
    if how == "memory":  # how many heads a decoder has cannot be said
        with pytest.raises(ValueError, match="2 decoder_blocks of width 16 have how many heads"):
            models.read_weights(path, heads)
        known = {"model_type": "vit_mae", "decoder_num_attention_heads": 2}
        (tmp_path / "config.json").write_text(json.dumps(known))
    ours, _ = load(MAE, path, heads)
    assert "Hugging Face ViTMAE" in capsys.readouterr().out
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    found = theirs(images(32), noise=noise)
    ids = noise.argsort(dim=1)
    close(ours(images(32), ids).mean(), found.loss)
    hidden = models.take(found.logits, ids[:, ours.num_visible :])
    close(ours.predict(models.patchify(images(32), 8), ids), hidden)
    encoder, _ = load(ViT, path, heads)
    theirs.vit.config.mask_ratio = theirs.vit.embeddings.config.mask_ratio = 0.0
    ordered = torch.arange(16.0).expand(2, -1)
    close(encoder(images(32)), theirs.vit(images(32), noise=ordered).last_hidden_state)


def texts(vocabulary, lengths=(9, 1, 5)):
    """(B, T) random tokens, filled up with the padding's id."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(2, vocabulary, (len(lengths), max(lengths)), generator=generator)
    for row, length in zip(tokens, lengths):
        row[length:] = lit.PADDING
    return tokens


@pytest.mark.parametrize("kind", ["XLMRobertaModel", "XLMRobertaForMaskedLM"])
@HOW
@torch.no_grad()
def test_hugging_face_s_xlm_r_computes_the_same_here(transformers, tmp_path, capsys, kind, how):
    sizes = {name: TINY[name] for name in TINY if not name.endswith(("image_size", "patch_size"))}
    sizes |= {"vocab_size": 50, "max_position_embeddings": 20, "layer_norm_eps": 1e-5}
    theirs = randomize(getattr(transformers, kind)(transformers.XLMRobertaConfig(**sizes)))
    path, heads = hf_file(theirs, tmp_path, how)
    state, arguments = lit.read_text_weights(path, heads)
    said = capsys.readouterr().out
    assert (
        "Hugging Face XLM-R; of no use here: " + ("lm_head" if "Masked" in kind else "pooler")
        in said
    )
    expected = {"size": "32x2x4", "vocabulary": 50, "positions": 20, "norm_eps": 1e-5}
    assert arguments == expected
    ours = TextTower(**arguments)
    ours.load_state_dict(state)
    tokens, encoder = texts(50), getattr(theirs, "roberta", theirs)
    found = encoder(tokens, attention_mask=tokens != lit.PADDING).last_hidden_state
    close(ours(tokens), found[:, 0])
    with pytest.raises(ValueError, match="a text tower alone"):
        models.read_weights(path)


class TorchtextRoberta(nn.Module):
    """torchtext's RobertaModel, as its layout and its behaviour are documented."""

    def __init__(self, vocabulary, width, layers, heads, positions=514):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, activation="gelu", batch_first=True
        )
        encoder = nn.ModuleDict()
        encoder["token_embedding"] = nn.Embedding(vocabulary, width)
        encoder["layers"] = nn.TransformerEncoder(layer, layers)
        encoder["positional_embedding"] = nn.ModuleDict(
            {"embedding": nn.Embedding(positions, width)}
        )
        encoder["embedding_layer_norm"] = nn.LayerNorm(width)
        self.encoder = nn.ModuleDict({"transformer": encoder})

    def forward(self, tokens):
        encoder = self.encoder["transformer"]
        positions = torch.ones_like(tokens)
        for row, text in enumerate(tokens.tolist()):
            length = sum(token != 1 for token in text)
            positions[row, :length] = torch.arange(2, 2 + length)
        x = encoder["token_embedding"](tokens) + encoder["positional_embedding"]["embedding"](
            positions
        )
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
@torch.no_grad()
def test_a_released_pair_computes_the_same_here(timm, tmp_path, capsys, old):
    vision = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 3, "num_heads": 6}
    vision = timm.models.VisionTransformer(num_classes=0, **vision)
    text = TorchtextRoberta(60, 128, 3, 4)
    parts = nn.ModuleDict({"vision_encoder": vision, "text_encoder": text})
    randomize(parts)
    projections = {
        "vision_projection": torch.randn(192, 24),
        "text_projection": torch.randn(128, 24),
    }
    state = {**parts.state_dict(), **projections, "logit_scale": torch.tensor(2.5)}
    if old:
        for new, before in OLD_TORCHTEXT.items():
            state = {
                name.replace(new, before)
                if "text_encoder" in name and "layers." in name
                else name: t
                for name, t in state.items()
            }
    torch.save(state, tmp_path / "pair.pt")
    ours, line = load(TwoTowers, tmp_path / "pair.pt")
    assert "torchtext-named CLIP pair" in capsys.readouterr().out and "dropped" not in line
    assert ours.config["text"] == {
        "size": "toy",
        "vocabulary": 60,
        "positions": 514,
        "norm_eps": 1e-5,
        "context": 100,
    }
    tokens = texts(60)
    found = ours(ours.features(images(32)), tokens)
    expected = (vision(images(32)) @ projections["vision_projection"], text(tokens))
    expected = expected[0], expected[1] @ projections["text_projection"]
    for mine, embedding in zip(found, expected):
        close(mine, nn.functional.normalize(embedding, dim=1))
    close(found[2], torch.tensor([2.5]).exp())
    state, arguments = lit.read_text_weights(tmp_path / "pair.pt")  # of the pair
    tower = TextTower(**arguments)
    tower.load_state_dict(state)
    close(tower(tokens), text(tokens))


# ---------------------------------------------------------------------------------- python model.py


def converted(*arguments, capsys):
    formats.main(["convert", *map(str, arguments), "--format", "own"])
    return capsys.readouterr().out


SMALL = {"size": "32x2x4", "image_size": 32, "patch_size": 8}
NAMED = {"classes": 3, "class_names": ["a", "b", "c"], "head_std": 0.1}
OURS = {
    "ViT": (ViT, {**SMALL, "norm_eps": 1e-3}),
    "wide ViT": (ViT, {**SMALL, "image_size": (16, 24), "channels": 4}),
    "Classifier": (Classifier, {**SMALL, **NAMED}),
    "mean Classifier": (Classifier, {**SMALL, **NAMED, "pool": "mean"}),
    "MAE": (MAE, {**SMALL, "decoder": (16, 2, 2), "mask_ratio": 0.5, "norm_eps": 1e-3}),
    "TwoTowers": (TwoTowers, {**SMALL, "text": {"size": "16x1x2", "vocabulary": 9}}),
}


def written(kind, tmp_path, out, format, capsys):
    """(a model of ours, what convert printed, the families that it dropped) as it goes to `out`."""
    kind, arguments = OURS[kind]
    model = randomize(kind(**arguments))
    models.save_weights(tmp_path / "model.pt", models.full_state(model), model.config)
    formats.main(["convert", str(tmp_path / "model.pt"), str(tmp_path / out), "--format", format])
    said = capsys.readouterr().out
    assert "our own" in said
    dropped = [line.removeprefix("dropped: ") for line in said.splitlines() if "dropped: " in line]
    dropped = set(", ".join(dropped).split(", ")) - {""}
    return model, said.splitlines()[-1], dropped


def lost(path, model, heads=None, unsaid=()):
    """Families that a file lacks of a model. What it has must be the model's, bit for bit."""
    state, config = models.read_weights(path, heads)
    own = model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in state.items())
    assert {k: v for k, v in config.items() if k not in unsaid and v != model.config[k]} == {}
    return {name.split(".")[0] for name in own.keys() - state.keys()}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", OURS)
@torch.no_grad()
def test_to_timm_and_back_is_bit_for_bit(timm, tmp_path, capsys, kind, suffix):
    path, back = tmp_path / f"timm.{suffix}", tmp_path / "back.pt"
    ours, line, dropped = written(kind, tmp_path, path.name, "timm", capsys)
    place = {}
    exec(line, place)  # noqa: S102 (what users are told to type; it loads strictly)
    theirs, pictures = place["model"].eval(), random_images(ours)
    if isinstance(ours, Classifier):
        close(theirs(pictures), ours(pictures))
    else:
        close(theirs.forward_features(pictures), ViT.forward(as_vit(ours), pictures))
    named = {"class_names"} if "Classifier" in kind else set()
    assert dropped >= named and bool(dropped - named) == (kind in ("MAE", "TwoTowers"))
    dropped -= named
    unsaid = ("norm_eps", "class_names", "image_size")  # tensors alone do not tell them
    if kind != "wide ViT":
        assert lost(path, ours, 4, unsaid[:2]) == dropped
        formats.main(["convert", str(path), str(back), "--format", "own", "--heads", "4"])
        assert lost(back, ours, unsaid=unsaid) == dropped


@pytest.mark.parametrize("kind", [kind for kind in OURS if kind != "mean Classifier"])
@torch.no_grad()
def test_to_hugging_face_and_back_is_bit_for_bit(transformers, tmp_path, capsys, kind):
    ours, line, dropped = written(kind, tmp_path, "hf", "hf", capsys)
    assert bool(dropped) == (kind == "TwoTowers")
    load = line.partition("model = ")[2]
    theirs, info = eval(load[:-1] + ", output_loading_info=True)", {"transformers": transformers})
    assert not any(info.values())
    pictures = random_images(ours)
    if kind == "MAE":
        noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
        close(theirs(pictures, noise=noise).loss, ours(pictures, noise.argsort(dim=1)).mean())
    elif kind == "Classifier":
        close(theirs(pictures).logits, ours(pictures))
        assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    else:
        close(theirs(pictures).last_hidden_state, ViT.forward(ours, pictures))
    assert lost(tmp_path / "hf", ours) == dropped
    back = tmp_path / "back.pt"
    formats.main(["convert", str(tmp_path / "hf"), str(back), "--format", "own"])
    assert lost(back, ours) == dropped


def as_vit(model):
    vit = ViT(**models.encoder_config(model.config))
    models.load_weights(vit, model.state_dict())
    return vit


def random_images(model):
    shape = (2, model.config["channels"], *model.config["image_size"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_a_pair_without_a_config_becomes_our_own(tmp_path):
    text = {"size": "toy", "vocabulary": 9, "positions": 514, "norm_eps": 1e-5, "context": 100}
    ours = randomize(TwoTowers(**SMALL, text=text))
    torch.save(ours.state_dict(), tmp_path / "bare.pt")
    formats.convert(tmp_path / "bare.pt", tmp_path / "pair.pt", "own", heads=4)
    assert lost(tmp_path / "pair.pt", ours) == set()


def test_a_pair_s_picture_tower_and_a_trunk_s_pair(tmp_path):
    pair, trunk = (randomize(OURS[kind][0](**OURS[kind][1])) for kind in ("TwoTowers", "ViT"))
    for name, model in (("pair.pt", pair), ("trunk.pt", trunk)):
        models.save_weights(tmp_path / name, models.full_state(model), model.config)
    projections = {"image_projection", "logit_scale", "text", "text_projection"}
    for kind in (ViT, MAE, Classifier):
        model, line = load(kind, tmp_path / "pair.pt")
        assert f"dropped: {', '.join(sorted(projections))}" in line
        assert all(torch.equal(model.state_dict()[n], pair.state_dict()[n]) for n in VIT_NAMES)
    initial = TwoTowers(**OURS["TwoTowers"][1])
    model, line = load(TwoTowers, tmp_path / "trunk.pt", text=OURS["TwoTowers"][1]["text"])
    assert f"newly initialised: {', '.join(sorted(projections))}" in line
    for name, tensor in model.state_dict().items():
        source = trunk if name in VIT_NAMES else initial
        assert torch.equal(tensor, source.state_dict()[name])


VIT_NAMES = [*ViT(**SMALL).state_dict()]
STRANGE = {
    "registers": {"reg_tokens": 4},
    "layer scale": {"init_values": 1e-5},
    "normalised queries": {"qk_norm": True},
    "a norm before": {"pre_norm": True},
}


@pytest.mark.parametrize("case", STRANGE)
def test_other_vits_are_refused_by_the_names_that_nothing_explains(timm, tmp_path, case):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    model = timm.models.VisionTransformer(num_classes=0, **sizes, **STRANGE[case])
    torch.save(model.state_dict(), tmp_path / "vit.pt")
    words = {"registers": "reg_token", "layer scale": "ls1.gamma", "normalised queries": "k_norm"}
    with pytest.raises(ValueError, match=words.get(case, "norm_pre")) as error:
        models.read_weights(tmp_path / "vit.pt", 4)
    assert "\n" not in str(error.value)


def test_swiglu_is_refused(timm, tmp_path):
    from timm.layers import SwiGLUPacked

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    model = timm.models.VisionTransformer(num_classes=0, mlp_layer=SwiGLUPacked, **sizes)
    torch.save(model.state_dict(), tmp_path / "vit.pt")
    with pytest.raises(ValueError, match="mlp.fc2.weight is|have how many"):
        load(ViT, tmp_path / "vit.pt", 4)


def refused(capsys, *arguments):
    """The line, and the only one, with which convert gives up."""
    with pytest.raises(SystemExit) as error:
        formats.main(["convert", *map(str, arguments)])
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("model.py: ") and said.count("\n") == 1
    return said


@pytest.fixture
def small(tmp_path):
    """A file with the tensors of a ViT by our names, without a config."""
    safetensors.save_file(ViT(**SMALL).state_dict(), tmp_path / "vit.safetensors")
    return tmp_path / "vit.safetensors"


def test_a_stage_inherits_norm_eps_and_heads(small, tmp_path):
    names = ("size", "norm_eps")
    assert models.inherit(small, {}, names, 4)[1] == {"size": "32x2x4", "norm_eps": 1e-6}
    model = ViT(**SMALL, norm_eps=0.1)
    models.save_weights(tmp_path / "model.pt", model.state_dict(), model.config)
    assert models.inherit(tmp_path / "model.pt", {}, names)[1]["norm_eps"] == 0.1
    del model.config["norm_eps"]  # as it was before there was one
    models.save_weights(tmp_path / "model.pt", model.state_dict(), model.config)
    assert load(ViT, tmp_path / "model.pt")[0].config["norm_eps"] == 1e-6
    with pytest.raises(ValueError, match="--heads is for"):
        models.inherit(None, {}, names, 4)


def test_names_that_differ_by_a_prefix_alone_are_refused(tmp_path):
    state = ViT(**SMALL).state_dict()
    torch.save(state | {"module.cls_token": state["cls_token"]}, tmp_path / "vit.pt")
    with pytest.raises(ValueError, match="same name but for a prefix"):
        models.read_weights(tmp_path / "vit.pt", 4)


def test_heads_that_no_shape_tells_must_be_given(small, capsys):
    out = small.with_name("own.pt")
    assert "Give --heads" in refused(capsys, small, out, "--format", "own")
    assert "multiple of 4 x heads" in refused(capsys, small, out, "--format", "own", "--heads", "5")
    formats.main(["convert", str(small), str(out), "--format", "own", "--heads", "2"])
    assert models.read_weights(out)[1]["size"] == "32x2x2"
    with pytest.raises(ValueError, match="has 2 heads"):
        models.read_weights(out, 4)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_of_safetensors_is_one_line(small, capsys, share):
    content = small.read_bytes()
    small.write_bytes(content[: int(share * len(content))])
    said = refused(capsys, small, small.with_name("own.pt"), "--format", "own", "--heads", 4)
    assert "cannot read weights" in said and not small.with_name("own.pt").exists()


def test_without_the_safetensors_package_the_pip_line_is_said(small, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    own = small.with_name("own.pt")
    models.save_weights(own, (model := ViT(**SMALL)).state_dict(), model.config)
    for source, out, format in (
        (small, "o.pt", "own"),
        (own, "hf", "hf"),
        (own, "o.safetensors", "timm"),
    ):
        said = refused(capsys, source, small.with_name(out), "--format", format, "--heads", 4)
        assert "pip install safetensors" in said and not small.with_name(out).exists()


def test_what_a_format_cannot_say_is_refused(small, tmp_path, capsys):
    classifier = Classifier(**SMALL, **NAMED, pool="mean")
    models.save_weights(tmp_path / "mean.pt", classifier.state_dict(), classifier.config)
    said = refused(capsys, tmp_path / "mean.pt", tmp_path / "hf", "--format", "hf")
    assert "reads the class token" in said
    wide = MAE(**{**SMALL, "image_size": (16, 32)}, decoder=(16, 1, 2))
    models.save_weights(tmp_path / "wide.pt", wide.state_dict(), wide.config)
    assert "square" in refused(capsys, tmp_path / "wide.pt", tmp_path / "hf", "--format", "hf")
    heads = "--heads", 4
    assert "must end" in refused(capsys, small, tmp_path / "vit.bin", "--format", "timm", *heads)
    assert "must end" in refused(capsys, small, tmp_path / "own", "--format", "own", *heads)
    assert "exists" in refused(capsys, small, small, "--format", "timm", *heads)
    assert "exists" in refused(capsys, small, tmp_path, "--format", "hf", *heads)
    assert "exists" in refused(capsys, small, tmp_path / "no" / "x.pt", "--format", "timm", *heads)
    state = ViT(**SMALL).state_dict()
    del state["blocks.1.mlp.fc2.bias"]
    torch.save(state, tmp_path / "part.pt")
    said = refused(capsys, tmp_path / "part.pt", tmp_path / "o.pt", "--format", "timm", *heads)
    assert "blocks.1.mlp.fc2.bias is missing" in said
    assert "invalid choice" in refused(capsys, small, tmp_path / "o.pt", "--format", "onnx")
    assert {path.name for path in tmp_path.iterdir()} == {
        "mean.pt",
        "wide.pt",
        "part.pt",
        small.name,
    }


LOOKED_AT = ("patch_embed.proj.weight", "pos_embed", "mask_token", "blocks.0.norm1.weight")


@pytest.mark.parametrize("name", [*LOOKED_AT, "head.weight"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 2)])
def test_a_tensor_of_any_other_shape_is_one_line(tmp_path, name, shape):
    model = MAE(**SMALL, decoder=(16, 1, 2))
    torch.save(model.state_dict() | {name: torch.zeros(shape)}, tmp_path / "vit.pt")
    with pytest.raises(ValueError) as error:
        formats.convert(tmp_path / "vit.pt", tmp_path / "own.pt", "own", 4)
    assert "\n" not in str(error.value)


def odd(**changes):
    """A file's content: a pair's tensors and config, with some of the former changed or left out."""
    model = TwoTowers(**SMALL, text={"size": "16x1x2", "vocabulary": 20}, shared_width=8)
    state = {n: t for n, t in (model.state_dict() | changes).items() if t is not None}
    return {"model": state, "config": model.config}


ODD = {
    "norm.weight is sparse": odd(**{"norm.weight": torch.ones(32).to_sparse()}),
    "norm.bias is sparse, or a shape": odd(**{"norm.bias": torch.ones(32, device="meta")}),
    "head.weight is one number": odd(**{"head.weight": torch.ones(())}),
    "pos_embed is (5,)": odd(pos_embed=torch.ones(5)),
    "no ViT": {1: torch.ones(2), "pos_embed": torch.ones(2)},
    "no (D, C, P, P)": {"patch_embed.proj.weight": torch.ones(8, 3, 0, 0)},
    "lacks text.blocks.0.norm1.weight": odd(**{"text.blocks.0.norm1.weight": None}),
    "not a mapping": odd() | {"config": {**odd()["config"], "text": "abc"}},
    "wanted (32, 768)": odd() | {"config": {**odd()["config"], "shared_width": 768}},
}


@pytest.mark.parametrize("words", ODD)
def test_odd_tensors_and_configs_are_one_line_and_half_a_pair_is_none(tmp_path, words):
    torch.save(ODD[words], tmp_path / "odd.pt")
    for use in (
        lambda: formats.convert(tmp_path / "odd.pt", tmp_path / "own.pt", "own", 4),
        lambda: evaluate.load_model(tmp_path / "odd.pt", "zeroshot", "cpu"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            use()
        assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["odd.pt"]


@pytest.mark.parametrize(
    ("out", "format"), [("o.pt", "own"), ("o.pt", "timm"), ("o.safetensors", "timm"), ("o", "hf")]
)
def test_where_the_disk_is_full_nothing_is_left(tmp_path, out, format):
    model = ViT(**{**SMALL, "size": "64x2x4"})
    models.save_weights(tmp_path / "in.pt", model.state_dict(), model.config)
    (tmp_path / f"{out}.tmp").mkdir()  # of somebody else
    arguments = "convert", tmp_path / "in.pt", tmp_path / out, "--format", format
    failed = stage(*arguments, program="model.py", file_size=100_000)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1, failed.stderr
    assert "cannot write" in failed.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"in.pt", f"{out}.tmp"}


CONFIGS = {
    "no JSON": "{",
    "is of none of": '{"model_type": "bert"}',
    "not gelu": '{"model_type": "vit", "hidden_act": "quick_gelu"}',
    "id2label has 1 of 3": '{"model_type": "vit", "num_attention_heads": 4, "id2label": {"0": ""}}',
    "float": '{"model_type": "vit", "num_attention_heads": 4, "layer_norm_eps": "small"}',
    "not of the weights": '{"model_type": "vit", "hidden_size": 64}',
}


@pytest.mark.parametrize("words", CONFIGS)
def test_a_config_that_is_not_of_the_weights_beside_it_is_refused(tmp_path, words):
    model = Classifier(**SMALL, **NAMED)
    models.save_weights(tmp_path / "model.pt", model.state_dict(), model.config)
    formats.convert(tmp_path / "model.pt", tmp_path / "hf", "hf")
    (tmp_path / "hf" / "config.json").write_text(CONFIGS[words])
    with pytest.raises(ValueError, match=words):
        models.read_weights(tmp_path / "hf")


@pytest.mark.parametrize("size", lit.PAIRS)
def test_released_pairs_are_told_by_their_shapes(size):
    text, shared = lit.PAIRS[size]
    with torch.device("meta"):
        pair = TwoTowers(size, text={"size": text, "vocabulary": 250_002}, shared_width=shared)
    config = formats.infer_config(pair.state_dict())
    assert config["text"].items() >= pair.config["text"].items()
    assert {**config, "text": pair.config["text"]} == pair.config
