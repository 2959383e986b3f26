"""What a detector costs: a training step on one image, forward and backward, and its trunk's alone.

    python tests/bench/detection.py --size B --image-size 1024

The two run in turn, each in a process of its own, because the peak of the memory is a process's. On
a CPU it is one thread's time that counts, whatever else the machine does. Image and objects are
random: boxes of 30 to 320 pixels with masks.

Seen with B at 1024 on one thread of a 2-core machine: trunk 99 s and 9.0 GiB, all 134 s and
10.1 GiB: 26 % of the time is spent outside the trunk.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from support import launch
from tasks.detect import Detector, detector_flops


def parse_arguments():
    parser = argparse.ArgumentParser("detection.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--size", default="B", help="of the trunk (B)")
    add("--image-size", type=int, default=1024, help="side of the image (1024)")
    add("--objects", type=int, default=8, help="in the image (8)")
    add("--repeats", type=int, default=1, help="timed steps of each, the fastest counts (1)")
    add("--device", default="cpu", help="cpu or cuda (cpu); cuda computes in bf16")
    add("--part", choices=("trunk", "all"), help=argparse.SUPPRESS)
    return parser.parse_args()


def random_target(objects, side, device):
    generator = torch.Generator().manual_seed(0)
    scale = side / 1024
    low = torch.rand(objects, 2, generator=generator) * 700 * scale
    sides = (30 + torch.rand(objects, 2, generator=generator) ** 2 * 290) * scale
    boxes = torch.cat([low, low + sides], dim=1)
    x = torch.arange(side)
    inside = [(x >= boxes[:, i, None]) & (x < boxes[:, i + 2, None]) for i in (0, 1)]
    masks = inside[1][:, :, None] & inside[0][:, None]
    target = {"boxes": boxes, "labels": torch.arange(objects), "masks": masks}
    target = {name: tensor.to(device) for name, tensor in target.items()}
    return target | {"size": (side, side), "seed": 0}


def measure(arguments):
    """Print the seconds of a step and the peak of the memory in GiB."""
    device, side = torch.device(arguments.device), arguments.image_size
    model = Detector(arguments.size, 80, side).to(device)
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    targets, seconds = [random_target(arguments.objects, side, device)], []
    cuda = device.type == "cuda"
    for _ in range(arguments.repeats + cuda):  # a GPU's first step is slow
        began = time.perf_counter() if cuda else time.process_time()
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            if arguments.part == "trunk":
                loss = model.trunk(images).square().mean()
            else:
                loss = model(images, targets)[0].sum()
        loss.backward()
        loss.item()  # waits for a GPU
        seconds.append((time.perf_counter() if cuda else time.process_time()) - began)
    print(min(seconds), launch.peak_memory(device))


def main():
    arguments = parse_arguments()
    if arguments.part:
        return measure(arguments)
    with torch.device("meta"):
        flops = detector_flops(Detector(arguments.size, 80, arguments.image_size))
    print(f"{arguments.size} at {arguments.image_size}: {flops / 1e9:,.0f} GFLOP forward")
    print(f"{'part':6} {'seconds':>8} {'share':>6} {'peak GiB':>9}")
    rows = {}
    for part in ("trunk", "all"):
        command = [sys.executable, *sys.argv, "--part", part]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows[part] = tuple(map(float, output.split()))
    for part, (seconds, memory) in rows.items():
        print(f"{part:6} {seconds:8.2f} {seconds / rows['all'][0]:6.0%} {memory:9.2f}")


if __name__ == "__main__":
    main()
