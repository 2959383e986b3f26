"""The Vision Transformer, the masked autoencoder, and their preparation for training.

    ViT               encoder: patches, class token, pre-norm blocks, final norm
    MAE               the encoder and a small decoder that predicts the hidden patches
    Classifier        the encoder and a linear head; tag_loss for hashtags
    initialize        draws each parameter from a generator keyed by its name
    parameter_groups  parameters with and without weight decay
    parallelize       cast -> activation checkpointing -> compile -> shard or replicate
    read_weights, load_weights, save_weights       model.pt and public checkpoints
    python model.py convert IN OUT --format ...    from and to timm and Hugging Face

Tensors: B batch, C channels, H W image, P patch side, N patches, K visible patches,
D width, L layers. Parameter names are timm's and the public MAE's (facebookresearch/mae),
so that their weights load by name. This file needs torch and kernels.py alone.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import warnings
import zipfile
from functools import lru_cache, partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import kernels

# name: (width, layers, heads, patch side). B to 6.5B: table 8 of arXiv 2303.13496, maws
# repository. T, S: DeiT (arXiv 2012.12877). toy: our choice, for laptops and tests.
SIZES = {
    "toy": (128, 3, 4, 8),
    "T": (192, 12, 3, 16),
    "S": (384, 12, 6, 16),
    "B": (768, 12, 12, 16),
    "L": (1024, 24, 16, 16),
    "H": (1280, 32, 16, 14),
    "2B": (2560, 24, 32, 14),
    "6.5B": (4096, 32, 32, 14),
}
# (width, layers, heads) of the MAE decoder. B's is used for all sizes not listed here:
# public code (MAE) for L and H; unverified for 2B and 6.5B.
DECODERS = {"toy": (128, 2, 4), "T": (256, 4, 8), "B": (512, 8, 16)}


class Unusable(argparse.ArgumentTypeError, ValueError):
    """A ValueError whose message argparse prints unchanged."""


def architecture(size):
    """(width, layers, heads, patch side) of a name in SIZES or of "192x6x3" (patch 16)."""
    wanted = f"one of {', '.join(SIZES)}, or WIDTHxLAYERSxHEADS"
    return SIZES[size] if size in SIZES else (*triple(size, wanted), 16)


def triple(text, wanted="WIDTHxLAYERSxHEADS"):
    """ "192x6x3" -> (192, 6, 3). Raises Unusable with `wanted` in its message."""
    try:
        width, layers, heads = (int(number) for number in text.split("x"))
    except ValueError:
        raise Unusable(f"size {text!r} is unknown: it must be {wanted}") from None
    if min(width, layers, heads) < 1 or width % (4 * heads):
        raise Unusable(f"size {text!r}: the width must be a multiple of 4 x heads")
    if width > 2**16 or layers > 999:  # a typing error or a damaged config
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


# ---------------------------------------------------------------- patches and positions


def patchify(images, patch_size):
    """(B, C, H, W) -> (B, N, P*P*C): patches row by row, each flattened as (P, P, C)."""
    (B, C, H, W), P = images.shape, patch_size
    patches = images.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(B, (H // P) * (W // P), P * P * C)


def take(tokens, ids):
    """tokens (B, N, D), ids (B, K) integers below N -> (B, K, D)."""
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


def sincos_positions(width, grid):
    """Fixed sine-cosine table, (1, 1 + rows * columns, width) fp32; the class row is 0.

    The first half of the channels encodes the column, the second half the row. Each half
    has sines, then cosines, of wavelengths from 2 pi to 20,000 pi (public code: MAE).
    """
    count = partial(torch.arange, dtype=torch.float64)
    frequencies = 10000.0 ** -(count(width // 4) / (width // 4))
    angles = [count(n)[:, None] * frequencies for n in grid]  # (rows or columns, width / 4)
    rows, columns = (torch.cat([angle.sin(), angle.cos()], dim=1) for angle in angles)
    rows, columns = rows[:, None].expand(-1, grid[1], -1), columns.expand(grid[0], -1, -1)
    table = torch.cat([columns, rows], dim=2)  # (rows, columns, width)
    return F.pad(table.flatten(0, 1), (0, 0, 1, 0)).float()[None]


def resample_positions(table, old_grid, new_grid):
    """Resample (1, 1 + N, D) to another (rows, columns), bicubic, but not the class row."""
    row, table = table[:, :1], table[:, 1:]
    table = table.transpose(1, 2).unflatten(2, old_grid).float()  # (1, D, rows, columns)
    table = F.interpolate(table, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([row, table.flatten(2).transpose(1, 2).to(row.dtype)], dim=1)


# -------------------------------------------------------------------------- the encoder


class Attention(nn.Module):
    """Multi-head self-attention. Tokens before `first_query` are keys and values only."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, first_query=0):
        x = kernels.attention(self.qkv(x), self.heads, first_query)  # (B, N - first_query, D)
        return self.proj(x)


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block. It returns the tokens from `first_query` on."""

    one_length = True  # False: inputs have many lengths, and the block is not compiled

    def __init__(self, width, heads, norm_eps=1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, norm_eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, norm_eps)
        self.mlp = Mlp(width)

    def forward(self, x, first_query=0, scales=None):
        """(B, N, D) -> (B, N - first_query, D). scales (B, 2) or None: see branch_scales."""
        branch = self.attn(self.norm1(x), first_query)
        x = x[:, first_query:] + (branch if scales is None else branch * scales[:, :1, None])
        branch = self.mlp(self.norm2(x))
        return x + (branch if scales is None else branch * scales[:, 1:, None])


def branch_scales(noise, drop_path, dtype):
    """Stochastic depth (arXiv 1603.09382): noise (B, L, 2) -> factors (B, L, 2).

    noise is uniform in [0, 1). The rate of block i is drop_path * i / (L - 1). The factor of
    a branch is 0 if its noise is below the rate, else 1 / (1 - rate).
    """
    layers = noise.shape[1]
    # Made on the device: Python numbers would be copied from the host at each step.
    rates = torch.arange(layers, dtype=noise.dtype, device=noise.device)  # (L,)
    rates = rates * (drop_path / max(1, layers - 1))
    return ((noise >= rates[:, None]) / (1 - rates[:, None])).to(dtype)


class ViT(nn.Module):
    """Vision Transformer encoder.

    size        a name in SIZES or "WIDTHxLAYERSxHEADS"
    image_size  side, or (height, width), in pixels; multiples of the patch side
    patch_size  in pixels; default: see SIZES
    channels    of the image: 1, 3, 4, 10, ...
    positions   "sincos" (fixed, as in MAE) or "learned"
    drop_path   stochastic-depth rate of the last block; the rates rise linearly from 0
    norm_eps    of every LayerNorm: 1e-6 is that of timm and the public MAE

    Raises ValueError if the patch does not divide the image.
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
        if H % P or W % P:
            height, width = (max(P, round(side / P) * P) for side in (H, W))
            raise ValueError(
                f"image size {H}x{W} is not divisible by patch {P}: "
                f"the nearest that is: {height}x{width}"
            )
        if positions not in ("sincos", "learned"):
            raise ValueError(f"positions {positions!r} are unknown: 'sincos' or 'learned'")
        self.config = {"size": size, "image_size": [H, W], "patch_size": P}
        self.config |= {"channels": channels, "positions": positions, "norm_eps": norm_eps}
        self.width, self.layers, self.heads, self.patch_size = width, layers, heads, P
        self.drop_path, self.input_shape = drop_path, (channels, H, W)
        self.init_std = {}  # {name of a parameter: standard deviation}: see initialize
        self.grid = (H // P, W // P)
        self.num_patches = N = self.grid[0] * self.grid[1]
        # Used as a matrix, see embed(). The name and the kernel's shape are timm's.
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, width, P, stride=P)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + N, width), positions == "learned")
        self.blocks = nn.ModuleList(Block(width, heads, norm_eps) for _ in range(layers))
        self.norm = nn.LayerNorm(width, norm_eps)
        initialize(self)  # each subclass calls it again when it has all its parameters

    def check(self, images):
        """Raise ValueError if the model is built for another shape of images."""
        if tuple(images.shape[1:]) != self.input_shape:
            wanted = ", ".join(map(str, self.input_shape))
            raise ValueError(
                f"images have shape {tuple(images.shape)}, the model wants (B, {wanted}): "
                "build it with that image_size and channels"
            )

    def embed(self, patches):
        """Patches (B, N, P*P*C), as patchify returns them, -> (B, N, D)."""
        proj = self.patch_embed["proj"]
        # A patch is flattened as (P, P, C), but the kernel is stored as (C, P, P).
        weight = proj.weight.movedim(1, -1).flatten(1)  # (D, P*P*C)
        return F.linear(patches.to(weight.dtype), weight, proj.bias)

    def tokens(self, images):
        """The encoder's input: (B, C, H, W) float -> (B, 1 + N, D), class token first."""
        self.check(images)
        x = self.embed(patchify(images, self.patch_size))  # (B, N, D)
        return self.with_class_token(x + self.pos_embed[:, 1:])

    def with_class_token(self, x):
        """(B, n, D) -> (B, 1 + n, D)."""
        first = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([first, x], dim=1)

    def forward(self, images, noise=None):
        """Normalised images (B, C, H, W) float -> normed tokens, (B, 1 + N, D).

        noise (B, L, 2), uniform in [0, 1), is for stochastic depth: see branch_scales. The
        caller draws it for each sample, so that it does not depend on the batch.
        """
        return self.norm(self.encode(images, noise))

    def probe_features(self, images):
        """What a probe reads of images (B, C, H, W) while the model trains, (B, D)."""
        return pool(ViT.forward(self, images), "mean")  # MAE's class token is not trained

    def encode(self, images, noise=None):
        """forward without the final norm."""
        x = self.tokens(images)
        scales = [None] * self.layers
        if noise is not None and self.drop_path > 0:
            scales = branch_scales(noise, self.drop_path, x.dtype).unbind(1)  # (B, 2) each
        for block, scale in zip(self.blocks, scales):
            x = block(x, scales=scale)
        return x


