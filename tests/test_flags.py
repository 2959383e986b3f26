"""support/flags.py: flags that every stage has, and what they do in each."""

import json

import pytest
import torch
from conftest import TINY, read_metrics

import finetune
import mae_pretrain
import weak_pretrain
from model import ViT, save_weights

SMALL = ["--size", "16x1x2", "--image-size", 16, "--patch-size", 4]
FINETUNE = {
    "linear": SMALL,
    "classify": [*SMALL, "--rand-augment", 0, "--erase", 0],
    "lit": ["--init", "vit.pt", "--text-size", "16x1x2", "--shared-width", 8],
    "detect": ["--size", "toy", "--image-size", 32],
}
PROGRAMS = [(mae_pretrain, SMALL), (weak_pretrain, SMALL)]
PROGRAMS += [(finetune, ["--task", task, *flags]) for task, flags in FINETUNE.items()]


def rows(program, flags, monkeypatch):
    """What a program makes of 16 samples of the toy world to train on: (its run, rows)."""
    argv, made = list(map(str, [*flags, "--out", "run", "--workers", 0, "--batch-size", 8])), []
    if program is finetune:
        keep = lambda run, model, optimizer, make, *_, **__: made.append((run, run.train, make))
        monkeypatch.setattr(finetune, "train", keep)
        finetune.main(argv)
    else:
        run = program.parse_arguments(argv)
        program.prepare(run)
        made.append((run, run.source, run.batches.make))
    ((run, source, make),) = made
    return run, [make(source.read(number), (3, 0, number)) for number in range(16)]


@pytest.mark.parametrize("program, flags", PROGRAMS, ids=[str(flags[1]) for _, flags in PROGRAMS])
def test_without_flips_all_other_draws_stay(program, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vit = ViT("16x1x2", image_size=16, patch_size=4)
    save_weights("vit.pt", vit.state_dict(), vit.config)
    run, usual = rows(program, flags, monkeypatch)
    assert run.identity["no_flip"] is None  # as in checkpoints older than the flag
    run, plain = rows(program, [*flags, "--no-flip"], monkeypatch)
    assert run.identity["no_flip"] is True
    mirrored = 0
    for with_flip, without in zip(usual, plain, strict=True):
        assert with_flip.keys() == without.keys()
        image, other = with_flip.pop("images"), without.pop("images")
        if not torch.equal(image, other):
            scene = with_flip.pop("targets", None), without.pop("targets", None)
            # (A scene is mirrored before a part of it is cut out.)
            assert scene[0] or torch.equal(image.flip(2), other)
            mirrored += 1
        assert str(with_flip) == str(without)
    assert 3 <= mirrored <= 13


@pytest.mark.parametrize("program", [mae_pretrain, finetune])
def test_a_clip_bounds_the_gradient(program, animals, tmp_path):
    """Stage 2 has a test of its own: its recipe may clip."""
    flags, found = [*TINY[:-2], "--workers", 0], []
    if program is finetune:
        flags = [*SMALL, "--task", "classify", "--data", animals, "--batch-size", 8, "--steps", 8]
        flags += ["--log-every", 1, "--save-every", 8, "--workers", 0]
    for number, clip in enumerate(([], ["--clip", 1e9], ["--clip", 0], ["--clip", 1e-3])):
        program.main([*map(str, [*flags, *clip, "--out", tmp_path / str(number)])])
        found.append(read_metrics(tmp_path / str(number)))
    free, loose, none, tight = found
    assert free == loose == none
    assert free[0]["grad_norm"] == tight[0]["grad_norm"] > 1e-3  # before it is clipped
    assert free[-1]["loss"] != tight[-1]["loss"]


def test_checkpoints_older_than_a_flag_go_on_without_it(tmp_path):
    flags = [*TINY, "--workers", "0", "--out", str(tmp_path)]
    mae_pretrain.main(flags)
    for path in tmp_path.glob("checkpoints/*/state.json"):
        record = json.loads(path.read_text())
        del record["identity"]["no_flip"], record["identity"]["clip"]
        path.write_text(json.dumps(record))
    mae_pretrain.prepare(run := mae_pretrain.parse_arguments(flags))
    assert run.checkpoint.name == "step-00000012"
    mae_pretrain.prepare(mae_pretrain.parse_arguments([*flags, "--clip", "0"]))  # changes nothing
    for given, said in (["--no-flip"], "no_flip was None, is True"), (["--clip", "1"], "clip was"):
        with pytest.raises(ValueError, match=said):
            mae_pretrain.prepare(mae_pretrain.parse_arguments([*flags, *given]))
