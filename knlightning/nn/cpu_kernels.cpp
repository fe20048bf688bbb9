// The passes over tensors around a kernel normalized convolution, for CPUs; cpu_passes.py compiles and calls them.
//
// Tensors are float32 and channels-last: a row is a pixel (or a position of windows), and has all its channels. The
// mask of dropout is never stored: each pass that needs it draws it again, by a hash of a seed of 64 bits and the place
// of the element. What is absent is null.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include <omp.h>

namespace {

const int64_t BLOCK = 64;  // rows that a thread takes at a time, and over which sums are in float32
const int64_t GRAIN = 1 << 15;  // elements below which one thread is as fast as several

struct Dropout {
    const uint64_t* seed;
    uint32_t threshold;  // 2^32 times the probability

    // Draws by two rounds of multiplication and shift with the constants of Wellons' hash lowbias32.
    struct Row {
        uint32_t place, key, threshold;

        bool keeps(uint32_t channel) const {
            uint32_t x = place + channel;
            x = ((x ^ (x >> 16)) * 0x7feb352du) ^ key;
            x = (x ^ (x >> 15)) * 0x846ca68bu;
            return (x ^ (x >> 16)) >= threshold;
        }
    };
    Row row(int64_t row, int64_t channels) const {
        const uint64_t key = seed ? *seed : 0, first = uint64_t(row) * channels;
        return {uint32_t(first) + uint32_t(key), uint32_t(key >> 32) + uint32_t(first >> 32), threshold};
    }
};

struct Windows {  // of one to three dimensions; absent ones come first and have the size 1
    int64_t kernel[3], stride[3], padding[3], dilation[3], size[3], positions[3];

    int64_t elements() const { return kernel[0] * kernel[1] * kernel[2]; }
    int64_t pixels() const { return size[0] * size[1] * size[2]; }
    int64_t lines() const { return positions[0] * positions[1]; }

    // For a line of positions call f(pixel, first, last) for each element of the windows: at position i from first to
    // last it is pixel + i * stride[2].
    template <class F> void of_line(int64_t line, F f) const {
        const int64_t d0 = line / positions[1] * stride[0] - padding[0];
        const int64_t h0 = line % positions[1] * stride[1] - padding[1], s = stride[2];
        for (int64_t d = d0; d < d0 + kernel[0] * dilation[0]; d += dilation[0])
            for (int64_t h = h0; h < h0 + kernel[1] * dilation[1]; h += dilation[1]) {
                if (d < 0 || d >= size[0] || h < 0 || h >= size[1]) continue;
                for (int64_t i = 0, w = -padding[2]; i < kernel[2] && w < size[2]; ++i, w += dilation[2]) {
                    const int64_t first = w < 0 ? (s - 1 - w) / s : 0;
                    f((d * size[1] + h) * size[2] + w, first, std::min(positions[2], (size[2] - 1 - w) / s + 1));
                }
            }
    }
};

struct Plan {  // what a convolution computes, whatever its tensors hold; as _Plan of cpu_passes.py
    Windows windows;
    int64_t samples, channels, filters, filter_size;
    float scale, inflation, eps;  // scale: 1 / (1 - dropout_p)
    uint32_t threshold;
    bool relu_input, relu_output;

