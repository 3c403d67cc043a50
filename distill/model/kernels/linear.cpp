// Products with a sparse weight, tokens in the lanes.
//
// Activations come and go token-major. A block of tokens is transposed into scratch, so that one weight meets the same
// channel of many tokens in one vector: no horizontal sums, one broadcast per weight. The result is transposed back.
#include "lanes.hpp"

static const int BLOCK = 64;               // tokens per word of a mask
static const int PANEL = 8 * LANES;        // columns of the weight gradient that stay in registers
static const int64_t GROUP = 256;          // its rows that stay in the cache, at most
static const int64_t LEAST_GROUP = 32;     // and at least
static const int64_t CACHE = 1 << 19;      // bytes of transposed activations that a core's own cache holds

struct Entry {
    int32_t at;  // column (by rows) or row (by columns)
    float value;
};

// out (tokens, rows) = x W^T + bias for one block, x transposed (columns, SPAN).
template <int VECTORS>
static void multiply(
    const int32_t* start, const Entry* entries, int64_t rows, const float* x, const float* bias, int64_t tokens,
    float* out) {
    constexpr int SPAN = VECTORS * LANES;
    alignas(64) float strip[LANES][SPAN] = {};
    for (int64_t first = 0; first < rows; first += LANES) {
        int64_t here = rows - first < LANES ? rows - first : LANES;
        for (int64_t i = 0; i < here; i++) {
            Floats total[VECTORS];
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; v++) total[v] = splat(bias ? bias[first + i] : 0.0f);
            for (int32_t e = start[first + i]; e < start[first + i + 1]; e++) {
                const float* from = x + (int64_t)entries[e].at * SPAN;
                float value = entries[e].value;
#pragma GCC unroll 16
                for (int v = 0; v < VECTORS; v++) total[v] += value * load(from + v * LANES);
            }
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; v++) store(strip[i] + v * LANES, total[v]);
        }
        for (int64_t t = 0; t < tokens; t += LANES) {
            Floats square[LANES];
            for (int i = 0; i < LANES; i++) square[i] = load(strip[i] + t);
            transpose(square);
            int64_t there = tokens - t < LANES ? tokens - t : LANES;
            for (int64_t i = 0; i < there; i++) {
                float* to = out + (t + i) * rows + first;
                if (here == LANES)
                    store(to, square[i]);
                else
                    memcpy(to, &square[i], (size_t)here * 4);
            }
        }
    }
}

template <int VECTORS>
static void forward(
    const int32_t* start, const Entry* entries, int64_t rows, int64_t columns, const float* x, const float* bias,
    int64_t tokens, float* out, int64_t threads) {
    constexpr int SPAN = VECTORS * LANES;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        static thread_local Scratch scratch;
        float* block = scratch.of<float>(columns * SPAN);
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < tokens; t += SPAN) {
            int64_t here = tokens - t < SPAN ? tokens - t : SPAN;
            gather(x + t * columns, columns, columns, here, SPAN, block);
            multiply<VECTORS>(start, entries, rows, block, bias, here, out + t * rows);
        }
    }
}

// Copies those of BLOCK values whose bits are set, closed up; `to` may be `values` or before. Returns the place after them.
static inline float* squeeze(const float* values, uint64_t bits, float* to) {
#if LANES == 16
    for (int i = 0; i < BLOCK; i += LANES) {
        __mmask16 part = (__mmask16)(bits >> i);
        // Whole vectors: what is written too much lies where everything has been read.
        _mm512_storeu_ps(to, _mm512_maskz_compress_ps(part, _mm512_loadu_ps(values + i)));
        to += __builtin_popcount(part);
    }
#else
    for (; bits; bits &= bits - 1) *to++ = values[__builtin_ctzll(bits)];
#endif
    return to;
}

