// The driver's streams, events and captured graphs.
#include <time.h>

#include <algorithm>
#include <atomic>

#include "api.h"
#include "options.h"

namespace standin {

Graph::~Graph() {
  for (Stream* lane : lanes) machine().drop_stream(lane);
}

namespace {

uint64_t this_thread() {
  static std::atomic<uint64_t> last{0};
  thread_local uint64_t number = ++last;
  return number;
}

// Breaks the captures that `which` is true for, by one of their streams; `code` if there are any, else 0.
template <class F>
int break_captures(int code, F which) {
  int found = 0;
  for (Stream* s : machine().streams) {
    if (!s || !s->capture || !which(*s)) continue;
    s->capture->broken = found = code;
  }
  return found;
}

}  // namespace

// NVIDIA, cuThreadExchangeStreamCaptureMode: a thread may not make potentially unsafe calls while it captures itself,
// unless in relaxed mode, or while any thread captures in global mode.
int Machine::refuse_unsafe() {
  return break_captures(kCaptureUnsupported, [](const Stream& s) {
    return s.capture->mode == 0 || (s.capture->mode == 1 && s.capture->thread == this_thread());
  });
}

// NVIDIA, CUDA C++ Programming Guide, prohibited operations: neither may a handle be waited for that encompasses a
// captured stream, in any mode and thread.
int Machine::refuse_context(const Primary* context) {
  return break_captures(kCaptureUnsupported, [=](const Stream& s) { return s.context == context; });
}

int Machine::refuse_legacy(const Primary* context) {
  return break_captures(kCaptureImplicit,
                        [=](const Stream& s) { return s.blocking && s.context == context; });
}

namespace {

// Whether the stream may be waited for, or asked.
int may_wait(Stream* stream) {
  if (stream->capture) return stream->capture->broken = kCaptureUnsupported;
  if (stream->legacy) {
    if (int code = machine().refuse_legacy(stream->context)) return code;
  }
  return machine().refuse_unsafe();
}

}  // namespace

int synchronize(Stream* stream) {
  if (int code = may_wait(stream)) return code;
  std::shared_ptr<Point> now = record(*stream);
  wait_for(now->clock);
  machine().host.join(now->clock);
  return stream->context->sticky;
}

double seconds_now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec) + machine().ahead;
}

}  // namespace standin

using namespace standin;

// Define the object of a handle, and its record. The context is the handle's, whichever is current.
#define ENTER_EVENT(handle)                                              \
  ENTER_INITIALIZED;                                                     \
  if (!(handle)) return kInvalidHandle;                                  \
  Record& event_record = live(Kind::event, handle);                      \
  if (event_record.context->sticky) return event_record.context->sticky; \
  Event& e = object_of<Event>(event_record)
#define ENTER_GRAPH(kind, handle)                                        \
  ENTER_INITIALIZED;                                                     \
  if (!(handle)) return kInvalidValue;                                   \
  const Record& graph_record = live(kind, handle);                       \
  if (graph_record.context->sticky) return graph_record.context->sticky; \
  Graph& g = object_of<Graph>(graph_record)

// ---- streams and events -----------------------------------------------------------------------------------

