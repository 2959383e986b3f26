"""What programs refuse: in one line, with exit status 2, before anything is written.

A row: (program, flags, words of the line). The flags are added to the USUAL ones of the program, of
which each may be given again; {names} are of the files that `places` makes.
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY_TEXT, captioned, tile, write_files

import evaluate
import mae_pretrain
import weak_pretrain
from model import Classifier, ViT, save_weights
from tasks.lit import TwoTowers
from tasks.video import VideoClassifier

PROGRAMS = {
    "evaluate.py": evaluate.main,
    "mae_pretrain.py": mae_pretrain.main,
    "weak_pretrain.py": weak_pretrain.main,
}
USUAL = {
    "evaluate.py": "--task knn --checkpoint {root}/encoder.pt --data {root}/pets --workers 0",
    "mae_pretrain.py": "--out {root}/run",
    "weak_pretrain.py": "--out {root}/run",
}

SHAPE = {"size": "16x1x2", "image_size": 8, "patch_size": 4}
HEAD = "--task classify --checkpoint {root}/head.pt"
NAMED = "--task classify --checkpoint {root}/named.pt"
PAIR = "--checkpoint {root}/pair.pt --task"
ROWS = [
    # flags
    ("evaluate.py", "--task paint", "--task"),
    ("evaluate.py", "--pool max", "--pool"),
    ("evaluate.py", "--no-such-flag=1", "unrecognized arguments: --no-such-flag=1"),
    ("evaluate.py", "--shot 1", "unrecognized arguments: --shot 1"),  # no abbreviations
    ("evaluate.py", "--seed 1", "--seed is for --task reconstruct"),
    ("evaluate.py", "--mask-ratio=0.5", "--mask-ratio is for --task reconstruct"),
    ("evaluate.py", "--no-raw-pixels", "--no-raw-pixels is for --task reconstruct"),
    ("evaluate.py", "--confusion a.png", "--confusion is for --task classify, video"),
    ("evaluate.py", "--task features --shots 1", "--shots is for --task fewshot"),
    ("evaluate.py", "--task detect --labels a.csv", "--labels is for --task classify, video"),
    ("evaluate.py", "--task zeroshot --caption-key a", "--caption-key is for --task retrieval"),
    ("evaluate.py", "--span 2", "--span is for --task video"),
    ("evaluate.py", "--results a.json", "--results is for --task detect"),
    ("evaluate.py", "--task fewshot --shots 1,many", "--shots '1,many' is no list"),
    ("evaluate.py", "--task fewshot --shots 0", "--shots '0' is no list"),
    ("evaluate.py", "--task fewshot --shots=-1,all", "--shots '-1,all' is no list"),
    ("evaluate.py", "--task fewshot --shots 1,,2", "--shots '1,,2' is no list"),
    ("evaluate.py", "--batch-size large", "--batch-size 'large' is no int"),
    ("evaluate.py", "--batch-size 0", "--batch-size 0 is out of range"),
    ("evaluate.py", "--batch-size 1099511627776", "--batch-size 1099511627776 is out of range"),
    ("evaluate.py", "--max-bad none", "--max-bad 'none' is no float"),
    ("evaluate.py", "--max-bad nan", "--max-bad nan is out of range"),
    ("evaluate.py", "--max-pixels 65535", "--max-pixels 65535 is not at least 65536"),
    ("evaluate.py", "--max-pixels abc", "--max-pixels abc is not at least 65536"),
    ("evaluate.py", "--task reconstruct --count 0", "--count 0 is out of range"),
    ("evaluate.py", "--task reconstruct --mask-ratio 2", "--mask-ratio 2 is out of range"),
    ("evaluate.py", "--task reconstruct --seed 9000000000000000000", "--seed 9000"),
    ("evaluate.py", "--task classify --val-crop 1.5", "--val-crop 1.5 is out of range"),
    ("evaluate.py", "--task classify --mistakes {root}/a.jpg", "a.jpg is no .png"),
    ("evaluate.py", "--task classify --confusion {root}/no/a.png", "there is no such folder"),
    ("evaluate.py", "--task features --out {root}/no/a.npz", "there is no such folder"),
    ("evaluate.py", "--task detect --results {root}/map.json", "map.json exists: choose another"),
    ("evaluate.py", "--task video --val-crop 0", "give --crops 1, too"),
    ("evaluate.py", "--task classify --real-labels a --label-map b", "leave --label-map out"),
    # weights
    ("evaluate.py", "--checkpoint {root}/none.pt", "no weights at"),
    ("evaluate.py", "--checkpoint {root}", "no weights at"),
    ("evaluate.py", "--checkpoint {root}/text.pt", "text.pt"),
    ("evaluate.py", "--checkpoint {root}/nan.pt", "the features are not finite"),
    ("evaluate.py", "--image-size 6", "not divisible by patch 4"),
    ("evaluate.py", "--task reconstruct", "has no decoder: --task reconstruct needs stage 1's"),
    ("evaluate.py", "--task classify", "has no head: --task classify needs one"),
    ("evaluate.py", "--task video", "has no head: --task video needs one"),
    ("evaluate.py", "--task video --checkpoint {root}/head.pt", "has a head for --task classify"),
    ("evaluate.py", "--task classify --checkpoint {root}/video.pt", "has a head for --task video"),
    ("evaluate.py", "--task zeroshot", "has no text tower: finetune.py --task lit makes one"),
    ("evaluate.py", "--task detect", "holds no detector"),
    # data
    ("evaluate.py", "--data {root}/pets/train", "--val-data"),
    ("evaluate.py", "--data {root}/pets/train --task fewshot", "--val-data"),
    ("evaluate.py", "--data {root}/flat", "no labels"),
    ("evaluate.py", "--data {root}/flat --task fewshot", "no labels"),
    ("evaluate.py", "--data {root}/nowhere", "does not exist"),
    ("evaluate.py", "--data {root}/empty", "no pictures"),
    ("evaluate.py", "--data {root}/*.tgz", "no shard matches"),
    ("evaluate.py", "--data {root}/text.pt", "not a folder"),
    ("evaluate.py", "--data=", "does not exist"),
    ("evaluate.py", "--data {root}/missing.tar", "there is no shard"),
    ("evaluate.py", "--data {root}/text.tar", "text.tar is no tar"),
    ("evaluate.py", "--data {root}/nothing.tar", "nothing.tar is no tar"),
    ("evaluate.py", "--data {root}/{pets,bare,moon}.tar", "moon.tar"),
    ("evaluate.py", "--data {root}/a-{000..003}.tar", "a-000.tar"),
    ("evaluate.py", "--data {root}/a-{3..1}.tar", "a-{3..1}.tar"),
    ("evaluate.py", "--data {root}/tars/a.tar", "the shards hold no pictures"),
    ("evaluate.py", "--data {root}/tars", "of its shards, give {root}/tars/*.tar"),
    ("evaluate.py", "--data {root}/pets/train --val-data {root}/no", "does not exist"),
    ("evaluate.py", "--val-data toy", "other classes"),
    ("evaluate.py", "--data {root}/pets.tar --val-data {root}/pets/val", "cannot be matched"),
    ("evaluate.py", "--data {root}/pets.tar --val-data {root}/bare.tar", "no labels in"),
    ("evaluate.py", "--task features --data {root}/flat/val", "has no val/: say --split train"),
    # classes of a head
    ("evaluate.py", f"{HEAD} --data {{root}}/flat", "no labels in"),
    (
        "evaluate.py",
        f"{HEAD} --data {{root}}/pets",
        "3 classes and no names for them, the data has 2",
    ),
    ("evaluate.py", f"{NAMED} --data {{root}}/pets", "the model knows no dog (1 of the data's"),
    ("evaluate.py", f"{NAMED} --label-map {{root}}/none.json", "none.json is no label map"),
    ("evaluate.py", f"{NAMED} --label-map {{root}}/map.json", "that the model or the data has not"),
    (
        "evaluate.py",
        f"{NAMED} --label-map {{root}}/pink.json",
        "pink.json is no label map (KeyError",
    ),
    ("evaluate.py", f"{HEAD} --real-labels {{root}}/short.json", "short.json is not real.json"),
    ("evaluate.py", f"{HEAD} --real-labels {{root}}/map.json", "map.json is not real.json"),
    ("evaluate.py", f"{HEAD} --real-labels {{root}}/null.json", "null.json is not real.json"),
    ("evaluate.py", f"{HEAD} --real-labels {{root}}/nine.json", "nine.json is not real.json"),
    ("evaluate.py", f"{HEAD} --real-labels {{root}}/word.json", "word.json is not real.json"),
    # pairs
    ("evaluate.py", f"{PAIR} zeroshot --data {{root}}/flat/val", "give --classnames"),
    ("evaluate.py", f"{PAIR} zeroshot --classnames {{root}}/none.txt", "cannot read class names"),
    ("evaluate.py", f"{PAIR} zeroshot --templates {{root}}/text.pt", "line 1 has no {}"),
    ("evaluate.py", f"{PAIR} retrieval", "no captions in"),
    ("evaluate.py", f"{PAIR} retrieval --tokenizer {{root}}/text.pt", "no tokenizer of XLM-R's"),
    # stage 1
    ("mae_pretrain.py", "--data {root}/nowhere", "does not exist"),
    ("mae_pretrain.py", "--data {root}/empty", "no pictures"),
    ("mae_pretrain.py", "--data {root}/text.pt", "not a folder"),
    ("mae_pretrain.py", "--data {root}/a-*.tar", "no shard matches"),
    ("mae_pretrain.py", "--image-size 50 --patch-size 16", "not divisible by patch 16"),
    ("mae_pretrain.py", "--image-size 8 --patch-size 16", "not divisible by patch 16"),
    ("mae_pretrain.py", "--image-size big", "size 'big' is neither a side nor HEIGHTxWIDTH"),
    ("mae_pretrain.py", "--image-size 1099511627776", "from 1 to 65536"),
    ("mae_pretrain.py", "--size 32x1099511627776x4", "999 layers"),
    ("mae_pretrain.py", "--size XXL", "XXL"),
    ("mae_pretrain.py", "--decoder 1099511627776x1x4", "65536 wide"),
    ("mae_pretrain.py", "--decoder 10x1x3", "--decoder"),
    ("mae_pretrain.py", "--decoder 100", "'100' is unknown: it must be WIDTHxLAYERSxHEADS"),
    ("mae_pretrain.py", "--decoder 6x1x2", "the width must be a multiple of 4 x heads"),
    ("mae_pretrain.py", "--batch-size 10 --micro-batch 4", "does not divide"),
    ("mae_pretrain.py", "--mask-ratio 1.0", "mask ratio"),
    ("mae_pretrain.py", "--channels 2", "channels"),
    ("mae_pretrain.py", "--init {root}/none.pt", "no weights"),
    ("mae_pretrain.py", "--resume {root}", "no checkpoint"),
    ("mae_pretrain.py", "--no-such-flag", "--no-such-flag"),
    ("mae_pretrain.py", "--steps many", "--steps"),
    ("mae_pretrain.py", "--steps 0", "--steps"),
    ("mae_pretrain.py", "--batch-size -1", "--batch-size"),
    ("mae_pretrain.py", "--lr nan", "--lr nan is out of range"),
    ("mae_pretrain.py", "--epochs inf", "--epochs inf is out of range"),
    ("mae_pretrain.py", "--warmup 2", "--warmup 2 is out of range"),
    ("mae_pretrain.py", "--out /proc/nowhere", "/proc"),
    ("mae_pretrain.py", "--out {root}/text.pt", "text.pt"),
    ("mae_pretrain.py", "--out {root}/foreign", "not ours"),  # it holds a config.json
    ("mae_pretrain.py", "--cuda-graph", "--cuda-graph is for one process on one GPU"),
    ("mae_pretrain.py", "--cuda-graph --gpus 2", "--cuda-graph is for one process on one GPU"),
    (
        "mae_pretrain.py",
        "--gpus 8 --lanes 48 --shard-group 3",
        "--shard-group 3 does not divide the 8 processes",
    ),
    (
        "mae_pretrain.py",
        "--plan --gpus 128 --batch-size 4096 --lanes 48",
        "48 lanes cannot be dealt to 128 processes",
    ),
    # stage 2
    ("weak_pretrain.py", "--data {root}/empty", "no pictures"),
    ("weak_pretrain.py", "--data {root}/flat", "give --tags"),
    ("weak_pretrain.py", "--data {root}/flat --tags {root}", "no hashtags in"),
    ("weak_pretrain.py", "--data {root}/flat --labels {root}/none", "no file of labels"),
    ("weak_pretrain.py", "--data {root}/flat --labels {root}/a.jsonl", "cannot read labels"),
    ("weak_pretrain.py", "--labels {root}/none", "want a folder"),
    ("weak_pretrain.py", "--init {root}/encoder.pt --size toy", "it cannot be changed"),
    ("weak_pretrain.py", "--gpus 64 --shard-group 7", "does not divide the 64 processes"),
    ("weak_pretrain.py", "--gpus 64 --shard-group 0", "out of range"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder of weights, pictures and lists, most of which are wrong."""
    root = tmp_path_factory.mktemp("places")
    names = [f"{animal}/val_{number:08}.png" for number, animal in ((1, "cat"), (2, "dog"))]
    pictures = {name: tile(number) for number, name in enumerate(names)}
    for split in ("train", "val"):
        write_files(root / "pets" / split, pictures)
        write_files(root / "flat" / split, {Path(name).name: pictures[name] for name in names})
    (root / "empty").mkdir()
    captioned(root / "pets.tar", [{"cls": b"0"}, {"cls": b"1"}])
    captioned(root / "bare.tar", [{}, {}])
    files = {"map": {"cat": 7}, "pink": {"cat": "pink"}, "short": [[1]], "null": [[1], None]}
    files |= {"nine": [[1], [9]], "word": [[1], ["red"]]}
    write_files(root, {f"{name}.json": json.dumps(files[name]).encode() for name in files})
    write_files(root, {"text.pt": b"this is not a checkpoint", "foreign/config.json": b"{}"})
    write_files(root, {"nothing.tar": b"", "text.tar": b"no tar " * 500, "tars/a.tar": bytes(1024)})
    text = {**TINY_TEXT, "vocabulary": 260, "context": 9}
    models = {
        "encoder": ViT(**SHAPE),
        "nan": ViT(**SHAPE),
        "head": Classifier(classes=3, **SHAPE),
        "named": Classifier(classes=3, class_names=["cat", "ox", "yak"], **SHAPE),
        "video": VideoClassifier(classes=3, frames=2, **SHAPE),
        "pair": TwoTowers(text=text, shared_width=8, **SHAPE),
    }
    torch.nn.init.constant_(models["nan"].norm.bias, float("nan"))
    for name, model in models.items():
        save_weights(root / f"{name}.pt", model.state_dict(), model.config)
    return root


