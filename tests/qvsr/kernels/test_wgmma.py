"""csrc/wgmma.cuh on the emulator: products by the layouts of the PTX manual, and each mistake that it promises to find."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest

from qvsr.kernels import build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here to build the kernels for the CPU")

KERNEL = r"""
#include "gemm.cuh"
#include "wgmma.cuh"
using namespace qvsr;

enum Mistake { NONE, UNFENCED, EARLY, UNORDERED, A_CHANGES, B_CHANGES, LANES_APART };

// sums = a b by two instructions of 32 bytes each; `image` is shared memory as it is to be, b lies in it as `descriptor` says, whose address is
// counted from its begin.
__global__ void product(const unsigned char* image, int bytes, const unsigned char* a, uint64_t descriptor, int further, int mistake, int* sums) {
    QVSR_SHARED(memory);
    const int thread = int(threadIdx.x), lane = thread % 32, row = thread / 32 * 16 + lane / 4;
    for (int at = thread * 16; at < bytes; at += 128 * 16) copy_async(memory + at, image + at, true);
    close_group();
    wait_groups<0>();
    if (mistake != UNFENCED) fence_for_wgmma();
    __syncthreads();
    uint32_t first[4], second[4];
    for (int i = 0; i < 4; ++i) {
        const unsigned char* from = a + (row + i % 2 * 8) * 64 + i / 2 * 16 + lane % 4 * 4;
        memcpy(first + i, from, 4), memcpy(second + i, from + 32, 4);
    }
    int d[WGMMA_SUMS];
    for (int& sum : d) sum = 5;
    const uint64_t b = descriptor + (shared_address(memory) >> 4) + (mistake == LANES_APART ? lane : 0);
    if (mistake != UNORDERED) wgmma_order();
    wgmma_multiply(d, first, b);
    wgmma_multiply(d, second, b + further / 16);
    wgmma_close();
    if (mistake == A_CHANGES) first[0] = 0;
    if (mistake == B_CHANGES && thread == 9) copy_async(memory, image, true);
    if (mistake != EARLY) wgmma_wait<0>();
    for (int i = 0; i < WGMMA_SUMS; ++i) sums[(row + i / 2 % 2 * 8) * 128 + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
    if (mistake == EARLY) wgmma_wait<0>();
}
QVSR_API int run_product(const unsigned char* image, int bytes, const unsigned char* a, uint64_t descriptor, int further, int mistake, int* sums) {
    return QVSR_LAUNCH(product, 1, 128, size_t(bytes), nullptr, image, bytes, a, descriptor, further, mistake, sums);
}

// What the kernels use: the descriptor of columns that begin at `offset`, and where they lay a quarter of a column.
__global__ void described(int offset, uint64_t* descriptor) {
    QVSR_SHARED(memory);
    if (threadIdx.x == 0) *descriptor = descriptor_of(memory + offset) - (shared_address(memory) >> 4);
}
QVSR_API int run_described(int offset, uint64_t* descriptor) { return QVSR_LAUNCH(described, 1, 32, 64, nullptr, offset, descriptor); }
QVSR_API int place_of(int column, int quarter) { return place(column, quarter); }
"""

MISTAKES = ("none", "unfenced", "early", "unordered", "a changes", "b changes", "lanes apart")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("wgmma")
    (folder / "product.cu").write_text(KERNEL)
    found = ctypes.CDLL(str(build.build_emulated(folder, ["product.cu"], [f"-I{build.SOURCES}"], sources=folder)))
    found.qvsr_emulate_error.restype = ctypes.c_char_p
    return found


def laid_out(b: np.ndarray, width: int) -> np.ndarray:
    """Columns of 64 bytes as the manual's figures of K-major operands have them, with a swizzle of `width` bytes; 16: without.

    Core matrices are 8 columns x 16 bytes. Without a swizzle each is 128 bytes, one after the other along K (128 bytes apart), 8 columns 512 bytes
    apart. With one, rows of `width` bytes hold as many chunks of 16 bytes, of which each row of eight exchanges other ones; further chunks of a
    column begin behind all columns.
    """
    image = np.zeros(128 * 128, np.uint8)
    for column in range(128):
        for chunk in range(4):
            row = column % 8
            if width == 16:
                at = column // 8 * 512 + chunk * 128 + row * 16
            else:
                chunks = width // 16
                turned = (chunk % chunks) ^ {8: row, 4: row // 2, 2: row // 4}[chunks]
                at = chunk // chunks * 128 * width + column * width + turned * 16
            image[at : at + 16] = b[column, 16 * chunk : 16 * chunk + 16]
    return image


def descriptor(swizzle: int, leading: int, stride: int, start: int = 0) -> int:
    return start // 16 | leading // 16 << 16 | stride // 16 << 32 | swizzle << 62


# width of the swizzle: its number, distance of chunks, distance of 8 columns, distance of the second 32 bytes
LAYOUTS = {16: (0, 128, 512, 256), 32: (3, 16, 256, 128 * 32), 64: (2, 16, 512, 32), 128: (1, 16, 1024, 32)}


def product(library: ctypes.CDLL, a: np.ndarray, image: np.ndarray, word: int, further: int, mistake: str = "none") -> tuple[int, np.ndarray]:
    sums = np.full((64, 128), -1, np.int32)
    image, a = np.ascontiguousarray(image), np.ascontiguousarray(a)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (image, a, sums)]
    number = MISTAKES.index(mistake)
    code = library.run_product(pointers[0], len(image), pointers[1], ctypes.c_uint64(word), further, number, pointers[2])
    return code, sums


def drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng()
    a, b = random.integers(0, 256, (64, 64), np.uint8), random.integers(1, 256, (128, 64), np.uint8)
    return a, b, a.astype(np.int64) @ b.T.astype(np.int64) + 5


@pytest.mark.parametrize("width", LAYOUTS)
def test_a_product_by_each_layout_of_the_manual(library: ctypes.CDLL, width: int) -> None:
    a, b, expected = drawn()
    *fields, further = LAYOUTS[width]
    code, sums = product(library, a, laid_out(b, width), descriptor(*fields), further)
    assert code == 0 and (sums == expected).all()


def test_the_kernels_own_layout_is_the_swizzle_of_64_bytes(library: ctypes.CDLL) -> None:
    a, b, expected = drawn()
    image = np.zeros(128 * 64, np.uint8)
    for column in range(128):
        for quarter in range(4):
            at = library.place_of(column, quarter)
            image[at : at + 16] = b[column, 16 * quarter : 16 * quarter + 16]
    assert (image == laid_out(b, 64)[: len(image)]).all()
    word = ctypes.c_uint64()
    assert library.run_described(0, ctypes.byref(word)) == 0
    assert word.value == descriptor(2, 16, 512)
    assert (product(library, a, image, word.value, 32)[1] == expected).all()
    assert library.run_described(4096, ctypes.byref(word)) == 0 and word.value == descriptor(2, 16, 512, 4096)


@pytest.mark.parametrize(
    "word",
    [descriptor(1, 16, 512), descriptor(3, 16, 512), descriptor(0, 16, 512), descriptor(2, 16, 1024), descriptor(2, 16, 512, 16)],
    ids=["128 bytes", "32 bytes", "no swizzle", "stride", "start"],
)
def test_a_wrong_descriptor_gives_wrong_sums(library: ctypes.CDLL, word: int) -> None:
    a, b, expected = drawn()
    code, sums = product(library, a, laid_out(b, 64), word, 32)
    assert code == 0 and (sums != expected).mean() > 0.5


def test_columns_that_begin_within_the_pattern_give_wrong_sums(library: ctypes.CDLL) -> None:
    """The swizzle goes by the address: a stage that began at 128 bytes would have to say so."""
    a, b, expected = drawn()
    image = np.concatenate([np.zeros(128, np.uint8), laid_out(b, 64)])
    code, sums = product(library, a, image, descriptor(2, 16, 512, 128), 32)
    assert code == 0 and (sums != expected).mean() > 0.5


@pytest.mark.parametrize("mistake", ["unfenced", "early", "a changes", "b changes"])
def test_a_mistake_in_the_order_gives_wrong_sums(library: ctypes.CDLL, mistake: str) -> None:
    a, b, expected = drawn()
    code, sums = product(library, a, laid_out(b, 64), descriptor(2, 16, 512), 32, mistake)
    assert code == 0 and (sums != expected).any()
    if mistake == "b changes":
        assert set(np.nonzero(sums != expected)[1]) == {0}  # 16 bytes of one column


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("unordered", "block (0, 0, 0): wgmma.mma_async without wgmma.fence in its group"),
        ("lanes apart", "block (0, 0, 0): lanes name different matrices to wgmma.mma_async"),
    ],
)
def test_what_a_gpu_leaves_undefined_is_refused(library: ctypes.CDLL, mistake: str, message: str) -> None:
    a, b, _ = drawn()
    assert product(library, a, laid_out(b, 64), descriptor(2, 16, 512), 32, mistake)[0] == 719  # cudaErrorLaunchFailure
    assert library.qvsr_emulate_error().decode() == message


def test_matrices_outside_shared_memory_are_refused(library: ctypes.CDLL) -> None:
    a, b, _ = drawn()
    assert product(library, a, laid_out(b, 64)[: 128 * 64], descriptor(2, 16, 512, 16), 32)[0] == 719
    assert library.qvsr_emulate_error().decode() == "block (0, 0, 0): wgmma reads outside shared memory"
