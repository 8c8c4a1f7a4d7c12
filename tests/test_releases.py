"""The table of releases is whole, says what timm and torchvision say, and is found by every name that people have."""

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import timm
import torch
import torchvision

import golden
import zoo
from families import RECORDS, TIMM_MODELS
from zoo import fetch, inspect
from zoo.checkpoint import layouts_of
from zoo.costs import GFLOPS, PARAMETERS
from zoo.registry import class_of
from zoo.releases import RELEASES, UNRELEASED, candidates, find, preferred, render
from zoo.releases.render import FAMILIES, METRICS, TASKS, family
from zoo.table import parameters

LOADABLE = [r for r in RELEASES if r.loadable]
BROWSERS_ONLY = ("drive.google.com", "1drv.ms", "onedrive.com", "sharepoint.com", "console.cloud.google.com")
PERMISSIVE = {"apache-2.0", "mit", "bsd-3-clause"}


def is_page(url):
    """Whether an address is made for a browser, not for a program."""
    return urlsplit(url).netloc.endswith(BROWSERS_ONLY)


@pytest.mark.parametrize("release", RELEASES, ids=lambda r: f"{r.name}-{r.method or r.source}")
def test_rows(release):
    r = release
    assert r.model in zoo.variants() or r.foreign
    if r.tag:
        assert r.task == "classification" and r.layout and not r.foreign
        assert r.img_size and r.crop_pct and r.wrapper is not None
    assert r.task in (*TASKS, "features") and family(r.model) in FAMILIES and r.metrics.keys() <= METRICS.keys()
    assert all(0 < value < 100 for value in r.metrics.values())
    assert r.by_hand == is_page(r.url)
    assert all(url.startswith(("https://", "gs://")) for url in (r.url, *r.mirrors, *r.dead))
    assert r.licence is None or r.noncommercial or r.licence in PERMISSIVE
    assert r.params and (r.gflops or r.num_classes != 1000)
    assert r.method or r.task not in ("detection", "segmentation")
    if r.sha256:
        assert int(r.sha256, 16) and len(r.sha256) in (8, 64)
    if not r.foreign:
        assert r.layout in {layout.name for layout in layouts_of(class_of(r.model))}


def test_rows_are_told_apart():
    tags = [(r.model, r.tag) for r in LOADABLE]
    assert len(tags) == len(set(tags))
    files = [r.filename for r in RELEASES if r.filename]
    assert len(files) == len(set(files))
    places = [r.url for r in RELEASES if not r.by_hand]
    assert len(places) == len(set(places))


def test_digests_in_file_names_are_in_the_table():
    digests = {r.name: match[1] for r in RELEASES if (match := fetch.DIGEST.search(r.filename))}
    assert len(digests) == 15  # torchvision's, timm's of GC ViT and of its own models, mmpretrain's
    assert digests == {
        r.name: r.sha256 for r in RELEASES if r.name in digests and r.filename.endswith(f"{r.sha256}.pth")
    }


@pytest.mark.parametrize(("wrapper", "weights"), sorted({(r.wrapper, r.weights) for r in LOADABLE}))
def test_wrappers_are_opened(tmp_path, wrapper, weights):
    state = {"stem.conv1.weight": torch.zeros(2)}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "file.pth")
    assert list(zoo.read(tmp_path / "file.pth").entries) == [weights]


def test_noncommercial_weights_are_nvidias():
    assert {family(r.model) for r in RELEASES if r.noncommercial} == {"gcvit"}
    assert all(r.noncommercial for r in RELEASES if family(r.model) == "gcvit")


def verified():
    """(class, layout) of every layout that a list of names from its source fits: records, and timm's own models."""
    keys = [
        (model, [entry[0] for entry in golden.load(golden.FOLDER / f"{stem}.json")["entries"]])
        for stem, model in RECORDS.items()
    ]
    keys += [(ours, timm.create_model(name, device="meta").state_dict()) for name, ours in TIMM_MODELS.items()]
    for model, names in keys:
        for layout in layouts_of(class_of(model))[:-1]:
            if not layout.unknown(names):
                yield class_of(model).__name__, layout.name


