"""The model family, registered with transformers' Auto classes on import."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration import ContextPythiaConfig
from .modeling import (
    ContextPythiaForCausalLM,
    ContextPythiaForQuestionAnswering,
    ContextPythiaForSequenceClassification,
    ContextPythiaForTokenClassification,
    ContextPythiaModel,
)

AUTO_MODELS = {
    AutoModel: ContextPythiaModel,
    AutoModelForCausalLM: ContextPythiaForCausalLM,
    AutoModelForQuestionAnswering: ContextPythiaForQuestionAnswering,
    AutoModelForSequenceClassification: ContextPythiaForSequenceClassification,
    AutoModelForTokenClassification: ContextPythiaForTokenClassification,
}
AutoConfig.register(ContextPythiaConfig.model_type, ContextPythiaConfig, exist_ok=True)
for auto_class, model_class in AUTO_MODELS.items():
    auto_class.register(ContextPythiaConfig, model_class, exist_ok=True)
# The `auto_map` of config.json beside a copy of this folder's files: the Auto classes find our classes by it.
AUTO_MAP = {"AutoConfig": "configuration.ContextPythiaConfig"} | {
    auto_class.__name__: f"modeling.{model_class.__name__}" for auto_class, model_class in AUTO_MODELS.items()
}

__all__ = [
    "AUTO_MAP",
    "ContextPythiaConfig",
    "ContextPythiaForCausalLM",
    "ContextPythiaForQuestionAnswering",
    "ContextPythiaForSequenceClassification",
    "ContextPythiaForTokenClassification",
    "ContextPythiaModel",
]
