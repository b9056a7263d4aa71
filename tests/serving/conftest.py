"""Each process of these tests has one thread. The first of pytest-xdist reads this file and imports no torch."""

import gc
import os

import pytest

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR")
os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_DO_NOT_TRACK="1", OMP_NUM_THREADS="1")


def pytest_configure():
    gc.disable()  # as in ../conftest.py


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


KINDS = ["layer", "layer, contexts by layers", "shared", "converted, -50 %", "converted, -75 %", "converted, -87.5 %"]


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """A model and the folder that it is saved in."""
    from tests.serving.engines import CONVERTED, MODELS, build, convert

    folder, name = tmp_path_factory.mktemp("model"), request.param
    model = convert(CONVERTED[name], tmp_path_factory.mktemp("partial")) if name in CONVERTED else build(MODELS[name])
    model.save_pretrained(folder)
    return model, folder
