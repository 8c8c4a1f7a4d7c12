"""`checkpoints.md`, rendered from the table of releases."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from urllib.parse import urlsplit

from .table import IMAGENET, Release, Unreleased

FAMILIES = {
    "maxvit": "MaxViT",
    "gcvit": "GC ViT",
    "davit": "DaViT",
    "nat": "NAT and DiNAT",
    "stvit": "STViT",
    "litv2": "LITv2",
    "biformer": "BiFormer",
    "sgformer": "SG-Former",
}
SAME_FAMILY = {"dinat": "nat", "dinats": "nat", "vitrpb": "nat"}
TASKS = {"classification": "Classification", "detection": "Detection", "segmentation": "Segmentation"}
METRICS = {
    "top1": "top-1",
    "top5": "top-5",
    "pq": "PQ",
    "box_ap": "box AP",
    "mask_ap": "mask AP",
    "miou": "mIoU",
    "miou_ms": "mIoU, multi-scale",
}
NUMERIC = {"params", "GFLOPs", "pixels", *METRICS.values()}
NOT_OURS, UNRELEASED = "Not loadable here", "Published without weights"

HOSTS = {
    "drive.google.com": "Google Drive",
    "1drv.ms": "OneDrive",
    "connecthkuhk-my.sharepoint.com": "OneDrive",
    "api.onedrive.com": "OneDrive",
    "matix.li": "short link",
    "huggingface.co": "hub",
    "console.cloud.google.com": "Google Cloud",
    "gresearch": "bucket",
}

HEADER = """\
# Checkpoints

All weights that were released for the families of this zoo, with their published figures, licences and addresses. This
page is rendered from the table in `zoo/releases` (`make docs`), which `find` and `candidates` of `zoo.releases` search.

```python
import timm
import zoo

model = timm.create_model("maxvit_t_tv.tv_in1k", pretrained=True)  # downloads, verifies, converts
model = timm.create_model("biformer_t", pretrained=True, pretrained_cfg_overlay=dict(file="biformer_tiny_best.pth"))
```

Once `zoo` is imported, a name like `model.tag` is a pretrained tag in timm. If a file can only be downloaded in a
browser, that call says from where, and where to put it.

UPerNet and Semantic FPN load whole, backbone and heads, from the file as downloaded. DiNAT's dilations for segmentation
are in no file, so you have to name them; for its large model the name stands for `segmentation_640`:

```python
import zoo
from zoo.heads import segmenter

model = segmenter("dinat_t", 150, dilations="segmentation")  # DiNAT, NAT, DaViT: UPerNet with its auxiliary head
model = segmenter("litv2_s", 150, head="semantic_fpn")
zoo.load_checkpoint(model, "litv2_s_fpn_r50_512x512_80k_ade20k.pth")  # strict about names and shapes
```

Mask R-CNN and RetinaNet load in the same way, with `zoo.heads.detector`, and DiNAT's with `dilations="detection"`.
`eval.py` builds what a file contains, and takes from the file's name what it does not contain: DiNAT or NAT, and
LITv2's windows:

```bash
python eval.py checkpoint=nat_mini_upernet.pth task=segment data=ade20k data.root=ADEChallengeData2016
python eval.py checkpoint=nat_mini_maskrcnn.pth task=detect data=coco data.root=coco
```

- **Figures** are the source's own, in percent, on the validation set of ImageNet-1k (with the row's evaluation), COCO,
  ADE20K or Cityscapes. *mIoU, multi-scale* is with several scales and horizontal flips.
- **params**, in millions, are counted here. **GFLOPs**, billions of multiply-adds for one image, are as printed by the
  source. For whole detectors and segmenters, both are the source's.
- **pixels** per side; of two numbers, of the short side and at most of the long side.
- **evaluation**: the fraction of the image's side that the centre crop keeps; *squash* resizes to a square instead.
  Interpolation is always bicubic. *½* marks a mean and standard deviation of 0.5 instead of ImageNet's.
- **licence** is that of the weights. *Not stated* means that no licence was granted. Non-commercial weights warn when
  they are loaded.
