"""recbole_mm: multimodal recommenders for RecBole.

Importing the package lets RecBole 1.2.1 run on today's libraries (see :mod:`recbole_mm.compat`). The names below are imported when used:

* :func:`run` trains and tests a model; :func:`load_model` gives a finished run back; :func:`recommend` uses it.
* :class:`Config` holds the settings of a run; :func:`register_model` adds a model of your own.
"""

import importlib

from recbole_mm import compat

__version__ = "0.1.0"

compat.apply()

_EXPORTS = {
    "Config": "recbole_mm.config",
    "UserError": "recbole_mm.errors",
    "load_model": "recbole_mm.quick_start",
    "recommend": "recbole_mm.recommend",
    "register_model": "recbole_mm.model",
    "run": "recbole_mm.quick_start",
}
__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'recbole_mm' has no attribute {name!r}")
