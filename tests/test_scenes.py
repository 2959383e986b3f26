"""Scenes: annotation files, pictures and boxes as tensors, results; helpers for test_coco.py."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ODD_NAMES, one_line
from PIL import Image

import data
from support import toy
from support.hashtags import WEIGHT, WeightedOrder
from tasks import coco
from tasks.scenes import (
    Scenes,
    ToyScenes,
    detections_in_picture,
    open_scenes,
    random_view,
    read_results,
    repeat_factors,
    scene_maker,
    tight_box,
    view_mask,
    view_pixels,
    view_target,
    write_results,
)


def blob(random, height, width, corners=7, reach=0.3):
    """A polygon as in COCO's files, partly outside now and then."""
    angles = np.sort(random.uniform(0, 2 * np.pi, corners))
    radius = random.uniform(0.3, 1, corners) * random.uniform(0.05, reach) * width
    centre = random.uniform(0, 1, 2) * [width, height]
    points = centre + np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius[:, None]
    return points.round(2).ravel().tolist()


def annotation(number, image, category, polygons, crowd=0):
    height, width = image["height"], image["width"]
    rle = coco.as_rle(polygons, height, width)
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in polygons])
    low, high = points.min(axis=0), points.max(axis=0)
    segment = {**rle, "counts": rle["counts"].tolist()} if crowd else polygons
    return {
        "id": number, "image_id": image["id"], "category_id": category, "iscrowd": crowd,
        "bbox": [*low.tolist(), *(high - low).tolist()], "area": coco.rle_area(rle),
        "segmentation": segment,
    }  # fmt: skip


def write_scenes(folder, images, annotations, categories=(1,), **options):
    """Write scenes.json in the folder, and open it."""
    images = [{"file_name": f"{image['id']}.png"} | image for image in images]
    categories = [{"id": number, "name": f"thing {number}"} for number in categories]
    write(folder / "scenes.json", images, annotations, categories)
    return Scenes(str(folder / "scenes.json"), str(folder), **options)


def write(path, images, annotations, categories):
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_scenes(folder, pictures=24, seed=0, lvis=False, categories=(2, 3, 7, 11, 90), **options):
    """Write a COCO folder (categories with gaps, crowds, empty pictures) and open it."""
    random, images, annotations = np.random.RandomState(seed), [], []
    for image in random.permutation(pictures).tolist():
        # from small to large, so that all ranges of areas have objects
        height, width = (int(side) for side in random.randint(30, 400, 2))
        image = {"id": 5 + 3 * image, "height": height, "width": width}
        image |= {"file_name": f"{image['id']}.jpg"}
        present, there = random.choice(categories, random.randint(1, 4)).tolist(), set()
        for _ in range(random.choice([0, 1, 4, 9])):
            polygons = [blob(random, height, width) for _ in range(random.choice([1, 1, 2]))]
            crowd = int(not lvis and random.rand() < 0.15)
            category = random.choice(present).item()
            there.add(category)
            number = len(annotations) + 1
            annotations.append(annotation(number, image, category, polygons, crowd))
        if lvis:
            absent = [category for category in categories if category not in there]
            image["neg_category_ids"] = absent[: random.randint(0, 3)]
            image["not_exhaustive_category_ids"] = [c for c in sorted(there) if random.rand() < 0.4]
        images.append(image)
    entries = [{"id": category, "name": f"thing {category}"} for category in categories]
    for place, entry in enumerate(entries):
        entry |= {"frequency": "rcf"[place % 3]} if lvis else {}
    path = folder / "annotations" / ("lvis_v1_val.json" if lvis else "instances_val.json")
    write(path, images, annotations, entries)
    return Scenes(str(path), str(folder), **options)


