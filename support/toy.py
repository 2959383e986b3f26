"""The toy world behind --data toy: an endless set of pictures, drawn when they are read.

A sample is a pure function of its number: a scene of 1 to 3 coloured, patterned shapes on
a muted background. The class is the shape of the largest object, which fills most of the
picture. Nine of ten objects have the pattern of their shape, as zebras have stripes: the
pattern alone would give 91 % of the classes. All else varies.
"""

import math

import numpy as np
from PIL import Image

from data import TOY, Source, random_bits, uniform

TOY_VERSION = 2  # a run does not go on with the pictures of another one
TOY_EPOCH = 65_536  # pictures in an epoch
# The first number of val: smaller ones are train. (The scenes and the recipes, but for
# video's length and detect's lr, were chosen on pictures from 2**31 on: those of val are new.)
TOY_VAL = 3 * 2**30
TOY_DRAWS = 100  # uniform draws for a scene: background 12, an object at most 24


def _fold(t, n):
    """The angle between t and the nearest of n equal spokes; one points up (-y)."""
    return (t + math.pi / 2 + math.pi / n) % (2 * math.pi / n) - math.pi / n


# A shape: the distance from its centre to its edge, at most 1, in direction t (radians).
TOY_SHAPES = {
    "circle": lambda t: 0.8 + 0 * t,
    "square": lambda t: 0.7 / np.cos(_fold(t, 4)),
    "triangle": lambda t: 0.5 / np.cos(_fold(t + math.pi, 3)),
    "star": lambda t: 1 / (1 + 7.5 * abs(_fold(t, 5)) / math.pi),
    "cross": lambda t: 0.32 / np.sin(abs(_fold(t, 4))).clip(0.32),
    "flower": lambda t: 0.72 + 0.28 * np.cos(6 * t),
    "gear": lambda t: 0.83 + 0.14 * np.tanh(4 * np.cos(8 * t)),
    "leaf": lambda t: 0.42 / np.sqrt(1 - 0.82 * np.cos(t) ** 2),
    "hourglass": lambda t: np.where(abs(_fold(t, 2)) < 0.75, 0.72 / np.cos(_fold(t, 2)), 0.15),
    "pie": lambda t: np.where(abs(_fold(t, 1)) < 0.7, 0.12, 0.9),
}
TOY_CLASSES = tuple(TOY_SHAPES)

TOY_COLOURS = {
    "red": (216, 36, 40), "orange": (244, 138, 28), "yellow": (248, 220, 48),
    "green": (44, 160, 60), "cyan": (60, 200, 214), "blue": (40, 72, 204),
    "purple": (124, 44, 160), "pink": (246, 140, 186),
}  # fmt: skip

# A pattern, other than "plain": the share of the second colour, cut at 0 and 1. It depends on the
# place (u to the right, v down, in wavelengths) and on a wave (-1 .. 1) along each, a and b.
# The factors make edges a few pixels wide: hard edges would shimmer in smaller pictures.
TOY_PATTERNS = {
    "striped": lambda a, b, u, v: 0.5 + 2.5 * a,
    "dotted": lambda a, b, u, v: 2.5 * (a + b - 0.75),
    "checked": lambda a, b, u, v: 0.5 + 3.5 * a * b,
    "ringed": lambda a, b, u, v: 0.5 + 2.5 * np.cos(2 * math.pi * np.hypot(u, v)),
    "rayed": lambda a, b, u, v: 0.5 + 3.5 * np.hypot(u, v) * np.cos(4 * np.arctan2(v, u)),
    "netted": lambda a, b, u, v: 5 * (np.maximum(a, b) - 0.65),
    "waved": lambda a, b, u, v: 0.5 + 2.5 * np.sin(2 * math.pi * (v + 0.25 * a)),
    "cored": lambda a, b, u, v: 4 * (0.75 - np.hypot(u, v)),
    "halved": lambda a, b, u, v: 0.5 + 5 * u,
    "shaded": lambda a, b, u, v: 0.5 + 0.13 * u,
}
TOY_BACKGROUNDS = ("plain", "shaded", "shaded")
# The pattern of nine in ten objects of a shape. The tenth has any pattern.
TOY_OWN_PATTERN = {
    "circle": "rayed", "square": "checked", "triangle": "striped", "star": "plain",
    "cross": "netted", "flower": "cored", "gear": "ringed", "leaf": "waved",
    "hourglass": "halved", "pie": "dotted",
}  # fmt: skip
TOY_OBJECT_PATTERNS = tuple(TOY_OWN_PATTERN.values())

