"""The report of a run of `compare`: results, cache, positions, learning curves, phase 1.

A missing figure is a dash: the model failed, has not run, or comes from an older version.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from context_pythia.report.document import Block, Code, Heading, Paragraph, Picture, Table
from context_pythia.report.figures import Panel, draw_panels, png
from context_pythia.report.formats import (
    DASH,
    change,
    finite,
    integer,
    kilobytes,
    number,
    pair,
    percent,
    perplexity,
    perplexity_digits,
    sign,
)
from context_pythia.report.sections import (
    FRONTIER,
    Series,
    cache_table,
    data_facts,
    difference,
    facts,
    failures,
    frontier,
    picture,
    position_picture,
    positions,
    provenance,
    recipe_facts,
)
from context_pythia.report.texts import Texts

CURVES = "curves.png"
Model = dict[str, Any]


class RunReport:
    """The document and the pictures of a run.

    Args:
        metrics: the record. Each model has a name; any other missing field counts as null.
    """

    def __init__(self, metrics: Mapping[str, Any], record: Mapping[str, Any], text: Texts):
        self.text, self.provenance = text, record
        self.data, self.recipe = metrics["data"], metrics["recipe"]
        self.models: list[Model] = [_filled(model) for model in metrics["models"]]
        for model in self.models:  # older runs do not record the baseline
            model.setdefault("baseline", model["context_source"] is None and not model["from_baseline"])
        self.done = [model for model in self.models if model["error"] is None and finite(model["best_val_ppl"])]
        entered = {model["name"] for model in self.models}
        self.pending: list[Model] = [_filled(m) for m in self.recipe.get("models", []) if m["name"] not in entered]
        self.baseline = next((model for model in self.done if model["baseline"]), None)
        self.series = [
            Series(
                model["name"],
                model["baseline"],
                model["best_val_ppl"] if finite(model["best_val_ppl"]) else None,
                model["cache"].get("bytes_measured"),
                model["val_ppl_by_position"],
            )
            for model in self.models
        ]

    def pictures(self) -> dict[str, bytes]:
        panels = learning_curves(self.models, self.series, self.recipe)
        baselines = {one.name: one.baseline for one in self.series}
        curves = {CURVES: png(draw_panels, panels, baselines)} if panels else {}
        return curves | frontier(self.series) | position_picture(self.series)

    def blocks(self, pictures: Mapping[str, bytes]) -> Iterator[Block]:
        text = self.text
        yield Heading(text("title", recipe=self.recipe.get("name", DASH)), level=1)
        yield Paragraph(self._headline(), "lead")
        failed = len([model for model in self.models if model["error"] is not None])
        if failed or self.pending:
            counts = {"done": len(self.done), "failed": failed, "pending": len(self.pending)}
            yield Paragraph(text("unfinished", total=len(self.models) + len(self.pending), **counts), "note")
        yield Heading(text("results"))
        yield self._results()
        yield Paragraph(text("results_note", **self._setup()))
        for model in self.done:
            if not self._timed_as_baseline(model):
                yield Paragraph(text("timed_elsewhere", name=model["name"], **model["machine"]), "note")
        yield from self._healed()
        yield from failures({model["name"]: model["error"] for model in self.models}, text)
        if any(model["context_source"] == "input" for model in self.models):
            yield Paragraph(text("input_note"), "note")
        yield from picture(pictures, FRONTIER, text("frontier_caption"))
        yield from self._cache()
        yield from positions(self.series, text, pictures)
        yield from self._curves(pictures)
        yield from self._phase1()
        yield Heading(text("settings"))
        yield facts(self._settings(), text)
        yield from provenance(self.provenance, text)

    def _headline(self) -> str:
        if not self.done:
            return self.text("nothing")
        best = min(self.done, key=lambda model: model["best_val_ppl"])
        if self.baseline is None:
            shown = self._figures(best) | self._setup()
            origin = best["from_baseline"] or {}
            if "best_val_ppl" not in origin:
                return self.text("no_baseline", **shown)
            shown["change"] = change(best["best_val_ppl"] / origin["best_val_ppl"] - 1)
            shown |= {"baseline": origin["name"], "base_ppl": perplexity(origin["best_val_ppl"])}
            return self.text("made_elsewhere", **shown)
        shown = self._setup() | {f"base_{key}": value for key, value in self._figures(self.baseline).items()}
        shown["baseline"] = self.baseline["name"]
        smaller = [model for model in self.done if (model["cache"].get("reduction_measured") or 0) > 0]
        if not smaller:
            return self.text("none_smaller", **shown)
        best = min(smaller, key=lambda model: model["best_val_ppl"])
        smallest = max(smaller, key=lambda model: model["cache"]["reduction_measured"])
        sentences = [self.text("best", **shown, **self._figures(best))]
        if smallest is not best:
            sentences.append(self.text("smallest", **self._figures(smallest)))
        return self.text("between_sentences").join(sentences)

    def _setup(self) -> dict[str, str]:
        """Length and dtype of the cache measurements."""
        cache: dict[str, Any] = next((model["cache"] for model in self.models if model["cache"]), {})
        return {"length": integer(cache.get("length")), "dtype": cache.get("dtype", DASH)}

    def _figures(self, model: Model) -> dict[str, str]:
        cache = model["cache"]
        return {
            "name": model["name"],
            "ppl": perplexity(model["best_val_ppl"]),
            "kb": kilobytes(cache.get("bytes_measured")),
            "reduction": percent(cache.get("reduction_measured")),
            "change": self._change(model),
        }

    def _change(self, model: Model) -> str:
        """Difference to the baseline's best perplexity, absolute and in percent."""
        if self.baseline is None or model is self.baseline or not finite(model["best_val_ppl"]):
            return DASH
        base = self.baseline["best_val_ppl"]
        apart = model["best_val_ppl"] - base
        return f"{sign(apart)}{abs(apart):,.{perplexity_digits(base)}f} ({change(apart / base)})"

    def _results(self) -> Table:
        keys = ("model", "context", "best_ppl", "change", "kb", "reduction", "parameters", "best_epoch", "accuracy")
        rows = []
        for model in self.models + self.pending:
            shown = self._figures(model) | {
                "model": model["name"],
                "context": self._context(model),
                "parameters": pair(model["trainable_parameters"], model["parameters"]),
                "best_epoch": self._best_epoch(model),
                "accuracy": percent(model["val_accuracy"]),
            }
            state = "pending" if model in self.pending else "failed" if model["error"] is not None else None
            shown["best_ppl"] = self.text(state) if state else shown["ppl"]
            seconds = number(model["seconds_per_epoch"], 1)
            rows.append([*(shown[key] for key in keys), " ".join(filter(None, (seconds, self._overhead(model))))])
        return Table(self.text.row(*keys, "seconds_epoch"), rows, text_columns=2)

    def _context(self, model: Model) -> str:
        source, dim, layers = model["context_source"], model["context_dim"], model["context_sharing"] or 1
        if model["from_baseline"]:
            return self.text("control" if source is None else "converted", source=source, dim=dim)
        if source is None:
            return self.text("baseline")
        if source == "grouped":
            dim = self.text("heads", heads=model["key_value_heads"])
        key = "sharing" if source in ("layer", "grouped") and layers > 1 else "alone"
        return self.text(key, source=source, dim=dim, layers=layers)

    def _best_epoch(self, model: Model) -> str:
        """The best epoch, in three digits if it is a fraction.

        For a model that starts from the baseline it is the baseline's best epoch plus the epochs since then.
        """
        epoch, origin = model["best_epoch"], model["from_baseline"]
        if epoch is None:
            return DASH
        return f"{origin['best_epoch']} + {epoch:.3g}" if origin else f"{epoch:.3g}"

    def _healed(self) -> Iterator[Block]:
        """Notes on the models that start from the baseline, and their change against the control."""
        healed = [model for model in self.done if model["from_baseline"]]
        if not healed:
            return
        heal, named = self.recipe["heal"], {"baseline": healed[0]["from_baseline"]["name"]}
        note = "healed_note" if heal["ce_weight"] < 1 else "healed_by_text_note"
        yield Paragraph(self.text(note, steps=heal["steps"], **named), "note")
        control = next((model for model in healed if model["context_source"] is None), None)
        if control is None:
            return
        yield Paragraph(self.text("control_note", control=control["name"], **named), "note")
        for model in (model for model in healed if model is not control):
            apart = change(model["best_val_ppl"] / control["best_val_ppl"] - 1)
            yield Paragraph(
                self.text("against_control", name=model["name"], control=control["name"], change=apart), "note"
            )

    def _overhead(self, model: Model) -> str:
        """Seconds per epoch relative to the baseline, in brackets; empty if they are not comparable."""
        base = self.baseline and self.baseline["seconds_per_epoch"]
        seconds = model["seconds_per_epoch"]
        # Healing has a teacher and its own batch size.
        comparable = base and finite(seconds) and self._timed_as_baseline(model) and not model["from_baseline"]
        return f"(×{seconds / base:.2f})" if comparable else ""

    def _timed_as_baseline(self, model: Model) -> bool:
        """False if the run records another machine than the baseline's; older runs record no machine."""
        machine, base = (one and one["machine"] for one in (model, self.baseline))
        return not machine or not base or machine == base

    def _cache(self) -> Iterator[Block]:
        caches = {model["name"]: model["cache"] for model in self.models}
        if any(caches.values()):
            yield Heading(self.text("bytes"), level=3)
            yield cache_table(caches, self.text, "numbers_per_token")
            yield Paragraph(self.text("cache_note"))

    def _curves(self, pictures: Mapping[str, bytes]) -> Iterator[Block]:
        if CURVES in pictures:
            yield Heading(self.text("curves"))
            yield Picture(CURVES, self.text("curves_caption"))
        for model in self.models:
            if model["history"]:
                yield Heading(model["name"], level=3)
                yield Code("\n".join(self._log(model)))

    def _log(self, model: Model) -> Iterator[str]:
        training = self.recipe.get("train", {})
        epochs = training.get("epochs") or len(model["history"])
        for entry in model["history"]:
            done = f"Epoch {entry['epoch']:>{len(str(epochs))}}/{epochs}"
            if model["from_baseline"]:
                done = f"Step {entry['step']}/{self.recipe.get('heal', {}).get('steps')}"
            elif training.get("tokens"):
                done = f"{integer(entry['tokens'])} of {integer(training['tokens'])} tokens"
            yield (
                f"{done}: train_loss={number(entry['train_loss'], 4)}, "
                f"val_ppl={number(entry['val_ppl'], 2)}, val_acc={number(entry['val_accuracy'], 4)}, "
                f"{number(entry['seconds'], 1)} s{' *' if entry['best'] else ''}"
            )
        if model["stop_reason"] and training.get("tokens"):
            last = model["history"][-1]
            yield f"Stopped after {integer(last['tokens'])} tokens: {model['stop_reason']}"
        elif model["stop_reason"]:
            yield (
                f"Stopped after epoch {model['history'][-1]['epoch']}: {model['stop_reason']}; "
                f"best val_ppl={number(model['best_val_ppl'], 2)} in epoch {self._best_epoch(model)}"
            )

    def _phase1(self) -> Iterator[Block]:
        trained = [(model, model["phase1"]) for model in self.models if model["phase1"]]
        if not trained:
            return
        wanted = self.recipe.get("phase1", {}).get("convergence_rate")
        rows = []
        for model, phase1 in trained:
            reached = phase1["convergence_rate"]
            rank = {"rank": number(phase1["effective_rank"], 1), "dim": integer(model["context_dim"])}
            met = DASH if wanted is None else self.text("yes" if reached >= wanted else "no")
            rows.append(
                [model["name"], met, percent(reached), percent(wanted), integer(phase1["iterations"])]
                + [self.text("rank_value", **rank), number(phase1.get("seconds"), 1)]
            )
        head = ("model", "met", "reached", "wanted", "iterations", "rank", "seconds")
        yield Heading(self.text("phase1"))
        yield Paragraph(self.text("phase1_intro"))
        yield Table(self.text.row(*head), rows, text_columns=2)
        yield Paragraph(self.text("convergence_by_iteration"))
        for model, phase1 in trained:
            rates = [f"{100 * entry['convergence_rate']:5.1f}" for entry in phase1.get("history") or []]
            if rates:
                yield Heading(model["name"], level=3)
                lines = [f"{i + 1:>4}:  {'  '.join(rates[i : i + 10])}" for i in range(0, len(rates), 10)]
                yield Code("\n".join(lines))

    def _settings(self) -> dict[str, str]:
        """The settings of data, model and training, by the keys of the texts."""
        recipe = dict(self.recipe)
        if not any(model["phase1"] for model in self.models):
            recipe.pop("phase1", None)
        if not any(model["from_baseline"] for model in self.models):
            recipe.pop("heal", None)
        return data_facts(self.data, self.text) | recipe_facts(recipe, self.text)


