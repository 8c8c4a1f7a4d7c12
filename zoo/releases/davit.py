"""DaViT's releases: timm's ports of its authors' weights, the authors' own files, and what else holds a DaViT.

Published figures: timm's results-imagenet.csv; the README of dingmyu/davit.
"""

from .table import Release

WORDS = {"t": "tiny", "s": "small", "b": "base"}
SHARE = "https://connecthkuhk-my.sharepoint.com/:u:/g/personal/u3007305_connect_hku_hk/"
NO_LICENCE = "not stated (code mit)"

# top-1 of timm's port at crop 0.95, of the authors at 0.9, and their file
CLASSIFIERS = {
    "t": (82.694, 82.8, "EcJYlVYP9y5FsDbMP-nwjtABgLmdrNGZBxgR5--Kg3MZ7Q?e=v9OrXB"),
    "s": (84.252, 84.2, "ERN_Gzm8oKdIvO01r0X2cscB_owuRAnnQPNGJEVGP23xHQ?e=MVW3ZO"),
    "b": (84.652, 84.6, "Ea8kCpdM949CvTM0w7DWbGwBxxiACMSik4zx-emrNY0uKQ?e=aEjC7u"),
}

# (task, size) -> published figure and file
DENSE = {
    ("Mask R-CNN 1x", "t"): ("45.0 box AP, 41.1 mask AP", "ERgc6486IzJPpPWDPJUwKP0BCc4oFtTgdudnPmmPqozqug?e=QWsLYg"),
    ("Mask R-CNN 1x", "s"): ("47.7 box AP, 42.9 mask AP", "EVgVH-9l--pJpBuly1xwsAkBx57Ph9ZAajt31vk-TqQPrA?e=byv2uC"),
    ("Mask R-CNN 1x", "b"): ("48.2 box AP, 43.3 mask AP", "EY5MU9O8n0ZPrvzCgakS4PoBdg6H3FCOSi1QVNCpJSQJ7g?e=MtdUGz"),
    ("Mask R-CNN 3x", "t"): ("47.4 box AP, 42.9 mask AP", "Ed1Su_p29_5KuX5Lbc2oq6gB3AVKnI-ojAT-yyICXWRbgg?e=XdJPsp"),
    ("Mask R-CNN 3x", "s"): ("49.5 box AP, 44.3 mask AP", "EQCvUkIhwxNOrR1KibewNU0BqDDxzt311xANejUHprm0yQ?e=LiK9hX"),
    ("Mask R-CNN 3x", "b"): ("49.9 box AP, 44.6 mask AP", "Ed8kh4c1G41OmfIzo5sOS74Bccp1G65qg0H2s0WtcXUJZA?e=lnqLoQ"),
    ("RetinaNet 1x", "t"): ("44.0 box AP", "EdNCWmdUArpPgjNn2JY37_QBs5KVNy8d-8bNK7DNyjYHyg?e=osMprJ"),
    ("RetinaNet 1x", "s"): ("46.0 box AP", "EfWFiJY0iEpGhPzwQA5nv7IB-8bgnVfCHQVT4FqX8UeK9w?e=sr0Ed6"),
    ("RetinaNet 1x", "b"): ("46.7 box AP", "ESKE9OFCDzxGo2D2Eyr29c0BFhc-j8OjF2WRoSxSK0gn4g?e=KfyJCA"),
    ("RetinaNet 3x", "t"): ("46.5 box AP", "EZ10htYokJhOi0serTLAx5cBGcJLL7PgWSO1uzlIXUw1Jg?e=zsMh4y"),
    ("RetinaNet 3x", "s"): ("48.2 box AP", "Ef9u9l_81_1PvCKGngnrkPoB1mGjelED0CzXr7RJwoQB7w?e=zTYozh"),
    ("RetinaNet 3x", "b"): ("48.7 box AP", "Ea7c6g_OkqpHrGIviK2Ua-4B2wc4Rd0PTdXAlA2IyTZxGQ?e=N4askR"),
    ("UPerNet", "t"): ("46.3 mIoU", "ERajqEKtzIBGgX2slZxCYrEBoEL-ZnLkUaXP9SHT-rp13w?e=Ga9U8a"),
    ("UPerNet", "s"): ("48.8 mIoU", "Ef5hJPsJXNZLiRkUTL9-ozcBaVyVEAvolNwMUlsmJhm2Yg?e=BnJ6Et"),
    ("UPerNet", "b"): ("49.4 mIoU", "EWl80Je0fUlNlbJzI_qKgIkBFX-epbfK3Vzgdq1C2iOsuA?e=wumOBS"),
}


def _ported(size: str) -> Release:
    hub_id = f"timm/davit_{WORDS[size]}.msft_in1k"
    return Release(
        model=f"davit_{size}",
        tag="timm_msft_in1k",
        source="timm's ports of the authors' weights",
        data="ImageNet-1k",
        img_size=224,
        top1=CLASSIFIERS[size][0],
        url=f"https://huggingface.co/{hub_id}",
        hub_id=hub_id,
        licence="apache-2.0",
        crop_pct=0.95,
        layout="timm",
        note="the repository of the original weights says MIT",
    )


def _official(size: str) -> Release:
    return Release(
        model=f"davit_{size}",
        tag="dingmyu_in1k",
        source="the authors",
        data="ImageNet-1k",
        img_size=224,
        top1=CLASSIFIERS[size][1],
        url=SHARE + CLASSIFIERS[size][2],
        by_hand=True,
        licence=NO_LICENCE,
        crop_pct=0.9,
        layout="official",
    )


def _dense(task: str, size: str) -> Release:
    figure, share = DENSE[task, size]
    scenes = task == "UPerNet"
    return Release(
        model=f"davit_{size}",
        tag="",
        source="the authors, with heads for dense prediction",
        data="ImageNet-1k, then " + ("ADE20K" if scenes else "COCO"),
        img_size=512 if scenes else None,
        top1=None,
        url=SHARE + share,
        by_hand=True,
        licence=NO_LICENCE,
        layout="official",
        task="segmentation" if scenes else "detection",
        loadable=False,
        note=f"{task}: {figure}",
    )


def _florence(model: str, size: str, licence: str) -> Release:
    return Release(
        model=model,
        tag="",
        source="Microsoft's Florence-2",
        data="image-text pairs",
        img_size=None,
        top1=None,
        url=f"https://huggingface.co/microsoft/Florence-2-{size}",
        licence=licence,
        task="features",
        loadable=False,
        note="another model: windows of 12, overlapping merges, another channel attention",
    )


DAVIT = (
    *map(_ported, CLASSIFIERS),
    *map(_official, CLASSIFIERS),
    *(_dense(*key) for key in DENSE),
    _florence("davit_b", "base", "mit"),
    _florence("davit_h", "large", "not stated"),
)