- **layout**: the zoo's name for the tensor names in a file. It was compared with names that the source wrote, or is
  marked *not verified*.
- Links were not opened for this table; ~~struck-out links~~ were reported dead.
"""


def render(releases: Iterable[Release], unreleased: Iterable[Unreleased] = ()) -> str:
    """The table as Markdown: families, in each its tasks, in each its sources; then what cannot be loaded."""
    releases, links = list(releases), {}
    families = {t: [r for r in releases if family(r.model) == key and not r.foreign] for key, t in FAMILIES.items()}
    families = {title: rows for title, rows in families.items() if rows}
    parts = {title: list(_family(rows, links)) for title, rows in families.items()}
    parts[NOT_OURS] = list(_foreign([r for r in releases if r.foreign], links))
    parts[UNRELEASED] = list(_unreleased(unreleased))
    contents = (f"- [{title}](#{title.lower().replace(' ', '-')}){_summary(families.get(title))}" for title in parts)
    sections = (line for title, lines in parts.items() for line in ("", f"## {title}", *lines))
    references = (f"[{label}]: {url}" for label, url in links.items())
    return "\n".join((HEADER, *contents, *sections, "", *references)) + "\n"


def family(model: str) -> str:
    """The key of `FAMILIES` that a model's name belongs to."""
    first = model.partition("_")[0]
    return SAME_FAMILY.get(first, first)


def _summary(rows: Sequence[Release] | None) -> str:
    """How many files of a family there are, by task."""
    if not rows:
        return ""
    counts = {name: sum(r.task == task for r in rows) for task, name in TASKS.items()}
    said = ", ".join(f"{count} {name.lower()}" for name, count in counts.items() if count)
    return f": {said}" + (" (non-commercial)" if all(r.noncommercial for r in rows) else "")


def _family(rows: Sequence[Release], links: dict[str, str]) -> Iterator[str]:
    for task, title in TASKS.items():
        if group := [r for r in rows if r.task == task]:
            yield from ("", f"### {title}")
            yield from _groups(group, links)


def _foreign(rows: Iterable[Release], links: dict[str, str]) -> Iterator[str]:
    yield from ("", "These files are listed so that nobody searches for them in vain.")
    yield from _groups(rows, links)


def _groups(rows: Iterable[Release], links: dict[str, str]) -> Iterator[str]:
    """A paragraph and a table for each source."""
    key = lambda r: (r.source, r.foreign, r.layout, r.verified, r.wrapper, r.code_licence)  # noqa: E731
    for _, group in groupby(rows, key):
        group = list(group)
        yield from ("", _about(group[0]), "")
        yield from _table(group, links)


def _about(r: Release) -> str:
    """What the rows of one source share."""
    facts = [f"code licence {r.code_licence or 'not stated'}"]
    if r.wrapper:
        facts.append(f"weights under `{r.wrapper}`")
    if r.layout:
        facts.append(f"layout `{r.layout}`" + ("" if r.verified else ", **not verified**"))
    facts += [r.seen] if r.seen else []
    source = r.source.replace("the ", "The ", 1) if r.source.startswith("the ") else r.source
    return f"**{source}** ({'; '.join(facts)})" + (f": {r.foreign}." if r.foreign else "")


def _table(rows: list[Release], links: dict[str, str]) -> Iterator[str]:
    notes = list(dict.fromkeys(r.note for r in rows if r.note))
    columns = {"model": [f"`{r.name}`" + (f" <sup>{notes.index(r.note) + 1}</sup>" if r.note else "") for r in rows]}
    columns |= _figures(rows)
    columns["pixels"] = [_pixels(r) for r in rows]
    columns["trained on"] = [r.data for r in rows]
    if any(r.task == "classification" for r in rows):
        columns["evaluation"] = [_evaluation(r) for r in rows]
    columns["licence"] = [_licence(r) for r in rows]
    columns["file"] = [_file(r, links) for r in rows]
    yield from _lines(columns)
    if notes:
        yield ""
        yield from (f"{number}. {note}" for number, note in enumerate(notes, 1))


