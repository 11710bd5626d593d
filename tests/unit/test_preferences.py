"""Real runs of preference training: their losses, references, checkpoints and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
from tiny_preferences import labeled, pairs, write
from tiny_run import config_for, lines, losses, make_model, run

from attnimg.train.distributed import Stopped

LORA = {"adapter": "lora", "lora_target_linear": True}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder / "model")
    return folder


def data(folder: Path, rl: str, count: int = 8) -> dict[str, Any]:
    """Write data for a value of rl; return the keys of a config that trains on them."""
    records = labeled(count // 2) if rl == "kto" else pairs(count)
    return {"rl": rl, "learning_rate": 1e-3, **write(folder / f"{rl}.jsonl", records)}


class Plain:
    """Log-probabilities by plain transformers, one sequence at a time."""

    def __init__(self, folder: Path, *, adapter: Path | None = None) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter)
        self.model = model.eval()

    def log_probs(self, prompt: str, answer: str) -> torch.Tensor:
        """Return the log-probability of each token of an answer and its end."""
        before = len(self.tokenizer(prompt)["input_ids"])
        ids = torch.tensor([[*self.tokenizer(prompt + answer)["input_ids"],
                             self.tokenizer.eos_token_id]])  # fmt: skip
        with torch.no_grad():
            found = self.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return found.gather(-1, ids[0, 1:, None])[before - 1 :, 0]

    def total(self, prompt: str, answer: str) -> float:
        """Return the log-probability of an answer."""
        return self.log_probs(prompt, answer).sum().item()


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("rl", ["dpo", "ipo", "orpo", "kto"])
def test_the_loss_is_that_of_a_plain_loop(
    tiny: Path, tmp_path: Path, rl: str, adapter: dict[str, Any]
) -> None:
    """Step 4 has the loss of the model of step 3, which differs from its reference."""
    keys = {**data(tmp_path, rl), **adapter, "learning_rate": 1e-2, "rl_beta": 0.3,
            "micro_batch_size": 8, "save_steps": 3, "max_steps": 4, "lr_scheduler": "constant",
            "shuffle_merged_datasets": False}  # fmt: skip
    if rl == "kto":
        keys |= {"kto_desirable_weight": 2.0, "kto_undesirable_weight": 0.5}
    run(tiny, tmp_path / "out", **keys)
    saved = tmp_path / "out/checkpoint-3"
    policy = Plain(tiny / "model", adapter=saved) if adapter else Plain(saved)
    reference = Plain(tiny / "model")
    expected = PLAIN[rl](policy, reference)
    assert losses(tmp_path / "out")[3] == pytest.approx(expected, abs=1e-4)
    assert abs(losses(tmp_path / "out")[3] - losses(tmp_path / "out")[0]) > 1e-2


def plain_dpo(policy: Plain, reference: Plain, *, squared: bool = False) -> float:
    """Return the mean loss of all pairs: DPO's, or IPO's with its mean over tokens."""
    found = []
    for row in pairs(8):
        ratios = []
        for name in ("chosen", "rejected"):
            texts = (row["prompt"], row[name])
            ratio = policy.total(*texts) - reference.total(*texts)
            ratios.append(ratio / len(policy.log_probs(*texts)) if squared else ratio)
        difference = torch.tensor(ratios[0] - ratios[1])
        if squared:
            found.append((difference - 1 / (2 * 0.3)) ** 2)
        else:
            found.append(-torch.nn.functional.logsigmoid(0.3 * difference))
    return torch.stack(found).mean().item()


def plain_ipo(policy: Plain, reference: Plain) -> float:
    return plain_dpo(policy, reference, squared=True)


def plain_orpo(policy: Plain, _: Plain) -> float:
    """Return the likelihood of prompts and preferred answers, and the odds ratio of the answers."""
    ratios, nll = [], []
    for row in pairs(8):
        start = policy.tokenizer.bos_token
        prompt = start + row["prompt"]
        odds = []
        for name in ("chosen", "rejected"):
            mean = policy.log_probs(prompt, row[name]).mean()
            odds.append(mean - torch.log1p(-mean.exp()))
        ratios.append(torch.nn.functional.logsigmoid(odds[0] - odds[1]))
        nll.append(-policy.log_probs(start, row["prompt"] + row["chosen"]))
    return (torch.cat(nll).mean() - 0.3 * torch.stack(ratios).mean()).item()


def plain_kto(policy: Plain, reference: Plain) -> float:
    """Return KTO's loss of a batch, whose KL term has the answer of the row before each prompt."""
    rows = labeled(4)
    answers = [row["completion"] for row in rows]
    kl = sum(
        policy.total(row["prompt"], answer) - reference.total(row["prompt"], answer)
        for row, answer in zip(rows, [answers[-1], *answers[:-1]], strict=True)
    )
    zero, found = max(kl / len(rows), 0.0), []
    for row in rows:
        texts = (row["prompt"], row["completion"])
        ratio = policy.total(*texts) - reference.total(*texts)
        value = 0.3 * (ratio - zero if row["label"] else zero - ratio)
        weight = 2.0 if row["label"] else 0.5
        found.append(weight * (1 - torch.tensor(value).sigmoid()))
    return torch.stack(found).mean().item()


