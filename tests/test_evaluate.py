"""evaluate.py: metrics against formulas written another way, and each task as a user runs it.

Pictures are noise around a mean colour of their class, so that accuracies are neither 0 nor 1.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import tarfile
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import large_pictures
from PIL import Image

import data
import evaluate
import model as models
from support import labels as labels_module
from support import pack
from support import pictures as pictures_module
from support.convert import convert
from tasks import lit as lit_module
from tasks import lowshot

CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu")
SHAPE = {"image_size": (16, 24), "patch_size": 8}  # 2 x 3 patches; not square, so that H is not W
MASKED = {"decoder": (16, 1, 2), "mask_ratio": 0.5}


def write_picture(path, seed, colour, mode="RGB"):
    """Noise around a colour, larger than the models' pictures and of another aspect."""
    noise = np.random.RandomState(seed).normal(0, 60, (20, 26, 3))
    pixels = np.clip(noise + colour, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


def write_classes(root, counts, first_seed):
    colours = np.random.RandomState(5).randint(100, 156, (len(CLASSES), 3))
    for number, (name, count) in enumerate(zip(CLASSES, counts)):
        for i in range(count):
            write_picture(root / name / f"{i}.png", first_seed + 100 * number + i, colours[number])


def save_model(path, kind=models.ViT, size="24x2x2", seed=3, **arguments):
    """A checkpoint whose attention is sharp: with initial weights it is almost uniform."""
    model = kind(size, **{**SHAPE, **arguments})
    models.initialize(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv.weight" in name:
                parameter.mul_(4)
    models.save_weights(path, model.state_dict(), model.config)
    return model.eval()


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


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("autoencoder") / "model.pt"
    return SimpleNamespace(path=path, model=save_model(path, models.MAE, **MASKED))


def evaluated(task, checkpoint, folder, *arguments):
    """What a task returns as JSON, and its whole stdout."""
    printed = io.StringIO()
    flags = ["--task", task, "--checkpoint", checkpoint, "--data", folder, "--workers", 0]
    with contextlib.redirect_stdout(printed):
        evaluate.main([str(flag) for flag in (*flags, *arguments)])
    lines = printed.getvalue().splitlines()
    result = json.loads(lines[-1])
    assert result.pop("task") == task
    assert not any(line.startswith("{") for line in lines[:-1])
    return result, printed.getvalue()


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


def picture_tensor(path, channels=3):
    """A picture as a model sees it, (1, C, 16, 24) uint8, read without data.Batches."""
    with Image.open(path) as image:
        return data.crop_and_resize(image, SHAPE["image_size"], channels)[None]


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
    test = draw.randn(60, 4)
    votes = evaluate.nearest(*map(torch.from_numpy, (train, labels, test)), classes=6)
    ties = 0
    for row, sample in zip(votes, test):
        expected = nearest_by_hand(train, labels, sample)
        # Most votes first; among classes of as many votes, the more similar one.
        order = sorted(expected, key=expected.get, reverse=True)
        assert row.argsort(descending=True)[: len(order)].tolist() == order
        assert [round(value) for value in row.tolist()] == [
            expected.get(c, (0, 0))[0] for c in range(6)
        ]
        counts = [count for count, _ in expected.values()]
        ties += len(set(counts)) < len(counts)
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


def test_nearest_does_not_depend_on_how_many_are_asked_at_once():
    draw = torch.Generator().manual_seed(0)
    train = torch.randn(30, 5, generator=draw, dtype=torch.float64)
    test = torch.randn(2500, 5, generator=draw, dtype=torch.float64)
    labels = torch.arange(30) % 4
    whole = evaluate.nearest(train, labels, test, 4)
    parts = [evaluate.nearest(train, labels, part, 4) for part in test.split(700)]
    # Last bits of a dot product may depend on the shape of the matrices: 1e-16 times a few terms.
    torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-12)


def test_accuracy_counts_labels_among_the_k_highest():
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.3, 0.1, 0.6], [0.2, 0.5, 0.3]])
    labels = torch.tensor([1, 1, 1, 0])  # the label's rank is 1, 2, 3 and 3
    found = [evaluate.accuracy(scores, labels, k) for k in (1, 2, 3, 5)]
    assert found == [0.25, 0.5, 1.0, 1.0]


def test_few_shot_split_has_as_many_of_each_class_as_asked_for_or_all_there_are():
    labels = torch.tensor(np.random.RandomState(0).permutation([0] * 9 + [2] * 5 + [7] * 2))
    for shots in (1, 3, 5, 100):
        chosen = lowshot.few_shot_split(labels, shots, seed=4)
        assert len(set(chosen.tolist())) == len(chosen)
        counts = torch.bincount(labels[chosen], minlength=8).tolist()
        assert counts == [min(shots, n) for n in (9, 0, 5, 0, 0, 0, 0, 2)]


def test_few_shot_split_depends_on_its_seed_and_on_nothing_else():
    labels = torch.arange(300) % 3
    first = lowshot.few_shot_split(labels, 5, seed=0)
    torch.manual_seed(99), np.random.seed(99), torch.rand(7)
    assert torch.equal(first, lowshot.few_shot_split(labels, 5, seed=0))
    splits = {tuple(sorted(lowshot.few_shot_split(labels, 5, s).tolist())) for s in range(20)}
    assert len(splits) == 20
    # Samples at the end are as likely as others: 300 draws, their mean place 149.5 +- 5 (6 sigma).
    places = torch.cat([lowshot.few_shot_split(labels, 5, seed) for seed in range(20)]).double()
    assert abs(places.mean() - 149.5) < 30


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


@pytest.mark.parametrize("task", ["knn", "fewshot"])
def test_accuracies_are_equal_for_any_batch_size_and_workers(task, labelled, encoder):
    reference, _ = evaluated(task, encoder.path, labelled)
    for batch_size, workers in ((1, 0), (3, 2), (64, 2)):
        flags = ("--batch-size", batch_size, "--workers", workers)
        assert evaluated(task, encoder.path, labelled, *flags)[0] == reference


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
    model = models.ViT("24x1x2", **SHAPE)
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


