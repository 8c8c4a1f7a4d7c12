"""A finished picture: the figure, the numbers behind it, and a caption."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ops.tool import replaced

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ShowError(ValueError):
    """Something cannot be drawn; the message says what was asked for, what there is, and what to do."""


class Absent(ShowError):
    """The chosen stage has nothing of what a picture shows."""


def pick(what: str, index: int, of: Sequence[Any] | Tensor, where: str) -> Any:
    """`of[index]`, from the end if negative. Raises ShowError with these words if there is none."""
    if not -len(of) <= index < len(of):
        raise ShowError(f"{what} is {index}: {where} has {what}s 0 to {len(of) - 1}")
    return of[index]


@dataclass(frozen=True)
class Picture:
    """One picture; notebooks display it as the value of a cell.

    name     of the view, such as "routes"
    title    what model, stage, block and weights
    caption  what one sees, and the figure of the paper that it corresponds to
    figure   a matplotlib figure
    data     the tensors that are drawn, by name
    """

    name: str
    title: str
    caption: str
    figure: Figure
    data: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def png(self) -> bytes:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        buffer = io.BytesIO()
        FigureCanvasAgg(self.figure)
        self.figure.savefig(buffer, format="png", dpi=self.figure.dpi)
        return buffer.getvalue()

    def save(self, folder: str | Path, stem: str = "") -> Path:
        """Write `<stem>-<name>.png` into a folder, which is created if necessary."""
        path = Path(folder) / f"{stem}{'-' if stem else ''}{self.name}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replaced(path) as temporary:
                temporary.write_bytes(self.png())
        except OSError as error:
            raise ShowError(f"could not write {path}: {error}") from error
        return path

    def _repr_png_(self) -> bytes:
        return self.png()
