"""The recipe on language models, at sizes that say that it works and nothing about speed."""

import csv
import json

import pytest
import torch

from flashbias.recipes.language_model import generate, gpt, models, t5
from flashbias.recipes.language_model.accuracy import run as train
from flashbias.recipes.language_model.measuring import row_store

WAYS = ["torch", "flashbias", "factors in fp16", "factors in bf16"]


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_training_by_both_is_the_same(tmp_path, capsys):
    text = tmp_path / "text"
    text.write_bytes(b"Memory grows with the length, and not with its square. " * 900)
    assert train(text, 3, 0, "cpu", tmp_path) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["same"] is True
    losses = read(tmp_path / "language_model_loss.csv")
    assert [(row["way"], row["step"]) for row in losses] == [(way, str(step)) for way in WAYS for step in range(3)]
    found = read(tmp_path / "language_model_perplexity.csv")
    assert [row["length"] for row in found] == ["64", "128", "256", "512"] * 4
    assert all(row["torch"] and row["commit"] is not None for row in found)
    assert (tmp_path / "language_model.png").stat().st_size > 10_000


@pytest.mark.parametrize("way", ["torch", "factors in fp16"])
def test_ways_agree_where_positions_are_exact(way):
    model, ids = gpt.GPT(2, 32, 2), torch.randint(256, (2, 100))
    torch.testing.assert_close(model(ids, way), model(ids, "flashbias"), rtol=1e-4, atol=1e-4)


def test_bfloat16_positions_are_rounded_beyond_256():
    model, ids = gpt.GPT(1, 32, 2), torch.randint(256, (1, 600))
    exact, rounded = model(ids, "flashbias"), model(ids, "factors in bf16")
    gap = (exact - rounded).abs().amax((0, 2))
    assert gap[:256].max() < 1e-4 < gap[300:].max()


def test_corpus_is_cut_into_two(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(100)))
    train_part, held_out = gpt.corpus(path)
    assert (len(train_part), len(held_out)) == (90, 10)
    assert held_out[0] == 90
    assert len(gpt.corpus(None, most=1000)[0]) > 800


