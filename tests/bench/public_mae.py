"""Train the public MAE code as stage 1 trains ours, so that what was learned can be compared.

    python tests/bench/public_mae.py --peer CHECKOUT --data DIR/train --out OUT --seed 0
    python evaluate.py --task fewshot --checkpoint OUT/model.pt --data DIR

The order of the pictures and their flips are ours; the model, its initialisation and
its masks are theirs (with PyTorch's attention), and so are the schedule, the parameter
groups and the optimizer.
"""

import math
from pathlib import Path

import common
import torch
from peer import PeerAttention, build_peer
from tqdm import tqdm

from data import Batches, Order, make_picture, normalize, open_sources
from model import MAE, parameter_groups, save_weights
from support.loader import loader

SIDE, BATCH, LR, WARMUP = 64, 256, 1.5e-3, 0.05


def main():
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--peer", required=True, help="a checkout of facebookresearch/mae")
    add("--data", required=True, help="a folder of pictures to train on")
    add("--out", required=True, type=Path, help="folder of model.pt")
    add("--size", default="128x6x2", help="WIDTHxLAYERSxHEADS")
    add("--patch-size", type=int, default=16, help=f"in pixels, of pictures of {SIDE}")
    add("--epochs", type=float, default=10, help="of the pictures")
    add("--seed", type=int, default=0, help="of weights and order")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    ours = MAE(options.size, (96, 2, 3), image_size=SIDE, patch_size=options.patch_size)
    peer = build_peer(options.peer, ours)
    PeerAttention.fused = True
    optimizer = torch.optim.AdamW(parameter_groups(peer, 0.05), betas=(0.9, 0.95))
    source = open_sources(options.data)[0]
    order = Order(source.sizes, options.seed)
    make = lambda *which: {"images": make_picture(*which, (SIDE, SIDE), 3, min_crop=1.0)}
    batches = Batches(source, make, BATCH, order=order, seed=options.seed)
    steps = int(options.epochs * order.length / BATCH)
    bar = tqdm(loader(batches, range(steps), workers=1), total=steps, disable=None)
    for step, batch in enumerate(bar):
        ramp, turn = step / steps / WARMUP, math.pi * (step / steps - WARMUP) / (1 - WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = LR * (ramp if ramp < 1 else 0.5 * (1 + math.cos(turn)))
        loss, _, _ = peer(normalize(batch["images"]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            tqdm.write(f"step {step}/{steps}  loss {loss.item():.4f}")
    options.out.mkdir(parents=True, exist_ok=True)
    save_weights(options.out / "model.pt", peer.state_dict(), ours.config)


if __name__ == "__main__":
    main()
