"""How fast models prefill and decode, one beside the other.

Every model takes its turn in every round (A B A B ...), so that a machine that grows slower or faster meanwhile favours
none; what is compared are the ratios within the rounds. A first, untimed run of everything is the warm-up.

A cell of batch size B and length T: prefill reads T tokens into an empty cache. Decoding starts from a cache of T - N
tokens and makes the last N, once by `generate()` and once by the bare forward. That cache is filled with random numbers
of the right shapes, since its contents do not matter to the time, and set back to T - N tokens between the runs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from context_pythia.evaluation.memory import cache_of, free_memory, peak_during
from context_pythia.evaluation.quantized import measure_quantized, quantized_cache
from context_pythia.model.cache import CacheMeasurement, cache_bytes, measure_cache
from context_pythia.runs.build import compiled_step

# What a failed allocation or kernel raises; the row is then recorded with its reason, and the others go on.
FAILURES = (RuntimeError, MemoryError)


@dataclass(frozen=True)
class Subject:
    """What is timed: a model and the kind of cache it uses, `dynamic` (its own, by default), `static`, `int4`, or
    `compiled`, a static cache and a compiled decoding step."""

    name: str
    model: PreTrainedModel
    cache: str = "dynamic"

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def is_static(self) -> bool:
        return self.cache in ("static", "compiled")

    @property
    def decoding_step(self) -> Callable[..., Any]:
        return self.model.get_compiled_call(compiled_step()) if self.cache == "compiled" else self.model

    def empty_cache(self, length: int) -> Cache:
        """A cache that will hold `length` tokens."""
        if self.cache == "int4":
            return quantized_cache(self.model.config, "int4", length)
        if self.is_static:
            return StaticCache(config=self.model.config, max_cache_len=length)
        return DynamicCache(config=self.model.config)

    def measure(self, cache: Any) -> CacheMeasurement:
        return measure_quantized(cache) if self.cache == "int4" else measure_cache(cache)

    def bytes_needed(self, batch_size: int, length: int) -> int:
        """About how much a prefill of the cell takes beside the weights: the cache, and one layer's activations."""
        config, size = self.model.config, self.model.dtype.itemsize
        activations = batch_size * length * (2 * config.intermediate_size + 6 * config.hidden_size) * size
        return cache_bytes(config, length, batch_size, self.model.dtype) + activations


@dataclass
class Speed:
    """A subject's row of a cell. A run gives one number to each list, in the order of the rounds.

    Attributes:
        prefill: seconds for all T tokens.
        decode: seconds a token (of all sequences) by the bare forward.
        generate: seconds a token by `generate()`.
        cache: of T tokens, as a `generate()` from an empty cache left it.
        peak_bytes: most memory in that `generate()` above the weights; None where the system does not say.
        error: why the row ends early.
    """

    name: str
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    generate: list[float] = field(default_factory=list)
    cache: CacheMeasurement | None = None
    peak_bytes: int | None = None
    error: str | None = None


