"""Training images per second: normalize uint8, forward, backward, AdamW. Loading is not in it.

    python tests/bench/train_step.py --sizes B,L,H --batch 256 --compile --peer ../mae   # a GPU
    python tests/bench/train_step.py --sizes toy,T,S,B
    python tests/bench/train_step.py --sizes B --batch 16 --peer ../mae
    python tests/bench/train_step.py --sizes 192x6x3 --patch-size 8 --image-size 64 \\
        --decoder 96x2x3 --batch 256 --peer ../mae

CUDA as the stage does it (bf16, FSDP2 over one process), else fp32. On a GPU our step is taken with
the Triton kernels and with PyTorch's attention, in turn; mfu is the share of the chip's dense bf16
peak; GiB, what the allocator had at most in our steps, beside what --plan says of it.

--peer is a checkout of facebookresearch/mae: its step runs in turn with ours, with its own
attention and with F.scaled_dot_product_attention, after both have given the same loss on the same
weights, images and masks (eight of them, on the CPU). Its optimizer is its own (AdamW with
defaults; on a CPU that is not the fused one); each side gets its loader's memory layout; both pay
for the normalisation; it draws its masks in the step, our loader does. It needs no timm.
OMP_WAIT_POLICY is the stage's unless the environment sets it.
"""

import argparse
import gc
import os
import statistics
import sys
import time
import types
from functools import partial
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as mae_pretrain.py
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import data
import kernels
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
    add("--compile", action="store_true", help="torch.compile our blocks")
    add("--peer", help="a checkout of facebookresearch/mae to compare with")
    return parser.parse_args()


# ------------------------------------------------------------------------------------- the peer
# Stand-ins for what the public code takes from timm 0.3.2.


class PatchEmbed(nn.Module):
    def __init__(self, image_size, patch_size, channels, width):
        super().__init__()
        self.patch_size, self.num_patches = (patch_size,) * 2, (image_size // patch_size) ** 2
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class PeerAttention(models.Attention):
    fused = False  # True: F.scaled_dot_product_attention

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]  # each (B, heads, N, D / heads)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = (q @ k.transpose(-2, -1)) * (D // self.heads) ** -0.5
            x = F.dropout(scores.softmax(dim=-1), 0.0, self.training) @ v
        x = self.proj(x.transpose(1, 2).reshape(B, N, D))
        return F.dropout(x, 0.0, self.training)


