"""Stage 3: what the encoder is worth on labelled pictures. (transfer)

Laptop       python finetune.py --task classify --init runs/weak/model.pt        # toy world
             python finetune.py --task linear   --init runs/weak/model.pt --data DIR
             python finetune.py --task lowshot  --init runs/weak/model.pt --data DIR --shots 1,5,10
             python finetune.py --task lit      --init runs/weak/model.pt        # toy captions
             python finetune.py --task detect   --init runs/mae/model.pt --data COCO_DIR
             python finetune.py --task video    --init runs/weak/model.pt        # toy motion
One node     torchrun --nproc-per-node 8 finetune.py --task classify --init maws.pt --data DIR
Many nodes   torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500
                 finetune.py --task classify --init maws.pt --data 'train/*.tar' --val-data ...
Resume       the same command again: it goes on, exactly, from the last checkpoint in --out

classify  every weight is trained, by the public MAE code's recipe (FINETUNE.md there)
linear    a linear head on the frozen encoder: many learning rates in one pass, the best one chosen
lowshot   K pictures of a class, five draws: prompts in the frozen encoder (VPT, arXiv 2203.12119),
          and logistic regression on its features
detect    boxes and masks: ViTDet's Cascade Mask R-CNN on the same encoder, see tasks/detect.py
lit       a text tower learns to meet the frozen encoder on pairs of picture and caption (LiT, arXiv
          2111.07991): then classes are recognised by their names, see evaluate.py --task zeroshot
video     as classify, of clips: two frames share a token, and positions are relative, too

A task with a file in tasks/ has its flags, data, loss and measurement there; load_task says what
such a file has. What is chosen (a learning rate, a penalty) is chosen on a slice of train, never on val.
"""

import copy
import importlib
import json
import math
import os
import shlex
from functools import partial
from pathlib import Path
from types import SimpleNamespace

# On a CPU, OpenMP's idle threads spin: on two cores, one busy loader process then makes two
# training threads ten times slower than one. Passive ones sleep. Said before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing import errors

import data
import evaluate
import kernels
import model as models
from support import launch
from support.checkpoints import find_checkpoint
from support.formats import inherit
from support.hashtags import WeightedOrder
from support.labels import all_labels, names_of_list
from support.loader import Stop, loader, loader_workers, map_tensors
from support.plan import (
    attention_shapes,
    check_shard_group,
    compiles,
    describe_sharding,
    fitting_batch,
    flops_per_image,
    peak_flops,
    planned_batch,
    print_plan,
    settle_micro_batches,
    settle_sharding,
)
from tasks import augment

# size: (batch size, lr per 256 images, epochs, layer decay, drop path) of classify. B, L and H: the
# public MAE code's FINETUNE.md. What the paper did for 2B and 6.5B is unknown: they get H's.
RECIPES = {
    "B": (1024, 5e-4, 100, 0.65, 0.1),
    "L": (1024, 1e-3, 50, 0.75, 0.2),
    "H": (1024, 1e-3, 50, 0.75, 0.3),
}
RECIPES |= {"2B": RECIPES["H"], "6.5B": RECIPES["H"]}
RECIPES["toy"] = (64, 4e-3, 100, 0.75, 0.0)  # ours
# Heads that linear trains side by side, by lr per 256 images (ours; SWAG's lies among them).
LINEAR_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


# ------------------------------------------------------------------------------------- the dispatch

TASKS = ("classify", "linear", "lowshot", "lit", "video", "detect")


def load_task(name):
    """What belongs to a task alone: a file of tasks/, or a namespace below. It has

    add_flags(groups)  adds the task's flags
    prepare(run)       settles them; returns {name of a setting: its value if it is not given}
    main(run, stage)   builds the model, trains and measures; stage: train, finish and others below

    and perhaps
    LABELS             True: it learns the labels of pictures
    FINETUNES          True: every weight is trained, on augmented pictures
    OF_VIDEOS          True: of videos
    CONFIG             entries of a config that its model knows, beside a ViT's
    SAME               settings that decide the results
    TOY_SIDE           of the toy world's pictures
    open_data(run)     sets run.train and run.val
    read_weights       see support.formats.inherit
    """
    own = {"classify": CLASSIFY, "linear": LINEAR}
    return own.get(name) or importlib.import_module(f"tasks.{name}")


# ---------------------------------------------------------------------------------------- arguments


