// What every CUDA launch needs from torch and the runtime.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>

#include "checks.h"

// Weak: a torch without CUDA lacks it, and this module must load there too. No CUDA tensor exists without it.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace daemon_fast::cuda {

constexpr int64_t kMaxStaticSharedBytes = 8 * 1024;  // no kernel here has more: the tests read what they have
// Dynamic shared memory that a kernel gets without asking: 48 KiB less what is static.
constexpr int64_t kDefaultSharedBytes = 48 * 1024 - kMaxStaticSharedBytes;
constexpr int64_t kMaxScratchBytes = int64_t{1} << 30;  // of global memory, for what doesn't fit into shared memory

// What these mean depends on the machine: `daemon-fast doctor` looks, and tells what to do.
inline const char* advice(cudaError_t error) {
    const bool of_this_machine = error == cudaErrorInsufficientDriver || error == cudaErrorNoKernelImageForDevice ||
                                 error == cudaErrorUnsupportedPtxVersion;
    return of_this_machine ? " (run `daemon-fast doctor`: it says what to do)" : "";
}

// `what` failed, unless it didn't. The runtime would keep the error for the next call.
template <class... What>
void check(cudaError_t error, const What&... what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();
    fail(what..., ": ", cudaGetErrorString(error), advice(error));
}

inline cudaStream_t current_stream(int device) {
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS)
        fail("torch gave no current stream for CUDA device ", device);
    return static_cast<cudaStream_t>(stream);
}

// This module's CUDA runtime is its own (static), and may not know which device torch's has made the current one.
inline void set_device(int device) {
    check(cudaSetDevice(device), "cudaSetDevice(", device, ") failed");
}

inline int64_t device_attribute(cudaDeviceAttr attribute, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute failed");
    return value;
}

inline int64_t max_shared_bytes(int device) {
    return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// Lets a kernel have all the dynamic shared memory that the device can give it; returns how much. Asked once a kernel
// and device: what one thread asks for one launch, another thread could undo before it.
inline int64_t grant_shared_bytes(const void* kernel, int device) {
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, int64_t> granted;
    const std::lock_guard lock(mutex);
    const auto found = granted.find({kernel, device});
    if (found != granted.end()) return found->second;
    set_device(device);
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes failed");
    const int64_t bytes = max_shared_bytes(device) - static_cast<int64_t>(attributes.sharedSizeBytes);
    check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "cudaFuncSetAttribute failed");
    return granted[{kernel, device}] = bytes;
}

// Dynamic shared memory that a launch of `kernel` may have, or less, but not less than `wanted` if that can be had.
template <class... Parameters>
int64_t shared_bytes_for(int64_t wanted, void (*kernel)(Parameters...), int device) {
    if (wanted <= kDefaultSharedBytes) return kDefaultSharedBytes;
    return grant_shared_bytes(reinterpret_cast<const void*>(kernel), device);
}

// How many blocks may have `bytes` of global scratch each: as many as fill the GPU, within kMaxScratchBytes; one at
// least.
inline int64_t blocks_with_scratch(int64_t wanted, int64_t bytes, int device) {
    const int64_t filling = 4 * device_attribute(cudaDevAttrMultiProcessorCount, device);
    return std::min({wanted, filling, std::max<int64_t>(1, kMaxScratchBytes / bytes)});
}

// Launches `kernel` on the current stream of `input`'s device. Errors name the operator and the input's shape.
template <class... Parameters, class... Arguments>
void launch(
    const char* op, const Tensor& input, void (*kernel)(Parameters...), int64_t blocks, int threads,
    int64_t shared_bytes, const Arguments&... arguments) {
    const int device = input.get_device_index();
    set_device(device);
    shared_bytes_for(shared_bytes, kernel, device);
    cudaLaunchConfig_t config{};
    config.gridDim.x = static_cast<unsigned>(std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max()));
    config.blockDim.x = static_cast<unsigned>(threads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = current_stream(device);
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    if (error != cudaSuccess) check(error, op, " failed on CUDA for an input of shape ", shape(input));
}

}  // namespace daemon_fast::cuda
