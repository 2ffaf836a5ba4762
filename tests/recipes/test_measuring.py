"""What the recipes measure with."""

import os
import time

import numpy
import pytest

from flashbias.recipes.memory import peak_memory
from flashbias.recipes.side_by_side import SideBySide

MIB = 2**20


class Fill:
    """Work that holds so much memory at its peak, and returns who did it."""

    def __init__(self, mib):
        self.mib = mib

    def __call__(self):
        return self.work

    def work(self):
        held = numpy.ones(self.mib * MIB, dtype=numpy.uint8)
        time.sleep(0.001 * self.mib)
        return os.getpid(), int(held[-1])


class Held:
    """Work that needs nothing beyond what its process holds already."""

    def __init__(self, mib):
        self.mib = mib

    def __call__(self):
        held = numpy.ones(self.mib * MIB, dtype=numpy.uint8)
        return lambda: int(held[-1])


def side_by_side(variants, repeats):
    with SideBySide(variants, "cpu") as contest:
        return contest.measure(repeats)


def test_variants_run_in_processes_of_their_own():
    measured = side_by_side({"small": Fill(20), "large": Fill(120)}, repeats=3)
    pids = {entry.result[0] for entry in measured.values()}
    assert len(pids | {os.getpid()}) == 3
    assert measured["small"].peak == pytest.approx(20 * MIB, abs=4 * MIB)
    assert measured["large"].peak == pytest.approx(120 * MIB, abs=4 * MIB)
    assert 0.02 <= measured["small"].seconds < measured["large"].seconds


def fail():
    raise ValueError("cannot be prepared")


def test_failure_in_a_process_is_seen():
    with pytest.raises(ValueError, match="cannot be prepared"):
        side_by_side({"good": Fill(1), "bad": fail}, repeats=1)


def test_peak_is_that_of_the_work_and_not_what_stays():
    result, peak = peak_memory(lambda: sum(int(numpy.ones(60 * MIB, dtype=numpy.uint8)[0]) for _ in range(3)), "cpu")
    assert result == 3
    assert peak == pytest.approx(60 * MIB, abs=10 * MIB)


@pytest.mark.gpu
def test_peak_on_a_gpu():
    import torch

    _, peak = peak_memory(lambda: torch.ones(50 * MIB, dtype=torch.uint8, device="cuda").max(), "cuda")
    assert peak == pytest.approx(50 * MIB, abs=4 * MIB)


def test_others_go_on_where_one_fails():
    failures = {}
    with SideBySide({"bad": fail, "good": Fill(1)}, "cpu", failures) as contest:
        measured = contest.measure(2)
    assert list(measured) == ["good"]
    assert isinstance(failures["bad"], ValueError)


def test_memory_that_is_held_already_is_told_apart():
    measured = side_by_side({"work": Held(80)}, repeats=1)["work"]
    assert measured.held > 80 * MIB
    assert measured.peak < 20 * MIB
