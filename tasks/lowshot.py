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
from support.probe import accuracy, extract, few_shot_split

LOWSHOT_RATES = (1e-3, 4e-3, 1.6e-2)  # of AdamW (our choice: the paper's is unknown)
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # L2 of logistic regression (our choice)
SEEDS = range(5)  # draws of the low-shot pictures (paper, section 4.4)


def shot_list(text):
    """An argparse type: "1,5,all" -> ["1", "5", "all"]."""
    items = text.split(",")
    if not all(item == "all" or (item.isdigit() and int(item) > 0) for item in items):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers and 'all'")
    return items


class Prompted(nn.Module):
    """VPT, deep: every block of a frozen encoder gets fresh prompts beside its tokens.

    8 prompts of width 192 for each layer (recalled of the paper), brought to the encoder's
    width by one linear map, and a linear head on the pooled tokens. Only these are trained.
    """

    PROMPTS, PROMPT_WIDTH = 8, 192

    def __init__(self, trunk, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape, fan):  # VPT's code: bound sqrt(6 / fan)
            return (2 * torch.rand(shape, generator=generator) - 1) * math.sqrt(6 / fan)

        width, fan = self.PROMPT_WIDTH, 3 * trunk.patch_size**2 + self.PROMPT_WIDTH
        self.prompts = nn.Parameter(uniform(trunk.layers, self.PROMPTS, width, fan=fan))
        self.project = nn.Linear(width, trunk.width)
        self.head = nn.Linear(trunk.width, trunk.classes)
        weight = uniform(trunk.width, width, fan=width + trunk.width)
        self.project.weight = nn.Parameter(weight)
        for zero in (self.project.bias, self.head.weight, self.head.bias):
            nn.init.zeros_(zero)
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
    """Scores (m, classes) of features `on` (m, D) by logistic regression on x (n, D), y (n,).

    As MSN's: features centred and of unit length, no intercept, the mean loss plus
    penalty / 2 times the squared weights.
    """
    x, on, centre = x.double(), on.double(), x.double().mean(dim=0)
    x, on = F.normalize(x - centre), F.normalize(on - centre)
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    options = {"max_iter": 500, "tolerance_change": 1e-14, "line_search_fn": "strong_wolfe"}
    solver = torch.optim.LBFGS([weight], **options)

    def closure():
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight.T, y) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return (on @ weight.T).detach()


# ----------------------------------------------------------------------------------- stage 3's task


def add_flags(groups):
    flags.add_label_flags(groups, pool="that of --init, or cls", min_crop="0.08; toy: 1")
    add = groups["optimisation"].add_argument
    add("--shots", type=shots, default=["1", "5", "10"], help="pictures per class (1,5,10)")


def shots(text):
    """An argparse type: "1,5" -> ["1", "5"]."""
    items = shot_list(text)
    if "all" in items:
        raise argparse.ArgumentTypeError("wants numbers: for all there is --task linear")
    return items


def prepare(run, finetune):
    finetune.read_init(run)
    finetune.open_labelled(run, hold_out=True)
    if (run.out / "config.json").exists() or run.out.is_file():
        raise ValueError(f"--out {run.out} is a file or another run's: use another one")
    run.resume = None  # each training of prompts continues from its own folder
    run.prompt_steps = run.steps  # None: by the number of pictures that are drawn
    # VPT's code: 100 epochs, of which 10 warm up. toy: our choice.
    batch_size, epochs = (64, 10) if run.toy else (128, 100)
    crop = 1.0 if run.toy else 0.08
    return {"batch_size": batch_size, "epochs": epochs, "warmup": 0.1, "min_crop": crop}


