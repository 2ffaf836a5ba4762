"""What the benchmark measures with: workloads, the check of accuracy, adapters of peers, limits."""

import sys
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from flashbias import biased_attention, reference
from flashbias.recipes.bench import accuracy, adapters, limits, third_party, timing
from flashbias.recipes.bench.accuracy import INPUTS, sample
from flashbias.recipes.bench.measure import Group, Settings, first_call, measure
from flashbias.recipes.bench.peers import BenchError, choose, registry
from flashbias.recipes.bench.problem import Problem, Refused, place
from flashbias.recipes.bench.processes import stream
from flashbias.recipes.bench.workloads import BY_NAME, WORKLOADS, Workload

NAMES = list(BY_NAME)
SQUARE = [name for name in NAMES if len(BY_NAME[name].modes) == 2]


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors are small here: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem_of(name: str, length: int = 40, seed: int = 0) -> Problem:
    """A workload small enough for plain code."""
    workload = replace(BY_NAME[name], batch=2, heads=2, tied=False).at(length)
    return Problem.make(workload, "cpu", seed)


def run(ready_by, problem: Problem, gradients: bool) -> dict[str, torch.Tensor]:
    """Output and gradients by an adapter."""
    tensors = {name: tensor.detach().requires_grad_(gradients) for name, tensor in problem.tensors.items()}
    ready = ready_by(problem, tensors, gradients)
    out = ready.run()
    if not gradients:
        return {"out": out}
    names = [name for name in tensors if ready.bias_gradient or name in INPUTS]
    found = torch.autograd.grad(out, [tensors[name] for name in names], problem.cotangent)
    return {"out": out, **dict(zip(names, found, strict=True))}


def truth(problem: Problem, biased: bool = True) -> dict[str, torch.Tensor]:
    """Output and all gradients in float64, all at once."""
    tensors = {name: tensor.double().requires_grad_() for name, tensor in problem.tensors.items()}
    names = [name for name in tensors if biased or name in INPUTS]
    bias = problem.bias(tensors) if biased else None
    out, _ = reference(*adapters.inputs(tensors), bias, is_causal=problem.workload.causal)
    gradients = torch.autograd.grad(out, [tensors[name] for name in names], problem.cotangent.double())
    return {"out": out, **dict(zip(names, gradients, strict=True))}


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, result in found.items():
        scale = wanted[name].abs().max()
        torch.testing.assert_close(result.double() / scale, wanted[name] / scale, rtol=0, atol=1e-5, msg=name)


def test_workloads_are_those_of_the_targets():
    assert len(WORKLOADS) == len(BY_NAME) == 12
    for workload in WORKLOADS:
        assert set(workload.targets) == set(workload.modes)
        assert all(target.goal < target.gate for target in workload.targets.values())
        assert workload.small().scores < 2**20
    peers = registry(None)
    assert all(workload.best in peers for workload in WORKLOADS)


@pytest.mark.parametrize("name", ["gpt2-alibi", "factors-32", "decode-alibi"])
def test_scores_are_those_that_the_mask_allows(name):
    problem = problem_of(name)
    w = problem.workload
    allowed = problem.allowed(torch.arange(w.n_q))
    pairs = w.n_q * w.n_k if allowed is None else int(allowed.sum())
    assert w.scores == w.batch * w.heads * pairs


def test_length_of_a_triangle_is_its_batch_too():
    w = BY_NAME["triangle-384"].at(64)
    assert (w.batch, w.n_q, w.n_k) == (64, 64, 64)
    w = BY_NAME["decode-alibi"].at(64)
    assert (w.batch, w.n_q, w.n_k) == (32, 1, 64)


# Measured rates, 1e12 scores a second, by head dim and rank.
@pytest.mark.parametrize(
    ("head_dim", "rank", "speed"),
    [
        (32, 0, 3.87), (32, 2, 3.87), (32, 16, 3.87), (32, 96, 2.46), (64, 0, 3.08), (64, 16, 2.74), (64, 96, 1.76),
        (128, 0, 1.54), (128, 2, 1.45), (128, 96, 1.12),
    ],
)  # fmt: skip
def test_limit_is_that_of_the_unit_that_binds(head_dim, rank, speed):
    workload = Workload("", "", "factors", 2, 4, 16384, 16384, head_dim, rank, "flex")
    assert limits.scores_per_second("NVIDIA H200", workload, "fwd") / 1e12 == pytest.approx(speed, abs=0.006)
    both = limits.scores_per_second("NVIDIA H200", workload, "fwdbwd")
    assert both <= limits.EXPONENTIALS / 2
    assert limits.scores_per_second("NVIDIA A100", workload, "fwd") is None


