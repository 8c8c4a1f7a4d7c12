"""Print how the authors trained: the text of docs/recipes.md."""

import argparse

from recipes.papers.render import render

argparse.ArgumentParser(prog="python -m recipes.papers", description=__doc__).parse_args()
print(render(), end="")
