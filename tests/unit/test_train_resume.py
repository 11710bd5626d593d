"""Test resuming: allowed changes are used, printed and recorded, all others are refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.train import model_files as model_hashes
from attnimg.train import resume
from attnimg.train.checkpoint import STATE_FILE, ResumePoint
from attnimg.train.data import SourceFigures

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
from tiny_run import lines, make_model, make_tokenizer, run
from trainer_format import to_trainer_format

CLASSES = (
    resume.BY_VALUE, resume.BY_CONTENT, resume.EVALUATION_KEYS, resume.CHANGEABLE,
    resume.NOT_COMPARED,
)  # fmt: skip

# Another valid value than the default, for each key that is compared by value.
OTHER = {
    "model_type": "LlamaForCausalLM", "tokenizer_type": "LlamaTokenizer",
    "special_tokens": {"pad_token": "<pad>"}, "tokens": ["<new>"], "scaling_softmax": True,
    "streaming": True, "streaming_multipack_buffer_size": 64, "pretrain_multipack_attn": True,
    "shuffle_merged_datasets": False, "shuffle_before_merging_datasets": True,
    "dataset_exact_deduplication": True, "min_sample_len": 3,
    "chat_template_kwargs": {"enable_thinking": False}, "val_set_size": 0.1, "sequence_len": 128,
    "group_by_length": True,
    "excess_length_strategy": "drop", "sample_packing": True, "pad_to_sequence_len": True,
    "batch_flattening": True, "train_on_inputs": True, "chat_template": "chatml",
    "chat_template_jinja": "{{ x }}", "default_system_message": "Be kind: always.",
    "eot_tokens": ["<end>"], "micro_batch_size": 2, "gradient_accumulation_steps": 2,
    "optimizer": "sgd", "lr_scheduler": "linear", "lr_scheduler_kwargs": {"num_cycles": 2},
    "cosine_constant_lr_ratio": 0.5, "eta_min": 1e-5, "lr_quadratic_warmup": True,
    "neftune_noise_alpha": 5.0, "embedding_lr": 1e-5, "embedding_lr_scale": 0.5,
    "added_tokens_overrides": {5: "<a>"},
    "lr_groups": [{"name": "a", "modules": ["q_proj"], "lr": 1e-5}],
    "optim_args": {"momentum": 0.9},
    "loraplus_lr_ratio": 16.0, "loraplus_lr_embedding": 1e-5,
    "cosine_min_lr_ratio": 0.1, "warmup_steps": 3, "warmup_ratio": 0.1, "weight_decay": 0.1,
    "max_grad_norm": 0.5, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "seed": 7,
    "bf16": False, "fp16": True, "tf32": True, "load_in_4bit": True, "load_in_8bit": True,
    "adapter": None, "lora_model_dir": "adapter", "lora_r": 16, "lora_alpha": 32,
    "lora_dropout": 0.1,
    "lora_target_modules": ["q_proj"], "lora_target_linear": True,
    "lora_modules_to_save": ["lm_head"], "lora_fan_in_fan_out": True, "peft_use_dora": True,
    "peft_use_rslora": True, "lora_rank_pattern": {"q_proj": 4},
    "lora_alpha_pattern": {"q_proj": 4}, "peft_init_lora_weights": "gaussian",
    "peft_layers_to_transform": [0], "peft_layers_pattern": ["layers"],
    "lora_target_parameters": ["mlp.experts.down_proj"],
    "overrides_of_model_config": {"rms_norm_eps": 1e-5}, "tokenizer_legacy": True,
    "resize_token_embeddings_to_32x": True, "mean_resizing_embeddings": True,
    "shrink_embeddings": True, "reinit_weights": True, "unfrozen_parameters": ["^lm_head"],
    "tokenizer_use_mistral_common": True, "quantize_moe_experts": True,
    "bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"}, "qat": {"weight_dtype": "int4"},
    "early_stopping_patience": 2, "fsdp": ["full_shard"], "fsdp_config": {"x": 1},
    "fsdp_version": 2,
    "deepspeed": {"zero": 1}, "rl": "dpo", "rl_beta": 0.5, "dpo_loss_type": ["robust"],
    "dpo_loss_weights": [2.0], "dpo_label_smoothing": 0.1, "dpo_use_weighting": True,
    "kto_desirable_weight": 2.0, "kto_undesirable_weight": 2.0, "orpo_alpha": 0.5,
    "load_best_model_at_end": True,
    "context_parallel_size": 2,
}  # fmt: skip
NOT_COMPARED = {
    "trust_remote_code": True, "attn_strict": True, "attn_known_bad": "file",
    "attn_check_steps": 7,
    "dataset_prepared_path": "kept", "dataset_num_proc": 2, "eval_batch_size": 4,
    "gradient_checkpointing": True, "activation_offloading": "legacy", "torch_compile": True,
    "output_dir": "elsewhere",
    "logging_steps": 5, "save_strategy": "epoch", "save_steps": 7, "save_total_limit": 1,
    "resume_from_checkpoint": True, "dataloader_num_workers": 2, "eval_steps": 3,
    "test_datasets": [{"path": "tests"}], "wandb_project": "p", "use_mlflow": True,
    "hub_model_id": "me/model", "accelerator_config": {"non_blocking": True}, "float16": True,
    "loss_watchdog_threshold": 9.0,
    "loss_watchdog_patience": 5,
}  # fmt: skip


def config(**keys: Any) -> Config:
    given = {"base_model": "none", "learning_rate": 1e-3, "adapter": "lora",
             "datasets": [{"path": "data.jsonl", "type": "completion"}], **keys}  # fmt: skip
    return Config.model_validate(given)


def checkpoint(folder: Path, found: dict[str, Any], *, step: int = 4) -> ResumePoint:
    place = folder / f"checkpoint-{step}"
    place.mkdir(parents=True, exist_ok=True)
    (place / STATE_FILE).write_text(json.dumps({"identity": json.loads(json.dumps(found))}))
    return ResumePoint(path=place, step=step)


def applied(do: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Apply literally what a refusal's `do` lines ask for; the line of a new run is left out."""
    for line in do.splitlines():
        if found := re.fullmatch(r"set (\w+): (.*)", line):
            keys = {**keys, found[1]: yaml.safe_load(found[2])}
        elif found := re.fullmatch(r"remove (\w+)", line):
            keys = {**keys, found[1]: None}
    return keys