def pool(tokens, how):
    """(B, 1 + N, D) -> (B, D): the class token ("cls") or the patches' mean ("mean")."""
    return tokens[:, 0] if how == "cls" else tokens[:, 1:].mean(dim=1)


# --------------------------------------------------------------- the masked autoencoder


class MAE(ViT):
    """Masked autoencoder (He et al., arXiv 2111.06377) on the same encoder.

    decoder            (width, layers, heads); default: see DECODERS
    mask_ratio         fraction of the patches that is hidden
    normalize_targets  True: predict patches normalised by their own mean and deviation.
                       False: predict raw pixels
    other arguments    see ViT

    ids (B, N) is each sample's random order of patches, of which the first K are visible.
    """

    def __init__(
        self, size="B", decoder=None, mask_ratio=0.75, normalize_targets=True, **arguments
    ):
        super().__init__(size, **arguments)
        decoder = decoder or DECODERS.get(size, DECODERS["B"])
        width, layers, heads = triple("x".join(map(str, decoder)))  # checks the numbers
        N, norm_eps = self.num_patches, self.config["norm_eps"]
        self.num_visible = int(N * (1 - mask_ratio))  # 49 of 196, 64 of 256
        if not 0 < self.num_visible < N:
            visible = f"{self.num_visible} of {N} patches visible"
            raise ValueError(f"mask ratio {mask_ratio} leaves {visible}: want 1 to {N - 1}")
        self.normalize_targets = normalize_targets
        self.config |= {"decoder": [width, layers, heads], "mask_ratio": mask_ratio}
        self.config["normalize_targets"] = normalize_targets
        self.decoder_embed = nn.Linear(self.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, 1 + N, width), False)
        blocks = (Block(width, heads, norm_eps) for _ in range(layers))
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(width, norm_eps)
        self.decoder_pred = nn.Linear(width, self.patch_size**2 * self.config["channels"])
        initialize(self)

    def forward(self, images, ids):
        """Normalised images (B, C, H, W) float -> each sample's loss, (B,)."""
        self.check(images)
        patches = patchify(images, self.patch_size)  # (B, N, P*P*C)
        x = self.forward_encoder(patches, ids)  # (B, 1 + K, D)
        predictions = self.forward_decoder(x, ids)  # (B, N - K, P*P*C)
        return self.forward_loss(patches, predictions, ids)

    def forward_encoder(self, patches, ids):
        """Encode the visible patches: (B, N, P*P*C) -> (B, 1 + K, D)."""
        visible = ids[:, : self.num_visible]  # (B, K)
        x = self.embed(take(patches, visible))  # (B, K, D)
        x = self.with_class_token(x + self.pos_embed[0, 1 + visible])  # (B, 1 + K, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_decoder(self, x, ids):
        """Predict hidden patches: (B, 1 + K, D) -> (B, N - K, P*P*C), as in ids[:, K:]."""
        visible, hidden = ids[:, : self.num_visible], ids[:, self.num_visible :]
        x = self.decoder_embed(x)  # (B, 1 + K, decoder width)
        # Attention does not depend on the order of tokens: they are not un-shuffled, but stay
        # as [class, visible, hidden]. Each gets its own position.
        positions = self.decoder_pos_embed[0]
        first = positions[:1].expand(len(x), 1, -1)
        x = x + torch.cat([first, positions[1 + visible]], dim=1)
        masked = self.mask_token + positions[1 + hidden]  # (B, N - K, decoder width)
        x = torch.cat([x, masked], dim=1)  # (B, 1 + N, decoder width)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        # Only hidden tokens are predicted. So in the last block only they have queries.
        x = self.decoder_blocks[-1](x, 1 + self.num_visible)  # (B, N - K, decoder width)
        return self.decoder_pred(self.decoder_norm(x))

    def forward_loss(self, patches, predictions, ids):
        """Mean squared error of each sample on its hidden patches, (B,)."""
        targets = take(patches, ids[:, self.num_visible :])  # (B, N - K, P*P*C)
        if self.normalize_targets:
            mean, deviation = patch_statistics(targets)
            targets = (targets - mean) / deviation
        return (predictions.to(targets.dtype) - targets).square().mean(dim=(1, 2))


