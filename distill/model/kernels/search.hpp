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

// The entries in [low, high) to `found`, zeros behind them to a whole pack; returns the number with those. COUNTED more
// places than there are entries may be written.
static inline int64_t narrow(const int32_t* sizes, int64_t padded, int64_t low, int64_t high, int32_t* found) {
    Ints from = splat((int32_t)low), to = splat((int32_t)(high - 1));
    float* next = (float*)found;
    for (int64_t j = 0; j < padded; j += LANES) {
        Ints size = load(sizes + j);
        uint64_t bits = pack((Ints)(size >= from) & (Ints)(size <= to));
        if (bits) next = squeeze((Floats)size, bits, next);
    }
    int64_t count = (int32_t*)next - found;
    memset((void*)next, 0, (size_t)COUNTED * 4);
    return round_up(count, COUNTED);
}

// `guess` is tried first; `slope` is by how much the bound moves per entry too many after that (0: by the secant). With
// `room`, for padded + COUNTED entries, only those in the bracket are looked at once they are few.
static inline Cut search(
    const int32_t* sizes, int64_t padded, int32_t k, Bracket bracket, float guess, float slope, int32_t* room = nullptr) {
    int32_t beyond = 0;  // entries above all that are looked at
    // By how many entries each end misses k; halved for an end that stays, or the other would creep towards it.
    float too_many = (float)(bracket.from_low - k), too_few = (float)(k - bracket.from_high);
    int side = 0;
    for (int step = 0; bracket.high - bracket.low > 1; step++) {
        int64_t bound = as_bits(guess);
        // Not strictly inside (or not a number), or it has taken long: halve the bits.
        if (!(bound > bracket.low && bound < bracket.high) || step % 8 == 7)
            bound = bracket.low + (bracket.high - bracket.low) / 2;
        int32_t count = beyond + count_from(sizes, padded, (int32_t)bound);
        if (count == k) return {(int32_t)bound, 0, false};
        float miss = (float)(count - k);
        if (count > k) {
            bracket.low = bound;
            bracket.from_low = count;
            too_many = miss;
            if (side > 0) too_few *= 0.5f;
            side = 1;
        } else {
            bracket.high = bound;
            bracket.from_high = count;
            too_few = -miss;
            if (side < 0) too_many *= 0.5f;
            side = -1;
        }
        float left = as_float(bracket.low), right = as_float(bracket.high);
        // The first time a little too far, so that the cut lies between the two.
        if (step == 0 && slope > 0)
            guess = as_float(bound) + (miss * 1.125f + (miss > 0 ? 2.0f : -2.0f)) * slope;
        else
            guess = left + (right - left) * (too_many / (too_many + too_few));
        if (room && 4 * (int64_t)(bracket.from_low - bracket.from_high) < padded) {
            padded = narrow(sizes, padded, bracket.low, bracket.high, room);
            sizes = room;
            beyond = bracket.from_high;
            room = nullptr;
        }
    }
    return {(int32_t)bracket.low, bracket.from_high, true};
}
