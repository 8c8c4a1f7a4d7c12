"""The published code's answers: logits and input gradients in float64, through timm's pretrained path."""

import pytest
import torch

import golden
import zoo
from builds import small
from families import ALIKE, PUBLISHED_FLOAT32, RECORDS, SLOW_RECORDS
from golden_cases import answer, build, is_dense, pretrained, recorded
from rankings import given, rankings, ranks


# of the whole module, so that a file is made once for the tests of its record, which then follow one another
@pytest.fixture(
    scope="module", params=[pytest.param(r, marks=pytest.mark.slow) if r in SLOW_RECORDS else r for r in RECORDS]
)
def record(request):
    return recorded(request.param)


@pytest.fixture(scope="module")
def released(record, tmp_path_factory):
    """The record's checkpoint as a file in the published layout."""
    path = tmp_path_factory.mktemp("released") / "released.pth"
    torch.save({"model": golden.official_state_dict(record)}, path)
    yield path
    path.unlink()


def test_every_record_is_used():
    assert {path.stem for path in golden.FOLDER.glob("*.json")} == set(RECORDS)


def test_recording(tmp_path):
    """A record holds what a model answers, and a new one filled by its names answers the same."""
    golden.record(small("dinat_b"), tmp_path / "dinat_b.json", name="dinat_b", source="here@now", size=(64, 96))
    record = golden.load(tmp_path / "dinat_b.json")
    model = small("dinat_b").double().eval()
    model.load_state_dict(golden.official_state_dict(record))
    x = golden.image(*record["size"]).requires_grad_(True)
    logits = model(x)
    (logits * golden.probe(logits.shape)).sum().backward()
    assert golden.relative_error(logits.detach(), golden.unpack(record["logits"])) == 0
    gradient = golden.samples(x.grad, record["input_grad_positions"])
    assert golden.relative_error(gradient, golden.unpack(record["input_grad_samples"])) == 0
    assert {name: float(p.grad.norm()) for name, p in model.named_parameters()} == record["grad_norms"]
    assert record["size"] == [64, 96] and record["unused_parameters"] == []
    assert record["parameters"] == sum(p.numel() for p in model.parameters())


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