def test_decoding_is_limited_by_memory():
    w = BY_NAME["decode-alibi"]
    seconds = w.scores / limits.scores_per_second("NVIDIA H200", w, "fwd")
    assert seconds == pytest.approx(2 * w.batch * w.heads * w.n_k * w.head_dim * 2 / 4.8e12, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_every_form_of_a_bias_is_the_same_bias(name):
    problem = problem_of(name)
    w = problem.workload
    rows = torch.arange(w.n_q)
    bias = problem.bias(problem.tensors).dense(w.n_q, w.n_k)
    torch.testing.assert_close(problem.bias(problem.tensors, rows).dense(w.n_q, w.n_k), bias)
    allowed = problem.allowed(rows)
    masked = bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)
    matrix = problem.dense()
    torch.testing.assert_close(matrix, masked.view_as(matrix))
    assert matrix.stride(-2) % 16 == 0
    if "values" in problem.tensors:
        with pytest.raises(Refused):
            problem.factors(problem.tensors)
        return
    q_factor, k_factor = problem.factors(problem.tensors, unit=0.5)
    difference = q_factor @ k_factor.mT * 0.5 - bias
    assert (difference - difference.mean(-1, keepdim=True)).abs().max() < 1e-4 * bias.abs().max()


@pytest.mark.parametrize("name", ["gpt2-alibi", "decode-alibi", "pde-distance"])
def test_factors_in_16_bits_are_exact_enough(name):
    """Positions up to 16,384 and points in halves: within what fp32 sums of such sizes allow."""
    problem = problem_of(name, 16384 if name == "decode-alibi" else 300)
    half = Problem(problem.workload, problem.tensors, problem.cotangent.bfloat16())
    q_factor, k_factor = half.factors(problem.tensors)
    assert q_factor.dtype == k_factor.dtype == torch.bfloat16
    product = q_factor.double() @ k_factor.double().mT
    difference = product - problem.bias(problem.tensors).dense(problem.workload.n_q, problem.workload.n_k)
    # Per key and row: what is constant along a row does not count, and slopes may be off by a factor.
    steps = difference.diff(dim=-1).abs().max()
    assert steps < (2e-5 if "alibi" in name else 2e-3)


@pytest.mark.parametrize("name", SQUARE)
def test_sampled_truth_is_the_truth(name, monkeypatch):
    monkeypatch.setattr(accuracy, "CPU_BLOCK", 700)  # several blocks of rows, one head at a time
    problem = problem_of(name)
    whole = truth(problem)
    found = sample(problem, biased=True, gradients=True)
    assert set(found.truth) == set(whole)
    for key, result in whole.items():
        torch.testing.assert_close(found.truth[key], result[place(key, result, found.batches, found.heads)])
    found = sample(problem, biased=False, gradients=True)
    for key, result in truth(problem, biased=False).items():
        torch.testing.assert_close(found.truth[key], result[place(key, result, found.batches, found.heads)])


def test_samples_of_large_problems_are_small_but_complete():
    problem = problem_of("factors-32", 300)
    found = sample(problem, biased=True, gradients=False)
    assert found.truth["out"].shape[-2] == accuracy.ROWS
    assert {0, 299} <= set(found.rows.tolist())
    w = replace(BY_NAME["swin1-factors"], batch=20, heads=6, tied=False).at(8)
    found = sample(Problem.make(w, "cpu", 0), biased=True, gradients=True)
    assert found.truth["query"].shape[:2] == (20, 2), "the whole batch shares factors"
    found = sample(Problem.make(w, "cpu", 0), biased=False, gradients=True)
    assert found.truth["query"].shape[:2] == (2, 2)
    w = replace(BY_NAME["pde-distance"], heads=6).at(8)
    found = sample(Problem.make(w, "cpu", 0), biased=True, gradients=True)
    assert found.truth["query"].shape[:2] == (1, 6), "all heads share points"


