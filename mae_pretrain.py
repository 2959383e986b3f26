"""Stage 1: a Vision Transformer learns to fill in hidden patches, without labels.

Laptop       python mae_pretrain.py                                       # toy world, two minutes
             python mae_pretrain.py --data my_photos/ --size T --batch-size 64 --out runs/photos
One GPU      python mae_pretrain.py --data my_photos/ --size B --batch-size 1024
One node     torchrun --nproc-per-node 8 mae_pretrain.py --size L --data 'shards/{00000..00999}.tar'
Many nodes   torchrun --nnodes 16 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500
                 mae_pretrain.py --size H --data 'shards/{00000..09999}.tar' --lanes 384
Beforehand   python mae_pretrain.py --size H --gpus 128 --lanes 384 --plan
Resume       the same command again: it goes on, exactly, from the last checkpoint in --out

The recipe of this masked autoencoder (MAE) is He et al.'s (arXiv 2111.06377), which the
paper (arXiv 2303.13496) reuses unchanged for every size: hide 75 % of the patches, encode
the rest, predict the pixels of the hidden ones.
"""

import gc
import math
import os
from functools import partial
from typing import NamedTuple

# On a CPU, OpenMP's idle threads spin: on two cores, one busy loader process then makes
# two training threads ten times slower than one. Passive ones sleep. (Before torch!)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch.distributed.elastic.multiprocessing import errors

import data
import evaluate
import kernels
import model as models
from support import flags, launch
from support.checkpoints import find_checkpoint
from support.formats import inherit
from support.loader import Stop, loader, loader_workers
from support.pictures import draw_step, first_pictures, reconstructions
from support.plan import (
    attention_shapes,
    compiles,
    describe_run,
    flops_per_image,
    peak_flops,
    peak_lr,
    planned_batch,
    print_plan,
    settle_batch,
)
from support.probe import PROBES_SHOWN, open_probe


class Recipe(NamedTuple):
    batch_size: int
    lr: float  # peak, for this batch size and width: see peak_lr
    image_size: int
    samples: int | None  # None: the paper's number, see prepare
    mask_ratio: float
    min_crop: float
    width: int = 768


def recipe(size):
    if size == "toy":
        # Ours: some two minutes on two cores. Of 16 patches, 4 visible ones would be too few.
        return Recipe(32, 1e-3, 32, 80_000, mask_ratio=0.5, min_crop=1.0, width=128)
    # Public MAE code, PRETRAIN.md
    return Recipe(4096, 2.4e-3, 224, None, mask_ratio=0.75, min_crop=0.2)


# ---------------------------------------------------------------------------- arguments


def parse_arguments(argv):
    parser = flags.make_parser("mae_pretrain.py", "Stage 1.")
    groups = parser.groups
    add = groups["data"].add_argument
    add("--data", help="folder of pictures, tar shards (path, glob, {000..099}), or toy (toy)")
    add("--val-data", help="pictures to measure on (DATA/val, else some held out of DATA)")
    flags.add_val_share(add)
    add("--image-size", type=models.pair, help="side or HEIGHTxWIDTH (224; toy size: 32)")
    add("--channels", type=flags.count, help="of the pictures: 1 grey, 3 RGB, 4 RGBA (3)")
    add("--min-crop", type=flags.fraction, help="least area of a crop (0.2; toy: 1)")
    add = groups["model"].add_argument
    add("--size", help=f"{' '.join(models.SIZES)}, or WIDTHxLAYERSxHEADS (toy)")
    add("--decoder", type=models.triple, help="WIDTHxLAYERSxHEADS (512x8x16; toy, T: smaller)")
    add("--mask-ratio", type=flags.fraction, help="share of hidden patches (0.75; toy: 0.5)")
    target = {"dest": "normalize_targets", "default": None}
    add("--raw-pixels", action="store_false", **target, help="predict pixels as they are")
    add("--no-raw-pixels", action="store_true", **target, help="normalised patches (default)")
    add("--init", help="weights to start from: a model.pt or a public MAE checkpoint")
    add = groups["optimisation"].add_argument
    add("--lr", type=flags.positive, help="peak (2.4e-3 or less: printed first; toy: 1e-3)")
    add("--warmup", type=flags.fraction, default=0.05, help="share of the steps (0.05)")
    add("--weight-decay", type=flags.not_negative, default=0.05, help="not of 1-D tensors (0.05)")
    add("--cuda-graph", action="store_true", help="one GPU: replay a recorded micro-batch")
    flags.add_length_flags(groups, "(1600, but at most 5e9 samples)", "(toy size: 80,000)")
    flags.add_flags(groups, "runs/mae", "4096; toy size: 32", "weights, order, crops and masks")
    flags.add_probe_flags(groups)
    flags.add_resume_flags(groups)
    flags.add_plan_flags(groups)
    return parser.parse_args(argv)


