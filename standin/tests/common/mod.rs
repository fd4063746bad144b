//! The stand-in's driver functions, loaded from one of its folders, as a few safe-looking calls for tests.
#![allow(dead_code, unreachable_pub)]

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr;
use std::sync::{Mutex, MutexGuard};

use libloading::Library;

/// A handle of the driver's.
pub type Handle = *mut c_void;

/// A library that stays loaded, one user at a time: the stand-in's options and errors are per process.
pub struct Gpu {
    library: Library,
    module: Handle,
    _alone: MutexGuard<'static, ()>,
}

// SAFETY: the module is a handle that never changes, and every function of the driver takes the driver's own lock.
unsafe impl Sync for Gpu {}

/// Calls a function of the driver by its name; arguments must have the types that it declares.
macro_rules! cu {
    ($gpu:expr, $name:ident ( $($value:expr => $type:ty),* $(,)? )) => {{
        // SAFETY: the caller writes down the C declaration's types; pointers given are valid for the call.
        unsafe {
            let function: libloading::Symbol<unsafe extern "C" fn($($type),*) -> std::ffi::c_int> =
                $gpu.library().get(concat!(stringify!($name), "\0").as_bytes()).expect(stringify!($name));
            function($($value),*)
        }
    }};
}

#[macro_use]
pub mod blas;
pub mod nvcc;

impl Gpu {
    /// Opens the libraries of a folder with fresh options; `options` as in `VITRUM_STANDIN`.
    pub fn open(folder: &Path, options: &str) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(|broken| broken.into_inner());
        // SAFETY: our own library; its initialisers only register kernels.
        let library = unsafe {
            Library::new(folder.join("libcuda.so")).expect("build with `cargo build -p vitrum-standin`")
        };
        let mut gpu = Self { library, module: ptr::null_mut(), _alone: alone };
        assert_eq!(cu!(gpu, standin_reset()), 0);
        gpu.configure(options);
        assert_eq!(cu!(gpu, cuInit(0 => u32)), 0);
        let context = gpu.retain(0);
        gpu.use_context(context);
        gpu.module = gpu.load();
        gpu
    }

    /// A reference to a GPU's primary context.
    pub fn retain(&self, card: c_int) -> Handle {
        let mut context = ptr::null_mut();
        assert_eq!(cu!(self, cuDevicePrimaryCtxRetain(&mut context => *mut Handle, card => c_int)), 0);
        context
    }

    /// Releases a reference; returns the code.
    pub fn release(&self, card: c_int) -> c_int {
        cu!(self, cuDevicePrimaryCtxRelease_v2(card => c_int))
    }

    /// Makes a context current; null: none.
    pub fn use_context(&self, context: Handle) {
        assert_eq!(cu!(self, cuCtxSetCurrent(context => Handle)), 0);
    }

    /// All kernels as a module of the current context.
    pub fn load(&self) -> Handle {
        let mut module = ptr::null_mut();
        assert_eq!(cu!(self, cuModuleLoadData(&mut module => *mut Handle, ptr::null() => *const c_void)), 0);
        module
    }

    /// The kernels of a PTX text, for the engine that runs it.
    pub fn load_ptx(&self, text: &str) -> Result<Handle, c_int> {
        let text = CString::new(text).unwrap();
        let mut module = ptr::null_mut();
        match cu!(self, cuModuleLoadData(&mut module => *mut Handle, text.as_ptr() => *const c_char)) {
            0 => Ok(module),
            code => Err(code),
        }
    }

    pub fn library(&self) -> &Library {
        &self.library
    }

    /// The module that was loaded first.
    pub fn module(&self) -> Handle {
        self.module
    }

    pub fn configure(&self, options: &str) {
        let text = CString::new(options).unwrap();
        assert_eq!(cu!(self, standin_configure(text.as_ptr() => *const c_char)), 0, "{options}");
    }

    /// The last report's text.
    pub fn report(&self) -> String {
        let mut buffer = vec![0u8; 1 << 14];
        let length =
            cu!(self, standin_report(buffer.as_mut_ptr() => *mut u8, buffer.len() => usize)) as usize;
        buffer.truncate(length);
        String::from_utf8(buffer).unwrap()
    }

    pub fn allocate(&self, bytes: usize) -> Result<u64, c_int> {
        let mut address = 0u64;
        match cu!(self, cuMemAlloc_v2(&mut address => *mut u64, bytes => usize)) {
            0 => Ok(address),
            code => Err(code),
        }
    }

    pub fn free(&self, address: u64) {
        assert_eq!(cu!(self, cuMemFree_v2(address => u64)), 0);
    }

    pub fn upload<T: Copy>(&self, values: &[T]) -> u64 {
        let bytes = size_of_val(values);
        let address = self.allocate(bytes.max(1)).unwrap();
        let from = values.as_ptr().cast::<c_void>();
        assert_eq!(cu!(self, cuMemcpyHtoD_v2(address => u64, from => *const c_void, bytes => usize)), 0);
        // From pageable memory, the copy may still be under way, and only the default stream waits for it.
        assert_eq!(self.wait(), 0);
        address
    }

    pub fn download<T: Copy + Default>(&self, address: u64, count: usize) -> Vec<T> {
        let mut values = vec![T::default(); count];
        let to = values.as_mut_ptr().cast::<c_void>();
        let bytes = size_of_val(&values[..]);
        assert_eq!(cu!(self, cuMemcpyDtoH_v2(to => *mut c_void, address => u64, bytes => usize)), 0);
        values
    }

    pub fn function(&self, name: &str) -> Handle {
        self.function_of(self.module, name)
    }

    pub fn function_of(&self, module: Handle, name: &str) -> Handle {
        let text = CString::new(name).unwrap();
        let mut function = ptr::null_mut();
        let code = cu!(self, cuModuleGetFunction(
            &mut function => *mut Handle, module => Handle, text.as_ptr() => *const c_char));
        assert_eq!(code, 0, "no kernel named {name}");
        function
    }

    /// Launches on a stream (null: the default one); each argument is the bytes of a value.
    pub fn launch_on(
        &self,
        stream: Handle,
        name: &str,
        grid: u32,
        block: u32,
        shared: u32,
        args: &[Vec<u8>],
    ) -> c_int {
        self.launch_function(self.function(name), stream, grid, block, shared, args)
    }

    pub fn launch_function(
        &self,
        function: Handle,
        stream: Handle,
        grid: u32,
        block: u32,
        shared: u32,
        args: &[Vec<u8>],
    ) -> c_int {
        let mut pointers: Vec<*const c_void> = args.iter().map(|arg| arg.as_ptr().cast()).collect();
        cu!(self, cuLaunchKernel(
            function => Handle, grid => u32, 1 => u32, 1 => u32, block => u32, 1 => u32, 1 => u32, shared => u32,
            stream => Handle, pointers.as_mut_ptr() => *mut *const c_void, ptr::null_mut() => *mut Handle))
    }

    pub fn launch(&self, name: &str, grid: u32, block: u32, shared: u32, args: &[Vec<u8>]) -> c_int {
        self.launch_on(ptr::null_mut(), name, grid, block, shared, args)
    }

    /// Waits for everything in the current context; returns the code.
    pub fn wait(&self) -> c_int {
        cu!(self, cuCtxSynchronize())
    }

    pub fn new_stream(&self) -> Handle {
        let mut stream = ptr::null_mut();
        assert_eq!(cu!(self, cuStreamCreate(&mut stream => *mut Handle, 1 => u32)), 0);
        stream
    }

    pub fn pinned(&self, bytes: usize) -> *mut c_void {
        let mut pointer = ptr::null_mut();
        assert_eq!(cu!(self, cuMemHostAlloc(&mut pointer => *mut *mut c_void, bytes => usize, 0 => u32)), 0);
        pointer
    }

    pub fn new_event(&self) -> Handle {
        let mut event = ptr::null_mut();
        assert_eq!(cu!(self, cuEventCreate(&mut event => *mut Handle, 0 => u32)), 0);
        event
    }
}

