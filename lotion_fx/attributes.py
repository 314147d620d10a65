"""What others' objects hold under a name that we ask for, where asking may raise.

A module's property may need what is not there yet, a proxy may refuse what it does not know: with AttributeError, as
Python has it, or with anything else. To us it is then not there, and the log tells what was raised.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

LOG = logging.getLogger("lotion_fx.attributes")


def attribute_of(owner: Any, name: str, default: Any = None) -> Any:
    """An object's attribute; the default where there is none, or reading it raises."""
    try:
        return getattr(owner, name, default)
    except Exception as error:
        tell(owner, name, error)
        return default


def tell(owner: Any, name: str, error: Exception) -> None:
    """Logs what reading an attribute raised."""
    LOG.info("%s.%s raised %s, and is left out", type(owner).__name__, name, type(error).__name__, exc_info=error)


def config_of(model: Any) -> Any:
    """A model's configuration where it is one of transformers'; None where it is another's, or none."""
    kind = getattr(sys.modules.get("transformers.configuration_utils"), "PretrainedConfig", None)
    config = attribute_of(model, "config")
    return config if kind is not None and issubclass(type(config), kind) else None
