"""A backend that another package adds by an entry point is judged, proven and used like others."""

from __future__ import annotations

import os
import subprocess
import sys
from textwrap import dedent

import pytest
from tiny_models import tiny_model

import attnimg
from attnimg import backends

RIGHT = """
    from attnimg.facts import Backend, Needs

    def load():
        from attnimg.backends._exact import exact_attention

        return exact_attention("acme_attention")

    BACKEND = Backend(
        name="acme_attention",
        rank=1,
        rank_why="is a test",
        summary="a test",
        packing="native",
        applied_as="attnimg_acme",
        load_function=load,
        needs=Needs(features=frozenset({"window", "dropout"})),
    )
"""
# Its output is 5 % too large.
WRONG = RIGHT.replace(
    'return exact_attention("acme_attention")',
    """right = exact_attention("acme_attention")

        def wrong(*arguments, **options):
            out, weights = right(*arguments, **options)
            return 1.05 * out, weights

        return wrong""",
)
CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
          "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a package with an entry point, as pip would."""

    def forget():
        backends.all_backends.cache_clear()
        backends.added_backends.cache_clear()
        sys.modules.pop("acme", None)

    def write(code, entry="acme = acme:BACKEND"):
        (tmp_path / "acme.py").write_text(dedent(code))
        info = tmp_path / "acme-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[attnimg.backends]\n{entry}\n")
        forget()

    monkeypatch.syspath_prepend(str(tmp_path))
    # For the processes of the proofs.
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("ATTNIMG_CACHE", str(tmp_path / "cache"))
    yield write
    monkeypatch.undo()
    forget()


def test_a_model_runs_it(install):
    install(RIGHT)
    model = tiny_model("llama", "sdpa")
    choice = attnimg.apply(model, packing=True, sequence_len=64)
    assert choice.backend == "acme_attention"
    assert model.config._attn_implementation == "attnimg_acme"
    attnimg.restore(model)


def test_a_wrong_one_fails_its_proof_and_the_next_one_is_used(install, caplog):
    install(WRONG)
    choice = attnimg.select(CONFIG, sequence_len=64).verify()
    assert choice.backend == "sdpa"
    assert [(proof.backend, proof.passed) for proof in choice.proofs] == [
        ("acme_attention", False),
        ("sdpa", True),
    ]
    assert "acme_attention failed" in caplog.text


def test_it_is_chosen_by_its_rank_and_proven_again_when_its_code_changes(install):
    install(RIGHT)
    choice = attnimg.select(CONFIG, sequence_len=64).verify()
    assert choice.backend == "acme_attention"
    assert [(proof.passed, proof.cached) for proof in choice.proofs] == [(True, False)]
    assert attnimg.select(CONFIG, sequence_len=64).verify().proofs[0].cached
    install(RIGHT + "\n    # changed\n")
    assert not attnimg.select(CONFIG, sequence_len=64).verify().proofs[0].cached


def test_a_config_may_name_it(install, tmp_path):
    install(RIGHT)
    config = tmp_path / "run.yaml"
    config.write_text(
        "base_model: org/model\nattn_implementation: acme_attention\nlearning_rate: 1e-4\n"
        "datasets: [{path: a.jsonl, type: completion}]\n"
    )
    found = subprocess.run(
        [sys.executable, "-m", "attnimg", "check", str(config)], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr


UNUSABLE = [
    pytest.param("raise RuntimeError('no such GPU')", "acme = acme:BACKEND", "no such GPU",
                 id="its-import-raises"),
    pytest.param("BACKEND = 5", "acme = acme:BACKEND", "found int", id="it-is-no-backend"),
    pytest.param("", "acme = acme:BACKEND", "no attribute 'BACKEND'", id="it-is-missing"),
    pytest.param(RIGHT.replace('name="acme_attention"', 'name="sdpa"'), "acme = acme:BACKEND",
                 "another backend has already", id="its-name-is-taken"),
    pytest.param(RIGHT.replace("attnimg_acme", "acme_flash"), "acme = acme:BACKEND",
                 "that begins with attnimg_", id="transformers-would-take-its-name"),
    pytest.param("import sys\nsys.exit('no GPU here')", "acme = acme:BACKEND", "no GPU here",
                 id="its-import-ends-the-process"),
    pytest.param(RIGHT.replace('name="acme_attention"', 'name="auto"'), "acme = acme:BACKEND",
                 "found the name auto", id="auto-would-mean-it"),
    pytest.param(RIGHT.replace("attnimg_acme", "attnimg_torch_math"), "acme = acme:BACKEND",
                 "another backend has applied_as", id="it-would-replace-sdpa_math"),
    pytest.param(RIGHT.replace("attnimg_acme", "attnimg_router_1"), "acme = acme:BACKEND",
                 "begins with attnimg_", id="it-would-replace-a-router"),
    pytest.param(RIGHT.replace("attnimg_acme", "attnimg_acme\\n"), "acme = acme:BACKEND",
                 "begins with attnimg_", id="its-name-has-a-line-end"),
    pytest.param(RIGHT.replace("rank=1,", "rank=float('nan'),"), "acme = acme:BACKEND",
                 "a rank is not", id="its-rank-is-no-number"),
    pytest.param(RIGHT.replace("rank=1,", "rank=1, ranks=(5,),"), "acme = acme:BACKEND",
                 "other things than Rank", id="its-ranks-are-none"),
    pytest.param(RIGHT.replace("load_function=load", "load_function=5"), "acme = acme:BACKEND",
                 "load_function", id="it-can-not-be-loaded"),
    pytest.param(RIGHT.replace('packing="native"', 'packing="both"'), "acme = acme:BACKEND",
                 "found packing 'both'", id="its-packing-is-unknown"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "entry", "problem"), UNUSABLE)
def test_one_that_can_not_be_used_is_a_warning(install, code, entry, problem):
    install(code, entry)
    choice = attnimg.select(CONFIG, sequence_len=64)
    assert choice.backend == "sdpa"
    (warning,) = choice.warnings
    assert warning.code == "bad-backend"
    assert problem in warning.what
    assert "acme" in warning.what


def test_two_with_one_name_in_transformers_are_not_mixed_up(install):
    install(
        RIGHT + "\n    from dataclasses import replace\n"
        "    SECOND = [BACKEND, replace(BACKEND, name='acme_other', rank=2)]\n",
        entry="acme = acme:SECOND",
    )
    choice = attnimg.select(CONFIG, sequence_len=64)
    assert choice.backend == "acme_attention"
    assert ["another backend has applied_as" in warning.what for warning in choice.warnings] == [
        True
    ]


@pytest.mark.parametrize("count", [200, 201, 20_000])
def test_more_backends_than_can_be_judged_are_refused_as_a_whole(install, count):
    install(
        RIGHT + "\n    from dataclasses import replace\n"
        "    MANY = [replace(BACKEND, name=f'acme_{n}', applied_as=f'attnimg_acme_{n}')\n"
        f"            for n in range({count})]\n",
        entry="acme = acme:MANY",
    )
    choice = attnimg.select(CONFIG, sequence_len=64)
    if count == backends.MOST_ADDED:
        assert (choice.backend, choice.warnings) == ("acme_0", ())
        return
    assert choice.backend == "sdpa"
    (warning,) = choice.warnings
    assert f"found {count:,} backends of other packages, needed at most 200" in warning.what
