"""Fused attention for the shapes that a Vision Transformer meets, in Triton, and the choice of it.

    python kernels.py                  # correctness; on a GPU also speed, beside PyTorch's own
    python kernels.py > speed.csv      # its table of speed is all that goes to stdout
    ATTENTION=torch python mae_pretrain.py ...      # or triton: not what is faster, but this

attention() is what the models call: these kernels where choose() has found them faster on this very
machine, else PyTorch's scaled_dot_product_attention. Padding and biases are PyTorch's alone.

Whoever knows PyTorch and no Triton can start here. A kernel is written for one *program*, which
works on tiles: small matrices in registers. A launch starts a grid of programs, and `tl.program_id`
tells each which one it is. A tensor is given as a pointer to its first number: a tile of it is read
from `pointer + row * stride + column`, under a mask where that would be outside. The sides of tiles
are powers of two, known when the kernel is compiled (`tl.constexpr`): for each other set of them it
is compiled again. A program runs on `num_warps` times 32 threads, which share its tiles: more have
more registers, and what does not fit spills to slow memory. In a loop, what the next `num_stages`
turns need is loaded while this one computes.

What is computed is softmax(q k^T / sqrt(d)) v, for each head of each sample. Special to ViTs:

* q, k and v are read where the qkv layer left them, in one (B, N, 3 D) tensor, and the result is
  written as the next layer wants it, (B, N, D). Nothing is permuted or copied; backward likewise.
* A head may be 80 wide (H and 2B): it is a tile of 64 columns beside one of 16, not a padded 128.
* Sequences are short. Up to 64 tokens, all keys of a head are one tile: softmax is taken at once,
  and backward is one kernel. Longer ones walk over tiles of keys and correct as they go.
* In MAE's last decoder block only the hidden tokens ask: queries before `first_query` are left out.
* The number of tokens is a constant of the kernel, too, since a model meets only a few.

The (N, N) matrices never leave the registers. Forward keeps log2(sum(2^s)) of each row of scores s,
from which backward computes the softmax again. There are no atomics: same input, same bits.
"""

import argparse
import itertools
import math
import os
import sys
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # run kernels in Python; read when triton is imported
try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch's attention does it all, and the kernels are never called
    triton = SimpleNamespace(jit=lambda kernel: kernel, __version__=None)
    tl = SimpleNamespace(constexpr=float)

# exp(x) = 2^(x log2 e), and 2^x is one instruction: scores are multiplied by this, too. Gradients
# are those of the scores without it.
LOG2_E = tl.constexpr(1.4426950408889634)


# ------------------------------------------------------------------------------- the definition


def reference(qkv, heads, first_query=0):
    """Attention as it is defined: qkv (B, N, 3 * D) -> (B, N - first_query, D), of one dtype."""
    q, k, v = split_heads(qkv, heads)
    scores = q[:, :, first_query:] @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    return (scores.softmax(dim=3) @ v).transpose(1, 2).flatten(2)


def pytorch_attention(qkv, heads, first_query=0):
    """The same by PyTorch's fused kernels, which read q, k and v where they lie, too."""
    q, k, v = split_heads(qkv, heads)
    x = F.scaled_dot_product_attention(q[:, :, first_query:], k, v)
    return x.transpose(1, 2).flatten(2)


def split_heads(qkv, heads):
    """(B, N, 3 * D) -> q, k, v: views, (B, heads, N, D / heads) each."""
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


# ------------------------------------------------------------------------------------ the kernels
#
# `rows` are queries and `keys` keys, both as numbers of tokens; ROWS and KEYS, how many are in a
# tile. A head, of HEAD columns, is a tuple of tiles: of one, or for 48, 80 and 96 of two.
#
#     qkv, dqkv      (B, N, 3, heads, HEAD)           what came in, and its gradient
#     out, grad      (B, N - FIRST, heads, HEAD)      what goes out, and its gradient
#     logsum, delta  (B, heads, N - FIRST) float32    what backward wants to know of each row


