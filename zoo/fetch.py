"""Where the weights of a pretrained configuration are: file, folder, hub or URL. Only this module downloads weights."""

import posixpath
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import urlsplit

import torch
from filelock import FileLock

from ops.tool import replaced

from .errors import CheckpointError, LicenceWarning, listed
from .files import SUFFIXES, weights_in
from .files import sha256 as digest_of
from .reader import describe
from .recognise import BY_TIMM, Recognition, State, recognise
from .releases import RELEASES, Release, candidates, find

NAMES_IN_FOLDER = (*BY_TIMM, "pytorch_model.pth", "model.pth")
# the first digits of a SHA-256 in a file's name, as torch.hub writes them; decimal digits alone are a date
DIGEST = re.compile(r"-(?=\d*[a-f])([0-9a-f]{8,64})\.")
WHOLE = re.compile(r"[0-9a-f]{64}")

_warned: set[Release] = set()


def locate(cfg: Mapping[str, Any], model: str, cache_dir: str | Path | None = None) -> Path:
    """The local file with the weights of timm's pretrained configuration `cfg`, downloaded if necessary.

    Order: file (or folder), hub id, URL. A file that must be downloaded by hand is looked for in `cache_dir` (default:
    the cache of torch.hub). Every file but the user's own is verified where its SHA-256 is known: from the table of
    releases, from the hub, or its first digits from the name in the URL. Of any other download it is verified that it
    is a weights file, and complete.
    Raises CheckpointError if there is nothing to load, the download fails, or the file is not what was released.
    """
    if cfg.get("file"):
        path = Path(cfg["file"])
        return _in_folder(path) if path.is_dir() else path
    release = _release(cfg, model)
    if cfg.get("hf_hub_id"):
        path = _from_hub(cfg["hf_hub_id"], cfg.get("hf_hub_filename"), cache_dir)
        blob = path.resolve()  # what the hub keeps as a large file, it keeps under its SHA-256
        _verify(blob, (release and release.sha256) or (blob.name if WHOLE.fullmatch(blob.name) else None))
    elif cfg.get("url"):
        path = _from_url(cfg["url"], release.sha256 if release else None, cache_dir)
    elif release:
        path = _from_person(release, cache_dir)
    else:
        raise CheckpointError(
            f"{model} has no released weights that can be downloaded: use pretrained=False, or pretrained_cfg_overlay="
            f"dict(file=...) for a file of your own; checkpoints.md lists what exists"
        )
    warn_of_licence(release)
    return path


def by_name(path: str | Path, meta: Mapping[str, Any]) -> list[Release]:
    """The releases that a file may be by its name and by what `zoo.convert` wrote into its metadata; it is not opened.

    Any file can have any name: whether it holds the model of a release is for the caller to check.
    """
    release, source = (str(meta.get(key, "")) for key in ("release", "source"))
    model, _, tag = release.partition(".")
    # whatever stands there is taken for the name of a file, which has at most 255 characters
    found = find(filename=path), find(model, tag=tag), find(filename=PurePath(source).name[-255:])
    return [release for release in found if release is not None]


def releases_in(
    path: str | Path, meta: Mapping[str, Any], found: Recognition, model: str | None = None
) -> tuple[list[Release], bool]:
    """The releases that can be loaded and that a file may be, the most likely first; and whether a name says so: the
    file's, one in its metadata, or `model`. Otherwise its tensors do, which several releases may fit.

    found  what the tensors are: they are no release with other windows or another number of classes or channels
    model  the variant, or the release, that was asked for, if one was
    """

    def may_be(release: Release) -> bool:
        same = found.exact and found.classes in (None, release.num_classes)
        same = same and "in_chans" not in found.arguments(release.model)
        return release.loadable and same and release.model in dict(found.candidates)

    tagged = model is not None and "." in model
    rows = [r for r in RELEASES if r.name == model] if tagged else by_name(path, meta)
    named = [r for r in rows if model in (None, r.model, r.name) and may_be(r)]
    if named or tagged:
        return named, True
    model = model or found.model
    alike = candidates(model, dict(found.candidates).get(model, "")) if model else []
    return [r for r in alike if may_be(r)], False


def warn_of_file(path: str | Path, meta: Mapping[str, Any], state: State) -> None:
    """Warn as `warn_of_licence` does if a file is a release by its name and `state`, which it holds, is its model."""
    if named := [release for release in by_name(path, meta) if release.noncommercial]:
        models = dict(recognise(state).candidates)
        for release in named:
            warn_of_licence(release if release.model in models else None)


def warn_of_licence(release: Release | None) -> None:
    """Warn, once per process, that a release may not be used commercially."""
    if release is None or not release.noncommercial or release in _warned:
        return
    _warned.add(release)
    warnings.warn(
        f"{release.name}: the licence of these weights, {release.licence}, forbids commercial use ({release.url})",
        LicenceWarning,
        stacklevel=2,
    )


def _release(cfg: Mapping[str, Any], model: str) -> Release | None:
    """The release that `cfg` points to, of those that are ours to load; one that must be downloaded by hand is found by
    its tag.
    """
    hub_id, file = (cfg.get("hf_hub_id") or "").partition("@")[0], cfg.get("hf_hub_filename")
    for r in (r for r in RELEASES if not r.foreign):
        if hub_id and r.hub_id == hub_id and file == (r.file or None):
            return r
        if not hub_id and cfg.get("url") == r.url:
            return r
        if not hub_id and not cfg.get("url") and r.by_hand and r.tag and (r.model, r.tag) == (model, cfg.get("tag")):
            return r
    return None


