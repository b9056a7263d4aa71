"""Phase 1 against the report's own way: rate in turns on one machine, and peak memory at 6.4 million tokens.

    python results/phase1/measure.py rate 1 1152000      (threads, tokens of the stream)
    python results/phase1/measure.py memory float32      (or bfloat16: the contexts' dtype)

The report's way, written out plainly: embeddings of the whole stream in memory, all contexts shifted and copied once an
iteration and concatenated anew, the product over [context ; embedding] in fp32. Ids are random, with the frequencies of
Zipf's law; times are a batch's share of an iteration.

It measures the package of commit 3930306: later ones have no `OacdRun`.
"""

import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from context_pythia.training.oacd_run import OacdRun

from context_pythia.config.recipe import Phase1Options
from context_pythia.data.packing import PackedData, PackedDataset
from context_pythia.model import ContextPythiaConfig, ContextPythiaForCausalLM
from context_pythia.training.allocator import keep_freed_memory
from context_pythia.training.oacd import oacd_loss

VOCABULARY, WIDTH, CONTEXT, LENGTH, BATCH = 50_304, 512, 256, 128, 5000
REPORT = "the report's way"


def make_run(tokens: int, folder: str, **options: str) -> OacdRun:
    torch.manual_seed(0)
    config = ContextPythiaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, intermediate_size=64,
        context_source="shared", context_dim=CONTEXT,
    )  # fmt: skip
    frequencies = 1 / np.arange(1, VOCABULARY + 1)
    rows = np.random.default_rng(0).choice(
        VOCABULARY, size=(tokens // LENGTH, LENGTH + 1), p=frequencies / frequencies.sum()
    )
    split = PackedDataset(rows.astype(np.uint16))
    data = PackedData(split, split, tokenizer=None, summary={"fingerprint": "random"})
    run = OacdRun(ContextPythiaForCausalLM(config), data, Phase1Options(**options), 0, Path(folder))
    run.start()
    return run


def report_iteration(run: OacdRun, embeddings: torch.Tensor, contexts: torch.Tensor, draw: torch.Generator):
    """One iteration as the report's code does it; gives the new contexts."""
    block = run.block.layers[0]
    shifted = torch.cat([torch.zeros(1, CONTEXT), contexts[:-1]])
    shifted = shifted + 0.05 * torch.randn(shifted.shape, generator=draw)
    batches, new = -(-len(contexts) // BATCH), []
    for first in range(0, len(contexts), BATCH):
        previous = shifted[first : first + BATCH]
        inputs = torch.cat([previous, embeddings[first : first + BATCH]], dim=-1)
        swept = block.norm(previous + torch.nn.functional.gelu(block.dense(inputs)))
        (oacd_loss(swept, 0.1) / batches).backward()
        new.append(swept.detach())
    new = torch.cat(new)
    ((new - contexts).square().mean(dim=-1) < 0.03).sum().item()
    torch.nn.utils.clip_grad_norm_(run.block.parameters(), 2.0)
    return new


def work(way: str, tokens: int, threads: int, pipe) -> None:
    """One way in a process of its own, since the allocator's settings are the whole process's; an iteration a turn."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(tokens, folder, precision="bfloat16" if way == "bfloat16" else "float32")
        if way != REPORT:
            keep_freed_memory()
        else:
            with torch.no_grad():
                embeddings = run.model.gpt_neox.embed_context_input(run.data.train.stream(0, tokens))
            draw = torch.Generator().manual_seed(0)
        while pipe.recv():
            began = time.process_time()
            if way == REPORT:
                run.contexts = report_iteration(run, embeddings, run.contexts, draw)
            else:
                for _ in range(run.turns):
                    run.advance()
            pipe.send(1000 * (time.process_time() - began) / run.turns)


def measure_rate(threads: int, tokens: int, rounds: int = 3) -> dict:
    """Milliseconds of the processor for a batch of 5,000 tokens, the ways taking turns, the first of each not counted.

    Not the clock's: other work on the machine would count. Page faults do.
    """
    spawn, pipes = multiprocessing.get_context("spawn"), {}
    for way in (REPORT, "float32", "bfloat16"):
        pipes[way], end = spawn.Pipe()
        spawn.Process(target=work, args=(way, tokens, threads, end), daemon=True).start()
    times: dict[str, list[float]] = {way: [] for way in pipes}
    for turn in range(rounds + 1):
        for way, pipe in pipes.items():
            pipe.send(True)
            spent = pipe.recv()
            if turn:
                times[way].append(spent)
    for pipe in pipes.values():
        pipe.send(False)
    median = {way: statistics.median(values) for way, values in times.items()}
    report = times[REPORT]
    ratio = {way: statistics.median(a / b for a, b in zip(report, times[way], strict=True)) for way in times}
    figures = {"milliseconds_a_batch": median, "all": times, "times_the_report": ratio}
    return {"threads": threads, "tokens": tokens} | figures


def measure_memory(state_dtype: str) -> dict:
    """Peak of 50,000 samples of 128 tokens: start, two batches, a checkpoint, and a process that goes on from it."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        run = make_run(50_000 * LENGTH, folder, state_dtype=state_dtype)
        keep_freed_memory()
        peaks = {"start": peak()}
        run.advance()
        run.advance()
        peaks["two batches"] = peak()
        run.save_checkpoint()
        peaks["checkpoint"] = peak()
        contexts = run.contexts.nbytes
        del run.contexts
        run.load_checkpoint()
        peaks["go on from it"] = peak()
    return {"tokens": 50_000 * LENGTH, "contexts_gb": contexts / 1e9, "peak_gb": peaks}


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    figures = measure_rate(int(sys.argv[2]), int(sys.argv[3])) if sys.argv[1] == "rate" else measure_memory(sys.argv[2])
    print(json.dumps(figures, indent=2))