def test_every_key_is_in_one_class() -> None:
    assert sorted(key for keys in CLASSES for key in keys) == sorted(Config.model_fields)


def test_every_key_of_a_class_is_tried_here() -> None:
    assert OTHER.keys() == resume.BY_VALUE
    assert NOT_COMPARED.keys() <= resume.NOT_COMPARED | resume.EVALUATION_KEYS | {"test_datasets"}


@pytest.mark.parametrize("key", OTHER)
@pytest.mark.parametrize("turned", [False, True], ids=["set later", "set before"])
def test_a_changed_key_is_refused_and_its_advice_helps(
    tmp_path: Path, key: str, turned: bool
) -> None:
    before: dict[str, Any] = {}
    now = {key: OTHER[key]}
    if turned:
        before, now = now, before
    point = checkpoint(tmp_path, resume.config_identity(config(**before)))
    with pytest.raises(AttnimgError) as caught:
        resume.check_resumed_config(config(**now), point)
    assert (caught.value.code, caught.value.key) == ("resume-differs", key)
    for values in (config(**before), config(**now)):
        assert resume.as_yaml(values.model_dump(mode="json")[key]) in caught.value.why
    corrected = applied(caught.value.do, now)
    resume.check_resumed_config(config(**corrected), point)


@pytest.mark.parametrize("key", NOT_COMPARED)
def test_what_alters_no_result_may_change(tmp_path: Path, key: str) -> None:
    point = checkpoint(tmp_path, resume.config_identity(config()))
    resume.check_resumed_config(config(**{key: NOT_COMPARED[key]}), point)