def patch_statistics(patches):
    """(mean, deviation) of each patch, (B, N, 1) each; 1e-6 as in the public MAE code."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


# ----------------------------------------------------------------------- the classifier


class Classifier(ViT):
    """An encoder and a linear head on pooled tokens.

    classes      number of classes
    pool         "cls": the class token after the final norm (the released models).
                 "mean": fc_norm of the patches' mean, no final norm (MAE's finetuning)
    class_names  stored in the config with the weights
    head_std     standard deviation of the head's initial weights; 0 in SWAG
    other arguments: see ViT
    """

    large = ("head",)  # names of modules that are sharded by themselves, see shard()

    def __init__(
        self, size="B", classes=1000, pool="cls", class_names=None, head_std=0.0, **arguments
    ):
        super().__init__(size, **arguments)
        if pool not in ("cls", "mean"):
            raise ValueError(f"pool {pool!r} is unknown: 'cls' or 'mean'")
        self.config |= {"classes": classes, "pool": pool, "class_names": class_names}
        self.classes, self.init_std = classes, {"head.weight": head_std}
        self.fc_norm = nn.Identity()
        if pool == "mean":
            self.fc_norm, self.norm = self.norm, nn.Identity()
        self.head = nn.Linear(self.width, classes)
        initialize(self)

    def forward(self, images, noise=None):
        """(B, classes) logits of (B, C, H, W) normalised images. noise: see ViT."""
        return self.head(self.features(images, noise))

    def features(self, images, noise=None):
        """The head's input, (B, D)."""
        return self.pooled(self.encode(images, noise))

    probe_features = features

    def pooled(self, x):
        """The last block's tokens (B, 1 + N, D) -> (B, D)."""
        return self.fc_norm(pool(self.norm(x), self.config["pool"]))


