"""Checks that a model's context fits the recipe's body, before any text is read: by the rules of the model itself."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from context_pythia.errors import UsageError

if TYPE_CHECKING:
    from context_pythia.config.recipe import ArchitectureOptions, ModelOptions


def check_context(model: ModelOptions, architecture: ArchitectureOptions) -> None:
    """Raise `UsageError` if the model's context does not fit the body."""
    # Only here, because help must answer without torch.
    from huggingface_hub.errors import StrictDataclassError

    from context_pythia.model.configuration import ContextPythiaConfig

    known = {declared.name for declared in fields(ContextPythiaConfig)}
    values = {name: value for name, value in (asdict(architecture) | asdict(model)).items() if name in known}
    if model.layer_context_dims:
        values["context_dim"] = 1  # they take its place
    try:
        ContextPythiaConfig(**values)
    except StrictDataclassError as error:
        raise UsageError(str(error.__cause__ or error)) from error
