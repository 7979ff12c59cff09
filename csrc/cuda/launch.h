// What every CUDA launch needs from torch and the runtime.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "checks.h"

// Weak: a torch without CUDA lacks it, and this module must load there too. No CUDA tensor exists without it.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace daemon_fast::cuda {

inline void check_cuda(cudaError_t error, const char* what, const Tensor& input) {
    if (error != cudaSuccess)
        fail(what, " failed on CUDA for an input of shape ", shape(input), ": ", cudaGetErrorString(error));
}

inline cudaStream_t current_stream(int device) {
    if (!aoti_torch_get_current_cuda_stream) fail("this torch has no CUDA");
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS)
        fail("torch gave no current stream for CUDA device ", device);
    return static_cast<cudaStream_t>(stream);
}

inline int device_attribute(cudaDeviceAttr attribute, int device) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
    if (error != cudaSuccess) fail("cudaDeviceGetAttribute failed: ", cudaGetErrorString(error));
    return value;
}

}  // namespace daemon_fast::cuda
