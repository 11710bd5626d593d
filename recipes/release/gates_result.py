"""Read what the gates found in an image: dist/NAME-gates.json, which `make gate/NAME` writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from recipes.facts import Digest, Strict
from recipes.release.programs import report
from recipes.run_gates import GateResult


@dataclass(frozen=True, kw_only=True, slots=True)
class GatesResult(Strict):
    """The result of all gates about one image.

    Attributes:
        image: its name.
        source, kind: what was read.
        layers: of the image.
        gates: the result of each.
        passed: whether none has a finding.
        image_id: digest of its configuration.
        digest: of its manifest, as it is pushed.
        checked_by: hash of the recipes, lock files and gates.
        evidence: kind of a statement -> sha256 of its file in dist/.
    """

    image: str
    source: str
    kind: Literal["image"]
    layers: tuple[Mapping[str, Any], ...]
    gates: tuple[GateResult, ...]
    passed: bool
    image_id: Digest
    digest: Digest
    checked_by: str
    evidence: Mapping[str, str]


_GATES_RESULT = TypeAdapter(GatesResult)


def gates_result_path(name: str) -> str:
    """Return the file, under the checkout."""
    return f"dist/{name}-gates.json"


def read_gates_result(name: str, root: Path) -> GatesResult | None:
    """Return the gates' result; None if there is none, or only a damaged one.

    A damaged one is reported and not an error: `make gate/NAME` writes it again.
    """
    path = root / gates_result_path(name)
    try:
        return _GATES_RESULT.validate_json(path.read_bytes(), strict=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        why = str(error.strerror)
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
    report(f"  {path} is not a result of the gates: {why}")
    return None
