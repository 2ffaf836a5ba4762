"""Data made for the neural solver: right in themselves, and in the library's form."""

import importlib
import sys

import numpy as np
import pytest

from flashbias.recipes.neural_solver import car_data, elasticity_data, stand_ins


def test_plates_have_the_points_and_the_form_of_the_library(tmp_path):
    assert elasticity_data.prepare(tmp_path, 2)
    folder = tmp_path / "elasticity" / "Meshes"
    coordinates = np.load(folder / "Random_UnitCell_XY_10.npy")
    stresses = np.load(folder / "Random_UnitCell_sigma_10.npy")
    assert (coordinates.shape, stresses.shape) == ((972, 2, 2), (972, 2))
    assert (coordinates.dtype, stresses.dtype) == (np.float32, np.float32)
    assert coordinates.min() == 0
    assert coordinates.max() == 1
    assert np.linalg.norm(coordinates - 0.5, axis=1).min() >= 0.2, "the hole"
    assert not np.array_equal(coordinates[..., 0], coordinates[..., 1])
    assert stresses.min() >= 0


def test_data_that_are_there_are_kept(tmp_path):
    elasticity_data.prepare(tmp_path, 1)
    before = [path.read_bytes() for path in elasticity_data.files(tmp_path)]
    assert elasticity_data.prepare(tmp_path, 1, seed=5) is False
    assert [path.read_bytes() for path in elasticity_data.files(tmp_path)] == before
    with pytest.raises(elasticity_data.DataError, match="1 samples"):
        elasticity_data.prepare(tmp_path, 2)


def test_same_seed_same_plates():
    first, second, other = (elasticity_data.generate(1, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[1], other[1])


def test_stress_converges_with_the_mesh():
    """Halved elements: closer to a solution on elements of a quarter of the size."""

    def stress_at_common_points(times):
        points = elasticity_data.mesh_points(np.random.default_rng(3), 12 * times, 6 * times + 1)
        return elasticity_data.stress(points).reshape(6 * times + 1, -1)[::times, ::times]

    coarse, fine, finest = (stress_at_common_points(times) for times in (1, 2, 4))
    errors = [np.linalg.norm(found - finest) / np.linalg.norm(finest) for found in (coarse, fine)]
    assert errors[1] < 0.6 * errors[0]
    assert errors[1] < 0.1


def test_plate_almost_without_a_hole_carries_what_pulls_at_it(monkeypatch):
    """Far from the held edge and from the hole, plain tension: the stress is the load."""
    points = elasticity_data.mesh_points(np.random.default_rng(0), 40, 21)
    hole = points[0] - 0.5
    edge, share = points[-1], np.linspace(0, 1, 21)[:, None, None] ** 2
    points = (1 - share) * (0.5 + 0.01 * hole / np.linalg.norm(hole, axis=1, keepdims=True)) + share * edge
    stress = elasticity_data.stress(points).reshape(21, 40)
    upper = np.isclose(points[..., 1], 1) & (np.abs(points[..., 0] - 0.5) < 0.2)
    assert stress[upper] == pytest.approx(elasticity_data.TENSION, rel=0.05)


def test_car_data_have_the_form_of_the_loader(tmp_path):
    car_data.prepare(tmp_path, 10, on_body=60, around=90)
    names = sorted(path.relative_to(tmp_path / "training_data") for path in (tmp_path / "training_data").glob("*/*"))
    assert len(names) == 10
    assert len(list((tmp_path / "training_data").iterdir())) == 9, "the loader lists all nine"
    arrays = {
        name: np.load(tmp_path / "preprocessed_data" / names[0] / f"{name}.npy")
        for name in ("pos", "x", "y", "surf", "edge_index")
    }
    shapes = {name: values.shape for name, values in arrays.items()}
    assert shapes == {"pos": (150, 3), "x": (150, 7), "y": (150, 4), "surf": (150,), "edge_index": (2, 240)}
    assert arrays["pos"].dtype == np.float32, "the model's weights are"
    np.testing.assert_array_equal(arrays["pos"], arrays["x"][:, :3])
    assert arrays["surf"].sum() == 60
    assert np.all(arrays["x"][-60:, 3] == 0)
    assert np.all(arrays["x"][:90, 3] > 0)
    np.testing.assert_allclose(np.linalg.norm(arrays["x"][:, 4:], axis=1), 1, rtol=1e-4)
    assert arrays["edge_index"].max() < 150
    with pytest.raises(elasticity_data.DataError, match="another"):
        car_data.prepare(tmp_path, 9)


def test_bodies_have_any_number_of_points_and_outward_normals():
    for points in (16, 5000):
        body, normal = car_data.surface(points, np.random.default_rng(2))
        assert body.shape == normal.shape == (points, 3)
        middle = (body.min(0) + body.max(0)) / 2
        assert ((body - middle) * normal).sum(1).min() > -0.5
        assert np.ptp(body, axis=0)[0] > np.ptp(body, axis=0)[1], "longer than high"


def test_stand_ins_take_the_place_of_what_is_missing_and_fail_when_used(tmp_path, monkeypatch):
    monkeypatch.setattr(stand_ins, "MODULES", ("flashbias", "no_such_package", "no_such_package.parts"))
    assert stand_ins.write(tmp_path) == ["no_such_package"]
    assert [path.name for path in tmp_path.iterdir()] == ["no_such_package"]
    monkeypatch.syspath_prepend(str(tmp_path))
    parts = importlib.import_module("no_such_package.parts")
    derived = type("Derived", (parts.Anything,), {})
    with pytest.raises(ImportError, match="no_such_package is not installed"):
        derived()
    for name in ("no_such_package", "no_such_package.parts"):
        del sys.modules[name]
