// Causal attention with a sink, forward and backward, one head of one sequence at a time.
//
// On the way there a block of queries lies in the lanes and meets all keys up to the last of them; on the way back a block
// of keys lies in the lanes and meets all queries from the first of them on. Nothing of the size (T, T) leaves the cache.
#include "functions.hpp"

#include <cmath>

static const int SPAN = 2 * LANES;            // queries, or keys, of a block
static const int TILE = LANES == 16 ? 8 : 4;  // rows, or channels, that are in registers at once
static const int64_t WIDTH = 64;             // channels of the heads that are worked on together
static const float LOWEST = -3e38f;

// All ones in the lanes whose number is `least` and more.
static inline Ints lanes_from(int64_t least) {
    Ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return (Ints)(lane >= splat((int32_t)least));
}

// The shape of what one job works on: some heads of one sequence, (length, heads, channels), rows of a token `stride` long.
struct Shape {
    int64_t length, heads, channels, stride, padded, wide;
    Shape(int64_t length, int64_t heads, int64_t channels)
        : length(length), heads(heads), channels(channels), stride(heads * channels),
          padded(round_up(length, SPAN)), wide(round_up(channels, LANES)) {}
    int64_t size() const { return round_up(length * stride, LANES); }
};

// Copies rows of `width` between a tensor and a job's own memory, where the rows lie closer together: a head's part of
// each row alone would be a line of memory in another page each.
static void copy_rows(const float* from, int64_t stride, int64_t length, int64_t width, float* to, int64_t apart) {
    for (int64_t t = 0; t < length; t++) memcpy(to + t * apart, from + t * stride, (size_t)width * 4);
}

// One head's rows (length, channels) times `scale` -> (padded, wide), zeros around.
static void take_rows(const float* from, const Shape& s, float scale, float* out) {
    for (int64_t t = 0; t < s.padded; t++)
        for (int64_t d = 0; d < s.wide; d += LANES)
            store(out + t * s.wide + d, t < s.length ? load_some(from + t * s.stride + d, s.channels - d) * scale : Floats{});
}

// The same, transposed: (channels, padded).
static void take_columns(const float* from, const Shape& s, float scale, float* out) {
    gather(from, s.stride, s.channels, s.length, s.padded, out);
    if (scale != 1)
        for (int64_t i = 0; i < s.channels * s.padded; i += LANES) store(out + i, load(out + i) * scale);
}

static void put_rows(const float* from, const Shape& s, int64_t first, int64_t count, float* out) {
    for (int64_t t = first; t < first + count && t < s.length; t++)
        for (int64_t d = 0; d < s.channels; d += LANES)
            store_some(out + t * s.stride + d, load(from + (t - first) * s.wide + d), s.channels - d);
}

