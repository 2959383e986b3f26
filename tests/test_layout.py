"""What the README says of the files: which of them can be copied, alone or with which others."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

# {file: what it needs} of the rows "stands alone when copied" that say yes, or with which others.
ROWS = {}
for row in (ROOT / "README.md").read_text().splitlines():
    cells = row.strip("|").split("|")
    file = re.fullmatch(r" `([\w/]+\.py)` ", cells[0])
    if len(cells) == 3 and file:
        needed = cells[2].partition(";")[0]
        ROWS[file[1]] = re.findall(r"`(\w+\.py)`", needed) if "with the same" not in row else None
ROWS["weak_pretrain.py"] = ROWS["mae_pretrain.py"]


def test_the_table_is_read():
    assert ROWS["model.py"] == ["kernels.py"] and ROWS["data.py"] == []
    assert {path.name for path in ROOT.glob("*.py")} <= ROWS.keys()


@pytest.mark.parametrize("file", ROWS)
def test_files_can_be_copied_as_the_readme_says(file, tmp_path):
    for name in (file, *ROWS[file]):
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, target)
    code = f"import {file[:-3].replace('/', '.')}"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


def test_stage_1_runs_where_only_its_files_are(tmp_path):
    for name in ("mae_pretrain.py", *ROWS["mae_pretrain.py"]):
        shutil.copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "mae_pretrain.py", "--size", "16x1x2", "--decoder", "16x1x2"]
    command += ["--steps", "2", "--batch-size", "8", "--workers", "0", "--out", "run"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "run" / "model.pt").is_file()
