import re

import pytest
from transformers import AutoTokenizer

from context_pythia import ContextPythiaForCausalLM
from context_pythia.runs.generate import generate


@pytest.mark.parametrize("name, numbers", [("pythia", 128), ("input", 128), ("shared", 16), ("layer-12-x2", 12)])
def test_stats_show_the_cache_that_was_filled(finished_run, capsys, name, numbers):
    generate(str(finished_run / "models" / name), "the cache of a model", max_new_tokens=9, stats=True)
    text, stats = capsys.readouterr().out.split("\n\n")[-2:]
    assert text.startswith("the cache of a model")
    prompt, new = map(int, re.search(r"(\d+) prompt tokens and (\d+) new ones", stats).groups())
    assert f"cache: {prompt + new - 1} tokens x {numbers} numbers" in stats
    state = 12 if name == "input" else 0
    assert f"{((prompt + new - 1) * numbers + state) * 4 / 1024:,.1f} KB measured" in stats


def test_sampling_depends_on_the_seed_alone(finished_run, capsys):
    def sample(seed: int) -> str:
        generate(str(finished_run / "models" / "shared"), "the", 20, temperature=1.5, seed=seed)
        return capsys.readouterr().out

    assert sample(1) == sample(1) != sample(2)


def test_beams_write_text(finished_run, capsys):
    generate(str(finished_run / "models" / "layer-12-x2"), "the cache", 8, num_beams=3, stats=True)
    assert "x 3 beams" in capsys.readouterr().out


def test_prompts_that_cannot_be_are_refused(finished_run):
    model = str(finished_run / "models" / "shared")
    with pytest.raises(ValueError, match="--prompt is empty"):
        generate(model, "")
    with pytest.raises(ValueError, match="more than the model's 64 positions"):
        generate(model, "the cache", max_new_tokens=64)
    with pytest.raises(ValueError, match="--top-k 3: needs a --temperature above 0"):
        generate(model, "the cache", top_k=3)


def test_a_tokenizer_of_another_model_is_refused_by_its_first_unknown_token(finished_run, tmp_path):
    model = ContextPythiaForCausalLM.from_pretrained(finished_run / "models" / "shared")
    model.resize_token_embeddings(260, mean_resizing=False)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(finished_run / "models" / "shared").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="but the model has 260 tokens"):
        generate(str(tmp_path), "def the cache of a model return", 1)
