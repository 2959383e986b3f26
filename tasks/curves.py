"""evaluate.py --task curves: what runs logged, drawn over the samples that they have seen.

python evaluate.py --task curves runs/mae runs/weak --out curves.png
"""

import json
import statistics
from collections import Counter
from pathlib import Path

from support.flags import png

# {name in metrics.jsonl: title}, a panel each
PANELS = {
    "loss": "loss",
    "held_out_loss": "loss on held-out pictures",
    "probe_few_shot": "probe: few-shot top-1",
    "probe_knn": "probe: nearest neighbours' top-1",
    "hit_1": "first tag on held-out pictures",
    "top1": "top-1 on val",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "images_per_second": "images/s",
}
COLUMNS = 3


def add_flags(parser):
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder, a run's --out")
    parser.add_argument("--out", type=png, default="curves.png", help="a .png (curves.png)")


def draw_curves(runs, out):
    """Write a PNG of the metrics of runs. Returns {"runs": their number, "out": path}.

    runs: folders (Paths). Raises ValueError if one has no metrics, or matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--task curves needs a package: pip install matplotlib") from None
    logs = [read_metrics(run) for run in runs]
    logged = {name for log in logs for line in log for name in line if line[name] is not None}
    panels = [name for name in PANELS if name in logged]
    rows, legend_rows = -(-len(panels) // COLUMNS), -(-len(runs) // COLUMNS)
    size = 5 * COLUMNS, 3.2 * rows + 0.25 * legend_rows
    figure = Figure(figsize=size, layout="constrained")
    for number, name in enumerate(panels, start=1):
        first = figure.axes[0] if figure.axes else None
        draw_panel(figure.add_subplot(rows, COLUMNS, number, sharex=first), name, logs)
    if far_apart([log[-1]["samples"] for log in logs]):
        figure.axes[0].set_xscale("log")  # of all panels
    lines, where = figure.axes[0].lines, {"loc": "outside upper left", "ncols": COLUMNS}
    figure.legend(lines, labels(runs), frameon=False, **where)
    replaced = " (replaced)" if Path(out).exists() else ""
    figure.savefig(out, dpi=110)
    print(f"wrote {out}{replaced}")
    return {"runs": len(runs), "out": out}


def read_metrics(run):
    """The lines of metrics.jsonl in the folder of a run, as dicts. Prints how many are damaged.

    No step is in it twice: a run that goes on removes the later ones, see begin_run in
    support/checkpoints.py. Raises ValueError if there is no whole line.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        what = "holds no metrics.jsonl" if run.is_dir() else "is no folder"
        raise ValueError(f"{run} {what}: give the --out of a run")
    lines = path.read_text(errors="replace").splitlines()
    log = [entry for entry in map(entry_of, lines) if entry]
    if not log:
        raise ValueError(f"{path} holds no whole line: the run has not logged a step yet")
    if len(log) < len(lines):
        print(f"{path}: {len(lines) - len(log)} of {len(lines)} lines are damaged and left out")
    return log


def entry_of(line):
    """A line of metrics.jsonl as a dict; None if it is damaged. A kill may cut the last one."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and {"samples", "loss"} <= entry.keys() else None


def labels(runs):
    """Names of the runs' folders; whole paths where two folders have the same name."""
    names = [run.resolve().name for run in runs]
    count = Counter(names)
    return [name if count[name] == 1 else str(run) for name, run in zip(names, runs)]


def draw_panel(axes, name, logs):
    """Draw the metric of this name of all runs into matplotlib axes, a line for each run."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    medians = []
    for number, log in enumerate(logs):
        points = [(line["samples"], line[name]) for line in log if line.get(name) is not None]
        few = "." if len(points) <= 30 else None  # a single value is no line
        style = ("-", "--", ":", "-.")[number // 10 % 4]  # there are ten colours
        axes.plot(*zip(*points) if points else ((), ()), style, marker=few, linewidth=1.2)
        if positive := [value for _, value in points if value > 0]:
            medians.append(statistics.median(positive))
    axes.set(title=PANELS[name], xlabel="samples")
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 5G, not 5000000000
    if far_apart(medians) or (medians and name == "grad_norm"):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(bottom=max(low, min(medians) / 100))  # the lr ends near 0
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")  # 0.5, not 5 x 10^-1
        axes.yaxis.set_minor_formatter(NullFormatter())


def far_apart(values):
    """True if on a linear axis the lowest of these numbers would be near 0."""
    return bool(values) and max(values) > 8 * min(values)
