"""Stage 3: transfer. The pretrained encoder learns a task with labels, and is measured on it.

Laptop       python finetune.py --task classify --init runs/weak/model.pt        # toy world
             python finetune.py --task linear   --init runs/weak/model.pt --data DIR
             python finetune.py --task lowshot  --init runs/weak/model.pt --data DIR --shots 1,5,10
             python finetune.py --task lit      --init runs/weak/model.pt        # toy captions
             python finetune.py --task detect   --init runs/mae/model.pt --data COCO_DIR
             python finetune.py --task video    --init runs/weak/model.pt        # toy motion
One node     torchrun --nproc-per-node 8 finetune.py --task classify --init maws.pt --data DIR
Many nodes   torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500
                 finetune.py --task classify --init maws.pt --data 'train/*.tar' --val-data ...
Resume       the same command again continues, exactly, from the last checkpoint in --out

classify  trains every weight, by the public MAE code's recipe (FINETUNE.md there)
linear    trains linear heads on the frozen encoder, one for each learning rate, in one pass
lowshot   K pictures of each class, five draws: prompts in the frozen encoder (VPT, arXiv
          2203.12119), and logistic regression on its features
detect    boxes and masks: ViTDet's Cascade Mask R-CNN on the same encoder
lit       trains a text tower beside the frozen encoder on pairs of picture and caption (LiT, arXiv
          2111.07991). evaluate.py --task zeroshot then recognises classes by their names
video     as classify, on clips: two frames share a token, and positions are relative as well

classify and linear are below, the others in tasks/: load_task says how to add one. Whatever is
chosen (a learning rate, a penalty) is chosen on a slice of the training data, never on val.
"""

import copy
import importlib
import json
import math
import os
import shlex
import sys
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
from support import flags, launch
from support.checkpoints import find_checkpoint
from support.formats import inherit
from support.labels import all_labels, reorder_head, settle_classes
from support.loader import Stop, loader, loader_workers, map_tensors
from support.plan import (
    attention_shapes,
    compiles,
    describe_sharding,
    flops_per_image,
    peak_flops,
    print_plan,
    settle_batch,
)
from tasks import augment
from tasks.augment import Recipe

# B, L and H: the public MAE code's FINETUNE.md. The paper does not tell those of 2B and 6.5B. They
# get H's: our choice, as toy's are.
RECIPES = {
    "B": Recipe(1024, 5e-4, 100, 0.65, 0.1),
    "L": Recipe(1024, 1e-3, 50, 0.75, 0.2),
    "H": Recipe(1024, 1e-3, 50, 0.75, 0.3),
    "toy": Recipe(64, 4e-3, 100, 0.75, 0.0),
}
RECIPES |= {"2B": RECIPES["H"], "6.5B": RECIPES["H"]}
# Learning rates of linear's heads, for a batch of 256 (our choice; SWAG's lies among them).
LINEAR_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


# ------------------------------------------------------------------------------------- the dispatch

TASKS = ("classify", "linear", "lowshot", "lit", "video", "detect")


def load_task(name):
    """The three functions of a task: those of tasks/NAME.py, or a namespace below.

    add_flags(groups)       adds the task's flags to {title: group of flags}: see flags.make_parser
                            The functions below read those of flags.add_label_flags, and train
                            those of flags.add_resume_flags: call both
    prepare(run, finetune)  opens weights and data (read_init and open_pictures or open_labelled do)
                            and checks the flags. Sets run.classes, if open_labelled has not, and
                            makes a run.val where there is none: see data.hold_out. Returns the
                            recipe: all settings that decide the results, {name: value if it is not
                            given}, with batch_size, epochs and warmup
    main(run, finetune)     builds a model, calls train, measures, and calls finish. A metric is
                            shown in the step line if it is in SHOWN

    run has the flags as attributes, and what the functions add. finetune is this module: tasks/
    cannot import it. To add a task, write the file and add its name to TASKS.
    """
    own = {"classify": CLASSIFY, "linear": LINEAR}
    return own.get(name) or importlib.import_module(f"tasks.{name}")


# ---------------------------------------------------------------------------------------- arguments