def test_pictures_are_drawn_by_one_process_and_one_says_so(
    labelled, autoencoder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back, whatever main() makes of it
    out = tmp_path / "out.png"
    flags = ["--checkpoint", autoencoder.path, "--data", labelled, "--out", out]
    for task in ("reconstruct", "attention"):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("LOCAL_RANK", "0")
        line, before = refused(capsys, "--task", task, *flags)
        assert "one process" in line and not before
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("LOCAL_RANK", "1")
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(["--task", task, *map(str, flags)])
        assert stopped.value.code == 2 and capsys.readouterr() == ("", "")
    assert not out.exists()


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
    for text in ("65535", "abc"):
        line = refused(capsys, *flags, "--max-pixels", text)[0]
        assert f"--max-pixels: {text} is not at least 65536, the number of pixels of" in line


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


def test_weights_that_are_not_finite_are_no_result(labelled, encoder, tmp_path, capsys):
    state, config = models.read_weights(encoder.path)
    state["norm.bias"][0] = float("nan")
    models.save_weights(tmp_path / "nan.pt", state, config)
    line, _ = refused(
        capsys, "--task", "knn", "--checkpoint", tmp_path / "nan.pt", "--data", labelled
    )
    assert "not finite" in line


def test_classes_that_only_one_side_names_cannot_be_matched(labelled, encoder, tmp_path, capsys):
    pictures = {path: 0 for path in sorted((labelled / "train").rglob("*.png"))}
    write_shard(tmp_path / "train.tar", pictures, lambda _: True)
    flags = ("--data", tmp_path / "train.tar", "--val-data", labelled / "val")
    line, _ = refused(capsys, "--task", "knn", "--checkpoint", encoder.path, *flags)
    assert "cannot be matched" in line


def write_shard(path, pictures, with_label):
    """A tar of the pictures {path: class number}; those that with_label accepts have a .cls."""
    with tarfile.open(path, "w") as tar:
        for number, (picture, label) in enumerate(pictures.items()):
            files = {"png": picture.read_bytes()}
            if with_label(number):
                files["cls"] = str(label).encode()
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{number:05d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_samples_without_a_label_are_left_out(labelled, encoder, tmp_path, capsys):
    train, val = (
        {path: CLASSES.index(path.parent.name) for path in sorted((labelled / name).glob("*/*"))}
        for name in ("train", "val")
    )
    write_shard(tmp_path / "some.tar", train, lambda number: number % 4)
    kept = {path: label for number, (path, label) in enumerate(train.items()) if number % 4}
    write_shard(tmp_path / "kept.tar", kept, lambda number: True)
    write_shard(tmp_path / "val.tar", val, lambda number: True)
    write_shard(tmp_path / "bare.tar", val, lambda number: False)
    flags = ("--val-data", tmp_path / "val.tar")
    for task in ("knn", "fewshot"):
        some, printed = evaluated(task, encoder.path, tmp_path / "some.tar", *flags)
        assert "9 samples without a label" in printed and "24 train and 21 val" in printed
        expected, printed = evaluated(task, encoder.path, tmp_path / "kept.tar", *flags)
        assert "without a label" not in printed and some == expected
    flags = ("--checkpoint", encoder.path, "--workers", 0)
    shards = ("--data", tmp_path / "some.tar", "--val-data", tmp_path / "bare.tar")
    line, before = refused(capsys, "--task", "knn", *flags, *shards)
    assert "no labels" in line and not before


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
    result, _ = evaluated("fewshot", encoder.path, labelled, "--shots", "2,all")
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


def test_more_shots_than_any_class_has_means_all_of_them(labelled, encoder):
    result, printed = evaluated("fewshot", encoder.path, labelled, "--shots", "1000,all")
    for name in ("top1", "top5"):
        assert result[name]["1000"] == pytest.approx(result[name]["all"], abs=1e-12)
    assert result["top1_std"] == {"1000": 0, "all": 0}
    default, printed = evaluated("fewshot", encoder.path, labelled)
    assert list(default["top1"]) == ["1", "5", "10", "all"] and "seeds 0 to 4" in printed
    values = [*default["top1"].values(), *default["top5"].values()]
    assert all(0 <= value <= 1 for value in values) and len(values) == 8


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


def test_numbered_folders_have_their_numbers_order_in_features(encoder, tmp_path):
    for i in (0, 1, 2, 10, 11):
        write_picture(tmp_path / "numbered" / str(i) / "a.png", i, 100)
    flags = ["--out", tmp_path / "out.npz", "--split", "train"]
    evaluated("features", encoder.path, tmp_path / "numbered", *flags)
    with np.load(tmp_path / "out.npz") as file:
        assert file["classes"].tolist() == ["0", "1", "2", "10", "11"]
        named = {Path(key).parent.name: label for key, label in zip(file["keys"], file["labels"])}
    assert named == {"0": 0, "1": 1, "2": 2, "10": 3, "11": 4}


def test_features_need_no_labels(labelled, encoder, tmp_path):
    flat = tmp_path / "flat"
    shutil.copytree(labelled / "val" / "ant", flat)
    evaluated("features", encoder.path, flat, "--out", tmp_path / "out.npz", "--split", "train")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as file:
        assert file["labels"].tolist() == [-1] * 3 and file["classes"].shape == (0,)


def test_probe_compares_trained_untrained_and_raw_pixels(labelled, autoencoder, capsys):
    untrained = models.ViT(**models.encoder_config(autoencoder.model.config)).eval()
    models.initialize(untrained, 11)
    state = autoencoder.model.state_dict()
    sources = data.open_sources(str(labelled), None, SHAPE["image_size"])
    evaluate.print_probe(state, autoencoder.model.config, *sources, "mean", 11)
    printed = capsys.readouterr().out.splitlines()
    assert "33 labels, 21 held-out pictures" in printed[0]
    trained = models.ViT(**models.encoder_config(autoencoder.model.config)).eval()
    trained.load_state_dict({name: state[name] for name in trained.state_dict()})
    for name, model in (("untrained", untrained), ("trained", trained)):
        train, labels, val, val_labels = standardized_by_hand(model, labelled)
        scores = ridge_by_least_squares(train, labels, val, 7)
        (line,) = (line for line in printed if line.split()[0] == name)
        assert line.split()[-1] == f"{share_in_top(scores, val_labels, 1):.1%}"
    assert sum("raw pixels" in line for line in printed) == 1


def test_the_probe_is_left_out_for_want_of_labels(photos, autoencoder, capsys):
    sources = data.hold_out(data.Folder(str(photos)), None, 2)
    state, config = autoencoder.model.state_dict(), autoencoder.model.config
    evaluate.print_probe(state, config, *sources, "mean", 0)
    assert capsys.readouterr().out == "linear probe: left out, for want of labels\n"


# ----------------------------------------------------------------------------------------- pictures


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
    split = [
        pictures[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8, :]
        for row in range(2)
        for column in range(3)
    ]
    return np.stack([patch.reshape(*patch.shape[:-3], -1) for patch in split], axis=-2)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """Four pictures without classes, in the order in which their folder gives them."""
    root = tmp_path_factory.mktemp("gallery")
    for i in range(4):
        write_picture(root / f"{i}.png", 900 + i, 128)
    source = data.Folder(str(root))
    return SimpleNamespace(root=root, paths=[source.name(i) for i in range(4)])


@pytest.mark.parametrize("channels", [1, 3, 4, 10])
def test_denormalize_goes_back_exactly_and_clips(channels):
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, channels, 1, 1)
    images[1] = images[1].flip(1)
    assert torch.equal(pictures_module.denormalize(data.normalize(images)), images)
    extremes = torch.tensor([-100.0, 100.0]).view(1, 1, 1, 2).repeat(1, channels, 1, 1)
    assert pictures_module.denormalize(extremes)[0, :, 0].tolist() == [[0, 255]] * channels


def test_reconstructions_show_the_picture_the_visible_patches_and_the_painted_rest(
    autoencoder, gallery, tmp_path
):
    out = tmp_path / "picture.png"
    flags = ("--out", out, "--count", 3, "--seed", 5)
    result, printed = evaluated("reconstruct", autoencoder.path, gallery.root, *flags)
    assert result == {"out": str(out)} and "seed 5" in printed
    picture, seen, painted = cells(out, columns=3, rows=3)
    images = torch.cat([picture_tensor(path) for path in gallery.paths[:3]])
    assert (picture == images.permute(0, 2, 3, 1).numpy()).all()
    visible = (patches_of(seen) == patches_of(picture)).all(axis=-1)  # (3, 6)
    assert (visible.sum(axis=1) == 3).all()  # half of six
    assert (patches_of(seen)[~visible] == 128).all()
    assert (patches_of(painted)[visible] == patches_of(picture)[visible]).all()
    # The model gives the same for any order within the visible and within the hidden patches.
    ids = torch.from_numpy(np.argsort(~visible, axis=1, kind="stable"))
    expected = autoencoder.model.reconstruct(data.normalize(images), ids)
    expected = pictures_module.denormalize(expected).permute(0, 2, 3, 1).numpy().astype(int)
    # 8 bits: another order of summation may round the other way
    assert np.abs(painted - expected).max() <= 1
    assert (patches_of(painted)[~visible] != patches_of(picture)[~visible]).mean() > 0.5
    assert len({tuple(row) for row in visible.tolist()}) > 1  # each picture has its own mask


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
    arguments = {"size": "toy", "image_size": SHAPE["image_size"], **drawn}
    model = save_model(own, models.MAE, **arguments)
    args = Namespace(input_size=[*SHAPE["image_size"]], **said)
    torch.save({"model": model.state_dict(), "args": args}, public)
    pictures = []
    for path, more in ((own, []), (public, flags)):
        out = tmp_path / f"{path.stem}.png"
        _, printed = evaluated("reconstruct", path, gallery.root, *more, "--out", out)
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]
    unsaid = "norm_pix_loss" not in said and not flags
    assert ("taken for normalised patches: if it was not, --raw-pixels" in printed) == unsaid


