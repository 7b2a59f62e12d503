"""KerasHub models made sparse keep their class, methods, files and tokens.

The oracles are the plain models: `hub_models.complete` finds the tokens that
`generate` has to find without its cache, and `sos.strip` gives models of
KerasHub's own classes, which are loaded where `sos` cannot be imported.
"""

import json
import pathlib
import subprocess
import sys
import types

import keras
import keras_hub
import numpy as np
import pytest

import sos
from sos.wrappers.base import find_wrappers
from tests.support import hub_models, techniques

ROOT = pathlib.Path(__file__).resolve().parents[1]

LOAD = """
import json, sys
sys.modules["sos"] = None  # importing it fails
import keras, keras_hub
from tests.support import hub_models
model = keras.models.load_model(sys.argv[1])
assert type(model) is keras_hub.models.GPT2CausalLM, type(model)
model.compile(sampler="greedy", jit_compile=False)
print(json.dumps(hub_models.generate(model, hub_models.prompt()).tolist()))
"""


def slow_except(fast, values, name=lambda value: value.__name__):
    return [
        pytest.param(
            value,
            marks=[pytest.mark.slow] * (value not in fast),
            id=name(value),
        )
        for value in values
    ]


def sparsify(model, technique=sos.FixedMask, **kwargs):
    return sos.sparsify(
        model, technique, **techniques.arguments(technique), **kwargs
    )


def outputs(model, inputs):
    return [
        keras.ops.convert_to_numpy(y)
        for y in keras.tree.flatten(model(inputs, training=False))
    ]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def enlarge(model, scale=10.0):
    """Makes logits differ more than rounding does, and tokens with them."""
    for variable in model.trainable_variables:
        if len(variable.shape) > 1:
            variable.assign(variable * scale)


def greedy(model):
    model.compile(sampler="greedy", jit_compile=False)
    return model


# A causal language model from `sparsify` to `strip`.


# With masks and with noise; docs/compatibility.md has gates, too.
@pytest.fixture(
    scope="module",
    params=slow_except(
        [sos.MagnitudePruning], [sos.MagnitudePruning, sos.VariationalDropout]
    ),
)
def gpt2(request):
    """A language model, and a sparse one made of it that was trained."""
    keras.utils.set_random_seed(0)
    plain = hub_models.build("GPT2CausalLM")
    enlarge(plain)
    inputs = hub_models.tokens()
    before = outputs(plain, inputs)
    sparse = sparsify(plain, request.param)
    started = outputs(sparse, inputs)
    targets = hub_models.compile_and_data(sparse, inputs)
    history = sparse.fit(
        inputs,
        targets,
        epochs=2,
        verbose=0,
        callbacks=[sos.SparsityCallback()],
    )
    trained = [v.numpy() for v in sparse.trainable_variables]
    sparsity = sos.sparsity_report(sparse).sparsity
    techniques.make_zeros(sparse)
    return types.SimpleNamespace(
        technique=request.param,
        inputs=inputs,
        plain=plain,
        before=before,
        sparse=greedy(sparse),
        started=started,
        history=history.history,
        trained=trained,
        sparsity=sparsity,
    )


def test_causal_lm_sparse_keeps_class_and_methods(gpt2):
    sparse, models = gpt2.sparse, keras_hub.models
    assert isinstance(sparse, models.GPT2CausalLM)
    assert isinstance(sparse.backbone, models.GPT2Backbone)
    embedding = sparse.backbone.token_embedding
    assert isinstance(embedding, keras.layers.ReversibleEmbedding)
    assert embedding.sparse_weights
    for layer in sparse.backbone.transformer_layers:
        assert isinstance(layer, keras_hub.layers.TransformerDecoder)
    # The model that was given is as it was.
    assert type(gpt2.plain) is models.GPT2CausalLM
    assert not find_wrappers(gpt2.plain)
    assert_same(outputs(gpt2.plain, gpt2.inputs), gpt2.before)


def test_causal_lm_sparse_starts_where_the_plain_one_was(gpt2):
    if not issubclass(gpt2.technique, sos.extend.PruningWrapper):
        pytest.skip("zeros or gates below one from the beginning")
    assert_same(gpt2.started, gpt2.before)


def test_causal_lm_sparse_is_trained_by_fit(gpt2):
    assert np.isfinite(gpt2.history["loss"]).all()
    assert gpt2.history["loss"][1] < gpt2.history["loss"][0]
    moved = 0
    for variable in gpt2.plain.trainable_variables:
        value = variable.numpy()
        others = [v for v in gpt2.trained if v.shape == value.shape]
        assert others
        moved += not any(np.array_equal(v, value) for v in others)
    assert moved == len(gpt2.plain.trainable_variables)
    if issubclass(gpt2.technique, sos.extend.PruningWrapper):
        assert gpt2.sparsity == pytest.approx(0.5, abs=0.01)


