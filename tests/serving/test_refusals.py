"""What cannot be served says so in one line."""

import json
import logging

import pytest
from safetensors.torch import load_file, save_file

import context_pythia.serving as serving
from tests.serving.engines import LENGTH, MODELS, build, engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build(MODELS["layer"]).save_pretrained(folder)
    return folder


def start(folder, **options):
    with engine(folder, **options):
        pass


@pytest.mark.parametrize("settings", [dict(context_source="input", context_dim=20), dict(context_source="grouped")])
def test_sources_that_cache_keys_and_values(settings, tmp_path):
    build(settings).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=f"context_source '{settings['context_source']}': .* only layer and shared can"
    ):
        start(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop("gpt_neox.layers.1.attention.value_up.bias"), "value_up.bias is missing"),
        (
            lambda found: found.update(stray=found["gpt_neox.final_layer_norm.bias"].clone()),
            "stray in the .* does not belong",
        ),
    ],
    ids=["missing", "left over"],
)
def test_a_checkpoint_whose_tensors_are_not_those_of_its_config(change, message, folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        start(tmp_path)


def test_a_checkpoint_of_another_width_than_its_config(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"context_dim": 24}))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.context\.(weight|bias) \[23.*does not fit its config"):
        start(tmp_path)


def test_more_tokens_than_the_model_was_trained_on(folder):
    with pytest.raises(ValueError, match=rf"max_model_len \({LENGTH + 1}\) is greater than"):
        start(folder, max_model_len=LENGTH + 1)


def test_a_cache_in_another_dtype(folder):
    with pytest.raises(ValueError, match="kv_cache_dtype 'fp8': .* leave it at auto"):
        start(folder, kv_cache_dtype="fp8")


def test_an_older_vllm(monkeypatch, caplog):
    monkeypatch.setattr(serving, "vllm_version", lambda: "0.31.4")
    with caplog.at_level(logging.ERROR, "vllm"):
        logging.getLogger("vllm").addHandler(caplog.handler)
        serving.register()
        logging.getLogger("vllm").removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records] == [
        "Context-Pythia needs vLLM 0.32 or newer, this is 0.31.4: its models cannot be served"
    ]


def test_a_model_that_caches_token_ids(tmp_path):
    build(MODELS["layer"] | dict(cache_token_ids=True)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cache_token_ids: a model that caches token ids cannot be served"):
        start(tmp_path)
