"""Stage 3 as a program: classify and linear, runs of lit and detect, what is refused."""

import copy
import functools
import json
import math
import shlex
import shutil
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT,
    check_that_the_limit_is_the_runs,
    encoded,
    large_pictures,
    last_json,
    main_json,
    picture,
    read_metrics,
    rewound,
    same_weights,
    stage,
    write_tar,
)
from PIL import Image

import evaluate
import finetune
import model as models
from tasks import detect, lit

TINY = [
    *("--size", "16x2x2", "--image-size", "16", "--patch-size", "4", "--batch-size", "8"),
    *("--workers", "1", "--log-every", "1"),
]
CLASSIFY = [
    *("--task", "classify", *TINY, "--steps", "6", "--save-every", "2", "--lr", "1e-2"),
    *("--layer-decay", "0.9", "--drop-path", "0.3", "--erase", "0.9"),
]


# --------------------------------------------------------------------------------- heads and groups


def classifier(**changes):
    arguments = {"size": "16x3x2", "image_size": 8, "patch_size": 4, "classes": 5, **changes}
    model = models.Classifier(**arguments)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # not the flat beginning
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_layer_decay_by_hand():
    model, found = classifier(positions="learned", pool="mean"), {}
    for group in finetune.layer_groups(model, 0.05, 0.5):
        for parameter in group["params"]:
            found[parameter] = group["lr_scale"], group["weight_decay"]
    found = {name: found[parameter] for name, parameter in model.named_parameters()}
    assert len(found) == len(list(model.parameters()))
    for expected, names in {
        (0.0625, 0): ("cls_token", "pos_embed", "patch_embed.proj.bias"),
        (0.0625, 0.05): ("patch_embed.proj.weight",),
        (0.125, 0.05): ("blocks.0.attn.qkv.weight",),
        (0.5, 0.05): ("blocks.2.mlp.fc2.weight",),
        (0.5, 0): ("blocks.2.norm1.weight",),
        (1, 0): ("fc_norm.weight", "head.bias"),
        (1, 0.05): ("head.weight",),
    }.items():
        assert {found[name] for name in names} == {expected}


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_probe_becomes_the_head_of_a_classifier(batch_norm, pool):
    trunk = classifier(pool=pool)
    model = finetune.Probes(trunk, 3, batch_norm, seed=0)
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.heads[0].weight, model.heads[2].weight)  # at first
    with torch.no_grad():
        for number, head in enumerate(model.heads):
            head.weight.mul_(number + 1)
            head.bias.add_(number)
        for _ in range(100):
            model(images)
        if batch_norm:  # of the one batch there is; the running variance is unbiased
            variance = trunk.features(images).var(dim=0)
            torch.testing.assert_close(model.variance, variance, rtol=1e-3, atol=1e-6)
        logits = model.eval()(images)
        same = classifier(pool=pool)
        same.load_state_dict(model.classifier_state(model.state_dict(), 1))
        torch.testing.assert_close(same(images), logits[:, 1], rtol=1e-4, atol=1e-5)


def test_batch_statistics_of_features_that_hardly_vary_are_exact():
    """A mean of 40 and a deviation of 0.01: the mean of squares minus the square of the
    mean, in float32, would be noise, or negative."""
    model = finetune.Probes(trunk := classifier(), 1, True, seed=0)
    draw = torch.Generator().manual_seed(0)
    x = 40 + 0.01 * torch.randn(256, trunk.width, generator=draw, dtype=torch.float64)
    trunk.features = lambda images: x.float()
    found = model(torch.zeros(256, 3, 8, 8))[:, 0]
    scaled = (x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-6).sqrt()
    expected = scaled @ model.heads[0].weight.double().T
    # features near 40 are rounded to 2e-6, a five-thousandth of a deviation
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)


def test_heads_side_by_side_move_as_each_would_alone_at_its_lr():
    trunk, rates = classifier(), (0.3, 2.0)
    model = finetune.Probes(trunk, 2, False, seed=0)
    groups = [{"params": [*head.parameters()], "lr": r} for head, r in zip(model.heads, rates)]
    heads, sgd = copy.deepcopy(model.heads), partial(torch.optim.SGD, momentum=0.9, nesterov=True)
    optimizers = [sgd(groups), *(sgd(h.parameters(), lr=r) for h, r in zip(heads, rates))]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        images = torch.randn(6, 3, 8, 8, generator=generator)
        labels = torch.randint(5, (6,), generator=generator)
        logits = model(images)
        sum(F.cross_entropy(logits[:, i], labels) for i in range(2)).backward()
        for i, head in enumerate(heads):
            expected = head(trunk.features(images))
            torch.testing.assert_close(logits[:, i], expected, rtol=1e-4, atol=1e-5)
            F.cross_entropy(expected, labels).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    state = model.classifier_state(model.state_dict(), 1)
    torch.testing.assert_close(state["head.weight"], heads[1].weight, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------- as a program


def fine(*arguments, **options):
    return stage(*arguments, program="finetune.py", **options)


def prepared(*arguments):
    run = finetune.parse_arguments(list(map(str, arguments)))
    finetune.prepare(run)
    return run


def config_of(out):
    return torch.load(out / "model.pt", weights_only=True)["config"]


def weights_of(folder, size, classes=0, class_names=None):
    """A file of weights of the size, with a head if there are classes."""
    kind = partial(models.Classifier, classes=classes, head_std=1.0) if classes else models.ViT
    model = kind(size, image_size=16, patch_size=4)
    config = model.config | ({"class_names": class_names} if classes else {})
    models.save_weights(folder / "vit.pt", model.state_dict(), config)
    return folder / "vit.pt"


def shards(folder, labels):
    """A shard of pictures with these labels."""
    folder.mkdir()
    members = []
    for i, label in enumerate(labels):
        members += [(f"{i:03}.png", encoded(picture(i))), (f"{i:03}.cls", str(label).encode())]
    return write_tar(folder / "0.tar", members)


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220)}
COLOURS["white"] = (250, 250, 250)


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """A shard of 80 pictures of one colour each, with captions that name it."""
    members = []
    for i in range(80):
        name = list(COLOURS)[i * 7 % 4]
        shade = tuple(c - i % 20 for c in COLOURS[name])
        text = f"a #{name} wall, {'old' if i % 2 else 'new'}"
        key, text = ("json", json.dumps({"caption": text})) if i % 3 else ("txt", text)
        members.append((f"{i:03}.png", encoded(Image.new("RGB", (20, 24), shade))))
        members.append((f"{i:03}.{key}", text.encode()))
    return Path(write_tar(tmp_path_factory.mktemp("captions") / "0.tar", members))


