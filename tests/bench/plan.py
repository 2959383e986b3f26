"""Compare the peak memory that --plan prints with the measured one.

    python tests/bench/plan.py
    python tests/bench/plan.py --sizes toy,S --processes 2

Each case takes optimizer steps as the stages do, but without a loader, on the CPU in
fp32, in a new process with one thread: an MAE, and classifiers of 1,000 and 28,000
classes; without and with activation checkpointing; in two micro-batches. Measured is
the ru_maxrss of the process minus its value before the model was built. A tiny step
before that has loaded the libraries. With several processes (replicas or, with
--shard-group, FSDP2 over gloo) the largest process counts.

glibc keeps freed memory in arenas, whose holes have nothing to do with the model.
Therefore MALLOC_MMAP_THRESHOLD_ is set: each tensor of 64 KiB or more is a mapping of
its own.
"""

import itertools
import os
import tempfile
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

os.environ |= {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}

import common
import torch
import torch.distributed as dist

from data import normalize
from model import MAE, Classifier, local, parallelize, parameter_groups, sync_gradients, tag_loss
from support.launch import peak_memory
from support.plan import training_memory

MICRO_BATCH = {"toy": 256, "T": 16, "S": 8, "B": 4}  # peaks of 0.1 to 2.7 GiB
CPU = torch.device("cpu")


def build(size, head):
    side = 48 if size == "toy" else 224
    if head == "mae":
        return MAE(size, image_size=side)
    return Classifier(size, classes=int(head), image_size=side)


def train(model, run, steps=3):
    """Optimizer steps as a stage takes them. (DDP has its final buckets from the third one on.)"""
    options = {"checkpoint_activations": run.checkpoint_activations}
    parallel = parallelize(model, CPU, run.shard_group, **options)
    groups = parameter_groups(model, 0.05)
    optimizer = torch.optim.AdamW(groups, 1e-4, betas=(0.9, 0.95), fused=True)
    per_process = run.batch_size // run.processes
    for _ in range(steps):
        for start in range(0, per_process, run.micro_batch):
            shape = run.micro_batch, *model.config["image_size"], 3  # channels last, as loaded
            images = torch.randint(256, shape, dtype=torch.uint8).permute(0, 3, 1, 2)
            with sync_gradients(parallel, last=start + run.micro_batch == per_process):
                if isinstance(model, MAE):
                    ids = torch.rand(run.micro_batch, model.num_patches).argsort(dim=1)
                    losses = parallel(normalize(images), ids)
                else:
                    tags = torch.randint(model.classes, (run.micro_batch, 8))
                    losses = tag_loss(parallel(normalize(images)), tags)
                losses.sum().backward()
        gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
        torch.nn.utils.get_total_norm(gradients).item()
        optimizer.step()
        optimizer.zero_grad()
        gradients = None


def measure(run, rank, rendezvous):
    """Bytes that the steps take in one of the processes."""
    if run.processes > 1:
        store = f"file://{rendezvous}"
        dist.init_process_group("gloo", store, rank=rank, world_size=run.processes)
    tiny = Namespace(**vars(run) | {"micro_batch": 2, "batch_size": 2 * run.processes})
    train(MAE("8x1x1", image_size=16, patch_size=8, decoder=(8, 1, 1)), tiny)
    before = peak_memory(CPU)
    train(build(run.size, run.head), run)
    found = int((peak_memory(CPU) - before) * 2**30)
    if run.processes > 1:
        dist.barrier()
        dist.destroy_process_group()
    return found


def measured(run):
    """Bytes of the largest of run.processes processes."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(run.processes) as threads:
        one = lambda rank: common.in_new_process(measure, run, rank, f"{folder}/store")
        return max(threads.map(one, range(run.processes)))


def planned(run):
    """The peak that --plan prints, in bytes."""
    with torch.device("meta"):
        model = build(run.size, run.head)
    return training_memory(model, run, run.micro_batch)["peak"]


def main():
    parser = common.make_parser(__doc__)
    parser.add_argument("--sizes", default="toy,T,S,B", help="separated by commas")
    parser.add_argument("--processes", type=int, default=1, help="of each case")
    parser.add_argument("--shard-group", type=int, help="processes that share the weights")
    options = parser.parse_args()
    print(f"{options.processes} processes, fp32, torch {torch.__version__}")
    print("size  head  micro-batch  number  checkpointing  planned MiB  measured MiB    error")
    errors = []
    for size, head in itertools.product(options.sizes.split(","), ("mae", "1000", "28000")):
        for number, recompute in ((1, False), (1, True), (2, False)):
            run = Namespace(**vars(options), size=size, head=head, precision="fp32")
            run.micro_batch, run.checkpoint_activations = MICRO_BATCH[size], recompute
            run.batch_size = run.micro_batch * number * run.processes
            plan, found = planned(run), measured(run)
            errors.append(plan / found - 1)
            shape = f"{size:5} {head:>5} {run.micro_batch:11} {number:7} {recompute!s:>14}"
            numbers = f"{plan / 2**20:12.0f} {found / 2**20:13.0f} {errors[-1]:+8.1%}"
            print(f"{shape} {numbers}", flush=True)
    print(f"errors: from {min(errors):+.1%} to {max(errors):+.1%}")


if __name__ == "__main__":
    main()
