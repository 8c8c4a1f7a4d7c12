"""Which release is meant: by timm's name, by the name of a downloaded file, by repository of the hub."""

import re
from collections.abc import Iterable
from os import PathLike, fspath
from urllib.parse import unquote, urlsplit

from .families import RELEASES
from .table import SUFFIXES, Release

# what browsers, file managers and wget put into the name of a second copy, before a suffix or at the end
COPY = re.compile(
    r"(?:\s*\(\d{1,3}\)|(?:\s-\s|\s|_|-)copy(?:\s*\(?\d{1,3}\)?)?|-\d{1,2})(?=\.(?:pth|pt|tar|bin|safetensors|ckpt|pkl)\b|$)"
    r"|(?<=[a-z])\.\d{1,2}$"
)
HUB = re.compile(r"(?:hf[-_]hub:|https?://(?:huggingface\.co|hf\.co)/)?([\w.-]+/[\w.-]+)(?:@[\w./-]+)?(?:/tree/.*|/)?")
IN_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # a folder of the hub's cache
PERMISSIVE = ("apache-2.0", "mit", "bsd-3-clause")


def find(
    model: str | None = None, *, tag: str | None = None, filename: str | PathLike[str] | None = None
) -> Release | None:
    """The release that is meant, or None where there is none, or several that fit equally well.

    model     "maxvit_t_tv.tv_in1k"; "maxvit_t_tv" with `tag`, or alone for its default release; or a repository of the
              hub, "timm/davit_tiny.msft_in1k", with or without "hf-hub:" before it
    tag       the second half of "model.tag"
    filename  name, path or URL of a file as downloaded, not opened; copies that a browser renamed, files with another
              suffix and files in the hub's cache are recognised. A `model` beside it decides between several

    >>> find(filename="downloads/maxvit_t-bc5ab103 (1).pth").name
    'maxvit_t_tv.tv_in1k'
    """
    found = list(RELEASES) if filename is None else _of_file(fspath(filename))
    if model is not None:
        found = _of_model(model, found)
    if tag is not None:
        found = [r for r in found if r.tag == tag]
    if filename is None and tag is None:
        found = _default(found, model)
    return found[0] if len(found) == 1 else None


def candidates(model: str, layout: str | None = None, *, task: str = "classification") -> list[Release]:
    """The releases of a variant, in a layout of `zoo/layouts` where one is named, the default one first."""
    rows = (r for r in RELEASES if r.model == model and r.task == task)
    return preferred(r for r in rows if layout in (None, r.layout))


def preferred(releases: Iterable[Release]) -> list[Release]:
    """`releases` by what speaks for them: loadable by name, ImageNet-1k's classes, no browser needed, a licence that
    permits much; then as the tables have them, the best documented first.
    """
    return sorted(releases, key=lambda r: (not r.tag, r.num_classes != 1000, r.by_hand, _strictness(r)))


def _default(releases: list[Release], model: str | None) -> list[Release]:
    """Of a variant's releases its default one alone; what is no variant's stays."""
    tagged = [r for r in preferred(releases) if r.model == model and r.tag]
    return tagged[:1] or releases


def _strictness(release: Release) -> int:
    if release.noncommercial:
        return 2
    return 0 if release.licence in PERMISSIVE else 1


def _of_model(name: str, releases: Iterable[Release]) -> list[Release]:
    repository = HUB.fullmatch(name)
    if repository:
        return [r for r in releases if r.hub_id == repository[1]]
    return [r for r in releases if name in (r.model, r.name)]


def _of_file(path: str) -> list[Release]:
    """Those whose file has this name, or that are kept in this repository of the hub."""
    path = unquote(urlsplit(path).path) if "://" in path else path
    path = path.replace("\\", "/")
    stem = _stem(path.rpartition("/")[2])
    if found := [r for r in RELEASES if r.filename and _stem(r.filename) == stem]:
        return found
    repository = IN_CACHE.search(path) or re.search(r"([\w.-]+)/([\w.-]+)/resolve/", path)
    return [r for r in RELEASES if repository and r.hub_id == "/".join(repository.groups())]


def _stem(name: str) -> str:
    """A file's name without what was added to it and without its suffixes, in small letters."""
    name = COPY.sub("", name.lower().strip())
    while suffix := next((s for s in (*SUFFIXES, ".tar") if name.endswith(s)), None):
        name = name.removesuffix(suffix)
    return name.replace("_in1k_", "_1k_")  # SHI-Labs' pages write one for the other