def parse_arguments(argv):
    parser = launch.make_parser("finetune.py", "Stage 3.")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.set_defaults(plan=False, gpus=None, cuda_graph=False)
    add_common_flags(parser.groups)
    add_flags = lambda parser, task: load_task(task).add_flags(parser.groups)
    run = launch.parse_for_task(parser, TASKS, add_flags, argv)
    if run.data == "":  # of a variable that is not set, say
        launch.fail("finetune.py", "--data is empty: leave it out for the toy world")
    run.out = run.out or Path("runs", run.task)
    return run


def add_common_flags(groups):
    add = groups["data"].add_argument
    add("--data", help="a folder with train/ and val/, tar shards, or toy (toy); see the README")
    add("--val-data", help="the val pictures, where --data holds only those to train on")
    add("--image-size", type=models.pair, help="side or HEIGHTxWIDTH (that of --init)")
    pixels = {"type": data.pixel_limit, "default": data.MAX_PIXELS}
    add("--max-pixels", **pixels, help="of a picture: larger ones are unreadable (89 million)")
    add = groups["model"].add_argument
    add("--init", help="weights to start from: a model.pt or a public checkpoint")
    add("--size", help=f"without --init: {' '.join(models.SIZES)}, or WIDTHxLAYERSxHEADS")
    add = groups["optimisation"].add_argument
    add("--warmup", type=launch.fraction, help="share of the steps (the recipe's)")
    launch.add_length_flags(groups, "(the recipe's; toy: fewer)", "instead of --epochs")
    launch.add_flags(groups, None, "the recipe's", "weights, order and augmentation")


def add_label_flags(groups):
    """Add the flags of tasks that learn the labels of pictures or videos."""
    launch.add_label_flags(groups)
    add = groups["data"].add_argument
    add("--classes", type=launch.count, help="how many, where the data does not name them")


def add_classify_flags(groups):
    add_label_flags(groups)
    augment.add_flags(groups)
    launch.add_plan_flags(groups)
    launch.add_resume_flags(groups)
    groups["model"].add_argument(
        "--keep-head", action="store_true", help="start from the head in --init, too"
    )


def add_linear_flags(groups):
    add_label_flags(groups)
    launch.add_resume_flags(groups)
    groups["optimisation"].add_argument(
        "--batch-norm", action="store_true", help="normalise features by batches, as MAE"
    )


# ------------------------------------------------------------------------------------- preparation


def prepare(run):
    """Settle what the arguments leave open, and open the data. ValueError says what is unusable."""
    # ------------------------------------------------------------------------------------ runtime
    task, kind = load_task(run.task), launch.place(run)
    check_shard_group(run)
    kernels.forced()  # a wrong ATTENTION in the environment is found here, not after loading
    run.compile = compiles(kind) if run.compile is None else run.compile
    run.workers = loader_workers(run.workers, run.processes_here)

    # ------------------------------------------------------------------------------------ weights
    names, run.given_size = ("size", "patch_size", "image_size"), run.image_size
    given = {name: getattr(run, name) for name in names if getattr(run, name) is not None}
    if hasattr(task, "TOY_SIDE") and run.data in (None, "toy") and run.size in (None, "toy"):
        given.setdefault("image_size", task.TOY_SIDE)
    if not run.init:
        side = 48 if run.size in (None, "toy") else 224
        given = {"size": "toy", "image_size": side, "channels": 3, **given}
    names += ("channels", "positions", "norm_eps", "class_names", "pool")
    names += getattr(task, "CONFIG", ())
    read = getattr(task, "read_weights", models.read_weights)
    run.weights, run.config, run.origin = inherit(
        run.init, given, names, run.heads, read, run.entry
    )
    run.classes_of_head = run.config.pop("class_names", None)
    run.pool_of_init = run.config.pop("pool", None)
    run.image_size = models.pair(run.config["image_size"])
    data.check_channels(run.config["channels"])

    # --------------------------------------------------------------------------------------- data
    data.limit_pixels(run.max_pixels)
    getattr(task, "open_data", open_pictures)(run)
    run.toy = run.train.endless and run.config["size"] == "toy"  # then toy recipes hold
    run.finetunes, run.clips, run.weighting = getattr(task, "FINETUNES", False), None, {}
    if getattr(task, "LABELS", False):
        prepare_labels(run)

    # --------------------------------------------------------------------------------- the recipe
    recipe = {"pool": "cls", "val_crop": evaluate.usual_crop(run.image_size), **task.prepare(run)}
    batch_size, epochs = recipe.pop("batch_size"), recipe.pop("epochs")
    for name, value in recipe.items():
        if getattr(run, name, None) is None:
            setattr(run, name, value)
    run.batch_size = run.batch_size or planned_batch(batch_size, run)
    if run.batch_size % 2:
        raise ValueError(f"--batch-size {run.batch_size}: want an even number (mixup needs pairs)")
    if "lr_per_256" in recipe:
        run.lr = run.lr or recipe["lr_per_256"] * run.batch_size / 256
    samples = int(run.train.sizes.sum())
    run.epochs = run.epochs or (run.samples or epochs * samples) / samples
    run.given_steps = run.steps
    run.steps = run.steps or math.ceil(run.epochs * samples / run.batch_size)

    # ------------------------------------------------------------------------- what is the same run
    same = ("task", "batch_size", "epochs", "warmup", "seed", "precision", "pool", "val_crop")
    same += ("min_crop", "classes", *task.SAME)
    run.identity = {"stage": "finetune", "data": run.train.identity, "val": run.val.identity}
    run.identity |= {"model": run.config, "init": run.origin}
    run.identity |= {name: getattr(run, name, None) for name in same}
    usual = run.max_pixels == data.MAX_PIXELS  # as in runs from before there was this flag: None
    run.identity["max_pixels"] = None if usual else run.max_pixels
    # A head that was learned when numbers were sorted as texts must not go on with other labels.
    # (Other classes may be in any order: the toy world's are.)
    classes = run.train.classes or []
    by_number = classes != sorted(classes) and all(map(str.isdecimal, classes))
    if by_number and getattr(task, "LABELS", False):
        run.identity["class_order"] = "by number"
    run.identity = json.loads(json.dumps(run.identity))  # as it will be read again


