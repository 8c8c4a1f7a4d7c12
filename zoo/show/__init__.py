"""Pictures of what a model's attention does with an image.

    from zoo import show

    model = timm.create_model("dinat_m.shilabs_in1k", pretrained=True)
    for picture in show.pictures(model, "cat.jpg", query=(120, 90)):
        display(picture)  # in a notebook; elsewhere picture.save("inside")

The pictures show what the model computed on this image: its forward pass is recorded call by call, and the attention of
a query is the derivative of the recorded call. Nothing is computed again by a separate formula.
"""

from .calls import Call, record
from .families import names, pictures
from .field import receptive_field
from .image import photograph
from .picture import Picture, ShowError

__all__ = ["Call", "Picture", "ShowError", "names", "photograph", "pictures", "receptive_field", "record"]
