import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import sos
from sos.errors import StorageError
from tests.support import techniques

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCHEDULE = sos.schedules.ConstantSparsity(0.75, begin_step=0, frequency=1)


def dense(size=8):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6,), name="features"),
            keras.layers.Dense(size, activation="relu"),
            keras.layers.Dense(size),
        ]
    )


def sparse(size=8):
    """A model whose masks are set."""
    model = sos.sparsify(dense(size), "MagnitudePruning", schedule=SCHEDULE)
    with sos.SparsityUpdater(model, keras.optimizers.SGD()):
        pass
    return model


def files(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*.*")}


def check_equal(model, loaded, sizes=(1, 3, 17)):
    for size in sizes:
        x = techniques.normal(size, 6, seed=size)
        np.testing.assert_allclose(
            loaded(x), model(x, training=False), rtol=1e-6, atol=1e-6
        )


# What is exported.


@pytest.mark.parametrize("name", techniques.NAMES)
def test_export_of_a_model_computes_what_it_does(name, tmp_path):
    model = techniques.mlp(name)
    sos.export_model(model, tmp_path / "model")
    loaded = tf.saved_model.load(tmp_path / "model")
    check_equal(model, loaded)
    # The plain variables alone, with the zeros in place.
    zeros = {
        tuple(weight.variable.shape): np.count_nonzero(value == 0)
        for wrapper in model.layers
        for weight, value in wrapper.evaluation_weights().items()
    }
    assert len(loaded.weights) == 4
    for weight in loaded.weights:
        if len(weight.shape) == 2:
            count = np.count_nonzero(weight.numpy() == 0)
            assert count == zeros[tuple(weight.shape)]


def test_export_loaded_needs_neither_sos_nor_keras(tmp_path):
    model = sparse()
    sos.export_model(model, tmp_path / "model")
    x = techniques.normal(5, 6)
    np.save(tmp_path / "x.npy", x)
    program = (
        "import sys\n"
        "sys.modules['sos'] = sys.modules['keras'] = None\n"
        "import numpy as np\n"
        "import tensorflow as tf\n"
        "loaded = tf.saved_model.load('model')\n"
        "x = tf.constant(np.load('x.npy'))\n"
        "np.save('called.npy', loaded(x))\n"
        "served = loaded.signatures['serving_default'](features=x)\n"
        "np.save('served.npy', served['output_0'])\n"
        "zeros = [int((w.numpy() == 0).sum()) for w in loaded.weights]\n"
        "print(zeros)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        stdout=subprocess.PIPE,
        text=True,
    )
    # Kernels and biases; the biases start as zeros.
    assert done.stdout == f"{[36, 8, 48, 8]}\n"
    for name in ("called", "served"):
        np.testing.assert_allclose(
            np.load(tmp_path / f"{name}.npy"), model(x), rtol=1e-6, atol=1e-6
        )


def test_export_of_a_model_stores_every_variable_once(tmp_path):
    model = sparse(1000)
    sos.export_model(model, tmp_path / "model")
    raw = 4 * dense(1000).count_params()
    stored = sum(p.stat().st_size for p in (tmp_path / "model").rglob("*.*"))
    assert raw < stored < 1.1 * raw


def test_export_of_dense_and_compiled_models_succeeds(tmp_path):
    model = dense()
    model.compile("adam", "mse")
    model.fit(*techniques.batch()[:1], np.zeros((8, 8)), verbose=0)
    sos.export_model(model, tmp_path / "model")
    loaded = tf.saved_model.load(tmp_path / "model")
    check_equal(model, loaded)
    assert len(loaded.weights) == 4


def test_export_of_a_model_computes_as_in_inference(tmp_path):
    x = techniques.normal(64, 6)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, dtype="mixed_bfloat16"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(2, dtype="float32"),
        ]
    )
    for _ in range(3):
        model(x + 5, training=True)
    sos.export_model(model, tmp_path / "model")
    loaded = tf.saved_model.load(tmp_path / "model")
    np.testing.assert_allclose(loaded(x), model(x), rtol=1e-2, atol=1e-2)
    np.testing.assert_array_equal(loaded(x), loaded(x))


def test_export_of_layers_with_tables_keeps_them(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((), dtype="string"),
            keras.layers.TextVectorization(
                vocabulary=["one", "two"], output_sequence_length=3
            ),
            keras.layers.Embedding(5, 2),
        ]
    )
    sos.export_model(model, tmp_path / "model")
    text = tf.constant(["two", "one three two"])
    loaded = tf.saved_model.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded(text), model(text))


def test_export_of_several_replicas_succeeds(tmp_path):
    with techniques.two_replicas().scope():
        models = [dense(), sparse()]
    for model in models:
        sos.export_model(model, tmp_path / "model")
        check_equal(model, tf.saved_model.load(tmp_path / "model"))