class PeerBlock(nn.Module):
    def __init__(self, width, heads, mlp_ratio, norm_layer, **_):
        super().__init__()
        self.norm1, self.norm2 = norm_layer(width), norm_layer(width)
        self.attn = PeerAttention(width, heads)
        self.mlp = models.Mlp(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def build_peer(checkout, ours):
    """The public code's model of the same architecture."""
    vision = types.ModuleType("timm.models.vision_transformer")
    vision.PatchEmbed, vision.Block = PatchEmbed, PeerBlock
    sys.modules.update({"timm": vision, "timm.models": vision, vision.__name__: vision})
    if checkout not in sys.path:
        sys.path.insert(0, checkout)
    np.float = float  # its position table is older than numpy 1.24
    import models_mae

    return models_mae.MaskedAutoencoderViT(
        *(ours.config["image_size"][0], ours.patch_size, ours.config["channels"]),
        *(ours.width, ours.layers, ours.heads, *ours.config["decoder"]),
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        norm_pix_loss=True,
    )


# ----------------------------------------------------------------------------------------- steps


def ours_step(model, optimizer, images, ids, fused):
    kernels.CHOSEN.update(dict.fromkeys(kernels.CHOSEN, fused))
    model(data.normalize(images), ids).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def peer_step(model, optimizer, images, fused):
    PeerAttention.fused = fused
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        loss, _, _ = model(data.normalize(images))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def check_same_loss(ours, peer, images, noise):
    models.load_weights(ours, peer.state_dict())
    images = data.normalize(images)
    with patch("torch.rand", return_value=noise):
        expected = peer(images)[0].item()
    loss = ours(images, noise.argsort(dim=1)).mean().item()
    if abs(loss - expected) > 1e-5 * expected:
        raise SystemExit(f"the losses differ: {loss} and {expected}")


def contenders(options, size, device):
    """{name: a function that takes one step}."""
    arguments = {"patch_size": options.patch_size, "decoder": options.decoder}
    side = options.image_size or (48 if size == "toy" else 224)
    ours = models.MAE(size, image_size=side, **arguments)
    images = torch.randint(256, (options.batch, 3, side, side), dtype=torch.uint8)
    noise = torch.rand(options.batch, ours.num_patches)
    peer = build_peer(options.peer, ours) if options.peer else None
    if peer:
        check_same_loss(ours, peer, images[:8], noise[:8])
    ours = ours.to(device)
    sharded = device.type == "cuda"
    how = {"shard_group": 1 if sharded else None, "precision": "bf16" if sharded else "fp32"}
    run = types.SimpleNamespace(processes=1, gpus=0, batch_size=options.batch, device=device)
    run.shard_group, run.precision = 1, how["precision"]
    plan = models.training_memory(ours, run, options.batch, recompute=False)
    models.parallelize(ours, device, **how, compile=options.compile)
    groups = models.parameter_groups(ours, 0.05)
    optimizer = torch.optim.AdamW(groups, 1e-4, betas=(0.9, 0.95), fused=device.type != "mps")
    images, ids = images.to(device), noise.argsort(dim=1).to(device)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    step = partial(ours_step, ours, optimizer, channels_last, ids)
    steps = {"ours": partial(step, False)}
    if sharded:
        print(models.choose_attention(ours, options.batch, device, "bf16"))
        steps = {"ours": partial(step, True), "ours, SDPA": partial(step, False)}
        torch.cuda.reset_peak_memory_stats()
        for step in 2 * list(steps.values()):  # the first also makes the optimizer's state
            step()
        peak = models.peak_memory(device)
        print(f"{size}: {peak:.2f} GiB at most, --plan: {plan['peak'] / 2**30:.2f}")
    if peer:  # our grouping is the one that it takes from timm
        groups = models.parameter_groups(peer.to(device), 0.05)
        optimizer = torch.optim.AdamW(groups, 1e-4, betas=(0.9, 0.95))
        steps["peer"] = partial(peer_step, peer, optimizer, images, False)
        steps["peer, SDPA"] = partial(peer_step, peer, optimizer, images, True)
    return steps, 3 * models.flops_per_image(ours)


def seconds(step, device):
    began = time.perf_counter()
    step()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def main():
    options = parse_arguments()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    if device.type == "cuda":
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("cpu:gloo,cuda:nccl", **alone)
    policy, (peak, chip) = os.environ["OMP_WAIT_POLICY"], models.peak_flops(device)
    print(f"{chip}, {torch.get_num_threads()} threads, OMP_WAIT_POLICY={policy}, ", end="")
    print(f"torch {torch.__version__}, batch {options.batch}, median of {options.repeats}")
    columns = "".join(f"{name:>10}" for name in ("images/s", "slowest", "fastest", "ours is"))
    print(f"{'size':12}{'step':12}{columns} mfu")
    gc.disable()  # as the stages do
    for size in options.sizes.split(","):
        torch.manual_seed(0)
        steps, flops = contenders(options, size, device)
        times = {name: [] for name in steps}
        for repeat in range(options.repeats + 2):  # the first two warm up
            for name, step in steps.items():
                spent = seconds(step, device)
                times[name] += [spent] if repeat >= 2 else []
        ours = statistics.median(times["ours"])
        for name, spent in times.items():
            median = statistics.median(spent)
            rates = [options.batch / value for value in (median, max(spent), min(spent))]
            cells = "".join(f"{rate:10.2f}" for rate in rates)
            mfu = rates[0] * flops / peak if peak else 0
            print(f"{size:12}{name:12}{cells}{median / ours:9.2f}x{mfu:4.0%}", flush=True)
        steps = step = None  # the next size wants their memory
        gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
