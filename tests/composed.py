"""Composes configurations for tests that may not import what composes them.

python tests/composed.py < cases.json > composed.json

Takes a list of [model, phase] and gives for each what recipe=paper makes of it: the flat configuration, and which of
its values are marked as chosen.
"""

import json
import sys

from recipes import papers
from recipes.config import checks, compose


def main():
    found = []
    for model, phase in json.load(sys.stdin):
        cfg = compose(["recipe=paper", f"model={model}", f"paper.phase={phase}", "data=imagenet"])
        found.append({"cfg": checks.flat(cfg), "chosen": sorted(papers.chosen(model, phase))})
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
