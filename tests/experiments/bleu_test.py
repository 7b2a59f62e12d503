"""BLEU scores, against worked examples and counts of our own."""

import collections
import math
import sys

import hypothesis
import hypothesis.strategies as st
import pytest

from sos.errors import MissingPackageError, UsageError
from sos.experiments import bleu

pytest.importorskip("sacrebleu")
pytest.importorskip("sacremoses")

SCORES = pytest.mark.parametrize(
    "score", [bleu.sacrebleu_score, bleu.study_bleu]
)


def plain_bleu(hypotheses, references):
    """multi-bleu.perl, written anew: on tokens between spaces."""
    length, matches, totals = [0, 0], [0] * 4, [0] * 4
    for hypothesis_, reference in zip(hypotheses, references, strict=True):
        found, wanted = hypothesis_.split(), reference.split()
        length[0] += len(found)
        length[1] += len(wanted)
        for n in range(1, 5):
            a, b = (
                collections.Counter(
                    tuple(words[i : i + n]) for i in range(len(words) - n + 1)
                )
                for words in (found, wanted)
            )
            matches[n - 1] += sum(min(k, b[gram]) for gram, k in a.items())
            totals[n - 1] += sum(a.values())
    if not all(matches):
        return 0.0
    mean = sum(math.log(m / t) for m, t in zip(matches, totals, strict=True))
    penalty = min(1.0, math.exp(1 - length[1] / length[0]))
    return 100 * penalty * math.exp(mean / 4)


def test_study_bleu_of_a_worked_example():
    # Tokens: "Die Katze saß auf einer Matte ." and "... der Matte ."
    # 1-grams 6 of 7, 2-grams 4 of 6, 3-grams 2 of 5, 4-grams 1 of 4.
    score = bleu.study_bleu(
        ["Die Katze saß auf einer Matte."], ["Die Katze saß auf der Matte."]
    )
    expected = 100 * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25
    assert score.value == pytest.approx(expected, abs=1e-9)


def test_study_bleu_of_a_short_translation_has_a_penalty():
    # Everything matches: 5 of 5, 4 of 4, 3 of 3, 2 of 2; 5 of 8 tokens.
    score = bleu.study_bleu(
        ["Die Katze saß auf der"], ["Die Katze saß auf der alten Matte."]
    )
    assert score.value == pytest.approx(100 * math.exp(1 - 8 / 5), abs=1e-9)
    # A long one has none: 8 of 9, 7 of 8, 6 of 7, 5 of 6.
    score = bleu.study_bleu(
        ["Ja Die Katze saß auf der alten Matte."],
        ["Die Katze saß auf der alten Matte."],
    )
    expected = 100 * (8 / 9 * 7 / 8 * 6 / 7 * 5 / 6) ** 0.25
    assert score.value == pytest.approx(expected, abs=1e-9)


def test_study_bleu_clips_repeated_tokens():
    # Of the four "das" two count.
    hypothesis_ = "das das das Haus und das Tier ist da"
    reference = "das Haus und das Tier ist dort"
    # 1-grams: das 2, Haus, und, Tier, ist = 6 of 9. 2-grams: das Haus, Haus
    # und, und das, das Tier, Tier ist = 5 of 8. 3-grams 4 of 7, 4-grams 3 of 6.
    expected = 100 * (6 / 9 * 5 / 8 * 4 / 7 * 3 / 6) ** 0.25
    score = bleu.study_bleu([hypothesis_], [reference])
    assert score.value == pytest.approx(expected, abs=1e-9)


def test_study_bleu_splits_compounds():
    # "Rich ##AT##-##AT## Text ##AT##-##AT## Format ist neu ." against "Rich
    # ##AT##-##AT## Text ##AT##-##AT## Datei ist neu .": 7 of 8 tokens, 5 of 7
    # bigrams, 3 of 6 trigrams, 1 of 5.
    score = bleu.study_bleu(
        ["Rich-Text-Format ist neu."], ["Rich-Text-Datei ist neu."]
    )
    expected = 100 * (7 / 8 * 5 / 7 * 3 / 6 * 1 / 5) ** 0.25
    assert score.value == pytest.approx(expected, abs=1e-9)
    # Without the split no trigram would match.
    assert plain_bleu(
        ["Rich-Text-Format ist neu ."], ["Rich-Text-Datei ist neu ."]
    ) == pytest.approx(0)


def test_study_bleu_replaces_unicode_punctuation():
    # Moses leaves the German quotation mark below the line.
    texts = (
        ["Er sagte ”wie geht’s“ … und ging"],
        ['Er sagte "wie geht\'s" ... und ging'],
    )
    assert bleu.study_bleu(*texts).value == pytest.approx(100)
    assert bleu.study_bleu(["„a b c d“"], ['"a b c d"']).value < 100


def test_study_bleu_keeps_german_abbreviations_and_case():
    # "z.B." and "Nr." keep their periods, so these have equal tokens.
    texts = ["Nr. 5 gilt z.B. heute."], ["Nr. 5 gilt z.B. heute ."]
    assert bleu.study_bleu(*texts).value == pytest.approx(100)
    # "Nr." is one token and "nr ." would be two.
    changed = bleu.study_bleu(["nr . 5 gilt z.B. heute ."], texts[1])
    assert changed.value < 100
    lower = bleu.study_bleu(["die katze saß hier"], ["Die Katze saß hier"])
    assert lower.value == 0


