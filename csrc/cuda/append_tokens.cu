// append_tokens on CUDA: launch. The kernel is in append_tokens.cuh.
#include "cuda/append_tokens.cuh"

#include "cuda/launch.h"

namespace daemon_fast::cuda {
namespace {

constexpr int kThreads = 128;

void append_tokens(
    Tensor tokens, Tensor log_p, Tensor log_q, Tensor lengths, Tensor running, Tensor ids, Tensor ids_log_p,
    Tensor ids_log_q, Tensor slot, Tensor rows, Tensor eos, bool count_eos) {
    check_append_tokens(tokens, log_p, log_q, lengths, running, ids, ids_log_p, ids_log_q, slot, rows, eos);
    const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
    const int64_t drawn = ids.size(0);
    if (drawn == 0) return;
    launch(
        "append_tokens", tokens, append_tokens_kernel, (drawn + kThreads - 1) / kThreads, kThreads, 0,
        tokens.mutable_data_ptr<int64_t>(), log_p.mutable_data_ptr<float>(), log_q.mutable_data_ptr<float>(),
        lengths.mutable_data_ptr<int64_t>(), static_cast<bool*>(running.mutable_data_ptr()), tokens.size(0),
        tokens.size(1), ids.const_data_ptr<int64_t>(), ids_log_p.const_data_ptr<float>(),
        ids_log_q.const_data_ptr<float>(), drawn, slot.const_data_ptr<int64_t>(), rows.const_data_ptr<int64_t>(),
        eos.const_data_ptr<int64_t>(), eos.size(0), count_eos);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(daemon_fast, CUDA, m) {
    m.impl("append_tokens", TORCH_BOX(&append_tokens));
}

}  // namespace daemon_fast::cuda
