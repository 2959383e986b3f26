"""Videos: where they come from, the frames of a clip, and the classifier of clips.

A source's "video" is a function that opens a Video. It may be a folder of frames, a GIF or WebP,
the pictures of a sample in a shard (KEY.000.jpg, KEY.001.jpg ...), or a file that the ffmpeg
program decodes. Only the last have a clock. A clip's frames are numbers.
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

import kernels
from data import (
    TOY,
    VIEW,
    Folder,
    class_of,
    crop_and_resize,
    is_picture,
    one_line,
    open_picture,
    random_bits,
    uniform,
    walk,
    warn_of_splits,
)
from model import Attention, Classifier, initialize, patchify
from support import flags
from support.labels import VIDEOS
from support.shards import by_number
from support.toy import Toy, toy_render, toy_scene
from tasks import augment

# ------------------------------------------------------------------------------------------- videos


ANIMATIONS = (".gif", ".webp")
LISTS = (".csv", ".txt", ".json")
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg"  # of no file that only names other files


NO_FFMPEG = "there is no ffmpeg program on the PATH: install it (apt install ffmpeg, brew install "


NO_FFMPEG += "ffmpeg, or the binary of pip install imageio-ffmpeg), or give folders of frames"


class Video(NamedTuple):
    count: int  # of frames: at least 1
    rate: float | None  # frames per second, if there is a clock
    read: object  # function of a rising list of numbers -> as many PIL images


class VideoFolder(Folder):
    """Videos below a folder, with the first level's names as classes; or those of a list in
    `labels`: see read_video_labels."""

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


def folder_of_list(data, labels):
    """(folder, labels) behind --data and --labels: data may be a list of videos."""
    if data and data.lower().endswith(LISTS) and os.path.isfile(data):
        return os.path.dirname(data) or ".", labels or data
    return data, labels


def videos_below(root):
    """{path, relative to root, of a video file or a folder that holds frames: {"class": first
    folder of the path, if any}}. (A .gif or .webp is a video, others are frames.)"""
    found = set()
    for folder, names in walk(root):
        files = [n for n in names if n.lower().endswith(VIDEOS + ANIMATIONS) and n[0] != "."]
        found.update(f"{folder}{name}" for name in files)
        if folder and any(is_picture(name) for name in set(names) - set(files)):
            found.add(folder[:-1])
    warn_of_splits(root, sorted({os.path.dirname(path) for path in found}))
    if not found:
        wanted = " ".join(VIDEOS + ANIMATIONS)
        raise ValueError(f"no videos in {root} (looked for {wanted} and folders of frames)")
    return {path: class_of(path) for path in found}


def read_video_labels(path, root):
    """{path, relative to root, of a video file or a folder of frames: {"class": name}} of a list.

    .csv, .txt: lines of path,class or, without a comma, of path and class after a tab or a space
    (Kinetics, as PySlowFast lists it); perhaps under a head line: of which no cell has a video's
    extension, and no path below root is the first; or which names the columns "path" and "class".
    .json: Something-Something's [{"id", "template"}], of id.webm, another file or a folder of this
    name; the class is the template without its brackets. Lines that are damaged or contradict an
    earlier one are counted and left out. Raises ValueError, one line, when the file is none of
    these.
    """
    found, bad, head, first = {}, 0, ["path", "class"], None
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            if path.lower().endswith(".json"):
                files = {os.path.splitext(name)[0]: name for name in os.listdir(root)}
                facts = [(one.get("id", ""), one.get("template") or "") for one in json.load(file)]
                rows = [(str(i).strip(), re.sub(r"[][]", "", str(t)).strip()) for i, t in facts]
                rows = [(i and files.get(i, f"{i}.webm"), template) for i, template in rows]
            else:
                lines = list(filter(None, map(str.strip, file)))
                first = lines[0] if lines else ""
                rows = [cells_of(line) for line in lines]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise ValueError(f"cannot read a list of videos from {path}: {one_line(error)}") from None
    names = rows[0] if first else []
    if headed := set(head) <= set(names):
        head = names
    elif len(names) > 1:
        videos = any(name.lower().endswith(VIDEOS + ANIMATIONS) for name in names)
        # It may be a whole path.
        headed = not videos and not os.path.exists(os.path.join(root, names[0]))
    for row in rows[headed:]:
        facts = dict(zip(head, row)) if len(row) == len(head) else {}
        name, label = facts.get("path"), facts.get("class")
        whole, entry = name and label and "\ufffd" not in str(row), {"class": label}
        bad += not whole or found.setdefault(os.path.normpath(name), entry) != entry
    if bad:
        why = "damaged, or against an earlier one"
        print(f"{path}: lines that are left out ({why}): {bad}", file=sys.stderr)
    if not found:
        want = "see read_video_labels in tasks/video.py"
        if first is not None:
            want = f"want lines of path,class or of path and class; the first is {first!r:.80}"
        raise ValueError(f"{path} lists no videos: {want}")
    if headed:
        why = f"is taken as a header; the columns are read as {', '.join(head)}"
        print(f"{path}: {first!r:.80} {why}", file=sys.stderr)
    return found


def cells_of(line):
    """The cells of a line of a list of videos, without the spaces around them."""
    path, tab, _ = line.partition("\t")
    if tab and "," not in path:
        cells = line.split("\t")
    elif "," in line:
        cells = next(csv.reader([line], skipinitialspace=True))
    else:
        cells = line.rsplit(None, 1)
    return [cell.strip() for cell in cells]


def open_video(path, short_side=None):
    """A Video of a file or a folder of frames. short_side: what ffmpeg scales larger ones down to.
    Raises OSError or ValueError where it is damaged."""
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
        return Video(len(files), None, lambda numbers: [open_picture(files[n]) for n in numbers])
    image = open_picture(files[0])

    def frame(number):
        image.seek(number)
        return image.copy()

    # An MPO's pictures, say, are views of one moment.
    count = image.n_frames if image.format in ("GIF", "WEBP", "PNG") else 1
    return Video(count, None, lambda numbers: list(map(frame, numbers)))


def ffmpeg(path, *arguments, seek=0.0):
    """The ended process, with its stdout and stderr. It opens no other file, and no address."""
    command = ["ffmpeg", "-hide_banner", "-nostdin", "-threads", "1"]
    command += ["-ss", f"{seek:.6f}"] if seek > 0 else []  # 0 makes some files end at once
    command += ["-protocol_whitelist", "file", "-format_whitelist", CONTAINERS]
    command += ["-i", f"file:{path}", *arguments]
    how = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 300}
    return subprocess.run(command, check=False, **how)


@lru_cache(1 << 16)
def probe(path):
    """(number of frames, frames per second, when the first is shown) of a video file.

    They are of the video stream alone, and of the packets that it has: a container is as long as
    its longest stream, or does not say. The last is None where packets do not all have a time, or
    cannot be sought by it (MPEG's streams and FLV have no index): frames are counted, by decoding.
    """
    # Of long files only the first packets and the last ten seconds are read. Fewer than 32 packets
    # are a short file, or there is an edit list, with packets in front of it that are not shown.
    listed = ["-c", "copy", "-copyts", "-start_at_zero", "-f", "framecrc", "pipe:1"]
    done = ffmpeg(path, "-map", "0:v:0", "-frames:v", "32", *listed)
    said = done.stderr.decode(errors="replace")
    rate = re.search(r"Video: .*?([\d.]+)(k?) (fps|tbr)", said)
    length = re.search(r"Duration: (\d+):(\d+):([\d.]+)", said)
    hours, minutes, seconds = map(float, length.groups()) if length else (0, 0, 0)
    seconds += 3600 * hours + 60 * minutes
    # Matroska says when the last packet ends; of a segment the first one may be late.
    late = re.search(r"Duration: [\d:.]+, start: (-?[\d.]+)", said)
    seconds -= float(late[1]) if late and "Input #0, matroska" in said else 0
    begin = packets(done.stdout).get(0, np.empty((2, 0)))
    listed = ["-map", "0:v:0", "-map", "0:a?", *listed]
    seek = seconds - 10 if begin.shape[1] == 32 else 0
    streams = packets(ffmpeg(path, *listed, seek=seek).stdout)
    if 0 not in streams:  # the sound is longer, or the file is cut
        streams = packets(ffmpeg(path, *listed).stdout)
    if not rate or 0 not in streams:
        why = last_words(said) or f"exit status {done.returncode}"
        why = why if done.returncode else "no frame, or no rate of frames"
        raise ValueError(f"ffmpeg finds no video in it: {why}")
    rate = float(rate[1]) * (1000 if rate[2] else 1)
    there = max(times[0].max() for times in streams.values()) + 1 / rate
    if 2 * there < seconds:
        raise ValueError(f"it is cut: {there:.1f} of {seconds:.1f} seconds are there")
    shown = np.append(begin[1], streams[0][1])
    if not np.isnan(shown).any() and not re.search(r"Input #0, (mpegts|mpeg|flv),", said):
        return round((shown.max() - shown.min()) * rate) + 1, rate, float(shown.min())
    wanted = ["-map", "0:v:0", "-vf", f"setpts=N/{rate}/TB", "-r", str(rate)]
    decoded = packets(ffmpeg(path, *wanted, "-f", "framecrc", "pipe:1").stdout)
    if not decoded:
        raise ValueError("ffmpeg decodes no frame of it")
    return decoded[0].shape[1], rate, None


def packets(table):
    """{stream: (2, n) times of decoding and of showing, in seconds, nan if unknown} that ffmpeg's
    framecrc lists. (Packets with flag 4 are left out: they are decoded, and not shown.)"""
    row = rb"^(\d+), *(-?\d+), *(-?\d+)(?!.*F=0x[0-9A-F]*[4-7C-F]\b)"
    found = re.findall(row, table, re.MULTILINE)
    rows, streams = np.array(found, dtype=object).reshape(-1, 3).astype(np.int64), {}
    for stream, ticks, second in re.findall(rb"^#tb (\d+): (\d+)/(\d+)", table, re.MULTILINE):
        times = rows[rows[:, 0] == int(stream), 1:]
        if len(times):
            unknown = np.abs(times.astype(float)) > 2**53  # Ogg that was cut may have such times
            times = np.where(unknown, np.nan, times * (int(ticks) / int(second)))
            streams[int(stream)] = times.T
    return streams


def decode(path, rate, short_side, numbers, start=0.0):
    """The frames of a video file with these rising numbers, as PIL images.

    ffmpeg seeks to the first one, and writes no other frames into the pipe. (Of a file that ends
    before its length says, the last one found is repeated, if at least half of them are there.)
    Frames come as PPM, whose header says their size: a film may be turned by its metadata.
    start: when the first frame of all is shown, or None: see probe.
    """
    first = 0 if start is None else numbers[0]
    terms = [f"eq(n\\,{number - first})" for number in numbers]
    # In groups: ffmpeg refuses sums of more than 100 terms.
    sums = ["+".join(terms[i : i + 50]) for i in range(0, len(terms), 50)]
    chosen = "+".join(f"({some})" for some in sums)
    # Constant frame rate, so that numbers are times; then numbered anew, so that no gap is filled.
    steps = [f"fps={rate}:start_time={0 if first else start}"] if start is not None else []
    steps += [f"select={chosen}", f"setpts=N/{rate}/TB"]
    if short_side:
        sides = f"'if(gt(iw,ih),-1,min(iw,{short_side}))':'if(gt(iw,ih),min(ih,{short_side}),-1)'"
        steps.append(f"scale={sides}:flags=bicubic")  # which is antialiased there
    wanted = ["-map", "0:v:0", "-vf", ",".join(steps), "-r", str(rate)]
    wanted += ["-frames:v", str(len(numbers)), "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt"]
    # A quarter of a frame early: times in files are rounded.
    seek = start + (first - 0.25) / rate if first else 0
    done = ffmpeg(path, *wanted, "rgb24", "pipe:1", seek=seek)
    if done.returncode:
        said = last_words(done.stderr.decode(errors="replace"))
        raise ValueError(f"ffmpeg: exit status {done.returncode}: {said}")
    images, at, head = [], 0, re.compile(rb"P6\s(\d+) (\d+)\s255\s")
    while found := head.match(done.stdout, at):
        width, height = map(int, found.groups())
        at = found.end() + 3 * width * height
        images.append(Image.frombytes("RGB", (width, height), done.stdout[found.end() : at]))
    if 2 * len(images) < len(numbers):
        some = f"{len(images)} of {len(numbers)}"
        raise ValueError(f"ffmpeg finds {some} frames from {numbers[0]} on")
    return images + images[-1:] * (len(numbers) - len(images))


def last_words(text):
    return text.strip().rpartition("\n")[2]


@dataclass
class Clips:
    """Video -> the frames of a clip, or of several views of it, all cropped alike.

    Numbers of frames are whole: from a start, every step-th, rounded down. What lies behind the
    end is the last frame. One clip starts at random if there are draws for it, else in the middle.
    """

    frames: int
    span: float = 2.7  # seconds that a clip's frames are spread over, where there is a clock
    stride: float = 4.0  # where there is none: frames from one to the next. 0 of either: no motion
    clips: int = 1  # without draws: so many, spread evenly from the first to the last
    crops: int = 1  # and of each, so many crops along the longer side, 1: the centre
    flip: bool = True  # at random; not where classes have a direction
    short_side: int | None = None

    @property
    def total(self):
        return self.clips * self.crops * self.frames

    def numbers(self, video, bits=None):
        """(clips, frames) int64 numbers of frames; bits: 24 uint64 draws, the last one decides."""
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
        """[(C, H, W) uint8], for each clip and each crop its frames. See crop_and_resize."""
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

    No frame tells the class. At the first one, the place is uniform and so is the logarithm of the
    radius; all motions are even and wrap around, which keeps both so, whatever the class is.
    """
    which, x, y, size = uniform(random_bits(4, 0, 2, number, TOY)).tolist()
    label = int(which * len(TOY_MOTIONS))
    angle, growth = math.pi / 4 * label, {8: 1, 9: -1}.get(label, 0)
    if not growth:
        x, y = x + 0.025 * frame * math.cos(angle), y + 0.025 * frame * math.sin(angle)
    size = (size + 0.04 * frame * growth) % 1
    return label, (x % 1, y % 1), 0.12 * 2.5**size


def toy_clip(number, size=64):
    """A source's sample of a video: the first object of toy_scene(number), alone, in motion.

    What leaves the picture on one side comes in on the other. The background is darkened, so that
    the object is easily found: what is to be learned is where it goes.
    """
    scene = toy_scene(number)
    dark = {name: [0.35 * c for c in scene["background"][name]] for name in ("one", "two")}
    scene["background"] |= dark

    def draw(frame):
        _, (x, y), radius = toy_motion(number, frame)
        thing = scene["objects"][0]
        thing = thing | {"radius": radius, "wave": thing["wave"] * radius / thing["radius"]}
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
        self.identity = f"toy motion, {len(self.sizes)} videos an epoch"

    def read(self, number):
        return toy_clip(self.first + number, self.size)


# ---------------------------------------------------------------------------------------- the model


class RelativeAttention(Attention):
    """Attention with MViT's decomposed relative positions (arXiv 2112.01526, equation 5).

    grid: lengths of the axes, (T, H, W) or (H, W). The last tokens are the grid's cells in this
    order. Tokens before them (a class token) have no position, and so no bias.

    score(q, k) += q . (R_t[dt] + R_h[dh] + R_w[dw]), where d* are the distances along the axes. As
    in MViT's code, this q is not divided by sqrt(d), and the tables are zero at first.
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
        """q (B, heads, N, d) of the grid's N cells -> (B, heads, N, N).

        The score with all keys along one axis comes first: nothing of size (N, N, d) is made.
        """
        q, bias = q.unflatten(2, self.grid), 0  # (B, heads, T, H, W, d)
        for number, (axis, length) in enumerate(zip(self.axes, self.grid)):
            steps = torch.arange(length, device=q.device)
            table = getattr(self, f"rel_pos_{axis}")
            table = table[steps[:, None] - steps + length - 1]  # (query, key, d), along this axis
            scores = torch.einsum(f"bn{self.axes}d,{axis}kd->bn{self.axes}k", q, table)
            shape = [1] * len(self.grid)
            shape[number] = length
            bias = bias + scores.unflatten(-1, shape)  # (B, heads, T, H, W, T, H, W)
        keys = 2 + len(self.grid)
        return bias.flatten(keys).flatten(2, keys - 1)


class VideoClassifier(Classifier):
    """A Classifier of clips (B, C, T, H, W), whose tokens are tubelets of 2 x P x P pixels.

    frames              T, an even number
    relative_positions  RelativeAttention in every block (the paper's choice)
    other arguments: see Classifier

    Positions are separable: pos_embed says where, time_embed when. That and the relative ones begin
    as zeros, and a picture's kernel as half of it for each of two frames (see load_weights): so two
    equal frames have at first the features of the picture that they are.
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
        patches = patchify(clips.transpose(1, 2).flatten(0, 1), self.patch_size)  # (B*T, N, P*P*C)
        patches = patches.unflatten(0, (len(clips), -1, 2)).transpose(2, 3).flatten(3)
        x = self.embed(patches) + self.pos_embed[:, None, 1:]  # (B, T/2, N, D)
        x = (x + self.time_embed[:, :, None]).flatten(1, 2)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return torch.cat([first, x], dim=1)


def make_clips(sample, key, clips, size, channels, min_crop=None, centre=1.0):
    """A row of a batch: images (C, T, H, W) uint8, T = clips.total frames, and labels ().

    With min_crop, one clip at a random time, with one random crop and flip for all frames. Others:
    see data.make_picture.
    """
    if sample is None:
        frames = torch.zeros(clips.total, *size, channels, dtype=torch.uint8).movedim(-1, 0)
        return {"images": frames, "labels": torch.tensor(-1)}
    bits = None if min_crop is None else random_bits(24, *key, VIEW)
    video = sample["video"](clips.short_side)
    frames = clips(video, size, channels, bits, min_crop, centre)
    return {"images": torch.stack(frames, dim=1), "labels": torch.tensor(sample["class"])}


def over_views(model):
    """A function of several views of videos, (b, C, views * T, H, W): the logarithm of the mean of
    a VideoClassifier's probabilities, (b, classes)."""

    def scores(clips):
        views = clips.split(model.config["frames"], dim=2)  # one after the other: memory
        return (sum(model(view).float().softmax(dim=1) for view in views) / len(views)).log()

    return scores


def add_view_flags(parser):
    """Add the flags of evaluate.py that say which views of a video are taken: see Clips."""
    add, count, number = (
        parser.add_argument,
        flags.number(int, 1, 1000),
        flags.number(float, 0, 1e6),
    )
    add("--clips", type=count, default=5, help="of a video, spread evenly over it (5)")
    add("--crops", type=int, choices=(1, 3), default=3, help="along the longer side (3)")
    add("--span", type=number, default=2.7, help="seconds of a clip, as in training (2.7)")
    add("--stride", type=number, default=4.0, help="frames to the next one, as in training (4)")
    add("--short-side", type=flags.number(int, 8, 2**16), help="of decoded files, as in training")


# ----------------------------------------------------------------------------------- stage 3's task

# Borrowed: the paper's are unknown. B: OmniMAE's on Something-Something, of the same group. L, H:
# PySlowFast's of MAE on Kinetics, but for the lr, whose unit is not clear there: half of B's, as
# there. The augmentation is OmniMAE's. 2B and 6.5B get H's. toy is our choice: what moves is seen
# first by the patch embedding, which has to learn it.
RECIPES = {
    "B": augment.Recipe(256, 1e-3, 100, 0.75, 0.1),
    "L": augment.Recipe(256, 5e-4, 50, 0.75, 0.2),
    "H": augment.Recipe(256, 5e-4, 75, 0.8, 0.2),
    "toy": augment.Recipe(32, 8e-3, 100, 1.0, 0.0),
}
RECIPES |= {"2B": RECIPES["H"], "6.5B": RECIPES["H"]}


def add_flags(groups):
    flags.add_label_flags(groups, pool="mean", min_crop="0.08; toy: 1")
    flags.add_resume_flags(groups)
    augment.add_flags(groups, RECIPES, magnitude=7)
    add, at_least_0 = groups["data"].add_argument, flags.number(float, 0, 1e6)
    add("--span", type=at_least_0, default=2.7, help="seconds of a clip of a video file (2.7)")
    stride = "frames from one to the next, where there is no clock (4)"
    add("--stride", type=at_least_0, default=4.0, help=stride)
    side = flags.number(int, 8, 2**16)
    add("--short-side", type=side, help="that video files are scaled down to (none)")
    add("--no-flip", action="store_true", help="classes have a direction")
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
        recipe["epochs"] = 0.2  # of 65,536 videos
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
