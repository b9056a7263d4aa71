"""A tiny GPT-NeoX, made-up sentences, and the command `convert` on them."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from context_pythia.cli import command_line as cli
from context_pythia.data.tokenizers import train_tokenizer
from tests.conftest import tiny_recipe
from tests.model.conftest import randomise

HIDDEN, LAYERS, HEADS = 32, 3, 4
BODY = dict(
    hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=48,
    max_position_embeddings=64,
)  # fmt: skip
HALF = ("--kv-reduction", 0.5)
BELOW = ("--context-dim", 24, "--calibration-tokens", 256)
# The original is random, so only the text has something to teach.
HEALING = ("--heal-steps", 4, "--heal-batch-size", 9, "--heal-learning-rate", 0.003, "--heal-ce-weight", 0.5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tiny_recipe(folder)
    return folder / "corpus"


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer([path.read_text() for path in sorted(corpus.iterdir())], 280, progress=False)


@pytest.fixture(scope="module")
def save(tokenizer):
    def save_to(folder, std=0.12, **changes):
        ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = GPTNeoXConfig(**{"vocab_size": len(tokenizer)} | BODY | ends | changes)
        randomise(GPTNeoXForCausalLM(config), std).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save_to


@pytest.fixture(scope="module")
def original(save, tmp_path_factory):
    return save(tmp_path_factory.mktemp("original") / "pythia-tiny")


@pytest.fixture
def copy(original, tmp_path):
    """A copy of the original, to be changed."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


@pytest.fixture(scope="module")
def convert(corpus, tmp_path_factory):
    cache = tmp_path_factory.mktemp("packed")

    def call(model, out, *options, data=True, card=False):
        """The exit code. The model's card and its picture are made only if a test reads them."""
        text = ("--data", corpus, "--samples", 60, "--sequence-length", 16, "--cache-dir", cache) if data else ()
        with pytest.MonkeyPatch.context() as patch:
            if not card:
                patch.setattr("context_pythia.report.card.write_card", lambda out: None)
            return cli.main([str(word) for word in ("convert", model, "--out", out, "--quiet", *text, *options)])

    return call


@pytest.fixture
def refused(convert, tmp_path, capsys):
    """Runs, and returns the one line of the error; nothing may be left behind."""

    def call(code, model, *options, **keywords):
        out = tmp_path / "refused" / "out"
        capsys.readouterr()
        assert convert(model, out, *options, **keywords) == code
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("context-pythia: error: ")
        assert not out.parent.exists() or not list(out.parent.iterdir())
        return lines[0]

    return call


@pytest.fixture(scope="module")
def below(convert, original, tmp_path_factory):
    out = tmp_path_factory.mktemp("below") / "out"
    assert convert(original, out, *BELOW) == 0
    return out


def record_of(folder):
    return json.loads((folder / "conversion.json").read_text())


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@contextmanager
def edited(folder):
    """The weights in a model's folder, saved as they are left."""
    weights = load_file(folder / "model.safetensors")
    yield weights
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def assert_same_weights(folder, other):
    weights, expected = load(folder).state_dict(), load(other).state_dict()
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


@pytest.fixture
def ids():
    return torch.randint(0, 280, (2, 30), generator=torch.Generator().manual_seed(0))
