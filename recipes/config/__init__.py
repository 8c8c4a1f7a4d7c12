"""The configuration: Hydra's files in recipes/conf, the models of the zoo as a group, messages that say what to type.

cfg = compose(["model=maxvit_t", "model.depths=[2,2,5,2]"])     # for tests and notebooks

@main("train")                                                  # for train.py and eval.py
def run(cfg): ...
"""

import functools
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipes.clock import STARTUP
from recipes.config.checks import check, check_by_task, check_options, check_shadowed
from recipes.config.errors import ConfigError
from recipes.config.given import expanded, with_task_of_run
from recipes.config.groups import clear_scratch, register
from recipes.config.help import text as help_text
from recipes.config.messages import explain, of_launcher
from recipes.config.quoting import key_of, quote, written
from recipes.console import note, say
from zoo.errors import plain_warnings

__all__ = [
    "ConfigError", "compose", "help_text", "is_search", "job_number", "main", "overrides", "quote", "reported",
    "searched",
]  # fmt: skip

UNREADABLE = (HydraException, OmegaConfBaseException, yaml.YAMLError)  # a command line or a file


def compose(
    overrides: Sequence[str] = (),
    name: str = "train",
    typed: Sequence[str] | None = None,
    searched: Sequence[str] = (),
) -> DictConfig:
    """The configuration that `python <name>.py <overrides>` gives, resolved and checked. Raises ConfigError.

    typed     the new ones, where the others were accepted when a run was started; None = all
    searched  folders with configuration files beside ours, see `searched()`
    """
    given = overrides if typed is None else typed
    register()
    check_options(given, name)
    check_by_task(given, searched)
    found = [f"hydra.searchpath={written([f'file://{folder}' for folder in searched])}"] if searched else []
    try:
        with hydra.initialize_config_module("recipes.conf", version_base="1.3"):
            cfg = hydra.compose(name, [*overrides, *found])
    except UNREADABLE as error:
        raise ConfigError(explain(error, overrides, name)) from error
    check(cfg, name, given, begun=typed is not None)
    return cfg


