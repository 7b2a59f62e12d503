"""BLEU scores of translations: sacreBLEU, and the metric of the study.

BLEU (Papineni et al. 2002) of a corpus with one reference for each sentence is

    100 min(1, exp(1 - r / c)) (p_1 p_2 p_3 p_4)^(1/4)

with the numbers r and c of tokens of the references and of the translations,
and the fraction p_n of the n-grams of the translations that are in the
references, each counted at most as often as in the reference. Scores with other
tokens are not comparable, so every score has a signature.
"""

import importlib
import importlib.metadata
import re
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

from sos.errors import MissingPackageError, UsageError

# `perl -ple 's{(\S)-(\S)}{$1 ##AT##-##AT## $2}g'`.
_COMPOUND = re.compile(r"(\S)-(\S)")


class Score(NamedTuple):
    """A BLEU score, and how it was computed.

    Attributes:
        value: The score, from 0 to 100.
        signature: What determines the score: the tokens, smoothing, versions.

    Example:
    >>> from sos.experiments import bleu
    >>> bleu.Score(27.3, "nrefs:1|case:mixed").value
    27.3
    """

    value: float
    signature: str


def sacrebleu_score(
    hypotheses: Sequence[str], references: Sequence[str]
) -> Score:
    """Computes BLEU with the defaults of sacreBLEU.

    See Post 2018, arXiv 1804.08771. The tokens are those of WMT's script
    mteval-v13a, with case. A count of zero matches is smoothed, unless there
    are no matches at all.

    Args:
        hypotheses: Translations, as text for readers: detokenised.
        references: One reference for each, as text for readers.

    Returns:
        The score, and sacreBLEU's signature.

    Raises:
        UsageError: If there are no sentences, or not one reference for each.
        MissingPackageError: If sacrebleu is not installed.

    Example:
    >>> from sos.experiments import bleu
    >>> score = bleu.sacrebleu_score(
    ...     ["The cat sat on a mat."], ["The cat sat on the mat."]
    ... )
    >>> round(score.value, 2), score.signature.split("|")[:3]
    (48.89, ['nrefs:1', 'case:mixed', 'eff:no'])
    """
    _check(hypotheses, references)
    metric = _import("sacrebleu").metrics.BLEU()
    value = metric.corpus_score([*hypotheses], [[*references]]).score
    return Score(min(value, 100.0), str(metric.get_signature()))


def study_bleu(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    language: str = "de",
) -> Score:
    """Computes BLEU as the study did, on split compounds.

    As in the script `get_ende_bleu.sh` of Tensor2Tensor: Moses's
    replace-unicode-punctuation and its tokenizer; compounds such as
    "rich-text" become "rich ##AT##-##AT## text"; then Moses's multi-bleu, which
    does not smooth: without a matching 4-gram the score is 0. The authors
    scored against references that were already tokenised. Here references are
    text for readers, too, and prepared as the translations are.

    The split adds tokens, so compare such a score with the study's only, not
    with sacreBLEU.

    Args:
        hypotheses: Translations, as text for readers: detokenised.
        references: One reference for each, as text for readers.
        language: Code of their language, for Moses's abbreviations.

    Returns:
        The score, and a signature in the form of sacreBLEU's.

    Raises:
        UsageError: If there are no sentences, or not one reference for each.
        MissingPackageError: If sacrebleu or sacremoses is not installed.

    Example:
    >>> from sos.experiments import bleu
    >>> bleu.study_bleu(["ein E-Mail-Konto"], ["ein E-Mail-Konto"]).value
    100.0
    """
    _check(hypotheses, references)
    sacrebleu, sacremoses = _import("sacrebleu"), _import("sacremoses")
    punctuation = sacremoses.MosesPunctNormalizer(language)
    tokenizer = sacremoses.MosesTokenizer(language)

    def prepare(sentences: Sequence[str]) -> list[str]:
        return [
            split_compounds(
                tokenizer.tokenize(
                    punctuation.replace_unicode_punct(sentence),
                    return_str=True,
                )
            )
            for sentence in sentences
        ]

    # On tokens between spaces and without smoothing it is multi-bleu. `force`:
    # no warning that the sentences are tokenised.
    metric = sacrebleu.metrics.BLEU(
        tokenize="none", smooth_method="none", force=True
    )
    score = metric.corpus_score(prepare(hypotheses), [prepare(references)])
    signature = "|".join(
        (
            "study",
            "nrefs:1",
            "case:mixed",
            f"tok:moses-{language}-atat",
            "smooth:none",
            f"sacremoses:{importlib.metadata.version('sacremoses')}",
            f"sacrebleu:{sacrebleu.__version__}",
        )
    )
    # Rounding may exceed 100.
    return Score(min(score.score, 100.0), signature)


def split_compounds(sentence: str) -> str:
    """Splits tokens at hyphens, as the study did before scoring.

    Args:
        sentence: Tokens between spaces.

    Returns:
        The sentence with " ##AT##-##AT## " in place of hyphens between two
        characters that are not spaces. As in the original, a part of one
        character is only split from the part before it.

    Example:
    >>> from sos.experiments import bleu
    >>> bleu.split_compounds("rich-text - A-B-C")
    'rich ##AT##-##AT## text - A ##AT##-##AT## B-C'
    """
    return _COMPOUND.sub(r"\1 ##AT##-##AT## \2", sentence)


def _check(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    for name, sentences in (
        ("hypotheses", hypotheses),
        ("references", references),
    ):
        # A string is a sequence of strings, too.
        if isinstance(sentences, str | bytes) or not all(
            isinstance(sentence, str) for sentence in sentences
        ):
            raise UsageError(
                f"`{name}` must be a sequence of strings, one for each "
                f"sentence. Received: {sentences!r:.80}"
            )
    if not len(hypotheses) == len(references) > 0:
        raise UsageError(
            "BLEU needs at least one sentence, and one reference for each. "
            f"Received: {len(hypotheses)} hypotheses and {len(references)} "
            "references"
        )


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"BLEU scores cannot import {error.name}. Install what they need: "
            "pip install 'state-of-sparsity[translation]'"
        ) from error
