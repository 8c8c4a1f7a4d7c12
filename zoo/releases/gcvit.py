"""GC ViT's releases: NVIDIA's own (2023), and timm's ports of NVIDIA's earlier ones (2022).

Published figures: the README of NVlabs/GCVit; timm's results-imagenet.csv.
"""

from .table import Release

HUB = "https://huggingface.co/nvidia/GCViT/resolve/main/"
TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights-morevit/"
LICENCE = "cc-by-nc-sa-4.0"
FINE_TUNED = "ImageNet-21k, then 1k"

# (model, file) -> data, top-1, evaluation crop, first digits of the SHA-256 where known
OFFICIAL = {
    ("gcvit_xxt", "1k_xxtiny"): ("ImageNet-1k", 79.9, 1.0, None),
    ("gcvit_xt", "1k_xtiny"): ("ImageNet-1k", 82.0, 0.875, "d7754bac"),
    ("gcvit_t", "1k_tiny"): ("ImageNet-1k", 83.5, 1.0, "30ac1c31"),
    ("gcvit_t2", "1k_tiny2"): ("ImageNet-1k", 83.7, 0.875, "aed13457"),
    ("gcvit_s", "1k_small"): ("ImageNet-1k", 84.3, 0.875, None),
    ("gcvit_s2", "1k_small2"): ("ImageNet-1k", 84.8, 0.875, "2252d049"),
    ("gcvit_b", "1k_base"): ("ImageNet-1k", 85.0, 1.0, "068b5af7"),
    ("gcvit_l", "1k_large"): ("ImageNet-1k", 85.7, 1.0, None),
    ("gcvit_l", "21k_large_224"): (FINE_TUNED, 86.6, 1.0, "59c5a785"),
    ("gcvit_l_384", "21k_large_384"): (FINE_TUNED, 87.4, 1.0, "9ee1f5e3"),
    ("gcvit_l_512", "21k_large_512"): (FINE_TUNED, 87.6, 1.0, "dbc633d6"),
}

# model -> timm's word for the size, first digits of the SHA-256, top-1
PORTED = {
    "gcvit_xxt": ("xxtiny", "d1d86009", 79.756),
    "gcvit_xt": ("xtiny", "274b92b7", 81.964),
    "gcvit_t": ("tiny", "ac783954", 83.400),
    "gcvit_s": ("small", "4e98afa2", 83.904),
    "gcvit_b": ("base", "f009139b", 84.456),
}


def _official(model: str, file: str) -> Release:
    data, top1, crop, sha256 = OFFICIAL[model, file]
    return Release(
        model=model,
        tag="nvidia_in21k_ft_in1k" if data == FINE_TUNED else "nvidia_in1k",
        source="NVIDIA",
        data=data,
        img_size=int(model.rpartition("_")[2]) if model.endswith(("384", "512")) else 224,
        top1=top1,
        url=f"{HUB}gcvit_{file}.pth.tar",
        licence=LICENCE,
        crop_pct=crop,
        layout="official",
        sha256=sha256,
        note="non-commercial",
    )


def _ported(model: str) -> Release:
    word, sha256, top1 = PORTED[model]
    return Release(
        model=model,
        tag="timm_in1k",
        source="timm's ports of NVIDIA's weights of 2022",
        data="ImageNet-1k",
        img_size=224,
        top1=top1,
        url=f"{TIMM}gcvit_{word}_224_nvidia-{sha256}.pth",
        licence=LICENCE,
        layout="timm",
        sha256=sha256,
        note="non-commercial",
    )


GCVIT = (*(_official(*key) for key in OFFICIAL), *map(_ported, PORTED))
