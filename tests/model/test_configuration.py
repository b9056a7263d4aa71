import runpy
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from context_pythia.model import ContextPythiaConfig, ContextPythiaForCausalLM, configuration


@pytest.mark.parametrize("version", ["5.16.0", "5.25.0", "5.25.0.dev0", "6.1"])
def test_a_host_that_was_not_tried_is_refused_in_one_line(version, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ImportError, match=f"^transformers {version}: .* install .*'transformers>=5.16.1,<5.25'$"):
        runpy.run_path(configuration.__file__)


@pytest.mark.parametrize("version", ["5.16.1", "5.19.0", "5.24.3"])
def test_a_host_that_was_tried_is_not_refused(version, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", version)
    runpy.run_path(configuration.__file__)


def test_pip_installs_a_host_that_was_tried():
    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"transformers>={configuration.OLDEST},<{configuration.NEWER}" in project["dependencies"]


def test_devices_divide_what_they_divide_of_gpt_neox_but_the_heads():
    with torch.device("meta"):
        host = GPTNeoXForCausalLM(GPTNeoXConfig(num_hidden_layers=1)).tp_plan
        ours = ContextPythiaForCausalLM(ContextPythiaConfig(num_hidden_layers=1)).tp_plan
    assert ours == {name: way for name, way in host.items() if ".attention." not in name} and "lm_head" in ours
