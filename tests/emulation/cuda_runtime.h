// Stand-in for CUDA's header of the same name: runs kernels on the CPU (cuda.h) and refuses what a device refuses, by
// the sizes that the compiler reports of each kernel. Operators get CPU tensors, under a name of their own, so that
// tests can call them beside the real ones. Only what a stream capture allows is here; anything else doesn't compile.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "cuda.h"
#include "ptx.h"

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(daemon_fast_emulated, CPU, m, C10_UID)

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorUnsupportedPtxVersion = 222,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorLaunchOutOfResources = 701,
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = void*;
using dim3 = Dim;

struct cudaFuncAttributes {
    size_t sharedSizeBytes;
};

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

namespace emulation {

// What the compiler reports of a kernel, and its PTX.
struct Kernel {
    int64_t static_shared = 0, registers = 0;
    ptx::Program program;
};

// Set by the tests; an H100 by default.
struct Device {
    int index = 0, current = -1;  // of this device; of what the runtime takes for the current one
    int64_t multiprocessors = 132, shared_optin = 227 * 1024;
    int order = 0;                 // of threads: see Block::run
    bool runs = true;              // false: launches are checked only
    bool ptx = false;              // runs PTX, else what g++ made of the source
    const char* broken = nullptr;  // the runtime call that fails
    std::map<std::string, Kernel> kernels;
    std::map<std::string, int64_t> granted;  // dynamic shared memory that kernels may have, where they asked
    int64_t grants = 0;                      // how often they asked
    cudaError_t last_error = cudaSuccess;
    std::set<std::string> launched;
    Dim last_grid;
    bool counts = false;                                             // what PTX issues, by kernel and instruction:
    std::map<std::pair<std::string, std::string>, uint64_t> issued;  // here
};
inline Device device;

constexpr int64_t kDefaultShared = 48 * 1024, kMaxThreads = 1024, kRegisters = 65536;

inline std::string name_of(const void* kernel) {
    Dl_info info{};
    if (!dladdr(kernel, &info) || !info.dli_sname) throw std::logic_error("a kernel without a name");
    return info.dli_sname;
}

inline const Kernel& limits(const std::string& kernel) {
    static const Kernel unknown;  // of a module built without CUDA
    if (device.kernels.empty()) return unknown;
    const auto found = device.kernels.find(kernel);
    if (found == device.kernels.end()) throw std::logic_error("the module was built from other sources: no " + kernel);
    return found->second;
}

inline bool broken(const char* call) {
    return device.broken && std::strcmp(device.broken, call) == 0;
}

inline cudaError_t result(const char* call, cudaError_t error) {
    if (broken(call)) error = cudaErrorInvalidDevice;
    if (error != cudaSuccess) device.last_error = error;
    return error;
}

inline cudaError_t refusal(const std::string& name, const cudaLaunchConfig_t& config) {
    const Kernel& kernel = limits(name);
    const Dim grid = config.gridDim, block = config.blockDim;
    if (grid.x < 1 || grid.x > 0x7fffffff || grid.y != 1 || grid.z != 1) return cudaErrorInvalidConfiguration;
    if (block.x < 1 || block.x > kMaxThreads || block.y != 1 || block.z != 1) return cudaErrorInvalidConfiguration;
    if (block.x > kernel.program.max_threads) return cudaErrorInvalidValue;
    const auto granted = device.granted.find(name);
    const int64_t dynamic = granted == device.granted.end() ? kDefaultShared - kernel.static_shared : granted->second;
    if (static_cast<int64_t>(config.dynamicSmemBytes) > dynamic) return cudaErrorInvalidValue;
    const int64_t warps = (block.x + kWarp - 1) / kWarp;  // registers are given out 8 to a lane
    if ((kernel.registers + 7) / 8 * 8 * kWarp * warps > kRegisters) return cudaErrorLaunchOutOfResources;
    if (device.current != device.index) return cudaErrorInvalidDevice;
    if (config.stream != &device) return cudaErrorInvalidResourceHandle;  // the legacy stream can't be captured
    return cudaSuccess;
}

}  // namespace emulation

inline const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorInvalidResourceHandle: return "invalid resource handle";
        default: return "too many resources requested for launch";
    }
}

inline cudaError_t cudaGetLastError() {
    return std::exchange(emulation::device.last_error, cudaSuccess);
}

inline cudaError_t cudaSetDevice(int index) {
    emulation::device.current = index;
    return emulation::result("cudaSetDevice", cudaSuccess);
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
    if (index != emulation::device.index) return emulation::result("cudaDeviceGetAttribute", cudaErrorInvalidDevice);
    const bool shared = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin;
    *value = static_cast<int>(shared ? emulation::device.shared_optin : emulation::device.multiprocessors);
    return emulation::result("cudaDeviceGetAttribute", cudaSuccess);
}

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
    const std::string name = emulation::name_of(kernel);
    attributes->sharedSizeBytes = static_cast<size_t>(emulation::limits(name).static_shared);
    return emulation::result("cudaFuncGetAttributes", cudaSuccess);
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
    const std::string name = emulation::name_of(kernel);
    const bool fits = emulation::device.current == emulation::device.index &&
                      emulation::limits(name).static_shared + bytes <= emulation::device.shared_optin;
    const cudaError_t error = emulation::result("cudaFuncSetAttribute", fits ? cudaSuccess : cudaErrorInvalidValue);
    ++emulation::device.grants;
    if (error == cudaSuccess) emulation::device.granted[name] = bytes;
    return error;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
    emulation::Device& device = emulation::device;
    const std::string name = emulation::name_of(reinterpret_cast<const void*>(kernel));
    const cudaError_t error = emulation::result("cudaLaunchKernelEx", emulation::refusal(name, *config));
    device.launched.insert(name);
    device.last_grid = config->gridDim;
    if (error != cudaSuccess || !device.runs) return error;
    const std::tuple<Parameters...> values(arguments...);
    const unsigned grid = config->gridDim.x, threads = config->blockDim.x;
    if (!device.ptx) {
        emulation::launch(grid, threads, config->dynamicSmemBytes, device.order, [&] { std::apply(kernel, values); });
        return cudaSuccess;
    }
    std::vector<const void*> addresses;
    std::apply([&](const auto&... value) { (addresses.push_back(&value), ...); }, values);
    const emulation::ptx::Program& program = emulation::limits(name).program;
    emulation::ptx::Issues issues(program, threads);
    emulation::ptx::run(
        program, grid, threads, config->dynamicSmemBytes, device.order, addresses, device.counts ? &issues : nullptr);
    for (const auto& [instruction, count] : issues.by_name) device.issued[{name, instruction}] += count;
    for (const auto& [instruction, count] : issues.of_busiest) device.issued[{name, "busiest " + instruction}] += count;
    return cudaSuccess;
}
