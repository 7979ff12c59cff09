// The shipped kernels (csrc/cuda/*.cuh) behind C functions, launched as the .cu files do it. `order` is that of
// emulation::Block::run; `global_scratch` forces the path for what doesn't fit into shared memory.
#include "cuda.h"
//
#include "cuda/importance_weights.cuh"
#include "cuda/repetition.cuh"
#include "cuda/sample_tokens.cuh"
#include "cuda/select.cuh"
#include "cuda/tilted_moments.cuh"
#include "cuda/token_logprobs.cuh"

using namespace daemon_fast::cuda;

namespace {

// Heap memory to the byte, full of garbage; freed after the launch.
struct Scratch {
    std::vector<char> bytes;
    explicit Scratch(int64_t size) : bytes(static_cast<size_t>(size), static_cast<char>(0xab)) {}
    template <class Value>
    Value* data() {
        return bytes.empty() ? nullptr : reinterpret_cast<Value*>(bytes.data());
    }
};

template <class Run>
void with_threads(int threads, bool shared, const Run& run) {
    const auto with_space = [&](auto count) { shared ? run(count, std::true_type()) : run(count, std::false_type()); };
    threads == 32 ? with_space(std::integral_constant<int, 32>()) : with_space(std::integral_constant<int, 128>());
}

template <class Token, int kThreads, bool kShared>
void run_repetition(
    const void* tokens, int64_t row_stride, const void* lengths, int wide_lengths, int64_t R, int64_t T,
    const RepetitionPlan& plan, int order, float* out) {
    const RowLayout layout = RowScratch<Token, kShared>::layout(T);
    const unsigned grid = kShared ? static_cast<unsigned>(R) : 2;
    Scratch scratch(kShared ? 0 : grid * layout.bytes);
    emulation::launch(grid, kThreads, kShared ? static_cast<size_t>(layout.bytes) : 0, order, [&] {
        repetition_kernel<Token, kThreads, kShared>(
            static_cast<const Token*>(tokens), row_stride, lengths, wide_lengths, 1, R, T, plan, layout,
            scratch.data<char>(), out);
    });
}

template <class Rule>
void run_select(
    const float* features, const double* mu, const float* base, const double* uniforms, SelectShape shape, int threads,
    int global_scratch, int order, int64_t* index, float* weights, float* log_z, float* ess) {
    if (threads == 0) {
        const auto blocks = static_cast<unsigned>((shape.G + kFewWarps - 1) / kFewWarps);
        emulation::launch(blocks, kFewThreads, 0, order, [&] {
            select_few_kernel<Rule, float, float>(features, mu, base, uniforms, shape, index, weights, log_z, ess);
        });
        return;
    }
    const unsigned grid = global_scratch ? 2 : static_cast<unsigned>(shape.G);
    const int64_t bytes = 8 * Rule::scratch(shape.M);
    Scratch scratch(global_scratch ? grid * bytes : 0);
    with_threads(threads, !global_scratch, [&](auto count, auto shared) {
        emulation::launch(grid, count.value, global_scratch ? 0 : static_cast<size_t>(bytes), order, [&] {
            select_kernel<Rule, float, float, count.value, shared.value>(
                features, mu, base, uniforms, shape, scratch.data<double>(), index, weights, log_z, ess);
        });
    });
}

template <class Logit>
void run_token_logprobs(
    const void* logits, int64_t row_stride, const int64_t* ids, int64_t R, int64_t V, double temperature, int order,
    float* log_p, float* log_q) {
    emulation::launch(std::min<unsigned>(2, R), 64, 0, order, [&] {
        const auto kernel = temperature == 1.0 ? token_logprobs_kernel<Logit, int64_t, false, 64>
                                               : token_logprobs_kernel<Logit, int64_t, true, 64>;
        kernel(
            static_cast<const Logit*>(logits), row_stride, ids, 1, R, static_cast<int>(V), Temperature(temperature),
            log_p, log_q);
    });
}

template <class Logit>
void run_token_logprobs_backward(
    const float* grad_log_p, const float* grad_log_q, const void* logits, int64_t row_stride, const int64_t* ids,
    int64_t R, int64_t V, double temperature, int order, void* grad) {
    emulation::launch(std::min<unsigned>(2, R), 64, 0, order, [&] {
        const auto kernel = temperature == 1.0 ? token_logprobs_backward_kernel<Logit, int64_t, false, 64>
                                               : token_logprobs_backward_kernel<Logit, int64_t, true, 64>;
        kernel(
            grad_log_p, 1, grad_log_q, 1, static_cast<const Logit*>(logits), row_stride, ids, 1, R, static_cast<int>(V),
            Temperature(temperature), static_cast<Logit*>(grad));
    });
}

}  // namespace

