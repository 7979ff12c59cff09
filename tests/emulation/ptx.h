// Runs PTX, the code that nvcc made of the kernels, CUB's and libdevice's included: each thread is an interpreter in a
// fiber of cuda.h. Addresses of shared memory are checked, and all alignments. What an instruction would round
// differently is computed exactly (ex2.approx). An instruction that is not here is an error when the PTX is loaded.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cctype>
#include <map>
#include <set>
#include <sstream>
#include <type_traits>
#include <unordered_map>
#include <utility>

#include "cuda.h"

namespace emulation::ptx {

struct Thread;
struct Op;
using Run = void (*)(Thread&, const Op&);

struct Op {
    Run run = nullptr;
    int count = 0;       // of operands
    int at[6] = {};      // their slots
    int64_t offset = 0;  // of an address
    int guard = -1;      // slot of the predicate without which it does nothing
    bool negated = false;
    int target = 0;  // where a branch goes
};

struct Program {
    std::vector<Op> ops;
    std::vector<std::string> names;              // of the ops
    std::unordered_map<std::string, int> slots;  // registers, constants and parameters
    std::vector<uint64_t> constants;             // what slots hold at first
    std::vector<int> parameters;                 // slots of their addresses
    int64_t static_shared = 0, max_threads = 1024;
};

struct Thread {
    std::vector<uint64_t> slots;
    int64_t shared_bytes = 0;
    int next = 0;

