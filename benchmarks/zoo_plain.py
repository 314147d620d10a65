"""Modules written by hand, one a way of using a weight."""

from __future__ import annotations

import zoo_plain_attention
import zoo_plain_calls
import zoo_plain_nets
import zoo_plain_recurrent
import zoo_plain_weights
from zoo_entry import Entry

_FILES = zoo_plain_nets, zoo_plain_recurrent, zoo_plain_attention, zoo_plain_weights, zoo_plain_calls

ENTRIES = [Entry("plain", make.__name__, make, inputs) for file in _FILES for make, inputs in file.MODELS.items()]
