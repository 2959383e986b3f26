"""What a checkpoint can do: metrics and protocols, no gradient.

    python evaluate.py --task knn         --checkpoint runs/mae/model.pt --data DIR
    python evaluate.py --task fewshot     --checkpoint ... --data DIR --shots 1,5,10,all
    python evaluate.py --task classify    --checkpoint runs/classify/model.pt --data DIR
    python evaluate.py --task video       --checkpoint runs/video/model.pt --data DIR
    python evaluate.py --task features    --checkpoint ... --data DIR --out features.npz
    python evaluate.py --task reconstruct --checkpoint ... --data DIR    # what MAE sees, and paints
    python evaluate.py --task attention   --checkpoint ... --data DIR    # where a class token looks
    python evaluate.py --task zeroshot    --checkpoint runs/lit/model.pt --data DIR # by names
    python evaluate.py --task retrieval   --checkpoint runs/lit/model.pt --data 'captions/*.tar'
    python evaluate.py --task detect      --checkpoint runs/detect/model.pt --data COCO_DIR

DIR holds train/ and val/, each with a folder for every class. For shards: --data and --val-data.
Each task prints a small table and, as the last line on stdout, one JSON object.

Results are exact: the same for any batch size and number of processes (torchrun), up to ties in the
last bits of a feature. Nothing is random but what a printed seed decides.
"""

import argparse
import importlib
import json
import math
import os
import re
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see mae_pretrain.py

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ImageOps
from tqdm import tqdm

import data
import model as models
from support.labels import names_of_list, say_same_names
from support.loader import loader, loader_workers
from support.pictures import draw_attention, draw_confusion, draw_mistakes, draw_reconstructions

RIDGE = 10.0  # L2 on standardised features: fixed, not tuned
NEIGHBOURS = 10


# ----------------------------------------------------------------------------------------- features