    template <class T>
    T get(int slot) const {
        T value;
        std::memcpy(&value, &slots[static_cast<size_t>(slot)], sizeof value);
        return value;
    }
    // Integers are extended, so that a wider register can take them.
    template <class T>
    void set(int slot, T value) {
        uint64_t& to = slots[static_cast<size_t>(slot)];
        if constexpr (std::is_integral_v<T>) {
            to = static_cast<uint64_t>(static_cast<std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>(value));
        } else {
            to = 0;
            std::memcpy(&to, &value, sizeof value);
        }
    }
    template <class T>
    T in(const Op& op, int i) const {
        return get<T>(op.at[i]);
    }
    template <class T>
    void out(const Op& op, T value) {
        set(op.at[0], value);
    }
    template <class T>
    T* address(const Op& op, int i, bool shared, int width) const {
        const uint64_t at = (shared ? in<uint32_t>(op, i) : in<uint64_t>(op, i)) + static_cast<uint64_t>(op.offset);
        const uint64_t size = sizeof(T) * static_cast<uint64_t>(width);
        if (at % size != 0) fail("a misaligned address");
        if (!shared) return reinterpret_cast<T*>(at);
        if (at + size > static_cast<uint64_t>(shared_bytes)) fail("an address outside shared memory");
        return reinterpret_cast<T*>(shared_memory.get() + at);
    }
};

struct Half {
    uint16_t bits;
};
struct Bfloat16 {
    uint16_t bits;
};

template <class T>
struct Name;
#define PTX_TYPE(T, text)                          \
    template <>                                    \
    struct Name<T> {                               \
        static constexpr const char* value = text; \
    };
PTX_TYPE(bool, "pred")
PTX_TYPE(uint8_t, "8")
PTX_TYPE(int8_t, "s8")
PTX_TYPE(uint16_t, "16")
PTX_TYPE(int16_t, "s16")
PTX_TYPE(uint32_t, "32")
PTX_TYPE(int32_t, "s32")
PTX_TYPE(uint64_t, "64")
PTX_TYPE(int64_t, "s64")
PTX_TYPE(float, "f32")
PTX_TYPE(double, "f64")

template <class... T>
struct Types {};
using Signed = Types<int16_t, int32_t, int64_t>;
using Unsigned = Types<uint16_t, uint32_t, uint64_t>;
using Floats = Types<float, double>;
using Stored = Types<uint8_t, int8_t, uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t, float, double>;

// Every instruction by its name, without what makes no difference here; u and b types are one.
inline std::unordered_map<std::string, Run>& table() {
    static std::unordered_map<std::string, Run> all;
    return all;
}

template <class F, class... T>
void each(Types<T...>, const F& f) {
    (f(T{}), ...);
}

// `F` is a function object without state; its operands and result may have any of `Types`.
template <class F, class T>
void unary(Thread& t, const Op& op) {
    t.out(op, F()(t.in<T>(op, 1)));
}
template <class F, class T>
void binary(Thread& t, const Op& op) {
    t.out(op, F()(t.in<T>(op, 1), t.in<T>(op, 2)));
}
template <class F, class T>
void ternary(Thread& t, const Op& op) {
    t.out(op, F()(t.in<T>(op, 1), t.in<T>(op, 2), t.in<T>(op, 3)));
}

template <class T>
using Bits = typename std::conditional_t<std::is_integral_v<T>, std::make_unsigned<T>, std::common_type<T>>::type;
template <class T>
using Wide = std::conditional_t<
    sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
    std::conditional_t<
        sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
        std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;

#define PTX_FUNCTION(name, expression)         \
    struct name {                              \
        template <class T>                     \
        auto operator()(T a, T b) const {      \
            return static_cast<T>(expression); \
        }                                      \
    };
#define PTX_COMPARISON(name, expression)  \
    struct name {                         \
        template <class T>                \
        bool operator()(T a, T b) const { \
            return expression;            \
        }                                 \
    };
#define PTX_UNARY(name, expression)            \
    struct name {                              \
        template <class T>                     \
        auto operator()(T a) const {           \
            return static_cast<T>(expression); \
        }                                      \
    };
PTX_FUNCTION(Add, static_cast<Bits<T>>(a) + static_cast<Bits<T>>(b))
PTX_FUNCTION(Sub, static_cast<Bits<T>>(a) - static_cast<Bits<T>>(b))
PTX_FUNCTION(Mul, static_cast<Bits<T>>(a) * static_cast<Bits<T>>(b))
PTX_FUNCTION(Div, a / b)
PTX_FUNCTION(Rem, a % b)
PTX_FUNCTION(And, a& b)
PTX_FUNCTION(Or, a | b)
PTX_FUNCTION(Xor, a ^ b)
PTX_FUNCTION(MulHigh, (static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b)) >> (8 * sizeof(T)))
PTX_COMPARISON(Eq, a == b)
PTX_COMPARISON(Ne, a<b || a> b)
PTX_COMPARISON(Lt, a < b)
PTX_COMPARISON(Le, a <= b)
PTX_COMPARISON(Gt, a > b)
PTX_COMPARISON(Ge, a >= b)
PTX_COMPARISON(Unordered, a != a || b != b)
PTX_COMPARISON(Ordered, a == a && b == b)
template <class F>
struct OrUnordered {
    template <class T>
    bool operator()(T a, T b) const {
        return Unordered()(a, b) || F()(a, b);
    }
};
PTX_UNARY(Same, a)
PTX_UNARY(Neg, -a)
PTX_UNARY(Not, ~a)
PTX_UNARY(Abs, a < 0 ? -a : a)
struct Exchange {
    template <class T>
    T operator()(T, T b) const {
        return b;
    }
};
struct NotPredicate {
    bool operator()(bool a) const { return !a; }
};
struct MulWide {
    template <class T>
    auto operator()(T a, T b) const {
        return static_cast<Wide<T>>(static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b));
    }
};
struct MadWide {
    template <class T>
    auto operator()(T a, T b, Wide<T> c) const {
        return static_cast<Wide<T>>(MulWide()(a, b) + c);
    }
};
struct Mad {
    template <class T>
    auto operator()(T a, T b, T c) const {
        return Add()(Mul()(a, b), c);
    }
};
struct Fma {
    template <class T>
    T operator()(T a, T b, T c) const {
        return std::fma(a, b, c);
    }
};
struct Min {
    template <class T>
    T operator()(T a, T b) const {
        if constexpr (std::is_integral_v<T>) return std::min(a, b);
        return std::fmin(a, b);
    }
};
struct Max {
    template <class T>
    T operator()(T a, T b) const {
        if constexpr (std::is_integral_v<T>) return std::max(a, b);
        return std::fmax(a, b);
    }
};
struct Flush {
    float operator()(float x) const { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
};
struct Exp2 {
    float operator()(float x) const { return std::exp2(x); }
};
struct Exp2Flushed {
    float operator()(float x) const { return Flush()(std::exp2(Flush()(x))); }
};
struct Log2 {
    float operator()(float x) const { return std::log2(x); }
};
struct Reciprocal {  // its upper half, which is all that the instruction gives
    double operator()(double x) const {
        const double y = 1 / x;
        uint64_t bits;
        std::memcpy(&bits, &y, sizeof bits);
        bits &= 0xffffffff00000000u;
        double upper;
        std::memcpy(&upper, &bits, sizeof upper);
        return upper;
    }
};
struct Round {
    template <class T>
    T operator()(T x) const {
        return std::nearbyint(x);
    }
};

template <class T>
void shift_left(Thread& t, const Op& op) {
    const uint32_t by = t.in<uint32_t>(op, 2);
    t.out(op, by >= 8 * sizeof(T) ? T{0} : static_cast<T>(t.in<T>(op, 1) << by));
}
template <class T>
void shift_right(Thread& t, const Op& op) {
    const uint32_t by = std::min<uint32_t>(t.in<uint32_t>(op, 2), 8 * sizeof(T) - (std::is_signed_v<T> ? 1 : 0));
    const T x = t.in<T>(op, 1);
    t.out(op, by >= 8 * sizeof(T) ? T{0} : static_cast<T>(x >> by));
}
template <bool kLeft>
void funnel(Thread& t, const Op& op) {
    const uint64_t both = static_cast<uint64_t>(t.in<uint32_t>(op, 2)) << 32 | t.in<uint32_t>(op, 1);
    const uint32_t by = t.in<uint32_t>(op, 3) & 31;
    t.out(op, static_cast<uint32_t>(kLeft ? both << by >> 32 : both >> by));
}
template <class T>
void insert_bits(Thread& t, const Op& op) {
    const uint32_t begin = t.in<uint32_t>(op, 3) & 255, length = t.in<uint32_t>(op, 4) & 255;
    const T ones = length >= 8 * sizeof(T) ? ~T{0} : static_cast<T>((T{1} << length) - 1);
    const T mask = begin >= 8 * sizeof(T) ? T{0} : static_cast<T>(ones << begin);
    t.out(op, static_cast<T>((t.in<T>(op, 2) & ~mask) | (mask ? t.in<T>(op, 1) << begin & mask : 0)));
}
template <class T>
void select(Thread& t, const Op& op) {
    t.out(op, t.in<bool>(op, 3) ? t.in<T>(op, 1) : t.in<T>(op, 2));
}
template <class To, class From>
void convert(Thread& t, const Op& op) {
    t.out(op, static_cast<To>(t.in<From>(op, 1)));
}
// Halves of a register, in order.
template <class T, class Part>
void pack(Thread& t, const Op& op) {
    T value = 0;
    for (int i = 1; i < op.count; ++i)
        value |= static_cast<T>(static_cast<T>(t.in<Part>(op, i)) << (8 * sizeof(Part) * static_cast<size_t>(i - 1)));
    t.out(op, value);
}
template <class T, class Part>
void unpack(Thread& t, const Op& op) {
    const T value = t.in<T>(op, op.count - 1);
    for (int i = 0; i + 1 < op.count; ++i)
        t.set(op.at[i], static_cast<Part>(value >> (8 * sizeof(Part) * static_cast<size_t>(i))));
}

template <class T, bool kShared>
void load(Thread& t, const Op& op) {
    const T* const from = t.address<T>(op, op.count - 1, kShared, op.count - 1);
    for (int i = 0; i + 1 < op.count; ++i) t.set(op.at[i], from[i]);
}
template <class T, bool kShared>
void store(Thread& t, const Op& op) {
    T* const to = t.address<T>(op, 0, kShared, op.count - 1);
    for (int i = 1; i < op.count; ++i) to[i - 1] = t.in<T>(op, i);
}
template <class F, class T, bool kShared, bool kResult>
void atomic(Thread& t, const Op& op) {
    block.interrupt();
    T* const to = t.address<T>(op, kResult, kShared, 1);
    const T before = *to;
    *to = F()(before, t.in<T>(op, kResult + 1));
    if (kResult) t.out(op, before);
}
template <class T, bool kShared>
void compare_and_swap(Thread& t, const Op& op) {
    block.interrupt();
    T* const to = t.address<T>(op, 1, kShared, 1);
    const T before = *to;
    if (before == t.in<T>(op, 2)) *to = t.in<T>(op, 3);
    t.out(op, before);
}

// Collectives. shfl: d|p, a, b, c, mask, where p is the slot after d.
template <char kMode>
void shuffle_lanes(Thread& t, const Op& op) {
    const int lane = static_cast<int>(threadIdx.x % kWarp), by = static_cast<int>(t.in<uint32_t>(op, 3) & 31);
    const int clamp = static_cast<int>(t.in<uint32_t>(op, 4) & 31),
              segment = static_cast<int>(t.in<uint32_t>(op, 4) >> 8 & 31);
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int from = kMode == 'u' ? lane - by : kMode == 'd' ? lane + by : kMode == 'b' ? lane ^ by : first | (by & ~segment);
    const bool inside = kMode == 'u' ? from >= last : from <= last;
    if (!inside) from = lane;
    const uint32_t value = exchange("shfl.sync", t.in<uint32_t>(op, 5), t.in<uint32_t>(op, 2), [&](auto of) {
        return of(static_cast<unsigned>(from));
    });
    t.set(op.at[1], inside);
    t.out(op, value);
}
template <class F, class T>
void reduce_lanes(Thread& t, const Op& op) {
    t.out(op, fold("redux.sync", t.in<uint32_t>(op, 2), t.in<T>(op, 1), F()));
}

inline uint32_t lanes_or(const char* what, uint32_t mask, bool predicate) {
    return fold(what, mask, predicate ? 1u << threadIdx.x % kWarp : 0u, Or());
}

inline void fill_table() {
    auto& all = table();
    const auto name = [](auto type) { return std::string(Name<decltype(type)>::value); };
#define PTX_EACH(kinds, text, run)                       \
    each(kinds{}, [&](auto type) {                       \
        using T = decltype(type);                        \
        all[std::string(text) + "." + name(type)] = run; \
    });
#define PTX_NUMBERS(text, run)    \
    PTX_EACH(Signed, text, run)   \
    PTX_EACH(Unsigned, text, run) \
    PTX_EACH(Floats, text, run)
    PTX_NUMBERS("add", (binary<Add, T>))
    PTX_NUMBERS("sub", (binary<Sub, T>))
    PTX_NUMBERS("mul", (binary<Mul, T>))
    PTX_NUMBERS("div", (binary<Div, T>))
    PTX_NUMBERS("min", (binary<Min, T>))
    PTX_NUMBERS("max", (binary<Max, T>))
    PTX_NUMBERS("selp", (select<T>))
    PTX_NUMBERS("mov", (unary<Same, T>))
    PTX_NUMBERS("neg", (unary<Neg, T>))
    PTX_NUMBERS("abs", (unary<Abs, T>))
    PTX_NUMBERS("cvta", (unary<Same, T>))
    PTX_NUMBERS("setp.eq", (binary<Eq, T>))
    PTX_NUMBERS("setp.ne", (binary<Ne, T>))
    PTX_NUMBERS("setp.lt", (binary<Lt, T>))
    PTX_NUMBERS("setp.le", (binary<Le, T>))
    PTX_NUMBERS("setp.gt", (binary<Gt, T>))
    PTX_NUMBERS("setp.ge", (binary<Ge, T>))
    PTX_EACH(Unsigned, "setp.lo", (binary<Lt, T>))
    PTX_EACH(Unsigned, "setp.ls", (binary<Le, T>))
    PTX_EACH(Unsigned, "setp.hi", (binary<Gt, T>))
    PTX_EACH(Unsigned, "setp.hs", (binary<Ge, T>))
    PTX_EACH(Floats, "setp.equ", (binary<OrUnordered<Eq>, T>))
    PTX_EACH(Floats, "setp.neu", (binary<OrUnordered<Ne>, T>))
    PTX_EACH(Floats, "setp.ltu", (binary<OrUnordered<Lt>, T>))
    PTX_EACH(Floats, "setp.leu", (binary<OrUnordered<Le>, T>))
    PTX_EACH(Floats, "setp.gtu", (binary<OrUnordered<Gt>, T>))
    PTX_EACH(Floats, "setp.geu", (binary<OrUnordered<Ge>, T>))
    PTX_EACH(Floats, "setp.nan", (binary<Unordered, T>))
    PTX_EACH(Floats, "setp.num", (binary<Ordered, T>))
    PTX_EACH(Floats, "fma", (ternary<Fma, T>))
#define PTX_INTEGERS(text, run) PTX_EACH(Signed, text, run) PTX_EACH(Unsigned, text, run)
    PTX_INTEGERS("rem", (binary<Rem, T>))
    PTX_INTEGERS("mul.lo", (binary<Mul, T>))
    PTX_INTEGERS("mul.hi", (binary<MulHigh, T>))
    PTX_INTEGERS("mad.lo", (ternary<Mad, T>))
    PTX_INTEGERS("shr", (shift_right<T>))
    using Narrow = Types<int16_t, uint16_t, int32_t, uint32_t>;
    PTX_EACH(Narrow, "mul.wide", (binary<MulWide, T>))
    PTX_EACH(Narrow, "mad.wide", ([](Thread& t, const Op& op) {
                 t.out(op, MadWide()(t.in<T>(op, 1), t.in<T>(op, 2), t.in<Wide<T>>(op, 3)));
             }))
    using Logical = Types<bool, uint16_t, uint32_t, uint64_t>;
    PTX_EACH(Logical, "and", (binary<And, T>))
    PTX_EACH(Logical, "or", (binary<Or, T>))
    PTX_EACH(Logical, "xor", (binary<Xor, T>))
    PTX_EACH(Unsigned, "not", (unary<Not, T>))
    PTX_EACH(Unsigned, "shl", (shift_left<T>))
    PTX_EACH(Unsigned, "bfi", (insert_bits<T>))
    PTX_EACH(Unsigned, "popc", ([](Thread& t, const Op& op) {
                 t.out(op, static_cast<uint32_t>(__builtin_popcountll(t.in<T>(op, 1))));
             }))
    PTX_EACH(Unsigned, "clz", ([](Thread& t, const Op& op) {
                 const T x = t.in<T>(op, 1);
                 t.out(
                     op, static_cast<uint32_t>(x ? __builtin_clzll(x) - 64 + int{8 * sizeof(T)} : int{8 * sizeof(T)}));
             }))
    all["mov.pred"] = unary<Same, bool>;
    all["not.pred"] = unary<NotPredicate, bool>;
    all["shf.l.wrap.32"] = funnel<true>;
    all["shf.r.wrap.32"] = funnel<false>;
    all["ex2.approx.f32"] = unary<Exp2, float>;
    all["ex2.approx.ftz.f32"] = unary<Exp2Flushed, float>;
    all["lg2.approx.f32"] = unary<Log2, float>;
    all["rcp.approx.ftz.f64"] = unary<Reciprocal, double>;
    all["pack.32"] = pack<uint32_t, uint16_t>;
    all["pack.64"] = pack<uint64_t, uint32_t>;
    all["unpack.32"] = unpack<uint32_t, uint16_t>;
    all["unpack.64"] = unpack<uint64_t, uint32_t>;

    each(Stored{}, [&](auto to) {
        each(Stored{}, [&](auto from) {
            using To = decltype(to);
            using From = decltype(from);
            const std::string pair = name(to) + "." + name(from);
            all["cvt." + pair] = convert<To, From>;
            if constexpr (std::is_integral_v<To> && !std::is_integral_v<From>)
                all["cvt.rzi." + pair] = convert<To, From>;
        });
    });
    PTX_EACH(Floats, "cvt.rni." + name(type), (unary<Round, T>))
    all["cvt.f32.f16"] = [](Thread& t, const Op& op) { t.out(op, __half2float({t.in<uint16_t>(op, 1)})); };
    all["cvt.f32.bf16"] = [](Thread& t, const Op& op) { t.out(op, __bfloat162float({t.in<uint16_t>(op, 1)})); };
    all["cvt.f16.f32"] = [](Thread& t, const Op& op) { t.out(op, __float2half(t.in<float>(op, 1)).bits); };
    all["cvt.bf16.f32"] = [](Thread& t, const Op& op) { t.out(op, __float2bfloat16(t.in<float>(op, 1)).bits); };

    PTX_EACH(Stored, "ld.global", (load<T, false>))
    PTX_EACH(Stored, "ld.param", (load<T, false>))
    PTX_EACH(Stored, "ld.shared", (load<T, true>))
    PTX_EACH(Stored, "st.global", (store<T, false>))
    PTX_EACH(Stored, "st.shared", (store<T, true>))
#define PTX_ATOMIC(kinds, text, F)                                    \
    PTX_EACH(kinds, "atom.global." text, (atomic<F, T, false, true>)) \
    PTX_EACH(kinds, "atom.shared." text, (atomic<F, T, true, true>))  \
    PTX_EACH(kinds, "red.global." text, (atomic<F, T, false, false>)) \
    PTX_EACH(kinds, "red.shared." text, (atomic<F, T, true, false>))
    using Added = Types<uint32_t, int32_t, uint64_t, float, double>;
    using Compared = Types<uint32_t, int32_t, uint64_t, int64_t>;
    using Plain = Types<uint32_t, uint64_t>;
    PTX_ATOMIC(Added, "add", Add)
    PTX_ATOMIC(Compared, "min", Min)
    PTX_ATOMIC(Compared, "max", Max)
    PTX_ATOMIC(Plain, "and", And)
    PTX_ATOMIC(Plain, "or", Or)
    PTX_ATOMIC(Plain, "exch", Exchange)
    PTX_EACH(Plain, "atom.global.cas", (compare_and_swap<T, false>))
    PTX_EACH(Plain, "atom.shared.cas", (compare_and_swap<T, true>))

    all["shfl.up.32"] = shuffle_lanes<'u'>;
    all["shfl.down.32"] = shuffle_lanes<'d'>;
    all["shfl.bfly.32"] = shuffle_lanes<'b'>;
    all["shfl.idx.32"] = shuffle_lanes<'i'>;
    all["vote.ballot.32"] = [](Thread& t, const Op& op) {
        t.out(op, lanes_or("vote.ballot", t.in<uint32_t>(op, 2), t.in<bool>(op, 1)));
    };
    all["vote.any.pred"] = [](Thread& t, const Op& op) {
        t.out(op, lanes_or("vote.any", t.in<uint32_t>(op, 2), t.in<bool>(op, 1)) != 0);
    };
    all["vote.all.pred"] = [](Thread& t, const Op& op) {
        t.out(op, lanes_or("vote.all", t.in<uint32_t>(op, 2), !t.in<bool>(op, 1)) == 0);
    };
    all["match.any.32"] = [](Thread& t, const Op& op) {
        t.out(op, __match_any_sync(t.in<uint32_t>(op, 2), t.in<uint32_t>(op, 1)));
    };
    all["match.any.64"] = [](Thread& t, const Op& op) {
        t.out(op, __match_any_sync(t.in<uint32_t>(op, 2), t.in<uint64_t>(op, 1)));
    };
    using Reduced = Types<uint32_t, int32_t>;
    PTX_EACH(Reduced, "redux.add", (reduce_lanes<Add, T>))
    PTX_EACH(Reduced, "redux.min", (reduce_lanes<Min, T>))
    PTX_EACH(Reduced, "redux.max", (reduce_lanes<Max, T>))
    PTX_EACH(Reduced, "redux.and", (reduce_lanes<And, T>))
    PTX_EACH(Reduced, "redux.or", (reduce_lanes<Or, T>))
    PTX_EACH(Reduced, "redux.xor", (reduce_lanes<Xor, T>))
    all["bar.0"] = [](Thread&, const Op&) { __syncthreads(); };
    all["bar.warp"] = [](Thread& t, const Op& op) { __syncwarp(t.in<uint32_t>(op, 0)); };
    all["bra"] = [](Thread& t, const Op& op) { t.next = op.target; };
    all["ret"] = [](Thread& t, const Op&) { t.next = -1; };
}

// Reads one kernel after the other.
class Reader {
 public:
    explicit Reader(std::istream& in) : in_(in) {
        if (table().empty()) fill_table();
    }

