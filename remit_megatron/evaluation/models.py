"""What is evaluated: a Hugging Face directory, or a checkpoint of ours that is exported. Known by its contents."""

from __future__ import annotations

import contextlib
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from remit_megatron.runtime import checkpoints
from remit_megatron.runtime.errors import EXIT_BAD_INPUT, UserError, show_error
from remit_megatron.runtime.exported import checkpoint_digest, model_digest, run_export
from remit_megatron.runtime.files import temporary_name

logger = logging.getLogger(__name__)

_EXPECTED = "[NAME=]DIR, a Hugging Face directory (config.json), a checkpoint (manifest.json) or a run (checkpoints/)"


@dataclass(frozen=True)
class Model:
    """A model to evaluate.

    Attributes:
        name: what results and folders call it.
        path: as it was given, resolved: the Hugging Face directory or the checkpoint.
        checkpoint: whether ``path`` is a Megatron checkpoint.
        digest: SHA-256 over the contents of all files that matter.
    """

    name: str
    path: Path
    checkpoint: bool
    digest: str


def find_models(words: list[str]) -> list[Model]:
    """The models that a command line names.

    Raises:
        UserError: something that is none of the three kinds, or two of one name.
    """
    models = []
    for word in words:
        name, equals, path = word.partition("=")
        given = bool(equals) and not Path(word).exists()
        model = _find(Path(path) if given else Path(word), name if given else None)
        if twice := [other for other in models if other.name == model.name]:
            raise UserError("MODEL", f"{model.name} for {twice[0].path} and {model.path}", "names: A=DIR B=DIR")
        models.append(model)
    return models


def _find(path: Path, name: str | None) -> Model:
    if not path.is_dir():
        raise UserError("MODEL", path, _EXPECTED)
    path = path.resolve()
    default = path.name
    # A folder of checkpoints beside a config.json is another program's, and the model is what is beside it.
    hugging_face = (path / "config.json").is_file()
    if not hugging_face and not checkpoints.is_checkpoint(path):
        root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        newest = checkpoints.newest_complete(root, digests=False)
        if newest is None:
            run = root != path or checkpoints.iterations(root)
            raise UserError("MODEL", f"{path}, a run without a complete checkpoint" if run else path, _EXPECTED)
        default = path.parent.name if path.name == "checkpoints" else default
        path = checkpoints.iteration_directory(root, newest)
    elif path.parent.name == "checkpoints":
        default = f"{path.parent.parent.name}-{path.name}"
    checkpoint = not hugging_face
    if checkpoint:
        try:
            digest = checkpoint_digest(checkpoints.read_manifest(path))
        except checkpoints.DamagedCheckpoint as damage:
            raise UserError("MODEL", str(damage), "a whole checkpoint") from None
    else:
        digest = model_digest(path)
    name = name or default
    if "/" in name or name.startswith(".") or not name.strip():
        raise UserError("MODEL", f"{name}={path}", "a NAME that can be a folder")
    return Model(name, path, checkpoint, digest)


def hugging_face_directory(model: Model, exported: Path) -> Path:
    """The Hugging Face directory of a model. A checkpoint is exported into ``exported`` unless it is there.

    Raises:
        UserError: it cannot be exported; with the export's own words.
    """
    if not model.checkpoint:
        return model.path
    directory = exported / model.digest[:32]
    if directory.is_dir():  # complete or absent: `remit export` renames it into place
        return directory
    exported.mkdir(parents=True, exist_ok=True)
    logger.info("exporting %s", model.path)
    code, lines = run_export(model.path, directory)
    if code == EXIT_BAD_INPUT:
        raise UserError(f"MODEL {model.name}", lines[-1].removeprefix("error: "), "a checkpoint that can be exported")
    if code:
        raise RuntimeError(f"remit export ended with {code}:\n" + "\n".join(lines[-20:]))
    return directory


def forget_export(model: Model, exported: Path) -> None:
    """Removes what :func:`hugging_face_directory` made."""
    directory = exported / model.digest[:32]
    if model.checkpoint and directory.is_dir():
        # First its name goes: half of it, left by a process that was killed, would be taken for all of it.
        removed = temporary_name(directory)
        with contextlib.suppress(OSError):
            directory.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def chat_template(directory: Path) -> str | None:
    """The chat template of a model's tokenizer, or None.

    Raises:
        UserError: there is no tokenizer that can be loaded.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # whatever its classes make of these files
        raise UserError(f"MODEL {directory}", show_error(error), "a directory with a tokenizer") from error
    template = getattr(tokenizer, "chat_template", None)
    return template if isinstance(template, str) else (template or {}).get("default") if template else None
