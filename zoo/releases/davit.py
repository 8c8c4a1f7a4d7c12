"""DaViT's releases: timm's ports of its authors' weights, the authors' own files, and what else holds a DaViT (listed).

Published figures: timm's results-imagenet.csv; the README of dingmyu/davit; the metafile of mmpretrain.
"""

from .table import ADE20K, COCO, IN1K, WORDS, Release, cost, named

SHARE = "https://connecthkuhk-my.sharepoint.com/:u:/g/personal/u3007305_connect_hku_hk/"
DRIVE = "https://drive.google.com/file/d/{}/view?usp=sharing"
OPENMMLAB = "https://download.openmmlab.com/mmclassification/v0/davit/"

# top-1, top-5 and 10^9 multiply-adds of timm's port, whose crop is 0.95
PORTED = {"t": (82.694, 96.264, 4.54), "s": (84.252, 96.942, 8.8), "b": (84.652, 97.020, 15.51)}

# top-1 and top-5 of the authors, whose crop is 0.9, and their file on OneDrive and on Google Drive
OFFICIAL = {
    "t": (82.8, 96.2, "EcJYlVYP9y5FsDbMP-nwjtABgLmdrNGZBxgR5--Kg3MZ7Q?e=v9OrXB", "1RSpi3lxKaloOL5-or20HuG975tbPwxRZ"),
    "s": (84.2, 96.9, "ERN_Gzm8oKdIvO01r0X2cscB_owuRAnnQPNGJEVGP23xHQ?e=MVW3ZO", "1q976ruj45mt0RhO9oxhOo6EP_cmj4ahQ"),
    "b": (84.6, 96.9, "Ea8kCpdM949CvTM0w7DWbGwBxxiACMSik4zx-emrNY0uKQ?e=aEjC7u", "1u9sDBEueB-YFuLigvcwf4b2YyA4MIVsZ"),
}

# top-1 and top-5 of mmpretrain's ports, end of the file's name
MMPRETRAIN = {"t": (82.24, 96.13, "700fdf7d"), "s": (83.61, 96.75, "51a849a6"), "b": (84.09, 96.82, "19e0d956")}

