"""Frozen features, closed-form classifiers on them, and the probes of stages 1 and 2.

extract       features of all samples of a source, the same on any number of processes
ridge, nearest    classifiers without training: least squares, and k nearest neighbours
print_probe   at the end of a run: the encoder beside an untrained one and raw pixels
Probe         at each save of a run: few-shot and nearest neighbours on some pictures
"""

import math
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import (
    SPLIT,
    Batches,
    Subset,
    check_channels,
    make_picture,
    normalize,
    open_sources,
    permutation,
)
from model import ViT, encoder_config, initialize, load_weights, pair, pool
from support.labels import all_labels
from support.launch import progress
from support.loader import loader, name_unreadable

RIDGE = 10.0  # L2 on standardised features: fixed, not tuned
NEIGHBOURS = 10


# ----------------------------------------------------------------------------------------- features


def extract(functions, source, config, batch_size=64, workers=0, device="cpu",
            max_bad=0.01, centre=1.0, make=None):  # fmt: skip
    """Compute features of all samples of a source, by several functions in one pass.

    functions   {name: function of normalised images (b, C, H, W) that returns (b, D)}
    config      of a model: its image_size and channels
    centre      fraction of the image to keep, see data.crop_and_resize
    make        makes the row of a sample, see data.Batches (default: labelled)

    Returns {name: (n, D) float32}, labels (n,) and numbers (n,) int64 of the n readable
    samples. Each process computes a part and returns the whole. Raises ValueError if no
    sample can be read, or too few: see check_unreadable.
    """
    batches = batches_of(source, config, batch_size, make, centre)
    made = named_batches(batches, workers, "features")
    found = collect(functions, made, batches.total, device)
    read = len(found[1])
    check_unreadable(batches.total - read, batches.total, max_bad)
    if not read:
        raise ValueError(f"{source.identity}: none of them can be read")
    return found


