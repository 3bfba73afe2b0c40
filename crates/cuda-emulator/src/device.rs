//! The same launches on a GPU, whose bytes are compared with the emulator's.
//!
//! With `CANDLE_NORM_GPU=FOLDER`, each launch in [`Order::Ascending`](crate::Order) runs on the
//! first GPU too, by the modules (`.cubin` or `.ptx`) of the folder, on copies of its buffers. A
//! line for each goes to `launches.tsv` in `CANDLE_NORM_GPU_LOG`, a folder: `same`, `differs` or
//! `failed`, the kernel, and what was found. `CANDLE_NORM_GPU_EXACT` leaves no bytes around the
//! copies, for a checker of memory. The driver is loaded when it is first needed.
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

/// A buffer that a launch takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffer {
    /// The index of the argument.
    pub(crate) argument: usize,
    pub(crate) address: u64,
    pub(crate) bytes: usize,
    /// Bytes of an element.
    pub(crate) size: usize,
}

/// Grid, block and dynamic shared memory of a launch.
pub(crate) type Geometry = ([u32; 3], [u32; 3], u32);

type Pointer = u64;
type Handle = *mut c_void;
type Status<T> = Result<T, String>;
/// The bytes of each buffer, and whether what lies around it was left as it was.
type Found = Vec<(Vec<u8>, bool)>;

/// Functions of the driver.
struct Driver {
    error_name: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int,
    set_context: unsafe extern "C" fn(Handle) -> c_int,
    allocate: unsafe extern "C" fn(*mut Pointer, usize) -> c_int,
    free: unsafe extern "C" fn(Pointer) -> c_int,
    to_device: unsafe extern "C" fn(Pointer, *const c_void, usize) -> c_int,
    to_host: unsafe extern "C" fn(*mut c_void, Pointer, usize) -> c_int,
    fill: unsafe extern "C" fn(Pointer, u8, usize) -> c_int,
    load: unsafe extern "C" fn(*mut Handle, *const c_void) -> c_int,
    function: unsafe extern "C" fn(*mut Handle, Handle, *const c_char) -> c_int,
    launch: unsafe extern "C" fn(
        Handle,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        Handle,
        *mut *mut c_void,
        *mut *mut c_void,
    ) -> c_int,
    synchronize: unsafe extern "C" fn() -> c_int,
    context: Handle,
}

/// The GPU, its modules, and where results are written.
pub(crate) struct Gpu {
    driver: Driver,
    modules: Vec<Handle>,
    functions: HashMap<String, Handle>,
    /// Bytes before and behind a buffer.
    guard: usize,
    log: File,
}

// SAFETY: handles of the driver may be used by any thread that has set the context, and each call
// of `Gpu` sets it.
unsafe impl Send for Gpu {}

unsafe extern "C" {
    fn dlopen(name: *const c_char, flags: c_int) -> Handle;
    fn dlsym(library: Handle, name: *const c_char) -> Handle;
}

/// The GPU, if the environment asks for one.
pub(crate) fn gpu() -> Option<&'static Mutex<Gpu>> {
    static GPU: OnceLock<Option<Mutex<Gpu>>> = OnceLock::new();
    let gpu = GPU.get_or_init(|| {
        let folder = PathBuf::from(std::env::var_os("CANDLE_NORM_GPU")?);
        let log = PathBuf::from(std::env::var_os("CANDLE_NORM_GPU_LOG").unwrap_or(".".into()));
        match Gpu::new(&folder, &log) {
            Ok(gpu) => Some(Mutex::new(gpu)),
            Err(error) => panic!("CANDLE_NORM_GPU is set, and {error}"),
        }
    });
    gpu.as_ref()
}

/// The function `name` of `library`.
///
/// # Safety
/// `F` is the type of a pointer to that function.
unsafe fn find<F: Copy>(library: Handle, name: &CStr) -> Status<F> {
    const { assert!(size_of::<F>() == size_of::<Handle>()) };
    // SAFETY: `library` is open, and `name` ends in a zero.
    let symbol = unsafe { dlsym(library, name.as_ptr()) };
    if symbol.is_null() {
        return Err(format!("the driver has no {name:?}"));
    }
    // SAFETY: the caller answers for the type, which is as large as a pointer.
    Ok(unsafe { std::mem::transmute_copy::<Handle, F>(&symbol) })
}

