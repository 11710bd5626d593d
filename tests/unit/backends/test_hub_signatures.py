"""Hub kernels are pinned by kernels.lock, and checked for their signature before they run."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import kernels
import kernels.verify
import pytest
import torch
from kernels.verify import VerificationResult
from tiny_models import tiny_model

from attnimg import application
from attnimg.backends import find_backend
from attnimg.errors import AttnimgError

FLASH = "kernels-community/flash-attn2"
FOLDER = Path(__file__).parents[2] / "fixtures" / "flash_attn2"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stand in for the hub, which is not here: one kernel, any revision, and what was asked."""
    asked = []

    def install_kernel(repo, *, revision, version, **_):
        asked.append(("install", repo, revision or version))
        return FOLDER / "build/torch-cpu"

    def get_kernel(repo, *, revision=None, version=None, **_):
        asked.append(("run", repo, revision or version))
        return kernels.get_local_kernel(FOLDER)

    def get_locked_kernel(repo, *, lockfile, **_):
        return get_kernel(repo, revision=f"of {lockfile}")

    monkeypatch.setattr(kernels, "install_kernel", install_kernel)
    monkeypatch.setattr(kernels, "get_kernel", get_kernel)
    monkeypatch.setattr(kernels, "get_locked_kernel", get_locked_kernel)
    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel_hub", get_kernel)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    monkeypatch.chdir(tmp_path)
    with application.restore_registries():
        yield asked


def verifier(monkeypatch, result):
    def verify_variant(folder):
        assert (folder / "metadata.json").is_file()
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(kernels.verify, "verify_variant", verify_variant)


PATHS = [
    pytest.param(FLASH, id="a path that transformers loads"),
    pytest.param(f"{FLASH}:flash_attn_varlen_func", id="a path that attnimg loads"),
]
RESULT = VerificationResult


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("result", "shown"),
    [
        (RESULT.SignatureVerificationFailure(reason="signed by a stranger"), "by a stranger"),
        (RESULT.DigestVerificationFailure(violations=["a.so has changed"]), "a.so has changed"),
        (RESULT.SignatureBundleInvalid(reason="not JSON"), "not JSON"),
        (RESULT.MetadataMissing(), "MetadataMissing"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_a_signature_that_does_not_hold_stops_before_the_kernel_runs(
    monkeypatch, hub, path, result, shown
):
    verifier(monkeypatch, result)
    with pytest.raises(AttnimgError) as caught:
        application.load_and_register(find_backend(path))
    assert caught.value.code == "kernel-signature"
    assert caught.value.exit_code == 1
    assert shown in caught.value.why
    assert [verb for verb, *_ in hub] == ["install"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("result", "said"),
    [
        pytest.param(RESULT.SignatureBundleMissing(), "not signed", id="no signature"),
        pytest.param(RESULT.DigestMissing(), "no digest", id="a signature over no files"),
        pytest.param(OSError("no route to host"), "no route to host", id="no trust root"),
        pytest.param(RESULT.Success(), None, id="a signature that holds"),
    ],
)
def test_a_kernel_that_can_not_be_checked_runs_and_is_said(
    monkeypatch, hub, caplog, path, result, said
):
    verifier(monkeypatch, result)
    application.load_and_register(find_backend(path))
    assert "run" in [verb for verb, *_ in hub]
    assert ("was not checked" in caplog.text) == (said is not None)
    assert said is None or said in caplog.text


def test_offline_no_server_is_asked_for_a_signature(monkeypatch, hub, caplog):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    verifier(monkeypatch, AssertionError("asked"))
    application.load_and_register(find_backend(FLASH))
    assert "HF_HUB_OFFLINE" in caplog.text
    assert "asked" not in caplog.text


def test_a_kernel_of_a_local_folder_needs_no_signature(monkeypatch, hub, caplog):
    monkeypatch.setenv("LOCAL_KERNELS", f"{FLASH}={FOLDER}")
    application.load_and_register(find_backend(FLASH))
    assert "install" not in [verb for verb, *_ in hub]
    assert "was not checked" not in caplog.text


def write_lock():
    locked = {
        "dependency": {"repo-id": FLASH, "version": 1},
        "lock": {"commit": COMMIT},
    }
    Path("kernels.lock").write_text(json.dumps([locked]), encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "name", "checked", "run"),
    [
        pytest.param(FLASH, f"{FLASH}@{COMMIT}", COMMIT, COMMIT, id="for transformers"),
        pytest.param(f"{FLASH}@v1", f"{FLASH}@v1", "v1", "v1", id="not over the user's own"),
        pytest.param(
            f"{FLASH}:flash_attn_varlen_func", None, COMMIT, "of kernels.lock", id="for attnimg"
        ),
    ],
)
def test_a_lock_file_decides_the_revision(monkeypatch, hub, path, name, checked, run):
    verifier(monkeypatch, RESULT.Success())
    write_lock()
    applied = application.load_and_register(find_backend(path))
    assert name is None or applied == name
    assert hub == [("install", FLASH, checked), ("run", FLASH, run)]


def test_a_model_runs_the_locked_revision_and_no_other(monkeypatch, hub):
    verifier(monkeypatch, RESULT.Success())
    write_lock()
    backend = find_backend(FLASH)
    model = tiny_model("llama", application.load_and_register(backend))
    application.require_applied(model, backend)
    ids = torch.arange(3, 19)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert {revision for verb, _, revision in hub} == {COMMIT}


@pytest.mark.parametrize("path", PATHS)
def test_a_lock_file_that_is_none_is_an_error_and_no_other_revision(hub, path):
    Path("kernels.lock").write_text(f'{{"{FLASH}": 1}}', encoding="utf-8")
    with pytest.raises(AttnimgError) as caught:
        application.load_and_register(find_backend(path))
    assert caught.value.code == "import-error"
    assert hub == []
