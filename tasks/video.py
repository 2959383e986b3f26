"""Videos: where they come from, the frames of a clip, and the classifier of clips.

A video is a folder of frames, a GIF or WebP, the pictures of a sample in a shard (KEY.000.jpg,
KEY.001.jpg ...), or a file that the ffmpeg program decodes. Only the last have a clock.
"""

import argparse
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import kernels
from data import Folder, crop_and_resize, is_picture, one_line, open_picture, random_bits, uniform
from model import Attention, Classifier, initialize, patchify
from support import flags
from support.labels import VIDEOS
from support.shards import by_number
from support.toy import TOY_VERSION, Toy, toy_render, toy_scene
from tasks import augment

# ------------------------------------------------------------------------------------------- videos

ANIMATIONS = (".gif", ".webp")
LISTS = (".csv", ".txt", ".json")
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg"  # none that only names other files
NO_FFMPEG = (
    "there is no ffmpeg program on the PATH: install it (apt install ffmpeg, brew install ffmpeg, "
    "or the binary of pip install imageio-ffmpeg), or give folders of frames"
)


class Video(NamedTuple):
    count: int  # of frames: at least 1
    rate: float | None  # frames per second, if there is a clock
    read: object  # function of a rising list of numbers -> as many PIL images


class VideoFolder(Folder):
    """Videos below a folder, or those of a list in `labels`: see read_video_labels."""

    what = "videos"

    def entries(self, root, labels, caption_key):
        entries = read_video_labels(labels, root) if labels else videos_below(root)
        files = sum(path.lower().endswith(VIDEOS) for path in entries)
        if files and not shutil.which("ffmpeg"):
            raise ValueError(f"{labels or root} has video files ({files}), and {NO_FFMPEG}")
        return entries

    def read(self, number):
        video = partial(open_video, self.name(number))
        return {"video": video, "class": int(self.labels[number])}


def folder_of_list(path, labels):
    """(folder, labels) behind a --data, which may be a list of videos, and a --labels."""
    if path and path.lower().endswith(LISTS) and os.path.isfile(path):
        return os.path.dirname(path) or ".", labels or path
    return path, labels


def videos_below(root):
    """{path of a video file or a folder of frames, relative to root: see data.class_of}. A
    .gif or .webp is a video, other pictures are frames."""
    found = set()
    for folder, names in data.walk(root):
        files = [n for n in names if n.lower().endswith(VIDEOS + ANIMATIONS) and n[0] != "."]
        found.update(f"{folder}{name}" for name in files)
        if folder and any(is_picture(name) for name in set(names) - set(files)):
            found.add(folder[:-1])
    data.warn_of_splits(root, sorted({os.path.dirname(path) for path in found}))
    if not found:
        wanted = " ".join(VIDEOS + ANIMATIONS)
        raise ValueError(f"no videos in {root}: want {wanted} or folders of frames")
    return {path: data.class_of(path) for path in found}


def read_video_labels(path, root):
    """{path, relative to root, of a video file or a folder of frames: {"class": name}}.

    .csv, .txt  lines of path,class or, without a comma, of path and class after a tab or a
                space (Kinetics, as PySlowFast lists it). A head line has "path" and "class"
                among its cells; or no video's extension, and a first cell that is no path
    .json       Something-Something's [{"id", "template"}]

    Lines that are damaged or contradict an earlier one are counted and left out. Raises
    ValueError, one line, if the file is none of these.
    """
    lines, head, found, bad = [], ["path", "class"], {}, 0
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            if path.lower().endswith(".json"):
                rows = [head, *template_rows(json.load(file), os.listdir(root))]
            else:
                lines = list(filter(None, map(str.strip, file)))
                rows = list(map(cells_of, lines))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise ValueError(f"cannot read a list of videos from {path}: {one_line(error)}") from None
    names, first = rows[0] if rows else [], lines[0] if lines else ""
    if headed := set(head) <= set(names):
        head = names
    elif len(names) > 1:
        videos = any(name.lower().endswith(VIDEOS + ANIMATIONS) for name in names)
        headed = not videos and not os.path.exists(os.path.join(root, names[0]))
    for row in rows[headed:]:
        cells = dict(zip(head, row)) if len(row) == len(head) else {}
        name, entry = cells.get("path"), {"class": cells.get("class")}
        good = name and entry["class"] and "\ufffd" not in str(row)
        bad += not good or found.setdefault(os.path.normpath(name), entry) != entry
    if bad:
        why = "damaged, or against an earlier one"
        print(f"{path}: lines that are left out ({why}): {bad}", file=sys.stderr)
    if not found:
        raise ValueError(
            f"{path} lists no videos: want lines of path,class or of path and class, or a "
            f".json of id and template; the first line is {first!r:.80}"
        )
    if headed and first:
        why = f"is taken as a header; the columns are read as {', '.join(head)}"
        print(f"{path}: {first!r:.80} {why}", file=sys.stderr)
    return found


