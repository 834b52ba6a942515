"""Megatron's and the libraries' walls of text go to the log, not to the terminal.

Target    megatron-core 0.19.2: ``print`` in every megatron module; warnings at import
Why       Setting up one small run prints several hundred lines per rank that a user can do nothing about; the lines
          that matter (progress, errors) drown. Nothing is lost: they are logged under ``megatron`` (run_dir/logs).
Test      tests/integration/test_train_cli.py::test_train_prints_little
Upstream  not reported; a matter of taste there
Drop when Megatron logs through ``logging`` only
"""

from __future__ import annotations

import builtins
import logging
import sys
import warnings

from patches import Patch

_log = logging.getLogger("megatron.print")


def _print_to_log(*values, sep=" ", end="\n", file=None, flush=False) -> None:
    if file not in (None, sys.stdout, sys.stderr):
        builtins.print(*values, sep=sep or " ", end=end, file=file, flush=flush)
        return
    text = (sep or " ").join(str(value) for value in values).strip()
    if text:
        _log.info("%s", text)


def _install() -> None:
    # "Apex is not installed", "No CUDA runtime", deprecations inside libraries: nothing that the user did or can mend.
    for module in (r"megatron(\.|$)", r"torch(\.|$)", r"transformers(\.|$)", r"google(\.|$)", r"importlib(\.|$)"):
        warnings.filterwarnings("ignore", module=module)
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*not installed.*")
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator.*")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    redirect()


def redirect() -> None:
    """Redirects ``print`` in the megatron modules that are loaded by now; call it again after loading more."""
    for name, module in list(sys.modules.items()):
        if module is not None and (name == "megatron" or name.startswith("megatron.")):
            module.__dict__["print"] = _print_to_log


PATCH = Patch(
    name="quiet_megatron",
    target="print and import-time warnings in megatron.*",
    package="megatron-core",
    versions=("0.19.2",),
    why="hundreds of lines per rank at start hide the few that matter; they go to run_dir/logs instead",
    test="tests/integration/test_train_cli.py::test_train_prints_little",
    upstream="not reported",
    drop_when="Megatron logs through the logging module only",
    install=_install,
)
