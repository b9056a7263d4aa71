"""Whether a folder's recorded settings equal the wanted ones.

Run folders, checkpoints, conversions, evaluations and sweeps resume only if they do: figures in one folder must be
comparable. The caller chooses the settings that decide results; this module compares them and names the first
difference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from context_pythia.errors import UsageError


def mismatches(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The recorded and the wanted value of each setting that differs, by name (`section.name` if nested).

    A missing setting counts as None. Values are compared as JSON, which has neither tuples nor paths.
    """
    old, new = _flat(recorded), _flat(wanted)
    return {name: (old.get(name), new.get(name)) for name in new | old if old.get(name) != new.get(name)}


def check_same(recorded: Mapping[str, Any], wanted: Mapping[str, Any], holder: str, mend: str) -> None:
    """Raise `UsageError` that names the first difference.

    Args:
        holder: start of the message, the recorded work and its place: "runs/quick holds a run".
        mend: end of the message, what to do instead: "choose another folder with --out".
    """
    if different := mismatches(recorded, wanted):
        name, (old, new) = next(iter(different.items()))
        raise UsageError(f"{holder} with {name} {old}, not {new}: {mend}")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.loads(json.dumps(value, default=str))
    return flat
