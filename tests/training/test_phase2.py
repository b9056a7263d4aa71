"""Tests for phase 2: metrics against a hand computation, early stop, schedules, resumption, and what goes wrong."""

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from context_pythia.config.recipe import HealOptions, TrainOptions
from context_pythia.training import optimization, phase2
from context_pythia.training.batches import step_batches
from context_pythia.training.history import Plan
from context_pythia.training.optimization import Optimization
from context_pythia.training.phase2 import train_language_model

VOCABULARY, LENGTH = 200, 20
OPTIONS = TrainOptions(epochs=3, batch_size=4, learning_rate=3e-3, patience=3)


class Samples(torch.utils.data.Dataset):
    """Rows in which each token decides the next: something to learn."""

    sequence_length = LENGTH

    def __init__(self, rows: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        tokens = [torch.randint(0, VOCABULARY, (rows,), generator=generator)]
        for _ in range(LENGTH):
            tokens.append((tokens[-1] * 3 + 1) % 17)
        self.tokens = torch.stack(tokens, dim=1)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index, :-1], "labels": self.tokens[index, 1:]}


def make_data(train: int = 18, validation: int = 7):
    words = Tokenizer(WordLevel({str(word): word for word in range(VOCABULARY)}, unk_token="0"))
    return SimpleNamespace(
        train=Samples(train, seed=1),
        validation=Samples(validation, seed=2),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words),
        summary={"fingerprint": "abc"},
    )


def make_model(**settings):
    torch.manual_seed(0)
    # Dropout, so that a resumed run that lost its random state would end elsewhere.
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout=0.1,
        bos_token_id=0,
        eos_token_id=0,
        **settings,
    )
    return GPTNeoXForCausalLM(config)


def train(folder, options=OPTIONS, *, model=None, data=None, seed=5):
    model = make_model() if model is None else model
    data = make_data() if data is None else data
    return train_language_model(model, data, options, seed=seed, folder=folder, name="tiny", progress=False)


def without_seconds(result):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in result.history]


def assert_same_end(result, model, other_result, other_model):
    assert without_seconds(result) == without_seconds(other_result)
    assert result.best_epoch == other_result.best_epoch
    assert result.val_ppl_by_position == other_result.val_ppl_by_position
    for (name, weight), other in zip(model.named_parameters(), other_model.parameters(), strict=True):
        assert torch.equal(weight, other), name


def fail_at(monkeypatch, step, action):
    """Calls `action` before the training step after `step` optimizer steps."""
    original = Optimization.backward

    def backward_or_fail(self, batches):
        if self.schedule.last_epoch == step:
            action(self)
        return original(self, batches)

    monkeypatch.setattr(Optimization, "backward", backward_or_fail)


def interrupt(optimization):
    raise KeyboardInterrupt


