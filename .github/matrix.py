"""Print a part of matrix.json for GitHub's `fromJSON`: images, gpu, or untested (as Markdown).

Standard library alone, because it runs before anything is installed.
"""

import json
import sys
from pathlib import Path


def part(name: str, matrix: dict[str, list[dict[str, str]]]) -> str:
    """Return one part as text.

    Args:
        name: "images" to build, "gpu" suites that have a runner, or "untested" ones that have none.
        matrix: what `make render` wrote.

    Raises:
        KeyError: there is no such part.
    """
    suites = {
        "images": matrix["images"],
        "gpu": [entry for entry in matrix["gpu"] if entry["runner"]],
        "untested": [entry for entry in matrix["gpu"] if not entry["runner"]],
    }[name]
    if name != "untested":
        return json.dumps(suites)
    rows = [f"| {entry['image']} | {entry['arch']} | no runner |" for entry in suites]
    return "\n".join(["| image | GPU | not tested, because |", "| --- | --- | --- |", *rows])


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments not in (["images"], ["gpu"], ["untested"]):
        sys.exit(
            f"matrix: there is no part {' '.join(arguments)!r}\n"
            "  why: known: images, gpu, untested\n  do:  make matrix/images"
        )
    matrix = json.loads(Path(__file__).with_name("matrix.json").read_text(encoding="utf-8"))
    sys.stdout.write(part(arguments[0], matrix) + "\n")
