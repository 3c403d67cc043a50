// AdamW and the exact L0 projection of a sparse weight in one pass over the gradient and the moments.
//
// The weight is zero nearly everywhere, and after the step it shall be so again. So the pass writes the moments only, and
// collects the candidates: the entries that are not zero yet, and those whose new value reaches a bound a little below
// the last step's cut. The cut is found among them. Where too few reached the bound, it is lowered and the candidates are
// collected again, this time without touching the moments: what is chosen does not depend on the bound. An entry that
// is no candidate was zero and stays zero, so the weight is written at the candidates alone.
#include "cut.hpp"

#include <algorithm>
#include <numeric>
#include <vector>

namespace {

static const int64_t CHUNK = 1 << 14;     // entries per piece of a pass
static const int64_t ROOM = CHUNK + 64;   // for the candidates of a piece
static const uint16_t PLACE = CHUNK - 1;  // the bits of a candidate: its place in the piece,
static const uint16_t STAYS = CHUNK;      // it stays although it does not reach the limit,
static const uint16_t THERE = 2 * CHUNK;  // it was not zero before the step
static const int32_t LEAST = 1;           // the smallest magnitude that is not zero, as its bits
static const float REACH = 1.25f;         // candidates so far above the bound are only counted, as a rule
static const float UNIT_SLACK = 0.75f;    // a unit's next bound as a share of its last entry that stays

// What a step is made with.
struct Step {
    float scale;   // of the gradient
    float first;   // 1 - beta1
    float second;  // 1 - beta2
    float decay;   // rate * weight decay
    float rate;    // rate / (1 - beta1^t)
    float root;    // 1 / sqrt(1 - beta2^t)
    float eps;
};

static inline Floats square_root(Floats v) {
#if LANES == 16
    return (Floats)_mm512_sqrt_ps((__m512)v);
#elif LANES == 8
    return (Floats)_mm256_sqrt_ps((__m256)v);
#else
    for (int lane = 0; lane < LANES; lane++) v[lane] = __builtin_sqrtf(v[lane]);
    return v;
#endif
}

// Each sum below has one product that it may be fused with: a compiler that fuses has no choice, so the same step has the
// same bits wherever it is compiled in, and a value that is computed again has those of the first time.
static inline void move_moments(const Step& s, Floats g, Floats& m, Floats& v) {
    g = g * s.scale;
    m = m + s.first * (g - m);
    v = v + s.second * (g * g - v);
}

static inline Floats moved(const Step& s, Floats w, Floats m, Floats v) {
    Floats bottom = square_root(v) * s.root + s.eps;
    return (w - s.decay * w) - s.rate * (m / bottom);
}

// A weight (rows, columns) and what becomes of it.
struct Job {
    Step step;
    float* w;
    const float* g;
    float* m;
    float* v;
    int64_t rows, columns;
    int64_t count;  // entries that stay
    int64_t floor;  // and at least so many in each unit
    int64_t axis;   // units are rows (0) or columns (1); without a floor this is not asked for
    float* bound;   // of all candidates, then of each unit's where there is a floor; never above the first
    uint16_t* at;   // candidates of a piece: places in it,
    float* value;   // new values,
    int64_t* found; // and how many
    int64_t threads;

    int64_t size() const { return rows * columns; }
    int64_t pieces() const { return (size() + CHUNK - 1) / CHUNK; }
    int64_t units() const { return floor ? (axis == 0 ? rows : columns) : 0; }
};

// Candidates among the entries of one stretch; `bound` is the same for all, or PER_COLUMN each has its own.
template <bool UPDATE, bool PER_COLUMN>
struct Collector {
    const Step& step;
    uint16_t* at;
    float* value;
    int64_t found = 0;

