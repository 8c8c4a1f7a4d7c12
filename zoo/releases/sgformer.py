"""SG-Former's releases: its authors' own files.

Published figures: as the papers of MambaOut and RMT quote them. The authors evaluate the moving average of the weights.
"""

from .table import Release

FOLDER = "https://drive.google.com/drive/folders/1ZJDEwxDffqqqzBC2SzhOkpWpGRweDsE4"

# size -> top-1
CLASSIFIERS = {"s": 83.2, "m": 84.1, "b": 84.7}


def _official(size: str) -> Release:
    return Release(
        model=f"sgformer_{size}",
        tag="oliverren_in1k",
        source="the authors",
        data="ImageNet-1k",
        img_size=224,
        top1=CLASSIFIERS[size],
        url=FOLDER,
        by_hand=True,
        licence="not stated (nor that of the code)",
        crop_pct=0.9,
        layout="official",
        weights="ema",
        note="a folder with the files of all sizes",
    )


SGFORMER = tuple(map(_official, CLASSIFIERS))
