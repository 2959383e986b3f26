"""Stage 1: a Vision Transformer learns to fill in hidden patches. No labels. (MAE pre-pretraining)

Laptop       python mae_pretrain.py                                       # toy world, two minutes
             python mae_pretrain.py --data my_photos/ --size S --batch-size 256 --epochs 100
One GPU      python mae_pretrain.py --data my_photos/ --size B --batch-size 1024 --compile
One node     torchrun --nproc-per-node 8 mae_pretrain.py --size L --data 'shards/{00000..00999}.tar'
Many nodes   torchrun --nnodes 16 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
                 mae_pretrain.py --size H --data 'shards/{00000..09999}.tar' --lanes 384
Beforehand   python mae_pretrain.py --size H --gpus 128 --plan
Resume       the same command again: it goes on, exactly, from the last checkpoint in --out

The recipe is that of He et al. (arXiv 2111.06377), which the paper (arXiv 2303.13496) reuses without
change for every size: hide 75 % of the patches, encode the rest, predict the pixels of the hidden.
"""

import argparse
import json
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path

# On a CPU, idle OpenMP threads spin: on two cores, one busy loader process then makes two training
# threads ten times slower than one. Passive threads sleep. It must be said before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import evaluate
import model as models

BETAS, WARMUP, WEIGHT_DECAY = (0.9, 0.95), 0.05, 0.05  # public MAE code; 5 %: its 40 of 800 epochs
HELD_OUT = 512  # images to measure on; never more than 5 % of the data


def recipe(size):
    """(batch size, peak lr per 256 images, image side, samples or None) of the public MAE code.

    The paper reuses it for all sizes. It trains 1600 epochs on ImageNet-1k and 5 billion samples on
    its own data; so the default is 1600 epochs, or 5 billion samples where that is less.
    """
    if size == "toy":
        return 128, 1e-3, 64, 40_960  # ours: two minutes on two cores
    return 4096, 1.5e-4, 224, None


# ---------------------------------------------------------------------------------------- arguments


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        "mae_pretrain.py", description="Stage 1: masked autoencoding.", allow_abbrev=False
    )
    add = parser.add_argument_group("data").add_argument
    add("--data", help="a folder of pictures, tar shards (path, glob, {000..099}), or toy (toy)")
    add("--image-size", type=height_and_width, help="side or HEIGHTxWIDTH (224; toy size: 64)")
    add("--channels", type=int, help="of a picture: 1 grey, 3 RGB, 4 RGBA (3)")
    add("--min-crop", type=float, default=0.2, help="least area of a random crop; 1: no crop (0.2)")
    add("--lanes", type=int, help="streams that the order is dealt to (48, or fewer shards')")
    add("--workers", type=int, help="loader processes per training process (the cores left)")
    add(
        "--max-bad", type=float, default=0.01, help="share of unreadable pictures to stop at (0.01)"
    )
    add = parser.add_argument_group("model").add_argument
    add("--size", help=f"{' '.join(models.SIZES)}, or WIDTHxLAYERSxHEADS (toy)")
    add("--patch-size", type=int, help="side of a patch (the size's own)")
    add("--decoder", type=models.triple, help="WIDTHxLAYERSxHEADS (512x8x16; toy, T: smaller)")
    add("--mask-ratio", type=float, help="share of the patches that is hidden (0.75)")
    add("--raw-pixels", action="store_true", help="predict raw pixels, not normalised patches")
    add("--init", help="weights to start from: a model.pt or a public MAE checkpoint")
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=int, help="global batch, over all processes (4096; toy size: 128)")
    add("--micro-batch", type=int, help="images at once on a process (a divisor of its share)")
    add("--steps", type=int, help="length of the run; or in --epochs, or in --samples")
    add("--epochs", type=float, help="(1600, at most 5e9 samples)")
    add("--samples", type=float, help="(toy size: 40,960)")
    add("--lr", type=float, help="peak (1.5e-4 per 256 images of the batch; toy size: 1e-3)")
    add("--warmup", type=float, default=WARMUP, help=f"share of the steps ({WARMUP})")
    add("--weight-decay", type=float, default=WEIGHT_DECAY, help=f"of matrices ({WEIGHT_DECAY})")
    add("--seed", type=int, default=0, help="of weights, order, crops and masks (0)")
    add = parser.add_argument_group("run").add_argument
    add("--out", default="runs/mae", help="where everything is written (runs/mae)")
    add("--resume", help="a run, or one of its checkpoints, to go on from (the one in --out)")
    add("--precision", choices=("bf16", "fp32"), help="of the compute (CUDA: bf16, else fp32)")
    add("--compile", action="store_true", help="torch.compile every block")
    add("--checkpoint-activations", action="store_true", help="less memory, a third more compute")
    add("--log-every", type=int, default=20, help="steps between step lines (20)")
    add("--save-every", type=int, help="steps between checkpoints (a tenth of all, at most 1000)")
    add("--plan", action="store_true", help="print what the run takes, and exit")
    add("--gpus", type=int, help="processes to plan for (as many as run now)")
    parser.error = lambda message: fail(f"{message} (--help lists all flags)")
    return parser.parse_args(argv)