def test_the_same_seed_draws_the_same_picture(autoencoder, gallery, tmp_path):
    contents = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"{number}.png"
        torch.manual_seed(number)
        evaluated("reconstruct", autoencoder.path, gallery.root, "--out", out, "--seed", seed)
        contents.append(out.read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_brightness_is_the_attention_of_the_class_token(encoder, gallery, tmp_path):
    out = tmp_path / "attention.png"
    flags = ("--out", out, "--count", 4)
    assert evaluated("attention", encoder.path, gallery.root, *flags)[0] == {"out": str(out)}
    picture, *lit = cells(out, columns=4, rows=4)  # the picture, all heads, and each of the two
    images = torch.cat([picture_tensor(path) for path in gallery.paths])
    assert (picture == images.permute(0, 2, 3, 1).numpy()).all()
    attention = encoder.model.class_attention(data.normalize(images)).detach().numpy()
    for column, wanted in zip(lit, (attention.mean(axis=1), attention[:, 0], attention[:, 1])):
        original, shown = patches_of(picture).astype(float), patches_of(column).astype(float)
        brightness = shown.sum(axis=-1) / original.sum(axis=-1)  # (4, 6)
        for found, expected in zip(brightness, wanted):
            assert expected.max() > 1.2 * expected.min()  # there is something to see
            # A straight line through attention, 1 at its highest. Cutting to 8 bits takes half a
            # level of about 128 from each pixel on average, so 0.01 is twice what it can cost.
            assert found[expected.argmax()] > 0.99
            line = np.polyfit(expected, found, 1)
            assert line[0] > 0 and np.abs(np.polyval(line, expected) - found).max() < 0.01
    assert np.abs(lit[1].astype(int) - lit[2]).max() > 20  # heads differ


@pytest.mark.parametrize("channels, mode", [(1, "L"), (4, "RGBA")])
def test_grey_and_transparent_checkpoints_draw_too(channels, mode, gallery, tmp_path):
    arguments = {**MASKED, "channels": channels}
    save_model(tmp_path / "model.pt", models.MAE, **arguments)
    pictures = [
        Image.fromarray(picture_tensor(path, channels)[0].permute(1, 2, 0).numpy().squeeze(), mode)
        for path in gallery.paths[:2]
    ]
    expected = np.stack([np.asarray(picture)[..., None] for picture in pictures])
    expected = expected.reshape(2, 16, 24, channels)[..., :3]  # grey is the same thrice
    for task, columns in (("reconstruct", 3), ("attention", 4)):
        result, _ = evaluated(task, tmp_path / "model.pt", gallery.root, "--count", 2)
        picture, *others = cells(result["out"], columns, rows=2)
        assert (picture == expected).all()
        assert all((other != picture).any() for other in others)


def test_pictures_are_of_val_and_lie_beside_the_checkpoint(labelled, autoencoder, tmp_path):
    checkpoint = shutil.copy(autoencoder.path, tmp_path / "model.pt")
    first = data.Folder(str(labelled / "val")).name(0)
    expected = picture_tensor(first)[0].permute(1, 2, 0).numpy()
    for task, columns in (("reconstruct", 3), ("attention", 4)):
        result, _ = evaluated(task, checkpoint, labelled)
        assert Path(result["out"]).parent == tmp_path
        assert (cells(result["out"], columns, rows=8)[0, 0] == expected).all()
        # Done again, it says that it replaces what was there.
        assert "replaced" in evaluated(task, checkpoint, labelled)[1]


# -------------------------------------------------------------------------------------- checkpoints


def test_an_autoencoder_is_used_without_its_decoder_and_says_so(labelled, autoencoder, tmp_path):
    result, printed = evaluated("knn", autoencoder.path, labelled)
    dropped = next(line for line in printed.splitlines() if "dropped" in line)
    for family in ("decoder_embed", "decoder_blocks", "decoder_pred", "mask_token"):
        assert family in dropped
    config = models.encoder_config(autoencoder.model.config)
    encoder = models.ViT(**config)
    state = autoencoder.model.state_dict()
    state = {name: state[name] for name in encoder.state_dict()}
    models.save_weights(tmp_path / "encoder.pt", state, config)
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


# ---------------------------------------------------------------------------------------- bad input


class Touch:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, labelled, capsys):
    torch.save({"model": Touch(str(tmp_path / "ran"))}, tmp_path / "model.pt")
    flags = ("--checkpoint", tmp_path / "model.pt", "--data", labelled)
    line, before = refused(capsys, "--task", "knn", *flags)
    assert "model.pt" in line and not before and not (tmp_path / "ran").exists()


