// token_logprobs on the CPU: log-softmax at one id per row, at temperature 1 and at the given one, in one pass
// over the vocabulary; and its gradient, which needs nothing of the first pass and so makes it again.
#include "cpu/dispatch.h"
#include "cpu/log_sums.h"
#include "cpu/weights.h"

namespace daemon_fast::cpu {
namespace {

// visit(r) for each row, with both of this source's compilations; about 16,384 logits are worth a thread.
template <class Visit>
void for_each_row(int64_t R, int64_t V, const Visit& visit) {
    const int64_t grain = std::max<int64_t>(1, 16384 / V);
    torch::stable::parallel_for(0, R, grain, [&](int64_t begin, int64_t end) {
        dispatch([&]() DAEMON_FAST_INLINE_LAMBDA {
            for (int64_t r = begin; r < end; ++r) visit(r);
        });
    });
}

template <class Logit>
void gather_rows(const Tensor& logits, const Tensor& ids, double temperature, Tensor& log_p, Tensor& log_q) {
    const int64_t V = logits.size(1), stride = logits.stride(0);
    const Logit* const first = logits.const_data_ptr<Logit>();
    const int64_t* const id_of = ids.const_data_ptr<int64_t>();
    float* const log_p_of = log_p.mutable_data_ptr<float>();
    float* const log_q_of = log_q.mutable_data_ptr<float>();
    const double inverse = 1.0 / temperature;
    for_each_row(logits.size(0), V, [&](int64_t r) DAEMON_FAST_INLINE_LAMBDA {
        const Logit* const row = first + r * stride;
        const LogSums sums = temperature == 1.0 ? log_sums<false>(row, V, inverse) : log_sums<true>(row, V, inverse);
        const double x = static_cast<double>(static_cast<float>(row[id_of[r]])) - sums.max;
        log_p_of[r] = static_cast<float>(x - sums.plain);
        log_q_of[r] = static_cast<float>(x * inverse - sums.tempered);
    });
}

// grad = p (onehot(id) - softmax(row)) + q (onehot(id) - softmax(row / temperature)); without Tempered, q is not read.
template <bool Tempered, class Logit>
DAEMON_FAST_INLINE void differentiate(
    const Logit* row, int64_t V, int64_t id, double p, double q, double inverse, Logit* grad) {
    const LogSums sums = log_sums<Tempered>(row, V, inverse);
    const double plain = -p * std::exp(-sums.plain), tempered = Tempered ? -q * std::exp(-sums.tempered) : 0.0;
    double block[kBlock];
    for (int64_t begin = 0; begin < V; begin += kBlock) {
        const int64_t count = V - begin < kBlock ? V - begin : kBlock;
        widen(row + begin, count, block);
        for (int64_t v = 0; v < count; v += kLanes) {
            const Vec x = load_vec(block + v) - sums.max;
            Vec g = plain * exp_nonpositive<7>(x);
            if (Tempered) g += tempered * exp_nonpositive<7>(x * inverse);
            store_vec(block + v, g);
        }
        for (int64_t v = 0; v < count; ++v) grad[begin + v] = from_float<Logit>(static_cast<float>(block[v]));
    }
    // 1 - softmax, with all its digits where the softmax is next to 1
    const double x = static_cast<double>(static_cast<float>(row[id])) - sums.max;
    double at_id = -p * std::expm1(x - sums.plain);
    if (Tempered) at_id -= q * std::expm1(x * inverse - sums.tempered);
    grad[id] = static_cast<Logit>(static_cast<float>(at_id));
}

template <class Logit>
void differentiate_rows(
    const Tensor& grad_log_p, const Tensor& grad_log_q, const Tensor& logits, const Tensor& ids, double temperature,
    Tensor& grad) {
    const int64_t V = logits.size(1), stride = logits.stride(0);
    const Logit* const first = logits.const_data_ptr<Logit>();
    const int64_t* const id_of = ids.const_data_ptr<int64_t>();
    const float* const p_of = grad_log_p.const_data_ptr<float>();
    const float* const q_of = grad_log_q.const_data_ptr<float>();
    Logit* const grad_of = grad.mutable_data_ptr<Logit>();
    const double inverse = 1.0 / temperature;
    for_each_row(logits.size(0), V, [&](int64_t r) DAEMON_FAST_INLINE_LAMBDA {
        const double p = static_cast<double>(p_of[r]), q = static_cast<double>(q_of[r]) * inverse;
        Logit* const out = grad_of + r * V;
        if (p == 0 && q == 0)  // a token that the loss leaves out
            std::memset(static_cast<void*>(out), 0, sizeof(Logit) * static_cast<size_t>(V));
        else if (temperature == 1.0 || q == 0)
            differentiate<false>(first + r * stride, V, id_of[r], p + q, 0, inverse, out);
        else
            differentiate<true>(first + r * stride, V, id_of[r], p, q, inverse, out);
    });
}

Tensor with_unit_stride(const Tensor& logits) {
    return logits.size(1) > 1 && logits.stride(1) != 1 ? torch::stable::contiguous(logits) : logits;
}

// Contiguous int64, each inside the vocabulary.
Tensor checked_ids(const char* op, const Tensor& ids, int64_t V) {
    const Tensor wide = torch::stable::contiguous(torch::stable::to(ids, ScalarType::Long));
    const int64_t* const id_of = wide.const_data_ptr<int64_t>();
    for (int64_t r = 0; r < wide.size(0); ++r)
        if (id_of[r] < 0 || id_of[r] >= V)
            fail(op, ": ids[", r, "] = ", id_of[r], " is outside the vocabulary [0, ", V, ")");
    return wide;
}

std::tuple<Tensor, Tensor> token_logprobs(Tensor logits, Tensor ids, double temperature) {
    check_token_logprobs("token_logprobs", logits, ids, temperature);
    const int64_t R = logits.size(0);
    logits = with_unit_stride(logits);
    ids = checked_ids("token_logprobs", ids, logits.size(1));
    Tensor log_p = empty_like_with(logits, {R}, ScalarType::Float);
    Tensor log_q = empty_like_with(logits, {R}, ScalarType::Float);
    if (R > 0)
        with_logit_type(
            logits, [&](auto logit) { gather_rows<decltype(logit)>(logits, ids, temperature, log_p, log_q); });
    return {log_p, log_q};
}

Tensor token_logprobs_backward(Tensor grad_log_p, Tensor grad_log_q, Tensor logits, Tensor ids, double temperature) {
    check_token_logprobs_backward(grad_log_p, grad_log_q, logits, ids, temperature);
    const int64_t R = logits.size(0), V = logits.size(1);
    logits = with_unit_stride(logits);
    ids = checked_ids("token_logprobs_backward", ids, V);
    grad_log_p = torch::stable::contiguous(grad_log_p);
    grad_log_q = torch::stable::contiguous(grad_log_q);
    Tensor grad = empty_like_with(logits, {R, V}, logits.scalar_type());
    if (R > 0)
        with_logit_type(logits, [&](auto logit) {
            differentiate_rows<decltype(logit)>(grad_log_p, grad_log_q, logits, ids, temperature, grad);
        });
    return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(daemon_fast, m) {
    m.def("token_logprobs(Tensor logits, Tensor ids, float temperature) -> (Tensor, Tensor)");
    m.def(
        "token_logprobs_backward(Tensor grad_log_p, Tensor grad_log_q, Tensor logits, Tensor ids, float temperature) "
        "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(daemon_fast, CPU, m) {
    m.impl("token_logprobs", TORCH_BOX(&token_logprobs));
    m.impl("token_logprobs_backward", TORCH_BOX(&token_logprobs_backward));
}

}  // namespace daemon_fast::cpu
