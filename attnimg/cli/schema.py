"""Run `attnimg schema`: print the JSON Schema of a config, for editors."""

from __future__ import annotations

import json

from attnimg.cli import json_line


def schema(as_json_lines: bool) -> None:
    """Print the JSON Schema of a config (draft 2020-12)."""
    from attnimg.config.json_schema import config_schema

    found = config_schema()
    print(json_line(found) if as_json_lines else json.dumps(found, indent=1))
