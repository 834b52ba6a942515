"""What a save that failed says of itself."""

from __future__ import annotations

import errno

from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from remit_megatron.runtime.checkpoints import write_error


def failed(error: Exception) -> CheckpointException:
    """As torch raises it on all ranks."""
    try:
        raise RuntimeError(f"Worker failure: {error}") from error
    except RuntimeError as caught:
        return CheckpointException("write", {1: _wrap_exception(caught)})


def test_an_error_of_the_file_system_is_one_again():
    found = write_error(failed(OSError(errno.ENOSPC, "No space left on device", "iter_0000004/__0_0.distcp")), "runs/a")
    assert isinstance(found, OSError) and found.errno == errno.ENOSPC
    assert (found.strerror, found.filename) == ("No space left on device", "runs/a")


def test_any_other_is_said_in_one_line():
    found = write_error(failed(ValueError("no such tensor")), "runs/a")
    assert isinstance(found, RuntimeError)
    assert str(found) == "saving into runs/a: RuntimeError: Worker failure: no such tensor"
