// append_tokens on the CPU: a step's bookkeeping, in place.
#include "checks.h"

namespace daemon_fast::cpu {
namespace {

void append_tokens(
    Tensor tokens, Tensor log_p, Tensor log_q, Tensor lengths, Tensor running, Tensor ids, Tensor ids_log_p,
    Tensor ids_log_q, Tensor slot, Tensor rows, Tensor eos, bool count_eos) {
    check_append_tokens(tokens, log_p, log_q, lengths, running, ids, ids_log_p, ids_log_q, slot, rows, eos);
    const int64_t T = tokens.size(0), R = tokens.size(1), drawn = ids.size(0);
    const int64_t t = *slot.const_data_ptr<int64_t>();
    if (t < 0 || t >= T) fail("append_tokens: slot = ", t, " is outside the ", T, " slots of tokens");
    const int64_t* const row_of = rows.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < drawn; ++i)
        if (row_of[i] < 0 || row_of[i] >= R)
            fail("append_tokens: rows[", i, "] = ", row_of[i], " is outside the ", R, " rows of tokens");
    const int64_t* const id_of = ids.const_data_ptr<int64_t>();
    const int64_t* const eos_ids = eos.const_data_ptr<int64_t>();
    const float* const p_of = ids_log_p.const_data_ptr<float>();
    const float* const q_of = ids_log_q.const_data_ptr<float>();
    bool* const runs = static_cast<bool*>(running.mutable_data_ptr());
    for (int64_t i = 0; i < drawn; ++i) {
        const int64_t row = row_of[i], id = id_of[i], at = t * R + row;
        if (!runs[row]) continue;
        const bool is_eos = std::find(eos_ids, eos_ids + eos.size(0), id) != eos_ids + eos.size(0);
        tokens.mutable_data_ptr<int64_t>()[at] = std::max<int64_t>(id, 0);
        log_p.mutable_data_ptr<float>()[at] = p_of[i];
        log_q.mutable_data_ptr<float>()[at] = q_of[i];
        lengths.mutable_data_ptr<int64_t>()[row] += id >= 0 && (count_eos || !is_eos);
        runs[row] = id >= 0 && !is_eos;
    }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(daemon_fast, m) {
    m.def(
        "append_tokens(Tensor(a!) tokens, Tensor(b!) log_p, Tensor(c!) log_q, Tensor(d!) lengths, Tensor(e!) running, "
        "Tensor ids, Tensor ids_log_p, Tensor ids_log_q, Tensor slot, Tensor rows, Tensor eos, bool count_eos) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(daemon_fast, CPU, m) {
    m.impl("append_tokens", TORCH_BOX(&append_tokens));
}

}  // namespace daemon_fast::cpu
