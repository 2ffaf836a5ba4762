"""Transitions over pairs: the host's own code, a part of the pairs at a time where there are many."""

import pytest
import torch

from flashbias.integrations.protenix import transition

from .conftest import DEVICE, give_structure


@pytest.fixture
def module(host):
    return give_structure(host.primitives.Transition(8, 4)).eval()


@pytest.fixture
def rows(module):
    """How many rows each call of the first projection gets."""
    seen = []
    project = module.linear_no_bias_a.forward
    module.linear_no_bias_a.forward = lambda y: seen.append(y.shape[:-1].numel()) or project(y)
    return seen


@pytest.mark.parametrize("shape", [(60, 60, 8), (2, 60, 60, 8)])
def test_many_pairs_are_taken_in_parts(module, rows, monkeypatch, shape):
    x = torch.randn(shape, device=DEVICE)
    with torch.no_grad():
        whole = module(x)
        assert rows == [x.shape[:-1].numel()]
        monkeypatch.setattr(transition, "LARGE", x.numel() * 4 * 4)
        made = module(x)
        assert len(rows) == 1 + 8
        assert sum(rows[1:]) == rows[0]
        del rows[:]
        monkeypatch.setattr(transition, "LARGE", x.numel() * 4 * 4 + 1)
        module(x)
        assert len(rows) == 1
    assert made.shape == whole.shape
    torch.testing.assert_close(made, whole)


def test_gradients_hooks_and_single_rows_are_the_hosts(module, rows, monkeypatch):
    monkeypatch.setattr(transition, "LARGE", 0)
    x = torch.randn(60, 60, 8, device=DEVICE)
    module(x).sum().backward()
    assert rows == [3600]
    with torch.no_grad():
        module(x[0])
        assert rows == [3600, 60]
        module.layernorm1.register_forward_hook(lambda *_: None)
        module(x)
    assert rows == [3600, 60, 3600]
