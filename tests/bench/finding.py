"""The paper's finding, small: hashtags from scratch against hashtags after MAE, at equal samples.

    python tests/bench/finding.py --data DIR --labels FILE.jsonl --out OUT [--png curve.png]

For every seed: stage 1 once; then stage 2, for each length, from scratch and from stage 1; and from
scratch as long as costs the FLOPs of stage 1 and the shortest stage 2 together. Each encoder is
measured with closed-form probes on the class token, on DATA/val. What is in OUT is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import torch

import model as models


def run(script, *flags, log):
    """One command, one thread; its last line on stdout."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=one_thread)
    with open(log, "a") as file:
        file.write(f"$ {' '.join(command[1:])}\n{done.stdout}{done.stderr}")
    if done.returncode:
        raise SystemExit(f"{script} failed: see {log}")
    return done.stdout.strip().splitlines()[-1]


def training_flops(path, kind):
    with torch.device("meta"):
        return 3 * models.flops_per_image(kind(**torch.load(path, weights_only=True)["config"]))


def one_seed(seed, lengths, arguments, results):
    out, trunk = Path(arguments.out), ["--image-size", 64]
    fresh = [*trunk, "--size", arguments.size, "--patch-size", arguments.patch_size]
    common = ["--data", arguments.data, "--seed", seed, "--workers", 1, "--batch-size", 256]
    common += ["--min-crop", 1]
    log = out / f"seed{seed}.log"

    def measure(name, start, epochs, flops):
        row = {"seed": seed, "start": start, "epochs": epochs, "gflops": flops / 1e9}
        probe = ["--task", "fewshot", "--pool", "cls", "--shots", "5,all", "--data", arguments.data]
        found = run("evaluate.py", *probe, "--checkpoint", out / name / "model.pt", log=log)
        row |= {shots: 100 * value for shots, value in json.loads(found)["top1"].items()}
        with open(results, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)

    def stage(name, script, *flags):
        if not (out / name / "model.pt").exists():
            run(script, *common, "--out", out / name, *flags, log=log)

    mae = f"mae-{seed}"
    decoder = ["--decoder", "96x2x3", "--lr", 1.5e-3, "--epochs", arguments.mae_epochs]
    stage(mae, "mae_pretrain.py", *fresh, *decoder)
    images = json.loads((out / mae / "metrics.jsonl").read_text().splitlines()[-1])["samples"]
    spent = images * training_flops(out / mae / "model.pt", models.MAE)
    known = {(r["seed"], r["start"], r["epochs"]) for r in read(results)}
    if (seed, "mae", 0) not in known:
        measure(mae, "mae", 0, spent)

    def tags(start, epochs):
        name = f"weak-{seed}-{start}-{epochs}"
        flags = ["--labels", arguments.labels, "--tags", out / "tags", "--lr", 1e-3]
        flags += [
            "--epochs",
            epochs,
            *(["--init", out / mae / "model.pt"] if start == "mae" else fresh),
        ]
        stage(name, "weak_pretrain.py", *flags)
        lines = (out / name / "metrics.jsonl").read_text().splitlines()
        cost = training_flops(out / name / "model.pt", models.Classifier)
        images = json.loads(lines[-1])["samples"]
        if (seed, start, epochs) not in known:
            measure(name, start, epochs, images * cost + (spent if start == "mae" else 0))
        return cost, images

    for epochs in lengths:
        for start in ("scratch", "mae"):
            cost, images = tags(start, epochs)
        if epochs == lengths[0]:  # as many FLOPs from scratch
            tags("scratch", round(epochs * (1 + spent / (cost * images)), 1))


def read(results):
    return (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )


def table(rows):
    print(
        "| start | epochs of hashtags | GFLOPs in all | ridge, all labels | 5-shot ridge | seeds |"
    )
    print("|---|---|---|---|---|---|")
    groups = {}
    for row in rows:
        groups.setdefault((row["start"], row["epochs"]), []).append(row)
    for (start, epochs), found in sorted(groups.items(), key=lambda item: (item[0][1], item[0][0])):
        cells = []
        for shots in ("all", "5"):
            values = [row[shots] for row in found]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.1f}{spread}")
        print(
            f"| {start} | {epochs:g} | {found[0]['gflops']:,.0f} | {' | '.join(cells)} | {len(found)} |"
        )
    return groups


def draw(groups, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    titles = (("all", "ridge on all labels"), ("5", "ridge on 5 images of each class"))
    for axis, (shots, title) in zip(axes, titles):
        for start, label in (("scratch", "hashtags from scratch"), ("mae", "MAE, then hashtags")):
            points = sorted(
                (e, [r[shots] for r in rows]) for (s, e), rows in groups.items() if s == start and e
            )
            x, y = [e for e, _ in points], [mean(v) for _, v in points]
            spread = [stdev(v) if len(v) > 1 else 0 for _, v in points]
            axis.errorbar(x, y, spread, marker="o", capsize=3, label=label)
        only = [r[shots] for r in groups.get(("mae", 0), [])]
        if only:
            axis.axhline(mean(only), linestyle="--", color="grey", label="MAE only")
        axis.set(xscale="log", title=title, xlabel="epochs of hashtags", ylabel="top-1, %")
        axis.set_xticks(x, [f"{e:g}" for e in x])
        axis.minorticks_off()
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a folder with train/ and val/")
    parser.add_argument("--labels", required=True, help="hashtags of DATA's pictures")
    parser.add_argument("--out", required=True)
    parser.add_argument("--size", default="192x6x3")
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--mae-epochs", type=float, default=20)
    parser.add_argument("--epochs", default="1,3,10", help="lengths of stage 2")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=2, help="commands at once, one thread each")
    parser.add_argument("--png", help="draw the curve (needs matplotlib)")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "tags" / "vocabulary.json").exists():
        index = ["--labels", arguments.labels, "--out", out / "tags"]
        print(run("data.py", "hashtags", arguments.data, *index, log=out / "tags.log"))
    lengths = [float(text) for text in arguments.epochs.split(",")]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = [
            pool.submit(one_seed, int(seed), lengths, arguments, out / "results.jsonl")
            for seed in arguments.seeds.split(",")
        ]
        [job.result() for job in jobs]
    groups = table(read(out / "results.jsonl"))
    if arguments.png:
        draw(groups, arguments.png)


if __name__ == "__main__":
    main()
