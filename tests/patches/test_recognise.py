"""Hosts that are not packaged: told from others by their source, never imported to find out."""

import sys
import warnings

import pytest

from flashbias.patches import HostMissingError, OtherHostError, Patch, PatchSet, attributes_read

HOST = """
class Attention:
    def __init__(self):
        self.scale = self.unused = 1

    def forward(self, x):
        return self.project(x) * self.scale * other.thing

class Other:
    def forward(self, x):
        return self.else_where
"""
ANOTHER = HOST.replace("self.scale *", "self.gain *")


def is_ours(source):
    return attributes_read(source, "Attention.forward") == {"project", "scale"}


def new_forward(self, x):
    return ("new", x)


@pytest.fixture
def patches_of():
    """Sets made here are called off at the end."""
    made = []

    def make(host, path="Attention.forward"):
        patch = Patch(host.target(path), new_forward, ("self", "x"))
        made.append(PatchSet(patch, host="the host", recognise=is_ours))
        return made[-1]

    yield make
    for patches in made:
        patches.revert()


def test_attributes_that_a_method_reads():
    assert attributes_read(HOST, "Attention.forward") == {"project", "scale"}
    assert attributes_read(HOST, "Attention.__init__") == {"scale", "unused"}
    for source, method in ((HOST, "Attention.backward"), (HOST, "Missing.forward"), ("def", "A.b"), ("\0", "A.b")):
        assert attributes_read(source, method) == set()


def test_host_is_judged_without_being_imported(stand_in, patches_of):
    ours, another = (patches_of(stand_in(source)) for source in (HOST, ANOTHER))
    assert (ours.installed(), another.installed()) == ("checkout", None)
    assert ours.obstacle() is None
    assert isinstance(another.obstacle(), OtherHostError)
    assert not {patches.patches[0].module for patches in (ours, another)} & sys.modules.keys()


def test_module_inside_a_package_is_found_without_importing_the_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "standin_package" / "inner").mkdir(parents=True)
    (tmp_path / "standin_package" / "inner" / "module.py").write_text(HOST)
    patches = PatchSet(
        Patch("standin_package.inner.module:Attention.forward", new_forward, ("self", "x")), recognise=is_ours
    )
    assert patches.installed() == "checkout"
    assert not any(name.startswith("standin_package") for name in sys.modules)


def test_missing_host():
    patches = PatchSet(Patch("no.such.module:A.b", new_forward, ("self", "x")), host="the host", recognise=is_ours)
    assert patches.installed() is None
    with pytest.raises(HostMissingError, match=r"no module no\.such\.module; wanted: the host"):
        patches.apply()


def test_host_is_not_imported_to_be_patched(stand_in, patches_of):
    host = stand_in(HOST)
    patches = patches_of(host)
    with pytest.raises(HostMissingError, match="has not been imported"):
        patches.apply()
    assert host.name not in sys.modules
    module = host.load()
    assert patches.apply()
    assert module.Attention().forward(1) == ("new", 1)


def test_another_module_of_that_name_is_left_alone(stand_in, patches_of):
    host = stand_in(ANOTHER)
    patches = patches_of(host)
    patches.apply_when_imported()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = host.load()
    assert module.Attention.forward is not new_forward
    with pytest.raises(OtherHostError, match="which is other code; wanted: the host"):
        patches.apply()


def test_recognised_module_is_patched_when_it_is_imported(stand_in, patches_of):
    host = stand_in(HOST)
    patches = patches_of(host)
    for _ in range(3):
        patches.apply_when_imported()
    assert host.load().Attention().forward(1) == ("new", 1)
    assert patches.is_applied()


def test_waiting_several_times_warns_once(stand_in, patches_of):
    host = stand_in(HOST)
    patches = patches_of(host, "Attention.missing")
    for _ in range(3):
        patches.apply_when_imported()
    with pytest.warns(UserWarning, match="without Attention") as said:
        host.load()
    assert len(said) == 1
