"""The kernels of halves, norms, gates and points as a GPU gets them: compiled for it, on a machine without one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from standins import StandIn
from torch import Tensor

from flashbias.kernels import compiled, gate, halves, known, norm, points, replay

HERE = Path(__file__).parent
SCRIPT = """
import json, sys
import torch
from crosscompile import Recorder
from flashbias.kernels import gate, halves, norm, points

reports = []

def compiled(kernel, grid, device, arguments, **constants):
    Recorder(kernel, int(sys.argv[1]), reports)[grid](**arguments, **constants)

gate.launch_known = halves.launch_known = norm.launch_known = points.launch_known = compiled
half, fp32 = torch.bfloat16, torch.float32

def empty(*shape, dtype=fp32):
    return torch.empty(shape, dtype=dtype)

for batch, heads, c in ((2, 16, 48), (1, 16, 24), (6, 4, 32)):
    projected = [empty(batch, 70, heads, c).transpose(1, 2) for _ in range(3)]
    halves.as_halves(*projected, 0.25, 2.0**15, 1e-30)
for dtype in (half, fp32):
    x, weight = empty(20, 30, 128, dtype=dtype), empty(128)
    norm.layer_norm(x, weight, weight, 1e-5)
    norm.layer_norm(x.transpose(0, 1)[..., :100], None, None, 1e-5)
    gates = empty(20, 30, 4, 4, 32, dtype=dtype).transpose(1, 3)[:, :, 3]
    gate.gated(gates, empty(20, 4, 30, 32, dtype=dtype), None)
gate.gated(gates, empty(20, 4, 30, 32, dtype=torch.float16), empty(20, 4, 1, 1))
for dtype in (half, fp32, torch.float64):
    for d in (1, 3, 7, 40):
        x = empty(2, 70, d, dtype=dtype)
        points.distance_factors(x, x, empty(2, 4, 70))
        points.distance_factors(x, empty(50, d, dtype=fp32), empty(2, 1, 1, dtype=dtype))
        points.distance_factors(x, empty(50, d, dtype=fp32), empty(2, 1, 1, dtype=dtype), 0.25)
print(json.dumps(reports))
"""


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_compiles_without_spills(arch: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(arch)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    reports = json.loads(done.stdout)
    kernels = {"most_kernel", "halves_kernel", "norm_kernel", "gate_kernel", "box_kernel", "factors_kernel"}
    assert {report["kernel"] for report in reports} == kernels
    assert [report for report in reports if report["spills"]] == []


def test_lengths_share_kernels_that_strides_and_places_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    monkeypatch.setattr(known, "launch", lambda *args: keys.append(args[-1]))

    def key(x: torch.Tensor, eps: float = 1e-5) -> Hashable:
        norm.layer_norm(x, None, None, eps)
        return keys[-1]

    base = key(torch.empty(3, 50, 40).transpose(0, 1))
    assert key(torch.empty(3, 52, 40).transpose(0, 1), 1e-6) == base
    assert key(torch.empty(3, 50, 48)[..., :40].transpose(0, 1)) != base  # rows at multiples of 16 entries
    assert key(torch.empty(3, 50, 41)[..., 1:].transpose(0, 1)) != base
    assert key(torch.empty(3, 50, 40, dtype=torch.float16).transpose(0, 1)) != base
    assert key(torch.empty(3, 50, 24).transpose(0, 1)) != base


PASSES: dict[str, Callable[..., Sequence[Tensor]]] = {
    "norm": lambda x, y, weight: [norm.layer_norm(x[0].transpose(0, 1), weight, y[0, 0, 0], 1e-5)],
    "norm without weights": lambda x, y, weight: [norm.layer_norm(x, None, None, 1e-5)],
    "gate": lambda x, y, weight: [gate.gated(x, y.transpose(0, 1), None)],
    "gate with a unit": lambda x, y, weight: [gate.gated(x, y.transpose(0, 1).half(), x[..., :1, :1].contiguous())],
    "points": lambda x, y, weight: points.distance_factors(x[0].double(), y[:, 0, :40].mT, weight[None, :1]),
    "points that broadcast": lambda x, y, weight: points.distance_factors(x[:, :1], y[0], weight[:1]),
    "halves": lambda x, y, weight: halves.as_halves(x, y.transpose(0, 1), 2 * x, 0.3, 2.0**15, 1e-30),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_that_is_made_again_takes_its_own_tensors(name: str, device: str) -> None:
    first, second = (
        [torch.randn(*shape, device=device) for shape in ((3, 2, 50, 40), (2, 3, 50, 40), (40,))] for _ in range(2)
    )
    wanted = PASSES[name](*second)
    replay.forget()
    before = PASSES[name](*first)
    kept = [x.clone() for x in before]
    assert [made is not None for made in replay._passes.values()] == [True]
    made = PASSES[name](*second)
    for ours, truth in zip((*made, *before), (*wanted, *kept), strict=True):
        assert torch.equal(ours, truth)


class Launched(StandIn):
    """A kernel that notes how it is launched."""

    function, packed_metadata = 7, (4, 1, 0)

    def __init__(self, made: list[Any]) -> None:
        super().__init__()
        self.made = made

    @property
    def run(self) -> Callable[..., None]:
        return lambda *arguments: self.made.append(arguments)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *values: self.made.append(("told", grid, values))


def test_launches_are_told_to_those_who_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled.hooks is None:
        pytest.skip("triton 3.3 has its hooks elsewhere, and launches are its own there")
    made: list[Any] = []
    kernel = Launched(made)
    active = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 100 + device))
    monkeypatch.setattr(compiled, "driver", active)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(compiled, "has_gpu", lambda: True)
    launch = compiled.launcher(kernel, (2, 3, 1))
    launch("x", 5)
    hook = compiled.hooks.launch_enter_hook
    listen = lambda metadata: None  # noqa: E731
    hook.add(listen)
    launch("y", 6)
    hook.remove(listen)
    launch("z", 7)
    straight = 2, 3, 1, 101, 7, (4, 1, 0), None, None, None
    assert made == [(*straight, "x", 5), ("told", (2, 3, 1), ("y", 6)), (*straight, "z", 7)]
    monkeypatch.setattr(compiled, "has_gpu", lambda: False)
    compiled.launcher(kernel, (2, 3, 1))("w")
    assert made[-1] == ("told", (2, 3, 1), ("w",))


@pytest.mark.skipif(
    not torch.cuda.is_available() or compiled.hooks is None, reason="needs kernels that are launched, and their hooks"
)
def test_a_profiler_sees_launches_that_are_made_again() -> None:
    seen: list[str] = []
    listen = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    x = torch.randn(3, 50, 40, device="cuda")
    before = norm.layer_norm(x, None, None, 1e-5)
    compiled.hooks.launch_enter_hook.add(listen)
    try:
        assert torch.equal(norm.layer_norm(x, None, None, 1e-5), before)
    finally:
        compiled.hooks.launch_enter_hook.remove(listen)
    assert seen == ["norm_kernel"]
    assert torch.equal(norm.layer_norm(x, None, None, 1e-5), before)
    assert len(seen) == 1
