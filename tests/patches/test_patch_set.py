"""Applying and reverting: what is replaced, what comes back, and when nothing may be touched."""

import functools
import inspect

import pytest

from flashbias import FlashBiasError
from flashbias.patches import (
    HostMissingError,
    Patch,
    PatchedOnTopError,
    PatchError,
    PatchSet,
    SignatureChangedError,
    TargetMissingError,
    UnsupportedVersionError,
)


def new_method(self, x, y=1):
    return ("new", x, y)


def new_one(self, x):
    return ("new", x)


def new_function(x):
    return ("new", x)


def new_of_class(cls, x):
    return ("new", cls.__name__, x)


def method_patch(host, **options):
    return Patch(host.target("Host.method"), new_method, ("self", "x", "y"), **options)


def snapshot(*owners):
    return [dict(vars(owner)) for owner in owners]


def test_every_kind_of_target_is_replaced_and_comes_back(stand_in):
    host = stand_in()
    module = host.load()
    owners = (module, module.Host, module.Base, module.Host.Inner)
    before = snapshot(*owners)
    patches = PatchSet(
        method_patch(host),
        Patch(host.target("Host.static"), new_function, ("x",)),
        Patch(host.target("Host.of_class"), new_of_class, ("cls", "x")),
        Patch(host.target("Host.inherited"), new_one, ("self", "x")),
        Patch(host.target("Host.Inner.method"), new_one, ("self", "x")),
        Patch(host.target("function"), new_function, ("x",)),
    )
    assert not patches.is_applied()
    assert patches.apply() is True
    assert patches.is_applied()

    instance = module.Host()
    assert instance.method(2, y=3) == ("new", 2, 3)
    assert instance.static(2) == module.Host.static(2) == ("new", 2)
    assert module.Host.of_class(2) == ("new", "Host", 2)
    assert instance.inherited(2) == ("new", 2)
    assert module.Base().inherited(2) == ("inherited", 2), "the base class is not the target"
    assert module.Host.Inner().method(2) == ("new", 2)
    assert module.function(2) == ("new", 2)
    assert vars(module.Host)["method"] is new_method, "a plain function, with nothing around it"

    assert patches.revert() is True
    assert not patches.is_applied()
    after = snapshot(*owners)
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys()
        assert all(old[key] is new[key] for key in old)
    assert "inherited" not in vars(module.Host)


def test_apply_and_revert_are_idempotent(stand_in):
    host = stand_in()
    original = host.load().Host.method
    patches = PatchSet(method_patch(host))
    assert patches.revert() is False
    assert [patches.apply(), patches.apply()] == [True, False]
    assert [patches.revert(), patches.revert()] == [True, False]
    assert host.load().Host.method is original


def test_apply_imports_the_host(stand_in):
    host = stand_in()
    patches = PatchSet(method_patch(host))
    patches.apply()
    assert host.load().Host().method(1) == ("new", 1, 1)


def test_original_is_kept_for_the_replacement(stand_in):
    host = stand_in()

    def hand_on(self, x, y=1):
        return self.before(x, y)

    patches = PatchSet(Patch(host.target("Host.method"), hand_on, ("self", "x", "y"), keep_as="before"))
    patches.apply()
    assert host.load().Host.before.__name__ == "before", "TorchScript goes by this name"
    assert host.load().Host().method(5) == ("method", 5, 1)
    patches.revert()
    assert not hasattr(host.load().Host, "before")


def test_name_for_the_original_must_be_free(stand_in):
    host = stand_in()
    with pytest.raises(PatchError, match="already called inherited"):
        PatchSet(method_patch(host, keep_as="inherited")).apply()
    assert host.load().Host().method(1) == ("method", 1, 1)


def test_context_manager_leaves_the_host_as_it_found_it(stand_in):
    host = stand_in()
    patches = PatchSet(method_patch(host))
    instance = host.load().Host()
    with patches as entered:
        assert entered is patches
        with patches:
            assert instance.method(1) == ("new", 1, 1)
        assert instance.method(1) == ("new", 1, 1), "the inner block has found it applied"
    assert instance.method(1) == ("method", 1, 1)
    with pytest.raises(ZeroDivisionError), patches:
        _ = 1 / 0
    assert not patches.is_applied()


def test_nothing_is_changed_unless_everything_resolves(stand_in):
    host = stand_in()
    module = host.load()
    before = snapshot(module, module.Host)
    good = method_patch(host, keep_as="before")
    for bad, error in (
        (Patch(host.target("Host.missing"), new_one, ("self", "x")), TargetMissingError),
        (Patch(host.target("Missing.method"), new_one, ("self", "x")), TargetMissingError),
        (Patch(host.target("Host.inherited"), new_one, ("self", "x", "mask")), SignatureChangedError),
        (Patch("no_such_module:function", new_one, ("self", "x")), HostMissingError),
    ):
        patches = PatchSet(good, bad)
        with pytest.raises(error):
            patches.apply()
        assert not patches.is_applied()
        assert snapshot(module, module.Host) == before


def test_nothing_stays_changed_when_setting_an_attribute_fails(stand_in):
    host = stand_in(
        """
class Refuses(type):
    def __setattr__(cls, name, value):
        raise RuntimeError("sealed")


class Open:
    def method(self, x):
        return ("open", x)


class Sealed(metaclass=Refuses):
    def method(self, x):
        return ("sealed", x)
"""
    )
    module = host.load()
    before = snapshot(module.Open, module.Sealed)
    patches = PatchSet(
        Patch(host.target("Open.method"), new_one, ("self", "x"), keep_as="before"),
        Patch(host.target("Sealed.method"), new_one, ("self", "x")),
    )
    with pytest.raises(PatchError, match=r"Sealed\.method cannot be set: RuntimeError: sealed"):
        patches.apply()
    assert not patches.is_applied()
    assert snapshot(module.Open, module.Sealed) == before


