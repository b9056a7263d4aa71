import json
from pathlib import Path

import pytest

from context_pythia.files import write_bytes, write_json


def test_json_is_written_whole_and_readable_by_people(tmp_path):
    write_json(tmp_path / "record.json", {"text": "文脈", "loss": 1.5})
    assert json.loads((tmp_path / "record.json").read_text(encoding="utf-8")) == {"text": "文脈", "loss": 1.5}
    assert "文脈" in (tmp_path / "record.json").read_text(encoding="utf-8")


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_bytes(path, b"old")
    with pytest.raises(TypeError):
        write_json(path, {"not of JSON": object()})

    def full_disk(path, _):
        path.touch()
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]
