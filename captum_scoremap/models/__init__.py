"""Ready models and images: load a classifier whole, make it fast for explaining, read any image file."""

from captum_scoremap.data.pictures import SAMPLES, read_image
from captum_scoremap.models.loaded import LoadedModel
from captum_scoremap.models.loading import DEFAULT_MODEL, load_model
from captum_scoremap.models.prepare import prepare
from captum_scoremap.models.preprocessing import Preprocessing

__all__ = ["DEFAULT_MODEL", "SAMPLES", "LoadedModel", "Preprocessing", "load_model", "prepare", "read_image"]