def test_layouts_are_verified_or_marked():
    seen = set(verified())
    for r in RELEASES:
        if not r.foreign:
            assert r.verified == ((class_of(r.model).__name__, r.layout) in seen), r


def test_counted_parameters():
    assert {name: parameters(name) for name in zoo.variants()} == PARAMETERS


# timm's word for ours: the hub's name of a port says the rest
PORTS = [r for r in RELEASES if (r.hub_id or "").startswith("timm/")] + [r for r in LOADABLE if r.tag == "timm_in1k"]


@pytest.mark.parametrize("release", PORTS, ids=lambda r: r.name)
def test_evaluation_of_ports_is_timms(release):
    word = (release.hub_id or release.filename.replace("_224_nvidia", ".in1k")).removeprefix("timm/").partition("-")[0]
    cfg = timm.models.get_pretrained_cfg(word)
    assert release.hub_id in (cfg.hf_hub_id, None) and (release.hub_id or release.url == cfg.url)
    assert cfg.input_size == (3, release.img_size, release.img_size) and cfg.test_input_size is None
    assert cfg.num_classes == release.num_classes
    assert (cfg.crop_pct, cfg.crop_mode, cfg.interpolation) == (
        release.crop_pct,
        release.crop_mode,
        release.interpolation,
    )
    assert (cfg.mean, cfg.std) == release.stats


def test_what_torchvision_says():
    weights, release = torchvision.models.MaxVit_T_Weights.IMAGENET1K_V1, find("maxvit_t_tv.tv_in1k")
    given, figures = weights.transforms(), weights.meta["_metrics"]["ImageNet-1K"]
    assert weights.url == release.url and weights.meta["num_params"] == PARAMETERS["maxvit_t_tv"]
    assert {"top1": figures["acc@1"], "top5": figures["acc@5"]} == release.metrics
    assert given.crop_size == [release.img_size] and given.resize_size == [release.img_size / release.crop_pct]
    assert (tuple(given.mean), tuple(given.std)) == release.stats and given.interpolation.value == release.interpolation
    assert weights.meta["_ops"] == pytest.approx(GFLOPS["maxvit_t_tv"], abs=0.005)


def test_published_without_weights():
    for row in UNRELEASED:
        assert row.model in zoo.variants() or row.model in FAMILIES
        assert row.metrics and row.metrics.keys() <= METRICS.keys() and row.source and family(row.model) in FAMILIES


