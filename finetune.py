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
What is chosen (a learning rate, a penalty) is chosen on a slice of train, never on val.
"""

import argparse
import copy
import gc
import itertools
import json
import math
import os
import re
import shlex
import sys
import time
from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path

# On a CPU, OpenMP's idle threads spin: on two cores, one busy loader process then makes two
# training threads ten times slower than one. Passive ones sleep. Said before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing import errors
from tqdm import tqdm

import data
import evaluate
import kernels
import model as models
from support.checkpoints import (
    barrier,
    begin_run,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from support.hashtags import WeightedOrder
from support.labels import names_of_list
from support.launch import check_agreement, not_finite, set_timeouts, verdict
from support.plan import (
    block_flops,
    check_shard_group,
    describe_sharding,
    fitting_batch,
    flops_per_image,
    memory_budget,
    peak_flops,
    peak_memory,
    planned_batch,
    print_plan,
    settle_sharding,
    training_memory,
)
from support.toy import Toy
from tasks.augment import MIX_DRAWS, augment, label_loss, mix
from tasks.detect import (
    VITDET,
    Detector,
    detect_in,
    detection_numbers,
    detector_flops,
    learn_scenes,
    load_trunk,
    print_detection,
    read_weights,
    vitdet_schedule,
)
from tasks.lit import (
    LIT,
    LIT_CROP,
    PADDING,
    PAIRS,
    TEXT_SIZES,
    TwoTowers,
    all_captions,
    clean,
    learn_pairs,
    make_pair,
    read_text_weights,
    recall_table,
    retrieval,
    tokenizer_for,
)
from tasks.lowshot import LOWSHOT_RATES, PENALTIES, SEEDS, Prompted, few_shot_split, logistic_scores
from tasks.scenes import ToyScenes, classes_present, open_scenes, repeat_factors, scene_maker
from tasks.video import VIDEO_RECIPES, Clips, VideoClassifier, make_clips

# size: (batch size, lr per 256 images, epochs, layer decay, drop path) of classify. B, L and H: the
# public MAE code's FINETUNE.md. What the paper did for 2B and 6.5B is unknown: they get H's.
RECIPES = {
    "B": (1024, 5e-4, 100, 0.65, 0.1),
    "L": (1024, 1e-3, 50, 0.75, 0.2),
    "H": (1024, 1e-3, 50, 0.75, 0.3),
}
RECIPES |= {"2B": RECIPES["H"], "6.5B": RECIPES["H"]}
RECIPES["toy"] = (64, 4e-3, 100, 0.75, 0.0)  # ours
# Of the toy world: of its 65,536 pictures, of 15,564, and of the few that lowshot draws (ours).
TOY_EPOCHS = {"classify": 0.4, "linear": 2, "lowshot": 10}
TOY_EPOCHS |= {"lit": 1, "video": 0.2, "detect": 0.02}
# Augmentation of the same recipe; a toy run is too short for most of it (ours).
AUGMENTATION = {"min_crop": 0.08, "mixup": 0.8, "cutmix": 1.0, "rand_augment": 9.0, "erase": 0.25}
OPERATIONS_DONE = {"classify": 2, "video": 4}  # of RandAugment
TOY_AUGMENTATION = dict.fromkeys(AUGMENTATION, 0.0) | {"min_crop": 0.5}
# Heads that linear trains side by side, by lr per 256 images (ours; SWAG's lies among them).
LINEAR_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# Flags of some tasks: the others refuse them.
TASKS_OF_FLAGS = {
    **dict.fromkeys(("keep_head", "plan"), "classify"),
    **dict.fromkeys(("smoothing", "mixup"), "classify video"),
    **dict.fromkeys(("drop_path", "layer_decay"), "classify video detect"),
    **dict.fromkeys(("cutmix", "rand_augment", "erase", "ema"), "classify video"),
    **dict.fromkeys(("lr", "weight_decay"), "classify lit video detect"),
    **dict.fromkeys(("min_jitter", "max_jitter", "decay_floor"), "detect"),
    **dict.fromkeys(("min_crop", "val_crop", "pool"), "classify linear lowshot lit video"),
    **dict.fromkeys(("labels", "val_labels"), "classify linear lowshot lit video"),
    "classes": "classify linear lowshot video",
    "class_weights": "classify linear video",
    **dict.fromkeys(("resume", "save_every"), "classify linear lit video detect"),
    **dict.fromkeys(("text_size", "text_init", "tokenizer", "context", "caption_key"), "lit"),
    **dict.fromkeys(("shared_width", "cache_features"), "lit"),
    **dict.fromkeys(("frames", "relative_positions", "span", "stride"), "video"),
    **dict.fromkeys(("no_flip", "short_side"), "video"),
    "batch_norm": "linear",
    "shots": "lowshot",
}


# ---------------------------------------------------------------------------------------- arguments


def parse_arguments(argv):
    parser = argparse.ArgumentParser("finetune.py", allow_abbrev=False, description="Stage 3.")
    parser.add_argument("--task", required=True, choices=TASKS)
    add = parser.add_argument_group("data").add_argument
    add("--data", help="a folder with train/ and val/, tar shards, or toy (toy); see the README")
    add("--val-data", help="the val pictures, where --data holds only those to train on")
    add("--labels", help="of the folder --data: .csv (path,class), .jsonl, or iNaturalist's .json")
    add("--val-labels", help="the same for val (paths in --val-data or, without it, --data)")
    add("--min-jitter", type=float, help="detect: least scale of a picture (0.1; toy: 0.8)")
    add("--max-jitter", type=float, help="detect: largest (2.0; toy: 1.25)")
    add("--caption-key", default="caption", help="lit: of the captions in .json (caption)")
    add("--cache-features", action="store_true", help="lit: of pictures' centres, computed once")
    add("--classes", type=int, help="how many, where the data does not name them")
    add("--cache-dir", help="folder for remote shards (of yours, among the temporary files)")
    add("--cache-size", default="20G", help="the most that it holds, like 500G (20G)")
    add("--image-size", type=models.pair, help="side or HEIGHTxWIDTH (that of --init)")
    add("--min-crop", type=float, help="least area of a crop, 1: none (0.08; toy: 0.5; lit: 0.9)")
    add("--val-crop", type=float, help="of val's pictures: share of the centre, 0: all, squashed")
    add("--span", type=float, default=2.7, help="video: seconds of a clip of a video file (2.7)")
    add("--stride", type=float, default=4.0, help="video: frames to the next, without a clock (4)")
    add("--short-side", type=int, help="video: what files are scaled down to as they are decoded")
    add("--no-flip", action="store_true", help="video: classes have a direction")
    add("--lanes", type=int, help="streams that the order is dealt to (48, or the shards if fewer)")
    add("--workers", type=int, help="loader processes per training process (the cores left)")
    add("--max-bad", type=float, default=0.01, help="unreadable share to stop at (0.01)")
    pixels = {"type": data.pixel_limit, "default": data.MAX_PIXELS}
    add("--max-pixels", **pixels, help="of a picture: larger ones are unreadable (89 million)")
    add = parser.add_argument_group("model").add_argument
    add("--init", help="weights to start from: a model.pt or a public checkpoint")
    add("--heads", type=int, help="of an --init whose size is unknown")
    add("--entry", help="of an --init with several networks: state_dict_ema, or a prefix of names")
    add("--size", help=f"without --init: {' '.join(models.SIZES)}, or WIDTHxLAYERSxHEADS")
    add("--patch-size", type=int, help="side of a patch (the size's own)")
    add("--pool", choices=("cls", "mean"), help="what the head reads (classify: mean; else cls)")
    add("--frames", type=int, help="video: of a clip, an even number (16; toy: 4)")
    option = argparse.BooleanOptionalAction
    add("--relative-positions", action=option, default=True, help="video: in every block (yes)")
    add("--text-size", help=f"lit: {' '.join(TEXT_SIZES)}, or WIDTHxLAYERSxHEADS (by size)")
    add("--text-init", help="lit: XLM-R's weights for the text tower to start from")
    add("--tokenizer", help="lit: XLM-R's sentencepiece file (without: bytes)")
    add("--context", type=int, help="lit: tokens that a caption may have (100; toy: 40)")
    add("--shared-width", type=int, help="lit: of the space for both (by size)")
    add("--keep-head", action="store_true", help="start from the head in --init, too")
    add("--drop-path", type=float, help="of the last block, rising from 0 (B 0.1, L 0.2, H 0.3)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=int, help="global (1024; lowshot: 128; lit: 32768; toy: 64, lit: 256)")
    add("--micro-batch", type=int, help="images at once on a process (what should fit)")
    add("--lr", type=float, help="peak of classify (the recipe's) or lit (1e-3)")
    add("--layer-decay", type=float, help="of the lr, from block to block (B 0.65, L and H 0.75)")
    add("--decay-floor", type=float, help="detect: least lr_scale (0.1 if --init has a head)")
    add("--warmup", type=float, help="share of the steps (5 epochs of MAE's recipe)")
    add("--weight-decay", type=float, help="of classify (0.05) or lit (0.01)")
    add("--smoothing", type=float, default=0.1, help="of labels (0.1)")
    add("--mixup", type=float, help="alpha, 0: none (0.8; toy: 0)")
    add("--cutmix", type=float, help="alpha, 0: none (1.0; toy: 0)")
    add("--rand-augment", type=float, help="magnitude, 0: none (9; toy: 0)")
    add("--erase", type=float, help="probability of random erasing (0.25; toy: 0)")
    add("--ema", type=float, help="decay of averaged weights, which then are the result (none)")
    add("--class-weights", action="store_true", help="rare classes count more: all count the same")
    add("--batch-norm", action="store_true", help="linear: normalise features by batches, as MAE")
    add("--shots", type=evaluate.shots, default=["1", "5", "10"], help="per class (1,5,10)")
    add("--seed", type=int, default=0, help="of weights, order and augmentation (0)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--steps", type=int, help="length of the run; or give --epochs")
    add(
        "--epochs",
        type=float,
        help="(B 100, L and H 50; linear 28; lowshot 100; lit 1; toy: fewer)",
    )
    add("--samples", type=float, help="instead of --epochs")
    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, help="where everything is written (runs/TASK)")
    add("--resume", help="a run, or one of its checkpoints, to go on from (the one in --out)")
    add("--precision", choices=("bf16", "fp32"), help="of the compute (CUDA: bf16, else fp32)")
    add("--compile", action=option, default=None, help="torch.compile the model (CUDA: yes)")
    add("--checkpoint-activations", action="store_true", help="less memory, a third more compute")
    add("--shard-group", type=int, help="processes per copy of the weights (1 if it fits, or all)")
    add("--log-every", type=int, default=50, help="steps between step lines (50)")
    add("--save-every", type=int, help="steps between saves (a tenth, to 1000; detect: a third)")
    add("--keep-last", type=int, default=2, help="checkpoints that are kept (2)")
    add("--keep-every", type=int, help="every so many steps, one is kept for good (none)")
    add("--plan", action="store_true", help="classify: print what the run takes, and exit")
    add("--gpus", type=int, help="processes to plan for (as many as run now): --plan, too")
    add("--mfu", type=float, default=0.4, help="--plan: share of the peak FLOP/s (0.4)")
    add("--memory", type=float, help="GiB for --micro-batch to fit (the GPU's; planned: 80)")
    parser.error = lambda message: fail(f"{message} (--help lists all flags)")
    run = parser.parse_args(argv)
    shares = ("min_crop", "val_crop", "max_bad", "warmup", "drop_path", "layer_decay", "smoothing")
    shares += ("mixup", "cutmix", "erase", "ema", "mfu")
    for name, value in vars(run).items():
        zeros = (*shares[:-1], "seed", "workers", "weight_decay", "rand_augment", "span", "stride")
        least = 0 if name in zeros else 1e-30
        if type(value) in (int, float) and not least <= value <= (1 if name in shares else 2**62):
            parser.error(f"--{name.replace('_', '-')} {value} is out of range")
    if run.drop_path == 1:
        parser.error("--drop-path 1 would drop all of the last block: give less")
    if (run.rand_augment or 0) > 10:
        parser.error(f"--rand-augment {run.rand_augment} is over 10")
    if run.data == "":  # of a variable that is not set, say
        parser.error("--data is empty: leave it out for the toy world")
    if "all" in run.shots:
        parser.error("--shots wants numbers: for all pictures there is --task linear")
    run.plan = run.plan or bool(run.gpus)
    for name, tasks in TASKS_OF_FLAGS.items():
        if run.task not in tasks.split() and getattr(run, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is for --task {tasks.replace(' ', ', ')}")
    run.out = run.out or Path("runs", run.task)
    return run


def fail(message, status=2, alone=False):
    """One line on what is wrong and what to do: from one process of a machine, if all know it."""
    if alone or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"finetune.py: {message}", file=sys.stderr)
    sys.exit(status)


def prepare(run):
    """Settle what the arguments leave open, and open the data. ValueError says what is unusable."""
    # ------------------------------------------------------------------------------------ runtime
    launched = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}  # by torchrun
    run.process, run.processes, local, here = (
        int(os.environ.get(name, str(alone))) for name, alone in launched.items()
    )
    kind = (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")).type
    kind = "cpu" if kind == "mps" and run.processes > 1 else kind  # no collectives on MPS
    run.device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if run.plan and run.gpus:  # a plan for GPUs may be made anywhere
        run.processes, kind = run.gpus, "cuda"
    check_shard_group(run)
    run.precision = run.precision or ("bf16" if kind == "cuda" else "fp32")
    kernels.forced()  # a wrong ATTENTION in the environment is found here, not after loading
    if run.precision == "bf16" and kind != "cuda":
        raise ValueError("--precision bf16 needs CUDA")
    run.compile = models.compiles(kind) if run.compile is None else run.compile
    run.workers = data.loader_workers(run.workers, here)

    # --------------------------------------------------------------------------------------- data
    names, asked = ("size", "patch_size", "image_size"), run.image_size
    given = {name: getattr(run, name) for name in names if getattr(run, name) is not None}
    if run.task == "video" and run.data in (None, "toy") and run.size in (None, "toy"):
        given.setdefault("image_size", 32)
    if not run.init:
        side = 48 if run.size in (None, "toy") else 224
        given = {"size": "toy", "image_size": side, "channels": 3, **given}
    names += ("channels", "positions", "norm_eps", "class_names", "pool")
    names += ("text", "shared_width") if run.task == "lit" else ()
    names += ("frames", "relative_positions") if run.task == "video" else ()
    read = read_weights if run.task == "detect" else models.read_weights
    run.weights, run.config, run.origin = models.inherit(
        run.init, given, names, run.heads, read, run.entry
    )
    classes_of_head, pool = run.config.pop("class_names", None), run.config.pop("pool", None)
    run.image_size = models.pair(run.config["image_size"])
    labels = run.labels, run.val_labels
    cache = run.cache_dir, run.cache_size
    data.limit_pixels(run.max_pixels)
    if run.task == "detect":
        prepare_scenes(run, asked, classes_of_head)
    else:
        opened = run.data or "toy", run.val_data, run.image_size, *labels, cache, run.caption_key
        run.train, run.val = data.open_sources(*opened, videos=run.task == "video")
    toy, run.weighting, run.schedule = isinstance(run.train, Toy), {}, schedule
    toy_recipe = toy and run.config["size"] == "toy"
    if run.task == "video":
        run.frames = run.frames or run.config.get("frames", 4 if toy_recipe else 16)
        run.no_flip = run.no_flip or toy  # whose classes have a direction
        run.config |= {"frames": run.frames, "relative_positions": run.relative_positions}
    run.finetunes = run.task in ("classify", "video")
    how = run.span, run.stride, 1, 1, not run.no_flip, run.short_side
    run.clips = Clips(run.frames, *how) if run.task == "video" else None
    if run.task == "lit":
        prepare_pairs(run, pool)
    elif run.task != "detect":
        prepare_labels(run, classes_of_head, pool)
    if run.task == "lit" and run.min_crop is None:
        run.min_crop = LIT_CROP
    augmentation = TOY_AUGMENTATION if toy_recipe else AUGMENTATION
    if run.task == "video":
        augmentation = augmentation | ({"min_crop": 1.0} if toy_recipe else {"rand_augment": 7.0})
    for name, value in augmentation.items():
        if getattr(run, name) is None:
            setattr(run, name, value)
    if run.rand_augment and run.finetunes and run.config["channels"] == 4:
        raise ValueError("RandAugment is for grey and RGB pictures: give --rand-augment 0")
    if run.val_crop is None:
        whole = run.task in ("lit", "video")
        run.val_crop = 1.0 if whole else evaluate.usual_crop(run.image_size)
    if run.task == "lowshot" and ((run.out / "config.json").exists() or run.out.is_file()):
        raise ValueError(f"--out {run.out} is a file, or another run's: use another --out")

    # -------------------------------------------------------------------------------- the recipe
    recipes = VIDEO_RECIPES if run.task == "video" else RECIPES
    found = recipes.get(run.config["size"], recipes["B"])  # others: B's, unsure
    batch_size, base_lr, epochs, layer_decay, drop_path = found
    warmup, weight_decay, run.clip = 5 / epochs, 0.05, None
    if run.task == "video":
        warmup = 0.125
    elif run.task == "linear":
        # SWAG's linear head (torchvision's pull request 5793): 28 epochs, warm-up not known
        epochs, warmup = 28, 0.0
    elif run.task == "lowshot":  # VPT's code: 100 epochs, of which 10 warm up
        batch_size, epochs, warmup = min(batch_size, 128), 100, 0.1
    elif run.task == "lit":
        batch_size, run.lr, weight_decay, warmup, run.clip = LIT[0], run.lr or LIT[1], *LIT[2:]
        # Of less data, a smaller one: a pair must not meet itself in a batch.
        pairs, epochs = int(run.train.sizes.sum()), 1
        batch_size = 256 if toy_recipe else min(batch_size, 2 ** max(1, (pairs // 8).bit_length()))
        if (run.batch_size or 0) > pairs:
            raise ValueError(f"--batch-size {run.batch_size}: the data has {pairs} pairs")
    elif run.task == "detect":
        lvis, run.schedule = run.train.frequencies is not None, vitdet_schedule
        rates, layer_decay, drop_paths, lengths = VITDET.get(run.config["size"], VITDET["B"])
        epochs, drop_path, weight_decay = lengths[lvis], drop_paths[lvis], 0.1
        batch_size, scale = 64, (run.batch_size or 64) / 64
        if run.config["size"] == "toy":
            batch_size, scale = 2, 1
        run.lr = run.lr or rates[lvis] * scale
        run.weighting = repeat_factors(run.train) if lvis else {}
        if run.decay_floor is None:  # of encoders that have learned hashtags (recalled)
            run.decay_floor = 0.1 if run.weights and "head.weight" in run.weights[0] else 0.0
        warmup = 0.0  # see vitdet_schedule
    if toy_recipe:
        epochs, warmup = TOY_EPOCHS[run.task], max(warmup, 0.05)
    run.batch_size = run.batch_size or planned_batch(batch_size, run)
    if run.batch_size % 2:
        raise ValueError(f"--batch-size {run.batch_size}: want an even number (mixup needs pairs)")
    count = int(run.train.sizes.sum())
    run.epochs = run.epochs or (run.samples or epochs * count) / count
    run.warmup = warmup if run.warmup is None else run.warmup
    run.weight_decay = weight_decay if run.weight_decay is None else run.weight_decay
    run.lr = run.lr or base_lr * run.batch_size / 256
    run.layer_decay = layer_decay if run.layer_decay is None else run.layer_decay
    run.drop_path = drop_path if run.drop_path is None else run.drop_path
    run.pool = run.pool or ("mean" if run.finetunes else "cls")
    same = ("task", "classes", "batch_size", "epochs", "steps", "lr", "layer_decay", "warmup")
    same += ("weight_decay", "smoothing", "mixup", "cutmix", "rand_augment", "erase", "ema")
    same += ("drop_path", "pool", "class_weights", "batch_norm", "min_crop", "seed", "precision")
    same += ("val_crop", "keep_head", "cache_features", "caption_key")
    same += ("min_jitter", "max_jitter", "decay_floor")
    same += ("span", "stride", "no_flip", "short_side") if run.task == "video" else ()
    run.identity = {"stage": "finetune", "data": run.train.identity, "val": run.val.identity}
    run.identity |= {"model": run.config, "init": run.origin}
    run.identity |= {name: getattr(run, name) for name in same}
    usual = run.max_pixels == data.MAX_PIXELS  # as in runs from before there was this flag: None
    run.identity["max_pixels"] = None if usual else run.max_pixels
    # A head that was learned when numbers were sorted as texts must not go on with other labels.
    # (Other classes may be in any order: the toy world's are.)
    classes = run.train.classes or []
    by_number = classes != sorted(classes) and all(map(str.isdecimal, classes))
    if by_number and run.task not in ("lit", "detect"):
        run.identity["class_order"] = "by number"
    run.identity = json.loads(json.dumps(run.identity))  # as it will be read again


def prepare_labels(run, classes_of_head, pool):
    """The classes of the data, and what is held out of it, for the tasks that learn labels."""
    named = len(run.train.classes or ())
    if named and run.classes not in (None, named):
        raise ValueError(f"--classes {run.classes}: {run.data} names {named}")
    run.classes = named or run.classes
    if not run.classes:
        why = "names no classes (two folders or more)"
        raise ValueError(f"{run.data} {why}: give --classes, how many, or --labels")
    if run.classes < 2:
        raise ValueError(f"{run.data} has one class only: there is nothing to tell apart")
    if run.val is None:
        why = (
            "--labels lists no val pictures" if run.labels else f"{run.data} has no train/ and val/"
        )
        raise ValueError(f"{why}: give --val-data or --val-labels")
    if (run.train.classes is None) != (run.val.classes is None):
        why = "one of train and val names its classes, the other does not"
        raise ValueError(f"{why}: {run.train.identity}; {run.val.identity}")
    if run.keep_head and (not run.weights or "head.weight" not in run.weights[0]):
        raise ValueError("--keep-head: there is no head in --init")
    if run.keep_head:
        state, grid = run.weights
        count, wanted = len(state["head.weight"]), run.train.classes
        wanted = wanted or list(map(str, range(run.classes)))
        names = classes_of_head or names_of_list(count, wanted) or []
        if names != wanted:  # some of the head's, or in another order
            times, rows = Counter(names), dict(zip(names, range(count)))
            if odd := [name for name in wanted if times[name] != 1]:
                why = (
                    f"{times[odd[0]]} of its {count} classes are called {odd[0]}, and one is needed"
                )
                why = f"the head in --init is for other classes than the data's ({why})"
                raise ValueError(f"--keep-head: {why}: leave --keep-head out")
            rows = [rows[name] for name in wanted]
            head = {name: state[name][rows] for name in ("head.weight", "head.bias")}
            run.weights = {**state, **head}, grid
            if run.process == 0:
                print(f"--keep-head: the data has {len(rows)} of the head's {count} classes")
        pool = pool or ("mean" if "fc_norm.weight" in state else "cls")
        if run.pool not in (None, pool):
            raise ValueError(f"--keep-head: the head in --init reads --pool {pool}")
        run.pool = pool
    if isinstance(run.val, Toy):  # it has no end
        run.val = data.Subset(run.val, range(1024))
        run.train = run.train if run.finetunes else data.Subset(run.train, range(16_384))
    if not run.finetunes:  # what is chosen is chosen on a slice of train
        run.train, run.slice = data.hold_out(run.train, None, 10_000)
        if not run.slice.sizes.any():
            raise ValueError("train is too small: a twentieth of it is needed to choose on")
    if not run.plan:  # else it would be found after a tenth of the training
        labels = data.all_labels(run.val)
        if not (labels >= 0).any():
            raise ValueError(f"no labels in {run.val.identity}")
        if (labels >= run.classes).any():
            raise ValueError(f"labels of val are over {run.classes - 1}, the last class")


def prepare_scenes(run, side, classes_of_head):
    """The scenes of detect, whose pictures become squares of a side."""
    toy, state, grid = run.data in (None, "toy"), *(run.weights or ({}, None))
    goes_on = "trunk.pos_embed" in state  # from a detector
    usual = (128 if run.config["size"] == "toy" else 1024,) * 2
    height, width = side or (run.image_size if goes_on else usual)
    if height != width:
        raise ValueError(f"--image-size {height}x{width}: detect fills pictures up to a square")
    if not toy and run.data.endswith(".json") and not run.val_data:
        raise ValueError(f"{run.data} is all of the data: give --val-data, too")
    run.image_size, run.config["image_size"] = (height, width), height
    run.train, run.val = open_scenes(run.data or "toy", run.val_data, height)
    run.val = ToyScenes("val", height, 64) if toy else run.val
    run.classes = len(run.train.classes)
    if goes_on and classes_of_head != run.train.classes:  # what tells them apart is learned anew
        of_classes = re.compile(r"boxes\.\d\.class_predictor\.|mask\.predictor\.")
        run.weights = {n: t for n, t in state.items() if not of_classes.match(n)}, grid
    low, high = (0.8, 1.25) if toy else (0.1, 2.0)  # ViTDet's; toy is ours
    run.jitter = (
        low if run.min_jitter is None else run.min_jitter,
        high if run.max_jitter is None else run.max_jitter,
    )
    if run.jitter[0] > run.jitter[1]:
        raise ValueError(f"--min-jitter {run.jitter[0]} is over --max-jitter {run.jitter[1]}")


def prepare_pairs(run, pool):
    """The texts of lit: tokenizer, text tower, and the pairs that are held out."""
    if not run.weights:
        raise ValueError("--task lit wants --init: the encoder is frozen, it must have learned")
    run.pool, run.classes = run.pool or pool, 0
    run.train, run.val = data.hold_out(run.train, run.val, 1000, share=0.1)
    if not run.val.sizes.any():
        raise ValueError(f"{run.train.identity} is too small: a tenth of it is held out")
    if not any(map(clean, itertools.chain(*all_captions(run.val)))):
        want = f"want .txt or .json with {run.caption_key!r} in shards, or --labels (path,caption)"
        raise ValueError(f"no captions in {run.val.identity}: {want}")
    known = run.config.get("text", {})  # where --init is a pair of towers already
    if known and run.text_init:
        raise ValueError(f"{run.init} has a text tower: leave --text-init out")
    run.text_weights = None
    if run.text_init:
        run.text_weights, known = read_text_weights(run.text_init)
        run.origin += f", text {models.origin_of(run.text_weights)}"
    if known and run.text_size not in (None, known["size"]):
        raise ValueError(f"--text-size {run.text_size}: the weights are of size {known['size']}")
    run.tokenizer_file = run.tokenizer
    run.tokenizer = tokenizer_for(run.tokenizer_file, known)
    size, shared_width = PAIRS.get(run.config["size"], PAIRS["L"])
    text = {"size": run.text_size or size, "vocabulary": run.tokenizer.vocabulary}
    text["context"] = 40 if text["size"] == "toy" else 100  # toy: the first object of a caption
    text |= known | {"tokenizer": run.tokenizer.identity}
    text["context"] = run.context = run.context or text["context"]
    if run.context > text.get("positions", 514) - 4:  # begin, end, and positions start at 2
        raise ValueError(f"--context {run.context} is over {text.get('positions', 514) - 4}")
    run.config |= {"text": text, "shared_width": run.config.get("shared_width", shared_width)}
    if run.shared_width not in (None, run.config["shared_width"]) and known.get("context"):
        raise ValueError(f"--shared-width: that of {run.init} is {run.config['shared_width']}")
    run.config["shared_width"] = run.shared_width or run.config["shared_width"]


# -------------------------------------------------------------------------------- models, optimizer


class Probes(nn.Module):
    """Linear heads side by side on the frozen features of a models.Classifier, one for each lr.

    A step of SGD is proportional to its lr. So the heads can share a tensor and the lr 1: each is
    kept divided by the root of its own lr and used multiplied by it, which scales its gradient by
    the root, and with it again the step by the lr.
    batch_norm: features are first normalised over the batch, over all processes, without affine
    (MAE's linear probe, eps 1e-6); in inference by running averages (momentum 0.1).
    """

    def __init__(self, trunk, rates, batch_norm, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = 0.01 * torch.randn(trunk.classes, trunk.width, generator=generator)
        self.register_buffer("root", torch.tensor(rates).sqrt()[:, None, None])  # (heads, 1, 1)
        self.weight = nn.Parameter(weight / self.root)  # (heads, classes, D)
        self.bias = nn.Parameter(torch.zeros(len(rates), trunk.classes))
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
        weight, bias = self.root * self.weight.float(), self.root[:, 0] * self.bias.float()
        return torch.einsum("bd,hcd->bhc", x, weight) + bias

    def classifier_state(self, state, head):
        """The state of a models.Classifier that does what one of the heads does."""
        root = state["root"][head, 0]  # (1,)
        weight, bias = root * state["weight"][head], root * state["bias"][head]
        if self.batch_norm:
            weight = weight / (state["variance"] + 1e-6).sqrt()
            bias = bias - weight @ state["mean"]
        trunk = {n.removeprefix("trunk."): t for n, t in state.items() if n.startswith("trunk.")}
        return trunk | {"head.weight": weight, "head.bias": bias}


def over_processes(sums):
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums


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


def classifier(run):
    """The models.Classifier of a run on the meta device: shapes without memory."""
    kind, head_std = models.Classifier, 2e-5
    if run.task == "video":
        kind, head_std = VideoClassifier, 0.01  # OmniMAE's
    names = {"classes": run.classes, "class_names": run.train.classes, "head_std": head_std}
    with torch.device("meta"):
        return kind(pool=run.pool, drop_path=run.drop_path, **names, **run.config)


def build_trunk(run, say):
    """The same on the CPU, with the weights of --init."""
    model = classifier(run).to_empty(device="cpu")
    models.initialize(model, run.seed)
    if run.weights:
        say(models.load_weights(model, *run.weights, keep_head=run.keep_head))
    return model


# ----------------------------------------------------------------------------------------- training


def learn_labels(run, model, pieces):
    """A step on labels: see train. Losses are the batch's sums, to be divided by the weights'."""
    sums = torch.zeros(3, device=run.device)
    for batch in pieces:
        readable, labels, numbers = batch["weight"], batch["labels"], batch.get("numbers")
        labels = torch.where((readable > 0) & (labels < run.classes), labels, -1)
        images, share, noise = data.normalize(batch["images"]), torch.ones_like(readable), None
        if run.finetunes:
            images, share = mix(images, readable, numbers, run.mixup, run.cutmix)
            noise = numbers[:, MIX_DRAWS:].unflatten(1, (-1, 2))  # (b, L, 2)
        logits = model(images, noise)
        logits = logits[:, None] if logits.ndim == 2 else logits  # (b, heads, classes)
        smoothing = run.smoothing if run.finetunes else 0.0
        losses, weights = label_loss(logits, labels, share, smoothing, run.weights_of_classes)
        loss = losses.sum() / run.batch_size
        (loss * run.processes).backward()  # gradients are averaged over the processes
        sums += torch.stack([loss.detach(), weights.sum(), (labels < 0).sum()])
    return sums


def check_pieces(run, share, micro_batch):
    """Raise ValueError where micro-batches are not whole parts of a process's share of a batch."""
    whole = share == micro_batch if run.batch_norm else share % micro_batch == 0
    if not whole or micro_batch % 2:
        wanted = "all of it with --batch-norm" if run.batch_norm else "an even divisor"
        raise ValueError(f"--micro-batch {micro_batch} of a process's {share}: want {wanted}")


def train(run, model, optimizer, source, make, out, steps, say, flops, learn=learn_labels,
          methods=()):  # fmt: skip
    """Train a model on a source; True when it came to its end, False when a signal stopped it.

    Checkpoints and metrics.jsonl are in `out`, where the same call goes on. The optimizer's groups
    have an initial_lr and may have an lr_scale. run.measure(model) is logged with every save.
    flops: of a training step, for an image. make: see data.Batches. methods: of the model that are
    called from outside, see models.parallelize.
    learn(run, model, pieces): backward through a step's batches, which come one by one, already on
    the device; returns the sums [loss, weight, samples of no use]; see learn_labels.
    """
    # --------------------------------------------------------------------------------------- data
    device = run.device
    kind = partial(WeightedOrder, **run.weighting) if run.weighting else data.Order
    order = kind(source.sizes, run.seed, run.lanes)
    share = run.batch_size // run.processes
    trunk = getattr(model, "trunk", model)
    shard_group = settle_sharding(trunk, run)
    # Batch statistics are those of the whole batch: it must not come in pieces.
    settled = copy.copy(run)
    settled.shard_group = shard_group
    whole = share if run.batch_norm else fitting_batch(trunk, share, settled)
    micro_batch = settled.micro_batch = run.micro_batch or whole
    pieces = share // micro_batch
    settings = {"order": order, "seed": run.seed, "micro_batches": pieces}
    batches = dataset = data.Batches(
        source, make, run.batch_size, run.process, run.processes, **settings
    )
    check_pieces(run, share, micro_batch)

    # -------------------------------------------------------------------------------- parallelize
    model = model.to(device)
    parallel = models.parallelize(  # what the step calls: the model, or DDP around it
        model,
        device,
        shard_group,
        precision=run.precision,
        compile=run.compile,
        checkpoint_activations=run.checkpoint_activations,
        methods=methods,
    )
    optimizer = optimizer(model)

    # ------------------------------------------------------------------------------------- resume
    first_step, bad, unlabelled = 0, 0, 0
    identity = {**run.identity, "lanes": order.lanes, "samples": source.identity, "steps": steps}
    checkpoint = find_checkpoint(out, run.resume, identity)
    facts = {"micro_batch": micro_batch, "shard_group": shard_group, "out": str(out)}
    facts |= {"save_every": run.save_every, "checkpoint": str(checkpoint)}
    check_agreement(identity | facts)
    if checkpoint:
        say(f"going on from {checkpoint}")
        record = load_checkpoint(checkpoint, model, optimizer)
        first_step, bad, unlabelled = record["step"], record["bad"], record["unlabelled"]
    if run.process == 0:
        begin_run(
            out, {**identity, "command": sys.argv, "resume": run.resume}, checkpoint, first_step
        )

    # --------------------------------------------------------------------------------------- loop
    peak, chip = peak_flops(device)
    millions = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    say(f"data     {source.identity}")
    say(f"model    {run.config['size']}, {millions:.2f} M weights to train, "
        f"{flops / 1e9:.2f} GFLOP an image")  # fmt: skip
    say(f"batch    {run.batch_size}: {run.processes} processes x {pieces} x {micro_batch}")
    spread = describe_sharding(trunk, settled)
    # The memory in it is that of a trunk of which every weight is trained.
    say(f"parallel {spread if run.task in ('classify', 'video') else spread.split(' (')[0]}")
    if run.task not in ("lowshot", "detect"):  # prompts make other shapes, detect has biases
        attention = models.choose_attention(trunk, micro_batch, device, run.precision)
        say(f"attention {attention}")
    how = run.precision + (", compiled in the first step" if run.compile else "")
    say(f"run      {steps} steps, {how} on {chip}")
    stop = data.Stop()  # signals from here on: the loop saves and ends
    most, parts = (5000, 3) if run.task == "detect" else (1000, 10)  # to measure is dear there
    save_every = run.save_every or min(most, -(-steps // parts))
    bar = tqdm(total=steps, initial=first_step, disable=None if run.process == 0 else True)
    items = range(first_step * pieces, steps * pieces)
    batches = iter(data.loader(batches, items, run.workers, pin=device.type == "cuda"))
    to_device = partial(torch.Tensor.to, device=device, non_blocking=True)
    began = logged = time.perf_counter()
    waited, last_logged, stopping, lacking = 0.0, first_step, False, False
    done, saved_step, wait_for_save = first_step, first_step, lambda: None

    def save():
        nonlocal saved_step, wait_for_save
        record = {"identity": identity, "bad": bad, "unlabelled": unlabelled}
        kept = run.keep_last, run.keep_every, device.type == "cuda"
        wait_for_save()  # the one before: never two at once
        folder, saved_step = out / "checkpoints", done
        wait_for_save = save_checkpoint(folder, done, model, optimizer, record, *kept)

    def pieces_of_step(unreadable):
        nonlocal waited
        for piece in range(pieces):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            unreadable += batch.pop("bad")
            with models.sync_gradients(parallel, last=piece == pieces - 1):
                yield data.map_tensors(to_device, batch)

    model.train()
    gc.disable()  # it would stop each process at another moment, and all would wait for each
    for step in range(first_step, steps):
        scale = run.schedule(step, steps, run.warmup)
        floor = 1e-6 if run.finetunes and step >= run.warmup * steps else 0.0  # MAE's recipe
        for group in optimizer.param_groups:
            lr = floor + scale * (group["initial_lr"] - floor)
            group["lr"] = lr * group.get("lr_scale", 1.0)

        sums, unreadable = torch.zeros(7, device=device), []
        sums[:3] = learn(run, parallel, pieces_of_step(unreadable))
        sums[2] -= len(unreadable)  # which are counted on their own

        # The one host read of a step, after backward and before the optimizer.
        gradients = [models.local(p.grad) for p in model.parameters() if p.grad is not None]
        sums[3], sums[4] = len(unreadable), stop.asked
        sums[5] = stop.no_batch is not None
        # Squares of the norm's parts add up; each copy of the model has all of them.
        copies = run.processes // (shard_group or 1)
        sums[6] = torch.nn.utils.get_total_norm(gradients).square() / copies
        if run.processes > 1:
            dist.all_reduce(sums)
        loss, weight, unknown, new_bad, stopping, lacking, norm = sums.tolist()
        if lacking:  # a process has got no batch: this step is not taken
            break
        norm **= 0.5
        scale = run.batch_size / max(weight, 1e-9)  # the mean is over the labels that count
        loss, norm = loss * scale, norm * scale
        scale *= min(1.0, run.clip / max(norm, 1e-9)) if run.clip else 1.0
        for gradient in gradients if scale != 1.0 else ():
            gradient.mul_(scale)
        for name in unreadable[: max(0, 20 - bad)]:  # all are counted, the first ones named
            tqdm.write(f"unreadable, weight 0: {name}", file=sys.stderr)
        done, bad, unlabelled = step + 1, bad + int(new_bad), unlabelled + int(unknown)
        if dataset.over_max_bad(bad + unlabelled, done * run.batch_size, run.max_bad):
            lacking = f"label from 0 to {run.classes - 1}" if run.task != "lit" else "caption"
            what = f"of {done * run.batch_size} pictures {bad} cannot be read and {unlabelled} have"
            what += f" no {lacking}"
            fail(f"{what}: all, or over --max-bad {run.max_bad}; mend or remove them", 1)
        if not math.isfinite(loss + norm):
            lr = optimizer.param_groups[-1]["lr"]
            fail(not_finite(model, step, run.batch_size, loss, norm, lr), 1)
        optimizer.step()
        optimizer.zero_grad()
        gradients = None  # as a list it would keep them all through the next step
        average_weights(optimizer)
        bar.update()

        saving = done % save_every == 0 or done == steps
        if saving or done % run.log_every == 0 or done == 1:
            now = time.perf_counter()
            rate = (done - last_logged) * run.batch_size / (now - logged)
            entry = {"step": done, "samples": done * run.batch_size, "bad": bad}
            entry |= {
                "unlabelled": unlabelled,
                "loss": loss,
                "lr": optimizer.param_groups[-1]["lr"],
            }
            entry |= {"grad_norm": norm, "images_per_second": rate}
            entry["mfu"] = rate * flops / (peak * run.processes) if peak else 0.0
            entry["data_wait"] = waited / (now - logged)
            entry["memory_gib"] = peak_memory(device)
            entry["eta_seconds"] = (now - began) / (done - first_step) * (steps - done)
            if saving and run.measure:
                swap_average(optimizer)
                entry |= evaluate.unless_lacking(stop, run.measure, model) or {}
                swap_average(optimizer)
            if run.process == 0:
                with open(out / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(entry) + "\n")
                say(step_line(entry, steps))
            gc.collect(2 if saving else 1)
            set_timeouts(minutes=10)  # all have started by now
            waited, last_logged, logged = 0.0, done, time.perf_counter()

        if saving:
            save()
        if stopping:
            break

    # --------------------------------------------------------------------------------------- end
    if done > saved_step:
        save()
    wait_for_save()
    bar.close()
    gc.enable()
    stop.release()
    if done < steps:
        kept = "saved: the same command goes on" if done else "with nothing to save"
        say(f"stopped at step {done} of {steps}, {kept}")
        if lacking and not stopping:
            alone = stop.no_batch is not None
            fail(stop.no_batch or "another process has got no batch", 1, alone)
        return False
    swap_average(optimizer)
    return True


def schedule(step, steps, warmup):
    """Linear warm-up, whose first step is not 0, then half a cosine to 0, step by step: a share."""
    if step < warmup * steps:
        return (step + 1) / (warmup * steps + 1)
    return 0.5 * (1 + math.cos(math.pi * (step / steps - warmup) / (1 - warmup)))


# What is measured with a save, as the step line calls it.
SHOWN = {"top1": "top-1", "top5": "top-5"}
SHOWN |= {"bbox_AP": "box AP", "bbox_AP50": "box AP50", "segm_AP50": "mask AP50"}
SHOWN |= {"text_recall_at_1": "text recall@1", "image_recall_at_1": "picture recall@1"}


def step_line(entry, steps):
    text = (
        "step {step}/{steps}  loss {loss:.4f}  lr {lr:.2e}  grad {grad_norm:.2f}  "
        "{images_per_second:.1f} images/s  mfu {mfu:.1%}  data wait {data_wait:.0%}  "
        "memory {memory_gib:.1f} GiB  eta {eta}"
    ).format(steps=steps, eta=tqdm.format_interval(entry["eta_seconds"]), **entry)
    for name in ("bad", "unlabelled"):
        text += f"  {name} {entry[name]}" if entry[name] else ""
    for name, title in SHOWN.items():
        text += f"  {title} {entry[name]:.1%}" if name in entry else ""
    return text


# -------------------------------------------------------------------------------------------- tasks


def sample_maker(run, **how):
    """make for data.Batches of labelled pictures or clips. how: see evaluate.labelled."""
    data.check_channels(run.config["channels"])
    how |= {"size": run.image_size, "channels": run.config["channels"]}
    if run.clips:
        return partial(make_clips, clips=run.clips, **how)
    return partial(augmented, **how) if "augment" in how else partial(evaluate.labelled, **how)


def augmented(sample, key, augment, **how):
    """evaluate.labelled's row with the picture changed by augment(pixels, key)."""
    row = evaluate.labelled(sample, key, **how)
    return row | {"images": augment(row["images"], key)} if sample else row


def with_numbers(sample, key, made, count):
    """A row with numbers (count,) uniform in [0, 1), for what is drawn on the device."""
    numbers = data.uniform(data.random_bits(count, *key, data.DEVICE))
    return made(sample, key) | {"numbers": torch.from_numpy(numbers).float()}


def measured(run, model, source):
    """([(top-1, top-5)] of each of a model's heads, pictures that count): exact, see evaluate.py"""
    pairs = 2 * run.processes * (4 if run.clips else 32)
    make = sample_maker(run, centre=run.val_crop)
    batches = data.Batches(source, make, pairs, run.process, run.processes)
    options = run.device, "labels", run.workers, run.max_bad
    rates, count = evaluate.hit_rates(model, batches, *options)
    if not count:
        raise ValueError(f"no labels in {source.identity}")
    return rates, count


def classify(run, say):
    run.config["positions"] = "learned"  # as the public MAE code: they are trained from here on
    steps = run.steps or math.ceil(run.epochs * int(run.train.sizes.sum()) / run.batch_size)
    if run.plan:
        run.steps, model, share = steps, classifier(run), run.batch_size // run.processes
        run.shard_group = settle_sharding(model, run)
        run.micro_batch = run.micro_batch or fitting_batch(model, share, run)
        run.pieces = share // run.micro_batch
        dealt = run.batch_size, run.process, run.processes  # as it would be: else a ValueError
        data.Batches(run.train, sample_maker(run), *dealt)
        check_pieces(run, share, run.micro_batch)
        return run.process or print_plan(model, run)
    model = build_trunk(run, say)
    config = model.config
    run.measure = lambda model: dict(zip(("top1", "top5"), measured(run, model, run.val)[0][0]))

    def optimizer(model):
        groups = layer_groups(model, run.weight_decay, run.layer_decay)
        for group in groups:
            group |= {"initial_lr": run.lr, "ema": run.ema}
        return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=run.device.type != "mps")

    flops, how = 3 * flops_per_image(model), {}
    if run.rand_augment or run.erase:
        how = {"magnitude": run.rand_augment, "erasing": run.erase}
        how = {"augment": partial(augment, **how, operations=OPERATIONS_DONE[run.task])}
    made = sample_maker(run, min_crop=run.min_crop, **how)
    make = partial(with_numbers, made=made, count=MIX_DRAWS + 2 * model.layers)
    if not train(run, model, optimizer, run.train, make, run.out, steps, say, flops):
        return
    ((top1, top5), *_), count = measured(run, model, run.val)
    weights = models.full_state(model)  # every process takes part
    averaged = " (averaged weights)" if run.ema else ""
    what = "videos, a clip of each" if run.clips else "pictures"
    say(f"top-1 {top1:.2%}, top-5 {top5:.2%} on {count} {what}{averaged}")
    finish(run, weights, config, {"top1": top1, "top5": top5})


def linear(run, say):
    trunk = build_trunk(run, say)
    config = trunk.config
    rates = [rate * run.batch_size / 256 for rate in LINEAR_RATES]
    model = Probes(trunk, rates, run.batch_norm, run.seed)
    if run.batch_norm:
        say(
            "batch norm: the statistics are the whole batch's, unreadable pictures as zeros in them"
        )

    def optimizer(model):
        groups = [{"params": [model.weight, model.bias], "initial_lr": 1.0}]  # see Probes
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)

    steps = run.steps or math.ceil(run.epochs * int(run.train.sizes.sum()) / run.batch_size)
    flops = flops_per_image(trunk)  # no backward through it
    make = sample_maker(run, min_crop=run.min_crop)
    if not train(run, model, optimizer, run.train, make, run.out, steps, say, flops):
        return
    (chosen_by, some), (on_val, count) = (measured(run, model, on) for on in (run.slice, run.val))
    best = max(range(len(LINEAR_RATES)), key=lambda head: chosen_by[head])
    say(f"lr per 256   top-1 on {some} of train   on val")
    for head, rate in enumerate(LINEAR_RATES):
        mark = "  <- chosen on train" if head == best else ""
        say(f"{rate:10g}   {chosen_by[head][0]:18.2%}   {on_val[head][0]:6.2%}{mark}")
    (top1, top5), weights = on_val[best], models.full_state(model)
    say(f"top-1 {top1:.2%}, top-5 {top5:.2%} on {count} pictures")
    if run.process == 0:
        weights = model.classifier_state(weights, best)
    finish(run, weights, config, {"top1": top1, "top5": top5, "lr_per_256": LINEAR_RATES[best]})


def finish(run, weights, config, result):
    """Hand over model.pt, and say what to type next."""
    if run.process == 0:
        models.save_weights(run.out / "model.pt", weights, config)
        print(f"wrote {run.out / 'model.pt'}")
        flags = ["--checkpoint", str(run.out / "model.pt"), "--data", run.data or "toy"]
        pairs = run.task == "lit"
        names = ["val_data", "labels", "val_labels", *(["tokenizer_file"] if pairs else [])]
        names += ["span", "stride", "short_side"] if run.clips else []
        for name in names:
            given = getattr(run, name)
            flag = f"--{name.removesuffix('_file').replace('_', '-')}"
            flags += [flag, str(given)] if given is not None else []
        usual = 1.0 if pairs or run.clips else evaluate.usual_crop(run.image_size)
        if run.val_crop != usual and run.task != "detect":
            flags += ["--val-crop", str(run.val_crop)]
        if run.max_pixels != data.MAX_PIXELS:
            flags += ["--max-pixels", str(run.max_pixels)]
        task = run.task if run.task in ("video", "detect") else "classify"
        task = task if not pairs else "zeroshot" if run.val.classes else "retrieval"
        if task == "retrieval" and run.caption_key != "caption":
            flags += ["--caption-key", run.caption_key]
        print(f"next: python evaluate.py --task {task} {shlex.join(flags)}")
        print(json.dumps({"task": run.task, **result}))


def lowshot(run, say):
    trunk = build_trunk(run, say).to(run.device).eval()
    labels = torch.from_numpy(data.all_labels(run.train))
    known = ((labels >= 0) & (labels < run.classes)).nonzero()[:, 0]
    outside = int((labels >= run.classes).sum())
    if not len(known) or outside > max(1, run.max_bad * len(labels)):
        raise ValueError(f"{outside} labels of train are over {run.classes - 1}, the last class")
    if len(known) < len(labels):
        say(f"{len(labels) - len(known)} pictures without a known label are left out")
    options = {"workers": run.workers, "device": run.device, "max_bad": run.max_bad}
    options["centre"] = run.val_crop

    def features(source):
        x, y, _ = evaluate.extract({"": trunk.features}, source, trunk.config, **options)
        known = (y >= 0) & (y < run.classes)
        return x[""][known], y[known]

    def logistic(source, seed, penalty, name):
        scores = (logistic_scores(*features(source), x, run.classes, penalty) for x, _ in frozen)
        return [evaluate.accuracy(found, y, 1) for found, (_, y) in zip(scores, frozen)]

    def prompts(source, seed, rate, name):
        return train_prompts(run, source, seed, rate, run.out / f"{name}-lr-{rate:g}", say)

    frozen, tops = [features(run.slice), features(run.val)], {}
    ways = ((prompts, LOWSHOT_RATES), (logistic, PENALTIES))
    for (fit, grid), shots in itertools.product(ways, run.shots):
        for seed in SEEDS:
            chosen = known[few_shot_split(labels[known], int(shots), seed)]
            source, name = data.Subset(run.train, chosen.tolist()), f"{shots}-shots-draw-{seed}"
            tried = [fit(source, seed, value, name) for value in grid]  # (on the slice, on val)
            best = max(range(len(grid)), key=lambda i: tried[i][0])
            grid = [grid[best]]  # what is best on the slice at the first draw is used for all
            tops.setdefault(fit.__name__, {}).setdefault(shots, []).append(tried[best][1])
    say(f"top-1 on {len(frozen[1][1])} pictures, mean of {len(SEEDS)} draws (standard deviation)")
    say("shots     prompts (VPT)       logistic regression")
    for shots in run.shots:
        cells = (f"{np.mean(t[shots]):7.2%} ({np.std(t[shots]):.2%})" for t in tops.values())
        say(f"{shots:>5}   {'   '.join(cells)}")
    result = {
        key: {name: {k: float(f(v)) for k, v in t.items()} for name, t in tops.items()}
        for key, f in (("top1", np.mean), ("top1_std", np.std))
    }
    say(json.dumps({"task": "lowshot", **result}))


def train_prompts(run, source, seed, rate, out, say):
    """(top-1 on the slice, on val) of prompts that are trained on a source.

    It is a run in `out`, measured at its end: one that has ended before is not repeated.
    """
    run, count = copy.copy(run), int(source.sizes.sum())
    run.seed, run.lanes = seed, run.lanes or 48
    # 48 can be dealt to 1, 2, 3, 4, 6, 8 ... processes: nothing depends on how many there are.
    run.batch_size = min(run.batch_size, 48 * math.ceil(count / 48))
    steps = run.steps or math.ceil(run.epochs * math.ceil(count / run.batch_size))
    places, run.save_every = {"slice": run.slice, "val": run.val}, steps
    run.measure = lambda model: {k: measured(run, model, v)[0][0][0] for k, v in places.items()}
    share = run.batch_size // run.processes
    if run.micro_batch:  # at most: batches differ with the shots
        fitting = (n for n in range(2, share + 1, 2) if share % n == 0 and n <= run.micro_batch)
        run.micro_batch = max(fitting, default=2)
    model = Prompted(build_trunk(run, lambda _: None), seed)

    def optimizer(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW([{"params": trained, "initial_lr": rate}], weight_decay=1e-4)

    flops = 2 * flops_per_image(model.trunk)  # whose weights need no gradients
    make = sample_maker(run, min_crop=run.min_crop)
    if not train(run, model, optimizer, source, make, out, steps, lambda _: None, flops):
        say(f"stopped in {out}, saved: the same command goes on")
        raise SystemExit(0)
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    say(f"prompts, {out.name}: {last['slice']:.2%} on the slice of train, {last['val']:.2%} on val")
    return last["slice"], last["val"]


def lit(run, say):
    with torch.device("meta"):
        model = TwoTowers(pool=run.pool, **run.config)
    model = model.to_empty(device="cpu")
    models.initialize(model, run.seed)
    say(models.load_weights(model, *run.weights))
    if run.text_weights:
        model.text.load_state_dict(run.text_weights)
        say(f"text tower: {len(run.text_weights)} tensors loaded from {run.text_init}")
    config, tokenizer = model.config, run.tokenizer
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("text", "image_projection", "logit_scale")))
    steps = run.steps or math.ceil(run.epochs * int(run.train.sizes.sum()) / run.batch_size)
    run.features = None
    if run.cache_features:  # for a run that will not be refused
        find_checkpoint(run.out, run.resume, run.identity | {"steps": steps})
        run.features = cached_features(run, model.to(run.device), say)

    def optimizer(model):
        groups = models.parameter_groups(model, run.weight_decay)
        groups = [group | {"initial_lr": run.lr} for group in groups]
        adam = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=run.device.type != "mps")

        @torch.no_grad()
        def clamp(*_):  # as CLIP's; right after a step FSDP's weights are the ones that stay
            model.logit_scale.clamp_(max=math.log(100))

        adam.register_step_post_hook(clamp)
        return adam

    def measure(model):
        options = {"workers": run.workers, "device": run.device, "max_bad": run.max_bad}
        model.eval()
        found = retrieval(model, run.val, tokenizer, centre=run.val_crop, **options)
        model.train()
        return found

    run.measure = measure
    # What a text's blocks keep for its backward, as a picture's do: see models.training_memory.
    settled = copy.copy(run)
    settled.shard_group = settle_sharding(model, run)
    length, share = run.context + 2, run.batch_size // run.processes
    each = 16 * (2 if run.precision == "bf16" else 4) * len(model.text.blocks) * model.text.width
    room = memory_budget(model, settled)
    room -= training_memory(model, settled, 0, False)["peak"]
    most = min(fitting_batch(model, share, settled), room / (each * length))
    fitting = (n for n in range(2, share + 1, 2) if share % n == 0 and n <= most)
    run.micro_batch = run.micro_batch or max(fitting, default=2)
    some = data.Subset(run.train, range(min(256, int(run.train.sizes.sum()))))
    some = [captions[0] if captions else "" for captions in all_captions(some)]
    some = tokenizer(some, run.context)
    length = (some != PADDING).sum().item() / max(1, len(some))
    flops = 3 * len(model.text.blocks) * block_flops(model.text.width, length)
    flops += 0 if run.cache_features else flops_per_image(model)
    data.check_channels(run.config["channels"])
    shown = {"size": run.image_size, "channels": run.config["channels"], "min_crop": run.min_crop}
    make = partial(make_pair, tokenizer=tokenizer, context=run.context)
    make = partial(make, **({} if run.cache_features else shown))
    if not train(
        run,
        model,
        optimizer,
        run.train,
        make,
        run.out,
        steps,
        say,
        flops,
        learn_pairs,
        methods=("features",),
    ):
        return
    result, weights = measure(model), models.full_state(model)  # every process takes part
    say(recall_table(result))
    finish(run, weights, config, result)


