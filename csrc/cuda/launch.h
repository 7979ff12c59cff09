// What every CUDA launch needs from torch and the runtime.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <limits>

#include "checks.h"

// Weak: a torch without CUDA lacks it, and this module must load there too. No CUDA tensor exists without it.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace daemon_fast::cuda {

constexpr int64_t kDefaultSharedBytes = 48 * 1024;  // what a kernel gets without asking

inline cudaStream_t current_stream(int device) {
    if (!aoti_torch_get_current_cuda_stream) fail("this torch has no CUDA");
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS)
        fail("torch gave no current stream for CUDA device ", device);
    return static_cast<cudaStream_t>(stream);
}

inline int64_t device_attribute(cudaDeviceAttr attribute, int device) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
    if (error != cudaSuccess) fail("cudaDeviceGetAttribute failed: ", cudaGetErrorString(error));
    return value;
}

inline int64_t max_shared_bytes(int device) {
    return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// Launches `kernel` on the current stream of `input`'s device. Errors name the operator and the input's shape.
template <class... Parameters, class... Arguments>
void launch(
    const char* op, const Tensor& input, void (*kernel)(Parameters...), int64_t blocks, int threads,
    int64_t shared_bytes, const Arguments&... arguments) {
    const auto check = [&](cudaError_t error) {
        if (error != cudaSuccess)
            fail(op, " failed on CUDA for an input of shape ", shape(input), ": ", cudaGetErrorString(error));
    };
    // This module's CUDA runtime is its own (static), and may not know which device torch's has made the current one.
    check(cudaSetDevice(input.get_device_index()));
    if (shared_bytes > kDefaultSharedBytes)
        check(
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
    const unsigned grid = static_cast<unsigned>(std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max()));
    kernel<<<grid, threads, static_cast<size_t>(shared_bytes), current_stream(input.get_device_index())>>>(
        arguments...);
    check(cudaGetLastError());
}

}  // namespace daemon_fast::cuda
