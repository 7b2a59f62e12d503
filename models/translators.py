"""Translators of lines: the checkpoint of a run, or an exported model."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import keras
import ml_collections
import numpy as np
import tensorflow as tf

from models.decoding import batches
from models.wmt import Translation
from sos import keras_compat, startup
from sos.errors import MissingPackageError, UsageError, reason
from sos.experiments import config as config_lib
from sos.experiments.run_files import read_config
from sos.experiments.trunk import with_parent_directory
from sos.training import trainer
from sos.training.checkpoints import CHECKPOINTS, Checkpoints

_SIGNATURE = "serving_default"

#: Called with the number of lines of each batch.
OnBatch = Callable[[int], None]


class Translator(Protocol):
    """Interface of a translator of lines.

    Attributes:
        fingerprint: Equal strings for those that translate equally.
        cut: Number of lines so far that were cut because of their length.
        failed: Number of lines so far that have no translation.
    """

    fingerprint: str
    cut: int
    failed: int

    def __call__(self, lines: Sequence[str], on_batch: OnBatch) -> list[str]:
        """Returns the translation of each line."""


class RunTranslator:
    """Translates with the newest checkpoint of a run.

    Args:
        directory: Directory of the run.
        batch_size: As for `models.decoding.Decoder`.

    Raises:
        UsageError: If there is no such run, it is no translation, or it has no
            checkpoint.
        StorageError: If a file cannot be read.
        CheckpointError: If the checkpoint does not fit.
    """

    def __init__(self, directory: str, batch_size: int) -> None:
        directory = os.path.expanduser(directory)
        config = _read_run(directory)
        config.decode.batch_size = batch_size
        task_class = config_lib.load_task(config.task)
        config = with_parent_directory(
            task_class.with_files(config, directory),
            os.path.dirname(directory.rstrip("/")),
        )
        with (
            config_lib.dtype_policy(config.dtype_policy),
            keras_compat.new_name_counts(),
        ):
            task = task_class(config)
            model, optimizer = trainer.build(task)
            checkpoints = Checkpoints(
                os.path.join(directory, CHECKPOINTS),
                configuration=trainer.configuration(
                    task,
                    gradient_accumulation_steps=(
                        config.gradient_accumulation_steps
                    ),
                ),
            )
            restored = checkpoints.restore(model, optimizer)
            if restored is None:
                raise UsageError(
                    "`--run` must be the directory of a run with a checkpoint. "
                    f"Received: {directory}, without one in "
                    f"{checkpoints.directory}"
                )
        # Kept, as the model loses the mean at the end of the scope.
        self._scope = contextlib.ExitStack()
        self._scope.enter_context(
            task.averaged_weights(model, checkpoints.up_to(restored["step"]))
        )
        self._decoder = task.decoder(model)
        decode = config.decode
        self.fingerprint = _hash(
            [
                task.subwords.model,
                repr((decode.beam, decode.alpha, decode.extra_length)).encode(),
                *(
                    keras.ops.convert_to_numpy(variable).tobytes()
                    for variable in model.variables
                ),
            ]
        )

    @property
    def cut(self) -> int:
        """Number of lines so far that were cut."""
        return self._decoder.cut

    @property
    def failed(self) -> int:
        """Number of lines so far that have no translation."""
        return self._decoder.failed

    def __call__(self, lines: Sequence[str], on_batch: OnBatch) -> list[str]:
        """Returns the translation of each line."""
        return [found.text for found in self._decoder(lines, on_batch)]


class ExportTranslator:
    """Translates with a SavedModel of `models.wmt.TranslationServing`.

    Args:
        directory: Directory of the SavedModel.
        batch_size: As for `models.decoding.Decoder`.

    Raises:
        UsageError: If there is no such model.
        MissingPackageError: If tensorflow-text is missing.
    """

    def __init__(self, directory: str, batch_size: int) -> None:
        self.cut = self.failed = 0
        self._batch_size = batch_size
        directory = os.path.expanduser(directory)
        try:
            # It registers the operations of the tokenizer.
            import tensorflow_text  # noqa: F401
        except ImportError as error:
            raise MissingPackageError(
                "An exported translation model needs the package "
                "tensorflow-text: pip install 'state-of-sparsity[translation]'"
            ) from error
        if not tf.saved_model.contains_saved_model(directory):
            raise UsageError(
                "`--model` must be the directory of an exported model, such as "
                "RUN/export/STEP, which --mode=export of models.train writes. "
                f"Received: {directory}"
            )
        try:
            # Kept: its functions do not keep the model's variables.
            with startup.quiet():
                self._model = tf.saved_model.load(directory)
            self._translate = self._model.signatures[_SIGNATURE]
            _, inputs = self._translate.structured_input_signature
            outputs = self._translate.structured_outputs
        except (OSError, ValueError, KeyError, tf.errors.OpError) as error:
            raise UsageError(
                "`--model` must be an exported model that this version of "
                f"TensorFlow can load. Received: {directory}. "
                f"Cause: {type(error).__name__}: {reason(error)}"
            ) from error
        expected = {"translations", "scores", "cut"}
        if "sentences" not in inputs or not expected <= set(outputs):
            raise UsageError(
                "`--model` must be an exported translation model, which takes "
                "'sentences' and returns 'translations', 'scores' and 'cut'. "
                "Export it again if it is older. Received: one that "
                f"takes {sorted(inputs)} and returns {sorted(outputs)}"
            )
        paths = sorted(
            os.path.join(folder, name)
            for folder, _, names in tf.io.gfile.walk(directory)
            for name in names
        )
        self.fingerprint = _hash(map(_read, paths))

    def __call__(self, lines: Sequence[str], on_batch: OnBatch) -> list[str]:
        """Returns the translation of each line."""
        results = [""] * len(lines)
        # About the number of subwords: only the order of the lines and the
        # sizes of the batches depend on it.
        lengths = [1 + len(line.encode()) // 4 for line in lines]
        for rows in batches(lengths, self._batch_size):
            found = self._translate(
                sentences=tf.constant([lines[i].encode() for i in rows])
            )
            self.cut += int(np.sum(found["cut"]))
            self.failed += int(np.sum(np.isneginf(found["scores"])))
            texts = found["translations"].numpy()
            for i, text in zip(rows, texts, strict=True):
                results[i] = text.decode(errors="replace")
            on_batch(len(rows))
        return results


def _read_run(directory: str) -> ml_collections.ConfigDict:
    """Returns the config of a run, unlocked."""
    stored = read_config(directory)
    if stored is None:
        raise UsageError(
            "`--run` must be the directory of a run, with a file config.json. "
            f"Received: {directory}"
        )
    config = config_lib.resolve(stored)
    if not issubclass(config_lib.load_task(config.task), Translation):
        raise UsageError(
            "`--run` must be the directory of a run that translates. "
            f"Received: {directory}, of the task {config.task}"
        )
    return ml_collections.ConfigDict(config.to_dict())


def _hash(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _read(path: str) -> bytes:
    with tf.io.gfile.GFile(path, "rb") as file:
        return file.read()
