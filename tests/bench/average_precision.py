"""Seconds for COCO's average precision, here and with pycocotools, on the same random scenes.

    python tests/bench/average_precision.py --images 5000 --detections 100

Scenes of 640 x 480 with some 7 objects of 80 classes each, masks of ellipses;
detections are shifted objects, half of them of another class, with some random ones.
Seconds are CPU time of one thread.
"""

import contextlib
import json
import os
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import common
import numpy as np

from tasks.coco import average_precision, polygon_to_rle
from tasks.scenes import Scenes, write_results

HEIGHT, WIDTH = 480, 640


def ellipse(box):
    """A polygon of 32 points in x1 y1 x2 y2."""
    t = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    circle = np.stack([np.cos(t), np.sin(t)], axis=1) / 2 + 0.5
    return circle * (box[2:] - box[:2]) + box[:2]


def random_boxes(random, count):
    sides = np.exp(random.uniform(np.log(12), np.log(300), (count, 2)))
    low = random.uniform(0, 1, (count, 2)) * ([WIDTH, HEIGHT] - sides)
    return np.concatenate([low, low + sides], axis=1)


def make(images, count, folder):
    """(Scenes, detections)"""
    random, annotations, detections = np.random.RandomState(0), [], {}
    for image in range(1, images + 1):
        boxes = random_boxes(random, 1 + random.poisson(6))
        labels = random.choice(random.randint(0, 80, 3), len(boxes))
        for box, label in zip(boxes, labels.tolist()):
            x, y, w, h = [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]
            one = {"id": 1 + len(annotations), "image_id": image, "category_id": label + 1}
            one |= {"bbox": [x, y, w, h], "area": w * h * np.pi / 4, "iscrowd": 0}
            annotations.append(one | {"segmentation": [ellipse(box).ravel().tolist()]})
        pick, other = random.randint(0, len(boxes), count), random.rand(count) < 0.5
        sides = np.tile(boxes[pick, 2:] - boxes[pick, :2], 2)
        found = boxes[pick] + random.normal(0, 0.08, (count, 4)) * sides
        found[: count // 4] = random_boxes(random, count // 4)
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 2)
        detections[image] = {
            "boxes": found,
            "scores": random.rand(count),
            "labels": np.where(other, random.randint(0, 80, count), labels[pick]),
            "masks": [polygon_to_rle(ellipse(box), HEIGHT, WIDTH) for box in found],
        }
    listed = {"height": HEIGHT, "width": WIDTH, "file_name": "x"}
    content = {"images": [{"id": image, **listed} for image in detections]}
    content["categories"] = [{"id": k, "name": str(k)} for k in range(1, 81)]
    path = Path(folder, "instances_val.json")
    path.write_text(json.dumps(content | {"annotations": annotations}))
    return Scenes(str(path), folder), detections


def reference(path, results, kind):
    """The 12 numbers of pycocotools, reading and accumulation included."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    for result in results:
        result.pop("bbox" if kind == "segm" else "segmentation", None)
    with contextlib.redirect_stdout(None):
        truth = COCO(path)
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def main():
    parser = common.make_parser(__doc__)
    parser.add_argument("--images", type=int, default=5000, help="scenes")
    parser.add_argument("--detections", type=int, default=100, help="of an image")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scenes, detections = make(options.images, options.detections, folder)
        write_results(f"{folder}/results.json", scenes, detections)
        print(f"{len(scenes.labels)} objects, {options.images} x {options.detections} found")
        print(f"{'':6}{'here':>10}{'pycocotools':>14}{'AP':>9}{'difference':>13}")
        for kind in ("bbox", "segm"):
            began = time.process_time()
            ours = [*average_precision(scenes, detections, kind).values()]
            seconds = time.process_time() - began
            results = json.loads(Path(folder, "results.json").read_text())
            began = time.process_time()
            theirs = reference(scenes.path, results, kind)
            others = time.process_time() - began
            gap = np.abs(np.array(ours) - theirs).max()
            print(f"{kind:6}{seconds:8.1f} s{others:12.1f} s{ours[0]:9.4f}{gap:13.1e}", flush=True)


if __name__ == "__main__":
    main()
