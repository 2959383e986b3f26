"""Triton attention for the shapes of a Vision Transformer, and the rule that chooses it.

    ATTENTION=torch python mae_pretrain.py      # or triton: overrides the rule
    python tests/bench/attention.py             # errors against float64, speed on a GPU

Models call attention(). It runs these kernels on a CUDA GPU in 16 bits and PyTorch's
scaled_dot_product_attention elsewhere: see choose(). Padding and biases need PyTorch's.

Triton in short. A kernel is written for one *program*, which works on tiles: small matrices
in registers. A launch starts a grid of programs, numbered by `tl.program_id`. A tensor is a
pointer to its first element: a tile is read from `pointer + row * stride + column`, with a
mask for what lies outside. The sides of tiles are powers of two and constants of the kernel
(`tl.constexpr`). A program runs on `num_warps` times 32 threads, which share its tiles; what
does not fit their registers spills to slow memory. A loop loads what its next `num_stages`
iterations need while the current one computes.

The kernels compute softmax(q k^T / sqrt(d)) v for each head of each sample. For ViTs:

* q, k and v are read where the qkv layer left them, in one (B, N, 3 D) tensor, and the
  result is written as the next layer needs it, (B, N, D). Nothing is permuted or copied.
* A head may have 80 columns (H, 2B): a tile of 64 beside one of 16, not a padded 128.
* Up to 64 tokens, all keys of a head are one tile: the softmax is taken at once, and
  backward is one kernel. Longer sequences loop over tiles of keys and rescale.
* In MAE's last decoder block only hidden tokens have queries: those from `first_query` on.

The (N, N) matrices never leave the registers. Forward keeps log2(sum(2^s)) of each row of
scores s, from which backward computes the softmax. No atomics: same input, same bits.
"""

import math
import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels are never called
    triton = SimpleNamespace(jit=lambda kernel: kernel, __version__=None)
    tl = SimpleNamespace(constexpr=float)

# exp(x) = 2^(x log2 e), and 2^x is one instruction: scores are multiplied by this.
# Gradients are those of the scores without it.
LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST_TILE = 64  # rows or keys; up to so many tokens, one tile holds all keys


# ---------------------------------------------------------------------------- attention


def attention(qkv, heads, first_query=0):
    """softmax(q k^T / sqrt(d)) v for every head, accumulated in float32.

    qkv (B, N, 3 * D), as a linear layer writes it -> (B, N - first_query, D). The first
    `first_query` tokens are keys and values only. ValueError: see choose().
    """
    head = qkv.shape[2] // (3 * heads)  # columns of one
    name, _ = choose(qkv.device, qkv.dtype, qkv.shape[1], head)
    function = triton_attention if name == "Triton" else pytorch_attention
    return function(qkv, heads, first_query)


def reference(qkv, heads, first_query=0):
    """The definition of attention(), in the dtype of qkv."""
    q, k, v = split_heads(qkv, heads)
    scores = q[:, :, first_query:] @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    return (scores.softmax(dim=3) @ v).transpose(1, 2).flatten(2)


def pytorch_attention(qkv, heads, first_query=0):
    """reference() by PyTorch's fused kernels, which also read q, k and v in place."""
    q, k, v = split_heads(qkv, heads)
    x = F.scaled_dot_product_attention(q[:, :, first_query:], k, v)
    return x.transpose(1, 2).flatten(2)


def triton_attention(qkv, heads, first_query=0):
    """reference() by the kernels below: any float dtype, heads of 16, 32 ... 128."""
    return fused(qkv, heads, first_query)[0]


def split_heads(qkv, heads):
    """(B, N, 3 * D) -> q, k, v: views, (B, heads, N, D / heads) each."""
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


# --------------------------------------------------------------------------- the choice

FORCED = os.environ.get("ATTENTION") or None  # "torch" or "triton" overrides the rule
SIXTEEN_BIT = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# Compute capabilities in tests/bench/attention_*.csv. The kernels were never slower there
# than PyTorch's: 2.0 to 4.8 times as fast up to 257 tokens, 1.02 to 1.2 up to 1,370.
MEASURED = [(9, 0)]


def choose(device, dtype, tokens, head):
    """Choose what computes attention: ("Triton" or "PyTorch", the reason).

    The rule: Triton where the kernels can run and dtype has 16 bits, but only up to 257
    tokens if the GPU's capability was not measured. ATTENTION=torch or triton overrides it.
    head: columns of a head. ValueError if ATTENTION is wrong or the kernels cannot run.
    """
    name, problem = forced(), obstacle(device, head)
    if name == "triton" and problem:
        raise ValueError(f"ATTENTION=triton in the environment cannot run ({problem}): unset it")
    if name:
        return "Triton" if name == "triton" else "PyTorch", f"ATTENTION={name}"
    if problem or dtype not in SIXTEEN_BIT:
        return "PyTorch", problem or "not 16-bit"
    major, minor = capability(device)
    if (major, minor) not in MEASURED and tokens > 257:
        return "PyTorch", f"CUDA capability {major}.{minor} not measured over 257 tokens"
    return "Triton", f"CUDA capability {major}.{minor}, {SIXTEEN_BIT[dtype]}"