    std::unordered_map<std::string, Program> all() {
        std::unordered_map<std::string, Program> programs;
        for (std::string line; std::getline(in_, line);) {
            const size_t at = line.find(".entry ");
            if (at == std::string::npos) continue;
            const std::string name = line.substr(at + 7, line.find('(') - at - 7);
            program_ = &programs[name];
            kernel();
        }
        return programs;
    }

 private:
    void kernel() {
        labels_.clear();
        branches_.clear();
        std::vector<std::string> statements;
        int depth = 0;
        for (std::string line; std::getline(in_, line);) {
            line = line.substr(0, line.find("//"));
            if (depth == 0) {
                head(line);
                depth += line.find('{') != std::string::npos;
                continue;
            }
            // Braces of blocks stand at a statement's begin or end, those of operands inside.
            std::string statement;
            for (std::istringstream parts(line); std::getline(parts, statement, ';');) {
                for (;;) {
                    const size_t begin = statement.find_first_not_of(" \t\r");
                    statement.erase(0, begin == std::string::npos ? statement.size() : begin);
                    if (statement.empty() || (statement[0] != '{' && statement[0] != '}')) break;
                    depth += statement[0] == '{' ? 1 : -1;
                    statement.erase(0, 1);
                }
                if (!statement.empty()) statements.push_back(statement);
            }
            if (depth == 0) break;
        }
        for (const std::string& statement : statements)
            if (statement[0] == '.') declaration(statement);
        program_->constants[static_cast<size_t>(slot("dynamic"))] = static_cast<uint64_t>(dynamic_offset(*program_));
        for (const std::string& statement : statements)
            if (statement[0] != '.') instruction(statement);
        for (const auto& [op, label] : branches_) program_->ops[op].target = labels_.at(label);
    }

