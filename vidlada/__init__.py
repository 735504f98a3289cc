"""Ask videos questions with VidLaDA, a video language model built on masked diffusion.

>>> import vidlada
>>> model = vidlada.load()
>>> print(model.ask("examples/shapes.mp4", "how many shapes are there ?"))
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from vidlada.errors import InputError, VidLaDAError

if TYPE_CHECKING:
    from vidlada.api import Answer, Conversation, EncodedVideo, VidLaDA, load

__version__ = version("vidlada")
__all__ = ["Answer", "Conversation", "EncodedVideo", "InputError", "VidLaDA", "VidLaDAError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import torch and the model only when they are asked for, so that `vidlada --help` answers at once."""
    if name in __all__:
        from vidlada.noise import quiet_libraries

        with quiet_libraries():
            from vidlada import api

        return getattr(api, name)
    raise AttributeError(f"module 'vidlada' has no attribute {name!r}")
