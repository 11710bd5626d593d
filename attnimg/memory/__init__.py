"""Forecast the memory of a run from its config and config.json, before the model is loaded.

architecture.py reads the sizes of the layers, parts.py counts weights, gradients and optimizer
states, activations.py what autograd keeps, forecast.py adds them up by phase, changes.py looks for
changes of the config with which a run fits. All are pure functions.
"""

from attnimg.memory.forecast import Forecast, forecast_memory

__all__ = ["Forecast", "forecast_memory"]
