"""The report of a run of `compare`: results, cache, positions, learning curves, phase 1.

A missing figure is a dash: the model failed, has not run, or comes from an older version.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from context_pythia.report import sections
from context_pythia.report.document import Block, Code, Heading, Paragraph, Picture, Table
from context_pythia.report.figures import Panel, Series, draw_panels
from context_pythia.report.formats import DASH, finite, integer, number, pair, percent
from context_pythia.report.sections import compared
from context_pythia.report.texts import Texts

Model = dict[str, Any]
MLP_WIDTH = "architecture.intermediate_size"


class RunReport:
    """The document of a run.

    Args:
        metrics: the record. Each model has a name; any other missing field counts as null.
    """

    def __init__(self, metrics: Mapping[str, Any], record: Mapping[str, Any], text: Texts):
        self.text, self.provenance = text, record
        self.data, self.recipe = metrics["data"], metrics["recipe"]
        self.models: list[Model] = [_filled(model) for model in metrics["models"]]
        entered = {model["name"] for model in self.models}
        self.pending: list[Model] = [_filled(m) for m in self.recipe["models"] if m["name"] not in entered]
        self.healed = [model for model in self.models if model["from_baseline"]]
        self.by_tokens = bool(self.recipe["train"].get("tokens"))
        # With `match_parameters` the MLP of each model has a width of its own.
        same = {None, self.recipe["architecture"].get("intermediate_size")}
        self.widened = not same.issuperset(model["intermediate_size"] for model in self.models)
        self.unit = "million tokens" if self.by_tokens else "epoch"
        self.series = [
            Series(
                model["name"],
                model["context_source"] is None and not model["from_baseline"],
                model["best_val_ppl"] if finite(model["best_val_ppl"]) else 0,
                model["cache"].get("bytes_measured", 0),
                model["val_ppl_by_position"] or (),
            )
            for model in self.models + self.pending
        ]
        self.baseline = next((one for one in self.series if one.baseline and one.perplexity), None)
        controls = [model["name"] for model in self.healed if model["context_source"] is None]
        self.control = next((one for one in self.series if one.name in controls and one.perplexity), None)

    def blocks(self) -> Iterator[Block]:
        text = self.text
        yield Heading(text("title", recipe=self.recipe["name"]), level=1)
        yield sections.headline(self.series, text)
        failed = len([model for model in self.models if model["error"] is not None])
        if failed or self.pending:
            done = len([one for one in self.series if one.perplexity])
            counts = {"total": len(self.series), "done": done, "failed": failed, "pending": len(self.pending)}
            yield Paragraph(text("unfinished", **counts), "note")
        yield Heading(text("results"))
        yield self._results()
        caches = {model["name"]: model["cache"] for model in self.models if model["cache"]}
        for cache in list(caches.values())[:1]:
            yield Paragraph(text("results_note", length=integer(cache["length"]), dtype=cache["dtype"]))
        if self.healed:
            origin = self.healed[0]["from_baseline"]["name"]
            yield Paragraph(text("healed_note", baseline=origin, steps=self.recipe["heal"]["steps"]), "note")
        if self.control:
            yield Paragraph(text("control_note", control=self.control.name, baseline=origin), "note")
        yield from sections.failures({model["name"]: model["error"] for model in self.models}, text)
        if any(model["context_source"] == "input" for model in self.models):
            yield Paragraph(text("input_note"), "note")
        yield from sections.frontier(self.series, text("frontier_caption"))
        if caches:
            yield Heading(text("bytes"), level=3)
            yield sections.cache_table(caches, text)
            yield Paragraph(text("cache_note"))
        yield from sections.positions(self.series, text)
        yield from self._curves()
        yield from self._phase1()
        yield Heading(text("settings"))
        yield sections.facts(self._settings(), text)
        yield from sections.provenance(self.provenance, text)

    def _results(self) -> Table:
        rows = []
        for model, one in zip(self.models + self.pending, self.series, strict=True):
            state = "pending" if model in self.pending else "failed" if model["error"] is not None else ""
            figures = compared(one, self.baseline)
            row = {
                "model": one.name,
                "context": self._context(model),
                "best_ppl": self.text(state) if state else figures["ppl"],
                "change": figures["change"],
                "change_to_control": compared(one, self.control)["change"],
                "kb": figures["kb"],
                "reduction": figures["reduction"],
                "parameters": pair(model["trainable_parameters"], model["parameters"]),
                MLP_WIDTH: integer(model["intermediate_size"]),
                "best_epoch": self._best_epoch(model),
                "accuracy": percent(model["val_accuracy"]),
                "seconds_epoch": number(model["seconds_per_epoch"], 1),
            }
            if not self.control:
                del row["change_to_control"]
            if not self.widened:
                del row[MLP_WIDTH]
            rows.append(row)
        return sections.table(rows, self.text, text_columns=2)

    def _context(self, model: Model) -> str:
        source, dim, layers = model["context_source"], model["context_dim"], model["context_sharing"] or 1
        if source is None:
            return self.text("control" if model["from_baseline"] else "baseline")
        if source == "grouped":
            dim = self.text("heads", heads=model["key_value_heads"])
        if widths := model["layer_context_dims"]:
            dim = " + ".join(str(widths[i]) for i in dict.fromkeys(model["context_layers"] or range(len(widths))))
        if model["cache_token_ids"]:
            dim = f"{dim} + {self.text('token_ids')}"
        key = "converted" if model["from_baseline"] else "sharing" if layers > 1 else "alone"
        return self.text(key, source=source, dim=dim, layers=layers)

    def _best_epoch(self, model: Model) -> str:
        """The best epoch. For a model that starts from the baseline: the baseline's plus the epochs since then."""
        epoch, origin = model["best_epoch"], model["from_baseline"]
        if epoch is None:
            return DASH
        return f"{origin['best_epoch']} + {epoch:.3g}" if origin else f"{epoch:.3g}"

    def _curves(self) -> Iterator[Block]:
        if panels := self.panels():
            yield Heading(self.text("curves"))
            draw = partial(draw_panels, panels, sections.baselines(self.series))
            yield Picture("curves.png", self.text("curves_caption"), draw)
        for model in self.models:
            if model["history"]:
                yield Heading(model["name"], level=3)
                yield Code("\n".join(self._log(model)))

    def panels(self) -> list[Panel]:
        """Validation perplexity, its difference to the baseline's, training loss, and phase 1's convergence."""
        ppl = {model["name"]: self._curve(model, "val_ppl") for model in self.models}
        stars = {  # of each model the last entry that was the best
            model["name"]: (self._when(model, entry), entry["val_ppl"])
            for model in self.models
            for entry in model["history"]
            if entry["best"]
        }
        # Healing has a different loss.
        loss = {model["name"]: self._curve(model, "train_loss") for model in self.models if not model["from_baseline"]}
        converged = {
            model["name"]: [(row["iteration"], 100 * row["convergence_rate"]) for row in model["phase1"]["history"]]
            for model in self.models
            if model["phase1"]
        }
        validation = Panel("Validation perplexity (star: best)", self.unit, ppl, stars=stars, scaled="y")
        panels = [
            validation,
            *sections.difference(validation, self.series, " at the same time"),
            Panel("Training loss", self.unit, loss),
            Panel("Phase 1: converged tokens (%)", "iteration", converged),
        ]
        return [panel for panel in panels if any(panel.curves.values())]

    def _curve(self, model: Model, key: str) -> list[tuple[float, float]]:
        return [(self._when(model, entry), entry[key]) for entry in model["history"] if finite(entry[key])]

    def _when(self, model: Model, entry: Mapping[str, Any]) -> float:
        """The x of an evaluation, in `unit`; a model that starts from the baseline goes on at its best epoch."""
        if self.by_tokens:
            return entry["tokens"] / 1e6
        return entry["epoch"] + (model["from_baseline"]["best_epoch"] if model["from_baseline"] else 0)

    def _log(self, model: Model) -> Iterator[str]:
        for entry in model["history"]:
            yield (
                f"{self.unit} {self._when(model, entry):.4g}: train_loss={number(entry['train_loss'], 4)}, "
                f"val_ppl={number(entry['val_ppl'], 2)}, val_acc={number(entry['val_accuracy'], 4)}, "
                f"{number(entry['seconds'], 1)} s{' *' if entry['best'] else ''}"
            )
        if model["stop_reason"]:
            yield f"stopped: {model['stop_reason']}"

    def _phase1(self) -> Iterator[Block]:
        wanted = self.recipe["phase1"]["convergence_rate"]
        rows = [
            {
                "model": model["name"],
                "met": self.text("yes" if phase1["convergence_rate"] >= wanted else "no"),
                "reached": percent(phase1["convergence_rate"]),
                "wanted": percent(wanted),
                "iterations": integer(phase1["iterations"]),
                "rank": self.text("rank_value", rank=number(phase1["effective_rank"], 1), dim=model["context_dim"]),
                "seconds": number(phase1["seconds"], 1),
            }
            for model in self.models
            if (phase1 := model["phase1"])
        ]
        if rows:
            yield Heading(self.text("phase1"))
            yield Paragraph(self.text("phase1_intro"))
            yield sections.table(rows, self.text, text_columns=2)

    def _settings(self) -> dict[str, str]:
        """Data and recipe by the keys of the texts, without what no model has used."""
        used = {"phase1": any(model["phase1"] for model in self.models), "heal": bool(self.healed)}
        values = {"seed": self.recipe["seed"]}
        for section, options in self.recipe.items():
            if isinstance(options, dict) and used.get(section, True):
                values |= {f"{section}.{name}": value for name, value in options.items()}
        unused = [MLP_WIDTH] * self.widened + ["train.epochs", "train.patience"] * self.by_tokens
        named = [key for key in values if key in self.text.texts and key not in unused]
        shown = {key: str(values[key]) for key in named if values[key] is not None}
        return sections.data_facts(self.data, self.text) | shown


def _filled(model: Mapping[str, Any]) -> Model:
    """The model with None for what it lacks. Failed models and older versions lack some figures."""
    found = defaultdict(lambda: None, model)
    found["cache"], found["history"] = found["cache"] or {}, found["history"] or []
    return found
