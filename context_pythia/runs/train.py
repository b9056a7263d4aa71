"""The experiment: train every model of a recipe in both phases, on the same data and seed, into one run folder.

`compare` trains all models of its recipe; `run_phase1` runs only their phase 1. Both resume an earlier call, and run in
all processes that `torchrun` starts; models that are converted from the trained baseline need a single process.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from context_pythia import processes
from context_pythia.config.convert import ConvertOptions
from context_pythia.config.recipe import RECURRENT, ModelOptions, Recipe
from context_pythia.data.packing import PackedData, load_data
from context_pythia.errors import Failure, UsageError, first_line, is_failure
from context_pythia.evaluation.pretrained import load_pretrained
from context_pythia.runs.build import (
    best_device,
    build_model,
    describe_cache,
    describe_parameters,
    embedding_rows,
)
from context_pythia.runs.convert import Conversion
from context_pythia.runs.provenance import machine
from context_pythia.runs.record import Run, model_entry
from context_pythia.training.history import result_of
from context_pythia.training.phase1 import Phase1Result, train_context_block
from context_pythia.training.phase2 import check_options, train_language_model


@processes.joined()
def compare(recipe: Recipe, out: Path, progress: bool = True, origin: Run | None = None) -> None:
    """Train and measure every model of the recipe.

    If a model fails, its entry has the reason and the next one runs. In several processes a failure ends the run.

    Args:
        origin: as in `Run`.

    Raises:
        Failure: a model failed; raised after the others are recorded.
    """
    check_training(recipe)
    run, data = _open(recipe, out, progress, origin)
    if wanted := [options.name for options in recipe.models if options.name not in run.finished]:
        run.write_provenance(wanted, best_device())
    failures = []
    for options in sorted(recipe.models, key=attrgetter("from_baseline")):  # the baseline is trained before
        if options.name in run.finished:
            print(f"{options.name}: already trained", flush=True)
            continue
        make = _heal_and_measure if options.from_baseline else _train_and_measure
        try:
            with _alone_with(options, run):
                run.write(make(options, run, data, progress))
        except Exception as error:
            # The other processes wait for this one in the middle of a model.
            if processes.count() > 1 or not is_failure(error):
                raise
            failures.append(f"{options.name}: {first_line(error)}")
            run.write(model_entry(options, error=first_line(error)))
        else:
            print(f"{options.name}: wrote {run.model_folder(options)}", flush=True)
        gc.collect()
    if failures:
        raise Failure(f"{len(failures)} of {len(recipe.models)} models failed: {failures[0]}")


@processes.joined()
def run_phase1(recipe: Recipe, out: Path, progress: bool = True) -> None:
    """Run phase 1 of the recipe's models.

    Raises:
        UsageError: a model has no ContextBlock.
    """
    for options in recipe.models:
        if options.context_source not in RECURRENT:
            raise UsageError(
                f"{options.name} has no ContextBlock: name a model whose context_source is input or shared"
            )
    run, data = _open(recipe, out, progress)
    run.write_provenance([options.name for options in recipe.models], best_device())
    for options in recipe.models:
        with _alone_with(options, run):
            _phase1(_build(options, run, data), options, run, data, progress)
        print(f"wrote {run.phase1_folder(options)}")


def check_training(recipe: Recipe) -> None:
    """Raise `UsageError` for options of training or healing that are impossible here or contradict each other."""
    check_options(recipe.train)
    if any(options.from_baseline for options in recipe.models):
        check_options(recipe.heal)


def training_data(recipe: Recipe, progress: bool) -> PackedData:
    """The recipe's data. For a pass over tokens, text that is too short for `data.samples` may have enough of them.

    Raises:
        UsageError: the text has too few samples, or too few tokens for the pass.
    """
    tokens, source = recipe.train.tokens, recipe.data.data
    data = load_data(recipe.data, progress, tokens is None)
    if tokens is not None and tokens > (most := data.train.num_tokens):
        mend = f"give --tokens {most} at most, or more text" if most >= recipe.step_tokens else "give more text"
        raise UsageError(f"train.tokens {tokens}: {source} has {most} tokens to train on, {mend}")
    return data


def _open(recipe: Recipe, out: Path, progress: bool, origin: Run | None = None) -> tuple[Run, PackedData]:
    with processes.main_first():
        run = Run(out, recipe, origin)
        _check_origins(recipe, run)
        data = training_data(recipe, progress)
    if data.samples < recipe.data.samples and processes.is_main():
        print(
            f"note: {recipe.data.data} gives {data.samples} of data.samples {recipe.data.samples}: "
            f"{len(data.train)} to train on and {len(data.validation)} held out",
            flush=True,
        )
    embedding_rows(recipe, data.summary["vocab_size"])
    run.use_data(data.summary)
    run.write()
    return run, data


def _check_origins(recipe: Recipe, run: Run) -> None:
    """Raise `UsageError` if a model's baseline will be missing when the model has to be converted from it."""
    healed = [model.name for model in recipe.models if model.from_baseline and model.name not in run.finished]
    if not healed:
        return
    trained = any(model.is_baseline and model.name in run.origin.finished for model in run.origin.recipe.models)
    if not trained and not any(model.is_baseline for model in recipe.models):
        raise UsageError(
            f"{healed[0]} is converted from the trained baseline, but {run.origin.folder} has none: list a baseline too"
        )
    if processes.count() > 1:
        raise UsageError(
            f"{healed[0]} is converted from the trained baseline in one process, but {processes.count()} were "
            "started: train the others with --models, then this one in one process"
        )


