//! Calls that the backend makes of a device, counted for tests.

#[cfg(feature = "internals")]
use std::cell::RefCell;

#[cfg(feature = "internals")]
use candle_norm_support::host::{self, Copies};

/// Calls that layers made of a device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(not(feature = "internals"), allow(dead_code))]
pub struct Asked {
    /// Names of the kernels that were launched.
    pub launches: Vec<String>,
    /// Allocations of memory for kernels to write.
    pub allocations: usize,
    /// Copies of elements on the device before or after a launch, and casts of them.
    pub copies: usize,
    /// Copies to the host.
    pub to_host: usize,
    /// Copies from the host.
    pub from_host: usize,
    /// Times that the host waits for the device: as often as it copies from it.
    pub synchronizations: usize,
}

#[cfg(feature = "internals")]
thread_local! {
    static ASKED: RefCell<Option<Asked>> = const { RefCell::new(None) };
}

/// Runs `f` as if its tensors were on a GPU, and returns what it asked of it on this thread. A
/// check that would read elements of a device is left out.
#[cfg(feature = "internals")]
pub fn asked<T>(f: impl FnOnce() -> T) -> (T, Asked) {
    let before = ASKED.replace(Some(Asked::default()));
    let (result, copies) = host::recording(f);
    let mut asked = ASKED.replace(before).unwrap_or_default();
    let Copies { to_host, from_host } = copies;
    (asked.to_host, asked.from_host) = (to_host, from_host);
    asked.synchronizations = to_host;
    (result, asked)
}

/// Runs `f`, and returns the names of the kernels that it launched on this thread.
#[cfg(feature = "internals")]
pub fn launches<T>(f: impl FnOnce() -> T) -> (T, Vec<String>) {
    let (result, asked) = asked(f);
    (result, asked.launches)
}

/// Counts a call, where a test records them.
pub(super) fn count(what: impl FnOnce(&mut Asked)) {
    #[cfg(feature = "internals")]
    ASKED.with_borrow_mut(|asked| asked.as_mut().map(what));
    #[cfg(not(feature = "internals"))]
    let _ = what;
}
