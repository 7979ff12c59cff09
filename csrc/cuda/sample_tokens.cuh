// Device side of sample_tokens, in two launches. First the sums of every piece of every row, a warp a piece: when
// decoding, rows are few, and a block for each would leave most of the GPU idle. Then a block a row: its first warp
// finds the piece into which the uniform falls, and all read that again to find the id. Each of its steps waits for the
// one before, so that their number is what it takes.
#pragma once

#include "cuda/log_sums.cuh"

namespace daemon_fast::cuda {

constexpr int kPieceIds = kWarp * kWarp;  // 32 a lane: one batch of 2-byte logits
constexpr int kPieceThreads = 128;
constexpr int kPieceWarps = kPieceThreads / kWarp;
constexpr int kDrawThreads = 256;
constexpr int kDrawWarps = kDrawThreads / kWarp;
constexpr int kDrawIds = kPieceIds / kDrawThreads;  // of a thread

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

// 2^x for x <= 0 to the precision of float32, but in the range of float64, where few vanish.
__device__ __forceinline__ double wide_exp2(double x) {
    x = fmax(x, -2000.0);
    const double whole = rint(x);
    return ldexp(static_cast<double>(fast_exp2(static_cast<float>(x - whole))), static_cast<int>(whole));
}

// What the first warp of a block finds, for all of it.
struct PieceFound {
    int piece;  // or -1
    float piece_max, max, plain, tempered;
    double worth;  // of the piece's weights, which are measured from its own maximum
    double rest;   // the target, less all before the piece
};

// By one warp, each lane with adjacent pieces of its own.
template <bool kTempered>
__device__ __forceinline__ PieceFound
find_piece(const LogSums* sums, int pieces, double uniform, const Temperature& temperature) {
    const int lane = threadIdx.x % kWarp;
    const int each = (pieces + kWarp - 1) / kWarp, begin = lane * each, end = min(begin + each, pieces);
    float max = kLowest, plain = 0;
#pragma unroll 2
    for (int i = begin; i < end; ++i) max = fmaxf(max, sums[i].max);
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
        max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, distance));
    const auto worth = [&](int i) {
        return wide_exp2(static_cast<double>(sums[i].max - max) * static_cast<double>(temperature.scale));
    };
    const auto share_of = [&](int i) {
        return worth(i) * static_cast<double>(kTempered ? sums[i].tempered : sums[i].plain);
    };
    double share = 0;
#pragma unroll 1
    for (int i = begin; i < end; ++i) {
        if (kTempered) plain += sums[i].plain * fast_exp2((sums[i].max - max) * kLog2E);
        share += share_of(i);
    }
    double running = share;  // as running_sums, in one loop with the other sum
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
        if (kTempered) plain += __shfl_xor_sync(kAllLanes, plain, distance);
        const double before = __shfl_up_sync(kAllLanes, running, distance);
        if (lane >= distance) running += before;
    }
    const double total = last_lane(running);
    const float tempered = static_cast<float>(total);
    PieceFound found{-1, 0, max, kTempered ? plain : tempered, tempered, 0, 0};
    const Pick owner = pick(share, running, uniform * total);
    if (!(uniform >= 0 && uniform < 1 && total > 0 && is_finite(total) && is_finite(static_cast<double>(max))))
        return found;
    double before = 0;
    const int last = min((owner.lane + 1) * each, pieces);
#pragma unroll 1
    for (int i = owner.lane * each; i < last; ++i) {
        const double own = share_of(i);
        if (own > 0) {
            found.piece = i;
            found.rest = owner.rest - before;
            if (own > found.rest) break;
        }
        before += own;
    }
    found.piece_max = sums[found.piece].max;
    found.worth = worth(found.piece);
    return found;
}

// A row without a distribution, or a uniform outside [0, 1), gives -1 and NaN.
template <class Logit, bool kTempered>
__global__ void __launch_bounds__(kDrawThreads) sample_tokens_kernel(
    const Logit* logits, int64_t row_stride, const double* uniforms, int64_t uniform_stride, int64_t R, int V,
    int pieces, Temperature temperature, const LogSums* sums, int64_t* ids, float* log_p, float* log_q) {
    __shared__ PieceFound found;
    __shared__ double warp_sums[kDrawWarps];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    for (int64_t r = blockIdx.x; r < R; r += gridDim.x) {
        const Pieces<Logit> cut(logits + r * row_stride, V);
        if (warp == 0) {
            const PieceFound own =
                find_piece<kTempered>(sums + r * pieces, pieces, uniforms[r * uniform_stride], temperature);
            if (lane == 0) found = own;
        }
        __syncthreads();
        int id = -1;
        float x_of_id = 0;
        if (found.piece >= 0) {
            const int first = cut.begin(found.piece) + static_cast<int>(threadIdx.x) * kDrawIds;
            float x[kDrawIds], weights[kDrawIds], sum = 0;
#pragma unroll
            for (int i = 0; i < kDrawIds; ++i)
                x[i] = first + i >= 0 && first + i < V ? to_float(cut.row[first + i])
                                                       : __int_as_float(static_cast<int32_t>(0xff800000u));
#pragma unroll
            for (int i = 0; i < kDrawIds; ++i) sum += weights[i] = exp2f((x[i] - found.piece_max) * temperature.scale);
            const double share = static_cast<double>(sum) * found.worth, running = running_sums(share);
            if (lane == kWarp - 1) warp_sums[warp] = running;
            __syncthreads();
            const double warp_share = lane < kDrawWarps ? warp_sums[lane] : 0.0;
            const Pick of_warps = pick(warp_share, running_sums(warp_share), found.rest);
            if (warp == of_warps.lane) {
                const Pick of_lanes = pick(share, running, of_warps.rest);
                double rest = of_lanes.rest;
                if (lane == of_lanes.lane) {
#pragma unroll
                    for (int i = 0; i < kDrawIds; ++i) {
                        const double weight = static_cast<double>(weights[i]) * found.worth;
                        if (weight > 0 && (id < 0 || rest >= 0)) {  // else passed before
                            id = first + i;
                            x_of_id = x[i];
                        }
                        rest -= weight;
                    }
                }
            }
        }
        if (id >= 0 || (found.piece < 0 && threadIdx.x == 0)) {
            const float x = id >= 0 ? x_of_id - found.max : nan_float();
            ids[r] = id;
            log_p[r] = x - logf(found.plain);
            log_q[r] = kTempered ? x * temperature.inverse - logf(found.tempered) : log_p[r];
        }
        __syncthreads();  // the next row overwrites what is shared
    }
}

}  // namespace daemon_fast::cuda
