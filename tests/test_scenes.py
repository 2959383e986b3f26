"""Scenes, run lengths and average precision: against pycocotools and lvis where they are installed,
against values worked out by hand, and against what must hold."""

import contextlib
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ODD_NAMES
from PIL import Image

import data
from support import toy as toy_module
from support.hashtags import WEIGHT, WeightedOrder
from tasks import coco as coco_module
from tasks import scenes as scenes_module


def blob(random, height, width, corners=7, reach=0.3):
    """A polygon as in COCO's files, partly outside now and then."""
    angles = np.sort(random.uniform(0, 2 * np.pi, corners))
    radius = random.uniform(0.3, 1, corners) * random.uniform(0.05, reach) * width
    centre = random.uniform(0, 1, 2) * [width, height]
    points = centre + np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius[:, None]
    return points.round(2).ravel().tolist()


def annotation(number, image, category, polygons, crowd=0):
    height, width = image["height"], image["width"]
    rle = coco_module.as_rle(polygons, height, width)
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in polygons])
    low, high = points.min(axis=0), points.max(axis=0)
    segment = {**rle, "counts": rle["counts"].tolist()} if crowd else polygons
    return {
        "id": number, "image_id": image["id"], "category_id": category, "iscrowd": crowd,
        "bbox": [*low.tolist(), *(high - low).tolist()], "area": coco_module.rle_area(rle),
        "segmentation": segment,
    }  # fmt: skip


