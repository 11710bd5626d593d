"""The functions of the Python API select, verify, apply and restore backends on tiny models."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from served_kernels import serve
from tiny_models import tiny_model
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

import attnimg
from attnimg.__main__ import run
from attnimg.api import choice as choice_module
from attnimg.facts import Arch

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
          "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _without_earlier_models():
    """Delete the models that tests of other files left in reference cycles."""
    gc.collect()


@pytest.fixture(autouse=True)
def _restored():
    """Check that the models of a test leave the registries when they are deleted."""
    before = registered()
    yield
    gc.collect()
    assert registered() == before


def lora(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))


def running(model):
    return model.config._attn_implementation


def registered():
    return (
        dict(AttentionInterface._global_mapping),
        dict(AttentionMaskInterface._global_mapping),
    )


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(20, 40)[None]).logits


# The backend of a CPU that transformers has no name for.
REGISTERED = "sdpa_math"

# A fraction of the largest logit that roundings of float32 stay below.
ROUNDING = 1e-4


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["full", "PEFT"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_model_runs_the_choice_and_then_its_own_attention_again(model_type, wrap):
    model, before = wrap(tiny_model(model_type, "eager")), registered()
    expected = logits(model)
    choice = attnimg.apply(model, packing=True)
    # torch's own attention has no soft cap.
    assert choice.backend == {"llama": "sdpa", "gemma2": "eager"}[model_type]
    assert running(model) == choice.implementation
    assert running(model.get_base_model() if wrap is lora else model) == choice.implementation
    assert [(proof.backend, proof.passed) for proof in choice.proofs] == [(choice.backend, True)]
    torch.testing.assert_close(
        logits(model), expected, rtol=0, atol=ROUNDING * expected.abs().max().item()
    )
    attnimg.check_packing(model)
    attnimg.restore(model)
    assert running(model) == "eager"
    assert registered() == before
    with pytest.raises(attnimg.AttnimgError, match="nothing to restore"):
        attnimg.restore(model)


def test_a_model_that_peft_wraps_later_can_be_restored():
    model = tiny_model("llama", "eager")
    attnimg.apply(model, packing=True)
    adapted = lora(model)
    attnimg.check_packing(adapted)
    attnimg.restore(adapted)
    assert running(model) == "eager"


def test_a_compiled_or_parallel_model_is_that_inside():
    model = tiny_model("llama", "eager")
    compiled = torch.compile(model, backend="eager")
    attnimg.apply(compiled, packing=True)
    assert running(model) == "sdpa"
    attnimg.restore(torch.nn.DataParallel(compiled))
    assert running(model) == "eager"


@pytest.mark.parametrize("first", [0, 1])
def test_two_models_are_restored_in_either_order(first):
    before = registered()
    models = [tiny_model("opt", "eager", seed=seed) for seed in (1, 2)]
    expected = [logits(model) for model in models]
    for model in models:
        assert attnimg.apply(model, packing=True).backend == REGISTERED
    attnimg.restore(models[first])
    other = models[1 - first]
    assert running(other) != "eager"
    torch.testing.assert_close(
        logits(other), expected[1 - first], rtol=0, atol=ROUNDING * expected[1 - first].abs().max()
    )
    attnimg.restore(other)
    assert [running(model) for model in models] == ["eager", "eager"]
    assert registered() == before


def test_applying_again_replaces_the_choice_and_keeps_what_was_before():
    model = tiny_model("llama", "sdpa")
    attnimg.apply(model, packing=True)
    assert attnimg.apply(model, backend="eager", packing=True).backend == "eager"
    attnimg.restore(model)
    assert running(model) == "sdpa"


def test_a_model_that_leaks_runs_its_old_attention_again():
    model, before = tiny_model("llama", "eager"), registered()
    leak_on(model, "sdpa")
    with pytest.raises(attnimg.PackingLeak) as caught:
        attnimg.apply(model, backend="sdpa", packing=True)
    assert caught.value.code == "packing-not-isolated"
    assert running(model) == "eager"
    assert registered() == before
    attnimg.check_packing(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(attnimg.PackingLeak):
        attnimg.check_packing(model)


def test_a_class_that_is_known_to_leak_is_refused_without_a_call():
    with pytest.raises(attnimg.PackingLeak, match="would mix in opt"):
        attnimg.select(tiny_model("opt").config, backend="sdpa", packing=True)


def test_auto_replaces_a_backend_on_which_the_model_leaks(caplog):
    model = tiny_model("llama", "eager")
    leak_on(model, "sdpa")
    choice = attnimg.apply(model, packing=True)
    assert (choice.backend, running(model)) == (REGISTERED, "attnimg_torch_math")
    assert choice.implementation == "attnimg_torch_math"
    assert "packing: sdpa is not used (packing-not-isolated)" in caplog.text
    assert [proof.backend for proof in choice.proofs] == ["sdpa", REGISTERED]


def leak_on(model, implementation):
    """Mix the tokens of a row in one layer while the model runs an implementation."""

    def mix(_module, _inputs, output):
        leaks = running(model) == implementation
        return output + 0.1 * output.mean(1, keepdim=True) if leaks else output

    model.model.layers[0].register_forward_hook(mix)


def test_the_trainers_collator_makes_the_batch_of_the_check():
    from transformers import DataCollatorWithFlattening

    model, seen = tiny_model("llama", "sdpa"), []

    class Collator(DataCollatorWithFlattening):
        def __call__(self, features, **options):
            seen.append(len(features))
            return super().__call__(features, **options)

    attnimg.check_packing(model, collator=Collator())
    assert seen == [2]
    # Without position_ids nothing separates the documents.
    for call in (attnimg.check_packing, partial(attnimg.apply, packing=True)):
        with pytest.raises(attnimg.PackingLeak, match="the collator Collator packs") as caught:
            call(model, collator=Collator(return_position_ids=False))
        assert "found input_ids, labels for 2 documents in 1 row;" in caught.value.why
    assert running(model) == "sdpa"


def test_a_collator_that_pads_rows_needs_no_boundaries():
    from torch.nn.utils.rnn import pad_sequence

    def collate(examples):
        rows = [torch.tensor(example["input_ids"]) for example in examples]
        return {
            "input_ids": pad_sequence(rows, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], True),
        }

    attnimg.check_packing(tiny_model("llama", "sdpa"), collator=collate)


def test_a_collator_that_is_not_used_is_a_warning(caplog):
    from transformers import DataCollatorWithFlattening

    model = tiny_model("llama", "sdpa")
    attnimg.apply(model, collator=DataCollatorWithFlattening())
    assert "needs packing=True" in caplog.text
    caplog.clear()
    attnimg.apply(model, collator=DataCollatorWithFlattening(), packing=True)
    assert "needs packing=True" not in caplog.text


def test_a_named_kernel_that_fails_its_proof_is_an_error(tmp_path, monkeypatch):
    folder = serve(tmp_path / "kernel", "zeros")
    monkeypatch.setenv("LOCAL_KERNELS", f"kernels-community/wrong={folder}")
    model = tiny_model("llama", "sdpa")
    with pytest.raises(attnimg.KernelError, match="failed its proof"):
        attnimg.apply(model, backend="kernels-community/wrong", trust_remote_code=True)
    assert running(model) == "sdpa"


def test_use_registers_inside_the_block_alone():
    before = registered()
    config = tiny_model("opt").config
    with attnimg.use(attnimg.select(config, packing=True)) as choice:
        assert choice.verified
        assert registered() != before
        model = AutoModelForCausalLM.from_config(config, attn_implementation=choice.implementation)
        attnimg.check_packing(model)
    assert registered() == before


def test_an_exception_inside_use_restores_the_registries():
    before = registered()
    choice = attnimg.select(tiny_model("opt").config, packing=True)

    def interrupted():
        with attnimg.use(choice):
            assert registered() != before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert registered() == before
    assert choice_module.in_use.get() == ()


def test_nested_blocks_check_the_inner_choice():
    outer = attnimg.select(CONFIG, backend="eager", packing=True)
    inner = attnimg.select(CONFIG, packing=True)
    with attnimg.use(outer):
        with attnimg.use(inner):
            attnimg.check_packing(tiny_model("llama", inner.implementation))
            with pytest.raises(attnimg.AttnimgError, match="does not run sdpa"):
                attnimg.check_packing(tiny_model("llama", outer.implementation))
        attnimg.check_packing(tiny_model("llama", outer.implementation))


def test_apply_inside_use_outlives_the_block():
    model = tiny_model("opt", "eager")
    with attnimg.use(attnimg.select(CONFIG, packing=True)):
        attnimg.apply(model, packing=True)
    logits(model)
    attnimg.restore(model)
    assert running(model) == "eager"


def test_restoring_inside_use_leaves_the_block_its_backend():
    config = tiny_model("opt").config
    with attnimg.use(attnimg.select(config, packing=True)) as choice:
        other = tiny_model("opt", "eager")
        attnimg.apply(other, packing=True)
        attnimg.restore(other)
        logits(tiny_model("opt", choice.implementation))


def test_a_deleted_model_leaves_the_registries():
    before = registered()
    model = tiny_model("opt", "eager")
    attnimg.apply(model, packing=True)
    assert registered() != before
    del model
    gc.collect()
    assert registered() == before


def test_a_model_that_is_deleted_inside_use_leaves_the_registries_after_the_block():
    before = registered()
    model = tiny_model("opt", "eager")
    attnimg.apply(model, packing=True)
    with attnimg.use(attnimg.select(tiny_model("opt").config, packing=True)) as choice:
        other = tiny_model("opt", choice.implementation)
        del model
        gc.collect()
        logits(other)
    assert registered() == before


def test_a_copy_of_a_model_runs_its_backend_until_it_is_restored():
    model, before = tiny_model("opt", "eager"), registered()
    expected = logits(model)
    attnimg.apply(model, packing=True)
    copied = copy.deepcopy(model)
    attnimg.restore(model)
    assert running(copied) == "attnimg_torch_math"
    torch.testing.assert_close(
        logits(copied), expected, rtol=0, atol=ROUNDING * expected.abs().max().item()
    )
    attnimg.restore(copied)
    assert (running(copied), registered()) == ("eager", before)


@pytest.mark.parametrize("again", [attnimg.restore, attnimg.apply], ids=["restore", "apply"])
def test_a_pickled_model_is_restored_where_it_is_loaded(again):
    model = tiny_model("opt", "eager")
    attnimg.apply(model, packing=True)
    kept = pickle.dumps(model)
    assert b"attnimg.api" not in kept  # it can be loaded where attnimg is not installed
    attnimg.restore(model)
    loaded = pickle.loads(kept)
    with pytest.raises(KeyError, match="attnimg_torch_math"):
        logits(loaded)
    again(loaded)
    logits(loaded)
    if again is attnimg.apply:
        attnimg.restore(loaded)
    assert running(loaded) == "eager"


def test_blocks_of_two_threads_may_overlap():
    before, config = registered(), tiny_model("opt").config
    choices = [attnimg.select(config, packing=True).verify() for _ in range(2)]
    entered, left = threading.Barrier(2), threading.Event()
    found = []

    def first():
        with attnimg.use(choices[0]):
            entered.wait(30)
        left.set()

    def second():
        with attnimg.use(choices[1]) as choice:
            model = tiny_model("opt", choice.implementation)
            entered.wait(30)
            assert left.wait(30)
            found.append(logits(model))
            attnimg.check_packing(model)
            found.append("isolated")

    threads = [threading.Thread(target=one) for one in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found[1:] == ["isolated"]
    assert registered() == before


def test_all_fitting_backends_are_verified():
    proofs = attnimg.verify(CONFIG, packing=True)
    assert [proof.backend for proof in proofs] == ["sdpa", REGISTERED, "eager"]
    assert all(proof.passed for proof in proofs)


def test_every_form_of_a_model_has_the_same_choice(tmp_path):
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    forms = [model, model.config, model.config.to_dict(), tmp_path, str(tmp_path)]
    assert attnimg.select(CONFIG, dtype="bf16", on="h100").to_dict() == (
        attnimg.select(CONFIG, dtype=torch.bfloat16, on="h100").to_dict()
    )
    chosen = [attnimg.select(form, packing=True, dtype="float32").to_dict() for form in forms]
    assert all(found == chosen[0] for found in chosen)


WRONG = [
    pytest.param("org/none", {}, "not on this machine", id="a-name-that-is-not-here"),
    pytest.param({"hidden_size": 64}, {}, "does not describe", id="a-dict-without-heads"),
    pytest.param({}, {}, "does not describe", id="an-empty-dict"),
    pytest.param(5, {}, "this is not a model", id="a-number"),
    pytest.param(torch.nn.Linear(2, 2), {}, "this is not a model", id="a-module-of-torch"),
    pytest.param(CONFIG, {"backend": "flash5"}, "unknown backend", id="misspelt-backend"),
    pytest.param(CONFIG, {"backend": "flash_attention_3"}, "cannot be used", id="it-does-not-fit"),
    pytest.param(CONFIG, {"dtype": "float64"}, "dtype is not one of", id="dtype-of-no-kernel"),
    pytest.param(CONFIG, {"dtype": torch.int8}, "dtype is not one of", id="integer-dtype"),
    pytest.param(CONFIG, {"sequence_len": 0}, "sequence_len is not", id="no-tokens"),
    pytest.param(CONFIG, {"sequence_len": "64"}, "sequence_len is not", id="tokens-as-text"),
    pytest.param(CONFIG, {"micro_batch_size": None}, "micro_batch_size is not", id="no-rows"),
    pytest.param(CONFIG, {"micro_batch_size": 1.5}, "micro_batch_size is not", id="half-a-row"),
    pytest.param(CONFIG, {"packing": "false"}, "packing is neither", id="a-flag-as-text"),
    pytest.param(CONFIG, {"autocast": "no"}, "autocast is neither", id="autocast-as-text"),
    pytest.param(CONFIG, {"on": 90}, "on is not a string", id="a-gpu-as-a-number"),
    pytest.param(CONFIG, {"image": 5}, "image is not a string", id="an-image-as-a-number"),
    pytest.param(CONFIG, {"backends": ["eager"]}, "backends is not a dict", id="a-list"),
    pytest.param(CONFIG, {"on": "h1000"}, "h1000", id="unknown-gpu"),
    pytest.param(CONFIG, {"image": "hoper"}, "hoper", id="unknown-image"),
]


@pytest.mark.parametrize(("model", "arguments", "text"), WRONG)
def test_wrong_arguments_are_refused(model, arguments, text):
    with pytest.raises(attnimg.AttnimgError, match=text):
        attnimg.select(model, **arguments)


TYPOS = [
    (attnimg.select, "packed", "select() got an unexpected keyword argument 'packed'. Did you mean "
     "'packing'?"),
    (attnimg.apply, "sequence_length", "Did you mean 'sequence_len'?"),
    (attnimg.apply, "colator", "Did you mean 'collator'?"),
    (attnimg.verify, "attn_implementation", "Did you mean 'backend'?"),
    (attnimg.check_packing, "collate", "Did you mean 'collator'?"),
    (attnimg.AttnimgCallback, "packng", "AttnimgCallback() got an unexpected keyword argument "
     "'packng'. Did you mean 'packing'?"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "name", "message"), TYPOS)
def test_an_unknown_argument_is_refused_with_the_nearest_name(call, name, message):
    model = () if call is attnimg.AttnimgCallback else (CONFIG,)
    with pytest.raises(TypeError) as caught:
        call(*model, **{name: True})
    assert message in str(caught.value)


def test_an_argument_without_a_near_name_is_refused_without_one():
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'zzz'$"):
        attnimg.select(CONFIG, zzz=1)


def test_use_needs_a_choice():
    needs = r"needs the result of attnimg\.select, found 'sdpa'"
    with pytest.raises(TypeError, match=needs), attnimg.use("sdpa"):
        pass


def test_a_dict_without_heads_is_refused_with_what_it_lacks():
    given = {"model_type": "own", "hidden_size": 64, "n_layer": 2}
    with pytest.raises(attnimg.AttnimgError, match="does not describe") as caught:
        attnimg.select(given)
    assert "needed num_attention_heads, or" in caught.value.why
    assert caught.value.do.startswith("add num_attention_heads as in config.json")
    layers = str(attnimg.select(given | {"num_attention_heads": 4}))
    assert "2 layers, 4 heads, 4 kv_heads, head_dim 16" in layers


@pytest.mark.parametrize(
    "given",
    [
        {"model_type": "llama"},
        {"model_type": "mamba"},
        {"model_type": "rwkv", "hidden_size": 64, "num_hidden_layers": 2},
        {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4},
        {"text_config": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}},
    ],
    ids=str,
)
def test_a_dict_that_describes_a_model_passes(given):
    assert attnimg.select(given, on="h100").backend


@pytest.mark.parametrize("call", [attnimg.apply, attnimg.restore, attnimg.check_packing])
def test_what_is_no_model_of_transformers_is_refused(call):
    with pytest.raises(attnimg.AttnimgError, match="not a transformers model") as caught:
        call(torch.nn.Linear(2, 2))
    assert "attnimg.attention" in caught.value.do


def test_a_choice_for_another_machine_is_not_verified_here():
    choice = attnimg.select(CONFIG, on="h100", packing=True)
    assert choice.backend == "flash_attention_3"
    with pytest.raises(attnimg.AttnimgError, match="for another machine"):
        choice.verify()


def test_nothing_is_applied_or_verified_for_another_machine():
    model = tiny_model("llama", "eager")
    for call in (attnimg.apply, attnimg.verify):
        for elsewhere in ({"on": "h100"}, {"image": "hopper"}):
            with pytest.raises(attnimg.AttnimgError, match="for another machine"):
                call(model, **elsewhere)
    assert running(model) == "eager"


def test_wrong_arguments_leave_a_model_what_was_applied():
    model = tiny_model("llama", "eager")
    attnimg.apply(model, backend="sdpa")
    with pytest.raises(attnimg.AttnimgError, match="unknown backend"):
        attnimg.apply(model, backend="flash5")
    assert running(model) == "sdpa"
    attnimg.restore(model)
    assert running(model) == "eager"


def test_threads_apply_and_restore_side_by_side():
    from concurrent.futures import ThreadPoolExecutor

    # The proof, so that the threads meet where they change the registries.
    attnimg.select(tiny_model("opt").config, packing=True, dtype="float32").verify()

    def apply_and_restore(seed):
        model = tiny_model("opt", "eager", seed=seed)
        choice = attnimg.apply(model, packing=True)
        attnimg.restore(model)
        return choice.backend, running(model)

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(apply_and_restore, range(6)))
    assert found == [(REGISTERED, "eager")] * 6


def test_a_model_without_weights_is_refused_before_it_is_called():
    model = tiny_model("llama", "eager").to("meta")
    with pytest.raises(attnimg.AttnimgError, match="has no weights"):
        attnimg.apply(model, packing=True)
    assert attnimg.apply(model).backend == "sdpa"


def test_a_model_that_is_not_on_the_gpu_yet_is_refused_before_it_is_called(monkeypatch):
    machine, image = choice_module.find_machine(None, None)
    gpu = replace(machine, arch=Arch(name="sm_90", vendor="nvidia", capability=(9, 0)), gpu="H100")
    monkeypatch.setattr(choice_module, "find_machine", lambda *_: (gpu, image))
    model = tiny_model("llama", "eager")
    with pytest.raises(attnimg.AttnimgError, match="while the model is on the CPU") as caught:
        attnimg.apply(model, packing=True)
    assert 'model.to("cuda")' in caught.value.do
    assert running(model) == "eager"


def test_the_choice_is_that_of_explain(tmp_path, capsys):
    tiny_model("gemma2").config.save_pretrained(tmp_path)
    Path(tmp_path / "run.yaml").write_text(
        f"base_model: {tmp_path}\nsequence_len: 128\nsample_packing: true\nmicro_batch_size: 2\n"
        "bf16: true\nlearning_rate: 1e-3\ndatasets: [{path: a.jsonl, type: completion}]\n"
    )
    for gpu in ("h100", "a100", "cpu"):
        run(["explain", str(tmp_path / "run.yaml"), "--json", "--on", gpu])
        explained = json.loads(capsys.readouterr().out)
        found = attnimg.select(
            tmp_path, packing=True, sequence_len=128, micro_batch_size=2, dtype="bfloat16", on=gpu
        ).to_dict()
        for key in ("chosen", "candidates", "groups", "on"):
            assert found[key] == explained[key], (gpu, key)


def test_layers_without_softmax_attention_are_called_by_document_until_restore():
    model = tiny_model("qwen3_5_text", "sdpa")
    attnimg.apply(model, packing=True, sequence_len=64)
    attnimg.check_packing(model)
    changed = [m for m in model.modules() if "forward" in vars(m)]
    assert changed
    attnimg.restore(model)
    assert not [m for m in model.modules() if "forward" in vars(m)]
