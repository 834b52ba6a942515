"""The suite of the CPU does not see a GPU, on whatever machine."""

from __future__ import annotations

import os

import pytest
import torch

from tests.conftest import REPOSITORY, only_gpu_tests


def test_gpus_are_hidden_from_this_suite():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available()


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (["tests/gpu"], True),
        (["tests/gpu/test_token_loss_gpu.py::test_x"], True),
        (["tests/gpu", "tests/unit"], False),
        (["tests"], False),
        ([], False),
    ],
)
def test_tests_of_gpus_see_them_when_asked_for_alone(arguments, seen, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert only_gpu_tests(arguments) is seen
