"""What the operator refuses: by which class, in which words, and without ever reading a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BIASES, JOINS, MASKS, Case, build
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from flashbias import (
    ALiBi,
    Bias,
    Causal,
    DenseBias,
    FactoredBias,
    FlashBiasError,
    KeyPadding,
    Mask,
    RelativePositionBias,
    Segments,
    SpatialDistance,
    biased_attention,
    flash_bias_func,
    plan,
)
from flashbias.errors import DeviceError, DtypeError, ShapeError, UnsupportedError

ON_GPU = torch.cuda.is_available()
BATCH, HEADS, NQ, NK, C = 2, 4, 5, 7, 16

Q, K, V = torch.zeros(BATCH, HEADS, NQ, C), torch.zeros(BATCH, HEADS, NK, C), torch.zeros(BATCH, HEADS, NK, 8)
ELSEWHERE = "meta"


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def ids(n: int, device: str = "cpu") -> Tensor:
    return torch.zeros(n, dtype=torch.int32, device=device)


def bools(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def attend(bias: Any = None, **options: Any) -> Any:
    return biased_attention(Q, K, V, bias, **options)


def paper(q: Any = Q, k: Any = K, v: Any = V, **options: Any) -> Any:
    q, k, v = (x.transpose(1, 2) if isinstance(x, Tensor) and x.dim() == 4 else x for x in (q, k, v))
    return flash_bias_func(q, k, v, **options)


class NotAMask(Mask):
    """A kind of mask that the kernels do not know."""

    def dense(self, n_q: int, n_k: int, *, device: Any = None) -> Tensor:
        return bools(n_q, n_k)


class NotATerm(Bias):
    """A bias that describes itself in other words than the kernels'."""

    def dense(self, n_q: int, n_k: int, *, offset: Any = None, dtype: Any = torch.float32) -> Tensor:
        return zeros(n_q, n_k, dtype=dtype)

    def terms(self, problem: Any) -> Any:
        return [zeros(problem.n_q, problem.n_k)]