def write_annotations(folder, split, height, width, boxes):
    """COCO's file of pictures with one box each: {name: (category, left, top, side)}."""
    images, annotations = [], []
    for i, (name, (category, x, y, side)) in enumerate(boxes.items()):
        images.append({"id": 7 * i, "file_name": name, "height": height, "width": width})
        corners = [x, y, x + side, y, x + side, y + side, x, y + side]
        box = {"bbox": [x, y, side, side], "area": side**2, "segmentation": [corners]}
        box |= {"id": i + 1, "image_id": 7 * i, "category_id": category, "iscrowd": 0}
        annotations.append(box)
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 5, "name": "red"}, {"id": 3, "name": "blue"}]
    (folder / "annotations").mkdir(exist_ok=True)
    path = folder / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder of COCO's layout: a square in each picture, of two categories by colour."""
    folder = tmp_path_factory.mktemp("scenes")
    for split, count in (("train", 12), ("val", 6)):
        (folder / split).mkdir()
        boxes = {}
        for i in range(count):
            x, y, red = i % 4 * 4 + 2, i % 3 * 5 + 1, i % 2
            boxes[f"{i}.png"] = 5 if red else 3, x, y, 14
            image = Image.new("RGB", (40, 32), (200, 200, 200))
            image.paste((250, 0, 0) if red else (0, 0, 250), (x, y, x + 14, y + 14))
            image.save(folder / split / f"{i}.png")
        write_annotations(folder, split, 32, 40, boxes)
    return folder


LIT = ["--task", "lit", *TINY[6:], "--text-size", "16x1x2", "--shared-width", 8, "--steps", 6]
LIT += ["--save-every", 3, "--lanes", 2]
DETECT = ["--task", "detect", "--size", "toy", "--image-size", 32, "--batch-size", 4]
DETECT += ["--steps", 4, "--save-every", 2, "--log-every", 1, "--workers", 0, "--min-jitter", 0.9]


@pytest.fixture(scope="module")
def commands(animals, captions, scenes):
    """{task: flags of its smallest run}"""
    init = ["--init", weights_of(captions.parent, "16x2x2")]
    classify, detect = [*CLASSIFY, "--data", animals], [*DETECT, "--data", scenes]
    return {"classify": classify, "lit": [*LIT, *init, "--data", captions], "detect": detect}


@pytest.fixture(scope="module")
def plain(commands, tmp_path_factory):
    """Function of a task: (folder of its run, what is printed at the end)."""

    @functools.cache
    def run(task):
        out = tmp_path_factory.mktemp(task) / "run"
        return out, fine(*commands[task], "--out", out)

    return run


# Beside one process in pieces, two replicas, and two shards of one model.
PIECES, SHARDED = ["--micro-batch", "2"], ["--shard-group", "2"]
WAYS = [(task, *way) for task in ("classify", "lit", "detect")
        for way in ((None, PIECES), (2, []), (2, SHARDED))]  # fmt: skip
WAYS += [("lit", 2, PIECES), ("lit", 2, [*PIECES, *SHARDED])]


@pytest.mark.parametrize(("task", "processes", "extra"), WAYS)
def test_a_run_is_the_same_on_any_number_of_processes(
    task, processes, extra, commands, plain, tmp_path
):
    last_json(fine(*commands[task], *extra, "--out", tmp_path, processes=processes))
    for ours, theirs in zip(read_metrics(tmp_path), read_metrics(plain(task)[0]), strict=True):
        names = ("loss", "lr", "grad_norm") if task == "detect" else theirs
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


@pytest.mark.parametrize(("task", "step"), [("classify", 4), ("lit", 3), ("detect", 2)])
def test_a_resumed_run_is_the_same_run(task, step, commands, plain, tmp_path):
    rewound(plain(task)[0], tmp_path / "run", step)
    assert "going on from" in fine(*commands[task], "--out", tmp_path / "run").stdout
    assert read_metrics(tmp_path / "run") == read_metrics(plain(task)[0])
    assert same_weights(tmp_path / "run", plain(task)[0])


