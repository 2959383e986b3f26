"""What a pair of towers says of the toy world by names alone, unseen combinations included.

    python tests/bench/composition.py --checkpoint runs/lit/model.pt [--pictures 4096]

A scene's largest object is to be named: by its colour (of 8), its shape (of 10), or both (of 80).
Six of the 80 are in no picture or caption that was trained on: for these also how often the right
one comes first among the six.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data
import evaluate
from support import toy
from tasks import lit


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--pictures", type=int, default=4096)
    run = parser.parse_args()
    model, _ = evaluate.load_model(run.checkpoint, "zeroshot", torch.device("cpu"))
    tokenizer = lit.tokenizer_for(None, model.config["text"])
    source = data.open_sources("toy", size=model.config["image_size"])[1]
    source = data.Subset(source, range(run.pictures))
    images, *_ = evaluate.extract(
        {"": lambda images: model(model.features(images))[0]}, source, model.config, 256
    )
    scenes = [toy.toy_scene(toy.TOY_VAL + number) for number in range(run.pictures)]
    truth = [(s["objects"][0]["colour"], s["objects"][0]["shape"]) for s in scenes]

    def report(title, names, answers, kept=None):
        """names: of each class; answers: the classes of the pictures `kept`."""
        templates = ("a large {}",)
        embeddings = lit.class_embeddings(model, names, templates, tokenizer, "cpu")
        scores = (images[""] if kept is None else images[""][kept]) @ embeddings.T
        top1, chance = evaluate.accuracy(scores, torch.tensor(answers), 1), 1 / len(names)
        print(f"{title:34} {top1:7.2%}  {len(answers):5} pictures  chance {chance:.2%}")

    colours, shapes = list(toy.TOY_COLOURS), list(toy.TOY_CLASSES)
    patterns = dict.fromkeys(toy.TOY_TEXTURES)  # captions say them between colour and shape
    pairs = [(colour, shape) for colour in colours for shape in shapes]

    def names_of(pairs):
        return [[f"{colour} {pattern} {shape}" for pattern in patterns] for colour, shape in pairs]

    by_colour = [[f"{c} {p} {s}" for p in patterns for s in shapes] for c in colours]
    by_shape = [[f"{c} {p} {s}" for p in patterns for c in colours] for s in shapes]
    report("colour", by_colour, [colours.index(colour) for colour, _ in truth])
    report("shape", by_shape, [shapes.index(shape) for _, shape in truth])
    report("colour and shape", names_of(pairs), [pairs.index(pair) for pair in truth])
    unseen = sorted(toy.TOY_HELD_OUT)
    kept = [i for i, pair in enumerate(truth) if pair in toy.TOY_HELD_OUT]
    report(
        "both, of the six unseen, among 80",
        names_of(pairs),
        [pairs.index(truth[i]) for i in kept],
        kept,
    )
    report(
        "both, of the six unseen, among 6",
        names_of(unseen),
        [unseen.index(truth[i]) for i in kept],
        kept,
    )


if __name__ == "__main__":
    main()
