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

namespace {

double seconds_now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

}  // namespace
}  // namespace standin

using namespace standin;

// ---- streams and events -----------------------------------------------------------------------------------

API cuStreamCreateWithPriority(void** stream, unsigned flags, int) {
  ENTER_CONTEXT;
  Stream* made = m.new_stream(!(flags & 1));
  if (!made) return kOutOfMemory;
  *stream = made;
  return 0;
}
API cuStreamCreate(void** stream, unsigned flags) {
  return cuStreamCreateWithPriority(stream, flags, 0);
}
API cuStreamDestroy_v2(void* stream) {
  ENTER;
  Stream* s = stream_for(stream);
  if (s == &m.legacy) return kInvalidHandle;
  m.drop_stream(s);
  return m.sticky;
}
API cuStreamSynchronize(void* stream) {
  ENTER_CONTEXT;
  return synchronize(stream_for(stream));
}
API cuStreamQuery(void* stream) {
  ENTER_CONTEXT;
  return synchronize(stream_for(stream));
}
API cuStreamWaitEvent(void* stream, void* event, unsigned) {
  ENTER_CONTEXT;
  Stream* s = stream_for(stream);
  auto* e = static_cast<Event*>(event);
  std::shared_ptr<Capture> from = e->capture.lock();
  if (!from) {
    if (s->capture) {
      // A wait for work outside the graph would not be in it.
      s->capture->broken = kCaptureUnsupported;
      return e->recorded ? 905 : 0;
    }
    if (e->recorded) s->clock.join(e->clock);
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
  from->nodes.push_back({Node::wait, s->lane, nullptr, e->number, nullptr});
  auto& seen = from->seen[s->lane];
  const auto& other = from->event_seen[e->number];
  if (seen.size() < from->lanes) seen.resize(from->lanes);
  for (size_t l = 0; l < other.size(); ++l) seen[l] = std::max(seen[l], other[l]);
  return 0;
}
API cuEventCreate(void** event, unsigned flags) {
  ENTER_CONTEXT;
  auto* e = new Event;
  e->timed = !(flags & 2);
  *event = e;
  return 0;
}
API cuEventDestroy_v2(void* event) {
  ENTER;
  delete static_cast<Event*>(event);
  return m.sticky;
}
API cuEventRecordWithFlags(void* event, void* stream, unsigned flags) {
  ENTER_CONTEXT;
  Stream* s = stream_for(stream);
  auto* e = static_cast<Event*>(event);
  if (Capture* c = s->capture.get()) {
    if (flags & 1) {
      c->nodes.push_back({Node::outside, s->lane, nullptr, 0, e});
      return 0;
    }
    e->capture = s->capture;
    e->number = c->events++;
    auto seen = c->seen[s->lane];
    seen.resize(c->lanes);
    seen[s->lane] = c->last[s->lane];
    c->event_seen.push_back(seen);
    c->nodes.push_back({Node::record, s->lane, nullptr, e->number, nullptr});
    return 0;
  }
  e->capture.reset();
  s->clock.join(m.host);
  e->clock = s->clock;
  e->recorded = true;
  e->seconds = seconds_now();
  return 0;
}
API cuEventRecord(void* event, void* stream) {
  return cuEventRecordWithFlags(event, stream, 0);
}
API cuEventSynchronize(void* event) {
  ENTER_CONTEXT;
  auto* e = static_cast<Event*>(event);
  if (std::shared_ptr<Capture> c = e->capture.lock()) {
    c->broken = kCapturedEvent;
    return kCapturedEvent;
  }
  if (int code = refuse_in_capture()) return code;
  if (e->recorded) m.host.join(e->clock);
  return 0;
}
API cuEventQuery(void* event) {
  ENTER_CONTEXT;
  auto* e = static_cast<Event*>(event);
  if (!e->capture.expired()) return kCapturedEvent;
  if (e->recorded) m.host.join(e->clock);
  return 0;
}
API cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
  ENTER_CONTEXT;
  auto *a = static_cast<Event*>(start), *b = static_cast<Event*>(end);
  if (!a->recorded || !b->recorded || !a->timed || !b->timed) return kInvalidHandle;
  *milliseconds = static_cast<float>(1e3 * (b->seconds - a->seconds));
  return 0;
}
API cuEventElapsedTime(float* milliseconds, void* start, void* end) {
  return cuEventElapsedTime_v2(milliseconds, start, end);
}

// ---- graphs -----------------------------------------------------------------------------------------------

API cuStreamBeginCapture_v2(void* stream, int mode) {
  ENTER_CONTEXT;
  Stream* s = stream_for(stream);
  if (s == &m.legacy || s->capture) return kCaptureUnsupported;
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
  ENTER_CONTEXT;
  Capture* c = stream_for(stream)->capture.get();
  *status = !c ? 0 : c->broken ? 2 : 1;
  return 0;
}
API cuStreamEndCapture(void* stream, void** graph) {
  ENTER_CONTEXT;
  Stream* s = stream_for(stream);
  std::shared_ptr<Capture> c = s->capture;
  *graph = nullptr;
  if (!c) return kInvalidValue;
  if (c->origin != s) return kCaptureUnmatched;
  for (Stream* member : c->members) member->capture.reset();
  if (c->broken) return kCaptureInvalidated;
  for (uint32_t l = 1; l < c->lanes; ++l) {
    if (c->last[l] > (l < c->seen[0].size() ? c->seen[0][l] : 0)) return kCaptureUnjoined;
  }
  auto* made = new Graph;
  made->lane_count = c->lanes;
  made->events = c->events;
  made->nodes = std::make_shared<const std::vector<Node>>(std::move(c->nodes));
  *graph = made;
  return 0;
}
API cuGraphGetNodes(void* graph, void** nodes, size_t* count) {
  ENTER_CONTEXT;
  auto& all = *static_cast<Graph*>(graph)->nodes;
  size_t work = static_cast<size_t>(
      std::count_if(all.begin(), all.end(), [](const Node& n) { return n.kind == Node::work; }));
  for (size_t i = 0; nodes && i < *count && i < work; ++i) nodes[i] = nullptr;
  *count = work;
  return 0;
}
API cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  ENTER_CONTEXT;
  auto* g = static_cast<Graph*>(graph);
  auto made = std::make_unique<Graph>();
  made->nodes = g->nodes;
  made->lane_count = g->lane_count;
  made->events = g->events;
  for (uint32_t l = 1; l < g->lane_count; ++l) {
    Stream* lane = m.new_stream(false);
    if (!lane) return kOutOfMemory;
    made->lanes.push_back(lane);
  }
  *executable = made.release();
  return 0;
}
API cuGraphInstantiate_v2(void** executable, void* graph, void*, char*, size_t) {
  return cuGraphInstantiateWithFlags(executable, graph, 0);
}
API cuGraphUpload(void*, void*) {
  ENTER_CONTEXT;
  return 0;
}
API cuGraphLaunch(void* executable, void* stream) {
  ENTER_CONTEXT;
  Stream* s = stream_for(stream);
  if (s->capture) return kNotSupported;
  return replay(*static_cast<Graph*>(executable), *s);
}
API cuGraphDestroy(void* graph) {
  ENTER;
  delete static_cast<Graph*>(graph);
  return m.sticky;
}
API cuGraphExecDestroy(void* executable) {
  ENTER;
  delete static_cast<Graph*>(executable);
  return m.sticky;
}
