"""Translation of WMT, and of other pairs of sentences."""

import contextlib
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import ml_collections
import tensorflow as tf
from absl import logging
from ml_collections import config_dict

import sos
from models import transformer
from models.decoding import (
    MAX_LENGTH,
    Decoder,
    make_translate,
    to_line,
    to_matrix,
)
from sos import files
from sos.arguments import check_integer, check_number
from sos.datasets import subwords, translation
from sos.datasets.subwords import Subwords
from sos.datasets.translation import PackedPairs, Pairs, TranslationData
from sos.errors import UsageError
from sos.experiments import bleu
from sos.experiments.scores import BLEU
from sos.experiments.task import ExperimentTask
from sos.training.checkpoints import Checkpoints
from sos.training.task import Evaluator, WeightedSum
from sos.wrappers.base import find_wrappers

#: Name of the vocabulary in the directory of a run.
VOCABULARY = "vocabulary.model"
#: Folder of the translations in the directory of a run.
TRANSLATIONS = "translations"

_SPLITS = ("validation", "test")
# What `str.strip` removes, as a regular expression of TensorFlow.
_SPACES = r"[\s\v\x1c-\x1f\x{85}\p{Z}]*"


class Regularization(NamedTuple):
    """Dropouts and label smoothing.

    Attributes:
        residual_dropout: Rate after the embedding, attention and feed-forward
            layers.
        attention_dropout: Rate of attention weights.
        hidden_dropout: Rate within the feed-forward layers.
        label_smoothing: Part of the target's probability that is shared by all
            other entries of the vocabulary.
    """

    residual_dropout: float
    attention_dropout: float
    hidden_dropout: float
    label_smoothing: float


#: The values of `config.regularization`: those of the authors' program, and
#: "residual_dropout+label_smoothing", which costs a CPU less.
REGULARIZATIONS = {
    "none": Regularization(0.0, 0.0, 0.0, 0.0),
    "label_smoothing": Regularization(0.0, 0.0, 0.0, 0.1),
    "residual_dropout+label_smoothing": Regularization(0.1, 0.0, 0.0, 0.1),
    "dropout+label_smoothing": Regularization(0.1, 0.1, 0.1, 0.1),
    "moredropout+label_smoothing": Regularization(0.3, 0.1, 0.1, 0.1),
    "muchmoredropout+label_smoothing": Regularization(0.5, 0.1, 0.1, 0.1),
}


