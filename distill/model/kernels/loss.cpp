// Cross-entropy, with its gradient made on the way there.
#include <cmath>

#include "functions.hpp"

extern "C" {

// losses (rows): -log softmax(logits)[target] in nats, 0 where the target is negative. With `grad` (rows, width): the
// gradient of the sum of the losses times `share`.
void loss_forward(
    const float* logits, const int64_t* targets, int64_t rows, int64_t width, float share, float* losses, float* grad,
    int64_t threads) {
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        static thread_local Scratch scratch;
        float* spare = scratch.of<float>(round_up(width, LANES));
#pragma omp for schedule(dynamic, 32)
        for (int64_t row = 0; row < rows; row++) {
            const float* in = logits + row * width;
            float* out = grad ? grad + row * width : spare;
            losses[row] = 0;
            if (targets[row] < 0) {
                if (grad) memset(out, 0, (size_t)width * 4);
                continue;
            }
            Floats largest = splat(-INFINITY);
            for (int64_t j = 0; j < width; j += LANES) {
                Floats v = width - j >= LANES ? load(in + j) : load_padded(in + j, width - j, -INFINITY);
                largest = v > largest ? v : largest;
            }
            float most = -INFINITY;
            for (int lane = 0; lane < LANES; lane++) most = largest[lane] > most ? largest[lane] : most;
            Floats total{};
            for (int64_t j = 0; j < width; j += LANES) {
                Floats v = width - j >= LANES ? load(in + j) : load_padded(in + j, width - j, -INFINITY);
                v = exponential(v - most);
                total += v;
                store_some(out + j, v, width - j);
            }
            float sums = sum(total);
            losses[row] = most + std::log(sums) - in[targets[row]];
            if (!grad) continue;
            for (int64_t j = 0; j < width; j += LANES)
                store_some(out + j, load_some(out + j, width - j) * (share / sums), width - j);
            out[targets[row]] -= share;
        }
    }
}
}