def parse_arguments(argv):
    parser = flags.make_parser("finetune.py", "Stage 3.")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.set_defaults(plan=False, gpus=None, cuda_graph=False)
    add_common_flags(parser.groups)
    add_flags = lambda parser, task: load_task(task).add_flags(parser.groups)
    run = flags.parse_for_task(parser, TASKS, add_flags, argv)
    run.out = run.out or Path("runs", run.task)
    return run


def add_common_flags(groups):
    """Add the flags that every task has."""
    add = groups["data"].add_argument
    add("--data", help="a folder with train/ and val/, tar shards, or toy (toy); see the README")
    add("--val-data", help="pictures to measure on, if --data holds only those to train on")
    add("--image-size", type=models.pair, help="side or HEIGHTxWIDTH (that of --init)")
    add = groups["model"].add_argument
    add("--init", help="weights to start from: a model.pt or a public checkpoint")
    add("--size", help=f"without --init: {' '.join(models.SIZES)}, or WIDTHxLAYERSxHEADS")
    add = groups["optimisation"].add_argument
    add("--warmup", type=flags.fraction, help="share of the steps (the recipe's)")
    flags.add_length_flags(groups, "(the recipe's; toy: fewer)", "instead of --epochs")
    flags.add_flags(groups, None, "the recipe's", "weights, order and augmentation")


# -------------------------------------------------------------------------------------- preparation


def prepare(run):
    """Settle what the arguments leave open, and open the data. ValueError says what is unusable."""
    # ------------------------------------------------------------------------------------ runtime
    if run.data == "":  # of a variable that is not set, say
        raise ValueError("--data is empty: leave it out for the toy world")
    kind = launch.place(run)
    kernels.forced()  # a wrong ATTENTION in the environment is found here, not after loading
    run.compile = compiles(kind) if run.compile is None else run.compile
    run.workers = loader_workers(run.workers, run.processes_here)
    data.limit_pixels(run.max_pixels)
    run.identity = {"stage": "finetune"}

    # ---------------------------------------------------------------- weights, data and the recipe
    recipe = load_task(run.task).prepare(run, THIS)
    recipe.setdefault("pool", "cls")
    recipe.setdefault("val_crop", evaluate.usual_crop(run.image_size))
    samples = int(run.train.sizes.sum())
    if run.samples:
        run.epochs = run.samples / samples
    for name, value in recipe.items():
        if vars(run).get(name) is None:
            setattr(run, name, value)
    if run.batch_size % 2 or (run.micro_batch or 2) % 2:
        raise ValueError(
            f"--batch-size {run.batch_size}, --micro-batch {run.micro_batch}: want even numbers "
            "(mixup needs pairs)"
        )
    run.steps = run.steps or math.ceil(run.epochs * samples / run.batch_size)

    # ------------------------------------------------------------------------- what is the same run
    run.identity |= {"data": run.train.identity, "val": run.val.identity}
    run.identity |= {"model": run.config, "init": run.origin}
    same = ("task", "seed", "precision", "classes", *recipe)
    run.identity |= {name: getattr(run, name) for name in same}
    usual = run.max_pixels == data.MAX_PIXELS  # as in runs from before there was this flag: None
    run.identity["max_pixels"] = None if usual else run.max_pixels
    run.identity = json.loads(json.dumps(run.identity))  # as it will be read again


def read_init(run, config=(), read=models.read_weights):
    """Read the weights in --init: run.weights, config, origin, classes_of_head and pool_of_init.

    config: names of entries that the task's model has beside a ViT's. read: see inherit
    """
    names = ("size", "patch_size", "image_size")
    given = {name: getattr(run, name) for name in names if getattr(run, name) is not None}
    if not run.init:
        side = 48 if run.size in (None, "toy") else 224
        given = {"size": "toy", "image_size": side, "channels": 3, **given}
    names += ("channels", "positions", "norm_eps", "class_names", "pool", *config)
    inherited = inherit(run.init, given, names, run.heads, read, run.entry)
    run.weights, run.config, run.origin = inherited
    run.classes_of_head = run.config.pop("class_names", None)
    run.pool_of_init = run.config.pop("pool", None)
    run.image_size = models.pair(run.config["image_size"])
    data.check_channels(run.config["channels"])


