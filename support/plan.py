"""What a training run takes, from shapes alone: FLOPs, memory, how it is spread over processes."""

import copy
import math
import os

import torch

from model import MAE, Block

# Dense bf16 peaks in FLOP/s, from the makers' data sheets; the name is looked for in the device's.
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


def peak_flops(device):
    """(peak FLOP/s in dense bf16 or None, the chip's name) of a torch.device."""
    if device.type != "cuda":
        return None, f"{device.type} (of unknown peak: mfu is shown as 0)"
    name = torch.cuda.get_device_name(device)
    for chip, flops in PEAK_FLOPS.items():
        if chip in name:
            return flops, name
    return None, f"{name} (of unknown peak: mfu is shown as 0)"


def block_flops(width, tokens, queries=None):
    """Forward FLOPs of one block on one image (a multiply-add is two); `queries` tokens ask."""
    queries = tokens if queries is None else queries
    qkv, attention = 6 * width**2 * tokens, 4 * width * tokens * queries
    return qkv + attention + 18 * width**2 * queries  # 18 = projection 2 + feed-forward 2 x 8


def flops_per_image(model):
    """Forward FLOPs of any of the models on one image. A training step is three times that."""
    D, N = model.width, model.num_patches
    pixels = model.patch_embed["proj"].weight[0].numel()  # of a token
    if not isinstance(model, MAE):
        head = 2 * D * getattr(model, "classes", 0)
        return 2 * pixels * D * N + model.layers * block_flops(D, 1 + N) + head
    K, (width, layers, _) = model.num_visible, model.config["decoder"]
    encoder = 2 * pixels * D * K + model.layers * block_flops(D, 1 + K)
    decoder = 2 * D * width * (1 + K) + (layers - 1) * block_flops(width, 1 + N)
    last = block_flops(width, 1 + N, N - K) + 2 * width * pixels * (N - K)
    return encoder + decoder + last


def training_memory(model, run, micro_batch, recompute):
    """{item: bytes} of a training step on each process, as --plan shows them; and their "peak".

    run: a stage's settled arguments. tests/bench/plan.py holds this against measured peaks, on CPUs
    in fp32; what is said of bf16 and of GPUs is derived, and not measured yet. It does not count
    gradients that a compiled model returns all at once beside those of earlier micro-batches, nor
    those that --cuda-graph keeps: up to 4 bytes a weight.
    """
    shared, replicas = run.shard_group is not None, run.shard_group is None and run.processes > 1
    element = 2 if run.precision == "bf16" else 4  # of what is computed
    one, group = element * micro_batch, run.shard_group or 1
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    blocks = [m for m in model.modules() if isinstance(m, Block) and m.one_length]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    # Before they are shared out, the gradients of all pieces are added up whole, in fp32. Replicas
    # always have buckets for all of theirs; what several pieces add up is beside them.
    pieces = micro_batch * run.processes < run.batch_size
    accumulated = pieces or replicas
    each = 8 if pieces and replicas else 4 if accumulated else 4 / group
    gradients = coming = each * trained

    D, N = model.width, model.num_patches
    pixels = model.patch_embed["proj"].weight[0].numel()  # of a token
    K, decoder, kept = N, [], 0
    if isinstance(model, MAE):
        K, (width, layers, _) = model.num_visible, model.config["decoder"]
        decoder = [(width, 1 + N, 1 + N)] * (layers - 1) + [(width, 1 + N, N - K)]
        kept = 2 * D * (1 + K) * one  # the last norm's input and output
    kept, extra, backward = kept + pixels * K * one, 0, 0  # the patches that are embedded
    for (width, tokens, queries), size in zip([(D, 1 + K, 1 + K)] * model.layers + decoder, sizes):
        # For its backward a block keeps its input, the first norm's output, q, k and v; of those
        # who ask, attention's output, the second norm's input and output, and 4 on each side of
        # GELU. Its backward is largest at GELU: + 4 and 4 for two gradients, - 4 for the output,
        # which is done with, + 1 for the gradient that goes round.
        block = width * (5 * tokens + 11 * queries) * one
        # With relative positions the softmax is there whole, or else its bias (derived).
        square = tokens**2 * model.heads * one * bool(model.config.get("relative_positions"))
        block += square
        stays = width * tokens * one if recompute else block
        # FSDP2 holds the later block's gradients, whole and in fp32, until all have their share.
        within = block - stays + 5 * width * queries * one + (4 * size if shared else 0)
        within += 2 * square  # its gradient, and a sum
        coming -= 0 if accumulated else each * size  # those of later blocks are there by now
        kept, extra = kept + stays, max(extra, within)
        backward = max(backward, kept + within + coming)
    kept += 2 * width * queries * one  # the last norm again
    if decoder:  # in fp32: all patches; of the hidden: targets, predictions, differences, squares
        loss = 4 * pixels * (N + 4 * (N - K)) * micro_batch
    else:  # in fp32: logits, the softmax, its gradient and a temporary; bf16: logits in it, too
        loss = getattr(model, "classes", 0) * (16 if element == 4 else 18) * micro_batch
    images = pixels * N * micro_batch
    items = {"weights (fp32)": 4 * count / group, "Adam's two moments (fp32)": 8 * trained / group}
    # While a block computes, the next one comes, or the head; the others (the root) stay. What is
    # not sharded is cast to bf16, and these copies are kept for backward, but of recomputed blocks.
    head = sum(p.numel() for p in model.head.parameters()) if hasattr(model, "head") else 0
    gathered = count - sum(sizes) - head + max(sizes) + max(*sizes, head)
    if not shared:
        gathered = 0 if element == 4 else count - (sum(sizes) - max(sizes) if recompute else 0)
    items["weights, gathered or cast"] = gathered * element
    forward = kept + loss + 5 * images + (gradients if accumulated else 4 * head * shared)
    peak = sum(items.values()) + max(gradients, forward, backward + images)
    items |= {"gradients (fp32)": gradients, "activations for backward": kept}
    items |= {"one block's backward": extra, "logits or pixels, loss": loss}
    return items | {"pictures (uint8, fp32)": 5 * images, "peak": peak}  # fp32: in forward only


