"""`flashbias bench` as a person runs it, its processes, and what is stored and reported."""

import csv
import io
import json
import os
import signal
import time
from dataclasses import replace

import pytest

from flashbias.recipes.bench import main as bench
from flashbias.recipes.bench import report
from flashbias.recipes.bench.figures import draw
from flashbias.recipes.bench.measure import Group, Settings
from flashbias.recipes.bench.processes import stream
from flashbias.recipes.bench.results import Row, load, store
from flashbias.recipes.bench.workloads import BY_NAME


def test_benchmark_measures_checks_and_stores(flashbias, tmp_path):
    arguments = ("--workload", "swin1-dense,decode-alibi", "--peers", "best,flash-none", "--repeats", "1")
    arguments += ("--warm", "1", "--out", "results")
    ended = flashbias("bench", "--device", "cpu", *arguments, OMP_NUM_THREADS="1")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out.strip().splitlines()[-1])
    assert result["wrong"] == []
    assert result["gates_met"] == []
    assert result["gates_missed"] == {}, "gates are for full sizes on one kind of GPU"
    with (tmp_path / "results" / "bench_small_fwd.csv").open() as file:
        rows = {(row["workload"], row["peer"]): row for row in csv.DictReader(file)}
    assert len(rows) == 10
    for (workload, peer), row in rows.items():
        assert row["device"]
        assert row["torch"]
        assert row["flashbias"]
        if peer == "flash-none":
            assert (row["status"], row["reason"], row["milliseconds"]) == ("absent", "needs a GPU", "")
        elif (workload, peer) == ("swin1-dense", "sdpa-concat"):
            assert (row["status"], row["reason"]) == ("refused", "a dense bias has no factors")
        else:
            assert row["status"] == "ok"
            assert 0 < float(row["p20"]) <= float(row["milliseconds"]) <= float(row["p80"])
            assert row["baseline"] == "sdpa-none"
    ours = rows["swin1-dense", "flashbias"]
    assert ours["accurate"] == "True"
    assert float(ours["tax"]) > 0
    assert float(ours["peak_mib"]) >= 0
    assert float(ours["first_call_seconds"]) > 0
    assert float(ours["new_length_ms"]) > 0
    (row,) = (row for row in load(tmp_path / "results" / "bench_small_fwdbwd.csv") if row.peer == "flashbias")
    assert row.accurate
    assert row.bias_gradient
    for name in ("query", "key", "value", "values"):
        assert f"{name}=" in row.errors
    assert "forward and backward" in ended.out
    for path in result["files"]:
        assert (tmp_path / path).stat().st_size > 500


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--workload", "abacus"), "--workload abacus"),
        (("--peers", "abacus"), "--peers abacus"),
        (("--mode", "bwd"), "--mode bwd"),
        (("--sizes", "huge"), "--sizes huge"),
        (("--lengths", "8,x"), "--lengths x"),
        (("--device", "abacus"), "--device abacus"),
        (("--workload", "decode-alibi", "--mode", "fwdbwd"), "nothing to measure"),
        (("--flashbias-repo", "nowhere"), "no flash_bias_triton.py"),
        (("--redraw", "--out", "nowhere"), "no results"),
    ],
)
def test_what_there_is_not_is_refused(flashbias, arguments, reason):
    ended = flashbias("bench", "--device", "cpu", *arguments)
    assert ended.code == 2
    assert reason in ended.err
    assert "Traceback" not in ended.err


def test_list_names_all_workloads_and_what_peers_lack(flashbias):
    ended = flashbias("bench", "--list", "--device", "cpu")
    assert ended.code == 0
    for text in (*BY_NAME, "fwd 0.92 / 0.75", "sdpa-concat", "needs a GPU"):
        assert text in ended.out


def work(task, say):
    say(f"at {task}")
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "raise":
        raise ValueError("out of luck")
    if task == "sleep":
        time.sleep(60)
    print("this is no result")
    return task, os.environ.get("SAID_BEFOREHAND")


