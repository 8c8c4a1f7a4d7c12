"""Composes configurations for tests that may not import what composes them.

python tests/composed.py < cases.json > composed.json

Takes a list of [model, phase, task] and gives for each what recipe=paper makes of it: the flat configuration, and which
of the recipe's keys are published and which chosen, as its table has it.
"""

import json
import sys

from recipes import papers
from recipes.config import compose, contents

DATA = {"classify": "imagenet", "segment": "ade20k", "detect": "coco"}


def main():
    found = []
    for model, phase, task in json.load(sys.stdin):
        case = [f"task={task}", f"data={DATA[task]}", f"model={model}", f"paper.phase={phase}"]
        recipe = papers.recipe(model, phase, task)
        keys, chosen = recipe.values.keys(), recipe.chosen
        kinds = {"published": sorted(keys - chosen), "chosen": sorted(chosen)}
        found.append({"cfg": contents.flat(compose(["recipe=paper", *case])), **kinds})
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
