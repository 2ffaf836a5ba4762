"""`flashbias demo` as a person runs it, and what it makes of evaluations that differ."""

import csv
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from flashbias import decompose
from flashbias.integrations.choice import Choice
from flashbias.recipes import demo, demo_picture, machine
from flashbias.recipes.cli import app, main
from flashbias.recipes.demo_digits import Layer
from flashbias.recipes.side_by_side import Measurement


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.delenv("FLASHBIAS_DISABLE", raising=False)


@pytest.fixture
def needs_timm():
    for name in ("timm", "sklearn"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


def command_line(*arguments, **environment):
    code = "from flashbias.recipes.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


@pytest.mark.usefixtures("needs_timm")
def test_demo_shows_and_stores_what_it_found(tmp_path):
    process = command_line("demo", "--epochs", "1", "--seed", "3", "--no-base", "--out", str(tmp_path / "new"))
    assert process.returncode == 0, process.stderr
    *table, last = process.stdout.strip().splitlines()
    for expected in ("peak memory", "largest logit difference", "layers.1.blocks.1.attn"):
        assert any(expected in line for line in table)
    result = json.loads(last)
    assert result["agree"] is True
    assert result["images"] == 360
    assert 0 < result["largest_logit_difference"] < result["logit_tolerance"], "0: the patch was not used"
    assert result["top1_stock"] == pytest.approx(result["top1_patched"], abs=0.004)
    assert (result["epochs"], result["seed"]) == (1, 3)
    for name in ("seconds_stock", "seconds_patched", "peak_mib_stock", "peak_mib_patched", "training_seconds"):
        assert result[name] > 0
    assert [layer["layer"] for layer in result["layers"]] == [
        f"layers.{i}.blocks.{j}.attn" for i in (0, 1) for j in (0, 1)
    ]
    assert all(layer["bias"] in ("exact", "factored") and layer["reason"] for layer in result["layers"])
    with (tmp_path / "new" / "demo.csv").open() as file:
        stock, patched = csv.DictReader(file)
    assert (stock["variant"], patched["variant"]) == ("timm", "flashbias")
    assert float(patched["seconds"]) == result["seconds_patched"]
    assert {"device", "driver", "torch", "triton", "flashbias", "commit", "accurate"} <= patched.keys()
    assert nothing_is_cut_off(tmp_path / "new" / "demo.png")


@pytest.mark.slow
@pytest.mark.usefixtures("needs_timm")
def test_demo_learns_to_read():
    process = command_line("demo")
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.strip().splitlines()[-1])
    assert result["top1_stock"] > 0.9
    assert result["peak_mib_patched"] < result["peak_mib_stock"]


@pytest.mark.parametrize(
    ("seconds", "labels"),
    [((0.01234, 0.0041), ["12.3", "4.1 (33%)"]), ((1.6, 3.2), ["1600", "3200 (200%)"])],
)
def test_bars_are_labelled_with_plain_numbers(seconds, labels):
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    demo_picture._pair(axes, "time", "ms", dict(zip(("s_stock", "s_patched"), seconds, strict=True)), "s", 1e3)
    assert [text.get_text() for text in axes.texts] == labels


def nothing_is_cut_off(path):
    """Whether the picture's margin is empty all around, and the rest is not."""
    from matplotlib.image import imread

    picture = imread(path).copy()
    drawn = picture.min()
    picture[6:-6, 6:-6] = 1
    return drawn < 0.5 and picture.min() == 1


def measurement(logits):
    return Measurement(torch.tensor(logits).numpy(), seconds=1.0, peak=2**20)


def layer(name, rank):
    bias = torch.randn(2, 30, 30)
    choice = Choice(name, "exact" if rank is None else "factored", "because it pays, or because it does not", rank)
    return Layer(choice, decompose.svd(bias, rank or 16), bias)


STOCK = [[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [4.0, 1.0]]
LABELS = torch.tensor([0, 1, 0, 0])


def changed(**logits):
    rows = [list(row) for row in STOCK]
    for row, value in logits.items():
        rows[int(row[1:])][0] += value
    return rows


@pytest.mark.parametrize(
    ("patched", "agree"),
    [
        (STOCK, True),
        (changed(_0=5e-4), True),
        (changed(_0=2e-3), False),
        (changed(_0=float("nan")), False),
        (changed(_0=-1.5, _2=-2.5), False),
    ],
    ids=["equal", "rounding", "wrong logit", "NaN", "wrong images"],
)
def test_verdict(patched, agree):
    result = demo.compare(measurement(STOCK), measurement(patched), LABELS)
    assert result["agree"] is agree
    assert result["top1_stock"] == 1.0


@pytest.mark.usefixtures("needs_timm")
@pytest.mark.parametrize(("shift", "code"), [(1e-6, 0), (1e-2, 1)], ids=["agree", "differ"])
def test_exit_code_is_the_verdict(monkeypatch, tmp_path, shift, code):
    logits = torch.randn(360, 10)
    pair = {"stock": measurement(logits.tolist()), "patched": measurement((logits + shift).tolist())}
    layers = [layer(f"layers.{i}.blocks.0.attn", rank) for i, rank in enumerate((None, 16, 4))]
    monkeypatch.setattr(demo, "train", lambda *args: None)
    monkeypatch.setattr(demo.SideBySide, "measure", lambda *args: pair)
    monkeypatch.setattr(demo, "look_inside", lambda *args: layers)
    result = CliRunner().invoke(app, ["demo", "--no-base", "--out", str(tmp_path)])
    assert result.exit_code == code, result.output
    assert json.loads(result.stdout.strip().splitlines()[-1])["agree"] is (code == 0)
    assert nothing_is_cut_off(tmp_path / "demo.png")


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--device=abacus", "--device abacus"),
        ("--device=meta", "cpu, cuda or cuda:N"),
        ("--device=cuda", "sees no GPU"),
        ("--device=cuda:99", "and torch sees"),
        (f"--out={__file__}", "File exists"),
    ],
)
@pytest.mark.usefixtures("needs_timm")
def test_option_that_cannot_be_followed_is_refused(option, reason, monkeypatch, capsys):
    monkeypatch.setattr(machine, "gpus", list)
    monkeypatch.setattr(sys, "argv", ["flashbias", "demo", option])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err


def test_demo_needs_the_patch(monkeypatch, capsys):
    monkeypatch.setenv("FLASHBIAS_DISABLE", "1")
    monkeypatch.setattr(sys, "argv", ["flashbias", "demo"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "FLASHBIAS_DISABLE" in capsys.readouterr().err


def test_demo_needs_timm(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(demo.DemoError, match=r"no timm.*pip install"):
        demo.run(1, 0, "cpu", tmp_path)


def test_command_line_starts_without_torch_models():
    code = "import sys, flashbias.recipes.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"timm", "sklearn", "matplotlib", "flashbias.integrations"} & set(loaded)
