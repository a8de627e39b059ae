"""The little of CUDA that running an engine takes, called in the driver's own library.

The driver is on every host with a GPU, so that no Python package for CUDA is needed. It shares
the device's primary context with the CUDA runtime that TensorRT uses.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffoundry.errors import DeferredError, StageError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED: only this stream's own work is captured


@dataclass(frozen=True)
class Gpu:
    """What a GPU and its driver are: name, compute capability ("8.9"), newest CUDA supported."""

    name: str
    compute_capability: str
    driver: str


def device_count() -> int:
    """GPUs that the driver reports; 0 where there is no driver."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if library.cuInit(0) != 0 or library.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


class Cuda:
    """The first visible GPU: its primary context, one stream, memory, captured graphs.

    Every method may be called from any thread; CUDA's answers are checked, and raised as
    StageError with the driver's own words.
    """

    def __init__(self) -> None:
        """Raises DeferredError where there is no driver or no GPU."""
        if not device_count():
            raise DeferredError(
                "CUDA", expected="an NVIDIA driver and GPU", found="none on this host"
            )
        self._library = ctypes.CDLL(LIBRARY)
        self._device = ctypes.c_int(0)
        self._context = ctypes.c_void_p()
        self._stream = ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(0))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self.make_current()
        self._call("cuStreamCreate", ctypes.byref(self._stream), ctypes.c_uint(_NON_BLOCKING))

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        return int(self._stream.value or 0)

    def gpu(self) -> Gpu:
        """Describe the GPU."""
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, ctypes.c_int(len(name)), self._device)
        driver = ctypes.c_int(0)
        self._call("cuDriverGetVersion", ctypes.byref(driver))
        major, minor = self._attribute(_MAJOR), self._attribute(_MINOR)
        newest = f"CUDA {driver.value // 1000}.{driver.value % 1000 // 10}"
        return Gpu(name.value.decode(), f"{major}.{minor}", newest)

    def make_current(self) -> None:
        """Give the calling thread the GPU's context."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, size_bytes: int) -> int:
        """Address of new device memory."""
        address = ctypes.c_uint64(0)
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size_bytes))
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address: int, source: int, size_bytes: int) -> None:
        """Copy host memory to the device, in the stream's order."""
        self._call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(address),
            ctypes.c_void_p(source),
            ctypes.c_size_t(size_bytes),
            self._stream,
        )

    def download(self, target: int, address: int, size_bytes: int) -> None:
        """Copy device memory to the host, in the stream's order; whole after `synchronize`."""
        self._call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(target),
            ctypes.c_uint64(address),
            ctypes.c_size_t(size_bytes),
            self._stream,
        )

    def synchronize(self) -> None:
        """Wait for all work of the stream."""
        self._call("cuStreamSynchronize", self._stream)

    def capture(self, launch: Callable[[], None]) -> int:
        """Record what `launch` puts into the stream, without running it; a handle to replay."""
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, ctypes.c_int(_RELAXED))
        try:
            launch()
        finally:
            self._call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        try:
            self._call(
                "cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, ctypes.c_uint64(0)
            )
        finally:
            self._call("cuGraphDestroy", graph)
        return int(ready.value or 0)

    def replay(self, graph: int) -> None:
        """Put a captured graph into the stream."""
        self._call("cuGraphLaunch", ctypes.c_void_p(graph), self._stream)

    def forget(self, graph: int) -> None:
        """Free a captured graph."""
        self._call("cuGraphExecDestroy", ctypes.c_void_p(graph))

    def close(self) -> None:
        """Free the stream and release the context."""
        if self._stream.value:
            self._call("cuStreamDestroy_v2", self._stream)
            self._stream = ctypes.c_void_p()
            self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int(0)
        self._call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(number), self._device)
        return value.value

    def _call(self, function: str, *arguments: Any) -> None:
        code = int(getattr(self._library, function)(*arguments))
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
            said = text.value.decode(errors="replace") if text.value else "no description"
            raise StageError(
                f"CUDA: {function}",
                expected="success",
                found=f"error {code}: {said}",
                remedy="close other programs that use the GPU, or use smaller shapes",
            )
