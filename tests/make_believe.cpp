// What torch asks a device's guard, of a CUDA device that is not there. A torch built without CUDA has none at all.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
    c10::Device getDevice() const override { return {c10::DeviceType::CUDA, 0}; }
    c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
};
Guard guard;
}  // namespace

extern "C" void install() {
    c10::impl::device_guard_impl_registry[static_cast<int>(c10::DeviceType::CUDA)].store(&guard);
}