# Inputs and outputs.


def two_inputs(names=("z", "a"), structure=list):
    """A model whose inputs are not in the order of their names."""
    first = keras.Input((3,), name=names[0])
    second = keras.Input((4,), name=names[1])
    inputs = [first, second]
    if structure is dict:
        inputs = dict(zip(names, inputs, strict=True))
    outputs = {
        "sum": keras.layers.Dense(5)(
            keras.layers.Concatenate()([first, second])
        ),
        "one": keras.layers.Dense(2)(second),
    }
    if structure is list:
        outputs = [outputs["sum"], outputs["one"]]
    return keras.Model(inputs, outputs)


@pytest.mark.parametrize("structure", [list, dict])
def test_export_of_several_inputs_takes_them_by_name(structure, tmp_path):
    model = two_inputs(structure=structure)
    sos.export_model(model, tmp_path / "model")
    loaded = tf.saved_model.load(tmp_path / "model")
    serve = loaded.signatures["serving_default"]
    z, a = (
        tf.constant(techniques.normal(7, 3)),
        tf.constant(techniques.normal(7, 4)),
    )
    inputs = [z, a] if structure is list else {"a": a, "z": z}
    expected = model(inputs)
    called, served = loaded(inputs), serve(a=a, z=z)
    if structure is list:
        expected = dict(zip(("output_0", "output_1"), expected, strict=True))
        called = dict(zip(("output_0", "output_1"), called, strict=True))
    assert set(expected) == set(called) == set(served)
    for name, value in expected.items():
        np.testing.assert_allclose(called[name], value, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(served[name], value, rtol=1e-6, atol=1e-6)


def served_inputs(path):
    loaded = tf.saved_model.load(path)
    serve = loaded.signatures["serving_default"]
    return serve.structured_input_signature[1]


def test_export_of_inputs_without_names_gives_stable_ones(tmp_path):
    single = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    sos.export_model(single, tmp_path / "model")
    assert set(served_inputs(tmp_path / "model")) == {"inputs"}
    several = two_inputs(names=(None, None))
    sos.export_model(several, tmp_path / "model")
    inputs = served_inputs(tmp_path / "model")
    assert {k: v.shape[1] for k, v in inputs.items()} == {
        "input_0": 3,
        "input_1": 4,
    }


def test_export_of_input_names_makes_them_names_of_arguments(tmp_path):
    sos.export_model(two_inputs(("in-ids", "b.c")), tmp_path / "model")
    assert set(served_inputs(tmp_path / "model")) == {"in_ids", "b_c"}


def test_export_of_a_fixed_batch_takes_any_size(tmp_path):
    model = keras.Sequential(
        [keras.Input(batch_shape=(4, 6)), keras.layers.Dense(2)]
    )
    sos.export_model(model, tmp_path / "model")
    check_equal(model, tf.saved_model.load(tmp_path / "model"), sizes=(4,))
    loaded = tf.saved_model.load(tmp_path / "model")
    assert loaded(techniques.normal(9, 6)).shape == (9, 2)


@keras.saving.register_keras_serializable(package="export_test")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(8)

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, inputs):
        if isinstance(inputs, dict):
            inputs = inputs["x"] + inputs["y"]
        return self.dense(inputs)

    def get_config(self):
        return {"name": self.name}


def subclassed(wrapped):
    model = Subclassed()
    model.build((None, 6))
    if wrapped:
        model = sos.sparsify(model, "MagnitudePruning", schedule=SCHEDULE)
    return model


@pytest.mark.parametrize("wrapped", [False, True])
def test_export_of_a_subclassed_model_needs_a_signature(wrapped, tmp_path):
    model, path = subclassed(wrapped), tmp_path / "model"
    with pytest.raises(ValueError, match="`input_signature`"):
        sos.export_model(model, path)
    assert not list(tmp_path.iterdir())
    spec = tf.TensorSpec((None, 6), tf.float32)
    sos.export_model(model, path, input_signature=spec)
    check_equal(model, tf.saved_model.load(path))
    # The same model takes dictionaries too.
    specs = {"y": spec, "x": spec}
    sos.export_model(model, path, input_signature=specs)
    x, y = tf.constant(techniques.normal(5, 6)), tf.ones((5, 6))
    loaded = tf.saved_model.load(path)
    served = loaded.signatures["serving_default"](x=x, y=y)["output_0"]
    for outputs in (loaded({"x": x, "y": y}), served):
        np.testing.assert_allclose(outputs, model(x + y), rtol=1e-6, atol=1e-6)


# What is refused.


