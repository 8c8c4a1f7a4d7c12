"""Evaluation of a run or of released files, and prediction on images, started by eval.py; in the installed package:

python -m recipes.eval run=runs/<name>
torchrun --nproc-per-node 8 -m recipes.eval run=runs/<name>
"""

from __future__ import annotations

import gc
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from recipes import config, data_record, distributed, eval_models, eval_results, hardware, predict, predict_weights
from recipes.config.checks import is_in
from recipes.config.contents import flat
from recipes.config.quoting import key_of
from recipes.console import CONSOLE, say, tracked
from recipes.data import Data, DataError
from recipes.data.build import decoding
from recipes.data.images import not_applied, open_rgb, orientation
from recipes.eval_results import Entry, Measurement, Results
from recipes.evaluate import evaluate
from recipes.provenance import named, versions
from recipes.settings import RunError, config_to_evaluate, has_config
from recipes.task import Task
from recipes.task import create as create_task
from recipes.weights import Kept, find_weights
from zoo import Backbone, CheckpointError, load_checkpoint
from zoo.errors import first_line, printable

# errors that say that one set of weights cannot be evaluated
UNMEASURED = (CheckpointError, config.ConfigError, RunError)
# how images are fetched, which does not change the metrics
FETCHED = (
    "data.batch_size", "data.eval_batch_size", "data.workers", "data.cache", "data.cache_gb", "data.cache_dir",
)  # fmt: skip


@config.main("eval", errors=(RunError,))
def main(cfg: DictConfig) -> None:
    answer_or_measure(cfg)  # not here: Slurm's launcher pickles this function, and the console that it would refer to


def answer_or_measure(cfg: DictConfig) -> None:
    """Predict for images, or evaluate a run or weights, as configured.

    Raises RunError if the memory of a GPU is full or nothing can be compiled. That ends the evaluation of several sets
    of weights too: other processes would wait for this one.
    """
    try:
        _answer_or_measure(cfg)
    except torch.OutOfMemoryError as error:
        fewer = "a smaller data.eval_batch_size=" if cfg.predict is None else "a smaller img_size="
        raise RunError(
            f"out of memory in an evaluation: {first_line(error)}\ngive {fewer}, or hardware.amp=bfloat16"
        ) from error
    except Exception as error:
        if (why := hardware.why_not_compiled(error)) is None:
            raise
        raise RunError(why) from error


def _answer_or_measure(cfg: DictConfig) -> None:
    # what is measured is written to files as well, and pictures are where a folder is named for them
    CONSOLE.optional = cfg.predict is None or cfg.out is not None
    distributed.join(cfg)
    if cfg.run is not None:
        of_run(cfg, Path(cfg.run))
        return
    sources = distributed.first(lambda: eval_models.sources(cfg))
    if cfg.predict is not None:
        source, *others = sources
        if others:
            raise config.ConfigError(
                f"predict={cfg.predict} uses a single model: give one checkpoint=, not {len(others) + 1}"
            )
        answer(predict_weights.configuration(cfg, source), cfg.predict, Path(cfg.out or "predictions"))
    else:
        of_weights(cfg, sources)


def of_run(cfg: DictConfig, run: Path) -> None:
    """Evaluate the best model of a run, or predict on images with it."""
    own = config_of(run, config.overrides())
    if cfg.predict is not None:
        answer(own, cfg.predict, Path(cfg.out or "predictions"), run)
        return
    results = Results(Path(cfg.out or run))
    distributed.first(results.check_writable)
    report(measure_run(run, run.name, own, answers=cfg.save_predictions), results, "eval")


def config_of(run: Path, overrides: list[str]) -> DictConfig:
    """The configuration of a run, combined with what is typed. Raises RunError."""
    own = config_to_evaluate(run, overrides)
    with open_dict(own):
        own.pop("augment", None)  # the training set is not needed any more
    return own


def measure_run(run: Path, name: str, own: DictConfig, *, answers: bool) -> Measurement:
    """Evaluate a run's best checkpoint with the run's classes; its name in tables is `name`."""
    data_record.count_classes(run, own.data)
    return measure(own, {"name": name, "model": own.model.name}, run=run, answers=answers)


