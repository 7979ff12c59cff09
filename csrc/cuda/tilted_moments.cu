// tilted_moments on CUDA: launches. The kernels are in tilted_moments.cuh.
#include "cuda/tilted_moments.cuh"

#include "cuda/launch.h"

namespace daemon_fast::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> tilted_moments(
    Tensor features, Tensor mu, std::optional<Tensor> base_log_w, std::string normalization) {
    check_tilted_moments(features, mu, base_log_w, normalization);
    const int device = features.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const int64_t K = features.size(2);
    if (K > 1024) fail("tilted_moments: features has K = ", K, ", more than any CUDA device can hold");
    const MomentShape shape{features.size(0), features.size(1), static_cast<int>(K)};
    const int warps = shape.warps();
    const int64_t shared_bytes = shape.shared_bytes(warps);
    features = torch::stable::contiguous(features);
    mu = torch::stable::contiguous(mu);
    if (base_log_w) base_log_w = torch::stable::contiguous(*base_log_w);
    Tensor log_z = empty_like_with(features, {}, ScalarType::Double);
    Tensor mean = empty_like_with(features, {K}, ScalarType::Double);
    Tensor covariance = empty_like_with(features, {K, K}, ScalarType::Double);

    const auto run = [&](auto how) {
        using Normalization = decltype(how);
        const int64_t blocks = shape.blocks(Normalization::units(shape));
        Tensor partial = empty_like_with(features, {shape.entries(), blocks}, ScalarType::Double);
        with_base(features, base_log_w, [&](auto feature, auto base) {
            using Feature = decltype(feature);
            using Base = decltype(base);
            const MomentInput<Feature, Base> input{
                features.const_data_ptr<Feature>(), mu.const_data_ptr<double>(),
                base_log_w ? base_log_w->const_data_ptr<Base>() : nullptr};
            const auto kernel = tilted_moments_kernel<Normalization, Feature, Base>;
            const int64_t most = shared_bytes_for(shared_bytes, kernel, device);
            if (shared_bytes > most)
                fail(
                    "tilted_moments: features has K = ", K, ", whose moments need ", shared_bytes,
                    " bytes of shared memory; this device has ", most);
            launch(
                "tilted_moments", features, kernel, blocks, warps * kWarp, shared_bytes, input, shape,
                partial.mutable_data_ptr<double>());
        });
        launch(
            "tilted_moments", features, finish_tilted_moments_kernel<Normalization>, 1, 1024, shape.finish_bytes(),
            partial.const_data_ptr<double>(), blocks, shape, log_z.mutable_data_ptr<double>(),
            mean.mutable_data_ptr<double>(), covariance.mutable_data_ptr<double>());
    };
    normalization == "per_prefix" ? run(PerPrefix{}) : run(Global{});
    return {log_z, mean, covariance};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(daemon_fast, CUDA, m) {
    m.impl("tilted_moments", TORCH_BOX(&tilted_moments));
}

}  // namespace daemon_fast::cuda
