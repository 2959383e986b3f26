"""Which peak learning rate is best at which batch size, for each stage and data.

    python tests/bench/learning_rates.py --out OUT --data toy
    python tests/bench/learning_rates.py --out OUT --data eurosat/ --labels eurosat_hashtags.jsonl

Every run of a stage sees the same number of samples, so a larger batch has fewer steps. Stages 2
and 3 start from one encoder of stage 1. What stands in OUT/results.jsonl is not run again: a
stopped sweep goes on with the same command.
"""

import json
from functools import partial
from pathlib import Path

from common import Results, last_json, make_parser, run_program, side_by_side

NO_AUGMENTATION = "--mixup 0 --cutmix 0 --rand-augment 0 --erase 0 --min-crop 1"
# stage: program; flags for pictures and for the toy world; samples for them; the result's name
STAGES = {
    1: (
        "mae_pretrain.py",
        "--image-size 64 --decoder 64x1x2 --min-crop 0.4",
        "--image-size 32 --decoder 128x2x4 --mask-ratio 0.5 --min-crop 1",
        36_000,
        40_000,
    ),
    2: ("weak_pretrain.py", "--min-crop 1 --pool mean", "--min-crop 1 --pool mean", 18_000, 25_600),
    3: ("finetune.py --task classify", NO_AUGMENTATION, "", 18_000, 25_600),
}
RESULTS = {1: "held_out_loss", 2: "held_out_loss", 3: "top1"}


def train(arguments, name, stage, batch_size, lr):
    """One training run in one thread. Returns its last metrics and its folder."""
    program, pictures, toy, *samples = STAGES[stage]
    is_toy = arguments.data == "toy"
    folder = Path(arguments.out, name)
    flags = ["--data", arguments.data, "--workers", 0, "--seed", arguments.seed, "--out", folder]
    flags += ["--batch-size", batch_size, "--samples", samples[is_toy]]
    flags += [] if lr == "default" else ["--lr", lr]
    flags += (toy if is_toy else pictures).split()
    if stage > 1:
        flags += ["--init", Path(arguments.out, "start", "model.pt")]
    else:
        flags += ["--patch-size", 8, "--size", arguments.size]
    if stage == 2 and not is_toy:
        flags += ["--labels", arguments.labels, "--tags", Path(arguments.out, "tags")]
    run_program(Path(arguments.out, "log"), program, *flags)
    return last_json((folder / "metrics.jsonl").read_text()), folder


def measure(arguments, results, stage, batch_size, lr):
    """Train, and add a row to the results, unless it is there."""
    row = {"stage": stage, "batch_size": batch_size, "lr": lr}
    if results.has(row):
        return
    try:
        metrics, folder = train(arguments, f"{stage}-{batch_size}-{lr}", stage, batch_size, lr)
    except SystemExit as error:
        if "not finite" not in str(error):
            raise
        return results.add(row | {"diverged": True})
    row["peak"] = json.loads((folder / "config.json").read_text())["lr"]
    row[RESULTS[stage]] = metrics[RESULTS[stage]]
    if stage == 1 and arguments.data != "toy":  # its epoch of train has 65,536 pictures
        flags = ["--pool", "mean", "--shots", 5, "--data", arguments.data]
        flags += ["--checkpoint", folder / "model.pt"]
        found = run_program(Path(arguments.out, "log"), "evaluate.py --task fewshot", *flags)
        row["5-shot"] = last_json(found)["top1"]["5"]
    results.add(row)


def table(rows):
    """Print, for each stage and batch size, the result at each learning rate."""
    rates = {row["lr"] for row in rows}
    rates = sorted(rates - {"default"}, key=float) + sorted(rates & {"default"})
    print(f"| stage | batch | {' | '.join(rates)} |")
    print("|---|---|" + "---|" * len(rates))
    found = {(row["stage"], row["batch_size"], row["lr"]): row for row in rows}
    for stage, batch_size in sorted({key[:2] for key in found}):
        cells = []
        for rate in rates:
            row = found.get((stage, batch_size, rate), {})
            cell = "diverged" if "diverged" in row else ""
            if (value := row.get(RESULTS[stage])) is not None:
                cell = f"{100 * value:.1f}" if stage == 3 else f"{value:.3f}"
                cell += f" ({100 * row['5-shot']:.1f})" if "5-shot" in row else ""
                cell += f" at {row['peak']:.1e}" if rate == "default" else ""
            cells.append(cell)
        print(f"| {stage} | {batch_size} | {' | '.join(cells)} |")


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--data", default="toy", help="a folder with train/ and val/, or toy")
    parser.add_argument("--labels", help="hashtags of DATA's pictures")
    parser.add_argument("--out", required=True)
    parser.add_argument("--size", default="96x4x3", help="of the network: WIDTHxLAYERSxHEADS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default="1,2,3", help="of 1, 2 and 3")
    parser.add_argument("--batch-sizes", default="32,128,512")
    parser.add_argument("--rates", default="3e-4,1e-3,3e-3,default", help="peaks")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    settings = {"data": Path(arguments.data).name, "size": arguments.size, "seed": arguments.seed}
    results = Results(out, **settings)
    if not (out / "start" / "model.pt").exists():
        train(arguments, "start", 1, 128, "1e-3")
    if arguments.data != "toy" and not (out / "tags" / "vocabulary.json").exists():
        index = ["--labels", arguments.labels, "--out", out / "tags"]
        run_program(out / "log", "data.py hashtags", arguments.data, *index)
    stages, batch_sizes, rates = (
        text.split(",") for text in (arguments.stages, arguments.batch_sizes, arguments.rates)
    )
    side_by_side(
        arguments.jobs,
        [
            partial(measure, arguments, results, int(stage), int(batch_size), rate)
            for rate in rates
            for stage in stages
            for batch_size in batch_sizes
        ],
    )
    table(results.rows())


if __name__ == "__main__":
    main()