impl Drop for Gpu {
    /// Releases the last reference to the context, and with it everything that a test left in it.
    fn drop(&mut self) {
        cu!(self, standin_reset());
        self.release(0);
    }
}

/// The bytes of an argument.
pub fn arg<T: Copy>(value: T) -> Vec<u8> {
    // SAFETY: any value may be read as bytes; the types used here have no padding.
    unsafe { std::slice::from_raw_parts(ptr::from_ref(&value).cast::<u8>(), size_of::<T>()).to_vec() }
}

/// The variable that names the role of a child process of [`run_again`].
const ROLE: &str = "STANDIN_TEST_ROLE";

/// The role of this process, if [`run_again`] started it.
pub fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

/// Runs one test of this binary in a separate process, in which [`role`] returns `role`. Returns whether it was
/// ended by `abort()`, and what it wrote to stderr.
pub fn run_again(test: &str, role: &str) -> (bool, String) {
    use std::os::unix::process::ExitStatusExt;
    let program = std::env::current_exe().unwrap();
    let mut child = std::process::Command::new(program);
    let done = child.args(["--exact", test, "--nocapture"]).env(ROLE, role).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    let aborted = done.status.signal() == Some(SIGABRT);
    assert!(aborted || done.status.success(), "{role}: {}, {said}", done.status);
    (aborted, said)
}

const SIGABRT: i32 = 6;
