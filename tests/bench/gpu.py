"""Everything about one GPU in six minutes: is it right, how fast is it, and what takes time.

    python tests/bench/gpu.py --peer MAE_CHECKOUT           # a checkout of facebookresearch/mae
    python tests/bench/gpu.py --rehearse                    # tiny models on the CPU: finds typos
    python tests/bench/gpu.py --parts ahead steps --sizes L         # some of it

The results (--out, tests/bench/results) are GPU-DATE.csv, a row for each measurement,
and GPU-DATE-profile.txt. Rows are written as they come, the most important ones first:
a run may be cut off at any moment. What does not fit into --seconds is left out, and
named.

correctness  Stage 1 (toy, 30 steps, stopped and resumed) in bf16 on the GPU against fp32 on the
             CPU; the Triton attention against float64.
ahead        Meanwhile, other processes compile the largest models, into torch's cache on disk.
steps        Training steps as mae_pretrain.py takes them: normalize uint8, forward, backward,
             gradient norm, one host read, AdamW, zero_grad. Pictures lie on the GPU. Variants of
             a size run in turn, as far as memory allows. Times are medians of 5 rounds of 10
             steps, with one synchronisation a round.
profile      What the GPU does in three steps of B at 256 and of H at 128.

The peer gets what ours has: fused AdamW, bf16, the norm, one read; its memory layout is
its own. MFU counts our FLOPs for both. "peak GiB" is without what the variants beside
it hold. "warm-up s" is for building, compiling and 4 steps: after "ahead", compiled
code comes from the cache. Predictions and goals: see docs/speed.md.
"""

import argparse
import csv
import gc
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace

REHEARSAL = "--rehearse" in sys.argv
if REHEARSAL:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the processes that are started, too

import torch
import torch.distributed as dist
from attention import errors_of, random_tensors
from common import ROOT, make_parser
from peer import build_peer, peer_step
from torch.nn.utils import get_total_norm

import data
import kernels
import model as models
from support import launch, plan
from support.cuda_graph import CUDAGraph

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
COLUMNS = ["part", "size", "batch", "variant", "images/s", "ms per step", "slowest", "fastest"]
COLUMNS += ["mfu", "over peer", "peak GiB", "planned GiB", "warm-up s", "note"]
PARTS = ["correctness", "ahead", "steps", "profile"]
GROUPS = [("B", 256), ("H", 128), ("L", 256), ("B", 1024), ("H", 256)]
OURS = {  # what a variant changes of what the stage does by default
    "compiled": {},
    "compiled+graph": {"graph": True},
    "compiled again": {},  # how far two equal ones differ
    "compiled, read late": {"late": True},  # numbers of the step before, after this one's
    "compiled, ATTENTION=torch": {"attention": "torch"},
    "eager": {"compile": False},
    "FSDP2, compiled": {"shard_group": 1},
}
PEERS = {  # (F.scaled_dot_product_attention instead of its own attention, torch.compile)
    "peer, SDPA": (True, False),
    "peer, SDPA, compiled": (True, True),
    "peer": (False, False),
}
MAIN = ["compiled", "compiled+graph", "peer, SDPA, compiled", "compiled, read late"]
MAIN += ["peer, SDPA"]
OTHERS = [variant for variant in [*OURS, *PEERS] if variant not in MAIN]
# (tokens, first query, heads, columns) of the encoder, the decoder and its last block:
# B, then H.
SHAPES = [(50, 0, 12, 64), (197, 0, 16, 32), (197, 50, 16, 32)]
SHAPES += [(65, 0, 16, 80), (257, 0, 16, 32), (257, 65, 16, 32)]
KINDS = {  # of kernels, by words in their names
    "matrix products": "nvjet|gemm|cutlass|splitK",
    "attention": "^(forward|backward)_(rows|keys)|flash|fmha",
    "fused AdamW and norm": "multi_tensor_apply",
    "compiled": "^triton_",
    "others": "",
}
# Of stage 1's losses. In bf16 on a CPU, these 30 differed by up to 0.05 % from those in
# fp32.
TOLERANCE = 0.003
STAGE = "--steps=30 --save-every=10 --log-every=1 --workers=2 "
if REHEARSAL:
    STAGE += "--size=64x1x2 --decoder=32x2x2 --image-size=32 --patch-size=8 --batch-size=8"
    GROUPS = [("B", 4), ("H", 2)]
    torch.compile = partial(torch.compile, backend="aot_eager")  # needs no C++ compiler


