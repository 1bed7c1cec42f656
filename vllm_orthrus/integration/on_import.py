"""Doing something as soon as a module has been imported, whoever imports it, and without importing it."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Action = Callable[[], None]


class _Watcher(MetaPathFinder):
    """Stands before all other finders, asks them, and has the module's own loader tell when it is done."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Action]] = {}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.waiting:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                execute(module)
                for action in self.waiting.pop(module.__name__, []):
                    action()

            spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


_watcher = _Watcher()


def when_imported(module: str, action: Action) -> None:
    """Act now if the module is there already, else right after its first import."""
    if module in sys.modules:
        action()
        return
    if _watcher not in sys.meta_path:
        sys.meta_path.insert(0, _watcher)
    _watcher.waiting.setdefault(module, []).append(action)