def test_causal_lm_report_counts_the_weights_of_the_plain_model(gpt2):
    report = sos.sparsity_report(gpt2.sparse)
    assert report.totals["size"] == gpt2.plain.count_params()
    assert len(report.rows) == len(gpt2.plain.weights)
    matrices = sum(len(v.shape) > 1 for v in gpt2.plain.weights)
    dense = [row for row in report.rows if not row["technique"]]
    # Attention has biases of rank 2, which stay dense.
    assert {row["reason"] for row in dense if row["rank"] > 1} == {"bias"}
    assert len(report.rows) - len(dense) == matrices - 3
    assert 0.1 < report.sparsity < 1


def test_causal_lm_report_counts_multiply_adds_of_given_inputs(gpt2):
    report = sos.sparsity_report(gpt2.sparse, gpt2.inputs)
    rows = [row for row in report.rows if row["technique"]]
    for row in rows:
        known = hub_models.LENGTH * row["size"]
        if row["weight"].startswith("position_embedding"):
            known = None
        # The table of the tokens counts for its product alone.
        assert row["multiply_adds"] == known, row["weight"]
    # Without a length there is nothing to count.
    report = sos.sparsity_report(gpt2.sparse)
    assert all(row["multiply_adds"] is None for row in report.rows)


def test_causal_lm_generates_the_tokens_of_the_plain_loop(gpt2):
    prompt = hub_models.prompt()
    found = hub_models.generate(gpt2.sparse, prompt)
    np.testing.assert_array_equal(
        found, hub_models.complete(gpt2.sparse, prompt)
    )
    assert (found[:, 3:] != 0).any()
    # Zeros change what is said, so that equal tokens tell something.
    dense = hub_models.generate(greedy(gpt2.plain), prompt)
    assert (found != dense).any()


def test_causal_lm_loaded_has_class_tokens_and_zeros(gpt2, tmp_path):
    prompt = hub_models.prompt()
    gpt2.sparse.save(tmp_path / "sparse.keras")
    loaded = keras.models.load_model(tmp_path / "sparse.keras")
    assert isinstance(loaded, keras_hub.models.GPT2CausalLM)
    assert type(loaded) is type(gpt2.sparse)
    assert_same(outputs(loaded, gpt2.inputs), outputs(gpt2.sparse, gpt2.inputs))
    np.testing.assert_array_equal(
        hub_models.generate(greedy(loaded), prompt),
        hub_models.generate(gpt2.sparse, prompt),
    )
    first, second = map(techniques.sparse_state, (gpt2.sparse, loaded))
    assert list(first) == list(second)
    assert_same(list(first.values()), list(second.values()))
    report, before = map(sos.sparsity_report, (loaded, gpt2.sparse))
    assert report.rows == before.rows


def test_causal_lm_stripped_is_plain_with_the_same_tokens(gpt2, tmp_path):
    plain = sos.strip(gpt2.sparse)
    assert type(plain) is keras_hub.models.GPT2CausalLM
    assert type(plain.backbone) is keras_hub.models.GPT2Backbone
    assert {type(layer) for layer in plain._flatten_layers()} == {
        type(layer) for layer in gpt2.plain._flatten_layers()
    }
    assert plain.count_params() == gpt2.plain.count_params()
    assert_same(outputs(plain, gpt2.inputs), outputs(gpt2.sparse, gpt2.inputs))
    prompt = hub_models.prompt()
    tokens = hub_models.generate(gpt2.sparse, prompt)
    np.testing.assert_array_equal(
        hub_models.generate(greedy(plain), prompt), tokens
    )


@pytest.mark.slow
def test_causal_lm_stripped_loads_without_sos(gpt2, tmp_path):
    if gpt2.technique is not sos.MagnitudePruning:
        pytest.skip("What is stripped is the same for all.")
    plain = sos.strip(gpt2.sparse)
    tokens = hub_models.generate(gpt2.sparse, hub_models.prompt())
    plain.save(tmp_path / "plain.keras")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "plain.keras")],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == tokens.tolist()


