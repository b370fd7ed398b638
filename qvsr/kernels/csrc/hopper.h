// What matmul.cu and hopper.cu know of each other.
#pragma once

#include "gemm.cuh"

namespace qvsr {

// How a product is computed: a tile (api.h), and how many blocks share its sum.
struct Plan {
    int tile, splits;
};

// In matmul.cu: what the kernels are told of a layer whose arguments are right; a kernel.
Gemm gemm_of(const QvsrPart* parts, const QvsrLayer& layer, const Window& window, int64_t M);
int start_plan(const Gemm& g, int form, const Plan& plan, cudaStream_t stream);

// In hopper.cu. Whether wgmma can be used on the current device: once for each, a small product is computed in both ways, on a stream of its own, and
// waited for. Not while `stream` is captured: then, and if the sums differ, mma.sync is to be used.
bool wgmma_is_right(cudaStream_t stream);
int start_by_wgmma(const Gemm& g, int form, const Plan& plan, cudaStream_t stream);
int wgmma_stage_bytes(int tile, int form);
int wgmma_shared_bytes(int tile, int form, int parts);

}  // namespace qvsr
