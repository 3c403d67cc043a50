// The k-th largest magnitude by counting.
//
// Magnitudes are compared as the integers that their bits spell: the same order as of the floats, with NaN above
// infinity, and no setting of the processor flushes the smallest. A bound is moved by a secant in the counts of entries
// that reach it, and at times by halving the bits, which ends the search after a bounded number of steps on any input.
#pragma once
#include "lanes.hpp"

static const int32_t MAGNITUDE = 0x7fffffff;
static const int COUNTED = 4 * LANES;  // entries are counted in such packs; zeros fill the last

static inline int32_t count_from(const int32_t* sizes, int64_t padded, int32_t bound) {
    Ints limit = splat(bound), a{}, b{}, c{}, d{};
    for (int64_t j = 0; j < padded; j += COUNTED) {
        a -= (Ints)(load(sizes + j) >= limit);
        b -= (Ints)(load(sizes + j + LANES) >= limit);
        c -= (Ints)(load(sizes + j + 2 * LANES) >= limit);
        d -= (Ints)(load(sizes + j + 3 * LANES) >= limit);
    }
    return sum((a + b) + (c + d));
}

static inline float as_float(int64_t bits) {
    int32_t narrow = (int32_t)bits;
    float value;
    memcpy(&value, &narrow, 4);
    return value;
}

static inline int64_t as_bits(float value) {
    int32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

struct Bracket {
    int64_t low;        // more than k entries reach it
    int32_t from_low;   // so many
    int64_t high;       // fewer than k reach it
    int32_t from_high;  // so many
};

struct Cut {
    int32_t bound;  // k entries reach it, or more where tied
    int32_t above;  // where tied: so many are above it, and the others that reach it are equal to it
    bool tied;
};

// `guess` is tried first; `slope` is by how much the bound moves per entry too many after that (0: by the secant).
static inline Cut search(
    const int32_t* sizes, int64_t padded, int32_t k, Bracket bracket, float guess, float slope) {
    for (int step = 0; bracket.high - bracket.low > 1; step++) {
        int64_t bound = as_bits(guess);
        // Not strictly inside (or not a number), or it has taken long: halve the bits.
        if (!(bound > bracket.low && bound < bracket.high) || step % 5 == 4)
            bound = bracket.low + (bracket.high - bracket.low) / 2;
        int32_t count = count_from(sizes, padded, (int32_t)bound);
        if (count == k) return {(int32_t)bound, 0, false};
        if (count > k) {
            bracket.low = bound;
            bracket.from_low = count;
        } else {
            bracket.high = bound;
            bracket.from_high = count;
        }
        if (step == 0 && slope > 0) {
            guess = as_float(bound) + (float)(count - k) * slope;
        } else {
            float left = as_float(bracket.low), right = as_float(bracket.high);
            float share = (float)(bracket.from_low - k) / (float)(bracket.from_low - bracket.from_high);
            guess = left + (right - left) * share;
        }
    }
    return {(int32_t)bracket.low, bracket.from_high, true};
}
