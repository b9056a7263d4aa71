"""What a model holds in memory, measured: the cache that `generate()` really fills, the weights, and the peak.

Peak memory on a CPU is the process's, which never falls by itself: what one run freed the C library may keep, and a
high-water mark hides all that stays below it. `peak_during` first returns freed memory to the system (malloc_trim),
then sets the kernel's mark for this process back (/proc/self/clear_refs), so each run has a mark of its own.
"""

import ctypes
import gc
import platform
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, QuantizedCache
from transformers.utils import ModelOutput

from context_pythia.evaluation.quantized import measure_quantized
from context_pythia.model.cache import CacheMeasurement, measure_cache

T = TypeVar("T")


def measure_generated_cache(
    model: PreTrainedModel,
    length: int,
    batch_size: int = 1,
    decoded: int | None = None,
    cache: Cache | None = None,
    **settings: Any,
) -> CacheMeasurement:
    """Run greedy `generate()` until `length` tokens are cached and measure the cache it leaves.

    The first tokens are a prompt, so prefill and decoding both write to the cache. Every generated token but the last
    is cached.

    Args:
        model: any causal language model of transformers, on any device; its dtype is the cache's.
        length: cached tokens, at least 1.
        batch_size: sequences.
        decoded: tokens of `length` that are not of the prompt; half of them if absent.
        cache: an empty one to fill; the model's own by default.
        settings: as `generate_tokens` takes them.
    """
    prompt = max(1, length // 2 if decoded is None else length - decoded)
    output = generate_tokens(model, prompt, length - prompt + 1, batch_size, cache, **settings)
    measured = measure_any_cache(cache_of(output))
    assert measured.length == length, f"generate() cached {measured.length} tokens, {length} were asked for"
    return measured


@torch.no_grad()
def generate_tokens(
    model: PreTrainedModel, prompt: int, new_tokens: int, batch_size: int, cache: Cache | None = None, **settings: Any
) -> ModelOutput:
    """Greedy `generate()` of exactly `new_tokens` tokens after a prompt of random ones; `settings` go into its
    `GenerationConfig`."""
    greedy = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True, pad_token_id=0, **settings
    )
    ids = random_ids(model, batch_size, prompt)
    # An unset end of text would be taken from the model's own settings, and could stop early.
    own, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        with warnings.catch_warnings():
            # Weights that are read from disk as they are needed stand on no device, of which older hosts warn.
            warnings.filterwarnings("ignore", r"You are calling .generate\(\) with the `input_ids`")
            return model.eval().generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=greedy, past_key_values=cache
            )
    finally:
        model.generation_config.eos_token_id = own


def random_ids(model: PreTrainedModel, batch_size: int, length: int) -> Tensor:
    """Token ids `[B, S]`, the same each time, on the model's device."""
    ids = torch.randint(model.config.vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(0))
    return ids if model.device.type == "meta" else ids.to(model.device)


def measure_any_cache(cache: Cache) -> CacheMeasurement:
    """Bytes of a filled cache, quantized or not."""
    return measure_quantized(cache) if isinstance(cache, QuantizedCache) else measure_cache(cache)


def cache_of(output: ModelOutput) -> Cache:
    """The cache in what a model or `generate()` returned, under its name before and since transformers 5.24."""
    return output["cache" if "cache" in output else "past_key_values"]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers, shared ones counted once."""
    return sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})


def peak_during(run: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """Run something; its result, and by how many bytes memory rose at most above what was held before.

    On CUDA it is what torch allocated, on a CPU what the process had resident; None where the system does not say
    (it takes Linux).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        result = run()
        return result, torch.cuda.max_memory_allocated(device) - held
    release_memory(device)
    before = process_memory("VmRSS") if _reset_mark() else None
    result = run()
    peak = process_memory("VmHWM")
    return result, None if before is None or peak is None else max(0, peak - before)


def process_memory(figure: str) -> int | None:
    """Bytes of the process's resident memory: `VmRSS`, now, or `VmHWM`, the most so far; None off Linux.

    The kernel counts `VmHWM` for the program's own memory; getrusage's ru_maxrss would begin with the parent's.
    """
    status = Path("/proc/self/status")
    found = re.search(rf"{figure}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else None


def release_memory(device: torch.device) -> None:
    """Give freed memory back, to the GPU's other users or (glibc) to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", info.read_text()) if info.exists() else None
    return 1024 * int(found[1]) if found else None


def _reset_mark() -> bool:
    """Set `VmHWM` back to `VmRSS`; whether the system let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
