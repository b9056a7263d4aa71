"""python random_model.py SIZE TOKENIZER OUT: a GPT-NeoX of a size that `bench` knows, with random weights."""

import sys

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from context_pythia.bench.options import SIZES

size, tokenizer, out = sys.argv[1:]
shape = SIZES[size]
torch.manual_seed(0)
config = GPTNeoXConfig(
    vocab_size=shape.model_vocab_size,
    hidden_size=shape.hidden_size,
    num_hidden_layers=shape.num_hidden_layers,
    num_attention_heads=shape.num_attention_heads,
    intermediate_size=shape.intermediate_size,
)
GPTNeoXForCausalLM(config).save_pretrained(out, max_shard_size="500MB")
PreTrainedTokenizerFast(tokenizer_file=tokenizer, eos_token="<|endoftext|>").save_pretrained(out)