@pytest.mark.slow
def test_generate_compiled_by_xla_gives_the_same_tokens(gpt2):
    prompt = hub_models.prompt()
    expected = hub_models.complete(gpt2.sparse, prompt)
    gpt2.sparse.compile(sampler="greedy", jit_compile=True)
    found = hub_models.generate(gpt2.sparse, prompt)
    greedy(gpt2.sparse)
    np.testing.assert_array_equal(found, expected)


def test_generate_traced_before_sparsify_in_place_is_traced_anew():
    """KerasHub keeps the function that it compiled, with the dense calls."""
    keras.utils.set_random_seed(0)
    model = greedy(hub_models.build("GPT2CausalLM"))
    enlarge(model)
    prompt = hub_models.prompt()
    dense = hub_models.generate(model, prompt)
    sparse = sparsify(model, copy=False)
    assert sparse is model
    techniques.make_zeros(sparse)
    found = hub_models.generate(sparse, prompt)
    np.testing.assert_array_equal(found, hub_models.complete(sparse, prompt))
    assert (found != dense).any()


# Strings in, strings out.


VOCABULARY = ["<|endoftext|>", "a", "b", "c", "Ġ", "Ġa", "Ġb", "Ġc", "ab"]


def text_model():
    """GPT2 with a tokenizer, whose vocabulary is an asset of the file."""
    models = keras_hub.models
    tokenizer = models.GPT2Tokenizer(
        vocabulary={word: i for i, word in enumerate(VOCABULARY)},
        merges=["Ġ a", "Ġ b", "Ġ c", "a b"],
    )
    return models.GPT2CausalLM(
        backbone=hub_models.backbone("GPT2", vocabulary_size=len(VOCABULARY)),
        preprocessor=models.GPT2CausalLMPreprocessor(
            tokenizer, sequence_length=hub_models.LENGTH
        ),
    )


@pytest.mark.slow
def test_text_model_sparse_trains_and_generates_strings(tmp_path):
    keras.utils.set_random_seed(2)
    sparse = sparsify(text_model(), sos.MagnitudePruning)
    enlarge(sparse)
    sparse.compile(
        keras.optimizers.SGD(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        sampler="greedy",
        jit_compile=False,
    )
    sparse.fit(
        ["a b c a", "c ab b"],
        batch_size=2,
        verbose=0,
        callbacks=[sos.SparsityCallback()],
    )
    techniques.make_zeros(sparse)

    def generate(model):
        return model.generate(["a b", "c"], stop_token_ids=None)

    text = generate(sparse)
    assert all(isinstance(line, str) and len(line) > 3 for line in text)
    sparse.save(tmp_path / "sparse.keras")
    loaded = greedy(keras.models.load_model(tmp_path / "sparse.keras"))
    plain = greedy(sos.strip(sparse))
    assert generate(loaded) == text
    assert generate(plain) == text
    vocabulary = plain.preprocessor.tokenizer.get_vocabulary()
    assert sorted(vocabulary) == sorted(VOCABULARY)


@pytest.mark.slow
def test_text_classifier_sparse_predicts_strings(tmp_path):
    keras.utils.set_random_seed(0)
    models = keras_hub.models
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
    plain = models.BertTextClassifier(
        backbone=hub_models.backbone("Bert", vocabulary_size=len(words)),
        num_classes=2,
        preprocessor=models.BertTextClassifierPreprocessor(
            models.BertTokenizer(vocabulary=words),
            sequence_length=hub_models.LENGTH,
        ),
    )
    sparse = sparsify(plain, sos.MagnitudePruning)
    texts = ["good good", "bad", "good bad bad"]
    sparse.fit(
        texts,
        np.array([1, 0, 0]),
        verbose=0,
        callbacks=[sos.SparsityCallback()],
    )
    expected = sparse.predict(texts, verbose=0)
    sparse.save(tmp_path / "sparse.keras")
    loaded = keras.models.load_model(tmp_path / "sparse.keras")
    for model in (loaded, sos.strip(loaded)):
        assert isinstance(model, models.BertTextClassifier)
        np.testing.assert_array_equal(model.predict(texts, verbose=0), expected)


# Other models.


ONE_OF_A_KIND = (
    "BertTextClassifier",
    "ResNetImageClassifier",
    "ViTImageClassifier",
    "GemmaCausalLM",
    "LlamaCausalLM",
    "T5Backbone",
    "BartSeq2SeqLM",
)


def check_class_fit_file_and_strip(name, technique, tmp_path, copy=True):
    keras.utils.set_random_seed(0)
    plain = hub_models.build(name)
    inputs = hub_models.inputs(name)
    cls, size, count = type(plain), plain.count_params(), len(plain.weights)
    sparse = sparsify(plain, technique, copy=copy)
    assert isinstance(sparse, cls)
    assert (sparse is plain) != copy
    # Traces take most of the time, and those with noise have most in them.
    eager = technique is not sos.VariationalDropout
    targets = hub_models.compile_and_data(sparse, inputs, run_eagerly=eager)
    history = sparse.fit(
        inputs, targets, verbose=0, callbacks=[sos.SparsityCallback()]
    )
    assert np.isfinite(history.history["loss"]).all()
    techniques.make_zeros(sparse)
    expected = outputs(sparse, inputs)
    assert all(np.isfinite(y).all() for y in expected)
    report = sos.sparsity_report(sparse)
    assert report.totals["size"] == size
    assert len(report.rows) == count
    assert 0.1 < report.sparsity < 1

    stripped = sos.strip(sparse)
    assert type(stripped) is cls
    assert not find_wrappers(stripped)
    assert stripped.count_params() == size
    assert_same(outputs(stripped, inputs), expected)

    for model, file in ((sparse, "sparse.keras"), (stripped, "plain.keras")):
        model.save(tmp_path / file)
        loaded = keras.models.load_model(tmp_path / file)
        assert type(loaded) is type(model)
        assert_same(outputs(loaded, inputs), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "technique"),
    # Each model once, and each technique with several of them.
    [
        (
            name,
            (
                sos.MagnitudePruning,
                sos.VariationalDropout,
                sos.L0Regularization,
            )[i % 3],
        )
        for i, name in enumerate(ONE_OF_A_KIND)
    ],
)
def test_model_sparse_keeps_class_through_fit_file_and_strip(
    name, technique, tmp_path
):
    check_class_fit_file_and_strip(name, technique, tmp_path)


