"""The learning rate within a phase, against its corners."""

import pytest

from recsys.functional import linear_schedule


@pytest.mark.parametrize(
    ("progress", "warmup", "share"),
    [
        (0.0, 0.0, 1.0),
        (0.25, 0.0, 0.75),
        (1.0, 0.0, 0.0),
        (0.0, 0.1, 0.1),  # the first step moves something
        (0.05, 0.1, 0.95 * 0.6),
        (0.09, 0.1, 0.91),
        (0.1, 0.1, 0.9),
        (0.5, 0.1, 0.5),
        (1.0, 1.0, 0.0),
    ],
)
def test_it_rises_and_falls_linearly(progress: float, warmup: float, share: float) -> None:
    assert linear_schedule(progress, warmup) == pytest.approx(share)


@pytest.mark.parametrize(("progress", "warmup"), [(-0.1, 0.0), (1.1, 0.0), (0.5, -0.1), (0.5, 1.1)])
def test_what_is_no_share_is_refused(progress: float, warmup: float) -> None:
    with pytest.raises(ValueError, match="shares of a phase"):
        linear_schedule(progress, warmup)