@pytest.mark.parametrize("name", ["factors-64", "swin1-dense", "gpt2-alibi", "decode-alibi"])
def test_ours_passes_the_check_and_what_is_wrong_does_not(name):
    problem = problem_of(name, seed=1)
    gradients = name in SQUARE
    results = run(adapters.flashbias, problem, gradients)
    found = sample(problem, True, gradients)
    found.check(results, torch.float32)
    for key, (error, eager) in found.errors(results).items():
        assert 0 <= error < 1e-3, key
        assert eager < 1e-3, key
    for key, result in results.items():
        wrong = result.clone()
        wrong.view(-1)[-1] += 0.1
        with pytest.raises(AssertionError, match=f"^{key}: "):
            found.check({key: wrong}, torch.float32)
    results["out"] = torch.full_like(results["out"], torch.nan)
    with pytest.raises(AssertionError, match="out"):
        found.check(results, torch.float32)


@pytest.mark.parametrize("gradients", [False, True], ids=["fwd", "fwdbwd"])
@pytest.mark.parametrize("form", ["none", "dense", "concat"])
@pytest.mark.parametrize("name", NAMES)
def test_adapters_of_torch_compute_the_workload(name, form, gradients):
    if gradients and name not in SQUARE:
        return
    problem = problem_of(name)
    adapter = {"none": adapters.sdpa, "dense": adapters.sdpa_dense, "concat": adapters.sdpa_concat}[form]
    if form == "concat" and "values" in problem.tensors:
        with pytest.raises(Refused, match="no factors"):
            run(partial(adapter, None), problem, gradients)
        return
    results = run(partial(adapter, None), problem, gradients)
    bias_gradient = form == "concat" or (form == "dense" and "values" in problem.tensors)
    assert len(results) == (1 if not gradients else 1 + len(problem.tensors) if bias_gradient else 4)
    assert_close(results, truth(problem, biased=form != "none"))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_compiled_code_and_flex_attention_compute_the_workload(monkeypatch):
    """Without their compiler, which takes half a minute; what is compiled is plain code."""
    import torch.nn.attention.flex_attention  # which compiles something when it is loaded

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for name in ("gpt2-alibi", "decode-alibi", "pde-distance", "factors-32", "swin1-dense"):
        problem = problem_of(name)
        wanted = truth(problem)
        assert_close(run(adapters.compiled, problem, name in SQUARE), wanted)
        assert_close(run(adapters.flex, problem, False), wanted)


def test_what_does_not_fit_is_refused():
    problem = Problem.make(replace(BY_NAME["factors-32"], batch=1, heads=1, rank=1, head_dim=1).at(100_000), "cpu", 0)
    with pytest.raises(Refused, match=r"a dense bias needs 37\.3 GiB"):
        problem.dense()
    with pytest.raises(Refused, match="holding all scores needs"):
        adapters.compiled(problem, problem.tensors, False)


def module(name: str, **functions) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(functions)
    return made


def stand_ins() -> dict[str, ModuleType]:
    """Functions that take what those of the packages take, by their documentation, and compute in plain torch."""

    def attend(query, key, value, bias=None, scale=None, causal=False):  # (B, N, H, C), bias (B, H, Nq, Nk)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores if bias is None else scores + bias
        if causal:
            n_q, n_k = scores.shape[-2:]
            scores = scores.masked_fill(~torch.ones(n_q, n_k).tril(n_k - n_q).bool(), -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2)

    def flash_2(q, k, v, softmax_scale=None, causal=False, alibi_slopes=None):
        bias = None
        if alibi_slopes is not None:
            distance = (torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])).abs()
            bias = -alibi_slopes[:, None, None] * distance
        assert q.shape[-1] == v.shape[-1]
        return attend(q, k, v, bias, softmax_scale, causal)

    def cuequivariance(q, k, v, bias, mask=None, scale=None):
        assert bias.shape == (q.shape[0], 1, q.shape[2], q.shape[3], k.shape[3])
        return (q @ k.mT * scale + bias).softmax(-1) @ v

    def trifast(q, k, v, b, mask):
        assert all(tensor.is_contiguous() for tensor in (q, k, v))
        assert q.shape[1] == b.shape[1]
        assert mask.shape == (1, q.shape[2], k.shape[3])
        scores = (q @ k.mT * q.shape[-1] ** -0.5 + b[:, :, None]).masked_fill(mask[:, None, :, None], -torch.inf)
        return scores.softmax(-1) @ v

    def with_lse(q, k, v, softmax_scale=None, causal=False):
        return attend(q, k, v, None, softmax_scale, causal), None

    return {
        "xformers": module("xformers"),
        "xformers.ops": module(
            "xformers.ops", memory_efficient_attention=lambda q, k, v, attn_bias: attend(q, k, v, attn_bias)
        ),
        "flash_attn": module("flash_attn", flash_attn_func=flash_2),
        "flash_attn_interface": module("flash_attn_interface", flash_attn_func=attend_without_bias(attend)),
        "flash_attn.cute": module("flash_attn.cute", flash_attn_func=with_lse),
        "cuequivariance_torch": module("cuequivariance_torch", triangle_attention=cuequivariance),
        "trifast": module("trifast", triangle_attention=trifast),
    }


