#include "report.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include <mutex>

namespace standin {

std::string format(const char* pattern, ...) {
  va_list list, again;
  va_start(list, pattern);
  va_copy(again, list);
  std::string text(static_cast<size_t>(vsnprintf(nullptr, 0, pattern, list)), '\0');
  vsnprintf(&text[0], text.size() + 1, pattern, again);
  va_end(list);
  va_end(again);
  return text;
}

namespace {

// The part of a path that a reader needs: starting at `kernels/` or `bugs/`, else the file name.
std::string short_path(const std::string& path) {
  for (const char* folder : {"kernels/", "standin/"}) {
    size_t at = path.rfind(folder);
    if (at != std::string::npos) return path.substr(at);
  }
  size_t slash = path.rfind('/');
  return slash == std::string::npos ? path : path.substr(slash + 1);
}

}  // namespace

std::string place(Site site) {
  return format("%s:%d%s", short_path(site.file).c_str(), site.line, site.callers ? site.callers : "");
}

std::string place(const void* pc) {
  Dl_info info;
  if (!dladdr(pc, &info) || !info.dli_fname) return format("code address %p", pc);
  // The hook returns to the instruction after the access: look one byte before.
  size_t offset =
      static_cast<size_t>(static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase)) - 1;
  std::string unknown = format("%s+0x%zx", short_path(info.dli_fname).c_str(), offset);
  FILE* pipe = popen(format("addr2line -ifCe '%s' 0x%zx 2>/dev/null", info.dli_fname, offset).c_str(), "r");
  if (!pipe) return unknown;
  std::string text;
  char line[1024];
  for (int row = 0, shown = 0; fgets(line, sizeof line, pipe); ++row) {
    if (row % 2 == 0) continue;  // the function's name; the line says enough
    std::string at = line;
    while (!at.empty() && (at.back() == '\n' || at.back() == ')')) at.pop_back();
    size_t extra = at.find(" (disc");
    if (extra != std::string::npos) at.resize(extra);
    // The accessors themselves are not the place that a reader looks for.
    bool accessor = at.find("standin.cuh:") != std::string::npos || at.find("ptx.cuh:") != std::string::npos;
    if (accessor || at.find("??") != std::string::npos || shown == 4) continue;
    text += (shown++ ? ", called at " : "") + short_path(at);
  }
  pclose(pipe);
  return text.empty() ? unknown : text;
}

namespace {
std::mutex last_lock;
std::string last_text;
}  // namespace

void publish(const Report& report, bool print) {
  std::lock_guard<std::mutex> guard(last_lock);
  last_text = report.text;
  if (print) fprintf(stderr, "stand-in GPU: %s\n", report.text.c_str());
}

extern "C" __attribute__((visibility("default"))) size_t standin_report(char* buffer, size_t bytes) {
  std::lock_guard<std::mutex> guard(last_lock);
  if (buffer && bytes) {
    size_t n = last_text.size() < bytes - 1 ? last_text.size() : bytes - 1;
    memcpy(buffer, last_text.data(), n);
    buffer[n] = 0;
  }
  return last_text.size();
}

extern "C" __attribute__((visibility("default"))) void standin_forget_report() {
  std::lock_guard<std::mutex> guard(last_lock);
  last_text.clear();
}

}  // namespace standin
