// Common beginning of the driver's functions: takes the lock, notes the function's name for reports, and fails where a
// driver does: before cuInit, for a GPU that does not exist, without a context, in a context broken by an error.
#pragma once

#include "driver.h"
#include "options.h"

#define API extern "C" __attribute__((visibility("default"))) int
#define ENTER                           \
  Machine& m = machine();               \
  std::lock_guard<Lock> guard(m.lock);  \
  Call call(__func__);                  \
  (void)m
#define ENTER_INITIALIZED \
  ENTER;                  \
  if (!m.initialized) return kNotInitialized
#define ENTER_CARD(device) \
  ENTER_INITIALIZED;       \
  if ((device) < 0 || (device) >= options().cards) return kInvalidDevice
// Defines `context`, the current one.
#define ENTER_CONTEXT                                    \
  ENTER_INITIALIZED;                                     \
  Primary* context;                                      \
  if (int code = current_context(&context)) return code; \
  (void)context
// Defines `s`, the stream of a handle; its context need not be current.
#define ENTER_STREAM(handle) \
  ENTER_INITIALIZED;         \
  Stream* s;                 \
  if (int code = find_stream(handle, &s)) return code