def prepare(run):
    """Settle what the arguments leave open, in `run` itself, and open the data.

    Raises ValueError if an argument is unusable. The model has no memory yet.
    """
    # -------------------------------------------------------------------------- runtime
    kind = launch.place(run)
    run.compile = compiles(kind) if run.compile is None else run.compile
    run.workers = loader_workers(run.workers, run.processes_here)

    # --------------------------------------------------------------- the model's config
    names = "size", "patch_size", "image_size", "channels"
    names += "decoder", "mask_ratio", "normalize_targets"
    given = {name: getattr(run, name) for name in names if getattr(run, name) is not None}
    if not run.init:
        own = recipe(given.setdefault("size", "toy"))
        given = {"image_size": own.image_size, "mask_ratio": own.mask_ratio, **given}
    names += "positions", "norm_eps"
    run.weights, run.config, origin = inherit(run.init, given, names, run.heads, entry=run.entry)
    size, channels = models.pair(run.config["image_size"]), run.config.get("channels", 3)

    # ----------------------------------------------------------------------------- data
    data.check_channels(channels)
    data.limit_pixels(run.max_pixels)
    options = {"cache": (run.cache_dir, run.cache_size), "labelled": False}
    options["val_share"] = run.val_share
    train, run.val = data.open_sources(run.data or "toy", run.val_data, size, **options)
    run.source, run.held_out = data.hold_out(train, run.val, data.HELD_OUT)
    # A plan without data assumes a number of lanes that the processes can share.
    planned = math.lcm(48, run.processes) if run.plan and not run.data else None
    order = data.Order(run.source.sizes, run.seed, run.lanes or planned)

    # ---------------------------------------------------------------- model and batches
    with torch.device("meta"):  # shapes without memory
        run.model = models.MAE(**run.config)
    run.config = run.model.config
    own = recipe(run.config["size"])
    # The toy size's crops are for toy pictures.
    min_crop = own.min_crop if run.source.endless else recipe("B").min_crop
    run.min_crop = min_crop if run.min_crop is None else run.min_crop
    run.batch_size = run.batch_size or planned_batch(own.batch_size, run)
    settle_batch(run, run.model)
    make = partial(make_sample, size=size, channels=channels, num_patches=run.model.num_patches)
    crops = partial(make, min_crop=run.min_crop, flip=not run.no_flip)
    processes = run.process, run.processes
    stream = {"order": order, "seed": run.seed, "micro_batches": run.micro_batches}
    run.batches = data.Batches(run.source, crops, run.batch_size, *processes, **stream)
    eval_batch = 2 * run.processes * max(1, run.micro_batch // 2)  # each process takes pairs
    run.held_out_batches = data.Batches(run.held_out, make, eval_batch, *processes)

    # -------------------------------------------------------------------- length and lr
    # The paper trains 1600 epochs of ImageNet-1k, and 5 billion samples of its own data.
    usual = 5e9 if run.plan and not run.data else min(1600 * order.length, 5e9)
    samples = (run.epochs or 0) * order.length or run.samples or own.samples or usual
    run.steps = run.steps or math.ceil(samples / run.batch_size)
    lr_is_for, actual = (own.batch_size, own.width), (run.batch_size, run.model.width)
    run.lr, run.lr_origin = peak_lr(run.lr, own.lr, lr_is_for, actual)
    run.save_every = run.save_every or min(1000, math.ceil(run.steps / 10))
    same = ("batch_size", "steps", "lr", "warmup", "weight_decay", "seed", "min_crop", "precision")
    run.identity = {"stage": "mae_pretrain", "data": run.source.identity, "model": run.config}
    run.identity |= {"held_out": run.held_out.identity, "lanes": order.lanes, "init": origin}
    run.identity |= {name: getattr(run, name) for name in same} | flags.identity(run)
    if not run.plan:
        shapes = attention_shapes(run.model)
        run.attention = kernels.describe(shapes, run.device, run.precision)
        run.checkpoint = find_checkpoint(run.out, run.resume, run.identity)
        run.probe = None if run.draw_step else open_probe(run)


def make_sample(sample, key, size, channels, num_patches, min_crop=None, flip=True):
    """A row of a batch: images (C, H, W) uint8; ids (N,), a random order of the patches."""
    ids = torch.from_numpy(data.permutation(num_patches, *key, data.MASK))
    images = data.make_picture(sample, key, size, channels, min_crop, flip=flip)
    return {"images": images, "ids": ids}


def train(run):
    """Train to the end, or until a signal. Return the weights, in the first process."""
    # -------------------------------------------------------------------------- runtime
    launch.begin(run)
    stop = Stop()  # signals from here on: the loop saves and ends
    device, say = run.device, run.say

    # ---------------------------------------------------------------------- parallelize
    model = run.model
    parallel = models.parallelize(  # what the step calls: the model, or DDP around it
        model,
        device,
        run.shard_group,
        precision=run.precision,
        compile=run.compile,
        checkpoint_activations=run.checkpoint_activations,
        methods=["probe_features"],
    )
    models.initialize(model, run.seed)  # it has memory since parallelize()
    if run.weights:
        say(models.load_weights(model, *run.weights))
        run.weights = None

    # ------------------------------------------------------------------------ optimizer
    groups = models.parameter_groups(model, run.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type != "mps")

    # --------------------------------------------------------------------------- resume
    record = launch.resume(run, model, optimizer)

    # ------------------------------------------------------------------ what is trained
    flops, (peak, chip) = 3 * flops_per_image(model), peak_flops(device)
    toy = "" if run.data else " (no --data was given)"
    say(f"data     {run.source.identity}{toy}; {run.held_out.sizes.sum()} others to measure on")
    describe_run(run, model, flops, chip)

    def forward_backward(images, ids, weight):
        """Forward and backward of a micro-batch: its part of the loss, and its weight."""
        losses = parallel(data.normalize(images), ids)  # (micro-batch,)
        loss = (losses * weight).sum() / run.batch_size
        (loss * run.processes).backward()  # gradients are averaged over the processes
        return torch.stack([loss.detach(), weight.sum()])

    if run.cuda_graph:
        from support.cuda_graph import CUDAGraph

        forward_backward = CUDAGraph(forward_backward)

    # ----------------------------------------------------------------------------- loop
    progress = launch.Progress(run, record, ["bad"], flops, peak)
    drawn = min(8, run.held_out_batches.total) if run.log_to else 0
    pictures = first_pictures(run.held_out, run.config, drawn)["images"] if drawn else None
    numbers = range(progress.done * run.micro_batches, run.steps * run.micro_batches)
    batches = iter(loader(run.batches, numbers, run.workers, pin=device.type == "cuda"))
    for step in range(progress.done, run.steps):
        lr = learning_rate(step, run)
        for group in optimizer.param_groups:
            group["lr"] = lr

        totals = launch.Totals(device)
        for micro_batch in range(run.micro_batches):
            batch = progress.wait_for(batches)
            inputs = launch.to(device, batch, "images", "ids", "weight")
            with models.sync_gradients(parallel, last=micro_batch == run.micro_batches - 1):
                loss, weight = forward_backward(*inputs)
            totals.add(loss, weight, batch["bad"])

        totals.read(run, model, stop)  # the one host read of a step
        if totals.lacking:  # a process has got no batch: this step is not taken
            break
        progress.count(totals)
        progress.check(run.batches)
        launch.guard(model, run, step, totals, lr)
        totals.clip(model, run.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not run.cuda_graph)  # a CUDA graph writes into them

        if progress.stepped():
            facts = {"loss": totals.loss, "lr": lr, "grad_norm": totals.norm}
            # Measure only once training has cost more than it (3 forwards a sample).
            trained = 3 * progress.done * run.batch_size
            if progress.saving and trained >= run.held_out_batches.total > 0:
                measured = evaluate.masked_loss, model, run.held_out_batches, device
                facts["held_out_loss"] = launch.unless_lacking(stop, *measured)
            if progress.saving and run.probe and run.probe.is_due(progress.done):
                facts |= launch.unless_lacking(stop, run.probe, model) or {}
            shown = {"held_out_loss": "held-out {:.4f}", "bad": "unreadable {}"}
            progress.log(facts, shown | PROBES_SHOWN)
        if progress.saving:
            if drawn:  # by all processes: they may share the weights
                progress.show("reconstructions", reconstructions(model, pictures))
            progress.save(model, optimizer)
        if totals.stopping:
            break

    # ------------------------------------------------------------------------------ end
    finished = progress.finish(model, optimizer, stop)
    weights = models.full_state(model) if finished else None  # every process takes part
    launch.end(run)
    run.model = None
    return weights


def learning_rate(step, run):
    """The rate of a step: linear warm-up that starts above 0, then half a cosine to 0."""
    warmup = run.warmup * run.steps
    if step < warmup:
        return run.lr * (step + 1) / (warmup + 1)
    return run.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (run.steps - warmup)))