@pytest.mark.parametrize(
    ("last", "reason"),
    [("die", "the process died of SIGKILL"), ("raise", "ValueError: out of luck"), ("sleep", "no answer in 3 s")],
)
def test_process_tells_how_far_it_came(last, reason, capfd):
    list(stream(work, ["good"], {}, silence=120.0))  # the first one of all waits until torch is loaded
    told = list(stream(work, ["good", last, "never"], {"SAID_BEFOREHAND": "yes"}, silence=3.0))
    done = [("doing", "at good"), ("done", ("good", "yes")), ("doing", f"at {last}")]
    assert told == [*done, ("died", reason)]
    assert capfd.readouterr().out == ""


class Bar:
    """Takes what is said of progress."""

    def update(self, *args, **options):
        pass

    def advance(self, *args):
        pass


def test_a_peer_that_ends_its_process_is_left_out_and_the_others_are_measured(monkeypatch):
    started = []

    def fake(work, tasks, environment, silence):
        started.append([task.peers for task in tasks])
        for group in tasks:
            for peer in group.peers:
                yield "doing", peer
                if peer == "paper":
                    yield "died", "illegal memory access"
                    return
            yield "done", [group.row(peer, milliseconds=1.0) for peer in group.peers]

    monkeypatch.setattr(bench, "stream", fake)
    first = Group(BY_NAME["swin1-factors"], "fwdbwd", ("flashbias", "paper", "flex"))
    second = Group(BY_NAME["swin3-factors"], "fwdbwd", ("flashbias",))
    rows = [row for found in bench._survive([first, second], Settings("cpu"), {}, Bar(), 0) for row in found]
    assert started == [[first.peers, second.peers], [("flashbias", "flex"), ("flashbias",)]]
    assert [(row.workload, row.peer, row.status) for row in rows] == [
        ("swin1-factors", "paper", "failed"),
        ("swin1-factors", "flashbias", "ok"),
        ("swin1-factors", "flex", "ok"),
        ("swin3-factors", "flashbias", "ok"),
    ]
    assert rows[0].reason == "paper: illegal memory access"


def test_a_group_whose_reference_fails_does_not_stop_the_others(monkeypatch):
    def fake(work, tasks, environment, silence):
        for group in tasks:
            yield "doing", "float64"
            if group.workload.name == "pde-distance":
                yield "died", "out of memory"
                return
            yield "done", [group.row(peer) for peer in group.peers]

    monkeypatch.setattr(bench, "stream", fake)
    groups = [Group(BY_NAME[name], "fwd", ("flashbias", "flex")) for name in ("pde-distance", "triangle-384")]
    rows = [row for found in bench._survive(groups, Settings("cpu"), {}, Bar(), 0) for row in found]
    assert [row.status for row in rows] == ["failed", "failed", "ok", "ok"]


def row(workload="gpt2-alibi", mode="fwd", peer="flashbias", **changes):
    group = Group(BY_NAME[workload], mode, (peer,))
    known = {"milliseconds": 3.0, "p20": 2.9, "p80": 3.1, "tax": 0.9, "accurate": True, "scores_per_second": 2e12}
    return group.row(peer, **known | {"device": "NVIDIA H200", "baseline": "cudnn-none"} | changes)


@pytest.mark.parametrize(
    ("changes", "met"),
    [
        ({}, True),
        ({"tax": 0.9249}, True),
        ({"tax": 0.93}, False),
        ({"accurate": False}, False),
        ({"tax": None, "accurate": None, "status": "failed"}, False),
        ({"device": "NVIDIA A100"}, None),
        ({"peer": "flex"}, None),
    ],
)
def test_gate_needs_accuracy_and_holds_for_ours_on_its_chip(changes, met):
    made = row(**changes)
    assert (None if made.target is None else made.meets(made.target.gate)) is met


def test_gate_holds_for_its_own_size_only():
    assert replace(row(), n_q=8192, n_k=8192).target is None
    assert Group(BY_NAME["gpt2-alibi"].at(16384), "fwd", ("flashbias",)).row("flashbias").target is None