class FilledCache:
    """A cache of `tokens` random tokens, made once and decoded from many times.

    Args:
        length: tokens that it will hold at most.
    """

    def __init__(self, subject: Subject, batch_size: int, tokens: int, length: int):
        self.subject, self.tokens = subject, tokens
        self.cache = subject.empty_cache(length)
        ids = torch.zeros(batch_size, 1, dtype=torch.long, device=subject.device)
        # One true token starts everything that a cache keeps besides keys and values, and shows the shapes.
        example = DynamicCache(config=subject.model.config)
        for cache in (example, self.cache):
            subject.model(input_ids=ids, past_key_values=cache, use_cache=True)
        for i, layer in enumerate(example.layers):
            if layer.keys is not None and tokens > 1:  # a layer that reads another's context holds nothing
                keys, values = (self._random(tensor, tokens - 1) for tensor in (layer.keys, layer.values))
                self.cache.update(keys, values, i)
        self.contexts = [getattr(layer, "contexts", None) for layer in self.cache.layers]

    def restored(self) -> Cache:
        """The cache as it was when it was made."""
        if self.subject.cache == "int4":
            # Old tokens are quantised together with new ones, so nothing can be taken off.
            return copy.deepcopy(self.cache)
        for layer in self.cache.layers:
            if hasattr(layer, "contexts"):
                layer.contexts = None  # else a crop would look for the contexts before its tokens
        if self.subject.is_static:
            for layer in self.cache.layers:
                if hasattr(layer, "cumulative_length"):  # a layer that reads another's context has none
                    layer.cumulative_length.fill_(self.tokens)
        else:
            self.cache.crop(self.tokens - int(self.cache.get_seq_length()))
        for layer, contexts in zip(self.cache.layers, self.contexts, strict=True):
            if contexts is not None:
                layer.contexts = contexts
        return self.cache

    @staticmethod
    def _random(like: torch.Tensor, tokens: int) -> torch.Tensor:
        """Random numbers of the shape of a layer's keys or values `[B, heads, 1, width]`, for so many tokens."""
        return torch.randn(*like.shape[:2], tokens, like.shape[3], dtype=like.dtype, device=like.device)


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds until the work of `run` is done, that of a GPU included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def interleave(
    runs: Mapping[str, Callable[[], float]],
    rounds: int,
    budget: float = float("inf"),
    done: Callable[[], None] = lambda: None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Call all of `runs` in turn, round after round.

    Args:
        runs: name -> one timed run that returns its seconds.
        budget: a run whose seconds add up to more takes no further turn.
        done: called after each turn, taken or not.

    Returns:
        each run's seconds by round, and the reason of those that failed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    errors: dict[str, str] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            if name not in errors and sum(seconds[name]) <= budget:
                try:
                    seconds[name].append(run())
                except FAILURES as error:
                    errors[name] = _reason(error)
            done()
    return seconds, errors


@torch.no_grad()
def measure_cell(
    subjects: Sequence[Subject],
    batch_size: int,
    length: int,
    *,
    new_tokens: int,
    rounds: int,
    budget: float = float("inf"),
    prefill: bool = True,
    done: Callable[[], None] = lambda: None,
) -> list[Speed]:
    """All figures of one batch size and length, a row a subject.

    Args:
        length: tokens in the cache at the end, more than `new_tokens`.
        new_tokens: tokens that a timed run decodes.
        budget: seconds after which a row takes no further turn of a kind.
        prefill: without it no cell reads its T tokens, which takes minutes where they are many: the cache that is
            measured is then the one that `generate()` went on from, and there is no peak.
        done: called after each turn; a row has `turns(rounds, prefill)` of them, fewer if it fails.
    """
    assert length > new_tokens >= 1
    rows = {subject.name: Speed(subject.name) for subject in subjects}
    for subject in subjects:
        row = rows[subject.name]
        row.error = _too_large(subject, batch_size, length)
        if prefill and row.error is None:
            _first_run(subject, row, batch_size, length, new_tokens)
        done()
    ready = [subject for subject in subjects if rows[subject.name].error is None]

    def times(kind: str, runs: dict[str, Callable[[], float]], tokens: int = 1) -> None:
        runs = {name: run for name, run in runs.items() if rows[name].error is None}
        seconds, errors = interleave(runs, rounds, budget, done)
        for name, values in seconds.items():
            setattr(rows[name], kind, [value / tokens for value in values])
            rows[name].error = errors.get(name)

    if prefill:
        times("prefill", {subject.name: _prefill(subject, batch_size, length) for subject in ready})
    decoding = _Decoding(ready, batch_size, length, new_tokens)
    times("decode", {subject.name: decoding.forward(subject) for subject in ready}, new_tokens)
    times("generate", {subject.name: decoding.generate(subject) for subject in ready}, new_tokens)
    for name, cache in decoding.left.items():
        rows[name].cache = rows[name].cache or cache
    return list(rows.values())


def turns(rounds: int, prefill: bool = True) -> int:
    """Turns of a row in a cell: the warm-up, then prefill, forward and `generate()` in every round."""
    return 1 + (3 if prefill else 2) * rounds


@torch.no_grad()
def measure_conversation(subject: Subject, length: int, new_tokens: int = 8) -> CacheMeasurement:
    """The cache that `generate()` leaves for one sequence of `length` tokens."""
    output = _generate(subject, 1, length - new_tokens + 1, new_tokens, subject.empty_cache(length))
    return subject.measure(cache_of(output))


def _too_large(subject: Subject, batch_size: int, length: int) -> str | None:
    """The reason, where a cell does not fit the free memory."""
    free, needed = free_memory(subject.device), subject.bytes_needed(batch_size, length)
    if free is None or needed <= free:
        return None
    return f"needs about {needed / 2**30:.1f} GB beside the weights, {free / 2**30:.1f} GB are free"


def _first_run(subject: Subject, row: Speed, batch_size: int, length: int, new_tokens: int) -> None:
    """`generate()` from an empty cache: the warm-up, the peak and the cache that it leaves."""
    try:
        _generate(subject, 1, 4, 2, subject.empty_cache(8))  # what is allocated once and for all is no cell's peak
        output, row.peak_bytes = peak_during(
            lambda: _generate(subject, batch_size, length - new_tokens + 1, new_tokens, subject.empty_cache(length)),
            subject.device,
        )
        row.cache = subject.measure(cache_of(output))
        assert row.cache.length == length
    except FAILURES as error:
        row.error = _reason(error)


def _prefill(subject: Subject, batch_size: int, length: int) -> Callable[[], float]:
    ids = _ids(subject, batch_size, length)

    def run() -> float:
        cache = subject.empty_cache(length)
        return seconds_of(
            lambda: subject.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1),
            subject.device,
        )

    return run


