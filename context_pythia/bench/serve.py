"""`context-pythia bench --serve`: conversations on vLLM's engine, GPT-NeoX beside models with a smaller cache.

The models run one after the other, each in a process of its own, on the same engine with the same memory for the
cache. All conversations arrive at once. Their prompts are random tokens that begin with a common part, as with a system
prompt, and every answer has the same number of tokens. A smaller cache pays where the cache is the bottleneck: more
conversations run at once, and fewer are evicted and computed again.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig, GPTNeoXConfig

from context_pythia.bench.models import sized_models
from context_pythia.bench.options import ServeOptions, Source
from context_pythia.errors import Failure, UsageError, first_line
from context_pythia.files import write_json
from context_pythia.runs.provenance import provenance
from context_pythia.serving import OLDEST_VLLM, vllm_version

MEGABYTE = 2**20
# Engine steps from one count of the running conversations to the next.
COUNT_EVERY = 8


def serve(
    models: Sequence[str],
    size: str | None,
    sources: Sequence[Source] | None,
    options: ServeOptions,
    out: Path | None = None,
    progress: bool = True,
    show: Callable[[dict[str, Any]], None] = lambda metrics: None,
) -> dict[str, Any]:
    """Write the figures into `out` if it is given, and return them.

    Args:
        models: folders, a GPT-NeoX among them; or give a `size`, whose models get random weights.
        sources: of the Context-Pythias of that size.
        out: gets metrics.json after each model, and provenance.json.
        show: is called with the figures after each model.

    Raises:
        UsageError: something that cannot be measured as asked; found before an engine starts.
        Failure: no model could be served.
    """
    version = vllm_version()
    if version is None:
        raise UsageError(f"bench --serve: needs vLLM {OLDEST_VLLM} or newer, install it as docs/serving.md says")
    threads = options.threads or len(os.sched_getaffinity(0))
    settings = asdict(options) | {"threads": threads, "device": "cuda" if torch.cuda.is_available() else "cpu"}
    metrics: dict[str, Any] = {"kind": "serve", "settings": settings, "notes": [], "vllm": version, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        if size is not None:
            sized = sized_models(size, sources, options.length, getattr(torch, options.dtype))
            for name, model in sized.items():
                model.save_pretrained(Path(folder) / name)
                models = [*models, f"{folder}/{name}"]
        rows = [_row(model, options) for model in models]
        if not any(row["peer"] for row in rows):
            raise UsageError("bench --serve: add a GPT-NeoX model, the reference of the ratios")
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "provenance.json", provenance(torch.device(settings["device"])))
        for model, row in zip(models, tqdm(rows, disable=None if progress else True), strict=True):
            metrics["rows"].append(row)
            row |= _in_own_process(model, options, threads)
            if out is not None:
                write_json(out / "metrics.json", metrics)
            with tqdm.external_write_mode():
                show(metrics)
    if all(row["error"] for row in rows):
        raise Failure(f"no model could be served: {rows[0]['error']}")
    return metrics


def prompts(options: ServeOptions, vocab_size: int) -> list[list[int]]:
    """Random tokens: first the common ones, then those of each prompt."""
    dice = random.Random(options.seed)
    common = [dice.randrange(vocab_size) for _ in range(int(options.common * options.prompt_tokens))]
    rest = options.prompt_tokens - len(common)
    return [common + [dice.randrange(vocab_size) for _ in range(rest)] for _ in range(options.conversations)]


def _row(model: str, options: ServeOptions) -> dict[str, Any]:
    if not (Path(model) / "config.json").is_file():
        raise UsageError(f"{model}: is not a model's folder, give one with a config.json")
    config = AutoConfig.from_pretrained(model)
    if options.length > config.max_position_embeddings:
        raise UsageError(
            f"length {options.length} (prompt and answer): must be at most {config.max_position_embeddings}, "
            f"the positions of {model}"
        )
    # A subclass is not a GPT-NeoX itself.
    return {"name": Path(model).resolve().name, "peer": type(config) is GPTNeoXConfig, "rounds": [], "error": None}


def _in_own_process(model: str, options: ServeOptions, threads: int) -> dict[str, Any]:
    """The figures of a process of its own. The engine runs inside it, so that its processor time is the engine's."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", OMP_NUM_THREADS=str(threads))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_work, model, options).result()
        except BrokenProcessPool:
            return {"error": "its process ended early: out of memory?"}


def _work(model: str, options: ServeOptions) -> dict[str, Any]:
    from vllm import LLM

    try:
        llm = LLM(
            model,
            skip_tokenizer_init=True,
            dtype=options.dtype,
            max_model_len=options.length,
            max_num_seqs=options.conversations,
            kv_cache_memory_bytes=options.cache_mb * MEGABYTE,
            enforce_eager=not options.compile,
            disable_log_stats=False,
        )
        asked = prompts(options, llm.model_config.hf_config.vocab_size)
        # Warm-up: the first calls are slow.
        converse(llm, [prompt[: min(64, len(prompt))] for prompt in asked[:2]], 2)
        rounds = []
        for _ in range(options.rounds):
            llm.reset_prefix_cache()
            rounds.append(converse(llm, asked, options.answer_tokens))
        tokens = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
        return {"tokens_fit": tokens, "conversations_fit": tokens / options.length, "rounds": rounds}
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        return {"error": first_line(error)}


def converse(llm: Any, asked: list[list[int]], answer_tokens: int) -> dict[str, Any]:
    """All conversations at once until the last is answered: seconds, and what the engine counted.

    Returns:
        seconds of the clock and of the processors; seconds to each conversation's first token since all arrived; the
        most and the mean number that ran at once; preemptions; prompt tokens found in the cache.
    """
    from vllm import SamplingParams

    engine, running = llm.llm_engine, []
    first: dict[str, float] = {}
    greedy = SamplingParams(temperature=0, max_tokens=answer_tokens, ignore_eos=True, detokenize=False)
    before = _counters(llm)
    started, processor = time.perf_counter(), time.process_time()
    for i, prompt in enumerate(asked):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, greedy)
    steps = 0
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter() - started
        for output in outputs:
            first.setdefault(output.request_id, now)
        if steps % COUNT_EVERY == 0:
            running.append(_counters(llm)["num_requests_running"])
        steps += 1
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    after = _counters(llm)
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        "steps": steps,
        "first_token_seconds": sorted(first.values()),
        "most_running": max(running),
        "mean_running": sum(running) / len(running),
        "preemptions": after["num_preemptions"] - before["num_preemptions"],
        "prompt_tokens_cached": after["prefix_cache_hits"] - before["prefix_cache_hits"],
    }


def _counters(llm: Any) -> dict[str, float]:
    names = ("num_requests_running", "num_preemptions", "prefix_cache_hits")
    found = {metric.name.removeprefix("vllm:"): metric for metric in llm.get_metrics()}
    return {name: getattr(found[name], "value", 0) for name in names}
