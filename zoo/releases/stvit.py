"""STViT's releases: its authors' own files (the paper calls the models SViT too).

Published figures: the README of hhb072/STViT.
"""

from .table import Release

FOLDER = "https://drive.google.com/drive/folders/1uaT5OarQd9iPrnFufHocHpM3zhyTcetB"
WORDS = {"s": "small", "b": "base", "l": "large"}

# (size of the model, of the image) -> top-1
CLASSIFIERS = {
    ("s", 224): 83.6,
    ("s", 384): 85.0,
    ("b", 224): 84.8,
    ("b", 384): 86.0,
    ("l", 224): 85.3,
    ("l", 384): 86.4,
}


def _official(size: str, pixels: int) -> Release:
    return Release(
        model=f"stvit_{size}",
        tag="hhb072_in1k" + ("_384" if pixels == 384 else ""),
        source="the authors",
        data="ImageNet-1k",
        img_size=pixels,
        top1=CLASSIFIERS[size, pixels],
        url=FOLDER,
        by_hand=True,
        licence="not stated (nor that of the code)",
        crop_pct=1.0 if pixels == 384 else 0.875,
        layout="official",
        note=f"file stvit-{WORDS[size]}-{pixels}.pth",
    )


STVIT = tuple(_official(*key) for key in CLASSIFIERS)
