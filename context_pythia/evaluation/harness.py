"""Tasks of lm-evaluation-harness, through its wrapper for transformers' models.

The harness is an optional extra (`context-pythia[harness]`). Own task files (YAML) are found in a folder; with local
data they need no network.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from context_pythia.config.options import suggestion
from context_pythia.errors import Failure, UsageError

BOOTSTRAPS = 1000  # resamplings for the standard errors that have no formula


def require_tasks(tasks: Sequence[str], tasks_path: Path | None = None) -> Any:
    """The harness's task manager, which has all of `tasks`.

    Args:
        tasks: names of tasks, groups or tags.
        tasks_path: folder with own task files.

    Raises:
        UsageError: the harness is not installed, or a task is unknown.
        FileNotFoundError: there is no such folder.
    """
    if find_spec("lm_eval") is None:
        raise UsageError("--tasks needs lm-evaluation-harness: pip install 'context-pythia[harness]'")
    if tasks_path is not None and not tasks_path.is_dir():
        raise FileNotFoundError(f"--tasks-path {tasks_path}: is not a folder")
    from lm_eval.tasks import TaskManager

    if tasks_path is not None:
        # The harness's own thousands of task files take seconds to find.
        manager = TaskManager(include_path=str(tasks_path), include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=None if tasks_path is None else str(tasks_path))
    known = manager.all_tasks
    for task in tasks:
        if task not in known:
            raise UsageError(f"task {task!r} is unknown{suggestion(task, known)}; give its file with --tasks-path")
    return manager


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[str],
    manager: Any,
    batch_size: int = 16,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Each task's figures by name, such as `acc` and `acc_stderr`.

    Args:
        manager: from `require_tasks`.
        limit: documents a task at most; all if None.

    Raises:
        Failure: a task could not be run (its data cannot be reached, for one).
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = simple_evaluate(
            wrapped,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
        )
    except Exception as error:  # whatever files, templates and functions of a task raise
        reason = f"{error}: {error.__cause__}" if error.__cause__ else str(error)
        raise Failure(shorten(f"tasks {', '.join(tasks)} failed: {reason}", 400, placeholder=" ...")) from error
    assert found is not None
    return {
        task: {name.removesuffix(",none"): value for name, value in figures.items() if isinstance(value, float)}
        for task, figures in found["results"].items()
    }
