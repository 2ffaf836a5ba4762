"""The recipe of the neural solver at small sizes: it runs, and says what is right and what is not."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from flashbias.patches import HostMissingError
from flashbias.recipes import machine
from flashbias.recipes.neural_solver import pictures, speed, training, variants
from flashbias.recipes.neural_solver.elasticity_data import DataError, files
from flashbias.recipes.neural_solver.model import Shape, Solver
from flashbias.recipes.neural_solver.rows import Rows, load

SMALL = Shape(space=2, features=0, outputs=1, layers=1, hidden=16, heads=2)


@pytest.fixture
def plates(tmp_path):
    """Six made-up samples of 20 points in the library's form."""
    coordinates, stresses = files(tmp_path)
    coordinates.parent.mkdir(parents=True)
    generator = np.random.default_rng(0)
    points = generator.random((20, 2, 6)).astype(np.float32)
    np.save(coordinates, points)
    np.save(stresses, (100 + 50 * np.sin(6 * points[:, 0])).astype(np.float32))
    return tmp_path


def answer(name, shape, dtype=torch.float32):
    """Output and all gradients of the model with a variant's attention, always from the same weights."""
    torch.manual_seed(0)
    found = variants.variants()[name]
    model = Solver(shape, found.prepare, found.attend)
    for key, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=1.0 if "pos_weight" in key else 0.3)
    points, features = torch.rand(2, 50, shape.space), torch.randn(2, 50, shape.features)
    out = model.to(dtype)(points.to(dtype), features.to(dtype) if shape.features else None)
    out.square().sum().backward()
    return torch.cat([out.detach().flatten(), *(parameter.grad.flatten() for parameter in model.parameters())]).double()


@pytest.mark.parametrize("shape", [SMALL, Shape(3, 7, 4, 2, 32, 4, 2)], ids=["plane", "space"])
def test_variants_compute_the_same_as_well_as_they_can(shape):
    oracle = answer(variants.EXACT, shape, torch.float64)
    errors = {
        name: float((answer(name, shape) - oracle).norm() / oracle.norm())
        for name in (variants.EXACT, variants.ROUNDED, "half factors", variants.OURS)
    }
    assert errors[variants.EXACT] < 1e-5
    assert errors[variants.OURS] < 1e-5
    assert 1e-5 < errors[variants.ROUNDED] < 1e-2
    assert 1e-5 < errors["half factors"] < 1e-1


def test_exact_computation_does_not_depend_on_its_blocks(monkeypatch):
    whole = answer(variants.EXACT, SMALL)
    monkeypatch.setattr(variants, "ROWS", 900)
    torch.testing.assert_close(answer(variants.EXACT, SMALL), whole, rtol=1e-5, atol=1e-5)


def test_training_starts_equal_and_reports_every_epoch(plates, tmp_path):
    plan = training.Plan(plates, SMALL, train=4, test=2, epochs=3, batch=2)
    said: list[str] = []
    names = (variants.EXACT, "half factors", variants.OURS)
    assert training.run(plan, [*names, "no such"], "cpu", tmp_path, said.append) == ["no such: KeyError: 'no such'"]
    rows = load(tmp_path / "elasticity.csv")
    assert [(row["variant"], row["epoch"]) for row in rows] == [(name, str(i)) for name in names for i in (1, 2, 3)]
    losses = {name: [float(row["train_loss"]) for row in rows if row["variant"] == name] for name in names}
    assert losses[variants.OURS] == pytest.approx(losses[variants.EXACT], rel=1e-4)
    assert losses[variants.OURS][-1] < losses[variants.OURS][0]
    assert [total["epochs"] for total in training.summary(rows)] == [3, 3, 3]
    shorter = training.Plan(plates, SMALL, train=4, test=2, epochs=1, batch=2)
    training.run(shorter, [variants.OURS], "cpu", tmp_path, said.append)
    totals = training.summary(load(tmp_path / "elasticity.csv"))
    assert [(total["variant"], total["epochs"]) for total in totals] == [(variants.OURS, 1)], "the latest settings"
    assert pictures.elasticity(tmp_path).stat().st_size > 10_000


def test_too_few_samples_are_an_error(plates):
    with pytest.raises(DataError, match="6 samples"):
        training.load(training.Plan(plates, SMALL, train=5, test=2), "cpu")
    with pytest.raises(DataError, match="elasticity-data"):
        training.load(training.Plan(plates / "elsewhere", SMALL), "cpu")


def test_peers_are_timed_and_judged_and_a_failure_is_a_row(tmp_path):
    names = (variants.OURS, "half factors", "paper", "flex")
    written = speed.compare(80, names, speed.MODES, None, 1, "cpu", 2, tmp_path, lambda text: None)
    rows = load(tmp_path / "car.csv")
    assert len(rows) == len(written) == 8
    by_name = {(row["variant"], row["mode"]): row for row in rows}
    for mode in speed.MODES:
        ours = by_name[variants.OURS, mode]
        assert (ours["status"], ours["accurate"]) == ("ok", "True")
        assert float(ours["ms"]) > 0
        assert float(by_name["half factors", mode]["error"]) > float(ours["error"])
        assert "no checkout" in by_name["paper", mode]["reason"]
        assert "needs a GPU" in by_name["flex", mode]["reason"]
    assert pictures.car(tmp_path).stat().st_size > 10_000


