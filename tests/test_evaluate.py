"""evaluate.py: metrics against formulas written another way, and each task as a user runs it.

Pictures are noise around a mean colour of their class, so that accuracies are neither 0 nor 1.
"""

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import (
    RECTANGLE,
    evaluated,
    large_pictures,
    picture_tensor,
    save_model,
    write_picture,
    write_tar,
)
from PIL import Image

import data
import evaluate
from model import MAE, Classifier, ViT, encoder_config, initialize, save_weights
from support import pack
from support.convert import convert
from tasks import lowshot

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
    """The line with which these arguments are refused with exit status 2, and stderr before it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    *before, line = captured.err.splitlines()
    assert line.startswith("evaluate.py: ") and '"task"' not in captured.out
    return line, before


def features_one_by_one(model, root, how="mean"):
    """{key: (D,) float64} of all pictures below root/CLASS/, one forward pass for each."""
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
    """Ridge as ordinary least squares with one more row, sqrt(L2), for each penalised weight."""
    samples, width = train.shape
    penalty = np.sqrt(evaluate.RIDGE) * np.eye(width)
    matrix = np.block([[train, np.ones((samples, 1))], [penalty, np.zeros((width, 1))]])
    targets = np.zeros((samples + width, classes))
    targets[np.arange(samples), labels] = 1
    weights = np.linalg.lstsq(matrix, targets, rcond=None)[0]
    return np.hstack([test, np.ones((len(test), 1))]) @ weights


def nearest_by_hand(train, labels, sample):
    """{class: (votes, summed similarity)} of the NEIGHBOURS most similar rows of train."""
    similarities = []
    for row, label in zip(train, labels):
        cosine = row @ sample / np.sqrt((row @ row) * (sample @ sample))
        similarities.append((cosine, int(label)))
    votes = {}
    for cosine, label in sorted(similarities, reverse=True)[: evaluate.NEIGHBOURS]:
        count, total = votes.get(label, (0, 0.0))
        votes[label] = count + 1, total + cosine
    return votes


def share_in_top(scores, labels, k):
    """Share of rows in which fewer than k other classes score higher than the label's."""
    hits = [sum(row > row[label]) < k for row, label in zip(np.asarray(scores), labels)]
    return sum(hits) / len(hits)


# ---------------------------------------------------------------------------------------- protocols


@pytest.mark.parametrize("samples, width", [(40, 7), (9, 30), (1, 3)])
def test_ridge_is_least_squares_with_a_row_for_each_penalised_weight(samples, width):
    draw = np.random.RandomState(samples)
    train, test = draw.randn(samples, width) + 3, draw.randn(11, width) + 3
    labels = draw.randint(0, 4, samples)
    scores = evaluate.ridge(*map(torch.from_numpy, (train, labels, test)), classes=5)
    # float64 on well-conditioned systems (the penalty bounds them): about 1e-14 times a condition
    # number below 1e3
    expected = ridge_by_least_squares(train, labels, test, 5)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=0, atol=1e-9)
    assert scores.dtype == torch.float64


def test_ridge_moves_with_its_features_because_the_intercept_is_free():
    draw = np.random.RandomState(0)
    train, test = torch.from_numpy(draw.randn(20, 6)), torch.from_numpy(draw.randn(5, 6))
    labels = torch.from_numpy(draw.randint(0, 3, 20))
    plain = evaluate.ridge(train, labels, test, 3)
    moved = evaluate.ridge(train + 50, labels, test + 50, 3)
    torch.testing.assert_close(moved, plain, rtol=0, atol=1e-9)
    torch.testing.assert_close(plain.sum(dim=1), torch.ones(5).double(), rtol=0, atol=1e-9)


def test_standardize_uses_the_mean_and_deviation_of_train_alone():
    train = torch.tensor([[1.0, 7.0], [3.0, 7.0], [5.0, 7.0], [7.0, 7.0]])
    test = torch.tensor([[4.0, 7.0], [4.0 + 5**0.5, 7.0]])
    x, x_test = evaluate.standardize(train, test)
    assert x.dtype == x_test.dtype == torch.float64
    # By hand: mean 4, deviation sqrt((9 + 1 + 1 + 9) / 4) = sqrt(5); a constant column becomes 0.
    # The inputs are float32, so sqrt(5) comes in with an error of 1e-7.
    expected = torch.tensor([[-3.0, 0], [-1, 0], [1, 0], [3, 0]]).double() / 5**0.5
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-12)
    assert x_test[0].tolist() == [0, 0] and x_test[1, 1] == 0
    assert x_test[1, 0].item() == pytest.approx(1, abs=1e-6)


