"""What a training run takes, from shapes alone: FLOPs, memory, shards, micro-batches."""

import copy
import math
import os
import shutil
import time
from argparse import Namespace
from statistics import median

import torch

from kernels import triton
from model import MAE, architecture, initialize

# Dense bf16 peaks in FLOP/s, from the data sheets. The first name that fits counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
# Shares of the peak in whole steps of stage 1 on one H200 (docs/speed.md).
MEASURED_MFU = {"B": 0.32, "L": 0.39, "H": 0.39}


def peak_flops(device):
    """(peak FLOP/s in dense bf16 or None, the chip's name) of a torch.device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = next((flops for chip, flops in PEAK_FLOPS.items() if chip in name), None)
    return peak, name if peak else f"{name} (of unknown peak: mfu is shown as 0)"


def block_shapes(model):
    """(width, heads, tokens, queries) of each block on one image. queries: see Block."""
    N, encoder = model.num_patches, (model.width, model.heads)
    if not isinstance(model, MAE):
        return [(*encoder, 1 + N, 1 + N)] * model.layers
    K, (width, layers, heads) = model.num_visible, model.config["decoder"]
    decoder = [(width, heads, 1 + N, 1 + N)] * (layers - 1)
    return [(*encoder, 1 + K, 1 + K)] * model.layers + decoder + [(width, heads, 1 + N, N - K)]


def block_flops(width, tokens, queries=None):
    """Forward FLOPs of one block on one image, two for a multiply-add. queries: see Block."""
    queries = tokens if queries is None else queries
    qkv, attention = 6 * width**2 * tokens, 4 * width * tokens * queries
    return qkv + attention + 18 * width**2 * queries  # 18 = projection 2 + feed-forward 2 x 8


def flops_per_image(model):
    """Forward FLOPs of any model on one image. A training step is three times that."""
    D, N = model.width, model.num_patches
    pixels = model.patch_embed["proj"].weight[0].numel()  # of a patch
    shapes = block_shapes(model)
    blocks = sum(block_flops(width, tokens, queries) for width, _, tokens, queries in shapes)
    if not isinstance(model, MAE):
        return 2 * pixels * D * N + blocks + 2 * D * getattr(model, "classes", 0)
    K, width = model.num_visible, model.config["decoder"][0]
    return 2 * pixels * D * K + blocks + 2 * D * width * (1 + K) + 2 * width * pixels * (N - K)


def training_memory(model, run, micro_batch):
    """{item: bytes} of a training step on each process, and its "peak".

    16 bytes a trained parameter and 4 a frozen one, divided by the processes that share
    weights, and the activations of a micro-batch. The peak is right to 20 % where it
    was measured: see docs/speed.md.
    """
    group = run.shard_group or 1
    element = 2 if run.precision == "bf16" else 4  # bytes of a number in the computation
    counts = [p.numel() for p in model.parameters()]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shapes, N = block_shapes(model), model.num_patches
    copies = sum(counts) if element == 2 else 0  # in fp32 the weights themselves are used
    if run.shard_group:  # FSDP2 gathers a block, or a large head, while another computes
        copies = 2 * sum(counts) / len(shapes) + max(counts)
    # Full copies of all gradients: DDP's buckets, and the sum over micro-batches.
    replicas = run.shard_group is None and run.processes > 1
    full_copies = replicas + (micro_batch * run.processes < run.batch_size)

    pixels = model.patch_embed["proj"].weight[0].numel()  # of a patch
    outputs = pixels * N if isinstance(model, MAE) else getattr(model, "classes", 0)
    inputs = [width * tokens for width, _, tokens, _ in shapes]  # numbers that enter a block
    square = model.heads * (1 + N) ** 2 if model.config.get("relative_positions") else 0
    # A block keeps 16 times its input for backward: the input, 2 norms, q, k, v, the
    # attention, the sum after it, 4 before and 4 after GELU. Backward takes 5 times more.
    kept, backward = 16 * sum(inputs) + square * len(inputs), 5 * max(inputs) + 2 * square
    if run.checkpoint_activations:  # the input is kept, the other 15 are made again
        kept, backward = sum(inputs), 20 * max(inputs) + 3 * square
    items = {
        "weights (fp32)": 4 * sum(counts) / group,
        "weights, gathered or cast": element * copies,
        "Adam's two moments (fp32)": 8 * trained / group,
        "gradients (fp32)": 4 * trained * (full_copies or 1 / group),
        "activations for backward": element * micro_batch * (kept + pixels * shapes[0][2]),
        "one block's backward": element * micro_batch * backward,
        "images, outputs, loss": micro_batch * (5 * pixels * N + 16 * outputs),
    }
    *weights, gradients, kept, backward, ends = items.values()
    activations = kept + max(backward, ends)
    # Gradients come while activations go, unless the gradients are whole all the time.
    step = gradients + activations if full_copies else max(gradients, activations)
    return items | {"peak": sum(weights) + step}


def device_memory(run):
    """Bytes of a process's GPU, or of one to plan for; None on a CPU without --memory."""
    if run.memory:
        return run.memory * 2**30
    if run.device.type == "cuda":
        return torch.cuda.get_device_properties(run.device).total_memory
    return 80 * 2**30 if run.gpus else None


