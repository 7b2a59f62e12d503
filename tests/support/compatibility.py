"""Writes docs/compatibility.md: which layers and models work, and how.

    python -m tests.support.compatibility [--write] [--only=REGEX]

Makes each layer of Keras that has weights, and KerasHub models of tiny
configurations, sparse with a technique of each family, trains them for a step,
and compares evaluation with the stripped model and with the loaded file, bit
for bit. Takes about ten minutes on two cores.
"""

import argparse
import collections
import os
import pathlib
import re
import sys
import tempfile
import traceback
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

from sos import startup

with startup.quiet():
    import keras
    import keras_hub
    import numpy as np
    import tensorflow as tf

    import sos
    from sos.errors import ReportedError
    from sos.wrappers.base import find_wrappers
    from tests.support import hub_models, layers, techniques

    tf.config.list_physical_devices()

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs/compatibility.md"

# One technique of each family: what the others of it do is the same code.
FAMILIES = (
    sos.MagnitudePruning,
    sos.VariationalDropout,
    sos.L0Regularization,
)

# The state of a weight that makes it certain, and one that makes it random.
NOISE = {
    sos.VariationalDropout: ("log_sigma2", -100.0, -2.0),
    sos.L0Regularization: ("log_alpha", 50.0, 0.0),
}

# Cases that show nothing which another case does not.
REPETITIONS = {
    "BatchNormalization masked",
    "Dense rank 3",
    "Embedding mask_zero",
    "LSTM masked last",
    "LSTM initial_state",
    "MultiHeadAttention by name",
    "MultiHeadAttention masks",
    "PReLU row",
    "SpectralNormalization Conv2D",
    "TimeDistributed Conv2D",
}

# What cases are called on the page, where their own names do not do.
NAMES = {
    "LSTM masked": "LSTM",
    "ReversibleEmbedding": "ReversibleEmbedding, tied",
    "ReversibleEmbedding untied": "ReversibleEmbedding, untied",
    "TimeDistributed Dense": "TimeDistributed",
    "own layer": "a layer of your own with weights and layers",
    "default build": "a layer of your own without `build`",
    "direct read": "a layer of your own that reads another's kernel",
    "subclassed model": "a subclassed model",
    "Sequential": "a Sequential model in a functional one",
}

TEXT = """\
# What works with which layer and which model

`python -m tests.support.compatibility --write` writes this page. It makes every
layer of Keras that has weights, and KerasHub models of tiny configurations,
sparse with `sos.sparsify`, and trains each for one step in `fit` with
`sos.SparsityCallback`. The columns:

- **Masks**, **VD**, **L0**: `MagnitudePruning` (for `RandomPruning` and
  `FixedMask` too), `VariationalDropout` and `L0Regularization`. A technique
  works if the model keeps its class, the loss is finite, every weight that is
  made sparse can have zeros, and the outputs in evaluation are equal, bit for
  bit, to those of the model from `sos.strip` and of the model loaded from a
  `.keras` file.
- **Multiply-adds**: whether `sos.sparsity_report` knows how many each weight
  takes part in, for inputs of known sizes.

The entries:

- *yes*: it works.
- *each*: it works, and in training every example, and every position of it,
  gets a noise sample of its own.
- *step*: it works, and in training all examples of a step share one sample of
  the weight. L0 does so as its authors do, except for rows that are looked up.
  For VD, `sos.extend.register_use` turns *step* into *each* in a layer of your
  own.
- *refused*: the call in parentheses raises an error that says what to do
  instead.
- After a semicolon: the weights for which it differs.

Keras {keras}, KerasHub {keras_hub}.

## Layers of Keras

{layers}

These layers have only weights that stay dense by default. They work beside
sparse ones.

{dense}

Layers without weights need nothing. Not tried: {left_out}.

## Models of KerasHub

{models}

Tasks keep their methods (`generate`, also with its cache), their tokenizers and
their files. Text models take inputs of any length:
`sos.sparsity_report(model, inputs)` counts multiply-adds for given ones.
Presets hold plain models: use `sos.strip` before `save_to_preset`.
"""


class Failure(Exception):
    """What did not work."""


class Refused(Failure):
    """Where an error of `sos` was raised, with its advice."""