def height_and_width(text):
    sides = tuple(int(side) for side in text.split("x"))
    return sides * 2 if len(sides) == 1 else sides[:2]


def fail(message, status=2):
    """One line on what is wrong and what to do."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"mae_pretrain.py: {message}", file=sys.stderr)
    sys.exit(status)


def prepare(run):
    """Settle in `run` all that its arguments leave open, and open the data.

    Nothing is allocated or written. Raises ValueError or OSError, one line, on unusable input.
    """
    # ------------------------------------------------------------------------------------ runtime
    environment = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}  # torchrun's
    run.process, run.processes, run.local_process, processes_here = (
        int(os.environ.get(name, default)) for name, default in environment.items()
    )
    kind = (torch.accelerator.current_accelerator() or torch.device("cpu")).type
    run.device = torch.device(kind, run.local_process) if kind == "cuda" else torch.device(kind)
    run.precision = run.precision or ("bf16" if kind == "cuda" else "fp32")
    if run.precision == "bf16" and kind != "cuda":
        raise ValueError("--precision bf16 needs CUDA")
    if run.workers is None:
        run.workers = data.default_workers(processes_here)

    # --------------------------------------------------------------------------------------- data
    run.weights, run.config = settle_config(run)
    size, channels = models.pair(run.config["image_size"]), run.config["channels"]
    batch_size, base_lr, _, samples = recipe(run.config["size"])
    run.batch_size = run.batch_size or batch_size
    run.source = data.open_source(run.data or "toy", "train", size)
    held_out = data.open_source(run.data or "toy", "val", size, run.source.classes)
    count = min(HELD_OUT, int((held_out or run.source).sizes.sum()) // (1 if held_out else 20))
    if held_out:
        run.held_out = data.Slice(held_out, 0, count)
    else:
        run.source, run.held_out = data.hold_out(run.source, count)
    order = data.Order(run.source.sizes, run.seed, run.lanes)

    # -------------------------------------------------------------------------------------- model
    with torch.device("meta"):  # shapes without memory
        run.model = models.MAE(**run.config)
    run.config, run.flops = run.model.config, 3 * models.flops_per_image(run.model)
    run.micro_batch = settle_micro_batch(run)
    share = {"process": run.process, "processes": run.processes}
    share["num_patches"] = run.model.num_patches
    run.batches = data.Batches(
        run.source, size, channels, run.batch_size, order, run.seed, run.min_crop, **share
    )
    pairs = 2 * run.processes * max(1, run.micro_batch // 2)
    run.held_out_batches = data.Batches(run.held_out, size, channels, pairs, **share)

    # -------------------------------------------------------------------------------------- length
    run.lr = run.lr or base_lr * run.batch_size / 256
    if run.steps is None:
        epochs = run.epochs and run.epochs * order.length
        samples = epochs or run.samples or samples or min(1600 * order.length, 5e9)
        run.steps = math.ceil(samples / run.batch_size)
    run.save_every = run.save_every or max(1, min(1000, run.steps // 10))
    # What a run must have in common with this one so that this one can go on with it.
    same = ("batch_size", "steps", "lr", "warmup", "weight_decay", "seed", "min_crop", "precision")
    run.identity = {key: getattr(run, key) for key in same}
    run.identity |= {"data": run.source.identity, "lanes": order.lanes, "init": run.init}
    run.identity |= {"model": run.config}
    run.checkpoint = find_checkpoint(run)
    return run


def settle_config(run):
    """((weights to start from, their grid) or None, the MAE's arguments): --init's, else the flags'."""
    names = ("size", "patch_size", "channels", "decoder", "mask_ratio", "image_size")
    given = {name: getattr(run, name) for name in names if getattr(run, name) is not None}
    if run.init:
        weights, config = models.read_weights(run.init)
        for name in ("size", "patch_size", "channels"):
            if given.get(name, config[name]) != config[name]:
                raise ValueError(f"{run.init} has {name} {config[name]}: it cannot be changed")
        grid = [side // config["patch_size"] for side in config["image_size"]]
        return (weights, grid), config | given
    config = {"size": "toy", "channels": 3} | given
    config.setdefault("image_size", recipe(config["size"])[2])
    return None, config | {"normalize_targets": not run.raw_pixels}


def settle_micro_batch(run):
    """Images at once on a process: as asked, or the largest divisor of its share that should fit."""
    share = run.batch_size // run.processes
    if run.micro_batch:
        if share % run.micro_batch:
            raise ValueError(
                f"--micro-batch {run.micro_batch} does not divide {share}, a process's share"
            )
        return run.micro_batch
    memory, width = 4e9, 2 if run.precision == "bf16" else 4
    if run.device.type == "cuda":
        memory = torch.cuda.get_device_properties(run.device).total_memory / 2
    _, one = models.memory_per_process(run.model, 1, width, run.checkpoint_activations)
    return max(n for n in range(1, share + 1) if share % n == 0 and n * one <= max(one, memory))


def find_checkpoint(run):
    """The checkpoint to go on from, or None for a new run. ValueError if --out holds something else."""
    out, source = Path(run.out), Path(run.resume or run.out)
    path = source if (source / "state.json").is_file() else None
    path = path or models.latest_checkpoint(source / "checkpoints")
    if run.resume and path is None:
        raise ValueError(f"--resume {run.resume}: there is no checkpoint in it")
    if path is None and (out / "model.pt").exists() or out.is_file():
        raise ValueError(f"{out} is in use, and is no run that could go on: choose another --out")
    if path:
        theirs = json.loads((path / "state.json").read_text())["identity"]
        # JSON turns tuples into lists: compare what both look like in it.
        ours = json.loads(json.dumps(run.identity))
        changed = [
            f"{k} was {theirs.get(k)}, is {v}" for k, v in ours.items() if theirs.get(k) != v
        ]
        if changed:
            raise ValueError(
                f"{path} is of another run: {'; '.join(changed)}. Choose another --out"
            )
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise ValueError(f"{out} cannot be written to: choose another --out")
    return path


def print_plan(run):
    """What the run takes, from shapes alone."""
    processes = run.gpus or run.processes
    width = 2 if run.precision == "bf16" or run.gpus else 4
    state, one = models.memory_per_process(run.model, processes, width, run.checkpoint_activations)
    parameters = sum(p.numel() for p in run.model.parameters())
    samples = run.steps * run.batch_size
    days = samples * run.flops / (0.4 * 989e12) / 86400
    print(
        f"model        {run.config['size']}, {parameters / 1e6:,.1f} M parameters with the decoder"
    )
    print(f"compute      {run.flops / 1e9:,.1f} GFLOP for one image in training")
    print(f"run          {run.steps:,} steps x {run.batch_size} images = {samples:,} samples")
    print(f"processes    {processes}, micro-batches of {run.micro_batch}")
    print(f"memory       {state / 2**30:.1f} GiB weights and optimizer on each process,")
    print(f"             {run.micro_batch * one / 2**30:.1f} GiB activations (estimates)")
    print(f"GPU-days     {days:,.2f} of H100 at 40 % of its 989 TFLOP/s (assumed)")


def learning_rate(step, run):
    """Linear warm-up, whose first step is not 0, then half a cosine to 0; per step (MAE code)."""
    warmup = run.warmup * run.steps
    if step < warmup:
        return run.lr * (step + 1) / (warmup + 1)
    return run.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (run.steps - warmup)))