def open_pictures(run):
    """Open the pictures or videos of a run: run.train and run.val."""
    run.train, run.val = data.open_sources(
        run.data or "toy",
        run.val_data,
        run.image_size,
        run.labels,
        run.val_labels,
        cache=(run.cache_dir, run.cache_size),
        caption_key=getattr(run, "caption_key", "caption"),
        videos=getattr(load_task(run.task), "OF_VIDEOS", False),
    )


def prepare_labels(run):
    """The classes of the data, and what is held out of it, for the tasks that learn labels."""
    named = len(run.train.classes or ())
    if named and run.classes not in (None, named):
        raise ValueError(f"--classes {run.classes}: {run.data} names {named}")
    run.classes = named or run.classes
    if not run.classes:
        raise ValueError(
            f"{run.data} names no classes (two folders or more): give --classes, how many, "
            "or --labels"
        )
    if run.classes < 2:
        raise ValueError(f"{run.data} has one class only: there is nothing to tell apart")
    if run.val is None:
        lacks = f"{run.data} has no train/ and val/"
        lacks = "--labels lists no val pictures" if run.labels else lacks
        raise ValueError(f"{lacks}: give --val-data or --val-labels")
    if (run.train.classes is None) != (run.val.classes is None):
        raise ValueError(
            "one of train and val names its classes, the other does not: "
            f"{run.train.identity}; {run.val.identity}"
        )
    if run.val.endless:
        run.val = data.Subset(run.val, range(1024))
        run.train = run.train if run.finetunes else data.Subset(run.train, range(16_384))
    if not run.finetunes:  # what is chosen is chosen on a slice of train
        run.train, run.slice = data.hold_out(run.train, None, 10_000)
        if not run.slice.sizes.any():
            raise ValueError("train is too small: a twentieth of it is needed to choose on")
    if not run.plan:  # else it would be found after a tenth of the training
        labels = all_labels(run.val)
        if not (labels >= 0).any():
            raise ValueError(f"no labels in {run.val.identity}")
        if (labels >= run.classes).any():
            raise ValueError(f"labels of val are over {run.classes - 1}, the last class")


