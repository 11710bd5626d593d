"""read_model against the shapes that transformers' own model classes hand to their attention."""

import copy
import dataclasses
import functools
import json
import os
from collections import Counter

import pytest

from attnimg.errors import AttnimgError
from attnimg.run_facts import LayerGroup
from attnimg.selection.attention_shapes import read_families, read_model
from attnimg.selection.model_config import read_config

os.environ["HF_HUB_OFFLINE"] = "1"

EIGHT = {"num_hidden_layers": 8}
# With their class defaults these types' own models fail: deepseek_v2 routes to None experts of a
# size that its matrix product refuses, nemotron divides by None kv heads, ministral and
# hunyuan_v1_dense take the root of a head_dim of None.
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 1408}
GROUPED = {"num_key_value_heads": 8}
SIZED = {"head_dim": 128}

# Types whose model goes through the attention interface: the probe sees what they do.
PROBED = {
    "llama": EIGHT, "mistral": EIGHT, "ministral": EIGHT | SIZED, "ministral3": EIGHT,
    "mixtral": EIGHT,
    "qwen2": EIGHT, "qwen3": EIGHT, "qwen3_moe": EIGHT, "qwen3_next": EIGHT,
    "qwen3_5_text": EIGHT, "qwen3_5_moe_text": EIGHT, "gemma": EIGHT, "gemma2": EIGHT,
    "gemma3_text": EIGHT, "gemma4_text": EIGHT, "gpt_oss": EIGHT, "granite_swa": EIGHT,
    "granitemoe_swa": EIGHT, "deepseek_v2": EIGHT | ROUTED, "deepseek_v3": EIGHT,
    "minicpm3": EIGHT, "gpt2": {"n_layer": 3}, "gpt_neox": EIGHT, "gpt_bigcode": {"n_layer": 3},
    "phi": EIGHT, "phi3": EIGHT, "phimoe": EIGHT, "cohere": EIGHT, "cohere2": EIGHT,
    "llama4_text": EIGHT, "granite": EIGHT, "granitemoe": EIGHT, "olmo": EIGHT, "olmo2": EIGHT,
    "olmo3": EIGHT, "olmoe": EIGHT, "stablelm": EIGHT, "starcoder2": EIGHT, "glm": EIGHT,
    "glm4": EIGHT, "smollm3": EIGHT, "seed_oss": EIGHT, "helium": EIGHT, "ernie4_5": EIGHT,
    "jamba": EIGHT, "opt": EIGHT, "arcee": EIGHT,
    "apertus": EIGHT, "nemotron": EIGHT | GROUPED,
    "hunyuan_v1_dense": EIGHT | SIZED, "bitnet": EIGHT,
    "glm4_moe": EIGHT,
    "glm4_moe_lite": EIGHT, "minimax_m2": EIGHT, "qwen2_moe": EIGHT, "exaone4": EIGHT,
    "ernie4_5_moe": EIGHT, "falcon_h1": EIGHT, "kimi_linear": EIGHT,
    "lfm2": EIGHT | {"full_attn_idxs": [2, 5, 7]},
    "lfm2_moe": EIGHT | {"layer_types": ["conv", "conv", "full_attention", "conv"] * 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * 2},
}  # fmt: skip

