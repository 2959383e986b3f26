"""Stage 3: augmentation, mixing, losses and heads by hand; and as a program."""

import copy
import io
import json
import math
import os
import shutil
import tarfile
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import check_that_the_limit_is_the_runs, large_pictures, picture, read_metrics, stage
from PIL import Image, ImageEnhance, ImageOps

import data
import evaluate
import finetune
import model as models
from support import launch
from tasks import augment, detect, lowshot
from tasks import lit as lit_module

TINY = [
    *("--size", "16x2x2", "--image-size", "16", "--patch-size", "4", "--batch-size", "8"),
    *("--workers", "1", "--log-every", "1"),
]
CLASSIFY = [
    *("--task", "classify", *TINY, "--steps", "6", "--save-every", "2", "--lr", "1e-2"),
    *("--layer-decay", "0.9", "--drop-path", "0.3", "--erase", "0.9"),
]


# ------------------------------------------------------------------------------------ augmentation

# The ranges of timm's rand-m9-mstd0.5-inc1, by hand, at levels 10, 9 and 5 of 10 and towards one
# side: degrees, bits, thresholds, additions, factors, shares.
RANGES = {
    "rotate": (30, 27, 15),
    "posterize": (0, 1, 2),
    "solarize": (0, 26, 128),
    "solarize add": (110, 99, 55),
    "color": (1.9, 1.81, 1.45),
    "contrast": (1.9, 1.81, 1.45),
    "brightness": (1.9, 1.81, 1.45),
    "sharpness": (1.9, 1.81, 1.45),
    "shear x": (0.3, 0.27, 0.15),
    "shear y": (0.3, 0.27, 0.15),
    "translate x": (0.45, 0.405, 0.225),
    "translate y": (0.45, 0.405, 0.225),
}
GREY = (124, 116, 104)  # 255 x ImageNet's mean


def by_hand(name, image, value):
    w, h = image.size
    affine = {
        "shear x": (1, value, 0, 0, 1, 0),
        "shear y": (1, 0, 0, value, 1, 0),
        "translate x": (1, 0, value * w, 0, 1, 0),
        "translate y": (1, 0, 0, 0, 1, value * h),
    }
    pixels = np.asarray(image).astype(int)
    if name in affine:
        how = {"resample": Image.Resampling.BICUBIC, "fillcolor": GREY}
        return image.transform(image.size, Image.Transform.AFFINE, affine[name], **how)
    if name == "rotate":
        return image.rotate(value, Image.Resampling.BICUBIC, fillcolor=GREY)
    if name == "posterize":
        return Image.fromarray((pixels // 2 ** (8 - value) * 2 ** (8 - value)).astype(np.uint8))
    if name == "solarize":
        return Image.fromarray(np.where(pixels < value, pixels, 255 - pixels).astype(np.uint8))
    if name == "solarize add":
        added = np.minimum(255, pixels + value)
        return Image.fromarray(np.where(pixels < 128, added, pixels).astype(np.uint8))
    return getattr(ImageEnhance, name.capitalize())(image).enhance(value)


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("column", range(3))
def test_ranges_of_randaugment_by_hand(name, column):
    image, level = picture(3), (1.0, 0.9, 0.5)[column]
    ours = augment.OPERATIONS[name](image, level, level)
    assert ours.tobytes() == by_hand(name, image, RANGES[name][column]).tobytes()
    other = augment.OPERATIONS[name](image, level, -level)
    if name in ("posterize", "solarize", "solarize add"):  # these have no direction
        assert other.tobytes() == ours.tobytes()
    elif name in ("color", "contrast", "brightness", "sharpness"):
        value = 2 - RANGES[name][column]
        assert other.tobytes() == by_hand(name, image, value).tobytes()
    else:
        assert other.tobytes() == by_hand(name, image, -RANGES[name][column]).tobytes()


def test_operations_of_randaugment_without_a_range():
    image = picture(4)
    assert len(augment.OPERATIONS) == 15
    plain = {"auto contrast": "autocontrast", "equalize": "equalize", "invert": "invert"}
    for name, theirs in plain.items():
        ours = augment.OPERATIONS[name](image, 0.9, -0.9)
        assert ours.tobytes() == getattr(ImageOps, theirs)(image).tobytes()


def test_two_operations_each_done_half_of_the_time_at_levels_around_9(monkeypatch):
    done = []

    def recorder(name):
        return lambda image, level, s: done[-1].append((name, level, s)) or image

    monkeypatch.setattr(augment, "OPERATIONS", {name: recorder(name) for name in range(15)})
    pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
    for position in range(6000):
        done.append([])
        augment.augment(pixels, (0, 0, position), 9, 0)
    # 6000 draws: four standard errors of a share are at most 0.026, of a count of 400, 80.
    assert np.bincount([len(ops) for ops in done]) / 6000 == pytest.approx(
        [0.25, 0.5, 0.25], abs=0.026
    )
    names, levels, signed = map(np.array, zip(*(op for ops in done for op in ops)))
    assert np.bincount(names, minlength=15).min() > 320 and np.bincount(names).max() < 480
    # N(9, 0.5) of 10, cut at 10: 2.3 % are there.
    assert np.median(levels) == pytest.approx(0.9, abs=0.003) and levels.max() == 1.0
    assert np.mean(levels == 1.0) == pytest.approx(0.0228, abs=0.01)
    assert np.std(levels[levels < 0.9] - 0.9) * math.sqrt(1 / (1 - 2 / math.pi)) == pytest.approx(
        0.05, abs=0.003
    )
    assert np.mean(signed > 0) == pytest.approx(0.5, abs=0.026)
    assert (abs(signed) == levels).all()


def test_erasing_fills_boxes_with_noise():
    shares, found = [], []
    for position in range(3000):
        pixels = torch.full((3, 40, 60), 7, dtype=torch.uint8)
        erased = augment.augment(pixels, (0, 0, position), 0, 0.25)
        box = (erased != 7).any(dim=0)
        if box.any():
            rows, columns = box.any(dim=1).nonzero()[:, 0], box.any(dim=0).nonzero()[:, 0]
            height, width = (int(side[-1] - side[0]) + 1 for side in (rows, columns))
            shares.append(height * width / 2400)
            assert 0.25 < height / width < 4  # 0.3 to 1 / 0.3, rounded to pixels
            found.append(erased[:, box].float())
    assert len(shares) / 3000 == pytest.approx(0.25, abs=0.032)
    assert 0.015 < min(shares) < 0.03 and 0.29 < max(shares) < 0.35
    assert np.mean(shares) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    pixels = torch.cat(found, dim=1) / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels.median(dim=1).values, mean, atol=0.01, rtol=0)
    # Cut at 0 and 1, some 2 deviations away, a normal number varies a little less.
    spread = pixels.std(dim=1) / deviation
    assert spread.min() > 0.94 and spread.max() < 1.0


def test_an_augmentation_is_a_pure_function_of_its_key():
    pixels = torch.from_numpy(np.array(picture(1))).permute(2, 0, 1)
    made = [augment.augment(pixels.clone(), (0, 1, p), 9, 0.5) for p in (5, 6, 5)]
    assert torch.equal(made[0], made[2]) and not torch.equal(made[0], made[1])
    grey = augment.augment(pixels[:1].clone(), (0, 1, 5), 9, 0.5)
    assert grey.shape == (1, *pixels.shape[1:])


# ---------------------------------------------------------------------------------- mixing and loss


def mixed(count, mixup, cutmix, weight=None):
    """mix() of pictures whose pixels are their number: (shares of the own one, images)."""
    images = torch.arange(float(count))[:, None, None, None].expand(-1, 1, 16, 24)
    numbers = torch.rand(count, augment.MIX_DRAWS, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(count) if weight is None else weight
    images, share = augment.mix(images, weight, numbers, mixup, cutmix)
    return share, images


def test_mixup_blends_pairs_and_says_how_much():
    share, images = mixed(4000, 0.8, 0.0)
    own, other = torch.arange(4000.0), torch.arange(4000) ^ 1
    expected = share * own + (1 - share) * other
    torch.testing.assert_close(images[:, 0, 3, 5], expected)
    assert torch.equal(share[::2], share[1::2])
    # Beta(0.8, 0.8): mean 1/2, variance 1 / (4 (2 x 0.8 + 1)); 2000 draws.
    assert share.mean().item() == pytest.approx(0.5, abs=0.03)
    assert share.var().item() == pytest.approx(1 / (4 * 2.6), abs=0.008)


def test_cutmix_pastes_a_box_and_says_how_much():
    share, images = mixed(2000, 0.0, 1.0)
    own = (images[:, 0] == torch.arange(2000)[:, None, None]).float()
    other = (images[:, 0] == (torch.arange(2000) ^ 1)[:, None, None]).float()
    assert torch.equal(own + other, torch.ones_like(own))
    torch.testing.assert_close(own.mean(dim=(1, 2)), share)
    for picture_of_other in other[:50]:  # one box: its pixels are all of its rows and columns
        rows, columns = picture_of_other.any(dim=1), picture_of_other.any(dim=0)
        assert torch.equal(picture_of_other.bool(), rows[:, None] & columns[None, :])


def test_half_of_the_pairs_are_mixed_and_half_are_cut():
    share, images = mixed(4000, 0.8, 1.0)
    blended = (images[::2, 0] % 1 != 0).flatten(1).any(dim=1)
    assert blended.double().mean().item() == pytest.approx(0.5, abs=0.045)
    assert torch.equal(share[::2], share[1::2])


def test_what_cannot_be_read_is_not_mixed_in():
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0])
    share, images = mixed(4, 0.8, 0.0, weight)
    assert share[0] == 1 and (images[0] == 0).all() and share[2] < 1
    share, images = mixed(4, 0.0, 0.0)
    assert (share == 1).all() and (images[3] == 3).all()


