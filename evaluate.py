"""Measure what a checkpoint can do: metrics, protocols and pictures, without training.

    python evaluate.py --task knn         --checkpoint runs/mae/model.pt --data DIR
    python evaluate.py --task fewshot     --checkpoint ... --data DIR --shots 1,5,10,all
    python evaluate.py --task classify    --checkpoint runs/classify/model.pt --data DIR
    python evaluate.py --task video       --checkpoint runs/video/model.pt --data DIR
    python evaluate.py --task features    --checkpoint ... --data DIR --out features.npz
    python evaluate.py --task reconstruct --checkpoint ... --data DIR   # what MAE paints
    python evaluate.py --task attention   --checkpoint ... --data DIR   # of the class token
    python evaluate.py --task zeroshot    --checkpoint runs/lit/model.pt --data DIR
    python evaluate.py --task retrieval   --checkpoint runs/lit/model.pt --data 'cap/*.tar'
    python evaluate.py --task detect      --checkpoint runs/detect/model.pt --data COCO_DIR
    python evaluate.py --task curves runs/mae runs/weak                 # loss, lr ... as a PNG

DIR holds train/ and val/, each with a folder for every class. For shards: --data and
--val-data. `--task NAME --help` lists the flags of a task. Each task prints a small table
and, as the last line on stdout, one JSON object.

Results are exact: the same for any batch size and number of processes (torchrun), up to
ties in the last bits of a feature. All random draws come from seeds that are printed.
"""

import argparse
import json
import math
import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see mae_pretrain.py

import numpy as np
import torch
from PIL import ImageOps

from data import MAX_PIXELS, Subset, limit_pixels, normalize, open_sources, pixel_limit
from model import MAE, Classifier, ViT, encoder_config, load_weights, pair, read_weights
from support import flags, launch
from support.flags import fraction, in_folder, make_parser, number, parse_for_task, png
from support.labels import names_of_list, real_answers, right_answers, say_same_names
from support.loader import loader_workers
from support.pictures import draw_attention, draw_confusion, draw_mistakes, draw_reconstructions
from support.probe import (
    NEIGHBOURS,
    RIDGE,
    accuracy,
    check_labels,
    check_unreadable,
    distributed,
    extract,
    few_shot,
    labelled_features,
    named_batches,
    nearest,
    pooled,
    print_probe,
    ridge,
    standardize,
    sum_over_processes,
)


def usual_crop(size):
    """Fraction of a centre crop: 224/256 at 224 pixels (public MAE code), else 1."""
    return 224 / 256 if max(size) == 224 else 1.0


@torch.no_grad()
def masked_loss(model, batches, device):
    """Mean loss of an MAE on a data.Batches, whose crops and masks are always the same.

    Unreadable samples are named and left out. Returns None if all samples are unreadable.
    """
    model.eval()
    sums = torch.zeros(2, device=device)
    for batch in named_batches(batches):
        images, ids, weight = launch.to(device, batch, "images", "ids", "weight")
        losses = model(normalize(images), ids)  # (b,)
        sums += torch.stack([(losses * weight).sum(), weight.sum()])
    model.train()
    loss, weight = sum_over_processes(sums)
    return (loss / weight).item() if weight else None


