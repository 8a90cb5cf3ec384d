"""Attributes that import their module when they are first asked for, so that ``import lineas`` stays light."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import MethodType
from typing import Any


def lazy_import(module: str, name: str | None = None) -> Any:
    """Attribute `name` of ``lineas.<module>``, or the module itself; an ImportError says how to install torch."""
    try:
        found = import_module(f"lineas.{module}")
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise ImportError(f'{name or module} needs torch: pip install "lineas[torch]"') from error
        raise
    return found if name is None else getattr(found, name)


class lazy_method:
    """A method that is ``lineas.<module>.<name>``, from further down the import order.

    The object is the function's first argument unless it is `static`. Signature, description and types stand with the
    function. Where its module cannot be imported there is one that raises the ImportError when it is called, so that
    looking at an object is no error.
    """

    def __init__(self, module: str, name: str, *, static: bool = False) -> None:
        self.module, self.name, self.static = module, name, static

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        try:
            function = lazy_import(self.module, self.name)
        except ImportError as error:
            function = _raiser(error)
        return function if instance is None or self.static else MethodType(function, instance)


def _raiser(error: ImportError) -> Callable[..., Any]:
    def missing(*args: Any, **options: Any) -> Any:
        raise error

    missing.__doc__ = str(error)
    return missing