def device_memory(run):
    """Bytes of a process's GPU, or of one to plan for; None on a CPU without --memory."""
    if run.memory:
        return run.memory * 2**30
    if run.device.type == "cuda":
        return torch.cuda.get_device_properties(run.device).total_memory
    return 80 * 2**30 if run.gpus else None


def memory_budget(model, run):
    """Bytes a step may use: 80 % of a GPU's memory; on a CPU, 4 GB beyond weights and optimizer."""
    if (memory := device_memory(run)) is None:
        return 4e9 + training_memory(model, run, 0, False)["peak"]
    return 0.8 * memory  # the rest for NCCL, cuBLAS and the allocator's holes: a guess


def settle_sharding(model, run):
    """The processes that share one copy of a model's weights, or None: every process has all.

    --shard-group decides if it is given; 1 is None. Else a model that fits is replicated, with its
    gradients, its optimizer and the smallest micro-batch; one that does not fit is split over all
    processes.
    """
    if run.shard_group:
        return run.shard_group if run.shard_group > 1 else None
    fits = replica_memory(model, run) <= 0.8 * (device_memory(run) or host_memory())
    return None if run.processes == 1 or fits else run.processes


def replica_memory(model, run):
    """Bytes that a process needs at least if it has all of a model's weights."""
    alone = copy.copy(run)
    alone.shard_group = None
    return training_memory(model, alone, run.micro_batch or 2, run.checkpoint_activations)["peak"]


def check_shard_group(run):
    """Raise ValueError when --shard-group does not divide the processes."""
    if run.processes % (run.shard_group or 1):
        hint = "give a divisor, such as the processes of a node"
        if run.processes == 1:
            hint = "start more of them, with torchrun"
        raise ValueError(
            f"--shard-group {run.shard_group} does not divide the {run.processes} processes: {hint}"
        )


def host_memory():
    """Bytes of RAM for each process of this machine."""
    if not hasattr(os, "sysconf"):  # on Windows
        return math.inf
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def describe_sharding(model, run):
    """One line on how a settled run is spread over its processes, with the memory of each."""
    each = training_memory(model, run, run.micro_batch, run.checkpoint_activations)["peak"]
    memory, copies = device_memory(run), run.processes // (run.shard_group or 1)
    size = as_size(each) + (f" of {as_size(memory)}" if memory else "")
    size += ": more than there is" if memory and each > memory else ""
    if run.processes == 1:
        return f"one process ({size})"
    if run.shard_group is None:
        return f"{run.processes} replicas (each {size})"
    line = f"sharded over {run.shard_group} processes (each {size}; "
    line += f"a replica takes at least {as_size(replica_memory(model, run))})"
    line = f"{copies} copies, each {line}" if copies > 1 else line
    if torch.__version__ < "2.12":
        line += "; this torch leaks memory in each step of sharded AdamW: 2.12 does not"
    return line


