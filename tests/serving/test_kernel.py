"""vLLM's Triton kernel for decoding, as we call it on a GPU, against the plain form. Here Triton interprets it."""

import os
import subprocess
import sys

# vLLM switches Triton off where there is no GPU: the kernel's module gets it by hand, in a process of its own.
SCRIPT = """
import sys, types, triton, torch
from types import SimpleNamespace
from torch.nn.functional import scaled_dot_product_attention
stand_in = types.ModuleType("vllm.triton_utils")
stand_in.triton, stand_in.tl, stand_in.HAS_TRITON = triton, triton.language, True
stand_in.LOG2E, stand_in.tldevice = 1.4426950408889634, None
sys.modules[stand_in.__name__] = stand_in
from context_pythia.serving.attention import Paged, decode_by_kernel

torch.manual_seed(0)
for width, heads in ((23, 4), (272, 8)):
    cache, query = torch.randn(9, 1, 16, width), torch.randn(2, 1, heads, width)
    lengths = torch.tensor([33, 1])
    blocks = torch.tensor([[3, 1, 7, 0], [2, 0, 0, 0]], dtype=torch.int32)
    paged = Paged(SimpleNamespace(kv_cache=cache), SimpleNamespace(blocks=blocks, lengths=lengths))
    found = decode_by_kernel(query, paged, 0.2)
    for i, length in enumerate(lengths):
        contexts = cache[blocks[i], 0].view(1, -1, width)[:, :length]
        expected = scaled_dot_product_attention(query[i], contexts, contexts, scale=0.2)
        torch.testing.assert_close(found[i, :, 0], expected[0], atol=1e-5, rtol=1e-5)
    print("equal", width)
"""


def test_it_equals_the_plain_form():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert run.stdout.split("\n")[-3:] == ["equal 23", "equal 272", ""], run.stderr