API cuStreamCreateWithPriority(void** stream, unsigned flags, int) {
  ENTER_CONTEXT;
  Stream* made = m.new_stream(context, !(flags & 1));
  if (!made) return kOutOfMemory;
  auto drop = [](void* s) { machine().drop_stream(static_cast<Stream*>(s)); };
  *stream = make_handle(Kind::stream, context, {made, drop});
  return 0;
}
API cuStreamCreate(void** stream, unsigned flags) {
  ENTER;
  return cuStreamCreateWithPriority(stream, flags, 0);
}
API cuStreamDestroy_v2(void* stream) {
  ENTER_INITIALIZED;
  if (reinterpret_cast<uintptr_t>(stream) <= 2) return kInvalidHandle;
  return end(live(Kind::stream, stream));
}
API cuStreamSynchronize(void* stream) {
  ENTER_STREAM(stream);
  return synchronize(s);
}
API cuStreamQuery(void* stream) {
  ENTER_STREAM(stream);
  if (int code = may_wait(s)) return code;
  std::shared_ptr<Point> now = record(*s);
  work_a_little();
  if (s->context->sticky) return s->context->sticky;
  if (!has_run(now->clock)) return kNotReady;
  m.host.join(now->clock);
  return 0;
}
// Stream and event may belong to different contexts.
API cuStreamWaitEvent(void* stream, void* event, unsigned) {
  ENTER_EVENT(event);
  Stream* s;
  if (int code = find_stream(stream, &s)) return code;
  std::shared_ptr<Capture> from = e.capture.lock();
  if (!from) {
    if (!e.point) return 0;
    // A wait for work outside the graph would not be part of it.
    if (s->capture) return s->capture->broken = kCaptureIsolation;
    if (s->legacy) {
      if (int code = m.refuse_legacy(s->context)) return code;
    }
    s->clock.join(e.point->clock);
    return 0;
  }
  if (from->broken) return kCaptureInvalidated;
  if (!s->capture) {
    if (s->legacy) return from->broken = kCaptureImplicit;
    s->capture = from;
    s->lane = from->lanes++;
    from->members.push_back(s);
    from->last.push_back(0);
    from->seen.emplace_back(from->lanes, 0);
  } else if (s->capture != from) {
    return s->capture->broken = from->broken = kCaptureMerge;
  }
  from->nodes.push_back({Node::wait, s->lane, nullptr, e.number, nullptr});
  auto& seen = from->seen[s->lane];
  const auto& other = from->event_seen[e.number];
  if (seen.size() < from->lanes) seen.resize(from->lanes);
  for (size_t l = 0; l < other.size(); ++l) seen[l] = std::max(seen[l], other[l]);
  return 0;
}
API cuEventCreate(void** event, unsigned flags) {
  ENTER_CONTEXT;
  auto made = std::make_shared<Event>();
  made->timed = !(flags & 2);
  *event = make_handle(Kind::event, context, made);
  return 0;
}
API cuEventDestroy_v2(void* event) {
  ENTER_INITIALIZED;
  if (!event) return kInvalidHandle;
  return end(live(Kind::event, event));
}
API cuEventRecordWithFlags(void* event, void* stream, unsigned flags) {
  ENTER_EVENT(event);
  Stream* s;
  if (int code = find_stream(stream, &s)) return code;
  if (s->legacy) same_context(event_record, *s->context);
  else same_context(event_record, live(Kind::stream, stream));
  if (Capture* c = s->capture.get()) {
    if (c->broken) return kCaptureInvalidated;
    if (flags & 1) {
      c->nodes.push_back({Node::outside, s->lane, nullptr, 0, &event_record});
      return 0;
    }
    e.capture = s->capture;
    e.number = c->events++;
    auto seen = c->seen[s->lane];
    seen.resize(c->lanes);
    seen[s->lane] = c->last[s->lane];
    c->event_seen.push_back(seen);
    c->nodes.push_back({Node::record, s->lane, nullptr, e.number, nullptr});
    return 0;
  }
  if (s->legacy) {
    if (int code = m.refuse_legacy(s->context)) return code;
  }
  e.capture.reset();
  e.point = record(*s);
  return 0;
}
API cuEventRecord(void* event, void* stream) {
  ENTER;
  return cuEventRecordWithFlags(event, stream, 0);
}
// Whether an event may be waited for, or asked.
static int may_wait(const Event& e) {
  if (std::shared_ptr<Capture> c = e.capture.lock()) return c->broken = kCapturedEvent;
  return machine().refuse_unsafe();
}
API cuEventSynchronize(void* event) {
  ENTER_EVENT(event);
  if (int code = may_wait(e)) return code;
  // Another record of the event does not change what is waited for.
  std::shared_ptr<Point> point = e.point;
  if (!point) return 0;
  wait_for(point->clock);
  m.host.join(point->clock);
  return event_record.context->sticky;
}
API cuEventQuery(void* event) {
  ENTER_EVENT(event);
  if (int code = may_wait(e)) return code;
  if (!e.point) return 0;
  work_a_little();
  if (event_record.context->sticky) return event_record.context->sticky;
  if (!e.point->done) return kNotReady;
  m.host.join(e.point->clock);
  return 0;
}
API cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
  ENTER_EVENT(start);
  if (!end) return kInvalidHandle;
  const Record& end_record = live(Kind::event, end);
  same_context(event_record, end_record);
  const Event& last = object_of<Event>(end_record);
  if (!e.capture.expired() || !last.capture.expired()) return kCapturedEvent;
  if (!e.point || !last.point || !e.timed || !last.timed) return kInvalidHandle;
  if (!e.point->done || !last.point->done) return kNotReady;
  *milliseconds = static_cast<float>(1e3 * (last.point->seconds - e.point->seconds));
  return 0;
}
API cuEventElapsedTime(float* milliseconds, void* start, void* end) {
  ENTER;
  return cuEventElapsedTime_v2(milliseconds, start, end);
}

