"""A checkpoint that ships its code, on each transformers that `make test-hosts` lays beside the packages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from context_pythia.runs.convert import ship_code

from ..model.conftest import build

OVERLAYS = sorted(Path(sys.prefix, "overlays").glob("*"))
SOURCES = ["input", "shared", "layer, shared by 2", "layer, rotary pairs"]
READER = """
import json, sys
sys.modules["context_pythia"] = None
import transformers
from pathlib import Path

import torch
ids = torch.load(Path(sys.argv[1], "ids.pt"), weights_only=True)
written = {}
for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")
    written[folder.name] = model.generate(ids, max_new_tokens=8, do_sample=False, num_beams=2).tolist()
print(json.dumps([transformers.__version__, written]))
"""


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """Checkpoints of each source, and what they write here."""
    folder, written = tmp_path_factory.mktemp("shipped"), {}
    ids = torch.randint(2, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    torch.save(ids, folder / "ids.pt")
    for source in SOURCES:
        model, own = build(source), folder / source.replace(", ", "-").replace(" ", "-")
        own.mkdir()
        ship_code(model.config, own)
        model.save_pretrained(own)
        written[own.name] = model.generate(ids, max_new_tokens=8, do_sample=False, num_beams=2).tolist()
    return folder, written


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_a_checkpoint_with_its_code_writes_the_same_where_the_package_is_absent(shipped, overlay, tmp_path):
    folder, written = shipped
    environment = os.environ | {"PYTHONPATH": str(overlay), "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", READER, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [overlay.name, written]
