"""Which pictures each family has, and how to make them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from torch import nn

from ..backbone import Backbone
from ..biformer import BiFormer
from ..blocks import image_sides
from ..checkpoint import unwrapped
from ..davit import DaViT
from ..dinat import DiNAT
from ..dinats import Isotropic, ViTRPB
from ..gcvit import GCViT
from ..litv2 import HiLo, LITv2
from ..maxvit import MaxViT
from ..sgformer import SGFormer
from ..stvit import STViT
from . import channels, field, image, shared, spatial, tokens
from .calls import evaluating, record
from .look import Drawn, Look
from .picture import Absent, Picture, ShowError


@dataclass(frozen=True)
class View:
    """A kind of picture.

    name     for files, and for `only`
    caption  what one sees
    figure   the figure of the paper that it corresponds to
    draw     look -> (figure, data)
    fits     whether a model of the family has what is drawn
    """

    name: str
    caption: str
    figure: str
    draw: Callable[[Look], Drawn]
    fits: Callable[[nn.Module], bool] = lambda model: True


ATTENDED = "The tokens that a query attends to (outlined) and how much (warm)"
DINAT = "figure 1 of DiNAT, arXiv:2209.15001"
NEIGHBORHOODS = View(
    "neighborhoods",
    f"{ATTENDED}, and the same for the token in the corner, whose neighborhood shifts inward and keeps its size.",
    DINAT,
    spatial.neighborhoods,
)
FIELD = View(
    "field",
    "How much each pixel of the image moves the units in the middle of a stage's feature (cube root), and the share "
    "of the image that makes up 90 % of that.",
    "figure 1 of Luo et al. 2016, arXiv:1701.04128",
    field.fields,
)
VIEWS: dict[type[nn.Module], tuple[View, ...]] = {
    MaxViT: (
        View(
            "axes",
            f"{ATTENDED}, in two partitions: the tile around it, and tokens spaced evenly over the whole map.",
            "figure 3 of MaxViT, arXiv:2204.01697",
            spatial.block_and_grid,
        ),
    ),
    DiNAT: (NEIGHBORHOODS,),
    Isotropic: (NEIGHBORHOODS,),
    ViTRPB: (View("windows", f"{ATTENDED}: the whole map.", DINAT, spatial.windows),),
    BiFormer: (
        View(
            "routes",
            "The query's region (amber), the regions that it is routed to (outlined, the first nine numbered by rank), "
            "and how much the query attends to their tokens (warm).",
            "figure 1 (f) of BiFormer, arXiv:2303.08810",
            spatial.routes,
        ),
    ),
    LITv2: (
        View(
            "halves",
            "What a query attends to through its heads for high and for low frequencies (warm), and the spectra of "
            "their outputs, with the constant part in the middle.",
            "figure 1 of LITv2, arXiv:2205.13213, and that of frequency magnitudes",
            spatial.high_and_low,
            lambda model: any(isinstance(module, HiLo) and len(module) == 2 for module in model.modules()),
        ),
    ),
    GCViT: (
        View(
            "query",
            "Above, the queries that the whole image shares, as colours (their three principal components); below, how "
            "much one of them (dot) attends to the tokens of every window.",
            "the figures of the query generator and of global attention in GC ViT, arXiv:2206.09959",
            shared.global_query,
        ),
    ),
    DaViT: (
        View("windows", f"{ATTENDED}: its window.", "figure 1 (a) of DaViT, arXiv:2204.03645", spatial.windows),
        View(
            "channels",
            "How much each channel of a group attends to the others (a row each, square root); the four that one "
            "channel attends to most, each an image of the whole map; and its output.",
            "figure 1 (b) of DaViT, arXiv:2204.03645",
            channels.channel_groups,
        ),
    ),
    SGFormer: (
        View(
            "significance",
            "Above, how much attention each token receives; below, how many tokens are merged into one.",
            "figures 3 and 4 of SG-Former, arXiv:2308.12216",
            tokens.significance,
        ),
    ),
    STViT: (
        View(
            "superpixels",
            "Above, borders between tokens that belong to different super tokens; below, the largest share of the nine "
            "super tokens that share a token.",
            "figure 2 of STViT, arXiv:2211.11167",
            tokens.superpixels,
        ),
    ),
}


def views(model: nn.Module) -> tuple[View, ...]:
    """The pictures of a model: its family's, and the receptive field that any model has."""
    own = next((VIEWS[cls] for cls in type(model).__mro__ if cls in VIEWS), ())
    return (*(view for view in own if view.fits(model)), FIELD)