 public:
    static int64_t dynamic_offset(const Program& program) { return (program.static_shared + 15) / 16 * 16; }

 private:
    void head(const std::string& line) {
        if (line.find(".param") != std::string::npos) {
            std::string name = line.substr(line.find_last_of(' ') + 1);
            program_->parameters.push_back(slot(name.substr(0, name.find_first_of("[,"))));
        }
        if (line.find(".maxntid") == 0) program_->max_threads = std::stoll(line.substr(9));
    }

    void declaration(const std::string& text) {
        if (text.find(".reg") == 0 || text.find(".pragma") == 0) return;
        if (text.find(".shared") != 0) throw std::logic_error("PTX: " + text);
        std::istringstream words(text);
        std::string shared, align, type, name;
        int64_t alignment, count = 1;
        words >> shared >> align >> alignment >> type >> name;
        const size_t bracket = name.find('[');
        if (bracket != std::string::npos) count = std::stoll(name.substr(bracket + 1));
        int64_t& bytes = program_->static_shared;
        bytes = (bytes + alignment - 1) / alignment * alignment;
        program_->constants[static_cast<size_t>(slot(name.substr(0, bracket)))] = static_cast<uint64_t>(bytes);
        bytes += count * std::stoll(type.substr(2)) / 8;
    }

