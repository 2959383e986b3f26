"""kernels.py against float64, in Triton's interpreter where there is no GPU, and compiled for three.

conftest.py sets TRITON_INTERPRET where there is no GPU, before triton is imported.
"""

import itertools
import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from torch.utils.checkpoint import checkpoint

import finetune
import kernels
import mae_pretrain
import model as models
import weak_pretrain
from support import checkpoints

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = (1, 2, 15, 16, 17, 50, 63, 64, 65, 127, 129, 197, 257)
HEADS = (16, 32, 48, 64, 80, 96, 112, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def exact_bf16(monkeypatch):
    """The interpreter multiplies bf16 as if its bits were an integer: widen what goes into dot."""
    if DEVICE == "cuda":
        return
    from triton.runtime import interpreter

    def wide(tile):
        if tile.dtype.scalar != interpreter.tl.bfloat16:
            return tile
        bits = tile.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), interpreter.tl.float32)

    plain = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: plain(self, wide(a), wide(b), *rest),
    )


def errors(qkv, heads, first_query):
    """Largest errors against float64 of (out, gradient), of the kernels and of PyTorch's formula."""
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
    return torch.tensor(found, device="cpu").tolist()


def check(qkv, heads, first_query=0):
    for ours, theirs in zip(*errors(qkv, heads, first_query), strict=True):
        assert ours <= 2 * theirs + 4 * torch.finfo(qkv.dtype).eps


