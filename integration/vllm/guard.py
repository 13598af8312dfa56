"""No exception of ours reaches vLLM after start-up: it becomes a log line and the answer "nothing"."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

_log = logging.getLogger("vcache.integration.vllm")

Method = TypeVar("Method", bound=Callable[..., Any])


def guarded(nothing: Callable[[], Any]) -> Callable[[Method], Method]:
    """A method that returns `nothing()` where it would raise."""

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        def guarded_method(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except Exception:
                _log.exception("%s failed; vLLM goes on without it", method.__name__)
                return nothing()

        return guarded_method  # type: ignore[return-value]

    return decorate
