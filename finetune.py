"""Stage 3: transfer. The pretrained encoder learns a task with labels and is measured.

Laptop       python finetune.py --task classify --init runs/weak/model.pt    # toy world
             python finetune.py --task linear   --init runs/weak/model.pt --data DIR
             python finetune.py --task lowshot  --init runs/weak/model.pt --data DIR
             python finetune.py --task lit      --init runs/weak/model.pt    # toy captions
             python finetune.py --task detect   --init runs/mae/model.pt --data COCO_DIR
             python finetune.py --task video    --init runs/weak/model.pt    # toy motion
One node     torchrun --nproc-per-node 8 finetune.py --task classify --data DIR ...
Many nodes   torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d
                 --rdzv-endpoint HOST:29500 finetune.py --task classify
                 --init maws.pt --data 'train/*.tar' --val-data 'val/*.tar'
Resume       the same command again continues, exactly, from the last checkpoint in --out

classify  trains every weight by the public MAE code's recipe (FINETUNE.md there)
linear    trains linear heads on the frozen encoder, one per learning rate, in one pass
lowshot   fits K pictures of each class, in five draws: prompts in the frozen encoder
          (VPT, arXiv 2203.12119), and logistic regression on its features
detect    finds boxes and masks: ViTDet's Cascade Mask R-CNN on the same encoder
lit       trains a text tower beside the frozen encoder on pictures and captions (LiT,
          arXiv 2111.07991); evaluate.py --task zeroshot then names classes
video     classifies clips: two frames share a token, and positions are also relative

classify and linear are below, the others in tasks/. load_task says how to add one. Every
choice (a learning rate, a penalty) is made on a slice of the training data, never on val.
"""

import copy
import importlib
import json
import math
import os
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path

# Before torch is loaded: see mae_pretrain.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing import errors

import data
import evaluate
import kernels
import model as models
from support import flags, launch
from support.checkpoints import find_checkpoint
from support.formats import inherit
from support.labels import all_labels, reorder_head, settle_classes
from support.loader import Stop, loader, loader_workers, map_tensors
from support.pictures import draw_step
from support.plan import (
    attention_shapes,
    compiles,
    describe_sharding,
    flops_per_image,
    peak_flops,
    print_plan,
    settle_batch,
)
from support.probe import distributed, labelled, sum_over_processes
from tasks import augment
from tasks.augment import Recipe

# B, L and H: the public MAE code's FINETUNE.md. 2B and 6.5B get H's (the paper does not
# tell theirs): our choice, as toy's is.
RECIPES = {
    "B": Recipe(1024, 2e-3, 100, 0.65, 0.1),
    "L": Recipe(1024, 4e-3, 50, 0.75, 0.2),
    "H": Recipe(1024, 4e-3, 50, 0.75, 0.3),
    "toy": Recipe(64, 1.5e-3, 100, 0.9, 0.0, 128),
}
RECIPES |= {"2B": RECIPES["H"], "6.5B": RECIPES["H"]}
# Learning rates of linear's heads, for a batch of 256 (our choice, around SWAG's).
LINEAR_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
ACCURACY = {"top1": "top-1 {:.1%}", "top5": "top-5 {:.1%}"}  # in the step line


# ------------------------------------------------------------------------------------- the dispatch

TASKS = ("classify", "linear", "lowshot", "lit", "video", "detect")
Task = namedtuple("Task", ("add_flags", "prepare", "main"))


def load_task(name):
    """The functions of a task: a Task, or the module tasks/NAME.py.

    add_flags(groups)       Add the task's flags to {title: group of flags}. open_pictures
                            needs those of flags.add_label_flags, train those of
                            flags.add_resume_flags.
    prepare(run, finetune)  Check the flags. Call read_init, then open_pictures or
                            open_labelled. Set run.classes (0: none), run.train and run.val
                            (not None: see data.hold_out). Return the recipe, {name: value
                            if run has None}: all settings that decide the results, with
                            batch_size, epochs and warmup, and lr for adamw.
    main(run, finetune)     Build a model and call train. If that returns True, measure, and
                            call finish, or print JSON if evaluate.py has no such task.

    run has the flags as attributes. finetune is this module: tasks/ cannot import it. The
    processes have joined in main, but not for a plan (run.plan). To add a task, write its
    file and add its name to TASKS.
    """
    own = {
        "classify": Task(add_classify_flags, prepare_classify, classify),
        "linear": Task(add_linear_flags, prepare_linear, linear),
    }
    return own.get(name) or importlib.import_module(f"tasks.{name}")


