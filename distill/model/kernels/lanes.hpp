// Vectors as wide as the machine's registers, written once for every instruction set (GCC and Clang extensions).
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef float LooseFloats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t LooseInts __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

static inline Floats load(const float* p) { return *(const LooseFloats*)p; }
static inline Ints load(const int32_t* p) { return *(const LooseInts*)p; }
static inline void store(float* p, Floats v) { *(LooseFloats*)p = v; }
static inline void store(int32_t* p, Ints v) { *(LooseInts*)p = v; }
static inline Floats splat(float v) { return v - Floats{}; }
static inline Ints splat(int32_t v) { return v - Ints{}; }

// A comparison gives all ones or all zeros per lane; this packs the lanes into bits, lane 0 lowest.
static inline uint64_t pack(Ints mask) {
#if LANES == 16
    return (uint64_t)_mm512_movepi32_mask((__m512i)mask);
#elif LANES == 8
    return (uint64_t)(uint32_t)_mm256_movemask_ps((__m256)mask);
#else
    return (uint64_t)((mask[0] & 1) | (mask[1] & 2) | (mask[2] & 4) | (mask[3] & 8));
#endif
}

// The inverse: all ones in the lanes whose bit is set.
static inline Ints unpack(uint64_t bits) {
    Ints power;
    for (int lane = 0; lane < LANES; lane++) power[lane] = 1 << lane;
    return (Ints)((splat((int32_t)bits) & power) != 0);
}

static const uint64_t LANE_BITS = ((uint64_t)1 << LANES) - 1;

// The lanes whose bits are set, zeros in the others.
static inline Floats kept(Floats v, uint64_t bits) {
#if LANES == 16
    return (Floats)_mm512_maskz_mov_ps((__mmask16)bits, (__m512)v);
#else
    return (Floats)((Ints)v & unpack(bits));
#endif
}

// The first n places, zeros behind them; and their inverse. n may be 0 and less, or more than there are lanes.
static inline Floats load_some(const float* p, int64_t n) {
    if (n >= LANES) return load(p);
    Floats v{};
    if (n > 0) memcpy(&v, p, (size_t)n * 4);
    return v;
}
static inline Floats load_padded(const float* p, int64_t n, float rest) {
    Floats v = splat(rest);
    memcpy(&v, p, (size_t)n * 4);
    return v;
}
static inline void store_some(float* p, Floats v, int64_t n) {
    if (n >= LANES)
        store(p, v);
    else if (n > 0)
        memcpy(p, &v, (size_t)n * 4);
}

// Writes the lanes whose bits are set one behind the other, and returns the place after them. All of LANES places may be
// written.
static inline float* squeeze(Floats v, uint64_t bits, float* to) {
#if LANES == 16
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps((__mmask16)bits, (__m512)v));
    return to + __builtin_popcountll(bits);
#else
    for (; bits; bits &= bits - 1) *to++ = v[__builtin_ctzll(bits)];
    return to;
#endif
}

// The inverse: values one behind the other into the lanes whose bits are set. LANES places may be read.
static inline Floats spread(const float* from, uint64_t bits) {
#if LANES == 16
    return (Floats)_mm512_maskz_expand_ps((__mmask16)bits, _mm512_loadu_ps(from));
#else
    Floats v{};
    for (; bits; bits &= bits - 1) v[__builtin_ctzll(bits)] = *from++;
    return v;
#endif
}

// The larger of each lane and the bound; NaN stays.
static inline Floats at_least(Floats v, float bound) {
#if LANES == 16
    return (Floats)_mm512_max_ps(_mm512_set1_ps(bound), (__m512)v);
#elif LANES == 8
    return (Floats)_mm256_max_ps(_mm256_set1_ps(bound), (__m256)v);
#else
    return v < bound ? splat(bound) : v;
#endif
}

// 1 / v, but for the last bit, for v of ordinary size.
static inline Floats reciprocal(Floats v) {
#if LANES == 16
    Floats guess = (Floats)_mm512_rcp14_ps((__m512)v);
    return guess * (2.0f - v * guess);
#else
    return 1.0f / v;
#endif
}

static inline int32_t sum(Ints v) {
#if LANES == 16
    return _mm512_reduce_add_epi32((__m512i)v);
#else
    int32_t total = 0;
    for (int lane = 0; lane < LANES; lane++) total += v[lane];
    return total;
#endif
}

static inline float sum(Floats v) {
#if LANES == 16
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += v[lane];
    return total;
#endif
}

// Interleaved lanes of two vectors: the lower halves, and the upper ones.
#if defined(__clang__)
#if LANES == 16
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif LANES == 8
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#endif
#else
#if LANES == 16
#define ZIP_LOW(a, b) __builtin_shuffle(a, b, (Ints){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23})
#define ZIP_HIGH(a, b) __builtin_shuffle(a, b, (Ints){8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31})
#elif LANES == 8
#define ZIP_LOW(a, b) __builtin_shuffle(a, b, (Ints){0, 8, 1, 9, 2, 10, 3, 11})
#define ZIP_HIGH(a, b) __builtin_shuffle(a, b, (Ints){4, 12, 5, 13, 6, 14, 7, 15})
#else
#define ZIP_LOW(a, b) __builtin_shuffle(a, b, (Ints){0, 4, 1, 5})
#define ZIP_HIGH(a, b) __builtin_shuffle(a, b, (Ints){2, 6, 3, 7})
#endif
#endif

// Transposes a square of LANES vectors. One round of interleaving vector i with vector i + LANES / 2 rotates the bits of
// an entry's place (vector, lane) by one; log2(LANES) rounds exchange the two.
static inline void transpose(Floats square[LANES]) {
    Floats next[LANES];
    for (int stride = LANES; stride > 1; stride /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = ZIP_LOW(square[i], square[i + LANES / 2]);
            next[2 * i + 1] = ZIP_HIGH(square[i], square[i + LANES / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) square[i] = next[i];
    }
}

// x (tokens, width) with rows `stride` apart -> out (width, span) with rows `apart` apart; tokens beyond the last are zero.
static inline void gather(
    const float* x, int64_t stride, int64_t width, int64_t tokens, int64_t span, int64_t apart, float* out) {
    for (int64_t t = 0; t < span; t += LANES) {
        int64_t there = tokens - t < LANES ? tokens - t : LANES;
        for (int64_t c = 0; c < width; c += LANES) {
            Floats square[LANES];
            for (int i = 0; i < LANES; i++) square[i] = i < there ? load_some(x + (t + i) * stride + c, width - c) : Floats{};
            transpose(square);
            for (int i = 0; i < LANES && c + i < width; i++) store(out + (c + i) * apart + t, square[i]);
        }
    }
}

static inline void gather(const float* x, int64_t stride, int64_t width, int64_t tokens, int64_t span, float* out) {
    gather(x, stride, width, tokens, span, span, out);
}

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory that a thread keeps from call to call, aligned to cache lines: fresh memory costs a page fault per 4 KB.
class Scratch {
  public:
    template <typename T>
    T* of(int64_t count) {
        size_t bytes = (size_t)round_up(count * (int64_t)sizeof(T) + 64, 64);
        if (bytes > held_) {
            free(at_);
            at_ = aligned_alloc(64, bytes);
            if (at_ == nullptr) abort();
            held_ = bytes;
        }
        return (T*)at_;
    }
    ~Scratch() { free(at_); }

  private:
    void* at_ = nullptr;
    size_t held_ = 0;
};
