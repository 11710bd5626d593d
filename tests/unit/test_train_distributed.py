"""Test that the environment of a process group is complete, or absent."""

from __future__ import annotations

import json

import pytest

from attnimg.backends import find_backend
from attnimg.errors import AttnimgError
from attnimg.run_facts import Plan, Verdict
from attnimg.train import distributed
from attnimg.train.run import _comparable_plan

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PMI_SIZE",
         "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # fmt: skip
WHOLE = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host",
         "MASTER_PORT": "29500"}  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"RANK": "1"}, id="RANK alone"),
        pytest.param({"LOCAL_RANK": "0"}, id="LOCAL_RANK alone"),
        pytest.param({"WORLD_SIZE": "2"}, id="WORLD_SIZE alone"),
        pytest.param({**WHOLE, "WORLD_SIZE": "abc"}, id="no number"),
        pytest.param({**WHOLE, "WORLD_SIZE": "-4"}, id="negative"),
        pytest.param({**WHOLE, "WORLD_SIZE": "9" * 30}, id="more processes than there are"),
        pytest.param({**WHOLE, "MASTER_PORT": "65536"}, id="a port that does not exist"),
        pytest.param(
            {**WHOLE, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "0"}, id="no processes"
        ),
        pytest.param({**WHOLE, "RANK": "4"}, id="a rank beyond the group"),
        pytest.param({**WHOLE, "LOCAL_RANK": "4"}, id="a local rank beyond the rank"),
        pytest.param({**WHOLE, "MASTER_PORT": ""}, id="an empty port"),
        pytest.param({**WHOLE, "WORLD_SIZE": "\u0664"}, id="digits of another script"),
        pytest.param({"PMI_SIZE": "2"}, id="processes of MPI"),
        pytest.param({"OMPI_COMM_WORLD_SIZE": "4"}, id="processes of Open MPI"),
    ],
)
def test_leftovers_of_a_group_are_refused(
    values: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all(monkeypatch, values)
    with pytest.raises(AttnimgError) as caught:
        distributed.require_group()
    assert caught.value.code == "bad-environment"
    assert all(f"{name}={value}" in caught.value.why for name, value in values.items())
    # What it says to do helps.
    _, _, names = caught.value.do.partition("unset ")
    for name in names.partition(";")[0].split():
        monkeypatch.delenv(name)
    distributed.require_group()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


def test_a_long_value_is_refused_and_not_shown_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {**WHOLE, "WORLD_SIZE": "9" * 5000})
    with pytest.raises(AttnimgError) as caught:
        distributed.require_group()
    assert len(caught.value.why) < 400
    assert distributed.world_size() == 1


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({}, id="none"),
        pytest.param(WHOLE, id="torchrun's"),
        pytest.param(
            {**WHOLE, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, id="a group of 1"
        ),
        pytest.param({"MASTER_ADDR": "host", "MASTER_PORT": "1"}, id="the address alone"),
        pytest.param({"PMI_SIZE": "1"}, id="one process of MPI"),
        pytest.param({**WHOLE, "OMPI_COMM_WORLD_SIZE": "4"}, id="torchrun's and MPI's"),
    ],
)
def test_a_whole_group_and_none_are_fine(
    values: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all(monkeypatch, values)
    distributed.require_group()


def test_the_plan_that_processes_compare_has_plain_values_only() -> None:
    backend = find_backend("sdpa")
    assert backend is not None
    verdict = Verdict(backend=backend, rank=1, reasons=())
    facts = _comparable_plan(
        Plan(requested="auto", chosen=verdict, reason="it fits", verdicts=(verdict,))
    )
    assert json.loads(json.dumps(facts))["chosen"] == "sdpa"


def test_a_local_rank_beyond_the_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {**WHOLE, "LOCAL_RANK": "2"})
    distributed._require_device(3)
    with pytest.raises(AttnimgError, match="rank 3 has no GPU") as caught:
        distributed._require_device(2)
    assert "found LOCAL_RANK=2 and 2 GPUs" in caught.value.why
    assert "--nproc-per-node 2" in caught.value.do