def open_pictures(run, caption_key="caption", videos=False):
    """Open the sources run.train and run.val: see data.open_sources. run.val may be None.

    run.toy: True if the toy recipes hold, those of the toy size on the toy world.
    """
    run.train, run.val = data.open_sources(
        run.data or "toy",
        run.val_data,
        run.image_size,
        run.labels,
        run.val_labels,
        cache=(run.cache_dir, run.cache_size),
        caption_key=caption_key,
        videos=videos,
    )
    run.toy = run.train.endless and run.config["size"] == "toy"


def open_labelled(run, hold_out=False, videos=False):
    """Open the sources of a task that learns labels: run.train, run.val and run.classes.

    hold_out: keep a slice of train, run.slice, to choose a learning rate on. run.make(sample, key)
    gives a row of labelled pictures, and run.eval_batch of them are measured at once on a process.
    """
    open_pictures(run, videos=videos)
    settle_classes(run)
    if run.val.endless:
        run.val = data.Subset(run.val, range(1024))
        run.train = data.Subset(run.train, range(16_384)) if hold_out else run.train
    if hold_out:
        run.train, run.slice = data.hold_out(run.train, None, 10_000)
        if not run.slice.sizes.any():
            raise ValueError("train is too small: a twentieth of it is needed to choose on")
    if not run.plan:  # else it would be found after a tenth of the training
        labels = all_labels(run.val)
        if not (labels >= 0).any():
            raise ValueError(f"no labels in {run.val.identity}")
        if (labels >= run.classes).any():
            raise ValueError(f"labels of val are over {run.classes - 1}, the last class")
    channels = run.config["channels"]
    run.make = partial(evaluate.labelled, size=run.image_size, channels=channels)
    run.eval_batch = 64


# -------------------------------------------------------------------------------- models, optimizer


def build_classifier(run, kind=models.Classifier, head_std=2e-5, drop_path=0.0):
    """A classifier of run.classes on the meta device: shapes without memory."""
    facts = {"classes": run.classes, "class_names": run.train.classes, "pool": run.pool}
    with torch.device("meta"):
        return kind(head_std=head_std, drop_path=drop_path, **facts, **run.config)


def load_init(run, model, keep_head=False):
    """Move a model from the meta device to the CPU: initialised, and with the weights of --init."""
    model = model.to_empty(device="cpu")
    models.initialize(model, run.seed)
    if run.weights:
        run.say(models.load_weights(model, *run.weights, keep_head=keep_head))
    return model


