"""What programs refuse: in one line, with exit status 2, before anything is written.

A row: (flags, words of the line). The flags are added to the USUAL ones of the program, of
which each may be given again; {root} is the folder of the files that `places` makes.
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
EVALUATE = [
    # flags
    ("--task paint", "--task"),
    ("--pool max", "--pool"),
    ("--no-such-flag=1", "unrecognized arguments: --no-such-flag=1"),
    ("--shot 1", "unrecognized arguments: --shot 1"),  # no abbreviations
    ("--seed 1", "--seed is for --task reconstruct"),
    ("--mask-ratio=0.5", "--mask-ratio is for --task reconstruct"),
    ("--no-raw-pixels", "--no-raw-pixels is for --task reconstruct"),
    ("--confusion a.png", "--confusion is for --task classify, video"),
    ("--task features --shots 1", "--shots is for --task fewshot"),
    ("--task detect --labels a.csv", "--labels is for --task classify, video"),
    ("--task zeroshot --caption-key a", "--caption-key is for --task retrieval"),
    ("--span 2", "--span is for --task video"),
    ("--results a.json", "--results is for --task detect"),
    ("--task fewshot --shots 1,many", "--shots '1,many' is no list"),
    ("--task fewshot --shots 0", "--shots '0' is no list"),
    ("--task fewshot --shots=-1,all", "--shots '-1,all' is no list"),
    ("--task fewshot --shots 1,,2", "--shots '1,,2' is no list"),
    ("--batch-size large", "--batch-size 'large' is no int"),
    ("--batch-size 0", "--batch-size 0 is out of range"),
    ("--batch-size 1099511627776", "--batch-size 1099511627776 is out of range"),
    ("--max-bad none", "--max-bad 'none' is no float"),
    ("--max-bad nan", "--max-bad nan is out of range"),
    ("--max-pixels 65535", "--max-pixels 65535 is not at least 65536"),
    ("--max-pixels abc", "--max-pixels abc is not at least 65536"),
    ("--task reconstruct --count 0", "--count 0 is out of range"),
    ("--task reconstruct --mask-ratio 2", "--mask-ratio 2 is out of range"),
    ("--task reconstruct --seed 9000000000000000000", "--seed 9000"),
    ("--task classify --val-crop 1.5", "--val-crop 1.5 is out of range"),
    ("--task classify --mistakes {root}/a.jpg", "a.jpg is no .png"),
    ("--task classify --confusion {root}/no/a.png", "there is no such folder"),
    ("--task features --out {root}/no/a.npz", "there is no such folder"),
    ("--task detect --results {root}/map.json", "map.json exists: choose another"),
    ("--task video --val-crop 0", "give --crops 1, too"),
    ("--task classify --real-labels a --label-map b", "leave --label-map out"),
    # weights
    ("--checkpoint {root}/none.pt", "no weights at"),
    ("--checkpoint {root}", "no weights at"),
    ("--checkpoint {root}/text.pt", "text.pt"),
    ("--checkpoint {root}/nan.pt", "the features are not finite"),
    ("--image-size 6", "not divisible by patch 4"),
    ("--task reconstruct", "has no decoder: --task reconstruct needs stage 1's"),
    ("--task classify", "has no head: --task classify needs one"),
    ("--task video", "has no head: --task video needs one"),
    ("--task video --checkpoint {root}/head.pt", "has a head for --task classify"),
    ("--task classify --checkpoint {root}/video.pt", "has a head for --task video"),
    ("--task zeroshot", "has no text tower: finetune.py --task lit makes one"),
    ("--task detect", "holds no detector"),
    # data
    ("--data {root}/pets/train", "--val-data"),
    ("--data {root}/pets/train --task fewshot", "--val-data or --val-share"),
    ("--val-share 0.5", "--val-share: leave it out, there is {root}/pets/val to measure on"),
    ("--data {root}/pets/train --val-share 0.1", "--val-share 0.1 of 2 pictures"),
    ("--task detect --val-share 0.1", "--val-share is for --task classify, video, knn"),
    ("--val-share 0", "--val-share 0 is out of range"),
    ("--data {root}/flat", "no labels"),
    ("--data {root}/flat --task fewshot", "no labels"),
    ("--data {root}/nowhere", "does not exist"),
    ("--data {root}/empty", "no pictures"),
    ("--data {root}/*.tgz", "no shard matches"),
    ("--data {root}/text.pt", "not a folder"),
    ("--data=", "--data is empty"),
    ("--task reconstruct --out {root}/pets/val/cat/a.png.jpg", "a.png.jpg is no .png"),
    ("--data {root}/missing.tar", "there is no shard"),
    ("--data {root}/text.tar", "text.tar is no tar"),
    ("--data {root}/nothing.tar", "nothing.tar is no tar"),
    ("--data {root}/{pets,bare,moon}.tar", "moon.tar"),
    ("--data {root}/a-{000..003}.tar", "a-000.tar"),
    ("--data {root}/a-{3..1}.tar", "a-{3..1}.tar"),
    ("--data {root}/tars/a.tar", "the shards hold no pictures"),
    ("--data {root}/tars", "of its shards, give {root}/tars/*.tar"),
    ("--data {root}/pets/train --val-data {root}/no", "does not exist"),
    ("--val-data toy", "other classes"),
    ("--data {root}/pets.tar --val-data {root}/pets/val", "cannot be matched"),
    ("--data {root}/pets.tar --val-data {root}/bare.tar", "no labels in"),
    ("--task features --split val --data {root}/flat/val", "has no val/: leave --split out"),
    # classes of a head
    (f"{HEAD} --data {{root}}/flat", "no labels in"),
    (f"{HEAD} --data {{root}}/pets", "3 classes and no names for them, the data has 2"),
    (f"{NAMED} --data {{root}}/pets", "the model knows no dog (1 of the data's"),
    (f"{NAMED} --label-map {{root}}/none.json", "none.json is no label map"),
    (f"{NAMED} --label-map {{root}}/map.json", "that the model or the data has not"),
    (f"{NAMED} --label-map {{root}}/pink.json", "pink.json is no label map (KeyError"),
    (f"{HEAD} --real-labels {{root}}/short.json", "short.json is not real.json"),
    (f"{HEAD} --real-labels {{root}}/map.json", "map.json is not real.json"),
    (f"{HEAD} --real-labels {{root}}/null.json", "null.json is not real.json"),
    (f"{HEAD} --real-labels {{root}}/nine.json", "nine.json is not real.json"),
    (f"{HEAD} --real-labels {{root}}/word.json", "word.json is not real.json"),
    # pairs
    (f"{PAIR} zeroshot --data {{root}}/flat/val", "give --classnames"),
    (f"{PAIR} zeroshot --classnames {{root}}/none.txt", "cannot read class names"),
    (f"{PAIR} zeroshot --templates {{root}}/text.pt", "line 1 has no {}"),
    (f"{PAIR} retrieval", "no captions in"),
    (f"{PAIR} retrieval --tokenizer {{root}}/text.pt", "no tokenizer of XLM-R's"),
]
STAGE_1 = [
    ("--data {root}/nowhere", "does not exist"),
    ("--data {root}/empty", "no pictures"),
    ("--data {root}/text.pt", "not a folder"),
    ("--val-share 0.1", "--val-share: leave it out, there is toy to measure on"),
    ("--data {root}/a-*.tar", "no shard matches"),
    ("--image-size 50 --patch-size 16", "not divisible by patch 16"),
    ("--image-size 8 --patch-size 16", "not divisible by patch 16"),
    ("--image-size big", "size 'big' is neither a side nor HEIGHTxWIDTH"),
    ("--image-size 1099511627776", "from 1 to 65536"),
    ("--size 32x1099511627776x4", "999 layers"),
    ("--size XXL", "XXL"),
    ("--decoder 1099511627776x1x4", "65536 wide"),
    ("--decoder 10x1x3", "--decoder"),
    ("--decoder 100", "'100' is unknown: it must be WIDTHxLAYERSxHEADS"),
    ("--decoder 6x1x2", "the width must be a multiple of 4 x heads"),
    ("--batch-size 10 --micro-batch 4", "does not divide"),
    ("--mask-ratio 1.0", "mask ratio"),
    ("--channels 2", "channels"),
    ("--init {root}/none.pt", "no weights"),
    ("--resume {root}", "no checkpoint"),
    ("--no-such-flag", "--no-such-flag"),
    ("--steps many", "--steps"),
    ("--steps 0", "--steps"),
    ("--batch-size -1", "--batch-size"),
    ("--data=", "--data is empty"),
    ("--init=", "--init is empty"),
    ("--out=", "--out is empty"),
    ("--lr nan", "--lr nan is out of range"),
    ("--epochs inf", "--epochs inf is out of range"),
    ("--warmup 2", "--warmup 2 is out of range"),
    ("--out /proc/nowhere", "/proc"),
    ("--out {root}/text.pt", "text.pt"),
    ("--out {root}/foreign", "holds a config.json that is not of this run"),
    ("--cuda-graph", "--cuda-graph is for one process on one GPU"),
    ("--cuda-graph --gpus 2", "--cuda-graph is for one process on one GPU"),
    ("--gpus 8 --lanes 48 --shard-group 3", "--shard-group 3 does not divide the 8 processes"),
    ("--plan --gpus 128 --batch-size 4096 --lanes 48", "48 lanes cannot be dealt to 128 processes"),
]
STAGE_2 = [
    ("--data {root}/empty", "no pictures"),
    ("--data {root}/flat", "give --tags"),
    ("--data {root}/flat --tags {root}", "no hashtags in"),
    ("--data {root}/flat --labels {root}/none", "no file of labels"),
    ("--data {root}/flat --labels {root}/a.jsonl", "cannot read labels"),
    ("--labels {root}/none", "want a folder"),
    ("--init {root}/encoder.pt --size toy", "it cannot be changed"),
    ("--gpus 64 --shard-group 7", "does not divide the 64 processes"),
    ("--gpus 64 --shard-group 0", "out of range"),
]
ROWS = [("evaluate.py", *row) for row in EVALUATE]
ROWS += [("mae_pretrain.py", *row) for row in STAGE_1]
ROWS += [("weak_pretrain.py", *row) for row in STAGE_2]


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
