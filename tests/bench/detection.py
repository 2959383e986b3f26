"""What a detector costs: a training step on one image, forward and backward, beside its trunk's.

    python tests/bench/detection.py --size B --image-size 1024

Each runs in a process of its own, whose peak memory counts. On a CPU, the time is that
of one thread, whatever else the machine does. Image and objects are random: 8 boxes
with masks.

Seen with B at 1024 on one thread of a 2-core machine: trunk 99 s and 9.0 GiB, all 134 s
and 10.1 GiB: 26 % of the time is spent outside the trunk.
"""

import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import common
import torch

from support.launch import peak_memory
from tasks.detect import Detector, detector_flops


def random_target(side, device, objects=8):
    """Boxes of 3 to 31 % of the image's side, with masks that fill them."""
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(objects, 2, generator=generator) * 700
    sides = 30 + torch.rand(objects, 2, generator=generator) ** 2 * 290
    boxes = torch.cat([low, low + sides], dim=1) * side / 1024
    x = torch.arange(side)
    inside = [(x >= boxes[:, i, None]) & (x < boxes[:, i + 2, None]) for i in (0, 1)]
    masks = inside[1][:, :, None] & inside[0][:, None]
    target = {"boxes": boxes, "labels": torch.arange(objects), "masks": masks}
    target = {name: tensor.to(device) for name, tensor in target.items()}
    return target | {"size": (side, side), "seed": 0}


def measure(part, size, side, kind, repeats):
    """(seconds of the fastest step, peak of the memory in GiB)"""
    device, cuda = torch.device(kind), kind == "cuda"
    model = Detector(size, 80, side).to(device)
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    targets = [random_target(side, device)]

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            if part == "trunk":
                loss = model.trunk(images).square().mean()
            else:
                loss = model(images, targets)[0].sum()
        loss.backward()
        loss.item()  # waits for a GPU

    if cuda:
        step()  # the first one is slow
    clock = time.perf_counter if cuda else time.process_time
    seconds = min(common.timed(step, clock=clock) for _ in range(repeats))
    return seconds, peak_memory(device)


def main():
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--size", default="B", help="of the trunk")
    add("--image-size", type=int, default=1024, help="side of the image")
    add("--repeats", type=int, default=1, help="timed steps of each, the fastest counts")
    add("--device", default="cpu", help="cpu, or cuda, which computes in bf16")
    options = parser.parse_args()
    size, side = options.size, options.image_size
    with torch.device("meta"):
        flops = detector_flops(Detector(size, 80, side))
    print(f"{size} at {side}: {flops / 1e9:,.0f} GFLOP forward")
    print(f"{'part':6} {'seconds':>8} {'share':>6} {'peak GiB':>9}")
    shared = size, side, options.device, options.repeats
    rows = {part: common.in_new_process(measure, part, *shared) for part in ("trunk", "all")}
    for part, (seconds, memory) in rows.items():
        print(f"{part:6} {seconds:8.2f} {seconds / rows['all'][0]:6.0%} {memory:9.2f}")


if __name__ == "__main__":
    main()
