"""The data of `convert.py`: which layouts each class of model was released in, besides our own."""

from ..convert import Layout
from . import davit, dinat, gcvit, litv2, maxvit, stvit

# name of the class -> layouts
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    **davit.LAYOUTS,
    **dinat.LAYOUTS,
    **gcvit.LAYOUTS,
    **litv2.LAYOUTS,
    **maxvit.LAYOUTS,
    **stvit.LAYOUTS,
}