def keep_head(run):
    """Make the head in --init one for the data's classes, in their order: in run.weights."""
    if not run.weights or "head.weight" not in run.weights[0]:
        raise ValueError("--keep-head: there is no head in --init")
    state, grid = run.weights
    count, wanted = len(state["head.weight"]), run.train.classes
    wanted = wanted or list(map(str, range(run.classes)))
    names = run.classes_of_head or names_of_list(count, wanted) or []
    if names != wanted:  # some of the head's, or in another order
        for name in wanted:
            if names.count(name) != 1:
                raise ValueError(
                    "--keep-head: the head in --init is for other classes than the data's "
                    f"({names.count(name)} of its {count} classes are called {name}, and one is "
                    "needed): leave --keep-head out"
                )
        places = dict(zip(names, range(count)))
        rows = [places[name] for name in wanted]
        head = {name: state[name][rows] for name in ("head.weight", "head.bias")}
        run.weights = {**state, **head}, grid
        run.say(f"--keep-head: the data has {len(rows)} of the head's {count} classes")
    pool = run.pool_of_init or ("mean" if "fc_norm.weight" in state else "cls")
    if run.pool not in (None, pool):
        raise ValueError(f"--keep-head: the head in --init reads --pool {pool}")
    run.pool = pool


# -------------------------------------------------------------------------------- models, optimizer


def layer_groups(model, weight_decay, layer_decay, floor=0.0, all_decayed=False):
    """Parameter groups with lr_scale = layer_decay ^ (layers + 1 - layer), at least `floor`.

    As the public MAE code: layer 0 is the patch embedding, the class token and the positions, block
    i is layer i + 1, the last norm and the head are layers + 1. 1-D parameters, tokens and
    positions are not decayed (nor are relative ones in MViT's code), unless all_decayed.
    """
    groups, first = {}, ("cls_token", "pos_embed", "time_embed")
    for name, parameter in model.named_parameters():
        layer, name = model.layers + 1, name.removeprefix("trunk.")
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        elif name in first or name.startswith("patch_embed."):
            layer = 0
        decayed = parameter.ndim > 1 and name not in first and ".rel_pos_" not in name
        decay = weight_decay if decayed or all_decayed else 0
        group = {"params": [], "weight_decay": decay}
        group["lr_scale"] = max(floor, layer_decay ** (model.layers + 1 - layer))
        if parameter.requires_grad:
            groups.setdefault((layer, decay), group)["params"].append(parameter)
    return list(groups.values())


def adamw(groups, run):
    """AdamW with the betas of all recipes here; each group starts at the peak lr."""
    groups = [{**group, "initial_lr": run.lr} for group in groups]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=run.device.type != "mps")


def classifier(run):
    """The models.Classifier of a run, or video's, on the meta device: shapes without memory."""
    task = load_task(run.task)
    kind, head_std = getattr(task, "CLASSIFIER", models.Classifier), getattr(task, "HEAD_STD", 2e-5)
    names = {"classes": run.classes, "class_names": run.train.classes, "head_std": head_std}
    drop_path = run.drop_path if run.finetunes else 0.0
    with torch.device("meta"):
        return kind(pool=run.pool, drop_path=drop_path, **names, **run.config)


def build_trunk(run):
    """The same on the CPU, with the weights of --init."""
    model = classifier(run).to_empty(device="cpu")
    models.initialize(model, run.seed)
    if run.weights:
        kept = run.task == "classify" and run.keep_head
        run.say(models.load_weights(model, *run.weights, keep_head=kept))
    return model


# ----------------------------------------------------------------------------------------- training


def learn_labels(run, model, micro_batches, totals):
    """Backward through a step's batches of labelled pictures: see train."""
    for batch in micro_batches:
        readable, labels, numbers = batch["weight"], batch["labels"], batch.get("numbers")
        labels = torch.where((readable > 0) & (labels < run.classes), labels, -1)
        images, share, noise = data.normalize(batch["images"]), torch.ones_like(readable), None
        if run.finetunes:
            images, share = augment.mix(images, readable, numbers, run.mixup, run.cutmix)
            noise = numbers[:, augment.MIX_DRAWS :].unflatten(1, (-1, 2))  # (b, L, 2)
        logits = model(images, noise)
        logits = logits[:, None] if logits.ndim == 2 else logits  # (b, heads, classes)
        smoothing = run.smoothing if run.finetunes else 0.0
        losses, weights = augment.label_loss(logits, labels, share, smoothing)
        loss = losses.sum() / run.batch_size
        (loss * run.processes).backward()  # gradients are averaged over the processes
        totals.add(loss.detach(), weights.sum(), batch["bad"], (labels < 0).sum())


