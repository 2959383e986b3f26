"""What several test files share: small pictures, sources and shards, and runs of the stages."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see mae_pretrain.py
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the shapes are tiny, and processes run side by side

import contextlib
import errno
import gc
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import resource
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, by kernels.py

import data
import evaluate
import mae_pretrain
from model import ViT, initialize, save_weights
from support import pack as pack_module
from support import probe
from support.loader import Stop

ROOT = Path(__file__).resolve().parent.parent


def picture(seed, height=20, width=24):
    """A random PIL picture, smooth enough for JPEG."""
    pixels = np.random.RandomState(seed).randint(0, 256, (height // 4, width // 4, 3))
    return Image.fromarray(pixels.astype(np.uint8)).resize((width, height))


# Names of folders and files that look like patterns, and names that these patterns match.
ODD_NAMES = {
    "coco [v2]": "coco v",
    "[!a]": "b",
    "what?*": "whatever",
    "{0..3}": "2",
    "{a,b}": "a",
    "50%d": "500",
}


def large_pictures(folder, split=""):
    """Eight pictures in two classes of 300 x 300, 90,000 pixels, and flags that allow them."""
    for number in range(8):
        path = Path(folder, split, "ab"[number % 2], f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, 300, 300).save(path)
    return ["--data", folder, "--max-pixels", 90_000]


def check_that_the_limit_is_the_runs(run, folder):
    """A run goes on with its own --max-pixels only, and hands it on to evaluate.py.

    run(*flags): a finished process of a stage with large_pictures' flags and these.
    """

    def printed(out, *flags, status=0):
        ran = run(*flags, "--out", folder / out)
        assert ran.returncode == status, ran.stderr
        return ran.stderr if status else ran.stdout

    assert " --max-pixels 90000" in printed("run").split("next: ")[1]
    assert read_metrics(folder / "run")[-1]["bad"] == 0
    usual = ["--max-pixels", 89_478_485]  # the default
    assert "(max_pixels was 90000, is None)" in printed("run", *usual, status=2)
    assert "--max-pixels" not in printed("usual", *usual).split("next: ")[1]
    (path,) = (folder / "usual").glob("checkpoints/*/state.json")
    record = json.loads(path.read_text())
    assert record["identity"].pop("max_pixels") is None  # what older checkpoints do not have
    path.write_text(json.dumps(record))
    assert "going on from" in printed("usual", *usual)
    assert "(max_pixels was None, is 90000)" in printed("usual", status=2)


# 120 pictures of two classes, made when the tests begin.
PICTURES = Path(tempfile.gettempdir(), f"test-pictures-{os.getpid()}")


def pytest_sessionstart():
    for number in range(120):
        path = PICTURES / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)


def pytest_collection_finish():
    gc.freeze()  # what was imported: stages collect garbage at each step line, here at each step


def pytest_sessionfinish():
    shutil.rmtree(PICTURES)


# The smallest run that has everything: 12 steps of 8 pictures, a checkpoint every 4 steps.
TINY = [
    *("--data", str(PICTURES), "--size", "16x2x2", "--decoder", "16x1x2"),
    *("--image-size", "16", "--patch-size", "4", "--batch-size", "8", "--lr", "1e-3"),
    *("--steps", "12", "--save-every", "4", "--log-every", "1", "--workers", "1"),
]


# Importing torch takes seconds, a run of these tests less than one. So a server imports it once,
# and each run is a fork of the server: a process of its own, in all that matters.
SERVER = multiprocessing.get_context("forkserver")
LAZY = ["torch.distributed.checkpoint", "torch.distributed.fsdp", "torch._dynamo"]
SERVER.set_forkserver_preload(["finetune", *LAZY])


def stage(*arguments, processes=None, program="mae_pretrain.py", code=None, file_size=None):
    """Run a stage in a process of its own, or as several, as torchrun does; what it printed.

    code: this is run instead. file_size: no file may grow beyond this (a full disk).
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("localhost", 0))  # each has a port of its own: two test runs must not meet
        names = {"MASTER_ADDR": "localhost", "MASTER_PORT": free.getsockname()[1]}
        names |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        files, argv = [f"{folder}/stdout", f"{folder}/stderr"], [program, *map(str, arguments)]
        runs = []
        for rank in range(processes or 1):
            own = names | {"RANK": rank, "LOCAL_RANK": rank} if processes else {}
            what = argv, {name: str(own[name]) for name in own}, files, file_size, code
            runs.append(SERVER.Process(target=run_program, args=what))
        free.close()
        for run in runs:
            run.start()
        for _ in runs:  # the first that fails ends the others, which may want to say why
            patience = 10 if any(run.exitcode for run in runs) else 300
            alive = [run.sentinel for run in runs if run.is_alive()]
            if alive and not multiprocessing.connection.wait(alive, patience):
                [run.kill() for run in runs]
        [run.join() for run in runs]
        codes = [run.exitcode for run in runs if run.exitcode]
        printed = [Path(file).read_text() for file in files]
    return subprocess.CompletedProcess(argv, max(codes, default=0), *printed)