def test_every_attention_has_its_row_and_a_failure_says_why(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(models, "CHECKED", 40)
    monkeypatch.setattr(models, "DECODED", 2)
    monkeypatch.setattr(models, "REPEATS", 1)
    kind, options = models.MODELS["tiny-mpt"]
    monkeypatch.setitem(models.MODELS, "tiny-mpt", (kind, options | {"max_seq_len": 60}))
    assert models.run(["tiny-mpt"], [32, 64], 40, None, "cpu", tmp_path) == 0
    rows = read(tmp_path / "language_model_models.csv")
    assert [(row["work"], row["attention"], row["tokens"]) for row in rows] == [
        *(("prefill", attention, tokens) for tokens in ("32", "64") for attention in models.ATTENTIONS),
        *(("decode", attention, "40") for attention in (*models.ATTENTIONS, models.NO_CUDNN)),
    ]
    failed = [row for row in rows if row["reason"]]
    assert [(row["attention"], row["tokens"]) for row in failed] == [("stock", "64")], "more keys than max_seq_len"
    assert all(float(row["milliseconds"]) > 0 for row in rows if not row["reason"])
    assert {row["accurate"] for row in rows} == {"True"}


def test_an_attention_that_fails_midway_leaves_the_others_a_whole_cache(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(models, "DECODED", 2)
    monkeypatch.setattr(models, "REPEATS", 1)
    model, calls = models.make("tiny-bloom", None, "cpu"), []

    def failing(*tensors, attend=torch.nn.functional.scaled_dot_product_attention, **options):
        calls.append(tensors)
        if len(calls) == 2:  # the second of two layers
            raise RuntimeError("out of luck")
        return attend(*tensors, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", failing)
    rows = models.decodings(model, 16, "cpu")
    assert [bool(row["reason"]) for row in rows] == [False, True, False, False]
    assert all(row["milliseconds"] > 0 for row in rows if not row["reason"])


def test_model_that_cannot_be_made_or_checked_leaves_the_others_their_rows(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr(models, "CHECKED", 40)
    monkeypatch.setattr(models, "REPEATS", 1)
    monkeypatch.setitem(models.MODELS, "tiny-mpt", ("Mpt", {"d_model": 64, "n_heads": 5}))
    assert models.run(["tiny-mpt,tiny-bloom"], [32], 0, None, "cpu", tmp_path) == 1
    rows = read(tmp_path / "language_model_models.csv")
    assert [row["model"] for row in rows] == ["tiny-mpt"] + ["tiny-bloom"] * 3
    assert rows[0]["work"] == "check"
    assert "5" in rows[0]["reason"]
    assert not any(row["reason"] for row in rows[1:])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"rows": 4, "wrong": 1}


def test_rows_of_models_that_a_run_leaves_out_stay(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(models, "CHECKED", 40)
    monkeypatch.setattr(models, "REPEATS", 1)
    for name, length in (("tiny-bloom", 32), ("tiny-mpt", 32), ("tiny-bloom", 48)):
        models.run([name], [length], 0, None, "cpu", tmp_path)
    rows = read(tmp_path / "language_model_models.csv")
    assert [(row["model"], row["tokens"]) for row in rows] == [("tiny-mpt", "32")] * 3 + [("tiny-bloom", "48")] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["language_model_models.csv"]


def test_rows_are_replaced_one_by_one_whatever_columns_they_have(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("model,batch,older\nt5,1,yes\nt5,4,yes\n", encoding="utf-8")
    here = row_store("rows.csv", "cpu", tmp_path, ("model", "batch"))
    beside = row_store("rows.csv", "cpu", tmp_path, ("model", "batch"))
    here({"model": "t5", "batch": 1, "new": 0.5})
    beside({"model": "mt5", "batch": 1, "new": 2.0})
    here({"model": "t5", "batch": 1, "new": 1.5})
    assert [(row["model"], row["batch"], row["new"]) for row in read(path)] == [
        ("t5", "4", ""), ("mt5", "1", "2.0"), ("t5", "1", "0.5"), ("t5", "1", "1.5"),
    ]  # fmt: skip


@pytest.mark.parametrize("part", ["peak", "prefill"])
def test_longer_prompts_are_not_tried_where_a_shorter_one_did_not_fit(tmp_path, monkeypatch, part):
    pytest.importorskip("transformers")
    monkeypatch.setattr(models, "CHECKED", 40)

    def full(model, attention, tokens, device):
        raise torch.OutOfMemoryError(f"{tokens} tokens")

    monkeypatch.setattr(models, part, full)
    models.run(["tiny-bloom"], [32, 64], 0, None, "cpu", tmp_path)
    reasons = [row["reason"] for row in read(tmp_path / "language_model_models.csv")]
    assert reasons == ["OutOfMemoryError: 32 tokens"] * 3 + ["a shorter prompt: OutOfMemoryError"] * 3


def test_t5_in_training_by_every_attention(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(t5, "CHECKED", 150)
    monkeypatch.setattr(t5, "REPEATS", 1)
    assert t5.run("tiny-t5", [40, 64], 2, False, "cpu", tmp_path) == 0
    rows = read(tmp_path / "language_model_t5.csv")
    stock = [
        f"stock {name}" for name in t5.implementations(transformers.T5EncoderModel(transformers.T5Config(**t5.TINY)))
    ]
    expected = [(attention, n) for n in ("40", "64") for attention in (*stock, t5.BOUND, t5.OURS)]
    assert [(row["attention"], row["tokens"]) for row in rows] == expected
    assert {(row["reason"], row["accurate"]) for row in rows} == {("", "True")}
    assert all(float(row["milliseconds"]) > 0 for row in rows)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["wrong"] == 0
    assert set(report["times_faster"]) == {"40", "64"}


def test_t5_that_is_wrong_is_told(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(t5, "CHECKED", 60)
    monkeypatch.setattr(t5, "REPEATS", 1)
    from flashbias.integrations.t5 import attention as layer

    table = layer.make_table
    monkeypatch.setattr(layer, "make_table", lambda *layer_and_buckets: table(*layer_and_buckets) * 1.01)
    assert t5.run("tiny-t5", [16], 1, False, "cpu", tmp_path) == 1


@pytest.mark.parametrize("name", ["tiny-bloom", "tiny-t5"])
def test_texts_in_fp32_are_those_of_the_host_and_others_are_counted(tmp_path, name):
    pytest.importorskip("transformers")
    assert generate.run([name], 7, 1, None, "cpu", tmp_path) == 0
    rows = read(tmp_path / "language_model_generate.csv")
    assert [row["dtype"] for row in rows] == ["float32", "float16", "bfloat16"]
    assert [row[column] for row in rows[:1] for column in ("equal", "host_equal", "next_equal", "of")] == ["35"] * 4
    assert all(0 < int(row["equal"]) <= 35 and float(row["tokens_per_second"]) > 0 for row in rows)
    assert all(float(row["first_seconds"]) > 0 and float(row["host_first_seconds"]) > 0 for row in rows)
    assert [row["accurate"] for row in rows] == ["True", "", ""]


def test_another_text_in_fp32_is_told(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from flashbias.integrations.alibi import bloom

    slopes = bloom.alibi_slopes
    monkeypatch.setattr(bloom, "alibi_slopes", lambda *heads: slopes(*heads) * -3)
    assert generate.run(["tiny-bloom"], 30, 0, None, "cpu", tmp_path) == 1


def test_tokens_count_up_to_the_first_that_differs():
    texts = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    others = torch.tensor([[1, 2, 0, 4], [1, 2, 3, 4]])
    assert generate.agreement(texts, others) == 2 + 4


def test_prompts_have_their_padding_where_models_want_it():
    for name, edge in (("tiny-bloom", 0), ("tiny-t5", -1)):
        pytest.importorskip("transformers")
        _, mask = generate.prompts(generate.make(name, 1, None, "cpu"), "cpu")
        assert mask[:, edge].tolist() == [1, 0, 0, 0, 0]
