"""One look at a model: the image, what the model did with it, and which part of that to show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor, nn

from .calls import Call
from .picture import Absent, pick

Drawn = tuple[Any, dict[str, Tensor]]  # a figure of matplotlib's, and the tensors that it shows


@dataclass(frozen=True)
class Look:
    """What views draw from.

    image   as the model saw it, before normalisation
    x       (1, C, H, W), what the model saw
    calls   the calls of `ops` in its forward pass; none for a model outside the zoo
    sides   (rows, columns) of each stage's map, which a call may see padded
    query   (y, x), a pixel of the image
    stage   the only one to show; None: all
    block   number of a block among those of a stage that a view can draw, from the end if negative
    head    the only one to show; None: their mean
    note    text about the weights, for titles
    """

    model: nn.Module
    image: Image.Image
    x: Tensor
    calls: list[Call]
    sides: list[tuple[int, int]]
    query: tuple[int, int]
    stage: int | None
    block: int
    head: int | None
    note: str

    def of(self, op: Callable[..., Any], kind: type[nn.Module] = nn.Module, within: str = "") -> list[Call]:
        """Calls of `op` by a module of `kind` whose name ends in `within`: that of the chosen block in each stage that
        has any. Raises Absent if no stage has any, ShowError if a stage has no such block.
        """
        fitting = [
            call
            for call in self.calls
            if call.op is op and isinstance(self.module(call), kind) and call.module.endswith(within)
        ]
        stages = sorted({call.stage for call in fitting if self.stage in (None, call.stage)})
        if not stages:
            having = ", ".join(map(str, sorted({call.stage for call in fitting}))) or "none"
            where = "the model" if self.stage is None else f"stage {self.stage}"
            raise Absent(f"{where} has no such attention; stages with it: {having}")
        return [self._block(stage, [call for call in fitting if call.stage == stage]) for stage in stages]

    def _block(self, stage: int, calls: list[Call]) -> Call:
        return pick("block", self.block, calls, f"of such attention, stage {stage}")

    @property
    def ratio(self) -> float:
        """Height by width of the image."""
        return self.image.height / self.image.width

    def module(self, call: Call) -> nn.Module:
        return self.model.get_submodule(call.module)

    def pixels(self, call: Call, cell: tuple[int, int] = (1, 1)) -> tuple[int, int]:
        """Pixels of the image, down and across, that a cell of tokens of the call's stage covers."""
        side = self.model.feature_info[call.stage]["reduction"]
        return side * cell[0], side * cell[1]

    def token(self, call: Call) -> tuple[int, int]:
        """(row, column) of the query on the map of a call; the last row if the map dropped the query's."""
        axes = zip(self.query, self.pixels(call), self.sides[call.stage], strict=True)
        y, x = (min(pixel // side, count - 1) for pixel, side, count in axes)
        return y, x

    def heads(self, weights: Tensor) -> Tensor:
        """(heads, ...) -> the chosen head, or the mean. Raises ShowError if there is no such head."""
        if self.head is None:
            return weights.mean(0)
        return pick("head", self.head, weights, "the attention")

    def title(self, what: str) -> str:
        """The title of every picture."""
        name = getattr(self.model, "pretrained_cfg", {}).get("architecture") or type(self.model).__name__
        head = "" if self.head is None else f", head {self.head}"
        return f"{name}: {what}{head}" + (f" ({self.note})" if self.note else "")
