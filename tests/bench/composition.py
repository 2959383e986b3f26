"""What a pair of towers says of the toy world by names alone, unseen combinations included.

    python tests/bench/composition.py --checkpoint runs/lit/model.pt [--pictures 4096]

A scene's largest object is to be named: by its colour (of 8), its shape (of 10), or
both (of 80). Six of the 80 are in no picture or caption that was trained on: for these
also how often the right one comes first among the six.
"""

import common
import torch

import data
import evaluate
from support import toy
from tasks import lit


def main():
    parser = common.make_parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="of finetune.py --task lit")
    parser.add_argument("--pictures", type=int, default=4096, help="of the toy world")
    run = parser.parse_args()
    model, _ = evaluate.load_model(run.checkpoint, "zeroshot", torch.device("cpu"))
    tokenizer = lit.tokenizer_for(None, model.config["text"])
    source = data.open_sources("toy", size=model.config["image_size"])[1]
    source = data.Subset(source, range(run.pictures))
    embed = {"": lambda images: model(model.features(images))[0]}
    images = evaluate.extract(embed, source, model.config, 256)[0][""]
    scenes = [toy.toy_scene(toy.TOY_VAL + number) for number in range(run.pictures)]
    truth = [(s["objects"][0]["colour"], s["objects"][0]["shape"]) for s in scenes]
    colours, shapes = list(toy.TOY_COLOURS), list(toy.TOY_CLASSES)
    patterns = toy.TOY_OBJECT_PATTERNS  # captions name them between colour and shape

    def report(title, classes, answers, kept=range(run.pictures)):
        """classes: [pairs of colour and shape]; answers: the classes of the pictures `kept`."""
        names = [[f"{c} {p} {s}" for p in patterns for c, s in pairs] for pairs in classes]
        embeddings = lit.class_embeddings(model, names, ("a large {}",), tokenizer, "cpu")
        scores = images[kept] @ embeddings.T
        top1 = evaluate.accuracy(scores, torch.tensor(answers), 1)
        chance = 1 / len(classes)
        print(f"{title:34} {top1:7.2%}  {len(answers):5} pictures  chance {chance:.2%}")

    by_colour = [[(colour, shape) for shape in shapes] for colour in colours]
    by_shape = [[(colour, shape) for colour in colours] for shape in shapes]
    report("colour", by_colour, [colours.index(colour) for colour, _ in truth])
    report("shape", by_shape, [shapes.index(shape) for _, shape in truth])
    pairs = [(colour, shape) for colour in colours for shape in shapes]
    unseen = sorted(toy.TOY_HELD_OUT)
    report("colour and shape", [[p] for p in pairs], [pairs.index(pair) for pair in truth])
    kept = [i for i, pair in enumerate(truth) if pair in unseen]
    for classes in (pairs, unseen):
        title = f"both, of the six unseen, among {len(classes)}"
        report(title, [[p] for p in classes], [classes.index(truth[i]) for i in kept], kept)


if __name__ == "__main__":
    main()
