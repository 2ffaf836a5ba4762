"""Perforated plates under tension, in the form of the library's elasticity data.

    flashbias neural-solver elasticity-data FOLDER --samples 1200

writes `FOLDER/elasticity/Meshes/Random_UnitCell_XY_10.npy` `(972, 2, S)` and `Random_UnitCell_sigma_10.npy` `(972, S)`:
the points of S meshes and von Mises stresses there. A unit square with a random star-shaped hole is held at its lower
edge and pulled at its upper; the equations of plane stress are solved by biquadratic finite elements with scikit-fem.
Real data in the folder are never overwritten.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashbias.errors import FlashBiasError

AROUND, ACROSS = 36, 27  # points of the mesh: 972, as in the library's data
YOUNG, POISSON, TENSION = 50.0, 0.3, 100.0
HARMONICS = 4
COORDINATES, STRESSES = "Random_UnitCell_XY_10.npy", "Random_UnitCell_sigma_10.npy"


class DataError(FlashBiasError, ValueError):
    """Data are there already, or are not what was expected."""


def mesh_points(generator: Any, around: int = AROUND, across: int = ACROSS) -> Any:
    """Points `(across, around, 2)` of a unit square with a hole, from the hole's edge to the square's.

    `around` is a multiple of 4, so that corners are points.
    """
    import numpy as np

    side = np.arange(around) * 4 / around  # along the edge of the square, from its lower left corner
    s = side % 1
    edge = np.choose(side.astype(int)[None], [[s, 0 * s], [1 + 0 * s, s], [1 - s, 1 + 0 * s], [0 * s, 1 - s]]).T
    angle = np.arctan2(edge[:, 1] - 0.5, edge[:, 0] - 0.5)
    harmonics = np.arange(1, HARMONICS + 1)[:, None]
    amplitudes = generator.normal(size=(2, HARMONICS, 1)) / harmonics**1.5
    wave = (amplitudes[0] * np.cos(harmonics * angle) + amplitudes[1] * np.sin(harmonics * angle)).sum(0)
    radius = 0.2 + 0.2 / (1 + np.exp(-wave))  # between 0.2 and 0.4
    hole = 0.5 + radius[:, None] * np.stack((np.cos(angle), np.sin(angle)), 1)
    share = np.linspace(0, 1, across)[:, None, None] ** 1.3  # finer towards the hole
    return (1 - share) * hole + share * edge


def stress(points: Any) -> Any:
    """Von Mises stress `(across * around,)` at the points of `mesh_points`."""
    import numpy as np
    import skfem  # type: ignore[import-untyped]
    from skfem.helpers import ddot, eye, sym_grad, trace  # type: ignore[import-untyped]

    across, around = points.shape[:2]
    number = np.arange(across * around).reshape(across, around)
    turned = np.roll(number, -1, axis=1)
    quads = np.stack([part.ravel() for part in (number[:-1], number[1:], turned[1:], turned[:-1])])
    mesh = skfem.MeshQuad(points.reshape(-1, 2).T.copy(), quads)
    basis = skfem.Basis(mesh, skfem.ElementVector(skfem.ElementQuad2()))
    # Lame's parameters of plane stress.
    shear = YOUNG / (2 * (1 + POISSON))
    first = YOUNG * POISSON / (1 - POISSON**2)

    def law(strain: Any) -> Any:
        return 2 * shear * strain + first * eye(trace(strain), 2)

    stiffness = skfem.BilinearForm(lambda u, v, _: ddot(law(sym_grad(u)), sym_grad(v))).assemble(basis)
    upper = basis.boundary(mesh.facets_satisfying(lambda x: np.isclose(x[1], 1), boundaries_only=True))
    load = skfem.LinearForm(lambda v, _: TENSION * v[1]).assemble(upper)
    held = basis.get_dofs(lambda x: np.isclose(x[1], 0)).all()
    solution = skfem.solve(*skfem.condense(stiffness, load, D=held))

    (xx, xy), (_, yy) = law(sym_grad(basis.interpolate(solution)))
    linear = basis.with_element(skfem.ElementQuad1())
    # Each by itself: of the three the root is never negative, as a projection of the root may be.
    xx, yy, xy = (linear.project(part) for part in (xx, yy, xy))
    return np.sqrt(xx**2 - xx * yy + yy**2 + 3 * xy**2)


def generate(samples: int, seed: int, on_step: Callable[[], Any] = lambda: None) -> tuple[Any, Any]:
    """Coordinates `(972, 2, samples)` and stresses `(972, samples)` in fp32."""
    import numpy as np

    generator = np.random.default_rng(seed)
    coordinates, stresses = [], []
    for _ in range(samples):
        points = mesh_points(generator)
        coordinates.append(points.reshape(-1, 2))
        stresses.append(stress(points))
        on_step()
    return np.stack(coordinates, -1).astype(np.float32), np.stack(stresses, -1).astype(np.float32)


def files(folder: Path) -> tuple[Path, Path]:
    """Where the library looks for coordinates and stresses below its `--data_path`."""
    meshes = folder / "elasticity" / "Meshes"
    return meshes / COORDINATES, meshes / STRESSES


def prepare(folder: Path, samples: int, seed: int = 0) -> bool:
    """Make the data unless they are there; returns whether they were made.

    Raises `DataError` where there are fewer samples than wanted.
    """
    import numpy as np
    from rich.console import Console
    from rich.progress import Progress

    coordinates, stresses = files(folder)
    if coordinates.exists() and stresses.exists():
        there = np.load(stresses, mmap_mode="r").shape[-1]
        if there < samples:
            raise DataError(f"{there} samples in {coordinates.parent}", f"{samples}", "name another folder, or fewer")
        return False
    coordinates.parent.mkdir(parents=True, exist_ok=True)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("solving plates", total=samples)
        made = generate(samples, seed, lambda: progress.advance(task))
    for file, values in zip((coordinates, stresses), made, strict=True):
        np.save(file, values)
    return True
