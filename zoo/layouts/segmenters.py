"""Segmenters in mmsegmentation's names: `backbone.` in a layout of the backbone's class, `neck.` and the heads."""

from collections.abc import Collection, Iterable
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


def segmenter_layouts(
    released: Iterable[Layout], own: Layout | None, prefix: str, unread: Collection[int] = ()
) -> tuple[Layout, ...]:
    """The layouts of a segmenter: mmseg's around each layout `released` for its backbone, and ours around its `own`.

    prefix  what stands before the backbone's names in the model. A backbone without layouts, one of timm, has the same
            names in files as in the model
    unread  the levels that the segmenter does not read, see `without_norms`
    """
    if own is None:
        same = {prefix.rstrip("."): prefix.rstrip(".")}
        return Layout("mmseg", rules=same | HEADS.rules), Layout("zoo", rules=same | OUR_HEADS.rules)
    read = without_norms(released, unread)
    theirs = [around(layout, f"mmseg-{layout.name}", "backbone.", prefix, HEADS) for layout in read]
    return *theirs, around(own, own.name, prefix, prefix, OUR_HEADS)


def without_norms(released: Iterable[Layout], unread: Collection[int]) -> list[Layout]:
    """The layouts of a backbone of which some levels are not read: files have norms of them, which are dropped."""
    return [_without_norms(layout, unread) for layout in released]


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
