"""Never to raise into LMCache: what goes wrong in a call is counted and logged, and answered with a miss."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, Protocol, TypeVar, cast

from vcache.errors import LocalStateError
from vcache.logs import Line

_log = logging.getLogger("vcache.integration.lmcache")

Method = TypeVar("Method", bound=Callable[..., Any])


class Failures:
    """How many calls went wrong in a way that nobody expected."""

    def __init__(self) -> None:
        self.count = 0

    def note(self, method: str, error: Exception) -> None:
        """Count and log one."""
        self.count += 1
        if isinstance(error, LocalStateError):  # closed: LMCache goes on for a moment
            _log.debug(Line("after the end", method=method, error=str(error)))
        else:
            _log.error(Line("a call failed; LMCache sees a miss", method=method), exc_info=error)


class _Failing(Protocol):
    failures: Failures


def otherwise(answer: Callable[[Any], Any]) -> Callable[[Method], Method]:
    """Whatever goes wrong in the method is noted in its object's `failures`, and LMCache gets
    `answer(first argument)`, however that was passed.
    """

    def decorate(method: Method) -> Method:
        _, first, *_ = *signature(method).parameters, ""  # self, and what follows it if anything does

        def failed(self: _Failing, given: tuple[Any, ...], named: dict[str, Any], error: Exception) -> Any:
            self.failures.note(method.__name__, error)
            return answer(given[0] if given else named.get(first))

        @wraps(method)
        def call(self: _Failing, *given: Any, **named: Any) -> Any:
            try:
                return method(self, *given, **named)
            except Exception as error:  # an exception would go up into the inference engine and end it
                return failed(self, given, named, error)

        @wraps(method)
        async def await_it(self: _Failing, *given: Any, **named: Any) -> Any:
            try:
                return await method(self, *given, **named)
            except Exception as error:
                return failed(self, given, named, error)

        return cast(Method, await_it if asyncio.iscoroutinefunction(method) else call)

    return decorate


def false(_: Any) -> bool:
    """Not there."""
    return False


def zero(_: Any) -> int:
    """None of them."""
    return 0


def none(_: Any) -> None:
    """Nothing."""


def empty(_: Any) -> list[Any]:
    """No leading chunks."""
    return []


def nones(keys: Any) -> list[None]:
    """Of each key, nothing."""
    return [None] * len(keys or ())
