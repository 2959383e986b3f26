"""Stage 2 as a program: hashtags in, an encoder and a head out; shared promises."""

import json
from argparse import Namespace
from functools import partial

import conftest
import numpy as np
import pytest
import torch
from conftest import (
    PICTURES,
    check_that_the_limit_is_the_runs,
    equal_states,
    large_pictures,
    read_metrics,
    rewound,
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


weak = partial(stage, *TINY, program="weak_pretrain.py")
completed = partial(conftest.completed, *TINY, program="weak_pretrain.py")


def write_tags(folder, tags, out, **options):
    """Write labels.jsonl of {path: hashtags} of a folder, and tags/. Returns their flags."""
    lines = [json.dumps({"path": path, "hashtags": tags[path]}) for path in tags]
    (out / "labels.jsonl").write_text("\n".join([*lines, "{broken"]))
    source = data.Folder(str(folder), labels=str(out / "labels.jsonl"))
    hashtags_module.write_hashtags(source, out / "tags", **options)
    flags = ["--data", folder, "--labels", out / "labels.jsonl", "--tags", out / "tags"]
    return [str(flag) for flag in flags]


@pytest.fixture(scope="module")
def hashtags(tmp_path_factory):
    """Flags for the test pictures with hashtags: each carries two of five."""
    names = [f"{'ab'[i % 2]}/{i}.png" for i in range(120)]
    tags = {name: [f"#2{i % 2}", f"#3{i % 3}"] for i, name in enumerate(names)}
    return write_tags(PICTURES, tags, tmp_path_factory.mktemp("hashtags"))


@pytest.fixture(scope="module")
def plain(hashtags, tmp_path_factory):
    """The output folder of one run from scratch."""
    out = tmp_path_factory.mktemp("weak") / "run"
    completed(*hashtags, "--out", out)
    return out


def test_the_last_lines_show_what_frequencies_alone_reach(capsys):
    rows = [{"loss": 4.0}, {"held_out_loss": 2.96604, "hit_1": 0.674, "hit_5": 1.0}]
    frequent = {"held_out_loss": 3.75, "hit_1": 0.129, "hit_5": 0.639}
    rows[1] |= {f"{name}_by_frequency": value for name, value in frequent.items()}
    hashtags_module.print_hits(rows[1])
    assert capsys.readouterr().out.splitlines() == [
        "held-out pictures     loss   hit-1   hit-5",
        "  tags' frequencies 3.7500   12.9%   63.9%",
        "  trained           2.9660   67.4%  100.0%",
    ]
    hashtags_module.print_hits(rows[0])
    hashtags_module.print_hits({})  # metrics.jsonl was removed
    assert capsys.readouterr().out == ""


def test_a_run_leaves_an_encoder_and_a_head_and_logs_hits(plain):
    state, config = models.read_weights(plain / "model.pt")
    assert config["class_names"] and len(config["class_names"]) == config["classes"]
    assert state["head.weight"].shape == (config["classes"], 16)
    models.Classifier(**config).load_state_dict(state)
    metrics = read_metrics(plain)
    assert [line["step"] for line in metrics if "hit_5" in line] == [4, 8, 12]
    assert 0 <= metrics[-1]["hit_1"] <= metrics[-1]["hit_5"] <= 1
    assert metrics[-1]["loss"] < metrics[0]["loss"] == pytest.approx(np.log(4 * 6) / 2, rel=0.05)
    # Each picture has one of two tags and one of three: what a constant answer reaches.
    frequent = {name: metrics[-1][f"{name}_by_frequency"] for name in ("held_out_loss", "hit_5")}
    assert frequent == pytest.approx({"held_out_loss": np.log(4 * 6) / 2, "hit_5": 1}, rel=0.05)
    assert metrics[-1]["hit_1_by_frequency"] in (1 / 3, 1 / 2, 2 / 3)  # of 6 pictures


def test_pictures_of_too_many_pixels_are_unreadable(tmp_path):
    flags = large_pictures(tmp_path / "large")
    tags = {f"{'ab'[i % 2]}/{i}.png": ["#a", "#b"] for i in range(8)}
    flags += [*write_tags(tmp_path / "large", tags, tmp_path, min_count=1), "--steps", 1]
    check_that_the_limit_is_the_runs(partial(weak, *flags), tmp_path)


CURVE = ["--batch-size", "24", "--steps", "20"]  # for 1, 2, 3 and 4 processes


@pytest.fixture(scope="module")
def curve(hashtags, tmp_path_factory):
    """The metrics of a plain run of one process."""
    out = tmp_path_factory.mktemp("curve") / "run"
    completed(*hashtags, *CURVE, "--out", out)
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
    completed(*flags, "--out", tmp_path / "run", processes=processes)
    for ours, theirs in zip(read_metrics(tmp_path / "run"), curve, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_stopped_and_resumed_is_the_same_run(plain, hashtags, tmp_path):
    out = rewound(plain, tmp_path / "run")
    assert "going on from" in completed(*hashtags, "--out", out).stdout
    assert read_metrics(out) == read_metrics(plain)
    ours, theirs = (models.read_weights(path / "model.pt")[0] for path in (out, plain))
    assert equal_states(ours, theirs)


def test_it_starts_from_stage_1_without_its_decoder(tmp_path):
    model = models.MAE("16x2x2", decoder=(16, 1, 2), image_size=16, patch_size=4)
    models.save_weights(tmp_path / "mae.pt", model.state_dict(), model.config)
    flags = ["--init", tmp_path / "mae.pt", "--out", tmp_path / "run", "--batch-size", "8"]
    flags += ["--steps", "1", "--lr", "1e-9"]
    ran = conftest.completed(*flags, program="weak_pretrain.py")
    assert "newly initialised: head" in ran.stdout and "dropped: decoder_blocks" in ran.stdout
    state, config = models.read_weights(tmp_path / "run" / "model.pt")
    assert "decoder" not in config and config["pool"] == "cls"
    for name in state.keys() - {"head.weight", "head.bias"}:
        torch.testing.assert_close(state[name], model.state_dict()[name], rtol=0, atol=1e-6)
    # The head's bias starts at the log shares of the tags, the most frequent first.
    shares = state["head.bias"].exp()
    assert shares.sum().item() == pytest.approx(1, abs=1e-5)
    assert (shares.diff() <= 1e-6).all() and shares[0] > 10 * shares[-1]


def test_the_head_reads_what_is_asked_for(hashtags, tmp_path):
    ran = completed(*hashtags, "--steps", "1", "--pool", "mean", "--out", tmp_path / "run")
    state, config = models.read_weights(tmp_path / "run" / "model.pt")
    assert config["pool"] == "mean" and "fc_norm.weight" in state and "norm.weight" not in state
    assert "--task fewshot --pool mean" in ran.stdout


def test_pictures_of_a_folder_with_tags_from_a_file(photos, tmp_path):
    """Every third has no known tag, and one has something that is no list of tags."""
    tags = {f"{i:03}.jpg": ["#common"] if i % 3 else [] for i in range(40)}
    tags |= {f"{i:03}.jpg": ["#Rare", "#common"] for i in range(0, 40, 10)}
    tags["001.jpg"] = {"no": "list"}
    flags = write_tags(photos, tags, tmp_path, tail_below=10, min_count=3)
    ran = completed(*flags, "--out", tmp_path / "run")
    assert "labels.jsonl: entries that are" in ran.stderr
    assert "2 hashtags" in ran.stdout
    # Pictures without a known tag are never drawn, so none has to be left out of a batch.
    assert read_metrics(tmp_path / "run")[-1]["untagged"] == 0
    # Other hashtags are another run, and without the labels this is other data.
    write_tags(photos, tags, tmp_path, tail_below=5, min_count=3)
    ran = weak(*flags, "--out", tmp_path / "run")
    assert ran.returncode == 2 and "tags was" in ran.stderr
    ran = weak(*flags[:2], *flags[4:], "--out", tmp_path / "other")
    assert ran.returncode == 2 and "other data" in ran.stderr


def test_the_gradient_is_clipped_if_the_recipe_says_so(hashtags, tmp_path, monkeypatch):
    found = []
    # The recipe's, and --clip, which overrides it.
    for clip, given in ((None, None), (1e9, None), (1e-3, None), (None, 1e-3), (1e-3, 0)):
        recipe = weak_pretrain.Recipe(8, 1e-3, 16, 24, 0.08, 0.999, clip)
        monkeypatch.setattr(weak_pretrain, "recipe", lambda _, recipe=recipe: recipe)
        out = tmp_path / f"clip-{clip}-{given}"
        asked = [*TINY[:6], *hashtags, "--workers", "0", "--log-every", "1"]
        asked += [] if given is None else ["--clip", str(given)]
        weak_pretrain.main([*asked, "--out", str(out)])
        found.append(read_metrics(out))
        identity = json.loads((out / "config.json").read_text())
        assert identity["clip"] == given  # None of the recipe's, as in older checkpoints
    free, loose, tight, also_tight, also_free = found
    assert free == loose == also_free and tight == also_tight
    assert free[0]["grad_norm"] == tight[0]["grad_norm"]  # the norm before it is clipped
    assert free[-1]["loss"] != tight[-1]["loss"]


def test_the_recipe_is_the_papers_as_far_as_it_is_known(tmp_path):
    base, large = (
        weak_pretrain.parse_arguments(["--size", size, "--plan"]) for size in ("B", "2B")
    )
    weak_pretrain.prepare(base)
    assert (base.batch_size, base.lr, base.weight_decay) == (8192, pytest.approx(4e-4), 0.1)
    assert (base.warmup, base.min_crop, base.beta2, base.clip) == (0.05, 0.08, 0.999, None)
    assert base.steps * base.batch_size == pytest.approx(5e9, rel=1e-5)
    weak_pretrain.prepare(large)
    assert (large.lr, large.beta2, large.clip) == (pytest.approx(1e-4), 0.95, 1.0)
    assert len(large.vocabulary) == 28_000


@pytest.mark.parametrize(
    ("size", "batch_size", "lr"),  # by hand, from 4e-4 at batches from 1024 and width 768 on
    [("B", 2048, 4e-4), ("B", 64, 1e-4), ("S", 64, 2e-4), ("2B", 256, 5e-5), ("96x1x1", 32, 4e-4)]
    + [("toy", 64, 1e-3), ("toy", 16, 5e-4)],
)
def test_the_peak_lr_of_another_batch_or_width(size, batch_size, lr):
    flags = ["--size", size, "--batch-size", str(batch_size), "--micro-batch", "2", "--plan"]
    run = weak_pretrain.parse_arguments(flags)
    weak_pretrain.prepare(run)
    assert run.lr == pytest.approx(lr)


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