def checked_step(action):
    """Names an action in the `Failure` that an error in it becomes."""

    def run(*args, **kwargs):
        try:
            return action(*args, **kwargs)
        except Failure:
            raise
        except Exception as error:
            traceback.print_exc()
            name = type(error).__name__
            if isinstance(error, ReportedError):
                raise Refused(action.__name__) from error
            raise Failure(f"{action.__name__}: {name}") from error

    return run


def evaluate(model, x):
    """Outputs in evaluation, as arrays."""
    return [
        keras.ops.convert_to_numpy(y)
        for y in keras.tree.flatten(model(x, training=False))
    ]


@checked_step
def sparsify(model, technique):
    """The model, sparse; of its class."""
    sparse = sos.sparsify(model, technique, **techniques.arguments(technique))
    if not isinstance(sparse, type(model)):
        raise Failure(f"becomes a {type(sparse).__name__}")
    return sparse


@checked_step
def fit(model, x, y):
    """Trains one step."""
    history = model.fit(x, y, verbose=0, callbacks=[sos.SparsityCallback()])
    if not np.isfinite(history.history["loss"]).all():
        raise Failure("fit: the loss is not finite")


@checked_step
def strip(model, expected, x):
    """Compares with the stripped model."""
    if not all(map(np.array_equal, evaluate(sos.strip(model), x), expected)):
        raise Failure("strip: other outputs")