# No train scene has one of these objects. Val scenes have them as often as any others: a
# model that knows them has composed them, not remembered them.
TOY_HELD_OUT = frozenset({
    ("red", "star"), ("yellow", "flower"), ("green", "circle"),
    ("blue", "cross"), ("purple", "leaf"), ("pink", "square"),
})  # fmt: skip

TOY_SPAM = ("#love", "#nofilter", "#art", "#follow")
TOY_SPAM += ("#instagood", "#monday", "#design", "#wow")


def toy_scene(number):
    """The scene of a sample as values for JSON. Lengths are fractions of the picture's side.

    {"background": paint, "objects": [paint, with "shape", "radius", "centre" (x, y) and
    "angle" in radians]}. The largest object is the first. Objects are drawn in order, so
    that small ones lie in front. An object's texture moves with its "centre".

    A paint is {"pattern", "colour": name, "one", "two": RGB, "turn": angle of the pattern,
    "wave": its length, "shift": of its two waves}.
    """
    draws = iter(uniform(random_bits(TOY_DRAWS, 0, 0, number, TOY)).tolist())

    def between(low, high):
        return low + (high - low) * next(draws)

    def pick(options):
        return options[int(next(draws) * len(options))]

    def paint(patterns, colours, strength):
        pattern, colour = pick(patterns), pick(colours)
        one = [min(255, max(0, round(c + between(-24, 24)))) for c in TOY_COLOURS[colour]]
        goal, strength = pick((0, 255)), between(*strength)  # a darker or lighter shade
        two = [round(c + strength * (goal - c)) for c in one]
        return {"pattern": pattern, "colour": colour, "one": one, "two": two}

    background = paint(TOY_BACKGROUNDS, list(TOY_COLOURS), (0.15, 0.35))
    for shade in ("one", "two"):  # near a middle grey: objects are brighter, darker or stronger
        background[shade] = [round(122 + 0.4 * (c - 128)) for c in background[shade]]
    background |= {"turn": between(0, 2 * math.pi), "wave": 0.28 * between(0.8, 1.4)}
    background["shift"] = [between(-1, 1), between(-1, 1)]

    # An object and its background differ in colour.
    colours, objects = [c for c in TOY_COLOURS if c != background["colour"]], []
    for _ in range(pick((1, 1, 1, 1, 2, 3))):
        shape = pick(TOY_CLASSES)
        allowed = [c for c in colours if number >= TOY_VAL or (c, shape) not in TOY_HELD_OUT]
        # The first one fills some 75 % of the picture's side, others at most 40 % of that.
        radius = between(0.35, 0.41) if not objects else between(0.28, 0.4) * objects[0]["radius"]
        angle = between(-0.12, 0.12)
        own = next(draws) < 0.9
        patterns = (TOY_OWN_PATTERN[shape],) if own else TOY_OBJECT_PATTERNS
        thing = {"shape": shape, "radius": radius, "angle": angle}
        thing |= paint(patterns, allowed, (0.35, 0.55))
        thing |= {"turn": angle, "wave": 0.6 * radius * between(0.9, 1.1), "shift": [0, 0]}
        if not objects:
            thing["centre"] = [between(0.44, 0.56), between(0.44, 0.56)]
            objects.append(thing)
            continue
        # Of six places, the farthest from all objects that are there.
        places = [[between(radius, 1 - radius) for _ in "xy"] for _ in range(6)]
        gap, thing["centre"] = max((free_space(place, radius, objects), place) for place in places)
        if gap > -0.4 * radius:  # else it would hide another object
            objects.append(thing)
    return {"background": background, "objects": objects}


def free_space(place, radius, objects):
    """The gap between an object at a place and its nearest neighbour."""
    return min(math.dist(place, o["centre"]) - radius - o["radius"] for o in objects)


