"""The report of a sweep: settings over seeds, and perplexity against the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean, stdev
from typing import Any, NamedTuple

import yaml

from context_pythia.report.document import Block, Code, Heading, Paragraph, Picture, Table
from context_pythia.report.figures import Series, draw_frontier, draw_settings, frontiers, short
from context_pythia.report.formats import DASH, perplexity
from context_pythia.report.sections import compared, facts, failures, headline, positions, provenance
from context_pythia.report.texts import Texts


class Row(NamedTuple):
    """A model with a setting: its trials, and their means over the seeds that have a result."""

    setting: Mapping[str, Any]
    trials: Sequence[Mapping[str, Any]]
    series: Series


class SweepReport:
    """The document of a sweep. The best rows come first."""

    def __init__(self, metrics: Mapping[str, Any], record: Mapping[str, Any], text: Texts):
        self.metrics, self.provenance, self.text = metrics, record, text
        self.searched: list[str] = metrics["searched"]
        trials: dict[str, list[dict[str, Any]]] = {}
        for trial in metrics["trials"]:
            trials.setdefault(repr((trial["model"], trial["setting"])), []).append(trial)
        self.rows = sorted(map(_over_seeds, trials.values()), key=lambda row: row.series.perplexity or math.inf)
        finished = [row for row in self.rows if row.series.perplexity]
        self.series = [row.series for row in finished]
        # The best baseline on the same data.
        self.baselines = {one.group: one for one in reversed(self.series) if one.baseline}
        models = metrics["recipe"]["models"]
        # The sources of the models that start from the trained baseline.
        self.healed = {model["name"]: model["context_source"] for model in models if model.get("from_baseline")}
        controls = [row for row in finished if self.healed.get(row.series.model, "none") is None]
        self.controls = {_around_model(row): row.series for row in controls}
        self.best: dict[str, Row] = {}  # of each model
        for row in finished:
            self.best.setdefault(row.series.model, row)

    def blocks(self) -> Iterator[Block]:
        text, metrics, rows, series = self.text, self.metrics, self.rows, self.series
        best = list(self.best.values())
        states = [trial["state"] for trial in metrics["trials"]]
        counts = {state: states.count(state) for state in ("complete", "failed")}
        counts["unfinished"] = len(states) - sum(counts.values())
        by = short(", ".join(map(_name, self.searched)))
        yield Heading(text("title", recipe=metrics["recipe"]["name"]), level=1)
        yield headline([one for one in series if one.group == series[0].group], text)
        yield Paragraph(text("counts", total=len(states), settings=len(rows), **counts), "note")
        if series:
            title = "Lower left is better" + f" ({by})" * bool(by)
            yield Picture("pareto.png", text("pareto"), partial(draw_frontier, series, title))
        if 0 < len(best) < len(rows):
            yield Heading(text("best_of_each"))
            yield self._table(best)
        if healed := [model for model in self.best if model in self.healed]:
            yield Paragraph(text("healed", names=", ".join(healed)), "note")
        yield Heading(text("all_settings"))
        if series:
            title = "Best validation perplexity" + f" by {by}" * bool(by)
            yield Picture("perplexities.png", text("perplexities"), partial(draw_settings, series, title))
        yield self._table(rows)
        yield Paragraph(text("table_note"))
        yield from failures({trial["folder"]: trial["error"] for trial in metrics["trials"]}, text)
        yield from positions([row.series for row in best], text)
        yield Heading(text("settings"))
        shown = {
            "searched": ", ".join(self.searched) or DASH,
            "sampler": metrics["sampler"],
            "seeds": ", ".join(map(str, metrics["seeds"])),
            "study": metrics["study"],
        }
        yield facts(shown, text)
        yield from provenance(self.provenance, text)
        yield Paragraph(text("where"))
        yield Heading(text("rest"))
        yield Code(yaml.safe_dump(metrics["recipe"], sort_keys=False, allow_unicode=True).rstrip())

    def _table(self, rows: Sequence[Row]) -> Table:
        unbeaten = [one for line in frontiers(self.series) for one in line]
        lines = []
        for row in rows:
            one, failed = row.series, all(trial["state"] == "failed" for trial in row.trials)
            seeds, figures = one.seeds, compared(one, self.baselines.get(one.group), 2)
            line = {"model": one.model} | {path: _value(row.setting[path]) for path in self.searched}
            line["n"] = f"{len(seeds)} / {len(row.trials)}"
            line["mean"] = self.text("failed") if failed else figures["ppl"]
            line["range"] = f"{perplexity(min(seeds), 2)}–{perplexity(max(seeds), 2)}" if len(seeds) > 1 else DASH
            line["std"] = perplexity(stdev(seeds) if len(seeds) > 1 else None, 2)
            line["change"] = figures["change"]
            if self.controls:
                line["change_to_control"] = compared(one, self.controls.get(_around_model(row)), 2)["change"]
            line |= {key: figures[key] for key in ("kb", "reduction")}
            lines.append(line | {"unbeaten": self.text("yes") if one in unbeaten else ""})
        head = [_name(key) if key in self.searched else self.text(key) for key in lines[0]]
        return Table(head, [list(line.values()) for line in lines])


def _over_seeds(trials: Sequence[dict[str, Any]]) -> Row:
    model, setting = trials[0]["model"], trials[0]["setting"]
    done = [trial for trial in trials if trial["state"] == "complete"]
    perplexities = [trial["val_ppl"] for trial in done]
    # Trials of older sweeps have no bands, and then there is no mean.
    bands = zip(*(trial.get("val_ppl_by_position") or () for trial in done), strict=False)
    # Options that do not affect the model are None.
    named = ", ".join(f"{_name(path)} {_value(value)}" for path, value in setting.items() if value is not None)
    series = Series(
        f"{model} ({named})" if named else model,
        trials[0]["baseline"],
        fmean(perplexities) if done else 0,
        max((trial["cache_bytes"] for trial in done), default=0),
        [seeds[0] | {"perplexity": fmean(band["perplexity"] for band in seeds)} for seeds in bands],
        model,
        ", ".join(map(_value, setting.values())) if named else "",
        perplexities,
        # Only figures on the same data are comparable.
        repr({path: value for path, value in setting.items() if path.startswith("data.")}),
    )
    return Row(setting, trials, series)


def _around_model(row: Row) -> str:
    """The seeds with a result, and the setting without the options of the model."""
    seeds = sorted(trial["seed"] for trial in row.trials if trial["state"] == "complete")
    rest = {path: value for path, value in row.setting.items() if not path.startswith("model.")}
    return repr((seeds, rest))


def _name(path: str) -> str:
    section, _, name = path.rpartition(".")
    return f"phase 1 {name}" if section == "phase1" else name


def _value(value: Any) -> str:
    return DASH if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
