"""NAT, DiNAT, DiNAT-s and the isotropic models: their authors' classification and dense code, and transformers."""

import torch

from ..convert import Constant, Group, Layout
from .tables import natten_index

BLOCK = "stages.{i}.blocks.{j}"


def _block(theirs: str, ours: str = BLOCK) -> dict[str, str]:
    return {
        f"{theirs}.norm1": f"{ours}.attn.norm",
        f"{theirs}.attn": f"{ours}.attn.fn",
        f"{theirs}.norm2": f"{ours}.mlp.norm",
        f"{theirs}.mlp": f"{ours}.mlp.fn",
    }


HEAD = {"norm": "head.before", "head": "head.fc"}
DENSE = {"norm{i}": "feature_norms.{i}"}
PATCHES = {"patch_embed.proj": "stem.conv1", "patch_embed.norm": "stem.norm"}

DINAT = Layout(
    "official",
    rules={
        "patch_embed.proj.0": "stem.conv1",
        "patch_embed.proj.1": "stem.conv2",
        "patch_embed.norm": "stem.norm",
        **_block("levels.{i}.blocks.{j}"),
        "levels.{i}.blocks.{j}.gamma1": f"{BLOCK}.attn.scale.gamma",
        "levels.{i}.blocks.{j}.gamma2": f"{BLOCK}.mlp.scale.gamma",
        "levels.{i}.downsample": "stages.{i+1}.downsample",
        **HEAD,
        **DENSE,
    },
)


def _transformers(name: str, prefix: str) -> Layout:
    """Hugging Face's classifiers; these names were not checked against a file."""
    theirs = f"{prefix}.encoder.levels.{{i}}"
    layer = f"{theirs}.layers.{{j}}"
    apart = Group(
        tuple(f"{layer}.attention.self.{part}" for part in ("query", "key", "value")),
        (f"{layer}.attention.self.qkv",),
        lambda parts: [torch.stack(list(parts)).flatten(0, 1)],  # not cat, which would take parts of different sizes
        lambda whole: whole[0].chunk(3),
    )
    scales = Group(
        (f"{layer}.layer_scale_parameters",),
        tuple(f"{layer}.layer_scale_parameters.{part}" for part in (0, 1)),
        lambda whole: whole[0].unbind(),
        lambda parts: [torch.stack(list(parts))],
    )
    return Layout(
        name,
        rules={
            f"{prefix}.embeddings.patch_embeddings.projection.0": "stem.conv1",
            f"{prefix}.embeddings.patch_embeddings.projection.1": "stem.conv2",
            f"{prefix}.embeddings.norm": "stem.norm",
            f"{layer}.layernorm_before": f"{BLOCK}.attn.norm",
            f"{layer}.attention.self.qkv": f"{BLOCK}.attn.fn.qkv",
            f"{layer}.attention.self.rpb": f"{BLOCK}.attn.fn.rpb",
            f"{layer}.attention.output.dense": f"{BLOCK}.attn.fn.proj",
            f"{layer}.layer_scale_parameters.0": f"{BLOCK}.attn.scale.gamma",
            f"{layer}.layernorm_after": f"{BLOCK}.mlp.norm",
            f"{layer}.intermediate.dense": f"{BLOCK}.mlp.fn.fc1",
            f"{layer}.output.dense": f"{BLOCK}.mlp.fn.fc2",
            f"{layer}.layer_scale_parameters.1": f"{BLOCK}.mlp.scale.gamma",
            f"{theirs}.downsample": "stages.{i+1}.downsample",
            f"{prefix}.layernorm": "head.before",
            "classifier": "head.fc",
        },
        groups=(apart, scales),
        models=f"{prefix}_",
    )


DINATS = Layout(
    "official",
    rules={
        **PATCHES,
        **_block("layers.{i}.blocks.{j}"),
        "layers.{i}.downsample": "stages.{i+1}.downsample",
        **HEAD,
        **DENSE,
    },
)
# the authors number the blocks throughout, ours come in stages of three
_BLOCKS = [_block(f"layers.{n}", f"stages.{n // 3}.blocks.{n % 3}") for n in range(12)]
_RULES = PATCHES | HEAD | {theirs: ours for block in _BLOCKS for theirs, ours in block.items()}
ISOTROPIC = Layout("official", rules=_RULES)
_INDEX = Constant("layers.{i}.attn.rpb", natten_index)
VITRPB = Layout("official", rules=_RULES, drop={"layers.{i}.attn.relative_position_index": _INDEX})

LAYOUTS = {
    "DiNAT": (DINAT, _transformers("transformers", "dinat"), _transformers("transformers-nat", "nat")),
    "DiNATs": (DINATS,),
    "Isotropic": (ISOTROPIC,),
    "ViTRPB": (VITRPB,),
}
