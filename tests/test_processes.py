"""Several processes: two that train one model, as `torchrun` starts them, and two that share a sweep.

They end like one, and an interruption, a failure or a kill of one of them loses nothing.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch

from context_pythia import processes
from context_pythia.cli.command_line import main
from context_pythia.config.recipe_files import save_recipe
from context_pythia.evaluation.pretrained import load_pretrained
from context_pythia.training import phase2
from context_pythia.training.optimization import Optimization
from context_pythia.training.phase2 import train_language_model
from tests.conftest import tiny_recipe
from tests.sweep import stand_in
from tests.training import test_phase1, test_phase2

# Its server imports all this once; each child is a fork of it. A fork of pytest itself could inherit a lock that no
# thread holds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "optuna", "sqlalchemy"])
SECONDS = 120  # of a machine that is busy
TRAINED = ("gpt_neox.embed_in.weight", "gpt_neox.layers.0.mlp.dense_h_to_4h.weight")
OPTIONS = replace(test_phase2.OPTIONS, epochs=2, batch_size=4, learning_rate=1e-3)


def child(folder, environment, function, arguments):
    os.environ |= environment
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{processes.index()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    # The server hears of no ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    sys.exit(function(*arguments))


def run_pair(folder, function, *arguments):
    """Runs `function` in two processes as `torchrun` would; gives their exit codes and what they wrote on stderr.

    As there, the store for them to meet is the launcher's, and one that fails takes the other with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pair = []
    for rank in ("0", "1"):
        environment = common | {"RANK": rank, "LOCAL_RANK": rank}
        pair.append(FORKS.Process(target=child, args=(folder, environment, function, arguments)))
        pair[-1].start()
    running = list(pair)
    while running:
        ended = multiprocessing.connection.wait([process.sentinel for process in running], timeout=SECONDS)
        failed = not ended or any(process.sentinel in ended and process.exitcode for process in running)
        running = [process for process in running if process.sentinel not in ended]
        if failed:
            for process in running:
                process.join(SECONDS if pair[0].exitcode == 130 or pair[1].exitcode == 130 else 2)
                process.kill()
    return [process.exitcode for process in pair], [(folder / f"err{rank}").read_text() for rank in (0, 1)]


def errors_said(errors):
    """The command's own lines of error, of both processes."""
    return [text for error in errors for text in error.splitlines() if text.startswith("context-pythia: error")]


def make_language_model():
    model = test_phase1.make_model(source="shared")
    model.resize_token_embeddings(test_phase2.VOCABULARY)
    test_phase2.without_dropout(model)  # Each process draws its own.
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def make_samples():
    """The last batch of 17 samples is a single one, that of 7 has an odd number."""
    return test_phase2.make_data(train=17, validation=7)


def train_phase2(folder, interrupt_at=None):
    if processes.count() > 1:  # elsewhere it would stay for the tests that follow
        phase2.LOOK_STEPS = 7  # the training has few
    model = make_language_model()
    if interrupt_at and processes.index() == 1:
        update = Optimization.update

        def interrupted(self):
            update(self)
            if self.schedule.last_epoch == interrupt_at:
                signal.raise_signal(signal.SIGINT)

        Optimization.update = interrupted
    try:
        with processes.joined():
            result = train_language_model(
                model, make_samples(), OPTIONS, seed=5, folder=folder, name="tiny", progress=False
            )
    except KeyboardInterrupt:
        return 130
    return result, model


def train_phase2_quietly(*arguments):
    ended = train_phase2(*arguments)
    return 0 if isinstance(ended, tuple) else ended


def assert_same_training(folder, expected, expected_model):
    result = json.loads((folder / "train.json").read_text())
    for row, other in zip(result["history"], expected.history, strict=True):
        assert {key: row[key] for key in ("epoch", "step", "best", "val_accuracy")} == {
            key: other[key] for key in ("epoch", "step", "best", "val_accuracy")
        }
        assert row["val_ppl"] == pytest.approx(other["val_ppl"], rel=1e-5)
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
    model = load_pretrained(str(folder), torch.float32)
    first = make_language_model()
    assert all((model.get_parameter(name) - first.get_parameter(name)).abs().max() > 1e-3 for name in TRAINED)
    for name, weight in expected_model.named_parameters():
        # Softmax takes no notice of the keys' bias: its gradient is rounding alone, which Adam scales up to a step.
        if name.endswith("query_key_value.bias") or name.endswith("key_up.bias"):
            continue
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=0, atol=1e-5)


def test_two_processes_train_like_one_and_after_ctrl_c_at_one_of_them_any_number_goes_on(tmp_path):
    expected = train_phase2(tmp_path / "one")
    codes, _ = run_pair(tmp_path, train_phase2_quietly, tmp_path / "run", 7)
    assert codes == [130, 130]
    assert test_phase2.checkpoint(tmp_path / "run")["step"] == 7
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    codes, _ = run_pair(tmp_path, train_phase2_quietly, tmp_path / "run")
    assert codes == [0, 0]
    assert_same_training(tmp_path / "run", *expected)
    train_phase2(tmp_path / "copy")
    assert_same_training(tmp_path / "copy", *expected)


