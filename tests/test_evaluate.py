"""evaluate.py: metrics against other formulations, and each task as a user runs it.

Pictures are noise around a colour of their class: accuracies are neither 0 nor 1.
"""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    RECTANGLE,
    evaluated,
    large_pictures,
    picture_tensor,
    save_model,
    stage,
    write_picture,
    write_tar,
)
from PIL import Image

import data
import evaluate
from model import MAE, Classifier, ViT, encoder_config, initialize, save_weights, tag_loss
from support import pack, probe
from support.convert import convert
from support.hashtags import Vocabulary
from weak_pretrain import make_sample

CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu")


def write_classes(root, counts, first_seed):
    colours = np.random.RandomState(5).randint(100, 156, (len(CLASSES), 3))
    for number, (name, count) in enumerate(zip(CLASSES, counts)):
        for i in range(count):
            write_picture(root / name / f"{i}.png", first_seed + 100 * number + i, colours[number])


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """33 pictures in train/, from 2 to 8 of each of 7 classes, and 21 in val/."""
    root = tmp_path_factory.mktemp("labelled")
    write_classes(root / "train", (8, 7, 6, 4, 3, 3, 2), 0)
    write_classes(root / "val", (3,) * 7, 5000)
    return root


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "model.pt"
    return SimpleNamespace(path=path, model=save_model(path))


def refused(capsys, *arguments):
    """The line that refuses these arguments with exit status 2, and stderr before it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    *before, line = captured.err.splitlines()
    assert line.startswith("evaluate.py: ") and '"task"' not in captured.out
    return line, before


def features_one_by_one(model, root, how="mean"):
    """{path: (D,) float64} of the pictures below root/CLASS/, one forward pass for each."""
    found = {}
    for path in sorted(Path(root).glob("*/*.png")):
        with torch.inference_mode():
            tokens = model(data.normalize(picture_tensor(path)))[0].double().numpy()
        found[str(path)] = tokens[0] if how == "cls" else tokens[1:].mean(axis=0)
    return found


def standardized_by_hand(model, folder, how="mean"):
    """(train, labels, val, labels) in numpy, from features_one_by_one."""
    columns = []
    for split in ("train", "val"):
        found = features_one_by_one(model, Path(folder, split), how)
        columns += [np.stack(list(found.values()))]
        columns += [np.array([CLASSES.index(Path(key).parent.name) for key in found])]
    train, labels, val, val_labels = columns
    mean = train.sum(axis=0) / len(train)
    deviation = np.sqrt(((train - mean) ** 2).sum(axis=0) / len(train))
    return (train - mean) / deviation, labels, (val - mean) / deviation, val_labels


def ridge_by_least_squares(train, labels, test, classes):
    """Ridge as least squares with one more row, sqrt(L2), for each penalised weight."""
    samples, width = train.shape
    penalty = np.sqrt(evaluate.RIDGE) * np.eye(width)
    matrix = np.block([[train, np.ones((samples, 1))], [penalty, np.zeros((width, 1))]])
    targets = np.zeros((samples + width, classes))
    targets[np.arange(samples), labels] = 1
    weights = np.linalg.lstsq(matrix, targets, rcond=None)[0]
    return np.hstack([test, np.ones((len(test), 1))]) @ weights


def nearest_by_hand(train, labels, sample):
    """{class: (votes, summed similarity)} of the NEIGHBOURS most similar rows."""
    cosines = train @ sample / np.linalg.norm(train, axis=1) / np.linalg.norm(sample)
    votes = {}
    for row in np.argsort(-cosines)[: evaluate.NEIGHBOURS]:
        count, total = votes.get(int(labels[row]), (0, 0.0))
        votes[int(labels[row])] = count + 1, total + cosines[row]
    return votes


def share_in_top(scores, labels, k):
    """Share of rows in which fewer than k other classes score higher than the label's."""
    hits = [sum(row > row[label]) < k for row, label in zip(np.asarray(scores), labels)]
    return sum(hits) / len(hits)


# ---------------------------------------------------------------------------------------- protocols


