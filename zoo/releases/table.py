"""The columns of the table of releases, and its rendering."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INCEPTION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Release:
    """One published set of weights, or one that was published in a form that is not ours to load.

    model       our variant that holds it
    tag         "<source>_<data>", the second half of timm's `model.tag`
    source      who trained or ported it
    data        what it was trained on, in order
    img_size    pixels a side that it was evaluated at, None where that varies
    top1        published ImageNet-1k top-1 in percent, None where there is none
    url, hub_id where it is; a hub id is preferred for loading
    by_hand     `url` is a page for a browser: the file is loaded once it has been downloaded there
    licence     of the weights, as its source states it
    stats       (mean, std) of the normalisation, on the scale 0..1
    crop_pct, crop_mode, interpolation  evaluation preprocessing as timm names it
    layout      the name of the layout of its file in `zoo/layouts`
    weights     "raw" or "ema": which entry of the file the published figure belongs to
    sha256      first digits of the file's SHA-256, where the source gives them
    loadable    False: listed only; `note` says why
    """

    model: str
    tag: str
    source: str
    data: str
    img_size: int | None
    top1: float | None
    url: str
    licence: str
    hub_id: str | None = None
    by_hand: bool = False
    num_classes: int = 1000
    stats: tuple[tuple[float, float, float], tuple[float, float, float]] = IMAGENET
    crop_pct: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    layout: str = ""
    weights: str = "raw"
    sha256: str | None = None
    task: str = "classification"
    loadable: bool = True
    note: str = ""

    def cfg(self) -> dict[str, Any]:
        """The release as entries of timm's pretrained configuration."""
        mean, std = self.stats
        where = {"hf_hub_id": self.hub_id} if self.hub_id else {"url": self.url}
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


HEADER = """\
# Checkpoints

Every set of weights that was released for the families of this zoo, rendered from the table in `zoo/releases`
(`python -m zoo.releases > checkpoints.md`).

`timm.create_model("<name>", pretrained=True)` after `import zoo` downloads a row whose name has the form `model.tag`.
A file that you have is loaded with `pretrained_cfg_overlay=dict(file="...")`, or evaluated with
`python eval.py model=<model> checkpoint=<file>`. Top-1 is the figure that the source published for ImageNet-1k, in
percent, with the preprocessing in the row.
"""


def render(releases: Iterable[Release]) -> str:
    """The table as Markdown: a section a source, what loads before what does not."""
    out = [HEADER]
    key = lambda r: (r.model.split("_")[0], not r.loadable, r.source)  # noqa: E731
    for (family, missing, source), rows in groupby(sorted(releases, key=key), key):
        title = f"{family}: {source}" + (" (listed, not loadable here)" if missing else "")
        out += [
            "",
            f"## {title}",
            "",
            "| name | trained on | size | top-1 | evaluation | weights licence | where | note |",
        ]
        out += ["|---|---|---:|---:|---|---|---|---|"]
        out += [_row(r) for r in rows]
    return "\n".join(out) + "\n"


def _row(r: Release) -> str:
    name = f"`{r.model}.{r.tag}`" if r.loadable else r.model
    norm = "ImageNet" if r.stats == IMAGENET else "0.5 / 0.5"
    top1 = "" if r.top1 is None else f"{r.top1:.2f}"
    evaluation = "" if r.task != "classification" else f"crop {r.crop_pct:g} {r.crop_mode}, {r.interpolation}, {norm}"
    place = "download by hand" if r.by_hand else r.url.rsplit("/", 1)[-1] or r.url
    where = f"[{r.hub_id or place}]({r.url})"
    return f"| {name} | {r.data} | {r.img_size or ''} | {top1} | {evaluation} | {r.licence} | {where} | {r.note} |"
