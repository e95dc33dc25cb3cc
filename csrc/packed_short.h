// bf16 weights in 12 bits, of which every bit comes back. Of a bf16's 16 bits the exponent takes 8, and the weights of a block have few of these: of
// normally distributed ones all but one in ten thousand lie within a factor of 2^16. So the upper byte of most, the sign and seven bits of
// exponent, is one of 16, and a code of four bits names it. Decoding alone waits for memory, and a line of 32 weights comes back in some two operations.
//
//   block   128 k x 64 columns, 64 steps of four lines as in packed_formats.h        head, then step behind step
//   head    64 bytes: which steps are whole, a bit each; the 16 upper bytes
//   step    whole   256 bytes: the lines
//           short   192 bytes: 64 x [code of line 2 or 3 | code of line 0 or 1], 64 lower bytes of lines 0 and 1, 64 of lines 2 and 3
//
// A step is whole where a weight's upper byte has no code. Panels differ in size, so where each begins is told in front of them all: int64, one more
// than there are. After Zhang et al., "70% Size, 100% Accuracy: Lossless LLM Compression for Efficient GPU Inference via Dynamic-Length Float" (2025),
// whose codes of exponents differ in length, which takes tables and a pass of its own.
#pragma once
#include "packed_formats.h"

namespace quire {
namespace QUIRE_ISA {
namespace {
namespace product {

template <class P>
constexpr bool kShort = false;
constexpr int kShortHead = 64, kShortStep = 192, kWholeStep = 64 * kLines, kShortSteps = 64;
constexpr int64_t kMostlyShortBytes = kShortHead + kShortSteps * kShortStep;  // of a block, but for steps that are whole

// Rows up to which products bring lines back in registers, in each walk through a block; for more it is opened to the first cache, once. Where there are no
// registers of 512 bits, lines come back at half the speed.
#if defined(QUIRE_AVX512)
constexpr int kMostShortRows = 6;
#else
constexpr int kMostShortRows = 2;
#endif

#if defined(QUIRE_SHORT_EXPONENTS)
template <>
constexpr bool kShort<PackedBf16> = true;

struct ShortHead {
  uint64_t whole;
  uint8_t upper[16];
};

inline ShortHead head_of(const char* block) {
  ShortHead head;
  memcpy(&head, block, sizeof head);
  return head;
}

// Lines `first` to first + N - 1 of a block's steps, one step after the other. Two of a pair are always together.
template <int N>
struct ShortSteps {
  static_assert(N % 2 == 0);
  U32x16 upper;
  uint64_t whole;
  const char* at;
  int first;

  ShortSteps(const char* block, int first_line)
      : upper(load_16_for_all(block + offsetof(ShortHead, upper))), whole(head_of(block).whole), at(block + kShortHead), first(first_line) {}

  __attribute__((always_inline)) void next(U32x16 (&lines)[N]) {
    if (__builtin_expect(whole & 1, 0)) {
      QUIRE_UNROLL for (int j = 0; j < N; ++j) lines[j] = load_u32((const uint32_t*)(at + 64 * (first + j)));
      at += kWholeStep;
    } else {
      const U32x16 codes = load_u32((const uint32_t*)at), four = set1_u32(0x0f0f0f0fu);
      QUIRE_UNROLL for (int j = 0; j < N; j += 2) {
        const U32x16 lower = load_u32((const uint32_t*)(at + 64 + 32 * (first + j)));
        const U32x16 high = shuffle16(upper, and_(first + j == 0 ? codes : shr_words<4>(codes), four));
        lines[j] = low_words(lower, high);
        lines[j + 1] = high_words(lower, high);
      }
      at += kShortStep;
    }
    whole >>= 1;
  }
};

inline const char* short_block_end(const char* block, int steps) {
  return block + kShortHead + kShortStep * steps + (kWholeStep - kShortStep) * __builtin_popcountll(head_of(block).whole);
}

// Its lines, as packed_formats.h has them.
inline const char* open_block(const char* block, int steps, char* lines) {
  ShortSteps<kLines> walk(block, 0);
  for (int s = 0; s < steps; ++s, lines += kWholeStep) {
    U32x16 of_step[kLines];
    walk.next(of_step);
    for (int j = 0; j < kLines; ++j) store_u32((uint32_t*)(lines + 64 * j), of_step[j]);
  }
  return walk.at;
}

// Lower and upper bytes of a step's lines, two lines together.
struct StepBytes {
  U32x16 lower[2], upper[2];

  explicit StepBytes(const char* lines) {
    for (int i = 0; i < 2; ++i) {
      const U32x16 a = load_u32((const uint32_t*)(lines + 128 * i)), b = load_u32((const uint32_t*)(lines + 128 * i + 64)), low = set1_u32(0x00ff00ffu);
      lower[i] = bytes_of_words(and_(a, low), and_(b, low));
      upper[i] = bytes_of_words(shr_words<8>(a), shr_words<8>(b));
    }
  }
};

// The codes of a block: sign, and how far below the largest exponent, in steps of four. `zeros`: the smallest magnitude's place is zero's.
struct ShortCodes {
  ShortHead head{};
  U32x16 top, table;