def parse_arguments():
    parser, sizes = make_parser(__doc__), ["B", "H", "L"]
    add, peer, results = parser.add_argument, ROOT / "runs/mae_public", ROOT / "tests/bench/results"
    add("--peer", type=Path, default=peer, help="a checkout of facebookresearch/mae")
    add("--out", type=Path, default=results, help="folder of the results")
    add("--seconds", type=float, default=330, help="for all of it")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="see above")
    add("--sizes", nargs="+", choices=sizes, default=sizes, help="of models")
    add("--rehearse", action="store_true", help="tiny models on the CPU, compiled by aot_eager")
    add("--job", type=json.loads, help=argparse.SUPPRESS)  # for a process that this one starts
    options = parser.parse_args()
    if not CUDA and not REHEARSAL:
        parser.error("there is no GPU here: --rehearse runs on the CPU")
    return options


# ----------------------------------------------------------------------------------------- results


def show(row):
    """Print a row of the CSV, or its header."""
    cells = "".join(f"{row[name]:>12}" for name in COLUMNS[4:-1] if row["warm-up s"])
    name = f"{row['part']:11} {row['size']:4} {row['batch']:>5} {row['variant']:27}"
    print(name + cells, row["note"], flush=True)


def write(path, part, size="", batch="", variant="", **cells):
    """Append a row to the CSV, and print it."""
    row = {"part": part, "size": size, "batch": batch, "variant": variant} | cells
    row = {name: f"{cell:.5g}" if isinstance(cell, float) else cell for name, cell in row.items()}
    with open(path, "a", newline="") as file:
        csv.DictWriter(file, COLUMNS).writerow(row)
    show(dict.fromkeys(COLUMNS, "") | row)