@pytest.mark.parametrize(
    ("decides", "refused"),
    [
        pytest.param({"early_stopping_patience": 3}, True, id="early stopping"),
        pytest.param({"lr_scheduler": "reduce_lr_on_plateau"}, True, id="the rate"),
        pytest.param({}, False, id="nothing"),
    ],
)
def test_evaluation_is_compared_where_it_decides(
    tmp_path: Path, decides: dict[str, Any], refused: bool
) -> None:
    point = checkpoint(tmp_path, resume.config_identity(config(eval_steps=2, **decides)))
    resume.check_resumed_config(config(eval_steps=2, **decides), point)
    if not refused:
        resume.check_resumed_config(config(eval_steps=3), point)
        return
    with pytest.raises(AttnimgError, match="another eval_steps"):
        resume.check_resumed_config(config(eval_steps=3, **decides), point)


@pytest.mark.parametrize(
    ("steps", "then", "now", "says"),
    [
        pytest.param(1, 2, 1, "set gradient_accumulation_steps: 2", id="half the processes"),
        pytest.param(3, 1, 2, "start 1 processes", id="no number of steps is the same"),
        pytest.param(2, 1, 2, None, id="twice the processes, half the accumulation"),
    ],
)
def test_the_rows_of_a_step_stay_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, then: int, now: int,
    says: str | None,
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", str(then))
    point = checkpoint(tmp_path, resume.config_identity(config(gradient_accumulation_steps=steps)))
    monkeypatch.setenv("WORLD_SIZE", str(now))
    if says is None:
        resume.check_resumed_config(config(gradient_accumulation_steps=steps * then // now), point)
        return
    with pytest.raises(AttnimgError) as caught:
        resume.check_resumed_config(config(gradient_accumulation_steps=steps), point)
    assert says in caught.value.do
    corrected = applied(caught.value.do, {"gradient_accumulation_steps": steps})
    if says.startswith("set"):
        resume.check_resumed_config(config(**corrected), point)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder / "model")
    return folder


def other_weights(model: Path) -> None:
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)


def other_config(model: Path) -> None:
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**raw, "rms_norm_eps": 1e-3}))


def same_model(model: Path) -> None:
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**raw, "transformers_version": "9"}, indent=1))


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        pytest.param(other_weights, "model.safetensors", id="other weights of the same shapes"),
        pytest.param(other_config, "config.json", id="another config.json"),
        pytest.param(same_model, None, id="a copy elsewhere"),
    ],
)
def test_the_base_model_is_known_by_its_files(
    tiny: Path, tmp_path: Path, change: Any, refused: str | None
) -> None:
    here = {"base_model": str(tiny / "model")}
    there = {"base_model": str(tmp_path / "moved")}
    shutil.copytree(tiny / "model", tmp_path / "moved")
    change(tmp_path / "moved")
    point = checkpoint(tmp_path, resume.config_identity(config(**here)))
    if refused is None:
        resume.check_resumed_config(config(**there), point)
        return
    with pytest.raises(AttnimgError, match="another base_model") as caught:
        resume.check_resumed_config(config(**there), point)
    assert all(text in caught.value.why for text in (*here.values(), *there.values(), refused))
    resume.check_resumed_config(config(**applied(caught.value.do, there)), point)


@pytest.mark.parametrize("place", [0, 1_000_001, -1])
def test_one_changed_bit_of_a_large_weight_is_named_though_size_and_time_are_kept(
    tmp_path: Path, place: int
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    weights = bytearray(8 << 20)
    file = model / "model.safetensors"
    file.write_bytes(weights)
    os.utime(file, ns=(10**18, 10**18))
    values = config(base_model=str(model))
    point = checkpoint(tmp_path, resume.config_identity(values))
    resume.check_resumed_config(values, point)
    weights[place] ^= 1
    file.write_bytes(weights)
    os.utime(file, ns=(10**18, 10**18))
    with pytest.raises(AttnimgError, match="another base_model") as caught:
        resume.check_resumed_config(values, point)
    assert len(re.findall(r"model\.safetensors [0-9a-f]{12}", caught.value.why)) == 2
    assert f"put the earlier model.safetensors back into {model}" in caught.value.do
    weights[place] ^= 1
    file.write_bytes(weights)
    resume.check_resumed_config(values, point)


def test_weights_that_an_index_names_elsewhere_are_hashed(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "model", tmp_path / "model")
    moved = tmp_path / "shard.safetensors"
    (tmp_path / "model/model.safetensors").rename(moved)
    index = tmp_path / "model/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": str(moved)}}))
    found = model_hashes.hash_model(config(base_model=str(tmp_path / "model")))
    assert found is not None
    assert sorted(found["files"]) == ["../shard.safetensors", "config.json", index.name]


