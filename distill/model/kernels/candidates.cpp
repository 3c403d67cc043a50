// Training on a sample of a weight's entries: those that are not zero, and candidates to become so.
//
// The places are sorted by row and column (in flat order, that is); gradient, value and moments lie in arrays of that
// order. `start[r]` to `start[r + 1]` are those of row r, `at` their columns.
#include "lanes.hpp"

#include <algorithm>
#include <cmath>

static const int BLOCK = 64;             // tokens per word of a mask
static const int VECTORS = BLOCK / LANES;
static const int64_t GROUP = 8192;       // rows per job, at most: their places stay in a core's cache
static const int64_t LEAST_GROUP = 128;  // and at least
static const int64_t AHEAD = 8;          // rows from the one at work to the one that is fetched
static const int64_t CHUNK = 1 << 14;    // places per piece of a pass

struct Entry {
    int32_t at;  // column (by rows) or row (by columns)
    float value;
};

// The sums of LANES vectors, one per lane. A round adds the halves of vectors i and i + half and interleaves them: the
// bits of a vector's number become those of a lane.
static inline Floats collapse(Floats parts[LANES]) {
#pragma GCC unroll 4
    for (int half = LANES / 2; half >= 1; half /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < half; i++)
            parts[i] = ZIP_LOW(parts[i], parts[i + half]) + ZIP_HIGH(parts[i], parts[i + half]);
    }
    return parts[0];
}

// The values under the bits of `word`, closed up from `from` on, to BLOCK places of `to`; zero where there is no bit.
static inline void spread(const float* from, uint64_t word, Floats* to) {
#if LANES == 16
#pragma GCC unroll 4
    for (int i = 0; i < BLOCK / LANES; i++) {
        __mmask16 part = (__mmask16)(word >> i * LANES);
        // Whole vectors: closed up, no value lies further on than where it belongs, so nothing beyond the block is read.
        to[i] = (Floats)_mm512_maskz_expand_ps(part, _mm512_loadu_ps(from));
        from += __builtin_popcount(part);
    }
#else
    float* place = (float*)to;
    memset(place, 0, BLOCK * 4);
    for (; word; word &= word - 1) place[__builtin_ctzll(word)] = *from++;
#endif
}

// out[i] += grad . x[at[i]] over a block, for `here` places, COUNT at most; x (columns, BLOCK).
template <int COUNT>
static inline void sample(const Floats* grad, const float* x, const int32_t* at, int64_t here, float* out) {
    Floats parts[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; i++) {
        const float* from = x + (int64_t)at[i < here ? i : 0] * BLOCK;
        Floats one = grad[0] * load(from), other = grad[1] * load(from + LANES);
#pragma GCC unroll 16
        for (int v = 2; v < VECTORS; v += 2) {
            one += grad[v] * load(from + v * LANES);
            other += grad[v + 1] * load(from + (v + 1) * LANES);
        }
        parts[i] = one + other;
    }
#pragma GCC unroll 16
    for (int i = COUNT; i < LANES; i++) parts[i] = Floats{};
    Floats sums = collapse(parts);
    if (here == LANES)
        store(out, load(out) + sums);
    else
        for (int64_t i = 0; i < here; i++) out[i] += sums[i];
}

static inline void sample_row(const Floats* grad, const float* x, const int32_t* at, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sample<LANES>(grad, x, at + i, LANES, out + i);
    int64_t rest = count - i;
    if (rest > LANES / 2)
        sample<LANES>(grad, x, at + i, rest, out + i);
    else if (rest > LANES / 4)
        sample<LANES / 2>(grad, x, at + i, rest, out + i);
    else if (rest > 0)
        sample<LANES / 4>(grad, x, at + i, rest, out + i);
}

// Calls `act` with the number of each value that is not zero.
template <typename Act>
static inline void each_kept(const float* values, int64_t from, int64_t to, Act act) {
    int64_t i = from;
    for (; i + LANES <= to; i += LANES)
        for (uint64_t rest = pack((Ints)(load(values + i) != Floats{})); rest; rest &= rest - 1)
            act(i + __builtin_ctzll(rest));
    for (; i < to; i++)
        if (values[i] != 0.0f) act(i);
}