# ---------------------------------------------------------------------------------------- arguments


def parse_arguments(argv):
    parser = flags.make_parser("finetune.py", "Stage 3.")
    groups = parser.groups
    parser.add_argument("--task", required=True, choices=TASKS)
    add = groups["data"].add_argument
    add("--data", help="a folder with train/ and val/, tar shards, or toy (toy)")
    add("--val-data", help="pictures to measure on, if --data is for training only")
    add("--image-size", type=models.pair, help="side or HEIGHTxWIDTH (that of --init)")
    add = groups["model"].add_argument
    add("--init", help="weights to start from: a model.pt or a public checkpoint")
    add("--size", help=f"without --init: {' '.join(models.SIZES)}, or WIDTHxLAYERSxHEADS")
    add = groups["optimisation"].add_argument
    add("--warmup", type=flags.fraction, help="share of the steps (the recipe's)")
    flags.add_length_flags(groups, "(the recipe's; toy: fewer)", "instead of --epochs")
    flags.add_flags(groups, None, "the recipe's", "weights, order and augmentation")
    parser.set_defaults(plan=False, gpus=None, lr_origin=None)  # for tasks without these flags
    add_flags = lambda parser, task: task and load_task(task).add_flags(parser.groups)
    run = flags.parse_for_task(parser, TASKS, add_flags, argv)
    run.out = run.out or Path("runs", run.task)
    return run


# -------------------------------------------------------------------------------------- preparation


def prepare(run):
    """Settle what the arguments leave open, in `run` itself, and open the data.

    Raises ValueError if an argument is unusable.
    """
    kind = launch.place(run)
    kernels.forced()  # a wrong ATTENTION in the environment is refused before loading
    run.compile = compiles(kind) if run.compile is None else run.compile
    run.workers = loader_workers(run.workers, run.processes_here)
    data.limit_pixels(run.max_pixels)

    run.identity = {"stage": "finetune", "task": run.task}
    recipe = load_task(run.task).prepare(run, THIS)
    recipe = {
        "pool": run.pool_of_init or "cls",
        "val_crop": evaluate.usual_crop(run.image_size),
        **recipe,
    }
    samples = int(run.train.sizes.sum())
    if run.plan and not run.data and run.config["size"] != "toy":
        samples = 1_281_167
        run.say(f"data         none is given: as many pictures as ImageNet-1k has, {samples:,}")
    if run.samples:
        run.epochs = run.samples / samples
    for name, default in recipe.items():
        if vars(run).get(name) is None:
            setattr(run, name, default)
    if run.batch_size % 2 or (run.micro_batch or 2) % 2:
        raise ValueError(
            f"--batch-size {run.batch_size}, --micro-batch {run.micro_batch}: want even "
            "numbers (mixup needs pairs)"
        )
    run.steps = run.steps or math.ceil(run.epochs * samples / run.batch_size)

    # What must not change when the run goes on.
    settings = ("seed", "precision", "classes", *recipe)
    run.identity |= flags.identity(run)
    run.identity |= {name: getattr(run, name) for name in settings}
    run.identity |= {"data": run.train.identity, "val": run.val.identity}
    run.identity |= {"model": run.config, "init": run.fingerprint}
    run.identity = json.loads(json.dumps(run.identity))  # as it is read again


def read_init(run, config=(), read=models.read_weights):
    """Read --init: run.weights and their fingerprint, config, image_size, and of a head
    in it classes_of_head and pool_of_init. Without --init, the weights are None.

    config: names of entries that the task's model has beside a ViT's. read: see inherit
    """
    given = {"size": run.size, "patch_size": run.patch_size, "image_size": run.image_size}
    given = {name: value for name, value in given.items() if value is not None}
    if not run.init:
        side = 32 if run.size in (None, "toy") else 224
        given = {"size": "toy", "image_size": side, "channels": 3} | given
    names = ("size", "patch_size", "image_size", "channels", "positions", "norm_eps")
    names += ("class_names", "pool", *config)
    inherited = inherit(run.init, given, names, run.heads, read, run.entry)
    run.weights, run.config, run.fingerprint = inherited
    run.classes_of_head = run.config.pop("class_names", None)
    run.pool_of_init = run.config.pop("pool", None)
    run.image_size = models.pair(run.config["image_size"])
    data.check_channels(run.config["channels"])