NAMES = {
    "maxvit_t_tv.tv_in1k": "maxvit_t_tv.tv_in1k",
    "maxvit_t_tv": "maxvit_t_tv.tv_in1k",
    "davit_t": "davit_t.timm_msft_in1k",
    "gcvit_t": "gcvit_t.nvidia_in1k",
    "dinat_l": "dinat_l.shilabs_in22k_ft_in1k",
    "litv2_b": "litv2_b.ziplab_in1k",
    "timm/davit_tiny.msft_in1k": "davit_t.timm_msft_in1k",
    "hf-hub:timm/maxvit_base_tf_384.in21k_ft_in1k": "maxvit_b_384.timm_tf_in21k_ft_in1k",
    "hf_hub:timm/davit_base.msft_in1k@main": "davit_b.timm_msft_in1k",
    "https://huggingface.co/timm/davit_small.msft_in1k": "davit_s.timm_msft_in1k",
    "https://huggingface.co/timm/davit_small.msft_in1k/tree/main": "davit_s.timm_msft_in1k",
    "shi-labs/dinat-mini-in1k-224": "dinat_m",
    "timm/maxvit_rmlp_pico_rw_256.sw_in1k": "maxvit_rmlp_pico_rw_256",
    # which one is not said, or there is none
    "nvidia/GCViT": None,
    "davit_l": None,
    "resnet50": None,
    "timm/resnet50.a1_in1k": None,
    "maxvit_t.tv_in1k": None,
    "": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_found_by_name(name):
    found = find(name)
    assert (found and found.name) == NAMES[name]


FILES = {
    "gcvit_1k_tiny.pth.tar": "gcvit_t.nvidia_in1k",
    "gcvit_1k_tiny.pth (1).tar": "gcvit_t.nvidia_in1k",
    "gcvit_1k_tiny.pth(2).tar": "gcvit_t.nvidia_in1k",
    "gcvit_1k_tiny2.pth.tar": "gcvit_t2.nvidia_in1k",
    "downloads/biformer_tiny_best.pth": "biformer_t.rayleizhu_in1k",
    "biformer_tiny_best - Copy (2).pth": "biformer_t.rayleizhu_in1k",
    "biformer_tiny_best copy.pth": "biformer_t.rayleizhu_in1k",
    "C:\\weights\\dinat_tiny_in1k_224.pth": "dinat_t.shilabs_in1k",
    "dinat_tiny_in1k_224.safetensors": "dinat_t.shilabs_in1k",
    "maxvit_t-bc5ab103.pth": "maxvit_t_tv.tv_in1k",
    "maxvit_t-bc5ab103 (1).pth": "maxvit_t_tv.tv_in1k",
    "maxvit_t-bc5ab103-2.pth": "maxvit_t_tv.tv_in1k",
    "MAXVIT_T-BC5AB103.PTH.1": "maxvit_t_tv.tv_in1k",
    "dinat_s_base_1k_224.pth": "dinats_b.shilabs_in1k",  # as one of its pages says; the address has in1k
    "alpha_0.2.pth": "litv2_s_a02.ziplab_in1k",
    "alpha_0.pth": "litv2_s_a00.ziplab_in1k",
    "stvit-small-384.pth": "stvit_s.hhb072_in1k_384",
    "maskrcnn_dinat_tiny.pth": "dinat_t",
    "https://huggingface.co/nvidia/GCViT/resolve/main/gcvit_21k_large_384.pth.tar?download=true": (
        "gcvit_l_384.nvidia_in21k_ft_in1k"
    ),
    "hub/models--timm--davit_tiny.msft_in1k/snapshots/0a1b/model.safetensors": "davit_t.timm_msft_in1k",
    "https://huggingface.co/timm/davit_tiny.msft_in1k/resolve/main/model.safetensors": "davit_t.timm_msft_in1k",
    "litv2_s.ckpt": "litv2_s.ziplab_in1k",
    "litv2_s (1).ckpt": "litv2_s.ziplab_in1k",
    "model.safetensors": None,
    "best.pth": None,
    "gcvit_1k_tiny3.pth.tar": None,
}


@pytest.mark.parametrize("file", FILES)
def test_found_by_file(file):
    found = find(filename=file)
    assert (found and found.name) == FILES[file]


def test_every_row_is_found_by_its_own_names():
    for r in RELEASES:
        if r.filename:
            assert find(filename=r.filename) is r
        if r.tag:
            assert find(r.name) is r and find(r.model, tag=r.tag) is r
        if r.hub_id and r.hub_id != "nvidia/GCViT":
            assert find(r.hub_id) is r


def test_a_model_decides_between_several():
    assert find("nvidia/GCViT", filename="gcvit_1k_base.pth.tar").name == "gcvit_b.nvidia_in1k"
    assert find("maxvit_t", filename="maxvit_t-bc5ab103.pth") is None
    assert find() is None and find(tag="nvidia_in1k") is None


def test_candidates():
    assert [r.tag for r in candidates("gcvit_t")] == ["nvidia_in1k", "timm_in1k"]
    assert [r.tag for r in candidates("gcvit_t", "timm")] == ["timm_in1k"]
    assert [r.name for r in candidates("dinat_t", "transformers")] == ["dinat_t"]
    assert [r.method for r in candidates("davit_t", "official", task="segmentation")] == ["UPerNet 160k"]
    assert candidates("davit_l") == [] and candidates("davit_t", "torchvision") == []
    (row,) = [r for r in candidates("dinat_t", task="detection") if r.method == "Mask R-CNN 3x"]
    assert (row.metrics, row.benchmark) == ({"box_ap": 48.6, "mask_ap": 43.5}, "COCO")


def test_a_file_that_is_not_ours_to_load_says_why():
    file = Path("mask2former_dinat_large_ade20k_semantic.pth")
    found = inspect.release(file, {}, ["dinat_l"], "")
    assert found.startswith("dinat_l (SHI-Labs: detectron2's Mask2Former; ") and "dilations='mask2former'" in found
    assert inspect.release(Path("nat_tiny.pth"), {}, ["nat_t"], "") == "nat_t.shilabs_in1k (SHI-Labs)"


def test_preference():
    """A permissive licence goes before one that is not stated, and that before a non-commercial one."""
    nvidia, torchvisions, timms = (find(name) for name in ("gcvit_t", "maxvit_t_tv", "davit_t"))
    assert preferred([nvidia, torchvisions, timms]) == [timms, torchvisions, nvidia]
    assert preferred([find("davit_t.dingmyu_in1k"), nvidia])[0] is nvidia  # what is loaded by name goes first


def test_links_of_the_page():
    """Every reference has one address, every address of the table stands on the page, and names its row's host."""
    page = render(RELEASES, UNRELEASED)
    defined = re.findall(r"^\[([^\]]+)\]: (\S+)$", page, re.M)
    labels, addresses = zip(*defined, strict=True)
    assert len(set(labels)) == len(labels) and len(set(addresses)) == len(addresses)
    text = page.partition("## MaxViT")[2].partition("\n[")[0]
    used = re.findall(r"\[[^\]\n]+\]\[([^\]\n]+)\]", text) + re.findall(r"(?<!\])\[([^\]\n]+)\](?![\[(])", text)
    assert set(used) == set(labels)
    assert set(addresses) == {url for r in RELEASES for url in (r.url, *r.mirrors, *r.dead)}


def test_every_row_is_on_the_page_once():
    rows = [line for line in render(RELEASES, UNRELEASED).splitlines() if line.startswith("| `")]
    assert len(rows) == len(RELEASES) + len(UNRELEASED)
    for r in LOADABLE:
        (row,) = [row for row in rows if f"`{r.name}`" in row]
        assert ("**non-commercial**" in row) == r.noncommercial and row.count("~~") == 2 * len(r.dead)
        cells = [cell.strip() for cell in row.split("|")]
        assert str(r.img_size) in cells and r.data in cells
        assert r.top1 is None or float(cells[2]) == pytest.approx(r.top1, abs=0.005)
    for r in UNRELEASED:
        (row, *_) = [row for row in rows if f"`{r.model}`" in row and r.source in row and r.method in row]
        assert r.img_size is None or str(r.img_size) in [cell.strip() for cell in row.split("|")]


def pretrained():
    return [name for name in timm.list_pretrained() if name.partition(".")[0] in zoo.variants()]


def test_timm_lists_what_can_be_loaded_by_name():
    assert sorted(pretrained()) == sorted(r.name for r in LOADABLE if not r.by_hand)


@pytest.mark.parametrize("name", zoo.variants())
def test_default_tag(name):
    """timm's default is ours, made for the variant's own size; a model without releases has none."""
    cfg, release = timm.models.get_pretrained_cfg(name), find(name)
    assert (cfg.tag or None) == (release.tag if release else None)
    assert cfg.input_size[1] == zoo.variants()[name]["img_size"]
    if release:
        assert cfg.license == release.licence and bool(cfg.has_weights) == (not release.by_hand)
        assert release.num_classes == 1000 or not [r for r in candidates(name) if r.tag and r.num_classes == 1000]
