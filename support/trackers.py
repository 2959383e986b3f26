"""--log-to: a run's metrics and pictures in TensorBoard, Weights & Biases or trackio as well.

    require    imports the package of a service, before a run begins
    Tracker    what a run logs to, whose errors never end the run

A service is a class that is made with (out, config, step): the run's folder (a Path), what
identifies its results (a JSON-able dict) and the step that it goes on from. It has the
methods scalars({name: number}, step), picture(name, PIL image, step) and close().
"""

import importlib
import os
import secrets
import sys

import numpy as np

from support.checkpoints import last_line, write_file

PROJECT = "mae-pre-pretraining"  # of the runs, at Weights & Biases and trackio


class TensorBoard:
    """Event files in out/tensorboard. What they hold of later steps than `step` is hidden."""

    package = "torch.utils.tensorboard"

    def __init__(self, out, config, step):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def scalars(self, values, step):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # now, and not in two minutes: a run may be killed

    def picture(self, name, image, step):
        self.writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self):
        self.writer.close()


class WandB:
    """A run at Weights & Biases. It ignores steps that it has already (of a killed run, say)."""

    package = "wandb"

    def __init__(self, out, config, step):
        import wandb

        # Without a limit, finish() waits until the service can be reached. Others wait for
        # this process at most 30 minutes: see launch.begin.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")  # seconds
        project, name = os.environ.get("WANDB_PROJECT", PROJECT), out.resolve().name
        options = {"name": name, "id": kept_id(out), "resume": "allow", "dir": str(out)}
        self.run, self.image = wandb.init(project=project, config=config, **options), wandb.Image

    def scalars(self, values, step):
        self.run.log(values, step=step)

    def picture(self, name, image, step):
        self.run.log({name: self.image(image)}, step=step)

    def close(self):
        self.run.finish()


class Trackio:
    """A run of trackio. Steps that it has already (of a killed run, say) are there twice."""

    package = "trackio"

    def __init__(self, out, config, step):
        import trackio

        name = f"{out.resolve().name}-{kept_id(out)}"  # trackio knows a run by its name
        self.run = trackio.init(project=PROJECT, name=name, config=config, resume="allow")
        self.image, self.finish = trackio.Image, trackio.finish

    def scalars(self, values, step):
        self.run.log(values, step=step)

    def picture(self, name, image, step):
        self.run.log({name: self.image(image)}, step=step)

    def close(self):
        self.finish()


SERVICES = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def kept_id(out):
    """The id of the run in a folder, 8 hexadecimal digits. It is drawn once, and kept there."""
    path = out / "log-id"
    if not path.exists():
        write_file(path, secrets.token_hex(4))
    return path.read_text()


def require(service):
    """Import the package of a service. ValueError with the pip command if it is missing."""
    try:
        importlib.import_module(SERVICES[service].package)
    except ImportError as error:
        needs = f"--log-to {service} needs a package: pip install {service}"
        raise ValueError(f"{needs} ({last_line(error)})") from None


class Tracker:
    """A service that a run logs to. Its first error is printed, and ends the logging alone."""

    def __init__(self, service, out, config, step):
        self.name = service
        self.service = self.attempt(SERVICES[service], out, config, step)

    def scalars(self, entry):
        """Log the numbers in a line of metrics.jsonl: {"step": number, name: value}."""
        values = {name: value for name, value in entry.items() if isinstance(value, int | float)}
        step = values.pop("step")
        if self.service:
            self.attempt(self.service.scalars, values, step)

    def picture(self, name, image, step):
        """Log a PIL image."""
        if self.service:
            self.attempt(self.service.picture, name, image, step)

    def close(self):
        """Wait until all is written or sent, for a minute at most, and end the log."""
        if self.service:
            self.attempt(self.service.close)

    def attempt(self, function, *arguments):
        """Return function(*arguments), or None after an error, which is printed."""
        try:
            return function(*arguments)
        except (Exception, SystemExit) as error:  # noqa: BLE001 (packages raise anything)
            why = f"{type(error).__name__}: {last_line(error)}"
            print(f"--log-to {self.name} failed, and is left out: {why}", file=sys.stderr)
            self.service = None