def python(code, *arguments, **options):
    """A program that runs in a process of its own, to its end."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done


# Every number of tokens with every dtype, and every head with every dtype, not all with all.
CASES = [
    (tokens, HEADS[(i + 3 * j) % len(HEADS)], dtype)
    for (i, tokens), (j, dtype) in itertools.product(enumerate(TOKENS), enumerate(DTYPES))
]


@pytest.mark.parametrize("tokens, head, dtype", CASES)
def test_attention_and_its_gradient_are_as_exact_as_pytorchs(tokens, head, dtype):
    torch.manual_seed(0)
    heads = 3 if tokens < 100 else 1
    qkv = torch.randn(1 if tokens > 64 else 3, tokens, 3 * heads * head, device=DEVICE).to(dtype)
    check(qkv, heads)


@pytest.mark.parametrize("tokens, head, first_query", [(50, 32, 13), (65, 80, 64), (140, 48, 37)])
def test_only_the_last_tokens_ask(tokens, head, first_query):
    torch.manual_seed(0)
    qkv = torch.randn(2, tokens, 3 * 3 * head, device=DEVICE)
    check(qkv, 3, first_query)
    given = qkv.clone().requires_grad_()
    kernels.triton_attention(given, 3, first_query).sum().backward()
    assert (given.grad[:, :first_query, : 3 * head] == 0).all()  # who does not ask


def test_what_is_not_contiguous_is_copied():
    torch.manual_seed(0)
    wide = torch.randn(4, 40, 3 * 2 * 32 + 5, device=DEVICE)
    check(wide[::2, 7:30, 3:195], 2)
    check(torch.randn(4, 160, 205, device=DEVICE)[::2, 5:155, 3:195], 2, 20)  # tiled
    check(torch.randn(2, 3 * 2 * 32, 20, device=DEVICE).transpose(1, 2), 2)


@pytest.mark.parametrize("tokens", [20, 150])
def test_large_scores_and_constant_rows(tokens):
    torch.manual_seed(0)
    qkv = torch.randn(1, tokens, 3 * 2 * 16, device=DEVICE)
    qkv[..., :64] *= 40  # scores of thousands, of either sign
    out = kernels.triton_attention(qkv.requires_grad_(), 2)
    out.square().sum().backward()
    assert out.isfinite().all() and qkv.grad.isfinite().all()
    torch.testing.assert_close(out, kernels.reference(qkv, 2), rtol=1e-4, atol=1e-4)
    qkv = qkv.detach()
    qkv[..., :32], qkv[..., 32:64] = 40, -40  # all scores far below 0: where there is no key, 0 is
    qkv = qkv.requires_grad_()  # far above them, and 2^0 over their sum infinite
    kernels.triton_attention(qkv, 2).square().sum().backward()
    assert qkv.grad.isfinite().all()
    constant = torch.ones(1, tokens, 3 * 2 * 16, device=DEVICE)
    torch.testing.assert_close(kernels.triton_attention(constant, 2), constant[..., :32])


def test_the_operators_are_what_pytorch_expects():
    qkv = torch.randn(2, 33, 3 * 48, device=DEVICE, requires_grad=True)
    torch.library.opcheck(kernels.fused, (qkv, 3, 5))
    out, logsum = (tensor.detach() for tensor in kernels.fused(qkv, 3, 5))
    given = torch.randn_like(out), qkv.detach(), out, logsum, 3, 5
    torch.library.opcheck(kernels.fused_backward, given)


def test_same_input_same_bits():
    torch.manual_seed(0)
    qkv = torch.randn(2, 70, 3 * 2 * 48, device=DEVICE)
    found = []
    for _ in range(2):
        given = qkv.clone().requires_grad_()
        kernels.triton_attention(given, 2).square().sum().backward()
        found.append(given.grad)
    assert torch.equal(*found)


# -------------------------------------------------------------------------------- through PyTorch


def gradients(build, images, *arguments):
    """Loss and all gradients of a freshly built model."""
    model = build().to(DEVICE)
    loss = model(images, *arguments).square().mean()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return loss, grads


TINY = {"size": "64x2x2", "image_size": 24, "patch_size": 8}  # heads of 32; 9 patches


@pytest.mark.parametrize("kind", ["mae", "classifier"])
def test_a_training_step_is_the_same_with_each_backend(kind, monkeypatch):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 24, 24, device=DEVICE)
    if kind == "mae":
        ids = torch.stack([torch.randperm(9) for _ in range(2)]).to(DEVICE)
        given, build = (images, ids), lambda: models.MAE(decoder=(32, 2, 2), **TINY)
        shapes = {(3, 0, 32), (10, 0, 16), (10, 3, 16)}
    else:
        given, shapes = (images,), {(10, 0, 32)}
        build = lambda: models.Classifier(classes=5, head_std=1.0, **TINY)
    asked, fused = set(), kernels.triton_attention

    def noticed(qkv, heads, first_query=0):
        asked.add((qkv.shape[1], first_query, qkv.shape[2] // (3 * heads)))
        return fused(qkv, heads, first_query)

    monkeypatch.setattr(kernels, "triton_attention", noticed)
    monkeypatch.setattr(kernels, "CHOSEN", {})
    loss, expected = gradients(build, *given)
    assert not asked
    kernels.CHOSEN.update({(*shape, "torch.float32"): True for shape in shapes})
    found_loss, found = gradients(build, *given)
    assert asked == shapes
    torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=0)
    for name, grad in expected.items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(found[name], grad, rtol=0, atol=1e-5 * scale + 1e-9)


@pytest.mark.parametrize("how", ["compile", "checkpoint", "both"])
def test_compiled_and_recomputed_blocks_go_through_the_kernels(how, monkeypatch):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 24, 24, device=DEVICE)
    monkeypatch.setattr(kernels, "CHOSEN", {(10, 0, 32, "torch.float32"): True})

    def build(compile, recompute):
        model = models.Classifier(classes=5, head_std=1.0, **TINY)
        for block in model.blocks:
            if recompute:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            if compile:
                block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
        return model

    loss, expected = gradients(lambda: build(False, False), images)
    changed = lambda: build(how != "checkpoint", how != "compile")
    found_loss, found = gradients(changed, images)
    torch.testing.assert_close(found_loss, loss)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad)


def test_autocast_hands_the_kernels_its_own_dtype():
    qkv = torch.randn(1, 20, 16, device=DEVICE, requires_grad=True)
    linear = torch.nn.Linear(16, 3 * 32, device=DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        given = linear(qkv)
        out = kernels.triton_attention(given, 2)
    assert out.dtype == torch.float16
    expected = kernels.reference(given.float(), 2)
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=2e-3)
    out.float().sum().backward()
    assert qkv.grad.isfinite().all()


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
triton.runtime.driver.set_active(driver)  # enough to trace with; nothing is launched
torch.cuda.get_device_capability = lambda _: (9, 0)
has_gpu, torch.cuda.is_available = torch.cuda.is_available, lambda: True
import kernels
torch.cuda.is_available = has_gpu

def capture(graph, inputs):
    for node in graph.graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            name = kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__
            given = node.kwargs["kwargs"].items()  # getitem: of what a kernel before it wrote
            read = {n for n, a in given if getattr(a, "target", None) is operator.getitem}
            found.append([name, sorted(node.kwargs["tensors_to_clone"]), sorted(read)])
    outputs = graph.graph.find_nodes(op="output")[0].args[0]
    shaped = [torch.empty_like(node.meta["val"], device="meta") for node in outputs]
    return make_boxed_func(lambda *_: shaped)

backend = aot_autograd(fw_compiler=capture, bw_compiler=capture)
compiled = torch.compile(kernels.triton_attention, fullgraph=True, backend=backend, dynamic=False)
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
    """In a process that does not interpret: which kernels, and which tensors each of them writes.

    A tensor that one kernel writes and the next one reads must be the written one.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    one_tile, tiled, devices = map(json.loads, python(TRACED, env=environment).stdout.splitlines())
    forward, keys = ["forward_rows", ["logsum", "out"], []], ["backward_keys", ["dqkv"]]
    assert one_tile == [forward, [*keys, []]]
    rows = ["backward_rows", ["delta", "dqkv"], []]
    assert tiled == [forward, rows, [*keys, ["delta", "dqkv"]]]
    assert devices == [0, 1, 0]