def describe(shapes, device, precision):
    """What computes a model's attention and why, for the first lines of a run.

    shapes: (tokens, columns of a head) of its layers; empty for relative positions.
    precision: "bf16" or "fp32". ValueError: see choose().
    """
    if not shapes:
        return "PyTorch (relative positions are a bias: the kernels take none)"
    dtype, lines = torch.bfloat16 if precision == "bf16" else torch.float32, {}
    for tokens, head in shapes:
        line = "{} ({})".format(*choose(device, dtype, tokens, head))
        lines.setdefault(line, []).append(f"{tokens} tokens with heads of {head}")
    if len(lines) == 1:
        return line  # the same for all layers
    return "; ".join(f"{line} for {', '.join(which)}" for line, which in lines.items())


def forced():
    """ATTENTION in the environment: "torch", "triton" or None. ValueError: another word."""
    if FORCED not in (None, "torch", "triton"):
        raise ValueError(f"ATTENTION={FORCED} in the environment: set torch, triton or nothing")
    return FORCED


def obstacle(device, head):
    """Why the kernels cannot run, or None. head: columns of a head."""
    if device.type != "cuda":
        return "no CUDA"
    if triton.__version__ is None:
        return "no Triton"
    if capability(device) < (8, 0):
        return "CUDA capability {}.{} is below 8.0".format(*capability(device))
    return None if head in range(16, 129, 16) else f"heads of {head} are not 16, 32 ... 128 wide"


def capability(device):
    """CUDA's compute capability of a GPU: (major, minor)."""
    return torch.cuda.get_device_capability(device)


# torch.compile cannot trace the query. assume_constant_result of torch.compiler does only
# this, but imports torch._dynamo, which takes longer than all other imports together.
capability._dynamo_marked_constant = True


# -------------------------------------------------------------------------- the kernels
#
# `rows` are numbers of tokens whose queries are used, `keys` those whose keys are. A tile
# has ROWS or KEYS of them. A head has HEAD columns in a tuple of tiles, see columns_of.
#
#     qkv, dqkv      (B, N, 3, heads, HEAD)           the input and its gradient
#     out, grad      (B, N - FIRST, heads, HEAD)      the result and its gradient
#     logsum, delta  (B, heads, N - FIRST) float32    what backward needs of each row


