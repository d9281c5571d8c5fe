"""Optional packages: imported where they are used, with an error that names the extra to install."""

import importlib
from typing import Any


def import_extra(module: str, extra: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: Name of the module, for instance ``"timm"``.
        extra: The extra of captum-scoremap that installs it, for instance ``"demo"``.

    Returns:
        The module.

    Raises:
        ModuleNotFoundError: The package is not installed; the message has the line to type.

    Example:
        >>> import_extra("math", "demo").sqrt(4.0)
        2.0
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f'{package} is not installed. Do python -m pip install "captum-scoremap[{extra}]".',
            name=error.name,
        ) from None