# ------------------------------------------------------------------------------------- the choice


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is only pretended, with times that the test sets."""
    times = {}
    monkeypatch.delenv("ATTENTION", raising=False)
    monkeypatch.setattr(kernels, "CHOSEN", {})
    monkeypatch.setattr(kernels, "TIMED", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    monkeypatch.setattr(kernels, "random_tensors", lambda *_: (None, None))
    monkeypatch.setattr(kernels, "both_ways", lambda function, *_: function)
    monkeypatch.setattr(kernels, "median", lambda function: times[function])
    times |= {kernels.triton_attention: 2.0, kernels.pytorch_attention: 3.0}
    return times


CUDA, BF16, SHAPE = torch.device("cuda"), torch.bfloat16, (65, 0, 4, 80)
KEY = (65, 0, 80, "torch.bfloat16")


def test_the_faster_way_is_chosen_and_said(gpu, monkeypatch):
    line = kernels.choose([SHAPE, (257, 65, 4, 32)], 8, CUDA, BF16)
    assert line == "Triton (1.50x PyTorch, timed now) for N=65 d=80, N=257 d=32"
    assert kernels.CHOSEN == {KEY: True, (257, 65, 32, "torch.bfloat16"): True}
    assert kernels.TIMED == {("H100", *key): 1.5 for key in kernels.CHOSEN}
    kernels.CHOSEN.clear()
    kernels.TIMED.clear()
    gpu[kernels.triton_attention] = 4.0
    assert "PyTorch (0.75x PyTorch, timed now)" in kernels.choose([SHAPE], 8, CUDA, BF16)
    assert kernels.CHOSEN == {KEY: False}
    gpu[kernels.triton_attention] = 1.0  # what was timed stays, in the run that goes on, too
    kernels.CHOSEN.clear()
    assert "0.75x PyTorch, timed before" in kernels.choose([SHAPE], 8, CUDA, BF16)
    assert kernels.CHOSEN == {KEY: False}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H200")  # but not on another GPU
    assert "3.00x PyTorch, timed now" in kernels.choose([SHAPE], 8, CUDA, BF16)
    assert kernels.CHOSEN == {KEY: True}
    assert kernels.TIMED == {("H100", *KEY): 0.75, ("H200", *KEY): 3.0}


def test_the_environment_decides(gpu, monkeypatch):
    for way, chosen in (("triton", True), ("torch", False)):
        monkeypatch.setenv("ATTENTION", way)
        assert f"ATTENTION={way}" in kernels.choose([SHAPE], 8, CUDA, BF16)
        assert kernels.CHOSEN == {KEY: chosen} and not kernels.TIMED  # nothing to be kept
    monkeypatch.setenv("ATTENTION", "flash")
    with pytest.raises(ValueError, match="ATTENTION=flash"):
        kernels.choose([SHAPE], 8, CUDA, BF16)


@pytest.mark.parametrize("stage", [mae_pretrain, weak_pretrain, finetune])
def test_a_stage_finds_a_wrong_word_before_anything_is_loaded(stage, monkeypatch, capsys):
    monkeypatch.setenv("ATTENTION", "flash")
    with pytest.raises(SystemExit) as stopped:
        stage.main(["--plan", *(["--task", "classify"] if stage is finetune else [])])
    assert stopped.value.code == 2
    line = f"{stage.__name__}.py: ATTENTION=flash in the environment: it is torch or triton, "
    assert capsys.readouterr() == ("", line + "or not set\n")


def choose_as(rank, folder, times):
    """One of two processes, whose kernels take times[rank] where PyTorch's take 3; None: fail."""
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.cuda.get_device_name = lambda _: f"GPU {rank}"
    kernels.obstacle = lambda *_: None
    kernels.random_tensors = lambda *_: (None, None)
    kernels.both_ways = lambda way, *_: way
    kernels.median = lambda way: 3.0 if way is kernels.pytorch_attention else ours * 1.0
    for ours in (each[rank] for each in times):
        line = kernels.choose([SHAPE], 8, torch.device("cpu"), BF16)
        with open(f"{folder}/{rank}", "a") as file:
            print(json.dumps([line, *kernels.CHOSEN.values(), *kernels.TIMED.items()]), file=file)
        kernels.TIMED.clear()
    dist.barrier()
    dist.destroy_process_group()


