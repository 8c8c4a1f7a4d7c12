"""Dense prediction on any backbone of the zoo and any timm model with `features_only`: `segmenter` and `detector`.

`zoo.load_checkpoint` reads released models of mmsegmentation and mmdetection into them; `zoo.heads.detection` says what
is exact.
"""

from .detection import Detector, detector
from .segmenter import Segmenter, segmenter

__all__ = ["Detector", "Segmenter", "detector", "segmenter"]
