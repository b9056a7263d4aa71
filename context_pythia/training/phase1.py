"""Phase 1: train the ContextBlock alone, by OACD (Origin-Anchored Centroid Dispersion).

Training stops when nearly all contexts have come to rest. All randomness comes from (seed, iteration, batch), so an
interrupted run goes on in the middle of an iteration and ends with the same bits (on CPU) as one that was never
interrupted. Several processes take a piece of the stream each, and differ from a single one only by the order in which
gradients are added up.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from context_pythia import processes
from context_pythia.config.recipe import Phase1Options
from context_pythia.errors import UsageError
from context_pythia.training.allocator import keep_freed_memory
from context_pythia.training.interrupts import deferred_interrupt
from context_pythia.training.oacd_run import OacdRun, Phase1Result

if TYPE_CHECKING:
    from context_pythia.data.packing import PackedData
    from context_pythia.model import ContextPythiaForCausalLM

DUE, INTERRUPTED = 1, 2  # why a checkpoint is written


def train_context_block(
    model: ContextPythiaForCausalLM,
    data: PackedData,
    options: Phase1Options,
    *,
    seed: int,
    folder: Path,
    progress: bool = True,
) -> Phase1Result:
    """Train `model.gpt_neox.context_block` in place, or load it if `folder` holds the finished result.

    Of several processes each holds the contexts of its piece of the stream, in whole batches. Ctrl-C writes a
    checkpoint at the end of the batch and then raises KeyboardInterrupt; a second one stops at once.

    Args:
        model: of source `input` or `shared`; the rest of it is only read. Runs on its device.
        data: `train` is the stream, `validation` gives the effective rank.
        options: settings of OACD.
        seed: of the first contexts and of the noise.
        folder: gets `context_block.safetensors` and `phase1.json`; the checkpoint until then.
        progress: show a progress bar.

    Raises:
        UsageError: the model has no ContextBlock, or `folder` holds a damaged file or the work of another run (other
            options, seed, text, widths, embeddings or number of processes), or there are fewer batches than processes.
        Failure: the loss is not finite; the last good checkpoint stays.
        OSError: `folder` cannot be written.
    """
    if getattr(model.gpt_neox, "context_block", None) is None:
        raise UsageError("phase 1 trains a ContextBlock and this model has none: choose context source input or shared")
    run = OacdRun(model, data, options, seed, folder)
    if (finished := run.load_finished()) is not None:
        return finished
    folder.mkdir(parents=True, exist_ok=True)
    run.load_checkpoint()
    frozen = [parameter for parameter in run.block.parameters() if not parameter.requires_grad]
    try:
        run.block.requires_grad_(True)
        _iterate(run, progress)
    finally:
        run.block.zero_grad()
        for parameter in frozen:
            parameter.requires_grad_(False)
    return run.finish()


def _iterate(run: OacdRun, progress: bool) -> None:
    if run.finished:
        return
    if run.device.type == "cpu":
        keep_freed_memory()
    saved = time.monotonic()
    total = run.options.max_iterations * run.turns
    layout = "{desc} |{bar:20}| {elapsed}<{remaining}{postfix}"
    with (
        deferred_interrupt() as interrupt,
        tqdm(
            total=total,
            initial=len(run.history) * run.turns + run.batch,
            bar_format=layout,
            mininterval=0.5,
            disable=not (progress and processes.is_main()),
        ) as bar,
    ):
        while not run.finished:
            bar.set_description(
                f"phase 1, iteration {len(run.history) + 1}/{run.options.max_iterations}", refresh=False
            )
            run.advance()
            if run.batch == 0:
                bar.set_postfix_str(f"converged {run.history[-1]['convergence_rate']:.1%}", refresh=False)
            bar.update()
            # The last one covers the held-out scan that follows.
            due = run.finished or time.monotonic() - saved >= run.options.checkpoint_seconds
            wanted = processes.highest(INTERRUPTED if interrupt.is_set() else DUE if due else 0)
            if wanted:
                run.save_checkpoint()
                saved = time.monotonic()
            if wanted == INTERRUPTED:
                raise KeyboardInterrupt