def test_nearest_is_a_vote_of_the_most_similar_by_cosine():
    draw = np.random.RandomState(1)
    lengths = np.exp(draw.randn(200, 1) * 2)  # cosine must not see them
    train, labels = draw.randn(200, 4) * lengths, draw.randint(0, 6, 200)
    test = draw.randn(1100, 4)  # 1024 at once
    votes = evaluate.nearest(*map(torch.from_numpy, (train, labels, test)), classes=6)
    ties = 0
    for row, sample in [*zip(votes, test)][:1100:20]:
        expected = nearest_by_hand(train, labels, sample)
        # Most votes first; among classes of as many votes, the more similar one.
        order = sorted(expected, key=expected.get, reverse=True)
        assert row.argsort(descending=True)[: len(order)].tolist() == order
        counts = [expected.get(c, (0, 0))[0] for c in range(6)]
        assert [round(value) for value in row.tolist()] == counts
        ties += len({*counts} - {0}) < len(expected)
    assert ties > 20  # the tie rule was put to the test


def test_a_tie_of_votes_goes_to_the_more_similar_class_and_a_majority_beats_similarity():
    angles = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    train = torch.stack([angles.cos(), angles.sin()], dim=1)
    test = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for labels, winner in (([2, 1, 1, 2], 1), ([2, 1, 2, 1], 2), ([1, 2, 1, 2], 1)):
        votes = evaluate.nearest(train, torch.tensor(labels), test, 4)
        cosines = {c: angles[torch.tensor(labels) == c].cos().sum() for c in (1, 2)}
        assert winner == max(cosines, key=cosines.get) == votes.argmax().item()
    votes = evaluate.nearest(train, torch.tensor([0, 3, 3, 3]), test, 4)
    assert votes.argmax().item() == 3
    far = torch.tensor([[1.0, 0.0], [-0.9, 0.1], [-0.9, -0.1]], dtype=torch.float64)
    assert evaluate.nearest(far, torch.tensor([0, 1, 1]), test, 2).argmax().item() == 1


def test_accuracy_counts_labels_among_the_k_highest():
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.3, 0.1, 0.6], [0.2, 0.5, 0.3]])
    labels = torch.tensor([1, 1, 1, 0])  # the label's rank is 1, 2, 3 and 3
    found = [evaluate.accuracy(scores, labels, k) for k in (1, 2, 3, 5)]
    assert found == [0.25, 0.5, 1.0, 1.0]


def test_few_shot_splits_have_all_or_as_many_of_each_class_and_depend_on_the_seed_alone():
    labels = torch.tensor(np.random.RandomState(0).permutation([0] * 9 + [2] * 5 + [7] * 2))
    for shots in (1, 3, 5, 100):
        chosen = lowshot.few_shot_split(labels, shots, seed=4)
        assert len(set(chosen.tolist())) == len(chosen)
        counts = torch.bincount(labels[chosen], minlength=8).tolist()
        assert counts == [min(shots, n) for n in (9, 0, 5, 0, 0, 0, 0, 2)]
    labels = torch.arange(300) % 3
    splits = [lowshot.few_shot_split(labels, 5, seed) for seed in range(20)]
    torch.manual_seed(99), np.random.seed(99), torch.rand(7)
    assert torch.equal(splits[0], lowshot.few_shot_split(labels, 5, seed=0))
    assert len({tuple(sorted(split.tolist())) for split in splits}) == 20
    # Samples at the end are as likely as others: 300 draws, their mean place 149.5 +- 5 (6 sigma).
    assert abs(torch.cat(splits).double().mean() - 149.5) < 30


# ----------------------------------------------------------------------------------------- features


def extracted(model, root, **options):
    """extract's features and labels, and the paths of the pictures that its numbers mean."""
    functions = {"tokens": evaluate.pooled(model, "mean"), "pixels": evaluate.raw_pixels}
    source = data.Folder(str(root))
    features, labels, numbers = evaluate.extract(functions, source, model.config, **options)
    assert labels.dtype == numbers.dtype == torch.int64
    return features, labels, [source.name(number) for number in numbers.tolist()]


def test_extract_gives_what_one_picture_at_a_time_gives(labelled, encoder):
    features, labels, keys = extracted(encoder.model, labelled / "train", batch_size=8)
    expected = features_one_by_one(encoder.model, labelled / "train")
    assert sorted(keys) == sorted(expected) and len(keys) == 33
    wanted = np.stack([expected[key] for key in keys])
    # float32 through two layers, values of about 1: batches may be summed in another order
    np.testing.assert_allclose(features["tokens"].numpy(), wanted, rtol=0, atol=2e-5)
    assert np.abs(wanted[0] - wanted[1]).max() > 0.01  # pictures do differ by more than that
    pixels = [data.normalize(picture_tensor(key)).flatten()[::4] for key in keys]
    assert torch.equal(features["pixels"], torch.stack(pixels))
    assert [CLASSES[label] for label in labels] == [Path(key).parent.name for key in keys]