class _Decoding:
    """Timed decoding runs from filled caches, which are kept for the next round where memory allows it."""

    def __init__(self, subjects: Sequence[Subject], batch_size: int, length: int, new_tokens: int):
        self.batch_size, self.length, self.new_tokens = batch_size, length, new_tokens
        self.kept: dict[str, FilledCache] = {}
        self.left: dict[str, CacheMeasurement] = {}  # by a subject's last run
        needed = 2 * sum(subject.bytes_needed(batch_size, length) for subject in subjects)
        free = free_memory(subjects[0].device) if subjects else None
        self.keep = free is None or needed < free

    def forward(self, subject: Subject) -> Callable[[], float]:
        ids = _ids(subject, self.batch_size, 1)

        def decode(cache: Cache, tokens: int) -> None:
            for _ in range(tokens):
                subject.decoding_step(input_ids=ids, past_key_values=cache, use_cache=True)

        return lambda: self._run(subject, decode)

    def generate(self, subject: Subject) -> Callable[[], float]:
        prompt = self.length - self.new_tokens + 1
        return lambda: self._run(
            subject, lambda cache, tokens: _generate(subject, self.batch_size, prompt, tokens, cache)
        )

    def _run(self, subject: Subject, decode: Callable[[Cache, int], Any]) -> float:
        filled = self.kept.get(subject.name)
        if filled is None:
            filled = FilledCache(subject, self.batch_size, self.length - self.new_tokens, self.length)
            # A cache that grows in place makes its room here, as it did long ago in use; and the second step is the
            # one that `generate()` compiles.
            decode(filled.restored(), min(2, self.new_tokens))
            if self.keep:
                self.kept[subject.name] = filled
        cache = filled.restored()
        seconds = seconds_of(lambda: decode(cache, self.new_tokens), subject.device)
        self.left[subject.name] = subject.measure(cache)
        return seconds


def _generate(subject: Subject, batch_size: int, prompt: int, new_tokens: int, cache: Cache) -> Any:
    """Greedy `generate()` of exactly so many tokens after a prompt, of which the cache may hold all but the last."""
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        compile_config=compiled_step() if subject.cache == "compiled" else None,
        disable_compile=subject.cache != "compiled",
    )
    ids = _ids(subject, batch_size, prompt)
    # An unset end of text would be taken from the model's own settings, and could stop early.
    own = subject.model.generation_config
    ends, own.eos_token_id = own.eos_token_id, None
    try:
        return subject.model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings, past_key_values=cache
        )
    finally:
        own.eos_token_id = ends


def _ids(subject: Subject, batch_size: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(subject.model.config.vocab_size, (batch_size, length), generator=generator).to(subject.device)


def _reason(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
