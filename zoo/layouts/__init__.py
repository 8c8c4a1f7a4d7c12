"""The data of `zoo.convert`: which layouts each class of model was released in, besides our own."""

from ..convert import Layout
from . import biformer, davit, dinat, gcvit, litv2, maxvit, sgformer, stvit

# name of the class -> layouts
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    **biformer.LAYOUTS,
    **davit.LAYOUTS,
    **dinat.LAYOUTS,
    **gcvit.LAYOUTS,
    **litv2.LAYOUTS,
    **maxvit.LAYOUTS,
    **sgformer.LAYOUTS,
    **stvit.LAYOUTS,
}
