"""Measures a model's memory: the cache that `generate()` fills, the weights, and the peak.

On a CPU the peak is the process's high-water mark, which hides every later, smaller peak; the C library may also keep
freed memory. So `peak_during` first returns freed memory to the system (malloc_trim), then resets the kernel's mark
for this process (/proc/self/clear_refs).
"""

import ctypes
import gc
import inspect
import platform
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GPTNeoXForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from context_pythia.model.cache import CacheMeasurement, measure_cache

T = TypeVar("T")

# The argument that takes a cache. transformers 5.24 changed its name.
CACHE = "cache" if "cache" in inspect.signature(GPTNeoXForCausalLM.forward).parameters else "past_key_values"


def measure_generated_cache(
    model: PreTrainedModel,
    length: int,
    batch_size: int = 1,
    decoded: int | None = None,
    cache: Cache | None = None,
    **settings: Any,
) -> CacheMeasurement:
    """Run greedy `generate()` until `length` tokens are cached, and measure that cache.

    The first tokens are a prompt, so both prefill and decoding write to the cache. It gets every generated token but
    the last.

    Args:
        model: any causal language model of transformers, on any device; its dtype is the cache's.
        length: cached tokens, at least 1.
        batch_size: sequences.
        decoded: number of the `length` tokens to decode; the others are the prompt. Half of them by default.
        cache: an empty cache to fill; the model's own by default.
        settings: as in `generate_tokens`.
    """
    prompt = max(1, length // 2 if decoded is None else length - decoded)
    output = generate_tokens(model, prompt, length - prompt + 1, batch_size, cache, **settings)
    measured = measure_cache(cache_of(output))
    assert measured.length == length, f"generate() cached {measured.length} tokens, {length} were asked for"
    return measured


@torch.no_grad()
def generate_tokens(
    model: PreTrainedModel, prompt: int, new_tokens: int, batch_size: int, cache: Cache | None = None, **settings: Any
) -> ModelOutput:
    """Greedy `generate()` of exactly `new_tokens` tokens after a random prompt, with `settings` in its
    `GenerationConfig`."""
    greedy = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True, pad_token_id=0, **settings
    )
    ids = random_ids(model, batch_size, prompt)
    # Without this, the model's own end-of-text token could stop it early.
    own, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        with warnings.catch_warnings():
            # Older hosts warn of weights that are read from disk when needed, because they are on no device.
            warnings.filterwarnings("ignore", r"You are calling .generate\(\) with the `input_ids`")
            return model.eval().generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=greedy, **{CACHE: cache}
            )
    finally:
        model.generation_config.eos_token_id = own


def random_ids(model: PreTrainedModel, batch_size: int, length: int) -> Tensor:
    """Token ids `[B, S]`, the same each time, on the model's device."""
    ids = torch.randint(model.config.vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(0))
    return ids if model.device.type == "meta" else ids.to(model.device)


def cache_of(output: ModelOutput) -> Cache:
    """The cache in the output of a model or of `generate()`; transformers 5.24 changed its name."""
    return output["cache" if "cache" in output else "past_key_values"]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers, shared ones counted once."""
    return sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})


def peak_during(run: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """Run a function; return its result, and the peak of memory above the level before, in bytes.

    On CUDA this is memory that torch allocated, on a CPU resident memory of the process; None where the system cannot
    tell (any but Linux).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        return result, torch.cuda.max_memory_allocated(device) - before
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return run(), None
    start = process_memory("VmRSS")
    result, peak = run(), process_memory("VmHWM")
    return result, None if start is None or peak is None else max(0, peak - start)


def process_memory(figure: str) -> int | None:
    """Bytes of the process's resident memory: `VmRSS` now, or `VmHWM`, the peak so far; None outside Linux.

    `VmHWM` counts only this program's memory; getrusage's ru_maxrss would start from the parent's.
    """
    status = Path("/proc/self/status")
    found = re.search(rf"{figure}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else None
