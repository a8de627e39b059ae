"""Our calls into CUDA's driver, against a library of host memory that counts what is held."""

from __future__ import annotations

from typing import Any

import pytest

from diffoundry.errors import DeferredError, StageError
from diffoundry.runtimes.tensorrt import driver
from diffoundry.runtimes.tensorrt.driver import Cuda, Gpu
from diffoundry.runtimes.tensorrt.session import Buffers
from tests.runtimes.tensorrt import fake_cuda


def test_a_gpu_is_described_by_name_capability_and_driver(trt: Any) -> None:
    cuda = Cuda()
    assert cuda.gpu() == Gpu("Fake GPU", "8.9", "CUDA 13.1")
    cuda.close()
    cuda.close()


def test_a_host_without_a_driver_is_deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY", "libnosuchdriver.so.1")
    assert driver.device_count() == 0
    with pytest.raises(DeferredError, match="NVIDIA driver"):
        Cuda()


def test_a_driver_without_a_device_is_deferred(trt: Any) -> None:
    fake_cuda.tell("devices", 0)
    try:
        with pytest.raises(DeferredError):
            Cuda()
    finally:
        fake_cuda.tell("devices", 1)


def test_an_error_of_the_driver_is_told_in_its_words(trt: Any) -> None:
    cuda = Cuda()
    fake_cuda.tell("fail_alloc", 1)
    try:
        with pytest.raises(StageError, match="out of memory"):
            cuda.allocate(10)
    finally:
        fake_cuda.tell("fail_alloc", 0)
        cuda.close()


def test_buffers_are_reused_and_grow(trt: Any) -> None:
    cuda = Cuda()
    buffers = Buffers(cuda)
    first, new = buffers.at("x", 100)
    assert new and buffers.at("x", 60) == (first, False)
    assert buffers.at("y", 10)[1] and fake_cuda.count("held") == 2
    assert buffers.at("x", 200)[1] and fake_cuda.count("held") == 2
    buffers.close()
    cuda.close()
