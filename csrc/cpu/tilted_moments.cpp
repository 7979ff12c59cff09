// tilted_moments on the CPU: log Z, mean and covariance of the features under weights exp(b - mu . f), for one
// Newton step of the fit, in one pass over the features.
//
// Samples go in tiles, transposed to one row per feature. A tile's moments are taken about its own mean, and tiles
// are merged by Chan's update, so that no large numbers cancel; each keeps the maximum of its log-weights, so that
// none overflows. Prefixes are cut into blocks of a fixed size and the blocks added up in order: the result does not
// depend on the number of threads.
#include "checks.h"
#include "cpu/dispatch.h"
#include "cpu/weights.h"

namespace daemon_fast::cpu {
namespace {

constexpr int64_t kTile = 256;            // samples: 2 KiB a feature
constexpr int64_t kPrefixesInBlock = 64;  // the unit of work of a thread

// Of a set of samples: their summed weight exp(log w - max), mean, and summed outer products about the mean.
struct Moments {
    double max = -kInf, sum = 0;
    std::vector<double> mean, scatter;  // [K], [K * K] (upper triangle)

    explicit Moments(int64_t K) : mean(static_cast<size_t>(K)), scatter(static_cast<size_t>(K * K)) {}

    void clear() {
        max = -kInf;
        sum = 0;
        std::fill(mean.begin(), mean.end(), 0.0);
        std::fill(scatter.begin(), scatter.end(), 0.0);
    }
};

DAEMON_FAST_INLINE void merge(Moments& into, const Moments& from) {
    if (from.sum == 0) return;
    const double max = into.max > from.max ? into.max : from.max;
    const double keep = into.sum > 0 ? std::exp(into.max - max) : 0, add = std::exp(from.max - max);
    const double kept = into.sum * keep, added = from.sum * add, total = kept + added;
    const int64_t K = static_cast<int64_t>(into.mean.size());
    for (int64_t a = 0; a < K; ++a) {
        const double shift_a = from.mean[a] - into.mean[a];
        for (int64_t b = a; b < K; ++b) {
            const double shift_b = from.mean[b] - into.mean[b];
            double& entry = into.scatter[a * K + b];
            entry = entry * keep + from.scatter[a * K + b] * add + shift_a * shift_b * (kept * (added / total));
        }
    }
    for (int64_t a = 0; a < K; ++a) into.mean[a] += (from.mean[a] - into.mean[a]) * (added / total);
    into.max = max;
    into.sum = total;
}

// Scratch of one thread: a tile's log-weights, then weights, and its features.
struct Tile {
    std::vector<double> weight, feature;  // [kTile], [K, kTile]
    Moments moments;
    explicit Tile(int64_t K) : weight(kTile), feature(static_cast<size_t>(K * kTile)), moments(K) {}
};

// Moments of `count` samples. False if a log-weight is NaN or +inf; all -inf gives a sum of 0.
template <class Real>
DAEMON_FAST_INLINE bool tile_moments(
    const Real* features, const double* mu, const double* base, int64_t count, int64_t K, Tile& tile) {
    const int64_t end = padded(count);
    double* const weight = tile.weight.data();
    start_log_weights(base, count, weight);
    for (int64_t k = 0; k < K; ++k) {
        double* const row = tile.feature.data() + k * kTile;
        for (int64_t j = 0; j < count; ++j) row[j] = static_cast<double>(features[j * K + k]);
        for (int64_t j = count; j < end; ++j) row[j] = 0;
        for (int64_t j = 0; j < end; j += kLanes)
            store_vec(weight + j, load_vec(weight + j) - mu[k] * load_vec(row + j));
    }
    const WeightSums sums = exponentiate(weight, count);
    Moments& m = tile.moments;
    m.max = sums.max;
    m.sum = sums.sum;
    if (!std::isfinite(sums.max)) return sums.max == -kInf;

    for (int64_t k = 0; k < K; ++k) {
        double* const row = tile.feature.data() + k * kTile;
        Vec total = Vec{};
        for (int64_t j = 0; j < end; j += kLanes) total += load_vec(weight + j) * load_vec(row + j);
        m.mean[k] = sum_lanes(total) / sums.sum;
        for (int64_t j = 0; j < end; j += kLanes) store_vec(row + j, load_vec(row + j) - m.mean[k]);
    }
    for (int64_t a = 0; a < K; ++a) {
        const double* const row_a = tile.feature.data() + a * kTile;
        double weighted[kTile];
        for (int64_t j = 0; j < end; j += kLanes) store_vec(weighted + j, load_vec(weight + j) * load_vec(row_a + j));
        for (int64_t b = a; b < K; ++b) {
            const double* const row_b = tile.feature.data() + b * kTile;
            Vec total = Vec{};
            for (int64_t j = 0; j < end; j += kLanes) total += load_vec(weighted + j) * load_vec(row_b + j);
            m.scatter[a * K + b] = sum_lanes(total);
        }
    }
    return true;
}

// What a block of prefixes leaves behind. Per prefix: plain sums of log Z_i, mean_i and covariance_i. Global: one
// set of moments over all its samples.
struct Block {
    Moments moments;
    double log_z = 0;
    explicit Block(int64_t K) : moments(K) {}
};

struct Problem {
    int64_t N, M, K;
    const double *mu, *base;
    bool per_prefix;
};

template <class Real>
DAEMON_FAST_INLINE void sum_block(
    const Real* features, const Problem& p, int64_t begin, int64_t end, Tile& tile, Moments& prefix, Block& block,
    FirstBadRow& bad) {
    for (int64_t i = begin; i < end; ++i) {
        Moments& target = p.per_prefix ? prefix : block.moments;
        if (p.per_prefix) prefix.clear();
        for (int64_t j = 0; j < p.M; j += kTile) {
            const int64_t sample = i * p.M + j, count = p.M - j < kTile ? p.M - j : kTile;
            if (tile_moments(features + sample * p.K, p.mu, p.base ? p.base + sample : nullptr, count, p.K, tile))
                merge(target, tile.moments);
            else
                bad.report(i);
        }
        if (!p.per_prefix) continue;
        if (prefix.sum == 0) {
            bad.report(i);
            continue;
        }
        block.log_z += prefix.max + std::log(prefix.sum / static_cast<double>(p.M));
        for (int64_t k = 0; k < p.K; ++k) block.moments.mean[k] += prefix.mean[k];
        for (int64_t k = 0; k < p.K * p.K; ++k) block.moments.scatter[k] += prefix.scatter[k] / prefix.sum;
    }
}

template <class Real>
void sum_all(const Tensor& features, const Problem& p, double* log_z, double* mean, double* covariance) {
    const Real* const feature_of = features.const_data_ptr<Real>();
    const int64_t blocks = (p.N + kPrefixesInBlock - 1) / kPrefixesInBlock;
    std::vector<Block> parts(static_cast<size_t>(blocks), Block(p.K));
    FirstBadRow bad;
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
        Tile tile(p.K);
        Moments prefix(p.K);
        dispatch([&]() DAEMON_FAST_INLINE_LAMBDA {
            for (int64_t n = first; n < last; ++n) {
                const int64_t begin = n * kPrefixesInBlock;
                const int64_t end = begin + kPrefixesInBlock < p.N ? begin + kPrefixesInBlock : p.N;
                sum_block(feature_of, p, begin, end, tile, prefix, parts[n], bad);
            }
        });
    });
    Block& total = parts[0];
    for (int64_t n = 1; n < blocks && !bad.any(); ++n) {
        if (!p.per_prefix) {
            merge(total.moments, parts[n].moments);
            continue;
        }
        total.log_z += parts[n].log_z;
        for (int64_t k = 0; k < p.K; ++k) total.moments.mean[k] += parts[n].moments.mean[k];
        for (int64_t k = 0; k < p.K * p.K; ++k) total.moments.scatter[k] += parts[n].moments.scatter[k];
    }
    if (bad.any()) {
        std::vector<double> row(static_cast<size_t>(padded(p.M)));
        const int64_t i = bad.row();
        tilt(feature_of + i * p.M * p.K, p.mu, p.base ? p.base + i * p.M : nullptr, p.M, p.K, row.data());
        fail_log_weights("tilted_moments", i, row.data(), p.M);
    }
    if (!p.per_prefix && total.moments.sum == 0) fail("tilted_moments: all log-weights of all ", p.N, " rows are -inf");

