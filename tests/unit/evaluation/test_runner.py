"""One evaluation at a time in a directory."""

from __future__ import annotations

import os

import pytest

from remit_megatron.evaluation.runner import _only_one
from remit_megatron.runtime import locks
from remit_megatron.runtime.errors import UserError


def test_a_second_evaluation_is_refused_also_where_locks_are_each_machines_own(tmp_path, monkeypatch):
    boots = iter("ab")
    for reaches in (True, False):
        if not reaches:
            monkeypatch.setattr("fcntl.flock", lambda *_: None)
            monkeypatch.setattr(locks, "kernel", lambda: [next(boots), ""])
            monkeypatch.setattr(locks, "_TOUCH_SECONDS", 0.1)
        with (
            _only_one(tmp_path, 0),
            pytest.raises(UserError, match=f"--output: found .*, in use by process {os.getpid()} on "),
            _only_one(tmp_path, 0),
        ):
            pass
        with _only_one(tmp_path, 1):
            pass