// scores (count, SPAN) = rows (count, wide) . columns (channels, padded), of which the block from `first` on.
static void score(
    const float* rows, const float* columns, const Shape& s, int64_t first, int64_t count, float* scores) {
    for (int64_t r = 0; r < count; r += TILE) {
        Floats low[TILE] = {}, high[TILE] = {};
        for (int64_t d = 0; d < s.channels; d++) {
            Floats a = load(columns + d * s.padded + first), b = load(columns + d * s.padded + first + LANES);
#pragma GCC unroll 8
            for (int i = 0; i < TILE; i++) {
                float row = rows[(r + i) * s.wide + d];
                low[i] += a * row;
                high[i] += b * row;
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < TILE; i++) {
            store(scores + (r + i) * SPAN, low[i]);
            store(scores + (r + i) * SPAN + LANES, high[i]);
        }
    }
}

// out (SPAN, wide) = weights (count, SPAN)^T rows (count, wide), each row of out times a lane of `factor`. `turned` has
// room for (wide, SPAN).
static void fold(
    const float* weights, const float* rows, const Shape& s, int64_t count, const Floats factor[2], float* turned,
    float* out) {
    for (int64_t d = 0; d < s.wide; d += TILE) {
        Floats low[TILE] = {}, high[TILE] = {};
        for (int64_t r = 0; r < count; r++) {
            Floats a = load(weights + r * SPAN), b = load(weights + r * SPAN + LANES);
#pragma GCC unroll 8
            for (int i = 0; i < TILE; i++) {
                float row = rows[r * s.wide + d + i];
                low[i] += a * row;
                high[i] += b * row;
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < TILE; i++) {
            store(turned + (d + i) * SPAN, low[i] * factor[0]);
            store(turned + (d + i) * SPAN + LANES, high[i] * factor[1]);
        }
    }
    gather(turned, SPAN, SPAN, s.wide, s.wide, out);
}

// out (count, wide) += weights (count, SPAN) rows (SPAN, wide).
static void spread_out(const float* weights, const float* rows, const Shape& s, int64_t count, float* out) {
    for (int64_t r = 0; r < count; r += TILE)
        for (int64_t d = 0; d < s.wide; d += LANES) {
            Floats total[TILE];
#pragma GCC unroll 8
            for (int i = 0; i < TILE; i++) total[i] = load(out + (r + i) * s.wide + d);
            for (int64_t j = 0; j < SPAN; j++) {
                Floats row = load(rows + j * s.wide + d);
#pragma GCC unroll 8
                for (int i = 0; i < TILE; i++) total[i] += row * weights[(r + i) * SPAN + j];
            }
#pragma GCC unroll 8
            for (int i = 0; i < TILE; i++) store(out + (r + i) * s.wide + d, total[i]);
        }
}

static void head_forward(
    const float* q, const float* k, const float* v, const float* sink, const Shape& s, float scale, float* memory,
    float* out, float* logsum) {
    float* queries = memory;
    float* keys = queries + s.channels * s.padded;
    float* values = keys + s.padded * s.wide;
    float* scores = values + s.padded * s.wide;
    float* turned = scores + s.padded * SPAN;
    float* mixed = turned + s.wide * SPAN;
    take_columns(q, s, scale, queries);
    take_rows(k, s, 1, keys);
    take_rows(v, s, 1, values);
    for (int64_t first = 0; first < s.length; first += SPAN) {
        int64_t seen = first + SPAN;
        score(keys, queries, s, first, seen, scores);
        alignas(64) float total[SPAN], most[SPAN];
        Floats factor[2];
        for (int half = 0; half < 2; half++) {
            float* block = scores + half * LANES;
            int64_t start = first + half * LANES;  // the first query in these lanes
            Floats top = splat(sink ? *sink : LOWEST);
            for (int64_t j = 0; j < seen; j++) {
                Floats here = load(block + j * SPAN);
                if (j > start) {
                    here = lanes_from(j - start) ? here : splat(LOWEST);
                    store(block + j * SPAN, here);
                }
                top = here > top ? here : top;
            }
            Floats sum = sink ? exponential(splat(*sink) - top) : Floats{};
            for (int64_t j = 0; j < seen; j++) {
                Floats p = exponential(load(block + j * SPAN) - top);
                if (j > start) p = (Floats)((Ints)p & lanes_from(j - start));
                sum += p;
                store(block + j * SPAN, p);
            }
            store(total + half * LANES, sum);
            store(most + half * LANES, top);
            factor[half] = 1.0f / sum;
        }
        fold(scores, values, s, seen, factor, turned, mixed);
        for (int64_t i = 0; i < SPAN && first + i < s.length; i++) logsum[first + i] = most[i] + std::log(total[i]);
        put_rows(mixed, s, first, SPAN, out);
    }
}

static float head_backward(
    const float* q, const float* k, const float* v, const float* sink, const float* out, const float* logsum,
    const float* grad, const Shape& s, float scale, float* memory, float* grad_q, float* grad_k, float* grad_v) {
    int64_t rows = s.padded * s.wide;
    float* key_columns = memory;
    float* value_columns = key_columns + s.channels * s.padded;
    float* queries = value_columns + s.channels * s.padded;
    float* keys = queries + rows;
    float* grads = keys + rows;
    float* to_queries = grads + rows;
    float* shares = to_queries + rows;
    float* slopes = shares + s.padded * SPAN;
    float* turned = slopes + s.padded * SPAN;
    float* mixed = turned + s.wide * SPAN;
    float* dot = mixed + s.wide * SPAN;  // of each token's output and its gradient
    take_columns(k, s, 1, key_columns);
    take_columns(v, s, 1, value_columns);
    take_rows(q, s, scale, queries);
    take_rows(k, s, scale, keys);
    take_rows(grad, s, 1, grads);
    memset(to_queries, 0, (size_t)rows * 4);
    double to_sink = 0;
    for (int64_t t = 0; t < s.length; t++) {
        Floats total{};
        for (int64_t d = 0; d < s.wide; d += LANES)
            total += load_some(out + t * s.stride + d, s.channels - d) * load(grads + t * s.wide + d);
        dot[t] = sum(total);
        if (sink) to_sink -= std::exp(*sink - logsum[t]) * dot[t];
    }
    const Floats one[2] = {splat(1.0f), splat(1.0f)};
    for (int64_t first = 0; first < s.length; first += SPAN) {
        int64_t count = s.padded - first;  // queries that may see these keys
        score(queries + first * s.wide, key_columns, s, first, count, shares);
        score(grads + first * s.wide, value_columns, s, first, count, slopes);
        for (int64_t i = 0; i < count; i++) {
            bool there = first + i < s.length;
            float less = there ? logsum[first + i] : 0.0f, mean = there ? dot[first + i] : 0.0f;
            for (int half = 0; half < SPAN; half += LANES) {
                int64_t at = i * SPAN + half;
                Floats p = exponential(load(shares + at) - less);
                // Lane l holds key first + half + l.
                if (i < half + LANES) p = (Floats)((Ints)p & ~lanes_from(i + 1 - half));
                store(shares + at, p);
                store(slopes + at, p * (load(slopes + at) - mean));
            }
        }
        fold(shares, grads + first * s.wide, s, count, one, turned, mixed);
        put_rows(mixed, s, first, SPAN, grad_v);
        fold(slopes, queries + first * s.wide, s, count, one, turned, mixed);
        put_rows(mixed, s, first, SPAN, grad_k);
        spread_out(slopes, keys + first * s.wide, s, count, to_queries + first * s.wide);
    }
    put_rows(to_queries, s, 0, s.length, grad_q);
    return (float)to_sink;
}

// How many heads a job takes: so many that their part of a row is `WIDTH` long, and each thread has two jobs or more.
static int64_t heads_of_a_job(int64_t batch, int64_t heads, int64_t channels, int64_t threads) {
    int64_t together = 1;
    while (together < heads && 2 * together * channels <= WIDTH && batch * heads >= 4 * together * threads) together *= 2;
    return together;
}

extern "C" {

// q, k, v, out: (batch, length, heads, channels); sink: (heads) or null; logsum: (batch, heads, length), the logarithm of
// the softmax's denominator.
void attention_forward(
    const float* q, const float* k, const float* v, const float* sink, int64_t batch, int64_t length, int64_t heads,
    int64_t channels, float scale, float* out, float* logsum, int64_t threads) {
    int64_t together = heads_of_a_job(batch, heads, channels, threads), groups = (heads + together - 1) / together;
    int64_t stride = heads * channels;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        static thread_local Scratch scratch;
        Shape most(length, together, channels);
        float* own = scratch.of<float>(
            4 * most.size() + most.padded * (channels + 2 * most.wide + SPAN) + 2 * SPAN * most.wide);
#pragma omp for schedule(dynamic, 1)
        for (int64_t job = 0; job < batch * groups; job++) {
            int64_t b = job / groups, head = job % groups * together;
            Shape s(length, heads - head < together ? heads - head : together, channels);
            int64_t at = (b * length * heads + head) * channels;
            const float* given[] = {q, k, v};
            float *mine[4], *memory = own;
            for (int i = 0; i < 4; i++, memory += s.size()) mine[i] = memory;
            for (int i = 0; i < 3; i++) copy_rows(given[i] + at, stride, length, s.stride, mine[i], s.stride);
            for (int64_t h = 0; h < s.heads; h++) {
                int64_t c = h * channels;
                head_forward(
                    mine[0] + c, mine[1] + c, mine[2] + c, sink ? sink + head + h : nullptr, s, scale, memory,
                    mine[3] + c, logsum + (b * heads + head + h) * length);
            }
            copy_rows(mine[3], s.stride, length, s.stride, out + at, stride);
        }
    }
}

// The gradients; grad_sink: (batch, heads).
void attention_backward(
    const float* q, const float* k, const float* v, const float* sink, const float* out, const float* logsum,
    const float* grad, int64_t batch, int64_t length, int64_t heads, int64_t channels, float scale, float* grad_q,
    float* grad_k, float* grad_v, float* grad_sink, int64_t threads) {
    int64_t together = heads_of_a_job(batch, heads, channels, threads), groups = (heads + together - 1) / together;
    int64_t stride = heads * channels;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        static thread_local Scratch scratch;
        Shape most(length, together, channels);
        float* own = scratch.of<float>(
            8 * most.size() + most.padded * (2 * channels + 4 * most.wide + 2 * SPAN + 1) + 2 * SPAN * most.wide);
#pragma omp for schedule(dynamic, 1)
        for (int64_t job = 0; job < batch * groups; job++) {
            int64_t b = job / groups, head = job % groups * together;
            Shape s(length, heads - head < together ? heads - head : together, channels);
            int64_t at = (b * length * heads + head) * channels;
            const float* given[] = {q, k, v, out, grad};
            float *made[] = {grad_q, grad_k, grad_v}, *mine[8], *memory = own;
            for (int i = 0; i < 8; i++, memory += s.size()) mine[i] = memory;
            for (int i = 0; i < 5; i++) copy_rows(given[i] + at, stride, length, s.stride, mine[i], s.stride);
            for (int64_t h = 0; h < s.heads; h++) {
                int64_t c = h * channels, row = b * heads + head + h;
                grad_sink[row] = head_backward(
                    mine[0] + c, mine[1] + c, mine[2] + c, sink ? sink + head + h : nullptr, mine[3] + c,
                    logsum + row * length, mine[4] + c, s, scale, memory, mine[5] + c, mine[6] + c, mine[7] + c);
            }
            for (int i = 0; i < 3; i++) copy_rows(mine[5 + i], s.stride, length, s.stride, made[i] + at, stride);
        }
    }
}
}