extern "C" {

// Where each row's places of each panel of `width` columns begin: panel_start (rows, panels + 1), panels = ceil(columns /
// width).
void candidates_panels(
    const int32_t* start, const int32_t* at, int64_t rows, int64_t columns, int64_t width, int32_t* panel_start) {
    int64_t panels = (columns + width - 1) / width;
    for (int64_t r = 0; r < rows; r++) {
        int32_t i = start[r], *to = panel_start + r * (panels + 1);
        for (int64_t p = 0; p < panels; p++) {
            to[p] = i;
            while (i < start[r + 1] && at[i] < (p + 1) * width) i++;
        }
        to[panels] = i;
    }
}

// out += the entries of grad^T x at the places; grad as `linear_backward` leaves it (blocks, place, mask).
void candidates_gradient(
    const float* blocks, const int32_t* place, const uint64_t* mask, int64_t rows, int64_t columns, const float* x,
    int64_t tokens, const int32_t* panel_start, const int32_t* at, int64_t width, float* out, int64_t threads) {
    int64_t panels = (columns + width - 1) / width, height = std::min(rows, GROUP);
    // Two jobs or more for each thread.
    while (height > LEAST_GROUP && panels * ((rows + height - 1) / height) < 2 * threads) height = (height + 1) / 2;
    int64_t groups = (rows + height - 1) / height;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        static thread_local Scratch scratch;
        float* panel = scratch.of<float>(width * BLOCK);
#pragma omp for schedule(dynamic, 1)
        for (int64_t job = 0; job < panels * groups; job++) {
            int64_t p = job / groups, first = job % groups * height, last = std::min(rows, first + height);
            int64_t column = p * width, here = std::min(width, columns - column);
            for (int64_t t = 0; t < tokens; t += BLOCK) {
                gather(x + t * columns + column, columns, here, std::min<int64_t>(BLOCK, tokens - t), BLOCK, panel);
                const float* values = blocks + t * rows;
                const int32_t* begin = place + t / BLOCK * rows;
                const uint64_t* words = mask + t / BLOCK * rows;
                for (int64_t r = first; r < last; r++) {
                    // Rows have few values and few places: without this most of the time goes by waiting for them.
                    __builtin_prefetch(values + begin[std::min(r + AHEAD, last - 1)]);
                    int32_t from = panel_start[r * (panels + 1) + p], to = panel_start[r * (panels + 1) + p + 1];
                    // Without a bit nothing is to be read; the place may lie behind the last value.
                    if (from == to || !words[r]) continue;
                    Floats grad[VECTORS];
                    spread(values + begin[r], words[r], grad);
                    sample_row(grad, panel - column * BLOCK, at + from, to - from, out + from);
                }
            }
        }
    }
}

// The same where row ids[t] of the weight was token t's output: out[row, column] += grad[t, column].
void candidates_rows(
    const int64_t* ids, int64_t tokens, const float* grad, int64_t columns, const int32_t* start, const int32_t* at,
    float* out) {
    for (int64_t t = 0; t < tokens; t++)
        for (int32_t i = start[ids[t]]; i < start[ids[t] + 1]; i++) out[i] += grad[t * columns + at[i]];
}

// Sum of the squares of the gradient: squares[0] over all places, squares[1] over those whose value is not zero.
void candidates_squares(const float* gradient, const float* values, int64_t n, double* squares) {
    squares[0] = squares[1] = 0;
    for (int64_t from = 0; from < n; from += CHUNK) {
        float all = 0, kept = 0;
        int64_t to = std::min(n, from + CHUNK);
#pragma omp simd reduction(+ : all, kept)
        for (int64_t i = from; i < to; i++) {
            float square = gradient[i] * gradient[i];
            all += square;
            kept += values[i] != 0.0f ? square : 0.0f;
        }
        squares[0] += all;
        squares[1] += kept;
    }
}

