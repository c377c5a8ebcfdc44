"""Goal: ranks and coordinates of a mesh are the row-major numbering of a grid. Method: compare with NumPy's own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.errors import InvalidInputError
from ckpt.layout.mesh import Mesh


@given(sizes=st.lists(st.integers(1, 5), max_size=4))
def test_ranks_are_numbered_in_row_major_order(sizes: list[int]) -> None:
    mesh = Mesh(axes=tuple((f"axis{i}", size) for i, size in enumerate(sizes)))
    grid = np.arange(mesh.world_size).reshape(sizes)
    for rank in range(mesh.world_size):
        coordinate = mesh.coordinate(rank)
        assert grid[coordinate] == rank == mesh.rank(coordinate)
        assert tuple(mesh.coordinates()[rank]) == coordinate
        assert mesh.rank(dict(zip(mesh.names, coordinate, strict=True))) == rank


def test_a_mesh_that_does_not_fit_the_job_names_both_sizes() -> None:
    mesh = Mesh(axes=(("pp", 2), ("tp", 3)))
    mesh.check_world_size(6)
    with pytest.raises(InvalidInputError, match=r"pp 2 x tp 3\) has 6 ranks, but the job has 8"):
        mesh.check_world_size(8)


@pytest.mark.parametrize(
    "axes",
    [(("a", 0),), (("a", -1),), (("a", 2), ("a", 2)), (("not a name", 2),), (("a", True),), (("a", 2**21),)],
)
def test_a_mesh_that_cannot_be_is_refused(axes: tuple[tuple[str, int], ...]) -> None:
    with pytest.raises(InvalidInputError):
        Mesh(axes=axes)


def test_ranks_and_coordinates_outside_are_refused() -> None:
    mesh = Mesh(axes=(("dp", 2), ("tp", 2)))
    with pytest.raises(InvalidInputError, match="rank 4"):
        mesh.coordinate(4)
    for wrong in ((0, 2), (0,), {"pp": 0}):
        with pytest.raises(InvalidInputError):
            mesh.rank(wrong)
    with pytest.raises(InvalidInputError, match="no axis `pp`"):
        mesh.size("pp")


def test_resizing_keeps_the_order_of_axes() -> None:
    mesh = Mesh(axes=(("pp", 2), ("dp", 2), ("tp", 2))).resized({"tp": 8, "pp": 1})
    assert mesh.axes == (("pp", 1), ("dp", 2), ("tp", 8))
