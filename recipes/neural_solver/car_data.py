"""Car-like bodies in the form of the library's car data: for runs without the real data, and for any number of points.

    flashbias neural-solver car-data FOLDER --bodies 18

writes for each body a folder `training_data/paramF/NAME`, empty but for its name, and `preprocessed_data/paramF/NAME`
with `pos.npy` `(N, 3)`, `x.npy` `(N, 7)` (position, distance to the body, direction away from it), `y.npy` `(N, 4)`
(velocity, pressure), `surf.npy` `(N,)` and `edge_index.npy` `(2, E)`. There are 32,186 points, as in the real data:
3,682 on the body and the others around it.

The flow is made up, not solved: the stream ahead, made tangential to the body near it, and Bernoulli's pressure.
Metres; x points along the car, y up, z across it, as there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .elasticity_data import DataError

SURFACE, AROUND = 3682, 28504
FOLDS = 9


def surface(points: int, generator: Any) -> tuple[Any, Any]:
    """Points `(points, 3)` on a car-like body, and its outward normals there.

    A box with rounded edges whose roof is lower over bonnet and boot; its measures are drawn.
    """
    import numpy as np

    length, height, width = generator.uniform((3.6, 1.3, 1.6), (5.2, 1.7, 2.0))
    cabin = generator.uniform((-0.25, 0.35), (0.1, 0.6))  # its middle, and half its length, in lengths of the car
    # Evenly over the sphere, by Fibonacci's lattice, then out to a superellipsoid, which is a box with round edges.
    i = np.arange(points) + 0.5
    polar, turn = np.arccos(1 - 2 * i / points), np.pi * (1 + 5**0.5) * i + generator.uniform(0, 2 * np.pi)
    unit = np.stack((np.cos(polar), np.sin(polar) * np.cos(turn), np.sin(polar) * np.sin(turn)), 1)
    power = 5
    body = unit / (np.abs(unit) ** power).sum(1, keepdims=True) ** (1 / power)
    normal = np.sign(body) * np.abs(body) ** (power - 1)
    # The upper half is lowered away from the cabin.
    drop = 0.45 / (1 + np.exp(-14 * (np.abs(body[:, 0] - 2 * cabin[0]) - 2 * cabin[1] + 0.35)))
    body[:, 1] = np.where(body[:, 1] > 0, body[:, 1] * (1 - drop), body[:, 1])
    size = np.array([length, height, width]) / 2
    normal /= size
    return body * size + [0, height / 2 + 0.15, 0], normal / np.linalg.norm(normal, axis=1, keepdims=True)


def sample(generator: Any, on_body: int = SURFACE, around: int = AROUND) -> dict[str, Any]:
    """One body with the air around it: the arrays of its files by their names."""
    import numpy as np
    from sklearn.neighbors import NearestNeighbors  # type: ignore[import-untyped]

    body, normal = surface(on_body, generator)
    low, high = body.min(0), body.max(0)
    spread = high - low
    air = generator.uniform(low - 0.5 * spread, high + spread, size=(3 * around + 1, 3))
    middle = (low + high) / 2
    outside = (np.abs((air - middle) / ((high - low) / 2)) ** 5).sum(1) > 1
    air = air[outside & (air[:, 1] > 0)][:around]
    air = np.concatenate((air, air[: around - len(air)]))
    pos = np.concatenate((air, body)).astype(np.float32)
    nearest = NearestNeighbors(n_neighbors=1).fit(body)
    distance, index = (found[:, 0] for found in nearest.kneighbors(air))
    away = (air - body[index]) / (distance[:, None] + 1e-8)
    distance, away = np.concatenate((distance, np.zeros(on_body))), np.concatenate((away, normal))

    stream = np.array([-20.0, 0.0, 0.0])
    near = np.exp(-distance / (0.3 * (high - low).max()))[:, None]
    velocity = stream - near * (away @ stream)[:, None] * away
    pressure = 0.5 * 1.2 * (stream @ stream - (velocity**2).sum(1, keepdims=True))
    _, edges = NearestNeighbors(n_neighbors=4).fit(body).kneighbors(body)
    edges = np.stack((np.repeat(np.arange(on_body), 4), edges.ravel())) + around
    return {
        "pos": pos,
        "x": np.concatenate((pos, distance[:, None], away), 1).astype(np.float32),
        "y": np.concatenate((velocity, pressure), 1).astype(np.float32),
        "surf": np.concatenate((np.zeros(around), np.ones(on_body))).astype(np.float32),
        "edge_index": edges.astype(np.int64),
    }


def prepare(folder: Path, bodies: int, seed: int = 0, on_step: Callable[[], Any] = lambda: None, **points: int) -> None:
    """Make data of that many bodies in nine folds, of which the library keeps the first for evaluation.

    Raises `DataError` where there are data.
    """
    import numpy as np

    if (folder / "training_data").exists():
        raise DataError(f"data in {folder}", "a folder without", "name another one")
    for i in range(bodies):
        name = Path(f"param{i % FOLDS}", f"body{i:04}")
        (folder / "training_data" / name).mkdir(parents=True)
        target = folder / "preprocessed_data" / name
        target.mkdir(parents=True)
        for key, values in sample(np.random.default_rng((seed, i)), **points).items():
            np.save(target / f"{key}.npy", values)
        on_step()
    for fold in range(FOLDS):
        (folder / "training_data" / f"param{fold}").mkdir(exist_ok=True)
