"""Which code serves a call, and in which tiles. Every decision of that kind is made here, by pure functions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .errors import DeviceError, UnsupportedError

BACKENDS = ("auto", "cpu", "triton")
LONG = 1024  # keys
FEW = 16  # queries
LOADER = 24  # registers of a warp that loads
TEAM_WORK = 1 << 27  # scores from which teams pay forward: what describes tensors to them takes the host longer
EXPANDED_RANK = 64  # from which factors of all the batch are multiplied out to a dense bias
REGISTERS = 1 << 16  # of a processor
ROUNDS, MEMBERS = 16, 16  # of programs, at most, and that a program sums over, at least
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


@dataclass(frozen=True)
class Tiles:
    """A kernel's tile of queries by keys, its warps, how many tiles are in flight.

    columns: the number of factor columns that get a gradient is rounded up to a multiple of it. Narrow products spread
    badly over many warps: 64 columns can need fewer registers than 16.
    registers: a thread's, at most, where fewer than the compiler would take let one more block run beside; or 0.
    teams: of warps, each with a tile of queries of its own, or of a row of the batch, beside one warp that loads
    (kernels/teams.py); or 0. Then `registers` are those of a thread on the average.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    columns: int = 16
    registers: int = 0
    teams: int = 0

    def options(self) -> dict[str, Any]:
        """As a launch takes them."""
        options = {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,  # said outright, since triton's default is to change
        }
        if self.teams:
            # Registers go from the four warps around the one that loads to the teams, in steps of eight.
            spare = self.registers * 4 * (self.teams + 1) - LOADER * 4
            options |= {"TEAMS": self.teams, "REGISTERS": spare // (4 * self.teams) // 8 * 8, "STAGES": self.num_stages}
        # Without teams another version of the compiler, which needs more, would spill them.
        capped = self.registers and (self.teams or _triton_version() == (3, 6))
        return options | {"maxnreg": self.registers} if capped else options


def tiles(kind: str, device: torch.device, dtype: torch.dtype, constants: Mapping[str, Any]) -> Tiles:
    """The tiles of the kernel `kind` ("forward", "queries", "keys" or "values").

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


# A kernel's tile of queries by keys / warps / stages, and where it matters / columns / registers / teams, at head dims
# up to 32, 64, 128 and 256. A second word makes a row that of some calls: the first that applies of the traits in
# `select`. For Hopper: the fastest on an H200, or where they spill registers, neighbours that do not. For the others
# nothing was measured: they are chosen to compile within the shared memory and, but for what tests/core/test_compile.py
# names, without spills.
TILES = {
    "hopper": {
        "forward few pairs":  "16x64/4/3          16x64/4/3         16x64/4/2     16x16/4/2",
        "forward few":        "16x128/4/3         16x64/4/4         16x128/4/2    16x16/4/2",
        "forward":            "64x64/4/3          128x64/8/3        128x64/8/3    64x32/8/2",
        "forward bare":       "64x64/4/3/16/96    128x64/8/3        128x64/8/3    64x32/8/2",
        "forward bare long":  "64x128/4/3/16/168  128x64/8/3        128x64/8/3    64x32/8/2",
        "forward long":       "64x128/4/3         128x64/8/3        128x64/8/3    64x32/8/2",
        "forward slopes":     "64x64/4/3/16/112   64x64/4/3/16/168  64x64/4/3     64x32/8/2",
        "forward dense":      "64x64/4/3/16/96    64x64/4/3         64x32/8/2     64x32/8/2",
        "forward only table": "64x64/4/3          128x64/8/3        64x32/8/2     64x32/8/2",
        "forward table ids":  "64x32/4/3          64x64/4/3         64x32/8/2     64x32/8/2",
        "forward pairs":      "64x64/4/3          64x64/4/3         64x32/8/2     64x32/8/2",
        "forward positions":  "64x64/4/3          128x64/8/3        128x64/8/3    64x32/8/2",
        "forward rank":       "128x64/8/3         128x64/8/3        32x32/4/2     64x32/8/2",
        "forward teams dense":        "64x64/4/2/16/80/2  64x64/4/2/16/80/1    64x64/4/2/16/128/1",
        "forward teams rank causal":  "64x64/4/2/16/80/1  64x64/4/2/16/128/1   64x64/4/2/16/168/2",
        "forward teams rank":         "64x64/4/2/16/80/2  64x64/4/2/16/128/1   64x64/4/2/16/168/2",
        "forward teams causal":       "64x64/4/2/16/64/1  64x128/4/2/16/128/1  64x128/4/2/16/168/2",
        "forward teams slopes":       "64x64/4/2/16/64/1  64x128/4/2/16/128/1  64x128/4/2/16/168/2",
        "forward teams":       "64x64/4/2/16/72/2  64x128/4/2/16/128/3 64x128/4/2/16/168/2",
        "queries teams dense": "64x64/4/3/16/80/1  64x64/4/2/16/128/1 64x32/4/2/16/128/1",
        "queries teams":       "64x64/4/3/16/128/1 64x64/4/3/16/128/1 64x32/4/3/16/128/1",
        "q_factor teams":      "64x64/4/3/16/128/1 64x64/4/3/16/128/1 64x32/4/3/16/128/1",
        "keys teams dense":    "32x64/4/3/16/80/1  64x64/4/2/16/128/1 32x64/4/2/16/128/1",
        "keys teams factors":  "32x64/4/3/16/64/1  64x64/4/2/16/128/1 32x64/4/3/16/128/1",
        "keys teams":          "64x64/4/2/16/128/1 64x64/4/2/16/128/1 32x64/4/3/16/128/1",
        "k_factor teams":      "64x64/4/2/16/128/1 64x64/4/3/16/128/1 32x64/4/3/16/128/1",
        "values teams":        "64x64/4/3/16/80/1  64x64/4/2/16/128/1",
        "queries":            "64x64/4/3/16/168   64x64/4/2/16/168  128x64/8/2    32x32/8/1",
        "queries slopes":     "64x64/4/3/16/168   64x64/4/3         64x32/4/2     32x32/8/1",
        "queries dense":      "64x64/4/3          64x64/4/2         64x32/8/2     32x32/8/1",
        "queries only table": "64x32/4/3          64x64/4/2         64x32/8/2     32x32/8/1",
        "queries pairs":      "64x32/4/3          64x32/4/2         64x32/8/2     32x32/8/1",
        "queries positions":  "64x32/4/3          64x32/4/2         64x32/8/2     32x32/8/1",
        "queries rank":       "64x32/4/3          64x32/8/2         16x16/8/1/64  16x16/8/1/64",
        "keys":               "32x128/4/3         64x64/4/2         32x128/8/2    32x32/8/1",
        "keys slopes":        "32x128/4/3         32x128/8/3        32x128/8/2    32x32/8/1",
        "keys dense":         "32x128/4/3         32x128/8/3        32x64/8/2     16x16/8/1/64",
        "keys only table":    "32x64/4/3          64x64/4/2         32x128/8/2    16x16/8/1/64",
        "keys pairs":         "32x64/4/3          32x128/8/3        32x64/8/2     16x16/8/1/64",
        "keys positions":     "32x64/4/3          32x128/8/3        32x64/8/2     32x32/8/1",
        "keys rank":          "32x64/4/3          32x64/8/2         16x16/8/1/64  16x16/8/1/64",
        "values dense":       "64x64/4/3          128x64/8/2        64x64/8/2     16x16/8/1/64",
        "values":             "64x64/4/2          64x32/4/2         64x64/8/2     16x16/8/1/64",
    },
    "blackwell": {
        "forward few":   "16x64/4/2     16x64/4/2     16x32/4/2     16x16/8/1/64",
        "forward":       "64x32/4/2     64x32/4/2     64x32/4/2     32x32/4/2",
        "forward table": "32x32/4/2     32x32/4/2     32x32/4/2     32x32/4/2",
        "queries":       "32x32/8/1/64  32x32/8/1/64  32x32/8/1/64  16x16/8/1/64",
        "queries rank":  "32x32/4/2/64  32x32/4/2/64  32x32/4/2/64  16x16/8/1/64",
        "keys":          "32x32/8/1/64  32x32/8/1/64  32x32/8/1/64  16x16/8/1/64",
        "values":        "32x32/4/2     32x32/4/2     32x32/8/1     16x16/8/1/64",
    },
    "ampere": {  # Ada and the small Blackwell too: they have Ampere's tensor cores, and less shared memory
        "forward few":       "16x64/4/2     16x64/4/2     16x32/4/2     16x16/8/1/64",
        "forward":           "64x64/4/2     64x64/4/2     64x32/4/2     32x32/4/2",
        "forward table ids": "32x32/4/2     32x32/4/2     32x32/4/1     16x16/8/1",
        "forward pairs":     "64x64/4/2     32x32/4/2     32x32/4/2     32x32/4/2",
        "forward slopes":    "64x64/4/2     32x32/4/2     32x32/4/2     32x32/4/2",
        "forward rank":      "128x64/8/2    128x64/8/2    16x32/4/2     32x32/4/2",
        "queries":           "32x32/4/2/64  32x32/4/2/64  32x32/4/2/64  16x16/8/1/64",
        "queries pairs":     "32x32/4/2/64  32x32/4/2/64  32x32/4/2/64  16x16/2/1/64",
        "queries rank":      "32x32/4/2/64  32x32/4/2/64  16x16/4/1/64  16x16/8/1/64",
        "keys":              "32x32/4/2/64  32x32/4/2/64  32x32/4/2/64  16x16/8/1/64",
        "keys rank":         "32x32/4/2/64  32x32/4/2/64  16x16/4/1/64  16x16/8/1/64",
        "keys pairs":        "32x32/4/2/64  32x32/4/2/64  32x16/4/2/64  16x16/8/1/64",
        "keys positions":    "32x32/4/1/64  32x32/4/2/64  32x32/4/2/64  16x16/8/1/64",
        "values":            "32x32/4/2     32x32/4/2     32x32/4/2     16x16/8/1/64",
        "values table ids":  "32x32/4/2     32x32/4/2     32x16/4/2     16x16/8/1/64",
    },
    "hopper fp32": {  # fewer than 64 rows: with more, triton 3.6 forms wrong products of six
        "forward":         "32x32/2/2     32x32/4/1     32x32/4/1     32x32/8/1",
        "forward rank":    "32x32/8/1     32x32/8/1     16x16/4/1     16x16/4/1",
        "forward table":   "16x16/4/1     16x16/8/1     16x16/8/1     16x16/8/1",
        "queries":         "32x16/2/1/32  32x16/4/1/64  16x32/4/1/64  16x16/8/1/64",
        "queries rank":    "16x16/4/1/64  16x16/4/1/64  16x16/4/1/64  16x16/4/1/64",
        "queries factors": "32x16/2/1/32  16x32/4/1/64  16x32/8/1/64  16x16/8/1/64",
        "queries table":   "16x16/8/1/64  16x16/8/1/64  16x16/8/1/64  16x16/8/1/64",
        "keys":            "16x32/2/1/32  16x32/4/1/64  16x32/4/1/64  16x16/8/1/64",
        "keys rank":       "16x16/4/1/64  16x16/8/1/64  16x16/4/1/64  16x16/8/1/64",
        "keys table":      "16x16/8/1/64  16x16/8/1/64  16x16/8/1/64  16x16/8/1/64",
        "values":          "32x32/4/1     32x32/8/1     32x32/4/1     32x32/4/1",
        "values table":    "16x16/4/1     16x16/8/1     16x16/8/1     16x16/8/1",
    },
    "fp32": {
        "forward":       "32x32/8/1     32x32/8/1     16x16/4/1     16x16/4/1",
        "forward table": "32x32/8/1     16x16/8/1     16x16/8/1     16x16/8/1",
        "queries":       "16x16/4/1/64  16x16/4/1/64  16x16/4/1/64  16x16/8/1/64",
        "queries table": "16x16/8/1/64  16x16/8/1/64  16x16/8/1/64  16x16/8/1/64",
        "keys":          "16x16/4/1/64  16x16/8/1/64  16x16/4/1/64  16x16/8/1/64",
        "keys rank":     "16x16/8/1/64  16x16/8/1/64  16x16/4/1/64  16x16/8/1/64",
        "keys table":    "16x16/8/1/64  16x16/8/1/64  16x16/8/1/64  16x16/8/1/64",
        "values":        "16x16/4/1     16x16/4/1     16x16/4/1     16x16/4/1",
        "values table":  "16x16/4/1     16x16/8/1     16x16/8/1     16x16/8/1",
    },
}  # fmt: skip


def select(kind: str, capability: tuple[int, int], itemsize: int, constants: Mapping[str, Any]) -> Tiles:
    """The tiles for a kernel's constants and `itemsize` bytes an element on a device of that compute capability."""
    family = {9: "hopper", 10: "blackwell", 11: "blackwell"}.get(capability[0], "ampere")
    rows = TILES[family] if itemsize < 4 else TILES.get(f"{family} fp32", TILES["fp32"])
    width, rank = max(constants["WIDTH"], constants["WIDTH_V"]), constants["RANK"]
    wide = rank > (32 if width <= 128 else 0)
    pairs = constants["DENSE"] or constants["ALLOWED"] or constants["TABLE"]
    tied = constants["POSITIONS"] or constants["SLOPES"]
    traits = {
        "few pairs": constants["FEW"] and (wide or pairs),
        "few": constants["FEW"],
        "rank causal": wide and constants["CAUSAL"],
        "rank": wide,
        "causal": constants["CAUSAL"],
        "dense": constants["DENSE"] and constants["BARE"] and rank == 0,
        "only table": constants["TABLE"] and not (rank or constants["DENSE"] or constants["ALLOWED"] or tied),
        "table ids": constants["TABLE"] and constants["POSITIONS"],
        "pairs": pairs,
        "table": constants["TABLE"],
        "factors": rank > 0,
        "positions": constants["POSITIONS"],
        "slopes": constants["SLOPES"],
        "bare long": constants["BARE"] and constants["LONG"],
        "long": constants["LONG"],
        "bare": constants["BARE"],
    }
    names = (f"{kind} {trait}" for trait, given in traits.items() if given)
    row = next((rows[name] for name in names if name in rows), rows[kind]).split()
    if rank > 128:  # several chunks of columns need as much shared memory as a wide head
        width = max(width, 128)
    return _parse(row[max(0, width.bit_length() - 6)])


@cache
def _parse(text: str) -> Tiles:
    return Tiles(*map(int, text.replace("x", "/").split("/")))


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
    # With gradients the host has a millisecond to do; those of a dense bias gain more, its forward pass less.
    least = 2 * TEAM_WORK if constants["DENSE"] else TEAM_WORK if kind == "forward" else 8 * TEAM_WORK
    worth = rows * n_q * n_k >= least and programs >= _processors(query.device)
    return found if worth and n_q > FEW else None


def expands(query: torch.Tensor, n_k: int, q_factor: torch.Tensor, k_factor: torch.Tensor) -> bool:
    """Whether factors are multiplied out to a dense bias, which teams read: where all the batch shares it.

    It is no larger than the queries are, so that memory grows as theirs does.
    """
    shared = all(factor.shape[:-3].numel() == 1 for factor in (q_factor, k_factor))
    batch, c = query.shape[:-3].numel(), query.shape[-1]
    fits = shared and n_k <= batch * c and q_factor.dtype == query.dtype
    return fits and q_factor.shape[-1] >= EXPANDED_RANK and query.dtype.itemsize == 2 and has_teams(query.device)


def team_programs(found: Tiles, n_tiles: int, shape: torch.Size, constants: Mapping[str, Any]) -> int:
    """Programs for so many tiles of own rows and `(*batch, H, ...)`.

    The teams of one have neighbouring tiles, or, where there is a dense bias, the same tile of neighbouring batch rows.
    """
    heads, batch = shape[-3], shape[:-3].numel()
    if constants["DENSE"]:
        return n_tiles * heads * cdiv(batch, found.teams)
    return cdiv(n_tiles, found.teams) * heads * batch


def values_programs(found: Tiles, n_q: int, n_k: int) -> int:
    """Programs for one plane of a dense bias' gradient, whose teams stand two by two."""
    rows = min(found.teams, 2)
    return cdiv(n_q, found.block_m * rows) * cdiv(n_k, found.block_n * (found.teams // rows))


@cache
def has_teams(device: torch.device) -> bool:
    """Whether teams of warps can be had there: on Hopper, in triton since 3.6."""
    hopper = device.type == "cuda" and torch.version.cuda is not None and _capability(device)[0] == 9
    return hopper and _triton_version() >= (3, 6)


def precision(dtype: torch.dtype, width: int, device: torch.device) -> str:
    """How products of fp32 are formed.

    Six of bf16 are more accurate than ordinary units, three of tf32 less, and for many features not enough.
    """
    if has_bf16x6(device):
        return "bf16x6"
    return "ieee" if dtype == torch.float32 and width > 128 else "tf32x3"


@cache
def _triton_version() -> tuple[int, ...]:
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2]))


