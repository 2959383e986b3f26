"""Stage 1: a Vision Transformer learns to fill in hidden patches. No labels. (MAE pre-pretraining)

Laptop       python mae_pretrain.py                                       # toy world, two minutes
             python mae_pretrain.py --data my_photos/ --size S --batch-size 256 --epochs 100
One GPU      python mae_pretrain.py --data my_photos/ --size B --batch-size 1024
One node     torchrun --nproc-per-node 8 mae_pretrain.py --size L --data 'shards/{00000..00999}.tar'
Many nodes   torchrun --nnodes 16 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500
                 mae_pretrain.py --size H --data 'shards/{00000..09999}.tar' --lanes 384
Beforehand   python mae_pretrain.py --size H --gpus 128 --lanes 384 --plan
Resume       the same command again: it goes on, exactly, from the last checkpoint in --out

The recipe is He et al.'s (arXiv 2111.06377), which the paper (arXiv 2303.13496) reuses unchanged
for every size: hide 75 % of the patches, encode the rest, predict the pixels of the hidden ones.
"""

import argparse
import gc
import json
import math
import os
import shlex
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

# On a CPU, OpenMP's idle threads spin: on two cores, one busy loader process then makes two
# training threads ten times slower than one. Passive ones sleep. Said before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import errors
from tqdm import tqdm

import data
import evaluate
import kernels
import model as models
from support.checkpoints import begin_run, find_checkpoint, load_checkpoint, save_checkpoint
from support.launch import check_agreement, not_finite, set_timeouts, verdict
from support.plan import (
    check_shard_group,
    describe_sharding,
    fitting_batch,
    flops_per_image,
    peak_flops,
    peak_memory,
    planned_batch,
    print_plan,
    settle_sharding,
)


def recipe(size):
    """(batch size, peak lr per 256 images, image side, samples or None for the paper's)."""
    if size == "toy":
        return 32, 8e-3, 48, 24_000  # ours: under two minutes on two slow cores
    return 4096, 1.5e-4, 224, None  # public MAE code, PRETRAIN.md


# ---------------------------------------------------------------------------------------- arguments


