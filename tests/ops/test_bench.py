"""`python -m ops.bench`: it writes what it says, holds peers to the op, survives their failures, and stops in time."""

import contextlib
import importlib
import json
import math
import shlex
from pathlib import Path

import pytest
import torch

from ops import bench, launching, precision
from ops.bench.cases import BASE, MODELS, SMALL, Call, call, calls, flops, merged
from ops.bench.contest import Contest, Peer
from ops.bench.contests import CONTESTS
from ops.bench.jobs import asked
from ops.bench.measure import MODES, Machine, Row, disagreement, held, measure, traffic
from ops.bench.report import circumstances, render
from ops.recording import recording

prepare = importlib.import_module("ops.bench.prepare")  # a function of the package has its name
timing = importlib.import_module("ops.bench.measure")
PAGES = Path(__file__).parents[2] / "benchmarks"
PUBLISHED = [path for name in ("ops_*.json", "pooled_attention_*.json") for path in PAGES.glob(name)]
QUICK = ["products", "sdpa", "timm", "unfold", "gathered", "gather", "softmax"]  # those that are not compiled


def row(call, mode="forward", batch=2):
    return Row(call.op, str(call), ["model 1"], "224", batch, "float32", mode)


def measured(call, contest, mode="forward", only=QUICK):
    options = {"repeats": 1, "device": "cpu", "dtype": torch.float32, "asked": only.__contains__}
    return measure(call, contest, row(call, mode), **options)


@pytest.fixture
def small():
    """A call whose peers all run at once."""
    return call("pooled_attention", (6, 5), 2, 8, keys=11)


def test_writes_its_table(tmp_path, capsys):
    arguments = [
        "window_attention",
        "--models",
        "maxvit_t",
        "--cases",
        "attention 7 ",
        "--batch",
        "2",
        "--repeats",
        "1",
    ]
    arguments += ["--peers", "timm", "sdpa", "--out", str(tmp_path), "--json", str(tmp_path / "numbers.json")]
    bench.main(arguments)
    text, printed = (tmp_path / "window_attention_cpu.md").read_text(), capsys.readouterr().out
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers == json.loads((tmp_path / "window_attention_cpu.json").read_text())
    assert (tmp_path / "window_attention_cpu.png").read_bytes().startswith(b"\x89PNG")
    assert [(r["call"], r["mode"]) for r in numbers["rows"]] == [
        (f"7 16x32 window 7 {kind}", mode) for kind in ("bias", "grid bias") for mode in MODES
    ]
    for r in numbers["rows"]:
        assert set(r["ms"]) == {"ours", "timm", "sdpa"} and min(r["ms"].values()) > 0 and not r["missing"]
        assert set(r["mib"]) == {"ours", "timm", "sdpa"} and min(r["mib"].values()) > 0
        assert f"{r['ms']['ours'] / min(r['ms']['timm'], r['ms']['sdpa']):.2f} |" in text
        assert f"{r['op']} {r['call']} 224 float32 {r['mode']}: ours" in printed
    for fact in ("date", "device", "versions", "command", "settings"):
        assert numbers[fact] and f"- {fact}: {numbers[fact]}" in text
    assert "2 of 2 calls" in numbers["settings"]


def test_a_command_can_be_pasted(monkeypatch):
    arguments = ["pooled_attention", "--peers", "torch", "torch compiled", "--batch", "1"]
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    words = shlex.split(circumstances("cpu", "ops.bench")["command"])
    assert words == ["python", "-m", "ops.bench", *arguments]
    assert bench.parse(words[3:]).peers == ["torch", "torch compiled"]


@pytest.mark.parametrize("path", sorted(PUBLISHED), ids=lambda path: path.stem)
def test_published_commands_ask_for_the_peers_that_were_timed(path):
    found = json.loads(path.read_text())
    command = found["command"]
    assert f"- command: {command}\n" in path.with_suffix(".md").read_text()
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "ops.bench"]
    only, timed = bench.parse(words[3:]).peers, {name for row in found["rows"] for name in row["ms"]} - {"ours"}
    assert only is None or timed <= set(only)


