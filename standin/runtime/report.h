// Reports: what went wrong, where in the kernel's source, and the corresponding error code of the driver.
#pragma once

#include <stdarg.h>
#include <stdint.h>

#include <string>

#include "../include/site.h"
#include "export.h"

namespace standin {

// The driver's error codes that a kernel can cause.
constexpr int kIllegalAddress = 700, kMisaligned = 716, kLaunchFailed = 719;

struct Report {
  int code = 0;
  std::string text;
};

STANDIN_EXPORT std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

// `file:line` of a call, and of a code address with the functions it was inlined into (through `addr2line`).
std::string place(Site site);
std::string place(const void* pc);

// Keeps a report for `standin_report`, and prints it unless the caller may have expected it.
STANDIN_EXPORT void publish(const Report& report, bool print = true);

}  // namespace standin
