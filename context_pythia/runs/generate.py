"""`context-pythia generate`: write text with a saved model, and measure what it took."""

from __future__ import annotations

import time

import torch
from transformers import GenerationConfig, set_seed

from context_pythia.data.tokenizers import load_tokenizer, prompt_ids
from context_pythia.errors import UsageError
from context_pythia.evaluation.memory import cache_of
from context_pythia.evaluation.pretrained import load_pretrained
from context_pythia.model.cache import cache_bytes, cached_numbers_per_token, measure_cache
from context_pythia.runs.build import best_device


@torch.no_grad()
def generate(
    model: str,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    num_beams: int = 1,
    seed: int = 0,
    dtype: str = "float32",
    stats: bool = False,
) -> None:
    """Print the prompt and its continuation; with `stats`, tokens per second and the measured cache, too.

    Args:
        model: folder or Hub name.
        temperature: sampling temperature; 0 is greedy.

    Raises:
        UsageError: `top_k` without sampling, a prompt without tokens, or more tokens than the model has positions.
    """
    if top_k is not None and temperature == 0:
        raise UsageError(f"--top-k {top_k}: needs a --temperature above 0")
    loaded = load_pretrained(model, getattr(torch, dtype))
    tokenizer = load_tokenizer(model)
    loaded.to(best_device())
    ids = torch.tensor([prompt_ids(tokenizer, prompt)], dtype=torch.long, device=loaded.device)
    if ids.shape[1] == 0:
        raise UsageError("--prompt is empty: give at least one character")
    if (last := int(ids.max())) >= loaded.config.vocab_size:
        raise UsageError(
            f"--prompt {prompt!r}: has token id {last}, but the model has {loaded.config.vocab_size} tokens: "
            "its folder has another model's tokenizer"
        )
    positions = loaded.config.max_position_embeddings
    if ids.shape[1] + max_new_tokens > positions:
        raise UsageError(
            f"--max-new-tokens {max_new_tokens}: with the prompt's {ids.shape[1]} tokens that is more than "
            f"the model's {positions} positions"
        )
    set_seed(seed)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        num_beams=num_beams,
        return_dict_in_generate=True,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **({"temperature": temperature, "top_k": 0 if top_k is None else top_k} if temperature > 0 else {}),
    )
    started = time.perf_counter()
    output = loaded.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    seconds = time.perf_counter() - started
    print(tokenizer.decode(output.sequences[0], skip_special_tokens=True))
    if stats:
        new = output.sequences.shape[1] - ids.shape[1]
        measured = measure_cache(cache_of(output))
        rows = cache_of(output).layers[0].keys.shape[0]
        formula = cache_bytes(loaded.config, measured.length, rows, loaded.dtype)
        print(
            f"\n{ids.shape[1]} prompt tokens and {new} new ones in {seconds:.2f} s: {new / seconds:.1f} tokens/s "
            f"({loaded.device.type}, {dtype}, prefill included)\n"
            f"cache: {measured.length} tokens x {cached_numbers_per_token(loaded.config):,} numbers"
            f"{f' x {rows} beams' if rows > 1 else ''}: {measured.filled / 1024:,.1f} KB measured, "
            f"{formula / 1024:,.1f} KB by formula, {measured.slack / 1024:,.1f} KB room to grow"
        )
