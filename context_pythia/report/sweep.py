"""Writes the report of a sweep's folder: Markdown, HTML and pictures, in English or Japanese.

It reads metrics.json and provenance.json of the folder and nothing else, so it needs neither Optuna nor the study.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from context_pythia.files import read_record
from context_pythia.report.document import Block, Code, Heading, Paragraph, Picture, Table, write_document
from context_pythia.report.figures import Series, position_curves
from context_pythia.report.formats import DASH, calls, change, kilobytes, percent, perplexity, plain
from context_pythia.report.positions import POSITIONS, position_blocks
from context_pythia.report.sweep_figures import pareto, perplexities
from context_pythia.report.sweep_translations import SWEEP_TRANSLATIONS
from context_pythia.report.translations import TRANSLATIONS

PARETO, PERPLEXITIES = "pareto.png", "perplexities.png"


def write_sweep(folder: Path, lang: str = "en") -> list[Path]:
    """Write report.md, report.html (report.ja.md, ... in other languages than English) and the pictures into `folder`.

    Raises:
        FileNotFoundError, ValueError: metrics.json or provenance.json is missing or damaged.
    """
    metrics, provenance = read_record(folder / "metrics.json"), read_record(folder / "provenance.json")
    pictures = _pictures(metrics)
    text = TRANSLATIONS[lang] | SWEEP_TRANSLATIONS[lang]
    return write_document(folder, _blocks(metrics, provenance, text, pictures), lang, pictures)


def _blocks(
    metrics: dict[str, Any], provenance: dict[str, Any], text: dict[str, str], pictures: dict[str, bytes]
) -> Iterator[Block]:
    trials, searched = metrics["trials"], metrics["searched"]
    rows = sorted(metrics["settings"], key=lambda row: (row["mean"] is None, row["mean"]))
    counts = {state: sum(trial["state"] == state for trial in trials) for state in _STATES}
    yield Heading(text["title"].format(recipe=metrics["recipe"]["name"]), level=1)
    yield Paragraph(_headline(rows, text), "lead")
    yield Paragraph(text["counts"].format(total=len(trials), settings=len(rows), **counts), "note")
    if PARETO in pictures:
        yield Picture(PARETO, text["pareto"])
    yield Heading(text["best_of_each"])
    best = _best_of_each(rows)
    yield _table(best, searched, text)
    budgets = {name: sum(trial["model"] == name for trial in trials) for name in {row["model"] for row in rows}}
    yield from _healed(rows, metrics["recipe"], text)
    yield Paragraph(text["budget"].format(budgets=", ".join(f"{name} {n}" for name, n in sorted(budgets.items()))))
    yield Heading(text["all_settings"])
    if PERPLEXITIES in pictures:
        yield Picture(PERPLEXITIES, text["perplexities"])
    yield _table(rows, searched, text)
    yield Paragraph(text["table_note"])
    for trial in trials:
        if trial["state"] == "failed":
            yield Paragraph(text["failure"].format(name=trial["folder"], error=trial["error"]), "alert")
    for series in _comparable(best):
        yield from position_blocks(series, text, pictures)
    yield from _importance(metrics["importance"], text)
    yield Heading(text["settings"])
    facts = {
        "searched": ", ".join(searched) or DASH,
        "sampler": metrics["sampler"],
        "seeds": ", ".join(map(str, metrics["seeds"])),
        "study": metrics["study"],
        "device": str(provenance.get("device")),
        "versions": ", ".join(f"{name} {number}" for name, number in provenance.get("versions", {}).items()),
        "commit": plain(provenance.get("commit")),
        "created": str(provenance.get("created")),
        "command": str(provenance.get("command")),
    }
    yield Table([text["setting"], text["value"]], [[text[key], value] for key, value in facts.items()], text_columns=2)
    # Any number of workers give the same command: each is named once, when it came first.
    first = {call.get("command"): call for call in reversed(provenance.get("earlier", []))}
    first.pop(provenance.get("command"), None)
    if first:
        yield Paragraph(text["earlier_calls"])
        yield Code(calls(list(reversed(first.values()))))
    yield Paragraph(text["where"])
    yield Heading(text["rest"])
    yield Code(yaml.safe_dump(metrics["recipe"], sort_keys=False, allow_unicode=True).rstrip())


def _healed(rows: list[dict[str, Any]], recipe: dict[str, Any], text: dict[str, str]) -> Iterator[Block]:
    """What the models that are made of the trained baseline lose against the control of the same setting."""
    sources = {model["name"]: model["context_source"] for model in recipe["models"] if model.get("from_baseline")}
    healed = [row for row in rows if row["model"] in sources and row["n"]]
    if not healed:
        return
    yield Paragraph(text["healed"].format(names=", ".join(dict.fromkeys(row["model"] for row in healed))), "note")
    controls = {_around_model(row): row for row in healed if sources[row["model"]] is None}
    for row in healed:
        control = controls.get(_around_model(row))
        if control is not None and control is not row and row["seeds"] == control["seeds"]:
            facts = {"name": _figures(row)["name"], "control": _figures(control)["name"]}
            yield Paragraph(
                text["against_control"].format(change=change(row["mean"] / control["mean"] - 1, 2), **facts), "note"
            )


def _around_model(row: dict[str, Any]) -> str:
    """A row's setting without the options of its model."""
    return repr({path: value for path, value in row["setting"].items() if not path.startswith("model.")})