    void vector(const float* w, const float* g, float* m, float* v, const float* bound, int64_t place, uint64_t lanes) {
        Floats old = load(w), first = load(m), second = load(v);
        if (UPDATE) {
            move_moments(step, load(g), first, second);
            store(m, first);
            store(v, second);
        }
        Floats fresh = moved(step, old, first, second);
        Ints limit = PER_COLUMN ? (Ints)load(bound) : splat((int32_t)as_bits(*bound));
        Ints reaches = (Ints)(((Ints)fresh & MAGNITUDE) >= limit), there = (Ints)(((Ints)old & MAGNITUDE) != 0);
        uint64_t bits = pack(reaches | there) & lanes;
#if LANES == 16
        // Written in any case: a branch would be guessed wrong too often.
        __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        places = _mm512_add_epi32(places, _mm512_set1_epi32((int)place)) + (__m512i)(there & (int32_t)THERE);
        places = _mm512_maskz_compress_epi32((__mmask16)bits, places);
        _mm256_storeu_si256((__m256i*)(at + found), _mm512_cvtepi32_epi16(places));
        _mm512_storeu_ps(value + found, _mm512_maskz_compress_ps((__mmask16)bits, (__m512)fresh));
        found += __builtin_popcountll(bits);
#else
        for (; bits; bits &= bits - 1) {
            int64_t lane = __builtin_ctzll(bits);
            at[found] = (uint16_t)(place + lane + (there[lane] & THERE));
            value[found++] = fresh[lane];
        }
#endif
    }

    void stretch(const float* w, const float* g, float* m, float* v, const float* bound, int64_t place, int64_t count) {
        const int64_t across = PER_COLUMN ? 1 : 0;
        int64_t j = 0;
        for (; j + LANES <= count; j += LANES) vector(w + j, g + j, m + j, v + j, bound + across * j, place + j, ~0ull);
        if (j == count) return;
        // The rest by way of a whole vector.
        float rest[5][LANES] = {};
        size_t bytes = (size_t)(count - j) * 4;
        memcpy(rest[0], w + j, bytes);
        if (UPDATE) memcpy(rest[1], g + j, bytes);
        memcpy(rest[2], m + j, bytes);
        memcpy(rest[3], v + j, bytes);
        memcpy(rest[4], bound + across * j, PER_COLUMN ? bytes : 4);
        vector(rest[0], rest[1], rest[2], rest[3], rest[4], place + j, (1ull << (count - j)) - 1);
        if (UPDATE) memcpy(m + j, rest[2], bytes);
        if (UPDATE) memcpy(v + j, rest[3], bytes);
    }
};

template <bool UPDATE, bool PER_COLUMN>
static void collect(const Job& job) {
    // Without units of their own bounds a piece is one stretch, whatever the rows.
    const int64_t columns = job.units() ? job.columns : job.size();
#pragma omp parallel for schedule(dynamic, 4) num_threads((int)job.threads) if (job.threads > 1)
    for (int64_t p = 0; p < job.pieces(); p++) {
        Collector<UPDATE, PER_COLUMN> to = {job.step, job.at + p * ROOM, job.value + p * ROOM};
        int64_t end = std::min(job.size(), (p + 1) * CHUNK);
        for (int64_t from = p * CHUNK, next; from < end; from = next) {
            int64_t row = from / columns;
            next = std::min(end, (row + 1) * columns);
            const float* bound = job.bound;
            if (job.units()) bound += 1 + (PER_COLUMN ? from - row * columns : row);
            to.stretch(job.w + from, job.g + from, job.m + from, job.v + from, bound, from - p * CHUNK, next - from);
        }
        job.found[p] = to.found;
    }
}

template <bool UPDATE>
static void collect(const Job& job) {
    if (job.units() && job.axis == 1)
        collect<UPDATE, true>(job);
    else
        collect<UPDATE, false>(job);
}

// Calls act(index, bits, value) for each candidate, in order.
template <typename Act>
static inline void each(const Job& job, Act act) {
    for (int64_t p = 0; p < job.pieces(); p++) {
        uint16_t* at = job.at + p * ROOM;
        const float* value = job.value + p * ROOM;
        for (int64_t i = 0; i < job.found[p]; i++) act(p * CHUNK + (at[i] & PLACE), at[i], value[i]);
    }
}

// The row of an index that only grows.
struct Rows {
    int64_t columns, row = 0, end = columns;

