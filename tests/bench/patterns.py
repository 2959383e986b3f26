"""What a classifier of the toy world answers where an object's pattern is another shape's.

    python tests/bench/patterns.py --checkpoint runs/classify/model.pt

Nine of ten objects have the pattern of their shape: who knows patterns alone is right in 91 % of
all pictures, and in none of those that are measured apart here.
"""

import common
import torch

import data
import evaluate
from support import toy


def main():
    parser = common.make_parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="of finetune.py --task classify")
    parser.add_argument("--pictures", type=int, default=4096, help="of the toy world, at most 4096")
    run = parser.parse_args()
    model, _ = evaluate.load_model(run.checkpoint, "classify", torch.device("cpu"))
    if model.config.get("class_names") != list(toy.TOY_CLASSES):
        raise SystemExit(f"{run.checkpoint} is no classifier of the toy world")
    source = data.open_sources("toy", size=model.config["image_size"])[1]
    source = data.Subset(source, range(run.pictures))
    answers = evaluate.extract({"": model}, source, model.config, 256)[0][""].argmax(dim=1)
    scenes = [toy.toy_scene(toy.TOY_VAL + number) for number in range(run.pictures)]
    largest = [(scene["objects"][0]["shape"], scene["objects"][0]["pattern"]) for scene in scenes]
    shape_of = {pattern: shape for shape, pattern in toy.TOY_OWN_PATTERN.items()}
    shapes = torch.tensor([toy.TOY_CLASSES.index(shape) for shape, _ in largest])
    patterns = torch.tensor([toy.TOY_CLASSES.index(shape_of[pattern]) for _, pattern in largest])
    own = shapes == patterns
    print(f"its own pattern       {own.sum():5} pictures  the shape {right(answers, shapes, own)}")
    shape, pattern = right(answers, shapes, ~own), right(answers, patterns, ~own)
    print(
        f"another shape's       {(~own).sum():5} pictures  the shape {shape}, the pattern {pattern}"
    )


def right(answers, classes, kept):
    return f"{(answers == classes)[kept].float().mean():.1%}"


if __name__ == "__main__":
    main()
