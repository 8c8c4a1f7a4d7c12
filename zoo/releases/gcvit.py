"""GC ViT's releases: NVIDIA's own (2023), and timm's ports of NVIDIA's earlier ones (2022).

Published figures: the README of NVlabs/GCVit; timm's results-imagenet.csv. SHA-256 and sizes: the pages of the hub.
"""

from .table import IN1K, IN21K_FT, Release, cost, named

HUB = "https://huggingface.co/nvidia/GCViT/resolve/main/"
DRIVE = "https://drive.google.com/uc?export=download&id="
TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights-morevit/"
LICENCE = "cc-by-nc-sa-4.0"

# (model, file) -> data, top-1, evaluation crop, SHA-256 where known, the same file on Google Drive
OFFICIAL = {
    ("gcvit_xxt", "1k_xxtiny"): (IN1K, 79.9, 1.0, None, "1apSIWQCa5VhWLJws8ugMTuyKzyayw4Eh"),
    ("gcvit_xt", "1k_xtiny"): (
        *(IN1K, 82.0, 0.875, "d7754bac609e72e3381d6c2455424ba266bd295924eaa787188a4be40f7d394f"),
        "1OgSbX73AXmE0beStoJf2Jtda1yin9t9m",
    ),
    ("gcvit_t", "1k_tiny"): (
        *(IN1K, 83.5, 1.0, "30ac1c312765a6fea8fff75d7e15b18f675d923f8c1af041d226041865add8b7"),
        "11M6AsxKLhfOpD12Nm_c7lOvIIAn9cljy",
    ),
    ("gcvit_t2", "1k_tiny2"): (
        *(IN1K, 83.7, 0.875, "aed13457a55f56a6f8107598ab255dc86576417361e6518553447438e136e4c5"),
        "1cTD8VemWFiwAx0FB9cRMT-P4vRuylvmQ",
    ),
    ("gcvit_s", "1k_small"): (IN1K, 84.3, 0.875, None, "1Nn6ABKmYjylyWC0I41Q3oExrn4fTzO9Y"),
    ("gcvit_s2", "1k_small2"): (
        *(IN1K, 84.8, 0.875, "2252d049e127dcbb4d97e641c6fc345c8304e0e0bff6e2243065554826e52f60"),
        "1E5TtYpTqILznjBLLBTlO5CGq343RbEan",
    ),
    ("gcvit_b", "1k_base"): (
        *(IN1K, 85.0, 1.0, "068b5af7c13234fe3cbee7f4e5a622d1545a706d92bdb6bf69cd0f922aa444ec"),
        "1PF7qfxKLcv_ASOMetDP75n8lC50gaqyH",
    ),
    ("gcvit_l", "1k_large"): (IN1K, 85.7, 1.0, None, "1Lkz1nWKTwCCUR7yQJM6zu_xwN1TR0mxS"),
    ("gcvit_l", "21k_large_224"): (
        *(IN21K_FT, 86.6, 1.0, "59c5a785b45d9babc40eb818feebdc32a848ac62da13cb1716aacc8c66873956"),
        "1maGDr6mJkLyRTUkspMzCgSlhDzNRFGEf",
    ),
    ("gcvit_l_384", "21k_large_384"): (
        *(IN21K_FT, 87.4, 1.0, "9ee1f5e378e208f4ae41c4643da205d819879a1906d72fdd87771ad965e22ebd"),
        "1P-IEhvQbJ3FjnunVkM1Z9dEpKw-tsuWv",
    ),
    ("gcvit_l_512", "21k_large_512"): (
        *(IN21K_FT, 87.6, 1.0, "dbc633d63bd234ae32d5636fdbc860df3a445c3b22b4c41699dc780c812be890"),
        None,
    ),
}
SIZES = {  # bytes
    "1k_xtiny": 242_160_701,
    "1k_tiny": 345_213_295,
    "21k_large_224": 2_431_535_637,
    "21k_large_512": 3_592_824_767,
}
NOTES = {
    "1k_xtiny": "counted here: 2.9 GFLOPs",
    "1k_tiny2": "counted here: 6.2 GFLOPs",
    "1k_small2": "counted here: 11.5 GFLOPs",
    "21k_large_384": "counted here: 103.9 GFLOPs",
    "1k_base": "the introduction of the README says 85.9, its table and the paper 85.0",
    "21k_large_512": "counted here: 202.1 GFLOPs; judging by its size, the file also holds `state_dict_ema`",
}

# model -> timm's word for the size, first digits of the SHA-256, top-1, top-5, 10^9 multiply-adds
PORTED = {
    "gcvit_xxt": ("xxtiny", "d1d86009", 79.756, 95.058, 2.14),
    "gcvit_xt": ("xtiny", "274b92b7", 81.964, 95.966, 2.93),
    "gcvit_t": ("tiny", "ac783954", 83.400, 96.394, 4.79),
    "gcvit_s": ("small", "4e98afa2", 83.904, 96.662, 8.57),
    "gcvit_b": ("base", "f009139b", 84.456, 96.848, 14.87),
}


def _official(model: str, file: str) -> Release:
    data, top1, crop, sha256, drive = OFFICIAL[model, file]
    return Release(
        model=model,
        tag="nvidia_in21k_ft_in1k" if data == IN21K_FT else "nvidia_in1k",
        source="NVIDIA",
        data=data,
        img_size=int(model.rpartition("_")[2]) if model.endswith(("384", "512")) else 224,
        metrics=named(top1=top1),
        **cost(model),
        url=f"{HUB}gcvit_{file}.pth.tar",
        hub_id="nvidia/GCViT",
        file=f"gcvit_{file}.pth.tar",
        dead=(DRIVE + drive,) if drive else (),
        seen="listed on the hub",
        sha256=sha256,
        size=SIZES.get(file),
        wrapper="state_dict",
        licence=LICENCE,
        code_licence="NVIDIA Source Code License-NC",
        crop_pct=crop,
        layout="official",
        note=NOTES.get(file, ""),
    )


def _ported(model: str) -> Release:
    word, sha256, top1, top5, gflops = PORTED[model]
    return Release(
        model=model,
        tag="timm_in1k",
        source="timm's ports of NVIDIA's weights of 2022",
        data=IN1K,
        img_size=224,
        metrics=named(top1=top1, top5=top5),
        **cost(model, gflops=gflops),
        url=f"{TIMM}gcvit_{word}_224_nvidia-{sha256}.pth",
        licence=LICENCE,
        code_licence="apache-2.0",
        layout="timm",
        sha256=sha256,
        note="timm's configuration says apache-2.0, the header of its module the licence shown here",
    )


GCVIT = (*(_official(*key) for key in OFFICIAL), *map(_ported, PORTED))
