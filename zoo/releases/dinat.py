"""NAT's, DiNAT's and their controls' releases: SHI-Labs' own files, and what they put on the Hugging Face hub.

Published figures: NAT.md and DiNAT.md of SHI-Labs/Neighborhood-Attention-Transformer.
"""

from .table import ADE20K, COCO, IN1K, WORDS, Release, cost, named

SITE = "https://shi-labs.com/projects/"
IN22K, FINE_TUNED = "ImageNet-22k", "ImageNet-22k, then 1k"
TAGS = {IN1K: "shilabs_in1k", IN22K: "shilabs_in22k", FINE_TUNED: "shilabs_in22k_ft_in1k"}
REPLACED = "file replaced under the same URL in January 2023"

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
PARAMS_22K = {"dinat_l": 232.98, "dinat_l_384_k11": 233.18, "dinats_l": 228.57}  # 10^6, counted, with 21,841 classes

# file -> method, and of each size 10^6 parameters and 10^9 multiply-adds of the whole, box and mask AP
UNSEEN = "the tensor names of its heads were never compared with a file"
MASK, CASCADE, UPERNET = "Mask R-CNN 3x", "Cascade Mask R-CNN 3x", "UPerNet 160k"
DETECTORS = {
    "nat/checkpoints/DET/nat_{}_maskrcnn": (
        MASK,
        {"m": (40, 225, 46.5, 41.7), "t": (48, 258, 47.7, 42.6), "s": (70, 330, 48.4, 43.2)},
    ),
    "nat/checkpoints/DET/nat_{}_cascademaskrcnn": (
        CASCADE,
        {
            **{"m": (77, 704, 50.3, 43.6), "t": (85, 737, 51.4, 44.5)},
            **{"s": (108, 809, 52.0, 44.9), "b": (147, 931, 52.3, 45.1)},
        },
    ),
    "dinat/checkpoints/coco/maskrcnn_dinat_{}": (
        MASK,
        {"m": (40, 225, 47.2, 42.5), "t": (48, 258, 48.6, 43.5), "s": (70, 330, 49.3, 44.0)},
    ),
    "dinat/checkpoints/coco/cascadedmaskrcnn_dinat_{}": (
        CASCADE,
        {
            **{"m": (77, 704, 51.2, 44.4), "t": (85, 737, 52.2, 45.1), "s": (108, 809, 52.9, 45.8)},
            **{"b": (147, 931, 53.4, 46.2), "l": (258, 1276, 55.3, 47.8)},
        },
    ),
    "dinat/checkpoints/coco/maskrcnn_dinat_s_{}": (MASK, {"t": (48, 263, 46.6, 42.1), "s": (69, 350, 48.6, 43.5)}),
    "dinat/checkpoints/coco/cascadedmaskrcnn_dinat_s_{}": (
        CASCADE,
        {
            **{"t": (86, 742, 51.0, 44.1), "s": (107, 829, 52.3, 45.2)},
            **{"b": (145, 966, 52.6, 45.3), "l": (253, 1357, 54.8, 47.2)},
        },
    ),
}

# file -> of each size 10^6 parameters and 10^9 multiply-adds of the whole, mIoU at one scale and at several
SEGMENTERS = {
    "nat/checkpoints/SEG/nat_{}_upernet": {
        **{"m": (50, 900, 45.1, 46.4), "t": (58, 934, 47.1, 48.4)},
        **{"s": (82, 1010, 48.0, 49.5), "b": (123, 1137, 48.5, 49.7)},
    },
    "dinat/checkpoints/ade20k/upernet_dinat_{}": {
        **{"m": (50, 900, 45.8, 47.2), "t": (58, 934, 47.8, 48.8), "s": (82, 1010, 48.9, 49.9)},
        **{"b": (123, 1137, 49.6, 50.4), "l": (238, 2335, 54.0, 54.9)},
    },
    "dinat/checkpoints/ade20k/upernet_dinat_s_{}": {
        **{"t": (60, 941, 46.0, 47.4), "s": (81, 1030, 48.6, 49.9)},
        **{"b": (121, 1173, 49.4, 50.2), "l": (234, 2466, 53.4, 54.6)},
    },
}

# DiNAT-L with Mask2Former: file -> 10^9 multiply-adds, figures
MASK2FORMER = {
    "coco_instance": (522, {"mask_ap": 50.8}),
    "ade20k_instance": (535, {"mask_ap": 35.4}),
    "cityscapes_instance": (522, {"mask_ap": 45.1}),
    "ade20k_semantic": (518, {"miou_ms": 58.1}),
    "cityscapes_semantic": (509, {"miou_ms": 84.5}),
    "coco_panoptic": (522, {"pq": 58.5, "mask_ap": 49.2, "miou": 68.3}),
    "ade20k_panoptic": (535, {"pq": 49.4, "mask_ap": 35.0, "miou": 56.3}),
    "cityscapes_panoptic": (522, {"pq": 67.2, "mask_ap": 44.5, "miou": 83.4}),
}
DATA_SETS = {"coco": COCO, "ade20k": ADE20K, "cityscapes": "Cityscapes"}


