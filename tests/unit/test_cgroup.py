"""Limits of control groups, in trees as kernels, container engines and Slurm make them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from attnimg.cgroup import cpu_quota, memory_limit, oom_kills

V1_CPU = "30 29 0:29 {top} /sys/fs/cgroup/cpu,cpuacct ro,nosuid - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "32 29 0:30 {top} /sys/fs/cgroup/memory ro,nosuid - cgroup cgroup rw,memory"
V2 = "30 29 0:29 {top} /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw,nsdelegate"
HYBRID = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
OTHER = "33 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset"
NO_LIMIT = "9223372036854771712"


def v1(folder: str, quota: str, period: str = "100000") -> dict[str, str]:
    place = f"sys/fs/cgroup/cpu,cpuacct{folder}"
    return {f"{place}/cpu.cfs_quota_us": f"{quota}\n", f"{place}/cpu.cfs_period_us": f"{period}\n"}


def v2(folder: str, limit: str) -> dict[str, str]:
    return {f"sys/fs/cgroup{folder}/cpu.max": f"{limit}\n"}


def memory_v1(folder: str, limit: str) -> dict[str, str]:
    return {f"sys/fs/cgroup/memory{folder}/memory.limit_in_bytes": f"{limit}\n"}


def memory_v2(folder: str, limit: str) -> dict[str, str]:
    return {f"sys/fs/cgroup{folder}/memory.max": f"{limit}\n"}


def write(root: Path, own: str, mounts: Sequence[str], files: Mapping[str, str]) -> Path:
    lists = {"proc/self/cgroup": own + "\n", "proc/self/mountinfo": "\n".join(mounts) + "\n"}
    for name, text in {**lists, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("own", "mounts", "files", "quota"),
    [
        pytest.param("0::/", [V2.format(top="/")], v2("", "50000 100000"), 0.5,
                     id="v2, docker run --cpus 0.5"),
        pytest.param("0::/", [V2.format(top="/")], v2("", "max 100000"), None,
                     id="v2, max is no quota"),
        pytest.param("0::/", [V2.format(top="/")], {}, None,
                     id="v2, the root cgroup of a machine has no cpu.max"),
        pytest.param("0::/a/b/c", [V2.format(top="/")],
                     v2("/a/b/c", "max 100000") | v2("/a/b", "300000 99000")
                     | v2("/a", "150000 100000"),
                     1.5, id="v2, nested: the smallest quota above counts"),
        pytest.param("0::/kubepods/pod1/c1", [V2.format(top="/")],
                     v2("/kubepods/pod1/c1", "25000 100000") | v2("/kubepods", "400000 100000"),
                     0.25, id="v2, nested: its own quota counts if it is smaller"),
        pytest.param("0::/../../job", [V2.format(top="/")], v2("", "200000 100000"), 2.0,
                     id="v2, a cgroup outside of its namespace"),
        pytest.param("0::/other", [V2.format(top="/docker/1")], v2("", "100000 50000"), 2.0,
                     id="v2, a mount of another cgroup than its own"),
        pytest.param("0::/", [V2.format(top="/")], v2("", "50000"), None,
                     id="v2, malformed: no period"),
        pytest.param("0::/", [V2.format(top="/")], v2("", "a b"), None, id="v2, malformed: words"),
        pytest.param("0::/", [V2.format(top="/")], v2("", "50000 0"), None,
                     id="v2, malformed: a period of 0"),
        pytest.param("0::/", [V2.format(top="/")], v2("", ""), None, id="v2, malformed: empty"),
        pytest.param("0::/a/b", [V2.format(top="/")], v2("/a/b", "?") | v2("/a", "50000 100000"),
                     0.5, id="one malformed file hides no quota above it"),
        pytest.param("4:cpu,cpuacct:/docker/1\n0::/docker/1",
                     [V1_CPU.format(top="/docker/1"), HYBRID], v1("", "50000"), 0.5,
                     id="v1 and hybrid, docker run --cpus 0.5"),
        pytest.param("4:cpuacct,cpu:/docker/1", [V1_CPU.format(top="/docker/1")], v1("", "-1"),
                     None, id="v1, -1 is no quota"),
        pytest.param("4:cpu:/a/b", [OTHER, V1_CPU.format(top="/")],
                     v1("/a/b", "-1") | v1("/a", "20000", "10000") | v1("", "-1"), 2.0,
                     id="v1, nested: the quota above counts"),
        pytest.param("4:cpu:/a/b", [V1_CPU.format(top="/")], v1("/a/b", "50000", ""), None,
                     id="v1, malformed: an empty period"),
        pytest.param("2:cpuacct:/a", [V1_CPU.format(top="/")], v1("", "50000"), None,
                     id="v1, only the controller cpu has a quota"),
        pytest.param("nonsense\n::\n", ["nonsense", "- -", ""], {}, None, id="malformed lists"),
    ],
)  # fmt: skip
def test_quota(
    tmp_path: Path, own: str, mounts: list[str], files: dict[str, str], quota: float | None
) -> None:
    assert cpu_quota(root=write(tmp_path, own, mounts, files)) == quota


def test_without_proc_there_is_no_limit(tmp_path: Path) -> None:
    assert cpu_quota(root=tmp_path) is None
    assert memory_limit(root=tmp_path) is None
    assert oom_kills(root=tmp_path) == 0


@pytest.mark.parametrize(
    ("own", "mounts", "files", "limit"),
    [
        pytest.param("0::/", [V2.format(top="/")], memory_v2("", "629145600"), 629145600,
                     id="v2, a container that sees its own group as the top"),
        pytest.param("0::/slurm/job_7/step_0", [V2.format(top="/")],
                     memory_v2("/slurm/job_7", "1048576") | memory_v2("/slurm/job_7/step_0", "max"),
                     1048576, id="v2, a job's limit above its step"),
        pytest.param("0::/", [V2.format(top="/")], memory_v2("", "max"), None,
                     id="v2, max is no limit"),
        pytest.param("0::/../../job", [V2.format(top="/")], memory_v2("", "4096"), 4096,
                     id="v2, a group outside of its namespace"),
        pytest.param("5:cpuset:/docker/ab\n4:memory:/docker/ab\n0::/",
                     [OTHER, V1_MEMORY.format(top="/"), HYBRID], memory_v1("", "629145600"),
                     629145600, id="v1, the host's path in a container with its group as the top"),
        pytest.param("4:memory:/docker/ab", [V1_MEMORY.format(top="/docker/ab")],
                     memory_v1("", "629145600"), 629145600, id="v1, docker run --memory 600m"),
        pytest.param("4:memory:/docker/ab", [V1_MEMORY.format(top="/")],
                     memory_v1("", NO_LIMIT) | memory_v1("/docker/ab", "4096"), 4096,
                     id="v1, the host's tree"),
        pytest.param("4:memory:/docker/ab", [V1_MEMORY.format(top="/")], memory_v1("", NO_LIMIT),
                     None, id="v1 without a limit"),
        pytest.param("4:memory:/a", [V1_CPU.format(top="/")], memory_v1("/a", "4096"), None,
                     id="v1, the controller is not mounted"),
    ],
)  # fmt: skip
def test_the_memory_limit(
    tmp_path: Path, own: str, mounts: list[str], files: dict[str, str], limit: int | None
) -> None:
    assert memory_limit(root=write(tmp_path, own, mounts, files)) == limit


@pytest.mark.parametrize(
    ("own", "mount", "file", "text", "kills"),
    [
        pytest.param("0::/", V2, "memory.events", "low 0\nhigh 0\nmax 9\noom 2\noom_kill 2\n", 2,
                     id="v2"),
        pytest.param("4:memory:/docker/ab\n0::/", V1_MEMORY, "memory/memory.oom_control",
                     "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", 3, id="v1"),
        pytest.param("4:memory:/docker/ab", V1_MEMORY, "memory/memory.oom_control",
                     "oom_kill_disable 0\nunder_oom 0\n", 0,
                     id="v1 of an old kernel, which does not count"),
    ],
)  # fmt: skip
def test_the_kills(tmp_path: Path, own: str, mount: str, file: str, text: str, kills: int) -> None:
    files = {f"sys/fs/cgroup/{file}": text}
    assert oom_kills(root=write(tmp_path, own, [mount.format(top="/")], files)) == kills