def other_vocabulary(model: Path) -> None:
    file = model / "tokenizer.json"
    file.write_text(file.read_text().replace("a", "b", 1))


def one_file_more(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages }}")


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        pytest.param(other_vocabulary, True, id="another tokenizer.json"),
        pytest.param(one_file_more, False, id="a file more, as hub snapshots may have"),
        pytest.param(lambda _model: None, False, id="a copy elsewhere"),
    ],
)
def test_the_tokenizer_is_known_by_its_files(
    tiny: Path, tmp_path: Path, change: Any, refused: bool
) -> None:
    shutil.copytree(tiny / "model", tmp_path / "moved")
    change(tmp_path / "moved")
    there = {"base_model": str(tiny / "model"), "tokenizer_config": str(tmp_path / "moved")}

    def found(keys: dict[str, Any]) -> dict[str, Any]:
        return {"tokenizer": model_hashes.hash_tokenizer(config(**keys))}

    point = checkpoint(tmp_path, found({"base_model": str(tiny / "model")}))
    if not refused:
        resume.require_same_identity(found(there), config(**there), point)
        return
    with pytest.raises(AttnimgError, match="another tokenizer_config") as caught:
        resume.require_same_identity(found(there), config(**there), point)
    assert len(re.findall(r"tokenizer\.json [0-9a-f]{12}", caught.value.why)) == 2
    resume.require_same_identity(found(applied(caught.value.do, there)), config(**there), point)


def test_changed_files_of_a_kernel_are_named() -> None:
    def files(torch: str) -> dict[str, Any]:
        return {"kernels": {"sdpa": {"attnimg": "0" * 64, "torch": torch * 64}}, "attention": "x"}

    notes = [
        [note for note in resume.resume_notes(files("1"), files(now), name="checkpoint-4")
         if "the files of" in note]
        for now in "12"
    ]  # fmt: skip
    assert notes[0] == []
    assert notes[1] == [
        "warning: the files of sdpa changed: torch 111111111111 until checkpoint-4, torch "
        "222222222222 now: results may differ"
    ]


def figures(key: str = "datasets[0]", *, content: str = "a" * 64) -> SourceFigures:
    return SourceFigures(key=key, path="p", type="completion", documents=3, content=content)


@pytest.mark.parametrize(
    ("now", "found", "key"),
    [
        pytest.param({"path": "data.jsonl"}, "b", "datasets[0]", id="the file has other records"),
        pytest.param({"path": "x.jsonl"}, "b", "datasets[0].path", id="another file"),
        pytest.param({"path": "data.jsonl", "split": "test"}, "b", "datasets[0].split",
                     id="another split"),
        pytest.param({"path": "moved.jsonl"}, "a", None, id="the same records elsewhere"),
    ],
)  # fmt: skip
def test_the_data_is_known_by_its_tokens(
    tmp_path: Path, now: dict[str, str], found: str, key: str | None
) -> None:
    def part(values: Config, letter: str) -> dict[str, Any]:
        return dict(resume.data_identity(values, (figures(content=letter * 64),), None))

    point = checkpoint(tmp_path, part(config(), "a"))
    values = config(datasets=[{"type": "completion", **now}])
    if key is None:
        resume.require_same_identity(part(values, found), values, point)
        return
    with pytest.raises(AttnimgError) as caught:
        resume.require_same_identity(part(values, found), values, point)
    assert (caught.value.code, caught.value.key) == ("resume-differs", key)


DECIDES = {"early_stopping_patience": 3}