def overrides() -> list[str]:
    """The key=value arguments of the running command; empty outside of one."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _unresolved() -> list[str]:
    """`overrides()` with the `${...}` that were typed: Hydra keeps them in a configuration, which resolves them."""
    return OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)


def searched() -> list[str]:
    """The folders of configuration files that the running command adds: --config-dir=, hydra.searchpath=[file://...]."""
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    added = [one.path for one in sources if one.schema == "file" and one.provider not in ("hydra", "main", "schema")]
    return [os.path.abspath(path) for path in added]


def job_number() -> int | None:
    """Which run of a sweep (-m) this is, from 0; None outside of one."""
    return HydraConfig.get().job.num if _sweeping() else None


def is_search() -> bool:
    """Whether a sweeper such as Optuna's chooses the values of this run, from the scores of those before."""
    return _sweeping() and "basic_sweeper" not in str(HydraConfig.get().sweeper.get("_target_"))


def _sweeping() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


Job = Callable[[DictConfig], float | None]
OF_SWEEPS = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweep")  # keys that begin so
SWEEP_ENDS: list[Callable[[], None]] = []  # called at the end of a sweep, however it ended
_RUNS: dict[int, BaseException | None] = {}  # those of a sweep that this process has started, and what ended each early
_UNSCORED: set[int] = set()  # those of a search that ended without a number to maximise


def main(name: str, errors: tuple[type[Exception], ...] = ()) -> Callable[[Job], Callable[[], None]]:
    """Decorator: call the function with the configuration of the command line, once, or once per run of a sweep (-m).

    A wrong command line, wrong data, weights that cannot be loaded, and `errors` end the process with a message and
    status 2; anything else with its traceback. In a sweep either is printed at once, the remaining runs go on, and the
    last line says which runs failed.
    The function returns the number that a sweeper optimises.
    """

    def decorate(function: Job) -> Callable[[], None]:
        @functools.wraps(function)
        def job(cfg: DictConfig) -> float | None:
            _refuse_shared_search()
            with plain_warnings(), _noted(name, errors) if _sweeping() else reported(name, errors):
                _refuse_no_sweep()
                check_shadowed(searched())
                check_by_task(overrides(), searched())
                check(cfg, name, _unresolved())
                score = function(cfg)
                if score is None and is_search():
                    _UNSCORED.add(job_number())
                return score

        def command() -> None:
            STARTUP.mark("imports")
            register()
            with reported(name, errors):
                sys.argv[1:] = expanded(sys.argv[1:], name)
            if {"-h", "--help"} & set(sys.argv[1:]):
                note(help_text(name), sys.stdout)
                return
            with reported(name, errors):
                sys.argv[1:] = with_task_of_run(sys.argv[1:], name)
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises its errors, and `reported` rewords them
            with reported(name, errors), _summed():
                try:
                    hydra.main(config_path="pkg://recipes.conf", config_name=name, version_base="1.3")(job)()
                except KeyboardInterrupt:
                    sys.exit(128 + signal.SIGINT)
                finally:
                    clear_scratch()
                    for end in SWEEP_ENDS:
                        end()

        return functools.wraps(function)(command)

    return decorate


def _refuse_no_sweep() -> None:
    """Raise ConfigError if a single run was given a launcher or a sweeper: without -m it would start here."""
    typed = [text for text in HydraConfig.get().overrides.hydra if key_of(text).startswith(OF_SWEEPS)]
    if typed and not _sweeping():
        raise ConfigError(f"{' '.join(typed)} has an effect only in a sweep: add -m, or leave it out")


def _refuse_shared_search() -> None:
    """End a search of several processes at its first run: each would choose values of its own for it."""
    from recipes import distributed

    if is_search() and distributed.size() > 1:
        distributed.report(
            "a search chooses its values in one process: start it with `python`, not with torchrun; "
            "hydra/launcher=slurm gives each of its runs several devices"
        )
        sys.exit(2)


@contextmanager
def _noted(name: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Report which run of a sweep failed as it fails: Hydra raises only the first error, once the others are done.

    No later run can be done without the other processes: the loss of one ends this one, with status 2. A job of another
    launcher, such as Slurm's, is for one run and hands over the error.
    """
    from recipes import distributed

    number = job_number()
    _RUNS[number] = None
    try:
        yield
    except BaseException as error:
        _RUNS[number] = error
        if isinstance(error, Exception):
            if (message := _explained(error, name, errors)) is None and distributed.is_loss(error):
                distributed.report_loss(error)
                if "basic_launcher" in str(HydraConfig.get().launcher.get("_target_")):
                    sys.exit(2)
            else:
                message = message or "".join(traceback.format_exception(error)).rstrip()
                distributed.report(message, f"error in run {number} ({' '.join(overrides())})")
            _release(error)
        raise
    finally:
        gc.collect()  # OmegaConf's errors at keys that are absent are cycles, and hold the functions that asked


def _release(error: BaseException) -> None:
    """Let go of what the frames of a reported error hold: it is kept to the end of the sweep, and a model with it."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        traceback.clear_frames(error.__traceback__)
        chain.append(error)
        error = error.__cause__ or error.__context__


@contextmanager
def _summed() -> Iterator[None]:
    """End a sweep with the numbers of the runs that failed, each of which `_noted` has reported."""
    from recipes import distributed

    def failures() -> list[int]:
        return [number for number, end in _RUNS.items() if isinstance(end, Exception)]

    def said(failed: list[int]) -> str:
        return f"{len(failed)} of {len(_RUNS)} runs failed, see above: {', '.join(map(str, failed))}"

    try:
        yield
    except BaseException as error:
        failed = failures()
        if failed:
            distributed.report(said(failed))
        if not isinstance(error, Exception) and _RUNS and _RUNS[last := max(_RUNS)] is not None:
            say(f"the sweep was stopped in run {last}; any later runs were not started", "yellow")
        # of a search that has no best run, Optuna raises an error of its own
        fruitless = len({*failed, *_UNSCORED}) == len(_RUNS) > 0
        if isinstance(error, Exception) and fruitless and _UNSCORED:
            distributed.report("the search has no best run: none ended with a finite loss in its best evaluation")
        if isinstance(error, Exception) and (fruitless or error in _RUNS.values()):
            sys.exit(2)
        raise
    if failed := failures():  # a search goes on without them
        say(said(failed), "yellow")


def _explained(error: Exception, name: str, errors: tuple[type[Exception], ...]) -> str | None:
    """The message for an error that the user can fix; None for any other."""
    import zoo
    from recipes.data import DataError

    if isinstance(error, (ConfigError, DataError, zoo.CheckpointError, *errors)):
        return str(error)
    if isinstance(error, UNREADABLE):
        return explain(error, [text for text in sys.argv[1:] if not text.startswith("-")], name)
    return of_launcher(error, name)


@contextmanager
def reported(name: str, errors: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """End the process with a message and status 2 for an error that the user can fix."""
    from recipes import distributed

    try:
        yield
    except Exception as error:
        if (message := _explained(error, name, errors)) is not None:
            distributed.report(message)
        elif distributed.is_loss(error):
            distributed.report_loss(error)
        else:
            raise
        sys.exit(2)