// One tile (group of rows, panel of columns) of grad^T x: for each row of the weight the tokens whose gradient is not
// zero, found by the bits of a mask.
template <int VECTORS>
static void weight_tile(
    const float* grad, const int32_t* place, const uint64_t* mask, int64_t rows, int64_t first, int64_t count, const float* x, int64_t columns,
    int64_t column, int64_t tokens, float* panel, float* total, float* out) {
    constexpr int WIDTH = VECTORS * LANES;
    memset(total, 0, (size_t)(count * WIDTH) * 4);
    for (int64_t t = 0; t < tokens; t += BLOCK) {
        int64_t here = tokens - t < BLOCK ? tokens - t : BLOCK;
        for (int64_t i = 0; i < here; i++)
            for (int v = 0; v < VECTORS; v++)
                store(panel + i * WIDTH + v * LANES, load(x + (t + i) * columns + column + v * LANES));
        const uint64_t* words = mask + t / BLOCK * rows + first;
        const float* next = grad + t * rows + place[t / BLOCK * rows + first];
        for (int64_t r = 0; r < count; r++) {
            uint64_t rest = words[r];
            if (!rest) continue;
            Floats sums[VECTORS];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) sums[v] = load(total + r * WIDTH + v * LANES);
            do {
                int64_t token = __builtin_ctzll(rest);
                rest &= rest - 1;
                float value = *next++;
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++) sums[v] += value * load(panel + token * WIDTH + v * LANES);
            } while (rest);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) store(total + r * WIDTH + v * LANES, sums[v]);
        }
    }
    for (int64_t r = 0; r < count; r++) memcpy(out + (first + r) * columns + column, total + r * WIDTH, WIDTH * 4);
}

// The columns that fill no vector.
static void weight_rest(
    const float* grad, const int32_t* place, const uint64_t* mask, int64_t rows, int64_t first, int64_t count, const float* x, int64_t columns,
    int64_t column, int64_t tokens, float* out) {
    for (int64_t r = first; r < first + count; r++)
        for (int64_t c = column; c < columns; c++) out[r * columns + c] = 0.0f;
    for (int64_t b = 0; b * BLOCK < tokens; b++)
        for (int64_t r = first; r < first + count; r++) {
            const float* next = grad + b * rows * BLOCK + place[b * rows + r];
            for (uint64_t rest = mask[b * rows + r]; rest; rest &= rest - 1, next++) {
                const float* from = x + (b * BLOCK + __builtin_ctzll(rest)) * columns;
                for (int64_t c = column; c < columns; c++) out[r * columns + c] += *next * from[c];
            }
        }
}

extern "C" {

// Entries per row of the dense weight, summed up: start[r] to start[r + 1] are those of row r.
void pattern_count(const float* weight, int64_t rows, int64_t columns, int32_t* start, int64_t threads) {
    start[0] = 0;
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        const float* row = weight + r * columns;
        Ints zeros{};
        int64_t c = 0;
        for (; c + LANES <= columns; c += LANES) zeros -= (Ints)(load(row + c) == Floats{});
        int32_t count = (int32_t)c - sum(zeros);
        for (; c < columns; c++) count += row[c] != 0.0f;
        start[r + 1] = count;
    }
    for (int64_t r = 0; r < rows; r++) start[r + 1] += start[r];
}

// Both orders of the entries; `start` from above. `column_start` has columns + 1 places, `place` columns * slabs.
void pattern_fill(
    const float* weight, int64_t rows, int64_t columns, const int32_t* start, Entry* by_row, int32_t* column_start,
    Entry* by_column, int32_t* place, int64_t slabs, int64_t threads) {
    memset(place, 0, (size_t)(slabs * columns) * 4);
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (int64_t slab = 0; slab < slabs; slab++) {
        int32_t* counts = place + slab * columns;
        for (int64_t r = rows * slab / slabs; r < rows * (slab + 1) / slabs; r++) {
            const float* row = weight + r * columns;
            Entry* to = by_row + start[r];
            int64_t c = 0;
            for (; c + LANES <= columns; c += LANES)
                for (uint64_t rest = pack((Ints)(load(row + c) != Floats{})); rest; rest &= rest - 1) {
                    int64_t at = c + __builtin_ctzll(rest);
                    *to++ = {(int32_t)at, row[at]};
                    counts[at]++;
                }
            for (; c < columns; c++)
                if (row[c] != 0.0f) {
                    *to++ = {(int32_t)c, row[c]};
                    counts[c]++;
                }
        }
    }
    int32_t next = 0;
    for (int64_t c = 0; c < columns; c++) {
        column_start[c] = next;
        for (int64_t slab = 0; slab < slabs; slab++) {
            int32_t count = place[slab * columns + c];
            place[slab * columns + c] = next;
            next += count;
        }
    }
    column_start[columns] = next;
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (int64_t slab = 0; slab < slabs; slab++) {
        int32_t* to = place + slab * columns;
        for (int64_t r = rows * slab / slabs; r < rows * (slab + 1) / slabs; r++)
            for (int32_t e = start[r]; e < start[r + 1]; e++)
                by_column[to[by_row[e].at]++] = {(int32_t)r, by_row[e].value};
    }
}

