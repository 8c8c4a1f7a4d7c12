"""Training and evaluation: configuration, data, tasks, optimiser, checkpoints of a run, logging."""

from importlib.util import find_spec


def to_install(extra: str) -> str:
    """What to type for the packages of an extra: their own names would bring versions that do not fit together."""
    return f'run pip install -e ".[{extra}]" in the repository, or pip install "attention-backbones[{extra}]" elsewhere'


if _missing := [name for name in ("hydra", "matplotlib", "rich", "torchmetrics") if find_spec(name) is None]:
    raise ModuleNotFoundError(
        "training and evaluation need the packages of the extra `train`, but there is no "
        f"{' and no '.join(_missing)}: {to_install('train')}"
    )
