"""The training loop, started by train.py; in the installed package:

python -m recipes.train model=maxvit_t
torchrun --nproc-per-node 8 -m recipes.train model=maxvit_t
"""

from __future__ import annotations

import math
import re
import shlex
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from omegaconf import DictConfig
from torch import nn

from recipes import config, console, data_record, distributed, hardware, log, optim, plan, sharding, trackers
from recipes.checkpoint import CheckpointError
from recipes.clock import STARTUP, Timed
from recipes.config import ConfigError
from recipes.console import say
from recipes.data import Data, DataError, NoBatch, Source
from recipes.data.encoded import Encoded
from recipes.data.seeding import INIT, MODEL, STEP, seed_all
from recipes.evaluate import evaluate
from recipes.log import LogError
from recipes.run import Run, open_run
from recipes.settings import RunError
from recipes.state import State
from recipes.stop import Stop, Stopped, requeued
from recipes.task import Task
from recipes.task import create as create_task
from zoo.errors import first_line

NAMED = 5  # images that a message names; a batch may have thousands


class NotFinite(RuntimeError):
    """The loss or its gradient is not finite."""


@config.main("train", errors=(RunError, LogError, CheckpointError, NotFinite))
def main(cfg: DictConfig) -> float | None:
    """Train as configured; returns the best score (None without an evaluation), for a sweep to maximise."""
    with requeued():  # not as a decorator: Slurm's launcher pickles this function
        return train(cfg)


def train(cfg: DictConfig) -> float | None:
    """What `main` does; it may end in SystemExit, with the status of a run that was stopped."""
    STARTUP.begin("configuration")
    console.CONSOLE.optional = True
    distributed.join(cfg)
    run = distributed.first(lambda: open_run(cfg, config.overrides()))
    distributed.everywhere(lambda: run.check_here(config.overrides()), (RunError,))
    cfg = run.cfg
    distributed.first(lambda: trackers.check(cfg))
    machine = hardware.setup(cfg)
    task = create_task(cfg)
    data = task.build_data()
    data_record.check_alike(data)
    distributed.first(lambda: run.check_data(data))
    STARTUP.mark("data")
    plans = plan.make(cfg, data.train, run.micro_batches)
    for line in plans.describe(machine.parallel, run.micro_batches):
        say(line)
    seed_all(cfg.seed, INIT)
    schedule = optim.schedule(cfg, plans)
    with _fits(cfg, machine):
        model = machine.place(task.build_model(data, pretrained=run.resumed is None))
        now = State.create(cfg, model, machine, plans, data.train, task.learner)
        if run.resumed:
            now.load(run.resumed, best=distributed.first(lambda: run.best(task.score)))
            now.due = plans.evaluates(now.step) and not distributed.first(lambda: run.evaluated(now.step, task.score))
            if now.step >= plans.steps and not now.due:
                there = shlex.quote(config.quote("model.checkpoint", str(run.folder)))
                say(f"this run is finished, all {plans.steps} steps; another starts from its weights with {there}")
    distributed.first(lambda: run.begin(config.overrides(), data, task.taught()))
    if machine.parallel == "fsdp":
        run.check_shared()
    STARTUP.mark("model")
    show = {"start": now.step, "every": cfg.train.log_every, "memory": machine.memory}
    with Stop() as stop:
        with log.Log(run.sinks(), now.meter, plans, **show) as logs:
            try:
                Loop(run, machine, task, data, schedule, now, logs, stop).train()
            except (ConfigError, NoBatch):
                run.withdraw()
                raise
            except (DataError, NotFinite, LogError, RunError) as error:
                run.rescue(now, error, stop)
            except torch.OutOfMemoryError as error:
                end_out_of_memory(run, now, task, stop, error)
            except Exception as error:
                # alone: other processes may have compiled, and wait for this one
                if stop.noted and distributed.size() == 1 and hardware.is_of_the_compiler(error):
                    run.rescue(now, error, stop)
                elif stop.noted or not (why := hardware.why_not_compiled(error)):
                    raise
                else:
                    end_uncompiled(run, now, stop, RunError(why), error)
        finished = now.step >= plans.steps and not now.due
        # a signal may come again, or only now, which must not change the status
        distributed.first(lambda: run.report(task, data, model, finished=finished))
        stop.agree()
        if not finished or (stop.signal and config.job_number() is not None):  # else a sweep would go on
            stop.end()
    return now.best


