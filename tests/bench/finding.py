"""The paper's finding, small: hashtags from scratch against hashtags after MAE, at equal samples.

    python tests/bench/finding.py --data DIR --labels FILE.jsonl --out OUT [--png curve.png]
    python tests/bench/finding.py --data toy --out OUT --epochs 0.3,1

For every seed: stage 1 once; then stage 2, for each length, from scratch and from stage 1; and with
--equal-flops from scratch for as long as costs the FLOPs of stage 1 and the shortest stage 2.
Each encoder is measured with closed-form probes on the class token, and with --finetune EPOCHS as a
whole, on DATA/val; with --transfer DIR by few-shot probes on other pictures. What is in OUT is not
run again, so that more can be asked for later.
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
from support import plan


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


def gflops(folder, kind):
    """What a run has spent on training: 3 x forward, of every sample."""
    with torch.device("meta"):
        model = kind(**torch.load(folder / "model.pt", weights_only=True)["config"])
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return 3 * plan.flops_per_image(model) * last["samples"] / 1e9


def one_seed(seed, lengths, arguments, results):
    out, log = Path(arguments.out), Path(arguments.out) / f"seed{seed}.log"
    toy = arguments.data == "toy"
    fresh = ["--size", arguments.size, "--patch-size", arguments.patch_size]
    fresh = [] if toy else [*fresh, "--image-size", arguments.image_size]
    common = ["--data", arguments.data, "--seed", seed, "--workers", 1]
    common += [] if toy else ["--batch-size", 256, "--min-crop", 1]

    def stage(name, script, *flags):
        if not (out / name / "model.pt").exists():
            run(script, *common, "--out", out / name, *flags, log=log)

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
            flags = ["--task", "classify", "--init", weights, "--out", out / f"finetuned-{name}"]
            flags += ["--epochs", arguments.finetune, "--pool", "cls", "--lr", 1e-3]
            flags += ["--mixup", 0, "--cutmix", 0, "--rand-augment", 0, "--erase", 0]
            top1 = run("finetune.py", *common, *flags, "--warmup", 0.1, log=log)
            found["finetuned"] = json.loads(top1)["top1"]
        if found:
            row |= {"gflops": spent, **found}
            with open(results, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)

    mae = f"mae-{seed}"
    length = [] if toy else ["--lr", 1.5e-3, "--epochs", arguments.mae_epochs]
    decoder = [] if toy else ["--decoder", arguments.decoder]
    stage(mae, "mae_pretrain.py", *fresh, *decoder, *length)
    spent = gflops(out / mae, models.MAE)
    measure(mae, "mae", 0, spent)

    def tags(start, epochs):
        name = f"weak-{seed}-{start}-{epochs}"
        labels = ["--labels", arguments.labels, "--tags", out / "tags", "--lr", arguments.lr]
        flags = [] if toy else labels
        flags += ["--init", out / mae / "model.pt"] if start == "mae" else fresh
        stage(name, "weak_pretrain.py", "--epochs", epochs, *flags)
        cost = gflops(out / name, models.Classifier)
        measure(name, start, epochs, cost + (spent if start == "mae" else 0))
        return cost

    for epochs in lengths:
        for start in ("scratch", "mae"):
            cost = tags(start, epochs)
    if arguments.equal_flops:
        tags("scratch", round(lengths[0] + epochs * spent / cost, 1))


def read(results):
    return (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a folder with train/ and val/, or toy")
    parser.add_argument("--labels", help="hashtags of DATA's pictures")
    parser.add_argument("--out", required=True)
    parser.add_argument("--size", default="128x6x2")
    parser.add_argument("--image-size", type=int, default=48)
    parser.add_argument("--patch-size", type=int, default=8)
    parser.add_argument("--decoder", default="64x1x2")
    parser.add_argument("--mae-epochs", type=float, default=10)
    parser.add_argument("--lr", type=float, default=4e-4, help="of stage 2, at batch 256 (4e-4)")
    parser.add_argument("--epochs", default="1,3,10", help="lengths of stage 2")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--equal-flops", action="store_true", help="from scratch, too")
    parser.add_argument("--finetune", type=float, help="epochs of finetuning")
    parser.add_argument("--transfer", help="another folder with train/ and val/")
    parser.add_argument("--jobs", type=int, default=2, help="commands at once, one thread each")
    parser.add_argument("--png", help="draw the curve (needs matplotlib)")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    if arguments.labels and not (out / "tags" / "vocabulary.json").exists():
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
