"""The columns of the table of releases."""

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ..costs import GFLOPS, PARAMETERS

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INCEPTION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IN1K, IN21K, IN21K_FT = "ImageNet-1k", "ImageNet-21k", "ImageNet-21k, then 1k"
COCO, ADE20K = "COCO", "ADE20K"
# as file names spell the letters of our sizes
WORDS = {"m": "mini", "t": "tiny", "s": "small", "b": "base", "l": "large", "xl": "xlarge"}
SUFFIXES = (".pth.tar", ".pth", ".pt", ".bin", ".safetensors", ".ckpt", ".pkl")
NOT_COMMERCIAL = re.compile(r"\bnc\b|non-?commercial", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Release:
    """One published set of weights, or one that was published in a form that is not ours to load.

    model       our variant that holds it, or its trunk; the source's own name where none of ours does
    tag         "<source>_<data>", the second half of timm's `model.tag`; "" where it is no classifier of ours
    source      who trained or ported it
    data        what it was trained on, in order
    task        "classification", "detection", "segmentation" or "features"
    method      for dense prediction the head and the schedule, "Mask R-CNN 3x"
    metrics     published figures in percent by name, the headline first: top1, top5, box_ap, mask_ap, miou, miou_ms
                (several scales), pq; of the ImageNet-1k validation set, or of `benchmark`
    img_size    pixels a side that it was trained and evaluated at, None where that varies
    test_size   (short side, most of the long side) that a detector is evaluated at, where the source states it; of a
                segmenter only where these are not `img_size` and four times that
    params, gflops  10^6 parameters and 10^9 multiply-adds for one image: of a variant counted and as its authors print
                them, of anything else (heads, other classes or pixels, a port that counts otherwise) as the source says
    url, hub_id where it is; a hub id is preferred for loading
    file        its name as downloaded, where the URL does not say it; in a repository of the hub, which file of it
    by_hand     `url` is a page for a browser: the file is loaded once it has been downloaded there
    mirrors     other addresses of the same file
    dead        addresses that once led to it, and were reported not to
    seen        what else is known of the link; none was opened for this table
    sha256      of the file, whole or its first digits, where a source gives it; `size` in bytes likewise
    wrapper     the key that holds the weights in the file, "" for a bare state dict, None where that is not known
    weights     "raw" or "ema": which entry of the file the published figure belongs to
    layout      the name of the layout of its file in `zoo/layouts`
    verified    whether that layout was compared with a list of names that its source wrote
    licence, code_licence  of the weights and of the code beside them as the source states them, None where it does not
    stats       (mean, std) of the normalisation, on the scale 0..1
    crop_pct, crop_mode, interpolation  evaluation preprocessing as timm names it; "squash" ignores the aspect ratio; no
                crop_pct where the source does not say how it evaluates
    arguments   of the model beside its name, where the weights were trained with others and do not show it
    foreign     why it is not ours to load, "" if it is
    note        what else matters
    """

    model: str
    source: str
    data: str
    url: str
    licence: str | None
    code_licence: str | None
    img_size: int | None = None
    tag: str = ""
    task: str = "classification"
    method: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    test_size: tuple[int, int] | None = None
    params: float | None = None
    gflops: float | None = None
    hub_id: str | None = None
    file: str = ""
    by_hand: bool = False
    mirrors: tuple[str, ...] = ()
    dead: tuple[str, ...] = ()
    seen: str = ""
    sha256: str | None = None
    size: int | None = None
    wrapper: str | None = ""
    weights: str = "raw"
    layout: str = ""
    verified: bool = True
    num_classes: int = 1000
    stats: tuple[tuple[float, float, float], tuple[float, float, float]] = IMAGENET
    crop_pct: float | None = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    foreign: str = ""
    note: str = ""

    @property
    def name(self) -> str:
        """`model.tag` as timm names it, or the model alone."""
        return f"{self.model}.{self.tag}" if self.tag else self.model

    @property
    def loadable(self) -> bool:
        """Whether it is one of timm's pretrained tags here."""
        return bool(self.tag)

    @property
    def noncommercial(self) -> bool:
        """Whether the stated licence of the weights forbids commercial use."""
        return bool(NOT_COMMERCIAL.search(self.licence or ""))

    @property
    def top1(self) -> float | None:
        """Published ImageNet-1k top-1 in percent."""
        return self.metrics.get("top1")

    @property
    def benchmark(self) -> str:
        """The data whose validation images `metrics` are of."""
        return IN1K if self.task == "classification" else self.data.rpartition(", then ")[2]

    @property
    def filename(self) -> str:
        """The name of the file as downloaded; "" where that is not known, or generic as in a hub repository."""
        last = posixpath.basename(urlsplit(self.url).path)
        return self.file or (last if last.endswith(SUFFIXES) else "")

    def cfg(self) -> dict[str, Any]:
        """The release as entries of timm's pretrained configuration."""
        mean, std = self.stats
        where = {"hf_hub_id": self.hub_id, "hf_hub_filename": self.file or None} if self.hub_id else {"url": self.url}
        return ({} if self.by_hand else where) | {
            "input_size": (3, self.img_size, self.img_size),
            "num_classes": self.num_classes,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
            "interpolation": self.interpolation,
            "mean": mean,
            "std": std,
            "license": self.licence,
            "origin_url": self.url,
        }


def cost(model: str, **stated: float | None) -> dict[str, float]:
    """`params` and `gflops` of a variant, but for what the source of a release states."""
    return {"params": PARAMETERS[model] / 1e6, "gflops": GFLOPS[model]} | named(**stated)


def named(**metrics: float | None) -> dict[str, float]:
    """The figures that there are, for `Release.metrics`."""
    return {name: value for name, value in metrics.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Unreleased:
    """Figures that were published without weights; the columns are those of `Release`.

    model   a variant of ours, or the family alone where it is not said which
    source  where the figures stand
    """

    model: str
    data: str
    source: str
    metrics: Mapping[str, float] = field(hash=False)
    img_size: int | None = None
    task: str = "classification"
    method: str = ""
    params: float | None = None
    gflops: float | None = None
