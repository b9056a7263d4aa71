"""transformers' own tests of a model, from the source distribution of the version that is installed.

No wheel has them: `make test-hosts` unpacks them beside the interpreter's packages. The distribution holds the files
of `tests/` but not its folders, so two modules that test_modeling_common.py imports are missing. The classes below take
the places of theirs; what GenerationTesterMixin covers is in ../model/test_generation.py.
"""

import importlib
import sys
import types
from pathlib import Path

import transformers

FOLDER = Path(sys.prefix, f"transformers-{transformers.__version__}", "tests")
PACKAGE = "transformers_tests"  # not `tests`, which is the name of ours


class GenerationTesterMixin:
    pass


class ExportTesterMixin:
    pass


ABSENT = {
    "generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
    "exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
}


def host_module(name: str) -> types.ModuleType:
    """The module `name` of the host's tests."""
    if PACKAGE not in sys.modules:
        _add(PACKAGE, __path__=[str(FOLDER)])
        for module, names in ABSENT.items():
            parent = module.partition(".")[0]
            assert not (FOLDER / parent).exists(), f"{FOLDER / parent} is there: use the host's"
            _add(f"{PACKAGE}.{parent}", __path__=[])
            _add(f"{PACKAGE}.{module}", **names)
    return importlib.import_module(f"{PACKAGE}.{name}")


def _add(name: str, **names) -> None:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(names)