@triton.jit
def offsets(TILES, heads, N: tl.constexpr, FIRST: tl.constexpr, HEAD: tl.constexpr):
    """(tile, offset in qkv, in out, in logsum): which of the TILES of which head this is.

    out and logsum have no rows before FIRST. Their offsets are smaller by FIRST rows, so that
    the row numbers of qkv can be added to them.
    """
    # Neighbouring programs compute tiles of one head: its keys are in the cache.
    tile, pair = tl.program_id(0) % TILES, (tl.program_id(0) // TILES).to(tl.int64)
    sample, column = pair // heads, pair % heads * HEAD
    in_out = (sample * (N - FIRST) - FIRST) * heads * HEAD + column
    return tile, sample * N * 3 * heads * HEAD + column, in_out, pair * (N - FIRST) - FIRST


@triton.jit
def columns_of(HEAD: tl.constexpr):
    """Column numbers of a head's tiles: (1, 64) and (1, 16) for 80, (1, 128) for 112."""
    FULL: tl.constexpr = triton.next_power_of_2(HEAD)
    HALF: tl.constexpr = FULL // 2
    if 4 * HEAD > 3 * FULL:
        columns = (tl.arange(0, FULL)[None, :],)
    else:
        columns = tl.arange(0, HALF)[None, :], HALF + tl.arange(0, HEAD - HALF)[None, :]
    return columns


@triton.jit
def load_head(base, rows, stride, N: tl.constexpr, HEAD: tl.constexpr):
    """Load a head of these tokens, (rows, HEAD), 0 beyond N. stride: between tokens."""
    line, inside = base + rows[:, None] * stride, (rows < N)[:, None]
    return [tl.load(line + c, inside & (c < HEAD), other=0.0) for c in columns_of(HEAD)]


@triton.jit
def store_head(base, rows, stride, head, N: tl.constexpr, HEAD: tl.constexpr):
    """Store a head of these tokens. Nothing is written beyond N."""
    line, inside = base + rows[:, None] * stride, (rows < N)[:, None]
    columns = columns_of(HEAD)
    for i in tl.static_range(len(columns)):
        tile = head[i].to(base.dtype.element_ty)
        tl.store(line + columns[i], tile, inside & (columns[i] < HEAD))


@triton.jit
def zeros_like(head):
    return [tl.zeros(tile.shape, tl.float32) for tile in head]


@triton.jit
def scale(head, factor):
    return [tile * factor for tile in head]


@triton.jit
def dot_t(a, b):
    """a b^T: (M, HEAD), (N, HEAD) -> (M, N) float32. "ieee": no rounding to tf32."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    for i in tl.static_range(1, len(a)):
        product = tl.dot(a[i], tl.trans(b[i]), product, input_precision="ieee")
    return product


@triton.jit
def dot_add(p, a, total):
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
    """Compute out and logsum of a tile of rows. Grid: B * heads * tiles of rows.

    If one tile holds all keys, the softmax is taken at once. Else it is an online softmax
    (arXiv 1805.02867): sums are relative to the largest score so far.
    """
    tile, in_qkv, in_out, in_logsum = offsets(tl.cdiv(N - FIRST, ROWS), heads, N, FIRST, HEAD)
    D, SCALE = heads * HEAD, HEAD**-0.5 * LOG2_E
    rows = FIRST + tile * ROWS + tl.arange(0, ROWS)
    q = load_head(qkv + in_qkv, rows, 3 * D, N, HEAD)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = zeros_like(q)
    for start in range(0, N, KEYS):
        keys = start + tl.arange(0, KEYS)
        k = load_head(qkv + in_qkv + D, keys, 3 * D, N, HEAD)
        v = load_head(qkv + in_qkv + 2 * D, keys, 3 * D, N, HEAD)
        scores = dot_t(q, k) * SCALE  # (ROWS, KEYS)
        scores = tl.where((keys < N)[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))  # (ROWS,)
        p = tl.exp2(scores - larger[:, None])
        if KEYS < N:
            shrink = tl.exp2(largest - larger)  # 0 for the first tile
            total, result = total * shrink, scale(result, shrink[:, None])
        total += tl.sum(p, axis=1)
        result = dot_add(p, v, result)  # (ROWS, HEAD)
        largest = larger
    store_head(out + in_out, rows, D, scale(result, 1 / total[:, None]), N, HEAD)
    tl.store(logsum + in_logsum + rows, largest + tl.log2(total), mask=rows < N)


# Backward. With p the softmax and g the gradient of the result:
#     dv = p^T g,   dp = g v^T,   ds = p * (dp - delta),
#     delta = sum of p * dp over the keys = sum of g * out over the head,
#     dk = ds^T q,  dq = ds k,  both / sqrt(d), as the scores were.
# backward_keys sums dk and dv of its keys over rows. backward_rows sums dq over keys.


@triton.jit
def backward_keys(
    qkv, grad, logsum, delta, dqkv, heads,
    N: tl.constexpr, FIRST: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """Compute dk and dv of a tile of keys. Grid: B * heads * tiles of keys.

    If this tile holds all keys, dq is computed here too, and no other kernel is needed.
    Else backward_rows has written delta. Tiles of scores are transposed: (KEYS, ROWS).
    """
    tile, in_qkv, in_out, in_logsum = offsets(tl.cdiv(N, KEYS), heads, N, FIRST, HEAD)
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
        scores = dot_t(k, q) * (SCALE * LOG2_E)  # (KEYS, ROWS)
        scores = tl.where((keys < N)[:, None], scores, float("-inf"))
        p = tl.exp2(scores - normal[None, :])
        dv = dot_add(p, g, dv)
        dp = dot_t(v, g)  # (KEYS, ROWS)
        if KEYS >= N:
            row_delta = tl.sum(p * dp, axis=0)  # (ROWS,)
        else:
            row_delta = tl.load(delta + in_logsum + rows, mask=rows < N, other=0.0)
        ds = p * (dp - row_delta[None, :])
        dk = dot_add(ds, q, dk)
        if KEYS >= N:
            dq = dot_add(tl.trans(ds), k, zeros_like(q))
            store_head(dqkv, rows, 3 * D, scale(dq, SCALE), N, HEAD)
    store_head(dqkv + D, keys, 3 * D, scale(dk, SCALE), N, HEAD)
    store_head(dqkv + 2 * D, keys, 3 * D, dv, N, HEAD)
    if FIRST > 0:  # these tokens have no query: dq is 0
        store_head(dqkv, keys, 3 * D, zeros_like(k), FIRST, HEAD)


@triton.jit
def backward_rows(
    qkv, out, grad, logsum, delta, dqkv, heads,
    N: tl.constexpr, FIRST: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """Compute dq and delta of a tile of rows. Grid: B * heads * tiles of rows."""
    tile, in_qkv, in_out, in_logsum = offsets(tl.cdiv(N - FIRST, ROWS), heads, N, FIRST, HEAD)
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
        scores = dot_t(q, k) * (SCALE * LOG2_E)  # (ROWS, KEYS)
        scores = tl.where((keys < N)[None, :], scores, float("-inf"))
        p = tl.exp2(scores - normal[:, None])
        ds = p * (dot_t(g, v) - row_delta[:, None])
        dq = dot_add(ds, k, dq)
    store_head(dqkv + in_qkv, rows, 3 * D, scale(dq, SCALE), N, HEAD)


# ------------------------------------------------------------------------- the launches


def launch_shape(tokens, first_query, head, device, tile, loop):
    """The constants of a launch: how a kernel divides its work.

    tile, loop: "ROWS" and "KEYS", or the reverse. A program computes a tile of the one, in a
    loop over the other. Sizes were measured on an H200 (tests/bench/attention_tiles.csv):
    few shapes gain 10 % from others. Before Hopper, wide heads need the registers of more
    warps. On Blackwell, kernels spill with three stages and not with four.
    """
    chip = capability(device) if device.type == "cuda" else (8, 0)
    side = 1 << (tokens - 1).bit_length()
    own = min(LARGEST_TILE, max(16, side))  # 16 is the least of a matrix product
    if tokens <= own:
        step = own  # one iteration
    elif tokens <= 80 and head == 80:
        step = 16  # the 65 tokens of H's encoder take 80, not 96
    else:
        step = 32
    sizes = {"N": tokens, "FIRST": first_query, "HEAD": head, tile: own, loop: step}
    warps = 8 if head > 96 and chip < (9, 0) else 4
    return sizes | {"num_warps": warps, "num_stages": 4 if chip >= (10, 0) else 3}


def launch(kernel, tile, loop, heads, first_query, qkv, *tensors):
    """Run a kernel: a program for each tile of each head of each sample."""
    B, N, D = *qkv.shape[:2], qkv.shape[2] // 3
    sizes = launch_shape(N, first_query, D // heads, qkv.device, tile, loop)
    tiles = triton.cdiv(N - first_query if tile == "ROWS" else N, sizes[tile])
    # wrap_triton shows the kernel to torch.compile, and to the tracer of an operator.
    kernel = torch.library.wrap_triton(kernel) if TRACED else kernel
    with torch.cuda.device_of(qkv):  # else Triton uses the current GPU
        kernel[(B * heads * tiles,)](qkv, *tensors, heads, **sizes)


def empty_results(qkv, heads, first_query):
    """Allocate out (B, N - first_query, D), logsum (B, heads, N - first_query) float32."""
    B, N, D = *qkv.shape[:2], qkv.shape[2] // 3
    rows = N - first_query
    return qkv.new_empty(B, rows, D), qkv.new_empty(B, heads, rows, dtype=torch.float32)


def attention_forward(qkv: Tensor, heads: int, first_query: int) -> tuple[Tensor, Tensor]:
    """qkv (B, N, 3 * D) -> out and logsum, see empty_results()."""
    results = empty_results(qkv, heads, first_query)
    qkv = qkv.contiguous()  # the kernels know no other strides
    launch(forward_rows, "ROWS", "KEYS", heads, first_query, qkv, *results)
    return results


def attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, logsum: Tensor, heads: int, first_query: int
) -> Tensor:
    """The gradient of qkv from the gradient of out and the results of forward."""
    qkv, grad, delta = qkv.contiguous(), grad.contiguous(), torch.empty_like(logsum)
    tensors = grad, logsum, delta, torch.empty_like(qkv)
    if qkv.shape[1] > LARGEST_TILE:
        launch(backward_rows, "ROWS", "KEYS", heads, first_query, qkv, out, *tensors)
    launch(backward_keys, "KEYS", "ROWS", heads, first_query, qkv, *tensors)
    return tensors[-1]


# ------------------------------------------------------------------------- the operator
#
# To PyTorch, a call is one operation with a name, a shape rule and a gradient: it works in
# torch.compile, FSDP2, checkpointing and autocast. Triton's interpreter cannot be traced.
# Without a GPU, triton_op would only load torch's compiler.

TRACED = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
register = torch.library.triton_op if TRACED else torch.library.custom_op
fused = register("mae::attention", mutates_args=())(attention_forward)
fused_backward = register("mae::attention_backward", mutates_args=())(attention_backward)
fused.register_fake(empty_results)
fused_backward.register_fake(lambda grad, qkv, *_: qkv.new_empty(qkv.shape))


def setup_context(ctx, inputs, output):  # PyTorch passes the arguments by these names
    qkv, ctx.heads, ctx.first_query = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros are made as the gradient of logsum


def backward(ctx, grad, _):
    return fused_backward(grad, *ctx.saved_tensors, ctx.heads, ctx.first_query), None, None


fused.register_autograd(backward, setup_context=setup_context)