def main(run, finetune):
    """Fit prompts and logistic regression to each draw of a few pictures; print top-1."""
    trunk = finetune.load_init(run, finetune.build_classifier(run)).to(run.device).eval()
    known, labels = known_labels(run)
    options = {"workers": run.workers, "device": run.device, "max_bad": run.max_bad}

    def features(source):
        x, y, _ = extract(
            {"": trunk.features}, source, trunk.config, centre=run.val_crop, **options
        )
        known = (y >= 0) & (y < run.classes)
        return x[""][known], y[known]

    measured_on = [features(run.slice), features(run.val)]

    def logistic(source, shots, seed, penalty):
        x, y = features(source)
        scores = lambda on: logistic_scores(x, y, on, run.classes, penalty)
        return [accuracy(scores(on), right, 1) for on, right in measured_on]

    def prompts(source, shots, seed, rate):
        out = run.out / f"{shots}-shots-draw-{seed}-lr-{rate:g}"
        return train_prompts(run, finetune, source, seed, rate, out)

    tops = {"prompts": {}, "logistic": {}}  # {method: {shots: top-1 on val of each draw}}
    for fit, grid in ((prompts, LOWSHOT_RATES), (logistic, PENALTIES)):
        for shots in run.shots:
            values, tops[fit.__name__][shots] = grid, []
            for seed in SEEDS:
                chosen = known[few_shot_split(labels[known], int(shots), seed)]
                source = data.Subset(run.train, chosen.tolist())
                tried = {value: fit(source, shots, seed, value) for value in values}
                best = max(tried, key=lambda value: tried[value][0])  # on the slice of train
                values = [best]  # the choice at the first draw holds for all
                tops[fit.__name__][shots].append(tried[best][1])
    report(run, tops, len(measured_on[1][1]))


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
    result = {key: {name: {} for name in tops} for key in ("top1", "top1_std")}
    for shots in run.shots:
        cells = []
        for name, top1 in tops.items():
            mean, deviation = np.mean(top1[shots]), np.std(top1[shots])
            cells.append(f"{mean:7.2%} ({deviation:.2%})")
            result["top1"][name][shots] = float(mean)
            result["top1_std"][name][shots] = float(deviation)
        run.say(f"{shots:>5}   {'   '.join(cells)}")
    run.say(json.dumps({"task": "lowshot", **result}))


def train_prompts(run, finetune, source, seed, rate, out):
    """(top-1 on the slice of train, on val) of prompts that are trained on a source, in a run
    of its own in the folder `out`. A run that has ended is not repeated."""
    say, run, pictures = run.say, copy.copy(run), int(source.sizes.sum())
    run.train, run.seed, run.out, run.say = source, seed, out, lambda _: None
    run.lanes = run.lanes or 48
    # 48 can be dealt to 1, 2, 3, 4, 6, 8 ... processes: their number changes nothing.
    run.batch_size = min(run.batch_size, 48 * math.ceil(pictures / 48))
    epoch = math.ceil(pictures / run.batch_size)
    run.steps = run.save_every = run.prompt_steps or math.ceil(run.epochs * epoch)
    part = run.batch_size // run.processes
    if run.micro_batch:  # at most: batches differ with the shots
        sizes = range(2, min(part, run.micro_batch) + 1, 2)
        run.micro_batch = max((n for n in sizes if part % n == 0), default=2)
    model = Prompted(finetune.load_init(run, finetune.build_classifier(run)), seed)

    def optimizer(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW([{"params": trained, "initial_lr": rate}], weight_decay=1e-4)

    def measure(model):
        top1 = lambda source: finetune.measured(run, model, source)[0][0][0]
        return {"slice": top1(run.slice), "val": top1(run.val)}

    make = partial(run.make, min_crop=run.min_crop)
    flops = 2 * flops_per_image(model.trunk)  # whose weights need no gradients
    if not finetune.train(run, model, optimizer, make, flops, measure=measure):
        say(f"stopped in {out}, saved: the same command goes on")
        raise SystemExit(0)
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    on_slice, on_val = last["slice"], last["val"]
    say(f"prompts, {out.name}: {on_slice:.2%} on the slice of train, {on_val:.2%} on val")
    return on_slice, on_val