# What is called, the class of the error, and words of what was found, what is accepted and what to do.
Refusal = tuple[Callable[[], Any], type[FlashBiasError], str, str, str]
REFUSALS: dict[str, Refusal] = {
    # Types and dtypes.
    "query_no_tensor": (lambda: biased_attention(None, K, V),
        DtypeError, "query of type NoneType", "torch.Tensor", "as_tensor"),
    "value_no_tensor": (lambda: biased_attention(Q, K, [1.0]),
        DtypeError, "value of type list", "torch.Tensor", "as_tensor"),
    "query_sparse": (lambda: biased_attention(Q.to_sparse(), K, V),
        UnsupportedError, "query of layout torch.sparse_coo", "dense", "query.to_dense()"),
    "key_nested": (lambda: biased_attention(Q, torch.nested.nested_tensor(list(K), layout=torch.jagged), V),
        UnsupportedError, "key of layout nested", "dense", "KeyPadding"),
    "values_sparse": (lambda: DenseBias(zeros(NQ, NK).to_sparse_csr()),
        UnsupportedError, "values of layout torch.sparse_csr", "dense", "values.to_dense()"),
    "float64": (lambda: biased_attention(Q.double(), K.double(), V.double()),
        DtypeError, "float64", "float16, bfloat16 and float32", "cast"),
    "mixed_dtypes": (lambda: biased_attention(Q.half(), K, V),
        DtypeError, "torch.float16, torch.float32", "all three", "query.dtype"),
    "integers": (lambda: biased_attention(Q.int(), K.int(), V.int()), DtypeError, "int32", "float16", "cast"),
    "complex": (lambda: biased_attention(Q.cfloat(), K, V), DtypeError, "complex64", "float16", "cast"),
    "scale_tensor": (lambda: attend(scale=torch.ones(())),
        DtypeError, "scale of type Tensor", "Python number", "multiply query"),
    "scale_word": (lambda: attend(scale="0.5"), DtypeError, "scale of type str", "Python number", "float(scale)"),
    "bias_tensor": (lambda: attend(zeros(NQ, NK)),
        DtypeError, "bias of type Tensor", "flashbias.Bias", "DenseBias(values)"),
    "bias_integers": (lambda: DenseBias(ids(NQ)), DtypeError, "values of dtype torch.int32", "floating", ".float()"),
    "bias_complex": (lambda: DenseBias(zeros(NQ, NK, dtype=torch.cfloat)),
        DtypeError, "complex64", "floating", ".float()"),
    "bias_no_tensor": (lambda: DenseBias([[0.0]]), DtypeError, "values of type list", "torch.Tensor", "as_tensor"),
    "table_integers": (lambda: RelativePositionBias(ids(5)),
        DtypeError, "table of dtype torch.int32", "floating", ".float()"),
    "slopes_integers": (lambda: ALiBi(ids(HEADS)), DtypeError, "slopes of dtype torch.int32", "floating", ".float()"),
    "positions_bool": (lambda: ALiBi(zeros(HEADS), q_positions=bools(NQ), k_positions=bools(NK)),
        DtypeError, "q_positions of dtype torch.bool", "integers or floats", ".int()"),
    "positions_list": (lambda: ALiBi(zeros(HEADS), q_positions=[0], k_positions=[0]),
        DtypeError, "q_positions of type list", "torch.Tensor", "as_tensor"),
    "factor_integers": (lambda: FactoredBias(zeros(NQ, 3), ids(NK)[:, None]),
        DtypeError, "k_factor of dtype", "floating", ".float()"),
    "points_integers": (lambda: SpatialDistance(ids(NQ)[:, None], zeros(NK, 1), zeros(NQ)),
        DtypeError, "x_q of dtype", "floating", ".float()"),
    "mask_float": (lambda: attend(mask=zeros(NQ, NK)),
        DtypeError, "mask of dtype torch.float32", "boolean", "DenseBias(mask)"),
    "mask_integers": (lambda: attend(mask=ids(NK)), DtypeError, "mask of dtype torch.int32", "boolean", "mask.bool()"),
    "mask_word": (lambda: attend(mask="causal"), DtypeError, "mask of type str", "torch.Tensor", "as_tensor"),
    "mask_joined_with_float": (lambda: Causal() & zeros(NQ, NK),
        DtypeError, "mask of dtype torch.float32", "boolean", "DenseBias"),
    "offset_float": (lambda: Causal(1.5), DtypeError, "offset of type float", "an integer", "integer"),
    "offset_bool": (lambda: Causal(True), DtypeError, "offset of type bool", "an integer", "integer"),
    "offset_word": (lambda: Causal("top-left"), DtypeError, "offset of type str", "an integer", "integer"),
    "offset_float_tensor": (lambda: Causal(zeros(BATCH)),
        DtypeError, "offset of dtype torch.float32", "integer", ".int()"),
    "lengths_list": (lambda: KeyPadding([3, 4]), DtypeError, "lengths of type list", "torch.Tensor", "as_tensor"),
    "lengths_float": (lambda: KeyPadding(zeros(BATCH)),
        DtypeError, "lengths of dtype torch.float32", "integer", ".int()"),
    "ids_bool": (lambda: Segments(bools(NQ), ids(NK)), DtypeError, "q_ids of dtype torch.bool", "integer", ".int()"),
    # Shapes.
    "no_heads": (lambda: biased_attention(Q[0, 0], K[0, 0], V[0, 0]),
        ShapeError, "(5, 16)", "(*batch, H, Nq, C)", "unsqueeze(-3)"),
    "head_dims": (lambda: biased_attention(Q, K[..., :8], V),
        ShapeError, "(2, 4, 7, 8)", "(*batch, Hkv, Nk, C)", "order of the dimensions"),
    "lengths_of_key_and_value": (lambda: biased_attention(Q, K, V[:, :, 1:]),
        ShapeError, "(2, 4, 6, 8)", "(*batch, Hkv, Nk, Cv)", "order"),
    "heads_of_key_and_value": (lambda: biased_attention(Q, K[:, :2], V),
        ShapeError, "(2, 2, 7, 16)", "Hkv divides H", "order"),
    "groups": (lambda: biased_attention(Q, K[:, :3], V[:, :3]), ShapeError, "(2, 3, 7, 16)", "Hkv divides H", "order"),
    "batch": (lambda: biased_attention(Q.expand(3, 2, 4, 5, 16), K, V[:1].expand(3, 4, 7, 8)),
        ShapeError, "(3, 4, 7, 8)", "*batch", "equal or 1"),
    "values_rows": (lambda: attend(DenseBias(zeros(3, NK))),
        ShapeError, "values of shape (3, 7)", "(2, 4, 5, 7)", "may be 1 or missing"),
    "values_columns": (lambda: attend(DenseBias(zeros(NQ, 1))),
        ShapeError, "values of shape (5, 1)", "(Nk,) = (7,)", "lengths of query and key"),
    "values_heads": (lambda: attend(DenseBias(zeros(3, NQ, NK))),
        ShapeError, "values of shape (3, 5, 7)", "(2, 4, 5, 7)", "may be 1"),
    "values_dimensions": (lambda: attend(DenseBias(zeros(1, BATCH, HEADS, NQ, NK))),
        ShapeError, "(1, 2, 4, 5, 7)", "(2, 4, 5, 7)", "may be 1"),
    "values_vector": (lambda: DenseBias(zeros(NK)),
        ShapeError, "values of shape (7,)", "(*batch, H, Nq or 1, Nk)", "dimension for the queries"),
    "slopes_heads": (lambda: attend(ALiBi(zeros(3))),
        ShapeError, "slopes of shape (3,)", "(*batch, H) = (2, 4)", "may be 1"),
    "slopes_scalar": (lambda: ALiBi(zeros()), ShapeError, "without dimensions", "(H,)", "one slope for each head"),
    "table_even": (lambda: RelativePositionBias(zeros(HEADS, 6)),
        ShapeError, "(4, 6)", "2 D - 1", "each distance"),
    "table_heads": (lambda: attend(RelativePositionBias(zeros(3, 5))),
        ShapeError, "table of shape (3, 5)", "(*batch, H, 2 D - 1)", "may be 1 or missing"),
    "positions_one_side": (lambda: ALiBi(zeros(HEADS), q_positions=ids(NQ)),
        ShapeError, "only one", "both or neither", "other side"),
    "positions_gradient": (lambda: attend(ALiBi(zeros(HEADS), q_positions=zeros(NQ).requires_grad_(),
            k_positions=zeros(NK))),
        UnsupportedError, "require a gradient", "that do not", "detach"),
    "positions_length": (lambda: attend(ALiBi(zeros(HEADS), q_positions=ids(NK), k_positions=ids(NK))),
        ShapeError, "q_positions of shape (7,)", "(Nq,) = (5,)", "lengths"),
    "positions_batch": (lambda: attend(ALiBi(zeros(HEADS), q_positions=ids(NQ), k_positions=ids(NK).expand(3, NK))),
        ShapeError, "k_positions of shape (3, 7)", "(*batch, Nk) = (2, 7)", "may be 1"),
    "factor_ranks": (lambda: FactoredBias(zeros(NQ, 3), zeros(NK, 4)),
        ShapeError, "(5, 3) and (7, 4)", "one R", "last dimension"),
    "factor_length": (lambda: attend(FactoredBias(zeros(NQ, 3), zeros(NQ, 3))),
        ShapeError, "k_factor of shape (5, 3)", "(Nk, R) = (7, 3)", "lengths"),
    "factor_heads": (lambda: attend(FactoredBias(zeros(2, NQ, 3), zeros(NK, 3))),
        ShapeError, "q_factor of shape (2, 5, 3)", "(2, 4, 5, 3)", "may be 1"),
    "points_dimensions": (lambda: SpatialDistance(zeros(NQ, 3), zeros(NK, 2), zeros(NQ)),
        ShapeError, "(5, 3) and (7, 2)", "one d", "last dimension"),
    "points_length": (lambda: attend(SpatialDistance(zeros(NQ, 3), zeros(NQ, 3), zeros(NQ))),
        ShapeError, "x_k of shape (5, 3)", "(Nk, d) = (7, 3)", "lengths"),
    "points_batch": (lambda: attend(SpatialDistance(zeros(3, NQ, 3), zeros(NK, 3), zeros(NQ))),
        ShapeError, "x_q of shape (3, 5, 3)", "(2, 5, 3)", "may be 1"),
    "weight": (lambda: attend(SpatialDistance(zeros(NQ, 3), zeros(NK, 3), zeros(NK))),
        ShapeError, "weight of shape (7,)", "(2, 4, 5)", "may be 1"),
    "lengths_batch": (lambda: attend(mask=KeyPadding(ids(3))),
        ShapeError, "lengths of shape (3,)", "(*batch,) = (2,)", "may be 1"),
    "offsets_batch": (lambda: attend(mask=Causal(ids(3))),
        ShapeError, "offset of shape (3,)", "(*batch,) = (2,)", "may be 1"),
    "ids_length": (lambda: attend(mask=Segments(ids(NQ), ids(NQ))),
        ShapeError, "k_ids of shape (5,)", "(Nk,) = (7,)", "lengths"),
    "ids_batch": (lambda: attend(mask=Segments(ids(NQ).expand(3, NQ), ids(NK))),
        ShapeError, "q_ids of shape (3, 5)", "(2, 5)", "may be 1"),
    "ids_scalar": (lambda: Segments(ids(NQ)[0], ids(NK)),
        ShapeError, "q_ids without dimensions", "(*batch, N)", "each position"),
    "mask_columns": (lambda: attend(mask=bools(NQ, 1)), ShapeError, "mask of shape (5, 1)", "(Nk,) = (7,)", "lengths"),
    "mask_rows": (lambda: attend(mask=bools(3, NK)), ShapeError, "mask of shape (3, 7)", "(2, 4, 5, 7)", "may be 1"),
    # Devices.
    "key_elsewhere": (lambda: biased_attention(Q, K.to(ELSEWHERE), V),
        DeviceError, "cpu, meta and cpu", "one device", "together"),
    "values_elsewhere": (lambda: attend(DenseBias(zeros(NQ, NK, device=ELSEWHERE))),
        DeviceError, "values on meta", "query, cpu", ".to('cpu')"),
    "values_elsewhere_in_a_sum": (lambda: attend(DenseBias(zeros(NQ, NK)) + DenseBias(zeros(NQ, NK, device=ELSEWHERE))),
        DeviceError, "values on meta", "query, cpu", ".to('cpu')"),
    "slopes_elsewhere": (lambda: attend(ALiBi(zeros(HEADS, device=ELSEWHERE))),
        DeviceError, "slopes on meta", "query, cpu", ".to('cpu')"),
    "table_elsewhere": (lambda: attend(RelativePositionBias(zeros(5, device=ELSEWHERE))),
        DeviceError, "table on meta", "query, cpu", ".to('cpu')"),
    "positions_elsewhere": (lambda: attend(ALiBi(zeros(HEADS), q_positions=ids(NQ), k_positions=ids(NK, ELSEWHERE))),
        DeviceError, "k_positions on meta", "query, cpu", ".to('cpu')"),
    "factor_elsewhere": (lambda: attend(FactoredBias(zeros(NQ, 3), zeros(NK, 3, device=ELSEWHERE))),
        DeviceError, "k_factor on meta", "query, cpu", ".to('cpu')"),
    "points_elsewhere": (lambda: attend(SpatialDistance(zeros(NQ, 3), zeros(NK, 3, device=ELSEWHERE), zeros(NQ))),
        DeviceError, "x_k on meta", "query, cpu", ".to('cpu')"),
    "weight_elsewhere": (lambda: attend(SpatialDistance(zeros(NQ, 3), zeros(NK, 3), zeros(NQ, device=ELSEWHERE))),
        DeviceError, "weight on meta", "query, cpu", ".to('cpu')"),
    "lengths_elsewhere": (lambda: attend(mask=KeyPadding(ids(BATCH, ELSEWHERE))),
        DeviceError, "lengths on meta", "query, cpu", ".to('cpu')"),
    "offsets_elsewhere": (lambda: attend(mask=Causal(ids(BATCH)) & Causal(ids(BATCH, ELSEWHERE))),
        DeviceError, "offset on meta", "query, cpu", ".to('cpu')"),
    "ids_elsewhere": (lambda: attend(mask=Segments(ids(NQ), ids(NK, ELSEWHERE))),
        DeviceError, "k_ids on meta", "query, cpu", ".to('cpu')"),
    "mask_elsewhere": (lambda: attend(mask=bools(NQ, NK).to(ELSEWHERE)),
        DeviceError, "allowed on meta", "query, cpu", ".to('cpu')"),
    # What is not computed.
    "head_dim": (lambda: biased_attention(zeros(1, 2, 257), zeros(1, 2, 257), zeros(1, 2, 16)),
        UnsupportedError, "257 and 16", "1 to 256", "split the heads"),
    "head_dim_of_values": (lambda: biased_attention(zeros(1, 2, 16), zeros(1, 2, 16), zeros(1, 2, 264)),
        UnsupportedError, "16 and 264", "1 to 256", "split the heads"),
    "head_dim_0": (lambda: biased_attention(zeros(1, 2, 0), zeros(1, 2, 0), zeros(1, 2, 16)),
        UnsupportedError, "0 and 16", "1 to 256", "split"),
    "two_alibis": (lambda: attend(ALiBi(zeros(HEADS)) + ALiBi(zeros(HEADS), symmetric=True)),
        UnsupportedError, "sum of ALiBi", "at most one ALiBi", "DenseBias"),
    "two_tables": (lambda: attend(RelativePositionBias(zeros(5)) + RelativePositionBias(zeros(7))),
        UnsupportedError, "of 5 and 7 entries", "tables of one size", "repeat"),
    "kind_of_mask": (lambda: attend(mask=NotAMask()),
        UnsupportedError, "type NotAMask", "Causal, KeyPadding, Segments", "mask.dense"),
    "kind_of_term": (lambda: attend(NotATerm()),
        UnsupportedError, "type Tensor", "Rank, Linear, Tile or Table", "DenseBias"),
    # The paper's signature.
    "paper_dimensions": (lambda: paper(q=Q[0]),
        ShapeError, "q of shape (4, 5, 16)", "(B, N, H, C)", "biased_attention"),
    "paper_no_tensor": (lambda: paper(v=None), DtypeError, "v of type NoneType", "torch.Tensor", "as_tensor"),
    "paper_one_factor": (lambda: paper(k_bias=zeros(1, NK, 1, 3)),
        ShapeError, "only one", "both or neither", "other factor"),
    "paper_factor_dimensions": (lambda: paper(q_bias=zeros(NQ, 3), k_bias=zeros(NK, 3)),
        ShapeError, "q_bias of shape (5, 3)", "(B or 1, N, H or 1, R)", "dimensions"),
    "paper_factor_no_tensor": (lambda: paper(q_bias=[0.0], k_bias=[0.0]),
        DtypeError, "q_bias of type list", "torch.Tensor", "as_tensor"),
    "paper_mask_word": (lambda: paper(mask="causal"), DtypeError, "mask of type str", "torch.Tensor", "as_tensor"),
    "paper_mask_integers": (lambda: paper(mask=torch.ones(NQ, NK, dtype=torch.int64)),
        DtypeError, "mask of dtype torch.int64", "boolean", "mask.bool()"),
    "paper_scale_tensor": (lambda: paper(softmax_scale=torch.ones(())),
        DtypeError, "scale of type Tensor", "Python number", "multiply"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses_by_name_and_says_what_to_do(name: str) -> None:
    call, kind, found, wanted, remedy = REFUSALS[name]
    with pytest.raises(kind) as caught:
        call()
    error = caught.value
    assert type(error) is kind
    assert found in error.found
    assert wanted in error.wanted
    assert remedy in error.remedy
    assert str(error) == f"found: {error.found}; wanted: {error.wanted}; remedy: {error.remedy}"


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (ShapeError, ValueError),
        (DtypeError, TypeError),
        (DeviceError, ValueError),
        (UnsupportedError, NotImplementedError),
    ],
)
def test_errors_are_what_python_calls_them_too(kind: type, word: type) -> None:
    assert issubclass(kind, FlashBiasError)
    assert issubclass(kind, word)


