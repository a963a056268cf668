"""What the tests of mistakes share."""

import pytest


def error_of(kind: type[Exception], function, *args, **kwargs) -> str:
    """The message of the error that a call raises, one line."""
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)