def open_pictures(run, **options):
    """Open run.train and run.val, which is None if there is no val. options: of
    data.open_sources.

    run.toy: True for the toy size on the toy world, which has recipes of its own.
    """
    where = run.data or "toy", run.val_data, run.image_size, run.labels, run.val_labels
    options |= {"cache": (run.cache_dir, run.cache_size), "val_share": run.val_share}
    run.train, run.val = data.open_sources(*where, **options)
    run.toy = run.train.endless and run.config["size"] == "toy"


def open_labelled(run, hold_out=False, **options):
    """Open the data of a task that learns classes: run.train, run.val and run.classes.

    hold_out: keep a slice of train, run.slice, to choose a learning rate on. run.make is
    labelled of support/probe.py for the model's images, and run.eval_batch the rows that a process
    measures at once. read_init must be called before.
    """
    open_pictures(run, **options)
    if run.plan and not run.data and run.classes:  # of any data: the toy world's names do not count
        run.train.classes = run.val.classes = None
    settle_classes(run)
    if run.val.endless:
        run.val = data.Subset(run.val, range(1024))
        run.train = data.Subset(run.train, range(16_384)) if hold_out else run.train
    if hold_out:
        run.train, run.slice = data.hold_out(run.train, None, 10_000)
        if not run.slice.sizes.any():
            raise ValueError("train is too small: a twentieth of it is needed to choose on")
        if (few := int(run.slice.sizes.sum())) < 20:
            run.say(f"settings are chosen on {few} pictures of train only: they are a guess")
    if not run.plan:  # before the training, not when it is measured
        labels = all_labels(run.val)
        if not (labels >= 0).any():
            raise ValueError(f"no labels in {run.val.identity}")
        if (labels >= run.classes).any():
            raise ValueError(f"labels of val are over {run.classes - 1}, the last class")
    channels = run.config["channels"]
    shape = {"size": run.image_size, "channels": channels}
    run.make = partial(labelled, **shape, flip=not run.no_flip)
    run.eval_batch = 64


# -------------------------------------------------------------------------------- models, optimizer


def build_classifier(run, kind=models.Classifier, **options):
    """A classifier of run.classes on the meta device: shapes without memory."""
    options = {"head_std": 2e-5, "pool": run.pool, "classes": run.classes, **options}
    with torch.device("meta"):
        return kind(class_names=run.train.classes, **options, **run.config)


def load_init(run, model, keep_head=False):
    """Move a model from the meta device to the CPU, with weights of --init or new ones."""
    model = model.to_empty(device="cpu")
    models.initialize(model, run.seed)
    if run.weights:
        run.say(models.load_weights(model, *run.weights, keep_head=keep_head))
    return model


def layer_groups(model, weight_decay, layer_decay, floor=0.0, all_decayed=False):
    """Parameter groups with lr_scale = layer_decay ^ (last - layer), at least `floor`.

    As in the public MAE code, layer 0 is the patch embedding, the class token and the
    positions, block i is layer i + 1, and the last layer is the last norm and the head.
    1-D parameters, tokens and positions (also relative ones, as in MViT's code) have no
    weight decay, unless all_decayed.
    """
    groups, last, first = {}, model.layers + 1, ("cls_token", "pos_embed", "time_embed")
    for name, parameter in model.named_parameters():
        layer, name = last, name.removeprefix("trunk.")
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        elif name in first or name.startswith("patch_embed."):
            layer = 0
        decayed = parameter.ndim > 1 and name not in first and ".rel_pos_" not in name
        decay = weight_decay if decayed or all_decayed else 0
        lr_scale = max(floor, layer_decay ** (last - layer))
        group = {"params": [], "weight_decay": decay, "lr_scale": lr_scale}
        if parameter.requires_grad:
            groups.setdefault((layer, decay), group)["params"].append(parameter)
    return list(groups.values())


def adamw(groups, run):
    """AdamW with the betas of all recipes here. The peak lr of each group is run.lr."""
    groups = [{**group, "initial_lr": run.lr} for group in groups]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=run.device.type != "mps")