def of_weights(cfg: DictConfig, sources: list[str | None]) -> None:
    """Evaluate one set of weights, or several; of several, those that cannot be evaluated do not stop the others."""
    results = Results(Path(cfg.out or "."))
    distributed.first(results.check_writable)
    found, failed = [], []
    alone = len(sources) == 1
    stems, names = (["eval"], [None]) if alone else (eval_models.stems(sources), eval_models.names(sources))
    for source, stem, name in zip(sources, stems, names, strict=True):
        try:
            one = of_one(cfg, source, name)
        except UNMEASURED as error:
            if alone:
                raise
            failed.append(str(source))
            say(f"{source} is not evaluated: {error}", "red")
            continue
        found.append(one.entry)
        try:
            report(one, results, stem)
        except RunError as error:
            if alone:
                raise
            failed.append(str(source))
            say(str(error), "red")
        del one  # its data and metrics, before the next one has its own
        gc.collect()  # OmegaConf's errors at keys that are absent are cycles, and hold the functions that asked
    if found and not alone:
        conclude(results, found)
    if failed:
        raise RunError(
            f"{len(failed)} of {len(sources)} could not be evaluated or written, see above: {', '.join(failed)}"
        )


def report(one: Measurement, results: Results, stem: str) -> None:
    """Print a measurement, then write it. Raises RunError if it cannot be written."""
    one.show()
    distributed.first(lambda: one.write(results, stem))


def of_one(cfg: DictConfig, source: str | None, name: str | None) -> Measurement:
    """Evaluate one of the `sources`, a run as with `run=`; `name` is its name in tables, None for its own.

    Raises CheckpointError, ConfigError or RunError, on all processes, if it cannot be evaluated: all of them must
    continue with the same one.
    """
    if source is not None and distributed.first(lambda: has_config(source)):
        run = Path(source)
        typed = [text for text in config.overrides() if key_of(text) != "checkpoint"]
        try:
            own = distributed.everywhere(lambda: config_of(run, typed), UNMEASURED)
            return measure_run(run, name or run.name, own, answers=cfg.save_predictions)
        except DataError as error:  # concerns this run alone
            raise RunError(str(error)) from error
    evaluated = distributed.everywhere(lambda: eval_models.find(cfg, source), UNMEASURED)
    weights = source or ("released" if evaluated.cfg.model.pretrained else "random")
    if weights == "random":
        say("the weights are random: neither checkpoint= nor model.pretrained=true says which to evaluate", "yellow")
    about = {"name": name or evaluated.name, "model": evaluated.cfg.model.name, "weights": weights}
    return measure(evaluated.cfg, about, published=evaluated.published(), answers=cfg.save_predictions)


def measure(
    cfg: DictConfig,
    about: dict[str, Any],
    *,
    run: Path | None = None,
    published: float | None = None,
    answers: bool,
) -> Measurement:
    """Evaluate the model of a configuration, with the best weights of a run if there is one.

    Raises RunError if the data has other classes than the run, DataError if processes have different data; what one
    process cannot read or build is an error on all.
    """
    kept = None if run is None else find_weights(run)
    if kept is not None:
        about = {**about, "weights": str(kept.checkpoint.path)}
    machine, task, data = distributed.everywhere(lambda: prepared(cfg), (DataError, *UNMEASURED))
    data_record.check_alike(data)
    data, model = distributed.everywhere(partial(built, task, data, kept, run), (DataError, *UNMEASURED))
    del kept  # which is as large as the model
    model = machine.place(model)
    answered = task.answers(data) if answers else None
    called = hardware.compiled(model) if machine.compile else model
    noted = {} if answered is None else {"note": answered.note}
    values, metrics = evaluate(cfg, task, called, data, machine, watch, **noted)
    data.val.end_workers()
    if machine.compile:
        say("note: images_per_s includes the time to compile the model", "yellow")
    prep = {key: list(value) if isinstance(value, tuple) else value for key, value in task.preparation().items()}
    where = {"data": cfg.data.name, "images": len(data.val), "img_size": prep.pop("size"), "preprocessing": prep}
    how = {
        "device": named(str(machine.device)),
        "amp": cfg.hardware.amp,
        "date": time.strftime("%Y-%m-%d"),
        **versions(),
    }
    count = int(values.get("scored", len(data.val)))
    record = eval_results.record({**about, **where}, values, count, published, task.score) | how
    record["config"] = asked(cfg)
    keys = [key for key in values if "/" not in key]  # without those of single classes
    files = {} if answered is None else answered.files(data, metrics)
    return Measurement(record, keys, task, data, metrics, files)


