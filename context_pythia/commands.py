"""The table of commands: what each takes, and which function does the work.

The function is named, not imported: it is loaded when the command runs, so that help answers before torch could be
imported. The flags that override a recipe's values are made from the option dataclasses of `recipe.py`.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from context_pythia import processes
from context_pythia.conversion.options import ConvertOptions, HealOptions
from context_pythia.experiments.bench.options import CACHES as BENCH_CACHES
from context_pythia.experiments.bench.options import SIZES, BenchOptions, parse_sources
from context_pythia.experiments.sweep.options import SAMPLERS, SweepPlan, parse_over, parse_seeds
from context_pythia.flags import add_flags, add_overrides, add_recipe, at_least, numbers, overrides, temperature
from context_pythia.recipe import PRECISIONS, DataOptions, Recipe, load_recipe, packaged_recipes

LANGUAGES = ("en", "ja")
CACHES = ("none", "int8", "int4")


@dataclass(frozen=True)
class Command:
    """A row of the table.

    Attributes:
        usage: what the command takes, in a few words; its help lists the options one by one.
        summary: one line for the help.
        function: `module:function` that does the work.
        add_options: adds the command's own options to its parser.
        keywords: the function's keyword arguments, from the parsed options.
        examples: command lines for the help.
        resumable: whether the same command, run again, goes on where it was interrupted.
        joint: whether several processes, started by `torchrun`, can share the work.
    """

    usage: str
    summary: str
    function: str
    add_options: Callable[[argparse.ArgumentParser], None]
    keywords: Callable[[argparse.Namespace], dict[str, Any]]
    examples: tuple[str, ...]
    resumable: bool = False
    joint: bool = False

    def run(self, args: argparse.Namespace) -> None:
        """Check the options, then load and call the function."""
        if processes.count() > 1 and not self.joint:
            joint = ", ".join(name for name, command in COMMANDS.items() if command.joint)
            raise ValueError(f"this command runs in one process, {processes.count()} were started; in several: {joint}")
        keywords = self.keywords(args)
        module, function = self.function.split(":")
        getattr(importlib.import_module(module), function)(**keywords)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/NAME-OF-THE-RECIPE)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _recipe(args: argparse.Namespace, name: str, models: list[str] | None = None) -> Recipe:
    return load_recipe(name, overrides(args), models)


def _run_keywords(args: argparse.Namespace, models: list[str] | None) -> dict[str, Any]:
    recipe = _recipe(args, args.recipe, models)
    return {"recipe": recipe, "out": args.out or Path("runs") / recipe.name, "progress": not args.quiet}


def _compare_options(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    _add_run(parser)
    parser.add_argument("--models", metavar="A,B", help="only these models of the recipe")
    parser.add_argument("--lang", choices=LANGUAGES, default="en", help="language of the report (default: en)")
    add_overrides(parser)


def _compare_keywords(args: argparse.Namespace) -> dict[str, Any]:
    models = None if args.models is None else [name.strip() for name in args.models.split(",")]
    return _run_keywords(args, models) | {"lang": args.lang}


def _one_model_options(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--model", required=True, metavar="NAME", help="the model of the recipe")
    _add_run(parser)
    add_overrides(parser)


def _one_model_keywords(args: argparse.Namespace) -> dict[str, Any]:
    return _run_keywords(args, [args.model])


def _generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model's folder, or a Hub name")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to go on from")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=64, metavar="N", help="default: 64")
    parser.add_argument("--temperature", type=temperature, default=0.0, metavar="X", help="default: 0, greedy")
    parser.add_argument("--top-k", type=at_least(1), metavar="N", help="sample from the N likeliest tokens only")
    parser.add_argument("--num-beams", type=at_least(1), default=1, metavar="N", help="beam search (default: 1, none)")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="seed of the sampling (default: 0)")
    parser.add_argument("--dtype", choices=PRECISIONS, default="float32", help="default: float32")
    parser.add_argument("--stats", action="store_true", help="also print tokens a second and the measured cache")
    parser.add_argument("--compile", action="store_true", help="compile the decoding step (needs a C++ compiler)")


def _generate_keywords(args: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "prompt", "max_new_tokens", "temperature", "top_k", "num_beams", "seed", "dtype", "stats")
    return {name: getattr(args, name) for name in (*names, "compile")}


def _info_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model's folder, or a Hub name")
    parser.add_argument("--recipe", metavar="RECIPE", help=f"{', '.join(packaged_recipes())}, or a YAML file")
    parser.add_argument("--json", action="store_true", dest="as_json", help="JSON in place of a table")
    parser.add_argument(
        "--length", type=at_least(1), default=128, metavar="N", help="tokens in the cache (default: 128)"
    )
    parser.add_argument("--dtype", choices=PRECISIONS, default="float32", help="of model and cache (default: float32)")
    add_overrides(parser)


def _info_keywords(args: argparse.Namespace) -> dict[str, Any]:
    if (args.model is None) == (args.recipe is None):
        raise ValueError("info: give either --recipe RECIPE or a MODEL")
    if args.recipe is None and overrides(args):
        raise ValueError("info: options of a recipe were given without --recipe; a saved MODEL has its own")
    recipe = None if args.recipe is None else _recipe(args, args.recipe)
    return {"recipe": recipe} | {name: getattr(args, name) for name in ("model", "length", "dtype", "as_json")}


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of `compare`")
    parser.add_argument("--lang", choices=LANGUAGES, default="en", help="language of the report (default: en)")


def _eval_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="models' folders or Hub names; the first is compared to"
    )
    title = "data: the validation split is scored, with the options of the training the one that it held out"
    tokenizer = "a tokenizer.json, a folder, a Hub name or train (default: the first model's)"
    add_flags(parser.add_argument_group(title), DataOptions, "data.", tokenizer=tokenizer, vocab_size=None)
    parser.add_argument("--dtype", choices=PRECISIONS, default="float32", help="default: float32")
    parser.add_argument("--batch-size", type=at_least(1), default=16, metavar="N", help="samples a pass (default: 16)")
    parser.add_argument(
        "--cache", action="append", choices=CACHES, default=[], help="also with this quantised cache (may be repeated)"
    )
    parser.add_argument(
        "--cached-tokens",
        type=at_least(1),
        default=4096,
        metavar="N",
        help="validation tokens that are also scored token by token through the cache (default: 4096)",
    )
    parser.add_argument("--tasks", metavar="A,B", help="also run these tasks of lm-evaluation-harness")
    parser.add_argument("--tasks-path", type=Path, metavar="DIR", help="folder with task files of your own")
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="at most so many documents a task")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for figures, report and picture (default: none)"
    )
    parser.add_argument("--lang", choices=LANGUAGES, default="en", help="language of the report (default: en)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _eval_keywords(args: argparse.Namespace) -> dict[str, Any]:
    given = {path.removeprefix("data."): value for path, value in overrides(args).items()}
    names = ("models", "dtype", "batch_size", "cached_tokens", "tasks_path", "limit", "out", "lang")
    return {name: getattr(args, name) for name in names} | {
        "data": DataOptions(**{"tokenizer": args.models[0]} | given),
        "caches": [cache for cache in dict.fromkeys(args.cache) if cache != "none"],
        "tasks": [name.strip() for name in args.tasks.split(",")] if args.tasks else [],
        "progress": not args.quiet,
    }


def _bench_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", metavar="MODEL", help="models' folders or Hub names")
    parser.add_argument("--recipe", metavar="RECIPE", help=f"{', '.join(packaged_recipes())}, or a YAML file")
    parser.add_argument("--only", metavar="A,B", help="only these models of the recipe")
    parser.add_argument("--size", choices=SIZES, help="GPT-NeoX of this size and Context-Pythias, random weights")
    parser.add_argument(
        "--sources",
        metavar="A:N,B:N",
        help="with --size: input:DIM, shared:DIM, layer:DIM, layer:DIM:heads, layer:DIM:exact "
        "(default: shared and layer of half the width, and layer:WIDTH:exact)",
    )
    parser.add_argument("--train", action="store_true", help="time training steps of a recipe (default: report)")
    parser.add_argument("--batch-sizes", type=numbers, default=(1, 16), metavar="N,N", help="default: 1,16")
    parser.add_argument("--lengths", type=numbers, default=(512, 2048), metavar="N,N", help="default: 512,2048")
    parser.add_argument(
        "--caches",
        type=lambda text: tuple(word.strip() for word in text.split(",")),
        default=BENCH_CACHES,
        metavar="A,B",
        help=f"of the GPT-NeoX models (default: {','.join(BENCH_CACHES)}); onednn: static, with our linear maps; "
        "compiled: every model also with a static cache and a compiled decoding step",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for figures, report, pictures (default: none)")
    parser.add_argument("--lang", choices=LANGUAGES, default="en", help="language of the report (default: en)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_flags(parser.add_argument_group("what is measured, and how often"), BenchOptions, "bench.")
    add_overrides(parser)


def _bench_keywords(args: argparse.Namespace) -> dict[str, Any]:
    if args.train and args.recipe is None:
        args.recipe = "report"
    if sum([bool(args.models), args.recipe is not None, args.size is not None]) != 1:
        one = "a recipe alone" if args.train else "either MODELs, --recipe RECIPE or --size SIZE"
        raise ValueError(f"bench: give {one}")
    if args.sources is not None and args.size is None:
        raise ValueError("bench: --sources are those of a --size")
    given = overrides(args)
    measured = {path.removeprefix("bench."): given.pop(path) for path in list(given) if path.startswith("bench.")}
    if args.recipe is None and (given or args.only):
        raise ValueError("bench: options of a recipe were given without --recipe")
    only = [name.strip() for name in args.only.split(",")] if args.only else None
    shapes = {name: getattr(args, name) for name in ("batch_sizes", "lengths", "caches")}
    return {name: getattr(args, name) for name in ("models", "size", "train", "out", "lang")} | {
        "recipe": None if args.recipe is None else load_recipe(args.recipe, given, only),
        "sources": None if args.sources is None else parse_sources(args.sources),
        "options": BenchOptions(**shapes, **measured),
        "progress": not args.quiet,
    }


def _sweep_options(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--over", action="append", default=[], metavar="KEY=A,B", help="values to try (repeatable)")
    parser.add_argument("--models", metavar="A,B", help="only these models of the recipe (default: all)")
    parser.add_argument("--seeds", metavar="N,N", help="train each setting with these seeds (default: the recipe's)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="grid", help="default: grid, every combination")
    parser.add_argument("--trials", type=at_least(1), metavar="N", help="trainings in all, of the sampler tpe")
    parser.add_argument("--storage", metavar="URL", help="Optuna storage to share (default: a journal in DIR)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder, and name, of the study")
    parser.add_argument("--lang", choices=LANGUAGES, default="en", help="language of the report (default: en)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_overrides(parser)


def _sweep_keywords(args: argparse.Namespace) -> dict[str, Any]:
    recipe = load_recipe(args.recipe, overrides(args))
    wanted = args.models.split(",") if args.models else [model.name for model in recipe.models]
    models = [model.name for model in load_recipe(args.recipe, models=[name.strip() for name in wanted]).models]
    seeds = parse_seeds(args.seeds) if args.seeds else [recipe.seed]
    plan = SweepPlan(recipe, models, [parse_over(text) for text in args.over], seeds, args.sampler, args.trials)
    return {"plan": plan, "progress": not args.quiet} | {key: getattr(args, key) for key in ("out", "storage", "lang")}


def _convert_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a GPT-NeoX model's folder or Hub name")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the converted model")
    parser.add_argument("--ship-code", action="store_true", help="add the code of Context-Pythia: loads without it")
    parser.add_argument(
        "--control",
        action="store_true",
        help="convert nothing: train the original itself for --heal-steps, as a control",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_flags(parser.add_argument_group("the context"), ConvertOptions, "convert.")
    title = "data: the training split calibrates and heals, the validation split tells whether healing helped"
    tokenizer = "a tokenizer.json, a folder or a Hub name (default: the model's)"
    add_flags(parser.add_argument_group(title), DataOptions, "data.", tokenizer=tokenizer, vocab_size=None)
    add_flags(parser.add_argument_group("heal: distillation from the original"), HealOptions, "heal.", "heal-")


def _convert_keywords(args: argparse.Namespace) -> dict[str, Any]:
    given: dict[str, dict[str, Any]] = {"convert": {}, "data": {"tokenizer": args.model}, "heal": {}}
    for path, value in overrides(args).items():
        section, _, name = path.partition(".")
        given[section][name] = value
    if args.control and not {"context_dim", "kv_reduction"} & given["convert"].keys():
        given["convert"]["kv_reduction"] = 0.5
    return {name: getattr(args, name) for name in ("model", "out", "ship_code", "control")} | {
        "options": ConvertOptions(**given["convert"]),
        "data": DataOptions(**given["data"]),
        "healing": HealOptions(**given["heal"]),
        "progress": not args.quiet,
    }


COMMANDS: dict[str, Command] = {
    "compare": Command(
        "[RECIPE] [options]",
        "train the models of a recipe on the same text and write the report",
        "context_pythia.experiments.compare:compare",
        _compare_options,
        _compare_keywords,
        (
            "compare",
            "compare report --data corpus.jsonl.gz --tokenizer tokenizer.json --out runs/corpus",
            "compare quick --models Pythia,shared --epochs 2 --context-dim 32 --lang ja",
        ),
        resumable=True,
        joint=True,
    ),
    "phase1": Command(
        "[RECIPE] --model NAME [options]",
        "train the ContextBlock of one model (OACD) and stop",
        "context_pythia.experiments.compare:run_phase1",
        _one_model_options,
        _one_model_keywords,
        ("phase1 quick --model shared --phase1-convergence-rate 0.99",),
        resumable=True,
        joint=True,
    ),
    "train": Command(
        "[RECIPE] --model NAME [options]",
        "train one model, both phases",
        "context_pythia.experiments.compare:train",
        _one_model_options,
        _one_model_keywords,
        ("train quick --model layer --learning-rate 3e-4 --epochs 6",),
        resumable=True,
        joint=True,
    ),
    "sweep": Command(
        "[RECIPE] --over KEY=A,B [--over ...] --out DIR [options]",
        "train settings of a recipe over seeds, by any number of processes",
        "context_pythia.experiments.sweep.worker:sweep",
        _sweep_options,
        _sweep_keywords,
        (
            "sweep quick --models Pythia,shared --over context_dim=32,64 --over learning_rate=5e-4,1e-3 --out runs/dim",
            "sweep report --over learning_rate=1e-4..1e-3 --sampler tpe --trials 50 --storage sqlite:///s.db --out s",
        ),
        resumable=True,
    ),
    "generate": Command(
        "MODEL --prompt TEXT [options]",
        "write text with a trained model",
        "context_pythia.experiments.generate:generate",
        _generate_options,
        _generate_keywords,
        (
            'generate runs/quick/models/shared --prompt "def main(" --stats',
            'generate EleutherAI/pythia-70m --prompt "The sea" --temperature 0.8 --top-k 50 --seed 1',
        ),
    ),
    "info": Command(
        "(--recipe RECIPE | MODEL) [options]",
        "parameters and cache bytes, by formula and measured",
        "context_pythia.experiments.info:info",
        _info_options,
        _info_keywords,
        ("info --recipe report", "info runs/quick/models/shared --length 2048 --dtype bfloat16 --json"),
    ),
    "report": Command(
        "RUN [options]",
        "write the report of a run folder again",
        "context_pythia.experiments.report:report",
        _report_options,
        lambda args: {"run": args.run, "lang": args.lang},
        ("report runs/quick --lang ja",),
    ),
    "convert": Command(
        "MODEL (--context-dim N | --kv-reduction R) --out DIR [options]",
        "give a trained GPT-NeoX model a smaller cache",
        "context_pythia.experiments.convert:convert",
        _convert_options,
        _convert_keywords,
        (
            "convert EleutherAI/pythia-70m --kv-reduction 0.75 --data corpus.jsonl.gz --out pythia-70m-quarter",
            "convert runs/quick/models/pythia --kv-reduction 0.5 --out runs/exact",
            "convert runs/quick/models/pythia --context-dim 32 --heal-steps 50 --out runs/healed",
        ),
        resumable=True,
    ),
    "eval": Command(
        "MODEL [MODEL ...] [options]",
        "perplexity, accuracy and measured cache of models side by side",
        "context_pythia.experiments.evaluate:evaluate",
        _eval_options,
        _eval_keywords,
        (
            "eval runs/quick/models/pythia runs/quick/models/shared --samples 1200 --out eval",
            "eval EleutherAI/pythia-70m converted --data wikitext:wikitext-2-raw-v1 --cache int8 --cache int4",
            "eval runs/quick/models/pythia --tasks mine --tasks-path tasks --limit 100",
        ),
    ),
    "bench": Command(
        "(MODEL ... | --recipe RECIPE | --size SIZE | --train) [options]",
        "speed and memory of prefill, decoding or training beside GPT-NeoX",
        "context_pythia.experiments.bench.sweep:bench",
        _bench_options,
        _bench_keywords,
        (
            "bench --size pythia-70m --sources shared:256,layer:256,layer:512:exact --out bench",
            "bench runs/quick/models/pythia runs/quick/models/shared --batch-sizes 1,8 --lengths 64,120",
            "bench --train --recipe report --rounds 3 --out bench-train",
        ),
    ),
}
