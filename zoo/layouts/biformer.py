"""BiFormer: its authors' code, and their second version of the STL model, in which all layers are convolutions."""

from ..convert import Layout
from .tables import KERNEL

OURS = "stages.{i}.blocks.{j}"


def _blocks(place: str, qkv: str, proj: str, last: int) -> dict[str, str]:
    """Rules of all blocks; `place` is a block's name within its stage, `last` the number of an MLP's second layer."""
    theirs, attention = f"stages.{{i}}.{place}", {}
    for stage in range(4):
        names = (qkv, proj) if stage < 3 else ("qkv", "proj")
        for name, ours in zip(names, ("qkv", "proj"), strict=True):
            attention[f"stages.{stage}.{place}.attn.{name}"] = f"stages.{stage}.blocks.{{j}}.attn.fn.{ours}"
    return attention | {
        f"{theirs}.norm1": f"{OURS}.attn.norm",
        f"{theirs}.attn.lepe": f"{OURS}.attn.fn.lepe",
        f"{theirs}.norm2": f"{OURS}.mlp.norm",
        f"{theirs}.mlp.0": f"{OURS}.mlp.fn.fc1",
        f"{theirs}.mlp.{last}": f"{OURS}.mlp.fn.fc2",
    }


def _downsamplers(norm: int, conv: int) -> dict[str, str]:
    """Rules of the downsamplers; `norm` and `conv` are the numbers of their layers."""
    rules = {}
    for stage in (1, 2, 3):
        rules[f"downsample_layers.{stage}.{norm}"] = f"stages.{stage}.downsample.norm"
        rules[f"downsample_layers.{stage}.{conv}"] = f"stages.{stage}.downsample.conv"
    return rules


COMMON = {
    "downsample_layers.0.0": "stem.conv1",
    "downsample_layers.0.1": "stem.norm1",
    "norm": "head.before.norm",
    "head": "head.fc",
}
OVERLAPPING = {"downsample_layers.0.3": "stem.conv2", "downsample_layers.0.4": "stem.norm2"}
DENSE = {"extra_norms.{i}": "feature_norms.{i}"}
POSITIONS = {"stages.{i}.{j}.pos_embed": f"{OURS}.pos.conv"}
STL = COMMON | _downsamplers(norm=0, conv=1)

OFFICIAL = Layout(
    "official",
    rules=COMMON
    | OVERLAPPING
    | DENSE
    | POSITIONS
    | _downsamplers(norm=1, conv=0)
    | _blocks("{j}", "qkv.qkv", "wo", last=3),
)
OFFICIAL_STL = Layout("official", rules=STL | _blocks("blocks.{j}", "qkv.qkv", "wo", last=2))
OFFICIAL_NCHW = Layout(
    "official",
    rules=STL | _blocks("blocks.{j}", "qkv_linear", "output_linear", last=2),
    changes={
        **{f"{OURS}.attn.fn.{layer}.weight": KERNEL for layer in ("qkv", "proj")},
        **{f"{OURS}.mlp.fn.{layer}.weight": KERNEL for layer in ("fc1", "fc2")},
    },
)

LAYOUTS = {"BiFormer": (OFFICIAL,), "BiFormerSTL": (OFFICIAL_STL,), "BiFormerSTLNchw": (OFFICIAL_NCHW,)}