@cache
def has_bf16x6(device: torch.device) -> bool:
    """Whether a product of fp32 can be formed by six of bf16: in triton since 3.6, not in its interpreter."""
    return device.type == "cuda" and _triton_version() >= (3, 6)


@cache
def has_descriptors(device: torch.device) -> bool:
    """Whether tiles can be read by tensor descriptors there: by hardware since sm_90, in triton since 3.4."""
    if _triton_version() < (3, 4):
        return False
    return device.type != "cuda" or _capability(device) >= (9, 0)


def splits(programs: int, members: int, device: torch.device) -> int:
    """Into how many parts a sum over `members` is split, so that `programs` times as many fill the device."""
    return max(1, min(members, cdiv(4 * _processors(device), programs)))


def values_splits(found: Tiles, programs: int, members: int, device: torch.device) -> int:
    """Into how many parts teams split a sum over `members`: as few as keep nearly the whole device busy to the end."""
    places = _processors(device) * max(REGISTERS // (128 * (found.teams + 1) * found.registers), 1)
    most = max(1, min(members // MEMBERS, ROUNDS * places // programs))
    rounds = [cdiv(parts * programs, places) / parts for parts in range(1, most + 1)]
    return next(parts for parts, time in enumerate(rounds, 1) if time <= 1.02 * min(rounds))


def key_splits(programs: int, n_k: int, device: torch.device) -> int:
    """Into how many parts the keys of a tile of queries are split, where `programs` tiles leave the device idle."""
    return max(1, min(n_k // PART, 2 * _processors(device) // programs, 64)) if device.type == "cuda" else 1


def width(size: int) -> int:
    """The inner width of a tensor-core product over `size` features."""
    return max(16, 1 << (size - 1).bit_length())


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
