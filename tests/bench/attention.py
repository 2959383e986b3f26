"""The attention of kernels.py: its errors, its speed, and how its kernels compile.

    python tests/bench/attention.py                       # errors; on a GPU also speed
    python tests/bench/attention.py > speed.csv           # only the table of speed goes to stdout
    python tests/bench/attention.py --compile 80 90 100   # for sm_80, sm_90, sm_100; needs no GPU

Errors are the largest against float64, beside those of the definition in PyTorch.
Without a GPU the kernels run in Triton's interpreter. Speed is in bfloat16, beside each
backend of PyTorch's attention and the definition: medians, with 65,536 tokens in all.
tests/bench/attention_h200.csv is this table, and the rule in kernels.py rests on it:
after a run on another GPU, add the table here and the capability to kernels.MEASURED.
--compile prints registers, spilled bytes and bytes of shared memory of each kernel and
shape.
"""

import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest.mock import patch

import common
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

if __name__ == "__main__" and not torch.cuda.is_available() and "--compile" not in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # run kernels in Python; read when triton is imported
import kernels
from kernels import pytorch_attention, reference, triton, triton_attention

# (tokens, first query, heads, columns): of every size, MAE's encoder and its decoder,
# and the classifier at 224 and at 512 (patch 16) or 518 (patch 14).
SHAPES = [(tokens, 0, heads, 64) for heads in (12, 16) for tokens in (50, 197, 1025)]
SHAPES += [(n, 0, h, c) for h, c in ((16, 80), (32, 80), (32, 128)) for n in (65, 257, 1370)]
SHAPES += [(197, 0, 16, 32), (197, 50, 16, 32), (257, 0, 16, 32), (257, 65, 16, 32)]

say = partial(print, file=sys.stderr)  # stdout is for the tables that are kept as files


def main():
    parser = common.make_parser(__doc__)
    chips = "compile for these compute capabilities, times ten, and print the resources"
    parser.add_argument("--compile", type=int, nargs="+", metavar="CHIP", help=chips)
    options = parser.parse_args()
    if triton.__version__ is None:
        parser.exit(2, "attention.py: there is no Triton: pip install triton\n")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.compile:
        compile_all(options.compile)
        return
    correctness(device)
    if device.type == "cuda":
        say(torch.cuda.get_device_name(device))
        speed(device)
    else:
        say("(in Triton's interpreter; speed needs a GPU)")


def random_tensors(batch, tokens, first, heads, columns, device, dtype):
    """(qkv, gradient of the result)."""
    draw = torch.Generator(device).manual_seed(0)
    shapes = (batch, tokens, 3 * heads * columns), (batch, tokens - first, heads * columns)
    qkv, grad = (torch.randn(s, generator=draw, device=device).to(dtype) for s in shapes)
    return qkv.requires_grad_(), grad


# ------------------------------------------------------------------------------------------ errors


def errors_of(functions, qkv, grad, heads, first):
    """The largest errors against float64 of functions' results, then of their gradients."""

    def results(function, dtype):
        given = qkv.detach().to(dtype).requires_grad_()
        out = function(given, heads, first)
        out.backward(grad.to(dtype))
        return out.detach(), given.grad

    exact = results(reference, torch.float64)
    found = [results(function, qkv.dtype) for function in functions]
    return [(pair[i] - exact[i]).abs().max().item() for i in (0, 1) for pair in found]


def correctness(device):
    """Print the largest errors against float64, of the kernels and of the definition."""
    say("tokens first columns dtype    result: kernels PyTorch   gradient: kernels PyTorch")
    shapes = (50, 0, 64), (65, 0, 80), (197, 50, 32), (257, 65, 32), (150, 0, 128)
    dtypes = [torch.float32, torch.float16]  # Triton's interpreter gets bfloat16 wrong
    dtypes += [torch.bfloat16] if device.type == "cuda" else []
    for (tokens, first, columns), dtype in itertools.product(shapes, dtypes):
        qkv, grad = random_tensors(2, tokens, first, 2, columns, device, dtype)
        errors = errors_of((triton_attention, reference), qkv, grad, 2, first)
        line = "{:6} {:5} {:7} {:9} {:14.1e} {:7.1e} {:19.1e} {:7.1e}"
        say(line.format(tokens, first, columns, str(dtype).removeprefix("torch."), *errors))


