"""STViT: its authors' code, in which all layers are convolutions."""

import torch

from ..convert import Change, Constant, Layout
from .tables import KERNEL

THEIRS, OURS = "layers.{i}.blocks.{j}", "stages.{i}.blocks.{j}"

# one-hot kernels that gather and spread neighbours, in every block
ONE_HOT = Constant(
    f"{THEIRS}.attn.stoken_refine.qkv.weight", lambda weight: torch.eye(9, dtype=weight.dtype).view(9, 1, 3, 3)
)
FACTORS = Change(lambda gamma: gamma.flatten(), lambda gamma: gamma.view(1, -1, 1, 1))

OFFICIAL = Layout(
    "official",
    rules={
        **{f"patch_embed.proj.{3 * i}": f"stem.conv{i + 1}" for i in range(4)},
        **{f"patch_embed.proj.{3 * i + 2}": f"stem.norm{i + 1}" for i in range(4)},
        "layers.{i}.downsample.proj.0": "stages.{i+1}.downsample.conv",
        "layers.{i}.downsample.proj.1": "stages.{i+1}.downsample.norm",
        f"{THEIRS}.pos_embed.conv": f"{OURS}.pos.conv",
        f"{THEIRS}.norm1.norm": f"{OURS}.attn.norm",
        f"{THEIRS}.attn.stoken_refine": f"{OURS}.attn.fn.refine",
        f"{THEIRS}.gamma_1": f"{OURS}.attn.scale.gamma",
        f"{THEIRS}.norm2": f"{OURS}.mlp.norm.0",
        f"{THEIRS}.mlp2.fc1": f"{OURS}.mlp.fn.fc1",
        f"{THEIRS}.mlp2.conv.conv": f"{OURS}.mlp.fn.pos.conv",
        f"{THEIRS}.mlp2.fc2": f"{OURS}.mlp.fn.fc2",
        f"{THEIRS}.gamma_2": f"{OURS}.mlp.scale.gamma",
        "proj": "head.before.proj",
        "norm": "head.before.norm",
        "head": "head.fc",
    },
    drop={f"{THEIRS}.attn.unfold.weights": ONE_HOT, f"{THEIRS}.attn.fold.weights": ONE_HOT},
    changes={
        **{f"{OURS}.attn.fn.refine.{layer}.weight": KERNEL for layer in ("qkv", "proj")},
        **{f"{OURS}.mlp.fn.{layer}.weight": KERNEL for layer in ("fc1", "fc2")},
        **{f"{OURS}.{branch}.scale.gamma": FACTORS for branch in ("attn", "mlp")},
    },
)

LAYOUTS = {"STViT": (OFFICIAL,)}