def memory_budget(model, run):
    """Bytes that a step may use: 80 % of a GPU; on a CPU, weights, optimizer and 4 GB."""
    if memory := device_memory(run):
        return 0.8 * memory  # a guess: the rest is for NCCL, cuBLAS and the allocator
    return 4e9 + training_memory(model, run, 0)["peak"]


def as_size(count):
    """ "1.5 GiB" or "0.3 MiB" of a number of bytes."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def compiles(kind):
    """True if training is compiled by default: on CUDA, with Triton and a C compiler."""
    if kind != "cuda":  # on a CPU, compiled training was 0.95 to 1.02 times as fast
        return False
    compilers = os.environ.get("CC", "gcc"), "gcc", "clang"
    return triton.__version__ is not None and any(map(shutil.which, compilers))


def attention_shapes(model):
    """(tokens, columns of a head) of a model's attention layers: see kernels.describe.

    Empty for layers with relative positions, which PyTorch's attention adds as a bias.
    """
    if model.config.get("relative_positions"):
        return []
    shapes = [(tokens, width // heads) for width, heads, tokens, _ in block_shapes(model)]
    return list(dict.fromkeys(shapes))


def settle_batch(run, model):
    """Settle how a step is spread: run.shard_group, micro_batch and micro_batches.

    shard_group    processes that share one copy of the weights; None: each has all
    micro_batch    images that a process computes at once
    micro_batches  such micro-batches make a process's part of the batch

    Raises ValueError if --micro-batch does not divide a process's part of the batch.
    """
    run.shard_group = settle_sharding(model, run)
    per_process = run.batch_size // run.processes
    run.micro_batch = run.micro_batch or fitting_batch(model, per_process, run)
    run.micro_batches = per_process // run.micro_batch
    if per_process % run.micro_batch:
        given = f"--micro-batch {run.micro_batch}"
        raise ValueError(f"{given} does not divide a process's {per_process}")


def settle_sharding(model, run):
    """How many processes share one copy of the weights, or None: each has all of them.

    --shard-group decides if it is given; 1 means None. Otherwise a model is replicated
    if it fits with its gradients, its optimizer and the smallest micro-batch, else
    split over all processes.
    """
    if run.shard_group or run.processes == 1:
        return None if run.shard_group == 1 else run.shard_group
    memory = device_memory(run)
    if memory is None:  # the processes of this machine share its RAM
        if not (memory := machine_memory()):
            return None
        memory /= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return None if replica_memory(model, run) <= 0.8 * memory else run.processes


def machine_memory():
    """Bytes of this machine's RAM; None on Windows, where Python does not know it."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def replica_memory(model, run):
    """Bytes that a replica needs at least: with a micro-batch of 2, if none is given."""
    alone = copy.copy(run)
    alone.shard_group = None
    return training_memory(model, alone, run.micro_batch or 2)["peak"]


def fitting_batch(model, images, run):
    """The largest micro-batch that divides `images` and fits in memory: see memory_budget.

    It is even when `images` is, so that mixup's pairs stay together, and at least 1 or
    2.
    """
    smallest, budget = 2 - images % 2, memory_budget(model, run)
    for n in range(images, smallest, -smallest):
        if images % n == 0 and training_memory(model, run, n)["peak"] <= budget:
            return n
    return smallest


def planned_batch(batch_size, run):
    """A recipe's batch size; in a plan, the nearest one that its processes can share.

    run: a stage's arguments, without --batch-size. A changed batch size is printed.
    """
    unit = run.processes * math.lcm(2, run.micro_batch or 2)  # samples are dealt in pairs
    nearest = unit * max(1, round(batch_size / unit))
    if not run.plan or nearest == batch_size:
        return batch_size
    if run.process == 0:
        why = f"the recipe's {batch_size:,} cannot be dealt to {run.processes} processes"
        why += f" in micro-batches of {run.micro_batch}" if run.micro_batch else ""
        print(f"batch size   {nearest:,}, which the run wants as --batch-size: {why}")
    return nearest


