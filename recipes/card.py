"""The model card of a run: README.md in the run folder, in the format of the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
from omegaconf import DictConfig
from torch import nn

from recipes.checkpoint import Checkpoint
from recipes.config.idle import SIDES
from recipes.config.quoting import written
from recipes.data import Data
from recipes.data.build import preprocessing
from recipes.provenance import sessions
from recipes.task import create as create_task
from zoo import releases

CARD = """\
---
library_name: timm
tags:
- {task}
- timm
datasets:
- {dataset}
---
# {name}

`{model}` ({parameters:.1f} M parameters), trained on `{data}`: {train} images of {classes} classes, evaluated on {val}
others.

{results}

![curves](curves.png)

## Use

{use}

## How it was trained

{begins}

{starts}
"""
STARTS = """\
{sessions}

`config.yaml` has every option, `metrics.jsonl` every line of the log, `sessions.jsonl` the versions and git state of
each start. At the last one: Python {python}, {versions}, git {git}, on {machine} ({device})."""
USE = """\
```python
import timm
import zoo

model = timm.create_model(
    {arguments},
    pretrained=True,
    pretrained_cfg_overlay=dict(
        file={file},
        num_classes={classes},
        {prepared},
    ),
)
```

Input: RGB images of {size} pixels, {interpolation} interpolation, crop {crop_pct}, mean {mean}, standard deviation
{std}. These values are in the model's `pretrained_cfg`, which `timm.data.resolve_data_config` and `zoo.save_for_hf`
read. To share it with the names of its classes:

```python
from pathlib import Path

import zoo
from recipes import export

zoo.save_for_hf(export.build(Path({folder})), "shared")
```"""

USE_HEADS = """\
```python
from safetensors.torch import load_file
from zoo.heads import {function}

model = {function}(
    {arguments},
)
model.load_state_dict(load_file({file}))
model.eval()
```

Input: RGB images of any size, mean {mean}, standard deviation {std}. {measured}

{classes}

