// Causal attention with a sink, forward and backward, one head of one sequence at a time.
//
// Scores are made for a block of queries that lie in the lanes, against all keys up to the last of them; what is summed
// over keys or queries is made with the channels of the head in the lanes. Nothing of the size (T, T) leaves the cache.
#include "lanes.hpp"

#include <cmath>

static const int QUERIES = 2 * LANES;          // queries of a block
static const int KEYS = LANES == 16 ? 8 : 4;   // keys (or rows of a sum) that are in registers at once
static const float LOWEST = -3e38f;

// e^x with a relative error of 2e-7; below -87 as at -87, above 88 as at 88; NaN stays.
static inline Floats exponential(Floats x) {
    const float magic = 12582912.0f;  // added, it rounds to an integer in the lowest bits
    x = x < -87.0f ? splat(-87.0f) : x;
    x = x > 88.0f ? splat(88.0f) : x;
    Floats shifted = x * 1.44269504f + magic;
    Floats whole = shifted - magic;
    Floats rest = x - whole * 0.693359375f;
    rest = rest + whole * 2.12194440e-4f;
    Floats sum = rest * (1.0f / 5040) + 1.0f / 720;
    sum = sum * rest + 1.0f / 120;
    sum = sum * rest + 1.0f / 24;
    sum = sum * rest + 1.0f / 6;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
    Ints power = ((Ints)shifted << 23) + 0x3f800000;
    return sum * (Floats)power;
}

// Where query first + lane may see the key.
static inline Ints sees(int64_t first, int64_t key) {
    Ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return (Ints)(lane >= splat((int32_t)(key - first)));
}

// The shape of a batch: tensors are (batch, length, heads, channels), one row of a token `stride` long.
struct Shape {
    int64_t length, heads, channels, stride, padded, wide;
    Shape(int64_t length, int64_t heads, int64_t channels)
        : length(length), heads(heads), channels(channels), stride(heads * channels),
          padded(round_up(length, QUERIES)), wide(round_up(channels, LANES)) {}
    int64_t at(int64_t job) const { return job / heads * length * stride + job % heads * channels; }
};

// One head's rows (length, channels) -> (padded, wide), zeros around.
static void take_rows(const float* from, const Shape& s, float* out) {
    memset(out, 0, (size_t)(s.padded * s.wide) * 4);
    for (int64_t t = 0; t < s.length; t++) memcpy(out + t * s.wide, from + t * s.stride, (size_t)s.channels * 4);
}

// The same, transposed: (channels, padded).
static void take_columns(const float* from, const Shape& s, float* out) {
    gather(from, s.stride, s.channels, s.length, s.padded, out);
}

static void put_rows(const float* from, const Shape& s, int64_t first, int64_t count, float* out) {
    for (int64_t t = first; t < first + count && t < s.length; t++)
        memcpy(out + t * s.stride, from + (t - first) * s.wide, (size_t)s.channels * 4);
}

