// When submitted work runs: as late as possible, in one of the orders that a GPU might choose.
//
// Nothing runs before something waits for it, except that after some waits the GPU is "eager" for a while and may begin
// with work as soon as it is submitted. A wait runs what it needs; in one case of four, other work that is ready runs in
// between. The seed of the option `defer` decides all of it.
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "driver.h"
#include "handles.h"
#include "memory.h"
#include "options.h"
#include "report.h"

namespace standin {
namespace {

struct Issued {
  uint32_t slot;
  uint64_t time;
};
Issued issued[1 << 16];
uint32_t last_tag = 0;

// Where a driver stops accepting launches and waits. The manual gives no number.
constexpr size_t kMostQueued = 1024;

// A number for the next operation. When they run out, the past is discarded and they start again.
uint32_t next_tag() {
  if (++last_tag > 0xffff) {
    forget_traces();
    last_tag = 1;
  }
  return last_tag;
}

// SplitMix64.
uint64_t random(uint64_t below) {
  uint64_t z = machine().random += 0x9e3779b97f4a7c15ull;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return (z ^ z >> 31) % below;
}

// Whether all of a clock has run, apart from the operation itself.
bool reached(const StreamClock& clock, const Stream* own) {
  const Machine& m = machine();
  for (uint32_t s = 0; s < kStreams; ++s) {
    if (m.done[s] + (own && own->slot == s) < clock.time[s]) return false;
  }
  return true;
}
bool ready(const Stream& stream) {
  const Operation& first = stream.queue.front();
  return reached(first.ordered, first.task ? &stream : nullptr);
}

// The context is broken: its work is over, and nobody waits for it in vain.
void abandon(const Primary* context) {
  Machine& m = machine();
  for (Stream* s : m.streams) {
    if (!s || s->context != context) continue;
    for (Operation& o : s->queue) {
      if (o.point) o.point->done = true;
    }
    s->queue.clear();
    m.done[s->slot] = s->clock.time[s->slot];
  }
}

// Runs the first operation of a stream, or a part of it. False if that one waits for other processes.
bool run_first(Stream& stream) {
  Machine& m = machine();
  Operation now = std::move(stream.queue.front());
  stream.queue.pop_front();
  if (now.point) {
    now.point->done = true;
    now.point->seconds = seconds_now();
    return true;
  }
  uint64_t time = now.ordered.time[stream.slot];
  if (!now.tag) {
    now.tag = next_tag();
    issued[now.tag] = {stream.slot, time};
  }
  CallOf call(now.call);
  Running running{now.tag, now.ordered.time, stream.context, now.launch};
  if (now.part && !stream.context->sticky) {
    Advance state = now.part(running);
    if (state != Advance::done && !stream.context->sticky) {
      stream.queue.push_front(std::move(now));
      return state == Advance::moved;
    }
  }
  m.done[stream.slot] = time;
  if (!now.part && !stream.context->sticky) now.task->run(running);
  if (stream.context->sticky) abandon(stream.context);
  return true;
}

// Passes the points whose work has run, and lets go of destroyed streams that are done.
void settle() {
  Machine& m = machine();
  for (bool more = true; more;) {
    more = false;
    for (Stream* s : m.streams) {
      while (s && !s->queue.empty() && s->queue.front().point && ready(*s)) {
        run_first(*s);
        more = true;
      }
    }
  }
  for (Stream* s : m.streams) {
    if (s && s->closing && s->queue.empty()) m.let_go(s);
  }
}

// Runs one ready operation, of those that `goal` contains if there is one. False if there is none.
bool run_any(const StreamClock* goal) {
  Stream* found[kStreams];
  uint32_t count = 0;
  for (Stream* s : machine().streams) {
    if (!s || s->queue.empty() || !ready(*s)) continue;
    const Operation& first = s->queue.front();
    if (goal && first.ordered.time[s->slot] > goal->time[s->slot]) continue;
    found[count++] = s;
  }
  bool moved = false;
  while (count && !moved) {
    uint64_t which = random(count);
    moved = run_first(*found[which]);
    found[which] = found[--count];
  }
  settle();
  return moved;
}

// Whether an operation has begun that needs other processes to go on.
bool waits_for_others() {
  for (Stream* s : machine().streams) {
    if (s && !s->queue.empty() && s->queue.front().part && ready(*s)) return true;
  }
  return false;
}

void note_order(const Task& task, const Stream& stream, const StreamClock& ordered) {
  const std::string& path = options().order;
  if (path.empty() || !task.what) return;
  FILE* file = fopen(path.c_str(), "a");
  if (!file) return;
  fprintf(file, "{\"what\":\"%s\",\"bytes\":%llu,\"stream\":%u,\"after\":{", task.what,
          static_cast<unsigned long long>(task.bytes), stream.slot);
  const char* comma = "";
  for (uint32_t s = 0; s < kStreams; ++s) {
    if (!ordered.time[s]) continue;
    fprintf(file, "%s\"%u\":%llu", comma, s, static_cast<unsigned long long>(ordered.time[s]));
    comma = ",";
  }
  fprintf(file, "}}\n");
  fclose(file);
}

// What comes before the stream's next operation besides its own.
void join_others(Stream& stream) {
  Machine& m = machine();
  stream.clock.join(m.host);
  if (stream.legacy) {
    stream.clock.join(stream.context->ended_blocking);
    for (Stream* other : m.streams) {
      if (other && other->blocking && other->context == stream.context) stream.clock.join(other->clock);
    }
  } else if (stream.blocking) {
    stream.clock.join(stream.context->legacy->clock);
  }
}

int issue(Stream& stream, const std::shared_ptr<const Task>& task) {
  Machine& m = machine();
  join_others(stream);
  ++stream.clock.time[stream.slot];
  Operation o;
  o.task = task;
  o.ordered = stream.clock;
  o.call = Call::name();
  if (task->kernel) o.launch = ++m.launches;
  if (task->start) o.part = task->start();
  note_order(*task, stream, o.ordered);
  if (task->host) refuse_freed(task->host);
  // Until the copy is done, nobody may count on what is there.
  if (task->writes_host && !in_flight(task->host, task->host_bytes, true)) {
    memset(reinterpret_cast<void*>(task->host), 0xff, task->host_bytes);
  }
  stream.queue.push_back(std::move(o));
  if (!options().defer) {
    StreamClock all = stream.clock;
    if (task->start) wait_for(all);
    else run_first(stream);
    return stream.context->sticky;
  }
  if (stream.queue.size() >= kMostQueued) {
    for (size_t i = 0; i < kMostQueued / 2 && run_any(nullptr); ++i) {
    }
  } else if (m.eager) {
    while (random(2) && run_any(nullptr)) {
    }
  }
  return 0;
}

}  // namespace

bool ordered_before(uint32_t tag, const uint64_t* ordered) {
  return ordered[issued[tag].slot] >= issued[tag].time;
}

uint32_t stream_of(uint32_t tag) {
  return issued[tag].slot;
}

int submit(Stream* stream, Task task) {
  Machine& m = machine();
  if (Capture* capture = stream->capture.get()) {
    if (capture->broken) return kCaptureInvalidated;
    capture->nodes.push_back(
        {Node::work, stream->lane, std::make_shared<const Task>(std::move(task)), 0, nullptr});
    ++capture->last[stream->lane];
    return 0;
  }
  if (stream->legacy) {
    if (int code = m.refuse_legacy(stream->context)) return code;
  }
  return issue(*stream, std::make_shared<const Task>(std::move(task)));
}

std::shared_ptr<Point> record(Stream& stream) {
  join_others(stream);
  Operation o;
  o.point = std::make_shared<Point>();
  o.point->clock = o.ordered = stream.clock;
  std::shared_ptr<Point> point = o.point;
  stream.queue.push_back(std::move(o));
  if (!options().defer) settle();
  return point;
}

void wait_for(const StreamClock& goal) {
  Machine& m = machine();
  bool others = random(4) == 0;
  settle();
  for (unsigned idle = 0; !reached(goal, nullptr);) {
    // Operations of other processes may need ours of another stream first.
    if (run_any(others ? nullptr : &goal) || (!others && run_any(nullptr))) {
      idle = 0;
      continue;
    }
    if (!waits_for_others()) {
      fprintf(stderr, "stand-in GPU: work that can never run\n");
      abort();
    }
    idle = idle < 1000 ? idle + 25 : idle;
    m.lock.pause(idle);
  }
  m.eager = random(4) == 0;
}

bool has_run(const StreamClock& clock) {
  return reached(clock, nullptr);
}

void work_a_little() {
  settle();
  while (random(2) && run_any(nullptr)) {
  }
}

void finish_all(const Primary* context) {
  StreamClock goal;
  for (Stream* s : machine().streams) {
    if (s && (!context || s->context == context)) goal.join(s->clock);
  }
  wait_for(goal);
}

const char* in_flight(uint64_t address, size_t bytes, bool reads) {
  for (Stream* s : machine().streams) {
    if (!s) continue;
    for (const Operation& o : s->queue) {
      if (!o.task || !o.task->host || (reads && o.task->writes_host)) continue;
      if (o.task->host < address + bytes && address < o.task->host + o.task->host_bytes) return o.call;
    }
  }
  return nullptr;
}

int replay(Graph& graph, Stream& stream) {
  for (const Node& node : *graph.nodes) {
    // A graph may outlive its module.
    if (node.kind == Node::work && node.task->kernel) live(Kind::function, node.task->kernel);
  }
  if (stream.legacy) {
    if (int code = machine().refuse_legacy(stream.context)) return code;
  }
  join_others(stream);
  // Launches of one executable graph follow each other.
  stream.clock.join(graph.last);
  std::vector<Stream*> lanes(graph.lanes.size() + 1);
  lanes[0] = &stream;
  for (size_t l = 0; l < graph.lanes.size(); ++l) {
    lanes[l + 1] = graph.lanes[l];
    graph.lanes[l]->clock.join(stream.clock);
  }
  std::vector<StreamClock> events(graph.events);
  for (const Node& node : *graph.nodes) {
    Stream& lane = *lanes[node.lane];
    switch (node.kind) {
      case Node::work:
        if (int code = issue(lane, node.task)) return code;
        break;
      case Node::record: events[node.event] = lane.clock; break;
      case Node::wait: lane.clock.join(events[node.event]); break;
      case Node::outside: object_of<Event>(live(Kind::event, node.target)).point = record(lane); break;
    }
  }
  for (Stream* lane : lanes) stream.clock.join(lane->clock);
  graph.last = stream.clock;
  return 0;
}

}  // namespace standin