@torch.no_grad()
def hit_rates(model, batches, device, answers, workers=0, max_bad=1.0, criterion=None,
              constant=None):  # fmt: skip
    """Hit-1 and hit-5 of a classifier on a data.Batches: how often a right class has the
    highest logit, or one of the five highest.

    model    images (b, C, H, W) -> logits (b, classes) or (b, heads, classes)
    answers  key of the right classes in a batch: "labels" (b,), or "tags" (b, answers)
    criterion(logits, answers) gives losses (b,), if their means are wanted
    constant  logits (classes,) to measure as well: a last head that sees no picture

    Returns [(hit-1, hit-5)] of each head, the number of samples that count (readable ones
    with an answer) and [mean loss] of each head. The unreadable ones are named. Raises ValueError
    for labels over the last class, and see check_unreadable. All processes must call it.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.int64, device=device)  # counted, bad, outside
    hits = torch.zeros(1, 2, dtype=torch.int64, device=device)
    losses = torch.zeros(1, device=device)
    for batch in named_batches(batches, workers):
        images, right, weight = launch.to(device, batch, "images", answers, "weight")
        right = right.view(len(images), 1, 1, -1)  # (b, 1, 1, answers), padded with -1
        counts = (weight > 0) & (right >= 0).any(dim=3)[:, 0, 0]  # (b,)
        logits = model(normalize(images))
        logits = logits[:, None] if logits.ndim == 2 else logits  # (b, heads, classes)
        if constant is not None:
            logits = torch.cat([logits, constant.expand_as(logits[:, :1])], dim=1)
        if criterion:
            each = [criterion(head, right.flatten(1)) * counts for head in logits.unbind(dim=1)]
            losses = losses + torch.stack(each).sum(dim=1)  # (heads,)
        best = logits.topk(min(5, logits.shape[2])).indices  # (b, heads, 5)
        found = (best[..., None] == right).any(dim=3) & counts[:, None, None]
        found = torch.stack([found[:, :, 0], found.any(dim=2)], dim=2)  # (b, heads, 2)
        hits = hits + found.sum(dim=0)  # (heads, 2)
        sums[0] += counts.sum()
        sums[1] += len(batch["bad"])
        sums[2] += (right >= logits.shape[2]).sum()
    model.train()
    count, bad, outside = sum_over_processes(sums).tolist()
    hits = sum_over_processes(hits).tolist()
    losses = [loss / max(1, count) for loss in sum_over_processes(losses).tolist()]
    check_unreadable(bad, int(batches.source.sizes.sum()), max_bad)
    if outside:
        raise ValueError(f"{outside} labels are over {logits.shape[2] - 1}, the last class")
    return [(one / max(1, count), five / max(1, count)) for one, five in hits], count, losses


def show_autoencoder(weights, run):
    """Show the result of stage 1: reconstructions and, with labels, the linear probe.
    Unreadable data is reported, and is not fatal."""
    autoencoder = MAE(**run.config).eval()
    last, n = launch.last_metrics(run.out), autoencoder.patch_embed["proj"].weight[0].numel()
    loss, of_means = last.get("held_out_loss") or last.get("loss", 0), 1 - 1 / n  # unbiased
    if run.config["normalize_targets"] and loss > 0.9 * of_means:
        print(f"the loss is {loss:.2f}, predicting the mean of each patch gives {of_means:.2f}.")
        print("Train longer (--steps), with a smaller --batch-size or another --lr, in a new --out")
    autoencoder.load_state_dict(weights)
    options = {"workers": run.workers, "max_bad": run.max_bad, "device": run.device}
    try:
        if run.held_out.sizes.sum():
            draw_reconstructions(autoencoder, run.held_out, run.out / "reconstruction.png")
            sources, samples = (run.source, run.held_out), run.steps * run.batch_size
            print_probe(weights, run.config, *sources, run.seed, samples, **options)
    except (ValueError, OSError) as error:
        print(f"no more is shown: {error}")


# -------------------------------------------------------------------------------------------- tasks
# Each: (model, sources: [train, val] or the only one, arguments, extract) -> {metric: value}.


def knn(model, sources, run, extract):
    x, x_test, y, y_test, classes = train_and_val(model, sources, run, extract)
    votes = nearest(x, y, x_test, classes)
    votes = votes.masked_fill(votes == 0, -torch.inf)
    top1, top5 = (accuracy(votes, y_test, k) for k in (1, 5))
    title = f"knn (k = {NEIGHBOURS}, cosine), {run.pool} pooling"
    print(f"{title}: top-1 {top1:.2%}, top-5 {top5:.2%}")
    return {"top1": top1, "top5": top5}


def fewshot(model, sources, run, extract):
    x, x_test, y, y_test, classes = train_and_val(model, sources, run, extract)
    result = {"top1": {}, "top1_std": {}, "top5": {}}  # each {shots: fraction}
    print(f"ridge (L2 = {RIDGE:g}), {run.pool} pooling; shots are drawn with seeds 0 to 4")
    print("shots     top-1 (std)        top-5")
    for shots in run.shots:
        if shots == "all":
            scores = ridge(x, y, x_test, classes)
            tops = [[accuracy(scores, y_test, k) for k in (1, 5)]]
        else:
            tops = few_shot(x, y, x_test, y_test, classes, int(shots))
        top1, top5 = np.mean(tops, axis=0).tolist()
        std = np.std(tops, axis=0).tolist()[0]
        for name, value in zip(result, (top1, std, top5)):
            result[name][shots] = value
        print(f"{shots:>5}   {top1:7.2%} ({std:.2%})   {top5:7.2%}")
    return result


def train_and_val(model, sources, run, extract):
    """Standardised features of train and of val, their labels, and the number of classes."""
    if len(sources) == 1:
        raise ValueError(f"{run.data} has no train/ and val/: give --val-data or --val-share 0.1")
    if (sources[0].classes is None) != (sources[1].classes is None):
        raise ValueError("--data or --val-data names no classes: they cannot be matched")
    functions = {"": pooled(model, run.pool)}
    features = partial(labelled_features, functions, config=model.config, extract=extract)
    (x, y), (x_test, y_test) = map(features, sources)
    classes = int(max(y.max(), y_test.max())) + 1
    if classes > 1_000_000:
        raise ValueError(f"there is a label {classes - 1}: classes are numbered from 0")
    print(f"{len(y)} train and {len(y_test)} val samples, {classes} classes")
    return *standardize(x[""], x_test[""]), y, y_test, classes


def classify(model, sources, run, extract, scores=None, what="pictures"):
    """Top-1 and top-5 of a classifier's head. An image may have several right classes.

    scores: a function of images -> (b, classes), the model itself by default.
    """
    source = Bordered(sources[-1], run.border) if run.border else sources[-1]
    if run.val_crop is None:
        usual = usual_crop(pair(model.config["image_size"]))
        run.val_crop = model.config.get("val_crop", usual)
        if not run.val_crop:
            print("pictures are squashed, as for the released weights of this size: --val-crop")
    names = model.config.get("class_names")
    if not (names and source.classes or run.label_map or run.real_labels):
        names = names_of_list(model.classes, source.classes)
        if not names:
            raise ValueError(
                f"the model has {model.classes} classes and no names for them, the data has "
                f"{len(source.classes)}: give --label-map"
            )
    say_same_names(run.checkpoint, [[name] for name in names or ()])
    functions = {"": lambda images: best_five((scores or model)(images))}
    found, labels, numbers = extract(functions, source, model.config, centre=run.val_crop)
    best, confidence = found[""][:, :-1].long().tolist(), found[""][:, -1].tolist()
    if run.real_labels:
        files = [source.name(number) for number in numbers.tolist()]
        answers = real_answers(run.real_labels, files, model.classes)
    else:
        labels = labels.tolist()
        answers = right_answers(names, model.classes, source, labels, run.label_map)
    counted = [i for i, right in enumerate(answers) if right]
    check_labels(len(counted), len(answers), source, f"{what} without a right answer")
    wrong = [i for i in counted if best[i][0] not in answers[i]]
    top1 = (len(counted) - len(wrong)) / len(counted)
    top5 = sum(not answers[i].isdisjoint(best[i]) for i in counted) / len(counted)
    print(f"top-1 {top1:.2%}, top-5 {top5:.2%} on {len(counted)} {what}")
    names = model.config.get("class_names") or names or list(map(str, range(model.classes)))
    if run.confusion and distributed()[0] == 0:
        table = torch.zeros(model.classes, model.classes, dtype=torch.int64)
        for i in counted:  # of several right classes: the one found, or the first
            truth = best[i][0] if best[i][0] in answers[i] else min(answers[i])
            table[truth, best[i][0]] += 1
        draw_confusion(table, names, run.confusion)
    if run.mistakes and distributed()[0] == 0:
        wrong = sorted(wrong, key=lambda i: -confidence[i])[: run.count]
        mistakes = Subset(source, numbers[wrong].tolist())
        shown = [(best[i][0], confidence[i], min(answers[i])) for i in wrong]
        draw_mistakes(mistakes, shown, names, model.config, run.mistakes)
    return {"top1": top1, "top5": top5, what: len(counted)}


def video(model, sources, run, extract):
    """Top-1 and top-5 of a video classifier: the mean over several views of a video."""
    from tasks.video import Clips, make_clips, over_views

    views = run.span, run.stride, run.clips, run.crops, False, run.short_side
    make = partial(make_clips, clips=Clips(model.config["frames"], *views))
    batch_size = max(1, run.batch_size // (run.clips * run.crops))
    extract = partial(extract, make=make, batch_size=batch_size)
    return classify(model, sources, run, extract, over_views(model), "videos")


def best_five(logits):
    """(b, classes) -> (b, 6): the five best classes (or as many as there are) and the
    probability of the first. Class numbers are exact in float32 up to 2^24."""
    best = logits.float().softmax(dim=1).topk(min(5, logits.shape[1]))
    return torch.cat([best.indices.float(), best.values[:, :1]], dim=1)


class Bordered(Subset):
    """A source without the outermost pixels of its images (ObjectNet's have a red frame)."""

    def __init__(self, source, border):
        super().__init__(source, range(int(source.sizes.sum())))
        self.border = border

    def read(self, number):
        sample = super().read(number)
        return sample | {"image": lambda: ImageOps.crop(sample["image"](), self.border)}


def features(model, sources, run, extract):
    out = Path(run.out or "features.npz")
    if out.exists():
        raise ValueError(f"{out} exists: choose another --out")
    if run.split == "val" and len(sources) == 1:
        raise ValueError(f"{run.data} has no val/: leave --split out, or say --val-share 0.1")
    source = sources[0 if run.split == "train" else -1]
    functions = {"": pooled(model, run.pool)}
    x, labels, numbers = extract(functions, source, model.config, max_bad=1.0)
    keys = [source.name(number) for number in numbers.tolist()]
    total = int(source.sizes.sum())
    unreadable = [source.name(n) for n in sorted({*range(total)}.difference(numbers.tolist()))]
    arrays = {"features": x[""].numpy(), "keys": keys, "labels": labels.numpy()}
    arrays |= {"classes": np.array(sources[0].classes or [], dtype=str)}
    arrays |= {"unreadable": np.array(unreadable, dtype=str)}
    if distributed()[0] == 0:
        with open(f"{out}.tmp", "wb") as file:
            np.savez(file, **arrays)
        os.replace(f"{out}.tmp", out)
    shapes = ", ".join(f"{name} {np.shape(array)}" for name, array in arrays.items())
    print(f"wrote {out}: {shapes}")
    check_unreadable(len(unreadable), total, run.max_bad)  # after what could be read is written
    return {"samples": len(keys), "width": x[""].shape[1], "out": str(out)}


def reconstruct(model, sources, run, extract):
    path = run.out or Path(run.checkpoint).with_name("evaluate-reconstruct.png")
    print(f"masks are drawn with seed {run.seed}")
    draw_reconstructions(model, sources[-1], path, run.count, run.seed)
    return {"out": str(path)}


def attention(model, sources, run, extract):
    path = run.out or Path(run.checkpoint).with_name("evaluate-attention.png")
    draw_attention(model, sources[-1], path, run.count)
    return {"out": str(path)}


OWN_TASKS = (classify, video, knn, fewshot, features, reconstruct, attention)
OWN_TASKS = {task.__name__: task for task in OWN_TASKS}
TASKS = [*OWN_TASKS, "zeroshot", "retrieval", "detect", "curves"]


def measure(model, sources, run):
    """The results of a task, {metric: value}. Tasks with a file are imported here."""
    options = {"batch_size": run.batch_size, "workers": run.workers}
    options |= {"device": run.device, "max_bad": run.max_bad}
    bound = partial(extract, **options)
    if run.task in OWN_TASKS:
        return OWN_TASKS[run.task](model, sources, run, bound)
    if run.task == "detect":
        from tasks.detect import task_detect

        # Biases of attention grow with the square of the image's area: fewer images fit.
        area = math.prod(pair(model.config["image_size"])) if model else 1
        fitting = math.ceil(run.batch_size * min(1, 224**2 / area))
        run.options = options | {"batch_size": fitting}
        return task_detect(model, sources, run)
    from tasks.lit import recall_table, retrieval, tokenizer_for, zeroshot

    tokenizer = tokenizer_for(run.tokenizer, model.config["text"])
    bound = partial(bound, centre=run.val_crop)
    if run.task == "zeroshot":
        return zeroshot(model, sources[-1], tokenizer, run.classnames, run.templates, bound)
    result = retrieval(model, sources[-1], tokenizer, bound)
    print(recall_table(result))
    return result


# ------------------------------------------------------------------------------------------- models


def load_model(path, task, device, heads=None, image_size=None, entry=None, mask_ratio=None,
               normalize_targets=None):  # fmt: skip
    """Load a checkpoint for a task: (model in inference mode, a line on its weights).

    heads, image_size, entry: see read_weights; positions are resampled to the image_size.
    mask_ratio, normalize_targets: of an MAE, instead of the checkpoint's. The model of a
    .json file of detections is None.
    """
    if task == "detect":
        from tasks.detect import Detector, read_detector

        if str(path).endswith(".json"):
            return None, f"results of {path}"
        state, config = read_detector(path)
        model = Detector(**config)
        model.load_state_dict(state)
        return model.to(device).eval(), f"a detector: {len(state)} tensors loaded"
    state, config = read_weights(path, heads, image_size, entry)
    grid = [side // config["patch_size"] for side in config["image_size"]]
    config |= {"image_size": [*image_size]} if image_size else {}
    if task in ("zeroshot", "retrieval"):
        from tasks.lit import build_towers

        model = build_towers(path, state, config)
    elif task in ("classify", "video"):
        model = build_classifier(path, state, config, task)
    elif task == "reconstruct":
        if "decoder" not in config:
            raise ValueError(f"{path} has no decoder: --task reconstruct needs stage 1's model.pt")
        own = {"mask_ratio": mask_ratio, "normalize_targets": normalize_targets}
        config |= {name: value for name, value in own.items() if value is not None}
        if "normalize_targets" not in config:
            print("targets are taken for normalised patches: if they were not, --raw-pixels")
        model = MAE(**config)
    else:
        model = ViT(**encoder_config(config))
    line = load_weights(model, state, grid, keep_head=isinstance(model, Classifier))
    return model.to(device).eval(), line


def build_classifier(path, state, config, task):
    """A Classifier or VideoClassifier for these weights. ValueError if they are of another."""
    if "head.weight" not in state:
        raise ValueError(f"{path} has no head: --task {task} needs one, finetune.py makes it")
    if (task == "video") != ("frames" in config):
        wanted = "video" if "frames" in config else "classify"
        raise ValueError(f"{path} has a head for --task {wanted}, not {task}")
    kind = Classifier
    if task == "video":
        from tasks.video import VideoClassifier

        kind = VideoClassifier
    names = ("class_names", "frames", "relative_positions")
    arguments = {name: config[name] for name in names if name in config}
    arguments["pool"] = config.get("pool", "mean" if "fc_norm.weight" in state else "cls")
    model = kind(classes=len(state["head.weight"]), **encoder_config(config), **arguments)
    if "val_crop" in config:
        model.config["val_crop"] = config["val_crop"]
    return model


# ------------------------------------------------------------------------------------------ program


def add_flags(parser, task):
    """Add the flags of a task, or without one (None) those that most tasks have."""
    if task == "curves":
        from tasks.curves import add_flags

        return add_flags(parser)
    add = parser.add_argument
    add("--checkpoint", required=True, help="model.pt of any stage, or a public checkpoint")
    add("--data", default="toy", help="folder with train/ and val/, shards, or toy (toy)")
    add("--val-data", help="val images, if --data has train only")
    add("--cache-dir", help="folder for remote shards (among the temporary files)")
    add("--cache-size", default="20G", help="the most that it holds, like 500G (20G)")
    add("--batch-size", type=number(int, 1, 2**20), default=64, help="at once (64)")
    add("--workers", type=int, help="loader processes (the cores left)")
    add("--max-bad", type=fraction, default=0.01, help="unreadable fraction (0.01)")
    add("--max-pixels", type=pixel_limit, default=MAX_PIXELS, help="of an image (89 million)")
    if task != "detect":
        add("--heads", type=int, help="heads of a public checkpoint of unknown size")
        add("--entry", help="of several networks in a file: state_dict_ema, or a prefix")
        add("--image-size", type=pair, help="side or HEIGHTxWIDTH (the checkpoint's)")
        flags.add_val_share(add)
        add("--labels", help="of --data: .csv (path,class), .jsonl, iNaturalist's .json")
        add("--val-labels", help="of val (paths in --val-data or, without it, --data)")
    if task in ("knn", "fewshot", "features"):
        add("--pool", choices=("cls", "mean"), default="mean", help="of the tokens (mean)")
    if task in ("classify", "video", "zeroshot", "retrieval"):
        crop = None if task == "classify" else 1.0
        add("--val-crop", type=fraction, default=crop, help="centre; 0: all, squashed")
    if task == "fewshot":
        from tasks.lowshot import shot_list

        add("--shots", type=shot_list, default="1,5,10,all", help="per class")
    if task == "features":
        add("--split", choices=("train", "val"), help="whose features (val, if there is one)")
        add("--out", type=in_folder, help="a new .npz (features.npz)")
    if task in ("reconstruct", "attention"):
        add("--out", type=png, help=f"a .png (evaluate-{task}.png beside the checkpoint)")
    if task in ("reconstruct", "attention", "classify", "detect"):
        add("--count", type=number(int, 1, 1000), default=8, help="images to draw (8)")
    if task == "reconstruct":
        add("--seed", type=number(int, 0, 2**62), default=0, help="of the masks (0)")
        add("--mask-ratio", type=fraction, help="fraction to hide (the checkpoint's)")
        option = argparse.BooleanOptionalAction
        add("--raw-pixels", action=option, help="MAE's targets (the checkpoint's)")
    if task in ("classify", "video"):
        add("--label-map", help="JSON, class of the data: class of the model, or a list")
        add("--confusion", type=png, help="write the confusion matrix as this PNG")
    if task == "classify":
        add("--border", type=number(int, 0, 2**20), default=0, help="pixels to cut off")
        add("--real-labels", help="ImageNet-ReaL's real.json: several right classes")
        add("--mistakes", type=png, help="write the most confident mistakes as this PNG")
    if task == "video":
        from tasks.video import add_view_flags

        add_view_flags(parser)
        parser.set_defaults(border=0, real_labels=None, mistakes=None)  # as classify
    if task == "detect":
        from tasks.detect import add_result_flags

        add_result_flags(parser)
    if task in ("zeroshot", "retrieval"):
        from tasks.lit import add_text_flags

        add_text_flags(parser, task)


def parse_arguments(argv):
    parser = make_parser("evaluate.py", __doc__.partition("\n")[0])
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.set_defaults(plan=False, gpus=None, precision=None, caption_key="caption")
    run = parse_for_task(parser, TASKS, add_flags, argv)
    if run.task == "video" and run.crops > 1 and run.val_crop == 0:
        parser.error("--val-crop 0 is the whole picture: give --crops 1, too")
    if run.task == "classify" and run.real_labels and run.label_map:
        parser.error("--real-labels says which classes are right: leave --label-map out")
    return run


def open_data(run, size):
    """[train, val], or [the only one], of --data and --val-data."""
    if run.task == "detect":
        from tasks.scenes import open_split

        return [open_split(run.val_data or run.data, "val", size[0])]
    options = {"cache": (run.cache_dir, run.cache_size), "videos": run.task == "video"}
    options["caption_key"] = run.caption_key
    options["val_share"] = run.val_share
    options["labelled"] = run.task not in ("reconstruct", "attention", "retrieval")
    labels = run.labels, run.val_labels
    train, val = open_sources(run.data, run.val_data, size, *labels, **options)
    if not val:
        print(f"{run.data} has no train/ and val/: all of it is used")
    return [train, val] if val else [train]


def main(argv=None):
    run = parse_arguments(argv)
    with launch.report_errors("evaluate.py"):
        launch.place(run)
        if run.process:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (only the first process prints)
        if run.processes > 1 and run.task in ("reconstruct", "attention", "curves"):
            raise ValueError(f"--task {run.task} draws on one process: leave torchrun out")
        if run.task == "curves":
            from tasks.curves import draw_curves

            return print(json.dumps({"task": run.task, **draw_curves(run.runs, run.out)}))
        run.workers = loader_workers(run.workers, run.processes_here)
        launch.begin(run)
        if vars(run).get("raw_pixels") is not None:
            run.normalize_targets = not run.raw_pixels
        names = ("heads", "image_size", "entry", "mask_ratio", "normalize_targets")
        given = {name: vars(run)[name] for name in names if vars(run).get(name) is not None}
        model, line = load_model(run.checkpoint, run.task, run.device, **given)
        print(line)
        limit_pixels(run.max_pixels)
        sources = open_data(run, pair(model.config["image_size"] if model else 128))
        result = measure(model, sources, run)
        print(json.dumps({"task": run.task, **result}))
        launch.end(run)


if __name__ == "__main__":
    main()
