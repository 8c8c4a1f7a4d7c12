"""Vision backbones whose attention is the interesting part. Importing this registers every model with timm."""

from . import (
    biformer,
    davit,
    dinat,
    dinats,
    gcvit,
    litv2,
    maxvit,
    sgformer,
    stvit,
)
from .backbone import Backbone
from .checkpoint import LoadReport, load_checkpoint
from .errors import CheckpointError, LicenceWarning
from .reader import Checkpoint, Description, describe, read
from .recognise import Recognition, identify, recognise
from .registry import variants
from .releases import RELEASES, Release
from .share import push_to_hub, save_for_hf

__all__ = [
    "RELEASES",
    "Backbone",
    "Checkpoint",
    "CheckpointError",
    "Description",
    "LicenceWarning",
    "LoadReport",
    "Recognition",
    "Release",
    "biformer",
    "davit",
    "describe",
    "dinat",
    "dinats",
    "gcvit",
    "identify",
    "litv2",
    "load_checkpoint",
    "maxvit",
    "push_to_hub",
    "read",
    "recognise",
    "save_for_hf",
    "sgformer",
    "stvit",
    "variants",
]
