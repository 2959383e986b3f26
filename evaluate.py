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
import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see mae_pretrain.py

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import data
import model as models

RIDGE = 10.0  # L2 on standardised features: fixed, not tuned
NEIGHBOURS = 10
# Sentences that a class's name is put into (ours).
TEMPLATES = (
    "{}",
    "a {}",
    "the {}",
    "a photo of a {}.",
    "a picture of one {}.",
    "an image of the {}.",
)


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
    share = {"process": process, "processes": processes, "centre": centre, "clips": clips}
    batches = data.Batches(source, size, channels, batch_size, **share)
    total, features = int(source.sizes.sum()), {}
    labels, read = torch.zeros(total, dtype=torch.int64), torch.zeros(total)
    steps = data.loader(batches, range(len(batches)), workers)
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


def few_shot_split(labels, shots, seed):
    """Indices of `shots` samples of each class (all of a class that has fewer), decided by seed."""
    shuffled = torch.from_numpy(data.permutation(len(labels), seed, 0, 0, data.SPLIT))
    return torch.cat([shuffled[labels[shuffled] == c][:shots] for c in labels.unique()])


def print_probe(weights, config, train, test, pool, seed, samples=math.inf, **options):
    """What training gave: ridge top-1 of a trained encoder, of it untrained, and of raw pixels.

    weights are a stage's; the untrained encoder is the one that `seed` initialises. At most 4096
    labels of train; nothing after a training of `samples` that cost less than this.
    """
    if train.classes != test.classes or not train.classes:
        return print("linear probe: left out, for want of labels")
    train = data.Part(train, range(min(4096, int(train.sizes.sum()))))
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
    for batch in data.loader(batches, range(len(batches)), workers=0):
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
    for batch in data.loader(batches, range(len(batches)), workers):
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


# ------------------------------------------------------------------------------- pictures and texts


def open_tokenizer(path, text):
    """The tokenizer of a file (None: bytes) for a text tower with this config ({}: a new one)."""
    tokenizer = data.open_tokenizer(path)
    known, size = text.get("tokenizer"), text.get("vocabulary", tokenizer.vocabulary)
    if known not in (None, tokenizer.identity) or size != tokenizer.vocabulary:
        why = f"the text tower knows {size} tokens{f' of {known}' if known else ''}"
        found = f"{tokenizer.identity} has {tokenizer.vocabulary}"
        raise ValueError(f"{why}, {found}: give its sentencepiece file as --tokenizer")
    return tokenizer


@torch.inference_mode()
def embed_texts(model, texts, tokenizer, device):
    """models.TwoTowers' embeddings (n, S) float32 of a list of texts, on the CPU."""
    context, found = model.config["text"]["context"], []
    for start in range(0, len(texts), 256):
        tokens = tokenizer(texts[start : start + 256], context).to(device)
        found.append(model(tokens=tokens)[1].float().cpu())
    return torch.cat(found)


def retrieval(model, source, tokenizer, **options):
    """{"text_recall_at_1": share of the pictures of which a caption is the most similar one of all
    captions, ..., "image_recall_at_1": share of the captions that find a picture of theirs, ...}.

    Equal captions are one text, which several pictures may answer. Pictures without any are left
    out. options: see extract. Exact, up to ties, which count as wrong.
    """
    function = lambda images: model(model.features(images))[0]
    images, _, numbers = extract({"": function}, source, model.config, **options)
    captions, texts, pairs = data.all_captions(source), {}, []
    for row, number in enumerate(numbers.tolist()):
        for caption in filter(None, map(data.clean, captions[number])):
            pairs.append((row, texts.setdefault(caption, len(texts))))
    if not pairs:
        want = "want .txt or .json (--caption-key) in shards, or --labels (path,caption)"
        raise ValueError(f"no captions in {source.identity}: {want}")
    rows, answers = torch.tensor(pairs).unbind(dim=1)
    kept, rows = rows.unique(return_inverse=True)
    images = images[""][kept]
    found = embed_texts(model, [*texts], tokenizer, options.get("device", "cpu"))
    ranks = {"text": ranks_of(images, found, rows, answers)}
    ranks["image"] = ranks_of(found, images, answers, rows)
    return {
        f"{what}_recall_at_{k}": (rank < k).double().mean().item()
        for what, rank in ranks.items()
        for k in (1, 5, 10)
    } | {"images": len(images), "texts": len(texts)}


