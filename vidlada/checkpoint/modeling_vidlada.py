"""What `trust_remote_code=True` runs for a VidLaDA checkpoint: the installed vidlada package, nothing else.

A copy of this file lies beside the weights; the configuration's `auto_map` names its classes.
"""

try:
    from vidlada.model.config import VidLaDAConfig
    from vidlada.model.video_model import VidLaDAForMaskedDiffusion
    from vidlada.processor import VidLaDAProcessor
except ImportError as error:
    raise ImportError("this checkpoint needs the vidlada package: pip install vidlada") from error

__all__ = ["VidLaDAConfig", "VidLaDAForMaskedDiffusion", "VidLaDAProcessor"]
