"""facebookresearch/mae as something to compare with: its model, without timm.

`build_peer` needs a checkout of that repository, of which it imports models_mae.py and
util/pos_embed.py. The classes here stand in for what they take from timm 0.3.2.
"""

import sys
import types
from functools import partial
from unittest.mock import patch

import common  # noqa: F401 (the path of the modules below)
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import get_total_norm

from data import normalize
from model import Attention, Mlp, load_weights


class PatchEmbed(nn.Module):
    def __init__(self, image_size, patch_size, channels, width):
        super().__init__()
        self.patch_size, self.num_patches = (patch_size,) * 2, (image_size // patch_size) ** 2
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class PeerAttention(Attention):
    fused = False  # True: F.scaled_dot_product_attention

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each (B, heads, N, D / heads)
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
        self.mlp = Mlp(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def build_peer(checkout, ours):
    """The public code's model of the same architecture as `ours`, an MAE."""
    vision = types.ModuleType("timm.models.vision_transformer")
    vision.PatchEmbed, vision.Block = PatchEmbed, PeerBlock
    sys.modules.update({"timm": vision, "timm.models": vision, vision.__name__: vision})
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    np.float = float  # its position table is older than numpy 1.24
    import models_mae

    return models_mae.MaskedAutoencoderViT(
        *(ours.config["image_size"][0], ours.patch_size, ours.config["channels"]),
        *(ours.width, ours.layers, ours.heads, *ours.config["decoder"]),
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        norm_pix_loss=True,
    )


def peer_step(model, optimizer, images, fused, compile, check):
    """A function that takes a step in bf16 autocast. check gets (2,): loss and gradient norm."""
    kind = images.device.type
    forward = torch.compile(model, dynamic=False) if compile else model

    def step():
        PeerAttention.fused = fused
        with torch.autocast(kind, torch.bfloat16):
            loss, _, _ = forward(normalize(images))
        loss.backward()
        norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        check(torch.stack([loss.detach(), norm]).cpu())
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def check_same_loss(ours, peer, images, noise):
    """Load the peer's weights into ours. Raise SystemExit if the losses differ.

    images (B, 3, H, W) uint8; noise (B, N): what the peer draws, and sorts to choose
    its masks.
    """
    load_weights(ours, peer.state_dict())
    images = normalize(images)
    with patch("torch.rand", return_value=noise):
        expected = peer(images)[0].item()
    loss = ours(images, noise.argsort(dim=1)).mean().item()
    if abs(loss - expected) > 1e-5 * expected:
        raise SystemExit(f"the losses differ: {loss} and {expected}")
