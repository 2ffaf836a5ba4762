"""Hosts that are imported after the patch was asked for."""

import sys
import warnings

import pytest

from flashbias.patches import Patch, PatchSet, PatchWarning


def new_method(self, x, y=1):
    return ("new", x, y)


def method_patches(host, **options):
    return PatchSet(Patch(host.target("Host.method"), new_method, ("self", "x", "y")), **options)


def test_host_is_patched_when_it_is_imported(stand_in):
    host = stand_in()
    patches = method_patches(host)
    patches.apply_when_imported()
    assert host.name not in sys.modules
    assert not patches.is_applied()
    module = host.load()
    assert patches.is_applied()
    assert module.Host().method(1) == ("new", 1, 1)
    patches.revert()
    assert module.Host().method(1) == ("method", 1, 1)


def test_host_that_is_imported_already_is_patched_at_once(stand_in):
    host = stand_in()
    module = host.load()
    patches = method_patches(host)
    patches.apply_when_imported()
    assert module.Host().method(1) == ("new", 1, 1)


def test_names_taken_from_the_host_after_the_hook_are_the_replacement(stand_in):
    host = stand_in()
    patches = PatchSet(Patch(host.target("function"), lambda x: ("new", x), ("x",)))
    patches.apply_when_imported()
    user = stand_in(f"from {host.name} import function\n")
    assert user.load().function(1) == ("new", 1)


def test_revert_calls_a_waiting_patch_off(stand_in):
    host = stand_in()
    patches = method_patches(host)
    patches.apply_when_imported()
    assert patches.revert() is False
    assert host.load().Host().method(1) == ("method", 1, 1)


@pytest.mark.parametrize(
    ("path", "options", "reason"),
    [
        ("Host.missing", {}, "without Host.missing"),
        ("Host.inherited", {}, r"parameters \(self, x\)"),
        ("Host.method", {"distribution": "no-such-distribution"}, "not installed"),
    ],
)
def test_failure_in_the_hook_warns_and_leaves_the_host_importable(stand_in, path, options, reason):
    host = stand_in()
    patches = PatchSet(Patch(host.target(path), new_method, ("self", "x", "y")), **options)
    patches.apply_when_imported()
    with pytest.warns(PatchWarning, match=reason):
        module = host.load()
    assert not patches.is_applied()
    assert module.Host().method(1) == ("method", 1, 1)


def test_patch_over_two_modules_waits_for_both(stand_in):
    first, second = stand_in(), stand_in()
    patches = PatchSet(
        Patch(first.target("Host.method"), new_method, ("self", "x", "y")),
        Patch(second.target("Host.method"), new_method, ("self", "x", "y")),
    )
    patches.apply_when_imported()
    outer = stand_in(f"import {second.name}\nimport {first.name}\n")
    assert first.load().Host().method(1) == ("method", 1, 1)
    outer.load()
    assert patches.is_applied()


def test_disabled_hook_leaves_the_host_alone(stand_in, monkeypatch):
    host = stand_in()
    patches = method_patches(host)
    patches.apply_when_imported()
    monkeypatch.setenv("FLASHBIAS_DISABLE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert host.load().Host().method(1) == ("method", 1, 1)
