"""The switch that lets fused modules run their original forward."""

from __future__ import annotations

import os
from contextvars import ContextVar

_disabled = ContextVar("resfuse_disabled", default=os.environ.get("RESFUSE_DISABLE", "0") not in ("", "0"))


class disabled:
    """Context manager: fused modules run their original forward inside it, in this thread.

    `RESFUSE_DISABLE=1` in the environment does so for good.
    """

    def __enter__(self) -> None:
        self.token = _disabled.set(True)

    def __exit__(self, *_) -> None:
        _disabled.reset(self.token)


def is_disabled() -> bool:
    """Whether they do, in this thread."""
    return _disabled.get()
