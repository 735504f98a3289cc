"""Silence warnings that libraries address to their own developers; errors stay visible."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# transformers imports torchao wherever it is installed, which then warns of every kernel this machine lacks; accelerate
# imports DeepSpeed, which warns on stdout, where our results go
NOISY_LIBRARIES = ("torchao", "torch.utils._pytree", "DeepSpeed")
RENAMED = "`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated"  # peft and we use the older name


@contextmanager
def quiet_libraries(*more: str) -> Iterator[None]:
    """Drop such messages while the context is open; used where those libraries are imported or called.

    Args:
        more: names of further loggers to silence but for errors.
    """
    loggers = [logging.getLogger(name) for name in (*NOISY_LIBRARIES, *more)]
    for logger in loggers:
        logger.addFilter(_only_errors)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", RENAMED, FutureWarning)
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(_only_errors)


def _only_errors(record: logging.LogRecord) -> bool:
    """Filter of a logger whose library sets its level when it is imported."""
    return record.levelno >= logging.ERROR
