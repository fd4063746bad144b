"""A few lines of ctypes around the stand-in's libcuda.so, for trying kernels from a Python prompt.

    python3 -i standin/probe.py OUT      (OUT as given to build.sh)
    >>> x = gpu.upload(array("f", range(256)))
    >>> gpu.launch("kernel_name", 1, 256, 0, x, u32(256), f32(2.5))
    >>> gpu.download(x, "f", 256)
"""
import ctypes as C
import sys
from array import array

u32, i32, u64, f32 = C.c_uint32, C.c_int32, C.c_uint64, C.c_float


class Gpu:
    def __init__(self, folder):
        self.cuda = C.CDLL(f"{folder}/libcuda.so")
        self.check(self.cuda.cuInit(0))
        context = C.c_void_p()
        self.check(self.cuda.cuDevicePrimaryCtxRetain(C.byref(context), 0))
        self.check(self.cuda.cuCtxSetCurrent(context))
        self.module = C.c_void_p()
        self.check(self.cuda.cuModuleLoadData(C.byref(self.module), None))

    def check(self, code):
        if code:
            text = C.create_string_buffer(4096)
            self.cuda.standin_report(text, C.c_size_t(4096))
            raise RuntimeError(f"CUDA error {code}: {text.value.decode()}")

    def configure(self, text):
        self.check(self.cuda.standin_configure(text.encode()))

    def kernels(self):
        name, found = C.c_char_p(), []
        for i in range(self.cuda.standin_kernel(-1, None)):
            self.cuda.standin_kernel(i, C.byref(name))
            found.append(name.value.decode())
        return sorted(found)

    def alloc(self, size):
        p = u64()
        self.check(self.cuda.cuMemAlloc_v2(C.byref(p), C.c_size_t(size)))
        return p

    def upload(self, data):
        """From an `array`, bytes or anything with the buffer protocol (numpy)."""
        raw = memoryview(data).cast("B").tobytes()
        p = self.alloc(max(len(raw), 1))
        self.check(self.cuda.cuMemcpyHtoD_v2(p, raw, C.c_size_t(len(raw))))
        return p

    def download(self, p, code, count):
        out = array(code, bytes(count * array(code).itemsize))
        view = (C.c_char * (count * out.itemsize)).from_buffer(out)
        self.check(self.cuda.cuMemcpyDtoH_v2(view, p, C.c_size_t(len(view))))
        return out

    def launch(self, name, grid, block, shared, *arguments):
        f = C.c_void_p()
        self.check(self.cuda.cuModuleGetFunction(C.byref(f), self.module, name.encode()))
        if shared > 48 << 10:
            self.check(self.cuda.cuFuncSetAttribute(f, 8, shared))
        gx, gy, gz = (tuple(grid) + (1, 1))[:3] if isinstance(grid, (tuple, list)) else (grid, 1, 1)
        list_of = (C.c_void_p * max(len(arguments), 1))(*[C.addressof(a) for a in arguments])
        self.check(self.cuda.cuLaunchKernel(f, gx, gy, gz, block, 1, 1, shared, None, list_of, None))


if __name__ == "__main__" and len(sys.argv) > 1:
    gpu = Gpu(sys.argv[1])
