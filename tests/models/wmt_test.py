"""The task of translation, on a tiny network and a few pairs."""

import collections
import json
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import sacrebleu
import tensorflow as tf

import sos
import sos.export
from configs import libreoffice_help
from models import decoding, wmt
from sos.datasets import translation
from sos.datasets.subwords import PAD, Subwords
from sos.errors import CheckpointError, StorageError, UsageError
from sos.experiments import config as config_lib
from sos.experiments.image_classification import classification_metrics
from sos.training import Checkpoints, make_strategy, tpu_check
from sos.training.trainer import Trainer, build
from tests.support import processes

PAIRS = 12
LENGTH = 96
# Lines that are no ordinary sentences.
AWKWARD = (
    "",
    "   ",
    "word " * 500,
    "Привет 你好 مرحبا",
    "😀 ok 👍🏽",
    "a\tb\u2028c",
    "\x00",
    "\ufffd",
)


def write_pairs(directory, count=PAIRS, *, longest=80):
    """Writes short embedded pairs as text files: the same in all splits."""
    pairs = translation.load("libreoffice_help").train
    chosen = [
        (source, target)
        for source, target in zip(pairs.source, pairs.target, strict=True)
        if len(target) <= longest
    ][:count]
    for split in ("train", "validation", "test"):
        for language, side in (("en", 0), ("de", 1)):
            text = "".join(f"{pair[side]}\n" for pair in chosen)
            directory.joinpath(f"{split}.{language}").write_text(text)
    return chosen


