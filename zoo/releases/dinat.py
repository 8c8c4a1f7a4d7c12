"""NAT's, DiNAT's and their controls' releases: SHI-Labs' own files, and what they put on the Hugging Face hub.

Published figures: NAT.md and DiNAT.md of SHI-Labs/Neighborhood-Attention-Transformer.
"""

from .table import Release

SITE = "https://shi-labs.com/projects/"
HUB_LICENCE = "mit (by the cards of the hub)"
NO_LICENCE = "not stated (code mit)"
IN1K, IN22K, FINE_TUNED = "ImageNet-1k", "ImageNet-22k", "ImageNet-22k, then 1k"
TAGS = {IN1K: "shilabs_in1k", IN22K: "shilabs_in22k", FINE_TUNED: "shilabs_in22k_ft_in1k"}
WORDS = {"m": "mini", "t": "tiny", "s": "small", "b": "base", "l": "large"}
REPLACED = "replaced in place in January 2023"

# (model, file) -> data, pixels, top-1, the same weights on the hub
CLASSIFIERS = {
    ("nat_m", "nat/checkpoints/CLS/nat_mini"): (IN1K, 224, 81.8, "nat-mini-in1k-224"),
    ("nat_t", "nat/checkpoints/CLS/nat_tiny"): (IN1K, 224, 83.2, "nat-tiny-in1k-224"),
    ("nat_s", "nat/checkpoints/CLS/nat_small"): (IN1K, 224, 83.7, "nat-small-in1k-224"),
    ("nat_b", "nat/checkpoints/CLS/nat_base"): (IN1K, 224, 84.3, "nat-base-in1k-224"),
    ("dinat_m", "dinat/checkpoints/imagenet1k/dinat_mini_in1k_224"): (IN1K, 224, 81.8, "dinat-mini-in1k-224"),
    ("dinat_t", "dinat/checkpoints/imagenet1k/dinat_tiny_in1k_224"): (IN1K, 224, 82.7, "dinat-tiny-in1k-224"),
    ("dinat_s", "dinat/checkpoints/imagenet1k/dinat_small_in1k_224"): (IN1K, 224, 83.8, "dinat-small-in1k-224"),
    ("dinat_b", "dinat/checkpoints/imagenet1k/dinat_base_in1k_224"): (IN1K, 224, 84.4, "dinat-base-in1k-224"),
    ("dinat_l", "dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_224"): (
        FINE_TUNED,
        224,
        86.6,
        "dinat-large-in22k-in1k-224",
    ),
    ("dinat_l_384", "dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_384"): (
        FINE_TUNED,
        384,
        87.4,
        "dinat-large-in22k-in1k-384",
    ),
    ("dinat_l_384_k11", "dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_384_11x11"): (
        FINE_TUNED,
        384,
        87.5,
        "dinat-large-11x11-in22k-in1k-384",
    ),
    ("dinat_l", "dinat/checkpoints/imagenet22k/dinat_large_in22k_224"): (IN22K, 224, None, None),
    ("dinat_l_384_k11", "dinat/checkpoints/imagenet22k/dinat_large_in22k_224_11x11interp"): (IN22K, 224, None, None),
    ("dinats_t", "dinat/checkpoints/imagenet1k/dinat_s_tiny_in1k_224"): (IN1K, 224, 81.8, None),
    ("dinats_s", "dinat/checkpoints/imagenet1k/dinat_s_small_in1k_224"): (IN1K, 224, 83.5, None),
    ("dinats_b", "dinat/checkpoints/imagenet1k/dinat_s_base_in1k_224"): (IN1K, 224, 83.8, None),
    ("dinats_l", "dinat/checkpoints/imagenet1k/dinat_s_large_in1k_224"): (FINE_TUNED, 224, 86.5, None),
    ("dinats_l_384", "dinat/checkpoints/imagenet1k/dinat_s_large_in1k_384"): (FINE_TUNED, 384, 87.4, None),
    ("dinats_l", "dinat/checkpoints/imagenet22k/dinat_s_large_in22k_224"): (IN22K, 224, None, None),
    ("nat_iso_s", "dinat/checkpoints/isotropic/nat_isotropic_small_in1k_224"): (IN1K, 224, 80.0, None),
    ("nat_iso_b", "dinat/checkpoints/isotropic/nat_isotropic_base_in1k_224"): (IN1K, 224, 81.6, None),
    ("dinat_iso_s", "dinat/checkpoints/isotropic/dinat_isotropic_small_in1k_224"): (IN1K, 224, 80.8, None),
    ("dinat_iso_b", "dinat/checkpoints/isotropic/dinat_isotropic_base_in1k_224"): (IN1K, 224, 82.1, None),
    ("vitrpb_s", "dinat/checkpoints/isotropic/vitrpb_small_in1k_224"): (IN1K, 224, 81.2, None),
    ("vitrpb_b", "dinat/checkpoints/isotropic/vitrpb_base_in1k_224"): (IN1K, 224, 82.5, None),
}