def compare_with_peer(path):
    """Fill in the column of ratios to the fastest peer of the same size and batch. All rows."""
    with open(path, newline="") as file:
        rows, fastest = list(csv.DictReader(file)), {}
    for row in (timed := [row for row in rows if row["images/s"]]):
        key, rate = (row["size"], row["batch"]), float(row["images/s"])
        fastest[key] = max(fastest.get(key, 0), rate * (row["variant"] in PEERS))
    for row in timed:
        if best := fastest[row["size"], row["batch"]]:
            row["over peer"] = f"{float(row['images/s']) / best:.3f}"
    with open(f"{path}.tmp", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(f"{path}.tmp", path)
    return rows


def wrong(error):
    return f"WRONG: {type(error).__name__} {' '.join(str(error).split())}"[:200]


# ------------------------------------------------------------------------------------------- steps


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def free_memory():
    """Bytes that a new variant can have. (A recorded graph's memory is not free.)"""
    if not CUDA:
        return math.inf
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def build(size):
    tiny = {"size": "64x1x2", "decoder": (32, 2, 2), "image_size": 32, "patch_size": 8}
    with torch.device("meta"):
        return models.MAE(**(tiny if REHEARSAL else {"size": size}))


def planned_memory(model, batch, shard_group=None):
    run = {"processes": 1, "gpus": 0, "batch_size": batch, "device": DEVICE, "memory": None}
    run |= {"shard_group": shard_group, "precision": "bf16", "checkpoint_activations": False}
    return plan.training_memory(model, SimpleNamespace(**run), batch)["peak"]


def adam(model):
    groups = models.parameter_groups(model, 0.05)
    return torch.optim.AdamW(groups, 1e-4, betas=(0.9, 0.95), fused=True)


def check(numbers, copied=None):
    """Raise if a number of a tensor is not finite. copied: the event after its copy to the host."""
    if copied:
        copied.synchronize()
    if not numbers.isfinite().all():
        raise RuntimeError(f"not finite: {numbers.tolist()}")


def our_step(
    model, images, graph=False, late=False, attention=None, compile=True, shard_group=None
):
    """(a function that takes a step as mae_pretrain.py does, what computes the attention)."""
    batch, images = len(images), images.contiguous(memory_format=torch.channels_last)  # as loaded
    if shard_group:
        backend = "cpu:gloo,cuda:nccl" if CUDA else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel = models.parallelize(model, DEVICE, shard_group, precision="bf16", compile=compile)
    models.initialize(model)
    optimizer, weight = adam(model), torch.ones(batch, device=DEVICE)
    ids = torch.rand(batch, model.num_patches, device=DEVICE).argsort(dim=1)
    kernels.FORCED = attention
    note = kernels.describe(plan.attention_shapes(model), DEVICE, "bf16")
    unread = []

    def forward_backward(images, ids, weight):
        losses = parallel(data.normalize(images), ids)  # (B,)
        loss = (losses * weight).sum() / batch
        loss.backward()
        return torch.stack([loss.detach(), weight.sum()])

    if graph and CUDA:
        forward_backward = CUDAGraph(forward_backward)

    def step():
        kernels.FORCED = attention  # another variant may have set another one
        sums = torch.zeros(5, device=DEVICE)
        sums[:2] += forward_backward(images, ids, weight)
        gradients = [models.local(p.grad) for p in model.parameters() if p.grad is not None]
        sums[2], sums[3] = 0, 0
        sums[4] = get_total_norm(gradients).square()
        # A copy waits for all that was queued before it: here, for this step and no
        # later one.
        unread.append((sums.to("cpu", non_blocking=CUDA), torch.cuda.Event() if CUDA else None))
        if CUDA:
            unread[-1][1].record()
        if not late:
            check(*unread.pop())
        optimizer.step()
        optimizer.zero_grad(set_to_none=not graph)
        if len(unread) > 1:
            check(*unread.pop(0))

    return step, note


def prepare(size, batch, variant, checkout):
    """(a step that is warm, cells of the variant's row)."""
    began, model, way = time.perf_counter(), build(size), OURS.get(variant, {})
    cells = {"planned GiB": planned_memory(model, batch, way.get("shard_group")) / 2**30}
    images = torch.randint(256, (batch, *model.input_shape), dtype=torch.uint8, device=DEVICE)
    held = torch.cuda.memory_allocated() if CUDA else 0
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    if variant in OURS:
        step, cells["note"] = our_step(model, images, **way)
    else:
        with DEVICE:
            peer = build_peer(checkout, model)
        step = peer_step(peer, adam(peer), images, *PEERS[variant], check)
    for _ in range(3):  # a graph runs as it is twice, then it is recorded, and replayed
        step()
    last = round_of(step, 1)
    cells["warm-up s"] = time.perf_counter() - began
    cells["peak GiB"] = launch.peak_memory(DEVICE) - held / 2**30
    print(f"{size} {batch} {variant} is warm: {last:.1f} ms per step at first", flush=True)
    return step, cells


def time_steps(path, checkout, size, batch, variants, rounds, profile):
    """Measure as many of the variants as fit into memory and time.

    An error ends it, since it may leave the GPU unusable: see measure(). rounds 0: just
    compile.
    """
    say, kept, longest = partial(write, path, "steps" if rounds else "ahead", size, batch), {}, 0.0
    until = time.time() + signal.getitimer(signal.ITIMER_REAL)[0]  # see start()
    model, (peak, _) = build(size), plan.peak_flops(DEVICE)
    for variant in variants:
        late = time.time() + 1.2 * longest + 10 > until
        if kept and (late or free_memory() < 1.3 * planned_memory(model, batch)):
            break
        try:
            kept[variant] = prepare(size, batch, variant, checkout)
        except Exception as error:  # noqa: BLE001 (it becomes a row)
            if not (kept and isinstance(error, torch.OutOfMemoryError)):  # alone, it may fit
                say(variant, note=wrong(error))
            break
        longest = max(longest, kept[variant][1]["warm-up s"])
    gc.collect()  # what is left of one that failed
    times = {variant: [] for variant in kept}
    for variant in [*kept] * rounds:
        if time.time() < until - 5 or not times[variant]:
            try:
                times[variant].append(round_of(kept[variant][0], 2 if REHEARSAL else 10))
            except Exception as error:
                say(variant, note=wrong(error))
                raise
    for variant, (_, cells) in kept.items():
        if spent := times[variant]:
            cells |= {"slowest": max(spent), "fastest": min(spent)}
            cells["ms per step"] = statistics.median(spent)
            cells["images/s"] = 1e3 * batch / cells["ms per step"]
            flops = 3 * plan.flops_per_image(model) * cells["images/s"]
            cells["mfu"] = flops / peak if peak else ""
        say(variant, **cells)
    for variant in profile:
        if variant in kept:
            write_profile(path, f"{size} {batch} {variant}", kept[variant][0])


def round_of(step, steps):
    """Milliseconds of a step, of so many that nothing waits for between them."""
    synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize()
    return 1e3 * (time.perf_counter() - began) / steps


def write_profile(path, title, step, steps=3):
    """Append to the profile: when the GPU computes nothing, and the most expensive kernels.

    Profiling takes the host's time: a step that waits for the host waits longer here.
    """
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if CUDA else activity.CPU]) as profiler:
        for _ in range(steps):
            step()
        synchronize()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    computes = ("kernel", "gpu_memcpy", "gpu_memset") if CUDA else ("cpu_op",)
    events = [event for event in events if event.get("cat") in computes]
    events.sort(key=lambda event: event["ts"])
    busy, end, spent = 0.0, events[0]["ts"], {}
    for event in events:  # microseconds; where events overlap, time counts once
        stop = event["ts"] + event["dur"]
        busy, end = busy + max(0.0, stop - max(event["ts"], end)), max(end, stop)
        spent.setdefault(event["name"], []).append(event["dur"])
    span, total = end - events[0]["ts"], sum(map(sum, spent.values()))
    idle, each = 1 - busy / span, 1e3 * steps  # per step, in ms
    line = f"{title}: {span / each:.2f} ms per step, nothing computes in {idle:.1%} of it"
    lines, kinds = [f"{line}, {len(events) / steps:.0f} kernels"], dict.fromkeys(KINDS, 0.0)
    for name, times in spent.items():
        kinds[next(kind for kind, words in KINDS.items() if re.search(words, name))] += sum(times)
    lines.append(", ".join(f"{kind} {time / each:.2f} ms" for kind, time in kinds.items() if time))
    for name, times in sorted(spent.items(), key=lambda item: -sum(item[1]))[:25]:
        line = f"{sum(times) / each:9.3f} ms {sum(times) / total:6.1%} {len(times) / steps:5.0f} x"
        lines.append(f"{line} {name[:100]}")
    print(*lines, sep="\n", flush=True)
    with open(path.with_name(f"{path.stem}-profile.txt"), "a") as file:
        file.write("\n".join(lines) + "\n\n")


