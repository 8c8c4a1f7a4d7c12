"""BiFormer's releases: its authors' own files. For dense prediction they released logs, no weights.

Published figures: the README of rayleizhu/BiFormer.
"""

from .table import IN1K, Release, cost, named

FOLDER = "https://1drv.ms/u/s!AkBbczdRlZvChGsXFqAA-PVnA-R8?e=IPlOCG"
SHARE = "https://api.onedrive.com/v1.0/shares/{}/root/content"
SHORT = "https://matix.li/"

# model -> top-1, top-5, share of the single file, short link of an older README
CLASSIFIERS = {
    "biformer_t": (81.4, None, "s!AkBbczdRlZvChHEOoGkgwgQzEDlM", "e36fe9fb086c"),
    "biformer_s": (83.754, 96.638, "s!AkBbczdRlZvChHDyM-x9KWRBZ832", "5bb436318902"),
    "biformer_b": (84.3, None, "s!AkBbczdRlZvChHI_XPhoadjaNxtO", "995db75f585d"),
    "biformer_stl": (82.7, None, "s!AkBbczdRlZvChSf-m7ujkvx9lIQ1", "4e9034a91a23"),
    "biformer_stl_nchw": (82.7, None, "s!AkBbczdRlZvChWYrKbWbMgqd2Ai0", None),
}
WORDS = {"biformer_t": "tiny", "biformer_s": "small", "biformer_b": "base", "biformer_stl": "stl"}


def _official(model: str) -> Release:
    top1, top5, share, short = CLASSIFIERS[model]
    return Release(
        model=model,
        tag="rayleizhu_in1k",
        source="the authors",
        data=IN1K,
        img_size=224,
        metrics=named(top1=top1, top5=top5),
        **cost(model),
        url=FOLDER,
        by_hand=True,
        file=f"biformer_{WORDS[model]}_best.pth" if model in WORDS else "",
        mirrors=(SHORT + short,) if short else (),
        dead=(SHARE.format(share),),
        wrapper="model",
        licence="mit",
        code_licence="mit",
        layout="official",
        verified=model != "biformer_stl_nchw",
        note="link to a folder with the files of all models; links to single files were reported dead in March 2026",
    )


BIFORMER = tuple(map(_official, CLASSIFIERS))
