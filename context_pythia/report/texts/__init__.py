"""The texts of reports. Each language has a YAML file with the same keys and placeholders.

Log lines, errors and the labels in pictures stay English, as the console prints them.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from context_pythia.errors import UsageError

LANGUAGES = tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.yaml")))


class Texts:
    """The texts of one language for one kind of report.

    Args:
        kind: the text `kind_key` replaces `key` if there is one.

    Raises:
        UsageError: the language is unknown.
    """

    def __init__(self, lang: str = "en", kind: str = ""):
        if lang not in LANGUAGES:
            raise UsageError(f"unknown report language {lang!r}: choose one of {', '.join(LANGUAGES)}")
        self.kind = kind
        self.texts: dict[str, str] = yaml.safe_load(
            Path(__file__).with_name(f"{lang}.yaml").read_text(encoding="utf-8")
        )

    def __call__(self, key: str, **facts: object) -> str:
        text = self.texts.get(f"{self.kind}_{key}") or self.texts[key]
        return text.format(**facts) if facts else text
