// token_logprobs on the CPU: log-softmax at one id per row, at temperature 1 and at the given one, in one pass
// over the vocabulary.
//
// The pass goes block by block; the sums are rescaled whenever a block raises the running maximum. Differences from
// the maximum and sums are float64: in float32, x - max alone would cost more than 1e-6 of a small log-probability.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "checks.h"
#include "cpu/dispatch.h"
#include "cpu/vec.h"
#include "cpu/weights.h"
#include "ops.h"

namespace daemon_fast::cpu {
namespace {

constexpr int64_t kBlock = 512;  // 4 KiB as float64: stays in the L1 cache between its two visits

template <class Logit>
DAEMON_FAST_INLINE void widen(const Logit* from, int64_t count, double* to) {
    for (int64_t v = 0; v < count; ++v) to[v] = static_cast<double>(static_cast<float>(from[v]));
    for (int64_t v = count; v % kLanes; ++v) to[v] = -kInf;
}

struct LogSums {
    double plain, tempered;  // log-sum-exp of x - max at temperature 1, and of (x - max) / temperature
    double max;
};

template <bool Tempered, class Logit>
DAEMON_FAST_INLINE LogSums log_sums(const Logit* logits, int64_t V, double inverse_temperature) {
    double max = -kInf;
    Vec plain = Vec{}, tempered = Vec{};
    double block[kBlock];
    for (int64_t begin = 0; begin < V; begin += kBlock) {
        const int64_t count = V - begin < kBlock ? V - begin : kBlock;
        widen(logits + begin, count, block);
        Vec block_max = splat(max);
        for (int64_t v = 0; v < count; v += kLanes) {
            const Vec x = load_vec(block + v);
            block_max = x > block_max ? x : block_max;
        }
        double new_max = max;
        for (int64_t lane = 0; lane < kLanes; ++lane) new_max = block_max[lane] > new_max ? block_max[lane] : new_max;
        if (new_max > max) {
            if (max > -kInf) {
                plain *= std::exp(max - new_max);
                if (Tempered) tempered *= std::exp((max - new_max) * inverse_temperature);
            }
            max = new_max;
        }
        // Nothing but -inf so far: measured from 0, such a block adds exp(-inf) = 0, and a NaN shows.
        const double origin = max > -kInf ? max : 0.0;
        for (int64_t v = 0; v < count; v += kLanes) {
            const Vec x = load_vec(block + v) - origin;
            plain += exp_nonpositive<7>(x);
            if (Tempered) tempered += exp_nonpositive<7>(x * inverse_temperature);
        }
    }
    const double log_plain = std::log(sum_lanes(plain));
    return {log_plain, Tempered ? std::log(sum_lanes(tempered)) : log_plain, max};
}

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

}  // namespace

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
    if (R > 0) {
        switch (logits.scalar_type()) {
            case ScalarType::Half: gather_rows<torch::headeronly::Half>(logits, ids, temperature, log_p, log_q); break;
            case ScalarType::BFloat16:
                gather_rows<torch::headeronly::BFloat16>(logits, ids, temperature, log_p, log_q);
                break;
            default: gather_rows<float>(logits, ids, temperature, log_p, log_q);
        }
    }
    return {log_p, log_q};
}

}  // namespace daemon_fast::cpu