class Translation(ExperimentTask):
    """Translates sentences with a Transformer.

    The recipe is that of the authors for WMT 2014, English to German: 500,000
    steps of 2,048 target tokens, in packed rows of 256; Adam with a warm-up of
    8,000 steps, then a rate that falls with the square root of the step. The
    score is sacreBLEU of the test split after beam search.

    The directory of a run has the vocabulary, `vocabulary.model`. An evaluation
    writes its translations to `translations/SPLIT.txt` there, one a line, and
    those at other thresholds of variational dropout to
    `translations/SPLIT_at_THRESHOLD.txt`.

    Args:
        config: A resolved config. The vocabulary is learned from the training
            sentences, unless the config names a file.

    Raises:
        UsageError: If the config does not fit.
    """

    runtime_entries = (
        "decode.alpha",
        "decode.average_checkpoints",
        "decode.beam",
        "decode.extra_length",
        "decode.sentences",
        "decode.split",
        "decode.thresholds",
        "seed",
        "sparsity.num_examples",
        "sparsity.penalty_weight",
        "sparsity.seed",
        "sparsity.sparsity",
        "sparsity.threshold",
    )
    score = BLEU
    # With split heads the paths have "query_0" and so on.
    layer_kinds = (
        ("embedding", "^embedding/"),
        ("query and key", "_attention/(query|key)"),
        ("value", "_attention/value"),
        ("attention output", "_attention/output/"),
        ("feed-forward", "/feed_forward/"),
    )
    ignored_entries = ("data.vocabulary", "decode.batch_size", "decode.samples")

    def __init__(self, config: ml_collections.ConfigDict) -> None:
        super().__init__(config)
        _check_config(config, type(self).default_config())
        self.batch_size = _rows(config)
        self.regularization = _regularization(config)
        self._decoder: Decoder | None = None

    @classmethod
    def default_config(cls) -> ml_collections.ConfigDict:
        """Returns the entries of a config, with their defaults.

        - `model.width`, `model.hidden_width`, `model.heads`, `model.layers`,
          `model.split_heads`, `model.target_spaces`: As
          `models.transformer.Transformer` takes them.
        - `regularization`: Dropouts and label smoothing, by a name of
          `REGULARIZATIONS`.
        - `batch_size`: Number of target tokens in a step, padding included,
          over all replicas: a multiple of `data.target_length`.
        - `data.name`, `data.directory`, `data.source`, `data.target`: The
          sentences, as `sos.datasets.translation.load` takes them.
        - `data.vocabulary`: Path of a sentencepiece model; by default, one of
          `data.vocabulary_size` entries is learned from the training sentences,
          which takes minutes for millions of them. The path does not identify
          the run, but the content does:
        - `data.vocabulary_hash`: The fingerprint that the vocabulary must have,
          by default that of the file.
        - `data.source_length`, `data.target_length`: Tokens in a packed row.
        - `data.eval_batch_size`: Maximum number of rows in an evaluation batch.
        - `learning_rate.hidden_size`: The width of the study's network, for the
          schedule "rsqrt". Another `model.width` does not change the rate.
        - `learning_rate.technique_multiplier`: Factor of the learning rate of
          trainable variables that a technique adds.
        - `decode.split`: "test" or "validation", the sentences that an
          evaluation translates and scores.
        - `decode.sentences`: If set, only so many of them; 0 for none.
        - `decode.beam`, `decode.alpha`, `decode.extra_length`,
          `decode.batch_size`: As for `models.decoding.Decoder`. The last does
          not identify the run.
        - `decode.thresholds`: Further thresholds of variational dropout at
          which the split is scored.
        - `decode.average_checkpoints`: Number of newest checkpoints whose mean
          is scored and exported.
        - `decode.samples`: Number of translations that an evaluation prints.
          It does not identify the run.
        """
        config = super().default_config()
        config.model = {
            "width": 512,
            "hidden_width": 2048,
            "heads": 8,
            "layers": 6,
            "split_heads": False,
            "target_spaces": 32,
        }
        config.regularization = "dropout+label_smoothing"
        config.data = {
            "name": "wmt14_translate/de-en",
            "directory": config_dict.placeholder(str),
            "source": "en",
            "target": "de",
            "vocabulary": config_dict.placeholder(str),
            "vocabulary_size": 33_288,
            "vocabulary_hash": config_dict.placeholder(str),
            "source_length": 256,
            "target_length": 256,
            "eval_batch_size": 8,
        }
        config.decode = {
            "split": "test",
            "sentences": config_dict.placeholder(int),
            "beam": 4,
            "alpha": 0.6,
            "extra_length": 100,
            "batch_size": 64,
            "thresholds": (),
            "average_checkpoints": 1,
            "samples": 0,
        }
        config.optimizer.name = "adam"
        config.optimizer.beta_2 = 0.997
        config.optimizer.epsilon = 1e-9
        config.learning_rate.schedule = "rsqrt"
        config.learning_rate.base = 2.0
        config.learning_rate.warmup_steps = 8000
        config.learning_rate.hidden_size = 512
        config.learning_rate.technique_multiplier = 1.0
        config.batch_size = 2048
        config.train_steps = 500_000
        return config

    @classmethod
    def complete_config(cls, config: dict[str, Any]) -> None:
        """Sets `data.vocabulary_hash`, if `data.vocabulary` names a file."""
        data = config["data"]
        path = data.get("vocabulary")
        if isinstance(path, str) and data.get("vocabulary_hash") is None:
            with _naming("data.vocabulary"):
                data["vocabulary_hash"] = subwords.fingerprint(
                    subwords.read_model(path)
                )

    @property
    def averaged_checkpoints(self) -> int:
        """Number of newest checkpoints whose mean is scored and exported."""
        return self.config.decode.average_checkpoints

    def configuration(self) -> Mapping[str, Any]:
        """Returns the fingerprint of the run, with that of its vocabulary."""
        expected = self.config.data.vocabulary_hash
        return {
            **super().configuration(),
            "data.vocabulary_hash": expected or self.subwords.fingerprint,
        }

    @functools.cached_property
    def subwords(self) -> Subwords:
        """The vocabulary: read from its file, or learned.

        Raises:
            UsageError: If it is not that of `config.data.vocabulary_hash`, or
                cannot be learned.
            StorageError: If its file cannot be read.
        """
        data = self.config.data
        if data.vocabulary is not None:
            with _naming("data.vocabulary"):
                vocabulary = Subwords.load(data.vocabulary)
        else:
            # First, so that an error of reading names `config.data`.
            _ = self.data
            with _naming("data.vocabulary_size"):
                vocabulary = Subwords(
                    _learn(_place(data), data.vocabulary_size)
                )
        expected = data.vocabulary_hash
        if expected is not None and expected != vocabulary.fingerprint:
            place = data.vocabulary or "learned from the training sentences"
            raise UsageError(
                "The vocabulary must be that of `config.data.vocabulary_hash`, "
                f"{expected}. Received: {vocabulary.fingerprint}, of "
                f"{vocabulary.size} entries, {place}"
            )
        return vocabulary

    @functools.cached_property
    def data(self) -> TranslationData:
        """The sentences that `config.data` selects."""
        with _naming("data"):
            return _load(_place(self.config.data))

    @functools.cached_property
    def source(self) -> PackedPairs:
        """The sentences as packed batches."""
        data = self.config.data
        # Its errors name their own entry.
        vocabulary = self.subwords.model
        with _naming("data"):
            return _pack(
                _place(data),
                vocabulary,
                seed=self.config.seed,
                batch_size=self.batch_size,
                source_length=data.source_length,
                target_length=data.target_length,
                eval_batch_size=data.eval_batch_size,
            )

    def prepare(self) -> None:
        """Tokenizes and packs the sentences."""
        if self.config.decode.sentences != 0:
            # Raises if a package is missing, rather than after training.
            bleu.study_bleu(["."], ["."], language=self.config.data.target)
        _ = self.source

    def write_files(self, directory: str) -> None:
        """Writes the vocabulary; never replaces another one.

        Raises:
            UsageError: If the run began with another vocabulary.
            StorageError: If the file cannot be read or written.
        """
        path = os.path.join(directory, VOCABULARY)
        if not tf.io.gfile.exists(path):
            self.subwords.save(path)
            return
        found = subwords.fingerprint(subwords.read_model(path))
        if found != self.subwords.fingerprint:
            raise UsageError(
                f"The run began with another vocabulary, {path}. Restore its "
                "training sentences and version of sentencepiece, or choose "
                "another work directory. Received: a vocabulary of the "
                f"fingerprint {self.subwords.fingerprint}, and not {found}"
            )

    @classmethod
    def with_files(
        cls, config: ml_collections.ConfigDict, directory: str
    ) -> ml_collections.ConfigDict:
        """Returns a config that names the vocabulary of the run, if it has one.

        The run may have been moved away from the files that its config names.
        """
        path = os.path.join(directory, VOCABULARY)
        if not tf.io.gfile.exists(path):
            return config
        changed = ml_collections.ConfigDict(config.to_dict())
        changed.data.vocabulary = path
        return changed.lock()

    # Training.

    def build_network(self) -> keras.Model:
        """Returns the dense network that `config.model` describes."""
        rates = self.regularization
        with _naming("model"):
            return transformer.Transformer(
                self.subwords.size,
                **self.config.model.to_dict(),
                residual_dropout=rates.residual_dropout,
                attention_dropout=rates.attention_dropout,
                hidden_dropout=rates.hidden_dropout,
                seed=self.config.seed,
            )

    def build_model(self) -> keras.Model:
        """Returns the network, made sparse according to `config.sparsity`."""
        model = self.sparsify(self.build_network())
        if self.config.decode.thresholds and not _with_threshold(model):
            raise UsageError(
                "`config.decode.thresholds` are thresholds of variational "
                "dropout: remove them for other techniques. Received: "
                f"{tuple(self.config.decode.thresholds)}"
            )
        return model

    def learning_rate_entries(self) -> dict[str, Any]:
        """Returns `config.learning_rate`; "rsqrt" alone has a hidden size."""
        entries = super().learning_rate_entries()
        if entries["schedule"] != "rsqrt":
            entries.pop("hidden_size", None)
        return entries

    def train_dataset(
        self, context: tf.distribute.InputContext, step: int
    ) -> tf.data.Dataset:
        """Returns batches of packed training pairs."""
        return self.source.train(context, step)

    def eval_dataset(
        self, context: tf.distribute.InputContext
    ) -> tf.data.Dataset:
        """Returns batches of packed validation pairs."""
        return self.source.eval(context)

    def compute_metrics(
        self, model: keras.Model, batch: Any, training: bool
    ) -> dict[str, WeightedSum]:
        """Returns smoothed cross-entropy in nats and accuracy, per token."""
        logits = model(
            batch["source"],
            batch["target"],
            batch["source_segments"],
            batch["target_segments"],
            training=training,
        )
        weights = tf.cast(batch["target_segments"] > 0, tf.float32)
        if "weight" in batch:
            weights *= batch["weight"][:, tf.newaxis]
        return token_metrics(
            logits,
            batch["target"],
            weights,
            label_smoothing=self.regularization.label_smoothing,
        )

    # Scores.

    def evaluators(
        self, checkpoints: Checkpoints | None = None
    ) -> Mapping[str, Evaluator]:
        """Returns evaluators that translate and score `config.decode.split`.

        They share translations of equal weights, so call this method anew for
        each evaluation.

        Metrics are "bleu" and "study_bleu" (see `sos.experiments.bleu`), and
        the signature of the former. With thresholds of variational dropout also
        "bleu_at_T", "study_bleu_at_T" and "sparsity_at_T" for each threshold T.

        Args:
            checkpoints: Those of the run, whose directory gets the
                translations; None to write nothing.
        """
        if self.config.decode.sentences == 0:
            return {}
        evaluate = functools.partial(
            self._evaluate, checkpoints=checkpoints, translations={}
        )
        evaluators = {"translation": functools.partial(evaluate, None)}
        for threshold in dict.fromkeys(self.config.decode.thresholds):
            evaluators[f"translation_at_{threshold:g}"] = functools.partial(
                evaluate, threshold
            )
        return evaluators

    def decoder(self, model: keras.Model) -> Decoder:
        """Returns the decoder of a model, as `config.decode` describes it.

        Args:
            model: A model of this task. The decoder of the last one is kept,
                with its compiled functions.
        """
        if self._decoder is None or self._decoder.model is not model:
            decode = self.config.decode
            self._decoder = Decoder(
                model,
                self.subwords,
                beam=decode.beam,
                alpha=decode.alpha,
                extra_length=decode.extra_length,
                batch_size=decode.batch_size,
            )
        return self._decoder

    def _evaluate(
        self,
        threshold: float | None,
        model: keras.Model,
        *,
        checkpoints: Checkpoints | None,
        translations: dict[frozenset[float], list[str]],
    ) -> dict[str, float | str]:
        """Translates and scores the split.

        Args:
            threshold: Threshold of variational dropout; None for that of each
                layer.
            model: The model.
            checkpoints: As for `evaluators`.
            translations: Those that the evaluation has made already, by the
                thresholds of the layers; new ones are added.

        Returns:
            The metrics and texts.
        """
        pairs = self._scored_pairs()
        suffix = "" if threshold is None else f"_at_{threshold:g}"
        metrics: dict[str, float | str] = {}
        with (
            self.averaged_weights(model, checkpoints),
            _at_threshold(model, threshold),
        ):
            key = frozenset(each.threshold for each in _with_threshold(model))
            if key not in translations:
                translations[key] = self._translate(model, pairs.source)
            if threshold is not None:
                report = sos.sparsity_report(model)
                metrics[f"sparsity{suffix}"] = report.sparsity
        lines = translations[key]
        score = bleu.sacrebleu_score(lines, pairs.target)
        study = bleu.study_bleu(
            lines, pairs.target, language=self.config.data.target
        )
        metrics[f"bleu{suffix}"] = score.value
        metrics[f"study_bleu{suffix}"] = study.value
        if threshold is None:
            metrics["bleu_signature"] = score.signature
            metrics["study_bleu_signature"] = study.signature
            self._print_samples(pairs, lines)
        if checkpoints is not None:
            self._write(lines, checkpoints, suffix)
        return metrics

    def _translate(
        self, model: keras.Model, sentences: Sequence[str]
    ) -> list[str]:
        """Returns a line for each sentence; warns of what lowers the score."""
        decoder = self.decoder(model)
        cut, failed = decoder.cut, decoder.failed
        lines = [to_line(found.text) for found in decoder(sentences)]
        if decoder.cut > cut:
            logging.warning(
                "%d sentences were cut to %d tokens before they were "
                "translated and scored.",
                decoder.cut - cut,
                MAX_LENGTH,
            )
        if decoder.failed > failed:
            logging.warning(
                "%d sentences have no translation, as logits are NaN, and "
                "lower the score.",
                decoder.failed - failed,
            )
        return lines

    def _scored_pairs(self) -> Pairs:
        split = getattr(self.data, self.config.decode.split)
        count = self.config.decode.sentences
        return Pairs(split.source[:count], split.target[:count])

    def _print_samples(self, pairs: Pairs, translations: Sequence[str]) -> None:
        count = min(self.config.decode.samples, len(translations))
        for number in range(count):
            # From all parts of the split.
            index = (2 * number + 1) * len(translations) // (2 * count)
            print(
                f"\nsource       {pairs.source[index]}"
                f"\nreference    {pairs.target[index]}"
                f"\ntranslation  {translations[index]}",
                flush=True,
            )
        if count:
            print(flush=True)

    def _write(
        self, translations: Sequence[str], checkpoints: Checkpoints, suffix: str
    ) -> None:
        directory = os.path.dirname(checkpoints.directory)
        folder = os.path.join(directory, TRANSLATIONS)
        tf.io.gfile.makedirs(folder)
        path = os.path.join(folder, f"{self.config.decode.split}{suffix}.txt")
        files.write_text(path, "".join(f"{text}\n" for text in translations))

    def serving(self, model: keras.Model) -> tf.Module:
        """Returns a module that translates strings."""
        decode = self.config.decode
        return TranslationServing(
            model,
            self.subwords,
            beam=decode.beam,
            alpha=decode.alpha,
            extra_length=decode.extra_length,
        )


