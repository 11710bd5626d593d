"""Return advice on a model that could not be loaded, by the error that transformers raised."""

from __future__ import annotations

from pathlib import Path

from attnimg.config.schema import Config
from attnimg.train.model_files import GET_WHOLE


def advice_on(config: Config, error: Exception) -> str:
    """Return what to do. Only missing or damaged files call for another download.

    Source: transformers 5.22.2, models/auto/auto_factory.py, configuration_auto.py and
    dynamic_module_utils.py, the errors they raise (2026-11-27)
    """
    from safetensors import SafetensorError

    text = str(error)
    if "trust_remote_code" in text and not config.trust_remote_code:
        return "set trust_remote_code: true, since the model brings its own code"
    if isinstance(error, ImportError):
        return "install the packages that it names"
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return "choose a model whose model_type the installed transformers has, or upgrade it"
    if not Path(config.base_model or "").expanduser().is_dir():
        return (
            "check base_model; without network it must be a folder, or a hub name "
            "that is already in the cache"
        )
    if isinstance(error, OSError | SafetensorError):
        return GET_WHOLE
    return "correct config.json to fit the weights, or point base_model at another folder"