def make_detections(scenes, seed=0, least=0, most=12, jitter=0.15, levels=20):
    """Shifted objects and random ones, some with other classes; few scores, so that many tie."""
    random, detections = np.random.RandomState(seed), {}
    for number in range(len(scenes.sizes)):
        sample = scenes.read(number)
        height, width = sample["size"]
        if random.rand() < 0.1:
            continue  # no entry for this picture
        boxes, labels, masks = np.zeros((random.randint(least, most), 4)), [], []
        for row in boxes:
            label = random.randint(len(scenes.classes))
            rle = coco.as_rle([blob(random, height, width)], height, width)
            box = np.array(coco.rle_box(rle))
            if len(sample["boxes"]) and random.rand() < 0.8:
                i = random.randint(len(sample["boxes"]))
                label = sample["labels"][i] if random.rand() < 0.9 else label
                mask = coco.decode_mask(coco.as_rle(sample["segments"][i], height, width))
                shift = random.randint(-3, 4, 2) if random.rand() < 0.7 else (0, 0)
                rle, box = coco.encode_mask(np.roll(mask, shift, axis=(0, 1))), sample["boxes"][i]
                sides = np.tile(box[2:] - box[:2], 2)
                box = box + random.normal(0, jitter, 4) * sides * random.rand()
            row[:2], row[2:] = np.minimum(box[:2], box[2:]), np.maximum(box[:2], box[2:])
            labels.append(label)
            masks.append(rle)
        scores = random.randint(1, levels + 1, len(boxes)) / levels
        found = {"boxes": boxes, "scores": scores, "labels": np.array(labels, dtype=np.int64)}
        detections[sample["image_id"]] = found | {"masks": masks}
    return detections


