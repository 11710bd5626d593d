"""Test that code of a run that calls sys.exit() does not make the run look finished."""

from __future__ import annotations

import pytest

from attnimg.errors import AttnimgError
from attnimg.train.run import _exits_as_errors


@pytest.mark.parametrize("code", [0, None, 3, "text"])
def test_an_exit_is_an_error(code: object) -> None:
    with pytest.raises(AttnimgError) as caught, _exits_as_errors():
        raise SystemExit(code)
    assert (caught.value.code, caught.value.exit_code) == ("exited", 1)
    assert f"SystemExit({code!r})" in caught.value.why


def test_other_errors_and_none_pass_through() -> None:
    with _exits_as_errors():
        pass
    with pytest.raises(KeyboardInterrupt), _exits_as_errors():
        raise KeyboardInterrupt