    int64_t pixels() const { return samples * windows.pixels(); }
    int64_t positions() const { return windows.lines() * windows.positions[2]; }
};

template <bool V> using Flag = std::integral_constant<bool, V>;

template <class F> void with(bool a, F f) { a ? f(Flag<true>{}) : f(Flag<false>{}); }
template <class F> void with(bool a, bool b, F f) {
    with(a, [&](auto x) { with(b, [&](auto y) { f(x, y); }); });
}

void rectify_row(const float* __restrict x, float* __restrict y, int64_t channels) {
    for (int64_t c = 0; c < channels; ++c) y[c] = x[c] < 0 ? 0 : x[c];
}

float sum_row(const float* x, int64_t size) {
    float sum = 0;
    for (int64_t i = 0; i < size; ++i) sum += x[i];
    return sum;
}

struct MeanVar { float mean, var; };

// Of a row after dropout; copy has the space of a row.
MeanVar moments_of_row(const float* x, float* __restrict copy, Dropout dropout, float scale, int64_t r, int64_t channels) {
    if (dropout.seed) {
        const Dropout::Row row = dropout.row(r, channels);
        for (int64_t c = 0; c < channels; ++c) copy[c] = x[c] * (row.keeps(c) ? scale : 0.0f);
        x = copy;
    }
    float shifted = 0;  // from the first element: exact where all are equal, however many they are
    for (int64_t c = 0; c < channels; ++c) shifted += x[c] - x[0];
    const float mean = x[0] + shifted / channels;
    float var = 0;
    for (int64_t c = 0; c < channels; ++c) var += (x[c] - mean) * (x[c] - mean);
    return {mean, var / channels};
}

float rstd_of(MeanVar m, const Plan& p) {
    return 1 / std::sqrt(p.inflation * m.var + (p.inflation - 1) * m.mean * m.mean + p.eps);
}

struct Moments { float with_kept, with_sums; };

template <bool RELU, bool ADDED>
Moments scale_row(
    const float* __restrict grad, const float* __restrict kept, const float* __restrict residual,
    const float* __restrict sums, const float* __restrict bias, float* __restrict scaled, float* __restrict over_rows,
    float mean, float rstd, int64_t channels
) {
    Moments found{0, 0};
    for (int64_t c = 0; c < channels; ++c) {
        const float g = RELU && kept[c] <= 0 ? 0 : grad[c];
        scaled[c] = g * rstd;
        over_rows[c] += g;
        over_rows[channels + c] += g * (rstd * mean);
        found.with_kept += g * (kept[c] - bias[c] - (ADDED ? residual[c] : 0));
        found.with_sums += g * sums[c];
    }
    return found;
}

template <bool DROP, bool RELU>
void finish_row(
    float* __restrict d, const float* __restrict x, Dropout::Row row, float scale, float constant, float slope,
    int64_t channels
) {
    for (int64_t c = 0; c < channels; ++c) {
        const float value = RELU && x[c] < 0 ? 0 : x[c];
        float change = constant + slope * value;
        if (DROP) change *= row.keeps(c) ? 1.0f : 0.0f;
        d[c] = RELU && value <= 0 ? 0 : d[c] * scale + change;
    }
}

}  // namespace

extern "C" {

void knl_mask(bool* mask, const uint64_t* seed, uint32_t threshold, int64_t rows, int64_t channels) {
    for (int64_t r = 0; r < rows; ++r) {
        const Dropout::Row row = Dropout{seed, threshold}.row(r, channels);
        for (int64_t c = 0; c < channels; ++c) mask[r * channels + c] = row.keeps(c);
    }
}

// The sum of each filter; mean and 1 / sqrt(var + eps) of the windows over all channels after dropout; and the ReLU of
// the input if wanted.
void knl_moments(
    const Plan* plan, const float* input, const float* weight, const uint64_t* seed, float* rectified, float* mean,
    float* rstd, float* sums
) {
    const Plan p = *plan;
    const Windows w = p.windows;
    const int64_t rows = p.pixels(), channels = p.channels, lines = p.samples * w.lines(), width = w.positions[2];
    std::vector<float> means(rows), vars(rows);
#pragma omp parallel if (std::max(rows * channels, p.filters * p.filter_size) > GRAIN)
    {
#pragma omp for schedule(static) nowait
        for (int64_t f = 0; f < p.filters; ++f) sums[f] = sum_row(weight + f * p.filter_size, p.filter_size);
        std::vector<float> copy(seed ? channels : 0);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            const float* x = input + r * channels;
            if (rectified) {
                rectify_row(x, rectified + r * channels, channels);
                x = rectified + r * channels;
            }
            const MeanVar m = moments_of_row(x, copy.data(), {seed, p.threshold}, p.scale, r, channels);
            means[r] = m.mean;
            vars[r] = m.var;
        }
        std::vector<float> there(width);
#pragma omp for schedule(static)
        for (int64_t l = 0; l < lines; ++l) {
            const float* pixel_mean = means.data() + l / w.lines() * w.pixels();
            const float* pixel_var = vars.data() + l / w.lines() * w.pixels();
            float *m = mean + l * width, *v = rstd + l * width;
            const float share = 1.0f / w.elements();
            std::fill_n(m, width, 0);
            std::fill_n(v, width, 0);
            std::fill_n(there.data(), width, 0);
            w.of_line(l % w.lines(), [&](int64_t pixel, int64_t first, int64_t last) {
                for (int64_t i = first; i < last; ++i) m[i] += pixel_mean[pixel + i * w.stride[2]];
            });
            for (int64_t i = 0; i < width; ++i) m[i] *= share;
            w.of_line(l % w.lines(), [&](int64_t pixel, int64_t first, int64_t last) {
                for (int64_t i = first; i < last; ++i) {
                    const float deviation = pixel_mean[pixel + i * w.stride[2]] - m[i];
                    v[i] += pixel_var[pixel + i * w.stride[2]] + deviation * deviation;
                    there[i] += share;
                }
            });
            for (int64_t i = 0; i < width; ++i) v[i] = rstd_of({m[i], v[i] * share + (1 - there[i]) * m[i] * m[i]}, p);
        }
    }
}

