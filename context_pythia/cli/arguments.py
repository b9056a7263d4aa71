"""What each command takes: its options, and the keyword arguments that they make for the function that does the work.

The flags that override a recipe's values are made from the option dataclasses of `recipe.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from context_pythia.bench.options import CACHES as BENCH_CACHES
from context_pythia.bench.options import SIZES, BenchOptions, parse_sources
from context_pythia.cli.flags import (
    add_flags,
    add_overrides,
    add_recipe,
    at_least,
    comma_separated,
    numbers,
    overrides,
    temperature,
)
from context_pythia.config.convert import ConvertOptions
from context_pythia.config.recipe import PRECISIONS, DataOptions, HealOptions, Recipe
from context_pythia.config.recipe_files import in_order, load_recipe, packaged_recipes
from context_pythia.errors import UsageError
from context_pythia.sweep.options import SAMPLERS, SweepPlan, parse_over, parse_seeds

LANGUAGES = ("en", "ja")
CACHES = ("none", "int8", "int4")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/NAME-OF-THE-RECIPE)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _recipe(args: argparse.Namespace, name: str, models: list[str] | None = None) -> Recipe:
    return load_recipe(name, overrides(args), models)


def _run_keywords(args: argparse.Namespace, models: list[str] | None) -> dict[str, Any]:
    recipe = _recipe(args, args.recipe, models)
    return {"recipe": recipe, "out": args.out or Path("runs") / recipe.name, "progress": not args.quiet}


def compare_options(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    _add_run(parser)
    parser.add_argument("--models", metavar="A,B", help="only these models of the recipe")
    parser.add_argument("--lang", choices=LANGUAGES, default="en", help="language of the report (default: en)")
    add_overrides(parser)


def compare_keywords(args: argparse.Namespace) -> dict[str, Any]:
    models = None if args.models is None else comma_separated(args.models)
    return _run_keywords(args, models) | {"lang": args.lang}


def one_model_options(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--model", required=True, metavar="NAME", help="the model of the recipe")
    _add_run(parser)
    add_overrides(parser)


def one_model_keywords(args: argparse.Namespace) -> dict[str, Any]:
    return _run_keywords(args, [args.model])


def generate_options(parser: argparse.ArgumentParser) -> None:
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


def generate_keywords(args: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "prompt", "max_new_tokens", "temperature", "top_k", "num_beams", "seed", "dtype", "stats")
    return {name: getattr(args, name) for name in (*names, "compile")}


def info_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model's folder, or a Hub name")
    parser.add_argument("--recipe", metavar="RECIPE", help=f"{', '.join(packaged_recipes())}, or a YAML file")
    parser.add_argument("--json", action="store_true", dest="as_json", help="JSON in place of a table")
    parser.add_argument(
        "--length", type=at_least(1), default=128, metavar="N", help="tokens in the cache (default: 128)"
    )
    parser.add_argument("--dtype", choices=PRECISIONS, default="float32", help="of model and cache (default: float32)")
    add_overrides(parser)


def info_keywords(args: argparse.Namespace) -> dict[str, Any]:
    if (args.model is None) == (args.recipe is None):
        raise UsageError("info: give either --recipe RECIPE or a MODEL")
    if args.recipe is None and overrides(args):
        raise UsageError("info: options of a recipe were given without --recipe; a saved MODEL has its own")
    recipe = None if args.recipe is None else _recipe(args, args.recipe)
    return {"recipe": recipe} | {name: getattr(args, name) for name in ("model", "length", "dtype", "as_json")}


def report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of `compare`, `sweep`, `bench` or `eval`")
    parser.add_argument("--lang", choices=LANGUAGES, default="en", help="language of the report (default: en)")


def report_keywords(args: argparse.Namespace) -> dict[str, Any]:
    return {"run": args.run, "lang": args.lang}


def eval_options(parser: argparse.ArgumentParser) -> None:
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


def eval_keywords(args: argparse.Namespace) -> dict[str, Any]:
    given = {path.removeprefix("data."): value for path, value in overrides(args).items()}
    names = ("models", "dtype", "batch_size", "cached_tokens", "tasks_path", "limit", "out", "lang")
    return {name: getattr(args, name) for name in names} | {
        "data": DataOptions(**{"tokenizer": args.models[0]} | given),
        "caches": [cache for cache in dict.fromkeys(args.cache) if cache != "none"],
        "tasks": comma_separated(args.tasks) if args.tasks else [],
        "progress": not args.quiet,
    }


def bench_options(parser: argparse.ArgumentParser) -> None:
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
        type=lambda text: tuple(comma_separated(text)),
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


def bench_keywords(args: argparse.Namespace) -> dict[str, Any]:
    if args.train and args.recipe is None:
        args.recipe = "report"
    if sum([bool(args.models), args.recipe is not None, args.size is not None]) != 1:
        one = "a recipe alone" if args.train else "either MODELs, --recipe RECIPE or --size SIZE"
        raise UsageError(f"bench: give {one}")
    if args.sources is not None and args.size is None:
        raise UsageError("bench: --sources are those of a --size")
    given = overrides(args)
    measured = {path.removeprefix("bench."): given.pop(path) for path in list(given) if path.startswith("bench.")}
    if args.recipe is None and (given or args.only):
        raise UsageError("bench: options of a recipe were given without --recipe")
    only = comma_separated(args.only) if args.only else None
    shapes = {name: getattr(args, name) for name in ("batch_sizes", "lengths", "caches")}
    return {name: getattr(args, name) for name in ("models", "size", "train", "out", "lang")} | {
        "recipe": None if args.recipe is None else load_recipe(args.recipe, given, only),
        "sources": None if args.sources is None else parse_sources(args.sources),
        "options": BenchOptions(**shapes, **measured),
        "progress": not args.quiet,
    }


def sweep_options(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--over", action="append", default=[], metavar="KEY=A,B", help="values to try (repeatable)")
    parser.add_argument("--models", metavar="A,B", help="only these models of the recipe (default: all)")
    parser.add_argument("--seeds", metavar="N,N", help="train each setting with these seeds (default: the recipe's)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="grid", help="default: grid, every combination")
    parser.add_argument(
        "--trials", type=at_least(1), metavar="N", help="of tpe: trainings in all, shared by models and seeds"
    )
    parser.add_argument("--storage", metavar="URL", help="Optuna storage to share (default: a journal in DIR)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder, and name, of the study")
    parser.add_argument("--lang", choices=LANGUAGES, default="en", help="language of the report (default: en)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_overrides(parser)


def sweep_keywords(args: argparse.Namespace) -> dict[str, Any]:
    recipe = load_recipe(args.recipe, overrides(args))
    models = [model.name for model in recipe.models]
    if args.models:
        models = in_order(comma_separated(args.models), models, recipe.name)
    seeds = parse_seeds(args.seeds) if args.seeds else [recipe.seed]
    plan = SweepPlan(recipe, models, [parse_over(text) for text in args.over], seeds, args.sampler, args.trials)
    return {"plan": plan, "progress": not args.quiet} | {key: getattr(args, key) for key in ("out", "storage", "lang")}


def convert_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a GPT-NeoX model's folder or Hub name")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the converted model")
    parser.add_argument("--ship-code", action="store_true", help="add the code of Context-Pythia: loads without it")
    parser.add_argument(
        "--control",
        action="store_true",
        help="convert nothing: heal the original itself for --heal-steps by the same loss, as a control",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_flags(parser.add_argument_group("the context"), ConvertOptions, "convert.")
    title = "data: the training split calibrates and heals, the validation split tells whether healing helped"
    tokenizer = "a tokenizer.json, a folder or a Hub name (default: the model's)"
    add_flags(parser.add_argument_group(title), DataOptions, "data.", tokenizer=tokenizer, vocab_size=None)
    add_flags(parser.add_argument_group("heal: distillation from the original"), HealOptions, "heal.", "heal-")


def convert_keywords(args: argparse.Namespace) -> dict[str, Any]:
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
