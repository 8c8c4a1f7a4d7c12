"""The configuration: Hydra's files in recipes/conf, the models of the zoo as a group, messages that say what to type.

cfg = compose(["model=maxvit_t", "model.depths=[2,2,5,2]"])     # for tests and notebooks

@main("train")                                                  # for train.py and eval.py
def run(cfg): ...
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from recipes.clock import STARTUP
from recipes.config.checks import check
from recipes.config.errors import ConfigError
from recipes.config.groups import register
from recipes.config.help import text as help_text
from recipes.config.messages import explain
from recipes.config.quoting import quote

__all__ = ["ConfigError", "compose", "help_text", "main", "overrides", "quote", "reported"]


def compose(overrides: Sequence[str] = (), name: str = "train") -> DictConfig:
    """The configuration that `python <name>.py <overrides>` gives, resolved and checked. Raises ConfigError."""
    register()
    try:
        with hydra.initialize_config_module("recipes.conf", version_base="1.3"):
            cfg = hydra.compose(name, list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, overrides, name)) from error
    check(cfg, name, overrides)
    return cfg


def overrides() -> list[str]:
    """The key=value arguments of the running command; empty outside of one."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


Job = Callable[[DictConfig], None]


def main(name: str, errors: tuple[type[Exception], ...] = ()) -> Callable[[Job], Callable[[], None]]:
    """Decorator: call the function with the configuration of the command line, once, or once a run of a sweep (-m).

    A wrong command line, wrong data, weights that cannot be loaded, and `errors` end the process with a message and
    status 2; anything else with its traceback.
    """

    def decorate(function: Job) -> Callable[[], None]:
        @functools.wraps(function)
        def job(cfg: DictConfig) -> None:
            with reported(name, errors):
                check(cfg, name, overrides())
                function(cfg)

        def command() -> None:
            STARTUP.mark("imports")
            register()
            if {"-h", "--help"} & set(sys.argv[1:]):
                print(help_text(name))
                return
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises its errors, and `reported` words them
            with reported(name, errors):
                hydra.main(config_path="pkg://recipes.conf", config_name=name, version_base="1.3")(job)()

        return functools.wraps(function)(command)

    return decorate


@contextmanager
def reported(name: str, errors: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """End the process with a message and status 2 for an error that the user can mend."""
    import zoo
    from recipes.data import DataError

    try:
        yield
    except (ConfigError, DataError, zoo.CheckpointError, *errors) as error:
        message = str(error)
    except (HydraException, OmegaConfBaseException) as error:
        message = explain(error, [text for text in sys.argv[1:] if not text.startswith("-")], name)
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
