"""`context-pythia convert`: a trained GPT-NeoX model with a smaller cache.

At half the cache the conversion is exact and needs no text. Below that, one pass over calibration text measures what
the layers read and what their errors cost; this decides the widths of layers, rotary keys and latents. Work in progress
is in `.OUT.partial` beside the output, and the same command resumes it. The output appears whole at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

import context_pythia.model
from context_pythia.config.convert import ConvertOptions
from context_pythia.config.options import deciding
from context_pythia.config.recipe import DataOptions, HealOptions
from context_pythia.config.same import check_same, mismatches
from context_pythia.conversion.compress import Form, checked_form, compressed
from context_pythia.conversion.heal import heal
from context_pythia.conversion.transplant import check_weights, load_original
from context_pythia.data.packing import PackedData, load_data
from context_pythia.data.tokenizers import load_tokenizer, vocabulary_rows
from context_pythia.errors import UsageError, first_line
from context_pythia.evaluation.memory import process_memory
from context_pythia.evaluation.pretrained import check_length, hub_commit, load_pretrained
from context_pythia.files import read_record, write_json
from context_pythia.model import AUTO_MAP
from context_pythia.model.cache import cached_numbers_per_token
from context_pythia.runs.build import best_device, describe_cache, describe_parameters
from context_pythia.training.allocator import RETURN_FREED, set_malloc
from context_pythia.training.checkpoints import publish
from context_pythia.training.history import best_row

RECORD = "conversion.json"
SETTINGS = "settings.json"
# Warn of larger relative errors, unless the condition number is small: in bfloat16 every model rounds that much.
MOST_ROUNDING, MOST_CONDITION = 0.02, 16
SHARD = "500MB"  # size of an output file, which is in memory as a whole
DECODED = 8  # tokens to decode when measuring the cache: each one reads all weights from disk


@dataclass
class Conversion:
    """A conversion: its options, and its work in progress.

    Attributes:
        model: folder or Hub name of a GPT-NeoX model.
        out: folder of the result.
        data: its training split calibrates and heals; not read for an exact conversion without healing.
        ship_code: add our modeling code; `trust_remote_code=True` then loads the model without this package.
        control: convert nothing and heal the original itself, with the same loss. It shows what longer training and
            distillation gain without a smaller cache.
        partial: folder of the work in progress: settings, calibration statistics, converted model, healed model.
        settings: the options, as the record stores them.

    Raises:
        UsageError: options that contradict each other.
    """

    model: str
    out: Path
    options: ConvertOptions
    data: DataOptions
    healing: HealOptions
    ship_code: bool = False
    control: bool = False
    progress: bool = True
    partial: Path = field(init=False)
    settings: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        options = self.options
        if self.control:
            unused = mismatches(asdict(ConvertOptions(dtype=options.dtype, seed=options.seed)), asdict(options))
            if unused:
                raise UsageError(f"convert.{next(iter(unused))}: --control converts nothing, so drop it")
            if not self.healing.steps:
                raise UsageError("convert: --control heals the original itself, so give --heal-steps")
        elif not options.asked:
            raise UsageError("convert: give --context-dim N, --kv-reduction R or --layer-context-dims N,N")
        if not self.healing.steps and (healing := mismatches(asdict(HealOptions()), asdict(self.healing))):
            name, (_, value) = next(iter(healing.items()))
            raise UsageError(f"heal.{name} {value}: needs --heal-steps N")
        if self.data.tokenizer == "train":
            raise UsageError("tokenizer train: a trained model has its own; drop the option, or give a file or folder")
        target = self.out.resolve()
        self.partial = target.with_name(f".{target.name}.partial")
        self.settings = {
            "model": self.model,
            "files": _files(self.model),
            "control": self.control,
            "ship_code": self.ship_code,
            "convert": asdict(options),
            "data": asdict(self.data),
            "heal": asdict(self.healing),
        }

    def run(self) -> dict[str, Any]:
        """Write the model, its tokenizer and record to `out`, and return the record.

        Raises:
            UsageError: a model, width or text that cannot be used, or an `out` that holds something else.
            Failure: a damaged checkpoint.
            OSError: the output cannot be written.
        """
        if record := self.finished():
            print(f"{self.out} holds this conversion already")
            return record
        target = self.out.resolve()
        if target.is_mount():
            raise UsageError(f"--out {self.out}: is a mount point and cannot be replaced; give a folder below it")
        original, tokenizer, form = self._open_original()
        text = None
        if self.healing.steps or form is None or not form.exact:
            text = self._text(original, tokenizer)
            self.settings["text"] = text.summary["fingerprint"]
        with _resumable(self.partial):
            self._open_partial()
            record = self.convert(original, tokenizer, form, text)
            result = self.partial / "converted"
            if self.healing.steps:
                assert text is not None
                result = self.partial / "healed"
                record |= self.heal(text, result)
            record["settings"] = self.settings
            write_json(result / RECORD, record)
            os.replace(result, target)
            shutil.rmtree(self.partial)
        print(_summary(record, self.out))
        return record

    def finished(self) -> dict[str, Any] | None:
        """The record in `out` if it is of this conversion; None if `out` is missing or empty."""
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return None
        if not (self.out / RECORD).is_file():
            raise UsageError(f"--out {self.out}: holds something else; choose another folder")
        record = read_record(self.out / RECORD)
        recorded = record["settings"] | {"text": None}  # the text is not read again
        self._check_same(recorded, f"--out {self.out}: holds a conversion", "choose another folder")
        return record

    def _open_original(self) -> tuple[GPTNeoXForCausalLM, PreTrainedTokenizerFast, Form | None]:
        """The model to convert (weights on disk), its tokenizer, and the form of the contexts; None for a control."""
        original, tokenizer = load_original(self.model, best_device()), load_tokenizer(self.data.tokenizer)
        if not self.control:
            return original, tokenizer, checked_form(self.options, original)
        self.healing.check_control("the control", original.config)
        return original, tokenizer, None

    def _text(self, original: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast) -> PackedData:
        """The text to calibrate and heal on; raises `UsageError` if it does not fit the model."""
        if (rows := vocabulary_rows(tokenizer)) > original.config.vocab_size:
            raise UsageError(
                f"tokenizer {self.data.tokenizer} has {rows} tokens, model {self.model} has "
                f"{original.config.vocab_size}: give the model's own with --tokenizer"
            )
        check_length(self.data.sequence_length, original.config)
        return load_data(self.data, self.progress)

    def _open_partial(self) -> None:
        """Make the folder of the work in progress, or check that it belongs to the same conversion.

        The converted model does not depend on healing, which checks its own folder.
        """
        file = self.partial / SETTINGS
        self.partial.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            recorded = read_record(file) | {"heal": self.settings["heal"]}
            self._check_same(recorded, f"{self.partial} holds an unfinished conversion", "finish it or delete it")
        write_json(file, self.settings)

    def _check_same(self, recorded: dict[str, Any], holder: str, mend: str) -> None:
        check_same(_deciding(recorded), _deciding(self.settings), holder, mend)

    def convert(
        self,
        original: GPTNeoXForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        form: Form | None,
        text: PackedData | None,
    ) -> dict[str, Any]:
        """Convert into the folder `converted` of `partial`, and return the record."""
        folder, config = self.partial / "converted", original.config
        if (folder / RECORD).is_file():
            print(f"resumes from the converted model in {folder}")
            return read_record(folder / RECORD)
        started = time.perf_counter()
        set_malloc(RETURN_FREED)
        check_weights(original, self.model)
        record = {
            "original": self.model,
            "original_commit": hub_commit(self.model),
            "data_fingerprint": text.summary["fingerprint"] if text else None,
            "context_dim": None if form is None else round(form.numbers / config.num_hidden_layers),
            "numbers_per_token_original": cached_numbers_per_token(config),
            **describe_parameters(original),
        }
        if form is None:
            result = load_pretrained(self.model, getattr(torch, self.options.dtype))
        else:
            calibration = None if form.exact else text
            result, details = compressed(original, form, self.options, calibration, self.partial, self.progress)
            record |= details
        record["cache"] = describe_cache(result, min(128, config.max_position_embeddings), DECODED)
        folder.mkdir(exist_ok=True)
        if self.ship_code and not self.control:
            ship_code(result.config, folder)
        publish(result, tokenizer, folder, SHARD)
        record |= {"seconds": time.perf_counter() - started, "peak_bytes": process_memory("VmHWM")}
        write_json(folder / RECORD, record)
        return record

    def heal(self, text: PackedData, folder: Path) -> dict[str, Any]:
        """Heal the converted model into `folder`, and return the record's entries on healing."""
        converted, dtype = self.partial / "converted", getattr(torch, self.options.dtype)
        student = load_pretrained(str(converted), dtype)
        teacher = None if self.healing.ce_weight == 1 else load_pretrained(self.model, dtype)
        result = heal(
            student, teacher, text, self.healing, seed=self.options.seed, folder=folder, progress=self.progress
        )
        for path in converted.iterdir():
            # The converted model's weights, and their index, are those before healing.
            weights = path.name.endswith((".safetensors", ".safetensors.index.json"))
            if not weights and not (folder / path.name).exists():
                shutil.copy2(path, folder / path.name)
        healing = {
            "steps": self.healing.steps,
            "kept_step": best_row(result.history)["step"],
            "val_ppl_before": result.history[0]["val_ppl"],
            "val_ppl": result.best_val_ppl,
            "val_accuracy": result.val_accuracy,
            "val_ppl_by_position": result.val_ppl_by_position,
            "seconds": sum(row["seconds"] for row in result.history),
            "history": result.history,
        }
        return {"healing": healing, "peak_bytes": process_memory("VmHWM")}