def check_micro_batches(run):
    """Raise ValueError where micro-batches are not whole parts of a process's part of a batch."""
    part, whole = run.batch_size // run.processes, getattr(run, "batch_norm", False)
    fits = part == run.micro_batch if whole else part % run.micro_batch == 0
    if not fits or run.micro_batch % 2:
        wanted = "all of it with --batch-norm" if whole else "an even divisor"
        raise ValueError(f"--micro-batch {run.micro_batch} of a process's {part}: want {wanted}")


def train(run, model, optimizer, make, flops, learn=learn_labels, measure=None, methods=(),
          schedule=None, clip=None, nothing="label"):  # fmt: skip
    """Train a model on run.train; True when it came to its end, False when a signal stopped it.

    Checkpoints and metrics.jsonl are in run.out, where the same call goes on.

    optimizer  function of the model; its groups have an initial_lr and may have an lr_scale
    make       see data.Batches
    flops      of a training step, for an image
    learn      (run, model, micro_batches, totals): backward through a step's batches, which come
               one by one, on the device; their sums go into totals (launch.Totals)
    measure    function of the model: what is logged with every save
    methods    of the model that are called from outside, see models.parallelize
    schedule   (step, steps, warmup) -> a share of the peak lr
    clip       the largest norm of the gradient
    nothing    what a sample of no use lacks, in words
    """
    # --------------------------------------------------------------------------------------- data
    run, device = copy.copy(run), run.device  # what is settled here is this training's own
    kind = partial(WeightedOrder, **run.weighting) if run.weighting else data.Order
    order = kind(run.train.sizes, run.seed, run.lanes)
    trunk = getattr(model, "trunk", model)
    run.shard_group = settle_sharding(trunk, run)
    if not run.micro_batch:
        part = run.batch_size // run.processes
        # Batch statistics are those of the whole batch: it must not come in pieces.
        whole = getattr(run, "batch_norm", False)
        run.micro_batch = part if whole else fitting_batch(trunk, part, run)
    dealt = {"process": run.process, "processes": run.processes, "order": order}
    run.micro_batches = run.batch_size // run.processes // run.micro_batch
    dealt |= {"seed": run.seed, "micro_batches": run.micro_batches}
    dataset = data.Batches(run.train, make, run.batch_size, **dealt)
    check_micro_batches(run)
    run.save_every = run.save_every or min(1000, math.ceil(run.steps / 10))

    # -------------------------------------------------------------------------------- parallelize
    model = model.to(device)
    parallel = models.parallelize(  # what the step calls: the model, or DDP around it
        model,
        device,
        run.shard_group,
        precision=run.precision,
        compile=run.compile,
        checkpoint_activations=run.checkpoint_activations,
        methods=methods,
    )
    optimizer = optimizer(model)

    attention = None
    if run.task not in ("lowshot", "detect"):  # prompts make other shapes, detect has biases
        shapes = attention_shapes(trunk)
        attention = kernels.describe(shapes, device, run.precision)

    # ------------------------------------------------------------------------------------- resume
    run.identity = {**run.identity, "lanes": order.lanes, "samples": run.train.identity}
    run.identity["steps"] = run.steps
    run.checkpoint = find_checkpoint(run.out, run.resume, run.identity)
    record = launch.resume(run, model, optimizer)

    # ------------------------------------------------------------------------------ what is trained
    peak, chip = peak_flops(device)
    millions = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    size = f"{run.config['size']}, {millions:.2f} M weights to train"
    run.say(f"data     {run.train.identity}")
    run.say(f"model    {size}, {flops / 1e9:.2f} GFLOP an image")
    shares = f"{run.processes} processes x {run.micro_batches} x {run.micro_batch}"
    run.say(f"batch    {run.batch_size}: {shares}")
    spread = describe_sharding(trunk, run)
    # The memory in it is that of a trunk of which every weight is trained.
    run.say(f"parallel {spread if run.finetunes else spread.split(' (')[0]}")
    if attention:
        run.say(f"attention {attention}")
    how = run.precision + (", compiled in the first step" if run.compile else "")
    run.say(f"run      {run.steps} steps, {how} on {chip}")

    # --------------------------------------------------------------------------------------- loop
    stop = Stop()  # signals from here on: the loop saves and ends
    progress = launch.Progress(run, record, ["bad", "unlabelled"], flops, peak)
    numbers = range(progress.done * run.micro_batches, run.steps * run.micro_batches)
    batches = iter(loader(dataset, numbers, run.workers, pin=device.type == "cuda"))
    to_device = partial(torch.Tensor.to, device=device, non_blocking=True)

    def micro_batches():
        for number in range(run.micro_batches):
            batch = progress.wait_for(batches)
            with models.sync_gradients(parallel, last=number == run.micro_batches - 1):
                yield map_tensors(to_device, batch)

    model.train()
    schedule = schedule or cosine
    for step in range(progress.done, run.steps):
        share = schedule(step, run.steps, run.warmup)
        # MAE's recipe ends at 1e-6.
        floor = 1e-6 if run.finetunes and step >= run.warmup * run.steps else 0.0
        for group in optimizer.param_groups:
            lr = floor + share * (group["initial_lr"] - floor)
            group["lr"] = lr * group.get("lr_scale", 1.0)
        lr = optimizer.param_groups[-1]["lr"]

        totals = launch.Totals(device)
        learn(run, parallel, micro_batches(), totals)

        # The one host read of a step, after backward and before the optimizer.
        gradients = [models.local(p.grad) for p in model.parameters() if p.grad is not None]
        totals.read(gradients, run.batch_size, stop, run.processes // (run.shard_group or 1))
        if totals.lacking:  # a process has got no batch: this step is not taken
            progress.lacking = not totals.stopping
            break
        progress.count(totals, unlabelled=totals.unknown - totals.new_bad)
        counts = progress.counts
        what = f"of {progress.done * run.batch_size} pictures {counts['bad']} cannot be read and "
        what += f"{counts['unlabelled']} have no {nothing}"
        progress.check(dataset, sum(counts.values()), what)
        launch.guard(model, run, step, totals, lr)
        if clip:
            totals.clip(gradients, clip)
        optimizer.step()
        optimizer.zero_grad()
        gradients = None  # as a list it would keep them all through the next step

        if progress.stepped():
            facts = {"loss": totals.loss, "lr": lr, "grad_norm": totals.norm}
            if progress.saving and measure:
                facts |= launch.unless_lacking(stop, measure, model) or {}
            progress.log(facts, SHOWN)
        if progress.saving:
            progress.save(model, optimizer)
        if totals.stopping:
            break
    return progress.finish(model, optimizer, stop)


def cosine(step, steps, warmup):
    """Linear warm-up, whose first step is not 0, then half a cosine to 0, step by step: a share."""
    if step < warmup * steps:
        return (step + 1) / (warmup * steps + 1)
    return 0.5 * (1 + math.cos(math.pi * (step / steps - warmup) / (1 - warmup)))


# Metric: how the step line shows it.
SHOWN = {"bad": "bad {}", "unlabelled": "unlabelled {}"}
SHOWN |= {"top1": "top-1 {:.1%}", "top5": "top-5 {:.1%}"}
SHOWN |= {"bbox_AP": "box AP {:.1%}", "bbox_AP50": "box AP50 {:.1%}"}
SHOWN |= {"segm_AP50": "mask AP50 {:.1%}", "text_recall_at_1": "text recall@1 {:.1%}"}
SHOWN |= {"image_recall_at_1": "picture recall@1 {:.1%}"}


# -------------------------------------------------------------------------------------------- tasks


def sample_maker(run, **how):
    """make for data.Batches of labelled pictures or clips. how: see evaluate.labelled."""
    how |= {"size": run.image_size, "channels": run.config["channels"]}
    if run.clips:
        return partial(load_task(run.task).make_clips, clips=run.clips, **how)
    return partial(evaluate.labelled, **how)


def measured(run, model, source):
    """([(top-1, top-5)] of each of a model's heads, pictures that count): exact, see evaluate.py"""
    eval_batch = 2 * run.processes * (4 if run.clips else 32)
    make = sample_maker(run, centre=run.val_crop)
    batches = data.Batches(source, make, eval_batch, run.process, run.processes)
    options = run.device, "labels", run.workers, run.max_bad
    rates, count = evaluate.hit_rates(model, batches, *options)
    if not count:
        raise ValueError(f"no labels in {source.identity}")
    return rates, count


def prepare_classify(run):
    if run.keep_head:
        keep_head(run)
    names = "batch_size", "lr_per_256", "epochs", "layer_decay", "drop_path"
    recipe = dict(zip(names, RECIPES.get(run.config["size"], RECIPES["B"])))  # others: unsure
    recipe |= {"warmup": 5 / recipe["epochs"], "weight_decay": 0.05, "pool": "mean"}
    if run.toy:
        recipe |= {"epochs": 0.4, "warmup": 0.05}  # of 65,536 pictures
    recipe |= augment.recipe(run)
    return recipe


def classify(run, stage):
    run.config["positions"] = "learned"  # as the public MAE code: they are trained from here on
    if run.plan:
        run.model, part = classifier(run), run.batch_size // run.processes
        run.shard_group = settle_sharding(run.model, run)
        run.micro_batch = run.micro_batch or fitting_batch(run.model, part, run)
        check_micro_batches(run)
        settle_micro_batches(run, run.model)
        # As it would be: else a ValueError.
        data.Batches(run.train, None, run.batch_size, run.process, run.processes)
        return print_plan(run)
    finetune(run)


def finetune(run, operations=2):
    """Train every weight of a classifier, of pictures or of clips, and measure it.

    operations: of RandAugment.
    """
    model = build_trunk(run)
    config = model.config
    measure = lambda model: dict(zip(("top1", "top5"), measured(run, model, run.val)[0][0]))
    optimizer = lambda model: adamw(layer_groups(model, run.weight_decay, run.layer_decay), run)
    make = augment.maker(run, sample_maker, model.layers, operations)
    if not train(run, model, optimizer, make, 3 * flops_per_image(model), measure=measure,
                 nothing=f"label from 0 to {run.classes - 1}"):  # fmt: skip
        return
    ((top1, top5), *_), count = measured(run, model, run.val)
    weights = models.full_state(model)  # every process takes part
    what = "videos, a clip of each" if run.clips else "pictures"
    run.say(f"top-1 {top1:.2%}, top-5 {top5:.2%} on {count} {what}")
    flags = names_given(run, *(("span", "stride", "short_side") if run.clips else ()))
    finish(run, weights, config, {"top1": top1, "top5": top5}, run.task, flags)


CLASSIFY = SimpleNamespace(
    add_flags=add_classify_flags,
    prepare=prepare_classify,
    main=classify,
    LABELS=True,
    FINETUNES=True,
    SAME=("keep_head", *augment.SAME),
)


def prepare_linear(run):
    recipe = RECIPES.get(run.config["size"], RECIPES["B"])
    # SWAG's linear head (torchvision's pull request 5793): 28 epochs, warm-up not known. Toy: of
    # 15,564 pictures.
    epochs, warmup = (2, 0.05) if run.toy else (28, 0.0)
    crop = 0.5 if run.toy else 0.08
    return {"batch_size": recipe[0], "epochs": epochs, "warmup": warmup, "min_crop": crop}


def linear(run, stage):
    trunk = build_trunk(run)
    config = trunk.config
    model = Probes(trunk, len(LINEAR_RATES), run.batch_norm, run.seed)
    if run.batch_norm:
        run.say(
            "batch norm: the statistics are the whole batch's, unreadable pictures as zeros in them"
        )

    def optimizer(model):
        rates = [rate * run.batch_size / 256 for rate in LINEAR_RATES]
        groups = [
            {"params": [*head.parameters()], "initial_lr": rate}
            for head, rate in zip(model.heads, rates)
        ]
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)

    flops = flops_per_image(trunk)  # no backward through it
    make = sample_maker(run, min_crop=run.min_crop)
    nothing = f"label from 0 to {run.classes - 1}"
    if not train(run, model, optimizer, make, flops, nothing=nothing):
        return
    (chosen_by, some), (on_val, count) = (measured(run, model, on) for on in (run.slice, run.val))
    best = max(range(len(LINEAR_RATES)), key=lambda head: chosen_by[head])
    run.say(f"lr per 256   top-1 on {some} of train   on val")
    for head, rate in enumerate(LINEAR_RATES):
        mark = "  <- chosen on train" if head == best else ""
        run.say(f"{rate:10g}   {chosen_by[head][0]:18.2%}   {on_val[head][0]:6.2%}{mark}")
    (top1, top5), weights = on_val[best], models.full_state(model)
    run.say(f"top-1 {top1:.2%}, top-5 {top5:.2%} on {count} pictures")
    if run.process == 0:
        weights = model.classifier_state(weights, best)
    result = {"top1": top1, "top5": top5, "lr_per_256": LINEAR_RATES[best]}
    finish(run, weights, config, result, "classify", names_given(run))


