"""evaluate.py --task curves: what is drawn of which runs, and what is refused."""

import json
import shlex

from conftest import TINY, completed, stage
from PIL import Image

# Draws, and writes what the figure holds beside it.
SPY = """
import json, sys
from matplotlib.figure import Figure

plain = Figure.savefig

def savefig(figure, path, **options):
    plain(figure, path, **options)
    (legend,) = figure.legends
    panels = {axes.get_title(): {
        "lines": [line.get_xydata().tolist() for line in axes.lines],
        "colours": [f"{line.get_color()} {line.get_linestyle()}" for line in axes.lines],
        "scales": [axes.get_xscale(), axes.get_yscale()],
    } for axes in figure.axes}
    names = [text.get_text() for text in legend.get_texts()]
    with open(f"{path}.json", "w") as file:
        json.dump({"names": names, "panels": panels}, file)

Figure.savefig = savefig
import evaluate
evaluate.main(sys.argv[1:])
"""


def write_log(folder, lines, **more):
    """The folder of a run whose metrics.jsonl has these lines: dicts, or texts as they are."""
    folder.mkdir(parents=True)
    texts = [line if isinstance(line, str) else json.dumps(line | more) for line in lines]
    (folder / "metrics.jsonl").write_text("\n".join(texts) + "\n")
    return folder


def steps(loss, count=4, **more):
    """Lines of a run of 32 samples a step, whose loss falls from this one."""
    lines = [{"step": n, "samples": 32 * n, "loss": loss / n, **more} for n in range(1, count + 1)]
    return [{**line, "lr": 0.1, "grad_norm": 2.0, "images_per_second": 90.0} for line in lines]


def drawn(tmp_path, *runs):
    """What the figure of these runs holds, and what was printed."""
    out = tmp_path / "figure.png"
    flags = ["--task", "curves", *runs, "--out", out]
    ran = completed(*flags, program="evaluate.py", code=SPY)
    Image.open(out).verify()
    assert json.loads(ran.stdout.splitlines()[-1])["out"] == str(out)
    return json.loads((tmp_path / "figure.png.json").read_text()), ran.stdout


def refused(*flags, **options):
    """The one line with which --task curves refuses these flags, with exit status 2."""
    ran = stage("--task", "curves", *flags, program="evaluate.py", **options)
    assert ran.returncode == 2 and not ran.stdout
    (line,) = ran.stderr.splitlines()
    return line


USUAL = ["loss", "learning rate", "gradient norm", "images/s"]


def test_a_panel_has_what_each_run_logged_and_a_panel_without_values_is_left_out(tmp_path):
    saved = {"held_out_loss": 0.5, "probe_few_shot": 0.4, "hit_1": None}
    mae, weak = steps(1.0), steps(2.0)
    mae[1] |= saved
    mae[3] |= saved | {"held_out_loss": 0.25}
    runs = [write_log(tmp_path / name, log) for name, log in (("mae", mae), ("weak", weak))]
    figure, _ = drawn(tmp_path, *runs)
    assert figure["names"] == ["mae", "weak"]
    held_out, few_shot = "loss on held-out pictures", "probe: few-shot top-1"
    assert sorted(figure["panels"]) == sorted([*USUAL, held_out, few_shot])
    lines = {title: panel["lines"] for title, panel in figure["panels"].items()}
    assert lines["loss"][0] == [[32, 1], [64, 1 / 2], [96, 1 / 3], [128, 1 / 4]]
    assert lines["loss"][1] == [[32, 2], [64, 1], [96, 2 / 3], [128, 1 / 2]]
    assert lines[held_out] == [[[64, 0.5], [128, 0.25]], []]
    assert lines[few_shot] == [[[64, 0.4], [128, 0.4]], []]


def test_axes_are_logarithmic_where_a_run_would_be_a_flat_line(tmp_path):
    one = write_log(tmp_path / "one", steps(0.5))
    near, far = write_log(tmp_path / "near", steps(2.0)), write_log(tmp_path / "far", steps(9.0))
    long = write_log(tmp_path / "long", steps(0.5, count=100))
    scales = []
    for other in (near, far, long):
        panels = drawn(tmp_path, one, other)[0]["panels"]
        assert panels["gradient norm"]["scales"][1] == "log"  # it has spikes
        assert panels["learning rate"]["scales"][1] == "linear"
        scales.append(panels["loss"]["scales"])
        (tmp_path / "figure.png").unlink()
    # Medians 0.5 and 2, 0.5 and 9; and 128 samples beside 3,200, whose loss ends far lower.
    assert scales == [["linear", "linear"], ["linear", "log"], ["log", "log"]]


def test_runs_of_the_same_name_and_many_runs_can_be_told_apart(tmp_path):
    runs = [write_log(tmp_path / str(n) / "run", steps(1 + n / 10)) for n in range(12)]
    figure, _ = drawn(tmp_path, *runs)
    assert figure["names"] == [str(run) for run in runs]
    assert len(set(figure["panels"]["loss"]["colours"])) == 12


def test_damaged_lines_are_counted_and_left_out(tmp_path):
    lines = [*steps(1.0, count=2), '{"step": 3, "sam', "[1]", '{"step": 4}', "\0\0"]
    run = write_log(tmp_path / "run", lines)
    figure, printed = drawn(tmp_path, run)
    assert figure["panels"]["loss"]["lines"] == [[[32, 1], [64, 0.5]]]
    assert f"{run}/metrics.jsonl: 4 of 6 lines are damaged and left out\n" in printed


def test_what_is_wrong_is_one_line_and_nothing_is_written(tmp_path):
    good = write_log(tmp_path / "good", steps(1.0))
    (tmp_path / "bare").mkdir()
    empty, cut = write_log(tmp_path / "empty", []), write_log(tmp_path / "cut", ['{"step": 1, "s'])
    out = tmp_path / "new.png"
    for run, words in {
        tmp_path / "none": "none is no folder: give the --out of a run",
        good / "metrics.jsonl": "metrics.jsonl is no folder",
        tmp_path / "bare": "bare holds no metrics.jsonl",
        empty: "holds no whole line",
        cut: "holds no whole line",
    }.items():
        assert words in refused(good, run, "--out", out)
    for flags, words in {
        (good, "--out", tmp_path / "new.jpg"): "new.jpg is no .png",
        (good, "--out", tmp_path / "no" / "new.png"): "there is no such folder",
        ("--out", out): "required: RUN",
        (good, "--out", out, "--data", "toy"): "--data is for --task",
    }.items():
        assert words in refused(*flags)
    assert "on one process" in refused(good, "--out", out, processes=2)
    without = "import sys; sys.modules['matplotlib'] = None; import evaluate; evaluate.main()"
    assert "pip install matplotlib" in refused(good, "--out", out, code=without)
    assert not out.exists()


def test_a_run_prints_the_command_that_draws_it(tmp_path):
    ran = completed(*TINY, "--out", tmp_path / "a run", "--steps", 4)
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("curves: ")]
    program, *flags = shlex.split(line.removeprefix("curves: python "))
    completed(*flags, program=program)
    Image.open(tmp_path / "a run" / "curves.png").verify()
