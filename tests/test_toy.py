"""support/toy.py: scenes, their pictures, boxes and masks, and what is written about them."""

import hashlib
import json
import re
from collections import Counter

import numpy as np
from conftest import chi_square

from support import toy
from support.toy import TOY_CLASSES, TOY_COLOURS, TOY_VAL, toy_sample, toy_scene


def test_a_sample_is_a_pure_function_of_its_number():
    def content(number):
        sample = toy_sample(number)
        texts = sample["captions"](), sample["hashtags"](), sample["class"]
        return sample["image"]().tobytes(), sample["boxes"]().tolist(), texts

    numbers = [0, 1, 12345, TOY_VAL - 1, TOY_VAL, TOY_VAL + 7]
    contents = [content(number) for number in numbers]
    assert [content(number) for number in reversed(numbers)] == contents[::-1]
    assert len({image for image, *_ in contents}) == len(numbers)
    # And of nothing else: as in earlier versions.
    texts = json.dumps([[toy_scene(number), content(number)[2]] for number in range(20)])
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == "cbb80124d75f4a54"


def test_a_scene_is_the_same_at_any_size():
    """Boxes scale with the picture. The picture agrees with the smaller one on average."""
    for number in range(5):
        small, large = (toy_sample(number, size) for size in (48, 192))
        pixels = [np.asarray(large["image"]().reduce(4), float), np.asarray(small["image"]())]
        assert pixels[0].shape == pixels[1].shape == (48, 48, 3)
        assert np.abs(pixels[0] - pixels[1]).mean() < 6  # edges; seen: 3
        assert np.allclose(small["boxes"]() * 4, large["boxes"](), atol=1e-3)
        assert small["captions"]() == large["captions"]()


def test_classes_are_equally_frequent_and_are_the_largest_object_s_shape():
    scenes = [toy_scene(number) for number in range(2000)]
    for number, scene in enumerate(scenes[:200]):
        largest = max(scene["objects"], key=lambda thing: thing["radius"])
        assert TOY_CLASSES[toy_sample(number, 16)["class"]] == largest["shape"]
    firsts = Counter(scene["objects"][0]["shape"] for scene in scenes)
    assert set(firsts) == set(TOY_CLASSES) and chi_square(list(firsts.values())) < 1
    counts = Counter(len(scene["objects"]) for scene in scenes)
    assert set(counts) == {1, 2, 3} and min(counts.values()) > 20
    assert json.loads(json.dumps(scenes[0])) == scenes[0]  # scenes are plain values


def test_held_out_pairs_are_never_in_train_and_all_in_val():
    def pairs(first):
        scenes = (toy_scene(first + number) for number in range(3000))
        return {(thing["colour"], thing["shape"]) for scene in scenes for thing in scene["objects"]}

    every = {(colour, shape) for colour in TOY_COLOURS for shape in TOY_CLASSES}
    assert len(toy.TOY_HELD_OUT) >= 3 and pairs(TOY_VAL) == every
    assert pairs(0) == pairs(TOY_VAL - 3000) == every - toy.TOY_HELD_OUT


def test_boxes_masks_and_colours_are_those_of_what_is_drawn():
    for number in [*range(25), 2440, *range(TOY_VAL, TOY_VAL + 5)]:  # of 2440 overlap
        scene = toy_scene(number)
        image, boxes, masks = toy.toy_render(scene, 160)
        pixels, things = np.asarray(image), scene["objects"]
        assert masks.shape == (len(things), 160, 160) and boxes.dtype == np.float32
        assert masks.sum(axis=0).max() <= 1 and masks.any(axis=(1, 2)).all()
        assert boxes.min() >= 0 and boxes.max() <= 160
        for thing, mask, box in zip(things, masks, boxes, strict=True):
            # The object alone: its mask's extent is its box. The outermost 3 pixels of a sharp
            # corner are thinner than half a pixel, which is when a pixel counts as covered.
            _, (alone,), (whole,) = toy.toy_render({**scene, "objects": [thing]}, 160)
            rows, columns = whole.any(axis=1).nonzero()[0], whole.any(axis=0).nonzero()[0]
            extent = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            assert (alone == box).all() and np.abs(box - extent).max() <= 3
            assert not (mask & ~whole).any()
            assert thing["colour"] != scene["background"]["colour"]
            if thing["pattern"] == "plain":  # colours vary by 24 levels
                apart = np.median(pixels[mask], axis=0) - TOY_COLOURS[thing["colour"]]
                assert np.abs(apart).max() <= 25
        # Outside all masks there is background, but for pixels that an edge covers in part.
        empty, _, _ = toy.toy_render({**scene, "objects": []}, 160)
        changed, covered = (pixels != np.asarray(empty)).any(axis=2), masks.any(axis=0)
        near = np.lib.stride_tricks.sliding_window_view(np.pad(covered, 2), (5, 5)).any(axis=(2, 3))
        assert not (changed & ~near).any() and changed[covered].mean() > 0.95


def test_captions_and_hashtags_are_about_the_scene():
    true_tags = 0
    for number in range(100):
        scene, sample = toy_scene(number), toy_sample(number, 16)
        patterns = "|".join(["plain", *toy.TOY_PATTERNS])
        words = re.sub(f"({patterns}) ", "", *sample["captions"]())
        for thing in scene["objects"]:
            assert re.search(rf"\b{thing['colour']} {thing['shape']}\b", words)
        assert scene["background"]["colour"] in words.rpartition(" on ")[2]
        tags = sample["hashtags"]()
        assert tags and len(set(tags)) == len(tags)
        assert all(re.fullmatch("#[a-z0-9]+", tag) for tag in tags)
        true_tags += any(TOY_CLASSES[sample["class"]] in tag for tag in tags)
    assert 40 < true_tags <= 100  # noisy