def cut_at(monkeypatch, step, folder, options, **settings):
    """A training that is killed before the step after `step` optimizer steps."""
    with monkeypatch.context() as patch:
        fail_at(patch, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(folder, options, **settings)


def checkpoint(folder):
    return torch.load(folder / "checkpoints" / "state.pt", weights_only=True)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def hand_computed(model, samples):
    """Mean next-token loss and accuracy from all logits, in float64."""
    rows = samples.tokens
    with torch.no_grad():
        log_probabilities = model.eval()(rows[:, :-1]).logits.double().log_softmax(-1)
    targets = rows[:, 1:]
    losses = -log_probabilities.gather(-1, targets[..., None])
    hits = log_probabilities.argmax(-1) == targets
    return losses.mean().item(), hits.sum().item() / hits.numel()


def test_perplexity_and_accuracy_are_those_of_all_validation_tokens(uninterrupted):
    result, model = uninterrupted
    loss, accuracy = hand_computed(model, make_data().validation)
    assert result.best_val_ppl == pytest.approx(math.exp(loss), rel=1e-5)
    assert result.val_accuracy == accuracy
    assert 0 < accuracy < 1


def bands_from_full_logits(model, samples):
    """The perplexities at positions 0 to 16 and from there on, in float64."""
    with torch.no_grad():
        log_probabilities = model.eval()(samples.tokens[:, :-1]).logits.double().log_softmax(-1)
    losses = -log_probabilities.gather(-1, samples.tokens[:, 1:, None])[..., 0]
    return [float(losses[:, band].mean().exp()) for band in (slice(0, 16), slice(16, LENGTH))]


def test_perplexities_by_position_are_those_of_full_logits_and_add_up(uninterrupted):
    result, model = uninterrupted
    bands = result.val_ppl_by_position
    assert [(band["from"], band["to"], band["tokens"]) for band in bands] == [(0, 16, 7 * 16), (16, LENGTH, 7 * 4)]
    perplexities = [band["perplexity"] for band in bands]
    assert perplexities == pytest.approx(bands_from_full_logits(model, make_data().validation), rel=1e-6)
    mean = sum(band["tokens"] * math.log(band["perplexity"]) for band in bands) / (7 * LENGTH)
    assert mean == pytest.approx(math.log(result.best_val_ppl), abs=1e-6)


def test_tokens_without_a_label_count_at_no_position(uninterrupted):
    _, model = uninterrupted
    rows = make_data().validation.tokens
    batch = {"input_ids": rows[:, :-1], "labels": rows[:, 1:].clone()}
    batch["labels"][:, [0, 18, 19]] = -100
    by_position = Optimization(model, OPTIONS, 1).validate([batch])
    with torch.no_grad():
        logits = model.eval()(rows[:, :-1]).logits.double()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    counted = torch.tensor([0, *[1] * 17, 0, 0])
    torch.testing.assert_close(by_position[0], losses.sum(0) * counted, rtol=1e-5, atol=0)
    assert by_position[1].tolist() == ((logits.argmax(-1) == rows[:, 1:]).sum(0) * counted).tolist()
    assert by_position[2].tolist() == (7 * counted).tolist()


def test_validation_runs_once_over_each_batch_and_never_computes_all_its_logits(one_epoch):
    *_, calls = one_epoch
    assert [shape for training, _, shape in calls if not training] == [(4, 1, VOCABULARY), (3, 1, VOCABULARY)]


def test_short_samples_train_with_the_faster_attention_and_the_model_keeps_its_own(tmp_path, monkeypatch, one_epoch):
    result, model, _, calls = one_epoch
    assert {attention for _, attention, _ in calls} == {"eager"} and model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(optimization, "EAGER_ATTENTION_LENGTH", LENGTH - 1)
    other, seen = make_model(), set()
    other.register_forward_hook(lambda module, *_: seen.add(module.config._attn_implementation))
    assert train(tmp_path, replace(OPTIONS, epochs=1), model=other).best_val_ppl == pytest.approx(result.best_val_ppl)
    assert seen == {"sdpa"}


def test_gradient_accumulation_gives_the_loss_and_the_gradients_of_the_larger_batch():
    model, losses, gradients = without_dropout(make_model()), [], []
    for options in (replace(OPTIONS, batch_size=6), replace(OPTIONS, batch_size=2, gradient_accumulation=3)):
        plan = Plan(options, 17, LENGTH)
        assert (plan.epoch_steps, plan.epochs(2), plan.epochs(3)) == (3, pytest.approx(2 / 3), 1)
        *_, last = step_batches(make_data(train=17).train, plan.order(5, 0), options, model.device)
        model.zero_grad()
        losses.append(Optimization(model, options, 3).backward(last))
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*losses)
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