# (method, size) -> 10^6 parameters and 10^9 multiply-adds of the whole, figures, file on OneDrive and on Google Drive
MASK, RETINA, UPERNET = "Mask R-CNN", "RetinaNet", "UPerNet"
DENSE = {
    (f"{MASK} 1x", "t"): (
        *(47.8, 263, {"box_ap": 45.0, "mask_ap": 41.1}),
        *("ERgc6486IzJPpPWDPJUwKP0BCc4oFtTgdudnPmmPqozqug?e=QWsLYg", "1kXVQdXmcBN6FNfgL3BO5APNRGHQFZwzB"),
    ),
    (f"{MASK} 1x", "s"): (
        *(69.2, 351, {"box_ap": 47.7, "mask_ap": 42.9}),
        *("EVgVH-9l--pJpBuly1xwsAkBx57Ph9ZAajt31vk-TqQPrA?e=byv2uC", "1psE7P775kmniHCKFU83gHfpU9skwQ2Jo"),
    ),
    (f"{MASK} 1x", "b"): (
        *(107.3, 491, {"box_ap": 48.2, "mask_ap": 43.3}),
        *("EY5MU9O8n0ZPrvzCgakS4PoBdg6H3FCOSi1QVNCpJSQJ7g?e=MtdUGz", "1HyBF8WapjOI78_2U45iOsdJ8zI41sBL4"),
    ),
    (f"{MASK} 3x", "t"): (
        *(47.8, 263, {"box_ap": 47.4, "mask_ap": 42.9}),
        *("Ed1Su_p29_5KuX5Lbc2oq6gB3AVKnI-ojAT-yyICXWRbgg?e=XdJPsp", "1CfqaZ5xzVuK3EFeslwI_RS4sIY6sh6aK"),
    ),
    (f"{MASK} 3x", "s"): (
        *(69.2, 351, {"box_ap": 49.5, "mask_ap": 44.3}),
        *("EQCvUkIhwxNOrR1KibewNU0BqDDxzt311xANejUHprm0yQ?e=LiK9hX", "1INHzXjLynO5eelmg8f_bgzwylVZUbpI5"),
    ),
    (f"{MASK} 3x", "b"): (
        *(107.3, 491, {"box_ap": 49.9, "mask_ap": 44.6}),
        *("Ed8kh4c1G41OmfIzo5sOS74Bccp1G65qg0H2s0WtcXUJZA?e=lnqLoQ", "16HTUwAxm3uKXhxzRJADYODDCz-Co_zvM"),
    ),
    (f"{RETINA} 1x", "t"): (
        *(38.5, 244, {"box_ap": 44.0}),
        *("EdNCWmdUArpPgjNn2JY37_QBs5KVNy8d-8bNK7DNyjYHyg?e=osMprJ", "1pmmCgek4opgLu4Q3D3rBilgVaCDYGTmi"),
    ),
    (f"{RETINA} 1x", "s"): (
        *(59.9, 332, {"box_ap": 46.0}),
        *("EfWFiJY0iEpGhPzwQA5nv7IB-8bgnVfCHQVT4FqX8UeK9w?e=sr0Ed6", "1weqNFG5BIJjSPXqEDiGIOzcdxZYGwjcg"),
    ),
    (f"{RETINA} 1x", "b"): (
        *(98.5, 471, {"box_ap": 46.7}),
        *("ESKE9OFCDzxGo2D2Eyr29c0BFhc-j8OjF2WRoSxSK0gn4g?e=KfyJCA", "14KNYGr_z5c1ZgJXOV_yVu96Uo8Iu7OjR"),
    ),
    (f"{RETINA} 3x", "t"): (
        *(38.5, 244, {"box_ap": 46.5}),
        *("EZ10htYokJhOi0serTLAx5cBGcJLL7PgWSO1uzlIXUw1Jg?e=zsMh4y", "10reUbHDePMFeQODvAHn856Jjd1eXQgHC"),
    ),
    (f"{RETINA} 3x", "s"): (
        *(59.9, 332, {"box_ap": 48.2}),
        *("Ef9u9l_81_1PvCKGngnrkPoB1mGjelED0CzXr7RJwoQB7w?e=zTYozh", "1olT5sSTm9cdsHPILtxCJNW_68iVUcU85"),
    ),
    (f"{RETINA} 3x", "b"): (
        *(98.5, 471, {"box_ap": 48.7}),
        *("Ea7c6g_OkqpHrGIviK2Ua-4B2wc4Rd0PTdXAlA2IyTZxGQ?e=N4askR", "12dURuwqMMtU_A8SGS47M1Q4QsjN8L1uk"),
    ),
    (f"{UPERNET} 160k", "t"): (
        *(60, 940, {"miou": 46.3}),
        *("ERajqEKtzIBGgX2slZxCYrEBoEL-ZnLkUaXP9SHT-rp13w?e=Ga9U8a", "1UHrdthX3N30YkQZz7eBq0gO2uLCYP3r_"),
    ),
    (f"{UPERNET} 160k", "s"): (
        *(81, 1030, {"miou": 48.8}),
        *("Ef5hJPsJXNZLiRkUTL9-ozcBaVyVEAvolNwMUlsmJhm2Yg?e=BnJ6Et", "1NYR9axwsXR-GccpLWzrGSRv-L3TzDy99"),
    ),
    (f"{UPERNET} 160k", "b"): (
        *(121, 1175, {"miou": 49.4}),
        *("EWl80Je0fUlNlbJzI_qKgIkBFX-epbfK3Vzgdq1C2iOsuA?e=wumOBS", "1-3berKLlmg01IVYUr-3gtcfQ5yZLiO7_"),
    ),
}

