"""MaxViT's releases: timm's ports of the authors' weights and torchvision's own; listed only, the authors' TensorFlow
files and timm's own architectures of that name.

Published figures: timm's results-imagenet.csv; torchvision's documentation; the tables of google-research/maxvit, and
tables 3 and 14 of the paper for ImageNet-21k.
"""

from .table import IMAGENET, IN1K, IN21K, IN21K_FT, INCEPTION, WORDS, Release, cost, named

# (size, pixels, data) -> top-1, top-5 and 10^9 multiply-adds of timm's port, top-1 that the authors print
PORTED = {
    ("t", 224, IN1K): (83.426, 96.584, 5.6, 83.62),
    ("t", 384, IN1K): (85.106, 97.382, 17.53, 85.24),
    ("t", 512, IN1K): (85.658, 97.592, 33.49, 85.72),
    ("s", 224, IN1K): (84.452, 96.824, 11.66, 84.45),
    ("s", 384, IN1K): (85.534, 97.466, 35.87, 85.74),
    ("s", 512, IN1K): (86.102, 97.758, 67.26, 86.19),
    ("b", 224, IN1K): (84.884, 97.002, 24.04, 84.95),
    ("b", 384, IN1K): (86.290, 97.802, 73.8, 86.34),
    ("b", 512, IN1K): (86.598, 97.924, 138.02, 86.66),
    ("l", 224, IN1K): (84.938, 96.980, 43.68, 85.17),
    ("l", 384, IN1K): (86.242, 97.684, 132.55, 86.40),
    ("l", 512, IN1K): (86.534, 97.884, 244.75, 86.70),
    ("b", 224, IN21K): (None, None, 24.04, None),
    ("b", 384, IN21K_FT): (87.930, 98.546, 73.8, 88.24),
    ("b", 512, IN21K_FT): (88.214, 98.538, 138.02, 88.38),
    ("l", 224, IN21K): (None, None, 43.68, None),
    ("l", 384, IN21K_FT): (87.994, 98.576, 132.55, 88.32),
    ("l", 512, IN21K_FT): (88.236, 98.608, 244.75, 88.46),
    ("xl", 224, IN21K): (None, None, 97.52, None),
    ("xl", 384, IN21K_FT): (88.302, 98.538, 292.78, 88.51),
    ("xl", 512, IN21K_FT): (88.540, 98.650, 534.14, 88.70),
}
PARAMS_21K = {"b": 135.50, "l": 233.15, "xl": 506.99}  # 10^6, with 21,843 classes
TAGS = {IN1K: "in1k", IN21K: "in21k", IN21K_FT: "in21k_ft_in1k"}
FOLDERS = {IN1K: "i1k", IN21K: "i21k_pt", IN21K_FT: "i21k_i1k"}
BUCKET = "gresearch/maxvit/ckpts/"

# what the authors' tables say of the two that they print differently
PRINTED = {
    ("b", 224, IN1K): "the paper prints 24.2 GFLOPs in one table, 23.4 in another",
    ("l", 384, IN1K): "table 13 of the paper prints 84.40 by mistake",
}

# timm's own models -> pixels, 10^6 parameters, 10^9 multiply-adds, top-1, top-5, crop, file in timm's GitHub releases
TIMM_FILES = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights-maxx/"
IN12K_FT = "ImageNet-12k, then 1k"
TIMM_OWN = {
    ("maxvit_nano_rw_256", IN1K): (256, 15.45, 4.46, 82.934, 96.224, 0.95, "fb127241"),
    ("maxvit_tiny_rw_224", IN1K): (224, 29.06, 5.11, 83.522, 96.488, 0.95, "7d0dffeb"),
    ("maxvit_rmlp_pico_rw_256", IN1K): (256, 7.52, 1.85, 80.550, 95.186, 0.95, "8d82f2c6"),
    ("maxvit_rmlp_nano_rw_256", IN1K): (256, 15.5, 4.47, 82.978, 96.274, 0.95, "c17bb0d6"),
    ("maxvit_rmlp_tiny_rw_256", IN1K): (256, 29.15, 6.77, 84.226, 96.782, 0.95, "bbef0ff5"),
    ("maxvit_rmlp_small_rw_224", IN1K): (224, 64.9, 10.75, 84.488, 96.772, 0.9, "6ef0ae4f"),
    ("maxvit_rmlp_base_rw_224", IN12K_FT): (224, 116.14, 23.15, 86.908, 98.004, 0.95, None),
    ("maxvit_rmlp_base_rw_384", IN12K_FT): (384, 116.14, 70.97, 87.810, 98.366, 1.0, None),
    ("maxvit_rmlp_base_rw_224", "ImageNet-12k"): (224, 124.46, 23.15, None, None, 0.95, None),
}
TIMM_TAGS = {IN1K: "sw_in1k", IN12K_FT: "sw_in12k_ft_in1k", "ImageNet-12k": "sw_in12k"}