def make_scenes(folder, pictures=24, seed=0, lvis=False, categories=(2, 3, 7, 11, 90), **options):
    """Write a COCO folder (categories with gaps, crowds, empty pictures) and open it."""
    random, number = np.random.RandomState(seed), 0
    content = {"images": [], "annotations": [], "categories": []}
    for place, category in enumerate(categories):
        entry = {"id": category, "name": f"thing {category}"}
        content["categories"].append(entry | ({"frequency": "rcf"[place % 3]} if lvis else {}))
    for image in random.permutation(pictures).tolist():
        # from small to large, so that all ranges of areas have objects
        height, width = (int(side) for side in random.randint(30, 400, 2))
        image = {"id": 5 + 3 * image, "height": height, "width": width}
        image |= {"file_name": f"{image['id']}.jpg"}
        present = random.choice(categories, random.randint(1, 4)).tolist()
        for _ in range(random.choice([0, 1, 4, 9])):
            number += 1
            polygons = [blob(random, height, width) for _ in range(random.choice([1, 1, 2]))]
            crowd = int(not lvis and random.rand() < 0.15)
            category = random.choice(present).item()
            content["annotations"].append(annotation(number, image, category, polygons, crowd))
        if lvis:
            there = {
                a["category_id"] for a in content["annotations"] if a["image_id"] == image["id"]
            }
            absent = [category for category in categories if category not in there]
            image["neg_category_ids"] = absent[: random.randint(0, 3)]
            image["not_exhaustive_category_ids"] = [c for c in sorted(there) if random.rand() < 0.4]
        content["images"].append(image)
    path = folder / "annotations" / ("lvis_v1_val.json" if lvis else "instances_val.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return scenes_module.Scenes(str(path), str(folder), **options)


def make_detections(scenes, seed=0, least=0, most=12, jitter=0.15, levels=20):
    """Shifted objects and random ones, some with other classes; few scores, so that many tie."""
    random, detections = np.random.RandomState(seed), {}
    for number in range(len(scenes.sizes)):
        sample = scenes.read(number)
        height, width = sample["size"]
        if random.rand() < 0.1:
            continue  # no entry for this picture
        boxes, labels, masks = [], [], []
        for i in range(random.randint(least, most)):
            label = random.randint(len(scenes.classes))
            rle = coco_module.as_rle([blob(random, height, width)], height, width)
            if len(sample["boxes"]) and random.rand() < 0.8:
                i = random.randint(len(sample["boxes"]))
                label = sample["labels"][i] if random.rand() < 0.9 else label
                mask = coco_module.decode_mask(
                    coco_module.as_rle(sample["segments"][i], height, width)
                )
                shift = random.randint(-3, 4, 2) if random.rand() < 0.7 else (0, 0)
                rle = coco_module.encode_mask(np.roll(mask, shift, axis=(0, 1)))
                box = sample["boxes"][i]
                box = (
                    box
                    + random.normal(0, jitter, 4) * np.tile(box[2:] - box[:2], 2) * random.rand()
                )
            else:
                box = np.array(coco_module.rle_box(rle))
            low, high = np.minimum(box[:2], box[2:]), np.maximum(box[:2], box[2:])
            boxes.append([*low, *high])
            labels.append(label)
            masks.append(rle)
        detections[sample["image_id"]] = {
            "boxes": np.array(boxes, dtype=np.float64).reshape(-1, 4),
            "scores": random.randint(1, levels + 1, len(boxes)) / levels,
            "labels": np.array(labels, dtype=np.int64),
            "masks": masks,
        }
    return detections


def reference(scenes, detections, kind, folder):
    """The same numbers from pycocotools or lvis, through the results file."""
    scenes_module.write_results(folder / "results.json", scenes, detections)
    results = json.loads((folder / "results.json").read_text())
    for result in results:  # with a box, the references take the box's area for masks
        result.pop("bbox" if kind == "segm" else "segmentation", None)
    if scenes.frequencies is None:
        coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
        from pycocotools.cocoeval import COCOeval

        with contextlib.redirect_stdout(None):
            truth = coco.COCO(scenes.path)
            evaluation = COCOeval(truth, truth.loadRes(results), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation.stats.tolist()
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    for name in (
        "cv2",
        "matplotlib",
        "matplotlib.pyplot",
        "matplotlib.patches",
        "matplotlib.lines",
    ):
        sys.modules.setdefault(name, types.ModuleType(name))  # only lvis's drawings need them
    for name, what in (("patches", "Polygon"), ("lines", "Line2D")):
        vars(sys.modules[f"matplotlib.{name}"]).setdefault(what, None)
    np.float = float  # lvis 0.5.3 is older than numpy 1.24, which took this name away
    lvis = pytest.importorskip("lvis", reason="lvis is not installed")
    evaluation = lvis.LVISEval(scenes.path, results, kind)
    evaluation.run()
    return list(evaluation.get_results().values())


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("lvis", [False, True])
def test_average_precision_equals_the_references(tmp_path, kind, lvis):
    for seed in range(2):
        scenes = make_scenes(tmp_path / str(seed), seed=seed, lvis=lvis)
        detections = make_detections(scenes, seed, jitter=0.05 * 4**seed)
        ours = coco_module.average_precision(scenes, detections, kind)
        assert len(ours) == (13 if lvis else 12)
        assert list(ours.values()) == pytest.approx(
            reference(scenes, detections, kind, tmp_path), abs=1e-6
        )
        assert 0 < ours["AP"] < 1 and len(set(ours.values())) > 8


def test_more_detections_than_count(tmp_path):
    """100 of a picture and class (COCO), 300 of a picture (LVIS): the best ones, ties in order."""
    for lvis in (False, True):
        scenes = make_scenes(tmp_path / str(lvis), 3, lvis=lvis, categories=(4, 9))
        detections = make_detections(scenes, least=400, most=401, levels=3, jitter=0.5)
        assert max(len(found["scores"]) for found in detections.values()) == 400
        ours = coco_module.average_precision(scenes, detections)
        assert list(ours.values()) == pytest.approx(
            reference(scenes, detections, "bbox", tmp_path), abs=1e-6
        )


def one_scene(folder, boxes, crowd=None, area=None):
    """A picture of 100 x 100 with objects of one class (x y width height)."""
    folder.mkdir(exist_ok=True)
    content = {"images": [{"id": 1, "height": 100, "width": 100, "file_name": "1.png"}]}
    content["categories"] = [{"id": 1, "name": "thing"}]
    content["annotations"] = [
        {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3]}
        | {"iscrowd": int(i == crowd)}
        for i, box in enumerate(boxes)
    ]
    Image.new("RGB", (100, 100)).save(folder / "1.png")
    (folder / "scenes.json").write_text(json.dumps(content))
    return scenes_module.Scenes(str(folder / "scenes.json"))


def found(boxes, scores):
    boxes = np.array(boxes, dtype=np.float64)
    boxes[:, 2:] += boxes[:, :2]
    return {1: {"boxes": boxes, "scores": np.array(scores), "labels": np.zeros(len(scores), int)}}


def test_average_precision_by_hand(tmp_path):
    """Found, wrong, found: the precision is 1 at recalls up to 1/2, and then 2/3."""
    here, there, nowhere = [10, 10, 20, 20], [60, 60, 20, 20], [10, 60, 20, 20]
    scenes = one_scene(tmp_path, [here, there])
    result = coco_module.average_precision(scenes, found([here, nowhere, there], [0.9, 0.8, 0.7]))
    assert result["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert (result["AR1"], result["AR10"], result["APs"]) == (0.5, 1, result["AP"])
    assert result["APm"] == result["ARl"] == -1  # there are no such objects
    # An IoU of 16 / 24: counted for the four thresholds up to 0.65 of ten.
    shifted = [here, [64, 60, 20, 20]]
    result = coco_module.average_precision(scenes, found(shifted, [0.5, 0.4]))
    assert result["AP"] == pytest.approx((4 + 6 * 51 / 101) / 10)
    # Between two, as near to each: it takes the last one, and the next can have the first one.
    two = one_scene(tmp_path / "two", [here, [14, 10, 20, 20]])
    result = coco_module.average_precision(two, found([[12, 10, 20, 20], here], [0.5, 0.4]))
    assert result["AP"] == pytest.approx((7 + 3 * 51 / 101 / 2) / 10)  # 18 / 22 is above 0.8
    # A crowd is not looked for, and what lies in it is neither right nor wrong, as often as it is.
    crowded = one_scene(tmp_path / "crowded", [here, [50, 50, 50, 50]], crowd=1)
    several = found([there, [52, 52, 5, 5], here, nowhere], [0.9, 0.8, 0.7, 0.6])
    assert coco_module.average_precision(crowded, several)["AP"] == pytest.approx(1)
    assert coco_module.average_precision(crowded, {})["AP"] == 0
    with pytest.raises(ValueError, match="no masks"):
        coco_module.average_precision(crowded, several, "segm")


@pytest.mark.parametrize("nothing", [None, [], [[]], [[60, 60, 80, 80]], "missing"])
def test_objects_without_a_mask_are_left_out_of_mask_ap(tmp_path, capsys, nothing):
    """By hand: one of two has a mask, and it alone is to be found; what lies over the box of the
    other is neither right nor wrong, but once only, as with other objects that are ignored."""
    here, there, nowhere = [10, 10, 20, 20], [60, 60, 20, 20], [10, 60, 20, 20]
    one_scene(tmp_path, [here, there])
    path = tmp_path / "scenes.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segmentation"] = [[10, 10, 30, 10, 30, 30, 10, 30]]
    content["annotations"][1] |= {} if nothing == "missing" else {"segmentation": nothing}
    path.write_text(json.dumps(content))
    capsys.readouterr()
    scenes = scenes_module.Scenes(str(path))
    said = f"{path}: objects without a mask, left out of mask AP: 1\n"
    assert capsys.readouterr().err == said

    def measured(*boxes, kind="segm"):
        of = found(boxes, np.linspace(0.9, 0.5, len(boxes)))
        masks = [np.zeros((100, 100), dtype=bool) for _ in boxes]
        for mask, (x, y, w, h) in zip(masks, boxes):
            mask[y : y + h, x : x + w] = True
        of[1]["masks"] = masks
        return coco_module.average_precision(scenes, of, kind)

    perfect = measured(here, there)
    assert perfect["AP"] == pytest.approx(1) and perfect["AR100"] == 1
    assert measured(here)["AP"] == measured(there, here)["AP"] == pytest.approx(1)
    assert measured(there)["AP"] == 0
    for wrong in ([nowhere, here], [there, there, here]):
        assert measured(*wrong)["AP"] == pytest.approx(1 / 2)
    # Boxes count as ever: one of two is found.
    assert measured(here, kind="bbox")["AP"] == pytest.approx(51 / 101)
    # To learn from, there is one object, not one with an empty mask.
    train = scenes_module.Scenes(str(path), train=True)
    assert "annotations without a mask, left out: 1 (the first has id 2)" in capsys.readouterr().err
    assert train.read(0)["boxes"].tolist() == [[10, 10, 30, 30]]
    target = batches(train)[0]["targets"][0]
    assert len(target["boxes"]) == len(target["masks"]) == 1 and target["masks"].any()


def test_mask_ap_is_as_if_objects_without_a_mask_were_not_there(tmp_path):
    scenes = make_scenes(tmp_path)
    content, opened = json.loads(Path(scenes.path).read_text()), []
    for one in content["annotations"][::3]:
        one |= {"segmentation": [], "bbox": [-9, -9, 5, 5]}  # where nothing is detected
    gone = [one for one in content["annotations"] if one["segmentation"]]
    for name, some in (("bare", content["annotations"]), ("gone", gone)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content | {"annotations": some}))
        opened.append(scenes_module.Scenes(str(tmp_path / f"{name}.json"), str(tmp_path)))
    detections = make_detections(scenes)
    bare, gone = (coco_module.average_precision(one, detections, "segm") for one in opened)
    assert bare == pytest.approx(gone, abs=1e-12) and bare["AP"] > 0.1