def test_export_of_an_unbuilt_model_raises(tmp_path):
    model = keras.Sequential([keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="not built"):
        sos.export_model(model, tmp_path / "model")


@pytest.mark.parametrize("other", ["model.keras", keras.layers.Dense(2)])
def test_export_of_no_model_raises(other, tmp_path):
    with pytest.raises(TypeError, match="tf.Module"):
        sos.export_model(other, tmp_path / "model")


@pytest.mark.parametrize("signature", [(None, 6), {"x": "float32"}, []])
def test_export_with_a_signature_of_something_else_raises(signature, tmp_path):
    with pytest.raises(TypeError, match="tf.TensorSpec"):
        sos.export_model(dense(), tmp_path / "model", input_signature=signature)


def test_export_of_inputs_of_one_name_raises(tmp_path):
    with pytest.raises(ValueError, match="must have different names"):
        sos.export_model(two_inputs(("a-b", "a.b")), tmp_path / "model")
    spec = tf.TensorSpec((None, 3))
    with pytest.raises(ValueError, match="must not be nested"):
        sos.export_model(
            dense(), tmp_path / "model", input_signature={"a": [spec, spec]}
        )


def test_export_over_anything_but_a_saved_model_raises(tmp_path):
    for path in (tmp_path / "file", tmp_path / "folder" / "file"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("precious")
    for name in ("file", "folder"):
        with pytest.raises(StorageError, match="only a SavedModel"):
            sos.export_model(dense(), tmp_path / name)
    assert (tmp_path / "file").read_text() == "precious"
    assert (tmp_path / "folder" / "file").read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 2


# Complete or absent.


def test_export_over_an_export_replaces_it(tmp_path):
    path = tmp_path / "new" / "model"
    for model in (dense(4), sparse(8)):
        sos.export_model(model, path)
        check_equal(model, tf.saved_model.load(path))
        assert list(path.parent.iterdir()) == [path]
    # Others may read it, as any new directory.
    (tmp_path / "ordinary").mkdir()
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_export_to_an_empty_directory_or_a_link_succeeds(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("empty", "link"):
        sos.export_model(dense(), tmp_path / name)
        check_equal(dense(), tf.saved_model.load(tmp_path / "empty"))
    assert (tmp_path / "link").is_symlink()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("where", ["saving", "renaming"])
def test_export_that_fails_leaves_what_was_there(
    there, where, tmp_path, monkeypatch
):
    path = tmp_path / "model"
    if there:
        sos.export_model(dense(4), path)
    before = files(tmp_path)
    save, rename = tf.saved_model.save, pathlib.Path.rename

    def fail_to_save(module, temporary, **kwargs):
        save(module, temporary, **kwargs)
        os.remove(f"{temporary}/saved_model.pb")
        raise OSError("No space left on device")

    def fail_to_rename(self, target):
        if target == path and not self.name.endswith(".old"):
            raise OSError("Permission denied")
        return rename(self, target)

    if where == "saving":
        monkeypatch.setattr(tf.saved_model, "save", fail_to_save)
    else:
        monkeypatch.setattr(pathlib.Path, "rename", fail_to_rename)
    with pytest.raises(StorageError, match="No space|Permission"):
        sos.export_model(dense(8), path)
    assert files(tmp_path) == before
    assert list(tmp_path.iterdir()) == ([path] if there else [])


def test_export_killed_or_on_a_full_disk_leaves_what_was_there(tmp_path):
    path = tmp_path / "model"
    sos.export_model(dense(4), path)
    before = files(path)
    program = (
        "import os, resource\n"
        "import sos, keras, tensorflow as tf\n"
        "from sos.errors import StorageError\n"
        "layers = [keras.Input((6,)), keras.layers.Dense(100_000)]\n"
        "model = keras.Sequential(layers)\n"
        "limits = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))\n"
        "try:\n"
        "    sos.export_model(model, 'model')\n"
        "except StorageError as error:\n"
        "    print(error)\n"
        "print(os.listdir(), flush=True)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, limits)\n"
        "save = tf.saved_model.save\n"
        "def killed(*args, **kwargs):\n"
        "    save(*args, **kwargs)\n"
        "    os.kill(os.getpid(), 9)\n"
        "tf.saved_model.save = killed\n"
        "sos.export_model(model, 'model')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == -9
    error, left = done.stdout.splitlines()
    assert error.startswith("The model could not be exported to model: ")
    assert "File too large" in error
    assert "Free disk space or choose another directory" in error
    assert left == "['model']"
    assert files(path) == before
    check_equal(dense(4), tf.saved_model.load(path))


def test_export_to_another_file_system_writes_a_copy():
    path = "ram://export/model"
    for model in (dense(4), sparse(8)):
        sos.export_model(model, path)
        check_equal(model, tf.saved_model.load(path))
    with tf.io.gfile.GFile("ram://export/file", "w") as file:
        file.write("precious")
    with pytest.raises(StorageError):
        sos.export_model(dense(), "ram://export/file")