    int slot(const std::string& name) {
        const auto [found, first] = program_->slots.try_emplace(name, static_cast<int>(program_->slots.size()));
        if (first) program_->constants.push_back(constant(name));
        return found->second;
    }

    static uint64_t constant(const std::string& text) {
        if (text[0] == '0' && text.size() > 2 && std::strchr("fFdD", text[1]))
            return std::stoull(text.substr(2), nullptr, 16);
        if (text[0] == '-') return static_cast<uint64_t>(std::stoll(text, nullptr, 0));
        if (std::isdigit(text[0])) return std::stoull(text, nullptr, 0);
        return 0;  // a register, or an address that is known later
    }

    void instruction(std::string text) {
        if (text[0] == '$') {
            const size_t colon = text.find(':');
            labels_[text.substr(0, colon)] = static_cast<int>(program_->ops.size());
            return;
        }
        Op op;
        if (text[0] == '@') {
            op.negated = text[1] == '!';
            const size_t space = text.find(' ');
            op.guard = slot(text.substr(op.negated ? 2 : 1, space - (op.negated ? 2 : 1)));
            text.erase(0, text.find_first_not_of(' ', space));
        }
        const size_t space = std::min(text.find(' '), text.size());
        std::string name = text.substr(0, space);
        const std::vector<std::string> operands = split(text.substr(space));
        if (name.find("bra") == 0) {
            branches_.emplace_back(program_->ops.size(), operands.at(0));
        } else {
            for (const std::string& operand : operands) add(op, operand);
        }
        if (name.find("mov.b") == 0 && text.find('{') != std::string::npos)
            name = (text.find('{') < text.find(',') ? "unpack" : "pack") + name.substr(3);
        if (name.find("shfl") == 0 && text.find('|') == std::string::npos) {  // without the predicate
            for (int i = op.count++; i > 1; --i) op.at[i] = op.at[i - 1];
            op.at[1] = slot("nowhere");
        }
        op.run = find(name, operands);
        if (!op.run) throw std::logic_error("PTX: no such instruction: " + text);
        program_->ops.push_back(op);
        program_->names.push_back(text.substr(0, space));
    }