def test_the_calls_that_are_refused_are_next_to_ones_that_work() -> None:
    """Or the refusals could come from something else that is wrong with them."""
    biases = (
        DenseBias(zeros(1, NK)), ALiBi(zeros(1)), FactoredBias(zeros(NQ, 3), zeros(1, HEADS, NK, 3)),
        SpatialDistance(zeros(NQ, 3), zeros(BATCH, NK, 3), zeros(1)),
        ALiBi(zeros(HEADS), q_positions=ids(NQ), k_positions=ids(NK).expand(1, NK)),
        RelativePositionBias(zeros(1)), RelativePositionBias(zeros(BATCH, 1, 7)),
    )  # fmt: skip
    masks = (Causal(0), KeyPadding(ids(1)), Causal(ids(BATCH)), Segments(ids(NQ), ids(NK)), bools(1, NK))
    for bias in biases:
        for mask in masks:
            assert attend(bias, mask=mask, scale=1).shape == (BATCH, HEADS, NQ, 8)
    assert paper(mask=bools(1, 1, 1, NK), q_bias=zeros(1, NQ, 1, 3), k_bias=zeros(1, NK, 1, 3)).shape == (2, NQ, 4, 8)
    assert biased_attention(zeros(1, 2, 256), zeros(1, 2, 256), zeros(1, 2, 1)).shape == (1, 2, 1)


