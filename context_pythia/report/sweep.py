"""The report of a sweep: settings over seeds, perplexity against the cache, and the importance of options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import yaml

from context_pythia.report.document import Block, Code, Heading, Paragraph, Picture, Table
from context_pythia.report.figures import Series, draw_frontier, draw_settings, short
from context_pythia.report.formats import DASH, change, kilobytes, percent, perplexity
from context_pythia.report.sections import facts, failures, headline, positions, provenance, table
from context_pythia.report.texts import Texts

Row = dict[str, Any]


class SweepReport:
    """The document of a sweep. Each row is a model with a setting; the best come first."""

    def __init__(self, metrics: Mapping[str, Any], record: Mapping[str, Any], text: Texts):
        self.metrics, self.provenance, self.text = metrics, record, text
        self.searched: list[str] = metrics["searched"]
        self.rows: list[Row] = sorted(metrics["settings"], key=lambda row: (row["mean"] is None, row["mean"]))
        self.finished = [row for row in self.rows if row["n"]]
        best = {row["model"]: row for row in reversed(self.finished)}
        self.best_of_each = sorted(best.values(), key=lambda row: row["mean"])
        models = metrics["recipe"]["models"]
        # The sources of the models that start from the trained baseline.
        self.healed = {model["name"]: model["context_source"] for model in models if model.get("from_baseline")}
        # Their controls, by the rest of the setting and the seeds.
        self.controls = {
            _around_model(row): row for row in self.finished if self.healed.get(row["model"], "none") is None
        }

    def blocks(self) -> Iterator[Block]:
        text, metrics, rows = self.text, self.metrics, self.rows
        states = [trial["state"] for trial in metrics["trials"]]
        counts = {state: states.count(state) for state in ("complete", "failed")}
        counts["unfinished"] = len(states) - sum(counts.values())
        series = [self._series(row) for row in self.finished]
        by = short(", ".join(map(_name, self.searched)))
        yield Heading(text("title", recipe=metrics["recipe"]["name"]), level=1)
        yield headline([one for one in series if one.group == series[0].group], text)
        yield Paragraph(text("counts", total=len(states), settings=len(rows), **counts), "note")
        if series:
            title = "Lower left is better" + f" ({by})" * bool(by)
            yield Picture("pareto.png", text("pareto"), partial(draw_frontier, series, title))
        if 0 < len(self.best_of_each) < len(rows):
            yield Heading(text("best_of_each"))
            yield self._table(self.best_of_each)
        if healed := [row["model"] for row in self.finished if row["model"] in self.healed]:
            yield Paragraph(text("healed", names=", ".join(dict.fromkeys(healed))), "note")
        yield Heading(text("all_settings"))
        if series:
            title = "Best validation perplexity" + f" by {by}" * bool(by)
            yield Picture("perplexities.png", text("perplexities"), partial(draw_settings, series, title))
        yield self._table(rows)
        yield Paragraph(text("table_note"))
        errors = {trial["folder"]: trial["error"] for trial in metrics["trials"] if trial["state"] == "failed"}
        yield from failures(errors, text)
        yield from positions([self._series(row) for row in self.best_of_each], text)
        yield from self._importance()
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

    def _series(self, row: Row) -> Series:
        # Options that do not affect the model are None. Older sweeps have no positions.
        setting = row["setting"].items()
        named = ", ".join(f"{_name(path)} {_value(value)}" for path, value in setting if value is not None)
        trials = [one for one in self.metrics["trials"] if all(one[key] == row[key] for key in ("model", "setting"))]
        return Series(
            f"{row['model']} ({named})" if named else row["model"],
            row["baseline"],
            row["mean"],
            row["cache_bytes"],
            row.get("positions") or (),
            row["model"],
            ", ".join(_value(value) for _, value in setting) if named else "",
            [one["val_ppl"] for one in trials if one["state"] == "complete"],
            # Only figures on the same data are comparable.
            repr({path: value for path, value in setting if path.startswith("data.")}),
        )

    def _table(self, rows: list[Row]) -> Table:
        lines = []
        for row in rows:
            line = {"model": row["model"]} | {path: _value(row["setting"][path]) for path in self.searched}
            line |= {"n": f"{row['n']} / {row['trials']}", "mean": perplexity(row["mean"], 2)}
            if row["failed"] == row["trials"]:
                line["mean"] = self.text("failed")
            line["range"] = DASH if row["n"] < 2 else f"{perplexity(row['min'], 2)}–{perplexity(row['max'], 2)}"
            line |= {"std": perplexity(row["std"], 2), "change": change(row["change"], 2)}
            if self.controls:
                control = self.controls.get(_around_model(row))
                apart = row["mean"] / control["mean"] - 1 if control and control is not row else None
                line["change_to_control"] = change(apart, 2)
            line |= {"kb": kilobytes(row["cache_bytes"]), "reduction": percent(row["reduction"])}
            lines.append(line | {"unbeaten": self.text("yes") if row["unbeaten"] else ""})
        head = [_name(key) if key in self.searched else self.text(key) for key in lines[0]]
        return Table(head, [list(line.values()) for line in lines])

    def _importance(self) -> Iterator[Block]:
        found = self.metrics["importance"]
        yield Heading(self.text("importance"))
        if "reason" in found:
            yield Paragraph(self.text("no_importance", **found), "note")
            return
        yield table(
            [{"setting": _name(path), "share": percent(share)} for path, share in found["shares"].items()], self.text
        )
        yield Paragraph(self.text("importance_note", **found | {"quantile": percent(found["quantile"])}))


def _around_model(row: Row) -> str:
    """A row's seeds, and its setting without the options of its model."""
    rest = {path: value for path, value in row["setting"].items() if not path.startswith("model.")}
    return repr((row["seeds"], rest))


def _name(path: str) -> str:
    section, _, name = path.rpartition(".")
    return f"phase 1 {name}" if section == "phase1" else name


def _value(value: Any) -> str:
    return DASH if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