def detect(run, say):
    config = run.config | {"class_names": run.train.classes, "drop_path": run.drop_path}
    config["masks"] = run.train.has_masks
    if run.train.frequencies:  # LVIS (detectron2's settings)
        config |= {"federated": 50, "score_threshold": 0.02, "detections": 300}
        config["class_counts"] = classes_present(run.train)[1].tolist()
    model = Detector(classes=run.classes, **config)
    models.initialize(model, run.seed)
    if run.weights:
        say(load_trunk(model, *run.weights))
    model.trunk.pos_embed.requires_grad_()  # trained from here on (detectron2)
    config = model.config | {"positions": "learned"}
    # One picture of 1024 pixels fills a GPU, and so do the biases of attention: see tests/bench.
    run.micro_batch = run.micro_batch or (
        run.batch_size // run.processes if run.image_size[0] <= 256 else 2
    )

    def optimizer(model):
        # Of H on, detectron2 decays norms and positions, too; of B and L, biases and relative ones.
        all_decayed = run.config["size"] in ("H", "2B", "6.5B")
        how = run.weight_decay, run.layer_decay, run.decay_floor, all_decayed
        groups = layer_groups(model, *how)
        groups = [group | {"initial_lr": run.lr} for group in groups]
        return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=run.device.type != "mps")

    def found(model):
        options = {"workers": run.workers, "device": run.device, "max_bad": run.max_bad}
        return detect_in(model, run.val, **options)

    def measure(model):
        last[:] = [found(model)]
        return detection_numbers(run.val, *last)

    last, run.measure = [], measure
    steps = run.steps or math.ceil(run.epochs * int(run.train.sizes.sum()) / run.batch_size)
    flops = 3 * detector_flops(model)
    make = scene_maker(run.train, {**run.config, "image_size": run.image_size}, run.jitter)
    how = learn_scenes, ("detect",)
    if not train(run, model, optimizer, run.train, make, run.out, steps, say, flops, *how):
        return
    # Every process takes part. A run that was at its end when it began has found nothing yet.
    detections, weights = last[0] if last else found(model), models.full_state(model)
    if run.process == 0:
        print_detection(run.val, detections, run.out / "detections.png")
    finish(run, weights, config, detection_numbers(run.val, detections))


