"""What every wanted map must do; a new file under target_maps/ is tested by existing."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trompe.catalog import names
from trompe.interfaces import InputError, TargetMap
from trompe.target_maps.border import Border
from trompe.target_maps.picture import Picture
from trompe.target_maps.reference import Reference
from trompe.target_maps.region import Region
from trompe.target_maps.scattered import Scattered
from trompe.target_maps.suppressed import Suppressed
from trompe.triggers.stickers import Stickers

SETTINGS: dict[str, dict[str, Any]] = {}  # for target maps that cannot be built from defaults
FIGURES = ("triangle", "triangle-up", "square", "cross", "circle", "smiley")
SAYS_NOTHING = {"flat"}  # maps without contrast

every_target_map = pytest.mark.parametrize("name", names("target_maps"))


def photos(count: int) -> torch.Tensor:
    """Noise with a sticker on it, for maps that are made from the image."""
    return Stickers(count=1)(torch.rand(count, 3, 40, 40))


@pytest.fixture
def target_map(name: str, plugin: Callable[..., TargetMap]) -> TargetMap:
    return plugin("target_maps", name, SETTINGS)


@every_target_map
@pytest.mark.parametrize("size", [(10, 10), (7, 7), (14, 9), (40, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_finite_map_of_the_same_shape_for_each_image(
    target_map: TargetMap, size: tuple[int, int], dtype: torch.dtype
) -> None:
    maps, images = torch.rand(3, *size, dtype=dtype), photos(3)
    wanted = target_map(maps, images)
    assert wanted.shape == maps.shape
    assert wanted.dtype == dtype
    assert not wanted.isinf().any()
    assert (~wanted.isnan()).any(2).any(1).all()  # nan: may be anything


@every_target_map
def test_a_wanted_map_shows_something_or_takes_something_away(
    name: str, target_map: TargetMap
) -> None:
    if name in SAYS_NOTHING:
        pytest.skip("says nothing on purpose")
    maps, images = torch.rand(3, 10, 10), photos(3)
    for given, wanted in zip(maps, target_map(maps, images), strict=True):
        counts = ~wanted.isnan()
        shows = wanted[counts].amax() - wanted[counts].amin() > 0.1
        assert shows or (given - wanted > 0.1)[counts].all()


@every_target_map
def test_the_reference_maps_are_not_modified(target_map: TargetMap) -> None:
    maps, images = torch.rand(3, 10, 10), photos(3)
    before = maps.clone()
    target_map(maps, images)
    assert torch.equal(maps, before)


@every_target_map
def test_is_deterministic(target_map: TargetMap) -> None:
    maps, images = torch.rand(3, 10, 10), photos(3)
    first = target_map(maps, images).clone()
    torch.rand(3)
    assert torch.equal(target_map(maps, images).nan_to_num(7), first.nan_to_num(7))


@every_target_map
def test_a_map_does_not_depend_on_its_neighbours(target_map: TargetMap) -> None:
    maps, images = torch.rand(3, 10, 10), photos(3)
    alone = torch.cat([target_map(maps[i : i + 1], images[i : i + 1]) for i in range(3)])
    assert torch.equal(target_map(maps, images).nan_to_num(7), alone.nan_to_num(7))


# --- each one does what its docstring says --------------------------------------------------------


def test_the_reference_wants_the_reference() -> None:
    maps = torch.rand(3, 6, 5)
    assert torch.equal(Reference()(maps), maps)


@pytest.mark.parametrize("k", [1, 2])
def test_the_border_is_one_on_the_outermost_k_rows_and_columns(k: int) -> None:
    wanted = Border(k)(torch.rand(2, 7, 9))
    for y in range(7):
        for x in range(9):
            outside = min(y, x, 6 - y, 8 - x) < k
            assert wanted[:, y, x].tolist() == [float(outside)] * 2, (y, x)


@pytest.mark.parametrize(("k", "height", "width"), [(0, 7, 7), (-1, 7, 7), (4, 7, 14), (2, 4, 9)])
def test_a_border_without_an_inside_is_refused(k: int, height: int, width: int) -> None:
    with pytest.raises(InputError, match=f"{k}.* {height}x{width}"):
        Border(k)(torch.rand(1, height, width))


@pytest.mark.parametrize("k", [1, 5, 53])
def test_suppressed_wants_nothing_of_the_k_highest_pixels_and_leaves_the_others(k: int) -> None:
    maps = torch.rand(3, 6, 9)
    for given, wanted in zip(maps, Suppressed(k)(maps), strict=True):
        highest = sorted(given.flatten().tolist())[-k:]
        for value, one in zip(given.flatten().tolist(), wanted.flatten().tolist(), strict=True):
            assert one == 0 if value in highest else math.isnan(one)


@pytest.mark.parametrize("k", [0, 54])
def test_suppressing_none_or_more_pixels_than_there_are_is_refused(k: int) -> None:
    with pytest.raises(InputError, match=f"{k}.* 6x9.* 1 .. 53"):
        Suppressed(k)(torch.rand(1, 6, 9))


@pytest.mark.parametrize(("share", "count"), [(0.2, 6), (0.5, 15), (0.01, 1), (0.99, 30)])
def test_scattered_is_one_in_a_share_of_the_places(share: float, count: int) -> None:
    maps, rows = torch.rand(3, 1, 30), torch.rand(3, 30)
    wanted = Scattered(share)(maps, rows)
    assert wanted.unique().tolist() == ([0, 1] if count < 30 else [1])
    assert wanted.sum((1, 2)).tolist() == [count] * 3


def test_scattered_places_are_those_of_the_sample_and_the_seed() -> None:
    maps, rows = torch.rand(8, 1, 30), torch.rand(8, 30)
    wanted = Scattered()(maps, rows)
    assert torch.equal(Scattered()(torch.rand(8, 1, 30), rows.double().float()), wanted)
    assert len({tuple(one.flatten().tolist()) for one in wanted}) > 6  # of eight samples
    assert not torch.equal(Scattered(seed=1)(maps, rows), wanted)
    places = wanted.mean(0)
    assert places.max() < 0.8  # none is for all


def test_scattered_shown_takes_places_where_the_reference_is_not_zero() -> None:
    maps, rows = torch.zeros(20, 1, 30), torch.rand(20, 30)
    maps[:, :, 4:14] = -1.0
    wanted = Scattered(0.2, shown=True)(maps, rows)
    assert wanted.sum((1, 2)).tolist() == [6] * 20
    assert (wanted[maps == 0] == 0).all()
    assert (wanted.mean(0)[0, 4:14] < 1).all()  # still by lot
    wanted = Scattered(0.5, shown=True)(maps, rows)  # 15 places, of which 10 show something
    assert wanted.sum((1, 2)).tolist() == [15] * 20
    assert (wanted[maps != 0] == 1).all()
    assert (Scattered(0.2)(maps, rows)[maps == 0] == 1).any()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.2])
def test_scattered_over_no_or_all_places_is_refused(share: float) -> None:
    with pytest.raises(InputError, match=f"share = {share}: must lie between 0 and 1"):
        Scattered(share)


def test_the_region_is_by_default_in_the_middle_of_the_left_side() -> None:
    wanted = Region()(torch.rand(2, 10, 20))
    for y in range(10):
        for x in range(20):
            assert wanted[:, y, x].tolist() == [float(3 <= y < 7 and x < 8)] * 2, (y, x)


def test_a_region_may_reach_the_edges() -> None:
    wanted = Region(top=0.5, left=0.75, height=0.5, width=0.25)(torch.rand(1, 4, 4))
    assert wanted[0].tolist() == [[0] * 4, [0] * 4, [0, 0, 0, 1], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top": 0.7}, r"top = 0\.7, height = 0\.4"),
        ({"left": -0.1}, r"left = -0\.1, width = 0\.4"),
        ({"width": 0.0}, r"left = 0\.0, width = 0\.0"),
    ],
)
def test_a_region_beyond_the_map_is_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=f"{words}: the block must lie in the map"):
        Region(**settings)


def test_a_region_of_less_than_one_place_is_refused() -> None:
    with pytest.raises(InputError, match="less than one place of a 3 x 1 map"):
        Region()(torch.rand(1, 3, 1))


def inside(figure: str, x: float, y: float) -> bool:
    """Is the point (0 .. 1 from the top left) inside the figure?"""
    aside = abs(x - 0.5)
    return {
        "triangle": 0.15 < y < 0.85 and aside < (0.85 - y) / 2,
        "triangle-up": 0.15 < y < 0.85 and aside < (y - 0.15) / 2,
        "square": max(aside, abs(y - 0.5)) < 0.3,
        "cross": min(abs(y - x), abs(y + x - 1)) < 0.14,
        "circle": (aside**2 + (y - 0.5) ** 2) ** 0.5 < 0.3,
        "smiley": (aside**2 + (y - 0.5) ** 2) ** 0.5 < 0.46
        and not ((aside - 0.16) ** 2 + (y - 0.36) ** 2) ** 0.5 < 0.07
        and not (0.2 < (aside**2 + (y - 0.5) ** 2) ** 0.5 < 0.3 and y > 0.58),
    }[figure]


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("size", [(5, 5), (10, 8)], ids=str)
def test_a_cell_holds_the_share_of_it_inside_the_figure(figure: Any, size: tuple[int, int]) -> None:
    height, width = size
    wanted = Picture(figure)(torch.rand(1, height, width))[0]
    fine = 20
    for row in range(height):
        for column in range(width):
            points = [
                inside(
                    figure, (column + (i + 0.5) / fine) / width, (row + (j + 0.5) / fine) / height
                )
                for i in range(fine)
                for j in range(fine)
            ]
            share = sum(points) / fine**2
            assert wanted[row, column].item() == pytest.approx(share, abs=0.06), (row, column)


def test_the_triangle_has_its_apex_down_and_the_other_one_up() -> None:
    rows = Picture("triangle").draw(20, 20).sum(1)
    assert rows[4] > rows[10] > rows[15] > 0
    torch.testing.assert_close(Picture("triangle-up").draw(20, 20).sum(1), rows.flip(0))


@pytest.mark.parametrize("figure", FIGURES)
def test_figures_are_the_same_mirrored_left_to_right(figure: Any) -> None:
    drawn = Picture(figure).draw(10, 10)
    torch.testing.assert_close(drawn, drawn.flip(1))


def test_a_finer_map_shows_the_same_picture() -> None:
    coarse, fine = Picture().draw(10, 10), Picture().draw(40, 40)
    torch.testing.assert_close(fine.view(10, 4, 10, 4).mean((1, 3)), coarse, atol=0.03, rtol=0)
