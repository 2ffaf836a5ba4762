"""Compile the operator's kernels for any architecture, on a machine without a GPU.

Reads one JSON object a line, `{"arch": 90, "teams": false, "many": false, "bias": "dense", "dtype": "bfloat16", ...}`
with fields of `cases.Case`; `many`: as calls of more scores than are few. Prints one per kernel: number of the request,
tile, shared memory and spills in bytes, registers.
`tests` must be on the path, and TRITON_INTERPRET unset. The calls are those of `kernels.launch`, forward and backward,
and what makes their columns; only the launch itself is replaced.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from cases import Case, build
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from flashbias import biased_attention, plan
from flashbias.kernels import bias_gradients, call, columns, expansion, launch
from flashbias.tiles import Tiles, select

KERNELS = ("forward_kernel", "delta_kernel", "queries_kernel", "keys_kernel")
BIAS_GRADIENTS = ("values_kernel", "sum_parts_kernel", "table_kernel")
COLUMNS = ("largest_kernel", "score_columns_kernel", "gradient_columns_kernel")
TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
    torch.int8: "i8", torch.uint8: "u8", torch.int16: "i16", torch.float64: "fp64",
}  # fmt: skip


def describe(value: Any, path: tuple[int, ...], specialize: bool, constants: dict, attributes: dict) -> Any:
    """The type of an argument as the compiler names it, its constants and alignments noted by path."""
    if isinstance(value, tuple):
        parts = [describe(part, (*path, i), specialize, constants, attributes) for i, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if value is None or isinstance(value, (bool, str)) or (specialize and isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if type(value).__name__ == "TensorDescriptor":
        shape = ",".join(map(str, value.block_shape))
        layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
        return f"tensordesc<{TYPES[value.base.dtype]}[{shape}]{layout}>"
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if specialize and value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


class Recorder:
    """Stands in for a kernel: compiles what would be launched."""

    def __init__(self, kernel: Any, arch: int, reports: list[dict[str, Any]]) -> None:
        self.kernel, self.arch, self.reports = kernel, arch, reports
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._compile

    def _compile(
        self,
        *args: Any,
        num_warps: int = 4,
        num_stages: int = 2,
        enable_fp_fusion: bool = True,
        maxnreg: int | None = None,
        **kwargs: Any,
    ) -> None:
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        constants: dict = {}
        attributes: dict = {}
        signature = {}
        for i, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr:
                constants[(i,)] = value
                signature[parameter.name] = "constexpr"
            else:
                specialize = not parameter.do_not_specialize
                signature[parameter.name] = describe(value, (i,), specialize, constants, attributes)
        source = source_of(self.kernel)(self.kernel, signature=signature, constexprs=constants, attrs=attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
        options |= {"maxnreg": maxnreg} if maxnreg else {}
        compiled = triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=options)
        registers, spills = resources(compiled.asm["cubin"], compiled.asm["ptx"])
        self.reports.append(
            {
                "kernel": self.kernel.__name__, "arch": self.arch, "shared": compiled.metadata.shared,
                "registers": registers, "spills": spills, "warps": num_warps, "stages": num_stages,
                "tile": [values.get("BLOCK_M"), values.get("BLOCK_N")],
                "wgmma": "wgmma" in compiled.asm["ptx"],
                "serial": source_of(self.kernel) is not ASTSource and is_serial(compiled.asm["ptx"]),
                "flipped": flips_products(compiled.asm["ptx"]),
                "early": self.kernel.__name__ == "forward_teams_kernel" and gives_back_early(compiled.asm["cubin"]),
            }
        )  # fmt: skip


def source_of(kernel: Any) -> type[ASTSource]:
    """The language that a kernel is written in."""
    if not getattr(kernel, "is_gluon", bool)():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def is_serial(ptx: str) -> bool:
    """Whether the assembler lets products that were started together run one by one, of which it warns only."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        done = subprocess.run(
            [get_ptxas(90).path, "-arch=sm_90a", file, "-o", file.with_suffix(".cubin")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    return "serialized" in done.stderr


def flips_products(ptx: str) -> bool:
    """Whether what products have made has its sign flipped by bits: ptxas flips what was in its place before."""
    places = re.findall(r"wgmma\.mma_async\S* \{([^}]*)\}", ptx)
    flipped = re.findall(r"xor\.b32\s+%\w+, (%\w+), -2147483648", ptx)
    return not set(flipped).isdisjoint(re.findall(r"%\w+", " ".join(places)))


def gives_back_early(cubin: bytes) -> bool:
    """Whether a warp comes to the barrier before which a room is given back with loads from shared memory under way.

    A copy into that room might overtake them. A load has arrived once one of its registers is used; a fence waits for
    all.
    """
    under_way: list[set[str]] = []
    for line in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", cuobjdump("-sass", cubin)):
        name, _, operands = re.sub(r"^@!?U?P\d+ ", "", line).partition(" ")
        target, *sources = operands.split(",")
        used = {place for source in sources for place in re.findall(r"\bR\d+\b", source)}
        under_way = [load for load in under_way if load.isdisjoint(used)]
        if name.startswith(("FENCE", "MEMBAR")):
            under_way.clear()
        if name.startswith("LDSM"):
            first = int(target.strip()[1:])
            under_way.append({f"R{first + i}" for i in range(int(name.rpartition(".")[2]))})
        if name.startswith("BAR.SYNC") and under_way:
            return True
    return False


def cuobjdump(option: str, cubin: bytes) -> str:
    """What the disassembler that triton ships says of a kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes, ptx: str) -> tuple[int, int]:
    """Registers per thread and bytes of spilled ones.

    The stack of a kernel holds what is spilled, and variables that the PTX declares in local memory, if any.
    """
    text = cuobjdump("-res-usage", cubin)
    usage = {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    assert ".local" not in ptx, "the stack is not of spills alone"
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def compile_call(arch: int, run: Callable[[], Any], teams: bool = False) -> list[dict[str, Any]]:
    """Reports of all kernels that `run()` would launch on a device of that architecture, with teams where they can."""
    reports: list[dict[str, Any]] = []
    places = [(launch, name) for name in KERNELS] + [(columns, name) for name in COLUMNS]
    places += [(bias_gradients, name) for name in BIAS_GRADIENTS] + [(expansion, "expansion_kernel")]
    if teams:
        from flashbias.kernels import hopper, hopper_keys, hopper_queries, hopper_values

        places += [(hopper, "forward_teams_kernel"), (hopper_queries, "queries_teams_kernel")]
        places += [(hopper_keys, "keys_teams_kernel"), (hopper_values, "values_teams_kernel")]
    kept = {(module, name): getattr(module, name) for module, name in places}
    kept_tiles, kept_backend = plan.tiles, plan.backend
    kept_descriptors, kept_bf16x6 = plan.has_descriptors, plan.has_bf16x6
    kept_doubles, kept_sums, kept_capability = plan.has_doubles, plan.sums_doubles, plan._capability
    kept_teams, kept_work = plan.has_teams, plan.TEAM_WORK

    def tiles(kind: str, device: torch.device, dtype: torch.dtype, constants: Any) -> Tiles:
        return select(kind, (arch // 10, arch % 10), dtype.itemsize, constants)

    for (module, name), kernel in kept.items():
        setattr(module, name, Recorder(kernel, arch, reports))
    plan.tiles, plan.backend = tiles, lambda device: "triton"
    plan.has_descriptors = lambda device: arch >= 90 and kept_descriptors(device)
    plan.has_bf16x6 = lambda device: kept_bf16x6(torch.device("cuda"))
    plan.has_doubles = lambda device: kept_doubles(torch.device("cuda"))
    plan.sums_doubles = lambda dtype, device: kept_sums(dtype, torch.device("cuda"))
    plan._capability = lambda device: (arch // 10, arch % 10)
    plan.has_teams, plan.TEAM_WORK = (lambda device: teams), 0
    call.forget()  # which keeps the tiles of the last architecture
    try:
        run()
    finally:
        call.forget()
        for (module, name), kernel in kept.items():
            setattr(module, name, kernel)
        plan.tiles, plan.backend = kept_tiles, kept_backend
        plan.has_descriptors, plan.has_bf16x6 = kept_descriptors, kept_bf16x6
        plan.has_doubles, plan.sums_doubles, plan._capability = kept_doubles, kept_sums, kept_capability
        plan.has_teams, plan.TEAM_WORK = kept_teams, kept_work
    return reports


def compile_case(arch: int, case: Case, teams: bool = False) -> list[dict[str, Any]]:
    """Reports of the kernels of a case, with gradients of all that has one."""
    inputs = build(case)
    leaves = {name: leaf.requires_grad_() for name, leaf in inputs.leaves.items()}

    def run() -> None:
        bias = inputs.make_bias(leaves)
        out = biased_attention(
            leaves["query"], leaves["key"], leaves["value"], bias, mask=inputs.mask, return_lse=True, scale=case.scale
        )
        torch.autograd.grad(
            [out[name == "lse"] for name in inputs.cotangents],
            list(leaves.values()),
            list(inputs.cotangents.values()),
            materialize_grads=True,
        )

    return compile_call(arch, run, teams)


def main() -> None:
    """Answer the requests on standard input; a kernel that does not compile is reported with its error."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("found: TRITON_INTERPRET=1; wanted: a process that compiles; remedy: unset it")
    few = plan.FEW_SCORES
    for i, line in enumerate(sys.stdin):
        fields = json.loads(line)
        arch, teams, many = fields.pop("arch"), fields.pop("teams", False), fields.pop("many", False)
        case = Case(**fields | {"dtype": getattr(torch, fields["dtype"]), "batch": tuple(fields.get("batch", (2,)))})
        plan.FEW_SCORES = 0 if many else few
        try:
            reports = compile_case(arch, case, teams)
        except Exception as caught:
            error: BaseException = caught
            while error.__cause__ is not None:  # of an error inside of a function that a kernel calls
                error = error.__cause__
            reports = [{"error": f"{type(error).__name__}: {error}"[-1000:]}]
        for report in reports:
            print(json.dumps({"case": i, **report}), flush=True)


if __name__ == "__main__":
    main()
