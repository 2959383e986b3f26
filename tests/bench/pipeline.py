"""Pictures per CPU second of one core: bytes in memory -> crop, resize, flip -> batch -> normalize.

    python tests/bench/pipeline.py --data FOLDER

Ours is data.Batches and data.normalize, as in training, on one thread. If torchvision
can be imported, its RandomResizedCrop (bicubic), flip, ToTensor, Normalize and stacking
run in turn with it on the same pictures, as the public MAE code uses them. "decode"
only opens and decodes.
"""

import io
import itertools
import statistics
import time
from functools import partial
from pathlib import Path

import common
import numpy as np
import torch
from PIL import Image

from data import Batches, Folder, Order, Source, make_picture, normalize

BATCH = 32


class Memory(Source):
    """A source of encoded pictures."""

    def __init__(self, contents):
        self.contents, self.sizes = contents, np.ones(len(contents), dtype=np.int64)

    def read(self, number):
        return {"image": lambda: Image.open(io.BytesIO(self.contents[number])), "class": -1}

    def name(self, number):
        return str(number)


def import_transforms():
    """torchvision.transforms, or None. Without its operators, two of them are declared first."""
    try:
        from torchvision import transforms
    except ImportError:
        return None
    except RuntimeError:
        import_transforms.library = library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor d, Tensor s, float t) -> Tensor")
        library.define("qnms(Tensor d, Tensor s, float t) -> Tensor")
        from torchvision import transforms
    return transforms


def open_rgb(content):
    return Image.open(io.BytesIO(content)).convert("RGB")


def torchvision_pipeline(transforms, contents, side):
    bicubic = transforms.InterpolationMode.BICUBIC
    crop = transforms.RandomResizedCrop(side, scale=(0.2, 1.0), interpolation=bicubic)
    norm = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    steps = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), norm]
    transform = transforms.Compose(steps)

    def run():
        for begin in range(0, len(contents), BATCH):
            batch = contents[begin : begin + BATCH]
            torch.stack([transform(open_rgb(content)) for content in batch])

    return run


def main():
    parser = common.make_parser(__doc__)
    parser.add_argument("--data", required=True, help="a folder of photos")
    parser.add_argument("--pictures", type=int, default=256, help="how many of them")
    parser.add_argument("--image-size", type=int, default=224, help="side of the crops")
    parser.add_argument("--repeats", type=int, default=9, help="the median counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder, side = Folder(options.data), options.image_size
    count = min(options.pictures, len(folder.sizes)) // BATCH * BATCH  # whole batches
    contents = [Path(folder.name(i)).read_bytes() for i in range(count)]
    source = Memory(contents)
    make = lambda *given: {"images": make_picture(*given, (side, side), 3, min_crop=0.2)}
    batches = Batches(source, make, BATCH, order=Order(source.sizes))
    numbers = itertools.count()

    def ours(normalize):
        for _ in range(len(batches)):
            batch = batches[next(numbers)]
            if batch["weight"].sum() != BATCH:  # or what is timed is not the whole work
                raise SystemExit(f"a batch is not whole; unreadable: {batch['bad']}")
            normalize(batch["images"])

    def decode():
        for content in contents:
            open_rgb(content)

    pipelines = {"ours": lambda: ours(normalize), "ours, uint8": lambda: ours(lambda x: x)}
    transforms = import_transforms()
    if transforms:
        pipelines["torchvision"] = torchvision_pipeline(transforms, contents, side)
    pipelines["decode"] = decode
    cpu_seconds = partial(common.timed, clock=time.process_time)
    runs = {name: partial(cpu_seconds, pipeline) for name, pipeline in pipelines.items()}
    times = common.take_turns(runs, options.repeats)

    sizes = np.array([Image.open(io.BytesIO(content)).size for content in contents])
    width, height = np.median(sizes, axis=0)
    print(f"{len(contents)} pictures, median {width:.0f}x{height:.0f}, to {side}x{side}")
    print(f"{'pipeline':14}{'pictures/s':>12}{'ms each':>10}{'ours is':>10}")
    reference = statistics.median(times["ours"])
    for name, spent in times.items():
        median = statistics.median(spent)
        rate, each = len(contents) / median, 1000 * median / len(contents)
        print(f"{name:14}{rate:12.0f}{each:10.3f}{median / reference:9.2f}x")


if __name__ == "__main__":
    main()