    // Operands by their commas, those in braces and d|p one by one.
    static std::vector<std::string> split(const std::string& text) {
        std::vector<std::string> parts;
        std::string part;
        for (const char c : text + ",") {
            if (std::strchr(",|", c)) {
                if (!part.empty()) parts.push_back(part);
                part.clear();
            } else if (!std::strchr(" \t{}", c)) {
                part += c;
            }
        }
        return parts;
    }

    void add(Op& op, std::string operand) {
        if (operand[0] == '[') {
            operand = operand.substr(1, operand.size() - 2);
            const size_t sign = operand.find_first_of("+-", 1);
            if (sign != std::string::npos)
                op.offset = std::stoll(operand.substr(operand[sign] == '+' ? sign + 1 : sign));
            operand = operand.substr(0, sign);
        }
        if (operand.size() > 6 && operand.find("6memoryE") != std::string::npos) operand = "dynamic";
        op.at[op.count++] = slot(operand);
    }

    static Run find(std::string name, const std::vector<std::string>& operands) {
        const auto& all = table();
        if (name == "bar.sync" || name == "barrier.sync") return operands.at(0) == "0" ? all.at("bar.0") : nullptr;
        std::string plain;  // without what makes no difference, and u and b types as one
        std::istringstream parts(name);
        for (std::string part; std::getline(parts, part, '.');) {
            static const std::set<std::string> ignored{"rn", "uni",  "sync",    "nc",  "to", "v2",
                                                       "v4", "full", "relaxed", "gpu", "cta"};
            if (ignored.count(part) || part.find("L1::") == 0) continue;
            if (part.size() > 1 && std::strchr("ub", part[0]) && std::isdigit(part[1])) part.erase(0, 1);
            plain += plain.empty() ? part : "." + part;
        }
        if (plain.find("cvta") == 0) plain = "cvta.64";
        const auto found = all.find(plain);
        return found == all.end() ? nullptr : found->second;
    }