def template_rows(entries, files):
    """Yield (path, class) of Something-Something's entries: the file or folder that is called
    id, or id.webm, and the template without its brackets."""
    paths = {os.path.splitext(name)[0]: name for name in files}
    for entry in entries:
        name = str(entry.get("id", "")).strip()
        template = re.sub(r"[][]", "", str(entry.get("template") or "")).strip()
        yield name and paths.get(name, f"{name}.webm"), template


def cells_of(line):
    """The cells of a line of a list of videos."""
    path, tab, _ = line.partition("\t")
    if tab and "," not in path:
        cells = line.split("\t")
    elif "," in line:
        cells = next(csv.reader([line], skipinitialspace=True))
    else:
        cells = line.rsplit(None, 1)
    return [cell.strip() for cell in cells]


def open_video(path, short_side=None):
    """A Video of a file or a folder of frames, scaled down to short_side if ffmpeg decodes it.
    Raises OSError or ValueError if it is damaged."""
    if path.lower().endswith(VIDEOS):
        count, rate, start = probe(path)
        return Video(count, rate, partial(decode, path, rate, short_side, start=start))
    if not os.path.isdir(path):
        return video_of_pictures([path])
    names = sorted(filter(is_picture, os.listdir(path)), key=by_number)
    return video_of_pictures([os.path.join(path, name) for name in names])


def video_of_pictures(files):
    """A Video of paths or open files: a picture each, or a single animation."""
    if not files:
        raise ValueError("there is no frame in it")
    if len(files) > 1:
        read = lambda numbers: [open_picture(files[number]) for number in numbers]
        return Video(len(files), None, read)
    image = open_picture(files[0])

    def frame(number):
        image.seek(number)
        return image.copy()

    # An MPO's pictures, say, are views of one moment.
    count = image.n_frames if image.format in ("GIF", "WEBP", "PNG") else 1
    return Video(count, None, lambda numbers: list(map(frame, numbers)))


def ffmpeg(path, *arguments, seek=0.0):
    """Run ffmpeg on a file: the ended process. It opens no other file and no address."""
    command = ["ffmpeg", "-hide_banner", "-nostdin", "-threads", "1"]
    command += ["-ss", f"{seek:.6f}"] if seek > 0 else []  # 0 makes some files end at once
    command += ["-protocol_whitelist", "file", "-format_whitelist", CONTAINERS]
    command += ["-i", f"file:{path}", *arguments]
    how = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 300}
    return subprocess.run(command, check=False, **how)


