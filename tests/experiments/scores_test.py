import math

import pytest

from sos.errors import UsageError
from sos.experiments import scores
from tests.support.results import in_bleu, make_study


def test_accuracy_is_a_fraction_in_percent():
    score = scores.ACCURACY
    assert score.of({"accuracy": 0.875, "loss": 1.0}) == 87.5
    assert (score.unit, score.title) == ("%", "Accuracy")
    assert score.title_with_unit == "Accuracy (%)"


def test_bleu_is_no_fraction():
    score = scores.BLEU
    assert score.of({"bleu": 27.3}) == 27.3
    assert (score.unit, score.title) == ("", "BLEU")
    assert score.title_with_unit == "BLEU"


@pytest.mark.parametrize(
    "metrics", [{}, {"loss": 1.0}, {"bleu": math.nan}, {"bleu": math.inf}]
)
def test_score_that_is_missing_or_not_finite_is_none(metrics):
    assert scores.BLEU.of(metrics) is None


@pytest.mark.parametrize("factor", [0.01, 0, -1, math.nan, "100"])
def test_score_with_another_factor_raises(factor):
    with pytest.raises(UsageError, match="`factor` must be 100"):
        scores.ScoreMetric(name="a", label="a", factor=factor)


def test_shared_score_is_that_of_all_runs():
    runs = make_study(branches=False)
    assert scores.shared_score(runs) == scores.ACCURACY
    assert scores.shared_score([]) == scores.ACCURACY
    assert scores.shared_score(in_bleu(runs)) == scores.BLEU
    with pytest.raises(UsageError, match="the scores accuracy, BLEU"):
        scores.shared_score([*runs, *in_bleu(runs)])
