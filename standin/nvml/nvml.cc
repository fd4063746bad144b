// libnvidia-ml.so for the stand-in GPU: the functions that a run's metrics ask, with fixed answers. The GPU on bus 1 is hot
// and throttled, so that tests can tell the GPUs apart.
#include <cstdint>
#include <cstdio>
#include <cstring>

#define API extern "C" __attribute__((visibility("default"))) int

namespace {
const int kNotFound = 6, kInvalid = 2;
int cards[8];  // A handle is the address of its number.

bool is_card(const int* card) { return card >= cards && card < cards + 8; }
}  // namespace

API nvmlInit_v2() {
  for (int i = 0; i < 8; ++i) cards[i] = i;
  return 0;
}
API nvmlDeviceGetHandleByPciBusId_v2(const char* place, int** card) {
  unsigned domain = 0, bus = 0, slot = 0;
  if (sscanf(place, "%x:%x:%x.0", &domain, &bus, &slot) != 3 || bus >= 8) return kNotFound;
  *card = cards + bus;
  return 0;
}
API nvmlDeviceGetMemoryInfo(int* card, uint64_t* memory) {
  if (!is_card(card)) return kInvalid;
  memory[0] = 4096u << 20;  // total, free, used: in this order
  memory[2] = 1024u << 20;
  memory[1] = memory[0] - memory[2];
  return 0;
}
API nvmlDeviceGetTemperature(int* card, unsigned kind, unsigned* celsius) {
  if (!is_card(card) || kind != 0) return kInvalid;
  *celsius = *card == 1 ? 91 : 61;
  return 0;
}
API nvmlDeviceGetClockInfo(int* card, unsigned kind, unsigned* mhz) {
  if (!is_card(card) || (kind != 1 && kind != 2)) return kInvalid;
  *mhz = kind == 1 ? 1755 : 2619;
  return 0;
}
API nvmlDeviceGetPowerUsage(int* card, unsigned* milliwatts) {
  if (!is_card(card)) return kInvalid;
  *milliwatts = 654321;
  return 0;
}
API nvmlDeviceGetCurrentClocksThrottleReasons(int* card, uint64_t* reasons) {
  if (!is_card(card)) return kInvalid;
  *reasons = *card == 1 ? 0x40 : 0x01;  // hot; idle, which is no reason to worry
  return 0;
}
