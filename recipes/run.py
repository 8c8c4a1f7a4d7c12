"""The run folder: made once, locked while in use, and found again to resume or to evaluate.

    runs/<name>/  README.md  config.yaml  data.json  sessions.jsonl  metrics.jsonl  curves.png  validation.png
                  checkpoints/  nonfinite/

README.md is the model card; config.yaml is the resolved configuration; data.json has the names of the classes, the
numbers of images and digests of their names and labels; sessions.jsonl has a line for every start; validation.png, of
dense tasks, shows predictions of the last evaluation; nonfinite/, if there is one, lists the images of every step whose
loss or gradient was not finite.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shlex
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from ops.tool import replaced
from recipes import card, config, data_record, distributed, shell
from recipes.checkpoint import Checkpoint, CheckpointError, Store, flush
from recipes.config.quoting import key_of
from recipes.console import CONSOLE, say
from recipes.data import BadImage, Data, DataError, Misread
from recipes.hardware import is_of_the_compiler
from recipes.log import Jsonl, LogError, Sink, epoch_table, history, rankable
from recipes.names import part
from recipes.plots import draw_curves
from recipes.provenance import SESSIONS, note_session, sessions
from recipes.settings import (
    RunError,
    config_to_resume,
    has_config,
    is_run,
    load_config,
    resume_command,
    runs_in,
    starts,
    writing,
)
from recipes.state import State
from recipes.stop import Stop, saving
from recipes.task import Task
from recipes.trackers import trackers
from zoo.errors import printable

LOCK = ".lock"
CARD = "README.md"
WRITTEN_OVER = (data_record.FILE, SESSIONS, "metrics.jsonl", "curves.png", "validation.png")  # by a new run, and CARD
SHARE = "the run must lie in a folder that all machines share, under the same path (out= of a new run)"


@dataclass(frozen=True)
class Run:
    """A run folder, its configuration, its checkpoints, and the one to resume from (None at step 0).

    known  whether the folder already holds a run
    """

    folder: Path
    cfg: DictConfig
    store: Store
    resumed: Checkpoint | None = None
    known: bool = False

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def step(self) -> int:
        """Completed optimiser steps."""
        return self.resumed.state["step"] if self.resumed else 0

    @property
    def micro_batches(self) -> int | None:
        """Micro-batches that the batch of a step was split into so far; None at step 0."""
        return self.resumed.state.get("parts") if self.resumed else None

    def check_here(self, overrides: list[str]) -> None:
        """Raise RunError where this process lacks the checkpoint to resume, or finds a run that the first one does not.

        The first process chooses, and it may be on another machine after every start.
        """
        if distributed.rank() == 0:
            return
        if self.resumed and not self.resumed.is_here():
            raise RunError(
                f"{self.resumed.path.absolute()} is missing, or not the checkpoint that the first process sees: to "
                f"resume, {SHARE}"
            )
        if not self.known and (there := _found_by_another(self, overrides)):
            raise RunError(
                f"{there.absolute()} holds a run, which the first process does not see: to resume it, {SHARE}; for a "
                "new run, move that one away or pass another name="
            )

    def check_shared(self) -> None:
        """Raise RunError, in all processes, unless each of them finds this start in the folder. All must call this."""
        start = distributed.first(lambda: sessions(self.folder)[-1]["id"])
        try:
            distributed.everywhere(lambda: self._check_seen(start), (RunError,))
        except RunError:
            self.withdraw()
            raise

    def _check_seen(self, start: str) -> None:
        with _writing(self.folder):  # made, as a network file system may remember for a while that it was not there
            self.folder.mkdir(parents=True, exist_ok=True)
        if start not in [line.get("id") for line in sessions(self.folder)]:
            raise RunError(
                f"{self.folder.absolute()} is not the folder that the first process sees: with hardware.parallel=fsdp, "
                f"where all processes write checkpoints, {SHARE}; or set hardware.parallel=ddp"
            )

    def check_data(self, data: Data) -> None:
        """Raise RunError if a resumed run was started on other data."""
        if self.known:
            data_record.check_same(self.folder, data)

    def begin(self, overrides: list[str], data: Data, taught: int | None = None) -> None:
        """Make the folder of a new run, or cut the records of a resumed one back to the step that it resumes from.

        taught  see `note_session`
        """
        with _writing(self.folder):
            if self.known:
                self.store.set_aside(newer_than=self.step if self.resumed else -1)
                _drop_lines(self.metrics, self.step)
                note_session(self.folder, overrides, self.step, self.cfg.hardware.device, taught)
            else:
                self._make(overrides, data, taught)

    def _make(self, overrides: list[str], data: Data, taught: int | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        _lock(self.folder)
        _refuse_used(self.folder)  # by a process that was faster
        (self.folder / SESSIONS).unlink(missing_ok=True)  # of a start that failed before this point
        note_session(self.folder, overrides, 0, self.cfg.hardware.device, taught)
        _replace(self.folder / data_record.FILE, json.dumps(data_record.of(data)))
        _replace(self.folder / "config.yaml", OmegaConf.to_yaml(self.cfg, resolve=True))  # from here on this is a run

    def withdraw(self) -> None:
        """What turns out not to be trainable as configured need not be resumed, and may begin again under its name.

        Not so where there are weights already: they could not be evaluated without their configuration. Only the first
        process does anything.
        """
        if distributed.rank() > 0 or self.known:
            return
        if not any(self.store.newest(kind)[0] for kind in ("step", "best")):
            for file in (self.folder / "config.yaml", self.metrics):
                file.unlink(missing_ok=True)

    def save(self, now: State, best: dict[str, float] | None = None) -> None:
        """Write a checkpoint of the step; with `best`, the metrics of its evaluated weights, it becomes the best one.

        Raises CheckpointError, which says what remains and how to resume, or that the folder is no longer the run's.
        """
        distributed.first(self._check_lock)
        state = {**now.extras(), "metrics": best}
        try:
            with saving():
                self.store.save(now.step, now.state_dicts(optimizer=best is None), state, best=best is not None)
        except CheckpointError as error:
            left = distributed.first(self._left)
            raise CheckpointError(f"{error}\n{left}; once writing works again: {self.resume_command}") from error

    def _left(self) -> str:
        """What remains where a checkpoint could not be written."""
        try:
            found, _ = self.store.newest()
        except CheckpointError as error:
            return f"whether an earlier one is intact is not known: {error}"
        return f"the previous checkpoint, {found.path}, is intact" if found else "there is no earlier checkpoint"

    def _check_lock(self) -> None:
        """Raise CheckpointError if the folder is not the one that was locked: another run may train there by now."""
        try:
            there = os.stat(self.folder / LOCK)
            if any(os.path.samestat(os.fstat(file.fileno()), there) for file in _LOCKS):
                return
            cause = f"another {LOCK} is in it"
        except OSError as error:
            cause = str(error)
        raise CheckpointError(
            f"the run folder {self.folder} was removed or replaced while this run trained ({cause}): it ends without "
            "saving; if the folder was moved, resume it where it is now, else start again with another name="
        )

    def rescue(self, now: State, error: Exception, stop: Stop) -> None:
        """Save the last good state after an error, and raise the error with the command to resume.

        A signal that stopped the run may have ended its data workers or a compiler as well: their errors are ignored
        then.
        """
        stop.agree()
        now.rewind()
        try:
            self.save(now)
        except CheckpointError as unsaved:
            raise CheckpointError(f"{error}\nand then {unsaved}") from error
        if stop.signal and (isinstance(error, DataError) or is_of_the_compiler(error)):
            return
        saved = f"the state after step {now.step} is saved{self._way_on(error)}"
        raise type(error)(f"{error}\n{saved}") from error

    def _way_on(self, error: Exception) -> str:
        past = "data.on_bad_image=replace"
        if isinstance(error, Misread):
            return (
                "; a resumed run keeps its configuration, so start a new one as said (another name=), or, if only few "
                f"images are like this one, resume with: {self.resume_command} {past}"
            )
        replaces = isinstance(error, BadImage) and past in str(error)  # as it advises
        return f"; resume with: {self.resume_command}{f' {past}' if replaces else ''}"

    def list_images(self, step: int, names: list[str]) -> str:
        """Write the names of the images of a step to nonfinite/step-<step>.txt, one per line; returns where that is.

        An error is only returned as text: it must not hide why the images are listed.
        """
        path = self.folder / "nonfinite" / f"step-{step:08d}.txt"
        try:
            path.parent.mkdir(exist_ok=True)
            _replace(path, "".join(f"{name}\n" for name in names))
        except OSError as error:
            return f"but the list of all of them could not be written to {path}: {error}"
        return f"all listed in {path}"

    def evaluated(self, step: int, score: str) -> bool:
        """Whether the log has the evaluation of a step."""
        return any(line["step"] == step and f"val_{score}" in line for line in history(self.metrics))

    def best(self, score: str) -> float | None:
        """The score of the best checkpoint; reports damaged ones. Raises CheckpointError as `Store.newest` does."""
        found = self.store.intact("best")
        return found.state["metrics"][score] if found else None

    def sinks(self) -> list[Sink]:
        """Where the lines of the log go; only rank 0 writes them."""
        if distributed.rank() > 0:
            return []
        try:
            # the log comes last: lines that it lacks because another sink failed are written again by a resumed run
            return [*trackers(self.cfg, self.folder, self.step), Jsonl(self.metrics)]
        except LogError as error:
            raise LogError(f"{error}; then resume with: {self.resume_command}") from error

    def draw(self, score: str, *, every: float = 0.0) -> None:
        """Draw the curves, unless the picture is less than `every` seconds old."""
        path = self.folder / "curves.png"
        age = time.time() - path.stat().st_mtime if path.exists() else every
        if not 0 <= age < every:  # by another machine's clock it may lie in the future
            with writing(f"could not write {path}"):
                draw_curves(path, history(self.metrics), score)

    @property
    def resume_command(self) -> str:
        return resume_command(self.folder)

    def report(self, task: Task, data: Data, model: nn.Module, *, finished: bool) -> None:
        """Write the card, print where everything is and what to type next, and draw the curves."""
        found, _ = self.store.newest("best")
        lines = history(self.metrics)
        table, evaluated = epoch_table(lines, task.score), bool(rankable(lines, task.score))
        with _writing(self.folder):
            text = card.text(self.folder, self.cfg, data, model, found, evaluated=evaluated)
            _replace(self.folder / CARD, text)
        if table.row_count:
            CONSOLE.print(table)
        if found:
            value, step = found.state["metrics"][task.score], found.state["step"]
            say(f"best {task.score} {value:.2f} after step {step} ({found.state['weights']} weights)", "bold")
        elif evaluated:
            say(f"the best weights are gone from {self.store.folder}: an evaluation takes the newest", "yellow")
        say(f"run folder: {self.folder}")
        if not finished:
            say(f"resume with: {self.resume_command}")
        if found:
            say(f"evaluate with: {shell.command('eval')} {shlex.quote(config.quote('run', str(self.folder)))}")
        try:
            self.draw(task.score)
        except RunError as error:
            if finished:
                raise
            raise RunError(f"{error}; then resume with: {self.resume_command}") from error


def open_run(cfg: DictConfig, overrides: list[str]) -> Run:
    """A new run for the configuration, or the one that `resume` names; writes nothing for a new one.

    Raises RunError for a folder that is in use, already holds a run, holds none, or holds one of another configuration,
    and this or CheckpointError for a run whose files cannot be read.
    """
    folder = _begun(cfg, overrides) or _find(cfg, overrides)
    if folder is None:
        return _new(cfg)
    with _writing(folder):
        _lock(folder)
        cfg = config_to_resume(folder, overrides)
        store = Store(folder / "checkpoints", cfg.train.keep)
        store.clean()
    resumed = store.intact()
    if resumed:
        store.own.add(resumed.state["step"])
    run = Run(folder, cfg, store, resumed, known=True)
    say(f"resuming {folder} from step {run.step}" + ("" if resumed else " (it has no intact checkpoint)"))
    logged = max((line["step"] for line in history(run.metrics)), default=0)
    if logged > run.step:
        say(f"its log reaches step {logged}: the steps after {run.step} are repeated", "yellow")
    return run


def _find(cfg: DictConfig, overrides: list[str]) -> Path | None:
    out = Path(cfg.out)
    if cfg.resume is None:
        return None
    if cfg.resume != "auto":
        load_config(Path(cfg.resume))
        if any(key_of(text) == "out" for text in overrides) and not _lies_in(out, Path(cfg.resume)):
            raise RunError(
                f"resume={cfg.resume} goes on in that folder, and out={cfg.out} is not where it lies: leave out out="
            )
        if cfg.name is not None and _name(cfg) != Path(cfg.resume).resolve().name:
            raise RunError(
                f"resume={cfg.resume} goes on in that folder, and name={cfg.name} is another: leave out name= to "
                f"resume it, or start another run from its weights with {config.quote('model.checkpoint', cfg.resume)}"
            )
        return Path(cfg.resume)
    if cfg.name is None and config.job_number() is not None:
        raise RunError(
            "resume=auto without name= resumes the newest run of this model and data, which in a sweep (-m) may be "
            "another of its runs: pass name=, so that each has a folder of its own, <name>-0, <name>-1 and so on"
        )
    if cfg.name is not None:
        candidates = [out / _name(cfg)]
    else:
        candidates = [path for path in runs_in(out) if _is_same_kind(path, cfg)]
    candidates = [path for path in candidates if has_config(path)]
    if not candidates:
        say("resume=auto: there is no such run yet, so a new one is started")
        return None
    return max(candidates, key=lambda path: (path / "config.yaml").stat().st_mtime_ns)


def _begun(cfg: DictConfig, overrides: list[str]) -> Path | None:
    """The run that this launch worked on before torchrun restarted its processes; None if it did not.

    torchrun also does so, without counting it, where a machine joins or leaves: then some agent is still the same.
    """
    here, job = set(distributed.agents()), distributed.job() if distributed.restarted() else None
    if not here:
        return None
    out = Path(cfg.out)
    runs = [run for run in (runs_in(out) if cfg.name is None else [out / _name(cfg)]) if is_run(run)]
    last = {run: known[-1] for run in runs if (known := starts(run)) and known[-1]["overrides"] == overrides}
    found = [run for run in last if here & set(last[run].get("agents", ())) or (job and job == last[run].get("job"))]
    return max(found, key=lambda run: (run / SESSIONS).stat().st_mtime_ns, default=None)


def _found_by_another(run: Run, overrides: list[str]) -> Path | None:
    """What this machine has in place of a new run: one of its name, or else the one that would be resumed."""
    if distributed.local_rank() > 0:  # one process looks, as there may be many runs
        return None
    if run.cfg.name is not None:
        return run.folder if has_config(run.folder) else None
    return _begun(run.cfg, overrides) or _find(run.cfg, overrides)


def _is_same_kind(folder: Path, cfg: DictConfig) -> bool:
    """Whether a run has the model and data of `cfg`; reports one whose configuration cannot be read."""
    try:
        there = load_config(folder)
    except RunError as error:
        say(f"resume=auto: {error}; this run is skipped until then", "yellow")
        return False
    return all(OmegaConf.select(there, key) == OmegaConf.select(cfg, key) for key in ("model.name", "data.name"))


def _new(cfg: DictConfig) -> Run:
    what = part(f"{cfg.model.name}-{cfg.data.name}")
    made = f"{what}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    folder = Path(cfg.out) / (made if cfg.name is None else _name(cfg))
    _refuse_bytes(folder)
    _refuse_used(folder)
    return Run(folder, cfg, Store(folder / "checkpoints", cfg.train.keep))


def _name(cfg: DictConfig) -> str:
    path = Path(os.path.expanduser(cfg.name))
    if path == Path() or path.is_absolute() or ".." in path.parts:  # the first as from a shell variable that is not set
        raise RunError(
            f"name={cfg.name} does not name a folder below out={cfg.out}: give a name, or leave it out; runs are made "
            "in another folder with out="
        )
    number = config.job_number()
    return cfg.name if number is None else f"{cfg.name}-{number}"


def _refuse_bytes(folder: Path) -> None:
    """Raise RunError for a path that is not UTF-8: the weights in it could be written, but not read."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise RunError(
            f"{printable(str(folder))}: the name of a run folder must be UTF-8, or its weights cannot be read: pass "
            "another name= or out="
        ) from error