def parse_arguments(argv):
    parser = argparse.ArgumentParser("mae_pretrain.py", allow_abbrev=False, description="Stage 1.")
    add = parser.add_argument_group("data").add_argument
    add("--data", help="a folder of pictures, tar shards (path, glob, {000..099}), or toy (toy)")
    add("--val-data", help="pictures to measure on (those in DATA/val, else some held out of DATA)")
    add("--cache-dir", help="folder for remote shards (of yours, among the temporary files)")
    add("--cache-size", default="20G", help="the most that it holds, like 500G (20G)")
    add("--image-size", type=models.pair, help="side or HEIGHTxWIDTH (224; toy size: 48)")
    add("--channels", type=int, help="to read pictures with: 1 grey, 3 RGB, 4 RGBA (3)")
    add("--min-crop", type=float, default=0.2, help="least area of a random crop, 1: none (0.2)")
    add("--lanes", type=int, help="streams that the order is dealt to (48, or the shards if fewer)")
    add("--workers", type=int, help="loader processes per training process (the cores left)")
    add("--max-bad", type=float, default=0.01, help="unreadable share to stop at (0.01)")
    pixels = {"type": data.pixel_limit, "default": data.MAX_PIXELS}
    add("--max-pixels", **pixels, help="of a picture: larger ones are unreadable (89 million)")
    add = parser.add_argument_group("model").add_argument
    add("--size", help=f"{' '.join(models.SIZES)}, or WIDTHxLAYERSxHEADS (toy)")
    add("--patch-size", type=int, help="side of a patch (the size's own)")
    add("--decoder", type=models.triple, help="WIDTHxLAYERSxHEADS (512x8x16; toy, T: smaller)")
    add("--mask-ratio", type=float, help="share of the patches that is hidden (0.75)")
    option = argparse.BooleanOptionalAction
    add("--raw-pixels", action=option, help="predict raw pixels, not normalised patches (no)")
    add("--init", help="weights to start from: a model.pt or a public MAE checkpoint")
    add("--heads", type=int, help="of an --init whose size is unknown")
    add("--entry", help="of an --init with several networks: state_dict_ema, or a prefix of names")
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=int, help="global, over all processes (4096; toy size: 32)")
    add("--micro-batch", type=int, help="images at once on a process (what should fit)")
    add("--lr", type=float, help="peak (1.5e-4 for 256 images of the batch; toy size: 8e-3)")
    add("--warmup", type=float, default=0.05, help="share of the steps (0.05)")
    add("--weight-decay", type=float, default=0.05, help="not of 1-D parameters (0.05)")
    add("--seed", type=int, default=0, help="of weights, order, crops and masks (0)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--steps", type=int, help="length of the run; or give --epochs, or --samples")
    add("--epochs", type=float, help="(1600, but at most 5e9 samples)")
    add("--samples", type=float, help="(toy size: 24,000)")
    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, default="runs/mae", help="where everything is written (runs/mae)")
    add("--resume", help="a run, or one of its checkpoints, to go on from (the one in --out)")
    add("--precision", choices=("bf16", "fp32"), help="of the compute (CUDA: bf16, else fp32)")
    add("--compile", action=option, default=None, help="torch.compile the model (CUDA: yes)")
    add("--cuda-graph", action="store_true", help="one GPU: replay a recording of each micro-batch")
    add("--checkpoint-activations", action="store_true", help="less memory, a third more compute")
    add("--shard-group", type=int, help="processes per copy of the weights (1 if it fits, or all)")
    add("--log-every", type=int, default=50, help="steps between step lines (50)")
    add("--save-every", type=int, help="steps between checkpoints (a tenth, at most 1000)")
    add("--keep-last", type=int, default=2, help="checkpoints that are kept (2)")
    add("--keep-every", type=int, help="every so many steps, one is kept for good (none)")
    add("--plan", action="store_true", help="print what the run takes, and exit")
    add("--gpus", type=int, help="processes to plan for (as many as run now): --plan, too")
    add("--mfu", type=float, default=0.4, help="--plan: share of the peak FLOP/s (0.4)")
    add("--memory", type=float, help="GiB for --micro-batch to fit (the GPU's; planned: 80)")
    parser.error = lambda message: fail(f"{message} (--help lists all flags)")
    run = parser.parse_args(argv)
    shares = ("min_crop", "max_bad", "mask_ratio", "warmup", "mfu")
    for name, value in vars(run).items():
        least = 0 if name in (*shares[:-1], "seed", "workers", "weight_decay") else 1e-30
        if type(value) in (int, float) and not least <= value <= (1 if name in shares else 2**62):
            parser.error(f"--{name.replace('_', '-')} {value} is out of range")
    run.plan = run.plan or bool(run.gpus)
    return run


