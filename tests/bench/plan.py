"""Compare the peak memory that --plan prints with the measured one.

    python tests/bench/plan.py
    python tests/bench/plan.py --sizes toy,S --processes 2

Each case takes optimizer steps as the stages do, but without a loader, on the CPU in fp32, in a
fresh process with one thread: an MAE, and classifiers of 1,000 and 28,000 classes; without and with
activation checkpointing; in two micro-batches. Measured is the ru_maxrss of the process minus its
value before the model was built. A tiny step before that has loaded the libraries. With several
processes (replicas or, with --shard-group, FSDP2 over gloo) the largest process counts.

glibc keeps freed memory in arenas, whose holes have nothing to do with the model. Therefore
MALLOC_MMAP_THRESHOLD_ is set: each tensor of 64 KiB or more is a mapping of its own.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the stages
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

import data
import model as models
from support import launch
from support import plan as plan_module

MICRO_BATCH = {"toy": 256, "T": 16, "S": 8, "B": 4}  # peaks of 0.1 to 2.7 GiB


def build(size, head):
    side = 48 if size == "toy" else 224
    if head == "mae":
        return models.MAE(size, image_size=side)
    return models.Classifier(size, classes=int(head), image_size=side)


def train(model, run, steps=3):
    """Optimizer steps as a stage takes them. (DDP has its final buckets from the third one on.)"""
    per_process, cpu = run.batch_size // run.processes, torch.device("cpu")
    options = {"checkpoint_activations": run.checkpoint_activations}
    parallel = models.parallelize(model, cpu, run.shard_group, **options)
    groups = models.parameter_groups(model, 0.05)
    optimizer = torch.optim.AdamW(groups, 1e-4, betas=(0.9, 0.95), fused=True)
    for _ in range(steps):
        for start in range(0, per_process, run.micro_batch):
            shape = run.micro_batch, *model.config["image_size"], 3  # channels last, as loaded
            images = torch.randint(256, shape, dtype=torch.uint8).permute(0, 3, 1, 2)
            with models.sync_gradients(parallel, last=start + run.micro_batch == per_process):
                if isinstance(model, models.MAE):
                    ids = torch.rand(run.micro_batch, model.num_patches).argsort(dim=1)
                    losses = parallel(data.normalize(images), ids)
                else:
                    tags = torch.randint(model.classes, (run.micro_batch, 8))
                    losses = models.tag_loss(parallel(data.normalize(images)), tags)
                losses.sum().backward()
        gradients = [models.local(p.grad) for p in model.parameters() if p.grad is not None]
        torch.nn.utils.get_total_norm(gradients).item()
        optimizer.step()
        optimizer.zero_grad()
        gradients = None


def measure(run):
    """Print the bytes that the steps take. Runs in a process of its own."""
    device = torch.device("cpu")
    if run.processes > 1:
        rank, store = int(os.environ["RANK"]), f"file://{os.environ['RENDEZVOUS']}"
        dist.init_process_group("gloo", store, rank=rank, world_size=run.processes)
    tiny = Namespace(**vars(run) | {"micro_batch": 2, "batch_size": 2 * run.processes})
    train(models.MAE("8x1x1", image_size=16, patch_size=8, decoder=(8, 1, 1)), tiny)
    before = launch.peak_memory(device)
    train(build(run.size, run.head), run)
    print(int((launch.peak_memory(device) - before) * 2**30), flush=True)
    if run.processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def measured(run):
    """Bytes of the largest of run.processes processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    code = f"import plan; plan.measure(plan.Namespace(**{vars(run)}))"
    with tempfile.TemporaryDirectory() as folder:
        environment["RENDEZVOUS"] = f"{folder}/store"
        children = [
            subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=Path(__file__).parent,
                env=environment | {"RANK": str(rank)},
                stdout=subprocess.PIPE,
            )
            for rank in range(run.processes)
        ]
        return max(int(child.communicate()[0].split()[-1]) for child in children)


def planned(run):
    """The peak that --plan prints, in bytes."""
    with torch.device("meta"):
        model = build(run.size, run.head)
    run = Namespace(**vars(run), precision="fp32")
    return plan_module.training_memory(model, run, run.micro_batch)["peak"]


def main():
    parser = argparse.ArgumentParser("plan.py", description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="toy,T,S,B", help="separated by commas (toy,T,S,B)")
    parser.add_argument("--processes", type=int, default=1, help="(1)")
    parser.add_argument("--shard-group", type=int, help="processes that share the weights (none)")
    options = parser.parse_args()
    print(f"{options.processes} processes, fp32, torch {torch.__version__}")
    print("size  head  micro-batch  pieces  checkpointing  planned MiB  measured MiB    error")
    errors = []
    for size, head in itertools.product(options.sizes.split(","), ("mae", "1000", "28000")):
        for pieces, recompute in ((1, False), (1, True), (2, False)):
            run = Namespace(size=size, head=head, micro_batch=MICRO_BATCH[size])
            run.processes, run.shard_group = options.processes, options.shard_group
            run.batch_size = run.micro_batch * pieces * run.processes
            run.checkpoint_activations = recompute
            plan, found = planned(run), measured(run)
            errors.append(plan / found - 1)
            shape = f"{size:5} {head:>5} {run.micro_batch:11} {pieces:7} {recompute!s:>14}"
            numbers = f"{plan / 2**20:12.0f} {found / 2**20:13.0f} {errors[-1]:+8.1%}"
            print(f"{shape} {numbers}", flush=True)
    print(f"errors: from {min(errors):+.1%} to {max(errors):+.1%}")


if __name__ == "__main__":
    main()