# timm's name of Florence-2's trunk -> repository, 10^6 parameters, 10^9 multiply-adds, licence
FLORENCE = {
    "davit_base_fl": ("Florence-2-base", 90.37, 190.32, "mit"),
    "davit_huge_fl": ("Florence-2-large", 360.64, 744.84, None),
}


def _ported(size: str) -> Release:
    top1, top5, gflops = PORTED[size]
    hub_id = f"timm/davit_{WORDS[size]}.msft_in1k"
    return Release(
        model=f"davit_{size}",
        tag="timm_msft_in1k",
        source="timm's ports of the authors' weights",
        data=IN1K,
        img_size=224,
        metrics=named(top1=top1, top5=top5),
        **cost(f"davit_{size}", gflops=gflops),
        url=f"https://huggingface.co/{hub_id}",
        hub_id=hub_id,
        licence="apache-2.0",
        code_licence="apache-2.0",
        crop_pct=0.95,
        layout="timm",
        note="licence from timm's model card; the repository of the original weights says mit",
    )


def _official(size: str) -> Release:
    top1, top5, share, drive = OFFICIAL[size]
    return Release(
        model=f"davit_{size}",
        tag="dingmyu_in1k",
        source="the authors",
        data=IN1K,
        img_size=224,
        metrics=named(top1=top1, top5=top5),
        **cost(f"davit_{size}"),
        url=SHARE + share,
        by_hand=True,
        mirrors=(DRIVE.format(drive),),
        seen="a personal share, which may expire",
        wrapper="state_dict",
        licence=None,
        code_licence="mit",
        crop_pct=0.9,
        layout="official",
    )


def _mmpretrain(size: str) -> Release:
    top1, top5, sha256 = MMPRETRAIN[size]
    return Release(
        model=f"davit_{size}",
        source="mmpretrain's ports of the authors' weights",
        data=IN1K,
        img_size=224,
        metrics=named(top1=top1, top5=top5),
        **cost(f"davit_{size}"),
        url=f"{OPENMMLAB}davit-{WORDS[size]}_3rdparty_in1k_20221116-{sha256}.pth",
        sha256=sha256,
        wrapper=None,
        licence=None,
        code_licence="apache-2.0",
        crop_pct=None,
        foreign="mmpretrain's names have no layout here; the authors' and timm's files hold the same weights",
    )


def _dense(method: str, size: str) -> Release:
    params, gflops, metrics, share, drive = DENSE[method, size]
    scenes = method.startswith(UPERNET)
    stated = size == "t" and not scenes  # detectors of other sizes have no published configuration
    return Release(
        model=f"davit_{size}",
        source="the authors",
        data=f"{IN1K}, then " + (ADE20K if scenes else COCO),
        img_size=512 if scenes else None,
        task="segmentation" if scenes else "detection",
        method=method,
        metrics=metrics,
        test_size=(800, 1333) if stated else None,
        params=params,
        gflops=gflops,
        url=SHARE + share,
        by_hand=True,
        mirrors=(DRIVE.format(drive),),
        seen="a personal share, which may expire",
        wrapper="state_dict",
        licence=None,
        code_licence="mit",
        layout="official",
        note="the README does not say whether at one scale or several; assumed to be one" if scenes else "",
    )


def _florence(model: str) -> Release:
    repository, params, gflops, licence = FLORENCE[model]
    return Release(
        model=model,
        source="Microsoft's Florence-2",
        data="image-text pairs (FLD-5B)",
        img_size=768,
        task="features",
        params=params,
        gflops=gflops,
        url=f"https://huggingface.co/microsoft/{repository}",
        hub_id=f"microsoft/{repository}",
        licence=licence,
        code_licence="apache-2.0",
        foreign="a different model (windows of 12, overlapping merges, other channel attention) inside a whole "
        "Florence-2; load it with timm",
        note="timm's configuration says apache-2.0",
    )


DAVIT = (
    *map(_ported, PORTED),
    *map(_official, OFFICIAL),
    *map(_mmpretrain, MMPRETRAIN),
    *(_dense(*key) for key in DENSE),
    *map(_florence, FLORENCE),
)
