"""What a stage-1 step enters: every function of ours from main() to the first optimizer.step().

    python tests/bench/one_step.py                   the functions in order, and lines for each file
    python tests/bench/one_step.py --data FOLDER     of other pictures

One process on the CPU, without loader processes, a folder of JPEGs (made here). A
function counts with all its lines, from def to its end; functions inside it are part of
it. Beside that stand its lines of code: without docstring, comments and blank lines.
"""

import ast
import contextlib
import os
import sys
import tempfile
from functools import cache
from pathlib import Path

import common
import numpy as np
import torch
from PIL import Image

import mae_pretrain

TOP = ("mae_pretrain.py", "model.py", "data.py", "kernels.py")


@cache
def functions_of(path):
    """{line of a def: (name, lines, lines of code)} of a file's functions, but for inner ones."""
    source = Path(path).read_text()
    found, text = {}, source.splitlines()

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

    visit(ast.parse(source), "")
    return found


def trace(argv):
    """[(file, name, lines, of code)] of the functions entered, in the order of their first call."""
    entered, root = {}, str(common.ROOT)

    class Taken(Exception):
        pass

    def profile(frame, event, _):
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(root) and "/tests/" not in path:
            found = functions_of(path).get(frame.f_code.co_firstlineno)
            if found:
                entered.setdefault((os.path.relpath(path, root), *found))

    def step(*_, **__):
        raise Taken

    torch.optim.AdamW.step = step
    sys.setprofile(profile)
    with contextlib.suppress(Taken):
        mae_pretrain.main(argv)
    sys.setprofile(None)
    return list(entered)


def write_pictures(folder):
    folder.mkdir()
    for number in range(40):
        pixels = np.random.RandomState(number).randint(0, 256, (60, 80, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")


def print_sums(rows, what):
    print(f"{sum(row[2] for row in rows):5} {sum(row[3] for row in rows):5}  {what}")


def main():
    parser = common.make_parser(__doc__)
    parser.add_argument("--data", help="a folder of pictures; None: 40 JPEGs of noise")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder, "pictures"))
        argv = ["--data", options.data or f"{folder}/pictures", "--size", "toy"]
        argv += ["--batch-size", "8", "--steps", "2", "--workers", "0", "--out", f"{folder}/run"]
        entered = trace(argv)
    print("lines  code")
    for file, name, lines, code in entered:
        print(f"{lines:5} {code:5}  {file}  {name}")
    for file in dict.fromkeys(file for file, *_ in entered):
        mine = [row for row in entered if row[0] == file]
        print_sums(mine, f"{file}, {len(mine)} functions")
    print_sums([row for row in entered if row[0] in TOP], "in the top-level files")
    print_sums(entered, f"in all, {len(entered)} functions")


if __name__ == "__main__":
    main()
