"""Figures that were published without weights: no file is known for any row here."""

from .table import ADE20K, COCO, IN1K, Unreleased

JFT, TOKENS = "JFT-300M, then ImageNet-1k", "ImageNet-1k with token labels"
PAPER, GARDEN = "table 14 of the paper", "TensorFlow Model Garden, a re-implementation by the authors"
RMT, MAMBAOUT = "as quoted in the paper of RMT", "as quoted in the paper of MambaOut"

# model -> data, pixels, 10^6 parameters, 10^9 multiply-adds, top-1, where the figure stands
CLASSIFIERS = {
    "maxvit_b_384": (JFT, 384, 119, 74.2, 88.69, PAPER),
    "maxvit_l_384": (JFT, 384, 212, 128.7, 89.12, f"{PAPER}; the repository says 133.1 GFLOPs for the same network"),
    "maxvit_xl_384": (JFT, 384, 475, 293.7, 89.36, PAPER),
    "maxvit_b_512": (JFT, 512, 119, 138.3, 88.82, f"{PAPER}; the repository says 138.5 GFLOPs for the same network"),
    "maxvit_l_512": (JFT, 512, 212, 245.2, 89.41, f"{PAPER}; the repository says 245.4 GFLOPs for the same network"),
    "maxvit_xl_512": (JFT, 512, 475, 535.2, 89.53, PAPER),
    "davit_g": (
        "1.5 billion image-text pairs",
        None,
        None,
        None,
        90.4,
        "README; the announced repository is gone",
    ),
    "biformer_s": (TOKENS, 224, 26, 4.5, 84.3, RMT),
    "biformer_b": (TOKENS, 224, 58, 9.8, 85.4, RMT),
}
# (model, method) -> 10^6 parameters, 10^9 multiply-adds, figures, where they stand
CASCADE, MASK, RETINA, UPERNET = "Cascade Mask R-CNN", "Mask R-CNN", "RetinaNet", "UPerNet"
DETECTORS = {
    ("maxvit_t", f"{CASCADE}, 896 pixels"): (69, 475, {"box_ap": 52.1, "mask_ap": 44.6}, "table 4 of the paper"),
    ("maxvit_s", f"{CASCADE}, 896 pixels"): (107, 595, {"box_ap": 53.1, "mask_ap": 45.4}, "table 4 of the paper"),
    ("maxvit_b", f"{CASCADE}, 896 pixels"): (157, 856, {"box_ap": 53.4, "mask_ap": 45.7}, "table 4 of the paper"),
    ("maxvit_t", f"{CASCADE}, 640 pixels"): (None, None, {"box_ap": 49.97, "mask_ap": 42.69}, GARDEN),
    ("maxvit_s", f"{CASCADE}, 640 pixels"): (None, None, {"box_ap": 50.79, "mask_ap": 43.36}, GARDEN),
    ("maxvit_b", f"{CASCADE}, 640 pixels"): (None, None, {"box_ap": 51.59, "mask_ap": 44.07}, GARDEN),
    ("maxvit_t", f"{CASCADE}, 896 pixels, 200 epochs"): (None, None, {"box_ap": 52.35, "mask_ap": 44.69}, GARDEN),
    ("maxvit_s", f"{CASCADE}, 896 pixels, 200 epochs"): (None, None, {"box_ap": 53.54, "mask_ap": 45.79}, GARDEN),
    ("maxvit_b", f"{CASCADE}, 896 pixels, 200 epochs"): (None, None, {"box_ap": 53.47, "mask_ap": 45.96}, GARDEN),
    ("maxvit_b", f"{RETINA}, 640 pixels"): (None, None, {"box_ap": 46.63}, f"{GARDEN}: expected, in a configuration"),
    ("gcvit_t", f"{MASK} 3x"): (48, 291, {"box_ap": 47.9, "mask_ap": 43.2}, "README"),
    ("gcvit_t", f"{CASCADE} 3x"): (85, 770, {"box_ap": 51.6, "mask_ap": 44.6}, "README"),
    ("gcvit_s", f"{CASCADE} 3x"): (108, 866, {"box_ap": 52.4, "mask_ap": 45.4}, "README"),
    ("gcvit_b", f"{CASCADE} 3x"): (146, 1018, {"box_ap": 52.9, "mask_ap": 45.8}, "README"),
    ("gcvit", "DINO, 4 scales"): (None, None, {"box_ap": 58.3}, "abstract, which names no variant"),
    ("biformer_s", f"{MASK} 1x"): (
        *(None, None, {"box_ap": 47.8, "mask_ap": 43.2}),
        "README; reproduced with the released code 48.1, 43.6",
    ),
    ("biformer_b", f"{MASK} 1x"): (None, None, {"box_ap": 48.6, "mask_ap": 43.7}, "README"),
    ("biformer_s", f"{RETINA} 1x"): (None, None, {"box_ap": 45.9}, "README; reproduced with the released code 47.3"),
    ("biformer_b", f"{RETINA} 1x"): (None, None, {"box_ap": 47.1}, "README"),
    ("sgformer_s", f"{MASK} 1x"): (41, None, {"box_ap": 47.4, "mask_ap": 42.6}, MAMBAOUT),
    ("sgformer_m", f"{MASK} 1x"): (51, None, {"box_ap": 48.2, "mask_ap": 43.6}, MAMBAOUT),
    ("sgformer_b", "not stated"): (None, None, {"box_ap": 51.2}, "abstract"),
    ("stvit", "not stated"): (None, None, {"box_ap": 53.9, "mask_ap": 46.8}, "abstract, which names no variant"),
}
SEGMENTERS = {
    ("gcvit_b", UPERNET): (125, 1348, {"miou": 49.2}, RMT),
    ("biformer_s", "Semantic FPN 80k"): (None, None, {"miou": 48.9}, "README"),
    ("biformer_b", "Semantic FPN 80k"): (None, None, {"miou": 49.9}, "README"),
    ("biformer_s", f"{UPERNET} 160k"): (None, None, {"miou": 49.8, "miou_ms": 50.8}, "README"),
    ("biformer_b", f"{UPERNET} 160k"): (None, None, {"miou": 51.0, "miou_ms": 51.7}, "README"),
    ("sgformer_s", UPERNET): (53, 989, {"miou": 49.9, "miou_ms": 51.5}, MAMBAOUT),
    ("sgformer_m", UPERNET): (68, 1114, {"miou": 51.2, "miou_ms": 52.1}, MAMBAOUT),
    ("sgformer_b", UPERNET): (109, 1304, {"miou": 52.0, "miou_ms": 52.7}, MAMBAOUT),
    ("stvit", "not stated"): (
        *(None, None, {"miou": 51.9}),
        "abstract, which names neither the variant nor whether at one scale or several",
    ),
}


def _classifier(model: str) -> Unreleased:
    data, pixels, params, gflops, top1, source = CLASSIFIERS[model]
    return Unreleased(
        model=model, data=data, img_size=pixels, params=params, gflops=gflops, metrics={"top1": top1}, source=source
    )


def _dense(task: str, data: str, model: str, method: str, row: tuple) -> Unreleased:
    params, gflops, metrics, source = row
    return Unreleased(
        model=model,
        data=f"{IN1K}, then {data}",
        task=task,
        method=method,
        params=params,
        gflops=gflops,
        metrics=metrics,
        source=source,
    )


UNRELEASED = (
    *map(_classifier, CLASSIFIERS),
    *(_dense("detection", COCO, *key, row) for key, row in DETECTORS.items()),
    *(_dense("segmentation", ADE20K, *key, row) for key, row in SEGMENTERS.items()),
)
