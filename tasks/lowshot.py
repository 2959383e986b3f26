"""A few labelled pictures of each class: visual prompts (VPT) and logistic regression."""

import argparse
import copy
import json
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from support import flags
from support.labels import all_labels
from support.plan import flops_per_image


def shot_list(text):
    """An argparse type: "1,5,all" -> ["1", "5", "all"]."""
    items = text.split(",")
    if not all(item == "all" or (item.isdigit() and int(item) > 0) for item in items):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers and 'all'")
    return items


def few_shot_split(labels, shots, seed):
    """Indices of `shots` random samples of each class, or of all if it has fewer; seed decides."""
    shuffled = torch.from_numpy(data.permutation(len(labels), seed, 0, 0, data.SPLIT))
    return torch.cat([shuffled[labels[shuffled] == c][:shots] for c in labels.unique()])


LOWSHOT_RATES = (1e-3, 4e-3, 1.6e-2)  # of AdamW (our choice: the paper's optimizer is unknown)
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # L2 of logistic regression (our choice)
SEEDS = range(5)  # draws of the low-shot pictures (paper, section 4.4)


class Prompted(nn.Module):
    """VPT, deep: every block of a frozen encoder gets fresh prompts beside its tokens.

    8 prompts of width 192 for each layer (recalled of the paper), brought to the encoder's width by
    one linear map (VPT's code: uniform prompts, bound sqrt(6 / (3 P^2 + d))); a linear head on what
    is pooled. Only these are trained.
    """

    PROMPTS, PROMPT_WIDTH = 8, 192

    def __init__(self, trunk, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shape = trunk.layers, self.PROMPTS, self.PROMPT_WIDTH
        bound = math.sqrt(6 / (3 * trunk.patch_size**2 + self.PROMPT_WIDTH))
        self.prompts = nn.Parameter((2 * torch.rand(shape, generator=generator) - 1) * bound)
        bound = math.sqrt(6 / (self.PROMPT_WIDTH + trunk.width))
        weight = (2 * torch.rand(trunk.width, shape[2], generator=generator) - 1) * bound
        self.project = nn.Linear(self.PROMPT_WIDTH, trunk.width)
        self.head = nn.Linear(trunk.width, trunk.classes)
        with torch.no_grad():
            self.project.weight.copy_(weight)
            for zero in (self.project.bias, self.head.weight, self.head.bias):
                zero.zero_()
        self.trunk = trunk.requires_grad_(False)

    def forward(self, images, noise=None):
        """(B, C, H, W) -> logits (B, 1, classes)."""
        x = self.trunk.tokens(images)  # (B, 1 + N, D)
        for block, prompts in zip(self.trunk.blocks, self.project(self.prompts)):
            prompts = prompts.expand(len(x), -1, -1)
            x = block(torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1))
            x = torch.cat([x[:, :1], x[:, 1 + self.PROMPTS :]], dim=1)
        return self.head(self.trunk.pooled(x))[:, None]


def logistic_scores(x, y, on, classes, penalty):
    """Scores (m, classes) of features `on` (m, D) by multinomial logistic regression on x (n, D).

    As MSN's: features centred and of unit length, no intercept, the mean loss plus penalty / 2
    times the squared weights.
    """
    x, on, centre = x.double(), on.double(), x.double().mean(dim=0)
    x, on = F.normalize(x - centre), F.normalize(on - centre)
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight], max_iter=500, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight.T, y) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return (on @ weight.T).detach()


# ----------------------------------------------------------------------------------- stage 3's task


def add_flags(groups):
    flags.add_label_flags(groups, pool="cls", min_crop="0.08; toy: 0.5")
    add = groups["optimisation"].add_argument
    add("--shots", type=shots, default=["1", "5", "10"], help="pictures per class (1,5,10)")


def shots(text):
    """An argparse type: "1,5" -> ["1", "5"]."""
    items = shot_list(text)
    if "all" in items:
        raise argparse.ArgumentTypeError("wants numbers: for all pictures there is --task linear")
    return items


def prepare(run, finetune):
    finetune.read_init(run)
    finetune.open_labelled(run, hold_out=True)
    if (run.out / "config.json").exists() or run.out.is_file():
        raise ValueError(f"--out {run.out} is a file, or another run's: use another --out")
    run.resume = None  # each training of prompts continues from its own folder
    run.prompt_steps = run.steps  # None: by the number of pictures that are drawn
    # VPT's code: 100 epochs, of which 10 warm up. Toy: of the few pictures that are drawn (ours).
    batch_size, epochs = (64, 10) if run.toy else (128, 100)
    crop = 0.5 if run.toy else 0.08
    return {"batch_size": batch_size, "epochs": epochs, "warmup": 0.1, "min_crop": crop}