def batches_of(source, config, batch_size, make=None, centre=1.0):
    """The data.Batches of all samples of a source, for this process: see extract."""
    process, processes = distributed()
    size, channels = pair(config["image_size"]), config["channels"]
    check_channels(channels)
    batch_size = 2 * processes * max(1, batch_size // 2)  # dealt in pairs
    make = partial(make or labelled, size=size, channels=channels, centre=centre)
    return Batches(source, make, batch_size, process, processes)


@torch.no_grad()  # not inference_mode: a model in training could not use its tensors again
def collect(functions, batches, total, device):
    """The results of extract for the batches of this process. total: samples of the source."""
    features, labels, read = {}, torch.zeros(total, dtype=torch.int64), torch.zeros(total)
    for batch in batches:
        real = batch["positions"] < total  # the last batch is padded
        rows = batch["positions"][real]
        labels[rows], read[rows] = batch["labels"][real], batch["weight"][real]
        images = normalize(batch["images"].to(device))
        for name, function in functions.items():
            found = function(images).float().cpu()[real]
            if not found.isfinite().all():
                raise ValueError("the features are not finite: the weights are damaged")
            features.setdefault(name, torch.zeros(total, found.shape[1]))[rows] = found
    for tensor in (labels, read, *features.values()):
        sum_over_processes(tensor)  # one process filled each row; it is zero on the others
    read = read > 0
    features = {name: found[read] for name, found in features.items()}
    return features, labels[read], read.nonzero()[:, 0]


def labelled(sample, key, size, channels, min_crop=None, centre=1.0, flip=True):
    """The row of a sample: images (C, H, W) uint8, see data.make_picture, and labels ()
    int64, -1 for a sample without a label and for padding, which is None."""
    images = make_picture(sample, key, size, channels, min_crop, centre, flip)
    # A tensor: a number that is too large is an error of this sample alone.
    return {"images": images, "labels": torch.tensor(sample["class"] if sample else -1)}


def named_batches(batches, workers=0, title="measuring"):
    """Yield each of a data.Batches once, and print the names of its unreadable samples."""
    made = loader(batches, range(len(batches)), workers)
    for batch in progress(made, len(batches), title, " batches"):
        name_unreadable(batches.source, batch["bad"])
        yield batch


def check_unreadable(bad, total, max_bad):
    """Raise ValueError if more than the fraction max_bad, and more than one, is bad."""
    if bad > max(1, max_bad * total):
        raise ValueError(f"{bad} of {total} pictures cannot be read, over --max-bad {max_bad}")


def distributed():
    """(rank of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_processes(tensor):
    """Sum a tensor over the processes, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def pooled(model, how):
    """A function for `extract`: images -> a ViT's tokens pooled by "cls" or "mean"."""
    return lambda images: pool(model(images), how)


# ---------------------------------------------------------------------------------------- protocols


def standardize(train, test):
    """Subtract the mean of train's columns from both; divide by their deviation. float64."""
    train, test = train.double(), test.double()
    mean, deviation = train.mean(dim=0), train.std(dim=0, correction=0).clamp(min=1e-6)
    return (train - mean) / deviation, (test - mean) / deviation


def ridge(train, labels, test, classes):
    """Closed-form linear classifier: train (n, D), labels (n,), test (m, D) -> scores
    (m, classes).

    Least squares on one-hot targets, L2 = RIDGE, with an intercept that is not penalised.
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
    for rows in torch.arange(len(test)).split(1024):  # bounds the memory
        similarity, neighbours = (test[rows] @ train.T).topk(k)
        # A vote is 1, plus less than 1 / k for its similarity, which only decides ties.
        vote = 1 + similarity / (4 * k)
        votes[rows] = votes[rows].scatter_add(1, labels[neighbours], vote)
    return votes


def accuracy(scores, labels, k):
    """Fraction of the rows of scores (m, classes) with the label among the k highest."""
    best = scores.topk(min(k, scores.shape[1]))
    # A class with a score of -inf is never a hit, even if it is among the k highest.
    hits = (best.indices == labels[:, None]) & best.values.isfinite()
    return hits.any(dim=1).double().mean().item()


def few_shot_split(labels, shots, seed):
    """Indices of `shots` random samples of each class, or of all if it has fewer."""
    shuffled = torch.from_numpy(permutation(len(labels), seed, 0, 0, SPLIT))
    return torch.cat([shuffled[labels[shuffled] == c][:shots] for c in labels.unique()])


def few_shot(x, y, x_test, y_test, classes, shots):
    """(5, 2): top-1 and top-5 of ridge on `shots` samples of each class, in draws 0 to 4.

    x (n, D), y (n,): features to draw from, and labels; x_test (m, D), y_test (m,): to measure on
    """
    tops = []
    for seed in range(5):
        chosen = few_shot_split(y, shots, seed)
        scores = ridge(x[chosen], y[chosen], x_test, classes)
        tops.append([accuracy(scores, y_test, k) for k in (1, 5)])
    return np.array(tops)


# ----------------------------------------------------------------------------- probes of a training


def print_probe(weights, config, train, test, seed, samples=math.inf, **options):
    """Print ridge top-1 of a trained encoder, of an untrained one, and of raw pixels, and
    top-1 of the most frequent class.

    weights, config: of a stage's model. seed: of the untrained one. options: of extract.
    The tokens are pooled as the head does; of an MAE, the patches' mean. At most 4096
    samples of train are used. The probe is left out if it costs more than a training on
    `samples` samples.
    """
    if train.classes != test.classes or not train.classes:
        return print("linear probe: left out, for want of labels")
    train = Subset(train, range(min(4096, int(train.sizes.sum()))))
    if 3 * samples < 2 * int(train.sizes.sum() + test.sizes.sum()):  # three passes
        return print("linear probe: left out, it would take longer than the training")
    trained, untrained = (ViT(**encoder_config(config)).eval() for _ in range(2))
    load_weights(trained, weights)
    initialize(untrained, seed)
    device = options.get("device", "cpu")
    pooling = config.get("pool", "mean")
    functions = {
        "raw pixels": lambda images: images.flatten(1)[:, ::4],  # the baseline
        "untrained": pooled(untrained.to(device), pooling),
        "trained": pooled(trained.to(device), pooling),
    }
    x, y = labelled_features(functions, train, config, partial(extract, **options))
    x_test, y_test = labelled_features(functions, test, config, partial(extract, **options))
    print(f"linear probe (closed form): {len(y)} labels, {len(y_test)} held-out pictures")
    print(f"  {'one class':12} top-1 {(y_test == y.mode().values).double().mean():.1%}")
    for name in functions:
        scaled, scaled_test = standardize(x[name], x_test[name])
        scores = ridge(scaled, y, scaled_test, int(max(y.max(), y_test.max())) + 1)
        print(f"  {name:12} top-1 {accuracy(scores, y_test, 1):.1%}")


def labelled_features(functions, source, config, extract):
    """The results of `extract` for samples with a label: {name: (n, D)}, labels (n,)."""
    features, labels, _ = extract(functions, source, config)
    known = labels >= 0
    check_labels(int(known.sum()), len(known), source, "samples without a label")
    return {name: found[known] for name, found in features.items()}, labels[known]


def check_labels(known, total, source, what):
    """Print how many of `total` samples are left out, or raise ValueError if all are."""
    if not known:
        raise ValueError(f"no labels in {source.identity}: want class folders or .cls files")
    if known < total:
        print(f"{total - known} {what} are left out")


SHOTS = 5  # of the few-shot probe
MOST_PROBED = 500  # pictures to fit on, and as many to measure on
FEWEST_PROBED = 50  # to measure on
PROBES_SHOWN = {"probe_few_shot": f"{SHOTS}-shot {{:.1%}}", "probe_knn": "knn {:.1%}"}


class Probe:
    """Top-1 of frozen features while a stage trains: SHOTS-shot ridge, and nearest neighbours.

    The pictures depend on the data alone. They are read once, by the process that uses them, and
    stay in memory as uint8. No draw of the training is used.

    fit, test   sources whose labels are known: to fit on, and to measure on
    run         a settled run of a stage
    """

    def __init__(self, fit, test, run):
        self.sources, self.run, self.kept = (fit, test), run, None
        # Samples to train on for each probe, of which the pictures are 5 %. One of these costs
        # at most as much as a sample: a forward pass, and no other decoding.
        self.samples = 20 * (len(fit.numbers) + len(test.numbers))

    def is_due(self, done):
        """True if the save after `done` steps comes with a probe."""
        before = (done - 1) // self.run.save_every * self.run.save_every  # the last save
        paid = [steps * self.run.batch_size // self.samples for steps in (before, done)]
        return paid[0] < paid[1]

    def __call__(self, model):
        """{name of PROBES_SHOWN: share of right answers} of a model in training; {} if nothing
        can be read. All processes must call it."""
        if not self.kept:  # not before: the process group begins after __init__
            batches = map(self.batches_of, self.sources)
            self.kept = [([*named_batches(some)], some.total) for some in batches]
        model.eval()
        functions = {"": model.probe_features}
        found = [collect(functions, *each, self.run.device) for each in self.kept]
        model.train()
        (x, y, _), (x_test, y_test, _) = found
        if not len(y) or not len(y_test):
            return {}
        x, x_test = standardize(x[""], x_test[""])
        classes = int(max(y.max(), y_test.max())) + 1
        top1 = few_shot(x, y, x_test, y_test, classes, SHOTS)[:, 0].mean().item()
        votes = nearest(x, y, x_test, classes)
        return dict(zip(PROBES_SHOWN, (top1, accuracy(votes, y_test, 1))))

    def batches_of(self, source):
        """A data.Batches of a source, of equal parts that are no larger than a micro-batch."""
        each = len(source.numbers) / distributed()[1]  # of a process
        parts = math.ceil(each / self.run.micro_batch)
        return batches_of(source, self.run.config, 2 * math.ceil(each / parts / 2))  # pairs


def open_probe(run):
    """The Probe of a settled run of stage 1 or 2. None without labels, or if it costs too much.

    Its pictures are those of --probe. Otherwise it fits on pictures that are trained on, and
    measures on val or on the slice that is held out. Raises ValueError for a --probe of no use.
    """
    cache, test = (run.cache_dir, run.cache_size), vars(run).get("val") or run.held_out
    fit = run.source
    if run.probe:
        size = pair(run.config["image_size"])
        try:
            fit, test = open_sources(run.probe, None, size, cache=cache)
        except ValueError as error:
            raise ValueError(f"--probe: {error}") from None
    elif fit.cache or fit.classes != test.classes:  # remote shards would come for their labels
        return None
    if test:
        fit, kinds = some_labelled(fit, MOST_PROBED)
        test, _ = some_labelled(test, MOST_PROBED, kinds)
    else:
        both, kinds = some_labelled(fit, 2 * MOST_PROBED)
        halves = [list(range(start, len(both.numbers), 2)) for start in (0, 1)]
        fit, test = (Subset(both, numbers) for numbers in halves)
    if len(kinds) < 2:
        if run.probe:
            raise ValueError(f"--probe {run.probe}: no labels of two classes or more")
        return None
    what = f"{len(fit.numbers)} pictures of {len(kinds)} classes, {len(test.numbers)} others"
    if len(test.numbers) < FEWEST_PROBED:
        few = f"{len(test.numbers)} labelled pictures to measure on, {FEWEST_PROBED} are wanted"
        return run.say(f"probe    left out: {few} (--val-share 0.2, --val-data or --probe DIR)")
    probe, samples = Probe(fit, test, run), run.steps * run.batch_size
    if probe.samples > samples:
        why = f"more than 5 % of a training on {samples:,} samples, {probe.samples:,} are wanted"
        return run.say(f"probe    left out: {why}")
    run.say(f"probe    fitted on {what} to measure on, after each {probe.samples:,} samples")
    return probe


def some_labelled(source, count, kinds=None):
    """(Subset of at most `count` labelled samples, spread over the source; their classes).

    kinds: (k,) the classes to use, or None: all or, where that gives each more samples, fewer:
    then they are as many as get ten.
    """
    total, named = int(source.sizes.sum()), len(source.classes or ())
    numbers = spread(total, 10 * count if 10 * named > count else count)
    labels = all_labels(Subset(source, numbers.tolist()))
    if kinds is None:
        known = labels[labels >= 0]
        kinds = np.unique(known)
        kinds = kinds[:: math.ceil(10 * len(kinds) / count)] if len(known) > count else kinds
    numbers = numbers[np.isin(labels, kinds)]
    return Subset(source, numbers[spread(len(numbers), count)].tolist()), kinds


def spread(total, count):
    """(n,) int64: n = min(count, total) of the numbers below `total`, evenly spaced."""
    n = min(count, total)
    return np.arange(n) * total // max(1, n)
