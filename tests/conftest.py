"""One set of tests for every machine.

With a CUDA device the kernels run on it. Without one they run on the CPU through Triton's interpreter, which must be
switched on before triton is imported for the first time: here, before any test file is read.

Tests marked `slow` are left out unless `-m` says otherwise; tests marked `gpu` are skipped only without a CUDA device.
"""

import dataclasses
import os
import random
import sys
import types
import zlib
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch

HAS_CUDA = torch.cuda.is_available()


def hasten_interpreter() -> None:
    """Keep Triton's interpreter from work that changes no result and takes two thirds of its time.

    By itself it replaces the functions of its language, hundreds, at every call of a function in a kernel: here once,
    and so they stay. And it computes whether sums and products of integers overflow, only to throw that away.
    """
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_patch_lang"):
        return  # a later one, which may work in another way
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    patch = interpreter._patch_lang
    patched: list[dict[str, Any]] = []  # the namespaces whose languages are

    def patch_lang(function: Any) -> types.SimpleNamespace:
        if not any(names is function.__globals__ for names in patched):
            patched.append(function.__globals__)
            patch(function)
        return types.SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_lang


if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
    hasten_interpreter()

# xdist starts several processes: each takes its share of the cores, and what it starts does, or they fight for them.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, torch.get_num_threads() // _WORKERS))
os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())


def pytest_report_header() -> list[str]:
    device = torch.cuda.get_device_name() if HAS_CUDA else "cpu, kernels through Triton's interpreter"
    return [f"torch: {torch.__version__}, device: {device}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    without_device = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(without_device)


@pytest.fixture
def device() -> str:
    """Where the tensors of a test go."""
    return "cuda" if HAS_CUDA else "cpu"


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Fixes all random numbers by the name of the test, so that neither order nor selection changes them."""
    value = zlib.crc32(request.node.nodeid.encode())
    random.seed(value)
    numpy.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def frames() -> Iterator[None]:
    """What was decided for calls of a shape does not outlast a test, which may have changed who decides."""
    yield
    if "flashbias.kernels.call" in sys.modules:
        sys.modules["flashbias.kernels.call"].forget()
