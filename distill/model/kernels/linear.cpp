// Products with a sparse weight, tokens in the lanes.
//
// Activations come and go token-major. A block of tokens is transposed into scratch, so that one weight meets the same
// channel of many tokens in one vector: no horizontal sums, one broadcast per weight. The result is transposed back.
#include "entry.hpp"
#include "row.hpp"

static const int BLOCK = 64;               // tokens per word of a mask
static const int PANEL = 8 * LANES;        // columns of the weight gradient that stay in registers
static const int64_t GROUP = 512;          // its rows that stay in the cache, at most
static const int64_t LEAST_GROUP = 32;     // and at least
static const int MOST = LANES == 16 ? 2 : 4;     // vectors of tokens that a product takes at a time: more leave the cache
static const int CHAINS = LANES == 16 ? 4 : 1;   // sums of a row side by side: each addition waits for the one before

// A sparse weight by rows, or by columns, and what it is multiplied with: a block of activations (columns, SPAN).
struct Factor {
    const int32_t* start;
    const Entry* entries;
    const float* x;
};

// out (tokens, rows) = bias + the sum of the factors' W x, for one block of tokens.
template <int VECTORS>
static void multiply(const Factor* factors, int64_t count, int64_t rows, const float* bias, int64_t tokens, float* out) {
    constexpr int SPAN = VECTORS * LANES;
    alignas(64) float strip[LANES][SPAN] = {};
    for (int64_t first = 0; first < rows; first += LANES) {
        int64_t here = rows - first < LANES ? rows - first : LANES;
        for (int64_t i = 0; i < here; i++) {
            Floats total[CHAINS][VECTORS] = {};
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; v++) total[0][v] = splat(bias ? bias[first + i] : 0.0f);
            for (int64_t f = 0; f < count; f++) {
                const float* x = factors[f].x;
                const Entry *e = factors[f].entries + factors[f].start[first + i],
                            *end = factors[f].entries + factors[f].start[first + i + 1];
                for (; e + CHAINS <= end; e += CHAINS)
#pragma GCC unroll 4
                    for (int c = 0; c < CHAINS; c++)
#pragma GCC unroll 16
                        for (int v = 0; v < VECTORS; v++)
                            total[c][v] += e[c].value * load(x + (int64_t)e[c].at * SPAN + v * LANES);
                for (; e < end; e++)
#pragma GCC unroll 16
                    for (int v = 0; v < VECTORS; v++)
                        total[0][v] += e->value * load(x + (int64_t)e->at * SPAN + v * LANES);
            }
#pragma GCC unroll 4
            for (int c = 1; c < CHAINS; c++)
#pragma GCC unroll 16
                for (int v = 0; v < VECTORS; v++) total[0][v] += total[c][v];
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; v++) store(strip[i] + v * LANES, total[0][v]);
        }
        for (int64_t t = 0; t < tokens; t += LANES) {
            Floats square[LANES];
            for (int i = 0; i < LANES; i++) square[i] = load(strip[i] + t);
            transpose(square);
            int64_t there = tokens - t < LANES ? tokens - t : LANES;
            for (int64_t i = 0; i < there; i++) store_some(out + (t + i) * rows + first, square[i], here);
        }
    }
}

// One of the maps of a forward call, which read the same x. The layout is that of `_Forward` in linear.py.
struct Forward {
    const int32_t* start;  // by rows
    const Entry* entries;
    const float* bias;  // (rows) or null
    float* out;         // (tokens, rows)
    uint64_t* mask;     // (tokens, words), or null where nobody asks
    float* slope;       // (tokens, slope_stride) or null
    Finish finish;
};

template <int VECTORS>
static void forward(
    const Forward* maps, int64_t count, int64_t columns, const float* x, int64_t tokens, int64_t threads) {
    constexpr int SPAN = VECTORS * LANES;
    int64_t most = 0;
    for (int64_t m = 0; m < count; m++) most = maps[m].finish.width > most ? maps[m].finish.width : most;
    Finish widest = {most, most, IDENTITY, 0, 0};
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        static thread_local Scratch scratch;
        float* block = scratch.of<float>(columns * SPAN + widest.memory() + 2 * widest.words());
        int32_t* memory = (int32_t*)(block + columns * SPAN);
        uint64_t* unread = (uint64_t*)(memory + widest.memory());
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < tokens; t += SPAN) {
            int64_t here = tokens - t < SPAN ? tokens - t : SPAN;
            gather(x + t * columns, columns, columns, here, SPAN, block);
            for (const Forward* m = maps; m < maps + count; m++) {
                const Finish& f = m->finish;
                Factor factor = {m->start, m->entries, block};
                float* out = m->out + t * f.width;
                multiply<VECTORS>(&factor, 1, f.width, m->bias, here, out);
                if (!f.selects() && f.activation == IDENTITY) continue;
                for (int64_t i = t; i < t + here; i++, out += f.width)
                    finish(
                        f, out, memory, m->mask ? m->mask + i * f.words() : unread,
                        m->slope ? m->slope + i * slope_stride(f.keep) : nullptr, out);
            }
        }
    }
}