@triton.jit
def place(TILES, heads, N: tl.constexpr, FIRST: tl.constexpr, HEAD: tl.constexpr):
    """Which of the TILES of a head this program computes; where that head is in qkv, out, logsum.

    Results have no rows before FIRST: they begin that much earlier, and numbers of rows fit.
    """
    # Neighbouring programs are tiles of one head: what they share is still in the cache.
    tile, pair = tl.program_id(0) % TILES, (tl.program_id(0) // TILES).to(tl.int64)
    sample, column = pair // heads, pair % heads * HEAD
    in_out = (sample * (N - FIRST) - FIRST) * heads * HEAD + column
    return tile, sample * N * 3 * heads * HEAD + column, in_out, pair * (N - FIRST) - FIRST


@triton.jit
def columns_of(HEAD: tl.constexpr):
    """The numbers of a head's columns: (1, 64) and (1, 16) for 80, but (1, 128) for 112."""
    FULL: tl.constexpr = triton.next_power_of_2(HEAD)
    HALF: tl.constexpr = FULL // 2
    if 4 * HEAD > 3 * FULL:
        columns = (tl.arange(0, FULL)[None, :],)
    else:
        columns = tl.arange(0, HALF)[None, :], HALF + tl.arange(0, HEAD - HALF)[None, :]
    return columns


@triton.jit
def load_head(base, rows, stride, N: tl.constexpr, HEAD: tl.constexpr):
    """A head of these tokens: (rows, HEAD), 0 beyond N tokens. stride: from token to token."""
    line, inside = base + rows[:, None] * stride, (rows < N)[:, None]
    return [tl.load(line + c, inside & (c < HEAD), other=0.0) for c in columns_of(HEAD)]


@triton.jit
def store_head(base, rows, stride, head, N: tl.constexpr, HEAD: tl.constexpr):
    """Its counterpart: nothing is written beyond N tokens."""
    line, inside, columns = base + rows[:, None] * stride, (rows < N)[:, None], columns_of(HEAD)
    for i in tl.static_range(len(columns)):
        tile = head[i].to(base.dtype.element_ty)
        tl.store(line + columns[i], tile, inside & (columns[i] < HEAD))


@triton.jit
def zeros_like(head):
    return [tl.zeros(tile.shape, tl.float32) for tile in head]


@triton.jit
def times(head, factor):
    return [tile * factor for tile in head]


@triton.jit
def over_head(a, b):
    """a b^T: (M, HEAD), (N, HEAD) -> (M, N) float32. "ieee": float32 is not rounded to tf32."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    for i in tl.static_range(1, len(a)):
        product = tl.dot(a[i], tl.trans(b[i]), product, input_precision="ieee")
    return product


@triton.jit
def onto_head(p, a, total):
    """total + p a: (M, N), (N, HEAD) -> (M, HEAD) float32. p is rounded to a's dtype."""
    p, result = p.to(a[0].dtype), ()
    for i in tl.static_range(len(a)):
        result += (tl.dot(p, a[i], total[i], input_precision="ieee"),)
    return result


@triton.jit
def forward_rows(
    qkv, out, logsum, heads,
    N: tl.constexpr, FIRST: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """out and logsum of a tile of rows. Grid: B * heads * tiles of rows.

    Where one tile of keys holds them all, their softmax is taken at once. Else it does not wait for
    the largest score: sums are relative to the largest one so far, and are shrunk when a larger one
    turns up (arXiv 1805.02867).
    """
    tile, in_qkv, in_out, in_logsum = place(tl.cdiv(N - FIRST, ROWS), heads, N, FIRST, HEAD)
    D, SCALE = heads * HEAD, HEAD**-0.5 * LOG2_E
    rows = FIRST + tile * ROWS + tl.arange(0, ROWS)
    q = load_head(qkv + in_qkv, rows, 3 * D, N, HEAD)
    largest, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    result = zeros_like(q)
    for start in range(0, N, KEYS):
        keys = start + tl.arange(0, KEYS)
        k = load_head(qkv + in_qkv + D, keys, 3 * D, N, HEAD)
        v = load_head(qkv + in_qkv + 2 * D, keys, 3 * D, N, HEAD)
        scores = over_head(q, k) * SCALE  # (ROWS, KEYS)
        scores = tl.where((keys < N)[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))  # (ROWS,)
        p = tl.exp2(scores - larger[:, None])
        if KEYS < N:
            shrink = tl.exp2(largest - larger)  # 0 for the first tile
            total, result = total * shrink, times(result, shrink[:, None])
        total += tl.sum(p, axis=1)
        result = onto_head(p, v, result)  # (ROWS, HEAD)
        largest = larger
    store_head(out + in_out, rows, D, times(result, 1 / total[:, None]), N, HEAD)
    tl.store(logsum + in_logsum + rows, largest + tl.log2(total), mask=rows < N)


# Backward. With p the softmax and g the gradient of the result:
#     dv = p^T g,   dp = g v^T,   ds = p * (dp - delta),
#     delta = sum of p * dp over the keys = sum of g * out over the head,
#     dk = ds^T q,  dq = ds k,  both / sqrt(d), as the scores were.
# One kernel sums dk and dv of its keys over the rows, the other dq of its rows over the keys.


@triton.jit
def backward_keys(
    qkv, grad, logsum, delta, dqkv, heads,
    N: tl.constexpr, FIRST: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """dk and dv of a tile of keys. Grid: B * heads * tiles of keys.

    Where this tile holds all keys, dq is found on the way, and no other kernel is needed; else
    delta is read as the other kernel left it. Tiles of scores stand as (KEYS, ROWS) here.
    """
    tile, in_qkv, in_out, in_logsum = place(tl.cdiv(N, KEYS), heads, N, FIRST, HEAD)
    D, SCALE = heads * HEAD, HEAD**-0.5
    dqkv += in_qkv
    keys = tile * KEYS + tl.arange(0, KEYS)
    k = load_head(qkv + in_qkv + D, keys, 3 * D, N, HEAD)
    v = load_head(qkv + in_qkv + 2 * D, keys, 3 * D, N, HEAD)
    dk, dv = zeros_like(k), zeros_like(k)
    for start in range(FIRST, N, ROWS):
        rows = start + tl.arange(0, ROWS)
        q = load_head(qkv + in_qkv, rows, 3 * D, N, HEAD)
        g = load_head(grad + in_out, rows, D, N, HEAD)  # 0 beyond N, and so is ds
        normal = tl.load(logsum + in_logsum + rows, mask=rows < N, other=0.0)
        scores = over_head(k, q) * (SCALE * LOG2_E)  # (KEYS, ROWS)
        scores = tl.where((keys < N)[:, None], scores, float("-inf"))
        p = tl.exp2(scores - normal[None, :])
        dv = onto_head(p, g, dv)
        dp = over_head(v, g)  # (KEYS, ROWS)
        if KEYS >= N:
            row_delta = tl.sum(p * dp, axis=0)  # (ROWS,)
        else:
            row_delta = tl.load(delta + in_logsum + rows, mask=rows < N, other=0.0)
        ds = p * (dp - row_delta[None, :])
        dk = onto_head(ds, q, dk)
        if KEYS >= N:
            dq = onto_head(tl.trans(ds), k, zeros_like(q))
            store_head(dqkv, rows, 3 * D, times(dq, SCALE), N, HEAD)
    store_head(dqkv + D, keys, 3 * D, times(dk, SCALE), N, HEAD)
    store_head(dqkv + 2 * D, keys, 3 * D, dv, N, HEAD)
    if FIRST > 0:  # those who did not ask
        store_head(dqkv, keys, 3 * D, zeros_like(k), FIRST, HEAD)


@triton.jit
def backward_rows(
    qkv, out, grad, logsum, delta, dqkv, heads,
    N: tl.constexpr, FIRST: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """dq and delta of a tile of rows (delta for backward_keys). Grid: B * heads * tiles of rows."""
    tile, in_qkv, in_out, in_logsum = place(tl.cdiv(N - FIRST, ROWS), heads, N, FIRST, HEAD)
    D, SCALE = heads * HEAD, HEAD**-0.5
    rows = FIRST + tile * ROWS + tl.arange(0, ROWS)
    q = load_head(qkv + in_qkv, rows, 3 * D, N, HEAD)
    g = load_head(grad + in_out, rows, D, N, HEAD)
    result = load_head(out + in_out, rows, D, N, HEAD)
    row_delta = tl.zeros((ROWS,), tl.float32)
    for i in tl.static_range(len(g)):
        row_delta += tl.sum(g[i].to(tl.float32) * result[i], axis=1)
    tl.store(delta + in_logsum + rows, row_delta, mask=rows < N)
    normal = tl.load(logsum + in_logsum + rows, mask=rows < N, other=0.0)
    dq = zeros_like(q)
    for start in range(0, N, KEYS):
        keys = start + tl.arange(0, KEYS)
        k = load_head(qkv + in_qkv + D, keys, 3 * D, N, HEAD)
        v = load_head(qkv + in_qkv + 2 * D, keys, 3 * D, N, HEAD)
        scores = over_head(q, k) * (SCALE * LOG2_E)  # (ROWS, KEYS)
        scores = tl.where((keys < N)[None, :], scores, float("-inf"))
        p = tl.exp2(scores - normal[:, None])
        ds = p * (over_head(g, v) - row_delta[:, None])
        dq = onto_head(ds, k, dq)
    store_head(dqkv + in_qkv, rows, 3 * D, times(dq, SCALE), N, HEAD)


# --------------------------------------------------------------------------- the plain functions


def tiles(tokens, first_query, head, device, own, walked):
    """The constants of a launch: how a kernel cuts up its work.

    own, walked: ROWS and KEYS, or the other way round. A program's own tile has up to 64 tokens,
    16 at least, as a matrix product wants. Where it does not hold all, the program walks over the
    others by 32; by 16 for the 65 tokens of H's encoder, which are 80 then, and not 96. Found on an
    H200, where few shapes gain 10 % from tiles of their own: tests/bench/attention_tiles.csv.
    Before Hopper, wide heads need the registers of more warps; on Blackwell, a kernel that loads
    two turns ahead spills, and one that loads three does not.
    """
    chip = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    tile = min(64, max(16, 1 << (tokens - 1).bit_length()))
    others = tile if tokens <= tile else 16 if tokens <= 80 and head == 80 else 32
    sizes = {"N": tokens, "FIRST": first_query, "HEAD": head, own: tile, walked: others}
    warps = 8 if head > 96 and chip < (9, 0) else 4
    return sizes | {"num_warps": warps, "num_stages": 4 if chip >= (10, 0) else 3}


def launch(kernel, programs, sizes, *tensors, heads):
    """Run it, so many programs for each head of each sample, on the GPU of the tensors."""
    # When torch.compile or an operator is traced, wrap_triton lets it see the kernel.
    kernel = torch.library.wrap_triton(kernel) if TRACED else kernel
    with torch.cuda.device_of(tensors[0]):  # Triton would take the current GPU
        kernel[(tensors[0].shape[0] * heads * programs,)](*tensors, heads, **sizes)


def empty_results(qkv, heads, first_query):
    """out (B, N - first_query, D), logsum (B, heads, N - first_query) float32, to be written."""
    B, N, D = *qkv.shape[:2], qkv.shape[2] // 3
    logsum = qkv.new_empty(B, heads, N - first_query, dtype=torch.float32)
    return qkv.new_empty(B, N - first_query, D), logsum


def attention_forward(qkv: Tensor, heads: int, first_query: int) -> tuple[Tensor, Tensor]:
    """out and logsum, log2 of the softmax's denominators, of qkv (B, N, 3 * D)."""
    N, head = qkv.shape[1], qkv.shape[2] // (3 * heads)
    sizes = tiles(N, first_query, head, qkv.device, own="ROWS", walked="KEYS")
    results = empty_results(qkv, heads, first_query)
    of_rows = triton.cdiv(N - first_query, sizes["ROWS"])
    launch(forward_rows, of_rows, sizes, qkv.contiguous(), *results, heads=heads)  # slices: copied
    return results


def attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, logsum: Tensor, heads: int, first_query: int
) -> Tensor:
    """The gradient of qkv, (B, N, 3 * D), from the one of out and what forward returned."""
    N, head = qkv.shape[1], qkv.shape[2] // (3 * heads)
    qkv, grad, delta = qkv.contiguous(), grad.contiguous(), torch.empty_like(logsum)
    tensors = grad, logsum, delta, torch.empty_like(qkv)
    sizes = tiles(N, first_query, head, qkv.device, own="ROWS", walked="KEYS")
    if sizes["KEYS"] < N:
        of_rows = triton.cdiv(N - first_query, sizes["ROWS"])
        launch(backward_rows, of_rows, sizes, qkv, out, *tensors, heads=heads)
    sizes = tiles(N, first_query, head, qkv.device, own="KEYS", walked="ROWS")
    launch(backward_keys, triton.cdiv(N, sizes["KEYS"]), sizes, qkv, *tensors, heads=heads)
    return tensors[-1]


# ----------------------------------------------------------------------------------- the operator
#
# To PyTorch, a call is one operation with a name, a shape rule and a gradient: so it goes through
# torch.compile, FSDP2, activation checkpointing and autocast. (The interpreter cannot be traced;
# where there is no GPU, triton_op would only load torch's compiler, for a second.)

TRACED = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
register = torch.library.triton_op if TRACED else torch.library.custom_op
fused = register("mae::attention", mutates_args=())(attention_forward)
fused_backward = register("mae::attention_backward", mutates_args=())(attention_backward)
fused.register_fake(empty_results)
fused_backward.register_fake(lambda grad, qkv, *_: qkv.new_empty(qkv.shape))


def remember(ctx, inputs, output):  # PyTorch passes them by these names
    qkv, ctx.heads, ctx.first_query = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for logsum's


def gradient(ctx, grad, _):
    return fused_backward(grad, *ctx.saved_tensors, ctx.heads, ctx.first_query), None, None


fused.register_autograd(gradient, setup_context=remember)


def triton_attention(qkv, heads, first_query=0):
    """reference() by the kernels: any N, heads of 16, 32, ... 128 columns, in any float dtype."""
    return fused(qkv, heads, first_query)[0]


# ------------------------------------------------------------------------------------- the choice

CHOSEN = {}  # (tokens, first query, columns of a head, dtype's name) -> do the kernels compute it
TIMED = {}  # (name of the GPU, *what CHOSEN has) -> PyTorch's time over theirs; in checkpoints, too


def attention(qkv, num_heads, first_query=0):
    """softmax(q k^T / sqrt(d)) v for every head, by the faster way: see choose().

    qkv (B, N, 3 * D) as a linear layer leaves it -> (B, N - first_query, D), as the next one wants
    it. Tokens before first_query are looked at but do not ask. Accumulated in float32.
    """
    shape = qkv.shape[1], first_query, qkv.shape[2] // (3 * num_heads), str(qkv.dtype)
    faster = triton_attention if CHOSEN.get(shape) else pytorch_attention
    return faster(qkv, num_heads, first_query)


def choose(shapes, batch, device, dtype):
    """Decide what attention() does with each of the shapes; return a line that says it and why.

    shapes   (tokens, first query, heads, columns of a head) of a model's attention layers
    batch    images at once; this, device and dtype as in training: both ways are timed with them

    What is in TIMED already, of the run that goes on, is not timed again; see forced(), too. Under
    torchrun all must call it, and the slowest process's answer is everyone's.
    """
    asked, said = forced(), {}
    for tokens, first, heads, columns in shapes:
        shape, why = (tokens, first, columns, str(dtype)), obstacle(device, dtype, columns)
        key = None if why or asked else (torch.cuda.get_device_name(device), *shape)
        when = "timed before" if key in TIMED else "timed now"
        if key is None:
            ratio, why = float(asked == "triton" and not why), why or f"ATTENTION={asked}"
        elif key in TIMED:
            ratio = TIMED[key]
        else:
            ratio, why = compare(batch, tokens, first, heads, columns, device, dtype)
        if dist.is_initialized():
            slowest = torch.tensor(ratio, device=device)
            dist.all_reduce(slowest, dist.ReduceOp.MIN)  # it must be faster on all
            ratio = slowest.item()
        if key and ratio > 0:
            TIMED[key] = ratio
        CHOSEN[shape] = ratio >= 1
        why = why or (f"{ratio:.2f}x PyTorch, {when}" if ratio else "kernels fail elsewhere")
        way = "Triton" if CHOSEN[shape] else "PyTorch"
        said.setdefault(f"{way} ({why})", []).append(f"N={tokens} d={columns}")
    return "; ".join(f"{way} for {', '.join(dict.fromkeys(s))}" for way, s in said.items())


def forced():
    """ATTENTION in the environment: torch, triton or None; ValueError if it is something else."""
    asked = os.environ.get("ATTENTION") or None
    if asked not in (None, "torch", "triton"):
        raise ValueError(f"ATTENTION={asked} in the environment: it is torch or triton, or not set")
    return asked


def obstacle(device, dtype, columns):
    """Why the kernels cannot be used, or None."""
    if triton.__version__ is None or device.type != "cuda":
        return "no Triton here" if device.type == "cuda" else "no GPU for Triton"
    if torch.cuda.get_device_capability(device) < (8, 0) or dtype == torch.float32:
        return "the kernels want 16 bits, and a GPU of compute capability 8.0"
    return "heads are not 16, 32 ... 128 wide" if columns not in range(16, 129, 16) else None


def compare(batch, tokens, first, heads, columns, device, dtype):
    """(PyTorch's time over the kernels', forward and backward, None), or (0, why they fail)."""
    try:
        tensors = random_tensors(batch, tokens, first, heads, columns, device, dtype)
        ways = triton_attention, pytorch_attention
        ours, theirs = (median(both_ways(way, *tensors, heads, first)) for way in ways)
        return theirs / ours, None
    except Exception as error:  # noqa: BLE001 (compilers, on a GPU that nobody has tried)
        said = " ".join(str(error).split())[:80]
        return 0.0, f"kernels fail: {type(error).__name__} {said}"


def random_tensors(batch, tokens, first, heads, columns, device, dtype):
    """(qkv, gradient of the result)."""
    draw = torch.Generator(device).manual_seed(0)
    shapes = (batch, tokens, 3 * heads * columns), (batch, tokens - first, heads * columns)
    qkv, grad = (torch.randn(s, generator=draw, device=device).to(dtype) for s in shapes)
    return qkv.requires_grad_(), grad


def both_ways(function, qkv, grad, heads, first):
    """Forward and backward, as a function of nothing."""
    return lambda: torch.autograd.grad(function(qkv, heads, first), qkv, grad)


def median(work):
    """Milliseconds on a GPU, of a recording: without the CPU, which is ahead of it in training."""
    return triton.testing.do_bench_cudagraph(work, rep=10, return_mode="median")


def measure(function, qkv, grad, heads, first):
    """Milliseconds on a GPU (medians) of (forward, forward and backward); MiB that both take."""
    both, held = both_ways(function, qkv, grad, heads, first), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = (torch.cuda.max_memory_allocated() - held) >> 20
    return median(lambda: function(qkv, heads, first)), median(both), peak


# ------------------------------------------------------------------------------------- the tables

say = partial(print, file=sys.stderr)  # all but the table of speed, which is kept as a file


def correctness(device):
    """Print the largest errors against float64, of the kernels and of the formula in PyTorch."""
    say("tokens first columns dtype      result: here  PyTorch   gradient: here  PyTorch")
    shapes = (50, 0, 64), (65, 0, 80), (197, 50, 32), (257, 65, 32), (150, 0, 128)
    dtypes = [torch.float32, torch.float16]  # Triton's interpreter gets bfloat16 wrong
    dtypes += [torch.bfloat16] if device.type == "cuda" else []
    for (tokens, first, columns), dtype in itertools.product(shapes, dtypes):
        qkv, grad = random_tensors(2, tokens, first, 2, columns, device, dtype)
        found = []
        for way, kind in (reference, torch.float64), (triton_attention, dtype), (reference, dtype):
            given = qkv.detach().to(kind).requires_grad_()
            out = way(given, 2, first)
            out.backward(grad.to(kind))
            found.append((out, given.grad))
        errors = [(x - exact).abs().max() for exact, *two in zip(*found) for x in two]
        line = "{:6} {:5} {:7} {:9} {:13.1e} {:8.1e} {:16.1e} {:8.1e}"
        say(line.format(tokens, first, columns, str(dtype).removeprefix("torch."), *errors))


# (tokens, first query, heads, columns): of every size, MAE's encoder and its decoder, and the
# classifier at 224 and at 512 (patch 16) or 518 (patch 14).
SHAPES = [(tokens, 0, heads, 64) for heads in (12, 16) for tokens in (50, 197, 1025)]
SHAPES += [(n, 0, h, c) for h, c in ((16, 80), (32, 80), (32, 128)) for n in (65, 257, 1370)]
SHAPES += [(197, 0, 16, 32), (197, 50, 16, 32), (257, 0, 16, 32), (257, 65, 16, 32)]


def speed(device):
    """Print, as CSV, the speed of every shape in bfloat16: medians of repeated runs."""
    print("tokens,first,heads,columns,way,forward TFLOP/s,backward TFLOP/s,both TFLOP/s,"
          "both over the fastest of PyTorch,peak MiB beside the inputs")  # fmt: skip
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    backends |= {"memory-efficient": SDPBackend.EFFICIENT_ATTENTION}
    ways = {"Triton": triton_attention, **dict.fromkeys(backends, pytorch_attention)}
    ways["formula"] = reference
    for tokens, first, heads, columns in SHAPES:
        batch, found = max(1, 65_536 // tokens), {}
        tensors = random_tensors(batch, tokens, first, heads, columns, device, torch.bfloat16)
        for way, function in ways.items():
            try:
                with sdpa_kernel(backends.get(way, SDPBackend.MATH)):
                    found[way] = measure(function, *tensors, heads, first)
            except Exception as error:  # noqa: BLE001 (a backend that does not take this shape)
                say(f"{way}, {tokens} tokens of {columns} columns: {error!s:.80}")
        fastest = min((found[way][1] for way in backends if way in found), default=math.nan)
        flops = 4e-9 * batch * tokens * (tokens - first) * heads * columns
        for way, (forward, both, peak) in found.items():
            # Forward has two matrix products, backward five.
            speeds = flops / forward, 2.5 * flops / (both - forward), 3.5 * flops / both
            row = tokens, first, heads, columns, way, *(f"{s:.0f}" for s in speeds)
            print(*row, f"{fastest / both:.2f}", peak, sep=",", flush=True)


def main():
    parser = argparse.ArgumentParser("kernels.py", description=__doc__.splitlines()[0])
    parser.parse_args()
    if triton.__version__ is None:
        parser.exit(2, "kernels.py: there is no Triton here: pip install triton\n")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    correctness(device)
    if device.type == "cuda":
        say(torch.cuda.get_device_name(device))
        speed(device)
    else:
        say("(in Triton's interpreter; speed is measured on a GPU, and there is none)")


if __name__ == "__main__":
    main()
