"""SG-Former: its authors' code, in which both kinds of block use the same names for different projections."""

from ..convert import Layout

THEIRS, OURS = "block{i+1}.{j}", "stages.{i}.blocks.{j}"
STAGES = (1, 2, 3)
CONVS = (1, 2, 3)

OFFICIAL = Layout(
    "official",
    rules={
        "pos_embed": "stem.position.table",
        **{f"patch_embed1.conv.{2 * n - 2}.c": f"stem.conv{n}" for n in CONVS},
        **{f"patch_embed1.conv.{2 * n - 2}.bn": f"stem.norm{n}" for n in CONVS},
        "patch_embed1.norm": "stem.norm",
        **{f"patch_embed{i + 1}.conv{n}.c": f"stages.{i}.downsample.conv{n}" for i in STAGES for n in CONVS},
        **{f"patch_embed{i + 1}.conv{n}.bn": f"stages.{i}.downsample.norm{n}" for i in STAGES for n in CONVS},
        f"{THEIRS}.norm1": f"{OURS}.norm",
        f"{THEIRS}.attn.sr": f"{OURS}.attn.reduce",
        **{f"{THEIRS}.attn.{n}": f"{OURS}.attn.{n}" for n in ("norm", "q", "q1", "q2", "kv", "kv1", "kv2", "proj")},
        **{f"{THEIRS}.attn.f{n + 1}": f"{OURS}.attn.merge.{n}" for n in range(3)},
        f"{THEIRS}.attn.lepe_linear": f"{OURS}.attn.lepe.linear",
        f"{THEIRS}.attn.lepe_conv": f"{OURS}.attn.lepe.conv.0",
        f"{THEIRS}.norm2": f"{OURS}.mlp.norm",
        f"{THEIRS}.mlp.fc1": f"{OURS}.mlp.fn.fc1",
        f"{THEIRS}.mlp.dwconv.dwconv": f"{OURS}.mlp.fn.pos.conv",
        f"{THEIRS}.mlp.fc2": f"{OURS}.mlp.fn.fc2",
        "norm{i+1}": "stages.{i}.norm",
        "head": "head.fc",
    },
)

LAYOUTS = {"SGFormer": (OFFICIAL,)}