def test_unusable_input_is_refused_in_one_line(tmp_path, labelled, encoder, capsys):
    (tmp_path / "text.pt").write_text("this is not a checkpoint")
    (tmp_path / "empty").mkdir()
    for split in ("train", "val"):
        shutil.copytree(labelled / "val" / "ant", tmp_path / "flat" / split)
    usual = {"--task": "knn", "--checkpoint": encoder.path, "--data": labelled, "--workers": 0}
    for change, words in (
        ({"--checkpoint": tmp_path / "none.pt"}, "no weights at"),
        ({"--checkpoint": tmp_path}, "no weights at"),
        ({"--checkpoint": tmp_path / "text.pt"}, "text.pt"),
        ({"--data": labelled / "train"}, "--val-data"),
        ({"--data": labelled / "train", "--task": "fewshot"}, "--val-data"),
        ({"--data": tmp_path / "flat"}, "no labels"),
        ({"--data": tmp_path / "flat", "--task": "fewshot"}, "no labels"),
        ({"--data": tmp_path / "nowhere"}, "does not exist"),
        ({"--data": tmp_path / "empty"}, "no pictures"),
        ({"--data": tmp_path / "*.tar"}, "no shard matches"),
        ({"--data": tmp_path / "text.pt"}, "not a folder"),
        ({"--data": labelled / "train", "--val-data": tmp_path / "no"}, "does not exist"),
        ({"--task": "reconstruct"}, "no decoder"),
        ({"--task": "paint"}, "--task"),
        ({"--pool": "max"}, "--pool"),
        ({"--no-such-flag": 1}, "--no-such-flag"),
        ({"--shot": 1}, "--shot"),  # no abbreviations
        ({"--shots": "1,many"}, "--shots"),
        ({"--shots": "0"}, "--shots"),
        ({"--shots": "-1,all"}, "--shots"),
        ({"--shots": "1,,2"}, "--shots"),
        ({"--batch-size": "large"}, "--batch-size"),
        ({"--max-bad": "none"}, "--max-bad"),
        ({"--max-bad": "nan"}, "--max-bad nan is out of range"),
        ({"--batch-size": 0}, "--batch-size 0 is out of range"),
        ({"--task": "reconstruct", "--count": 0}, "--count 0 is out of range"),
        ({"--batch-size": 2**40}, "out of range"),
        ({"--task": "reconstruct", "--seed": 2**70}, "--seed"),
        ({"--seed": 1}, "--seed is for --task reconstruct"),
        ({"--mask-ratio": 0.5}, "--mask-ratio is for --task reconstruct"),
        ({"--task": "reconstruct", "--mask-ratio": 2}, "--mask-ratio 2.0 is out of range"),
        ({"--image-size": "20"}, "not divisible by patch 8"),
        ({"--confusion": tmp_path / "a.png"}, "--confusion is for --task classify"),
        ({"--task": "features", "--shots": "1"}, "--shots is for --task fewshot"),
        ({"--val-data": "toy"}, "other classes"),
    ):
        flags = [f"{name}={value}" for name, value in {**usual, **change}.items()]
        line, before = refused(capsys, *flags)
        assert words in line and not before, change
    for missing in ("--task", "--checkpoint"):
        flags = [f"{name}={value}" for name, value in usual.items() if name != missing]
        assert missing in refused(capsys, *flags)[0]


# ---------------------------------------------------------------------------------------- classify


@pytest.fixture
def classifier(tmp_path):
    """A function that writes a classifier which answers by the mean colour of a picture: the class
    answers[i] of `classes`, where channel i is the highest."""

    def write(names, answers=(0, 1, 2), classes=3):
        model = models.Classifier(
            "16x1x2", classes=classes, image_size=8, patch_size=8, class_names=names
        )
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
        models.save_weights(tmp_path / "model.pt", model.state_dict(), model.config)
        return tmp_path / "model.pt"

    return write