def train(run):
    say = print if run.process == 0 else lambda *_, **__: None
    out, device = Path(run.out), run.device

    # ------------------------------------------------------------------------------------ runtime
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if run.processes > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    elif device.type == "cuda":  # sharded over one process: the same bf16 path as on many
        store = dist.HashStore()
        dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    sharded = dist.is_initialized()
    stop = []  # a signal only leaves a note: the loop saves and leaves, all processes together
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stop.append(number))

    # -------------------------------------------------------------------------------------- model
    model = run.model.to_empty(device="cpu")
    models.initialize(model, run.seed)
    if run.weights:
        say(models.load_weights(model, *run.weights))
    model = model.to(device)

    # -------------------------------------------------------------------------------- parallelize
    models.parallelize(model, sharded, run.precision, run.compile, run.checkpoint_activations)

    # ---------------------------------------------------------------------------------- optimizer
    groups = models.parameter_groups(model, run.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=run.lr, betas=BETAS, fused=device.type != "mps")

    # ------------------------------------------------------------------------------------- resume
    first_step, bad = 0, 0
    if run.checkpoint:
        record = models.load_checkpoint(run.checkpoint, model, optimizer)
        first_step, bad = record["step"], record["bad"]
        say(f"going on from {run.checkpoint}")
    metrics = open_metrics(run, first_step) if run.process == 0 else None

    # --------------------------------------------------------------------------------------- loop
    peak, chip = models.peak_flops(device)
    announce(run, say, peak, chip)
    steps = range(first_step, run.steps)
    batches = iter(data.loader(run.batches, steps, run.workers, device.type == "cuda"))
    bar = tqdm(total=run.steps, initial=first_step, disable=None if run.process == 0 else True)
    began = logged = time.perf_counter()
    waited, last_logged = 0.0, first_step
    for step in steps:
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        lr = learning_rate(step, run)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # The loss is a weighted mean over the global batch, whatever pieces that comes in.
        images, ids, weight = (
            batch[key].to(device, non_blocking=True) for key in ("images", "ids", "weight")
        )
        total = weight.sum()
        if sharded:
            dist.all_reduce(total)
        loss = torch.zeros((), device=device)
        for begin in range(0, len(weight), run.micro_batch):
            part = slice(begin, begin + run.micro_batch)
            if sharded:  # gradients are reduced once, with the last micro-batch
                model.set_requires_gradient_sync(part.stop >= len(weight))
            losses = model(data.normalize(images[part]), ids[part])  # (micro-batch,)
            share = (losses * weight[part]).sum() / total.clamp(min=1e-6)
            (share * run.processes).backward()  # FSDP averages over the processes
            loss += share.detach()

        # The one host read of a step, between backward and the optimizer.
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = models.whole(torch.nn.utils.get_total_norm(gradients))
        counts = torch.tensor([len(batch["bad"]), len(stop)], dtype=torch.float32, device=device)
        sums = torch.cat([loss[None], counts])
        if sharded:
            dist.all_reduce(sums)
        loss, unreadable, stopping, norm = torch.cat([sums, norm[None]]).tolist()
        done, bad = step + 1, bad + int(unreadable)
        for name in batch["bad"] if bad <= 20 else ():  # all are counted, the first are named
            tqdm.write(f"unreadable, weight 0: {name}", file=sys.stderr)
        if bad > run.max_bad * max(1000, done * run.batch_size):
            fail(
                f"{bad} unreadable pictures by step {done}, over --max-bad {run.max_bad}", status=1
            )
        if not math.isfinite(loss + norm):
            fail(not_finite(run, model, step, loss, norm, lr), status=1)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()

        if done % run.log_every == 0 or done % run.save_every == 0 or done in (1, run.steps):
            now = time.perf_counter()
            rate = (done - last_logged) * run.batch_size / (now - logged)
            entry = {
                "step": done,
                "samples": done * run.batch_size,
                "epoch": round(done * run.batch_size / run.batches.order.length, 4),
                "loss": loss,
                "lr": lr,
                "grad_norm": norm,
                "bad": bad,
                "images_per_second": round(rate, 1),
                "mfu": round(rate * run.flops / (peak * run.processes), 4) if peak else 0.0,
                "data_wait": round(waited / (now - logged), 4),
                "memory_gib": round(peak_memory(device), 2),
                "eta_seconds": round((now - began) / (done - first_step) * (run.steps - done)),
            }
            if (done % run.save_every == 0 or done == run.steps) and len(run.held_out_batches):
                entry["held_out_loss"] = held_out_loss(run, model)
            if metrics:
                metrics.write(json.dumps(entry) + "\n")
                metrics.flush()
                tqdm.write(step_line(entry, run.steps))
            waited, last_logged, logged = 0.0, done, time.perf_counter()

        # ----------------------------------------------------------------------------------- save
        if done % run.save_every == 0 or done == run.steps or stopping:
            record = {"identity": run.identity, "samples": done * run.batch_size, "bad": bad}
            try:
                models.save_checkpoint(out / "checkpoints", done, model, optimizer, record)
            except OSError as error:
                fail(f"{error}; the checkpoint before it is whole: make room, run again", status=1)
        if stopping:
            break
    bar.close()
    if first_step < run.steps and done < run.steps:
        say(f"stopped at step {done} of {run.steps}, saved; the same command goes on")
    else:
        state = models.full_state(model)  # every process takes part
        if run.process == 0:
            finish(run, state)
    if sharded:
        dist.barrier()  # without it, a process may abort at exit
        dist.destroy_process_group()


