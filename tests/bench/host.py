"""CPU time of a training step whose kernels cost next to nothing: what a step costs the host.

    python tests/bench/host.py      # two minutes, and five more to fill the compiler's cache

An MAE of 12 + 8 tiny blocks takes steps as in mae_pretrain.py, with two images, on one
thread. What is left is dispatch. It does not depend on the width: a GPU that computes a
step in less time waits.

plain_fp32             eager, in fp32
public_autocast        the structure of the public MAE code (facebookresearch/mae) with PyTorch's
                       attention, eager, under bf16 autocast
one_process_eager      parallelize() for one process: weights cast to bf16
one_process_compiled   the same, the whole model compiled
replicas_compiled      the same in DistributedDataParallel, over one process, as five graphs
sharded_compiled       FSDP2 over one process with its bf16 policy, every block compiled

Each row has a process of its own, as in training: in a common one, replicas would find
the graph that was compiled for one process. The rows take turns of a few steps, and
figures are medians over the steps. Other programs on the machine change milliseconds
more than ratios. The last line is a JSON object: milliseconds of a step.
"""

import gc
import json
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import chain, pairwise

import common
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import model as models
from data import normalize

ROWS = ["plain_fp32", "public_autocast", "one_process_eager", "one_process_compiled"]
ROWS += ["replicas_compiled", "sharded_compiled"]
# A CPU without bf16 instructions takes long for a product of bf16 matrices, even of a
# width of 64.
SHAPE = {"size": "16x12x2", "decoder": (16, 8, 2), "image_size": 32, "patch_size": 8}
BATCH = 2


class PublicBlock(models.Block):
    def forward(self, x):
        B, N, D = x.shape
        qkv = self.attn.qkv(self.norm1(x)).reshape(B, N, 3, self.attn.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, D / heads) each
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # (B, N, heads, ...)
        x = x + self.attn.proj(attended.reshape(B, N, D))
        return x + self.mlp(self.norm2(x))


class PublicMAE(models.MAE):
    """Draws the masks in the step, un-shuffles before the decoder, and predicts every patch."""

    def __init__(self, **shape):
        super().__init__(**shape)
        width, layers, heads = self.config["decoder"]
        self.blocks = nn.ModuleList(PublicBlock(self.width, self.heads) for _ in self.blocks)
        self.decoder_blocks = nn.ModuleList(PublicBlock(width, heads) for _ in range(layers))

    def forward(self, images):
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        (B, N, D), K = x.shape, self.num_visible
        ids = torch.rand(B, N, device=x.device).argsort(dim=1)
        restore = ids.argsort(dim=1)
        mask = torch.ones(B, N, device=x.device)
        mask[:, :K] = 0
        mask = mask.gather(1, restore)  # 1: hidden
        x = x.gather(1, ids[:, :K, None].repeat(1, 1, D))  # (B, K, D)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))  # (B, 1 + K, decoder width)
        tokens = torch.cat([x[:, 1:], self.mask_token.repeat(B, N - K, 1)], dim=1)
        tokens = tokens.gather(1, restore[..., None].repeat(1, 1, tokens.shape[2]))
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed  # (B, 1 + N, ...)
        for block in self.decoder_blocks:
            x = block(x)
        predictions = self.decoder_pred(self.decoder_norm(x))[:, 1:]  # (B, N, P*P*C)
        targets = models.patchify(images, self.patch_size)
        mean, variance = targets.mean(-1, keepdim=True), targets.var(-1, keepdim=True)
        targets = (targets - mean) / (variance + 1e-6) ** 0.5
        losses = ((predictions - targets) ** 2).mean(-1)  # (B, N)
        return (losses * mask).sum() / mask.sum()


@cache
def build(row):
    """A function that takes one training step and returns the CPU seconds of its four phases."""
    torch.set_num_threads(1)
    gc.disable()  # as the stages do
    if row in ("replicas_compiled", "sharded_compiled"):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    public = row == "public_autocast"
    model = parallel = (PublicMAE if public else models.MAE)(**SHAPE)
    if not public:
        options = {"shard_group": 1} if row == "sharded_compiled" else {}
        options |= {"precision": "fp32" if row == "plain_fp32" else "bf16"}
        models.parallelize(model, torch.device("cpu"), **options, compile=row.endswith("compiled"))
    if row == "replicas_compiled":
        # As parallelize() does over several processes, but with buckets of a fifth of
        # the weights: each is compiled to a graph, and buckets of 100 MB are a fifth of
        # B.
        bucket = sum(4 * p.numel() for p in model.parameters() if p.requires_grad) // 5
        dist._DEFAULT_FIRST_BUCKET_BYTES = bucket  # 1 MB, and no other may be smaller
        parallel = models.replicate(model, bucket / 2**20)
    models.initialize(model)
    groups = models.parameter_groups(model, 0.05)
    optimizer = torch.optim.AdamW(groups, 1e-4, betas=(0.9, 0.95), fused=True)
    images = torch.randint(256, (BATCH, 3, *model.input_shape[1:]), dtype=torch.uint8)
    ids, weight = torch.rand(BATCH, model.num_patches).argsort(dim=1), torch.ones(BATCH)

    def step():
        times, sums = [time.process_time()], torch.zeros(5)
        with models.sync_gradients(parallel, last=True):
            if public:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(normalize(images))
            else:
                loss = (parallel(normalize(images), ids) * weight).sum() / BATCH
            times.append(time.process_time())
            loss.backward()
            sums[:2] += torch.stack([loss.detach(), weight.sum()])
        times.append(time.process_time())
        gradients = [models.local(p.grad) for p in model.parameters() if p.grad is not None]
        sums[2], sums[3] = 0, 0
        sums[4] = torch.nn.utils.get_total_norm(gradients).square()
        sums.tolist()  # the host read
        times.append(time.process_time())
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time())
        return [after - before for before, after in pairwise(times)]

    return step


def turn(row, steps):
    step = build(row)
    step()  # not counted: the caches hold another row's data
    return [step() for _ in range(steps)]


def main():
    parser = common.make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="turns of each row")
    parser.add_argument("--steps", type=int, default=5, help="steps that count in a turn")
    run = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    pools = {row: ProcessPoolExecutor(1, spawn) for row in ROWS}
    turns = {row: lambda row=row: pools[row].submit(turn, row, run.steps).result() for row in ROWS}
    print("compiling: two minutes, or five more where nothing is in the cache", file=sys.stderr)
    times = common.take_turns(turns, run.rounds)  # models are compiled in the one that warms up
    times = {row: list(chain.from_iterable(found)) for row, found in times.items()}
    total = {row: 1e3 * statistics.median(map(sum, steps)) for row, steps in times.items()}

    print(f"torch {torch.__version__}, milliseconds, {run.rounds} rounds of {run.steps} steps")
    columns = ["forward", "backward", "norm", "AdamW", "all", "a block", "/sharded", "/public"]
    print(" " * 22 + "".join(f"{column:>9}" for column in columns))
    for row, steps in times.items():
        cells = [1e3 * statistics.median(phase) for phase in zip(*steps)]
        others = 1, 20, total["sharded_compiled"], total["public_autocast"]
        cells += [total[row] / other for other in others]
        print(f"{row:22}" + "".join(f"{cell:9.2f}" for cell in cells))
    print(json.dumps({row: round(total[row], 3) for row in ROWS[1:]}))


if __name__ == "__main__":
    main()