def colour(*rgb):
    return Image.new("RGB", (8, 8), rgb)


def classified(capsys, *arguments):
    evaluate.main(["--task", "classify", "--workers", "0", *map(str, arguments)])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def coloured(folder, classes):
    """A folder of one red, two green and three blue pictures in classes of these names."""
    for channel, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(channel + 1):
            rgb = [40, 40, 40]
            rgb[channel] = 200 + i
            colour(*rgb).save(folder / name / f"val_{channel}{i}.png")
    return folder


def test_classify_matches_classes_by_name(classifier, tmp_path, capsys):
    where = ["--checkpoint", classifier(["red", "green", "blue"])]
    pictures = coloured(tmp_path / "pictures", ["red", "green", "blue"])
    # The data numbers its classes blue, green, red: only the names can say what is right.
    assert classified(capsys, *where, "--data", pictures)["top1"] == 1.0
    with pytest.raises(SystemExit):
        classified(capsys, *where, "--data", coloured(tmp_path / "other", ["red", "green", "teal"]))
    assert "the model knows no teal" in capsys.readouterr().err


def test_a_label_map_may_give_several_answers_and_leave_classes_out(classifier, tmp_path, capsys):
    where = ["--checkpoint", classifier(["red", "green", "blue"])]
    where += ["--data", coloured(tmp_path / "pictures", ["rouge", "vert", "bleu"])]
    maps = tmp_path / "map.json"
    maps.write_text(json.dumps({"rouge": ["green", "red"], "bleu": 0}))
    found = classified(capsys, *where, "--label-map", maps)
    # The red one is right; the three blue ones are called red by the map, and the answer is blue;
    # the green ones are not in the map.
    assert (found["top1"], found["pictures"]) == (0.25, 4)
    maps.write_text(json.dumps({"rouge": 7}))
    with pytest.raises(SystemExit):
        classified(capsys, *where, "--label-map", maps)
    assert "classes that the model or the data has not" in capsys.readouterr().err
    maps.write_text(json.dumps({"rouge": "pink"}))
    with pytest.raises(SystemExit):
        classified(capsys, *where, "--label-map", maps)
    assert "is no label map" in capsys.readouterr().err


def test_numeric_folders_are_numbers_of_the_models_classes(classifier, tmp_path, capsys):
    where = ["--checkpoint", classifier(None)]
    pictures = coloured(tmp_path / "pictures", ["0", "1", "2"])
    assert classified(capsys, *where, "--data", pictures)["top1"] == 1.0
    # Only folders 0 and 2: a number is a number, not a place among the folders.
    (pictures / "1").rename(tmp_path / "away")
    assert classified(capsys, *where, "--data", pictures)["top1"] == 1.0
    maps = tmp_path / "map.json"
    maps.write_text(json.dumps({"0": 0, "1": 1, "2": 2}))
    assert classified(capsys, *where, "--data", pictures, "--label-map", maps)["top1"] == 1.0
    (tmp_path / "away").rename(pictures / "1")
    # Three classes have no 10, but there are as many folders: they are in their order.
    (pictures / "2").rename(pictures / "10")
    assert classified(capsys, *where, "--data", pictures)["top1"] == 1.0
    # Of two folders of which one has no place the map says what is meant.
    (pictures / "1").rename(tmp_path / "away")
    with pytest.raises(SystemExit):
        classified(capsys, *where, "--data", pictures)
    why = "the model has 3 classes and no names for them, the data has 2: give --label-map"
    assert why in capsys.readouterr().err
    maps.write_text(json.dumps({"0": 0, "10": 2}))
    assert classified(capsys, *where, "--data", pictures, "--label-map", maps)["top1"] == 1.0


def test_folders_that_are_numbered_from_1_are_as_many_classes(classifier, tmp_path, capsys):
    where = ["--checkpoint", classifier(None), "--data"]
    pictures = coloured(tmp_path / "pictures", ["1", "2", "3"])
    evaluate.main(["--task", "classify", "--workers", "0", *map(str, [*where, pictures])])
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1])["top1"] == 1.0
    assert "3 classes without names: taken for the data's, in its order" in printed
    # Of these alone, 1 and 2, each is the class of its number.
    shutil.rmtree(pictures / "3")
    evaluate.main(["--task", "classify", "--workers", "0", *map(str, [*where, pictures])])
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1])["top1"] == 0.0
    assert "3 classes without names: the data's class N is number N of them, from 0" in printed


def test_numeric_classes_of_a_head_that_was_trained_in_another_order(classifier, tmp_path, capsys):
    """Checkpoints keep their names: what was once sorted as texts is not relabelled."""
    pictures = coloured(tmp_path / "pictures", ["10", "2", "0"])
    for names, answers in ((["0", "10", "2"], (1, 2, 0)), (["0", "2", "10"], (2, 1, 0))):
        where = ["--checkpoint", classifier(names, answers), "--data", pictures]
        assert classified(capsys, *where)["top1"] == 1.0


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
def test_wnids_are_classes_of_a_released_head(kind, classifier, tmp_path, capsys):
    """Where a head of ImageNet's 1,000 classes meets three of its folders."""
    where = kind(coloured(tmp_path / "three", WNIDS))
    where = where if isinstance(where, tuple) else (where,)
    checkpoint = classifier(None, answers=(281, 0, 999), classes=1000)
    found = classified(capsys, "--checkpoint", checkpoint, "--data", *where)
    assert found["top1"] == 1.0 and found["pictures"] == (6 if kind is not both_splits else 4)
    wrong = classifier(None, answers=(0, 1, 2), classes=1000)  # the places among three folders
    assert classified(capsys, "--checkpoint", wrong, "--data", *where)["top1"] == 0.0


