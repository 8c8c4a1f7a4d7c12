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
    OmegaConf.register_new_resolver("scratch", _scratch, replace=True)


def _copied_no_more(store: ConfigStore) -> None:
    """Hydra copies its sources whenever it composes, and what they read: with all models a fifth of its time.

    Only the list of sources changes there; what is loaded from the store is copied then.
    """
    store.__deepcopy__ = lambda memo: store


def _scratch() -> str:
    """Where Hydra may leave what it insists on writing in a sweep."""
    return os.path.join(tempfile.gettempdir(), f"multirun-{os.getuid()}")  # in a container a user may have no name