class TranslationServing(tf.Module):
    """A module that translates sentences, tokenization included.

    The signature `serving_default` takes "sentences", strings in UTF-8 of shape
    [n]. It returns "translations", strings of shape [n]; "scores", float32 of
    shape [n]: log probabilities, divided by the length penalty of the beam
    search; and "cut", booleans of shape [n]: whether the sentence had more than
    `models.decoding.MAX_LENGTH` tokens and was cut. A sentence of nothing but
    spaces has an empty translation and the score 0. One whose translation
    failed, as logits are NaN, has an empty one and the score -inf. All
    sentences are one batch, padded to the longest.

    A process that loads the module must import tensorflow_text first.

    Args:
        model: A `models.transformer.Transformer`. A sparse one is stripped.
        subwords: Its vocabulary.
        beam: Number of hypotheses.
        alpha: Exponent of the length penalty.
        extra_length: Number of tokens by which a translation may be longer than
            its source.
    """

    def __init__(
        self,
        model: keras.Model,
        subwords: Subwords,
        *,
        beam: int = 4,
        alpha: float = 0.6,
        extra_length: int = 100,
    ) -> None:
        super().__init__()
        if find_wrappers(model):
            model = sos.strip(model)
        # Hidden from tf.Module, which would store all variables twice.
        object.__setattr__(self, "model", model)
        self.weights = [variable.value for variable in model.variables]
        self.subwords = subwords

        translate = make_translate(
            model,
            subwords,
            beam=beam,
            alpha=alpha,
            extra_length=extra_length,
        )

        @tf.function(
            input_signature=[tf.TensorSpec([None], tf.string, "sentences")],
            autograph=False,
        )
        def serve(sentences: tf.Tensor) -> dict[str, tf.Tensor]:
            is_blank = tf.strings.regex_full_match(sentences, _SPACES)
            wanted = tf.where(~is_blank)
            tokens = subwords.tokenize(tf.gather_nd(sentences, wanted))
            texts, scores = tf.cond(
                tf.size(wanted) > 0,
                lambda: translate(to_matrix(tokens)),
                lambda: (tf.zeros([0], tf.string), tf.zeros([0])),
            )
            shape = tf.shape(sentences, tf.int64)
            is_cut = tokens.row_lengths() > MAX_LENGTH
            return {
                "translations": tf.tensor_scatter_nd_update(
                    tf.fill(shape, ""), wanted, texts
                ),
                "scores": tf.scatter_nd(wanted, scores, shape),
                "cut": tf.scatter_nd(wanted, is_cut, shape),
            }

        self.signatures = {"serving_default": serve}