def end_out_of_memory(run: Run, now: State, task: Task, stop: Stop, error: torch.OutOfMemoryError) -> NoReturn:
    """Raise RunError, which says what to do, where the device has no memory left.

    One process saves the weights that it evaluated. Those of a step are not saved: it may have changed some of them.
    """
    amp = "" if run.cfg.hardware.amp else "hardware.amp=bfloat16 or "
    if now.due:
        size = run.cfg.data.eval_batch_size or task.eval_batch_size
        said = RunError(
            f"out of memory in the evaluation after step {now.step}: {first_line(error)}\nresume with {amp}a smaller "
            f"data.eval_batch_size than {size}, and, if that is not enough, start a new run with smaller images"
        )
        if distributed.size() == 1:  # else the others wait for this one
            run.rescue(now, said, stop)
        raise said from error
    run.withdraw()
    again = "" if run.cfg.train.grad_checkpointing else "train.grad_checkpointing=true or "
    fewer = f"train.micro_batch={now.plan.micro // 2} or " if now.plan.micro > 1 else ""
    raise RunError(
        f"out of memory at step {now.step}, with {now.plan.micro} images at a time: {first_line(error)}\nstart a new "
        f"run with {amp}{again}{fewer}a smaller data.batch_size; what this one has saved stays in "
        f"{run.folder}/checkpoints"
    ) from error


def end_uncompiled(run: Run, now: State, stop: Stop, said: RunError, error: Exception) -> NoReturn:
    """Raise `said`, where this machine cannot compile: what has not trained begins again, a single process saves."""
    if now.step == 0 and not run.known:
        run.withdraw()
    elif distributed.size() == 1:  # else the others may wait for this one
        run.rescue(now, said, stop)
    raise said from error


@dataclass(frozen=True)
class Loop:
    """The steps of a run, and what is done between them."""

    run: Run
    machine: hardware.Hardware
    task: Task
    data: Data
    schedule: optim.Schedule
    now: State
    logs: log.Log
    stop: Stop

    def train(self) -> None:
        """All steps from `now.step` on, with evaluations and checkpoints, to the last or until a signal comes."""
        run, now, plans = self.run, self.now, self.now.plan
        forward = self.machine.wrapped(now.learner)
        batches = Timed(distributed.together(plan.batches(run.cfg, plans, self.data.train, now.step), DataError))
        if now.due:  # the run was stopped in its evaluation
            self.validate()
        now.train()
        while now.step < plans.steps and not self.stop.signal:
            self.step(forward, batches)
            if now.due:
                self.validate()
            self.stop.agree()
            if now.step % run.cfg.train.save_every == 0 or now.step == plans.steps or self.stop.signal:
                run.save(now)

    def step(self, forward: nn.Module, batches: Timed) -> None:
        """One optimiser step: everything that it does, in order."""
        cfg, now, plans, source, optimizer = self.run.cfg, self.now, self.now.plan, self.data.train, self.now.optimizer
        began, step = time.perf_counter(), now.step
        now.begin()

        lr = optim.set_lr(optimizer, self.schedule, step)

        loss = 0.0
        for turn in range(plans.accumulate):
            images, targets = self.machine.send(*next(batches), source.finish)
            micro_batch = plans.micro_batch(step, turn)
            seed_all(cfg.seed, MODEL, micro_batch)
            with self.machine.syncing(forward, last=turn == plans.accumulate - 1):
                with self.machine.autocast(), _several_values(cfg), _all_in_the_loss(now.learner):
                    share = self.task.loss(forward, images, targets, draw=micro_batch) / plans.accumulate
                now.scaler.scale(share).backward()
            now.statistics.collect()
            loss = loss + share.detach()
        now.statistics.settle()

        now.scaler.unscale_(optimizer)
        norm = sharding.whole(optim.clip(now.learner, cfg.train.clip_grad))
        loss = distributed.mean(loss)
        loss, norm = torch.stack([loss.float(), norm.float()]).tolist()  # the only synchronisation with the device
        if math.isfinite(loss) and math.isfinite(norm):
            seed_all(cfg.seed, STEP, step)  # what an optimiser draws must be the same in all processes
            now.scaler.step(optimizer)
            now.skipped = now.overflowed = 0
        else:
            self.skip(lr=lr, loss=loss, norm=norm)
        now.scaler.update()
        optimizer.zero_grad()
        now.done()
        now.due = plans.evaluates(now.step)

        seconds = time.perf_counter() - began
        bad = distributed.total(source.take_bad()) if source.replace else 0  # else an error, not a count
        spent = {"seconds": seconds, "waited": batches.taken()}
        self.logs.step(now.step, loss, lr=lr, grad_norm=norm, **spent, skipped=now.skipped, bad=bad)

    def skip(self, *, lr: float, loss: float, norm: float) -> None:
        """Skip a step whose gradient is not finite; NotFinite after more than `train.skip_nonfinite` in a row.

        A float16 overflow at the current loss scale, which then halves, is not an error and is counted separately.
        """
        now, cfg = self.now, self.run.cfg
        if math.isfinite(loss) and now.overflows:
            now.rewind()
            now.skipped, now.overflowed = now.skipped + 1, now.overflowed + 1
            return
        what = f"at step {now.step} (learning rate {lr:.3g}) the loss is {loss} and the norm of its gradient {norm}"
        images = f"the training images were {distributed.first(lambda: self.listed(now.step))}"
        if now.skipped - now.overflowed >= cfg.train.skip_nonfinite:
            skipped = f", after {now.skipped} steps that were skipped" if now.skipped else ""
            skipped += f" ({now.overflowed} because float16 overflowed)" if now.overflowed else ""
            amp, precise = cfg.hardware.amp, ""
            if amp and math.isfinite(loss):
                precise = f"; as the loss is finite, its gradient may have overflowed in {amp}: try hardware.amp=null"
            raise NotFinite(
                f"{what}{skipped}; {images}\nlook at these images, or start a new run with a lower optim.lr, "
                f"a longer sched.warmup or train.clip_grad=1{precise}"
            )
        now.rewind()
        now.skipped += 1
        say(f"{what}: this step is skipped, the weights are unchanged; {images}", "yellow")

    def listed(self, step: int) -> str:
        """The names of the first images of a step, and where all of them are listed."""
        source = self.data.train
        names = named(source, plan.images_of(self.run.cfg, self.now.plan, source, step))
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return f"{', '.join(names[:NAMED])}{more}, {self.run.list_images(step, names)}"

    def validate(self) -> None:
        """Evaluate the weights, log the metrics, and keep the weights if they are the best so far.

        An evaluation may take longer than the sender of a signal waits: a signal cuts it off, and it stays due.
        """
        run, task, data, now = self.run, self.task, self.data, self.now

        def watch(batches: Iterable[Any], total: int) -> Iterator[Any]:
            return self.stop.until(self.logs.watch(batches, total))

        try:
            values, metrics = evaluate(run.cfg, task, now.evaluated_model, data, self.machine, watch)
        except Stopped:
            return
        now.train()
        if now.best is None:  # only once: remarks are about the data
            for text in distributed.first(lambda: task.remarks(data, metrics)):
                say(f"note: {text}", "yellow")
        now.due = False
        finite = math.isfinite(values.get("loss", 0.0))
        if not finite:
            say("the validation loss is not finite: these weights are not kept as the best", "yellow")
        better = finite and (now.best is None or values[task.score] > now.best)
        if better:
            now.best = values[task.score]
            run.save(now, best=values)
        self.logs.evaluation(now.step, values, now.weights, better)  # last: a resumed run relies on it
        distributed.first(lambda: run.draw(task.score, every=60))
        distributed.first(lambda: self.logs.picture(now.step, task.show(data, metrics)))