# ------------------------------------------------------------------------------------- correctness


def check_attention(path):
    """Of each shape, against float64: its errors may be twice PyTorch's own."""
    ours = kernels.triton_attention if CUDA else kernels.pytorch_attention
    for tokens, first, heads, columns in SHAPES:
        shape = 2 if REHEARSAL else 16, tokens, first, heads, columns
        tensors = random_tensors(*shape, DEVICE, torch.bfloat16)
        errors = errors_of((ours, kernels.pytorch_attention), *tensors, heads, first)
        right = errors[0] <= 2 * errors[1] and errors[2] <= 2 * errors[3]
        note = "result off by {:.1e} (PyTorch {:.1e}), gradient {:.1e} ({:.1e})".format(*errors)
        name = f"attention {tokens - first} x {tokens}, d={columns}"
        note = f"{'right' if right else 'WRONG'}: {note}"
        write(path, "correctness", variant=name, note=note)


def run_stage(until, folder, flags=(), cpu=False):
    """Losses of stage 1; on the GPU, of a run that was stopped and went on."""
    command = [sys.executable, "mae_pretrain.py", "--out", folder, *STAGE.split(), *flags]
    how = {"env": os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})}
    how |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    lines = []
    for stop in (False,) if cpu else (True, False):
        with start(command, until, **how) as process:
            for line in process.stdout:
                lines.append(line)
                if stop and "step 5/" in line:
                    process.terminate()
    if process.returncode == -signal.SIGALRM:
        raise TimeoutError("it took too long, which says nothing of its result")
    if process.returncode or not (cpu or any("stopped at step" in line for line in lines)):
        raise RuntimeError(f"status {process.returncode}: {''.join(lines[-3:])}")
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def compare_stage(path, way, losses, exact):
    """losses, exact: futures of run_stage(), on the GPU and on the CPU."""
    try:
        off = max(abs(a / b - 1) for a, b in zip(losses.result(), exact.result(), strict=True))
        note = "right" if off <= TOLERANCE else "WRONG"
        note += f": stopped and resumed, losses of {len(exact.result())} steps off by {off:.3%}"
    except TimeoutError as error:
        note = str(error)
    except Exception as error:  # noqa: BLE001 (it becomes a row)
        note = wrong(error)
    write(path, "correctness", "toy", variant=f"mae_pretrain.py, {way}", note=note)


# --------------------------------------------------------------------------------------- processes


def start(command, until, **how):
    """A process that SIGALRM ends at that time, whatever it does."""
    code = "import os, signal, sys; signal.alarm(int(sys.argv[1])); "
    code += "os.execv(sys.argv[2], sys.argv[2:])"  # the alarm stays
    seconds = str(max(1, int(until - time.time())))
    return subprocess.Popen([sys.executable, "-c", code, seconds, *command], cwd=ROOT, **how)


