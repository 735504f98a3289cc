"""Ask videos questions with VidLaDA, a video language model built on masked diffusion.

>>> import vidlada
>>> model = vidlada.load()
>>> print(model.ask("examples/order.mp4", "how many things are in the video ?"))
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from vidlada.errors import InputError, VidLaDAError

if TYPE_CHECKING:
    from vidlada.api import VidLaDA
    from vidlada.conversation import Answer, Conversation, EncodedVideo
    from vidlada.loading import load

LAZY = {
    "Answer": "conversation", "Conversation": "conversation", "EncodedVideo": "conversation", "VidLaDA": "api",
    "load": "loading",
}  # fmt: skip

try:
    __version__ = version("vidlada")
except PackageNotFoundError:  # a copied working tree, as on a GPU machine with nothing but torch and transformers
    __version__ = "0+unknown"
__all__ = ["Answer", "Conversation", "EncodedVideo", "InputError", "VidLaDA", "VidLaDAError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import torch and the model only when they are asked for, so that `vidlada --help` answers at once."""
    if name in LAZY:
        from vidlada.noise import quiet_libraries

        with quiet_libraries():
            return getattr(import_module(f"vidlada.{LAZY[name]}"), name)
    raise AttributeError(f"module 'vidlada' has no attribute {name!r}")