def test_the_loss_is_that_of_dense_targets():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 2, 5, generator=generator)
    labels, share = torch.tensor([0, 4, 2, 2, 3, -1]), torch.tensor([0.3, 0.3, 1, 1, 0.6, 0.6])
    losses, weights = augment.label_loss(logits, labels, share, 0.1)
    expected, expected_weights = torch.zeros(6), torch.zeros(6)
    for i, partner in enumerate((1, 0, 3, 2, 5, 4)):
        for label, part in ((labels[i], share[i]), (labels[partner], 1 - share[i])):
            if label >= 0:
                target = torch.full((5,), 0.1 / 5)
                target[label] += 0.9
                loss = -(logits[i].log_softmax(dim=1) * target).sum()  # of both heads
                expected[i] += part * loss
                expected_weights[i] += part
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(weights, expected_weights)


# --------------------------------------------------------------------------------- heads and groups


def classifier(**changes):
    arguments = {"size": "16x3x2", "image_size": 8, "patch_size": 4, "classes": 5, **changes}
    model = models.Classifier(**arguments)
    with torch.no_grad():  # not the flat beginning
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_layer_decay_by_hand():
    model = classifier(positions="learned", pool="mean")
    found = {}
    for group in finetune.layer_groups(model, 0.05, 0.5):
        for parameter in group["params"]:
            found[parameter] = group["lr_scale"], group["weight_decay"]
    found = {name: found[parameter] for name, parameter in model.named_parameters()}
    assert found["cls_token"] == found["pos_embed"] == (0.0625, 0)
    assert found["patch_embed.proj.weight"] == (0.0625, 0.05)
    assert found["patch_embed.proj.bias"] == (0.0625, 0)
    assert found["blocks.0.attn.qkv.weight"] == (0.125, 0.05)
    assert found["blocks.2.mlp.fc2.weight"] == (0.5, 0.05)
    assert found["blocks.2.norm1.weight"] == (0.5, 0)
    assert found["fc_norm.weight"] == (1, 0) and found["head.weight"] == (1, 0.05)
    assert len(found) == len(list(model.parameters()))


