"""The texts of reports. Each language has a YAML file with the same keys and placeholders.

Log lines, errors and the labels in pictures stay English, as the console prints them.
"""

from __future__ import annotations

import functools
from pathlib import Path

import yaml

FILES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
LANGUAGES = tuple(FILES)


class Texts:
    """The texts of one language. In a report of a `kind`, the text `kind_key` replaces `key` if there is one."""

    def __init__(self, lang: str = "en", kind: str = ""):
        self.kind = kind
        self.texts = _texts(lang)

    def __call__(self, key: str, **facts: object) -> str:
        text = self.texts.get(f"{self.kind}_{key}") or self.texts[key]
        return text.format(**facts) if facts else text


@functools.cache
def _texts(lang: str) -> dict[str, str]:
    return yaml.safe_load(FILES[lang].read_text(encoding="utf-8"))