# file -> task and figures of each size
MASK, CASCADE, UPERNET = "Mask R-CNN 3x", "Cascade Mask R-CNN 3x", "UPerNet"
DENSE = {
    "nat/checkpoints/DET/nat_{}_maskrcnn": (MASK, {"m": 46.5, "t": 47.7, "s": 48.4}),
    "nat/checkpoints/DET/nat_{}_cascademaskrcnn": (CASCADE, {"m": 50.3, "t": 51.4, "s": 52.0, "b": 52.3}),
    "nat/checkpoints/SEG/nat_{}_upernet": (UPERNET, {"m": 45.1, "t": 47.1, "s": 48.0, "b": 48.5}),
    "dinat/checkpoints/coco/maskrcnn_dinat_{}": (MASK, {"m": 47.2, "t": 48.6, "s": 49.3}),
    "dinat/checkpoints/coco/cascadedmaskrcnn_dinat_{}": (
        CASCADE,
        {"m": 51.2, "t": 52.2, "s": 52.9, "b": 53.4, "l": 55.3},
    ),
    "dinat/checkpoints/ade20k/upernet_dinat_{}": (UPERNET, {"m": 45.8, "t": 47.8, "s": 48.9, "b": 49.6, "l": 54.0}),
    "dinat/checkpoints/coco/maskrcnn_dinat_s_{}": (MASK, {"t": 46.6, "s": 48.6}),
    "dinat/checkpoints/coco/cascadedmaskrcnn_dinat_s_{}": (CASCADE, {"t": 51.0, "s": 52.3, "b": 52.6, "l": 54.8}),
    "dinat/checkpoints/ade20k/upernet_dinat_s_{}": (UPERNET, {"t": 46.0, "s": 48.6, "b": 49.4, "l": 53.4}),
}

# DiNAT-L with Mask2Former: file -> figure
MASK2FORMER = {
    "coco_instance": "50.8 mask AP",
    "ade20k_instance": "35.4 mask AP",
    "cityscapes_instance": "45.1 mask AP",
    "ade20k_semantic": "58.1 mIoU",
    "cityscapes_semantic": "84.5 mIoU",
    "coco_panoptic": "58.5 PQ",
    "ade20k_panoptic": "49.4 PQ",
    "cityscapes_panoptic": "67.2 PQ",
}
DATA_SETS = {"coco": "COCO", "ade20k": "ADE20K", "cityscapes": "Cityscapes"}


def _classifier(model: str, file: str) -> Release:
    data, pixels, top1, hub = CLASSIFIERS[model, file]
    notes = ["of 22k classes"] if data == IN22K else []
    notes += ["tables interpolated from 7 x 7, not trained"] if file.endswith("interp") else []
    notes += [REPLACED] if model.startswith("dinat_l") else []
    return Release(
        model=model,
        tag=TAGS[data],
        source="SHI-Labs",
        data=data,
        img_size=pixels,
        top1=top1,
        url=f"{SITE}{file}.pth",
        licence=HUB_LICENCE if hub else NO_LICENCE,
        num_classes=21841 if data == IN22K else 1000,
        crop_pct=1.0 if pixels == 384 else 0.875,
        layout="official",
        note="; ".join(notes),
    )


def _on_hub(model: str, file: str) -> Release:
    data, pixels, top1, hub = CLASSIFIERS[model, file]
    return Release(
        model=model,
        tag="",
        source="SHI-Labs, for transformers",
        data=data,
        img_size=pixels,
        top1=top1,
        url=f"https://huggingface.co/shi-labs/{hub}",
        hub_id=f"shi-labs/{hub}",
        licence="mit",
        crop_pct=1.0 if pixels == 384 else 0.875,
        loadable=False,
        note="the weights of SHI-Labs' own file with queries, keys and values apart; layout not verified",
    )


def _dense(file: str, size: str) -> Release:
    task, figures = DENSE[file]
    scenes = task == UPERNET
    model = "nat" if file.startswith("nat/") else "dinats" if file.endswith("_s_{}") else "dinat"
    pretrained = IN22K if size == "l" else IN1K
    return Release(
        model=f"{model}_{size}",
        tag="",
        source="SHI-Labs, with heads for dense prediction",
        data=f"{pretrained}, then {'ADE20K' if scenes else 'COCO'}",
        img_size=(640 if size == "l" else 512) if scenes else None,
        top1=None,
        url=f"{SITE}{file.format(WORDS[size])}.pth",
        licence=NO_LICENCE,
        layout="official",
        task="segmentation" if scenes else "detection",
        loadable=False,
        note=f"{task}: {figures[size]} {'mIoU' if scenes else 'box AP'}",
    )


def _mask2former(name: str) -> Release:
    data_set, _, task = name.partition("_")
    return Release(
        model="dinat_l",
        tag="",
        source="SHI-Labs, with heads for dense prediction",
        data=f"{IN22K}, then {DATA_SETS[data_set]}",
        img_size=None,
        top1=None,
        url=f"{SITE}dinat/checkpoints/m2f/mask2former_dinat_large_{name}.pth",
        licence=NO_LICENCE,
        task="segmentation",
        loadable=False,
        note=f"Mask2Former, {task}: {MASK2FORMER[name]}; windows of 11",
    )


DINAT = (
    *(_classifier(*key) for key in CLASSIFIERS),
    *(_on_hub(*key) for key, row in CLASSIFIERS.items() if row[3]),
    *(_dense(file, size) for file, (_, figures) in DENSE.items() for size in figures),
    *map(_mask2former, MASK2FORMER),
)
