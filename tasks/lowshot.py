"""A few labelled pictures of each class: visual prompts (VPT) and logistic regression."""

import math

import torch
import torch.nn.functional as F
from torch import nn

import data


def few_shot_split(labels, shots, seed):
    """Indices of `shots` samples of each class (all of a class that has fewer), decided by seed."""
    shuffled = torch.from_numpy(data.permutation(len(labels), seed, 0, 0, data.SPLIT))
    return torch.cat([shuffled[labels[shuffled] == c][:shots] for c in labels.unique()])


LOWSHOT_RATES = (1e-3, 4e-3, 1.6e-2)  # of AdamW (ours: the paper's optimizer is unknown)


PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # L2 of logistic regression (ours)


SEEDS = range(5)  # draws of the low-shot pictures (paper, section 4.4)


class Prompted(nn.Module):
    """VPT, deep: every block of a frozen encoder gets fresh prompts beside its tokens.

    8 prompts of width 192 for each layer (recalled of the paper), brought to the encoder's width by
    one linear map (VPT's code: uniform prompts, bound sqrt(6 / (3 P^2 + d))); a linear head on what
    is pooled. Only these are trained.
    """

    PROMPTS, PROMPT_WIDTH = 8, 192

    def __init__(self, trunk, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shape = trunk.layers, self.PROMPTS, self.PROMPT_WIDTH
        bound = math.sqrt(6 / (3 * trunk.patch_size**2 + self.PROMPT_WIDTH))
        self.prompts = nn.Parameter((2 * torch.rand(shape, generator=generator) - 1) * bound)
        bound = math.sqrt(6 / (self.PROMPT_WIDTH + trunk.width))
        weight = (2 * torch.rand(trunk.width, shape[2], generator=generator) - 1) * bound
        self.project = nn.Linear(self.PROMPT_WIDTH, trunk.width)
        self.head = nn.Linear(trunk.width, trunk.classes)
        with torch.no_grad():
            self.project.weight.copy_(weight)
            for zero in (self.project.bias, self.head.weight, self.head.bias):
                zero.zero_()
        self.trunk = trunk.requires_grad_(False)

    def forward(self, images, noise=None):
        """(B, C, H, W) -> logits (B, 1, classes)."""
        x = self.trunk.tokens(images)  # (B, 1 + N, D)
        for block, prompts in zip(self.trunk.blocks, self.project(self.prompts)):
            prompts = prompts.expand(len(x), -1, -1)
            x = block(torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1))
            x = torch.cat([x[:, :1], x[:, 1 + self.PROMPTS :]], dim=1)
        return self.head(self.trunk.pooled(x))[:, None]


def logistic_scores(x, y, on, classes, penalty):
    """Scores (m, classes) of features `on` (m, D) by multinomial logistic regression on x (n, D).

    As MSN's: features centred and of unit length, no intercept, the mean loss plus penalty / 2
    times the squared weights.
    """
    x, on, centre = x.double(), on.double(), x.double().mean(dim=0)
    x, on = F.normalize(x - centre), F.normalize(on - centre)
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight], max_iter=500, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight.T, y) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return (on @ weight.T).detach()
