import json
import shutil

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from context_pythia import ContextPythiaConfig, ContextPythiaForCausalLM
from context_pythia.errors import Failure, UsageError
from context_pythia.evaluation.memory import measure_generated_cache
from context_pythia.evaluation.pretrained import check_pretrained, hub_commit, load_pretrained


@pytest.fixture
def saved(tmp_path):
    config = ContextPythiaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, context_dim=12
    )
    ContextPythiaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_sound_model_is_loaded_in_the_wanted_dtype(saved):
    verbosity = transformers.logging.get_verbosity()
    model = load_pretrained(str(saved), torch.bfloat16)
    assert transformers.logging.get_verbosity() == verbosity
    assert isinstance(model, ContextPythiaForCausalLM) and model.dtype == torch.bfloat16 and not model.training
    assert check_pretrained(str(saved), torch.bfloat16).context_dim == 12


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_tensor(path):
    tensors = load_file(path)
    tensors.pop("gpt_neox.layers.1.attention.key_up.weight")
    save_file(tensors, path, {"format": "pt"})


def reshape_a_tensor(path):
    tensors = load_file(path)
    tensors["gpt_neox.final_layer_norm.weight"] = torch.ones(31)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("damage", [cut, drop_a_tensor, reshape_a_tensor, lambda path: path.unlink()])
def test_damaged_weights_are_refused_in_one_line(saved, damage):
    damage(saved / "model.safetensors")
    for load in (load_pretrained, check_pretrained):
        with pytest.raises(RuntimeError, match="is damaged .*train or download it again") as caught:
            load(str(saved), torch.float32)
        assert "\n" not in str(caught.value)


def test_damaged_configuration_is_refused(saved):
    (saved / "config.json").write_text("{")
    with pytest.raises(RuntimeError, match="is damaged"):
        load_pretrained(str(saved), torch.float32)


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hidden_size": -32}, "hidden_size -32: must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads 0: must be at least 1"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps nan: must be a finite number"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 2.0}}, "partial_rotary_factor 2.0"),
        ({"context_dim": 0}, "context_dim 0: must be between 1 and 2 * hidden_size = 64"),
        ({"hidden_act": "nix"}, "KeyError: 'nix'"),
        ({"id2label": "x"}, "Error: "),
        ({"model_type": "nix"}, "has model type `nix`"),
    ],
)
def test_values_that_no_model_can_have_are_refused_in_one_line(saved, values, said):
    change(saved, **values)
    with pytest.raises(Failure, match="cannot be loaded .* correct its config.json") as caught:
        load_pretrained(str(saved), torch.float32)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}, "gptq"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),  # the weights are not packed
        ({}, "unknown"),
    ],
)
def test_a_quantizer_that_is_not_here_or_weights_that_it_did_not_pack_are_one_line(saved, settings, method):
    change(saved, quantization_config=settings)
    said = rf"is quantized \({method}\) and cannot be loaded here .*in full precision"
    with pytest.raises(UsageError, match=said) as caught:
        load_pretrained(str(saved), torch.float32)
    assert "\n" not in str(caught.value)


def test_an_attention_that_is_not_here_is_one_line(saved):
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=32)).save_pretrained(saved)  # fmt: skip
    change(saved, attn_implementation="flash_attention_2")
    with pytest.raises(UsageError, match="needs a package or feature that is missing .*install it, or correct"):
        load_pretrained(str(saved), torch.float32)


def test_an_unknown_attention_is_named_with_all_that_there_are(saved):
    change(saved, attn_implementation="nix")
    with pytest.raises(Failure, match=r'attn_implementation="nix".*sdpa.*\): correct its config.json') as caught:
        load_pretrained(str(saved), torch.float32)
    assert "..." not in str(caught.value)


def test_a_revision_of_a_hub_model_is_that_revisions_weights(saved, tmp_path, monkeypatch):
    hub = tmp_path / "hub" / "models--owner--name"
    for commit, revision, value in (("a" * 40, "main", 1.0), ("b" * 40, "step3000", 2.0)):
        snapshot = hub / "snapshots" / commit
        shutil.copytree(saved, snapshot)
        tensors = load_file(snapshot / "model.safetensors")
        tensors["gpt_neox.final_layer_norm.weight"].fill_(value)
        save_file(tensors, snapshot / "model.safetensors", {"format": "pt"})
        (hub / "refs").mkdir(exist_ok=True)
        (hub / "refs" / revision).write_text(commit)
    for module in (huggingface_hub.constants, huggingface_hub.file_download.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, value, commit in (("owner/name", 1.0, "a"), ("owner/name@step3000", 2.0, "b")):
        model = load_pretrained(name, torch.float32)
        assert (model.gpt_neox.final_layer_norm.weight == value).all() and hub_commit(name) == commit * 40
    with pytest.raises(ConnectionError, match="no file or folder 'owner/name' here, and the Hugging Face Hub cannot"):
        load_pretrained("owner/name@step4000", torch.float32)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load_pretrained(str(tmp_path), torch.float32)


def test_a_name_of_no_folder_says_so_before_the_hub_that_cannot_be_reached():
    with pytest.raises(
        ConnectionError,
        match="no file or folder 'nothere' here, and the Hugging Face Hub cannot be asked for a model",
    ):
        load_pretrained("nothere", torch.float32)


@pytest.mark.parametrize("length", [1, 2, 33])
def test_generated_cache_has_the_asked_length_even_if_the_model_would_stop(saved, length):
    model = load_pretrained(str(saved), torch.float32)
    model.generation_config.eos_token_id = list(range(50))
    measured = measure_generated_cache(model, length, batch_size=2)
    assert (measured.length, measured.filled) == (length, 2 * length * 2 * 12 * 4)
    assert model.generation_config.eos_token_id == list(range(50))