def test_hit_rates_and_losses_of_tags_by_hand(tmp_path, capsys):
    """Three pictures, black with two tags, white with one and with no known tag; one is damaged."""
    tags = {"0.png": ["#b", "#c"], "1.png": ["#g"], "2.png": ["#unknown"], "3.png": ["#a"]}
    for number, grey in enumerate((0, 255, 255)):
        Image.new("RGB", (8, 8), (grey,) * 3).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"no picture")
    lines = [json.dumps({"path": name, "hashtags": found}) for name, found in tags.items()]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    source = data.Folder(str(tmp_path), labels=str(tmp_path / "labels.jsonl"))
    vocabulary = Vocabulary(dict.fromkeys("abcdefg", 1), {})
    make = partial(make_sample, size=(8, 8), channels=3, vocabulary=vocabulary)
    falling = torch.arange(6.0, -1, -1)  # a first, then b to f, and g last

    class Model(torch.nn.Module):  # of black it says c, of white all
        def forward(self, images):
            logits = torch.stack([torch.tensor([0.0, 0, 2, 0, 0, 0, 0]), falling])
            return logits[(images.mean(dim=(1, 2, 3)) > 0).long()]

    measured = partial(evaluate.hit_rates, Model(), data.Batches(source, make, 4))
    options = {"criterion": tag_loss, "constant": falling / 2}
    rates, count, losses = measured(torch.device("cpu"), "tags", **options)
    assert count == 2 and rates == [(1 / 2, 1 / 2), (0, 1 / 2)]  # the constant: b and c are among 5
    said_c, said_all = np.log(6 + np.exp(2)) - 2 / 2, np.log(np.exp(range(7)).sum())
    constant = np.log(np.exp(np.arange(7) / 2).sum())
    constant = (constant - (5 / 2 + 4 / 2) / 2) / 2 + constant / 2  # b and c; g
    assert losses == pytest.approx([(said_c + said_all) / 2, constant], rel=1e-6)
    assert "3.png" in capsys.readouterr().err


@pytest.mark.parametrize("samples, width", [(40, 7), (9, 30), (1, 3)])
def test_ridge_is_least_squares_with_a_row_for_each_penalised_weight(samples, width):
    draw = np.random.RandomState(samples)
    train, test = draw.randn(samples, width) + 3, draw.randn(11, width) + 3
    labels = draw.randint(0, 4, samples)
    scores = evaluate.ridge(*map(torch.from_numpy, (train, labels, test)), classes=5)
    # float64, and the penalty bounds the condition number: below 1e3
    expected = ridge_by_least_squares(train, labels, test, 5)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=0, atol=1e-9)
    assert scores.dtype == torch.float64


def test_standardize_uses_the_mean_and_deviation_of_train_alone():
    """By hand: mean 4, deviation sqrt((9 + 1 + 1 + 9) / 4); a constant column is 0."""
    train = torch.tensor([[1.0, 7.0], [3.0, 7.0], [5.0, 7.0], [7.0, 7.0]])
    x, x_test = evaluate.standardize(train, torch.tensor([[4.0, 7.0], [14.0, 7.0]]))
    assert x.dtype == x_test.dtype == torch.float64
    first = torch.tensor([-3, -1, 1, 3, 0, 10]).double() / 5**0.5
    expected = torch.stack([first, torch.zeros(6).double()], dim=1)
    torch.testing.assert_close(torch.cat([x, x_test]), expected, rtol=0, atol=1e-12)


def test_nearest_is_a_vote_of_the_most_similar_by_cosine():
    """Most votes first; among classes of as many votes, the more similar one."""
    draw = np.random.RandomState(1)
    lengths = np.exp(draw.randn(200, 1) * 2)  # cosine must not see them
    train, labels = draw.randn(200, 4) * lengths, draw.randint(0, 6, 200)
    test, ties = draw.randn(1100, 4), 0  # 1024 at once
    votes = evaluate.nearest(*map(torch.from_numpy, (train, labels, test)), classes=6)
    for row, sample in [*zip(votes, test)][::20]:
        expected = nearest_by_hand(train, labels, sample)
        order = sorted(expected, key=expected.get, reverse=True)
        assert row.argsort(descending=True)[: len(order)].tolist() == order
        counts = [expected.get(c, (0, 0))[0] for c in range(6)]
        assert [round(value) for value in row.tolist()] == counts
        ties += len({*counts} - {0}) < len(expected)
    assert ties > 20  # the tie rule was put to the test


def test_accuracy_counts_labels_among_the_k_highest():
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.3, 0.1, 0.6], [0.2, 0.5, 0.3]])
    labels = torch.tensor([1, 1, 1, 0])  # the label's rank is 1, 2, 3 and 3
    found = [evaluate.accuracy(scores, labels, k) for k in (1, 2, 3, 5)]
    assert found == [0.25, 0.5, 1.0, 1.0]