def token_metrics(
    logits: tf.Tensor,
    labels: tf.Tensor,
    weights: tf.Tensor,
    *,
    label_smoothing: float = 0.0,
) -> dict[str, WeightedSum]:
    """Computes cross-entropy and accuracy for `Task.compute_metrics`.

    Args:
        logits: Floats of shape [batch, length, vocabulary].
        labels: int32 of shape [batch, length].
        weights: float32 of shape [batch, length], 0 for padding.
        label_smoothing: Part e of the target's probability that is shared
            equally by the V - 1 other entries of the vocabulary, as in
            tensor2tensor: the label's is 1 - e, the others' e / (V - 1). The
            loss is reduced by the entropy of this target, its least value.

    Returns:
        "loss", in nats, and "token_accuracy", the fraction of correct
        predictions. Each is the weighted sum over the tokens and the sum of the
        weights, float32 scalars.

    Example:
    >>> from models import wmt
    >>> metrics = wmt.token_metrics(
    ...     [[[0.0, 2.0, 1.0], [0.0, 0.0, 1.0]]], [[1, 1]], [[1.0, 1.0]]
    ... )
    >>> [float(value) for value in metrics["token_accuracy"]]
    [1.0, 2.0]
    """
    logits = tf.cast(logits, tf.float32)
    weights = tf.convert_to_tensor(weights, tf.float32)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    if label_smoothing:
        size = logits.shape[-1]
        low = label_smoothing / (size - 1)
        # -sum_i p_i log q_i, without a tensor of all p_i.
        label_logits = tf.gather(logits, labels, axis=-1, batch_dims=2)
        others = size * label_logits - tf.reduce_sum(logits, axis=-1)
        entropy = -(1 - label_smoothing) * math.log(1 - label_smoothing)
        entropy -= label_smoothing * math.log(low)
        losses += low * others - entropy
    predictions = tf.argmax(logits, axis=-1, output_type=tf.int32)
    correct = tf.cast(predictions == tf.cast(labels, tf.int32), tf.float32)
    total = tf.reduce_sum(weights)
    return {
        "loss": (tf.reduce_sum(weights * losses), total),
        "token_accuracy": (tf.reduce_sum(weights * correct), total),
    }


