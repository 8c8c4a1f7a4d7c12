"""Training and evaluation: configuration, data, tasks, optimiser, checkpoints of a run, logging."""

from importlib.util import find_spec

if find_spec("hydra") is None:
    raise ModuleNotFoundError(
        'training and evaluation need the packages of the extra `train`: pip install -e ".[train]" in the repository, '
        'elsewhere pip install "attention-backbones[train]"'
    )