def _files(model: str) -> dict[str, list[int]] | None:
    """Size and date of each file in a model's folder; None for a Hub name, whose files are assumed not to change."""
    if not Path(model).is_dir():
        return None
    files = [Path(model) / "config.json", *sorted(Path(model).glob("*.safetensors"))]
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()}


def _deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a record that decide the result.

    A model's folder is compared by its files, because it and its tokenizer may have several names.
    """
    result: dict[str, Any] = {key: settings.get(key) for key in ("control", "ship_code", "text")}
    for owner in (ConvertOptions, DataOptions, HealOptions):
        result[owner.section] = deciding(owner.of_record(settings[owner.section]))
    if settings["files"] and settings["data"]["tokenizer"] == settings["model"]:
        result["data"]["tokenizer"] = "the model's"
    return result | {"model": settings["files"] or settings["model"]}


@contextlib.contextmanager
def _resumable(partial: Path) -> Iterator[None]:
    """Explain a full disk, and remove `partial` if it has nothing to resume from: a refused command must not lock the
    output."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(
            f"cannot write to {partial}: {first_line(error)}; free some disk space, then run the same command again"
        ) from error
    finally:
        progress = [*partial.glob("statistics-*.safetensors"), *partial.glob(f"converted/{RECORD}")]
        if (partial / SETTINGS).is_file() and not progress:
            shutil.rmtree(partial)


