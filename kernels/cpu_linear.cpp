// Products with, and values of, a weight packed in 4-bit codes: see cpu_linear.py.
//
// A block's table of 16 values, level times scale rounded to the weight's dtype, is made once a block; a code then picks
// its weight out of it. So what is multiplied is the dequantized weight bit for bit, and nothing but the sum is rounded.
// Or, with AVX-512 and weights that are not rounded, a scale multiplies the sum of eight products of level and
// activation, the same where it is of one product: no table, and registers of codes as they lie in memory.
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#endif

namespace {

using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uintptr_t;
using std::uint8_t;

enum Kind : int64_t { CODE = 0, FLOAT32 = 1, BFLOAT16 = 2, FLOAT16 = 3, E4M3 = 4, E8M0 = 5 };

// ------------------------------------------------------------------------------------------------- numbers of 16 bits

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint16_t to_bfloat16(float value) {
    uint32_t bits = bits_of(value);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline uint16_t to_float16(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return uint16_t(sign | 0x7E00);
    if (magnitude >= 0x477FF000) return uint16_t(sign | 0x7C00);  // rounds past 65504
    if (magnitude < 0x38800000)  // a subnormal or zero: the sum's last bit is worth 2^-24
        return uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000));
    return uint16_t(sign | (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13);
}

inline float from_float16(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7FFF;
    if (magnitude >= 0x7C00) return float_of(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
    float value = float_of(magnitude << 13) * float_of(0x77800000);  // times 2^112, exact from subnormals too
    return float_of(sign | bits_of(value));
}

inline float load(const void* from, int64_t kind, int64_t at) {
    if (kind == FLOAT32) return static_cast<const float*>(from)[at];
    uint16_t half = static_cast<const uint16_t*>(from)[at];
    return kind == BFLOAT16 ? float_of(uint32_t(half) << 16) : from_float16(half);
}

inline void store(void* to, int64_t kind, int64_t at, float value) {
    if (kind == FLOAT32)
        static_cast<float*>(to)[at] = value;
    else
        static_cast<uint16_t*>(to)[at] = kind == BFLOAT16 ? to_bfloat16(value) : to_float16(value);
}

template <int64_t KIND>
inline float rounded(float value) {
    if (KIND == BFLOAT16) return float_of(uint32_t(to_bfloat16(value)) << 16);
    return KIND == FLOAT16 ? from_float16(to_float16(value)) : value;
}

}  // namespace

// ------------------------------------------------------------------------------------------------------- packed weight

// As `Weight` in cpu_linear.py lays it out.
struct Weight {
    const uint8_t* codes;      // [rows, ceil(length / 2)], the even element in the low half
    const void* scales;        // [rows, blocks], or one
    const float* scale_table;  // of CODE scales, 256 values
    const float* levels;       // 16
    int64_t rows, length, block, blocks;
    int64_t scale_kind, scale_stride;  // the stride is 0 where there is one scale
    int64_t kind;                      // of the dequantized weight
    int64_t rounding;                  // that kind, or FLOAT32 where it holds every level times scale exactly
    float tensor_scale;
};

namespace {

inline float from_e4m3(uint32_t code) {
    uint32_t sign = (code & 0x80) << 24, magnitude = code & 0x7F;
    float value = float_of(magnitude << 20) * float_of(0x7B800000);  // times 2^120, exact from subnormals too
    return float_of(sign | (magnitude == 0x7F ? 0x7FC00000 : bits_of(value)));
}

inline float from_e8m0(uint32_t code) {
    uint32_t bits = code == 0 ? 0x00400000 : code << 23;  // 2^-127 is a subnormal
    return float_of(code == 255 ? 0x7FC00000 : bits);
}

template <typename T, typename Decode>
inline __attribute__((always_inline)) void scales_by(const T* stored, int64_t blocks, float factor, float* out, Decode decode) {
    for (int64_t b = 0; b < blocks; b++) out[b] = decode(stored[b]) * factor;
}

// Each block's scale times the tensor's, [rows, blocks]. A loop for each kind, which compilers vectorize.
inline __attribute__((always_inline)) void scales_of(const Weight& w, int64_t row, int64_t rows, float* out) {
    const int64_t first = row * w.scale_stride, blocks = w.scale_stride ? rows * w.blocks : 1;
    const float factor = w.tensor_scale;
    const uint8_t* codes = static_cast<const uint8_t*>(w.scales) + first;
    const uint16_t* halves = static_cast<const uint16_t*>(w.scales) + first;
    switch (w.scale_kind) {
        case CODE: scales_by(codes, blocks, factor, out, [&](uint32_t code) { return w.scale_table[code]; }); break;
        case E4M3: scales_by(codes, blocks, factor, out, from_e4m3); break;
        case E8M0: scales_by(codes, blocks, factor, out, from_e8m0); break;
        case BFLOAT16: scales_by(halves, blocks, factor, out, [](uint32_t half) { return float_of(half << 16); }); break;
        case FLOAT16: scales_by(halves, blocks, factor, out, from_float16); break;
        default: scales_by(static_cast<const float*>(w.scales) + first, blocks, factor, out, [](float s) { return s; });
    }
    if (w.scale_stride == 0)
        for (int64_t r = 1; r < rows; r++) out[r] = out[0];
}

void scales_scalar(const Weight& w, int64_t row, int64_t rows, float* out) { scales_of(w, row, rows, out); }

constexpr int64_t AHEAD = 4096;  // bytes of codes: a processor's own prefetching stops where a page ends
constexpr int64_t ROWS_AT_ONCE = 8;  // whose scales are decoded together

inline const uint8_t* codes_of_row(const Weight& w, int64_t row) { return w.codes + row * ((w.length + 1) / 2); }

inline int64_t end_of_block(const Weight& w, int64_t b) {  // in bytes; a short last block may end in half of one
    int64_t end = (b + 1) * (w.block / 2), width = (w.length + 1) / 2;
    return b + 1 == w.blocks || end > width ? width : end;
}

// Activations in float32, of row m at m * stride, with zeros behind them: even elements, and odd ones half a stride on;
// or in eighths, see `sums_of_eighths`.
struct Activations {
    const float* even;
    int64_t stride;
    const float* odd() const { return even + stride / 2; }
};

// The sums of one row of the weight with M rows of activations.
template <int M, int64_t KIND>
void sums_scalar(const Weight& w, int64_t row, const float* scales, Activations x, float* out) {
    const uint8_t* codes = codes_of_row(w, row);
    float sums[M] = {}, table[16];
    for (int64_t b = 0, p = 0; b < w.blocks; b++) {
        for (int i = 0; i < 16; i++) table[i] = rounded<KIND>(w.levels[i] * scales[b]);
        for (int64_t end = end_of_block(w, b); p < end; p++)
            for (int m = 0; m < M; m++)
                sums[m] += table[codes[p] & 15] * x.even[m * x.stride + p] + table[codes[p] >> 4] * x.odd()[m * x.stride + p];
    }
    for (int m = 0; m < M; m++) out[m] = sums[m];
}

#ifdef X86
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define AVX2 __attribute__((target("avx2,fma,f16c")))

template <int64_t KIND>
AVX512 inline __m512 rounded512(__m512 value) {
    if (KIND == FLOAT32) return value;
    if (KIND == FLOAT16)
        return _mm512_cvtph_ps(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    const __m512i bits = _mm512_castps_si512(value), half = _mm512_set1_epi32(0x7FFF);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    __m512i up = _mm512_mask_add_epi32(_mm512_add_epi32(bits, half), odd, bits, _mm512_set1_epi32(0x8000));
    return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(int(0xFFFF0000))));
}

// One register of weights with M of activations, at byte p of a row.
template <int M>
AVX512 inline void add512(__m512 w0, __m512 w1, Activations x, int64_t p, __m512* low, __m512* high) {
    for (int m = 0; m < M; m++) {
        low[m] = _mm512_fmadd_ps(w0, _mm512_loadu_ps(x.even + m * x.stride + p), low[m]);
        high[m] = _mm512_fmadd_ps(w1, _mm512_loadu_ps(x.odd() + m * x.stride + p), high[m]);
    }
}

AVX512 inline __m512i bytes512(const uint8_t* codes) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}

