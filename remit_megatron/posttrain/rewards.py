"""The reward of a completion: the verifier of its line, called and checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from remit_megatron.posttrain.examples import Example
from remit_megatron.posttrain.verifiers import Verifier, find_verifier
from remit_megatron.runtime.errors import UserError, show
from remit_megatron.runtime.parallel import same_fate


class VerifiedReward:
    """TRL's reward function: a number in [0, 1] for every completion.

    Args:
        examples: the lines, by the number that the column ``example`` holds.
        default: the verifier of lines that name none.

    Raises:
        UserError: a line has no verifier, or one that does not exist.
    """

    __name__ = "verified"

    def __init__(self, examples: Sequence[Example], default: str | None):
        self._examples = examples
        self._verifiers: dict[str, Verifier] = {}
        for example in examples:
            name = example.fields.get("verifier", default)
            if name is None:
                raise UserError(example.place, "no verifier", "one in the line, or verifier in the configuration")
            if name not in self._verifiers:
                field = f"{example.place}: verifier" if "verifier" in example.fields else "verifier"
                self._verifiers[name] = find_verifier(name, field=field)
        self._default = default

    @property
    def names(self) -> list[str]:
        """The verifiers that the lines ask for."""
        return sorted(self._verifiers)

    def __call__(self, *, completions: Sequence[Any], example: Sequence[int], **_: Any) -> list[float]:
        """Rewards of completions, strings or lists of one message each; on all ranks or, where it fails, on none."""
        with same_fate("verifying completions"):
            return [self.score(index, _text(text)) for index, text in zip(example, completions, strict=True)]
        raise AssertionError("unreachable")

    def score(self, index: int, completion: str) -> float:
        """The reward of one completion of line ``index``.

        Raises:
            UserError: the verifier raised, or gave no number in [0, 1]; names the line.
        """
        example = self._examples[index]
        name = example.fields.get("verifier", self._default)
        try:
            value = self._verifiers[name](
                completion, example.fields["answer"], **example.fields.get("verifier_args", {})
            )
            number = float(value)
        except Exception as error:  # whatever a verifier raises; KeyboardInterrupt and SystemExit pass
            if isinstance(error, UserError):
                raise UserError(example.place, f"{error.field} {error.found}", error.expected) from None
            found = f"verifier {name} raised {type(error).__name__}: {error} on the completion {show(completion)}"
            raise UserError(
                example.place, found, "a verifier that takes the line's answer and verifier_args"
            ) from error
        if not (math.isfinite(number) and 0.0 <= number <= 1.0):
            raise UserError(example.place, f"{show(value)} from verifier {name}", "a number from 0 to 1")
        return number


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else "".join(message["content"] or "" for message in completion)