def test_wnids_by_facts_that_are_known_of_the_lists():
    """Their length, some famous places, and that they are sorted."""
    tabby, tench, tissue = WNIDS
    known = {1000: {tench: 0, "n02099712": 208, tabby: 281, "n02504458": 386, "n04399382": 850,
                    "n07753592": 954, tissue: 999},  # tench, labrador, cat, elephant, teddy, banana
             21841: {tench: 359, "n01443537": 368, "n01484850": 460, "n01491361": 475},
             21843: {tench: 359, "n01443537": 368, "n01484850": 460, "n01491361": 475}}  # fmt: skip
    lists = {
        count: labels_module.names_of_list(count, [*places]) for count, places in known.items()
    }
    for count, names in lists.items():
        assert len(set(names)) == count and names == sorted(names)
        assert {name: names.index(name) for name in known[count]} == known[count]
    # Google's list has two more than the release of fall 2011, which lacks the teddy bear.
    assert set(lists[21843]) - set(lists[21841]) == {"n03931044", "n09859684"}
    assert set(lists[1000]) - set(lists[21841]) == {"n04399382"}


def test_without_the_lists_of_wnids_nothing_is_guessed(tmp_path, monkeypatch):
    """Where labels.py was copied alone."""
    monkeypatch.setattr(labels_module, "__file__", str(tmp_path / "labels.py"))
    assert labels_module.names_of_list(1000, WNIDS) is None
    assert labels_module.names_of_list(3, WNIDS) == WNIDS


