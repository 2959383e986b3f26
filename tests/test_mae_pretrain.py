"""Stage 1 as a program: its recipe, what it writes, and what it does with unusable input."""

import errno
import fcntl
import itertools
import json
import math
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from functools import partial

import pytest
import torch
from conftest import (
    ODD_NAMES,
    PICTURES,
    ROOT,
    TINY,
    check_that_the_limit_is_the_runs,
    large_pictures,
    picture,
    read_metrics,
    stage,
)
from PIL import Image

import data
import finetune
import mae_pretrain
import model as models
import weak_pretrain
from support import checkpoints, toy


def settled(*arguments):
    """The run that these arguments lead to, before anything is written."""
    run = mae_pretrain.parse_arguments(list(arguments))
    mae_pretrain.prepare(run)
    return run


def refused(capsys, *arguments):
    """The one line with which stage 1 refuses these arguments, with exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        mae_pretrain.main(list(arguments))
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("mae_pretrain.py: ")
    return lines[0]


def test_defaults_are_the_papers_recipe(tmp_path):
    run = settled("--size", "B", "--out", str(tmp_path / "run"))
    assert run.batch_size == 4096
    assert run.lr == pytest.approx(2.4e-3)  # 1.5e-4 x 4096 / 256
    assert (run.weight_decay, run.warmup, run.min_crop) == (0.05, 0.05, 0.2)
    assert run.config["decoder"] == [512, 8, 16] and run.config["mask_ratio"] == 0.75
    assert run.config["normalize_targets"] and run.config["image_size"] == [224, 224]
    assert run.steps == math.ceil(1600 * toy.TOY_EPOCH / 4096)


def test_the_length_can_be_given_in_steps_epochs_or_samples(tmp_path):
    out = ("--out", str(tmp_path / "run"), "--batch-size", "100")
    assert settled(*out, "--steps", "7").steps == 7
    # Ten saves, the last one at the end: 9 x 32 + 25 = 313, not ten of 31 and one of 3.
    rhythms = [settled(*out, "--steps", steps).save_every for steps in ("7", "313", "99999")]
    assert rhythms == [1, 32, 1000]
    assert settled(*out, "--samples", "701").steps == 8
    assert settled(*out, "--epochs", "0.5").steps == math.ceil(toy.TOY_EPOCH / 2 / 100)


def test_learning_rate_warms_up_from_above_zero_and_ends_near_zero():
    run = Namespace(lr=1.0, warmup=0.1, steps=100)
    rates = [mae_pretrain.learning_rate(step, run) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert all(a < b for a, b in itertools.pairwise(rates[:11]))
    assert max(rates) == rates[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.5)  # half way through the cosine
    assert 0 < rates[99] < 1e-3


def test_a_run_leaves_all_that_the_next_stage_needs(tmp_path):
    out = tmp_path / "run"
    ran = stage(*TINY, "--out", out)
    assert ran.returncode == 0, ran.stderr
    names = {path.name for path in out.iterdir()}
    wanted = ".lock config.json metrics.jsonl checkpoints model.pt reconstruction.png"
    assert names == set(wanted.split())
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == ["LATEST", "step-00000008", "step-00000012"]
    metrics = read_metrics(out)
    assert [line["step"] for line in metrics] == list(range(1, 13))
    assert [line["step"] for line in metrics if "held_out_loss" in line] == [4, 8, 12]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    state, config = models.read_weights(out / "model.pt")
    models.MAE(**config).load_state_dict(state)
    assert json.loads((out / "config.json").read_text())["model"] == config
    assert "trained" in ran.stdout and "next: python evaluate.py" in ran.stdout
    Image.open(out / "reconstruction.png").verify()


def test_init_inherits_the_architecture_and_says_what_became_of_the_weights(tmp_path):
    torch.manual_seed(0)
    encoder = models.ViT("16x2x2", image_size=16, patch_size=4)
    models.save_weights(tmp_path / "encoder.pt", encoder.state_dict(), encoder.config)
    start = ("--init", str(tmp_path / "encoder.pt"), "--decoder", "16x1x2", "--steps", "1")
    ran = stage(*start, "--image-size", "24", "--batch-size", "4", "--out", tmp_path / "run")
    assert ran.returncode == 0, ran.stderr
    assert "resampled: pos_embed from 4x4 to 6x6" in ran.stdout
    assert "newly initialised: decoder_blocks" in ran.stdout
    _, config = models.read_weights(tmp_path / "run" / "model.pt")
    assert (config["size"], config["image_size"]) == ("16x2x2", [24, 24])


def test_init_may_be_a_public_mae_whose_arguments_say_what_it_predicts(tmp_path):
    model = models.MAE("toy", image_size=16, mask_ratio=0.5, normalize_targets=False)
    models.save_weights(tmp_path / "own.pt", model.state_dict(), model.config)
    args = Namespace(norm_pix_loss=False, mask_ratio=0.5, input_size=16)
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "public.pth")
    # The first loss, and one of what is held out, are those of our own weights with this config.
    common = [*TINY[:2], *TINY[-2:], "--batch-size", "8", "--steps", "1", "--log-every", "1"]
    found = []
    for name in ("own.pt", "public.pth"):
        ran = stage(*common, "--init", tmp_path / name, "--out", tmp_path / name[:3])
        assert ran.returncode == 0, ran.stderr
        found.append(read_metrics(tmp_path / name[:3]))
    assert found[0] == found[1] and "held_out_loss" in found[0][-1]
    flags = ("--no-raw-pixels", "--mask-ratio", "0.25")
    for name in ("own.pt", "public.pth"):
        init = ("--init", str(tmp_path / name), "--out", str(tmp_path / "run"))
        config = settled(*init).config
        assert (config["normalize_targets"], config["mask_ratio"]) == (False, 0.5)
        config = settled(*init, *flags).config
        assert (config["normalize_targets"], config["mask_ratio"]) == (True, 0.25)
        assert not settled(*init, "--raw-pixels").config["normalize_targets"]


def test_init_may_be_of_a_later_stage(tmp_path):
    model = models.Classifier("16x2x2", classes=5, image_size=16, patch_size=4)
    models.save_weights(tmp_path / "weak.pt", model.state_dict(), model.config)
    ran = stage(
        *("--init", tmp_path / "weak.pt", "--decoder", "16x1x2", "--steps", "1"),
        *("--batch-size", "4", "--out", tmp_path / "run"),
    )
    assert ran.returncode == 0, ran.stderr
    assert "dropped: head" in ran.stdout


@pytest.mark.parametrize("size", models.SIZES)
def test_plan_knows_every_size_and_writes_nothing(size, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mae_pretrain.main(
        ["--size", size, "--batch-size", "4096", "--lanes", "384", "--plan", "--gpus", "128"]
    )
    printed = capsys.readouterr().out
    for word in ("parameters", "GFLOP", "steps", "128 processes", "GPU-days"):
        assert word in printed
    assert not list(tmp_path.iterdir())


def test_unusable_arguments_are_refused_in_one_line(tmp_path, capsys):
    photos = tmp_path / "empty"
    photos.mkdir()
    (tmp_path / "file.txt").write_text("x")
    for arguments, words in {
        ("--data", str(tmp_path / "nowhere")): "does not exist",
        ("--data", str(photos)): "no pictures",
        ("--data", str(tmp_path / "file.txt")): "not a folder",
        ("--data", str(tmp_path / "a-*.tar")): "no shard matches",
        ("--image-size", "50", "--patch-size", "16"): "not divisible by patch 16",
        ("--image-size", "8", "--patch-size", "16"): "not divisible by patch 16",
        ("--image-size", "large"): "--image-size",
        ("--image-size", str(2**40)): "from 1 to 65536",
        ("--size", f"32x{2**40}x4"): "999 layers",
        ("--decoder", f"{2**40}x1x4"): "65536 wide",
        ("--batch-size", "10", "--micro-batch", "4"): "does not divide",
        ("--size", "XXL"): "XXL",
        ("--decoder", "10x1x3"): "--decoder",
        ("--mask-ratio", "1.0"): "mask ratio",
        ("--channels", "2"): "channels",
        ("--init", str(tmp_path / "no.pt")): "no weights",
        ("--resume", str(tmp_path)): "no checkpoint",
        ("--no-such-flag",): "--no-such-flag",
        ("--steps", "many"): "--steps",
        ("--steps", "0"): "--steps",
        ("--batch-size", "-1"): "--batch-size",
        ("--lr", "nan"): "--lr nan is out of range",
        ("--epochs", "inf"): "--epochs inf is out of range",
        ("--warmup", "2"): "--warmup 2.0 is out of range",
        ("--out", "/proc/nowhere"): "/proc",
        ("--out", str(tmp_path / "file.txt")): "file.txt",
    }.items():
        out = () if "--out" in arguments else ("--out", str(tmp_path / "run"))
        assert words in refused(capsys, *arguments, *out), arguments
        assert not (tmp_path / "run").exists()


def test_another_configuration_in_the_same_folder_is_refused_with_the_difference(tmp_path, capsys):
    out = tmp_path / "run"
    assert stage(*TINY, "--out", out).returncode == 0
    before = (out / "metrics.jsonl").read_bytes()
    line = refused(capsys, *TINY, "--out", str(out), "--seed", "1")
    assert "seed was 0, is 1" in line
    line = refused(capsys, *TINY, "--out", str(out), "--mask-ratio", "0.5")
    assert "(mask_ratio was 0.75, is 0.5)" in line
    line = refused(capsys, *TINY, "--out", str(tmp_path / "new"), "--resume", str(out), "--lr", "1")
    assert "lr was 0.001, is 1.0" in line
    shutil.rmtree(out / "checkpoints")
    assert "model.pt" in refused(capsys, *TINY, "--out", str(out))
    assert (out / "metrics.jsonl").read_bytes() == before


def test_resume_into_a_folder_that_holds_another_run_is_refused(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert stage(*TINY, "--out", first).returncode == 0
    shutil.copytree(first, second)
    line = refused(capsys, *TINY, "--out", str(second), "--resume", str(first))
    assert "second holds a run of its own" in line
    # But the same command again goes on with what the first one began.
    step_8 = first / "checkpoints" / "step-00000008"
    third = ("--out", str(tmp_path / "third"), "--resume", str(step_8))
    assert stage(*TINY, *third).returncode == 0
    shutil.rmtree(first)  # even if that is gone, and its own folder has a worthless LATEST
    (tmp_path / "third" / "checkpoints" / "LATEST").write_bytes(b"\xff")
    assert "third/checkpoints/step-00000012" in stage(*TINY, *third).stdout
    # Back to an earlier checkpoint of its own folder, once: then that, too, goes on.
    back = (*TINY, "--out", str(second), "--resume", str(second / "checkpoints" / "step-00000008"))
    assert "going on from" in stage(*back).stdout
    assert "second/checkpoints/step-00000012" in stage(*back).stdout


def test_what_is_not_a_run_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    line = refused(capsys, *TINY, "--out", str(tmp_path))
    assert "not ours" in line and [p.name for p in tmp_path.iterdir()] == ["config.json"]
    (tmp_path / "config.json").rename(tmp_path / "metrics.jsonl")
    assert "not ours" in refused(capsys, *TINY, "--out", str(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_text() == "{}"


def test_unreadable_held_out_pictures_are_named_and_have_no_loss(photos, tmp_path, capsys):
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


def test_two_runs_do_not_share_a_folder(tmp_path, capsys):
    script = "import pathlib, sys; from support.checkpoints import lock; lock(pathlib.Path(sys.argv[1])); print(); input()"
    command = [sys.executable, "-u", "-c", script, tmp_path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as other:
        other.stdout.readline()
        assert "another process" in refused(capsys, *TINY, "--out", str(tmp_path))
        other.kill()  # what is killed holds nothing
    mae_pretrain.main([*TINY, "--out", str(tmp_path)])


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    checkpoints.begin_run(tmp_path / "run", {"stage": "mae"})
    assert "cannot be locked (No locks available)" in capsys.readouterr().out
    assert (tmp_path / "run" / "config.json").exists()


def test_kills_within_the_first_save_lose_nothing(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert stage(*TINY, "--out", first).returncode == 0
    (first / "checkpoints" / "LATEST").unlink()  # between the rename and LATEST
    ran = stage(*TINY, "--out", first)
    assert f"going on from {first}/checkpoints/step-00000012" in ran.stdout
    assert (first / "checkpoints" / "LATEST").read_text() == "step-00000012"
    resume = [*TINY, "--out", second, "--resume", first / "checkpoints" / "step-00000008"]
    assert stage(*resume).returncode == 0
    for path in (second / "checkpoints").iterdir():  # before the rename
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (second / "checkpoints" / ".saving").mkdir()
    (second / "model.pt").unlink()
    ran = stage(*resume)
    assert f"going on from {first}/checkpoints/step-00000008" in ran.stdout, ran.stderr
    assert read_metrics(second) == read_metrics(first)


def test_names_of_runs_and_data_may_look_like_patterns(tmp_path):
    """All of a run: data, --out, checkpoints, --init, and what evaluate.py reads of it."""
    name = " ".join(ODD_NAMES)
    shutil.copytree(PICTURES, tmp_path / name / "photos")
    shutil.copytree(PICTURES, tmp_path / "plain")
    run = ["--data", tmp_path / name / "photos", *TINY[2:], "--out", tmp_path / name / "run"]
    ran = stage(*run)
    assert ran.returncode == 0, ran.stderr
    plain = ["--data", tmp_path / "plain", *TINY[2:], "--out", tmp_path / "run"]
    assert stage(*plain).returncode == 0
    whole = read_metrics(tmp_path / name / "run")
    assert whole == read_metrics(tmp_path / "run")
    shutil.rmtree(tmp_path / name / "run" / "checkpoints" / "step-00000012")
    (tmp_path / name / "run" / "checkpoints" / "LATEST").write_text("step-00000008")
    (tmp_path / name / "run" / "model.pt").unlink()
    ran = stage(*run)
    assert "step-00000008" in ran.stdout and read_metrics(tmp_path / name / "run") == whole
    again = [*run[:-1], tmp_path / name / "again", "--resume"]
    assert stage(*again, tmp_path / name / "run").returncode == 0
    (_, command) = ran.stdout.split("next: python ")
    program, *flags = shlex.split(command)
    ran = stage(*flags, program=program)
    assert ran.returncode == 0, ran.stderr
    init = ["--init", tmp_path / name / "run" / "model.pt", "--out", tmp_path / name / "init"]
    assert stage(*run[:-2], *init).returncode == 0


def test_the_same_weights_under_another_name_are_the_same(tmp_path):
    first = [*TINY, "--out", tmp_path / "first"]
    assert stage(*first).returncode == 0
    for name in (tmp_path / "first" / "model.pt", tmp_path / "second" / ".." / "first/model.pt"):
        ran = stage(*TINY, "--init", name, "--out", tmp_path / "second")
        assert ran.returncode == 0, ran.stderr


def test_many_unreadable_pictures_at_once_are_named_up_to_20(tmp_path):
    for number in range(40):
        picture(number).save(tmp_path / f"{number:02}.png")
    for number in range(30):
        (tmp_path / f"{number:02}.png").write_bytes(b"")
    run = [*TINY[2:], "--data", tmp_path, "--batch-size", "38", "--steps", "1"]
    ran = stage(*run, "--out", tmp_path / "run", "--max-bad", "1")
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("unreadable, weight 0: ") == 20


def test_pictures_of_too_many_pixels_are_unreadable(tmp_path):
    run = [*TINY[2:], *large_pictures(tmp_path / "large"), "--steps", 1]
    check_that_the_limit_is_the_runs(partial(stage, *run), tmp_path)
    ran = stage(*run, "--max-pixels", 89_999, "--out", tmp_path / "none")
    assert ran.returncode == 1 and "8 of 8 pictures cannot be read" in ran.stderr
    assert "90000 pixels are over --max-pixels 89999" in ran.stderr


def test_shapes_that_make_no_sense_are_said_to_be(capsys):
    for flag, value, words in (
        ("--decoder", "100", "size '100' is unknown: it must be WIDTHxLAYERSxHEADS"),
        ("--decoder", "6x1x2", "the width must be a multiple of 4 x heads"),
        ("--image-size", "big", "image size 'big' is neither a side nor HEIGHTxWIDTH"),
    ):
        assert words in refused(capsys, flag, value)


def test_where_there_are_no_posix_locks_a_run_starts_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    checkpoints.begin_run(tmp_path / "run", {"stage": "mae"})
    assert (tmp_path / "run" / "config.json").exists()


def test_damaged_metrics_are_neither_lost_nor_read(tmp_path):
    folder = tmp_path / "checkpoints" / "step-2"
    folder.mkdir(parents=True)
    (tmp_path / "config.json").write_text('{"stage": "mae"}')
    for damaged in (b'{"step": 1}\n{"stqp": 2}\n', b'{"step": 1}\n\xff}\n', b"5}\n"):
        (tmp_path / "metrics.jsonl").write_bytes(damaged)
        with pytest.raises(ValueError, match="metrics.jsonl is damaged.*move it away"):
            checkpoints.begin_run(tmp_path, {"stage": "mae"}, folder, 2)
        assert (tmp_path / "metrics.jsonl").read_bytes() == damaged


def test_ctrl_c_before_the_loop_is_one_line(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(mae_pretrain, "prepare", interrupted)
    with pytest.raises(SystemExit) as stopped:
        mae_pretrain.main([*TINY])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "mae_pretrain.py: stopped\n"


def test_a_plan_can_be_made_beside_a_run(tmp_path, capsys):
    (tmp_path / "model.pt").touch()
    mae_pretrain.main([*TINY, "--out", str(tmp_path), "--plan"])
    assert "GPU-days" in capsys.readouterr().out


def test_an_unreadable_held_out_picture_does_not_end_a_run(photos, tmp_path):
    last = data.Folder(str(photos)).name(39)  # one of the two that are held out
    open(last, "w").close()
    for held_out in (1, 2):
        ran = stage(*TINY, "--data", photos, "--out", tmp_path / f"run-{held_out}")
        assert ran.returncode == 0 and "next: " in ran.stdout, ran.stderr
        open(data.Folder(str(photos)).name(38), "w").close()  # then both
    assert "no more is shown: no readable picture" in ran.stdout


def test_pictures_of_the_test_split_are_never_trained_on(photos, tmp_path, capsys):
    """They are unreadable here: one that was drawn would be counted."""
    (tmp_path / "split" / "test").mkdir(parents=True)
    photos.rename(tmp_path / "split" / "Train")
    for i in range(40):
        (tmp_path / "split" / "test" / f"{i}.png").touch()
    ran = stage(*TINY, "--data", tmp_path / "split", "--out", tmp_path / "run")
    assert ran.returncode == 0, ran.stderr
    assert f"{tmp_path}/split/test: left out" in ran.stdout
    assert "38 of them" in ran.stdout and "2 others to measure on" in ran.stdout
    assert all(line["bad"] == 0 for line in read_metrics(tmp_path / "run"))
    (tmp_path / "split" / "cats").mkdir()
    (tmp_path / "split" / "cats" / "a.png").touch()
    line = refused(capsys, *TINY, "--data", str(tmp_path / "split"))
    assert f"type --data {tmp_path}/split/Train, or move the splits elsewhere" in line


def test_few_pictures_without_classes_are_enough(photos, tmp_path):
    for path in sorted(photos.iterdir())[10:]:
        path.unlink()
    ran = stage(*TINY, "--data", photos, "--out", tmp_path / "run")
    assert ran.returncode == 0, ran.stderr
    assert "0 others to measure on" in ran.stdout and "probe" not in ran.stdout
    assert (tmp_path / "run" / "model.pt").exists()


@pytest.mark.parametrize("program", [mae_pretrain, weak_pretrain, finetune])
def test_a_plan_without_a_batch_size_takes_one_that_can_be_dealt(capsys, program):
    task = ["--task", "classify"] if program is finetune else []
    recipe = {mae_pretrain: 4096, weak_pretrain: 8192, finetune: 1024}[program]
    nearest = {"96": 192 * round(recipe / 192), "128": recipe, "3": 6 * round(recipe / 6)}
    for gpus, batch_size in [*nearest.items(), ("toy", 256)]:
        size = ["toy", "128"] if gpus == "toy" else ["B", gpus]
        program.main([*task, "--plan", "--size", size[0], "--gpus", size[1]])
        printed = capsys.readouterr().out
        assert f" of {batch_size:,} images: " in printed
        said = f"batch size   {batch_size:,}, which the run wants as --batch-size: the recipe's"
        assert (said in printed) == (batch_size != recipe)
    program.main([*task, "--plan", "--size", "B", "--gpus", "96", "--micro-batch", "6"])
    printed = capsys.readouterr().out
    unit = 96 * 6
    batch_size = unit * round(recipe / unit)
    assert "cannot be dealt to 96 processes in micro-batches of 6\n" in printed
    assert f"96 processes x {batch_size // unit} micro-batches of 6 images" in printed
    for flags, why in (
        (["--batch-size", "100"], "a batch of 100 cannot be dealt to 128 processes in pairs"),
        (["--batch-size", "1024", "--micro-batch", "6"], "--micro-batch 6"),
    ):
        with pytest.raises(SystemExit) as stopped:
            program.main([*task, "--plan", "--size", "toy", "--gpus", "128", *flags])
        assert stopped.value.code == 2 and why in capsys.readouterr().err


def test_lanes_are_checked_for_the_gpus_that_are_planned_for(capsys):
    asked = ("--plan", "--gpus", "128", "--batch-size", "4096")
    line = refused(capsys, *asked, "--lanes", "48")
    assert "48 lanes cannot be dealt to 128 processes" in line
    mae_pretrain.main([*asked, "--size", "B"])  # without data: which lanes it will take
    assert "with --lanes 384" in capsys.readouterr().out


def test_a_cuda_graph_is_for_one_gpu(tmp_path, capsys):
    for flags in ([], ["--gpus", "2"]):
        run = [*TINY, "--out", str(tmp_path / "run"), "--cuda-graph", *flags]
        assert "--cuda-graph is for one process on one GPU" in refused(capsys, *run)
    assert not (tmp_path / "run").exists()


def test_a_shard_group_must_divide_the_processes(capsys):
    line = refused(capsys, "--gpus", "8", "--lanes", "48", "--shard-group", "3")
    assert "--shard-group 3 does not divide the 8 processes" in line


def test_a_plan_names_the_largest_micro_batch_that_fits(capsys):
    asked = ["--gpus", "8", "--size", "H", "--batch-size", "16384"]
    for memory, fits in ((1, ["none", "none"]), (80, None), (10_000, ["2048", "2048"])):
        mae_pretrain.main([*asked, "--memory", str(memory)])
        (line,) = (row for row in capsys.readouterr().out.splitlines() if "largest" in row)
        if fits:
            assert line.split()[-2:] == fits
        else:
            without, with_ = map(int, line.split()[-2:])
            assert 2 <= without < with_ and 2048 % without == 2048 % with_ == 0


def test_a_plan_counts_what_travels(capsys):
    """An MAE under --shard-group 4 of 8: half of the gradients' quarter goes each way."""
    mae_pretrain.main(["--gpus", "8", "--size", "B", "--micro-batch", "512", "--shard-group", "4"])
    printed = capsys.readouterr().out
    whole = sum(p.numel() for p in models.MAE("B").parameters()) / 2**30
    within, between = 4 * whole * 3 / 4, 2 * 4 * whole / 4 / 2
    assert f"{within:.2f} gradients in its group of 4" in printed
    assert f"{between:.2f} gradients between the 2 copies of the model" in printed
    mae_pretrain.main(["--gpus", "8", "--size", "B", "--micro-batch", "512"])  # replicas
    printed = capsys.readouterr().out
    assert f"{2 * 4 * whole * 7 / 8:.2f} gradients between the 8 copies" in printed
    assert "no weights: it has all of them" in printed and "8 replicas (each " in printed


def test_a_full_disk_while_saving_leaves_the_last_checkpoint(tmp_path):
    """A limit on the size of files makes writes fail in the middle, as a full disk does."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert stage(*TINY, "--out", whole).returncode == 0
    shutil.copytree(whole, cut)  # as if it had been killed after step 8
    shutil.rmtree(cut / "checkpoints" / "step-00000012")
    (cut / "checkpoints" / "LATEST").write_text("step-00000008")
    failed = stage(*TINY, "--out", cut, file_size=20_000)
    assert failed.returncode == 1
    assert "step-00000012" in failed.stderr and "are whole" in failed.stderr
    assert "Traceback" not in failed.stderr
    kept = sorted(path.name for path in (cut / "checkpoints").iterdir())
    assert kept == ["LATEST", "step-00000008"]
    assert stage(*TINY, "--out", cut).returncode == 0
    assert read_metrics(cut) == read_metrics(whole)