def tag_loss(logits, tags):
    """Softmax cross-entropy with target 1/k for each of a sample's k tags (paper, 3.3).

    logits (B, V), tags (B, T) int64, padded with -1 -> (B,) fp32. A sample without tags
    needs weight 0. No (B, V) target is made.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    known = tags >= 0
    picked = logits.gather(1, tags.clamp(min=0)) * known  # (B, T)
    return logits.logsumexp(dim=1) - picked.sum(dim=1) / known.sum(dim=1).clamp(min=1)


# ----------------------------------------------------------------------- initialisation


def initialize(model, seed=0):
    """Fill every parameter from a generator keyed by (seed, its name), in place.

    So a value depends neither on the order of modules nor on the number of processes.
    Constructors call it. A model that is built on the meta device, which holds no values,
    is initialised after parallelize(). Values: public code (MAE), except that the bias of
    the patch embedding is 0.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            key = int.from_bytes(digest[:8], "little") >> 1
            generator = torch.Generator().manual_seed(key)
            copy_into(parameter, initial_value(model, name, parameter, generator))


@torch.no_grad()
def copy_into(parameter, value):
    """Copy a full tensor into a parameter, or into this process's shard of it."""
    if hasattr(parameter, "device_mesh"):
        layout = parameter.device_mesh, parameter.placements
        # None: nothing is sent, as every process has the full value.
        value = dist.tensor.distribute_tensor(value, *layout, src_data_rank=None)
    parameter.copy_(value)


