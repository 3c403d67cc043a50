// Exact L0 projection of a tensor: the `count` entries of largest magnitude stay, ties by the lowest index.
//
// A sample says between which two magnitudes the cut lies, wide enough to be nearly always right. One pass over the data
// counts what is above and collects what is between; the cut is found among those. Where the sample was wrong, the
// bracket is widened and the pass done again, so the result is exact. A second pass sets the rest to zero.
#include "cut.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

static const int64_t SAMPLE = 8192;     // entries looked at, at most
static const int64_t SPACING = 61;      // and their least distance; a prime does not fall into step with rows
static const int64_t CHUNK = 1 << 14;   // entries per piece of a pass
static const double DEVIATIONS = 4;     // half-width of the bracket in standard deviations of the sample's rank

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

// Per row (axis 0) or column (axis 1) of x (rows, columns): how many entries are above `cut`.
static void count_above(
    const float* x, int64_t rows, int64_t columns, int64_t axis, int32_t cut, int32_t* counts, int64_t threads) {
    int64_t slabs = axis == 0 ? 1 : threads;
    std::vector<int32_t> parts((size_t)(slabs * columns));
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (int64_t slab = 0; slab < threads; slab++) {
        int32_t* here = parts.data() + (axis == 0 ? 0 : slab * columns);
        for (int64_t r = rows * slab / threads; r < rows * (slab + 1) / threads; r++) {
            const float* row = x + r * columns;
            Ints total{};
            int64_t c = 0;
            for (; c + LANES <= columns; c += LANES) {
                Ints above = (Ints)(((Ints)load(row + c) & MAGNITUDE) > cut);
                if (axis == 0)
                    total -= above;
                else
                    store(here + c, load(here + c) - above);
            }
            int32_t rest = sum(total);
            for (; c < columns; c++) {
                int32_t above = (as_bits(row[c]) & MAGNITUDE) > cut;
                if (axis == 0)
                    rest += above;
                else
                    here[c] += above;
            }
            if (axis == 0) counts[r] = rest;
        }
    }
    if (axis == 0) return;
    for (int64_t c = 0; c < columns; c++) {
        counts[c] = 0;
        for (int64_t slab = 0; slab < slabs; slab++) counts[c] += parts[(size_t)(slab * columns + c)];
    }
}

extern "C" {

// The `floor` largest entries of each row (axis 0) or column (axis 1) of which fewer are above `cut`, ties by the lowest
// index: their places and values, closed up; `found` says how many. There is room for units * floor of them.
void projection_floor(
    const float* x, int64_t rows, int64_t columns, int64_t axis, int64_t floor, float cut, int64_t* at, float* value,
    int64_t* found, int64_t threads) {
    int64_t units = axis == 0 ? rows : columns, wanting = 0;
    std::vector<int32_t> slot((size_t)units), bar((size_t)units, MAGNITUDE);
    count_above(x, rows, columns, axis, (int32_t)as_bits(cut), slot.data(), threads);
    for (size_t u = 0; u < slot.size(); u++)
        if (slot[u] < floor) bar[u] = 0;
    for (size_t u = 0; u < slot.size(); u++) slot[u] = bar[u] == 0 ? (int32_t)wanting++ : -1;
    *found = 0;
    if (wanting == 0) return;
    std::vector<Ranked<int64_t>> best((size_t)(wanting * floor), {0.0f, 0});
    auto offer = [&](int64_t unit, int64_t index) {
        if ((as_bits(x[index]) & MAGNITUDE) <= bar[(size_t)unit]) return;
        Ranked<int64_t>* first = best.data() + slot[(size_t)unit] * floor;
        enter(first, floor, {x[index], index});
        bar[(size_t)unit] = (int32_t)as_bits(first[floor - 1].value) & MAGNITUDE;
    };
    for (int64_t r = 0; r < rows; r++) {
        if (axis == 0 && slot[(size_t)r] < 0) continue;
        int64_t from = r * columns, c = 0;
        for (; c + LANES <= columns; c += LANES) {
            Ints least = axis == 0 ? splat(bar[(size_t)r]) : load(bar.data() + c);
            for (uint64_t rest = pack((Ints)(((Ints)load(x + from + c) & MAGNITUDE) > least)); rest; rest &= rest - 1) {
                int64_t column = c + __builtin_ctzll(rest);
                offer(axis == 0 ? r : column, from + column);
            }
        }
        for (; c < columns; c++) offer(axis == 0 ? r : c, from + c);
    }
    for (const Ranked<int64_t>& entry : best)
        if (entry.value != 0.0f) {
            at[*found] = entry.mark;
            value[(*found)++] = entry.value;
        }
}

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
            counts[p] = between(x + p * CHUNK, here, low, high, found + p * (CHUNK + 64), counts + pieces + p);
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
    Threshold cut = cut_among(found, total, count - above, low, high);
    *value = as_float(cut.bits);
    *stay = cut.stay;
    *equal = cut.equal;
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
