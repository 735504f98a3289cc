"""Messages of libraries for their own developers are dropped while they are imported; errors are not."""

import logging
import warnings

from vidlada.noise import NOISY_LIBRARIES, quiet_libraries


def test_warnings_are_dropped_and_errors_told(caplog):
    with quiet_libraries():
        for name in NOISY_LIBRARIES:
            logging.getLogger(name).warning("of %s", name)
            logging.getLogger(name).error("of %s", name)
    assert [(record.name, record.levelname) for record in caplog.records] == [(n, "ERROR") for n in NOISY_LIBRARIES]
    caplog.clear()
    logging.getLogger(NOISY_LIBRARIES[0]).warning("afterwards")
    assert [record.message for record in caplog.records] == ["afterwards"]


def test_other_warnings_are_told():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet_libraries():
            warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
            warnings.warn("something else", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["something else"]
