// Rows of a table by number, on the way there and back.
#include "lanes.hpp"

static const int64_t SLAB = 64;  // rows of a table that one job sums up

extern "C" {

// x (count, width) += the rows of the table that `ids` name.
void embedding_add(const float* table, const int64_t* ids, int64_t count, int64_t width, float* x, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (int64_t i = 0; i < count; i++) {
        const float* from = table + ids[i] * width;
        float* to = x + i * width;
        for (int64_t j = 0; j < width; j += LANES)
            store_some(to + j, load_some(to + j, width - j) + load_some(from + j, width - j), width - j);
    }
}

// out (rows, width) = for each row of the table the sum of the gradients (count, width) where `ids` name it, in order.
void embedding_sum(
    const float* grad, const int64_t* ids, int64_t count, int64_t rows, int64_t width, float* out, int64_t threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)threads) if (threads > 1)
    for (int64_t first = 0; first < rows; first += SLAB) {
        int64_t last = first + SLAB < rows ? first + SLAB : rows;
        memset(out + first * width, 0, (size_t)((last - first) * width) * 4);
        for (int64_t i = 0; i < count; i++) {
            if (ids[i] < first || ids[i] >= last) continue;
            const float* from = grad + i * width;
            float* to = out + ids[i] * width;
            for (int64_t j = 0; j < width; j += LANES)
                store_some(to + j, load_some(to + j, width - j) + load_some(from + j, width - j), width - j);
        }
    }
}
}
