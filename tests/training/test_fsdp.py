"""The model divided between two processes: the same training as by one that holds it whole.

accelerate offers FSDP to GPUs and the like alone, though torch can do it on a CPU by gloo: the processes here pass for
GPUs' in the two places where accelerate asks. All else is real.
"""

import os
from pathlib import Path

import pytest
import torch
from accelerate import state
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.tensor import DTensor

from context_pythia import processes
from context_pythia.cli.command_line import main
from context_pythia.training.epochs import EpochReport

from .test_distributed import (
    assert_same_training,
    command,
    errors_said,
    run_pair,
    train_phase2,
    train_phase2_quietly,
)

CONFIG = Path(__file__).parents[2] / "docs" / "fsdp.yaml"


def launcher_environment():
    """What `accelerate launch --config_file docs/fsdp.yaml` sets for FSDP."""
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIG), "program"])
    arguments, _, _ = _validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(arguments)
    return {key: value for key, value in environment.items() if "FSDP" in key or key == "ACCELERATE_MIXED_PRECISION"}


def train_divided(folder, source, interrupt_at):
    os.environ |= launcher_environment()
    state.PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    step_end = EpochReport.on_step_end

    def note_share(self, args, trainer_state, control, model, **kwargs):
        parameters = list(model.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        held = sum(parameter.to_local().numel() for parameter in parameters)
        share = held / sum(parameter.numel() for parameter in parameters)
        (folder / f"share{processes.index()}").write_text(str(share))
        return step_end(self, args, trainer_state, control, **kwargs)

    EpochReport.on_step_end = note_share
    return train_phase2_quietly(folder, source, interrupt_at)


@pytest.mark.parametrize("source", ["shared", "layer"])
def test_two_processes_with_half_the_model_each_train_like_one(tmp_path, source):
    expected = train_phase2(tmp_path / "one", source, None)
    codes, errors = run_pair(tmp_path, train_divided, tmp_path / "run", source, None)
    assert codes == [0, 0], errors
    assert_same_training(tmp_path / "run", source, *expected)
    shares = [float((tmp_path / "run" / f"share{index}").read_text()) for index in (0, 1)]
    assert shares == pytest.approx([0.5, 0.5], abs=0.01) and sum(shares) == pytest.approx(1)


def test_ctrl_c_stops_both_and_they_go_on_divided_alone(tmp_path):
    expected = train_phase2(tmp_path / "one", None, None)
    codes, errors = run_pair(tmp_path, train_divided, tmp_path / "run", None, 7)
    assert codes == [130, 130], errors
    with pytest.raises(ValueError, match="checkpoint-7 was written with FSDP: go on with it, or delete"):
        train_phase2(tmp_path / "run", None, None)
    codes, errors = run_pair(tmp_path, train_divided, tmp_path / "run", None, None)
    assert codes == [0, 0], errors
    assert_same_training(tmp_path / "run", None, *expected)


def train_with_the_launchers_environment(arguments):
    os.environ |= launcher_environment()
    return main(arguments)


def test_without_gpus_one_line_says_that_nothing_is_divided(tmp_path, own_cache):
    arguments = command(tmp_path, "train", "--model", "Pythia", "--batch-size", "6")
    codes, errors = run_pair(tmp_path, train_with_the_launchers_environment, arguments)
    assert 2 in codes
    said = errors_said(errors)
    assert len(said) == 1 and "accelerate divides a model (FSDP) only among GPUs or the like" in said[0], errors


@pytest.mark.parametrize(
    ("setting", "value", "line"),
    [
        ("FSDP_VERSION", "1", "accelerate's fsdp_version 1 is not supported: give 2"),
        ("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT", "fsdp_state_dict_type SHARDED_STATE_DICT is not supported"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading true is not supported: give false"),
        ("FSDP_VERSION", None, "accelerate's fsdp_version not given is not supported: give 2"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "accelerate's DeepSpeed is not supported"),
    ],
)
def test_other_ways_to_divide_a_model_are_refused(monkeypatch, setting, value, line):
    for key, given in (launcher_environment() | {"WORLD_SIZE": "2", setting: value}).items():
        monkeypatch.delenv(key, raising=False)
        if given is not None:
            monkeypatch.setenv(key, given)
    with pytest.raises(ValueError, match=line), processes.joined():
        pass