// What units (rows, or with `by_column` columns) have to keep though a cut at `bound` leaves them fewer than `least` entries
// strictly above it: the `least` largest of each, ties by the first place, zeros never. `index` and `value` have room for
// units * least, `counts` for 2 * units; `found` says how many there are.
void candidates_floor(
    const float* values, const int32_t* start, const int32_t* at, int64_t rows, int64_t units, int64_t by_column,
    float bound, int64_t least, int32_t* counts, int32_t* index, float* value, int64_t* found) {
    int32_t* held = counts + units;
    memset(counts, 0, (size_t)(2 * units) * 4);
    for (int64_t r = 0; r < rows; r++)
        for (int32_t i = start[r]; i < start[r + 1]; i++) counts[by_column ? at[i] : r] += std::fabs(values[i]) > bound;
    for (int64_t r = 0; r < rows; r++) {
        if (!by_column && counts[r] >= least) continue;
        for (int32_t i = start[r]; i < start[r + 1]; i++) {
            int64_t unit = by_column ? at[i] : r, first = unit * least;
            float size = std::fabs(values[i]);
            if (counts[unit] >= least || !(size > 0)) continue;
            // In descending order: a new one is put behind those that are as large.
            int64_t end = first + held[unit], place = end;
            while (place > first && std::fabs(value[place - 1]) < size) place--;
            if (place - first == least) continue;
            if (held[unit] < least) {
                held[unit]++;
                end++;
            }
            for (int64_t j = end - 1; j > place; j--) {
                index[j] = index[j - 1];
                value[j] = value[j - 1];
            }
            index[place] = i;
            value[place] = values[i];
        }
    }
    int64_t next = 0;
    for (int64_t u = 0; u < units; u++)
        for (int64_t j = u * least; j < u * least + held[u]; j++) {
            index[next] = index[j];
            value[next++] = value[j];
        }
    *found = next;
}

// Values per row that are not zero, summed up: row_start[r] to row_start[r + 1] will be those of row r.
void candidates_count(const float* values, const int32_t* start, int64_t rows, int32_t* row_start, int64_t threads) {
    row_start[0] = 0;
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        Ints zeros{};
        int64_t i = start[r], to = start[r + 1];
        int32_t kept = (int32_t)(to - i);
        for (; i + LANES <= to; i += LANES) zeros -= (Ints)(load(values + i) == Floats{});
        kept -= sum(zeros);
        for (; i < to; i++) kept -= values[i] == 0.0f;
        row_start[r + 1] = kept;
    }
    for (int64_t r = 0; r < rows; r++) row_start[r + 1] += row_start[r];
}

// Entries of the weight (rows, columns) that `old_start`, `old` name become zero; the values that are not zero go to their
// places and, row after row and column after column, to `entries` and `turned`. `row_start` from above; `column_start` of
// the new pattern comes out; `place` has room for the columns.
void candidates_emit(
    const float* values, const int32_t* start, const int32_t* at, int64_t rows, int64_t columns,
    const int32_t* old_start, const Entry* old, float* weight, const int32_t* row_start, Entry* entries,
    int32_t* column_start, Entry* turned, int32_t* place, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        float* line = weight + r * columns;
        for (int32_t e = old_start[r]; e < old_start[r + 1]; e++) line[old[e].at] = 0.0f;
        Entry* to = entries + row_start[r];
        each_kept(values, start[r], start[r + 1], [&](int64_t i) {
            line[at[i]] = values[i];
            *to++ = {at[i], values[i]};
        });
    }
    int32_t kept = row_start[rows];
    memset(column_start, 0, (size_t)(columns + 1) * 4);
    for (int32_t e = 0; e < kept; e++) column_start[entries[e].at + 1]++;
    for (int64_t c = 0; c < columns; c++) {
        column_start[c + 1] += column_start[c];
        place[c] = column_start[c];
    }
    for (int64_t r = 0; r < rows; r++)
        for (int32_t e = row_start[r]; e < row_start[r + 1]; e++)
            turned[place[entries[e].at]++] = {(int32_t)r, entries[e].value};
}
}
