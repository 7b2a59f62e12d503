import dataclasses

import pytest

from sos.training.reporting import Summary


def test_optional_figures_are_absent_and_not_shared():
    first, second = (
        Summary(step=1, total_steps=2, metrics={}, seconds=1.0)
        for _ in range(2)
    )
    assert (first.kind, first.sparsity, first.penalty) == ("train", None, None)
    assert first.weight_sparsity == first.weight_penalty == {}
    assert first.weight_sparsity is not second.weight_sparsity


def test_records_do_not_change():
    record = Summary(step=1, total_steps=2, metrics={}, seconds=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.step = 2
