import pytest
import torch
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM

from context_pythia.model import ContextPythiaConfig
from context_pythia.model.cache import cache_bytes, measure_cache

from .conftest import SIZE, build


@pytest.mark.parametrize("heads", [1, 2, 4])
@torch.no_grad()
def test_it_is_gpt_neox_whose_heads_have_the_same_keys_and_values(heads, ids):
    model = build("grouped", key_value_heads=heads)
    weights = model.state_dict()
    for i in range(SIZE["num_hidden_layers"]):
        place = f"gpt_neox.layers.{i}.attention."
        for kind, width in (("weight", (SIZE["hidden_size"],)), ("bias", ())):
            query = weights.pop(f"{place}query.{kind}").view(4, 16, *width)
            key_value = weights.pop(f"{place}key_value.{kind}").view(2, heads, 16, *width)
            parts = torch.stack([query, *key_value.repeat_interleave(4 // heads, dim=1)], dim=1)
            weights[f"{place}query_key_value.{kind}"] = parts.flatten(0, 2)
    plain = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE)).eval()
    plain.load_state_dict(weights)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_cache_holds_the_heads_that_were_asked_for(ids):
    for heads, sharing, numbers in ((1, 1, 96), (2, 1, 192), (1, 2, 64), (1, 3, 32)):
        model = build("grouped", key_value_heads=heads, context_sharing=sharing)
        cache = model(ids, past_key_values=DynamicCache(config=model.config)).past_key_values
        assert measure_cache(cache).filled == cache_bytes(model.config, 17, 3) == 3 * 17 * 4 * numbers


@pytest.mark.parametrize("heads", [0, 3, 8])
def test_heads_that_do_not_divide_the_queries_are_refused(heads):
    with pytest.raises(Exception, match=f"key_value_heads {heads}: must divide num_attention_heads = 4"):
        ContextPythiaConfig(**SIZE, context_source="grouped", key_value_heads=heads)