    int64_t of(int64_t index) {
        if (index >= end) {
            row = index / columns;
            end = (row + 1) * columns;
        }
        return row;
    }
};

static inline int32_t magnitude(float value) { return (int32_t)as_bits(value) & MAGNITUDE; }

static inline float at_least(float bound) { return magnitude(bound) < LEAST ? as_float(LEAST) : bound; }

// What a bound that was too high is tried with next.
static inline float lower(float bound, int pass) {
    return at_least(pass == 0 ? 0.7f * bound : pass == 1 ? 0.25f * bound : 0.0f);
}

// The bits from which on a candidate stays, besides those that are marked so; false where the bound was too high to tell.
static bool find_limit(const Job& job, int32_t* limit) {
    static thread_local Scratch scratch;
    int64_t low = magnitude(job.bound[0]), high = magnitude(job.bound[0] * REACH), above, total;
    int32_t* sizes = scratch.of<int32_t>(std::accumulate(job.found, job.found + job.pieces(), (int64_t)COUNTED));
    for (;;) {
        above = total = 0;
        for (int64_t p = 0; p < job.pieces(); p++)
            total += between(job.value + p * ROOM, job.found[p], low, high, sizes + total, &above);
        if (above < job.count || job.count == 0) break;
        low = high;
        high = (int64_t)MAGNITUDE + 1;
    }
    *limit = job.count == 0 ? MAGNITUDE : LEAST;
    if (job.count == 0) return true;
    if (above + total < job.count) return low <= LEAST;
    Threshold cut = cut_among(sizes, total, job.count - above, low, high);
    *limit = cut.bits;
    if (cut.stay == cut.equal) return true;
    ++*limit;
    each(job, [&](int64_t, uint16_t& bits, float value) {
        if (magnitude(value) == cut.bits && cut.stay-- > 0) bits |= STAYS;
    });
    return true;
}

// The largest of the units that the limit leaves with fewer than the floor.
class Floors {
  public:
    explicit Floors(const Job& job) : job_(job), slot_((size_t)job.units()) {}

    // False where some unit's own bound was too high to tell; it is lower then.
    bool find(int32_t limit, int pass) {
        Rows rows = {job_.columns};
        auto unit = [&](int64_t index) {
            int64_t row = rows.of(index);
            return (size_t)(job_.axis == 0 ? row : index - row * job_.columns);
        };
        std::fill(slot_.begin(), slot_.end(), 0);
        each(job_, [&](int64_t index, uint16_t& bits, float value) {
            slot_[unit(index)] += (magnitude(value) >= limit) | ((bits & STAYS) != 0);
        });
        int32_t wanting = 0;
        for (int32_t& slot : slot_) slot = slot < job_.floor ? wanting++ : -1;
        best_.assign((size_t)(wanting * job_.floor), {0.0f, nullptr});
        reached_.assign((size_t)wanting, 0);
        if (wanting == 0) return true;
        rows = {job_.columns};
        each(job_, [&](int64_t index, uint16_t& bits, float value) {
            size_t u = unit(index);
            if (slot_[u] < 0) return;
            reached_[(size_t)slot_[u]] += magnitude(value) >= magnitude(job_.bound[1 + u]);
            enter(best_.data() + slot_[u] * job_.floor, job_.floor, {value, &bits});
        });
        bool told = true;
        for (size_t u = 0; u < slot_.size(); u++) {
            float& bound = job_.bound[1 + u];
            if (slot_[u] < 0 || reached_[(size_t)slot_[u]] >= job_.floor || magnitude(bound) <= LEAST) continue;
            bound = lower(bound, pass);
            told = false;
        }
        return told;
    }

    void mark() {
        for (auto& best : best_)
            if (best.value != 0.0f) *best.mark |= STAYS;
    }

