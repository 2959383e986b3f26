"""Train the public MAE code as stage 1 trains ours, so that what was learned can be compared.

    python tests/bench/public_mae.py --peer CHECKOUT --data DIR/train --out OUT --seed 0
    python evaluate.py --task fewshot --checkpoint OUT/model.pt --data DIR

The order of the pictures and their flips are ours; the model, its initialisation and its masks are
theirs (with PyTorch's attention), and so are the schedule, the parameter groups and the optimizer.
"""

import argparse
import math
from pathlib import Path

import torch
from peer import PeerAttention, build_peer
from tqdm import tqdm

import data
import model as models
from support import loader


def main():
    parser = argparse.ArgumentParser("public_mae.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--peer", required=True, help="a checkout of facebookresearch/mae")
    add("--data", required=True, help="a folder of pictures to train on")
    add("--out", required=True, type=Path)
    add("--size", default="128x6x2", help="WIDTHxLAYERSxHEADS (128x6x2)")
    add("--image-size", type=int, default=64)
    add("--patch-size", type=int, default=16)
    add("--decoder", type=models.triple, default=(96, 2, 3), help="(96x2x3)")
    add("--batch-size", type=int, default=256)
    add("--lr", type=float, default=1.5e-3)
    add("--epochs", type=float, default=10)
    add("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    shape = {"image_size": given.image_size, "patch_size": given.patch_size}
    ours = models.MAE(given.size, decoder=given.decoder, **shape)
    peer = build_peer(given.peer, ours)
    PeerAttention.fused = True
    groups = models.parameter_groups(peer, 0.05)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    source, size = data.open_sources(given.data)[0], (given.image_size,) * 2
    order = data.Order(source.sizes, given.seed)
    make = lambda *which: {"images": data.make_picture(*which, size, 3, min_crop=1.0)}
    batches = data.Batches(source, make, given.batch_size, order=order, seed=given.seed)
    steps, warmup = int(given.epochs * order.length / given.batch_size), 0.05
    bar = tqdm(loader.loader(batches, range(steps), workers=1), total=steps, disable=None)
    for step, batch in enumerate(bar):
        done = step / steps
        ramp, turn = done / warmup, math.pi * (done - warmup) / (1 - warmup)
        for group in optimizer.param_groups:
            group["lr"] = given.lr * (ramp if ramp < 1 else 0.5 * (1 + math.cos(turn)))
        loss, _, _ = peer(data.normalize(batch["images"]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            tqdm.write(f"step {step}/{steps}  loss {loss.item():.4f}")
    given.out.mkdir(parents=True, exist_ok=True)
    models.save_weights(given.out / "model.pt", peer.state_dict(), ours.config)


if __name__ == "__main__":
    main()
