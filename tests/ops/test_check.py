"""`python -m ops.check`: what it says of implementations within the error bound, and of one that is not."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import chain, repeat

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ops
from ops.check import command, machine, main
from ops.check.bound import ErrorBound, broken, eps_of, share
from ops.check.cases import Case, gradients, random
from ops.check.tables import BY_NAME
from ops.check.workers import DIED, LOST, workers
from ops.partition import FewKeys

channel = sys.modules["ops.channel_attention"]


def test_all_is_well(capsys, tmp_path):
    assert main(["--device", "cpu", "--cases", "channel_attention", "--json", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    assert "4 checks passed, 0 failed" in printed  # three dtypes, and that of pooled attention
    found = json.loads((tmp_path / "found.json").read_text())
    assert [finding["check"] for finding in found["findings"][1:]] == [
        "torch float32",
        "torch bfloat16",
        "torch float16",
    ]
    assert {"date", "device", "versions", "command"} < set(found)


def test_several_processes_find_the_same(capsys):
    arguments = ["--device", "cpu", "--cases", "channel_attention-", "--dtypes", "float32"]
    printed = []
    for jobs in "12":
        assert main([*arguments, "--jobs", jobs]) == 0
        printed.append(capsys.readouterr().out.splitlines()[1])
    assert printed[0] == printed[1] and "cases, at most" in printed[0]


def test_what_is_zero_is_measured_by_the_largest():
    zero = torch.zeros(2, dtype=torch.float64)
    assert (
        share(zero, zero.float(), zero.float() + 1e-7, largest=1.0)
        < 1
        < share(zero, zero.float(), zero.float() + 1e-6, 1.0)
    )


def test_a_gradient_of_few_elements_may_cancel():
    """As the sum of many terms, here rounded: by itself it would be too small a measure of their errors."""
    n = next(n for n in range(150, 2000) if random(n, seed=7).sum().abs() < 0.1)  # the probe
    rounding = 2**-22 * random(n, seed=7).sign() * (torch.arange(n) % 4 == 0)

    def call(x, b, impl):
        return x + b * (2 + rounding * (impl == "torch")).to(x)

    case = Case("sum", "cancels", lambda: {"x": random(n), "b": random(1)}, call)
    bound = ErrorBound(case, torch.float32)
    assert bound.sizes.keys() == {"b"} and abs(bound.sizes["b"] - 2 * n**0.5) < 1e-9
    answers = bound.truth, bound.reference("cpu"), gradients(case, bound.rounded, "torch")
    assert bound.shares("torch")["b"] < 1 < share(*(each[2] for each in answers))


def test_a_wrong_implementation_is_found(capsys, monkeypatch):
    right = channel.torch_attend
    monkeypatch.setattr(channel, "torch_attend", lambda q, k, v, scale: right(q, k, v, scale * 1.01))
    assert main(["--device", "cpu", "--cases", "channel_attention-small", "--dtypes", "float32"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed and "channel_attention-small: output:" in printed and "of the allowed error" in printed


def test_an_implementation_that_fails_is_found(capsys, monkeypatch):
    def fail(*_):
        raise MemoryError("no memory is left")

    monkeypatch.setattr(channel, "torch_attend", fail)
    assert main(["--device", "cpu", "--cases", "channel_attention-small", "--dtypes", "float32"]) == 1
    assert "channel_attention-small: MemoryError: no memory is left" in capsys.readouterr().out


def test_each_configuration_is_held_to_the_law():
    task = command.Task("channel_attention-small", "torch", "float32", "cpu", places=(0, 1, 2))
    first, second, third = command.shares_of(task)
    assert set(first) == {"output", "qkv"} and first == second == third
    finding = command.verdict(
        "triton float32", "channel_attention", {task: [first, second | {"qkv": 2.0}, "OSError: no"]}, 1
    )
    assert not finding.ok
    assert finding.found == (
        "channel_attention-small in configuration 2: qkv: 2.00 of the allowed error; "
        "channel_attention-small in configuration 3: OSError: no"
    )


@pytest.mark.parametrize("case", ["window_attention-widest", "neighborhood_attention-widest"])
def test_a_kernel_that_is_too_large_for_a_gpu_is_no_failure(case, monkeypatch):
    """Which is not there: no tensor has data, and the call never gets as far as a kernel."""

    class Bound:
        def __init__(self, case, dtype, device):
            self.case, self.dtype, self.device = case, dtype, device

        def shares(self, impl):
            given = self.case.make()
            with FakeTensorMode():
                fake = {name: torch.empty(t.shape, dtype=self.dtype, device=self.device) for name, t in given.items()}
                self.case.call(impl=impl, **fake)

    monkeypatch.setattr(command, "ErrorBound", Bound)
    monkeypatch.setattr("ops.dispatch.HAS_TRITON", True)
    monkeypatch.setattr("ops.dispatch._shared_memory", lambda device: 99)
    task = command.Task(case, "triton", "float32", "cuda")
    refused = command.shares_of(task)
    assert "a head of 128 channels in torch.float32 needs 161 KiB of shared memory" in refused
    finding = command.verdict("triton float32", "op", {task: refused, replace(task, case="b"): [{"q": 0.5}]}, 2)
    assert finding.ok and finding.found == f"1 of 2 cases, at most 0.50 of the allowed error; refused: {refused}"
    found = command.tried(lambda: Bound(BY_NAME[case], torch.float32, "cuda").shares("triton"), "op")
    assert found.ok and found.found == f"refused: {refused}"


def test_only_a_gpu_multiplies_in_tf32(capsys):
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--float32", "tf32x3"])
    assert "--float32 tf32x3: only a GPU multiplies so, --device cuda" in capsys.readouterr().err


def test_float32_is_multiplied_as_asked_in_all_configurations():
    args = command.parse(["--device", "cuda", "--cases", "channel_attention-small", "--float32", "tf32x3"])
    groups = command.tasks(args)
    (task,) = groups["triton float32", "channel_attention"]
    assert (task.places, task.float32) == ((0,), "tf32x3")
    (task,) = groups["triton float32 2-5", "channel_attention"]
    assert (task.places, task.float32) == ((1, 2, 3, 4), "tf32x3")
    args.float32 = "ieee"
    (task,) = command.tasks(args)["triton float32", "channel_attention"]
    assert (task.places, task.float32) == ((0,), "ieee")


def test_what_matters_most_is_checked_first():
    groups = command.tasks(command.parse(["--device", "cuda", "--cases", "channel_attention-small"]))
    first = [f"{impl} {dtype}" for impl in ("triton", "torch") for dtype in ("float32", "bfloat16", "float16")]
    assert [check for check, _ in groups] == [*first, "triton bfloat16 2-4", "triton float16 2-4"]


def test_no_check_is_started_when_time_is_over(capsys, tmp_path):
    arguments = ["--cases", "channel_attention-", "--dtypes", "float32", "--json", str(tmp_path / "found.json")]
    assert main([*arguments, "--minutes", "1e-9"]) == 0
    assert "not run: 2 of 2 checks, as --minutes 1e-09 were over" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["findings"] == []
    groups = command.tasks(command.parse(arguments))
    (found,) = command.verdicts(groups, chain([[{"output": 0.5}]], repeat(None)))
    assert found.found == "1 of 6 cases, at most 0.50 of the allowed error"


def work(what):
    """What a worker is asked for by the tests below."""
    if what == "die":
        os._exit(9)
    if what == "lose the GPU":
        importlib.import_module("ops.check.workers").context_lost = lambda: True
    return os.getpid()


def test_a_process_that_dies_or_loses_its_gpu_is_replaced():
    with workers(1, int) as run:
        first, same, died, last = run(work, ["answer", "lose the GPU", "die", "answer"], lambda what: f"{what}: {DIED}")
    assert first == same != last and died == "die: its process died: killed, perhaps for memory, or crashed"


def test_without_a_gpu_nothing_more_is_run(monkeypatch):
    """An error such as an illegal access makes every later call of the process fail too."""
    monkeypatch.setattr(command, "context_lost", lambda: True)
    assert command.shares_of(command.Task("channel_attention-small", "torch", "float32", "cpu", (0, 1))) == [LOST, LOST]
    found = command.tried(machine.same_bits, "channel_attention", None)
    assert (found.check, found.ok, found.found) == ("same_bits", False, LOST)


@pytest.mark.parametrize("check", [machine.far_apart, machine.large_map])
def test_a_check_that_a_gpu_lacks_the_memory_for_is_not_run(check, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**33, 2**33))
    found = command.tried(check, "several", "cuda")
    assert found.ok and found.found.startswith("not run: less free memory than")


def test_bits_are_compared_where_torch_must_be_deterministic_too(monkeypatch):
    answers = []

    def answer(*_):
        answers.append(float(torch.are_deterministic_algorithms_enabled() and len(answers)))
        return [torch.tensor(answers[-1])]

    monkeypatch.setattr(machine, "gradients", answer)
    with pytest.raises(machine.Failed, match="two runs differ under use_deterministic_algorithms"):
        machine.same_bits(BY_NAME["channel_attention-small"], "cpu")
    assert answers == [0, 0, 2, 3] and not torch.are_deterministic_algorithms_enabled()


def test_findings_are_on_disk_when_a_run_ends_early(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "verdict", stop)
    with pytest.raises(SystemExit, match="130"):
        main(["--cases", "attention-small", "--dtypes", "float32", "--json", str(tmp_path / "found.json")])
    (found,) = json.loads((tmp_path / "found.json").read_text())["findings"]
    assert found["check"] == "plain_attention" and found["ok"]


def test_kernels_are_interpreted_if_the_command_says_so():
    """Which is known after the package is imported, and without the checks of memory and graphs, which take long."""
    code = "import sys; from ops.check import command; command.machine = lambda *_: (); sys.exit(command.main())"
    arguments = ["--interpret", "--cases", "channel_attention-small", "--dtypes", "float32"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert child.returncode == 0 and "ok      triton float32" in child.stdout, child.stdout + child.stderr


def test_in_tf32_the_bound_is_that_of_its_bits(monkeypatch):
    """Libraries may multiply the small matrices of the reference exactly, where kernels use TF32."""
    monkeypatch.setattr("ops.check.bound.precision", lambda: "tf32")
    assert eps_of(torch.float32, "cuda") == 2**-10 and eps_of(torch.float32, "cpu") == 2**-23
    assert eps_of(torch.bfloat16, "cuda") == 2**-7
    one = torch.ones(3)
    given = one.double(), one, one + 2**-9
    assert share(*given, eps=2**-10) < 1 < share(*given)


def test_no_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds no GPU here"):
        main(["--device", "cuda"])


def test_shares_of_the_allowed_error():
    truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    eager = truth.float() + torch.tensor([0.0, 1e-3])
    assert share(truth, eager, truth.float()) == 0
    assert 0.9 < share(truth, eager, truth.float() + 2e-3) <= 1 < share(truth, eager, truth.float() + 3e-3)
    assert not share(truth, eager, torch.full_like(eager, float("nan"))) <= 1
    assert share(truth, eager, truth) == float("inf")  # another dtype
    exact = truth.float()  # then four roundings of the largest value are allowed
    assert share(truth, exact, exact + 4 * torch.finfo(torch.float32).eps * 2) == 1


def test_what_is_no_number_is_broken():
    assert broken({"output": 1.0, "q": 0.5}) == ""
    assert broken({"output": float("nan"), "q": 1.0}) == "output: nan of the allowed error"


@pytest.mark.parametrize("few", [0, 384])
def test_plain_attention_is_fused(few, fused_keys, monkeypatch):
    """On any CPU: with gradients 384 keys are the most for which one multiplies matrices instead."""
    monkeypatch.setattr("ops.partition.few_keys", lambda dtype: FewKeys(576, 576, few))
    assert "heads of 24, 32, 48, 64 and 96" in machine.plain_attention("cpu")
    assert len(fused_keys) == 5


def test_plain_attention_by_matmuls_is_found(monkeypatch):
    monkeypatch.setattr("ops.partition.few_keys", lambda dtype: FewKeys(0, 0, 2000))
    with pytest.raises(machine.Failed, match="24 channels, 1050 keys: PyTorch's fused attention was not called"):
        machine.plain_attention("cpu")


def test_plain_attention_that_is_not_fused_is_found(monkeypatch):
    monkeypatch.setattr(ops, "pooled_attention", lambda q, k, v, impl: q.new_zeros(()).requires_grad_().refuse())
    with pytest.raises(AttributeError, match="has no attribute 'refuse'"):
        machine.plain_attention("cpu")
    unfused = torch.nn.functional.scaled_dot_product_attention

    def with_a_mask(q, k, v, impl):
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
        mask = torch.zeros(q.shape[2], k.shape[2], requires_grad=True)  # whose gradient no fused kernel gives
        return unfused(q, k, v, mask)

    monkeypatch.setattr(ops, "pooled_attention", with_a_mask)
    with pytest.raises(machine.Failed, match="heads of 24 channels"):
        machine.plain_attention("cpu")


def test_cases_that_there_are_none_of():
    with pytest.raises(SystemExit, match="--cases windw: no case has this"):
        main(["--device", "cpu", "--cases", "windw"])