def test_three_steps_equal_a_plain_loop(tmp_path):
    """Loss, clipping, AdamW without decay of biases and norms, and the schedule, written out by torch alone."""
    model, twin = (without_dropout(make_model(initializer_range=0.2)).double() for _ in range(2))
    options = HealOptions(
        steps=3,
        batch_size=4,
        learning_rate=3e-3,
        weight_decay=0.3,
        max_grad_norm=0.5,
        schedule="linear",
        warmup_ratio=0,
    )
    result = train(tmp_path, options, model=model, data=make_data(train=4))
    twin.set_attn_implementation("eager")  # as in training; Adam amplifies what rounds otherwise
    vectors = [name for name, _ in twin.named_parameters() if name.endswith("bias") or "norm" in name]
    named = dict(twin.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [named[name] for name in named if name not in vectors], "weight_decay": 0.3},
            {"params": [named[name] for name in vectors], "weight_decay": 0.0},
        ]
    )
    rows = make_data(train=4).train.tokens
    for step in range(3):
        logits = twin(rows[:, :-1]).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten())
        assert result.history[step + 1]["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5) > 0.5
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 3)
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in model.named_parameters():
        if not name.endswith("query_key_value.bias"):  # softmax takes no notice of the keys' bias
            torch.testing.assert_close(weight, named[name], rtol=0, atol=1e-9)


def stub_perplexities(monkeypatch, values):
    """Replaces the validation perplexity, epoch by epoch; returns the list that collects the weights of each epoch."""
    stubs, kept, validate = iter(values), [], Optimization.validate

    def remember(self, batches):
        kept.append({name: weight.detach().clone() for name, weight in self.model.named_parameters()})
        return validate(self, batches)

    monkeypatch.setattr(Optimization, "validate", remember)
    monkeypatch.setattr(phase2, "perplexity", lambda loss: next(stubs))
    return kept


@pytest.mark.parametrize(
    ("patience", "perplexities", "epochs_run", "best_epoch", "reason"),
    [
        (1, [9.0, 8.0, 8.0], 3, 2, "early stop"),
        (2, [9.0, 8.0, 8.5, 7.0, 7.5], 5, 4, "all epochs"),
    ],
)
def test_early_stop_keeps_the_best(tmp_path, monkeypatch, patience, perplexities, epochs_run, best_epoch, reason):
    kept = stub_perplexities(monkeypatch, perplexities)
    model = make_model()
    options = replace(OPTIONS, epochs=5, patience=patience)
    result = train(tmp_path, options, model=model, data=make_data(train=8, validation=2))
    assert (len(result.history), result.best_epoch, result.stop_reason) == (epochs_run, best_epoch, reason)
    assert result.best_val_ppl == min(perplexities)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, kept[best_epoch - 1][name]), name
        assert torch.equal(weight, saved.get_parameter(name)), name
    bands = [band["perplexity"] for band in result.val_ppl_by_position]
    assert bands == pytest.approx(bands_from_full_logits(model, make_data(validation=2).validation), rel=1e-6)


def test_a_run_by_steps_ends_within_an_epoch_and_never_early(tmp_path, monkeypatch):
    stub_perplexities(monkeypatch, [7.0, 9.0, 8.0, 6.0])
    model = make_model()
    options = HealOptions(steps=12, batch_size=4, learning_rate=3e-3, checkpoint_steps=2)
    result = train(tmp_path, options, model=model)
    assert [(row["step"], row["epoch"]) for row in result.history] == [(0, 0), (5, 1), (10, 2), (12, 2.4)]
    assert [row["best"] for row in result.history] == [True, False, False, True]
    assert result.history[0]["train_loss"] is None and result.best_epoch == 2.4
    first, second, part = (row["seconds"] for row in result.history[1:])
    assert result.seconds_per_epoch == pytest.approx(sorted([first, second, part / 0.4])[1])
    with pytest.raises(ValueError, match="steps 12, not 13"):
        train(tmp_path, replace(options, steps=13), model=model)


def test_the_folder_is_a_hugging_face_model_with_its_tokenizer(one_epoch):
    _, model, folder, _ = one_epoch
    saved = AutoModelForCausalLM.from_pretrained(folder)
    assert saved.config.use_cache
    assert AutoTokenizer.from_pretrained(folder).vocab_size == VOCABULARY
    assert torch.equal(saved.lm_head.weight, model.lm_head.weight)
    assert not [path for path in folder.iterdir() if path.is_dir()]


