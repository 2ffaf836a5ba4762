"""The large model of `flashbias demo`, made small: its peers compute what they say, and no wrong result passes."""

import importlib.util

import numpy
import pytest
import torch
from rich.console import Console

from flashbias.recipes import demo_base, demo_picture, machine
from flashbias.recipes.demo_base import Case
from flashbias.recipes.side_by_side import Measurement
from flashbias.recipes.swin_peers import replace_attention

from .test_demo import nothing_is_cut_off

SMALL = {"img_size": 32, "window_size": 4, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
CASE = Case(batch=2, options=SMALL | {"pretrained_window_sizes": (0, 0)}, compiled=False)


@pytest.fixture
def model_and_images():
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    return demo_base._build(CASE, "cpu", patched=False)


@torch.inference_mode()
def test_peers_compute_what_timm_computes(model_and_images):
    model, images = model_and_images
    stock = model(images)
    for kind, close in (("dense", True), ("no bias", False)):
        patches = replace_attention(model, kind, torch.float32)
        changed = model(images)
        assert patches.revert()
        assert torch.allclose(changed, stock, atol=1e-5) is close, kind
    assert torch.equal(model(images), stock)


def measurement(logits):
    return Measurement(numpy.array(logits), seconds=0.01, peak=2**30, held=2**30)


REFERENCE = [[10.0, 1.0], [-2.0, 3.0]]


def judged(name, logits, stock_error=0.01):
    stock = [[10.0 + stock_error, 1.0], [-2.0, 3.0]]
    measured = {"timm|eager": measurement(stock), f"{name}|eager": measurement(logits)}
    rows = demo_base.rows(Case(), measured | {"timm, fp32|eager": measurement(REFERENCE)})
    return next(row for row in rows if row["variant"] == name)


@pytest.mark.parametrize(
    ("logits", "accurate"),
    [
        ([[10.02, 1.0], [-2.0, 3.0]], True),
        ([[10.1, 1.0], [-2.0, 3.0]], False),
        ([[float("nan"), 1.0], [-2.0, 3.0]], False),
    ],
)
def test_error_is_judged_by_that_of_timm(logits, accurate):
    row = judged("SDPA, kept bias", logits)
    assert row["accurate"] is accurate
    assert row["milliseconds"] == 10
    assert row["peak_gib"] == 2


def test_patch_may_add_its_tolerance():
    assert judged("flashbias", [[10.025, 1.0], [-2.0, 3.0]])["accurate"]
    assert not judged("flashbias", [[10.035, 1.0], [-2.0, 3.0]])["accurate"]


def test_verdict_needs_a_measurement_of_the_patch():
    good, bad = ({"variant": "flashbias", "accurate": accurate} for accurate in (True, False))
    assert demo_base.agree([good, {"variant": "SDPA, no bias", "accurate": False}])
    assert not demo_base.agree([good, bad])
    assert not demo_base.agree([{"variant": "timm", "accurate": True}])


@pytest.mark.slow
@pytest.mark.usefixtures("model_and_images")
def test_all_variants_are_measured_and_drawn(tmp_path):
    with demo_base.Contest(CASE, "cpu") as contest:
        rows = contest.rows(Console(stderr=True))
    assert [row["variant"] for row in rows] == ["timm", *demo_base.PEERS, "flashbias", "timm, fp32"]
    assert demo_base.agree(rows)
    assert {row["variant"]: row["accurate"] for row in rows}["SDPA, kept bias"]
    demo_picture.draw_base(tmp_path / "base.png", rows, machine.conditions("cpu"))
    assert nothing_is_cut_off(tmp_path / "base.png")
    assert sum(contest.notes["flashbias|eager"].values()) == 4