def test_wrong_attention_is_not_accurate(tmp_path, monkeypatch):
    wrong = variants.Variant(lambda points: points, lambda layer, x, points: variants.exact(layer, x, 1.2 * points))
    monkeypatch.setattr(speed, "variants", lambda kernel=None: {**variants.variants(kernel), variants.OURS: wrong})
    rows = speed.compare(80, [variants.OURS], speed.MODES, None, 1, "cpu", 1, tmp_path, lambda text: None)
    assert [row["accurate"] for row in rows] == [False, False]
    rows = speed.scale([80], [1], speed.MODES, "cpu", tmp_path, lambda text: None)
    assert [row["accurate"] for row in rows] == [False, False]


def test_wrong_gradient_is_not_accurate(tmp_path, monkeypatch):
    """Right going forward, and twice the gradient on the way back."""

    def attend(layer, x, points):
        out = variants.exact(layer, x, points)
        return 2 * out - out.detach()

    wrong = variants.Variant(lambda points: points, attend)
    monkeypatch.setattr(speed, "variants", lambda kernel=None: {**variants.variants(kernel), variants.OURS: wrong})
    compared = speed.compare(80, [variants.OURS], speed.MODES, None, 1, "cpu", 1, tmp_path, lambda text: None)
    alone = speed.scale([80], [1], speed.MODES, "cpu", tmp_path, lambda text: None)
    for rows in (compared, alone):
        assert {row["mode"]: row["accurate"] for row in rows} == {"inference": True, "training": False}


def test_long_measurements_are_made_once_and_said_before(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(speed, "ONCE", 0.0)
    (row,) = speed.scale([60], [1], ["training"], "cpu", tmp_path, said.append)
    assert row["calls"] == 1
    assert [text.partition(": error")[1] for text in said] == [": error", ""]


def test_sizes_are_measured_one_by_one(tmp_path):
    rows = speed.scale([60, 90], [1, 2], speed.MODES, "cpu", tmp_path, lambda text: None)
    assert [(row["points"], row["layers"]) for row in rows] == [(60, 1), (60, 2), (90, 1), (90, 2)] * 2
    assert all(row["accurate"] for row in rows)
    speed.scale([60], [1], ["inference"], "cpu", tmp_path, lambda text: None)
    assert len(load(tmp_path / "scale.csv")) == 8, "a row takes the place of an earlier one"
    assert pictures.scale(tmp_path).stat().st_size > 10_000


def test_failing_size_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "check", lambda problem, mode: 1 / (problem.points.shape[1] - 60))
    rows = speed.scale([60], [1], ["inference"], "cpu", tmp_path, lambda text: None)
    assert (rows[0]["status"], rows[0]["reason"]) == ("failed", "ZeroDivisionError: division by zero")


def test_share_of_the_limit():
    forward = speed.limit_fraction("NVIDIA H200", 32186, 8, "inference", 0.03)
    assert forward is not None
    assert 0 < forward < 1
    assert speed.limit_fraction("NVIDIA H200", 32186, 8, "inference", 0.06) == pytest.approx(forward / 2)
    assert speed.limit_fraction("NVIDIA H200", 32186, 8, "training", 0.03) > forward
    assert speed.limit_fraction("another", 32186, 8, "inference", 0.03) is None


def test_kernel_is_looked_for_in_both_repositories(tmp_path):
    with pytest.raises(HostMissingError, match="no flash_bias_triton"):
        variants.load_kernel(tmp_path)
    for folder in ("layers", "flash_bias"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "flash_bias_triton.py").write_text(f"flash_bias_func = {folder!r}")
        assert variants.load_kernel(tmp_path) == folder


def test_rows_are_complete_after_each(tmp_path):
    rows = Rows(tmp_path / "rows.csv", ("a",), "cpu")
    rows.add({"a": 1, "b": 2.0})
    rows.add({"a": 2, "c": None})
    rows.add({"a": 1, "b": 3.0})
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [(row["a"], row["b"]) for row in found] == [("2", ""), ("1", "3")]
    assert all(row["torch"] == machine.version("torch") for row in found)


def test_picture_of_the_bias(tmp_path):
    assert pictures.bias(tmp_path, 300).stat().st_size > 10_000


@pytest.mark.parametrize(
    "arguments",
    [
        ["car", "--points", "60", "--layers", "1", "--repeats", "1", "--mode", "inference"],
        ["scale", "--points", "60", "--layers", "1", "--modes", "inference"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_end_with_a_line_of_json(tmp_path, arguments):
    command = [sys.executable, "-m", "flashbias.recipes", "neural-solver", *arguments, "--device", "cpu"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["results"][0]["accurate"]