LINEAR = SimpleNamespace(
    add_flags=add_linear_flags,
    prepare=prepare_linear,
    main=linear,
    LABELS=True,
    SAME=("batch_norm",),
)


class Probes(nn.Module):
    """Linear heads side by side on the frozen features of a models.Classifier, one for each lr.

    batch_norm: features are first normalised over the batch, over all processes, without affine
    (MAE's linear probe, eps 1e-6); in inference by running averages (momentum 0.1).
    """

    def __init__(self, trunk, heads, batch_norm, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = 0.01 * torch.randn(trunk.classes, trunk.width, generator=generator)
        self.heads = nn.ModuleList(nn.Linear(trunk.width, trunk.classes) for _ in range(heads))
        with torch.no_grad():
            for head in self.heads:
                head.weight.copy_(weight)
                head.bias.zero_()
        self.trunk, self.batch_norm = trunk.requires_grad_(False), batch_norm
        self.register_buffer("mean", torch.zeros(trunk.width))
        self.register_buffer("variance", torch.ones(trunk.width))

    def forward(self, images, noise=None):
        """(B, C, H, W) -> logits (B, heads, classes)."""
        with torch.no_grad():
            x = self.trunk.features(images).float()  # (B, D)
            mean, variance = self.mean, self.variance
            if self.batch_norm and self.training:
                count = len(x) * evaluate.distributed()[1]
                mean = over_processes(x.sum(dim=0)) / count
                variance = over_processes((x - mean).square().sum(dim=0)) / count
                self.mean.lerp_(mean, 0.1)
                self.variance.lerp_(variance * count / (count - 1), 0.1)
            x = (x - mean) / (variance + 1e-6).sqrt() if self.batch_norm else x
        return torch.stack(
            [F.linear(x, head.weight.float(), head.bias.float()) for head in self.heads], dim=1
        )

    def classifier_state(self, state, head):
        """The state of a models.Classifier that does what one of the heads does."""
        weight, bias = state[f"heads.{head}.weight"], state[f"heads.{head}.bias"]
        if self.batch_norm:
            weight = weight / (state["variance"] + 1e-6).sqrt()
            bias = bias - weight @ state["mean"]
        trunk = {n.removeprefix("trunk."): t for n, t in state.items() if n.startswith("trunk.")}
        return trunk | {"head.weight": weight, "head.bias": bias}


def over_processes(sums):
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums


# ---------------------------------------------------------------------------------------------- end


def names_given(run, *names):
    """Flags of evaluate.py for the same data as this run's."""
    flags = []
    for name in ("val_data", "labels", "val_labels", *names):
        if (given := getattr(run, name, None)) is not None:
            flags += [f"--{name.replace('_', '-')}", str(given)]
    usual = 1.0 if run.clips else evaluate.usual_crop(run.image_size)
    if hasattr(run, "val_crop") and run.val_crop != usual:
        flags += ["--val-crop", str(run.val_crop)]
    return flags


def finish(run, weights, config, result, next_task, flags):
    """Hand over model.pt, and say what to type next: a task of evaluate.py with these flags."""
    if run.process == 0:
        models.save_weights(run.out / "model.pt", weights, config)
        print(f"wrote {run.out / 'model.pt'}")
        flags = ["--checkpoint", str(run.out / "model.pt"), "--data", run.data or "toy", *flags]
        if run.max_pixels != data.MAX_PIXELS:
            flags += ["--max-pixels", str(run.max_pixels)]
        print(f"next: python evaluate.py --task {next_task} {shlex.join(flags)}")
        print(json.dumps({"task": run.task, **result}))


# What tasks/ need of this file: it is handed to their main().
STAGE = SimpleNamespace(
    train=train,
    finetune=finetune,
    finish=finish,
    names_given=names_given,
    layer_groups=layer_groups,
    adamw=adamw,
    build_trunk=build_trunk,
    sample_maker=sample_maker,
    measured=measured,
    extract=evaluate.extract,
    accuracy=evaluate.accuracy,
)


@errors.record  # torchrun shows the traceback of the process that failed first
def main(argv=None):
    run = parse_arguments(argv)
    with launch.report_errors("finetune.py"):
        prepare(run)
        if not run.plan:
            launch.begin(run)
        load_task(run.task).main(run, STAGE)
        launch.end(run)


if __name__ == "__main__":
    main()