![ground truth and predictions](validation.png)"""
GONE = ("Its best weights are gone.", "An evaluation takes the weights of its newest checkpoint.")
MOST = 100  # classes up to which a card lists their names
STARTED = ("pretrained", "pretrained_cfg_overlay")  # arguments that say what training started from
KINDS = {"classify": "image-classification", "segment": "image-segmentation", "detect": "object-detection"}


def text(
    folder: Path, cfg: DictConfig, data: Data, model: nn.Module, best: Checkpoint | None, *, evaluated: bool
) -> str:
    """The card in Markdown; `best` is the checkpoint that it describes, if there is one; there was if `evaluated`."""
    lacking = GONE if evaluated else ("It has not been evaluated yet.", "Available after its first evaluation.")
    return CARD.format(
        task=KINDS.get(cfg.task.name, cfg.task.name),
        dataset=cfg.data.hub or cfg.data.name,
        name=folder.name,
        model=cfg.model.name,
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        data=cfg.data.name,
        train=len(data.train),
        val=len(data.val),
        classes=data.num_classes,
        results=_results(best) if best else lacking[0],
        use=_use(folder, cfg, data, model, best) if best else lacking[1],
        begins=begins(cfg),
        starts=_starts(sessions(folder)),
    )


def _starts(starts: list[dict[str, Any]]) -> str:
    """What was typed at every start, and the versions at the last; the file of them may have been removed."""
    if not starts:
        return (
            "`config.yaml` has every option, `metrics.jsonl` every line of the log. What was typed is not known: "
            "`sessions.jsonl` is gone."
        )
    last, typed = starts[-1], "- {started}, from step {from_step}: `python {command}`"
    return STARTS.format(
        sessions="\n".join(typed.format(**start) for start in starts),
        python=last["python"],
        versions=", ".join(f"{name} {version}" for name, version in last["versions"].items()),
        machine=last["machine"],
        device=last["device"],
        git=_git(last["git"]),
    )


def begins(cfg: DictConfig) -> str:
    """A sentence on the weights that training started from, with their licence where it is known."""
    name, overlay = cfg.model.name, cfg.model.get("pretrained_cfg_overlay") or {}
    if given := cfg.model.checkpoint or cfg.model.backbone or (cfg.model.pretrained and overlay.get("file")):
        release = releases.find(name, filename=given)
        what, licence = given, release and release.licence
    elif cfg.model.pretrained:
        known = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None  # or the hub knows
        what, licence = f"the pretrained weights of {name}", known and known.license
    else:
        return "It started from random weights."
    return f"It started from {what}, " + (
        f"under the licence {licence}." if licence else "of which no licence is known."
    )


def _results(best: Checkpoint) -> str:
    rows = [f"| {key} | {value:.4f} |" for key, value in best.state["metrics"].items() if "/" not in key]
    head = [f"The best weights, `{best.state['weights']}` after step {best.state['step']}:", "", "| metric | value |"]
    return "\n".join([*head, "|---|---:|", *rows])


def _use(folder: Path, cfg: DictConfig, data: Data, model: nn.Module, best: Checkpoint) -> str:
    given = {key: value for key, value in model.created_with.items() if key not in STARTED}
    name = given.pop("model_name")
    arguments = ",\n    ".join([f'"{name}"', *(f"{key}={value!r}" for key, value in given.items())])
    seen: dict[str, Any] = vars(preprocessing(cfg)).copy()
    file, here = _quoted(best.path / f"{best.state['weights']}.safetensors"), _quoted(folder)
    if model.created_by != "create_model":
        given = {"function": model.created_by, "arguments": arguments, "file": file, "classes": _classes(data)}
        return USE_HEADS.format(**given, measured=_measured(create_task(cfg).preparation()), **seen)
    size = seen.pop("size")
    prepared = ",\n        ".join(f"{key}={value!r}" for key, value in {"input_size": (3, *size), **seen}.items())
    given = {"arguments": arguments, "prepared": prepared, "folder": here, "file": file, "classes": data.num_classes}
    return USE.format(**given, size=" x ".join(map(str, size)), **seen)


def _quoted(path: Path) -> str:
    """A path as a string of Python."""
    return json.dumps(str(path), ensure_ascii=False)


def _measured(prep: dict[str, Any]) -> str:
    """A sentence on the images that the metrics of a dense task are of; empty for a task that does not say."""
    if not prep.keys() >= set(SIDES):
        return ""
    short, long, multiple = (prep[key] for key in ("short_side", "long_side", "side_multiple"))
    sides = [f"the short side is {short if isinstance(short, int) else max(short)} pixels"] if short else []
    sides += [f"the long side is at most {long} pixels"] if short and long else []
    sides += [f"the long side is {long} pixels"] if long and not short else []
    steps = [f"resized so that {' but '.join(sides)}"] if sides else []
    steps += [f"enlarged to sides that are multiples of {multiple}"] if multiple else []
    how = f" ({prep['interpolation']}, {'with' if prep['antialias'] else 'without'} antialiasing)" if steps else ""
    said = f"The metrics are of images {' and '.join(steps) or 'at their own size'}{how}"
    views = {"inference": "whole", "stride": None, "scales": [1.0], "flip": False}  # of a segmenter, as usual
    other = [f"`task.{key}={written(prep[key])}`" for key, usual in views.items() if prep.get(key, usual) != usual]
    return f"{said}, with {' '.join(other)}." if other else f"{said}."


def _classes(data: Data) -> str:
    """The names of the classes, in the order of the model's, or how many there are."""
    if data.num_classes > MOST:
        return f"Its {data.num_classes} classes are in `data.json`, in the model's order."
    return f"Classes, from 0: {', '.join(f'`{name}`' for name in data.class_names)}."


def _git(state: dict[str, Any] | None) -> str:
    if state is None:
        return "unknown"
    return state["commit"][:12] + (f" with {len(state['changed'])} changed files" if state["changed"] else "")
