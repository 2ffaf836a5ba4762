"""Which code serves a call, and in which of `tiles.py`. Every decision of that kind is made here, by pure functions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from .errors import DeviceError, UnsupportedError
from .tiles import Tiles, select, triton_version

BACKENDS = ("auto", "cpu", "triton")
LONG = 1024  # keys
SHORT = 1024  # keys: rows of a dense bias up to here are short
FEW = 16  # queries
FEW_KEYS = 8  # of a last tile that are computed with alone: no product has fewer columns
TEAM_WORK = 1 << 27  # scores from which teams pay forward: what describes tensors to them takes the host longer
DENSE_WORK = 0.5  # of them with a dense bias, where teams gain more
EXPANDED_RANK = 32  # from which factors of all the batch are multiplied out to a dense bias
REGISTERS = 1 << 16  # of a processor
ROUNDS, MEMBERS = 16, 16  # of programs, at most, and that a program sums over, at least
FEW_SCORES = 1 << 23  # up to which accuracy is worth more than time
# Devices with half as many units of float64 as of fp32, where others have few, and since when triton has products
# of float64 that use them well.
DOUBLES = {(8, 0): (3, 6), (9, 0): (3, 6), (10, 0): (3, 9)}
PART = 512  # keys that a program gets at least where several share a tile's


def backend(device: torch.device) -> str:
    """`"triton"` or `"cpu"`, from the device and the environment variable `FLASHBIAS_BACKEND`.

    Raises:
        UnsupportedError: for another value of the variable.
        DeviceError: where the backend does not serve the device, or triton is missing.
    """
    wanted = os.environ.get("FLASHBIAS_BACKEND", "auto")
    if wanted not in BACKENDS:
        raise UnsupportedError(f"FLASHBIAS_BACKEND={wanted}", "one of " + ", ".join(BACKENDS), "unset it")
    chosen = ("cpu" if device.type == "cpu" else "triton") if wanted == "auto" else wanted
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type not in ("cpu", "cuda") or ((chosen == "cpu") != (device.type == "cpu") and not interpreted):
        raise DeviceError(
            f"tensors on {device.type} for the backend {chosen}",
            "cpu tensors for the backend cpu, cuda tensors for triton (cpu tensors with TRITON_INTERPRET=1)",
            "move the tensors, or unset FLASHBIAS_BACKEND",
        )
    if chosen == "triton" and not _has_triton():
        raise DeviceError("CUDA tensors, but triton cannot be imported", "triton >= 3.3", "pip install triton")
    return chosen


@cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401 - whether it imports is the question
    except ImportError:
        return False
    return True


def tiles(kind: str, device: torch.device, dtype: torch.dtype, constants: Mapping[str, Any]) -> Tiles:
    """The tiles of the kernel `kind` ("forward", "queries", "keys" or "values"; "double ...": where in float64).

    `constants` are those of the kernel, and what else there is: FEW (`FEW` queries or fewer), DENSE (a dense bias),
    LONG (without one, `LONG` keys or more), TABLE (a bias by distance), ALLOWED (a boolean mask), POSITIONS (given
    ones, or ids of segments), SLOPES, and BARE (no slopes, and no mask but of lengths).
    """
    if device.type != "cuda":
        return Tiles(32, 32, 4, 1)
    return select(kind, _capability(device), dtype.itemsize, constants)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def teams(kind: str, query: torch.Tensor, n_k: int, constants: Mapping[str, Any]) -> Tiles | None:
    """The tiles with which teams serve a call, or None where the general kernel does.

    `kind` is "forward" (`kernels/hopper.py`), "queries" or, where their factor has a gradient too, "q_factor"
    (`kernels/hopper_queries.py`), "keys" or "k_factor" (`kernels/hopper_keys.py`), or "values"
    (`kernels/hopper_values.py`).

    `constants` as for `tiles`, and PLAIN: no mask but the causal one, and of the bias' terms only factors and slopes by
    order, or else only a dense bias that all the batch shares, all in tensors that can be copied tile by tile.
    """
    if not constants["PLAIN"] or not has_teams(query.device):
        return None
    rows, n_q = query.shape[:-2].numel(), query.shape[-2]
    widest = 64 if kind == "values" else 128  # beyond, the warp that loads for a bias' gradient spills registers
    if query.dtype.itemsize != 2 or max(constants["WIDTH"], constants["WIDTH_V"], constants["RANK"]) > widest:
        return None
    if not constants["FOLDED"] and (kind != "forward" or constants["RANK"] < 2 * constants["WIDTH"]):
        return None  # queries in two halves cost as many columns again
    found = select(f"{kind} teams", (9, 0), 2, constants)
    own = cdiv(n_k, found.block_n) if kind in ("keys", "k_factor") else cdiv(n_q, found.block_m)
    programs = team_programs(found, own, query.shape, constants)
    # With gradients the host has a millisecond to do.
    least = TEAM_WORK * (DENSE_WORK if constants["DENSE"] else 1 if kind == "forward" else 8)
    worth = rows * n_q * n_k >= least and programs >= _processors(query.device)
    return found if worth and n_q > FEW else None


def expands(query: torch.Tensor, n_k: int, q_factor: torch.Tensor, k_factor: torch.Tensor) -> bool:
    """Whether factors are multiplied out to a dense bias, which teams read: where all the batch shares it.

    It is no larger than the queries are, so that memory grows as theirs does.
    """
    shared = all(factor.shape[:-3].numel() == 1 for factor in (q_factor, k_factor))
    batch, c = query.shape[:-3].numel(), query.shape[-1]
    fits = shared and n_k <= batch * c and q_factor.dtype == query.dtype and query.dtype.itemsize == 2
    worth = q_factor.shape[-1] >= EXPANDED_RANK and query.shape[:-1].numel() * n_k >= TEAM_WORK * DENSE_WORK
    return fits and worth and has_teams(query.device)


def team_programs(found: Tiles, n_tiles: int, shape: torch.Size, constants: Mapping[str, Any]) -> int:
    """Programs for so many tiles of own rows and `(*batch, H, ...)`.

    The teams of one have neighbouring tiles, or, where there is a dense bias, the same tile of neighbouring batch rows.
    """
    heads, batch = shape[-3], shape[:-3].numel()
    if constants["DENSE"]:
        return n_tiles * heads * cdiv(batch, found.teams)
    return cdiv(n_tiles, found.teams) * heads * batch


def is_short(n_k: int, constants: Mapping[str, Any]) -> bool:
    """Whether rows are so short that a program of teams takes several tiles of queries, one after the other."""
    return constants["DENSE"] and n_k <= SHORT


def tails(found: Tiles, n_k: int, constants: Mapping[str, Any]) -> tuple[tuple[int, bool], ...]:
    """With how many keys of the last tile teams compute at lengths like this one, forward: a few, or all.

    And whether it is known to have no others, which only short rows gain by. All without a dense bias: each case is
    another kernel to compile, and rows without one are long.
    """
    few, every, whole = (FEW_KEYS, False), (found.block_n, False), (found.block_n, True)
    return (few, every, whole) if is_short(n_k, constants) else (few, every) if constants["DENSE"] else (every,)


def tail(found: Tiles, n_k: int, constants: Mapping[str, Any]) -> tuple[int, bool]:
    """That of `tails` for this length."""
    last = (n_k - 1) % found.block_n + 1
    fitting = [case for case in tails(found, n_k, constants) if last <= case[0]]
    return fitting[-1] if last == found.block_n else fitting[0]


def values_programs(found: Tiles, n_q: int, n_k: int) -> int:
    """Programs for one plane of a dense bias' gradient, of one team each."""
    return cdiv(n_q, found.block_m) * cdiv(n_k, found.block_n)


