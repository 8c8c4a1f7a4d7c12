"""SG-Former's releases: its authors' own files.

Published figures: as the papers of MambaOut and RMT quote them. The authors evaluate the moving average of the weights.
"""

from .table import IN1K, Release, cost, named

FOLDER = "https://drive.google.com/drive/folders/1ZJDEwxDffqqqzBC2SzhOkpWpGRweDsE4"

# size -> top-1, name of the file where it is known
CLASSIFIERS = {"s": (83.2, "SG-Former-S.pth"), "m": (84.1, ""), "b": (84.7, "")}


def _official(size: str) -> Release:
    top1, file = CLASSIFIERS[size]
    return Release(
        model=f"sgformer_{size}",
        tag="oliverren_in1k",
        source="the authors",
        data=IN1K,
        img_size=224,
        metrics=named(top1=top1),
        **cost(f"sgformer_{size}"),
        url=FOLDER,
        by_hand=True,
        file=file,
        wrapper="state_dict_ema",
        licence=None,
        code_licence=None,
        crop_pct=0.9,
        layout="official",
        weights="ema",
        note="link to a folder with all sizes; top-1 as quoted in other papers; "
        "`state_dict` holds the weights before averaging",
    )


SGFORMER = tuple(map(_official, CLASSIFIERS))
