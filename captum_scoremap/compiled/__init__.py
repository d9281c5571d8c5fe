"""Maps as graphs: compiled, or exported to run beside the model in production."""

from .compiled_map import CompiledMap, Exported, compile_map

__all__ = ["CompiledMap", "Exported", "compile_map"]