# ----------------------------------------------------------------------------------------- training


def learn_labels(run, model, micro_batches, totals):
    """Forward and backward of a step on labelled pictures or clips.

    For each batch, before the next one is taken: divide the sum of its losses by
    run.batch_size, call backward on run.processes times that, and add it to totals (a
    launch.Totals) with the number of samples that count.
    """
    for batch in micro_batches:
        images, readable = data.normalize(batch["images"]), batch["weight"]
        labels = batch["labels"]
        labels = torch.where((readable > 0) & (labels < run.classes), labels, -1)
        share, noise, smoothing = torch.ones_like(readable), None, 0.0
        if "numbers" in batch:  # of augment.maker
            numbers, smoothing = batch["numbers"], run.smoothing
            images, share = augment.mix(images, readable, numbers, run.mixup, run.cutmix)
            noise = numbers[:, augment.MIX_DRAWS :].unflatten(1, (-1, 2))  # (b, L, 2)
        logits = model(images, noise)
        logits = logits[:, None] if logits.ndim == 2 else logits  # (b, heads, classes)
        losses, weights = augment.label_loss(logits, labels, share, smoothing)
        loss = losses.sum() / run.batch_size
        (loss * run.processes).backward()  # gradients are averaged over the processes
        mean = loss.detach() / logits.shape[1]  # of the heads, each of which has its own loss
        totals.add(mean, weights.sum(), batch["bad"], (labels < 0).sum())


def cosine(step, steps, warmup):
    """The fraction of the peak lr: linear warm-up from above 0, then half a cosine."""
    if step < warmup * steps:
        return (step + 1) / (warmup * steps + 1)
    return 0.5 * (1 + math.cos(math.pi * (step / steps - warmup) / (1 - warmup)))


def train(run, model, optimizer, make, flops, learn=learn_labels, schedule=cosine,
          least_lr=0.0, clip=None, order=data.Order, measure=None, shown=(),
          methods=(), target=None):  # fmt: skip
    """Train a model on run.train. Return True at the end, False if a signal stopped it.

    Checkpoints and metrics.jsonl go to run.out; the same call continues from them.

    model      an encoder (a models.ViT), or a module with one as its `trunk`
    optimizer  function of the model. Groups have an initial_lr, and may have an lr_scale
    make       make(sample, key) gives a row of a batch: see data.Batches
    flops      of a training step, per image
    learn      learn(run, model, micro_batches, totals): see learn_labels. The batches are on
               the device
    schedule   schedule(step, steps, warmup) gives the lr as a fraction of its peak
    least_lr   the lr at the end of the schedule, before lr_scale
    clip       the largest norm of the gradient, or None; --clip overrides it
    order      function of (sizes, seed, lanes): data.Order, or one with weights
    measure    function of the model: a dict of metrics, logged with every save. All processes
               call it; it must leave the model in training mode
    shown      {metric: its format in the step line}
    methods    of the model that are called from outside: see models.parallelize
    target     what a sample must have to count, in words; None: a label of run.classes
    """
    # --------------------------------------------------------------------------------------- data
    run = copy.copy(run)  # what is settled here holds for this training alone
    device, trunk = run.device, getattr(model, "trunk", model)
    order = order(run.train.sizes, run.seed, run.lanes)
    settle_batch(run, trunk)
    run.save_every = run.save_every or min(1000, math.ceil(run.steps / 10))
    stream = {"order": order, "seed": run.seed, "micro_batches": run.micro_batches}
    processes = run.process, run.processes
    dataset = data.Batches(run.train, make, run.batch_size, *processes, **stream)
    if vars(run).get("draw_step"):
        return draw_step(run, dataset)

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

    # ------------------------------------------------------------------------------------- resume
    run.identity = run.identity | {"lanes": order.lanes, "steps": run.steps}
    run.identity["samples"] = run.train.identity
    run.checkpoint = find_checkpoint(run.out, run.resume, run.identity)
    record = launch.resume(run, model, optimizer)
    peak, chip = peak_flops(device)
    describe(run, model, flops, chip)

    # --------------------------------------------------------------------------------------- loop
    stop = Stop()  # signals from here on: the loop saves and ends
    progress = launch.Progress(run, record, ["bad", "unlabelled"], flops, peak)
    numbers = range(progress.done * run.micro_batches, run.steps * run.micro_batches)
    batches = iter(loader(dataset, numbers, run.workers, pin=device.type == "cuda"))
    to_device = partial(torch.Tensor.to, device=device, non_blocking=True)
    target = target or f"label from 0 to {run.classes - 1}"
    shown = {"bad": "unreadable {}", "unlabelled": "unlabelled {}"} | dict(shown)

    def micro_batches():
        for micro_batch in range(run.micro_batches):
            batch = progress.wait_for(batches)
            last = micro_batch == run.micro_batches - 1
            with models.sync_gradients(parallel, last):
                yield map_tensors(to_device, batch)

    model.train()
    for step in range(progress.done, run.steps):
        fraction = schedule(step, run.steps, run.warmup)
        least = least_lr if step >= run.warmup * run.steps else 0.0
        for group in optimizer.param_groups:
            lr = least + fraction * (group["initial_lr"] - least)
            group["lr"] = lr * group.get("lr_scale", 1.0)
        lr = optimizer.param_groups[-1]["lr"]

        totals = launch.Totals(device)
        learn(run, parallel, micro_batches(), totals)

        totals.read(run, model, stop)  # the one host read of a step
        if totals.lacking:  # a process has got no batch: this step is not taken
            break
        progress.count(totals, unlabelled=totals.unknown - totals.new_bad)
        progress.check(dataset, progress.counts["unlabelled"], target)
        launch.guard(model, run, step, totals, lr)
        totals.clip(model, clip if run.clip is None else run.clip)
        optimizer.step()
        optimizer.zero_grad()

        if progress.stepped():
            facts = {"loss": totals.loss, "lr": lr, "grad_norm": totals.norm}
            if progress.saving and measure:
                facts |= launch.unless_lacking(stop, measure, model) or {}
            progress.log(facts, shown)
        if progress.saving:
            progress.save(model, optimizer)
        if totals.stopping:
            break
    return progress.finish(model, optimizer, stop)