def ranks_of(asked, offered, rows, answers):
    """How many wrong answers are at least as similar as the best right one: (n,) for asked (n, S).

    offered (m, S); (rows[i], answers[i]) are the right pairs.
    """
    ranks = torch.zeros(len(asked), dtype=torch.int64)
    for part in torch.arange(len(asked)).split(1024):  # bounds the memory, changes nothing
        similarity, mine = asked[part] @ offered.T, (rows >= part[0]) & (rows <= part[-1])
        right = rows[mine] - part[0], answers[mine]
        best = torch.full((len(part),), -torch.inf)
        best.scatter_reduce_(0, right[0], similarity[right], "amax")
        similarity[right] = -torch.inf
        ranks[part] = (similarity > best[:, None] - 1e-6).sum(dim=1)  # rounding makes no winner
    return ranks


def class_embeddings(model, names, templates, tokenizer, device):
    """(classes, S): of each class the normalised mean of all its names in all the templates.

    names: a list of synonyms for each class (maws repository, eval_zeroshot.py).
    """
    prompts = ((i, t, name) for i, some in enumerate(names) for name in some for t in templates)
    classes, texts = zip(*((i, template.replace("{}", name)) for i, template, name in prompts))
    found = embed_texts(model, texts, tokenizer, device)
    sums = torch.zeros(len(names), found.shape[1]).index_add_(0, torch.tensor(classes), found)
    return F.normalize(sums, dim=1)


def read_lines(path, what):
    """The lines of a text file. ValueError where one is blank."""
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {what} from {path}: {error}") from None
    if "" in lines:
        where = f"line {lines.index('') + 1} is blank"
        raise ValueError(f"{path}: {where}: want one of the {what} in each")
    if not lines:
        raise ValueError(f"{path} is empty: want {what}, one in each line")
    return lines


def read_class_names(path, classes):
    """For each class of the data its names: a list of lists.

    path     a file with a line for each class, in their order: names separated by commas; or, after
             the class (what the data calls it) and a tab, in any order. None: the data's names
    classes  the data's, or None where it only numbers them

    A list without tabs may have more lines than the data has classes: see names_of_list. Classes
    that share their names cannot be told apart: they are counted, and said.
    """
    if not path:
        if not classes:
            raise ValueError("the data does not name its classes: give --classnames")
        lines = [name.replace("_", " ").replace("-", " ") for name in classes]
        return say_same_names("the data", [[line] for line in lines])
    lines, keyed = read_lines(path, "class names"), None
    tabs = ["\t" in line for line in lines]
    if any(tabs) and not all(tabs):
        raise ValueError(f"{path}: line {tabs.index(False) + 1} has no tab, others have one")
    if all(tabs):
        keyed = dict(line.split("\t", 1) for line in lines)
        if len(keyed) < len(lines):
            again = Counter(line.split("\t")[0] for line in lines).most_common(1)[0][0]
            raise ValueError(f"{path} names {again} twice")
        classes = classes or [str(i) for i in range(len(keyed))]
    elif classes and len(lines) != len(classes):
        order = names_of_list(len(lines), classes)
        if not order:
            why = f"{path} has {len(lines)} lines, the data {len(classes)} classes"
            raise ValueError(f"{why}: begin each line with the class's name in the data, and a tab")
        keyed = dict(zip(order, lines))
    elif classes and all(map(str.isdecimal, classes)):
        # Shards that were packed when numbers were sorted as texts list them in that order.
        keyed = dict(zip(data.sort_classes(classes), lines))
    if keyed:
        if missing := [name for name in classes if name not in keyed]:
            raise ValueError(f"{path} has no names for {', '.join(missing[:3])} ({len(missing)})")
        lines = [keyed[name] for name in classes]
    names = [[name.strip() for name in line.split(",") if name.strip()] for line in lines]
    if [] in names:
        raise ValueError(f"{path}: line {names.index([]) + 1} holds no name")
    return say_same_names(path, names)


def say_same_names(where, names):
    """names, a list for each class. Prints those that several classes have: these classes cannot be
    told apart."""
    counts = Counter(", ".join(sorted(set(some))) for some in names)
    if again := [text for text, count in counts.items() if count > 1]:
        print(f"{where}: classes that share their names ({len(again)}): {'; '.join(again[:5])}")
    return names


