"""Training images per second on a CPU: normalize uint8, forward, backward, AdamW.

    python tests/bench/train_step.py --sizes toy,T,S,B
    python tests/bench/train_step.py --sizes B --batch 16 --peer MAE_CHECKOUT
    python tests/bench/train_step.py --sizes 192x6x3 --patch-size 8 --image-size 64 \\
        --decoder 96x2x3 --batch 256 --peer MAE_CHECKOUT

In fp32, as the stage computes on a CPU. Loading is not measured. GPUs: see gpu.py.

--peer is a checkout of facebookresearch/mae. Its step runs in turn with ours, with its own
attention and with F.scaled_dot_product_attention, after both have given the same loss on the same
weights, images and masks (eight of them). Its optimizer is its own: AdamW with defaults, which is
not the fused one. Each side gets the memory layout of its own loader. Both pay for the
normalisation. The peer draws its masks in the step; our loader draws ours.
OMP_WAIT_POLICY is the stage's unless the environment sets it.
"""

import argparse
import gc
import os
import statistics
import time
from functools import partial

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as mae_pretrain.py

import torch
from peer import PeerAttention, build_peer, check_same_loss

import data
import model as models


def parse_arguments():
    parser = argparse.ArgumentParser("train_step.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--sizes", default="toy,T,S,B", help="of models, with commas (toy,T,S,B)")
    add("--batch", type=int, default=16, help="images in a step (16)")
    add("--image-size", type=int, help="side (224; toy size: 48)")
    add("--patch-size", type=int, help="side of a patch (the size's own)")
    add("--decoder", type=models.triple, help="WIDTHxLAYERSxHEADS (the size's own)")
    add("--repeats", type=int, default=7, help="timed steps of each, the median counts (7)")
    add("--peer", help="a checkout of facebookresearch/mae to compare with")
    return parser.parse_args()


def our_step(model, optimizer, images, ids):
    model(data.normalize(images), ids).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def peer_step(model, optimizer, images, fused):
    PeerAttention.fused = fused
    loss, _, _ = model(data.normalize(images))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def contenders(options, size):
    """{name: a function that takes one step}."""
    arguments = {"patch_size": options.patch_size, "decoder": options.decoder}
    side = options.image_size or (48 if size == "toy" else 224)
    ours = models.MAE(size, image_size=side, **arguments)
    images = torch.randint(256, (options.batch, 3, side, side), dtype=torch.uint8)
    noise = torch.rand(options.batch, ours.num_patches)
    adam = partial(torch.optim.AdamW, lr=1e-4, betas=(0.9, 0.95))
    optimizer = adam(models.parameter_groups(ours, 0.05), fused=True)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    steps = {"ours": partial(our_step, ours, optimizer, channels_last, noise.argsort(dim=1))}
    if options.peer:
        peer = build_peer(options.peer, ours)
        check_same_loss(ours, peer, images[:8], noise[:8])
        optimizer = adam(models.parameter_groups(peer, 0.05))  # grouped as timm does it
        steps["peer"] = partial(peer_step, peer, optimizer, images, False)
        steps["peer, SDPA"] = partial(peer_step, peer, optimizer, images, True)
    return steps


def seconds(step):
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def main():
    options = parse_arguments()
    print(
        f"{torch.get_num_threads()} threads, OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}, ",
        end="",
    )
    print(f"torch {torch.__version__}, batch {options.batch}, median of {options.repeats}")
    columns = "".join(f"{name:>10}" for name in ("images/s", "slowest", "fastest", "ours is"))
    print(f"{'size':12}{'step':12}{columns}")
    gc.disable()  # as the stages do
    for size in options.sizes.split(","):
        torch.manual_seed(0)
        steps = contenders(options, size)
        times = {name: [] for name in steps}
        for repeat in range(options.repeats + 2):  # the first two warm up
            for name, step in steps.items():
                spent = seconds(step)
                times[name] += [spent] if repeat >= 2 else []
        ours = statistics.median(times["ours"])
        for name, spent in times.items():
            median = statistics.median(spent)
            rates = [options.batch / value for value in (median, max(spent), min(spent))]
            cells = "".join(f"{rate:10.2f}" for rate in rates)
            print(f"{size:12}{name:12}{cells}{median / ours:9.2f}x", flush=True)
        steps = step = None  # the next size wants their memory
        gc.collect()


if __name__ == "__main__":
    main()
