"""What a run does on a GPU, as far as a machine without one can tell."""

import copy
import os
import platform
import subprocess

import pytest
import torch
from torch import nn
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

from children import SMALL, lines, lost_after, note_overrides, poisoned, train_here
from flags import flags_restored
from recipes import config, data, hardware, provenance, train
from recipes.checkpoint import read
from recipes.config import ConfigError
from recipes.data import build
from recipes.tasks import classify


@pytest.fixture
def gpus(monkeypatch) -> list[torch.device]:
    """Two GPUs, of which torch has chosen the second; the list is of those that are chosen from then on."""
    chosen: list[torch.device] = []

    def choose(device: torch.device) -> None:
        if device.index is None:  # as torch.cuda.set_device does
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
        chosen.append(device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", choose)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that what a run sets is undone
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with flags_restored():
        yield chosen


@pytest.mark.parametrize(("asked", "number"), [("auto", 1), ("cuda", 1), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_is_chosen_by_its_number(gpus, asked, number):
    machine = hardware.setup(config.compose([f"hardware.device={asked}"]))
    assert gpus == [machine.device] == [torch.device("cuda", number)]


def test_a_gpu_that_is_not_there(gpus):
    with pytest.raises(ConfigError, match=r"hardware\.device=cuda:2 is not available here, only cuda:0 to cuda:1"):
        hardware.setup(config.compose(["hardware.device=cuda:2"]))


@pytest.mark.parametrize("asked", ["cpu:x", "cuda:x", "cuda:-1"])
def test_what_is_no_device(gpus, asked):
    with pytest.raises(ConfigError, match=f"^hardware.device={asked} is no device: expected auto, cpu, cuda, cuda:0,"):
        hardware.setup(config.compose([f"hardware.device={asked}"]))


OUTPUT = "a.cpp:1: warning: #warning\n a.cpp:3:10: fatal error: Python.h: No such file or directory\n"
FULL = "error: when writing output: No space left on device"
COMPILER, ROOM = "install a compiler that works here, such as g++,", "set TMPDIR and TORCHINDUCTOR_CACHE_DIR to folders"


@pytest.mark.parametrize(
    ("cause", "said", "mend"),
    [
        (InvalidCxxCompiler(), "No working C++ compiler found", COMPILER),
        (RuntimeError("Failed to find C compiler. Please specify"), "Failed to find C compiler", COMPILER),
        (CppCompileError(["g++"], OUTPUT), "a.cpp:3:10: fatal error: Python.h: No such file or directory", COMPILER),
        (CppCompileError(["g++"], FULL), FULL, ROOM),
        (CppCompileError(["g++"], ""), "C++ compile error", COMPILER),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device", ROOM),
    ],
)
def test_why_a_machine_cannot_compile(cause, said, mend):
    first, second = hardware.why_not_compiled(InductorError(cause, None)).splitlines()
    assert first.startswith(f"torch.compile could not compile: {said}")
    assert second.startswith(mend) and second.endswith("or give hardware.compile=false")
    assert hardware.why_not_compiled(cause) is None


def test_an_error_of_the_compiler_itself_is_not_the_machines():
    assert hardware.why_not_compiled(InductorError(AssertionError("a fault"), None)) is None


def test_repeatable_arithmetic_is_for_one_run(gpus):
    hardware.setup(config.compose(["hardware=gpu", "hardware.deterministic=true"]))
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # without it torch refuses matrix products
    hardware.setup(config.compose(["hardware=gpu"]))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("before", [False, True])
def test_a_run_goes_on_with_scaled_losses_or_without(tmp_path, monkeypatch, before):
    """Begun in bfloat16 and resumed in float16, or the other way round."""
    options = [*SMALL, "train.steps=2", "train.save_every=1", "sched.warmup=0"]
    scaled(monkeypatch, before)
    train_here(tmp_path, *options, "name=run")
    cut = lost_after(1, tmp_path / "run", tmp_path / "cut")
    note_overrides(cut, options)
    scaled(monkeypatch, not before)
    train_here(tmp_path, f"resume={cut}")
    steps = [read(path).state for path in sorted((cut / "checkpoints").glob("step-*"))]
    assert [bool(state["scaler"]) for state in steps] == [before, not before]


def test_losses_are_scaled_in_float16_alone():
    """On CPUs too: the gradients of a loss that 64 micro-batches share are too small for it."""
    for amp, enabled in (("float16", True), ("bfloat16", False), ("null", False)):
        machine = hardware.setup(config.compose(["hardware=cpu", f"hardware.amp={amp}"]))
        assert machine.scaler().is_enabled() == enabled, amp
    machine = hardware.setup(config.compose(["hardware=cpu", "hardware.amp=float16"]))
    torch.manual_seed(0)
    model, images, grads = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1000)), torch.randn(8, 64), []
    for scaler in (torch.amp.GradScaler("cpu", enabled=False), machine.scaler()):
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.cross_entropy(model(images).float(), torch.arange(8)) / 4096
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grads.append(model[0].weight.grad.clone())
    exact = torch.autograd.grad(nn.functional.cross_entropy(model(images), torch.arange(8)) / 4096, model[0].weight)[0]
    lost, kept = ((grad - exact).norm() / exact.norm() for grad in grads)
    assert kept < 0.01 < 0.05 < lost


def scaled(monkeypatch, enabled: bool) -> None:
    """Let losses be scaled, as in float16, or not."""
    monkeypatch.setattr(hardware.Hardware, "scaler", lambda machine: torch.amp.GradScaler("cpu", enabled=enabled))


def steep(loss, steps):
    """The same loss, with a gradient that is no number in these steps."""

    def function(self, model, images, targets, *, draw):
        weight = next(model.parameters())
        bend = (0 * weight).abs().sum().sqrt() if draw in steps else 0
        return loss(self, model, images, targets, draw=draw) + bend

    return function


SCALED = [*SMALL, "data.batch_size=8", "train.steps=36", "train.save_every=100"]


def test_overflows_are_passed_over_and_counted(tmp_path, monkeypatch):
    scaled(monkeypatch, True)
    monkeypatch.setattr(classify.Task, "loss", steep(classify.Task.loss, {0, 1, 2, 7}))
    train_here(tmp_path, *SCALED, "train.steps=10", "name=run")
    found = lines(tmp_path / "run")
    assert [line["step"] for line in found if line.get("skipped")] == [1, 2, 3, 8]
    (state,) = (read(path).state for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert state["scaler"]["scale"] == 2.0 ** (16 - 4) and state["skipped"] == state["overflowed"] == 0


def test_a_resumed_run_keeps_its_loss_scale_and_counts(tmp_path, monkeypatch):
    """In the middle of a line of the log, after three steps that changed nothing."""
    scaled(monkeypatch, True)
    monkeypatch.setattr(classify.Task, "loss", steep(classify.Task.loss, {0, 1, 2}))
    options = [*SCALED, "train.steps=4", "train.save_every=3", "train.log_every=4", "train.ema=0.9"]
    train_here(tmp_path, *options, "name=run")
    note_overrides(tmp_path / "run", options)
    again = lost_after(3, tmp_path / "run", tmp_path / "again")
    train_here(tmp_path, f"resume={again}")
    one, other = (read(run / "checkpoints" / "step-00000004").state for run in (tmp_path / "run", again))
    assert one["scaler"] == other["scaler"] and one["scaler"]["scale"] == 2.0 ** (16 - 3)
    assert one["averages"] == other["averages"] == 1
    (line,), (same,) = ([line for line in lines(run) if "lr" in line] for run in (tmp_path / "run", again))
    assert line["skipped"] == same["skipped"] == 3 and line["loss"] == same["loss"]


def test_what_no_scaling_explains_stops_the_run(tmp_path, monkeypatch):
    scaled(monkeypatch, True)
    monkeypatch.setattr(classify.Task, "loss", steep(classify.Task.loss, range(99)))
    with pytest.raises(train.NotFinite, match=r"(?s)at step 32 .*norm of its gradient nan, after 32 steps that were"):
        train_here(tmp_path, *SCALED, "name=run")


def test_a_gradient_alone_that_is_not_finite_may_be_its_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(classify.Task, "loss", steep(classify.Task.loss, {0}))
    said = r"clip_grad=1; as the loss is finite, its gradient may have overflowed in bfloat16: try hardware\.amp=null\n"
    with pytest.raises(train.NotFinite, match=said):
        train_here(tmp_path, *SCALED, "hardware.amp=bfloat16", "name=mixed")
    with pytest.raises(train.NotFinite, match=r"clip_grad=1\n"):
        train_here(tmp_path, *SCALED, "name=exact")


def test_overflows_are_no_steps_that_skip_nonfinite_counts(tmp_path, monkeypatch):
    """Three of them, before and between a loss that is no number at steps 2 and 4, of which one may be passed over."""
    scaled(monkeypatch, True)
    monkeypatch.setattr(classify.Task, "loss", steep(poisoned(classify.Task.loss, {2, 4}), {0, 1, 3}))
    options = [*SCALED, "train.skip_nonfinite=1", "name=run", f"out={tmp_path}"]
    said = r"at step 4 .* the loss is nan .*, after 4 steps that were skipped \(3 because float16 overflowed\); "
    with pytest.raises(train.NotFinite, match=said):
        train_here(tmp_path, *options)
    (state,) = (read(path).state for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert (state["step"], state["skipped"], state["overflowed"]) == (4, 4, 3)
    note_overrides(tmp_path / "run", options)
    with pytest.raises(train.NotFinite, match=said):  # it counts on from there, and stops as before
        train_here(tmp_path, f"resume={tmp_path / 'run'}")


@pytest.mark.parametrize(
    ("asked", "named"), [("cpu", platform.machine()), ("auto", "GPU None"), ("cuda:1", "GPU cuda:1")]
)
def test_the_device_that_is_noted_is_the_one_in_use(tmp_path, gpus, monkeypatch, asked, named):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    provenance.note_session(tmp_path, [], 0, asked)
    assert provenance.sessions(tmp_path)[-1]["device"] == named


def test_the_commit_that_is_noted_is_of_this_code(tmp_path):
    """Not that of a repository which an installed copy happens to lie in."""
    installed = tmp_path / ".venv" / "recipes"
    installed.mkdir(parents=True)
    (installed / "__init__.py").touch()
    for words in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "a"],
    ):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    assert provenance._git(installed) is None
    subprocess.run(["git", "add", "-f", "."], cwd=tmp_path, check=True)
    assert provenance._git(installed)["changed"] == ["A  .venv/recipes/__init__.py"]


@pytest.mark.parametrize("place", ["recipes", "lib/recipes"])
def test_the_commit_of_a_checkout_of_somebody_else(tmp_path, monkeypatch, capsys, place):
    """As in a container: git is asked to trust what this code runs from, but no other repository around it."""
    for name, value in (("GLOBAL", os.devnull), ("NOSYSTEM", "1")):
        monkeypatch.setenv(f"GIT_CONFIG_{name}", value)
    code = tmp_path / place
    code.mkdir(parents=True)
    (code / "__init__.py").touch()
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    known = provenance._git(code)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    found, said = provenance._git(code), " ".join(capsys.readouterr().out.split())
    if place == "recipes":
        assert found == known and known["changed"] == [] and not said
    else:
        assert found is None and known is not None
        assert said.startswith("the commit of this code is not recorded: git refuses to read it: fatal: ")


@pytest.mark.parametrize("used", [False, True])
def test_memory_is_pinned_for_a_gpu_that_is_used(gpus, monkeypatch, used):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    source = build(config.compose(SMALL)).train
    loader = data.loader._loader(source, 0)
    assert loader.pin_memory == used


def test_layer_norms_learn_in_float32():
    """A CPU's kernel sums what the bias learns in half precision, in which 256 + 1 is 256."""
    norm, images = nn.LayerNorm(8), torch.randn(20_000, 8).bfloat16()
    machine = hardware.Hardware(torch.device("cpu"), torch.bfloat16, torch.preserve_format, compile=False)
    learner = machine.wrapped(norm)
    with machine.autocast():
        learner(images).sum().backward()
    assert torch.equal(norm.bias.grad, torch.full((8,), 20_000.0))
    exact = copy.deepcopy(norm).double()
    exact.zero_grad()
    exact(images.double()).sum().backward()
    torch.testing.assert_close(norm.weight.grad.double(), exact.weight.grad, rtol=1e-4, atol=1e-2)
    norm.eval()
    with machine.autocast():
        assert learner(images).dtype == torch.bfloat16  # as where the run is evaluated later


class Chain(nn.Module):
    """Two convolutions of (B, H, W, C) maps with a norm between, as blocks have them: the second keeps a view."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.conv = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, images):
        x = self.norm(self.stem(images).permute(0, 2, 3, 1))
        return x + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def test_compiled_training_on_images_of_many_sizes():
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Chain()
    machine = hardware.Hardware(torch.device("cpu"), None, torch.preserve_format, compile=True)
    compiled = machine.wrapped(model)
    for size in ((32, 32), (48, 36)):
        images = torch.randn(2, 3, *size)
        found, expected = (
            torch.autograd.grad(call(images).square().sum(), model.parameters()) for call in (compiled, model)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_gpu_normalises_what_it_is_sent():
    """As bytes a batch has a fourth of the way; the bits are those of a processor."""
    source = build(config.compose(SMALL)).val
    batch = torch.stack([source.normalize.planes(source.image(index)) for index in range(3)])
    whole = source.normalize.finish(batch)
    assert batch.dtype == torch.uint8 and torch.equal(source.normalize._on_device(batch), whole)
    assert torch.equal(source.normalize._on_device(batch[0]), whole[0])
    machine = hardware.setup(config.compose([*SMALL, "hardware.channels_last=true"]))
    images, _ = machine.send(batch, None, source.finish)
    assert torch.equal(images, whole) and images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
def test_training_is_the_same_from_bytes(tmp_path, monkeypatch):
    plain = [*SMALL, "augment.re_prob=0", "train.steps=2"]  # what is erased is noise between normalised values
    train_here(tmp_path, *plain, "name=floats")
    kinds, send = [], hardware.Hardware.send
    monkeypatch.setattr(data.loader, "_on_gpu", lambda: True)
    monkeypatch.setattr(
        hardware.Hardware, "send", lambda self, images, *rest: kinds.append(images.dtype) or send(self, images, *rest)
    )
    train_here(tmp_path, *plain, "name=bytes")
    assert set(kinds) == {torch.uint8}
    floats, from_bytes = ([line.get("loss") for line in lines(tmp_path / name)] for name in ("floats", "bytes"))
    assert floats == from_bytes and floats[0] is not None