def describe(run, model, flops, chip):
    """Print what is trained, and how. flops: of an image; chip: the device's name."""
    trunk = getattr(model, "trunk", model)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    millions = f"{sum(trained) / 1e6:.2f} M weights to train"
    spread = describe_sharding(trunk, run)
    if trunk is not model or len(trained) < len(list(model.parameters())):
        spread = spread.split(" (")[0]  # its memory is that of training all weights
    plain = all(type(block.attn) is models.Attention for block in trunk.blocks)
    shapes = attention_shapes(trunk) if plain else []
    how = run.precision + (", compiled in the first step" if run.compile else "")
    learned, held_out = (int(source.sizes.sum()) for source in (run.train, run.val))
    run.say(f"data     {learned} to learn from, {held_out} to measure on: {run.train.identity}")
    run.say(f"model    {run.config['size']}, {millions}, {flops / 1e9:.2f} GFLOP an image")
    parts = f"{run.processes} processes x {run.micro_batches} x {run.micro_batch}"
    run.say(f"batch    {run.batch_size}: {parts}")
    run.say(f"parallel {spread}")
    run.say(f"attention {kernels.describe(shapes, run.device, run.precision)}")
    if run.lr_origin:
        run.say(f"lr       {run.lr:.2e} at its peak: {run.lr_origin}")
    few = ": few (--epochs, or a smaller --batch-size)" if run.steps < 20 else ""
    run.say(f"run      {run.steps} steps{few}, {how} on {chip}")


def measured(run, model, source):
    """([(top-1, top-5)] of each head, number of samples that count) on a whole source."""
    make = partial(run.make, centre=run.val_crop)
    eval_batch = run.processes * run.eval_batch
    batches = data.Batches(source, make, eval_batch, run.process, run.processes)
    options = run.device, "labels", run.workers, run.max_bad
    rates, count, _ = evaluate.hit_rates(model, batches, *options)
    if not count:
        raise ValueError(f"no labels in {source.identity}")
    return rates, count