    // The bounds of the next step; `common` is that of all entries.
    void next_bounds(float common) const {
        for (size_t u = 0; u < slot_.size(); u++) {
            float& bound = job_.bound[1 + u] = common;
            if (slot_[u] < 0) continue;
            float last = best_[(size_t)((slot_[u] + 1) * job_.floor - 1)].value;
            bound = std::min(common, at_least(as_float(magnitude(last)) * UNIT_SLACK));
        }
    }

  private:
    const Job& job_;
    std::vector<int32_t> slot_;  // per unit: entries that stay; then its place among those with too few, or -1
    std::vector<Ranked<uint16_t*>> best_;
    std::vector<int32_t> reached_;
};

// Sets the candidates that do not stay to zero, and drops those that were zero before; returns how many stay.
static int64_t settle(const Job& job, int32_t limit) {
    int64_t left = 0;
#pragma omp parallel for schedule(static) reduction(+ : left) num_threads((int)job.threads) if (job.threads > 1)
    for (int64_t p = 0; p < job.pieces(); p++) {
        uint16_t* at = job.at + p * ROOM;
        float* value = job.value + p * ROOM;
        int64_t kept = 0, i = 0;
#if LANES == 16
        for (; i + LANES <= job.found[p]; i += LANES) {
            __m512i v = _mm512_loadu_si512(value + i);
            __m512i place = _mm512_cvtepu16_epi32(_mm256_loadu_si256((__m256i*)(at + i)));
            __mmask16 stays = (__mmask16)pack((Ints)(((Ints)v & MAGNITUDE) >= limit));
            stays |= _mm512_test_epi32_mask(place, _mm512_set1_epi32(STAYS));
            stays &= _mm512_test_epi32_mask(v, _mm512_set1_epi32(MAGNITUDE));
            __mmask16 named = stays | _mm512_test_epi32_mask(place, _mm512_set1_epi32(THERE));
            left += __builtin_popcount(stays);
            _mm512_storeu_si512(value + kept, _mm512_maskz_compress_epi32(named, _mm512_maskz_mov_epi32(stays, v)));
            _mm256_storeu_si256((__m256i*)(at + kept), _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(named, place)));
            kept += __builtin_popcount(named);
        }
#endif
        for (; i < job.found[p]; i++) {
            int32_t size = magnitude(value[i]);
            bool stays = size > 0 && (size >= limit || (at[i] & STAYS));
            left += stays;
            value[kept] = stays ? value[i] : 0.0f;
            at[kept] = at[i];
            kept += stays || (at[i] & THERE);
        }
        job.found[p] = kept;
    }
    return left;
}

struct ListEntry {
    int32_t at;  // column (by rows) or row (by columns)
    float value;
};

}  // namespace

