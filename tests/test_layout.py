"""The layout: what imports what, and what the README says can be copied."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

FILES = [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("tasks/*.py")]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
CORE = {"kernels", "model", "data"}
STAGES = {"mae_pretrain", "weak_pretrain", "finetune"}

# What a file may import when it is loaded: layers, each of which may import those before it. Files
# of one layer may import each other; Python itself refuses a circle.
LAYERS = [
    {"kernels", "support.checkpoints", "support.launch", "support.cuda_graph"},
    {"model"},
    {"data"},
    {name for name in MODULES if name.startswith("support.")},
    {name for name in MODULES if name.startswith("tasks.")},
    {"evaluate"},
    STAGES,
]


def imports(tree):
    """Names of our own modules that are imported below a node."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
            found.add(node.module)
    return found & MODULES.keys()


def layer(name):
    return next(i for i, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    tree = ast.parse(MODULES[name].read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    inside = set().union(*map(imports, functions)) if functions else set()
    for node in functions:
        node.body = [ast.Pass()]
    # `python data.py pack` is a program: what it imports, an import of data does not.
    tree.body = [n for n in tree.body if "__main__" not in ast.unparse(n).partition("\n")[0]]
    loaded = imports(tree)
    if name in CORE:
        assert loaded <= CORE  # folders only inside the function that a flag leads to
    assert not (loaded | inside) & STAGES
    for other in loaded - {name}:
        assert layer(other) <= layer(name), f"{name} imports {other}"


# {file: what it needs} of the rows "stands alone when copied" that say yes, or with what.
ROWS = {}
for row in (ROOT / "README.md").read_text().splitlines():
    cells = row.strip("|").split("|")
    file = re.fullmatch(r" `([\w/]+\.py)` ", cells[0])
    if len(cells) == 3 and file and cells[2].strip():
        ROWS[file[1]] = re.findall(r"`(\w+(?:\.py|/))`", cells[2].partition(";")[0])


def test_the_table_is_read():
    assert ROWS["model.py"] == ["kernels.py"] and ROWS["data.py"] == []
    assert {path.name for path in ROOT.glob("*.py")} <= ROWS.keys()


def copy(file, folder):
    for name in (file, *ROWS[file]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            shutil.copytree(ROOT / name, folder / name)
        else:
            shutil.copy(ROOT / name, folder / name)


def run(folder, *command):
    ran = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("file", ROWS)
def test_files_can_be_copied_as_the_readme_says(file, tmp_path):
    copy(file, tmp_path)
    run(tmp_path, "-c", f"import {file[:-3].replace('/', '.')}")


def test_stage_1_runs_where_only_its_files_are(tmp_path):
    copy("mae_pretrain.py", tmp_path)
    command = ["mae_pretrain.py", "--size", "16x1x2", "--decoder", "16x1x2"]
    command += ["--steps", "2", "--batch-size", "8", "--workers", "0", "--out", "run"]
    run(tmp_path, *command)
    assert (tmp_path / "run" / "model.pt").is_file()


@pytest.mark.parametrize("stage", ["mae_pretrain", "weak_pretrain"])
def test_stages_1_and_2_load_no_task(stage):
    code = f"import sys, {stage}; print([name for name in sys.modules if name[:6] == 'tasks.'])"
    assert run(ROOT, "-c", code).strip() == "[]"


def test_each_package_has_one_version_wherever_it_is_named():
    files = ["requirements.txt", "requirements-dev.txt", "pyproject.toml", "README.md", ".ci/run"]
    versions = {}
    for path in [*(ROOT / file for file in files), *ROOT.glob("docs/*.md")]:
        for name, version in re.findall(r"([\w-]+)==([\d.]*\d)", path.read_text()):
            versions.setdefault(name, set()).add(version)
    assert {"torch", "timm", "onnx"} <= versions.keys()
    assert {name for name, found in versions.items() if len(found) > 1} == set()


def test_uv_installs_what_pip_does():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert project["dependencies"] == [line for line in lines if not line.startswith("#")]