def test_version_is_checked(stand_in):
    host = stand_in()
    with pytest.raises(UnsupportedVersionError, match=r"1\.5.*>=2.*pip install"):
        PatchSet(method_patch(host), distribution=host.name, versions=">=2").apply()
    with pytest.raises(HostMissingError, match="not installed"):
        PatchSet(method_patch(host), distribution="no-such-distribution", versions=">=2").apply()
    assert host.load().Host().method(1) == ("method", 1, 1)
    assert PatchSet(method_patch(host), distribution=host.name, versions=">=1,<2").apply()


def test_host_that_fails_to_import_is_named(stand_in):
    host = stand_in("raise RuntimeError('broken installation')")
    with pytest.raises(HostMissingError, match="RuntimeError: broken installation") as caught:
        PatchSet(method_patch(host)).apply()
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value, FlashBiasError)


@pytest.mark.parametrize("path", ["Host.value", "Host.Inner", "Host"])
def test_only_functions_are_replaced(stand_in, path):
    host = stand_in()
    with pytest.raises(SignatureChangedError):
        PatchSet(Patch(host.target(path), new_one, ("self", "x"))).apply()


def test_parameters_must_match_exactly(stand_in):
    host = stand_in()
    for names in (("self", "x"), ("self", "y", "x"), ("self", "x", "y", "z")):
        with pytest.raises(SignatureChangedError, match="self, x, y"):
            PatchSet(Patch(host.target("Host.method"), new_method, names)).apply()


def test_replacement_with_kwargs_takes_further_parameters(stand_in):
    def new(self, x, **kwargs):
        return ("new", x, kwargs)

    host = stand_in()
    with PatchSet(Patch(host.target("Host.method"), new, ("self", "x"))):
        assert host.load().Host().method(1, y=2) == ("new", 1, {"y": 2})
    with pytest.raises(SignatureChangedError):
        PatchSet(Patch(host.target("Host.method"), new, ("self", "z"))).apply()


def test_revert_refuses_when_a_third_party_has_patched_on_top(stand_in):
    host = stand_in()
    cls = host.load().Host
    patches = PatchSet(
        method_patch(host, keep_as="before"), Patch(host.target("Host.inherited"), new_one, ("self", "x"))
    )
    patches.apply()
    ours = cls.method

    @functools.wraps(ours)
    def theirs(self, *args, **kwargs):
        return ("theirs", ours(self, *args, **kwargs))

    cls.method = theirs
    for call in (patches.revert, patches.apply):
        with pytest.raises(PatchedOnTopError, match=r"Host\.method is now .*test_patch_set\.py"):
            call()
        assert cls.method is theirs
        assert cls.inherited is new_one, "all or nothing"
        assert cls().method(1) == ("theirs", ("new", 1, 1))
    assert not patches.is_applied()

    cls.method = ours
    assert patches.is_applied()
    assert patches.revert()
    assert cls().method(1) == ("method", 1, 1)


def test_third_party_below_is_kept(stand_in):
    host = stand_in()
    cls = host.load().Host
    original = cls.method

    @functools.wraps(original)
    def theirs(self, *args, **kwargs):
        return ("theirs", original(self, *args, **kwargs))

    cls.method = theirs
    patches = PatchSet(method_patch(host, keep_as="before"))
    with patches:
        assert cls().before(1) == ("theirs", ("method", 1, 1))
    assert cls.method is theirs


def test_originals_put_back_by_somebody_else_do_not_confuse(stand_in):
    host = stand_in()
    cls = host.load().Host
    original = cls.method
    patches = PatchSet(method_patch(host, keep_as="before"))
    patches.apply()
    cls.method = original
    assert not patches.is_applied()
    assert patches.apply() is True
    assert cls.method is new_method
    assert cls().before(1) == ("method", 1, 1)
    patches.revert()
    assert cls.method is original
    assert not hasattr(cls, "before")


@pytest.mark.parametrize("value", ["1", "true"])
def test_disabled_by_the_environment(stand_in, monkeypatch, value):
    host = stand_in()
    patches = PatchSet(method_patch(host))
    monkeypatch.setenv("FLASHBIAS_DISABLE", value)
    assert patches.apply() is False
    with patches:
        assert host.load().Host().method(1) == ("method", 1, 1)
    monkeypatch.setenv("FLASHBIAS_DISABLE", "0")
    assert patches.apply() is True
    monkeypatch.setenv("FLASHBIAS_DISABLE", value)
    assert patches.revert() is True, "taking out is always possible"


def test_on_change_is_told_of_changes_only(stand_in, caplog):
    host = stand_in()
    patches = PatchSet(method_patch(host))
    seen = []

    def broken(patch_set):
        raise ValueError("deaf")

    patches.on_change(broken)
    patches.on_change(lambda patch_set: seen.append((patch_set, patch_set.is_applied())))
    patches.apply()
    patches.apply()
    patches.revert()
    patches.revert()
    assert seen == [(patches, True), (patches, False)]
    assert "deaf" in caplog.text


def test_signature_of_the_host_can_still_be_inspected(stand_in):
    host = stand_in()
    with PatchSet(method_patch(host)):
        assert list(inspect.signature(host.load().Host.method).parameters) == ["self", "x", "y"]
