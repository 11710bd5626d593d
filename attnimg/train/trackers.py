"""Check trackers and the hub before a model is loaded: packages, login and server.

They are off unless the config turns them on. tracker_callback.py and hub.py use them in training.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.requirements import Requirement

from attnimg.config.schema import Config, trackers
from attnimg.errors import AttnimgError, exception_text
from attnimg.redact import redact

# Seconds in which a server must begin to answer.
ANSWER_S = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """The package of a tracker.

    Attributes:
        requirement: the versions that were tested, and newer ones.
        off: the edit of the config that turns the tracker off.
        uses: modules with the attributes that are called; a broken package lacks them.
    """

    requirement: str
    off: str
    uses: Mapping[str, tuple[str, ...]]


PACKAGES: dict[str, Package] = {
    "wandb": Package(
        requirement="wandb>=0.31",
        off="set wandb_mode: disabled",
        uses={"wandb": ("init", "login", "run", "Artifact", "Settings")},
    ),
    # Whole mlflow needs another pyarrow than the images have. The smaller distribution suffices for
    # a server and a folder.
    "mlflow": Package(
        requirement="mlflow-skinny>=3.17",
        off="remove use_mlflow and mlflow_experiment_name",
        uses={"mlflow": ("set_tracking_uri", "set_experiment", "start_run", "end_run")},
    ),
    "tensorboard": Package(
        requirement="tensorboard>=2.20",
        off="set use_tensorboard: false",
        uses={"tensorboard.summary.writer.event_file_writer": ("EventFileWriter",),
              "tensorboard.compat.proto.event_pb2": ("Event",)},
    ),
}  # fmt: skip

# Distributions that contain the module.
_DISTRIBUTIONS = {"mlflow": ("mlflow", "mlflow-skinny")}


def require_trackers(config: Config) -> None:
    """Raise unless the trackers of a config can be reported to; only rank 0 calls this.

    Raises:
        AttnimgError: a package is missing, too old or broken (not-installed); there is no login,
            or the server does not answer (tracker-unavailable).
    """
    requested = active_trackers(config)
    set_environment(requested)
    for name in requested:
        require_package(name)
    if "wandb" in requested and wandb_mode(config) == "online":
        _require_wandb_login()
    if "mlflow" in requested:
        _require_mlflow_server(config)


def active_trackers(config: Config) -> tuple[str, ...]:
    """Return the trackers that a config turns on; WANDB_MODE=disabled turns W&B off."""
    off = "wandb" if wandb_mode(config) == "disabled" else None
    return tuple(name for name in trackers(config) if name != off)


def set_environment(requested: tuple[str, ...]) -> None:
    """Set what trackers only read from the environment: no telemetry, no output, short retries."""
    if "wandb" in requested:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
    if "mlflow" in requested:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # stdout is for results.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        # With MLflow's defaults, 7 retries of 120 s, a lost server delays a run by minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")


def require_package(name: str) -> None:
    """Raise unless a tracker's package can be used.

    Raises:
        AttnimgError: code not-installed.
    """
    package = PACKAGES[name]
    needed = Requirement(package.requirement)
    found = _installed_version(name)
    why = ""
    if found is None:
        why = f"found no {name}"
    elif not needed.specifier.contains(found, prereleases=True):
        why = f"found {name} {found}"
    else:
        try:
            for module, attributes in package.uses.items():
                for attribute in attributes:
                    getattr(import_module(module), attribute)
        except Exception as error:
            why = f"found {name} {found}, which is broken: {exception_text(error)}"
    if why:
        raise AttnimgError(
            f"{name} is not installed",
            why=f"{redact(why)}; needed {package.requirement}",
            do=f"pip install '{package.requirement}', or {package.off}",
            code="not-installed",
            key=f"use_{name}",
        )


def _installed_version(name: str) -> str | None:
    for distribution in _DISTRIBUTIONS.get(name, (name,)):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def wandb_mode(config: Config) -> Any:
    """Return W&B's mode: the config's, else that of the variable WANDB_MODE, else online."""
    return config.wandb_mode or os.environ.get("WANDB_MODE") or "online"


def _require_wandb_login() -> None:
    """Raise unless W&B's server accepts the login; nothing is asked for on the terminal."""
    import wandb

    try:
        logged_in = wandb.login(prompt=False, verify=True)
    except Exception as error:
        raise unavailable("wandb", error) from error
    if not logged_in:
        raise AttnimgError(
            "there is no login for Weights & Biases",
            why="found no WANDB_API_KEY, and no key of `wandb login`",
            do="set the environment variable WANDB_API_KEY, or set wandb_mode: offline",
            code="tracker-unavailable",
            key="wandb_mode",
        )


