// RMSNorm or LayerNorm with its gain, and AbsTopK of what comes out.
#include <cmath>

#include "row.hpp"

static const int64_t CHUNK = 64;  // rows whose gradients of gain and bias are summed before they are added to others'

// Of a row of x: what is subtracted (the mean, where the norm centres), and 1 / sigma.
static inline void moments(const float* x, int64_t width, bool center, float eps, float* shift, float* scale) {
    Floats total{}, squares{};
    if (center)
        for (int64_t j = 0; j < width; j += LANES) total += load_some(x + j, width - j);
    *shift = sum(total) / (float)width;
    for (int64_t j = 0; j < width; j += LANES) {
        Floats v = load_some(x + j, width - j) - *shift;
        if (width - j < LANES) v = kept(v, ((uint64_t)1 << (width - j)) - 1);
        squares += v * v;
    }
    *scale = 1.0f / std::sqrt(sum(squares) / (float)width + eps);
}

extern "C" {

// x, out: (rows, width); gain, bias: (width), bias null without one; shift, scale: (rows), both written; mask: (rows,
// words) or null.
void norm_forward(
    const float* x, const float* gain, const float* bias, int64_t rows, int64_t width, int64_t center, float eps,
    int64_t keep, float cut, float crowd, float* shift, float* scale, uint64_t* mask, float* out, int64_t threads) {
    Finish f = {width, keep, IDENTITY, cut, crowd};
    int64_t words = f.words();
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        static thread_local Scratch scratch;
        int32_t* memory = scratch.of<int32_t>(f.memory() + 2 * words);
        uint64_t* unread = (uint64_t*)(memory + f.memory());
#pragma omp for schedule(dynamic, 32)
        for (int64_t row = 0; row < rows; row++) {
            const float* in = x + row * width;
            float* to = out + row * width;
            moments(in, width, center, eps, shift + row, scale + row);
            for (int64_t j = 0; j < width; j += LANES) {
                int64_t left = width - j;
                Floats v = (load_some(in + j, left) - shift[row]) * scale[row] * load_some(gain + j, left);
                if (bias) v += load_some(bias + j, left);
                store_some(to + j, v, left);
            }
            if (f.selects()) finish_row<IDENTITY>(f, to, memory, mask ? mask + row * words : unread, nullptr, to);
        }
    }
}

// grad, x, grad_x: (rows, width); grad_gain, grad_bias: (chunks of CHUNK rows, width), null where not wanted; mask null
// without AbsTopK.
void norm_backward(
    const float* grad, const float* x, const float* gain, const float* shift, const float* scale, const uint64_t* mask,
    int64_t rows, int64_t width, int64_t center, float* grad_x, float* grad_gain, float* grad_bias, int64_t threads) {
    int64_t words = (width + WORD - 1) / WORD;
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)threads) if (threads > 1)
    for (int64_t first = 0; first < rows; first += CHUNK) {
        float* to_gain = grad_gain ? grad_gain + first / CHUNK * width : nullptr;
        float* to_bias = grad_bias ? grad_bias + first / CHUNK * width : nullptr;
        if (to_gain) memset(to_gain, 0, (size_t)width * 4);
        if (to_bias) memset(to_bias, 0, (size_t)width * 4);
        for (int64_t row = first; row < rows && row < first + CHUNK; row++) {
            const float *in = x + row * width, *from = grad + row * width;
            const uint64_t* marks = mask ? mask + row * words : nullptr;
            float* to = grad_x + row * width;
            Floats along{}, total{};
            for (int64_t j = 0; j < width; j += LANES) {
                int64_t left = width - j;
                Floats g = load_some(from + j, left);
                if (marks) g = kept(g, part_of(marks, j));
                Floats unit = (load_some(in + j, left) - shift[row]) * scale[row];
                if (to_gain) store_some(to_gain + j, load_some(to_gain + j, left) + g * unit, left);
                if (to_bias) store_some(to_bias + j, load_some(to_bias + j, left) + g, left);
                g *= load_some(gain + j, left);
                along += g * unit;
                total += g;
                store_some(to + j, g, left);
            }
            float slope = sum(along) / (float)width * scale[row], mean = center ? sum(total) / (float)width : 0.0f;
            for (int64_t j = 0; j < width; j += LANES) {
                int64_t left = width - j;
                Floats g = load_some(to + j, left) - mean - (load_some(in + j, left) - shift[row]) * slope;
                store_some(to + j, g * scale[row], left);
            }
        }
    }
}
}