def toy_render(scene, size=64):
    """Draw a scene: (RGB image of size x size, boxes, masks).

    boxes  (objects, 4) float32, x1 y1 x2 y2 in pixels: the extent of an object, with the
           parts that another one hides, cut at the edge of the picture
    masks  (objects, size, size) bool, the visible pixels
    """
    y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5) / size  # centres of pixels

    def painted(paint, x, y):  # (h, w) each, relative to the object's centre -> (h, w, 3)
        one, two = np.float32(paint["one"]), np.float32(paint["two"])
        if paint["pattern"] == "plain":
            return np.broadcast_to(one, (*x.shape, 3))
        turn, wave = paint["turn"], paint["wave"]
        cos, sin = math.cos(turn) / wave, math.sin(turn) / wave
        waves = x * cos + y * sin, y * cos - x * sin
        a, b = (np.sin(2 * math.pi * (w + s)) for w, s in zip(waves, paint["shift"]))
        mix = TOY_PATTERNS[paint["pattern"]](a, b, *waves).clip(0, 1)[..., None]
        return one + mix * (two - one)

    picture = painted(scene["background"], x - 0.5, y - 0.5).copy()
    boxes, masks = [], np.zeros((len(scene["objects"]), size, size), dtype=bool)
    for number, thing in enumerate(scene["objects"]):
        outline, radius, centre = TOY_SHAPES[thing["shape"]], thing["radius"], thing["centre"]
        t = np.linspace(0, 2 * math.pi, 96, endpoint=False)
        edge = np.stack([np.cos(t), np.sin(t)]) * outline(t - thing["angle"]) * radius
        box = (np.concatenate([edge.min(axis=1), edge.max(axis=1)]) + centre * 2) * size
        boxes.append(box.clip(0, size))
        # Draw within the window around the object only: most objects are small.
        (left, top), (right, bottom) = np.floor(boxes[-1]).astype(int).reshape(2, 2) + [[0], [1]]
        window = np.s_[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1]
        u, v = x[window] - centre[0], y[window] - centre[1]
        reach = outline(np.arctan2(v, u) - thing["angle"]) * radius - np.hypot(u, v)
        inside = (reach * size + 0.5).clip(0, 1)  # the edge is one pixel wide
        picture[window] += inside[..., None] * (painted(thing, u, v) - picture[window])
        for mask in masks[:number]:
            mask[window] &= inside <= 0.5
        masks[number][window] = inside > 0.5
    image = Image.fromarray(picture.round().astype(np.uint8))
    return image, np.array(boxes, dtype=np.float32), masks


def toy_phrases(scene):
    """A phrase for each object, "large red striped star", and "plain green ground"."""
    phrases, sizes = [], ("small", "medium", "large")
    for thing in scene["objects"]:
        size = sizes[(thing["radius"] > 0.13) + (thing["radius"] > 0.18)]
        phrases.append(f"{size} {thing['colour']} {thing['pattern']} {thing['shape']}")
    ground = scene["background"]
    return [*phrases, f"{ground['pattern']} {ground['colour']} ground"]


def toy_hashtags(scene, number):
    """Noisy tags, as people write them: some true ones are missing, one is about nothing.

    True ones name what a thing is (#star) more often than how it looks (#red, #striped, #redstar),
    and at times the ground (#greenground).
    """
    chance = iter(uniform(random_bits(64, 0, 1, number, TOY)).tolist())  # the scene's have epoch 0
    tags = []
    for thing in scene["objects"]:
        shape, colour, pattern = thing["shape"], thing["colour"], thing["pattern"]
        tags += [(shape, 0.8), (colour, 0.5), (pattern, 0.3), (colour + shape, 0.3)]
    tags.append((scene["background"]["colour"] + "ground", 0.2))
    kept = [f"#{tag}" for tag, share in tags if next(chance) < share]
    return list(dict.fromkeys([*kept, TOY_SPAM[int(next(chance) * len(TOY_SPAM))]]))  # each once


def toy_sample(number, size=64):
    """A sample as a source gives it, with functions for "boxes" and "masks" (see toy_render)
    and "labels", the class of each object. The picture's class is object 0's, the largest."""
    scene = toy_scene(number)
    *things, ground = toy_phrases(scene)
    labels = [TOY_CLASSES.index(thing["shape"]) for thing in scene["objects"]]
    return {
        "image": lambda: toy_render(scene, size)[0],
        "boxes": lambda: toy_render(scene, size)[1],
        "masks": lambda: toy_render(scene, size)[2],
        "class": labels[0],
        "labels": labels,
        "hashtags": lambda: toy_hashtags(scene, number),
        "captions": lambda: [f"a {' and a '.join(things)} on {ground}"],
    }


class Toy(Source):
    """The source of toy_sample's pictures. Its epoch is a number that was chosen.

    split  "train" or "val"
    size   (height, width) of the pictures to train on: they are drawn somewhat larger
    """

    endless = True

    def __init__(self, split, size):
        self.first = 0 if split == "train" else TOY_VAL
        self.sides = size
        self.size = max(size) * 4 // 3  # so that crops are not enlarged
        count = TOY_EPOCH if split == "train" else TOY_EPOCH // 16
        self.sizes = np.ones(count, dtype=np.int64)
        self.classes = list(TOY_CLASSES)
        self.identity = f"toy world {TOY_VERSION}, {len(self.sizes)} pictures an epoch"

    def read(self, number):
        return toy_sample(self.first + number, self.size)

    def name(self, number):
        return f"toy:{self.first + number}"

    where = name