def learning_curves(models: list[Model], series: list[Series], recipe: Mapping[str, Any]) -> list[Panel]:
    """Validation perplexity, its difference to the baseline's, training loss, and phase 1's convergence.

    The x axis is epochs, or tokens for a run with a single pass.
    """
    tokens = bool(recipe.get("train", {}).get("tokens"))
    where = "million tokens" if tokens else "epoch"
    ppl: dict[str, list[tuple[float, float]]] = {}
    loss: dict[str, list[tuple[float, float]]] = {}
    stars: dict[str, tuple[float, float]] = {}
    phase1 = {}
    for model in models:
        name, origin, history = model["name"], model["from_baseline"], model["history"]
        start = origin["best_epoch"] if origin else 0  # training continued from the baseline's best epoch
        points = [(entry["tokens"] / 1e6 if tokens else start + entry["epoch"], entry) for entry in history]
        ppl[name] = [(x, entry["val_ppl"]) for x, entry in points if finite(entry["val_ppl"])]
        # Healing has a different loss.
        loss[name] = [(x, entry["train_loss"]) for x, entry in points if finite(entry["train_loss"]) and not origin]
        for x, entry in points:
            if entry["best"]:
                stars[name] = (x, entry["val_ppl"])
        rates = (model["phase1"] or {}).get("history") or []
        phase1[name] = [(entry["iteration"], entry["convergence_rate"]) for entry in rates]
    panels = []
    if any(ppl.values()):
        title = "Validation perplexity (star: best)"
        panels.append(Panel(title, where, ppl, stars=stars, scaled="y"))
        panels += difference(ppl, series, " at the same time", where)
    if any(loss.values()):
        panels.append(Panel("Training loss", where, loss))
    if any(phase1.values()):
        wanted = recipe.get("phase1", {}).get("convergence_rate")
        panels.append(Panel("Phase 1: converged tokens", "iteration", phase1, level=wanted, share=True))
    return panels


def _filled(model: Mapping[str, Any]) -> Model:
    """The model with all fields that this module reads. Failed models and older versions lack some."""
    return _EMPTY | {key: value for key, value in model.items() if value is not None}


_EMPTY: Model = dict.fromkeys(
    ("context_source", "context_dim", "context_sharing", "key_value_heads", "from_baseline", "parameters", "machine")
    + ("trainable_parameters", "best_val_ppl", "best_epoch", "val_accuracy", "stop_reason", "seconds_per_epoch")
    + ("phase1", "error")
) | {"cache": {}, "history": [], "val_ppl_by_position": []}