@pytest.mark.parametrize(
    ("keys", "now", "letter", "refused"),
    [
        pytest.param(DECIDES, {"path": "t.jsonl"}, "b", "test_datasets[0]", id="other records"),
        pytest.param(DECIDES, {"path": "u.jsonl"}, "b", "test_datasets[0].path", id="another file"),
        pytest.param({"lr_scheduler": "reduce_lr_on_plateau"}, {"path": "t.jsonl"}, "b",
                     "test_datasets[0]", id="it controls the rate"),
        pytest.param(DECIDES, None, None, "test_datasets[0]", id="no test_datasets any more"),
        pytest.param(DECIDES, {"path": "moved.jsonl"}, "a", None, id="a moved file"),
        pytest.param({}, {"path": "t.jsonl"}, "b", None, id="it decides nothing"),
    ],
)  # fmt: skip
def test_the_validation_data_is_known_by_its_tokens(
    tmp_path: Path, keys: dict[str, Any], now: Any, letter: Any, refused: str | None
) -> None:
    def found(spec: Any, content: Any) -> tuple[Config, dict[str, Any]]:
        sources, tests = [figures()], None
        if spec is not None:
            tests = [{"type": "completion", **spec}]
            sources.append(figures("test_datasets[0]", content=content * 64))
        values = config(test_datasets=tests, **keys)
        parts = {
            **resume.config_identity(values),
            **resume.data_identity(values, tuple(sources), None),
        }
        return values, parts

    _, before = found({"path": "t.jsonl"}, "a")
    values, here = found(now, letter)
    point = checkpoint(tmp_path, before)
    here = {**here, "attention": "sdpa"}
    notes = [note for note in resume.resume_notes(before, here, name="checkpoint-4")
             if "eval_loss before and after" in note]  # fmt: skip
    assert len(notes) == (not keys and letter == "b")
    if refused is None:
        resume.require_same_identity(here, values, point)
        return
    with pytest.raises(AttnimgError) as caught:
        resume.require_same_identity(here, values, point)
    assert caught.value.key == refused


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        pytest.param({}, {"lora_target_modules": "all-linear"}, True, id="the default written"),
        pytest.param({"lora_target_modules": "All-Linear"}, {"lora_target_linear": True}, True,
                     id="two ways to name all"),
        pytest.param({"lora_target_modules": ["q_proj", "v_proj"]},
                     {"lora_target_modules": r".*\.(v|q)_proj"}, True, id="a list and a pattern"),
        pytest.param({"lora_target_modules": ["q_proj"], "lora_target_linear": True}, {}, True,
                     id="all with a name beside"),
        pytest.param({}, {"lora_target_modules": ["q_proj"]}, False, id="fewer modules"),
        pytest.param({"lora_target_modules": r".*layers\.0.*\.q_proj"},
                     {"lora_target_modules": ["q_proj"]}, False, id="the same name, more layers"),
        pytest.param({}, {"lora_target_modules": ["q_pro"]}, False, id="a name of no module"),
    ],
)  # fmt: skip
def test_targets_are_compared_by_the_modules_they_match(
    tiny: Path, tmp_path: Path, before: dict[str, Any], now: dict[str, Any], same: bool
) -> None:
    base = {"base_model": str(tiny / "model")}
    point = checkpoint(tmp_path, resume.config_identity(config(**base, **before)))
    if same:
        resume.check_resumed_config(config(**base, **now), point)
        return
    with pytest.raises(AttnimgError, match="another lora_target"):
        resume.check_resumed_config(config(**base, **now), point)


@pytest.mark.parametrize(
    ("now", "refused"),
    [
        pytest.param({}, False, id="another day"),
        pytest.param({"read": "c" * 64}, True, id="other records"),
        pytest.param({"documents": 4}, True, id="another count"),
        pytest.param({"template": "{{ x }}"}, True, id="another template"),
    ],
)
def test_a_template_that_writes_the_date_hides_no_other_change(
    tmp_path: Path, now: dict[str, Any], refused: bool
) -> None:
    values = config(datasets=[{"path": "data.jsonl", "type": "chat_template"}])
    tokenizer = make_tokenizer(tmp_path / "tokenizer")

    def data(content: str, *, template: str = "", **changes: Any) -> dict[str, Any]:
        tokenizer.chat_template = "{{ strftime_now('%d %b') }}{{ messages }}" + template
        found = replace(figures(content=content * 64), **{"read": "b" * 64, **changes})
        return dict(resume.data_identity(values, (found,), tokenizer))

    point = checkpoint(tmp_path, data("a"))
    if not refused:
        resume.require_same_identity(data("b", **now), values, point)
        return
    with pytest.raises(AttnimgError) as caught:
        resume.require_same_identity(data("b", **now), values, point)
    assert caught.value.key == "datasets[0]"


