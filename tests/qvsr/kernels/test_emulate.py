"""csrc/emulate.h itself: kernels that are right run as on a GPU, and each mistake that it promises to find is found."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from qvsr.kernels import build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here to build the kernels for the CPU")

KERNELS = r"""
#include "common.cuh"

__global__ void reduce(const float *x, float *sums, int n) {
    QVSR_SHARED(raw);
    float *parts = reinterpret_cast<float *>(raw);
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[blockIdx.x * n + i];
    for (int bit = 16; bit; bit /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (unsigned i = 1; i < blockDim.x / 32; ++i) sum += parts[i];
    sums[blockIdx.x] = sum;
}
QVSR_API int run_reduce(const float *x, float *sums, int rows, int n) { return QVSR_LAUNCH(reduce, rows, 128, 16, nullptr, x, sums, n); }

// Each thread takes its neighbour's value, `times` times; without `wait` a barrier is missing.
__global__ void turn(int *out, int by, int times, bool wait) {
    QVSR_SHARED(raw);
    int *values = reinterpret_cast<int *>(raw);
    values[threadIdx.x] = threadIdx.x;
    for (int i = 0; i < times; ++i) {
        if (wait) __syncthreads();
        const int value = values[(threadIdx.x + by) % blockDim.x];
        __syncthreads();
        values[threadIdx.x] = value;
    }
    out[threadIdx.x] = values[threadIdx.x];
}
QVSR_API int run_turn(int *out, int by, int times, bool wait) { return QVSR_LAUNCH(turn, 1, 128, 512, nullptr, out, by, times, wait); }

__global__ void shuffles(int *out) {
    const int lane = threadIdx.x % 32, at = threadIdx.x, size = blockDim.x;
    out[at] = __shfl_sync(0xffffffffu, at, lane + 3, 16);
    out[size + at] = __shfl_down_sync(0xffffffffu, at, 3, 8);
    out[2 * size + at] = __shfl_up_sync(0xffffffffu, at, 3, 8);
    out[3 * size + at] = int(__ballot_sync(0xffffffffu, lane % 3 == 0));
    atomicAdd(out + 4 * size, at);
    atomicMax(out + 4 * size + 1, at);
}
QVSR_API int run_shuffles(int *out) { return QVSR_LAUNCH(shuffles, 1, 64, 0, nullptr, out); }

template <int A, int B>
__global__ void apart(int *out, int how) {
    QVSR_SHARED(raw);
    if (how == 0) {
        if (threadIdx.x < 5) __syncthreads();
        else
            __syncthreads();
    }
    if (how == 1) {
        if (threadIdx.x < 5) return;
        __syncthreads();
    }
    if (how == 2) {
        if (threadIdx.x % 32 < 5) __syncwarp();
        else __syncthreads();
    }
    if (how == 3) __syncwarp(0xffffu);
    out[threadIdx.x] = A + B;
}
QVSR_API int run_apart(int *out, int how) { return QVSR_LAUNCH(apart<1, 2>, 1, 64, 0, nullptr, out, how); }

__global__ void outside(float *out, int at, bool reads) {
    QVSR_SHARED(raw);
    if (threadIdx.x == 0 && !reads) raw[at] = 1;
    if (reads) out[threadIdx.x] = reinterpret_cast<float *>(raw)[threadIdx.x];
}
QVSR_API int run_outside(float *out, int at, bool reads, int threads, int bytes) {
    return QVSR_LAUNCH(outside, dim3(1, 2), threads, bytes, nullptr, out, at, reads);
}

QVSR_API void convert(const float *x, int n, unsigned short *half, unsigned short *brain, float *back) {
    for (int i = 0; i < n; ++i) {
        const __half h = __float2half_rn(x[i]);
        const __nv_bfloat16 b = __float2bfloat16_rn(x[i]);
        memcpy(half + i, &h, 2);
        memcpy(brain + i, &b, 2);
        back[2 * i] = __half2float(h);
        back[2 * i + 1] = __bfloat162float(b);
    }
}
"""


def make(folder: Path, *flags: str) -> Path:
    (folder / "small.cu").write_text(KERNELS)
    return build.build_emulated(folder, flags=[f"-I{build.SOURCES}", *flags], sources=folder)


@pytest.fixture(scope="module", params=["own switch", "ucontext"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = make(tmp_path_factory.mktemp("small"), *(["-DQVSR_EMULATE_UCONTEXT"] if request.param == "ucontext" else []))
    library = ctypes.CDLL(str(path))
    library.qvsr_emulate_error.restype = ctypes.c_char_p
    return library


@pytest.fixture(params=[0, 1, 2])
def seed(request: pytest.FixtureRequest, library: ctypes.CDLL) -> int:
    library.qvsr_emulate_seed(request.param)
    return request.param


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def error(library: ctypes.CDLL) -> str:
    return library.qvsr_emulate_error().decode()


def test_a_reduction(library: ctypes.CDLL, seed: int) -> None:
    x, sums = np.random.default_rng().random((3, 1000), dtype=np.float32), np.full(3, np.nan, np.float32)
    assert library.run_reduce(pointer(x), pointer(sums), 3, 1000) == 0 and error(library) == ""
    np.testing.assert_allclose(sums, x.sum(1, dtype=np.float64), rtol=1e-5)  # float32 sums of 1000 values


def test_a_thousand_barriers_take_no_time(library: ctypes.CDLL, seed: int) -> None:
    out, started = np.zeros(128, np.int32), time.perf_counter()
    assert library.run_turn(pointer(out), 1, 500, True) == 0
    assert (out == (np.arange(128) + 500) % 128).all()
    assert time.perf_counter() - started < 5  # 6 ms with the own switch, 50 with ucontext, where it was written


def test_collectives_and_atomics_follow_their_definitions(library: ctypes.CDLL, seed: int) -> None:
    out, at = np.zeros(4 * 64 + 2, np.int32), np.arange(64)
    assert library.run_shuffles(pointer(out)) == 0
    lane = at % 32
    assert (out[:64] == at - lane + lane // 16 * 16 + (lane + 3) % 16).all()
    assert (out[64:128] == np.where(lane % 8 + 3 < 8, at + 3, at)).all() and (out[128:192] == np.where(lane % 8 < 3, at, at - 3)).all()
    assert (out[192:256] == np.int64(sum(1 << i for i in range(0, 32, 3))).astype(np.int32)).all()
    assert out[256] == at.sum() and out[257] == 63


def test_a_missing_barrier_is_found_in_some_order(library: ctypes.CDLL) -> None:
    wrong = {}
    for order in (0, 1, 2, 3):
        library.qvsr_emulate_seed(order)
        for by in (1, 127):
            out = np.zeros(128, np.int32)
            assert library.run_turn(pointer(out), by, 3, False) == 0
            wrong[order, by] = int((out != (np.arange(128) + 3 * by) % 128).sum())
    library.qvsr_emulate_seed(0)
    assert wrong[0, 1] > 0  # whoever comes first reads what nobody has written
    assert all(wrong[order, by] > 9 for order in (1, 2, 3) for by in (1, 127)), wrong


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (0, r"block (0, 0, 0): threads wait at different barriers: PLACE and PLACE"),
        (1, r"block (0, 0, 0): no thread can go on: 5 have left the kernel, 59 wait at the block's barrier PLACE"),
        (2, r"block (0, 0, 0): no thread can go on: 10 wait at the warp's barrier PLACE, 54 wait at the block's barrier PLACE"),
        (3, r"block (0, 0, 0): a warp's mask other than all lanes is not emulated, at PLACE"),
    ],
)
def test_threads_that_part(library: ctypes.CDLL, how: int, message: str) -> None:
    out = np.zeros(64, np.int32)
    assert library.run_apart(pointer(out), how) == 719  # cudaErrorLaunchFailure
    assert re.sub(r"\S*small\.cu:\d+", "PLACE", error(library)) == message
    assert library.run_apart(pointer(out), 9) == 0 and (out == 3).all() and error(library) == ""


def test_shared_memory_is_guarded_and_poisoned(library: ctypes.CDLL) -> None:
    out = np.zeros(64, np.float32)
    for at, found in ((99, ""), (100, "byte 100 of 100 bytes"), (-3, "byte -3 of 100 bytes")):
        assert library.run_outside(pointer(out), at, False, 64, 100) == (719 if found else 0)
        assert error(library) == (f"block (0, 0, 0): {found} of shared memory was written" if found else "")
    assert library.run_outside(pointer(out), 0, True, 64, 256) == 0 and np.isnan(out).all()


def test_launches_that_no_gpu_takes(library: ctypes.CDLL) -> None:
    out = np.zeros(64, np.float32)
    assert library.run_outside(pointer(out), 0, False, 1025, 100) == 9  # cudaErrorInvalidConfiguration
    assert error(library) == "no GPU takes a grid of (1, 2, 1) blocks of 1025 threads"
    assert library.run_outside(pointer(out), 0, False, 64, 240000) == 1  # cudaErrorInvalidValue
    assert error(library) == "240000 bytes of shared memory are more than the 232448 that a block can have"


def test_conversions_round_as_torch_does(library: ctypes.CDLL) -> None:
    bits = np.random.default_rng().integers(0, 2**32, 100_000, dtype=np.uint32)
    small = (bits % 2**29 + 0x30000000).astype(np.uint32)  # the range of half, below it and above it
    edges = np.array(
        [0, 0x80000000, 0x477FEFFF, 0x477FF000, 0x387FFFFF, 0x33000000, 0x33000001, 0x7F800000, 0xFF800000, 0x7F7FFFFF], np.uint32
    )
    x = np.concatenate([bits, small, edges]).view(np.float32)
    half, brain, back = np.zeros(len(x), np.uint16), np.zeros(len(x), np.uint16), np.zeros((len(x), 2), np.float32)
    library.convert(pointer(x), len(x), pointer(half), pointer(brain), pointer(back))
    for column, (found, dtype) in enumerate(((half, torch.float16), (brain, torch.bfloat16))):
        expected = torch.from_numpy(x).to(dtype)
        number = ~np.isnan(x)
        assert (found == expected.view(torch.uint16).numpy())[number].all() and np.isnan(back[~number, column]).all()
        assert (back[number, column] == expected.float().numpy()[number]).all()


def test_the_address_sanitizer_sees_reads_too(tmp_path: Path, sanitizer: dict[str, str]) -> None:
    path = make(tmp_path, "-fsanitize=address", "-g")
    code = (
        "import ctypes, sys; l = ctypes.CDLL(sys.argv[1]); x = (ctypes.c_float * 64)();"
        "print(l.run_turn((ctypes.c_int * 128)(), 1, 50, True), flush=True);"
        "print(l.run_apart((ctypes.c_int * 64)(), 1), l.run_turn((ctypes.c_int * 128)(), 1, 5, True), flush=True); l.run_outside(x, 0, True, 64, 252)"
    )
    command = [sys.executable, "-S", "-c", code, str(path)]
    done = subprocess.run(command, env=os.environ | sanitizer, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["0", "719", "0"] and done.returncode != 0
    assert "AddressSanitizer: use-after-poison" in done.stderr and "READ of size 4" in done.stderr
