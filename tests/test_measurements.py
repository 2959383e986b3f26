"""What the measurements of whole programs make of the programs' output: tests/bench."""

import json
import sys
import time
from functools import partial

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "bench"))

import common
import finding
import learning_rates
import toy_chain


@pytest.fixture(autouse=True)
def nothing_has_failed():
    common.STOPPED.clear()


def test_results_are_rows_that_a_second_run_finds(tmp_path, capsys):
    results = common.Results(tmp_path / "new" / "folder")
    assert results.rows() == [] and not results.has({"seed": 0})
    results.add({"seed": 0, "top1": 0.5})
    again = common.Results(tmp_path / "new" / "folder")
    assert again.has({"seed": 0}) and not again.has({"seed": 1})
    with open(again.path, "a") as file:
        file.write('{"seed": 1, "to')  # killed while it wrote
    assert len(again.rows()) == 1
    again.add({"seed": 2})
    assert [row["seed"] for row in again.rows()] == [0, 2]


def test_a_folder_has_the_results_of_one_measurement(tmp_path):
    common.Results(tmp_path, data="a", lengths=[1, 2])
    common.Results(tmp_path, data="a", lengths=[1, 2])
    with pytest.raises(SystemExit, match="is of another measurement"):
        common.Results(tmp_path, data="b", lengths=[1, 2])


def test_a_program_that_fails_ends_the_measurement_with_its_reason(tmp_path):
    with pytest.raises(SystemExit, match="data.py failed: see .*log: .*nowhere"):
        common.run_program(tmp_path / "log", "data.py", "index", tmp_path / "nowhere.tar")
    assert common.run_program(tmp_path / "log", "data.py --help") in (tmp_path / "log").read_text()


def test_a_program_that_was_stopped_is_no_result(tmp_path, monkeypatch):
    (tmp_path / "stopped.py").write_text("print('stopped at step 3 of 9, saved')")
    monkeypatch.setattr(common, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="stopped at step 3 of 9"):
        common.run_program(tmp_path / "log", "stopped.py")
    with pytest.raises(SystemExit, match="^stopped$"):  # no other one begins
        common.run_program(tmp_path / "log", "stopped.py")


def test_after_an_error_no_other_run_begins():
    begun = []

    def run(number):
        begun.append(number)
        time.sleep(0.05)
        if number == 1:
            raise SystemExit("stop")

    with pytest.raises(SystemExit, match="stop"):
        common.side_by_side(1, [partial(run, number) for number in range(50)])
    assert 1 < len(begun) < 50 and begun[:2] == [0, 1]


def test_a_share_of_the_pictures_is_copied_whole_or_not_at_all(tmp_path):
    for part, count in (("train", 10), ("val", 2)):
        for name in ("a", "b"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / "data" / part / name / f"{number}.jpg").touch()
    cut = tmp_path / "few.part" / "train" / "c"  # left by a copy that was killed
    cut.mkdir(parents=True)
    for labels, wanted in ((3, 3), (0.5, 5)):
        few = tmp_path / ("few" if labels == 3 else "half")
        finding.copy_few(tmp_path / "data", few, labels)
        names = sorted(path.name for path in (few / "train" / "b").iterdir())
        assert names == [f"{number}.jpg" for number in range(wanted)]
        assert len(list(few.rglob("*.jpg"))) == 2 * wanted + 4
        assert not (few / "train" / "c").exists() and not (tmp_path / "few.part").exists()


def test_numbers_of_what_programs_print(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1}\n{"hit_1": 0.5, "hit_5_by_frequency": 0.25}'
    )
    probe = "linear probe (closed form): 4096 labels\n  raw pixels   top-1 36.3%\n  trained  top-1 9.0%\n"
    found = toy_chain.numbers(f"{probe}next: x", tmp_path)
    assert found == {"raw pixels": 36.3, "trained": 9.0, "hit_1": 50, "hit_5_by_frequency": 25}
    names = "colour                   95.50%  2048 pictures  chance 12.50%\n"
    assert toy_chain.numbers(names, tmp_path / "none") == {"colour": 95.5}
    last = json.dumps({"task": "lowshot", "top1": {"logistic": {"1": 0.5}}})
    assert toy_chain.numbers(last, tmp_path / "none") == {"logistic, 1 labels": 50}
    last = json.dumps({"task": "detect", "bbox_AP": 0.25, "bbox_APs": 0.5, "segm_AP50": 1.0})
    assert toy_chain.numbers(last, tmp_path / "none") == {"bbox_AP": 25, "segm_AP50": 100}


def test_tables_have_means_deviations_and_seeds(capsys):
    row = {"start": "mae", "steps": 70, "gflops": 13_500, "ridge": 0.5, "FT": 0.5, "tag loss": 3.5}
    finding.table([row | {"seed": seed, "5-shot": 0.4 + 0.1 * seed} for seed in range(2)])
    cells = "mae | 70 | 13.5 | 45.0 ± 7.1 | 50.0 ± 0.0 | 50.0 ± 0.0 | 3.500 | 2"
    assert capsys.readouterr().out.splitlines()[-1] == f"| {cells} |"
    rows = [{"stage": 3, "batch_size": 32, "lr": "1e-3", "peak": 1e-3, "top1": 0.5}]
    rows += [rows[0] | {"lr": "default", "peak": 2e-3}, rows[0] | {"lr": "3e-4", "diverged": True}]
    del rows[2]["top1"]
    learning_rates.table(rows)
    first, _, last = capsys.readouterr().out.splitlines()
    assert first == "| stage | batch | 3e-4 | 1e-3 | default |"
    assert last == "| 3 | 32 | diverged | 50.0 | 50.0 at 2.0e-03 |"
