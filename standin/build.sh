#!/bin/sh
# Builds the stand-in GPU's libraries with the host's C++ compiler.
#
#   standin/build.sh OUT [KERNEL.cu…]      default: every kernels/*.cu
#
# Leaves libcuda.so, libcublasLt.so and libnccl.so.2 in OUT, under the names that programs look for. Compiles only what
# changed, on as many cores as there are. CXX, STANDIN_FLAGS and STANDIN_OBJECTS (a folder to keep object files in) are honoured.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$1
shift
mkdir -p "$out"
out=$(cd "$out" && pwd)
objects=${STANDIN_OBJECTS:-$out/objects}
mkdir -p "$objects"
objects=$(cd "$objects" && pwd)
cxx=${CXX:-g++}
[ $# -gt 0 ] || set -- $(ls "$here"/../kernels/*.cu 2>/dev/null || true)

common="-std=c++17 -g1 -fPIC -fvisibility=hidden -fno-exceptions -DVITRUM_STANDIN -MMD -Wall -Wextra ${STANDIN_FLAGS:-}"
# The kernels: hooks at every access (nothing of the sanitizers' own libraries is linked).
kernel_flags="-O2 -fno-strict-aliasing -xc++ -fsanitize=thread --param=tsan-instrument-func-entry-exit=0
  -fsanitize=bounds -fno-sanitize-recover=all -Wno-unknown-pragmas -Wno-psabi -Wno-unused-parameter -Wno-unused-function"
# A warp's registers are read as whatever type an instruction names, and nothing is fused that PTX does not fuse.
runtime_flags="-O3 -pthread -fno-strict-aliasing -ffp-contract=off"

stale() { # OBJECT: is it missing, or older than something it was made of?
  [ -f "$1" ] && [ -f "${1%.o}.d" ] || return 0
  for file in $(sed -e 's/^[^:]*://' -e 's/\\$//' "${1%.o}.d"); do
    [ -e "$file" ] && [ ! "$file" -nt "$1" ] || return 0
  done
  [ "$here/build.sh" -nt "$1" ]
}

jobs=$objects/jobs
: >"$jobs"
cuda="" blas=""
for source in "$here"/runtime/*.cc "$here"/runtime/ptx/*.cc; do
  object=$objects/$(basename "$source").o
  case $source in */ptx/*) object=$objects/ptx_$(basename "$source").o ;; esac
  cuda="$cuda $object"
  stale "$object" && echo "$cxx $common $runtime_flags -c $source -o $object" >>"$jobs"
done
for source in "$here"/blaslt/*.cc; do
  [ -e "$source" ] || continue
  object=$objects/$(basename "$source").o
  blas="$blas $object"
  stale "$object" && echo "$cxx $common $runtime_flags -c $source -o $object" >>"$jobs"
done
nccl=""
for source in "$here"/nccl/*.cc; do
  [ -e "$source" ] || continue
  object=$objects/nccl_$(basename "$source").o
  nccl="$nccl $object"
  stale "$object" && echo "$cxx $common $runtime_flags -c $source -o $object" >>"$jobs"
done
for source in "$@"; do
  source=$(cd "$(dirname "$source")" && pwd)/$(basename "$source")
  object=$objects/$(basename "$source").o
  cuda="$cuda $object"
  stale "$object" && echo "$cxx $common" $kernel_flags "-c $source -o $object" >>"$jobs"
done
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
if [ -s "$jobs" ]; then
  tr '\n' '\0' <"$jobs" | xargs -0 -n 1 -P "$cores" sh -c
fi
link="$cxx -shared -pthread -Wl,--no-undefined"
$link -Wl,-soname,libcuda.so -o "$out/libcuda.so.new" $cuda -ldl
mv "$out/libcuda.so.new" "$out/libcuda.so"
ln -sf libcuda.so "$out/libcuda.so.1"
if [ -n "$blas" ]; then
  $link -Wl,-soname,libcublasLt.so -Wl,-rpath,'$ORIGIN' -o "$out/libcublasLt.so.new" $blas "$out/libcuda.so"
  mv "$out/libcublasLt.so.new" "$out/libcublasLt.so"
  ln -sf libcublasLt.so "$out/libcublasLt.so.13"
  ln -sf libcublasLt.so "$out/libcublasLt.so.12"
fi
if [ -n "$nccl" ]; then
  $link -Wl,-soname,libnccl.so.2 -Wl,-rpath,'$ORIGIN' -o "$out/libnccl.so.2.new" $nccl "$out/libcuda.so" -lrt
  mv "$out/libnccl.so.2.new" "$out/libnccl.so.2"
fi
