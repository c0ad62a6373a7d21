"""The phases of a run: folders below its own, in the order in which they are trained.

RUN/phases.json           {"phases": [name, ...]}
RUN/NAME/                 a run folder, whose start is the last checkpoint of the phase before
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from distill_pretrain.errors import CheckpointError
from distill_pretrain.files.atomic import canonical_json, publish_bytes

PHASES = "phases.json"
NAME = "[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
"""Regular expression of the name of a phase."""


def write_phases(run: Path, names: list[str]) -> None:
    """Record the phases of a run, so that whoever reads its folder finds them."""
    run.mkdir(parents=True, exist_ok=True)
    publish_bytes(run / PHASES, canonical_json({"phases": names}))


def phase_folders(run: Path) -> list[Path]:
    """Return the folders of a run's phases in their order, begun or not; empty for a run without phases.

    Raises:
        CheckpointError: the list is damaged.
    """
    path = run / PHASES
    try:
        names = json.loads(path.read_bytes())["phases"]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            "the list of a run's phases is damaged", where=path, found=error
        ) from None
    if not isinstance(names, list) or not all(re.fullmatch(NAME, f"{name}") for name in names):
        raise CheckpointError("the list of a run's phases is damaged", where=path, found=names)
    return [run / name for name in names]
