"""--log-to: what a service gets, on any number of processes, and that it never ends a run."""

import io
import json
import shutil

import numpy as np
import pytest
from conftest import PICTURES, TINY, completed, read_metrics, rewound, same_weights, stage
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# The calls of the services' packages, with the names of their arguments as in wandb 0.31 and
# trackio 0.43. Each call is a line of calls.jsonl. {fails} ends the call that it names.
STAND_IN = """
import json, os, pathlib, signal
from PIL import Image as Pictures

def called(call, **what):
    with open({calls!r}, "a") as file:
        file.write(json.dumps([call, what]) + "\\n")
    if {stop!r} == [call, what.get("step")]:
        os.kill(os.getpid(), signal.SIGTERM)
    if {fails!r} == [call, what.get("step")]:
        raise ConnectionError("the service\\nis gone")

class Image:
    def __init__(self, {picture}, caption=None):
        assert isinstance({picture}, Pictures.Image)
        self.size = {picture}.size

class Run:
    def log(self, {data}, step=None):
        values = {{k: v.size if isinstance(v, Image) else v for k, v in {data}.items()}}
        called("log", data=values, step=step)

    def finish(self):
        called("finish")
"""
WANDB = (
    STAND_IN
    + """
def init(entity=None, project=None, dir=None, id=None, name=None, config=None, resume=None):
    assert json.dumps(config) and pathlib.Path(dir).is_dir()
    called("init", project=project, run=id, name=name, resume=resume)
    return Run()
"""
)
TRACKIO = (
    STAND_IN
    + """
def init(project, name=None, group=None, config=None, resume="never"):
    assert json.dumps(config)
    called("init", project=project, run=name, name=name, resume=resume)
    return Run()

def finish():
    called("finish")
"""
)
WITH_STAND_IN = "import sys; sys.path.insert(0, {folder!r}); import {name}; {name}.main()"


@pytest.fixture(params=["wandb", "trackio"])
def service(request, tmp_path):
    """A function: run TINY with a stand-in for a service, which fails or stops at a call. It
    returns what was printed and the calls."""

    def run(out, *flags, fails=None, stop=None):
        text = {"wandb": WANDB, "trackio": TRACKIO}[request.param]
        names = {"wandb": ("data_or_path", "data"), "trackio": ("value", "metrics")}[request.param]
        calls = tmp_path / "calls.jsonl"
        calls.unlink(missing_ok=True)
        options = {"calls": str(calls), "fails": fails, "stop": stop}
        options |= dict(zip(("picture", "data"), names))
        (tmp_path / "packages").mkdir(exist_ok=True)
        (tmp_path / "packages" / f"{request.param}.py").write_text(text.format(**options))
        code = WITH_STAND_IN.format(folder=str(tmp_path / "packages"), name="mae_pretrain")
        ran = completed(*TINY, *flags, "--out", out, "--log-to", request.param, code=code)
        return ran, [json.loads(line) for line in calls.read_text().splitlines()]

    run.name = request.param
    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without --log-to."""
    out = tmp_path_factory.mktemp("plain") / "run"
    completed(*TINY, "--out", out)
    return out


def events(out):
    """What TensorBoard shows of a run: ({name: {step: value}}, {step: picture})."""
    shown = EventAccumulator(str(out / "tensorboard"), {"scalars": 0, "images": 0}).Reload()
    tags = shown.Tags()
    scalars = {tag: [(e.step, e.value) for e in shown.Scalars(tag)] for tag in tags["scalars"]}
    pictures = [(e.step, e.encoded_image_string) for e in map_all(shown.Images, tags["images"])]
    for values in (*scalars.values(), pictures):
        assert len(dict(values)) == len(values)  # no step twice
    decoded = {step: np.asarray(Image.open(io.BytesIO(content))) for step, content in pictures}
    return {tag: dict(values) for tag, values in scalars.items()}, decoded


def map_all(function, tags):
    return [event for tag in tags for event in function(tag)]


def check_scalars(out):
    """TensorBoard has the numbers of metrics.jsonl, in its 32 bits, under the same names."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    wanted = {}
    for line in lines:
        for name in line.keys() - {"step"}:
            wanted.setdefault(name, {})[line["step"]] = pytest.approx(line[name], rel=1e-6)
    assert wanted and events(out)[0] == wanted


SPREAD = [(None, []), (2, []), (2, ["--shard-group", 2])]


@pytest.mark.parametrize("processes, flags", SPREAD)
def test_tensorboard_gets_the_metrics_and_pictures_and_the_run_is_the_same(
    processes, flags, tmp_path
):
    outs = tmp_path / "plain", tmp_path / "logged"
    # 120 pictures are not measured before step 5. So at step 4 nothing else has gathered weights.
    flags = ["--val-data", PICTURES, *flags]
    completed(*TINY, *flags, "--out", outs[0], processes=processes)
    logged = [*flags, "--out", outs[1], "--log-to", "tensorboard"]
    completed(*TINY, *logged, processes=processes)
    assert read_metrics(outs[0]) == read_metrics(outs[1]) and same_weights(*outs)
    check_scalars(outs[1])
    assert [line["step"] for line in read_metrics(outs[1]) if "held_out_loss" in line] == [8, 12]
    assert len([*(outs[1] / "tensorboard").iterdir()]) == 1  # one process logs
    pictures = events(outs[1])[1]
    assert list(pictures) == [4, 8, 12]
    # The last one is what the finished network paints: see evaluate.show_autoencoder. Another
    # order of summation may round the other way.
    final = np.asarray(Image.open(outs[1] / "reconstruction.png")).astype(int)
    assert np.abs(pictures[12][: len(final)] - final).max() <= 1
    assert np.abs(pictures[4].astype(int) - pictures[12]).max() > 10


