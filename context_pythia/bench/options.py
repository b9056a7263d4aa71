"""Options of `bench`: sizes, sources, and how much to measure. Imports no torch, for the command's help."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from context_pythia.config.options import Options, option
from context_pythia.config.recipe import PRECISIONS, ArchitectureOptions
from context_pythia.errors import UsageError

CACHES = ("dynamic", "static")
COMPILED = "compiled"  # a static cache and a compiled decoding step, of every model
CONVERSATION = 2048  # tokens per conversation when counting how many fit into memory


def _size(hidden: int, layers: int, heads: int) -> ArchitectureOptions:
    return ArchitectureOptions(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        model_vocab_size=50304,
    )


# Pythia (arXiv 2304.01373), table 1; the vocabulary is that of the sizes up to 1.4B for all.
SIZES: dict[str, ArchitectureOptions] = {
    "pythia-14m": _size(128, 6, 4),
    "pythia-70m": _size(512, 6, 8),
    "pythia-160m": _size(768, 12, 12),
    "pythia-410m": _size(1024, 24, 16),
    "pythia-1b": _size(2048, 16, 8),
    "pythia-1.4b": _size(2048, 24, 16),
    "pythia-2.8b": _size(2560, 32, 32),
}


@dataclass(frozen=True)
class Source:
    """A context to measure at a named size.

    Attributes:
        context_source: `input`, `shared` or `layer`.
        form: for `layer`: "" with one rotary key for all heads; `heads` with one per head; `exact` as in a lossless
            conversion, with one per head, from which keys and values are rebuilt too.
    """

    context_source: str
    context_dim: int
    form: str = ""

    @property
    def name(self) -> str:
        return f"{self.context_source} {self.context_dim} {self.form}".strip()


def parse_sources(text: str) -> tuple[Source, ...]:
    """`"shared:256,layer:512:exact"` -> the sources; UsageError for an invalid one."""
    sources = []
    for word in map(str.strip, text.split(",")):
        if not re.fullmatch(r"(input|shared|layer):[1-9]\d*|layer:[1-9]\d*:(heads|exact)", word):
            valid = "input:DIM, shared:DIM, layer:DIM, layer:DIM:heads or layer:DIM:exact"
            raise UsageError(f"source {word!r}: give {valid}")
        source, width, *form = word.split(":")
        sources.append(Source(source, int(width), *form))
    return tuple(sources)


@dataclass
class BenchOptions(Options):
    """What `bench` measures, and how often."""

    section: ClassVar[str] = "bench"
    batch_sizes: tuple[int, ...] = option(
        (1, 16), "sequences decoded together", bounds=">= 1", flag=True, metavar="N,N"
    )
    lengths: tuple[int, ...] = option((512, 2048), "tokens in the cache", bounds=">= 1", flag=True, metavar="N,N")
    caches: tuple[str, ...] = option(
        CACHES,
        "caches of the GPT-NeoX models; compiled: every model also with a static cache and a compiled decoding step",
        (*CACHES, COMPILED),
        flag=True,
        metavar="A,B",
    )
    new_tokens: int = option(16, "tokens that a timed run decodes", bounds=">= 1", flag=True)
    rounds: int = option(5, "timed rounds; every model runs once in each", bounds=">= 1", flag=True)
    prefill: bool = option(True, "also time the prefill (without it caches are filled with random numbers)", flag=True)
    dtype: str = option("float32", "dtype of weights and cache", PRECISIONS, flag=True)
    threads: int | None = option(None, "CPU threads (default: as many as torch takes)", bounds=">= 1", flag=True)
    memory_gb: float = option(4.0, "memory to fill with conversations (1 GB = 1024^3 bytes)", bounds="> 0")
    steps: int = option(2, "with --train: timed steps per round", bounds=">= 1", flag=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for length in self.lengths:
            if length <= self.new_tokens:
                raise UsageError(f"length {length}: must be more than new_tokens = {self.new_tokens}")
        if "dynamic" not in self.caches:
            raise UsageError(f"caches {','.join(self.caches)}: add dynamic, the reference of the ratios")


@dataclass
class ServeOptions(Options):
    """What `bench --serve` measures: the conversations and the engine."""

    section: ClassVar[str] = "serve"
    conversations: int = option(64, "conversations that arrive at once", bounds=">= 1")
    prompt_tokens: int = option(1024, "tokens of each prompt", bounds=">= 2")
    answer_tokens: int = option(64, "tokens of each answer", bounds=">= 1")
    common: float = option(0.25, "share of each prompt that all have in common", bounds=">= 0 and < 1")
    cache_mb: int = option(192, "memory for the cache (1 MB = 1024^2 bytes)", bounds=">= 1")
    rounds: int = option(1, "how often each model's conversations run", bounds=">= 1")
    compile: bool = option(False, "let vLLM compile GPT-NeoX, which takes minutes at first")
    dtype: str = option("float32", "dtype of weights and cache", PRECISIONS)
    threads: int | None = option(None, "CPU threads (default: one a core)", bounds=">= 1")
    seed: int = option(0, "seed of the prompts")

    @property
    def length(self) -> int:
        """Tokens of a conversation."""
        return self.prompt_tokens + self.answer_tokens
