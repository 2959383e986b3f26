"""The paper's finding, small: hashtags from scratch against hashtags after MAE, at equal samples.

    python tests/bench/finding.py --data DIR --labels FILE.jsonl --out OUT [--png
    curve.png] python tests/bench/finding.py --data toy --out OUT --epochs 0.3,1

For every seed: stage 1 once; then stage 2, for each length, from scratch and from stage
1; and with --equal-flops from scratch for as long as costs the FLOPs of stage 1 and the
shortest stage 2. Each encoder is measured with closed-form probes on the class token,
and with --finetune EPOCHS as a whole, on DATA/val; with --transfer DIR by few-shot
probes on other pictures. What is in OUT is not run again, so that more can be added
later.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import common
import torch

from model import MAE, Classifier
from support.plan import flops_per_image


def run(script, *flags, log):
    """Run one command on one thread; return its last line on stdout."""
    command = [sys.executable, str(common.ROOT / script), *map(str, flags)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=one_thread)
    with open(log, "a") as file:
        file.write(f"$ {' '.join(command[1:])}\n{done.stdout}{done.stderr}")
    if done.returncode:
        raise SystemExit(f"{script} failed: see {log}")
    return done.stdout.strip().splitlines()[-1]


def gflops(folder, kind):
    """What a run has spent on training: 3 x forward, of every sample."""
    with torch.device("meta"):
        model = kind(**torch.load(folder / "model.pt", weights_only=True)["config"])
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return 3 * flops_per_image(model) * last["samples"] / 1e9


def one_seed(seed, lengths, arguments, results):
    out, log, toy = arguments.out, arguments.out / f"seed{seed}.log", arguments.data == "toy"
    fresh = ["--size", arguments.size, "--patch-size", arguments.patch_size]
    fresh = [] if toy else [*fresh, "--image-size", arguments.image_size]
    shared = ["--data", arguments.data, "--seed", seed, "--workers", 1]
    shared += [] if toy else ["--batch-size", 256, "--min-crop", 1]

    def stage(name, script, *flags):
        if not (out / name / "model.pt").exists():
            run(script, *shared, "--out", out / name, *flags, log=log)

    def probed(weights, data, shots):
        flags = ["--task", "fewshot", "--pool", "cls", "--shots", shots, "--data", data]
        return json.loads(run("evaluate.py", *flags, "--checkpoint", weights, log=log))["top1"]

    def measure(name, start, epochs, spent):
        row, weights = {"seed": seed, "start": start, "epochs": epochs}, out / name / "model.pt"
        known = {key for r in read(results) for key in r if row.items() <= r.items()}
        found = {}
        if "ridge" not in known:
            top1 = probed(weights, arguments.data, "5,all")
            found |= {"ridge": top1["all"], "5-shot": top1["5"]}
        if arguments.transfer and "transfer 1-shot" not in known:
            top1 = probed(weights, arguments.transfer, "1,5,10")
            found |= {f"transfer {shots}-shot": value for shots, value in top1.items()}
        if arguments.finetune and "finetuned" not in known:
            flags = f"--task classify --epochs {arguments.finetune} --pool cls --lr 1e-3 "
            flags += "--mixup 0 --cutmix 0 --rand-augment 0 --erase 0 --warmup 0.1"
            where = ["--init", weights, "--out", out / f"finetuned-{name}"]
            top1 = run("finetune.py", *shared, *where, *flags.split(), log=log)
            found["finetuned"] = json.loads(top1)["top1"]
        if found:
            row |= {"gflops": spent, **found}
            with open(results, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)

    mae = f"mae-{seed}"
    length = [] if toy else ["--lr", 1.5e-3, "--epochs", 10]
    decoder = [] if toy else ["--decoder", arguments.decoder]
    stage(mae, "mae_pretrain.py", *fresh, *decoder, *length)
    spent = gflops(out / mae, MAE)
    measure(mae, "mae", 0, spent)

    def tags(start, epochs):
        name = f"weak-{seed}-{start}-{epochs}"
        labels = ["--labels", arguments.labels, "--tags", out / "tags", "--lr", 4e-4]
        flags = [] if toy else labels
        flags += ["--init", out / mae / "model.pt"] if start == "mae" else fresh
        stage(name, "weak_pretrain.py", "--epochs", epochs, *flags)
        cost = gflops(out / name, Classifier)
        measure(name, start, epochs, cost + (spent if start == "mae" else 0))
        return cost

    for epochs in lengths:
        for start in ("scratch", "mae"):
            cost = tags(start, epochs)
    if arguments.equal_flops:
        tags("scratch", round(lengths[0] + epochs * spent / cost, 1))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows):
    """Print means and deviations over the seeds; return {(epochs, start): {column: [values]}}."""
    groups, columns = {}, []
    for row in rows:
        group = groups.setdefault((row["epochs"], row["start"]), {})
        for name, value in row.items():
            if name not in ("seed", "start", "epochs"):
                group.setdefault(name, []).append(value)
                columns += [name] if name not in (*columns, "gflops") else []
    print(f"| start | epochs of hashtags | TFLOPs in all | {' | '.join(columns)} |")
    print("|---|---|---|" + "---|" * len(columns))
    for (epochs, start), group in sorted(groups.items()):
        cells = [f"{start} | {epochs:g} | {group['gflops'][0] / 1e3:.1f}"]
        for values in (group.get(name, []) for name in columns):
            spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{100 * mean(values):.1f}{spread}" if values else "")
        print(f"| {' | '.join(cells)} |")
    return groups


def draw(groups, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    titles = {"ridge": "linear (ridge on all labels)", "5-shot": "5 images of each class"}
    for axis, (column, title) in zip(axes, titles.items()):
        for start, label in (("scratch", "hashtags from scratch"), ("mae", "MAE, then hashtags")):
            points = sorted((e, g[column]) for (e, s), g in groups.items() if s == start and e)
            x, y = [e for e, _ in points], [100 * mean(v) for _, v in points]
            spread = [100 * stdev(v) if len(v) > 1 else 0 for _, v in points]
            axis.errorbar(x, y, spread, marker="o", capsize=3, label=label)
        only = 100 * mean(groups[0, "mae"][column])
        axis.axhline(only, linestyle="--", color="grey", label="MAE only")
        axis.set(xscale="log", title=title, xlabel="epochs of hashtags", ylabel="top-1, %")
        axis.set_xticks(x, [f"{e:g}" for e in x])
        axis.minorticks_off()
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main():
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, help="a folder with train/ and val/, or toy")
    add("--labels", help="hashtags of DATA's pictures")
    add("--out", type=Path, required=True, help="folder of the runs and their results")
    add("--size", default="128x6x2", help="of the encoder; toy: the stages' own")
    add("--image-size", type=int, default=48, help="side")
    add("--patch-size", type=int, default=8, help="side")
    add("--decoder", default="64x1x2", help="of the MAE")
    add("--epochs", default="1,3,10", help="lengths of stage 2")
    add("--seeds", default="0,1,2", help="of all runs")
    add("--equal-flops", action="store_true", help="also from scratch for the FLOPs of both stages")
    add("--finetune", type=float, help="epochs of finetuning")
    add("--transfer", help="another folder with train/ and val/")
    add("--png", help="draw the curve (needs matplotlib)")
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if arguments.labels and not (out / "tags" / "vocabulary.json").exists():
        index = ["--labels", arguments.labels, "--out", out / "tags"]
        print(run("data.py", "hashtags", arguments.data, *index, log=out / "tags.log"))
    lengths = [float(text) for text in arguments.epochs.split(",")]
    with ThreadPoolExecutor(2) as pool:  # commands at once, one thread each
        one = lambda seed: one_seed(int(seed), lengths, arguments, out / "results.jsonl")
        list(pool.map(one, arguments.seeds.split(",")))
    groups = table(read(out / "results.jsonl"))
    if arguments.png:
        draw(groups, arguments.png)


if __name__ == "__main__":
    main()