    const double samples = static_cast<double>(p.N) * static_cast<double>(p.M);
    const double scale = p.per_prefix ? 1.0 / static_cast<double>(p.N) : 1.0 / total.moments.sum;
    *log_z = p.per_prefix ? total.log_z * scale : total.moments.max + std::log(total.moments.sum / samples);
    for (int64_t a = 0; a < p.K; ++a) {
        mean[a] = p.per_prefix ? total.moments.mean[a] * scale : total.moments.mean[a];
        for (int64_t b = a; b < p.K; ++b)
            covariance[a * p.K + b] = covariance[b * p.K + a] = total.moments.scatter[a * p.K + b] * scale;
    }
}

std::tuple<Tensor, Tensor, Tensor> tilted_moments(
    Tensor features, Tensor mu, std::optional<Tensor> base_log_w, std::string normalization) {
    check_tilted_moments(features, mu, base_log_w, normalization);
    features = torch::stable::contiguous(features);
    mu = torch::stable::contiguous(mu);
    if (base_log_w) base_log_w = as_double(*base_log_w);
    const int64_t K = features.size(2);
    const Problem problem{
        features.size(0),
        features.size(1),
        K,
        mu.const_data_ptr<double>(),
        base_log_w ? base_log_w->const_data_ptr<double>() : nullptr,
        normalization == "per_prefix"};
    Tensor log_z = empty_like_with(features, {}, ScalarType::Double);
    Tensor mean = empty_like_with(features, {K}, ScalarType::Double);
    Tensor covariance = empty_like_with(features, {K, K}, ScalarType::Double);
    double* const out[] = {
        log_z.mutable_data_ptr<double>(), mean.mutable_data_ptr<double>(), covariance.mutable_data_ptr<double>()};
    if (features.scalar_type() == ScalarType::Double)
        sum_all<double>(features, problem, out[0], out[1], out[2]);
    else
        sum_all<float>(features, problem, out[0], out[1], out[2]);
    return {log_z, mean, covariance};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(daemon_fast, m) {
    m.def(
        "tilted_moments(Tensor features, Tensor mu, Tensor? base_log_w=None, "
        "str normalization='per_prefix') -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(daemon_fast, CPU, m) {
    m.impl("tilted_moments", TORCH_BOX(&tilted_moments));
}

}  // namespace daemon_fast::cpu