@lru_cache(1 << 16)
def probe(path):
    """(number of frames, frames per second, time of the first one) of a video file.

    They are those of the packets of its video stream: a container may be longer, or not say
    its length. The time is None if packets lack one or cannot be found by it (MPEG streams
    and FLV have no index): then frames are counted by decoding.
    """
    # Of a long file only the first packets and the last ten seconds are read. Fewer than
    # 32 packets: it is short, or has an edit list, in front of which packets are not shown.
    listed = ["-c", "copy", "-copyts", "-start_at_zero", "-f", "framecrc", "pipe:1"]
    done = ffmpeg(path, "-map", "0:v:0", "-frames:v", "32", *listed)
    said, begin = done.stderr.decode(errors="replace"), packets(done.stdout).get(0)
    rate = re.search(r"Video: .*?([\d.]+)(k?) (fps|tbr)", said)
    length = re.search(r"Duration: (\d+):(\d+):([\d.]+)(?:, start: (-?[\d.]+))?", said)
    hours, minutes, seconds, late = map(float, length.groups("0")) if length else (0, 0, 0, 0)
    seconds += 3600 * hours + 60 * minutes
    # Matroska says when the last packet ends; the first one of a segment may be late.
    seconds -= late if "Input #0, matroska" in said else 0
    long = begin is not None and begin.shape[1] == 32
    listed = ["-map", "0:v:0", "-map", "0:a?", *listed]
    streams = packets(ffmpeg(path, *listed, seek=seconds - 10 if long else 0).stdout)
    if 0 not in streams:  # the sound is longer, or the file is cut
        streams = packets(ffmpeg(path, *listed).stdout)
    if not rate or 0 not in streams:
        last_line = said.strip().rpartition("\n")[2]
        why = last_line if done.returncode else "no frame, or no rate of frames"
        raise ValueError(f"ffmpeg finds no video in it: {why}")
    rate = float(rate[1]) * (1000 if rate[2] else 1)
    there = max(times[0].max() for times in streams.values()) + 1 / rate
    if 2 * there < seconds:
        raise ValueError(f"it is cut: {there:.1f} of {seconds:.1f} seconds are there")
    shown = np.append(begin[1], streams[0][1]) if long else streams[0][1]
    if not np.isnan(shown).any() and not re.search(r"Input #0, (mpegts|mpeg|flv),", said):
        return round((shown.max() - shown.min()) * rate) + 1, rate, float(shown.min())
    wanted = ["-map", "0:v:0", "-vf", f"setpts=N/{rate}/TB", "-r", str(rate)]
    decoded = packets(ffmpeg(path, *wanted, "-f", "framecrc", "pipe:1").stdout)
    if not decoded:
        raise ValueError("ffmpeg decodes no frame of it")
    return decoded[0].shape[1], rate, None


def packets(table):
    """{stream: (2, n) seconds of decoding and of showing, nan if unknown} in ffmpeg's framecrc.
    Packets with flag 4 are left out: they are decoded, and not shown."""
    row = rb"^(\d+), *(-?\d+), *(-?\d+)(?!.*F=0x[0-9A-F]*[4-7C-F]\b)"
    found = re.findall(row, table, re.MULTILINE)
    rows, streams = np.array(found, dtype=object).reshape(-1, 3).astype(np.int64), {}
    for stream, ticks, second in re.findall(rb"^#tb (\d+): (\d+)/(\d+)", table, re.MULTILINE):
        times = rows[rows[:, 0] == int(stream), 1:]
        if len(times):
            unknown = np.abs(times.astype(float)) > 2**53  # in Ogg that was cut
            times = np.where(unknown, np.nan, times * (int(ticks) / int(second)))
            streams[int(stream)] = times.T
    return streams