def _build(options: ModelOptions, run: Run, data: PackedData) -> Any:
    rows = embedding_rows(run.recipe, data.summary["vocab_size"])
    return build_model(options, run.recipe, rows, data.tokenizer).to(best_device())


def _phase1(model: Any, options: ModelOptions, run: Run, data: PackedData, progress: bool) -> Phase1Result:
    folder = run.phase1_folder(options)
    result = train_context_block(model, data, run.recipe.phase1, seed=run.recipe.seed, folder=folder, progress=progress)
    print(
        f"{options.name}: phase 1: {result.convergence_rate:.1%} of the contexts converged "
        f"in {result.iterations} iterations, effective rank {result.effective_rank:.1f} of {options.context_dim}, "
        f"{result.seconds:.1f} s",
        flush=True,
    )
    return result


@contextlib.contextmanager
def _alone_with(options: ModelOptions, run: Run) -> Iterator[None]:
    """Raise `UsageError` if another call trains the model in this folder: they would share its checkpoints."""
    with contextlib.ExitStack() as held:
        if processes.is_main():
            (run.folder / ".locks").mkdir(exist_ok=True)
            try:
                held.enter_context(FileLock(run.folder / ".locks" / f"{options.folder}.lock", timeout=0))
            except Timeout:
                raise UsageError(
                    f"another call trains {options.name} in {run.folder} now: wait for its end, or choose another --out"
                ) from None
        yield


def _train_and_measure(options: ModelOptions, run: Run, data: PackedData, progress: bool) -> dict[str, Any]:
    model = _build(options, run, data)
    phase1 = None
    if options.context_source in RECURRENT and options.phase1:
        phase1 = asdict(_phase1(model, options, run, data, progress))
    parameters = describe_parameters(model)
    print(
        f"{options.name}: {parameters['parameters']:,} parameters, {parameters['trainable_parameters']:,} trained",
        flush=True,
    )
    result = train_language_model(
        model,
        data,
        run.recipe.train,
        seed=run.recipe.seed,
        folder=run.model_folder(options),
        name=options.name,
        progress=progress,
    )
    cache = describe_cache(model, run.recipe.data.sequence_length)
    return model_entry(
        options,
        **parameters,
        intermediate_size=model.config.intermediate_size,
        **asdict(result),
        phase1=phase1,
        cache=cache,
        machine=machine(best_device()),
    )


def _heal_and_measure(options: ModelOptions, run: Run, data: PackedData, progress: bool) -> dict[str, Any]:
    """The entry of a model that is converted from the trained baseline; its epochs count from the conversion."""
    baseline, entry = run.origin.baseline()
    recipe, original, folder = run.recipe, str(run.origin.model_folder(baseline)), run.model_folder(options)
    control = options.context_source is None
    print(f"{options.name}: {baseline.name}, {'not converted' if control else 'converted'} and healed", flush=True)
    # A tokenizer that the run trained on the text is now in the model's folder.
    tokenizer = original if recipe.data.tokenizer == "train" else recipe.data.tokenizer
    text = replace(recipe.data, tokenizer=tokenizer, samples=data.samples)
    conversion = ConvertOptions(seed=recipe.seed)
    if not control:
        tokens = min(conversion.calibration_tokens, len(data.train) * recipe.data.sequence_length)
        conversion = replace(conversion, context_dim=options.context_dim, calibration_tokens=tokens)
    work = Conversion(original, folder, conversion, text, recipe.heal, control=control, progress=progress)
    healing = work.run()["healing"]
    model = load_pretrained(str(folder), torch.float32).to(best_device())
    return model_entry(
        options,
        from_baseline={"name": baseline.name} | {key: entry[key] for key in ("best_epoch", "best_val_ppl")},
        **describe_parameters(model, recipe.heal),
        **asdict(result_of(healing["history"], None, healing["val_ppl_by_position"])),
        cache=describe_cache(model, recipe.data.sequence_length),
        machine=machine(best_device()),
    )