# Folders of Google's list of 21,843 classes that the 21,841 of ImageNet's fall 2011 release lack.
NOT_IN_FALL_2011 = "n03931044", "n09859684"


def names_of_list(count, classes):
    """Names for `count` classes that came without names, of a head or of a list, so that the data's
    classes can be found among them; None if that cannot be known.

    classes  the data's names, or None where it only numbers its classes

    1. If all of the data's names are numbers below `count`, they are places among the classes,
       from 0.
    2. If they are names of ImageNet's folders (wnids), and it has a list of as many in support/,
       the classes are that list. The data may have some of them only.
    3. If the data has as many classes, they are the same, in the same order.
    """
    numbers = all(map(str.isdecimal, classes or ()))
    places = {int(name): name for name in classes or ()} if numbers else {}
    if numbers and max(places, default=-1) < count:
        if len(places) not in (0, count):
            print(f"{count} classes without names: the data's class N is number N of them, from 0")
        return [places.get(number, str(number)) for number in range(count)]
    size = 21843 if count == 21841 else count  # the latter's classes but two
    path, wnids = Path(__file__).with_name("support") / f"imagenet_{size}.txt.xz", []
    if path.exists():
        try:
            import lzma  # not in every build of Python
        except ImportError as error:
            why = f"{path} cannot be read ({error})"
            raise ValueError(f"{why}: use a Python that was built with lzma") from None
        wnids = lzma.decompress(path.read_bytes()).decode().split()
        wnids = [wnid for wnid in wnids if count == size or wnid not in NOT_IN_FALL_2011]
    known = set(wnids).intersection(classes)
    if known and (len(known) == len(classes) or len(classes) != count):
        print(f"{count} classes without names: taken for ImageNet's, in the order of their wnids")
        return wnids
    if len(classes) == count:
        print(f"{count} classes without names: taken for the data's, in its order")
        return classes
    return None


def read_templates(path):
    lines = read_lines(path, "templates") if path else TEMPLATES
    for number, line in enumerate(lines, 1):
        if "{}" not in line:
            raise ValueError(f"{path}: line {number} has no {{}} for the name of a class: {line!r}")
        if line in lines[: number - 1]:
            raise ValueError(f"{path}: line {number} repeats an earlier one: {line!r}")
    return lines


# ----------------------------------------------------------------------------------------- pictures


def denormalize(images):
    """The inverse of data.normalize: float (B, C, H, W) -> uint8, clipped."""
    statistics = torch.tensor(data.channel_statistics(images.shape[1]), device=images.device)
    mean, deviation = statistics.view(2, 1, -1, 1, 1)
    return ((images * deviation + mean) * 255).round().clamp(0, 255).to(torch.uint8)


@torch.inference_mode()
def draw_reconstructions(model, source, path, count=8, seed=0):
    """Write a PNG, a row per picture: itself, what the encoder sees, what the decoder paints."""
    images = some_pictures(source, model.config, count)
    N, device = model.num_patches, model.cls_token.device
    ids = [data.permutation(N, seed, 0, i, data.MASK) for i in range(len(images))]
    ids = torch.from_numpy(np.stack(ids)).to(device)
    normal = data.normalize(images.to(device))
    painted = denormalize(model.reconstruct(normal, ids)).cpu()
    P, visible = model.patch_size, ids[:, : model.num_visible, None].cpu()
    hidden = torch.ones(len(images), N, 1).scatter(1, visible, 0).expand(-1, -1, P**2)
    hidden = models.unpatchify(hidden, P, model.grid)
    seen = torch.where(hidden > 0, torch.full_like(images, 128), images)  # (B, C, H, W)
    share = model.num_visible / N
    titles = ["picture", f"seen ({share:.0%})", "reconstructed"]
    draw_grid([images, seen, painted], titles, path)


@torch.inference_mode()
def draw_attention(model, source, path, count=8):
    """Write a PNG, a row per picture: itself, and where the class token looks, head by head."""
    images = some_pictures(source, model.config, count)
    normal = data.normalize(images.to(model.cls_token.device))
    attention = model.class_attention(normal).cpu()  # (B, heads, N)
    maps = torch.cat([attention.mean(dim=1, keepdim=True), attention[:, :4]], dim=1)
    maps = maps.unflatten(2, model.grid)
    maps = maps / maps.amax(dim=(2, 3), keepdim=True)
    maps = F.interpolate(maps, images.shape[2:], mode="nearest")  # (B, maps, H, W)
    # Brightness of the picture is the attention; a little is left everywhere to see what is there.
    lit = [(images * (0.15 + 0.85 * m[:, None])).to(torch.uint8) for m in maps.unbind(dim=1)]
    titles = ["picture", "all heads", *(f"head {i + 1}" for i in range(len(lit) - 1))]
    draw_grid([images, *lit], titles, path)