def initial_value(model, name, parameter, generator):
    """The CPU tensor for the parameter of this name; model.init_std overrides the rules."""
    shape = parameter.shape
    normal = partial(torch.randn, shape, generator=generator)
    if name in model.init_std:
        return normal() * model.init_std[name]
    if name.endswith("pos_embed") and not parameter.requires_grad:
        return sincos_positions(shape[-1], model.grid)
    if name.endswith("time_embed") or ".rel_pos_" in name:
        return torch.zeros(shape)
    if name.endswith(("pos_embed", "_token", "embedding.weight")):
        return normal() * 0.02
    if name == "logit_scale":  # maws repository
        return torch.full(shape, math.log(1 / 0.07))
    if parameter.ndim == 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
    bound = math.sqrt(6 / (shape[0] + shape[1:].numel()))  # Xavier: fan-in plus fan-out
    return torch.rand(shape, generator=generator) * (2 * bound) - bound


# -------------------------------------------------------------- optimizer and processes


def parameter_groups(model, weight_decay):
    """Groups of an optimizer: decay for matrices and tokens, none for 1-D (timm)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def parallelize(
    model,
    device,
    shard_group=None,
    precision="fp32",
    compile=False,
    checkpoint_activations=False,
    methods=(),
):
    """Prepare a model for training, in place; return the module that a step calls.

    1. One process: the model itself.
    2. Several processes, shard_group None: DistributedDataParallel around the model. Each
       process has a replica, and gradients are averaged.
    3. shard_group N: the model itself. Parameters, gradients and optimizer state are
       split over N neighbouring processes (FSDP2); each such group has a copy (HSDP).

    precision   of the computation: "fp32" or "bf16". Parameters and gradients stay fp32
    compile     torch.compile: in 1 and 2, an MAE or classifier as one graph; else blocks
    checkpoint_activations    blocks keep their inputs; backward computes the rest again
    methods     names of methods beside forward that are called from outside

    A model on the meta device gets its memory here, after sharding: no process ever holds
    more than its shard. Call initialize() then. Parameter names do not change.
    """
    sharded = shard_group is not None
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if precision == "bf16" and not sharded:
        for module in blocks:
            cast_weights(module)
        for method in ("forward", *methods):
            cast_weights(model, method)
    if checkpoint_activations:
        # After the cast: the recomputation casts again. Blocks draw no random numbers, and
        # a CUDA graph must not record the reading of the generator's state.
        options = {"use_reentrant": False, "preserve_rng_state": False}
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, **options)
    if compile:
        one_graph = isinstance(model, MAE | Classifier) and not sharded
        for module in [model] if one_graph else [b for b in blocks if b.one_length]:
            compile_training(module)
    if sharded:
        shard(model, device, shard_group, precision, methods)
    if next(model.parameters()).is_meta:
        model.to_empty(device=device)
    if sharded or not dist.is_initialized() or dist.get_world_size() == 1:
        return model
    return replicate(model)


def cast_weights(module, method="forward"):
    """Make a method of a module compute with its weights cast to bf16.

    Loss and gradients are bit for bit those of FSDP2's bf16 policy. The cast is part of
    the graph: gradients arrive at the fp32 weights in fp32. Blocks cast their own weights.
    """
    # functional_call runs only `forward`. So `caller` has the plain method as its forward,
    # and the module gets the method that casts.
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
    """Compile a module's forward in place, but not for evaluation."""
    plain = module.forward
    compiled = torch.compile(plain, dynamic=False)  # all training batches have one shape

    def forward(*inputs, **named):
        return (compiled if module.training else plain)(*inputs, **named)

    module.forward = forward


