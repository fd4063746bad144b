// How each of the driver's functions begins: it takes the lock, refuses before cuInit, and repeats the error
// that broke the context.
#pragma once

#include "driver.h"

#define API extern "C" __attribute__((visibility("default"))) int
#define ENTER                                          \
  Machine& m = machine();                              \
  std::lock_guard<std::recursive_mutex> guard(m.lock); \
  (void)m
#define ENTER_CONTEXT                         \
  ENTER;                                      \
  if (!m.initialized) return kNotInitialized; \
  if (m.sticky) return m.sticky