def layer_groups(model, weight_decay, layer_decay, floor=0.0, all_decayed=False):
    """Parameter groups with lr_scale = layer_decay ^ (layers + 1 - layer), at least `floor`.

    As in the public MAE code, layer 0 is the patch embedding, the class token and the positions,
    block i is layer i + 1, the last norm and the head are layers + 1. 1-D parameters, tokens and
    positions (also relative ones, as in MViT's code) have no weight decay, unless all_decayed.
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
    """AdamW with the betas of all recipes here. The peak lr of each group is run.lr."""
    groups = [{**group, "initial_lr": run.lr} for group in groups]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=run.device.type != "mps")


# ----------------------------------------------------------------------------------------- training


def learn_labels(run, model, micro_batches, totals):
    """Forward and backward of a step on labelled pictures or clips: see train."""
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
        totals.add(loss.detach(), weights.sum(), batch["bad"], (labels < 0).sum())


def cosine(step, steps, warmup):
    """Linear warm-up, whose first step is not 0, then half a cosine to 0, step by step: a share."""
    if step < warmup * steps:
        return (step + 1) / (warmup * steps + 1)
    return 0.5 * (1 + math.cos(math.pi * (step / steps - warmup) / (1 - warmup)))


def train(run, model, optimizer, make, flops, learn=learn_labels, schedule=cosine, least_lr=0.0,
          clip=None, order=data.Order, measure=None, methods=(), target=None):  # fmt: skip
    """Train a model on run.train. Returns True at the end, False if a signal stopped the training.

    It writes checkpoints and metrics.jsonl to run.out, and continues from them if it is repeated.

    model      an encoder (a models.ViT), or a module with one as its `trunk`
    optimizer  function of the model. Its groups have an initial_lr, and may have an lr_scale
    make       make(sample, key) gives a row of a batch: see data.Batches
    flops      of a training step, for an image
    learn      learn(run, model, micro_batches, totals): forward and backward of a step. The
               batches come one by one, on the device. Of each, the sum of the losses over
               run.batch_size goes into totals (a launch.Totals), with the number of samples that
               count; its backward is of run.processes times as much: see learn_labels
    schedule   schedule(step, steps, warmup) gives the share of the peak lr
    least_lr   the lr at the end of the schedule, before lr_scale
    clip       the largest norm of the gradient; None: any
    order      function of (sizes, seed, lanes): data.Order, or one with weights
    measure    function of the model: a dict that is logged with every save
    methods    names of the model's methods that are called from outside: see models.parallelize
    target     what a sample must have to count, in words; None: a label of run.classes
    """
    # --------------------------------------------------------------------------------------- data
    run = copy.copy(run)  # what is settled here is this training's own
    device, trunk = run.device, getattr(model, "trunk", model)
    order = order(run.train.sizes, run.seed, run.lanes)
    settle_batch(run, trunk)
    share = {"process": run.process, "processes": run.processes}
    drawn = {"order": order, "seed": run.seed, "micro_batches": run.micro_batches}
    dataset = data.Batches(run.train, make, run.batch_size, **share, **drawn)
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

    # ---------------------------------------------------------------------------------- optimizer
    optimizer = optimizer(model)

    # ------------------------------------------------------------------------------------- resume
    run.identity = run.identity | {"lanes": order.lanes, "samples": run.train.identity}
    run.identity["steps"] = run.steps
    run.checkpoint = find_checkpoint(run.out, run.resume, run.identity)
    record = launch.resume(run, model, optimizer)

    # ------------------------------------------------------------------------------ what is trained
    peak, chip = peak_flops(device)
    describe(run, model, flops, chip)

    # --------------------------------------------------------------------------------------- loop
    stop = Stop()  # signals from here on: the loop saves and ends
    progress = launch.Progress(run, record, ["bad", "unlabelled"], flops, peak)
    numbers = range(progress.done * run.micro_batches, run.steps * run.micro_batches)
    batches = iter(loader(dataset, numbers, run.workers, pin=device.type == "cuda"))
    to_device = partial(torch.Tensor.to, device=device, non_blocking=True)

    def micro_batches():
        for micro_batch in range(run.micro_batches):
            batch = progress.wait_for(batches)
            with models.sync_gradients(parallel, last=micro_batch == run.micro_batches - 1):
                yield map_tensors(to_device, batch)

    model.train()
    for step in range(progress.done, run.steps):
        factor = schedule(step, run.steps, run.warmup)
        least = least_lr if step >= run.warmup * run.steps else 0.0
        for group in optimizer.param_groups:
            lr = least + factor * (group["initial_lr"] - least)
            group["lr"] = lr * group.get("lr_scale", 1.0)
        lr = optimizer.param_groups[-1]["lr"]

        totals = launch.Totals(device)
        learn(run, parallel, micro_batches(), totals)

        totals.read(run, model, stop)  # the one host read of a step
        if totals.lacking:  # a process has got no batch: this step is not taken
            break
        progress.count(totals, unlabelled=totals.unknown - totals.new_bad)
        bad, unlabelled = progress.counts.values()
        target = target or f"label from 0 to {run.classes - 1}"
        what = f"of {progress.done * run.batch_size} pictures {bad} cannot be read and "
        progress.check(dataset, bad + unlabelled, f"{what}{unlabelled} have no {target}")
        launch.guard(model, run, step, totals, lr)
        if clip:
            totals.clip(model, clip)
        optimizer.step()
        optimizer.zero_grad()

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


# {name of a metric: how the step line shows it}
SHOWN = {"bad": "bad {}", "unlabelled": "unlabelled {}"}
SHOWN |= {"top1": "top-1 {:.1%}", "top5": "top-5 {:.1%}"}
SHOWN |= {"bbox_AP": "box AP {:.1%}", "bbox_AP50": "box AP50 {:.1%}"}
SHOWN |= {"segm_AP50": "mask AP50 {:.1%}", "text_recall_at_1": "text recall@1 {:.1%}"}
SHOWN |= {"image_recall_at_1": "picture recall@1 {:.1%}"}


def describe(run, model, flops, chip):
    """Print what is trained, and how. flops: of an image; chip: the device's name."""
    trunk, trained = getattr(model, "trunk", model), [p.requires_grad for p in model.parameters()]
    millions = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    size = f"{run.config['size']}, {millions:.2f} M weights to train"
    spread = describe_sharding(trunk, run)
    if trunk is not model or not all(trained):  # the memory in it is that of training all weights
        spread = spread.split(" (")[0]
    how = run.precision + (", compiled in the first step" if run.compile else "")
    run.say(f"data     {run.train.identity}")
    run.say(f"model    {size}, {flops / 1e9:.2f} GFLOP an image")
    shares = f"{run.processes} processes x {run.micro_batches} x {run.micro_batch}"
    run.say(f"batch    {run.batch_size}: {shares}")
    run.say(f"parallel {spread}")
    if run.task not in ("lowshot", "detect"):  # prompts are more tokens, and detect has biases
        shapes = attention_shapes(trunk)
        run.say(f"attention {kernels.describe(shapes, run.device, run.precision)}")
    run.say(f"run      {run.steps} steps, {how} on {chip}")


