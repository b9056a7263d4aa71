"""The sections of a run's report, composed from its metrics and provenance in the words of one language.

Every figure comes from the run's records; a figure that is missing, because a model failed or has not run, is a dash.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from context_pythia.report.document import Block, Code, Heading, Paragraph, Picture, Table
from context_pythia.report.figures import frontier, is_baseline, learning_curves, position_curves, series_of
from context_pythia.report.formats import (
    DASH,
    calls,
    change,
    finite,
    integer,
    kilobytes,
    number,
    pair,
    percent,
    perplexity,
    perplexity_digits,
    plain,
    sign,
)
from context_pythia.report.positions import POSITIONS, position_blocks

CURVES, FRONTIER = "curves.png", "frontier.png"


class Report:
    """Composes the document from a run's metrics and provenance with the texts of one language."""

    def __init__(self, metrics: dict[str, Any], provenance: dict[str, Any], text: dict[str, str]):
        self.text, self.provenance = text, provenance
        self.data, self.recipe = metrics["data"], metrics["recipe"]
        self.models: list[dict[str, Any]] = metrics["models"]
        self.series = [series_of(model) for model in self.models]
        self.done = [model for model in self.models if model["error"] is None and finite(model["best_val_ppl"])]
        self.failed = [model for model in self.models if model["error"] is not None]
        entered = {model["name"] for model in self.models}
        self.pending = [model for model in self.recipe.get("models", []) if model["name"] not in entered]
        self.baseline = next((model for model in self.done if is_baseline(model)), None)

    def blocks(self, pictures: dict[str, bytes]) -> Iterator[Block]:
        text = self.text
        yield Heading(text["title"].format(recipe=self.recipe.get("name", DASH)), level=1)
        yield Paragraph(self._headline(), "lead")
        if self.failed or self.pending:
            counts = {"done": len(self.done), "failed": len(self.failed), "pending": len(self.pending)}
            total = len(self.models) + len(self.pending)
            yield Paragraph(text["unfinished"].format(total=total, **counts), "note")
        yield Heading(text["results"])
        yield self._results()
        yield Paragraph(text["results_note"].format(**self._setup()))
        for model in self.done:
            if not self._timed_as_baseline(model):
                yield Paragraph(text["timed_elsewhere"].format(name=model["name"], **model["machine"]), "note")
        yield from self._healed()
        for model in self.failed:
            yield Paragraph(text["failure"].format(name=model["name"], error=model["error"]), "alert")
        if any(model["context_source"] == "input" for model in self.models):
            yield Paragraph(text["input_note"], "note")
        if FRONTIER in pictures:
            yield Picture(FRONTIER, text["frontier_caption"])
        yield from self._cache()
        yield from position_blocks(self.series, text, pictures)
        yield from self._curves(pictures)
        yield from self._phase1()
        yield Heading(text["settings"])
        yield self._facts(self._settings())
        yield Heading(text["provenance"])
        yield self._facts(self._provenance())
        if earlier := self.provenance.get("earlier"):
            yield Paragraph(text["earlier"])
            yield Code(calls(earlier))

    def pictures(self) -> dict[str, bytes]:
        series, pictures = self.series, {}
        if any(one.perplexity or one.train_loss for one in series):
            pictures[CURVES] = learning_curves(series, self.recipe.get("phase1", {}).get("convergence_rate"))
        if any(one.best and one.cache_bytes for one in series):
            pictures[FRONTIER] = frontier(series)
        if any(one.positions for one in series):
            pictures[POSITIONS] = position_curves(series)
        return pictures

    def _headline(self) -> str:
        if not self.done:
            return self.text["nothing"]
        best = min(self.done, key=lambda model: model["best_val_ppl"])
        if self.baseline is None:
            facts = self._figures(best) | self._setup()
            origin = best.get("from_baseline") or {}
            if "best_val_ppl" not in origin:
                return self.text["no_baseline"].format(**facts)
            facts["change"] = change(best["best_val_ppl"] / origin["best_val_ppl"] - 1)
            facts |= {"baseline": origin["name"], "base_ppl": perplexity(origin["best_val_ppl"])}
            return self.text["made_elsewhere"].format(**facts)
        facts = self._setup() | {f"base_{key}": value for key, value in self._figures(self.baseline).items()}
        facts["baseline"] = self.baseline["name"]
        smaller = [model for model in self.done if (_cache(model, "reduction_measured") or 0) > 0]
        if not smaller:
            return self.text["none_smaller"].format(**facts)
        best = min(smaller, key=lambda model: model["best_val_ppl"])
        smallest = max(smaller, key=lambda model: model["cache"]["reduction_measured"])
        headline = self.text["best"].format(**facts, **self._figures(best))
        if smallest is not best:
            gap = "" if headline.endswith("。") else " "
            headline += gap + self.text["smallest"].format(**self._figures(smallest))
        return headline

    def _setup(self) -> dict[str, Any]:
        """Length and dtype at which the caches were measured."""
        cache: dict[str, Any] = next((model["cache"] for model in self.models if model["cache"]), {})
        return {"length": integer(cache.get("length")), "dtype": cache.get("dtype", DASH)}

    def _figures(self, model: dict[str, Any]) -> dict[str, str]:
        return {
            "name": model["name"],
            "ppl": perplexity(model["best_val_ppl"]),
            "kb": kilobytes(_cache(model, "bytes_measured")),
            "reduction": percent(_cache(model, "reduction_measured")),
            "change": self._change(model),
        }

    def _change(self, model: dict[str, Any]) -> str:
        """Difference to the baseline's best perplexity, in its digits and in percent."""
        if self.baseline is None or model is self.baseline or not finite(model["best_val_ppl"]):
            return DASH
        base = self.baseline["best_val_ppl"]
        difference = model["best_val_ppl"] - base
        return f"{sign(difference)}{abs(difference):,.{perplexity_digits(base)}f} ({change(difference / base)})"

    def _results(self) -> Table:
        by_formula = any(_cache(model, "bytes_formula") != _cache(model, "bytes_measured") for model in self.done)
        keys = ["model", "context", "best_ppl", "change", "measured"]
        keys += ["formula"] if by_formula else []
        keys += ["reduction", "parameters", "best_epoch", "accuracy", "seconds_epoch", "overhead"]
        rows = []
        for model in self.models:
            figures = self._figures(model)
            figures |= {
                "model": model["name"],
                "context": self._context(model),
                "best_ppl": figures["ppl"] if model["error"] is None else self.text["failed"],
                "measured": figures["kb"],
                "formula": kilobytes(_cache(model, "bytes_formula")),
                "parameters": pair(model["trainable_parameters"], model["parameters"]),
                "best_epoch": self._best_epoch(model),
                "accuracy": percent(model["val_accuracy"]),
                "seconds_epoch": number(model["seconds_per_epoch"], 1),
                "overhead": self._overhead(model),
            }
            rows.append([figures[key] for key in keys])
        for model in self.pending:
            cells = {"model": model["name"], "context": self._context(model), "best_ppl": self.text["pending"]}
            rows.append([cells.get(key, DASH) for key in keys])
        return Table([self.text[key] for key in keys], rows, text_columns=2)

    def _context(self, model: dict[str, Any]) -> str:
        source, dim, sharing = model["context_source"], model.get("context_dim"), model.get("context_sharing")
        if model.get("from_baseline"):
            return self.text["control" if source is None else "converted"].format(source=source, dim=dim)
        if source is None:
            return self.text["baseline"]
        if source == "layer" and (sharing or 1) > 1:
            return self.text["sharing"].format(source=source, dim=dim, layers=sharing)
        return f"{source} {dim}"

    def _best_epoch(self, model: dict[str, Any]) -> str:
        """In epochs after the baseline's best for what is made of it."""
        if not (origin := model.get("from_baseline")) or model["best_epoch"] is None:
            return integer(model["best_epoch"])
        return f"{origin['best_epoch']} + {model['best_epoch']:.3g}"

    def _healed(self) -> Iterator[Block]:
        """What the models are that are made of the baseline, and what they lose against the control."""
        healed = [model for model in self.done if model.get("from_baseline")]
        if not healed:
            return
        heal, facts = self.recipe["heal"], {"baseline": healed[0]["from_baseline"]["name"]}
        note = "healed_note" if heal["ce_weight"] < 1 else "healed_by_text_note"
        yield Paragraph(self.text[note].format(steps=heal["steps"], **facts), "note")
        control = next((model for model in healed if model["context_source"] is None), None)
        if control is None:
            return
        yield Paragraph(self.text["control_note"].format(control=control["name"], **facts), "note")
        for model in (model for model in healed if model is not control):
            apart = change(model["best_val_ppl"] / control["best_val_ppl"] - 1)
            facts = {"name": model["name"], "control": control["name"], "change": apart}
            yield Paragraph(self.text["against_control"].format(**facts), "note")

    def _overhead(self, model: dict[str, Any]) -> str:
        base = self.baseline and self.baseline["seconds_per_epoch"]
        seconds = model["seconds_per_epoch"]
        # A step of healing has a teacher and a batch of its own.
        comparable = base and finite(seconds) and self._timed_as_baseline(model) and not model.get("from_baseline")
        return f"×{seconds / base:.2f}" if comparable else DASH

    def _timed_as_baseline(self, model: dict[str, Any]) -> bool:
        """False where the machine is known and was another; older runs have none."""
        machine, base = (one and one.get("machine") for one in (model, self.baseline))
        return not machine or not base or machine == base

    def _cache(self) -> Iterator[Block]:
        rows = [
            [model["name"], *(integer(_cache(model, key)) for key in
             ("numbers_per_token", "bytes_measured", "bytes_formula", "bytes_slack"))]
            for model in self.models if model["cache"]
        ]  # fmt: skip
        if rows:
            head = [self.text[key] for key in ("model", "numbers", "bytes_measured", "bytes_formula", "slack")]
            yield Heading(self.text["cache"], level=3)
            yield Table(head, rows)
            yield Paragraph(self.text["cache_note"])

    def _curves(self, pictures: dict[str, bytes]) -> Iterator[Block]:
        if CURVES in pictures:
            yield Heading(self.text["curves"])
            with_phase1 = any(model["phase1"] for model in self.models)
            yield Picture(CURVES, self.text["curves_phase1_caption" if with_phase1 else "curves_caption"])
        for model in self.models:
            if model["history"]:
                yield Heading(model["name"], level=3)
                yield Code("\n".join(self._log(model)))

    def _log(self, model: dict[str, Any]) -> Iterator[str]:
        epochs = self.recipe.get("train", {}).get("epochs") or len(model["history"])
        for entry in model["history"]:
            done = f"Epoch {entry['epoch']:>{len(str(epochs))}}/{epochs}"
            if model.get("from_baseline"):
                done = f"Step {entry['step']}/{self.recipe.get('heal', {}).get('steps')}"
            yield (
                f"{done}: train_loss={number(entry['train_loss'], 4)}, "
                f"val_ppl={number(entry['val_ppl'], 2)}, val_acc={number(entry['val_accuracy'], 4)}, "
                f"{number(entry['seconds'], 1)} s{' *' if entry['best'] else ''}"
            )
        if model["stop_reason"]:
            yield (
                f"Stopped after epoch {model['history'][-1]['epoch']}: {model['stop_reason']}; "
                f"best val_ppl={number(model['best_val_ppl'], 2)} in epoch {integer(model['best_epoch'])}"
            )

    def _phase1(self) -> Iterator[Block]:
        trained = [model for model in self.models if model["phase1"]]
        if not trained:
            return
        wanted = self.recipe.get("phase1", {}).get("convergence_rate")
        rows = []
        for model in trained:
            phase1 = model["phase1"]
            reached = phase1["convergence_rate"]
            rank = self.text["rank_value"].format(
                rank=number(phase1["effective_rank"], 1), dim=integer(model["context_dim"])
            )
            met = DASH if wanted is None else self.text["yes" if reached >= wanted else "no"]
            rows.append(
                [model["name"], met, percent(reached), percent(wanted), integer(phase1["iterations"]), rank]
                + [number(phase1.get("seconds"), 1)]
            )
        head = ["model", "met", "reached", "wanted", "iterations", "rank", "seconds"]
        yield Heading(self.text["phase1"])
        yield Paragraph(self.text["phase1_intro"])
        yield Table([self.text[key] for key in head], rows, text_columns=2)
        yield Paragraph(self.text["convergence_by_iteration"])
        for model in trained:
            if model["phase1"].get("history"):
                yield Heading(model["name"], level=3)
                yield Code("\n".join(_convergence_lines(model["phase1"]["history"])))

    def _facts(self, facts: dict[str, str]) -> Table:
        rows = [[self.text[key], value] for key, value in facts.items()]
        return Table([self.text["setting"], self.text["value"]], rows, text_columns=2)

    def _settings(self) -> dict[str, str]:
        """What was trained on what and how; the keys are those of the translations."""
        data, text = self.data, self.text
        body, train = self.recipe.get("architecture", {}), self.recipe.get("train", {})
        length = data.get("sequence_length")
        batch, accumulation = plain(train.get("batch_size")), train.get("gradient_accumulation", 1)
        schedule, warmup = plain(train.get("schedule")), train.get("warmup_ratio")
        facts = {
            "data_source": plain(data.get("source")),
            "documents": pair(data.get("documents_train"), data.get("documents_validation")),
            "samples": pair(data.get("samples_train"), data.get("samples_validation")),
            "sequence_length": text["tokens"].format(length=length, with_target=length + 1) if length else DASH,
            "tokenizer": plain(data.get("tokenizer")),
            "vocabulary": integer(data.get("vocab_size")),
            "architecture": text["body"].format(
                layers=plain(body.get("num_hidden_layers")),
                hidden=plain(body.get("hidden_size")),
                heads=plain(body.get("num_attention_heads")),
                mlp=plain(body.get("intermediate_size")),
            ),
            "dropout": text["dropout_value"].format(
                hidden=plain(body.get("hidden_dropout")), attention=plain(body.get("attention_dropout"))
            ),
            "epochs": plain(train.get("epochs")),
            "batch": text["accumulated"].format(batch=batch, accumulation=accumulation) if accumulation > 1 else batch,
            "learning_rate": plain(train.get("learning_rate")),
            "weight_decay": plain(train.get("weight_decay")),
            "schedule": text["warmup"].format(schedule=schedule, warmup=percent(warmup)) if warmup else schedule,
            "precision": plain(train.get("precision")),
            "patience": text["patience_value"].format(patience=plain(train.get("patience"))),
            "seed": plain(self.recipe.get("seed")),
        }
        if any(model["phase1"] for model in self.models):
            phase1 = self.recipe.get("phase1", {})
            facts |= {
                "p1_iterations": plain(phase1.get("max_iterations")),
                "p1_wanted": text["p1_wanted_value"].format(
                    rate=percent(phase1.get("convergence_rate")), threshold=plain(phase1.get("threshold"))
                ),
                "p1_learning_rate": plain(phase1.get("learning_rate")),
                "p1_batch": integer(phase1.get("batch_tokens")),
                "p1_noise": plain(phase1.get("noise")),
                "p1_state": plain(phase1.get("state_dtype")),
            }
        if any(model.get("from_baseline") for model in self.models):
            names = ("steps", "batch_size", "parameters", "ce_weight", "learning_rate", "schedule", "precision")
            facts |= {f"heal_{name}": plain(self.recipe.get("heal", {}).get(name)) for name in names}
        return facts

    def _provenance(self) -> dict[str, str]:
        facts = self.provenance
        keys = ("device", "platform", "threads", "commit", "created")
        versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
        return {key: plain(facts.get(key)) for key in keys} | {
            "versions": versions or DASH,
            "fingerprint": plain(facts.get("data_fingerprint")),
            "command": plain(facts.get("command")),
        }


def _cache(model: dict[str, Any], key: str) -> Any:
    return (model["cache"] or {}).get(key)


def _convergence_lines(history: list[dict[str, Any]], width: int = 10) -> Iterator[str]:
    for start in range(0, len(history), width):
        line = history[start : start + width]
        rates = "  ".join(f"{100 * entry['convergence_rate']:5.1f}" for entry in line)
        yield f"{line[0]['iteration']:>4}:  {rates}"
