"""The flags of the programs: those that several have, and the types of their values.

make_parser      a parser whose errors are one line
parse_for_task   flags of a program with --task: a task adds its own
add_flags, ...   the flags that every stage has
"""

import argparse
import re
import shlex
from pathlib import Path

from data import MAX_PIXELS, pixel_limit
from support.launch import fail

CACHE_SIZE = "20G"  # default of --cache-size


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line. An empty text, of an unset variable say, is one."""

    def __init__(self, prog, **options):
        super().__init__(prog, allow_abbrev=False, **options)
        self.register("type", None, not_empty)
        self.register("type", Path, lambda text: Path(not_empty(text)))

    def error(self, message):
        # "argument --lr: nan is ..." -> "--lr nan is ..."; "--steps: not allowed with" stays.
        message = re.sub(r"^argument (\S+): (?!not )", r"\1 ", message)
        fail(self.prog, f"{message} (--help lists all flags)")


def not_empty(text):
    if text == "":
        raise argparse.ArgumentTypeError("is empty: give a value, or leave it out")
    return text


def make_parser(program, description):
    """A Parser with `groups`, {title: group}."""
    parser = Parser(program, description=description)
    titles = "data", "model", "optimisation", "run"
    parser.groups = {title: parser.add_argument_group(title) for title in titles}
    return parser


def number(kind, least, most=2**62, above=False):
    """An argparse type: a number from `least` to `most`. above: `least` is refused."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}") from None
        # (NaN compares as false.)
        if not least <= value <= most or above and value == least:
            wanted = f": it must be from {least} to {most}" if most < 2**62 else ""
            raise argparse.ArgumentTypeError(f"{text} is out of range{wanted}")
        return value

    return parse


count = number(int, 1)
fraction = number(float, 0, 1)
positive = number(float, 0, above=True)
not_negative = number(float, 0)


def in_folder(text):
    """An argparse type: the path of a file in a folder that exists."""
    if not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no such folder")
    return text


def png(text):
    """An argparse type: the path of a .png in a folder that exists."""
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text} is no .png")
    return in_folder(text)


def new_file(text):
    """An argparse type: the path of a file that does not exist, in a folder that does."""
    if Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text} exists: choose another one")
    return in_folder(text)


def add_flags(groups, out, batch_size, seed_of):
    """Add every stage's flags. batch_size: the default, in words. seed_of: what it draws."""
    add = groups["data"].add_argument
    add("--cache-dir", help="for remote shards (a user's own temporary folder)")
    add("--cache-size", default=CACHE_SIZE, help="the most that it holds, like 500G (20G)")
    add("--lanes", type=count, help="sample streams, a multiple of processes (48, or shards)")
    add("--workers", type=number(int, 0), help="loader processes for each (the cores left)")
    add("--max-bad", type=fraction, default=0.01, help="unreadable share to stop at (0.01)")
    limit = "of a picture: larger ones are unreadable (89 million)"
    add("--max-pixels", type=pixel_limit, default=MAX_PIXELS, help=limit)
    add("--no-flip", action="store_true", help="mirror nothing: text, X-rays, maps, directions")
    add = groups["model"].add_argument
    add("--patch-size", type=count, help="side of a patch (the size's own)")
    add("--heads", type=count, help="attention heads of an --init of unknown size")
    add("--entry", help="of an --init with several networks: state_dict_ema, or a prefix")
    add = groups["optimisation"].add_argument
    add("--batch-size", type=count, help=f"global, over all processes ({batch_size})")
    add("--micro-batch", type=count, help="images at once on a process (what should fit)")
    add("--clip", type=not_negative, help="largest norm of the gradient, 0: any (the recipe's)")
    add("--seed", type=number(int, 0), default=0, help=f"of {seed_of} (0)")
    add = groups["run"].add_argument
    add("--out", type=Path, default=out, help=f"where all is written ({out or 'runs/TASK'})")
    add("--precision", choices=("bf16", "fp32"), help="to compute in (CUDA: bf16, else fp32)")
    option = argparse.BooleanOptionalAction
    add("--compile", action=option, default=None, help="torch.compile (CUDA: yes)")
    add("--checkpoint-activations", action="store_true", help="less memory, a third more compute")
    add("--shard-group", type=count, help="processes that share weights (1 if they fit, or all)")
    add("--log-every", type=count, default=50, help="steps between step lines (50)")
    services = ("tensorboard", "wandb", "trackio")
    add("--log-to", choices=services, help="where metrics and pictures go as well (its package)")
    add("--keep-last", type=count, default=2, help="checkpoints that are kept (2)")
    add("--keep-every", type=count, help="steps between checkpoints kept for good (none)")
    add("--memory", type=positive, help="GiB for a micro-batch (the GPU's; planned: 80)")


