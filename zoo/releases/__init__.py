"""What was released: one table, from which come timm's pretrained tags and `checkpoints.md`.

python -m zoo.releases > checkpoints.md
"""

from .biformer import BIFORMER
from .davit import DAVIT
from .dinat import DINAT
from .gcvit import GCVIT
from .litv2 import LITV2
from .maxvit import MAXVIT
from .sgformer import SGFORMER
from .stvit import STVIT
from .table import Release, render

RELEASES: tuple[Release, ...] = (*MAXVIT, *GCVIT, *DAVIT, *DINAT, *STVIT, *LITV2, *BIFORMER, *SGFORMER)

__all__ = ["RELEASES", "Release", "render"]