impl Driver {
    fn new() -> Status<Self> {
        const NOW: c_int = 2;
        // SAFETY: the types are those of the driver's interface; no pointer outlives the call it
        // is passed to.
        unsafe {
            let library = dlopen(c"libcuda.so.1".as_ptr(), NOW);
            if library.is_null() {
                return Err("there is no libcuda.so.1".into());
            }
            let mut driver = Self {
                error_name: find(library, c"cuGetErrorName")?,
                set_context: find(library, c"cuCtxSetCurrent")?,
                allocate: find(library, c"cuMemAlloc_v2")?,
                free: find(library, c"cuMemFree_v2")?,
                to_device: find(library, c"cuMemcpyHtoD_v2")?,
                to_host: find(library, c"cuMemcpyDtoH_v2")?,
                fill: find(library, c"cuMemsetD8_v2")?,
                load: find(library, c"cuModuleLoadData")?,
                function: find(library, c"cuModuleGetFunction")?,
                launch: find(library, c"cuLaunchKernel")?,
                synchronize: find(library, c"cuCtxSynchronize")?,
                context: std::ptr::null_mut(),
            };
            let init: unsafe extern "C" fn(c_uint) -> c_int = find(library, c"cuInit")?;
            let get: unsafe extern "C" fn(*mut c_int, c_int) -> c_int =
                find(library, c"cuDeviceGet")?;
            let retain: unsafe extern "C" fn(*mut Handle, c_int) -> c_int =
                find(library, c"cuDevicePrimaryCtxRetain")?;
            let mut device = 0;
            driver.check("cuInit", init(0))?;
            driver.check("cuDeviceGet", get(&mut device, 0))?;
            let mut context = std::ptr::null_mut();
            driver.check("cuDevicePrimaryCtxRetain", retain(&mut context, device))?;
            driver.context = context;
            Ok(driver)
        }
    }

    fn check(&self, what: &str, code: c_int) -> Status<()> {
        if code == 0 {
            return Ok(());
        }
        let mut name = std::ptr::null();
        // SAFETY: the driver sets the pointer to a text of its own, or leaves it.
        let named = unsafe { (self.error_name)(code, &mut name) };
        if named != 0 || name.is_null() {
            return Err(format!("{what} gives {code}"));
        }
        // SAFETY: the text ends in a zero and is never freed.
        let name = unsafe { CStr::from_ptr(name) };
        Err(format!("{what} gives {}", name.to_string_lossy()))
    }
}

/// Memory of the GPU that ends where a buffer does, within a page that is NaN elsewhere.
struct OnDevice<'a> {
    driver: &'a Driver,
    memory: Pointer,
    at: Pointer,
    guard: usize,
}

impl<'a> OnDevice<'a> {
    /// At the same place of 16 bytes as the buffer on the host, with `guard` bytes around it.
    fn new(driver: &'a Driver, buffer: &Buffer, guard: usize) -> Status<Self> {
        let before = guard + (buffer.address % 16) as usize;
        let all = (before + buffer.bytes + guard).max(1);
        let mut memory = 0;
        // SAFETY: the driver writes one pointer.
        driver.check("cuMemAlloc", unsafe { (driver.allocate)(&mut memory, all) })?;
        let at = memory + before as u64;
        let copy = Self {
            driver,
            memory,
            at,
            guard,
        };
        // SAFETY: the memory has as many bytes, and the caller's buffer too.
        unsafe {
            driver.check("cuMemsetD8", (driver.fill)(memory, 0xff, all))?;
            let from = buffer.address as *const c_void;
            driver.check("cuMemcpyHtoD", (driver.to_device)(at, from, buffer.bytes))?;
        }
        Ok(copy)
    }