def test_few_shot_splits_have_as_many_of_each_class_and_depend_on_the_seed_alone():
    labels = torch.tensor(np.random.RandomState(0).permutation([0] * 9 + [2] * 5 + [7] * 2))
    for shots in (1, 3, 5, 100):
        chosen = probe.few_shot_split(labels, shots, seed=4)
        assert len(set(chosen.tolist())) == len(chosen)
        counts = torch.bincount(labels[chosen], minlength=8).tolist()
        assert counts == [min(shots, n) for n in (9, 0, 5, 0, 0, 0, 0, 2)]
    labels = torch.arange(300) % 3
    splits = [probe.few_shot_split(labels, 5, seed) for seed in range(20)]
    torch.manual_seed(99), np.random.seed(99), torch.rand(7)
    assert torch.equal(splits[0], probe.few_shot_split(labels, 5, seed=0))
    assert len({tuple(sorted(split.tolist())) for split in splits}) == 20
    # All are as likely: 300 draws, whose mean place is 149.5 +- 5.
    assert abs(torch.cat(splits).double().mean() - 149.5) < 30


# ----------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("batch_size, workers", [(1, 0), (3, 0), (8, 0), (5, 2), (64, 2)])
def test_extract_gives_what_one_picture_at_a_time_gives(batch_size, workers, labelled, encoder):
    source = data.Folder(str(labelled / "train"))
    functions = {"tokens": evaluate.pooled(encoder.model, "mean")}
    functions["pixels"] = lambda images: images.flatten(1)
    options = {"batch_size": batch_size, "workers": workers}
    features, labels, rows = evaluate.extract(functions, source, encoder.model.config, **options)
    assert labels.dtype == rows.dtype == torch.int64
    keys = [source.name(number) for number in rows.tolist()]
    expected = features_one_by_one(encoder.model, labelled / "train")
    assert sorted(keys) == sorted(expected) and len(keys) == 33
    wanted = np.stack([expected[key] for key in keys])
    # float32 through two layers, values of about 1: batches may be summed in another order
    np.testing.assert_allclose(features["tokens"].numpy(), wanted, rtol=0, atol=2e-5)
    assert np.abs(wanted[0] - wanted[1]).max() > 0.01  # pictures do differ by more than that
    pixels = [data.normalize(picture_tensor(key)).flatten() for key in keys]
    assert torch.equal(features["pixels"], torch.stack(pixels))
    assert [CLASSES[label] for label in labels] == [Path(key).parent.name for key in keys]


def arrays(path):
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def test_two_processes_give_what_one_gives(labelled, encoder, unreadable, tmp_path):
    shared = ["--checkpoint", encoder.path, "--workers", 0, "--batch-size", 6]
    for task in ("knn", "fewshot"):
        flags = "--task", task, *shared, "--data", labelled
        ran = stage(*flags, processes=2, program="evaluate.py")
        assert ran.stdout == evaluated(task, encoder.path, labelled)[1]  # one speaks for all
    # What is left out is left out on both.
    common = ["--split", "train", "--max-bad", 0.5, "--out"]
    evaluated("features", encoder.path, unreadable, *common, tmp_path / "one.npz")
    flags = "--task", "features", *shared, "--data", unreadable, *common, tmp_path / "two.npz"
    assert stage(*flags, processes=2, program="evaluate.py").returncode == 0
    one, two = arrays(tmp_path / "one.npz"), arrays(tmp_path / "two.npz")
    for name in ("keys", "labels", "classes"):
        assert np.array_equal(one[name], two[name])
    np.testing.assert_allclose(one["features"], two["features"], rtol=0, atol=2e-5)
    readable = {path.relative_to(labelled) for path in labelled.glob("train/*/*")}
    assert {Path(key).relative_to(unreadable) for key in two["keys"]} == readable


@pytest.mark.parametrize("task", ["reconstruct", "attention"])
def test_pictures_are_drawn_by_one_process_and_one_says_so(task, tmp_path):
    flags = "--task", task, "--checkpoint", "none.pt", "--out", tmp_path / "a.png"
    ran = stage(*flags, processes=2, program="evaluate.py")
    assert ran.returncode == 2 and ran.stdout == "" and not any(tmp_path.iterdir())
    assert len(ran.stderr.splitlines()) == ran.stderr.count("draws on one process") == 1


# ---------------------------------------------------------------------- bad pictures, missing labels


@pytest.fixture(scope="module")
def unreadable(labelled, tmp_path_factory):
    """`labelled` with three more files in train/ that are no pictures, and one in val/."""
    root = tmp_path_factory.mktemp("unreadable") / "pictures"
    shutil.copytree(labelled, root)
    whole = (root / "train" / "ant" / "0.png").read_bytes()
    (root / "train" / "ant" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "train" / "gnu" / "empty.jpg").write_bytes(b"")
    (root / "train" / "gnu" / "text.png").write_text("this is not a picture")
    (root / "val" / "bee" / "noise.jpg").write_bytes(bytes(range(256)))
    return root