@pytest.mark.parametrize(
    "task, drawn", [("classify", ("--confusion", "--mistakes")), ("detect", ("--out",))]
)
def test_the_printed_command_measures_the_same(task, drawn, plain, capsys, tmp_path):
    ran = plain(task)[1]
    line = ran.stdout.split("next: python evaluate.py")[1].splitlines()[0]
    found = last_json(ran)
    flags = [word for flag in drawn for word in (flag, tmp_path / f"{flag}.png")]
    measured = main_json(capsys, evaluate, *shlex.split(line), *flags, "--workers", 0)
    for name in found.keys() - {"task"}:
        assert measured[name] == pytest.approx(found[name], rel=1e-6)
    assert any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_the_printed_command_holds_out_the_same_share(kind, animals, tmp_path, capsys):
    where = animals / "train"
    if kind == "shards":
        where = shards(tmp_path / "tars", [i * 7 % 3 for i in range(60)])
    flags = [*CLASSIFY, "--data", where, "--val-share", 0.25, "--out", tmp_path / "run"]
    flags += ["--classes", 3]
    ran = fine(*flags)
    found = last_json(ran)
    assert "on 15 pictures" in ran.stdout  # a quarter of 60
    line = ran.stdout.split("next: python evaluate.py")[1].splitlines()[0]
    assert "--val-share 0.25" in line
    measured = main_json(capsys, evaluate, *shlex.split(line), "--workers", 0)
    assert measured["pictures"] == 15
    for name in ("top1", "top5"):
        assert measured[name] == pytest.approx(found[name], rel=1e-6)
    run = prepared(*flags)
    train, val = (
        {source.name(i) for i in range(source.sizes.sum())} for source in (run.train, run.val)
    )
    assert train.isdisjoint(val) and len(train | val) == 60
    assert run.identity["data"] != run.identity["val"]


def test_the_command_has_the_flags_that_were_given(tmp_path, capsys):
    run = prepared("--task", "detect", "--size", "toy", "--out", tmp_path, "--max-pixels", 99_999)
    run.labels, run.val_crop = "a b", 0.5
    finetune.finish(run, {}, {}, {}, "zeroshot", {"tokenizer": "t", "span": None})
    run.cache_dir = "c"
    finetune.finish(run, {}, {}, {}, "zeroshot", {"tokenizer": "t", "span": None})
    usual = " --data toy --val-crop 0.5 --tokenizer t --labels 'a b'"
    printed = capsys.readouterr().out
    assert f"{usual} --max-pixels 99999\n" in printed
    assert f"{usual} --cache-dir c --max-pixels 99999\n" in printed


# ------------------------------------------------------------------------------------------ classify


def test_strays_are_not_drawn(animals, tmp_path):
    """Drawn without a label, they would end a run that sees them often: see --max-bad."""
    shutil.copytree(animals, tmp_path / "animals")
    for split, count in (("train", 6), ("val", 1)):
        for i in range(count):
            picture(i).save(tmp_path / "animals" / split / f"stray-{i}.png")
    flags = [*CLASSIFY, "--steps", 24, "--data", tmp_path / "animals", "--out", tmp_path / "run"]
    ran = fine(*flags)
    assert last_json(ran)["task"] == "classify" and "on 12 pictures" in ran.stdout
    assert {line["unlabelled"] for line in read_metrics(tmp_path / "run")} == {0}
    assert "animals/train: pictures beside the folders of classes" in ran.stderr


def test_classify_leaves_a_classifier_and_measures_with_each_save(plain):
    out, ran = plain("classify")
    config = config_of(out)
    assert config["class_names"] == ["cats", "dogs", "owls"] and config["pool"] == "mean"
    measured = {line["step"]: line["top1"] for line in read_metrics(out) if "top1" in line}
    assert [*measured] == [2, 4, 6] and measured[6] == last_json(ran)["top1"]


@pytest.mark.parametrize(
    "task, words",
    [
        ("classify", "top-1 {top1:.1%}  top-5 {top5:.1%}"),
        ("lit", "text recall@1 {text_recall_at_1:.1%}  picture recall@1 {image_recall_at_1:.1%}"),
        ("detect", "box AP {bbox_AP:.1%}  box AP50 {bbox_AP50:.1%}  mask AP50 {segm_AP50:.1%}"),
    ],
)
def test_the_step_line_shows_what_a_task_measures(task, words, plain):
    out, ran = plain(task)
    assert f"  {words.format(**read_metrics(out)[-1])}\n" in ran.stdout


@pytest.mark.parametrize(
    "size, lr, epochs, layer_decay, drop_path",
    [("B", 2e-3, 100, 0.65, 0.1), ("L", 4e-3, 50, 0.75, 0.2), ("H", 4e-3, 50, 0.75, 0.3)],
)
def test_the_recipe_is_the_public_codes(size, lr, epochs, layer_decay, drop_path):
    run = prepared("--task", "classify", "--size", size)
    expected = {"lr": lr, "epochs": epochs, "layer_decay": layer_decay, "drop_path": drop_path}
    expected |= {"warmup": 5 / epochs, "batch_size": 1024, "weight_decay": 0.05}
    expected |= {"mixup": 0.8, "cutmix": 1.0, "rand_augment": 9, "erase": 0.25}
    expected |= {"smoothing": 0.1, "pool": "mean", "min_crop": 0.08, "val_crop": 224 / 256}
    assert {name: getattr(run, name) for name in expected} == pytest.approx(expected)
    toy = prepared("--task", "classify", "--erase", "0.5")  # augments as asked for alone
    expected = {"mixup": 0, "cutmix": 0, "rand_augment": 0, "erase": 0.5, "min_crop": 1}
    assert {name: getattr(toy, name) for name in expected} == expected