def test_stored_rows_come_back_and_later_ones_replace_them(tmp_path):
    path = tmp_path / "folder" / "bench_fwd.csv"
    first = [row("swin1-dense"), row("gpt2-alibi", tax=0.5, reason='a "comma", and more', bias_gradient=False)]
    assert store(first, path) == load(path) == first[::-1], "in the order of the workloads"
    later = row("swin1-dense", tax=None, accurate=None, milliseconds=None)
    store([later], path)
    assert load(path) == [first[1], later]


def test_summary_says_what_was_met_and_what_was_not():
    slow = row("swin1-dense", tax=0.83, host_us=99.0)
    rows = [
        row(tax=0.7, host_us=70.0, first_call_seconds=2.5),
        slow,
        row("triangle-384", accurate=False, reason="out: 3 times the bound"),
        row(mode="fwdbwd", milliseconds=10.0),
        row(mode="fwdbwd", milliseconds=12.0, peer="flashbias-deterministic"),
    ]
    found = report.summary(rows, [])
    assert found["gates_met"] == ["gpt2-alibi fwd N 16384", "gpt2-alibi fwdbwd N 16384"]
    assert found["gates_missed"] == {
        "swin1-dense fwd N 576": "0.830 for 0.82",
        "triangle-384 fwd N 384": "out: 3 times the bound",
    }
    assert found["goals_met"] == ["gpt2-alibi fwd N 16384", "gpt2-alibi fwdbwd N 16384"]
    assert found["wrong"] == ["triangle-384 fwd N 384"]
    assert found["deterministic"] == {"gpt2-alibi fwdbwd N 16384": 1.2}
    assert found["worst"]["host_us"] == {"value": 99.0, "bound": 80.0, "met": False, "of": "swin1-dense fwd N 576"}
    assert found["worst"]["first_call_seconds"]["met"] is True
    json.dumps(found)


def test_odd_lengths_are_compared_with_the_multiple_below():
    rows = [
        replace(row(scores_per_second=speed), n_q=n, n_k=n) for n, speed in ((1024, 2e12), (1031, 1.9e12), (2000, 1e12))
    ]
    assert report.odd_lengths(rows) == {"gpt2-alibi fwd N 1031": 0.95}


def test_table_shows_verdicts_and_reasons():
    from rich.console import Console

    console = Console(width=220, record=True, file=io.StringIO())
    absent = row(
        "triangle-384", peer="trifast", status="absent", reason="trifast is [not] installed", milliseconds=None
    )
    console.print(
        report.table([row(), row(peer="flex", bias_gradient=False), row("triangle-384", tax=2.0), absent], "fwd")
    )
    text = console.export_text()
    for part in ("0.92 met", "0.75 missed", "1.05 missed", "trifast is [not] installed", "bias without gradient"):
        assert part in text
    assert "first s" not in text, "nothing stands in that column"


def test_figures_show_taxes_or_curves(tmp_path):
    taxes = [row(), row(peer="flex", tax=1.4), row("pde-distance", accurate=False), row(peer="cudnn-none", tax=1.0)]
    draw(taxes, "fwd", tmp_path / "taxes.png")
    curves = [replace(made, n_k=n) for made in taxes for n in (1024, 2048)]
    draw(curves, "fwd", tmp_path / "curves.png")
    draw([row(status="failed", milliseconds=None, tax=None)], "fwd", tmp_path / "nothing.png")
    sizes = [(tmp_path / name).stat().st_size for name in ("taxes.png", "curves.png", "nothing.png")]
    assert min(sizes) > 10_000


def test_row_of_nothing_measured_can_be_stored(tmp_path):
    made = Group(BY_NAME["swin1-dense"], "fwd", ("flex",)).row("flex")
    assert isinstance(made, Row)
    assert store([made], tmp_path / "bench_fwd.csv") == load(tmp_path / "bench_fwd.csv")