def test_model_whose_parts_cannot_be_copied_is_made_sparse_in_place(tmp_path):
    """KerasHub's ViTPatchingAndEmbedding has no working `from_config`."""
    check_class_fit_file_and_strip(
        "ViTImageClassifier", sos.MagnitudePruning, tmp_path, copy=False
    )


@pytest.mark.parametrize(
    "technique",
    slow_except(
        [sos.MagnitudePruning], [sos.MagnitudePruning, sos.VariationalDropout]
    ),
)
def test_masked_lm_whose_head_shares_the_table_of_tokens(technique, tmp_path):
    check_class_fit_file_and_strip("BertMaskedLM", technique, tmp_path)


# Parts and wholes.


@pytest.mark.parametrize(
    "technique",
    slow_except(
        [sos.MagnitudePruning], [sos.MagnitudePruning, sos.VariationalDropout]
    ),
)
def test_task_of_a_sparse_backbone_generates_and_is_stripped(
    technique, tmp_path
):
    keras.utils.set_random_seed(0)
    plain = hub_models.backbone("GPT2")
    enlarge(plain)
    backbone = sparsify(plain, technique)
    assert isinstance(backbone, keras_hub.models.GPT2Backbone)
    task = keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    inputs, prompt = hub_models.tokens(), hub_models.prompt()
    targets = hub_models.compile_and_data(task, inputs)
    task.fit(inputs, targets, verbose=0, callbacks=[sos.SparsityCallback()])
    techniques.make_zeros(task)
    expected = outputs(task, inputs)
    tokens = hub_models.generate(greedy(task), prompt)
    np.testing.assert_array_equal(tokens, hub_models.complete(task, prompt))
    # The loss pulled on the weights of the backbone itself.
    assert any(
        (a.numpy() != b.numpy()).any()
        for a, b in zip(plain.weights, sos.strip(backbone).weights, strict=True)
    )

    task.save(tmp_path / "task.keras")
    loaded = keras.models.load_model(tmp_path / "task.keras")
    assert find_wrappers(loaded)
    assert_same(outputs(loaded, inputs), expected)
    stripped = sos.strip(task)
    assert type(stripped) is keras_hub.models.GPT2CausalLM
    assert type(stripped.backbone) is keras_hub.models.GPT2Backbone
    assert_same(outputs(stripped, inputs), expected)
    np.testing.assert_array_equal(
        hub_models.generate(greedy(stripped), prompt), tokens
    )