template <int M, int64_t KIND>
AVX512 void sums_avx512(const Weight& w, int64_t row, const float* scales, Activations x, float* out) {
    const uint8_t* codes = codes_of_row(w, row);
    const __m512 levels = _mm512_loadu_ps(w.levels);
    __m512 low[M], high[M];
    for (int m = 0; m < M; m++) low[m] = high[m] = _mm512_setzero_ps();
    int64_t b = 0, p = 0;
    for (const int64_t whole = w.block == 32 ? w.length / 32 * 16 : 0; p < whole; p += 16, b++) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + p + AHEAD), _MM_HINT_T0);
        const __m512 table = rounded512<KIND>(_mm512_mul_ps(levels, _mm512_set1_ps(scales[b])));
        const __m512i byte = bytes512(codes + p);
        add512<M>(_mm512_permutexvar_ps(byte, table), _mm512_permutexvar_ps(_mm512_srli_epi32(byte, 4), table), x, p, low,
                  high);
    }
    for (; b < w.blocks; b++) {
        const __m512 table = rounded512<KIND>(_mm512_mul_ps(levels, _mm512_set1_ps(scales[b])));
        const int64_t end = end_of_block(w, b);
        for (; p + 16 <= end; p += 16) {
            const __m512i byte = bytes512(codes + p);
            add512<M>(_mm512_permutexvar_ps(byte, table), _mm512_permutexvar_ps(_mm512_srli_epi32(byte, 4), table), x, p,
                      low, high);
        }
        if (p == end) continue;
        const __mmask16 mask = __mmask16((1u << (end - p)) - 1);
        const __m512i byte = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, codes + p));
        const __m512 w0 = _mm512_permutexvar_ps(byte, table), w1 = _mm512_permutexvar_ps(_mm512_srli_epi32(byte, 4), table);
        for (int m = 0; m < M; m++) {
            low[m] = _mm512_fmadd_ps(w0, _mm512_maskz_loadu_ps(mask, x.even + m * x.stride + p), low[m]);
            high[m] = _mm512_fmadd_ps(w1, _mm512_maskz_loadu_ps(mask, x.odd() + m * x.stride + p), high[m]);
        }
        p = end;
    }
    for (int m = 0; m < M; m++) out[m] = _mm512_reduce_add_ps(_mm512_add_ps(low[m], high[m]));
}

