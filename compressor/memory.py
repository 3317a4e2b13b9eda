"""What the process holds of memory that it no longer uses."""

import contextlib
import ctypes


def trim() -> None:
    """Give memory that the process has freed back to the operating system, where the C library can.

    glibc keeps what lies between living pieces, which grows to gigabytes where tensors of megabytes come and go.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other systems
        ctypes.CDLL(None).malloc_trim(0)
