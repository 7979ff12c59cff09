// sample_tokens on the CPU: draws one id per row by inverse CDF, and takes its log-probabilities from the same pass.
//
// The pass records what each block of ids adds to the normaliser; the drawn one's block alone is read again.
#include "cpu/dispatch.h"
#include "cpu/log_sums.h"

namespace daemon_fast::cpu {
namespace {

struct Drawn {
    int64_t id;  // -1 where there is no distribution to draw from
    double x;    // its logit
};

template <class Logit>
DAEMON_FAST_INLINE Drawn
draw(const Logit* row, int64_t V, double inverse, double uniform, double max, const BlockSum* blocks) {
    const int64_t count = (V + kBlock - 1) / kBlock;
    const auto share = [&](int64_t b) { return blocks[b].sum * std::exp((blocks[b].origin - max) * inverse); };
    double total = 0;
    for (int64_t b = 0; b < count; ++b) total += share(b);
    if (!(total > 0 && total < kInf && max < kInf)) return {-1, 0};

    double target = uniform * total;
    int64_t chosen = -1;
    for (int64_t b = 0; b < count; ++b) {
        const double own = share(b);
        if (!(own > 0)) continue;
        if (chosen >= 0) target -= share(chosen);
        chosen = b;
        if (own > target) break;
    }
    double block[kBlock];
    const int64_t begin = chosen * kBlock, size = V - begin < kBlock ? V - begin : kBlock;
    widen(row + begin, size, block);
    for (int64_t v = 0; v < size; v += kLanes)
        store_vec(block + v, exp_nonpositive<7>((load_vec(block + v) - max) * inverse));
    int64_t id = -1;
    for (int64_t v = 0; v < size; ++v) {
        if (!(block[v] > 0)) continue;
        id = begin + v;
        if (block[v] > target) break;
        target -= block[v];
    }
    return {id, id < 0 ? 0 : static_cast<double>(static_cast<float>(row[id]))};
}

template <class Logit>
void sample_rows(
    const Tensor& logits, const Tensor& uniforms, double temperature, Tensor& ids, Tensor& log_p, Tensor& log_q) {
    const int64_t R = logits.size(0), V = logits.size(1), stride = logits.stride(0);
    const Logit* const first = logits.const_data_ptr<Logit>();
    const double* const uniform_of = uniforms.const_data_ptr<double>();
    int64_t* const id_of = ids.mutable_data_ptr<int64_t>();
    float* const log_p_of = log_p.mutable_data_ptr<float>();
    float* const log_q_of = log_q.mutable_data_ptr<float>();
    const double inverse = 1.0 / temperature;
    torch::stable::parallel_for(0, R, std::max<int64_t>(1, 16384 / V), [&](int64_t begin, int64_t end) {
        std::vector<BlockSum> blocks(static_cast<size_t>((V + kBlock - 1) / kBlock));
        dispatch([&]() DAEMON_FAST_INLINE_LAMBDA {
            for (int64_t r = begin; r < end; ++r) {
                const Logit* const row = first + r * stride;
                const LogSums sums = temperature == 1.0 ? log_sums<false>(row, V, inverse, blocks.data())
                                                        : log_sums<true>(row, V, inverse, blocks.data());
                const Drawn drawn = draw(row, V, inverse, uniform_of[r], sums.max, blocks.data());
                id_of[r] = drawn.id;
                log_p_of[r] = static_cast<float>(drawn.x - sums.max - sums.plain);
                log_q_of[r] = static_cast<float>((drawn.x - sums.max) * inverse - sums.tempered);
            }
        });
    });
}

std::tuple<Tensor, Tensor, Tensor> sample_tokens(Tensor logits, Tensor uniforms, double temperature) {
    check_sample_tokens(logits, uniforms, temperature);
    const int64_t R = logits.size(0), V = logits.size(1);
    if (V > 1 && logits.stride(1) != 1) logits = torch::stable::contiguous(logits);
    uniforms = torch::stable::contiguous(uniforms);
    const double* const uniform_of = uniforms.const_data_ptr<double>();
    for (int64_t r = 0; r < R; ++r)
        if (!(uniform_of[r] >= 0 && uniform_of[r] < 1))
            fail("sample_tokens: uniforms[", r, "] = ", uniform_of[r], " is outside [0, 1)");

    Tensor ids = empty_like_with(logits, {R}, ScalarType::Long);
    Tensor log_p = empty_like_with(logits, {R}, ScalarType::Float);
    Tensor log_q = empty_like_with(logits, {R}, ScalarType::Float);
    if (R > 0)
        with_logit_type(logits, [&](auto logit) {
            sample_rows<decltype(logit)>(logits, uniforms, temperature, ids, log_p, log_q);
        });
    const int64_t* const id_of = ids.const_data_ptr<int64_t>();
    for (int64_t r = 0; r < R; ++r)
        if (id_of[r] < 0) fail("sample_tokens: logits[", r, "] are all -inf, or hold NaN or +inf");
    return {ids, log_p, log_q};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(daemon_fast, m) {
    m.def("sample_tokens(Tensor logits, Tensor uniforms, float temperature) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(daemon_fast, CPU, m) {
    m.impl("sample_tokens", TORCH_BOX(&sample_tokens));
}

}  // namespace daemon_fast::cpu
