from dataclasses import dataclass
@dataclass(frozen=True)
class Sampling:
    fps: float = 1.0
def sample_frames(*a, **k): raise NotImplementedError