PLAIN = {"dpo": plain_dpo, "ipo": plain_ipo, "orpo": plain_orpo, "kto": plain_kto}


@pytest.mark.parametrize(
    ("rl", "adapter"), [("dpo", {}), ("dpo", LORA), ("orpo", LORA), ("kto", {})]
)
def test_the_loss_falls(tiny: Path, tmp_path: Path, rl: str, adapter: dict[str, Any]) -> None:
    keys = {**data(tmp_path, rl), **adapter, "micro_batch_size": 8, "max_steps": 20}
    run(tiny, tmp_path / "out", **{**keys, "learning_rate": 1e-2 if adapter else 2e-3})
    found = losses(tmp_path / "out")
    assert found[-1] < found[0] - 0.05
    assert lines(tmp_path / "out")[-1]["rewards/chosen"] > lines(tmp_path / "out")[-1].get(
        "rewards/rejected", -9.0
    )


def test_accumulated_batches_train_as_one(tiny: Path, tmp_path: Path) -> None:
    keys = {**data(tmp_path, "dpo"), "max_steps": 4, "lr_scheduler": "constant"}
    run(tiny, tmp_path / "one", **keys, micro_batch_size=4)
    run(tiny, tmp_path / "two", **keys, micro_batch_size=2, gradient_accumulation_steps=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({}, id="lora"),
        pytest.param({"lora_modules_to_save": ["lm_head", "embed_tokens"]}, id="and embeddings"),
        pytest.param({"adapter": "qlora", "load_in_4bit": True}, id="4 bits"),
        pytest.param({"gradient_checkpointing": True}, id="checkpointed"),
    ],
)
def test_the_reference_of_an_adapter_is_the_model_without_it(
    tiny: Path, tmp_path: Path, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a run, the reference's log-probabilities are those of the first step."""
    from attnimg.train.preferences.trainer import DpoEngine

    found: list[tuple[float, float]] = []
    compute = DpoEngine._compute_loss

    def spy(self: Any, model: Any, inputs: Any, return_outputs: bool) -> Any:
        loss = compute(self, model, inputs, return_outputs)
        metrics = self._metrics["train"]
        reward, log_prob = metrics["rewards/chosen"][-1], metrics["logps/chosen"][-1]
        found.append((log_prob - reward / self.beta, log_prob))
        return loss

    monkeypatch.setattr(DpoEngine, "_compute_loss", spy)
    run(tiny, tmp_path / "out", **{**data(tmp_path, "dpo"), **LORA, "learning_rate": 1e-2,
                                   "micro_batch_size": 8, "max_steps": 4, **keys,
                                   "save_steps": 2})  # fmt: skip
    references, policies = zip(*found, strict=True)
    assert references == pytest.approx([references[0]] * 4, abs=2e-3)
    assert abs(policies[-1] - policies[0]) > 0.05
    saved = sorted(path.name for path in (tmp_path / "out/checkpoint-2").iterdir())
    assert "ref" not in saved
    assert "adapter_model.safetensors" in saved


@pytest.mark.parametrize(("rl", "rows"), [("dpo", 6), ("ipo", 6), ("orpo", 6), ("kto", 3)])
def test_attention_is_proven_for_the_rows_that_the_trainer_calls(
    tiny: Path, tmp_path: Path, rl: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both answers of three pairs are in one batch, padded, without documents to isolate."""
    from transformers import LlamaModel

    from attnimg.facts import Arch
    from attnimg.task import build_problem

    forward, called = LlamaModel.forward, list[tuple[int, int, bool]]()

    def spy(self: Any, input_ids: Any = None, attention_mask: Any = None, **options: Any) -> Any:
        if self.training or not torch.is_grad_enabled():
            called.append((*input_ids.shape, attention_mask is not None))
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **options)

    keys = {**data(tmp_path, rl), "micro_batch_size": 3, "max_steps": 1}
    config = config_for(tiny, **keys)
    problem = build_problem(config, model=None, dropout=0.0, arch=Arch(name="cpu", vendor="cpu"))
    assert (problem.rows, problem.packing) == (rows, False)
    monkeypatch.setattr(LlamaModel, "forward", spy)
    run(tiny, tmp_path / "out", **keys)
    of_step = called[-4 if rl == "kto" else -1 if rl == "orpo" else -2 :]
    assert {(count, masked) for count, _, masked in of_step} == {(rows, True)}
    assert max(length for _, length, _ in of_step) <= config.sequence_len


def test_a_full_run_starts_from_its_reference_and_saves_one_model(
    tiny: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    run(tiny, tmp_path / "out", **data(tmp_path, "dpo"), micro_batch_size=8, max_steps=1,
        val_set_size=2, eval_steps=1, shuffle_merged_datasets=False)  # fmt: skip
    first, evaluated = lines(tmp_path / "out")[0], lines(tmp_path / "out")[-1]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert (first["rewards/chosen"], first["rewards/margins"]) == pytest.approx((0, 0), abs=1e-5)
    assert 0.4 < evaluated["eval_loss"] < 1.0
    assert "eval_rewards/accuracies" in evaluated
    before, after = (
        load_file(folder / "model.safetensors") for folder in (tiny / "model", tmp_path / "out")
    )
    assert before.keys() == after.keys()
    receipt = json.loads((tmp_path / "out/receipt.json").read_text())
    assert receipt["status"] == "done"
    assert receipt["loss"]["compared"]
    assert receipt["attention_check"]["checks"] == 1


@pytest.mark.parametrize("rl", ["dpo", "kto", "orpo"])
def test_a_stopped_run_resumes_exactly(
    tiny: Path, tmp_path: Path, rl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops after step 4, in the middle of the values that are logged at step 6."""
    from attnimg.train.engine import RunTrainer

    keys = {**data(tmp_path, rl), **(LORA if rl == "dpo" else {}), "micro_batch_size": 2,
            "logging_steps": 3, "save_steps": 5, "max_steps": 6,
            "auto_resume_from_checkpoints": True}  # fmt: skip
    run(tiny, tmp_path / "whole", **keys)
    step = RunTrainer.training_step

    def stopping(self: Any, *args: Any, **options: Any) -> Any:
        if self.state.global_step == 3:
            self.stop.number = 15
        return step(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "training_step", stopping)
        with pytest.raises(Stopped):
            run(tiny, tmp_path / "parts", **keys)
    run(tiny, tmp_path / "parts", **keys)
    same = ("step", "loss", "grad_norm", "tokens", "rewards/margins", "logps/chosen", "kl")
    whole, parts = (
        {line["step"]: {key: line.get(key) for key in same} for line in lines(tmp_path / name)}
        for name in ("whole", "parts")
    )
    assert parts == whole
    name = "adapter_model.safetensors" if rl == "dpo" else "model.safetensors"
    first, second = (tmp_path / folder / name for folder in ("whole", "parts"))
    assert first.read_bytes() == second.read_bytes()


def test_another_beta_cannot_be_resumed(tiny: Path, tmp_path: Path) -> None:
    from attnimg.errors import AttnimgError

    keys = {**data(tmp_path, "dpo"), "save_steps": 1, "auto_resume_from_checkpoints": True}
    run(tiny, tmp_path / "out", **keys, max_steps=1)
    with pytest.raises(AttnimgError, match="rl_beta") as caught:
        run(tiny, tmp_path / "out", **keys, max_steps=2, rl_beta=0.5)
    assert caught.value.code == "resume-differs"


def test_a_head_that_computes_other_log_probabilities_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    from attnimg.errors import AttnimgError

    forward = LlamaForCausalLM.forward

    def capped(self: Any, *args: Any, **options: Any) -> Any:
        outputs = forward(self, *args, **{**options, "labels": None})
        outputs.logits = outputs.logits.clamp(-0.1, 0.1)
        return outputs

    monkeypatch.setattr(LlamaForCausalLM, "forward", capped)
    with pytest.raises(AttnimgError) as caught:
        run(tiny, tmp_path / "out", **data(tmp_path, "dpo"), max_steps=1)
    assert (caught.value.code, caught.value.key) == ("loss-differs", "rl")
    run(tiny, tmp_path / "orpo", **data(tmp_path, "orpo"), max_steps=1)


@pytest.fixture(scope="module")
def adapted(tiny: Path) -> Path:
    """Return a folder with an adapter that changes the model, embeddings included."""
    targets = ["q_proj", "up_proj", "embed_tokens"]
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    settings = LoraConfig(r=4, target_modules=targets, modules_to_save=["lm_head"],
                          task_type="CAUSAL_LM", init_lora_weights=False)  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny / "model"), settings)
    model.save_pretrained(tiny / "adapter", save_embedding_layers=False)
    return tiny / "adapter"


