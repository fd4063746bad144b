//! The stand-in's driver functions, loaded from one of its folders, behind a few safe-looking calls for tests.
#![allow(dead_code, unreachable_pub)]

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr;
use std::sync::{Mutex, MutexGuard};

use libloading::Library;

/// A handle of the driver's.
pub type Handle = *mut c_void;

/// A library that stays loaded, one user at a time: the stand-in's options and errors are those of the process.
pub struct Gpu {
    library: Library,
    module: Handle,
    _alone: MutexGuard<'static, ()>,
}

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
        let mut context = ptr::null_mut();
        assert_eq!(cu!(gpu, cuDevicePrimaryCtxRetain(&mut context => *mut Handle, 0 => c_int)), 0);
        let mut module = ptr::null_mut();
        assert_eq!(cu!(gpu, cuModuleLoadData(&mut module => *mut Handle, ptr::null() => *const c_void)), 0);
        gpu.module = module;
        gpu
    }

    pub fn library(&self) -> &Library {
        &self.library
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
        let text = CString::new(name).unwrap();
        let mut function = ptr::null_mut();
        let code = cu!(self, cuModuleGetFunction(
            &mut function => *mut Handle, self.module => Handle, text.as_ptr() => *const c_char));
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
        let function = self.function(name);
        let mut pointers: Vec<*const c_void> = args.iter().map(|arg| arg.as_ptr().cast()).collect();
        cu!(self, cuLaunchKernel(
            function => Handle, grid => u32, 1 => u32, 1 => u32, block => u32, 1 => u32, 1 => u32, shared => u32,
            stream => Handle, pointers.as_mut_ptr() => *mut *const c_void, ptr::null_mut() => *mut Handle))
    }

    pub fn launch(&self, name: &str, grid: u32, block: u32, shared: u32, args: &[Vec<u8>]) -> c_int {
        self.launch_on(ptr::null_mut(), name, grid, block, shared, args)
    }

    pub fn new_stream(&self) -> Handle {
        let mut stream = ptr::null_mut();
        assert_eq!(cu!(self, cuStreamCreate(&mut stream => *mut Handle, 1 => u32)), 0);
        stream
    }

    pub fn new_event(&self) -> Handle {
        let mut event = ptr::null_mut();
        assert_eq!(cu!(self, cuEventCreate(&mut event => *mut Handle, 0 => u32)), 0);
        event
    }
}

/// The bytes of an argument.
pub fn arg<T: Copy>(value: T) -> Vec<u8> {
    // SAFETY: any value may be read as bytes; the types used here have no padding.
    unsafe { std::slice::from_raw_parts(ptr::from_ref(&value).cast::<u8>(), size_of::<T>()).to_vec() }
}
