"""What a vocabulary costs: a training step with the hashtag head, and the same without it.

    python tests/bench/tag_head.py --sizes B --classes 28000 --batch 16
    python tests/bench/tag_head.py --sizes B --classes 28000 --batch 512 --head-only

without    the same encoder; the loss is the mean of its class tokens
head       the head with three hashtags an image, as stage 2 trains it
dense      the head with a (B, V) target, as it is not done here

Each runs in a process of its own, whose peak memory counts. --head-only leaves the
encoder out: class tokens are random.
"""

import statistics

import common
import torch

from model import Classifier, tag_loss
from support.launch import peak_memory

TAGS = 3  # of an image


def loss_of(logits, tags, kind):
    if kind == "without":
        return logits.mean()
    if kind == "head":
        return tag_loss(logits, tags).mean()
    target = torch.zeros_like(logits).scatter_(1, tags, 1 / TAGS)
    return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()


def measure(kind, size, classes, batch, head_only, repeats):
    """(median seconds of a step, peak of the memory in GiB)"""
    torch.manual_seed(0)
    model, images = Classifier(size, classes, head_std=0.02), torch.randn(batch, 3, 224, 224)
    tokens = torch.randn(batch, model.width, requires_grad=True)
    tags = torch.stack([torch.randperm(classes)[:TAGS] for _ in range(batch)])
    if kind == "without":
        model.head = torch.nn.Identity()
    trained = [*(model.head if head_only else model).parameters()] or [tokens]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step():
        logits = model.head(tokens) if head_only else model(images)
        loss_of(logits, tags, kind).backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = [common.timed(step) for _ in range(1 + repeats)]
    return statistics.median(seconds[1:]), peak_memory(torch.device("cpu"))


def main():
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--sizes", default="B", help="of models, with commas")
    add("--classes", type=int, default=28_000, help="hashtags")
    add("--batch", type=int, default=16, help="images in a step")
    add("--repeats", type=int, default=5, help="timed steps of each, the median counts")
    add("--head-only", action="store_true", help="leave the encoder out")
    options = parser.parse_args()
    print(f"batch {options.batch}, {options.classes} hashtags, {TAGS} an image")
    print(f"{'size':6} {'step':8} {'seconds':>8} {'ratio':>6} {'peak GiB':>9}")
    shared = options.classes, options.batch, options.head_only, options.repeats
    for size in options.sizes.split(","):
        first = None
        for kind in ("without", "head", "dense"):
            seconds, memory = common.in_new_process(measure, kind, size, *shared)
            first = first or seconds
            print(f"{size:6} {kind:8} {seconds:8.3f} {seconds / first:5.2f}x {memory:9.2f}")


if __name__ == "__main__":
    main()