def mlflow_uri(config: Config) -> str:
    """Return where MLflow stores runs: the config's, else MLflow's own default."""
    import mlflow

    return config.mlflow_tracking_uri or str(mlflow.get_tracking_uri())


def _require_mlflow_server(config: Config) -> None:
    """Raise unless the store of MLflow answers, and accepts the login."""
    import mlflow

    uri = mlflow_uri(config)
    try:
        if uri.startswith(("http://", "https://")):
            require_answer(uri)
        mlflow.MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except Exception as error:
        raise unavailable("mlflow", error) from error


def require_answer(url: str) -> None:
    """Raise unless a server answers within 10 seconds, whatever it answers.

    Raises:
        OSError: it does not.
    """
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    request = urllib.request.Request(f"{scheme}://{host.rpartition('@')[2]}/{path}")
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S):
            pass
    except urllib.error.HTTPError as answer:
        answer.close()


# MLflow refuses a folder as its store unless this variable is set.
_FILE_STORE = "MLFLOW_ALLOW_FILE_STORE"
_TO_DO: dict[str, str] = {
    "wandb": "check WANDB_API_KEY and the network, or set wandb_mode: offline",
    "mlflow": "check mlflow_tracking_uri (a database needs the whole package mlflow), and "
    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; or remove use_mlflow and "
    "mlflow_experiment_name",
    "tensorboard": "check TENSORBOARD_LOGGING_DIR, or set use_tensorboard: false",
}


def unavailable(name: str, error: Exception, **options: Any) -> AttnimgError:
    """Return the error for a tracker that can't be reported to.

    Args:
        name: the tracker.
        error: what its library raised.
        **options: of AttnimgError, such as exit_code.
    """
    do = _TO_DO[name]
    if _FILE_STORE in str(error):
        do = f"set the environment variable {_FILE_STORE}=true, or mlflow_tracking_uri to a server"
    return AttnimgError(
        f"{name} cannot be reported to",
        why=redact(exception_text(error)),
        do=do,
        code="tracker-unavailable",
        key=f"use_{name}",
        **options,
    )


# Seconds without an answer after which a request fails; huggingface_hub has no limit of its own.
_REQUEST_S = 60.0


def require_hub(config: Config) -> None:
    """Raise unless the hub answers and accepts the login; only rank 0 calls this.

    Raises:
        AttnimgError: code hub-unavailable.
    """
    if config.hub_model_id is None:
        return
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        name = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
        raise hub_unavailable(
            "hub_model_id needs the network, which is turned off",
            why=f"found {name}={os.environ.get(name)}",
            do=f"unset {name}, or remove hub_model_id, and push the trained model later",
        )
    if get_token() is None:
        raise hub_unavailable(
            "there is no login for the Hugging Face hub",
            why="found no HF_TOKEN, and no token of `hf auth login`",
            do="set the environment variable HF_TOKEN to a token with write access, or remove "
            "hub_model_id",
        )
    try:
        require_answer(f"{constants.ENDPOINT}/api/whoami-v2")
        limit_requests()
        login = HfApi().whoami()
    except Exception as error:
        raise hub_unavailable(
            f"{constants.ENDPOINT} does not accept the login",
            why=redact(exception_text(error)),
            do="check HF_TOKEN and the network, or remove hub_model_id",
        ) from error
    # Tokens of other kinds than personal ones have no role.
    if login.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise hub_unavailable(
            "the token of the Hugging Face hub has no write access",
            why="found a token with the role read, needed write",
            do="set HF_TOKEN to a token with write access, or remove hub_model_id",
        )


def hub_unavailable(what: str, *, why: str, do: str, exit_code: int = 2) -> AttnimgError:
    """Return the error for a hub that can't be pushed to."""
    return AttnimgError(
        what, why=why, do=do, code="hub-unavailable", key="hub_model_id", exit_code=exit_code
    )


def limit_requests() -> None:
    """Limit how long huggingface_hub waits for an answer, in all later requests."""
    from huggingface_hub import get_session

    get_session().timeout = _REQUEST_S
