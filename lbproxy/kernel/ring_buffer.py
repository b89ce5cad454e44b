"""Ring buffers, by which programs tell what they see."""

import ctypes
import errno

from lbproxy.kernel import libbpf

_ON_RECORD = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


libbpf.LIB.ring_buffer__new.restype = ctypes.c_void_p


class Ring:
    """The reading end of a ring buffer."""

    def __init__(self, fd: int) -> None:
        self._records: list[bytes] = []

        def keep(_context: int | None, data: int, size: int) -> int:
            self._records.append(ctypes.string_at(data, size))
            return 0

        # Held on to: libbpf calls it for as long as the ring lives.
        self._keep = _ON_RECORD(keep)
        self._ring = ctypes.c_void_p(libbpf.LIB.ring_buffer__new(fd, self._keep, None, None))
        if not self._ring:
            raise OSError(ctypes.get_errno(), "read ring buffer")

    def poll(self, timeout_s: float) -> list[bytes]:
        """What has come, after at most so long a wait."""
        result = libbpf.LIB.ring_buffer__poll(self._ring, int(timeout_s * 1000))
        if -result != errno.EINTR:
            libbpf.check(result, "read ring buffer")
        return self._taken()

    def rest(self) -> list[bytes]:
        """What has come already. Unlike `poll` it does not depend on anybody having been woken for it."""
        libbpf.check(libbpf.LIB.ring_buffer__consume(self._ring), "read ring buffer")
        return self._taken()

    def _taken(self) -> list[bytes]:
        found, self._records[:] = list(self._records), []
        return found

    def close(self) -> None:
        """Read no more."""
        libbpf.LIB.ring_buffer__free(self._ring)