def test_the_lr_ends_at_the_floor_before_layers_scale_it(animals, tmp_path, monkeypatch):
    """MAE's recipe: lr_scale * (1e-6 + (peak - 1e-6) * half a cosine), for each group."""
    found, step = [], torch.optim.AdamW.step

    def spy(self):
        found.append({group["lr_scale"]: group["lr"] for group in self.param_groups})
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    asked = [*CLASSIFY, "--workers", "0", "--warmup", "0.34", "--data", str(animals)]
    finetune.main([*asked, "--out", str(tmp_path / "run")])
    warmup, rates = 0.34 * 6, []
    for done in range(6):
        turn = math.pi * (done - warmup) / (6 - warmup)
        after = 1e-6 + (1e-2 - 1e-6) * (1 + math.cos(turn)) / 2
        rates.append(1e-2 * (done + 1) / (warmup + 1) if done < warmup else after)
    scales = 0.9**3, 0.9**2, 0.9, 1.0
    for groups, rate in zip(found, rates, strict=True):
        assert sorted(groups) == pytest.approx(scales)
        assert sorted(groups.values()) == pytest.approx([rate * scale for scale in scales])


@pytest.mark.parametrize(
    "names, identity",
    [
        (["1", "2", "10"], "by number"),  # no older run, which sorted texts, goes on
        (["1", "2", "3"], None),
        (["1", "18-25", "2"], None),
    ],
)
def test_numbered_classes_have_the_order_of_their_numbers(names, identity, animals, tmp_path):
    for split in ("train", "val"):
        for ours, name in zip(("cats", "dogs", "owls"), names):
            shutil.copytree(animals / split / ours, tmp_path / split / name)
    run = prepared("--task", "classify", *TINY, "--data", tmp_path)
    assert run.train.classes == names and run.identity.get("class_order") == identity


@pytest.mark.parametrize(
    "count, class_names, folders, rows",
    [
        (1000, None, ["n02123045", "n01440764", "n15075141"], [0, 281, 999]),
        (5, ["owls", "x", "cats", "x", "dogs"], ["cats", "dogs", "owls"], [2, 4, 0]),
        (3, None, ["cats", "dogs", "owls"], [0, 1, 2]),
    ],
)
def test_a_kept_head_finds_the_classes_of_the_data(
    count, class_names, folders, rows, animals, tmp_path, capsys
):
    """Of a released head, of one in another order, of one without names."""
    for split in ("train", "val"):
        for ours, name in zip(("cats", "dogs", "owls"), folders):
            shutil.copytree(animals / split / ours, tmp_path / "data" / split / name)
    init = weights_of(tmp_path, "16x2x2", count, class_names=class_names)
    asked = ["--task", "classify", *TINY, "--workers", "0", "--lr", "1e-30", "--steps", "1"]
    asked += ["--keep-head", "--data", tmp_path / "data", "--init", init]
    main_json(capsys, finetune, *asked, "--out", tmp_path / "run")
    state, config = models.read_weights(tmp_path / "run" / "model.pt")
    before, _ = models.read_weights(init)
    assert config["class_names"] == sorted(folders)
    assert config["pool"] == "cls" and "fc_norm.weight" not in state  # as it was trained
    for name in ("head.weight", "head.bias"):
        torch.testing.assert_close(state[name], before[name][rows])