def main(run, finetune):
    """Fit prompts and logistic regression to each draw of a few pictures; print their top-1."""
    trunk = finetune.load_init(run, finetune.build_classifier(run)).to(run.device).eval()
    known, labels = known_labels(run)

    def features(source):
        x, y, _ = finetune.evaluate.extract(
            {"": trunk.features},
            source,
            trunk.config,
            workers=run.workers,
            device=run.device,
            max_bad=run.max_bad,
            centre=run.val_crop,
        )
        known = (y >= 0) & (y < run.classes)
        return x[""][known], y[known]

    frozen = [features(run.slice), features(run.val)]

    def logistic(source, seed, penalty, name):
        x, y = features(source)
        return [
            finetune.evaluate.accuracy(logistic_scores(x, y, on, run.classes, penalty), right, 1)
            for on, right in frozen
        ]

    def prompts(source, seed, rate, name):
        return train_prompts(run, finetune, source, seed, rate, run.out / f"{name}-lr-{rate:g}")

    tops = {"prompts": {}, "logistic": {}}  # {method: {shots: top-1 on val of each draw}}
    for fit, grid in ((prompts, LOWSHOT_RATES), (logistic, PENALTIES)):
        for shots in run.shots:
            values, tops[fit.__name__][shots] = grid, []
            for seed in SEEDS:
                chosen = known[few_shot_split(labels[known], int(shots), seed)]
                source, name = data.Subset(run.train, chosen.tolist()), f"{shots}-shots-draw-{seed}"
                tried = {value: fit(source, seed, value, name) for value in values}
                best = max(tried, key=lambda value: tried[value][0])  # on the slice of train
                values = [best]  # the choice at the first draw holds for all
                tops[fit.__name__][shots].append(tried[best][1])
    report(run, tops, len(frozen[1][1]))


def known_labels(run):
    """(positions of train's samples whose label is known, all labels of train)."""
    labels = torch.from_numpy(all_labels(run.train))
    known = ((labels >= 0) & (labels < run.classes)).nonzero()[:, 0]
    outside = int((labels >= run.classes).sum())
    if not len(known) or outside > max(1, run.max_bad * len(labels)):
        raise ValueError(f"{outside} labels of train are over {run.classes - 1}, the last class")
    if len(known) < len(labels):
        run.say(f"{len(labels) - len(known)} pictures without a known label are left out")
    return known, labels


def report(run, tops, count):
    """Print mean and deviation of top-1 over the draws: as a table, and as JSON."""
    run.say(f"top-1 on {count} pictures, mean of {len(SEEDS)} draws (standard deviation)")
    run.say("shots     prompts (VPT)       logistic regression")
    for shots in run.shots:
        cells = (f"{np.mean(t[shots]):7.2%} ({np.std(t[shots]):.2%})" for t in tops.values())
        run.say(f"{shots:>5}   {'   '.join(cells)}")
    result = {
        key: {name: {k: float(f(v)) for k, v in t.items()} for name, t in tops.items()}
        for key, f in (("top1", np.mean), ("top1_std", np.std))
    }
    run.say(json.dumps({"task": "lowshot", **result}))


def train_prompts(run, finetune, source, seed, rate, out):
    """(top-1 on the slice of train, on val) of prompts that are trained on a source.

    It is a run in the folder `out`, measured at its end. One that has ended is not repeated.
    """
    say, quiet = run.say, lambda _: None
    run, pictures = copy.copy(run), int(source.sizes.sum())
    run.train, run.seed, run.out, run.say = source, seed, out, quiet
    run.lanes = run.lanes or 48
    # 48 can be dealt to 1, 2, 3, 4, 6, 8 ... processes: nothing depends on how many there are.
    run.batch_size = min(run.batch_size, 48 * math.ceil(pictures / 48))
    epoch = math.ceil(pictures / run.batch_size)
    run.steps = run.save_every = run.prompt_steps or math.ceil(run.epochs * epoch)
    part = run.batch_size // run.processes
    if run.micro_batch:  # at most: batches differ with the shots
        fitting = (n for n in range(2, part + 1, 2) if part % n == 0 and n <= run.micro_batch)
        run.micro_batch = max(fitting, default=2)
    model = Prompted(finetune.load_init(run, finetune.build_classifier(run)), seed)

    def optimizer(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW([{"params": trained, "initial_lr": rate}], weight_decay=1e-4)

    def measure(model):
        places = {"slice": run.slice, "val": run.val}
        return {name: finetune.measured(run, model, on)[0][0][0] for name, on in places.items()}

    make = partial(run.make, min_crop=run.min_crop)
    flops = 2 * flops_per_image(model.trunk)  # whose weights need no gradients
    if not finetune.train(run, model, optimizer, make, flops, measure=measure):
        say(f"stopped in {out}, saved: the same command goes on")
        raise SystemExit(0)
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    say(f"prompts, {out.name}: {last['slice']:.2%} on the slice of train, {last['val']:.2%} on val")
    return last["slice"], last["val"]
