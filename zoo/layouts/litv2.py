"""LITv2: its authors' classification and dense-prediction code."""

from ..convert import Layout

THEIRS, OURS = "layers.{i}.blocks.{j}", "stages.{i}.blocks.{j}"
MERGE = "stages.{i+1}.downsample"

OFFICIAL = Layout(
    "official",
    rules={
        "patch_embed.proj": "stem.conv1",
        "patch_embed.norm": "stem.norm",
        **{f"layers.{{i}}.downsample.dconv.{part}": f"{MERGE}.conv.{part}" for part in ("weight", "bias")},
        "layers.{i}.downsample.dconv.conv_offset": f"{MERGE}.offset",
        "layers.{i}.downsample.norm_layer": f"{MERGE}.norm",
        f"{THEIRS}.norm1": f"{OURS}.attn.norm",
        f"{THEIRS}.attn.h_qkv": f"{OURS}.attn.fn.hi.qkv",
        f"{THEIRS}.attn.h_proj": f"{OURS}.attn.fn.hi.proj",
        f"{THEIRS}.attn.l_q": f"{OURS}.attn.fn.lo.q",
        f"{THEIRS}.attn.l_kv": f"{OURS}.attn.fn.lo.kv",
        f"{THEIRS}.attn.l_proj": f"{OURS}.attn.fn.lo.proj",
        f"{THEIRS}.norm2": f"{OURS}.mlp.norm",
        f"{THEIRS}.mlp.fc1": f"{OURS}.mlp.fn.fc1",
        f"{THEIRS}.mlp.dwconv.dwconv": f"{OURS}.mlp.fn.conv",
        f"{THEIRS}.mlp.fc2": f"{OURS}.mlp.fn.fc2",
        "norm{i}": "feature_norms.{i}",
        "norm": "head.before",
        "head": "head.fc",
    },
)

LAYOUTS = {"LITv2": (OFFICIAL,)}