# What people's files say: fields left out, older names, windows that are switched off.
WRITTEN_BY_HAND = [
    pytest.param("mistral", EIGHT | {"sliding_window": None}, id="mistral: null is no window"),
    pytest.param("mistral", EIGHT | {"head_dim": None}, id="mistral: null head_dim"),
    pytest.param("qwen2", EIGHT | {"sliding_window": 131072}, id="qwen2: the switch is off"),
    pytest.param(
        "qwen2",
        EIGHT | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 5},
        id="qwen2: the last layers slide",
    ),
    pytest.param(
        "qwen3_moe",
        EIGHT | {"use_sliding_window": True, "sliding_window": 64},
        id="qwen3_moe: all layers slide",
    ),
    pytest.param(
        "smollm3",
        EIGHT | {"use_sliding_window": True, "sliding_window": 64},
        id="smollm3: layers without rotary embedding slide",
    ),
    pytest.param(
        "gemma3_text",
        {"hidden_size": 2560, "num_hidden_layers": 8, "sliding_window": 1024},
        id="gemma3: heads left out",
    ),
    pytest.param("gemma3_text", EIGHT | {"sliding_window_pattern": 3}, id="gemma3: own pattern"),
    pytest.param("cohere2", EIGHT | {"sliding_window_pattern": 2}, id="cohere2: own pattern"),
    pytest.param("gemma2", EIGHT | {"attn_logit_softcapping": None}, id="gemma2: cap taken off"),
    pytest.param(
        "gemma4_text",
        EIGHT | {"global_head_dim": 384, "attention_k_eq_v": True, "num_global_key_value_heads": 2},
        id="gemma4: full layers have heads of their own",
    ),
    pytest.param(
        "llama4_text", EIGHT | {"no_rope_layers": [1, 0] * 4}, id="llama4: listed rope layers"
    ),
    pytest.param("qwen3_next", EIGHT | {"full_attention_interval": 2}, id="qwen3_next: interval"),
    pytest.param(
        "jamba", EIGHT | {"attn_layer_period": 4, "attn_layer_offset": 1}, id="jamba: own period"
    ),
    pytest.param("phi3", EIGHT | {"sliding_window": 2047}, id="phi3: a window on every layer"),
    pytest.param("gpt2", {"n_layer": 2, "n_embd": 1280, "n_head": 20}, id="gpt2: names of its own"),
    pytest.param(
        "nemotron_h",
        {"num_hidden_layers": 52, "hybrid_override_pattern": "M-M*-M*-"},
        id="nemotron_h: a letter a layer, whatever num_hidden_layers says",
    ),
    pytest.param(
        "kimi_linear",
        EIGHT
        | {"linear_attn_config": {"full_attn_layers": [4, 8], "kda_layers": [1, 2, 3, 5, 6, 7]}},
        id="kimi_linear: layers numbered from one",
    ),
    pytest.param("lfm2", EIGHT | {"full_attn_idxs": [2, 7]}, id="lfm2: layers numbered from zero"),
    pytest.param("lfm2", EIGHT, id="lfm2: attention everywhere where it lists none"),
    pytest.param(
        "gpt_oss",
        EIGHT | {"layer_types": ["full_attention"] * 8},
        id="gpt_oss: listed layers win over the pattern",
    ),
]

# These do not go through the attention interface, so the probe can't see them. Their shapes come
# from their modeling files: falcon num_kv_heads, the others n_head == kv heads.
BY_HAND = [
    pytest.param("falcon", {}, (71, 1, 64), 32, id="falcon-7b has one kv head"),
    pytest.param(
        "falcon",
        {"new_decoder_architecture": True, "num_attention_heads": 128, "num_kv_heads": 8,
         "hidden_size": 8192, "num_hidden_layers": 60},
        (128, 8, 64), 60, id="falcon-40b has eight kv heads",
    ),
    pytest.param("falcon", {"multi_query": False}, (71, 71, 64), 32, id="falcon-rw has all"),
    pytest.param("gptj", {}, (16, 16, 256), 28, id="gptj"),
    pytest.param("bloom", {"n_embed": 4096, "n_head": 32}, (32, 32, 128), 2, id="bloom: n_embed"),
    pytest.param("mpt", {}, (16, 16, 128), 24, id="mpt"),
]  # fmt: skip


@functools.cache
def attention_seen(type_, raw):
    """Run the real model on the meta device: groups of (heads, kv, qk, v, window, softcap, sinks).

    Returns the groups in order of first appearance with their counts, and the number of weights.
    """
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    seen = []

    def attend(module, q, k, v, mask, **kw):
        seen.append(
            (q.shape[1], k.shape[1], q.shape[-1], v.shape[-1], kw.get("sliding_window") or None,
             kw.get("softcap"), kw.get("s_aux") is not None)
        )  # fmt: skip
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]), None

    AttentionInterface.register("attnimg_probe", attend)
    # An infinite number is written as an object, which from_dict does not take back.
    settings = {k: v for k, v in json.loads(raw).items() if k != "time_step_limit"}
    config = CONFIG_MAPPING[type_].from_dict(settings)
    config._attn_implementation = "attnimg_probe"
    with torch.device("meta"), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        model(input_ids=torch.zeros(1, 8, dtype=torch.long), use_cache=False)
    assert seen, f"{type_} does not call the attention interface"
    return Counter(seen), sum(weight.numel() for weight in model.parameters())


