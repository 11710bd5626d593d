"""Everything that can be known to be wrong with a run before anything heavy is loaded."""

from __future__ import annotations

from attnimg.facts import Machine
from attnimg.schema import Config
from attnimg.train.adapter import check_adapter
from attnimg.train.checkpoint import ResumePoint
from attnimg.train.limits import check_limits
from attnimg.train.model_files import check_model_files
from attnimg.train.output_dir import check_output_dir
from attnimg.train.resume import check_settings
from attnimg.train.schedule import check_schedule


def check_inputs(config: Config, machine: Machine) -> ResumePoint | None:
    """Refuse keys that contradict one another, files that are missing, folders in the way.

    Reads a few file names, and all of a checkpoint that the run resumes from.

    Returns:
        Where the run goes on; None when it starts in an empty folder.

    Raises:
        AttnimgError: exit code 2, with the key at fault.
    """
    check_schedule(config)
    check_adapter(config)
    check_limits(config, machine)
    check_model_files(config)
    point = check_output_dir(config)
    check_settings(config, point)
    return point
