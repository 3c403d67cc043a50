// AbsTopK: of each row the k entries of largest magnitude, ties by the lowest index, zeros never.
#include "search.hpp"

static const int WORD = 64;  // entries per word of the mask

// Of the entries equal to the bound only the first `room` stay in the mask.
static void drop_surplus(const int32_t* sizes, int64_t words, int32_t bound, int32_t room, uint64_t* mask) {
    for (int64_t w = 0; w < words; w++) {
        for (uint64_t rest = mask[w]; rest; rest &= rest - 1) {
            int bit = __builtin_ctzll(rest);
            if (sizes[w * WORD + bit] == bound && room-- <= 0) mask[w] &= ~((uint64_t)1 << bit);
        }
    }
}

static void apply(const float* in, const uint64_t* mask, int64_t width, float* out) {
    int64_t j = 0;
    for (; j + LANES <= width; j += LANES) {
        Ints keep = unpack(mask[j / WORD] >> (j % WORD));
        store(out + j, (Floats)((Ints)load(in + j) & keep));
    }
    for (; j < width; j++) out[j] = mask[j / WORD] >> (j % WORD) & 1 ? in[j] : 0.0f;
}

// `z` and `density` belong to a normal row of unit variance: where its k-th largest magnitude is to be expected, and how
// many of `width` entries lie there per unit.
static void row_forward(
    const float* in, int64_t width, int32_t k, float z, float density, int32_t* sizes, uint64_t* mask, float* out) {
    int64_t words = (width + WORD - 1) / WORD, padded = words * WORD, j = 0;
    Ints largest{};
    Floats squares{};
    for (; j + LANES <= width; j += LANES) {
        Floats v = load(in + j);
        Ints size = (Ints)v & MAGNITUDE;
        largest = size > largest ? size : largest;
        squares += v * v;
        store(sizes + j, size);
    }
    float square = sum(squares);
    int32_t most = 0;
    for (int lane = 0; lane < LANES; lane++) most = largest[lane] > most ? largest[lane] : most;
    for (; j < padded; j++) {
        sizes[j] = j < width ? (int32_t)as_bits(in[j]) & MAGNITUDE : 0;
        most = sizes[j] > most ? sizes[j] : most;
        square += j < width ? in[j] * in[j] : 0.0f;
    }
    float rms = __builtin_sqrtf(square / (float)width);
    int32_t filled = count_from(sizes, padded, 1);
    Cut cut = {1, 0, false};
    if (filled > k) cut = search(sizes, padded, k, {1, filled, (int64_t)most + 1, 0}, z * rms, rms / density);
    Ints limit = splat(cut.bound);
    for (int64_t w = 0; w < words; w++) {
        uint64_t word = 0;
        for (int part = 0; part < WORD; part += LANES)
            word |= pack((Ints)(load(sizes + w * WORD + part) >= limit)) << part;
        mask[w] = word;
    }
    if (cut.tied) drop_surplus(sizes, words, cut.bound, k - cut.above, mask);
    apply(in, mask, width, out);
}

extern "C" {

// x, out: (rows, width); mask: (rows, ceil(width / 64)) words.
void topk_forward(
    const float* x, int64_t rows, int64_t width, int64_t k, float z, float density, uint64_t* mask, float* out,
    int64_t threads) {
    int64_t words = (width + WORD - 1) / WORD;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        static thread_local Scratch scratch;
        int32_t* sizes = scratch.of<int32_t>(words * WORD);
#pragma omp for schedule(dynamic, 32)
        for (int64_t row = 0; row < rows; row++)
            row_forward(x + row * width, width, (int32_t)k, z, density, sizes, mask + row * words, out + row * width);
    }
}

void topk_backward(const float* grad, const uint64_t* mask, int64_t rows, int64_t width, float* out, int64_t threads) {
    int64_t words = (width + WORD - 1) / WORD;
#pragma omp parallel for schedule(dynamic, 32) num_threads((int)threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) apply(grad + row * width, mask + row * words, width, out + row * width);
}
}