def test_bfloat16_trains_near_float32(tmp_path, one_epoch):
    exact, model = one_epoch[0], make_model()
    rounded = train(tmp_path, replace(OPTIONS, epochs=1, precision="bfloat16"), model=model)
    assert rounded.best_val_ppl != exact.best_val_ppl
    assert rounded.best_val_ppl == pytest.approx(exact.best_val_ppl, rel=0.05)
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


def test_gradient_checkpointing_changes_no_result(tmp_path, monkeypatch, one_epoch):
    model, switched = make_model(), []
    enable = optimization.recompute_activations
    monkeypatch.setattr(optimization, "recompute_activations", lambda *given: (switched.append(given), enable(*given)))
    recomputed = train(tmp_path, replace(OPTIONS, epochs=1, gradient_checkpointing=True), model=model)
    assert recomputed.best_val_ppl == pytest.approx(one_epoch[0].best_val_ppl, rel=1e-5)
    assert switched == [(model,), (model, False)] and not model.is_gradient_checkpointing


def test_cosine_schedule_rises_then_falls_to_zero():
    options = replace(OPTIONS, learning_rate=1.0e-3, schedule="cosine", warmup_ratio=0.2)
    trained, rates = Optimization(make_model(), options, steps=10), []
    for _ in range(10):
        rates.append(trained.optimizer.param_groups[0]["lr"])
        trained.update()
    expected = [step / 2 for step in (0, 1)] + [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates == pytest.approx([1e-3 * rate for rate in expected], abs=1e-12)


def test_the_console_shows_each_epoch_and_the_end(tmp_path, capsys, monkeypatch):
    stub_perplexities(monkeypatch, [812.34, 900.0])
    train(tmp_path, replace(OPTIONS, epochs=10, patience=1))
    first, second, end = capsys.readouterr().out.splitlines()
    assert first.startswith("Epoch  1/10: train_loss=") and first.endswith(" s *")
    assert "val_ppl=812.34, val_acc=0." in first
    assert second.endswith(" s")
    assert end == "Early stop after step 10: best val_ppl=812.34 after step 5"


def test_what_cannot_be_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for options, message in [
        (replace(OPTIONS, warmup_ratio=0.1), "warmup_ratio 0.1: schedule constant has no warm-up, use"),
        (replace(OPTIONS, tensorboard=True), r"context-pythia\[tensorboard\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(tmp_path, options)
    assert not list(tmp_path.iterdir())


def test_tensorboard_has_the_losses_and_the_perplexities(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(tmp_path, replace(OPTIONS, epochs=1, batch_size=1, tensorboard=True))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("eval/perplexity")]
    assert logged == [(row["step"], pytest.approx(row["val_ppl"])) for row in result.history]
    assert [event.step for event in events.Scalars("train/loss")] == [16, 18]


def test_one_pass_reads_so_many_tokens_once_keeps_its_best_weights_and_resumes(tmp_path, monkeypatch):
    perplexities = [9.0, 8.0, *[9.5] * 8]  # a worse one stops no pass
    stub_perplexities(monkeypatch, 2 * perplexities)
    options = replace(OPTIONS, tokens=17 * LENGTH, batch_size=1, patience=1, schedule="cosine")
    model, cut = make_model(), make_model()
    result = train(tmp_path / "whole", options, model=model)
    steps = [2, 3, 5, 7, 8, 10, 12, 14, 15, 17]
    assert [(row["step"], row["tokens"]) for row in result.history] == [(step, step * LENGTH) for step in steps]
    assert (result.stop_reason, result.best_val_ppl, result.best_epoch) == ("all tokens", 8.0, pytest.approx(3 / 17))
    # The samples beyond the pass have no part in it: a training split that ends there gives the same weights.
    data = make_data()
    data.train.tokens = data.train.tokens[:17]
    cut_at(monkeypatch, 11, tmp_path / "cut", options, data=data)
    assert_same_end(result, model, train(tmp_path / "cut", options, model=cut, data=data), cut)
