#include "handles.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <deque>
#include <map>
#include <unordered_set>
#include <vector>

#include "driver.h"
#include "memory.h"
#include "options.h"
#include "report.h"

namespace standin {
namespace {

const char* const kNames[] = {
    "stream",
    "event",
    "graph",
    "executable graph",
    "module",
    "function",
    "device allocation",
    "page-locked allocation",
    "registered range",
    "cuBLASLt handle",
};
const char* name_of(Kind kind) {
  return kNames[static_cast<size_t>(kind)];
}

std::string one(Kind kind) {
  const char* name = name_of(kind);
  return std::string(strchr("aeiou", *name) ? "an " : "a ") + name;
}

// All records ever made; their addresses never change.
struct Records {
  std::deque<Record> all;
  std::unordered_set<const void*> known;
  uint64_t made[std::size(kNames)] = {};
  std::map<uint64_t, Record*> memory;  // by its start; a later allocation there replaces the record
};
Records& records() {
  static Records* r = new Records;
  return *r;
}

thread_local const char* current_call = nullptr;

std::string in_words(const Record& r) {
  return format("%s %llu, made by %s", name_of(r.kind), static_cast<unsigned long long>(r.number), r.made_by);
}

// Why the handle may not be used any more; empty if it may.
std::string why_dead(const Record& r) {
  if (r.ended_by) return format("was destroyed already, by %s", r.ended_by);
  if (r.context && r.context->ended_by) {
    return format("its context was released before, by %s: a driver crashes here", r.context->ended_by);
  }
  if (r.module && r.module->ended_by) {
    return format("its module, %s, was unloaded by %s", in_words(*r.module).c_str(), r.module->ended_by);
  }
  return "";
}

void refuse_dead(const Record& r) {
  std::string why = why_dead(r);
  if (!why.empty()) misuse(in_words(r) + ": " + why);
}

// The record of the memory that contains an address.
Record* memory_at(uint64_t address) {
  auto& memory = records().memory;
  auto after = memory.upper_bound(address);
  if (after == memory.begin()) return nullptr;
  Record* r = std::prev(after)->second;
  return address < r->address + r->bytes ? r : nullptr;
}

bool is_memory(const Record& r) {
  return r.kind == Kind::device_memory || r.kind == Kind::host_memory;
}

}  // namespace

void give_back(const Record& r) {
  if (r.kind == Kind::device_memory) {
    const char* how = r.ended_by ? "freed by" : "whose context was released by";
    release(r.address, format("%s %llu, %s %s", name_of(r.kind), static_cast<unsigned long long>(r.number),
                              how, r.ended_by ? r.ended_by : r.context->ended_by));
  } else {
    // The addresses stay reserved, so that any later use is noticed, by the host itself or by a copy.
    auto* at = reinterpret_cast<void*>(r.address);
    madvise(at, r.bytes, MADV_DONTNEED);
    mprotect(at, r.bytes, PROT_NONE);
  }
}

void mark_ended(Record& memory) {
  memory.ended_by = Call::name();
}

Call::Call(const char* name) : outermost_(!current_call) {
  if (outermost_) current_call = name;
}
Call::~Call() {
  if (outermost_) current_call = nullptr;
}
const char* Call::name() {
  return current_call ? current_call : "a call";
}

CallOf::CallOf(const char* name) : before_(current_call) {
  current_call = name;
}
CallOf::~CallOf() {
  current_call = before_;
}

void misuse(const std::string& what) {
  publish({0, format("%s: %s", Call::name(), what.c_str())});
  fflush(nullptr);
  abort();
}

Record* make_handle(Kind kind, Primary* context, std::shared_ptr<void> object) {
  Records& r = records();
  r.all.emplace_back();
  Record& made = r.all.back();
  made.kind = kind;
  made.number = ++r.made[static_cast<size_t>(kind)];
  made.context = context;
  made.made_by = Call::name();
  made.object = std::move(object);
  r.known.insert(&made);
  return &made;
}

Record& live(Kind kind, const void* handle) {
  if (!records().known.count(handle)) misuse(format("%p is no handle of %s", handle, one(kind).c_str()));
  Record& r = *static_cast<Record*>(const_cast<void*>(handle));
  if (r.kind != kind) misuse(in_words(r) + ", where " + one(kind) + " is wanted");
  refuse_dead(r);
  return r;
}

int end(Record& r) {
  r.ended_by = Call::name();
  r.object.reset();
  if (is_memory(r)) give_back(r);
  return r.context ? r.context->sticky : 0;
}

void same_context(const Record& a, const Record& b) {
  if (a.context == b.context) return;
  misuse(format("%s for card %d, with %s for card %d", in_words(a).c_str(), a.context->card,
                in_words(b).c_str(), b.context->card));
}
void same_context(const Record& r, const Primary& current) {
  if (r.context == &current) return;
  misuse(format("%s for card %d, in the context of card %d", in_words(r).c_str(), r.context->card,
                current.card));
}

Record* make_memory(Kind kind, Primary* context, uint64_t address, size_t bytes) {
  auto& memory = records().memory;
  memory.erase(memory.lower_bound(address), memory.lower_bound(address + bytes));
  Record* r = make_handle(kind, context, nullptr);
  r->address = address;
  r->bytes = bytes;
  return memory[address] = r;
}

Record& live_memory(Kind kind, uint64_t address) {
  auto at = records().memory.find(address);
  if (at == records().memory.end() || at->second->kind != kind) {
    char where[256];
    misuse(format("%p is no %s: %s", reinterpret_cast<void*>(address), name_of(kind),
                  nearest_allocation(address, where, sizeof where)));
  }
  refuse_dead(*at->second);
  return *at->second;
}

void refuse_freed(uint64_t address) {
  Record* r = memory_at(address);
  if (r && r->kind == Kind::host_memory) refuse_dead(*r);
}

void refuse_in_use(const Record& memory) {
  const char* call = in_flight(memory.address, memory.bytes, false);
  if (!call) return;
  misuse(format("%s: the copy that %s submitted has not run; wait for its stream first",
                in_words(memory).c_str(), call));
}

bool page_locked(uint64_t address) {
  Record* r = memory_at(address);
  bool locked = r && (r->kind == Kind::host_memory || r->kind == Kind::registered_memory);
  return locked && why_dead(*r).empty();
}

void refuse_foreign(uint64_t address, const Primary& context) {
  if (!device.contains(address)) return;
  Record* r = memory_at(address);
  if (r && r->context && why_dead(*r).empty()) same_context(*r, context);
}

ContextStack& context_stack() {
  thread_local ContextStack stack;
  return stack;
}

int current_context(Primary** context) {
  ContextStack& stack = context_stack();
  if (stack.depth == 0) return kInvalidContext;
  *context = stack.cards[stack.depth - 1]->context;
  return *context ? (*context)->sticky : kContextIsDestroyed;
}

Card& card(int index) {
  static auto* cards = new std::map<int, Card>;
  return cards->try_emplace(index, Card{index}).first->second;
}

Card* card_of(const void* context) {
  for (int i = 0; i < options().cards; ++i) {
    if (&card(i) == context) return &card(i);
  }
  return nullptr;
}

bool begin_context(Card& card) {
  auto* context = new Primary{card.index};
  context->legacy = machine().new_stream(context, false);
  if (!context->legacy) return false;
  context->legacy->legacy = true;
  card.context = context;
  note_context("context", "made", card.index);
  return true;
}

void end_context(Card& card) {
  Primary* context = card.context;
  finish_all(context);
  context->ended_by = Call::name();
  for (Record& r : records().all) {
    if (r.context != context || r.ended_by) continue;
    r.object.reset();
    if (is_memory(r)) give_back(r);
  }
  machine().drop_stream(context->legacy);
  context->legacy = nullptr;
  card.context = nullptr;
  note_context("context", "destroyed", card.index);
}

void note_context(const char* what, const char* state, int card) {
  const std::string& path = options().contexts;
  if (path.empty()) return;
  FILE* file = fopen(path.c_str(), "a");
  if (!file) return;
  fprintf(file, "{\"%s\":\"%s\",\"card\":%d,\"process\":%d}\n", what, state, card,
          static_cast<int>(getpid()));
  fclose(file);
}

}  // namespace standin
