"""ContextPythiaConfig: GPT-NeoX's configuration, plus the source and width of the context."""

from copy import copy
from itertools import pairwise

import transformers
from huggingface_hub.dataclasses import strict
from packaging.version import Version
from transformers import GPTNeoXConfig

# The versions that the tests run on; pyproject.toml has the same. Another host may call `forward` in another way and
# silently lose the cache, so a copy of this code that ships with a model must refuse to run there.
OLDEST, NEWER = "5.16.1", "5.25"
if not Version(OLDEST).release <= Version(transformers.__version__).release < Version(NEWER).release:
    raise ImportError(
        f"transformers {transformers.__version__}: Context-Pythia was tried with {OLDEST} and later, below {NEWER}; "
        f"install one of them: pip install 'transformers>={OLDEST},<{NEWER}'"
    )

CONTEXT_SOURCES = ("input", "shared", "layer", "grouped")
FOR_LAYERS = ("rotary_pairs", "context_layers", "layer_context_dims", "reuse_rotary_keys", "cache_token_ids")


@strict
class ContextPythiaConfig(GPTNeoXConfig):
    r"""
    context_source (`str`, *optional*, defaults to `"layer"`):
        What computes the context. `"input"`: the context replaces the token embedding of an unchanged GPT-NeoX, whose
        keys and values are cached. `"shared"`: one recurrent context per token is cached and serves all layers.
        `"layer"`: a layer projects its normalized input to a context. `"grouped"`, for comparison: keys and values of
        fewer heads.
    context_dim (`int`, *optional*, defaults to 256):
        Width of the context. For `"layer"` it is all that a layer caches for a token, rotary keys included; for
        `"shared"` the rotary key is cached beside it.
    context_block_layers (`int`, *optional*, defaults to 1):
        Layers of the ContextBlock (`"input"` and `"shared"`).
    context_sharing (`int`, *optional*, defaults to 1):
        Number of consecutive layers that attend to the context of the first of them (`"layer"`), or to its keys and
        values (`"grouped"`).
    key_value_heads (`int`, *optional*, defaults to 1):
        Heads of keys and values in a layer, each read by as many heads of queries; 1 is multi-query attention
        (`"grouped"`).
    num_rotary_keys (`int`, *optional*, defaults to 1):
        Rotary keys in a layer's context: 1, shared by the heads, or `num_attention_heads`, which is short for as many
        `rotary_pairs` at each frequency (`"layer"`).
    rotary_pairs (`list[list[int]]`, *optional*):
        For each layer and rotary frequency, the number of pairs that its context has at this frequency instead of whole
        rotary keys; every head reads them through its own complex-linear map (`"layer"`).
    reuse_rotary_keys (`bool`, *optional*, defaults to `False`):
        Whether keys and values are rebuilt from the rotary keys (before RoPE) and the latent, and not from the latent
        alone (`"layer"`). The positions of cached tokens must then be those of `generate()`, or their places in the
        cache.
    context_layers (`list[int]`, *optional*):
        For each layer the index of the layer whose context it attends to: its own, or the same as the layer before. It
        says in general what `context_sharing` says for groups of equal size (`"layer"`).
    layer_context_dims (`list[int]`, *optional*):
        Width of each layer's context where contexts differ; `context_dim` is then their mean. A layer without a context
        of its own may have any number (`"layer"`).
    cache_token_ids (`bool`, *optional*, defaults to `False`):
        Whether the first context also has the token's id, by which every layer looks up the token's embedding and that
        of the token before it: keys and values are then rebuilt from the latent and a mix of both (`"layer"`;
        GoldFinch, arXiv 2407.12077; token shift, arXiv 2305.13048).
    context_bias (`bool`, *optional*):
        Whether the projections to the context and to the values have a bias; `attention_bias` if absent.
    """

    model_type = "context_pythia"
    # Heads attend to one common context, so no device gets a part of them.
    base_model_tp_plan = {
        module: way for module, way in GPTNeoXConfig.base_model_tp_plan.items() if ".attention." not in module
    }

    context_source: str = "layer"
    context_dim: int = 256
    context_block_layers: int = 1
    context_sharing: int = 1
    key_value_heads: int = 1
    num_rotary_keys: int = 1
    rotary_pairs: list[list[int]] | None = None
    reuse_rotary_keys: bool = False
    context_layers: list[int] | None = None
    layer_context_dims: list[int] | None = None
    cache_token_ids: bool = False
    context_bias: bool | None = None

    def validate_architecture(self):
        super().validate_architecture()
        heads, layers, widest = self.num_attention_heads, self.num_hidden_layers, 2 * self.hidden_size
        self._check("context_source", self.context_source in CONTEXT_SOURCES, f"be one of {', '.join(CONTEXT_SOURCES)}")
        fits = self.context_source == "grouped" or 1 <= self.context_dim <= widest
        self._check("context_dim", fits, f"be between 1 and 2 * hidden_size = {widest}")
        self._check("context_block_layers", self.context_block_layers >= 1, "be at least 1")
        fits = 1 <= self.context_sharing <= layers
        self._check("context_sharing", fits, f"be between 1 and num_hidden_layers = {layers}")
        fits = self.key_value_heads >= 1 and heads % self.key_value_heads == 0
        self._check("key_value_heads", fits, f"divide num_attention_heads = {heads}")
        self._check("num_rotary_keys", self.num_rotary_keys in (1, heads), f"be 1 or num_attention_heads = {heads}")
        if self.context_source == "layer":
            self._check_layers()
        else:
            for name in FOR_LAYERS:
                self._check("context_source", not getattr(self, name), f"be 'layer' beside {name}")

    def _check(self, name: str, fits: bool, rule: str) -> None:
        if not fits:
            raise ValueError(f"{name} {getattr(self, name)!r}: must {rule}")

    def _check_layers(self) -> None:
        """Check the options of contexts that layers compute."""
        layers, frequencies = self.num_hidden_layers, self.rotary_dim // 2
        if self.context_layers is not None:
            steps = enumerate(pairwise([0, *self.context_layers]))
            fits = len(self.context_layers) == layers and all(maker in (i, before) for i, (before, maker) in steps)
            rule = f"have {layers} entries, each the layer's own index or the entry before it"
            self._check("context_layers", fits, rule)
            self._check("context_sharing", self.context_sharing == 1, "be 1 beside context_layers")
        if self.layer_context_dims is not None:
            self._check("layer_context_dims", len(self.layer_context_dims) == layers, f"name {layers} layers")
        if self.rotary_pairs is not None:
            counts = all(len(row) == frequencies and min(row) >= 0 and any(row) for row in self.rotary_pairs)
            rule = f"have {layers} rows of {frequencies} counts, and a pair at least in each row"
            self._check("rotary_pairs", len(self.rotary_pairs) == layers and counts, rule)
        if self.cache_token_ids:
            self._check("reuse_rotary_keys", not self.reuse_rotary_keys, "be False beside cache_token_ids")
        for layer_idx in range(layers):
            rotary = self.rotary_width(layer_idx)
            least = rotary + (0 if self.reuse_rotary_keys or self.cache_token_ids else 1)
            if self.context_width(layer_idx) < least:
                name = "layer_context_dims" if self.layer_context_dims else "context_dim"
                raise ValueError(
                    f"{name} {self.context_width(layer_idx)} of layer {layer_idx}: leaves no latent beside the "
                    f"{rotary} dims of its rotary keys; it must be at least {least}"
                )

    def validate_layer_type(self):
        # The host accepts only its own layer types; ours are derived below and need no check.
        pass

    @property
    def rotary_dim(self) -> int:
        """Rotary dims of a head."""
        partial_rotary_factor = (self.rope_parameters or {}).get("partial_rotary_factor", 0.25)
        return int(self.hidden_size // self.num_attention_heads * partial_rotary_factor)

    @property
    def pairs(self) -> list[list[int]] | None:
        """`rotary_pairs`, those of `num_rotary_keys` too; None for one whole key that all heads share."""
        if self.rotary_pairs is None and self.num_rotary_keys > 1 and self.context_source == "layer":
            return [[self.num_rotary_keys] * (self.rotary_dim // 2)] * self.num_hidden_layers
        return self.rotary_pairs

    def rotary_width(self, layer_idx: int = 0) -> int:
        """Numbers that RoPE turns in the context that layer `layer_idx` attends to."""
        return self.rotary_dim if self.pairs is None else 2 * sum(self.pairs[self.makers[layer_idx]])

    def context_width(self, layer_idx: int = 0) -> int:
        """Numbers of the context that layer `layer_idx` attends to: rotary keys, then latent; for `grouped` keys and
        values."""
        if self.context_source == "shared":
            return self.rotary_dim + self.context_dim
        if self.context_source == "grouped":
            return 2 * self.key_value_heads * (self.hidden_size // self.num_attention_heads)
        if self.layer_context_dims is None:
            return self.context_dim
        return self.layer_context_dims[self.makers[layer_idx]]

    @property
    def id_digits(self) -> int:
        """Numbers that cache a token's id: its digits in base 256, which every floating-point type has exactly."""
        return -(-(self.vocab_size - 1).bit_length() // 8) if self.cache_token_ids else 0

    def cached_width(self, layer_idx: int = 0) -> int:
        """Cached numbers per token of the context that layer `layer_idx` attends to."""
        return self.context_width(layer_idx) + (self.id_digits if self.makers[layer_idx] == 0 else 0)

    def latent_dim(self, layer_idx: int = 0) -> int:
        """Width of the latent in the context that layer `layer_idx` attends to."""
        return self.context_width(layer_idx) - self.rotary_width(layer_idx)

    def content_dim(self, layer_idx: int = 0) -> int:
        """Width of the content, from which keys and values are rebuilt: the latent, and the rotary keys or the token's
        embedding where they are used too."""
        if self.reuse_rotary_keys:
            return self.context_width(layer_idx)
        return self.latent_dim(layer_idx) + (self.hidden_size if self.cache_token_ids else 0)

    @property
    def makers(self) -> list[int]:
        """For each layer the layer that makes the context it attends to."""
        if self.context_layers is not None:
            return self.context_layers
        layers = range(self.num_hidden_layers)
        # The host reads `layer_types` before it validates, so a context_sharing of 0 gets here.
        return [0 if self.context_source == "shared" else i - i % (self.context_sharing or 1) for i in layers]

    @property
    def layer_types(self) -> list[str]:
        """The type of each layer's cache; transformers builds caches from these names (`cache.py` registers ours)."""
        if self.context_source == "input":
            return ["recurrent_context"] + ["full_attention"] * (self.num_hidden_layers - 1)
        own = "full_attention" if self.context_source == "grouped" else "context"
        return [own if maker == i else "dummy" for i, maker in enumerate(self.makers)]

    def _per_layer_config(self):
        """Each layer's view of the config, with the shape of its cache: `torch.export` needs a static cache of that
        shape before the first token."""
        host = super().per_layer_config
        if self.context_source == "input" or self.is_heterogeneous:
            return host
        layers = [copy(self) for _ in range(self.num_hidden_layers)]
        for i, layer in enumerate(layers):
            layer.__dict__.update(head_dim=self.cached_width(i), num_key_value_heads=1)
        return layers

    per_layer_config = GPTNeoXConfig.per_layer_config.getter(_per_layer_config)
