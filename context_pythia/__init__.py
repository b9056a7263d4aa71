"""Context-Pythia: GPT-NeoX models that cache one small context per token instead of keys and values.

Importing the package registers the models with transformers' Auto classes, so that
`AutoModelForCausalLM.from_pretrained` knows a saved Context-Pythia.
"""

from __future__ import annotations

import importlib
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from context_pythia.model import (
        ContextPythiaConfig,
        ContextPythiaForCausalLM,
        ContextPythiaForQuestionAnswering,
        ContextPythiaForSequenceClassification,
        ContextPythiaForTokenClassification,
        ContextPythiaModel,
    )

__all__ = [
    "ContextPythiaConfig",
    "ContextPythiaForCausalLM",
    "ContextPythiaForQuestionAnswering",
    "ContextPythiaForSequenceClassification",
    "ContextPythiaForTokenClassification",
    "ContextPythiaModel",
    "__version__",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("context_pythia.model"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# The command must answer --help without waiting seconds for torch, so it imports the model only when it needs it.
# While Python imports the package for `python -m context_pythia`, only the interpreter's own arguments show that.
_as_module = sys.argv[:1] == ["-m"] and ("-m", "context_pythia") in pairwise(sys.orig_argv)
if not _as_module and Path(sys.argv[0] if sys.argv else "").stem != "context-pythia":
    importlib.import_module("context_pythia.model")