  ShortCodes(int largest, bool zeros) {
    for (int code = 0; code < 16; ++code) head.upper[code] = uint8_t((code & 8) << 4 | (uint8_t(largest - (code & 7)) & 0x7f));
    if (zeros) head.upper[7] = 0;
    top = set1_u32(uint32_t(largest) * 0x01010101u);
    table = load_16_for_all(head.upper);
  }
  // Whether a step can be short; its codes.
  bool codes_of(const StepBytes& step, U32x16& codes) const {
    U32x16 code[2];
    for (int i = 0; i < 2; ++i) {
      const U32x16 below = sub_bytes(top, and_(step.upper[i], set1_u32(0x7f7f7f7fu)));
      code[i] = or_(min_bytes(below, set1_u32(0x07070707u)), and_(shr_words<4>(step.upper[i]), set1_u32(0x08080808u)));
      if (!same(shuffle16(table, code[i]), step.upper[i])) return false;
    }
    codes = or_(code[0], shl<4>(code[1]));
    return true;
  }
  int find_whole(const char* lines, int steps) {
    head.whole = 0;
    U32x16 codes;
    for (int s = 0; s < steps; ++s) head.whole |= uint64_t(!codes_of(StepBytes(lines + kWholeStep * s), codes)) << s;
    return __builtin_popcountll(head.whole);
  }
};

// The codes that leave the fewest steps whole: from the largest exponent down, past single weights that are larger than all others.
inline ShortCodes short_codes(const char* lines, int steps) {
  U32x16 most = set1_u32(0), least = set1_u32(~0u);
  for (int s = 0; s < steps; ++s) {
    const StepBytes step(lines + kWholeStep * s);
    for (const U32x16& upper : step.upper) {
      most = max_bytes(most, and_(upper, set1_u32(0x7f7f7f7fu)));
      least = min_bytes(least, upper);
    }
  }
  uint8_t mosts[64], leasts[64];
  store_u32((uint32_t*)mosts, most);
  store_u32((uint32_t*)leasts, least);
  int largest = 0;
  bool zeros = false;
  for (int i = 0; i < 64; ++i) {
    largest = mosts[i] > largest ? mosts[i] : largest;
    zeros = zeros || leasts[i] == 0;
  }
  ShortCodes best(largest, zeros);
  int fewest = best.find_whole(lines, steps);
  for (int lower = 1; lower < 8 && lower <= largest && fewest > steps / 8; ++lower) {
    ShortCodes codes(largest - lower, zeros);
    const int whole = codes.find_whole(lines, steps);
    if (whole < fewest) best = codes, fewest = whole;
  }
  if (fewest > steps / 4) best.head.whole = steps == kShortSteps ? ~uint64_t(0) : (uint64_t(1) << steps) - 1;  // a branch that nobody can foretell costs more
  return best;
}

// A block of lines to `out`; returns the end.
inline char* close_block(const char* lines, int steps, char* out) {
  const ShortCodes codes = short_codes(lines, steps);
  memset(out, 0, kShortHead);
  memcpy(out, &codes.head, sizeof codes.head);
  out += kShortHead;
  for (int s = 0; s < steps; ++s, lines += kWholeStep) {
    if (codes.head.whole >> s & 1) {
      memcpy(out, lines, kWholeStep);
      out += kWholeStep;
      continue;
    }
    const StepBytes step(lines);
    U32x16 of_step;
    codes.codes_of(step, of_step);
    store_u32((uint32_t*)out, of_step);
    for (int i = 0; i < 2; ++i) store_u32((uint32_t*)(out + 64 + 64 * i), step.lower[i]);
    out += kShortStep;
  }
  return out;
}
#endif

// The end of a block, of `bytes` where all are alike.
template <class P>
const char* block_end(const char* block, [[maybe_unused]] int steps, int64_t bytes) {
#if defined(QUIRE_SHORT_EXPONENTS)
  if constexpr (kShort<P>) return short_block_end(block, steps);
#endif
  return block + bytes;
}

// Where a panel of a packed weight begins.
template <class P>
const char* panel_at(const void* w, int64_t panel, int64_t k) {
  if constexpr (kShort<P>) return (const char*)w + ((const int64_t*)w)[panel];
  else return (const char*)w + panel * panel_bytes<P>(k);
}

// In front of the panels of a weight; the most that they take, and each.
template <class P>
int64_t lead_bytes(int64_t n) { return kShort<P> ? round_up(8 * (ceil_div(n, kWide) + 1), 64) : 0; }
template <class P>
int64_t most_panel_bytes(int64_t k) { return panel_bytes<P>(k) + (kShort<P> ? kShortHead * ceil_div(k, kBlock) : 0); }
template <class P>
int64_t most_bytes(int64_t n, int64_t k) { return lead_bytes<P>(n) + ceil_div(n, kWide) * most_panel_bytes<P>(k); }

// A panel as packed_formats.h has it: where it lies, or in `room`, which has panel_bytes.
template <class P>
const char* opened(const void* w, int64_t panel, int64_t k, [[maybe_unused]] char* room) {
  const char* at = panel_at<P>(w, panel, k);
#if defined(QUIRE_SHORT_EXPONENTS)
  if constexpr (kShort<P>) {
    const int64_t steps = panel_bytes<P>(k) / kWholeStep;
    for (int64_t s = 0; s < steps; s += kShortSteps) at = open_block(at, int(smaller(steps - s, kShortSteps)), room + kWholeStep * s);
    return room;
  }
#endif
  return at;
}

}  // namespace product
}  // namespace
}  // namespace QUIRE_ISA
}  // namespace quire