// scores (keys, QUERIES) of the block from `first` on: columns (channels, padded) against rows (keys, wide).
static void score(const float* columns, const float* rows, const Shape& s, int64_t first, int64_t keys, float* scores) {
    for (int64_t j = 0; j < keys; j += KEYS) {
        Floats low[KEYS] = {}, high[KEYS] = {};
        for (int64_t d = 0; d < s.channels; d++) {
            Floats a = load(columns + d * s.padded + first), b = load(columns + d * s.padded + first + LANES);
#pragma GCC unroll 8
            for (int i = 0; i < KEYS; i++) {
                float key = rows[(j + i) * s.wide + d];
                low[i] += a * key;
                high[i] += b * key;
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < KEYS; i++) {
            store(scores + (j + i) * QUERIES, low[i]);
            store(scores + (j + i) * QUERIES + LANES, high[i]);
        }
    }
}

// out (count, wide) (+)= sum over `terms` t of weights[t * along + row * across] * rows[t].
static void mix(
    const float* weights, int64_t along, int64_t across, const float* rows, int64_t terms, int64_t count, int64_t wide,
    bool add, float* out) {
    for (int64_t r = 0; r < count; r += KEYS)
        for (int64_t v = 0; v < wide; v += LANES) {
            Floats total[KEYS] = {};
            if (add)
                for (int i = 0; i < KEYS; i++) total[i] = load(out + (r + i) * wide + v);
            const float* weight = weights + r * across;
            for (int64_t t = 0; t < terms; t++) {
                Floats row = load(rows + t * wide + v);
#pragma GCC unroll 8
                for (int i = 0; i < KEYS; i++) total[i] += row * weight[t * along + i * across];
            }
            for (int i = 0; i < KEYS; i++) store(out + (r + i) * wide + v, total[i]);
        }
}

static void head_forward(
    const float* q, const float* k, const float* v, const float* sink, const Shape& s, float scale, float* memory,
    float* out, float* logsum) {
    float* columns = memory;
    float* keys = columns + s.channels * s.padded;
    float* values = keys + s.padded * s.wide;
    float* scores = values + s.padded * s.wide;
    float* mixed = scores + s.padded * QUERIES;
    take_columns(q, s, columns);
    for (int64_t i = 0; i < s.channels * s.padded; i++) columns[i] *= scale;
    take_rows(k, s, keys);
    take_rows(v, s, values);
    for (int64_t first = 0; first < s.length; first += QUERIES) {
        int64_t seen = first + QUERIES;
        score(columns, keys, s, first, seen, scores);
        alignas(64) float total[QUERIES], most[QUERIES];
        for (int half = 0; half < QUERIES; half += LANES) {
            float* block = scores + half;
            for (int64_t j = first; j < seen; j++)
                store(block + j * QUERIES, sees(first + half, j) ? load(block + j * QUERIES) : splat(LOWEST));
            Floats top = splat(sink ? *sink : LOWEST);
            for (int64_t j = 0; j < seen; j++) {
                Floats here = load(block + j * QUERIES);
                top = here > top ? here : top;
            }
            Floats sum = sink ? exponential(splat(*sink) - top) : Floats{};
            for (int64_t j = 0; j < seen; j++) {
                Floats p = exponential(load(block + j * QUERIES) - top);
                if (j > first) p = (Floats)((Ints)p & sees(first + half, j));
                sum += p;
                store(block + j * QUERIES, p);
            }
            store(total + half, sum);
            store(most + half, top);
        }
        mix(scores, QUERIES, 1, values, seen, QUERIES, s.wide, false, mixed);
        for (int64_t i = 0; i < QUERIES && first + i < s.length; i++) {
            for (int64_t d = 0; d < s.wide; d++) mixed[i * s.wide + d] /= total[i];
            logsum[first + i] = most[i] + std::log(total[i]);
        }
        put_rows(mixed, s, first, QUERIES, out);
    }
}

static float head_backward(
    const float* q, const float* k, const float* v, const float* sink, const float* out, const float* logsum,
    const float* grad, const Shape& s, float scale, float* memory, float* grad_q, float* grad_k, float* grad_v) {
    int64_t rows = s.padded * s.wide;
    float* columns = memory;
    float* grad_columns = columns + s.channels * s.padded;
    float* queries = grad_columns + s.channels * s.padded;
    float* keys = queries + rows;
    float* values = keys + rows;
    float* grads = values + rows;
    float* to_keys = grads + rows;
    float* to_values = to_keys + rows;
    float* shares = to_values + rows;
    float* slopes = shares + s.padded * QUERIES;
    float* mixed = slopes + s.padded * QUERIES;
    take_columns(q, s, columns);
    for (int64_t i = 0; i < s.channels * s.padded; i++) columns[i] *= scale;
    take_columns(grad, s, grad_columns);
    take_rows(q, s, queries);
    for (int64_t i = 0; i < rows; i++) queries[i] *= scale;
    take_rows(k, s, keys);
    take_rows(v, s, values);
    take_rows(grad, s, grads);
    memset(to_keys, 0, (size_t)rows * 4);
    memset(to_values, 0, (size_t)rows * 4);
    double to_sink = 0;
    for (int64_t first = 0; first < s.length; first += QUERIES) {
        int64_t seen = first + QUERIES;
        alignas(64) float dot[QUERIES] = {}, log[QUERIES] = {};
        for (int64_t i = 0; i < QUERIES && first + i < s.length; i++) {
            const float* row = out + (first + i) * s.stride;
            for (int64_t d = 0; d < s.channels; d++) dot[i] += row[d] * grads[(first + i) * s.wide + d];
            log[i] = logsum[first + i];
            if (sink) to_sink -= std::exp(*sink - log[i]) * dot[i];
        }
        score(columns, keys, s, first, seen, shares);
        score(grad_columns, values, s, first, seen, slopes);
        for (int half = 0; half < QUERIES; half += LANES) {
            Floats sum = load(log + half), mean = load(dot + half);
            for (int64_t j = 0; j < seen; j++) {
                int64_t at = j * QUERIES + half;
                Floats p = exponential(load(shares + at) - sum);
                if (j > first) p = (Floats)((Ints)p & sees(first + half, j));
                store(shares + at, p);
                store(slopes + at, p * (load(slopes + at) - mean));
            }
        }
        mix(slopes, QUERIES, 1, keys, seen, QUERIES, s.wide, false, mixed);
        for (int64_t i = 0; i < QUERIES * s.wide; i++) mixed[i] *= scale;
        put_rows(mixed, s, first, QUERIES, grad_q);
        mix(slopes, 1, QUERIES, queries + first * s.wide, QUERIES, seen, s.wide, true, to_keys);
        mix(shares, 1, QUERIES, grads + first * s.wide, QUERIES, seen, s.wide, true, to_values);
    }
    put_rows(to_keys, s, 0, s.length, grad_k);
    put_rows(to_values, s, 0, s.length, grad_v);
    return (float)to_sink;
}

extern "C" {

// q, k, v, out: (batch, length, heads, channels); sink: (heads) or null; logsum: (batch, heads, length), the logarithm of
// the softmax's denominator.
void attention_forward(
    const float* q, const float* k, const float* v, const float* sink, int64_t batch, int64_t length, int64_t heads,
    int64_t channels, float scale, float* out, float* logsum, int64_t threads) {
    Shape s(length, heads, channels);
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        static thread_local Scratch scratch;
        float* memory = scratch.of<float>(s.padded * (s.channels + 2 * s.wide + QUERIES) + QUERIES * s.wide);
#pragma omp for schedule(dynamic, 1)
        for (int64_t job = 0; job < batch * heads; job++) {
            int64_t at = s.at(job);
            const float* logit = sink ? sink + job % heads : nullptr;
            head_forward(q + at, k + at, v + at, logit, s, scale, memory, out + at, logsum + job * length);
        }
    }
}

// The gradients; grad_sink: (batch, heads).
void attention_backward(
    const float* q, const float* k, const float* v, const float* sink, const float* out, const float* logsum,
    const float* grad, int64_t batch, int64_t length, int64_t heads, int64_t channels, float scale, float* grad_q,
    float* grad_k, float* grad_v, float* grad_sink, int64_t threads) {
    Shape s(length, heads, channels);
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        static thread_local Scratch scratch;
        float* memory =
            scratch.of<float>(s.padded * (2 * s.channels + 6 * s.wide + 2 * QUERIES) + QUERIES * s.wide);
#pragma omp for schedule(dynamic, 1)
        for (int64_t job = 0; job < batch * heads; job++) {
            int64_t at = s.at(job);
            const float* logit = sink ? sink + job % heads : nullptr;
            grad_sink[job] = head_backward(
                q + at, k + at, v + at, logit, out + at, logsum + job * length, grad + at, s, scale, memory,
                grad_q + at, grad_k + at, grad_v + at);
        }
    }
}
}
