"""The `model` group and the resolvers: what the configuration files need before they can be read."""

import getpass
import os
import tempfile
from functools import cache

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

import zoo
from recipes import papers


@cache
def register() -> None:
    """Fill the `model` group from the zoo's table of variants, once a process."""
    store = ConfigStore.instance()
    for name, arguments in zoo.variants().items():
        # the size comes from the data unless model.img_size is given
        own = {key: value for key, value in arguments.items() if key != "img_size"}
        store.store(group="model", name=name, node=OmegaConf.create({"name": name, **own}), provider="zoo")
    store.store(group="model", name="timm", node=OmegaConf.create({"name": MISSING}), provider="zoo")
    OmegaConf.register_new_resolver("paper", papers.resolve, replace=True)
    OmegaConf.register_new_resolver("scratch", _scratch, replace=True)


def _scratch() -> str:
    """Where Hydra may leave what it insists on writing in a sweep."""
    return os.path.join(tempfile.gettempdir(), f"multirun-{getpass.getuser()}")