def attend_without_bias(attend):
    return lambda q, k, v, softmax_scale=None, causal=False: attend(q, k, v, None, softmax_scale, causal)


PAPER = """
def flash_bias_func(q, k, v, q_bias, k_bias, mask, causal, softmax_scale):
    import torch
    assert mask is None and q_bias.shape[0] in (1, q.shape[0]) and q_bias.shape[2] == q.shape[2]
    q, k, v, q_bias, k_bias = (tensor.transpose(1, 2) for tensor in (q, k, v, q_bias, k_bias))
    scores = q @ k.mT * softmax_scale + q_bias @ k_bias.mT
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores).tril().bool(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)
"""


@pytest.mark.parametrize(
    "name", ["gpt2-alibi", "factors-32", "pde-distance", "swin1-dense", "triangle-factors", "triangle-384"]
)
def test_adapters_of_packages_speak_as_these_want_it(name, monkeypatch, tmp_path):
    for key, made in stand_ins().items():
        monkeypatch.setitem(sys.modules, key, made)
    (tmp_path / "flash_bias").mkdir()
    (tmp_path / "flash_bias" / "flash_bias_triton.py").write_text(PAPER)
    problem = problem_of(name)
    triangle = name.startswith("triangle")
    if triangle:
        problem = Problem.make(replace(problem.workload, batch=12).at(12), "cpu", 0)
    wanted = truth(problem)
    dense = "values" in problem.tensors
    for peer in (p for p in registry(tmp_path).values() if p.isolated):
        if peer.name in ("cuequivariance", "trifast") and not triangle:
            with pytest.raises(Refused, match="triangle attention only"):
                run(peer.adapter, problem, False)
        elif peer.name in ("flash-attn-2", "flash-attn-3", "flash-attn-4", "paper") and dense:
            with pytest.raises(Refused, match="no factors"):
                run(peer.adapter, problem, False)
        else:
            for gradients in (False, True):
                assert_close(run(peer.adapter, problem, gradients), wanted)


def test_packages_that_are_not_there_are_absent(tmp_path):
    peers = registry(None)
    assert peers["trifast"].absent("cuda") == "trifast is not installed"
    assert peers["trifast"].absent("cpu") == "needs a GPU"
    assert peers["paper"].absent("cuda") == "no checkout is named with --flashbias-repo"
    (tmp_path / "flash_bias_triton.py").touch()
    assert registry(tmp_path)["paper"].absent("cuda") is None
    assert third_party.find(tmp_path) == tmp_path / "flash_bias_triton.py"


def test_groups_of_peers():
    peers, workload = registry(None), BY_NAME["alibi-128"]
    assert choose(["best"], workload, "cuda", peers) == ["flashbias", "cudnn-none", "flex"]
    assert choose(["best"], workload, "cpu", peers) == ["flashbias", "sdpa-none", "sdpa-concat", "sdpa-dense"]
    assert choose(["flex", "best", "flex"], workload, "cuda", peers) == ["flex", "flashbias", "cudnn-none"]
    assert choose(["all"], workload, "cpu", peers) == list(peers)
    safe = choose(["safe"], workload, "cuda", peers)
    assert not any(peers[name].isolated for name in safe)
    assert "efficient-dense" in safe
    with pytest.raises(BenchError, match="abacus"):
        choose(["abacus"], workload, "cpu", peers)


class Graph:
    """Stands for a captured step."""

    def __init__(self, step):
        self.replay = lambda: ("graph", step())