def _model(size: str, pixels: int) -> str:
    return f"maxvit_{size}" if pixels == 224 else f"maxvit_{size}_{pixels}"


def _ported(size: str, pixels: int, data: str) -> Release:
    top1, top5, gflops, _ = PORTED[size, pixels, data]
    hub_id = f"timm/maxvit_{WORDS[size]}_tf_{pixels}.{TAGS[data]}"
    return Release(
        model=_model(size, pixels),
        tag=f"timm_tf_{TAGS[data]}",
        source="timm's ports of the authors' weights",
        data=data,
        img_size=pixels,
        metrics=named(top1=top1, top5=top5),
        **cost(_model(size, pixels), params=PARAMS_21K[size] if data == IN21K else None, gflops=gflops),
        url=f"https://huggingface.co/{hub_id}",
        hub_id=hub_id,
        licence="apache-2.0",
        code_licence="apache-2.0",
        num_classes=21843 if data == IN21K else 1000,
        stats=IMAGENET if (pixels, data) == (224, IN1K) else INCEPTION,
        crop_pct=0.95 if pixels == 224 else 1.0,
        crop_mode="center" if pixels == 224 else "squash",
        layout="timm",
        note="21,843 classes" if data == IN21K else "",
    )


def _tensorflow(size: str, pixels: int, data: str) -> Release:
    folder = f"{BUCKET}maxvit{WORDS[size]}/{FOLDERS[data]}/{pixels}"
    notes = [PRINTED[size, pixels, data]] if (size, pixels, data) in PRINTED else []
    notes += ["21,843 classes; the authors' tables count a 1,000-class classifier"] if data == IN21K else []
    notes += ["top-1 from the paper, the repository gives none"] if data == IN21K_FT else []
    notes += ["fine-tuned; evaluation without a crop is from the paper, the code does not say"] if pixels > 224 else []
    return Release(
        model=_model(size, pixels),
        source="the authors' TensorFlow checkpoints",
        data=data,
        img_size=pixels,
        metrics=named(top1=PORTED[size, pixels, data][3]),
        **cost(_model(size, pixels), params=PARAMS_21K[size] if data == IN21K else None),
        url=f"https://console.cloud.google.com/storage/browser/{folder}",
        mirrors=(f"gs://{folder}",),
        by_hand=True,
        licence=None,
        code_licence="apache-2.0",
        wrapper=None,
        weights="raw" if data == IN21K else "ema",
        num_classes=21843 if data == IN21K else 1000,
        stats=IMAGENET if (pixels, data) == (224, IN1K) else INCEPTION,
        crop_pct=0.875 if pixels == 224 else 1.0,
        foreign="in TensorFlow's format; timm's ports hold the same weights",
        note="; ".join(notes),
    )


def _of_timm(model: str, data: str) -> Release:
    pixels, params, gflops, top1, top5, crop, sha256 = TIMM_OWN[model, data]
    hub_id = f"timm/{model}.{TIMM_TAGS[data]}"
    hub = f"https://huggingface.co/{hub_id}"
    return Release(
        model=model,
        source="timm, architectures of its own",
        data=data,
        img_size=pixels,
        metrics=named(top1=top1, top5=top5),
        params=params,
        gflops=gflops,
        url=f"{TIMM_FILES}{model}_sw-{sha256}.pth" if sha256 else hub,
        hub_id=hub_id,
        mirrors=(hub,) if sha256 else (),
        sha256=sha256,
        licence="apache-2.0",
        code_licence="apache-2.0",
        num_classes=11821 if data == "ImageNet-12k" else 1000,
        stats=INCEPTION,
        crop_pct=crop,
        crop_mode="squash" if pixels == 384 else "center",
        foreign="timm's variations on MaxViT, not the paper's models; load them with timm",
        note="11,821 classes" if data == "ImageNet-12k" else "",
    )


TORCHVISION = Release(
    model="maxvit_t_tv",
    tag="tv_in1k",
    source="torchvision",
    data=IN1K,
    img_size=224,
    metrics={"top1": 83.70, "top5": 96.722},
    **cost("maxvit_t_tv"),
    url="https://download.pytorch.org/models/maxvit_t-bc5ab103.pth",
    licence=None,
    code_licence="bsd-3-clause",
    crop_pct=1.0,
    layout="torchvision",
    sha256="bc5ab103",
    note="short side resized to 224, centre crop; trained with a batch-norm momentum of 0.99 by mistake",
)

MAXVIT = (
    *(_ported(*key) for key in PORTED),
    TORCHVISION,
    *(_tensorflow(*key) for key in PORTED),
    *(_of_timm(*key) for key in TIMM_OWN),
)