def test_processes_agree_on_the_slowest_one_s_answer(tmp_path):
    times = [(2, 4), (4, 2), (2, 1.5), (2, None)]
    torch.multiprocessing.spawn(choose_as, (str(tmp_path), times), nprocs=2)
    for rank in (0, 1):
        said = [json.loads(line) for line in (tmp_path / str(rank)).read_text().splitlines()]
        key, shape = [f"GPU {rank}", *KEY], "for N=65 d=80"
        slower = [f"PyTorch (0.75x PyTorch, timed now) {shape}", False, [key, 0.75]]
        assert said[:2] == [slower, slower]
        assert said[2] == [f"Triton (1.50x PyTorch, timed now) {shape}", True, [key, 1.5]]
        assert "kernels fail" in said[3][0] and said[3][1:] == [False]


def test_what_the_kernels_cannot_do_is_pytorchs_and_says_why(gpu, monkeypatch):
    def fails(*_):
        raise RuntimeError("no such\ninstruction")

    def line(shape=SHAPE, device=CUDA, dtype=BF16):
        said = kernels.choose([shape], 8, device, dtype)
        assert not any(kernels.CHOSEN.values()) and said.startswith("PyTorch (")
        assert not kernels.TIMED  # nothing to be kept
        kernels.CHOSEN.clear()
        return said

    assert "no GPU" in line(device=torch.device("cpu"))
    assert "16 bits" in line(dtype=torch.float32)
    assert "heads are not" in line((65, 0, 4, 24)) and "heads are not" in line((65, 0, 4, 144))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
        assert "compute capability" in line()
        patch.setenv("ATTENTION", "triton")  # which cannot be had either
        assert "compute capability" in line()
    monkeypatch.setattr(kernels, "median", fails)
    assert "kernels fail: RuntimeError no such instruction" in line()
    monkeypatch.setattr(kernels.triton, "__version__", None)
    assert "no Triton" in line()


def test_without_triton_there_is_pytorchs_attention():
    """In a process whose triton cannot be imported."""
    code = """
import sys
sys.modules["triton"] = None
import torch, kernels, model
print(kernels.choose([(65, 0, 4, 80)], 8, torch.device("cpu"), torch.float32))
qkv = torch.randn(2, 9, 3 * 32)
torch.testing.assert_close(kernels.attention(qkv, 2), kernels.reference(qkv, 2))
model.Classifier("64x2x2", image_size=24, patch_size=8)(torch.zeros(1, 3, 24, 24))
"""
    done = python(code)
    assert done.stdout == "PyTorch (no GPU for Triton) for N=65 d=80\n"