// (convolved - mean * sums) * rstd + bias + residual, and its ReLU if wanted; the output may be the input.
void knl_normalize(
    const Plan* plan, const float* convolved, float* output, const float* mean, const float* rstd, const float* sums,
    const float* bias, const float* residual
) {
    const int64_t rows = plan->samples * plan->positions(), channels = plan->filters;
    const std::vector<float> zeros(bias ? 0 : channels);
    const float* shift = bias ? bias : zeros.data();
    with(plan->relu_output, residual, [&](auto RELU, auto ADDED) {
#pragma omp parallel for schedule(static) if (rows * channels > GRAIN)
        for (int64_t r = 0; r < rows; ++r) {
            const float *x = convolved + r * channels, *added = residual + (ADDED.value ? r * channels : 0);
            float* y = output + r * channels;
            const float mu = mean[r], scale = rstd[r];
#pragma GCC ivdep
            for (int64_t c = 0; c < channels; ++c) {
                const float value = (x[c] - mu * sums[c]) * scale + shift[c] + (ADDED.value ? added[c] : 0);
                y[c] = RELU.value && value < 0 ? 0 : value;
            }
        }
    });
}

// Scale the gradient, behind the ReLU if there is one, and take all sums of it: maps [samples, 2, positions] (null if
// they are not wanted) of what each pixel of a window gets through its moments, a constant and a slope of its value;
// and for each channel d_bias, of the gradient, and d_sums, of the scaled one times the mean.
void knl_scale_gradient(
    const Plan* plan, const float* grad, const float* kept, const float* residual, const float* mean, const float* rstd,
    const float* sums, const float* bias, const uint64_t* seed, float* scaled, float* maps, float* d_bias, float* d_sums,
    bool kept_output
) {
    const Plan p = *plan;
    const int64_t positions = p.positions(), rows = p.samples * positions, channels = p.filters;
    const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
    const float scale = seed ? p.scale : 1, share = scale / (p.channels * p.windows.elements());
    const std::vector<float> zeros(channels);
    const int64_t threads = omp_get_max_threads();
    std::vector<double> totals(threads * 2 * channels);
    const float* shift = kept_output && bias ? bias : zeros.data();
    with(p.relu_output, residual, [&](auto RELU, auto ADDED) {
#pragma omp parallel if (rows * channels > GRAIN)
        {
            std::vector<float> part(2 * channels);
            double* mine = totals.data() + omp_get_thread_num() * 2 * channels;
#pragma omp for schedule(static)
            for (int64_t b = 0; b < blocks; ++b) {
                std::fill(part.begin(), part.end(), 0);
                for (int64_t r = b * BLOCK; r < std::min(rows, (b + 1) * BLOCK); ++r) {
                    const int64_t at = r * channels;
                    const float mu = mean[r], s = rstd[r];
                    const Moments found = scale_row<RELU.value, ADDED.value>(
                        grad + at, kept + at, residual + (ADDED.value ? at : 0), sums, shift, scaled + at, part.data(),
                        mu, s, channels
                    );
                    if (!maps) continue;
                    const float d_rstd = kept_output ? found.with_kept : s * (found.with_kept - mu * found.with_sums);
                    float d_var = -0.5f * s * s * d_rstd;
                    const float d_mean = 2 * (p.inflation - 1) * d_var * mu - found.with_sums * s;
                    d_var *= p.inflation;
                    float* map = maps + r / positions * 2 * positions + r % positions;
                    map[0] = (d_mean - 2 * d_var * mu) * share;
                    map[positions] = 2 * d_var * share * scale;
                }
                for (int64_t i = 0; i < 2 * channels; ++i) mine[i] += part[i];
            }
        }
    });
    for (int64_t i = 0; i < 2 * channels; ++i) {  // in the order of the threads: as exact and the same each time
        double sum = 0;
        for (int64_t t = 0; t < threads; ++t) sum += totals[t * 2 * channels + i];
        (i < channels ? d_bias[i] : d_sums[i - channels]) = sum;
    }
}

