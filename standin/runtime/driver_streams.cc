// The driver's streams, events and captured graphs.
#include <stdio.h>
#include <time.h>

#include <algorithm>

#include "api.h"
#include "options.h"

namespace standin {

Graph::~Graph() {
  for (Stream* lane : lanes) machine().drop_stream(lane);
}

int refuse_in_capture() {
  Machine& m = machine();
  return m.capturing_globally() ? m.break_captures(kCaptureUnsupported) : 0;
}

int synchronize(Stream* stream) {
  if (stream->capture) {
    stream->capture->broken = kCaptureUnsupported;
    return kCaptureUnsupported;
  }
  if (int code = refuse_in_capture()) return code;
  machine().host.join(stream->clock);
  return 0;
}

void note_order(const Running& running, const char* what, uint64_t bytes) {
  const std::string& path = options().order;
  if (path.empty()) return;
  FILE* file = fopen(path.c_str(), "a");
  if (!file) return;
  fprintf(file, "{\"what\":\"%s\",\"bytes\":%llu,\"stream\":%u,\"after\":{", what,
          static_cast<unsigned long long>(bytes), stream_of(running.tag));
  const char* comma = "";
  for (uint32_t s = 0; s < kStreams; ++s) {
    if (!running.ordered[s]) continue;
    fprintf(file, "%s\"%u\":%llu", comma, s, static_cast<unsigned long long>(running.ordered[s]));
    comma = ",";
  }
  fprintf(file, "}}\n");
  fclose(file);
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
  return synchronize(s);
}
// Stream and event may belong to different contexts.
API cuStreamWaitEvent(void* stream, void* event, unsigned) {
  ENTER_EVENT(event);
  Stream* s;
  if (int code = find_stream(stream, &s)) return code;
  std::shared_ptr<Capture> from = e.capture.lock();
  if (!from) {
    if (s->capture) {
      // A wait for work outside the graph would not be part of it.
      s->capture->broken = kCaptureUnsupported;
      return e.recorded ? 905 : 0;
    }
    if (e.recorded) s->clock.join(e.clock);
    return 0;
  }
  if (!s->capture) {
    s->capture = from;
    s->lane = from->lanes++;
    from->members.push_back(s);
    from->last.push_back(0);
    from->seen.emplace_back(from->lanes, 0);
  } else if (s->capture != from) {
    return 902;
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
  e.capture.reset();
  s->clock.join(m.host);
  e.clock = s->clock;
  e.recorded = true;
  e.seconds = seconds_now();
  return 0;
}
API cuEventRecord(void* event, void* stream) {
  ENTER;
  return cuEventRecordWithFlags(event, stream, 0);
}
API cuEventSynchronize(void* event) {
  ENTER_EVENT(event);
  if (std::shared_ptr<Capture> c = e.capture.lock()) {
    c->broken = kCapturedEvent;
    return kCapturedEvent;
  }
  if (int code = refuse_in_capture()) return code;
  if (e.recorded) m.host.join(e.clock);
  return 0;
}
API cuEventQuery(void* event) {
  ENTER_EVENT(event);
  if (!e.capture.expired()) return kCapturedEvent;
  if (e.recorded) m.host.join(e.clock);
  return 0;
}
API cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
  ENTER_EVENT(start);
  if (!end) return kInvalidHandle;
  const Record& end_record = live(Kind::event, end);
  same_context(event_record, end_record);
  const Event& last = object_of<Event>(end_record);
  if (!e.recorded || !last.recorded || !e.timed || !last.timed) return kInvalidHandle;
  *milliseconds = static_cast<float>(1e3 * (last.seconds - e.seconds));
  return 0;
}
API cuEventElapsedTime(float* milliseconds, void* start, void* end) {
  ENTER;
  return cuEventElapsedTime_v2(milliseconds, start, end);
}

// ---- graphs -----------------------------------------------------------------------------------------------

API cuStreamBeginCapture_v2(void* stream, int mode) {
  ENTER_STREAM(stream);
  if (s->legacy || s->capture) return kCaptureUnsupported;
  s->capture = std::make_shared<Capture>();
  s->capture->origin = s;
  s->capture->mode = mode;
  s->capture->members.push_back(s);
  s->capture->last.push_back(0);
  s->capture->seen.emplace_back(1, 0);
  s->lane = 0;
  return 0;
}
API cuStreamIsCapturing(void* stream, int* status) {
  ENTER_STREAM(stream);
  Capture* c = s->capture.get();
  *status = !c ? 0 : c->broken ? 2 : 1;
  return 0;
}
API cuStreamEndCapture(void* stream, void** graph) {
  ENTER_STREAM(stream);
  std::shared_ptr<Capture> c = s->capture;
  *graph = nullptr;
  if (!c) return kInvalidValue;
  if (c->origin != s) return kCaptureUnmatched;
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
