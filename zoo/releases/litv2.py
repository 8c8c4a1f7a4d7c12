"""LITv2's releases: its authors' own files, with the ablation of alpha, and their models for dense prediction.

Published figures: the README of ziplab/LITv2.
"""

from .table import Release

FILES = "https://github.com/ziplab/LITv2/releases/download/"

# (model, size of the image) -> top-1 and file
CLASSIFIERS = {
    ("litv2_s", 224): (82.044, "v1.0/litv2_s.pth"),
    ("litv2_m", 224): (83.3, "v1.0/litv2_m.pth"),
    ("litv2_b", 224): (83.6, "v1.0/litv2_b.pth"),
    ("litv2_b", 384): (84.7, "v1.0/litv2_b_384.pth"),
    ("litv2_s_a00", 224): (81.16, "v1.1/alpha_0.pth"),
    ("litv2_s_a02", 224): (81.89, "v1.1/alpha_0.2.pth"),
    ("litv2_s_a04", 224): (81.81, "v1.1/alpha_0.4.pth"),
    ("litv2_s_a05", 224): (81.88, "v1.1/alpha_0.5.pth"),
    ("litv2_s_a07", 224): (81.94, "v1.1/alpha_0.7.pth"),
    ("litv2_s_a09", 224): (82.03, "v1.1/alpha_0.9.pth"),
    ("litv2_s_a10", 224): (81.89, "v1.1/alpha_1.pth"),
}

# (task, size, side of HiLo's windows) -> published figure
DENSE = {
    ("RetinaNet 1x", "s", 2): "44.0 box AP",
    ("RetinaNet 1x", "s", 4): "43.7 box AP",
    ("RetinaNet 1x", "m", 2): "46.0 box AP",
    ("RetinaNet 1x", "m", 4): "45.8 box AP",
    ("RetinaNet 1x", "b", 2): "46.7 box AP",
    ("RetinaNet 1x", "b", 4): "46.3 box AP",
    ("Mask R-CNN 1x", "s", 2): "44.9 box AP, 40.8 mask AP",
    ("Mask R-CNN 1x", "s", 4): "44.7 box AP, 40.7 mask AP",
    ("Mask R-CNN 1x", "m", 2): "46.8 box AP, 42.3 mask AP",
    ("Mask R-CNN 1x", "m", 4): "46.5 box AP, 42.0 mask AP",
    ("Mask R-CNN 1x", "b", 2): "47.3 box AP, 42.6 mask AP",
    ("Mask R-CNN 1x", "b", 4): "46.8 box AP, 42.3 mask AP",
    ("Semantic FPN", "s", 2): "44.3 mIoU",
    ("Semantic FPN", "m", 2): "45.7 mIoU",
    ("Semantic FPN", "b", 2): "47.2 mIoU",
}
DETECTORS = {"RetinaNet 1x": "retinanet", "Mask R-CNN 1x": "mask_rcnn"}


def _official(model: str, pixels: int) -> Release:
    top1, file = CLASSIFIERS[model, pixels]
    fine = pixels == 384
    return Release(
        model=model,
        tag="ziplab_in1k" + ("_384" if fine else ""),
        source="the authors",
        data="ImageNet-1k",
        img_size=pixels,
        top1=top1,
        url=FILES + file,
        licence="apache-2.0",
        crop_pct=1.0 if fine else 0.875,
        crop_mode="squash" if fine else "center",
        layout="official",
        note="from the ablation of alpha" if "_a" in model else "",
    )


def _dense(task: str, size: str, window: int) -> Release:
    detector = DETECTORS.get(task)
    wide = "_ws_4" if window == 4 else ""
    file = f"{detector}_litv2_{size}_fpn_1x_coco{wide}" if detector else f"litv2_{size}_fpn_r50_512x512_80k_ade20k"
    return Release(
        model=f"litv2_{size}",
        tag="",
        source="the authors, with heads for dense prediction",
        data="ImageNet-1k, then " + ("COCO" if detector else "ADE20K"),
        img_size=None if detector else 512,
        top1=None,
        url=f"{FILES}v1.0/{file}.pth",
        licence="apache-2.0",
        layout="official",
        task="detection" if detector else "segmentation",
        loadable=False,
        note=f"{task}: {DENSE[task, size, window]}" + ("; windows of 4" if window == 4 else ""),
    )


LITV2 = (*(_official(*key) for key in CLASSIFIERS), *(_dense(*key) for key in DENSE))
