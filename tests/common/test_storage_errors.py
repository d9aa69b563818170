"""Test the codes of errors from object storage."""

import pytest

from qwen_vit.checkpoint.hub import _with_cause
from qwen_vit.common.storage import service_code
from qwen_vit.errors import HubError


class ServiceError(Exception):
    response = {"Error": {"Code": "SlowDown"}}  # noqa: RUF012 - as botocore spells it


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def test_the_code_of_a_cause_is_found() -> None:
    assert service_code(caused_by(OSError("a"), ServiceError())) == "SlowDown"
    assert service_code(caused_by(OSError("a"), OSError("b"))) == service_code(None) == ""


@pytest.mark.timeout(10)
def test_errors_that_cause_each_other_end_the_search() -> None:
    """The search was once endless after a retry that raised an earlier error from a later error."""
    first, second = OSError("first"), OSError("second")
    caused_by(second, caused_by(first, second))
    assert service_code(first) == ""
    assert _with_cause(HubError("no answer"), first).__notes__ == ["Cause: OSError: second"]
