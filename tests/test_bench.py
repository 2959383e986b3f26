"""tests/bench/gpu.py, for days with a GPU, is rehearsed here, so that it runs on such a day."""

import csv
import subprocess
import sys

from conftest import ROOT

VARIANTS = ["compiled", "compiled+graph", "compiled, read late"]


def test_gpu_rehearsal_writes_its_rows_and_the_profile(tmp_path):
    command = [sys.executable, "tests/bench/gpu.py", "--rehearse", "--parts", "steps", "profile"]
    command += ["--sizes", "H", "--peer", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "no rows of the peer" in ran.stdout and "WRONG" not in ran.stdout
    table, profile = sorted((tmp_path / "out").iterdir(), key=lambda path: path.suffix)
    assert table.name.startswith("rehearsal-") and table.suffix == ".csv"
    with open(table, newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:5] == ["part", "size", "batch", "variant", "images/s"] and header[-1] == "note"
    assert all(len(row) == len(header) for row in rows)
    assert [row[0] for row in rows] == ["machine", *["steps"] * len(VARIANTS)]
    rows = [dict(zip(header, row)) for row in rows[1:]]
    assert [row["variant"] for row in rows] == VARIANTS
    for row in rows:
        assert (row["size"], row["batch"]) == ("H", "2")
        assert row["mfu"] == row["over peer"] == ""  # a CPU's peak is unknown; there is no peer
        numbers = [float(row[name]) for name in header[4:-1] if row[name]]
        assert len(numbers) == 7 and min(numbers) > 0
        per_image = float(row["ms per step"]) / float(row["batch"])
        assert abs(float(row["images/s"]) * per_image / 1e3 - 1) < 1e-3
        assert float(row["fastest"]) <= float(row["ms per step"]) <= float(row["slowest"])
    text = profile.read_text()
    assert [f"H 2 {variant}: " in text for variant in VARIANTS] == [True, True, False]
    assert "aten::mm" in text
