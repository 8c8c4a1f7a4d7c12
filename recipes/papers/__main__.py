"""Print how the authors trained: the text of docs/recipes.md."""

import argparse

from ops.tool import tool
from recipes.papers.render import render


@tool
def main() -> None:
    argparse.ArgumentParser(prog="python -m recipes.papers", description=__doc__).parse_args()
    print(render(), end="")


if __name__ == "__main__":
    main()