@contextmanager
def fetching(name: str) -> Iterator[None]:
    """For commands that build `name`: timm's own models download their weights as timm does, and raise its errors.

    Raises CheckpointError for an OSError, as one without a network is.
    """
    try:
        yield
    except OSError as error:
        said = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"the weights of {name} could not be downloaded: {said}. Give a file instead") from error


def _in_folder(folder: Path) -> Path:
    """The weights in a folder: under one of timm's names, or the only file with the ending of one."""
    for name in NAMES_IN_FOLDER:
        if (folder / name).is_file():
            return folder / name
    others = weights_in(folder)
    if len(others) == 1:
        return others[0]
    which = listed(str(file.relative_to(folder)) for file in others)
    give = f"but several others ({which}): pass pretrained_cfg_overlay=dict(file=...) with one of them"
    none = f"nor any other that ends in {', '.join(SUFFIXES)}"
    raise CheckpointError(f"{folder} has none of the files {', '.join(NAMES_IN_FOLDER)}, {give if others else none}")


def _from_hub(hub_id: str, filename: str | None, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = hub_id.partition("@")
    names = (filename,) if filename else NAMES_IN_FOLDER
    page = f"https://huggingface.co/{repository}/resolve/{revision or 'main'}/{names[0]}"
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, revision=revision or None, cache_dir=cache_dir))
        except LocalEntryNotFoundError as error:  # offline, and not in the cache
            raise CheckpointError(_failed(page, error)) from error
        except EntryNotFoundError:
            continue  # the repository keeps its weights under another name
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(_failed(page, error)) from error
    raise CheckpointError(f"https://huggingface.co/{repository} has none of the files {', '.join(names)}")


def _from_url(url: str | tuple[str, str], sha256: str | None, cache_dir: str | Path | None) -> Path:
    """timm also takes (URL, name of the file). Of the processes that need a file, one downloads it and the others wait.

    What is downloaded gets its name once it is verified, so that no other process finds a file that is then deleted.
    """
    address, name = (url, posixpath.basename(urlsplit(url).path)) if isinstance(url, str) else url
    path, digest = _cache(cache_dir) / name, DIGEST.search(name)
    sha256 = sha256 or (digest and digest[1])
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f".{name}.lock")):  # the system releases it if this process is killed
                if not path.exists():
                    _download(address, path, sha256)
                    return path
    except CheckpointError:
        raise
    except (OSError, RuntimeError, ValueError, HTTPException) as error:  # ValueError: it is no URL
        raise CheckpointError(_failed(address, error, path)) from error
    _verify(path, sha256)
    return path


def _download(address: str, path: Path, sha256: str | None) -> None:
    with replaced(path) as temporary:
        torch.hub.download_url_to_file(address, str(temporary), progress=False)
        _verify(temporary, sha256, address)
        if not sha256:
            _check_whole(temporary, address)


def _from_person(release: Release, cache_dir: str | Path | None) -> Path:
    """The file that somebody downloaded in a browser and put into the cache."""
    path = _cache(cache_dir) / release.filename
    if release.filename and path.is_file():
        _verify(path, release.sha256)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)  # for whoever follows the message
    which, put = (release.filename, f"put it at {path}, or ") if release.filename else ("its file", "")
    also = f" (or {', '.join(release.mirrors)})" if release.mirrors else ""
    raise CheckpointError(
        f"{release.name} must be downloaded in a browser: open {release.url}{also}, download {which}, and {put}pass "
        f"pretrained_cfg_overlay=dict(file=...)"
    )


def _cache(cache_dir: str | Path | None) -> Path:
    return Path(cache_dir) if cache_dir else Path(torch.hub.get_dir(), "checkpoints")


def _verify(path: Path, sha256: str | None, address: str | None = None) -> None:
    """Raise CheckpointError unless the SHA-256 of a file is `sha256` or begins with it; None: it is not known.

    address  where a file that is deleted after an error was just downloaded from; None for a file that stays
    """
    found = digest_of(path) if sha256 else None
    if not sha256 or found.startswith(sha256):
        return
    raise CheckpointError(
        f"{address or path} is not the released file, or is incomplete: its SHA-256 is {found}, expected "
        f"{sha256}{'' if len(sha256) == 64 else '...'}. Nothing was loaded; "
        + ("the download was deleted" if address else "delete it to download it again")
    )


def _check_whole(path: Path, address: str) -> None:
    """Raise CheckpointError unless `path`, just downloaded, is a weights file: torch.hub takes what it gets before a
    connection breaks off for the whole.
    """
    try:
        describe(path)
    except CheckpointError as error:
        said = str(error).replace(str(path), f"what {address} sent")
        raise CheckpointError(f"{said}. Nothing was loaded; the download was deleted") from error


def _failed(where: str, error: Exception, path: Path | None = None) -> str:
    put = f"put it at {path}, or " if path else ""
    why = f"{type(error).__name__}: {error}".partition("\n")[0]
    return (
        f"could not download {where} ({why}). Download it by other means, and {put}pass "
        f"pretrained_cfg_overlay=dict(file=...)"
    )
