"""Stage 1 as a program: its recipe, what it writes, and unusable input."""

import errno
import fcntl
import io
import itertools
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import (
    ODD_NAMES,
    PICTURES,
    ROOT,
    TINY,
    check_that_the_limit_is_the_runs,
    completed,
    large_pictures,
    picture,
    read_metrics,
    rewound,
    stage,
)
from PIL import Image

import evaluate
import finetune
import mae_pretrain
import model as models
import weak_pretrain
from support import checkpoints, launch, toy
from support.plan import flops_per_image, training_memory


def settled(*arguments):
    """The run that these arguments lead to, before anything is written."""
    run = mae_pretrain.parse_arguments(list(map(str, arguments)))
    mae_pretrain.prepare(run)
    return run


def refused(capsys, *arguments, program=mae_pretrain):
    """The one line with which a stage refuses these arguments, with exit status 2."""
    with pytest.raises(SystemExit, match="^2$"):
        program.main([str(argument) for argument in arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{program.__name__}.py: ")
    return line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output folder of a tiny run, and what it printed. Tests copy it to change it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, completed(*TINY, "--out", out).stdout


def test_defaults_are_the_papers_recipe(tmp_path):
    run = settled("--size", "B", "--out", tmp_path / "run")
    assert run.batch_size == 4096
    assert run.lr == 2.4e-3  # 1.5e-4 x 4096 / 256
    assert (run.weight_decay, run.warmup, run.min_crop) == (0.05, 0.05, 0.2)
    assert run.config["decoder"] == [512, 8, 16] and run.config["mask_ratio"] == 0.75
    assert run.config["normalize_targets"] and run.config["image_size"] == [224, 224]
    assert run.steps == math.ceil(1600 * toy.TOY_EPOCH / 4096)


# By hand: 2.4e-3 at batch 4096 and width 768, times the square root of the batch's share, times
# 768 / width for narrower networks, at most 2.4e-3; the toy size has 1e-3 at batch 32.
RATES = [
    ("B", 4096, 2.4e-3), ("L", 4096, 2.4e-3), ("6.5B", 16_384, 2.4e-3), ("T", 4096, 2.4e-3),
    ("B", 1024, 1.2e-3), ("B", 256, 6e-4), ("S", 256, 1.2e-3), ("T", 64, 1.2e-3),
    ("96x1x1", 32, 1.697e-3), ("96x1x1", 1024, 2.4e-3), ("1024x1x1", 1024, 1.2e-3),
    ("toy", 32, 1e-3), ("toy", 8, 5e-4), ("toy", 128, 1e-3),
]  # fmt: skip


@pytest.mark.parametrize(("size", "batch_size", "lr"), RATES)
def test_the_peak_lr_of_another_batch_or_width(size, batch_size, lr, tmp_path):
    flags = "--size", size, "--batch-size", batch_size, "--micro-batch", 2, "--out", tmp_path
    assert settled(*flags).lr == pytest.approx(lr, rel=1e-3)
    assert settled(*flags, "--lr", 0.1).lr == 0.1


def test_a_run_says_where_its_lr_comes_from(tmp_path, capsys):
    plan = ["--size", "T", "--batch-size", "64", "--plan"]
    mae_pretrain.main(plan)
    mae_pretrain.main([*plan, "--lr", "0.1"])
    printed = capsys.readouterr().out
    factors = "sqrt(batch 64 / 4096) x width 768 / 192"
    assert f"lr           1.20e-03 at its peak: the recipe's 2.40e-03 x {factors}\n" in printed
    assert "lr           1.00e-01 at its peak: --lr\n" in printed


def test_the_length_can_be_given_in_steps_epochs_or_samples(tmp_path):
    given = partial(settled, "--out", tmp_path / "run", "--batch-size", 100)
    assert given("--steps", 7).steps == 7
    assert given("--samples", 701).steps == 8
    assert given("--epochs", 0.5).steps == math.ceil(toy.TOY_EPOCH / 2 / 100)
    # Ten saves, the last one at the end: 9 x 32 + 25 = 313, not ten of 31 and one of 3.
    for steps, rhythm in ((7, 1), (313, 32), (99999, 1000)):
        assert given("--steps", steps).save_every == rhythm


def test_learning_rate_warms_up_from_above_zero_and_ends_near_zero():
    run = Namespace(lr=1.0, warmup=0.1, steps=100)
    rates = [mae_pretrain.learning_rate(step, run) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and max(rates) == rates[10] == 1.0
    assert all((a < b) == (i < 10) for i, (a, b) in enumerate(itertools.pairwise(rates)))
    assert rates[55] == pytest.approx(0.5)  # half way through the cosine
    assert 0 < rates[99] < 1e-3


def test_loss_and_gradient_are_means_over_the_samples_that_count():
    model, x = torch.nn.Linear(3, 1), torch.randn(4, 3)
    weight = torch.tensor([1.0, 1, 0, 1])
    run = Namespace(batch_size=4, processes=1, shard_group=None)
    totals = launch.Totals(torch.device("cpu"))
    for part, bad in ((slice(0, 2), []), (slice(2, 4), ["name"])):  # micro-batches
        loss = (model(x[part])[:, 0] * weight[part]).sum() / 4
        loss.backward()
        totals.add(loss.detach(), weight[part].sum(), bad)
    totals.read(run, model, Namespace(asked=False, no_batch=None))
    mean = model(x)[weight > 0].mean()
    gradients = torch.autograd.grad(mean, [model.weight, model.bias])
    torch.testing.assert_close((model.weight.grad, model.bias.grad), gradients)
    norm = torch.nn.utils.get_total_norm(gradients)
    assert (totals.loss, totals.norm) == pytest.approx((mean.item(), norm.item()))
    assert (totals.weight, totals.new_bad, totals.stopping) == (3, 1, False)


def test_a_run_leaves_all_that_the_next_stage_needs(finished):
    out, printed = finished
    wanted = ".lock config.json metrics.jsonl checkpoints model.pt reconstruction.png"
    assert {path.name for path in out.iterdir()} == set(wanted.split())
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == ["LATEST", "step-00000008", "step-00000012"]
    metrics = read_metrics(out)
    assert [line["step"] for line in metrics] == list(range(1, 13))
    assert [line["step"] for line in metrics if "held_out_loss" in line] == [4, 8, 12]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[-1]["held_out_loss"] > 0.9 and "the mean of each patch gives 0.9" in printed
    state, config = models.read_weights(out / "model.pt")
    models.MAE(**config).load_state_dict(state)
    assert json.loads((out / "config.json").read_text())["model"] == config
    assert "trained" in printed and "next: python evaluate.py" in printed
    Image.open(out / "reconstruction.png").verify()


@pytest.mark.parametrize("kind", [models.ViT, partial(models.Classifier, classes=5)])
def test_init_inherits_the_architecture_and_says_what_was_loaded(kind, tmp_path):
    model = kind("16x2x2", image_size=16, patch_size=4)
    models.save_weights(tmp_path / "model.pt", model.state_dict(), model.config)
    start = ["--init", tmp_path / "model.pt", "--decoder", "16x1x2", "--image-size", "24"]
    ran = completed(*start, "--steps", 1, "--batch-size", 4, "--out", tmp_path / "run")
    assert "resampled: pos_embed from 4x4 to 6x6" in ran.stdout
    assert "newly initialised: decoder_blocks" in ran.stdout
    assert ("dropped: head" in ran.stdout) == (kind is not models.ViT)
    _, config = models.read_weights(tmp_path / "run" / "model.pt")
    assert (config["size"], config["image_size"]) == ("16x2x2", [24, 24])


def test_init_may_be_a_public_mae_whose_arguments_say_what_it_predicts(tmp_path):
    model = models.MAE("toy", image_size=16, mask_ratio=0.5, normalize_targets=False)
    models.save_weights(tmp_path / "own.pt", model.state_dict(), model.config)
    args = Namespace(norm_pix_loss=False, mask_ratio=0.5, input_size=16)
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "public.pth")
    common = [*TINY[:2], *TINY[-2:], "--batch-size", 8, "--steps", 1, "--log-every", 1]
    found = []
    for name in ("own.pt", "public.pth"):
        init = ["--init", tmp_path / name, "--out", tmp_path / name[:3]]
        config = settled(*init).config
        assert (config["normalize_targets"], config["mask_ratio"]) == (False, 0.5)
        config = settled(*init, "--no-raw-pixels", "--mask-ratio", "0.25").config
        assert (config["normalize_targets"], config["mask_ratio"]) == (True, 0.25)
        assert not settled(*init, "--raw-pixels").config["normalize_targets"]
        completed(*common, *init)
        found.append(read_metrics(tmp_path / name[:3]))
    # The first loss, and the held-out one, are those of our own weights with this config.
    assert found[0] == found[1] and "held_out_loss" in found[0][-1]


@pytest.mark.parametrize("size", models.SIZES)
def test_plan_knows_every_size_and_writes_nothing(size, tmp_path, capsys):
    """Also beside a run."""
    (tmp_path / "model.pt").touch()
    asked = ["--plan", "--gpus", "128", "--batch-size", "4096", "--out", str(tmp_path)]
    mae_pretrain.main([*asked, "--size", size])
    printed = capsys.readouterr().out
    for word in ("parameters", "GFLOP", "steps", "128 processes", "GPU-days", "--lanes 384"):
        assert word in printed
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_another_configuration_in_the_same_folder_is_refused_with_the_difference(
    finished, tmp_path, capsys
):
    out = shutil.copytree(finished[0], tmp_path / "run")
    before = (out / "metrics.jsonl").read_bytes()
    assert "(seed was 0, is 1)" in refused(capsys, *TINY, "--out", out, "--seed", 1)
    line = refused(capsys, *TINY, "--out", out, "--mask-ratio", "0.5")
    assert "(mask_ratio was 0.75, is 0.5)" in line
    line = refused(capsys, *TINY, "--out", tmp_path / "new", "--resume", out, "--lr", "1")
    assert "(lr was 0.001, is 1.0)" in line
    assert (out / "metrics.jsonl").read_bytes() == before


def test_resume_starts_a_run_that_goes_on_by_itself(finished, tmp_path, capsys):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    for folder in (first, second):
        shutil.copytree(finished[0], folder)
    line = refused(capsys, *TINY, "--out", second, "--resume", first)
    assert "second holds a run of its own" in line
    resume = [*TINY, "--out", third, "--resume", first / "checkpoints" / "step-00000008"]
    completed(*resume)
    for path in (third / "checkpoints").iterdir():  # killed in its first save
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (third / "checkpoints" / ".saving").mkdir()
    (third / "model.pt").unlink()
    assert f"going on from {first}/checkpoints/step-00000008" in completed(*resume).stdout
    assert read_metrics(third) == read_metrics(first)
    # The same command goes on with its own checkpoints, even if the first run is gone.
    shutil.rmtree(first)
    (third / "checkpoints" / "LATEST").write_bytes(b"\xff")
    assert "third/checkpoints/step-00000012" in completed(*resume).stdout
    assert (third / "checkpoints" / "LATEST").read_text() == "step-00000012"
    # A run returns to an earlier checkpoint of its own once, and then goes on.
    back = [*TINY, "--out", second, "--resume", second / "checkpoints" / "step-00000008"]
    for step in ("08", "12"):
        said = f"going on from {second}/checkpoints/step-000000{step}"
        assert said in completed(*back).stdout


def test_a_full_disk_while_saving_leaves_the_last_checkpoint(finished, tmp_path):
    """A limit on the size of files makes writes fail in the middle, as a full disk does."""
    out = rewound(finished[0], tmp_path / "run")
    failed = stage(*TINY, "--out", out, file_size=20_000)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert "step-00000012" in failed.stderr and "are whole" in failed.stderr
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == ["LATEST", "step-00000008"]
    completed(*TINY, "--out", out)
    assert read_metrics(out) == read_metrics(finished[0])


def test_unreadable_held_out_pictures_are_named_without_loss(photos, tmp_path, capsys):
    """A run with none that is readable ends well."""
    folder = tmp_path / "both"
    shutil.copytree(photos, folder / "train")
    shutil.copytree(photos, folder / "val")
    flags = [*TINY, "--data", str(folder), "--steps", "2", "--out"]
    for path in sorted((folder / "val").iterdir())[1:]:
        path.write_text("no picture")
    mae_pretrain.main([*flags, str(tmp_path / "one")])
    assert "unreadable, left out" in capsys.readouterr().err
    assert read_metrics(tmp_path / "one")[-1]["held_out_loss"] > 0.1
    (folder / "val" / "000.jpg").write_text("no picture")
    mae_pretrain.main([*flags, str(tmp_path / "none")])
    assert read_metrics(tmp_path / "none")[-1]["held_out_loss"] is None  # and not 0
    printed = capsys.readouterr().out
    assert "no more is shown: no readable picture" in printed and "next: " in printed


def test_other_classes_in_val_do_not_stop_a_stage_without_labels(tmp_path, capsys):
    for number in range(30):
        path = tmp_path / "pets" / ("val" if number < 6 else "train") / "ab"[number % 2]
        path.mkdir(parents=True, exist_ok=True)
        picture(number).save(path / f"{number}.png")
    (tmp_path / "pets" / "val" / "yak").mkdir()
    picture(9).save(tmp_path / "pets" / "val" / "yak" / "9.png")
    flags = ["--data", str(tmp_path / "pets"), "--steps", "2", "--out", str(tmp_path / "run")]
    mae_pretrain.main([*TINY, *flags])
    printed = capsys.readouterr()
    assert printed.err.count("val has other classes than train (yak)") == 1
    assert "left out, for want of labels" in printed.out
    typed = shlex.split(printed.out.split("next: python evaluate.py ")[1])
    assert typed[:2] == ["--task", "attention"]  # not knn, which wants the same classes:
    evaluate.main([*typed, "--workers", "0"])
    capsys.readouterr()
    knn = ["--task", "knn", *typed[2:]]
    assert "other classes than train (yak)" in refused(capsys, *knn, program=evaluate)


def test_a_share_for_val_is_not_trained_on_and_goes_into_the_next_command(tmp_path, capsys):
    cache = ["--cache-dir", str(tmp_path / "cache")]
    flags = [*TINY, "--val-share", "0.2", "--steps", "16", *cache, "--out", str(tmp_path / "run")]
    run = settled(*flags)
    assert run.source.sizes.sum() == 96 and run.held_out.sizes.sum() == 24  # of 120
    mae_pretrain.main(flags)
    typed = shlex.split(capsys.readouterr().out.split("next: python evaluate.py ")[1])
    assert typed[:2] == ["--task", "knn"] and typed[-4:] == ["--val-share", "0.2", *cache]
    evaluate.main([*typed, "--workers", "0"])
    assert "96 train and 24 val samples, 2 classes" in capsys.readouterr().out


def test_a_step_is_drawn_as_it_is_loaded_whatever_its_micro_batches_are(tmp_path, capsys):
    run = [*TINY, "--out", str(tmp_path / "run")]
    drawn = []
    for size in ("8", "2"):
        mae_pretrain.main([*run, "--draw-step", "2", "--micro-batch", size])
        printed = capsys.readouterr().out
        assert [f"position {i}: " in printed for i in (7, 8, 15, 16)] == [False, True, True, False]
        drawn.append((tmp_path / "run" / "step-2.png").read_bytes())
    assert drawn[0] == drawn[1]
    settled_run = settled(*run)
    (first, *_) = settled_run.batches[1]["images"]  # batch 1 is step 2
    picture = Image.open(io.BytesIO(drawn[0])).crop((6, 22, 6 + 160, 22 + 160))  # 16 px, ten times
    pixels = torch.from_numpy(np.array(picture.resize((16, 16), Image.Resampling.NEAREST)))
    assert torch.equal(pixels.permute(2, 0, 1), first)
    assert "the run has 12 steps" in refused(capsys, *run, "--draw-step", "13")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_two_runs_do_not_share_a_folder(tmp_path, capsys):
    script = "import pathlib, sys; from support.checkpoints import lock; "
    script += "lock(pathlib.Path(sys.argv[1])); print(); input()"
    command = [sys.executable, "-u", "-c", script, tmp_path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as other:
        other.stdout.readline()
        assert "another process" in refused(capsys, *TINY, "--out", str(tmp_path))
        other.kill()  # what is killed holds nothing
    mae_pretrain.main([*TINY, "--out", str(tmp_path)])


@pytest.mark.parametrize("posix", [True, False])
def test_without_locks_a_run_starts_all_the_same(posix, tmp_path, monkeypatch, capsys):
    if posix:  # a file system without locks
        error = OSError(errno.ENOLCK, "No locks available")
        monkeypatch.setattr(fcntl, "lockf", Mock(side_effect=error))
    else:
        monkeypatch.setitem(sys.modules, "fcntl", None)
    checkpoints.begin_run(tmp_path / "run", {"stage": "mae"})
    assert "cannot be locked" in capsys.readouterr().out
    assert (tmp_path / "run" / "config.json").exists()


def test_names_of_runs_and_data_may_look_like_patterns(finished, tmp_path):
    """All of a run: data, --out, checkpoints, --init, and what evaluate.py reads of it."""
    odd = tmp_path / " ".join(ODD_NAMES)
    shutil.copytree(PICTURES, odd / "photos")
    run = ["--data", odd / "photos", *TINY[2:], "--out"]
    completed(*run, odd / "whole")
    ran = completed(*run, rewound(odd / "whole", odd / "run"))
    assert "step-00000008" in ran.stdout
    assert read_metrics(odd / "run") == read_metrics(odd / "whole") == read_metrics(finished[0])
    completed(*run, odd / "again", "--resume", odd / "run")
    program, *flags = shlex.split(ran.stdout.split("next: python ")[1])
    completed(*flags, program=program)
    completed(*run, odd / "init", "--init", odd / "run" / "model.pt")
    # The same weights under another name are the same run.
    other_name = odd / "run" / "checkpoints" / ".." / "model.pt"
    assert "going on" in completed(*run, odd / "init", "--init", other_name).stdout


def test_each_of_many_unreadable_pictures_is_named_once_also_by_a_run_that_goes_on(
    photos, tmp_path
):
    bad = sorted(photos.iterdir())[:30]
    for path in bad:
        path.write_bytes(b"")
    run = [*TINY[2:], "--data", photos, "--batch-size", "38", "--max-bad", "1"]
    ran = completed(*run, "--out", tmp_path / "run")
    named = [line.split(": ")[1] for line in ran.stderr.splitlines() if "weight 0" in line]
    assert len(named) == len(set(named)) == 28  # two are held out
    assert set(named) < set(map(str, bad))
    again = completed(*run, "--out", rewound(tmp_path / "run", tmp_path / "again"))
    assert "weight 0" not in again.stderr
    assert read_metrics(tmp_path / "again") == read_metrics(tmp_path / "run")


def test_pictures_of_too_many_pixels_are_unreadable(tmp_path):
    run = [*TINY[2:], *large_pictures(tmp_path / "large"), "--steps", 1]
    check_that_the_limit_is_the_runs(partial(stage, *run), tmp_path)


@pytest.mark.parametrize("damaged", [b'{"step": 1}\n{"stqp": 2}\n', b"\xff}\n", b"5}"])
def test_damaged_metrics_are_neither_lost_nor_read(damaged, tmp_path):
    folder = tmp_path / "checkpoints" / "step-2"
    folder.mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_bytes(damaged)
    with pytest.raises(ValueError, match="metrics.jsonl is damaged.*move it away"):
        checkpoints.begin_run(tmp_path, {"stage": "mae"}, folder, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == damaged


def test_few_pictures_without_classes_are_enough(photos, tmp_path, capsys):
    for path in sorted(photos.iterdir())[10:]:
        path.unlink()
    mae_pretrain.main([*TINY, "--data", str(photos), "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert "0 others to measure on" in printed and "probe" not in printed
    assert (tmp_path / "run" / "model.pt").exists()


RECIPES = [(mae_pretrain, [], 4096), (weak_pretrain, [], 8192)]
RECIPES += [(finetune, ["--task", "classify"], 1024)]


@pytest.mark.parametrize(("program", "task", "recipe"), RECIPES)
def test_a_plan_without_a_batch_size_takes_one_that_fits(capsys, program, task, recipe):
    nearest = lambda unit: unit * round(recipe / unit)
    asked = [("B", 96, nearest(192)), ("B", 128, recipe), ("B", 3, nearest(6))]
    for size, gpus, batch_size in [*asked, ("toy", 128, 256)]:
        program.main([*task, "--size", size, "--gpus", str(gpus)])
        printed = capsys.readouterr().out
        assert f" of {batch_size:,} images: " in printed
        said = f"size   {batch_size:,}, which the run wants as --batch-size: the recipe's"
        assert (said in printed) == (batch_size != recipe)
    program.main([*task, "--size", "B", "--gpus", "96", "--micro-batch", "6"])
    printed = capsys.readouterr().out
    assert "cannot be dealt to 96 processes in micro-batches of 6\n" in printed
    assert f"96 processes x {nearest(576) // 576} micro-batches of 6 images" in printed
    asked = [*task, "--size", "toy", "--gpus", 128]
    refuse = partial(refused, capsys, *asked, program=program)
    line = refuse("--batch-size", 100)
    assert "a batch of 100 cannot be dealt to 128 processes in pairs" in line
    assert "--micro-batch 6" in refuse("--batch-size", 1024, "--micro-batch", 6)


@pytest.mark.parametrize(("memory", "fits"), [("1", False), ("100", True)])
def test_a_plan_names_the_largest_micro_batch_that_fits(memory, fits, capsys):
    """It may be larger than a process's part of the batch."""
    asked = ["--gpus", "8", "--size", "H", "--batch-size", "64", "--memory", memory]
    mae_pretrain.main(asked)
    (line,) = (row for row in capsys.readouterr().out.splitlines() if "largest" in row)
    found = line.split()[-2:]  # without, and with --checkpoint-activations
    if not fits:
        assert found == ["none", "none"]
        return
    run = mae_pretrain.parse_arguments(asked)
    mae_pretrain.prepare(run)
    for most, checkpointing in zip(map(int, found), (False, True)):
        run.checkpoint_activations, run.batch_size = checkpointing, 0
        peaks = [training_memory(run.model, run, n)["peak"] for n in (most, most + 1)]
        assert peaks[0] <= 0.8 * 100 * 2**30 < peaks[1]


def test_the_hours_of_a_plan(capsys):
    """By hand: 1e6 images of three times the forward FLOPs, at a share of an H100's peak."""
    asked = ["--gpus", "8", "--size", "B", "--batch-size", "4096", "--samples", "4096000"]
    flops = 3 * flops_per_image(models.MAE("B"))
    for flags, share, origin in (
        ([], 0.32, "measured on one H200"),
        (["--mfu", "0.5"], 0.5, "--mfu"),
        (["--checkpoint-activations"], 0.4, "a guess"),
    ):
        mae_pretrain.main([*asked, *flags])
        printed = capsys.readouterr().out
        hours = 4_096_000 * flops / (share * 989e12) / 3600
        assert f"GPU-hours    {hours:,.1f} (" in printed
        assert f"at {share:.0%} of their peak: {origin}" in printed


def test_a_plan_can_time_ten_steps_here(capsys):
    flags = ["--here", "--size", "16x1x2", "--image-size", "32", "--samples", "6400"]
    mae_pretrain.main([*flags, "--batch-size", "64"])
    printed = capsys.readouterr().out
    rate = re.search(
        r"here .* (?:hours|minutes) on this CPU with \d+ threads: ([\d,.]+) images/s", printed
    )
    assert float(rate[1].replace(",", "")) > 0
    mae_pretrain.main(["--here", "--size", "6.5B", "--memory", "1000"])
    assert "here         not timed: it takes" in capsys.readouterr().out


def test_a_plan_counts_what_travels(capsys):
    """An MAE under --shard-group 4 of 8: half of the gradients' quarter goes each way."""
    asked = ["--gpus", "8", "--size", "B", "--micro-batch", "512"]
    mae_pretrain.main([*asked, "--shard-group", "4"])
    printed = capsys.readouterr().out
    whole = sum(p.numel() for p in models.MAE("B").parameters()) / 2**30
    within, between = 4 * whole * 3 / 4, 2 * 4 * whole / 4 / 2
    assert f"{within:.2f} gradients in its group of 4" in printed
    assert f"{between:.2f} gradients between the 2 copies of the model" in printed
    mae_pretrain.main(asked)  # replicas
    printed = capsys.readouterr().out
    assert f"{2 * 4 * whole * 7 / 8:.2f} gradients between the 8 copies" in printed
    assert "no weights: it has all of them" in printed and "8 replicas (each " in printed