// ---- graphs -----------------------------------------------------------------------------------------------

API cuStreamBeginCapture_v2(void* stream, int mode) {
  ENTER_STREAM(stream);
  if (s->legacy) return kCaptureUnsupported;
  if (s->capture) return s->capture->broken = kCaptureUnsupported;
  if (mode < 0 || mode > 2) return kInvalidValue;
  s->capture = std::make_shared<Capture>();
  s->capture->origin = s;
  s->capture->mode = mode;
  s->capture->thread = this_thread();
  s->capture->members.push_back(s);
  s->capture->last.push_back(0);
  s->capture->seen.emplace_back(1, 0);
  s->lane = 0;
  return 0;
}
API cuStreamIsCapturing(void* stream, int* status) {
  ENTER_STREAM(stream);
  const Capture* c = s->capture.get();
  *status = !c ? 0 : c->broken ? 2 : 1;
  return 0;
}
API cuStreamEndCapture(void* stream, void** graph) {
  ENTER_STREAM(stream);
  std::shared_ptr<Capture> c = s->capture;
  *graph = nullptr;
  if (!c) return kInvalidValue;
  if (c->origin != s) return c->broken = kCaptureUnmatched;
  if (c->mode != 2 && c->thread != this_thread()) return kCaptureWrongThread;
  for (Stream* member : c->members) member->capture.reset();
  if (c->broken) return kCaptureInvalidated;
  for (uint32_t l = 1; l < c->lanes; ++l) {
    if (c->last[l] > (l < c->seen[0].size() ? c->seen[0][l] : 0)) return kCaptureUnjoined;
  }
  auto made = std::make_shared<Graph>();
  made->lane_count = c->lanes;
  made->events = c->events;
  made->nodes = std::make_shared<const std::vector<Node>>(std::move(c->nodes));
  *graph = make_handle(Kind::graph, s->context, made);
  return 0;
}
API cuGraphGetNodes(void* graph, void** nodes, size_t* count) {
  ENTER_GRAPH(Kind::graph, graph);
  size_t work = static_cast<size_t>(
      std::count_if(g.nodes->begin(), g.nodes->end(), [](const Node& n) { return n.kind == Node::work; }));
  for (size_t i = 0; nodes && i < *count && i < work; ++i) nodes[i] = nullptr;
  *count = work;
  return 0;
}
API cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  ENTER_GRAPH(Kind::graph, graph);
  auto made = std::make_shared<Graph>();
  made->nodes = g.nodes;
  made->lane_count = g.lane_count;
  made->events = g.events;
  for (uint32_t l = 1; l < g.lane_count; ++l) {
    Stream* lane = m.new_stream(graph_record.context, false);
    if (!lane) return kOutOfMemory;
    made->lanes.push_back(lane);
  }
  *executable = make_handle(Kind::executable_graph, graph_record.context, made);
  return 0;
}
API cuGraphInstantiate_v2(void** executable, void* graph, void*, char*, size_t) {
  ENTER;
  return cuGraphInstantiateWithFlags(executable, graph, 0);
}
API cuGraphUpload(void* executable, void* stream) {
  ENTER_STREAM(stream);
  return live(Kind::executable_graph, executable).context->sticky;
}
API cuGraphLaunch(void* executable, void* stream) {
  ENTER_GRAPH(Kind::executable_graph, executable);
  Stream* s;
  if (int code = find_stream(stream, &s)) return code;
  same_context(graph_record, *s->context);
  if (s->capture) return kNotSupported;
  return replay(g, *s);
}
API cuGraphDestroy(void* graph) {
  ENTER_INITIALIZED;
  if (!graph) return kInvalidValue;
  return end(live(Kind::graph, graph));
}
API cuGraphExecDestroy(void* executable) {
  ENTER_INITIALIZED;
  if (!executable) return kInvalidValue;
  return end(live(Kind::executable_graph, executable));
}
