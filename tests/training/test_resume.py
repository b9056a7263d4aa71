"""Phase 2's checkpoints: an interrupted run ends like one that was not; damaged or foreign ones are refused."""

import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from context_pythia.model import ContextPythiaConfig, ContextPythiaForCausalLM
from context_pythia.training import phase2
from context_pythia.training.optimization import Optimization
from tests.training.test_phase2 import (
    OPTIONS,
    assert_same_end,
    checkpoint,
    cut_at,
    fail_at,
    interrupt,
    make_data,
    make_model,
    stub_perplexities,
    train,
)


def test_a_checkpoint_is_the_state_and_the_best_weights(tmp_path, monkeypatch):
    kept = stub_perplexities(monkeypatch, [8.0, 9.0, 9.1, 9.2])
    options = replace(OPTIONS, epochs=4, patience=4, checkpoint_steps=1)
    cut_at(monkeypatch, 7, tmp_path, options, data=make_data(train=8, validation=2))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["state.pt"]
    assert checkpoint(tmp_path)["step"] == 7
    best = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(best.get_parameter(name), weight) for name, weight in kept[0].items())


def test_interrupted_and_resumed_ends_like_uninterrupted(tmp_path, monkeypatch, uninterrupted):
    """Amid the second epoch, in a folder that has moved."""
    cut_at(monkeypatch, 7, tmp_path / "here", replace(OPTIONS, checkpoint_steps=2))
    (tmp_path / "here").rename(tmp_path / "there")
    model = make_model()
    assert_same_end(train(tmp_path / "there", model=model), model, *uninterrupted)


def test_ctrl_c_and_sigterm_checkpoint_the_current_step(tmp_path, monkeypatch, uninterrupted):
    for number, step in ((signal.SIGINT, 2), (signal.SIGTERM, 4)):
        with monkeypatch.context() as patch:
            fail_at(patch, step, lambda optimization, number=number: os.kill(os.getpid(), number))
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path)
        state = checkpoint(tmp_path)
        # The last step of an epoch is evaluated before.
        assert (state["step"], len(state["history"])) == (step + 1, step // 4)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    model = make_model()
    assert_same_end(train(tmp_path, model=model), model, *uninterrupted)


def test_a_kill_between_the_best_weights_and_the_state_repeats_the_steps(tmp_path, monkeypatch, uninterrupted):
    write_state = phase2.write_state
    calls = []

    def killed_at_the_second(*arguments):
        calls.append(arguments)
        return write_state(*arguments) if len(calls) == 1 else interrupt(None)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(phase2, "write_state", killed_at_the_second)
        train(tmp_path)
    assert checkpoint(tmp_path)["step"] == 5
    model = make_model()
    assert_same_end(train(tmp_path, model=model), model, *uninterrupted)


def test_a_finished_run_is_loaded_and_not_trained_again(tmp_path, monkeypatch, uninterrupted):
    with monkeypatch.context() as patch:
        patch.setattr(phase2, "load_pretrained", lambda *arguments: interrupt(None))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    monkeypatch.setattr(Optimization, "backward", lambda *arguments: pytest.fail("trained again"))
    model = make_model()
    assert_same_end(train(tmp_path, model=model), model, *uninterrupted)
    assert not (tmp_path / "checkpoints").exists()
    # What an older version finished has no perplexities by position.
    record = json.loads((tmp_path / "train.json").read_text())
    del record["val_ppl_by_position"]
    (tmp_path / "train.json").write_text(json.dumps(record))
    old = train(tmp_path)
    assert old.val_ppl_by_position is None and old.best_val_ppl == uninterrupted[0].best_val_ppl
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match="the checkpoint in .* is damaged") as caught:
        train(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_is_one_clear_line(tmp_path, monkeypatch):
    options = replace(OPTIONS, epochs=1, checkpoint_steps=1)
    cut_at(monkeypatch, 2, tmp_path, options)
    path = tmp_path / "checkpoints" / "state.pt"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="state.pt is damaged.* delete ") as caught:
        train(tmp_path, options)
    assert "\n" not in str(caught.value)


def poison(optimization):
    with torch.no_grad():
        optimization.model.gpt_neox.final_layer_norm.weight.fill_(math.nan)


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    fail_at(monkeypatch, 7, poison)
    with pytest.raises(RuntimeError, match="training loss became nan at or before step 8.*learning_rate") as caught:
        train(tmp_path, replace(OPTIONS, checkpoint_steps=1))
    assert "\n" not in str(caught.value)
    state = checkpoint(tmp_path)
    assert state["step"] == 7 and all(weight.isfinite().all() for weight in state["model"].values())
    assert not (tmp_path / "train.json").exists()


def test_weights_that_are_not_finite_are_never_checkpointed(tmp_path, monkeypatch):
    update = Optimization.update

    def overflow(self):
        update(self)
        if self.schedule.last_epoch == 2:
            torch.nn.init.constant_(self.model.lm_head.weight, math.inf)

    monkeypatch.setattr(Optimization, "update", overflow)
    with pytest.raises(RuntimeError, match="weights became nan"):
        train(tmp_path, replace(OPTIONS, checkpoint_steps=1))
    assert checkpoint(tmp_path)["step"] == 1


def test_a_checkpoint_that_cannot_be_written_leaves_no_half(tmp_path, monkeypatch):
    def full_disk(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file\nlong trace")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="cannot write .*state.pt: PytorchStreamWriter failed") as caught:
        train(tmp_path)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_with_another_run_is_refused(tmp_path, monkeypatch, one_epoch, finished):
    options, folder = replace(OPTIONS, epochs=1), one_epoch[2]
    if not finished:
        folder = tmp_path
        cut_at(monkeypatch, 1, folder, replace(options, checkpoint_steps=1))
    other = make_data()
    other.summary["fingerprint"] = "other"
    for message, changed, settings in [
        ("learning_rate 0.003, not 0.1: choose another output folder", {"learning_rate": 0.1}, {}),
        ("seed 5, not 6", {}, {"seed": 6}),
        ("data abc, not other", {}, {"data": other}),
        ("config.layer_norm_eps", {}, {"model": make_model(layer_norm_eps=1e-6)}),
    ]:
        with pytest.raises(ValueError, match=message):
            train(folder, replace(options, **changed), **settings)


def test_context_models_train_and_load(tmp_path):
    settings = make_model().config.to_dict() | {"context_source": "shared", "context_dim": 16}
    torch.manual_seed(0)
    model = ContextPythiaForCausalLM(ContextPythiaConfig(**settings))
    model.gpt_neox.context_block.requires_grad_(False)
    first = model.gpt_neox.context_block.layers[0].dense.weight.clone()
    result = train(tmp_path, replace(OPTIONS, epochs=2, weight_decay=0.5), model=model)
    assert result.history[1]["train_loss"] < result.history[0]["train_loss"]
    assert torch.equal(model.gpt_neox.context_block.layers[0].dense.weight, first)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, saved.get_parameter(name)), name