def _best_of_each(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each model's best of the rows, which are in order, the best of them first."""
    best = {row["model"]: row for row in reversed(rows) if row["n"]}
    return sorted(best.values(), key=lambda row: row["mean"])


def _comparable(rows: list[dict[str, Any]]) -> list[list[Series]]:
    """The rows by their bands of positions: samples of different lengths, if those were searched, do not compare."""
    groups: dict[tuple[float, ...], list[Series]] = {}
    for row in rows:
        positions = row.get("positions") or []  # older sweeps have none
        one = Series(_figures(row)["name"], row["baseline"], [], [], positions=positions)
        groups.setdefault(tuple(band["to"] for band in positions), []).append(one)
    return [series for bands, series in groups.items() if bands]


def _pictures(metrics: dict[str, Any]) -> dict[str, bytes]:
    searched = metrics["searched"]
    rows = sorted((row for row in metrics["settings"] if row["n"]), key=lambda row: row["mean"])
    if not rows:
        return {}
    labels = [_label(row["setting"]) for row in rows]
    names = [": ".join(filter(None, (row["model"], label))) for row, label in zip(rows, labels, strict=True)]
    seeds = [
        [
            trial["val_ppl"]
            for trial in metrics["trials"]
            if trial["state"] == "complete" and all(trial[key] == row[key] for key in ("model", "setting"))
        ]
        for row in rows
    ]
    meaning = ", ".join(map(_name, searched))
    pictures = {PARETO: pareto(rows, labels, meaning), PERPLEXITIES: perplexities(rows, seeds, names, meaning)}
    comparable = _comparable(_best_of_each(rows))
    if len(comparable) == 1:
        pictures[POSITIONS] = position_curves(comparable[0])
    return pictures


_STATES = ("complete", "failed", "running", "waiting")


def _headline(rows: list[dict[str, Any]], text: dict[str, str]) -> str:
    finished = [row for row in rows if row["n"]]
    if not finished:
        return text["nothing"]
    best = finished[0]
    smaller = [row for row in finished if (row["reduction"] or 0) > 0]
    headline = text["best"].format(**_figures(best))
    if smaller and smaller[0] is not best:
        gap = "" if headline.endswith("。") else " "
        headline += gap + text["best_smaller"].format(**_figures(smaller[0]))
    return headline


def _figures(row: dict[str, Any]) -> dict[str, str]:
    return {
        "name": ", ".join(filter(None, (row["model"], _words(row)))),
        "ppl": perplexity(row["mean"], 2),
        "n": str(row["n"]),
        "kb": kilobytes(row["cache_bytes"]),
        "reduction": percent(row["reduction"]),
        "change": change(row["change"], 2),
    }


def _words(row: dict[str, Any]) -> str:
    """The setting in words; what does not concern the model is left out."""
    return ", ".join(f"{_name(path)} {_value(v)}" for path, v in row["setting"].items() if v is not None)


def _label(setting: dict[str, Any]) -> str:
    """The values alone, for which a picture has room; none where nothing that was searched concerns the model."""
    values = setting.values()
    return "" if set(values) <= {None} else ", ".join(map(_value, values))


def _table(rows: list[dict[str, Any]], searched: list[str], text: dict[str, str]) -> Table:
    head = [text["model"], *map(_name, searched)]
    columns = ("n", "mean", "range", "std", "change", "cache", "reduction", "unbeaten")
    lines = [
        [row["model"], *(_value(row["setting"][path]) for path in searched)]
        + [
            f"{row['n']} / {row['trials']}",
            text["failed"] if row["failed"] == row["trials"] else perplexity(row["mean"], 2),
            DASH if row["n"] < 2 else f"{perplexity(row['min'], 2)}–{perplexity(row['max'], 2)}",
            perplexity(row["std"], 2),
            change(row["change"], 2),
            kilobytes(row["cache_bytes"]),
            percent(row["reduction"]),
            text["yes"] if row["unbeaten"] else "",
        ]
        for row in rows
    ]
    return Table([*head, *(text[key] for key in columns)], lines, text_columns=1)


def _importance(importance: dict[str, Any], text: dict[str, str]) -> Iterator[Block]:
    yield Heading(text["importance"])
    if "reason" in importance:
        yield Paragraph(text["no_importance"].format(reason=importance["reason"]), "note")
        return
    rows = [[_name(path), percent(share)] for path, share in importance["shares"].items()]
    yield Table([text["setting"], text["share"]], rows)
    yield Paragraph(text["importance_note"].format(
        trials=importance["trials"], evaluator=importance["evaluator"], quantile=percent(importance["quantile"])
    ))  # fmt: skip


def _name(path: str) -> str:
    section, _, name = path.rpartition(".")
    return f"phase 1 {name}" if section == "phase1" else name


def _value(value: Any) -> str:
    return DASH if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