def peak_lr(given, lr, usual, actual):
    """(the peak lr, in words where it comes from): --lr if given, else a recipe's or less.

    usual, actual: (batch size, width of the network) that the recipe's rate is for, and the
    run's. A smaller batch wants less by its square root (AdamW: arXiv 2205.10287), a narrower
    network more by one over its width (arXiv 2203.03466). docs/results.md has our sweep.
    """
    if given:
        return given, "--lr"
    factor = math.sqrt(actual[0] / usual[0]) * max(1, usual[1] / actual[1])
    words = f"the recipe's {lr:.2e}"
    if factor < 1:
        words += f" x sqrt(batch {actual[0]} / {usual[0]})"
        words += f" x width {usual[1]} / {actual[1]}" if actual[1] < usual[1] else ""
    return lr * min(1, factor), words


def describe_sharding(model, run):
    """One line: how a settled run is spread over processes, with the memory of each."""
    each, memory = training_memory(model, run, run.micro_batch)["peak"], device_memory(run)
    size = f"{as_size(each)} of {as_size(memory)}" if memory else as_size(each)
    size += ": more than there is" if memory and each > memory else ""
    if run.processes == 1:
        return f"one process ({size})"
    if run.shard_group is None:
        return f"{run.processes} replicas (each {size})"
    copies = run.processes // run.shard_group
    line = f"{copies} copies, each " if copies > 1 else ""
    line += f"sharded over {run.shard_group} processes (each {size}; "
    line += f"a replica takes at least {as_size(replica_memory(model, run))})"
    if torch.__version__ < "2.12":
        line += "; this torch leaks memory in each step of sharded AdamW: 2.12 does not"
    return line


def describe_run(run, model, flops, chip):
    """Print what is trained, and how. flops: of an image; chip: the device's name."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6  # with a decoder's
    size = f"{model.config['size']}, {millions:.1f} M weights"
    shares = f"{run.processes} processes x {run.micro_batches} x {run.micro_batch}"
    how = run.precision + (", compiled in the first step" if run.compile else "")
    how += " and recorded as a CUDA graph" if run.cuda_graph else ""
    run.say(f"model    {size}, {flops / 1e9:.2f} GFLOP an image")
    run.say(f"batch    {run.batch_size}: {shares}")
    run.say(f"parallel {describe_sharding(model, run)}")
    run.say(f"attention {run.attention}")
    run.say(f"lr       {run.lr:.2e} at its peak: {run.lr_origin}")
    run.say(f"run      {run.steps} steps, {how} on {chip}")


def print_plan(run):
    """Print what a training run takes. run: a stage's settled arguments."""
    if run.process:
        return
    model, processes = run.model, run.processes
    parts = {"encoder": 0, "decoder": 0, "head": 0}
    for name, parameter in model.named_parameters():
        part = "decoder" if name.startswith(("decoder", "mask")) else name.split(".")[0]
        parts[part if part in parts else "encoder"] += parameter.numel()
    count, flops = sum(parts.values()), 3 * flops_per_image(model)
    parts = ", ".join(f"{name} {n / 1e6:,.1f} M" for name, n in parts.items() if n)
    samples = run.steps * run.batch_size
    lanes = f"; with --lanes {math.lcm(48, processes)}" if 48 % processes and not run.lanes else ""
    split = f"{run.micro_batches} micro-batches of {run.micro_batch} images{lanes}"
    print(f"parameters   {count / 1e6:,.1f} M ({model.config['size']}): {parts}")
    print(f"compute      {flops / 1e9:,.2f} GFLOP for an image of a training step")
    print(f"steps        {run.steps:,} of {run.batch_size:,} images: {samples:,} samples")
    print(f"batch        {processes} processes x {split}")
    print(f"lr           {run.lr:.2e} at its peak: {run.lr_origin}")
    print(f"parallel     {describe_sharding(model, run)}")
    print_memory(model, run)
    print_network(run, count)
    print_hours(run, flops)
    if run.here:
        print_hours_here(run, flops)