def measured(run, model, source):
    """([(top-1, top-5)] of each head of a model, pictures that count) on all of a source."""
    make = partial(run.make, centre=run.val_crop)
    eval_batch = run.processes * run.eval_batch
    batches = data.Batches(source, make, eval_batch, run.process, run.processes)
    options = run.device, "labels", run.workers, run.max_bad
    rates, count = evaluate.hit_rates(model, batches, *options)
    if not count:
        raise ValueError(f"no labels in {source.identity}")
    return rates, count


def finish(run, weights, config, result, task, flags=None):
    """Write model.pt, and print the command that evaluates it, and the result as JSON.

    result  {name: number}
    task    of evaluate.py
    flags   {name: value} of evaluate.py that this task adds; None: the flag is not given
    """
    if run.process:
        return
    models.save_weights(run.out / "model.pt", weights, config)
    print(f"wrote {run.out / 'model.pt'}")
    same = {name: vars(run).get(name) for name in ("val_data", "labels", "val_labels")}
    usual_crop = run.val_crop == evaluate.usual_crop(run.image_size)
    same["val_crop"] = None if usual_crop else run.val_crop
    same["max_pixels"] = None if run.max_pixels == data.MAX_PIXELS else run.max_pixels
    typed = ["--checkpoint", str(run.out / "model.pt"), "--data", run.data or "toy"]
    for name, value in (same | (flags or {})).items():
        if value is not None:
            typed += [f"--{name.replace('_', '-')}", str(value)]
    print(f"next: python evaluate.py --task {task} {shlex.join(typed)}")
    print(json.dumps({"task": run.task, **result}))


# ----------------------------------------------------------------------------------------- classify


def add_classify_flags(groups):
    flags.add_label_flags(groups, pool="mean", min_crop="0.08; toy: 0.5")
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
    run.config["positions"] = "learned"  # as in the public MAE code: from here on they are trained
    model = build_classifier(run, drop_path=run.drop_path)
    if run.plan:
        run.model = model
        settle_batch(run, model)
        # Raises ValueError if the run's batches could not be dealt.
        data.Batches(run.train, None, run.batch_size, run.process, run.processes)
        return print_plan(run)
    train_classifier(run, load_init(run, model, run.keep_head))