def test_unreadable_pictures_are_named_and_left_out(unreadable, labelled, encoder, capsys):
    for task in ("knn", "fewshot"):
        expected, _ = evaluated(task, encoder.path, labelled)
        capsys.readouterr()
        result, _ = evaluated(task, encoder.path, unreadable, "--max-bad", 3 / 36)
        assert result == expected  # as if they had never been there
        lines = sorted(capsys.readouterr().err.splitlines())
        for name, line in zip(
            ("ant/cut.png", "gnu/empty", "gnu/text", "bee/noise"), lines, strict=True
        ):
            assert name in line


def test_pictures_of_too_many_pixels_are_unreadable(encoder, tmp_path, capsys, monkeypatch):
    """(Over twice the limit, because pytest takes the filter of warnings away.)"""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", data.MAX_PIXELS)
    for split in ("train", "val"):
        flags = large_pictures(tmp_path, split)
    flags = ["--task", "knn", "--checkpoint", encoder.path, "--workers", 0, *flags]
    for path in sorted(tmp_path.rglob("*.png")):
        Image.new("RGB", (500, 300)).save(path)
    evaluate.main(list(map(str, [*flags, "--max-pixels", 150_000])))
    line, before = refused(capsys, *flags, "--max-pixels", 70_000)
    assert "cannot be read" in line
    assert before[0].endswith("150000 pixels are over --max-pixels 70000")


def test_over_max_bad_the_run_stops(unreadable, encoder, tmp_path, capsys):
    flags = ["--task", "knn", "--checkpoint", encoder.path, "--data", unreadable, "--workers", 0]
    for limit in ([], ["--max-bad", 0.08], ["--max-bad", 0]):
        line, before = refused(capsys, *flags, *limit)
        assert "3 of 36" in line and "--max-bad" in line and len(before) == 3  # their names
    # A folder without train/ and val/ is all of it.
    (tmp_path / "some").mkdir()
    write_picture(tmp_path / "some" / "a.png", 1, (90, 60, 30))
    out = ["--out", tmp_path / "some.npz"]
    printed = evaluated("features", encoder.path, tmp_path / "some", *out)[1]
    assert (
        "all of it is used" in printed and arrays(tmp_path / "some.npz")["features"].shape[0] == 1
    )
    # What can be read is written, and the others are marked.
    flags = ["--task", "features", *flags[2:], "--split", "train", "--out", tmp_path / "train.npz"]
    assert "3 of 36" in refused(capsys, *flags)[0]
    found = arrays(tmp_path / "train.npz")
    assert len(found["features"]) == len(found["keys"]) == 33
    assert sorted(Path(name).name for name in found["unreadable"]) == [
        "cut.png", "empty.jpg", "text.png"
    ]  # fmt: skip
    # One alone is never fatal: 1 of the 22 in val.
    evaluated("features", encoder.path, unreadable, "--out", tmp_path / "features.npz")


def test_samples_without_a_label_are_left_out(labelled, encoder, tmp_path):
    def shard(name, split, without=()):
        members = []
        for number, path in enumerate(sorted((labelled / split).glob("*/*"))):
            label = str(CLASSES.index(path.parent.name)).encode()
            members.append((f"{number:05}.png", path.read_bytes()))
            members.append((f"{number:05}.cls", label))
        members = [member for member in members if not member[0].startswith(without)]
        return write_tar(tmp_path / name, members)

    every_fourth = [f"{number:05}." for number in range(0, 33, 4)]
    some = shard("some.tar", "train", tuple(f"{key}cls" for key in every_fourth))
    kept = shard("kept.tar", "train", tuple(every_fourth))
    flags = ("--val-data", shard("val.tar", "val"))
    for task in ("knn", "fewshot"):
        found, printed = evaluated(task, encoder.path, some, *flags)
        assert "9 samples without a label" in printed and "24 train and 21 val" in printed
        expected, printed = evaluated(task, encoder.path, kept, *flags)
        assert "without a label" not in printed and found == expected


# -------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("how", ["mean", "cls"])
def test_knn_is_the_vote_of_neighbours_of_standardised_features(how, labelled, encoder):
    result, printed = evaluated("knn", encoder.path, labelled, "--pool", how)
    train, labels, val, val_labels = standardized_by_hand(encoder.model, labelled, how)
    top1 = top5 = may_be = 0
    for sample, label in zip(val, val_labels):
        votes = nearest_by_hand(train, labels, sample)
        best = sorted(votes, key=votes.get, reverse=True)[:5]
        top1, top5 = top1 + (best[0] == label), top5 + (label in best)
        may_be += label not in votes and len(votes) < 5  # by chance, without a vote
    assert result["top1"] == top1 / 21
    assert top5 / 21 <= result["top5"] <= (top5 + may_be) / 21
    assert set(result) == {"top1", "top5"} and "33 train and 21 val" in printed
    assert 0 < result["top1"] < 1  # the pictures are neither trivial nor hopeless


