"""Stage 1 going on from pretrained weights on other pictures, beside a start from scratch.

    python tests/bench/going_on.py --init RUNS/mae-{seed}/model.pt --data caltech101/ --out OUT

For each seed, length and peak learning rate, stage 1 trains on DATA/train from the weights (of
that seed) and from initial ones. Measured are the loss on hidden patches of DATA/val and, on
frozen features, ridge regression with 1, 5 and all labels of each class; also before any training.

What stands in OUT/results.jsonl is not run again: a stopped run goes on with the same command.
"""

from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from common import Results, last_json, make_parser, run_program, side_by_side

from model import MAE

SHOTS = ("1", "5", "all")


def few_shots(arguments, checkpoint):
    """{shots: top-1} by ridge regression on the patch mean of frozen features."""
    flags = ["--pool", "mean", "--shots", ",".join(SHOTS), "--checkpoint", checkpoint]
    log = Path(arguments.out, "log")
    found = run_program(log, "evaluate.py --task fewshot", *flags, "--data", arguments.data)
    return last_json(found)["top1"]


def measure(arguments, results, seed, start, epochs, lr):
    """Train and measure one run, unless it has been. epochs 0: the start itself."""
    row = {"seed": seed, "start": start, "epochs": epochs, "lr": lr}
    if results.has(row):
        return
    weights, folder = arguments.init.format(seed=seed), Path(arguments.out, "-".join(row_name(row)))
    checkpoint = Path(weights)
    if epochs:
        flags = ["--data", arguments.data, "--epochs", epochs, "--lr", lr, "--seed", seed]
        flags += ["--batch-size", arguments.batch_size, "--min-crop", 0.4, "--workers", 0]
        shape = shape_of(weights) if start == "scratch" else ["--init", weights]
        run_program(folder.with_suffix(".log"), "mae_pretrain.py", *flags, *shape, "--out", folder)
        checkpoint = folder / "model.pt"
        last = last_json((folder / "metrics.jsonl").read_text())
        row["held-out loss"] = last["held_out_loss"]
    results.add(row | few_shots(arguments, checkpoint))


def row_name(row):
    return [row["start"], str(row["epochs"]), str(row["lr"]), str(row["seed"])]


def shape_of(weights):
    """The flags of an MAE of the same shape as these weights."""
    config = MAE(**torch.load(weights, weights_only=True)["config"]).config
    flags = ["--size", config["size"], "--patch-size", config["patch_size"]]
    flags += ["--decoder", "x".join(map(str, config["decoder"]))]
    return [*flags, "--image-size", "x".join(map(str, config["image_size"]))]


def table(rows):
    """Print a line for each start, length and rate: means and deviations over the seeds."""
    print(f"| start | epochs | peak lr | held-out loss | {' | '.join(SHOTS)} | seeds |")
    print("|---|---|---|---|---|---|---|---|")
    groups = {}
    for row in rows:
        groups.setdefault((row["start"], row["epochs"], row["lr"]), []).append(row)
    for key in sorted(groups, key=lambda key: (key[1], key[0], float(key[2]))):
        cells = [*map(str, key)]
        for name, factor, digits in [("held-out loss", 1, 3), *((s, 100, 1) for s in SHOTS)]:
            values = [factor * row[name] for row in groups[key] if name in row]
            cell = f"{mean(values):.{digits}f}" if values else ""
            cells.append(cell + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""))
        print(f"| {' | '.join([*cells, str(len(groups[key]))])} |")


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--init", required=True, help="stage 1's weights; {seed} is filled in")
    parser.add_argument("--data", required=True, help="a folder with train/ and val/")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--epochs", default="10,50", help="lengths")
    parser.add_argument("--rates", default="1.5e-4,5e-4,1.5e-3", help="peaks")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    arguments = parser.parse_args()
    settings = {"data": Path(arguments.data).name, "batch_size": arguments.batch_size}
    results = Results(arguments.out, init=Path(arguments.init).parent.name, **settings)
    seeds, lengths = ([*map(int, text.split(","))] for text in (arguments.seeds, arguments.epochs))
    runs = [(seed, "weights", 0, "0") for seed in seeds]
    for seed in seeds:
        for epochs in lengths:
            for lr in arguments.rates.split(","):
                runs += [(seed, start, epochs, lr) for start in ("weights", "scratch")]
    side_by_side(arguments.jobs, [partial(measure, arguments, results, *run) for run in runs])
    table(results.rows())


if __name__ == "__main__":
    main()