def outlines(random, count):
    """Polygons of all kinds, partly or wholly outside: (n, 2) points, height, width."""
    for number in range(count):
        height, width = random.randint(1, 40, 2).tolist()
        points = random.uniform(-0.4, 1.4, (random.randint(3, 12), 2)) * [width, height]
        yield (
            (
                points,
                np.rint(points),
                np.rint(2 * points) / 2,
                np.repeat(points[:2], 3, axis=0),  # a line, there and back
                points * 0 + points[0],  # a point
                points - [width, 0],
            )[number % 6],
            height,
            width,
        )


def test_run_lengths_equal_pycocotools():
    mask = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    random = np.random.RandomState(0)
    for points, height, width in outlines(random, 120):
        ours, (theirs,) = (
            coco_module.polygon_to_rle(points, height, width),
            mask.frPyObjects([points.ravel().tolist()], height, width),
        )
        assert coco_module.text_of_counts(ours["counts"]).encode() == theirs["counts"]
        assert (coco_module.counts_of_text(theirs["counts"]) == ours["counts"]).all()
        several = [points.ravel().tolist(), blob(random, height, width), [1, 1, 5, 9, 0, 0]]
        ours = coco_module.as_rle(several, height, width)
        theirs = mask.merge(mask.frPyObjects(several, height, width))
        assert coco_module.text_of_counts(ours["counts"]).encode() == theirs["counts"]
        pixels = random.rand(5, height, width) < random.rand()
        ours = [coco_module.encode_mask(one) for one in pixels]
        theirs = [mask.encode(np.asfortranarray(one, np.uint8)) for one in pixels]
        x, y, right, bottom = np.array([coco_module.rle_box(rle) for rle in ours]).T
        assert [coco_module.text_of_counts(r["counts"]).encode() for r in ours] == [
            r["counts"] for r in theirs
        ]
        assert [coco_module.rle_area(rle) for rle in ours] == mask.area(theirs).tolist()
        assert (np.stack([x, y, right - x, bottom - y], axis=1) == mask.toBbox(theirs)).all()
        crowd = random.rand(2) < 0.5
        iou = coco_module.mask_iou(ours[:3], ours[3:], crowd, np.ones((3, 2), dtype=bool))
        assert (iou == mask.iou(theirs[:3], theirs[3:], crowd.astype(int).tolist())).all()


def test_run_lengths():
    random = np.random.RandomState(0)
    for height, width in ((1, 1), (1, 7), (7, 1), (5, 9), (40, 30)):
        for share in (0, 0.1, 0.7, 1):
            masks = random.rand(3, height, width) < share
            rles = [coco_module.encode_mask(mask) for mask in masks]
            union = coco_module.merge_rles(rles, height, width)
            assert (coco_module.decode_mask(union) == masks.any(axis=0)).all()
            for mask, rle in zip(masks, rles):
                assert (coco_module.decode_mask(rle) == mask).all()
                assert coco_module.rle_area(rle) == mask.sum()
                assert coco_module.rle_box(rle) == scenes_module.tight_box(mask)
                text = coco_module.text_of_counts(rle["counts"])
                assert (coco_module.counts_of_text(text) == rle["counts"]).all()
    # Down the columns; 2 x 3 pixels at (1, 2) of 6 x 5.
    square = coco_module.as_rle([[1, 2, 4, 2, 4, 4, 1, 4]], 6, 5)
    assert square["counts"].tolist() == [8, 2, 4, 2, 4, 2, 8]
    # From the fourth on the difference from the one before the last: 8 2 4, 2 - 2, 4 - 4, ...
    assert coco_module.text_of_counts(square["counts"]) == "8240004"
    with pytest.raises(ValueError, match="run lengths of another picture"):
        coco_module.as_rle({"size": [6, 5], "counts": [8, 2]}, 6, 5)
    for counts in ("", "P", "!", None, 5, [2**70]):
        with pytest.raises(ValueError, match="run lengths of another picture than one of 5 x 6$"):
            coco_module.as_rle({"size": [6, 5], "counts": counts}, 6, 5)