def add_probe_flags(groups):
    """Add the flag of stages 1 and 2 for the probe that runs while they train."""
    help = "folder or shards with classes, to probe features on at each save (--data, if it has)"
    groups["data"].add_argument("--probe", help=help)


def add_val_share(add):
    """Add --val-share by the add_argument of a parser or a group."""
    share = number(float, 0, 0.999, above=True)
    add("--val-share", type=share, help="of --data to measure on, if there is no val: 0.1, say")


def identity(run, clip=None):
    """The entries of a run's identity for flags that older checkpoints do not have: None as there,
    unless a flag changes something. clip: that of the recipe."""
    same = run.clip is None or run.clip == (clip or 0)  # 0: none
    max_pixels = None if run.max_pixels == MAX_PIXELS else run.max_pixels
    return {
        "max_pixels": max_pixels,
        "no_flip": run.no_flip or None,
        "clip": None if same else run.clip,
    }


def print_next(run, program, **flags):
    """Print the command to type after a run. It has the run's flags for data, if it has them.

    flags: {name: value} of the command, the first ones; None is not given. data: that of the run
    """
    names = "data", "val_data", "val_share", "labels", "val_labels", "cache_dir", "cache_size"
    names = (*names, "max_pixels")
    usual = {"cache_size": CACHE_SIZE, "max_pixels": MAX_PIXELS}
    own = {name: vars(run).get(name) for name in names}
    own = {name: value for name, value in own.items() if value != usual.get(name)}
    command = ["python", program]
    for name, value in {**flags, **own, **flags}.items():
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    run.say(f"next: {shlex.join(command)}")


def add_resume_flags(groups):
    add = groups["run"].add_argument
    add("--resume", help="a run, or a checkpoint, to go on from (the one in --out)")
    add("--save-every", type=count, help="steps between saves (a tenth, at most 1000)")
    add("--draw-step", type=count, help="draw the pictures of this step into --out, and exit")


def add_plan_flags(groups):
    """Add the flags of a stage that can print its plan: compute, memory and time."""
    add = groups["run"].add_argument
    add("--plan", action="store_true", help="print what the run takes, and exit")
    add("--gpus", type=count, help="processes to plan for (those that run); implies --plan")
    share = number(float, 0, 1, above=True)
    add("--mfu", type=share, help="--plan: share of the peak FLOP/s (what was measured, or 0.4)")
    add("--here", action="store_true", help="time ten steps on this CPU; implies --plan")


def add_label_flags(groups, pool, min_crop, classes=True):
    """Add the flags of pictures or videos with labels. pool, min_crop: the defaults, for the help.

    classes: add --classes as well
    """
    add = groups["data"].add_argument
    add_val_share(add)
    add("--labels", help="of --data: .csv (path,class), .jsonl, or iNaturalist's .json")
    add("--val-labels", help="the same for val (paths in --val-data, else --data)")
    if classes:
        add("--classes", type=count, help="number of classes, unless the data names them")
    add("--min-crop", type=fraction, help=f"least area of a crop, 1: none ({min_crop})")
    add("--val-crop", type=fraction, help="share of val's centre, 0: all, squashed")
    add = groups["model"].add_argument
    add("--pool", choices=("cls", "mean"), help=f"tokens that the head reads ({pool})")


def parse_for_task(parser, tasks, add_flags, argv):
    """Parse argv with the flags of `parser`, which all tasks have, and those of --task.

    add_flags(parser, task) adds the flags of a task; task is None if argv names none. A flag
    of another task is an error, which names the tasks that have it.
    """
    first = Parser(parser.prog, add_help=False)
    first.add_argument("--task", choices=tasks)
    task = first.parse_known_args(argv)[0].task
    add_flags(parser, task)
    if not task:
        parser.epilog = "--task NAME --help lists the flags of a task, too."
    run, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        if owners := [name for name in tasks if has_flag(flag, name, add_flags)]:
            parser.error(f"{flag} is for --task {', '.join(owners)}")
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return run


def has_flag(flag, task, add_flags):
    """True if add_flags(parser, task) adds this flag."""
    parser = make_parser(task, "")
    add_flags(parser, task)
    return flag in parser.format_usage().replace("[", " ").replace("]", " ").split()


def add_length_flags(groups, epochs, samples):
    """Add --steps, --epochs and --samples, of which one may be given."""
    group = groups["optimisation"].add_mutually_exclusive_group()
    group.add_argument("--steps", type=count, help="length, or --epochs, or --samples")
    group.add_argument("--epochs", type=positive, help=epochs)
    group.add_argument("--samples", type=positive, help=samples)