def as_size(count):
    """ "1.5 GiB" or "0.3 MiB" of a number of bytes."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def fitting_batch(model, images, run, recompute=None):
    """The largest divisor of `images`, even if these are, that should fit: see memory_budget."""
    recompute = run.checkpoint_activations if recompute is None else recompute
    least, budget = 2 - images % 2, memory_budget(model, run)
    for n in range(images, least, -least):
        if images % n == 0 and training_memory(model, run, n, recompute)["peak"] <= budget:
            return n
    return least


def planned_batch(batch_size, run):
    """A recipe's batch size or, of a plan, the nearest that its processes can share; that is said.

    run: a stage's arguments, of which --batch-size is not given.
    """
    unit = run.processes * math.lcm(2, run.micro_batch or 2)  # samples are dealt in pairs
    nearest = unit * max(1, round(batch_size / unit))
    if not run.plan or nearest == batch_size:
        return batch_size
    if run.process == 0:
        shares = f"to {run.processes} processes"
        shares += f" in micro-batches of {run.micro_batch}" if run.micro_batch else ""
        why = f"the recipe's {batch_size:,} cannot be dealt {shares}"
        print(f"batch size   {nearest:,}, which the run wants as --batch-size: {why}")
    return nearest


def settle_micro_batches(run, model):
    """Settle micro_batch, the images that a process computes at once, and micro_batches, how many
    of them make its part of a batch. Raises ValueError."""
    per_process = run.batch_size // run.processes
    run.micro_batch = run.micro_batch or fitting_batch(model, per_process, run)
    run.micro_batches = per_process // run.micro_batch
    if run.micro_batches * run.micro_batch != per_process:
        raise ValueError(
            f"--micro-batch {run.micro_batch} does not divide a process's {per_process}"
        )


def describe_run(run, model, flops, chip):
    """Print what is trained, and how. flops: of an image; chip: the device's name."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6  # of a MAE, with the decoder
    size = f"{model.config['size']}, {millions:.1f} M weights"
    shares = f"{run.processes} processes x {run.micro_batches} x {run.micro_batch}"
    how = run.precision + (", compiled in the first step" if run.compile else "")
    how += " and recorded as a CUDA graph" if run.cuda_graph else ""
    run.say(f"model    {size}, {flops / 1e9:.2f} GFLOP an image")
    run.say(f"batch    {run.batch_size}: {shares}")
    run.say(f"parallel {describe_sharding(model, run)}")
    run.say(f"attention {run.attention}")
    run.say(f"run      {run.steps} steps, peak lr {run.lr:.2e}, {how} on {chip}")


def print_plan(run):
    """Print what a training run takes, from shapes alone. run: a stage's settled arguments."""
    if run.process:
        return
    model = run.model
    parts, root = dict.fromkeys(("encoder", "decoder", "head"), 0), 0
    for name, parameter in model.named_parameters():
        part = "decoder" if name.startswith(("decoder", "mask")) else name.split(".")[0]
        parts[part if part in parts else "encoder"] += parameter.numel()
        root += 0 if "blocks." in name or part == "head" else parameter.numel()
    count, flops = sum(parts.values()), 3 * flops_per_image(model)
    parts = ", ".join(f"{name} {some / 1e6:,.1f} M" for name, some in parts.items() if some)
    samples, processes, group = run.steps * run.batch_size, run.processes, run.shard_group or 1
    print(f"parameters   {count / 1e6:,.1f} M: {parts}")
    print(f"compute      {flops / 1e9:,.2f} GFLOP for an image of a training step")
    print(f"steps        {run.steps:,} of {run.batch_size:,} images: {samples:,} samples")
    lanes = f"; with --lanes {math.lcm(48, processes)}" if 48 % processes and not run.lanes else ""
    pieces = f"{run.micro_batches} micro-batches of {run.micro_batch} images"
    print(f"batch        {processes} processes x {pieces}{lanes}")
    print(f"parallel     {describe_sharding(model, run)}")

    print(f"memory       GiB of each process ({run.precision}); not all is there at the peak")
    print(f"{'':32}   without      with --checkpoint-activations")
    plans = [training_memory(model, run, run.micro_batch, recompute) for recompute in (0, 1)]
    for item in plans[0]:
        print(f"  {item:30}" + "".join(f"{plan[item] / 2**30:10.2f}" for plan in plans))
    budget, row = memory_budget(model, run), ""
    for recompute in (0, 1):
        n = fitting_batch(model, run.batch_size // processes, run, recompute)
        fits = training_memory(model, run, n, recompute)["peak"] <= budget
        row += f"{n if fits else 'none':>10}"
    print(f"  {f'largest micro-batch, {budget / 2**30:.1f} GiB':30}{row}")

    # FSDP2 gathers blocks and head for their forward and again for their backward, the rest (the
    # root) once; for each piece of a batch. Gradients are reduced once a step, in fp32.
    others, copies = (group - 1) / group / 2**30, processes // group
    gather = (2 * count - root) * (2 if run.precision == "bf16" else 4) * run.micro_batches * others
    scatter, between = 4 * count * others, 8 * count / group * (1 - 1 / copies) / 2**30
    print("network      GiB that a process sends, and receives, in a step:")
    shares = f"{gather:.2f} weights and {scatter:.2f} gradients in its group of {group}"
    print(f"             {shares if group > 1 else 'no weights: it has all of them'}")
    if copies > 1:
        print(f"             {between:.2f} gradients between the {copies} copies of the model")
    hours = samples * flops / (run.mfu * PEAK_FLOPS["H100"]) / 3600
    days = f"({hours / 24:,.2f} GPU-days), {hours / 24 / processes:,.2f} days on {processes}"
    print(f"GPU-hours    {hours:,.1f} {days},")
    print(f"             of H100s at {run.mfu:.0%} of their peak: an assumption, --mfu")