def cached_features(run, model, say):
    """(n, D) features of the centres of train's pictures, nan where unreadable: a file in --out."""
    encoder = models.encoder_config(run.config)  # --heads change it, and no tensor
    facts = run.train.identity, run.origin, encoder, run.val_crop, run.pool
    facts += (run.max_pixels,) if run.max_pixels != data.MAX_PIXELS else ()
    path = run.out / f"features-{data.stable_hash(str(facts)).hex()}.npy"
    found = path.exists()
    barrier()  # all have looked before the first one writes
    if not found:
        options = {"workers": run.workers, "device": run.device, "max_bad": run.max_bad}
        options["centre"] = run.val_crop
        x, _, rows = evaluate.extract({"": model.features}, run.train, model.config, **options)
        table = torch.full((int(run.train.sizes.sum()), model.width), torch.nan)
        table[rows] = x[""]
        if run.process == 0:
            run.out.mkdir(parents=True, exist_ok=True)
            np.save(f"{path}.tmp.npy", table.numpy())
            os.replace(f"{path}.tmp.npy", path)
            say(f"wrote {path}: features of {len(rows)} pictures")
        barrier()
    return torch.from_numpy(np.load(path, mmap_mode="c"))


TASKS = {"classify": classify, "linear": linear, "lowshot": lowshot, "lit": lit}
TASKS |= {"video": classify, "detect": detect}