@torch.inference_mode()
def extract(
    functions,
    source,
    config,
    batch_size=64,
    workers=0,
    device="cpu",
    max_bad=0.01,
    centre=1.0,
    clips=None,
):
    """Features of a source's samples, by several functions in one pass over the pictures.

    functions   {name: function of normalised images (b, C, H, W) that gives (b, D)}
    config      a model's: says image_size and channels
    centre      share of the pictures' centre that is seen: see data.crop_and_resize
    clips       a data.Clips, for a source of videos: functions get (b, C, T, H, W)
    Returns {name: (n, D) float32}, labels (n,) and numbers (n,) int64 of the samples that could be
    read. Under torchrun each process computes its share, and all get the whole. Raises ValueError
    when more than the share max_bad cannot be read (one alone always may), or all.
    """
    process, processes = distributed()
    size, channels = models.pair(config["image_size"]), config["channels"]
    batch_size = 2 * processes * max(1, batch_size // 2)  # batches are dealt in pairs
    data.check_channels(channels)
    make = partial(labelled, size=size, channels=channels, centre=centre)
    if clips:
        from tasks.video import make_clips

        make = partial(make_clips, clips=clips, size=size, channels=channels, centre=centre)
    batches = data.Batches(source, make, batch_size, process, processes)
    total, features = int(source.sizes.sum()), {}
    labels, read = torch.zeros(total, dtype=torch.int64), torch.zeros(total)
    steps = loader(batches, range(len(batches)), workers)
    for batch in tqdm(steps, desc="features", leave=False, disable=None if process == 0 else True):
        real = batch["positions"] < total  # the last batch is padded
        rows = batch["positions"][real]
        labels[rows], read[rows] = batch["labels"][real], batch["weight"][real]
        images = data.normalize(batch["images"].to(device))
        for name, function in functions.items():
            found = function(images).float().cpu()[real]
            if not found.isfinite().all():
                raise ValueError("the features are not finite: the weights must be damaged")
            features.setdefault(name, torch.zeros(total, found.shape[1]))[rows] = found
        for name in batch["bad"]:
            print(f"unreadable, left out: {name}", file=sys.stderr)
    if processes > 1:  # each row was filled by one process and is zero on the others
        for tensor in (labels, read, *features.values()):
            dist.all_reduce(tensor)
    read = read > 0
    bad = total - int(read.sum())
    if bad == total or bad > max(1, max_bad * total):
        raise ValueError(f"{bad} of {total} pictures cannot be read, over --max-bad {max_bad}")
    features = {name: found[read] for name, found in features.items()}
    return features, labels[read], read.nonzero()[:, 0]


def labelled(sample, key, size, channels, min_crop=None, centre=1.0):
    """A row of a batch: images (C, H, W) uint8, see data.make_picture, and labels (), -1 if
    unknown."""
    images = data.make_picture(sample, key, size, channels, min_crop, centre)
    return {"images": images, "labels": torch.tensor(sample["class"] if sample else -1)}


def usual_crop(size):
    """The share of a picture's centre that is measured: at 224 what the public MAE code cuts out of
    256 pixels, at more all of it, as there. Smaller inputs see all of it, too (ours)."""
    return 224 / 256 if max(size) == 224 else 1.0


def distributed():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def pooled(model, how):
    """The function, for `extract`, that gives a model's pooled tokens."""
    return lambda images: models.pool(model(images), how)


def raw_pixels(images):
    """The floor under all features: every fourth value of a picture."""
    return images.flatten(1)[:, ::4]


# ---------------------------------------------------------------------------------------- protocols


def standardize(train, test):
    """Both minus the mean of train's columns, over their deviation, in float64."""
    train, test = train.double(), test.double()
    mean, deviation = train.mean(dim=0), train.std(dim=0, correction=0).clamp(min=1e-6)
    return (train - mean) / deviation, (test - mean) / deviation


def ridge(train, labels, test, classes):
    """Closed-form linear classifier: train (n, D), labels (n,), test (m, D) -> scores (m, classes).

    Least squares on one-hot targets with L2 = RIDGE and an intercept that is not penalised.
    """
    targets = F.one_hot(labels, classes).double()
    centre, intercept = train.mean(dim=0), targets.mean(dim=0)
    train = train - centre
    gram = train.T @ train + RIDGE * torch.eye(train.shape[1], dtype=train.dtype)
    weights = torch.linalg.solve(gram, train.T @ (targets - intercept))
    return (test - centre) @ weights + intercept


def nearest(train, labels, test, classes):
    """Votes (m, classes) of the NEIGHBOURS most similar training samples, by cosine."""
    train, test, k = F.normalize(train), F.normalize(test), min(NEIGHBOURS, len(train))
    votes = torch.zeros(len(test), classes, dtype=train.dtype)
    for rows in torch.arange(len(test)).split(1024):  # bounds the memory, changes nothing
        similarity, neighbours = (test[rows] @ train.T).topk(k)
        # A vote is 1, plus less than 1 / k for its similarity: so that decides ties, no more.
        votes[rows] = votes[rows].scatter_add(1, labels[neighbours], 1 + similarity / (4 * k))
    return votes


def accuracy(scores, labels, k):
    """Share of the rows of scores (m, classes) with their label among the k highest."""
    best = scores.topk(min(k, scores.shape[1]))
    # A class without a vote (-inf) is not among the best, even where fewer than k have one.
    hits = (best.indices == labels[:, None]) & best.values.isfinite()
    return hits.any(dim=1).double().mean().item()


def print_probe(weights, config, train, test, pool, seed, samples=math.inf, **options):
    """What training gave: ridge top-1 of a trained encoder, of it untrained, and of raw pixels.

    weights are a stage's; the untrained encoder is the one that `seed` initialises. At most 4096
    labels of train; nothing after a training of `samples` that cost less than this.
    """
    if train.classes != test.classes or not train.classes:
        return print("linear probe: left out, for want of labels")
    train = data.Subset(train, range(min(4096, int(train.sizes.sum()))))
    if 3 * samples < 2 * int(train.sizes.sum() + test.sizes.sum()):  # backward counts two
        return print("linear probe: left out, it would take longer than the training")
    trained, untrained = (models.ViT(**models.encoder_config(config)).eval() for _ in range(2))
    models.load_weights(trained, weights)
    models.initialize(untrained, seed)
    trained, untrained = (m.to(options.get("device", "cpu")) for m in (trained, untrained))
    functions = {"raw pixels": raw_pixels, "untrained": pooled(untrained, pool)}
    functions["trained"] = pooled(trained, pool)
    x, y, _ = extract(functions, train, config, **options)
    x_test, y_test, _ = extract(functions, test, config, **options)
    known, known_test = y >= 0, y_test >= 0
    if not known.any() or not known_test.any():
        return print("linear probe: left out, for want of labels")
    y, y_test = y[known], y_test[known_test]
    print(f"linear probe (closed form): {len(y)} labels, {len(y_test)} held-out pictures")
    for name in functions:
        scaled, scaled_test = standardize(x[name][known], x_test[name][known_test])
        scores = ridge(scaled, y, scaled_test, int(max(y.max(), y_test.max())) + 1)
        print(f"  {name:12} top-1 {accuracy(scores, y_test, 1):.1%}")


def unless_lacking(stop, measure, *arguments):
    """measure(*arguments) or, if a process has got no batch for it, None: see data.Stop.

    Every process must call it. What went wrong is said; the training's next step ends the run.
    """
    found, wrong = None, None
    try:
        found = measure(*arguments)
    except ValueError as error:  # perhaps for lack of batches
        wrong = error
    lacking = torch.tensor([int(stop.no_batch is not None)])
    if dist.is_initialized():
        dist.all_reduce(lacking)
    if stop.no_batch is not None:
        print(f"not measured: {str(stop.no_batch) or 'asked to stop'}", file=sys.stderr)
    if wrong and not lacking:
        raise wrong
    return None if lacking else found


@torch.no_grad()
def masked_loss(model, batches, device):
    """An MAE's mean loss on a data.Batches, whose crops and masks are always the same.

    What is unreadable is named and left out; None when that is all.
    """
    model.eval()
    sums = torch.zeros(2, device=device)
    for batch in loader(batches, range(len(batches)), workers=0):
        for name in batch["bad"]:
            print(f"unreadable, left out: {name}", file=sys.stderr)
        images, ids, weight = (batch[key].to(device) for key in ("images", "ids", "weight"))
        losses = model(data.normalize(images), ids)  # (b,)
        sums += torch.stack([(losses * weight).sum(), weight.sum()])
    model.train()
    if dist.is_initialized():
        dist.all_reduce(sums)
    return (sums[0] / sums[1]).item() if sums[1] else None


@torch.no_grad()
def hit_rates(model, batches, device, answers, workers=0, max_bad=1.0):
    """([(hit-1, hit-5)] of each head, pictures that count) on a data.Batches: the share of these in
    which a right class is the highest logit, or among the five highest.

    model: images -> (b, classes) or (b, heads, classes); answers: "labels", or "tags", of which
    there may be several. Every process must call it. What has no answer is left out, and so is what
    is unreadable: named, and over the share max_bad (one alone always may be) a ValueError.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.int64, device=device)  # counting, unreadable, of no class
    hits = torch.zeros(1, 2, dtype=torch.int64, device=device)
    for batch in loader(batches, range(len(batches)), workers):
        for name in batch["bad"]:
            print(f"unreadable, left out: {name}", file=sys.stderr)
        images, right, weight = (batch[key].to(device) for key in ("images", answers, "weight"))
        right = right.view(len(images), 1, 1, -1)  # (b, 1, 1, answers), filled up with -1
        counts = (weight > 0) & (right >= 0).any(dim=3)[:, 0, 0]
        logits = model(data.normalize(images))
        logits = logits[:, None] if logits.ndim == 2 else logits  # (b, heads, classes)
        best = logits.topk(min(5, logits.shape[2])).indices  # (b, heads, 5)
        found = (best[..., None] == right).any(dim=3) & counts[:, None, None]
        hits = hits + torch.stack([found[:, :, 0], found.any(dim=2)], dim=2).sum(dim=0)
        outside = (right >= logits.shape[2]).sum()
        sums += torch.stack([counts.sum(), outside.new_tensor(len(batch["bad"])), outside])
    model.train()
    if dist.is_initialized():
        dist.all_reduce(hits)
        dist.all_reduce(sums)
    count, bad, outside = sums.tolist()
    total = int(batches.source.sizes.sum())
    if bad > max(1, max_bad * total):
        raise ValueError(f"{bad} of {total} pictures cannot be read, over --max-bad {max_bad}")
    if outside:
        raise ValueError(f"{outside} labels are over {logits.shape[2] - 1}, the last class")
    return [(one / max(1, count), five / max(1, count)) for one, five in hits.tolist()], count


def show_autoencoder(weights, run):
    """What stage 1 shows when it ends: reconstructions, and the probe if there are labels.

    weights: an MAE's; run: stage 1's settled arguments. What is unreadable is said, never fatal.
    """
    autoencoder = models.MAE(**run.config).eval()
    autoencoder.load_state_dict(weights)
    options = {"workers": run.workers, "max_bad": run.max_bad, "device": run.device}
    try:
        if run.held_out.sizes.sum():
            draw_reconstructions(autoencoder, run.held_out, run.out / "reconstruction.png")
            sources, samples = (run.source, run.held_out), run.steps * run.batch_size
            print_probe(weights, run.config, *sources, "mean", run.seed, samples, **options)
    except (ValueError, OSError) as error:
        print(f"no more is shown: {error}")


# -------------------------------------------------------------------------------------------- tasks


def labelled_features(model, sources, run):
    """Standardised features and labels of train and val, and the number of classes."""
    features, labels = [], []
    if (sources[0].classes is None) != (sources[1].classes is None):
        raise ValueError(
            "only one of --data and --val-data names its classes: they cannot be matched"
        )
    for source in sources:
        x, y, _ = extract({"": pooled(model, run.pool)}, source, model.config, **run.options)
        known = y >= 0
        if not known.any():
            raise ValueError(f"no labels in {source.identity}: want class folders or .cls files")
        if not known.all():
            print(f"{int((~known).sum())} samples without a label are left out")
        features.append(x[""][known])
        labels.append(y[known])
    classes = int(max(y.max() for y in labels)) + 1
    if classes > 1_000_000:
        raise ValueError(f"there is a label {classes - 1}: classes are numbered from 0")
    print(f"{len(labels[0])} train and {len(labels[1])} val samples, {classes} classes")
    return *standardize(*features), *labels, classes


def task_knn(model, sources, run):
    x, x_test, y, y_test, classes = labelled_features(model, sources, run)
    votes = nearest(x, y, x_test, classes)
    votes = votes.masked_fill(votes == 0, -torch.inf)
    top1, top5 = (accuracy(votes, y_test, k) for k in (1, 5))
    print(f"knn (k = {NEIGHBOURS}, cosine), {run.pool} pooling: top-1 {top1:.2%}, top-5 {top5:.2%}")
    return {"top1": top1, "top5": top5}


def task_fewshot(model, sources, run):
    from tasks.lowshot import few_shot_split

    x, x_test, y, y_test, classes = labelled_features(model, sources, run)
    result = {"top1": {}, "top1_std": {}, "top5": {}}
    print(f"ridge (L2 = {RIDGE:g}), {run.pool} pooling; shots are drawn with seeds 0 to 4")
    print("shots     top-1 (std)        top-5")
    for shots in run.shots:
        tops = []
        for seed in range(1 if shots == "all" else 5):
            chosen = slice(None) if shots == "all" else few_shot_split(y, int(shots), seed)
            scores = ridge(x[chosen], y[chosen], x_test, classes)
            tops.append([accuracy(scores, y_test, k) for k in (1, 5)])
        (top1, top5), std = np.mean(tops, axis=0).tolist(), float(np.std(tops, axis=0)[0])
        result["top1"][shots], result["top1_std"][shots], result["top5"][shots] = top1, std, top5
        print(f"{shots:>5}   {top1:7.2%} ({std:.2%})   {top5:7.2%}")
    return result


def task_classify(model, sources, run):
    """Top-1 and top-5 of a classifier's head. A picture may have several right classes."""
    from tasks.video import over_views

    source = Bordered(sources[-1], run.border) if run.border else sources[-1]
    names = model.config.get("class_names")
    if not (names and source.classes or run.label_map or run.real_labels):
        names = names_of_list(model.classes, source.classes)
        if not names:
            why = f"the model has {model.classes} classes and no names for them"
            raise ValueError(f"{why}, the data has {len(source.classes)}: give --label-map")
    say_same_names(run.checkpoint, [[name] for name in names or ()])
    video = run.task == "video"
    scores, what = (over_views(model), "videos") if video else (model, "pictures")
    options, functions = run.options, {"": lambda images: best_five(scores(images))}
    options["centre"] = run.val_crop
    found, labels, numbers = extract(functions, source, model.config, **options)
    found = found[""]  # (n, 6): five classes, the probability of the first
    answers = right_answers(names, model.classes, source, labels, numbers.tolist(), run)
    counted = [i for i, right in enumerate(answers) if right]
    if not counted:
        raise ValueError(f"no labels in {source.identity}: want class folders or .cls files")
    if len(counted) < len(answers):
        print(f"{len(answers) - len(counted)} {what} without a right answer are left out")
    best = found[:, :-1].long().tolist()
    top1 = sum(best[i][0] in answers[i] for i in counted) / len(counted)
    top5 = sum(not answers[i].isdisjoint(best[i]) for i in counted) / len(counted)
    print(f"top-1 {top1:.2%}, top-5 {top5:.2%} on {len(counted)} {what}")
    names = model.config.get("class_names") or names or list(map(str, range(model.classes)))
    speaks = distributed()[0] == 0
    if run.confusion and speaks:
        table = torch.zeros(model.classes, model.classes, dtype=torch.int64)
        for i in counted:  # of several right answers, the one that was given, or the first
            truth = best[i][0] if best[i][0] in answers[i] else min(answers[i])
            table[truth, best[i][0]] += 1
        draw_confusion(table, names, run.confusion)
    if run.mistakes and speaks:
        wrong = [i for i in counted if best[i][0] not in answers[i]]
        wrong.sort(key=lambda i: -found[i, -1])
        pictures = data.Subset(source, numbers[wrong[: run.count]].tolist())
        line = "{} ({:.0%}), is {}".format
        shown = [(names[best[i][0]], found[i, -1], names[min(answers[i])]) for i in wrong]
        lines = [line(*what) for what in shown[: run.count]]
        draw_mistakes(pictures, lines, model.config, run.mistakes)
    return {"top1": top1, "top5": top5, what: len(counted)}


def best_five(logits):
    """(b, classes) -> (b, 6): the five best classes (or as many as there are) and the probability
    of the first. Class numbers are exact in float32 up to 2^24."""
    best = logits.float().softmax(dim=1).topk(min(5, logits.shape[1]))
    return torch.cat([best.indices.float(), best.values[:, :1]], dim=1)


class Bordered(data.Subset):
    """A source without the outermost pixels of its pictures (ObjectNet's have a red frame)."""

    def __init__(self, source, border):
        super().__init__(source, range(int(source.sizes.sum())))
        self.border = border

    def read(self, number):
        sample = super().read(number)
        return sample | {"image": lambda: ImageOps.crop(sample["image"](), self.border)}


def right_answers(names, classes, source, labels, numbers, run):
    """For each picture the set of the model's classes that are right: empty where none is known.

    names of the model's `classes` count, and labels are the source's class numbers; or --label-map
    says which of the model's classes a class of the data means; or --real-labels (ImageNet-ReaL's
    real.json) has a list for each number in the files' names.
    """
    if run.real_labels:
        try:
            real = json.loads(Path(run.real_labels).read_text("utf-8"))
            bases = [re.split("[/:]", source.name(number))[-1] for number in numbers]
            keys = [int(re.findall(r"val_(\d{8})", base)[-1]) for base in bases]
            answers = [set(real[key - 1]) if key > 0 else set() for key in keys]
            if any(type(v) is not int or not 0 <= v < classes for a in answers for v in a):
                raise ValueError(f"answers are numbers from 0 to {classes - 1}")
            return answers
        except (OSError, ValueError, IndexError, KeyError, TypeError) as error:
            why = f"{run.real_labels} is not real.json of these pictures ({error!r})"
            raise ValueError(f"{why}: a list for each, ILSVRC2012_val_00000001 first") from None
    given = {}  # class of the data: classes of the model, of which several may have the same name
    for number, name in enumerate(names or ()):
        given.setdefault(name, set()).add(number)
    found = labels[labels >= 0].unique().tolist()
    of_data = dict(enumerate(source.classes or [])) or {i: str(i) for i in found}  # label: name
    if run.label_map:
        try:
            asked = json.loads(Path(run.label_map).read_text("utf-8"))
            asked = {name: v if isinstance(v, list) else [v] for name, v in asked.items()}
            parts = {n: [given[v] if isinstance(v, str) else {v} for v in asked[n]] for n in asked}
            given = {name: set().union(*some) for name, some in parts.items()}
            fits = (type(v) is int and 0 <= v < classes for m in given.values() for v in m)
            if not all(fits) or not given.keys() & set(of_data.values()):
                raise ValueError("classes that the model or the data has not")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            why = f"{run.label_map} is no label map ({error!r})"
            want = "{class of the data: class of the model, or a list}"
            raise ValueError(f"{why}: want {want}") from None
    unknown = [name for name in of_data.values() if name not in given]
    unknown += [str(label) for label in found if label not in of_data]
    if unknown and not run.label_map:
        why = f"the model knows no {', '.join(unknown[:3])}"
        raise ValueError(f"{why} ({len(unknown)} of the data's classes): give --label-map")
    meanings = {label: given.get(name, set()) for label, name in of_data.items()}
    return [meanings.get(label, set()) for label in labels.tolist()]


def task_features(model, sources, run):
    out = Path(run.out or "features.npz")
    if out.exists():
        raise ValueError(f"{out} exists: choose another --out")
    if run.split == "val" and len(sources) == 1:
        raise ValueError(f"{run.data} has no val/: say --split train")
    source, function = sources[run.split == "val"], {"": pooled(model, run.pool)}
    x, labels, numbers = extract(function, source, model.config, **run.options)
    x, keys = x[""].numpy(), [source.name(number) for number in numbers.tolist()]
    if distributed()[0] == 0:
        with open(f"{out}.tmp", "wb") as file:
            classes = np.array(sources[0].classes or [], dtype=str)
            np.savez(file, features=x, keys=keys, labels=labels.numpy(), classes=classes)
        os.replace(f"{out}.tmp", out)
    print(f"wrote {out}: features {x.shape}, keys, labels, classes")
    return {"samples": len(keys), "width": x.shape[1], "out": str(out)}


def task_reconstruct(model, sources, run):
    path = run.out or Path(run.checkpoint).with_name("reconstruction.png")
    print(f"masks are drawn with seed {run.seed}")
    draw_reconstructions(model, sources[-1], path, run.count, run.seed)
    return {"out": str(path)}


def task_attention(model, sources, run):
    path = run.out or Path(run.checkpoint).with_name("attention.png")
    draw_attention(model, sources[-1], path, run.count)
    return {"out": str(path)}


TASKS = {
    "classify": task_classify,
    "video": task_classify,
    "knn": task_knn,
    "fewshot": task_fewshot,
    "features": task_features,
    "reconstruct": task_reconstruct,
    "attention": task_attention,
}
# Tasks of which only the model in tasks/ knows how they go: module and function.
OTHERS = {
    "zeroshot": ("tasks.lit", "task_zeroshot"),
    "retrieval": ("tasks.lit", "task_retrieval"),
    "detect": ("tasks.detect", "task_detect"),
}


def load_model(path, task, device, heads=None, image_size=None, entry=None, **of_autoencoder):
    """(model in inference mode, one line on what became of the weights) of a checkpoint.

    heads, image_size, entry: see models.read_weights; positions are resampled to the image_size.
    of_autoencoder: arguments of an MAE that are other than the checkpoint says.
    """
    from tasks.lit import TwoTowers
    from tasks.video import VideoClassifier

    if task == "detect":
        from tasks.detect import Detector, read_detector

        state, config = read_detector(path)
        model = Detector(**config)
        model.load_state_dict(state)
        return model.to(device).eval(), f"a detector: {len(state)} tensors loaded"
    state, config = models.read_weights(path, heads, image_size, entry)
    grid = [side // config["patch_size"] for side in config["image_size"]]
    config |= {"image_size": [*image_size]} if image_size else {}
    if task in ("zeroshot", "retrieval"):
        if "text" not in config:
            raise ValueError(f"{path} has no text tower: finetune.py --task lit makes one")
        names = [name for name in ("text", "shared_width", "pool") if name in config]
        pair = {**models.encoder_config(config), **{name: config[name] for name in names}}
        model = TwoTowers(**pair)
        if missing := model.state_dict().keys() - state.keys():
            raise ValueError(f"{path} lacks {', '.join(sorted(missing)[:3])}: half a pair")
    elif task == "reconstruct":
        if "decoder" not in config:
            raise ValueError(f"{path} has no decoder: --task reconstruct needs stage 1's model.pt")
        if "normalize_targets" not in config | of_autoencoder:
            print("what was predicted is taken for normalised patches: if it was not, --raw-pixels")
        model = models.MAE(**config | of_autoencoder)
    elif task in ("classify", "video"):
        if "head.weight" not in state:
            raise ValueError(f"{path} has no head: --task {task} needs one, finetune.py makes it")
        if (task == "video") != ("frames" in config):
            wanted = "video" if "frames" in config else "classify"
            raise ValueError(f"{path} has a head for --task {wanted}, not {task}")
        names = ("frames", "relative_positions") if task == "video" else ()
        video = {name: config[name] for name in names if name in config}
        pool = config.get("pool", "mean" if "fc_norm.weight" in state else "cls")
        names = config.get("class_names")
        squashed = {"val_crop": config["val_crop"]} if "val_crop" in config else {}
        config = {**models.encoder_config(config), "pool": pool, "class_names": names, **video}
        kind = VideoClassifier if video else models.Classifier
        model = kind(classes=len(state["head.weight"]), **config)
        model.config |= squashed
    else:
        model = models.ViT(**models.encoder_config(config))
    line = models.load_weights(model, state, grid, keep_head=task in ("classify", "video"))
    return model.to(device).eval(), line


TASKS_OF_FLAGS = {
    "pool": "knn fewshot features",
    "shots": "fewshot",
    "split": "features",
    **dict.fromkeys(("border", "real_labels", "mistakes"), "classify"),
    **dict.fromkeys(("label_map", "confusion"), "classify video"),
    **dict.fromkeys(("clips", "crops", "span", "stride", "short_side"), "video"),
    "val_crop": "classify zeroshot retrieval video",
    **dict.fromkeys(
        ("labels", "val_labels"), " ".join(name for name in (*TASKS, *OTHERS) if name != "detect")
    ),
    **dict.fromkeys(("classnames", "templates"), "zeroshot"),
    "tokenizer": "zeroshot retrieval",
    "caption_key": "retrieval",
    "out": "features reconstruct attention detect",
    "count": "reconstruct attention classify detect",
    "results": "detect",
    **dict.fromkeys(("seed", "raw_pixels", "mask_ratio"), "reconstruct"),
    **dict.fromkeys(
        ("image_size", "entry"), " ".join(name for name in (*TASKS, *OTHERS) if name != "detect")
    ),
}
RANGES = [("val_crop", 0, 1), ("max_bad", 0, 1), ("border", 0, 2**20), ("seed", 0, 2**62)]
RANGES += [("count", 1, 1000), ("batch_size", 1, 2**20), ("clips", 1, 1000), ("span", 0, 1e6)]
RANGES += [("stride", 0, 1e6), ("short_side", 8, 2**16), ("mask_ratio", 0, 1)]


def parse_arguments(argv):
    parser = argparse.ArgumentParser("evaluate.py", description="Metrics.", allow_abbrev=False)
    add = parser.add_argument
    add("--task", required=True, choices=[*TASKS, *OTHERS])
    add("--checkpoint", required=True, help="model.pt of any stage, or a public checkpoint")
    add("--heads", type=int, help="of a public checkpoint whose size is unknown")
    add("--entry", help="of one with several networks: state_dict_ema, or a prefix of names")
    add("--image-size", type=models.pair, help="side or HEIGHTxWIDTH (the checkpoint's)")
    add("--data", default="toy", help="a folder with train/ and val/, tar shards, or toy (toy)")
    add("--val-data", help="the val pictures, where --data holds only those to train on")
    add("--labels", help="of the folder --data: .csv (path,class), .jsonl, or iNaturalist's .json")
    add("--val-labels", help="the same for val (paths in --val-data or, without it, --data)")
    add("--cache-dir", help="folder for remote shards (of yours, among the temporary files)")
    add("--cache-size", default="20G", help="the most that it holds, like 500G (20G)")
    add("--pool", choices=("cls", "mean"), default="mean", help="of the tokens (mean)")
    add("--shots", type=shots, default=shots("1,5,10,all"), help="per class (1,5,10,all)")
    add("--split", choices=("train", "val"), default="val", help="for features (val)")
    add("--val-crop", type=float, help="share of the centre, 0: all, squashed")
    add("--clips", type=int, default=5, help="video: of each, spread evenly over it (5)")
    add("--crops", type=int, choices=(1, 3), default=3, help="video: along the longer side (3)")
    add("--span", type=float, default=2.7, help="video: as in training (2.7)")
    add("--stride", type=float, default=4.0, help="video: as in training (4)")
    add("--short-side", type=int, help="video: as in training")
    add("--classnames", help="zeroshot: file of names, a line for each class (the data's names)")
    add("--templates", help="zeroshot: file of sentences with {} for a name (a few of ours)")
    add("--tokenizer", help="XLM-R's sentencepiece file, if that is what the texts were cut by")
    add("--caption-key", default="caption", help="retrieval: of the captions in .json (caption)")
    add("--border", type=int, default=0, help="classify: pixels that are cut off all around (0)")
    add("--real-labels", help="classify: ImageNet-ReaL's real.json, of several right answers")
    add("--label-map", help="classify: JSON, class of the data: class of the model, or a list")
    add("--confusion", help="classify: write the confusion matrix as this PNG")
    add("--mistakes", help="classify: write the most confident mistakes as this PNG")
    add("--results", help="detect: write what is found as this .json, in COCO's format")
    add("--out", help="the file that is written (features.npz; pictures: beside the checkpoint)")
    add("--count", type=int, default=8, help="rows of a picture (8)")
    add("--seed", type=int, default=0, help="of the masks in a picture (0)")
    option = argparse.BooleanOptionalAction
    add("--raw-pixels", action=option, help="reconstruct: what was predicted (the checkpoint's)")
    add("--mask-ratio", type=float, help="reconstruct: share that is hidden (the checkpoint's)")
    add("--batch-size", type=int, default=64, help="at once (64; detect: fewer, if large)")
    add("--workers", type=int, help="loader processes (the cores left)")
    add("--max-bad", type=float, default=0.01, help="unreadable share to stop at (0.01)")
    pixels = {"type": data.pixel_limit, "default": data.MAX_PIXELS}
    add("--max-pixels", **pixels, help="of a picture: larger ones are unreadable (89 million)")
    parser.error = lambda message: fail(f"{message} (--help lists all flags)")
    run = parser.parse_args(argv)
    for name, tasks in TASKS_OF_FLAGS.items():
        if run.task not in tasks.split() and getattr(run, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is for --task {tasks.replace(' ', ', ')}")
    for name, low, high in RANGES:
        value = getattr(run, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} {value} is out of range")
    if run.task == "video" and run.crops > 1 and run.val_crop == 0:
        parser.error("--val-crop 0 is the whole picture: give --crops 1, too")
    if run.real_labels and run.label_map:
        parser.error("--real-labels says which classes are right: leave --label-map out")
    for path in filter(None, (run.confusion, run.mistakes)):
        if not path.endswith(".png") or not Path(path).absolute().parent.is_dir():
            parser.error(f"{path} is no .png in a folder that exists")
    if run.out and not Path(run.out).absolute().parent.is_dir():
        parser.error(f"--out {run.out}: there is no such folder")
    if run.task == "detect" and run.out and not run.out.endswith(".png"):
        parser.error(f"--out {run.out} is no .png")
    if run.results and not Path(run.results).absolute().parent.is_dir():
        parser.error(f"--results {run.results}: there is no such folder")
    if run.results and os.path.exists(run.results):
        parser.error(f"--results {run.results} exists: choose another one")
    return run


def shots(text):
    """ "1,5,all" -> ["1", "5", "all"]."""
    items = text.split(",")
    if not all(item == "all" or (item.isdigit() and int(item) > 0) for item in items):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers and 'all'")
    return items


def fail(message, status=2):
    """One line on what is wrong and what to do."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        print(f"evaluate.py: {message}", file=sys.stderr)
    sys.exit(status)


def main(argv=None):
    from tasks.video import Clips

    run = parse_arguments(argv)
    launched = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}  # by torchrun
    process, processes, local, here = (
        int(os.environ.get(name, str(alone))) for name, alone in launched.items()
    )
    kind = (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")).type
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if process > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (one process speaks for all)
    try:
        if processes > 1:
            if run.task in ("reconstruct", "attention"):
                raise ValueError(f"--task {run.task} draws on one process: leave torchrun out")
            dist.init_process_group("gloo")  # only features on the CPU are exchanged
        workers = loader_workers(run.workers, here)
        run.options = {"batch_size": run.batch_size, "workers": workers, "device": device}
        run.options["max_bad"] = run.max_bad
        measured = run.task == "detect" and run.checkpoint.endswith(".json")  # results
        model, line = None, f"results of {run.checkpoint}"
        if not measured:
            known = {"mask_ratio": run.mask_ratio} if run.mask_ratio is not None else {}
            known |= {} if run.raw_pixels is None else {"normalize_targets": not run.raw_pixels}
            of_file = run.heads, run.image_size, run.entry
            model, line = load_model(run.checkpoint, run.task, device, *of_file, **known)
        print(line)
        size, video = models.pair(model.config["image_size"] if model else 128), run.task == "video"
        if run.val_crop is None:  # pairs see the whole centre (maws repository), and so do clips
            usual = 1.0 if video or hasattr(model, "text") else usual_crop(size)
            run.val_crop = model.config.get("val_crop", usual) if model else usual
            if not run.val_crop:
                print("pictures are squashed, as for the released weights of this size: --val-crop")
        if video:
            how = run.span, run.stride, run.clips, run.crops, False, run.short_side
            run.options["clips"] = Clips(model.config["frames"], *how)
            run.options["batch_size"] = max(1, run.batch_size // (run.clips * run.crops))
        if run.task == "detect":  # of larger pictures fewer: attention's biases fill the memory
            run.options["batch_size"] = math.ceil(run.batch_size * min(1, 224**2 / math.prod(size)))
        labels = run.labels, run.val_labels
        cache = run.cache_dir, run.cache_size
        data.limit_pixels(run.max_pixels)
        opened = run.data, run.val_data, size, *labels, cache, run.caption_key
        if run.task == "detect":
            from tasks.scenes import scenes_to_measure

            train, val = None, scenes_to_measure(run.val_data or run.data, size[0])
        else:
            train, val = data.open_sources(*opened, videos=video)
        if val is None and run.task in ("knn", "fewshot"):
            raise ValueError(f"{run.data} has no train/ and val/: give the latter as --val-data")
        if run.task in OTHERS:  # here, so that nothing else loads it
            module, name = OTHERS[run.task]
            function = getattr(importlib.import_module(module), name)
        else:
            function = TASKS[run.task]
        result = function(model, [train, val] if val else [train], run)
    except (ValueError, OSError) as error:
        fail(error, 1 if isinstance(error, data.Unreachable) else 2)
    except KeyboardInterrupt:
        fail("stopped", 130)
    print(json.dumps({"task": run.task, **result}))
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