def train_classifier(run, model, operations=2, what="pictures", flags=None):
    """Train every weight of a classifier of pictures or clips, measure it, and call finish.

    operations: of RandAugment. what: is measured, in words. flags: see finish
    """
    config = model.config  # what compiles or shards a model may wrap it
    flops, make = 3 * flops_per_image(model), augment.maker(run, model.layers, operations)
    optimizer = lambda model: adamw(layer_groups(model, run.weight_decay, run.layer_decay), run)
    measure = lambda model: dict(zip(("top1", "top5"), measured(run, model, run.val)[0][0]))
    # 1e-6: the public MAE code's.
    if not train(run, model, optimizer, make, flops, least_lr=1e-6, measure=measure):
        return
    ((top1, top5), *_), count = measured(run, model, run.val)
    run.say(f"top-1 {top1:.2%}, top-5 {top5:.2%} on {count} {what}")
    weights = models.full_state(model)  # every process takes part
    finish(run, weights, config, {"top1": top1, "top5": top5}, run.task, flags)


CLASSIFY = SimpleNamespace(add_flags=add_classify_flags, prepare=prepare_classify, main=classify)


# ------------------------------------------------------------------------------------------- linear


def add_linear_flags(groups):
    flags.add_label_flags(groups, pool="cls", min_crop="0.08; toy: 0.5")
    flags.add_resume_flags(groups)
    add = groups["optimisation"].add_argument
    add("--batch-norm", action="store_true", help="normalise features by batches, as MAE")


def prepare_linear(run, finetune):
    read_init(run)
    open_labelled(run, hold_out=True)
    batch_size = RECIPES.get(run.config["size"], RECIPES["B"]).batch_size
    # SWAG's linear head (torchvision's pull request 5793): 28 epochs, warm-up not known. Toy: of
    # 15,564 pictures.
    epochs, warmup = (2, 0.05) if run.toy else (28, 0.0)
    if run.batch_norm:
        whole = (run.batch_size or batch_size) // run.processes
        run.micro_batch = run.micro_batch or whole
        if run.micro_batch != whole:
            raise ValueError(
                f"--micro-batch {run.micro_batch} of a process's {whole}: want all of it with "
                "--batch-norm, as the statistics are those of the batch"
            )
    recipe = {"batch_size": batch_size, "epochs": epochs, "warmup": warmup, "batch_norm": False}
    return recipe | {"min_crop": 0.5 if run.toy else 0.08}


def linear(run, finetune):
    trunk = load_init(run, build_classifier(run))
    config, rates = trunk.config, [rate * run.batch_size / 256 for rate in LINEAR_RATES]
    model = Probes(trunk, len(rates), run.batch_norm, run.seed)
    if run.batch_norm:
        run.say("batch norm: over the whole batch, with unreadable pictures as zeros in it")

    def optimizer(model):
        groups = [
            {"params": [*head.parameters()], "initial_lr": rate}
            for head, rate in zip(model.heads, rates)
        ]
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)

    flops = flops_per_image(trunk)  # no backward through it
    if not train(run, model, optimizer, partial(run.make, min_crop=run.min_crop), flops):
        return
    chosen_by, some = measured(run, model, run.slice)
    on_val, count = measured(run, model, run.val)
    best = max(range(len(rates)), key=lambda head: chosen_by[head])
    run.say(f"lr per 256   top-1 on {some} of train   on val")
    for head, rate in enumerate(LINEAR_RATES):
        mark = "  <- chosen on train" if head == best else ""
        run.say(f"{rate:10g}   {chosen_by[head][0]:18.2%}   {on_val[head][0]:6.2%}{mark}")
    (top1, top5), weights = on_val[best], models.full_state(model)  # every process takes part
    run.say(f"top-1 {top1:.2%}, top-5 {top5:.2%} on {count} pictures")
    if run.process == 0:
        weights = model.classifier_state(weights, best)
    result = {"top1": top1, "top5": top5, "lr_per_256": LINEAR_RATES[best]}
    finish(run, weights, config, result, "classify")


LINEAR = SimpleNamespace(add_flags=add_linear_flags, prepare=prepare_linear, main=linear)


class Probes(nn.Module):
    """Linear heads side by side on the frozen features of a models.Classifier, one for each lr.

    batch_norm: features are first normalised over the batch of all processes, without scale and
    bias (MAE's linear probe, eps 1e-6); in inference by running averages (momentum 0.1).
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
        logits = [F.linear(x, head.weight.float(), head.bias.float()) for head in self.heads]
        return torch.stack(logits, dim=1)

    def classifier_state(self, state, head):
        """The state of a models.Classifier that computes the same as one of the heads."""
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
