"""A context's `io.json` as fiddle reads it: what is built, and from which arguments, by metadata and references.

The texts of paths beside the values are for people; fiddle does not look at them, and neither does this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_METADATA = "fiddle._src.config.BuildableTraverserMetadata"
_CONFIGURATIONS = ("fiddle", "nemo_run")
_CONTAINERS = ("builtins", "collections")

Place = tuple[Any, Any]
"""A list or dictionary, and the index or key of something in it."""


@dataclass(frozen=True)
class Node:
    """An object that fiddle makes of some values."""

    kind: str
    """Its class by its full name."""
    items: list[list[Any]]
    """Text of a path, and value; fiddle reads the value alone."""
    metadata: Any

    @property
    def is_container(self) -> bool:
        """Whether it is a list, a dictionary or the like, whose making calls nothing."""
        return self.kind.partition(".")[0] in _CONTAINERS

    @property
    def is_tuple(self) -> bool:
        """Whether it is a tuple with names, of a class that its metadata repeat."""
        return isinstance(self.metadata, dict) and self.metadata.get("type") == "pyref"

    @property
    def is_artifact(self) -> bool:
        """Whether NeMo takes its one value for the path of a pickle."""
        return (
            not self.is_container
            and self.kind.partition(".")[0] not in _CONFIGURATIONS
            and len(self.items) == 1
        )


class Graph:
    """The graph of the whole file.

    Raises:
        ValueError: In all methods: it is not what fiddle writes. KeyError: A reference leads nowhere.
    """

    def __init__(self, content: Any):
        if not isinstance(content, dict) or not isinstance(content.get("objects"), dict):
            raise ValueError("no objects")
        self.content, self._objects = content, content["objects"]
        self.nodes = [self._node(one) for one in dictionaries(content) if isinstance(one.get("type"), dict)]

    def calls(self) -> Iterator[tuple[tuple[str, str], list[tuple[Place, Any]]]]:
        """Yield module and name of everything that is called, and its arguments: place of the name, and value."""
        for node in self.nodes:
            if node.is_container or node.is_tuple or (node.is_artifact and node.metadata is None):
                continue
            described = self._node(self.resolved(node.metadata))
            if described.kind != _METADATA or len(described.items) < 2:
                raise ValueError(f"'{node.kind}' with metadata of '{described.kind}'")
            function, names = (item[1] for item in described.items[:2])
            self._reference(function)
            yield (function["module"], function["name"]), self._arguments(names, node)

    def dictionaries(self) -> Iterator[list[tuple[Place, Any]]]:
        """Yield the keys and values of every dictionary of the graph: place of the key, and value."""
        for node in self.nodes:
            if node.kind == "builtins.dict":
                yield self._arguments(node.metadata, node)

    def artifacts(self) -> Iterator[str]:
        """Yield the paths of pickles that NeMo opens."""
        for node in self.nodes:
            if not node.is_artifact:
                continue
            container, key = self.place(node.items[0], 1)
            value = container[key]
            if isinstance(value, str):
                yield value
            elif isinstance(value, dict) and self._is_path(value.get("type")):
                raise ValueError("a path object in the place of a pickle's path")

    def place(self, container: Any, key: Any) -> Place:
        """Return the place of the value that a place refers to, behind references and leaves."""
        for _ in range(len(self._objects) + 2):
            value = container[key]
            if not isinstance(value, dict) or value.get("type") not in ("ref", "leaf"):
                return container, key
            container, key = (self._objects, value["key"]) if value["type"] == "ref" else (value, "value")
            if container is value:
                return container, key
        raise ValueError("references in a circle")

    def resolved(self, value: Any) -> Any:
        """Return the value behind references and leaves."""
        container, key = self.place([value], 0)
        return container[key]

    def _arguments(self, names: Any, node: Node) -> list[tuple[Place, Any]]:
        names = self.resolved(names)
        if isinstance(names, dict):
            sequence = self._node(names)
            if sequence.kind not in ("builtins.tuple", "builtins.list"):
                raise ValueError(f"names in a '{sequence.kind}'")
            places = [self.place(item, 1) for item in sequence.items]
        elif isinstance(names, list):
            places = [self.place(names, index) for index in range(len(names))]
        else:
            raise ValueError(f"names in {names!r}")
        if len(places) != len(node.items):
            raise ValueError(f"{len(node.items)} values of {len(places)} names")
        return [(place, self.resolved(item[1])) for place, item in zip(places, node.items, strict=True)]

    def _node(self, value: Any) -> Node:
        items = value["items"] if isinstance(value, dict) and "items" in value else None
        if not isinstance(items, list) or not all(
            isinstance(item, list) and len(item) == 2 for item in items
        ):
            raise ValueError("an object without a list of its values")
        node = Node(self._reference(value["type"]), items, value.get("metadata"))
        # Fiddle calls the class in the metadata of a named tuple with its values.
        if node.is_tuple and self._reference(node.metadata) != node.kind:
            raise ValueError(f"'{node.kind}' that is built by '{self._reference(node.metadata)}'")
        if node.kind == _METADATA and not node.is_tuple:
            raise ValueError(f"'{node.kind}' without its class")
        return node

    def _is_path(self, kind: Any) -> bool:
        return isinstance(kind, dict) and self._reference(kind).startswith("pathlib.")

    @staticmethod
    def _reference(value: Any) -> str:
        if not isinstance(value, dict) or value.get("type") != "pyref":
            raise ValueError(f"{str(value)[:100]} where a class or function was expected")
        return f"{value['module']}.{value['name']}"


def dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every dictionary in a JSON value."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield one
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
