// A place in a kernel's source. Shared by kernels and runtime.
#pragma once

namespace standin {

struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

}  // namespace standin
