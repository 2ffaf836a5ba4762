"""What is done in a process that measures: a group of peers on one workload, or one first call in empty caches."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from flashbias.recipes import machine
from flashbias.recipes.memory import peak_memory

from . import gpu, limits
from .accuracy import INPUTS, Sample, sample
from .peers import BASELINES, OURS, Peer, registry
from .problem import Problem, Ready, Refused
from .results import Row
from .timing import host_microseconds, time_all, uncollected
from .workloads import Workload

Say = Callable[[str], None]
LESS = (1, 2, 63, 64, 65)  # even and odd lengths, with many keys in the last tile and with few


@dataclass(frozen=True)
class Settings:
    """What holds for a whole run. repo: a checkout of the paper's code."""

    device: str
    repeats: int = 3
    seed: int = 0
    repo: Path | None = None


@dataclass(frozen=True)
class Group:
    """Peers that are measured in turn on one workload, and with them a baseline.

    alone: the process is for this group alone and began with empty caches; another group reports on the baseline.
    dead: peers at which a process has ended.
    """

    workload: Workload
    mode: str
    peers: tuple[str, ...]
    alone: bool = False
    dead: tuple[str, ...] = ()

    def without(self, name: str) -> Group:
        """What is left to do after a process has ended at that peer."""
        return replace(self, peers=tuple(peer for peer in self.peers if peer != name), dead=(*self.dead, name))

    def row(self, peer: str, **known: Any) -> Row:
        """A row of that peer in which nothing is measured yet."""
        w = self.workload
        shape = (w.batch, w.heads, w.n_q, w.n_k, w.head_dim, w.rank)
        return Row(w.name, self.mode, peer, *shape, w.bias, w.causal, **known)


class Broken(Exception):
    """An error after which nothing can be measured in this process, such as an illegal memory access."""


def measure(settings: Settings, group: Group, say: Say) -> list[Row]:
    """A row for each peer of the group, and for the baseline unless the group is alone.

    `say` is told who is at work. Raises `Broken` where the one at work has to be left out the next time.
    """
    _begin(settings)
    peers, gradients = registry(settings.repo), group.mode == "fwdbwd"
    problem = Problem.make(group.workload, settings.device, settings.seed)
    known = conditions(settings.device) | {"dtype": str(problem.cotangent.dtype).removeprefix("torch.")}
    say("float64")
    biased = {peers[name].biased for name in group.peers} | {False}
    samples = {with_bias: sample(problem, with_bias, gradients) for with_bias in biased}
    gpu.forget(settings.device)
    rows: dict[str, Row] = {}
    steps: dict[str, Callable[[], Any]] = {}
    baseline = ""
    for name in (*BASELINES, *group.peers):
        spare = name in BASELINES and bool(baseline) and name not in group.peers
        if name in rows or name in group.dead or spare:
            continue
        say(name)
        rows[name] = group.row(name, **known)
        step = _try(rows[name], peers[name], problem, samples, settings, group)
        if step is not None:
            steps[name] = step
            baseline = baseline or (name if name in BASELINES else "")
    _time(rows, steps, baseline, group, settings, say)
    reported = group.peers if group.alone or not baseline else dict.fromkeys((*group.peers, baseline))
    return [rows[name] for name in reported]


def first_call(settings: Settings, task: tuple[Workload, str, str], say: Say) -> dict[str, float]:
    """Seconds of the very first call of a peer on a workload; of ours, milliseconds that a new length takes after it.

    In a process with empty caches, which has done what it does once. The milliseconds are the median of first calls on
    the host at lengths less than the workload's by `LESS`.
    """
    _begin(settings)
    gpu.start(settings.device)
    workload, mode, name = task
    peer, gradients = registry(settings.repo)[name], mode == "fwdbwd"
    step = _step(peer, Problem.make(workload, settings.device, settings.seed), gradients)[1]
    found = {"first_call_seconds": _seconds(step, settings.device)[1]}
    if name.startswith(OURS):
        host = []
        for less in LESS:
            other = workload.at(max(workload.n_k - less, 2))
            step = _step(peer, Problem.make(other, settings.device, settings.seed), gradients)[1]
            gpu.synchronize(settings.device)
            with uncollected():  # in a process full of modules a collection may take 100 ms
                started = time.perf_counter()
                step()
                host.append(time.perf_counter() - started)
        found["new_length_ms"] = median(host) * 1e3
    return found


