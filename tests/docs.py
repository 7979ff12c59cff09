"""The API reference, from the docstrings: `make docs` writes it to build/docs. A warning of pdoc is an error."""

from __future__ import annotations

import pkgutil
import sys
import typing
import warnings
from pathlib import Path

import pdoc

import daemon_fast

NOT_FOR_USERS = ("_C", "__main__", "cli", "experiments")


def modules() -> list[str]:
    """Names of the modules that pdoc is asked for. A package brings those of its modules that its __all__ lists."""
    asked = ["daemon_fast"]
    for module in pkgutil.walk_packages(daemon_fast.__path__, "daemon_fast."):
        private = module.name.split(".")[1] in NOT_FOR_USERS
        if not private and module.name not in pdoc.extract.walk_specs(asked):
            asked.append(module.name)
    return asked


def build(output: Path) -> None:
    """Write a page for each module into the folder `output`."""
    # pdoc reads the module's dictionary, which holds a name only once it has been asked for.
    vars(daemon_fast).update({name: getattr(daemon_fast, name) for name in daemon_fast.__all__})
    # pdoc evaluates annotations where a function was defined, which for a NamedTuple's is another module.
    for module in [module for name, module in sys.modules.items() if name.startswith("daemon_fast.")]:
        for value in vars(module).values():
            if isinstance(value, type) and hasattr(value, "_fields") and value.__module__ == module.__name__:
                value.__new__.__annotations__ = typing.get_type_hints(value)
    pdoc.render.configure(docformat="numpy", footer_text=f"daemon_fast {daemon_fast.__version__}")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pdoc")
        pdoc.pdoc(*modules(), output_directory=output)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
