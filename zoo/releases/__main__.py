"""Print the table of what was released, checkpoints.md."""

import argparse

from . import RELEASES, UNRELEASED, render

argparse.ArgumentParser(prog="python -m zoo.releases", description=__doc__).parse_args()
print(render(RELEASES, UNRELEASED), end="")