def average_weights(optimizer):
    """EMA: a group's "ema" is the decay. Averages live in the optimizer's state: that is saved."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("ema") else ():
            average = optimizer.state[parameter].setdefault("average", parameter.detach().clone())
            average.lerp_(parameter.detach(), 1 - group["ema"])


@torch.no_grad()
def swap_average(optimizer):
    """Exchange weights and averages, to measure the latter; and again, back."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("ema") else ():
            average, kept = optimizer.state[parameter]["average"], parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)


@errors.record  # torchrun shows the traceback of the process that failed first
def main(argv=None):
    run = parse_arguments(argv)
    try:
        prepare(run)
        if run.device.type == "cuda":
            torch.cuda.set_device(run.device)
        if run.processes > 1 and not run.plan:
            backend = "cpu:gloo,cuda:nccl" if run.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=10))
            set_timeouts(minutes=30)
        counts = torch.ones(max(1, run.classes))
        if run.class_weights and not run.plan:
            labels = data.all_labels(run.train)
            known = torch.from_numpy(labels[(labels >= 0) & (labels < run.classes)])
            counts = torch.bincount(known, minlength=run.classes).clamp(min=1).float()
        run.weights_of_classes, run.measure = (counts.mean() / counts).to(run.device), None
        TASKS[run.task](run, tqdm.write if run.process == 0 else lambda _: None)
        if dist.is_initialized():
            dist.barrier()  # without it, a process may abort at exit
            dist.destroy_process_group()
    except (ValueError, OSError, RuntimeError) as error:
        fail(*verdict(error))
    except KeyboardInterrupt:  # before a loop, which saves
        fail("stopped", 130)


if __name__ == "__main__":
    main()
