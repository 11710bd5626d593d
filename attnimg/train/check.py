"""Check the machine, files and folders of a run before anything heavy is loaded.

The values of its config are checked already, by attnimg.config.
"""

from __future__ import annotations

from pathlib import Path

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.facts import Machine
from attnimg.train.checkpoint import ResumePoint
from attnimg.train.limits import check_limits
from attnimg.train.model_files import check_model_files
from attnimg.train.output_dir import check_output_dir
from attnimg.train.resume import check_settings


def check_inputs(config: Config, machine: Machine) -> ResumePoint | None:
    """Refuse what the machine can't do, files that are missing, folders in the way.

    Reads a few file names, and all of a checkpoint that the run resumes from.

    Returns:
        Where the run goes on; None when it starts in an empty folder.

    Raises:
        AttnimgError: exit code 2, with the key at fault.
    """
    _check_homes(config)
    check_limits(config, machine)
    check_model_files(config)
    point = check_output_dir(config)
    check_settings(config, point)
    return point


def _check_homes(config: Config) -> None:
    """Refuse a path in the home of a user that does not exist, such as ~nobody/out."""
    for key in ("base_model", "tokenizer_config", "output_dir", "dataset_prepared_path",
                "resume_from_checkpoint", "deepspeed"):  # fmt: skip
        value = getattr(config, key)
        try:
            _ = isinstance(value, str) and Path(value).expanduser()
        except RuntimeError:
            raise AttnimgError(
                f"{key}: {value} can't be found",
                why=f"found no home of the user {value.partition('/')[0][1:] or 'who runs this'}",
                do=f"write {key} without ~",
                code="bad-value",
                key=key,
            ) from None