@pytest.mark.parametrize(
    ("then", "now", "refused"),
    [
        pytest.param("flash_attention_2", "sdpa", False, id="two exact kernels"),
        pytest.param("sdpa", "s2", True, id="another function than attention"),
    ],
)
def test_exact_kernels_stand_in_for_one_another(
    tmp_path: Path, then: str, now: str, refused: bool
) -> None:
    point = checkpoint(tmp_path, {"attention": then})
    if refused:
        with pytest.raises(AttnimgError, match="attn_implementation"):
            resume.require_same_identity({"attention": now}, config(), point)
        return
    resume.require_same_identity({"attention": now}, config(), point)
    said = resume.resume_notes({"attention": then}, {"attention": now}, name="checkpoint-4")
    assert any("rounding" in text for text in said)


# Dropout and the optimizer's moments make a lost state show; a window of two steps is cut.
KEYS: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "adapter": "lora", "lora_dropout": 0.2,
                        "warmup_ratio": 0.5}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "out"
    run(tiny, out, **KEYS)
    return out


def resumed(tiny: Path, trained: Path, out: Path, **keys: Any) -> Path:
    """Resume a copy of the run's first checkpoint."""
    shutil.copytree(trained / "checkpoint-2", out / "checkpoint-2")
    run(tiny, out, **{**KEYS, **keys}, resume_from_checkpoint=True)
    return out


def rates(out: Path) -> dict[int, float]:
    return {int(line["step"]): line["learning_rate"] for line in lines(out) if "loss" in line}


def weights(out: Path) -> bytes:
    return (out / "adapter_model.safetensors").read_bytes()


def changed(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "receipt.json").read_text())["changed_on_resume"]
    return found


def test_an_unchanged_run_resumes_bit_for_bit_without_a_word(
    tiny: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert weights(resumed(tiny, trained, tmp_path)) == weights(trained)
    assert changed(tmp_path) == {}
    assert not re.search("warning|until", capsys.readouterr().err)


def test_another_learning_rate_is_stepped_with(
    tiny: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resumed(tiny, trained, tmp_path, learning_rate=0.03)
    before, now = rates(trained), rates(tmp_path)
    assert now == {step: pytest.approx(3 * before[step]) for step in (3, 4)}
    assert weights(tmp_path) != weights(trained)
    assert changed(tmp_path) == {"learning_rate": {"before": 0.01, "now": 0.03}}
    assert "learning_rate: 0.01 until checkpoint-2, 0.03 from here on" in capsys.readouterr().err
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "checkpoint-4", again / "checkpoint-4")
    run(tiny, again, **{**KEYS, "learning_rate": 0.03}, resume_from_checkpoint=True)
    assert changed(again) == {}, "the new checkpoint has the new rate"


def test_the_receipt_has_what_the_next_step_uses(tiny: Path, trained: Path, tmp_path: Path) -> None:
    resumed(tiny, trained, tmp_path, learning_rate=0.03)
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    used = receipt["applied"]
    assert (used["step"], used["max_steps"], used["processes"]) == (2, 4, 1)
    assert used["scheduler"]["base_lrs"] == [0.03] * len(used["groups"])
    # The rate of the step after the checkpoint, which metrics.jsonl has as well.
    assert {group["lr"] for group in used["groups"]} == {rates(tmp_path)[3]}
    assert used["optimizer"] == "AdamW"
    assert set(used["dtypes"]["trained"]) == {"float32"}
    (kind,) = used["attention"]["modules"]
    assert (kind["class"], kind["implementation"]) == ("LlamaAttention", "sdpa")
    parts = receipt["identity"]
    assert parts["keys"]["learning_rate"] == 0.03
    assert all(len(parts[part]["files"]) > 1 for part in ("model", "tokenizer"))


def test_more_steps_follow_the_schedule_of_the_new_total(
    tiny: Path, trained: Path, tmp_path: Path
) -> None:
    run(tiny, tmp_path / "whole", **{**KEYS, "max_steps": 8})
    resumed(tiny, trained, tmp_path / "longer", max_steps=8)
    whole, longer = rates(tmp_path / "whole"), rates(tmp_path / "longer")
    assert longer == {step: whole[step] for step in range(3, 9)}
    assert changed(tmp_path / "longer") == {"max_steps": {"before": 4, "now": 8}}


def test_intervals_are_those_of_the_config(tiny: Path, trained: Path, tmp_path: Path) -> None:
    resumed(tiny, trained, tmp_path, save_steps=3, logging_steps=4)
    assert (tmp_path / "checkpoint-3").is_dir()
    assert list(rates(tmp_path)) == [4]


def test_a_reduced_rate_stays_reduced(tiny: Path, tmp_path: Path) -> None:
    keys = {"lr_scheduler": "reduce_lr_on_plateau", "val_set_size": 0.1, "eval_steps": 1,
            "save_steps": 2, "max_steps": 4,
            "lr_scheduler_kwargs": {"patience": 0, "threshold": 100.0}}  # fmt: skip
    run(tiny, tmp_path / "whole", **keys)
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "out/checkpoint-2")
    run(tiny, tmp_path / "out", **{**keys, "learning_rate": 0.02}, resume_from_checkpoint=True)
    before, now = rates(tmp_path / "whole"), rates(tmp_path / "out")
    assert before[3] < 0.01, "it was reduced"
    assert now == {step: pytest.approx(2 * before[step]) for step in (3, 4)}


