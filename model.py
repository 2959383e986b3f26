"""The Vision Transformer family, the masked autoencoder, and all that is done with their weights.

    ViT               plain encoder: patches, a class token, pre-norm blocks, a final norm
    MAE               the same encoder plus a small decoder that predicts the hidden patches
    Classifier        the same encoder plus a linear head; tag_loss for hashtags
    VideoClassifier   the same for clips: tubelets, positions in time, relative positions
    TwoTowers         the same encoder beside XLM-R's for texts; contrastive loss for their pairs
    initialize        every parameter from a generator keyed by its own name
    flops_per_image   forward FLOPs, counted from the architecture
    parameter_groups  who is decayed, who is not
    parallelize       cast -> activation checkpointing -> compile -> shard or replicate
    read_weights, load_weights, save_weights          model.pt and public checkpoints
    python model.py convert IN OUT --format ...       the same for timm, Hugging Face and back
    save_checkpoint, load_checkpoint                  a training run that can stop anywhere

Tensors: B batch, C channels, H W image, P patch side, N patches, K visible patches, D width,
L layers. Parameter names are timm's and the public MAE's (facebookresearch/mae), so that their
weights load by name.

This file needs torch and kernels.py, and stands alone with it when copied.
"""

import argparse
import contextlib
import copy
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shutil
import sys
import tempfile
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import kernels

# name: (width, layers, heads, patch side). B and up: appendix table 8 of the paper and the maws
# repository; T and S: DeiT (arXiv 2012.12877). toy is ours, for laptops and tests.
SIZES = {
    "toy": (192, 3, 6, 8),
    "T": (192, 12, 3, 16),
    "S": (384, 12, 6, 16),
    "B": (768, 12, 12, 16),
    "L": (1024, 24, 16, 16),
    "H": (1280, 32, 16, 14),
    "2B": (2560, 24, 32, 14),
    "6.5B": (4096, 32, 32, 14),
}
# (width, layers, heads) of the MAE decoder. 512 x 8 x 16 is the public MAE code's for B, L and H;
# that 2B and 6.5B keep it is recalled, not printed in the paper's main text.
DECODERS = {"toy": (64, 1, 4), "T": (256, 4, 8)}
DEFAULT_DECODER = (512, 8, 16)
# (width, layers, heads) of text towers: XLM-R's Base and Large (arXiv 1911.02116); toy is ours.
TEXT_SIZES = {"toy": (128, 3, 4), "XLMR-B": (768, 12, 12), "XLMR-L": (1024, 24, 16)}
# image size: (text size, width of the space that both are projected to), as released (maws
# repository); others get L's.
PAIRS = {"toy": ("toy", 128), "B": ("XLMR-B", 768), "L": ("XLMR-L", 1024)}
PAIRS |= {"H": ("XLMR-L", 1024), "2B": ("XLMR-L", 2048)}
PADDING = 1  # the token that fills up a text (fairseq's, and so XLM-R's)


class Unusable(argparse.ArgumentTypeError, ValueError):
    """A ValueError whose message argparse shows as it is."""


def architecture(size):
    """(width, layers, heads, patch side) of a name in SIZES, or of "192x6x3" (patch 16)."""
    if size in SIZES:
        return SIZES[size]
    width, layers, heads = triple(size, f"one of {', '.join(SIZES)}, or WIDTHxLAYERSxHEADS")
    return width, layers, heads, 16


def triple(text, wanted="WIDTHxLAYERSxHEADS"):
    """ "192x6x3" -> (192, 6, 3). Raises Unusable with `wanted` in its message."""
    try:
        width, layers, heads = (int(number) for number in text.split("x"))
    except ValueError:
        raise Unusable(f"size {text!r} is unknown: it must be {wanted}") from None
    if min(width, layers, heads) < 1 or width % (4 * heads):
        raise Unusable(f"size {text!r}: the width must be a multiple of 4 x heads")
    if width > 2**16 or layers > 999:  # a typing error, or a damaged config: it would take for ever
        raise Unusable(f"size {text!r}: at most {2**16} wide and 999 layers deep")
    return width, layers, heads


def pair(image_size):
    """(height, width) of 224, "224", "160x224" or (160, 224)."""
    sides = str(image_size).split("x") if isinstance(image_size, int | str) else image_size
    try:
        height, width = map(int, sides if len(sides) == 2 else (*sides, *sides))
    except (ValueError, TypeError):
        raise Unusable(f"image size {image_size!r} is neither a side nor HEIGHTxWIDTH") from None
    if not 0 < min(height, width) <= max(height, width) <= 2**16:
        raise Unusable(f"image size {image_size!r}: sides are from 1 to {2**16} pixels")
    return height, width


# ---------------------------------------------------------------------------- patches and positions