@pytest.mark.slow
def test_backbone_of_a_sparse_task_is_sparse_by_itself(tmp_path):
    keras.utils.set_random_seed(0)
    task = sparsify(hub_models.build("LlamaCausalLM"))
    techniques.make_zeros(task)
    inputs = hub_models.tokens()
    expected = outputs(task.backbone, inputs)
    task.backbone.save(tmp_path / "backbone.keras")
    loaded = keras.models.load_model(tmp_path / "backbone.keras")
    assert isinstance(loaded, keras_hub.models.LlamaBackbone)
    assert find_wrappers(loaded)
    assert_same(outputs(loaded, inputs), expected)
    task.backbone.save_weights(tmp_path / "backbone.weights.h5")
    again = sparsify(hub_models.backbone("Llama"))
    again.load_weights(tmp_path / "backbone.weights.h5")
    assert_same(outputs(again, inputs), expected)


@pytest.mark.slow
def test_stripped_task_goes_through_a_preset(tmp_path):
    keras.utils.set_random_seed(0)
    sparse = sparsify(text_model())
    techniques.make_zeros(sparse)
    plain = sos.strip(sparse)
    plain.save_to_preset(str(tmp_path / "preset"))
    loaded = keras_hub.models.CausalLM.from_preset(str(tmp_path / "preset"))
    assert type(loaded) is keras_hub.models.GPT2CausalLM
    inputs = hub_models.tokens()
    inputs["token_ids"] %= len(VOCABULARY)
    assert_same(outputs(loaded, inputs), outputs(sparse, inputs))


# A pair of layers that share a table.


def tied_model():
    """A table inside of a layer, whose reverse use is a layer of the graph."""
    layer = keras_hub.layers.TokenAndPositionEmbedding(
        hub_models.VOCABULARY, hub_models.LENGTH, hub_models.HIDDEN
    )
    tokens = keras.Input((hub_models.LENGTH,), dtype="int32")
    hidden = keras.layers.Dense(hub_models.HIDDEN, "tanh")(layer(tokens))
    return keras.Model(tokens, layer.token_embedding(hidden, reverse=True))


@pytest.mark.parametrize(
    "technique",
    slow_except(
        [sos.MagnitudePruning, sos.VariationalDropout], techniques.TECHNIQUES
    ),
)
def test_pair_of_layers_that_share_a_table_is_made_sparse_once(technique):
    keras.utils.set_random_seed(0)
    plain = tied_model()
    inputs = hub_models.tokens()["token_ids"]
    sparse = sparsify(plain, technique)
    sparse.compile(
        keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        run_eagerly=True,
    )
    sparse.fit(inputs, inputs, verbose=0, callbacks=[sos.SparsityCallback()])
    techniques.make_zeros(sparse)
    paths = [
        weight.path
        for wrapper in find_wrappers(sparse)
        for weight in wrapper.sparse_weights
    ]
    # The table, the positions and the kernel.
    assert len(paths) == len(set(paths)) == 3
    report = sos.sparsity_report(sparse)
    assert report.totals["size"] == plain.count_params()

    # The look-up and the product use the same zeros.
    stripped = sos.strip(sparse)
    assert stripped.count_params() == plain.count_params()
    assert_same(outputs(stripped, inputs), outputs(sparse, inputs))
    named = {v.path.partition("/")[2]: v.numpy() for v in stripped.weights}
    table = named["token_embedding/embeddings"]
    positions = named["position_embedding/embeddings"]
    dense = next(
        layer
        for layer in stripped.layers
        if isinstance(layer, keras.layers.Dense)
    )
    assert (table == 0).mean() > 0.1
    hidden = np.tanh(
        (table[inputs] + positions) @ dense.kernel.numpy() + dense.bias.numpy()
    )
    (found,) = outputs(sparse, inputs)
    np.testing.assert_allclose(found, hidden @ table.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["LoRA", "sparsify"])
def test_gemma_with_adapters_is_copied_stripped_and_loaded(first, tmp_path):
    backbone = keras_hub.models.GemmaBackbone(24, 1, 2, 1, 8, 12, 4)
    if first == "LoRA":
        backbone.enable_lora(2)
    model = keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)
    sparse = sos.sparsify(model, "FixedMask", sparsity=0.5)
    if first == "sparsify":
        sparse.backbone.enable_lora(2)
    generator = np.random.default_rng(0)
    adapters = [v for v in sparse.trainable_variables if "lora" in v.name]
    assert adapters
    for variable in adapters:
        variable.assign(generator.normal(size=variable.shape))
    tokens = generator.integers(1, 24, (2, 5))
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    expected = sparse.predict(inputs, verbose=0)
    plain = sos.strip(sparse)
    np.testing.assert_array_equal(plain.predict(inputs, verbose=0), expected)
    sparse.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    np.testing.assert_array_equal(loaded.predict(inputs, verbose=0), expected)