def test_a_plan_is_made_from_shapes_alone(animals, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Module, "to_empty", None)  # would fail
    asked = ["--task", "classify", "--size", "6.5B", "--data", str(animals), "--gpus", "8"]
    finetune.main([*asked, "--batch-size", "96", "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert "6,4" in printed and "GPU-days" in printed and not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------- linear


def test_linear_learns_resumes_and_chooses_on_train(animals, tmp_path):
    asked = ["--task", "linear", *TINY, "--steps", "30", "--save-every", "20", "--data", animals]
    asked += ["--batch-norm", "--min-crop", "1"]
    ran = fine(*asked, "--out", tmp_path / "run")
    found = last_json(ran)
    assert found["top1"] > 0.6 and "chosen on train" in ran.stdout
    assert ran.stdout.count("%") >= 2 * len(finetune.LINEAR_RATES)  # all are shown
    rewound(tmp_path / "run", tmp_path / "again", 20)
    assert last_json(fine(*asked, "--out", tmp_path / "again")) == found
    assert same_weights(tmp_path / "run", tmp_path / "again")
    for name, extra in (("two", []), ("sharded", SHARDED)):
        assert last_json(fine(*asked, *extra, "--out", tmp_path / name, processes=2)) == found


# ---------------------------------------------------------------------------------------- bad input


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        finetune.main(list(map(str, arguments)))
    assert stopped.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("finetune.py: ")
    return line


@pytest.fixture(scope="module")
def places(animals, captions, scenes, plain, tmp_path_factory):
    """{name: a file or folder} for the flags below."""
    root = tmp_path_factory.mktemp("places")
    folders = "one few/train/cats few/train/dogs few/val/cats few/val/dogs other/fish photos"
    folders += " stray/train/cats stray/train/dogs stray/val/cats stray/val/dogs"
    for folder in folders.split():
        (root / folder).mkdir(parents=True)
        picture(0).save(root / folder / "a.png")
    picture(0).save(root / "stray" / "val" / "stray.png")  # so its folders are no classes
    (root / "spm.model").write_text("none")
    names = ("few", "other", "photos", "stray", "spm.model")
    found = {"root": root, **{name: root / name for name in names}}
    for name, *model in (
        ("unnamed", "16x2x2", 3),
        ("four", "16x2x2", 4),
        ("twice", "16x2x2", 4, ["cats", "dogs", "owls", "owls"]),
        ("emus", "16x2x2", 3, ["cats", "dogs", "emus"]),
        ("vit", "16x2x2"),
        ("wide", "32x1x2"),
    ):
        found[name] = weights_of(root / "one", *model).rename(root / f"{name}.pt")
    found["numbered"] = shards(root / "numbers", [0, 1, 2] * 3)
    found["unlabelled"] = shards(root / "none", ["", "", ""])
    words = [(f"{i}.{kind}", b" # ") for i in range(30) for kind in ("png", "txt")]
    found["blank"] = write_tar(root / "blank.tar", words)
    found |= {"animals": animals, "captions": captions, "scenes": scenes, "empty": ""}
    return found | {"pair": plain("lit")[0] / "model.pt"}


KEEP = "--data {animals} --keep-head --init"
TEXTS = "--data {captions} --init {vit} --text-size 16x1x2"
AGAIN = "--data {captions} --init {pair} --text-size 16x1x2"
REFUSED = [
    ("classify", "--data {empty}", "--data is empty"),
    ("classify", "--data {photos}", "names no classes"),
    ("classify", "--data {animals}/train", "no train/ and val/"),
    ("classify", "--data {photos} --val-data {photos} --classes 1", "one class only"),
    ("classify", "--data {few}/train --val-data {other}", "has other classes than train ("),
    ("classify", "--data {animals} --init {wide}", "cannot be changed"),
    ("classify", "--drop-path 1", "out of range"),
    ("classify", "--data {animals} --batch-size 7", "even number"),
    ("classify", "--data {animals} --micro-batch 1", "even number"),
    ("classify", "--data {animals} --micro-batch 6", "--micro-batch 6 does not divide"),
    ("classify", "--data {animals} --classes 5", "names 3"),
    ("classify", "--data {stray}", "the other does not"),
    ("classify", "--data {numbered} --classes 3 --val-data {few}/val", "the other does not"),
    ("classify", "--data {numbered} --classes 3 --val-data {unlabelled}", "no labels in"),
    ("classify", "--data {few} --val-data {numbered} --val-labels no.csv", "want a folder"),
    ("classify", f"{KEEP} {{vit}}", "no head in --init"),
    ("classify", f"{KEEP} {{unnamed}} --pool mean", "reads --pool cls"),
    ("classify", f"{KEEP} {{four}}", "(0 of its 4 classes are called cats, and one is needed)"),
    ("classify", f"{KEEP} {{twice}}", "(2 of its 4 classes are called owls, and one is needed)"),
    ("classify", f"{KEEP} {{emus}}", "(0 of its 3 classes are called owls, and one is needed)"),
    ("classify", "--batch-norm", "--batch-norm is for --task linear"),
    ("classify", "--context=20", "--context is for --task lit"),
    ("classify", "--relative-positions", "--relative-positions is for --task video"),
    ("classify", "--bogus", "unrecognized arguments: --bogus"),
    ("linear", "--data {animals} --batch-norm --micro-batch 4", "all of it"),
    ("linear", "--data {few}", "too small"),
    *[("linear", f, f"{f.split()[0]} is for --task classify")
      for f in ("--plan", "--lr 1", "--mixup 0", "--keep-head")],
    ("linear", "--shots 3", "--shots is for --task lowshot"),
    ("lowshot", "--shots 1,all", "there is --task linear"),
    ("lowshot", "--shots 1,x", "no list of numbers"),
    *[("lowshot", f, f"{f.split()[0]} is for --task classify, linear")
      for f in ("--save-every 2", "--resume {root}")],
    ("lit", "--data {captions}", "wants --init"),
    ("lit", "--data {animals} --init {vit}", "no captions in"),
    ("lit", "--data {blank} --init {vit}", "no captions in"),
    ("lit", f"{TEXTS} --batch-size 74", "has 72 pairs"),
    ("lit", f"{TEXTS} --context 600", "--context 600 is over 510"),
    ("lit", f"{TEXTS} --text-size 7x1x2", "size '7x1x2'"),
    ("lit", f"{TEXTS} --tokenizer {{spm.model}}", "no tokenizer|pip install sentencepiece"),
    ("lit", f"{AGAIN} --text-size toy", "are of size 16x1x2"),
    ("lit", f"{AGAIN} --shared-width 16", "--shared-width"),
    ("lit", f"{AGAIN} --text-init {{pair}}", "leave --text-init out"),
    ("video", "--frames 5", "5 frames: want an even number"),
    ("video", "--data nowhere", "nowhere does not exist"),
    ("detect", "--data {animals}", "there must be one"),
    ("detect", "--data {scenes} --image-size 32x48", "a square"),
    ("detect", "--data {scenes} --image-size 8", "two patches of 8"),
    ("detect", "--data toy --val-data {scenes}", "leave --val-data out"),
    ("detect", "--data {scenes}/annotations/instances_train.json", "give --val-data"),
    ("detect", "--data {scenes} --min-jitter 2 --max-jitter 1", "is over --max-jitter"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "flags", "words"), REFUSED)
def test_unusable_input_is_refused_in_one_line(task, flags, words, places, tmp_path, capsys):
    tiny = {"lit": TINY[8:], "video": [], "detect": ["--size", "toy"]}.get(task, TINY)
    tiny = TINY[6:] if "keep-head" in flags else tiny  # of the sizes of --init
    flags = [flag.replace("{", "{0[").replace("}", "]}").format(places) for flag in flags.split()]
    line = refused(capsys, "--task", task, *tiny, "--out", tmp_path / "run", *flags)
    assert any(some in line for some in words.split("|"))
    assert not (tmp_path / "run").exists()


def test_help_lists_the_flags_of_a_task(capsys):
    shown = {"": "--task NAME --help lists the flags of a task", "lowshot": "--shots"}
    shown |= {"classify": "toy 0.0015", "video": "toy 0.001"}  # the lr of each one's recipe
    for task, words in shown.items():
        finetune.main(["--help", *(["--task", task] if task else [])])
        printed = " ".join(capsys.readouterr().out.split())
        assert words in printed
        assert ("--rand-augment" in printed) == (task in ("classify", "video"))


def test_a_plan_needs_no_data_but_the_number_of_classes(capsys):
    finetune.main(["--task", "classify", "--size", "B", "--plan", "--classes", "1000"])
    printed = capsys.readouterr().out
    samples = -(-100 * 1_281_167 // 1024) * 1024  # 100 epochs of ImageNet-1k, in whole batches
    assert "head 0.8 M" in printed and f"{samples:,} samples" in printed


def test_stage_3_loads_the_augmentation_alone_of_all_tasks():
    code = "import sys, finetune; print(*sorted(n for n in sys.modules if n[:6] == 'tasks.'))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert ran.stdout.split() == [b"tasks.augment"]


def test_labels_that_no_class_has_are_counted_and_stop_the_run(tmp_path):
    train, good = shards(tmp_path / "a", [0, 1, 7, 1] * 5), shards(tmp_path / "b", [0, 1] * 4)
    asked = ["--task", "classify", *TINY, "--steps", 2, "--classes", 2, "--data", train]
    asked += ["--max-bad", 0.5, "--val-data"]
    last_json(fine(*asked, good, "--out", tmp_path / "run"))
    assert 2 <= read_metrics(tmp_path / "run")[-1]["unlabelled"] <= 6
    stopped = fine(*asked, good, "--max-bad", 0.0001, "--out", tmp_path / "strict")
    assert stopped.returncode == 1 and "3 have no label from 0 to 1" in stopped.stderr
    val = fine(*asked, train, "--out", tmp_path / "val")
    assert val.returncode == 2 and "labels of val are over 1, the last class" in val.stderr


def test_pictures_of_too_many_pixels_are_unreadable(tmp_path):
    folder = tmp_path / "large"
    for split in ("train", "val"):
        flags = large_pictures(folder, split)
        boxes = {f"{'ab'[i % 2]}/{i}.png": (3, 9, 9, 90) for i in range(8)}
        write_annotations(folder, split, 300, 300, boxes)
    classify = partial(fine, "--task", "classify", *TINY, *flags, "--steps", 1, "--save-every", 1)
    check_that_the_limit_is_the_runs(classify, tmp_path)
    for run in (classify, partial(fine, *DETECT, *flags)):
        ran = run("--max-pixels", 89_999, "--out", tmp_path / "none")
        assert ran.returncode == 1 and "cannot be read" in ran.stderr
        assert "90000 pixels are over --max-pixels 89999" in ran.stderr


def test_unreadable_pictures_are_named_left_out_and_capped(animals, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(animals, folder)
    for name in ("cats", "dogs"):
        (folder / "val" / name / "0.png").write_bytes(b"junk")
    asked = ["--task", "classify", *TINY, "--steps", "1", "--data", folder]
    ran = fine(*asked, "--max-bad", "0.5", "--out", tmp_path / "run")
    assert "on 10 pictures" in ran.stdout and "cats/0.png" in ran.stderr
    stopped = fine(*asked, "--out", tmp_path / "strict")
    assert stopped.returncode == 2 and "2 of 12 pictures cannot be read" in stopped.stderr
    for path in (folder / "train").rglob("*.png"):  # a whole batch of them is no batch
        path.write_bytes(b"junk")
    stopped = fine(*asked, "--max-bad", "1", "--out", tmp_path / "none")
    assert stopped.returncode == 1
    assert "8 of 8 pictures cannot be read (8 different ones) and 0 have no label" in stopped.stderr


def test_an_unreadable_scene_is_counted(scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "scenes")
    (tmp_path / "scenes" / "train" / "3.png").write_text("no picture")
    last_json(fine(*DETECT, "--data", tmp_path / "scenes", "--out", tmp_path / "run"))
    last = read_metrics(tmp_path / "run")[-1]
    assert last["bad"] > 0 == last["unlabelled"]


# ------------------------------------------------------------------------------- pictures and texts


def test_lit_leaves_the_picture_tower_as_it_is(plain, captions):
    state, config = models.read_weights(plain("lit")[0] / "model.pt")
    init = models.read_weights(captions.parent / "vit.pt")[0]
    assert all(torch.equal(state[name], init[name]) for name in init)
    fresh = lit.TwoTowers(**config).state_dict()
    moved = [n for n in fresh if n not in init and not torch.equal(fresh[n], state[n])]
    still = ["text.position_embedding.weight", "text.token_embedding.weight"]
    assert {*moved, *still} == fresh.keys() - init.keys()  # of these two, the rows that occur


def test_cached_features_are_those_of_the_pictures(commands, plain, tmp_path):
    """A picture of one colour looks the same in every crop: nothing else may change."""
    out, asked = tmp_path / "run", [*commands["lit"], "--cache-features", "--out"]

    def computed(*flags):
        for path in (*out.glob("model.pt"), *out.glob("checkpoints")):
            path.rename(tmp_path / f"{len(list(tmp_path.iterdir()))}")
        return "features of 72 pictures" in fine(*asked, out, *flags).stdout

    assert computed()
    for ours, theirs in zip(read_metrics(out), read_metrics(plain("lit")[0])):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert not computed()
    assert computed("--max-pixels", 90_000)  # others may be unreadable
    # None are computed for a run that is refused.
    shutil.copytree(plain("lit")[0], tmp_path / "other")
    failed = fine(*asked, tmp_path / "other")
    assert failed.returncode == 2 and "cache_features was False" in failed.stderr
    assert not list((tmp_path / "other").glob("features*"))


def test_colours_are_found_by_their_names(commands, tmp_path, capsys):
    """After a longer training, without labels, in pictures that were not seen."""
    long = ["--steps", "150", "--batch-size", "16", "--lr", "3e-3", "--min-crop", "1"]
    found = last_json(fine(*commands["lit"], *long, "--out", tmp_path / "run"))
    assert found["text_recall_at_1"] > 0.5 and found["images"] == 8 and found["texts"] <= 8
    for number, (name, colour) in enumerate(COLOURS.items()):
        for split in ("train", "val"):
            (tmp_path / "walls" / split / f"c{number}").mkdir(parents=True)
            image = Image.new("RGB", (16, 16), tuple(c - 11 for c in colour))
            image.save(tmp_path / "walls" / split / f"c{number}" / "a.png")
    (tmp_path / "names.txt").write_text("\n".join(f"{name}, {name} wall" for name in COLOURS))
    asked = ["--checkpoint", tmp_path / "run" / "model.pt", "--data", tmp_path / "walls"]
    asked += ["--task", "zeroshot", "--classnames", tmp_path / "names.txt", "--workers", 0]
    assert main_json(capsys, evaluate, *asked)["top1"] == 1.0


def test_the_scale_of_the_logits_is_at_most_100_after_each_step(commands, plain, tmp_path):
    state, config = models.read_weights(plain("lit")[0] / "model.pt")
    state["logit_scale"] = torch.tensor([9.0])
    models.save_weights(tmp_path / "large.pt", state, config)
    again = ["--init", tmp_path / "large.pt", "--steps", 1, "--save-every", 1]
    last_json(fine(*commands["lit"], *again, "--out", tmp_path / "run"))
    (scale,) = models.read_weights(tmp_path / "run" / "model.pt")[0]["logit_scale"].exp()
    assert scale == pytest.approx(100, rel=1e-6)


def test_a_pair_that_is_of_no_use_is_counted_once(commands, captions, tmp_path):
    """One without a caption, one that is damaged, of 72: each is met every 9 steps."""
    with tarfile.open(captions) as old:
        members = {member.name: old.extractfile(member).read() for member in old}
    members |= {"003.txt": b" # ", "005.png": members["005.png"][:40]}
    asked = [*commands["lit"], "--data", write_tar(tmp_path / "0.tar", members.items()), "--out"]
    last_json(fine(*asked, tmp_path / "run", "--steps", 9, "--save-every", 9, "--max-bad", 1))
    last = read_metrics(tmp_path / "run")[-1]
    assert (last["bad"], last["unlabelled"]) == (1, 1)
    other = ["--caption-key", "other", "--max-bad", 0.01, "--steps", 99]
    ran = fine(*asked, tmp_path / "none", *other)
    assert ran.returncode == 1 and "have no caption: over --max-bad" in ran.stderr


# ------------------------------------------------------------------------------------------- scenes


@pytest.mark.parametrize(
    "size, layer_decay, drop_path, epochs",
    [("B", 0.7, 0.1, 100), ("L", 0.8, 0.4, 100), ("H", 0.9, 0.5, 75), ("2B", 0.8, 0.5, 75)],
)
def test_the_recipe_of_detection_is_vitdets(size, layer_decay, drop_path, epochs, scenes):
    settled = partial(prepared, "--task", "detect", "--data", scenes, "--size")
    run = settled(size)
    assert (run.layer_decay, run.drop_path, run.epochs) == (layer_decay, drop_path, epochs)
    assert (run.lr, run.batch_size, run.weight_decay) == (1e-4, 64, 0.1)
    assert run.image_size == (1024, 1024) and run.jitter == (0.1, 2.0)
    assert run.decay_floor == 0 and settled(size, "--batch-size", 16).lr == 5e-5
    toy = [settled("toy", *batch) for batch in ([], ["--batch-size", 8])]
    assert [(run.batch_size, run.lr) for run in toy] == [(2, 5e-4), (8, 5e-4)]


@pytest.mark.parametrize(
    ("task", "size", "batch_size", "lr"),  # by hand: of B 2e-3 at 1024, 1e-3 at 256, 1e-4 at 64
    [
        ("classify", "B", 1024, 2e-3),
        ("classify", "L", 64, 1e-3),
        ("classify", "S", 256, 2e-3),
        ("classify", "toy", 16, 7.5e-4),
        ("video", "B", 64, 5e-4),
        ("detect", "S", 16, 1e-4),
    ],
)
def test_the_peak_lr_of_another_batch_or_width(task, size, batch_size, lr):
    run = prepared("--task", task, "--size", size, "--batch-size", batch_size)
    assert run.lr == pytest.approx(lr)


def test_the_schedule_of_detection_drops_twice():
    """LVIS: 156,250 steps, drops at 138,889 and 150,463."""
    steps = 0, 125, 250, 138_888, 138_889, 150_462, 150_463
    found = [detect.vitdet_schedule(step, 156_250, 0) for step in steps]
    assert found == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01])


def test_after_hashtags_no_layer_of_a_detector_has_less_than_a_tenth(scenes, plain, tmp_path):
    """They are known by their head."""
    for kind, floor in ((models.ViT, 0), (models.Classifier, 0.1)):
        model = kind("16x40x2", image_size=8, patch_size=4)
        models.save_weights(tmp_path / "model.pt", model.state_dict(), model.config)
        run = prepared("--task", "detect", "--data", scenes, "--init", tmp_path / "model.pt")
        assert run.decay_floor == floor
        groups = finetune.layer_groups(model, 0.1, 0.9, run.decay_floor)
        assert min(group["lr_scale"] for group in groups) == (floor or pytest.approx(0.9**41))
    groups = finetune.layer_groups(model, 0.1, 0.9, all_decayed=True)
    assert {group["weight_decay"] for group in groups} == {0.1}
    # Positions are trained as well.
    content = torch.load(plain("detect")[0] / "model.pt", weights_only=True)
    moved = content["model"]["trunk.pos_embed"] - models.sincos_positions(128, (4, 4))
    assert content["config"]["positions"] == "learned" and 0 < moved[:, 1:].abs().max() < 0.1


def test_evaluate_measures_a_detector_as_its_training_did(scenes, plain, tmp_path, capsys):
    out, found = plain("detect")[0], last_json(plain("detect")[1])
    assert {"bbox_AP", "segm_AP", "bbox_AR100"} <= found.keys()
    assert (out / "detections.png").exists()
    asked, results = ["--task", "detect", "--workers", 0], tmp_path / "results.json"
    model = ["--checkpoint", out / "model.pt", "--out", tmp_path / "a.png"]
    # Only what is measured on is opened.
    val = tmp_path / "instances_val.json"
    shutil.copy(scenes / "annotations" / val.name, val)
    shutil.copytree(scenes / "val", tmp_path / "val")
    for more in ([*model, "--results", results], ["--checkpoint", results]):
        measured = main_json(capsys, evaluate, *asked, "--data", val, *more)
        for name in found.keys() - {"task"}:
            assert measured[name] == pytest.approx(found[name], rel=1e-6)
    # Beside a checkpoint the picture has another name than the run's own.
    assert (tmp_path / "evaluate-detect.png").exists()
    assert not (tmp_path / "detections.png").exists()
    # It must be of the detector's classes, and the detector whole.
    val.write_text(val.read_text().replace("red", "pink"))
    others = copied_with(scenes, tmp_path / "others", "green")
    weights = torch.load(out / "model.pt", weights_only=True)
    weights["model"].popitem()
    torch.save(weights, tmp_path / "part.pt")
    for more, why in (
        ([*model, "--data", val], "model.pt (2: blue, red ...)"),
        ([*model, "--data", others], "has other classes than"),
        (["--checkpoint", tmp_path / "part.pt", "--data", scenes], "part.pt is damaged, or"),
    ):
        with pytest.raises(SystemExit):
            evaluate.main(list(map(str, [*asked, *more])))
        assert why in capsys.readouterr().err.splitlines()[-1]


def copied_with(scenes, folder, name):
    """A copy of scenes in which the red category is called otherwise."""
    shutil.copytree(scenes, folder)
    for path in (folder / "annotations").iterdir():
        path.write_text(path.read_text().replace("red", name))
    return folder


def test_a_detector_goes_on_with_other_data(scenes, plain, tmp_path):
    """Of the same classes all weights are kept; for others, the predictors are new."""
    init = ["--init", plain("detect")[0] / "model.pt", "--steps", 1, "--save-every", 1]
    common = [*DETECT[:2], *DETECT[6:], *init, "--data"]  # with the detector's sizes
    run = prepared(*common, scenes)
    assert run.weights[0].keys() == detect.read_detector(init[1])[0].keys()
    other = copied_with(scenes, tmp_path / "other", "pink")
    done = fine(*common, other, "--out", tmp_path / "run")
    last_json(done)
    assert "newly initialised: boxes.class_predictor, mask.predictor, dropped: none" in done.stdout
    config = config_of(tmp_path / "run")
    assert config["image_size"] == [32, 32] and config["class_names"] == ["blue", "pink"]


def test_lvis_is_learned_with_its_own_loss_sampling_and_metric(scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "lvis")
    for split in ("train", "val"):
        path = tmp_path / "lvis" / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        for category, frequency in zip(content["categories"], "rf"):
            category["frequency"] = frequency
        for image in content["images"]:
            image |= {"neg_category_ids": [5], "not_exhaustive_category_ids": []}
        path.with_name(f"lvis_v1_{split}.json").write_text(json.dumps(content))
        path.unlink()
    found = last_json(fine(*DETECT, "--data", tmp_path / "lvis", "--out", tmp_path / "run"))
    assert {"bbox_APr", "bbox_APf", "segm_APr", "bbox_AR300"} <= found.keys()
    config = config_of(tmp_path / "run")
    assert config["class_counts"] == [6, 6] and config["detections"] == 300