def finish(run, weights):
    """Hand over model.pt, show what was learned, and say what to type next."""
    models.save_weights(run.out / "model.pt", weights, run.config)
    print(f"wrote {run.out / 'model.pt'}")
    evaluate.show_autoencoder(weights, run)
    if run.source.endless:  # the toy world has hashtags, too
        samples = run.steps * run.batch_size  # the next stage's own length may cost more
        shorter = {"samples": samples} if samples < 25_600 else {}
        return flags.print_next(run, "weak_pretrain.py", init=run.out / "model.pt", **shorter)
    labels = run.val and run.val.classes and run.source.classes
    # knn reads each picture once: not after a shorter training.
    cheap = labels and run.source.sizes.sum() + run.val.sizes.sum() <= run.steps * run.batch_size
    task = "knn" if cheap else "attention"
    flags.print_next(run, "evaluate.py", task=task, checkpoint=run.out / "model.pt")


@errors.record  # torchrun shows the traceback of the process that failed first
def main(argv=None):
    run = parse_arguments(argv)
    with launch.report_errors("mae_pretrain.py"):
        prepare(run)
        if run.plan:
            print_plan(run)
        elif run.draw_step:
            draw_step(run, run.batches)
        elif weights := train(run):
            gc.collect()  # free the model and the optimizer: finish() needs memory
            finish(run, weights)


if __name__ == "__main__":
    main()
