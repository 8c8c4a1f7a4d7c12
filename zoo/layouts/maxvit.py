"""MaxViT: timm's ports of the authors' weights, and torchvision's own."""

from ..convert import Constant, Layout
from .tables import SWIN, swin_index

B = "stages.{i}.blocks.{j}"


def _timm_partition(theirs: str, ours: str) -> dict[str, str]:
    return {
        f"{B}.{theirs}.norm1": f"{B}.{ours}_attn.norm",
        f"{B}.{theirs}.attn.qkv": f"{B}.{ours}_attn.fn.qkv",
        f"{B}.{theirs}.attn.rel_pos.relative_position_bias_table": f"{B}.{ours}_attn.fn.rpb",
        f"{B}.{theirs}.attn.proj": f"{B}.{ours}_attn.fn.proj",
        f"{B}.{theirs}.norm2": f"{B}.{ours}_mlp.norm",
        f"{B}.{theirs}.mlp": f"{B}.{ours}_mlp.fn",
    }


def _torchvision_partition(theirs: str, ours: str) -> dict[str, str]:
    layers = "blocks.{i}.layers.{j}.layers"
    return {
        f"{layers}.{theirs}.attn_layer.0": f"{B}.{ours}_attn.norm",
        f"{layers}.{theirs}.attn_layer.1.to_qkv": f"{B}.{ours}_attn.fn.qkv",
        f"{layers}.{theirs}.attn_layer.1.relative_position_bias_table": f"{B}.{ours}_attn.fn.rpb",
        f"{layers}.{theirs}.attn_layer.1.merge": f"{B}.{ours}_attn.fn.proj",
        f"{layers}.{theirs}.mlp_layer.0": f"{B}.{ours}_mlp.norm",
        f"{layers}.{theirs}.mlp_layer.1": f"{B}.{ours}_mlp.fn.fc1",
        f"{layers}.{theirs}.mlp_layer.3": f"{B}.{ours}_mlp.fn.fc2",
    }


TIMM = Layout(
    "timm",
    rules={
        "stem": "stem",
        f"{B}.conv.shortcut.expand": f"{B}.conv.shortcut.expand",
        f"{B}.conv.pre_norm": f"{B}.conv.norm",
        f"{B}.conv.conv1_1x1": f"{B}.conv.expand",
        f"{B}.conv.norm1": f"{B}.conv.norm1",
        f"{B}.conv.conv2_kxk": f"{B}.conv.depthwise",
        f"{B}.conv.norm2": f"{B}.conv.norm2",
        f"{B}.conv.se": f"{B}.conv.se",
        f"{B}.conv.conv3_1x1": f"{B}.conv.project",
        **_timm_partition("attn_block", "block"),
        **_timm_partition("attn_grid", "grid"),
        "head.norm": "head.after.norm",
        "head.pre_logits.fc": "head.after.fc",
        "head.fc": "head.fc",
    },
)

_MBCONV = "blocks.{i}.layers.{j}.layers.MBconv"
TORCHVISION = Layout(
    "torchvision",
    rules={
        "stem.0.0": "stem.conv1",
        "stem.0.1": "stem.norm1",
        "stem.1.0": "stem.conv2",
        f"{_MBCONV}.proj.1": f"{B}.conv.shortcut.expand",
        f"{_MBCONV}.layers.pre_norm": f"{B}.conv.norm",
        f"{_MBCONV}.layers.conv_a.0": f"{B}.conv.expand",
        f"{_MBCONV}.layers.conv_a.1": f"{B}.conv.norm1",
        f"{_MBCONV}.layers.conv_b.0": f"{B}.conv.depthwise",
        f"{_MBCONV}.layers.conv_b.1": f"{B}.conv.norm2",
        f"{_MBCONV}.layers.squeeze_excitation": f"{B}.conv.se",
        f"{_MBCONV}.layers.conv_c": f"{B}.conv.project",
        **_torchvision_partition("window_attention", "block"),
        **_torchvision_partition("grid_attention", "grid"),
        "classifier.2": "head.after.norm",
        "classifier.3": "head.after.fc",
        "classifier.5": "head.fc",
    },
    drop={
        f"{layers}.relative_position_index": Constant(f"{layers}.relative_position_bias_table", swin_index)
        for layers in (f"blocks.{{i}}.layers.{{j}}.layers.{kind}_attention.attn_layer.1" for kind in ("window", "grid"))
    },
    changes={f"{B}.{kind}_attn.fn.rpb": SWIN for kind in ("block", "grid")},
)

LAYOUTS = {"MaxViT": (TIMM,), "TorchvisionMaxViT": (TORCHVISION,)}