def test_the_choice_travels_with_the_checkpoint(tmp_path, monkeypatch):
    model = models.ViT("16x1x2", image_size=8, patch_size=8)
    optimizer = torch.optim.AdamW(models.parameter_groups(model, 0.0), fused=True)
    model(torch.ones(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    monkeypatch.setattr(kernels, "TIMED", {("H100", *KEY): 1.5})
    checkpoints.save_checkpoint(tmp_path, 1, model, optimizer, {"bad": 0})
    kernels.TIMED.clear()
    record = checkpoints.load_checkpoint(tmp_path / "step-00000001", model, optimizer)
    assert kernels.TIMED == {("H100", *KEY): 1.5} and record == {"bad": 0, "step": 1}


# ------------------------------------------------------------------------------ compiled, no GPU

COMPILED = """
import json, os, re, subprocess, sys, tempfile
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import kernels

objdump = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
chip, found = int(sys.argv[2]), []
torch.cuda.get_device_capability = lambda _: divmod(chip, 10)
for tokens, first, columns in json.loads(sys.argv[1]):
    for kernel in (kernels.forward_rows, kernels.backward_rows, kernels.backward_keys):
        sides = ("KEYS", "ROWS") if kernel is kernels.backward_keys else ("ROWS", "KEYS")
        sizes = kernels.tiles(tokens, first, columns, torch.device("cuda"), *sides)
        if kernel is kernels.backward_rows and sizes["KEYS"] >= tokens:
            continue  # not needed there
        options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
        kinds = {"logsum": "*fp32", "delta": "*fp32", "heads": "i32"}
        kinds |= dict.fromkeys(sizes, "constexpr")
        names = list(kernel.arg_names)
        aligned = [n for n in names if n not in (*sizes, "heads")]
        attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
        signature = {name: kinds.get(name, "*bf16") for name in names}
        source = ASTSource(kernel, signature, sizes, attributes)
        built = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            command = [objdump, "-res-usage", file.name]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = map(int, re.search(r"REG:(\\d+) STACK:(\\d+)", said).groups())
        name, wgmma = kernel.fn.__name__, "wgmma" in built.asm["ptx"]
        found.append((name, tokens, columns, registers, stack, built.metadata.shared, wgmma))
print(json.dumps(found))
"""

CHIPS = {80: 163, 90: 227, 100: 227}


@pytest.fixture(scope="module", autouse=True)
def compilers():
    """(shapes, a process for each chip): begun before the tests above, which want one core."""
    longest = 1370  # tiles are the same from 129 tokens on: of the long ones, one for each width
    shapes = {s[:2] + s[3:] for s in kernels.SHAPES if s[0] < 198 or s[3] != 64 or s[0] == longest}
    shapes = [s for s in shapes if s[0] not in (257, 1025) or s[1]]
    shapes = sorted([*shapes, (50, 0, 112), (longest, 0, 112)])  # of no size, but whoever needs it
    options = {"env": {**os.environ, "TRITON_INTERPRET": "0"}, "cwd": ROOT, "text": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    line = [sys.executable, "-c", COMPILED, json.dumps(shapes)]
    processes = {chip: subprocess.Popen([*line, str(chip)], **options) for chip in CHIPS}
    yield shapes, processes
    for process in processes.values():
        process.kill()


@pytest.mark.parametrize("chip", CHIPS)
def test_every_stage_s_shapes_compile_without_spills(chip, compilers):
    """For A100, H100 and B200, from their KiB of shared memory for a block (CUDA's programming
    guide, compute capabilities); wgmma is Hopper's own matrix product."""
    shapes, processes = compilers
    printed, said = processes[chip].communicate()
    assert processes[chip].returncode == 0, said
    found = json.loads(printed.splitlines()[-1])
    assert len(found) >= 2 * len(shapes)
    for name, tokens, columns, registers, stack, shared, wgmma in found:
        line = f"sm_{chip} {name} N={tokens} d={columns}: {registers} registers, "
        print(f"{line}{shared} bytes of shared memory")
        assert stack == 0, f"{name} {tokens} {columns} spills {stack} bytes"
        assert shared <= CHIPS[chip] * 1024 and wgmma == (chip == 90)