def names(model: nn.Module) -> list[str]:
    """The names of a model's pictures; it may be compiled or wrapped as for `pictures`."""
    return [view.name for view in views(unwrapped(model))]


def pictures(
    model: nn.Module,
    photo: image.Given = "flower",
    *,
    query: tuple[int, int] | None = None,
    stage: int | None = None,
    block: int = 0,
    head: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    only: str | Sequence[str] | None = None,
    note: str = "",
) -> list[Picture]:
    """Pictures of what a model does with an image; for models outside the zoo, only their receptive fields.

    model     may be compiled, or wrapped by DistributedDataParallel or the like, or by timm's features_only=True
    photo     a file, a Pillow image, or "flower" or "china", which come with scikit-learn
    query     (y, x), the pixel whose attention is shown, in the image as the model sees it; None: the middle
    stage     its number, from 0; None: all
    block     which of a stage's blocks of the kind that is shown, from the end if negative
    head      its number; None: the mean of all
    img_size  pixels a side, or (height, width), to which the image is cropped: any size that the model runs at. None:
              the size that it was built for
    only      names of pictures from `names(model)`, or one; None: all
    note      text about the weights, for the titles
    The model is left as it was. Raises ShowError for an image that cannot be read, a query outside of it, and a stage,
    block, head or picture that does not exist.
    """
    model = unwrapped(model)
    only = [only] if isinstance(only, str) else only
    chosen = _chosen(model, only)
    size = image.size_of(model) if img_size is None else image_sides(img_size)
    seen = image.cut(image.load(photo), size)
    query = (size[0] // 2, size[1] // 2) if query is None else _pixel(query)
    if not (0 <= query[0] < size[0] and 0 <= query[1] < size[1]):
        raise ShowError(f"query is {query[0]},{query[1]}, outside of the image of {size[0]} x {size[1]} (down, across)")
    x = image.as_input(seen, model)
    with evaluating(model), torch.no_grad():
        sides = [tuple(feature.shape[2:]) for feature in field.features_of(model, x)]
    calls = record(model, x) if isinstance(model, Backbone) else []
    look = Look(model, seen, x, calls, sides, query, stage, block, head, note)
    return [_picture(view, look, chosen) for view in chosen]


def _pixel(query: Sequence[SupportsIndex]) -> tuple[int, int]:
    """(y, x) as Python's integers."""
    try:
        y, x = map(operator.index, query)
    except (TypeError, ValueError):
        raise ShowError(f"query is {query}; expected a pixel's (y, x), two integers") from None
    return y, x


def _chosen(model: nn.Module, only: Sequence[str] | None) -> list[View]:
    known = {view.name: view for view in views(model)}
    if unknown := [name for name in only or () if name not in known]:
        raise ShowError(
            f"{type(model).__name__} has no picture {', '.join(unknown)}: expected one or more of {', '.join(known)}"
        )
    return [known[name] for name in only or known]


def _picture(view: View, look: Look, chosen: Sequence[View]) -> Picture:
    try:
        figure, data = view.draw(look)
    except Absent as error:
        others = ",".join(other.name for other in chosen if other is not view)
        raise ShowError(str(error) + (f". Without {view.name}: only={others}" if others else "")) from error
    return Picture(
        view.name,
        figure.get_label(),
        f"{view.caption} Corresponds to {view.figure}.",
        figure,
        data,
    )
