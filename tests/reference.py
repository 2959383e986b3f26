"""The transformer and MAE by their definitions, one step after the other: what model.py must equal.

All take weights by name, as model.state_dict() has them, and work in the weights' precision.
"""

import itertools
import math

import torch
import torch.nn.functional as F


def reference_norm(x, weights, name):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    x = (x - mean) / torch.sqrt(variance + 1e-6)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def reference_linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def reference_attention(x, weights, name, heads):
    """The branch and its attention (B, heads, N, N), one head after the other."""
    width = x.shape[-1]
    size = width // heads
    qkv = reference_linear(x, weights, f"{name}.qkv")
    outputs, maps = [], []
    for head in range(heads):
        start = head * size
        q, k, v = (qkv[..., i * width + start : i * width + start + size] for i in range(3))
        scores = torch.exp(q @ k.transpose(1, 2) / math.sqrt(size))
        maps.append(scores / scores.sum(-1, keepdim=True))
        outputs.append(maps[-1] @ v)
    return reference_linear(torch.cat(outputs, -1), weights, f"{name}.proj"), torch.stack(maps, 1)


def reference_mlp(x, weights, name):
    x = reference_linear(x, weights, f"{name}.fc1")
    x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return reference_linear(x, weights, f"{name}.fc2")


def reference_blocks(x, weights, name, heads, gates=None):
    """All blocks of a prefix; gates (B, L, 2) scale the branches. Returns x and the last map."""
    for layer in range(len({n.split(".")[1] for n in weights if n.startswith(f"{name}.")})):
        block = f"{name}.{layer}"
        gate = (1, 1) if gates is None else gates[:, layer].T[..., None, None]
        branch, attention = reference_attention(
            reference_norm(x, weights, f"{block}.norm1"), weights, f"{block}.attn", heads
        )
        x = x + gate[0] * branch
        branch = reference_mlp(
            reference_norm(x, weights, f"{block}.norm2"), weights, f"{block}.mlp"
        )
        x = x + gate[1] * branch
    return x, attention


def reference_embedding(weights, images):
    """Patches as tokens with their positions, (B, N, D), from a real convolution."""
    weight = weights["patch_embed.proj.weight"]
    x = F.conv2d(images, weight, weights["patch_embed.proj.bias"], stride=weight.shape[-1])
    return x.flatten(2).transpose(1, 2) + weights["pos_embed"][:, 1:]


def with_class_token(weights, x):
    first = weights["cls_token"] + weights["pos_embed"][:, :1]
    return torch.cat([first.repeat(len(x), 1, 1), x], 1)


def reference_patches(images, patch):
    """(B, N, P*P*C) by cutting out one patch after the other."""
    _, _, height, width = images.shape
    corners = itertools.product(range(0, height, patch), range(0, width, patch))
    cut = [images[:, :, y : y + patch, x : x + patch] for y, x in corners]
    return torch.stack([piece.permute(0, 2, 3, 1).flatten(1) for piece in cut], 1)


def normalized(patches):
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True, unbiased=True)
    return (patches - mean) / torch.sqrt(variance + 1e-6)


def public_mae(weights, images, ids, visible, heads, decoder_heads, normalize_targets):
    """Losses (B,) as in facebookresearch/mae: un-shuffled decoder, all tokens, times the mask."""
    restore = ids.argsort(1)
    hidden = (restore >= visible).to(images.dtype)  # (B, N), 1 is hidden

    def pick(x, order):
        return torch.stack([sample[row] for sample, row in zip(x, order)])

    x = with_class_token(weights, pick(reference_embedding(weights, images), ids[:, :visible]))
    x = reference_norm(reference_blocks(x, weights, "blocks", heads)[0], weights, "norm")
    x = reference_linear(x, weights, "decoder_embed")
    masks = weights["mask_token"].repeat(len(x), ids.shape[1] - visible, 1)
    unshuffled = pick(torch.cat([x[:, 1:], masks], 1), restore)
    x = torch.cat([x[:, :1], unshuffled], 1) + weights["decoder_pos_embed"]
    x = reference_blocks(x, weights, "decoder_blocks", decoder_heads)[0]
    x = reference_linear(reference_norm(x, weights, "decoder_norm"), weights, "decoder_pred")[:, 1:]
    targets = reference_patches(images, weights["patch_embed.proj.weight"].shape[-1])
    targets = normalized(targets) if normalize_targets else targets
    return ((x - targets).square().mean(-1) * hidden).sum(1) / hidden.sum(1)