    /// The bytes of the buffer, and those around it.
    fn read(&self, buffer: &Buffer) -> Status<(Vec<u8>, bool)> {
        let before = (self.at - self.memory) as usize;
        let mut all = vec![0u8; before + buffer.bytes + self.guard];
        // SAFETY: both have as many bytes.
        self.driver.check("cuMemcpyDtoH", unsafe {
            (self.driver.to_host)(all.as_mut_ptr().cast(), self.memory, all.len())
        })?;
        let end = before + buffer.bytes;
        let guard = all[..before].iter().chain(&all[end..]);
        let untouched = guard.clone().all(|&byte| byte == 0xff);
        Ok((all[before..end].to_vec(), untouched))
    }
}

impl Drop for OnDevice<'_> {
    fn drop(&mut self) {
        // SAFETY: it was allocated, and nothing uses it any more.
        unsafe { (self.driver.free)(self.memory) };
    }
}

impl Gpu {
    fn new(folder: &Path, log: &Path) -> Status<Self> {
        let driver = Driver::new()?;
        // SAFETY: the context is that of the driver.
        driver.check("cuCtxSetCurrent", unsafe {
            (driver.set_context)(driver.context)
        })?;
        let entries = folder
            .read_dir()
            .map_err(|error| format!("{} cannot be read: {error}", folder.display()))?;
        let mut modules = Vec::new();
        let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            let kind = path.extension().and_then(|kind| kind.to_str());
            if !matches!(kind, Some("cubin" | "ptx")) {
                continue;
            }
            let mut image = std::fs::read(&path).map_err(|error| error.to_string())?;
            // PTX is a text that ends in a zero.
            image.push(0);
            let mut module = std::ptr::null_mut();
            // SAFETY: the image lives as long as the call.
            let code = unsafe { (driver.load)(&mut module, image.as_ptr().cast()) };
            driver.check(&format!("loading {}", path.display()), code)?;
            modules.push(module);
        }
        let name = log.join("launches.tsv");
        let log = OpenOptions::new().create(true).append(true).open(&name);
        let log = log.map_err(|error| format!("{}: {error}", name.display()))?;
        Ok(Self {
            driver,
            modules,
            functions: HashMap::new(),
            guard: match std::env::var_os("CANDLE_NORM_GPU_EXACT") {
                Some(_) => 0,
                None => 256,
            },
            log,
        })
    }

    fn function(&mut self, kernel: &CStr) -> Status<Handle> {
        let name = kernel.to_string_lossy().into_owned();
        if let Some(&function) = self.functions.get(&name) {
            return Ok(function);
        }
        for &module in &self.modules {
            let mut function = std::ptr::null_mut();
            // SAFETY: the module is loaded, and the name ends in a zero.
            if unsafe { (self.driver.function)(&mut function, module, kernel.as_ptr()) } == 0 {
                self.functions.insert(name, function);
                return Ok(function);
            }
        }
        Err("no module has it".into())
    }

    /// Outputs of the launch on the GPU, in the order of the buffers, before the emulator changes
    /// them; and whether what lies around them was left as it was.
    fn run(
        &mut self,
        kernel: &CStr,
        (grid, block, shared): Geometry,
        words: &[u64],
        buffers: &[Buffer],
    ) -> Status<Found> {
        // SAFETY: the context is that of the driver.
        self.driver.check("cuCtxSetCurrent", unsafe {
            (self.driver.set_context)(self.driver.context)
        })?;
        let function = self.function(kernel)?;
        let driver = &self.driver;
        let copies = buffers.iter();
        let copies = copies.map(|buffer| OnDevice::new(driver, buffer, self.guard));
        let copies = copies.collect::<Status<Vec<_>>>()?;
        let mut words = words.to_vec();
        for (buffer, copy) in buffers.iter().zip(&copies) {
            words[buffer.argument] = copy.at;
        }
        let mut params: Vec<*mut c_void> = words
            .iter_mut()
            .map(|word| (word as *mut u64).cast())
            .collect();
        let null = std::ptr::null_mut();
        // SAFETY: `params` points at a word for each argument of the kernel, whose number the
        // emulator checks.
        let code = unsafe {
            (driver.launch)(
                function,
                grid[0],
                grid[1],
                grid[2],
                block[0],
                block[1],
                block[2],
                shared,
                null,
                params.as_mut_ptr(),
                null.cast(),
            )
        };
        driver.check("cuLaunchKernel", code)?;
        // SAFETY: it takes nothing.
        driver.check("the kernel", unsafe { (driver.synchronize)() })?;
        let all = buffers.iter().zip(&copies);
        all.map(|(buffer, copy)| copy.read(buffer)).collect()
    }

    fn write(&mut self, state: &str, kernel: &CStr, text: &str) {
        let kernel = kernel.to_string_lossy();
        // A log that cannot be written is missed by who reads it.
        let _ = writeln!(self.log, "{state}\t{kernel}\t{text}");
    }
}

