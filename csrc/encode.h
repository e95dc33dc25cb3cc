// Encodes rows: a scale from the elements' range, rounded to bf16, then every element divided by it and rounded to nearest
// even. src/quire/tensors/codec.py does the same in torch, bit for bit.
//
//   int8: scale = largest magnitude / 127, codes -127 .. 127.
//   int4, 32 elements at a time: scale = extreme / -8, where the extreme is the element of largest magnitude (the positive one
//   of two), so that it is coded as -8; codes -8 .. 7.
//
// bf16 moves a scale by at most 1/512 of itself, too little to move the code of the extreme: so a decoded row is encoded as the
// same row again. A group below kTiny becomes zeros, which keeps scales normal; one with anything that is not finite gets a
// scale of NaN and decodes to NaN, so that a broken model is still found out.
#pragma once
#include "elements.h"
#include "parallel.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

constexpr float kTiny = 0x1p-100f;

struct GroupScale {
  uint16_t bits;  // bf16
  bool coded;     // false: every code is that of zero
};

QUIRE_INLINE GroupScale scale_of(int32_t dtype, const char* x, int n, bool is_int4) {
  const int64_t step = element_bytes(dtype);
  F32x16 high = zero(), low = zero();
  U32x16 zeros = set1_u32(0);  // +0 and -0 only, as long as all is finite
  for (int d = 0; d < n; d += 16) {
    const F32x16 v = load_elements_n(dtype, x + d * step, n - d < 16 ? n - d : 16);
    high = max(v, high);
    low = max(sub(zero(), v), low);
    zeros = or_(zeros, bits(mul(v, zero())));
  }
  const float most = max_lanes(high), least = max_lanes(low), magnitude = most >= least ? most : least;
  if (mask_bits(eq(floats(zeros), zero())) != 0xffff) return {0x7fc0, false};
  if (magnitude < kTiny) return {0, false};
  const float wide = is_int4 ? (most >= least ? most : -least) * -0.125f : magnitude / 127.0f;
  uint32_t u;
  memcpy(&u, &wide, 4);
  return {uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16), true};
}

// Codes of n <= 16 elements, raised by `bias`; elements past n count as zero.
QUIRE_INLINE void codes_of(int32_t dtype, const char* x, int n, GroupScale scale, float highest, int bias, uint8_t* codes) {
  if (!scale.coded) {
    memset(codes, bias, 16);
    return;
  }
  const F32x16 quotient = div(load_elements_n(dtype, x, n), set1(bf16_to_f32(scale.bits)));
  float lanes[16];
  store(lanes, min(round_nearest(quotient), set1(highest)));
  for (int i = 0; i < 16; ++i) codes[i] = uint8_t(int32_t(lanes[i]) + bias);
}

QUIRE_INLINE void encode_int8(int32_t dtype, const char* x, int dim, char* row) {
  const GroupScale scale = scale_of(dtype, x, dim, false);
  for (int d = 0; d < dim; d += 16) {
    const int n = dim - d < 16 ? dim - d : 16;
    uint8_t codes[16];
    codes_of(dtype, x + d * element_bytes(dtype), n, scale, 127.0f, 0, codes);
    memcpy(row + d, codes, size_t(n));
  }
  memcpy(row + dim, &scale.bits, 2);
}

QUIRE_INLINE void encode_int4(int32_t dtype, const char* x, int dim, char* row) {
  for (int g = 0; g < dim; g += kInt4Group) {
    const int in_group = dim - g < kInt4Group ? dim - g : kInt4Group;
    const GroupScale scale = scale_of(dtype, x + g * element_bytes(dtype), in_group, true);
    for (int d = g; d < g + in_group; d += 16) {
      const int n = dim - d < 16 ? dim - d : 16;
      uint8_t codes[16], bytes[8];
      codes_of(dtype, x + d * element_bytes(dtype), n, scale, 7.0f, 8, codes);
      for (int i = 0; i < 8; ++i) bytes[i] = uint8_t(codes[2 * i] | codes[2 * i + 1] << 4);
      memcpy(row + d / 2, bytes, size_t(n + 1) / 2);
    }
    memcpy(row + (dim + 1) / 2 + g / kInt4Group * 2, &scale.bits, 2);
  }
}

int encode(const EncodeArgs* args) {
  const int64_t bytes = args->format == kInt8 ? args->dim + 2 : (args->dim + 1) / 2 + (args->dim + kInt4Group - 1) / kInt4Group * 2;
  const int threads = int64_t(args->num_tokens) * args->num_heads * args->dim < 32768 ? 1 : args->num_threads;
  parallel_for(threads, args->num_tokens, [&](int64_t t, int) {
    for (int64_t h = 0; h < args->num_heads; ++h) {
      const char* from = (const char*)args->x + t * args->token_stride + h * args->head_stride;
      char* to = (char*)args->rows + (t * args->num_heads + h) * bytes;
      args->format == kInt8 ? encode_int8(args->dtype, from, args->dim, to) : encode_int4(args->dtype, from, args->dim, to);
    }
  });
  return 0;
}

}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