// The base-two logarithm of the weights that share a scale: of a whole row, more than any row has.
inline int64_t shift_of(const Weight& w) { return w.block >= w.length ? 62 : __builtin_ctzll(w.block); }

// Whether the weights of a register of codes are of whole blocks, 8 at most, or of one. Those that are rounded are quicker
// by table, unless it serves for half a register.
bool has_eighths(const Weight& w) {
    if (w.rounding != FLOAT32) return w.block == 16;
    return w.block >= w.length || (w.block >= 16 && (w.block & (w.block - 1)) == 0);
}

// The sums of `count` rows of the weight with M of activations, [count, M]. Of a register of codes, 128 weights, lane i
// holds 8 i + j in its bits from 4 j on, j < 8: activations lie as [length / 128, j, i]. What is not rounded is scaled
// in sums of eight, which is the same where it is of one product.
template <int M, int64_t KIND>
AVX512 void sums_of_eighths(const Weight& w, int64_t first, int64_t count, const float* scales, Activations x, float* out) {
    constexpr int R = M == 1 ? 4 : 2;  // rows at once: an activation is read once for them
    const int64_t width = (w.length + 1) / 2, shift = shift_of(w), blocks = w.blocks;
    const __m512 levels = _mm512_loadu_ps(w.levels);
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i its_scale = _mm512_srl_epi32(_mm512_slli_epi32(lane, 3), _mm_cvtsi64_si128(shift));
    for (int64_t r0 = 0; r0 < count; r0 += R) {
        const uint8_t* codes[R];
        const float* scale[R];
        __m512 sums[R][M];
        for (int r = 0; r < R; r++) {
            const int64_t row = r0 + r < count ? r0 + r : count - 1;
            codes[r] = w.codes + (first + row) * width;
            scale[r] = scales + row * blocks;
            for (int m = 0; m < M; m++) sums[r][m] = _mm512_setzero_ps();
        }
        const char* next = reinterpret_cast<const char*>(codes[0] + AHEAD);  // in the order of memory, whatever R is
        for (int64_t p = 0; p < width; p += 64) {
            const int64_t b = 2 * p >> shift;
            const __mmask64 there = p + 64 <= width ? ~__mmask64(0) : (__mmask64(1) << (width - p)) - 1;
            const __mmask8 known = b + 8 <= blocks ? 255 : __mmask8((1 << (blocks - b)) - 1);
            __m512i code[R];
            __m512 its[R], parts[R][M];
            for (int r = 0; r < R; r++) {
                _mm_prefetch(next, _MM_HINT_T0);
                next += 64;
                code[r] = _mm512_maskz_loadu_epi8(there, codes[r] + p);
                const __m512 eight = _mm512_castps256_ps512(_mm256_maskz_loadu_ps(known, scale[r] + b));
                its[r] = _mm512_permutexvar_ps(its_scale, eight);
                for (int m = 0; m < M; m++) parts[r][m] = KIND == FLOAT32 ? _mm512_setzero_ps() : sums[r][m];
            }
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++)
                for (int r = 0; r < R; r++) {
                    __m512 q = _mm512_permutexvar_ps(code[r], levels);
                    if (KIND != FLOAT32) q = rounded512<KIND>(_mm512_mul_ps(q, its[r]));
                    code[r] = _mm512_srli_epi32(code[r], 4);
                    for (int m = 0; m < M; m++) {
                        const __m512 each = _mm512_load_ps(x.even + m * x.stride + 2 * p + 16 * j);
                        parts[r][m] = _mm512_fmadd_ps(q, each, parts[r][m]);
                    }
                }
            for (int r = 0; r < R; r++)
                for (int m = 0; m < M; m++)
                    sums[r][m] = KIND == FLOAT32 ? _mm512_fmadd_ps(parts[r][m], its[r], sums[r][m]) : parts[r][m];
        }
        for (int r = 0; r < R && r0 + r < count; r++)
            for (int m = 0; m < M; m++) out[(r0 + r) * M + m] = _mm512_reduce_add_ps(sums[r][m]);
    }
}