def _classifier(model: str, file: str) -> Release:
    data, pixels, top1, hub = CLASSIFIERS[model, file]
    notes = ["21,841 classes"] if data == IN22K else []
    notes += ["position tables interpolated from 7 x 7, not trained"] if file.endswith("interp") else []
    notes += [REPLACED] if model.startswith("dinat_l") else []
    notes += ["one of SHI-Labs' pages says `_1k_` where the file's name has `_in1k_`"] if "_s_" in file and top1 else []
    notes += ["licence from the hub's model cards of the same weights"] if hub else []
    size = cost(model)
    if data == IN22K:  # the authors print no multiply-adds of these
        size = {"params": PARAMS_22K[model]}
    return Release(
        model=model,
        tag=TAGS[data],
        source="SHI-Labs",
        data=data,
        img_size=pixels,
        metrics=named(top1=top1),
        **size,
        url=f"{SITE}{file}.pth",
        licence="mit" if hub else None,
        code_licence="mit",
        num_classes=21841 if data == IN22K else 1000,
        crop_pct=1.0 if pixels == 384 else 0.875,
        layout="official",
        note="; ".join(notes),
    )


def _on_hub(model: str, file: str) -> Release:
    data, pixels, top1, hub = CLASSIFIERS[model, file]
    return Release(
        model=model,
        source="SHI-Labs, for transformers",
        data=data,
        img_size=pixels,
        metrics=named(top1=top1),
        **cost(model),
        url=f"https://huggingface.co/shi-labs/{hub}",
        hub_id=f"shi-labs/{hub}",
        licence="mit",
        code_licence="mit",
        crop_pct=1.0 if pixels == 384 else 0.875,
        layout="transformers-nat" if model.startswith("nat") else "transformers",
        verified=False,
        note="the weights of SHI-Labs' own file, with separate queries, keys and values",
    )


def _family(file: str) -> str:
    return "nat" if file.startswith("nat/") else "dinats" if file.endswith("_s_{}") else "dinat"


def _dense(file: str, size: str) -> dict:
    """What the rows of detectors and segmenters share."""
    family = _family(file)
    return {
        "model": f"{family}_{size}",
        "source": "SHI-Labs",
        "url": f"{SITE}{file.format(WORDS[size])}.pth",
        "wrapper": "state_dict",
        "licence": None,
        "code_licence": "mit",
        "layout": "official",
        "note": REPLACED if (family, size) == ("dinat", "l") else "",
    }


def _detector(file: str, size: str) -> Release:
    method, sizes = DETECTORS[file]
    params, gflops, box, mask = sizes[size]
    row = _dense(file, size)
    if method == CASCADE:
        row["note"] = "; ".join(filter(None, (UNSEEN, row["note"])))
    return Release(
        **row,
        data=f"{IN22K if size == 'l' else IN1K}, then {COCO}",
        task="detection",
        method=method,
        metrics={"box_ap": box, "mask_ap": mask},
        test_size=(800, 1333),
        params=params,
        gflops=gflops,
    )


def _segmenter(file: str, size: str) -> Release:
    params, gflops, single, several = SEGMENTERS[file][size]
    row = _dense(file, size)
    large = size == "l"
    if large:
        row["note"] = "; ".join(
            filter(None, ("its configuration is named 640 pixels but trains and evaluates with 512", row["note"]))
        )
    return Release(
        **row,
        data=f"{IN22K if large else IN1K}, then {ADE20K}",
        img_size=640 if large else 512,
        task="segmentation",
        method=UPERNET,
        metrics={"miou": single, "miou_ms": several},
        test_size=(512, 2048) if large else None,
        params=params,
        gflops=gflops,
    )


def _mask2former(name: str) -> Release:
    data_set, _, kind = name.partition("_")
    gflops, metrics = MASK2FORMER[name]
    return Release(
        model="dinat_l",
        source="SHI-Labs",
        data=f"{IN22K}, then {DATA_SETS[data_set]}",
        task="segmentation",
        method=f"Mask2Former, {kind}",
        metrics=metrics,
        params=220,
        gflops=gflops,
        url=f"{SITE}dinat/checkpoints/m2f/mask2former_dinat_large_{name}.pth",
        wrapper="model",
        licence=None,
        code_licence="mit",
        foreign="detectron2's Mask2Former; its backbone has windows of 11, and dilations='mask2former'",
        note=REPLACED,
    )


DINAT = (
    *(_classifier(*key) for key in CLASSIFIERS),
    *(_on_hub(*key) for key, row in CLASSIFIERS.items() if row[3]),
    *(_detector(file, size) for file, (_, sizes) in DETECTORS.items() for size in sizes),
    *(_segmenter(file, size) for file, sizes in SEGMENTERS.items() for size in sizes),
    *map(_mask2former, MASK2FORMER),
)
