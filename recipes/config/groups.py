"""The `model` group and the resolvers: what the configuration files need before they can be read."""

import os
import tempfile
from functools import cache

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import zoo
from recipes import papers
from recipes.shell import fill_model_group


@cache
def register() -> None:
    """Fill the `model` group from the zoo's table of variants, once a process."""
    fill_model_group(zoo.variants())
    _copied_no_more(ConfigStore.instance())
    OmegaConf.register_new_resolver("paper", papers.resolve, replace=True)
    OmegaConf.register_new_resolver("scratch", lambda: _scratch().name, replace=True)


def _copied_no_more(store: ConfigStore) -> None:
    """Hydra copies its sources whenever it composes, and what they read: with all models a fifth of its time.

    Only the list of sources changes there; what is loaded from the store is copied then.
    """
    store.__deepcopy__ = lambda memo: store


@cache
def _scratch() -> tempfile.TemporaryDirectory:
    """Where Hydra may leave what it insists on writing in a sweep: a folder of this process alone."""
    return tempfile.TemporaryDirectory(prefix=f"multirun-{os.getuid()}-")  # in a container a user may have no name


def clear_scratch() -> None:
    """Remove it if it was made."""
    if _scratch.cache_info().currsize:
        _scratch().cleanup()
        _scratch.cache_clear()
