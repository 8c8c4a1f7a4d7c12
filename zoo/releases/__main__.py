"""Print the table of what was released, checkpoints.md."""

import argparse

from ops.tool import tool

from . import RELEASES, UNRELEASED, render


@tool
def main() -> None:
    argparse.ArgumentParser(prog="python -m zoo.releases", description=__doc__).parse_args()
    print(render(RELEASES, UNRELEASED), end="")


if __name__ == "__main__":
    main()
