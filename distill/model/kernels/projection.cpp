// Exact L0 projection of a tensor: the `count` entries of largest magnitude stay, ties by the lowest index.
//
// A sample says between which two magnitudes the cut lies, wide enough to be nearly always right. One pass over the data
// counts what is above and collects what is between; the cut is found among those. Where the sample was wrong, the
// bracket is widened and the pass done again, so the result is exact. A second pass sets the rest to zero.
#include "search.hpp"

#include <algorithm>
#include <cmath>

static const int64_t SAMPLE = 8192;     // entries looked at, at most
static const int64_t SPACING = 61;      // and their least distance; a prime does not fall into step with rows
static const int64_t CHUNK = 1 << 14;   // entries per piece of a pass
static const double DEVIATIONS = 4;     // half-width of the bracket in standard deviations of the sample's rank

// Magnitudes of x in [low, high) to `found`, as many as there are; returns how many. `above` counts those from high on.
static int64_t collect(const float* x, int64_t n, int64_t low, int64_t high, int32_t* found, int64_t* above) {
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

// The bracket [low, high) that the sample proposes.
static void propose(const float* x, int64_t n, int64_t count, int64_t* low, int64_t* high) {
    static thread_local Scratch scratch;
    int64_t step = std::max(SPACING, n / SAMPLE | 1), size = (n + step - 1) / step;
    int32_t* sample = scratch.of<int32_t>(size);
    for (int64_t i = 0; i < size; i++) sample[i] = (int32_t)(as_bits(x[i * step]) & MAGNITUDE);
    double share = (double)count / (double)n, rank = share * (double)size;
    double slack = DEVIATIONS * std::sqrt((double)size * share * (1 - share)) + 4;
    int64_t first = (int64_t)(rank - slack), last = (int64_t)(rank + slack);
    auto larger = [](int32_t a, int32_t b) { return a > b; };
    *low = 1;
    *high = (int64_t)MAGNITUDE + 1;
    if (last < size) {
        std::nth_element(sample, sample + last, sample + size, larger);
        *low = std::max<int64_t>(sample[last], 1);
        if (first >= 0) {
            std::nth_element(sample, sample + first, sample + last, larger);
            *high = (int64_t)sample[first] + 1;
        }
    } else if (first >= 0 && first < size) {
        std::nth_element(sample, sample + first, sample + size, larger);
        *high = (int64_t)sample[first] + 1;
    }
}

extern "C" {

// The magnitude `value` so that entries above it stay and the first `stay` of the `equal` ones that are equal to it.
// Value 0: fewer than `count` entries are not zero, all of them stay. `found` has room for n + 64 * pieces magnitudes;
// pieces = ceil(n / 16384); `counts` for 2 * pieces. 0 < count < n.
void projection_cut(
    const float* x, int64_t n, int64_t count, int32_t* found, int64_t* counts, float* value, int64_t* stay,
    int64_t* equal, int64_t threads) {
    int64_t pieces = (n + CHUNK - 1) / CHUNK, low, high, total, above;
    propose(x, n, count, &low, &high);
    for (;;) {
#pragma omp parallel for schedule(dynamic, 8) num_threads((int)threads) if (threads > 1)
        for (int64_t p = 0; p < pieces; p++) {
            int64_t here = std::min(CHUNK, n - p * CHUNK);
            counts[pieces + p] = 0;
            counts[p] = collect(x + p * CHUNK, here, low, high, found + p * (CHUNK + 64), counts + pieces + p);
        }
        total = above = 0;
        for (int64_t p = 0; p < pieces; p++) {
            total += counts[p];
            above += counts[pieces + p];
        }
        if (above >= count) {
            low = high;
            high = (int64_t)MAGNITUDE + 1;
        } else if (above + total < count && low > 1) {
            high = low;
            low = 1;
        } else {
            break;
        }
    }
    *value = 0;
    *stay = *equal = 0;
    if (above + total < count) return;
    int64_t at = 0;
    for (int64_t p = 0; p < pieces; p++) {
        memmove(found + at, found + p * (CHUNK + 64), (size_t)counts[p] * 4);
        at += counts[p];
    }
    int64_t padded = round_up(total, COUNTED);
    memset(found + total, 0, (size_t)(padded - total) * 4);
    int32_t k = (int32_t)(count - above), bound = (int32_t)low;
    if (total > k) {
        Bracket bracket = {low, (int32_t)total, high, 0};
        float left = as_float(low), right = as_float(high);
        float guess = left + (right - left) * ((float)(total - k) / (float)total);
        bound = search(found, padded, k, bracket, guess, 0).bound;
    }
    // The bound lies between two entries where nothing is tied: the smallest that reaches it is the cut.
    int32_t least = MAGNITUDE;
    for (int64_t i = 0; i < total; i++) least = found[i] >= bound && found[i] < least ? found[i] : least;
    int64_t larger = 0;
    for (int64_t i = 0; i < total; i++) {
        *equal += found[i] == least;
        larger += found[i] > least;
    }
    *value = as_float(least);
    *stay = count - above - larger;
}

// Sets to zero what is smaller than `value`, and of those equal to it all but the first `stay`.
void projection_shrink(float* x, int64_t n, float value, int64_t stay, int64_t equal, int64_t threads) {
    Ints limit = splat((int32_t)as_bits(value));
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (int64_t from = 0; from < n; from += CHUNK) {
        int64_t to = std::min(n, from + CHUNK), j = from;
        for (; j + LANES <= to; j += LANES) {
            Ints v = (Ints)load(x + j);
            store(x + j, (Floats)(v & (Ints)((v & MAGNITUDE) >= limit)));
        }
        for (; j < to; j++)
            if ((as_bits(x[j]) & MAGNITUDE) < as_bits(value)) x[j] = 0;
    }
    if (equal == stay) return;
    for (int64_t j = 0; j < n; j++)
        if ((as_bits(x[j]) & MAGNITUDE) == as_bits(value) && stay-- <= 0) x[j] = 0;
}
}