def test_study_bleu_without_a_matching_4_gram_is_zero():
    texts = ["eins zwei drei vier"], ["eins zwei drei fünf"]
    assert bleu.study_bleu(*texts).value == 0
    # sacreBLEU smooths it: 3/4, 2/3, 1/2 and a half of 1 of 1.
    expected = 100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    assert bleu.sacrebleu_score(*texts).value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("rich-text format", "rich ##AT##-##AT## text format"),
        ("a - b -c d- --", "a - b -c d- --"),
        # One pass, whose matches do not overlap.
        ("A-B-C-D", "A ##AT##-##AT## B-C ##AT##-##AT## D"),
        ("x---y", "x ##AT##-##AT## --y"),
        ("", ""),
    ],
)
def test_split_compounds_is_the_one_pass_of_the_study(sentence, expected):
    assert bleu.split_compounds(sentence) == expected


WORDS = st.lists(st.sampled_from("a b c d E".split()), max_size=9)
CORPUS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(CORPUS)
def test_study_bleu_of_any_words_equals_plain_counts(corpus):
    texts = [
        [" ".join(words) for words in side]
        for side in zip(*corpus, strict=True)
    ]
    assert bleu.study_bleu(*texts).value == pytest.approx(
        plain_bleu(*texts), abs=1e-9
    )


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(CORPUS)
def test_sacrebleu_score_with_all_matches_equals_plain_counts(corpus):
    texts = [
        [" ".join(words) for words in side]
        for side in zip(*corpus, strict=True)
    ]
    if expected := plain_bleu(*texts):
        assert bleu.sacrebleu_score(*texts).value == pytest.approx(expected)


def test_sacrebleu_score_is_of_the_corpus_not_a_mean_of_sentences():
    hypotheses = ["The cat sat on a mat.", "A dog."]
    references = ["The cat sat on the mat.", "A dog barked at me."]
    both = bleu.sacrebleu_score(hypotheses, references).value
    # Tokens "a", "." and so on: 9 of 10, 6 of 8, 3 of 6, 1 of 4; 10 of 13.
    counts = 100 * math.exp(1 - 13 / 10) * (9 / 10 * 5 / 8 * 2 / 6 / 4) ** 0.25
    assert both == pytest.approx(
        plain_bleu(
            ["The cat sat on a mat .", "A dog ."],
            ["The cat sat on the mat .", "A dog barked at me ."],
        )
    )
    assert both == pytest.approx(counts)


@SCORES
def test_score_of_equal_texts_is_100(score):
    texts = ["Ein kurzer Satz ist das.", "日本語 und ein 🙂 im Text", "»a-b«"]
    assert score(texts, texts).value == pytest.approx(100)


@SCORES
@pytest.mark.parametrize(
    ("hypotheses", "references"),
    [
        ([""], ["Etwas."]),
        (["", ""], ["Etwas.", "Mehr"]),
        (["Etwas."], [""]),
        (["a b c d e"], ["f g h i j"]),
        ([""], [""]),
    ],
)
def test_score_without_matches_is_zero(score, hypotheses, references):
    assert score(hypotheses, references).value == 0


@SCORES
def test_score_with_an_empty_hypothesis_counts_its_reference(score):
    one = score(["Ein Satz mit fünf Wörtern"], ["Ein Satz mit fünf Wörtern"])
    two = score(
        ["Ein Satz mit fünf Wörtern", ""],
        ["Ein Satz mit fünf Wörtern", "Noch einer"],
    )
    assert one.value == pytest.approx(100)
    assert two.value == pytest.approx(100 * math.exp(1 - 7 / 5))


@SCORES
@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ([], [], "0 hypotheses and 0 references"),
        (["a"], [], "1 hypotheses and 0 references"),
        (["a"], ["a", "b"], "1 hypotheses and 2 references"),
        ("a b c d", ["a b c d"], "`hypotheses` must be .* 'a b c d'"),
        (["a"], [b"a"], r"`references` must be .* \[b'a'\]"),
        (["a"], [["a", "b"]], "`references` must be "),
        ([None], ["a"], "`hypotheses` must be "),
    ],
)
def test_score_of_invalid_sentences_raises(
    score, hypotheses, references, message
):
    with pytest.raises(UsageError, match=message):
        score(hypotheses, references)


def test_signatures_tell_the_metrics_apart():
    texts = ["a b c d"], ["a b c d"]
    assert bleu.sacrebleu_score(*texts).signature.startswith(
        "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:"
    )
    assert bleu.study_bleu(*texts).signature.startswith(
        "study|nrefs:1|case:mixed|tok:moses-de-atat|smooth:none|sacremoses:"
    )
    english = bleu.study_bleu(*texts, language="en")
    assert "tok:moses-en-atat" in english.signature


@SCORES
def test_score_without_the_package_names_the_extra(score, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(MissingPackageError, match=r"sacrebleu.*\[translation"):
        score(["a"], ["a"])
