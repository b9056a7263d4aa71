"""Tests for healing: its loss against a plain twin, what it trains, its steps, resumption, and its controls."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from context_pythia.config.recipe import HealOptions, TrainOptions
from context_pythia.conversion.heal import heal
from context_pythia.model import ContextPythiaConfig, ContextPythiaForCausalLM
from context_pythia.training.history import best_row
from context_pythia.training.phase2 import train_language_model
from tests.training.test_phase2 import (
    VOCABULARY,
    checkpoint,
    fail_at,
    interrupt,
    make_data,
    stub_perplexities,
)

OPTIONS = HealOptions(steps=7, batch_size=4, learning_rate=3e-3)  # 5 steps an epoch


def make_teacher(seed=0, **settings):
    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCABULARY + 24,  # rows beyond the tokenizer's
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPTNeoXForCausalLM(GPTNeoXConfig(**config | settings)).eval()


def make_student(teacher, seed=1):
    """The teacher with random factors in place of its keys and values."""
    torch.manual_seed(seed)
    config = ContextPythiaConfig(**{**teacher.config.to_dict(), "context_source": "layer", "context_dim": 24})
    student = ContextPythiaForCausalLM(config)
    student.load_state_dict(teacher.state_dict(), strict=False)
    return student.eval()


def run(folder, student, teacher, options=OPTIONS, *, data=None, seed=5):
    return heal(student, teacher, data or make_data(), options, seed=seed, folder=folder, progress=False)


def kept_step(result):
    return best_row(result.history)["step"]


def assert_same_weights(model, other):
    for (name, weight), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, expected), name


def plain_loss(logits, teacher_logits, labels, ce_weight):
    """The mean over the labeled tokens, from torch's own divergence and cross-entropy, in float64."""
    kept = labels != -100
    log_q, log_p = logits.double()[kept].log_softmax(-1), teacher_logits.double()[kept].log_softmax(-1)
    divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return (1 - ce_weight) * divergence + ce_weight * F.cross_entropy(logits.double()[kept], labels[kept])


def test_a_student_that_is_its_teacher_stays_so_to_the_bit(tmp_path):
    teacher = make_teacher(tie_word_embeddings=True)
    student = copy.deepcopy(teacher)
    result = run(tmp_path, student, teacher, replace(OPTIONS, parameters="all"))
    assert_same_weights(student, teacher)
    assert [row["train_loss"] for row in result.history] == [None, 0.0, 0.0]
    assert result.best_val_ppl == result.history[0]["val_ppl"]


@pytest.mark.parametrize(
    ("settings", "dtypes", "precision", "tolerance"),
    [
        ({"attention_bias": False, "use_parallel_residual": False}, (torch.float32, torch.float32), "float32", 1e-5),
        ({}, (torch.float32, torch.bfloat16), "float32", 1e-5),
        ({}, (torch.bfloat16, torch.float32), "float32", 1e-5),
        ({}, (torch.float32, torch.bfloat16), "bfloat16", 0.02),
    ],
)
def test_the_loss_of_a_step_is_the_plain_one(tmp_path, settings, dtypes, precision, tolerance):
    teacher = make_teacher(**settings)
    student, teacher = make_student(teacher).to(dtypes[0]), teacher.to(dtypes[1])
    data = make_data(train=4, validation=2)
    # As phase 2 computes short samples on a CPU: in bfloat16 the fused attention rounds otherwise.
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    with torch.no_grad():
        logits, expected = (model(data.train.tokens[:, :-1]).logits.flatten(0, 1) for model in (student, teacher))
    loss = plain_loss(logits, expected, data.train.tokens[:, 1:].flatten(), 0.25)
    options = replace(OPTIONS, steps=1, ce_weight=0.25, precision=precision)
    result = run(tmp_path, student, teacher, options, data=data)
    assert result.history[1]["train_loss"] == pytest.approx(loss.item(), rel=tolerance)
    assert (student.dtype, teacher.dtype) == dtypes


def divergence(student, teacher, samples):
    with torch.no_grad():
        logits, expected = (model(samples.tokens[:, :-1]).logits.flatten(0, 1) for model in (student, teacher))
    return plain_loss(logits, expected, samples.tokens[:, 1:].flatten(), 0.0).item()


def test_healing_draws_the_student_to_its_teacher(tmp_path):
    teacher = make_teacher()
    student = make_student(teacher)
    data = make_data()
    train_language_model(
        teacher, data, TrainOptions(epochs=4, learning_rate=3e-3), seed=0, folder=tmp_path / "teacher", name="teacher"
    )
    # The teacher's body, so that its attention is all that the student has to find.
    student.load_state_dict(teacher.state_dict(), strict=False)
    before = divergence(student, teacher, data.validation)
    result = run(tmp_path / "healed", student, teacher, replace(OPTIONS, steps=30, learning_rate=1e-2), data=data)
    losses = [row["train_loss"] for row in result.history[1:]]
    assert losses[-1] < 0.5 * losses[0]
    assert divergence(student, teacher, data.validation) < 0.5 * before
    assert result.best_val_ppl < result.history[0]["val_ppl"] and kept_step(result) == 30


