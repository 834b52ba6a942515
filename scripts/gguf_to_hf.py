"""A GGUF file as a plain Hugging Face directory: float32 safetensors, config.json, tokenizer.

    python scripts/gguf_to_hf.py MODEL.gguf DIRECTORY

transformers reads the file and undoes the quantization. It marks the model as quantized and would refuse to save it, so
the weights move into a model of the same architecture with a configuration of its own.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

# Of this process's own making, or of llama.cpp's packing: not properties of the model.
_NOT_OF_THE_MODEL = (
    "quantization_config",
    "_name_or_path",
    "_model_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
)


def convert(gguf: Path, directory: Path) -> None:
    """Writes ``directory``, complete or not at all."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    values = {name: value for name, value in read.config.to_dict().items() if name not in _NOT_OF_THE_MODEL}
    plain = type(read)(type(read.config)(**values))
    plain.load_state_dict(read.state_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    plain.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(directory)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path, help="the .gguf file")
    parser.add_argument("directory", type=Path, help="the Hugging Face directory to write; must not exist")
    args = parser.parse_args()
    if not args.gguf.is_file():
        print(f"error: gguf: found no file {args.gguf}; expected a .gguf file", file=sys.stderr)
        return 2
    if args.directory.exists():
        print(f"error: directory: found {args.directory}; expected a name that is not taken", file=sys.stderr)
        return 2
    args.directory.absolute().parent.mkdir(parents=True, exist_ok=True)
    convert(args.gguf.absolute(), args.directory.absolute())
    return 0


if __name__ == "__main__":
    sys.exit(main())