def fail(message, status=2, alone=False):
    """One line on what is wrong and what to do: from one process of a machine, if all know it."""
    if alone or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"mae_pretrain.py: {message}", file=sys.stderr)
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
    if run.cuda_graph and (kind != "cuda" or run.processes > 1):
        raise ValueError("--cuda-graph is for one process on one GPU")
    run.workers = data.loader_workers(run.workers, here)

    # --------------------------------------------------------------------------------------- data
    names = ("size", "patch_size", "channels", "decoder", "mask_ratio", "image_size")
    given = {name: getattr(run, name) for name in names if getattr(run, name) is not None}
    given |= {} if run.raw_pixels is None else {"normalize_targets": not run.raw_pixels}
    if not run.init:
        given = {"size": "toy", "image_size": recipe(run.size or "toy")[2], **given}
    names += ("positions", "norm_eps", "normalize_targets")
    run.weights, run.config, origin = models.inherit(
        run.init, given, names, run.heads, entry=run.entry
    )
    size, channels = models.pair(run.config["image_size"]), run.config.get("channels", 3)
    cache = run.cache_dir, run.cache_size
    data.limit_pixels(run.max_pixels)
    train, run.val = data.open_sources(run.data or "toy", run.val_data, size, cache=cache)
    run.source, run.held_out = data.hold_out(train, run.val, data.HELD_OUT)
    # A plan without data says what lanes the run will need: see print_plan.
    planned = math.lcm(48, run.processes) if run.plan and not run.data else None
    order = data.Order(run.source.sizes, run.seed, run.lanes or planned)

    # -------------------------------------------------------------------------------------- model
    with torch.device("meta"):  # shapes without memory
        run.model = models.MAE(**run.config)
    run.config = run.model.config
    batch_size, base_lr, _, samples = recipe(run.config["size"])
    run.batch_size = run.batch_size or planned_batch(batch_size, run)
    run.shard_group = settle_sharding(run.model, run)
    share = run.batch_size // run.processes
    run.micro_batch = run.micro_batch or fitting_batch(run.model, share, run)
    run.pieces = share // run.micro_batch
    if run.pieces * run.micro_batch != share:
        raise ValueError(f"--micro-batch {run.micro_batch} does not divide a process's {share}")
    data.check_channels(channels)
    make = partial(make_sample, size=size, channels=channels, num_patches=run.model.num_patches)
    share_out = {"process": run.process, "processes": run.processes}
    run.batches = data.Batches(
        run.source,
        partial(make, min_crop=run.min_crop),
        run.batch_size,
        order=order,
        seed=run.seed,
        micro_batches=run.pieces,
        **share_out,
    )
    pairs = 2 * run.processes * max(1, run.micro_batch // 2)
    run.held_out_batches = data.Batches(run.held_out, make, pairs, **share_out)

    # The paper trains 1600 epochs on ImageNet-1k, and on 5 billion samples of its own data.
    longest = 5e9 if run.plan and not run.data else min(1600 * order.length, 5e9)
    samples = (run.epochs or 0) * order.length or run.samples or samples or longest
    run.steps = run.steps or math.ceil(samples / run.batch_size)
    run.lr = run.lr or base_lr * run.batch_size / 256
    run.save_every = run.save_every or min(1000, -(-run.steps // 10))
    same = ("batch_size", "steps", "lr", "warmup", "weight_decay", "seed", "min_crop", "precision")
    run.identity = {"stage": "mae_pretrain", "data": run.source.identity, "model": run.config}
    run.identity |= {"held_out": run.held_out.identity, "lanes": order.lanes, "init": origin}
    run.identity |= {name: getattr(run, name) for name in same}
    usual = run.max_pixels == data.MAX_PIXELS  # as in runs from before there was this flag: None
    run.identity["max_pixels"] = None if usual else run.max_pixels
    if not run.plan:
        run.checkpoint = find_checkpoint(run.out, run.resume, run.identity)


def make_sample(sample, key, size, channels, num_patches, min_crop=None):
    """A row of a batch: images (C, H, W) uint8, and ids (N,), a random order of the patches."""
    ids = torch.from_numpy(data.permutation(num_patches, *key, data.MASK))
    return {"images": data.make_picture(sample, key, size, channels, min_crop), "ids": ids}


def train(run):
    """The weights, in the first process, once the run is at its end; else nothing."""
    # ------------------------------------------------------------------------------------ runtime
    say = print if run.process == 0 else lambda _: None
    device, out = run.device, run.out
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if run.processes > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
        set_timeouts(minutes=30)
    names = "micro_batch", "shard_group", "save_every", "out", "checkpoint"
    check_agreement(run.identity | {name: str(getattr(run, name)) for name in names})
    stop = data.Stop()  # signals from here on: the loop saves and ends

    # -------------------------------------------------------------------------------- parallelize
    model = run.model
    parallel = models.parallelize(  # what the step calls: the model, or DDP around it
        model,
        device,
        run.shard_group,
        precision=run.precision,
        compile=run.compile,
        checkpoint_activations=run.checkpoint_activations,
    )
    models.initialize(model, run.seed)
    if run.weights:
        say(models.load_weights(model, *run.weights))
        run.weights = None

    # ---------------------------------------------------------------------------------- optimizer
    groups = models.parameter_groups(model, run.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type != "mps")

    # ------------------------------------------------------------------------------------- resume
    first_step, bad = 0, 0
    if run.checkpoint:
        say(f"going on from {run.checkpoint}")
        record = load_checkpoint(run.checkpoint, model, optimizer)
        first_step, bad = record["step"], record["bad"]
    if run.process == 0:
        config = {**run.identity, "command": sys.argv, "resume": run.resume}
        begin_run(out, config, run.checkpoint, first_step)

    # --------------------------------------------------------------------------------------- loop
    flops, (peak, chip) = 3 * flops_per_image(model), peak_flops(device)
    millions = sum(p.numel() for p in model.parameters()) / 1e6  # with the decoder
    toy = "" if run.data else " (no --data was given)"
    say(f"data     {run.source.identity}{toy}; {run.held_out.sizes.sum()} others to measure on")
    size = f"{run.config['size']}, {millions:.1f} M weights"
    say(f"model    {size}, {flops / 1e9:.2f} GFLOP an image")
    say(f"batch    {run.batch_size}: {run.processes} processes x {run.pieces} x {run.micro_batch}")
    say(f"parallel {describe_sharding(model, run)}")
    attention = models.choose_attention(model, run.micro_batch, device, run.precision)
    say(f"attention {attention}")
    how = run.precision + (", compiled in the first step" if run.compile else "")
    how += " and recorded as a CUDA graph" if run.cuda_graph else ""
    say(f"run      {run.steps} steps, peak lr {run.lr:.2e}, {how} on {chip}")

    def forward_backward(images, ids, weight):
        """Forward and backward of a micro-batch: [its part of the loss, its weight]."""
        losses = parallel(data.normalize(images), ids)  # (micro-batch,)
        loss = (losses * weight).sum() / run.batch_size
        (loss * run.processes).backward()  # gradients are averaged over the processes
        return torch.stack([loss.detach(), weight.sum()])

    if run.cuda_graph:
        from support.cuda_graph import CUDAGraph

        forward_backward = CUDAGraph(forward_backward)
    bar = tqdm(total=run.steps, initial=first_step, disable=None if run.process == 0 else True)
    items = range(first_step * run.pieces, run.steps * run.pieces)
    batches = iter(data.loader(run.batches, items, run.workers, pin=device.type == "cuda"))
    began = logged = time.perf_counter()
    waited, last_logged, stopping, lacking = 0.0, first_step, False, False
    done, saved_step, wait_for_save = first_step, first_step, lambda: None

    def save():
        nonlocal saved_step, wait_for_save
        record = {"identity": run.identity, "bad": bad}
        kept = run.keep_last, run.keep_every, device.type == "cuda"
        wait_for_save()  # the one before: never two at once
        folder, saved_step = out / "checkpoints", done
        wait_for_save = save_checkpoint(folder, done, model, optimizer, record, *kept)

    gc.disable()  # it would stop each process at another moment, and all would wait for each
    for step in range(first_step, run.steps):
        lr = learning_rate(step, run)
        for group in optimizer.param_groups:
            group["lr"] = lr

        sums, unreadable = torch.zeros(6, device=device), []
        for piece in range(run.pieces):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            unreadable += batch["bad"]
            inputs = (
                batch[key].to(device, non_blocking=True) for key in ("images", "ids", "weight")
            )
            with models.sync_gradients(parallel, last=piece == run.pieces - 1):
                sums[:2] += forward_backward(*inputs)

        # The one host read of a step, after backward and before the optimizer.
        gradients = [models.local(p.grad) for p in model.parameters() if p.grad is not None]
        sums[2], sums[3] = len(unreadable), stop.asked
        sums[4] = stop.no_batch is not None
        # Squares of the norm's parts add up; each copy of the model has all of them.
        copies = run.processes // (run.shard_group or 1)
        sums[5] = torch.nn.utils.get_total_norm(gradients).square() / copies
        if run.processes > 1:
            dist.all_reduce(sums)
        loss, weight, new_bad, stopping, lacking, norm = sums.tolist()
        if lacking:  # a process has got no batch: this step is not taken
            break
        norm **= 0.5
        if weight < run.batch_size:  # unreadable ones: the mean is over the others
            scale = run.batch_size / max(weight, 1)
            loss, norm = loss * scale, norm * scale
            for gradient in gradients:
                gradient.mul_(scale)
        for name in unreadable[: max(0, 20 - bad)]:  # all are counted, the first ones named
            tqdm.write(f"unreadable, weight 0: {name}", file=sys.stderr)
        done, bad = step + 1, bad + int(new_bad)
        if run.batches.over_max_bad(bad, done * run.batch_size, run.max_bad):
            what = f"{bad} of {done * run.batch_size} pictures cannot be read"
            fail(f"{what}: all, or over --max-bad {run.max_bad}; mend or remove them", 1)
        if not math.isfinite(loss + norm):
            fail(not_finite(model, step, run.batch_size, loss, norm, lr), 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not run.cuda_graph)  # a graph writes to where they are
        gradients = None  # as a list it would keep them all through the next step
        bar.update()

        saving = done % run.save_every == 0 or done == run.steps
        if saving or done % run.log_every == 0 or done == 1:
            now = time.perf_counter()
            rate = (done - last_logged) * run.batch_size / (now - logged)
            entry = {"step": done, "samples": done * run.batch_size, "bad": bad}
            entry |= {"loss": loss, "lr": lr, "grad_norm": norm, "images_per_second": rate}
            entry["mfu"] = rate * flops / (peak * run.processes) if peak else 0.0
            entry["data_wait"] = waited / (now - logged)
            entry["memory_gib"] = peak_memory(device)
            entry["eta_seconds"] = (now - began) / (done - first_step) * (run.steps - done)
            # Measuring never costs more than the training before it (backward counts two).
            if saving and 3 * done * run.batch_size >= run.held_out_batches.total > 0:
                entry["held_out_loss"] = evaluate.unless_lacking(
                    stop, evaluate.masked_loss, model, run.held_out_batches, device
                )
            if run.process == 0:
                with open(out / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(entry) + "\n")
                tqdm.write(step_line(entry, run.steps))
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
    weights = None
    if done == run.steps:
        weights = models.full_state(model)  # every process takes part
    else:
        kept = "saved: the same command goes on" if done else "with nothing to save"
        say(f"stopped at step {done} of {run.steps}, {kept}")
    if run.processes > 1:
        dist.barrier()  # without it, a process may abort at exit
        dist.destroy_process_group()
    run.model = None
    if lacking and not stopping:
        alone = stop.no_batch is not None
        fail(stop.no_batch or "another process has got no batch", 1, alone)
    return weights


def learning_rate(step, run):
    """Linear warm-up, whose first step is not 0, then half a cosine to 0, step by step."""
    warmup = run.warmup * run.steps
    if step < warmup:
        return run.lr * (step + 1) / (warmup + 1)
    return run.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (run.steps - warmup)))


def step_line(entry, steps):
    text = (
        "step {step}/{steps}  loss {loss:.4f}  lr {lr:.2e}  grad {grad_norm:.2f}  "
        "{images_per_second:.1f} images/s  mfu {mfu:.1%}  data wait {data_wait:.0%}  "
        "memory {memory_gib:.1f} GiB  eta {eta}"
    ).format(steps=steps, eta=tqdm.format_interval(entry["eta_seconds"]), **entry)
    bad = f"  unreadable {entry['bad']}" if entry["bad"] else ""
    held_out = entry.get("held_out_loss")  # None, too, when no such picture can be read
    return text + (f"  held-out {held_out:.4f}" if held_out is not None else "") + bad


def finish(run, weights):
    """Hand over model.pt, show what was learned, and say what to type next."""
    models.save_weights(run.out / "model.pt", weights, run.config)
    print(f"wrote {run.out / 'model.pt'}")
    evaluate.show_autoencoder(weights, run)
    flags = ["--data", run.data or "toy", *(["--val-data", run.val_data] if run.val_data else [])]
    task = "knn" if run.val and run.val.classes and run.source.classes else "attention"
    flags = ["--task", task, "--checkpoint", str(run.out / "model.pt"), *flags]
    if run.max_pixels != data.MAX_PIXELS:
        flags += ["--max-pixels", str(run.max_pixels)]
    print(f"next: python evaluate.py {shlex.join(flags)}")


@errors.record  # torchrun shows the traceback of the process that failed first
def main(argv=None):
    run = parse_arguments(argv)
    try:
        prepare(run)
        if run.plan:
            return run.process or print_plan(run.model, run)
        if weights := train(run):
            gc.collect()  # the model and the optimizer go: what is shown needs memory, too
            finish(run, weights)
    except (ValueError, OSError, RuntimeError) as error:
        fail(*verdict(error))
    except KeyboardInterrupt:  # before the loop, which saves
        fail("stopped", 130)


if __name__ == "__main__":
    main()
