// Where magnitudes are cut so that exactly so many stay.
#pragma once
#include "search.hpp"

// Magnitudes of x in [low, high) to `found`, as many as there are; returns how many. `above` counts those from high on.
static inline int64_t between(const float* x, int64_t n, int64_t low, int64_t high, int32_t* found, int64_t* above) {
    Ints from = splat((int32_t)low), to = splat((int32_t)(high - 1)), over{};
    int32_t* next = found;
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
        Ints size = (Ints)load(x + j) & MAGNITUDE;
        over -= (Ints)(size > to);
        uint64_t bits = pack((Ints)(size >= from) & (Ints)(size <= to));
        if (!bits) continue;
#if LANES == 16
        _mm512_storeu_si512(next, _mm512_maskz_compress_epi32((__mmask16)bits, (__m512i)size));
        next += __builtin_popcountll(bits);
#else
        for (; bits; bits &= bits - 1) *next++ = size[__builtin_ctzll(bits)];
#endif
    }
    *above += sum(over);
    for (; j < n; j++) {
        int64_t size = as_bits(x[j]) & MAGNITUDE;
        *above += size >= high;
        if (size >= low && size < high) *next++ = (int32_t)size;
    }
    return next - found;
}

struct Threshold {
    int32_t bits;   // of the magnitude: what is larger stays
    int64_t stay;   // and of the entries equal to it the first so many
    int64_t equal;  // entries equal to it
};

// The k-th largest of `total` magnitudes (their bits), which all lie in [low, high); 0 < k <= total. `found` has room for
// COUNTED more.
static inline Threshold cut_among(int32_t* found, int64_t total, int64_t k, int64_t low, int64_t high) {
    int64_t padded = round_up(total, COUNTED);
    memset(found + total, 0, (size_t)(padded - total) * 4);
    int32_t bound = (int32_t)low;
    if (total > k) {
        Bracket bracket = {low, (int32_t)total, high, 0};
        float left = as_float(low), right = as_float(high);
        float guess = left + (right - left) * ((float)(total - k) / (float)total);
        bound = search(found, padded, (int32_t)k, bracket, guess, 0).bound;
    }
    // The bound lies between two entries where nothing is tied: the smallest that reaches it is the cut.
    int32_t least = MAGNITUDE;
    for (int64_t i = 0; i < total; i++) least = found[i] >= bound && found[i] < least ? found[i] : least;
    int64_t equal = 0, larger = 0;
    for (int64_t i = 0; i < total; i++) {
        equal += found[i] == least;
        larger += found[i] > least;
    }
    return {least, k - larger, equal};
}

// The largest of some entries so far, as many as there is room for; empty places hold zeros.
template <typename Mark>
struct Ranked {
    float value;
    Mark mark;
};

// Puts an entry in its place among the `room` largest, behind all that are as large: of equal ones the first stay.
template <typename Mark>
static inline void enter(Ranked<Mark>* first, int64_t room, Ranked<Mark> entry) {
    int64_t place = room, size = as_bits(entry.value) & MAGNITUDE;
    while (place > 0 && (as_bits(first[place - 1].value) & MAGNITUDE) < size) place--;
    if (place == room) return;
    for (int64_t i = room - 1; i > place; i--) first[i] = first[i - 1];
    first[place] = entry;
}