def finish(run, weights, config, result, task, more=None):
    """Write model.pt; print the command that evaluates it, and the result as JSON.

    result: {metric: number}. task: of evaluate.py. more: {name: value} of flags of that task;
    None is not given.
    """
    if run.process:
        return
    path = run.out / "model.pt"
    models.save_weights(path, weights, config)
    print(f"wrote {path}")
    usual_crop = run.val_crop == evaluate.usual_crop(run.image_size)
    typed = {"task": task, "checkpoint": path, "data": run.data or "toy"}
    typed |= {"val_crop": None if usual_crop else run.val_crop, **(more or {})}
    flags.print_next(run, "evaluate.py", **typed)
    print(json.dumps({"task": run.task, **result}))


# ----------------------------------------------------------------------------------------- classify


def add_classify_flags(groups):
    flags.add_label_flags(groups, pool="mean", min_crop="0.08; toy: 1")
    augment.add_flags(groups, RECIPES)
    flags.add_plan_flags(groups)
    flags.add_resume_flags(groups)
    add = groups["model"].add_argument
    add("--keep-head", action="store_true", help="start from the head in --init as well")


def prepare_classify(run, finetune):
    read_init(run)
    open_labelled(run)
    if run.keep_head:
        run.weights, run.pool = reorder_head(run)
    recipe = augment.recipe(run, RECIPES)
    recipe |= {"warmup": 5 / recipe["epochs"], "keep_head": False}
    if run.toy:
        recipe |= {"epochs": 0.4, "warmup": 0.05}  # of 65,536 pictures
    return recipe


def classify(run, finetune):
    run.config["positions"] = "learned"  # trained from here on, as in the public MAE code
    model = build_classifier(run, drop_path=run.drop_path)
    if run.plan:
        run.model = model
        settle_batch(run, model)
        # Raises ValueError if the run's batches could not be dealt.
        data.Batches(run.train, None, run.batch_size, run.process, run.processes)
        return print_plan(run)
    train_classifier(run, load_init(run, model, run.keep_head))


def train_classifier(run, model, operations=2, what="pictures", flags=None):
    """Train every weight of a classifier, measure it on val, and call finish.

    operations: of RandAugment. what: is measured, in words. flags: see finish. evaluate.py
    has a task of the same name.
    """
    config = model.config  # the model may be wrapped later
    make = augment.maker(run, model.layers, operations)
    flops = 3 * flops_per_image(model)
    groups = partial(layer_groups, weight_decay=run.weight_decay, layer_decay=run.layer_decay)
    optimizer = lambda model: adamw(groups(model), run)
    measure = lambda model: dict(zip(ACCURACY, measured(run, model, run.val)[0][0]))
    options = {"least_lr": 1e-6, "measure": measure, "shown": ACCURACY}  # 1e-6: public MAE code
    if not train(run, model, optimizer, make, flops, **options):
        return
    ((top1, top5), *_), count = measured(run, model, run.val)
    run.say(f"top-1 {top1:.2%}, top-5 {top5:.2%} on {count} {what}")
    weights = models.full_state(model)  # every process takes part
    finish(run, weights, config, {"top1": top1, "top5": top5}, run.task, flags)


# ------------------------------------------------------------------------------------------- linear


def add_linear_flags(groups):
    flags.add_label_flags(groups, pool="that of --init, or cls", min_crop="0.08; toy: 1")
    flags.add_resume_flags(groups)
    add = groups["optimisation"].add_argument
    add("--batch-norm", action="store_true", help="normalise features by batches, as MAE")


def prepare_linear(run, finetune):
    read_init(run)
    open_labelled(run, hold_out=True)
    # SWAG's linear head (torchvision's pull request 5793): 28 epochs, its warm-up unknown.
    # Toy: of 15,564 pictures.
    recipe = {"epochs": 28, "warmup": 0.0, "min_crop": 0.08, "batch_norm": False}
    if run.toy:
        recipe |= {"epochs": 2, "warmup": 0.05, "min_crop": 1.0}
    recipe["batch_size"] = RECIPES.get(run.config["size"], RECIPES["B"]).batch_size
    if run.batch_norm:
        whole = (run.batch_size or recipe["batch_size"]) // run.processes
        run.micro_batch = run.micro_batch or whole
        if run.micro_batch != whole:
            raise ValueError(
                f"--micro-batch {run.micro_batch} of a process's {whole}: want all of it "
                "with --batch-norm, as the statistics are those of the batch"
            )
    return recipe


