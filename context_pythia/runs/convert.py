"""`context-pythia convert`: a trained GPT-NeoX model with a smaller cache.

At half the cache the conversion is exact and needs no text. Below, one pass over calibration text says what the layers
read and what their errors cost, and the widths are shared out among layers, rotary keys and latents by it. Work in
progress lies in `.OUT.partial` beside the output, which appears whole at the end; the same command goes on with it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, GPTNeoXForCausalLM, PreTrainedModel

import context_pythia.model
from context_pythia.config.convert import ConvertOptions
from context_pythia.config.options import options_of
from context_pythia.config.recipe import DataOptions, HealOptions
from context_pythia.conversion.compress import checked_width, compressed
from context_pythia.conversion.heal import heal
from context_pythia.conversion.transplant import check_convertible, check_rope, read_weight
from context_pythia.data.packing import PackedData, load_data
from context_pythia.data.tokenizers import load_tokenizer, vocabulary_rows
from context_pythia.errors import Failure, UsageError, first_line
from context_pythia.evaluation.memory import process_memory
from context_pythia.evaluation.pretrained import check_length, hub_commit, load_pretrained, stored_config
from context_pythia.files import read_record, write_json
from context_pythia.model import AUTO_MAP
from context_pythia.model.cache import cached_numbers_per_token
from context_pythia.runs.build import best_device, describe_cache, describe_parameters
from context_pythia.training.allocator import return_freed_memory
from context_pythia.training.checkpoints import publish

RECORD = "conversion.json"
SETTINGS = "settings.json"
SHARD = "500MB"  # of the output: as much of it is in memory at a time
FREE_OPTIONS = {
    f"{owner.section}.{declared.name}"
    for owner in (ConvertOptions, HealOptions, DataOptions)
    for declared in options_of(owner)
    if declared.free
}
# Relative error of an exact conversion's keys and values that is worth a warning, and a condition number that is not:
# in bfloat16 any model rounds that much.
MOST_ROUNDING, MOST_CONDITION = 0.02, 16
DECODED = 8  # tokens that are decoded to measure the cache: the weights are read from disk for each


def convert(
    model: str,
    out: Path,
    options: ConvertOptions,
    data: DataOptions,
    healing: HealOptions,
    ship_code: bool = False,
    control: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the converted model, its tokenizer and record to `out`, and return the record.

    Args:
        model: folder or Hub name of a GPT-NeoX model.
        data: its training split calibrates and heals; not read where the conversion is exact and nothing is healed.
        ship_code: add our modelling code, so that `trust_remote_code=True` loads the model without this package.
        control: convert nothing and heal the original itself, with the same loss: what more training, and learning
            from its own predictions, is worth without a smaller cache.

    Raises:
        UsageError: a model, width or text that cannot be used, or an `out` that holds something else.
        Failure: a damaged checkpoint.
        OSError: the output cannot be written.
    """
    if control and not healing.steps:
        raise UsageError("convert: --control heals the original itself, so give --heal-steps")
    if control and (options.context_dim, options.kv_reduction) != (None, 0.5):
        raise UsageError("convert: --control converts nothing, so drop --context-dim and --kv-reduction")
    if not healing.steps and (given := _changed(healing)):
        raise UsageError(f"heal.{given}: nothing is healed without --heal-steps, give the number of steps")
    if data.tokenizer == "train":
        raise UsageError("tokenizer train: a trained model has its own; drop the option, or give a file or folder")
    settings = {"model": model, "files": _identity(model), "control": control, "ship_code": ship_code}
    settings |= {"convert": asdict(options), "data": asdict(data), "heal": asdict(healing)}
    if held := _finished(out, settings):
        print(f"{out} holds this conversion already")
        return held
    target = out.resolve()
    if target.is_mount():
        raise UsageError(f"--out {out}: is a mount point, which nothing can be moved to; give a folder in it")
    partial = target.with_name(f".{target.name}.partial")
    with _whole_writes(partial):
        _open_partial(partial, settings)
        record = _convert(model, partial, options, data, healing, ship_code, control, progress)
        record["settings"] = settings
        made = partial / ("healed" if healing.steps else "converted")
        write_json(made / RECORD, record)
        os.replace(made, target)
        shutil.rmtree(partial)
    print(_summary(record, out))
    return record


def _finished(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The record in `out` if it holds this very conversion; None if there is nothing there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    difference = ""
    if (out / RECORD).is_file():
        held = read_record(out / RECORD)
        difference = _difference(held.get("settings", {}), settings)
        if not difference:
            return held
        difference = f", a conversion with {difference}"
    raise UsageError(f"--out {out}: exists and holds something else{difference}; choose another folder")


def _changed(healing: HealOptions) -> str:
    """The first option that is not as it is by default, with its value; "" if there is none."""
    default = asdict(HealOptions())
    return next((f"{name} {value}" for name, value in asdict(healing).items() if value != default[name]), "")


def _identity(model: str) -> dict[str, list[int]] | None:
    """Size and date of the files of a model's folder; None for a Hub name, which is taken to mean the same files."""
    if not Path(model).is_dir():
        return None
    files = [Path(model) / "config.json", *sorted(Path(model).glob("*.safetensors"))]
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()}


