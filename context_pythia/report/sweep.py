"""The report of a sweep: settings over seeds, perplexity against the cache, and the importance of options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import yaml

from context_pythia.report.document import Block, Code, Heading, Paragraph, Picture, Table
from context_pythia.report.figures import Point, draw_frontier, draw_settings, short
from context_pythia.report.formats import DASH, change, kilobytes, percent, perplexity
from context_pythia.report.sections import Series, facts, failures, headline, positions, provenance, table
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
        text, metrics = self.text, self.metrics
        trials, rows = metrics["trials"], self.rows
        counts = {state: sum(trial["state"] == state for trial in trials) for state in ("complete", "failed")}
        counts["unfinished"] = len(trials) - sum(counts.values())
        frontier, all_settings = self._pictures()
        yield Heading(text("title", recipe=metrics["recipe"]["name"]), level=1)
        comparable = [_series(row) for row in self.finished if _data(row) == _data(self.finished[0])]
        yield headline(comparable, text)
        yield Paragraph(text("counts", total=len(trials), settings=len(rows), **counts), "note")
        if self.finished:
            yield frontier
        if 0 < len(self.best_of_each) < len(rows):
            yield Heading(text("best_of_each"))
            yield self._table(self.best_of_each)
        if healed := [row["model"] for row in self.finished if row["model"] in self.healed]:
            yield Paragraph(text("healed", names=", ".join(dict.fromkeys(healed))), "note")
        budgets = [f"{name} {sum(trial['model'] == name for trial in trials)}" for name in {r["model"] for r in rows}]
        yield Paragraph(text("budget", budgets=", ".join(sorted(budgets))))
        yield Heading(text("all_settings"))
        if self.finished:
            yield all_settings
        yield self._table(rows)
        yield Paragraph(text("table_note"))
        yield from failures({trial["folder"]: trial["error"] for trial in trials if trial["state"] == "failed"}, text)
        for number, series in enumerate(self._comparable(), 1):
            yield from positions(series, text, "positions.png" if number == 1 else f"positions-{number}.png")
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

    def _pictures(self) -> tuple[Picture, Picture]:
        """Perplexity against the cache, and the perplexity of each setting and seed."""
        baselines = {row["model"]: row["baseline"] for row in sorted(self.finished, key=lambda row: row["model"])}
        points, seeds = [], []
        for row in self.finished:
            values = row["setting"].values()
            label = "" if set(values) <= {None} else ", ".join(map(_value, values))
            points.append(
                Point(
                    name=": ".join(filter(None, (row["model"], label))),
                    model=row["model"],
                    size=row["cache_bytes"],
                    perplexity=row["mean"],
                    label=label if row["unbeaten"] else "",
                    low=row["min"],
                    high=row["max"],
                    group=_data(row),
                )
            )
            same = [trial for trial in self.metrics["trials"] if all(trial[k] == row[k] for k in ("model", "setting"))]
            seeds.append([trial["val_ppl"] for trial in same if trial["state"] == "complete"])
        by = short(", ".join(map(_name, self.searched)))
        titles = ("Lower left is better" + f" ({by})" * bool(by), "Best validation perplexity" + f" by {by}" * bool(by))
        return (
            Picture("pareto.png", self.text("pareto"), partial(draw_frontier, points, baselines, titles[0])),
            Picture(
                "perplexities.png",
                self.text("perplexities"),
                partial(draw_settings, points, seeds, baselines, titles[1]),
            ),
        )

    def _comparable(self) -> list[list[Series]]:
        """The best rows, grouped by bands of positions, because samples of different lengths are not comparable."""
        groups: dict[tuple[float, ...], list[Series]] = {}
        for row in self.best_of_each:
            series = _series(row)
            groups.setdefault(tuple(band["to"] for band in series.positions), []).append(series)
        return [series for bands, series in groups.items() if bands]

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
            line |= {"cache": kilobytes(row["cache_bytes"]), "reduction": percent(row["reduction"])}
            lines.append(line | {"unbeaten": self.text("yes") if row["unbeaten"] else ""})
        head = [_name(key) if key in self.searched else self.text(key) for key in lines[0]]
        return Table(head, [list(line.values()) for line in lines])

    def _importance(self) -> Iterator[Block]:
        found = dict(self.metrics["importance"])
        yield Heading(self.text("importance"))
        if "reason" in found:
            yield Paragraph(self.text("no_importance", **found), "note")
            return
        rows = [{"setting": _name(path), "share": percent(share)} for path, share in found.pop("shares").items()]
        yield table(rows, self.text)
        yield Paragraph(self.text("importance_note", **found | {"quantile": percent(found["quantile"])}))


def _series(row: Row) -> Series:
    # Options that do not affect the model are None. Older sweeps have no positions.
    setting = [f"{_name(path)} {_value(value)}" for path, value in row["setting"].items() if value is not None]
    name = f"{row['model']} ({', '.join(setting)})" if setting else row["model"]
    return Series(name, row["baseline"], row["mean"], row["cache_bytes"], row.get("positions") or ())


def _data(row: Row) -> str:
    """The searched options of the data. Only rows with equal ones are comparable."""
    return repr({path: value for path, value in row["setting"].items() if path.startswith("data.")})


def _around_model(row: Row) -> str:
    """A row's seeds, and its setting without the options of its model."""
    return repr(
        (row["seeds"], {path: value for path, value in row["setting"].items() if not path.startswith("model.")})
    )


def _name(path: str) -> str:
    section, _, name = path.rpartition(".")
    return f"phase 1 {name}" if section == "phase1" else name


def _value(value: Any) -> str:
    return DASH if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
