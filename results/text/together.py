"""One record of several run folders: `python together.py OUT RUN...`, the baseline's first. A record that is there can
be one of them. The report draws them together; every figure is of the runs' own metrics.json."""

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
    for options, entry in zip(record["recipe"]["models"], record["models"], strict=True):
        entry |= {key: options.get(key) for key in ("context_layers", "layer_context_dims")}
        entry["cache_token_ids"] = options.get("cache_token_ids", False)
        if options["name"] in TODAY:
            first, *others = [json.loads((run / "provenance.json").read_text()) for run in runs]
first.setdefault("earlier", []).extend(call for other in others for call in (*other.pop("earlier", []), other))
(out / "provenance.json").write_text(json.dumps(first, indent=2) + "\n")