extern "C" {

void emulate_repetition(
    const void* tokens, int token_bytes, int64_t row_stride, const void* lengths, int wide_lengths, int64_t R,
    int64_t T, const int32_t* ngrams, int ngram_count, const int32_t* windows, int window_count, int threads,
    int global_scratch, int order, float* out) {
    RepetitionPlan plan{};
    plan.ngram_count = ngram_count;
    plan.window_count = window_count;
    std::copy(ngrams, ngrams + ngram_count, plan.ngrams);
    std::copy(windows, windows + window_count, plan.windows);
    plan.longest_ngram = *std::max_element(plan.ngrams, plan.ngrams + kMaxColumns);
    const auto run = [&](auto token, auto count, auto shared) {
        run_repetition<decltype(token), count.value, shared.value>(
            tokens, row_stride, lengths, wide_lengths, R, T, plan, order, out);
    };
    const auto with_token = [&](auto count, auto shared) {
        token_bytes == 8 ? run(int64_t{}, count, shared) : run(int32_t{}, count, shared);
    };
    with_threads(threads, !global_scratch, with_token);
}

void emulate_token_logprobs(
    const void* logits, int kind, int64_t row_stride, const int64_t* ids, int64_t R, int64_t V, double temperature,
    int order, float* log_p, float* log_q) {
    const auto run = [&](auto logit) {
        run_token_logprobs<decltype(logit)>(logits, row_stride, ids, R, V, temperature, order, log_p, log_q);
    };
    kind == 0 ? run(float{}) : kind == 1 ? run(__half{}) : run(__nv_bfloat16{});
}

void emulate_token_logprobs_backward(
    const float* grad_log_p, const float* grad_log_q, const void* logits, int kind, int64_t row_stride,
    const int64_t* ids, int64_t R, int64_t V, double temperature, int order, void* grad) {
    const auto run = [&](auto logit) {
        run_token_logprobs_backward<decltype(logit)>(
            grad_log_p, grad_log_q, logits, row_stride, ids, R, V, temperature, order, grad);
    };
    kind == 0 ? run(float{}) : kind == 1 ? run(__half{}) : run(__nv_bfloat16{});
}

void emulate_sample_tokens(
    const void* logits, int kind, int64_t row_stride, const double* uniforms, int64_t R, int64_t V, double temperature,
    int order, int64_t* ids, float* log_p, float* log_q) {
    const auto run = [&](auto logit, auto tempered) {
        using Logit = decltype(logit);
        const Logit* const rows = static_cast<const Logit*>(logits);
        const int64_t pieces = Pieces<Logit>::count(V), blocks = (pieces + kPieceWarps - 1) / kPieceWarps;
        Scratch sums(R * pieces * static_cast<int64_t>(sizeof(LogSums)));
        emulation::launch(static_cast<unsigned>(std::min<int64_t>(2, R) * blocks), kPieceThreads, 0, order, [&] {
            sum_pieces_kernel<Logit, tempered.value>(
                rows, row_stride, R, static_cast<int>(V), static_cast<int>(pieces), Temperature(temperature),
                sums.data<LogSums>());
        });
        emulation::launch(std::min<unsigned>(2, R), kWarp, 0, order, [&] {
            sample_tokens_kernel<Logit, tempered.value>(
                rows, row_stride, uniforms, 1, R, static_cast<int>(V), static_cast<int>(pieces),
                Temperature(temperature), sums.data<LogSums>(), ids, log_p, log_q);
        });
    };
    const auto with_temperature = [&](auto logit) {
        temperature == 1.0 ? run(logit, std::false_type()) : run(logit, std::true_type());
    };
    kind == 0 ? with_temperature(float{}) : kind == 1 ? with_temperature(__half{}) : with_temperature(__nv_bfloat16{});
}

void emulate_importance_weights(
    const double* log_w, int64_t G, int64_t M, int threads, int global_scratch, int order, double* weights,
    double* log_mean, double* ess) {
    const unsigned grid = global_scratch ? 2 : static_cast<unsigned>(G);
    Scratch scratch(global_scratch ? grid * M * 8 : 0);
    with_threads(threads, !global_scratch, [&](auto count, auto shared) {
        emulation::launch(grid, count.value, global_scratch ? 0 : static_cast<size_t>(M * 8), order, [&] {
            importance_weights_kernel<double, count.value, shared.value>(
                log_w, G, M, scratch.data<double>(), weights, log_mean, ess);
        });
    });
}

void emulate_sir_select(
    const float* features, const double* mu, const float* base, const double* uniforms, int64_t G, int64_t M, int64_t K,
    int64_t S, int threads, int global_scratch, int order, int64_t* index, float* weights, float* log_z, float* ess) {
    run_select<Sir>(
        features, mu, base, uniforms, SelectShape{G, M, K, S}, threads, global_scratch, order, index, weights, log_z,
        ess);
}

void emulate_race_select(
    const float* features, const double* mu, const float* base, const double* uniforms, int64_t G, int64_t M, int64_t K,
    int64_t S, int threads, int global_scratch, int order, int64_t* index, float* weights, float* log_z, float* ess) {
    run_select<Race>(
        features, mu, base, uniforms, SelectShape{G, M, K, S}, threads, global_scratch, order, index, weights, log_z,
        ess);
}

void emulate_tilted_moments(
    const float* features, const double* mu, const double* base, int64_t N, int64_t M, int64_t K, int per_prefix,
    int warps, int64_t blocks, int order, double* log_z, double* mean, double* covariance) {
    const MomentShape shape{N, M, static_cast<int>(K)};
    if (warps == 0) warps = shape.warps();
    const auto run = [&](auto how) {
        using Normalization = decltype(how);
        if (blocks == 0) blocks = shape.blocks(Normalization::units(shape));
        Scratch partial(shape.entries() * blocks * 8);
        const MomentInput<float, double> input{features, mu, base};
        emulation::launch(
            static_cast<unsigned>(blocks), static_cast<unsigned>(warps * kWarp),
            static_cast<size_t>(shape.shared_bytes(warps)), order,
            [&] { tilted_moments_kernel<Normalization, float, double>(input, shape, partial.data<double>()); });
        emulation::launch(1, 128, static_cast<size_t>(shape.finish_bytes()), order, [&] {
            finish_tilted_moments_kernel<Normalization>(partial.data<double>(), blocks, shape, log_z, mean, covariance);
        });
    };
    per_prefix ? run(PerPrefix{}) : run(Global{});
}

}  // extern "C"
