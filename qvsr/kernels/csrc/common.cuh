// What every kernel file begins with. nvcc builds for GPUs; with -DQVSR_EMULATE a C++ compiler builds the same source for tests (emulate.h).
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef QVSR_EMULATE
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Dynamic shared memory of the launch, as bytes; one name a kernel.
#define QVSR_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace qvsr {
// Starts a kernel; what was wrong with the call, which is not what goes wrong while it runs. More than 48 KB of shared memory are asked for.
template <class... Parameters, class... Arguments>
inline cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
    if (shared_bytes > 48 * 1024) {
        const cudaError_t code = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
        if (code != cudaSuccess) return (void)cudaGetLastError(), code;
    }
    kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
    return cudaGetLastError();
}
}  // namespace qvsr
#endif

// QVSR_LAUNCH(kernel<A, B>, grid, block, shared_bytes, stream, arguments...) is a cudaError_t; a macro, so that both compilers take it alike.
#define QVSR_LAUNCH(...) qvsr::launch(__VA_ARGS__)
// Functions that a program loads from the library.
#define QVSR_API extern "C" __attribute__((visibility("default")))
