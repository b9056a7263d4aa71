"""A model with token ids as the candidates trained it (text/candidates.patch) in the form of the package.

`python shipped_form.py TRAINED OUT`: the candidates had one map of the latent and one of the embedding, the package has
both in one matrix, and caches the id as digits.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

trained, out = map(Path, sys.argv[1:])
config = json.loads((trained / "config.json").read_text())
if not config.pop("token_values"):
    raise SystemExit(f"{trained}: has no token ids")
for name in ("balanced_init", "context_gate", "value_layers"):
    config.pop(name, None)
config["cache_token_ids"] = True
config["layer_context_dims"][0] -= 1  # the id, which the package counts apart
tensors, merged = load_file(trained / "model.safetensors"), {}
for i in range(config["num_hidden_layers"]):
    attention = f"gpt_neox.layers.{i}.attention."
    for up, token in (("key_up", "token_key"), ("value_up", "token_value")):
        maps = [tensors.pop(f"{attention}{name}.weight", None) for name in (up, token)]
        merged[f"{attention}{up}.weight"] = torch.cat([part for part in maps if part is not None], dim=1)
        for name in (up, token):
            if (bias := tensors.pop(f"{attention}{name}.bias", None)) is not None:
                merged[f"{attention}{up}.bias"] = bias
out.mkdir(parents=True, exist_ok=True)
save_file(merged | tensors, out / "model.safetensors", {"format": "pt"})
(out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
for path in trained.glob("*token*.json"):
    shutil.copy(path, out)
