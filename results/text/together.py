"""One record of several run folders: `python together.py OUT RUN...`, the baseline's first. A record that is there can
be one of them. The report draws them together; every figure is of the runs' own metrics.json. A model that was trained
in another precision than the baseline has it in its name."""

import json
import sys
from pathlib import Path

# What candidates were called when they were trained (text/candidates.patch), and what the recipe text-s calls them.
TODAY = {
    "layer 9 20x2 43x3 tokens": "ids 8 20x2 43x3",
    "layer 9x2 20x4 tokens": "ids 8x2 20x4",
    "layer 136 tokens": "ids 136, whole cache",
}

out, *runs = map(Path, sys.argv[1:])
records = [json.loads((run / "metrics.json").read_text()) for run in runs]
for record in records:
    precision = record["recipe"]["train"]["precision"]
    for options, entry in zip(record["recipe"]["models"], record["models"], strict=True):
        entry |= {key: options.get(key) for key in ("context_layers", "layer_context_dims")}
        entry["cache_token_ids"] = options.get("cache_token_ids", False)
        if options["name"] in TODAY:
            first, *others = options["layer_context_dims"]
            entry |= {"cache_token_ids": True, "layer_context_dims": [first - 1, *others]}
            entry["name"] = options["name"] = TODAY[options["name"]]
        if precision != records[0]["recipe"]["train"]["precision"]:
            entry["name"] = options["name"] = f"{options['name']} ({precision})"
together = records[0]
together["models"] = [entry for record in records for entry in record["models"]]
together["recipe"]["models"] = [options for record in records for options in record["recipe"]["models"]]
out.mkdir(parents=True, exist_ok=True)
(out / "metrics.json").write_text(json.dumps(together, indent=2) + "\n")
provenance, *others = [json.loads((run / "provenance.json").read_text()) for run in runs]
provenance.setdefault("earlier", []).extend(call for other in others for call in (*other.pop("earlier", []), other))
(out / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
