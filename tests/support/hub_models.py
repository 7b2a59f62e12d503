"""KerasHub models of tiny, random configurations: no presets, no network."""

import keras
import keras_hub
import numpy as np

VOCABULARY = 24
LENGTH = 8
HIDDEN = 8
HEADS = 2
IMAGE = (16, 16, 3)

_TRANSFORMER = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 1,
    "num_heads": HEADS,
    "hidden_dim": HIDDEN,
    "intermediate_dim": 12,
    "dropout": 0.0,
}
_GROUPED = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 1,
    "num_query_heads": HEADS,
    "num_key_value_heads": 1,
    "hidden_dim": HIDDEN,
    "intermediate_dim": 12,
}


def tokens(batch=4, length=LENGTH, seed=0):
    """Token ids and a mask without padding, as most text models take them."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(1, VOCABULARY, (batch, length)).astype("int32")
    return {"token_ids": ids, "padding_mask": np.ones_like(ids)}


def segments(**kwargs):
    """`tokens` for models that tell segments apart."""
    inputs = tokens(**kwargs)
    return {**inputs, "segment_ids": inputs["token_ids"] % 2}


def masked_tokens(**kwargs):
    """`segments`, and the positions of which a masked model is asked."""
    inputs = segments(**kwargs)
    positions = np.tile(np.int32([1, 3]), (len(inputs["token_ids"]), 1))
    return {**inputs, "mask_positions": positions}


def pair_of_tokens(**kwargs):
    """Source and target of a sequence-to-sequence model."""
    source, target = tokens(**kwargs), tokens(**{**kwargs, "seed": 1})
    return {f"encoder_{name}": value for name, value in source.items()} | {
        f"decoder_{name}": value for name, value in target.items()
    }


def images(batch=4, shape=IMAGE, seed=0):
    """Images of normal noise."""
    generator = np.random.default_rng(seed)
    return generator.normal(size=(batch, *shape)).astype("float32")


def sound_and_tokens(**kwargs):
    """A spectrogram and a target of a Whisper model."""
    target = tokens(**kwargs)
    batch = len(target["token_ids"])
    return {
        "encoder_features": images(batch, (LENGTH, 6)),
        "decoder_token_ids": target["token_ids"],
        "decoder_padding_mask": target["padding_mask"],
    }


def images_and_tokens(**kwargs):
    """Images with captions."""
    inputs = tokens(**kwargs)
    ids = inputs["token_ids"]
    return {"images": images(len(ids)), "token_ids": ids}


def backbone(name, **overrides):
    """A backbone by the name of its class, without `Backbone`."""
    config, _ = _BACKBONES[name]
    config = config() if callable(config) else config
    cls = getattr(keras_hub.models, f"{name}Backbone")
    return cls(**{**config, **overrides})


def causal_lm(name, **overrides):
    """A generating model by the name of its class, without `CausalLM`."""
    cls = getattr(keras_hub.models, f"{name}CausalLM")
    return cls(backbone=backbone(name, **overrides), preprocessor=None)


def classifier(name, kind, **overrides):
    """A classifier, of the kind `TextClassifier` or `ImageClassifier`."""
    cls = getattr(keras_hub.models, f"{name}{kind}")
    model = backbone(name, **overrides)
    kwargs = {"dropout": 0.0} if kind == "TextClassifier" else {}
    return cls(backbone=model, num_classes=3, preprocessor=None, **kwargs)


def masked_lm(name, **overrides):
    """A masked language model: its head uses the table of the tokens."""
    cls = getattr(keras_hub.models, f"{name}MaskedLM")
    return cls(backbone=backbone(name, **overrides), preprocessor=None)


def build(name):
    """A model of `NAMES`."""
    for kind in ("TextClassifier", "ImageClassifier"):
        if name.endswith(kind):
            return classifier(name.removesuffix(kind), kind)
    if name.endswith("CausalLM"):
        return causal_lm(name.removesuffix("CausalLM"))
    if name.endswith("MaskedLM"):
        return masked_lm(name.removesuffix("MaskedLM"))
    if name.endswith("Seq2SeqLM"):
        cls = getattr(keras_hub.models, name)
        model = backbone(name.removesuffix("Seq2SeqLM"))
        return cls(backbone=model, preprocessor=None)
    return backbone(name.removesuffix("Backbone"))


def inputs(name, **kwargs):
    """Inputs of a model of `NAMES`."""
    if name.endswith("MaskedLM"):
        return masked_tokens(**kwargs)
    for base, (_, make) in sorted(_BACKBONES.items(), reverse=True):
        if name.startswith(base):
            return make(**kwargs)
    raise ValueError(f"There is no model {name!r}. There are: {NAMES}")


def _clip():
    text = {k: v for k, v in _TRANSFORMER.items() if k != "dropout"}
    return {
        "vision_encoder": keras_hub.models.CLIPVisionEncoder(
            patch_size=8,
            hidden_dim=HIDDEN,
            num_layers=1,
            num_heads=HEADS,
            intermediate_dim=12,
            image_shape=IMAGE,
        ),
        "text_encoder": keras_hub.models.CLIPTextEncoder(
            embedding_dim=HIDDEN, max_sequence_length=LENGTH, **text
        ),
        "projection_dim": 4,
    }


_SHORT = {"max_sequence_length": LENGTH}

# Arguments of the class, and what makes its inputs.
_BACKBONES = {
    "Albert": ({**_TRANSFORMER, **_SHORT, "embedding_dim": 6}, segments),
    "Bart": ({**_TRANSFORMER, **_SHORT}, pair_of_tokens),
    "Bert": ({**_TRANSFORMER, **_SHORT}, segments),
    "Bloom": (_TRANSFORMER, tokens),
    "CLIP": (_clip, images_and_tokens),
    "DebertaV3": ({**_TRANSFORMER, **_SHORT, "bucket_size": 4}, tokens),
    "DenseNet": (
        {
            "stackwise_num_repeats": [1, 1],
            "growth_rate": 4,
            "image_shape": IMAGE,
        },
        images,
    ),
    "DistilBert": ({**_TRANSFORMER, **_SHORT}, tokens),
    "FNet": (
        {
            **{k: v for k, v in _TRANSFORMER.items() if k != "num_heads"},
            **_SHORT,
        },
        segments,
    ),
    "Falcon": (
        {
            **{
                k: v
                for k, v in _TRANSFORMER.items()
                if k not in ("num_heads", "dropout")
            },
            "num_attention_heads": HEADS,
        },
        tokens,
    ),
    "GPT2": ({**_TRANSFORMER, **_SHORT}, tokens),
    "GPTNeoX": (
        {**_TRANSFORMER, **_SHORT, "rotary_percentage": 0.5},
        tokens,
    ),
    "Gemma": ({**_GROUPED, "head_dim": 4}, tokens),
    "Gemma3": ({**_GROUPED, "head_dim": 4, "image_size": 16}, tokens),
    "Llama": (_GROUPED, tokens),
    "MiT": (
        {
            "layerwise_depths": [1, 1],
            "num_layers": 2,
            "layerwise_num_heads": [1, 2],
            "layerwise_sr_ratios": [2, 1],
            "max_drop_path_rate": 0.0,
            "layerwise_patch_sizes": [7, 3],
            "layerwise_strides": [4, 2],
            "hidden_dims": [4, 8],
            "image_shape": IMAGE,
        },
        images,
    ),
    "Mistral": (_GROUPED, tokens),
    "Mixtral": ({**_GROUPED, "num_experts": 2}, tokens),
    "OPT": ({**_TRANSFORMER, **_SHORT}, tokens),
    "Phi3": (_GROUPED, tokens),
    "Qwen": (_GROUPED, tokens),
    "ResNet": (
        {
            "input_conv_filters": [64],
            "input_conv_kernel_sizes": [3],
            "stackwise_num_filters": [64],
            "stackwise_num_blocks": [1],
            "stackwise_num_strides": [1],
            "block_type": "basic_block",
            "image_shape": IMAGE,
        },
        images,
    ),
    "Roberta": ({**_TRANSFORMER, **_SHORT}, tokens),
    "SwinTransformer": (
        {
            "image_shape": IMAGE,
            "embed_dim": 4,
            "depths": (1, 1),
            "num_heads": (1, 2),
            "window_size": 2,
            "patch_size": 2,
            "drop_path": 0.0,
        },
        images,
    ),
    "T5": (_TRANSFORMER, pair_of_tokens),
    "ViT": (
        {
            "image_shape": IMAGE,
            "patch_size": 8,
            "num_layers": 1,
            "num_heads": HEADS,
            "hidden_dim": HIDDEN,
            "mlp_dim": 12,
        },
        images,
    ),
    "Whisper": (
        {
            **_TRANSFORMER,
            "num_mels": 6,
            "max_encoder_sequence_length": LENGTH,
            "max_decoder_sequence_length": LENGTH,
        },
        sound_and_tokens,
    ),
    "Xception": (
        {
            "stackwise_conv_filters": [[4, 8], [8, 8]],
            "stackwise_pooling": [True, False],
            "image_shape": IMAGE,
        },
        images,
    ),
}

#: What `build` makes.
NAMES = (
    "BloomCausalLM",
    "FalconCausalLM",
    "GPT2CausalLM",
    "GPTNeoXCausalLM",
    "GemmaCausalLM",
    "Gemma3CausalLM",
    "LlamaCausalLM",
    "MistralCausalLM",
    "MixtralCausalLM",
    "OPTCausalLM",
    "Phi3CausalLM",
    "QwenCausalLM",
    "AlbertMaskedLM",
    "BertMaskedLM",
    "BertTextClassifier",
    "DebertaV3TextClassifier",
    "DistilBertTextClassifier",
    "FNetTextClassifier",
    "RobertaTextClassifier",
    "BartSeq2SeqLM",
    "T5Backbone",
    "WhisperBackbone",
    "CLIPBackbone",
    "DenseNetImageClassifier",
    "MiTImageClassifier",
    "ResNetImageClassifier",
    "SwinTransformerImageClassifier",
    "ViTImageClassifier",
    "XceptionImageClassifier",
)


def compile_and_data(model, x, run_eagerly=False):
    """Compiles a model of `build` and returns targets for `fit`.

    Classifiers and language models are to find class 0 everywhere, backbones to
    give zeros.
    """
    outputs = model(x, training=False)
    if isinstance(model, keras_hub.models.Task):
        model.compile(
            optimizer=keras.optimizers.SGD(0.1),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            weighted_metrics=None,
            run_eagerly=run_eagerly,
        )
        return np.zeros(outputs.shape[:-1], "int32")
    model.compile(keras.optimizers.SGD(0.01), "mse", run_eagerly=run_eagerly)
    return keras.tree.map_structure(np.zeros_like, outputs)


def prompt(batch=4, given=3, length=LENGTH, seed=0):
    """Sequences of which `generate` is to complete all but the beginning."""
    inputs = tokens(batch, length, seed)
    inputs["padding_mask"][:, given:] = 0
    inputs["token_ids"][:, given:] = 0
    return inputs


def generate(model, inputs):
    """The token ids that a model's own `generate` completes."""
    copies = {name: value.copy() for name, value in inputs.items()}
    return np.asarray(model.generate(copies, stop_token_ids=None)["token_ids"])


def complete(model, inputs):
    """Token ids of the largest logits, each by a whole call of the model.

    What a greedy `generate` has to find, without its cache and its loop.
    """
    ids = inputs["token_ids"].copy()
    given = int(inputs["padding_mask"][0].sum())
    everything = np.ones_like(inputs["padding_mask"])
    for place in range(given, ids.shape[1]):
        logits = model(
            {"token_ids": ids, "padding_mask": everything}, training=False
        )
        logits = keras.ops.convert_to_numpy(logits)
        ids[:, place] = logits[:, place - 1].argmax(-1)
    return ids