# ------------------------------------------------------------------------------------------- speed


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
        shape = batch, tokens, first, heads, columns
        tensors = random_tensors(*shape, device, torch.bfloat16)
        for way, function in ways.items():
            try:
                with sdpa_kernel(backends.get(way, SDPBackend.MATH)):
                    found[way] = measure(function, *tensors, heads, first)
            except Exception as error:  # noqa: BLE001 (not every backend takes every shape)
                say(f"{way}, {tokens} tokens of {columns} columns: {error!s:.80}")
        fastest = min((found[way][1] for way in backends if way in found), default=math.nan)
        flops = 4e-9 * batch * tokens * (tokens - first) * heads * columns
        for way, (forward, both, peak) in found.items():
            # Forward has two matrix products, backward five.
            speeds = flops / forward, 2.5 * flops / (both - forward), 3.5 * flops / both
            row = tokens, first, heads, columns, way, *(f"{s:.0f}" for s in speeds)
            print(*row, f"{fastest / both:.2f}", peak, sep=",", flush=True)


def measure(function, qkv, grad, heads, first):
    """Milliseconds on a GPU (medians) of (forward, forward and backward); MiB that both take."""
    both = lambda: torch.autograd.grad(function(qkv, heads, first), qkv, grad)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = (torch.cuda.max_memory_allocated() - held) >> 20
    return median(lambda: function(qkv, heads, first)), median(both), peak


def median(work):
    """Milliseconds of a CUDA graph: without the CPU, which runs ahead of the GPU in training."""
    return triton.testing.do_bench_cudagraph(work, rep=10, return_mode="median")


# ------------------------------------------------------------------------------------- compilation


def compile_all(chips):
    """Print, as CSV, what compiled() finds for every shape on each chip."""
    print("chip,kernel,tokens,first,columns,registers,spilled bytes,shared bytes,wgmma")
    shapes = {(tokens, first, columns) for tokens, first, _, columns in SHAPES}
    shapes |= {(50, 0, 112), (1370, 0, 112)}  # a width that no size has
    for chip, shape in itertools.product(chips, sorted(shapes)):
        for name, *numbers in compiled(chip, *shape):
            print(chip, name, *shape, *numbers, sep=",", flush=True)


def compiled(chip, tokens, first, columns):
    """[kernel, registers, spilled bytes, shared bytes, has wgmma] of each kernel that is launched.

    chip: compute capability, times ten. Compiles for bfloat16; needs no GPU.
    """
    for kernel in (kernels.forward_rows, kernels.backward_rows, kernels.backward_keys):
        sides = ("KEYS", "ROWS") if kernel is kernels.backward_keys else ("ROWS", "KEYS")
        with patch.object(kernels, "capability", lambda _: divmod(chip, 10)):
            sizes = kernels.launch_shape(tokens, first, columns, torch.device("cuda"), *sides)
        if kernel is kernels.backward_rows and sizes["KEYS"] >= tokens:
            continue  # one tile: backward_keys does it all
        built = compile_kernel(kernel, sizes, chip)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            objdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            said = subprocess.check_output([objdump, "-res-usage", file.name], text=True)
        registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", said).groups())
        wgmma = "wgmma" in built.asm["ptx"]
        yield [kernel.fn.__name__, registers, spilled, built.metadata.shared, wgmma]


def compile_kernel(kernel, sizes, chip):
    """Triton's compiled kernel. sizes: see kernels.launch_shape."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    kinds = {"logsum": "*fp32", "delta": "*fp32", "heads": "i32"}
    kinds |= dict.fromkeys(sizes, "constexpr")
    signature = {name: kinds.get(name, "*bf16") for name in kernel.arg_names}
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature, sizes, aligned)
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


if __name__ == "__main__":
    main()
