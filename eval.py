"""Measure a model on a validation set, or ask it what is in an image.

python eval.py run=runs/<name>                               # the number that training printed
python eval.py model=maxvit_t checkpoint=file.pth data=imagenet data.root=parquet
python eval.py run=runs/<name> predict=cat.jpg
torchrun --nproc-per-node 8 eval.py run=runs/<name>          # eight devices, every image once
"""

from __future__ import annotations

from recipes import shell

shell.answer("eval")  # completion of the command line must not wait for the imports below

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import DictConfig
from rich.progress import track
from rich.table import Table
from torch import nn

from recipes import config, distributed, hardware
from recipes.checkpoint import Checkpoint
from recipes.data.build import decoding, preprocessing
from recipes.data.images import open_rgb
from recipes.data.transforms import eval_transform
from recipes.evaluate import evaluate
from recipes.log import CONSOLE, say
from recipes.run import find_checkpoint
from recipes.settings import RunError, config_to_evaluate
from recipes.task import Task
from recipes.task import create as create_task


@config.main("eval", errors=(RunError,))
def main(cfg: DictConfig) -> None:
    distributed.join(cfg)
    run = Path(cfg.run) if cfg.run is not None else None
    out, predict = cfg.out, cfg.predict
    checkpoint = find_checkpoint(run) if run else None
    cfg = config_to_evaluate(run, config.overrides()) if run else cfg
    machine, task = hardware.setup(cfg), create_task(cfg)
    data = described(run) if run and predict else task.build_data()
    model = machine.place(load(task, data, checkpoint))
    if predict is not None:
        print_prediction(cfg, task, model, data, machine, predict)
        return
    values, metrics = evaluate(cfg, task, model, data, machine, watch)
    print_values(values, f"{cfg.model.name} on the {len(data.val)} validation images of {cfg.data.name}")
    source = str(checkpoint.path) if checkpoint else cfg.model.checkpoint
    record = {"model": cfg.model.name, "weights": source, "data": cfg.data.name, "images": len(data.val), **values}
    distributed.first(lambda: write(task, data, metrics, record, Path(out) if out else run or Path()))


def write(task: Task, data: Any, metrics: Any, record: dict[str, Any], folder: Path) -> None:
    """The metrics as JSON and as a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval.json").write_text(json.dumps(record, indent=1) + "\n")
    task.picture(folder / "eval.png", data, metrics)
    say(f"written: {folder / 'eval.json'}, {folder / 'eval.png'}")


def load(task: Task, data: Any, checkpoint: Checkpoint | None) -> nn.Module:
    """The model with the weights that the run measured, or those that the configuration names."""
    if checkpoint is None:
        return task.build_model(data)
    model, weights = task.build_model(data, pretrained=False), checkpoint.state["weights"]
    if checkpoint.sharded:
        states = {weights: model.state_dict()}
        checkpoint.fill(states)
    else:
        model.load_state_dict(checkpoint.tensors(weights))
    say(f"{checkpoint.path}: step {checkpoint.state['step']}, {weights} weights")
    return model


def described(run: Path) -> SimpleNamespace:
    """What a run noted about its data, so that its model can be asked where the data is not."""
    return SimpleNamespace(**json.loads((run / "data.json").read_text()))


def print_prediction(cfg: DictConfig, task: Task, model: nn.Module, data: Any, machine: hardware.Hardware, path: str):
    """The five likeliest classes of an image."""
    pixels = eval_transform(**vars(preprocessing(cfg)))(open_rgb(path, path, decoding(cfg)))  # (3, H, W)
    images, _ = machine.send(pixels[None], torch.zeros(1))
    with torch.no_grad(), machine.autocast():
        shares = task.predict(model.eval(), images)[0].float().softmax(-1)
    table = Table("class", "probability", title=path)
    for share, index in zip(*(t.tolist() for t in shares.topk(min(5, len(shares)))), strict=True):
        table.add_row(data.class_names[index], f"{100 * share:.2f} %")
    CONSOLE.print(table)


def print_values(values: dict[str, float], title: str) -> None:
    table = Table("metric", "value", title=title)
    for key, value in values.items():
        table.add_row(key, f"{value:.2f} %" if key.startswith("top") else f"{value:.4g}")
    CONSOLE.print(table)


def watch(batches: Any, total: int) -> Any:
    return track(batches, total=total, console=CONSOLE, transient=True, disable=not CONSOLE.is_terminal)


if __name__ == "__main__":
    main()
