"""STViT's releases: its authors' own files (the paper calls the models SViT too).

Published figures: the README of hhb072/STViT.
"""

from .table import IN1K, WORDS, Release, cost, named

FOLDER = "https://drive.google.com/drive/folders/1uaT5OarQd9iPrnFufHocHpM3zhyTcetB"

# (size of the model, of the image) -> top-1, 10^9 multiply-adds
CLASSIFIERS = {
    ("s", 224): (83.6, 4.4),
    ("s", 384): (85.0, 14.1),
    ("b", 224): (84.8, 9.9),
    ("b", 384): (86.0, 32.5),
    ("l", 224): (85.3, 15.6),
    ("l", 384): (86.4, 49.7),
}


def _official(size: str, pixels: int) -> Release:
    top1, gflops = CLASSIFIERS[size, pixels]
    return Release(
        model=f"stvit_{size}",
        tag="hhb072_in1k" + ("_384" if pixels == 384 else ""),
        source="the authors",
        data=IN1K,
        img_size=pixels,
        metrics=named(top1=top1),
        **cost(f"stvit_{size}", gflops=gflops),
        url=FOLDER,
        by_hand=True,
        file=f"stvit-{WORDS[size]}-{pixels}.pth",
        wrapper="model",
        licence=None,
        code_licence=None,
        crop_pct=1.0 if pixels == 384 else 0.875,
        layout="official",
        note="link to a folder with the files of all sizes"
        + ("; counted here: 31.4 GFLOPs" if (size, pixels) == ("b", 384) else ""),
    )


STVIT = tuple(_official(*key) for key in CLASSIFIERS)
