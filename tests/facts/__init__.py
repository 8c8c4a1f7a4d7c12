"""What is published about the training of each family, and which model and phase here it is about."""

import re
from pathlib import Path

import yaml

FILE = Path(__file__).with_name("recipes.yaml")
SIZES = {"tiny": "t", "small": "s", "base": "b", "large": "l", "xlarge": "xl", "mini": "m"}
NAMES = {
    "maxvit": {size: f"maxvit_{short}" for size, short in SIZES.items()} | {"torchvision_maxvit_t": "maxvit_t_tv"},
    "nat": {f"nat_{size}": f"nat_{short}" for size, short in SIZES.items()}
    | {"nat_isotropic_small": "nat_iso_s", "nat_isotropic_base": "nat_iso_b"},
    "dinat": {f"dinat_{size}": f"dinat_{short}" for size, short in SIZES.items()}
    | {f"dinat_s_{size}": f"dinats_{short}" for size, short in SIZES.items()}
    | {f"{kind}_{size}": f"{name}_{size[0]}" for kind, name in (("dinat_isotropic", "dinat_iso"), ("vitrpb", "vitrpb"))
       for size in ("small", "base")},
    "biformer": {"tiny": "biformer_t", "small": "biformer_s", "base": "biformer_b"}
    | {name: f"biformer_{name}" for name in ("stl", "stl_nchw")},
    "litv2": {"small": "litv2_s", "medium": "litv2_m", "base": "litv2_b"},
    "gcvit": {size: f"gcvit_{short}" for size, short in SIZES.items()}
    | {"xxtiny": "gcvit_xxt", "xtiny": "gcvit_xt", "tiny2": "gcvit_t2", "small2": "gcvit_s2"},
    "davit": {"tiny": "davit_t", "small": "davit_s", "base": "davit_b"},
    "sgformer": {size: f"sgformer_{size}" for size in "smb"},
    "stvit": {"small": "stvit_s", "base": "stvit_b", "large": "stvit_l"},
}  # fmt: skip
# families with a variant of its own for another size
SIZED = ("maxvit", "dinat", "gcvit")
# task of the facts -> phase here
PHASES = {
    "imagenet1k_224": "imagenet1k",
    "imagenet1k_finetune_384": "imagenet1k_finetune_384",
    "imagenet1k_finetune_512": "imagenet1k_finetune_512",
    "imagenet22k_to_1k_finetune_224": "imagenet22k_to_1k_224",
    "imagenet22k_pretrain_224": "imagenet22k",
    "imagenet21k_pretrain_224": "imagenet21k",
    "imagenet21k_to_1k_finetune_384": "imagenet21k_to_1k_384",
    "imagenet21k_to_1k_finetune_512": "imagenet21k_to_1k_512",
}
# data of the facts -> task here
DENSE = {"ade20k": "segment", "coco": "detect"}


def classification():
    """{(model, phase): what is published}; a variant that the zoo has not is a KeyError."""
    return {
        (_model(task, family, variant), _phase(task, variant)): fact
        for task, family, variant, fact in _records("imagenet")
    }


def dense():
    """{(model, phase, task): what is published} of segmentation and detection; a variant as in `classification`."""
    return {
        (NAMES[family][re.sub(r"_(ws)?\d+$", "", variant)], _dense_phase(phase, variant), DENSE[data]): fact
        for data in DENSE
        for phase, family, variant, fact in _records(data)
    }


def _records(data):
    recipes = yaml.load(FILE.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["recipes"]
    for task in (task for task in recipes if task.startswith(data)):
        for family, variants in recipes[task].items():
            for variant, fact in variants.items():
                yield task, family, variant, fact


def _model(task, family, variant):
    if variant == "dinat_large_11x11":
        return "dinat_l_384_k11"
    size = task.rsplit("_", 1)[1]
    return NAMES[family][variant] + (f"_{size}" if family in SIZED and size in ("384", "512") else "")


def _phase(task, variant):
    return "torchvision" if variant.startswith("torchvision") else PHASES[task]


def _dense_phase(phase, variant):
    """LITv2's windows are phases of their own: small_ws2 of coco_maskrcnn_1x is of coco_maskrcnn_1x_ws2."""
    return f"{phase}_{variant.split('_')[1]}" if "_ws" in variant else phase