def continued(folder: Path, adapter: Path, **keys: Any) -> dict[str, Any]:
    """Return the keys of a run that continues an adapter, with the adapter's settings."""
    from attnimg.train.saved_adapter import with_saved_adapter

    given = {"adapter": "lora", "lora_model_dir": str(adapter), "micro_batch_size": 8, **keys}
    values = with_saved_adapter(config_for(folder, **given)).model_dump(exclude_unset=True)
    return {key: values[key] for key in values if key != "output_dir"}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("rl", ["dpo", "kto"])
def test_the_reference_of_a_saved_adapter_is_a_copy_of_it(
    tiny: Path, tmp_path: Path, adapted: Path, rl: str
) -> None:
    """Step 4 has the loss of the model of step 3; the reference is the adapter before training."""
    keys = {"rl_beta": 0.3, "learning_rate": 1e-2, "save_steps": 3, "max_steps": 4,
            "lr_scheduler": "constant", "shuffle_merged_datasets": False}  # fmt: skip
    if rl == "kto":
        keys |= {"kto_desirable_weight": 2.0, "kto_undesirable_weight": 0.5}
    keys = continued(tiny, adapted, **{**data(tmp_path, rl), **keys})
    out = tmp_path / "out"
    run(tiny, out, **keys)
    first, *_, last = losses(out)
    if rl == "dpo":
        assert first == pytest.approx(0.6931, abs=1e-4)
    saved = out / "checkpoint-3"
    policy = Plain(tiny / "model", adapter=saved)
    reference = Plain(tiny / "model", adapter=adapted)
    assert last == pytest.approx(PLAIN[rl](policy, reference), abs=1e-4)
    assert abs(last - PLAIN[rl](policy, Plain(tiny / "model"))) > 1e-2
    for folder in (saved, out):
        assert not (folder / "ref").exists()
        assert (folder / "adapter_model.safetensors").is_file()
        assert not (folder / "README.md").exists()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_run_with_a_saved_adapter_resumes_with_the_same_reference(
    tiny: Path, tmp_path: Path, adapted: Path
) -> None:
    import shutil

    from attnimg.errors import AttnimgError

    shutil.copytree(adapted, tmp_path / "adapter")
    keys = continued(tiny, tmp_path / "adapter", **data(tmp_path, "dpo"), save_steps=2, max_steps=4,
                     auto_resume_from_checkpoints=True)  # fmt: skip
    run(tiny, tmp_path / "out", **keys)
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoint-4")
    run(tiny, tmp_path / "again", **keys)
    name = "adapter_model.safetensors"
    assert losses(tmp_path / "again") == losses(tmp_path / "out")
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()

    shutil.copy(tmp_path / "out" / name, tmp_path / "adapter" / name)
    shutil.rmtree(tmp_path / "again/checkpoint-4")
    with pytest.raises(AttnimgError) as caught:
        run(tiny, tmp_path / "again", **keys)
    assert (caught.value.code, caught.value.key) == ("resume-differs", "lora_model_dir")
    assert "put the earlier adapter_model.safetensors back" in caught.value.do


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({"lora_modules_to_save": ["lm_head", "embed_tokens"]}, id="saved modules"),
        pytest.param({"peft_init_lora_weights": "gaussian"}, id="gaussian"),
        pytest.param({"peft_init_lora_weights": "orthogonal"}, id="orthogonal"),
        pytest.param({"reinit_weights": True}, id="random weights"),
        pytest.param({"peft_use_dora": True}, id="dora"),
    ],
)
def test_the_first_loss_of_an_adapter_is_ln_2(
    tiny: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    keys = {**data(tmp_path, "dpo"), **LORA, "lora_r": 4, **keys}
    run(tiny, tmp_path / "out", **keys, max_steps=1, micro_batch_size=8)
    first = lines(tmp_path / "out")[0]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-4)