def test_extract_does_not_depend_on_batch_size_or_workers(labelled, encoder):
    reference = extracted(encoder.model, labelled / "val", batch_size=64)
    for batch_size, workers in ((1, 0), (3, 0), (5, 2), (64, 2)):
        options = {"batch_size": batch_size, "workers": workers}
        features, labels, keys = extracted(encoder.model, labelled / "val", **options)
        assert keys == reference[2] and torch.equal(labels, reference[1])
        assert torch.equal(features["pixels"], reference[0]["pixels"])
        tokens = reference[0]["tokens"]  # the tolerance is that of the test above
        torch.testing.assert_close(features["tokens"], tokens, rtol=0, atol=2e-5)


def one_of_two(process, folder, runs, unreadable):
    """A process of the next test: main() as torchrun starts it, and extract on its own.

    Only the rendezvous differs: a file, where torchrun has a port, which may be taken.
    """
    launched = {"RANK": process, "WORLD_SIZE": 2, "LOCAL_RANK": process, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in launched.items()})
    meetings, begin = iter("abcd"), dist.init_process_group

    def meet(backend):
        method = f"file://{folder}/meeting-{next(meetings)}"
        begin(backend, init_method=method, rank=process, world_size=2)

    dist.init_process_group = meet
    for i, flags in enumerate(runs):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            evaluate.main(flags)
        Path(folder, f"printed-{i}-{process}").write_text(printed.getvalue())
    meet("gloo")
    model = ViT("24x1x2", **RECTANGLE)
    features, labels, keys = extracted(model, unreadable, batch_size=4, max_bad=0.5)
    torch.save([features["pixels"], labels, keys], f"{folder}/features-{process}.pt")
    dist.destroy_process_group()


def test_two_processes_give_what_one_gives(labelled, encoder, unreadable, tmp_path):
    shared = ["--checkpoint", str(encoder.path), "--data", str(labelled), "--workers", "0"]
    shared += ["--batch-size", "6"]
    runs = [["--task", task, *shared] for task in ("knn", "fewshot")]
    runs += [["--task", "features", *shared, "--out", str(tmp_path / "two.npz")]]
    arguments = (str(tmp_path), runs, str(unreadable / "train"))
    torch.multiprocessing.spawn(one_of_two, arguments, nprocs=2)
    for i, task in enumerate(("knn", "fewshot")):
        _, printed = evaluated(task, encoder.path, labelled)
        assert (tmp_path / f"printed-{i}-0").read_text() == printed
        assert (tmp_path / f"printed-{i}-1").read_text() == ""  # one process speaks for all
    evaluated("features", encoder.path, labelled, "--out", tmp_path / "one.npz")
    one, two = (np.load(tmp_path / f"{name}.npz", allow_pickle=False) for name in ("one", "two"))
    for name in ("keys", "labels", "classes"):
        assert np.array_equal(one[name], two[name])
    np.testing.assert_allclose(one["features"], two["features"], rtol=0, atol=2e-5)
    # What is left out is left out on both, and where no sum is taken every bit is the same.
    whole, labels, keys = extracted(encoder.model, unreadable / "train", max_bad=0.5)
    readable = {path.relative_to(labelled) for path in labelled.glob("train/*/*")}
    assert {Path(key).relative_to(unreadable) for key in keys} == readable
    assert len(keys) == len(labels) == len(whole["pixels"]) == 33
    for process in range(2):
        found = torch.load(tmp_path / f"features-{process}.pt", weights_only=True)
        assert torch.equal(found[0], whole["pixels"]) and torch.equal(found[1], labels)
        assert found[2] == keys