def announce(run, say, peak, chip):
    """The first lines: what runs, on what, and what was chosen."""
    if run.data is None:
        say("no --data: this run learns from the toy world of procedural pictures")
    share = run.batch_size // run.processes
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    say(f"model {run.config['size']}: {parameters:.1f} M parameters with the decoder,", end=" ")
    say(f"{run.flops / 1e9:.2f} GFLOP an image; {run.device.type}, {run.precision}")
    say(f"data: {run.source.identity}; {sum(run.held_out.sizes)} held out")
    say(
        f"batch {run.batch_size} = {run.processes} processes x {share // run.micro_batch} x",
        end=" ",
    )
    say(f"{run.micro_batch} images; {run.steps} steps, peak lr {run.lr:.2e}")
    if not peak:
        say(f"mfu is shown as 0: {chip}")


def step_line(entry, steps):
    line = (
        "step {step:>6}/{steps}  loss {loss:.4f}  lr {lr:.2e}  grad {grad_norm:.2f}  "
        "{images_per_second:.0f} images/s  mfu {mfu:.1%}  data {data_wait:.0%}  "
        "memory {memory_gib:.1f} GiB  eta {eta}"
    ).format(steps=steps, eta=tqdm.format_interval(entry["eta_seconds"]), **entry)
    if "held_out_loss" in entry:
        line += f"  held-out {entry['held_out_loss']:.4f}"
    return line + (f"  bad {entry['bad']}" if entry["bad"] else "")


