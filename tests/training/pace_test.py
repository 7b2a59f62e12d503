import hypothesis
import hypothesis.strategies as st
import pytest

from sos.training.trainer import LoopLength


def test_the_first_loop_says_nothing_and_the_second_is_measured():
    pace = LoopLength(max_steps=100, max_seconds=10.0)
    assert not pace.traced
    assert pace.loop_end(0) == 1
    pace.measured(500.0)
    assert pace.traced
    assert pace.loop_end(1) == 2
    pace.measured(2.0)
    assert pace.loop_end(2) == 7
    # A step that takes longer than a loop may is a loop.
    pace.measured(11.0)
    assert pace.loop_end(7) == 8


@hypothesis.given(
    st.integers(0, 10**9), st.integers(1, 10**4), st.floats(1e-6, 1e3)
)
def test_loops_stay_within_both_bounds(step, max_steps, seconds):
    pace = LoopLength(max_steps=max_steps, max_seconds=10.0)
    pace.measured(0.0)
    pace.measured(seconds)
    end = pace.loop_end(step)
    assert end > step
    assert (end - step) * seconds <= 10.0 or end == step + 1
    # Loops end where they did, wherever training began.
    assert end <= (step // max_steps + 1) * max_steps


@pytest.mark.parametrize(
    ("max_steps", "max_seconds"),
    [(0, 1.0), (-1, 1.0), (1, 0.0), (1, float("nan"))],
)
def test_bounds_must_be_positive(max_steps, max_seconds):
    with pytest.raises(
        ValueError,
        match=f"Received: steps_per_loop={max_steps}, "
        f"max_seconds_per_loop={max_seconds}",
    ):
        LoopLength(max_steps=max_steps, max_seconds=max_seconds)