@pytest.mark.parametrize("task", ["reconstruct", "attention"])
def test_pictures_are_drawn_by_one_process_and_one_says_so(task, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back, whatever main() makes of it
    for process, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", process)
        monkeypatch.setenv("LOCAL_RANK", process)
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(["--task", task, "--checkpoint", "none.pt", "--out", f"{tmp_path}/a.png"])
        printed = capsys.readouterr()
        assert stopped.value.code == 2 and printed.out == ""
        assert len(printed.err.splitlines()) == printed.err.count("one process") == lines
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------- bad pictures, missing labels


@pytest.fixture(scope="module")
def unreadable(labelled, tmp_path_factory):
    """`labelled` with three more files in train/ (33) that are no pictures, and one in val/ (21)."""
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
        result, _ = evaluated(task, encoder.path, unreadable, "--max-bad", 0.1)
        assert result == expected  # as if they had never been there
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 4
        for name in ("ant/cut.png", "gnu/empty.jpg", "gnu/text.png", "bee/noise.jpg"):
            assert sum(name in line for line in lines) == 1


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
    line, before = refused(capsys, *flags)  # 3 of 36 is over the default of 0.01
    assert "3 of 36" in line and "--max-bad" in line
    assert len(before) == 3  # their names
    for limit, names in ((0.08, 3), (0.045, 3), (0, 3)):
        assert len(refused(capsys, *flags, "--max-bad", limit)[1]) == names
    # One alone is never fatal: 1 of the 22 in val.
    evaluated("features", encoder.path, unreadable, "--out", tmp_path / "features.npz")
    # The limit is a share that may be reached: 3 of 36 and 1 of 22 are not more than 3 / 36.
    assert evaluated("knn", encoder.path, unreadable, "--max-bad", 3 / 36)[0]["top1"] <= 1


def test_samples_without_a_label_are_left_out(labelled, encoder, tmp_path):
    def shard(name, split, numbers, with_label=lambda number: True):
        paths, members = sorted((labelled / split).glob("*/*")), []
        for number in numbers:
            members.append((f"{number:05}.png", paths[number].read_bytes()))
            label = CLASSES.index(paths[number].parent.name)
            members += [(f"{number:05}.cls", str(label).encode())] * bool(with_label(number))
        return write_tar(tmp_path / name, members)

    some = shard("some.tar", "train", range(33), lambda number: number % 4)
    kept = shard("kept.tar", "train", [number for number in range(33) if number % 4])
    flags = ("--val-data", shard("val.tar", "val", range(21)))
    for task in ("knn", "fewshot"):
        found, printed = evaluated(task, encoder.path, some, *flags)
        assert "9 samples without a label" in printed and "24 train and 21 val" in printed
        expected, printed = evaluated(task, encoder.path, kept, *flags)
        assert "without a label" not in printed and found == expected


# -------------------------------------------------------------------------------------------- tasks


def test_knn_is_the_vote_of_neighbours_of_standardised_features(labelled, encoder):
    for how in ("mean", "cls"):
        result, printed = evaluated("knn", encoder.path, labelled, "--pool", how)
        train, labels, val, val_labels = standardized_by_hand(encoder.model, labelled, how)
        top1 = top5 = may_be = 0
        for sample, label in zip(val, val_labels):
            votes = nearest_by_hand(train, labels, sample)
            best = sorted(votes, key=votes.get, reverse=True)[:5]
            top1, top5 = top1 + (best[0] == label), top5 + (label in best)
            may_be += label not in votes and len(votes) < 5  # by chance among those without a vote
        assert result["top1"] == top1 / 21
        assert top5 / 21 <= result["top5"] <= (top5 + may_be) / 21
        assert set(result) == {"top1", "top5"} and "33 train and 21 val" in printed
        assert 0 < result["top1"] < 1  # the pictures are neither trivial nor hopeless


def test_fewshot_is_ridge_on_the_printed_splits(labelled, encoder):
    result, _ = evaluated("fewshot", encoder.path, labelled, "--shots", "2,1000,all")
    train, labels, val, val_labels = standardized_by_hand(encoder.model, labelled)
    scores = ridge_by_least_squares(train, labels, val, 7)
    assert result["top1"]["all"] == share_in_top(scores, val_labels, 1)
    assert result["top5"]["all"] == share_in_top(scores, val_labels, 5)
    assert result["top1_std"]["all"] == 0
    assert 1 / 7 < result["top1"]["all"] < 1 and result["top1"]["2"] < result["top1"]["all"]
    # The splits are drawn in the order in which the source gives its samples.
    root = str(labelled / "train")
    order = [data.Folder(root).name(i) for i in range(33)]
    place = {key: i for i, key in enumerate(features_one_by_one(encoder.model, root))}
    rows = np.array([place[key] for key in order])
    tops = []
    for seed in range(5):
        split = lowshot.few_shot_split(torch.from_numpy(labels[rows]), 2, seed).numpy()
        scores = ridge_by_least_squares(train[rows][split], labels[rows][split], val, 7)
        tops.append([share_in_top(scores, val_labels, k) for k in (1, 5)])
    # Means of five fractions of 21: whatever rounds, it is the last bit of a float64.
    assert result["top1"]["2"] == pytest.approx(np.mean(tops, axis=0)[0], abs=1e-12)
    assert result["top5"]["2"] == pytest.approx(np.mean(tops, axis=0)[1], abs=1e-12)
    assert result["top1_std"]["2"] == pytest.approx(np.std([t for t, _ in tops]), abs=1e-12)
    assert result["top1_std"]["2"] > 0
    # More shots than any class has mean all of them.
    for name in ("top1", "top5"):
        assert result[name]["1000"] == pytest.approx(result[name]["all"], abs=1e-12)
    assert result["top1_std"]["1000"] == 0
    default, printed = evaluated("fewshot", encoder.path, labelled)
    assert list(default["top1"]) == ["1", "5", "10", "all"] and "seeds 0 to 4" in printed


def test_features_are_written_once_with_their_keys_and_labels(labelled, encoder, tmp_path, capsys):
    for split, how in (("val", "mean"), ("train", "cls")):
        out = tmp_path / f"{split}.npz"
        flags = ("--out", out, "--split", split, "--pool", how)
        result, _ = evaluated("features", encoder.path, labelled, *flags)
        expected = features_one_by_one(encoder.model, labelled / split, how)
        assert result == {"samples": len(expected), "width": 24, "out": str(out)}
        with np.load(out, allow_pickle=False) as file:
            assert sorted(file.files) == ["classes", "features", "keys", "labels"]
            assert sorted(file["keys"]) == sorted(expected)
            assert file["features"].dtype == np.float32
            wanted = np.stack([expected[key] for key in file["keys"]])
            np.testing.assert_allclose(file["features"], wanted, rtol=0, atol=2e-5)
            assert file["classes"].tolist() == list(CLASSES)
            names = [Path(key).parent.name for key in file["keys"]]
            assert [CLASSES[label] for label in file["labels"]] == names
        before = out.read_bytes()
        flags = ("--checkpoint", encoder.path, "--data", labelled, "--out", out)
        line, others = refused(capsys, "--task", "features", *flags)
        assert "exists" in line and not others and out.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"val.npz", "train.npz"}


