"""RDMA adapters as sysfs shows them, and what doctor says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from attnimg.machine.network import Rdma, judge_rdma, read_rdma

READY = Rdma(
    adapters={"mlx5_0": "mlx5_core"}, device_files=True, library=True, locked_bytes=None
)  # fmt: skip


@pytest.mark.parametrize(
    "rdma",
    [
        pytest.param(READY, id="Mellanox, with all that it needs"),
        pytest.param(replace(READY, locked_bytes=8 << 30), id="a limit that is large enough"),
        pytest.param(replace(READY, adapters={"x": "bnxt_en", "y": ""}), id="another maker"),
        pytest.param(
            Rdma(adapters={}, device_files=False, library=False, locked_bytes=65536),
            id="no adapter needs nothing",
        ),
    ],
)
def test_an_adapter_with_all_that_nccl_needs_passes(rdma: Rdma) -> None:
    status, what, do = judge_rdma(rdma)
    assert (status, do) == ("ok", "")
    assert what.startswith(", ".join(rdma.adapters) or "no RDMA adapter")


@pytest.mark.parametrize(
    ("rdma", "what", "do"),
    [
        (replace(READY, device_files=False), "no /dev/infiniband", "--device /dev/infiniband"),
        (replace(READY, library=False), "no libibverbs.so.1", "apt-get install libibverbs1"),
        (replace(READY, locked_bytes=8 << 20), "8,192 KiB", "--ulimit memlock=-1"),
        (replace(READY, adapters={"rdmap0s31": "efa"}), "aws-ofi-nccl", "child image"),
    ],
)
def test_what_nccl_lacks_for_rdma_is_named_with_advice(rdma: Rdma, what: str, do: str) -> None:
    found = judge_rdma(rdma)
    assert found[0] == "warn"
    assert what in found[1]
    assert do in found[2]


def test_one_thing_that_is_missing_hides_no_other() -> None:
    _, what, do = judge_rdma(replace(READY, library=False, device_files=False, locked_bytes=65536))
    assert all(word in what for word in ("libibverbs.so.1", "/dev/infiniband", "64 KiB"))
    assert "--device /dev/infiniband --ulimit memlock=-1 --network host" in do


def test_adapters_are_read_with_their_drivers(tmp_path: Path) -> None:
    for adapter, driver in (("mlx5_0", "mlx5_core"), ("efa_0", "efa")):
        device = tmp_path / "sys/devices" / adapter
        (tmp_path / "sys/bus/drivers" / driver).mkdir(parents=True)
        (device / "infiniband" / adapter).mkdir(parents=True)
        (device / "driver").symlink_to(tmp_path / "sys/bus/drivers" / driver)
        (device / "infiniband" / adapter / "device").symlink_to(device)
        listed = tmp_path / "sys/class/infiniband"
        listed.mkdir(parents=True, exist_ok=True)
        (listed / adapter).symlink_to(device / "infiniband" / adapter)
    (tmp_path / "dev/infiniband").mkdir(parents=True)
    (tmp_path / "dev/infiniband/uverbs0").touch()
    (tmp_path / "usr/lib/x86_64-linux-gnu").mkdir(parents=True)
    (tmp_path / "usr/lib/x86_64-linux-gnu/libibverbs.so.1").touch()
    found = read_rdma(tmp_path)
    assert found.adapters == {"efa_0": "efa", "mlx5_0": "mlx5_core"}
    assert (found.device_files, found.library) == (True, True)


def test_a_machine_without_adapters_is_read(tmp_path: Path) -> None:
    found = read_rdma(tmp_path)
    assert (found.adapters, found.device_files, found.library) == ({}, False, False)