def _difference(held: dict[str, Any], settings: dict[str, Any]) -> str:
    """The first setting whose value decides the result and was another, with both values; "" if there is none."""
    old, new = _flat(held), _flat(settings)
    same = bool(new["files"]) and old.get("files") == new["files"]  # one folder may be named in several ways
    own = same and all(flat.get("data.tokenizer") == flat.get("model") for flat in (old, new))
    renamed = {"model": same, "data.tokenizer": own}
    for name, value in new.items():
        if name not in FREE_OPTIONS and old.get(name) != value and not renamed.get(name):
            if name == "files":
                return f"other files in {settings['model']} than are there now"
            return f"{name} {old.get(name)}, not {value}"
    return ""


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Options by the names that their errors have, `section.option`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and name != "files":
            flat |= {f"{name}.{option}": inner for option, inner in value.items()}
        else:
            flat[name] = value
    return flat


def _open_partial(partial: Path, settings: dict[str, Any]) -> None:
    """Make the folder of work in progress, or check that it is of the same conversion.

    Other options of healing are refused only where healing has begun: what was converted stays good.
    """
    partial.mkdir(parents=True, exist_ok=True)
    held: dict[str, Any] = {}
    if (partial / SETTINGS).is_file():
        held, healed = read_record(partial / SETTINGS), partial / "healed"
        if difference := _difference(held | {"heal": settings["heal"]}, settings):
            raise UsageError(f"{partial} holds an unfinished conversion with {difference}: finish it or delete it")
        if healed.exists() and (difference := _difference(held, settings)):
            raise UsageError(
                f"{partial} holds an unfinished healing with {difference}: finish it, or delete {healed} to heal anew"
            )
    elif any(not path.name.startswith(f".{SETTINGS}") for path in partial.iterdir()):
        raise UsageError(f"{partial} holds files that are not a conversion's: move them, it is for work in progress")
    write_json(partial / SETTINGS, held | settings)


