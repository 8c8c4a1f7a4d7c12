"""The `model` group and the resolvers: what the configuration files need before they can be read."""

import getpass
import os
import tempfile
from functools import cache

from omegaconf import OmegaConf

import zoo
from recipes import papers
from recipes.shell import fill_model_group


@cache
def register() -> None:
    """Fill the `model` group from the zoo's table of variants, once a process."""
    fill_model_group(zoo.variants())
    OmegaConf.register_new_resolver("paper", papers.resolve, replace=True)
    OmegaConf.register_new_resolver("scratch", _scratch, replace=True)


def _scratch() -> str:
    """Where Hydra may leave what it insists on writing in a sweep."""
    return os.path.join(tempfile.gettempdir(), f"multirun-{getpass.getuser()}")
