"""What a record says of a call, and what it never says."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from context_pythia.runs import provenance as module
from context_pythia.runs.provenance import provenance, without_password


@pytest.mark.parametrize(
    ("text", "recorded"),
    [
        ("postgresql://user:pass@host/db", "postgresql://user:***@host/db"),
        (
            "--storage=postgresql+psycopg://user:p:a@s/s@host:5432/db",
            "--storage=postgresql+psycopg://user:***@host:5432/db",
        ),
        ("https://hf_token@host/x", "https://***@host/x"),
        ("mysql://host/db?user=me&password=secret&ssl=1", "mysql://host/db?user=me&password=***&ssl=1"),
        ("sqlite:///runs/s.db", "sqlite:///runs/s.db"),
        ("EleutherAI/pythia-70m@step3000", "EleutherAI/pythia-70m@step3000"),
    ],
)
def test_passwords_are_left_out(text, recorded):
    assert without_password(text) == recorded


@pytest.mark.parametrize("program", ["/env/bin/context-pythia", "/env/site-packages/context_pythia/__main__.py"])
def test_the_command_is_recorded_as_it_is_installed_without_passwords(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "sweep", "--storage", "postgresql://user:pass@host/db"])
    found = provenance(torch.device("cpu"))
    assert found["command"] == "context-pythia sweep --storage 'postgresql://user:***@host/db'"
    assert "pass@" not in str(found)


def test_the_commit_is_that_of_our_own_repository_alone(tmp_path, monkeypatch):
    file = tmp_path / "environment" / "provenance.py"
    file.parent.mkdir()
    shutil.copyfile(module.__file__, file)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(module, "__file__", str(file))
    assert provenance(torch.device("cpu"))["commit"] is None
    subprocess.run([*git, "add", str(file)], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert provenance(torch.device("cpu"))["commit"] == head
    assert Path(module.__file__) == file
