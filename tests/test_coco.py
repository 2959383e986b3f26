"""Run lengths and average precision against pycocotools, lvis where it is installed, and by hand."""

import contextlib
import json
import sys
import types

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_scenes import batches, blob, make_detections, make_scenes, pictures_for, write_scenes

from tasks import coco
from tasks.scenes import read_results, tight_box, write_results


def reference(scenes, detections, kind, folder):
    """The same numbers from pycocotools or lvis, through the results file."""
    write_results(folder / "results.json", scenes, detections)
    results = json.loads((folder / "results.json").read_text())
    for result in results:  # with a box, the references take the box's area for masks
        result.pop("bbox" if kind == "segm" else "segmentation", None)
    (folder / "results.json").write_text(json.dumps(results))
    if scenes.frequencies is None:
        with contextlib.redirect_stdout(None):
            truth = COCO(scenes.path)
            evaluation = COCOeval(truth, truth.loadRes(results), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation.stats.tolist()
    # Only lvis's drawings need these.
    for name in ("cv2", "matplotlib", "matplotlib.pyplot"):
        sys.modules.setdefault(name, types.ModuleType(name))
    for name, what in (("patches", "Polygon"), ("lines", "Line2D")):
        module = sys.modules.setdefault(f"matplotlib.{name}", types.ModuleType(name))
        vars(module).setdefault(what, None)
    np.float = float  # lvis 0.5.3 is older than numpy 1.24, which took this name away
    lvis = pytest.importorskip("lvis", reason="it is not installed")
    evaluation = lvis.LVISEval(scenes.path, results, kind)
    evaluation.run()
    return list(evaluation.get_results().values())


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("lvis", [False, True])
def test_average_precision_equals_the_references(tmp_path, kind, lvis):
    """The results as they were made, and as read from a file without boxes or without masks."""
    for seed in range(2):
        scenes = make_scenes(tmp_path / str(seed), seed=seed, lvis=lvis)
        detections = make_detections(scenes, seed, jitter=0.05 * 4**seed)
        theirs = pytest.approx(reference(scenes, detections, kind, tmp_path), abs=1e-6)
        read = read_results(str(tmp_path / "results.json"), scenes)
        for found in (detections, read):
            ours = coco.average_precision(scenes, found, kind)
            assert list(ours.values()) == theirs and len(ours) == (13 if lvis else 12)
            assert 0 < ours["AP"] < 1 and len(set(ours.values())) > 8


@pytest.mark.parametrize("lvis", [False, True])
def test_more_detections_than_count(tmp_path, lvis):
    """100 of a picture and class (COCO), 300 of a picture (LVIS): the best ones, ties in order."""
    scenes = make_scenes(tmp_path, 3, lvis=lvis, categories=(4, 9))
    detections = make_detections(scenes, least=400, most=401, levels=3, jitter=0.5)
    theirs = pytest.approx(reference(scenes, detections, "bbox", tmp_path), abs=1e-6)
    assert list(coco.average_precision(scenes, detections).values()) == theirs


def one_scene(folder, boxes, crowd=None, masks=None, **options):
    """A picture of 100 x 100 with objects of one class (x y width height)."""
    annotations = []
    for i, box in enumerate(boxes):
        one = {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3]}
        annotations.append(one | {"iscrowd": int(i == crowd)} | (masks[i] if masks else {}))
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (100, 100)).save(folder / "1.png")
    image = {"id": 1, "height": 100, "width": 100}
    return write_scenes(folder, [image], annotations, **options)


def detections_of(boxes, scores):
    boxes = np.array(boxes, dtype=np.float64)
    boxes[:, 2:] += boxes[:, :2]
    return {1: {"boxes": boxes, "scores": np.array(scores), "labels": np.zeros(len(scores), int)}}