// E4M3 by way of float16, whose exponent has one bit more and a bias that is larger by 8; 32 codes at once.
AVX512 void scales_avx512(const Weight& w, int64_t row, int64_t rows, float* out) {
    const int64_t blocks = rows * w.scale_stride;
    const float factor = w.tensor_scale * 256;
    if (w.scale_kind != E4M3 || w.scale_stride == 0 || !(factor < float_of(0x7F800000))) return scales_of(w, row, rows, out);
    const uint8_t* codes = static_cast<const uint8_t*>(w.scales) + row * w.scale_stride;
    const __m256i nan = _mm256_set1_epi8(0x7F);
    for (int64_t b = 0; b < blocks; b += 32) {
        const __mmask32 there = blocks - b < 32 ? (1u << (blocks - b)) - 1 : ~0u;
        const __m256i code = _mm256_maskz_loadu_epi8(there, codes + b);
        const __m512i wide = _mm512_slli_epi16(_mm512_cvtepi8_epi16(code), 7);
        const __m512i half = _mm512_and_si512(wide, _mm512_set1_epi16(short(0xBF80)));
        const __mmask32 bad = _mm256_cmpeq_epi8_mask(_mm256_and_si256(code, nan), nan);
        const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
        const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
        const __m512 scale = _mm512_set1_ps(factor), none = _mm512_set1_ps(float_of(0x7FC00000));
        const __m512 first = _mm512_mask_mov_ps(_mm512_mul_ps(low, scale), __mmask16(bad), none);
        const __m512 second = _mm512_mask_mov_ps(_mm512_mul_ps(high, scale), __mmask16(bad >> 16), none);
        _mm512_mask_storeu_ps(out + b, __mmask16(there), first);
        _mm512_mask_storeu_ps(out + b + 16, __mmask16(there >> 16), second);
    }
}

template <int64_t KIND>
AVX2 inline __m256 rounded256(__m256 value) {
    if (KIND == FLOAT32) return value;
    if (KIND == FLOAT16)
        return _mm256_cvtph_ps(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    __m256i bits = _mm256_castps_si256(value);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    return _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(int(0xFFFF0000))));
}

AVX2 void scales_avx2(const Weight& w, int64_t row, int64_t rows, float* out) { scales_of(w, row, rows, out); }

AVX2 inline __m256 picked(__m256i code, __m256 lower, __m256 upper) {
    __m256 third = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));  // a code's bit 3, where a blend looks for it
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, code), _mm256_permutevar8x32_ps(upper, code), third);
}

