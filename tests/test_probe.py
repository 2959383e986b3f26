"""The probe that runs while stages 1 and 2 train."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    Memory,
    completed,
    evaluated,
    picture,
    read_metrics,
    rewound,
    same_weights,
    stage,
)
from PIL import Image

from data import Folder, Subset
from support import probe
from support.hashtags import write_hashtags

# 2,000 samples between two saves: 5 % of them are the 100 pictures of `pets`.
RUN = [
    *("--size", "16x1x2", "--decoder", "16x1x2", "--image-size", "16", "--patch-size", "4"),
    *("--batch-size", "200", "--steps", "20", "--save-every", "10", "--lr", "1e-3"),
    *("--workers", "0", "--max-bad", "1"),
]


def save_classes(folder, count, first=0):
    """Class folders with `count` pictures of each of two classes, which differ a little."""
    for number, name in enumerate(("cats", "dogs")):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.array(picture(1000 * number + first + i)) // 2
            pixels[:, :, number] += 20
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """50 pictures in train/ and 50 in val/."""
    folder = tmp_path_factory.mktemp("pets")
    save_classes(folder / "train", 25)
    save_classes(folder / "val", 25, first=500)
    return folder


@pytest.fixture(scope="module")
def run(pets, tmp_path_factory):
    out = tmp_path_factory.mktemp("probed") / "run"
    ran = completed("--data", pets, *RUN, "--out", out)
    assert "fitted on 50 pictures of 2 classes, 50 others to measure on" in ran.stdout
    assert ran.stdout.count("  5-shot ") == ran.stdout.count("  knn ") == 2
    return out


def probed(out):
    """(few-shot, knn) of the lines of metrics.jsonl that have them."""
    return [tuple(line[n] for n in probe.PROBES_SHOWN) for line in read_metrics(out) if
            "probe_knn" in line]  # fmt: skip


def test_it_is_what_evaluate_measures_afterwards(run, pets):
    few_shot, knn = probed(run)[-1]
    few_shots, _ = evaluated("fewshot", run / "model.pt", pets, "--shots", "5")
    neighbours, _ = evaluated("knn", run / "model.pt", pets)
    assert few_shot == pytest.approx(few_shots["top1"]["5"], abs=1e-9)
    assert knn == pytest.approx(neighbours["top1"], abs=1e-9)
    assert probed(run)[0] != probed(run)[1]  # it is measured anew at each save


@pytest.mark.parametrize("flags", [[], ["--shard-group", "2"]])
def test_two_processes_find_the_same_and_read_each_picture_once(flags, run, pets, tmp_path):
    completed("--data", pets, *RUN, *flags, "--out", tmp_path / "run", processes=2)
    # A vote or a rank may turn by rounding: of 50 pictures at most one.
    assert np.abs(np.subtract(probed(tmp_path / "run"), probed(run))).max() <= 1 / 50
    shutil.copytree(pets / "val", tmp_path / "val")
    first = Path(Folder(str(tmp_path / "val")).name(0))  # the first process reads it
    first.write_bytes(b"no picture")
    flags = [*RUN, *flags, "--val-data", tmp_path / "val", "--steps", "10"]
    ran = completed("--data", pets / "train", *flags, "--out", tmp_path / "bad", processes=2)
    # It is read by the probe, for the held-out loss, and at the end.
    assert ran.stderr.count(first.name) == 1 and len(probed(tmp_path / "bad")) == 1


def test_it_changes_neither_the_training_nor_a_resumed_run(run, pets, tmp_path):
    shutil.copytree(pets / "train", tmp_path / "train")
    completed("--data", tmp_path / "train", "--val-data", pets / "val" / "cats", *RUN,
              "--out", tmp_path / "unprobed")  # fmt: skip
    assert not probed(tmp_path / "unprobed")
    assert same_weights(run, tmp_path / "unprobed")

    completed("--data", pets, *RUN, "--out", rewound(run, tmp_path / "resumed", step=10))
    assert read_metrics(tmp_path / "resumed") == read_metrics(run)
    assert same_weights(run, tmp_path / "resumed")


def test_stage_2_probes_a_folder_that_has_no_hashtags(pets, tmp_path):
    paths = [path.relative_to(pets) for path in sorted(pets.glob("train/*/*.png"))]
    lines = [{"path": str(path), "hashtags": [f"#{path.parent.name}"]} for path in paths]
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, lines)))
    labels = str(tmp_path / "labels.jsonl")
    write_hashtags(Folder(str(pets), labels=labels), tmp_path / "tags")
    data = ["--data", pets, "--labels", labels, "--tags", tmp_path / "tags", "--probe", pets]
    flags = [*RUN[:2], *RUN[4:]]  # without a decoder
    program = "weak_pretrain.py"
    ran = completed(*data, *flags, "--out", tmp_path / "run", program=program)
    assert len(probed(tmp_path / "run")) == 2 and "fitted on 50 pictures" in ran.stdout


def test_a_folder_without_val_is_halved_and_damage_is_named_once(pets, tmp_path):
    shutil.copytree(pets / "train", tmp_path / "some")
    save_classes(tmp_path / "some" / "more", 25)  # in a third class
    (tmp_path / "some" / "cats" / "0.png").write_bytes(b"no picture")
    ran = completed("--data", pets / "val", *RUN, "--probe", tmp_path / "some", "--out",
                    tmp_path / "run")  # fmt: skip
    assert "fitted on 50 pictures of 3 classes, 50 others to measure on" in ran.stdout
    assert ran.stderr.count("cats/0.png") == 1 and len(probed(tmp_path / "run")) == 2


def test_what_is_of_no_use_is_refused_or_said(pets, tmp_path):
    ran = stage("--data", pets, *RUN, "--probe", pets / "val" / "cats", "--out", tmp_path / "run")
    assert ran.returncode == 2 and not (tmp_path / "run").exists()
    assert "no labels of two classes" in ran.stderr.splitlines()[-1]
    few = [*RUN, "--batch-size", "50"]  # 500 samples between two saves
    ran = completed("--data", pets, *few, "--out", tmp_path / "few")
    assert "left out" in ran.stdout and not probed(tmp_path / "few")


@pytest.mark.parametrize(
    "batch_size, save_every, due",  # of 40 steps; 100 pictures want 2,000 samples
    [
        (200, 10, [10, 20, 30, 40]),
        (200, 7, [14, 21, 35, 40]),
        (50, 10, [40]),
        (400, 4, [8, 12, 16]),
    ],
)
def test_probes_take_at_most_5_percent(batch_size, save_every, due):
    sources = [Subset(Labelled(classes=2, of_each=50), range(50))] * 2
    settled = Namespace(batch_size=batch_size, save_every=save_every)
    one = probe.Probe(*sources, settled)
    steps = due[-1] if batch_size == 400 else 40
    saves = [step for step in range(1, steps + 1) if step % save_every == 0 or step == steps]
    assert [step for step in saves if one.is_due(step)] == due
    for step in saves:
        probes = sum(one.is_due(earlier) for earlier in saves if earlier <= step)
        assert 100 * probes <= 0.05 * batch_size * step


@pytest.mark.parametrize("micro_batch", [1, 7, 16, 48, 5000])
@pytest.mark.parametrize("processes", [1, 3, 4])
def test_a_process_computes_its_part_alone(micro_batch, processes, monkeypatch):
    source = Subset(Labelled(classes=2, of_each=50), range(57))
    config = {"image_size": [8, 8], "channels": 3}
    settled = Namespace(micro_batch=micro_batch, config=config, batch_size=8, save_every=1)
    one, seen = probe.Probe(source, source, settled), []
    for process in range(processes):
        monkeypatch.setattr(probe, "distributed", lambda number=process: (number, processes))
        batches = one.batches_of(source)
        rows = [batches.positions(number) for number in range(len(batches))]
        assert max(map(len, rows)) <= micro_batch + 1  # rows come in pairs
        # At most a pair more in each batch, to fill it.
        assert sum(map(len, rows)) <= 57 / processes + 2 * len(rows) + 2
        seen += [int(position) for row in rows for position in row if position < 57]
    assert sorted(seen) == list(range(57))


class Labelled(Memory):
    """Samples whose class is known, sorted by it."""

    def __init__(self, classes, of_each):
        super().__init__([classes * of_each])
        self.classes, self.of_each = list(map(str, range(classes))), of_each
        self.identity = f"{classes} classes"

    def read(self, number):
        return {"class": number // self.of_each}


def test_of_many_classes_some_are_used_with_ten_samples_each():
    source = Labelled(classes=400, of_each=50)
    chosen, kinds = probe.some_labelled(source, 1000)
    labels = [chosen.read(number)["class"] for number in range(len(chosen.numbers))]
    assert len(kinds) == 100 and set(labels) == set(kinds)
    assert min(map(labels.count, kinds)) >= 8 and len(labels) <= 1000
    small, kinds = probe.some_labelled(Labelled(classes=400, of_each=2), 1000)  # no more to have
    assert len(kinds) == 400 and len(small.numbers) == 800
    few, kinds = probe.some_labelled(Labelled(classes=4, of_each=50), 100)
    assert len(few.numbers) == 100 and list(kinds) == [0, 1, 2, 3]
    others, same = probe.some_labelled(Subset(source, range(20_000)), 1000, kinds)
    assert {others.read(number)["class"] for number in range(len(others.numbers))} == {0, 1, 2, 3}
    assert same is kinds
