"""The models of the golden records, built as the published ones were, and what of their output a record holds.

Records of dense-prediction backbones hold, for logits, the means over space of their four normed features.
"""

import timm
import torch

import golden
import zoo  # noqa: F401  registers the models
from families import BUILT_WITH, RECORDS


def recorded(stem):
    """A record, with the name of its file and of our model."""
    return golden.load(golden.FOLDER / f"{stem}.json") | {"file": stem, "model": RECORDS[stem]}


def is_dense(stem):
    return stem.startswith(("seg_", "det_"))


def build(record, **kwargs):
    kwargs |= BUILT_WITH.get(record["file"], {})
    if is_dense(record["file"]):
        kwargs |= {"features_only": True, "feature_norms": True}
    return timm.create_model(record["model"], **kwargs).eval()


def pretrained(record, path, **kwargs):
    return build(record, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs)


def answer(model, record, x):
    out = model(x)
    return torch.cat([feature.mean((2, 3)) for feature in out], 1) if is_dense(record["file"]) else out
