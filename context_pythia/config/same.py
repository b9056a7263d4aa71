"""Is this the same work? What a folder's record says it was begun with, beside what is asked for now.

Run folders, checkpoints, conversions, evaluations and sweeps go on only where the two agree: figures in one folder must
be comparable. What decides the results is the caller's to say; here it is compared, and the first difference named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from context_pythia.errors import UsageError


def differences(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The recorded and the wanted value of each setting whose values differ, by name (`section.name` where nested).

    A setting that one side lacks is None there. Values compare as JSON writes them: it has neither tuples nor paths.
    """
    old, new = _flat(recorded), _flat(wanted)
    return {name: (old.get(name), new.get(name)) for name in new | old if old.get(name) != new.get(name)}


def check_same(recorded: Mapping[str, Any], wanted: Mapping[str, Any], holder: str, mend: str) -> None:
    """Raise `UsageError` that names the first difference.

    Args:
        holder: where the recorded work lies and what it is: "runs/quick holds a run".
        mend: what to do instead: "choose another folder with --out".
    """
    if different := differences(recorded, wanted):
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