def patchify(images, patch_size):
    """(B, C, H, W) -> (B, N, P*P*C): row by row, each patch flattened as (P, P, C), MAE's order."""
    B, C, H, W = images.shape
    P = patch_size
    patches = images.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(B, (H // P) * (W // P), P * P * C)


def unpatchify(patches, patch_size, grid):
    """The inverse of patchify: (B, N, P*P*C) -> (B, C, H, W), with grid = (H // P, W // P)."""
    B, P, (rows, columns) = patches.shape[0], patch_size, grid
    patches = patches.reshape(B, rows, columns, P, P, -1).permute(0, 5, 1, 3, 2, 4)
    return patches.reshape(B, -1, rows * P, columns * P)


def take(tokens, ids):
    """tokens (B, N, D), ids (B, K) integers below N -> (B, K, D)."""
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


def sincos_positions(width, grid):
    """Fixed 2-D sine-cosine table, (1, 1 + rows * columns, width) float32; the class row is 0.

    The first half of the channels encodes the column and the second the row, each as sines then
    cosines of wavelengths from 2 pi to 20,000 pi (public MAE code, util/pos_embed.py).
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64)[:, None] * frequencies for n in grid)
    rows, columns = (torch.cat([angle.sin(), angle.cos()], dim=1) for angle in (rows, columns))
    table = torch.cat(
        [columns.expand(grid[0], -1, -1), rows[:, None].expand(-1, grid[1], -1)], dim=2
    )  # (rows, columns, width)
    return F.pad(table.flatten(0, 1), (0, 0, 1, 0)).float()[None]


def resample_positions(table, old_grid, new_grid):
    """(1, 1 + N, D) from one (rows, columns) grid to another, bicubically; the class row stays."""
    row, table = table[:, :1], table[:, 1:]
    table = table.transpose(1, 2).unflatten(2, old_grid)  # (1, D, rows, columns)
    table = F.interpolate(table.float(), size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([row, table.flatten(2).transpose(1, 2).to(row.dtype)], dim=1)


# -------------------------------------------------------------------------------------- the encoder


class Attention(nn.Module):
    """Multi-head self-attention. Tokens before `first_query` are looked at but do not ask."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, first_query=0):
        x = kernels.attention(self.qkv(x), self.heads, first_query)  # (B, N - first_query, D)
        return self.proj(x)


class RelativeAttention(Attention):
    """Attention with MViT's decomposed relative positions (arXiv 2112.01526, equation 5).

    grid: the tokens after the first one are the cells of (time, rows, columns), in this order. A
    query q meets a key with q . (R_t + R_h + R_w) added to their score: a row of each table, for
    how far apart they are along that axis. As in MViT's code, q is not scaled there by sqrt(d), and
    the tables begin as zeros. The class token has no place, and so no relative position.
    """

    def __init__(self, width, heads, grid):
        super().__init__(width, heads)
        self.grid = grid
        for axis, length in zip("thw", grid):
            table = nn.Parameter(torch.zeros(2 * length - 1, width // heads))
            self.register_parameter(f"rel_pos_{axis}", table)

    def forward(self, x, first_query=0):
        q, k, v = kernels.split_heads(self.qkv(x), self.heads)  # (B, heads, 1 + N, d)
        bias = F.pad(self.bias(q[:, :, 1:]), (1, 0, 1, 0))[:, :, first_query:]
        # The mask is one of numbers, with a gradient: PyTorch alone can do that, see kernels.py.
        x = F.scaled_dot_product_attention(q[:, :, first_query:], k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).flatten(2))

    def bias(self, q):
        """q (B, heads, N, d) -> (B, heads, N, N). An axis first, for all keys along it: so nothing
        of the size (N, N, d) is made."""
        q, bias = q.unflatten(2, self.grid), 0  # (B, heads, T, H, W, d)
        for axis, length in enumerate(self.grid):
            letter, steps = "thw"[axis], torch.arange(length, device=q.device)
            table = getattr(self, f"rel_pos_{letter}")
            table = table[steps[:, None] - steps + length - 1]  # (query, key, d), along this axis
            scores = torch.einsum(f"bnthwd,{letter}kd->bnthwk", q, table)
            shape = [length if other == axis else 1 for other in range(3)]
            bias = bias + scores.unflatten(5, shape)  # (B, heads, T, H, W, T, H, W)
        return bias.flatten(5).flatten(2, 4)


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block. With `first_query` it returns only the tokens from there on."""

    def __init__(self, width, heads, norm_eps=1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, norm_eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, norm_eps)
        self.mlp = Mlp(width)

    def forward(self, x, first_query=0, scales=None):
        """x (B, N, D) -> (B, N - first_query, D). scales (B, 2): see branch_scales; None: all 1."""
        branch = self.attn(self.norm1(x), first_query)
        x = x[:, first_query:] + (branch if scales is None else branch * scales[:, :1, None])
        branch = self.mlp(self.norm2(x))
        return x + (branch if scales is None else branch * scales[:, 1:, None])


def branch_scales(noise, drop_path, dtype):
    """Stochastic depth (arXiv 1603.09382): noise (B, L, 2) -> what each branch is multiplied by.

    The rate of block i is drop_path * i / (L - 1). noise is uniform in [0, 1): where it is below
    the rate the branch is dropped, by a 0; the others are scaled up to match, by 1 / (1 - rate).
    """
    layers = noise.shape[1]
    # Made on the device: a tensor of Python numbers would be a copy from the host at each step.
    rates = torch.arange(layers, dtype=noise.dtype, device=noise.device)  # (L,)
    rates = rates * (drop_path / max(1, layers - 1))
    return ((noise >= rates[:, None]) / (1 - rates[:, None])).to(dtype)


class ViT(nn.Module):
    """Vision Transformer encoder.

    size        a name in SIZES or "WIDTHxLAYERSxHEADS"
    image_size  side, or (height, width); the patch must divide both
    patch_size  default: the size's own
    channels    of the image: 1, 3, 4, 10, ...
    positions   "sincos" (fixed, MAE's) or "learned"
    drop_path   stochastic-depth rate of the last block, rising linearly from 0
    norm_eps    of every LayerNorm: 1e-6 is timm's and the public MAE's

    Raises ValueError when the patch does not divide the image.
    """

    def __init__(
        self,
        size="B",
        image_size=224,
        patch_size=None,
        channels=3,
        positions="sincos",
        drop_path=0.0,
        norm_eps=1e-6,
    ):
        super().__init__()
        width, layers, heads, default_patch = architecture(size)
        P, (H, W) = patch_size or default_patch, pair(image_size)
        if H < P or W < P or H % P or W % P:
            near = tuple(max(P, round(side / P) * P) for side in (H, W))
            raise ValueError(
                f"image size {H}x{W} is not divisible by patch {P}: "
                f"the nearest that is: {near[0]}x{near[1]}"
            )
        if positions not in ("sincos", "learned"):
            raise ValueError(f"positions {positions!r} are unknown: 'sincos' or 'learned'")
        self.config = {"size": size, "image_size": [H, W], "patch_size": P}
        self.config |= {"channels": channels, "positions": positions, "norm_eps": norm_eps}
        self.width, self.layers, self.heads, self.patch_size = width, layers, heads, P
        self.grid = (H // P, W // P)
        self.num_patches = N = self.grid[0] * self.grid[1]
        self.input_shape = (channels, H, W)

        # A convolution only in name: the name and the kernel's shape are timm's, see embed().
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, width, P, stride=P)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + N, width), positions == "learned")
        self.drop_path = drop_path
        self.blocks = nn.ModuleList(Block(width, heads, norm_eps) for _ in range(layers))
        self.norm = nn.LayerNorm(width, norm_eps)
        if type(self) is ViT:
            initialize(self)

    def check(self, images):
        if tuple(images.shape[1:]) != self.input_shape:
            wanted = ", ".join(map(str, self.input_shape))
            raise ValueError(
                f"images have shape {tuple(images.shape)}, the model wants (B, {wanted}): "
                "build it with that image_size and channels"
            )

    def embed(self, patches):
        """(B, N, P*P*C) pixels, flattened as patchify does, -> (B, N, D)."""
        proj = self.patch_embed["proj"]
        # patchify flattens a patch as (P, P, C) but the kernel is stored as (C, P, P).
        weight = proj.weight.movedim(1, -1).flatten(1)  # (D, P*P*C)
        return F.linear(patches.to(weight.dtype), weight, proj.bias)

    def tokens(self, images):
        """The encoder's input: (B, C, H, W) float -> (B, 1 + N, D), the class token first."""
        self.check(images)
        x = self.embed(patchify(images, self.patch_size)) + self.pos_embed[:, 1:]  # (B, N, D)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return torch.cat([first, x], dim=1)

    def forward(self, images, noise=None):
        """Tokens after the final norm, (B, 1 + N, D), the class token first: see pool().

        images (B, C, H, W) float, normalised. noise (B, L, 2) uniform in [0, 1): stochastic depth,
        drawn by the caller for each sample, so that it does not depend on how samples are batched.
        """
        return self.norm(self.encode(images, noise))

    def encode(self, images, noise=None):
        """forward without the final norm."""
        x = self.tokens(images)
        scales = [None] * self.layers
        if noise is not None and self.drop_path > 0:
            scales = branch_scales(noise, self.drop_path, x.dtype).unbind(dim=1)  # (B, 2) each
        for block, scale in zip(self.blocks, scales):
            x = block(x, scales=scale)
        return x

    def class_attention(self, images):
        """Where the last block's class token looks: (B, heads, N), each row sums to at most 1."""
        x = self.tokens(images)
        for block in self.blocks[:-1]:
            x = block(x)
        attn = self.blocks[-1].attn
        q, k, _ = kernels.split_heads(attn.qkv(self.blocks[-1].norm1(x)), attn.heads)
        scores = q[:, :, :1] @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        return scores.softmax(dim=-1)[:, :, 0, 1:]


def pool(tokens, how):
    """A ViT's (B, 1 + N, D) -> (B, D): "cls" is the class token, "mean" the mean of the patches."""
    return tokens[:, 0] if how == "cls" else tokens[:, 1:].mean(dim=1)


# --------------------------------------------------------------------------- the masked autoencoder


class MAE(ViT):
    """Masked autoencoder (He et al., arXiv 2111.06377) on the same encoder.

    decoder            (width, layers, heads); default: the size's own
    mask_ratio         share of the patches that is hidden
    normalize_targets  predict each patch minus its mean over its deviation (True) or raw pixels
    other arguments    see ViT
    """

    def __init__(
        self, size="B", decoder=None, mask_ratio=0.75, normalize_targets=True, **encoder_arguments
    ):
        super().__init__(size, **encoder_arguments)
        decoder = decoder or DECODERS.get(size, DEFAULT_DECODER)
        decoder = width, layers, heads = triple("x".join(map(str, decoder)))
        self.num_visible = int(self.num_patches * (1 - mask_ratio))  # 49 of 196, 64 of 256
        if not 0 < self.num_visible < self.num_patches:
            shares = (
                f"mask ratio {mask_ratio} leaves {self.num_visible} of {self.num_patches} patches"
            )
            raise ValueError(f"{shares} visible: at least one must be visible and one hidden")
        self.normalize_targets = normalize_targets
        self.config |= {"decoder": list(decoder), "mask_ratio": mask_ratio}
        self.config |= {"normalize_targets": normalize_targets}
        pixels = self.patch_size**2 * self.config["channels"]
        self.decoder_embed = nn.Linear(self.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, 1 + self.num_patches, width), False)
        norm_eps = self.config["norm_eps"]
        self.decoder_blocks = nn.ModuleList(Block(width, heads, norm_eps) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(width, norm_eps)
        self.decoder_pred = nn.Linear(width, pixels)
        initialize(self)

    def forward(self, images, ids):
        """Each sample's mean squared error on its hidden patches, (B,).

        images (B, C, H, W) float, normalised; ids (B, N) a permutation of the patches for each
        sample, of which the first K are visible.
        """
        self.check(images)
        patches = patchify(images, self.patch_size)  # (B, N, P*P*C)
        predictions = self.predict(patches, ids)  # (B, N - K, P*P*C)
        targets = take(patches, ids[:, self.num_visible :])
        if self.normalize_targets:
            mean, deviation = patch_statistics(targets)
            targets = (targets - mean) / deviation
        return (predictions.to(targets.dtype) - targets).square().mean(dim=(1, 2))

    def predict(self, patches, ids):
        """Predicted pixels of the hidden patches, (B, N - K, P*P*C), in the order of ids[:, K:]."""
        visible, hidden = ids[:, : self.num_visible], ids[:, self.num_visible :]
        # Embed only what the encoder will see.
        x = self.embed(take(patches, visible)) + self.pos_embed[0, 1 + visible]  # (B, K, D)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([first, x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))  # (B, 1 + K, decoder width)

        # The decoder never un-shuffles: attention does not care about the order, so tokens stay as
        # [class, visible, hidden] and carry their own positions.
        positions = self.decoder_pos_embed[0]
        seen = torch.cat([positions[:1].expand(len(x), 1, -1), positions[1 + visible]], dim=1)
        x = torch.cat([x + seen, self.mask_token + positions[1 + hidden]], dim=1)  # (B, 1 + N, ..)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        # Only hidden tokens are predicted, and nobody looks at the last block's output of another
        # token: in it, only they need to ask, to pass the feed-forward, to reach the pixel head.
        x = self.decoder_blocks[-1](x, 1 + self.num_visible)  # (B, N - K, decoder width)
        return self.decoder_pred(self.decoder_norm(x))

    @torch.no_grad()
    def reconstruct(self, images, ids):
        """The images with their hidden patches as predicted, (B, C, H, W), same scale as `images`.

        Visible patches are pasted. A normalised prediction is scaled back with the mean and
        deviation of the patch it stands for: the network was never asked for these two numbers.
        """
        self.check(images)
        patches = patchify(images, self.patch_size)
        predictions = self.predict(patches, ids).to(patches.dtype)
        if self.normalize_targets:
            mean, deviation = patch_statistics(take(patches, ids[:, self.num_visible :]))
            predictions = predictions * deviation + mean
        hidden = ids[:, self.num_visible :, None].expand(-1, -1, patches.shape[-1])
        return unpatchify(patches.scatter(1, hidden, predictions), self.patch_size, self.grid)


def patch_statistics(patches):
    """Mean and deviation of each patch over its pixels and channels together, (B, N, 1) each.

    The variance is the unbiased one plus 1e-6 (public MAE code).
    """
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


# ----------------------------------------------------------------------------------- the classifier


class Classifier(ViT):
    """An encoder and a linear head on pooled tokens.

    classes      how many
    pool         "cls": the class token after the final norm (the released models). "mean": the mean
                 of the patches, then a norm of its own instead (public MAE code, finetuning)
    class_names  kept in the config, to travel with the weights
    head_std     of the head's initial weights; 0 as SWAG's
    other arguments: see ViT
    """

    def __init__(
        self,
        size="B",
        classes=1000,
        pool="cls",
        class_names=None,
        head_std=0.0,
        **encoder_arguments,
    ):
        super().__init__(size, **encoder_arguments)
        if pool not in ("cls", "mean"):
            raise ValueError(f"pool {pool!r} is unknown: 'cls' or 'mean'")
        self.config |= {"classes": classes, "pool": pool, "class_names": class_names}
        self.classes, self.head_std = classes, head_std
        if pool == "mean":
            self.fc_norm, self.norm = self.norm, nn.Identity()
        self.head = nn.Linear(self.width, classes)
        initialize(self)

    def forward(self, images, noise=None):
        """(B, classes) logits of (B, C, H, W) normalised images. noise: see ViT."""
        return self.head(self.features(images, noise))

    def features(self, images, noise=None):
        """What the head reads, (B, D)."""
        return self.pooled(self.encode(images, noise))

    def pooled(self, x):
        """The last block's tokens (B, 1 + N, D) -> (B, D)."""
        if self.config["pool"] == "cls":
            return self.norm(x)[:, 0]
        return self.fc_norm(x[:, 1:].mean(dim=1))


class VideoClassifier(Classifier):
    """A Classifier of clips (B, C, T, H, W), whose tokens are tubelets of 2 x P x P pixels.

    frames              T, an even number
    relative_positions  RelativeAttention in every block (the paper's choice)
    other arguments: see Classifier

    Positions are separable: pos_embed says where, time_embed when. That and the relative ones begin
    as zeros, and a picture's kernel as half of it for each of two frames (see load_weights): so two
    equal frames have at first the features of the picture that they are.
    """

    def __init__(self, size="B", frames=16, relative_positions=True, **arguments):
        super().__init__(size, **arguments)
        if frames < 2 or frames % 2:
            raise ValueError(f"{frames} frames: want an even number, as two of them share a token")
        self.config |= {"frames": frames, "relative_positions": relative_positions}
        (channels, H, W), P, grid = self.input_shape, self.patch_size, (frames // 2, *self.grid)
        self.input_shape, self.num_patches = (channels, frames, H, W), math.prod(grid)
        self.patch_embed["proj"] = nn.Conv3d(channels, self.width, (2, P, P), stride=(2, P, P))
        self.time_embed = nn.Parameter(torch.empty(1, frames // 2, self.width))
        for block in self.blocks if relative_positions else ():
            block.attn = RelativeAttention(self.width, self.heads, grid)
        initialize(self)

    def tokens(self, clips):
        """(B, C, T, H, W) float -> (B, 1 + T/2 * N, D), the class token first."""
        self.check(clips)
        patches = patchify(clips.transpose(1, 2).flatten(0, 1), self.patch_size)  # (B*T, N, P*P*C)
        patches = patches.unflatten(0, (len(clips), -1, 2)).transpose(2, 3).flatten(3)
        x = self.embed(patches) + self.pos_embed[:, None, 1:]  # (B, T/2, N, D)
        x = (x + self.time_embed[:, :, None]).flatten(1, 2)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return torch.cat([first, x], dim=1)


def tag_loss(logits, tags):
    """Softmax cross-entropy against 1/K on each of a sample's K tags: (B,) float32.

    logits (B, V); tags (B, T) int64 ids, filled up with -1; a sample without any counts its
    logsumexp and wants weight 0. Computed from the ids: there is no (B, V) target (paper, 3.3).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    known = tags >= 0
    picked = logits.gather(1, tags.clamp(min=0)) * known  # (B, T)
    return logits.logsumexp(dim=1) - picked.sum(dim=1) / known.sum(dim=1).clamp(min=1)


# ------------------------------------------------------------------------------- pictures and texts


class TextBlock(Block):
    """Post-norm transformer block, as XLM-R's: the sums are normalised, not what goes in."""

    def forward(self, x, mask, queries=None):
        """x (B, T, D); mask (B, 1, 1, T), True where there is a token -> the first `queries`."""
        q, k, v = kernels.split_heads(self.attn.qkv(x), self.attn.heads)
        branch = F.scaled_dot_product_attention(q[:, :, :queries], k, v, attn_mask=mask)
        x = self.norm1(x[:, :queries] + self.attn.proj(branch.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.mlp(x))


class TextTower(nn.Module):
    """XLM-R's encoder (RoBERTa's): learned positions, post-norm blocks, the first token's state.

    size        a name in TEXT_SIZES or "WIDTHxLAYERSxHEADS"
    vocabulary  number of token ids
    positions   rows of the position table: two more than the longest text has tokens
    norm_eps    of every LayerNorm (fairseq's)
    """

    def __init__(self, size, vocabulary, positions=514, norm_eps=1e-5):
        super().__init__()
        width, layers, heads = TEXT_SIZES.get(size) or triple(size, f"one of {[*TEXT_SIZES]}")
        self.width = width
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(positions, width)
        self.embedding_norm = nn.LayerNorm(width, norm_eps)
        self.blocks = nn.ModuleList(TextBlock(width, heads, norm_eps) for _ in range(layers))

    def forward(self, tokens):
        """tokens (B, T) int64, filled up with PADDING -> (B, D)."""
        mask = tokens != PADDING
        # Positions are counted from the padding's id on; padding has that itself (fairseq).
        positions = mask.cumsum(dim=1) * mask + PADDING
        x = self.token_embedding(tokens) + self.position_embedding(positions)  # (B, T, D)
        x, mask = self.embedding_norm(x), mask[:, None, None]
        for block in self.blocks[:-1]:
            x = block(x, mask)
        return self.blocks[-1](x, mask, 1)[:, 0]  # nobody looks at the other tokens' last state


class TwoTowers(ViT):
    """An encoder of pictures beside one of texts, both projected into one space (CLIP, LiT).

    text          arguments of the TextTower; also "context", how many tokens a text may have
                  beside its begin and end, and "tokenizer", which one it was trained with
    shared_width  of that space (paper's repository: PAIRS)
    pool          of the picture's tokens: "cls" as released, or "mean"
    other arguments: see ViT
    """

    def __init__(self, size="B", text=None, shared_width=768, pool="cls", **encoder_arguments):
        super().__init__(size, **encoder_arguments)
        text = {"size": "XLMR-B", "vocabulary": 250_002, "context": 100, **(text or {})}
        self.config |= {"text": text, "shared_width": shared_width, "pool": pool}
        built_from = ("size", "vocabulary", "positions", "norm_eps")
        self.text = TextTower(**{name: text[name] for name in built_from if name in text})
        self.image_projection = nn.Parameter(torch.empty(self.width, shared_width))
        self.text_projection = nn.Parameter(torch.empty(self.text.width, shared_width))
        self.logit_scale = nn.Parameter(torch.empty(1))  # the logarithm of what multiplies cosines
        initialize(self)

    def features(self, images):
        """(B, C, H, W) normalised -> (B, D), the picture's part that LiT keeps as it is."""
        return pool(super().forward(images), self.config["pool"])

    def forward(self, features=None, tokens=None):
        """Embeddings of unit length and the scale of the logits: (B, shared_width) of features
        (B, D), the same of texts, (B, T) int64 tokens, and (1,): fp32. What is not given is None.
        """
        if features is not None:  # cached ones are fp32 wherever the weights compute in bf16
            features = features.to(self.image_projection.dtype) @ self.image_projection
            features = F.normalize(features.float(), dim=1)
        if tokens is not None:
            tokens = F.normalize((self.text(tokens) @ self.text_projection).float(), dim=1)
        return features, tokens, self.logit_scale.float().exp()


class Contrastive(torch.autograd.Function):
    """See contrastive_loss. The gradient comes with the loss, some rows of logits at a time."""

    ROWS = 512  # of logits that are in memory together

    @staticmethod
    def forward(ctx, images, texts, scale, weight):
        rank, b, tables = 0, len(images), (images, texts, weight)
        if dist.is_initialized():
            rank, processes = dist.get_rank(), dist.get_world_size()
            tables = [t.new_empty(processes * b, *t.shape[1:]) for t in (images, texts, weight)]
            for table, part in zip(tables, (images, texts, weight)):
                dist.all_gather_into_tensor(table, part.contiguous())
        kept = tables[2] > 0  # of the global batch: the others neither ask nor are an answer
        images, texts = tables[0][kept], tables[1][kept]  # (n, S) each
        n, first, own = len(images), int(kept[: rank * b].sum()), weight > 0
        parts = torch.arange(first, first + int(own.sum()), device=kept.device).split(
            Contrastive.ROWS
        )

        # Twice over this process's rows of the matrix: the first time for the sums of both
        # softmaxes, along the rows and, with all processes, along the columns.
        rows, columns = [], images.new_full((n,), -math.inf)
        for part in parts:
            logits = scale * images[part] @ texts.T  # (ROWS, n)
            rows.append(logits.logsumexp(dim=1))
            columns = torch.logaddexp(columns, logits.logsumexp(dim=0))
        if dist.is_initialized():
            every = columns.new_empty(processes * n)
            dist.all_gather_into_tensor(every, columns)
            columns = every.view(processes, n).logsumexp(dim=0)
        sums, for_images, for_texts = images.new_zeros(2), [], torch.zeros_like(texts)
        for part, row in zip(parts, rows):
            cosines = images[part] @ texts.T
            logits, pairs = scale * cosines, (torch.arange(len(part), device=part.device), part)
            gradient = (logits - row[:, None]).exp() + (logits - columns).exp()  # of the logits
            gradient[pairs] -= 2
            losses = row + columns[part] - 2 * logits[pairs]
            sums += torch.stack([losses.sum(), (gradient * cosines).sum()])
            for_images.append(scale * gradient @ texts)
            for_texts.addmm_(gradient.T, images[part])
        loss = sums[:1].clone()
        if dist.is_initialized():
            dist.all_reduce(loss)
            dist.all_reduce(for_texts)
        gradients = tables[0].new_zeros(2, b, texts.shape[1])
        if for_images:
            gradients[0, own] = torch.cat(for_images)
            gradients[1, own] = scale * for_texts[first : first + int(own.sum())]
        ctx.save_for_backward(gradients / (2 * max(n, 1)), sums[1:] / (2 * max(n, 1)))
        return loss[0] / (2 * max(n, 1))

    @staticmethod
    def backward(ctx, grad):
        (for_images, for_texts), for_scale = ctx.saved_tensors
        return grad * for_images, grad * for_texts, grad * for_scale, None


def contrastive_loss(images, texts, scale, weight):
    """How well each picture finds its text and each text its picture among all of the global batch.

    images, texts (b, S) of unit length, this process's pairs, the same number on each; scale (1,)
    multiplies their cosines; weight (b,): pairs of weight 0 do not exist. The mean of two softmax
    cross-entropies over all processes' pairs (CLIP, arXiv 2103.00020), the same on each. Gradients
    are exact: of this process's embeddings, and of scale its part, to be summed over processes.
    """
    dtype = torch.promote_types(images.dtype, torch.float32)
    return Contrastive.apply(images.to(dtype), texts.to(dtype), scale.to(dtype), weight)


# ----------------------------------------------------------------------------------- initialisation


def initialize(model, seed=0):
    """Fill every parameter, each from a generator keyed by (seed, its name).

    So a weight depends neither on the order of modules nor on the number of processes. The values
    are the public MAE code's (but for the patch embedding's bias, which it leaves at PyTorch's
    default): Linear and the patch embedding, as a Linear, Xavier-uniform with bias 0, tokens and
    learned positions N(0, 0.02), norms 1 and 0, fixed positions sine-cosine. Heads: see Classifier.
    Projections N(0, 1 / width), the logits' scale 1 / 0.07 (maws repository), embeddings as tokens;
    positions in time and relative ones 0.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        fill(parameter, initial_value(model, name, parameter, generator))


@torch.no_grad()
def fill(parameter, value):
    """Copy a whole tensor into a parameter or, if that is sharded, this process's part of it."""
    if hasattr(parameter, "device_mesh"):
        layout = parameter.device_mesh, parameter.placements
        # Nothing is sent (None): every process has the whole value, one parameter at a time.
        value = torch.distributed.tensor.distribute_tensor(value, *layout, src_data_rank=None)
    parameter.copy_(value)


def initial_value(model, name, parameter, generator):
    """The CPU tensor that `initialize` gives to the parameter of this name."""
    shape = parameter.shape
    if name in getattr(model, "init_std", ()):  # a detector's heads
        return torch.randn(shape, generator=generator) * model.init_std[name]
    if name.endswith("pos_embed") and not parameter.requires_grad:
        return sincos_positions(shape[-1], model.grid)
    if name.endswith("time_embed") or ".rel_pos_" in name:
        return torch.zeros(shape)
    if name.endswith(("pos_embed", "_token", "embedding.weight")):
        return torch.randn(shape, generator=generator) * 0.02
    if name.endswith("_projection"):
        return torch.randn(shape, generator=generator) * shape[0] ** -0.5
    if name == "logit_scale":
        return torch.full(shape, math.log(1 / 0.07))
    if parameter.ndim == 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
    if name == "head.weight":
        return torch.randn(shape, generator=generator) * model.head_std
    bound = math.sqrt(6 / (shape[0] + shape[1:].numel()))  # Xavier: fan-in plus fan-out
    return torch.rand(shape, generator=generator) * (2 * bound) - bound


# ------------------------------------------------------------------------ counting and optimisation

# Dense bf16 peaks in FLOP/s, from the makers' data sheets; the name is looked for in the device's.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device):
    """(peak FLOP/s in dense bf16 or None, the chip's name) of a torch.device."""
    if device.type != "cuda":
        return None, f"{device.type} (of unknown peak: mfu is shown as 0)"
    name = torch.cuda.get_device_name(device)
    for chip, flops in PEAK_FLOPS.items():
        if chip in name:
            return flops, name
    return None, f"{name} (of unknown peak: mfu is shown as 0)"


def block_flops(width, tokens, queries=None):
    """Forward FLOPs of one block on one image (a multiply-add is two); `queries` tokens ask."""
    queries = tokens if queries is None else queries
    qkv, attention = 6 * width**2 * tokens, 4 * width * tokens * queries
    return qkv + attention + 18 * width**2 * queries  # 18 = projection 2 + feed-forward 2 x 8


def flops_per_image(model):
    """Forward FLOPs of any of the models on one image. A training step is three times that."""
    D, N = model.width, model.num_patches
    pixels = model.patch_embed["proj"].weight[0].numel()  # of a token
    if not isinstance(model, MAE):
        head = 2 * D * getattr(model, "classes", 0)
        return 2 * pixels * D * N + model.layers * block_flops(D, 1 + N) + head
    K, (width, layers, _) = model.num_visible, model.config["decoder"]
    encoder = 2 * pixels * D * K + model.layers * block_flops(D, 1 + K)
    decoder = 2 * D * width * (1 + K) + (layers - 1) * block_flops(width, 1 + N)
    last = block_flops(width, 1 + N, N - K) + 2 * width * pixels * (N - K)
    return encoder + decoder + last


def training_memory(model, run, micro_batch, recompute):
    """{item: bytes} of a training step on each process, as --plan shows them; and their "peak".

    run: a stage's settled arguments. tests/bench/plan.py holds this against measured peaks, on CPUs
    in fp32; what is said of bf16 and of GPUs is derived, and not measured yet. It does not count
    gradients that a compiled model returns all at once beside those of earlier micro-batches, nor
    those that --cuda-graph keeps: up to 4 bytes a weight.
    """
    shared, replicas = run.shard_group is not None, run.shard_group is None and run.processes > 1
    element = 2 if run.precision == "bf16" else 4  # of what is computed
    one, group = element * micro_batch, run.shard_group or 1
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    blocks = [m for m in model.modules() if isinstance(m, Block) and not isinstance(m, TextBlock)]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    # Before they are shared out, the gradients of all pieces are added up whole, in fp32. Replicas
    # always have buckets for all of theirs; what several pieces add up is beside them.
    pieces = micro_batch * run.processes < run.batch_size
    accumulated = pieces or replicas
    each = 8 if pieces and replicas else 4 if accumulated else 4 / group
    gradients = coming = each * trained

    D, N = model.width, model.num_patches
    pixels = model.patch_embed["proj"].weight[0].numel()  # of a token
    K, decoder, kept = N, [], 0
    if isinstance(model, MAE):
        K, (width, layers, _) = model.num_visible, model.config["decoder"]
        decoder = [(width, 1 + N, 1 + N)] * (layers - 1) + [(width, 1 + N, N - K)]
        kept = 2 * D * (1 + K) * one  # the last norm's input and output
    kept, extra, backward = kept + pixels * K * one, 0, 0  # the patches that are embedded
    for (width, tokens, queries), size in zip([(D, 1 + K, 1 + K)] * model.layers + decoder, sizes):
        # For its backward a block keeps its input, the first norm's output, q, k and v; of those
        # who ask, attention's output, the second norm's input and output, and 4 on each side of
        # GELU. Its backward is largest at GELU: + 4 and 4 for two gradients, - 4 for the output,
        # which is done with, + 1 for the gradient that goes round.
        block = width * (5 * tokens + 11 * queries) * one
        # With relative positions the softmax is there whole, or else its bias (derived).
        square = tokens**2 * model.heads * one * bool(model.config.get("relative_positions"))
        block += square
        stays = width * tokens * one if recompute else block
        # FSDP2 holds the later block's gradients, whole and in fp32, until all have their share.
        within = block - stays + 5 * width * queries * one + (4 * size if shared else 0)
        within += 2 * square  # its gradient, and a sum
        coming -= 0 if accumulated else each * size  # those of later blocks are there by now
        kept, extra = kept + stays, max(extra, within)
        backward = max(backward, kept + within + coming)
    kept += 2 * width * queries * one  # the last norm again
    if decoder:  # in fp32: all patches; of the hidden: targets, predictions, differences, squares
        loss = 4 * pixels * (N + 4 * (N - K)) * micro_batch
    else:  # in fp32: logits, the softmax, its gradient and a temporary; bf16: logits in it, too
        loss = getattr(model, "classes", 0) * (16 if element == 4 else 18) * micro_batch
    images = pixels * N * micro_batch
    items = {"weights (fp32)": 4 * count / group, "Adam's two moments (fp32)": 8 * trained / group}
    # While a block computes, the next one comes, or the head; the others (the root) stay. What is
    # not sharded is cast to bf16, and these copies are kept for backward, but of recomputed blocks.
    head = sum(p.numel() for p in model.head.parameters()) if hasattr(model, "head") else 0
    gathered = count - sum(sizes) - head + max(sizes) + max(*sizes, head)
    if not shared:
        gathered = 0 if element == 4 else count - (sum(sizes) - max(sizes) if recompute else 0)
    items["weights, gathered or cast"] = gathered * element
    forward = kept + loss + 5 * images + (gradients if accumulated else 4 * head * shared)
    peak = sum(items.values()) + max(gradients, forward, backward + images)
    items |= {"gradients (fp32)": gradients, "activations for backward": kept}
    items |= {"one block's backward": extra, "logits or pixels, loss": loss}
    return items | {"pictures (uint8, fp32)": 5 * images, "peak": peak}  # fp32: in forward only


def device_memory(run):
    """Bytes of a process's GPU, or of one to plan for; None on a CPU without --memory."""
    if run.memory:
        return run.memory * 2**30
    if run.device.type == "cuda":
        return torch.cuda.get_device_properties(run.device).total_memory
    return 80 * 2**30 if run.gpus else None


def memory_budget(model, run):
    """Bytes a step may use: 80 % of a GPU's memory; on a CPU, 4 GB beyond weights and optimizer."""
    if (memory := device_memory(run)) is None:
        return 4e9 + training_memory(model, run, 0, False)["peak"]
    return 0.8 * memory  # the rest for NCCL, cuBLAS and the allocator's holes: a guess


def settle_sharding(model, run):
    """The processes that share one copy of a model's weights, or None: every process has all.

    --shard-group decides if it is given; 1 is None. Else a model that fits is replicated, with its
    gradients, its optimizer and the smallest micro-batch; one that does not fit is split over all
    processes.
    """
    if run.shard_group:
        return run.shard_group if run.shard_group > 1 else None
    fits = replica_memory(model, run) <= 0.8 * (device_memory(run) or host_memory())
    return None if run.processes == 1 or fits else run.processes


def replica_memory(model, run):
    """Bytes that a process needs at least if it has all of a model's weights."""
    alone = copy.copy(run)
    alone.shard_group = None
    return training_memory(model, alone, run.micro_batch or 2, run.checkpoint_activations)["peak"]


def check_shard_group(run):
    """Raise ValueError when --shard-group does not divide the processes."""
    if run.processes % (run.shard_group or 1):
        hint = "give a divisor, such as the processes of a node"
        if run.processes == 1:
            hint = "start more of them, with torchrun"
        raise ValueError(
            f"--shard-group {run.shard_group} does not divide the {run.processes} processes: {hint}"
        )


def host_memory():
    """Bytes of RAM for each process of this machine."""
    if not hasattr(os, "sysconf"):  # on Windows
        return math.inf
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def describe_sharding(model, run):
    """One line on how a settled run is spread over its processes, with the memory of each."""
    each = training_memory(model, run, run.micro_batch, run.checkpoint_activations)["peak"]
    memory, copies = device_memory(run), run.processes // (run.shard_group or 1)
    size = as_size(each) + (f" of {as_size(memory)}" if memory else "")
    size += ": more than there is" if memory and each > memory else ""
    if run.processes == 1:
        return f"one process ({size})"
    if run.shard_group is None:
        return f"{run.processes} replicas (each {size})"
    line = f"sharded over {run.shard_group} processes (each {size}; "
    line += f"a replica takes at least {as_size(replica_memory(model, run))})"
    line = f"{copies} copies, each {line}" if copies > 1 else line
    if torch.__version__ < "2.12":
        line += "; this torch leaks memory in each step of sharded AdamW: 2.12 does not"
    return line


def as_size(count):
    """ "1.5 GiB" or "0.3 MiB" of a number of bytes."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def fitting_batch(model, images, run, recompute=None):
    """The largest divisor of `images`, even if these are, that should fit: see memory_budget."""
    recompute = run.checkpoint_activations if recompute is None else recompute
    least, budget = 2 - images % 2, memory_budget(model, run)
    for n in range(images, least, -least):
        if images % n == 0 and training_memory(model, run, n, recompute)["peak"] <= budget:
            return n
    return least


def peak_memory(device):
    """GiB used at most so far: the allocator's on CUDA, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return 0.0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def planned_batch(batch_size, run):
    """A recipe's batch size or, of a plan, the nearest that its processes can share; that is said.

    run: a stage's arguments, of which --batch-size is not given.
    """
    unit = run.processes * math.lcm(2, run.micro_batch or 2)  # samples are dealt in pairs
    nearest = unit * max(1, round(batch_size / unit))
    if not run.plan or nearest == batch_size:
        return batch_size
    if run.process == 0:
        shares = f"to {run.processes} processes"
        shares += f" in micro-batches of {run.micro_batch}" if run.micro_batch else ""
        why = f"the recipe's {batch_size:,} cannot be dealt {shares}"
        print(f"batch size   {nearest:,}, which the run wants as --batch-size: {why}")
    return nearest


def print_plan(model, run):
    """What a training run takes, from shapes alone. run: a stage's settled arguments."""
    parts, root = dict.fromkeys(("encoder", "decoder", "head"), 0), 0
    for name, parameter in model.named_parameters():
        part = "decoder" if name.startswith(("decoder", "mask")) else name.split(".")[0]
        parts[part if part in parts else "encoder"] += parameter.numel()
        root += 0 if "blocks." in name or part == "head" else parameter.numel()
    count, flops = sum(parts.values()), 3 * flops_per_image(model)
    parts = ", ".join(f"{name} {some / 1e6:,.1f} M" for name, some in parts.items() if some)
    samples, processes, group = run.steps * run.batch_size, run.processes, run.shard_group or 1
    print(f"parameters   {count / 1e6:,.1f} M: {parts}")
    print(f"compute      {flops / 1e9:,.2f} GFLOP for an image of a training step")
    print(f"steps        {run.steps:,} of {run.batch_size:,} images: {samples:,} samples")
    lanes = f"; with --lanes {math.lcm(48, processes)}" if 48 % processes and not run.lanes else ""
    pieces = f"{run.pieces} micro-batches of {run.micro_batch} images"
    print(f"batch        {processes} processes x {pieces}{lanes}")
    print(f"parallel     {describe_sharding(model, run)}")

    print(f"memory       GiB of each process ({run.precision}); not all is there at the peak")
    print(f"{'':32}   without      with --checkpoint-activations")
    plans = [training_memory(model, run, run.micro_batch, recompute) for recompute in (0, 1)]
    for item in plans[0]:
        print(f"  {item:30}" + "".join(f"{plan[item] / 2**30:10.2f}" for plan in plans))
    budget, row = memory_budget(model, run), ""
    for recompute in (0, 1):
        n = fitting_batch(model, run.batch_size // processes, run, recompute)
        fits = training_memory(model, run, n, recompute)["peak"] <= budget
        row += f"{n if fits else 'none':>10}"
    print(f"  {f'largest micro-batch, {budget / 2**30:.1f} GiB':30}{row}")

    # FSDP2 gathers blocks and head for their forward and again for their backward, the rest (the
    # root) once; for each piece of a batch. Gradients are reduced once a step, in fp32.
    others, copies = (group - 1) / group / 2**30, processes // group
    gather = (2 * count - root) * (2 if run.precision == "bf16" else 4) * run.pieces * others
    scatter, between = 4 * count * others, 8 * count / group * (1 - 1 / copies) / 2**30
    print("network      GiB that a process sends, and receives, in a step:")
    shares = f"{gather:.2f} weights and {scatter:.2f} gradients in its group of {group}"
    print(f"             {shares if group > 1 else 'no weights: it has all of them'}")
    if copies > 1:
        print(f"             {between:.2f} gradients between the {copies} copies of the model")
    hours = samples * flops / (run.mfu * PEAK_FLOPS["H100"]) / 3600
    days = f"({hours / 24:,.2f} GPU-days), {hours / 24 / processes:,.2f} days on {processes}"
    print(f"GPU-hours    {hours:,.1f} {days},")
    print(f"             of H100s at {run.mfu:.0%} of their peak: an assumption, --mfu")


def parameter_groups(model, weight_decay):
    """For an optimizer: matrices and tokens are decayed, 1-D parameters are not (as timm)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def not_finite(model, step, batch_size, loss, norm, lr):
    """What to say of a step (from 0) whose loss or gradient is not finite. All must call it."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    names = [name for name, grad in gradients.items() if not whole(grad).isfinite().all()]
    what = f"step {step + 1}: loss {loss}, gradient norm {norm}, lr {lr:.2e}; it was not saved. "
    what += f"Positions {step * batch_size} to {(step + 1) * batch_size - 1}. "
    return f"{what}Gradients not finite: {' '.join(names) or 'none'}"


def choose_attention(model, batch, device, precision):
    """Settle which kernels compute a model's attention in training; what to print: see kernels."""
    if model.config.get("relative_positions"):
        return "PyTorch (relative positions are a bias: the kernels take none)"
    N, heads = model.num_patches, model.heads
    shapes = [(1 + N, 0, heads, model.width // heads)]
    if isinstance(model, MAE):
        K, (width, _, decoder_heads) = model.num_visible, model.config["decoder"]
        decoder = decoder_heads, width // decoder_heads
        shapes = [(1 + K, 0, *shapes[0][2:]), (1 + N, 0, *decoder), (1 + N, 1 + K, *decoder)]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return kernels.choose(shapes, batch, device, dtype)


def parallelize(
    model,
    device,
    shard_group=None,
    precision="fp32",
    compile=False,
    checkpoint_activations=False,
    methods=(),
):
    """Prepare a model for training, in place, and return what a training step calls.

    1. One process: nothing is sharded. The model itself is returned.
    2. Several processes, shard_group None: each has a replica, and their gradients are averaged.
       DistributedDataParallel around the model is returned.
    3. shard_group N: parameters, gradients and optimizer state are split over N neighbouring
       processes (FSDP2), and each such group has a copy (HSDP). The model itself is returned.

    precision   "bf16" or "fp32", to compute in. Masters, gradients and optimizer state are fp32.
                The three ways round alike: see cast_weights.
    compile     1 and 2: an MAE or a classifier as one graph; 3, and other models: each block
    methods     of the model that are called from outside, beside forward

    A model on the meta device gets its memory here, once it is sharded: no process ever holds more
    than its part. Its values are those of uninitialised memory: call initialize(). Parameter names
    do not change: forward is wrapped, not the module.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if shard_group is None and precision == "bf16":
        for module in blocks:
            cast_weights(module)
        for method in ("forward", *methods):
            cast_weights(model, method)
    if checkpoint_activations:
        # The cast is inside: a recomputation casts again. Blocks draw no random numbers, and to
        # look at the generator's state is forbidden while a CUDA graph is recorded.
        options = {"use_reentrant": False, "preserve_rng_state": False}
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, **options)
    if compile:
        one_graph = shard_group is None and isinstance(model, MAE | Classifier)
        for module in [model] if one_graph else blocks:
            if not isinstance(module, TextBlock):  # texts come in many lengths
                compile_training(module)
    if shard_group is not None:
        shard(model, device, shard_group, precision, methods)
    if next(model.parameters()).is_meta:
        model.to_empty(device=device)
    if shard_group is not None or not dist.is_initialized() or dist.get_world_size() == 1:
        return model
    return replicate(model)


def cast_weights(module, method="forward"):
    """Let a method of a module compute with its weights in bf16, as FSDP2's bf16 policy does.

    The cast is part of the graph: gradients go back through it, and arrive in fp32 at the fp32
    masters. Blocks cast their own. Loss and gradients are those of FSDP2 bit for bit (a test).
    """
    # functional_call calls a module's forward. The caller's is the method as the class has it; the
    # module's own becomes the one that casts.
    caller = nn.Module()
    caller.module, caller.forward = module, getattr(type(module), method).__get__(module)

    def computed_in_bf16(*inputs, **named):
        weights = {
            name: weight.to(torch.bfloat16)
            for name, weight in caller.named_parameters()
            if "blocks." not in name
        }
        return torch.func.functional_call(caller, weights, inputs, named, tie_weights=False)

    setattr(module, method, computed_in_bf16)


def compile_training(module):
    """Compile a module's forward for training, in place.

    In evaluation mode it stays as it is: other batch sizes would be compiled anew.
    """
    plain = module.forward
    compiled = torch.compile(plain, dynamic=False)  # all training batches have one shape

    def forward(*inputs, **named):
        return (compiled if module.training else plain)(*inputs, **named)

    module.forward = forward


def replicate(model, bucket_mb=100):
    """A model whose replicas average their gradients: see parallelize.

    bucket_mb: gradients travel together in as many MB, while backward goes on. torch.compile cuts
    its graph there: PyTorch's 25 MB would be a hundred graphs for H (ours, not measured).
    """
    # Gradients of shape (1, 1, D) have other strides than their bucket, which means nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match")
    # Not static_graph: it fails where the first backward is one of those that do not reduce.
    options = {"gradient_as_bucket_view": True, "bucket_cap_mb": bucket_mb}
    replica = nn.parallel.DistributedDataParallel(model, **options)
    # After its first backward DDP sorts its buckets anew, by the order of arrival, and a sum of
    # three processes' numbers depends on where in a bucket they are. A run that goes on would begin
    # with the first order again. So the first backward is one that trains nothing.
    trained, forward = [p for p in model.parameters() if p.requires_grad], model.forward
    model.forward = lambda: sum(parameter.sum() for parameter in trained)
    replica().backward()
    model.forward = forward
    model.zero_grad()
    return replica


def shard(model, device, shard_group, precision, methods=()):
    """Split a model over groups of processes, in place (FSDP2): see parallelize."""
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # Inputs are not cast: MAE computes its targets from the images in fp32, and drop path compares
    # its random numbers with the rates.
    param_dtype = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype, torch.float32, cast_forward_inputs=False)
    mesh = sharding_mesh(device.type, shard_group, dist.group.WORLD)
    # A head of 28,000 hashtags is as large as several blocks: it is not kept whole with the
    # root, which is gathered first and let go of last.
    large = [model.head] if isinstance(model, Classifier) else []
    large += [model.text.token_embedding] if isinstance(model, TwoTowers) else []
    for module in model.modules():
        if isinstance(module, Block) or any(module is other for other in large):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for method in methods:
        register_fsdp_forward_method(model, method)


def compiles(kind):
    """True if training is compiled by default: on CUDA, with Triton and a C compiler.

    (On a CPU, training compiled was 0.95 to 1.02 times as fast.)
    """
    compilers = os.environ.get("CC", "gcc"), "gcc", "clang"
    return kind == "cuda" and kernels.triton.__version__ and any(map(shutil.which, compilers))


def sync_gradients(model, last):
    """Context of a micro-batch's forward and backward: processes average gradients with the last.

    model: what parallelize() returned.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext() if last else model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


@lru_cache(1)  # each one would make groups of processes of its own
def sharding_mesh(kind, shard_group, everyone):
    """Processes as (copies of the model, processes that share one), or all that share the one."""
    shape = everyone.size() // shard_group, shard_group
    names, shape = (("replicate", "shard"), shape) if shape[0] > 1 else (("shard",), shape[1:])
    return dist.init_device_mesh(kind, shape, mesh_dim_names=names)


# ------------------------------------------------------------------------------------------ weights


def local(tensor):
    """This process's part of a tensor, if it is sharded. They share their memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor):
    """A tensor, gathered if it is sharded: then every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_state(model):
    """{name: whole fp32 CPU tensor} on the first process, {} on the others, which must call it."""
    state, first = {}, not dist.is_initialized() or dist.get_rank() == 0
    for name, tensor in model.state_dict().items():
        tensor = whole(tensor)
        if first:
            state[name] = tensor.detach().float().cpu()
    return state


def save_weights(path, state, config):
    """Write model.pt, {"model": {name: tensor}, "config": JSON-able dict}: whole or not at all."""
    json.dumps(config)  # what is not JSON-able must not get in
    write_file(path, {"model": state, "config": config})


def columns(ours, theirs=None, at="", there=None):
    """{our name: another's} of modules and lone tensors, word by word; ours below `at`."""
    there = at if there is None else there
    return {f"{at}{a}": f"{there}{b}" for a, b in zip(ours.split(), (theirs or ours).split())}


# Our names, which are timm's and the public MAE's as far as these go. {i} is a block's number.
VIT = "cls_token pos_embed patch_embed.proj norm head fc_norm"
DECODER = "mask_token decoder_pos_embed decoder_embed decoder_norm decoder_pred"
TEXT = "token_embedding position_embedding embedding_norm type_embedding"
PROJECTIONS = "image_projection text_projection logit_scale"
BLOCK = "attn.qkv attn.proj norm1 norm2 mlp.fc1 mlp.fc2"
PLACES = "blocks.{i}.", "decoder_blocks.{i}.", "text.blocks.{i}."

# What others call these, in the same order. A plus joins three tensors that are one of ours;
# in_proj_ has no dot before weight and bias. transformers 5 has others in memory than in files.
HF_VIT = "embeddings.cls_token embeddings.position_embeddings "
HF_VIT += "embeddings.patch_embeddings.projection layernorm classifier"
HF_BLOCK = "attention.attention.query+key+value attention.output.dense "
HF_BLOCK += "layernorm_before layernorm_after intermediate.dense output.dense"
HF_BLOCK_5 = "attention.q_proj+k_proj+v_proj attention.o_proj layernorm_before layernorm_after "
HF_BLOCK_5 += "mlp.fc1 mlp.fc2"
XLMR_TEXT = "word_embeddings position_embeddings LayerNorm token_type_embeddings"
XLMR_BLOCK = "attention.self.query+key+value attention.output.dense "
XLMR_BLOCK += "attention.output.LayerNorm output.LayerNorm intermediate.dense output.dense"
TORCHTEXT_TEXT = "token_embedding positional_embedding.embedding embedding_layer_norm"
TORCHTEXT_BLOCK = "self_attn.in_proj_ self_attn.out_proj norm1 norm2 linear1 linear2"
TORCHTEXT_OLD_BLOCK = "attention.input_projection attention.output_projection "
TORCHTEXT_OLD_BLOCK += "attention_layer_norm final_layer_norm residual_mlp.mlp.0 residual_mlp.mlp.3"
MAWS_PROJECTIONS = "vision_projection text_projection logit_scale"

TIMM_VIT = columns(VIT) | columns(BLOCK, at=PLACES[0])
TIMM = TIMM_VIT | columns(DECODER) | columns(BLOCK, at=PLACES[1]) | columns(TEXT, at="text.")
TIMM |= columns(BLOCK, at=PLACES[2]) | columns(PROJECTIONS) | columns("time_embed")
TIMM |= columns("attn.rel_pos_t attn.rel_pos_h attn.rel_pos_w", at=PLACES[0])
HF_FILE, HF_FILE_5, HF_MEMORY_5 = (
    columns(VIT, HF_VIT)
    | columns(BLOCK, block, PLACES[0], encoder)
    | columns(DECODER, there="decoder.")
    | columns(BLOCK, block, PLACES[1], decoder)
    for block, encoder, decoder in (
        (HF_BLOCK, "encoder.layer.{i}.", "decoder.decoder_layers.{i}."),
        (HF_BLOCK, "encoder.layer.{i}.", "decoder.decoder_encoder.layer.{i}."),
        (HF_BLOCK_5, "layers.{i}.", "decoder.decoder_layers.{i}."),
    )
)
XLMR = columns(TEXT, XLMR_TEXT, "text.", "embeddings.")
XLMR |= columns(BLOCK, XLMR_BLOCK, PLACES[2], "encoder.layer.{i}.")
TORCHTEXT, TORCHTEXT_OLD = (
    {ours: f"vision_encoder.{theirs}" for ours, theirs in TIMM_VIT.items()}
    | columns(TEXT, TORCHTEXT_TEXT, "text.", "encoder.transformer.")
    | columns(BLOCK, block, PLACES[2], f"encoder.transformer.{layers}")
    | columns(PROJECTIONS, MAWS_PROJECTIONS)
    for block, layers in (
        (TORCHTEXT_BLOCK, "layers.layers.{i}."),
        (TORCHTEXT_OLD_BLOCK, "layers.{i}."),
    )
)
# What a file is said to be, and its table of names.
FORMATS = [("timm-named", TIMM), ("Hugging Face", HF_FILE), ("Hugging Face", HF_FILE_5)]
FORMATS += [("Hugging Face", HF_MEMORY_5), ("Hugging Face", XLMR)]
FORMATS += [("torchtext-named", TORCHTEXT), ("torchtext-named", TORCHTEXT_OLD)]
# Names that some files put before a part of a network; layers that we have no use for.
PARTS = r"(vit\.|roberta\.|text_encoder\.)?"
UNUSED = ("pooler.", "lm_head.", "embeddings.position_ids")
# Names before a whole one: of data parallelism, Lightning, solo-learn and the like. They may begin
# another's own names, too ("encoder.layer.0"): what they are is told from the embedding's name.
WRAPPERS = r"((module|model|backbone|encoder)\.)*"
EMBEDDINGS = ("patch_embed.proj", "text.token_embedding")
EMBEDDINGS = {
    re.escape(table[name]) for _, table in FORMATS for name in EMBEDDINGS if name in table
}
NETWORK = re.compile(rf"(|.+?\.){PARTS}({'|'.join(EMBEDDINGS)})\.weight")


def tensor_names(table, depth):
    """(our name, [theirs]) of each tensor that may be: of a module, its weight and its bias."""
    for (ours, theirs), end in itertools.product(table.items(), ("", ".weight", ".bias")):
        start, dot, last = theirs.rpartition(".")
        theirs = [f"{start}{dot}{part}{end}".replace("_.", "_") for part in last.split("+")]
        for i in range(depth if "{i}" in ours else 1):
            yield ours.replace("{i}", str(i)) + end, [t.replace("{i}", str(i)) for t in theirs]


def depth_of(state):
    """More than the number of any block among the names of tensors."""
    numbers = (int(n) for name in state for n in re.findall(r"\.(\d{1,3})\.", name))
    return 1 + max(numbers, default=0)


def networks_in(names):
    """What is before the names of each network: see WRAPPERS."""
    return sorted({found[1] for name in names if (found := NETWORK.fullmatch(str(name)))})


def recognise(state):
    """(format, tensors by our names, those of no use, those that nothing explains) of a file's."""
    bare = {re.sub(f"^(module\\.)?{PARTS}", "", name): tensor for name, tensor in state.items()}
    if len(bare) < len(state):
        raise RuntimeError("some have the same name but for a prefix")
    state = bare
    style, found = None, []
    for other, table in FORMATS:
        known = tensor_names(table, depth_of(state))
        explained = [(ours, theirs) for ours, theirs in known if state.keys() >= set(theirs)]
        if len(explained) > len(found):
            style, found = other, explained
    left = state.keys() - {name for _, parts in found for name in parts}
    unused = {name for name in left if style == "Hugging Face" and name.startswith(UNUSED)}
    merged = {
        ours: torch.cat([state[part] for part in parts]) if len(parts) > 1 else state[parts[0]]
        for ours, parts in found
    }
    if (types := merged.pop("text.type_embedding.weight", None)) is not None:
        # Of all that a text's tokens may be, they are the first: it is added to each of them.
        name = "text.position_embedding.weight"
        merged[name] = merged[name].float() + types[:1].float()
    if "logit_scale" in merged:
        merged["logit_scale"] = merged["logit_scale"].reshape(1)
    if lone := [name for name, tensor in merged.items() if not tensor.ndim]:
        raise RuntimeError(f"{lone[0]} is one number")
    return style, merged, unused, left - unused


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        why = ".safetensors needs the safetensors package: pip install safetensors"
        raise ValueError(why) from None
    return safetensors.torch


def save_safetensors(state, path):
    save = import_safetensors().save_file
    from safetensors import SafetensorError

    try:
        save(state, path, {"format": "pt"})
    except SafetensorError as error:  # which is no OSError, also where the disk is full
        raise OSError(f"cannot write {path}: {last_line(error)}") from None


def open_weights(path):
    """(content, path) of a file of weights, or of that in a folder of transformers.

    Several files, whose tensors an index.json beside them lists, are one. No code runs from a file.
    Raises ValueError, one line, when one cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        names = [name + end for name in names for end in ("", ".index.json")]
        path = next((path / name for name in names if (path / name).is_file()), path / names[0])
    return (open_shards if path.name.endswith(".index.json") else open_file)(path), path


def open_shards(index):
    """The tensors, by name, of the files that an index.json lists. See open_weights."""
    try:
        listed = set(json.loads(index.read_text())["weight_map"].items())
        paths = {file: index.with_name(file) for _, file in listed}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} lists no files of weights ({last_line(error):.200})") from None
    files = {file: open_file(path) for file, path in paths.items()}
    files = {file: part if isinstance(part, dict) else {} for file, part in files.items()}
    found = {(str(name), file) for file, content in files.items() for name in content}
    if differing := sorted(listed ^ found):
        name, file = differing[0]
        where = "the index alone" if differing[0] in listed else f"{file} alone"
        raise ValueError(f"{index} and its files differ: {name} is in {where}")
    return {name: tensor for content in files.values() for name, tensor in content.items()}


def open_file(path):
    """The content of one file: see open_weights."""
    if not path.is_file():
        raise ValueError(f"no weights at {path}: give a model.pt or a public checkpoint")
    safe = import_safetensors() if path.suffix == ".safetensors" else None
    try:
        if safe:
            return safe.load_file(path)
        # The public MAE code stores its arguments beside the weights: plain values in a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped, not read: processes share it, and each takes no more than its part of it.
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # noqa: BLE001 (torch.load says "damaged" in a dozen ways)
        why = f"{type(error).__name__}: damaged, or more than tensors and plain values in it"
        if refused := re.search(r"GLOBAL (\S+)", str(error)):  # torch's message has ten lines
            why = f"torch refuses the {refused[1]} in it: save its tensors and plain values alone"
        raise ValueError(f"cannot read weights from {path} ({why}): nothing was run") from None


def one_network(content, entry=None):
    """(tensors, config, {title: what to say of it}, other networks) of what a file holds.

    Of several networks, one is read: in the entry "model" or "state_dict", below no more than
    WRAPPERS; or where `entry` says, which is an entry or a prefix. Its names come without these.
    """
    held = content if isinstance(content, dict) else {}
    entries = {key: part for key, part in held.items() if isinstance(part, dict)}
    networks = [key for key in entries if networks_in(entries[key])]
    usual = [key for key in ("model", "state_dict") if key in (networks or entries)]
    chosen = entry if entry in entries else next(iter(usual), None)
    below = f"{entry}." if entry and entry != chosen else ""
    config = held.get("config", {}) if chosen and not below else {}
    tensors = entries.get(chosen, held).items()
    tensors = {str(name): tensor for name, tensor in tensors if isinstance(tensor, torch.Tensor)}
    # torch.compile's may be before every name, or before those of blocks that are compiled alone.
    plain = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise RuntimeError("some have the same name but for a prefix")
    found = networks_in(plain)
    fitting = [prefix for prefix in found if re.fullmatch(re.escape(below) + WRAPPERS, prefix)]
    prefix = fitting[0] if len(fitting) == 1 else below
    state = {n.removeprefix(prefix): t for n, t in plain.items() if n.startswith(prefix)}
    if odd := [n for n, t in state.items() if t.layout != torch.strided or t.is_meta]:
        raise RuntimeError(f"{odd[0]} is sparse, or a shape without numbers")
    others = [other for other in found if other != prefix]
    left = [name.split(".") for name in plain if not name.startswith((prefix, *others))]
    depth = max(1, prefix.count("."))
    left = {".".join(words[:depth][: len(words) - 1] or words) for words in left}
    notes = {
        "entry": [entry] if entry and not below else [],
        "stripped": [prefix] * bool(prefix) + ["_orig_mod."] * (plain.keys() != tensors.keys()),
        "left": left,
    }
    others = [str(key) for key in networks if key != chosen] + [o.rstrip(".") for o in others if o]
    return state, config, notes, others


def read_file(path, entry=None, flag="--entry"):
    """(path, format, tensors by our names, config or {}) of a file or folder of weights.

    The config is ours or, beside Hugging Face's tensors, transformers'; or what the public MAE
    code's arguments say, by the names of the latter. entry: see one_network; flag: how a program
    is told it. Raises ValueError, one line, when the tensors cannot be read, or are no network that
    is known here.
    """
    content, path = open_weights(path)
    try:
        state, config, notes, others = one_network(content, entry)
        style, named, unused, strange = recognise(state)
    except (RuntimeError, LookupError) as error:
        raise ValueError(f"the tensors in {path} cannot be used: {last_line(error)}") from None
    patches = 5 if "frames" in config else 4  # (D, C, 2, P, P) is a VideoClassifier's
    shapes = {patches: "patch_embed.proj.weight", 2: "text.token_embedding.weight"}
    found = {name: t.ndim for name, t in named.items() if t.numel()}
    hint = f"; {flag} reads what is in {' or '.join(others)}" if others and flag else ""
    if not any(found.get(name) == n for n, name in shapes.items()):
        there, where = state or content, f" in {entry}" if entry else ""
        there = ", ".join(map(str, [*there][:3])) if isinstance(there, dict) else there
        why = f"no (D, C, P, P) patches' and no tokens' embedding among {there!s:.120}{hint}"
        raise ValueError(f"{path} holds no ViT or text tower that is known here{where}: {why}")
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        why = f"but nothing explains {', '.join(sorted(strange)[:3])}{more}"
        raise ValueError(f"{path} looks {style}, {why}: it is of another architecture{hint}")
    style = "our own" if config else style
    if style == "Hugging Face":
        config = published_config(path, named)
    if style == "timm-named" and "mask_token" in named:
        config, notes["its args"] = public_arguments(content, named)
    if os.environ.get("RANK", "0") == "0":
        kind = "ViT" if shapes[patches] in named else "XLM-R"
        kind = "ViTMAE" if "mask_token" in named else kind
        kind = "CLIP pair" if named.keys() >= {*shapes.values()} else kind
        notes["of no use here"] = {name.split(".")[0] for name in unused}
        notes["also there" + (f" ({flag} reads it)" if flag else "")] = others
        notes = [f"{title}: {', '.join(sorted(some))}" for title, some in notes.items() if some]
        print("; ".join([f"{path}: {style} {kind}", *notes]))
    return path, style, named, config


def public_arguments(content, state):
    """({transformers' name: value}, what to print) of the public MAE code's arguments beside a MAE.

    What is of another kind, or of another image size than the positions, is not used, and said.
    """
    args = content.get("args") if isinstance(content, dict) else None
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    args = args if isinstance(args, dict) else {}
    is_flag = lambda value: isinstance(value, int) and value in (0, 1)
    is_share = lambda value: isinstance(value, float) and 0 < value < 1
    tests = {"norm_pix_loss": is_flag, "mask_ratio": is_share, "input_size": partial(fits, state)}
    used = {name: args[name] for name, test in tests.items() if name in args and test(args[name])}
    said = [f"{n} {args[n]!r:.20}{'' if n in used else ' (not used)'}" for n in tests if n in args]
    if "input_size" in used:
        used["image_size"] = used.pop("input_size")
    return used, said


def published_config(path, state):
    """The config.json of transformers beside a file of weights, or {}."""
    path = path.with_name("config.json")
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    kinds = ("vit", "vit_mae", "xlm-roberta")
    if not isinstance(config, dict) or config.get("model_type", kinds[0]) not in kinds:
        raise ValueError(f"{path} is of none of {', '.join(kinds)}")
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{path}: hidden_act {config['hidden_act']!r} is not gelu, which we have")
    widths = [len(t) for name, t in state.items() if name.endswith("blocks.0.norm1.weight")]
    if config.get("hidden_size") not in (None, *widths):
        raise ValueError(f"{path} is not of the weights beside it: its hidden_size is not theirs")
    return config if "model_type" in config else {}


def read_weights(path, heads=None, image_size=None, entry=None):
    """(state, config) by our own names of a file, or a Hugging Face folder, of weights: FORMATS.

    It may be a ViT, a MAE, a classifier or a pair of towers; the first line printed says what. No
    code runs from it. Without a config, the architecture is read off the tensors' shapes, and the
    number of heads off the sizes that are known; or `heads` says it. Positions that nothing is said
    of are taken for a square grid's; what is none may be that of the `image_size`. entry: see
    one_network.
    Raises ValueError or OSError, one line, when there is nothing usable in the file.
    """
    path, style, state, config = read_file(path, entry)
    kernel = state.get("patch_embed.proj.weight")
    if kernel is None or kernel.ndim != (5 if "frames" in config else 4):
        raise ValueError(f"{path} is a text tower alone: no (D, C, P, P) patch_embed.proj.weight")
    source = "config" if style == "our own" else "set of weights"
    try:
        if style != "our own":
            eps = 1e-12 if style == "Hugging Face" else 1e-6
            config = infer_config(state, heads, config, eps, image_size)
        model = network(state, config)
        # A model that the config asks for is never made in memory before this.
        wanted = {name: t.shape for name, t in model.state_dict().items() if name in state}
        misfits = [name for name in wanted if state[name].shape != wanted[name]]
        if misfits and style == "our own":
            name, shape = misfits[0], tuple(state[misfits[0]].shape)
            raise ValueError(f"{name} is {shape}, wanted {tuple(wanted[name])}")
    except KeyError as error:
        raise ValueError(f"the {source} in {path} lacks {error}") from None
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        why = f"{last_line(error):.300}"
        raise ValueError(f"the {source} in {path} cannot be used: {why}") from None
    if heads not in (None, model.heads):
        raise ValueError(f"{path} has {model.heads} heads: leave --heads {heads} out")
    return state, config


def read_text_weights(path, heads=None):
    """(state, arguments) of the TextTower in a file: XLM-R's, or that of a pair. See read_weights.

    Raises ValueError, one line, when it holds none, or not all of one.
    """
    path, style, state, config = read_file(path, flag=None)
    state = {n.removeprefix("text."): t for n, t in state.items() if n.startswith("text.")}
    wanted = ("size", "vocabulary", "positions", "norm_eps")
    try:
        if not state:
            raise ValueError("no text tower is among them")
        if style == "our own":
            config = {key: config["text"][key] for key in wanted if key in config["text"]}
        else:
            config = infer_text_config(state, heads, config)
        with torch.device("meta"):
            wanted = TextTower(**config).state_dict()
        if misfits := [n for n in wanted if n not in state or state[n].shape != wanted[n].shape]:
            raise ValueError(f"{', '.join(misfits[:3])} are missing or of another shape")
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the weights in {path} cannot be used: {last_line(error):.300}") from None
    return state, config


def infer_shape(state, blocks, width, known, heads=None):
    """(width, layers, heads) of so many `blocks`: heads as given, or as one of `known` has."""
    layers = len({name.split(".")[1] for name in state if name.startswith(f"{blocks}.")})
    heads = heads or next((h for w, l, h, *_ in known if (w, l) == (width, layers)), None)
    if not heads:
        why = f"{layers} {blocks} of width {width} have how many heads?"
        raise ValueError(f"{why} Give --heads (of the encoder), or a config")
    return width, layers, heads


def name_of(shape, sizes):
    """The name of (width, layers, heads) in SIZES or TEXT_SIZES, or "WIDTHxLAYERSxHEADS"."""
    known = (name for name, known in sizes.items() if known[:3] == shape)
    return next(known, "x".join(map(str, shape)))


def fits(state, image_size):
    """True if the position table among a ViT's tensors is for images of this size."""
    try:
        rows, P = state["pos_embed"].shape[1], state["patch_embed.proj.weight"].shape[-1]
        return rows == 1 + math.prod(side // P for side in pair(image_size))
    except (ValueError, LookupError):
        return False


def infer_config(state, heads=None, published=None, norm_eps=1e-6, image_size=None):
    """The config of tensors by our names that come without one.

    published: what a config.json of transformers says of them, or the public MAE code's arguments.
    Where it says nothing, the image is square or, if it cannot be, of the image_size that is given,
    and norm_eps is that of those who write such files. What is left open about a decoder is left
    out.
    """
    width, channels, P, _ = state["patch_embed.proj.weight"].shape
    published = published or {}
    heads = heads or published.get("num_attention_heads")
    shape = infer_shape(state, "blocks", width, SIZES.values(), heads)
    if "pos_embed" not in state or state["pos_embed"].ndim != 3:
        raise ValueError("there is no (1, 1 + patches, width) pos_embed among the weights")
    rows, said = state["pos_embed"].shape[1], published.get("image_size")
    sizes = (math.isqrt(max(0, rows - 1)) * P, image_size) if said is None else (said,)
    if not any(fits(state, size) for size in sizes):
        why = f"pos_embed has {rows} rows, which are not a class token's and "
        why += "a square grid's" if said is None else f"those of image_size {said!s:.20}"
        more = f": give the weights' own --image-size HEIGHTxWIDTH, of {rows - 1} patches of {P}"
        more += " (to model.py convert, if another is wanted)"
        raise ValueError(why + (more if said is None else ""))
    image_size = pair(next(size for size in sizes if fits(state, size)))
    config = {
        "size": name_of(shape, SIZES),
        "image_size": [*image_size],
        "patch_size": P,
        "channels": channels,
        "positions": "sincos",
        "norm_eps": float(published.get("layer_norm_eps", norm_eps)),
    }
    if "mask_token" in state:
        known = [DEFAULT_DECODER, *DECODERS.values()]
        heads = published.get("decoder_num_attention_heads")
        width = state["mask_token"].shape[-1]
        config["decoder"] = [*infer_shape(state, "decoder_blocks", width, known, heads)]
        known = {"mask_ratio": "mask_ratio", "norm_pix_loss": "normalize_targets"}
        config |= {ours: published[name] for name, ours in known.items() if name in published}
    if "head.weight" in state:
        config["classes"] = len(state["head.weight"])
        config["pool"] = "mean" if "fc_norm.weight" in state else "cls"
        labels = published.get("id2label") or {}
        labels = [str(labels[number]) for number in sorted(labels, key=int)]
        if len(labels) not in (0, config["classes"]):
            raise ValueError(f"id2label has {len(labels)} of {config['classes']} classes")
        config["class_names"] = None if labels[:1] in ([], ["LABEL_0"]) else labels
        if not published and config["pool"] == "cls" and image_size[0] in (512, 518):
            config["val_crop"] = 0.0  # the MAWS repository's finetuned ones: pictures are squashed
    if "text.token_embedding.weight" in state:
        text = {n.removeprefix("text."): t for n, t in state.items() if n.startswith("text.")}
        config["text"] = infer_text_config(text) | {"context": 100}  # maws repository
        config |= {"shared_width": state["image_projection"].shape[1], "pool": "cls"}
    return config


def infer_text_config(state, heads=None, published=None):
    """The arguments of a TextTower with these tensors: see infer_config."""
    published = published or {}
    vocabulary, width = state["token_embedding.weight"].shape
    heads = heads or published.get("num_attention_heads")
    shape = infer_shape(state, "blocks", width, TEXT_SIZES.values(), heads)
    return {
        "size": name_of(shape, TEXT_SIZES),
        "vocabulary": vocabulary,
        "positions": len(state["position_embedding.weight"]),
        "norm_eps": float(published.get("layer_norm_eps", 1e-5)),
    }


def encoder_config(config):
    """The part of a config that a plain ViT is built from."""
    keys = ("size", "image_size", "patch_size", "channels", "positions")
    return {key: config[key] for key in keys} | {"norm_eps": config.get("norm_eps", 1e-6)}


def inherit(init, given, names, heads=None, read=read_weights, entry=None):
    """(weights to start from, config, origin) of the file `init` with what is `given` changed.

    names: the entries of the config that the model to be built knows; the others are left out.
    Without a file: (None, given, None). Another size, patch or number of channels is a ValueError.
    heads, entry, read: see read_weights, or read is another like it.
    The weights are (state, grid of its position table), as load_weights takes them; for the origin,
    see origin_of.
    """
    if not init:
        if heads:
            raise ValueError("--heads is for the weights in --init: without it, see --size")
        if entry:
            raise ValueError(f"--entry {entry} is of the weights in --init: there is none")
        return None, given, None
    state, config = read(init, heads, given.get("image_size"), entry)
    for name in ("size", "patch_size", "channels"):
        if given.get(name, config[name]) != config[name]:
            raise ValueError(f"{init} has {name} {config[name]}: it cannot be changed")
    grid = [side // config["patch_size"] for side in config["image_size"]]
    config = {name: config[name] for name in names if name in config} | given
    return (state, grid), config, origin_of(state)


def origin_of(state):
    """Says which weights these are, by some numbers of each tensor: training changes them all."""
    some = [(name, tensor.flatten()[:8].tolist()) for name, tensor in sorted(state.items())]
    return f"weights {hashlib.sha256(repr(some).encode()).hexdigest()[:8]}"


def load_weights(model, state, old_grid=None, keep_head=False):
    """Load tensors by our names into any of the models; return one line on the outcome.

    Position tables of another grid are resampled (old_grid: theirs, square if not given), and a
    picture's patch embedding is inflated to tubelets: half of it for each of two frames. A
    decoder, a head or what texts need that the file has and the model lacks is dropped, and so is
    any head unless keep_head; what the model has of these, or of positions in time and relative
    ones, and the file lacks keeps its initial values. Anything else that does not fit is a
    ValueError.
    """
    own = model.state_dict()
    renamed = "fc_norm.weight" in state and "fc_norm.weight" not in own and "norm.weight" in own
    if renamed:  # a classifier that pools the mean has its last norm under this name
        state = {name.replace("fc_norm.", "norm."): tensor for name, tensor in state.items()}
    optional = ("decoder_", "mask_token", "head.", "fc_norm.", "text.", *PROJECTIONS.split())
    optional += ("norm.",) if "fc_norm.weight" in own else ()  # which stands for it
    of_video, inflated = ("time_embed", *(name for name in own if ".rel_pos_" in name)), False
    kept = {name for name in state if keep_head or not name.startswith("head.")}
    loaded, resampled, problems = {}, [], []
    moved = old_grid and tuple(old_grid) != model.grid  # 8x2 has as many positions as 4x4
    for name, tensor in state.items():
        if name not in own or name not in kept:
            continue
        table = name.endswith("pos_embed") and tensor.ndim == 3
        if table and (moved or tensor.shape[1] != own[name].shape[1]):
            grid = old_grid or (math.isqrt(tensor.shape[1] - 1),) * 2
            if math.prod(grid) != tensor.shape[1] - 1:
                problems.append(f"{name} does not have {grid[0]}x{grid[1]} positions")
                continue
            tensor = resample_positions(tensor, tuple(grid), model.grid)
            resampled.append(f"{name} from {grid[0]}x{grid[1]} to {model.grid[0]}x{model.grid[1]}")
        if tensor.ndim == 4 and own[name].ndim == 5:
            tensor, inflated = tensor[:, :, None].expand(-1, -1, 2, -1, -1) / 2, True
        if tensor.shape == own[name].shape:
            loaded[name] = tensor
        else:
            problems.append(f"{name} is {tuple(tensor.shape)}, wanted {tuple(own[name].shape)}")
    new = [name for name in own if name not in kept]
    dropped = [name for name in state if name not in own or name not in kept]
    problems += [f"{name} is missing" for name in new if not name.startswith(optional + of_video)]
    problems += [f"{name} is unknown" for name in dropped if not name.startswith(optional)]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"the weights do not fit the model: {'; '.join(problems[:3])}{more}")
    for name, tensor in loaded.items():
        fill(own[name], tensor)

    def families(names):
        names = (re.sub(r"^blocks\.\d+\.attn\.(?=rel_pos_)", "", name) for name in names)
        return ", ".join(sorted({name.split(".")[0] for name in names}))

    return (
        f"weights: {len(loaded)} tensors loaded"
        + ("" if resampled or "pos_embed" not in loaded else ", positions as they were")
        + (f"; resampled: {', '.join(resampled)}" if resampled else "")
        + ("; patch_embed.proj inflated from one frame to two" if inflated else "")
        + (f"; newly initialised: {families(new)}" if new else "")
        + (f"; dropped: {families(dropped)}" if dropped else "")
        + ("; norm from fc_norm" if renamed else "")
    )


def network(state, config):
    """The model on the meta device that the tensors of a file are of, with or without a config."""
    kinds = {"text.token_embedding.weight": (TwoTowers, "text shared_width pool")}
    kinds |= {"mask_token": (MAE, "decoder mask_ratio normalize_targets")}
    kinds |= {"head.weight": (Classifier, "pool class_names")}
    kind, keys = next((kinds[name] for name in kinds if name in state), (ViT, ""))
    if "frames" in config:
        kind, keys = VideoClassifier, f"{keys} frames relative_positions"
    arguments = {key: config[key] for key in keys.split() if key in config}
    if issubclass(kind, Classifier):
        arguments["classes"] = len(state.get("head.weight", (0,)))
        arguments.setdefault("pool", "mean" if "fc_norm.weight" in state else "cls")
    with torch.device("meta"):  # shapes without memory
        return kind(**encoder_config(config), **arguments)


def convert(source, out, format, heads=None, image_size=None, entry=None):
    """Write what read_weights can read as another library reads it. Returns how to load it there.

    format  "timm": tensors for VisionTransformer, .pt, .pth or .safetensors; "hf": a folder for
            from_pretrained; "own": model.pt
    Raises ValueError when `out` exists, its folder does not, or the format cannot say the model.
    """
    out = Path(out)
    if os.path.lexists(out):
        raise ValueError(f"{out} exists: give another name, or remove it")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out.parent} is no folder that exists: make it first")
    suffixes = {"own": (".pt", ".pth"), "timm": (".pt", ".pth", ".safetensors")}
    if out.suffix not in suffixes.get(format, out.suffix):
        raise ValueError(f"{out} must end in {' or '.join(suffixes[format])}")
    if format == "hf" or out.suffix == ".safetensors":
        import_safetensors()  # now, not when all is read
    state, config = read_weights(source, heads, image_size, entry)
    if "frames" in config:
        raise ValueError(f"{source} is of videos: no other library's ViT has such weights")
    if image_size and pair(image_size) != pair(config["image_size"]):
        known = "x".join(map(str, config["image_size"]))
        raise ValueError(f"{source} is of images of {known}: leave --image-size out")
    model = network(state, config)
    print(load_weights(model, state, keep_head=True))  # onto nothing: it is only compared
    if missing := model.state_dict().keys() - state.keys():
        raise ValueError(f"{source} lacks {', '.join(sorted(missing)[:3])}")
    state = {name: state[name] for name in model.state_dict()}
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f"{out.name}.") as folder:
        path = Path(folder, out.name)  # moved when it is whole, gone whatever happens
        if format == "own":
            kept = {"val_crop": config["val_crop"]} if "val_crop" in config else {}
            save_weights(path, state, model.config | kept)
            line = f"import model; state, config = model.read_weights({str(out)!r})"
        else:
            write = write_timm if format == "timm" else write_hugging_face
            line = write(path, out, state, model)
        os.replace(path, out)
    return line


def translate(state, table):
    """Tensors by the names that a table gives them; what has none there is dropped, and said."""
    renamed, dropped = {}, set(state)
    for ours, theirs in tensor_names(table, depth_of(state)):
        if ours in state:
            parts = state[ours].contiguous().chunk(len(theirs))
            renamed |= dict(zip(theirs, parts))
            dropped.remove(ours)
    if dropped:
        print(f"dropped: {', '.join(sorted({name.split('.')[0] for name in dropped}))}")
    return renamed


def write_timm(path, out, state, model):
    """A file for timm's VisionTransformer; the line of Python that builds it and loads `out`."""
    config = model.config
    state = translate(state, TIMM_VIT)
    if config.get("class_names"):
        print("dropped: class_names")
    arguments = {"img_size": tuple(config["image_size"]), "patch_size": model.patch_size}
    arguments |= {"in_chans": config["channels"], "num_classes": getattr(model, "classes", 0)}
    arguments |= {"embed_dim": model.width, "depth": model.layers, "num_heads": model.heads}
    arguments |= {"class_token": True, "fc_norm": "fc_norm.weight" in state}
    arguments["global_pool"] = "avg" if config.get("pool") == "mean" else "token"
    arguments = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    if config["norm_eps"] != 1e-6:  # timm's own
        norm = f"functools.partial(torch.nn.LayerNorm, eps={config['norm_eps']})"
        arguments += f", norm_layer={norm}"
    load = "torch.load"
    if out.suffix == ".safetensors":
        load = "safetensors.torch.load_file"
        save_safetensors(state, path)
    else:
        write_file(path, state)
    imports = "import functools, timm, torch" + (", safetensors.torch" if "safe" in load else "")
    build = f"model = timm.models.VisionTransformer({arguments})"
    return f"{imports}; {build}; model.load_state_dict({load}({str(out)!r}))"


def write_hugging_face(path, out, state, model):
    """A folder with the names that all versions of transformers read; the line to load `out`."""
    config, options = model.config, ""
    H, W = config["image_size"]
    published = {
        "model_type": "vit",
        "image_size": H if H == W else [H, W],
        "patch_size": model.patch_size,
        "num_channels": config["channels"],
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "intermediate_size": 4 * model.width,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": config["norm_eps"],
    }
    if isinstance(model, MAE):
        if H != W:
            raise ValueError(f"ViTMAEForPreTraining wants square images, not {H}x{W}")
        kind, (width, layers, heads) = "ViTMAEForPreTraining", config["decoder"]
        published |= {"model_type": "vit_mae", "decoder_hidden_size": width}
        published |= {"decoder_num_hidden_layers": layers, "decoder_num_attention_heads": heads}
        published |= {"decoder_intermediate_size": 4 * width, "mask_ratio": config["mask_ratio"]}
        published |= {"norm_pix_loss": config["normalize_targets"]}
    elif isinstance(model, Classifier):
        if config["pool"] != "cls":
            why = (
                "ViTForImageClassification reads the class token, this head the mean of the patches"
            )
            raise ValueError(f"{why}: --format timm can say that")
        kind, labels = "ViTForImageClassification", config["class_names"]
        labels = labels or [f"LABEL_{number}" for number in range(model.classes)]
        published["id2label"] = dict(enumerate(labels))
        published["label2id"] = {label: number for number, label in enumerate(labels)}
    else:
        kind, options = "ViTModel", ", add_pooling_layer=False"
    published["architectures"] = [kind]
    state = translate(state, HF_FILE)
    if kind != "ViTModel":
        bare = ("classifier.", "decoder.")
        state = {n if n.startswith(bare) else f"vit.{n}": tensor for n, tensor in state.items()}
    path.mkdir()
    write_file(path / "config.json", json.dumps(published, indent=1))
    save_safetensors(state, path / "model.safetensors")
    load = f"model = transformers.{kind}.from_pretrained({str(out)!r}{options})"
    return f"import transformers; {load}"


# -------------------------------------------------------------------------------------- checkpoints

# One process needs no process group, and DCP need not say so at every save.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


def training_state(model, optimizer):
    """A run's tensors as one flat dict: buffers, parameters that are not frozen, their moments.

    The names are the same however the model is spread over processes.
    """
    if hasattr(model, "reshard"):
        model.reshard()  # after a forward without backward, FSDP's root still is whole
    state = {f"model/{name}": buffer for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        state |= {f"model/{name}": parameter.detach()} if parameter.requires_grad else {}
        for moment, tensor in optimizer.state.get(parameter, {}).items():
            state |= {f"{moment}/{name}": tensor} if moment != "step" else {}
    return state


def save_checkpoint(
    folder, step, model, optimizer, record, keep_last=2, keep_every=None, background=False
):
    """Write folder/step-NNN (tensors by DCP, `record` in state.json), then point LATEST to it.

    Everything is written to a temporary directory, synced and renamed, and only then are the
    checkpoints before the last `keep_last` removed, but for every `keep_every`-th step: a kill at
    any instant leaves a whole one. In the background, training goes on while a copy in the host's
    memory is written. Every process must call it and, before the next one and at the end, what it
    returns: a function that waits until this one is whole.
    Raises OSError (disk full, ...; so does the function) with the old ones in place, and ValueError
    when the step has made parameters that are not finite.
    """
    import torch.distributed.checkpoint as dcp

    state = training_state(model, optimizer)  # which reshards them
    sharded = any(hasattr(tensor, "full_tensor") for tensor in state.values())
    if dist.is_initialized() and not sharded:
        # Replicas: each process writes its share. (DCP would let one write, and all copy it first.)
        state = dict([*state.items()][dist.get_rank() :: dist.get_world_size()])
    if not whole(torch.nn.utils.get_total_norm(list(model.parameters()))).isfinite():
        raise ValueError(f"step {step} made weights that are not finite: nothing of it was saved")

    folder, writer = Path(folder), not dist.is_initialized() or dist.get_rank() == 0
    final, temporary = folder / f"step-{step:08d}", folder / ".saving"
    if writer:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()

    def publish():
        stored = {entry.relative_path for entry in read_metadata(temporary).storage_data.values()}
        if missing := [name for name in stored if not (temporary / name).exists()]:
            raise OSError(f"no {min(missing)} of another process: do all nodes share the folder?")
        files = {path.name: path.stat().st_size for path in temporary.iterdir()}
        kept = {**record, "step": step, "files": files, "attention": [*kernels.TIMED.items()]}
        write_file(temporary / "state.json", json.dumps(kept))
        shutil.rmtree(final, ignore_errors=True)  # left by a run killed before it moved LATEST
        os.replace(temporary, final)
        write_file(folder / "LATEST", final.name)  # syncs the folder: both names
        # Later ones are of a former life of the run: they do not push out this one.
        older = [path for path in checkpoints_in(folder) if path.name < final.name]
        for old in older[: max(0, len(older) - keep_last + 1)]:
            for_good = keep_every and int(old.name.removeprefix("step-")) % keep_every == 0
            if not for_good and not old.is_symlink():  # what it leads to is somebody else's
                shutil.rmtree(old)

    def save(write):
        try:
            write()
            if writer:
                publish()
        except (OSError, dcp.api.CheckpointException, RuntimeError) as error:
            if is_lost(error):
                raise
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(
                f"cannot save {final}: {last_line(error)}. Checkpoints before it, if any, are whole"
            ) from error

    how = {"storage_writer": dcp.FileSystemWriter(temporary)}  # it syncs its files
    how["no_dist"] = not dist.is_initialized()
    if background:
        written = dcp.async_save(state, process_group=saving_group(dist.group.WORLD), **how)
        saved = SAVER.submit(save, written.result)

        def wait():
            began = time.monotonic()
            saved.result()
            if writer and (seconds := time.monotonic() - began) > 1:
                print(f"waited {seconds:.0f} s until {final} was written")

        return wait
    save(partial(dcp.save, state, **how))
    barrier()
    return lambda: None


SAVER = ThreadPoolExecutor(1)


@lru_cache(1)
def saving_group(everyone):
    """All processes, for what they say of checkpoints while the training says something else."""
    return everyone and dist.new_group(backend="gloo", group_desc="checkpoints")


def load_checkpoint(path, model, optimizer):
    """Load a checkpoint into a model and its AdamW or SGD, in place. Returns its record."""
    import torch.distributed.checkpoint as dcp

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *_, **__):
            return read_metadata(path)

    record = json.loads((Path(path) / "state.json").read_text())
    del record["files"]
    for group in optimizer.param_groups:
        names = ("exp_avg", "exp_avg_sq") if "betas" in group else ("momentum_buffer",)
        names += ("average",) if group.get("ema") else ()
        for parameter in group["params"]:
            place = parameter.device if group["fused"] else "cpu"  # as AdamW itself does
            moments = {name: torch.zeros_like(parameter) for name in names}
            step = {"step": torch.tensor(float(record["step"]), device=place)}
            optimizer.state[parameter] = moments | (step if "betas" in group else {})
    try:
        read_metadata(path)  # DCP would print a traceback of what is wrong with it
        state = training_state(model, optimizer)
        dcp.load(state, storage_reader=Reader(path), no_dist=not dist.is_initialized())
    except (Exception, dcp.api.CheckpointException) as error:
        # A damaged file fails in many ways; DCP's own exception is no Exception.
        raise OSError(f"cannot load {path}: {last_line(error)}; --resume another") from error
    kernels.TIMED.update((tuple(key), ratio) for key, ratio in record.pop("attention", ()))
    return record


def last_line(error):
    """What an error says, in one line: DCP's hold a whole traceback, some others nothing.

    After what it has to say, torch's C++ code may list its own frames.
    """
    said = str(error).partition("\nException raised from ")[0].strip()
    return (said or type(error).__name__).splitlines()[-1]


def read_metadata(path):
    """DCP's index of a checkpoint, which is a pickle: nothing else in it is built or run."""
    with open(Path(path) / ".metadata", "rb") as file:
        return MetadataUnpickler(file).load()


# What DCP's index of tensors is made of.
METADATA_CLASSES = {
    "pathlib": "PosixPath WindowsPath",
    "torch": "Size",
    "torch.serialization": "_get_layout",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed.checkpoint.metadata": "ChunkStorageMetadata Metadata MetadataIndex "
    "StorageMeta TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
}


class MetadataUnpickler(pickle.Unpickler):
    """Refuses all else; an entry of bytes, too, which DCP would unpickle without restriction."""

    def find_class(self, module, name):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in METADATA_CLASSES.get(module, "").split():
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the checkpoint's metadata asks for {module}.{name}: refused")


def checkpoints_in(folder):
    """Paths of a run's checkpoints, by step. What a user has named otherwise is none."""
    return sorted(folder.glob("step-" + 8 * "[0-9]"))


def find_checkpoint(out, resume, identity):
    """The checkpoint that a run in `out` goes on from, or None if it is new.

    resume    None, or the path of a run or of one of its checkpoints to go on from instead
    identity  JSON-able dict of what decides the run's results: the checkpoint's must be the same
    Raises ValueError, one line, when it is not, or when `out` holds something that would be lost.
    """
    there, own = Path(out), checkpoints_in(Path(out, "checkpoints"))
    while not there.exists():  # what of `out` exists is where it will be made
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out {out}: {there} cannot be written to")
    config = Path(out, "config.json")
    config = config.read_text(errors="replace") if config.is_file() else ""
    for name in ("config.json", "metrics.jsonl"):
        if '"stage"' not in config and Path(out, name).exists():
            raise ValueError(f"{out} holds a {name} that is not ours: use another --out")
    if own and f'"resume": {json.dumps(resume)}' in config:
        resume = None  # the same command again: it has gone on from there before
    source = Path(resume or out)
    last, steps = source / "checkpoints" / "LATEST", checkpoints_in(source / "checkpoints")
    if (source / "state.json").is_file():
        paths = [source]
    elif steps:
        # Later ones than LATEST are of a former life of the run. Without it, the run was killed
        # between the renames of its first checkpoint and of LATEST.
        last = last.read_text(errors="replace").strip() if last.is_file() else ""
        last = last if re.fullmatch("step-[0-9]{8}", last) else steps[-1].name
        paths = {path for path in steps if path.name <= last} | {source / "checkpoints" / last}
        paths = sorted(paths, reverse=True)
    elif resume:
        raise ValueError(f"--resume {resume}: there is no checkpoint in it")
    elif Path(out, "model.pt").exists():
        raise ValueError(f"{out} holds a model.pt, but no checkpoints: use another --out")
    else:
        return None
    damaged = list(itertools.takewhile(bool, map(damage, paths)))
    for path, why in zip(paths, damaged):
        if os.environ.get("RANK", "0") == "0":
            print(f"DAMAGED CHECKPOINT: {path}: {why}", file=sys.stderr)
    if len(damaged) == len(paths):
        why = f"{len(paths)} checkpoints, and none is whole: mend one, or use another --out"
        raise ValueError(f"{source} holds {why}")
    path = paths[len(damaged)]
    found = json.loads((path / "state.json").read_text())["identity"]
    identity = json.loads(json.dumps(identity))  # tuples become lists, as they did in the file
    # Runs from before there was a norm_eps had this one.
    base = {"model": None, "norm_eps": 1e-6}
    was, now = ({**facts, **base, **facts.get("model", {})} for facts in (found, identity))
    changed = [f"{k} was {was.get(k)}, is {v}" for k, v in now.items() if was.get(k) != v]
    if changed:
        raise ValueError(f"{path} is of another run ({'; '.join(changed)}): use another --out")
    elsewhere = path.parent.resolve() != (Path(out) / "checkpoints").resolve()
    if elsewhere and (own or Path(out, "model.pt").exists()):
        raise ValueError(f"{out} holds a run of its own: use another --out, or leave --resume out")
    return path


def damage(path):
    """What is wrong with a checkpoint, as far as the sizes of its files tell, or None."""
    try:
        record = json.loads((path / "state.json").read_text())
        for name, size in record["files"].items():
            if (found := (path / name).stat().st_size) != size:
                return f"{name} has {found} bytes, not {size}"
        return None if "identity" in record else "its state.json does not say of what run it is"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its state.json cannot be read ({error!r})"


def begin_run(out, config, checkpoint=None, step=0):
    """Make the folder `out`, its config.json, and metrics.jsonl.

    Of the latter, the lines of the checkpoint's run up to its step are kept, if there is one. One
    process calls it. Raises ValueError when nothing can be written there.
    """
    out, lines = Path(out), []
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock(out)
        if checkpoint and checkpoint.parent.resolve() == (out / "checkpoints").resolve():
            # It may be an earlier one: from now on, it is the run's last. (Before config.json says
            # that the run has gone back to it: see find_checkpoint.)
            write_file(out / "checkpoints" / "LATEST", checkpoint.name)
        write_file(out / "config.json", json.dumps(config, indent=1))
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written to: {error}") from None
    if checkpoint:
        source = Path(checkpoint).parent.parent / "metrics.jsonl"
        lines = source.read_text(errors="replace").splitlines() if source.is_file() else []
    try:  # a line that a kill cut short does not end in a brace
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source} is damaged ({error!r}): mend it, or move it away") from None
    write_file(out / "metrics.jsonl", "".join(f"{line}\n" for line in kept))


LOCKS = []  # open files: closing one would give its lock up


def lock(folder):
    """Keep other processes from running in a folder until this one ends, however it ends.

    What is left of a killed torchrun may train on for a while: a run beside it would lose lines of
    metrics and checkpoints. A POSIX lock belongs to the process alone, not to its loader workers.
    """
    try:
        import fcntl
    except ImportError:  # on Windows
        return

    LOCKS.append(open(folder / ".lock", "w"))  # noqa: SIM115
    try:
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        why = f"another process is running in {folder}: wait for it, stop it, or use another --out"
        raise ValueError(why) from None
    except OSError as error:  # some network file systems have no locks
        print(f"{folder} cannot be locked ({error.strerror}): start no other run in it meanwhile")


def write_file(path, content):
    """Replace a file by a text, or by tensors: whole or not at all, whatever happens meanwhile."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    with open(temporary, "wb") as file:
        try:
            file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
        except RuntimeError as error:  # as torch.save calls a full disk
            raise OSError(f"cannot write {path}: {last_line(error)}") from None
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if sys.platform != "win32":  # names are stored in the folder: it has to be synced as well
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def check_agreement(facts):
    """ValueError where a process sees other facts (a JSON-able dict) than the first one."""
    seen = [facts]
    if dist.is_initialized():
        seen = [None] * dist.get_world_size()
        dist.all_gather_object(seen, facts)
    for process, others in enumerate(seen):
        for name, fact in seen[0].items():
            if others[name] != fact:
                where = f"process {process} finds {name} {others[name]}, the first one {fact}"
                raise ValueError(f"{where}: all nodes want the same command, --data and --out")


def set_timeouts(minutes):
    """Give up on a process that has not answered for so long. (One that dies is noticed at once.)

    As they start, some compile or read weights while others wait; after that, it has to be longer
    than the data's patience. There is no public name for this in PyTorch.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        if group.group_desc != "checkpoints":  # which may take their time
            dist.distributed_c10d._set_pg_timeout(timedelta(minutes=minutes), group)


def is_lost(error):
    """Whether an error says that another process has died, or was never met."""
    said = isinstance(error, RuntimeError) and "gloo" in str(error)  # it has no class of its own
    return said or isinstance(error, dist.DistError)


def verdict(error):
    """(what to say, exit status, whether this process alone knows) of what ended a run.

    What is neither in what was given nor in the machine is a mistake of ours, and raised again.
    """
    if is_lost(error):
        why = f"another process is gone, or was never met ({last_line(error):.120})"
        return f"{why}: the same command goes on from the last checkpoint", 1, False
    if isinstance(error, ValueError | OSError):
        return error, 2 if isinstance(error, ValueError) else 1, isinstance(error, OSError)
    raise error


# ------------------------------------------------------------------------------ python model.py ...


def main(argv=None):
    parser = argparse.ArgumentParser("model.py", allow_abbrev=False, description="Weights.")

    def fail(message, status=2):
        print(f"model.py: {message}", file=sys.stderr)
        sys.exit(status)

    parser.error = lambda message: fail(f"{message} (--help lists all)")
    add = parser.add_argument
    add("command", choices=["convert"], help="write weights as another library reads them")
    add("source", metavar="IN", help="a model.pt, a public checkpoint, a Hugging Face folder")
    add("out", metavar="OUT", help="a new file; for hf, a new folder")
    add("--format", required=True, choices=("timm", "hf", "own"), help="of OUT")
    add("--heads", type=int, help="of an IN whose size is unknown")
    add("--image-size", type=pair, help="of an IN whose positions are no square: HEIGHTxWIDTH")
    add("--entry", help="of an IN with several networks: state_dict_ema, or a prefix of names")
    run = parser.parse_args(argv)
    try:
        of_source = run.heads, run.image_size, run.entry
        line = convert(run.source, run.out, run.format, *of_source)
    except (ValueError, OSError) as error:
        fail(error, 2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        fail("stopped", 130)
    print(f"wrote {run.out}. To load it:\n{line}")


if __name__ == "__main__":
    main()
