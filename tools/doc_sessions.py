"""Extend Griffe for the documentation site, so that sessions in docstrings become code blocks.

Griffe turns `>>>` lines into code only below "Examples:". The docstrings here have their session
after the first sentence, where Markdown would read `>>>` as quotations.
"""

import re
from typing import Any

from griffe import Extension, GriffeLoader, Object

__all__ = ["Sessions", "with_code_blocks"]

SESSION = re.compile(r"(?:^>>>.*\n(?:^(?!\s*$).+\n?)*)+", re.MULTILINE)


def with_code_blocks(text: str) -> str:
    """Put each session of a docstring in a fence.

    >>> print(with_code_blocks("Add.\\n\\n>>> 1 + 1\\n2\\n\\nReturns:\\n    A sum."))
    Add.
    <BLANKLINE>
    ```python
    >>> 1 + 1
    2
    ```
    <BLANKLINE>
    Returns:
        A sum.
    """
    return SESSION.sub(lambda match: f"```python\n{match[0].rstrip()}\n```\n", text)


class Sessions(Extension):
    """Put the sessions of every docstring that Griffe has read in fences."""

    def on_object(self, *, obj: Object, loader: GriffeLoader, **_: Any) -> None:
        """Replace the object's docstring."""
        docstring = obj.docstring
        if docstring is not None and ">>>" in docstring.value:
            docstring.value = with_code_blocks(docstring.value)
