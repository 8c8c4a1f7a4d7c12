"""The published code's answers: logits and input gradients in float64, through timm's pretrained path.

Records of dense-prediction backbones hold, for logits, the means over space of their four normed features.
"""

from pathlib import Path

import pytest
import timm
import torch

import golden
import zoo
from families import ALIKE, BUILT_WITH, PUBLISHED_FLOAT32, RECORDS, SLOW_RECORDS
from rankings import given, rankings, ranks

FOLDER = Path(__file__).parent / "golden"


# of the whole module, so that a file is made once for the tests of its record, which then follow one another
@pytest.fixture(
    scope="module", params=[pytest.param(r, marks=pytest.mark.slow) if r in SLOW_RECORDS else r for r in RECORDS]
)
def record(request):
    return golden.load(FOLDER / f"{request.param}.json") | {"file": request.param, "model": RECORDS[request.param]}


def is_dense(stem):
    return stem.startswith(("seg_", "det_"))


def build(record, **kwargs):
    kwargs |= BUILT_WITH.get(record["file"], {})
    if is_dense(record["file"]):
        kwargs |= {"features_only": True, "feature_norms": True}
    return timm.create_model(record["model"], **kwargs).eval()


def pretrained(record, path, **kwargs):
    return build(record, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs)


def answer(model, record, x):
    out = model(x)
    return torch.cat([feature.mean((2, 3)) for feature in out], 1) if is_dense(record["file"]) else out


@pytest.fixture(scope="module")
def released(record, tmp_path_factory):
    """The record's checkpoint as a file in the published layout."""
    path = tmp_path_factory.mktemp("released") / "released.pth"
    torch.save({"model": golden.official_state_dict(record)}, path)
    yield path
    path.unlink()


def test_every_record_is_used():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(RECORDS)


def test_parameters(record):
    model = build(record, device="meta")
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]


def test_float64(record, released):
    """The output, the gradient of the input, and the norms of every parameter's gradient, in the published names."""
    model = pretrained(record, released, dtype=torch.float64)
    x = golden.image(*record["size"]).requires_grad_(True)
    logits = answer(model, record, x)
    (logits * golden.probe(logits.shape)).sum().backward()
    gradient = golden.samples(x.grad, record["input_grad_positions"])
    assert golden.relative_error(logits.detach(), golden.unpack(record["logits"])) < 1e-9
    assert golden.relative_error(gradient, golden.unpack(record["input_grad_samples"])) < 1e-8
    norms = parameter_gradients(model.model if is_dense(record["file"]) else model, record)
    assert norms.keys() == record["grad_norms"].keys()
    for name, norm in record["grad_norms"].items():
        assert norms[name] == pytest.approx(norm, rel=1e-7, abs=1e-9 * max(record["grad_norms"].values())), name


def parameter_gradients(model, record):
    keys = [key for key, *_ in record["entries"]]
    layout = next(layout for layout in zoo.checkpoint.layouts_of(type(model)) if not layout.unknown(keys))
    return {layout.theirs(name): float(p.grad.norm()) for name, p in model.named_parameters()}


def test_float32(record, released):
    """Of models that rank, by the rankings of the float64 run."""
    model, x = pretrained(record, released), golden.image(*record["size"])
    exact = pretrained(record, released, dtype=torch.float64) if ranks(model) else model
    with torch.no_grad(), given(model, rankings(exact, x)):
        logits = answer(model, record, x.float())
    assert golden.relative_error(logits, golden.unpack(record["logits"])) < 10 * PUBLISHED_FLOAT32[record["file"]]


def test_recognised_without_a_name(record, released):
    checkpoint = zoo.read(released)
    found = zoo.identify(checkpoint.entries["raw"])
    # variants may be one and the same model: LITv2's ablation repeats its best alpha
    key = zoo.registry.class_of(record["model"]), zoo.variants()[record["model"]]
    same = {name for name, args in zoo.variants().items() if (zoo.registry.class_of(name), args) == key}
    alike = next((group for group in ALIKE if record["model"] in group), set())
    assert {name for name, _ in found} == same | alike
