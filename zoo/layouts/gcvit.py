"""GC ViT: its authors' classification and detection code, and timm's ports of their weights."""

from ..convert import Constant, Layout
from .tables import LINEAR, SWIN, swin_index

BLOCK = "stages.{i}.blocks.{j}"
QUERY = "stages.{i}.query.convs.{j}"


def _official_convs(theirs: str, ours: str) -> dict[str, str]:
    return {
        f"{theirs}.conv.0": f"{ours}.depthwise",
        f"{theirs}.conv.2.fc.0": f"{ours}.se.fc1",
        f"{theirs}.conv.2.fc.2": f"{ours}.se.fc2",
        f"{theirs}.conv.3": f"{ours}.project",
    }


def _timm_convs(theirs: str, ours: str) -> dict[str, str]:
    return {
        f"{theirs}.conv_dw": f"{ours}.depthwise",
        f"{theirs}.se": f"{ours}.se",
        f"{theirs}.conv_pw": f"{ours}.project",
    }


def _same(theirs: str, ours: str) -> dict[str, str]:
    """The names in a reduction that both share."""
    return {f"{theirs}.{part}": f"{ours}.{part}" for part in ("norm1", "reduction", "norm2")}


def _block(theirs: str, table: str, gammas: tuple[str, str]) -> dict[str, str]:
    return {
        f"{theirs}.norm1": f"{BLOCK}.attn.norm",
        f"{theirs}.attn.qkv": f"{BLOCK}.attn.fn.qkv",
        f"{theirs}.attn.{table}": f"{BLOCK}.attn.fn.rpb",
        f"{theirs}.attn.proj": f"{BLOCK}.attn.fn.proj",
        f"{theirs}.{gammas[0]}": f"{BLOCK}.attn.scale.gamma",
        f"{theirs}.norm2": f"{BLOCK}.mlp.norm",
        f"{theirs}.mlp": f"{BLOCK}.mlp.fn",
        f"{theirs}.{gammas[1]}": f"{BLOCK}.mlp.scale.gamma",
    }


TABLES = {f"{BLOCK}.attn.fn.rpb": SWIN}
GATES = ("stem.down.conv", "stages.{i}.downsample.conv", QUERY)

OFFICIAL = Layout(
    "official",
    rules={
        "patch_embed.proj": "stem.conv1",
        **_same("patch_embed.conv_down", "stem.down"),
        **_official_convs("patch_embed.conv_down", "stem.down.conv"),
        **_same("levels.{i}.downsample", "stages.{i+1}.downsample"),
        **_official_convs("levels.{i}.downsample", "stages.{i+1}.downsample.conv"),
        **_official_convs("levels.{i}.q_global_gen.to_q_global.{j}", QUERY),
        **_block("levels.{i}.blocks.{j}", "relative_position_bias_table", ("gamma1", "gamma2")),
        "norm{i}": "feature_norms.{i}",
        "norm": "head.before",
        "head": "head.fc",
    },
    drop={
        "levels.{i}.blocks.{j}.attn.relative_position_index": Constant(
            "levels.{i}.blocks.{j}.attn.relative_position_bias_table", swin_index
        )
    },
    changes=TABLES | {f"{gate}.se.{layer}.weight": LINEAR for gate in GATES for layer in ("fc1", "fc2")},
)
TIMM = Layout(
    "timm",
    rules={
        "stem.conv1": "stem.conv1",
        **_same("stem.down", "stem.down"),
        **_timm_convs("stem.down.conv_block", "stem.down.conv"),
        **_same("stages.{i}.downsample", "stages.{i}.downsample"),
        **_timm_convs("stages.{i}.downsample.conv_block", "stages.{i}.downsample.conv"),
        **_timm_convs("stages.{i}.global_block.blocks.conv{j+1}", QUERY),
        **_block(BLOCK, "rel_pos.relative_position_bias_table", ("ls1.gamma", "ls2.gamma")),
        "stages.3.norm": "head.before",
        "head.fc": "head.fc",
    },
    changes=TABLES,
)

LAYOUTS = {"GCViT": (OFFICIAL, TIMM)}