    std::istream& in_;
    Program* program_ = nullptr;
    std::unordered_map<std::string, int> labels_;
    std::vector<std::pair<size_t, std::string>> branches_;
};

// How often each instruction was issued to warps. The lanes of a warp are taken to stay together where they can: it
// issues an instruction as often as the lane that runs it most often.
class Issues {
 public:
    Issues(const Program& program, unsigned threads)
        : program_(program), warps_((threads + kWarp - 1) / kWarp, std::vector<uint32_t>(program.ops.size())) {}

    void add(const std::vector<uint32_t>& lane) {
        std::vector<uint32_t>& warp = warps_[threadIdx.x / kWarp];
        for (size_t i = 0; i < lane.size(); ++i) warp[i] = std::max(warp[i], lane[i]);
        if (++ended_ == blockDim.x) flush();
    }

    std::map<std::string, uint64_t> by_name, of_busiest;  // of all warps, and of that with the most

 private:
    void flush() {
        ended_ = 0;
        for (std::vector<uint32_t>& warp : warps_) {
            std::map<std::string, uint64_t> own;
            uint64_t total = 0;
            for (size_t i = 0; i < warp.size(); ++i) {
                total += warp[i];
                own[program_.names[i]] += std::exchange(warp[i], 0);
            }
            for (const auto& [name, count] : own) by_name[name] += count;
            if (total > most_) of_busiest = own;
            most_ = std::max(most_, total);
        }
    }

