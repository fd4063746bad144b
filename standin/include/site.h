// A place in a kernel's source. Shared by kernels and runtime.
#pragma once

#include <string.h>

namespace standin {

struct Site {
  const char* file;
  int line;
  const char* callers = nullptr;  // ", called at …": the calls that this one was inlined into
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  // Whether it is the same line, whoever called it.
  bool is(const Site& other) const {
    return line == other.line && (file == other.file || !strcmp(file, other.file));
  }
};

}  // namespace standin
