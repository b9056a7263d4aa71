import pytest
import torch
from safetensors.torch import load_file, save_file

from context_pythia import ContextPythiaConfig, ContextPythiaForCausalLM
from context_pythia.evaluation.memory import measure_generated_cache
from context_pythia.evaluation.pretrained import load_pretrained


@pytest.fixture
def saved(tmp_path):
    config = ContextPythiaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, context_dim=12
    )
    ContextPythiaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_sound_model_is_loaded_in_the_wanted_dtype(saved):
    model = load_pretrained(str(saved), torch.bfloat16)
    assert isinstance(model, ContextPythiaForCausalLM) and model.dtype == torch.bfloat16 and not model.training


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
    with pytest.raises(RuntimeError, match="is damaged .*train or download it again") as caught:
        load_pretrained(str(saved), torch.float32)
    assert "\n" not in str(caught.value)


def test_damaged_configuration_is_refused(saved):
    (saved / "config.json").write_text("{")
    with pytest.raises(RuntimeError, match="is damaged"):
        load_pretrained(str(saved), torch.float32)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        load_pretrained(str(tmp_path), torch.float32)


def test_a_hub_name_without_network_says_so():
    with pytest.raises(
        ConnectionError, match="cannot reach the Hugging Face Hub for the model 'EleutherAI/pythia-70m'"
    ):
        load_pretrained("EleutherAI/pythia-70m", torch.float32)


@pytest.mark.parametrize("length", [1, 2, 33])
def test_generated_cache_has_the_asked_length_even_if_the_model_would_stop(saved, length):
    model = load_pretrained(str(saved), torch.float32)
    model.generation_config.eos_token_id = list(range(50))
    measured = measure_generated_cache(model, length, batch_size=2)
    assert (measured.length, measured.filled) == (length, 2 * length * 2 * 12 * 4)
    assert model.generation_config.eos_token_id == list(range(50))