# the smallest call of each op and kind, at a size whose windows reach over the border
FEW = [
    call("window_attention", (8, 6), 2, 8, window=(3, 3), grid=False, bias=False, attend_padding=False, shared=False),
    call("window_attention", (8, 6), 1, 32, window=(7, 7), grid=True, bias=True, attend_padding=False, shared=False),
    call("window_attention", (14, 7), 1, 32, window=(7, 7), grid=True, bias=True, attend_padding=False, shared=False),
    call("window_attention", (8, 6), 2, 8, window=(4, 4), grid=False, bias=True, attend_padding=True, shared=False),
    call("window_attention", (8, 6), 2, 8, window=(4, 4), grid=False, bias=True, attend_padding=True, shared=True),
    call("window_attention", (9, 6), 2, 8, window=(7, 7), grid=False, bias=False, attend_padding=True, shared=False),
    call("neighborhood_attention", (9, 8), 2, 8, window=(3, 3), dilation=(2, 2)),
    call("neighborhood_attention", (4, 9), 2, 8, window=(3, 3), dilation=(2, 2)),  # fewer rows than it needs
    call("routed_attention", (6, 9), 2, 8, regions=(3, 3), topk=2),
    call("channel_attention", (5, 6), 2, 8),
    call("super_token_attention", (8, 12), 1, 8, cell=(4, 4)),
    call("token_reallocation", (6, 5), 1, 8, runs=(4, 3, 1), shares=(1, 2, 1)),
    call("significance", (6, 8), 2, 8, window=None, keys=(3, 4)),
    call("significance", (6, 8), 2, 8, window=(4, 4), keys=(6, 8)),
    call("pooled_attention", (6, 5), 2, 8, keys=11),
]


# of significance nothing is learned
TIMED = [(case, mode) for case in FEW for mode in MODES if mode == "forward" or case.op != "significance"]


@pytest.mark.parametrize(("case", "mode"), TIMED, ids=lambda value: f"{getattr(value, 'op', 'for')} {value}")
def test_peers_agree(case, mode):
    contest = CONTESTS[case.op](case, 2, "cpu", torch.float32)
    assert contest.learned == (case.op != "significance")
    found = measured(case, contest, mode)
    assert not found.missing and set(found.ms) == {"ours", *(set(contest.peers) & set(QUICK))} and len(found.ms) > 1


@pytest.mark.parametrize("case", FEW, ids=lambda case: f"{case.op} {case}")
def test_the_torch_path_launches_no_kernel(case):
    """In no part of the call, for which `auto` would: without data it takes tensors for those of a GPU."""
    contest = CONTESTS[case.op](case, 2, "meta", torch.float32)
    with recording() as launched:
        contest.op(**contest.inputs, impl="torch")
    assert not launched


@pytest.mark.parametrize("case", [FEW[i] for i in (1, 4, 6, 7, 8, -1)], ids=lambda case: f"{case.op} {case}")
def test_flex_agrees(case, monkeypatch):
    """Not compiled: its score and mask are what is held to the op."""
    from ops.bench import contest

    if torch.__version__ < "2.10" and "grid" in str(case):
        pytest.skip("FlexAttention of torch 2.9 takes no mask of grids uncompiled")
    monkeypatch.setattr(contest, "compiled", lambda function: function)
    made = CONTESTS[case.op](case, 2, "cpu", torch.float32)
    assert not measured(case, made, only=["flex"]).missing


def test_a_peer_without_a_bias_is_held_to_the_op_without_one():
    made = CONTESTS["neighborhood_attention"](FEW[6], 2, "cpu", torch.float32)
    assert made.peers["natten without bias"].without_bias

    def unbiased(packed, bias):
        return made.op(packed, torch.zeros_like(bias))

    peers = {"plain": Peer(unbiased, without_bias=True), "not said": Peer(unbiased)}
    for mode in MODES:
        found = measured(FEW[6], Contest(made.inputs, made.op, peers), mode, only=list(peers))
        assert set(found.ms) == {"ours", "plain"} and found.missing["not said"].startswith("disagrees")