template <int M, int64_t KIND>
AVX2 void sums_avx2(const Weight& w, int64_t row, const float* scales, Activations x, float* out) {
    const uint8_t* codes = codes_of_row(w, row);
    const __m256 levels0 = _mm256_loadu_ps(w.levels), levels1 = _mm256_loadu_ps(w.levels + 8);
    __m256 low[M], high[M];
    float rest[M] = {}, table[16];
    for (int m = 0; m < M; m++) low[m] = high[m] = _mm256_setzero_ps();
    for (int64_t b = 0, p = 0; b < w.blocks; b++) {
        const __m256 scale = _mm256_set1_ps(scales[b]);
        const __m256 lower = rounded256<KIND>(_mm256_mul_ps(levels0, scale));
        const __m256 upper = rounded256<KIND>(_mm256_mul_ps(levels1, scale));
        const int64_t end = end_of_block(w, b);
        for (; p + 8 <= end; p += 8) {
            __m256i byte = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + p)));
            __m256 w0 = picked(byte, lower, upper), w1 = picked(_mm256_srli_epi32(byte, 4), lower, upper);
            for (int m = 0; m < M; m++) {
                low[m] = _mm256_fmadd_ps(w0, _mm256_loadu_ps(x.even + m * x.stride + p), low[m]);
                high[m] = _mm256_fmadd_ps(w1, _mm256_loadu_ps(x.odd() + m * x.stride + p), high[m]);
            }
        }
        if (p == end) continue;
        _mm256_storeu_ps(table, lower);
        _mm256_storeu_ps(table + 8, upper);
        for (; p < end; p++)
            for (int m = 0; m < M; m++)
                rest[m] += table[codes[p] & 15] * x.even[m * x.stride + p] + table[codes[p] >> 4] * x.odd()[m * x.stride + p];
    }
    for (int m = 0; m < M; m++) {
        alignas(32) float lanes[8];
        _mm256_store_ps(lanes, _mm256_add_ps(low[m], high[m]));
        for (float lane : lanes) rest[m] += lane;
        out[m] = rest[m];
    }
}
#endif

// ----------------------------------------------------------------------------------------------------------- dispatch

using Scales = void (*)(const Weight&, int64_t, int64_t, float*);
using Sums = void (*)(const Weight&, int64_t, int64_t, const float*, Activations, float*);
constexpr int TOGETHER = 4;  // rows of activations that share one decoding

struct Path {
    const char* name;
    Scales scales;
    Sums sums[3][TOGETHER];  // by the weight's kind
    Sums of_eighths[3][TOGETHER];
};

template <int M, void (*ONE)(const Weight&, int64_t, const float*, Activations, float*)>
void each_row(const Weight& w, int64_t first, int64_t count, const float* scales, Activations x, float* out) {
    for (int64_t r = 0; r < count; r++) ONE(w, first + r, scales + r * w.blocks, x, out + r * M);
}

template <int M, int64_t KIND>
constexpr Sums scalar = each_row<M, sums_scalar<M, KIND>>;
#ifdef X86
template <int M, int64_t KIND>
constexpr Sums avx2 = each_row<M, sums_avx2<M, KIND>>;
template <int M, int64_t KIND>
constexpr Sums avx512 = each_row<M, sums_avx512<M, KIND>>;
#endif

#define OF_KIND(function, kind) {function<1, kind>, function<2, kind>, function<3, kind>, function<4, kind>}
#define OF_KINDS(function) {OF_KIND(function, FLOAT32), OF_KIND(function, BFLOAT16), OF_KIND(function, FLOAT16)}
const Path SCALAR_PATH = {"scalar", scales_scalar, OF_KINDS(scalar), {}};
#ifdef X86
const Path AVX2_PATH = {"avx2", scales_avx2, OF_KINDS(avx2), {}};
const Path AVX512_PATH = {"avx512", scales_avx512, OF_KINDS(avx512), OF_KINDS(sums_of_eighths)};
#endif

