// The registers of a warp, and the loops over its lanes that most instructions are.
//
// A register is the values of all 32 lanes, side by side: of 4 bytes for types of up to 32 bits (shorter ones
// fill up with zeros), else of 8. A predicate is one word with a bit per lane. Every lane is computed, and
// only those that execute the instruction are kept: that is faster than to skip the others.
#pragma once

#include <string.h>

#include <deque>
#include <type_traits>

#include "program.h"

namespace standin {
namespace ptx {

constexpr uint32_t kAllLanes = ~0u;

struct AsyncState;

// A product that has not been computed.
struct Product {
  const Instruction* instruction;
  uint64_t a, b;              // descriptors
  uint32_t registers[4][32];  // a, where it is in registers
  bool accumulates;
  uint32_t group, time;
};

// The products of a warp.
struct WarpProducts {
  std::deque<Product> pending;
  uint32_t group = 0, started = 0;
  uint32_t fences = 0;  // wgmma.fence so far
  // Per 128 bytes of registers: the sum of the product that uses it, plus 1; 0: none.
  std::vector<uint32_t> busy;
  // The same: how many fences there were when another instruction wrote it last, plus 1; 0: never.
  std::vector<uint32_t> written;

  void begin(uint32_t register_bytes) {
    pending.clear();
    group = started = fences = 0;
    busy.assign(register_bytes / 128, 0);
    written.assign(register_bytes / 128, 0);
  }
};

struct WarpState {
  Block* block = nullptr;
  const Program* program = nullptr;
  const uint8_t* arguments = nullptr;  // as the parameters lie
  uint8_t* registers = nullptr;
  uint8_t* local = nullptr;  // the local memory of lane 0; the others' follows
  uint32_t index = 0;        // in the block
  uint32_t mask = 0;         // lanes that execute the instruction

  AsyncState* async = nullptr;  // of the block
  WarpProducts products;

  // ---- how far its lanes are
  uint32_t ready = 0;     // lanes that can run
  uint32_t group = 0;     // of these: lanes that run together now, at `pc`
  uint32_t pc = 0;        // of the group
  uint32_t next = 0;      // the lowest pc of the other ready lanes
  uint32_t parked = 0;    // lanes that wait where they are
  uint32_t pcs[32] = {};  // of the lanes outside the group

  template <class T>
  T* at(uint32_t place) {
    return reinterpret_cast<T*>(registers + place);
  }
  uint32_t& predicate(uint32_t place) { return *at<uint32_t>(place); }
  void set_predicate(uint32_t place, uint32_t lanes) {
    uint32_t& p = predicate(place);
    p = (p & ~mask) | (lanes & mask);
  }
};

// How a type lies in a register.
template <class T>
using Held = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <class T>
inline T value_of(Held<T> bits) {
  if constexpr (std::is_floating_point_v<T>) {
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
  } else {
    return static_cast<T>(bits);
  }
}
template <class T>
inline Held<T> bits_of(T value) {
  if constexpr (std::is_floating_point_v<T>) {
    Held<T> bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
  } else {
    return static_cast<std::make_unsigned_t<T>>(value);
  }
}

// Keeps the results of the lanes that execute.
template <class H>
inline void keep(WarpState& w, uint32_t place, const H (&results)[32]) {
  H* to = w.at<H>(place);
  if (w.mask == kAllLanes) {
    memcpy(to, results, sizeof results);
    return;
  }
  for (uint32_t m = w.mask; m; m &= m - 1) {
    int l = __builtin_ctz(m);
    to[l] = results[l];
  }
}

// d = f(a), d = f(a, b), d = f(a, b, c), lane by lane. `F::of` computes one.
template <class D, class A, class F>
void unary(WarpState& w, const Instruction& i) {
  const Held<A>* a = w.at<Held<A>>(i.s[0]);
  Held<D> r[32];
  for (int l = 0; l < 32; ++l) r[l] = bits_of<D>(F::of(value_of<A>(a[l])));
  keep(w, i.d[0], r);
}
template <class D, class A, class B, class F>
void binary(WarpState& w, const Instruction& i) {
  const Held<A>* a = w.at<Held<A>>(i.s[0]);
  const Held<B>* b = w.at<Held<B>>(i.s[1]);
  Held<D> r[32];
  for (int l = 0; l < 32; ++l) r[l] = bits_of<D>(F::of(value_of<A>(a[l]), value_of<B>(b[l])));
  keep(w, i.d[0], r);
}
template <class D, class A, class B, class C, class F>
void ternary(WarpState& w, const Instruction& i) {
  const Held<A>* a = w.at<Held<A>>(i.s[0]);
  const Held<B>* b = w.at<Held<B>>(i.s[1]);
  const Held<C>* c = w.at<Held<C>>(i.s[2]);
  Held<D> r[32];
  for (int l = 0; l < 32; ++l)
    r[l] = bits_of<D>(F::of(value_of<A>(a[l]), value_of<B>(b[l]), value_of<C>(c[l])));
  keep(w, i.d[0], r);
}

template <class F>
inline void each_lane(uint32_t mask, F f) {
  for (; mask; mask &= mask - 1) f(static_cast<uint32_t>(__builtin_ctz(mask)));
}

// The tables of forms, one of each file.
struct Forms {
  const Form* first;
  size_t count;
};
Forms arithmetic_forms();
Forms integer_forms();
Forms conversion_forms();
Forms memory_forms();
Forms warp_forms();
Forms bulk_forms();
Forms product_forms();

}  // namespace ptx
}  // namespace standin
