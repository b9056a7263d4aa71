"""Every test runs offline, without the user's cache, and on one thread: the models are too small for more.

This file imports the package inside its functions: pytest-xdist's first process reads it, and runs no test.
"""

import gc
import os
import random
import signal
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_configure():
    gc.disable()  # imports leave no garbage: without collections they take a quarter less


def pytest_collection_finish():
    gc.freeze()  # what was imported is no garbage: collections are then ten times faster
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """What a script starts in its background ignores SIGINT, and so would the suite and all that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def blank_pictures():
    """Pictures are composed, but neither laid out nor drawn, which takes a second each: tests/report does both."""
    from unittest import mock

    from matplotlib import style
    from matplotlib.figure import Figure

    from context_pythia.report import document

    def png(draw):
        pictures = Path(document.__file__).parent / "pages" / "pictures.mplstyle"
        with style.context(pictures), mock.patch.object(Figure, "draw_without_rendering"):
            draw()
        return b"\x89PNG\r\n\x1a\n"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document, "png", png)
        yield


SENTENCE = "the cache of a model holds keys and values for each token that it has seen so far in its text"


def tiny_recipe(folder, **sections):
    """A recipe of four models, one of each source and the baseline, that train in seconds on made-up sentences."""
    from context_pythia.config.recipe_files import recipe_from_dict

    corpus = folder / "corpus"
    if not corpus.exists():
        corpus.mkdir(parents=True)
        dice = random.Random(0)
        for number in range(12):
            sentences = (" ".join(dice.choices(SENTENCE.split(), k=9)) for _ in range(40))
            (corpus / f"{number:02}.txt").write_text(".\n".join(sentences))
    values = {
        "name": "tiny",
        "data": {"data": str(corpus), "vocab_size": 280, "samples": 60, "sequence_length": 16},
        "architecture": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
            "max_position_embeddings": 64,
        },
        "phase1": {"max_iterations": 15, "convergence_rate": 0.8, "batch_tokens": 300},
        "train": {"epochs": 2, "batch_size": 9, "learning_rate": 0.003},
        "models": [
            {"name": "Pythia"},
            {"name": "input", "context_source": "input", "context_dim": 12},
            {"name": "shared", "context_source": "shared", "context_dim": 12},
            {"name": "Layer 12 x2", "context_source": "layer", "context_dim": 12, "context_sharing": 2},
        ],
    }  # fmt: skip
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes if isinstance(changes, dict) else changes
    return recipe_from_dict(values)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, own_cache):
    from context_pythia.cli.command import reported
    from context_pythia.runs.train import compare

    folder = tmp_path_factory.mktemp("comparison")
    with reported(folder / "run", "ja"):
        compare(tiny_recipe(folder), folder / "run", progress=False)
    return folder / "run"
