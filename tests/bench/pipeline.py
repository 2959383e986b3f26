"""Pictures per CPU second of one core: bytes in memory -> crop, resize, flip -> batch -> normalize.

    python tests/bench/pipeline.py --data FOLDER

Ours is data.Batches and data.normalize, as in training, on one thread. If torchvision can be
imported, its RandomResizedCrop (bicubic), flip, ToTensor, Normalize and stacking run in turn with
it on the same pictures, as the public MAE code uses them. "decode" only opens and decodes.
"""

import argparse
import io
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image

import data


class Memory(data.Source):
    """A source of encoded pictures."""

    def __init__(self, contents):
        self.contents, self.sizes = contents, np.ones(len(contents), dtype=np.int64)

    def read(self, number):
        return {"image": lambda: Image.open(io.BytesIO(self.contents[number])), "class": -1}

    def name(self, number):
        return str(number)


def import_transforms():
    """torchvision.transforms, or None. Beside a CPU torch, two operators must be made up first."""
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


def torchvision_pipeline(transforms, contents, side, batch):
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                side, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )

    def run(_):
        for begin in range(0, len(contents), batch):
            pictures = (Image.open(io.BytesIO(c)) for c in contents[begin : begin + batch])
            torch.stack([transform(picture.convert("RGB")) for picture in pictures])

    return run


def main():
    parser = argparse.ArgumentParser("pipeline.py", description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="a folder of photos")
    parser.add_argument("--pictures", type=int, default=256, help="how many of them (256)")
    parser.add_argument("--image-size", type=int, default=224, help="side (224)")
    parser.add_argument("--batch", type=int, default=32, help="(32)")
    parser.add_argument("--repeats", type=int, default=9, help="the median counts (9)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = data.Folder(options.data)
    names = [folder.name(i) for i in range(min(options.pictures, len(folder.sizes)))]
    contents = [Path(name).read_bytes() for name in names]
    contents = contents[: len(contents) // options.batch * options.batch]  # whole batches
    source, side = Memory(contents), options.image_size
    order = data.Order(source.sizes)
    make = lambda *given: {"images": data.make_picture(*given, (side, side), 3, min_crop=0.2)}
    batches = data.Batches(source, make, options.batch, order=order)

    def ours(epoch, normalize=data.normalize):
        for step in range(epoch * len(batches), (epoch + 1) * len(batches)):
            batch = batches[step]
            if batch["weight"].sum() != options.batch:  # or what is timed is not the whole work
                raise SystemExit(f"a batch is not whole; unreadable: {batch['bad']}")
            normalize(batch["images"])

    def decode(_):
        for content in contents:
            Image.open(io.BytesIO(content)).convert("RGB")

    pipelines = {"ours": ours, "ours, uint8": lambda epoch: ours(epoch, lambda images: images)}
    transforms = import_transforms()
    if transforms:
        arguments = (transforms, contents, side, options.batch)
        pipelines["torchvision"] = torchvision_pipeline(*arguments)
    pipelines["decode"] = decode
    times = {name: [] for name in pipelines}
    for epoch in range(options.repeats + 1):  # the first warms up
        for name, pipeline in pipelines.items():
            began = time.process_time()
            pipeline(epoch)
            times[name] += [time.process_time() - began] if epoch else []

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
