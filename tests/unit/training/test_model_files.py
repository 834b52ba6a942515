"""What a run's checkpoint has beside its weights: one tokenizer, whole, and the chat templates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from remit_megatron.data.tokenizer import load_tokenizer
from remit_megatron.training.engine import Engine, _companion_files
from tests.unit.data.test_tokenizer import make_tokenizer


def files_of(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def written(target: Path, tokenizer: Path, init: Path | None) -> set[str]:
    engine: Any = Engine.__new__(Engine)
    engine._prepared = SimpleNamespace(
        hf_config={"model_type": "llama", "eos_token_id": 259},
        init=None if init is None else SimpleNamespace(hf_files=init),
        tokenizer=load_tokenizer(tokenizer),
    )
    engine._companions = _companion_files(engine._prepared)
    target.mkdir()
    engine._add_model_files(target)
    return files_of(target / "hf")


def test_files_of_a_checkpoint(tmp_path):
    init = make_tokenizer(tmp_path / "init")
    for name in ("special_tokens_map.json", "generation_config.json"):
        (init / name).write_text(json.dumps({"eos_token": "<s>"}))
    (init / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/rag.jinja", "additional_chat_templates/notes.txt"):
        (init / name).write_text(name)
    chat = {"chat_template.jinja", "additional_chat_templates/rag.jinja", "generation_config.json", "config.json"}
    whole = chat | {"tokenizer.json", "special_tokens_map.json"}
    assert written(tmp_path / "same", init, init) == whole

    # The map of init would make a third tokenizer of the run's own.
    own = make_tokenizer(tmp_path / "own")
    (own / "chat_template.jinja").write_text("own")
    assert written(tmp_path / "other", own, init) == chat | {"tokenizer.json"}
    assert (tmp_path / "other" / "hf" / "chat_template.jinja").read_text() == "own"

    bare = tmp_path / "bare.json"
    shutil.copy(own / "tokenizer.json", bare)
    assert written(tmp_path / "bare", bare, None) == {"config.json", "tokenizer.json"}
    assert load_tokenizer(tmp_path / "bare" / "hf").digest == load_tokenizer(bare).digest