def pictures_for(scenes, folder):
    folder.mkdir(exist_ok=True)
    for name, (height, width) in zip(scenes.files, scenes.sides):
        random = np.random.RandomState(height)
        small = random.randint(0, 256, (height // 8 + 1, width // 8 + 1, 3)).astype(np.uint8)
        Image.fromarray(small).resize((width, height)).save(folder / name)


def batches(scenes, side=64, channels=3, batch_size=8, jitter=(0.1, 2.0), **options):
    config = {"image_size": (side, side), "channels": channels}
    jitter = jitter if options.get("order") else None
    make = scene_maker(scenes, config, jitter)
    return data.Batches(scenes, make, batch_size, **options)


GOOD = {"image_id": 999, "category_id": 90, "bbox": [1, 2, 30, 20], "area": 600, "id": 500}
GOOD |= {"segmentation": [[1, 2, 31, 2, 31, 22, 1, 22]]}
NAN = float("nan")
NO_BOXES = [1, 2, 3], None, ["1", "2", "3", "4"], [1, NAN, 3, 4], [1, 2, 1e300, 4]
NO_SEGMENTS = [[[1, 2, NAN, 2, 9, 9]], [[1, 2, 1e9, 2, 9, 9]], [1, 2, 9, 2, 9, 9], "x", 5]
NO_SEGMENTS += [{"size": [50, 60]}, {"size": [60, 50], "counts": [9, 1, 2990]}]
NO_SEGMENTS += [{"size": [50, 60], "counts": c} for c in ("", "PP", None, [9, -1, 2992], [2**70])]
DAMAGED = [GOOD | {"segmentation": None, "bbox": box} for box in NO_BOXES]
DAMAGED += [GOOD | {"segmentation": segment} for segment in NO_SEGMENTS]
DAMAGED += [GOOD | {"segmentation": {"size": [60, 50], "counts": "0"}, "iscrowd": 1}]
DAMAGED += [GOOD | {"area": "x"}, GOOD | {"image_id": [1]}, {"bbox": [1, 2, 3, 4]}, "x", None]


def test_without_flips_a_scene_is_never_mirrored(tmp_path):
    scenes, config = make_scenes(tmp_path), {"image_size": (64, 64), "channels": 3}
    pictures_for(scenes, tmp_path)
    whole, plain, usual = (
        scene_maker(scenes, config, *jitter) for jitter in ((), ((1, 1), False), ((1, 1), True))
    )
    mirrored = 0
    for number in range(12):
        one, two, three = (
            make(scenes.read(number), (1, 0, number)) for make in (whole, plain, usual)
        )
        assert torch.equal(one["images"], two["images"])
        assert torch.equal(one["targets"]["boxes"], two["targets"]["boxes"])
        mirrored += not torch.equal(one["images"], three["images"])
    assert 0 < mirrored < 12


def test_annotations_that_cannot_be_used_are_counted_and_left_out(tmp_path, capsys):
    """Damaged ones, which would else end the measurement, or a batch, or count; others whose image
    or category is not listed; and to learn from, those that teach nothing."""
    count = len(make_scenes(tmp_path).labels)
    path = tmp_path / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["images"].append({"id": 999, "height": 50, "width": 60, "file_name": "999.jpg"})
    outside = {"bbox": [70, 70, 20, 20], "segmentation": [[70, 70, 90, 70, 90, 90]]}
    unlisted = [{"image_id": 12345, "id": 501}, {"category_id": 5, "id": 502}]  # 5: in a gap
    useless = [{"bbox": [3, 3, 0, 9], "id": 503}, {"segmentation": None, "id": 504}]
    content["annotations"] += [GOOD | one for one in (*unlisted, *useless, {}, outside)] + DAMAGED
    path.write_text(json.dumps(content))
    scenes = Scenes(str(path), str(tmp_path))
    said = f"no listed image or category, left out: {len(DAMAGED) + 2} (the first has id 501)"
    assert said in capsys.readouterr().err
    # To measure on, all pictures stay, and boxes of no area, as the reference has it.
    assert len(scenes.sizes) == 25 and len(scenes.labels) == count + 4
    assert scenes.ids == sorted(scenes.ids) and scenes.read(24)["image_id"] == 999
    assert scenes.category_ids == [2, 3, 7, 11, 90]
    assert scenes.read(24)["labels"].tolist() == [4] * 4
    assert coco.average_precision(scenes, {}, "segm")["AP"] == 0.0
    train = Scenes(str(path), str(tmp_path), train=True)
    printed = capsys.readouterr().err
    assert "box of no area, left out: 1 (the first has id 503)" in printed
    assert "without a mask, left out: 1 (the first has id 504)" in printed
    empty = [i for i in range(25) if scenes.read(i)["crowd"].all()]
    assert 0 < len(empty) == 25 - len(train.sizes)
    # The polygon outside the picture gives no object.
    pictures_for(train, tmp_path)
    last = len(train.sizes) - 1
    target = batches(train)[last // 8]["targets"][last % 8]
    assert len(train.read(last)["boxes"]) == 2 and len(target["boxes"]) == 1


@pytest.mark.parametrize("change, why", [
    ("{", "JSON"), ("[]", "TypeError"), ('{"images": [{}], "categories": []}', "KeyError"),
    ("[" * 100_000, "Recursion"), (None, "No such file"), ({"images": []}, "lists no pictures"),
    *(({"images": [{"id": 1, "height": side, "width": 9}]}, "a height or width")
      for side in (0, -1, 10**9)),
    ({"images": [{"id": 1, "height": 9, "width": 9}] * 2}, "the same id"),
    ({"categories": [{"id": 1, "name": "thing"}] * 2}, "the same id"),
])  # fmt: skip
def test_files_that_are_not_cocos_are_refused_in_one_line(tmp_path, change, why):
    path = tmp_path / "x.json"
    good = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    if change is not None:
        path.write_text(json.dumps(good | change) if isinstance(change, dict) else change)
    with pytest.raises(ValueError, match=why) as error:
        Scenes(str(path))
    assert str(path) in one_line(error)


SQUARE = [[2, 1, 6, 1, 6, 4, 2, 4]]  # 4 x 3 pixels from (2, 1) on
CORNER = {"size": [9, 12], "counts": [2 * 9 + 1, *[3, 6] * 3, 3, 9 * 6 + 5]}  # the same
TRIANGLE = coco.encode_mask(np.pad(np.tri(5, dtype=bool), ((3, 1), (4, 3))))  # 15 of 5 x 5
TRIANGLE |= {"counts": coco.text_of_counts(TRIANGLE["counts"])}
GIVEN = [  # segmentation, what else is given: box x1 y1 x2 y2, area
    (SQUARE, {}, [2, 1, 6, 4], 12),
    (CORNER, {"bbox": []}, [2, 1, 6, 4], 12),
    (TRIANGLE, {"bbox": None, "area": None}, [4, 3, 9, 8], 15),
    (TRIANGLE, {"bbox": [4, 3, 4, 4], "area": None}, [4, 3, 8, 7], 15),
    (SQUARE, {"bbox": [2, 1, 5, 4]}, [2, 1, 7, 5], 12),
    (SQUARE, {"area": 7.5}, [2, 1, 6, 4], 7.5),
    (SQUARE, {"area": 0}, [2, 1, 6, 4], 0),
    (None, {"bbox": [2, 1, 5, 4], "area": None}, [2, 1, 7, 5], 20),
    ([], {"bbox": [2, 1, 5, 4]}, [2, 1, 7, 5], 20),
]


def test_boxes_and_areas_that_are_not_given_are_the_masks(tmp_path, capsys):
    common = {"image_id": 1, "category_id": 1, "iscrowd": 0, "score": 0.5}
    listed = [
        common | {"id": n, "segmentation": segment} | more
        for n, (segment, more, *_) in enumerate(GIVEN)
    ]
    neither = [common | {"id": 77, "bbox": []}, common | {"id": 78, "area": 9}]
    images = [{"id": 1, "height": 9, "width": 12}]
    scenes = write_scenes(tmp_path, images, listed + neither)
    sample, boxes = scenes.read(0), [box for *_, box, _ in GIVEN]
    assert sample["boxes"].tolist() == boxes
    assert sample["areas"].tolist() == [area for *_, area in GIVEN]
    assert "category, left out: 2 (the first has id 77)" in capsys.readouterr().err
    train = write_scenes(tmp_path, images, listed, train=True).read(0)
    assert train["boxes"].tolist() == [box for segment, _, box, _ in GIVEN if segment]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(listed))
    found = read_results(str(path), scenes)[1]
    assert found["boxes"] == boxes and found["masks"] is None  # not all have one
    path.write_text(json.dumps(neither[:1]))
    with pytest.raises(ValueError, match="neither a bbox nor a segmentation") as error:
        read_results(str(path), scenes)
    one_line(error)


def test_folders_of_coco_and_lvis(tmp_path):
    scenes = make_scenes(tmp_path, lvis=True)
    with pytest.raises(ValueError, match="the pictures of .* are not at"):
        Scenes(scenes.path)
    annotations = tmp_path / "annotations"
    content = json.loads((annotations / "lvis_v1_val.json").read_text())
    for image in content["images"]:
        image["coco_url"] = f"http://somewhere/train2017/{image.pop('file_name')}"
    for split in ("train", "val"):
        (annotations / f"lvis_v1_{split}.json").write_text(json.dumps(content))
    pictures_for(scenes, tmp_path / "train2017")
    train, val = open_scenes(str(tmp_path))
    assert len(val.sizes) == 24 > len(train.sizes) and val.root == str(tmp_path)
    assert train.read(0)["image"]().size == train.read(0)["size"][::-1]
    assert val.frequencies == ["r", "c", "f", "r", "c"] and {"negative"} < set(val.read(0))
    (annotations / "instances_train2017.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="there must be one .*, not 2"):
        open_scenes(str(tmp_path))
    content["categories"][0]["name"] = "another"
    (tmp_path / "other.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="other categories"):
        open_scenes(scenes.path, str(tmp_path / "other.json"))
    # The third layout: pictures in a folder named as the split.
    mine = make_scenes(tmp_path)
    pictures_for(mine, tmp_path / "val")
    assert Scenes(mine.path).root == str(tmp_path / "val")
    toys = open_scenes("toy")
    assert [len(one.sizes) for one in toys] == [65536, 4096] and len(toys[0].classes) == 10


@pytest.mark.parametrize("name, match", ODD_NAMES.items())
def test_folders_whose_names_look_like_patterns(tmp_path, name, match):
    folder = tmp_path / name
    scenes, annotations = make_scenes(folder, pictures=4), folder / "annotations"
    shutil.copytree(folder, tmp_path / match)  # what the name would match as a pattern
    shutil.copy(annotations / "instances_val.json", annotations / "instances_train.json")
    pictures_for(scenes, folder)
    for where in (str(folder), str(annotations / "instances_val.json")):
        train, val = open_scenes(str(folder), where)
        assert train.root == val.root == str(folder) and len(val.sizes) == 4
        assert val.read(0)["image"]().size == val.sides[0][::-1]
    write_results(folder / f"{name}.json", val, make_detections(val, least=1))
    assert read_results(str(folder / f"{name}.json"), val)
    coco.draw_detections(folder / f"{name}.png", val, {}, 2)
    with pytest.raises(ValueError, match="there must be one"):
        open_scenes(str(tmp_path / "none [v2]"))


def test_repeat_factors(tmp_path):
    """A category in one of 4 pictures, with a threshold of 1: its pictures come twice."""
    scenes = make_scenes(tmp_path, pictures=30, train=True)
    sampling = repeat_factors(scenes, threshold=0.9)
    labels = [set(scenes.read(i)["labels"].tolist()) for i in range(len(scenes.sizes))]
    share = [np.mean([k in there for there in labels]) for k in range(5)]
    wanted = [max(1, *(np.sqrt(0.9 / share[k]) for k in there)) for there in labels]
    assert sampling["totals"] / WEIGHT == pytest.approx(np.array(wanted), abs=1e-4)
    order = WeightedOrder(scenes.sizes, **sampling)
    drawn = np.bincount([order(p) for p in range(order.length)], minlength=len(wanted))
    assert order.length == int(sum(wanted)) and (np.abs(drawn - wanted) < 1).all()
    assert (repeat_factors(scenes)["totals"] == WEIGHT).all()  # 0.001: none is rare


def test_results_are_written_and_read(tmp_path):
    scenes, path = make_scenes(tmp_path), tmp_path / "results.json"
    detections = make_detections(scenes)
    write_results(str(path), scenes, detections)
    entry = json.loads(path.read_text())[0]
    assert sorted(entry) == ["bbox", "category_id", "image_id", "score", "segmentation"]
    assert entry["category_id"] in scenes.category_ids and entry["image_id"] in scenes.ids
    back = read_results(str(path), scenes)
    for kind in ("bbox", "segm"):
        one, two = (coco.average_precision(scenes, d, kind) for d in (detections, back))
        assert one == pytest.approx(two, abs=1e-9)
    wrong = [{"image_id": 4}, {"category_id": 4}, {"score": NAN}, {"score": None}]
    wrong += [{"bbox": [1, 2, NAN, 4]}, {"segmentation": {"size": [2, 2], "counts": "0"}}]
    wrong += [{"segmentation": entry["segmentation"] | {"counts": "P"}}]  # no count ends in it
    for text in ("{", "[3]", "[" * 100_000, *(json.dumps([entry | one]) for one in wrong)):
        path.write_text(text)
        with pytest.raises(ValueError, match="cannot read results from .*: ") as error:
            read_results(str(path), scenes)
    assert "run lengths of another" in str(error.value)  # the last of them


def test_boxes_and_masks_move_with_the_picture():
    scenes, seen, objects = ToyScenes("train", 96, 400), 0, 0
    order = data.Order(scenes.sizes)
    batch = batches(scenes, 96, order=order, batch_size=128, jitter=(0.5, 4.0))[0]
    assert batch["images"].shape == (128, 3, 96, 96) and batch["images"].dtype == torch.uint8
    for image, target, number in zip(batch["images"], batch["targets"], batch["samples"].tolist()):
        masks, boxes = target["masks"].numpy(), target["boxes"].numpy()
        assert len(masks) == len(boxes) == len(target["labels"]) and masks.any((1, 2)).all()
        for mask, box in zip(masks, boxes):
            assert np.abs(box - tight_box(mask)).max() <= 1.001
            assert (image.numpy()[:, mask].max(axis=0) > 0).all()  # nothing in the padding
        height, width = target["size"]  # behind which all is of one colour
        assert (image[:, height:] == image[:, -1:, -1:]).all()
        assert (image[:, :, width:] == image[:, -1:, -1:]).all()
        corner = data.normalize(image[None])[0, :, -1, -1]
        assert height == 96 == width or corner.abs().max() < 0.01  # 0 but for rounding
        seen, objects = seen + len(boxes), objects + len(scenes.read(number)["boxes"])
    assert seen > 80 and objects - seen > 2  # some were cut off


def test_pixels_polygons_and_whole_masks_move_alike(tmp_path):
    """The picture is its object's mask: where it is white, polygons and masks must be, too."""
    random = np.random.RandomState(0)
    for number in range(40):
        height, width = random.randint(40, 200, 2).tolist()
        polygon = [blob(random, height, width, reach=0.8)]
        mask = coco.decode_mask(coco.as_rle(polygon, height, width))
        draws = random.rand(4) if number else (0.4, 0, 0, 1)
        view = random_view((height, width), 64, draws, (0.5, 2.0))
        image = Image.fromarray(np.uint8(255 * mask))
        white = view_pixels(image, view, 64, 1)[0].numpy() > 127
        drawn = view_mask(polygon, (height, width), view, 64)
        taken = view_mask(mask, (height, width), view, 64)
        edge = 2 + 4 * (white.any(axis=0).sum() + white.any(axis=1).sum())
        assert (drawn ^ white).sum() < edge / 4 and (taken ^ white).sum() < edge / 4
        assert not (drawn[view.cut[1] :].any() or drawn[:, view.cut[0] :].any())


def test_views_differ_in_place_and_size_and_boxes_end_with_the_picture():
    """Also without masks; and in the next epoch a picture comes in another view."""
    draws = [data.uniform(data.random_bits(4, 0, 0, number, data.VIEW)) for number in range(300)]
    views = [random_view((60, 80), 64, numbers, (0.1, 2.0)) for numbers in draws]
    sides = np.array([view.scale[0] * 80 / 64 for view in views])
    assert 0.1 <= sides.min() < 0.2 and 1.9 < sides.max() <= 2
    places = np.array([view.corner for view in views if view.scale[0] * 60 > 80])  # both have room
    assert (places.min(axis=0) < 5).all() and (places.max(axis=0) > 16).all()
    sample = {"boxes": np.array([[-20.0, 10, 300, 400]]), "labels": np.array([0])}
    sample |= {"crowd": np.array([False]), "size": (60, 80)}
    for view in views:
        boxes = view_target(sample, view, 64, False)["boxes"]
        assert (boxes[:, 2:] <= torch.tensor(view.cut)).all()
    # A box that is cut, elsewhere than its mask, is the mask's.
    sample |= {"boxes": np.array([[60.0, 60, 130, 90]]), "size": (100, 100)}
    sample |= {"segments": [[[2, 2, 12, 2, 12, 12, 2, 12]]]}
    target = view_target(sample, random_view((100, 100), 100), 100, True)
    assert target["boxes"].tolist() == [[2, 2, 12, 12]]
    scenes, found, seeds = ToyScenes("train", 32, 4), set(), set()
    made = batches(scenes, 32, order=data.Order(scenes.sizes), batch_size=4)
    for batch in (made[step] for step in range(6)):
        found |= {image.numpy().tobytes() for image in batch["images"]}
        seeds |= {target["seed"] for target in batch["targets"]}
    assert len(found) == len(seeds) == 4 * 6


def test_to_measure_pictures_are_whole_and_boxes_go_back(tmp_path):
    scenes = make_scenes(tmp_path)
    pictures_for(scenes, tmp_path)
    made = batches(scenes, batch_size=24)
    batch, padded = made[0], batches(scenes, batch_size=25)[0]
    assert len(made) == 1 and batch["samples"].tolist() == list(range(24))
    assert padded["weight"].tolist() == [1] * 24 + [0] and not padded["images"][24].any()
    for number, target in enumerate(batch["targets"]):
        sample = scenes.read(number)
        height, width = sample["size"]
        assert batch["sizes"][number].tolist() == [height, width]
        assert (height - width) * (target["size"][0] - target["size"][1]) >= 0
        share = min(height, width) / max(height, width)
        assert batch["images"][number].any(dim=0).sum() > 0.9 * 64 * 64 * share
        back = target["boxes"].double() / batch["scales"][number].repeat(2)
        assert len(back) <= (~sample["crowd"]).sum()  # crowds are not to be found
        whole = (sample["boxes"] == sample["boxes"].clip(0, [width, height] * 2)).all(axis=1)
        for box in sample["boxes"][whole & ~sample["crowd"]]:
            assert np.abs(back.numpy() - box).max(axis=1).min() < 1e-3


def test_detections_go_back_to_their_picture():
    """A picture of 6 x 20 pixels, twice as wide and four times as high in the square."""
    answer = {"boxes": torch.tensor([[8.0, 4, 24, 12]]), "scores": torch.tensor([0.5])}
    answer |= {"labels": torch.tensor([3]), "masks": torch.ones(1, 28, 28)}
    scale = torch.tensor([2.0, 4.0], dtype=torch.float64)
    found = detections_in_picture(answer, (6, 20), scale)
    assert found["boxes"].tolist() == [[4, 1, 12, 3]] and found["labels"].tolist() == [3]
    assert coco.rle_box(found["masks"][0]) == (4, 1, 12, 3)
    assert detections_in_picture(answer | {"masks": None}, (6, 20), scale)["masks"] is None


def test_pictures_that_are_turned_grey_damaged_or_missing(tmp_path):
    """They are turned as their EXIF says if the annotations fit that; the rest is bad, not fatal."""
    whole, turned = (40, 60), (60, 40)  # (height, width), as it is stored and as EXIF says
    sizes = [whole, turned, whole, whole, (40, 61), whole]
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    picture = Image.fromarray(np.pad(np.full((10, 10), 255, "u1"), ((0, 30), (0, 50))))
    for number, mode in enumerate(("RGB", "L", "CMYK", "L", "RGB")):
        tag = {"exif": exif} if number in (1, 2) else {}
        image = picture.convert("RGB").convert(mode)
        image.save(tmp_path / f"{number}.jpg", quality=95, **tag)
    images, objects = [], []
    for number, (height, width) in enumerate(sizes):
        name = {"id": number, "file_name": f"{number}.jpg"}
        images.append(name | {"height": height, "width": width})
        objects.append({"id": number, "image_id": number, "category_id": 1, "bbox": [0, 0, 10, 10]})
    scenes = write_scenes(tmp_path, images, objects)
    batch, alpha = (batches(scenes, 60, channels, batch_size=6)[0] for channels in (3, 4))
    assert not alpha["images"][5].any() and batch["sizes"][5].tolist() == [60, 60]
    assert batch["weight"].tolist() == [1, 1, 1, 1, 0, 0] and len(batch["bad"]) == 2
    assert "40 pixels, annotated as 61 x 40" in batch["bad"][0] and "5.jpg" in batch["bad"][1]
    assert batch["targets"][0]["masks"] is None and not batch["images"][4:].any()
    assert [len(target["boxes"]) for target in batch["targets"]] == [1, 1, 1, 1, 0, 0]
    for number, (height, width) in enumerate(sizes[:4]):
        shown = batch["images"][number, :, :height, :width]
        white = shown[:, 0, -1 if number == 1 else 0]
        assert white.min() > 200 and shown[:, height // 2, width // 2].max() < 60


def test_toy_scenes(monkeypatch):
    """Labels are the shapes, boxes are around the visible pixels, what is hidden is left out."""
    scenes = ToyScenes("val", 48)
    for number in range(20):
        sample, scene = scenes.read(number), toy.toy_scene(toy.TOY_VAL + number)
        shapes = [toy.TOY_CLASSES.index(thing["shape"]) for thing in scene["objects"]]
        assert sample["labels"].tolist() == shapes and sample["image"]().size == (64, 64)
        assert sample["image_id"] == scenes.ids[number] and sample["segments"][0].shape == (64, 64)
        full = toy.toy_sample(toy.TOY_VAL + number, 64)["boxes"]()
        assert np.abs(sample["boxes"][-1] - full[-1]).max() < 3  # the last one lies in front
        assert sample["areas"].tolist() == [mask.sum() for mask in sample["segments"]]
    hidden = {"image": None, "masks": lambda: np.stack([np.eye(64) > 2, np.eye(64) > 0])}
    scenes = ToyScenes("train", 48, 1)
    monkeypatch.setattr(toy, "toy_sample", lambda *_: hidden | {"labels": [3, 8]})
    sample = scenes.read(0)
    assert sample["labels"].tolist() == [8] and sample["boxes"].tolist() == [[0, 0, 64, 64]]
