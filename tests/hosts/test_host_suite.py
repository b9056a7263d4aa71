"""transformers' own tests of a model, on ours as it runs them on GPT-NeoX.

Nothing may fail here that GPT-NeoX passes: leave out the `del` of its class below to see what it passes.
"""

import contextlib
import unittest

import pytest
import torch
from transformers.models.auto import modeling_auto
from transformers.models.gpt_neox import modeling_gpt_neox as host

from context_pythia import model as ours

from .source import FOLDER, GenerationTesterMixin, host_module

if not FOLDER.is_dir():
    pytest.skip(f"{FOLDER} is not there: `make test-hosts` unpacks it", allow_module_level=True)

common = host_module("test_modeling_common")

pytestmark = pytest.mark.filterwarnings("default")  # what the host's tests warn of is theirs
# The classes of a family, and the host's tables that say what they are for: its tests choose labels by them.
KINDS = {
    "Model": modeling_auto.MODEL_MAPPING_NAMES,
    "ForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "ForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "ForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "ForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}


@pytest.fixture(scope="module", autouse=True)
def in_the_hosts_tables():
    with pytest.MonkeyPatch.context() as patch:
        for kind, table in KINDS.items():
            patch.setitem(table, "context_pythia", f"ContextPythia{kind}")
        yield


class ModelTester:
    """A tiny model and its inputs, with the names that the host's tests read."""

    batch_size, seq_length, is_training = 5, 7, True
    vocab_size, num_hidden_layers, num_attention_heads, hidden_size = 99, 2, 4, 64

    def __init__(self, test: common.ModelTesterMixin):
        self.config_class, self.options = test.all_model_classes[0].config_class, test.options

    def get_config(self):
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **self.options,
        )

    def prepare_config_and_inputs_for_common(self):
        ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


class GPTNeoXTest(common.ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = tuple(getattr(host, f"GPTNeoX{kind}") for kind in KINDS)
    options: dict = {}
    model_tester = None

    def setUp(self):
        self.model_tester = ModelTester(self)

    @contextlib.contextmanager
    def subTest(self, *args, **kwargs):
        yield  # a report of each of a thousand parameters takes longer than their tests


class LayerTest(GPTNeoXTest):
    all_model_classes = tuple(getattr(ours, f"ContextPythia{kind}") for kind in KINDS)
    options = dict(context_dim=20)


class BodyTest(LayerTest):
    """The heads were tested above: here are the body and the head that generates."""

    all_model_classes = LayerTest.all_model_classes[:2]
    test_bc_torch_dtype = None  # an old name of an argument of `from_pretrained`, which takes seconds to test


class SharedLayersTest(BodyTest):
    options = dict(context_dim=20, context_layers=[0, 0], layer_context_dims=[20, 0])


class TokenIdsTest(BodyTest):
    options = dict(context_dim=20, context_layers=[0, 1], layer_context_dims=[4, 20], cache_token_ids=True)

    def setUp(self):
        super().setUp()
        if "inputs_embeds" in self._testMethodName:
            self.skipTest("embeddings without token ids are refused")


class ConvertedTest(BodyTest):
    options = dict(
        context_dim=20,
        rotary_pairs=[[2, 1], [1, 2]],
        layer_context_dims=[24, 16],
        reuse_rotary_keys=True,
        context_bias=True,
    )


class SharedTest(BodyTest):
    options = dict(context_source="shared", context_dim=20)


class InputTest(BodyTest):
    options = dict(context_source="input", context_dim=20)


del BodyTest, GPTNeoXTest