def ship_code(config: Any, folder: Path) -> None:
    """Copy our modeling code to `folder` and name it in the configuration, which is saved there next."""
    for path in Path(context_pythia.model.__path__[0]).glob("[!_]*.py"):
        shutil.copyfile(path, folder / path.name)
    config.auto_map = AUTO_MAP


def _summary(record: dict[str, Any], out: Path) -> str:
    cache, healing, lines = record["cache"], record.get("healing"), []
    if record["context_dim"] is not None:
        original = record["numbers_per_token_original"]
        lines.append(
            f"{cache['numbers_per_token']:,} numbers a token in place of {original:,} "
            f"({cache['numbers_per_token'] / original - 1:+.1%}), measured at {cache['length']} tokens: "
            f"{cache['bytes_measured'] / 1024:,.1f} KB"
        )
    if record.get("exact"):
        worst = max(layer["condition"] for layer in record["layers"])
        rounding = worst * torch.finfo(getattr(torch, record["settings"]["convert"]["dtype"])).eps
        lines.append(f"exact up to rounding errors, which it amplifies at most {worst:,.3g} times")
        if worst > MOST_CONDITION and rounding > MOST_ROUNDING:
            lines.append("warning: its rotary keys nearly depend on each other: compare with the original (`eval`)")
    if healing:
        lines.append(
            f"healing: validation perplexity {healing['val_ppl_before']:.2f} -> {healing['val_ppl']:.2f} "
            f"(weights of step {healing['kept_step']} of {healing['steps']})"
        )
    return "\n".join([*lines, f"wrote {out}"])
