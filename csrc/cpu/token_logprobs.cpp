// token_logprobs on the CPU: log-softmax at one id per row, at temperature 1 and at the given one, in one pass
// over the vocabulary.
#include "cpu/dispatch.h"
#include "cpu/log_sums.h"
#include "cpu/weights.h"

namespace daemon_fast::cpu {
namespace {

template <class Logit>
void gather_rows(const Tensor& logits, const Tensor& ids, double temperature, Tensor& log_p, Tensor& log_q) {
    const int64_t R = logits.size(0), V = logits.size(1), stride = logits.stride(0);
    const Logit* const first = logits.const_data_ptr<Logit>();
    const int64_t* const id_of = ids.const_data_ptr<int64_t>();
    float* const log_p_of = log_p.mutable_data_ptr<float>();
    float* const log_q_of = log_q.mutable_data_ptr<float>();
    const double inverse = 1.0 / temperature;
    const int64_t grain = std::max<int64_t>(1, 16384 / V);
    torch::stable::parallel_for(0, R, grain, [&](int64_t begin, int64_t end) {
        dispatch([&]() DAEMON_FAST_INLINE_LAMBDA {
            for (int64_t r = begin; r < end; ++r) {
                const Logit* const row = first + r * stride;
                const LogSums sums =
                    temperature == 1.0 ? log_sums<false>(row, V, inverse) : log_sums<true>(row, V, inverse);
                const double x = static_cast<double>(static_cast<float>(row[id_of[r]])) - sums.max;
                log_p_of[r] = static_cast<float>(x - sums.plain);
                log_q_of[r] = static_cast<float>(x * inverse - sums.tempered);
            }
        });
    });
}

std::tuple<Tensor, Tensor> token_logprobs(Tensor logits, Tensor ids, double temperature) {
    check_token_logprobs(logits, ids, temperature);
    const int64_t R = logits.size(0), V = logits.size(1);
    if (V > 1 && logits.stride(1) != 1) logits = torch::stable::contiguous(logits);
    ids = torch::stable::contiguous(torch::stable::to(ids, ScalarType::Long));
    const int64_t* const id_of = ids.const_data_ptr<int64_t>();
    for (int64_t r = 0; r < R; ++r)
        if (id_of[r] < 0 || id_of[r] >= V)
            fail("token_logprobs: ids[", r, "] = ", id_of[r], " is outside the vocabulary [0, ", V, ")");

    Tensor log_p = empty_like_with(logits, {R}, ScalarType::Float);
    Tensor log_q = empty_like_with(logits, {R}, ScalarType::Float);
    if (R > 0)
        with_logit_type(
            logits, [&](auto logit) { gather_rows<decltype(logit)>(logits, ids, temperature, log_p, log_q); });
    return {log_p, log_q};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(daemon_fast, m) {
    m.def("token_logprobs(Tensor logits, Tensor ids, float temperature) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(daemon_fast, CPU, m) {
    m.impl("token_logprobs", TORCH_BOX(&token_logprobs));
}

}  // namespace daemon_fast::cpu
