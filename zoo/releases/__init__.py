"""What was released: one table, from which come timm's pretrained tags and `checkpoints.md`.

python -m zoo.releases > checkpoints.md
"""

from .families import RELEASES
from .lookup import candidates, find, preferred
from .render import render
from .table import Release, Unreleased
from .unreleased import UNRELEASED

__all__ = ["RELEASES", "UNRELEASED", "Release", "Unreleased", "candidates", "find", "preferred", "render"]
