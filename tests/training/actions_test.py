import hypothesis
import hypothesis.strategies as st
import pytest

from sos.training.trainer import Action


@hypothesis.given(
    st.none() | st.integers(1, 7),
    st.lists(st.integers(0, 20), max_size=3),
    st.booleans(),
    st.integers(1, 20),
)
def test_when_an_action_is_due(every, at, at_end, last):
    action = Action(call=print, every=every, at=tuple(at), at_end=at_end)
    due = [
        step
        for step in range(1, last + 1)
        if (every and step % every == 0)
        or step in at
        or (at_end and step == last)
    ]
    assert [s for s in range(1, last + 1) if action.due(s, last)] == due
    for step in range(last):
        later = [s for s in due if s > step and (s != last or not at_end)]
        if later:
            assert action.next_after(step) == later[0]


@pytest.mark.parametrize("every", [0, -3])
def test_actions_every_zero_steps_are_refused(every):
    with pytest.raises(ValueError, match=f"Received: every={every}"):
        Action(call=print, every=every)
