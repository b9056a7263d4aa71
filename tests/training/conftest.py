"""Trainings that several tests read: a GPT-NeoX of 32 dims, on rows in which each token decides the next."""

from dataclasses import replace

import pytest

from tests.training.test_phase2 import OPTIONS, make_model, train


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    model = make_model()
    return train(tmp_path_factory.mktemp("whole"), model=model), model


@pytest.fixture(scope="session")
def one_epoch(tmp_path_factory):
    """Result, model and folder of an epoch; and for each call of the model whether it trained, its attention, and the
    shape of its logits."""
    model, folder, calls = make_model(), tmp_path_factory.mktemp("epoch"), []

    def note(module, _, output):
        calls.append((module.training, module.config._attn_implementation, tuple(output.logits.shape)))

    hook = model.register_forward_hook(note)
    result = train(folder, replace(OPTIONS, epochs=1), model=model)
    hook.remove()
    return result, model, folder, calls
