// The entries of a matrix that are not zero, row by row and column by column.
#include "entry.hpp"
#include "lanes.hpp"

extern "C" {

// Entries per row of the dense weight, summed up: start[r] to start[r + 1] are those of row r.
void pattern_count(const float* weight, int64_t rows, int64_t columns, int32_t* start, int64_t threads) {
    start[0] = 0;
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        const float* row = weight + r * columns;
        Ints zeros{};
        int64_t c = 0;
        for (; c + LANES <= columns; c += LANES) zeros -= (Ints)(load(row + c) == Floats{});
        int32_t count = (int32_t)c - sum(zeros);
        for (; c < columns; c++) count += row[c] != 0.0f;
        start[r + 1] = count;
    }
    for (int64_t r = 0; r < rows; r++) start[r + 1] += start[r];
}

// Both orders of the entries; `start` from above. `column_start` has columns + 1 places, `place` columns * slabs.
void pattern_fill(
    const float* weight, int64_t rows, int64_t columns, const int32_t* start, Entry* by_row, int32_t* column_start,
    Entry* by_column, int32_t* place, int64_t slabs, int64_t threads) {
    memset(place, 0, (size_t)(slabs * columns) * 4);
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (int64_t slab = 0; slab < slabs; slab++) {
        int32_t* counts = place + slab * columns;
        for (int64_t r = rows * slab / slabs; r < rows * (slab + 1) / slabs; r++) {
            const float* row = weight + r * columns;
            Entry* to = by_row + start[r];
            int64_t c = 0;
            for (; c + LANES <= columns; c += LANES)
                for (uint64_t rest = pack((Ints)(load(row + c) != Floats{})); rest; rest &= rest - 1) {
                    int64_t at = c + __builtin_ctzll(rest);
                    *to++ = {(int32_t)at, row[at]};
                    counts[at]++;
                }
            for (; c < columns; c++)
                if (row[c] != 0.0f) {
                    *to++ = {(int32_t)c, row[c]};
                    counts[c]++;
                }
        }
    }
    int32_t next = 0;
    for (int64_t c = 0; c < columns; c++) {
        column_start[c] = next;
        for (int64_t slab = 0; slab < slabs; slab++) {
            int32_t count = place[slab * columns + c];
            place[slab * columns + c] = next;
            next += count;
        }
    }
    column_start[columns] = next;
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (int64_t slab = 0; slab < slabs; slab++) {
        int32_t* to = place + slab * columns;
        for (int64_t r = rows * slab / slabs; r < rows * (slab + 1) / slabs; r++)
            for (int32_t e = start[r]; e < start[r + 1]; e++)
                by_column[to[by_row[e].at]++] = {(int32_t)r, by_row[e].value};
    }
}
}
