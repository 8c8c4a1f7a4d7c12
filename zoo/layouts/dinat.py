"""NAT, DiNAT, DiNAT-s and the isotropic models: their authors' classification and dense-prediction code."""

from ..convert import Layout

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
# the authors number the blocks from end to end, ours are three a stage
_BLOCKS = [_block(f"layers.{n}", f"stages.{n // 3}.blocks.{n % 3}") for n in range(12)]
_RULES = PATCHES | HEAD | {theirs: ours for block in _BLOCKS for theirs, ours in block.items()}
ISOTROPIC = Layout("official", rules=_RULES)
VITRPB = Layout("official", rules=_RULES, drop=tuple(f"layers.{n}.attn.relative_position_index" for n in range(12)))

LAYOUTS = {"DiNAT": (DINAT,), "DiNATs": (DINATS,), "Isotropic": (ISOTROPIC,), "VitRPB": (VITRPB,)}