def test_a_python_without_lzma_is_one_line(classifier, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lzma", None)
    pictures = coloured(tmp_path / "pictures", WNIDS)
    asked = ["--task", "classify", "--checkpoint", classifier(None, classes=1000)]
    line, _ = refused(capsys, *map(str, [*asked, "--data", pictures]))
    assert "imagenet_1000.txt.xz cannot be read" in line and "use a Python" in line
    assert labels_module.names_of_list(1000, ["3", "7"])[7] == "7"  # which needs no list


def test_a_head_of_21841_classes_knows_wnids_and_says_which_it_does_not(
    classifier, tmp_path, capsys
):
    pictures = coloured(tmp_path / "pictures", ["n01484850", "n01440764", "n01443537"])
    checkpoint = classifier(None, answers=(460, 359, 368), classes=21841)
    assert classified(capsys, "--checkpoint", checkpoint, "--data", pictures)["top1"] == 1.0
    (pictures / "n01440764").rename(pictures / "n04399382")  # a teddy bear
    asked = ["--task", "classify", "--checkpoint", checkpoint, "--data", pictures]
    line, _ = refused(capsys, *map(str, asked))
    assert "the model knows no n04399382 (1 of the data's classes): give --label-map" in line


def test_pictures_of_mistakes_name_the_classes_of_a_released_head(
    classifier, tmp_path, capsys, monkeypatch
):
    lines = []
    monkeypatch.setattr(evaluate, "draw_mistakes", lambda *given: lines.extend(given[1]))
    monkeypatch.setattr(evaluate, "draw_confusion", lambda *given: lines.extend(given[1]))
    where = ["--data", coloured(tmp_path / "pictures", WNIDS)]
    where += ["--checkpoint", classifier(None, answers=(281, 850, 999), classes=1000)]
    for flag in ("--mistakes", "--confusion"):
        classified(capsys, *where, flag, tmp_path / "drawn.png")
        if flag == "--mistakes":
            assert len(lines) == 2 and all(line.startswith("n04399382 (") for line in lines)
            assert all(line.endswith("), is n01440764") for line in lines)
            lines.clear()
    assert len(lines) == 1000 and lines[281] == "n02123045"


def test_a_head_without_names_and_other_numbers_of_classes_is_refused(
    classifier, tmp_path, capsys, monkeypatch
):
    pictures = coloured(tmp_path / "pictures", ["a", "b", "c"])
    where = ["--checkpoint", classifier(None), "--data", pictures]
    assert classified(capsys, *where)["top1"] == 1.0  # as many as the head has: in their order
    (pictures / "a").rename(tmp_path / "away")
    asked = ["--task", "classify", *map(str, where)]
    monkeypatch.setattr(evaluate, "extract", None)  # would fail: before anything is computed
    line, _ = refused(capsys, *asked)
    assert "the model has 3 classes and no names for them, the data has 2: give --label-map" in line
    where[1] = classifier(None, classes=1000)  # these are no wnids
    assert "has 1000 classes" in refused(capsys, *asked)[0]
    monkeypatch.undo()
    (tmp_path / "map.json").write_text(json.dumps({"b": 1, "c": 2}))
    assert classified(capsys, *where, "--label-map", tmp_path / "map.json")["top1"] == 1.0


def test_classes_of_a_head_that_share_a_name_both_count(classifier, tmp_path, capsys):
    """ImageNet has two cranes: where the data has one of that name, either is right."""
    pictures = coloured(tmp_path / "pictures", ["crane", "ox", "yak"])
    for answer in (0, 3):
        checkpoint = classifier(["crane", "ox", "yak", "crane"], (answer, 1, 2), 4)
        assert classified(capsys, "--checkpoint", checkpoint, "--data", pictures)["top1"] == 1.0
    where = ["--checkpoint", checkpoint, "--data", coloured(tmp_path / "more", ["a", "ox", "yak"])]
    (tmp_path / "map.json").write_text(json.dumps({"a": "crane", "ox": "ox", "yak": ["yak"]}))
    evaluate.main(
        ["--task", "classify", "--label-map", str(tmp_path / "map.json"), *map(str, where)]
    )
    printed = capsys.readouterr().out
    assert "classes that share their names (1): crane" in printed
    assert json.loads(printed.splitlines()[-1])["top1"] == 1.0


def test_real_labels_have_several_answers_or_none(classifier, tmp_path, capsys):
    folder = tmp_path / "val" / "any"
    folder.mkdir(parents=True)
    (tmp_path / "val" / "other").mkdir()
    for number, channel in enumerate((0, 1, 2, 2), start=1):  # answers are 0, 1, 2, 2
        rgb = [40, 40, 40]
        rgb[channel] = 200
        colour(*rgb).save(folder / f"ILSVRC2012_val_{number:08}.png")
    colour(200, 40, 40).save(tmp_path / "val" / "other" / "ILSVRC2012_val_00000005.png")
    real = tmp_path / "real.json"
    real.write_text(json.dumps([[1], [0, 1], [], [2], [0, 2]]))  # wrong, right, none, right, right
    where = ["--checkpoint", classifier(None), "--data", tmp_path / "val"]
    found = classified(capsys, *where, "--real-labels", real)
    assert (found["top1"], found["pictures"]) == (0.75, 4)
    pack.pack(str(tmp_path / "val"), str(tmp_path / "val-%03d.tar"), shard_size=2)
    packed = ["--checkpoint", classifier(None), "--data", tmp_path / "val-*.tar"]
    assert classified(capsys, *packed, "--real-labels", real) == found
    wrong = [[1], [0], [9], [2], [0]], [["red"], [0], [], [2], [0]]
    for content in ([[1]], {"1": [1]}, [[1], [0], None, [2], [0]], *wrong):
        real.write_text(json.dumps(content))
        with pytest.raises(SystemExit):
            classified(capsys, *where, "--real-labels", real)
        assert "is not real.json" in capsys.readouterr().err


def test_a_classifier_that_pools_the_mean_is_an_encoder_too(tmp_path):
    """Its last norm has another name, and comes after the mean."""
    model = models.Classifier("16x1x2", classes=3, image_size=8, patch_size=4, pool="mean")
    torch.nn.init.normal_(model.fc_norm.weight)
    models.save_weights(tmp_path / "model.pt", model.state_dict(), model.config)
    encoder, line = evaluate.load_model(tmp_path / "model.pt", "knn", "cpu")
    assert line.endswith("norm from fc_norm")
    assert torch.equal(encoder.norm.weight, model.fc_norm.weight)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(encoder.encode(images), model.encode(images))


def test_labels_may_stand_in_a_file(classifier, tmp_path, capsys):
    pictures = coloured(tmp_path / "pictures", ["a", "b", "c"])
    names = {"a": "red", "b": "green", "c": "blue"}
    paths = sorted(pictures.rglob("*.png"))
    rows = [f"{path.relative_to(pictures)},{names[path.parent.name]}" for path in paths]
    (tmp_path / "labels.csv").write_text("image,label\n" + "\n".join(rows))
    where = ["--checkpoint", classifier(["red", "green", "blue"]), "--data", pictures]
    found = classified(capsys, *where, "--labels", tmp_path / "labels.csv")
    assert (found["top1"], found["pictures"]) == (1.0, 6)
    # With spaces, and one without a label, which does not count.
    rows = [row.replace(",", ", ") + " " for row in rows]
    rows[0] = rows[0].partition(",")[0] + ","
    (tmp_path / "labels.csv").write_text("path, class\n" + "\n".join(rows))
    found = classified(capsys, *where, "--labels", tmp_path / "labels.csv")
    assert (found["top1"], found["pictures"]) == (1.0, 5)


def test_a_border_is_cut_off_and_a_squashed_picture_is_whole(classifier, tmp_path, capsys):
    framed = Image.new("RGB", (48, 24), (255, 0, 0))  # red outside, blue inside
    framed.paste((0, 0, 150), (8, 8, 40, 16))
    for name in ("red", "green", "blue"):
        (tmp_path / "framed" / name).mkdir(parents=True)
        framed.save(tmp_path / "framed" / name / "a.png")
    where = ["--checkpoint", classifier(["red", "green", "blue"]), "--data", tmp_path / "framed"]
    model = evaluate.load_model(where[1], "classify", "cpu")[0]
    answers = {}
    for flags in (["--border", "8"], ["--val-crop", "0"], ["--val-crop", "0.3"]):
        table = tmp_path / "confusion.png"
        found = classified(capsys, *where, *flags, "--confusion", table)
        assert found["top1"] == pytest.approx(1 / 3) and table.exists()
        source = data.open_sources(str(where[3]))[0]
        source = evaluate.Bordered(source, 8) if flags[0] == "--border" else source
        share = float(flags[1]) if flags[0] == "--val-crop" else 1.0
        image = data.crop_and_resize(source.read(0)["image"](), (8, 8), 3, centre=share)
        answers[" ".join(flags)] = int(model(data.normalize(image[None])).argmax())
    assert answers == {"--border 8": 2, "--val-crop 0": 0, "--val-crop 0.3": 2}


def test_classify_wants_a_head_and_labels(encoder, photos, classifier, capsys):
    with pytest.raises(SystemExit):
        classified(capsys, "--checkpoint", encoder.path, "--data", photos)
    assert "has no head" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        classified(capsys, "--checkpoint", classifier(None), "--data", photos)
    assert "no labels in" in capsys.readouterr().err


# ------------------------------------------------------------------------------- pictures and texts


def test_ranks_count_wrong_answers_that_are_as_similar():
    asked, offered = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0)).unbind()
    offered = torch.cat([offered, offered[:2]])  # ties
    rows, answers = (
        torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7, 8]),
        torch.tensor([0, 3, 1, 2, 3, 4, 5, 6, 7, 8]),
    )
    found = lit_module.ranks_of(asked, offered, rows, answers).tolist()
    for row in range(9):
        similarity = (asked[row] @ offered.T).tolist()
        right = {answer for r, answer in zip(rows.tolist(), answers.tolist()) if r == row}
        best = max(similarity[i] for i in right)
        wrong = [s for i, s in enumerate(similarity) if i not in right]
        assert found[row] == sum(s > best - 1e-6 for s in wrong)
    collapsed = torch.ones(9, 4)  # where all are alike, nothing is found
    assert lit_module.ranks_of(collapsed, collapsed, torch.arange(9), torch.arange(9)).min() == 8


def test_class_embeddings_average_templates_and_synonyms():
    def model(tokens):  # a text's embedding is (its length, 1), of unit length
        lengths = (tokens > 2).sum(dim=1).float()
        pair = torch.stack([lengths, torch.ones_like(lengths)], dim=1)
        return None, torch.nn.functional.normalize(pair, dim=1), None

    model.config = {"text": {"context": 50}}
    names, templates = [["ox", "kitten"], ["\u732b"]], ("{}", "a {}!")
    found = lit_module.class_embeddings(model, names, templates, lit_module.ByteTokenizer(), "cpu")
    for row, lengths in zip(found, ([2, 5, 6, 9], [3, 6])):
        sums = np.sum([np.array([n, 1]) / np.hypot(n, 1) for n in lengths], axis=0)
        assert row.numpy() == pytest.approx(sums / np.linalg.norm(sums), rel=1e-6)


