"""Where the weights of a pretrained configuration are: file, folder, hub or URL. Only this module uses the network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models._hub import download_cached_file

from .errors import CheckpointError

NAMES_IN_FOLDER = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")


def locate(cfg: Mapping[str, Any], model: str, cache_dir: str | Path | None = None) -> Path:
    """The local file with the weights of timm's pretrained configuration `cfg`, downloaded if it has to be.

    Order: file (or folder), hub id, URL. Where a file's name in a URL carries the first digits of its SHA-256, they are
    verified.
    Raises CheckpointError if there is nothing to load, or it cannot be downloaded.
    """
    if cfg.get("file"):
        path = Path(cfg["file"])
        return _in_folder(path) if path.is_dir() else path
    if cfg.get("hf_hub_id"):
        return _from_hub(cfg["hf_hub_id"], cfg.get("hf_hub_filename"), cache_dir)
    if cfg.get("url"):
        try:
            return Path(download_cached_file(cfg["url"], check_hash=True, cache_dir=cache_dir))
        except (OSError, RuntimeError) as error:
            raise CheckpointError(_failed(cfg["url"], error)) from error
    raise CheckpointError(
        f"{model} has no released weights that can be downloaded: use pretrained=False, or pretrained_cfg_overlay="
        f"dict(file=...) for a file of your own; checkpoints.md lists what exists"
    )


def _in_folder(folder: Path) -> Path:
    for name in NAMES_IN_FOLDER:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} has none of the files {', '.join(NAMES_IN_FOLDER)}")


def _from_hub(hub_id: str, filename: str | None, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = hub_id.partition("@")
    names = (filename,) if filename else NAMES_IN_FOLDER
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, revision=revision or None, cache_dir=cache_dir))
        except LocalEntryNotFoundError as error:  # offline, and not in the cache
            raise CheckpointError(_failed(f"https://huggingface.co/{repository}", error)) from error
        except EntryNotFoundError:
            continue  # the repository keeps its weights under another name
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(_failed(f"https://huggingface.co/{repository}", error)) from error
    raise CheckpointError(f"https://huggingface.co/{repository} has none of the files {', '.join(names)}")


def _failed(where: str, error: Exception) -> str:
    return (
        f"could not download {where} ({type(error).__name__}: {str(error).splitlines()[0]}). "
        f"Download it by other means and pass pretrained_cfg_overlay=dict(file=...)"
    )