@checked_step
def load(model, expected, x):
    """Compares with the model from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.keras"
        model.save(path)
        loaded = keras.models.load_model(path)
    if type(loaded) is not type(model):
        raise Failure(f"load: becomes a {type(loaded).__name__}")
    if not all(map(np.array_equal, evaluate(loaded, x), expected)):
        raise Failure("load: other outputs")


def life(make, x, compile_model, technique):
    """Runs a model from `sparsify` to `strip` and a file.

    Args:
        make: Makes the plain model.
        x: Inputs.
        compile_model: Compiles a model and returns targets for `fit`.
        technique: The technique.

    Raises:
        Failure: If something does not work.
    """
    keras.utils.set_random_seed(0)
    sparse = sparsify(make(), technique)
    fit(sparse, x, compile_model(sparse))
    techniques.make_zeros(sparse)
    for wrapper in find_wrappers(sparse):
        for weight, value in wrapper.evaluation_weights().items():
            # A tensor of few weights may have none by chance.
            if np.size(value) > 16 and np.all(value):
                raise Failure(f"no zeros in {weight.path}")
    expected = evaluate(sparse, x)
    strip(sparse, expected, x)
    load(sparse, expected, x)


def without_dropout(model):
    """Turns random layers off, so that all noise is that of weights."""
    for layer in model._flatten_layers():
        for name in ("rate", "dropout", "recurrent_dropout", "_dropout"):
            if isinstance(vars(layer).get(name), float):
                setattr(layer, name, 0.0)
    return model


@checked_step
def sample(make, x, technique):
    """Finds how the weights are sampled in training.

    Weights are made random one after the other, the others certain. Each
    example is there twice, so that its outputs differ only if the two do not
    share a sample.

    Args:
        make: Makes the plain model.
        x: Inputs, of which the first two examples are used.
        technique: A technique of `NOISE`.

    Returns:
        The paths of the weights with a sample for each example, and of those
        with one for each step. Weights that change nothing are in neither.
    """
    keras.utils.set_random_seed(0)
    arguments = {"clip_log_alpha": None}
    if technique is not sos.VariationalDropout:
        arguments = {}
    # In place, as dropout is in the configurations of which copies are made.
    sparse = sos.sparsify(
        without_dropout(make()),
        technique,
        copy=False,
        penalty_weight=1e-3,
        **arguments,
    )
    name, certain, random = NOISE[technique]
    weights = [w for x in find_wrappers(sparse) for w in x.sparse_weights]
    x = keras.tree.map_structure(lambda v: np.repeat(v[:2], 2, 0), x)
    function = tf.function(lambda: sparse(x, training=True))

    def outputs():
        return [
            np.float64(keras.ops.convert_to_numpy(y))
            for y in keras.tree.flatten(function())
        ]

    def spread(values):
        return max(np.abs(y[::2] - y[1::2]).max(initial=0) for y in values)

    generator = np.random.default_rng(0)
    for weight in weights:
        state = weight.state[name]
        state.assign(np.full(state.shape, certain))
        # Initial values may be so small that nothing comes through.
        weight.variable.assign(generator.normal(0, 0.5, state.shape))
    each, step = [], []
    with sos.SparsityUpdater(sparse, keras.optimizers.SGD()):
        quiet = outputs()
        for weight in weights:
            state = weight.state[name]
            state.assign(np.full(state.shape, random))
            found = outputs()
            state.assign(np.full(state.shape, certain))
            change = max(
                np.abs(a - b).max(initial=0)
                for a, b in zip(found, quiet, strict=True)
            )
            if change <= 20 * spread(quiet) + 1e-6:
                continue
            shared = spread(found) < 0.1 * change
            (step if shared else each).append(weight.path)
    return each, step


def short(paths):
    """Some paths by their ends, as far as they differ."""
    parts = [re.sub(r"#\d+$", "", path).split("/") for path in paths]
    # Keras numbers what it makes, with all that was made before.
    numbers = {}
    for part in parts:
        for place, name in enumerate(part):
            base = re.sub(r"_\d+$", "", name)
            key = ("/".join(part[:place]), base)
            others = numbers.setdefault(key, [])
            if name not in others:
                others.append(name)
            number = others.index(name)
            part[place] = f"{base}_{number}" if number else base
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names) and "embeddings" not in names:
            break
    return ", ".join(
        f"`{name}`" + (f" ({count})" if count > 1 else "")
        for name, count in collections.Counter(names).items()
    )


def family_cell(make, x, compile_model, technique, of=None):
    """The cell of a technique in a table.

    Args:
        make: Makes the plain model.
        x: Inputs.
        compile_model: Compiles a model and returns targets for `fit`.
        technique: The technique.
        of: If given, a pattern of the paths that the cell is about.
    """
    try:
        life(make, x, compile_model, technique)
        if technique not in NOISE:
            return "yes"
        each, step = (
            [path for path in paths if re.search(of or "", path)]
            for paths in sample(make, x, technique)
        )
    except Refused as refused:
        return f"refused ({refused})"
    except Failure as failure:
        return f"no ({failure})"
    if not step:
        return "each" if each else "nothing to sample"
    if not each:
        return "step"
    # Whatever is the exception is named.
    rare, word = (step, "step") if len(step) <= len(each) else (each, "each")
    other = {"step": "each", "each": "step"}[word]
    named = short(rare) if len(rare) <= 3 else f"{len(rare)} weights"
    return f"{other}; {named}: {word}"


def multiply_adds_cell(rows):
    """Whether multiply-adds are known."""
    unknown = [row for row in rows if row["multiply_adds"] is None]
    if not unknown:
        return "known"
    if len(unknown) == len(rows):
        return "not known"
    if len(unknown) > 3:
        return f"known for {len(rows) - len(unknown)} of {len(rows)} weights"
    return f"known except {short([row['weight'] for row in unknown])}"


# Layers of Keras.


def layer_model(case):
    """A layer beside a dense one, which can be made sparse in any case."""
    inputs = layers.inputs_for(case.arrays())
    layer = case.make()
    # Not "subject/subject", which a wrapper's paths would be.
    layer.name = "subject"
    outputs = keras.tree.flatten(case.call(layer, *inputs))
    other = keras.Input((3,))
    beside = keras.layers.Dense(2, name="beside")(other)
    return keras.Model([*inputs, other], [*outputs, beside], name="model")


def layer_data(case):
    """Inputs of `layer_model`."""
    other = np.ones((layers.BATCH, 3), "float32")
    return [*case.arrays(), other]


def compile_for(x):
    """A function that compiles a model for `fit` on inputs."""

    def compile_model(model):
        outputs = model(x, training=False)
        model.compile(
            keras.optimizers.SGD(0.01), ["mse"] * len(outputs), run_eagerly=True
        )
        return [np.ones_like(y) for y in outputs]

    return compile_model


def layer_row(name):
    """The row of a layer with matrices."""
    case = layers.CASES[name]
    x = layer_data(case)

    def make():
        return layer_model(case)

    cells = [
        family_cell(make, x, compile_for(x), technique, of="subject")
        for technique in FAMILIES
    ]
    rows = [
        row
        for row in sos.sparsity_report(sos.sparsify(make(), "FixedMask")).rows
        if row["technique"] and not row["weight"].startswith("beside")
    ]
    return row(NAMES.get(name, name), *cells, multiply_adds_cell(rows))


def dense_row(name):
    """The row of a layer whose weights stay dense by default."""
    case = layers.VECTORS[name]
    x = layer_data(case)

    def make():
        return layer_model(case)

    cells = [
        family_cell(make, x, compile_for(x), technique, of="subject")
        for technique in FAMILIES
    ]
    # Beside the sparse layer, whose samples say nothing here.
    cells = [cell if cell.startswith("no (") else "yes" for cell in cells]
    report = sos.sparsity_report(sos.sparsify(make(), "FixedMask"))
    reasons = [
        f"`{row['weight'].rpartition('/')[2]}`: {row['reason']}"
        for row in report.rows
        if not row["weight"].startswith("beside")
    ]
    return row(NAMES.get(name, name), *cells, "; ".join(reasons))


# Models of KerasHub.


def model_row(name):
    """The row of a KerasHub model."""
    x = hub_models.inputs(name)

    def make():
        return hub_models.build(name)

    def compile_model(model):
        return hub_models.compile_and_data(model, x, run_eagerly=True)

    cells = [
        family_cell(make, x, compile_model, technique) for technique in FAMILIES
    ]
    try:
        sparse = sparsify(make(), sos.FixedMask)
        report = sos.sparsity_report(sparse, x)
        rows = [row for row in report.rows if row["technique"]]
        cells.append(multiply_adds_cell(rows))
    except Failure as failure:
        cells.append(f"no ({failure})")
    return row(name, *cells)


# The page.


def row(*cells):
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def table(*headings):
    """The first two lines of a table."""
    return [row(*headings), row(*["---"] * len(headings))]


#: What makes the rows of each table, and for which names.
TABLES = {
    "layers": (
        layer_row,
        [name for name in layers.CASES if name not in REPETITIONS],
        table("Layer", "Masks", "VD", "L0", "Multiply-adds"),
    ),
    "dense": (
        dense_row,
        [name for name in layers.VECTORS if name not in REPETITIONS],
        table("Layer", "Masks", "VD", "L0", "Why its weights stay dense"),
    ),
    "models": (
        model_row,
        hub_models.NAMES,
        table("Model", "Masks", "VD", "L0", "Multiply-adds"),
    ),
}


def rows(pattern=""):
    """Yields `(table, row)` for all names in which a pattern is found."""
    for key, (make_row, names, _) in TABLES.items():
        for name in names:
            if re.search(pattern, name):
                keras.backend.clear_session()
                yield key, make_row(name)


def page(found):
    """The text of the page.

    Args:
        found: What `rows` yields.
    """
    lines = collections.defaultdict(list)
    for key, line in found:
        lines[key].append(line)
    tables = {
        key: "\n".join([*head, *lines[key]])
        for key, (_, _, head) in TABLES.items()
    }
    left_out = ", ".join(
        f"{name} ({reason})"
        for name, reason in layers.LEFT_OUT.items()
        if reason != "a base class" and name != "InputLayer"
    )
    return TEXT.format(
        **tables,
        left_out=left_out,
        keras=_minor(keras.__version__),
        keras_hub=_minor(keras_hub.__version__),
    )


def _minor(version):
    return ".".join(version.split(".")[:2])


def _shown(found):
    """Prints rows while they are found."""
    for key, line in found:
        print(line, flush=True)
        yield key, line


def main():
    """Runs everything and prints the rows; exits with 1 if the page differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the page")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="run and print some rows"
    )
    options = parser.parse_args()
    if options.write and options.only:
        parser.error("--write needs all rows: leave out --only")
    warnings.simplefilter("ignore")
    found = _shown(rows(options.only))
    if options.only:
        collections.deque(found, maxlen=0)
        return
    text = page(found)
    if options.write:
        PAGE.write_text(text, "utf-8")
    elif text != PAGE.read_text("utf-8"):
        sys.exit(
            f"{PAGE.name} is out of date. `python -m "
            "tests.support.compatibility --write` updates it."
        )


if __name__ == "__main__":
    main()