def command(tmp_path, *flags):
    recipe = tmp_path / "tiny.yaml"
    if not recipe.exists():
        save_recipe(tiny_recipe(tmp_path), recipe)
    return [*flags[:1], str(recipe), *flags[1:], "--out", str(tmp_path / "run")]


def test_two_processes_train_both_phases_like_one_and_print_once(tmp_path, own_cache):
    arguments = command(tmp_path, "train", "--model", "shared", "--batch-size", "6")
    codes, errors = run_pair(tmp_path, main, arguments)
    assert codes == [0, 0], errors
    lines, others = ((tmp_path / f"out{rank}").read_text().splitlines() for rank in (0, 1))
    assert [line.split()[0] for line in lines if line] == ["shared:", "shared:", "Epoch", "Epoch", "Done", "shared:"]
    assert not others
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["processes"] == 2
    assert main([*arguments[:-1], str(tmp_path / "one")]) == 0
    pair = [json.loads((tmp_path / name / "metrics.json").read_text())["models"] for name in ("run", "one")]
    (entry,), (expected,) = pair
    assert (entry["machine"]["processes"], expected["machine"]["processes"]) == (2, 1)
    assert entry["best_val_ppl"] == pytest.approx(expected["best_val_ppl"], rel=1e-5)
    histories = [[(row["loss"], row["convergence_rate"]) for row in one["phase1"]["history"]] for (one,) in pair]
    assert histories[0] == histories[1] and len(histories[0]) > 1  # the first process iterates alone


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("train", "--model", "Pythia"), "train.batch_size 9: must be a multiple of 2, the number of processes"),
        (("info",), "this command runs in one process, but 2 were started; compare, phase1, train run in several"),
    ],
)
def test_a_mistake_is_one_line_of_one_process(tmp_path, own_cache, flags, line):
    arguments = ["info", "gone"] if flags == ("info",) else command(tmp_path, *flags)
    codes, errors = run_pair(tmp_path, main, arguments)
    assert 2 in codes
    said = errors_said(errors)
    assert len(said) == 1 and line in said[0], errors


def fail_alone(folder):
    with processes.joined():
        if processes.index() == 1:
            raise RuntimeError("out of memory")
        processes.wait()


def main_of_a_failure(folder):
    try:
        fail_alone(folder)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1


def test_a_process_that_fails_alone_says_so_and_the_other_does_not_hang(tmp_path):
    codes, errors = run_pair(tmp_path, main_of_a_failure, tmp_path)
    assert codes[1] == 1 and codes[0] != 0
    assert [error.splitlines() for error in errors] == [[], ["out of memory"]]


def test_a_single_process_waits_for_nobody():
    with processes.joined(), processes.main_first():
        processes.wait()
    values = torch.tensor([3.0])
    assert processes.total(values).item() == 3 and processes.highest(2) == 2


GRID = {"over": ["learning_rate=1e-3,1.5e-3,2e-3"], "seeds": (0, 1)}
TPE = {"over": ["learning_rate=1e-3..2e-3"], "sampler": "tpe", "trials": 4}


@pytest.mark.parametrize(("asked", "times", "kills"), [(GRID, 3, 20), (TPE, 2, 6)], ids=["grid", "tpe"])
def test_each_setting_of_a_sweep_is_trained_once_to_its_end_though_workers_are_killed(tmp_path, asked, times, kills):
    """`times` trainings of each model and seed by two workers, one of which is killed at a random moment."""
    out, dice = tmp_path / "a b?{c}", random.Random(0)

    def start():
        process = FORKS.Process(target=stand_in.work, args=(out, 0.01), kwargs=asked)
        process.start()
        return process

    workers = [start(), start()]
    while not list(out.glob("trials/*/steps")):
        time.sleep(0.01)
    for kill in range(kills):
        time.sleep(dice.uniform(0, 0.3))
        workers[kill % 2].kill()
        workers[kill % 2].join()
        workers[kill % 2] = start()
    for process in workers:
        process.join()
        assert process.exitcode == 0
    trials = json.loads((out / "metrics.json").read_text())["trials"]
    assert {trial["state"] for trial in trials} == {"complete"}
    assert Counter((trial["model"], trial["seed"]) for trial in trials) == {
        (model, seed): times for model in ("Pythia", "layer") for seed in asked.get("seeds", (0,))
    }
    # A training goes on where a kill left it: two at once, or one begun again, would repeat a step.
    for trial in trials:
        assert (out / "trials" / trial["folder"] / "steps").read_text().split() == [str(i) for i in range(10)]
    assert not list(out.glob("trials/*/twice"))