    const Program& program_;
    std::vector<std::vector<uint32_t>> warps_;
    unsigned ended_ = 0;
    uint64_t most_ = 0;
};

// Counts what it issues, if asked to.
inline void run(
    const Program& program, unsigned grid, unsigned threads, size_t dynamic_bytes, int order,
    const std::vector<const void*>& parameters, Issues* issues = nullptr) {
    const int64_t bytes = Reader::dynamic_offset(program) + static_cast<int64_t>(dynamic_bytes);
    std::vector<Thread> states(threads, Thread{program.constants, bytes, 0});
    const auto set = [&](Thread& thread, const char* name, uint64_t value) {
        const auto found = program.slots.find(name);
        if (found != program.slots.end()) thread.set(found->second, value);
    };
    for (unsigned i = 0; i < threads; ++i) {
        for (size_t p = 0; p < parameters.size(); ++p)
            states[i].set(program.parameters[p], reinterpret_cast<uint64_t>(parameters[p]));
        set(states[i], "%tid.x", i);
        set(states[i], "%ntid.x", threads);
        set(states[i], "%nctaid.x", grid);
        set(states[i], "%laneid", i % kWarp);
    }
    launch(grid, threads, static_cast<size_t>(bytes), order, [&] {
        Thread& thread = states[threadIdx.x];
        set(thread, "%ctaid.x", blockIdx.x);
        std::vector<uint32_t> counts(issues ? program.ops.size() : 0);
        for (thread.next = 0; thread.next >= 0;) {
            if (issues) ++counts[static_cast<size_t>(thread.next)];
            const Op& op = program.ops[static_cast<size_t>(thread.next++)];
            if (op.guard < 0 || thread.get<bool>(op.guard) != op.negated) op.run(thread, op);
        }
        if (issues) issues->add(counts);
    });
}

}  // namespace emulation::ptx
