"""kernels.py: results against float64, the choice, and kernels compiled for three GPUs.

Without a GPU the kernels run in Triton's interpreter: conftest.py sets TRITON_INTERPRET before
triton is imported.
"""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT
from torch.utils.checkpoint import checkpoint

import finetune
import kernels
import mae_pretrain
import model as models
import weak_pretrain
from support import plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = (1, 2, 15, 16, 17, 50, 63, 64, 65, 127, 129, 197, 257)
HEADS = (16, 32, 48, 64, 80, 96, 112, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No ATTENTION. The interpreter multiplies bf16 as integers: tl.dot gets it as float32."""
    monkeypatch.setattr(kernels, "FORCED", None)
    if DEVICE == "cuda":
        return
    from triton.runtime import interpreter

    def wide(tile):
        if tile.dtype.scalar != interpreter.tl.bfloat16:
            return tile
        bits = tile.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), interpreter.tl.float32)

    plain = interpreter.InterpreterBuilder.create_dot
    wider = lambda self, a, b, *rest: plain(self, wide(a), wide(b), *rest)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", wider)


def check(qkv, heads, first_query=0):
    """The kernels' errors against float64 are at most twice those of the definition."""
    torch.manual_seed(1)
    exact = qkv.double().requires_grad_()
    expected = kernels.reference(exact, heads, first_query)
    grad = torch.randn(expected.shape, device=qkv.device).to(qkv.dtype)
    expected.backward(grad.double())
    found = []
    for function in (kernels.triton_attention, kernels.reference):
        given = qkv.detach().requires_grad_()
        out = function(given, heads, first_query)
        out.backward(grad)
        assert out.dtype == given.grad.dtype == qkv.dtype and out.shape == expected.shape
        found.append([(out - expected).abs().max(), (given.grad - exact.grad).abs().max()])
    for ours, theirs in zip(*found, strict=True):
        assert ours <= 2 * theirs + 4 * torch.finfo(qkv.dtype).eps


def gradient_of(qkv, heads, first_query=0):
    given = qkv.clone().requires_grad_()
    kernels.triton_attention(given, heads, first_query).square().sum().backward()
    return given.grad


def python(code, *arguments, attention=""):
    """The lines that a process prints in which kernels are not interpreted."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "ATTENTION": attention}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.check_output(command, cwd=ROOT, text=True, env=environment).splitlines()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_attention_and_its_gradient_are_as_exact_as_pytorchs(tokens, dtype):
    """Every number of tokens and every head with every dtype, not all with all."""
    head = HEADS[(TOKENS.index(tokens) + 3 * DTYPES.index(dtype)) % len(HEADS)]
    torch.manual_seed(0)
    heads = 3 if tokens < 100 else 1
    qkv = torch.randn(1 if tokens > 64 else 3, tokens, 3 * heads * head, device=DEVICE)
    check(qkv.to(dtype), heads)


@pytest.mark.parametrize("tokens, head, first_query", [(50, 32, 13), (65, 80, 64), (140, 48, 37)])
def test_only_the_last_tokens_have_queries(tokens, head, first_query):
    torch.manual_seed(0)
    qkv = torch.randn(2, tokens, 3 * 3 * head, device=DEVICE)
    check(qkv, 3, first_query)
    gradient = gradient_of(qkv, 3, first_query)
    assert (gradient[:, :first_query, : 3 * head] == 0).all()
    assert torch.equal(gradient, gradient_of(qkv, 3, first_query))  # same input, same bits


def test_strided_tensors_are_copied():
    torch.manual_seed(0)
    check(torch.randn(4, 40, 197, device=DEVICE)[::2, 7:30, 3:195], 2)
    check(torch.randn(4, 160, 205, device=DEVICE)[::2, 5:155, 3:195], 2, 20)  # tiled
    check(torch.randn(2, 192, 20, device=DEVICE).transpose(1, 2), 2)


@pytest.mark.parametrize("tokens", [20, 150])
def test_large_scores_and_constant_rows(tokens):
    torch.manual_seed(0)
    qkv = torch.randn(1, tokens, 3 * 2 * 16, device=DEVICE)
    qkv[..., :64] *= 40  # scores of thousands, of either sign
    out = kernels.triton_attention(qkv, 2)
    torch.testing.assert_close(out, kernels.reference(qkv, 2), rtol=1e-4, atol=1e-4)
    assert gradient_of(qkv, 2).isfinite().all()
    # All scores are far below 0. A missing key with a score of 0 would be far above them.
    qkv[..., :32], qkv[..., 32:64] = 40, -40
    assert gradient_of(qkv, 2).isfinite().all()
    constant = torch.ones_like(qkv)
    torch.testing.assert_close(kernels.triton_attention(constant, 2), constant[..., :32])


def test_the_operators_are_what_pytorch_expects():
    qkv = torch.randn(2, 33, 3 * 48, device=DEVICE, requires_grad=True)
    torch.library.opcheck(kernels.fused, (qkv, 3, 5))
    out, logsum = (tensor.detach() for tensor in kernels.fused(qkv, 3, 5))
    given = torch.randn_like(out), qkv.detach(), out, logsum, 3, 5
    torch.library.opcheck(kernels.fused_backward, given)


# ---------------------------------------------------------------------- through PyTorch

TINY = {"size": "64x2x2", "image_size": 24, "patch_size": 8}  # heads of 32; 9 patches
MAE = partial(models.MAE, decoder=(32, 2, 2), **TINY)
CLASSIFIER = partial(models.Classifier, classes=5, head_std=1.0, **TINY)


def gradients(model, *given):
    """Loss and all gradients of a model."""
    loss = model(*given).square().mean()
    loss.backward()
    return {"loss": loss} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("how", ["", "compile", "recompute", "compile recompute", "mae"])
def test_a_training_step_is_the_same_with_the_kernels(how, monkeypatch):
    """shapes, launched: (tokens, first query, columns of a head) of the kernels."""
    torch.manual_seed(0)
    given = [torch.randn(2, 3, 24, 24, device=DEVICE)]
    build, shapes, launched = CLASSIFIER, {(10, 0, 32)}, set()
    if how == "mae":
        given.append(torch.rand(2, 9, device=DEVICE).argsort(dim=1))
        build, shapes = MAE, {(3, 0, 32), (10, 0, 16), (10, 3, 16)}
    launch_shape = kernels.launch_shape
    noticed = lambda *shape: launched.add(shape[:3]) or launch_shape(*shape)
    monkeypatch.setattr(kernels, "launch_shape", noticed)
    monkeypatch.setattr(kernels, "FORCED", "torch")
    expected = gradients(build().to(DEVICE), *given)
    assert not launched
    monkeypatch.setattr(kernels, "FORCED", "triton")
    monkeypatch.setattr(kernels, "obstacle", lambda *_: None)  # also in the interpreter
    model = build().to(DEVICE)
    for block in model.blocks:
        if "recompute" in how:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if "compile" in how:
            block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    found = gradients(model, *given)
    assert launched == shapes
    assert {(tokens, head) for tokens, _, head in shapes} == {*plan.attention_shapes(model)}
    for name, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5 * scale + 1e-9)


def test_autocast_gives_the_kernels_its_own_dtype():
    linear = torch.nn.Linear(16, 3 * 32, device=DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        given = linear(torch.randn(1, 20, 16, device=DEVICE))
        out = kernels.triton_attention(given, 2)
    assert out.dtype == torch.float16
    expected = kernels.reference(given.float(), 2)
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=2e-3)
    out.float().sum().backward()
    assert linear.weight.grad.isfinite().all()


TRACED = """
import json, operator
from types import SimpleNamespace
import torch, triton
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget

driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
triton.runtime.driver.set_active(driver)  # enough to trace; nothing is launched
torch.cuda.get_device_capability = lambda _: (9, 0)
has_gpu, torch.cuda.is_available = torch.cuda.is_available, lambda: True
import kernels
torch.cuda.is_available = has_gpu
kernels.obstacle = lambda *_: None  # tensors are on the meta device

def capture(graph, inputs):
    for node in graph.graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            name = kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__
            given = node.kwargs["kwargs"].items()  # getitem: an earlier kernel wrote it
            read = {n for n, a in given if getattr(a, "target", None) is operator.getitem}
            found.append([name, sorted(node.kwargs["tensors_to_clone"]), sorted(read)])
    outputs = graph.graph.find_nodes(op="output")[0].args[0]
    shaped = [torch.empty_like(node.meta["val"], device="meta") for node in outputs]
    return make_boxed_func(lambda *_: shaped)

backend = aot_autograd(fw_compiler=capture, bw_compiler=capture)
compiled = torch.compile(kernels.attention, fullgraph=True, backend=backend, dynamic=False)
for tokens in (33, 257):
    found = []
    qkv = torch.empty(2, tokens, 3 * 160, device="meta", dtype=torch.bfloat16, requires_grad=True)
    out = compiled(qkv, 2, 5)
    out.backward(torch.empty_like(out))
    assert (out.shape, out.dtype) == ((2, tokens - 5, 160), qkv.dtype), out
    assert (qkv.grad.shape, qkv.grad.dtype) == (qkv.shape, qkv.dtype), qkv.grad
    print(json.dumps(found))

current = [0]
torch.cuda._exchange_device = lambda index: (current.append(index), current[-2])[1]
torch.cuda._maybe_exchange_device = torch.cuda._exchange_device
with FakeTensorMode():
    qkv = torch.empty(2, 33, 3 * 160, device="cuda:1")
    make_fx(kernels.attention_forward)(qkv, 2, 5)
print(current)  # the GPU's, and back to the one before
"""


def test_what_torch_compile_sees_of_the_kernels():
    """The rule chooses them; which kernels run, and which tensors each of them writes.

    What one kernel writes and the next one reads must be the same tensor.
    """
    one_tile, tiled, devices = map(json.loads, python(TRACED))
    forward, keys = ["forward_rows", ["logsum", "out"], []], ["backward_keys", ["dqkv"]]
    assert one_tile == [forward, [*keys, []]]
    rows = ["backward_rows", ["delta", "dqkv"], []]
    assert tiled == [forward, rows, [*keys, ["delta", "dqkv"]]]
    assert devices == [0, 1, 0]


# --------------------------------------------------------------------------- the choice

CUDA, BF16, FP16, FP32 = torch.device("cuda"), torch.bfloat16, torch.float16, torch.float32


def set_capability(monkeypatch, *capability):
    monkeypatch.setattr(kernels, "capability", lambda _: capability)


@pytest.mark.parametrize(
    ("capability", "dtype", "tokens", "head", "expected"),
    [
        ((9, 0), BF16, 65, 80, "Triton (CUDA capability 9.0, bf16)"),
        ((9, 0), FP16, 1370, 128, "Triton (CUDA capability 9.0, fp16)"),
        ((8, 0), BF16, 257, 16, "Triton (CUDA capability 8.0, bf16)"),
        ((8, 0), BF16, 258, 16, "PyTorch (CUDA capability 8.0 not measured over 257 tokens)"),
        ((12, 0), BF16, 1025, 64, "PyTorch (CUDA capability 12.0 not measured over 257 tokens)"),
        ((7, 5), FP16, 50, 64, "PyTorch (CUDA capability 7.5 is below 8.0)"),
        ((9, 0), FP32, 50, 64, "PyTorch (not 16-bit)"),
        ((9, 0), BF16, 50, 24, "PyTorch (heads of 24 are not 16, 32 ... 128 wide)"),
        ((9, 0), BF16, 50, 144, "PyTorch (heads of 144 are not 16, 32 ... 128 wide)"),
    ],
)
def test_the_choice_is_a_rule(capability, dtype, tokens, head, expected, monkeypatch):
    set_capability(monkeypatch, *capability)
    assert "{} ({})".format(*kernels.choose(CUDA, dtype, tokens, head)) == expected
    for other in "cpu", "mps":
        assert kernels.choose(torch.device(other), dtype, tokens, head) == ("PyTorch", "no CUDA")


def test_the_environment_overrides_the_rule(monkeypatch):
    set_capability(monkeypatch, 8, 0)
    monkeypatch.setattr(kernels, "FORCED", "torch")
    assert kernels.choose(CUDA, BF16, 50, 64) == ("PyTorch", "ATTENTION=torch")
    monkeypatch.setattr(kernels, "FORCED", "triton")
    for dtype, tokens in (FP32, 50), (BF16, 1370):  # not of the rule, but it can run
        assert kernels.choose(CUDA, dtype, tokens, 64) == ("Triton", "ATTENTION=triton")
    refused = partial(pytest.raises, ValueError)
    with refused(match=r"ATTENTION=triton .* cannot run \(heads of 24"):
        kernels.describe([(50, 64), (50, 24)], CUDA, "bf16")
    with refused(match=r"ATTENTION=triton .* cannot run \(no CUDA\): unset it"):
        kernels.attention(torch.randn(1, 3, 3 * 32), 2)
    set_capability(monkeypatch, 7, 5)
    with refused(match="below 8.0"):
        kernels.choose(CUDA, BF16, 50, 64)


@pytest.mark.parametrize(
    "stage, flags",
    [(mae_pretrain, []), (weak_pretrain, []), (finetune, ["--task", "classify", "--plan"])],
)
def test_a_stage_refuses_a_wrong_word(stage, flags, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernels, "FORCED", "flash")
    with pytest.raises(SystemExit, match="^2$"):
        stage.main([*flags, "--out", str(tmp_path / "run")])
    line = "ATTENTION=flash in the environment: set torch, triton or nothing"
    assert capsys.readouterr() == ("", f"{stage.__name__}.py: {line}\n")
    assert not (tmp_path / "run").exists()


def test_the_line_of_a_run_names_the_shapes_where_they_differ(monkeypatch):
    set_capability(monkeypatch, 10, 0)
    shapes = [(50, 64), (197, 32), (1025, 64), (65, 80)]
    assert kernels.describe(shapes[:2], CUDA, "bf16") == "Triton (CUDA capability 10.0, bf16)"
    assert kernels.describe(shapes, CUDA, "bf16") == (
        "Triton (CUDA capability 10.0, bf16) for 50 tokens with heads of 64, "
        "197 tokens with heads of 32, 65 tokens with heads of 80; PyTorch "
        "(CUDA capability 10.0 not measured over 257 tokens) for 1025 tokens with heads of 64"
    )
    assert kernels.describe(shapes, CUDA, "fp32") == "PyTorch (not 16-bit)"
    assert "relative positions" in kernels.describe([], CUDA, "bf16")


def test_without_triton_there_is_pytorchs_attention():
    """In a process that cannot import triton, and reads ATTENTION."""
    code = """
import sys
sys.modules["triton"] = None
import torch, kernels, model
kernels.capability = lambda _: (9, 0)
print(kernels.describe([(65, 80)], torch.device("cuda"), "bf16"))
kernels.FORCED = None
print(kernels.describe([(65, 80)], torch.device("cuda"), "bf16"))
qkv = torch.randn(2, 9, 3 * 32)
torch.testing.assert_close(kernels.attention(qkv, 2), kernels.reference(qkv, 2))
model.Classifier("64x2x2", image_size=24, patch_size=8)(torch.zeros(1, 3, 24, 24))
"""
    lines = ["PyTorch (ATTENTION=torch)", "PyTorch (no Triton)"]
    assert python(code, attention="torch") == lines


# --------------------------------------------------------------------- compiled, no GPU

COMPILED = """
import json, sys
sys.path.insert(0, "tests/bench")
from attention import compiled
for shape in (50, 0, 112), (197, 0, 64):  # one tile, and many
    print(json.dumps([*compiled(int(sys.argv[1]), *shape)]))
"""


@pytest.mark.parametrize(("chip", "kilobytes"), [(80, 163), (90, 227), (100, 227)])
def test_each_kernel_compiles_without_spills(chip, kilobytes):
    """For A100, H100 and B200, with the shared memory of a block in CUDA's programming guide.

    wgmma is Hopper's matrix product.
    """
    one_tile, tiled = map(json.loads, python(COMPILED, str(chip)))
    assert [name for name, *_ in one_tile] == ["forward_rows", "backward_keys"]
    assert [name for name, *_ in tiled] == ["forward_rows", "backward_rows", "backward_keys"]
    for name, _, spilled, shared, wgmma in one_tile + tiled:
        assert spilled == 0, f"{name} spills {spilled} bytes"
        assert shared <= kilobytes * 1024 and wgmma == (chip == 90), name
