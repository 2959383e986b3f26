"""Stage 2: the encoder learns to predict hashtags: weakly supervised pretraining.

Laptop       python weak_pretrain.py [--init runs/mae/model.pt]           # toy world, one minute
Own data     python data.py hashtags 'shards/*.tar' --out tags/           # vocabulary and weights
One GPU      python weak_pretrain.py --data 'shards/*.tar' --tags tags/ --init mae.pt
One node     torchrun --nproc-per-node 8 weak_pretrain.py --data 'shards/*.tar' --tags tags/ ...
Many nodes   torchrun --nnodes 16 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500
                 weak_pretrain.py --size H --data 'shards/*.tar' --tags tags/ --lanes 384 ...
Beforehand   python weak_pretrain.py --size H --gpus 128 --lanes 384 --plan
Resume       the same command again: it goes on, exactly, from the last checkpoint in --out

The recipe is SWAG's (arXiv 2201.08371), which the paper (arXiv 2303.13496) reuses
unchanged, with and without stage 1's weights: softmax over all hashtags against 1/K on
each of a picture's K.
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
from support import flags, hashtags, launch
from support.checkpoints import find_checkpoint
from support.formats import inherit
from support.loader import Stop, loader, loader_workers
from support.pictures import draw_step
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
from support.probe import PROBES_SHOWN, open_probe, print_probe


class Recipe(NamedTuple):
    batch_size: int
    lr: float  # peak, for this batch size and width: see peak_lr
    image_size: int
    samples: int | None  # None: an epoch
    min_crop: float
    beta2: float = 0.999
    clip: float | None = None  # largest norm of the gradient
    pool: str = "cls"  # what the head reads
    width: int = 768


def recipe(size):
    """Ours for toy; the others are recalled of SWAG's and the paper's, unverified."""
    if size == "toy":
        return Recipe(64, 1e-3, 32, 25_600, min_crop=1.0, pool="mean", width=128)
    if size in ("2B", "6.5B"):  # for stability
        return Recipe(8192, 1e-4, 224, None, min_crop=0.08, beta2=0.95, clip=1.0)
    return Recipe(8192, 4e-4, 224, None, min_crop=0.08)


# ---------------------------------------------------------------------------- arguments


def parse_arguments(argv):
    parser = flags.make_parser("weak_pretrain.py", "Stage 2.")
    groups = parser.groups
    add = groups["data"].add_argument
    add("--data", help="folder of pictures, tar shards (path, glob, {000..099}), or toy (toy)")
    add("--labels", help='JSON lines of {"path", "hashtags"} for the pictures of a folder')
    add("--tags", help="what `python data.py hashtags` wrote for this data (toy has its own)")
    add("--image-size", type=models.pair, help="side or HEIGHTxWIDTH (224; toy size: 32)")
    add("--channels", type=flags.count, help="of the pictures: 1 grey, 3 RGB, 4 RGBA (3)")
    add("--min-crop", type=flags.fraction, help="least area of a crop, 1: none (0.08; toy: 1)")
    add = groups["model"].add_argument
    add("--size", help=f"{' '.join(models.SIZES)}, or WIDTHxLAYERSxHEADS (toy)")
    add("--pool", choices=("cls", "mean"), help="what the head reads (cls token; toy: patch mean)")
    add("--init", help="weights to start from: stage 1's model.pt, or a public MAE's")
    add = groups["optimisation"].add_argument
    add("--lr", type=flags.positive, help="peak (4e-4, 2B and up 1e-4, or less; toy: 1e-3)")
    add("--warmup", type=flags.fraction, default=0.05, help="share of the steps (0.05)")
    add("--weight-decay", type=flags.not_negative, default=0.1, help="not of 1-D tensors (0.1)")
    add("--cuda-graph", action="store_true", help="one GPU: replay a recorded micro-batch")
    flags.add_length_flags(groups, "passes over the data", "(an epoch; toy size: 25,600)")
    flags.add_flags(groups, "runs/weak", "8192; toy size: 64", "weights, order and crops")
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
    names = "size", "patch_size", "image_size", "channels", "pool"
    given = {name: getattr(run, name) for name in names if getattr(run, name) is not None}
    if not run.init:
        given.setdefault("size", "toy")
        given.setdefault("image_size", recipe(given["size"]).image_size)
    names += "positions", "norm_eps"
    run.weights, config, origin = inherit(run.init, given, names, run.heads, entry=run.entry)
    size, channels = models.pair(config["image_size"]), config.get("channels", 3)

    # ----------------------------------------------------------------------------- data
    data.check_channels(channels)
    data.limit_pixels(run.max_pixels)
    options = {"cache": (run.cache_dir, run.cache_size), "labelled": False}
    source, _ = data.open_sources(run.data or "toy", None, size, run.labels, **options)
    if run.plan and not run.tags and run.size not in (None, "toy"):  # the paper's number of tags
        run.vocabulary = hashtags.Vocabulary(dict.fromkeys(map(str, range(28_000)), 1), {})
        run.source, run.held_out, weights = source, source, {}
    else:
        run.vocabulary, run.source, run.held_out, weights = hashtags.open_hashtags(source, run.tags)
    # A plan without data assumes a number of lanes that the processes can share.
    planned = math.lcm(48, run.processes) if run.plan and not run.data else None
    new_order = partial(hashtags.WeightedOrder, **weights) if weights else data.Order
    order = new_order(run.source.sizes, run.seed, run.lanes or planned)

    # ---------------------------------------------------------------- model and batches
    own = recipe(config["size"])
    config.setdefault("pool", own.pool)
    with torch.device("meta"):  # shapes without memory
        run.model = models.Classifier(classes=len(run.vocabulary), **config)
    run.config = run.model.config
    run.beta2 = own.beta2
    # The toy size's crops are for toy pictures.
    min_crop = own.min_crop if run.source.endless else recipe("B").min_crop
    run.min_crop = min_crop if run.min_crop is None else run.min_crop
    run.batch_size = run.batch_size or planned_batch(own.batch_size, run)
    settle_batch(run, run.model)
    make = partial(make_sample, size=size, channels=channels, vocabulary=run.vocabulary)
    crops = partial(make, min_crop=run.min_crop, flip=not run.no_flip)
    processes = run.process, run.processes
    stream = {"order": order, "seed": run.seed, "micro_batches": run.micro_batches}
    run.batches = data.Batches(run.source, crops, run.batch_size, *processes, **stream)
    eval_batch = 2 * run.processes * max(1, run.micro_batch // 2)  # each process takes pairs
    run.held_out_batches = data.Batches(run.held_out, make, eval_batch, *processes)

    # -------------------------------------------------------------------- length and lr
    epoch = 5e9 if run.plan and not run.data else order.length  # 5e9: the paper's
    samples = (run.epochs or 0) * order.length or run.samples or own.samples or epoch
    run.steps = run.steps or math.ceil(samples / run.batch_size)
    # Our choice, by docs/results.md: the paper's rate down to a batch of 1024.
    lr_is_for, actual = (min(1024, own.batch_size), own.width), (run.batch_size, run.model.width)
    run.lr, run.lr_origin = peak_lr(run.lr, own.lr, lr_is_for, actual)
    run.save_every = run.save_every or min(1000, math.ceil(run.steps / 10))
    same = ("batch_size", "steps", "lr", "warmup", "weight_decay", "seed", "min_crop", "precision")
    run.identity = {"stage": "weak_pretrain", "data": run.source.identity, "model": run.config}
    run.identity |= {"tags": run.vocabulary.identity, "lanes": order.lanes, "init": origin}
    run.identity["bias"] = "prior"  # runs of earlier versions, whose bias began at 0, have none
    run.identity |= {name: getattr(run, name) for name in same} | flags.identity(run, own.clip)
    run.clip = own.clip if run.clip is None else run.clip
    if not run.plan:
        shapes = attention_shapes(run.model)
        run.attention = kernels.describe(shapes, run.device, run.precision)
        run.checkpoint = find_checkpoint(run.out, run.resume, run.identity)
        run.probe = None if run.draw_step else open_probe(run)


def make_sample(sample, key, size, channels, vocabulary, min_crop=None, flip=True):
    """A row of a batch: images (C, H, W) uint8; tags (T,) int64; weight 0 without tags."""
    tags = torch.tensor(vocabulary.ids(sample["hashtags"]()) if sample else [], dtype=torch.int64)
    images = data.make_picture(sample, key, size, channels, min_crop, flip=flip)
    return {"images": images, "tags": tags, "weight": float(len(tags) > 0)}


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
    # AdamW moves a bias by about lr a step. In a short run, logits of -8 would have to come
    # from the features, which would then hardly differ between pictures: see docs/results.md.
    prior = run.vocabulary.prior().to(device)  # (V,)
    models.copy_into(model.head.bias, prior)

    # ------------------------------------------------------------------------ optimizer
    groups = models.parameter_groups(model, run.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, run.beta2), fused=device.type != "mps")

    # --------------------------------------------------------------------------- resume
    record = launch.resume(run, model, optimizer)

    # ------------------------------------------------------------------ what is trained
    flops, (peak, chip) = 3 * flops_per_image(model), peak_flops(device)
    toy = "" if run.data else " (no --data was given)"
    say(f"data     {run.source.identity}{toy}; {len(run.vocabulary)} hashtags")
    describe_run(run, model, flops, chip)

    def forward_backward(images, tags, weight):
        """Forward and backward of a micro-batch: its part of the loss, and its weight."""
        losses = models.tag_loss(parallel(data.normalize(images)), tags)  # (micro-batch,)
        loss = (losses * weight).sum() / run.batch_size
        (loss * run.processes).backward()  # gradients are averaged over the processes
        return torch.stack([loss.detach(), weight.sum()])

    if run.cuda_graph:
        from support.cuda_graph import CUDAGraph

        forward_backward = CUDAGraph(forward_backward)

    # ----------------------------------------------------------------------------- loop
    progress = launch.Progress(run, record, ["bad", "untagged"], flops, peak)
    numbers = range(progress.done * run.micro_batches, run.steps * run.micro_batches)
    batches = iter(loader(run.batches, numbers, run.workers, pin=device.type == "cuda"))
    for step in range(progress.done, run.steps):
        lr = learning_rate(step, run)
        for group in optimizer.param_groups:
            group["lr"] = lr

        totals = launch.Totals(device)
        for micro_batch in range(run.micro_batches):
            batch = progress.wait_for(batches)
            inputs = launch.to(device, batch, "images", "tags", "weight")
            with models.sync_gradients(parallel, last=micro_batch == run.micro_batches - 1):
                loss, weight = forward_backward(*inputs)
            totals.add(loss, weight, batch["bad"])

        totals.read(run, model, stop)  # the one host read of a step
        if totals.lacking:  # a process has got no batch: this step is not taken
            break
        untagged = run.batch_size - round(totals.weight) - totals.new_bad
        progress.count(totals, untagged=untagged)
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
                options = {"criterion": models.tag_loss, "constant": prior}
                measure = partial(evaluate.hit_rates, **options)
                measured = measure, model, run.held_out_batches, device, "tags"
                facts |= hashtags.name_hits(launch.unless_lacking(stop, *measured))
            if progress.saving and run.probe and run.probe.is_due(progress.done):
                facts |= launch.unless_lacking(stop, run.probe, model) or {}
            shown = {"bad": "unreadable {}", "untagged": "without tags {}"}
            progress.log(facts, hashtags.HITS_SHOWN | shown | PROBES_SHOWN)
        if progress.saving:
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
    """The rate of a step: linear warm-up that starts above 0, then a line to 0 (unverified)."""
    warmup = run.warmup * run.steps
    if step < warmup:
        return run.lr * (step + 1) / (warmup + 1)
    return run.lr * (run.steps - step) / (run.steps - warmup)


def finish(run, weights):
    """Hand over model.pt, show what was learned, and say what to type next."""
    config = run.config | {"class_names": list(run.vocabulary.counts)}
    models.save_weights(run.out / "model.pt", weights, config)
    print(f"wrote {run.out / 'model.pt'}")
    hashtags.print_hits(launch.last_metrics(run.out))
    if run.source.endless:
        options = {"workers": run.workers, "device": run.device}
        sources, samples = (run.source, run.held_out), run.steps * run.batch_size
        print_probe(weights, config, *sources, run.seed, samples, **options)
    path, where = run.out / "model.pt", {"data": "DIR", "labels": None}
    if run.source.endless:
        return flags.print_next(run, "finetune.py", task="classify", init=path)
    typed = {"task": "fewshot", "pool": config["pool"], "checkpoint": path, **where}
    flags.print_next(run, "evaluate.py", **typed)
    print("      (DIR holds train/CLASS/* and val/CLASS/*)")


@errors.record  # torchrun shows the traceback of the process that failed first
def main(argv=None):
    run = parse_arguments(argv)
    with launch.report_errors("weak_pretrain.py"):
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
