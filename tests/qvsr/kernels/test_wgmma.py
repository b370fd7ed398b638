"""csrc/wgmma.cuh on the emulator: products by the layouts of the PTX manual, and each mistake that it promises to find."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from qvsr.kernels import build, cuda, reference
from qvsr.kernels.packing import pack_weight

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


def product(
    library: ctypes.CDLL, a: np.ndarray, image: np.ndarray, word: int, further: int, mistake: str = "none"
) -> tuple[int, np.ndarray]:
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


# ---------------------------------------------------------------- machine code


KERNELS = """
#include "hopper.cuh"
namespace qvsr {
#define QVSR_BOTH(form)                                                                \\
    template __global__ void gemm_by_wgmma<Wide9, form>(const __grid_constant__ Gemm); \\
    template __global__ void gemm_by_wgmma<Large9, form>(const __grid_constant__ Gemm);
QVSR_BOTH(4) QVSR_BOTH(6) QVSR_BOTH(8)
}
"""


def find_disassembler() -> str | None:
    """nvdisasm: of the path, beside nvcc, or the one that triton brings."""
    triton = importlib.util.find_spec("triton")
    places = [Path(build.find_nvcc() or "nvcc").resolve().parent / "nvdisasm"]
    places += [Path(place) / "backends/nvidia/bin/nvdisasm" for place in (triton.submodule_search_locations or [] if triton else [])]
    return shutil.which("nvdisasm") or next((str(place) for place in places if place.is_file()), None)


def written_under_way(loop: list[str]) -> list[str]:
    """Instructions that write to registers which a product that is under way reads (A) or adds to, in a loop that is run twice.

    >>> written_under_way(["IGMMA.64x128x32.U8.U8 R24, R8, gdesc[UR4], R24, gsb0", "MOV R9, R1", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "MOV R8, R1"])
    ['MOV R9, R1']
    """
    found: list[str] = []
    groups: list[set[int]] = []
    group: set[int] = set()
    for line in loop * 2:
        if product := re.search(r"IGMMA\.64x128x32\.U8\.U8 R(\d+), R(\d+), ", line):
            d, a = int(product[1]), int(product[2])
            group |= {*range(d, d + 64), *range(a, a + 4)}
            if "gsb0" in line:  # the last of its group
                groups, group = [*groups, group], set()
        elif wait := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", line):
            groups = groups[max(0, len(groups) - int(wait[1])) :]
        elif write := re.match(r"(?:@!?U?P\d+ )?(\S+) (?:P\d+, )?R(\d+)\b", line):
            wide = 4 if ".128" in write[1] else 2 if re.search(r"\.64|WIDE|^CS2R$|^DADD|^DMUL", write[1]) else 1
            if set(range(int(write[2]), int(write[2]) + wide)) & set().union(group, *groups) and line not in found:
                found.append(line)
    return found


@pytest.fixture(scope="module")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What nvcc says of the kernels of csrc/hopper.cuh, and their machine code."""
    if (nvcc := build.find_nvcc()) is None:
        pytest.skip("no nvcc here to build the kernels")
    folder = tmp_path_factory.mktemp("hopper")
    source, code = folder / "kernels.cu", folder / "kernels.cubin"
    source.write_text(KERNELS)
    options = [*build.FLAGS, "-gencode=arch=compute_90a,code=sm_90a", f"-I{build.SOURCES}", "-cubin"]
    return build.run([nvcc, *options, str(source), "-o", str(code)]), code


@pytest.mark.timeout(600)  # nvcc takes half a minute of a core
def test_the_assembler_runs_products_side_by_side(assembled: tuple[str, Path]) -> None:
    """It says so where it cannot ("wgmma.mma_async instructions are serialized due to ..."), and where registers go to memory."""
    assert not re.search(r"serialized|\(C7\d+\)", assembled[0]), assembled[0]
    kernels = build.kernels_of(assembled[0])
    assert len(kernels) == 6 and not any(kernel.spill_stores or kernel.spill_loads for kernel in kernels)


@pytest.mark.timeout(600)
def test_no_register_of_a_product_under_way_is_written(assembled: tuple[str, Path]) -> None:
    """ptxas of CUDA 13.0 let a copy of the weights' registers begin too early once (csrc/wgmma.cuh)."""
    if (tool := find_disassembler()) is None:
        pytest.skip("no nvdisasm here to read machine code")
    text = subprocess.run([tool, str(assembled[1])], capture_output=True, text=True, check=True).stdout
    functions = [part for part in re.split(r"^\.text\.", text, flags=re.MULTILINE) if "IGMMA" in part]
    assert len(functions) == 6
    for function in functions:
        lines = [found[1] or found[2] for found in re.finditer(r"^(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/ +(.*?) *;", function, re.MULTILINE)]
        products = [index for index, line in enumerate(lines) if "IGMMA" in line]
        end, label = next((i, found[0]) for i in range(products[-1], len(lines)) if (found := re.search(r"\.L_x_\d+", lines[i])))
        begin = lines.index(label)
        assert begin < products[0], "the products are in one loop"
        assert len(products) in (2, 4) and not written_under_way(lines[begin:end])


# ---------------------------------------------------------------- a GPU


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="no GPU of compute capability 9.0 here, which alone has wgmma",
)
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize(("rows", "channels", "outputs"), [(4096, 320, 320), (1280, 2880, 640), (300, 5760, 1280)])
def test_gpu_products_by_wgmma_are_exact(rows: int, channels: int, outputs: int, bits: int) -> None:
    """Scales of one, so that results are the integers; ten times, for what shows only now and then."""
    q, w = (torch.randint(2**bits, (size, channels), dtype=torch.uint8) for size in (rows, outputs))
    ones, zeros = torch.ones(outputs, 1), torch.full((outputs, 1), 2.0 ** (bits - 1))
    layer = [[torch.ones(())], [torch.tensor(2.0 ** (bits - 1))], pack_weight(w, bits, [channels]), bits, ones, zeros, None, None, None]
    expected = reference.matmul_packed([q], *layer)
    on_gpu = [[one[0].cuda()] if isinstance(one, list) else one.cuda() if isinstance(one, torch.Tensor) else one for one in layer]
    inputs = q.cuda()
    for _ in range(10):
        assert torch.equal(cuda.matmul_packed([inputs], *on_gpu).cpu(), expected)
    library = cuda._library(inputs)
    assert library is not None and library.qvsr_wgmma() == 1, library and library.qvsr_message(library.qvsr_wgmma())
