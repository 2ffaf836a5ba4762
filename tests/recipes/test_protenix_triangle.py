"""The recipe that times triangle attention, on a stand-in for Protenix."""

import csv
import sys
from pathlib import Path

import pytest

from flashbias.recipes.protenix import triangle

PACKAGE = Path(__file__).parents[1] / "integrations" / "protenix" / "package"


@pytest.fixture
def rows(monkeypatch, tmp_path):
    """What the recipe writes for 12 tokens in one chunk and 17 in chunks of 8."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(PACKAGE)])
    monkeypatch.setattr(triangle, "CHUNKS", {12: None, 17: 8})
    out = tmp_path / "rows.csv"
    triangle.main(["--tokens", "12", "17", "--device", "cpu", "--repeats", "1", "--out", str(out)])
    with out.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_way_is_timed_and_right(rows):
    ways = {(row["part"], row["kernel"]) for row in rows}
    assert {("attention", "torch"), ("module", "torch"), ("attention", "flashbias"), ("module", "flashbias")} <= ways
    assert len(rows) == 2 * len(ways)
    assert {(row["tokens"], row["chunk"]) for row in rows} == {("12", "12"), ("17", "8")}
    for row in rows:
        assert float(row["ms"]) > 0
        assert (float(row["error"]) > 0.05) == (row["kernel"] == "no bias (wrong)")


@pytest.mark.parametrize(("tokens", "rows"), [(384, None), (1024, None), (1218, 512), (2048, 256), (4000, 32)])
def test_chunks_are_those_of_protenix(tokens, rows):
    assert triangle.chunk_size(tokens) == rows