def test_fewer_steps_than_the_checkpoint_has_are_refused_and_the_advice_helps(
    tiny: Path, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(AttnimgError) as caught:
        resumed(tiny, trained, tmp_path, max_steps=1)
    assert (caught.value.code, caught.value.key) == ("resume-past-end", "max_steps")
    assert "set max_steps: 2 " in caught.value.do
    run(tiny, tmp_path, **{**KEYS, "max_steps": 2}, resume_from_checkpoint=True)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_fewer_epochs_than_the_checkpoint_has_are_refused(
    tiny: Path, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(AttnimgError, match="num_epochs ends the run") as caught:
        resumed(tiny, trained, tmp_path, max_steps=None, num_epochs=0.01)
    assert caught.value.code == "resume-past-end"


EARLIER = {"rows": 60, "tokens": 2400, "micro_batch_size": 2, "gradient_accumulation_steps": 1,
           "processes": 1, "seed": 42}  # fmt: skip


@pytest.mark.parametrize(
    "kept",
    [
        pytest.param(EARLIER, id="of attnimg 0.1.0"),
        pytest.param(None, id="of a plain Trainer"),
    ],
)
def test_a_checkpoint_without_an_identity_resumes_with_a_warning(
    tiny: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: Any
) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained / "checkpoint-2", out / "checkpoint-2")
    state = to_trainer_format(out / "checkpoint-2") / STATE_FILE
    if kept is None:
        state.unlink()
    else:
        found = json.loads(state.read_text())
        kept = {**kept, **{key: found["identity"][key] for key in ("rows", "tokens")}}
        state.write_text(json.dumps({**found, "identity": kept}))
    run(tiny, out, **{**KEYS, "learning_rate": 0.02}, resume_from_checkpoint=True)
    said = capsys.readouterr().err
    assert said.count("warning") == 2
    assert "checkpoint-2 has no manifest" in said
    assert re.search("learning_rate and the other keys, base_model, datasets.*can't be compared",
                     said.replace("\n", " "))  # fmt: skip
    assert rates(out)[3] == pytest.approx(2 * rates(trained)[3]), "the config's rate is taken"


def test_what_an_earlier_version_kept_is_compared(tmp_path: Path) -> None:
    point = checkpoint(tmp_path, EARLIER)
    resume.check_resumed_config(config(micro_batch_size=2), point)
    with pytest.raises(AttnimgError, match="another micro_batch_size, seed"):
        resume.check_resumed_config(config(micro_batch_size=4, seed=1), point)
