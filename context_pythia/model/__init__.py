"""The model family, registered with transformers' Auto classes on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration import ContextPythiaConfig
from .modeling import ContextPythiaForCausalLM, ContextPythiaModel

AutoConfig.register(ContextPythiaConfig.model_type, ContextPythiaConfig, exist_ok=True)
AutoModel.register(ContextPythiaConfig, ContextPythiaModel, exist_ok=True)
AutoModelForCausalLM.register(ContextPythiaConfig, ContextPythiaForCausalLM, exist_ok=True)

__all__ = ["ContextPythiaConfig", "ContextPythiaForCausalLM", "ContextPythiaModel"]