def test_only_the_attention_s_factors_move(tmp_path):
    teacher = make_teacher()
    student = make_student(teacher)
    first = copy.deepcopy(student)
    options = replace(OPTIONS, steps=3, ce_weight=0.5, weight_decay=0.5)
    result = run(tmp_path, student, teacher, options)
    assert kept_step(result) == 3
    moved = {
        name.partition("attention.")[2]
        for (name, weight), old in zip(student.named_parameters(), first.parameters(), strict=True)
        if not torch.equal(weight, old)
    }
    assert moved == {f"{part}.weight" for part in ("query", "context", "key_up", "value_up")} | {
        f"{part}.bias" for part in ("query", "context", "value_up")
    }


def test_the_teacher_stays_as_it_is_and_enters_no_checkpoint(tmp_path, monkeypatch):
    teacher = make_teacher()
    student, first = make_student(teacher), copy.deepcopy(teacher)
    teacher.train()
    graphs = []
    teacher.gpt_neox.register_forward_hook(lambda *call: graphs.append(torch.is_grad_enabled()))
    with monkeypatch.context() as patch:
        fail_at(patch, 6, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, student, teacher)
    assert_same_weights(teacher, first)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not teacher.training and len(graphs) == 6 and not any(graphs)
    assert set(checkpoint(tmp_path)["model"]) == set(student.state_dict())


def test_it_validates_before_at_epochs_and_after_the_last_step(tmp_path):
    teacher = make_teacher()
    result = run(tmp_path, make_student(teacher), teacher)
    assert [(row["step"], row["epoch"]) for row in result.history] == [(0, 0), (5, 1), (7, 1.4)]
    assert result.best_val_ppl == min(row["val_ppl"] for row in result.history)


def test_the_last_weights_are_kept_unless_validation_got_worse(tmp_path, monkeypatch, capsys):
    weights = stub_perplexities(monkeypatch, [9.0, 7.0, 8.0])
    teacher = make_teacher()
    student = make_student(teacher)
    result = run(tmp_path, student, teacher, replace(OPTIONS, checkpoint_steps=1))
    assert (kept_step(result), result.best_val_ppl) == (5, 7.0)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in student.named_parameters():
        assert torch.equal(weight, weights[1][name]), name
        assert torch.equal(weight, saved.get_parameter(name)), name
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Step 0/7: val_ppl=9.00, val_acc=")
    assert lines[2].startswith("Step 7/7: train_loss=")
    assert lines[3:] == ["Done after step 7: best val_ppl=7.00 after step 5"]


def test_cross_entropy_alone_is_phase_2(tmp_path):
    """The control of healing: the original trained equally long."""
    models = [make_teacher(), make_teacher()]
    settings = {"batch_size": 4, "learning_rate": 1e-4, "weight_decay": 0.0}
    phase2 = train_language_model(
        models[0],
        make_data(),
        TrainOptions(epochs=2, schedule="constant", **settings),
        seed=5,
        folder=tmp_path / "phase2",
        name="phase 2",
    )
    options = HealOptions(steps=10, parameters="all", schedule="constant", warmup_ratio=0.0, **settings)
    alone = run(tmp_path / "alone", models[1], None, options)
    assert [row["train_loss"] for row in alone.history[1:]] == [row["train_loss"] for row in phase2.history]
    assert alone.best_val_ppl == phase2.best_val_ppl < alone.history[0]["val_ppl"]
    assert_same_weights(models[1], models[0])


def test_the_control_trains_the_same_part(tmp_path):
    student, teacher = make_teacher(), make_teacher()
    assert kept_step(run(tmp_path, student, teacher, replace(OPTIONS, ce_weight=0.5))) > 0
    moved = {
        name.partition("attention.")[2]
        for (name, weight), old in zip(student.named_parameters(), teacher.parameters(), strict=True)
        if not torch.equal(weight, old)
    }
    assert moved == {"query_key_value.weight", "query_key_value.bias"}


def test_a_folder_with_another_run_is_refused(tmp_path):
    teacher = make_teacher()
    run(tmp_path, make_student(teacher), teacher, replace(OPTIONS, steps=1))
    for options, message in [
        (replace(OPTIONS, steps=2), "steps 1, not 2"),
        (replace(OPTIONS, steps=1, ce_weight=0.5), "ce_weight 0.0, not 0.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(tmp_path, make_student(teacher), teacher, options)