// Add the gradients through the statistics to those through the convolution, in place: -d_sums of knl_scale_gradient to
// d_weight, and what its maps say to d_input, and pass the ReLU of the input. Either may be null.
void knl_finish_gradient(
    const Plan* plan, float* d_input, float* d_weight, const float* input, const float* maps, const float* d_sums,
    const uint64_t* seed
) {
    const Plan p = *plan;
    const Windows w = p.windows;
    const int64_t pixels = w.pixels(), positions = p.positions(), channels = p.channels;
    std::vector<float> pixel_maps(d_input ? 2 * p.pixels() : 0);
    with(seed, p.relu_input, [&](auto DROP, auto RELU) {
#pragma omp parallel if (std::max(p.pixels() * channels, p.filters * p.filter_size) > GRAIN)
        {
            if (d_weight) {
#pragma omp for schedule(static) nowait
                for (int64_t f = 0; f < p.filters; ++f)
                    for (int64_t i = 0; i < p.filter_size; ++i) d_weight[f * p.filter_size + i] -= d_sums[f];
            }
            if (d_input) {
#pragma omp for schedule(static)
                for (int64_t m = 0; m < 2 * p.samples; ++m)
                    for (int64_t l = 0; l < w.lines(); ++l)
                        w.of_line(l, [&](int64_t pixel, int64_t first, int64_t last) {
                            const float* from = maps + m * positions + l * w.positions[2];
                            float* to = pixel_maps.data() + m * pixels + pixel;
                            for (int64_t i = first; i < last; ++i) to[i * w.stride[2]] += from[i];
                        });
#pragma omp for schedule(static)
                for (int64_t r = 0; r < p.pixels(); ++r) {
                    const float* map = pixel_maps.data() + r / pixels * 2 * pixels + r % pixels;
                    finish_row<DROP.value, RELU.value>(
                        d_input + r * channels, input + r * channels, Dropout{seed, p.threshold}.row(r, channels), 1,
                        map[0], map[pixels], channels
                    );
                }
            }
        }
    });
}

// ---- where a window is a pixel: what is convolved is (x - mean) * rstd

// Standardize each pixel, after the ReLU if there is one; with its moments after dropout, or those that are given.
void knl_standardize(
    const Plan* plan, const float* input, float* output, float* mean, float* rstd, const uint64_t* seed, bool given
) {
    const Plan p = *plan;
    const int64_t rows = p.pixels(), channels = p.channels;
#pragma omp parallel if (rows * channels > GRAIN)
    {
        std::vector<float> copy(seed ? channels : 0);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            const float* x = input + r * channels;
            float* y = output + r * channels;
            if (p.relu_input) {
                rectify_row(x, y, channels);
                x = y;
            }
            if (!given) {
                const MeanVar m = moments_of_row(x, copy.data(), {seed, p.threshold}, p.scale, r, channels);
                mean[r] = m.mean;
                rstd[r] = rstd_of(m, p);
            }
            const float mu = mean[r], scale = rstd[r];
#pragma GCC ivdep
            for (int64_t c = 0; c < channels; ++c) y[c] = (x[c] - mu) * scale;
        }
    }
}

// Turn the gradient at what knl_standardize returns into that at its input, in place.
void knl_standardize_backward(
    const Plan* plan, float* grad, const float* input, const float* mean, const float* rstd, const uint64_t* seed
) {
    const Plan p = *plan;
    const int64_t rows = p.pixels(), channels = p.channels;
    const float scale = seed ? p.scale : 1;
    with(seed, p.relu_input, [&](auto DROP, auto RELU) {
#pragma omp parallel for schedule(static) if (rows * channels > GRAIN)
        for (int64_t r = 0; r < rows; ++r) {
            float* d = grad + r * channels;
            const float *x = input + r * channels, mu = mean[r], s = rstd[r];
            float d_mean = 0, d_rstd = 0;
            for (int64_t c = 0; c < channels; ++c) {
                d_mean += d[c];
                d_rstd += d[c] * ((RELU.value && x[c] < 0 ? 0 : x[c]) - mu);
            }
            const float d_var = -0.5f * s * s * s * d_rstd;
            const float constant = -s * d_mean - 2 * d_var * mu, slope = 2 * p.inflation * d_var;
            finish_row<DROP.value, RELU.value>(
                d, x, Dropout{seed, p.threshold}.row(r, channels), s, constant * scale / channels,
                slope * scale * scale / channels, channels
            );
        }
    });
}
}
