"""Writes nemo_rl_keys.json from a checkout of NVIDIA-NeMo/RL: make_nemo_rl_keys.py CHECKOUT VERSION."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from remit_megatron.posttrain.nemo_rl import EXAMPLES, known_keys


def main() -> None:
    checkout, version = Path(sys.argv[1]), sys.argv[2]
    keys = {
        name: sorted(known_keys(yaml.safe_load((checkout / "examples/configs" / name).read_text())))
        for name in EXAMPLES.values()
    }
    content = {"source": "NVIDIA-NeMo/RL examples/configs", "version": version, "keys": keys}
    (Path(__file__).parent / "nemo_rl_keys.json").write_text(json.dumps(content, indent=0) + "\n")


if __name__ == "__main__":
    main()
