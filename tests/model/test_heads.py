"""Heads for classification and question answering: the host's, on our body."""

import pytest
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPTNeoXConfig,
)
from transformers.models.gpt_neox import modeling_gpt_neox as host

from context_pythia.model import ContextPythiaConfig

from .conftest import SIZE, SOURCES, randomise

HEADS = {
    AutoModelForSequenceClassification: dict(labels=torch.tensor([2, 0, 1])),
    AutoModelForTokenClassification: dict(labels=torch.arange(51).view(3, 17) % 3),
    AutoModelForQuestionAnswering: dict(
        start_positions=torch.tensor([1, 4, 9]), end_positions=torch.tensor([3, 4, 16])
    ),
}


def build_head(auto_class, source: str):
    config = ContextPythiaConfig(**SIZE, **SOURCES[source], num_labels=3)
    return randomise(auto_class.from_config(config))


@pytest.mark.parametrize("auto_class", HEADS, ids=lambda auto_class: auto_class.__name__)
@pytest.mark.parametrize("source", ["shared, 2 block layers", "layer, rotary pairs"])
@torch.no_grad()
def test_head_is_the_hosts_on_the_same_body(auto_class, source, ids, tmp_path):
    model = build_head(auto_class, source)
    assert type(model).__name__ == auto_class.__name__.replace("AutoModel", "ContextPythia")
    twin = getattr(host, auto_class.__name__.replace("AutoModel", "GPTNeoX"))(GPTNeoXConfig(**SIZE, num_labels=3))
    twin.eval().gpt_neox = model.gpt_neox
    _, wrong = twin.load_state_dict(model.state_dict(), strict=True)
    assert not wrong
    got, expected = (each(ids, **HEADS[auto_class]).to_tuple() for each in (model, twin))
    assert len(got) == len(expected) >= 2 and got[0].isfinite()
    for ours, its in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, its, rtol=0, atol=0)

    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids)[0], got[1], rtol=0, atol=0)


@torch.no_grad()
def test_padding_on_either_side_leaves_the_class_of_a_text(source, ids):
    model = build_head(AutoModelForSequenceClassification, source)
    alone = model(ids[:1, :9]).logits
    for left, right in ((8, 0), (0, 8), (3, 5)):
        row = torch.nn.functional.pad(ids[:1, :9], (left, right), value=SIZE["pad_token_id"])
        mask = (row != SIZE["pad_token_id"]).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        together = model(torch.cat([row, ids[1:2]]), torch.cat([mask, torch.ones_like(mask)]),
                         torch.cat([positions, torch.arange(17).view(1, -1)])).logits  # fmt: skip
        torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5)
