"""The paper's finding, small: hashtags from scratch against hashtags after MAE.

    python tests/bench/finding.py --out OUT                                     # toy world
    python tests/bench/finding.py --out OUT --data DIR --labels FILE.jsonl    # EuroSAT

For every seed: stage 1 once; then stage 2 from scratch and from stage 1's weights, for each number
of steps. On EuroSAT, one more length costs, from scratch, the FLOPs of stage 1 and one epoch.
Every encoder is measured on DATA/val: by ridge regression on 5 and on many labels of each class,
and by finetuning every weight (FT). Both arms have the same recipe, see RECIPES.

What stands in OUT/results.jsonl is not run again: a stopped run goes on with the same command.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from common import Results, last_json, make_parser, run_program, side_by_side

from model import MAE, Classifier
from support.plan import flops_per_image


@dataclass
class Recipe:
    mae: str  # flags of stage 1
    weak: str  # flags of stage 2, in both arms
    scratch: str  # the network's shape, where it does not come from stage 1
    batch_size: int  # of stage 2
    lengths: list  # of stage 2, in steps
    equal: int | None  # the length whose FLOPs, with stage 1's, one more run from scratch gets
    shots: int  # labels of each class for the larger ridge regression
    finetune: str
    labels: int | None  # of each class to finetune on; None: all


NO_AUGMENTATION = "--mixup 0 --cutmix 0 --rand-augment 0 --erase 0 --smoothing 0.1"
RECIPES = {
    "toy": Recipe(
        mae="",
        weak="",
        scratch="",
        batch_size=64,
        lengths=[100, 400],
        equal=None,
        shots=400,
        finetune="--steps 100",
        labels=None,
    ),
    "eurosat": Recipe(
        mae="--size 96x4x3 --patch-size 8 --image-size 64 --decoder 64x1x2 --min-crop 0.4"
        " --batch-size 128 --lr 1.5e-3 --epochs 10",
        weak="--batch-size 64 --lr 1e-3 --min-crop 1 --pool mean",
        scratch="--size 96x4x3 --patch-size 8 --image-size 64",
        batch_size=64,
        lengths=[70, 280],
        equal=280,
        shots=200,
        finetune="--steps 100 --batch-size 64 --lr 1e-3 --layer-decay 0.75 --min-crop 1"
        f" --warmup 0.1 {NO_AUGMENTATION}",
        labels=100,
    ),
}


class Experiment:
    """One seed: its runs are folders of `out`, its measurements rows of the results."""

    def __init__(self, seed, recipe, arguments):
        self.seed, self.recipe, self.data = seed, recipe, arguments.data
        self.out, self.labels = Path(arguments.out), arguments.labels
        self.results = Results(self.out, data=Path(self.data).name, **asdict(recipe))
        self.log = self.out / f"seed{seed}.log"

    def stage(self, name, program, flags, data=None):
        """Train `name`, unless it is there. Returns its folder."""
        folder = self.out / f"{name}-{self.seed}"
        if not (folder / "model.pt").exists():
            common = ["--data", data or self.data, "--seed", self.seed, "--workers", 0]
            run_program(self.log, program, *common, "--out", folder, *flags)
        return folder

    def transfer(self, folder):
        """Top-1 by ridge regression on 5 and on many labels of each class, and finetuned (FT)."""
        weights, few = folder / "model.pt", self.out / "few" if self.recipe.labels else self.data
        probe = ["--pool", "mean", "--shots", f"5,{self.recipe.shots}", "--checkpoint", weights]
        found = run_program(self.log, "evaluate.py --task fewshot", *probe, "--data", self.data)
        flags = ["--init", weights, "--data", few, "--seed", self.seed, "--workers", 0]
        flags += [*self.recipe.finetune.split(), "--out", self.out / f"finetuned-{folder.name}"]
        finetuned = run_program(self.log, "finetune.py --task classify", *flags)
        top1 = last_json(found)["top1"]
        top1 = {"5-shot": top1["5"], "ridge": top1[str(self.recipe.shots)]}
        return top1 | {"FT": last_json(finetuned)["top1"]}

    def measure(self, start, steps, folder, spent):
        """Measure an encoder, unless it has been."""
        row = {"seed": self.seed, "start": start, "steps": steps}
        if self.results.has(row):
            return
        row |= self.transfer(folder)
        last = last_json((folder / "metrics.jsonl").read_text())
        row |= {"tag loss": last["held_out_loss"]} if start != "mae only" else {}
        self.results.add(row | {"gflops": spent})

    def main(self):
        mae = self.stage("mae", "mae_pretrain.py", self.recipe.mae.split())
        spent = gflops(mae, MAE)
        self.measure("mae only", 0, mae, spent)
        for steps in self.recipe.lengths:
            for start in ("scratch", "mae"):
                cost = self.hashtags(start, steps, mae, spent)
            if steps == self.recipe.equal:
                equal = round(steps * (1 + spent / cost))
        for start in ("scratch", "mae") if self.recipe.equal else ():
            self.hashtags(start, equal, mae, spent)

    def hashtags(self, start, steps, mae, spent):
        """Train and measure one arm of stage 2. Returns the GFLOPs of its training."""
        flags = [*self.recipe.weak.split(), "--steps", steps]
        if self.data != "toy":
            flags += ["--labels", self.labels, "--tags", self.out / "tags"]
        shape = self.recipe.scratch.split()
        flags += ["--init", mae / "model.pt"] if start == "mae" else shape
        folder = self.stage(f"weak-{start}-{steps}", "weak_pretrain.py", flags)
        cost = gflops(folder, Classifier)
        self.measure(start, steps, folder, cost + (spent if start == "mae" else 0))
        return cost


def gflops(folder, kind):
    """What a run has spent on training: 3 x forward, of every sample."""
    config = torch.load(folder / "model.pt", weights_only=True)["config"]
    with torch.device("meta"):
        model = kind(**config)
    last = last_json((folder / "metrics.jsonl").read_text())
    return 3 * flops_per_image(model) * last["samples"] / 1e9


def copy_few(data, few, labels):
    """Copy the first `labels` pictures of each class of data/train to few/train, and all of val.

    labels: a number, or a share below 1.
    """
    if few.exists():
        return
    part = few.with_name(f"{few.name}.part")  # renamed once it is whole
    shutil.rmtree(part, ignore_errors=True)
    for folder in sorted(Path(data, "train").iterdir()):
        target, files = part / "train" / folder.name, sorted(folder.iterdir())
        target.mkdir(parents=True)
        for path in files[: labels if labels >= 1 else round(labels * len(files))]:
            shutil.copy(path, target)
    shutil.copytree(Path(data, "val"), part / "val")
    part.rename(few)


def table(rows):
    """Print means and deviations over the seeds. Returns {(steps, start): {column: [values]}}."""
    groups = {}
    for row in rows:
        group = groups.setdefault((row["steps"], row["start"]), {})
        for name, value in row.items():
            group.setdefault(name, []).append(value)
    columns = "start", "steps of hashtags", "TFLOPs in all", "5-shot", "ridge", "FT"
    print(f"| {' | '.join([*columns, 'held-out tag loss', 'seeds'])} |")
    print("|---" * (len(columns) + 2) + "|")
    for (steps, start), group in sorted(groups.items(), key=lambda item: item[0]):
        cells = [start, str(steps), f"{mean(group['gflops']) / 1e3:.1f}"]
        for name in ("5-shot", "ridge", "FT"):
            values = [100 * value for value in group[name]]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.1f}{spread}")
        loss = group.get("tag loss")
        cells += [f"{mean(loss):.3f}" if loss else "", str(len(group["seed"]))]
        print(f"| {' | '.join(cells)} |")
    return groups


def draw(groups, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    titles = {"5-shot": "ridge, 5 labels a class", "ridge": "ridge, many labels", "FT": "finetuned"}
    for axis, (column, title) in zip(axes, titles.items()):
        for start, label in (("scratch", "hashtags from scratch"), ("mae", "MAE, then hashtags")):
            points = sorted((n, g[column]) for (n, s), g in groups.items() if s == start)
            x, y = [n for n, _ in points], [100 * mean(v) for _, v in points]
            spread = [100 * stdev(v) if len(v) > 1 else 0 for _, v in points]
            axis.errorbar(x, y, spread, marker="o", capsize=3, label=label)
        only = 100 * mean(groups[0, "mae only"][column])
        axis.axhline(only, linestyle="--", color="grey", label="MAE only")
        axis.set(xscale="log", title=title, xlabel="steps of hashtags", ylabel="top-1, %")
        axis.set_xticks(x, [str(n) for n in x])
        axis.minorticks_off()
    axes[0].legend()
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--data", default="toy", help="a folder with train/ and val/, or toy")
    parser.add_argument("--labels", help="hashtags of DATA's pictures")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at once, one thread each")
    parser.add_argument("--png", help="draw the curve (needs matplotlib)")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES["toy" if arguments.data == "toy" else "eurosat"]
    seeds = [Experiment(int(s), recipe, arguments) for s in arguments.seeds.split(",")]
    if arguments.data != "toy":
        copy_few(arguments.data, out / "few", recipe.labels)
        if not (out / "tags" / "vocabulary.json").exists():
            index = ["--labels", arguments.labels, "--out", out / "tags"]
            print(run_program(out / "tags.log", "data.py hashtags", arguments.data, *index))
    side_by_side(arguments.jobs, [seed.main for seed in seeds])
    groups = table(Results(out).rows())
    if arguments.png:
        draw(groups, arguments.png)


if __name__ == "__main__":
    main()
