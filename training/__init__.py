"""The training pipeline. The commands are at the top; `method`, `data`, `engine` and `evaluation` hold their parts."""

import importlib
import importlib.abc
import importlib.util
import sys

# Modules that lay flat in this package up to version 0.1: their old names still import.
MOVED = {
    "augment": "method.augment",
    "backbones": "evaluation.backbones",
    "cache": "data.ingest",
    "export": "engine.export",
    "intervals": "evaluation.intervals",
    "pairs": "method.pairs",
    "protocols": "evaluation.protocols",
    "report": "evaluation.report",
    "simulate": "data.simulate",
    "step": "method.step",
    "tasks": "evaluation.datasets",
}


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        package, _, module = name.rpartition(".")
        return importlib.util.spec_from_loader(name, self) if package == __name__ and module in MOVED else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        name = module.__name__
        sys.modules[name] = importlib.import_module(f"{__name__}.{MOVED[name.rpartition('.')[2]]}")


sys.meta_path.append(_Moved())