def test_a_resumed_run_goes_on_in_the_same_folder_and_hides_later_steps(plain, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    flags = [*TINY, "--log-to", "tensorboard", "--out"]
    completed(*flags, first)
    rewound(first, second)  # it was killed after step 12, and its last checkpoint is of step 8
    lines = (second / "metrics.jsonl").read_text().splitlines()
    (second / "metrics.jsonl").write_text("\n".join(lines[:8]) + "\n")
    assert "going on from" in completed(*flags, second).stdout
    assert len([*(second / "tensorboard").iterdir()]) == 2
    check_scalars(second)  # the times of steps 9 to 12 are those of the second run
    assert read_metrics(second) == read_metrics(plain)


def test_the_other_stages_log_as_well(animals, tmp_path):
    small = ["--size", "16x2x2", "--image-size", 16, "--patch-size", 4, "--batch-size", 8]
    small += ["--steps", 6, "--log-every", 2, "--workers", 0, "--log-to", "tensorboard"]
    completed(*small, "--out", tmp_path / "weak", program="weak_pretrain.py")
    task = ["--task", "classify", "--data", animals, *small]
    completed(*task, "--out", tmp_path / "classify", program="finetune.py")
    for name, value in (("weak", "untagged"), ("classify", "top1")):
        check_scalars(tmp_path / name)
        assert value in events(tmp_path / name)[0]


def test_few_and_unreadable_held_out_pictures_are_drawn_too(photos, tmp_path):
    for path in sorted(photos.iterdir())[-3:]:
        path.write_bytes(b"no picture")
    # A twentieth is held out: the last two, of which none can be read.
    flags = ["--log-to", "tensorboard", "--max-bad", 0.5, "--out", tmp_path / "run"]
    completed("--data", photos, *TINY[2:], *flags)
    (shape,) = {picture.shape for picture in events(tmp_path / "run")[1].values()}
    assert shape[0] == 22 + 2 * 166  # rows: see test_pictures.py


def test_a_service_gets_each_step_the_pictures_and_the_end(service, plain, tmp_path):
    out = tmp_path / "a run"
    _, calls = service(out)
    (first, began), *logged, (last, _) = calls
    assert (first, last) == ("init", "finish")
    assert began["resume"] == "allow" and began["name"].startswith("a run")
    assert {name for name, _ in logged} == {"log"}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    scalars = [what for _, what in logged if "loss" in what["data"]]
    assert [{"step": what["step"], **what["data"]} for what in scalars] == lines
    pictures = [what for _, what in logged if "loss" not in what["data"]]
    assert [what["step"] for what in pictures] == [4, 8, 12]
    size = list(Image.open(out / "reconstruction.png").size)
    assert all(what["data"]["reconstructions"][0] == size[0] for what in pictures)
    assert read_metrics(out) == read_metrics(plain)


def test_a_stopped_run_closes_its_log_and_goes_on_in_it(service, plain, tmp_path):
    out = tmp_path / "run"
    ran, calls = service(out, stop=["log", 5])
    assert "stopped at step 6 of 12" in ran.stdout and calls[-1][0] == "finish"
    again, more = service(out)
    assert "going on from" in again.stdout
    assert more[0] == calls[0]  # the same project, run and name
    assert {what["step"] for name, what in more if name == "log"} == set(range(7, 13))
    assert read_metrics(out) == read_metrics(plain)
    shutil.rmtree(out)
    assert service(out)[1][0][1]["run"] != calls[0][1]["run"]  # a new run has a log of its own


@pytest.mark.parametrize("fails", [["init", None], ["log", 3], ["finish", None]])
def test_a_service_that_fails_is_said_once_and_the_run_goes_on(fails, service, plain, tmp_path):
    ran, calls = service(tmp_path / "run", fails=fails)
    (line,) = [line for line in ran.stderr.splitlines() if "--log-to" in line]
    words = f"--log-to {service.name} failed, and is left out: ConnectionError: is gone"
    assert line == words and [calls[-1][0], calls[-1][1].get("step")] == fails
    assert read_metrics(tmp_path / "run") == read_metrics(plain)
    assert same_weights(tmp_path / "run", plain)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
@pytest.mark.parametrize("program", ["mae_pretrain", "weak_pretrain"])
def test_a_missing_package_is_one_line_before_anything_is_written(name, program, tmp_path):
    code = f"import sys; sys.modules[{name!r}] = None; import {program}; {program}.main()"
    flags = ["--out", tmp_path / "run", "--log-to", name]
    ran = stage(*flags, program=f"{program}.py", code=code)
    (line,) = ran.stderr.splitlines()
    assert ran.returncode == 2 and not (tmp_path / "run").exists()
    assert f"--log-to {name} needs a package: pip install {name}" in line


def test_without_the_flag_nothing_is_imported_or_drawn(tmp_path):
    names = {"tensorboard", "wandb", "trackio", "support.trackers"}
    code = f"""
import sys, mae_pretrain
mae_pretrain.reconstructions = None  # drawing would fail
mae_pretrain.main()
assert not {names} & sys.modules.keys()
"""
    completed(*TINY, "--out", tmp_path / "run", code=code)


def test_what_is_no_number_is_not_logged(tmp_path):
    """Held-out pictures may all be unreadable: then their loss is null in metrics.jsonl."""
    from support.trackers import Tracker

    tracker = Tracker("tensorboard", tmp_path, {}, step=0)
    tracker.scalars({"step": 3, "held_out_loss": None, "loss": 0.5, "bad": 0, "classes": ["a"]})
    tracker.close()
    assert events(tmp_path)[0] == {"loss": {3: 0.5}, "bad": {3: 0.0}}