def contents(root):
    """{path: bytes, False of a folder}, without the indices of shards that were opened."""
    paths = (path for path in root.rglob("*") if path.suffix != ".index")
    return {path: path.is_file() and path.read_bytes() for path in paths}


@pytest.mark.parametrize("program, flags, words", ROWS, ids=[" ".join(row[:2]) for row in ROWS])
def test_what_is_wrong_is_said_in_one_line(program, flags, words, places, capsys):
    before = contents(places)
    argv = f"{USUAL[program]} {flags}".replace("{root}", str(places)).split()
    with pytest.raises(SystemExit) as stopped:
        PROGRAMS[program](argv)
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert stopped.value.code == 2 and line.startswith(f"{program}: ")
    assert words.replace("{root}", str(places)) in line
    assert '"task"' not in printed.out and contents(places) == before


@pytest.mark.parametrize("missing", ["--task", "--checkpoint"])
def test_what_is_missing_is_named(missing, capsys):
    flags = {"--task": "knn", "--checkpoint": "model.pt"}
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([f"{flag}={value}" for flag, value in flags.items() if flag != missing])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and f"required: {missing}" in printed.err


@pytest.mark.parametrize("task, own", [("fewshot", "--shots"), ("video", "--span"), (None, None)])
def test_help_lists_the_flags_of_a_task(task, own, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--task", task, "--help"] if task else ["--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and "--checkpoint" in printed
    assert (own or "--task NAME --help lists the flags of a task") in printed
    assert [flag in printed for flag in ("--shots", "--span")].count(True) == bool(task)
