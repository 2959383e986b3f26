"""What a stage-1 step enters: every function of ours from main() to the first optimizer.step().

    python tests/bench/one_step.py                   the functions in order, and lines for each file
    python tests/bench/one_step.py --data FOLDER     of other pictures

One process on the CPU, without loader processes, a folder of JPEGs (made here). A function counts
with all its lines, from def to its end; functions inside it are part of it. Beside that stand its
lines of code: without docstring, comments and blank lines.
"""

import argparse
import ast
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image

import mae_pretrain

TOP = ("mae_pretrain.py", "model.py", "data.py", "kernels.py")


def functions_of(path):
    """{line of a def: (name, lines, lines of code)} of a file's functions, but for inner ones."""
    found, text = {}, path.read_text().splitlines()

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visit(child, f"{child.name}.")
            elif isinstance(child, ast.FunctionDef):
                first = min([child.lineno, *(d.lineno for d in child.decorator_list)])
                own = set(range(first, child.end_lineno + 1))
                if ast.get_docstring(child, clean=False) is not None:
                    own -= set(range(child.body[0].lineno, child.body[0].end_lineno + 1))
                code = [i for i in own if text[i - 1].strip() and text[i - 1].strip()[0] != "#"]
                found[first] = prefix + child.name, child.end_lineno - first + 1, len(code)

    visit(ast.parse(path.read_text()), "")
    return found


def trace(argv):
    """[(file, name, lines, of code)] of the functions entered, in the order of their first call."""
    entered, known = {}, {}

    class Taken(Exception):
        pass

    def profile(frame, event, _):
        if event != "call":
            return
        path = frame.f_code.co_filename
        if not path.startswith(str(ROOT)) or "/tests/" in path:
            return
        functions = known.setdefault(path, None) or functions_of(Path(path))
        known[path] = functions
        found = functions.get(frame.f_code.co_firstlineno)
        if found:
            entered.setdefault((os.path.relpath(path, ROOT), *found))

    def step(*_, **__):
        raise Taken

    torch.optim.AdamW.step = step
    sys.setprofile(profile)
    try:
        mae_pretrain.main(argv)
    except Taken:
        pass
    finally:
        sys.setprofile(None)
    return list(entered)


def write_pictures(folder):
    for number in range(40):
        pixels = np.random.RandomState(number).randint(0, 256, (60, 80, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", help="a folder of pictures (40 JPEGs of noise)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder, "pictures")
        pictures.mkdir()
        write_pictures(pictures)
        argv = ["--data", given.data or str(pictures), "--size", "toy", "--batch-size", "8"]
        argv += ["--steps", "2", "--workers", "0", "--out", f"{folder}/run"]
        entered = trace(argv)
    print("lines  code")
    for file, name, lines, code in entered:
        print(f"{lines:5} {code:5}  {file}  {name}")
    files = list(dict.fromkeys(file for file, *_ in entered))
    for file in files:
        mine = [row for row in entered if row[0] == file]
        print(
            f"{sum(r[2] for r in mine):5} {sum(r[3] for r in mine):5}  {file}, {len(mine)} functions"
        )
    top = [row for row in entered if row[0] in TOP]
    print(f"{sum(r[2] for r in top):5} {sum(r[3] for r in top):5}  in the top-level files")
    print(
        f"{sum(r[2] for r in entered):5} {sum(r[3] for r in entered):5}  in all, {len(entered)} functions"
    )


if __name__ == "__main__":
    main()
