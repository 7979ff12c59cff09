// repetition of the rows on standard input, built for another architecture by tests/test_compilers.py. A row is its
// length and 300 tokens, all int64; out come its float32 results, once with each width of index.
#include "cpu/repetition.h"

#include <cstdio>

int main() {
    using namespace daemon_fast::cpu;
    constexpr int64_t T = 300;
    const Plan plan({1, 2, 3, 4, T}, {1, 8, 32, T}, T);
    Scratch<uint16_t> narrow(T, plan.levels);
    Scratch<uint32_t> wide(T, plan.levels);
    std::vector<int64_t> row(1 + T);
    std::vector<float> out(static_cast<size_t>(plan.columns()));
    while (std::fread(row.data(), sizeof(int64_t), row.size(), stdin) == row.size()) {
        repetition_row(row.data() + 1, row[0], plan, narrow, out.data());
        std::fwrite(out.data(), sizeof(float), out.size(), stdout);
        repetition_row(row.data() + 1, row[0], plan, wide, out.data());
        std::fwrite(out.data(), sizeof(float), out.size(), stdout);
    }
}