def test_a_peer_that_disagrees_or_fails_is_not_timed(small):
    made = CONTESTS[small.op](small, 2, "cpu", torch.float32)

    def failing(**inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    peers = {"wrong": Peer(lambda **inputs: 1.01 * made.op(**inputs)), "failing": Peer(failing)}
    peers["empty"] = Peer(lambda **inputs: made.op(**inputs) * float("nan"))
    found = measured(small, Contest(made.inputs, made.op, peers), only=list(peers))
    assert set(found.ms) == {"ours"}
    assert found.missing["wrong"] == "disagrees: relative error 1.0e-02"
    assert found.missing["failing"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert found.missing["empty"].startswith("disagrees")
    text = render([found], {}, {"float32": Machine(1e9, 1e12)})
    assert "wrong: not timed in 1 (first 6x5 2x8 keys 11 forward): disagrees" in text


def test_where_nothing_runs_the_reason_is_told(small):
    def op(**inputs):
        raise RuntimeError("broken")

    made = CONTESTS[small.op](small, 2, "cpu", torch.float32)
    found = measured(small, Contest(made.inputs, op), only=[])
    assert found.missing == {"ours": "RuntimeError: broken"} and not found.ms


def test_without_what_the_machine_reaches_calls_are_timed(small, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(bench, "machine", fail)
    assert bench.reached(bench.parse([]), "float32") is None
    assert "copy and matmul in float32 were not timed: OutOfMemoryError: no memory" in capsys.readouterr().out
    found = measured(small, CONTESTS[small.op](small, 2, "cpu", torch.float32), only=[])
    text = render([found], {}, {"float32": None})
    assert "- float32: copy and matmul were not timed" in text and "%" not in text.split("## pooled_attention")[1]


def test_a_run_stops_where_no_call_can_succeed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "context_lost", lambda: True)
    arguments = ["pooled_attention", "--models", "stvit_s", "--batch", "1", "--repeats", "1", "--peers", "smd"]
    bench.main([*arguments, "--out", str(tmp_path)])
    (found,) = json.loads((tmp_path / "pooled_attention_cpu.json").read_text())["rows"]
    said = capsys.readouterr()
    assert found["mode"] == "forward" and "stopped: after an error in that call" in said.out
    assert "--peers: no call has smd; without it all peers are timed" in said.err


def test_calls_that_there_are_none_of(tmp_path):
    with pytest.raises(SystemExit, match=r"no call has this in its name \(--cases zzz, of pooled_attention in max"):
        bench.main(["pooled_attention", "--cases", "zzz", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="there are no calls of channel_attention in maxvit_t"):
        bench.main(["channel_attention", "--models", "maxvit_t", "--out", str(tmp_path)])


def test_in_tf32_answers_may_differ_by_its_rounding():
    one, near, far = ([torch.full((3,), value)] for value in (1.0, 1.005, 1.02))
    assert disagreement(near, one, torch.float32) is not None
    precision.multiply_float32("tf32")
    try:
        assert disagreement(near, one, torch.float32) is None
        assert disagreement(far, one, torch.float32) is not None
    finally:
        precision.multiply_float32("ieee")


def test_ours_failing_ends_with_an_error_after_all_is_written(tmp_path, monkeypatch):
    def broken(case, *settings):
        made = CONTESTS_BEFORE(case, *settings)

        def op(impl="auto", **inputs):
            if impl == "auto":
                raise RuntimeError("broken")
            return made.op(impl=impl, **inputs)

        return Contest(made.inputs, op, made.peers)

    CONTESTS_BEFORE = CONTESTS["pooled_attention"]
    monkeypatch.setitem(CONTESTS, "pooled_attention", broken)
    arguments = [
        "pooled_attention",
        "--models",
        "stvit_s",
        "--cases",
        "attention 7 8x64",
        "--batch",
        "1",
        "--repeats",
        "1",
    ]
    with pytest.raises(SystemExit, match=r"pooled_attention 7 8x64 keys 49 float32 forward: RuntimeError: broken"):
        bench.main([*arguments, "--peers", "products", "--modes", "forward", "--out", str(tmp_path)])
    (found,) = json.loads((tmp_path / "pooled_attention_cpu.json").read_text())["rows"]
    assert set(found["ms"]) == {"products"} and found["missing"] == {"ours": "RuntimeError: broken"}


def test_stops_when_its_minutes_are_over(tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 40))
    monkeypatch.setattr(bench.time, "monotonic", lambda: next(clock))
    arguments = ["--models", "stvit_s", "--batch", "1", "--repeats", "1", "--modes", "forward", "--peers"]
    bench.main([*arguments, "--minutes", "1", "--out", str(tmp_path), "--threads", "1"])
    assert "1 of 6 calls" in json.loads((tmp_path / "ops_cpu.json").read_text())["settings"]


def test_numbers_are_on_disk_when_a_run_ends_early(tmp_path, monkeypatch):
    def lost():
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "context_lost", lost)
    monkeypatch.setattr(bench, "run", lambda job, args: [row(job.call)])
    with pytest.raises(SystemExit, match="130"):
        bench.main(["pooled_attention", "--out", str(tmp_path), "--json", str(tmp_path / "numbers.json")])
    assert json.loads((tmp_path / "numbers.json").read_text())["rows"]


def test_the_most_important_comes_first():
    jobs = bench.plan(bench.parse(["--device", "cuda"]))
    assert {job.call.op for job in jobs[: len(CONTESTS)]} == set(CONTESTS)
    assert all(job.call.size[0] >= 7 and job.stages[0].split("_")[1][0] in "ts" for job in jobs[: len(CONTESTS)])
    assert [job.dtype for job in jobs] == sorted((job.dtype for job in jobs), key=["bfloat16", "float32"].index)
    half = [job.image for job in jobs if job.dtype == "float32"]
    assert half == sorted(half, key=["224", "800x1344"].index)
    assert {(job.image, job.batch) for job in jobs} == {("224", 128), ("800x1344", 2)}


def test_peers_that_are_compiled_are_asked_for_as_often_as_is_said():
    args = bench.parse(["--device", "cuda", "--models", "davit_t", "--compiled", "2"])
    jobs = bench.plan(args)
    told = {(job.image, job.turn) for job in jobs if asked(job, args, "flex")}
    assert told == {("224", 1), ("224", 2)}
    assert all(asked(job, args, "sdpa") for job in jobs)


def test_what_is_timed_is_compiled_before_in_every_configuration(monkeypatch):
    args = bench.parse(
        ["channel_attention", "--models", "davit_t", "--batch", "1", "--dtypes", "bfloat16", "--compiled", "1"]
    )
    seen = []
    monkeypatch.setattr(prepare, "answer", lambda peer, contest, mode: seen.append((mode, launching._fixed)))
    monkeypatch.setattr(prepare, "attempt", lambda peer, contest, mode, *_: seen.append((mode, peer)))
    first, second = bench.plan(args)[:2]
    prepare.warm(first, args)
    assert [place for mode, place in seen if mode == "forward"][:4] == [0, 1, 2, 3]
    assert len(seen) == 2 * 5 and launching._fixed is None  # and the one peer that is compiled
    seen.clear()
    prepare.warm(second, args)
    assert len(seen) == 2 * 4


@pytest.mark.parametrize(("how", "places"), [("ieee", 1), ("tf32x3", 5)])
def test_processes_that_compile_multiply_float32_as_the_run_does(how, places, monkeypatch):
    args = bench.parse(["channel_attention", "--models", "davit_t", "--device", "cuda", "--float32", how])
    args.device, seen = "cpu", []
    monkeypatch.setattr(prepare, "answer", lambda *_: seen.append((launching._fixed, precision.precision())))
    try:
        prepare.warm(next(job for job in bench.plan(args) if job.dtype == "float32"), args)
    finally:
        precision.multiply_float32("ieee")
    assert seen == 2 * [(place, how) for place in range(places)]


def test_a_run_that_is_cut_off_has_timed_what_it_compiled(monkeypatch):
    compiled = []

    @contextlib.contextmanager
    def workers(jobs, begin):
        def run(warm, some, died):
            compiled.extend(some)
            return some

        assert jobs == 3
        yield run

    monkeypatch.setattr(prepare, "workers", workers)
    args = bench.parse(["--device", "cuda", "--models", "davit_t", "--jobs", "3"])
    jobs, timed = bench.plan(args), []
    for job in prepare.prepared(jobs, args):
        timed.append(job)
        assert timed == compiled[: len(timed)] and len(compiled) - len(timed) < 3
    assert timed == compiled == jobs and len(jobs) % 3  # the last of them are fewer
    compiled.clear()
    clock = iter([1, 2, 3.1])
    monkeypatch.setattr(prepare.time, "monotonic", lambda: next(clock))
    assert list(prepare.prepared(jobs, args, end=3)) == compiled == jobs[:6]  # compilers take their minutes too
    args.jobs, compiled[:] = None, []
    assert list(prepare.prepared(jobs, args)) == jobs and not compiled


def test_defaults_on_a_cpu_are_small():
    jobs = bench.plan(bench.parse([]))
    assert {(job.image, job.batch, job.dtype) for job in jobs} == {("224", 8, "float32")}
    assert {stage.split()[0] for job in jobs for stage in job.stages} == set(SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["windw_attention"], "no op is called windw_attention: expected some of window_attention"),
        (["--models", "davit_tiny"], "no model is called davit_tiny: expected some of maxvit_t"),
        (["--images", "225"], "image is 225: expected one or two multiples of 32"),
        (["--batches", "1", "2"], "--batches has 2 numbers for 1 images"),
        (["--images", "large"], "image is large: expected one or two multiples of 32"),
        (["--repeats", "0"], "argument --repeats: 0: expected at least 1"),
        (["--jobs", "0"], "argument --jobs: 0: expected at least 1"),
        (["--compiled", "-3"], "argument --compiled: -3: expected at least 0"),
        (["--minutes", "nan"], "argument --minutes: nan: expected a number above 0"),
        (["--threads", "some"], "argument --threads: invalid positive value: 'some'"),
        (["--float32", "tf32"], "--float32 tf32: only a GPU multiplies so, --device cuda"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path):
    with pytest.raises(SystemExit, match="torch finds no GPU here"):
        bench.main(["--device", "cuda", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_the_most_that_is_held_is_counted():
    def run():
        first = torch.ones(2**20)
        second = first + 1
        del first
        third = second + 1
        del second
        return third

    assert held(run) == pytest.approx(8, abs=0.01)  # MiB of two tensors at a time


def test_traffic_and_products():
    case = call(
        "window_attention", (14, 14), 2, 32, window=(7, 7), grid=False, bias=False, attend_padding=True, shared=False
    )
    contest = CONTESTS[case.op](case, 3, "cpu", torch.float32)
    a_map = 3 * 14 * 14 * 64
    answer = [torch.empty(3, 14, 14, 2, 32)]
    assert traffic(contest, answer, "forward") == 4 * a_map * 4
    # and again q, k, v; the gradient of the result; three gradients
    assert traffic(contest, answer, "forward+backward") == 11 * a_map * 4
    assert flops(case, 3) == (4 * a_map * 49, 8 * a_map * 49)


def test_products_of_what_is_not_attention_over_positions():
    """Three images; each line by hand: pixels x pairs x channels x heads x two operations."""
    by_op = {(case.op, case.options): case for case in FEW}
    channel = by_op["channel_attention", ()]  # k' v and its product with q, both 8 x 8 for each of 5 x 6 pixels
    assert flops(channel, 3) == (3 * 30 * 2 * (8 * 8) * 2 * 2, 3 * 30 * 4 * (8 * 8) * 2 * 2)
    tokens = by_op["super_token_attention", (("cell", (4, 4)),)]  # nine each: association, average, scatter
    assert flops(tokens, 3) == (3 * 96 * (9 * 3) * 8 * 2, 3 * 96 * (9 * 2) * 8 * 2)
    whole, inside = (case for case in FEW if case.op == "significance")  # q k', without a gradient
    assert flops(whole, 3) == (3 * 48 * 12 * 8 * 2 * 2, 0) and flops(inside, 3) == (3 * 48 * 16 * 8 * 2 * 2, 0)


def test_times_are_medians(monkeypatch):
    monkeypatch.setattr(timing, "on_cpu", lambda runs, repeats: [dict.fromkeys(runs, ms) for ms in (1.0, 9.0, 2.0)])
    ms, _ = timing.timings({"run": lambda: torch.ones(1)}, 3, "cpu")
    assert ms == {"run": 2.0}


def test_what_a_machine_reaches(monkeypatch):
    monkeypatch.setattr(timing, "timings", lambda runs, *_: ({"copy": 500.0, "product": 250.0}, {}))
    found = timing.machine("cpu", torch.float32, 1)
    assert found.copy == 2 * 2**27 / 0.5  # bytes read and written
    assert found.product == 2 * 2048**3 / 0.25  # a multiplication and an addition


def test_a_call_is_told_in_a_few_words():
    assert str(FEW[1]) == "8x6 1x32 window 7 grid bias"
    assert str(call("token_reallocation", (56, 56), 1, 64, runs=(196, 56), shares=(1, 2))) == (
        "56 1x64 runs 196x56 shares 1x2"
    )


def test_what_is_merged():
    assert merged(3136, (196, 56, 28), (1, 2, 1)) == 4 + 28 + 28
    assert merged(35, (2, 1), (1, 1)) == math.ceil(17 / 2) + 18


def test_every_family_has_two_sizes():
    assert {name.split("_")[0] for name in SMALL} == {name.split("_")[0] for name in BASE}
    assert all(isinstance(made, Call) for made in calls((224, 224))) and set(MODELS) == {*SMALL, *BASE}