def asked(cfg: DictConfig) -> dict[str, Any]:
    """The part of a configuration that says what is evaluated and how, without null values."""
    groups = {key: OmegaConf.to_container(cfg[key], resolve=True) for key in ("task", "model", "data") if key in cfg}
    given = {key: value for key, value in flat(OmegaConf.create(groups)).items() if value is not None}
    return {key: value for key, value in given.items() if not is_in(key, FETCHED)}


def conclude(results: Results, found: list[Entry]) -> None:
    """One table per score and data set, best first, and a list of all results."""
    tables: dict[tuple[str, ...], list[Entry]] = {}
    for one in found:
        tables.setdefault((one.score, one.record["data"], one.record["images"]), []).append(one)
    ranked = []
    for (score, data, images), those in tables.items():
        records = sorted((one.record for one in those), key=lambda record: -record[score])
        eval_results.show(records, those[0].keys, f"{images} images of {data}")
        ranked += records
    distributed.first(lambda: results.write_list(ranked))


def prepared(cfg: DictConfig) -> tuple[hardware.Hardware, Task, Data]:
    """The hardware, task and data to evaluate the model of a configuration."""
    machine, task = hardware.setup(cfg), create_task(cfg)
    return machine, task, task.build_data()


def built(task: Task, data: Data, kept: Kept | None, run: Path | None) -> tuple[Data, nn.Module]:
    """The data, with the classes of a run if there is one, and the model for it."""
    if run is not None:
        data = data_record.with_classes_of(run, data)
        data_record.check_classes(run, data, task.cfg.data.name)
        data_record.say_other_images(run, data, task.cfg.data)
    return data, load(task, data, kept)


def load(task: Task, data: Any, kept: Kept | None) -> nn.Module:
    """The model with the weights of a run, or those that the configuration names."""
    if kept is None:
        return task.build_model(data)
    model = task.build_model(data, pretrained=False)
    _fill(model, kept)
    say(f"{kept.checkpoint.path}: step {kept.checkpoint.state['step']}, {kept.part} weights")
    return model


def _fill(model: nn.Module, kept: Kept) -> None:
    """Load the weights of a run; the tables of a backbone built for another size are interpolated, which is printed."""
    try:
        model.load_state_dict(kept.tensors)
        return
    except RuntimeError as error:
        mismatch = error
    try:
        if isinstance(model, Backbone):
            report = load_checkpoint(model, kept.as_file())
            if not report.head_remade:
                say(report.message)
                return
    except CheckpointError as error:
        mismatch = error
    _, *differences = map(str.strip, str(mismatch).splitlines())
    more = f" And {len(differences) - 1} more" if len(differences) > 1 else ""
    raise RunError(
        f"the weights of {kept.place} have other shapes than the requested model, as tables of positions do at another "
        f"img_size; evaluate it at the run's own. The first difference: {' '.join(differences[:1])}{more}"
    ) from mismatch


def answer(cfg: DictConfig, pattern: str, out: Path, run: Path | None = None) -> None:
    """Print predictions for images and, for dense tasks, draw them; the data need not be there.

    Images that cannot be read do not stop the others. Only one process predicts, however many there are.
    """
    kept = None if run is None else find_weights(run)
    paths = distributed.first(lambda: predict.matching(pattern))
    if distributed.rank():
        return
    machine, task = hardware.setup(cfg), create_task(cfg)
    data = predict_weights.data_of(task) if run is None else data_record.described(run, cfg)
    model = machine.place(load(task, data, kept)).eval()
    del kept  # which is as large as the model
    unread, upright = [], True
    for path, name in zip(paths, predict.names(paths), strict=True):
        try:
            image = open_rgb(path, path, decoding(cfg))
        except DataError as error:
            if len(paths) == 1:
                raise
            unread.append(path)
            say(str(error), "red")
            continue
        if upright and (turned := orientation(image)) != 1:
            upright = False
            say(not_applied(turned, path), "yellow")
        images, _ = machine.send(task.prepare(image), None)
        with torch.no_grad(), machine.autocast():
            predictions = task.predict_with(model, images, [{"size": (image.height, image.width)}])
        table, picture = task.answer(image, predictions, data, printable(path))
        CONSOLE.optional = picture is not None  # which is written, whoever reads the table
        CONSOLE.print(table)
        if picture is not None:
            predict.write(picture, out / name)
    if unread:
        names = printable(", ".join(unread))
        raise RunError(f"{len(unread)} of {len(paths)} images could not be read, see above: {names}")


def watch(batches: Any, total: int) -> Any:
    return tracked(batches, total, "evaluating")


if __name__ == "__main__":
    main()