def completed(*arguments, **options):
    """stage(), of a run that has to end well."""
    ran = stage(*arguments, **options)
    assert ran.returncode == 0, ran.stderr
    return ran


def run_program(argv, environment, files, file_size, code):
    """What a new process does: run a program of the repository, its output into two files."""
    multiprocessing.set_start_method(None, force=True)  # loaders begin as in a plain program
    gc.freeze()  # the same for what the server has imported
    os.environ.update(environment)
    os.chdir(ROOT)
    for file, stream in zip(files, (sys.stdout, sys.stderr)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    if file_size:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.argv = argv
    if code:
        exec(code, {})  # noqa: S102 (the test's own)
    else:
        runpy.run_path(str(ROOT / argv[0]), run_name="__main__")


def read_metrics(out):
    """metrics.jsonl as a list of dicts, without what depends on the clock or the machine."""
    clock = ("images_per_second", "mfu", "data_wait", "memory_gib", "eta_seconds")
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


def rewound(run, out, step=8):
    """A copy of a run as it was when it had saved this step."""
    shutil.copytree(run, out)
    (out / "model.pt").unlink()
    for path in (out / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    (out / "checkpoints" / "LATEST").write_text(f"step-{step:08d}")
    return out


@pytest.fixture(autouse=True)
def no_run_is_left():
    """A run that fails ends its process. In this one, it leaves handlers of signals behind."""
    yield
    if Stop.active:
        Stop.active.release()
        gc.enable()


@pytest.fixture
def photos(tmp_path):
    """A folder of 40 readable pictures, without classes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(40):
        picture(i).save(folder / f"{i:03}.jpg")
    return folder


def painting(height, width):
    """An RGB picture (height, width, 3) uint8 in which no mirror image or rotation looks alike."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    blue = 128 + 60 * np.sin(9 * x) * np.cos(7 * y) + 60 * y
    return np.stack([250 * x, 220 * y, blue], axis=2).round().astype(np.uint8)


def encoded(pixels, kind="PNG", **options):
    """The bytes of a picture file."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(content, size, channels=3, bits=None, min_crop=0.2):
    """Bytes of a picture file -> (H, W, C) uint8 as crop_and_resize makes them, as int64."""
    image = Image.open(io.BytesIO(content))
    pixels = data.crop_and_resize(image, size, channels, bits, min_crop)
    assert pixels.shape == (channels, *size) and pixels.dtype == torch.uint8
    return pixels.permute(1, 2, 0).numpy().astype(np.int64)


def handmade_png(width, height, depth, colour_type, rows):
    """A PNG file by its specification: rows are the raw bytes, each with its filter byte 0."""

    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def write_files(folder, files):
    """{relative path: bytes} -> files below the folder, which is returned as a string."""
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(folder)


def write_tar(path, members, **options):
    """[(name, bytes)] -> a tar. A name that ends in / is a directory."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name.rstrip("/"))
            member.size = len(content)
            if name.endswith("/"):
                member.type = tarfile.DIRTYPE
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def tile(number):
    """A small lossless picture that differs for each number."""
    return encoded(np.full((4, 4, 3), (number * 7 % 256, number * 31 % 256, number % 256), "u1"))


def members_of(numbers, classes=10):
    """WebDataset members of the samples with these numbers: picture and class."""
    for number in numbers:
        yield f"{number:05}.png", tile(number)
        yield f"{number:05}.cls", str(number % classes).encode()


class Memory(data.Source):
    """A source of pictures in memory, all different."""

    classes = None

    def __init__(self, sizes):
        self.sizes = np.array(sizes)

    def read(self, number):
        pixels = np.roll(painting(20, 30), number, axis=1) ^ np.uint8(number)
        return {"image": lambda: Image.fromarray(pixels), "class": number}

    def name(self, number):
        return f"memory:{number}"


def opened(where):
    """The source to train on behind a --data string."""
    return data.open_sources(str(where))[0]


def everything(source):
    """[(name, class, pixels)] of all samples of a source, in order."""
    samples = []
    for number in range(source.sizes.sum()):
        sample = source.read(number)
        pixels = np.asarray(sample["image"]().convert("RGB")).tolist()
        samples.append((source.name(number), sample["class"], pixels))
    return samples


def stream(order, start, stop):
    return [order(position) for position in range(start, stop)]


def chi_square(counts, expected=None):
    """Pearson's statistic of counts, by default against equal expectations, over its limit.

    Below 1 unless something is wrong: the limit is passed by chance with probability 1e-6 (Wilson
    and Hilferty's approximation of the quantile, z = 4.75).
    """
    counts = np.asarray(counts, dtype=np.float64)
    expected = counts.mean() if expected is None else np.asarray(expected)
    freedom = len(counts) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3
    return ((counts - expected) ** 2 / expected).sum() / limit


def same_batch(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        same = torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name]
        assert same, name


def one_line(error):
    """The message of a pytest.raises context, which must be one line."""
    message = str(error.value)
    assert message and "\n" not in message
    return message


def epoch_counts(order, epoch):
    return Counter(stream(order, epoch * order.length, (epoch + 1) * order.length))


def picture_batches(source, size, channels, batch_size, order=None, **options):
    """data.Batches of labelled pictures: random crops in an order, else centre crops."""
    min_crop = None if order is None else 0.2
    make = partial(probe.labelled, size=size, channels=channels, min_crop=min_crop)
    return data.Batches(source, make, batch_size, order=order, **options)


SIZES = [5, 0, 9, 4, 1, 13, 7, 11]  # 50 samples: six steps of 12 run over an epoch border
STEPS = range(6)


def training_batches(process=0, processes=1, source=None):
    """data.Batches of stage 1: 12 pictures of 8 x 12 pixels, 6 patches."""
    source = source or Memory(SIZES)
    shape = {"size": (8, 12), "channels": 3, "num_patches": 6, "min_crop": 0.2}
    make = partial(mae_pretrain.make_sample, **shape)
    order = data.Order(source.sizes, seed=4, lanes=6)
    return data.Batches(source, make, 12, process, processes, order=order, seed=4)


# What a camera stored so that turning it as its tag says gives `upright` (EXIF 2.3, tag 274).
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),  # is shown after a quarter turn to the right
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


def photo(upright, orientation, kind="PNG", **options):
    tags = Image.Exif()
    tags[274] = orientation
    stored = np.ascontiguousarray(STORED.get(orientation, STORED[1])(upright))
    return encoded(stored, kind, exif=tags, **options)


def textured(height, width):
    """A large picture with structure at every scale, as a photo has."""
    random = np.random.default_rng(1)
    pixels = painting(height, width).astype(np.float64)
    for cells in (6, 12, 24, 48, 96, 192):
        noise = random.normal(size=(cells, cells, 3)).astype(np.float32)
        layers = [
            Image.fromarray(noise[:, :, c]).resize((width, height), Image.Resampling.BICUBIC)
            for c in range(3)
        ]
        pixels += 80 / math.sqrt(cells) * np.stack([np.asarray(layer) for layer in layers], axis=2)
    return pixels.clip(0, 255).astype(np.uint8)


def relative_labels(source, folder):
    return {os.path.relpath(name, folder): label for name, label, _ in everything(source)}


@pytest.fixture
def shards(tmp_path):
    """Five shards of 7, 0, 1, 12 and 3 samples: (folder, pattern)."""
    folder, first = tmp_path / "shards", 0
    folder.mkdir()
    for number, count in enumerate([7, 0, 1, 12, 3]):
        write_tar(folder / f"s-{number:02}.tar", members_of(range(first, first + count)))
        first += count
    return folder, f"{folder}/s-{{00..04}}.tar"


@pytest.fixture
def pets(tmp_path):
    """A folder of 20 pictures in two classes: (folder, {relative path: bytes})."""
    files = {f"{('cat', 'dog')[i % 2]}/{i:02}.png": tile(i) for i in range(20)}
    return Path(write_files(tmp_path / "pets", files)), files


def run_main(monkeypatch, *arguments):
    """data.main() with these arguments, here; its exit status."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
    try:
        pack_module.main()
    except SystemExit as end:
        return end.code
    return 0


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def captioned(path, samples):
    """[{extension: bytes}] -> a shard of pictures with these files beside them: its path."""
    members = []
    for number, files in enumerate(samples):
        members.append((f"{number:05}.png", tile(number % 256)))
        members += [(f"{number:05}.{extension}", content) for extension, content in files.items()]
    return write_tar(path, members)


SMALL = {"size": "32x3x4", "image_size": (16, 24), "patch_size": 8}  # 2 x 3 patches
SMALL_MAE = {**SMALL, "decoder": (16, 2, 2), "mask_ratio": 0.5}
TINY_TEXT = {"size": "16x2x2", "vocabulary": 30}
CPU = torch.device("cpu")


def on_meta(kind, *arguments, **named):
    with torch.device("meta"):
        return kind(*arguments, **named)


def random_images(model, count=3, seed=0):
    shape = (count, model.config["channels"], *model.config["image_size"])
    dtype = model.cls_token.dtype
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_ids(model, count=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, model.num_patches, generator=generator).argsort(dim=1)


def equal_states(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def section(line, title):
    """What load_weights reports after "title: "."""
    found = [part for part in line.split("; ") if part.startswith(f"{title}: ")]
    return set(found[0].removeprefix(f"{title}: ").split(", ")) if found else set()


# ------------------------------------------------------------- pictures for evaluate.py

RECTANGLE = {"image_size": (16, 24), "patch_size": 8}  # 2 x 3 patches: H is not W


def write_picture(path, seed, colour, mode="RGB"):
    """Noise around a colour, larger than the models' pictures and of another aspect."""
    noise = np.random.RandomState(seed).normal(0, 60, (20, 26, 3))
    pixels = np.clip(noise + colour, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


def save_model(path, kind=ViT, size="24x2x2", seed=3, **arguments):
    """A checkpoint whose attention is sharp: with initial weights it is almost uniform."""
    model = kind(size, **{**RECTANGLE, **arguments})
    initialize(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv.weight" in name:
                parameter.mul_(4)
    save_weights(path, model.state_dict(), model.config)
    return model.eval()


def evaluated(task, checkpoint, folder, *arguments):
    """What a task returns as JSON, and its whole stdout."""
    printed = io.StringIO()
    flags = ["--task", task, "--checkpoint", checkpoint, "--data", folder, "--workers", 0]
    with contextlib.redirect_stdout(printed):
        evaluate.main([str(flag) for flag in (*flags, *arguments)])
    lines = printed.getvalue().splitlines()
    result = json.loads(lines[-1])
    assert result.pop("task") == task
    assert not any(line.startswith("{") for line in lines[:-1])
    return result, printed.getvalue()


def picture_tensor(path, channels=3):
    """A picture as a model sees it, (1, C, 16, 24) uint8, read without data.Batches."""
    with Image.open(path) as image:
        return data.crop_and_resize(image, RECTANGLE["image_size"], channels)[None]


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


class Trap:
    """Its pickle makes a directory when it is loaded without restriction."""

    def __init__(self, directory):
        self.directory = directory

    def __reduce__(self):
        return os.system, (f'mkdir "{self.directory}"',)


def steps_in(folder):
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


@pytest.fixture
def group():
    """A process group of one: what a single GPU trains under."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


# What timm imports from torchvision.
OF_TORCHVISION = ["transforms", "transforms.functional", "datasets", "models", "ops", "ops.misc"]
OF_TORCHVISION = ["torchvision", *(f"torchvision.{name}" for name in OF_TORCHVISION)]
OF_TORCHVISION += ["torchvision.models.feature_extraction"]


@pytest.fixture(scope="session")
def torchvision():
    """torchvision, or None where there is none that this torch can load: then transformers,
    which would try to, has to be imported later."""
    try:
        import torchvision
    except (ImportError, RuntimeError):
        sys.modules["torchvision"] = torchvision = None
    return torchvision


@pytest.fixture(scope="session")
def timm(torchvision):
    """timm imports torchvision at once, and its networks need nothing of it."""
    found = {} if torchvision else {name: MagicMock() for name in OF_TORCHVISION}
    sys.modules.update(found)
    try:
        return pytest.importorskip("timm", reason="pip install --no-deps timm")
    finally:
        sys.modules.update(dict.fromkeys(found))  # None hides a module


@pytest.fixture(scope="session")
def transformers(torchvision):
    return pytest.importorskip("transformers", reason="pip install transformers")


# ---------------------------------------------------------------------- runs of stage 3


def last_json(ran):
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.strip().splitlines()[-1])


def main_json(capsys, program, *arguments):
    """What a program prints at its end when it runs in this process."""
    program.main(list(map(str, arguments)))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    """A folder with train/ (60 pictures of three classes) and val/ (12)."""
    folder = tmp_path_factory.mktemp("animals")
    for split, count in (("train", 20), ("val", 4)):
        for number, name in enumerate(("cats", "dogs", "owls")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.array(picture(1000 * number + i + (split == "val") * 100))
                pixels[:, :, number] = 250  # easy to tell apart
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def same_weights(*runs):
    return equal_states(*(torch.load(out / "model.pt", weights_only=True)["model"] for out in runs))