def _refuse_used(folder: Path) -> None:
    if has_config(folder):
        advice = (
            "a search that is resumed counts its runs from 0 again: pass another name=, or none"
            if config.is_search()
            else "pass resume=auto to resume it, or another name= for a new one"
        )
        raise RunError(f"{folder} already holds a run: {advice}")
    # Path's own test fails where a name is too long for a file, which is reported where the folder is made
    if os.path.lexists(folder / "checkpoints"):
        raise RunError(
            f"{folder} holds checkpoints but no config.yaml, without which they cannot be resumed: move or remove the "
            "folder, or pass another name="
        )
    # a start that failed leaves its lock, and may leave any of these but a card
    others = () if os.path.exists(folder / LOCK) else WRITTEN_OVER
    there = [name for name in (CARD, *others) if os.path.exists(folder / name)]
    if there:
        raise RunError(
            f"{folder} holds no run, but {', '.join(there)}, which a new run would write over: pass another name=, or "
            "move these files"
        )


def _lies_in(out: Path, folder: Path) -> bool:
    return out.resolve() in folder.resolve().parents


def _writing(folder: Path) -> AbstractContextManager[None]:
    return writing(f"cannot write to the run folder {folder}", "make it writable, or pass another out= for a new run")


def _lock(folder: Path) -> None:
    while _LOCKS:  # of an earlier run of this process, as in a sweep: others may resume that one by now
        _LOCKS.pop().close()
    # a POSIX lock: it is released however this process ends, and forked data workers do not hold it
    file = open(folder / LOCK, "w")  # noqa: SIM115 (held open until the next run, or as long as the process lives)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise RunError(f"{folder} is in use by another process; wait for it, or pass another name=") from error
    _LOCKS.append(file)


_LOCKS: list[Any] = []


def _drop_lines(path: Path, step: int) -> None:
    _replace(path, "".join(json.dumps(line) + "\n" for line in history(path) if line["step"] <= step))


def _replace(path: Path, text: str) -> None:
    # whatever the locale; the name of an image may have bytes that are not UTF-8: they are escaped
    with replaced(path) as temporary, open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        flush(file)