def decode(path, rate, short_side, numbers, start=0.0):
    """The frames of a video file with these rising numbers, as PIL images.

    ffmpeg seeks to the first one, and writes no other frames into the pipe. If at least half
    are found, the last one stands for those that are missing. Frames come as PPM, whose header
    has their size: a file's metadata may turn them. start: of frame 0, see probe.
    """
    first = 0 if start is None else numbers[0]
    terms = [f"eq(n\\,{number - first})" for number in numbers]
    # In groups: ffmpeg refuses sums of more than 100 terms.
    sums = ["+".join(terms[i : i + 50]) for i in range(0, len(terms), 50)]
    chosen = "+".join(f"({some})" for some in sums)
    # Constant frame rate: numbers are times. Then numbered anew, so that no gap is filled.
    steps = [f"fps={rate}:start_time={0 if first else start}"] if start is not None else []
    steps += [f"select={chosen}", f"setpts=N/{rate}/TB"]
    if short_side:
        w, h = f"if(gt(iw,ih),-1,min(iw,{short_side}))", f"if(gt(iw,ih),min(ih,{short_side}),-1)"
        steps.append(f"scale='{w}':'{h}':flags=bicubic")  # it is antialiased there
    wanted = ["-map", "0:v:0", "-vf", ",".join(steps), "-r", str(rate), "-frames:v"]
    wanted += [str(len(numbers)), "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24"]
    # A quarter of a frame early: times in files are rounded.
    seek = start + (first - 0.25) / rate if first else 0
    done = ffmpeg(path, *wanted, "pipe:1", seek=seek)
    if done.returncode:
        last_line = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ValueError(f"ffmpeg: exit status {done.returncode}: {last_line}")
    images, at, head = [], 0, re.compile(rb"P6\s(\d+) (\d+)\s255\s")
    while found := head.match(done.stdout, at):
        width, height = map(int, found.groups())
        at = found.end() + 3 * width * height
        pixels = done.stdout[found.end() : at]
        images.append(Image.frombytes("RGB", (width, height), pixels))
    if 2 * len(images) < len(numbers):
        some = f"{len(images)} of {len(numbers)}"
        raise ValueError(f"ffmpeg finds {some} frames from {numbers[0]} on")
    return images + images[-1:] * (len(numbers) - len(images))


