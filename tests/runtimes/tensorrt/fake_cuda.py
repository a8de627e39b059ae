"""A driver library of plain host memory, compiled here: the calls we make, and nothing of CUDA.

A stream runs at once; a captured graph is a counter. What our driver code passes and frees is
real, so that a wrong pointer or a leak shows.
"""

from __future__ import annotations

import ctypes
import functools
import tempfile
from pathlib import Path

from tests.tensorrt_stubs import compile_library

_SOURCE = """
#include <stdlib.h>
#include <string.h>
typedef unsigned long long u64;
static int devices = 1, held = 0, contexts = 0, streams = 0, graphs = 0, capturing = 0, replays = 0;
static int fail_alloc = 0, synchronized = 0;
int fake_held(void) { return held; }
int fake_contexts(void) { return contexts; }
int fake_streams(void) { return streams; }
int fake_graphs(void) { return graphs; }
int fake_replays(void) { return replays; }
int fake_capturing(void) { return capturing; }
void fake_devices(int n) { devices = n; }
void fake_fail_alloc(int n) { fail_alloc = n; }
int cuInit(unsigned f) { return 0; }
int cuDeviceGetCount(int* n) { *n = devices; return 0; }
int cuDeviceGet(int* d, int i) { *d = i; return 0; }
int cuDeviceGetName(char* s, int n, int d) { strncpy(s, "Fake GPU", n); return 0; }
int cuDeviceGetAttribute(int* v, int a, int d) { *v = a == 75 ? 8 : a == 76 ? 9 : -1; return 0; }
int cuDriverGetVersion(int* v) { *v = 13010; return 0; }
int cuDevicePrimaryCtxRetain(void** c, int d) { *c = (void*)1; contexts++; return 0; }
int cuDevicePrimaryCtxRelease_v2(int d) { contexts--; return 0; }
int cuCtxSetCurrent(void* c) { return c == (void*)1 ? 0 : 201; }
int cuStreamCreate(void** s, unsigned f) { *s = (void*)7; streams++; return f == 1 ? 0 : 1; }
int cuStreamDestroy_v2(void* s) { streams--; return s == (void*)7 ? 0 : 400; }
int cuStreamSynchronize(void* s) { synchronized++; return s == (void*)7 ? 0 : 400; }
int cuMemAlloc_v2(u64* p, size_t n) {
    if (fail_alloc) return 2;
    *p = (u64)malloc(n); held++; return 0;
}
int cuMemFree_v2(u64 p) { free((void*)p); held--; return 0; }
int cuMemcpyHtoDAsync_v2(u64 d, void* s, size_t n, void* q) { memcpy((void*)d, s, n); return 0; }
int cuMemcpyDtoHAsync_v2(void* d, u64 s, size_t n, void* q) { memcpy(d, (void*)s, n); return 0; }
int cuStreamBeginCapture_v2(void* s, int m) { capturing = 1; return m == 2 ? 0 : 1; }
int cuStreamEndCapture(void* s, void** g) { capturing = 0; *g = (void*)11; return 0; }
int cuGraphInstantiateWithFlags(void** e, void* g, u64 f) { *e = (void*)13; graphs++; return 0; }
int cuGraphDestroy(void* g) { return g == (void*)11 ? 0 : 400; }
int cuGraphLaunch(void* e, void* s) { replays++; return e == (void*)13 ? 0 : 400; }
int cuGraphExecDestroy(void* e) { graphs--; return 0; }
int cuGetErrorString(int e, const char** s) { *s = "out of memory"; return 0; }
"""


@functools.cache
def library() -> Path:
    """The compiled file, to be named as `driver.LIBRARY`. Skips without a compiler."""
    folder = Path(tempfile.mkdtemp(prefix="diffoundry-cuda-"))
    return compile_library(_SOURCE, folder / "libcuda.so.1")


def count(what: str) -> int:
    """How many "held" blocks of memory, "contexts", "streams", "graphs" or "replays" there are."""
    return int(getattr(ctypes.CDLL(str(library())), f"fake_{what}")())


def tell(what: str, number: int) -> None:
    """Set the number of "devices", or whether to "fail_alloc"."""
    getattr(ctypes.CDLL(str(library())), f"fake_{what}")(number)
