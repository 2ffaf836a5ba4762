"""Whether kernels that are launched as known are those that triton would take: a program, run without the interpreter.

Calls of a few kinds are made in many lengths, and every launch is given to triton's own binder, which says what its
code depends on. Launches of one key in `compiled.launch` have to agree on that. Prints numbers as JSON.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from typing import Any

import crosscompile
import torch
from cases import BROADCASTS, LAYOUTS, Case
from test_kernels import PRODUCT
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from flashbias.kernels import columns, compiled
from flashbias.tiles import triton_version

LENGTHS = (1, 2, 5, 15, 16, 17, 31, 32, 33, 48, 64, 65, 80)
BATCHES = ((), (1,), (2,), (16,), (2, 3))


class Kernel:
    """Stands in for a kernel of which nothing is compiled."""

    def __init__(self, kernel: Any, arch: int, reports: list[dict[str, Any]]) -> None:
        self.kernel, self.arg_names = kernel, kernel.arg_names


class Watch:
    """In place of `compiled.launch`: what triton would make of each launch, by its key."""

    def __init__(self) -> None:
        self.found: dict[Any, str] = {}
        self.kept: list[dict] = []  # so that no other gets its number
        self.again, self.wrong = 0, []
        self._backend = make_backend(GPUTarget("cuda", 90, 32))

    def launch(
        self, kernel: Kernel, grid: tuple[int, int], arguments: dict[str, Any],
        constants: Callable[[], dict[str, Any]], known: dict, key: tuple,
    ) -> None:  # fmt: skip
        jit = kernel.kernel
        bind = create_function_from_signature(jit.signature, jit.params, self._backend)
        _, specialization, options = bind(**arguments, **constants())
        seen = repr((specialization, sorted(options.items())))
        self.kept.append(known)
        place = jit, id(known), key[1:]  # in `key` itself the kernel's stand-in is another each time
        self.again += place in self.found
        if self.found.setdefault(place, seen) != seen:
            self.wrong.append(f"{jit.__name__}: {self.found[place]} and {seen}")


def main() -> None:
    seed, number = map(int, sys.argv[1:])
    choose = random.Random(seed).choice
    watch = Watch()
    crosscompile.Recorder, compiled.launch, columns.launch = Kernel, watch.launch, watch.launch
    kinds = []
    for _ in range(10):
        (bias, mask), dtype = choose(PRODUCT), choose((torch.float16, torch.bfloat16, torch.float32))
        shape = {"c": choose((16, 32, 64)), "rank": choose((4, 16)), "broadcast": choose(BROADCASTS)}
        kinds.append({"bias": bias, "mask": mask, "dtype": dtype, "layout": choose(LAYOUTS), **shape})
    for i in range(number):
        lengths = {"n_q": choose(LENGTHS), "n_k": choose(LENGTHS), "batch": choose(BATCHES), "heads": choose((1, 2, 4))}
        teams = choose((True, False)) and triton_version() >= (3, 6)
        crosscompile.compile_case(90, Case(seed=i, **choose(kinds), **lengths), teams)
    print(json.dumps({"launches": len(watch.kept), "again": watch.again, "wrong": watch.wrong}))


if __name__ == "__main__":
    main()
