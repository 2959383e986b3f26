"""What a vocabulary costs: a training step with the hashtag head, and the same without it.

    python tests/bench/tag_head.py --sizes B --classes 28000 --batch 16
    python tests/bench/tag_head.py --sizes B --classes 28000 --batch 512 --head-only

Without: the same encoder, the loss is the mean of its class tokens. Dense: the head, with a (B, V)
target, as it is not done here. The three run in turn, each in a process of its own, because the
peak of the memory is a process's. --head-only leaves the encoder out: random class tokens.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the stages
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import model as models
from support import launch

KINDS = ("without", "head", "dense")


def parse_arguments():
    parser = argparse.ArgumentParser("tag_head.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--sizes", default="B", help="of models, with commas (B)")
    add("--classes", type=int, default=28_000, help="hashtags (28,000)")
    add("--batch", type=int, default=16, help="images in a step (16)")
    add("--tags", type=int, default=3, help="hashtags of an image (3)")
    add("--repeats", type=int, default=5, help="timed steps of each, the median counts (5)")
    add("--head-only", action="store_true", help="leave the encoder out")
    add("--kind", choices=KINDS, help=argparse.SUPPRESS)
    return parser.parse_args()


def loss_of(logits, tags, kind):
    if kind == "without":
        return logits.mean()
    if kind == "head":
        return models.tag_loss(logits, tags).mean()
    target = torch.zeros_like(logits).scatter_(1, tags, 1 / tags.shape[1])
    return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()


def measure(size, arguments):
    """Print the median seconds of a step and the peak of the memory in GiB, of one kind."""
    generator = torch.Generator().manual_seed(0)
    model = models.Classifier(size, arguments.classes, head_std=0.02)
    width, images = model.width, torch.randn(arguments.batch, 3, 224, 224, generator=generator)
    tokens = torch.randn(arguments.batch, width, generator=generator, requires_grad=True)
    tags = torch.stack(
        [torch.randperm(arguments.classes, generator=generator) for _ in range(arguments.batch)]
    )[:, : arguments.tags]
    trained = list((model.head if arguments.head_only else model).parameters())
    if arguments.kind == "without":
        model.head = torch.nn.Identity()
        trained = [tokens] if arguments.head_only else list(model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    seconds = []
    for _ in range(arguments.repeats + 1):
        began = time.perf_counter()
        logits = model.head(tokens) if arguments.head_only else model(images)
        loss_of(logits, tags, arguments.kind).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    print(statistics.median(seconds[1:]), launch.peak_memory(torch.device("cpu")))


def main():
    arguments = parse_arguments()
    if arguments.kind:
        return measure(arguments.sizes, arguments)
    print(f"batch {arguments.batch}, {arguments.classes} hashtags, {arguments.tags} an image")
    print(f"{'size':6} {'step':8} {'seconds':>8} {'ratio':>6} {'peak GiB':>9}")
    for size in arguments.sizes.split(","):
        first = None
        for kind in KINDS:
            command = [sys.executable, *sys.argv, "--sizes", size, "--kind", kind]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            seconds, memory = map(float, output.split())
            first = first or seconds
            print(f"{size:6} {kind:8} {seconds:8.3f} {seconds / first:5.2f}x {memory:9.2f}")


if __name__ == "__main__":
    main()
