"""test_toy"""

import json
import re
from collections import Counter

import numpy as np
from conftest import chi_square

from support import toy

# ------------------------------------------------------------------------------------ the toy world

VAL = toy.TOY_VAL  # the first number of val


def same_sample(one, other):
    assert one["image"]().tobytes() == other["image"]().tobytes()
    assert (one["boxes"]() == other["boxes"]()).all()
    assert one["class"] == other["class"]
    assert all(one[k]() == other[k]() for k in ("captions", "hashtags"))


def test_a_toy_sample_is_a_pure_function_of_its_number():
    numbers = [0, 1, 12345, VAL - 1, VAL, VAL + 7]
    samples = [toy.toy_sample(number) for number in numbers]
    for number, sample in reversed(list(zip(numbers, samples))):
        same_sample(sample, toy.toy_sample(number))
    assert len({sample["image"]().tobytes() for sample in samples}) == len(numbers)


def test_a_toy_scene_is_the_same_at_any_size():
    """Boxes scale with the picture; the picture agrees with the smaller one on average."""
    for number in range(5):
        small, large = (toy.toy_sample(number, size) for size in (48, 192))
        assert small["image"]().size == (48, 48) and large["image"]().size == (192, 192)
        assert np.allclose(small["boxes"]() * 4, large["boxes"](), atol=1e-3)
        shrunk = np.asarray(large["image"]().reduce(4), np.float64)
        assert np.abs(shrunk - np.asarray(small["image"]())).mean() < 6  # edges; seen: 3
        assert small["captions"]() == large["captions"]()


def test_toy_classes_are_about_equally_frequent_and_are_the_largest_objects_shape():
    scenes = [toy.toy_scene(number) for number in range(2000)]
    classes = []
    for number, scene in enumerate(scenes[:200]):
        largest = max(scene["objects"], key=lambda thing: thing["radius"])
        classes.append(toy.toy_sample(number, 16)["class"])
        assert toy.TOY_CLASSES[classes[-1]] == largest["shape"]
    firsts = Counter(scene["objects"][0]["shape"] for scene in scenes)
    assert set(firsts) == set(toy.TOY_CLASSES)
    assert chi_square(list(firsts.values())) < 1
    counts = Counter(len(scene["objects"]) for scene in scenes)
    assert set(counts) == {1, 2, 3, 4} and min(counts.values()) > 20
    assert json.loads(json.dumps(scenes[0])) == scenes[0]  # scenes are plain values


def test_held_out_pairs_are_never_in_train_and_all_in_val():
    def pairs(first):
        scenes = (toy.toy_scene(first + number) for number in range(3000))
        return Counter((o["colour"], o["shape"]) for scene in scenes for o in scene["objects"])

    train, late, val = pairs(0), pairs(VAL - 3000), pairs(VAL)
    every = {(colour, shape) for colour in toy.TOY_COLOURS for shape in toy.TOY_CLASSES}
    assert len(toy.TOY_HELD_OUT) >= 3
    assert set(train) == set(late) == every - toy.TOY_HELD_OUT
    assert set(val) == every


def test_toy_boxes_and_masks_fit_what_is_drawn():
    size = 160
    for number in [*range(25), *range(VAL, VAL + 5)]:
        scene = toy.toy_scene(number)
        sample = toy.toy_sample(number, size)
        masks, boxes = sample["masks"](), sample["boxes"]()
        assert masks.shape == (len(scene["objects"]), size, size) and boxes.dtype == np.float32
        assert masks.sum(axis=0).max() <= 1 and masks.any(axis=(1, 2)).all()
        assert boxes.min() >= 0 and boxes.max() <= size
        for thing, mask, box in zip(scene["objects"], masks, boxes):
            # The object alone: its mask's extent is its box. The outermost 3 pixels of a sharp
            # corner are thinner than half a pixel, which is when a pixel counts as covered.
            _, (alone,), (whole,) = toy.toy_render({**scene, "objects": [thing]}, size, masks=True)
            rows, columns = whole.any(axis=1).nonzero()[0], whole.any(axis=0).nonzero()[0]
            extent = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            assert (alone == box).all() and np.abs(box - extent).max() <= 3
            assert not (mask & ~whole).any()
        # Outside all masks there is background, but for pixels that an edge covers in part.
        empty, _, _ = toy.toy_render({**scene, "objects": []}, size)
        changed = (np.asarray(sample["image"]()) != np.asarray(empty)).any(axis=2)
        covered = np.pad(masks.any(axis=0), 2)
        near = np.zeros((size, size), dtype=bool)
        for dy in range(5):
            for dx in range(5):
                near |= covered[dy : dy + size, dx : dx + size]
        assert not (changed & ~near).any()
        assert changed[masks.any(axis=0)].mean() > 0.95


def test_toy_objects_have_the_colour_that_they_are_named_after_and_not_the_backgrounds():
    for number in range(60):
        scene = toy.toy_scene(number)
        assert scene["background"]["colour"] not in {o["colour"] for o in scene["objects"]}
        sample = toy.toy_sample(number, 96)
        pixels = np.asarray(sample["image"]()).astype(np.int64)
        for thing, mask in zip(scene["objects"], sample["masks"]()):
            if thing["pattern"] == "plain":
                colour = np.median(pixels[mask], axis=0)
                named = np.array(toy.TOY_COLOURS[thing["colour"]])
                assert np.abs(colour - named).max() <= 25  # colours vary by 24 levels


def test_toy_captions_and_hashtags_speak_of_the_scene():
    true_tags = 0
    for number in range(100):
        scene, sample = toy.toy_scene(number), toy.toy_sample(number, 16)
        words = re.sub(r"(plain|striped|dotted|checked) ", "", *sample["captions"]())
        for thing in scene["objects"]:
            assert re.search(rf"\b{thing['colour']} {thing['shape']}\b", words)
        assert scene["background"]["colour"] in words.rpartition(" on ")[2]
        tags = sample["hashtags"]()
        assert tags and len(set(tags)) == len(tags)
        assert all(re.fullmatch("#[a-z0-9]+", tag) for tag in tags)
        shape = toy.TOY_CLASSES[sample["class"]]
        true_tags += any(shape in tag for tag in tags)
    assert 40 < true_tags <= 100  # noisy, but about the picture
