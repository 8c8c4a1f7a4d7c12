"""The tables of all families as one."""

from .biformer import BIFORMER
from .davit import DAVIT
from .dinat import DINAT
from .gcvit import GCVIT
from .litv2 import LITV2
from .maxvit import MAXVIT
from .sgformer import SGFORMER
from .stvit import STVIT
from .table import Release

RELEASES: tuple[Release, ...] = (*MAXVIT, *GCVIT, *DAVIT, *DINAT, *STVIT, *LITV2, *BIFORMER, *SGFORMER)
