"""The Optuna study behind a sweep: trials are added once, taken by one worker at a time, and ended exactly once.

A trial is taken under a lock on a file of the sweep's folder, which the kernel lets go when the process dies: on one
machine a dead worker's trial is free at once. Workers elsewhere cannot see that lock, so a worker also renews a sign of
life in the storage; one that stays the same for `GRACE` seconds, by the clock of whoever looks, is a dead worker's.
Whatever goes wrong between them, the storage takes only the first end of a trial.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from context_pythia.errors import UsageError, first_line
from context_pythia.runs.record import without_password

if TYPE_CHECKING:
    from filelock import BaseFileLock
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial, TrialState

GRACE = 120.0  # seconds without a new sign of life after which a worker on another machine counts as dead
BEAT = 20.0
OPENINGS = 4
JOURNAL = "journal.log"
OBJECTIVES = ("best validation perplexity", "measured cache bytes")
# What the trials' user attributes are called.
SIGN, IDENTITY, SEED, RESULT, ERROR = "sign_of_life", "identity", "seed", "result", "error"
SURPLUS = "surplus"


def require_optuna() -> None:
    """Raise `ValueError` where the extra is not installed; else let Optuna print warnings alone."""
    if find_spec("optuna") is None:
        raise UsageError("sweep needs Optuna: pip install 'context-pythia[sweep]'")
    import optuna

    optuna.logging.set_verbosity(logging.WARNING)


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """The storage at an Optuna URL, or the journal in `folder`.

    Raises:
        ValueError: the storage cannot be opened.
    """
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend
    from sqlalchemy.exc import DBAPIError

    if url is None:
        path = str(folder / JOURNAL)
        return JournalStorage(JournalFileBackend(path, lock_obj=_journal_lock(path)))
    if url.startswith("redis"):
        raise UsageError("--storage redis: Optuna unpickles what it finds there; give a database, such as postgresql")
    # A server may have closed a connection while a training ran; SQLite's file may be locked by another worker.
    options: dict[str, Any] = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    for attempt in range(1, OPENINGS + 1):
        try:
            return RDBStorage(url, engine_kwargs=options)
        except Exception as error:  # whatever the database's driver raises
            # Two workers that make the tables of a new database at one moment get in each other's way once.
            if attempt == OPENINGS or not isinstance(error, DBAPIError):
                reason = first_line(error)
                raise UsageError(f"--storage {without_password(url)}: cannot be opened ({reason})") from None
        time.sleep(0.5)
    raise AssertionError


def _journal_lock(path: str) -> Any:
    """The lock of the journal. Optuna's own outlive a killed process, and are then broken after half a minute."""
    from filelock import FileLock
    from optuna.storages.journal import JournalFileOpenLock

    class JournalLock(JournalFileOpenLock):
        def __init__(self) -> None:
            self.lock = FileLock(f"{path}.flock")

        def acquire(self) -> bool:
            self.lock.acquire()
            _drop_torn_line(path)
            return True

        def release(self) -> None:
            self.lock.release()

    return JournalLock()


def _drop_torn_line(path: str) -> None:
    """Cut off what a process that was killed while it wrote left of its line: the next would make it unreadable."""
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        position = end
        while position:
            step = min(4096, position)
            file.seek(position - step)
            newline = file.read(step).rfind(b"\n")
            if newline >= 0:
                position += newline + 1 - step
                break
            position -= step
        if position < end:
            file.truncate(position)


