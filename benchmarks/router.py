"""Measure the overhead of attnimg's router per attention call.

    python benchmarks/router.py [--json]

Times the same empty function called directly and through the router, with the arguments that a
model passes, in process time on one thread; the fastest of several rounds counts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

ROUNDS, CALLS = 15, 20_000
BOUND_US = 6.0


def microseconds_a_call(function: Callable[..., Any], *tensors: Any, **arguments: Any) -> float:
    """Return the CPU time of a call of a function, in microseconds."""
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.process_time()
        for _ in range(CALLS):
            function(None, *tensors, None, **arguments)
        best = min(best, (time.process_time() - begin) / CALLS)
    return best * 1e6


def main() -> int:
    """Measure, print, and exit with 1 above the bound."""
    import torch

    from attnimg.application.router import Router, Shape

    torch.set_num_threads(1)

    def nothing(*_tensors: Any, **_arguments: Any) -> None:
        """Do nothing, in place of a backend."""

    q, k = torch.empty(1, 8, 16, 256), torch.empty(1, 4, 16, 256)
    arguments = {
        "scaling": 0.0625,
        "dropout": 0.0,
        "sliding_window": 512,
        "position_ids": torch.arange(16)[None],
        "use_cache": False,
    }
    shapes = [Shape(256, 256, 512, None, False), Shape(512, 512, None, None, False)]
    routed = microseconds_a_call(Router(dict.fromkeys(shapes, nothing)), q, k, k, **arguments)
    direct = microseconds_a_call(nothing, q, k, k, **arguments)
    overhead = routed - direct
    if "--json" in sys.argv:
        print(json.dumps({"routed_us": routed, "direct_us": direct, "overhead_us": overhead}))
    else:
        print(f"router: {overhead:.2f} us a call (bound {BOUND_US} us), direct {direct:.2f} us")
    return int(overhead > BOUND_US)


if __name__ == "__main__":
    sys.exit(main())
