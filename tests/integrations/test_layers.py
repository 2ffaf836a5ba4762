"""`FLASHBIAS_VERIFY` and `FLASHBIAS_PROFILE`: what they say of each layer, and by which name."""

import pytest
import torch

from flashbias.integrations import profile, verify

from .conftest import DEVICE, both_hosts

NAMES = [f"layers.{stage}.blocks.{block}.attn" for stage in range(2) for block in range(2)]


@pytest.fixture
def image():
    return torch.randn(2, 1, 32, 32, device=DEVICE)


@both_hosts
def test_verify_reports_each_layer(swin_v2, make_model, image, monkeypatch, capsys):
    monkeypatch.setenv("FLASHBIAS_VERIFY", "1")
    model = make_model().train()
    for part in model.modules():
        if hasattr(part, "proj_drop"):
            part.proj_drop.p = 0.3
    for _ in range(2):
        torch.manual_seed(7)
        verified = model(image)
    found = verify.differences()
    assert [(entry.layer, entry.calls) for entry in found] == [(name, 2) for name in NAMES]
    assert all(0 < entry.difference < 1e-4 for entry in found)
    assert all(entry.largest > 1e-2 for entry in found)
    verify.report()
    assert NAMES[3] in capsys.readouterr().err

    monkeypatch.delenv("FLASHBIAS_VERIFY")
    torch.manual_seed(7)  # dropout draws the same numbers with and without
    torch.testing.assert_close(model(image), verified)


def test_verify_shows_a_wrong_result(swin_v2, make_model, image, monkeypatch):
    monkeypatch.setenv("FLASHBIAS_VERIFY", "1")
    gather = swin_v2._gather_bias
    monkeypatch.setattr(swin_v2, "_gather_bias", lambda *args: 0 * gather(*args))
    with torch.no_grad():
        make_model()(image)
    assert max(entry.difference for entry in verify.differences()) > 0.05


def test_profile_reports_each_layer(swin_v2, make_model, image, monkeypatch, capsys):
    model = make_model()
    expected = model(image)
    assert not profile.timings()
    monkeypatch.setenv("FLASHBIAS_PROFILE", "1")
    for _ in range(3):
        assert torch.equal(model(image), expected)
    found = profile.timings()
    assert [(timing.layer, timing.calls) for timing in found] == [(name, 3) for name in NAMES]
    assert all(0 < timing.first < timing.seconds for timing in found)
    profile.report()
    table = capsys.readouterr().err
    assert all(name in table for name in NAMES)
    assert "FLASHBIAS_PROFILE" in table


def test_profile_and_verify_together(swin_v2, make_model, image, monkeypatch):
    monkeypatch.setenv("FLASHBIAS_PROFILE", "1")
    monkeypatch.setenv("FLASHBIAS_VERIFY", "1")
    make_model()(image)
    assert [timing.calls for timing in profile.timings()] == [1] * 4
    assert [entry.calls for entry in verify.differences()] == [1] * 4


def test_compiled_calls_are_neither_timed_nor_verified(swin_v2, make_model, image, monkeypatch):
    monkeypatch.setenv("FLASHBIAS_PROFILE", "1")
    monkeypatch.setenv("FLASHBIAS_VERIFY", "1")
    torch.compile(make_model(), fullgraph=True, backend="eager")(image)
    assert not profile.timings()
    assert not verify.differences()


def test_layers_are_named_within_the_model_that_is_called(swin_v2, make_model, image, monkeypatch):
    monkeypatch.setenv("FLASHBIAS_PROFILE", "1")
    model = make_model()
    torch.nn.Sequential(model)(image)
    alone = make_model().layers[0].blocks[0].attn
    alone(torch.randn(4, 16, 16, device=DEVICE))
    assert [timing.layer for timing in profile.timings()] == [*(f"0.{name}" for name in NAMES), "WindowAttention 4"]


@pytest.mark.gpu
def test_events_are_read_before_they_are_many(swin_v2, make_model, image, monkeypatch):
    monkeypatch.setenv("FLASHBIAS_PROFILE", "1")
    monkeypatch.setattr(profile, "PENDING", 3)
    model = make_model()
    for _ in range(7):
        model(image)
    assert all(timing.calls == 6 and len(timing._pending) == 1 for timing in profile._timings.rows)
    assert all(timing.calls == 7 for timing in profile.timings())
