"""Errors for old names of arguments and attributes, which give the new name."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)


def renamed_arguments(**new_names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the function raises TypeError, with the new name, for an argument given by its old name."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in kwargs.keys() & new_names.keys():
                raise TypeError(f"{function.__name__}() has no argument {old!r}: it is called {new_names[old]!r}")
            return function(*args, **kwargs)

        return checked

    return decorate


def renamed_attributes(**new_names: str) -> Callable[[C], C]:
    """A class decorator: an old attribute name raises AttributeError with the new name."""

    def decorate(cls: C) -> C:
        def missing(self: object, name: str) -> Any:
            hint = f": it is called {new_names[name]!r}" if name in new_names else ""
            raise AttributeError(f"{cls.__name__!r} object has no attribute {name!r}{hint}", name=name, obj=self)

        cls.__getattr__ = missing  # type: ignore[attr-defined]  # set here so that type checkers still find typos
        return cls

    return decorate
