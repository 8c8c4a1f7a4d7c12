"""Training and evaluation: configuration, data, tasks, optimiser, checkpoints of a run, logging."""

from importlib.util import find_spec

if find_spec("hydra") is None:
    raise ModuleNotFoundError(
        'training and evaluation need the packages of the extra `train`: run pip install -e ".[train]" in the '
        'repository, or pip install "attention-backbones[train]" elsewhere'
    )
