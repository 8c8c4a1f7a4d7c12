"""MaxViT's releases: timm's ports of the authors' weights, torchvision's own, the authors' TensorFlow files (listed).

Published figures: timm's results-imagenet.csv; torchvision's documentation; the tables of google-research/maxvit.
"""

from .table import IMAGENET, INCEPTION, Release

WORDS = {"t": "tiny", "s": "small", "b": "base", "l": "large", "xl": "xlarge"}

# (size, pixels, data) -> top-1 of timm's port, top-1 that the authors print
PORTED = {
    ("t", 224, "in1k"): (83.426, 83.62),
    ("t", 384, "in1k"): (85.106, 85.24),
    ("t", 512, "in1k"): (85.658, 85.72),
    ("s", 224, "in1k"): (84.452, 84.45),
    ("s", 384, "in1k"): (85.534, 85.74),
    ("s", 512, "in1k"): (86.102, 86.19),
    ("b", 224, "in1k"): (84.884, 84.95),
    ("b", 384, "in1k"): (86.290, 86.34),
    ("b", 512, "in1k"): (86.598, 86.66),
    ("l", 224, "in1k"): (84.938, 85.17),
    ("l", 384, "in1k"): (86.242, 86.40),
    ("l", 512, "in1k"): (86.534, 86.70),
    ("b", 224, "in21k"): (None, None),
    ("b", 384, "in21k_ft_in1k"): (87.930, 88.24),
    ("b", 512, "in21k_ft_in1k"): (88.214, 88.38),
    ("l", 224, "in21k"): (None, None),
    ("l", 384, "in21k_ft_in1k"): (87.994, 88.32),
    ("l", 512, "in21k_ft_in1k"): (88.236, 88.46),
    ("xl", 224, "in21k"): (None, None),
    ("xl", 384, "in21k_ft_in1k"): (88.302, 88.51),
    ("xl", 512, "in21k_ft_in1k"): (88.540, 88.70),
}
DATA = {"in1k": "ImageNet-1k", "in21k": "ImageNet-21k", "in21k_ft_in1k": "ImageNet-21k, then 1k"}
FOLDERS = {"in1k": "i1k", "in21k": "i21k_pt", "in21k_ft_in1k": "i21k_i1k"}


def _model(size: str, pixels: int) -> str:
    return f"maxvit_{size}" if pixels == 224 else f"maxvit_{size}_{pixels}"


def _ported(size: str, pixels: int, data: str) -> Release:
    hub_id = f"timm/maxvit_{WORDS[size]}_tf_{pixels}.{data}"
    return Release(
        model=_model(size, pixels),
        tag=f"timm_tf_{data}",
        source="timm's ports of the authors' weights",
        data=DATA[data],
        img_size=pixels,
        top1=PORTED[size, pixels, data][0],
        url=f"https://huggingface.co/{hub_id}",
        hub_id=hub_id,
        licence="apache-2.0",
        num_classes=21843 if data == "in21k" else 1000,
        stats=IMAGENET if (pixels, data) == (224, "in1k") else INCEPTION,
        crop_pct=0.95 if pixels == 224 else 1.0,
        crop_mode="center" if pixels == 224 else "squash",
        layout="timm",
        note="21,843 classes" if data == "in21k" else "",
    )


def _tensorflow(size: str, pixels: int, data: str) -> Release:
    return Release(
        model=_model(size, pixels),
        tag="",
        source="the authors' TensorFlow checkpoints",
        data=DATA[data],
        img_size=pixels,
        top1=PORTED[size, pixels, data][1],
        url=f"https://console.cloud.google.com/storage/browser/gresearch/maxvit/ckpts/maxvit{WORDS[size]}/{FOLDERS[data]}/{pixels}",
        licence="not stated (code apache-2.0)",
        stats=IMAGENET if (pixels, data) == (224, "in1k") else INCEPTION,
        crop_pct=0.875 if pixels == 224 else 1.0,
        weights="ema",
        loadable=False,
        note="TensorFlow format; timm's port holds the same weights",
    )


TORCHVISION = Release(
    model="maxvit_t_tv",
    tag="tv_in1k",
    source="torchvision",
    data="ImageNet-1k",
    img_size=224,
    top1=83.70,
    url="https://download.pytorch.org/models/maxvit_t-bc5ab103.pth",
    licence="not stated (code bsd-3-clause)",
    crop_pct=1.0,
    layout="torchvision",
    sha256="bc5ab103",
    note="short side resized to 224, centre crop; trained with a batch-norm momentum of 0.99 by mistake",
)

MAXVIT = (*(_ported(*key) for key in PORTED), TORCHVISION, *(_tensorflow(*key) for key in PORTED))