def some_pictures(source, config, count):
    """The readable ones among the first `count` pictures of a source, (B, C, H, W) uint8."""
    size, channels = models.pair(config["image_size"]), config["channels"]
    batch = data.Batches(source, size, channels, count)[0]
    for name in batch["bad"]:
        print(f"unreadable, left out: {name}", file=sys.stderr)
    if not batch["weight"].any():
        raise ValueError(f"no readable picture among the first {count}: {source.identity}")
    return batch["images"][batch["weight"] > 0]


def draw_confusion(table, names, path):
    """Write a PNG of (classes, classes) counts: a row for each true class, darker for more."""
    side, left = max(4, min(36, 1200 // len(names))), 150 if len(names) <= 60 else 6
    image = Image.new("RGB", (left + side * len(names) + 6, left + side * len(names) + 6), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(min(13, side * 2 // 3))
    shares = table / table.sum(dim=1, keepdim=True).clamp(min=1)
    for row, name in enumerate(names if left > 6 else ()):
        y = left + row * side + side // 6
        draw.text((left - 6, y), name[:20], "black", font, anchor="ra")
        label = Image.new("RGB", (left, side), "white")
        ImageDraw.Draw(label).text((6, side // 6), name[:20], "black", font)
        image.paste(label.rotate(90, expand=True), (left + row * side, 0))
    draw.text((6, 6), "rows: truth\ncolumns: answer", "black", ImageFont.load_default(13))
    for (row, column), share in np.ndenumerate(shares.numpy()):
        x, y, grey = left + column * side, left + row * side, int(255 * (1 - share))
        colour = grey, grey, 255 if row != column else grey  # mistakes are blue
        draw.rectangle((x, y, x + side - 1, y + side - 1), colour)
        if side > 24 and table[row, column]:
            centre, colour = (x + side // 2, y + side // 2), "white" if share > 0.5 else "black"
            draw.text(centre, str(int(table[row, column])), colour, font, "mm")
    image.save(path)
    print(f"wrote {path}")


def draw_mistakes(source, lines, config, path):
    """Write a PNG of a source's pictures, each with a line of text below."""
    if not lines:
        return print(f"there are no mistakes: {path} is not written")
    images = some_pictures(source, config, len(lines)).permute(0, 2, 3, 1).numpy()
    side, columns = 224, min(4, len(lines))
    rows = -(-len(lines) // columns)
    canvas = Image.new("RGB", (columns * (side + 6) + 6, rows * (side + 28) + 6), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for i, (pixels, line) in enumerate(zip(images, lines)):
        x, y = 6 + i % columns * (side + 6), 6 + i // columns * (side + 28)
        picture = Image.fromarray(pixels.squeeze()).convert("RGB")
        canvas.paste(ImageOps.pad(picture, (side, side), color="white"), (x, y))
        draw.text((x, y + side + 4), line[:36], "black", font)
    canvas.save(path)
    print(f"wrote {path}")


def draw_grid(columns, titles, path):
    """columns: as many (B, C, H, W) uint8 tensors as titles. Small pictures are enlarged."""
    B, C, H, W = columns[0].shape
    scale, gap, top = max(1, 160 // min(H, W)), 6, 22
    width, height = W * scale + gap, H * scale + gap
    canvas = Image.new("RGB", (len(columns) * width + gap, top + B * height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for x, (column, title) in enumerate(zip(columns, titles)):
        draw.text((gap + x * width, 3), title, fill="black", font=font)
        for y, pixels in enumerate(column.permute(0, 2, 3, 1).numpy()):
            picture = Image.fromarray(pixels[:, :, 0] if C == 1 else pixels).convert("RGB")
            picture = picture.resize((W * scale, H * scale), Image.Resampling.NEAREST)
            canvas.paste(picture, (gap + x * width, top + y * height))
    replaced = " (replaced)" if os.path.exists(path) else ""
    canvas.save(path)
    print(f"wrote {path}{replaced}")


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
        pictures = data.Part(source, numbers[wrong[: run.count]].tolist())
        line = "{} ({:.0%}), is {}".format
        shown = [(names[best[i][0]], found[i, -1], names[min(answers[i])]) for i in wrong]
        lines = [line(*what) for what in shown[: run.count]]
        draw_mistakes(pictures, lines, model.config, run.mistakes)
    return {"top1": top1, "top5": top5, what: len(counted)}


def over_views(model):
    """A function of several views of videos, (b, C, views * T, H, W): the logarithm of the mean of
    a models.VideoClassifier's probabilities, (b, classes)."""

    def scores(clips):
        views = clips.split(model.config["frames"], dim=2)  # one after the other: memory
        return (sum(model(view).float().softmax(dim=1) for view in views) / len(views)).log()

    return scores


def best_five(logits):
    """(b, classes) -> (b, 6): the five best classes (or as many as there are) and the probability
    of the first. Class numbers are exact in float32 up to 2^24."""
    best = logits.float().softmax(dim=1).topk(min(5, logits.shape[1]))
    return torch.cat([best.indices.float(), best.values[:, :1]], dim=1)


class Bordered(data.Part):
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


def task_zeroshot(model, sources, run):
    source, device = sources[-1], run.options["device"]
    tokenizer = open_tokenizer(run.tokenizer, model.config["text"])
    names = read_class_names(run.classnames, source.classes)
    templates, count = read_templates(run.templates), sum(map(len, names))
    print(f"{len(names)} classes, {count} names, {len(templates)} templates, {tokenizer.identity}")
    classes = class_embeddings(model, names, templates, tokenizer, device).to(device)
    function = lambda images: best_five(model(model.features(images))[0] @ classes.T)
    run.options["centre"] = run.val_crop
    found, labels, _ = extract({"": function}, source, model.config, **run.options)
    known = labels >= 0
    if (labels >= len(names)).any():
        raise ValueError(f"there is a label {int(labels.max())}, and names of {len(names)} classes")
    if not known.any():
        raise ValueError(f"no labels in {source.identity}: want class folders or .cls files")
    if not known.all():
        print(f"{int((~known).sum())} pictures without a label are left out")
    hits = found[""][known][:, :-1].long() == labels[known, None]
    top1, top5 = hits[:, 0].double().mean().item(), hits.any(dim=1).double().mean().item()
    measured, chance = f"top-1 {top1:.2%}, top-5 {top5:.2%}", f"(chance {1 / len(names):.2%})"
    print(f"zero-shot {measured} on {len(hits)} pictures {chance}")
    return {"top1": top1, "top5": top5, "pictures": len(hits), "classes": len(names)}


def task_retrieval(model, sources, run):
    tokenizer = open_tokenizer(run.tokenizer, model.config["text"])
    found = retrieval(model, sources[-1], tokenizer, centre=run.val_crop, **run.options)
    print(recall_table(found))
    return found


def recall_table(found):
    """What retrieval found, in lines to read."""
    images, texts = found["images"], found["texts"]
    table = f"{images} pictures, {texts} different captions".ljust(45)
    table += "recall at 1       5      10"
    rows = {
        "a caption of a picture": [found[f"text_recall_at_{k}"] for k in (1, 5, 10)],
        "a picture of a caption": [found[f"image_recall_at_{k}"] for k in (1, 5, 10)],
        "(chance, about)": [min(1, k / max(images, texts)) for k in (1, 5, 10)],
    }
    for title, shares in rows.items():
        table += f"\n  {title:47}" + " ".join(f"{share:7.2%}" for share in shares)
    return table


def task_detect(model, sources, run):
    """COCO's or LVIS's average precision of a detector, or of its results in COCO's format."""
    import detection  # here, so that nothing else loads it, or needs its file

    scenes = sources[-1]
    if model is None:
        found = detection.read_results(run.checkpoint, scenes)
    else:
        names, there = model.config["class_names"], scenes.classes
        if names not in (None, there) or model.classes != len(there):
            known = f"{model.classes}: {', '.join((names or [])[:3])} ..."
            raise ValueError(f"{run.data} has other classes than {run.checkpoint} ({known})")
        found = detection.detect_in(model, scenes, **run.options)
    if distributed()[0] == 0:
        path = run.results
        try:
            if path:
                detection.write_results(path, scenes, found)
                print(f"wrote {path}")
            path = run.out or Path(run.checkpoint).with_name("detections.png")
            print_detection(scenes, found, path, run.count)
        except OSError as error:  # which does not say of a full disk where
            raise ValueError(f"cannot write {path}: {error}") from None
    return detection_numbers(scenes, found)


def detection_numbers(scenes, found):
    """{"bbox_AP": ..., "segm_AP": ...} of detections: see detection.average_precision."""
    import detection

    numbers = {}
    for kind in ("bbox", "segm") if scenes.has_masks else ("bbox",):
        if kind == "bbox" or all(one["masks"] is not None for one in found.values()):
            results = detection.average_precision(scenes, found, kind)
            numbers |= {f"{kind}_{name}": value for name, value in results.items()}
    return numbers


def print_detection(scenes, found, path, count=8):
    """The table of detection_numbers, and a PNG of the first pictures with what was found."""
    import detection

    numbers = detection_numbers(scenes, found)
    kinds = dict.fromkeys(name.split("_")[0] for name in numbers)
    detection.print_table(
        {
            kind: {n.split("_")[1]: v for n, v in numbers.items() if n.startswith(kind)}
            for kind in kinds
        }
    )
    detection.draw_detections(path, scenes, found, range(count))
    print(f"wrote {path}")


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
    "zeroshot": task_zeroshot,
    "retrieval": task_retrieval,
    "detect": task_detect,
}


def load_model(path, task, device, heads=None, image_size=None, entry=None, **of_autoencoder):
    """(model in inference mode, one line on what became of the weights) of a checkpoint.

    heads, image_size, entry: see models.read_weights; positions are resampled to the image_size.
    of_autoencoder: arguments of an MAE that are other than the checkpoint says.
    """
    if task == "detect":
        import detection

        state, config = detection.read_detector(path)
        model = detection.Detector(**config)
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
        model = models.TwoTowers(**pair)
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
        kind = models.VideoClassifier if video else models.Classifier
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
    **dict.fromkeys(("labels", "val_labels"), " ".join(name for name in TASKS if name != "detect")),
    **dict.fromkeys(("classnames", "templates"), "zeroshot"),
    "tokenizer": "zeroshot retrieval",
    "caption_key": "retrieval",
    "out": "features reconstruct attention detect",
    "count": "reconstruct attention classify detect",
    "results": "detect",
    **dict.fromkeys(("seed", "raw_pixels", "mask_ratio"), "reconstruct"),
    **dict.fromkeys(("image_size", "entry"), " ".join(name for name in TASKS if name != "detect")),
}
RANGES = [("val_crop", 0, 1), ("max_bad", 0, 1), ("border", 0, 2**20), ("seed", 0, 2**62)]
RANGES += [("count", 1, 1000), ("batch_size", 1, 2**20), ("clips", 1, 1000), ("span", 0, 1e6)]
RANGES += [("stride", 0, 1e6), ("short_side", 8, 2**16), ("mask_ratio", 0, 1)]


def parse_arguments(argv):
    parser = argparse.ArgumentParser("evaluate.py", description="Metrics.", allow_abbrev=False)
    add = parser.add_argument
    add("--task", required=True, choices=TASKS)
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
        workers = data.loader_workers(run.workers, here)
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
            run.options["clips"] = data.Clips(model.config["frames"], *how)
            run.options["batch_size"] = max(1, run.batch_size // (run.clips * run.crops))
        if run.task == "detect":  # of larger pictures fewer: attention's biases fill the memory
            run.options["batch_size"] = math.ceil(run.batch_size * min(1, 224**2 / math.prod(size)))
        labels = run.labels, run.val_labels
        cache = run.cache_dir, run.cache_size
        data.limit_pixels(run.max_pixels)
        opened = run.data, run.val_data, size, *labels, cache, run.caption_key
        if run.task == "detect":
            import detection

            train, val = None, detection.scenes_to_measure(run.val_data or run.data, size[0])
        else:
            train, val = data.open_sources(*opened, videos=video)
        if val is None and run.task in ("knn", "fewshot"):
            raise ValueError(f"{run.data} has no train/ and val/: give the latter as --val-data")
        result = TASKS[run.task](model, [train, val] if val else [train], run)
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