def _try(
    row: Row, peer: Peer, problem: Problem, samples: dict[bool, Sample], settings: Settings, group: Group
) -> Callable[[], Any] | None:
    """All of a row but times, and the step to be timed; None where there is none, and the row says why."""
    absent = peer.absent(settings.device)
    if absent:
        row.status, row.reason = "absent", absent
        return None
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            return _fill(row, peer, problem, samples[peer.biased], settings.device, group)
        except Refused as refusal:
            row.status, row.reason = "refused", str(refusal)
        except Exception as error:
            row.status, row.reason = "failed", _reason(error, [str(warning.message) for warning in heard])
            if not gpu.alive(settings.device):
                raise Broken(row.reason) from error
    gpu.forget(settings.device)
    return None


def _fill(row: Row, peer: Peer, problem: Problem, truth: Sample, device: str, group: Group) -> Callable[[], Any]:
    gradients = group.mode == "fwdbwd"
    ready, step, names = _step(peer, problem, gradients)
    outputs, seconds = _seconds(step, device)
    if group.alone:
        row.first_call_seconds = seconds
    results = dict(zip(names, outputs, strict=True))
    errors = truth.errors(results)
    row.errors = " ".join(f"{name}={error:.2g}/{eager:.2g}" for name, (error, eager) in errors.items())
    row.bias_gradient = ready.bias_gradient if gradients and peer.biased else None
    try:
        truth.check(results, problem.cotangent.dtype)
        row.accurate = True
    except AssertionError as error:
        row.accurate, row.reason = False, str(error)
    del outputs, results
    made = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in ready.made}
    row.peak_mib = (peak_memory(step, device)[1] + sum(made.values())) / 2**20
    row.host_us = host_microseconds(step, device)
    return step


def _step(peer: Peer, problem: Problem, gradients: bool) -> tuple[Ready, Callable[[], tuple[Tensor, ...]], list[str]]:
    """The peer made ready; a call that returns output and gradients; and the names of what it returns."""
    tensors = {name: tensor.detach().requires_grad_(gradients) for name, tensor in problem.tensors.items()}
    ready = peer.adapter(problem, tensors, gradients)
    names = [name for name in tensors if ready.bias_gradient or name in INPUTS] if gradients else []
    wanted = [tensors[name] for name in names]

    def step() -> tuple[Tensor, ...]:
        with _deterministic(peer.deterministic):
            out = ready.run()
            return (out, *torch.autograd.grad(out, wanted, problem.cotangent)) if gradients else (out,)

    return ready, step, ["out", *names]


def _time(
    rows: dict[str, Row], steps: dict[str, Any], baseline: str, group: Group, settings: Settings, say: Say
) -> None:
    """Times of all that works, and what follows from them."""
    try:
        timings = time_all(steps, settings.device, settings.repeats, say)
    except Exception as error:
        raise Broken(_reason(error, [])) from error
    for name, timing in timings.items():
        row = rows[name]
        row.milliseconds, row.p20, row.p80, row.timed_by = timing.median, timing.p20, timing.p80, timing.by
        row.scores_per_second = group.workload.scores / timing.median * 1e3
        limit = limits.scores_per_second(row.device, group.workload, group.mode)
        row.limit_fraction = None if limit is None else row.scores_per_second / limit
        if baseline:
            row.baseline, row.tax = baseline, timing.median / timings[baseline].median


@cache
def conditions(device: str) -> dict[str, str]:
    """The machine and the versions, as every row names them."""
    cudnn = str(torch.backends.cudnn.version()) if device.startswith("cuda") else ""
    return machine.conditions(device) | {"cudnn": cudnn}


def _begin(settings: Settings) -> None:
    gpu.choose(settings.device)
    if "torch._dynamo" in sys.modules:  # what was compiled for an earlier workload counts against a limit
        torch.compiler.reset()


def _seconds(step: Callable[[], Any], device: str) -> tuple[Any, float]:
    """The result of a call, and how long it took until all was computed."""
    gpu.synchronize(device)
    started = time.perf_counter()
    result = step()
    gpu.synchronize(device)
    return result, time.perf_counter() - started


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _reason(error: Exception, heard: list[str]) -> str:
    """An error, and the warnings that said why a backend of torch was refused, on one line."""
    texts = [f"{type(error).__name__}: {error}", *dict.fromkeys(heard)]
    return "; ".join(" ".join(text.split())[:200] for text in texts)[:600]
