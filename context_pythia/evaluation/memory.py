"""The cache that `generate()` really fills, measured."""

import torch
from transformers import GenerationConfig, PreTrainedModel

from context_pythia.model.cache import CacheMeasurement, measure_cache


@torch.no_grad()
def measure_generated_cache(model: PreTrainedModel, length: int, batch_size: int = 1) -> CacheMeasurement:
    """Run greedy `generate()` until `length` tokens are cached and measure the cache it leaves.

    The first half of the tokens are a prompt, so prefill and decoding both write to the cache. Every generated token
    but the last is cached.

    Args:
        model: any causal language model of transformers, on any device; its dtype is the cache's.
        length: cached tokens, at least 1.
        batch_size: sequences.

    Raises:
        RuntimeError: `generate()` cached another number of tokens.
    """
    prompt = max(1, length // 2)
    ids = torch.randint(model.config.vocab_size, (batch_size, prompt), generator=torch.Generator().manual_seed(0))
    settings = GenerationConfig(
        max_new_tokens=length - prompt + 1, do_sample=False, return_dict_in_generate=True, pad_token_id=0
    )
    # An unset end of text would be taken from the model's own settings, and could stop early.
    own, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        ids = ids.to(model.device)
        output = model.eval().generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    finally:
        model.generation_config.eos_token_id = own
    measured = measure_cache(output.past_key_values)
    if measured.length != length:
        raise RuntimeError(f"generate() cached {measured.length} tokens, {length} were asked for")
    return measured
