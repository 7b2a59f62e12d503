import csv
import importlib
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import sos
from sos.__main__ import main
from tests.support import techniques


@keras.saving.register_keras_serializable(package="report_test")
class Block(keras.Model):
    """Sublayers whose names Keras makes up, two weights of one shape."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.Dense(4)
        self.attention = layers.MultiHeadAttention(2, 2)

    def build(self, input_shape):
        self.first.build(input_shape)
        shape = (*input_shape[:-1], 4)
        self.attention.build(shape, shape)

    def call(self, inputs):
        x = self.first(inputs)
        return self.attention(x, x)


def recurrent():
    return keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            layers.Embedding(7, 4, name="embedding"),
            layers.LSTM(4, name="lstm"),
            layers.Dense(2, name="last"),
        ],
        name="small",
    )


def block():
    model = Block()
    model.build((None, 5, 3))
    return model


def sparse_of(model, technique, **kwargs):
    sparse = sos.sparsify(
        model, technique, **techniques.arguments(technique, **kwargs)
    )
    techniques.make_zeros(sparse)
    return sparse


def test_report_of_a_sparse_model_has_the_numbers_by_hand():
    model = recurrent()
    model.layers[0].trainable = False
    sparse = sparse_of(model, sos.MagnitudePruning, rules={"recurrent": None})
    report = sos.sparsity_report(sparse)
    assert report.name == "small"
    rows = {row["weight"]: row for row in report.rows}
    assert len(rows) == len(model.weights) == 6
    _, lstm, last = sparse.layers
    kernel = np.asarray(lstm.cell.kernel)
    mask = np.asarray(lstm.sparse_weights[0].state["mask"])
    nonzeros = np.count_nonzero(kernel * mask)
    row = rows["lstm/lstm_cell/kernel"]
    assert row == {
        "layer": "lstm/lstm_cell",
        "weight": "lstm/lstm_cell/kernel",
        "technique": "MagnitudePruning",
        "rank": 2,
        "size": 64,
        "nonzeros": nonzeros,
        "sparsity": 1 - nonzeros / 64,
        "target": 0.5,
        "reason": "",
        "multiply_adds": 5 * 64,
        "sparse_multiply_adds": 5 * nonzeros,
    }
    notes = {name: row["reason"] for name, row in rows.items()}
    assert notes == {
        "embedding/embeddings": "not trainable",
        "lstm/lstm_cell/kernel": "",
        "lstm/lstm_cell/recurrent_kernel": "left dense by rule 'recurrent'",
        "lstm/lstm_cell/bias": "rank 1",
        "last/kernel": "",
        "last/bias": "rank 1",
    }
    (last_value,) = last.techniques[0].evaluation_weights().values()
    zeros = 64 - nonzeros + np.sum(np.asarray(last_value) == 0)
    assert report.sparsity == pytest.approx(zeros / (64 + 8))
    others = [model.layers[0].embeddings, lstm.cell.recurrent_kernel]
    others += [lstm.cell.bias, last.bias]
    zeros += sum(np.sum(np.asarray(v) == 0) for v in others)
    size = sum(np.size(v) for v in model.weights)
    assert report.model_sparsity == pytest.approx(zeros / size)
    totals = report.totals
    assert totals["size"] == size
    assert totals["nonzeros"] == size - zeros
    assert totals["multiply_adds"] == 5 * (64 + 64) + 8
    assert set(totals) == set(report.rows[0])


def test_report_of_a_plain_model_has_its_numbers():
    model = recurrent()
    model.get_layer("last").kernel.assign(np.eye(4)[:, :2])
    report = sos.sparsity_report(model)
    (row,) = (r for r in report.rows if r["weight"].endswith("last/kernel"))
    assert (row["nonzeros"], row["sparsity"]) == (2, 0.75)
    assert (row["technique"], row["reason"]) == ("", "in no sparse layer")
    assert report.sparsity == 0


@pytest.mark.parametrize("technique", techniques.TECHNIQUES)
def test_report_nonzeros_are_those_of_the_stripped_model(technique):
    sparse = sparse_of(recurrent(), technique)
    rows = sos.sparsity_report(sparse).rows
    for row, weight in zip(rows, sos.strip(sparse).weights, strict=True):
        assert row["nonzeros"] == np.count_nonzero(weight.numpy())


def test_report_after_a_change_of_the_threshold_differs():
    sparse = sparse_of(recurrent(), sos.VariationalDropout)
    before = sos.sparsity_report(sparse).sparsity
    sos.set_hyperparameters(sparse, threshold=-20.0)
    assert before < sos.sparsity_report(sparse).sparsity == 1.0


def test_save_csv_writes_the_rows_or_nothing(tmp_path):
    report = sos.sparsity_report(sparse_of(recurrent(), sos.MagnitudePruning))
    path = tmp_path / "new" / "report.csv"
    report.save_csv(path)
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    expected = [
        {k: "" if v is None else str(v) for k, v in row.items()}
        for row in report.rows
    ]
    assert found == expected
    before = path.read_bytes()
    report.rows[0] = {"surprise": 1}
    with pytest.raises(ValueError, match="surprise"):
        report.save_csv(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["report.csv"]


def test_report_as_text_has_a_line_for_each_matrix():
    report = sos.sparsity_report(
        sparse_of(recurrent(), sos.MagnitudePruning, rules={"last": None})
    )
    lines = str(report).splitlines()
    assert all(line == line.rstrip() for line in lines)
    assert max(map(len, lines)) <= 120
    (kernel,) = (line for line in lines if "lstm/lstm_cell/kernel" in line)
    assert kernel.split()[-1] == "MagnitudePruning"
    assert "50.00%" in kernel.split()
    assert any("left dense by rule 'last'" in line for line in lines)
    assert any(line.split()[:2] == ["2", "vectors"] for line in lines)
    assert f"{report.sparsity:.2%} of the weights made sparse" in lines[-1]


def test_report_as_text_keeps_long_paths_in_one_piece():
    inputs = keras.Input((5, 4))
    name = "a_rather_long_name_of_a_transformer_encoder_block"
    layer = layers.MultiHeadAttention(2, 3, name=name)
    model = keras.Model(inputs, layer(inputs, inputs))
    assert f"{name}/attention_output/kernel" in str(sos.sparsity_report(model))


def test_report_of_something_else_raises():
    with pytest.raises(TypeError, match="takes a Keras 3 model"):
        sos.sparsity_report("model")
    with pytest.raises(ValueError, match="not built"):
        sos.sparsity_report(keras.Sequential([layers.Dense(1)]))


# The command.


def run(capsys, *arguments):
    main(["report", *map(str, arguments)])
    return capsys.readouterr().out


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        main(["report", *map(str, arguments)])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def rows_of(capsys, tmp_path, *arguments):
    """The CSV rows of what the command found."""
    path = tmp_path / "rows.csv"
    run(capsys, *arguments, "--csv", path)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(rows):
    return sorted(
        (int(row["size"]), int(row["nonzeros"]))
        for row in rows
        if row["technique"]
    )


@pytest.mark.oldest
@pytest.mark.parametrize("technique", techniques.TECHNIQUES)
def test_command_on_a_keras_file_prints_the_report(technique, tmp_path, capsys):
    sparse = sparse_of(recurrent(), technique)
    sparse.save(tmp_path / "model.keras")
    report = sos.sparsity_report(sparse)
    assert run(capsys, tmp_path / "model.keras").strip() == str(report).strip()
    rows = rows_of(capsys, tmp_path, tmp_path / "model.keras")
    assert [row["weight"] for row in rows] == [
        row["weight"] for row in report.rows
    ]


def checkpoint(model, path, *, optimizer=True):
    items = {"model": model}
    if optimizer:
        items["optimizer"] = keras.optimizers.Adam()
        items["optimizer"].build(model.trainable_variables)
    return tf.train.Checkpoint(**items).save(str(path))


# Every technique, and each model with and without an optimizer.
@pytest.mark.parametrize(
    ("technique", "make", "optimizer"),
    [(technique, recurrent, True) for technique in techniques.TECHNIQUES]
    + [
        (sos.MagnitudePruning, block, False),
        (sos.VariationalDropout, block, True),
        (sos.VariationalDropout, recurrent, False),
    ],
)
def test_command_on_a_checkpoint_has_the_numbers_of_the_model(
    technique, make, optimizer, tmp_path, capsys
):
    sparse = sparse_of(make(), technique)
    prefix = checkpoint(sparse, tmp_path / "ckpt", optimizer=optimizer)
    rows = rows_of(capsys, tmp_path, prefix)
    report = sos.sparsity_report(sparse)
    assert numbers(rows) == numbers(report.rows)
    assert f"{report.sparsity:.2%} of the weights" in run(capsys, prefix)


def test_command_on_a_layer_under_two_techniques_has_its_numbers(
    tmp_path, capsys
):
    sparse = sparse_of(
        recurrent(),
        sos.MagnitudePruning,
        rules={
            "recurrent": {
                "technique": "VariationalDropout",
                "penalty_weight": 0.1,
            },
            "lstm_cell/kernel": {
                "technique": "L0Regularization",
                "penalty_weight": 0.1,
            },
        },
    )
    prefix = checkpoint(sparse, tmp_path / "ckpt")
    rows = rows_of(capsys, tmp_path, prefix)
    assert numbers(rows) == numbers(sos.sparsity_report(sparse).rows)


def test_command_finds_checkpoints_by_other_names(tmp_path, capsys):
    first = sparse_of(recurrent(), sos.FixedMask)
    checkpoint(first, tmp_path / "ckpt")
    second = sparse_of(recurrent(), sos.RandomPruning)
    other = tf.train.Checkpoint(model=second).write(str(tmp_path / "a.b-500"))
    expected = rows_of(capsys, tmp_path, tmp_path / "ckpt-1")
    assert rows_of(capsys, tmp_path, tmp_path / "ckpt-1.index") == expected
    assert rows_of(capsys, tmp_path, tmp_path) == expected
    assert rows_of(capsys, tmp_path, f"{other}.index") == rows_of(
        capsys, tmp_path, other
    )


@pytest.mark.parametrize("kind", ["keras", "checkpoint"])
def test_command_with_a_threshold_counts_by_it(kind, tmp_path, capsys):
    sparse = sparse_of(recurrent(), sos.VariationalDropout, threshold=1.0)
    path = tmp_path / "model.keras"
    if kind == "keras":
        sparse.save(path)
    else:
        path = checkpoint(sparse, tmp_path / "ckpt")
    for threshold in (None, 1.0, -20.0, 0.5):
        arguments = () if threshold is None else (f"--threshold={threshold}",)
        sos.set_hyperparameters(sparse, threshold=threshold or 1.0)
        found = numbers(rows_of(capsys, tmp_path, path, *arguments))
        assert found == numbers(sos.sparsity_report(sparse).rows)


def test_command_on_what_it_cannot_read_exits_with_one_line(tmp_path, capsys):
    missing = fails(capsys, tmp_path / "no.keras")
    assert "there is no file, directory or checkpoint" in missing
    assert "there is no checkpoint in" in fails(capsys, tmp_path)
    text = tmp_path / "notes.txt"
    text.write_text("text")
    assert "neither a .keras file nor a TensorFlow" in fails(capsys, text)
    fake = tmp_path / "fake.keras"
    fake.write_text("text")
    assert "fake.keras is damaged or not a .keras file" in fails(capsys, fake)
    fake = tmp_path / "fake.index"
    fake.write_text("text")
    assert "cannot be read as a checkpoint" in fails(capsys, fake)
    plain = checkpoint(recurrent(), tmp_path / "plain")
    assert "holds no masks" in fails(capsys, plain)
    nan = fails(capsys, plain, "--threshold=nan")
    assert "--threshold must be a finite number" in nan
    masked = tmp_path / "masked.keras"
    sos.prune(recurrent(), 0.5).save(masked)
    unused = fails(capsys, masked, "--threshold=2")
    assert "variational dropout" in unused and "--threshold=2.0" in unused
    assert "No module named" in fails(capsys, plain, "--import=no_such_module")
    assert "--import ''" in fails(capsys, plain, "--import=")
    assert "--import '.x'" in fails(capsys, plain, "--import=.x")
    with pytest.raises(SystemExit) as error:
        main(["report", str(plain), "--threshold=high"])
    assert error.value.code == 2
    assert "invalid float value: 'high'" in capsys.readouterr().err


OWN_CLASS = """
import keras

@keras.saving.register_keras_serializable(package="own")
class OwnDense(keras.layers.Dense):
    pass
"""


def test_command_with_import_knows_classes_of_the_user(
    tmp_path, capsys, monkeypatch
):
    (tmp_path / "own_classes.py").write_text(OWN_CLASS)
    monkeypatch.syspath_prepend(tmp_path)
    own_classes = importlib.import_module("own_classes")
    model = keras.Sequential([keras.Input((3,)), own_classes.OwnDense(2)])
    path = tmp_path / "model.keras"
    model.save(path)
    # As in another process.
    keras.saving.get_custom_objects().pop("own>OwnDense")
    monkeypatch.delitem(sys.modules, "own_classes")
    message = fails(capsys, path)
    assert (
        "--import" in message and "Could not locate class 'OwnDense'" in message
    )
    assert "own_dense/kernel" in run(capsys, path, "--import", "own_classes")
