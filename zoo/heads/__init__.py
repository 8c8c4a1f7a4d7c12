"""Dense prediction on any backbone of the zoo and any timm model with `features_only`: `segmenter` and `detector`.

`zoo.load_checkpoint` reads released models of mmsegmentation and mmdetection into them; `zoo.heads.detection` says what
is exact. Detection needs torchvision, which is imported with the first detector.
"""

from typing import Any

from .segmenter import Segmenter, segmenter

__all__ = ["Detector", "Segmenter", "detector", "segmenter"]


def __getattr__(name: str) -> Any:
    if name in ("Detector", "detector"):
        from . import detection

        return getattr(detection, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