@cache
def has_teams(device: torch.device) -> bool:
    """Whether teams of warps can be had there: on Hopper, in triton since 3.6."""
    hopper = device.type == "cuda" and torch.version.cuda is not None and _capability(device)[0] == 9
    return hopper and triton_version() >= (3, 6)


def precision(dtype: torch.dtype, width: int, device: torch.device) -> str:
    """How products of fp32 are formed.

    Six of bf16 are more accurate than ordinary units, three of tf32 less, and for many features not enough.
    """
    if has_bf16x6(device):
        return "bf16x6"
    return "ieee" if dtype == torch.float32 and width > 128 else "tf32x3"


@cache
def has_bf16x6(device: torch.device) -> bool:
    """Whether a product of fp32 can be formed by six of bf16: in triton since 3.6, not in its interpreter."""
    return device.type == "cuda" and triton_version() >= (3, 6)


def has_doubles(device: torch.device) -> bool:
    """Whether scores can be formed in float64 where inputs are fp32.

    In fp32 what comes of them misses the accuracy bound wherever an eager computation errs by chance less than it
    mostly does, unless its errors are several times smaller: few numbers, or sums of all scores.
    """
    return device.type != "cuda" or _capability(device) in DOUBLES


def sums_doubles(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of float64, where inputs of `dtype` need any, are summed feature by feature.

    Triton has none there that use the units well, or, its interpreter, none at all.
    """
    if dtype != torch.float32 or not has_doubles(device):
        return False
    return triton_version() < (DOUBLES[_capability(device)] if device.type == "cuda" else (3, 6))


def is_few(scores: int) -> bool:
    """Whether in so many scores chance weighs most, and what makes them more accurate takes the least time."""
    return scores <= FEW_SCORES


@cache
def has_descriptors(device: torch.device) -> bool:
    """Whether tiles can be read by tensor descriptors there: by hardware since sm_90, in triton since 3.4."""
    if triton_version() < (3, 4):
        return False
    return device.type != "cuda" or _capability(device) >= (9, 0)


def splits(programs: int, members: int, device: torch.device) -> int:
    """Into how many parts a sum over `members` is split, so that `programs` times as many fill the device."""
    return max(1, min(members, cdiv(4 * _processors(device), programs)))


def places(found: Tiles, device: torch.device) -> int:
    """How many programs of teams run at a time, by their registers."""
    return _processors(device) * max(REGISTERS // (128 * (found.teams + 1) * found.registers), 1)


def values_splits(found: Tiles, programs: int, members: int, device: torch.device) -> int:
    """Into how many parts teams split a sum over `members`: as few as keep nearly the whole device busy to the end."""
    most = max(1, min(members // MEMBERS, ROUNDS * places(found, device) // programs))
    rounds = [cdiv(parts * programs, places(found, device)) / parts for parts in range(1, most + 1)]
    return next(parts for parts, time in enumerate(rounds, 1) if time <= 1.02 * min(rounds))


def key_splits(programs: int, n_k: int, device: torch.device) -> int:
    """Into how many parts the keys of a tile of queries are split, where `programs` tiles leave the device idle."""
    return max(1, min(n_k // PART, 2 * _processors(device) // programs, 64)) if device.type == "cuda" else 1


def width(size: int) -> int:
    """The inner width of a tensor-core product over `size` features."""
    return max(16, power_of_2(size))


def power_of_2(size: int) -> int:
    """The first that is not smaller."""
    return 1 << (size - 1).bit_length()


def chunk(rank: int) -> int:
    """How many of `rank` factor columns, a multiple of 16, one product takes."""
    return min(rank & -rank, 128) if rank else 16


def slices(columns: int) -> list[tuple[int, int]]:
    """Factor columns, a multiple of 16, in slices of powers of two up to 64; one empty slice where there are none."""
    pieces, start = [], 0
    while start < columns:
        size = min(64, 1 << ((columns - start).bit_length() - 1))
        pieces.append((start, start + size))
        start += size
    return pieces or [(0, 0)]


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


# Picoseconds that a score takes on an H200 at 16 bits (docs/kernels.md): without a bias at head dim 32, for a column of
# factors more, for an entry of a dense bias more (both from shared factors of rank 16 and a shared dense bias at N 576,
# rank 96 and dense at N 1218), and for that entry's bytes from memory (data sheet), which rows that share it share.
SCORE, COLUMN, ENTRY, READ = 0.59, 0.0027, 0.22, 0.42
MARGIN = 0.95  # factors have to be faster by more than what the model may be wrong


def factors_pay(
    n_q: int, n_k: int, head_dim: int, rank: int, batch_rows: int, device_kind: str, itemsize: int = 2
) -> bool:
    """Whether factors of a bias are faster than the bias itself, forward, where both are ready.

    `batch_rows` is how many batch rows share the bias, `itemsize` the bytes of an element of query. Where nothing was
    measured the answer is no: in fp32 on a GPU. On a CPU a dense bias was as fast as rank 4 and faster than rank 16,
    from 64 to 8,192 keys.
    """
    if device_kind != "cuda" or itemsize > 2 or n_q == 1:
        return False
    base = SCORE + 2 * COLUMN * (width(head_dim) - 32)  # a feature is a column of two products
    columns = cdiv(rank, 16) * 16
    return base + COLUMN * columns < MARGIN * (base + ENTRY + READ / batch_rows)