def test_average_precision_by_hand(tmp_path):
    """Found, wrong, found: the precision is 1 at recalls up to 1/2, and then 2/3."""
    here, there, nowhere = [10, 10, 20, 20], [60, 60, 20, 20], [10, 60, 20, 20]
    scenes = one_scene(tmp_path, [here, there])
    result = coco.average_precision(scenes, detections_of([here, nowhere, there], [0.9, 0.8, 0.7]))
    assert result["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert (result["AR1"], result["AR10"], result["APs"]) == (0.5, 1, result["AP"])
    assert result["APm"] == result["ARl"] == -1  # there are no such objects
    # An IoU of 16 / 24: counted for the four thresholds up to 0.65 of ten.
    shifted = [here, [64, 60, 20, 20]]
    result = coco.average_precision(scenes, detections_of(shifted, [0.5, 0.4]))
    assert result["AP"] == pytest.approx((4 + 6 * 51 / 101) / 10)
    # Between two, as near to each: it takes the last one, and the next can have the first one.
    two = one_scene(tmp_path / "two", [here, [14, 10, 20, 20]])
    result = coco.average_precision(two, detections_of([[12, 10, 20, 20], here], [0.5, 0.4]))
    assert result["AP"] == pytest.approx((7 + 3 * 51 / 101 / 2) / 10)  # 18 / 22 is above 0.8
    # A crowd is not looked for, and what lies in it is neither right nor wrong, as often as it is.
    crowded = one_scene(tmp_path / "crowded", [here, [50, 50, 50, 50]], crowd=1)
    several = detections_of([there, [52, 52, 5, 5], here, nowhere], [0.9, 0.8, 0.7, 0.6])
    assert coco.average_precision(crowded, several)["AP"] == pytest.approx(1)
    assert coco.average_precision(crowded, {})["AP"] == 0
    with pytest.raises(ValueError, match="no masks"):
        coco.average_precision(crowded, several, "segm")


@pytest.mark.parametrize("nothing", [None, [], [[]], [[60, 60, 80, 80]], "missing"])
def test_objects_without_a_mask_are_left_out_of_mask_ap(tmp_path, capsys, nothing):
    """By hand: one of two has a mask, and it alone is to be found; what lies over the box of the
    other is neither right nor wrong, but once only, as with other objects that are ignored."""
    here, there, nowhere = [10, 10, 20, 20], [60, 60, 20, 20], [10, 60, 20, 20]
    masks = [{"segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]]}]
    masks += [{} if nothing == "missing" else {"segmentation": nothing}]
    scenes = one_scene(tmp_path, [here, there], masks=masks)
    said = "objects without a mask, left out of mask AP: 1 (the first has id 2)"
    assert capsys.readouterr().err == f"{scenes.path}: {said}\n"

    def measured(*boxes, kind="segm"):
        found = detections_of(boxes, np.linspace(0.9, 0.5, len(boxes)))
        found[1]["masks"] = [np.zeros((100, 100), dtype=bool) for _ in boxes]
        for pixels, (x, y, w, h) in zip(found[1]["masks"], boxes):
            pixels[y : y + h, x : x + w] = True
        return coco.average_precision(scenes, found, kind)["AP"]

    for boxes, precision in (
        ([here, there], 1),
        ([here], 1),
        ([there, here], 1),
        ([there], 0),
        ([nowhere, here], 1 / 2),
        ([there, there, here], 1 / 2),
    ):
        assert measured(*boxes) == pytest.approx(precision)
    assert measured(here, kind="bbox") == pytest.approx(51 / 101)  # boxes count as ever
    # To learn from, there is one object, not one with an empty mask.
    train = one_scene(tmp_path, [here, there], masks=masks, train=True)
    assert "objects without a mask, left out: 1 (the first has id 2)" in capsys.readouterr().err
    assert train.read(0)["boxes"].tolist() == [[10, 10, 30, 30]]
    target = batches(train)[0]["targets"][0]
    assert len(target["boxes"]) == len(target["masks"]) == 1 and target["masks"].any()


def outlines(random, count):
    """Polygons of all kinds, partly or wholly outside: (n, 2) points, height, width."""
    for number in range(count):
        height, width = random.randint(1, 40, 2).tolist()
        points = random.uniform(-0.4, 1.4, (random.randint(3, 12), 2)) * [width, height]
        line, point = np.repeat(points[:2], 3, axis=0), points * 0 + points[0]
        kinds = points, np.rint(points), np.rint(2 * points) / 2, line, point, points - [width, 0]
        yield kinds[number % 6], height, width


def test_run_lengths_equal_pycocotools():
    random = np.random.RandomState(0)
    text = lambda rle: coco.text_of_counts(rle["counts"]).encode()
    for number, (points, height, width) in enumerate(outlines(random, 120)):
        ours = coco.polygon_to_rle(points, height, width)
        (theirs,) = mask.frPyObjects([points.ravel().tolist()], height, width)
        assert text(ours) == theirs["counts"]
        assert (coco.counts_of_text(theirs["counts"]) == ours["counts"]).all()
        several = [points.ravel().tolist(), blob(random, height, width), [1, 1, 5, 9, 0, 0]]
        theirs = mask.merge(mask.frPyObjects(several, height, width))
        assert text(coco.as_rle(several, height, width)) == theirs["counts"]
        share = (0, 1, *random.rand(4))[number % 6]
        pixels = random.rand(5, height, width) < share
        ours = [coco.encode_mask(one) for one in pixels]
        theirs = [mask.encode(np.asfortranarray(one, np.uint8)) for one in pixels]
        assert [text(rle) for rle in ours] == [rle["counts"] for rle in theirs]
        assert (np.stack([coco.decode_mask(rle) for rle in ours]) == pixels).all()
        union = coco.merge_rles(ours, height, width)
        assert (coco.decode_mask(union) == pixels.any(axis=0)).all()
        assert [coco.rle_area(rle) for rle in ours] == mask.area(theirs).tolist()
        assert [coco.rle_box(rle) for rle in ours] == [tight_box(one) for one in pixels]
        x, y, right, bottom = np.array([coco.rle_box(rle) for rle in ours]).T
        assert (np.stack([x, y, right - x, bottom - y], axis=1) == mask.toBbox(theirs)).all()
        crowd = random.rand(2) < 0.5
        iou = coco.mask_iou(ours[:3], ours[3:], crowd, np.ones((3, 2), dtype=bool))
        assert (iou == mask.iou(theirs[:3], theirs[3:], crowd.astype(int).tolist())).all()


def test_run_lengths_by_hand():
    """Down the columns; 2 x 3 pixels at (1, 2) of 6 x 5."""
    square = coco.as_rle([[1, 2, 4, 2, 4, 4, 1, 4]], 6, 5)
    assert square["counts"].tolist() == [8, 2, 4, 2, 4, 2, 8]
    # From the fourth on the difference from the one before the last: 8 2 4, 2 - 2, 4 - 4, ...
    assert coco.text_of_counts(square["counts"]) == "8240004"
    for counts in ([8, 2], "", "P", "!", None, 5, [2**70]):
        with pytest.raises(ValueError, match="run lengths of another picture than one of 5 x 6$"):
            coco.as_rle({"size": [6, 5], "counts": counts}, 6, 5)


def test_detections_are_drawn_beside_the_truth(tmp_path, capsys):
    scenes, path = make_scenes(tmp_path), str(tmp_path / "drawn.png")
    pictures_for(scenes, tmp_path)
    (tmp_path / scenes.files[1]).unlink()  # a grey tile
    whole = (tmp_path / scenes.files[2]).read_bytes()
    (tmp_path / scenes.files[2]).write_bytes(whole[: len(whole) // 2])  # one more

    def drawn(detections, count=6):
        """[(true, found)] of the pictures, each (200, 200, 3): two in a row, by hand."""
        coco.draw_detections(path, scenes, detections, count, side=200)
        pixels = np.array(Image.open(path))
        pairs, rows = min(count, 2), (count + 1) // 2
        assert pixels.shape == (22 + rows * 206, 2 * pairs * 206 + 6, 3)
        assert (pixels[:22, 6:60] == 0).any() and (pixels[:22, 212:260] == 0).any()  # titles
        places = [(22 + i // 2 * 206, 6 + i % 2 * 412) for i in range(count)]
        tiles = [(pixels[y:, x:], pixels[y:, x + 206 :]) for y, x in places]
        return [[tile[:200, :200] for tile in pair] for pair in tiles]

    def first(boxes, scores):
        labels = [0] * len(scores)
        found = {"boxes": boxes, "scores": scores, "labels": labels}
        return drawn({scenes.ids[0]: found}, count=1)[0][1]

    plain, full = drawn({}), drawn(make_detections(scenes))
    (alone,) = drawn({}, count=1)
    assert all((one == other).all() for one, other in zip(alone, plain[0]))
    for number, ((truth, nothing), (same, found)) in enumerate(zip(plain, full)):
        assert (truth == same).all()  # detections leave it
        assert (nothing[2, 30:50] == 255).any() and (found != nothing).any()
        objects = len(scenes.read(number)["labels"])
        assert (truth[17:] != nothing[17:]).any() == (objects > 0), number
    assert (plain[1][1][100, 100] == 128).all() and (plain[2][1][100, 30] == 128).all()
    assert (plain[0][1][100, 100] != 128).any()
    first([[9, 9, 1, 1.0]], [1.0])  # of results, perhaps
    boxes = [[5, 5, 30, 30.0], [20, 20, 35, 35.0], [1, 1, 9, 9.0]]
    one, same, two = (first(boxes, s) for s in ([0.2], [0.2, 0.1, 0.1], [0.4, 0.31]))
    assert (one != plain[0][1]).any() and (one == same).all()  # the best, or all of 0.3
    assert (two != one).any()
    assert f"wrote {path} (replaced)" in capsys.readouterr().out


def test_the_table(capsys):
    coco.print_table({"bbox_AP": 0.5, "bbox_APs": -1, "segm_AP": 0.25, "segm_APs": 1})
    head, boxes, masks = capsys.readouterr().out.splitlines()
    assert (head.split(), boxes.split()) == (["AP", "APs"], ["bbox", "50.00", "-"])
    assert masks.split() == ["segm", "25.00", "100.00"]