class Queue:
    """The trials of one study, and which of them this process may work on.

    Args:
        name: the study's name in the storage; processes that give the same one share it.
        folder: of the sweep, where the locks are; processes that share it know at once of one another's end.
        limit: trials in all, if the sampler decides on them one after another; those beyond it are closed unrun.
    """

    def __init__(self, storage: BaseStorage, name: str, folder: Path, limit: int | None = None):
        import optuna
        from filelock import FileLock

        self.storage, self.limit = storage, limit
        self.locks = folder / ".locks"
        self.locks.mkdir(parents=True, exist_ok=True)
        self.exclusive: BaseFileLock = FileLock(self.locks / "folder.lock")
        self.place = _place(folder)
        self._seen: dict[int, tuple[Any, float]] = {}
        with self.exclusive:
            self.study: Study = optuna.create_study(
                storage=storage,
                study_name=name,
                directions=["minimize"] * len(OBJECTIVES),
                sampler=optuna.samplers.RandomSampler(),
                load_if_exists=True,
            )
            if not self.study.metric_names:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                    self.study.set_metric_names(list(OBJECTIVES))
        self._study_id = storage.get_study_id_from_name(name)

    def trials(self) -> list[FrozenTrial]:
        """The trials that count, in their order; those that two machines added twice at one moment count once."""
        return [trial for trial, counts in self._judged() if counts]

    def _judged(self) -> Iterator[tuple[FrozenTrial, bool]]:
        seen: set[str] = set()
        for trial in self.study.get_trials(deepcopy=False):
            identity = trial.user_attrs[IDENTITY]
            open_to_it = self.limit is None or len(seen) < self.limit
            # One that was closed unrun stays so: a larger limit adds its setting anew.
            counts = identity not in seen and open_to_it and not trial.user_attrs.get(SURPLUS)
            seen |= {identity} if counts else set()
            yield trial, counts

    def add(
        self, identity: str, seed: int, params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]
    ) -> None:
        """Add a trial, ready to be taken; within `exclusive`, after a look at what is there.

        Raises:
            ValueError: the study has the same parameters with other choices.
        """
        import optuna

        attributes = {IDENTITY: identity, SEED: seed}
        waiting = optuna.trial.create_trial(
            state=optuna.trial.TrialState.WAITING,
            params=dict(params),
            distributions=dict(distributions),
            user_attrs=attributes,
        )
        self.study.add_trial(waiting)

    def take(
        self, ready: Callable[[FrozenTrial, Mapping[str, TrialState]], bool] = lambda trial, states: True
    ) -> Claim | None:
        """The first `ready` trial that nobody works on, now this process's own; None where there is none.

        Args:
            ready: whether a trial can begin where the trials of these identities are in these states.
        """
        from optuna.trial import TrialState

        judged = list(self._judged())
        states = {trial.user_attrs[IDENTITY]: trial.state for trial, counts in judged if counts}
        for trial, counts in judged:
            if trial.state.is_finished() or (counts and not ready(trial, states)):
                continue
            claim = self._claim(trial)
            if claim is None:
                continue
            if counts:
                return claim
            with claim:
                claim.end(None, {SURPLUS: True}, TrialState.PRUNED)
        return None

    def _claim(self, trial: FrozenTrial) -> Claim | None:
        from filelock import FileLock, Timeout
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        lock = FileLock(self.locks / f"{trial.user_attrs[IDENTITY]}.lock")
        with contextlib.suppress(Timeout, UpdateFinishedTrialError), contextlib.ExitStack() as undo:
            lock.acquire(blocking=False)
            undo.callback(lock.release)
            # Only now, under the lock, what was read before is sure to hold.
            number = self.storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)
            held = self.storage.get_trial(number)
            claim = Claim(self, held, number, lock)
            if held.state == TrialState.WAITING:
                # Signed before it runs: a worker that is killed in between leaves no trial without an owner.
                claim.sign()
                if not self.storage.set_trial_state_values(number, TrialState.RUNNING):
                    return None
            elif held.state.is_finished() or not self._is_dead(held):
                return None
            claim.sign()
            undo.pop_all()
            return claim
        return None

    def _is_dead(self, trial: FrozenTrial) -> bool:
        """Whether nobody works on a running trial whose lock this process holds."""
        sign, now = trial.user_attrs.get(SIGN), time.monotonic()
        if sign is not None and sign["place"] == self.place:
            return True
        last, since = self._seen.get(trial.number, (None, now))
        if trial.number not in self._seen or last != sign:
            self._seen[trial.number], since = (sign, now), now
        return now - since > GRACE

    def unfinished(self) -> int:
        """How many trials have not ended, in the hands of other workers for the most part."""
        return sum(not trial.state.is_finished() for trial, _ in self._judged())


def _place(folder: Path) -> str:
    """What two processes share exactly if a lock on a file in `folder` holds between them: kernel and directory."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    kernel = boot.read_text().strip() if boot.exists() else f"{uuid.getnode():x}"
    where = folder.stat()
    return f"{kernel}:{where.st_dev:x}:{where.st_ino:x}"


class Claim:
    """A trial that this process works on, until it leaves the `with` block: then it has ended, or waits again."""

    def __init__(self, queue: Queue, trial: FrozenTrial, trial_id: int, lock: BaseFileLock):
        self.queue, self.trial, self.trial_id, self.lock = queue, trial, trial_id, lock
        self.token, self.beats, self.ended = uuid.uuid4().hex, 0, False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def sign(self) -> None:
        """Leave a new sign of life."""
        self.beats += 1
        sign = {"place": self.queue.place, "token": self.token, "beat": self.beats}
        self.queue.storage.set_trial_user_attr(self.trial_id, SIGN, sign)

    def _live(self) -> None:
        while not self._stop.wait(BEAT):
            # A storage that cannot be reached just now must not end the training; the next sign may get through.
            with contextlib.suppress(Exception):
                if self.queue.storage.get_trial(self.trial_id).user_attrs[SIGN]["token"] != self.token:
                    return
                self.sign()

    def end(self, values: Sequence[float] | None, attributes: Mapping[str, Any], state: Any = None) -> bool:
        """Record the end of the trial: its values, or that it has none because of its `state`, and further attributes.

        Returns False where another worker was first, whose word stands.
        """
        from optuna.exceptions import UpdateFinishedTrialError

        self.ended = True
        try:
            for key, value in attributes.items():
                self.queue.storage.set_trial_user_attr(self.trial_id, key, value)
            self.queue.study.tell(self.trial.number, values, state=state)
        except (UpdateFinishedTrialError, ValueError):
            # `tell` refuses with a ValueError what it finds finished; any other one is a mistake of ours.
            if not self.queue.storage.get_trial(self.trial_id).state.is_finished():
                raise
            return False
        return True

    def __enter__(self) -> Claim:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        self._stop.set()
        self._thread.join(BEAT)
        try:
            if not self.ended:
                with contextlib.suppress(UpdateFinishedTrialError):
                    self.queue.storage.set_trial_state_values(self.trial_id, TrialState.WAITING)
        finally:
            self.lock.release()
