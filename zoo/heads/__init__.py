"""Heads for dense prediction over any backbone of the zoo and any timm model with `features_only`."""

from .segmenter import Segmenter, segmenter

__all__ = ["Segmenter", "segmenter"]