def peak_memory(device):
    """GiB: the allocator's on CUDA, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def open_metrics(run, first_step):
    """metrics.jsonl, cut at the step that the run goes on from, open to be added to."""
    path = Path(run.out) / "metrics.jsonl"
    source = Path(run.resume or run.out)
    source = source.parent.parent if (source / "state.json").is_file() else source
    lines = []
    if first_step and (source / "metrics.jsonl").is_file():
        lines = (source / "metrics.jsonl").read_text().splitlines()
    # A line that a kill has cut short does not end in a brace.
    kept = [x for x in lines if x.endswith("}") and json.loads(x)["step"] <= first_step]
    models.write_text(path, "".join(line + "\n" for line in kept))
    models.write_text(
        Path(run.out) / "config.json",
        json.dumps({"stage": "mae_pretrain", "command": sys.argv, **run.identity}, indent=1),
    )
    return open(path, "a")


@torch.no_grad()
def held_out_loss(run, model):
    """Mean loss on the held-out pictures, centre crops under fixed masks."""
    sums = torch.zeros(2, device=run.device)
    for batch in data.loader(run.held_out_batches, range(len(run.held_out_batches)), 0):
        images, ids, weight = (batch[key].to(run.device) for key in ("images", "ids", "weight"))
        losses = model(data.normalize(images), ids)
        sums += torch.stack([(losses * weight).sum(), weight.sum()])
    if dist.is_initialized():
        dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()


def not_finite(run, model, step, loss, norm, lr):
    """What is known when a loss or gradient is not finite, on one line."""
    names = [
        name
        for name, p in model.named_parameters()
        if p.grad is not None and not models.whole(p.grad).isfinite().all()
    ]
    first = step * run.batch_size
    return (
        f"step {step + 1}: loss {loss}, gradient norm {norm} at lr {lr:.3e}, positions {first} to "
        f"{first + run.batch_size - 1}; gradients not finite: {', '.join(names) or 'none'}. Nothing "
        "was stepped on or saved. Try a lower --lr or --precision fp32, from the last checkpoint"
    )


def finish(run, state):
    """Hand over model.pt, show what it can do, and say what to type next."""
    out = Path(run.out)
    models.save_weights(out / "model.pt", state, run.config)
    print(f"wrote {out / 'model.pt'}")
    autoencoder = models.MAE(**run.config).eval()
    autoencoder.load_state_dict(state)
    evaluate.draw_reconstructions(autoencoder, run.held_out, out / "reconstruction.png")
    if run.source.classes:
        # Both encoders start from the same weights, run.seed's; one has been trained.
        untrained, trained = (models.ViT(**models.encoder_config(run.config)) for _ in range(2))
        models.initialize(untrained, run.seed)
        models.load_weights(trained, state)
        functions = {"raw pixels": evaluate.raw_pixels}
        functions["untrained"] = evaluate.pooled(untrained.eval(), "mean")
        functions["trained"] = evaluate.pooled(trained.eval(), "mean")
        train = data.Slice(run.source, 0, min(4096, sum(run.source.sizes)))
        tops = evaluate.probe(functions, train, run.held_out, run.config, workers=run.workers)
        print(f"linear probe in closed form, {sum(train.sizes)} labels, on the held-out pictures:")
        for name, top1 in tops.items():
            print(f"  {name:12} top-1 {top1:.1%}")
    place = run.data or "toy"
    print(f"next: python evaluate.py --task knn --checkpoint {out / 'model.pt'} --data {place}")


def main(argv=None):
    arguments = parse_arguments(argv)
    try:
        run = prepare(arguments)
    except (ValueError, OSError) as error:
        fail(error)
    if run.plan:
        print_plan(run)
    else:
        train(run)


if __name__ == "__main__":
    main()