@dataclass
class Clips:
    """Video -> the frames of a clip, or of several views of it, all cropped alike.

    From a start, every step-th frame, rounded down; behind the end, the last frame. One clip
    starts at random if there are draws for it, else in the middle.
    """

    frames: int
    span: float = 2.7  # seconds that a clip's frames are spread over, with a clock
    stride: float = 4.0  # frames from one to the next, without a clock
    clips: int = 1  # without draws: so many, spread evenly from the first to the last
    crops: int = 1  # and of each, so many crops along the longer side, 1: the centre
    flip: bool = True  # at random; not where classes have a direction
    short_side: int | None = None

    def numbers(self, video, bits=None):
        """(clips, frames) int64 numbers of frames. bits: 24 uint64 draws for a start."""
        step = self.stride if video.rate is None else self.span * video.rate / self.frames
        step = min(step, video.count)  # beyond the end already: large ones would overflow
        offsets = np.floor(step * np.arange(self.frames)).astype(np.int64)
        room = max(0, video.count - 1 - int(offsets[-1]))  # the last start
        starts = np.array([room // 2])
        if bits is not None:
            starts = np.array([int(uniform(bits[23]) * (room + 1))])
        elif self.clips > 1:
            starts = np.rint(np.linspace(0, room, self.clips)).astype(np.int64)
        return np.minimum(starts[:, None] + offsets, video.count - 1)

    def __call__(self, video, size, channels, bits, min_crop, centre):
        """[(C, H, W) uint8]: the frames of each crop of each clip: see crop_and_resize."""
        pixels = []
        if bits is not None and not self.flip:
            bits = np.concatenate([bits[:22], [0], bits[23:]]).astype(np.uint64)
        for numbers in self.numbers(video, bits).tolist():
            shown = sorted(set(numbers))
            images = dict(zip(shown, video.read(shown)))
            for image in images.values() if self.crops > 1 else ():
                image.load()  # whole: see draft() in crop_and_resize
            for along in np.linspace(0, 1, self.crops) if self.crops > 1 else [0.5]:
                how = size, channels, bits, min_crop, centre, along
                cut = {number: crop_and_resize(image, *how) for number, image in images.items()}
                pixels += [cut[number] for number in numbers]
        return pixels


# --------------------------------------------------------------------------------------- toy motion


# Directions of motion, at steps of 45 degrees, and two more: the classes of videos.
TOY_MOTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
TOY_MOTIONS += ("growing", "shrinking")
TOY_FRAMES = 25  # of a video


def toy_motion(number, frame):
    """(class, centre (x, y), radius) of the object of a toy video at one of its frames.

    No frame tells the class. The place and the logarithm of the radius are uniform at first,
    and stay so in any motion, as all are even and wrap around.
    """
    which, x, y, size = uniform(random_bits(4, 0, 2, number, data.TOY)).tolist()
    label = int(which * len(TOY_MOTIONS))
    angle, growth = math.pi / 4 * label, {8: 1, 9: -1}.get(label, 0)
    if not growth:
        x, y = x + 0.025 * frame * math.cos(angle), y + 0.025 * frame * math.sin(angle)
    size = (size + 0.04 * frame * growth) % 1
    return label, (x % 1, y % 1), 0.12 * 2.5**size


def toy_clip(number, size=64):
    """A sample of a source: a video of the first object of toy_scene(number), in motion.

    It leaves the picture on one side and comes in on the other. The background is darkened,
    so that the object is easily found and its motion has to be learned.
    """
    scene = toy_scene(number)
    dark = {name: [0.35 * c for c in scene["background"][name]] for name in ("one", "two")}
    scene["background"] |= dark

    def draw(frame):
        _, (x, y), radius = toy_motion(number, frame)
        thing = scene["objects"][0]
        wave = thing["wave"] * radius / thing["radius"]
        thing = thing | {"radius": radius, "wave": wave}
        copies = [(x + i, y + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        seen = [c for c in copies if all(-radius < side < 1 + radius for side in c)]
        objects = [thing | {"centre": centre} for centre in seen]
        return toy_render(scene | {"objects": objects}, size)[0]

    video = Video(TOY_FRAMES, None, lambda numbers: [draw(frame) for frame in numbers])
    return {"video": lambda short_side=None: video, "class": toy_motion(number, 0)[0]}


class ToyMotion(Toy):
    """The same of toy_clip."""

    def __init__(self, split, size):
        super().__init__(split, size)
        self.size = max(size)  # crops would hide where things go
        self.classes = list(TOY_MOTIONS)
        self.identity = f"toy motion {TOY_VERSION}, {len(self.sizes)} videos an epoch"

    def read(self, number):
        return toy_clip(self.first + number, self.size)


# ---------------------------------------------------------------------------------------- the model


class RelativeAttention(Attention):
    """Attention with MViT's decomposed relative positions (arXiv 2112.01526, equation 5).

    score(q, k) += q . (R_t[dt] + R_h[dh] + R_w[dw]), with distances d* along the axes. As in
    MViT's code, this q is not divided by sqrt(d), and the tables begin as zeros.

    grid: lengths of the axes, (T, H, W) or (H, W). The last tokens are its cells. Tokens before
    them (a class token) have no position, and so no bias.
    """

    def __init__(self, width, heads, grid):
        super().__init__(width, heads)
        self.grid, self.axes = grid, "thw"[-len(grid) :]
        for axis, length in zip(self.axes, grid):
            table = nn.Parameter(torch.zeros(2 * length - 1, width // heads))
            self.register_parameter(f"rel_pos_{axis}", table)

    def forward(self, x, first_query=0):
        return self.proj(self.attend(x, first_query))

    def attend(self, x, first_query=0):
        """forward without the projection: (B, N, D) -> (B, N - first_query, D)."""
        q, k, v = kernels.split_heads(self.qkv(x), self.heads)  # (B, heads, N, d)
        extra = x.shape[1] - math.prod(self.grid)  # tokens without a position
        bias = self.bias(q[:, :, extra:])
        if extra:
            bias = F.pad(bias, (extra, 0, extra, 0))  # (B, heads, N, N)
        bias = bias[:, :, first_query:]
        # kernels.py takes no bias, and PyTorch's attention gives it a gradient.
        x = F.scaled_dot_product_attention(q[:, :, first_query:], k, v, attn_mask=bias)
        return x.transpose(1, 2).flatten(2)

    def bias(self, q):
        """q (B, heads, N, d) of the grid's N cells -> (B, heads, N, N)."""
        # Axis by axis, with all keys along it: nothing of size (N, N, d) is made.
        q, bias = q.unflatten(2, self.grid), 0  # (B, heads, T, H, W, d)
        for number, (axis, length) in enumerate(zip(self.axes, self.grid)):
            steps = torch.arange(length, device=q.device)
            steps = steps[:, None] - steps + length - 1
            table = getattr(self, f"rel_pos_{axis}")[steps]  # (query, key, d)
            scores = torch.einsum(f"bn{self.axes}d,{axis}kd->bn{self.axes}k", q, table)
            shape = [1] * len(self.grid)
            shape[number] = length
            bias = bias + scores.unflatten(-1, shape)  # (B, heads, T, H, W, T, H, W)
        keys = 2 + len(self.grid)
        return bias.flatten(keys).flatten(2, keys - 1)


class VideoClassifier(Classifier):
    """A Classifier of clips (B, C, T, H, W), with tubelets of 2 x P x P pixels as tokens.

    frames              T, an even number
    relative_positions  RelativeAttention in every block (the paper's choice)
    other arguments: see Classifier

    Positions are separable: pos_embed in space, time_embed in time. The latter and the
    relative ones begin as zeros, and load_weights halves a picture's kernel for two frames: so
    two equal frames have the features of one picture at first.
    """

    def __init__(self, size="B", frames=16, relative_positions=True, **arguments):
        super().__init__(size, **arguments)
        if frames < 2 or frames % 2:
            raise ValueError(f"{frames} frames: want an even number, as two of them share a token")
        self.config |= {"frames": frames, "relative_positions": relative_positions}
        (channels, H, W), P, grid = self.input_shape, self.patch_size, (frames // 2, *self.grid)
        self.input_shape, self.num_patches = (channels, frames, H, W), math.prod(grid)
        self.patch_embed["proj"] = nn.Conv3d(channels, self.width, (2, P, P), stride=(2, P, P))
        self.time_embed = nn.Parameter(torch.empty(1, frames // 2, self.width))
        for block in self.blocks if relative_positions else ():
            block.attn = RelativeAttention(self.width, self.heads, grid)
        initialize(self)

    def tokens(self, clips):
        """(B, C, T, H, W) float -> (B, 1 + T/2 * N, D), the class token first."""
        self.check(clips)
        frames = clips.transpose(1, 2).flatten(0, 1)
        patches = patchify(frames, self.patch_size)  # (B*T, N, P*P*C)
        patches = patches.unflatten(0, (len(clips), -1, 2)).transpose(2, 3).flatten(3)
        x = self.embed(patches) + self.pos_embed[:, None, 1:]  # (B, T/2, N, D)
        x = (x + self.time_embed[:, :, None]).flatten(1, 2)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return torch.cat([first, x], dim=1)


def make_clips(sample, key, clips, size, channels, min_crop=None, centre=1.0):
    """A row of a batch: images (C, T, H, W) uint8, the frames of all views, and labels ().

    min_crop: one clip at a random time, with one random crop and flip for all of its frames.
    Other arguments: see data.make_picture.
    """
    if sample is None:
        total = clips.clips * clips.crops * clips.frames
        frames = torch.zeros(total, *size, channels, dtype=torch.uint8).movedim(-1, 0)
        return {"images": frames, "labels": torch.tensor(-1)}
    bits = None if min_crop is None else random_bits(24, *key, data.VIEW)
    video = sample["video"](clips.short_side)
    frames = clips(video, size, channels, bits, min_crop, centre)
    return {"images": torch.stack(frames, dim=1), "labels": torch.tensor(sample["class"])}


def over_views(model):
    """A function of views of videos, (b, C, views * T, H, W) -> (b, classes): the logarithm of
    the mean of a VideoClassifier's probabilities."""

    def scores(clips):
        views = clips.split(model.config["frames"], dim=2)  # one after the other: memory
        total = sum(model(view).float().softmax(dim=1) for view in views)
        return (total / len(views)).log()

    return scores


def add_view_flags(parser):
    """Add the flags of evaluate.py that say which views of a video are taken."""
    add, count = parser.add_argument, flags.number(int, 1, 1000)
    add("--clips", type=count, default=5, help="of a video, spread evenly over it (5)")
    add("--crops", type=int, choices=(1, 3), default=3, help="along the longer side (3)")
    add_clip_flags(add)


def add_clip_flags(add):
    """Add the flags of training and evaluation that say what a clip is: see Clips."""
    at_least_0, side = flags.number(float, 0, 1e6), flags.number(int, 8, 2**16)
    add("--span", type=at_least_0, default=2.7, help="seconds of a clip, with a clock (2.7)")
    add("--stride", type=at_least_0, default=4.0, help="frames to the next, without one (4)")
    add("--short-side", type=side, help="that video files are scaled down to (none)")


# ----------------------------------------------------------------------------------- stage 3's task

# The paper's are unknown. B: OmniMAE's on Something-Something, and its augmentation for all.
# L, H: PySlowFast's of MAE on Kinetics, but for the lr, whose unit is not clear there: half of
# B's. 2B and 6.5B get H's. toy is our choice: without layer decay, as the patch embedding has
# to learn motion.
RECIPES = {
    "B": augment.Recipe(256, 1e-3, 100, 0.75, 0.1),
    "L": augment.Recipe(256, 5e-4, 50, 0.75, 0.2),
    "H": augment.Recipe(256, 5e-4, 75, 0.8, 0.2),
    "toy": augment.Recipe(32, 1e-3, 100, 1.0, 0.0, 128),
}
RECIPES |= {"2B": RECIPES["H"], "6.5B": RECIPES["H"]}


def add_flags(groups):
    flags.add_label_flags(groups, pool="mean", min_crop="0.08; toy: 1")
    flags.add_resume_flags(groups)
    augment.add_flags(groups, RECIPES, magnitude=7)
    add = groups["data"].add_argument
    add_clip_flags(add)
    add = groups["model"].add_argument
    add("--frames", type=flags.count, help="of a clip, an even number (16; toy: 4)")
    option = argparse.BooleanOptionalAction
    add("--relative-positions", action=option, default=True, help="in every block (yes)")


def prepare(run, finetune):
    if run.data in (None, "toy") and run.size in (None, "toy"):
        run.image_size = run.image_size or 32
    finetune.read_init(run, config=("frames", "relative_positions"))
    finetune.open_labelled(run, videos=True)
    own = {"min_crop": 1.0} if run.toy else {"rand_augment": 7.0}
    recipe = augment.recipe(run, RECIPES, **own)
    recipe |= {"warmup": 0.125, "val_crop": 1.0}
    if run.toy:
        recipe["epochs"] = 0.3  # of 65,536 videos
    run.frames = run.frames or run.config.get("frames", 4 if run.toy else 16)
    run.no_flip = run.no_flip or run.train.endless  # whose classes have a direction
    run.config |= {"frames": run.frames, "relative_positions": run.relative_positions}
    of_clips = {"span": run.span, "stride": run.stride, "short_side": run.short_side}
    clips = Clips(run.frames, flip=not run.no_flip, **of_clips)
    channels = run.config["channels"]
    run.make = partial(make_clips, clips=clips, size=run.image_size, channels=channels)
    run.eval_batch = 8
    return recipe | of_clips | {"no_flip": False}


def main(run, finetune):
    run.config["positions"] = "learned"  # as in classify
    # The head's initial deviation is OmniMAE's.
    how = {"head_std": 0.01, "drop_path": run.drop_path}
    model = finetune.build_classifier(run, VideoClassifier, **how)
    finetune.train_classifier(
        run,
        finetune.load_init(run, model),
        operations=4,
        what="videos, a clip of each",
        flags={"span": run.span, "stride": run.stride, "short_side": run.short_side},
    )
