"""Maps as graphs: compiled, or exported to run beside the model in production."""

from .backends import Backend, Mode
from .batches import Batches
from .checked import elsewhere
from .compiled_map import CompiledMap, Exported, compile_map

__all__ = ["Backend", "Batches", "CompiledMap", "Exported", "Mode", "compile_map", "elsewhere"]