@contextlib.contextmanager
def _whole_writes(partial: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        full = isinstance(error, SafetensorError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full or not partial.is_dir():
            raise
        raise OSError(
            f"cannot write to {partial}: {first_line(error)}; free some disk space and run the same command again, "
            "which goes on with what is there, or delete it"
        ) from error
    finally:
        # A command that is refused, or fails before there is anything to go on with, must not lock the output.
        worth = [*partial.glob("statistics-*.safetensors"), *partial.glob(f"converted/{RECORD}")]
        if (partial / SETTINGS).is_file() and not worth:
            shutil.rmtree(partial)


def _convert(
    model: str,
    partial: Path,
    options: ConvertOptions,
    data: DataOptions,
    healing: HealOptions,
    ship_code: bool,
    control: bool,
    progress: bool,
) -> dict[str, Any]:
    """The record of the conversion; its model lies in `partial`, healed or as converted."""
    converted = partial / "converted"
    packed: PackedData | None = None
    if (converted / RECORD).is_file():
        record = read_record(converted / RECORD)
        print(f"goes on with the converted model in {converted}")
    else:
        started = time.perf_counter()
        return_freed_memory()
        original = _load_original(model)
        config, tokenizer = original.config, load_tokenizer(data.tokenizer)
        if control and not healing.teaches_a_control(config):
            raise UsageError("heal.ce_weight 0: an original without dropout agrees with itself, give a weight above 0")
        width = config.hidden_size if control else checked_width(options, original)
        reads_text = width < config.hidden_size or bool(healing.steps)
        if reads_text and vocabulary_rows(tokenizer) > config.vocab_size:
            raise UsageError(
                f"the tokenizer {data.tokenizer} makes {vocabulary_rows(tokenizer)} tokens and {model} knows "
                f"{config.vocab_size}: give the model's own with --tokenizer"
            )
        _check_weights(original, model)
        if reads_text:
            packed = _load_text(data, config, partial, progress)
        record = {
            "original": model,
            "original_commit": hub_commit(model),
            "data_fingerprint": packed.summary["fingerprint"] if packed else None,
            "context_dim": None if control else width,
            "numbers_per_token_original": cached_numbers_per_token(config),
            **describe_parameters(original),
        }
        student: PreTrainedModel
        if control:
            student = load_pretrained(model, getattr(torch, options.dtype))
        else:
            text = packed if width < config.hidden_size else None
            student, details = compressed(original, width, options, text, partial, progress)
            record |= details
        record["cache"] = describe_cache(student, min(128, config.max_position_embeddings), DECODED)
        converted.mkdir(exist_ok=True)
        if ship_code and not control:
            _ship_code(student, converted)
        publish(student, tokenizer, converted, SHARD)
        record |= {"seconds": time.perf_counter() - started, "peak_bytes": process_memory("VmHWM")}
        if record.get("layers"):
            _warn_of_rounding(record, options.dtype)
        write_json(converted / RECORD, record)
    if healing.steps:
        packed = packed or _load_text(data, AutoConfig.from_pretrained(converted), partial, progress)
        dtype = getattr(torch, options.dtype)
        student = load_pretrained(str(converted), dtype)
        teacher = None if healing.ce_weight == 1 else load_pretrained(model, dtype)
        healed = partial / "healed"
        result = heal(student, teacher, packed, healing, seed=options.seed, folder=healed, progress=progress)
        record |= {"healing": asdict(result), "peak_bytes": process_memory("VmHWM")}
        for path in converted.iterdir():
            # The converted model's weights, and the index of their shards, are those from before.
            weights = path.name.endswith((".safetensors", ".safetensors.index.json"))
            if not weights and not (healed / path.name).exists():
                shutil.copy2(path, healed / path.name)
    return record


def _ship_code(model: PreTrainedModel, folder: Path) -> None:
    """Lay our modelling code in `folder` and name it in the configuration of the model, which is saved there next."""
    for path in Path(context_pythia.model.__path__[0]).glob("[!_]*.py"):
        shutil.copyfile(path, folder / path.name)
    model.config.auto_map = AUTO_MAP


def _load_original(model: str) -> GPTNeoXForCausalLM:
    """The model to convert, its weights left on disk; UsageError for other families and kinds."""
    # The bare file first, which families have that transformers does not know.
    check_convertible(stored_config(model), model)
    # Weights are read from disk as they are needed; on a GPU, a module that stays there makes it the one that computes.
    parts = dict.fromkeys(("gpt_neox.embed_in", "gpt_neox.layers", "lm_head"), "disk")
    parts |= dict.fromkeys(("gpt_neox.rotary_emb", "gpt_neox.final_layer_norm"), str(best_device()))
    original = load_pretrained(model, torch.float32, parts)
    check_rope(original.config, model)
    return original


def _check_weights(original: GPTNeoXForCausalLM, model: str) -> None:
    """Raises Failure for a damaged checkpoint, of which every weight is read."""
    for name, place in original.state_dict().items():
        try:
            weight = read_weight(original, name)
        except (OSError, SafetensorError) as error:
            raise Failure(
                f"the checkpoint in {model} is damaged ({first_line(error)}): download or train it again"
            ) from error
        if weight.shape != place.shape:
            raise Failure(
                f"the checkpoint in {model} is damaged ({name} has the shape {list(weight.shape)}, not "
                f"{list(place.shape)}): download or train it again"
            )
        if not bool(weight.isfinite().all()):
            raise Failure(f"the checkpoint in {model} is damaged ({name} is not finite): download or train it again")


def _load_text(data: DataOptions, config: Any, partial: Path, progress: bool) -> PackedData:
    """The text to calibrate and heal on.

    Raises UsageError where its samples are longer than the model's positions, or where the work in `partial` was begun
    on another text.
    """
    check_length(data.sequence_length, config)
    packed = load_data(data, progress)
    settings = read_record(partial / SETTINGS)
    if settings.setdefault("data_fingerprint", packed.summary["fingerprint"]) != packed.summary["fingerprint"]:
        raise UsageError(
            f"{partial} holds an unfinished conversion by other text than is now in {data.data}: delete it"
        )
    write_json(partial / SETTINGS, settings)
    return packed


def _warn_of_rounding(record: dict[str, Any], dtype: str) -> None:
    """Say where the keys of an exact conversion are nearly dependent, so that rounding costs digits."""
    layers = record["layers"] if record["exact"] else []
    worst = max(range(len(layers)), key=lambda layer: layers[layer]["condition"], default=0)
    rounding = torch.finfo(getattr(torch, dtype)).eps
    lost = layers[worst]["condition"] * rounding if layers else 0.0
    if lost > max(MOST_ROUNDING, MOST_CONDITION * rounding):
        print(
            f"warning: the rotary keys of layer {worst} nearly depend on each other (condition number "
            f"{layers[worst]['condition']:.3g}): in {dtype} its keys and values lose digits, relative errors reach "
            f"{lost:.1g}; compare with the original by `context-pythia eval`",
            file=sys.stderr,
        )


def _summary(record: dict[str, Any], out: Path) -> str:
    cache, healing, lines = record["cache"], record.get("healing"), []
    if record["context_dim"] is not None:
        original = record["numbers_per_token_original"]
        lines.append(
            f"{cache['numbers_per_token']:,} numbers a token in place of {original:,} "
            f"({cache['numbers_per_token'] / original - 1:+.1%}), measured at {cache['length']} tokens: "
            f"{cache['bytes_measured'] / 1024:,.1f} KB"
        )
    took = f"{record['seconds']:.0f} s" + (f" and {healing['seconds']:.0f} s of healing" if healing else "")
    lines.append(took + (f", {record['peak_bytes'] / 2**20:,.0f} MiB at most" if record["peak_bytes"] else ""))
    if healing:
        lines.append(
            f"healing: validation perplexity {healing['val_ppl_before']:.2f} -> {healing['val_ppl']:.2f} "
            f"(weights of step {healing['kept_step']} of {healing['steps']})"
        )
    return "\n".join([*lines, f"wrote {out}"])