// The widest that the processor has, of those up to `limit`: 0 scalar, 1 AVX2, 2 AVX-512.
const Path& path_up_to(int64_t limit) {
#ifdef X86
    __builtin_cpu_init();
    if (limit >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return AVX512_PATH;
    if (limit >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return AVX2_PATH;
#endif
    return SCALAR_PATH;
}

template <typename T, T (*ROUND)(float)>
void row_of_values(const Weight& w, int64_t row, const float* scales, T* out) {
    const uint8_t* codes = codes_of_row(w, row);
    T table[16];
    for (int64_t b = 0, p = 0; b < w.blocks; b++) {
        for (int i = 0; i < 16; i++) table[i] = ROUND(w.levels[i] * scales[b]);
        for (int64_t end = end_of_block(w, b); p < end; p++) {
            out[2 * p] = table[codes[p] & 15];
            if (2 * p + 1 < w.length) out[2 * p + 1] = table[codes[p] >> 4];
        }
    }
}

inline float same(float value) { return value; }

// A processor sees that codes are read one after another, but not that scales will be, some rows later.
void prefetch_scales(const Weight& w, int64_t row) {
#ifdef __GNUC__
    const int64_t size = w.scale_kind == FLOAT32 ? 4 : w.scale_kind == BFLOAT16 || w.scale_kind == FLOAT16 ? 2 : 1;
    const char* first = static_cast<const char*>(w.scales) + row * w.scale_stride * size;
    for (int64_t at = 0; at < ROWS_AT_ONCE * w.scale_stride * size; at += 64) __builtin_prefetch(first + at);
#endif
}

void in_halves(const void* x, int64_t kind, int64_t first, int64_t length, int64_t stride, float* out) {
    for (int64_t k = 0; k < length; k++) out[(k & 1) * stride / 2 + k / 2] = load(x, kind, first + k);
}

void in_eighths(const void* x, int64_t kind, int64_t first, int64_t length, int64_t, float* out) {
    for (int64_t k = 0; k < length; k += 8)
        for (int64_t j = 0, end = length - k < 8 ? length - k : 8; j < end; j++)
            out[(k & ~int64_t(127)) + (k / 8 & 15) + 16 * j] = load(x, kind, first + k + j);
}

}  // namespace

extern "C" {

const char* lotion_fx_path(int64_t limit) { return path_up_to(limit).name; }

// y [rows_of_x, w.rows] = x [rows_of_x, w.length] W^T + bias, or without where that is null; x and y in the weight's kind.
void lotion_fx_linear(const Weight* weight, const void* x, int64_t rows_of_x, const void* bias, int64_t bias_kind, void* y,
                      int64_t limit, int64_t threads) {
    const Weight& w = *weight;
    const Path& path = path_up_to(limit);
    const bool eighths = path.of_eighths[0][0] && has_eighths(w);
    const Sums* sums_of = (eighths ? path.of_eighths : path.sums)[w.rounding - FLOAT32];
    const int64_t stride = (w.length + 127) / 128 * 128;
    std::vector<float> arranged(stride * rows_of_x + 16, 0.0f);
    float* start = arranged.data();
    while (reinterpret_cast<uintptr_t>(start) % 64) start++;  // a register that lies in two lines is read twice
    for (int64_t m = 0; m < rows_of_x; m++)
        (eighths ? in_eighths : in_halves)(x, w.kind, m * w.length, w.length, stride, start + m * stride);
    auto some = [&](int64_t begin, int64_t end) {
        std::vector<float> scales(w.blocks * ROWS_AT_ONCE);
        float sums[ROWS_AT_ONCE * TOGETHER];
        for (int64_t first = begin; first < end; first += ROWS_AT_ONCE) {
            const int64_t count = end - first < ROWS_AT_ONCE ? end - first : ROWS_AT_ONCE;
            path.scales(w, first, count, scales.data());
            prefetch_scales(w, first + ROWS_AT_ONCE);
            for (int64_t m = 0; m < rows_of_x; m += TOGETHER) {
                const int64_t together = rows_of_x - m < TOGETHER ? rows_of_x - m : TOGETHER;
                sums_of[together - 1](w, first, count, scales.data(), {start + m * stride, stride}, sums);
                for (int64_t i = 0; i < count * together; i++) {
                    const int64_t row = first + i / together, at = (m + i % together) * w.rows + row;
                    store(y, w.kind, at, bias ? sums[i] + load(bias, bias_kind, row) : sums[i]);
                }
            }
        }
    };
    if (threads <= 1) return some(0, w.rows);  // a team of one costs a microsecond
    const int64_t each = (w.rows + threads * ROWS_AT_ONCE - 1) / (threads * ROWS_AT_ONCE) * ROWS_AT_ONCE;
#pragma omp parallel for num_threads(int(threads)) schedule(static, 1)
    for (int64_t begin = 0; begin < w.rows; begin += each) some(begin, w.rows - begin < each ? w.rows : begin + each);
}

// The weight's values [rows, length], in its kind.
void lotion_fx_values(const Weight* weight, void* out, int64_t limit, int64_t threads) {
    const Weight& w = *weight;
    const Path& path = path_up_to(limit);
#pragma omp parallel num_threads(int(threads)) if (threads > 1)
    {
        std::vector<float> scales(w.blocks);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < w.rows; row++) {
            path.scales(w, row, 1, scales.data());
            int64_t at = row * w.length;
            if (w.kind == FLOAT32)
                row_of_values<float, same>(w, row, scales.data(), static_cast<float*>(out) + at);
            else if (w.kind == BFLOAT16)
                row_of_values<uint16_t, to_bfloat16>(w, row, scales.data(), static_cast<uint16_t*>(out) + at);
            else
                row_of_values<uint16_t, to_float16>(w, row, scales.data(), static_cast<uint16_t*>(out) + at);
        }
    }
}
}
