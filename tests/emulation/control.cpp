// What the tests set of the emulated device, and read from it; and the part of torch that a CPU build of it lacks.
#include "cuda_runtime.h"

extern "C" {

AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) {
    *index = emulation::device.index;
    return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t index, void** stream) {
    *stream = index == emulation::device.index ? &emulation::device : nullptr;
    return emulation::broken("current_stream") ? AOTI_TORCH_FAILURE : AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
    *guard = nullptr;
    return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
    return AOTI_TORCH_SUCCESS;
}

// Another device than the one before, on which nothing has run.
void emulation_device(
    int64_t multiprocessors, int64_t shared_optin, int order, bool ptx, bool runs, const char* broken) {
    static std::string name;
    emulation::Device& device = emulation::device;
    ++device.index;
    device.granted.clear();
    device.grants = 0;
    device.multiprocessors = multiprocessors;
    device.shared_optin = shared_optin;
    device.order = order;
    device.ptx = ptx;
    device.runs = runs;
    device.broken = broken ? (name = broken).c_str() : nullptr;
}

// What the compiler reports of a kernel.
void emulation_kernel(const char* name, int64_t static_shared, int64_t registers) {
    emulation::device.kernels[name].static_shared = static_shared;
    emulation::device.kernels[name].registers = registers;
}

// The PTX of all kernels; returns null, or what is wrong with it.
const char* emulation_ptx(const char* text) {
    static std::string error;
    try {
        std::istringstream in(text);
        for (auto& [name, program] : emulation::ptx::Reader(in).all())
            emulation::device.kernels[name].program = std::move(program);
        return nullptr;
    } catch (const std::exception& wrong) {
        return (error = wrong.what()).c_str();
    }
}

// Calls back with the name of each kernel that was launched.
void emulation_launched(void (*name)(const char*)) {
    for (const std::string& kernel : emulation::device.launched) name(kernel.c_str());
}

// Counts what the PTX of later launches issues, or stops that.
void emulation_count(bool counts) {
    emulation::device.counts = counts;
    emulation::device.issued.clear();
}

// Calls back with kernel, instruction, and how often it was issued to a warp.
void emulation_issued(void (*each)(const char*, const char*, uint64_t)) {
    for (const auto& [key, count] : emulation::device.issued) each(key.first.c_str(), key.second.c_str(), count);
}

int64_t emulation_blocks() {  // of the last launch
    return emulation::device.last_grid.x;
}

int64_t emulation_grants() {  // how often kernels asked for more shared memory
    return emulation::device.grants;
}

int emulation_error() {  // what the next call of the runtime would find
    return emulation::device.last_error;
}

}  // extern "C"
