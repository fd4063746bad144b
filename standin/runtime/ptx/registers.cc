// Gives every register of a program its place among the warp's registers.
//
// The compiler names each value anew, thousands in a kernel; nearly all of them live and die between two
// branches. Those take turns in a few places, so that a warp's registers stay in the processor's cache.
#include <string.h>

#include <set>

#include "program.h"

namespace standin {
namespace ptx {
namespace {

constexpr uint32_t kUnseen = ~0u, kShared = ~0u - 1;

uint32_t bytes_of(char kind) {
  return kind == 'p' ? 4 : kind == 'w' ? 4 * kLanes : 8 * kLanes;
}

}  // namespace

// `kinds`: of each register; `operands`: of each instruction the registers that it writes, then those that it
// reads, by number; `fixed`: registers whose values are there from the start.
void place_registers(Program& program, const std::string& kinds, std::vector<std::vector<uint32_t>>& operands,
                     const std::set<uint32_t>& fixed) {
  size_t count = program.code.size();
  std::vector<bool> leads(count + 1, false);
  for (size_t at = 0; at < count; ++at) {
    const Instruction& i = program.code[at];
    if (i.flow == Flow::branch) leads[i.target] = true;
    if (i.flow == Flow::branch || i.flow == Flow::exit) leads[at + 1] = true;
  }

  // The one stretch between branches in which a register is used, if it is written there first.
  std::vector<uint32_t> home(kinds.size(), kUnseen), last(kinds.size(), 0);
  uint32_t stretch = 0;
  for (size_t at = 0; at < count; ++at) {
    if (leads[at]) ++stretch;
    const Instruction& i = program.code[at];
    auto see = [&](uint32_t id, bool written) {
      if (id == kNoRegister) return;
      last[id] = static_cast<uint32_t>(at);
      // A product uses its registers until it is waited for.
      if (strchr(i.form->operands, 'A')) home[id] = kShared;
      if (home[id] == kUnseen) home[id] = written && i.guard == kNoRegister ? stretch : kShared;
      else if (home[id] != stretch) home[id] = kShared;
    };
    if (i.guard != kNoRegister) see(i.guard, false);
    for (uint32_t id : operands[2 * at + 1]) see(id, false);
    for (uint32_t id : operands[2 * at]) see(id, true);
  }

  std::vector<uint32_t> place(kinds.size(), kNoRegister);
  uint32_t end = 0;
  auto fresh = [&](char kind) {
    uint32_t bytes = bytes_of(kind), aligned = (end + bytes - 1) / bytes * bytes;
    end = aligned + bytes;
    return aligned;
  };
  for (char kind : {'l', 'w', 'p'}) {
    for (uint32_t id = 0; id < kinds.size(); ++id) {
      bool turns = kind != 'p' && !fixed.count(id) && home[id] != kShared;
      if (kinds[id] == kind && !turns) place[id] = fresh(kind);
    }
  }
  std::vector<uint32_t> free_words, free_longs, used_words, used_longs;
  for (size_t at = 0; at < count; ++at) {
    if (leads[at]) {
      free_words.insert(free_words.end(), used_words.begin(), used_words.end());
      free_longs.insert(free_longs.end(), used_longs.begin(), used_longs.end());
      used_words.clear();
      used_longs.clear();
    }
    auto drop = [](std::vector<uint32_t>& used, std::vector<uint32_t>& available, uint32_t which) {
      for (size_t k = 0; k < used.size(); ++k) {
        if (used[k] != which) continue;
        available.push_back(which);
        used[k] = used.back();
        used.pop_back();
        return;
      }
    };
    for (uint32_t id : operands[2 * at]) {
      if (id == kNoRegister || place[id] != kNoRegister) continue;
      bool wide = kinds[id] == 'l';
      std::vector<uint32_t>& available = wide ? free_longs : free_words;
      if (available.empty()) available.push_back(fresh(kinds[id]));
      place[id] = available.back();
      available.pop_back();
      (wide ? used_longs : used_words).push_back(place[id]);
    }
    for (const auto* list : {&operands[2 * at], &operands[2 * at + 1]}) {
      for (uint32_t id : *list) {
        if (id == kNoRegister || last[id] != at || fixed.count(id) || home[id] == kShared || kinds[id] == 'p')
          continue;
        if (kinds[id] == 'l') drop(used_longs, free_longs, place[id]);
        else drop(used_words, free_words, place[id]);
      }
    }
  }

  size_t total = 0;
  for (const auto& list : operands) total += list.size();
  program.places.reserve(total);  // the instructions keep pointers into it
  for (size_t at = 0; at < count; ++at) {
    Instruction& i = program.code[at];
    auto put = [&](const std::vector<uint32_t>& ids) {
      const uint32_t* first = program.places.data() + program.places.size();
      for (uint32_t id : ids) program.places.push_back(id == kNoRegister ? kNoRegister : place[id]);
      return first;
    };
    i.written = static_cast<uint32_t>(operands[2 * at].size());
    i.read = static_cast<uint32_t>(operands[2 * at + 1].size());
    i.d = put(operands[2 * at]);
    i.s = put(operands[2 * at + 1]);
    if (i.guard != kNoRegister) i.guard = place[i.guard];
  }
  for (Constant& c : program.constants) c.place = place[c.place];
  for (auto& special : program.specials) special.first = place[special.first];
  program.register_bytes = (end + 255) / 256 * 256;
}

}  // namespace ptx
}  // namespace standin