class _Place(NamedTuple):
    """The entries of `config.data` that select sentences."""

    name: str
    directory: str | None
    source: str
    target: str


def _place(data: Mapping[str, Any]) -> _Place:
    return _Place(*(data[name] for name in _Place._fields))


# The last results are kept, as a process may make several tasks.
@functools.lru_cache(maxsize=1)
def _load(place: _Place) -> TranslationData:
    return translation.load(
        place.name,
        place.directory,
        source=place.source,
        target=place.target,
    )


@functools.lru_cache(maxsize=1)
def _learn(place: _Place, size: int) -> bytes:
    train = _load(place).train
    return subwords.learn((*train.source, *train.target), size)


@functools.lru_cache(maxsize=1)
def _pack(place: _Place, vocabulary: bytes, **options: Any) -> PackedPairs:
    return PackedPairs(_load(place), Subwords(vocabulary), **options)


def _check_config(
    config: ml_collections.ConfigDict, defaults: ml_collections.ConfigDict
) -> None:
    """Raises `UsageError` if an entry of this task is invalid."""
    for section in ("model", "data", "decode"):
        unknown = sorted(set(config[section]) - set(defaults[section]))
        if unknown:
            raise UsageError(
                f"`config.{section}` has the entries "
                f"{', '.join(defaults[section])}. "
                f"Received: {', '.join(unknown)}"
            )
    data, decode = config.data, config.decode
    with _naming("data"):
        for name in (
            "vocabulary_size",
            "source_length",
            "target_length",
            "eval_batch_size",
        ):
            check_integer(name, data[name], minimum=1)
    with _naming("decode"):
        if decode.split not in _SPLITS:
            raise UsageError(
                f"`split` must be one of {', '.join(_SPLITS)}. "
                f"Received: {decode.split!r}"
            )
        for name in ("beam", "batch_size", "average_checkpoints"):
            check_integer(name, decode[name], minimum=1)
        for name in ("extra_length", "samples"):
            check_integer(name, decode[name], minimum=0)
        if decode.sentences is not None:
            check_integer("sentences", decode.sentences, minimum=0)
        check_number("alpha", decode.alpha, "[0, inf)")
        if isinstance(decode.thresholds, str) or not isinstance(
            decode.thresholds, Sequence
        ):
            raise UsageError(
                "`thresholds` must be a list of numbers. "
                f"Received: {decode.thresholds!r}"
            )
        for threshold in decode.thresholds:
            check_number("thresholds", threshold, "(-inf, inf)")