def test_fewshot_is_ridge_on_the_printed_splits(labelled, encoder):
    result, _ = evaluated("fewshot", encoder.path, labelled, "--shots", "2,1000,all")
    train, labels, val, val_labels = standardized_by_hand(encoder.model, labelled)
    scores = ridge_by_least_squares(train, labels, val, 7)
    for name, k in (("top1", 1), ("top5", 5)):
        assert result[name]["all"] == share_in_top(scores, val_labels, k)
        # More shots than any class has mean all of them.
        assert result[name]["1000"] == pytest.approx(result[name]["all"], abs=1e-12)
    assert result["top1_std"]["all"] == result["top1_std"]["1000"] == 0
    assert 1 / 7 < result["top1"]["all"] < 1 and result["top1"]["2"] < result["top1"]["all"]
    # The splits are drawn in the order in which the source gives its samples.
    source = data.Folder(str(labelled / "train"))
    place = {key: i for i, key in enumerate(features_one_by_one(encoder.model, source.root))}
    rows, tops = np.array([place[source.name(i)] for i in range(33)]), []
    for seed in range(5):
        split = probe.few_shot_split(torch.from_numpy(labels[rows]), 2, seed).numpy()
        scores = ridge_by_least_squares(train[rows][split], labels[rows][split], val, 7)
        tops.append([share_in_top(scores, val_labels, k) for k in (1, 5)])
    # Means of five fractions of 21: whatever rounds, it is the last bit of a float64.
    (top1, top5), (std, _) = np.mean(tops, axis=0), np.std(tops, axis=0)
    for name, expected in (("top1", top1), ("top5", top5), ("top1_std", std)):
        assert result[name]["2"] == pytest.approx(expected, abs=1e-12) and expected > 0
    default, printed = evaluated("fewshot", encoder.path, labelled)
    assert list(default["top1"]) == ["1", "5", "10", "all"] and "seeds 0 to 4" in printed


@pytest.mark.parametrize("split, how", [("val", "mean"), ("train", "cls")])
def test_features_are_written_once_with_their_keys_and_labels(
    split, how, labelled, encoder, tmp_path, capsys
):
    out = tmp_path / "out.npz"
    flags = ("--out", out, "--split", split, "--pool", how)
    result, _ = evaluated("features", encoder.path, labelled, *flags)
    expected, found = features_one_by_one(encoder.model, labelled / split, how), arrays(out)
    assert result == {"samples": len(expected), "width": 24, "out": str(out)}
    assert sorted(found) == ["classes", "features", "keys", "labels", "unreadable"]
    assert found["unreadable"].size == 0
    assert sorted(found["keys"]) == sorted(expected)
    wanted = np.stack([expected[key] for key in found["keys"]])
    np.testing.assert_allclose(found["features"], wanted, rtol=0, atol=2e-5)
    assert found["features"].dtype == np.float32 and found["classes"].tolist() == list(CLASSES)
    names = [Path(key).parent.name for key in found["keys"]]
    assert [CLASSES[label] for label in found["labels"]] == names
    before = out.read_bytes()
    flags = ("--checkpoint", encoder.path, "--data", labelled, "--out", out)
    line, others = refused(capsys, "--task", "features", *flags)
    assert "exists" in line and not others and out.read_bytes() == before
    assert [*tmp_path.iterdir()] == [out]


def test_features_need_no_labels_and_numbered_folders_have_their_order(labelled, encoder, tmp_path):
    flags = ("--split", "train", "--out")
    evaluated("features", encoder.path, labelled / "val" / "ant", *flags, tmp_path / "flat.npz")
    found = arrays(tmp_path / "flat.npz")
    assert found["labels"].tolist() == [-1] * 3 and found["classes"].shape == (0,)
    names = ["0", "1", "2", "10", "11"]
    for name in names:
        write_picture(tmp_path / "numbered" / name / "a.png", 0, 100)
    evaluated("features", encoder.path, tmp_path / "numbered", *flags, tmp_path / "out.npz")
    found = arrays(tmp_path / "out.npz")
    assert found["classes"].tolist() == names
    for key, label in zip(found["keys"], found["labels"]):
        assert names[label] == Path(key).parent.name