def shard(model, device, shard_group, precision, methods=()):
    """Split a model over groups of processes, in place (FSDP2): see parallelize."""
    from torch.distributed import fsdp

    # Inputs are not cast: MAE computes its targets from the images in fp32, and drop path
    # compares its random numbers with the rates.
    param_dtype = torch.bfloat16 if precision == "bf16" else None
    policy = fsdp.MixedPrecisionPolicy(param_dtype, torch.float32, cast_forward_inputs=False)
    mesh = sharding_mesh(device.type, shard_group, dist.group.WORLD)
    # A head of 28,000 hashtags is as large as several blocks. With the root it would be
    # gathered first and freed last.
    for name, module in model.named_modules():
        if isinstance(module, Block) or name in getattr(model, "large", ()):
            fsdp.fully_shard(module, mesh=mesh, mp_policy=policy)
    fsdp.fully_shard(model, mesh=mesh, mp_policy=policy)
    for method in methods:
        fsdp.register_fsdp_forward_method(model, method)


@lru_cache(1)  # each call would make new process groups
def sharding_mesh(kind, shard_group, everyone):
    """Mesh of (copies of the model, processes that share one); with one copy, of these alone."""
    names, shape = ("replicate", "shard"), (everyone.size() // shard_group, shard_group)
    if shape[0] == 1:
        names, shape = names[1:], shape[1:]
    return dist.init_device_mesh(kind, shape, mesh_dim_names=names)


def replicate(model, bucket_mb=100):
    """DistributedDataParallel around a model: see parallelize.

    Gradients are sent during backward in buckets of bucket_mb. torch.compile splits its
    graph at each bucket: PyTorch's 25 MB would be a hundred graphs for H (unverified).
    """
    # Gradients (1, 1, D) and their buckets differ in the strides of dimensions of size 1.
    warnings.filterwarnings("ignore", message="Grad strides do not match")
    # Without static_graph: it fails if the first backward does not reduce.
    replica = nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view=True, bucket_cap_mb=bucket_mb
    )
    # After its first backward DDP sorts its buckets by the order of arrival, which changes
    # sums of three processes: a resumed run would differ. So the first one trains nothing.
    trained, forward = [p for p in model.parameters() if p.requires_grad], model.forward
    model.forward = lambda: sum(parameter.sum() for parameter in trained)
    replica().backward()
    model.forward = forward
    model.zero_grad()
    return replica


