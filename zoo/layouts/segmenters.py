"""Segmenters in mmsegmentation's names: `backbone.` in a layout of the backbone's class, `neck.` and the heads."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import Tensor

from ..convert import Constant, Group, Layout

NECK = {"neck.lateral_convs.{i}.conv": "neck.laterals.{i}", "neck.fpn_convs.{i}.conv": "neck.outputs.{i}"}
# convolution and norm
BLOCKS = {
    "psp_modules.{i}.1": "pools.{i}",
    "bottleneck": "bottleneck",
    "lateral_convs.{i}": "laterals.{i}",
    "fpn_convs.{i}": "outputs.{i}",
    "fpn_bottleneck": "fuse",
    "scale_heads.{i}.{j}": "scales.{i}.{j}",
    "convs.{i}": "convs.{i}",
    "conv_cat": "concat",
}
PARTS = {"conv": "conv", "bn": "norm"}


def _head(prefix: str) -> dict[str, str]:
    blocks = BLOCKS.items()
    rules = {f"{prefix}.{theirs}.{t}": f"{prefix}.{ours}.{o}" for theirs, ours in blocks for t, o in PARTS.items()}
    return rules | {f"{prefix}.conv_seg": f"{prefix}.classifier"}


HEADS = Layout("mmseg", rules=NECK | _head("decode_head") | _head("auxiliary_head"))
OUR_HEADS = Layout("zoo", rules={ours: ours for ours in (*HEADS.rules.values(), "pyramid", "class_weights")})


def layouts_over(
    heads: Layout, own_heads: Layout, layouts: Sequence[Layout], prefix: str, unread: Collection[int] = ()
) -> tuple[Layout, ...]:
    """The layouts of a whole model: its heads' around each of its backbone's, ours, which is the last, around ours.

    heads, own_heads  of all but the backbone: mmseg's or mmdet's, and ours
    layouts           of the backbone. One without any, of timm, has the same names in files as in the model
    prefix            what stands before the backbone's names in the model
    unread            the levels that the model does not read: files have norms of them, which are dropped
    """
    if not layouts:
        same = {prefix.rstrip("."): prefix.rstrip(".")}
        return tuple(replace(layout, rules=same | layout.rules) for layout in (heads, own_heads))
    *released, own = layouts
    read = [_without_norms(layout, unread) for layout in released]
    theirs = [around(layout, f"{heads.name}-{layout.name}", "backbone.", prefix, heads) for layout in read]
    return *theirs, around(own, own.name, prefix, prefix, own_heads)


def _without_norms(layout: Layout, levels: Collection[int]) -> Layout:
    norms = [theirs for theirs, ours in layout.rules.items() if ours == "feature_norms.{i}"]
    drop = {norm.replace("{i}", str(level)): Constant(norm, _unknown) for norm in norms for level in levels}
    return replace(layout, drop={**layout.drop, **drop})


def _unknown(beside: Tensor) -> Tensor:
    raise ValueError("the model has no norm on a level that it does not read")


def around(layout: Layout, name: str, theirs: str, ours: str, heads: Layout) -> Layout:
    """The layout of a backbone, with prefixes before its names, combined with that of heads."""
    return Layout(
        name,
        rules={theirs + a: ours + b for a, b in layout.rules.items()} | heads.rules,
        drop={theirs + a: Constant(theirs + constant.beside, constant.make) for a, constant in layout.drop.items()},
        changes={ours + b: change for b, change in layout.changes.items()} | heads.changes,
        groups=tuple(_behind(group, theirs) for group in layout.groups),
    )


def _behind(group: Group, prefix: str) -> Group:
    names = {part: tuple(prefix + name for name in getattr(group, part)) for part in ("theirs", "units")}
    return replace(group, **names)