def leaf(device: str) -> Tensor:
    return torch.randn(1, 2, 5, 16, device=device, requires_grad=True)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_second_derivatives(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHBIAS_BACKEND", backend)
    x = leaf(device if backend == "triton" else "cpu")
    (gradient,) = torch.autograd.grad(biased_attention(x, x, x).sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match=r"found: a second derivative.*remedy: use flashbias.reference"):
        torch.autograd.grad(gradient.sum(), x)


def test_sparse_mask(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anybody asks it for its address."""
    monkeypatch.setenv("FLASHBIAS_BACKEND", "triton")
    x = leaf(device).detach()
    with pytest.raises(UnsupportedError, match=r"found: mask of layout torch.sparse_coo"):
        biased_attention(x, x, x, mask=torch.eye(5, device=device, dtype=torch.bool).to_sparse())


def test_vmap(device: str) -> None:
    x = leaf(device).detach()
    with pytest.raises(UnsupportedError, match=r"found: torch.vmap.*wanted: batch dimensions in front"):
        torch.vmap(biased_attention)(x, x, x)
    with pytest.raises(UnsupportedError, match=r"found: torch.vmap"):
        torch.vmap(lambda key: biased_attention(x, key, x), in_dims=0)(x[None])

    def total(query: Tensor) -> Tensor:
        return biased_attention(query, x, x).square().sum()

    assert torch.equal(torch.func.functionalize(total)(x), total(x))
    with pytest.raises(UnsupportedError, match=r"found: torch.vmap"):
        torch.vmap(torch.func.grad(total))(x[None])
    with pytest.raises(UnsupportedError, match=r"found: torch.vmap"):
        torch.func.jacrev(lambda query: biased_attention(query, x, x).sum(-1))(x)
    with pytest.raises(UnsupportedError, match=r"found: a second derivative"):
        torch.func.grad(lambda query: torch.func.grad(total)(query).sum())(x)


@pytest.mark.parametrize("what", ["query", "slopes"])
def test_forward_mode(what: str, device: str) -> None:
    x, slopes = leaf(device).detach(), torch.rand(leaf(device).shape[-3], device=device)
    calls = {
        "query": (lambda query: biased_attention(query, x, x), x),
        "slopes": (lambda slopes: biased_attention(x, x, x, ALiBi(slopes)), slopes),
    }
    function, given = calls[what]
    with pytest.raises(UnsupportedError, match=r"found: forward-mode .*wanted: gradients by backward"):
        torch.func.jvp(function, (given,), (torch.ones_like(given),))
    with pytest.raises(UnsupportedError, match=r"found: forward-mode "):
        torch.func.jvp(torch.func.grad(lambda x: function(x).sum()), (given,), (torch.ones_like(given),))
    with forward_ad.dual_level():
        assert function(given) is not None, "without tangents it is an ordinary call"


@pytest.mark.parametrize("backend", ["Triton", "cuda", ""])
def test_backend_that_does_not_exist(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHBIAS_BACKEND", backend)
    x = leaf(device)
    with pytest.raises(UnsupportedError, match=f"found: FLASHBIAS_BACKEND={backend}; wanted: .*triton; remedy: unset"):
        biased_attention(x, x, x)


def test_backend_that_does_not_serve_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHBIAS_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = leaf("cpu")
    with pytest.raises(DeviceError, match=r"found: tensors on cpu for the backend triton; wanted: cpu .*remedy"):
        biased_attention(x, x, x)


@pytest.mark.gpu
def test_cpu_backend_for_cuda_tensors(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHBIAS_BACKEND", "cpu")
    x = leaf(device)
    with pytest.raises(DeviceError, match="found: tensors on cuda for the backend cpu"):
        biased_attention(x, x, x)


def test_triton_that_cannot_be_imported(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHBIAS_BACKEND", "triton")
    monkeypatch.setattr(plan, "_has_triton", lambda: False)
    x = leaf(device)
    with pytest.raises(DeviceError, match=r"triton cannot be imported; wanted: triton.*remedy: pip install triton"):
        biased_attention(x, x, x)


def three_groups(device: str) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 2, 2, 1, 5, 16, device=device), torch.randn(2, 1, 2, 1, 5, 5, device=device)


@pytest.mark.parametrize("kind", ["values", "mask"])
def test_pattern_of_three_batch_groups_on_triton(kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHBIAS_BACKEND", "triton")
    x, values = three_groups(device)
    bias, mask = (DenseBias(values), None) if kind == "values" else (None, values > 0)
    with pytest.raises(UnsupportedError, match=r"in a pattern of 3 groups; wanted: .* two groups .*; remedy: permute"):
        biased_attention(x, x, x, bias, mask=mask)


def test_pattern_of_three_batch_groups_follows_its_remedy(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, values = three_groups("cpu")
    monkeypatch.setenv("FLASHBIAS_BACKEND", "cpu")
    wanted = biased_attention(x, x, x, DenseBias(values))
    monkeypatch.setenv("FLASHBIAS_BACKEND", "triton")
    x, values = x.to(device), values.to(device)
    y = x.transpose(1, 2)
    permuted = biased_attention(y, y, y, DenseBias(values.transpose(1, 2))).transpose(1, 2)
    expanded = biased_attention(x, x, x, DenseBias(values.expand(2, 2, 2, 1, 5, 5).contiguous()))
    torch.testing.assert_close(permuted.cpu(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(expanded.cpu(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("mask", ["none", "causal", "causal_tensor", "lengths", "segments", "allowed", *JOINS])
def test_checks_never_read_values(bias: str, mask: str) -> None:
    """Fake tensors have none: whoever reads one gets an error."""
    inputs = build(Case(bias, mask, n_q=6, n_k=9))
    assert mask in (*MASKS, *JOINS)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:

        def fake(tensor: Any) -> Any:
            return mode.from_tensor(tensor) if isinstance(tensor, Tensor) else tensor

        leaves = {name: fake(leaf).requires_grad_() for name, leaf in inputs.leaves.items()}
        attention_mask: Mask | None = None
        for part in inputs.mask.parts() if inputs.mask is not None else ():
            own = type(part)(*(fake(value) for value in vars(part).values()))
            attention_mask = own if attention_mask is None else attention_mask & own
        own_bias = inputs.make_bias(leaves)
        if isinstance(own_bias, ALiBi):
            own_bias.q_positions, own_bias.k_positions = fake(own_bias.q_positions), fake(own_bias.k_positions)
        query, key, value = (leaves[name] for name in ("query", "key", "value"))
        out, lse = biased_attention(query, key, value, own_bias, mask=attention_mask, return_lse=True)
        gradients = torch.autograd.grad((out.sum() + lse.sum()), list(leaves.values()), materialize_grads=True)
    assert out.shape == (2, 2, 6, 16)
    assert lse.shape == (2, 2, 6)
    assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in leaves.values()]


def test_works_on_meta_tensors() -> None:
    q, k, v = (x.to("meta") for x in (Q, K, V))
    bias = ALiBi(zeros(HEADS, device="meta")) + SpatialDistance(
        *(zeros(n, 3, device="meta") for n in (NQ, NK)), zeros(NQ, device="meta")
    )
    out, lse = biased_attention(q, k, v, bias, mask=KeyPadding(ids(BATCH, "meta")), is_causal=True, return_lse=True)
    assert (out.shape, out.device.type) == ((BATCH, HEADS, NQ, 8), "meta")
    assert (lse.shape, lse.dtype) == ((BATCH, HEADS, NQ), torch.float32)
