"""Attributes that import their module when they are first asked for, so that ``import lineas`` stays light."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import MethodType
from typing import Any


def lazy_import(module: str, name: str | None = None) -> Any:
    """Return attribute `name` of ``lineas.<module>``, or the module itself.

    Raises
    ------
    ImportError
        If the module needs a package that is not installed; names what to install where that is torch.
    """
    try:
        found = import_module(f"lineas.{module}")
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise ImportError(f'{name or module} needs torch: pip install "lineas[torch]"') from error
        raise
    return found if name is None else getattr(found, name)


class lazy_method:
    """A method that is a function of a module further down the import order, with the object as its first argument.

    Signature, description and types stand with the function. Where the module cannot be imported, the class does not
    have the attribute and an instance raises the ImportError.

    Parameters
    ----------
    module, name : str
        The function ``lineas.<module>.<name>``.
    """

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        if instance is not None:
            return MethodType(lazy_import(self.module, self.name), instance)
        try:
            return lazy_import(self.module, self.name)
        except ImportError as error:
            raise AttributeError(str(error)) from error