def sync_gradients(model, last):
    """Context of a micro-batch: gradients are averaged over processes in the last one."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not last:
        return model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


# ------------------------------------------------------------------------------ weights


def local(tensor):
    """This process's shard of a tensor, in the same memory; else the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full_tensor(tensor):
    """A tensor, gathered if it is sharded: then every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_state(model):
    """{name: full fp32 CPU tensor} on the first process, {} on others. All must call it."""
    state, first = {}, not dist.is_initialized() or dist.get_rank() == 0
    for name, tensor in model.state_dict().items():
        tensor = full_tensor(tensor)
        if first:
            state[name] = tensor.detach().float().cpu()
    return state


def save_weights(path, state, config):
    """Write model.pt, {"model": {name: tensor}, "config": dict}: all of it or nothing.

    Raises OSError if it cannot be written, TypeError if the config is not JSON-able.
    """
    json.dumps(config)
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        try:
            torch.save({"model": state, "config": config}, file)
        except RuntimeError as error:  # torch.save raises it when the disk is full
            raise OSError(f"cannot write {path}: {error}") from None
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_weights(path, heads=None, image_size=None, entry=None):
    """Read a ViT, an MAE, a classifier or a pair of towers: ({our name: tensor}, config).

    A model.pt of ours is read here, everything else by read_public in support/formats.py,
    which describes heads, image_size and entry. The first process prints what was read.
    Raises ValueError or OSError, one line, if nothing usable is found.
    """
    torch_file = str(path).endswith((".pt", ".pth")) and not os.path.isdir(path)
    content = load_file(path) if torch_file and entry is None else None
    match content:
        case {"model": {"patch_embed.proj.weight": _} as state, "config": {"size": _} as config}:
            model = check_weights(path, state, config, heads)
            if os.environ.get("RANK", "0") == "0":
                print(f"{path}: our own {type(model).__name__}")
            return state, config
    from support.formats import read_public

    return read_public(path, heads, image_size, entry)


def load_file(path):
    """Tensors and plain values that torch.save wrote. No code runs from the file.

    Raises ValueError, one line, if there is no such file, or anything else in it.
    """
    if not os.path.isfile(path):
        raise ValueError(f"no weights at {path}: give a model.pt or a public checkpoint")
    try:
        # The public MAE code stores its arguments, plain values in a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            mapped = zipfile.is_zipfile(path)  # the processes of a machine share one copy
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # noqa: BLE001 (torch.load reports damage in a dozen ways)
        reason = f"{type(error).__name__}: damaged, or more than tensors and plain values"
        if refused := re.search(r"GLOBAL (\S+)", str(error)):  # one of ten lines
            reason = f"torch refuses the {refused[1]} in it: save tensors and values only"
        message = f"cannot read weights from {path} ({reason}): nothing was run"
        raise ValueError(message) from None


def check_weights(path, state, config, heads=None):
    """Build the model of a config on the meta device, load the tensors into it; return it.

    There a damaged config takes no memory. Raises ValueError, one line about `path`, if
    config and tensors do not fit: see load_weights.
    """
    Kind = MAE if "decoder" in config else Classifier if "classes" in config else ViT
    if "text" in config:
        from tasks.lit import TwoTowers as Kind
    if "frames" in config:
        from tasks.video import VideoClassifier as Kind
    arguments = {name: value for name, value in config.items() if name != "val_crop"}
    with one_line_errors(path), torch.device("meta"):
        model = Kind(**arguments | encoder_config(config))
        load_weights(model, state, model.grid, keep_head=True)
    if heads not in (None, model.heads):
        raise ValueError(f"{path} has {model.heads} heads: leave --heads {heads} out")
    return model


def encoder_config(config):
    """The part of a config that a plain ViT is built from."""
    keys = ("size", "image_size", "patch_size", "channels", "positions")
    return {key: config[key] for key in keys} | {"norm_eps": config.get("norm_eps", 1e-6)}


@contextlib.contextmanager
def one_line_errors(path):
    """Turn errors of odd tensors or configs into a ValueError of one line about a file."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, RuntimeError, LookupError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error).strip()
        reason = (reason or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be used: {reason:.300}") from None


# Parts that a file or a model may have alone, and those that only a model of clips has.
OPTIONAL = {"head", "fc_norm", "text", "image_projection", "text_projection", "logit_scale"}
OPTIONAL |= {"mask_token", "decoder_embed", "decoder_pos_embed"}
OPTIONAL |= {"decoder_blocks", "decoder_norm", "decoder_pred"}
IN_TIME = {"time_embed", "rel_pos_t", "rel_pos_h", "rel_pos_w"}


def load_weights(model, state, old_grid=None, keep_head=False):
    """Load tensors by our names into any of the models; return one line on the outcome.

    * Position tables of another grid (old_grid; None: a square) are resampled.
    * A patch embedding of pictures is inflated to clips: half of it for each frame of two.
    * OPTIONAL parts that only the file has are dropped, and any head without keep_head.
      Those that only the model has keep their initial values.

    Raises ValueError, and changes nothing, if anything else is missing or does not fit.
    """
    own, resampled, notes = model.state_dict(), [], []
    if "fc_norm.weight" in state and "norm.weight" in own:
        # A classifier that pools the mean calls its last norm fc_norm.
        state = {n.replace("fc_norm.", "norm."): tensor for n, tensor in state.items()}
        notes.append("norm from fc_norm")
    unwanted = () if keep_head else ("head",)
    used = {n: t for n, t in state.items() if n in own and part_of(n) not in unwanted}
    new, dropped = [n for n in own if n not in used], [n for n in state if n not in used]
    droppable = OPTIONAL | ({"norm"} if "fc_norm.weight" in own else set())
    problems = [f"{n} is missing" for n in new if part_of(n) not in OPTIONAL | IN_TIME]
    problems += [f"{n} is unknown" for n in dropped if part_of(n) not in droppable]
    for name, tensor in used.items():
        wanted = own[name].shape
        if name.endswith("pos_embed") and tensor.ndim == 3:
            N = tensor.shape[1] - 1
            # 8x2 has as many positions as 4x4: only old_grid tells them apart.
            square = model.grid if N == math.prod(model.grid) else (math.isqrt(N),) * 2
            grid = tuple(old_grid or square)
            if grid != model.grid and N == math.prod(grid):
                tensor = resample_positions(tensor, grid, model.grid)
                resampled.append("{} from {}x{} to {}x{}".format(name, *grid, *model.grid))
        if tensor.ndim == 4 and len(wanted) == 5:
            tensor = tensor[:, :, None].expand(-1, -1, 2, -1, -1) / 2
            notes.append("patch_embed.proj inflated from one frame to two")
        if tensor.shape != wanted:
            problems.append(f"{name} is {tuple(tensor.shape)}, wanted {tuple(wanted)}")
        if tensor.layout != torch.strided or tensor.is_meta:
            problems.append(f"{name} is sparse, or a shape without numbers")
        used[name] = tensor
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"the weights do not fit the model: {'; '.join(problems[:3])}{more}")
    for name, tensor in used.items():
        copy_into(own[name], tensor)

    line = f"weights: {len(used)} tensors loaded"
    if "pos_embed" in used and not resampled:
        line += ", positions as they were"
    lists = {"resampled": resampled, "newly initialised": sorted({*map(part_of, new)})}
    lists["dropped"] = sorted({*map(part_of, dropped)})
    notes = [f"{title}: {', '.join(names)}" for title, names in lists.items() if names] + notes
    return "; ".join([line, *notes])


def part_of(name):
    """The first word of a tensor's name; the last one of a block's relative positions."""
    return name.split(".")[-1 if ".rel_pos_" in name else 0]


if __name__ == "__main__":
    from support.convert import main

    main()
