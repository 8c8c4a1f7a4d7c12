"""Train an image model, and go on with a run that was interrupted.

python train.py                                    # MaxViT-T on scikit-learn's digits, minutes on a laptop
python train.py model=maxvit_s data=imagefolder data.root=photos
python train.py resume=runs/<name>                 # ends with the weights of a run that was never interrupted
python train.py --help                             # models, data sets, recipes
"""

from __future__ import annotations

import math
import sys
import time
from functools import partial

from omegaconf import DictConfig

from recipes import config, hardware, log, optim, plan, rng
from recipes.checkpoint import CheckpointError
from recipes.evaluate import evaluate
from recipes.log import LogError
from recipes.run import Run, open_run
from recipes.settings import RunError
from recipes.state import State
from recipes.stop import Stop
from recipes.task import create as create_task

RANK = 0  # of this process; the model's randomness is seeded with it


class NotFinite(RuntimeError):
    """The loss or its gradient is no number any more."""


@config.main("train", errors=(RunError, LogError, CheckpointError, NotFinite))
def main(cfg: DictConfig) -> None:
    run = open_run(cfg, config.overrides())
    cfg = run.cfg
    machine = hardware.setup(cfg)
    task = create_task(cfg)
    data = task.build_data()
    plans = plan.make(cfg, data.train)
    rng.seed_all(cfg.seed, rng.INIT)
    model = machine.place(task.build_model(data, pretrained=run.resumed is None))
    schedule = optim.schedule(cfg, plans)
    now = State.create(cfg, model, machine)
    now.position = partial(plan.position, cfg, plans, data.train)
    if run.resumed:
        now.load(run.resumed)
    run.begin(config.overrides(), data)
    with log.Log(run.sinks(), now.meter, plans, start=now.step, every=cfg.train.log_every) as logs, Stop() as stop:
        train(run, machine, task, data, plans, schedule, now, logs, stop)
    finished = now.step == plans.steps
    run.report(task.score, finished=finished)
    if not finished:
        sys.exit(128 + stop.signal)  # what a shell reports for a process that the signal ended


def train(run: Run, machine, task, data, plans, schedule, now: State, logs, stop) -> None:
    """Steps `now.step` to `plans.steps`; what is done at each stands here, in order."""
    cfg, model, optimizer = run.cfg, now.model, now.optimizer
    forward = machine.compiled(model)
    batches = plan.micro_batches(cfg, plans, data.train, now.step)
    best = run.best(task.score)
    model.train()
    while now.step < plans.steps and not stop.signal:
        began, step = time.perf_counter(), now.step

        lr = schedule(step)
        optim.set_lr(optimizer, lr)

        loss, buffers = 0.0, now.buffers()
        for micro in range(plans.accumulate):
            images, targets = machine.send(*next(batches))
            rng.seed_all(cfg.seed, rng.MODEL, step, micro, RANK)
            with machine.autocast():
                part = task.loss(forward, images, targets, draw=step * plans.accumulate + micro) / plans.accumulate
            now.scaler.scale(part).backward()
            loss += part.item()

        now.scaler.unscale_(optimizer)
        norm = optim.clip(model, cfg.train.clip_grad)
        if not math.isfinite(loss) or not (math.isfinite(norm) or now.scaler.is_enabled()):
            now.restore_buffers(buffers)
            run.save(now)
            raise NotFinite(
                f"at step {now.step} (learning rate {lr:.3g}) the loss is {loss} and the norm of its gradient {norm}; "
                f"the training images were {plan.images_of(cfg, plans, data.train, now.step)}\n"
                f"the state before this step is saved in {run.folder}; look at these images, or begin a new run with "
                "a lower optim.lr, a longer sched.warmup or train.clip_grad=1"
            )

        now.scaler.step(optimizer)
        now.scaler.update()
        optimizer.zero_grad()
        now.step += 1
        if now.ema is not None:
            now.ema.update(model, now.step)

        seconds = time.perf_counter() - began
        logs.step(
            now.step, loss=loss, lr=lr, grad_norm=norm, images=plans.batch, seconds=seconds, bad=data.train.take_bad()
        )

        if now.step % plans.evaluate_every == 0 or now.step == plans.steps:
            values, _ = evaluate(cfg, task, now.measured, data, machine, logs.watch)
            model.train()
            better = best is None or values[task.score] > best
            logs.evaluation(now.step, values, now.weights, better)
            if better:
                best = values[task.score]
                run.save(now, best=values)
            run.draw(task.score, every=60)

        if now.step % cfg.train.save_every == 0 or now.step == plans.steps or stop.signal:
            run.save(now)


if __name__ == "__main__":
    main()