@pytest.mark.parametrize(
    ("milliseconds", "by"),
    [({"a": 1.0, "b": 2.0}, {"a": "events", "b": "events"}), ({"a": 0.2, "b": 2.0}, {"a": "graph", "b": "events"})],
    ids=["long", "short"],
)
def test_short_steps_are_replayed_as_graphs_where_they_can_be(monkeypatch, milliseconds, by):
    order = []

    def do_bench(step, warmup, rep, return_mode):
        name = step()
        order.append(name)
        if return_mode == "median":
            return milliseconds[name]
        assert rep >= 5 * milliseconds[name[1] if isinstance(name, tuple) else name]
        return [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr(timing, "capture", lambda step: Graph(step) if step() == "a" else None)
    said = []
    found = timing.time_all({"a": lambda: "a", "b": lambda: "b"}, "cuda", 2, said.append)
    assert {name: time.by for name, time in found.items()} == by
    assert (found["a"].median, found["a"].p20, found["a"].p80) == (3.5, 2.0, 5.0)
    first = ("graph", "a") if by["a"] == "graph" else "a"
    assert order == ["a", "b", first, "b", first, "b"], "everyone in turn, in every round"
    assert set(said) == {"a", "b"}


@pytest.mark.parametrize("accepts", [True, False])
def test_values_are_widened_for_cudnn_only_where_it_refuses_them(monkeypatch, accepts):
    widths = []

    def attend(backend, query, key, value, **options):
        if value.shape[-1] < key.shape[-1] and not accepts:
            raise RuntimeError("no available kernel")
        widths.append(value.shape[-1])
        return F.scaled_dot_product_attention(query, key, value, **options)

    monkeypatch.setattr(adapters, "_attend", attend)
    problem = problem_of("factors-32")
    assert_close(run(partial(adapters.sdpa_concat, "CUDNN_ATTENTION"), problem, True), truth(problem))
    assert widths[-1] == (32 if accepts else 40)


def test_failure_of_a_peer_is_a_row_with_the_reason(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(adapters, "biased_attention", fail)
    group = Group(BY_NAME["factors-32"].small().at(32), "fwd", ("flashbias", "sdpa-dense"))
    rows = {row.peer: row for row in measure(Settings("cpu", repeats=1), group, lambda text: None)}
    assert (rows["flashbias"].status, rows["flashbias"].reason) == ("failed", "RuntimeError: no such kernel")
    assert rows["flashbias"].milliseconds is None
    assert rows["sdpa-dense"].tax > 0
    assert rows["sdpa-none"].tax == 1, "the baseline is measured although nobody asked for it"


def test_inaccurate_results_are_measured_but_said_to_be_wrong(monkeypatch):
    monkeypatch.setattr(
        adapters, "biased_attention", lambda *args, **options: biased_attention(*args, **options) + 0.01
    )
    group = Group(BY_NAME["swin1-dense"].small().at(32), "fwdbwd", ("flashbias",))
    rows = measure(Settings("cpu", repeats=1), group, lambda text: None)
    assert rows[0].accurate is False
    assert "times the bound" in rows[0].reason
    assert rows[0].milliseconds > 0


def cuda_group(name: str, mode: str, *peers: str) -> Group:
    return Group(BY_NAME[name].small(), mode, peers)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_groups_on_a_gpu(name):
    for mode in BY_NAME[name].modes:
        group = cuda_group(
            name, mode, "flashbias", "flashbias-deterministic", "cudnn-none", "cudnn-dense", "cudnn-concat"
        )
        rows = {row.peer: row for row in measure(Settings("cuda", repeats=1), group, lambda text: None)}
        for peer in ("flashbias", "flashbias-deterministic"):
            assert rows[peer].status == "ok", rows[peer].reason
            assert rows[peer].accurate, rows[peer].reason
            assert rows[peer].host_us > 0
        assert all(row.device and row.driver and row.cudnn for row in rows.values())
        assert rows["flashbias"].tax > 0
        assert rows["flashbias"].timed_by == rows["cudnn-none"].timed_by, "a tax compares like with like"


@pytest.mark.gpu
def test_first_call_on_a_gpu_compiles(tmp_path):
    """In a process of its own, as `bench` has it: in this one kernels may have been compiled before."""
    task = (BY_NAME["gpt2-alibi"].small(), "fwd", "flashbias")
    work, environment = partial(first_call, Settings("cuda")), {"TRITON_CACHE_DIR": str(tmp_path)}
    *_, (kind, found) = stream(work, [task], environment, silence=120.0)
    assert kind == "done", found
    assert found["first_call_seconds"] > 0
    assert any(tmp_path.iterdir())


def test_stand_in_is_what_sdpa_computes():
    query, key, value = torch.randn(3, 2, 5, 3, 8).unbind()
    attend = stand_ins()["flash_attn_interface"].flash_attn_func
    wanted = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)), is_causal=True)
    torch.testing.assert_close(attend(query, key, value, causal=True), wanted.transpose(1, 2))
