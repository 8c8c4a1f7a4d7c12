"""LITv2's releases: its authors' own files, with the ablation of alpha, and their models for dense prediction.

Published figures: the README of ziplab/LITv2; sizes of detectors' images: its detection/configs.
"""

from .table import ADE20K, COCO, IN1K, Release, cost, named

FILES = "https://github.com/ziplab/LITv2/releases/download/"
DRIVE = "https://drive.google.com/drive/folders/1VAtrPWEqxi-6q6luwEVdYvkBYedApwbU"

# (model, size of the image) -> top-1, top-5, file
CLASSIFIERS = {
    ("litv2_s", 224): (82.044, 95.666, "v1.0/litv2_s.pth"),
    ("litv2_m", 224): (83.3, None, "v1.0/litv2_m.pth"),
    ("litv2_b", 224): (83.6, None, "v1.0/litv2_b.pth"),
    ("litv2_b", 384): (84.7, None, "v1.0/litv2_b_384.pth"),
    ("litv2_s_a00", 224): (81.16, None, "v1.1/alpha_0.pth"),
    ("litv2_s_a02", 224): (81.89, None, "v1.1/alpha_0.2.pth"),
    ("litv2_s_a04", 224): (81.81, None, "v1.1/alpha_0.4.pth"),
    ("litv2_s_a05", 224): (81.88, None, "v1.1/alpha_0.5.pth"),
    ("litv2_s_a07", 224): (81.94, None, "v1.1/alpha_0.7.pth"),
    ("litv2_s_a09", 224): (82.03, None, "v1.1/alpha_0.9.pth"),
    ("litv2_s_a10", 224): (81.89, None, "v1.1/alpha_1.pth"),
}
# heads of the 12 that see low frequencies
LOW_HEADS = {"a00": 0, "a02": 2, "a04": 4, "a05": 6, "a07": 8, "a09": 10, "a10": 12}

# (method, size, side of HiLo's windows in stage 3) -> 10^6 parameters and 10^9 multiply-adds of the whole, figures
RETINA, MASK, FPN = "RetinaNet 1x", "Mask R-CNN 1x", "Semantic FPN 80k"
DENSE = {
    (RETINA, "s", 2): (38, 242, {"box_ap": 44.0}),
    (RETINA, "s", 4): (38, 230, {"box_ap": 43.7}),
    (RETINA, "m", 2): (59, 348, {"box_ap": 46.0}),
    (RETINA, "m", 4): (59, 312, {"box_ap": 45.8}),
    (RETINA, "b", 2): (97, 481, {"box_ap": 46.7}),
    (RETINA, "b", 4): (97, 430, {"box_ap": 46.3}),
    (MASK, "s", 2): (47, 261, {"box_ap": 44.9, "mask_ap": 40.8}),
    (MASK, "s", 4): (47, 249, {"box_ap": 44.7, "mask_ap": 40.7}),
    (MASK, "m", 2): (68, 367, {"box_ap": 46.8, "mask_ap": 42.3}),
    (MASK, "m", 4): (68, 315, {"box_ap": 46.5, "mask_ap": 42.0}),
    (MASK, "b", 2): (106, 500, {"box_ap": 47.3, "mask_ap": 42.6}),
    (MASK, "b", 4): (106, 449, {"box_ap": 46.8, "mask_ap": 42.3}),
    (FPN, "s", 2): (31, 41, {"miou": 44.3}),
    (FPN, "m", 2): (52, 63, {"miou": 45.7}),
    (FPN, "b", 2): (90, 93, {"miou": 47.2}),
}
DETECTORS = {RETINA: "retinanet", MASK: "mask_rcnn"}


def _official(model: str, pixels: int) -> Release:
    top1, top5, file = CLASSIFIERS[model, pixels]
    fine = pixels == 384
    heads = LOW_HEADS.get(model.rpartition("_")[2])
    return Release(
        model=model,
        tag="ziplab_in1k" + ("_384" if fine else ""),
        source="the authors",
        data=IN1K,
        img_size=pixels,
        metrics=named(top1=top1, top5=top5),
        **cost(model, gflops=39.7 if fine else None),
        url=FILES + file,
        mirrors=(DRIVE,) if heads is None else (),
        wrapper="model",
        licence="apache-2.0",
        code_licence="apache-2.0",
        crop_pct=1.0 if fine else 0.875,
        crop_mode="squash" if fine else "center",
        layout="official",
        note="" if heads is None else f"ablation of alpha: {heads} of 12 heads for low frequencies",
    )


def _dense(method: str, size: str, window: int) -> Release:
    detector = DETECTORS.get(method)
    params, gflops, metrics = DENSE[method, size, window]
    wide = "_ws_4" if window == 4 else ""
    file = f"{detector}_litv2_{size}_fpn_1x_coco{wide}" if detector else f"litv2_{size}_fpn_r50_512x512_80k_ade20k"
    return Release(
        model=f"litv2_{size}",
        source="the authors",
        data=f"{IN1K}, then " + (COCO if detector else ADE20K),
        img_size=None if detector else 512,
        task="detection" if detector else "segmentation",
        method=method,
        metrics=metrics,
        test_size=(800, 1333) if detector else None,
        params=params,
        gflops=gflops,
        url=f"{FILES}v1.0/{file}.pth",
        wrapper="state_dict",
        licence="apache-2.0",
        code_licence="apache-2.0",
        layout="official",
        arguments={"windows": (0, 0, window, 1)} if window != 2 else {},
        note=f"HiLo's windows are {window} wide in stage 3; multiply-adds for 1280 x 800 pixels" if detector else "",
    )


LITV2 = (*(_official(*key) for key in CLASSIFIERS), *(_dense(*key) for key in DENSE))
