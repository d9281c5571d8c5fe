"""Maps as graphs: compiled, or exported to run beside the model in production."""

from .compiled_map import CompiledMap, compile_map

__all__ = ["CompiledMap", "compile_map"]
