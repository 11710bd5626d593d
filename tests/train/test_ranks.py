"""Two ranks that differ in one thing end both, say in what, and train nothing.

Each rank has a folder of its own, as on a machine of its own; only output_dir is one.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from forked_runs import Ranks
from served_kernels import serve
from tiny_run import make_model

PROGRAM = """
import os, sys
from pathlib import Path
os.chdir(Path(sys.argv[1]) / os.environ["RANK"])
if Path("before.py").exists():
    exec(Path("before.py").read_text())
from attnimg.__main__ import run
from attnimg.train.distributed import end_process
end_process(run(["train", "run.yaml"]))
"""
NORMS = Path(__file__).parents[1] / "fixtures/hub_norms/kernel.py"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Pair:
    """The folders and variables of two ranks, the same until a test changes one of them."""

    def __init__(self, folder: Path, model: Path, **keys: object) -> None:
        self.folder = folder
        self.own: list[dict[str, str]] = [{}, {}]
        self.keys = {
            "base_model": "model", "output_dir": str(folder / "out"), "max_steps": 1,
            "learning_rate": 1e-4, "micro_batch_size": 1, "sequence_len": 32, "bf16": False,
            "save_strategy": "no", "ddp_timeout": 60, "attn_implementation": "eager",
            "datasets": [{"path": "data.jsonl", "type": "completion"}], **keys,
        }  # fmt: skip
        (folder / "program.py").write_text(PROGRAM)
        for rank in range(2):
            shutil.copytree(model, self[rank] / "model")
            (self[rank] / "data.jsonl").write_text('{"text": "one two three"}\n' * 8)
            self.write(rank)

    def __getitem__(self, rank: int) -> Path:
        return self.folder / str(rank)

    def write(self, rank: int, **keys: object) -> None:
        (self[rank] / "run.yaml").write_text(json.dumps({**self.keys, **keys}))

    def run(self) -> tuple[list[int | None], list[str]]:
        ranks = Ranks([self.folder / "program.py", self.folder], env=ENV, own=self.own)
        said = ["".join(fork.communicate(timeout=100)) for fork in ranks.forks]
        return [fork.returncode for fork in ranks.forks], said


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_model(folder)
    return folder


def install(pair: Pair) -> None:
    info = pair[1] / "site/tokenizers-99.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tokenizers\nVersion: 99.0\n")
    (pair[1] / "before.py").write_text("sys.path.insert(0, os.path.abspath('site'))")


def write_template(pair: Pair) -> None:
    """Write templates of the same tokens; the saved tokenizers would prompt differently."""
    for rank, comment in enumerate(("", "{# other #}")):
        pair.write(rank, chat_template_jinja="own.jinja")
        (pair[rank] / "own.jinja").write_text(comment + "{{ messages[0]['content'] }}")


def serve_kernels(pair: Pair) -> None:
    """Serve kernels of other content under the same name."""
    repo = "kernels-community/liger-kernels"
    for rank, fault in enumerate(("none", "epsilon is left out")):
        serve(pair[rank] / "kernel", fault, source=NORMS)
        pair.own[rank]["LOCAL_KERNELS"] = f"{repo}=kernel"
        pair.write(rank, use_kernels=True)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        pytest.param(lambda pair: pair.write(1, learning_rate=2e-4), "learning_rate", id="a key"),
        pytest.param(install, "packages", id="a package's version"),
        pytest.param(write_template, "chat_template_jinja (content)", id="a named file's content"),
        pytest.param(serve_kernels, "kernels of use_kernels", id="a hub kernel's content"),
        pytest.param(lambda pair: pair.own[1].update(WORLD_SIZE="3"), "WORLD_SIZE", id="size"),
    ],
)
def test_ranks_that_differ_name_the_key(
    tmp_path: Path, model: Path, change: Callable[[Pair], None], key: str
) -> None:
    pair = Pair(tmp_path, model)
    change(pair)
    codes, said = pair.run()
    assert codes == [1, 1], said
    assert f"the processes do not agree: {key}" in said[1], said
    assert key in said[0], said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(
            lambda pair, odd: pair.own[odd].update(ACCELERATE_MIXED_PRECISION="fp16"),
            "unset ACCELERATE_MIXED_PRECISION",
            id="by its environment",
        ),
        pytest.param(
            lambda pair, odd: pair.write(odd, learning_rat=1), "learning_rat is not a known key",
            id="by its config",
        ),
    ],
)  # fmt: skip
def test_a_rank_that_is_refused_says_why_and_ends_the_other_at_once(
    tmp_path: Path, model: Path, change: Callable[[Pair, int], None], reason: str, odd: int
) -> None:
    pair = Pair(tmp_path, model, ddp_timeout=600)
    change(pair, odd)
    codes, said = pair.run()
    assert (codes[odd], codes[1 - odd]) == (2, 1), said
    assert reason in said[odd], said
    assert f"rank {odd} of 2 ended before the group was complete" in said[1 - odd], said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("values", [{"RANK": "7"}, {"LOCAL_RANK": "5"}])
def test_a_rank_out_of_range_is_refused_and_ends_the_other_at_once(
    tmp_path: Path, model: Path, values: dict[str, str]
) -> None:
    pair = Pair(tmp_path, model, ddp_timeout=600)
    pair.own[1].update(values)
    (tmp_path / "7").symlink_to(pair[1])  # the program works in the folder of its RANK
    codes, said = pair.run()
    assert codes == [1, 2], said
    assert "the environment describes an incomplete group of processes" in said[1], said
    name = "a process whose RANK is above 1" if "RANK" in values else "rank 1 of 2"
    assert f"{name} ended before the group was complete" in said[0], said
    assert "found there: the environment describes an incomplete group" in said[0], said
    assert "needed numbers with LOCAL_RANK <= RANK < WORLD_SIZE" in said[1], said


@pytest.mark.parametrize("odd", [0, 1])
def test_a_rank_that_never_comes_is_named_after_ddp_timeout(
    tmp_path: Path, model: Path, odd: int
) -> None:
    pair = Pair(tmp_path, model, ddp_timeout=2)
    (pair[odd] / "before.py").write_text("os._exit(3)")
    codes, said = pair.run()
    assert (codes[odd], codes[1 - odd]) == (3, 1), said
    assert f"rank {odd} of 2 did not answer" in said[1 - odd], said
    assert "ddp_timeout: 2 s" in said[1 - odd]


def test_a_port_that_another_program_uses_is_named_on_both_ranks(
    tmp_path: Path, model: Path
) -> None:
    """The program accepts connections, and answers none."""
    pair = Pair(tmp_path, model, ddp_timeout=2)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for own in pair.own:
            own["MASTER_PORT"] = port
        codes, said = pair.run()
    assert codes == [1, 1], said
    assert f"the processes can't use 127.0.0.1:{port}" in said[0], said
    assert "address already in use" in said[0]
    assert f"the processes can't use 127.0.0.1:{port}" in said[1], said