// out (tokens, rows) = x (tokens, columns) W^T + bias (or null); W by rows. With W by columns: the input gradient.
void linear_forward(
    const int32_t* start, const Entry* entries, int64_t rows, int64_t columns, const float* x, const float* bias,
    int64_t tokens, float* out, int64_t threads) {
    int64_t span = BLOCK;
    while (span > LANES && (columns * span * 4 > CACHE || tokens <= span * threads / 2)) span /= 2;
    if (span >= 4 * LANES)
        forward<4>(start, entries, rows, columns, x, bias, tokens, out, threads);
    else if (span >= 2 * LANES)
        forward<2>(start, entries, rows, columns, x, bias, tokens, out, threads);
    else
        forward<1>(start, entries, rows, columns, x, bias, tokens, out, threads);
}

// What the gradients need of grad (tokens, rows), per block of tokens: for each row the bits of its non-zeros in `mask`
// (blocks, rows), and their sum in `sums` (blocks, rows); the non-zeros row after row in `blocks` (blocks, rows * BLOCK),
// from `place` (blocks, rows) on; their number in `filled` (blocks). Where `entries` are given (by columns):
// grad_x (tokens, columns) = grad W.
void linear_backward(
    const int32_t* start, const Entry* entries, int64_t rows, int64_t columns, const float* grad, int64_t tokens,
    float* blocks, int32_t* place, uint64_t* mask, float* sums, int64_t* filled, float* grad_x, int64_t threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)threads) if (threads > 1)
    for (int64_t t = 0; t < tokens; t += BLOCK) {
        int64_t here = tokens - t < BLOCK ? tokens - t : BLOCK, b = t / BLOCK;
        float* block = blocks + t * rows;
        gather(grad + t * rows, rows, rows, here, BLOCK, block);
        if (grad_x) multiply<BLOCK / LANES>(start, entries, columns, block, nullptr, here, grad_x + t * columns);
        float* next = block;
        for (int64_t r = 0; r < rows; r++) {
            uint64_t word = 0;
            Floats total{};
            for (int i = 0; i < BLOCK; i += LANES) {
                Floats v = load(block + r * BLOCK + i);
                word |= pack((Ints)(v != Floats{})) << i;
                total += v;
            }
            mask[b * rows + r] = word;
            sums[b * rows + r] = sum(total);
            place[b * rows + r] = (int32_t)(next - block);
            next = squeeze(block + r * BLOCK, word, next);
        }
        filled[b] = next - block;
    }
}

// out (rows, columns) = grad^T x, from the blocks and masks above.
void linear_weight(
    const float* blocks, const int32_t* place, const uint64_t* mask, int64_t rows, int64_t columns, const float* x,
    int64_t tokens, float* out, int64_t threads) {
    int64_t panels = (columns + PANEL - 1) / PANEL, height = GROUP;
    // Two jobs or more for each thread.
    while (height > LEAST_GROUP && panels * ((rows + height - 1) / height) < 2 * threads) height /= 2;
    int64_t groups = (rows + height - 1) / height;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        static thread_local Scratch scratch;
        float* panel = scratch.of<float>((BLOCK + height) * PANEL);
        float* total = panel + BLOCK * PANEL;
#pragma omp for schedule(dynamic, 1)
        for (int64_t job = 0; job < panels * groups; job++) {
            int64_t first = job % groups * height, count = rows - first < height ? rows - first : height;
            int64_t column = job / groups * PANEL, left = columns - column < PANEL ? columns - column : PANEL;
            while (left >= LANES) {
                int64_t step = left >= 8 * LANES ? 8 : left >= 4 * LANES ? 4 : left >= 2 * LANES ? 2 : 1;
                auto tile = step == 8 ? weight_tile<8> : step == 4 ? weight_tile<4> : step == 2 ? weight_tile<2> : weight_tile<1>;
                tile(blocks, place, mask, rows, first, count, x, columns, column, tokens, panel, total, out);
                column += step * LANES;
                left -= step * LANES;
            }
            if (left > 0) weight_rest(blocks, place, mask, rows, first, count, x, columns, column, tokens, out);
        }
    }
}
}
