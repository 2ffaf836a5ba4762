"""`generate()`: token for token what the host's own code in fp32 writes."""

import pytest
import torch
from prompts import DEVICE, GREEDY, WRITING, make_ids, make_mask

from .conftest import HOSTS

every_host = pytest.mark.parametrize("kind", HOSTS)


@every_host
@pytest.mark.parametrize("way", WRITING)
def test_five_prompts_of_different_lengths(make_model, stock, calls, kind, way):
    longest = {"max_seq_len": 256} if kind == "mpt" else {}
    model, ids, mask = make_model(kind, **longest), make_ids(5, 15), make_mask("left", 5, 15)

    def write():
        return model.generate(ids, attention_mask=mask, **WRITING[way])

    ours, n = write(), WRITING[way]["max_new_tokens"]
    assert ours.shape == (5, 15 + n)
    assert [query[-2] for query, *_ in calls] == [15] * 2 + [1] * 2 * (n - 1)
    with stock():
        assert torch.equal(ours, write())


@every_host
def test_five_prompts_without_a_cache(make_model, stock, calls, kind):
    model, ids, mask = make_model(kind), make_ids(5, 15), make_mask("left", 5, 15)

    def write():
        return model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, use_cache=False)

    ours = write()
    assert [query[-2] for query, *_ in calls[::2]] == list(range(15, 35))
    with stock():
        assert torch.equal(ours, write())


@pytest.mark.parametrize("kind", ["bloom", "mpt"])  # Falcon's shapes fit no cache of `generate()`'s
def test_static_cache(make_model, stock, calls, transformers, kind):
    if kind == "mpt" and transformers.__version__.startswith("4"):
        pytest.skip("MPT had no static caches in transformers 4")
    model, ids, mask = make_model(kind), make_ids(3, 9), make_mask("left", 3, 9)

    def write(**options):
        return model.generate(ids, attention_mask=mask, max_new_tokens=12, **GREEDY, **options)

    ours = write(cache_implementation="static", disable_compile=True)
    prompt = 2 if kind == "bloom" else 0  # MPT's comes with a mask for each pair, which is left to the host
    assert len(calls) == prompt + 11 * 2
    assert len({key for _, key, _ in calls}) == 1
    assert torch.equal(ours, write(cache_implementation="static"))  # compiled on a GPU
    with stock():
        assert torch.equal(ours, write())


@every_host
def test_prompt_in_chunks(make_model, stock, kind):
    model, ids = make_model(kind), make_ids(1, 20)
    ones = torch.ones_like(ids)

    def write(**options):
        return model.generate(ids, attention_mask=ones, max_new_tokens=8, **GREEDY, **options)

    ours = write(prefill_chunk_size=7)
    with stock():
        assert torch.equal(ours, write())


@every_host
def test_pipeline_on_one_prompt_without_a_mask(make_model, stock, kind):
    model, ids = make_model(kind), make_ids(1, 6)

    def write():
        with torch.no_grad():
            return model.generate(ids.to(DEVICE), max_new_tokens=10, do_sample=False)

    ours = write()
    with stock():
        assert torch.equal(ours, write())