def tiny_config(directory, argument="", **overrides):
    """Returns a resolved config of a tiny network."""
    config = libreoffice_help.get_config(argument)
    # For exact comparisons.
    config.dtype_policy = "float32"
    config.model.update(width=16, hidden_width=32, heads=2, layers=1)
    config.data.update(
        name=str(directory),
        vocabulary_size=400,
        source_length=LENGTH,
        target_length=LENGTH,
        eval_batch_size=2,
    )
    config.batch_size = 2 * LENGTH
    config.decode.update(samples=0, beam=2, extra_length=4, batch_size=8)
    config.update(overrides)
    return config_lib.resolve(config)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory of text files."""
    path = tmp_path_factory.mktemp("pairs")
    write_pairs(path)
    return path


@pytest.fixture(scope="module")
def task(directory):
    """A dense task."""
    return wmt.Translation(tiny_config(directory))


@pytest.fixture(scope="module")
def model(task):
    """An untrained network whose translations end."""
    model = task.build_model()
    # Otherwise every one reaches its limit.
    rng = np.random.default_rng(0)
    table = model.embedding.embeddings
    table.assign(rng.normal(0, 0.5, table.shape))
    return model


# The recipe.


def test_default_optimizer_is_that_of_the_study(task, model):
    config = wmt.Translation.default_config()
    values = config_lib.plain(task.config)
    values |= {
        name: config_lib.plain(config[name])
        for name in ("optimizer", "learning_rate", "train_steps")
    }
    optimizer = wmt.Translation(config_lib.resolve(values)).build_optimizer(
        model
    )
    assert type(optimizer) is keras.optimizers.Adam
    assert (optimizer.beta_1, optimizer.beta_2) == (0.9, 0.997)
    assert optimizer.epsilon == 1e-9
    assert not optimizer.weight_decay
    for step in (400, 8000, 32_000, 500_000):
        optimizer.iterations.assign(step)
        rate = 2 * min(1, step / 8000) * max(step, 8000) ** -0.5 * 512**-0.5
        assert float(optimizer.learning_rate) == pytest.approx(rate, rel=1e-5)


def test_small_config_has_a_rate_of_its_own(task, model):
    optimizer = task.build_optimizer(model)
    optimizer.iterations.assign(400)
    assert float(optimizer.learning_rate) == pytest.approx(2e-3, rel=1e-5)
    optimizer.iterations.assign(task.config.train_steps)
    assert float(optimizer.learning_rate) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", wmt.REGULARIZATIONS)
def test_regularization_sets_dropouts_and_smoothing(directory, name):
    task = wmt.Translation(tiny_config(directory, regularization=name))
    found = task.build_network().get_config()
    residual = {"more": 0.3, "much": 0.5}.get(name[:4], 0.1)
    if "dropout" not in name:
        residual = 0.0
    others = 0.0 if name.startswith("residual") else min(residual, 0.1)
    assert found["residual_dropout"] == residual
    assert found["attention_dropout"] == found["hidden_dropout"] == others
    smoothing = 0.1 if "label_smoothing" in name else 0.0
    assert task.regularization.label_smoothing == smoothing


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_token_metrics_are_the_closed_forms(smoothing):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (2, 5, 7)).astype("float32")
    labels = rng.integers(0, 7, (2, 5)).astype("int32")
    weights = np.array([[1, 1, 1, 0, 0], [1, 0.5, 0, 0, 0]], "float32")
    metrics = wmt.token_metrics(
        logits, labels, weights, label_smoothing=smoothing
    )
    wide = logits.astype("float64")
    logs = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    target = np.full((2, 5, 7), smoothing / 6)
    np.put_along_axis(target, labels[..., None], 1 - smoothing, -1)
    # The divergence of the prediction from the target.
    losses = (target * (np.log(np.maximum(target, 1e-300)) - logs)).sum(-1)
    correct = logits.argmax(-1) == labels
    for name, values in (("loss", losses), ("token_accuracy", correct)):
        total, weight = metrics[name]
        assert float(weight) == weights.sum()
        assert float(total) == pytest.approx((weights * values).sum(), rel=1e-5)


def test_token_metrics_of_the_smoothed_target_are_zero():
    target = np.array([0.02, 0.9, 0.02, 0.02, 0.02, 0.02], "float32")
    metrics = wmt.token_metrics(
        np.log(target)[None, None], [[1]], [[1.0]], label_smoothing=0.1
    )
    assert float(metrics["loss"][0]) == pytest.approx(0, abs=1e-6)
    # That of ImageNet has another target, and no such minimum.
    other = classification_metrics(
        np.log(target)[None], [1], label_smoothing=0.1
    )
    assert float(other["loss"][0]) > 0.1


def test_metrics_count_each_token_of_each_pair_once(task, model, directory):
    lines = directory.joinpath("validation.de").read_text().splitlines()
    tokens = task.subwords.tokenize(lines)
    context = tf.distribute.InputContext()
    total = 0.0
    for batch in task.eval_dataset(context):
        metrics = task.compute_metrics(model, batch, training=False)
        total += float(metrics["loss"][1])
    assert total == tokens.flat_values.shape[0]
    batch = next(iter(task.train_dataset(context, 0)))
    assert batch["target"].shape == (2, LENGTH)
    metrics = task.compute_metrics(model, batch, training=True)
    held = np.count_nonzero(batch["target"].numpy() != PAD)
    assert float(metrics["token_accuracy"][1]) == held


# The vocabulary.


def test_vocabulary_identifies_the_run_and_its_path_does_not(
    task, directory, tmp_path
):
    path = tmp_path / "words.model"
    task.subwords.save(path)
    config = config_lib.plain(task.config)
    config["data"]["vocabulary"] = str(path)
    config["decode"]["batch_size"] = 3
    resolved = config_lib.resolve(config)
    fingerprint = task.configuration()["data.vocabulary_hash"]
    assert resolved.data.vocabulary_hash == fingerprint
    assert fingerprint == Subwords.load(path).fingerprint
    named = wmt.Translation(resolved)
    assert named.configuration() == task.configuration()
    # A moved vocabulary is the same run, and another one in its place is not.
    moved = path.rename(tmp_path / "moved.model")
    config["data"]["vocabulary"] = str(moved)
    assert not config_lib.config_diff(resolved, config_lib.resolve(config))
    moved.write_bytes(moved.read_bytes() + b" ")
    assert config_lib.run_name(config_lib.resolve(config)) != (
        config_lib.run_name(resolved)
    )
    moved.unlink()
    with pytest.raises(StorageError, match=r"moved\.model cannot be read"):
        config_lib.resolve(config)
    other = wmt.Translation(
        tiny_config(directory, data={"vocabulary_size": 401})
    )
    assert other.configuration()["data.vocabulary_hash"] != fingerprint


def test_checkpoint_of_another_vocabulary_is_not_restored(
    task, directory, tmp_path
):
    # Of the same size, so that only the entries differ.
    path = tmp_path / "words.model"
    model = task.subwords.model
    piece = next(
        text
        for text in (b"der", b"die", b"und", b"ein", b"en")
        if model.count(text) >= 1
    )
    path.write_bytes(model.replace(piece, piece[::-1]))
    config = config_lib.plain(task.config)
    config["data"]["vocabulary"] = str(path)
    other = wmt.Translation(config_lib.resolve(config))
    assert other.subwords.size == task.subwords.size
    built = build(task)
    Checkpoints(tmp_path, configuration=task.configuration()).save(1, *built)
    with pytest.raises(CheckpointError, match="vocabulary_hash"):
        Checkpoints(tmp_path, configuration=other.configuration()).restore(
            *built
        )


def test_vocabulary_of_a_run_is_not_replaced(task, directory, tmp_path):
    task.write_files(str(tmp_path))
    written = (tmp_path / wmt.VOCABULARY).read_bytes()
    assert written == task.subwords.model
    task.write_files(str(tmp_path))
    other = wmt.Translation(
        tiny_config(directory, data={"vocabulary_size": 401})
    )
    with pytest.raises(UsageError, match="began with another vocabulary"):
        other.write_files(str(tmp_path))
    assert (tmp_path / wmt.VOCABULARY).read_bytes() == written
    named = wmt.Translation.with_files(other.config, str(tmp_path))
    assert wmt.Translation(named).subwords.model == written


def test_vocabulary_with_another_hash_raises(task):
    config = config_lib.plain(task.config)
    config["data"]["vocabulary_hash"] = "0123456789abcdef"
    with pytest.raises(UsageError) as error:
        wmt.Translation(config_lib.resolve(config)).build_model()
    for part in ("0123456789abcdef", task.subwords.fingerprint, "400 entries"):
        assert part in str(error.value)
    config["data"]["vocabulary_hash"] = task.subwords.fingerprint
    other = wmt.Translation(config_lib.resolve(config))
    assert other.subwords.fingerprint == task.subwords.fingerprint


def test_task_with_a_vocabulary_file_does_not_open_it(
    task, tmp_path, monkeypatch
):
    """A sweep makes the tasks of all its runs."""
    path = tmp_path / "words.model"
    task.subwords.save(path)
    config = config_lib.plain(task.config)
    config["data"]["vocabulary"] = str(path)
    resolved = config_lib.resolve(config)
    path.unlink()
    named = wmt.Translation(resolved)
    assert named.configuration() == task.configuration()
    assert named.compile_signature() == task.compile_signature()
    with pytest.raises(StorageError, match=r"words\.model cannot be read"):
        named.build_model()


# Decoding.


def test_translations_do_not_depend_on_the_others(task, model, directory):
    lines = directory.joinpath("test.en").read_text().splitlines()
    decoder = task.decoder(model)
    counts = []
    together = decoder(lines, counts.append)
    assert sum(counts) == len(lines)
    assert len({found.text for found in together}) > len(lines) // 2
    assert decoder(lines[::-1]) == together[::-1]
    small = decoding.Decoder(
        model, task.subwords, beam=2, alpha=0.6, extra_length=4, batch_size=1
    )
    for alone, found in zip(small(lines), together, strict=True):
        assert alone.text == found.text
        assert alone.score == pytest.approx(found.score, abs=1e-4)
    assert task.decoder(model) is decoder
    assert decoder([]) == []


def test_awkward_lines_come_through(task, model):
    decoder = decoding.Decoder(
        model, task.subwords, beam=1, alpha=0.6, extra_length=0, batch_size=16
    )
    found = decoder([*AWKWARD, "a" * 3000])
    assert [translation.text for translation in found[:2]] == ["", ""]
    assert len(found) == len(AWKWARD) + 1
    lengths = task.subwords.tokenize([*AWKWARD, "a" * 3000]).row_lengths()
    assert decoder.cut == np.count_nonzero(lengths > 1024) >= 1
    # No line changes what the others get.
    assert [each.text for each in found[:-1]] == [
        decoder([line])[0].text for line in AWKWARD
    ]


def test_nan_gives_no_translations_and_a_warning(directory, caplog):
    task = wmt.Translation(tiny_config(directory, decode={"sentences": 2}))
    model = task.build_model()
    model.embedding.embeddings.assign(
        np.full(model.embedding.embeddings.shape, np.nan)
    )
    decoder = task.decoder(model)
    found = decoder(["Close the file.", ""])
    assert [each.text for each in found] == ["", ""]
    assert found[0].score == -np.inf
    assert decoder.failed == 1
    (evaluate,) = task.evaluators(None).values()
    with caplog.at_level("WARNING", logger="absl"):
        assert evaluate(model)["bleu"] == 0
    assert "2 sentences have no translation" in caplog.text


# Scores.


def test_evaluator_scores_what_it_writes(task, model, directory, tmp_path):
    checkpoints = Checkpoints(
        tmp_path / "checkpoints", configuration=task.configuration()
    )
    ((_, evaluate),) = task.evaluators(checkpoints).items()
    metrics = evaluate(model)
    lines = (tmp_path / "translations" / "test.txt").read_text().splitlines()
    references = directory.joinpath("test.de").read_text().splitlines()
    sources = directory.joinpath("test.en").read_text().splitlines()
    assert lines == [found.text for found in task.decoder(model)(sources)]
    expected = sacrebleu.corpus_bleu(lines, [references]).score
    assert metrics["bleu"] == pytest.approx(expected)
    assert "tok:13a" in metrics["bleu_signature"]
    assert 0 <= metrics["study_bleu"] <= 100


def test_evaluator_without_checkpoints_writes_nothing(
    directory, model, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    task = wmt.Translation(
        tiny_config(
            directory,
            decode={"sentences": 4, "samples": 2, "split": "validation"},
        )
    )
    assert set(task.evaluators(None)) == {"translation"}
    task.evaluators(None)["translation"](model)
    assert not list(tmp_path.iterdir())
    printed = capsys.readouterr().out
    sources = directory.joinpath("validation.en").read_text().splitlines()
    # The middle of each half of the four.
    assert [
        line.removeprefix("source").strip()
        for line in printed.splitlines()
        if line.startswith("source")
    ] == [sources[1], sources[3]]
    assert printed.count("reference") == printed.count("translation") == 2
    none = wmt.Translation(tiny_config(directory, decode={"sentences": 0}))
    assert not none.evaluators(None)


def test_variational_dropout_is_scored_at_thresholds(directory, tmp_path):
    config = tiny_config(
        directory,
        "variational_dropout",
        decode={"thresholds": (-1.0, 2.5), "sentences": 2},
    )
    task = wmt.Translation(config)
    model = task.build_model()
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        if "log_sigma2" in variable.path:
            variable.assign(rng.normal(-4, 3, variable.shape))
    before = sos.sparsity_report(model).sparsity
    expected = {}
    for threshold in (-1.0, 2.5):
        sos.set_hyperparameters(model, threshold=threshold)
        expected[threshold] = sos.sparsity_report(model).sparsity
    sos.set_hyperparameters(model, threshold=config.sparsity.threshold)
    checkpoints = Checkpoints(
        tmp_path / "checkpoints", configuration=task.configuration()
    )
    metrics = {}
    for evaluate in task.evaluators(checkpoints).values():
        metrics |= evaluate(model)
        assert sos.sparsity_report(model).sparsity == before
    assert metrics["sparsity_at_-1"] == expected[-1.0] > before
    assert metrics["sparsity_at_2.5"] == expected[2.5]
    # The weights of each threshold translate, in a graph that is traced once.
    lines = {
        suffix: (tmp_path / f"translations/test{suffix}.txt").read_text()
        for suffix in ("", "_at_-1", "_at_2.5")
    }
    sources = directory.joinpath("test.en").read_text().splitlines()[:2]
    for threshold in (-1.0, 2.5):
        sos.set_hyperparameters(model, threshold=threshold)
        fresh = wmt.Translation(config).decoder(model)(sources)
        assert lines[f"_at_{threshold:g}"] == "".join(
            f"{found.text}\n" for found in fresh
        )
    sos.set_hyperparameters(model, threshold=config.sparsity.threshold)
    assert lines["_at_-1"] != lines["_at_2.5"]
    assert {"bleu_at_-1", "study_bleu_at_2.5", "bleu"} <= set(metrics)
    # Also after an error.
    with pytest.raises(RuntimeError), wmt._at_threshold(model, 2.5):
        raise RuntimeError
    assert sos.sparsity_report(model).sparsity == before


def test_threshold_of_all_layers_is_translated_once(directory, monkeypatch):
    config = tiny_config(
        directory, "variational_dropout", decode={"sentences": 2}
    )
    config.decode.thresholds = (config.sparsity.threshold,)
    task = wmt.Translation(config)
    model = task.build_model()
    calls = []

    def translate(self, model, sentences):
        calls.append(sentences)
        return list(sentences)

    monkeypatch.setattr(wmt.Translation, "_translate", translate)
    evaluators = task.evaluators(None)
    first, second = (evaluate(model) for evaluate in evaluators.values())
    suffix = f"_at_{config.sparsity.threshold:g}"
    assert second[f"bleu{suffix}"] == first["bleu"]
    assert len(calls) == 1
    # Another evaluation has other weights.
    task.evaluators(None)["translation"](model)
    assert len(calls) == 2


def test_thresholds_of_another_technique_raise(directory):
    config = tiny_config(directory, "magnitude", decode={"thresholds": (1.0,)})
    with pytest.raises(UsageError, match="config.decode.thresholds"):
        wmt.Translation(config).build_model()


def test_mean_of_checkpoints_is_scored(directory, tmp_path):
    task = wmt.Translation(
        tiny_config(directory, decode={"average_checkpoints": 3})
    )
    model, optimizer = build(task)
    checkpoints = Checkpoints(tmp_path, configuration=task.configuration())
    table = model.embedding.embeddings
    first = np.array(table)
    for step in (0, 1, 2):
        table.assign(first + step)
        checkpoints.save(step, model, optimizer)
        with task.averaged_weights(model, checkpoints):
            # Never with the initial weights.
            mean = {0: 0, 1: 1, 2: 1.5}[step]
            np.testing.assert_allclose(table, first + mean, atol=1e-6)
        np.testing.assert_array_equal(table, first + step)


# Serving.


def test_export_translates_like_the_model(task, model, tmp_path):
    lines = ["Close the file.", "", "  ", "What is this?", "😀 Привет"]
    # Every space of Python, those of Unicode included.
    spaces = "".join(filter(str.isspace, map(chr, range(0x110000))))
    lines += [spaces, f"{spaces}a", "a" * 3000]
    sos.export.export_model(task.serving(model), tmp_path / "export")
    expected = task.decoder(model)(lines)
    served = tf.saved_model.load(str(tmp_path / "export"))
    translate = served.signatures["serving_default"]
    found = translate(sentences=tf.constant(lines))
    lengths = task.subwords.tokenize(lines).row_lengths().numpy()
    np.testing.assert_array_equal(found["cut"], lengths > 1024)
    assert any(found["cut"].numpy())
    texts = [text.decode() for text in found["translations"].numpy()]
    assert texts == [translation.text for translation in expected]
    np.testing.assert_allclose(
        found["scores"], [e.score for e in expected], atol=1e-4
    )
    for some in ([], ["", " "]):
        found = translate(sentences=tf.constant(some, tf.string))
        assert found["translations"].numpy().tolist() == [b""] * len(some)
        assert found["scores"].shape == (len(some),)
    bad = translate(sentences=tf.constant([b"bad \xff\xfe bytes"]))
    assert bad["translations"].shape == (1,)


_SERVE = """
import json, sys
import tensorflow as tf
import tensorflow_text
served = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
found = served(sentences=tf.constant(json.loads(sys.argv[2])))
assert not {"sos", "models", "keras_hub"} & set(sys.modules)
print(json.dumps([t.decode() for t in found["translations"].numpy()]))
"""


@pytest.mark.slow
def test_export_of_a_sparse_model_runs_without_this_package(
    directory, tmp_path
):
    task = wmt.Translation(tiny_config(directory, "l0"))
    model = task.build_model()
    lines = directory.joinpath("test.en").read_text().splitlines()[:3]
    # Longer than the longest length.
    lines.append("a" * 1200)
    expected = [found.text for found in task.decoder(model)(lines)]
    sos.export.export_model(task.serving(sos.strip(model)), tmp_path / "export")
    output = subprocess.run(
        [sys.executable, "-c", _SERVE, tmp_path / "export", json.dumps(lines)],
        cwd=tmp_path,
        env={"PATH": "", "TF_CPP_MIN_LOG_LEVEL": "2"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(output.stdout.splitlines()[-1]) == expected


# Configs.


@pytest.mark.parametrize("technique", libreoffice_help.TECHNIQUES)
def test_technique_of_the_small_config_fits_the_network(directory, technique):
    config = tiny_config(directory, f"{technique},split_heads=True")
    model = wmt.Translation(config).build_model()
    report = sos.sparsity_report(model)
    sparse = [row for row in report.rows if row["technique"]]
    kinds = [
        next(
            name
            for name, expression in wmt.Translation.layer_kinds
            if re.search(expression, row["weight"])
        )
        for row in sparse
    ]
    # An encoder and a decoder block with two heads, and the table.
    weights = (6 + 1 + 2) + (2 * (6 + 1) + 2) + 1
    assert len(sparse) == (0 if technique == "dense" else weights)
    if sparse:
        # Three attention layers, and two feed-forward ones.
        assert collections.Counter(kinds) == {
            "embedding": 1,
            "query and key": 3 * 4,
            "value": 3 * 2,
            "attention output": 3,
            "feed-forward": 2 * 2,
        }


@pytest.mark.parametrize(
    ("option", "expected"),
    [("dense_embedding=True", None), ("embedding_sparsity=0.5", 0.5)],
)
def test_embedding_options_name_the_table(directory, option, expected):
    config = tiny_config(directory, f"magnitude,sparsity=0.8,{option}")
    model = wmt.Translation(config).build_model()
    targets = {
        row["weight"]: row["target"]
        for row in sos.sparsity_report(model).rows
        if row["rank"] >= 2 and row["reason"] != "bias"
    }
    assert targets.pop("embedding/embeddings") == expected
    assert set(targets.values()) == {0.8}


@pytest.mark.slow
def test_small_config_is_small():
    config = config_lib.resolve(libreoffice_help.get_config())
    task = wmt.Translation(config)
    model = task.build_model()
    assert task.subwords.size == 4000
    assert 3_500_000 < model.count_params() < 4_500_000
    assert min(task.source.fill) > 0.95
    batches = task.source.train(tf.distribute.InputContext(), 0)
    for batch in batches.take(task.source.train_rows // task.batch_size):
        places = [batch["source_segments"], batch["target_segments"]]
        filled = sum(int(np.count_nonzero(part)) for part in places)
        assert filled >= 0.9 * sum(int(np.size(part)) for part in places)
    assert task.source.dropped_pairs < 5


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"batch_size": 100}, ["batch_size", "target_length", "96", "100"]),
        ({"regularization": "dropout"}, ["regularization", "none", "dropout"]),
        ({"model": {"heads": 3}}, ["config.model", "heads", "3"]),
        ({"model": {"depth": 3}}, ["config.model", "hidden_width", "depth"]),
        ({"data": {"name": "/missing"}}, ["config.data`", "/missing"]),
        ({"data": {"vocabulary": "/no.model"}}, ["/no.model"]),
        ({"data": {"vocabulary_size": 0}}, ["vocabulary_size", "0"]),
        (
            {"data": {"vocabulary_size": 10**6}},
            ["config.data.vocabulary_size`", "1000000"],
        ),
        ({"data": {"target_length": 8}, "batch_size": 16}, ["longer than"]),
        ({"batch_size": 96_000}, ["config.data", "batch"]),
        ({"decode": {"split": "train"}}, ["split", "validation", "train"]),
        ({"decode": {"beam": 0}}, ["config.decode", "beam", "0"]),
        ({"decode": {"alpha": -1.0}}, ["config.decode", "alpha", "-1.0"]),
        ({"decode": {"thresholds": ("x",)}}, ["thresholds", "'x'"]),
        ({"decode": {"average_checkpoints": 0}}, ["average_checkpoints", "0"]),
    ],
)
def test_config_that_does_not_fit_raises(directory, overrides, parts):
    with pytest.raises((UsageError, StorageError)) as error:
        task = wmt.Translation(tiny_config(directory, **overrides))
        task.build_model()
        task.prepare()
    for part in parts:
        assert part in str(error.value)


# Accelerators.


@pytest.mark.slow
@pytest.mark.parametrize("technique", libreoffice_help.TECHNIQUES)
def test_training_step_is_accepted_by_a_tpu(directory, technique):
    strategy = tpu_check.deviceless_strategy(2)
    with strategy.scope():
        task = wmt.Translation(tiny_config(directory, technique))
    trainer = Trainer(task, strategy=strategy)
    data = strategy.distribute_datasets_from_function(
        lambda context: task.train_dataset(context, 0)
    )
    updater = None
    if trainer.steps.sparse_weights:
        updater = sos.SparsityUpdater(trainer.model, trainer.optimizer)
        updater.resume()
    function = trainer.steps.train_function.get_concrete_function(
        iter(data), tf.TensorSpec((), tf.int32)
    )
    assert not tpu_check.violations(function)
    if updater:
        updater.pause()


@pytest.mark.slow
def test_replicas_evaluate_every_pair_once(directory, task, model, capsys):
    strategy = make_strategy("mirrored", cpu_replicas=2)
    with strategy.scope():
        mirrored = wmt.Translation(
            tiny_config(directory, decode={"sentences": 8, "samples": 8})
        )
    trainer = Trainer(mirrored, strategy=strategy)
    for variable, value in zip(
        trainer.model.variables, model.variables, strict=True
    ):
        variable.assign(value)
    metrics = trainer.evaluate().metrics
    printed = capsys.readouterr().out
    alone = Trainer(task, strategy=make_strategy("one_device"))
    for variable, value in zip(
        alone.model.variables, model.variables, strict=True
    ):
        variable.assign(value)
    expected = alone.evaluate().metrics
    for name in ("loss", "token_accuracy"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5)
    # A copy of the replicas' model translates.
    capsys.readouterr()
    (evaluate,) = mirrored.evaluators(None).values()
    assert metrics["bleu"] == pytest.approx(evaluate(model)["bleu"])
    assert capsys.readouterr().out == printed
    assert printed.count("translation ") == 8


# Learning.


@pytest.mark.slow
def test_pairs_are_learned_by_heart_and_a_kill_changes_no_bit(tmp_path):
    steps = 400
    data = tmp_path / "data"
    data.mkdir()
    write_pairs(data, 20)
    arguments = (
        f"--config=configs/libreoffice_help.py:magnitude,sparsity=0.3,"
        f"train_steps={steps},regularization=none",
        f"--config.data.name={data}",
        "--config.data.vocabulary_size=400",
        f"--config.data.source_length={LENGTH}",
        f"--config.data.target_length={LENGTH}",
        f"--config.batch_size={2 * LENGTH}",
        "--config.model.width=64",
        "--config.model.hidden_width=128",
        "--config.model.layers=1",
        "--config.learning_rate.warmup_steps=50",
        "--deterministic",
        "--save_checkpoints_steps=40",
        "--steps_per_loop=10",
    )

    def start(name):
        return processes.Program(
            "models.train",
            *arguments,
            f"--workdir={tmp_path / name}",
            log=tmp_path / f"{name}.txt",
        )

    def run_directory(name):
        (config,) = pathlib.Path(tmp_path, name).glob("*/config.json")
        return config.parent

    def saved():
        found = list(pathlib.Path(tmp_path, "killed").glob("*/config.json"))
        return found and any(
            40 < step < steps
            for step in processes.checkpoint_steps(found[0].parent)
        )

    with start("whole") as whole:
        assert whole.wait() == 0, whole.output
    result = json.loads((run_directory("whole") / "result.json").read_text())
    assert result["metrics"]["bleu"] == pytest.approx(100)
    assert result["sparsity"] == pytest.approx(0.3, abs=0.01)
    with start("killed") as program:
        program.wait_until(saved)
        program.kill()
    with start("killed") as program:
        assert program.wait() == 0, program.output
    whole, killed = (
        processes.checkpoint_values(run_directory(name), steps)
        for name in ("whole", "killed")
    )
    assert not processes.differences(whole, killed)
    for name in ("whole", "killed"):
        text = run_directory(name).joinpath("translations", "test.txt")
        assert text.read_text() == data.joinpath("test.de").read_text()
