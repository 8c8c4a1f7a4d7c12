"""BiFormer's releases: its authors' own files. For dense prediction they released logs, no weights.

Published figures: the README of rayleizhu/BiFormer.
"""

from .table import Release

FOLDER = "https://1drv.ms/u/s!AkBbczdRlZvChGsXFqAA-PVnA-R8?e=IPlOCG"

# model -> top-1
CLASSIFIERS = {
    "biformer_t": 81.4,
    "biformer_s": 83.8,
    "biformer_b": 84.3,
    "biformer_stl": 82.7,
    "biformer_stl_nchw": 82.7,
}


def _official(model: str) -> Release:
    return Release(
        model=model,
        tag="rayleizhu_in1k",
        source="the authors",
        data="ImageNet-1k",
        img_size=224,
        top1=CLASSIFIERS[model],
        url=FOLDER,
        by_hand=True,
        licence="mit",
        layout="official",
        note="a folder with the files of all models; links to single files were reported dead in March 2026",
    )


BIFORMER = tuple(map(_official, CLASSIFIERS))
