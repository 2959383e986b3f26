"""MAE with more weights and more pictures: three sizes by three shares of EuroSAT's pictures.

    python tests/bench/scaling.py --data eurosat/ --out OUT --png docs/scaling.png

For every seed, each size is trained by stage 1, with one lr, on a tenth, a third and all of
DATA/train. All see the same number of samples, so of fewer pictures each comes more often.
Measured are the loss on hidden patches of DATA/val, and transfer as in finding.py, whose labels
are the same for all.

What stands in OUT/results.jsonl is not run again: a stopped run goes on with the same command.
"""

from functools import partial
from pathlib import Path
from statistics import mean, stdev

from common import Results, last_json, make_parser, side_by_side
from finding import RECIPES, Experiment, copy_few

SIZES = ("64x4x2", "96x4x3", "160x6x5")
SHARES = (0.1, 1 / 3, 1)
SAMPLES = 54_000  # three epochs of all
# Stage 1's flags of finding.py, but for the size and the length.
MAE = "--patch-size 8 --image-size 64 --decoder 64x1x2 --min-crop 0.4 --batch-size 128 --lr 1.5e-3"
MEASURES = {"held-out loss": 1, "5-shot": 100, "ridge": 100, "FT": 100}  # and their factors


def measure(experiment, size, share):
    """Train and measure one network, unless it has been."""
    row = {"seed": experiment.seed, "size": size, "share": round(share, 2)}
    if experiment.results.has(row):
        return
    flags = f"{MAE} --size {size} --samples {SAMPLES}".split()
    folder = experiment.stage(
        f"mae-{size}-{share:.2f}",
        "mae_pretrain.py",
        flags + ["--val-data", Path(experiment.data, "val")],
        data=share_of(experiment.data, experiment.out, share) / "train",
    )
    last = last_json((folder / "metrics.jsonl").read_text())
    row["held-out loss"] = last["held_out_loss"]
    experiment.results.add(row | experiment.transfer(folder))


def share_of(data, out, share):
    """The folder with a share of the training pictures of each class."""
    return Path(data) if share == 1 else out / f"share-{share:.2f}"


def groups(rows):
    """{(size, share): {measure: [values]}}, in the order of SIZES and SHARES."""
    found = {(size, round(share, 2)): {} for size in SIZES for share in SHARES}
    for row in rows:
        for name, factor in MEASURES.items():
            group = found[row["size"], row["share"]]
            group.setdefault(name, []).append(factor * row[name])
    return {key: group for key, group in found.items() if group}


def spread(values):
    return stdev(values) if len(values) > 1 else 0.0


def table(found):
    print(f"| size | share of the pictures | {' | '.join(MEASURES)} | seeds |")
    print("|---|---|" + "---|" * (len(MEASURES) + 1))
    for (size, share), group in found.items():
        cells = [size, f"{share:.0%}"]
        for name, factor in MEASURES.items():
            digits = 3 if factor == 1 else 1
            values = group[name]
            deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.{digits}f}{deviation}")
        print(f"| {' | '.join([*cells, str(len(group['FT']))])} |")


def draw(found, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(MEASURES), figsize=(14, 3.6), layout="constrained")
    for axis, name in zip(axes, MEASURES):
        for size in SIZES:
            points = {share: group[name] for (s, share), group in found.items() if s == size}
            heights = [*map(mean, points.values())]
            axis.errorbar(
                [*points],
                heights,
                [*map(spread, points.values())],
                marker="o",
                capsize=3,
                label=size,
            )
        axis.set(xscale="log", title=name, xlabel="share of the training pictures")
        axis.set_xticks([round(s, 2) for s in SHARES], ["a tenth", "a third", "all"])
        axis.minorticks_off()
    axes[0].set_ylabel("loss on hidden patches")
    axes[1].set_ylabel("top-1, %")
    axes[0].legend()
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--data", required=True, help="EuroSAT's folder with train/ and val/")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--png", help="draw the curves (needs matplotlib)")
    arguments = parser.parse_args()
    arguments.labels, out = None, Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES["eurosat"]
    copy_few(arguments.data, out / "few", recipe.labels)
    for share in SHARES[:-1]:
        copy_few(arguments.data, share_of(arguments.data, out, share), share)
    side_by_side(
        arguments.jobs,
        [
            partial(measure, Experiment(int(seed), recipe, arguments), size, share)
            for seed in arguments.seeds.split(",")
            for size in SIZES
            for share in SHARES
        ],
    )
    found = groups(Results(out).rows())
    table(found)
    if arguments.png:
        draw(found, arguments.png)


if __name__ == "__main__":
    main()
