"""The evaluation, which eval.py starts: of a run, of released files, of single images; of the installed package:

python -m recipes.eval run=runs/<name>
torchrun --nproc-per-node 8 -m recipes.eval run=runs/<name>
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, open_dict
from rich.progress import track
from torch import Tensor, nn

from recipes import config, distributed, hardware, measured, noted, predict, subjects
from recipes.checkpoint import Checkpoint
from recipes.data import DataError
from recipes.data.build import decoding
from recipes.data.images import open_rgb
from recipes.evaluate import evaluate
from recipes.log import CONSOLE, say
from recipes.measured import Answers, Measurement
from recipes.provenance import named, versions
from recipes.run import find_checkpoint
from recipes.settings import RunError, config_to_evaluate
from recipes.task import Task
from recipes.task import create as create_task
from zoo import Backbone, CheckpointError


@config.main("eval", errors=(RunError,))
def main(cfg: DictConfig) -> None:
    distributed.join(cfg)
    if cfg.run is not None:
        of_run(cfg, Path(cfg.run))
    elif cfg.predict is not None:
        source, *others = subjects.sources(cfg)
        if others:
            raise config.ConfigError(
                f"predict={cfg.predict} asks one model: give one checkpoint=, not {len(others) + 1}"
            )
        answer(subjects.find(cfg, source).cfg, cfg.predict, Path(cfg.out or "predictions"))
    else:
        of_weights(cfg, subjects.sources(cfg))


def of_run(cfg: DictConfig, run: Path) -> None:
    """Measure the model that a run kept, or ask it what is in an image."""
    own = config_to_evaluate(run, config.overrides())
    checkpoint = find_checkpoint(run)
    with open_dict(own):
        own.pop("augment", None)  # what was learned from is not needed any more
    if cfg.predict is not None:
        answer(own, cfg.predict, Path(cfg.out or "predictions"), checkpoint, noted.described(run, own))
        return
    noted.count_classes(run, own.data)
    out = Path(cfg.out or run)
    distributed.first(lambda: predict.check_writable(out))
    about = {"name": run.name, "model": own.model.name, "weights": str(checkpoint.path)}
    found = measure(own, about, checkpoint, run=run, answers=cfg.predictions)
    distributed.first(lambda: found.write(out, "eval"))
    found.show()


def of_weights(cfg: DictConfig, sources: list[str | None]) -> None:
    """Measure one set of weights, or several; of several, those that cannot be measured do not stop the others."""
    distributed.first(lambda: predict.check_writable(Path(cfg.out or ".")))
    found, failed = [], []
    stems = ["eval"] if len(sources) == 1 else subjects.stems(sources)
    for source, stem in zip(sources, stems, strict=True):
        try:
            found.append(of_one(cfg, source, stem))
        except (CheckpointError, config.ConfigError) as error:
            if len(sources) == 1:
                raise
            failed.append(str(source))
            say(f"{source} is not measured: {error}", "red")
    if len(sources) > 1 and found:
        conclude(cfg, found)
    if failed:
        raise RunError(f"{len(failed)} of {len(sources)} could not be measured, see above: {', '.join(failed)}")


def of_one(cfg: DictConfig, source: str | None, stem: str) -> Measurement:
    """Measure what one of the `sources` names and write what was found as <stem>.json and the like."""
    subject = subjects.find(cfg, source)
    weights = source or ("released" if subject.cfg.model.pretrained else "random")
    about = {"name": subject.name if stem == "eval" else stem, "model": subject.cfg.model.name, "weights": weights}
    found = measure(subject.cfg, about, published=subject.published(), answers=cfg.predictions)
    distributed.first(lambda: found.write(Path(cfg.out or "."), stem))
    found.show()
    return found


def measure(
    cfg: DictConfig,
    about: dict[str, Any],
    checkpoint: Checkpoint | None = None,
    *,
    run: Path | None = None,
    published: float | None = None,
    answers: bool = False,
) -> Measurement:
    """Evaluate the model of a configuration, with the weights of a run's checkpoint where there is one.

    Raises RunError where the data has other classes than the run.
    """
    machine, task = hardware.setup(cfg), create_task(cfg)
    data = task.build_data()
    if run is not None:
        data = noted.with_classes_of(run, data)
        noted.check_classes(run, data, cfg.data.name)
    model = machine.place(load(task, data, checkpoint))
    answered = Answers()
    called = torch.compile(model) if machine.compile else model
    given = (cfg, task, called, data, machine, watch)
    values, metrics = evaluate(*given, answered.note) if answers else evaluate(*given)
    prep = {key: list(value) if isinstance(value, tuple) else value for key, value in task.preparation().items()}
    where = {"data": cfg.data.name, "images": len(data.val), "img_size": prep.pop("size"), "preprocessing": prep}
    how = {
        "device": named(str(machine.device)),
        "amp": cfg.hardware.amp,
        "date": time.strftime("%Y-%m-%d"),
        **versions(),
    }
    count = int(values.get("scored", len(data.val)))
    record = measured.record({**about, **where}, values, count, published, task.score) | how
    keys = [key for key in values if "/" not in key]  # without those of single classes
    return Measurement(record, keys, task, data, metrics, answered.table(data) if answers else [])


def conclude(cfg: DictConfig, found: list[Measurement]) -> None:
    """One table of all, the best first."""
    score = found[0].task.score
    records = sorted((one.record for one in found), key=lambda record: -record[score])
    measured.show(records, found[0].keys, f"{records[0]['images']} images of {cfg.data.name}")
    distributed.first(lambda: measured.write_json(Path(cfg.out or ".") / "eval.json", records))


def load(task: Task, data: Any, checkpoint: Checkpoint | None) -> nn.Module:
    """The model with the weights that the run measured, or those that the configuration names."""
    if checkpoint is None:
        return task.build_model(data)
    model, weights = task.build_model(data, pretrained=False), checkpoint.state["weights"]
    if checkpoint.sharded:
        states = {weights: model.state_dict()}
        checkpoint.fill(states)
    else:
        _fill(model, checkpoint.tensors(weights), checkpoint.path / f"{weights}.safetensors")
    say(f"{checkpoint.path}: step {checkpoint.state['step']}, {weights} weights")
    return model


def _fill(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        typed = shlex.quote(config.quote("checkpoint", str(path)))
        file = f", or as a file, whose tables are interpolated: {typed} data=... img_size=..."
        advice = f"measure it at the run's own{file if isinstance(model, Backbone) else ''}"
        raise RunError(
            f"the weights of {path} are of another shape than the model that is asked for, as one with tables of "
            f"positions has at another img_size; {advice}. {error}"
        ) from error


def answer(cfg: DictConfig, pattern: str, out: Path, checkpoint: Checkpoint | None = None, data: Any = None) -> None:
    """Print what is in the images, and draw it in where it lies in a place; `data` is looked for if there is none.

    Images that cannot be read do not stop the others. One process answers, however many there are.
    """
    paths = predict.matching(pattern)
    if distributed.rank():
        return
    machine, task = hardware.setup(cfg), create_task(cfg)
    data = data or task.build_data()
    model = machine.place(load(task, data, checkpoint)).eval()
    unread = []
    for path, name in zip(paths, predict.names(paths), strict=True):
        try:
            image = open_rgb(path, path, decoding(cfg))
        except DataError as error:
            if len(paths) == 1:
                raise
            unread.append(path)
            say(str(error), "red")
            continue
        images, _ = machine.send(task.prepare(image), None)
        with torch.no_grad(), machine.autocast():
            predictions = task.predict_with(model, images, [{"size": (image.height, image.width)}])
        table, picture = task.answer(image, predictions, data, path)
        CONSOLE.print(table)
        if picture is not None:
            predict.write(picture, out / name)
    if unread:
        raise RunError(f"{len(unread)} of {len(paths)} images could not be read, see above: {', '.join(unread)}")


def watch(batches: Any, total: int) -> Any:
    return track(batches, total=total, console=CONSOLE, transient=True, disable=not CONSOLE.is_terminal)


if __name__ == "__main__":
    main()