def start_job(options, until, job, **arguments):
    """Do a part (see main) in a process of its own: an error there spoils no other's GPU."""
    name = f"{job} {arguments.get('size', '')} {arguments.get('batch', '')}".rstrip()
    job = json.dumps({"job": job, "path": str(options.path), **arguments})
    command = [sys.executable, __file__, "--job", job, "--peer", str(options.peer.resolve())]
    if status := start([*command, *["--rehearse"] * REHEARSAL], until).wait():
        how = "took too long" if status == -signal.SIGALRM else f"ended with status {status}"
        print(f"{name}: {how}", flush=True)


def measure(options, size, batch, variants):
    """Time the steps of a size, in as many processes as it takes."""
    profile = MAIN[:2] if (size, batch) in GROUPS[:2] and "profile" in options.parts else []
    rounds = 1 if REHEARSAL or "steps" not in options.parts else 5
    while variants and options.deadline - time.time() > 20:
        until = min(time.time() + 150, options.deadline - 2)
        job = {"size": size, "batch": batch, "variants": variants, "rounds": rounds}
        start_job(options, until, "steps", **job, profile=profile)
        tried = [row for row in compare_with_peer(options.path) if row["part"] == "steps"]
        tried = {r["variant"] for r in tried if (r["size"], r["batch"]) == (size, str(batch))}
        if not tried & set(variants):
            break
        variants = [variant for variant in variants if variant not in tried]
    if variants:
        print(f"skipped: {size} at {batch}: {'; '.join(variants)}", flush=True)


def check_and_compile(options, groups, until):
    """The parts correctness and ahead, side by side: compilers want many cores and little GPU."""
    threads = ThreadPoolExecutor(1 if REHEARSAL else 16)
    with tempfile.TemporaryDirectory() as folder, threads as pool:
        job, runs = partial(pool.submit, start_job, options, until), {}
        if "correctness" in options.parts:
            job("attention")
            ways = {"cpu": (), "default": (), "--cuda-graph": ["--cuda-graph"] * CUDA}
            for way, flags in ways.items():
                run = until, f"{folder}/{way}", flags, way == "cpu"
                runs[way] = pool.submit(run_stage, *run)
            for way in [*ways][1:]:
                pool.submit(compare_stage, options.path, way, runs[way], runs["cpu"])
        room, ahead = free_memory(), "ahead" in options.parts
        for variant in [v for v in (MAIN[0], MAIN[2]) if ahead and v in options.variants]:
            for size, batch in groups:
                need = planned_memory(build(size), batch) * (1 if variant in OURS else 1.2)
                if room > need:
                    room -= need + 2**30  # what CUDA takes for a process: a guess
                    shape = {"size": size, "batch": batch, "variants": [variant]}
                    job("steps", **shape, rounds=0, profile=[])


def results_file(folder):
    """A new CSV with its header and a row on the machine."""
    name = "rehearsal" if REHEARSAL else torch.cuda.get_device_name()
    name = f"{re.sub('[^A-Za-z0-9]+', '-', name)}-{date.today()}"
    folder.mkdir(parents=True, exist_ok=True)
    taken = len(list(folder.glob(f"{name}*.csv")))
    path = folder.resolve() / (name + (f"-{taken + 1}.csv" if taken else ".csv"))
    path.write_text(",".join(COLUMNS) + "\n")
    versions = f"{name}, torch {torch.__version__}, Triton {kernels.triton.__version__}"
    write(path, "machine", note=f"{versions}, {os.cpu_count()} cores")
    return path


def main():
    options = parse_arguments()
    if job := options.job:
        gc.disable()  # as the stage does
        name, path = job.pop("job"), Path(job.pop("path"))
        if name == "attention":
            check_attention(path)
        else:
            time_steps(path, options.peer, **job)
        return dist.is_initialized() and dist.destroy_process_group()
    began = time.time()
    options.path, options.deadline = results_file(options.out), began + options.seconds
    groups = [group for group in GROUPS if group[0] in options.sizes]
    options.variants = [*OURS, *(PEERS if options.peer.exists() else ())]
    if not options.peer.exists():
        print(f"no rows of the peer: {options.peer} does not exist, see --peer")
    timing = {"steps", "profile"} & {*options.parts}
    until = began + options.seconds * (0.4 if timing and not REHEARSAL else 1)
    check_and_compile(options, groups[: 1 if REHEARSAL else 3], until)
    for variants in (MAIN, OTHERS) if timing else ():
        for size, batch in groups:
            if variants is MAIN or size == "B" or not REHEARSAL:  # once is enough
                measure(options, size, batch, [v for v in variants if v in options.variants])
    rows = compare_with_peer(options.path)
    for row in [dict(zip(COLUMNS, COLUMNS)), *rows]:
        show(row)
    print(f"{options.path}: {time.time() - began:.0f} s in all")
    return any("WRONG" in row["note"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
