"""Models as folders and as repositories of the Hugging Face hub, through timm's own functions, with a model card.

After `import zoo`, `timm.create_model("local-dir:FOLDER", pretrained=True)` and `"hf-hub:USER/NAME"` load what is
written here, with the image size, channels, classes and other arguments that the model was built with.
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError
from timm.models import create_model, get_model_args, get_model_input_config, push_to_hf_hub
from timm.models import save_for_hf as save_by_timm
from timm.models._hub import generate_readme
from timm.utils import unwrap_model
from torch import nn

from .backbone import Backbone
from .checkpoint import uncompiled
from .errors import CheckpointError, listed

LABELS = ("label_names", "label_descriptions")
USE = """
```python
import timm
import zoo

model = timm.create_model("{name}", pretrained=True)
```
"""


def save_for_hf(
    model: nn.Module, folder: str | Path, *, description: str = "", licence: str | None = None, **kwargs: Any
) -> Path:
    """Write model.safetensors, config.json and README.md, a model card, into `folder`; return it.

    description  what the card says about the training of the model
    licence      of the weights, as the hub spells it; default: that of the release that the model was built from, by
                 tag or `pretrained`, else "unknown". Models of timm's own do not tell whether they were built from one:
                 theirs are shared with the licence and the tag of their configuration, unless another is given
    kwargs       of `timm.models.save_for_hf`: model_config (label_names and the like; default: those in the model's
                 `pretrained_cfg`), model_args, data_config (default: the image size that the model was built for)
    Each file is written completely or not at all. Raises ValueError for a model that `timm.create_model` did not build
    or would not build again as it is now, and CheckpointError if a file cannot be written.
    """
    model, folder = unwrap_model(model), Path(folder)
    _check(model, kwargs.get("model_args"))
    said = _card(model, f"local-dir:{folder}", description, licence)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".writing-") as temporary, uncompiled(model):
            save_by_timm(model, temporary, safe_serialization=True, **_about(model, said["license"], kwargs))
            card = Path(temporary) / "README.md"
            card.write_text(generate_readme(said, folder.name), encoding="utf-8")
            mode = card.stat().st_mode
            for file in sorted(Path(temporary).iterdir()):
                file.chmod(mode)  # safetensors lets nobody but the owner read its files
                os.replace(file, folder / file.name)
    except (OSError, SafetensorError) as error:  # the latter if the disk is full
        raise CheckpointError(f"could not write {folder}: {error}") from error
    return folder


def push_to_hub(
    model: nn.Module, repository: str, *, description: str = "", licence: str | None = None, **kwargs: Any
) -> Any:
    """Upload a model to the Hugging Face hub as `save_for_hf` writes it, the card only if there is none yet.

    kwargs  of `timm.models.push_to_hf_hub`: token, private, revision, model_config, model_args, data_config
    """
    model = unwrap_model(model)
    _check(model, kwargs.get("model_args"))
    said = _card(model, f"hf-hub:{repository}", description, licence)
    about = _about(model, said["license"], kwargs)
    with uncompiled(model):
        return push_to_hf_hub(model, repository, model_card=said, safe_serialization=True, **about)


def _check(model: nn.Module, model_args: dict[str, Any] | None) -> None:
    """Raise ValueError for a model that cannot be built again."""
    cfg = getattr(model, "pretrained_cfg", None)
    if not cfg or not cfg.get("architecture"):
        raise ValueError(
            f"{type(model).__name__} was not built by timm.create_model: its name and arguments are unknown"
        )
    if not hasattr(model, "num_classes"):
        raise ValueError(f"{type(model).__name__} returns only features: share the model without features_only=True")
    if isinstance(model, Backbone):
        built = create_model(cfg["architecture"], device="meta", **get_model_args(model, model_args))
        if differing := _shapes(model).items() ^ _shapes(built).items():
            names = listed(sorted({name for name, _ in differing}))
            raise ValueError(
                f"timm.create_model would not build this {type(model).__name__} again: its name and arguments give "
                f"other tensors or shapes ({names}). Share it with all its stages and its original layers"
            )


def licence_of(model: nn.Module) -> str | None:
    """The licence of the release that a model was built from; None for weights of one's own, which timm's own models do
    not tell apart.
    """
    cfg = getattr(model, "pretrained_cfg", {})
    return (cfg.get("license") or None) if getattr(model, "of_release", True) else None


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of all tensors but the counters that frozen batch norms lack."""
    with uncompiled(model):
        return {k: tuple(v.shape) for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}


def _about(model: nn.Module, licence: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without these timm would write the release's licence, tag, origin and image size for weights of one's own."""
    config = dict(kwargs.get("model_config") or {})
    release = {} if getattr(model, "of_release", True) else {"tag": None, "origin_url": None}
    config["pretrained_cfg"] = {"license": licence, **release, **config.get("pretrained_cfg", {})}
    if "label_names" not in config and model.pretrained_cfg.get("num_classes") == model.num_classes:
        # at the top, where timm writes those of `model_config` and transformers looks for them
        config |= {key: names for key in LABELS if (names := model.pretrained_cfg.get(key))}
    size = {"input_size": get_model_input_config(model)["input_size"]}
    return {"data_config": size, **kwargs, "model_config": config}


def _card(model: nn.Module, name: str, description: str, licence: str | None) -> dict[str, Any]:
    """The content of timm's model card."""
    cfg = model.pretrained_cfg
    size = " x ".join(map(str, get_model_input_config(model)["input_size"]))
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    details = {"Architecture": cfg["architecture"], "Params (M)": f"{parameters:.1f}", "Input": size}
    details["Classes"] = model.num_classes
    return {
        "tags": ["image-classification", "timm"],
        "license": licence or licence_of(model) or "unknown",
        "description": description or f"`{cfg['architecture']}`, an image classification model.",
        "details": details,
        "usage": USE.format(name=name),
    }