def pictures_for(scenes, folder):
    for name, (height, width) in zip(scenes.files, scenes.sides):
        random = np.random.RandomState(height)
        small = random.randint(0, 256, (height // 8 + 1, width // 8 + 1, 3)).astype(np.uint8)
        Image.fromarray(small).resize((width, height)).save(folder / name)


def batches(scenes, side=64, channels=3, batch_size=8, jitter=(0.1, 2.0), **options):
    config = {"image_size": (side, side), "channels": channels}
    jitter = jitter if options.get("order") else None
    make = scenes_module.scene_maker(scenes, config, jitter)
    return data.Batches(scenes, make, batch_size, **options)


def test_bad_annotations_are_counted_and_left_out(tmp_path, capsys):
    make_scenes(tmp_path)
    path = tmp_path / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["images"].append({"id": 999, "height": 50, "width": 60, "file_name": "999.jpg"})
    good = {"image_id": 999, "category_id": 90, "bbox": [1, 2, 30, 20], "area": 600}
    good |= {"segmentation": [[1, 2, 31, 2, 31, 22, 1, 22]]}
    outside = {"bbox": [70, 70, 20, 20], "segmentation": [[70, 70, 90, 70, 90, 90]]}
    bad = [
        {"image_id": 12345, "id": 501},
        {"category_id": 5, "id": 502},  # ids have gaps: 5 is in one
        {"bbox": [3, 3, 0, 9], "id": 503},
        {"segmentation": None, "id": 504},
    ]
    content["annotations"] += [good | one for one in (*bad, {"id": 505}, {"id": 506} | outside)]
    path.write_text(json.dumps(content))
    scenes = scenes_module.Scenes(str(path), str(tmp_path))
    printed = capsys.readouterr().err
    assert "image that is not listed, left out: 1 (the first has id 501)" in printed
    assert "category that is not listed, left out: 1 (the first has id 502)" in printed
    # To measure on, all pictures stay, and boxes of no area, as the reference has it.
    assert len(scenes.sizes) == 25 and len(scenes.read(24)["boxes"]) == 4
    assert scenes.ids == sorted(scenes.ids) and scenes.read(24)["image_id"] == 999
    assert (
        scenes.category_ids == [2, 3, 7, 11, 90] and scenes.read(24)["labels"].tolist() == [4] * 4
    )
    train = scenes_module.Scenes(str(path), str(tmp_path), train=True)
    printed = capsys.readouterr().err
    assert "box of no area, left out: 1 (the first has id 503)" in printed
    assert "without a mask, left out: 1 (the first has id 504)" in printed
    empty = [i for i in range(25) if scenes.read(i)["crowd"].all()]
    assert 0 < len(empty) == 25 - len(train.sizes)
    # The polygon outside the picture gives no object.
    pictures_for(train, tmp_path)
    last = batches(train)[(len(train.sizes) - 1) // 8]["targets"][(len(train.sizes) - 1) % 8]
    assert len(train.read(len(train.sizes) - 1)["boxes"]) == 2 and len(last["boxes"]) == 1
    for text in ("{", "[]", '{"images": [], "annotations": []}', '{"images": [{}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="cannot read annotations from") as error:
            scenes_module.Scenes(str(path), str(tmp_path))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cannot read annotations from"):
        scenes_module.Scenes(str(tmp_path / "none.json"))


def test_boxes_and_areas_that_are_not_given_are_the_masks(tmp_path, capsys):
    """By hand: 4 x 3 pixels from (2, 1) on, and a triangle."""
    corner = {"size": [9, 12], "counts": [2 * 9 + 1, *[3, 6] * 3, 3, 9 * 6 + 5]}
    square = [[2, 1, 6, 1, 6, 4, 2, 4]]
    mask = coco_module.encode_mask(np.pad(np.tri(5, dtype=bool), ((3, 1), (4, 3))))  # 15 of 5 x 5
    tri = mask | {"counts": coco_module.text_of_counts(mask["counts"])}
    images = [{"id": 1, "height": 9, "width": 12, "file_name": "1.jpg"}]
    Image.new("RGB", (12, 9)).save(tmp_path / "1.jpg")
    cases = [  # segmentation, what else is given: box x1 y1 x2 y2, area
        (square, {}, [2, 1, 6, 4], 12),
        (corner, {"bbox": []}, [2, 1, 6, 4], 12),
        (tri, {"bbox": None, "area": None}, [4, 3, 9, 8], 15),
        (tri, {"bbox": [4, 3, 4, 4], "area": None}, [4, 3, 8, 7], 15),
        (square, {"bbox": [2, 1, 5, 4]}, [2, 1, 7, 5], 12),
        (square, {"area": 7.5}, [2, 1, 6, 4], 7.5),
        (square, {"area": 0}, [2, 1, 6, 4], 0),
        (None, {"bbox": [2, 1, 5, 4], "area": None}, [2, 1, 7, 5], 20),
        ([], {"bbox": [2, 1, 5, 4]}, [2, 1, 7, 5], 20),
    ]
    common = {"image_id": 1, "category_id": 3, "iscrowd": 0}
    content = {"images": images, "categories": [{"id": 3, "name": "thing"}], "annotations": []}
    for number, (segment, given, *_) in enumerate(cases):
        one = common | {"id": number, "segmentation": segment} | given
        content["annotations"].append(one)
    content["annotations"] += [common | {"id": 77, "bbox": []}, common | {"id": 78, "area": 9}]
    (tmp_path / "x.json").write_text(json.dumps(content))
    scenes = scenes_module.Scenes(str(tmp_path / "x.json"))
    sample = scenes.read(0)
    assert sample["boxes"].tolist() == [box for *_, box, _ in cases]
    assert sample["areas"].tolist() == [area for *_, area in cases]
    assert "damaged, left out: 2 (the first has id 77)" in capsys.readouterr().err
    train = scenes_module.Scenes(str(tmp_path / "x.json"), train=True).read(0)
    assert train["boxes"].tolist() == [box for segment, _, box, _ in cases if segment]
    results = [one | {"score": 0.5} for one in content["annotations"][:-2]]
    (tmp_path / "results.json").write_text(json.dumps(results))
    found = scenes_module.read_results(str(tmp_path / "results.json"), scenes)[1]
    assert found["boxes"].tolist() == [box for *_, box, _ in cases]
    (tmp_path / "results.json").write_text(json.dumps([common | {"score": 0.5, "bbox": []}]))
    with pytest.raises(ValueError, match="neither a bbox nor a segmentation") as error:
        scenes_module.read_results(str(tmp_path / "results.json"), scenes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_masks_without_boxes_count_as_with_pycocotools_own(tmp_path, kind, empty):
    """Truth and results lack their boxes (or have empty ones), and truth its areas. The reference
    has no truth without: there, pycocotools' functions fill them in."""
    mask = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    scenes = make_scenes(tmp_path)
    detections = make_detections(scenes)
    content = json.loads(Path(scenes.path).read_text())
    sides = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    bare = content | {"annotations": []}
    for one in content["annotations"]:
        lacking = {name: value for name, value in one.items() if name not in ("bbox", "area")}
        bare["annotations"].append(lacking | ({"bbox": [], "area": None} if empty else {}))
        rle = mask.frPyObjects(one["segmentation"], *sides[one["image_id"]])
        rle = mask.merge(rle) if isinstance(rle, list) else rle
        one |= {"bbox": mask.toBbox(rle).tolist(), "area": int(mask.area(rle))}
    Path(scenes.path).write_text(json.dumps(content))
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    bare = scenes_module.Scenes(str(tmp_path / "bare.json"), str(tmp_path))
    scenes_module.write_results(tmp_path / "results.json", scenes, detections)
    results = json.loads((tmp_path / "results.json").read_text())
    for result in results:
        result.pop("bbox")
        result |= {"bbox": []} if empty else {}
    (tmp_path / "results.json").write_text(json.dumps(results))
    found = scenes_module.read_results(str(tmp_path / "results.json"), bare)
    for image, one in found.items():
        boxes = [mask.toBbox(r["segmentation"]) for r in results if r["image_id"] == image]
        detections[image]["boxes"] = np.array(boxes) + np.array(boxes)[:, [0, 1, 0, 1]] * [
            0,
            0,
            1,
            1,
        ]
        assert (one["boxes"] == detections[image]["boxes"]).all()
    expected = reference(scenes, detections, kind, tmp_path)
    measured = coco_module.average_precision(bare, found, kind)
    assert list(measured.values()) == pytest.approx(expected, abs=1e-9)
    assert measured["AP"] > 0.1


NO_SEGMENTS = [[[1, 2, float("nan"), 2, 9, 9]], [[1, 2, 1e9, 2, 9, 9]], [1, 2, 9, 2, 9, 9], "x", 5]
NO_SEGMENTS += [{"size": [50, 60]}, {"size": [60, 50], "counts": [9, 1, 2990]}]
NO_SEGMENTS += [{"size": [50, 60], "counts": c} for c in ("", "PP", None, [9, -1, 2992], [2**70])]


def test_damaged_annotations_are_counted_and_left_out(tmp_path, capsys):
    """What cannot be of a picture, which would else end the measurement, or a batch, or count."""
    make_scenes(tmp_path)
    path = tmp_path / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    count = len(scenes_module.Scenes(str(path), str(tmp_path)).labels)
    content["images"].append({"id": 999, "height": 50, "width": 60, "file_name": "999.jpg"})
    good = {"image_id": 999, "category_id": 90, "bbox": [1, 2, 30, 20], "area": 600, "id": 501}
    boxes = [1, 2, 3], None, ["1", "2", "3", "4"], [1, float("nan"), 3, 4], [1, 2, 1e300, 4]
    bad = [good | {"bbox": box} for box in boxes]
    bad += [good | {"area": "x"}, good | {"image_id": [1]}, {"bbox": [1, 2, 3, 4]}, "x", None]
    bad += [good | {"segmentation": segment} for segment in NO_SEGMENTS]
    bad += [good | {"segmentation": {"size": [60, 50], "counts": "0"}, "iscrowd": 1}]
    content["annotations"] += [*bad, good | {"segmentation": [[1, 2, 30, 2, 30, 20]]}]
    path.write_text(json.dumps(content))
    capsys.readouterr()
    scenes = scenes_module.Scenes(str(path), str(tmp_path))
    said = f"annotations that are damaged, left out: {len(bad)} (the first has id 501)"
    assert said in capsys.readouterr().err and len(scenes.labels) == count + 1
    assert coco_module.average_precision(scenes, {}, "segm")["AP"] == 0.0
    for key in ("images", "categories"):  # of two with an id, one would have the objects of both
        path.write_text(json.dumps(content | {key: content[key] + content[key][:1]}))
        with pytest.raises(ValueError, match="the same id"):
            scenes_module.Scenes(str(path), str(tmp_path))
    for side in (0, -1, 10**9):
        content["images"][0]["height"] = side
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="a height or width"):
            scenes_module.Scenes(str(path), str(tmp_path))
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="cannot read annotations from .*json.*Recursion"):
        scenes_module.Scenes(str(path), str(tmp_path))


def test_folders_of_coco_and_lvis(tmp_path):
    scenes = make_scenes(tmp_path, lvis=True)
    with pytest.raises(ValueError, match="the pictures of .* are not at"):
        scenes_module.Scenes(scenes.path)
    content = json.loads((tmp_path / "annotations" / "lvis_v1_val.json").read_text())
    for image in content["images"]:
        image["coco_url"] = f"http://somewhere/train2017/{image.pop('file_name')}"
    (tmp_path / "train2017").mkdir()
    for split in ("train", "val"):
        (tmp_path / "annotations" / f"lvis_v1_{split}.json").write_text(json.dumps(content))
    pictures_for(scenes, tmp_path / "train2017")
    train, val = scenes_module.open_scenes(str(tmp_path))
    assert len(val.sizes) == 24 > len(train.sizes) and val.root == str(tmp_path)
    assert train.read(0)["image"]().size == train.read(0)["size"][::-1]
    assert val.frequencies == ["r", "c", "f", "r", "c"] and {"negative"} < set(val.read(0))
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="there must be one .*, not 2"):
        scenes_module.open_scenes(str(tmp_path))
    content["categories"][0]["name"] = "another"
    (tmp_path / "other.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="other categories"):
        scenes_module.open_scenes(scenes.path, str(tmp_path / "other.json"))
    # The third layout: pictures in a folder named as the split.
    (tmp_path / "val").mkdir()
    mine = make_scenes(tmp_path)
    pictures_for(mine, tmp_path / "val")
    assert scenes_module.Scenes(mine.path).root == str(tmp_path / "val")
    toys = scenes_module.open_scenes("toy")
    assert [len(toy.sizes) for toy in toys] == [65536, 4096] and len(toys[0].classes) == 10


@pytest.mark.parametrize("name, match", ODD_NAMES.items())
def test_folders_whose_names_look_like_patterns(tmp_path, name, match):
    folder = tmp_path / name
    scenes = make_scenes(folder)
    shutil.copytree(folder, tmp_path / match)  # what the name would match as a pattern
    annotations = folder / "annotations"
    shutil.copy(annotations / "instances_val.json", annotations / "instances_train.json")
    pictures_for(scenes, folder)
    for where in (str(folder), str(annotations / "instances_val.json")):
        train, val = scenes_module.open_scenes(str(folder), where)
        assert train.root == val.root == str(folder) and len(val.sizes) == 24
        assert val.read(0)["image"]().size == val.sides[0][::-1]
    scenes_module.write_results(folder / f"{name}.json", val, make_detections(val))
    assert scenes_module.read_results(str(folder / f"{name}.json"), val)
    coco_module.draw_detections(folder / f"{name}.png", val, {}, range(2))
    with pytest.raises(ValueError, match="there must be one"):
        scenes_module.open_scenes(str(tmp_path / "none [v2]"))


def test_repeat_factors(tmp_path):
    """A category in one of 4 pictures, with a threshold of 1: its pictures come twice."""
    scenes = make_scenes(tmp_path, pictures=30, train=True)
    sampling = scenes_module.repeat_factors(scenes, threshold=0.9)
    labels = [set(scenes.read(i)["labels"].tolist()) for i in range(len(scenes.sizes))]
    share = [np.mean([k in there for there in labels]) for k in range(5)]
    wanted = [max(1, *(np.sqrt(0.9 / share[k]) for k in there)) for there in labels]
    assert sampling["totals"] / WEIGHT == pytest.approx(np.array(wanted), abs=1e-4)
    order = WeightedOrder(scenes.sizes, **sampling)
    drawn = np.bincount([order(p) for p in range(order.length)], minlength=len(wanted))
    assert order.length == int(sum(wanted)) and (np.abs(drawn - wanted) < 1).all()
    assert (scenes_module.repeat_factors(scenes)["totals"] == WEIGHT).all()  # 0.001: none is rare


def test_boxes_and_masks_move_with_the_picture():
    scenes = scenes_module.ToyScenes("train", 96, 400)
    order = data.Order(scenes.sizes)
    made = batches(scenes, 96, order=order, batch_size=32, jitter=(0.5, 2.0))
    seen, cut = 0, 0
    for step in range(2):
        batch = made[step]
        assert batch["images"].shape == (32, 3, 96, 96) and batch["images"].dtype == torch.uint8
        for image, target, number in zip(batch["images"], batch["targets"], batch["samples"]):
            masks, boxes = target["masks"].numpy(), target["boxes"].numpy()
            assert len(masks) == len(boxes) == len(target["labels"]) and masks.any((1, 2)).all()
            for mask, box in zip(masks, boxes):
                assert np.abs(box - scenes_module.tight_box(mask)).max() <= 1.001
                assert (image.numpy()[:, mask].max(axis=0) > 0).all()  # nothing in the padding
            height, width = target["size"]  # behind which all is of one colour
            assert (image[:, height:] == image[:, -1:, -1:]).all()
            assert (image[:, :, width:] == image[:, -1:, -1:]).all()
            corner = data.normalize(image[None])[0, :, -1, -1]
            assert height == 96 == width or corner.abs().max() < 0.01  # 0 but for rounding
            objects = len(scenes.read(int(number))["boxes"])
            seen, cut = seen + len(boxes), cut + objects - len(boxes)
    assert seen > 80 and cut > 2


def test_pixels_polygons_and_whole_masks_move_alike(tmp_path):
    """The picture is its object's mask: where it is white, polygons and masks must be, too."""
    random = np.random.RandomState(0)
    for number in range(40):
        height, width = random.randint(40, 200, 2).tolist()
        polygon = [blob(random, height, width, reach=0.8)]
        mask = coco_module.decode_mask(coco_module.as_rle(polygon, height, width))
        draws = random.rand(4) if number else None
        view = scenes_module.random_view((height, width), 64, draws, (0.5, 2.0))
        image = Image.fromarray(np.uint8(255 * mask))
        white = scenes_module.view_pixels(image, view, 64, 1)[0].numpy() > 127
        drawn = scenes_module.view_mask(polygon, (height, width), view, 64)
        taken = scenes_module.view_mask(mask, (height, width), view, 64)
        edge = 2 + 4 * (white.any(axis=0).sum() + white.any(axis=1).sum())
        assert (drawn ^ white).sum() < edge / 4 and (taken ^ white).sum() < edge / 4
        assert not (drawn[view.cut[1] :].any() or drawn[:, view.cut[0] :].any())


def test_views_differ_in_place_and_size_and_boxes_end_with_the_picture():
    """Also without masks; and in the next epoch a picture comes in another view."""
    draws = [data.uniform(data.random_bits(4, 0, 0, number, data.VIEW)) for number in range(300)]
    views = [scenes_module.random_view((60, 80), 64, numbers.tolist()) for numbers in draws]
    sides = np.array([view.scale[0] * 80 / 64 for view in views])
    assert 0.1 <= sides.min() < 0.2 and 1.9 < sides.max() <= 2
    places = np.array([view.corner for view in views if view.scale[0] * 60 > 80])  # both have room
    assert (places.min(axis=0) < 5).all() and (places.max(axis=0) > 16).all()
    sample = {"boxes": np.array([[-20.0, 10, 300, 400]]), "labels": np.array([0])}
    sample |= {"crowd": np.array([False]), "size": (60, 80)}
    for view in views:
        boxes = scenes_module.view_target(sample, view, 64, False)["boxes"]
        assert len(boxes) == 0 or (boxes[0, 2:] <= torch.tensor(view.cut)).all()
    scenes = scenes_module.ToyScenes("train", 32, 4)
    made = batches(scenes, 32, order=data.Order(scenes.sizes), batch_size=4)
    found = {}
    for step in range(6):
        for number, target in zip(made[step]["samples"].tolist(), made[step]["targets"]):
            found.setdefault(number, set()).add((target["size"], target["seed"]))
    assert [len(seen) for seen in found.values()] == [6] * 4


def test_a_box_elsewhere_than_its_mask_is_the_masks_where_it_is_cut():
    sample = {"boxes": np.array([[60.0, 60, 130, 90]]), "labels": np.array([1]), "size": (100, 100)}
    sample |= {"crowd": np.array([False]), "segments": [[[2, 2, 12, 2, 12, 12, 2, 12]]]}
    target = scenes_module.view_target(
        sample, scenes_module.random_view((100, 100), 100), 100, True
    )
    assert target["boxes"].tolist() == [[2, 2, 12, 12]]


def test_a_batch_is_a_pure_function_of_its_positions(tmp_path):
    """Whatever the number of processes, and whatever was made before."""
    scenes = make_scenes(tmp_path, train=True)
    pictures_for(scenes, tmp_path)

    def by_position(processes, steps):
        found = {}
        for process in range(processes):
            order = data.Order(scenes.sizes, lanes=4)
            made = batches(scenes, order=order, process=process, processes=processes)
            for step in steps:
                batch = made[step]
                for i, position in enumerate(batch["positions"].tolist()):
                    found[position] = (batch["images"][i], batch["targets"][i])
        return found

    one, two = by_position(1, [0, 1, 2, 3]), by_position(2, [3, 1, 0, 2])
    assert sorted(one) == sorted(two) == list(range(32))
    for position, (image, target) in one.items():
        other = two[position][1]
        assert torch.equal(image, two[position][0]) and target["seed"] == other["seed"]
        for key in ("boxes", "labels", "masks"):
            assert torch.equal(target[key], other[key])
    assert len({target["seed"] for _, target in one.values()}) == 32
    samples = [scenes.read(number) for number in range(len(scenes.sizes))]
    crowded = next(sample for sample in samples if sample["crowd"].any())
    view = scenes_module.random_view(crowded["size"], 64)
    found = scenes_module.view_target(crowded, view, 64, True)
    assert len(found["labels"]) == (~crowded["crowd"]).sum()  # crowds are not to be found


def test_to_measure_pictures_are_whole_and_boxes_go_back(tmp_path):
    scenes = make_scenes(tmp_path)
    pictures_for(scenes, tmp_path)
    made = batches(scenes, batch_size=10)
    assert len(made) == 3
    for step in range(3):
        batch = made[step]
        for i, number in enumerate(batch["samples"].tolist()):
            if number < 0:
                assert step == 2 and batch["weight"][i] == 0 and not batch["images"][i].any()
                continue
            sample = scenes.read(number)
            height, width = batch["sizes"][i].tolist()
            assert (height, width) == sample["size"] and batch["weight"][i] == 1
            assert batch["images"][i].any(dim=0).sum() > 0.9 * 64 * 64 * min(height, width) / max(
                height, width
            )
            back = batch["targets"][i]["boxes"].double() / batch["scales"][i].repeat(2)
            whole = (sample["boxes"] == sample["boxes"].clip(0, [width, height] * 2)).all(axis=1)
            for box in sample["boxes"][whole & ~sample["crowd"]]:
                assert np.abs(back.numpy() - box).max(axis=1).min() < 1e-3


def test_pictures_that_are_turned_grey_damaged_or_missing(tmp_path):
    """They are turned as their EXIF says if the annotations fit that; the rest is bad, not fatal."""
    content = {"images": [], "categories": [{"id": 1, "name": "thing"}], "annotations": []}
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter to the right
    pixels = np.zeros((40, 60), dtype=np.uint8)
    pixels[:10, :10] = 255
    white = {0: (0, 0), 1: (0, -1), 2: (0, 0), 3: (0, 0)}  # which corner is
    for number, (mode, exif, size) in enumerate(
        [("RGB", None, (40, 60)), ("L", turned, (60, 40)), ("CMYK", turned, (40, 60)),
         ("L", None, (40, 60)), ("RGB", None, (40, 61)), ("RGB", None, (40, 60))]
    ):  # fmt: skip
        name = f"{number}.jpg"
        image = {"id": number, "file_name": name, "height": size[0], "width": size[1]}
        content["images"].append(image)
        one = {"id": number, "image_id": number, "category_id": 1, "bbox": [0, 0, 10, 10]}
        content["annotations"].append(one)
        picture = Image.fromarray(pixels).convert("RGB").convert(mode)
        if number < 5:
            picture.save(tmp_path / name, quality=95, **({"exif": exif} if exif else {}))
    (tmp_path / "x.json").write_text(json.dumps(content))
    batch = batches(scenes_module.Scenes(str(tmp_path / "x.json")), 60, batch_size=6)[0]
    assert batch["weight"].tolist() == [1, 1, 1, 1, 0, 0] and len(batch["bad"]) == 2
    assert "40 pixels, annotated as 61 x 40" in batch["bad"][0] and "5.jpg" in batch["bad"][1]
    assert batch["targets"][0]["masks"] is None and not batch["images"][4:].any()
    assert [len(target["boxes"]) for target in batch["targets"]] == [1, 1, 1, 1, 0, 0]
    for number, (row, column) in white.items():
        height, width = content["images"][number]["height"], content["images"][number]["width"]
        shown = batch["images"][number, :, :height, :width]
        assert shown[:, row, column].min() > 200 and shown[:, height // 2, width // 2].max() < 60


def test_pictures_of_scenes_are_read_as_those_of_folders(tmp_path):
    """32-bit values of 8 bits, and a TIFF that is plain and turned: data.py has more kinds."""
    pixels = np.zeros((40, 60), dtype=np.uint8)
    pixels[:10, :10] = 200
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter to the right
    stored = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    Image.fromarray(pixels.astype(np.int32)).save(tmp_path / "0.tiff")
    for number, mode in enumerate(("L", "CMYK", "RGBA", "I;16"), start=1):
        image = stored.convert("RGB").convert(mode) if mode != "I;16" else None
        image = image or Image.fromarray(np.asarray(stored).astype(np.uint16) * 257)
        image.save(tmp_path / f"{number}.tiff", exif=turned)
    images = [{"id": i, "file_name": f"{i}.tiff", "height": 40, "width": 60} for i in range(5)]
    one = {"id": 1, "image_id": 0, "category_id": 1, "bbox": [0, 0, 10, 10]}
    content = {"images": images, "annotations": [one], "categories": [{"id": 1, "name": "thing"}]}
    (tmp_path / "x.json").write_text(json.dumps(content))
    batch = batches(scenes_module.Scenes(str(tmp_path / "x.json")), 60, batch_size=6)[0]
    assert batch["bad"] == []
    for image in batch["images"][:5]:
        assert (image[:, :40].numpy() == pixels).all()


def test_results_are_written_and_read(tmp_path):
    scenes = make_scenes(tmp_path)
    detections, path = make_detections(scenes), str(tmp_path / "results.json")
    scenes_module.write_results(path, scenes, detections)
    entry = json.loads((tmp_path / "results.json").read_text())[0]
    assert sorted(entry) == ["bbox", "category_id", "image_id", "score", "segmentation"]
    assert entry["category_id"] in scenes.category_ids and entry["image_id"] in scenes.ids
    back = scenes_module.read_results(path, scenes)
    for kind in ("bbox", "segm"):
        one, two = (coco_module.average_precision(scenes, d, kind) for d in (detections, back))
        assert one == pytest.approx(two, abs=1e-9)
    nan = float("nan")
    wrong = [{"image_id": 4}, {"category_id": 4}, {"score": nan}, {"bbox": [1, 2, nan, 4]}]
    wrong += [{"segmentation": {"size": [2, 2], "counts": "0"}}, {"score": None}]
    texts = ["{", "[3]", "[" * 100_000, *(json.dumps([entry | change]) for change in wrong)]
    for text in texts:
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match="cannot read results from .*: "):
            scenes_module.read_results(path, scenes)
    segment = entry["segmentation"] | {"counts": "P"}  # a text in which no count ends
    (tmp_path / "results.json").write_text(json.dumps([entry | {"segmentation": segment}]))
    with pytest.raises(ValueError, match="cannot read results from .*: run lengths of another"):
        scenes_module.read_results(path, scenes)


def test_detections_are_drawn(tmp_path):
    scenes, path = make_scenes(tmp_path), str(tmp_path / "drawn.png")
    pictures_for(scenes, tmp_path)
    (tmp_path / scenes.files[1]).unlink()  # a grey tile
    whole = (tmp_path / scenes.files[2]).read_bytes()
    (tmp_path / scenes.files[2]).write_bytes(whole[: len(whole) // 2])  # one more
    detections = make_detections(scenes)
    coco_module.draw_detections(path, scenes, {}, range(6), side=200)
    plain = np.array(Image.open(path))
    coco_module.draw_detections(path, scenes, detections, range(6), side=200)
    drawn = np.array(Image.open(path))
    assert drawn.shape == (400, 800, 3) and (drawn != plain).any()
    odd = {scenes.ids[0]: {"boxes": [[9, 9, 1, 1.0]], "scores": [1.0], "labels": [0]}}
    coco_module.draw_detections(path, scenes, odd, range(6), side=200)  # of results, perhaps
    boxes, drawn = [[5, 5, 30, 30.0], [20, 20, 35, 35.0], [1, 1, 9, 9.0]], []
    for scores in [0.2], [0.2, 0.1, 0.1], [0.4, 0.31]:  # the best, or all of 0.3
        found = {"boxes": boxes[: len(scores)], "scores": scores, "labels": [0] * len(scores)}
        coco_module.draw_detections(path, scenes, {scenes.ids[0]: found}, range(6), side=200)
        drawn.append(np.array(Image.open(path)))
    assert (drawn[0] != plain).any() and (drawn[0] == drawn[1]).all()
    assert (drawn[2] != drawn[0]).any()


def test_the_table(capsys):
    coco_module.print_table({"bbox": {"AP": 0.5, "APs": -1.0}, "segm": {"AP": 0.25, "APs": 1.0}})
    head, boxes, masks = capsys.readouterr().out.splitlines()
    assert (head.split(), boxes.split()) == (["AP", "APs"], ["bbox", "50.00", "-"])
    assert masks.split() == ["segm", "25.00", "100.00"]


def test_toy_scenes(monkeypatch):
    """Labels are the shapes, boxes are around the visible pixels, what is hidden is left out."""
    scenes = scenes_module.ToyScenes("val", 48)
    for number in range(20):
        sample, scene = scenes.read(number), toy_module.toy_scene(toy_module.TOY_VAL + number)
        shapes = [toy_module.TOY_CLASSES.index(thing["shape"]) for thing in scene["objects"]]
        assert sample["labels"].tolist() == shapes and sample["image"]().size == (64, 64)
        assert sample["image_id"] == scenes.ids[number] and sample["segments"][0].shape == (64, 64)
        full = toy_module.toy_sample(toy_module.TOY_VAL + number, 64)["boxes"]()
        assert np.abs(sample["boxes"][-1] - full[-1]).max() < 3  # the last one lies in front
        assert sample["areas"].tolist() == [mask.sum() for mask in sample["segments"]]
    hidden = {"image": None, "masks": lambda: np.stack([np.eye(64) > 2, np.eye(64) > 0])}
    scenes = scenes_module.ToyScenes("train", 48, 1)
    monkeypatch.setattr(toy_module, "toy_sample", lambda *_: hidden | {"labels": [3, 8]})
    sample = scenes.read(0)
    assert sample["labels"].tolist() == [8] and sample["boxes"].tolist() == [[0, 0, 64, 64]]
