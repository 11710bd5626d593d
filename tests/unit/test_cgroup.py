"""Memory limits of control groups, in both versions, as containers and Slurm jobs see them."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnimg.cgroup import memory_limit, oom_kills

NO_LIMIT = "9223372036854771712\n"
V1 = "5:cpuset:/docker/ab\n4:memory:/docker/ab\n0::/\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "629145600\n"},
            629145600, id="version 2, a container that sees its own group as the top",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/slurm/job_7/step_0\n",
             "sys/fs/cgroup/slurm/job_7/memory.max": "1048576\n",
             "sys/fs/cgroup/slurm/job_7/step_0/memory.max": "max\n"},
            1048576, id="version 2, a job's limit above its step",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"},
            None, id="version 2 without a limit",
        ),
        pytest.param(
            {"proc/self/cgroup": V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "629145600\n"},
            629145600, id="version 1, a container that sees its own group as the top",
        ),
        pytest.param(
            {"proc/self/cgroup": V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT,
             "sys/fs/cgroup/memory/docker/ab/memory.limit_in_bytes": "4096\n"},
            4096, id="version 1, the host's tree",
        ),
        pytest.param(
            {"proc/self/cgroup": V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT},
            None, id="version 1 without a limit",
        ),
        pytest.param({}, None, id="no control groups"),
    ],
)  # fmt: skip
def test_the_limit(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    assert memory_limit(root=write(tmp_path, files)) == limit


@pytest.mark.parametrize(
    ("files", "kills"),
    [
        pytest.param(
            {"proc/self/cgroup": "0::/\n",
             "sys/fs/cgroup/memory.events": "low 0\nhigh 0\nmax 9\noom 2\noom_kill 2\n"},
            2, id="version 2",
        ),
        pytest.param(
            {"proc/self/cgroup": V1,
             "sys/fs/cgroup/memory/memory.oom_control":
             "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"},
            3, id="version 1",
        ),
        pytest.param(
            {"proc/self/cgroup": V1,
             "sys/fs/cgroup/memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n"},
            0, id="version 1 of an old kernel, which does not count",
        ),
        pytest.param({}, 0, id="no control groups"),
    ],
)  # fmt: skip
def test_the_kills(tmp_path: Path, files: dict[str, str], kills: int) -> None:
    assert oom_kills(root=write(tmp_path, files)) == kills
