#include "options.h"

#include <stdio.h>
#include <stdlib.h>

#include <algorithm>

namespace standin {
namespace {

uint64_t bytes_of(const std::string& text, bool* good) {
  char* end = nullptr;
  uint64_t value = strtoull(text.c_str(), &end, 0);
  uint64_t scale = 1;
  switch (*end) {
    case 'K': scale = 1ull << 10, ++end; break;
    case 'M': scale = 1ull << 20, ++end; break;
    case 'G': scale = 1ull << 30, ++end; break;
  }
  *good = end != text.c_str() && *end == 0;
  return value * scale;
}

bool set(Options& o, const std::string& key, const std::string& value) {
  bool good = true;
  auto number = [&] { return bytes_of(value, &good); };
  if (key == "checks") {
    if (value == "on") o.checks = Checks::on;
    else if (value == "bounds") o.checks = Checks::bounds;
    else if (value == "off") o.checks = Checks::off;
    else return false;
  } else if (key == "engine") {
    if (value == "host") o.engine = Engine::host;
    else if (value == "ptx") o.engine = Engine::ptx;
    else return false;
  } else if (key == "ptx") o.ptx = value;
  else if (key == "seed") o.seed = static_cast<uint32_t>(number());
  else if (key == "defer") {
    o.defer = value == "off" ? 0 : static_cast<uint32_t>(number());
    if (value == "off") good = true;
    else if (o.defer == 0) good = false;
  } else if (key == "threads") o.threads = static_cast<uint32_t>(number());
  else if (key == "counters") o.counters = value;
  else if (key == "order") o.order = value;
  else if (key == "contexts") o.contexts = value;
  else if (key == "cards") o.cards = static_cast<int>(number());
  else if (key == "sm") o.capability = static_cast<int>(number());
  else if (key == "multiprocessors") o.multiprocessors = static_cast<int>(number());
  else if (key == "driver") o.driver = static_cast<int>(number());
  else if (key == "memory") o.memory = number();
  else if (key == "gap") o.gap = number();
  else if (key == "name") o.name = value;
  else if (key == "blaslt") o.blaslt = number();
  else if (key == "fail_allocation") o.fail_allocation = number();
  else if (key == "fail_launch") o.fail_launch = number();
  else if (key == "fail_code") o.fail_code = static_cast<int>(number());
  else if (key == "fail_pinned") o.fail_pinned = number();
  else if (key == "refuse_algorithm") o.refuse_algorithm = static_cast<int>(number());
  else if (key == "algorithms") o.algorithms = static_cast<int>(number());
  else if (key == "heuristic") {
    if (value == "refusal") o.heuristic = Finding::refusal;
    else if (value == "nothing") o.heuristic = Finding::nothing;
    else if (value == "unfit") o.heuristic = Finding::unfit;
    else return false;
  } else if (key == "refuse_epilogues") {
    o.refused_epilogues.clear();
    for (size_t at = 0; at < value.size();) {
      size_t end = std::min(value.find('+', at), value.size());
      bool one = false;
      o.refused_epilogues.push_back(static_cast<uint32_t>(bytes_of(value.substr(at, end - at), &one)));
      good = good && one;
      at = end + 1;
    }
  } else if (key == "tensor_cores") {
    o.truncate = value == "truncate";
    if (!o.truncate && value != "round") return false;
  }
  else if (key == "init_code") o.init_code = static_cast<int>(number());
  else if (key == "thin") {
    if (value == "invalid") o.thin = Thin::invalid;
    else if (value == "unsupported") o.thin = Thin::unsupported;
    else return false;
  } else if (key == "split_fault") o.split_fault = number() != 0;
  else if (key == "no_split_epilogue") o.no_split_epilogue = number() != 0;
  else if (key == "first_algorithm") o.first_algorithm = static_cast<int>(number());
  else if (key == "wrong_algorithm") o.wrong_algorithm = static_cast<int>(number());
  else if (key == "fail_algorithm") o.fail_algorithm = static_cast<int>(number());
  else if (key == "fail_status") o.fail_status = static_cast<int>(number());
  else if (key == "slow_epilogue") o.slow_epilogue = number();
  else if (key == "slow_kernels") o.slow_kernels = number();
  else if (key == "skip_barrier") o.skip_barrier = value;
  else if (key == "nccl") o.nccl = static_cast<int>(number());
  else if (key == "bus") o.bus = static_cast<int>(number());
  else if (key == "nccl_fault") o.nccl_fault = value;
  else if (key == "nccl_timeout") o.nccl_timeout = number();
  else if (key == "nccl_progress") o.nccl_progress = static_cast<int>(number());
  else return false;
  return good;
}

bool set_all(Options& o, const std::string& text, std::string* wrong) {
  for (size_t at = 0; at < text.size();) {
    size_t end = text.find(',', at);
    if (end == std::string::npos) end = text.size();
    std::string part = text.substr(at, end - at);
    size_t equals = part.find('=');
    if (!part.empty() &&
        (equals == std::string::npos || !set(o, part.substr(0, equals), part.substr(equals + 1)))) {
      *wrong = part;
      return false;
    }
    at = end + 1;
  }
  return true;
}

Options from_environment() {
  Options o;
  const char* text = getenv("VITRUM_STANDIN");
  std::string wrong;
  if (text && !set_all(o, text, &wrong)) {
    fprintf(stderr, "stand-in GPU: cannot read `%s` in VITRUM_STANDIN\n", wrong.c_str());
    exit(2);
  }
  return o;
}

Options& current() {
  static Options o = from_environment();
  return o;
}

}  // namespace

const Options& options() {
  return current();
}

void reset_options() {
  current() = from_environment();
}

bool configure(const char* text, std::string* wrong) {
  Options next = current();
  if (!set_all(next, text, wrong)) return false;
  current() = next;
  return true;
}

}  // namespace standin