def print_memory(model, run):
    """Print the items of training_memory without and with --checkpoint-activations."""
    print(f"memory       GiB of each process ({run.precision}); not all is there at the peak")
    print(f"{'':32}   without      with --checkpoint-activations")
    ways = [Namespace(**vars(run) | {"checkpoint_activations": way}) for way in (False, True)]
    plans = [training_memory(model, way, run.micro_batch) for way in ways]
    for item in plans[0]:
        print(f"  {item:30}" + "".join(f"{plan[item] / 2**30:10.2f}" for plan in plans))
    budget = memory_budget(model, run)
    row = f"  {f'largest micro-batch, {budget / 2**30:.1f} GiB':30}"
    print(row + "".join(f"{most_images(model, way, budget) or 'none':>10}" for way in ways))


def most_images(model, run, budget):
    """The largest micro-batch whose step takes at most `budget` bytes, of any batch; 0: none."""
    run, most = Namespace(**vars(run) | {"batch_size": 0}), 0  # no second micro-batch
    for bit in range(20, -1, -1):
        if training_memory(model, run, most + 2**bit)["peak"] <= budget:
            most += 2**bit
    return most


def print_hours(run, flops):
    """Print the GPU-hours of a run. flops: of a training step, for an image."""
    on_cpu = run.device.type == "cpu"
    peak, chip = (PEAK_FLOPS["H100"], "H100") if on_cpu else peak_flops(run.device)
    if not peak:
        return print(f"GPU-hours    unknown, as is the peak of {chip}")
    share, origin = run.mfu, "--mfu"
    if not share:
        share, origin = 0.4, "a guess: --mfu"
        config, size = run.model.config, run.model.config["size"]
        usual = config["image_size"] == [224, 224] and run.precision == "bf16"
        usual &= config["patch_size"] == architecture(size)[3]
        measured = isinstance(run.model, MAE) and MEASURED_MFU.get(size)
        if measured and usual and not run.checkpoint_activations:
            share, origin = measured, "measured on one H200 (docs/speed.md)"
            origin += "" if "H200" in chip else f", a guess for {chip}s: --mfu"
    hours = run.steps * run.batch_size * flops / (share * peak) / 3600
    days = (
        f"({hours / 24:,.2f} GPU-days), {hours / 24 / run.processes:,.2f} days on {run.processes}"
    )
    print(f"GPU-hours    {hours:,.1f} {days},")
    print(f"             of {chip}s at {share:.0%} of their peak: {origin}")


def print_hours_here(run, flops):
    """Print how long a run takes on this CPU, from ten timed steps of a few images, in fp32.

    Loading is not in it. flops: of a training step, for an image.
    """
    model, n = run.model, max(1, min(run.micro_batch, int(2e11 / flops)))  # some seconds a step
    alone = {"processes": 1, "shard_group": None, "batch_size": n, "precision": "fp32"}
    needed = training_memory(model, Namespace(**vars(run) | alone), n)["peak"]
    if (ram := machine_memory()) and needed > 0.8 * ram:
        return print(f"here         not timed: it takes {as_size(needed)} of {as_size(ram)}")
    initialize(model.to_empty(device="cpu"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    images = torch.zeros(n, *model.input_shape)
    ids = [torch.arange(model.num_patches).expand(n, -1)] if isinstance(model, MAE) else []
    computing, updating = [], []
    for _ in range(11):  # the first one is not counted
        began = time.perf_counter()
        model(images, *ids).mean().backward()
        computed = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        computing.append(computed - began)
        updating.append(time.perf_counter() - computed)
    image, update = median(computing[1:]) / n, median(updating[1:])
    minutes = run.steps * (run.batch_size * image + update) / 60
    length = f"{minutes / 60:,.1f} hours" if minutes > 60 else f"{minutes:,.1f} minutes"
    threads = f"{torch.get_num_threads()} threads"
    print(f"here         {length} on this CPU with {threads}: {1 / image:,.1f} images/s,")
    print(f"             from ten steps of {n} images without loading them")


def print_network(run, count):
    """Print what a process sends in a step. count: of the parameters.

    FSDP2 gathers the weights for forward and again for backward of each micro-batch,
    and reduces gradients once a step, in fp32.
    """
    group, copies = run.shard_group or 1, run.processes // (run.shard_group or 1)
    print("network      GiB that a process sends, and receives, in a step:")
    if group > 1:
        others = 4 * count * (group - 1) / group / 2**30
        gathered = others * run.micro_batches * (1 if run.precision == "bf16" else 2)
        print(f"{'':12} {gathered:.2f} weights, {others:.2f} gradients in its group of {group}")
    else:
        print("             no weights: it has all of them")
    if copies > 1:
        between = 8 * count / group * (1 - 1 / copies) / 2**30
        print(f"             {between:.2f} gradients between the {copies} copies of the model")