def linear(run, finetune):
    trunk = load_init(run, build_classifier(run))
    config, rates = trunk.config, [rate * run.batch_size / 256 for rate in LINEAR_RATES]
    model = Probes(trunk, len(rates), run.batch_norm, run.seed)
    run.say(f"heads    {len(rates)}, one for each lr; the step line shows the largest lr")
    if run.batch_norm:
        run.say("batch norm: over the whole batch, unreadable pictures are zeros in it")

    def optimizer(model):
        heads = zip(model.heads, rates)
        groups = [{"params": [*head.parameters()], "initial_lr": rate} for head, rate in heads]
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)

    make = partial(run.make, min_crop=run.min_crop)
    flops = flops_per_image(trunk)  # no backward through it
    if not train(run, model, optimizer, make, flops):
        return
    on_slice, some = measured(run, model, run.slice)
    on_val, count = measured(run, model, run.val)
    best = max(range(len(rates)), key=lambda head: on_slice[head])
    run.say(f"lr per 256   top-1 on {some} of train   on val")
    for head, rate in enumerate(LINEAR_RATES):
        mark = "  <- chosen on train" if head == best else ""
        run.say(f"{rate:10g}   {on_slice[head][0]:18.2%}   {on_val[head][0]:6.2%}{mark}")
    top1, top5 = on_val[best]
    run.say(f"top-1 {top1:.2%}, top-5 {top5:.2%} on {count} pictures")
    weights = models.full_state(model)  # every process takes part
    if run.process == 0:
        weights = model.classifier_state(weights, best)
    result = {"top1": top1, "top5": top5, "lr_per_256": LINEAR_RATES[best]}
    finish(run, weights, config, result, "classify")


class Probes(nn.Module):
    """Linear heads side by side on the frozen features of a models.Classifier.

    batch_norm: normalise the features over the batch of all processes, without scale and
    bias (MAE's linear probe, eps 1e-6); in inference, by running averages (momentum 0.1).
    """

    def __init__(self, trunk, heads, batch_norm, seed):
        super().__init__()
        self.trunk, self.batch_norm = trunk.requires_grad_(False), batch_norm
        self.heads = nn.ModuleList(nn.Linear(trunk.width, trunk.classes) for _ in range(heads))
        for head in self.heads:  # all start from the same weights
            generator = torch.Generator().manual_seed(seed)
            nn.init.normal_(head.weight, std=0.01, generator=generator)
            nn.init.zeros_(head.bias)
        self.register_buffer("mean", torch.zeros(trunk.width))
        self.register_buffer("variance", torch.ones(trunk.width))

    def forward(self, images, noise=None):
        """(B, C, H, W) -> logits (B, heads, classes)."""
        with torch.no_grad():
            x = self.trunk.features(images).float()  # (B, D)
            mean, variance = self.mean, self.variance
            if self.batch_norm and self.training:
                count = len(x) * distributed()[1]
                mean = sum_over_processes(x.sum(dim=0)) / count
                variance = sum_over_processes((x - mean).square().sum(dim=0)) / count
                self.mean.lerp_(mean, 0.1)
                self.variance.lerp_(variance * count / (count - 1), 0.1)
            x = (x - mean) / (variance + 1e-6).sqrt() if self.batch_norm else x
        logits = [F.linear(x, head.weight.float(), head.bias.float()) for head in self.heads]
        return torch.stack(logits, dim=1)

    def classifier_state(self, state, head):
        """The state of a models.Classifier that computes the same as head number `head`."""
        weight, bias = state[f"heads.{head}.weight"], state[f"heads.{head}.bias"]
        if self.batch_norm:
            weight = weight / (state["variance"] + 1e-6).sqrt()
            bias = bias - weight @ state["mean"]
        trunk = {name: state[f"trunk.{name}"] for name in self.trunk.state_dict()}
        return trunk | {"head.weight": weight, "head.bias": bias}


# ---------------------------------------------------------------------------------------------- end


THIS = sys.modules[__name__]  # what tasks/ call: see load_task


@errors.record  # torchrun shows the traceback of the process that failed first
def main(argv=None):
    run = parse_arguments(argv)
    with launch.report_errors("finetune.py"):
        prepare(run)
        if not run.plan:
            launch.begin(run)
        load_task(run.task).main(run, THIS)
        launch.end(run)


if __name__ == "__main__":
    main()
