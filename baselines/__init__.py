"""Methods to compare: one file each, registered by name when this package is imported."""

import importlib
import pkgutil

import qvsr.quantvsr  # noqa: F401  (registers quantvsr)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
