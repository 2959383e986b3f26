"""Training images per second on a CPU: normalize uint8, forward, backward, AdamW.

    python tests/bench/train_step.py --sizes toy,T,S,B
    python tests/bench/train_step.py --sizes B --batch 16 --peer MAE_CHECKOUT
    python tests/bench/train_step.py --sizes 192x6x3 --patch-size 8 --image-size 64 \\
        --decoder 96x2x3 --batch 256 --peer MAE_CHECKOUT

In fp32, as the stage computes on a CPU. Loading is not measured. GPUs: see gpu.py.

--peer is a checkout of facebookresearch/mae. Its step runs in turn with ours, with its
own attention and with F.scaled_dot_product_attention, after both have given the same
loss on the same weights, images and masks (eight of them). Its optimizer is its own:
AdamW with defaults, which is not the fused one. Each side gets the memory layout of its
own loader. Both pay for the normalisation. The peer draws its masks in the step; our
loader draws ours.
"""

import gc
import os
import statistics
from functools import partial

import common
import torch
from peer import PeerAttention, build_peer, check_same_loss

from data import normalize
from model import MAE, parameter_groups, triple


def contenders(options, size):
    """{name: a function that takes one step}."""
    arguments = {"patch_size": options.patch_size, "decoder": options.decoder}
    side = options.image_size or (48 if size == "toy" else 224)
    ours = MAE(size, image_size=side, **arguments)
    images = torch.randint(256, (options.batch, 3, side, side), dtype=torch.uint8)
    noise = torch.rand(options.batch, ours.num_patches)
    ids, channels_last = noise.argsort(dim=1), images.to(memory_format=torch.channels_last)
    adam = partial(torch.optim.AdamW, lr=1e-4, betas=(0.9, 0.95))
    optimizer = adam(parameter_groups(ours, 0.05), fused=True)

    def our_step():
        ours(normalize(channels_last), ids).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    if not options.peer:
        return {"ours": our_step}
    peer = build_peer(options.peer, ours)
    check_same_loss(ours, peer, images[:8], noise[:8])
    theirs = adam(parameter_groups(peer, 0.05))  # grouped as timm does it

    def peer_step(fused):
        PeerAttention.fused = fused
        peer(normalize(images))[0].backward()
        theirs.step()
        theirs.zero_grad()

    steps = {"peer": partial(peer_step, False), "peer, SDPA": partial(peer_step, True)}
    return {"ours": our_step, **steps}


def main():
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--sizes", default="toy,T,S,B", help="of models, with commas")
    add("--batch", type=int, default=16, help="images in a step")
    add("--image-size", type=int, help="side; None: 224, of the toy size 48")
    add("--patch-size", type=int, help="side of a patch; None: the size's own")
    add("--decoder", type=triple, help="WIDTHxLAYERSxHEADS; None: the size's own")
    add("--repeats", type=int, default=7, help="timed steps of each, the median counts")
    add("--peer", help="a checkout of facebookresearch/mae to compare with")
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}")
    print(f"torch {torch.__version__}, batch {options.batch}, median of {options.repeats}")
    columns = "".join(f"{name:>10}" for name in ("images/s", "slowest", "fastest", "ours is"))
    print(f"{'size':12}{'step':12}{columns}")
    gc.disable()  # as the stages do
    for size in options.sizes.split(","):
        torch.manual_seed(0)
        steps = {n: partial(common.timed, step) for n, step in contenders(options, size).items()}
        times = common.take_turns(steps, options.repeats, warm_up=2)
        ours = statistics.median(times["ours"])
        for name, spent in times.items():
            median = statistics.median(spent)
            rates = [options.batch / value for value in (median, max(spent), min(spent))]
            cells = "".join(f"{rate:10.2f}" for rate in rates)
            print(f"{size:12}{name:12}{cells}{median / ours:9.2f}x", flush=True)
        steps = None  # the next size wants their memory
        gc.collect()


if __name__ == "__main__":
    main()