def groups_of(model):
    return Counter({dataclasses.astuple(g)[1:]: g.count for g in model.layers})


def default_file(type_, changes, *, folder):
    """What save_pretrained writes for a type, read back as `explain` reads it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    CONFIG_MAPPING[type_](**copy.deepcopy(changes)).save_pretrained(folder)
    return read_config(folder / "config.json")


# modeling_gpt_bigcode compiles with torch.jit.script when it is imported.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("type_", PROBED)
def test_saved_defaults_read_as_the_model_computes(type_, tmp_path):
    raw = default_file(type_, PROBED[type_], folder=tmp_path)
    model = read_model(raw)
    seen, weights = attention_seen(type_, json.dumps(raw))
    assert groups_of(model) == seen
    assert list(groups_of(model)) == list(seen), "groups stand in order of first appearance"
    others = sum(count for _, count in model.other_layers)
    assert seen.total() + others == 8 or type_ in {"gpt2", "gpt_bigcode"}
    assert not [sentence for sentence in model.unknown if "general rule" in sentence]
    if model.parameters is not None:
        assert model.parameters == pytest.approx(weights, rel=0.02)


@pytest.mark.parametrize("type_", PROBED)
def test_fields_left_out_have_the_class_defaults(type_, tmp_path):
    saved = read_model(default_file(type_, PROBED[type_], folder=tmp_path))
    assert read_model({"model_type": type_} | PROBED[type_]).layers == saved.layers


@pytest.mark.parametrize(("type_", "fields"), WRITTEN_BY_HAND)
def test_files_written_by_hand_read_as_the_model_computes(type_, fields):
    raw = {"model_type": type_} | fields
    seen, _ = attention_seen(type_, json.dumps(raw))
    assert groups_of(read_model(raw)) == seen


@pytest.mark.parametrize(("type_", "fields", "shape", "count"), BY_HAND)
def test_types_outside_the_interface(type_, fields, shape, count, tmp_path):
    heads, kv_heads, size = shape
    group = LayerGroup(
        count=count, heads=heads, kv_heads=kv_heads, head_dim_qk=size, head_dim_v=size
    )
    assert read_model({"model_type": type_} | fields).layers == (group,)
    assert read_model(default_file(type_, fields, folder=tmp_path)).layers == (group,)


@pytest.mark.parametrize("type_", ["mamba", "mamba2", "falcon_mamba"])
def test_state_space_models_have_no_attention(type_, tmp_path):
    model = read_model(default_file(type_, {}, folder=tmp_path))
    assert (model.layers, model.unknown) == ((), ())
    assert [count > 0 for _, count in model.other_layers] == [True]


@pytest.mark.parametrize(
    "type_", ["gemma3", "gemma4", "llama4", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen2_5_vl"]
)
def test_multimodal_models_are_read_by_their_language_part(type_, tmp_path):
    raw = default_file(type_, {}, folder=tmp_path)
    model = read_model(raw)
    assert model.type == type_
    assert model.layers == read_model(raw["text_config"]).layers
    assert model.layers
    untyped = {k: v for k, v in raw["text_config"].items() if k != "model_type"}
    assert read_model(raw | {"text_config": untyped}).layers == model.layers


def test_every_assumed_value_is_the_class_default():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from attnimg.selection.model_config import ALIASES

    # gemma4 takes it from the file alone, so it is no field of its class.
    not_fields = {("gemma4_text", "global_head_dim"): 512}
    for type_, family in read_families().items():
        if not family.known:
            continue
        defaults = {f.name: f.default for f in dataclasses.fields(CONFIG_MAPPING[type_])}
        for name, assumed in family.defaults.items():
            names = [name, *ALIASES.get(name, ())]
            real = next((defaults[n] for n in names if n in defaults), None)
            real = not_fields.get((type_, name), real)
            assert assumed == real, f"{type_}.{name}"


def test_every_known_type_is_tested():
    tested = {*PROBED, *(case.values[0] for case in BY_HAND), "mamba", "mamba2", "falcon_mamba"}
    multimodal = {"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"}
    hybrid = {"granitemoehybrid"}
    known = {name for name, family in read_families().items() if family.known}
    assert known == tested | multimodal | hybrid


@pytest.mark.parametrize(
    ("type_", "sinks"),
    [
        pytest.param("mimo_v2_flash", (False, True), id="mimo_v2_flash: sliding layers alone"),
        pytest.param("deepseek_v4", (True, True), id="deepseek_v4: every layer"),
        pytest.param("llama", (False, False), id="llama: none"),
    ],
)
def test_sinks_are_known_by_type(type_, sinks):
    kinds = ["full_attention", "sliding_attention"]
    size = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    model = read_model({"model_type": type_, "layer_types": kinds, "sliding_window": 8} | size)
    assert tuple(group.sinks for group in model.layers) == sinks
    assert [group.window for group in model.layers] == [None, 8]


@pytest.mark.parametrize(
    ("raw", "kinds"),
    [
        pytest.param(
            {"model_type": "nemotron_h", "num_hidden_layers": 52,
             "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"},
            (4, 48), id="Nemotron-H-8B has 4 attention layers of 52",
        ),
        pytest.param(
            {"model_type": "kimi_linear", "num_hidden_layers": 27,
             "linear_attn_config": {
                 "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
                 "kda_layers": [n for n in range(1, 27) if n % 4],
             }},
            (7, 20), id="Kimi-Linear-48B has 7 of 27",
        ),
        pytest.param({"model_type": "kimi_linear"}, (6, 21), id="its class defaults have 6"),
    ],
)  # fmt: skip
def test_only_attention_layers_count(raw, kinds):
    model = read_model(raw)
    others = sum(count for _, count in model.other_layers)
    assert (sum(group.count for group in model.layers), others) == kinds


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        pytest.param(
            {"model_type": "nemotron_h", "hybrid_override_pattern": "M-X"}, "'M-X'", id="a letter"
        ),
        pytest.param(
            {"model_type": "nemotron_h", "hybrid_override_pattern": []}, "a text", id="no text"
        ),
        pytest.param(
            {"model_type": "kimi_linear", "num_hidden_layers": 4,
             "linear_attn_config": {"full_attn_layers": [4], "kda_layers": [1, 2]}},
            "each of the 4 layers", id="a layer that is in neither list",
        ),
        pytest.param(
            {"model_type": "kimi_linear", "num_hidden_layers": 1,
             "linear_attn_config": {"full_attn_layers": 1, "kda_layers": []}},
            "lists of layer numbers", id="a number where a list belongs",
        ),
        pytest.param(
            {"model_type": "kimi_linear", "num_hidden_layers": 1,
             "linear_attn_config": {"full_attn_layers": [[1]], "kda_layers": []}},
            "lists of layer numbers", id="a list where a number belongs",
        ),
        pytest.param(
            {"model_type": "lfm2", "num_hidden_layers": 4, "full_attn_idxs": [4]},
            "numbers below 4", id="a layer that there is not",
        ),
    ],
)  # fmt: skip
def test_a_list_of_layers_that_is_none_is_refused(raw, says):
    with pytest.raises(AttnimgError) as caught:
        read_model(raw)
    assert caught.value.code == "bad-model"
    assert says in caught.value.why


def test_single_layers_may_override_fields_and_numbers_of_no_layer_are_ignored() -> None:
    model = read_model(
        {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 64,
         "per_layer_config": {"1": {"head_dim": 128}, "7": {"head_dim": 8}, "9" * 5000: {}}}
    )  # fmt: skip
    assert [(group.count, group.head_dim_qk) for group in model.layers] == [(1, 64), (1, 128)]
