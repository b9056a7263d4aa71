"""Files that appear whole: written under another name, then renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write `content`, JSON's types alone, to `path`; whoever reads it meanwhile finds the old file."""
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