def _rows(config: ml_collections.ConfigDict) -> int:
    """Returns the number of packed rows in a step."""
    length = config.data.target_length
    if config.batch_size % length:
        raise UsageError(
            "`config.batch_size` is a number of target tokens and must be a "
            f"multiple of `config.data.target_length`, {length}. "
            f"Received: {config.batch_size}"
        )
    return config.batch_size // length


def _regularization(config: ml_collections.ConfigDict) -> Regularization:
    name = config.regularization
    if not isinstance(name, str) or name not in REGULARIZATIONS:
        raise UsageError(
            "`config.regularization` must be one of "
            f"{', '.join(REGULARIZATIONS)}. Received: {name!r}"
        )
    return REGULARIZATIONS[name]


@contextlib.contextmanager
def _naming(entry: str) -> Iterator[None]:
    """Names the entry of the config in errors that the scope raises."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"`config.{entry}`: {error}") from error


def _with_threshold(model: keras.Model) -> list[Any]:
    """Returns the techniques of a model that have a threshold."""
    return [each for each in find_wrappers(model) if hasattr(each, "threshold")]


@contextlib.contextmanager
def _at_threshold(
    model: keras.Model, threshold: float | None
) -> Iterator[None]:
    """Changes the threshold of variational dropout within a scope."""
    if threshold is None:
        yield
        return
    techniques = _with_threshold(model)
    before = [technique.threshold for technique in techniques]
    sos.set_hyperparameters(model, threshold=threshold)
    try:
        yield
    finally:
        for technique, value in zip(techniques, before, strict=True):
            technique.threshold = value