/// The result on the GPU of a launch that the emulator is about to run.
pub(crate) fn before(
    kernel: &CString,
    geometry: Geometry,
    words: &[u64],
    buffers: &[Buffer],
) -> Option<Status<Found>> {
    // Those that the emulator itself is tested with are in no module.
    if kernel.to_bytes().starts_with(b"self_test") {
        return None;
    }
    let mut gpu = gpu()?.lock().unwrap_or_else(PoisonError::into_inner);
    Some(gpu.run(kernel, geometry, words, buffers))
}

/// Compares it with what the emulator made.
pub(crate) fn after(kernel: &CString, buffers: &[Buffer], found: Status<Found>) {
    let Some(gpu) = gpu() else { return };
    let mut gpu = gpu.lock().unwrap_or_else(PoisonError::into_inner);
    let found = match found {
        Ok(found) => found,
        Err(error) => return gpu.write("failed", kernel, &error),
    };
    let is_bf16 = kernel.to_string_lossy().contains("bf16");
    for (buffer, (got, untouched)) in buffers.iter().zip(&found) {
        let argument = buffer.argument;
        if !untouched {
            gpu.write(
                "differs",
                kernel,
                &format!("argument {argument} is written around"),
            );
            return;
        }
        // SAFETY: the buffer lives until the launch returns, and nothing writes it now.
        let want = unsafe { std::slice::from_raw_parts(buffer.address as *const u8, buffer.bytes) };
        if got == want {
            continue;
        }
        let pairs = got.chunks(buffer.size).zip(want.chunks(buffer.size));
        let other: Vec<usize> = pairs
            .enumerate()
            .filter(|(_, (a, b))| a != b && !(is_nan(a, is_bf16) && is_nan(b, is_bf16)))
            .map(|(i, _)| i)
            .collect();
        let Some(first) = other.first() else { continue };
        let (count, all) = (other.len(), want.len() / buffer.size);
        let text = format!("argument {argument}: {count} of {all} elements, the first is {first}");
        return gpu.write("differs", kernel, &text);
    }
    gpu.write("same", kernel, "");
}

/// A NaN of any bits: which ones, the standard leaves open.
fn is_nan(bytes: &[u8], is_bf16: bool) -> bool {
    match *bytes {
        [a, b] => {
            let bits = u16::from_le_bytes([a, b]) & 0x7fff;
            bits > if is_bf16 { 0x7f80 } else { 0x7c00 }
        }
        [a, b, c, d] => f32::from_le_bytes([a, b, c, d]).is_nan(),
        [a, b, c, d, e, f, g, h] => f64::from_le_bytes([a, b, c, d, e, f, g, h]).is_nan(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_two_nans_are_the_same() {
        assert!(is_nan(&f32::NAN.to_le_bytes(), false));
        assert!(is_nan(&(-f64::NAN).to_le_bytes(), false));
        assert!(is_nan(&0x7e00u16.to_le_bytes(), false));
        // A large number of bf16, and a NaN of f16.
        assert!(!is_nan(&0x7e00u16.to_le_bytes(), true));
        assert!(is_nan(&0xffc0u16.to_le_bytes(), true));
        assert!(!is_nan(&f32::INFINITY.to_le_bytes(), false));
    }
}
