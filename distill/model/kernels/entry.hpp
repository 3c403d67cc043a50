// An entry of a sparse matrix. Those of a row (or column) lie one behind the other, start[r] to start[r + 1].
#pragma once
#include <cstdint>

struct Entry {
    int32_t at;  // column (by rows) or row (by columns)
    float value;
};
