"""Masks as run lengths (RLE), pixel for pixel as COCO's reference makes them, and COCO's and
LVIS's average precision.

RLE is {"size": [height, width], "counts": (m,) int64}: the lengths of runs of zeros and ones in
turn, down the columns, beginning with zeros.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import running_sum, to_mode
from support.launch import progress
from support.pictures import draw_grid, draw_line, legible, save, shorten

# -------------------------------------------------------------------------------------- run lengths


def encode_mask(mask):
    """(height, width) bool -> RLE."""
    pixels = mask.T.ravel()
    cuts = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    return rle_of_cuts(np.concatenate([[0] * int(mask[0, 0]), cuts]), *mask.shape)


def rle_of_cuts(cuts, height, width):
    """RLE of the sorted places at which a run begins."""
    counts = np.diff(np.concatenate([[0], cuts, [height * width]]).astype(np.int64))
    return {"size": [height, width], "counts": counts}


def decode_mask(rle):
    """RLE -> (height, width) bool."""
    (height, width), counts = rle["size"], rle["counts"]
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def polygon_to_rle(points, height, width):
    """(n, 2) x y -> RLE, by the reference's rule (rleFrPoly in COCO's maskApi.c).

    The outline is walked in steps of a fifth of a pixel, the corners rounded to such steps.
    Where it crosses a column's centre line, the mask begins or ends with the pixel below.
    """
    corners = (5 * points + 0.5).astype(np.int64)  # C's conversion: towards zero
    start, end = corners, np.roll(corners, -1, axis=0)
    reach = np.abs(end - start)
    steep = reach[:, 0] < reach[:, 1]
    along = steep.astype(np.int64)  # the axis with the most steps: 0 is x
    edge = np.arange(len(corners))
    # Edges are walked upwards, and listed backwards.
    flip = start[edge, along] > end[edge, along]
    low, high = (np.where(flip[:, None], *pair) for pair in ((end, start), (start, end)))
    steps = reach[edge, along]
    slope = (high - low)[edge, 1 - along] / np.maximum(steps, 1)
    which = np.repeat(edge, steps + 1)
    step = np.arange(len(which)) - np.repeat(np.cumsum(steps + 1) - steps - 1, steps + 1)
    step = np.where(flip[which], steps[which] - step, step)
    across = (low[edge, 1 - along][which] + slope[which] * step + 0.5).astype(np.int64)
    step = step + low[edge, along][which]
    x, y = np.where(steep[which], (across, step), (step, across))
    # Where x changes: the column between the two fifths, if its centre lies there.
    column = np.minimum(x[1:], x[:-1])
    crossed = (x[1:] != x[:-1]) & (column % 5 == 2) & (column >= 0) & (column < 5 * width)
    row = np.ceil((np.minimum(y[1:], y[:-1])[crossed] + 0.5) / 5 - 0.5).clip(0, height)
    places = column[crossed] // 5 * height + row.astype(np.int64)
    places, times = np.unique(places, return_counts=True)
    return rle_of_cuts(places[(times % 2 == 1) & (places < height * width)], height, width)


def polygons_of(segment):
    """COCO's polygons, lists of x1 y1 x2 y2 ..., -> (n, 2) arrays, if they have 3 points."""
    whole = (polygon[: len(polygon) // 2 * 2] for polygon in segment if len(polygon) > 5)
    return [np.array(polygon, dtype=float).reshape(-1, 2) for polygon in whole]


def has_mask(segment):
    """False for None, and for polygons of which none has 3 points."""
    if isinstance(segment, list):
        return any(len(polygon) > 5 for polygon in segment)
    return segment is not None


def merge_rles(rles, height, width):
    """The union of masks of one size; nothing of none."""
    if len(rles) == 1:
        return rles[0]
    cuts = [np.cumsum(rle["counts"])[:-1] for rle in rles]
    places = np.concatenate([*cuts, [0]]).astype(np.int64)
    change = np.concatenate([*(1 - 2 * (np.arange(len(c)) % 2) for c in cuts), [0]])
    places, inverse = np.unique(places, return_inverse=True)
    inside = np.cumsum(np.bincount(inverse, weights=change)) > 0
    turns = np.diff(inside, prepend=False)
    return rle_of_cuts(places[turns & (places < height * width)], height, width)


def as_rle(segment, height, width):
    """A segment (polygons, RLE as in files or here, bool, None) -> RLE. Raises ValueError."""
    if isinstance(segment, np.ndarray):
        return encode_mask(segment)
    if not isinstance(segment, dict):
        rles = [polygon_to_rle(points, height, width) for points in polygons_of(segment or [])]
        return merge_rles(rles, height, width)
    try:
        counts = segment["counts"]
        text = isinstance(counts, (str, bytes))
        counts = counts_of_text(counts) if text else np.asarray(counts, dtype=np.int64)
        wrong = list(segment["size"]) != [height, width] or counts.shape != (len(counts),)
    except (LookupError, TypeError, OverflowError):  # such as a text in which no count ends
        wrong = True
    if wrong or counts.sum() != height * width or (counts < 0).any():
        raise ValueError(f"run lengths of another picture than one of {width} x {height}")
    return {"size": [height, width], "counts": counts}


def text_of_counts(counts):
    """COCO's compressed run lengths.

    5 bits in a character from "0" on, the lowest first, with a sixth bit if more follow. From
    the fourth count on, the one before the last is subtracted.
    """
    values = counts.astype(np.int64, copy=True)
    values[3:] -= counts[1:-2]
    shifts = 5 * np.arange(13)
    more = (values[:, None] >= 16 << shifts[:-1]) | (values[:, None] < -16 << shifts[:-1])
    lengths = 1 + more.sum(axis=1)
    digits = (values[:, None] >> shifts) & 31
    digits[:, :-1] += 32 * more
    return (digits + 48)[np.arange(13) < lengths[:, None]].astype(np.uint8).tobytes().decode()


def counts_of_text(text):
    """The inverse of text_of_counts: str or bytes -> (m,) int64."""
    text = text.encode() if isinstance(text, str) else text
    digits = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(digits & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    shifts = 5 * (np.arange(ends[-1] + 1) - np.repeat(starts, lengths))
    counts = np.add.reduceat((digits[: ends[-1] + 1] & 31) << shifts, starts)
    counts -= np.where(digits[ends] & 16, 1 << 5 * lengths, 0)
    counts[1::2], counts[2::2] = np.cumsum(counts[1::2]), np.cumsum(counts[2::2])
    return counts


def rle_area(rle):
    return int(rle["counts"][1::2].sum())


def rle_box(rle):
    """x1 y1 x2 y2 around a mask, floats; zeros if it is empty."""
    height, ends = rle["size"][0], np.cumsum(rle["counts"])
    first, last = ends[:-1:2], ends[1::2] - 1  # of each run of ones
    first, last = first[last >= first], last[last >= first]
    if len(first) == 0:
        return 0.0, 0.0, 0.0, 0.0
    left, right = first[0] // height, last[-1] // height
    top, bottom = (first % height).min(), (last % height).max()
    if (first // height != last // height).any():  # a run over the end of a column
        top, bottom = 0, height - 1
    return float(left), float(top), float(right + 1), float(bottom + 1)


def box_iou(found, truth, crowd):
    """(D, 4), (G, 4) x1 y1 x2 y2, (G,) bool -> (D, G) IoU; of a crowd, shared / detection."""
    low = np.maximum(found[:, None, :2], truth[None, :, :2])
    high = np.minimum(found[:, None, 2:], truth[None, :, 2:])
    shared = (high - low).clip(0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (found, truth)]
    union = areas[0][:, None] + np.where(crowd, 0, areas[1] - shared)
    return shared / np.where(shared > 0, union, 1)


def mask_iou(found, truth, crowd, pairs):
    """IoUs of RLEs, (D, G), where `pairs` (D, G) bool is True; elsewhere 0. See box_iou.

    The running count of an object's ones is a broken line, straight between its cuts. Its
    value at the end of a detection's run, minus that at the start, is the number of ones that
    both have.
    """
    iou = np.zeros(pairs.shape)
    ends = [np.cumsum(rle["counts"]) for rle in found]
    areas = np.array([rle_area(rle) for rle in found])
    for g in np.flatnonzero(pairs.any(axis=0)):
        some, counts = np.flatnonzero(pairs[:, g]), truth[g]["counts"]
        cuts = np.cumsum(counts)
        ones = np.cumsum(np.where(np.arange(len(counts)) % 2, counts, 0))
        runs = [ends[d][: len(ends[d]) // 2 * 2] for d in some]
        inside = np.interp(np.concatenate(runs), cuts, ones)
        edges = running_sum([len(run) for run in runs])
        inside = running_sum(inside[1::2] - inside[::2])[edges // 2]
        shared = np.diff(inside)
        union = areas[some] + (0 if crowd[g] else ones[-1] - shared)
        iou[some, g] = shared / np.where(shared > 0, union, 1)
    return iou


# -------------------------------------------------------------------------------- average precision


THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the IoU, COCO's
RECALLS = np.linspace(0, 1, 101)
NOTHING = {"boxes": [], "scores": [], "labels": [], "masks": []}  # found in a picture
AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}


def average_precision(scenes, detections, kind="bbox"):
    """{"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", ...}, -1 where nothing counts.

    detections  {image id: {"boxes", "scores", "labels", "masks"}}, a row for each detection
    kind        "bbox" or "segm"

    As pycocotools or, for scenes with frequencies, lvis (with "APr", "APc", "APf"), to
    rounding. A detection is matched with the free object of its class and picture that it
    overlaps most, in the order of the scores (equal ones as they come). Crowds and objects
    outside the range of areas are matched last, and for nothing; objects without a mask, too,
    by their boxes, if kind is "segm" (the references have no rule for them). The best 100 of
    a picture and class count or, with LVIS, 300 of a picture, and only of classes known to be
    in it or not. The area of a detection is its mask's if kind is "segm" (the references':
    its box's, if given).
    """
    federated, classes = scenes.frequencies is not None, len(scenes.classes)
    limit = 300 if federated else 100
    truth, found, (of, to, iou) = pairs_of(scenes, detections, kind, limit)
    ranks = earlier_equals(found["group"])  # of a class in a picture, best first
    labels = found["group"] % classes
    order = np.lexsort((-found["score"], labels))  # equal scores stay in order
    by_class = np.split(order, np.searchsorted(labels[order], np.arange(1, classes)))
    precision = np.full((len(AREAS), classes, len(THRESHOLDS), len(RECALLS)), -1.0)
    recall = {most: np.full(precision.shape[:3], -1.0) for most in (1, 10, limit)}
    for a, (low, high) in enumerate(AREAS.values()):
        outside, ignored = ((x["area"] < low) | (x["area"] > high) for x in (found, truth))
        ignored |= truth["ignored"]
        matched = match_in_turn(ranks, of, to, iou, ignored, truth["crowd"])
        right = matched >= 0
        passed = (outside | found["free"])[:, None] & ~right
        if len(ignored):
            passed |= right & ignored[matched]
        right &= ~passed
        counts = np.bincount(truth["label"][~ignored], minlength=classes)
        for k in np.flatnonzero(counts):
            mine = by_class[k][ranks[by_class[k]] < limit]
            hits, misses = right[mine], ~right[mine] & ~passed[mine]
            for most, values in recall.items():
                values[a, k] = hits[ranks[mine] < most].sum(axis=0) / counts[k]
            hits, misses = np.cumsum(hits, axis=0), np.cumsum(misses, axis=0)
            best = hits / (hits + misses + np.spacing(1))
            # At this recall or a higher one.
            best = np.maximum.accumulate(best[::-1], axis=0)[::-1]
            best = np.concatenate([best, np.zeros((1, len(THRESHOLDS)))])
            for t, reached in enumerate(hits.T / counts[k]):
                precision[a, k, t] = best[np.searchsorted(reached, RECALLS), t]

    def mean(values):
        return float(values[values > -1].mean()) if (values > -1).any() else -1.0

    result = {"AP": mean(precision[0])}
    result |= {"AP50": mean(precision[0, :, 0]), "AP75": mean(precision[0, :, 5])}
    result |= {f"AP{name}": mean(precision[a]) for a, name in enumerate(AREAS) if name}
    if federated:
        rare = np.array(scenes.frequencies)
        result |= {f"AP{group}": mean(precision[0, rare == group]) for group in "rcf"}
    else:
        result |= {f"AR{most}": mean(recall[most][0]) for most in (1, 10)}
    result |= {f"AR{name or limit}": mean(recall[limit][a]) for a, name in enumerate(AREAS)}
    return result


def earlier_equals(values):
    """(n,) -> for each value, the number of equal values before it."""
    order = np.argsort(values, kind="stable")
    ordered, ranks = values[order], np.empty(len(values), dtype=np.int64)
    ranks[order] = np.arange(len(values)) - np.searchsorted(ordered, ordered)
    return ranks


def pairs_of(scenes, detections, kind, limit):
    """All objects, all detections (best first in each picture), and their pairs.

    Objects and detections are dicts of arrays. The pairs, of a class and picture, overlap by
    half: (detections' numbers, objects' numbers, IoU).
    """
    federated, classes = scenes.frequencies is not None, len(scenes.classes)
    if kind == "segm" and not scenes.has_masks:
        raise ValueError(f"{scenes.identity}: there are no masks to measure with")
    objects, founds, pairs, sums = [], [], [], [0, 0]
    numbers = range(int(scenes.sizes.sum()))
    for number in progress(numbers, len(numbers), f"measuring {kind}", " pictures"):
        sample = scenes.read(number)
        boxes, labels, crowd = sample["boxes"], sample["labels"], sample["crowd"]
        ignored = crowd = crowd & (not federated)  # LVIS has none
        found = detections.get(sample["image_id"], NOTHING)
        scores = np.asarray(found["scores"], dtype=np.float64)
        names = np.asarray(found["labels"], dtype=np.int64)
        order = np.argsort(-scores, kind="stable")
        free = np.zeros(len(order), dtype=bool)
        if federated:
            order = order[:limit]
            known = np.isin(names, [*sample["negative"], *labels])
            order = order[known[order]]
            free = np.isin(names[order], sample["not_exhaustive"])
        names, scores = names[order], scores[order]
        corners = np.asarray(found["boxes"], dtype=np.float64).reshape(-1, 4)[order]
        areas = (corners[:, 2:] - corners[:, :2]).prod(axis=1)
        same = names[:, None] == labels
        if kind == "segm":
            size = sample["size"]
            masks = [as_rle(found["masks"][i], *size) for i in order]
            areas = np.array([rle_area(mask) for mask in masks])
            corners = np.array([rle_box(mask) for mask in masks]).reshape(-1, 4)
            truth = [as_rle(segment, *size) for segment in sample["segments"]]
            maskless = np.array([not has_mask(s) for s in sample["segments"]], dtype=bool)
            tight = np.array([rle_box(mask) for mask in truth]).reshape(-1, 4)
            boxes, ignored = np.where(maskless[:, None], boxes, tight), crowd | maskless
        iou = box_iou(corners, boxes, crowd)
        if kind == "segm":
            both = (iou > 0) & same & ~maskless
            iou = np.where(maskless, iou, mask_iou(masks, truth, crowd, both))
        of, to = np.nonzero((iou >= THRESHOLDS[0]) & same)
        pairs.append((of + sums[0], to + sums[1], iou[of, to]))
        sums = [sums[0] + len(names), sums[1] + len(labels)]
        objects.append((labels, sample["areas"], crowd, ignored))
        founds.append((number * classes + names, areas, scores, free))
    truth, found, pairs = (map(np.concatenate, zip(*rows)) for rows in (objects, founds, pairs))
    truth = dict(zip(("label", "area", "crowd", "ignored"), truth))
    return truth, dict(zip(("group", "area", "score", "free"), found)), tuple(pairs)


def match_in_turn(ranks, of, to, iou, ignored, crowd):
    """(N, thresholds) int64: the object that each detection is matched with, or -1.

    All pictures and classes at once: first the best detection of each, then the second best.
    """
    matched = np.full((len(ranks), len(THRESHOLDS)), -1)
    taken = np.zeros((len(ignored), len(THRESHOLDS)), dtype=bool)
    # By rank and detection. The last is wanted most: not ignored, the largest IoU, the last.
    order = np.lexsort((to, iou, ~ignored[to], of, ranks[of]))
    of, to, iou = of[order], to[order], iou[order]
    for one in np.split(np.arange(len(of)), np.flatnonzero(np.diff(ranks[of])) + 1):
        if len(one) == 0:  # there are no pairs
            break
        free = (iou[one, None] >= THRESHOLDS) & ~(taken[to[one]] & ~crowd[to[one], None])
        starts = np.flatnonzero(np.diff(of[one], prepend=-1))
        choice = np.maximum.reduceat(np.where(free, one[:, None], -1), starts, axis=0)
        row, t = np.nonzero(choice >= 0)
        chosen = to[choice[row, t]]
        matched[of[one[starts[row]]], t] = chosen
        taken[chosen, t] = True
    return matched


def detection_numbers(scenes, found):
    """{"bbox_AP": ..., "segm_AP": ...} of detections: see average_precision."""
    with_masks = all(one["masks"] is not None for one in found.values())
    numbers = {}
    for kind in ["bbox"] + ["segm"] * (scenes.has_masks and with_masks):
        results = average_precision(scenes, found, kind)
        numbers |= {f"{kind}_{name}": value for name, value in results.items()}
    return numbers


def print_detection(scenes, found, path, count=8):
    """Print detection_numbers as a table, and draw the first pictures and detections."""
    print_table(detection_numbers(scenes, found))
    draw_detections(path, scenes, found, count)


def print_table(numbers):
    """Print {"bbox_AP": ..., "segm_AP": ...}: a row for each kind, in percent."""
    rows = {}
    for name, value in numbers.items():
        kind, _, metric = name.partition("_")
        rows.setdefault(kind, {})[metric] = f"{100 * value:.2f}" if value >= 0 else "-"
    print(" " * 6 + "".join(f"{metric:>7}" for metric in rows["bbox"]))
    for kind, cells in rows.items():
        print(f"{kind:6}" + "".join(f"{cell:>7}" for cell in cells.values()))


# ----------------------------------------------------------------------------------------- pictures


COLOURS = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8")
COLOURS += ("#f58231", "#42d4f4", "#f032e6", "#bfef45")


def draw_detections(path, scenes, detections, count=8, side=480):
    """Write a PNG of the first pictures, two in a row: each with its true objects, and beside
    it with the best detections.

    These are up to 10 with a score of at least 0.3, and always the first. A class has one
    colour. A picture that cannot be read is grey.
    """
    samples = [scenes.read(number) for number in range(min(count, len(scenes.sizes)))]
    pictures = [open_square(sample, side) for sample in samples]
    truth = [true_objects(sample) for sample in samples]
    found = [best_detections(detections.get(sample["image_id"], NOTHING)) for sample in samples]
    labels = {label for objects in truth + found for label, *_ in objects}
    names = legible({label: scenes.classes[label] for label in sorted(labels)})
    columns, pairs = [], min(2, len(samples))
    for first in range(pairs):
        for objects in (truth, found):
            chosen = list(zip(pictures, objects, samples))[first::pairs]
            drawn = [draw_objects(p, o, s["size"], names) for p, o, s in chosen]
            columns.append(drawn)
    save(draw_grid(columns, ["truth", "found"] * pairs), path)


def open_square(sample, side):
    """A sample's picture, scaled, in the upper left corner of a white square."""
    height, width = sample["size"]
    try:
        image = to_mode(sample["image"](), 3)
        image.load()  # here, if it was of this mode
    except Exception:  # noqa: BLE001 (decoders raise anything)
        image = Image.new("RGB", (width, height), "grey")
    square = Image.new("RGB", (side, side), "white")
    square.paste(image.resize(scaled(sample["size"], side), Image.Resampling.BICUBIC))
    return square


def scaled(size, side):
    """(height, width) of a picture -> its (width, height) where the longer one is `side`."""
    return tuple(max(1, round(side / max(size) * n)) for n in size[::-1])


def true_objects(sample):
    """What is drawn of a sample's objects: [(label, note, box (4,), segment or None)]."""
    columns = (sample[key] for key in ("labels", "crowd", "boxes", "segments"))
    return [
        (int(label), "crowd: " if crowd else "", box, segment)
        for label, crowd, box, segment in zip(*columns)
    ]


def best_detections(found):
    """What is drawn of a picture's detections, as true_objects: the best one last, on top."""
    scores, masks = np.asarray(found["scores"], dtype=np.float64), found.get("masks")
    shown = max(1, min(10, (scores >= 0.3).sum()))
    return [
        (int(found["labels"][i]), f"{scores[i]:.2f} ", found["boxes"][i], masks and masks[i])
        for i in np.argsort(-scores, kind="stable")[:shown][::-1]
    ]


def draw_objects(square, objects, size, names):
    """A copy of open_square's picture of (height, width) with its objects drawn into it.
    names: {label: (font, text)}."""
    square, side, plain, notes = square.copy(), square.width, ImageFont.load_default(13), []
    for label, note, box, segment in objects:
        colour = COLOURS[label % len(COLOURS)]
        if segment is not None:
            mask = Image.fromarray(np.uint8(110 * decode_mask(as_rle(segment, *size))))
            square.paste(colour, (0, 0), mask.resize(scaled(size, side)))
        corners = np.asarray(box).reshape(2, 2) * side / max(size)
        box = *corners.min(axis=0), *corners.max(axis=0)  # of results from elsewhere, perhaps
        ImageDraw.Draw(square).rectangle(box, outline=colour, width=2)
        name = shorten(names[label], side // 2)
        notes.append((colour, box[0], box[1] - 16, (plain, note), name))
    for note in notes or [("white", 0, 0, (plain, "nothing"))]:  # over all boxes
        draw_note(square, *note)
    return square


def draw_note(square, colour, x, y, *parts):
    """Draw (font, text)s on a ground of a colour, at x y or as near as the picture allows."""
    width = sum(font.getlength(text) for font, text in parts) + 4
    x, y = max(0, min(x, square.width - width)), max(0, min(y, square.height - 17))
    ImageDraw.Draw(square).rectangle((x, y, x + width, y + 16), fill=colour)
    draw_line(square, x + 2, y + 8, *parts)
