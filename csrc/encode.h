// Encodes rows: a scale from the elements' range, then every element divided by it and rounded to nearest even. src/quire/tensors/codec.py
// does the same in torch, bit for bit.
//
//   int8: the smallest scale of which the largest magnitude is at most 127 and a bit, codes -127 .. 127.
//   int4, 32 elements at a time, in steps of 16 scales: the smallest of which the most is at most 7.4 and the least no less than -8.5, codes -8 .. 7.
//
// So no code is clipped. The bit is such that what the extreme is decoded to, too, is beyond what the next smaller scale holds: so a decoded row is
// encoded as the same row again. A group with anything that is not finite, or for which no scale is large enough, gets NaN for a scale and decodes
// to NaN, so that a broken model is still found out; one below the smallest scale becomes zeros.
#pragma once
#include "elements.h"
#include "parallel.h"

namespace quire {
namespace QUIRE_ISA {
namespace {

// How many scales the largest magnitude of int8 may come to, by the scale's mantissa: each is near 127.5, and just past it the next scale's code is
// rounded up.
constexpr float kInt8Holds[8] = {127.0f, 127.375f, 127.25f, 127.375f, 127.375f, 127.0f, 127.25f, 127.484375f}, kInt8Most = 127.484375f;
constexpr float kInt4Most = 7.4375f * Int4::kStep, kInt4Least = 8.46875f * Int4::kStep;  // for any mantissa

struct GroupScale {
  uint32_t byte;
  bool coded;  // false: every code is that of zero
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
  if (mask_bits(eq(floats(zeros), zero())) != 0xffff) return {kNoScale, false};
  const float most = max_lanes(high), least = max_lanes(low), magnitude = most >= least ? most : least;
  const float for_most = most / kInt4Most, for_least = least / kInt4Least;
  const float wide = !is_int4 ? magnitude / kInt8Most : for_most >= for_least ? for_most : for_least;
  uint32_t u;
  memcpy(&u, &wide, 4);
  const uint32_t up = (u + 0xfffffu) >> 20;
  uint32_t byte = up < kScaleBase ? 0 : up - kScaleBase;
  if (byte < kNoScale && !is_int4 && magnitude > kInt8Holds[byte & 7] * scale_of_byte(byte)) ++byte;
  return byte < kNoScale ? GroupScale{byte, true} : GroupScale{kNoScale, false};
}

// Codes of n <= 16 elements in steps of `step` scales, raised by `bias`; elements past n count as zero.
QUIRE_INLINE void codes_of(int32_t dtype, const char* x, int n, GroupScale scale, float step, int bias, uint8_t* codes) {
  if (!scale.coded) {
    memset(codes, bias, 16);
    return;
  }
  float lanes[16];
  store(lanes, round_nearest(div(load_elements_n(dtype, x, n), set1(step * scale_of_byte(scale.byte)))));
  for (int i = 0; i < 16; ++i) codes[i] = uint8_t(int32_t(lanes[i]) + bias);
}

QUIRE_INLINE void encode_int8(int32_t dtype, const char* x, int dim, char* row) {
  const GroupScale scale = scale_of(dtype, x, dim, false);
  for (int d = 0; d < dim; d += 16) {
    const int n = dim - d < 16 ? dim - d : 16;
    uint8_t codes[16];
    codes_of(dtype, x + d * element_bytes(dtype), n, scale, 1.0f, 0, codes);
    memcpy(row + d, codes, size_t(n));
  }
  row[dim] = char(scale.byte);
}

QUIRE_INLINE void encode_int4(int32_t dtype, const char* x, int dim, char* row) {
  for (int g = 0; g < dim; g += kInt4Group) {
    const int in_group = dim - g < kInt4Group ? dim - g : kInt4Group;
    const GroupScale scale = scale_of(dtype, x + g * element_bytes(dtype), in_group, true);
    for (int d = g; d < g + in_group; d += 16) {
      const int n = dim - d < 16 ? dim - d : 16;
      uint8_t codes[16], bytes[8];
      codes_of(dtype, x + d * element_bytes(dtype), n, scale, Int4::kStep, 8, codes);
      for (int i = 0; i < 8; ++i) bytes[i] = uint8_t(codes[2 * i] | codes[2 * i + 1] << 4);
      memcpy(row + d / 2, bytes, size_t(n + 1) / 2);
    }
    row[Int4::scales(dim, g)] = char(scale.byte);
  }
}

int encode(const EncodeArgs* args) {
  const int64_t bytes = args->format == kInt8 ? args->dim + 1 : (args->dim + 1) / 2 + (args->dim + kInt4Group - 1) / kInt4Group;
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