def test_features_need_no_labels_and_numbered_folders_have_their_order(labelled, encoder, tmp_path):
    flags = ("--split", "train", "--out")
    evaluated("features", encoder.path, labelled / "val" / "ant", *flags, tmp_path / "flat.npz")
    with np.load(tmp_path / "flat.npz", allow_pickle=False) as file:
        assert file["labels"].tolist() == [-1] * 3 and file["classes"].shape == (0,)
    for i in (0, 1, 2, 10, 11):
        write_picture(tmp_path / "numbered" / str(i) / "a.png", i, 100)
    evaluated("features", encoder.path, tmp_path / "numbered", *flags, tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as file:
        assert file["classes"].tolist() == ["0", "1", "2", "10", "11"]
        named = {Path(key).parent.name: label for key, label in zip(file["keys"], file["labels"])}
    assert named == {"0": 0, "1": 1, "2": 2, "10": 3, "11": 4}


def test_probe_compares_trained_untrained_and_raw_pixels(labelled, photos, capsys):
    model = MAE("24x2x2", decoder=(16, 1, 2), **RECTANGLE)
    initialize(model, 3)
    state, config = model.state_dict(), model.config
    sources = data.open_sources(str(labelled), None, RECTANGLE["image_size"])
    evaluate.print_probe(state, config, *sources, "mean", 11)
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
    evaluate.print_probe(state, config, *sources, "mean", 11, samples=35)  # of 54 pictures
    assert capsys.readouterr().out.endswith("it would take longer than the training\n")
    sources = data.hold_out(data.Folder(str(photos)), None, 2)
    evaluate.print_probe(state, config, *sources, "mean", 0)
    assert capsys.readouterr().out == "linear probe: left out, for want of labels\n"


# -------------------------------------------------------------------------------------- checkpoints


def test_an_autoencoder_is_used_without_its_decoder_and_says_so(labelled, tmp_path):
    model = save_model(tmp_path / "mae.pt", MAE, decoder=(16, 1, 2))
    result, printed = evaluated("knn", tmp_path / "mae.pt", labelled)
    dropped = next(line for line in printed.splitlines() if "dropped" in line)
    for family in ("decoder_embed", "decoder_blocks", "decoder_pred", "mask_token"):
        assert family in dropped
    config, state = encoder_config(model.config), model.state_dict()
    state = {name: state[name] for name in ViT(**config).state_dict()}
    save_weights(tmp_path / "encoder.pt", state, config)
    alone, printed = evaluated("knn", tmp_path / "encoder.pt", labelled)
    assert alone == result and "dropped" not in printed


def test_a_bare_dict_of_named_tensors_is_enough(tmp_path, labelled):
    """As public checkpoints are, the picture square; a head is dropped, and that is printed."""
    model = save_model(tmp_path / "own.pt", size="toy", image_size=16, patch_size=4)
    expected, _ = evaluated("fewshot", tmp_path / "own.pt", labelled, "--shots", "all")
    head = {"head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5)}
    for content in (model.state_dict(), {"model": {**model.state_dict(), **head}}):
        torch.save(content, tmp_path / "bare.pt")
        result, printed = evaluated("fewshot", tmp_path / "bare.pt", labelled, "--shots", "all")
        assert result == expected and ("dropped: head" in printed) == ("model" in content)


def test_a_classifier_that_pools_the_mean_is_an_encoder_too(tmp_path):
    """Its last norm has another name, and comes after the mean."""
    model = Classifier("16x1x2", classes=3, image_size=8, patch_size=4, pool="mean")
    torch.nn.init.normal_(model.fc_norm.weight)
    save_weights(tmp_path / "model.pt", model.state_dict(), model.config)
    encoder, line = evaluate.load_model(tmp_path / "model.pt", "knn", "cpu")
    assert line.endswith("norm from fc_norm")
    assert torch.equal(encoder.norm.weight, model.fc_norm.weight)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(encoder.encode(images), model.encode(images))


# ----------------------------------------------------------------------------------------- classify


@pytest.fixture
def classifier(tmp_path):
    """A function that writes a classifier which answers by the mean colour of a picture: the class
    answers[i] of `classes`, where channel i is the highest."""

    def write(names, answers=(0, 1, 2), classes=3):
        model = Classifier("16x1x2", classes=classes, image_size=8, patch_size=8, class_names=names)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            model.norm.weight.fill_(1.0)
            # the patch carries the three colours' sums into the first widths; attention copies it
            for channel, answer in enumerate(answers):
                model.patch_embed["proj"].weight[channel, channel] = 1.0
                model.head.weight[answer, channel] = 1.0
            attention, block = model.blocks[0].attn, model.blocks[0]
            block.norm1.weight.fill_(1.0)
            attention.qkv.weight[32:48] = torch.eye(16)  # the values are the tokens
            attention.proj.weight.copy_(torch.eye(16))
        save_weights(tmp_path / "model.pt", model.state_dict(), model.config)
        return tmp_path / "model.pt"

    return write


def colour(channel, light=200):
    """A picture of 8 x 8 in which one channel is the highest."""
    rgb = [40, 40, 40]
    rgb[channel] = light
    return Image.new("RGB", (8, 8), tuple(rgb))


def classified(checkpoint, folder, *flags):
    return evaluated("classify", checkpoint, folder, *flags)[0]


def coloured(folder, classes):
    """A folder of one red, two green and three blue pictures in classes of these names."""
    for channel, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(channel + 1):
            colour(channel, 200 + i).save(folder / name / f"val_{channel}{i}.png")
    return folder


def test_classes_are_matched_by_name_or_by_a_map(classifier, tmp_path):
    checkpoint = classifier(["red", "green", "blue"])
    # The data numbers its classes blue, green, red: only the names can say what is right.
    pictures = coloured(tmp_path / "english", ["red", "green", "blue"])
    assert classified(checkpoint, pictures)["top1"] == 1.0
    pictures, maps = coloured(tmp_path / "french", ["rouge", "vert", "bleu"]), tmp_path / "map.json"
    maps.write_text(json.dumps({"rouge": ["green", "red"], "bleu": 0}))
    found = classified(checkpoint, pictures, "--label-map", maps)
    # The red one is right; the three blue ones are called red by the map, and the answer is blue;
    # the green ones are not in the map.
    assert (found["top1"], found["pictures"]) == (0.25, 4)


AS_PLACES = "3 classes without names: the data's class N is number N of them, from 0"
IN_ORDER = "3 classes without names: taken for the data's, in its order"


@pytest.mark.parametrize(
    "folders, removed, top1, words",
    [
        (["0", "1", "2"], None, 1.0, ""),
        (["0", "1", "2"], "1", 1.0, AS_PLACES),  # a number is no place among the folders
        (["0", "1", "10"], None, 1.0, IN_ORDER),  # there is no class 10, but as many folders
        (["1", "2", "3"], None, 1.0, IN_ORDER),
        (["1", "2", "3"], "3", 0.0, AS_PLACES),
        (["a", "b", "c"], None, 1.0, IN_ORDER),
    ],
)
def test_folders_that_are_matched_without_names(
    folders, removed, top1, words, classifier, tmp_path
):
    pictures = coloured(tmp_path / "pictures", folders)
    if removed:
        shutil.rmtree(pictures / removed)
    found, printed = evaluated("classify", classifier(None), pictures)
    assert found["top1"] == top1 and words in printed
    assert ("without names" in printed) == bool(words)


@pytest.mark.parametrize("folders, classes", [("0 10", 3), ("b c", 3), ("b c", 1000)])
def test_folders_that_cannot_be_matched_want_a_map(
    folders, classes, classifier, tmp_path, capsys, monkeypatch
):
    one, two = folders.split()
    pictures, checkpoint = (
        coloured(tmp_path / "p", [one, "no", two]),
        classifier(None, (0, 1, 2), classes),
    )
    shutil.rmtree(pictures / "no")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "best_five", None)  # would fail: before anything is computed
        flags = ["--task", "classify", "--checkpoint", checkpoint, "--data", pictures]
        line, _ = refused(capsys, *flags)
    assert f"has {classes} classes and no names for them, the data has 2: give --label-map" in line
    (tmp_path / "map.json").write_text(json.dumps({one: 0, two: 2}))
    assert classified(checkpoint, pictures, "--label-map", tmp_path / "map.json")["top1"] == 1.0


def test_numeric_classes_of_a_head_that_was_trained_in_another_order(classifier, tmp_path):
    """Checkpoints keep their names: what was once sorted as texts is not relabelled."""
    pictures = coloured(tmp_path / "pictures", ["10", "2", "0"])
    for names, answers in ((["0", "10", "2"], (1, 2, 0)), (["0", "2", "10"], (2, 1, 0))):
        assert classified(classifier(names, answers), pictures)["top1"] == 1.0


WNIDS = ["n02123045", "n01440764", "n15075141"]  # a tabby cat, a tench, toilet tissue


def packed(folder):
    pack.pack(str(folder), f"{folder}-%d.tar")
    return f"{folder}-*.tar"


def listed(folder):
    """Pictures that lie in one folder, and a file of their classes: what --data is for them."""
    rows = [f"{path.relative_to(folder)},{path.parent.name}" for path in folder.rglob("*.png")]
    Path(f"{folder}.csv").write_text("\n".join(rows))
    return f"{folder}", "--labels", f"{folder}.csv"


def both_splits(folder):
    """As train/ and val/, of which only the latter is measured, without one of the classes."""
    shutil.copytree(folder, folder.parent / "both" / "train")
    shutil.copytree(folder, folder.parent / "both" / "val")
    shutil.rmtree(folder.parent / "both" / "val" / min(os.listdir(folder)))
    return folder.parent / "both"


@pytest.mark.parametrize("kind", [str, packed, listed, both_splits])
def test_wnids_are_classes_of_a_released_head(kind, classifier, tmp_path):
    """Where a head of ImageNet's 1,000 classes meets three of its folders."""
    where = kind(coloured(tmp_path / "three", WNIDS))
    where = where if isinstance(where, tuple) else (where,)
    found = classified(classifier(None, answers=(281, 0, 999), classes=1000), *where)
    assert found["top1"] == 1.0 and found["pictures"] == (6 if kind is not both_splits else 4)
    wrong = classifier(None, answers=(0, 1, 2), classes=1000)  # the places among three folders
    assert classified(wrong, *where)["top1"] == 0.0


def test_a_head_of_21841_classes_knows_wnids_and_says_which_it_does_not(
    classifier, tmp_path, capsys
):
    pictures = coloured(tmp_path / "pictures", ["n01484850", "n01440764", "n01443537"])
    checkpoint = classifier(None, answers=(460, 359, 368), classes=21841)
    assert classified(checkpoint, pictures)["top1"] == 1.0
    (pictures / "n01440764").rename(pictures / "n04399382")  # a teddy bear
    asked = ["--task", "classify", "--checkpoint", checkpoint, "--data", pictures]
    line, _ = refused(capsys, *asked)
    assert "the model knows no n04399382 (1 of the data's classes): give --label-map" in line


def test_pictures_of_mistakes_name_the_classes_of_a_released_head(
    classifier, tmp_path, monkeypatch
):
    lines = []
    monkeypatch.setattr(evaluate, "draw_mistakes", lambda *given: lines.extend(given[1]))
    monkeypatch.setattr(evaluate, "draw_confusion", lambda *given: lines.extend(given[1]))
    pictures = coloured(tmp_path / "pictures", WNIDS)
    checkpoint = classifier(None, answers=(281, 850, 999), classes=1000)
    for flag in ("--mistakes", "--confusion"):
        classified(checkpoint, pictures, flag, tmp_path / "drawn.png")
        if flag == "--mistakes":
            assert len(lines) == 2 and all(line.startswith("n04399382 (") for line in lines)
            assert all(line.endswith("), is n01440764") for line in lines)
            lines.clear()
    assert len(lines) == 1000 and lines[281] == "n02123045"


def test_classes_of_a_head_that_share_a_name_both_count(classifier, tmp_path):
    """ImageNet has two cranes: where the data has one of that name, either is right."""
    pictures = coloured(tmp_path / "pictures", ["crane", "ox", "yak"])
    for answer in (0, 3):
        checkpoint = classifier(["crane", "ox", "yak", "crane"], (answer, 1, 2), 4)
        assert classified(checkpoint, pictures)["top1"] == 1.0
    pictures = coloured(tmp_path / "more", ["a", "ox", "yak"])
    (tmp_path / "map.json").write_text(json.dumps({"a": "crane", "ox": "ox", "yak": ["yak"]}))
    flags = ["--label-map", tmp_path / "map.json"]
    found, printed = evaluated("classify", checkpoint, pictures, *flags)
    assert "classes that share their names (1): crane" in printed and found["top1"] == 1.0


def test_real_labels_have_several_answers_or_none(classifier, tmp_path):
    folder, checkpoint = tmp_path / "val" / "any", classifier(None)
    folder.mkdir(parents=True)
    (tmp_path / "val" / "other").mkdir()
    for number, channel in enumerate((0, 1, 2, 2), start=1):  # answers are 0, 1, 2, 2
        colour(channel).save(folder / f"ILSVRC2012_val_{number:08}.png")
    colour(0).save(tmp_path / "val" / "other" / "ILSVRC2012_val_00000005.png")
    real = tmp_path / "real.json"
    real.write_text(json.dumps([[1], [0, 1], [], [2], [0, 2]]))  # wrong, right, none, right, right
    found = classified(checkpoint, tmp_path / "val", "--real-labels", real)
    assert (found["top1"], found["pictures"]) == (0.75, 4)
    pack.pack(str(tmp_path / "val"), str(tmp_path / "val-%03d.tar"), shard_size=2)
    assert classified(checkpoint, tmp_path / "val-*.tar", "--real-labels", real) == found


def test_labels_may_stand_in_a_file(classifier, tmp_path):
    pictures, checkpoint = coloured(tmp_path / "p", ["a", "b", "c"]), classifier(["red", "g", "b"])
    names, paths = {"a": "red", "b": "g", "c": "b"}, sorted(pictures.rglob("*.png"))
    rows = [f"{path.relative_to(pictures)},{names[path.parent.name]}" for path in paths]
    spaced = [rows[0].partition(",")[0] + ",", *(row.replace(",", ", ") + " " for row in rows[1:])]
    flags = "--labels", tmp_path / "labels.csv"
    # With spaces, and one without a label, which does not count.
    for head, lines, count in (("image,label", rows, 6), ("path, class", spaced, 5)):
        flags[1].write_text("\n".join([head, *lines]))
        found = classified(checkpoint, pictures, *flags)
        assert (found["top1"], found["pictures"]) == (1.0, count)


def test_a_border_is_cut_off_and_a_squashed_picture_is_whole(classifier, tmp_path):
    framed = Image.new("RGB", (48, 24), (255, 0, 0))  # red outside, blue inside
    framed.paste((0, 0, 150), (8, 8, 40, 16))
    for name in ("red", "green", "blue"):
        (tmp_path / "framed" / name).mkdir(parents=True)
        framed.save(tmp_path / "framed" / name / "a.png")
    where = classifier(["red", "green", "blue"]), tmp_path / "framed"
    answers = (
        (["--border", "8"], "blue"),
        (["--val-crop", "0"], "red"),
        (["--val-crop", "0.3"], "blue"),
    )
    for flags, answer in answers:
        map_file = (
            tmp_path / f"{answer}.json"
        )  # all three pictures are of the class that is answered
        map_file.write_text(json.dumps(dict.fromkeys(("red", "green", "blue"), answer)))
        table = tmp_path / "confusion.png"
        found = classified(*where, *flags, "--label-map", map_file, "--confusion", table)
        assert found["top1"] == 1.0 and table.exists()


@pytest.mark.parametrize(("pool", "squashed"), [("cls", True), ("mean", False)])
def test_released_finetuned_weights_see_squashed_pictures(pool, squashed, tmp_path):
    """As their repository evaluates them: 512 pixels, timm's names, a head on the class token."""
    kind = Classifier("24x1x2", 3, pool, image_size=512, patch_size=256)
    torch.save(kind.state_dict(), tmp_path / "vit_512.pt")
    pictures = coloured(tmp_path / "val", ["n0", "n1", "n2"])
    convert(tmp_path / "vit_512.pt", tmp_path / "own.pt", "own", 2)  # which keeps that
    for name in ("vit_512.pt", "own.pt"):
        _, printed = evaluated("classify", tmp_path / name, pictures, "--heads", 2)
        assert ("pictures are squashed" in printed) is squashed
