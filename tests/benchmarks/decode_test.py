import re
import sys

import pytest

from benchmarks import decode
from tests.support import benchmarks


def test_decode_prints_one_report_of_all_contestants():
    report = benchmarks.run(
        "decode",
        "--model=transformer_tiny",
        "--technique=dense,MagnitudePruning",
        "--batch_size=2",
        "--tokens=3",
        "--source=3",
        "--repeats=1",
    )
    assert list(report["results"]) == [
        "dense",
        "MagnitudePruning",
        "dense, without a cache",
    ]
    for figures in report["results"].values():
        assert figures["ms_per_token"] > 0
    assert report["results"]["dense"]["times_dense"] == 1
    assert (report["beam"], report["tokens"]) == (4, 3)


def test_figures_are_medians_within_turns():
    figures = decode.figures([2.0, 9.0, 6.0], [1.0, 3.0, 3.0], tokens=4)
    assert figures == {"ms_per_token": 1500, "times_dense": 2}


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--technique=L1", "VariationalDropout.*Received: 'L1'"),
        ("--beam=0", "--beam must be at least 1. Received: 0"),
        ("--model=resnet50", "transformer_base"),
    ],
)
def test_decode_with_a_wrong_flag_names_it(
    argument, message, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["decode", argument])
    with pytest.raises(SystemExit) as error:
        decode.main()
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)