// One tile (group of rows, panel of columns) of grad^T x: for each row of the weight the tokens whose gradient is not
// zero, found by the bits of a mask.
template <int VECTORS>
static void weight_tile(
    const float* grad, const int32_t* place, const uint64_t* mask, int64_t rows, int64_t first, int64_t count, const float* x, int64_t columns,
    int64_t column, int64_t tokens, float* panel, float* total, float* out) {
    constexpr int WIDTH = VECTORS * LANES;
    int64_t lines = (BLOCK * VECTORS + count - 1) / count;
    memset(total, 0, (size_t)(count * WIDTH) * 4);
    for (int64_t t = 0; t < tokens; t += BLOCK) {
        int64_t here = tokens - t < BLOCK ? tokens - t : BLOCK;
        for (int64_t i = 0; i < here; i++)
            for (int v = 0; v < VECTORS; v++)
                store(panel + i * WIDTH + v * LANES, load(x + (t + i) * columns + column + v * LANES));
        const uint64_t* words = mask + t / BLOCK * rows + first;
        const float* next = grad + t * rows + place[t / BLOCK * rows + first];
        const float* later = x + (t + BLOCK) * columns + column;
        for (int64_t r = 0; r < count; r++) {
            // The next panel comes into the cache meanwhile, some lines a row.
            if (t + BLOCK < tokens)
                for (int64_t line = r * lines; line < (r + 1) * lines; line++)
                    __builtin_prefetch(later + line / VECTORS % BLOCK * columns + line % VECTORS * LANES);
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

// One of the maps of a backward call. The layout is that of `_Backward` in linear.py.
struct Backward {
    const int32_t* start;  // by columns; null where grad_x is not asked for
    const Entry* entries;
    const float* grad;     // (tokens, rows), of the map's output
    const uint64_t* mask;  // what AbsTopK kept, or null
    const float* slope;    // the activation's derivatives there, or null
    int64_t rows, keep;
    // For the gradient of the weight, null where it is not asked for. Per block of tokens: for each row the bits of its
    // non-zeros in `bits` (blocks, rows), and their sum in `sums` (blocks, rows); the non-zeros row after row in `blocks`
    // (blocks, rows * BLOCK), from `place` (blocks, rows) on; their number in `filled` (blocks).
    float* blocks;
    int32_t* place;
    uint64_t* bits;
    float* sums;
    int64_t* filled;
};

// The gradient before activation and AbsTopK of the block of tokens from t on, transposed: (rows, BLOCK). `lines` has room
// for LANES tokens, LANES more places each: the slopes are spread in order, and rows a power of two apart fall together in
// the cache.
static void take(const Backward& map, int64_t t, int64_t tokens, float* lines, float* block) {
    int64_t rows = map.rows, words = (rows + WORD - 1) / WORD, stride = rows + LANES;
    if (!map.mask && !map.slope) return gather(map.grad + t * rows, rows, rows, tokens, BLOCK, block);
    for (int64_t first = 0; first < BLOCK; first += LANES) {
        int64_t there = tokens - first < LANES ? tokens - first : LANES;
        for (int64_t i = 0; i < there; i++) {
            int64_t at = t + first + i;
            const uint64_t* mask = map.mask ? map.mask + at * words : nullptr;
            const float* slope = map.slope ? map.slope + at * slope_stride(map.keep) : nullptr;
            for (int64_t r = 0; r < rows; r += LANES)
                store(lines + i * stride + r, passed(load_some(map.grad + at * rows + r, rows - r), mask, r, &slope));
        }
        gather(lines, stride, rows, there, LANES, BLOCK, block + first);
    }
}

// Block b of a map's gradient, without its zeros. It is written apart from the block, which the cache holds: three
// quarters of the lines are never touched where a quarter is not zero.
static void compact(const Backward& map, int64_t b, const float* block) {
    int64_t rows = map.rows;
    float *first = map.blocks + b * rows * BLOCK, *next = first;
    for (int64_t r = 0; r < rows; r++) {
        uint64_t word = 0;
        Floats total{}, row[BLOCK / LANES];
        for (int i = 0; i < BLOCK / LANES; i++) {
            row[i] = load(block + r * BLOCK + i * LANES);
            word |= pack((Ints)(row[i] != Floats{})) << i * LANES;
            total += row[i];
        }
        map.bits[b * rows + r] = word;
        map.sums[b * rows + r] = sum(total);
        map.place[b * rows + r] = (int32_t)(next - first);
        for (int i = 0; i < BLOCK / LANES; i++) next = squeeze(row[i], word >> i * LANES & LANE_BITS, next);
    }
    map.filled[b] = next - first;
}

extern "C" {

// What each of the maps makes of x (tokens, columns).
void linear_forward(
    const Forward* maps, int64_t count, int64_t columns, const float* x, int64_t tokens, int64_t threads) {
    if (tokens <= MOST * LANES * threads / 2)
        forward<1>(maps, count, columns, x, tokens, threads);
    else
        forward<MOST>(maps, count, columns, x, tokens, threads);
}

// What the gradients of the weights need, and where `grad_x` is given, (tokens, columns): the sum of grad W over the first
// `multiplied` maps.
void linear_backward(
    const Backward* maps, int64_t count, int64_t multiplied, int64_t columns, int64_t tokens, float* grad_x,
    int64_t threads) {
    int64_t rows = 0, most = 0;
    for (int64_t m = 0; m < count; m++) {
        rows += maps[m].rows;
        most = maps[m].rows > most ? maps[m].rows : most;
    }
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        static thread_local Scratch scratch;
        int64_t room = LANES * round_up(most + LANES, LANES);
        float* gathered = scratch.of<float>(rows * BLOCK + room + count * (int64_t)(sizeof(Factor) / 4));
        float* lines = gathered + rows * BLOCK;
        Factor* factors = (Factor*)(lines + room);
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < tokens; t += BLOCK) {
            int64_t here = tokens - t < BLOCK ? tokens - t : BLOCK;
            float* block = gathered;
            for (int64_t m = 0; m < count; m++) {
                take(maps[m], t, here, lines, block);
                if (maps[m].blocks) compact(maps[m], t / BLOCK, block);
                factors[m] = {maps[m].start, maps[m].entries, block};
                block += maps[m].rows * BLOCK;
            }
            if (grad_x) multiply<BLOCK / LANES>(factors, multiplied, columns, nullptr, here, grad_x + t * columns);
        }
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
