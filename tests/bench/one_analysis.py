"""`PYTHON one_analysis.py CHECKPOINT`: WeightWatcher's default analysis, for an interpreter that may have nothing else.

Prints how many matrices it gave an alpha, and on what it computed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from typing import Any

import torch

weightwatcher: Any = importlib.import_module("weightwatcher")
with contextlib.redirect_stdout(sys.stderr):
    details = weightwatcher.WeightWatcher(model=sys.argv[1]).analyze()
on = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
print(json.dumps({"matrices": int(details.alpha.notna().sum()), "on": on, "version": weightwatcher.__version__}))