def test_probe_compares_trained_untrained_and_raw_pixels(labelled, photos, capsys):
    model = MAE("24x2x2", decoder=(16, 1, 2), **RECTANGLE)
    initialize(model, 3)
    state, config = model.state_dict(), model.config
    sources = data.open_sources(str(labelled), None, RECTANGLE["image_size"])
    evaluate.print_probe(state, config, *sources, 11)
    printed = capsys.readouterr().out.splitlines()
    assert "33 labels, 21 held-out pictures" in printed[0]
    trained, untrained = (ViT(**encoder_config(config)).eval() for _ in range(2))
    trained.load_state_dict({name: state[name] for name in trained.state_dict()})
    initialize(untrained, 11)
    for name, encoder in (("untrained", untrained), ("trained", trained)):
        train, labels, val, val_labels = standardized_by_hand(encoder, labelled)
        scores = ridge_by_least_squares(train, labels, val, 7)
        (line,) = (line for line in printed if line.split()[0] == name)
        assert line.split()[-1] == f"{share_in_top(scores, val_labels, 1):.1%}"
    assert sum("raw pixels" in line for line in printed) == 1
    assert "  one class    top-1 14.3%" in printed  # 3 of 21
    evaluate.print_probe(state, config, *sources, 11, samples=35)  # of 54 pictures
    assert capsys.readouterr().out.endswith("it would take longer than the training\n")
    sources = data.hold_out(data.Folder(str(photos)), None, 2)
    evaluate.print_probe(state, config, *sources, 0)
    assert capsys.readouterr().out == "linear probe: left out, for want of labels\n"


# -------------------------------------------------------------------------------------- checkpoints


def test_a_bare_dict_of_named_tensors_is_enough(tmp_path, labelled):
    """As public checkpoints are, of square pictures. A head is dropped: that is printed."""
    model = save_model(tmp_path / "own.pt", size="toy", image_size=16, patch_size=4)
    expected, _ = evaluated("fewshot", tmp_path / "own.pt", labelled, "--shots", "all")
    head = {"head.weight": torch.zeros(5, 128), "head.bias": torch.zeros(5)}
    for content in (model.state_dict(), {"model": {**model.state_dict(), **head}}):
        torch.save(content, tmp_path / "bare.pt")
        result, printed = evaluated("fewshot", tmp_path / "bare.pt", labelled, "--shots", "all")
        assert result == expected and ("dropped: head" in printed) == ("model" in content)


# ----------------------------------------------------------------------------------------- classify


@pytest.fixture
def classifier(tmp_path):
    """A function that writes a classifier which answers by the mean colour of a picture:
    the class answers[i] of `classes`, where channel i is the highest."""

    def write(names, answers=(0, 1, 2), classes=3):
        settings = {"pool": "mean", "class_names": names, "image_size": 8, "patch_size": 8}
        model = Classifier("16x1x2", classes=classes, **settings)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            model.fc_norm.weight.fill_(1.0)
            for channel, answer in enumerate(answers):  # the sums of the three colours
                model.patch_embed["proj"].weight[channel, channel] = 1.0
                model.head.weight[answer, channel] = 1.0
        save_weights(tmp_path / "model.pt", model.state_dict(), model.config)
        return tmp_path / "model.pt"

    return write


def colour(channel, light=200):
    """A picture of 8 x 8 in which one channel is the highest."""
    return Image.new("RGB", (8, 8), tuple(light if c == channel else 40 for c in range(3)))


def classified(checkpoint, folder, *flags):
    return evaluated("classify", checkpoint, folder, *flags)[0]


def coloured(folder, classes):
    """A folder of one red, two green and three blue pictures in classes of these names, one
    string; "-" stands for a class that is not there."""
    for channel, name in enumerate(classes.split()):
        for i in range(channel + 1 if name != "-" else 0):
            (folder / name).mkdir(parents=True, exist_ok=True)
            colour(channel, 200 + i).save(folder / name / f"val_{channel}{i}.png")
    return folder


AS_PLACES = "3 classes without names: the data's class N is number N of them, from 0"
IN_ORDER = "3 classes without names: taken for the data's, in its order"
OF_IMAGENET = "classes without names: taken for ImageNet's, in the order of their wnids"
SHARED = "classes that share their names (1): crane"
COLOURS, CRANES = ["red", "green", "blue"], ["crane", "ox", "yak", "crane"]
WNIDS = "n02123045 n01440764 n15075141"  # a tabby cat, a tench, toilet tissue


