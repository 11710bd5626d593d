"""Compare the keys of axolotl's own schema with the record that attnimg's answers are tested on."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path

import axolotl.utils.schemas.datasets as dataset_schemas
from axolotl.utils.schemas.config import AxolotlInputConfig
from axolotl_record import KEYS_RECORD


def plugin_keys() -> set[str]:
    """Return the keys that axolotl's plugins add; their modules import packages of their own."""
    spec = importlib.util.find_spec("axolotl.integrations")
    assert spec
    assert spec.submodule_search_locations
    return {
        field.target.id
        for path in Path(spec.submodule_search_locations[0]).glob("*/args.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Args")
        if node.name != "CompressionArgs"  # the value of llmcompressor
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


def entry_keys(suffix: str) -> set[str]:
    """Return the keys of the schemas of dataset entries whose names have an ending."""
    found = (value for name, value in vars(dataset_schemas).items() if name.endswith(suffix))
    return {key for schema in found for key in schema.model_fields}


def test_the_record_has_the_keys_of_the_schema_and_of_all_plugins() -> None:
    found = {
        "keys": sorted(AxolotlInputConfig.model_fields.keys() | plugin_keys()),
        "dataset_keys": sorted(entry_keys("Dataset")),
        "type_keys": sorted(entry_keys("PrompterType")),
    }
    record = json.loads(KEYS_RECORD.read_text(encoding="utf-8"))
    if os.environ.get("AXOLOTL_RECORD"):
        record |= {"axolotl": importlib.metadata.version("axolotl"), **found}
        KEYS_RECORD.write_text(f"{json.dumps(record, indent=1)}\n", encoding="utf-8")
    assert {name: record[name] for name in found} == found
