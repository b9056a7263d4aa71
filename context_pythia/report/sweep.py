"""The report of a sweep: settings over seeds, perplexity against the cache, and the importance of options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from context_pythia.report.document import Block, Code, Heading, Paragraph, Table
from context_pythia.report.figures import Point, draw_frontier, draw_settings, png, short
from context_pythia.report.formats import DASH, change, kilobytes, percent, perplexity
from context_pythia.report.sections import Series, facts, failures, picture, position_picture, positions, provenance
from context_pythia.report.texts import Texts

PARETO, PERPLEXITIES = "pareto.png", "perplexities.png"
Row = dict[str, Any]


class SweepReport:
    """The document and the pictures of a sweep. Each row is a model with a setting; the best come first."""

    def __init__(self, metrics: Mapping[str, Any], record: Mapping[str, Any], text: Texts):
        self.metrics, self.provenance, self.text = metrics, record, text
        self.searched: list[str] = metrics["searched"]
        self.rows: list[Row] = sorted(metrics["settings"], key=lambda row: (row["mean"] is None, row["mean"]))
        self.finished = [row for row in self.rows if row["n"]]
        best = {row["model"]: row for row in reversed(self.finished)}
        self.best_of_each = sorted(best.values(), key=lambda row: row["mean"])

    def pictures(self) -> dict[str, bytes]:
        if not self.finished:
            return {}
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
        pictures = {
            PARETO: png(draw_frontier, points, baselines, titles[0]),
            PERPLEXITIES: png(draw_settings, points, seeds, baselines, titles[1]),
        }
        comparable = self._comparable()
        return pictures | (position_picture(comparable[0]) if len(comparable) == 1 else {})

    def blocks(self, pictures: Mapping[str, bytes]) -> Iterator[Block]:
        text, metrics = self.text, self.metrics
        trials, rows = metrics["trials"], self.rows
        counts = {state: sum(trial["state"] == state for trial in trials) for state in ("complete", "failed")}
        counts["unfinished"] = len(trials) - sum(counts.values())
        yield Heading(text("title", recipe=metrics["recipe"]["name"]), level=1)
        yield Paragraph(self._headline(), "lead")
        yield Paragraph(text("counts", total=len(trials), settings=len(rows), **counts), "note")
        yield from picture(pictures, PARETO, text("pareto"))
        yield Heading(text("best_of_each"))
        yield self._table(self.best_of_each)
        yield from self._healed()
        budgets = [f"{name} {sum(trial['model'] == name for trial in trials)}" for name in {r["model"] for r in rows}]
        yield Paragraph(text("budget", budgets=", ".join(sorted(budgets))))
        yield Heading(text("all_settings"))
        yield from picture(pictures, PERPLEXITIES, text("perplexities"))
        yield self._table(rows)
        yield Paragraph(text("table_note"))
        yield from failures({trial["folder"]: trial["error"] for trial in trials if trial["state"] == "failed"}, text)
        for series in self._comparable():
            yield from positions(series, text, pictures)
        yield from self._importance()
        yield Heading(text("settings"))
        shown = {
            "searched": ", ".join(self.searched) or DASH,
            "sampler": metrics["sampler"],
            "seeds": ", ".join(map(str, metrics["seeds"])),
            "study": metrics["study"],
        }
        yield facts(shown, text)
        # Several workers may have the same command. The report shows only the first call of each.
        first = {call.get("command"): call for call in reversed(self.provenance.get("earlier", []))}
        first.pop(self.provenance.get("command"), None)
        yield from provenance(self.provenance, text, list(reversed(first.values())))
        yield Paragraph(text("where"))
        yield Heading(text("rest"))
        yield Code(yaml.safe_dump(metrics["recipe"], sort_keys=False, allow_unicode=True).rstrip())

    def _headline(self) -> str:
        if not self.finished:
            return self.text("nothing")
        sentences = [self.text("best", **_figures(self.finished[0]))]
        smaller = next((row for row in self.finished if (row["reduction"] or 0) > 0), None)
        if smaller and smaller is not self.finished[0]:
            sentences.append(self.text("best_smaller", **_figures(smaller)))
        return self.text("between_sentences").join(sentences)

    def _healed(self) -> Iterator[Block]:
        """The change of models that start from the trained baseline against the control of the same setting."""
        models = self.metrics["recipe"]["models"]
        sources = {model["name"]: model["context_source"] for model in models if model.get("from_baseline")}
        healed = [row for row in self.finished if row["model"] in sources]
        if not healed:
            return
        names = ", ".join(dict.fromkeys(row["model"] for row in healed))
        yield Paragraph(self.text("healed", names=names), "note")
        controls = {_around_model(row): row for row in healed if sources[row["model"]] is None}
        for row in healed:
            control = controls.get(_around_model(row))
            if control is not None and control is not row and row["seeds"] == control["seeds"]:
                apart = change(row["mean"] / control["mean"] - 1, 2)
                shown = {"name": _figures(row)["name"], "control": _figures(control)["name"], "change": apart}
                yield Paragraph(self.text("against_control", **shown), "note")

    def _comparable(self) -> list[list[Series]]:
        """The best rows, grouped by bands of positions, because samples of different lengths are not comparable."""
        groups: dict[tuple[float, ...], list[Series]] = {}
        for row in self.best_of_each:
            bands = row.get("positions") or []  # older sweeps have none
            series = Series(_figures(row)["name"], row["baseline"], positions=bands)
            groups.setdefault(tuple(band["to"] for band in bands), []).append(series)
        return [series for bands, series in groups.items() if bands]

    def _table(self, rows: list[Row]) -> Table:
        columns = ("n", "mean", "range", "std", "change", "cache", "reduction", "unbeaten")
        lines = [
            [row["model"], *(_value(row["setting"][path]) for path in self.searched), f"{row['n']} / {row['trials']}"]
            + [self.text("failed") if row["failed"] == row["trials"] else perplexity(row["mean"], 2)]
            + [DASH if row["n"] < 2 else f"{perplexity(row['min'], 2)}–{perplexity(row['max'], 2)}"]
            + [perplexity(row["std"], 2), change(row["change"], 2), kilobytes(row["cache_bytes"])]
            + [percent(row["reduction"]), self.text("yes") if row["unbeaten"] else ""]
            for row in rows
        ]
        return Table([self.text("model"), *map(_name, self.searched), *self.text.row(*columns)], lines)

    def _importance(self) -> Iterator[Block]:
        found = dict(self.metrics["importance"])
        yield Heading(self.text("importance"))
        if "reason" in found:
            yield Paragraph(self.text("no_importance", **found), "note")
            return
        rows = [[_name(path), percent(share)] for path, share in found.pop("shares").items()]
        yield Table(self.text.row("setting", "share"), rows)
        yield Paragraph(self.text("importance_note", **found | {"quantile": percent(found["quantile"])}))


def _figures(row: Row) -> dict[str, str]:
    # Options that do not affect the model are None.
    setting = [f"{_name(path)} {_value(value)}" for path, value in row["setting"].items() if value is not None]
    return {
        "name": ", ".join([row["model"], *setting]),
        "ppl": perplexity(row["mean"], 2),
        "n": str(row["n"]),
        "kb": kilobytes(row["cache_bytes"]),
        "reduction": percent(row["reduction"]),
        "change": change(row["change"], 2),
    }


def _data(row: Row) -> str:
    """The searched options of the data. Only rows with equal ones are comparable."""
    return repr({path: value for path, value in row["setting"].items() if path.startswith("data.")})


def _around_model(row: Row) -> str:
    """A row's setting without the options of its model."""
    return repr({path: value for path, value in row["setting"].items() if not path.startswith("model.")})


def _name(path: str) -> str:
    section, _, name = path.rpartition(".")
    return f"phase 1 {name}" if section == "phase1" else name


def _value(value: Any) -> str:
    return DASH if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