def _unreleased(rows: Iterable[Unreleased]) -> Iterator[str]:
    yield from ("", "No file is known for these results.")
    rows = list(rows)
    for task, title in TASKS.items():
        group = [r for r in rows if r.task == task]
        columns = {"model": [f"`{r.model}`" for r in group], **_figures(group)}
        if any(r.img_size for r in group):
            columns["pixels"] = [f"{r.img_size or ''}" for r in group]
        columns |= {"trained on": [r.data for r in group], "figures from": [r.source for r in group]}
        yield from ("", f"### {title} without weights", "")
        yield from _lines(columns)


def _figures(rows: Sequence[Release | Unreleased]) -> dict[str, list[str]]:
    """The columns of methods, published figures and costs, as far as there are any."""
    columns = {"method": [r.method for r in rows]}
    columns |= {title: [_number(r.metrics.get(name), 1, 2) for r in rows] for name, title in METRICS.items()}
    columns["params"] = [_number(r.params, 0 if r.method else 1, 1) for r in rows]
    columns["GFLOPs"] = [_number(r.gflops, 0, 2) for r in rows]
    return {title: cells for title, cells in columns.items() if any(cells)}


def _lines(columns: dict[str, list[str]]) -> Iterator[str]:
    """Rows of Markdown, padded so that the source reads as well as the page."""
    widths = {title: max(3, len(title), *map(len, cells)) for title, cells in columns.items()}

    def line(cells: Iterable[str]) -> str:
        padded = (c.rjust(w) if t in NUMERIC else c.ljust(w) for c, (t, w) in zip(cells, widths.items(), strict=True))
        return "| " + " | ".join(padded) + " |"

    yield line(columns)
    yield "| " + " | ".join("-" * (w - 1) + ("-:"[t in NUMERIC]) for t, w in widths.items()) + " |"
    yield from map(line, zip(*columns.values(), strict=True))


def _number(value: float | None, least: int, most: int) -> str:
    """With between `least` and `most` digits after the point, as sources print theirs."""
    if value is None:
        return ""
    whole, _, digits = f"{value:.{most}f}".partition(".")
    digits = digits.rstrip("0").ljust(least, "0")
    return f"{whole}.{digits}" if digits else whole


def _pixels(r: Release) -> str:
    return "{}/{}".format(*r.test_size) if r.test_size else f"{r.img_size or ''}"


def _evaluation(r: Release) -> str:
    if r.crop_pct is None:
        return ""
    cut = "squash" if r.crop_mode == "squash" else f"{r.crop_pct:g}"
    return cut + ("" if r.stats == IMAGENET else ", ½")


def _licence(r: Release) -> str:
    return f"{r.licence or 'not stated'}" + (", **non-commercial**" if r.noncommercial else "")


def _file(r: Release, links: dict[str, str]) -> str:
    """Links to the file, its size and digest where they are known, its mirrors, and where it once was."""
    label = r.filename or r.hub_id or r.name
    out = [_by_hand(r, links) if r.by_hand else f"[{_label(label, r.url, links)}]"]
    out += [f"{r.size / 1e6:,.0f} MB"] if r.size else []
    out += [f"sha256 `{r.sha256[:8]}`"] if r.sha256 and r.sha256 not in label else []
    out += [_host(url, r.model, links) for url in r.mirrors]
    out += [f"~~{_host(url, r.model, links)}~~" for url in r.dead]
    return ", ".join(out)


def _by_hand(r: Release, links: dict[str, str]) -> str:
    return (f"`{r.filename}` " if r.filename else "") + f"browser only: {_host(r.url, r.model, links)}"


def _host(url: str, model: str, links: dict[str, str]) -> str:
    """A link that is called after its host, and in the source after its model."""
    host = urlsplit(url).netloc
    name = HOSTS.get(host, host)
    return f"[{name}][{_label(model, url, links)}]"


def _label(wanted: str, url: str, links: dict[str, str]) -> str:
    """The label of an address, which stands at the end of the page: the one that it has, or a new one."""
    for label, known in links.items():
        if known == url:
            return label
    label, number = wanted, 2
    while label in links:
        label, number = f"{wanted} {number}", number + 1
    links[label] = url
    return label
