"""In which tiles of queries by keys each kernel runs on which devices: tables of what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

LOADER = 24  # registers of a warp that loads
ROOM = 248  # registers of a thread


@dataclass(frozen=True)
class Tiles:
    """A kernel's tile of queries by keys, its warps, how many tiles are in flight.

    columns: the number of factor columns that get a gradient is rounded up to a multiple of it. Narrow products spread
    badly over many warps: 64 columns can need fewer registers than 16.
    registers: a thread's, at most, where fewer than the compiler would take let one more block run beside; or ROOM,
    where triton 3.9 would take so few for that that it spills some; or, where 3.6 would too, more than ROOM; or 0.
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
        }
        if self.teams:
            # Registers go from the four warps around the one that loads to the teams, in steps of eight.
            spare = self.registers * 4 * (self.teams + 1) - LOADER * 4
            options |= {"TEAMS": self.teams, "REGISTERS": spare // (4 * self.teams) // 8 * 8, "STAGES": self.num_stages}
        # Without teams versions of the compiler but 3.6 need more, and would spill them; 3.6 needs no ROOM.
        general = self.registers > ROOM or (self.registers == ROOM) != (triton_version() == (3, 6))
        capped = self.registers and (self.teams or general)
        return options | {"maxnreg": self.registers} if capped else options


# A kernel's tile of queries by keys / warps / stages, and where it matters / columns / registers / teams, at head dims
# up to 32, 64, 128 and 256. A second word makes a row that of some calls: the first that applies of the traits in
# `select`. For Hopper, and in fp32 for all: the fastest on an H200, or where they spill registers, neighbours that do
# not. For the others nothing was measured: they are chosen to compile within the shared memory and without spills,
# which tests/core/test_compile.py checks; it names the few spills of teams.
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
        "forward pairs":      "64x64/4/3          64x64/4/3         64x32/8/2     64x16/8/2",
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
        "statistics":         "32x32/4/2          32x32/4/2         32x32/8/2     16x16/8/1/64",
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
        "statistics":    "32x32/8/1/64  32x32/8/1/64  32x32/8/1/64  16x16/8/1/64",
        "queries":       "32x32/8/1/64  32x32/8/1/64  32x32/8/1/64  16x16/8/1/64",
        "queries rank":  "32x32/4/2/64  32x32/4/2/64  32x32/8/1/64  16x16/8/1/64",
        "keys":          "32x32/8/1/64  32x32/8/1/64  32x32/8/1/64  16x16/8/1/64",
        "values":        "32x32/4/2     32x32/4/2     32x32/8/1     16x16/8/1/64",
    },
    "ampere": {  # Ada and the small Blackwell too: they have Ampere's tensor cores, and less shared memory
        "forward few":       "16x64/4/2     16x64/4/2     16x32/4/2     16x16/8/1/64",
        "forward":           "64x64/4/2     64x64/4/2     64x32/8/2     32x64/8/2",
        "forward table ids": "32x32/4/2     32x32/4/2     32x32/4/1     16x16/8/1",
        "forward pairs":     "64x32/4/2     32x32/8/2     32x32/4/2     32x64/8/2",
        "forward slopes":    "64x32/4/2     32x32/4/2     32x32/4/2     32x64/8/2",
        "forward rank":      "128x64/8/2    128x64/8/2    16x32/4/2     32x16/8/2",
        "statistics":        "32x32/4/2/64  32x32/4/2/64  16x16/4/1/64  16x16/8/1/64",
        "queries":           "32x32/4/2/64  32x32/4/2/64  32x32/4/2/64  16x16/8/1/64",
        "queries pairs":     "32x32/4/2/64  32x32/4/2/64  32x32/4/2/64  16x16/8/1/64",
        "queries rank":      "32x32/4/2/64  32x32/4/2/64  16x16/4/1/64  16x16/8/1/64",
        "keys":              "32x32/4/2/64  32x32/4/2/64  32x32/4/2/64  16x16/8/1/64",
        "keys rank":         "32x32/4/2/64  32x32/4/2/64  16x16/4/1/64  16x16/8/1/64",
        "keys pairs":        "32x32/4/2/64  32x32/4/2/64  32x16/8/2/64  16x16/8/1/64",
        "keys positions":    "32x32/4/1/64  32x32/4/2/64  32x32/4/2/64  16x16/8/1/64",
        "values":            "32x32/4/2     32x32/4/2     32x32/4/2     16x16/8/1/64",
        "values table ids":  "32x32/4/2     32x32/4/2     32x16/4/2     16x16/8/1/64",
    },
    "fp32": {  # fewer than 64 rows: with more, triton 3.6 forms wrong products of six
        "forward":                "32x32/2/2/16/248  32x32/4/1         16x32/4/1         16x16/4/1",
        "forward rank":           "32x32/2/1/16/248  32x32/4/1         16x16/4/1         32x16/8/1",
        "forward table":          "32x16/2/1         16x32/4/1         16x32/4/1         16x16/8/1",
        "queries":                "32x16/2/1/32      16x32/4/1/64      16x32/4/1/64/254  16x16/8/1/64",
        "queries slopes":         "32x16/2/1/32/248  16x32/4/1/64      16x32/8/1/64/248  16x16/8/1/64",
        "queries rank":           "16x16/2/1/32      16x16/4/1/64/248  16x16/4/1/64      16x16/8/1/64",
        "queries factors":        "16x16/2/1/32      16x32/4/1/32      16x32/8/1/64/248  16x16/8/1/64",
        "queries table":          "16x16/2/1/16      16x32/4/1/64      16x16/8/1/64      16x16/8/1/64",
        "keys":                   "16x16/2/1/16/255  16x32/4/1/64      16x32/4/1/64      16x16/8/1/64",
        "keys factors allowed":   "16x16/2/1/32/255  16x16/4/1/64/255  16x32/8/1/64      16x16/8/1/64",
        "keys factors":           "16x16/2/1/32/255  16x32/4/1/64      16x32/8/1/64      16x16/8/1/64",
        "keys rank":              "16x16/2/1/32/248  16x16/4/1/64/252  16x16/4/1/64      16x16/8/1/64",
        "keys table":             "16x16/2/1/16      16x32/4/1/64      16x16/4/1/64/248  16x16/8/1/64",
        "values":                 "32x32/2/1         16x32/4/1         16x32/4/1         32x32/4/1",
        "values allowed":         "32x32/4/1         16x32/8/1         32x32/4/1         32x32/4/1",
        "values table":           "16x16/4/1         16x16/8/1         16x16/8/1         16x16/8/1",
        "double forward":         "32x16/4/1         16x32/4/1         16x16/8/1         16x16/8/1/16/248",
        "double forward rank":    "16x16/4/1         16x16/4/1         16x16/4/1/16/248  16x16/8/1/16/248",
        "double forward factors": "32x16/4/1         16x32/8/1/16/248  16x16/8/1         16x16/8/1",
        "double forward table":   "16x16/8/1         16x16/8/1         16x16/8/1         16x16/8/1",
        "double queries":         "32x16/4/1/16/248  16x32/4/1/16/248  16x16/8/1/64/252  16x16/8/1/64/248",
        "double queries rank":    "16x16/8/1/64      16x16/8/1/64/248  16x16/8/1/32/248  16x16/8/1/64",
        "double queries factors": "16x16/4/1/64      16x16/4/1/64/248  16x16/8/1/64      16x16/8/1/64",
        "double queries table":   "16x16/8/1/64      16x16/8/1/64      16x16/8/1/64/248  16x16/8/1/64/252",
        "double keys":            "16x16/4/1         16x32/4/1         16x16/4/1/64/248  16x16/8/1/64",
        "double keys positions":  "16x16/4/1         16x32/4/1         16x16/8/1/64/248  16x16/8/1/64",
        "double keys slopes":     "16x16/4/1         16x32/4/1         16x16/8/1/64/248  16x16/8/1/64",
        "double keys rank":       "16x16/8/1/64/248  16x16/8/1/64/248  16x16/8/1/64/248  16x16/8/1/64",
        "double keys table":      "16x16/8/2/16/248  16x16/8/2         16x16/8/1/64      16x16/8/2",
        "double keys factors":    "16x16/4/1/64      16x16/4/1/64/248  16x16/8/1/64/248  16x16/8/1/64",
        "double values":          "16x16/4/1         16x16/4/1/16/248  16x32/4/1         16x32/4/1/16/252",
    },
}  # fmt: skip


def select(kind: str, capability: tuple[int, int], itemsize: int, constants: Mapping[str, Any]) -> Tiles:
    """The tiles for a kernel's constants and `itemsize` bytes an element on a device of that compute capability."""
    family = {9: "hopper", 10: "blackwell", 11: "blackwell"}.get(capability[0], "ampere")
    rows = TILES[family] if itemsize < 4 else TILES["fp32"]
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
        "allowed": constants["ALLOWED"],
        "factors allowed": rank > 0 and constants["ALLOWED"],
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
    return parse(row[max(0, width.bit_length() - 6)])


@cache
def parse(text: str) -> Tiles:
    """Tiles as the tables write them."""
    return Tiles(*map(int, text.replace("x", "/").split("/")))


@cache
def triton_version() -> tuple[int, ...]:
    """Major and minor."""
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2]))
