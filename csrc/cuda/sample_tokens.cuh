// Device side of sample_tokens, in two launches. First the sums of every piece of every row, a warp a piece: when
// decoding, rows are few, and a block for each would leave most of the GPU idle. Then a warp a row finds the piece into
// which the uniform falls, and reads it again to find the id.
#pragma once

#include "cuda/log_sums.cuh"

namespace daemon_fast::cuda {

constexpr int kPieceIds = kWarp * kWarp;  // 32 a lane: one batch of 2-byte logits; and a warp of sums of 32, to search
constexpr int kPieceThreads = 128;
constexpr int kPieceWarps = kPieceThreads / kWarp;

// How a row is cut. Every piece but the first begins at a 16-byte boundary, so that the first may be shorter.
template <class Logit>
struct Pieces {
    static constexpr int kVector = 16 / sizeof(Logit);
    const Logit* row;
    int V, skew;  // how many ids the first piece lacks

    static __host__ __device__ int64_t count(int64_t V) { return (V + kVector - 1 + kPieceIds - 1) / kPieceIds; }

    __device__ Pieces(const Logit* row, int V)
        : row(row), V(V), skew(static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(Logit))) {}

    __device__ int begin(int piece) const { return piece * kPieceIds - skew; }  // of the first, 0 or below
};

// sums[R, pieces]: a block takes kPieceWarps pieces of a row, and the same ones of the next row that is its own.
template <class Logit, bool kTempered>
__global__ void __launch_bounds__(kPieceThreads, 1024 / kPieceThreads) sum_pieces_kernel(
    const Logit* logits, int64_t row_stride, int64_t R, int V, int pieces, Temperature temperature, LogSums* sums) {
    const unsigned blocks = (pieces + kPieceWarps - 1) / kPieceWarps;  // for a row
    const int piece = static_cast<int>(blockIdx.x % blocks) * kPieceWarps + threadIdx.x / kWarp;
    if (piece >= pieces) return;
    for (int64_t r = blockIdx.x / blocks; r < R; r += gridDim.x / blocks) {
        const Pieces<Logit> cut(logits + r * row_stride, V);
        const int begin = max(cut.begin(piece), 0), end = min(cut.begin(piece + 1), V);  // the last may be empty
        const int lane = threadIdx.x % kWarp;
        LogSums own = no_sums();
        if (begin < end) own = scan_row<Logit, kTempered, kWarp>(cut.row + begin, end - begin, lane, temperature);
        own = merge_warp<kTempered>(own, temperature);
        if (lane == 0) sums[r * pieces + piece] = own;
    }
}

// A row without a distribution, or a uniform outside [0, 1), gives -1 and NaN.
template <class Logit, bool kTempered>
__global__ void __launch_bounds__(kWarp) sample_tokens_kernel(
    const Logit* logits, int64_t row_stride, const double* uniforms, int64_t uniform_stride, int64_t R, int V,
    int pieces, Temperature temperature, const LogSums* sums, int64_t* ids, float* log_p, float* log_q) {
    __shared__ float weights[kWarp][kWarp + 1];  // of a piece; rows begin in different banks
    const int lane = threadIdx.x;
    for (int64_t r = blockIdx.x; r < R; r += gridDim.x) {
        const Pieces<Logit> cut(logits + r * row_stride, V);
        const LogSums* const own = sums + r * pieces;
        double max = static_cast<double>(kLowest), plain = 0, tempered = 0;
#pragma unroll 1
        for (int i = lane; i < pieces; i += kWarp) max = MaxOrNan()(max, static_cast<double>(own[i].max));
        max = reduce_warp(max, MaxOrNan());
        // What the weights of a piece, measured from its own maximum, are worth; in float64, where few vanish.
        const auto worth = [&](int i, double inverse) {
            return exp((static_cast<double>(own[i].max) - max) * inverse);
        };
        const double inverse = static_cast<double>(temperature.inverse);
        const auto share = [&](int i) {
            return i < pieces ? worth(i, inverse) * static_cast<double>(kTempered ? own[i].tempered : own[i].plain)
                              : 0.0;
        };
#pragma unroll 1
        for (int i = lane; i < pieces; i += kWarp) {
            plain += worth(i, 1.0) * static_cast<double>(own[i].plain);
            if (kTempered) tempered += share(i);
        }
        plain = reduce_warp(plain, Sum());
        tempered = kTempered ? reduce_warp(tempered, Sum()) : plain;

        const double uniform = uniforms[r * uniform_stride];
        int id = -1;
        if (uniform >= 0 && uniform < 1 && tempered > 0 && is_finite(tempered) && is_finite(max)) {
            double target = uniform * tempered, rest = 0;
            int piece = 0;
            for (int first = 0; first < pieces; first += kWarp) {
                const double own_share = share(first + lane), running = running_sums(own_share);
                const Pick found = pick(own_share, running, target);
                if (found.lane >= 0) {
                    piece = first + found.lane;
                    rest = found.rest;
                }
                if (found.passed) break;
                target -= last_lane(running);
            }
            const int begin = cut.begin(piece);
            const float piece_max = own[piece].max;
#pragma unroll
            for (int i = 0; i < kWarp; ++i) {
                const int v = begin + i * kWarp + lane;
                weights[i][lane] =
                    v >= 0 && v < V ? exp2f((to_float(cut.row[v]) - piece_max) * temperature.scale) : 0.0f;
            }
            __syncwarp();
            double sum = 0;
#pragma unroll
            for (int i = 0; i < kWarp; ++i) sum += static_cast<double>(weights[lane][i]);
            const Pick line = pick(sum, running_sums(sum), rest / worth(piece, inverse));
            const double weight = static_cast<double>(weights[line.lane][lane]);
            id = begin + line.lane * kWarp + pick(weight, running_sums(weight), line.rest).lane;
            __syncwarp();  // the next row overwrites the weights
        }
        if (lane == 0) {
            const float x = id >= 0 ? to_float(cut.row[id]) - static_cast<float>(max) : nan_float();
            ids[r] = id;
            log_p[r] = x - logf(static_cast<float>(plain));
            log_q[r] = kTempered ? x * temperature.inverse - logf(static_cast<float>(tempered)) : log_p[r];
        }
    }
}

}  // namespace daemon_fast::cuda