def test_prompts_are_counted_and_stand_beside_the_tokens_of_every_block():
    trunk = classifier()
    model = lowshot.Prompted(trunk, seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 3 * 8 * 192 + (192 * 16 + 16) + (16 * 5 + 5)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(model.head.weight, generator=generator)
    images = torch.randn(2, 3, 8, 8, generator=generator)
    x = trunk.tokens(images)
    for i, block in enumerate(trunk.blocks):  # independently: prompts last, dropped after the block
        prompts = model.prompts[i] @ model.project.weight.T + model.project.bias
        x = block(torch.cat([x, prompts.expand(2, -1, -1)], dim=1))[:, :-8]
    expected = trunk.norm(x)[:, 0] @ model.head.weight.T
    # three blocks in fp32, of sums in another order
    torch.testing.assert_close(model(images)[:, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_probe_becomes_the_head_of_a_classifier(batch_norm, pool):
    trunk = classifier(pool=pool)
    model = finetune.Probes(trunk, 3, batch_norm, seed=0)
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for number, head in enumerate(model.heads):
            head.weight.mul_(number + 1)
            head.bias.add_(number)
        for _ in range(100):
            trained = model(images)
        if batch_norm:  # the statistics of the one batch there is, unbiased in the running variance
            x = trunk.features(images)
            scaled = (x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-6).sqrt()
            expected = F.linear(scaled, model.heads[2].weight, model.heads[2].bias)
            torch.testing.assert_close(trained[:, 2], expected)
            torch.testing.assert_close(model.variance, x.var(dim=0), rtol=1e-3, atol=1e-6)
        model.eval()
        logits = model(images)
        same = classifier(pool=pool)
        same.load_state_dict(model.classifier_state(model.state_dict(), 1))
        torch.testing.assert_close(same(images), logits[:, 1], rtol=1e-4, atol=1e-5)


def test_batch_statistics_of_features_that_hardly_vary_are_exact():
    """A mean of 40 and a deviation of 0.01: the mean of squares minus the square of the mean, in
    float32, would be noise, or negative."""
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
    heads = copy.deepcopy(model.heads)
    how = {"momentum": 0.9, "nesterov": True}
    optimizers = [torch.optim.SGD(groups, **how)]
    optimizers += [torch.optim.SGD(h.parameters(), lr=r, **how) for h, r in zip(heads, rates)]
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


def test_logistic_regression_is_at_its_minimum():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=generator), torch.arange(30) % 3
    weight = torch.zeros(3, 4, dtype=torch.float64)
    units = F.normalize(x.double() - x.double().mean(dim=0))
    for _ in range(3000):  # plain gradient descent
        residual = (units @ weight.T).softmax(dim=1) - F.one_hot(y, 3)
        weight -= 2.0 * (residual.T @ units / 30 + 1e-2 * weight)
    found = lowshot.logistic_scores(x, y, x, 3, 1e-2)
    torch.testing.assert_close(found, units @ weight.T, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------- as a program


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """A folder with train/ (60 pictures of three classes) and val/ (12)."""
    folder = tmp_path_factory.mktemp("pets")
    for split, count in (("train", 20), ("val", 4)):
        for number, name in enumerate(("cats", "dogs", "owls")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.array(picture(1000 * number + i + (split == "val") * 100))
                pixels[:, :, number] = 250  # easy to tell apart
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def fine(*arguments, **options):
    return stage(*arguments, program="finetune.py", **options)


def last_json(ran):
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def plain(pets, tmp_path_factory):
    out = tmp_path_factory.mktemp("classify") / "run"
    last_json(fine(*CLASSIFY, "--data", pets, "--out", out))
    return out


def test_classify_leaves_a_classifier_that_evaluate_measures_alike(plain, pets, tmp_path, capsys):
    state, config = models.read_weights(plain / "model.pt")
    assert config["class_names"] == ["cats", "dogs", "owls"] and config["pool"] == "mean"
    assert [line["step"] for line in read_metrics(plain) if "top1" in line] == [2, 4, 6]
    where = ["--checkpoint", str(plain / "model.pt"), "--data", str(pets), "--workers", "0"]
    drawn = ["--confusion", str(tmp_path / "c.png"), "--mistakes", str(tmp_path / "m.png")]
    evaluate.main(["--task", "classify", *where, *drawn])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    model = models.Classifier(**config).eval()
    model.load_state_dict(state)
    val = data.open_sources(str(pets))[1]
    right = 0
    for number in range(12):
        sample = val.read(number)
        pixels = data.crop_and_resize(sample["image"](), (16, 16), 3)[None]
        right += int(model(data.normalize(pixels)).argmax()) == sample["class"]
    assert found["top1"] == right / 12 and found["top5"] == 1.0 and found["pictures"] == 12
    assert (tmp_path / "c.png").exists()


# Beside one process in pieces, two replicas, and two shards of one model.
SHARDED = ["--shard-group", "2"]
WAYS = pytest.mark.parametrize(
    ("processes", "extra"), [(None, ["--micro-batch", "2"]), (2, []), (2, SHARDED)]
)


@WAYS
def test_classify_is_the_same_on_any_number_of_processes(processes, extra, plain, pets, tmp_path):
    out = tmp_path / "run"
    last_json(fine(*CLASSIFY, "--data", pets, "--out", out, *extra, processes=processes))
    for ours, theirs in zip(read_metrics(out), read_metrics(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def rewound(plain, out, step):
    """A copy of a run as it was when it had saved this step."""
    shutil.copytree(plain, out)
    (out / "model.pt").unlink()
    for path in (out / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    (out / "checkpoints" / "LATEST").write_text(f"step-{step:08d}")


def test_classify_resumed_is_the_same_run_averages_included(plain, pets, tmp_path):
    rewound(plain, tmp_path / "run", 4)
    ran = fine(*CLASSIFY, "--data", pets, "--out", tmp_path / "run")
    assert "going on from" in ran.stdout and ran.returncode == 0, ran.stderr
    assert read_metrics(tmp_path / "run") == read_metrics(plain)
    ours, theirs = (models.read_weights(p / "model.pt")[0] for p in (tmp_path / "run", plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_linear_learns_resumes_and_chooses_on_train(pets, tmp_path):
    asked = ["--task", "linear", *TINY, "--steps", "30", "--save-every", "20", "--data", pets]
    asked += ["--batch-norm", "--min-crop", "1"]
    ran = fine(*asked, "--out", tmp_path / "run")
    found = last_json(ran)
    assert found["top1"] > 0.6 and "chosen on train" in ran.stdout
    assert ran.stdout.count("%") >= 2 * len(finetune.LINEAR_RATES)  # all are shown
    rewound(tmp_path / "run", tmp_path / "again", 20)
    assert last_json(fine(*asked, "--out", tmp_path / "again")) == found
    for name, extra in (("two", []), ("sharded", SHARDED)):
        assert last_json(fine(*asked, *extra, "--out", tmp_path / name, processes=2)) == found
    ours, theirs = (models.read_weights(tmp_path / n / "model.pt")[0] for n in ("run", "again"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_lowshot_reports_both_and_does_not_repeat_what_is_known(
    pets, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(lowshot, "LOWSHOT_RATES", (1e-2,))
    monkeypatch.setattr(lowshot, "SEEDS", range(2))
    asked = ["--task", "lowshot", *TINY[:-4], "--workers", "0", "--epochs", "4", "--shots", "1,30"]
    asked += ["--data", str(pets), "--out", str(tmp_path / "run")]
    finetune.main(asked)
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["top1"]
    assert set(found) == {"prompts", "logistic"} and set(found["prompts"]) == {"1", "30"}
    assert found["logistic"]["30"] > 0.6 and found["prompts"]["30"] > 0.3
    checkpoints = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.distcp")}
    assert checkpoints and all(path.stat().st_size < 100_000 for path in checkpoints)  # no trunk
    monkeypatch.setattr(launch, "save_checkpoint", None)  # would fail
    finetune.main(asked)
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["top1"] == found


def test_prompts_are_the_same_on_any_number_of_processes(pets, tmp_path):
    code = (
        "import sys, finetune; finetune.LOWSHOT_RATES = (1e-2,); finetune.SEEDS = range(1); "
        "finetune.main(sys.argv[1:])"
    )
    asked = ["--task", "lowshot", *TINY[:-4], "--workers", "0", "--steps", "4", "--shots", "2"]
    found = []
    for name, processes, extra in (("one", None, []), ("two", 2, []), ("sharded", 2, SHARDED)):
        how = {"processes": processes, "code": code}
        ran = fine(*asked, *extra, "--data", pets, "--out", tmp_path / name, **how)
        found.append(last_json(ran))
    assert found[0] == found[1] == found[2]


# ---------------------------------------------------------------------------------------- bad input


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        finetune.main(list(map(str, arguments)))
    assert stopped.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("finetune.py: ")
    return line


def test_unusable_input_is_refused_in_one_line(pets, photos, tmp_path, capsys):
    common = ["--task", "classify", *TINY, "--out", tmp_path / "run"]
    assert "names no classes" in refused(capsys, *common, "--data", photos)
    assert "no train/ and val/" in refused(capsys, *common, "--data", pets / "train")
    (tmp_path / "one" / "train" / "cats").mkdir(parents=True)
    picture(0).save(tmp_path / "one" / "train" / "cats" / "a.png")
    one = ["--data", photos, "--val-data", photos, "--classes", 1]
    assert "one class only" in refused(capsys, *common, *one)
    (tmp_path / "other" / "fish").mkdir(parents=True)
    picture(0).save(tmp_path / "other" / "fish" / "a.png")
    other = ["--data", pets / "train", "--val-data", tmp_path / "other"]
    assert "classes that train has not" in refused(capsys, *common, *other)
    assert "cannot be changed" in refused(
        capsys, *common, "--data", pets, "--init", weights_of(tmp_path, "32x1x2")
    )
    assert "out of range" in refused(capsys, *common, "--rand-augment", 11)
    assert "out of range" in refused(capsys, *common, "--drop-path", 1)
    assert "an even number" in refused(capsys, *common, "--data", pets, "--batch-size", 7)
    linear = ["--task", "linear", *common[2:], "--data", pets]
    assert "all of it" in refused(capsys, *linear, "--batch-norm", "--micro-batch", 4)
    for flag in (["--plan"], ["--lr", 1], ["--mixup", 0], ["--keep-head"]):
        assert f"{flag[0]} is for --task classify" in refused(capsys, *linear, *flag)
    assert "--batch-norm is for --task linear" in refused(capsys, *common, "--batch-norm")
    assert "--shots is for --task lowshot" in refused(capsys, *linear, "--shots", 3)
    few = tmp_path / "few"
    for name in ("train/cats", "train/dogs", "val/cats", "val/dogs"):
        (few / name).mkdir(parents=True)
        picture(0).save(few / name / "a.png")
    assert "too small" in refused(capsys, *linear[:-1], few)
    assert "choose on" in refused(capsys, "--task", "lowshot", *linear[2:-1], few)
    picture(0).save(few / "val" / "stray.png")  # so its folders are no classes
    assert "the other does not" in refused(capsys, *common, "--data", few)
    numbered = ["--data", shards(tmp_path / "numbered", [0, 1, 2] * 3), "--classes", 3]
    named = ["--val-data", pets / "val"]
    assert "the other does not" in refused(capsys, *common, *numbered, *named)
    head = [*common[:2], "--keep-head", "--out", tmp_path / "run", "--data", pets, "--init"]
    assert "no head in --init" in refused(capsys, *head, weights_of(tmp_path, "16x2x2"))
    other = models.Classifier("16x2x2", 3, image_size=16, patch_size=4, class_names=["a", "b", "c"])
    models.save_weights(tmp_path / "head.pt", other.state_dict(), other.config)
    assert "for other classes" in refused(capsys, *head, tmp_path / "head.pt")
    other = models.Classifier("16x2x2", 3, image_size=16, patch_size=4)  # it names none
    models.save_weights(tmp_path / "head.pt", other.state_dict(), other.config)
    line = refused(capsys, *head, tmp_path / "head.pt", "--pool", "mean")
    assert "the head in --init reads --pool cls" in line
    assert "names 3" in refused(capsys, *common, "--data", pets, "--classes", 5)
    for flag in (["--save-every", 2], ["--resume", tmp_path]):
        line = refused(capsys, "--task", "lowshot", *linear[2:], *flag)
        assert f"{flag[0]} is for --task classify, linear" in line
    missing = ["--val-labels", tmp_path / "no.csv", "--val-data", tmp_path / "numbered" / "0.tar"]
    assert "want a folder" in refused(capsys, *common, "--data", pets, *missing)
    unlabelled = shards(tmp_path / "unlabelled", ["", "", ""])
    line = refused(capsys, *common, *numbered, "--val-data", unlabelled)
    assert "no labels in" in line  # before a step is trained
    assert not (tmp_path / "run").exists()


def test_numbered_classes_are_learned_in_the_order_of_their_numbers(
    pets, tmp_path, monkeypatch, capsys
):
    """A run that began when they were sorted as texts is not continued with other labels."""
    for split in ("train", "val"):
        for number, name in (("2", "cats"), ("10", "dogs"), ("1", "owls")):
            shutil.copytree(pets / split / name, tmp_path / "pets" / split / number)
    asked = ["--task", "classify", *TINY, "--workers", "0", "--steps", "2", "--save-every", "1"]
    asked += ["--data", str(tmp_path / "pets"), "--out", str(tmp_path / "run")]
    monkeypatch.setattr(data, "sort_classes", sorted)
    finetune.main(asked)
    monkeypatch.undo()
    assert models.read_weights(tmp_path / "run/model.pt")[1]["class_names"] == ["1", "10", "2"]
    assert "class_order was None, is by number" in refused(capsys, *asked)
    asked[-1] = str(tmp_path / "new")
    finetune.main(asked)
    assert models.read_weights(tmp_path / "new/model.pt")[1]["class_names"] == ["1", "2", "10"]
    finetune.main(asked)  # it goes on
    # The order of others is what it was, and so are their runs.
    for before, after in (("10", "3"), ("3", "18-25")):
        for split in ("train", "val"):
            (tmp_path / "pets" / split / before).rename(tmp_path / "pets" / split / after)
        asked[-1] = str(tmp_path / f"as before {after}")
        monkeypatch.setattr(data, "sort_classes", sorted)
        finetune.main(asked)
        monkeypatch.undo()
        finetune.main(asked)
        names = models.read_weights(f"{asked[-1]}/model.pt")[1]["class_names"]
        assert names == sorted(os.listdir(tmp_path / "pets" / "train"))


def test_splits_are_no_classes(pets, tmp_path, capsys):
    """train, valid and test of a folder: the first is learned, the second measured."""
    for split, name in (("train", "train"), ("val", "valid"), ("val", "test")):
        shutil.copytree(pets / split, tmp_path / "pets" / name)
    asked = ["--task", "classify", *TINY, "--workers", "0", "--steps", "1"]
    asked += ["--out", str(tmp_path / "run"), "--data", str(tmp_path / "pets")]
    finetune.main(asked)
    where = ["--checkpoint", str(tmp_path / "run" / "model.pt"), *asked[-2:], "--workers", "0"]
    assert models.read_weights(where[1])[1]["class_names"] == ["cats", "dogs", "owls"]
    for more in ([], ["--val-data", str(tmp_path / "pets" / "test")]):
        evaluate.main(["--task", "classify", *where, *more])
        printed = capsys.readouterr().out
        assert f"{tmp_path}/pets/test: left out (to measure on it" in printed
        assert json.loads(printed.splitlines()[-1])["pictures"] == 12


def test_a_kept_head_finds_the_classes_of_the_data(pets, tmp_path, capsys):
    """Of a released head, of one whose classes are in another order, and of some of them."""
    names = {"cats": "n02123045", "dogs": "n01440764", "owls": "n15075141"}
    for split in ("train", "val"):
        for name, wnid in names.items():
            shutil.copytree(pets / split / name, tmp_path / "wnids" / split / wnid)
    asked = ["--task", "classify", *TINY, "--workers", "0", "--lr", "1e-30", "--steps", "1"]
    asked += ["--keep-head"]

    def kept(count, class_names, data, name):
        model = models.Classifier("16x2x2", count, image_size=16, patch_size=4, head_std=1.0)
        config = model.config | {"class_names": class_names}
        models.save_weights(tmp_path / f"{name}.pt", model.state_dict(), config)
        where = ["--init", f"{tmp_path}/{name}.pt", "--data", data, "--out", tmp_path / name]
        finetune.main(list(map(str, asked + where)))
        state, config = models.read_weights(tmp_path / name / "model.pt")
        assert config["class_names"] == sorted(os.listdir(data / "train"))
        return state, model.state_dict()

    for case in ((1000, None, tmp_path / "wnids", "released", [0, 281, 999]),
                 (5, ["owls", "x", "cats", "x", "dogs"], pets, "named", [2, 4, 0]),
                 (3, None, pets, "unnamed", [0, 1, 2])):  # fmt: skip
        state, before = kept(*case[:-1])
        for name in ("head.weight", "head.bias"):
            torch.testing.assert_close(state[name], before[name][case[-1]])
    capsys.readouterr()
    for count, class_names, odd in (
        (4, None, "0 of its 4 classes are called cats"),
        (4, ["cats", "dogs", "owls", "owls"], "2 of its 4 classes are called owls"),
        (3, ["cats", "dogs", "emus"], "0 of its 3 classes are called owls"),
    ):
        with pytest.raises(SystemExit):
            kept(count, class_names, pets, "refused")
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"({odd}, and one is needed): leave --keep-head out" in line
        assert not (tmp_path / "refused").exists()


def test_a_kept_head_reads_what_it_was_trained_on(pets, tmp_path):
    """A head of class tokens goes on as it was, without a flag that says so."""
    run = ["--task", "classify", *TINY, "--data", pets, "--lr", "1e-30", "--steps", "1"]
    model = models.Classifier("16x2x2", 3, image_size=16, patch_size=4, head_std=1.0)
    models.save_weights(tmp_path / "head.pt", model.state_dict(), model.config)
    ran = fine(*run, "--init", tmp_path / "head.pt", "--keep-head", "--out", tmp_path / "run")
    assert last_json(ran)["task"] == "classify"
    state, config = models.read_weights(tmp_path / "run" / "model.pt")
    assert config["pool"] == "cls" and "fc_norm.weight" not in state
    torch.testing.assert_close(state["head.weight"], model.head.weight.detach())


def test_a_plan_is_made_from_shapes_alone(pets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Module, "to_empty", None)  # would fail
    asked = ["--task", "classify", "--size", "6.5B", "--data", str(pets), "--gpus", "8"]
    finetune.main([*asked, "--batch-size", "96", "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert "6,4" in printed and "GPU-days" in printed and not (tmp_path / "run").exists()


def weights_of(folder, size):
    model = models.ViT(size, image_size=16, patch_size=4)
    models.save_weights(folder / "vit.pt", model.state_dict(), model.config)
    return folder / "vit.pt"


def shards(folder, labels):
    """Shards of pictures with these labels, and what --data is for them."""
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i, label in enumerate(labels):
            buffer = io.BytesIO()
            picture(i).save(buffer, "PNG")
            for name, content in (("png", buffer.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{i:03}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(folder / "0.tar")


def test_labels_that_no_class_has_are_counted_and_stop_the_run(tmp_path):
    train, good = shards(tmp_path / "a", [0, 1, 7, 1] * 5), shards(tmp_path / "b", [0, 1] * 4)
    asked = ["--task", "classify", *TINY, "--steps", "2", "--classes", "2", "--data", train]
    ran = fine(*asked, "--val-data", good, "--max-bad", "0.5", "--out", tmp_path / "run")
    assert last_json(ran)["task"] == "classify"
    assert 2 <= read_metrics(tmp_path / "run")[-1]["unlabelled"] <= 6
    stopped = fine(*asked, "--val-data", good, "--max-bad", "0.0001", "--out", tmp_path / "strict")
    assert stopped.returncode == 1 and "3 have no label from 0 to 1" in stopped.stderr
    val = fine(*asked, "--val-data", train, "--max-bad", "0.5", "--out", tmp_path / "val")
    assert val.returncode == 2 and "labels of val are over 1, the last class" in val.stderr


def test_pictures_of_too_many_pixels_are_unreadable(tmp_path):
    for split in ("train", "val"):
        flags = large_pictures(tmp_path / "large", split)
        names = [f"{'ab'[i % 2]}/{i}.png" for i in range(8)]
        images = [{"id": i, "file_name": names[i], "height": 300, "width": 300} for i in range(8)]
        box = {"bbox": [9, 9, 90, 90], "area": 8100, "category_id": 1}
        content = {"images": images, "categories": [{"id": 1, "name": "thing"}]}
        content["annotations"] = [box | {"id": i, "image_id": i} for i in range(8)]
        path = tmp_path / "large" / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))

    for asked in (["--task", "classify", *TINY, *flags], [*DETECT, *flags]):
        asked += ["--steps", 1, "--save-every", 1]
        out = tmp_path / asked[1]
        check_that_the_limit_is_the_runs(partial(fine, *asked), out)
        ran = fine(*asked, "--max-pixels", 89_999, "--out", out / "none")
        assert ran.returncode == 1 and "cannot be read" in ran.stderr
        assert "90000 pixels are over --max-pixels 89999" in ran.stderr


def test_unreadable_val_pictures_are_named_left_out_and_capped(pets, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(pets, folder)
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
    assert (
        stopped.returncode == 1
        and "8 pictures 8 cannot be read and 0 have no label" in stopped.stderr
    )


def test_the_recipe_is_the_public_codes(tmp_path):
    for size, expected in {
        "B": (2e-3, 100, 0.65, 0.1, 0.05),
        "L": (4e-3, 50, 0.75, 0.2, 0.1),
        "H": (4e-3, 50, 0.75, 0.3, 0.1),
    }.items():
        run = finetune.parse_arguments(["--task", "classify", "--size", size])
        finetune.prepare(run)
        found = (run.lr, run.epochs, run.layer_decay, run.drop_path, run.warmup)
        assert found == pytest.approx(expected)
        assert (run.batch_size, run.weight_decay, run.smoothing) == (1024, 0.05, 0.1)
        assert (run.mixup, run.cutmix, run.rand_augment, run.erase) == (0.8, 1.0, 9, 0.25)
        assert run.pool == "mean" and run.min_crop == 0.08
        assert run.val_crop == pytest.approx(224 / 256)
    run = finetune.parse_arguments(["--task", "classify", "--erase", "0.5"])
    finetune.prepare(run)  # toy's own: too short for augmentation that is not asked for
    assert (run.mixup, run.cutmix, run.rand_augment, run.erase, run.min_crop) == (0, 0, 0, 0.5, 0.5)


def test_the_learning_rate_ends_at_the_floor_before_layers_scale_it(pets, tmp_path, monkeypatch):
    """MAE's recipe: lr_scale * (1e-6 + (peak - 1e-6) * half a cosine), per parameter group."""
    found, step = [], torch.optim.AdamW.step

    def spy(self):
        found.append({(group["lr_scale"], group["lr"]) for group in self.param_groups})
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    asked = [*CLASSIFY, "--workers", "0", "--warmup", "0.34", "--data", str(pets)]
    finetune.main([*asked, "--out", str(tmp_path / "run")])
    for done, groups in enumerate(found):
        warmup = 0.34 * 6
        if done < warmup:
            base = 1e-2 * (done + 1) / (warmup + 1)
        else:
            turn = math.pi * (done - warmup) / (6 - warmup)
            base = 1e-6 + (1e-2 - 1e-6) * (1 + math.cos(turn)) / 2
        for scale, lr in groups:
            assert lr == pytest.approx(scale * base)
        scales = sorted(scale for scale, _ in groups)
        assert scales == pytest.approx([0.9**3, 0.9**2, 0.9, 1.0])


def test_the_schedule_is_a_ramp_and_half_a_cosine():
    shares = [finetune.cosine(step, 100, 0.1) for step in range(100)]
    assert shares[0] == pytest.approx(1 / 11) and max(shares) == shares[10] == 1.0
    assert shares[55] == pytest.approx(0.5) and 0 < shares[99] < 0.001


# ------------------------------------------------------------------------------- pictures and texts

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220), "white": (250,) * 3}


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """A shard of 80 pictures of one colour each, and what it is called, in several words."""
    path = tmp_path_factory.mktemp("captions") / "0.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(80):
            name = list(COLOURS)[i * 7 % 4]
            buffer, text = io.BytesIO(), f"a #{name} wall, {'old' if i % 2 else 'new'}"
            shade = tuple(c - i % 20 for c in COLOURS[name])
            Image.new("RGB", (20, 24), shade).save(buffer, "PNG")
            key, text = ("json", json.dumps({"caption": text})) if i % 3 else ("txt", text)
            for kind, content in (("png", buffer.getvalue()), (key, text.encode())):
                member = tarfile.TarInfo(f"{i:03}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def lit(captions, out, *arguments, **options):
    weights = weights_of(captions.parent, "16x2x2")
    asked = ["--task", "lit", "--init", weights, "--data", captions, *TINY[6:], "--out", out]
    asked += ["--text-size", "16x1x2", "--shared-width", 8, "--steps", 6, "--save-every", 3]
    asked += ["--lanes", 2]
    return fine(*asked, *arguments, **options)


@pytest.fixture(scope="module")
def pair(captions, tmp_path_factory):
    out = tmp_path_factory.mktemp("lit") / "run"
    last_json(lit(captions, out))
    return out


PIECES = ["--micro-batch", "2"]


@pytest.mark.parametrize(
    ("processes", "extra"),
    [(None, PIECES), (2, []), (2, PIECES), (2, SHARDED), (2, [*PIECES, *SHARDED])],
)
def test_lit_is_the_same_in_pieces_and_on_two_processes(processes, extra, captions, pair, tmp_path):
    last_json(lit(captions, tmp_path / "run", *extra, processes=processes))
    for ours, theirs in zip(read_metrics(tmp_path / "run"), read_metrics(pair), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_lit_leaves_the_picture_tower_as_it_is_and_resumes(captions, pair, tmp_path):
    rewound(pair, tmp_path / "run", 3)
    assert "going on from" in lit(captions, tmp_path / "run").stdout
    ours, theirs = (models.read_weights(p / "model.pt")[0] for p in (tmp_path / "run", pair))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    init = models.read_weights(weights_of(captions.parent, "16x2x2"))[0]
    assert all(torch.equal(theirs[name], init[name]) for name in init)
    fresh = lit_module.TwoTowers(**models.read_weights(pair / "model.pt")[1]).state_dict()
    moved = [n for n in fresh if n not in init and not torch.equal(fresh[n], theirs[n])]
    still = ["text.position_embedding.weight", "text.token_embedding.weight"]
    assert {*moved, *still} == fresh.keys() - init.keys()  # of these two, the rows that occur


def test_cached_features_are_those_of_the_pictures(captions, pair, tmp_path):
    """A picture of one colour looks the same in every crop: so nothing else may change."""
    ran = lit(captions, tmp_path / "run", "--cache-features")
    assert "features of 72 pictures" in ran.stdout
    for ours, theirs in zip(read_metrics(tmp_path / "run"), read_metrics(pair), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "model.pt").unlink()
    assert "features of" not in lit(captions, tmp_path / "run", "--cache-features").stdout
    # With another limit, others may be unreadable.
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "model.pt").unlink()
    ran = lit(captions, tmp_path / "run", "--cache-features", "--max-pixels", 90_000)
    assert "features of 72 pictures" in ran.stdout


def shard_of(path, samples):
    """A shard of (content of the .png, of the .txt) of each sample."""
    with tarfile.open(path, "w") as tar:
        for i, contents in enumerate(samples):
            for kind, content in zip(("png", "txt"), contents):
                member = tarfile.TarInfo(f"{i:03}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def test_what_lacks_a_picture_or_a_caption_counts_once(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 24)).save(buffer, "PNG")
    good, text = buffer.getvalue(), b"a wall"
    samples = [(good, text), (b"none", text), (good, b" # "), *[(good, text)] * 17]
    path = shard_of(tmp_path / "0.tar", samples)
    last_json(lit(path, tmp_path / "run", "--steps", 9, "--batch-size", 2))
    assert [(e["bad"], e["unlabelled"]) for e in read_metrics(tmp_path / "run")][-1] == (1, 1)


def test_captions_of_no_word_are_refused_before_anything_is_made(tmp_path, capsys):
    path = shard_of(tmp_path / "0.tar", [(b"", b" # ")] * 30)
    init = weights_of(tmp_path, "16x2x2")
    asked = ["--task", "lit", "--init", init, "--data", path, "--out", tmp_path / "run"]
    assert "no captions in" in refused(capsys, *asked)
    assert not (tmp_path / "run").exists()


def test_features_are_not_computed_for_a_run_that_is_refused(captions, pair, tmp_path):
    shutil.copytree(pair, tmp_path / "run")
    failed = lit(captions, tmp_path / "run", "--cache-features")
    assert failed.returncode == 2 and "cache_features was False" in failed.stderr
    assert not list((tmp_path / "run").glob("features*"))


def test_colours_are_found_by_their_names(captions, pair, tmp_path, capsys):
    """Trained a little longer, they are, though no label was seen; in pictures it has not seen."""
    out = tmp_path / "run"
    long = ["--steps", "150", "--batch-size", "16", "--lr", "3e-3", "--min-crop", "1"]
    found = last_json(lit(captions, out, *long))
    assert found["text_recall_at_1"] > 0.5 and found["images"] == 8 and found["texts"] <= 8
    for number, (name, colour) in enumerate(COLOURS.items()):
        for split in ("train", "val"):
            (tmp_path / "walls" / split / f"c{number}").mkdir(parents=True)
            image = Image.new("RGB", (16, 16), tuple(c - 11 for c in colour))
            image.save(tmp_path / "walls" / split / f"c{number}" / "a.png")
    (tmp_path / "names.txt").write_text("\n".join(f"{name}, {name} wall" for name in COLOURS))
    asked = ["--task", "zeroshot", "--checkpoint", out / "model.pt", "--data", tmp_path / "walls"]
    asked += ["--classnames", tmp_path / "names.txt", "--workers", 0]
    evaluate.main(list(map(str, asked)))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["top1"] == 1.0


def test_the_scale_of_the_logits_is_at_most_100_after_each_step(captions, pair, tmp_path):
    state, config = models.read_weights(pair / "model.pt")
    state["logit_scale"] = torch.tensor([9.0])
    models.save_weights(tmp_path / "large.pt", state, config)
    again = ["--init", tmp_path / "large.pt", "--steps", 1, "--save-every", 1]
    last_json(lit(captions, tmp_path / "run", *again))
    (scale,) = models.read_weights(tmp_path / "run" / "model.pt")[0]["logit_scale"].exp()
    assert scale == pytest.approx(100, rel=1e-6)


def test_a_pair_that_is_of_no_use_is_counted_once(captions, pair, tmp_path):
    """One picture without a caption, one that is damaged, of 72: so each is met every 9 steps."""
    path = tmp_path / "0.tar"
    with tarfile.open(captions) as old, tarfile.open(path, "w") as tar:
        for member in old:
            content = old.extractfile(member).read()
            content = {"003.txt": b" # ", "005.png": content[:40]}.get(member.name, content)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    last_json(lit(path, tmp_path / "run", "--steps", 9, "--save-every", 9, "--max-bad", 1))
    last = read_metrics(tmp_path / "run")[-1]
    assert (last["bad"], last["unlabelled"]) == (1, 1)
    ran = lit(path, tmp_path / "none", "--caption-key", "other", "--max-bad", 0.01, "--steps", 99)
    assert ran.returncode == 1 and "have no caption: all, or over --max-bad" in ran.stderr


def test_unusable_pairs_are_refused_in_one_line(captions, pair, pets, tmp_path, capsys):
    init = ["--init", weights_of(captions.parent, "16x2x2")]
    common = [
        "--task",
        "lit",
        "--text-size",
        "16x1x2",
        *TINY[8:],
        "--out",
        tmp_path / "run",
        "--data",
    ]
    assert "wants --init" in refused(capsys, *common, captions)
    assert "no captions in" in refused(capsys, *common, pets, *init)
    assert "has 72 pairs" in refused(capsys, *common, captions, *init, "--batch-size", 74)
    assert "--context 600 is over 510" in refused(
        capsys, *common, captions, *init, "--context", 600
    )
    assert "size '7x1x2'" in refused(capsys, *common, captions, *init, "--text-size", "7x1x2")
    again = [*common, captions, "--init", pair / "model.pt"]
    assert "are of size 16x1x2" in refused(capsys, *again, "--text-size", "toy")
    assert "--shared-width" in refused(capsys, *again, "--shared-width", 16)
    assert "leave --text-init out" in refused(capsys, *again, "--text-init", pair / "model.pt")
    assert "is for --task lit" in refused(capsys, *CLASSIFY, "--context", 20)
    (tmp_path / "spm.model").write_text("none")
    line = refused(capsys, *common, captions, *init, "--tokenizer", tmp_path / "spm.model")
    assert "is no tokenizer" in line or "pip install sentencepiece" in line
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------- scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder of COCO's layout: one square in each picture, of two categories by its colour."""
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "annotations").mkdir()
    for split, count in (("train", 12), ("val", 6)):
        (folder / split).mkdir()
        images, annotations = [], []
        for i in range(count):
            x, y, side = i % 4 * 4 + 2, i % 3 * 5 + 1, 14
            pixels = np.full((32, 40, 3), 200, dtype=np.uint8)
            pixels[y : y + side, x : x + side] = (250, 0, 0) if i % 2 else (0, 0, 250)
            Image.fromarray(pixels).save(folder / split / f"{i}.png")
            images.append({"id": 7 * i, "file_name": f"{i}.png", "height": 32, "width": 40})
            corners = [x, y, x + side, y, x + side, y + side, x, y + side]
            box = {"bbox": [x, y, side, side], "area": side**2, "segmentation": [corners]}
            named = {"id": i + 1, "image_id": 7 * i, "category_id": 3 + 2 * (i % 2), "iscrowd": 0}
            annotations.append(box | named)
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": 5, "name": "red"}, {"id": 3, "name": "blue"}]
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


DETECT = ["--task", "detect", "--size", "toy", "--image-size", 32, "--batch-size", 4]
DETECT += ["--steps", 4, "--save-every", 2, "--log-every", 1, "--workers", 0, "--min-jitter", 0.9]


@pytest.fixture(scope="module")
def detector(scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("detect") / "run"
    return out, last_json(fine(*DETECT, "--data", scenes, "--out", out))


@WAYS
def test_detection_is_the_same_in_pieces_and_on_two_processes(
    processes, extra, scenes, detector, tmp_path
):
    last_json(fine(*DETECT, "--data", scenes, "--out", tmp_path, *extra, processes=processes))
    for ours, theirs in zip(read_metrics(tmp_path), read_metrics(detector[0]), strict=True):
        for name in ("loss", "lr", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_the_recipe_of_detection_is_vitdets(scenes, detector, tmp_path):
    def prepared(*arguments):
        arguments = "--task", "detect", "--data", scenes, *arguments
        run = finetune.parse_arguments(list(map(str, arguments)))
        finetune.prepare(run)
        return run

    for size, expected in {
        "B": (1e-4, 0.7, 0.1, 100),
        "L": (1e-4, 0.8, 0.4, 100),
        "H": (1e-4, 0.9, 0.5, 75),
        "2B": (1e-4, 0.8, 0.5, 75),
    }.items():
        run = prepared("--size", size)
        assert (run.lr, run.layer_decay, run.drop_path, run.epochs) == expected
        assert (run.batch_size, run.weight_decay, run.image_size) == (64, 0.1, (1024, 1024))
        assert run.jitter == (0.1, 2.0) and run.decay_floor == 0
    assert prepared("--size", "B", "--batch-size", 32).lr == 5e-5
    toy = [prepared("--size", "toy", *batch) for batch in ([], ["--batch-size", 8])]
    assert [(run.batch_size, run.lr) for run in toy] == [(2, 1e-3), (8, 1e-3)]
    # LVIS: 156,250 steps, drops at 138,889 and 150,463.
    steps = 0, 125, 250, 138_888, 138_889, 150_462, 150_463
    found = [detect.vitdet_schedule(step, 156_250, 0) for step in steps]
    assert found == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.1, 0.01])
    # After hashtags, of which the head tells, no layer has less than a tenth.
    for kind, floor in ((models.ViT, 0), (models.Classifier, 0.1)):
        model = kind("16x40x2", image_size=8, patch_size=4)
        models.save_weights(tmp_path / "model.pt", model.state_dict(), model.config)
        run = prepared("--init", tmp_path / "model.pt")
        assert run.decay_floor == floor
        groups = finetune.layer_groups(model, 0.1, 0.9, run.decay_floor)
        assert min(group["lr_scale"] for group in groups) == (floor or pytest.approx(0.9**41))
    groups = finetune.layer_groups(model, 0.1, 0.9, all_decayed=True)
    assert {group["weight_decay"] for group in groups} == {0.1}
    # Positions are trained, too.
    content = torch.load(detector[0] / "model.pt", weights_only=True)
    state, config = content["model"], content["config"]
    fixed = models.sincos_positions(192, (4, 4))
    assert config["positions"] == "learned"
    assert 0 < (state["trunk.pos_embed"] - fixed)[:, 1:].abs().max() < 0.1


def test_detection_resumes_and_is_measured_alike_by_evaluate(scenes, detector, tmp_path, capsys):
    out, found = detector
    assert {"bbox_AP", "segm_AP", "bbox_AR100"} <= found.keys() and (
        out / "detections.png"
    ).exists()
    rewound(out, tmp_path / "run", 2)
    assert "going on from" in fine(*DETECT, "--data", scenes, "--out", tmp_path / "run").stdout
    assert read_metrics(tmp_path / "run") == read_metrics(out)
    measured = []
    for checkpoint in (out / "model.pt", tmp_path / "results.json"):
        asked = ["--task", "detect", "--checkpoint", checkpoint, "--data", scenes, "--workers", 0]
        asked += ["--out", tmp_path / "a.png"]
        asked += ["--results", tmp_path / "results.json"] if checkpoint.suffix == ".pt" else []
        evaluate.main(list(map(str, asked)))
        measured.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    shutil.copytree(scenes, tmp_path / "others")
    for path in (tmp_path / "others" / "annotations").iterdir():
        path.write_text(path.read_text().replace("red", "green"))
    asked = ["--task", "detect", "--checkpoint", out / "model.pt", "--data"]
    folder, weights = tmp_path / "others", torch.load(out / "model.pt", weights_only=True)
    weights["model"].popitem()
    torch.save(weights, tmp_path / "part.pt")
    for more, why in (
        ([folder], "has other classes than"),
        (
            [scenes, "--checkpoint", tmp_path / "part.pt"],
            "part.pt is damaged, or another version's",
        ),
        ([scenes, "--results", tmp_path / "results.json"], "results.json exists"),
        ([scenes, "--results", tmp_path / "none" / "r.json"], "there is no such folder"),
        ([scenes, "--out", tmp_path / "a.txt"], "a.txt is no .png"),
        ([scenes, "--labels", tmp_path / "a.csv"], "--labels is for --task"),
    ):
        with pytest.raises(SystemExit):
            evaluate.main(list(map(str, [*asked, *more])))
        assert why in capsys.readouterr().err.splitlines()[-1]
    for name in found.keys() - {"task"}:
        assert measured[0][name] == pytest.approx(found[name], rel=1e-6)
        assert measured[1][name] == pytest.approx(measured[0][name], rel=1e-6)
    # Only what is measured on is opened, and it must be of the detector's classes.
    val = tmp_path / "instances_val.json"
    shutil.copy(scenes / "annotations" / val.name, val)
    shutil.copytree(scenes / "val", tmp_path / "val")
    asked = ["--task", "detect", "--checkpoint", str(out / "model.pt"), "--workers", "0", "--data"]
    evaluate.main([*asked, str(val)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bbox_AP"] == found["bbox_AP"]
    val.write_text(val.read_text().replace("red", "pink"))
    with pytest.raises(SystemExit):
        evaluate.main([*asked, str(val)])
    assert "model.pt (2: blue, red ...)" in capsys.readouterr().err


def test_a_detector_goes_on_with_other_data(scenes, detector, tmp_path):
    """Of the same classes all weights are kept; of others, what tells them apart is new."""
    init = ["--init", detector[0] / "model.pt", "--steps", 1, "--save-every", 1]
    common = [*DETECT[:2], *DETECT[6:], *init, "--data"]  # size and image size are the detector's
    run = finetune.parse_arguments([*map(str, common), str(scenes)])
    finetune.prepare(run)
    assert run.weights[0].keys() == detect.read_detector(init[1])[0].keys()
    shutil.copytree(scenes, tmp_path / "other")
    for path in (tmp_path / "other" / "annotations").iterdir():
        path.write_text(path.read_text().replace("red", "pink"))
    done = fine(*common, tmp_path / "other", "--out", tmp_path / "run")
    last_json(done)
    assert "newly initialised: boxes.class_predictor, mask.predictor, dropped: none" in done.stdout
    config = torch.load(tmp_path / "run" / "model.pt", weights_only=True)["config"]
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
    config = torch.load(tmp_path / "run" / "model.pt", weights_only=True)["config"]
    assert config["class_counts"] == [6, 6] and config["detections"] == 300


def test_unreadable_scenes_are_counted_and_capped(scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "scenes")
    common = [*DETECT, "--data", tmp_path / "scenes", "--out"]
    (tmp_path / "scenes/train/3.png").write_text("no picture")
    last_json(fine(*common, tmp_path / "one"))
    last = read_metrics(tmp_path / "one")[-1]
    assert last["bad"] > 0 == last["unlabelled"]
    for i in range(12):
        (tmp_path / f"scenes/train/{i}.png").write_text("no picture")
    done = fine(*common, tmp_path / "all")
    assert done.returncode == 1 and "of 4 pictures 4 cannot be read" in done.stderr


def test_unusable_scenes_are_refused_in_one_line(scenes, pets, tmp_path, capsys):
    common = ["--task", "detect", "--size", "toy", "--out", tmp_path / "run", "--data"]
    assert "there must be one" in refused(capsys, *common, pets)
    assert "a square" in refused(capsys, *common, scenes, "--image-size", "32x48")
    assert "two patches of 8" in refused(capsys, *common, scenes, "--image-size", 8)
    assert "--data is empty" in refused(capsys, *common, "")
    assert "leave --val-data out" in refused(capsys, *common, "toy", "--val-data", scenes)
    train = scenes / "annotations" / "instances_train.json"  # it would be measured on, too
    assert "give --val-data" in refused(capsys, *common, train)
    jitter = ["--min-jitter", 2, "--max-jitter", 1]
    assert "is over --max-jitter" in refused(capsys, *common, scenes, *jitter)
    assert "is for --task" in refused(capsys, *common, scenes, "--mixup", 1)
    assert not (tmp_path / "run").exists()