@pytest.mark.parametrize(
    "folders, head, label_map, top1, pictures, words",
    [
        # By their names: the data numbers them blue, green, red.
        ("red green blue", (COLOURS,), None, 1, 6, ""),
        # Red is right; blue is called red by the map, and the answer is blue; green is not in it.
        ("rouge vert bleu", (COLOURS,), {"rouge": ["green", "red"], "bleu": 0}, 0.25, 4, ""),
        # Without names, by numbers or by their order.
        ("0 1 2", (None,), None, 1, 6, ""),
        ("0 - 2", (None,), None, 1, 4, AS_PLACES),  # a number is no place among the folders
        ("0 1 10", (None,), None, 1, 6, IN_ORDER),  # no class 10, but as many folders
        ("1 2 3", (None,), None, 1, 6, IN_ORDER),
        ("1 2 -", (None,), None, 0, 3, AS_PLACES),
        ("a b c", (None,), None, 1, 6, IN_ORDER),
        ("0 - 10", (None,), {"0": 0, "10": 2}, 1, 4, ""),
        ("b - c", (None, (0, 1, 2), 1000), {"b": 0, "c": 2}, 1, 4, ""),
        # Checkpoints keep their names: what was once sorted as texts is not relabelled.
        ("10 2 0", (["0", "10", "2"], (1, 2, 0)), None, 1, 6, ""),
        ("10 2 0", (["0", "2", "10"], (2, 1, 0)), None, 1, 6, ""),
        # Some of the folders of ImageNet's 1,000 or 21,841 classes.
        (WNIDS, (None, (281, 0, 999), 1000), None, 1, 6, OF_IMAGENET),
        (WNIDS, (None, (0, 1, 2), 1000), None, 0, 6, OF_IMAGENET),
        ("n01484850 n01440764 -", (None, (460, 359, 0), 21841), None, 1, 3, OF_IMAGENET),
        # ImageNet has two cranes: where the data has one of that name, either is right.
        ("crane ox yak", (CRANES, (0, 1, 2), 4), None, 1, 6, SHARED),
        ("crane ox yak", (CRANES, (3, 1, 2), 4), None, 1, 6, SHARED),
        ("a ox yak", (CRANES, (3, 1, 2), 4), {"a": "crane", "ox": "ox", "yak": 2}, 1, 6, SHARED),
    ],
)
def test_classes_of_the_data_are_those_of_the_head(
    folders, head, label_map, top1, pictures, words, classifier, tmp_path
):
    (tmp_path / "map.json").write_text(json.dumps(label_map))
    flags = ["--label-map", tmp_path / "map.json"] if label_map else []
    folder = coloured(tmp_path / "pictures", folders)
    found, printed = evaluated("classify", classifier(*head), folder, *flags)
    assert (found["top1"], found["pictures"]) == (top1, pictures) and words in printed
    assert ("without names" in printed or "share their names" in printed) == bool(words)


@pytest.mark.parametrize(
    "folders, classes, words",
    [
        ("0 - 10", 3, "has 3 classes and no names for them, the data has 2"),
        ("b - c", 1000, "has 1000 classes and no names for them, the data has 2"),
        # A teddy bear.
        ("n01484850 n04399382", 21841, "knows no n04399382 (1 of the data's classes)"),
    ],
)
def test_folders_that_cannot_be_matched_want_a_map(
    folders, classes, words, classifier, tmp_path, capsys
):
    pictures, checkpoint = coloured(tmp_path / "p", folders), classifier(None, (0, 1, 2), classes)
    flags = ["--task", "classify", "--checkpoint", checkpoint, "--data", pictures]
    assert f"{words}: give --label-map" in refused(capsys, *flags)[0]


def packed(folder):
    pack.pack(str(folder), f"{folder}-%d.tar")
    return f"{folder}-*.tar"


def listed(folder):
    """Pictures of one folder, and a file of their classes: what --data is for them."""
    rows = [f"{path.relative_to(folder)},{path.parent.name}" for path in folder.rglob("*.png")]
    Path(f"{folder}.csv").write_text("\n".join(rows))
    return f"{folder}", "--labels", f"{folder}.csv"


def both_splits(folder):
    """As train/ and val/, of which only val is measured, without one of the classes."""
    shutil.copytree(folder, folder.parent / "both" / "train")
    shutil.copytree(folder, folder.parent / "both" / "val")
    shutil.rmtree(folder.parent / "both" / "val" / min(os.listdir(folder)))
    return folder.parent / "both"


@pytest.mark.parametrize("kind", [packed, listed, both_splits])
def test_wnids_are_classes_of_a_released_head(kind, classifier, tmp_path):
    """However the data is stored."""
    where = kind(coloured(tmp_path / "three", WNIDS))
    where = where if isinstance(where, tuple) else (where,)
    found = classified(classifier(None, answers=(281, 0, 999), classes=1000), *where)
    assert found["top1"] == 1.0 and found["pictures"] == (6 if kind is not both_splits else 4)


