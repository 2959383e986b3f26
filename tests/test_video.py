"""Video: tubelets, relative positions, sources and sampling of clips, runs of --task video."""

import json
import math
import os
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ODD_NAMES,
    encoded,
    evaluated,
    last_json,
    picture,
    picture_batches,
    read_metrics,
    stage,
    write_tar,
)
from PIL import Image

import data
import evaluate
import finetune
import kernels
import model as models
from support import pack, shards
from support.labels import VIDEOS, all_labels
from tasks import augment
from tasks import video as video_module
from tasks.video import (
    TOY_MOTIONS,
    Clips,
    RelativeAttention,
    Video,
    VideoClassifier,
    VideoFolder,
    decode,
    make_clips,
    open_video,
    over_views,
    read_video_labels,
    toy_motion,
)

SMALL = {"size": "16x2x2", "image_size": (8, 12), "patch_size": 4, "classes": 5}
if not shutil.which("ffmpeg"):  # the wheel's has another name
    import imageio_ffmpeg

    FOLDER = tempfile.TemporaryDirectory()
    Path(FOLDER.name, "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    os.environ["PATH"] = f"{FOLDER.name}{os.pathsep}{os.environ['PATH']}"


def randomize(model, seed=0):
    """Random values everywhere, also in what begins as zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.double()


# ------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("relative", [True, False])
def test_two_equal_frames_are_the_picture_that_they_are(pool, relative):
    of_pictures = randomize(models.Classifier(pool=pool, **SMALL))
    of_clips = VideoClassifier(frames=2, relative_positions=relative, pool=pool, **SMALL)
    line = models.load_weights(of_clips.double(), of_pictures.state_dict(), (2, 3), keep_head=True)
    assert "patch_embed.proj inflated from one frame to two" in line
    new = "rel_pos_h, rel_pos_t, rel_pos_w, time_embed" if relative else "time_embed"
    assert f"newly initialised: {new}" in line
    images = torch.randn(3, 3, 8, 12, dtype=torch.float64)
    clips = images[:, :, None].expand(-1, -1, 2, -1, -1)
    torch.testing.assert_close(of_clips.features(clips), of_pictures.features(images))
    torch.testing.assert_close(of_clips(clips), of_pictures(images))


def test_tokens_are_those_of_a_3d_convolution_and_separable_positions():
    model = randomize(VideoClassifier(frames=6, **SMALL))
    clips = torch.randn(2, 3, 6, 8, 12, dtype=torch.float64)
    proj = model.patch_embed["proj"]
    found = F.conv3d(clips, proj.weight, proj.bias, stride=(2, 4, 4))  # (B, D, 3, 2, 3)
    space = model.pos_embed[0, 1:].T.reshape(1, 16, 1, 2, 3)
    time = model.time_embed[0].T.reshape(1, 16, 3, 1, 1)
    tokens = (found + space + time).flatten(2).transpose(1, 2)  # time first, then row by row
    torch.testing.assert_close(model.tokens(clips)[:, 1:], tokens)
    first = model.cls_token[0, 0] + model.pos_embed[0, 0]
    torch.testing.assert_close(model.tokens(clips)[:, 0], first.expand(2, -1))
    with pytest.raises(ValueError, match=r"the model wants \(B, 3, 6, 8, 12\)"):
        model(clips[:, :, :4])


def test_relative_positions_are_the_direct_sum():
    grid, width, heads = (2, 3, 2), 8, 2
    attention = randomize(RelativeAttention(width, heads, grid))
    x = torch.randn(2, 13, width, dtype=torch.float64)
    q, k, v = kernels.split_heads(attention.qkv(x), heads)  # (B, heads, 13, 4)
    scores = q @ k.transpose(2, 3) / 2
    places = [np.unravel_index(i, grid) for i in range(12)]
    tables = attention.rel_pos_t, attention.rel_pos_h, attention.rel_pos_w
    for i, here in enumerate(places):
        for j, there in enumerate(places):
            steps = [a - b + n - 1 for a, b, n in zip(here, there, grid)]
            row = sum(table[step] for table, step in zip(tables, steps))
            scores[:, :, 1 + i, 1 + j] += q[:, :, 1 + i] @ row
    expected = attention.proj((scores.softmax(dim=3) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), expected)
    torch.testing.assert_close(attention(x, first_query=4), expected[:, 4:])
    attention(x).square().sum().backward()
    assert all(table.grad.abs().max() > 0 for table in tables)


def test_a_video_model_is_read_again_and_is_no_picture_model(tmp_path):
    model = randomize(VideoClassifier(frames=4, **SMALL))
    models.save_weights(tmp_path / "model.pt", model.state_dict(), model.config)
    again, line = evaluate.load_model(tmp_path / "model.pt", "video", "cpu")
    assert "newly" not in line and "dropped" not in line and "inflated" not in line
    clips = torch.randn(2, 3, 4, 8, 12)
    torch.testing.assert_close(again(clips), model.float()(clips))
    with pytest.raises(ValueError, match="the weights do not fit the model"):
        evaluate.load_model(tmp_path / "model.pt", "knn", "cpu")


def test_decay_and_layers_of_what_is_new():
    model = VideoClassifier(frames=4, **SMALL)
    groups = finetune.layer_groups(model, 0.05, 0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g["weight_decay"], g["lr_scale"]) for g in groups for p in g["params"]}
    assert found["time_embed"] == (0, 0.125)  # beside the patch embedding
    assert found["blocks.0.attn.rel_pos_t"] == (0, 0.25)
    assert found["patch_embed.proj.weight"] == (0.05, 0.125)


# ------------------------------------------------------------------------------------ frames, clips


def numbers(count, rate=None, bits=None, **how):
    return Clips(4, **how).numbers(Video(count, rate, None), bits).tolist()


def test_numbers_of_frames_by_hand():
    assert numbers(20, stride=2.5) == [[6, 8, 11, 13]]  # 0 2 5 7, with 12 places to start
    assert numbers(20, stride=2.5, clips=3) == [[0, 2, 5, 7], [6, 8, 11, 13], [12, 14, 17, 19]]
    assert numbers(3, stride=2) == [[0, 2, 2, 2]]  # what is short repeats its last frame
    assert numbers(1, stride=2, clips=2) == [[0, 0, 0, 0]] * 2
    assert numbers(3, stride=4e18) == numbers(3, 30.0, span=4e18) == [[0, 2, 2, 2]]
    assert numbers(9, stride=0) == [[4, 4, 4, 4]]  # no motion
    # 2 seconds of 10 frames each: one every half second
    assert numbers(31, 10.0, span=2, clips=2) == [[0, 5, 10, 15], [15, 20, 25, 30]]
    bits = np.zeros(24, dtype=np.uint64)
    assert numbers(20, bits=bits, stride=2, clips=5) == [[0, 2, 4, 6]]
    bits[23] = 2**64 - 1
    assert numbers(20, bits=bits, stride=2) == [[13, 15, 17, 19]]


def test_random_starts_are_all_equally_likely():
    draws = (data.random_bits(24, 0, 0, position, data.VIEW) for position in range(2000))
    starts = [numbers(13, bits=bits, stride=3)[0][0] for bits in draws]
    shares = np.bincount(starts, minlength=4) / 2000
    assert shares == pytest.approx([0.25] * 4, abs=0.04)  # four standard errors


class Source(data.Source):
    """Videos that are lists of pictures; classes are 0."""

    def __init__(self, *videos):
        self.videos, self.sizes, self.classes = videos, np.ones(len(videos), int), ["a", "b"]

    def read(self, number):
        images = self.videos[number]
        video = Video(len(images), None, lambda numbers: [images[n].copy() for n in numbers])
        return {"video": lambda short_side: video, "class": 0}

    def name(self, number):
        return str(number)

    where = name


def clip_batches(source, size, channels, batch_size, clips, order=None, change=None, min_crop=None):
    shape = {"size": size, "channels": channels, "min_crop": min_crop}
    make = partial(make_clips, clips=clips, **shape)
    if change:
        make = partial(augment.augmented, make=make, change=change)
    return data.Batches(source, make, batch_size, order=order)


def test_all_frames_of_a_clip_are_cropped_flipped_and_augmented_alike():
    source, order = Source(*[[picture(i, 40, 60)] * 6 for i in range(8)]), data.Order([1] * 8)
    how = {"order": order, "min_crop": 0.2, "clips": Clips(4, stride=1)}
    changed = lambda *key: augment.augment(*key, magnitude=7, erasing=0.9, operations=4)
    for change in (None, changed):
        images = clip_batches(source, (16, 16), 3, 8, change=change, **how)[0]["images"]
        assert images.shape == (8, 3, 4, 16, 16)
        assert (images == images[:, :, :1]).all()  # equal frames stay equal
        assert (images[0] != images[1]).any()
    # And pictures are cropped like clips with the same draws.
    frames = clip_batches(source, (16, 16), 3, 8, **how)[0]["images"][:, :, 0]
    source.read = lambda number: {"image": lambda: source.videos[number][0], "class": 0}
    assert (picture_batches(source, (16, 16), 3, 8, order)[0]["images"] == frames).all()


def test_flips_only_where_classes_have_no_direction():
    ramp = Image.fromarray(np.tile(np.arange(0, 160, 10, dtype=np.uint8), (16, 1)))
    how = {"order": data.Order([1]), "min_crop": 1.0}
    for flip in (True, False):
        clips = Clips(2, stride=1, flip=flip)
        images = clip_batches(Source([ramp]), (16, 16), 1, 64, clips=clips, **how)[0]["images"]
        flipped = (images[..., 0] > images[..., -1]).float().mean()
        assert 0.3 < flipped < 0.7 if flip else flipped == 0


@pytest.mark.parametrize("upright", [False, True])
def test_three_crops_along_the_longer_side(upright):
    pixels = np.tile(np.arange(20, dtype=np.uint8), (8, 1))
    pixels = pixels.T.copy() if upright else pixels
    clips = Clips(2, stride=1, clips=2, crops=3)
    batches = clip_batches(Source([Image.fromarray(pixels)] * 3), (8, 8), 1, 2, clips=clips)
    images = batches[0]["images"][0, 0].unflatten(0, (2, 3, 2))  # clips, crops, frames
    for crop, start in enumerate((0, 6, 12)):
        part = pixels[start : start + 8] if upright else pixels[:, start : start + 8]
        assert (images[:, crop] == torch.from_numpy(part)).all()


def test_normalising_and_mixing_clips_is_that_of_their_frames():
    clips = torch.randint(0, 256, (4, 3, 6, 8, 10), dtype=torch.uint8)
    normal = data.normalize(clips)
    weight, draws = torch.tensor([1.0, 1, 1, 0]), torch.rand(4, augment.MIX_DRAWS)
    mixed, share = augment.mix(normal, weight, draws, 0.8, 1.0)
    for t in range(6):
        assert torch.equal(normal[:, :, t], data.normalize(clips[:, :, t]))
        one, shares = augment.mix(normal[:, :, t], weight, draws, 0.8, 1.0)
        assert torch.equal(mixed[:, :, t], one) and torch.equal(share, shares)


# ----------------------------------------------------------------------------------------- sources


def grey(value, size=(24, 16)):
    return Image.new("RGB", size, (value,) * 3)


def levels(video, numbers):
    """The grey levels of the frames of a Video."""
    return [round(np.asarray(image.convert("L")).mean()) for image in video.read(numbers)]


def frames_of(path, count, first=0):
    """A folder of frames of grey 10, 20, ... of which names are not padded with zeros."""
    path.mkdir(parents=True)
    for i in range(count):
        grey(first + 10 * i).save(path / f"frame{i}.png")


def test_folders_of_frames_and_animations(tmp_path):
    frames_of(tmp_path / "a" / "clip", 12)
    for name in ("a/anim.gif", "b/anim.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        how = {"save_all": True, "append_images": [grey(10 * i) for i in range(1, 12)]}
        grey(0).save(tmp_path / name, **how, **({"lossless": True} if "webp" in name else {}))
    source = data.open_sources(str(tmp_path), size=(8, 8), videos=True)[0]
    assert sorted(source.paths) == ["a/anim.gif", "a/clip", "b/anim.webp"]
    assert source.classes == ["a", "b"] and source.identity.startswith("3 videos, ")
    for number in range(3):
        video = source.read(number)["video"]()
        assert (video.count, video.rate) == (12, None)
        assert levels(video, [0, 2, 10, 11]) == [0, 20, 100, 110]
    with pytest.raises(ValueError, match="no videos in"):
        (tmp_path / "empty").mkdir()
        VideoFolder(str(tmp_path / "empty"))


def test_shards_with_several_frames_or_an_animation(tmp_path, capsys):
    gif = encoded(grey(50), "GIF", save_all=True, append_images=[grey(60), grey(70)])
    members = {"y.gif": gif, "y.cls": b"1", "x.cls": b"0"}
    members |= {f"x.{i}.png": encoded(grey(10 * i)) for i in range(11)}
    write_tar(tmp_path / "a.tar", sorted(members.items()))
    pack.write_listing(shards.Shards(str(tmp_path / "a.tar")))
    for pipe in ("", "pipe:cat "):
        where, cache = f"{pipe}{tmp_path / 'a.tar'}", (str(tmp_path / "cache"), "1M")
        data.open_sources(where, cache=cache)
        assert "1 samples have several pictures: NAME.000.jpg" in capsys.readouterr().err
        source, _ = data.open_sources(where, cache=cache, videos=True)
        assert capsys.readouterr().err == ""  # they are what is wanted
    found = [source.read(number) for number in range(2)]
    assert [sample["class"] for sample in found] == [0, 1]
    long, short = (sample["video"]() for sample in found)
    assert long.count == 11 and levels(long, [1, 9, 10]) == [10, 90, 100]
    assert short.count == 3 and levels(short, [0, 2]) == [50, 70]


def classes_in(path, text=None):
    """{path of a video: its class} of a list, which has this text."""
    if text is not None:
        path.write_text(text, "latin-1")
    found = read_video_labels(str(path), str(path.parent))
    assert all(entry.keys() == {"class"} for entry in found.values())
    return {path: entry["class"] for path, entry in found.items()}


IDS = [
    {"id": "7", "label": "holding potato", "template": "Holding [something]"},
    {"id": 8, "template": "Moving [something] up"},
    {"id": "9", "template": "Holding [something]"},
]
HELD = "Holding something"
LISTED_IDS = {"7": HELD, "8.mp4": "Moving something up", "9.webm": HELD}
ODD_IDS = [{"id": path, "template": label} for path, label in (("a", "caf\xe9"), ("9", "dog"))]
TWO, PETS = {"a/x": "jump rope", "b/y": "skiing"}, {"a.mp4": "cat", "b.mp4": "dog"}
DOG = {"b.mp4": "dog"}
# (file, its text, what is listed, lines that are left out, True if there is a head line)
LISTS = [
    ("a.csv", "path,label\na/x,jump rope\nb/y,skiing\na/x,jump rope\nb/y,other\n", TWO, 1, True),
    ("a.csv", "a/x 3\nb/y 11\na b c/z 11", {"a/x": "3", "b/y": "11", "a b c/z": "11"}, 0, False),
    ("a.csv", 'a/x, "jump rope"\nb/y,\tskiing \nc/z,\nc/z, \n', TWO, 2, False),  # no label
    ("a.csv", "a/x\tjump rope\nb/y\tskiing\n", TWO, 0, False),
    # The first line: a video, a folder that is there, damaged, or taken for a head line.
    ("a.csv", " a.mp4 , cat \nb.mp4,dog", PETS, 0, False),
    ("a.csv", "A.GIF,cat\nb.mp4,dog", {"A.GIF": "cat", **DOG}, 0, False),
    ("a.csv", "missing/a.mp4 cat\nb.mp4,dog", {"missing/a.mp4": "cat", **DOG}, 0, False),
    ("a.csv", 'a/x,"cat\nb.mp4,dog', {"a/x": "cat", **DOG}, 0, False),
    ("a.csv", '"missing/a.mp4,cat\nb.mp4,dog', DOG, 1, False),
    ("a.csv", "missing/x,cat\nb.mp4,dog", DOG, 0, True),
    ("a.csv", "filename class\nb.mp4,dog", DOG, 0, True),
    # A head line that names the columns, though there is a folder with the name of one.
    ("a.txt", "class,path\ncat,a.mp4\ndog,b.mp4\n", PETS, 0, True),
    ("a.txt", ' class , id, "path"\ncat,1,a.mp4\ndog,2, b.mp4 \n', PETS, 0, True),
    ("a.txt", "id\tpath\tclass\n1\ta.mp4\tcat\n2\tb.mp4\tdog\n", PETS, 0, True),
    ("a.txt", "class path\ncat a.mp4\ndog b.mp4\n", PETS, 0, True),
    # Another encoding is damage.
    ("a.csv", "a.mp4,caf\xe9\n\xe9.mp4,dog\nb.mp4,dog", DOG, 2, False),
    ("a.json", json.dumps(ODD_IDS, ensure_ascii=False), {"9.webm": "dog"}, 1, False),
    ("IDS.JSON", json.dumps(IDS), LISTED_IDS, 0, False),
]


@pytest.mark.parametrize("name, text, expected, left_out, headed", LISTS)
def test_lists_of_videos(tmp_path, capsys, name, text, expected, left_out, headed):
    for folder in ("a/x", "7", "class", "label"):
        frames_of(tmp_path / folder, 2)
    (tmp_path / "8.mp4").touch()
    assert classes_in(tmp_path / name, text) == expected
    said = capsys.readouterr().err
    line = f"left out (damaged, or against an earlier one): {left_out}\n"
    assert line in said if left_out else "left out" not in said
    assert ("is taken as a header; the columns are read as " in said) is headed


def test_a_list_of_videos_that_is_refused_says_what_it_found(tmp_path):
    for name, text, words in (
        ("list.csv", "a;b\na.mp4;skiing\n", "lists no videos: want lines of .* 'a;b'"),
        ("bad.json", '[{"id": 1}]', "bad.json lists no videos"),
        ("bad.json", "[1]", "cannot read a list of videos"),
        ("NONE.JSON", "[]", "NONE.JSON lists no videos"),
        ("deep.json", "[" * 100_000, "cannot read .* from .*Recursion"),
        ("none.csv", None, "cannot read a list of videos"),
    ):
        with pytest.raises(ValueError, match=words):
            classes_in(tmp_path / name, text)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_of_videos_may_look_like_patterns(film, tmp_path, name):
    frames_of(tmp_path / name / f"clip {name}", 3)
    (tmp_path / name / f"{name}.csv").write_text(f'"clip {name}","class of {name}"\n')
    for where in (tmp_path / name, tmp_path / name / f"{name}.csv"):
        source, _ = data.open_sources(str(where), videos=True)
        assert levels(source.read(0)["video"](), [0, 2]) == [0, 20]
    assert source.classes == [f"class of {name}"]
    (tmp_path / "films" / name).mkdir(parents=True)
    path = shutil.move(film(), tmp_path / "films" / name / f"{name}.mkv")
    assert levels(VideoFolder(str(path.parent)).read(0)["video"](), [3, 7]) == [30, 70]


def test_a_list_is_all_of_data_or_beside_a_folder(tmp_path):
    for folder in ("x", "y", "z"):
        frames_of(tmp_path / folder, 2)
    (tmp_path / "TRAIN.CSV").write_text("x,one\ny,two\n")
    (tmp_path / "val.csv").write_text("z,two\n")
    lists = str(tmp_path / "TRAIN.CSV"), str(tmp_path / "val.csv")
    for opened in (lists, (str(tmp_path), None, (8, 8), *lists)):
        train, val = data.open_sources(*opened, videos=True)
        assert train.classes == val.classes == ["one", "two"]
        assert all_labels(val).tolist() == [1] and val.paths == ["z"]
    # A first line that is a whole path is no head; lines without a path or a label name nothing.
    found = classes_in(tmp_path / "odd.csv", f"{tmp_path}/x,one\ny,\n,two\n ,\nz,two\n")
    assert found == {str(tmp_path / "x"): "one", "z": "two"}


def test_without_ffmpeg_one_line_says_what_to_install(tmp_path, monkeypatch):
    frames_of(tmp_path / "a" / "x", 2)
    monkeypatch.setenv("PATH", "")
    assert len(VideoFolder(str(tmp_path)).paths) == 1  # frames do not need it
    names = [*(f"y{extension}" for extension in VIDEOS), "Z.TS", "z.Wmv"]
    for count, name in enumerate(names, start=1):
        (tmp_path / "a" / name).touch()
        files = rf"video files \({count}\), and there is no ffmpeg program on the PATH: install it"
        with pytest.raises(ValueError, match=files):
            VideoFolder(str(tmp_path))
    (tmp_path / "list.csv").write_text("a/x,one\na/y.flv,two\na/y.m4v,two\n")
    with pytest.raises(ValueError, match=r"list.csv has video files \(2\)"):
        data.open_sources(str(tmp_path / "list.csv"), videos=True)


QUICK = "-q:v", "1", "-g", "6"
LOSSLESS = ("-c:v", "ffv1", "-pix_fmt", "bgr0")


def test_a_long_film_is_measured_by_its_first_and_last_packets(film, monkeypatch):
    path, listed, packets = film("long.mp4", codec=H264, loops=30), [], video_module.packets
    monkeypatch.setattr(
        video_module, "packets", lambda table: listed.append(table) or packets(table)
    )
    assert open_video(path).count == 600
    assert sum(table.count(b"\n0,") for table in listed) < 32 + 10 * 10 + 2 * 6  # two groups more


MPEG4 = ("-c:v", "mpeg4", *QUICK)
MPEG2 = ("-c:v", "mpeg2video", *QUICK, "-bf", "2")
H264 = ("-c:v", "libx264", "-crf", "1", "-g", "6", "-bf", "2", "-pix_fmt", "yuv420p")
VP8 = ("-c:v", "libvpx", "-crf", "4", "-b:v", "1M", "-g", "6")
FILMS = {  # name: how it is coded
    "a.mkv": LOSSLESS,
    **dict.fromkeys(["a.mp4", "a.m4v", "b-frames.ts"], H264),
    **dict.fromkeys(["a.ts", "a.mpg", "A.MPG"], MPEG2),
    "a.mov": MPEG4,
    "a.3gp": (*MPEG4, "-c:a", "aac"),
    "a.avi": (*MPEG4, "-c:a", "pcm_s16le"),
    "b-frames.avi": (*H264, "-c:a", "pcm_s16le"),  # of which AVI does not keep the times
    "a.webm": VP8,
    "a.wmv": ("-c:v", "wmv2", *QUICK),
    "a.flv": ("-c:v", "flv", *QUICK),
    "a.mpeg": ("-c:v", "mpeg1video", "-q:v", "1", "-f", "mpeg"),
}
RATES = {name: 25 if "mpeg" in codec[1] else 10 for name, codec in FILMS.items()}


def ffmpeg(*arguments):
    command = ["ffmpeg", "-v", "error", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


@pytest.fixture
def film(tmp_path):
    """film(name, size, codec, rate, seconds of sound): path of 20 frames of grey 0, 10, ... 190, as
    often as `loops` says. pipe: a file that knows no length."""

    def make(name="film.mkv", size="32x32", codec=LOSSLESS, rate=10, sound=0, pipe=False, loops=1):
        path = tmp_path / "films" / name
        path.parent.mkdir(exist_ok=True)
        frames = f"nullsrc=size={size}:rate={rate}:duration={20 * loops / rate}"
        grey = "geq=r='10*mod(N,20)':g='10*mod(N,20)':b='10*mod(N,20)'"
        given = ["-f", "lavfi", "-i", f"{frames},format=rgb24,{grey}"]
        given += ["-f", "lavfi", "-i", f"sine=duration={sound}"] if sound else []
        if pipe:
            path.write_bytes(ffmpeg(*given, *codec, "-f", path.suffix[1:], "pipe:1"))
        else:
            ffmpeg(*given, *codec, path)
        return str(path)

    return make


def test_ffmpeg_gives_the_frames_that_are_asked_for(film, monkeypatch):
    video = open_video(film())
    assert (video.count, video.rate) == (20, 10.0)
    piped, run = [], subprocess.run

    def counted(*arguments, **how):
        piped.append(run(*arguments, **how))
        return piped[-1]

    monkeypatch.setattr(video_module.subprocess, "run", counted)
    for wanted in ([0], [0, 1, 2], [3, 7, 8, 19], [19], list(range(20))):
        assert levels(video, wanted) == [10 * n for n in wanted]
        # And no other frame goes through the pipe: 13 bytes of a head, three for each pixel.
        assert len(piped[-1].stdout) == len(wanted) * (13 + 3 * 32 * 32)


def check_that_all_frames_are_shown(path):
    """The frames of a film of 32 x 32 are those that ffmpeg shows, all of them, in their order."""
    wanted = "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "gray", "pipe:1"
    shown = np.frombuffer(ffmpeg("-i", path, *wanted), np.uint8).reshape(-1, 32 * 32).mean(axis=1)
    video, last = open_video(path), len(shown) - 1
    assert video.count == len(shown)
    for numbers in ([0], [1, 2, 5], [4, 6], [last - 6, last], [last], list(range(last + 1))):
        assert levels(video, numbers) == pytest.approx(shown[numbers], abs=3)


@pytest.mark.parametrize("loops, sound", [(1, 3), (12, 0)])
@pytest.mark.parametrize("name", FILMS)
def test_a_film_is_as_long_as_its_pictures_and_each_is_found(film, name, loops, sound):
    rate, count = RATES[name], 20 * loops
    path = film(name, "32x32", FILMS[name], rate, sound, loops=loops)
    check_that_all_frames_are_shown(path)
    video = open_video(path)
    assert (video.count, video.rate) == (count, rate)
    assert levels(video, range(count - 20, count)) == pytest.approx(range(0, 200, 10), abs=3)
    last = Clips(4, span=4 / rate).numbers(video, np.full(24, 2**64 - 1, np.uint64))
    assert last.tolist() == [list(range(count - 4, count))]  # of the pictures, not of the sound
    source = VideoFolder(os.path.dirname(path))
    assert [source.name(n) for n in range(len(source.paths))] == [path]


@pytest.mark.parametrize("begin, length, loops", [(7.3, 300, 12), (4.3, 9, 1)])  # in frames
@pytest.mark.parametrize("name", [*FILMS, "a.ogv"])
def test_a_film_that_was_cut_without_coding_it_again_has_the_frames_that_are_shown(
    film, name, begin, length, loops, tmp_path
):
    """MP4 keeps the frames from the key frame before, and an edit list that leaves them out."""
    codec = FILMS.get(name, ("-c:v", "libtheora", "-q:v", "10", "-g", "6"))
    rate, path = RATES.get(name, 10), str(tmp_path / name)
    whole = film(name, "32x32", codec, rate, loops=loops)
    ffmpeg("-ss", begin / rate, "-i", whole, "-t", length / rate, "-c", "copy", path)
    check_that_all_frames_are_shown(path)


@pytest.mark.parametrize("sound", [0, 48])
@pytest.mark.parametrize("name", ["a.mkv", "b-frames.mkv", "a.webm", "a.mp4", "a.ts"])
def test_segments_of_a_film_have_their_own_frames(film, name, sound, tmp_path):
    """Their times go on from one to the next; in Matroska also their duration begins at 0."""
    rate = RATES.get(name, 10)
    whole = film(name, "32x32", FILMS.get(name, H264), rate, sound, loops=24 * rate // 10)
    cut = "-c", "copy", "-f", "segment", "-segment_time", 13, tmp_path / f"%d-{name}"
    ffmpeg("-i", whole, "-map", 0, *cut)
    paths = sorted(map(str, tmp_path.glob(f"?-{name}")))
    assert len(paths) == 4
    for path in paths:
        check_that_all_frames_are_shown(path)


LIVE = {"live.webm": VP8, "live.mkv": (*LOSSLESS, "-live", "1"), "live.flv": FILMS["a.flv"]}


@pytest.mark.parametrize("sound", [0, 3])
@pytest.mark.parametrize("name", LIVE)
def test_a_film_of_a_recorder_that_knew_no_length_is_as_long_as_its_pictures(film, name, sound):
    path = film(name, codec=LIVE[name], sound=sound, pipe=name != "live.mkv")
    check_that_all_frames_are_shown(path)
    assert open_video(path)[:2] == (20, 10.0)


@pytest.mark.parametrize("delay", ["0.04", "0.5", "0.54"])
def test_frames_are_numbered_from_the_first_where_sound_begins_earlier(film, delay, tmp_path):
    late, sound = str(tmp_path / "late.mkv"), ["-f", "lavfi", "-i", "sine=duration=3"]
    ffmpeg(*sound, "-itsoffset", delay, "-i", film("whole.mkv"), *LOSSLESS, late)
    check_that_all_frames_are_shown(late)
    assert levels(open_video(late), range(20)) == list(range(0, 200, 10))


@pytest.mark.parametrize("sound", [0, 3])
def test_a_film_that_is_cut_in_its_first_half_is_named_and_weighs_nothing(film, sound):
    noise = ("-vf", "noise=alls=60:allf=t", *LOSSLESS)
    path = film("cut.mkv", "64x48", noise, sound=sound)
    content = Path(path).read_bytes()
    for share, good in ((0.3, 0), (0.8, 1)):
        Path(path).write_bytes(content[: int(share * len(content))])
        video_module.probe.cache_clear()
        source = VideoFolder(os.path.dirname(path))
        batch = clip_batches(source, (8, 8), 3, 1, clips=Clips(2, span=1))[0]
        assert batch["weight"].tolist() == [good] and len(batch["bad"]) == 1 - good
        assert good or f"{path}: ValueError: it is cut" in batch["bad"][0]


def test_ffmpeg_scales_turns_and_repeats(film):
    path = film("big.mkv", "90x60")
    sizes = [open_video(path, side).read([4])[0].size for side in (None, 30, 200)]
    assert sizes == [(90, 60), (45, 30), (90, 60)]
    assert open_video(film("high.mkv", "60x90"), 30).read([4])[0].size == (30, 45)
    # The header may promise more than there is.
    video = Video(26, 10.0, partial(decode, path, 10.0, None))
    assert levels(video, [18, 19, 25]) == [180, 190, 190]
    for wanted, some in (([40, 41], "0 of 2 frames from 40"), ([19, 25, 26], "1 of 3 frames")):
        with pytest.raises(ValueError, match=f"ffmpeg finds {some}"):
            video.read(wanted)


def test_a_damaged_film_is_named_and_weighs_nothing(film, tmp_path):
    good = film("good.mkv")
    folder = tmp_path / "films"
    content = (folder / "good.mkv").read_bytes()
    (folder / "cut.mkv").write_bytes(content[:300])
    (folder / "text.mp4").write_text("no film")
    (folder / "empty.webm").touch()
    # Nor are other files opened that one names.
    (folder / "list.mkv").write_text("ffconcat version 1.0\nfile good.mkv\nduration 2\n")
    (folder / "more.mkv").touch()
    source = VideoFolder(str(folder))
    batch = clip_batches(source, (8, 8), 3, 6, clips=Clips(2, span=1))[0]
    readable = [source.name(int(n)) for n in batch["samples"][batch["weight"] > 0]]
    assert readable == [good] and len(batch["bad"]) == 5
    assert any("list.mkv: ValueError: ffmpeg finds no video" in line for line in batch["bad"])
    assert all(not images.any() for images in batch["images"][batch["weight"] == 0])
    assert any("text.mp4: ValueError: ffmpeg finds no video" in line for line in batch["bad"])


# --------------------------------------------------------------------------------------- toy motion


def test_no_frame_of_the_toy_tells_its_motion():
    """At any frame, place and size have the same distribution, whatever the class is: uniform."""
    found = [toy_motion(number, 18) for number in range(6000)]
    facts = np.array([(k, *centre, math.log(r / 0.12, 2.5)) for k, centre, r in found])
    for label in range(10):
        some = facts[facts[:, 0] == label, 1:]
        assert len(some) == pytest.approx(600, abs=94)  # four deviations
        for values in some.T:
            gaps = np.sort(values) - (np.arange(len(some)) + 0.5) / len(some)
            assert abs(gaps).max() < 2.0 / math.sqrt(len(some))  # Kolmogorov-Smirnov, p = 0.0007


def test_the_motion_is_what_the_class_says():
    for number in range(40):
        label, (x, y), radius = toy_motion(number, 5)
        _, (x2, y2), radius2 = toy_motion(number, 6)
        step = np.array([(x2 - x + 0.5) % 1 - 0.5, (y2 - y + 0.5) % 1 - 0.5])
        name = TOY_MOTIONS[label]
        if name in ("growing", "shrinking"):
            assert np.allclose(step, 0) and radius != radius2
            rises = radius2 > radius
            assert rises == (name == "growing") or max(radius, radius2) / min(radius, radius2) > 2
        else:
            assert radius == pytest.approx(radius2)
            words = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
            wanted = sum(np.array(words[word]) for word in name.split("-"))
            assert np.allclose(step, 0.025 * wanted / np.linalg.norm(wanted))


# -------------------------------------------------------------------------------------------- runs

TINY = [
    *("--task", "video", "--size", "16x2x2", "--image-size", "16", "--patch-size", "8"),
    *("--frames", "4", "--stride", "2", "--batch-size", "8", "--workers", "1", "--log-every", "1"),
    *("--steps", "4", "--save-every", "2", "--lr", "1e-2", "--drop-path", "0.3", "--erase", "0.9"),
    *("--layer-decay", "0.9", "--seed", "1"),
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two classes of videos of several lengths and sizes: folders of frames; one has one frame."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(16):
        folder = root / ("train" if i < 12 else "val") / "ab"[i % 2] / f"clip{i}"
        folder.mkdir(parents=True)
        for frame in range(1 if i == 3 else 3 + i):
            picture(100 * i + frame, 20 + 4 * (i % 3), 36).save(folder / f"{frame:05}.jpg")
    return root


def test_processes_and_micro_batches_change_nothing(videos, tmp_path):
    def trained(name, *flags, processes=None):
        flags = *TINY, "--data", videos, "--out", tmp_path / name, *flags
        done = stage(*flags, processes=processes, program="finetune.py")
        assert "top1" in last_json(done)
        assert "attention PyTorch (relative positions are a bias" in done.stdout
        return read_metrics(tmp_path / name), models.read_weights(tmp_path / name / "model.pt")[0]

    metrics, weights = trained("plain")
    # 12 shards, so 12 lanes: they can be dealt to two processes.
    sharded = trained("sharded", "--micro-batch", 4, "--shard-group", 2, processes=2)
    for other_metrics, other_weights in (trained("pieces", "--micro-batch", 2), sharded):
        for a, b in zip(metrics, other_metrics, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
            assert a.get("top1") == b.get("top1") and b["bad"] == 0
        for key in weights:
            torch.testing.assert_close(weights[key], other_weights[key], atol=1e-4, rtol=1e-3)


def test_evaluation_is_the_mean_over_all_views_in_any_batch(videos, tmp_path):
    shape = {"size": "16x2x2", "image_size": 16, "patch_size": 8}
    model = VideoClassifier(classes=2, class_names=["a", "b"], frames=4, **shape)
    model = randomize(model).float()
    models.save_weights(tmp_path / "model.pt", model.state_dict(), model.config)
    views = "--clips", 2, "--crops", 3, "--stride", 2
    found, _ = evaluated("video", tmp_path / "model.pt", videos, *views)
    batches = evaluated("video", tmp_path / "model.pt", videos, *views, "--batch-size", 7)
    assert found == batches[0] and found["videos"] == 4
    # By hand: view after view, each with the plain classifier.
    source = data.open_sources(str(videos), videos=True)[1]
    clips = Clips(4, stride=2, clips=2, crops=3)
    batch = clip_batches(source, (16, 16), 3, 4, clips=clips)[0]
    images = data.normalize(batch["images"])
    with torch.no_grad():
        by_view = [model(view).softmax(dim=1) for view in images.unflatten(2, (6, 4)).unbind(dim=2)]
        mean = torch.stack(by_view).mean(dim=0)
        torch.testing.assert_close(over_views(model)(images), mean.log())
    assert found["top1"] == (mean.argmax(dim=1) == batch["labels"]).float().mean().item()
