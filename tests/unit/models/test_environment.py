"""What the environment says of attention beside ``megatron.attention_backend``."""

from __future__ import annotations

import os
import re

import pytest

import patches

patches.apply()

from remit_megatron.models.environment import _VALUES, _VARIABLES, check_attention_environment  # noqa: E402
from remit_megatron.runtime.errors import UserError  # noqa: E402
from tests.unit.run.test_megatron_args import arguments  # noqa: E402


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for variable in _VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize("backend", list(_VALUES))
def test_megatron_sets_what_is_expected(monkeypatch, backend):
    """Its own table, from the module that stops at a difference."""
    from types import SimpleNamespace

    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.transformer.enums import AttnBackend

    config = SimpleNamespace(attention_backend=AttnBackend[backend], flash_attention_version=None)
    for variable in _VARIABLES:
        monkeypatch.setenv(variable, "")  # is put back
        monkeypatch.delenv(variable)
    LanguageModule._set_attention_backend(SimpleNamespace(config=config))  # pyright: ignore[reportArgumentType]
    assert "".join(os.environ[variable] for variable in _VARIABLES) == _VALUES[backend]
    check_attention_environment(AttnBackend[backend], "transformer_engine")


@pytest.mark.parametrize(("backend", "variable", "value"), [("auto", 0, "0"), ("fused", 0, "1"), ("flash", 2, "1")])
def test_other_attention_is_refused(monkeypatch, backend, variable, value):
    name = _VARIABLES[variable]
    monkeypatch.setenv(name, value)
    line = f"{name}: found {value} in the environment; expected {1 - int(value)} or nothing"
    with pytest.raises(UserError, match=re.escape(line)):
        check_attention_environment(backend, "transformer_engine")
    assert os.environ[name] == value


def test_local_layers_read_none_of_it(monkeypatch):
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    monkeypatch.setenv("NVTE_UNFUSED_ATTN", "1")
    arguments()
    assert "NVTE_FLASH_ATTN" not in os.environ and os.environ["NVTE_UNFUSED_ATTN"] == "1"