def test_pictures_of_mistakes_name_the_classes_of_a_released_head(
    classifier, tmp_path, monkeypatch
):
    drawn = {}
    for name in ("draw_mistakes", "draw_confusion"):
        save = lambda *arguments, name=name: drawn.update({name: arguments})
        monkeypatch.setattr(evaluate, name, save)
    pictures = coloured(tmp_path / "pictures", WNIDS)
    checkpoint = classifier(None, answers=(281, 850, 999), classes=1000)
    out = tmp_path / "drawn.png"
    classified(checkpoint, pictures, "--mistakes", out, "--confusion", out)
    _, mistakes, names, *_ = drawn["draw_mistakes"]
    assert len(mistakes) == 2
    for answer, _, truth in mistakes:
        assert (names[answer], names[truth]) == ("n04399382", "n01440764")
    assert (
        len(drawn["draw_confusion"][1]) == 1000 and drawn["draw_confusion"][1][281] == "n02123045"
    )


def test_real_labels_have_several_answers_or_none(classifier, tmp_path):
    folder, checkpoint = tmp_path / "val" / "any", classifier(None)
    folder.mkdir(parents=True)
    (tmp_path / "val" / "other").mkdir()
    for number, channel in enumerate((0, 1, 2, 2), start=1):  # answers are 0, 1, 2, 2
        colour(channel).save(folder / f"ILSVRC2012_val_{number:08}.png")
    colour(0).save(tmp_path / "val" / "other" / "ILSVRC2012_val_00000005.png")
    real = tmp_path / "real.json"
    real.write_text(json.dumps([[1], [0, 1], [], [2], [0, 2]]))  # wrong, right, none, right ...
    found = classified(checkpoint, tmp_path / "val", "--real-labels", real)
    assert (found["top1"], found["pictures"]) == (0.75, 4)
    pack.pack(str(tmp_path / "val"), str(tmp_path / "val-%03d.tar"), shard_size=2)
    assert classified(checkpoint, tmp_path / "val-*.tar", "--real-labels", real) == found


def test_labels_may_stand_in_a_file(classifier, tmp_path):
    pictures, checkpoint = coloured(tmp_path / "p", "a b c"), classifier(["red", "g", "b"])
    names, paths = {"a": "red", "b": "g", "c": "b"}, sorted(pictures.rglob("*.png"))
    rows = [f"{path.relative_to(pictures)},{names[path.parent.name]}" for path in paths]
    spaced = [row.replace(",", ", ") + " " for row in rows]
    spaced[0] = rows[0].partition(",")[0] + ","
    flags = "--labels", tmp_path / "labels.csv"
    # With spaces, and one without a label, which does not count.
    for head, lines, count in (("image,label", rows, 6), ("path, class", spaced, 5)):
        flags[1].write_text("\n".join([head, *lines]))
        found = classified(checkpoint, pictures, *flags)
        assert (found["top1"], found["pictures"]) == (1.0, count)


@pytest.mark.parametrize(
    "flags, answer", [("--border=8", "blue"), ("--val-crop=0", "red"), ("--val-crop=0.3", "blue")]
)
def test_a_border_is_cut_off_and_a_squashed_picture_is_whole(flags, answer, classifier, tmp_path):
    framed = Image.new("RGB", (48, 24), (255, 0, 0))  # red outside, blue inside
    framed.paste((0, 0, 150), (8, 8, 40, 16))
    table = tmp_path / "confusion.png"
    for name in COLOURS:
        (tmp_path / "framed" / name).mkdir(parents=True)
        framed.save(tmp_path / "framed" / name / "a.png")
    path = tmp_path / "map.json"  # all three pictures are of the class that is answered
    path.write_text(json.dumps(dict.fromkeys(COLOURS, answer)))
    flags = [flags, "--label-map", path, "--confusion", table]
    found = classified(classifier(COLOURS), tmp_path / "framed", *flags)
    assert found["top1"] == 1.0 and table.exists()


@pytest.mark.parametrize(("pool", "squashed"), [("cls", True), ("mean", False)])
def test_released_finetuned_weights_see_squashed_pictures(pool, squashed, tmp_path):
    """As their repository evaluates them: 512 pixels, a head on the class token."""
    kind = Classifier("24x1x2", 3, pool, image_size=512, patch_size=256)
    torch.save(kind.state_dict(), tmp_path / "vit_512.pt")
    pictures = coloured(tmp_path / "val", "n0 n1 n2")
    convert(tmp_path / "vit_512.pt", tmp_path / "own.pt", "own", 2)  # which keeps that
    for name in ("vit_512.pt", "own.pt"):
        _, printed = evaluated("classify", tmp_path / name, pictures, "--heads", 2)
        assert ("pictures are squashed" in printed) is squashed
