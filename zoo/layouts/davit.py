"""DaViT: its authors' classification and dense-prediction code, and timm's ports of their weights."""

from ..convert import Layout

HALVES = {"0": "window", "1": "channel"}


def _halves(block: str, positions: tuple[str, str]) -> dict[str, str]:
    rules = {}
    for theirs, ours in HALVES.items():
        theirs, ours = f"{block}.{theirs}", f"stages.{{i}}.blocks.{{j}}.{ours}"
        rules |= {
            f"{theirs}.{positions[0]}.proj": f"{ours}.pos1.conv",
            f"{theirs}.norm1": f"{ours}.attn.norm",
            f"{theirs}.attn": f"{ours}.attn.fn",
            f"{theirs}.{positions[1]}.proj": f"{ours}.pos2.conv",
            f"{theirs}.norm2": f"{ours}.mlp.norm",
            f"{theirs}.mlp": f"{ours}.mlp.fn",
        }
    return rules


def _merges(theirs: str, conv: str) -> dict[str, str]:
    """Rules of stages 1 to 3, by number: in the authors' names, number 0 is the stem."""
    return {
        f"{theirs.format(i)}.{part}": f"stages.{i}.downsample.{ours}"
        for i in (1, 2, 3)
        for part, ours in ((conv, "conv"), ("norm", "norm"))
    }


OFFICIAL = Layout(
    "official",
    rules={
        "patch_embeds.0.proj": "stem.conv1",
        "patch_embeds.0.norm": "stem.norm",
        **_merges("patch_embeds.{}", "proj"),
        **_halves("main_blocks.{i}.{j}", ("cpe.0", "cpe.1")),
        "norm{i}": "feature_norms.{i}",
        "norms": "head.after",
        "head": "head.fc",
    },
)
TIMM = Layout(
    "timm",
    rules={
        "stem.conv": "stem.conv1",
        "stem.norm": "stem.norm",
        **_merges("stages.{}.downsample", "conv"),
        **_halves("stages.{i}.blocks.{j}", ("cpe1", "cpe2")),
        "head.norm": "head.after",
        "head.fc": "head.fc",
    },
)

LAYOUTS = {"DaViT": (OFFICIAL, TIMM)}