@contextmanager
def _fits(cfg: DictConfig, machine: hardware.Hardware) -> Iterator[None]:
    """Raise RunError where the device has no memory for the model, its average, or a checkpoint that is loaded."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        ways = ["a smaller model"]
        ways += [] if cfg.train.ema is None else ["train.ema=null"]
        ways += [] if machine.parallel == "fsdp" else ["hardware.parallel=fsdp on several devices"]
        raise RunError(
            f"out of memory before the first step: {cfg.model.name} and what is kept beside it do not fit onto "
            f"{machine.device}: {first_line(error)}\nstop what else uses the device, or give {' or '.join(ways)}"
        ) from error


@contextmanager
def _several_values(cfg: DictConfig) -> Iterator[None]:
    """Raise ConfigError where torch refuses to train a batch norm on one value per channel, which has no variance."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel when training"):
            raise
        raise ConfigError(
            f"{cfg.model.name} cannot train on one image at a time of this size, as it has a batch norm on a 1 x 1 "
            f"map: {plan.LARGER_MICRO_BATCHES} a larger data.img_size"
        ) from error


@contextmanager
def _all_in_the_loss(learner: nn.Module) -> Iterator[None]:
    """Raise ConfigError, with their names, for parameters without a gradient, which DDP finds at the second step."""
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"Parameter indices which did not receive grad for rank \d+: ([\d ]+)", str(error))
        if found is None:
            raise
        learned = [name for name, parameter in learner.named_parameters() if parameter.requires_grad]
        idle = [learned[int(index)] for index in found[1].split()]
        layers = ",".join(dict.fromkeys(name.rpartition(".")[0] for name in idle))
        raise ConfigError(
            f"the loss does not depend on {', '.join(idle)}, and hardware.parallel=ddp needs a gradient of everything "
            f"that is trained: give train.freeze=[{layers}] or hardware.parallel=fsdp, or leave out what builds them"
        ) from error


def named(source: Source, images: list[int]) -> list[str]:
    """The names of images: those in files by path, others by index."""
    return list(map(source.where if isinstance(source.records, Encoded) else str, images))


if __name__ == "__main__":
    main()
