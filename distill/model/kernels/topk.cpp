// AbsTopK, perhaps behind a non-linearity, of whole tensors.
#include "row.hpp"

extern "C" {

// x, out: (rows, width), may be the same; mask: (rows, words) or null without AbsTopK or where nobody asks; slope: (rows,
// slope_stride) or null. keep is `width` at most.
void topk_forward(
    const float* x, int64_t rows, int64_t width, int64_t keep, int64_t activation, float cut, float crowd,
    uint64_t* mask, float* slope, float* out, int64_t threads) {
    Finish f = {width, keep, activation, cut, crowd};
    int64_t words = f.words(), stride = slope_stride(keep);
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        static thread_local Scratch scratch;
        int32_t* memory = scratch.of<int32_t>(f.memory() + 2 * words);
        uint64_t* unread = (uint64_t*)(memory + f.memory());
#pragma omp for schedule(dynamic, 32)
        for (int64_t row = 0; row < rows; row++)
            finish(
                f, x + row * width, memory, mask ? mask + row * words : unread, slope ? slope + row * stride : nullptr,
                out + row * width);
    }
}

// out = grad where the mask is set (everywhere without one), times the slopes where there are such; `out` may be `grad`.
void topk_backward(
    const float* grad, const uint64_t* mask, const float* slope, int64_t keep, int64_t rows, int64_t width, float* out,
    int64_t threads) {
    int64_t words = (width + WORD - 1) / WORD;
#pragma omp parallel for schedule(dynamic, 32) num_threads((int)threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const uint64_t* marks = mask ? mask + row * words : nullptr;
        const float* next = slope ? slope + row * slope_stride(keep) : nullptr;
        for (int64_t j = 0; j < width; j += LANES) {
            int64_t at = row * width + j, left = width - j;
            store_some(out + at, passed(load_some(grad + at, left), marks, j, &next), left);
        }
    }
}
}
