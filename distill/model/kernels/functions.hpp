// Non-linear functions of vectors, to a few units in the last place.
#pragma once
#include "lanes.hpp"

// The sum of coefficients times falling powers of x.
template <int COUNT>
static inline Floats polynomial(Floats x, const float (&coefficients)[COUNT]) {
    Floats sum = splat(coefficients[0]);
#pragma GCC unroll 16
    for (int i = 1; i < COUNT; i++) sum = sum * x + coefficients[i];
    return sum;
}

// e^x for x up to 88, with a relative error of 2e-7; below -87 as at -87; NaN stays.
static inline Floats exponential(Floats x) {
    const float magic = 12582912.0f;  // added, it rounds to an integer in the lowest bits
    x = at_least(x, -87.0f);
    Floats shifted = x * 1.44269504f + magic;
    Floats whole = shifted - magic;
    Floats rest = x - whole * 0.693359375f;
    rest = rest + whole * 2.12194440e-4f;
    Ints power = ((Ints)shifted << 23) + 0x3f800000;
    return polynomial(rest, {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) * (Floats)power;
}

static inline Floats magnitude(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

// What the caller may ask for; the numbers are those of ACTIVATIONS in topk.py.
enum Activation { IDENTITY, GELU, GELU_NEW, RELU };

// A function with its derivative, of which the compiler drops what is not used.
struct Point {
    Floats value, slope;
};

// x times the normal distribution's share below x. The share beyond |x| is e^(-x^2 / 2) times a polynomial in
// 1 / (1 + c |x|), fitted to a relative error of 5e-8.
static inline Point gelu(Floats x) {
    Floats t = reciprocal(magnitude(x) * 0.35355339f + 1.0f), bell = exponential(x * x * -0.5f);
    Floats beyond = polynomial(
        t, {-0.058891278f, 0.28370434f, -0.4853884f, 0.27598327f, -0.025181001f, 0.20207115f, 0.2432607f, 0.28235352f,
            0.28208768f});
    beyond *= 0.5f * t * bell;
    Floats below = x > 0.0f ? 1.0f - beyond : beyond;
    return {x * below, below + x * bell * 0.398942280f};
}

// Its tanh form: x / (1 + e^(-u)), u = 2 sqrt(2 / pi) (x + 0.044715 x^3).
static inline Point gelu_new(Floats x) {
    Floats square = x * x;
    Floats small = exponential(magnitude(x) * (square * -0.0713548162726f - 1.59576912161f));
    Floats large = reciprocal(small + 1.0f), share = x > 0.0f ? large : small * large;
    Floats rise = square * (3 * 0.0713548162726f) + 1.59576912161f;
    return {x * share, share + x * rise * (small * large * large)};
}

template <int ACTIVATION>
static inline Point activate(Floats x) {
    if (ACTIVATION == GELU) return gelu(x);
    if (ACTIVATION == GELU_NEW) return gelu_new(x);
    if (ACTIVATION == RELU) return {x < 0.0f ? Floats{} : x, (Floats)((Ints)(x > 0.0f) & (Ints)splat(1.0f))};
    return {x, splat(1.0f)};
}