extern "C" {

// One step of AdamW on a weight (rows, columns), projected to `count` entries and at least `floor` in each unit: `at`,
// `value` and `found` then hold all entries of the weight that are not zero, or have to become so, with the values to
// write. `bound` has 1 place, with a floor 1 + units: what the last step left there, which this one renews. at and value
// have room for pieces * (16384 + 64) entries, found for pieces = ceil(rows * columns / 16384).
// `result`: entries that are not zero after the step, passes over the moments, and candidates.
void adamw_project(
    float* w, const float* g, float* m, float* v, int64_t rows, int64_t columns, int64_t count, int64_t floor,
    int64_t axis, float* bound, uint16_t* at, float* value, int64_t* found, int64_t* result, float scale, float first,
    float second, float decay, float rate, float root, float eps, float slack, int64_t threads) {
    Step step = {scale, first, second, decay, rate, root, eps};
    Job job = {step, w, g, m, v, rows, columns, count, floor, axis, bound, at, value, found, threads};
    Floors floors(job);
    int32_t limit;
    collect<true>(job);
    for (int pass = 0;; pass++) {
        result[1] = pass + 1;
        if (!find_limit(job, &limit))
            bound[0] = lower(bound[0], pass);
        else if (!floor || floors.find(limit, pass))
            break;
        for (int64_t u = 0; u < job.units(); u++) bound[1 + u] = std::min(bound[1 + u], bound[0]);
        collect<false>(job);
    }
    result[2] = std::accumulate(found, found + job.pieces(), (int64_t)0);
    floors.mark();
    int64_t left = settle(job, limit);
    if (count > 0) bound[0] = at_least(as_float(limit) * slack);
    floors.next_bounds(bound[0]);
    result[0] = left;
}

// Writes what `adamw_project` chose into the weight, and where the lists are given also its entries row by row and column
// by column, as in `pattern_fill`.
void adamw_write(
    float* w, int64_t rows, int64_t columns, uint16_t* at, float* value, int64_t* found, int32_t* row_start,
    ListEntry* by_row, int32_t* column_start, ListEntry* by_column) {
    Job job{};
    job.w = w, job.rows = rows, job.columns = columns, job.at = at, job.value = value, job.found = found;
    if (row_start == nullptr) {
        each(job, [&](int64_t index, uint16_t&, float value) { w[index] = value; });
        return;
    }
    int32_t n = 0;
    int64_t row = 0, end = columns;
    row_start[0] = 0;
    memset(column_start, 0, (size_t)(columns + 1) * 4);
    each(job, [&](int64_t index, uint16_t&, float value) {
        w[index] = value;
        for (; index >= end; end += columns) row_start[++row] = n;
        int64_t column = index - end + columns;
        // No branch: it would be guessed wrong too often. What stays is written over what does not.
        by_row[n] = {(int32_t)column, value};
        n += value != 0.0f;
        column_start[column + 1] += value != 0.0f;
    });
    while (row < rows) row_start[++row] = n;
    for (int64_t c = 0; c < columns; c++) column_start[c + 1] += column_start[c];
    static thread_local Scratch scratch;
    int32_t* next = scratch.of<int32_t>(columns);
    memcpy(next, column_start, (size_t)columns * 4);
    for (int64_t r = 0; r < rows; r++)
        for (int32_t e = row_start[r]; e < row_start[r + 1]; e++)
            by_column[next[by_row[e].at]++] = {(int32_t)r, by_row[e].value};
}

// The squares of each piece of 16384 entries, summed up.
void sum_of_squares(const float* x, int64_t n, double* sums, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (int64_t from = 0; from < n; from += CHUNK) {
        int64_t to = std::min(n, from + CHUNK), j = from;
        Floats parts[4] = {};
        for (; j + 4 * LANES <= to; j += 4 * LANES)
            for (int i = 0; i < 4; i++) parts[i] += load(x + j + i * LANES) * load(x + j + i * LANES);
        double total = (double)sum(parts[0]) + (double)sum(parts[1]) + (double)sum(parts[2]) + (double)sum(parts[3]);
        for (; j < to; j++) total += (double)x[j] * (double)x[j];
        sums[from / CHUNK] = total;
    }
}

// One step of AdamW without a projection.
void adamw_dense(
    float* w, const float* g, float* m, float* v, int64_t n, float scale, float first, float second, float decay,
    float rate, float root, float eps, int64_t threads) {
    Step s = {scale, first, second, decay, rate, root, eps};
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (int64_t from = 0; from < n; from += CHUNK) {
        int64_t to = std::min(n, from + CHUNK), j = from;
        auto one = [&](float* w, const float* g, float* m, float* v) {
            Floats old = load(w), mean = load(m), square = load(v);
            move_moments(s, load(g), mean, square);
            store(m, mean);
            store(v, square);
            store(w, moved(s, old, mean, square));
        };
        for (; j + LANES <= to; j += LANES) one(w + j, g + j, m + j, v + j);
        if (j == to) continue;
        float rest[4][LANES] = {};
        size_t bytes = (size_t)(to - j) * 4;
        const float* from_where[4] = {w + j, g + j, m + j, v + j};
        for (int i = 0; i < 4; i++) memcpy(rest[i], from_where[i], bytes);
        one(rest[0], rest[1], rest[2], rest[3]);
        memcpy(w + j, rest[0], bytes);
        memcpy(m + j, rest[2], bytes);
        memcpy(v + j, rest[3], bytes);
    }
}
}
