"""The dial: what follows from K, what is refused, and that the window is the functions' own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from recsys.types import UserError
from recsys.window import DialSettings, Window

GROUPS = DialSettings(Window(), best_share=1.0, reach="window")


@pytest.mark.parametrize("items", [3, 21, 300, 100_000])
@pytest.mark.parametrize("k", [1, 2, 5, 10, 20, 50, 200])
@pytest.mark.parametrize("best_share", [1.0, 0.5])
def test_k_alone_is_enough_up_to_what_the_catalogue_allows(k: int, items: int, best_share: float) -> None:
    settings = replace(GROUPS, window=Window(k=k), best_share=best_share)
    if k > items - 2:
        with pytest.raises(UserError, match=f"set model.window.k to {items - 2} or less"):
            settings.resolve(items, items - 1)
        return
    if best_share < 1 and math.ceil(1.5 * k) > math.ceil((items - 1) / 2):
        return  # half of the catalogue cannot reach beyond the window
    dial = settings.resolve(items, items - 1)
    window = dial.window
    assert (window.start, window.end) == pytest.approx((k - window.half_width, k + window.half_width))
    assert window.half_width == min(k / 2, items - 1 - k)
    assert window.alpha == pytest.approx(window.start / (items - 1))
    assert window.alpha + window.d == pytest.approx(window.end / (items - 1))
    assert window.num_negatives == items - 1
    assert k in dial.cutoffs
    assert max(dial.cutoffs) <= dial.list_length <= items
    assert window.end <= dial.list_length - 1  # a list with the positive still holds the window
    best = math.ceil(dial.group_negatives * best_share)
    assert best > math.ceil(window.end) or dial.group_negatives == items - 1  # the gate has a lower end
    assert dial.group_negatives <= items - 1


def test_the_default_is_10() -> None:
    dial = GROUPS.resolve(1682, 1680)
    assert (dial.window.k, dial.window.start, dial.window.end) == (10, 5, 15)
    assert dial.cutoffs == (1, 5, 10, 20)
    assert str(dial) == (
        "Dial: K 10, negatives (5, 15] of 1,681, alpha 0.002974, d 0.005949; derived: half_width 5; cutoffs 1, 5, 10, "
        f"20; num_beams {dial.list_length}; negatives.count {dial.group_negatives}"
    )


def test_what_is_given_is_taken_and_not_called_derived() -> None:
    settings = replace(GROUPS, window=Window(k=4, half_width=1), cutoffs=(2, 4), num_beams=9, count=7)
    dial = settings.resolve(100, 99)
    assert (dial.window.start, dial.window.end) == (3, 5)
    assert (dial.cutoffs, dial.list_length, dial.group_negatives) == ((2, 4), 9, 7)
    assert str(dial).endswith("; derived: nothing")


def test_rates_give_a_window_and_its_middle_is_k() -> None:
    dial = replace(GROUPS, window=Window(alpha=5 / 1681, d=10 / 1681)).resolve(1682, 1680)
    assert (dial.window.k, dial.window.start, dial.window.end) == (10, 5, 15)
    assert "derived: model.window.k 10" in str(dial)


def test_an_exact_list_holds_every_item() -> None:
    assert replace(GROUPS, exact=True, num_beams=3).resolve(300, 299).list_length == 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": Window(k=20), "num_beams": 25}, "ends at negative 30, but model.num_beams is 25: set .* to 31"),
        ({"window": Window(k=3, half_width=12), "num_beams": 12}, "ends at negative 15.*set model.num_beams to 16"),
        ({"cutoffs": (1, 50), "num_beams": 30}, "cutoffs has 50, but model.num_beams is 30: set .* to 50"),
        ({"window": Window(k=20), "count": 30}, "negatives.count is 30.*set negatives.count to 31"),
        ({"window": Window(k=20), "count": 40, "best_share": 0.5}, "negatives.count is 40.*set negatives.count to 62"),
        ({"best_share": 0.0}, "negatives.mode is random, but model.objective.*set negatives.mode to beam"),
        (
            {"best_share": 0.0, "reach": "k"},
            "negatives.mode is random, but model.objective.*set negatives.mode to beam",
        ),
        ({"window": Window(k=20), "count": 19, "reach": "k"}, "K 20, but negatives.count is 19: set .* to 20 or more"),
        ({"cutoffs": (0, 5)}, "model.cutoffs must be at least 1"),
        ({"num_beams": 0}, "a list needs an item, but model.num_beams is 0"),
    ],
)
def test_contradictions_are_refused_before_the_catalogue_is_known(change: dict, message: str) -> None:
    settings = replace(GROUPS, **change)
    with pytest.raises(UserError, match=message):
        settings.check(settings.window.ends_at())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": Window(alpha=0.1, d=0.3), "num_beams": 25}, "ends at negative 39.6.*set model.num_beams to 41"),
        ({"window": Window(alpha=0.1, d=0.3), "count": 25}, "negatives.count is 25.*set negatives.count to 41"),
        ({"cutoffs": (150,)}, "cutoffs has 150, but the catalogue has 100 items: lower it"),
        ({"count": 99}, "count is 99.*only 98 items of this catalogue can be a negative.*set negatives.count to 98"),
        ({"window": Window(k=60, half_width=50)}, "ends at 110, but in this catalogue.*to 49 or less"),
    ],
)
def test_what_the_catalogue_does_not_allow_is_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(GROUPS, **change).resolve(100, 98)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"k": 5, "half_width": 0.0}, "half_width must be above 0"),
        ({"k": 5, "alpha": 0.1, "d": 0.1}, "has k and alpha and d: give k .*, or alpha and d"),
        ({"alpha": 0.1}, "has alpha: give k"),
        ({"alpha": 0.5, "d": 0.6}, "alpha"),
    ],
)
def test_a_window_that_is_none_is_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Window(**options)


def test_an_objective_that_asks_for_the_kth_best_gets_k_negatives() -> None:
    assert replace(GROUPS, window=Window(k=7), reach="k").resolve(100, 99).group_negatives == 7
    assert replace(GROUPS, window=Window(k=7), reach="k", best_share=0.5).resolve(100, 99).group_negatives == 14
