"""``remit data mix``: the sources of a recipe to token files, and a blend file that a run names in ``data.train``.

Each source becomes a data set of its own, ``OUTPUT/NAME.bin`` and so on, complete or absent, so the command may be
stopped and started again: what is finished is recognized by its manifest and left alone.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from remit_megatron.data.blend_file import write_blend_file
from remit_megatron.data.build import build_files
from remit_megatron.data.input_notes import noticed
from remit_megatron.data.inputs import LOCAL_FILES, FileStore, expand_inputs, is_there
from remit_megatron.data.manifest import Manifest, manifest_path, read_manifest
from remit_megatron.data.recipe import Recipe, Source
from remit_megatron.data.special_tokens import NOTHING, SpecialTokens, special_tokens
from remit_megatron.data.tokenizer import load_tokenizer
from remit_megatron.runtime.errors import UserError
from remit_megatron.runtime.progress import format_count

logger = logging.getLogger(__name__)

BLEND = "blend.yaml"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


_ORIGIN = {"text_key", "template", "files", "hub", "max_tokens"}
State = Literal["done", "changed", "local", "hub", "missing"]


@dataclass(frozen=True)
class Plan:
    """One source of a mix, as it stands.

    Attributes:
        share: of the mix; 0 where the source is left out of it.
        wanted: tokens; None for all there are.
        files: local files, in the order in which they are read.
        manifest: of the data set that is there; None where there is none.
        left_out: a line for each thing in its folders that is passed over.
        state: ``done``, ``changed`` (a data set is there, of something else), ``local`` or ``hub`` (to be built from
            there), or ``missing``.
        reason: what is missing or has changed.
    """

    source: Source
    share: float
    wanted: int | None
    files: tuple[str, ...]
    manifest: Manifest | None
    state: State
    reason: str = ""
    left_out: tuple[str, ...] = ()


def parse_tokens(text: str | None) -> int | None:
    """``50e9``, ``50B``, ``1.2T`` or a plain number, as a whole number of tokens.

    Raises:
        UserError: something else, or less than 1.
    """
    if text is None:
        return None
    matched = re.fullmatch(r"(\d+(?:\.\d*)?(?:[eE]\+?\d+)?)([KMBT]?)", text.strip())
    number = float(matched[1]) * _UNITS[matched[2]] if matched else 0.0
    if not 1 <= number < 1e18:
        raise UserError("--tokens", repr(text), "a number of tokens, as 50e9 or 50B")
    return round(number)


def plan_mix(
    recipe: Recipe, *, root: str, output: str, budget: int | None = None, hub: bool = False, allow_missing: bool = False
) -> list[Plan]:
    """What is there of each source, and how much of it is wanted. Reads file names and manifests only.

    Args:
        root: folder that the recipe's files are in.
        output: folder of the data sets.
        budget: tokens of the whole mix; None wants all of every source.
        hub: whether sources without local files may be read from the hub.
        allow_missing: share the mix among the sources that are there.

    Raises:
        UserError: a file that nothing here reads, or a damaged data set.
    """
    left_out: dict[str, list[str]] = {source.name: [] for source in recipe.sources}
    found = {source.name: _find(source, recipe, root, left_out[source.name]) for source in recipe.sources}
    built = {source.name: _built(source, output) for source in recipe.sources}
    missing = {
        source.name
        for source in recipe.sources
        if isinstance(found[source.name], str) and not built[source.name] and not (hub and source.hub)
    }
    names = [source.name for source in recipe.sources]
    shares = recipe.shares([name for name in names if name not in missing] if allow_missing else None)
    plans = []
    for source in recipe.sources:
        share = shares.get(source.name, 0.0)
        wanted = None if budget is None else math.ceil(share * budget)
        files, manifest = found[source.name], built[source.name]
        if source.name in missing:
            plans.append(Plan(source, share, wanted, (), None, "missing", str(files)))
            continue
        local = () if isinstance(files, str) else files
        reason = "" if manifest is None else _change(manifest, source, local, root, wanted)
        state = _state(manifest, reason, local)
        plans.append(Plan(source, share, wanted, local, manifest, state, reason, tuple(left_out[source.name])))
    return plans


def mix(
    recipe: Recipe,
    *,
    tokenizer: str,
    root: str,
    output: str,
    budget: int | None = None,
    hub: bool = False,
    allow_missing: bool = False,
    workers: int = 1,
    on_error: str = "stop",
    add_special_tokens: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> list[Plan]:
    """Builds every source that is there and not finished, and then the blend file; returns how things stand then.

    Args:
        tokenizer: for `load_tokenizer`; for data sets that are finished, too.
        workers, on_error, add_special_tokens, progress: as for `build_dataset`.
        overwrite: build again what was built from something else.
        recipe, root, output, budget, hub, allow_missing: as for `plan_mix`.

    Raises:
        UserError: as `plan_mix` and `build_dataset`; a data set that was built from something else, or is to be built
            again from files that are gone, without ``hub``; or missing sources: with a budget before anything is built,
            since what is wanted of a source then depends on which others there are, and without one after those that
            are there have been built.
    """
    options: dict[str, Any] = dict(root=root, output=output, budget=budget, hub=hub, allow_missing=allow_missing)
    opened = load_tokenizer(tokenizer, field="--tokenizer")
    plans = plan_mix(recipe, **options)
    if budget is not None:
        _check_missing(plans, recipe, root=root, allow_missing=allow_missing)
    around = special_tokens(opened) if add_special_tokens else NOTHING
    again = {plan.source.name: reason for plan in plans if (reason := _outdated(plan, opened.digests, around))}
    if again and not overwrite:
        name, reason = next(iter(again.items()))
        raise UserError(os.path.join(output, name), reason, "what is asked for now; --overwrite builds it again")
    wanted = [plan for plan in plans if plan.state in ("local", "hub") or plan.source.name in again]
    for plan in wanted:
        _check_readable(plan, recipe, hub=hub)
    for number, plan in enumerate(wanted):
        for line in plan.left_out:
            logger.warning("%s", line)
        _build(
            plan,
            recipe,
            tokenizer=tokenizer,
            root=root,
            output=output,
            workers=workers,
            on_error=on_error,
            add_special_tokens=add_special_tokens,
            overwrite=plan.source.name in again,
            announce=number == 0,
            progress=progress,
        )
    plans = plan_mix(recipe, **options)
    missing = _check_missing(plans, recipe, root=root, allow_missing=allow_missing)
    comment = f"Written by `remit data mix` from {recipe.path.name}."
    comment += f"\nLeft out, because missing: {', '.join(missing)}." if missing else ""
    entries = [(plan.share, plan.source.name) for plan in plans if plan.state != "missing"]
    write_blend_file(Path(output) / BLEND, entries, comment=comment)
    return plans


def _check_missing(plans: Sequence[Plan], recipe: Recipe, *, root: str, allow_missing: bool) -> list[str]:
    """Names of the sources that are missing; refuses them where they are not allowed, or are all there are."""
    missing = [plan.source.name for plan in plans if plan.state == "missing"]
    if missing and (not allow_missing or len(missing) == len(plans)):
        sys.stdout.write(advice(plans, root))
        listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        expected = "all of them; or --allow-missing, for a blend of the others in proportion"
        raise UserError(str(recipe.path), f"{len(missing)} of {len(plans)} sources missing ({listed})", expected)
    return missing


def _check_readable(plan: Plan, recipe: Recipe, *, hub: bool) -> None:
    """Refuses to build a data set again whose files have been removed, unless they may be read from the hub."""
    if plan.files or (hub and plan.source.hub):
        return
    expected = "its files below --root" + (f", or --hub to read {plan.source.hub}" if plan.source.hub else "")
    raise UserError(f"{recipe.path}: {plan.source.name}", "no files to build it again from", expected)


def _find(source: Source, recipe: Recipe, root: str, left_out: list[str]) -> tuple[str, ...] | str:
    """Local files of a source, or what is not there. Their order has nothing to do with their names, which often are
    dates, so that a part of a source is not its oldest part."""
    files: set[str] = set()
    for item in source.files:
        # Only the source's own names are patterns, whatever signs the folder of the corpus is called by.
        literal = os.path.join(root, item)
        path = literal if os.path.exists(literal) else os.path.join(glob.escape(root), item)
        try:
            if not is_there(path):
                return f"nothing at {literal}"
            files |= set(expand_inputs([path], left_out=left_out))
        except UserError as error:
            raise UserError(f"{recipe.path}: {source.name}", error.found, error.expected) from None
    left_out += noticed(sorted(files))
    return tuple(sorted(files, key=lambda file: _scattered(os.path.relpath(file, root))))


def _state(manifest: Manifest | None, reason: str, local: tuple[str, ...]) -> State:
    if manifest is not None:
        return "changed" if reason else "done"
    return "local" if local else "hub"


def _scattered(name: str) -> bytes:
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def _outdated(plan: Plan, digests: Sequence[str], around: SpecialTokens) -> str:
    """Why the data set that is there cannot be used; empty where it can, or there is none."""
    if plan.manifest is not None and plan.manifest.tokenizer_digest not in digests:
        return f"tokens of tokenizer {plan.manifest.tokenizer_digest[:16]}, not of {digests[0][:16]}"
    there = plan.manifest.special_tokens if plan.manifest is not None else None
    if plan.manifest is not None and (there or ((), ())) != (around.before, around.after):
        return f"texts with {there} around them" if there else "texts without --add-special-tokens"
    return plan.reason if plan.state == "changed" else ""


def _built(source: Source, output: str) -> Manifest | None:
    prefix = os.path.join(output, source.name)
    return read_manifest(prefix) if os.path.exists(manifest_path(prefix)) else None


def _inputs_digest(files: Sequence[str], root: str) -> str:
    described = [(os.path.relpath(file, root), os.path.getsize(file)) for file in files]
    return hashlib.sha256(json.dumps(sorted(described)).encode()).hexdigest()


def _origin(plan: Plan, root: str) -> dict[str, Any]:
    source = plan.source
    local = bool(plan.files)
    return {
        "text_key": source.text_key if source.template is None else None,
        "template": source.template,
        "files": _inputs_digest(plan.files, root) if local else None,
        "hub": None if local else str(source.hub),
        "max_tokens": plan.wanted,
    }


def _change(manifest: Manifest, source: Source, files: tuple[str, ...], root: str, wanted: int | None) -> str:
    """Why a data set is not what would be built now; empty where it is. Its files may be gone by then."""
    origin = manifest.origin
    if origin is None or not set(origin) >= _ORIGIN:
        return "a data set that `remit data mix` did not build"
    if origin["template"] != source.template or (source.template is None and origin["text_key"] != source.text_key):
        return "built from another text_key or template"
    if origin["files"] is not None and files and origin["files"] != _inputs_digest(files, root):
        return "built from other files, or from fewer"
    if origin["hub"] is not None and origin["hub"] != str(source.hub):
        return f"built from {origin['hub']}"
    limit = origin["max_tokens"]
    cut = isinstance(limit, int) and manifest.tokens >= limit  # less than the limit is all that the source has
    if cut and (wanted is None or wanted > manifest.tokens):
        return f"built for {limit} tokens, and {'all' if wanted is None else wanted} are wanted"
    return ""


def _build(
    plan: Plan,
    recipe: Recipe,
    *,
    tokenizer: str,
    root: str,
    output: str,
    workers: int,
    on_error: str,
    add_special_tokens: bool,
    overwrite: bool,
    announce: bool,
    progress: bool,
) -> None:
    source, store, files = plan.source, LOCAL_FILES, list(plan.files)
    if not files:
        store, files = _hub_files(source)
    try:
        build_files(
            files,
            tokenizer,
            os.path.join(output, source.name),
            workers=workers,
            text_key=source.text_key,
            template=source.template,
            on_error=on_error,
            add_special_tokens=add_special_tokens,
            max_tokens=plan.wanted,
            overwrite=overwrite,
            announce=announce,
            progress=source.name if progress else None,
            store=store,
            origin=_origin(plan, root),
        )
    except UserError as error:
        if error.field != "--input":
            raise
        raise UserError(f"{recipe.path}: {source.name}", error.found, error.expected) from None


def _hub_files(source: Source) -> tuple[FileStore, list[str]]:
    from remit_megatron.data.hub import HubFiles

    assert source.hub is not None, source.name
    store = HubFiles(source.hub)
    return store, sorted(store.files, key=_scattered)


def table(plans: Sequence[Plan]) -> str:
    """One line a source: share, tokens wanted, tokens there, state."""
    width = max(len(plan.source.name) for plan in plans)
    lines = [f"{'source':<{width}}  {'share':>9}  {'wanted':>8}  {'tokens':>8}  state\n"]
    for plan in plans:
        wanted = "all" if plan.wanted is None else format_count(plan.wanted)
        tokens = "" if plan.manifest is None else format_count(plan.manifest.tokens)
        state = f"{plan.state}: {plan.reason}" if plan.reason else plan.state
        if plan.state in ("local", "hub"):
            state = (
                f"to be built, {len(plan.files)} files"
                if plan.files
                else f"to be built from the hub, {plan.source.hub}"
            )
        elif plan.state == "done" and plan.manifest is not None and plan.wanted and plan.manifest.tokens < plan.wanted:
            state = f"done: the mix goes through it {plan.wanted / plan.manifest.tokens:.2f} times"
        lines.append(f"{plan.source.name:<{width}}  {plan.share:>9.4%}  {wanted:>8}  {tokens:>8}  {state}\n")
    total = sum(plan.wanted or 0 for plan in plans)
    summed = f"{math.fsum(plan.share for plan in plans):>9.4%}  {format_count(total) if total else 'all':>8}"
    return "".join([*lines, f"{'sum':<{width}}  {summed}\n"])


def advice(plans: Sequence[Plan], root: str) -> str:
    """What to do about each source that is missing."""
    lines = []
    for plan in plans:
        if plan.state == "missing":
            place = f"put its documents at {', '.join(os.path.join(root, item) for item in plan.source.files)}"
            if plan.source.hub is not None:
                place += f", or give --hub to read {plan.source.hub}"
            lines.append(f"{plan.source.name} is missing ({plan.reason}): {place}\n")
    return "".join(lines)