def test_names_of_classes(tmp_path):
    path = tmp_path / "names.txt"
    assert lit_module.read_class_names(None, ["sea_lion", "ox"]) == [["sea lion"], ["ox"]]
    path.write_text("\ufeff\u0430\u043a\u0443\u043b\u0430, shark \r\nox\n", "utf-8")
    names = [["\u0430\u043a\u0443\u043b\u0430", "shark"], ["ox"]]
    assert lit_module.read_class_names(path, ["b", "a"]) == names
    assert lit_module.read_class_names(path, None) == names
    path.write_text("n02\tox, bull\nn01\tshark\nn03\tcat\n")  # by name, in any order
    assert lit_module.read_class_names(path, ["n01", "n02"]) == [["shark"], ["ox", "bull"]]


def test_a_line_of_names_belongs_to_the_folder_of_its_number(tmp_path):
    """The third line to the folder 2, also of shards that list 10 before 2."""
    path = tmp_path / "names.txt"
    path.write_text("\n".join(f"name {i}" for i in range(12)))
    for i in range(12):
        write_picture(tmp_path / "numbered" / str(i) / "a.png", i, 100)
    in_order = [str(i) for i in range(12)]
    for classes in (data.Folder(str(tmp_path / "numbered")).classes, in_order, sorted(in_order)):
        found = lit_module.read_class_names(path, classes)
        assert dict(zip(classes, found)) == {str(i): [f"name {i}"] for i in range(12)}
    # Some of the folders; and folders from 1 on, which are as many as the lines.
    assert lit_module.read_class_names(path, ["2", "10"]) == [["name 2"], ["name 10"]]
    from_one = [str(i) for i in range(1, 13)]
    assert lit_module.read_class_names(path, from_one) == [[f"name {i}"] for i in range(12)]


def test_names_of_all_of_imagenet_for_some_of_its_folders(tmp_path, capsys):
    """And two classes may share a name, as the missiles of the list that CLIP's authors use."""
    path = tmp_path / "names.txt"
    names = [f"name {i}" for i in range(1000)]
    names[657] = names[744] = "missile"
    path.write_text("\n".join(names))
    found = lit_module.read_class_names(path, ["n15075141", "n01440764", "n02123045"])
    assert found == [["name 999"], ["name 0"], ["name 281"]]
    assert "share" not in capsys.readouterr().out
    found = lit_module.read_class_names(path, None)
    assert len(found) == 1000 and found[657] == found[744] == ["missile"]
    assert "classes that share their names (1): missile\n" in capsys.readouterr().out
    path.write_text("a\tox, bull\nb\tbull,ox\nc\tbull\n")  # the same of several names
    found = lit_module.read_class_names(path, ["c", "b", "a"])
    assert found == [["bull"], ["bull", "ox"], ["ox", "bull"]]
    assert "classes that share their names (1): bull, ox\n" in capsys.readouterr().out
    assert lit_module.read_class_names(None, ["a_b", "a-b"]) == [["a b"], ["a b"]]
    assert "share their names (1): a b" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "classes", "said"),
    [
        ("ox\n\ncat\n", None, "line 2 is blank"),
        ("", None, "is empty"),
        ("ox\ncat\n", ["a"], "has 2 lines, the data 1 classes: begin each line with the class"),
        ("ox\ncat\n", ["0", "1", "2"], "has 2 lines, the data 3 classes: begin each line"),
        ("ox\ncat\nemu\n", ["0", "3"], "has 3 lines, the data 2 classes: begin each line"),
        ("a\tox\ncat\n", None, "line 2 has no tab"),
        ("a\tox\nb\tcat\n", ["a", "c"], "no names for c (1)"),
        ("a\tox\na\tcat\n", ["a"], "names a twice"),
        (",\n", None, "line 1 holds no name"),
    ],
)
def test_unusable_names_of_classes_are_refused(text, classes, said, tmp_path):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ValueError) as error:
        lit_module.read_class_names(tmp_path / "names.txt", classes)
    assert said in str(error.value)
    with pytest.raises(ValueError, match="cannot read class names"):
        lit_module.read_class_names(tmp_path / "none.txt", classes)


def test_a_template_without_a_place_for_the_name_is_refused(tmp_path):
    (tmp_path / "templates.txt").write_text("a {}\na photo\n")
    with pytest.raises(ValueError, match="line 2 has no {}"):
        lit_module.read_templates(tmp_path / "templates.txt")
    (tmp_path / "templates.txt").write_text("a {}\nthe {}\na {}")
    with pytest.raises(ValueError, match="line 3 repeats"):
        lit_module.read_templates(tmp_path / "templates.txt")
    assert all("{}" in template for template in lit_module.read_templates(None))


@pytest.mark.parametrize(("pool", "squashed"), [("cls", True), ("mean", False)])
def test_released_finetuned_weights_see_squashed_pictures(pool, squashed, tmp_path, capsys):
    """As their repository evaluates them: 512 pixels, timm's names, a head on the class token."""
    kind = models.Classifier("24x1x2", 3, pool, image_size=512, patch_size=256)
    torch.save(kind.state_dict(), tmp_path / "vit_512.pt")
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    for number, colour in enumerate(colours):
        (tmp_path / "val" / f"n{number}").mkdir(parents=True)
        Image.new("RGB", (30, 10), colour).save(tmp_path / "val" / f"n{number}" / "a.png")
    asked = ["--checkpoint", tmp_path / "vit_512.pt", "--data", tmp_path / "val", "--heads", 2]
    evaluate.main(["--task", "classify", "--workers", "0", *map(str, asked)])
    assert ("pictures are squashed" in capsys.readouterr().out) is squashed
    convert(tmp_path / "vit_512.pt", tmp_path / "own.pt", "own", 2)  # which keeps that
    asked[1] = tmp_path / "own.pt"
    evaluate.main(["--task", "classify", "--workers", "0", *map(str, asked)])
    assert ("pictures are squashed" in capsys.readouterr().out) is squashed
