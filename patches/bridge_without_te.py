"""`import megatron.bridge` where Transformer Engine is absent.

Upstream: megatron/bridge/peft/lora_layers.py, Megatron-Bridge 0.6: the module of the LoRA adapters imports
`transformer_engine.pytorch` without a guard, for annotations and for three classes that it compares others with, and
every part of Bridge imports that module. What needs Transformer Engine to run still ends in an error there, and nobody
else finds anything: Megatron-Core's own probes go on saying that Transformer Engine is absent.
"""

import builtins
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

_ADAPTERS = "megatron.bridge.peft.lora_layers"
_ENGINE = "transformer_engine"


class Absent:
    """The class of no object, in the place of each class that Bridge asks whether a module belongs to."""


_STAND_IN = SimpleNamespace(
    pytorch=SimpleNamespace(Linear=Absent, LayerNormLinear=Absent, ops=SimpleNamespace(Sequential=Absent))
)


def apply() -> bool:
    """Prepare the import, and say whether that is needed and not done yet."""
    if importlib.util.find_spec(_ENGINE) is not None:
        return False
    if any(isinstance(finder, _Adapters) for finder in sys.meta_path) or _ADAPTERS in sys.modules:
        return False
    sys.meta_path.insert(0, _Adapters())
    return True


class _Adapters(MetaPathFinder):
    """Gives the module of the adapters, and that module alone, a loader of ours."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _ADAPTERS:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _WithStandIn(spec.loader)
        return spec


class _WithStandIn(Loader):
    """Runs a module whose own import statements find a stand-in for Transformer Engine."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        def import_(name: str, *args: Any, **kwargs: Any) -> Any:
            if name.partition(".")[0] == _ENGINE:
                return _STAND_IN
            return builtins.__import__(name, *args, **kwargs)

        # A module's import statements use its own builtins: no other module sees the stand-in.
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": import_}
        try:
            self._loader.exec_module(module)
        finally:
            module.__dict__["__builtins__"] = builtins
