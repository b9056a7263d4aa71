"""lm-evaluation-harness on a task file and data of one's own, without a network."""

import json

import pytest
import torch

from context_pythia.data.tokenizers import train_tokenizer, vocabulary_rows
from context_pythia.errors import Failure
from context_pythia.evaluation import harness
from context_pythia.evaluation.harness import require_tasks, run_tasks
from tests.evaluation.conftest import build

needs_harness = pytest.mark.usefixtures("installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own
TEXT = "the cache of a model holds keys and values for each token that it has seen"
WORDS = TEXT.split()


@pytest.fixture
def installed():
    pytest.importorskip("lm_eval")


@pytest.fixture
def tasks_path(tmp_path):
    documents = [
        {"question": f"{WORDS[i]} {WORDS[i + 1]}", "choices": WORDS[i : i + 3], "answer": i % 3} for i in range(9)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "own.yaml").write_text(
        f"""
task: own_words
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""
    )
    return tmp_path


@needs_harness
def test_a_task_of_ones_own_gives_the_accuracy_of_the_likeliest_choices(tasks_path):
    tokenizer = train_tokenizer([TEXT] * 3, 270, progress=False)
    model = build("layer", vocab_size=vocabulary_rows(tokenizer))
    right = 0
    for i in range(9):
        losses = []
        for choice in WORDS[i : i + 3]:
            ids = tokenizer(f"{WORDS[i]} {WORDS[i + 1]}")["input_ids"]
            answer = tokenizer(f" {choice}")["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([ids + answer])).logits.log_softmax(-1)
            losses.append(sum(float(logits[0, len(ids) + k - 1, token]) for k, token in enumerate(answer)))
        right += losses.index(max(losses)) == i % 3
    found = run_tasks(model, tokenizer, ["own_words"], require_tasks(["own_words"], tasks_path), batch_size=4)
    assert found["own_words"]["acc"] == pytest.approx(right / 9)
    assert set(found["own_words"]) == {"acc", "acc_stderr"}


@needs_harness
def test_an_unknown_task_is_named(tasks_path, monkeypatch):
    import lm_eval.tasks

    # Without the harness's own thousands of tasks, which take seconds to find.
    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", lambda include_path, include_defaults=True: manager(None, include_path, False)
    )
    with pytest.raises(ValueError, match=r"task 'own_word' is unknown \(did you mean own_words\?\)"):
        require_tasks(["own_word"], tasks_path)


@needs_harness
def test_half_a_surrogate_pair_in_a_tasks_data_is_one_line_with_its_row(tasks_path):
    with (tasks_path / "data.jsonl").open("a") as file:
        file.write('\n{"question": "half \\ud83d", "choices": ["a", "b", "c"], "answer": 1}')
    tokenizer = train_tokenizer([TEXT], 270, progress=False)
    model = build("pythia", vocab_size=vocabulary_rows(tokenizer))
    said = "tasks own_words failed: .*surrogate pair in string is invalid. in row 9"
    with pytest.raises(Failure, match=said) as caught:
        run_tasks(model, tokenizer, ["own_words"], require_tasks(["own_words"], tasks_path))
    assert "\n" not in str(caught.value)


@needs_harness
def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--tasks-path .*nowhere: is not a folder"):
        require_tasks(["own_words"], tmp_path / "nowhere")


def test_a_missing_harness_is_named_with_the_mend(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'context-pythia\[harness\]'"):
        require_tasks(["own_words"])
