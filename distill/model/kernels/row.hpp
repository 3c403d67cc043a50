// One row of activations: a non-linearity, and AbsTopK: the entries of largest magnitude, ties by the lowest index, zeros
// never.
#pragma once
#include "functions.hpp"
#include "search.hpp"

static const int WORD = 64;  // entries per word of a mask

// Places from one row of slopes to the next: a whole vector may be read at its end, and powers of two fall together in the
// cache. As `record_of` in topk.py has it.
static inline int64_t slope_stride(int64_t keep) { return keep + 16; }

// What is done with the rows of a tensor.
struct Finish {
    int64_t width;       // entries in a row
    int64_t keep;        // how many of them AbsTopK keeps; from `width` on there is none, and no mask
    int64_t activation;  // see functions.hpp
    // For a normal row of unit variance: where its keep-th largest magnitude is to be expected, and how many entries lie
    // there per unit.
    float cut, crowd;
    bool selects() const { return keep < width; }
    int64_t words() const { return (width + WORD - 1) / WORD; }
    int64_t memory() const { return 3 * (words() * WORD + COUNTED); }  // places of scratch for one row
};

// Of the entries equal to the bound only the first `room` stay in the mask.
static inline void drop_surplus(const int32_t* sizes, int64_t words, int32_t bound, int32_t room, uint64_t* mask) {
    for (int64_t w = 0; w < words; w++)
        for (uint64_t rest = mask[w]; rest; rest &= rest - 1) {
            int bit = __builtin_ctzll(rest);
            if (sizes[w * WORD + bit] == bound && room-- <= 0) mask[w] &= ~((uint64_t)1 << bit);
        }
}

static inline uint64_t part_of(const uint64_t* mask, int64_t j) { return mask[j / WORD] >> (j % WORD); }

// The entries whose bits are set, zeros elsewhere; `in` may be `out`.
static inline void keep_marked(const float* in, const uint64_t* mask, int64_t width, float* out) {
    for (int64_t j = 0; j < width; j += LANES)
        store_some(out + j, kept(load_some(in + j, width - j), part_of(mask, j)), width - j);
}

// What passes back through a row's selection and slopes, LANES entries from j on. `mask` and `*slope` may be null; the
// latter moves on.
static inline Floats passed(Floats grad, const uint64_t* mask, int64_t j, const float** slope) {
    uint64_t bits = mask ? part_of(mask, j) & LANE_BITS : LANE_BITS;
    if (*slope) {
        grad *= spread(*slope, bits);
        *slope += __builtin_popcountll(bits);
    }
    return mask ? kept(grad, bits) : grad;
}

// Which entries AbsTopK keeps. `square` is the sum of the squares, `most` the largest magnitude, `filled` the number of
// those that are not zero, `sizes` the magnitudes as integers, zeros behind the last.
static inline void choose(
    const Finish& f, const int32_t* sizes, float square, int32_t most, int32_t filled, int32_t* room, uint64_t* mask) {
    int64_t words = f.words(), padded = words * WORD;
    int32_t keep = (int32_t)f.keep;
    Cut cut = {1, 0, false};
    if (filled > keep) {
        float rms = __builtin_sqrtf(square / (float)f.width);
        cut = search(sizes, padded, keep, {1, filled, (int64_t)most + 1, 0}, f.cut * rms, rms / f.crowd, room);
    }
    Ints limit = splat(cut.bound);
    for (int64_t w = 0; w < words; w++) {
        uint64_t word = 0;
        for (int part = 0; part < WORD; part += LANES)
            word |= pack((Ints)(load(sizes + w * WORD + part) >= limit)) << part;
        mask[w] = word;
    }
    if (cut.tied) drop_surplus(sizes, words, cut.bound, keep - cut.above, mask);
}

// Derivatives of the activation at the marked entries, closed up.
template <int ACTIVATION>
static inline void slopes(const float* in, const uint64_t* mask, int64_t width, float* closed, float* slope) {
    float* next = closed;
    for (int64_t j = 0; j < width; j += LANES) {
        uint64_t bits = part_of(mask, j) & LANE_BITS;
        next = squeeze(load_some(in + j, width - j), bits, next);
    }
    int64_t count = next - closed;
    for (int64_t e = 0; e < count; e += LANES)
        store_some(slope + e, activate<ACTIVATION>(load(closed + e)).slope, count - e);
}

// One row, `in` may be `out`. Where something is selected: its bits in `mask` (words). Where `slope` is given: the
// activation's derivatives at what is kept, closed up, of `keep` places.
template <int ACTIVATION>
static inline void finish_row(
    const Finish& f, const float* in, int32_t* memory, uint64_t* mask, float* slope, float* out) {
    int64_t width = f.width, padded = f.words() * WORD;
    if (!f.selects()) {
        for (int64_t j = 0; j < width; j += LANES) {
            Point p = activate<ACTIVATION>(load_some(in + j, width - j));
            if (slope) store_some(slope + j, p.slope, width - j);
            store_some(out + j, p.value, width - j);
        }
        return;
    }
    int32_t *sizes = memory, *room = sizes + padded + COUNTED;
    float* values = (float*)(room + padded + COUNTED);
    Ints largest{}, filled{};
    Floats squares{};
    for (int64_t j = 0; j < padded; j += LANES) {
        Floats v = activate<ACTIVATION>(load_some(in + j, width - j)).value;
        Ints size = (Ints)v & MAGNITUDE;
        largest = size > largest ? size : largest;
        filled -= (Ints)(size > 0);
        squares += v * v;
        store(sizes + j, size);
        if (ACTIVATION != IDENTITY) store(values + j, v);
    }
    int32_t most = 0;
    for (int lane = 0; lane < LANES; lane++) most = largest[lane] > most ? largest[lane] : most;
    choose(f, sizes, sum(squares), most, sum(filled), room, mask);
    if (slope) slopes<ACTIVATION>(in, mask, width, (float*)room, slope);
    keep_marked(ACTIVATION == IDENTITY ? in : values, mask, width, out);
}

static inline void finish(
    const Finish& f, const float* in, int32_t* memory, uint64_t* mask, float* slope, float* out) {
    switch (f.activation) {
        case GELU: return finish_row<GELU>(f, in, memory, mask, slope, out);
        case GELU_NEW: return finish_row<GELU_NEW>(f, in, memory, mask, slope, out);
        case RELU: return finish_row<RELU>(f, in, memory, mask, slope, out);
        default: return finish_row<IDENTITY>(f, in, memory, mask, slope, out);
    }
}
