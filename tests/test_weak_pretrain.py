"""Stage 2 as a program: hashtags in, an encoder and a head out, and the promises it shares."""

import json
import shutil
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (
    PICTURES,
    check_that_the_limit_is_the_runs,
    equal_states,
    large_pictures,
    read_metrics,
    rewind,
    stage,
)

import data
import model as models
import weak_pretrain
from support import hashtags as hashtags_module

TINY = [
    *("--size", "16x2x2", "--image-size", "16", "--patch-size", "4", "--batch-size", "8"),
    *("--lr", "1e-3", "--steps", "12", "--save-every", "4", "--log-every", "1", "--workers", "1"),
]


def weak(*arguments, **options):
    return stage(*TINY, *arguments, program="weak_pretrain.py", **options)


@pytest.fixture(scope="module")
def hashtags(tmp_path_factory):
    """Flags for the test pictures with hashtags: each carries two of five."""
    folder = tmp_path_factory.mktemp("hashtags")
    lines = [
        {"path": f"{'ab'[i % 2]}/{i}.png", "hashtags": [f"#{tag}{i % tag}" for tag in (2, 3)]}
        for i in range(120)
    ]
    (folder / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = data.Folder(str(PICTURES), labels=str(folder / "labels.jsonl"))
    hashtags_module.write_hashtags(source, folder / "tags")
    flags = ["--data", PICTURES, "--labels", folder / "labels.jsonl", "--tags", folder / "tags"]
    return [str(flag) for flag in flags]


@pytest.fixture(scope="module")
def plain(hashtags, tmp_path_factory):
    """The output folder of one run from scratch."""
    out = tmp_path_factory.mktemp("weak") / "run"
    ran = weak(*hashtags, "--out", out)
    assert ran.returncode == 0, ran.stderr
    return out


@pytest.fixture
def tagged(photos, tmp_path):
    """A file of hashtags of the photos, and beside it tags/, which `data.py hashtags` makes.

    Every third has none that is known, and one has something that is no list of tags.
    """
    lines = []
    for i in range(40):
        tags = ["#Rare", "#common"] if i % 10 == 0 else ["#common"] if i % 3 else []
        lines.append({"path": f"{i:03}.jpg", "hashtags": tags if i != 1 else {"no": "list"}})
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    source = data.Folder(str(photos), labels=str(labels))
    hashtags_module.write_hashtags(source, tmp_path / "tags", tail_below=10, min_count=3)
    return labels


def test_a_run_leaves_an_encoder_and_a_head_and_logs_hits(plain):
    state, config = models.read_weights(plain / "model.pt")
    assert config["class_names"] and len(config["class_names"]) == config["classes"]
    assert state["head.weight"].shape == (config["classes"], 16)
    models.Classifier(**config).load_state_dict(state)
    metrics = read_metrics(plain)
    assert [line["step"] for line in metrics if "hit_5" in line] == [4, 8, 12]
    assert 0 <= metrics[-1]["hit_1"] <= metrics[-1]["hit_5"] <= 1
    # The head begins at zero: all tags are equally likely.
    assert metrics[0]["loss"] == pytest.approx(np.log(config["classes"]), rel=1e-5)
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_pictures_of_too_many_pixels_are_unreadable(tmp_path):
    flags, labels = large_pictures(tmp_path / "large"), tmp_path / "labels.jsonl"
    entries = [{"path": f"{'ab'[i % 2]}/{i}.png", "hashtags": ["#a", "#b"]} for i in range(8)]
    labels.write_text("\n".join(map(json.dumps, entries)))
    source = data.Folder(str(tmp_path / "large"), labels=str(labels))
    hashtags_module.write_hashtags(source, tmp_path / "tags", min_count=1)
    flags += ["--labels", labels, "--tags", tmp_path / "tags", "--steps", 1]
    check_that_the_limit_is_the_runs(partial(weak, *flags), tmp_path)
    ran = weak(*flags, "--max-pixels", 89_999, "--out", tmp_path / "none")
    assert ran.returncode == 1 and "8 of 8 pictures cannot be read" in ran.stderr
    assert "90000 pixels are over --max-pixels 89999" in ran.stderr


CURVE = ["--batch-size", "24", "--steps", "20"]  # for 1, 2, 3 and 4 processes


@pytest.fixture(scope="module")
def curve(hashtags, tmp_path_factory):
    """The metrics of a plain run of one process."""
    out = tmp_path_factory.mktemp("curve") / "run"
    assert weak(*hashtags, *CURVE, "--out", out).returncode == 0
    return read_metrics(out)


@pytest.mark.parametrize(
    ("processes", "pieces", "extra"),
    [(None, 2, []), (2, 1, []), (3, 2, []), (2, 1, ["--shard-group", "2"])]
    + [(3, 2, ["--shard-group", "3"]), (4, 1, ["--shard-group", "2"])],
)
def test_same_optimisation_on_any_number_of_processes(
    processes, pieces, extra, curve, hashtags, tmp_path
):
    flags = [*hashtags, *CURVE, *extra, "--micro-batch", 24 // (processes or 1) // pieces]
    ran = weak(*flags, "--out", tmp_path / "run", processes=processes)
    assert ran.returncode == 0, ran.stderr
    for ours, theirs in zip(read_metrics(tmp_path / "run"), curve, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_stopped_and_resumed_is_the_same_run(plain, hashtags, tmp_path):
    out = shutil.copytree(plain, tmp_path / "run")
    rewind(out)
    ran = weak(*hashtags, "--out", out)
    assert ran.returncode == 0 and "going on from" in ran.stdout
    assert read_metrics(out) == read_metrics(plain)
    ours, theirs = (models.read_weights(path / "model.pt")[0] for path in (out, plain))
    assert equal_states(ours, theirs)


def test_it_starts_from_stage_1_without_its_decoder(tmp_path):
    model = models.MAE("16x2x2", decoder=(16, 1, 2), image_size=16, patch_size=4)
    models.save_weights(tmp_path / "mae.pt", model.state_dict(), model.config)
    flags = ["--init", tmp_path / "mae.pt", "--steps", "1", "--lr", "1e-9", "--batch-size", "8"]
    ran = stage(*flags, "--out", tmp_path / "run", program="weak_pretrain.py")
    assert ran.returncode == 0, ran.stderr
    assert "newly initialised: head" in ran.stdout and "dropped: decoder_blocks" in ran.stdout
    state, config = models.read_weights(tmp_path / "run" / "model.pt")
    assert "decoder" not in config and config["pool"] == "cls"
    for name in state.keys() - {"head.weight", "head.bias"}:
        torch.testing.assert_close(state[name], model.state_dict()[name], rtol=0, atol=1e-6)


def test_pictures_of_a_folder_with_tags_from_a_file(tagged, photos, tmp_path):
    flags, out = ["--data", photos, "--tags", tmp_path / "tags"], tmp_path / "run"
    ran = weak(*flags, "--labels", tagged, "--out", out)
    assert ran.returncode == 0, ran.stderr
    assert "labels.jsonl: entries that are" in ran.stderr
    assert "2 hashtags" in ran.stdout
    # Pictures without a known tag are never drawn, so none has to be left out of a batch.
    assert read_metrics(out)[-1]["untagged"] == 0
    # Other hashtags are another run, and without the labels this is other data.
    source = data.Folder(str(photos), labels=str(tagged))
    hashtags_module.write_hashtags(source, tmp_path / "tags", tail_below=5, min_count=3)
    ran = weak(*flags, "--labels", tagged, "--out", out)
    assert ran.returncode == 2 and "tags was" in ran.stderr
    ran = weak(*flags, "--out", tmp_path / "other")
    assert ran.returncode == 2 and "other data" in ran.stderr


def test_the_gradient_is_clipped_where_the_recipe_says_so(hashtags, tmp_path, monkeypatch):
    found = []
    for clip in (None, 1e9, 1e-3):
        recipe = weak_pretrain.Recipe(8, 1e-3, 16, 24, 0.08, 0.999, clip)
        monkeypatch.setattr(weak_pretrain, "recipe", lambda _, recipe=recipe: recipe)
        out = tmp_path / f"clip-{clip}"
        asked = [*TINY[:6], *hashtags, "--workers", "0", "--log-every", "1"]
        weak_pretrain.main([*asked, "--out", str(out)])
        found.append(read_metrics(out))
    free, loose, tight = found
    assert free == loose and free[0]["grad_norm"] == tight[0]["grad_norm"]  # the norm before
    assert free[-1]["loss"] != tight[-1]["loss"]


def test_the_recipe_is_the_papers_as_far_as_it_is_known(tmp_path):
    run = weak_pretrain.parse_arguments(["--size", "B", "--plan"])
    weak_pretrain.prepare(run)
    assert (run.batch_size, run.lr, run.weight_decay) == (8192, pytest.approx(4e-4), 0.1)
    assert (run.warmup, run.min_crop, run.beta2, run.clip) == (0.05, 0.08, 0.999, None)
    assert run.steps * run.batch_size == pytest.approx(5e9, rel=1e-5)
    run = weak_pretrain.parse_arguments(["--size", "2B", "--plan"])
    weak_pretrain.prepare(run)
    assert (run.lr, run.beta2, run.clip) == (pytest.approx(1e-4), 0.95, 1.0)
    assert len(run.vocabulary) == 28_000


def test_a_plan_of_many_processes_needs_no_data_and_no_lanes(capsys):
    weak_pretrain.main(["--size", "L", "--gpus", "64", "--shard-group", "8", "--mfu", "0.3"])
    printed = capsys.readouterr().out
    for words in ("head 28.7 M", "with --lanes 192", "group of 8", "8 copies", "30% of their"):
        assert words in printed


def test_learning_rate_is_a_ramp_and_a_line():
    run = Namespace(lr=1.0, warmup=0.1, steps=100)
    rates = [weak_pretrain.learning_rate(step, run) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and max(rates) == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5) and rates[99] == pytest.approx(1 / 90)
